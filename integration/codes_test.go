package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/patchd/patchd/integration/lab"
	"github.com/patchd/patchd/pkg/xapi"
)

// say is shell that prints a text as it is and exits.
func say(text string, exit int) string {
	return fmt.Sprintf("printf '%%s' '%s'; exit %d", text, exit)
}

// A6, the first table (S1-36): the error XML of precheck gives exactly these
// errors, from precheck and from apply alike.
func TestA6_PrecheckErrors(t *testing.T) {
	t.Parallel()
	s := lab.Start(t, lab.Options{}).Root()
	a, b := "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
	found := `<found>5</found><required>[6]\..*</required>`
	cases := []struct {
		code, body string
		params     []string // after the patch's ref
	}{
		{"UNKNOWN_ERROR", `<info>it is &lt;odd&gt;</info>`, []string{"it is <odd>"}},
		{"ISO_MOUNTED", `<info>tools.iso</info>`, []string{"tools.iso"}},
		{"PREREQUISITE_MISSING", `<prerequisite uuid="` + a + `"/><prerequisite uuid="` + b + `"/>`, []string{a + ";" + b}},
		{"CONFLICT_PRESENT", `<conflict uuid="` + a + `"/>`, []string{a}},
		{"WRONG_SERVER_VERSION", found, []string{"5", `[6]\..*`}},
		{"WRONG_SERVER_BUILD", found, []string{"5", `[6]\..*`}},
		{"VM_RUNNING", ``, nil},
		{"OUT_OF_SPACE", `<found>5</found><required>60000000000</required>`, []string{"5", "60000000000"}},
		{"GPGKEY_NOT_IMPORTED", ``, nil},
	}
	for _, c := range cases {
		code := "PATCH_PRECHECK_FAILED_" + c.code
		p := s.MustUpload(&lab.Patch{Precheck: say(`<error errorcode="`+code+`">`+c.body+`</error>`, 1), Apply: "exit 77"})
		_, err := precheck(s, p)
		wantCode(t, err, code, append([]string{p}, c.params...)...)
		_, err = apply(s, p)
		wantCode(t, err, code, append([]string{p}, c.params...)...)
	}
	p := s.MustUpload(&lab.Patch{Precheck: say(`<error errorcode="LICENCE_RESTRICTION"><feature>hotfix</feature></error>`, 1)})
	_, err := precheck(s, p)
	wantCode(t, err, "LICENCE_RESTRICTION", "hotfix")
	if n := len(s.All("host_patch")); n != 0 {
		t.Errorf("%d host_patches after refused applies", n)
	}
}

// Other exit statuses, and XML that does not match to the letter.
func TestA6_S1_36_PrecheckThatSaysNonsense(t *testing.T) {
	t.Parallel()
	s := lab.Start(t, lab.Options{}).Root()
	for _, exit := range []int{2, 3, 127, 255} {
		p := s.MustUpload(&lab.Patch{Precheck: "echo out; echo err >&2; exit " + fmt.Sprint(exit)})
		_, err := precheck(s, p)
		params := hasCode(t, err, "PATCH_PRECHECK_FAILED_UNKNOWN_ERROR")
		if len(params) != 2 || params[0] != p || !strings.HasPrefix(params[1], "Error running prechecks on patch "+p+": ") ||
			!strings.Contains(params[1], "out") || !strings.Contains(params[1], "err") {
			t.Errorf("exit %d: %q", exit, params)
		}
	}
	for _, xml := range []string{
		"", "no xml", `<error/>`, `<error errorcode="SOMETHING_ELSE"/>`,
		`<error errorcode="PATCH_PRECHECK_FAILED_VM_RUNNING" more="1"/>`,
		`<error errorcode="PATCH_PRECHECK_FAILED_VM_RUNNING"><info>x</info></error>`,
		`<error errorcode="PATCH_PRECHECK_FAILED_UNKNOWN_ERROR">text<info>x</info></error>`,
		`<error errorcode="PATCH_PRECHECK_FAILED_WRONG_SERVER_VERSION"><found>1</found></error>`,
		`<warning errorcode="PATCH_PRECHECK_FAILED_VM_RUNNING"/>`,
		`<!DOCTYPE x [<!ENTITY a "b">]><error errorcode="PATCH_PRECHECK_FAILED_VM_RUNNING"/>`,
	} {
		p := s.MustUpload(&lab.Patch{Precheck: say(xml, 1)})
		_, err := precheck(s, p)
		if params := hasCode(t, err, "INVALID_PATCH_WITH_LOG"); len(params) != 1 {
			t.Errorf("%s: %q", xml, params)
		}
	}
}

// A6, the second table: what an upload can be refused with.
func TestA6_UploadErrors(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	good := &lab.Patch{Pad: 1000}
	s.MustUpload(good)
	wantCode(t, uploadErr(s, good.Signed(t)), "PATCH_ALREADY_EXISTS", string(good.UUID))
	upper := &lab.Patch{UUID: xapi.UUID(strings.ToUpper(string(good.UUID)))}
	wantCode(t, uploadErr(s, upper.Signed(t)), "PATCH_ALREADY_EXISTS", string(good.UUID))

	fresh := func() []byte { return (&lab.Patch{Pad: 5000}).Signed(t) }
	signed := fresh()
	flipped := fresh()
	flipped[len(flipped)/2] ^= 4
	stranger := lab.NewKey(t, "Stranger <s@example.test>")
	for what, b := range map[string][]byte{
		"unsigned": (&lab.Patch{}).Payload(), "stranger": stranger.Sign(t, (&lab.Patch{}).Payload()), "one byte": {0x90},
		"truncated": signed[:len(signed)-1], "half": signed[:len(signed)/2], "lengthened": append(fresh(), 0), "doubled": append(fresh(), fresh()...),
		"bit flipped": flipped, "zeros": make([]byte, 100_000), "text": []byte("hello"), "a newline": []byte("\n"),
	} {
		err := uploadErr(s, b)
		t.Run(what, func(t *testing.T) { wantCode(t, err, "INVALID_PATCH") })
	}
	wantCode(t, uploadErr(s, (&lab.Patch{InfoScript: "exit 2"}).Signed(t)), "INVALID_PATCH_WITH_LOG", "Bad line endings?")
	params := hasCode(t, uploadErr(s, (&lab.Patch{InfoScript: "echo oops >&2; exit 5"}).Signed(t)), "INVALID_PATCH")
	if len(params) != 1 || !strings.Contains(params[0], "oops") {
		t.Errorf("%q", params)
	}
}

// S1-34, S1-35: `info` is read strictly; each refusal is INVALID_PATCH [text].
func TestA6_S1_34_InfoThatIsWrong(t *testing.T) {
	t.Parallel()
	s := lab.Start(t, lab.Options{}).Root()
	uuid := string(xapi.NewUUID())
	all := map[string]string{"uuid": uuid, "version": "1", "name-label": "l", "name-description": "d", "after-apply-guidance": ""}
	element := func(leave, extra string) string {
		b := "<info"
		for k, v := range all {
			if k != leave {
				b += fmt.Sprintf(" %s=%q", k, v)
			}
		}
		return b + " " + extra + "/>"
	}
	cases := map[string]string{
		"not a uuid": element("uuid", `uuid="../../etc/passwd"`), "empty uuid": element("uuid", `uuid=""`),
		"unknown guidance": element("after-apply-guidance", `after-apply-guidance="restartHost restartMoon"`),
		"empty label":      element("name-label", `name-label=""`),
		"not closed":       strings.TrimSuffix(element("", ""), "/>") + ">", "two roots": element("", "") + element("", ""),
		"other root": "<inf0 " + element("", "")[5:], "empty": " ", "no xml": "all is well", "entities": `<!DOCTYPE i [<!ENTITY a "aaaaaaaa">]>` + element("", ""),
		"huge": element("name-description", `name-description="`+strings.Repeat("x", 100_000)+`"`), "NUL": element("version", "version=\"&#0;\""),
	}
	for name := range all {
		cases["without "+name] = element(name, "")
		cases["twice "+name] = element("", fmt.Sprintf("%s=%q", name, all[name]))
	}
	for what, xml := range cases {
		err := uploadErr(s, (&lab.Patch{Info: xml}).Signed(t))
		t.Run(what, func(t *testing.T) {
			if params := hasCode(t, err, "INVALID_PATCH"); len(params) != 1 || params[0] == "" {
				t.Errorf("%q", params)
			}
		})
	}
	if n := len(s.All("pool_patch")); n != 0 {
		t.Errorf("%d patches", n)
	}
}

// A6: what apply, precheck, pool_apply, destroy (S1-38) and host_patch.apply
// raise.
func TestA6_ApplyErrors(t *testing.T) {
	t.Parallel()
	s := lab.Start(t, lab.Options{}).Root()
	p := s.MustUpload(&lab.Patch{Apply: "echo before; echo boom >&2; exit 9"})
	_, err := apply(s, p)
	if params := hasCode(t, err, "PATCH_APPLY_FAILED"); len(params) != 1 || strings.TrimSpace(params[0]) != "before\nboom" {
		t.Errorf("%q", params)
	}
	backup := `<error errorcode="PATCH_PRECHECK_FAILED_UNKNOWN_ERROR"><info>Backup files already present: /a</info></error>`
	_, err = apply(s, s.MustUpload(&lab.Patch{Apply: say(backup, 1)}))
	wantCode(t, err, "PATCH_APPLY_FAILED_BACKUP_FILES_EXIST", "Backup files already present: /a")
	_, err = s.Try("pool_patch.pool_apply", s.MustUpload(&lab.Patch{Apply: say(backup, 3)}))
	wantCode(t, err, "PATCH_APPLY_FAILED_BACKUP_FILES_EXIST", "Backup files already present: /a")
	_, err = apply(s, s.MustUpload(&lab.Patch{Apply: say("Backup files already present", 1)}))
	wantCode(t, err, "PATCH_APPLY_FAILED", "Backup files already present")

	good := s.MustUpload(&lab.Patch{Apply: "echo done"})
	if out, err := apply(s, good); err != nil || out != "done\n" {
		t.Errorf("%q %v", out, err)
	}
	_, err = apply(s, good)
	wantCode(t, err, "PATCH_ALREADY_APPLIED", good)
	if _, err := s.Try("pool_patch.pool_apply", good); err != nil {
		t.Errorf("pool_apply with nothing left to do: %v", err)
	}
	_, err = s.Try("pool_patch.destroy", good) // S1-38
	wantCode(t, err, "PATCH_IS_APPLIED")
	hp, _ := s.One("host_patch")
	_, err = s.Try("host_patch.apply", hp)
	wantCode(t, err, "MESSAGE_DEPRECATED")

	cleaned := s.MustUpload(&lab.Patch{})
	s.Call("pool_patch.pool_clean", cleaned)
	_, err = apply(s, cleaned)
	wantCode(t, err, "CANNOT_FIND_PATCH")
	_, err = precheck(s, cleaned)
	wantCode(t, err, "CANNOT_FIND_PATCH")
	_, err = s.Try("pool_patch.pool_apply", cleaned)
	wantCode(t, err, "CANNOT_FIND_PATCH")

	_, err = s.Try("pool_patch.apply", "OpaqueRef:nothing", s.Host())
	wantCode(t, err, "HANDLE_INVALID", "pool_patch", "OpaqueRef:nothing")
	_, err = s.Try("pool_patch.apply", p, nullRef)
	wantCode(t, err, "HANDLE_INVALID", "host", nullRef)
	_, err = s.Try("pool_patch.apply", p)
	wantCode(t, err, "MESSAGE_PARAMETER_COUNT_MISMATCH", "pool_patch.apply", "2", "1")
}

// A6: a classic file that is there but cannot be had.
func TestA6_CannotFetchPatch(t *testing.T) {
	t.Parallel()
	h := lab.Prepare(t, lab.Options{Binary: lab.FaultBinary(t), Env: []string{"PATCHD_FAULT=fail@agent.fetch"}})
	p := &lab.Patch{}
	putClassic(t, h, "hotfix.xsupdate", lab.DefaultKey(t).GPG(t, p.Payload(), "--clearsign"))
	h.Up()
	s := h.Root()
	ref, _ := s.One("pool_patch")
	_, err := apply(s, ref)
	wantCode(t, err, "CANNOT_FETCH_PATCH", string(p.UUID))
	_, err = precheck(s, ref)
	wantCode(t, err, "CANNOT_FETCH_PATCH", string(p.UUID))
}

// A6: an SR without room, told before the first byte of the body and by name.
func TestA6_OutOfSpace(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{Dir: ext4FS(t, 700*mib)})
	s := h.Root()
	_, sr := s.One("SR")
	where := fmt.Sprintf("%s (%s)", sr["name_label"], sr["uuid"])
	err := refused(s, func() lab.Answer {
		a := rawPut(t, h, "/pool_patch_upload?session_id="+s.Ref, 2*gib, nil)
		if a.Status != 507 {
			t.Errorf("status %d", a.Status)
		}
		return a
	})
	wantCode(t, err, "OUT_OF_SPACE", where)
	task := s.Call("task.create", "upload", "").(string)
	a := rawPut(t, h, "/pool_patch_upload?session_id="+s.Ref+"&task_id="+task, 2*gib, nil)
	rec := s.Wait(task)
	if a.Status != 200 || fmt.Sprint(rec["error_info"]) != fmt.Sprint([]string{"OUT_OF_SPACE", where}) {
		t.Errorf("%d, %v", a.Status, rec)
	}
	// Full in mid-stream: without a length nobody can know before.
	err = refused(s, func() lab.Answer {
		a, err := s.Put("/pool_patch_upload", nil, noise(t, 700*mib), -1)
		if err != nil {
			t.Fatal(err)
		}
		return a
	})
	wantCode(t, err, "OUT_OF_SPACE", where)
	if n := free(t, h.StateDir); n < 200*mib {
		t.Errorf("%d bytes are free", n)
	}
}

// putClassic lays a signed file into the patch-dir, as an upgrade finds it.
func putClassic(t testing.TB, h *lab.Host, name string, signed []byte) {
	t.Helper()
	if err := os.MkdirAll(h.PatchDir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(h.PatchDir, name), signed, 0o440); err != nil {
		t.Fatal(err)
	}
}
