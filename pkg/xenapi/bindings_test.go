package xenapi

import (
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/xapi"
)

// Every message that delegates calls its own method with its own arguments in
// their order, and gives back what that gave.
func TestEachMessageCallsItsMethod(t *testing.T) {
	r := newRig(t)
	m := map[string]string{"k": "v"}
	uuid := xapi.NewUUID()
	a, b := string(r.patch), string(r.host)
	r.pool.checked = r.patch
	for _, tt := range []struct {
		method string
		params []any
		took   string
		result any
	}{
		{"pool_patch.precheck", []any{a, b}, "PatchPrecheck(" + a + ", " + b + ")", "text"},
		{"pool_patch.apply", []any{a, b}, "PatchApply(" + a + ", " + b + ")", "done <&>"},
		{"pool_patch.pool_apply", []any{a}, "PatchPoolApply(" + a + ")", nil},
		{"pool_patch.clean_on_host", []any{a, b}, "PatchCleanOnHost(" + a + ", " + b + ")", nil},
		{"pool_patch.pool_clean", []any{a}, "PatchPoolClean(" + a + ")", nil},
		{"host_patch.destroy", []any{a}, "HostPatchDestroy(" + a + ")", nil},
		{"patchd.patch_settle", []any{a, b, true}, "PatchSettle(" + a + ", " + b + ", true)", nil},
		{"patchd.patch_import", []any{"/x"}, "PatchImport(/x)", string(made)},
		{"patchd.vdi_verify", []any{a}, "VDIVerify(" + a + ")", "damaged <&>"},
		{"patchd.vdi_repair", []any{a}, "VDIRepair(" + a + ")", nil},
		{"patchd.vdi_checks", nil, "VDIChecks()", []any{
			map[string]any{"VDI": a, "uuid": string(made[10:]), "map": "m", "checked": "20260102T03:04:05Z", "damage": "d"},
			map[string]any{"VDI": a, "uuid": "", "map": "m", "checked": "", "damage": ""},
		}},
		{"patchd.sr_room", []any{a}, "SRRoom(" + a + ")", map[string]any{"free": "7", "promised": "5"}},
		{"patchd.run_start", []any{a, `{"at_once":3}`}, "RunStart(" + a + ", 3)", "11111111-2222-4333-8444-555555555555"},
		{"patchd.run_pause", []any{"x"}, "RunPause(x)", nil},
		{"patchd.run_resume", []any{"x"}, "RunResume(x)", nil},
		{"patchd.run_cancel", []any{"x"}, "RunCancel(x)", nil},
		{"patchd.patch_stage", []any{a}, "PatchStage(" + a + ", [])", nil},
		{"patchd.patch_stage", []any{a, []any{b}}, "PatchStage(" + a + ", [" + b + "])", nil},
		{"patchd.run_retry", []any{"x"}, "RunRetry(x, [])", nil},
		{"patchd.run_retry", []any{"x", []any{b}}, "RunRetry(x, [" + b + "])", nil},
		{"patchd.why", []any{b, a}, "Why(" + b + ", " + a + ")", []any{"because"}},
		{"patchd.compliance", nil, "Compliance(" + nullRefText + ")", []any{
			map[string]any{"host": "", "host_name": "h", "patch": "", "patch_name": "", "value": "yes", "since": "", "note": ""},
		}},
		{"patchd.host_exempt", []any{b, a, true, "why"}, "HostExempt(" + b + ", " + a + ", true, why)", nil},
		{"patchd.host_resync", []any{b}, "HostResync(" + b + ")", nil},
		{"SR.probe", []any{b, m, "file"}, "SRProbe(" + b + ", map[k:v], file, map[])", "text"},
		{"SR.forget", []any{a}, "SRForget(" + a + ")", nil},
		{"SR.destroy", []any{a}, "SRDestroy(" + a + ")", nil},
		{"SR.update", []any{a}, "SRUpdate(" + a + ")", nil},
		{"SR.set_shared", []any{a, true}, "SRSetShared(" + a + ", true)", nil},
		{"SR.set_name_label", []any{a, "n"}, "SRSetNameLabel(" + a + ", n)", nil},
		{"SR.set_name_description", []any{a, "n"}, "SRSetNameDescription(" + a + ", n)", nil},
		{"SR.set_physical_size", []any{a, "5"}, "SRSetPhysicalSize(" + a + ", 5)", nil},
		{"PBD.destroy", []any{a}, "PBDDestroy(" + a + ")", nil},
		{"PBD.plug", []any{a}, "PBDPlug(" + a + ")", nil},
		{"PBD.unplug", []any{a}, "PBDUnplug(" + a + ")", nil},
		{"PBD.set_device_config", []any{a, m}, "PBDSetDeviceConfig(" + a + ", map[k:v])", nil},
		{"VDI.destroy", []any{a}, "VDIDestroy(" + a + ")", nil},
		{"VDI.forget", []any{a}, "VDIForget(" + a + ")", nil},
		{"VDI.update", []any{a}, "VDIUpdate(" + a + ")", nil},
		{"VDI.clone", []any{a}, "VDIClone(" + a + ", map[])", string(made)},
		{"VDI.snapshot", []any{a, m}, "VDISnapshot(" + a + ", map[k:v])", string(made)},
		{"VDI.copy", []any{a, b, a, b}, fmt.Sprintf("VDICopy(%s, %s, %s, %s)", a, b, a, b), string(made)},
		{"VDI.pool_migrate", []any{a, b, m}, "VDIPoolMigrate(" + a + ", " + b + ", map[k:v])", string(made)},
		{"VDI.resize", []any{a, "5"}, "VDIResize(" + a + ", 5)", nil},
		{"VDI.resize_online", []any{a, 6}, "VDIResize(" + a + ", 6)", nil},
		{"VDI.set_name_label", []any{a, "n"}, "VDISetNameLabel(" + a + ", n)", nil},
		{"VDI.set_name_description", []any{a, "n"}, "VDISetNameDescription(" + a + ", n)", nil},
		{"VDI.set_read_only", []any{a, true}, "VDISetReadOnly(" + a + ", true)", nil},
		{"VDI.set_sharable", []any{a, true}, "VDISetSharable(" + a + ", true)", nil},
		{"message.create", []any{"n", "3", "Host", uuid, "b"}, "MessageCreate(n, 3, Host, " + string(uuid) + ", b)", string(made)},
		{"message.destroy", []any{a}, "MessageDestroy(" + a + ")", nil},
	} {
		got, err := r.call(tt.method, tt.params...)
		if err != nil || !reflect.DeepEqual(got, tt.result) || r.pool.took() != tt.took {
			t.Errorf("%s: %v %v; %s, want %s", tt.method, got, err, r.pool.took(), tt.took)
		}
	}
	r.good("SR.introduce", uuid, "n", "d", "file", "user", true, m)
	want := pool.SRSpec{NameLabel: "n", NameDescription: "d", Type: "file", ContentType: "user", Shared: true, SMConfig: m}
	if took := fmt.Sprintf("SRIntroduce(%s, %v)", uuid, want); r.pool.took() != took {
		t.Errorf("%s, want %s", r.pool.took(), took)
	}
	r.good("PBD.create", map[string]any{"host": b, "SR": a, "device_config": map[string]any{"k": "v"}})
	pbd := pool.PBD{Host: r.host, SR: r.patch, DeviceConfig: m, OtherConfig: map[string]string{}}
	if took := fmt.Sprintf("PBDCreate(%v)", pbd); r.pool.took() != took {
		t.Errorf("%s, want %s", r.pool.took(), took)
	}
	for _, method := range []string{"SR.introduce", "message.create"} {
		params := map[string][]any{"SR.introduce": {"x", "", "", "", "", false}, "message.create": {"n", "1", "SR", "x", ""}}
		_, err := r.call(method, params[method]...)
		wantError(t, err, xapi.UUIDInvalid, "SR", "x")
	}
}

// What a pool without VMs, licences and extensions has to say of them.
func TestConstantAnswers(t *testing.T) {
	r := newRig(t)
	for _, tt := range []struct {
		method string
		params []any
		want   any
	}{
		{"pool.sync_database", nil, nil},
		{"pool.get_license_state", []any{r.poolRef}, map[string]any{"edition": "free", "expiry": "never"}},
		{"pool.has_extension", []any{r.poolRef, "x"}, false},
		{"host.has_extension", []any{r.host, "x"}, false},
		{"host.evacuate", []any{r.host}, nil},
		{"host.assert_can_evacuate", []any{r.host}, nil},
		{"host.get_vms_which_prevent_evacuation", []any{r.host}, map[string]any{}},
		{"host.get_uncooperative_resident_VMs", []any{r.host}, []any{}},
		{"host.get_management_interface", []any{r.host}, nullRefText},
		{"host.get_API_version_major", []any{r.host}, "2"},
		{"host.get_API_version_vendor", []any{r.host}, "patchd"},
		{"session.get_all_subject_identifiers", nil, []any{}},
		{"session.logout_subject_identifier", []any{"x"}, nil},
	} {
		if got := r.good(tt.method, tt.params...); !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: %v", tt.method, got)
		}
	}
	_, err := r.call("host.evacuate", r.sr)
	wantError(t, err, xapi.HandleInvalid, "host", string(r.sr))
	_, err = r.call("host.get_servertime", r.sr)
	wantError(t, err, xapi.HandleInvalid, "host", string(r.sr))
	if l := r.good("host.list_methods").([]any); len(l) != len(r.Methods()) {
		t.Error(len(l))
	}
}

func TestUsersAndLogins(t *testing.T) {
	r := newRig(t)
	r.good("patchd.user_add", "ann", password, "read-only")
	_, err := r.Call(t.Context(), nil, "session.slave_local_login_with_password", []any{"ann", password})
	wantError(t, err, xapi.RBACPermissionDenied)
	ref, err := r.Call(t.Context(), nil, "session.slave_local_login_with_password", []any{"root", password})
	r.must(err)
	s, err := r.Sessions.Get(xapi.Ref(ref.(string)))
	r.must(err)
	if s.Role != session.PoolAdmin {
		t.Error(s.Role)
	}
	_, err = r.Call(t.Context(), s, "session.local_logout", nil)
	r.must(err)
	r.good("patchd.user_passwd", "ann", "another password")
	ref, err = r.Call(t.Context(), nil, "session.login_with_password", []any{"ann", "another password", "", "me"})
	r.must(err)
	if got := r.good("session.get_originator", ref); got != "me" {
		t.Error(got)
	}
	r.good("patchd.user_remove", "ann")
	_, err = r.Call(t.Context(), nil, "session.login_with_password", []any{"ann", "another password"})
	wantError(t, err, xapi.SessionAuthenticationFailed)
	_, err = r.Call(t.Context(), nil, "session.slave_login", []any{r.host, "secret"})
	wantError(t, err, xapi.NotImplemented)

	// The unix socket: root, with whatever password.
	ref, err = r.Call(session.WithTrusted(t.Context()), nil, "session.login_with_password", []any{"root", ""})
	r.must(err)
	if s, err = r.Sessions.Get(xapi.Ref(ref.(string))); err != nil || s.Role != session.PoolAdmin || s.User != session.Root {
		t.Errorf("%v %v", s, err)
	}
}

// A client drives the task it has made.
func TestTasksOfClients(t *testing.T) {
	r := newRig(t)
	ref := r.good("task.create", "l", "d")
	r.good("task.set_progress", ref, 0.5)
	r.good("task.set_result", ref, "r")
	r.good("task.set_error_info", ref, []string{"A", "b"})
	if p := r.good("task.get_progress", ref); p != 0.5 {
		t.Error(p)
	}
	r.good("task.set_status", ref, "failure")
	rec := r.good("task.get_record", ref).(map[string]any)
	if rec["status"] != "failure" || rec["result"] != "r" || !reflect.DeepEqual(rec["error_info"], []any{"A", "b"}) ||
		len(rec["allowed_operations"].([]any)) != 0 || rec["resident_on"] != string(r.host) {
		t.Errorf("%v", rec)
	}
	_, err := r.call("task.cancel", ref)
	wantError(t, err, xapi.OperationNotAllowed)
	r.good("task.destroy", ref)
	_, err = r.call("task.get_status", ref)
	wantError(t, err, xapi.HandleInvalid, "task", ref.(string))
}

func TestAServerNeedsItsParts(t *testing.T) {
	if _, err := New(Options{}); err == nil {
		t.Error("a server of nothing")
	}
	r := newRig(t)
	if m, ok := r.Message("pool_patch.apply"); !ok || !m.Async() || r.Model() == nil {
		t.Error(m)
	}
}

// A run is told in texts.
func TestRunsAreTexts(t *testing.T) {
	r := newRig(t)
	a := string(r.patch)
	for method, params := range map[string][]any{
		"run_list": nil, "run_show": {"x"}, "run_hosts": {"x"}, "run_plan": {a, "{}"}, "run_plan_hosts": {a, "{}"},
	} {
		got, err := r.call("patchd."+method, params...)
		if err != nil {
			t.Errorf("%s: %v", method, err)
			continue
		}
		if all, ok := got.([]any); ok {
			if len(all) != 1 {
				t.Errorf("%s: %v", method, got)
				continue
			}
			got = all[0]
		}
		m, ok := got.(map[string]any)
		if want := map[bool]string{true: "h", false: "p"}[strings.Contains(method, "hosts")]; !ok || m["name"] != want && m["patch_name"] != want {
			t.Errorf("%s: %v", method, got)
		}
	}
	for _, policy := range []string{"", "x", `{"at_once":"two"}`, `{"no_such":1}`, "{} {}", strings.Repeat(" ", 70_000)} {
		_, err := r.call("patchd.run_start", a, policy)
		if code := xapi.AsError(err).Code; err == nil || code != xapi.ValueNotSupported {
			t.Errorf("policy %.20q: %v", policy, err)
		}
	}
}
