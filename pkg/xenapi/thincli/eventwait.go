package thincli

import "strings"

// condition is one field=value of event-wait, or field=/=value.
type condition struct {
	field field
	value string
	not   bool
}

// eventWait returns as soon as one object of a class meets every condition:
// at once, if there is one already.
func eventWait(r *run) error {
	c, ok := classByName(r.line.params.get("class"))
	if !ok {
		return refusef("Class '%s' cannot be waited for", r.line.params.get("class"))
	}
	var conditions []condition
	for _, p := range r.line.params.without("class") {
		f, ok := c.field(p.key)
		if !ok {
			return refusef("key missing: %s", p.key)
		}
		value, not := strings.CutPrefix(p.value, "/=")
		conditions = append(conditions, condition{f, value, not})
	}
	var failed error
	err := r.events(r.ctx, []any{c.api}, func(e map[string]any) bool {
		rec := toRecord(e["snapshot"])
		if rec == nil {
			return false // it is gone
		}
		r.cache = nil // what other objects were may have changed
		row := &row{run: r, class: c, ref: toText(e["ref"]), rec: rec}
		met, err := meets(row, conditions)
		failed = err
		return met || err != nil
	})
	if err != nil {
		return err
	}
	return failed
}

func meets(r *row, conditions []condition) (bool, error) {
	for _, c := range conditions {
		v, err := c.field.value(r)
		if err != nil {
			return false, err
		}
		if (v == c.value) == c.not {
			return false, nil
		}
	}
	return true, nil
}

// classByName finds a class by xe's name for it or by the API's.
func classByName(name string) (*class, bool) {
	for _, c := range classes() {
		if name == c.cli || strings.EqualFold(name, c.api) {
			return c, true
		}
	}
	return nil, false
}
