package xenapi

import (
	"errors"
	"fmt"
	"maps"
	"slices"
)

// Int32 is a real integer on the wire: <i4> in XML-RPC, a number in JSON. Only
// valid_ref_counts of event.from holds any: xen-api reads all other integers as
// text.
type Int32 int32

// Date is a moment on the wire, in the form of xapi.FormatTime: of its own type
// in XML-RPC, a text in JSON.
type Date string

// Limits bound what one request may hold, before anything looks at it.
type Limits struct {
	Body   int64 // bytes
	Depth  int   // of nested arrays, structs and objects
	Values int   // of every kind, in the whole body
}

// DefaultLimits are generous: classic servers took 300 KiB.
var DefaultLimits = Limits{Body: 1 << 20, Depth: 32, Values: 100_000}

// errMalformed is wrapped by every error of a decoder: the request is answered
// with HTTP 500, never with an API failure.
var errMalformed = errors.New("malformed request")

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %w", errMalformed, fmt.Errorf(format, args...))
}

// meter counts values and depth while a body is decoded.
type meter struct {
	limits Limits
	values int
}

func (m *meter) enter(depth int) error {
	m.values++
	if m.values > m.limits.Values {
		return malformed("more than %d values", m.limits.Values)
	}
	if depth > m.limits.Depth {
		return malformed("nested deeper than %d", m.limits.Depth)
	}
	return nil
}

// cloneValue copies sets and maps, so that a default of the table is never
// shared with a caller.
func cloneValue(v any) any {
	switch v := v.(type) {
	case []any:
		out := make([]any, len(v))
		for i := range v {
			out[i] = cloneValue(v[i])
		}
		return out
	case map[string]any:
		out := make(map[string]any, len(v))
		for k, e := range v {
			out[k] = cloneValue(e)
		}
		return out
	}
	return v
}

// plainValue turns the types only the wire knows into what callers inside the
// process take: Date into string, Int32 into float64.
func plainValue(v any) any {
	switch v := v.(type) {
	case Date:
		return string(v)
	case Int32:
		return float64(v)
	case []any:
		for i := range v {
			v[i] = plainValue(v[i])
		}
	case map[string]any:
		for k := range v {
			v[k] = plainValue(v[k])
		}
	}
	return v
}

// sortedKeys makes every encoding the same for the same value.
func sortedKeys(m map[string]any) []string { return slices.Sorted(maps.Keys(m)) }

// stringsToAny is a set of texts in the form of the wire.
func stringsToAny[S ~string](in []S) []any {
	out := make([]any, len(in))
	for i, s := range in {
		out[i] = string(s)
	}
	return out
}

// mapToAny is a map of texts in the form of the wire.
func mapToAny(in map[string]string) map[string]any {
	out := make(map[string]any, len(in))
	for k, v := range in {
		out[k] = v
	}
	return out
}
