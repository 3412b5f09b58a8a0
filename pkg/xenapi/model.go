package xenapi

import (
	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/xapi"
)

// APIMajor and APIMinor are the version this server claims: 2.5, the last
// family with classic patches. No later field is in a record.
const (
	APIMajor  = "2"
	APIMinor  = "5"
	APIVendor = "patchd"
)

const nullRefText = string(xapi.NullRef)

var epochDate = Date(xapi.FormatTime(xapi.Epoch))

// Qualifier says who may set a field.
type Qualifier string

// The qualifiers, as the data model writes them.
const (
	ReadOnly   Qualifier = "RO/runtime"
	AtCreation Qualifier = "RO/constructor"
	ReadWrite  Qualifier = "RW"
)

// Field is one field of a class.
type Field struct {
	Name      string
	Type      Type
	Qualifier Qualifier
	// Since is the API version that brought the field; "" for one of our own.
	Since string
	// Default is the value where nothing is stored; nil is the type's zero.
	Default any
	// Deprecated fields are still in every record.
	Deprecated bool

	derive deriveFunc
}

// Class is one class of the data model.
type Class struct {
	Name   string
	Fields []Field
	// Empty classes exist so that clients which ask find nothing rather than an
	// error. They have no objects, and only the fields lookups need.
	Empty bool

	index map[string]int
	// noLookup: session has no get_all and event nothing at all; message has
	// no getters of single fields.
	noAll, noGetters bool
	setRole          session.Role // "" is pool-operator
}

// Field finds a field by its name.
func (c *Class) Field(name string) (Field, bool) {
	i, ok := c.index[name]
	if !ok {
		return Field{}, false
	}
	return c.Fields[i], true
}

// Model is the data model: every class this server serves.
type Model struct {
	classes []*Class
	byName  map[string]*Class
}

// NewModel builds the table of classes.
func NewModel() *Model {
	m := &Model{byName: map[string]*Class{}}
	for _, c := range allClasses() {
		c.index = make(map[string]int, len(c.Fields))
		for i, f := range c.Fields {
			c.index[f.Name] = i
		}
		m.classes = append(m.classes, c)
		m.byName[c.Name] = c
	}
	return m
}

// Classes gives every class, in the order of the table.
func (m *Model) Classes() []*Class { return m.classes }

// Class finds a class by its exact name.
func (m *Model) Class(name string) (*Class, bool) {
	c, ok := m.byName[name]
	return c, ok
}

// EventClasses are the exact names of the classes that have events: what the
// event broker serves. Sessions are secret and have none; what the store holds
// under the name of the empty class user is not that class.
func (m *Model) EventClasses() []string {
	var out []string
	for _, c := range m.classes {
		if !c.noAll && c.Name != session.ClassUser {
			out = append(out, c.Name)
		}
	}
	return out
}

func allClasses() []*Class {
	return []*Class{
		sessionClass(), taskClass(), poolClass(), poolPatchClass(), hostClass(), hostPatchClass(),
		smClass(), srClass(), vdiClass(), pbdClass(), messageClass(),
		emptyClass("VM", true), emptyClass("VBD", false), emptyClass("VIF", false), emptyClass("network", true),
		emptyClass("PIF", false), emptyClass("host_metrics", false), emptyClass("host_cpu", false),
		emptyClass("console", false), emptyClass("user", false), emptyClass("subject", false), emptyClass("role", true),
	}
}

func emptyClass(name string, labelled bool) *Class {
	c := &Class{Name: name, Empty: true, Fields: []Field{ro("uuid", String, "1.1")}}
	if labelled {
		c.Fields = append(c.Fields, ro("name_label", String, "1.1"), ro("name_description", String, "1.1"))
	}
	return c
}

func ro(name string, t Type, since string) Field {
	return Field{Name: name, Type: t, Qualifier: ReadOnly, Since: since}
}

func roc(name string, t Type, since string) Field {
	return Field{Name: name, Type: t, Qualifier: AtCreation, Since: since}
}

func rw(name string, t Type, since string) Field {
	return Field{Name: name, Type: t, Qualifier: ReadWrite, Since: since}
}

func (f Field) or(def any) Field { f.Default = def; return f }

func (f Field) deprecated() Field { f.Deprecated = true; return f }

// from makes the field a derived one: f is asked instead of the stored record.
func (f Field) from(d deriveFunc) Field { f.derive = d; return f }

// fallback is what the field holds when the stored record says nothing.
func (f Field) fallback() any {
	if f.Default != nil {
		return cloneValue(f.Default)
	}
	return f.Type.zero()
}
