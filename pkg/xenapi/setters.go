package xenapi

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// setters are the messages of one read-write field. A set or map is replaced
// as a whole by set_; add and remove change one member.
func setters(c *Class, f Field) []*Message {
	role := c.setRole
	if role == "" {
		role = session.PoolOperator
	}
	writer := func(name string, change changeFunc, params ...Param) *Message {
		params = append([]Param{{Name: "self", Type: RefTo(c.Name)}}, params...)
		return &Message{
			Class: c.Name, Name: name, Params: params, Result: Void, role: role, mode: modeWrite, implicit: true,
			run: changeField(c, f, change),
		}
	}
	value := Param{Name: "value", Type: f.Type}
	msgs := []*Message{writer("set_"+f.Name, replaceValue, value)}
	switch f.Type.Kind {
	case KindMap:
		key := Param{Name: "key", Type: *f.Type.Key}
		elem := Param{Name: "value", Type: *f.Type.Elem}
		msgs = append(msgs,
			writer("add_to_"+f.Name, addKey, key, elem),
			writer("remove_from_"+f.Name, removeKey, key))
	case KindSet:
		elem := Param{Name: "value", Type: *f.Type.Elem}
		msgs = append(msgs,
			writer("add_"+f.Name, addMember, elem),
			writer("remove_"+f.Name, removeMember, elem))
	}
	return msgs
}

// changeFunc gives the new value of a field from its old one, in the forms of
// the wire, and the arguments behind self.
type changeFunc func(old any, args []any) (any, error)

// errPresent says that a map has the key already; the caller knows the object.
var errPresent = errors.New("the key is there already")

func replaceValue(_ any, args []any) (any, error) { return args[0], nil }

func addKey(old any, args []any) (any, error) {
	m, _ := old.(map[string]any)
	key, _ := args[0].(string)
	if _, there := m[key]; there {
		return nil, errPresent
	}
	if m == nil {
		m = map[string]any{}
	}
	m[key] = args[1]
	return m, nil
}

func removeKey(old any, args []any) (any, error) {
	m, _ := old.(map[string]any)
	key, _ := args[0].(string)
	delete(m, key)
	return m, nil
}

func addMember(old any, args []any) (any, error) {
	l, _ := old.([]any)
	if slices.Contains(l, args[0]) {
		return l, nil
	}
	return append(l, args[0]), nil
}

func removeMember(old any, args []any) (any, error) {
	l, _ := old.([]any)
	return slices.DeleteFunc(l, func(e any) bool { return e == args[0] }), nil
}

// changeField is one transaction on one stored record. Codes: HANDLE_INVALID
// (also for a ref that is to be set and names nothing), MAP_DUPLICATE_KEY,
// VALUE_NOT_SUPPORTED when the record would become too large.
func changeField(class *Class, f Field, change changeFunc) func(*call) (any, error) {
	return func(c *call) (any, error) {
		ref := c.ref(0)
		if class.Name == session.Class {
			it, err := c.sessionItem(ref)
			if err != nil {
				return nil, err
			}
			ref = it.Ref // under which it is stored
		}
		return nil, c.srv.Store.Update(c.ctx, func(tx *store.Tx) error {
			rec, err := tx.GetRaw(class.Name, ref)
			if err != nil {
				return err
			}
			old, ok := wireValue(f.Type, rec[f.Name])
			if !ok {
				old = f.fallback()
			}
			value, err := change(old, c.args[1:])
			if errors.Is(err, errPresent) {
				return xapi.NewError(xapi.MapDuplicateKey, class.Name, f.Name, stored(rec).text("uuid"), c.text(1))
			}
			if err != nil {
				return err
			}
			if err := assertRef(tx, f, value); err != nil {
				return err
			}
			if rec[f.Name], err = storedValue(f.Type, value); err != nil {
				return err
			}
			if err := assertSize(f, rec); err != nil {
				return err
			}
			tx.PutRaw(class.Name, ref, rec)
			return nil
		})
	}
}

// assertRef refuses to let a field name an object that is not there.
func assertRef(tx *store.Tx, f Field, value any) error {
	ref, ok := value.(xapi.Ref)
	if !ok || ref.IsNull() || tx.Has(f.Type.Name, ref) {
		return nil
	}
	return xapi.NewError(xapi.HandleInvalid, f.Type.Name, string(ref))
}

func assertSize(f Field, rec stored) error {
	size := 0
	for k, raw := range rec {
		size += len(k) + len(raw)
	}
	if size > maxRecord {
		return xapi.NewError(xapi.ValueNotSupported, f.Name, "",
			"the record would be larger than "+strconv.Itoa(maxRecord)+" bytes")
	}
	return nil
}

// storedValue is the JSON under which a value of type t lies in the store:
// ints are numbers there.
func storedValue(t Type, v any) (json.RawMessage, error) {
	if t.Kind == KindInt {
		if s, ok := v.(string); ok {
			n, err := strconv.ParseInt(s, 10, 64)
			if err != nil {
				return nil, fmt.Errorf("%q is not an int: %w", s, err)
			}
			v = n
		}
	}
	raw, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode a value of type %s: %w", t, err)
	}
	return raw, nil
}
