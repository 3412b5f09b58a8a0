package xenapi

import (
	"bytes"
	"fmt"
	"strconv"
	"unicode/utf8"

	"github.com/patchd/patchd/pkg/xapi"
)

const xmlHeader = `<?xml version="1.0"?>`

// xmlSuccess is the response of a call that gave v.
func xmlSuccess(v any) []byte {
	return xmlResponse(map[string]any{"Status": "Success", "Value": v})
}

// xmlFailure is the response of a call that failed: never an XML-RPC fault.
func xmlFailure(e *xapi.Error) []byte {
	return xmlResponse(map[string]any{"Status": "Failure", "ErrorDescription": stringsToAny(e.Description())})
}

// xmlResponse wraps one bare value, as system.listMethods has it.
func xmlResponse(v any) []byte {
	var b bytes.Buffer
	b.WriteString(xmlHeader + "<methodResponse><params><param>")
	encodeXML(&b, v)
	b.WriteString("</param></params></methodResponse>")
	return b.Bytes()
}

// XMLValue is the XML-RPC encoding of one value, as task.result holds it:
// "<value>OpaqueRef:…</value>", "<value></value>" for void.
func XMLValue(v any) string {
	var b bytes.Buffer
	encodeXML(&b, v)
	return b.String()
}

func encodeXML(b *bytes.Buffer, v any) {
	b.WriteString("<value>")
	switch v := v.(type) {
	case nil:
	case string:
		escapeXML(b, v)
	case bool:
		n := "0"
		if v {
			n = "1"
		}
		b.WriteString("<boolean>" + n + "</boolean>")
	case float64:
		b.WriteString("<double>" + strconv.FormatFloat(v, 'g', 16, 64) + "</double>")
	case Date:
		b.WriteString("<dateTime.iso8601>" + string(v) + "</dateTime.iso8601>")
	case Int32:
		b.WriteString("<i4>" + strconv.Itoa(int(v)) + "</i4>")
	case int64:
		b.WriteString(strconv.FormatInt(v, 10))
	case []any:
		b.WriteString("<array><data>")
		for _, e := range v {
			encodeXML(b, e)
		}
		b.WriteString("</data></array>")
	case map[string]any:
		encodeXMLStruct(b, v)
	default:
		escapeXML(b, fmt.Sprint(v))
	}
	b.WriteString("</value>")
}

func encodeXMLStruct(b *bytes.Buffer, m map[string]any) {
	b.WriteString("<struct>")
	for _, k := range sortedKeys(m) {
		b.WriteString("<member><name>")
		escapeXML(b, k)
		b.WriteString("</name>")
		encodeXML(b, m[k])
		b.WriteString("</member>")
	}
	b.WriteString("</struct>")
}

// escapeXML writes s as character data. Control characters other than tab, LF
// and CR cannot stand in XML and are dropped; so are the two non-characters;
// bytes that are not UTF-8 become the replacement character.
func escapeXML(b *bytes.Buffer, s string) {
	for _, r := range s {
		switch {
		case r == '<':
			b.WriteString("&lt;")
		case r == '>':
			b.WriteString("&gt;")
		case r == '&':
			b.WriteString("&amp;")
		case r == '"':
			b.WriteString("&quot;")
		case r < 0x20 && r != '\t' && r != '\n' && r != '\r', r == 0xfffe, r == 0xffff:
		default:
			b.Write(utf8.AppendRune(nil, r))
		}
	}
}
