package thincli_test

import (
	"strings"
	"testing"

	"github.com/patchd/patchd/pkg/xenapi/thincli/xetest"
)

// The layout of xe: the first key on the left, the others right-aligned
// four columns behind the longest, two blank lines between records (S1-30).
func TestPatchListLooksAsXeShowsIt(t *testing.T) {
	w := newWorld(t, short())
	furnish(w)
	w.add("pool_patch", 22, object{"name_label": "P12", "name_description": "", "size": "0"})
	want := "" +
		"uuid ( RO)                    : " + uuid(20) + "\n" +
		"              name-label ( RO): P11\n" +
		"        name-description ( RO): Eleventh\n" +
		"                    size ( RO): 1234\n" +
		"                   hosts (SRO): " + uuid(1) + "\n" +
		"    after-apply-guidance (SRO): restartHost, restartXAPI\n" +
		"\n\n" +
		"uuid ( RO)                    : " + uuid(22) + "\n" +
		"              name-label ( RO): P12\n" +
		"        name-description ( RO): \n" +
		"                    size ( RO): 0\n" +
		"                   hosts (SRO): \n" +
		"    after-apply-guidance (SRO): \n" +
		"\n\n"
	expect(t, w.xe("patch-list"), xetest.Result{Stdout: want})
}

func TestListsHaveXesFieldsWidthsAndMarks(t *testing.T) {
	w := newWorld(t, short())
	furnish(w)
	nl := strings.Join
	cases := []struct {
		name string
		args []string
		want []string
	}{
		{"SRs name the one host they are on", []string{"sr-list"}, []string{
			"uuid ( RO)                : " + uuid(3),
			"          name-label ( RW): local",
			"    name-description ( RW): files",
			"                host ( RO): host one",
			"                type ( RO): file",
			"        content-type ( RO): user"}},
		{"VDIs", []string{"vdi-list"}, []string{
			"uuid ( RO)                : " + uuid(4),
			"          name-label ( RW): disk",
			"    name-description ( RW): ",
			"             sr-uuid ( RO): " + uuid(3),
			"        virtual-size ( RO): 4194304",
			"            sharable ( RO): false",
			"           read-only ( RO): false"}},
		{"PBDs", []string{"pbd-list"}, []string{
			"uuid ( RO)                  : " + uuid(5),
			"             host-uuid ( RO): " + uuid(1),
			"               sr-uuid ( RO): " + uuid(3),
			"         device-config (MRO): location: /srv/sr",
			"    currently-attached ( RO): true"}},
		{"hosts", []string{"host-list"}, []string{
			"uuid ( RO)                : " + uuid(1),
			"          name-label ( RW): host one",
			"    name-description ( RW): first"}},
		{"pools", []string{"pool-list"}, []string{
			"uuid ( RO)                : " + uuid(2),
			"          name-label ( RW): the pool",
			"    name-description ( RW): ",
			"              master ( RO): " + uuid(1),
			"          default-SR ( RW): " + uuid(3)}},
		{"tasks", []string{"task-list"}, []string{
			"uuid ( RO)                : " + uuid(30),
			"          name-label ( RO): work",
			"    name-description ( RO): ",
			"              status ( RO): success",
			"            progress ( RO): 1.000"}},
		{"SMs", []string{"sm-list"}, []string{
			"uuid ( RO)                : " + uuid(31),
			"          name-label ( RO): Local files",
			"    name-description ( RO): ",
			"                type ( RO): file",
			"              vendor ( RO): patchd",
			"           copyright ( RO): c",
			"       configuration ( RO): location: where"}},
		{"messages", []string{"message-list"}, []string{
			"uuid ( RO)         : " + uuid(32),
			"         name ( RO): NOTE",
			"     priority ( RO): 3",
			"        class ( RO): Host",
			"     obj-uuid ( RO): " + uuid(1),
			"    timestamp ( RO): 20260102T03:04:05Z",
			"         body ( RO): text"}},
		{"params= picks fields and keeps the record's order", []string{"pool-list", "params=tags,other-config,uuid"}, []string{
			"uuid ( RO)            : " + uuid(2),
			"    other-config (MRW): a: 1; b: 2",
			"            tags (SRW): x, y"}},
		{"expensive fields are not read for lists", []string{"pool-list", "params=supported-sr-types"}, []string{
			"supported-sr-types ( RO)    : <expensive field>"}},
		{"deprecated fields say so", []string{"sm-list", "params=type,capabilities"}, []string{
			"type ( RO)                         : file",
			"    capabilities ( RO) [DEPRECATED]: VDI_CLONE"}},
		{"a null reference is not in the database", []string{"host-list", "params=suspend-image-sr-uuid,memory-total"}, []string{
			"suspend-image-sr-uuid ( RW)    : <not in database>",
			"             memory-total ( RO): <not in database>"}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			got := w.xe(c.args...)
			expect(t, got, xetest.Result{Stdout: nl(c.want, "\n") + "\n\n\n"})
		})
	}
}

func TestFiltersAndMinimal(t *testing.T) {
	w := newWorld(t, short())
	furnish(w)
	w.add("SR", 6, object{"name_label": `a,b\c`, "type": "nfs", "content_type": "user", "PBDs": []any{},
		"other_config": object{"k": "other"}, "tags": []any{"fast", "big"}})
	cases := []struct {
		name, args, want string
	}{
		{"minimal lists the uuids", "sr-list --minimal", uuid(3) + "," + uuid(6)},
		{"a filter", "sr-list type=nfs --minimal", uuid(6)},
		{"two filters", "sr-list type=nfs name-label=x --minimal", ""},
		{"a key of a map", "sr-list other-config:k=other --minimal", uuid(6)},
		{"a key of a map in the old form", "sr-list other-config-k=other --minimal", uuid(6)},
		{"a member of a set", "sr-list tags:contains=big --minimal", uuid(6)},
		{"a derived field", "sr-list host=host@one --minimal", uuid(3)},
		{"commas and backslashes are escaped", "sr-list uuid=" + uuid(6) + " params=name-label --minimal", `a\,b\\c`},
		{"--all shows what does not match", "sr-list type=nfs --all --minimal", uuid(3) + "," + uuid(6)},
		{"database: is not a filter", "sr-list database:vdi-uuid=x --minimal", uuid(3) + "," + uuid(6)},
		{"minimal param-get", "patch-param-get uuid=" + uuid(20) + " param-name=hosts --minimal", uuid(1)},
		{"nothing to say is an empty line", "pbd-plug uuid=" + uuid(5) + " --minimal", ""},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			args := strings.Fields(c.args)
			for i := range args {
				args[i] = strings.ReplaceAll(args[i], "@", " ")
			}
			expect(t, w.xe(args...), xetest.Result{Stdout: c.want + "\n"})
		})
	}
	t.Run("no match prints nothing", func(t *testing.T) {
		expect(t, w.xe("sr-list", "type=none"), xetest.Result{})
	})
	t.Run("an unknown field", func(t *testing.T) {
		expect(t, w.xe("sr-list", "typ=nfs"), xetest.Result{Exit: 1, Stderr: "Error: Unknown field 'typ'\n"})
	})
	t.Run("shared SRs have no one host", func(t *testing.T) {
		w.edit(ref(6), object{"PBDs": []any{ref(5), ref(50)}})
		expect(t, w.xe("sr-list", "uuid="+uuid(6), "params=host"), xetest.Result{Stdout: "host ( RO)    : <shared>\n\n\n"})
	})
	t.Run("a dangling reference", func(t *testing.T) {
		w.edit(ref(20), object{"host_patches": []any{ref(99)}})
		expect(t, w.xe("patch-param-get", "uuid="+uuid(20), "param-name=hosts"), xetest.Result{Stdout: "<invalid reference>\n"})
	})
}

func TestParams(t *testing.T) {
	w := newWorld(t, short())
	furnish(w)
	fail := func(text string) xetest.Result { return xetest.Result{Exit: 1, Stderr: "Error: " + text + "\n"} }
	ok := xetest.Result{}
	cases := []struct {
		name, args string
		want       xetest.Result
		call       string
	}{
		{"get", "sr-param-get param-name=name-label uuid=" + uuid(3), xetest.Result{Stdout: "local\n"}, ""},
		{"get a key", "sr-param-get param-name=other-config param-key=k uuid=" + uuid(3), xetest.Result{Stdout: "v,w\n"}, ""},
		{"get a missing key", "sr-param-get param-name=other-config param-key=z uuid=" + uuid(3), fail("Key z not found in map"), ""},
		{"get a missing field", "sr-param-get param-name=nix uuid=" + uuid(3),
			xetest.Result{Exit: 1, Stderr: "Error code: Missing parameter\nError parameters: nix\n"}, ""},
		{"set", "pool-param-set name-label=p2 uuid=" + uuid(2), ok, "pool.set_name_label(" + ref(2) + ", p2)"},
		{"set the default SR", "pool-param-set default-SR=" + uuid(3) + " uuid=" + uuid(2), ok, "pool.set_default_SR(" + ref(2) + ", " + ref(3) + ")"},
		{"clear the default SR", "pool-param-clear param-name=default-SR uuid=" + uuid(2), ok, "pool.set_default_SR(" + ref(2) + ", OpaqueRef:NULL)"},
		{"set a bool", "sr-param-set shared=T uuid=" + uuid(3), ok, "SR.set_shared(" + ref(3) + ", true)"},
		{"set a bad bool", "sr-param-set shared=maybe uuid=" + uuid(3), fail("Failed to parse parameter 'shared': it must be 'true' or 'false'"), ""},
		{"set a new key", "patch-param-set other-config:n=1 uuid=" + uuid(20), ok, "pool_patch.add_to_other_config(" + ref(20) + ", n, 1)"},
		{"set a key again", "patch-param-set other-config:n=2 uuid=" + uuid(20), ok, "pool_patch.remove_from_other_config(" + ref(20) + ", n)"},
		{"set what is read-only", "patch-param-set size=1 uuid=" + uuid(20), fail("Field 'size' is read-only"), ""},
		{"set a whole map", "sr-param-set other-config=1 uuid=" + uuid(3), fail("Field 'other-config' is a map or set: use other-config:key=value, or param-add"), ""},
		{"set a set", "sr-param-set tags:x=1 uuid=" + uuid(3), fail("Members of the set 'tags' are changed by param-add and param-remove"), ""},
		{"set part of a plain field", "sr-param-set type:x=1 uuid=" + uuid(3), fail("Field 'type' is not a set or map"), ""},
		{"add to a map", "vdi-param-add param-name=other-config a=1 uuid=" + uuid(4), ok, "VDI.add_to_other_config(" + ref(4) + ", a, 1)"},
		{"add to a set", "sr-param-add param-name=tags param-key=new uuid=" + uuid(3), ok, "SR.add_tags(" + ref(3) + ", new)"},
		{"add to a set without key", "sr-param-add param-name=tags uuid=" + uuid(3), fail("To add to a set, give param-name=tags param-key=<member>"), ""},
		{"add to a scalar", "sr-param-add param-name=type uuid=" + uuid(3), fail("Field 'type' is neither a set nor a map"), ""},
		{"add to what is read-only", "pbd-param-add param-name=device-config a=b uuid=" + uuid(5), fail("Field 'device-config' is read-only"), ""},
		{"remove from a map", "pool-param-remove param-name=other-config param-key=a uuid=" + uuid(2), ok, "pool.remove_from_other_config(" + ref(2) + ", a)"},
		{"remove a missing key", "pool-param-remove param-name=other-config param-key=zz uuid=" + uuid(2), fail("Key zz is not in map"), ""},
		{"remove from a set", "pool-param-remove param-name=tags param-key=x uuid=" + uuid(2), ok, "pool.remove_tags(" + ref(2) + ", x)"},
		{"remove a missing member", "pool-param-remove param-name=tags param-key=zz uuid=" + uuid(2), fail("Key zz is not in the set"), ""},
		{"clear a map", "pool-param-clear param-name=other-config uuid=" + uuid(2), ok, "pool.remove_from_other_config(" + ref(2) + ", b)"},
		{"clear what is read-only", "pool-param-clear param-name=uuid uuid=" + uuid(2), fail("Field 'uuid' is read-only"), ""},
		{"an unknown object", "sr-param-list uuid=" + uuid(77), xetest.Result{Exit: 1,
			Stderr: "There is no object with this uuid.\ntype: SR\nuuid: " + uuid(77) + "\n"}, ""},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			expect(t, w.xe(strings.Fields(c.args)...), c.want)
			if calls := strings.Join(w.log(), "\n"); c.call != "" && !strings.Contains(calls, c.call) {
				t.Errorf("no call %s in\n%s", c.call, calls)
			}
		})
	}
	t.Run("list shows every field", func(t *testing.T) {
		got := w.xe("patch-param-list", "uuid="+uuid(20))
		if !strings.HasPrefix(got.Stdout, "uuid ( RO)                    : "+uuid(20)+"\n") ||
			!strings.Contains(got.Stdout, "                vdi-uuid ( RO): "+uuid(4)+"\n            other-config (MRW): n: 2\n\n\n") {
			t.Errorf("got\n%s", got.Stdout)
		}
	})
	if n := w.open(); n != 0 {
		t.Errorf("%d sessions were left open", n)
	}
}
