package integration

import (
	"crypto/tls"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/patchd/patchd/integration/lab"
	"github.com/patchd/patchd/pkg/xenapi/thincli/xetest"
)

// xe is the administrator's command line against a host. Debian has no package
// of it (its xe is an editor), so it is played by a client that behaves on the
// wire as the program does.
type xe struct {
	h        *lab.Host
	dir      string
	tls      bool
	user, pw string
	// names replaces uuids and numbers that differ from run to run.
	names []string
}

func (x *xe) run(args ...string) xetest.Result {
	x.h.T.Helper()
	c := xetest.Client{Dir: x.dir, TLS: &tls.Config{InsecureSkipVerify: true}}
	base, ssl := x.h.URL, []string{"--nossl"}
	if x.tls {
		base, ssl = x.h.TLSURL, nil
	}
	u, err := url.Parse(base)
	if err != nil {
		x.h.T.Fatal(err)
	}
	c.Args = append(append(args, "-s", x.h.IP, "-p", u.Port(), "-u", x.user, "-pw", x.pw), ssl...)
	res, err := c.Run(x.h.T.Context())
	if err != nil {
		x.h.T.Fatal(err)
	}
	return res
}

// ok runs a command that must succeed and say nothing on stderr, but for what
// notice allows.
func (x *xe) ok(args ...string) string {
	x.h.T.Helper()
	res := x.run(args...)
	if res.Exit != 0 || res.Stderr != "" {
		x.h.T.Errorf("xe %s: %+v", strings.Join(args, " "), res)
	}
	return res.Stdout
}

// shows compares what a command prints, with the names for what differs.
func (x *xe) shows(want string, args ...string) {
	x.h.T.Helper()
	if got := strings.NewReplacer(x.names...).Replace(x.ok(args...)); got != want {
		x.h.T.Errorf("xe %s printed\n%s\nwant\n%s", strings.Join(args, " "), got, want)
	}
}

// refused runs a command that must fail, and compares its stderr.
func (x *xe) refused(want string, args ...string) {
	x.h.T.Helper()
	res := x.run(args...)
	if got := strings.NewReplacer(x.names...).Replace(res.Stderr); res.Exit != 1 || got != want {
		x.h.T.Errorf("xe %s: exit %d\n%s\nwant\n%s", strings.Join(args, " "), res.Exit, got, want)
	}
}

// upload writes a patch into the client's folder and uploads it from there.
func (x *xe) upload(name string) string {
	x.h.T.Helper()
	p := clientPatches(x.h.T, name)[name]
	if err := os.WriteFile(filepath.Join(x.dir, name), p.signed, 0o600); err != nil {
		x.h.T.Fatal(err)
	}
	if out := x.ok("patch-upload", "file-name="+name); out != p.UUID+"\n" {
		x.h.T.Errorf("patch-upload printed %q", out)
	}
	return p.UUID
}

// A4: xe does everything with patches, in the clear and over TLS.
func TestA4_Xe(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	for name, encrypted := range map[string]bool{"plain": false, "TLS": true} {
		t.Run(name, func(t *testing.T) {
			x := &xe{h: h, dir: t.TempDir(), tls: encrypted, user: "root", pw: lab.Password}
			x.patches(name)
		})
	}
}

func (x *xe) patches(label string) {
	host, sr := strings.TrimSpace(x.ok("host-list", "--minimal")), strings.TrimSpace(x.ok("sr-list", "--minimal"))
	first, second := "first-"+label, "second-"+label
	one, two := x.upload(first), x.upload(second)
	field := func(uuid, name string) string {
		return strings.TrimSpace(x.ok("patch-param-get", "uuid="+uuid, "param-name="+name))
	}
	size, vdi1, vdi2 := field(one, "size"), field(one, "vdi-uuid"), field(two, "vdi-uuid")
	x.names = []string{host, "HOST", sr, "SR", one, "ONE", two, "TWO", ": " + size, ": SIZE", vdi1, "VDI1", vdi2, "VDI2", first, "FIRST", second, "SECOND"}

	record := "uuid ( RO)                    : ONE\n" +
		"              name-label ( RO): client FIRST\n" +
		"        name-description ( RO): made by the lab\n" +
		"                    size ( RO): SIZE\n" +
		"                   hosts (SRO): \n" +
		"    after-apply-guidance (SRO): restartHVM, restartXAPI\n"
	x.shows(record+"\n\n", "patch-list", "uuid="+one)
	all := record + "                vdi-uuid ( RO): VDI1\n            other-config (MRW): \n\n\n"
	x.shows(all, "patch-list", "uuid="+one, "params=all")
	x.shows(all, "patch-param-list", "uuid="+one)
	x.shows("client SECOND\n", "patch-list", "--minimal", "params=name-label", "uuid="+two)

	x.shows("checked <ok> & \"fine\"\n\n", "patch-precheck", "uuid="+one, "host-uuid="+host)
	x.shows("applied FIRST\n\n", "patch-apply", "uuid="+one, "host-uuid="+host)
	x.refused("The host has this patch already.\npatch: ONE (client FIRST)\n", "patch-apply", "uuid="+one, "host-uuid="+host)
	x.refused("A host has this patch, so it cannot be removed.\n", "patch-destroy", "uuid="+one)
	x.shows("", "patch-pool-apply", "uuid="+one)
	x.shows("HOST\n", "patch-param-get", "uuid="+one, "param-name=hosts")
	x.storage(vdi1, vdi2)
	x.cleaning(one, two, vdi2)
}

// storage lists what holds the patches and frees the first one's image.
func (x *xe) storage(vdi1, vdi2 string) {
	x.shows("uuid ( RO)                : SR\n"+
		"          name-label ( RW): Local storage\n"+
		"    name-description ( RW): made at the first start\n"+
		"                host ( RO): "+x.hostname()+"\n"+
		"                type ( RO): file\n"+
		"        content-type ( RO): user\n\n\n", "sr-list")
	x.shows("uuid ( RO)                : HOST\n"+
		"          name-label ( RW): "+x.hostname()+"\n"+
		"    name-description ( RW): \n\n\n", "host-list")
	x.shows("uuid ( RO)                : VDI1\n"+
		"          name-label ( RW): Patch client FIRST\n"+
		"    name-description ( RW): made by the lab\n"+
		"             sr-uuid ( RO): SR\n"+
		"        virtual-size ( RO): 4194304\n"+
		"            sharable ( RO): false\n"+
		"           read-only ( RO): true\n\n\n", "vdi-list", "uuid="+vdi1)
	x.shows("", "vdi-destroy", "uuid="+vdi1)
	x.shows("\n", "vdi-list", "uuid="+vdi1, "--minimal")
	x.shows("VDI2\n", "vdi-list", "uuid="+vdi2, "--minimal")
}

func (x *xe) hostname() string {
	return strings.TrimSpace(x.ok("host-list", "params=name-label", "--minimal"))
}

// cleaning ends the second patch's life; the first stays, for the host has it.
func (x *xe) cleaning(one, two, vdi2 string) {
	for _, command := range []string{"patch-clean", "patch-pool-clean"} {
		res := x.run(command, "uuid="+two)
		notice := command + " is deprecated. A patch lives in a disk image: free its space with 'xe vdi-destroy uuid=" + vdi2 + "'.\n"
		if res.Exit != 0 || res.Stdout != "" || res.Stderr != notice {
			x.h.T.Errorf("%s: %+v", command, res)
		}
	}
	x.shows("<not in database>\n", "patch-param-get", "uuid="+two, "param-name=vdi-uuid")
	x.shows("", "patch-destroy", "uuid="+two)
	x.refused("There is no object with this uuid.\ntype: pool_patch\nuuid: TWO\n", "patch-destroy", "uuid="+two)
	x.shows("ONE\n", "patch-list", "--minimal", "uuid="+one)
	x.shows("", "task-list")
}

// A4, the other side of it: what is refused, and by whom.
func TestA4_XeIsRefused(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	x := &xe{h: h, dir: t.TempDir(), user: "root", pw: lab.Password}
	x.refused("Operation failed. Error: file 'nope' does not exist\n", "patch-upload", "file-name=nope")
	if err := os.WriteFile(filepath.Join(x.dir, "bad"), []byte("#!/bin/sh\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if res := x.run("patch-upload", "file-name=bad"); res.Exit != 1 || res.Stdout != "" || res.Stderr == "" {
		t.Errorf("a file without a signature: %+v", res)
	}
	x.refused("Unknown command: patch-frobnicate\nFor usage run: 'xe help'\n", "patch-frobnicate")
	x.refused("Required parameter not found: host-uuid\nFor usage run: 'xe help'\n", "patch-apply", "uuid=x")
	x.shows("", "task-list")
	x.shows("\n", "vdi-list", "--minimal")

	if _, errs, code := h.CLIInput("reader password\n", "user", "add", "reader", "--role", "read-only"); code != 0 {
		t.Fatalf("user add: %s", errs)
	}
	one := x.upload("one")
	reader := &xe{h: h, dir: x.dir, user: "reader", pw: "reader password"}
	reader.shows(one+"\n", "patch-list", "--minimal")
	for _, args := range [][]string{{"patch-upload", "file-name=one"}, {"patch-pool-apply", "uuid=" + one}, {"patch-destroy", "uuid=" + one}} {
		if res := reader.run(args...); res.Exit != 1 || !strings.HasPrefix(res.Stderr, "Your role does not allow this.\n") {
			t.Errorf("xe %v by a reader: %+v", args, res)
		}
	}
	stranger := &xe{h: h, user: "root", pw: "wrong"}
	stranger.refused("Authentication failed\nFor usage run: 'xe help'\n", "patch-list")
}
