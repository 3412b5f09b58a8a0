package xenapi

import (
	"bytes"
	"encoding/base64"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"strconv"
	"strings"
	"unicode/utf8"
)

// decodeXML reads one XML-RPC methodCall. Ints come as int64, doubles as
// float64, base64 as string of its bytes, nil as nil. Whatever is not a plain
// methodCall is refused: directives (and with them entities), attributes,
// elements that do not belong, anything after the end.
func decodeXML(body []byte, limits Limits) (method string, params []any, err error) {
	if !utf8.Valid(body) {
		return "", nil, malformed("not UTF-8")
	}
	d := &xmlDecoder{dec: xml.NewDecoder(bytes.NewReader(body)), meter: meter{limits: limits}}
	d.dec.Strict = true
	if err := d.open("methodCall"); err != nil {
		return "", nil, err
	}
	if err := d.open("methodName"); err != nil {
		return "", nil, err
	}
	name, err := d.text("methodName")
	if err != nil {
		return "", nil, err
	}
	method = strings.TrimSpace(name)
	if method == "" {
		return "", nil, malformed("no method name")
	}
	params, err = d.params()
	if err != nil {
		return "", nil, err
	}
	if err := d.end(); err != nil {
		return "", nil, err
	}
	return method, params, nil
}

// xmlDecoder walks the tokens of one document.
type xmlDecoder struct {
	dec   *xml.Decoder
	meter meter
}

// next gives the next token that means something: StartElement, EndElement or
// CharData.
func (d *xmlDecoder) next() (xml.Token, error) {
	for {
		tok, err := d.dec.RawToken()
		if err != nil {
			if errors.Is(err, io.EOF) {
				return nil, malformed("the document ends early")
			}
			return nil, malformed("%w", err)
		}
		switch t := tok.(type) {
		case xml.Comment, xml.ProcInst:
			continue
		case xml.Directive:
			return nil, malformed("a document type or other directive")
		case xml.StartElement:
			for _, a := range t.Attr {
				if a.Name.Space != "xmlns" && a.Name.Local != "xmlns" {
					return nil, malformed("attribute %.32q", a.Name.Local)
				}
			}
			return t, nil
		default:
			return t, nil
		}
	}
}

// step gives the next start or end of an element; only white space may lie
// between.
func (d *xmlDecoder) step() (name string, start bool, err error) {
	for {
		tok, err := d.next()
		if err != nil {
			return "", false, err
		}
		switch t := tok.(type) {
		case xml.CharData:
			if len(bytes.TrimSpace(t)) > 0 {
				return "", false, malformed("text between elements")
			}
		case xml.StartElement:
			return t.Name.Local, true, nil
		case xml.EndElement:
			return t.Name.Local, false, nil
		}
	}
}

func (d *xmlDecoder) open(name string) error {
	got, start, err := d.step()
	if err == nil && (!start || got != name) {
		err = malformed("expected <%s>, found %.32q", name, got)
	}
	return err
}

func (d *xmlDecoder) close(name string) error {
	got, start, err := d.step()
	if err == nil && (start || got != name) {
		err = malformed("expected </%s>, found %.32q", name, got)
	}
	return err
}

// text reads to the end of the element name, which holds only text.
func (d *xmlDecoder) text(name string) (string, error) {
	var b strings.Builder
	for {
		tok, err := d.next()
		if err != nil {
			return "", err
		}
		switch t := tok.(type) {
		case xml.CharData:
			b.Write(t)
		case xml.StartElement:
			return "", malformed("<%.32s> inside <%s>", t.Name.Local, name)
		case xml.EndElement:
			if t.Name.Local != name {
				return "", malformed("expected </%s>", name)
			}
			return b.String(), nil
		}
	}
}

// params reads from behind the method name to the end of methodCall.
func (d *xmlDecoder) params() ([]any, error) {
	params := []any{}
	name, start, err := d.step()
	if err != nil {
		return nil, err
	}
	if !start && name == "methodCall" {
		return params, nil
	}
	if !start || name != "params" {
		return nil, malformed("expected <params>, found %.32q", name)
	}
	for {
		name, start, err := d.step()
		if err != nil {
			return nil, err
		}
		if !start && name == "params" {
			return params, d.close("methodCall")
		}
		if !start || name != "param" {
			return nil, malformed("expected <param>, found %.32q", name)
		}
		v, err := d.wrapped("param", 1)
		if err != nil {
			return nil, err
		}
		params = append(params, v)
	}
}

// wrapped reads one <value> and the end of the element around it.
func (d *xmlDecoder) wrapped(around string, depth int) (any, error) {
	if err := d.open("value"); err != nil {
		return nil, err
	}
	v, err := d.value(depth)
	if err != nil {
		return nil, err
	}
	return v, d.close(around)
}

// value reads from behind <value> to </value>. Without a type element the text
// is a string, white space and all.
func (d *xmlDecoder) value(depth int) (any, error) {
	if err := d.meter.enter(depth); err != nil {
		return nil, err
	}
	var text strings.Builder
	for {
		tok, err := d.next()
		if err != nil {
			return nil, err
		}
		switch t := tok.(type) {
		case xml.CharData:
			text.Write(t)
		case xml.EndElement:
			if t.Name.Local != "value" {
				return nil, malformed("expected </value>")
			}
			return text.String(), nil
		case xml.StartElement:
			if strings.TrimSpace(text.String()) != "" {
				return nil, malformed("text before <%.32s>", t.Name.Local)
			}
			v, err := d.typed(t.Name.Local, depth)
			if err != nil {
				return nil, err
			}
			return v, d.close("value")
		}
	}
}

func (d *xmlDecoder) typed(kind string, depth int) (any, error) {
	switch kind {
	case "array":
		return d.array(depth)
	case "struct":
		return d.structure(depth)
	}
	text, err := d.text(kind)
	if err != nil {
		return nil, err
	}
	return scalar(kind, text)
}

func scalar(kind, text string) (any, error) {
	if kind == "string" {
		return text, nil
	}
	text = strings.TrimSpace(text)
	switch kind {
	case "int", "i4", "i8":
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return nil, malformed("<%s>%.32q", kind, text)
		}
		return n, nil
	case "double":
		f, err := strconv.ParseFloat(text, 64)
		if err != nil || math.IsNaN(f) || math.IsInf(f, 0) {
			return nil, malformed("<double>%.32q", text)
		}
		return f, nil
	case "boolean":
		if text != "0" && text != "1" {
			return nil, malformed("<boolean>%.32q", text)
		}
		return text == "1", nil
	case "dateTime.iso8601":
		return text, nil
	case "nil":
		if text != "" {
			return nil, malformed("text in <nil>")
		}
		return nil, nil
	case "base64":
		b, err := base64.StdEncoding.DecodeString(text)
		if err != nil {
			return nil, malformed("base64: %w", err)
		}
		return string(b), nil
	}
	return nil, malformed("unknown type <%.32s>", kind)
}

func (d *xmlDecoder) array(depth int) (any, error) {
	if err := d.open("data"); err != nil {
		return nil, err
	}
	out := []any{}
	for {
		name, start, err := d.step()
		if err != nil {
			return nil, err
		}
		if !start && name == "data" {
			return out, d.close("array")
		}
		if !start || name != "value" {
			return nil, malformed("expected <value>, found %.32q", name)
		}
		v, err := d.value(depth + 1)
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
}

func (d *xmlDecoder) structure(depth int) (any, error) {
	out := map[string]any{}
	for {
		name, start, err := d.step()
		if err != nil {
			return nil, err
		}
		if !start && name == "struct" {
			return out, nil
		}
		if !start || name != "member" {
			return nil, malformed("expected <member>, found %.32q", name)
		}
		if err := d.open("name"); err != nil {
			return nil, err
		}
		key, err := d.text("name")
		if err != nil {
			return nil, err
		}
		if _, dup := out[key]; dup {
			return nil, malformed("member %.32q twice", key)
		}
		if out[key], err = d.wrapped("member", depth+1); err != nil {
			return nil, err
		}
	}
}

// end makes sure that nothing follows the document.
func (d *xmlDecoder) end() error {
	for {
		tok, err := d.dec.RawToken()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return malformed("%w", err)
		}
		switch t := tok.(type) {
		case xml.Comment:
		case xml.CharData:
			if len(bytes.TrimSpace(t)) > 0 {
				return malformed("text after the end")
			}
		default:
			return malformed("more than one document")
		}
	}
}
