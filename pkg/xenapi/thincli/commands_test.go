package thincli_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/patchd/patchd/pkg/xapi"
	"github.com/patchd/patchd/pkg/xenapi/thincli/xetest"
)

// Every command over a real connection: what it calls and what it prints
// (S1-30, S1-31).
func TestCommands(t *testing.T) {
	null := string(xapi.NullRef)
	id := func(n int) string { return " uuid=" + uuid(n) }
	cases := []struct {
		args, call, out string
		answers         map[string]any
	}{
		{"patch-precheck host-uuid=" + uuid(1) + id(20), "pool_patch.precheck(" + ref(20) + ", " + ref(1) + ")", "fine\n", map[string]any{"pool_patch.precheck": "fine"}},
		{"patch-apply host-uuid=" + uuid(1) + id(20), "pool_patch.apply(" + ref(20) + ", " + ref(1) + ")", "done\n", map[string]any{"pool_patch.apply": "done"}},
		{"patch-pool-apply" + id(20), "pool_patch.pool_apply(" + ref(20) + ")", "", nil},
		{"patch-destroy" + id(20), "pool_patch.destroy(" + ref(20) + ")", "", nil},
		{"sr-scan" + id(3), "SR.scan(" + ref(3) + ")", "", nil},
		{"sr-destroy" + id(3), "SR.destroy(" + ref(3) + ")", "", nil},
		{"sr-forget" + id(3), "SR.forget(" + ref(3) + ")", "", nil},
		{"sr-update" + id(3), "SR.update(" + ref(3) + ")", "", nil},
		{"sr-create name-label=n type=file name-description=d device-config:location=/a=b physical-size=2GiB content-type=user sm-config:x=y",
			"SR.create(" + ref(1) + ", {location=/a=b}, 2147483648, n, d, file, user, false, {x=y})", uuid(3) + "\n", map[string]any{"SR.create": ref(3)}},
		{"sr-create name-label=n type=file shared=true device-config-location=/a",
			"SR.create(" + ref(1) + ", {location=/a}, 0, n, , file, , true, {})", uuid(3) + "\n", map[string]any{"SR.create": ref(3)}},
		{"sr-introduce name-label=n type=nfs shared=1" + id(60), "SR.introduce(" + uuid(60) + ", n, , nfs, , true, {})", uuid(60) + "\n", nil},
		{"sr-probe type=nfs device-config:server=s", "SR.probe(" + ref(1) + ", {server=s}, nfs, {})", "<x/>\n", map[string]any{"SR.probe": "<x/>"}},
		{"vdi-create name-label=n virtual-size=4MiB sm-config:a=b tags:t=1 sr-uuid=" + uuid(3),
			"VDI.create({SR=" + ref(3) + " name_description= name_label=n other_config={} read_only=false sharable=false sm_config={a=b} tags=(t) type=user virtual_size=4194304 xenstore_data={}})",
			uuid(4) + "\n", map[string]any{"VDI.create": ref(4)}},
		{"vdi-destroy" + id(4), "VDI.destroy(" + ref(4) + ")", "", nil},
		{"vdi-forget" + id(4), "VDI.forget(" + ref(4) + ")", "", nil},
		{"vdi-update" + id(4), "VDI.update(" + ref(4) + ")", "", nil},
		{"vdi-clone new-name-label=c driver-params:a=b" + id(4), "VDI.clone(" + ref(4) + ", {a=b})", uuid(4) + "\n", map[string]any{"VDI.clone": ref(4)}},
		{"vdi-snapshot" + id(4), "VDI.snapshot(" + ref(4) + ", {})", uuid(4) + "\n", map[string]any{"VDI.snapshot": ref(4)}},
		{"vdi-introduce type=user location=l sr-uuid=" + uuid(3) + id(61),
			"VDI.introduce(" + strings.Join([]string{uuid(61), "", "", ref(3), "user", "false", "false", "{}", "l", "{}", "{}", "true", "0", "0", null, "false", "19700101T00:00:00Z", null}, ", ") + ")",
			uuid(4) + "\n", map[string]any{"VDI.introduce": ref(4)}},
		{"vdi-resize disk-size=1024" + id(4), "VDI.resize(" + ref(4) + ", 1024)", "", nil},
		{"vdi-resize disk-size=1k --online" + id(4), "VDI.resize_online(" + ref(4) + ", 1024)", "", nil},
		{"vdi-copy sr-uuid=" + uuid(3) + id(4), "VDI.copy(" + ref(4) + ", " + ref(3) + ", " + null + ", " + null + ")", uuid(4) + "\n", map[string]any{"VDI.copy": ref(4)}},
		{"vdi-copy into-vdi-uuid=" + uuid(4) + " base-vdi-uuid=" + uuid(4) + id(4), "VDI.copy(" + strings.Join([]string{ref(4), null, ref(4), ref(4)}, ", ") + ")", uuid(4) + "\n", map[string]any{"VDI.copy": ref(4)}},
		{"pbd-create device-config:location=/l host-uuid=" + uuid(1) + " sr-uuid=" + uuid(3),
			"PBD.create({SR=" + ref(3) + " device_config={location=/l} host=" + ref(1) + " other_config={}})", uuid(5) + "\n", map[string]any{"PBD.create": ref(5)}},
		{"pbd-destroy" + id(5), "PBD.destroy(" + ref(5) + ")", "", nil},
		{"pbd-plug" + id(5), "PBD.plug(" + ref(5) + ")", "", nil},
		{"pbd-unplug" + id(5), "PBD.unplug(" + ref(5) + ")", "", nil},
		{"pool-sync-database", "pool.sync_database()", "", nil},
		{"user-password-change old=a new=b", "session.change_password(a, b)", "", nil},
		{"message-create name=N priority=3 body=B host-uuid=" + uuid(1), "message.create(N, 3, Host, " + uuid(1) + ", B)", "", nil},
		{"message-destroy" + id(32), "message.destroy(" + ref(32) + ")", "", nil},
		{"message-destroy uuids=" + uuid(32), "message.destroy(" + ref(32) + ")", "", nil},
	}
	for _, c := range cases {
		name, _, _ := strings.Cut(c.args, " ")
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, short())
			furnish(w)
			for m, v := range c.answers {
				w.answers[m] = v
			}
			expect(t, w.xe(strings.Fields(c.args)...), xetest.Result{Stdout: c.out})
			if calls := w.log(); !slices.Contains(calls, c.call) {
				t.Errorf("calls %q, want %q", calls, c.call)
			}
			if n := w.open(); n != 0 {
				t.Errorf("%d sessions were left open", n)
			}
		})
	}
}

func TestTaskCancelAsksTheTaskToStop(t *testing.T) {
	w := newWorld(t, short())
	w.add("task", 30, object{"name_label": "work", "status": "pending"})
	expect(t, w.xe("task-cancel", "uuid="+uuid(30)), xetest.Result{})
	if s := w.get(ref(30))["status"]; s != "cancelled" {
		t.Errorf("the task is %v", s)
	}
}

func TestCleaningCommandsAdviseToDestroyTheImage(t *testing.T) {
	for _, cmd := range []struct{ name, call string }{
		{"patch-clean", "pool_patch.clean(" + ref(20) + ")"},
		{"patch-pool-clean", "pool_patch.pool_clean(" + ref(20) + ")"},
		{"patch-clean-on-host", "pool_patch.clean_on_host(" + ref(20) + ", " + ref(1) + ")"},
	} {
		t.Run(cmd.name, func(t *testing.T) {
			w := newWorld(t, short())
			furnish(w)
			got := w.xe(cmd.name, "uuid="+uuid(20), "host-uuid="+uuid(1))
			expect(t, got, xetest.Result{Stderr: cmd.name +
				" is deprecated. A patch lives in a disk image: free its space with 'xe vdi-destroy uuid=" + uuid(4) + "'.\n"})
			if !slices.Contains(w.log(), cmd.call) {
				t.Errorf("calls %q", w.log())
			}
		})
	}
}

func TestFailuresAreExplained(t *testing.T) {
	usage := "\nFor usage run: 'xe help'\n"
	w := newWorld(t, short())
	furnish(w)
	cases := []struct {
		name, args string
		fails      error
		stderr     string
	}{
		{"unknown command", "frobnicate", nil, "Unknown command: frobnicate" + usage},
		{"missing parameter", "patch-apply uuid=x", nil, "Required parameter not found: host-uuid" + usage},
		{"no command", "a=b", nil, "Syntax error: the command name is missing" + usage},
		{"unknown switch", "sr-list -z", nil, `Syntax error: unknown switch "-z"` + usage},
		{"a reference is shown by uuid and name", "patch-pool-apply uuid=" + uuid(20), xapi.NewError(xapi.PatchAlreadyApplied, ref(20)),
			"The host has this patch already.\npatch: " + uuid(20) + " (P11)\n"},
		{"a parameter too many", "patch-pool-apply uuid=" + uuid(20), xapi.NewError(xapi.PatchIsApplied, "why"),
			"A host has this patch, so it cannot be removed.\n<extra>: why\n"},
		{"an unknown code", "patch-pool-apply uuid=" + uuid(20), xapi.NewError("NEW_CODE", ref(1), "b"),
			"Error code: NEW_CODE\nError parameters: " + uuid(1) + " (host one), b\n"},
		{"no code", "patch-pool-apply uuid=" + uuid(20), errPlain("oh"),
			"The server failed in a way it did not expect.\nmessage: oh\n"},
		{"with --trace", "patch-pool-apply --trace uuid=" + uuid(20), xapi.NewError(xapi.CannotFindPatch),
			"The patch is no longer on the server: upload it again.\nRaised CANNOT_FIND_PATCH [  ]\n"},
		{"roles", "patch-pool-apply uuid=" + uuid(20), xapi.NewError(xapi.RBACPermissionDenied, "pool_patch.pool_apply", "no"),
			"Your role does not allow this.\npermission: pool_patch.pool_apply\nmessage: no\n"},
		{"bad size", "vdi-create name-label=x sr-uuid=" + uuid(3) + " virtual-size=4XiB", nil,
			"Error: Failed to parse field 'virtual-size': \"4XiB\" is not a number of bytes (a suffix KiB, MiB, GiB or TiB is understood)\n"},
		{"bad type", "vdi-create name-label=x type=cd virtual-size=1 sr-uuid=" + uuid(3), nil, "Error: Unknown vdi type: cd\n"},
		{"nowhere to copy to", "vdi-copy uuid=" + uuid(4), nil,
			"Error: Give either sr-uuid, to make a new image there, or into-vdi-uuid, to fill an image that exists\n"},
		{"a foreign format", "vdi-import filename=f format=vhd uuid=" + uuid(4), nil, "Error: Format \"vhd\" is not known: the only one is raw\n"},
		{"a delta export", "vdi-export filename=f base=b uuid=" + uuid(4), nil, "Error: Only whole images are exported: leave out base\n"},
		{"a message about nothing", "message-create name=a priority=1 body=c", nil, "Error: Give one of host-uuid, sr-uuid, vdi-uuid or pool-uuid\n"},
		{"a message of no priority", "message-create name=a priority=high body=c pool-uuid=x", nil, "Error: The priority must be a whole number, not \"high\"\n"},
		{"no message", "message-destroy", nil, "Required parameter not found: uuid" + usage},
		{"no class", "event-wait class=vm", nil, "Error: Class 'vm' cannot be waited for\n"},
		{"no field", "event-wait class=vdi nix=1", nil, "Error: key missing: nix\n"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			w.fake.mu.Lock()
			delete(w.fails, "pool_patch.pool_apply")
			if c.fails != nil {
				w.fails["pool_patch.pool_apply"] = c.fails
			}
			w.fake.mu.Unlock()
			expect(t, w.xe(strings.Fields(c.args)...), xetest.Result{Exit: 1, Stderr: c.stderr})
		})
	}
	t.Run("a host that is not the only one", func(t *testing.T) {
		w.add("host", 7, object{"name_label": "two"})
		expect(t, w.xe("sr-create", "name-label=a", "type=file"),
			xetest.Result{Exit: 1, Stderr: "Error: Required parameter not found: host-uuid\n"})
	})
	if n := w.open(); n != 0 {
		t.Errorf("%d sessions were left open", n)
	}
}

type errPlain string

func (e errPlain) Error() string { return string(e) }

func TestLogin(t *testing.T) {
	w := newWorld(t, short())
	furnish(w)
	as := func(user, password string) *xetest.Client {
		c := w.client("host-list", "--minimal")
		c.Args = append(c.Args, "-u", user, "-pw", password)
		return c
	}
	usage := "\nFor usage run: 'xe help'\n"
	t.Run("a bad password", func(t *testing.T) {
		expect(t, w.run(as("root", "wrong")), xetest.Result{Exit: 1, Stderr: "Authentication failed" + usage})
	})
	t.Run("no user", func(t *testing.T) {
		expect(t, w.run(as("", "")), xetest.Result{Exit: 1, Stderr: "Username/password must be specified" + usage})
	})
	t.Run("a host that is not the coordinator", func(t *testing.T) {
		expect(t, w.run(as("slave", "")), xetest.Result{Exit: 1,
			Stderr: "This host is not the coordinator of the pool: ask the host named below.\nMaster IP address: 192.0.2.7\n"})
	})
	t.Run("a session of the caller's is used and left open", func(t *testing.T) {
		s, err := w.LoginLocal(t.Context(), "test")
		if err != nil {
			t.Fatal(err)
		}
		expect(t, w.xe("session_id="+string(s), "host-list", "--minimal"), xetest.Result{Stdout: uuid(1) + "\n"})
		if w.open() != 1 {
			t.Error("the session was closed")
		}
		w.Logout(t.Context(), s)
		got := w.xe("session_id="+string(s), "host-list")
		expect(t, got, xetest.Result{Exit: 1, Stderr: "The session has ended or never was: log in again.\nhandle: " + string(s) + "\n"})
	})
}

func TestHelp(t *testing.T) {
	w := newWorld(t, short())
	t.Run("needs no login", func(t *testing.T) {
		c := w.client("help")
		c.Args = append(c.Args, "-pw", "wrong")
		got := w.run(c)
		if got.Exit != 0 || !strings.Contains(got.Stdout, "Common commands") || !strings.Contains(got.Stdout, "patch-upload") || strings.Contains(got.Stdout, "pbd-plug") {
			t.Errorf("got %+v", got)
		}
	})
	t.Run("--all shows every command", func(t *testing.T) {
		got := w.xe("help", "--all")
		for _, cmd := range []string{"pbd-plug", "patch-param-set", "event-wait", "sm-list"} {
			if !strings.Contains(got.Stdout, cmd) {
				t.Errorf("%s is missing", cmd)
			}
		}
	})
	t.Run("--all --minimal is one line", func(t *testing.T) {
		got := w.xe("help", "--all", "--minimal")
		if strings.Count(got.Stdout, "\n") != 1 || !strings.Contains(got.Stdout, ",patch-apply,") {
			t.Errorf("got %q", got.Stdout)
		}
	})
	t.Run("of one command", func(t *testing.T) {
		expect(t, w.xe("help", "patch-upload"), xetest.Result{Stdout: "" +
			"command name            : patch-upload\n" +
			"        reqd params     : file-name\n" +
			"        optional params : sr-uuid\n" +
			"        description     : Uploads a patch into a disk image on an SR: sr-uuid, or else the pool's default SR.\n\n\n"})
	})
	t.Run("of no command", func(t *testing.T) {
		expect(t, w.xe("help", "nix"), xetest.Result{Stdout: "Unknown command 'nix'\n"})
	})
}

func TestEventWait(t *testing.T) {
	t.Run("an object that matches already", func(t *testing.T) {
		w := newWorld(t, short())
		furnish(w)
		expect(t, w.xe("event-wait", "class=vdi", "name-label=disk"), xetest.Result{})
	})
	t.Run("a later change, also of what is derived", func(t *testing.T) {
		w := newWorld(t, short())
		furnish(w)
		c := w.client("event-wait", "class=task", "name-label=job", "status=/=pending")
		c.Hook = func(s xetest.Step) error {
			if s == xetest.HelloSent {
				w.add("task", 33, object{"name_label": "job", "status": "pending"})
				go w.edit(ref(33), object{"status": "success"})
			}
			return nil
		}
		expect(t, w.run(c), xetest.Result{})
		if s := w.get(ref(33))["status"]; s != "success" {
			t.Errorf("returned while the task was %v", s)
		}
	})
	t.Run("events that were lost are read anew", func(t *testing.T) {
		w := newWorld(t, short())
		furnish(w)
		w.lose = 3
		w.add("task", 33, object{"name_label": "job", "status": "pending"})
		go func() {
			w.until("every token was lost", func() bool {
				w.fake.mu.Lock()
				defer w.fake.mu.Unlock()
				return w.lose < 0
			})
			w.edit(ref(33), object{"status": "success"})
		}()
		expect(t, w.xe("event-wait", "class=task", "name-label=job", "status=success"), xetest.Result{})
	})
}

func TestFilesInDeviceConfig(t *testing.T) {
	w := newWorld(t, short())
	furnish(w)
	w.answers["SR.create"] = ref(3)
	w.file("key", "line one\nline two\n")
	t.Run("the content is sent", func(t *testing.T) {
		expect(t, w.xe("sr-create", "name-label=n", "type=x", "device-config:key-filename=key"), xetest.Result{Stdout: uuid(3) + "\n"})
		want := "SR.create(" + ref(1) + ", {key=line one\nline two\n}, 0, n, , x, , false, {})"
		if !slices.Contains(w.log(), want) {
			t.Errorf("calls %q", w.log())
		}
	})
	t.Run("a file that is not there", func(t *testing.T) {
		expect(t, w.xe("sr-create", "name-label=n", "type=x", "device-config:key-filename=nix"),
			xetest.Result{Exit: 1, Stderr: "Error: File not found: nix\n"})
	})
	t.Run("a file that is too large ends the conversation", func(t *testing.T) {
		w.file("big", strings.Repeat("x", 2<<20))
		got := w.xe("sr-create", "name-label=n", "type=x", "device-config:key-filename=big")
		if got.Exit != 1 || got.Stdout != "" {
			t.Errorf("got %+v", got)
		}
	})
}
