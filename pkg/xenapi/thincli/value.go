package thincli

import (
	"fmt"
	"sort"
	"strconv"
	"strings"

	"github.com/patchd/patchd/pkg/xapi"
)

// toText is a scalar of the API as xe shows it: floats with three digits,
// refs, ints and dates as they are.
func toText(v any) string {
	switch v := v.(type) {
	case nil:
		return ""
	case string:
		return v
	case bool:
		return strconv.FormatBool(v)
	case float64:
		return strconv.FormatFloat(v, 'f', 3, 64)
	}
	return fmt.Sprint(v)
}

// toList is a set of the API; anything else is empty.
func toList(v any) []string {
	switch v := v.(type) {
	case []string:
		return v
	case []any:
		out := make([]string, len(v))
		for i, e := range v {
			out[i] = toText(e)
		}
		return out
	}
	return nil
}

// toMap is a map of the API; anything else is empty.
func toMap(v any) map[string]string {
	switch v := v.(type) {
	case map[string]string:
		return v
	case map[string]any:
		out := make(map[string]string, len(v))
		for k, e := range v {
			out[k] = toText(e)
		}
		return out
	}
	return nil
}

// toRecord is a record of the API; anything else has no fields.
func toRecord(v any) map[string]any {
	m, _ := v.(map[string]any)
	return m
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}

// mapText is a map on one line, in the order of its keys.
func mapText(m map[string]string) string {
	parts := make([]string, 0, len(m))
	for _, k := range sortedKeys(m) {
		parts = append(parts, k+": "+m[k])
	}
	return strings.Join(parts, "; ")
}

func isNull(ref string) bool { return xapi.Ref(ref).IsNull() }

// resultRef takes the reference out of a task's result, which is the encoded
// value or, from older handlers, the bare reference.
func resultRef(result string) string {
	s := strings.TrimSpace(result)
	s = strings.TrimSuffix(strings.TrimPrefix(s, "<value>"), "</value>")
	return strings.TrimSuffix(strings.TrimPrefix(s, "<string>"), "</string>")
}
