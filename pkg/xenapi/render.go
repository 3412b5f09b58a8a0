package xenapi

import (
	"encoding/json"
	"fmt"
	"strconv"
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// stored is a record as it lies in the store, field by field.
type stored map[string]json.RawMessage

// deriveFunc gives the value of a field that is not stored with the record.
type deriveFunc func(v *store.View, it store.Item, rec stored) any

// Render is the whole record of it as the wire shows it: exactly the fields of
// the table, each with the right type, whatever was stored. The names that
// begin with "_" and everything else unknown to the table never show.
func (c *Class) Render(v *store.View, it store.Item) (map[string]any, error) {
	rec, err := decodeStored(it)
	if err != nil {
		return nil, err
	}
	out := make(map[string]any, len(c.Fields))
	for _, f := range c.Fields {
		out[f.Name] = f.render(v, it, rec)
	}
	return out, nil
}

// RenderField is one field of it.
func (c *Class) RenderField(v *store.View, it store.Item, f Field) (any, error) {
	rec, err := decodeStored(it)
	if err != nil {
		return nil, err
	}
	return f.render(v, it, rec), nil
}

func decodeStored(it store.Item) (stored, error) {
	var rec stored
	if err := json.Unmarshal(it.Raw, &rec); err != nil {
		return nil, fmt.Errorf("decode %s %s: %w", it.Class, it.Ref, err)
	}
	return rec, nil
}

func (f Field) render(v *store.View, it store.Item, rec stored) any {
	if f.derive != nil {
		return f.derive(v, it, rec)
	}
	raw, ok := rec[f.Name]
	if !ok {
		return f.fallback()
	}
	value, ok := wireValue(f.Type, raw)
	if !ok {
		return f.fallback()
	}
	return value
}

// wireValue turns stored JSON into a value of the wire. ok is false where there
// is nothing, or nothing that fits the type.
func wireValue(t Type, raw json.RawMessage) (value any, ok bool) {
	switch t.Kind {
	case KindInt:
		return wireInt(raw)
	case KindFloat:
		f, err := strconv.ParseFloat(string(raw), 64)
		return f, err == nil
	case KindBool:
		return string(raw) == "true", string(raw) == "true" || string(raw) == "false"
	case KindDatetime:
		return wireTime(raw)
	case KindSet:
		return wireSet(t, raw)
	case KindMap:
		return wireMap(t, raw)
	}
	var s string
	if json.Unmarshal(raw, &s) != nil {
		return nil, false
	}
	return s, s != "" || t.Kind == KindString
}

func wireInt(raw json.RawMessage) (any, bool) {
	var n json.Number // takes a number as well as a number in quotes
	if json.Unmarshal(raw, &n) != nil {
		return nil, false
	}
	i, err := strconv.ParseInt(n.String(), 10, 64)
	if err != nil {
		return nil, false
	}
	return strconv.FormatInt(i, 10), true
}

func wireTime(raw json.RawMessage) (any, bool) {
	var s string
	if json.Unmarshal(raw, &s) != nil {
		return nil, false
	}
	if t, err := time.Parse(time.RFC3339Nano, s); err == nil {
		return Date(xapi.FormatTime(t)), true
	}
	t, err := xapi.ParseTime(s)
	return Date(xapi.FormatTime(t)), err == nil
}

func wireSet(t Type, raw json.RawMessage) (any, bool) {
	var list []json.RawMessage
	if json.Unmarshal(raw, &list) != nil || list == nil {
		return nil, false
	}
	out := make([]any, 0, len(list))
	for _, e := range list {
		if v, ok := wireValue(*t.Elem, e); ok {
			out = append(out, v)
		}
	}
	return out, true
}

func wireMap(t Type, raw json.RawMessage) (any, bool) {
	var m map[string]json.RawMessage
	if json.Unmarshal(raw, &m) != nil || m == nil {
		return nil, false
	}
	out := make(map[string]any, len(m))
	for k, e := range m {
		if v, ok := wireValue(*t.Elem, e); ok {
			out[k] = v
		}
	}
	return out, true
}

// children derives a set of refs: the records of class whose field names the
// object. The store keeps the relation once, on the child.
func children(class, field string) deriveFunc {
	return func(v *store.View, it store.Item, _ stored) any {
		return stringsToAny(v.Refs(class, field, string(it.Ref)))
	}
}

// text is a stored string, or "".
func (r stored) text(name string) string {
	var s string
	if raw, ok := r[name]; ok {
		_ = json.Unmarshal(raw, &s) // what is no string counts as none
	}
	return s
}

// operation is one word of allowed_operations and the SM feature it needs;
// "" needs none.
type operation struct{ word, feature string }

var srOperationTable = []operation{
	{"scan", ""}, {"update", ""}, {"plug", ""}, {"unplug", ""}, {"forget", ""}, {"destroy", ""},
	{"pbd_create", ""}, {"pbd_destroy", ""}, {"vdi_create", "VDI_CREATE"}, {"vdi_destroy", "VDI_DELETE"},
	{"vdi_introduce", "VDI_INTRODUCE"}, {"vdi_clone", "VDI_CLONE"}, {"vdi_snapshot", "VDI_SNAPSHOT"}, {"vdi_resize", "VDI_RESIZE"},
}

var vdiOperationTable = []operation{
	{"copy", ""}, {"clone", "VDI_CLONE"}, {"snapshot", "VDI_SNAPSHOT"}, {"resize", "VDI_RESIZE"},
	{"update", ""}, {"forget", ""}, {"destroy", "VDI_DELETE"},
}

// srOperations derives allowed_operations from what the driver of the SR's
// type can do.
func srOperations(v *store.View, _ store.Item, rec stored) any {
	return allowed(v, rec.text("type"), srOperationTable)
}

// vdiOperations derives allowed_operations from the driver of the SR.
func vdiOperations(v *store.View, _ store.Item, rec stored) any {
	typ := ""
	if sr, ok := v.Get("SR", xapi.Ref(rec.text("SR"))); ok {
		if r, err := decodeStored(sr); err == nil {
			typ = r.text("type")
		}
	}
	return allowed(v, typ, vdiOperationTable)
}

func allowed(v *store.View, srType string, table []operation) []any {
	features := featuresOf(v, srType)
	out := []any{}
	for _, op := range table {
		if _, has := features[op.feature]; has || op.feature == "" {
			out = append(out, op.word)
		}
	}
	return out
}

func featuresOf(v *store.View, srType string) map[string]json.RawMessage {
	for _, it := range v.List("SM") {
		rec, err := decodeStored(it)
		if err != nil || rec.text("type") != srType {
			continue
		}
		var features map[string]json.RawMessage
		if json.Unmarshal(rec["features"], &features) == nil {
			return features
		}
	}
	return nil
}
