package xenapi

import (
	"bytes"
	"encoding/json"
	"math"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/patchd/patchd/pkg/xapi"
)

// jsonCall is one JSON-RPC request. v2 tells which of the two forms it had, and
// so which one the answer has.
type jsonCall struct {
	method string
	params []any
	id     json.RawMessage
	v2     bool
}

// decodeJSON reads one JSON-RPC 1.0 or 2.0 request. A batch, a
// missing or null id, another version, a key given twice: all malformed.
func decodeJSON(body []byte, limits Limits) (*jsonCall, error) {
	if !utf8.Valid(body) {
		return nil, malformed("not UTF-8")
	}
	if !json.Valid(body) {
		return nil, malformed("not one JSON value")
	}
	d := &jsonDecoder{dec: json.NewDecoder(bytes.NewReader(body)), meter: meter{limits: limits}}
	d.dec.UseNumber()
	v, err := d.value(0)
	if err != nil {
		return nil, err
	}
	req, ok := v.(map[string]any)
	if !ok {
		return nil, malformed("not an object; batches are not served")
	}
	call := &jsonCall{}
	if call.method, ok = req["method"].(string); !ok || call.method == "" {
		return nil, malformed("no method")
	}
	if version, given := req["jsonrpc"]; given {
		if version != "2.0" {
			return nil, malformed("unknown jsonrpc version")
		}
		call.v2 = true
	}
	if call.id, err = jsonID(req["id"]); err != nil {
		return nil, err
	}
	call.params, err = jsonParams(req["params"], call.v2)
	return call, err
}

// jsonID takes an integer or a string and gives it back as it came.
func jsonID(id any) (json.RawMessage, error) {
	switch id := id.(type) {
	case json.Number:
		if _, err := strconv.ParseInt(id.String(), 10, 64); err == nil {
			return json.RawMessage(id.String()), nil
		}
	case string:
		return json.Marshal(id)
	}
	return nil, malformed("the id is neither an integer nor a string")
}

func jsonParams(params any, v2 bool) ([]any, error) {
	switch p := params.(type) {
	case []any:
		out := make([]any, len(p))
		for i := range p {
			v, err := jsonNumbers(p[i])
			if err != nil {
				return nil, err
			}
			out[i] = v
		}
		return out, nil
	case nil:
		if v2 {
			return []any{}, nil
		}
	case map[string]any:
		if v2 {
			v, err := jsonNumbers(p)
			return []any{v}, err
		}
	}
	return nil, malformed("params are not an array")
}

// jsonNumbers turns numbers into int64 where they are integers, else float64.
func jsonNumbers(v any) (any, error) {
	var err error
	switch v := v.(type) {
	case json.Number:
		if n, err := strconv.ParseInt(v.String(), 10, 64); err == nil {
			return n, nil
		}
		f, err := strconv.ParseFloat(v.String(), 64)
		if err != nil || math.IsInf(f, 0) {
			return nil, malformed("number %.32q out of range", v)
		}
		return f, nil
	case []any:
		for i := range v {
			if v[i], err = jsonNumbers(v[i]); err != nil {
				return nil, err
			}
		}
	case map[string]any:
		for k := range v {
			if v[k], err = jsonNumbers(v[k]); err != nil {
				return nil, err
			}
		}
	}
	return v, nil
}

// jsonDecoder reads a value token by token, for the standard decoder neither
// bounds depth nor notices a key that is there twice.
type jsonDecoder struct {
	dec   *json.Decoder
	meter meter
}

func (d *jsonDecoder) value(depth int) (any, error) {
	if err := d.meter.enter(depth); err != nil {
		return nil, err
	}
	tok, err := d.dec.Token()
	if err != nil {
		return nil, malformed("%w", err)
	}
	switch tok {
	case json.Delim('['):
		return d.array(depth)
	case json.Delim('{'):
		return d.object(depth)
	}
	return tok, nil
}

func (d *jsonDecoder) array(depth int) (any, error) {
	out := []any{}
	for d.dec.More() {
		v, err := d.value(depth + 1)
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	if _, err := d.dec.Token(); err != nil {
		return nil, malformed("%w", err)
	}
	return out, nil
}

func (d *jsonDecoder) object(depth int) (any, error) {
	out := map[string]any{}
	for d.dec.More() {
		tok, err := d.dec.Token()
		if err != nil {
			return nil, malformed("%w", err)
		}
		key, ok := tok.(string)
		if !ok {
			return nil, malformed("a key that is not a string")
		}
		if _, dup := out[key]; dup {
			return nil, malformed("key %.32q twice", key)
		}
		if out[key], err = d.value(depth + 1); err != nil {
			return nil, err
		}
	}
	if _, err := d.dec.Token(); err != nil {
		return nil, malformed("%w", err)
	}
	return out, nil
}

// success is the answer to a call that gave v.
func (c *jsonCall) success(v any) []byte {
	var b bytes.Buffer
	if c.v2 {
		b.WriteString(`{"jsonrpc":"2.0","result":`)
		encodeJSON(&b, v)
	} else {
		b.WriteString(`{"result":`)
		encodeJSON(&b, v)
		b.WriteString(`,"error":null`)
	}
	return c.close(&b)
}

// failure is the answer to a call that failed.
func (c *jsonCall) failure(e *xapi.Error) []byte {
	var b bytes.Buffer
	if c.v2 {
		b.WriteString(`{"jsonrpc":"2.0","error":{"code":1,"message":`)
		encodeJSON(&b, e.Code)
		b.WriteString(`,"data":`)
		encodeJSON(&b, stringsToAny(e.Params))
		b.WriteString(`}`)
	} else {
		b.WriteString(`{"result":null,"error":`)
		encodeJSON(&b, stringsToAny(e.Description()))
	}
	return c.close(&b)
}

func (c *jsonCall) close(b *bytes.Buffer) []byte {
	b.WriteString(`,"id":`)
	b.Write(c.id)
	b.WriteString(`}`)
	return b.Bytes()
}

// encodeJSON writes v: ints are strings already, void is "", floats are
// numbers.
func encodeJSON(b *bytes.Buffer, v any) {
	switch v := v.(type) {
	case nil:
		b.WriteString(`""`)
	case json.RawMessage: // encoded before
		b.Write(v)
	case bool:
		b.WriteString(strconv.FormatBool(v))
	case float64:
		b.WriteString(strconv.FormatFloat(v, 'g', 16, 64))
	case Int32:
		b.WriteString(strconv.Itoa(int(v)))
	case int64:
		b.WriteString(`"` + strconv.FormatInt(v, 10) + `"`)
	case Date:
		encodeJSONText(b, string(v))
	case string:
		encodeJSONText(b, v)
	case []any:
		b.WriteByte('[')
		for i, e := range v {
			if i > 0 {
				b.WriteByte(',')
			}
			encodeJSON(b, e)
		}
		b.WriteByte(']')
	case map[string]any:
		b.WriteByte('{')
		for i, k := range sortedKeys(v) {
			if i > 0 {
				b.WriteByte(',')
			}
			encodeJSONText(b, k)
			b.WriteByte(':')
			encodeJSON(b, v[k])
		}
		b.WriteByte('}')
	}
}

func encodeJSONText(b *bytes.Buffer, s string) {
	enc := json.NewEncoder(b)
	enc.SetEscapeHTML(false)
	if enc.Encode(strings.ToValidUTF8(s, "\ufffd")) == nil {
		b.Truncate(b.Len() - 1) // the line feed that Encode adds
	}
}
