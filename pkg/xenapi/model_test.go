package xenapi

import (
	"flag"
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
)

var update = flag.Bool("update", false, "write testdata/model.txt anew")

// The whole surface in one readable file: whoever changes the table sees in
// the difference what clients will see.
func TestTheSurfaceIsAsWritten(t *testing.T) {
	const path = "testdata/model.txt"
	got := surface()
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs; run the tests with -update and look at the difference", path)
	}
}

func surface() string {
	var b strings.Builder
	m := NewModel()
	for _, c := range m.Classes() {
		fmt.Fprintf(&b, "class %s\n", c.Name)
		for _, f := range c.Fields {
			fmt.Fprintf(&b, "field %s.%s: %s %s %s", c.Name, f.Name, f.Type, f.Qualifier, f.Since)
			if f.Deprecated {
				b.WriteString(" deprecated")
			}
			fmt.Fprintf(&b, " = %s\n", XMLValue(f.fallback()))
		}
	}
	table := newMessageTable(allMessages(m))
	for _, msg := range table.sorted {
		if table.byName[msg.FullName()] != msg {
			continue
		}
		var params []string
		for _, p := range msg.Params {
			s := p.Name + ": " + p.Type.String()
			if p.Optional {
				s += "?"
			}
			params = append(params, s)
		}
		fmt.Fprintf(&b, "message %s(%s) -> %s; %s", msg.FullName(), strings.Join(params, ", "), msg.Result, msg.Role())
		switch {
		case msg.hidden:
			b.WriteString(" refused")
		case msg.Async():
			b.WriteString(" task")
		case msg.Effect():
			b.WriteString(" writes")
		}
		b.WriteString("\n")
	}
	return b.String()
}

// What a setter stores, the owner of the record has to keep when it writes the
// record the next time.
func TestEveryFieldThatCanBeSetIsKeptByItsOwner(t *testing.T) {
	owners := map[string]any{
		"pool": pool.PoolRecord{}, "host": pool.Host{}, "pool_patch": pool.Patch{}, "host_patch": pool.HostPatch{},
		"SR": pool.SR{}, "VDI": pool.VDI{}, "SM": pool.SM{}, "PBD": pool.PBD{}, "task": task.Record{},
		"session": session.Record{}, "message": pool.Message{},
	}
	for _, c := range NewModel().Classes() {
		if c.Empty {
			continue
		}
		kept := map[string]bool{}
		typ := reflect.TypeOf(owners[c.Name])
		for i := range typ.NumField() {
			name, _, _ := strings.Cut(typ.Field(i).Tag.Get("json"), ",")
			kept[name] = true
			if _, known := c.Field(name); !known && !strings.HasPrefix(name, "_") && c.Name+"."+name != "pool.live_patching_disabled" {
				t.Errorf("%s stores %s, which the wire does not know", c.Name, name)
			}
		}
		for _, f := range c.Fields {
			if f.Qualifier == ReadWrite && !kept[f.Name] {
				t.Errorf("%s.%s can be set and is not kept", c.Name, f.Name)
			}
			if f.derive != nil && kept[f.Name] {
				t.Errorf("%s.%s is derived and stored", c.Name, f.Name)
			}
		}
	}
}

// conforms tells whether v, a value of the wire, fits its type.
func conforms(typ Type, v any) bool {
	switch typ.Kind {
	case KindBool:
		_, ok := v.(bool)
		return ok
	case KindFloat:
		_, ok := v.(float64)
		return ok
	case KindDatetime:
		d, ok := v.(Date)
		return ok && len(d) == len(epochDate)
	case KindSet:
		l, ok := v.([]any)
		for _, e := range l {
			ok = ok && conforms(*typ.Elem, e)
		}
		return ok
	case KindMap:
		m, ok := v.(map[string]any)
		for _, e := range m {
			ok = ok && conforms(*typ.Elem, e)
		}
		return ok
	}
	s, ok := v.(string)
	if !ok {
		return false
	}
	if typ.Kind == KindString {
		return true
	}
	converted, err := convert(typ, "", s)
	return err == nil && converted != nil && s != ""
}

// Whatever lies in the store, also nothing or nonsense, the record is whole.
func TestEveryRecordIsWhole(t *testing.T) {
	r := newRig(t)
	raws := []string{`{}`, `{"uuid":null,"name_label":5,"size":"12","size2":1,"other_config":null,"tags":null,"host":"","VDI":"",
		"status":7,"progress":"x","created":"never","finished":"2026-01-02T03:04:05.6+02:00","pool_applied":"yes","features":{"a":1,"b":"x"},
		"after_apply_guidance":["restartHost",5],"virtual_size":1.5,"_secret":"x","enabled":1,"error_info":{},"SR":7,"type":null}`}
	for _, c := range r.model.Classes() {
		for _, raw := range raws {
			r.must(r.store.View(func(v *store.View) error {
				it := store.Item{Class: c.Name, Ref: r.host, Raw: []byte(raw)}
				rec, err := c.Render(v, it)
				if err != nil || len(rec) != len(c.Fields) {
					t.Errorf("%s: %d fields of %d: %v", c.Name, len(rec), len(c.Fields), err)
				}
				for _, f := range c.Fields {
					if !conforms(f.Type, rec[f.Name]) {
						t.Errorf("%s.%s: %#v is no %s", c.Name, f.Name, rec[f.Name], f.Type)
					}
					one, err := c.RenderField(v, it, f)
					if err != nil || !reflect.DeepEqual(one, rec[f.Name]) {
						t.Errorf("%s.%s alone: %#v %v", c.Name, f.Name, one, err)
					}
				}
				return nil
			}))
		}
	}
}
