package thincli

import (
	"sort"
	"strings"

	"github.com/patchd/patchd/pkg/xapi"
)

// class says how one class of the API is shown and changed by xe: its
// commands (<cli>-list, <cli>-param-get, …) are derived from it.
type class struct {
	cli      string // as in sr-list
	api      string // as in SR.get_record
	plural   string
	defaults []string // what <cli>-list shows unasked; none: all
	standard bool
	fields   []field
}

// row is one object while it is shown or changed.
type row struct {
	*run
	class *class
	ref   string
	rec   map[string]any
}

// field is one line of a record. Exactly one of text, set and pairs reads it.
type field struct {
	name  string
	text  func(*row) (string, error)
	set   func(*row) ([]string, error) // a set: (SRO), (SRW)
	pairs func(*row) (map[string]string, error)

	sep    string // between the members of a set
	write  func(r *row, value string) error
	add    func(r *row, key, value string) error // of a set: the key alone
	remove func(r *row, key string) error

	expensive  bool // not read for lists
	deprecated bool
	hidden     bool // only shown by param-get
}

// What stands where there is no object, or one that cannot be read.
const (
	notInDatabase    = "<not in database>"
	invalidReference = "<invalid reference>"
	expensiveField   = "<expensive field>"
)

// value is the field as text.
func (f field) value(r *row) (string, error) {
	s, err := f.read(r)
	if xapi.Is(err, xapi.HandleInvalid) {
		return invalidReference, nil
	}
	return s, err
}

func (f field) read(r *row) (string, error) {
	switch {
	case f.set != nil:
		members, err := f.set(r)
		return strings.Join(members, f.sep), err
	case f.pairs != nil:
		m, err := f.pairs(r)
		return mapText(m), err
	}
	return f.text(r)
}

// key is the name with what can be done to it.
func (f field) key() string {
	suffix := " ( RO)"
	switch {
	case f.set != nil && f.add == nil:
		suffix = " (SRO)"
	case f.set != nil:
		suffix = " (SRW)"
	case f.pairs != nil && f.add == nil:
		suffix = " (MRO)"
	case f.pairs != nil:
		suffix = " (MRW)"
	case f.write != nil:
		suffix = " ( RW)"
	}
	if f.deprecated {
		suffix += " [DEPRECATED]"
	}
	return f.name + suffix
}

func (c *class) field(name string) (field, bool) {
	for _, f := range c.fields {
		if f.name == name {
			return f, true
		}
	}
	return field{}, false
}

// classCache is what a command has read of one class, so that a list of many
// objects that point to a few does not read these again and again.
type classCache struct {
	records map[string]any
}

// lookup finds a record of a class by its ref, in what this command has read.
func (r *run) lookup(api, ref string) (map[string]any, bool) {
	if isNull(ref) {
		return nil, false
	}
	if r.cache == nil {
		r.cache = map[string]*classCache{}
	}
	c := r.cache[api]
	if c == nil {
		c = &classCache{}
		// A class that cannot be read has no objects to show.
		if v, err := r.call(api + ".get_all_records"); err == nil {
			c.records = toRecord(v)
		}
		r.cache[api] = c
	}
	rec := toRecord(c.records[ref])
	return rec, rec != nil
}

func (r *run) uuidOf(api, ref string) string {
	if rec, ok := r.lookup(api, ref); ok {
		return toText(rec["uuid"])
	}
	return notInDatabase
}

func (r *run) nameOf(api, ref string) string {
	if rec, ok := r.lookup(api, ref); ok {
		return toText(rec["name_label"])
	}
	return notInDatabase
}

// rows reads all objects of a class, oldest first.
func (r *run) rows(c *class) ([]*row, error) {
	v, err := r.call(c.api + ".get_all_records")
	if err != nil {
		return nil, err
	}
	records := toRecord(v)
	all, err := r.call(c.api + ".get_all")
	if err != nil {
		return nil, err
	}
	place := map[string]int{}
	for i, ref := range toList(all) {
		place[ref] = i
	}
	refs := sortedKeys(records)
	sort.SliceStable(refs, func(i, j int) bool {
		a, inA := place[refs[i]]
		b, inB := place[refs[j]]
		return inA && (!inB || a < b)
	})
	out := make([]*row, len(refs))
	for i, ref := range refs {
		out[i] = &row{run: r, class: c, ref: ref, rec: toRecord(records[ref])}
	}
	return out, nil
}

// row reads the one object that the parameter uuid names.
func (r *run) row(c *class) (*row, error) {
	ref, err := r.byUUID(c.api, "uuid")
	if err != nil {
		return nil, err
	}
	v, err := r.call(c.api+".get_record", ref)
	if err != nil {
		return nil, err
	}
	return &row{run: r, class: c, ref: ref, rec: toRecord(v)}, nil
}

// The constructors of fields. src is the field's name in the API.

func plain(name, src string) field {
	return field{name: name, text: func(r *row) (string, error) { return toText(r.rec[src]), nil }}
}

func refUUID(name, src, class string) field {
	return field{name: name, text: func(r *row) (string, error) {
		return r.uuidOf(class, toText(r.rec[src])), nil
	}}
}

func refName(name, src, class string) field {
	return field{name: name, text: func(r *row) (string, error) {
		return r.nameOf(class, toText(r.rec[src])), nil
	}}
}

func set(name, src, sep string) field {
	return field{name: name, sep: sep, set: func(r *row) ([]string, error) { return toList(r.rec[src]), nil }}
}

func refSet(name, src, class string) field {
	return field{name: name, sep: "; ", set: func(r *row) ([]string, error) {
		var out []string
		for _, ref := range toList(r.rec[src]) {
			out = append(out, r.uuidOf(class, ref))
		}
		return out, nil
	}}
}

// opSet is current_operations: a map from task to operation of which xe shows
// the operations.
func opSet(name, src string) field {
	return field{name: name, sep: "; ", set: func(r *row) ([]string, error) {
		m := toMap(r.rec[src])
		var out []string
		for _, k := range sortedKeys(m) {
			out = append(out, m[k])
		}
		return out, nil
	}}
}

func dict(name, src string) field {
	return field{name: name, pairs: func(r *row) (map[string]string, error) { return toMap(r.rec[src]), nil }}
}

// flat shows a set or a map as mere text that cannot be filtered by member:
// xe does so for some fields.
func flat(f field) field {
	g := f
	g.set, g.pairs = nil, nil
	g.text = func(r *row) (string, error) { return f.read(r) }
	return g
}

func (f field) asDeprecated() field { f.deprecated = true; return f }
func (f field) asExpensive() field  { f.expensive = true; return f }
func (f field) asHidden() field     { f.hidden = true; return f }

// converter makes the API's value of what stands on the command line.
type converter func(r *row, value string) (any, error)

func asText(_ *row, v string) (any, error) { return v, nil }

func asBool(name string) converter {
	return func(_ *row, v string) (any, error) { return parseBool(name, v) }
}

// asRef takes a uuid; "" is the null reference.
func asRef(class string) converter {
	return func(r *row, v string) (any, error) {
		if v == "" {
			return string(xapi.NullRef), nil
		}
		return r.callText(class+".get_by_uuid", v)
	}
}

// writable lets param-set call set_<src>.
func (f field) writable(src string, conv converter) field {
	f.write = func(r *row, value string) error {
		v, err := conv(r, value)
		if err != nil {
			return err
		}
		_, err = r.call(r.class.api+".set_"+src, r.ref, v)
		return err
	}
	return f
}

// editable lets the members of a set or the keys of a map be changed.
func (f field) editable(src string) field {
	if f.set != nil {
		f.add = func(r *row, key, _ string) error {
			_, err := r.call(r.class.api+".add_"+src, r.ref, key)
			return err
		}
		f.remove = func(r *row, key string) error {
			_, err := r.call(r.class.api+".remove_"+src, r.ref, key)
			return err
		}
		return f
	}
	f.add = func(r *row, key, value string) error {
		_, err := r.call(r.class.api+".add_to_"+src, r.ref, key, value)
		return err
	}
	f.remove = func(r *row, key string) error {
		_, err := r.call(r.class.api+".remove_from_"+src, r.ref, key)
		return err
	}
	return f
}
