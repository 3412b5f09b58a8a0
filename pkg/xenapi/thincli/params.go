package thincli

import (
	"sort"
	"strings"

	"github.com/patchd/patchd/pkg/xapi"
)

// commands are the -list and -param- commands of a class.
func (c *class) commands() []*command {
	var all, settable, addable, clearable []string
	for _, f := range c.fields {
		if f.hidden {
			continue
		}
		all = append(all, f.name)
		if f.set != nil {
			all = append(all, f.name+":contains")
		}
		if f.write != nil {
			settable = append(settable, f.name)
		}
		if f.pairs != nil && f.add != nil {
			settable = append(settable, f.name+":")
		}
		if f.add != nil {
			addable = append(addable, f.name)
		}
		if f.write != nil || f.set != nil || f.pairs != nil {
			clearable = append(clearable, f.name)
		}
	}
	var cmds []*command
	cmd := func(name string, required, optional []string, help string, do func(*run, *class) error) *command {
		x := &command{name: c.cli + "-" + name, required: required, optional: optional, help: help,
			do: func(r *run) error { return do(r, c) }}
		cmds = append(cmds, x)
		return x
	}
	uuid, named := []string{"uuid"}, []string{"uuid", "param-name"}
	cmd("list", nil, append([]string{"params", "database:"}, all...),
		"Shows the "+c.plural+" whose fields match. A key of a map is matched by map-param:key=value.", list).standard = c.standard
	cmd("param-list", uuid, []string{"database:"}, "Shows every field of one object.", paramList)
	cmd("param-get", named, []string{"param-key", "database:"},
		"Shows one field of an object, or with param-key one value of a map.", paramGet)
	if len(settable) > 0 {
		cmd("param-set", uuid, settable,
			"Changes fields of an object. A key of a map is set by map-param:key=value.", paramSet)
	}
	if len(addable) > 0 {
		cmd("param-add", named, []string{"param-key"},
			"Adds param-key to a set, or key=value pairs to a map.", paramAdd)
		cmd("param-remove", append(named, "param-key"), nil,
			"Takes a member out of a set, or a key out of a map.", paramRemove)
	}
	if len(clearable) > 0 {
		cmd("param-clear", named, nil,
			"Empties a field; param-name is one of "+strings.Join(clearable, ", ")+".", paramClear)
	}
	return cmds
}

// list shows the objects that pass every filter.
func list(r *run, c *class) error {
	rows, err := r.rows(c)
	if err != nil {
		return err
	}
	all, err := r.line.params.bool("all", false)
	if err != nil {
		return err
	}
	matching := rows
	for _, p := range r.line.params.without("params") {
		if strings.HasPrefix(p.key, "database:") {
			continue
		}
		if matching, err = filter(c, matching, p); err != nil {
			return err
		}
	}
	if !all {
		rows = matching
	}
	chosen := c.choose(r.line.params)
	var records [][]cell
	for _, row := range rows {
		var rec []cell
		for _, f := range chosen {
			value := expensiveField
			if !f.expensive {
				if value, err = f.value(row); err != nil {
					return err
				}
			}
			rec = append(rec, cell{f.key(), value})
		}
		records = append(records, rec)
	}
	return r.out.table(records)
}

// choose picks the fields that params= asks for, in the record's order.
func (c *class) choose(ps params) []field {
	names := c.defaults
	if v, ok := ps.lookup("params"); ok {
		names = strings.Split(v, ",")
		if v == "all" {
			names = nil
		}
	}
	var out []field
	for _, f := range c.fields {
		wanted := len(names) == 0
		for _, n := range names {
			wanted = wanted || n == f.name
		}
		if wanted && !f.hidden {
			out = append(out, f)
		}
	}
	return out
}

// filter keeps the rows that p matches: field=value, map:key=value or
// set:contains=value. It fails where there is no such field.
func filter(c *class, rows []*row, p param) ([]*row, error) {
	if len(rows) == 0 {
		return rows, nil // nothing is asked of nothing
	}
	f, sub, err := c.target(p.key)
	if err != nil {
		return nil, err
	}
	if sub != "" && f.set != nil && sub != "contains" {
		return nil, refusef("A set is filtered by %s:contains=value", f.name)
	}
	var out []*row
	for _, r := range rows {
		ok, err := matches(r, f, sub, p.value)
		if err != nil {
			return nil, err
		}
		if ok {
			out = append(out, r)
		}
	}
	return out, nil
}

func matches(r *row, f field, sub, value string) (bool, error) {
	switch {
	case sub == "":
		v, err := f.value(r)
		return v == value, err
	case f.set != nil:
		members, err := f.set(r)
		for _, m := range members {
			if m == value && err == nil {
				return true, nil
			}
		}
		return false, ignoreInvalid(err)
	}
	m, err := f.pairs(r)
	v, ok := m[sub]
	return err == nil && ok && v == value, ignoreInvalid(err)
}

// ignoreInvalid forgives a member that dangles: it matches nothing.
func ignoreInvalid(err error) error {
	if xapi.Is(err, xapi.HandleInvalid) {
		return nil
	}
	return err
}

// target finds the field that key is about: the field itself, or name:sub (or
// the old name-sub) of a set or map.
func (c *class) target(key string) (f field, sub string, err error) {
	if f, ok := c.field(key); ok {
		return f, "", nil
	}
	if name, sub, ok := strings.Cut(key, ":"); ok {
		f, found := c.field(name)
		switch {
		case !found:
			return field{}, "", refusef("Unknown field '%s'", key)
		case f.set == nil && f.pairs == nil:
			return field{}, "", refusef("Field '%s' is not a set or map", name)
		}
		return f, sub, nil
	}
	var found []field
	for _, f := range c.fields {
		if (f.pairs != nil || f.set != nil) && strings.HasPrefix(key, f.name+"-") {
			found = append(found, f)
		}
	}
	if len(found) == 0 {
		return field{}, "", refusef("Unknown field '%s'", key)
	}
	// Maps before sets, then the longest name.
	sort.SliceStable(found, func(i, j int) bool {
		a, b := found[i], found[j]
		if (a.pairs != nil) != (b.pairs != nil) {
			return a.pairs != nil
		}
		return len(a.name) > len(b.name)
	})
	return found[0], key[len(found[0].name)+1:], nil
}

func paramList(r *run, c *class) error {
	row, err := r.row(c)
	if err != nil {
		return err
	}
	var rec []cell
	for _, f := range c.fields {
		if f.hidden {
			continue
		}
		v, err := f.value(row)
		if err != nil {
			return err
		}
		rec = append(rec, cell{f.key(), v})
	}
	return r.out.table([][]cell{rec})
}

// named finds the object and the field that param-name asks for.
func (r *run) named(c *class) (*row, field, error) {
	row, err := r.row(c)
	if err != nil {
		return nil, field{}, err
	}
	name := r.line.params.get("param-name")
	f, ok := c.field(name)
	if !ok {
		return nil, field{}, xapi.NewError("Missing parameter", name)
	}
	return row, f, nil
}

func paramGet(r *run, c *class) error {
	row, f, err := r.named(c)
	if err != nil {
		return err
	}
	if key, ok := r.line.params.lookup("param-key"); ok && f.pairs != nil {
		m, err := f.pairs(row)
		if err != nil {
			return err
		}
		v, ok := m[key]
		if !ok {
			return refusef("Key %s not found in map", key)
		}
		return r.out.list(v)
	}
	v, err := f.value(row)
	if err != nil {
		return err
	}
	return r.out.list(v)
}

func paramSet(r *run, c *class) error {
	row, err := r.row(c)
	if err != nil {
		return err
	}
	for _, p := range r.line.params.without("uuid") {
		f, sub, err := c.target(p.key)
		if err != nil {
			return err
		}
		if err := assign(row, f, sub, p.value); err != nil {
			return err
		}
	}
	return nil
}

func assign(row *row, f field, sub, value string) error {
	switch {
	case f.write == nil && f.add == nil:
		return refusef("Field '%s' is read-only", f.name)
	case sub == "" && f.write == nil:
		return refusef("Field '%s' is a map or set: use %s:key=value, or param-add", f.name, f.name)
	case sub == "":
		return f.write(row, value)
	case f.pairs == nil:
		return refusef("Members of the set '%s' are changed by param-add and param-remove", f.name)
	}
	m, err := f.pairs(row)
	if err != nil {
		return err
	}
	if _, ok := m[sub]; ok {
		if err := f.remove(row, sub); err != nil {
			return err
		}
	}
	return f.add(row, sub, value)
}

func paramAdd(r *run, c *class) error {
	row, f, err := r.named(c)
	if err != nil {
		return err
	}
	if f.set == nil && f.pairs == nil {
		return refusef("Field '%s' is neither a set nor a map", f.name)
	}
	if f.add == nil {
		return refusef("Field '%s' is read-only", f.name)
	}
	if f.set != nil {
		key, ok := r.line.params.lookup("param-key")
		if !ok {
			return refusef("To add to a set, give param-name=%s param-key=<member>", f.name)
		}
		return f.add(row, key, "")
	}
	for _, p := range r.line.params.without("uuid", "param-name", "param-key") {
		if err := f.add(row, p.key, p.value); err != nil {
			return err
		}
	}
	return nil
}

func paramRemove(r *run, c *class) error {
	row, f, err := r.named(c)
	if err != nil {
		return err
	}
	if f.set == nil && f.pairs == nil {
		return refusef("Field '%s' is neither a set nor a map", f.name)
	}
	if f.remove == nil {
		return refusef("Field '%s' is read-only", f.name)
	}
	key := r.line.params.get("param-key")
	members, err := f.members(row)
	if err != nil {
		return err
	}
	for _, m := range members {
		if m == key {
			return f.remove(row, key)
		}
	}
	if f.set != nil {
		return refusef("Key %s is not in the set", key)
	}
	return refusef("Key %s is not in map", key)
}

// members are the members of a set or the keys of a map.
func (f field) members(r *row) ([]string, error) {
	if f.set != nil {
		return f.set(r)
	}
	m, err := f.pairs(r)
	return sortedKeys(m), err
}

func paramClear(r *run, c *class) error {
	row, f, err := r.named(c)
	if err != nil {
		return err
	}
	switch {
	case f.remove != nil:
		members, err := f.members(row)
		if err != nil {
			return err
		}
		for _, m := range members {
			if err := f.remove(row, m); err != nil {
				return err
			}
		}
		return nil
	case f.write != nil:
		return f.write(row, "")
	}
	return refusef("Field '%s' is read-only", f.name)
}
