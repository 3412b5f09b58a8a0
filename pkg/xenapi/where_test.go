package xenapi

import (
	"strings"
	"testing"

	"github.com/patchd/patchd/pkg/xapi"
)

func TestWhereExpressions(t *testing.T) {
	rec := map[string]any{
		"name_label": `a "b"`, "size": "42", "shared": true, "SR": "OpaqueRef:x", "tags": []any{"u", "v"},
		"other_config": map[string]any{"k": "v"}, "progress": 0.5, "created": Date("20260101T00:00:00Z"),
	}
	for in, want := range map[string]bool{
		`true`:                         true,
		` false `:                      false,
		`not true`:                     false,
		`not not true`:                 true,
		`field "size"="42"`:            true,
		`field "size" = '42'`:          true,
		`(field "size"="41")`:          false,
		`field "name_label"="a \"b\""`: true,
		`field "shared"="true" and field "size"="42"`:     true,
		`field "shared"="true" and not field "size"="42"`: false,
		`false or true and false`:                         false,
		`(false or true) and true`:                        true,
		`true or false and false`:                         true,
		`field "SR"="OpaqueRef:x"`:                        true,
		`"x"="x"`:                                         true,
		`"OpaqueRef:x"=field "SR"`:                        true,
		`field "tags"="('u' 'v')"`:                        true,
		`field "other_config"="(('k' 'v'))"`:              true,
		`field "progress"="0.5"`:                          true,
		`field "created"="20260101T00:00:00Z"`:            true,
	} {
		e, err := parseWhere(in)
		if err != nil {
			t.Errorf("%s: %v", in, err)
			continue
		}
		if got, err := e.eval(rec); err != nil || got != want {
			t.Errorf("%s: %v %v", in, got, err)
		}
	}
	for _, in := range []string{
		"", "true false", "nottrue", "field", `field "a"`, `field "a"=`, `field "a"="b`, `(true`, "true)", "and", "true and", `"a"`,
		strings.Repeat("(", 100) + "true" + strings.Repeat(")", 100), strings.Repeat("not ", 100) + "true",
		strings.Repeat("true or ", 2000) + "true", `field a="b"`, "truex",
	} {
		if _, err := parseWhere(in); err == nil {
			t.Errorf("%.40q was taken", in)
		}
	}
}

func TestWhereOverTheWire(t *testing.T) {
	r := newRig(t)
	for in, want := range map[string]int{
		`true`: 1, `field "name_label"="P1"`: 1, `field "name_label"="P2"`: 0, `field "VDI"="` + string(r.vdi) + `"`: 1,
		`field "_ref"="` + string(r.patch) + `"`: 1, `not field "pool_applied"="false"`: 0,
	} {
		got := r.good("pool_patch.get_all_records_where", in).(map[string]any)
		if len(got) != want {
			t.Errorf("%s: %v", in, got)
		}
		for _, rec := range got {
			if _, there := rec.(map[string]any)["_ref"]; there {
				t.Error("_ref is in the record")
			}
		}
	}
	_, err := r.call("pool_patch.get_all_records_where", `field "nonsense"="1" or true`)
	wantError(t, err, xapi.InvalidValue)
	_, err = r.call("pool_patch.get_all_records_where", `drop table`)
	wantError(t, err, xapi.InvalidValue)
}
