package xenapi

import (
	"errors"
	"fmt"
	"math"
	"reflect"
	"strings"
	"testing"

	"github.com/patchd/patchd/pkg/xapi"
)

func methodCall(value string) string {
	return `<?xml version="1.0"?><methodCall><methodName>a.b</methodName><params><param>` + value + `</param></params></methodCall>`
}

func TestXMLValuesThatClientsSend(t *testing.T) {
	for _, tt := range []struct {
		name, in string
		want     any
	}{
		{"untyped text keeps its white space", "<value> a\n</value>", " a\n"},
		{"typed text", "<value><string>a&lt;b&#233;</string></value>", "a<bé"},
		{"empty value", "<value/>", ""},
		{"empty string element", "<value><string/></value>", ""},
		{"CDATA", "<value><![CDATA[<x>]]></value>", "<x>"},
		{"comment inside", "<value>a<!-- no -->b</value>", "ab"},
		{"int", "<value><int>-5</int></value>", int64(-5)},
		{"i4", "<value><i4>7</i4></value>", int64(7)},
		{"i8", "<value><i8>5000000000</i8></value>", int64(5000000000)},
		{"double", "<value><double>60.1</double></value>", 60.1},
		{"boolean", "<value> <boolean>1</boolean> </value>", true},
		{"date", "<value><dateTime.iso8601>20260102T03:04:05Z</dateTime.iso8601></value>", "20260102T03:04:05Z"},
		{"nil", "<value><nil/></value>", nil},
		{"nil with a prefix", `<value xmlns:ex="u"><ex:nil/></value>`, nil},
		{"base64", "<value><base64> aGk= </base64></value>", "hi"},
		{"array", "<value><array><data>\n<value>x</value><value><i4>1</i4></value></data></array></value>", []any{"x", int64(1)}},
		{"struct", "<value><struct><member><name>k</name><value>v</value></member></struct></value>", map[string]any{"k": "v"}},
		{"empty struct", "<value><struct/></value>", map[string]any{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			method, params, err := decodeXML([]byte(methodCall(tt.in)), DefaultLimits)
			if err != nil || method != "a.b" || len(params) != 1 || !reflect.DeepEqual(params[0], tt.want) {
				t.Errorf("%q %#v %v, want %#v", method, params, err, tt.want)
			}
		})
	}
	for _, in := range []string{
		"<methodCall><methodName>system.listMethods</methodName></methodCall>",
		"<methodCall><methodName>system.listMethods</methodName><params/></methodCall>\n<!-- end -->",
	} {
		if _, params, err := decodeXML([]byte(in), DefaultLimits); err != nil || len(params) != 0 {
			t.Errorf("%q: %v %v", in, params, err)
		}
	}
}

// S1-hostile: none of these may reach a handler, or cost more than they weigh.
func TestXMLThatIsRefused(t *testing.T) {
	deep := strings.Repeat("<value><array><data>", 40) + strings.Repeat("</data></array></value>", 40)
	bomb := `<!DOCTYPE a [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;">]>`
	for name, in := range map[string]string{
		"nothing":                "",
		"not XML":                "hello",
		"an entity bomb":         strings.Replace(methodCall("<value>&b;</value>"), "?>", "?>"+bomb, 1),
		"an external entity":     `<!DOCTYPE a SYSTEM "file:///etc/passwd">` + methodCall("<value/>"),
		"an unknown entity":      methodCall("<value>&b;</value>"),
		"deep nesting":           methodCall(deep),
		"many values":            methodCall("<value><array><data>" + strings.Repeat("<value/>", 100_001) + "</data></array></value>"),
		"NUL":                    methodCall("<value>a\x00b</value>"),
		"NUL by number":          methodCall("<value>&#0;</value>"),
		"bad UTF-8":              methodCall("<value>\xff\xfe</value>"),
		"overlong UTF-8":         methodCall("<value>\xc0\x80</value>"),
		"another encoding":       strings.Replace(methodCall("<value/>"), `"1.0"`, `"1.0" encoding="utf-16"`, 1),
		"attributes":             methodCall(`<value type="x">a</value>`),
		"a name twice":           methodCall("<value><struct><member><name>k</name><value/></member><member><name>k</name><value/></member></struct></value>"),
		"two documents":          methodCall("<value/>") + methodCall("<value/>"),
		"text behind":            methodCall("<value/>") + "x",
		"cut short":              methodCall("<value/>")[:100],
		"mixed content":          methodCall("<value>a<string>b</string></value>"),
		"text behind the type":   methodCall("<value><string>b</string>a</value>"),
		"two types":              methodCall("<value><string>b</string><string>b</string></value>"),
		"unknown type":           methodCall("<value><thing>b</thing></value>"),
		"wrong close":            methodCall("<value><string>b</int></value>"),
		"int of letters":         methodCall("<value><int>five</int></value>"),
		"int too large":          methodCall("<value><i8>9223372036854775808</i8></value>"),
		"boolean of letters":     methodCall("<value><boolean>true</boolean></value>"),
		"not a number":           methodCall("<value><double>NaN</double></value>"),
		"infinite":               methodCall("<value><double>1e999</double></value>"),
		"bad base64":             methodCall("<value><base64>!</base64></value>"),
		"param without a value":  methodCall(""),
		"a response":             "<methodResponse/>",
		"no method":              "<methodCall><params/></methodCall>",
		"an empty method":        "<methodCall><methodName> </methodName></methodCall>",
		"member without a value": methodCall("<value><struct><member><name>k</name></member></struct></value>"),
	} {
		if _, _, err := decodeXML([]byte(in), DefaultLimits); !errors.Is(err, errMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestXMLAnswers(t *testing.T) {
	for _, tt := range []struct {
		in   any
		want string
	}{
		{nil, "<value></value>"},
		{"", "<value></value>"},
		{"a<b>&\"c'", "<value>a&lt;b&gt;&amp;&quot;c'</value>"},
		{"tab\tlf\ncr\r bell\x07 esc\x1b nul\x00.\ufffe", "<value>tab\tlf\ncr\r bell esc nul.</value>"},
		{"bad \xff", "<value>bad \ufffd</value>"},
		{"123", "<value>123</value>"},
		{true, "<value><boolean>1</boolean></value>"},
		{false, "<value><boolean>0</boolean></value>"},
		{0.1 + 0.2, "<value><double>0.3</double></value>"},
		{1.0, "<value><double>1</double></value>"},
		{1.0 / 3, "<value><double>0.3333333333333333</double></value>"},
		{Int32(4), "<value><i4>4</i4></value>"},
		{Date("19700101T00:00:00Z"), "<value><dateTime.iso8601>19700101T00:00:00Z</dateTime.iso8601></value>"},
		{[]any{}, "<value><array><data></data></array></value>"},
		{[]any{"a", true}, "<value><array><data><value>a</value><value><boolean>1</boolean></value></data></array></value>"},
		{map[string]any{"b": "2", "a<": "1"}, "<value><struct><member><name>a&lt;</name><value>1</value></member><member><name>b</name><value>2</value></member></struct></value>"},
	} {
		if got := XMLValue(tt.in); got != tt.want {
			t.Errorf("%#v: %s, want %s", tt.in, got, tt.want)
		}
	}
	head, tail := `<?xml version="1.0"?><methodResponse><params><param>`, `</param></params></methodResponse>`
	want := head + `<value><struct><member><name>Status</name><value>Success</value></member><member><name>Value</name><value>x</value></member></struct></value>` + tail
	if got := string(xmlSuccess("x")); got != want {
		t.Errorf("success: %s", got)
	}
	want = head + `<value><struct><member><name>ErrorDescription</name><value><array><data><value>HANDLE_INVALID</value><value>SR</value><value>x</value></data></array></value></member><member><name>Status</name><value>Failure</value></member></struct></value>` + tail
	if got := string(xmlFailure(xapi.NewError("HANDLE_INVALID", "SR", "x"))); got != want {
		t.Errorf("failure: %s", got)
	}
}

func TestJSONRequestsThatClientsSend(t *testing.T) {
	for _, tt := range []struct {
		name, in string
		want     jsonCall
	}{
		{"1.0", `{"method":"m","params":["a",1,1.5,true,null],"id":7}`, jsonCall{"m", []any{"a", int64(1), 1.5, true, nil}, []byte("7"), false}},
		{"2.0 with id 0", `{"jsonrpc":"2.0","method":"m","params":[{"k":[2]}],"id":0}`, jsonCall{"m", []any{map[string]any{"k": []any{int64(2)}}}, []byte("0"), true}},
		{"2.0 without params", `{"jsonrpc":"2.0","method":"m","id":"x\"y"}`, jsonCall{"m", []any{}, []byte(`"x\"y"`), true}},
		{"2.0 with null params", `{"jsonrpc":"2.0","method":"m","params":null,"id":-1}`, jsonCall{"m", []any{}, []byte("-1"), true}},
		{"2.0 with an object", `{"jsonrpc":"2.0","method":"m","params":{"a":1},"id":1}`, jsonCall{"m", []any{map[string]any{"a": int64(1)}}, []byte("1"), true}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := decodeJSON([]byte(tt.in), DefaultLimits)
			if err != nil || !reflect.DeepEqual(*got, tt.want) {
				t.Errorf("%+v %v, want %+v", got, err, tt.want)
			}
		})
	}
}

func TestJSONThatIsRefused(t *testing.T) {
	for name, in := range map[string]string{
		"nothing":             "",
		"not JSON":            "{",
		"a batch":             `[{"jsonrpc":"2.0","method":"m","id":1}]`,
		"text behind":         `{"method":"m","params":[],"id":1} x`,
		"null id":             `{"jsonrpc":"2.0","method":"m","params":[],"id":null}`,
		"no id":               `{"jsonrpc":"2.0","method":"m","params":[]}`,
		"fractional id":       `{"method":"m","params":[],"id":1.5}`,
		"object as id":        `{"method":"m","params":[],"id":{}}`,
		"another version":     `{"jsonrpc":"1.1","method":"m","params":[],"id":1}`,
		"a number as version": `{"jsonrpc":2.0,"method":"m","params":[],"id":1}`,
		"1.0 without params":  `{"method":"m","id":1}`,
		"1.0 with an object":  `{"method":"m","params":{},"id":1}`,
		"text as params":      `{"jsonrpc":"2.0","method":"m","params":"x","id":1}`,
		"no method":           `{"params":[],"id":1}`,
		"method of numbers":   `{"method":5,"params":[],"id":1}`,
		"method twice":        `{"method":"a","method":"b","params":[],"id":1}`,
		"a key twice below":   `{"method":"a","params":[{"k":1,"k":2}],"id":1}`,
		"deep nesting":        `{"method":"a","params":` + strings.Repeat("[", 100) + strings.Repeat("]", 100) + `,"id":1}`,
		"very deep nesting":   strings.Repeat("[", 200_000),
		"many values":         `{"method":"a","params":[` + strings.Repeat("1,", 100_001) + `1],"id":1}`,
		"bad UTF-8":           "{\"method\":\"a\xff\",\"params\":[],\"id\":1}",
		"a raw NUL":           "{\"method\":\"a\x00\",\"params\":[],\"id\":1}",
		"a huge number":       `{"method":"a","params":[1e999],"id":1}`,
	} {
		if _, err := decodeJSON([]byte(in), DefaultLimits); !errors.Is(err, errMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestJSONAnswers(t *testing.T) {
	one, two := &jsonCall{id: []byte("7")}, &jsonCall{id: []byte(`"x"`), v2: true}
	failure := xapi.NewError("HANDLE_INVALID", "SR", "<&>")
	value := map[string]any{"s": "5\x01", "f": 0.5, "n": Int32(3), "v": nil, "d": Date("1"), "l": []any{true}, "m": map[string]any{}}
	for _, tt := range []struct{ got, want string }{
		{string(one.success("a")), `{"result":"a","error":null,"id":7}`},
		{string(two.success(nil)), `{"jsonrpc":"2.0","result":"","id":"x"}`},
		{string(two.success(value)), `{"jsonrpc":"2.0","result":{"d":"1","f":0.5,"l":[true],"m":{},"n":3,"s":"5\u0001","v":""},"id":"x"}`},
		{string(one.failure(failure)), `{"result":null,"error":["HANDLE_INVALID","SR","<&>"],"id":7}`},
		{string(two.failure(failure)), `{"jsonrpc":"2.0","error":{"code":1,"message":"HANDLE_INVALID","data":["SR","<&>"]},"id":"x"}`},
	} {
		if tt.got != tt.want {
			t.Errorf("%s, want %s", tt.got, tt.want)
		}
	}
}

func TestArgumentsAreChecked(t *testing.T) {
	ref := xapi.NewRef()
	for _, tt := range []struct {
		typ  Type
		in   any
		want any // or an error code
	}{
		{Int, "42", int64(42)},
		{Int, int64(42), int64(42)},
		{Int, 42.0, int64(42)},
		{Int, " -1 ", int64(-1)},
		{Int, 42.5, xapi.FieldTypeError},
		{Int, 1e300, xapi.FieldTypeError},
		{Int, math.NaN(), xapi.FieldTypeError},
		{Int, "9223372036854775808", xapi.FieldTypeError},
		{Int, true, xapi.FieldTypeError},
		{Float, int64(2), 2.0},
		{Float, "0.5", 0.5},
		{Float, "inf", xapi.FieldTypeError},
		{Bool, "true", xapi.FieldTypeError},
		{String, int64(1), xapi.FieldTypeError},
		{String, nil, xapi.FieldTypeError},
		{String, "a\x00b", xapi.ValueNotSupported},
		{String, "\xff", xapi.ValueNotSupported},
		{String, strings.Repeat("x", maxText+1), xapi.ValueNotSupported},
		{Datetime, "yesterday", xapi.FieldTypeError},
		{RefTo("SR"), string(ref), ref},
		{RefTo("SR"), nil, xapi.NullRef},
		{RefTo("SR"), "", xapi.NullRef},
		{RefTo("SR"), "OpaqueRef:../../etc", xapi.HandleInvalid},
		{RefTo("SR"), strings.ToUpper(string(ref)), xapi.HandleInvalid},
		{RefTo("SR"), int64(5), xapi.FieldTypeError},
		{enumVdiType, "user", "user"},
		{enumVdiType, "nonsense", xapi.ValueNotSupported},
		{stringSet, []any{"a"}, []any{"a"}},
		{stringSet, []any{int64(1)}, xapi.FieldTypeError},
		{stringSet, make([]any, maxEntries+1), xapi.ValueNotSupported},
		{stringMap, map[string]any{"k": "v"}, map[string]any{"k": "v"}},
		{stringMap, map[string]any{"k\x00": "v"}, xapi.ValueNotSupported},
		{stringMap, map[string]any{"k": true}, xapi.FieldTypeError},
		{stringMap, []any{}, xapi.FieldTypeError},
		{RecordOf("VDI"), "x", xapi.FieldTypeError},
	} {
		got, err := convert(tt.typ, "f", tt.in)
		if code, ok := tt.want.(string); ok && strings.ToUpper(code) == code && err != nil {
			wantError(t, err, code)
			continue
		}
		if err != nil || !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s from %.40q: %v %v, want %v", tt.typ, fmt.Sprint(tt.in), got, err, tt.want)
		}
	}
}
