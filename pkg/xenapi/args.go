package xenapi

import (
	"math"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/patchd/patchd/pkg/xapi"
)

const (
	// maxText is the longest text a parameter may hold, in bytes.
	maxText = 64 << 10
	// maxEntries is how many members a set or map may have.
	maxEntries = 10_000
	// maxRecord is the largest record a setter may leave behind, in bytes: the
	// store takes 1.5 MiB a transaction.
	maxRecord = 512 << 10
)

// bind counts and converts what a client sent. Codes:
// MESSAGE_PARAMETER_COUNT_MISMATCH, FIELD_TYPE_ERROR, HANDLE_INVALID,
// VALUE_NOT_SUPPORTED.
func (m *Message) bind(params []any) ([]any, error) {
	args := make([]any, len(m.Params))
	for i, p := range m.Params {
		if i >= len(params) {
			args[i] = p.Default
			continue
		}
		v, err := convert(p.Type, p.Name, params[i])
		if err != nil {
			return nil, err
		}
		args[i] = v
	}
	return args, nil
}

// count checks how many parameters there are; received leaves the session out.
func (m *Message) count(method string, received int) error {
	if received >= m.required() && received <= len(m.Params) {
		return nil
	}
	return xapi.NewError(xapi.MessageParameterCountMismatch, clip(method, 256),
		strconv.Itoa(m.required()), strconv.Itoa(received))
}

// convert checks v against t and gives it in the form handlers take: string,
// int64, float64, bool, time.Time, xapi.Ref, []any and map[string]any of those.
// Members of a record are left for whoever takes the record apart.
func convert(t Type, field string, v any) (any, error) {
	wrong := xapi.NewError(xapi.FieldTypeError, field)
	switch t.Kind {
	case KindString:
		if s, ok := v.(string); ok {
			return s, checkText(field, s)
		}
	case KindEnum:
		if s, ok := v.(string); ok {
			return s, checkEnum(t, field, s)
		}
	case KindInt:
		if n, ok := toInt(v); ok {
			return n, nil
		}
	case KindFloat:
		if f, ok := toFloat(v); ok {
			return f, nil
		}
	case KindBool:
		if b, ok := v.(bool); ok {
			return b, nil
		}
	case KindDatetime:
		if s, ok := v.(string); ok {
			if at, err := xapi.ParseTime(strings.TrimSpace(s)); err == nil {
				return at, nil
			}
		}
	case KindRef:
		return toRef(t, field, v)
	case KindSet:
		if l, ok := v.([]any); ok {
			return convertSet(t, field, l)
		}
	case KindMap:
		if m, ok := v.(map[string]any); ok {
			return convertMap(t, field, m)
		}
	case KindRecord:
		if m, ok := v.(map[string]any); ok {
			return m, nil
		}
	}
	return nil, wrong
}

func convertSet(t Type, field string, list []any) (any, error) {
	if len(list) > maxEntries {
		return nil, tooMany(field)
	}
	out := make([]any, len(list))
	for i, e := range list {
		v, err := convert(*t.Elem, field, e)
		if err != nil {
			return nil, err
		}
		out[i] = v
	}
	return out, nil
}

func convertMap(t Type, field string, m map[string]any) (any, error) {
	if len(m) > maxEntries {
		return nil, tooMany(field)
	}
	out := make(map[string]any, len(m))
	for k, e := range m {
		if err := checkText(field, k); err != nil {
			return nil, err
		}
		v, err := convert(*t.Elem, field, e)
		if err != nil {
			return nil, err
		}
		out[k] = v
	}
	return out, nil
}

func tooMany(field string) error {
	return xapi.NewError(xapi.ValueNotSupported, field, "", "more than "+strconv.Itoa(maxEntries)+" members")
}

// checkText bounds a text: length, UTF-8, no NUL.
func checkText(field, s string) error {
	switch {
	case len(s) > maxText:
		return xapi.NewError(xapi.ValueNotSupported, field, clip(s, 64)+"…", "longer than "+strconv.Itoa(maxText)+" bytes")
	case !utf8.ValidString(s):
		return xapi.NewError(xapi.ValueNotSupported, field, clip(s, 64), "not UTF-8")
	case strings.ContainsRune(s, 0):
		return xapi.NewError(xapi.ValueNotSupported, field, strings.ReplaceAll(clip(s, 64), "\x00", ""), "holds a NUL character")
	}
	return nil
}

func checkEnum(t Type, field, s string) error {
	for _, w := range t.Values {
		if w == s {
			return nil
		}
	}
	return xapi.NewError(xapi.ValueNotSupported, field, clip(s, 64), "not one of: "+strings.Join(t.Values, ", "))
}

// toInt takes the string of digits an int should be, and the number that
// clients of JSON-RPC send.
func toInt(v any) (int64, bool) {
	switch v := v.(type) {
	case string:
		n, err := strconv.ParseInt(strings.TrimSpace(v), 10, 64)
		return n, err == nil
	case int64:
		return v, true
	case float64:
		const exact = 1 << 53
		return int64(v), v == math.Trunc(v) && math.Abs(v) <= exact
	}
	return 0, false
}

func toFloat(v any) (float64, bool) {
	switch v := v.(type) {
	case float64:
		return v, true
	case int64:
		return float64(v), true
	case string:
		f, err := strconv.ParseFloat(strings.TrimSpace(v), 64)
		return f, err == nil && !math.IsNaN(f) && !math.IsInf(f, 0)
	}
	return 0, false
}

// toRef checks the form of a reference; nil and "" are the null reference.
// Whether there is such an object is for the handler to find out.
func toRef(t Type, field string, v any) (any, error) {
	if v == nil {
		return xapi.NullRef, nil
	}
	s, ok := v.(string)
	if !ok {
		return nil, xapi.NewError(xapi.FieldTypeError, field)
	}
	ref := xapi.Ref(s).OrNull()
	if !ref.IsNull() && !ref.Valid() {
		return nil, xapi.NewError(xapi.HandleInvalid, t.Name, clip(s, 128))
	}
	return ref, nil
}

// argument turns a value that is at hand in Go into what a client could have
// sent: for callers inside the process.
func argument(v any) any {
	switch v := v.(type) {
	case int:
		return int64(v)
	case xapi.Ref:
		return string(v)
	case xapi.UUID:
		return string(v)
	case []string:
		return stringsToAny(v)
	case map[string]string:
		return mapToAny(v)
	case []any:
		out := make([]any, len(v))
		for i := range v {
			out[i] = argument(v[i])
		}
		return out
	case map[string]any:
		out := make(map[string]any, len(v))
		for k := range v {
			out[k] = argument(v[k])
		}
		return out
	}
	return v
}
