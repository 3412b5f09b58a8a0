package xenapi

import (
	"bytes"
	"encoding/json"
	"reflect"
	"testing"
)

// What a decoder takes, it took within its limits, and can be encoded again.

func FuzzXMLRPC(f *testing.F) {
	f.Add([]byte(methodCall("<value><struct><member><name>k</name><value><i4>1</i4></value></member></struct></value>")))
	f.Add([]byte(xmlCall("pool.get_all", "OpaqueRef:NULL")))
	limits := Limits{Body: 1 << 16, Depth: 8, Values: 100}
	f.Fuzz(func(t *testing.T, body []byte) {
		method, params, err := decodeXML(body, limits)
		if err != nil {
			return
		}
		if method == "" {
			t.Error("no method")
		}
		again := bytes.NewBufferString("<methodCall><methodName>m</methodName><params>")
		for _, p := range params {
			checkShape(t, p, 1, limits.Depth)
			again.WriteString("<param>")
			encodeXML(again, p)
			again.WriteString("</param>")
		}
		again.WriteString("</params></methodCall>")
		if _, _, err := decodeXML(again.Bytes(), limits); err != nil {
			t.Errorf("%v: %s", err, again)
		}
	})
}

func FuzzJSONRPC(f *testing.F) {
	f.Add([]byte(`{"jsonrpc":"2.0","method":"m","params":[{"a":[1,2.5,"x",null,true]}],"id":0}`))
	f.Add([]byte(`{"method":"m","params":[],"id":"x"}`))
	limits := Limits{Body: 1 << 16, Depth: 8, Values: 100}
	f.Fuzz(func(t *testing.T, body []byte) {
		call, err := decodeJSON(body, limits)
		if err != nil {
			return
		}
		checkShape(t, any(call.params), 1, limits.Depth)
		answer := call.success(call.params)
		if !json.Valid(answer) {
			t.Errorf("not JSON: %s", answer)
		}
		var out struct{ ID, Result any }
		if err := json.Unmarshal(answer, &out); err != nil || out.ID == nil {
			t.Errorf("%v: %s", err, answer)
		}
	})
}

func checkShape(t *testing.T, v any, depth, most int) {
	if depth > most+1 {
		t.Errorf("%d deep", depth)
	}
	switch v := v.(type) {
	case nil, string, bool, int64, float64:
	case []any:
		for _, e := range v {
			checkShape(t, e, depth+1, most)
		}
	case map[string]any:
		for _, e := range v {
			checkShape(t, e, depth+1, most)
		}
	default:
		t.Errorf("a %T came out of a decoder", v)
	}
}

func FuzzWhere(f *testing.F) {
	for _, s := range []string{`true`, `field "a"="b"`, `not (field 'a'="b" or "x"='\'y') and false`} {
		f.Add(s)
	}
	rec := map[string]any{"a": "b", "set": []any{"x"}, "map": map[string]any{"k": "v"}}
	f.Fuzz(func(t *testing.T, s string) {
		e, err := parseWhere(s)
		if err != nil {
			return
		}
		known := true
		fields(e, func(name string) { known = known && rec[name] != nil })
		one, err := e.eval(rec)
		if err != nil && known {
			t.Error(err)
		}
		not, err2 := notExpr{e}.eval(rec)
		if err == nil && (err2 != nil || one == not) || !reflect.DeepEqual(err == nil, err2 == nil) {
			t.Errorf("%v %v, not: %v %v", one, err, not, err2)
		}
	})
}
