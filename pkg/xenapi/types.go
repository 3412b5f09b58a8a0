package xenapi

import "strings"

// Kind is the shape of a value on the wire.
type Kind int

// The kinds. An int travels as a string of decimal digits; an enum, a ref and
// a datetime are strings with a form.
const (
	KindVoid Kind = iota
	KindString
	KindInt
	KindFloat
	KindBool
	KindDatetime
	KindEnum
	KindRef
	KindSet
	KindMap
	KindRecord
	KindAny // a value handed through as it is: an event batch
)

// Type is the type of a field, a parameter or a result.
type Type struct {
	Kind Kind
	// Name is the class of a ref or record, or the name of an enum.
	Name string
	// Values are the words of an enum.
	Values []string
	// Key is the type of a map's keys, Elem of its values or of a set's members.
	Key, Elem *Type
}

// The types without parameters.
var (
	Void     = Type{Kind: KindVoid}
	String   = Type{Kind: KindString}
	Int      = Type{Kind: KindInt}
	Float    = Type{Kind: KindFloat}
	Bool     = Type{Kind: KindBool}
	Datetime = Type{Kind: KindDatetime}

	stringMap  = MapOf(String, String)
	stringSet  = SetOf(String)
	eventBatch = Type{Kind: KindAny, Name: "event batch"}
)

// RefTo is a reference to an object of class.
func RefTo(class string) Type { return Type{Kind: KindRef, Name: class} }

// RecordOf is a whole record of class.
func RecordOf(class string) Type { return Type{Kind: KindRecord, Name: class} }

// SetOf is a list of elem.
func SetOf(elem Type) Type { return Type{Kind: KindSet, Elem: &elem} }

// MapOf is a map; on the wire its keys are always strings.
func MapOf(key, elem Type) Type { return Type{Kind: KindMap, Key: &key, Elem: &elem} }

// EnumOf is a string out of values.
func EnumOf(name string, values ...string) Type {
	return Type{Kind: KindEnum, Name: name, Values: values}
}

// String is the type as the data model writes it: "host ref set", "(string ->
// string) map", "enum vdi_type".
func (t Type) String() string {
	switch t.Kind {
	case KindVoid:
		return "void"
	case KindString:
		return "string"
	case KindInt:
		return "int"
	case KindFloat:
		return "float"
	case KindBool:
		return "bool"
	case KindDatetime:
		return "datetime"
	case KindEnum:
		return "enum " + t.Name
	case KindRef:
		return t.Name + " ref"
	case KindRecord:
		return t.Name + " record"
	case KindSet:
		return t.Elem.String() + " set"
	case KindMap:
		return "(" + t.Key.String() + " -> " + t.Elem.String() + ") map"
	}
	return strings.TrimSpace("an " + t.Name)
}

// zero is the value a field of type t has when nothing was stored and the
// table names no default: a record never lacks a field, for
// clients index into records without asking.
func (t Type) zero() any {
	switch t.Kind {
	case KindInt:
		return "0"
	case KindFloat:
		return 0.0
	case KindBool:
		return false
	case KindDatetime:
		return epochDate
	case KindRef:
		return nullRefText
	case KindSet:
		return []any{}
	case KindMap, KindRecord:
		return map[string]any{}
	case KindEnum:
		if len(t.Values) > 0 {
			return t.Values[0]
		}
	}
	return ""
}
