package xenapi

import (
	"context"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

// Every message refuses one parameter too few and one too many, before it
// looks at the session, and names what it wants without the session.
func TestParameterCountsOfEveryMessage(t *testing.T) {
	r := newRig(t)
	for name, m := range r.messages.byName {
		for _, given := range []int{m.required() - 1, len(m.Params) + 1} {
			if given < 0 {
				continue
			}
			params := slices.Repeat([]any{""}, given)
			want := []string{name, fmt.Sprint(m.required()), fmt.Sprint(given)}
			_, err := r.Call(t.Context(), nil, name, params)
			wantError(t, err, xapi.MessageParameterCountMismatch, want...)
			if !m.noSession {
				params = append(params, "")
			}
			_, err = r.dispatch(t.Context(), name, params)
			wantError(t, err, xapi.MessageParameterCountMismatch, want...)
		}
	}
	_, err := r.dispatch(t.Context(), "pool.get_all", nil)
	wantError(t, err, xapi.MessageParameterCountMismatch, "pool.get_all", "0", "-1")
}

// Getters of every field of every class, against the record.
func TestGettersOfEveryField(t *testing.T) {
	r := newRig(t)
	own := r.good("task.create", "l", "d").(string)
	refs := map[string]xapi.Ref{
		"host": r.host, "pool": r.poolRef, "pool_patch": r.patch, "host_patch": r.hostPatch, "SR": r.sr, "VDI": r.vdi,
		"SM": r.sm, "PBD": r.pbd, "task": xapi.Ref(own), "session": r.root.Ref, "message": r.message,
	}
	for _, c := range r.model.Classes() {
		ref, ok := refs[c.Name]
		if !ok {
			for _, all := range []string{"get_all", "get_all_records"} {
				if v := r.good(c.Name + "." + all); reflect.ValueOf(v).Len() != 0 {
					t.Errorf("%s.%s: %v", c.Name, all, v)
				}
			}
			_, err := r.call(c.Name+".get_record", r.host)
			wantError(t, err, xapi.HandleInvalid, c.Name, string(r.host))
			continue
		}
		rec := r.good(c.Name+".get_record", ref).(map[string]any)
		if len(rec) != len(c.Fields) {
			t.Errorf("%s: %d fields", c.Name, len(rec))
		}
		if by := r.good(c.Name+".get_by_uuid", rec["uuid"]); by != string(ref) {
			t.Errorf("%s.get_by_uuid: %v", c.Name, by)
		}
		_, err := r.call(c.Name+".get_by_uuid", string(xapi.NewUUID()))
		wantError(t, err, xapi.UUIDInvalid)
		_, err = r.call(c.Name+".get_by_uuid", "../x")
		wantError(t, err, xapi.UUIDInvalid, c.Name, "../x")
		gone := xapi.NewRef()
		_, err = r.call(c.Name+".get_record", gone)
		wantError(t, err, xapi.HandleInvalid, c.Name, string(gone))
		if !c.noAll {
			if all := r.good(c.Name + ".get_all_records").(map[string]any); !reflect.DeepEqual(all[string(ref)], rec) {
				t.Errorf("%s.get_all_records: %v", c.Name, all)
			}
			if all := r.good(c.Name + ".get_all").([]any); !slices.Contains(all, any(string(ref))) {
				t.Errorf("%s.get_all: %v", c.Name, all)
			}
		}
		for _, f := range c.Fields {
			v, err := r.call(c.Name+".get_"+f.Name, ref)
			if c.noGetters {
				wantError(t, err, xapi.MessageMethodUnknown)
			} else if err != nil || !reflect.DeepEqual(v, rec[f.Name]) {
				t.Errorf("%s.get_%s: %v %v, want %v", c.Name, f.Name, v, err, rec[f.Name])
			}
		}
	}
	if l := r.good("SR.get_by_name_label", "local").([]any); len(l) != 1 {
		t.Error(l)
	}
	if l := r.good("SR.get_by_name_label", "nobody").([]any); len(l) != 0 {
		t.Error(l)
	}
	_, err := r.call("pool.get_by_name_label", "x")
	wantError(t, err, xapi.MessageMethodUnknown, "pool.get_by_name_label")
}

// A relation is stored once; the other side is derived.
func TestDerivedFields(t *testing.T) {
	r := newRig(t)
	parent := r.good("task.create", "l", "d").(string)
	sub, err := r.Tasks.Create(t.Context(), task.Spec{Label: "sub", SubtaskOf: xapi.Ref(parent)})
	r.must(err)
	snap := xapi.NewRef()
	r.must(r.store.Update(t.Context(), func(tx *store.Tx) error {
		tx.Put("VDI", snap, map[string]any{"uuid": xapi.NewUUID(), "SR": r.sr, "snapshot_of": r.vdi})
		return nil
	}))
	for _, tt := range []struct {
		method string
		ref    any
		want   []any
	}{
		{"pool_patch.get_host_patches", r.patch, []any{string(r.hostPatch)}},
		{"host.get_patches", r.host, []any{string(r.hostPatch)}},
		{"host.get_PBDs", r.host, []any{string(r.pbd)}},
		{"SR.get_PBDs", r.sr, []any{string(r.pbd)}},
		{"SR.get_VDIs", r.sr, []any{string(r.vdi), string(snap)}},
		{"VDI.get_snapshots", r.vdi, []any{string(snap)}},
		{"task.get_subtasks", parent, []any{string(sub)}},
		{"session.get_tasks", r.root.Ref, []any{parent}},
		{"VDI.get_allowed_operations", r.vdi, []any{"copy", "clone", "update", "forget"}},
		{"SR.get_supported_types", nil, []any{"file"}},
	} {
		var params []any
		if tt.ref != nil {
			params = []any{tt.ref}
		}
		if got := r.good(tt.method, params...); !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: %v, want %v", tt.method, got, tt.want)
		}
	}
	if ops := r.good("SR.get_allowed_operations", r.sr).([]any); !slices.Contains(ops, any("vdi_clone")) || slices.Contains(ops, any("vdi_resize")) {
		t.Error(ops)
	}
}

func TestNamesOfMethods(t *testing.T) {
	r := newRig(t)
	if v := r.good("pool_patch_get_by_uuid", r.good("pool_patch.get_uuid", r.patch)); v != string(r.patch) {
		t.Error(v)
	}
	if v := r.good("VDI_get_virtual_size", r.vdi); v != "4194304" {
		t.Error(v)
	}
	for _, name := range []string{"", "x", "pool_update.get_all", "Async.pool_patch_apply", "Async.x.y", "pool.get_", "pool_", "session.create_from_db_file", "patchd."} {
		_, err := r.call(name)
		wantError(t, err, xapi.MessageMethodUnknown, name)
	}
	for _, name := range []string{"Async.pool.get_all", "Async.pool.set_name_label", "Async.task.cancel", "Async.event.next", "Async.session.logout", "Async.host.get_servertime"} {
		_, err := r.call(name)
		wantError(t, err, "Fault")
	}
	for name, code := range map[string]string{"host.reboot": xapi.NotImplemented, "host.refresh_pack_info": xapi.NotImplemented} {
		_, err := r.call(name, r.host)
		wantError(t, err, code, name)
	}
	_, err := r.call("host.call_plugin", r.host, "updater.py", "check_update", map[string]string{})
	wantError(t, err, xapi.XenAPIMissingPlugin, "updater.py")
	_, err = r.call("host_patch.apply", r.hostPatch)
	wantError(t, err, xapi.MessageDeprecated)
}

func TestSetters(t *testing.T) {
	r := newRig(t)
	uuid := r.good("pool.get_uuid", r.poolRef).(string)
	r.good("pool.set_name_label", r.poolRef, "büro")
	r.good("pool.add_to_other_config", r.poolRef, "k", "v")
	_, err := r.call("pool.add_to_other_config", r.poolRef, "k", "w")
	wantError(t, err, xapi.MapDuplicateKey, "pool", "other_config", uuid, "k")
	r.good("pool.remove_from_other_config", r.poolRef, "nobody")
	r.good("pool.add_tags", r.poolRef, "a")
	r.good("pool.add_tags", r.poolRef, "a")
	r.good("pool.add_tags", r.poolRef, "b")
	r.good("pool.remove_tags", r.poolRef, "a")
	r.good("pool.set_wlb_enabled", r.poolRef, true)
	r.good("pool.set_gui_config", r.poolRef, map[string]string{"x": "y"})
	rec := r.good("pool.get_record", r.poolRef).(map[string]any)
	if rec["name_label"] != "büro" || rec["wlb_enabled"] != true || rec["uuid"] != uuid ||
		!reflect.DeepEqual(rec["other_config"], map[string]any{"k": "v"}) || !reflect.DeepEqual(rec["tags"], []any{"b"}) ||
		!reflect.DeepEqual(rec["gui_config"], map[string]any{"x": "y"}) {
		t.Errorf("%v", rec)
	}
	r.good("pool.remove_from_other_config", r.poolRef, "k")
	if v := r.good("pool.get_other_config", r.poolRef).(map[string]any); len(v) != 0 {
		t.Error(v)
	}
	gone := string(xapi.NewRef())
	_, err = r.call("pool.set_default_SR", r.poolRef, gone)
	wantError(t, err, xapi.HandleInvalid, "SR", gone)
	r.good("pool.set_default_SR", r.poolRef, "")
	if v := r.good("pool.get_default_SR", r.poolRef); v != "OpaqueRef:NULL" {
		t.Error(v)
	}
	_, err = r.call("pool.set_name_label", gone, "x")
	wantError(t, err, xapi.HandleInvalid, "pool", gone)
	_, err = r.call("host.set_display", r.host, "sideways")
	wantError(t, err, xapi.ValueNotSupported)
	_, err = r.call("pool.set_name_label", r.poolRef, int64(5))
	wantError(t, err, xapi.FieldTypeError, "value")
	for i := range 10 {
		if _, err = r.call("pool.add_to_other_config", r.poolRef, fmt.Sprint(i), strings.Repeat("x", maxText)); err != nil {
			break
		}
	}
	wantError(t, err, xapi.ValueNotSupported)
	r.good("session.add_to_other_config", r.root.Ref, "a", "b")
	if v := r.good("session.get_other_config", r.root.Ref); !reflect.DeepEqual(v, map[string]any{}) && !reflect.DeepEqual(v, map[string]any{"a": "b"}) {
		t.Error(v)
	}
	fresh, err := r.Sessions.Get(r.root.Ref)
	if err != nil || fresh.OtherConfig["a"] != "b" {
		t.Errorf("%v %v", fresh, err)
	}
	r.good("host.disable", r.host)
	if v := r.good("host.get_enabled", r.host); v != false {
		t.Error(v)
	}
}

// Reads for every role, changes from pool-operator on, users and plug-ins for
// pool-admin only; and nobody's tasks but his own.
func TestRolesOfEveryMessage(t *testing.T) {
	r := newRig(t)
	reader, operator := r.user("reader", session.ReadOnly), r.user("operator", session.PoolOperator)
	for name, m := range r.messages.byName {
		if m.noSession {
			continue
		}
		params := slices.Repeat([]any{true}, m.required()) // refused by its type, if not by role
		for _, s := range []*session.Session{reader, operator} {
			if s.Role.AtLeast(m.role) {
				continue
			}
			_, err := r.Call(t.Context(), s, name, params)
			wantError(t, err, xapi.RBACPermissionDenied)
		}
	}
	for _, name := range []string{"pool.set_name_label", "pool_patch.apply", "VDI.destroy", "SR.scan", "Async.pool_patch.destroy"} {
		if m, _, _ := r.messages.find(name); m.Role() != session.PoolOperator {
			t.Errorf("%s: %s", name, m.Role())
		}
	}
	mine, err := r.Call(t.Context(), reader, "task.create", []any{"l", "d"})
	r.must(err)
	theirs := r.good("task.create", "l", "d")
	for _, m := range []string{"task.cancel", "task.destroy"} {
		_, err = r.Call(t.Context(), reader, m, []any{theirs})
		wantError(t, err, xapi.RBACPermissionDenied)
		_, err = r.Call(t.Context(), reader, m, []any{mine})
		r.must(err)
	}
	_, err = r.Call(t.Context(), operator, "task.cancel", []any{theirs})
	r.must(err)
	_, err = r.Call(t.Context(), operator, "patchd.user_list", nil)
	wantError(t, err, xapi.RBACPermissionDenied)
	if users := r.good("patchd.user_list").([]any); len(users) != 3 {
		t.Error(users)
	}
}

// The secret of another session opens nothing, and its uuid gives no secret.
func TestSessionsAreSecret(t *testing.T) {
	r := newRig(t)
	other := r.user("other", session.ReadOnly)
	uuid := string(r.root.UUID)
	_, err := r.Call(t.Context(), other, "session.get_by_uuid", []any{uuid})
	wantError(t, err, xapi.UUIDInvalid, "session", uuid)
	_, err = r.Call(t.Context(), other, "session.get_record", []any{r.root.Stored})
	wantError(t, err, xapi.HandleInvalid)
	_, err = r.dispatch(t.Context(), "pool.get_all", []any{string(r.root.Stored)})
	wantError(t, err, xapi.SessionInvalid)
	_, err = r.dispatch(t.Context(), "pool.get_all", []any{nil})
	wantError(t, err, xapi.SessionInvalid)
	if v := r.good("user.get_all").([]any); len(v) != 0 {
		t.Error("users are not objects of the wire:", v)
	}
	batch := r.good("event.from", []string{"*", "session", "user"}, "", 0.0).(map[string]any)
	if text := fmt.Sprint(batch); strings.Contains(text, "argon2") || strings.Contains(text, string(r.root.Stored)) || strings.Contains(text, "_signature") {
		t.Error(text)
	}
}

// What is asked of a coordinator is not answered by another host.
func TestAnotherHostIsTheCoordinator(t *testing.T) {
	r := newRig(t)
	r.slave = "192.0.2.1"
	_, err := r.dispatch(t.Context(), "session.login_with_password", []any{"root", password})
	wantError(t, err, xapi.HostIsSlave, "192.0.2.1")
	if v, failure := r.json("pool.get_all", "x"); failure[0] != xapi.HostIsSlave || v != nil {
		t.Error(failure)
	}
	r.Role = func() map[string]string { return map[string]string{"role": "standby"} }
	if v, err := r.dispatch(t.Context(), "patchd.role", nil); err != nil || !reflect.DeepEqual(v, map[string]any{"role": "standby"}) {
		t.Errorf("role %v %v", v, err) // every host answers this, without a login
	}
	r.Coordinator = func() (string, bool) { return "", false }
	_, err = r.call("pool.get_all")
	wantError(t, err, xapi.HostStillBooting)
}

// A client that goes away changes nothing; task.cancel ends the work.
func TestWorkDoesNotEndWithTheRequest(t *testing.T) {
	r := newRig(t)
	began, goOn := make(chan struct{}), make(chan struct{})
	r.pool.apply = func(ctx context.Context, _, _ xapi.Ref) (string, error) {
		close(began)
		select {
		case <-goOn:
			return "applied", nil
		case <-ctx.Done():
			return "", context.Cause(ctx)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := r.Call(ctx, r.root, "pool_patch.apply", []any{string(r.patch), string(r.host)})
		done <- err
	}()
	<-began
	cancel()
	close(goOn)
	if err := <-done; err != nil {
		t.Error(err)
	}
	left := r.good("task.get_all_records_where", `field "name_label"="pool_patch.apply"`).(map[string]any)
	if len(left) != 1 {
		t.Errorf("nobody got the answer, and the tasks that tell it are %v", left)
	}

	began, goOn = make(chan struct{}), make(chan struct{})
	ref := r.good("Async.pool_patch.apply", r.patch, r.host)
	<-began
	r.good("task.cancel", ref)
	rec, err := r.Tasks.Wait(t.Context(), xapi.Ref(ref.(string)))
	if err != nil || rec.Status != task.Cancelled || rec.ErrorInfo[0] != xapi.TaskCancelled {
		t.Errorf("%+v %v", rec, err)
	}
}

// A panic, and an error without a code, are INTERNAL_ERROR; the cause is logged.
func TestUnexpectedFailures(t *testing.T) {
	r := newRig(t)
	_, err := r.call("SR.scan", r.sr)
	wantError(t, err, xapi.InternalError)
	_, err = r.call("pool_patch.clean", r.patch)
	wantError(t, err, xapi.InternalError, "disk on fire")
	_, err = r.call("pool_patch.destroy", r.patch)
	wantError(t, err, xapi.PatchIsApplied)
	if n := strings.Count(r.log.text.String(), "level=error msg=\"call failed\" error=\"disk on fire\""); n != 1 {
		t.Errorf("the cause is %d times in the log", n)
	}
}

// Every change leaves one line that says who did what to which object, and
// that holds no secret.
func TestAuditLines(t *testing.T) {
	r := newRig(t)
	uuid := r.good("pool_patch.get_uuid", r.patch).(string)
	ctx := WithAddress(t.Context(), "192.0.2.9:5")
	ref := string(r.root.Ref)
	send := func(method string, params ...any) {
		_, _ = r.dispatch(ctx, method, params) // the outcome is in the line
	}
	send("pool_patch.apply", ref, string(r.patch), string(r.host))
	send("pool_patch.destroy", ref, string(r.patch))
	send("Async.pool_patch.pool_apply", ref, string(r.patch))
	send("pool.set_name_label", ref, string(r.poolRef), "a name")
	send("session.login_with_password", "root", password)
	send("session.login_with_password", "root", "wrong-secret")
	send("session.change_password", ref, password, "a new secret, much longer")
	send("pool.get_all", ref)
	r.Tasks.Stop() // waits for the asynchronous one

	for _, tt := range []struct{ method, outcome, object string }{
		{"pool_patch.apply", "Success", uuid}, {"pool_patch.destroy", "PATCH_IS_APPLIED", uuid},
		{"Async.pool_patch.pool_apply", "Success", uuid}, {"pool.set_name_label", "Success", string(r.poolRef)},
		{"session.change_password", "Success", ""},
	} {
		lines := r.log.audits(tt.method)
		if len(lines) != 1 {
			t.Errorf("%s: %d lines", tt.method, len(lines))
			continue
		}
		f := lines[0]
		objects, _ := f["objects"].(string)
		if f["outcome"] != tt.outcome || f["user"] != "root" || f["address"] != "192.0.2.9:5" || f["originator"] != "test" ||
			len(f["session"].(string)) != 8 || f["duration"] == nil || !strings.Contains(objects, tt.object) {
			t.Errorf("%s: %v", tt.method, f)
		}
	}
	logins := r.log.audits("session.login_with_password")
	if len(logins) != 2 || logins[0]["user"] != "root" || logins[1]["outcome"] != xapi.SessionAuthenticationFailed {
		t.Errorf("%v", logins)
	}
	if len(r.log.audits("pool.get_all")) != 0 {
		t.Error("a read is audited")
	}
	for _, secret := range []string{password, "wrong-secret", "a new secret", ref, string(r.root.Stored)} {
		if strings.Contains(r.log.text.String(), secret) {
			t.Errorf("%q is in the log", secret)
		}
	}
}

// Constructors take what they need of a record and ignore what is read-only.
func TestConstructors(t *testing.T) {
	r := newRig(t)
	r.good("VDI.create", map[string]any{
		"SR": string(r.sr), "virtual_size": 8 << 20, "name_label": "n", "other_config": map[string]any{"a": "b"}, "tags": []any{"t"},
		"uuid": 5, "VBDs": nil, "snapshot_time": int64(7), "made_up": true,
	})
	v := r.pool.vdi
	if v.SR != r.sr || v.VirtualSize != 8<<20 || v.Type != "user" || v.OtherConfig["a"] != "b" || v.Tags[0] != "t" || v.UUID != "" {
		t.Errorf("%+v", v)
	}
	for field, value := range map[string]any{"virtual_size": "many", "SR": true, "other_config": "x", "sharable": "1"} {
		rec := map[string]any{"SR": string(r.sr), "virtual_size": "1", field: value}
		_, err := r.call("VDI.create", rec)
		wantError(t, err, xapi.FieldTypeError, field)
	}
	_, err := r.call("VDI.create", map[string]any{"SR": string(r.sr)})
	wantError(t, err, xapi.FieldTypeError, "virtual_size")
	_, err = r.call("VDI.create", map[string]any{"SR": string(r.sr), "virtual_size": "-1"})
	wantError(t, err, xapi.ValueNotSupported, "virtual_size", "-1", "negative")

	r.good("SR.create", r.host, map[string]string{"path": "/x"}, "0", "n", "d", "file", "user", true)
	if s := r.pool.spec; s.Host != r.host || s.DeviceConfig["path"] != "/x" || !s.Shared || s.Type != "file" || s.SMConfig == nil {
		t.Errorf("%+v", s)
	}
	r.good("VDI.copy", r.vdi, r.sr)
	if want := fmt.Sprintf("VDICopy(%s, %s, %s, %s)", r.vdi, r.sr, nullRefText, nullRefText); r.pool.took() != want {
		t.Error(r.pool.took())
	}
	uuid := xapi.NewUUID()
	r.good("VDI.introduce", strings.ToUpper(string(uuid)), "n", "d", r.sr, "user", false, true, map[string]string{}, "loc")
	if in := r.pool.intro; in.UUID != uuid || !in.VDI.Managed || !in.VDI.ReadOnly || in.VDI.SnapshotOf != xapi.NullRef || in.VDI.Location != "loc" {
		t.Errorf("%+v", in)
	}
}
