package xenapi

import (
	"encoding/json"
	"fmt"

	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// implicitMessages are the messages that a class has because of its fields:
// getters, setters of the fields that are read-write, look-ups.
func implicitMessages(c *Class) []*Message {
	self := Param{Name: "self", Type: RefTo(c.Name)}
	msgs := []*Message{
		reader(c, "get_record", RecordOf(c.Name), getRecord(c), self),
		reader(c, "get_by_uuid", RefTo(c.Name), getByUUID(c), Param{Name: "uuid", Type: String}),
	}
	if !c.noAll {
		expr := Param{Name: "expr", Type: String}
		msgs = append(msgs,
			reader(c, "get_all", SetOf(RefTo(c.Name)), getAll(c)),
			reader(c, "get_all_records", MapOf(RefTo(c.Name), RecordOf(c.Name)), getAllRecords(c)),
			reader(c, "get_all_records_where", MapOf(RefTo(c.Name), RecordOf(c.Name)), getAllRecordsWhere(c), expr))
	}
	if _, labelled := c.Field("name_label"); labelled && c.Name != "pool" {
		label := Param{Name: "label", Type: String}
		msgs = append(msgs, reader(c, "get_by_name_label", SetOf(RefTo(c.Name)), getByNameLabel(c), label))
	}
	if c.noGetters {
		return msgs
	}
	for _, f := range c.Fields {
		msgs = append(msgs, reader(c, "get_"+f.Name, f.Type, getField(c, f), self))
		if f.Qualifier == ReadWrite {
			msgs = append(msgs, setters(c, f)...)
		}
	}
	return msgs
}

func reader(c *Class, name string, result Type, run func(*call) (any, error), params ...Param) *Message {
	return &Message{Class: c.Name, Name: name, Params: params, Result: result, role: session.ReadOnly, implicit: true, run: run}
}

// object finds the record a message is about. A session is known by its secret
// ref, and only to whoever has that. Classes without objects never look into
// the store, where something else may lie under their name.
func (c *call) object(v *store.View, class *Class, ref xapi.Ref) (store.Item, error) {
	if class.Name == session.Class {
		return c.sessionItem(ref)
	}
	it, ok := store.Item{}, false
	if !class.Empty {
		it, ok = v.Get(class.Name, ref)
	}
	if !ok {
		return it, xapi.NewError(xapi.HandleInvalid, class.Name, string(ref))
	}
	return it, nil
}

func (c *call) sessionItem(ref xapi.Ref) (store.Item, error) {
	s := c.sess
	if ref != s.Ref {
		var err error
		if s, err = c.srv.Sessions.Get(ref); err != nil {
			return store.Item{}, xapi.NewError(xapi.HandleInvalid, session.Class, string(ref)).Because(err)
		}
	}
	raw, err := json.Marshal(s.Record)
	if err != nil {
		return store.Item{}, fmt.Errorf("encode %s: %w", s, err)
	}
	return store.Item{Class: session.Class, Ref: s.Stored, Raw: raw}, nil
}

// items are all objects of a class, oldest first.
func items(v *store.View, class *Class) []store.Item {
	if class.Empty {
		return nil
	}
	return v.List(class.Name)
}

func getRecord(class *Class) func(*call) (any, error) {
	return func(c *call) (out any, err error) {
		err = c.srv.Store.View(func(v *store.View) error {
			it, err := c.object(v, class, c.ref(0))
			if err != nil {
				return err
			}
			out, err = class.Render(v, it)
			return err
		})
		return out, err
	}
}

func getField(class *Class, f Field) func(*call) (any, error) {
	return func(c *call) (out any, err error) {
		err = c.srv.Store.View(func(v *store.View) error {
			it, err := c.object(v, class, c.ref(0))
			if err != nil {
				return err
			}
			out, err = class.RenderField(v, it, f)
			return err
		})
		return out, err
	}
}

func getByUUID(class *Class) func(*call) (any, error) {
	return func(c *call) (out any, err error) {
		unknown := xapi.NewError(xapi.UUIDInvalid, class.Name, clip(c.text(0), 128))
		uuid, err := xapi.ParseUUID(c.text(0))
		if err != nil {
			return nil, unknown
		}
		if class.Name == session.Class {
			if uuid == c.sess.UUID {
				return string(c.sess.Ref), nil
			}
			return nil, unknown // the refs of others are their secrets
		}
		err = c.srv.Store.View(func(v *store.View) error {
			it, ok := v.ByUUID(class.Name, uuid)
			if !ok || class.Empty {
				return unknown
			}
			out = string(it.Ref)
			return nil
		})
		return out, err
	}
}

func getByNameLabel(class *Class) func(*call) (any, error) {
	return func(c *call) (any, error) {
		out := []any{}
		label, _ := class.Field("name_label")
		err := c.srv.Store.View(func(v *store.View) error {
			for _, it := range items(v, class) {
				name, err := class.RenderField(v, it, label)
				if err != nil {
					return err
				}
				if name == c.text(0) {
					out = append(out, string(it.Ref))
				}
			}
			return nil
		})
		return out, err
	}
}

func getAll(class *Class) func(*call) (any, error) {
	return func(c *call) (any, error) {
		out := []any{}
		err := c.srv.Store.View(func(v *store.View) error {
			for _, it := range items(v, class) {
				out = append(out, string(it.Ref))
			}
			return nil
		})
		return out, err
	}
}

func getAllRecords(class *Class) func(*call) (any, error) {
	return func(c *call) (any, error) { return c.recordsWhere(class, nil) }
}

func getAllRecordsWhere(class *Class) func(*call) (any, error) {
	return func(c *call) (any, error) {
		e, err := parseWhere(c.text(0))
		if err != nil {
			return nil, xapi.NewError(xapi.InvalidValue, "expr", err.Error())
		}
		var unknown error
		fields(e, func(name string) {
			if _, ok := class.Field(name); !ok && name != refField {
				unknown = xapi.NewError(xapi.InvalidValue, "expr", fmt.Sprintf("%s has no field %.64q", class.Name, name))
			}
		})
		if unknown != nil {
			return nil, unknown
		}
		return c.recordsWhere(class, func(ref xapi.Ref, rec map[string]any) (bool, error) {
			rec[refField] = string(ref)
			defer delete(rec, refField)
			return e.eval(rec)
		})
	}
}

// refField is how an expression names the object's own reference.
const refField = "_ref"

// recordsWhere gives the records that keep is true for, nil meaning all, as a
// map by ref.
func (c *call) recordsWhere(class *Class, keep func(xapi.Ref, map[string]any) (bool, error)) (any, error) {
	out := map[string]any{}
	err := c.srv.Store.View(func(v *store.View) error {
		for _, it := range items(v, class) {
			rec, err := class.Render(v, it)
			if err != nil {
				return err
			}
			if keep != nil {
				if ok, err := keep(it.Ref, rec); err != nil || !ok {
					if err != nil {
						return err
					}
					continue
				}
			}
			out[string(it.Ref)] = rec
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}
