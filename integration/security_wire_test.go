package integration

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
	"github.com/patchd/patchd/pkg/xapi"
)

// hostileBodies are what no honest client sends.
func hostileBodies() map[string]map[string]string {
	xmlCall := func(params string) string {
		return `<?xml version="1.0"?><methodCall><methodName>pool.get_all</methodName><params>` + params + `</params></methodCall>`
	}
	value := func(v string) string { return xmlCall("<param><value>" + v + "</value></param>") }
	jsonCall := func(params string) string {
		return `{"jsonrpc":"2.0","id":1,"method":"pool.get_all","params":` + params + `}`
	}
	lol := `<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">`
	for i := 'b'; i < 'k'; i++ {
		lol += fmt.Sprintf(`<!ENTITY %c "%s">`, i, strings.Repeat(fmt.Sprintf("&%c;", i-1), 10))
	}
	deep := func(open, close string, n int) string { return strings.Repeat(open, n) + strings.Repeat(close, n) }
	return map[string]map[string]string{
		"/RPC2": {
			"nothing": "", "not XML": "\x00\x01\x02", "half": xmlCall("")[:40], "an entity bomb": lol + `]>` + value("&j;"),
			"an outside entity": `<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>` + value("&a;"), "an unknown entity": value("&nbsp;"),
			"a parameter entity": `<!DOCTYPE x [<!ENTITY % a SYSTEM "http://127.0.0.1/x">%a;]>` + value("x"), "depth": value(deep("<array><data><value>", "</value></data></array>", 10_000)),
			"depth without end": xmlCall(strings.Repeat("<param>", 100_000)), "NUL": value("<string>a\x00b</string>"), "NUL as a reference": value("<string>&#0;</string>"),
			"bad UTF-8": value("<string>\xff\xfe</string>"), "overlong UTF-8": value("<string>\xc0\xaf</string>"), "a surrogate": value("<string>\xed\xa0\x80</string>"),
			"UTF-16": "\xff\xfe<\x00?\x00x\x00m\x00l\x00", "a huge int": value("<int>99999999999999999999999</int>"), "a double that is none": value("<double>NaN</double>"),
			"a double beyond": value("<double>1e999</double>"), "two documents": xmlCall("") + xmlCall(""), "attributes": value(`<string a="b">x</string>`),
			"a key twice":    value("<struct><member><name>a</name><value>1</value></member><member><name>a</name><value>2</value></member></struct>"),
			"another method": "<methodResponse/>", "2 MiB": value("<string>" + strings.Repeat("x", 2<<20) + "</string>"), "many values": value("<array><data>" + strings.Repeat("<value/>", 120_000) + "</data></array>"),
			"a long name": `<methodCall><methodName>` + strings.Repeat("m", 500_000) + `</methodName></methodCall>x`, "an encoding": `<?xml version="1.0" encoding="UTF-7"?>+ADw-x/+AD4-`,
		},
		"/jsonrpc": {
			"nothing": "", "null": "null", "not JSON": "{", "a batch": "[" + jsonCall("[]") + "]", "depth": jsonCall(deep("[", "]", 100_000)), "depth without end": strings.Repeat(`{"a":`, 100_000),
			"bad UTF-8": jsonCall("[\"\xff\"]"), "a key twice": `{"id":1,"method":"pool.get_all","method":"pool.get_all","params":[]}`, "a huge number": jsonCall("[1e999]"),
			"two values": jsonCall("[]") + jsonCall("[]"), "2 MiB": jsonCall(`["` + strings.Repeat("x", 2<<20) + `"]`), "many values": jsonCall("[" + strings.Repeat("0,", 120_000) + "0]"),
			"no id": `{"method":"pool.get_all","params":[]}`, "an id that is a list": `{"id":[],"method":"pool.get_all","params":[]}`, "a comment": `/**/` + jsonCall("[]"),
			"a byte order mark": "\xef\xbb\xbf" + jsonCall("[]"), "params that are a text": jsonCall(`"x"`), "another version": `{"jsonrpc":"3.0","id":1,"method":"x","params":[]}`,
		},
	}
}

// TestSecurity_hostile_bodies: each is refused by HTTP, in short words that
// repeat nothing of it, and costs little.
func TestSecurity_hostile_bodies(t *testing.T) {
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	before := len(s.All("task"))
	for path, bodies := range hostileBodies() {
		for name, body := range bodies {
			began := time.Now()
			res, err := http.Post(h.URL+path, "text/xml", strings.NewReader(body))
			if err != nil {
				if len(body) < 2<<20 { // a body that is too long may be cut off
					t.Errorf("%s, %s: %v", path, name, err)
				}
				continue
			}
			var b bytes.Buffer
			b.ReadFrom(res.Body)
			res.Body.Close()
			if res.StatusCode != http.StatusInternalServerError && res.StatusCode != http.StatusRequestEntityTooLarge || b.Len() > 300 || bytes.Contains(b.Bytes(), []byte("goroutine")) {
				t.Errorf("%s, %s: %d %.400s", path, name, res.StatusCode, b.Bytes())
			}
			if took := time.Since(began); took > 2*time.Second {
				t.Errorf("%s, %s: answered after %s", path, name, took)
			}
		}
	}
	if n := len(s.All("task")); n != before {
		t.Errorf("%d tasks where %d were", n, before)
	}
	if n := rss(t, h.Pid()); n > 200*mib {
		t.Errorf("the daemon holds %d MiB", n>>20)
	}
}

// pathTricks are forms of a path that leads out of its folder.
func pathTricks() (forms []string) {
	for _, dots := range []string{"..", "%2e%2e", ".%2e", "%252e%252e", "..;", "..%00", "%c0%ae%c0%ae", "...", "..%20", "%uff0e%uff0e"} {
		for _, slash := range []string{"/", "\\", "%2f", "%2F", "%5c", "%252f", "%c0%af", "%e0%80%af", "//", "/./"} {
			for _, n := range []int{1, 4, 12} {
				forms = append(forms, strings.Repeat(dots+slash, n)+"etc/passwd")
			}
		}
	}
	for _, p := range []string{"/etc/passwd", "//etc/passwd", "file:///etc/passwd", "\\\\host\\x", "C:\\x", "~root/.ssh/id", "/proc/self/environ", "/proc/self/fd/3", "/dev/zero", ".", "..", "/", "-", "--help", "*", "?", "$(id)", "`id`", "a\nb", strings.Repeat("a/", 3000), strings.Repeat("a", 5000)} {
		for _, end := range []string{"", "%00", "%00.img", "/", "#", "%0a"} {
			forms = append(forms, p+end)
		}
	}
	return forms
}

// TestSecurity_T13_paths puts each form into each place that could become a
// path. Nothing outside is read or written, and who is not known gets 401.
func TestSecurity_T13_paths(t *testing.T) {
	dir := t.TempDir()
	h := lab.Start(t, lab.Options{Dir: dir})
	s := h.Root()
	ref := s.MustUpload(&lab.Patch{})
	secret := "root:x:0"
	if err := os.MkdirAll(h.PatchDir, 0o755); err != nil {
		t.Fatal(err)
	}
	tree := func() (files []string) {
		filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && !strings.Contains(path, "/db/") && filepath.Base(path) != "wal" {
				files = append(files, path)
			}
			return nil
		})
		return files
	}
	before := tree()
	forms := pathTricks()
	if len(forms) < 300 {
		t.Fatalf("only %d forms", len(forms))
	}
	type request struct{ what, head string }
	var requests []request
	add := func(what, method, target, cookie string) {
		clean := strings.NewReplacer(" ", "%20", "\n", "%0a", "\r", "%0d").Replace(target)
		requests = append(requests, request{what, fmt.Sprintf("%s %s HTTP/1.1\r\nHost: x\r\n%sContent-Length: 0\r\nConnection: close\r\n\r\n", method, clean, cookie)})
	}
	login := "Cookie: session_id=" + s.Ref + "\r\n"
	for i, f := range forms {
		add("path", "GET", "/pool_patch_download/"+f, login)
		add("path", "GET", "/"+f, "")
		add("uuid", "GET", "/pool_patch_download?uuid="+f, login)
		add("vdi", "GET", "/export_raw_vdi?vdi="+f, login)
		add("no credentials", "GET", "/pool_patch_download?session_id="+f+"&uuid="+f, "")
		add("no credentials", "PUT", "/pool_patch_upload?pool_secret="+f+"&task_id="+f, "")
		if i%8 > 0 {
			continue // these make tasks, which takes a while
		}
		add("sr", "PUT", "/pool_patch_upload?task_id="+f+"&sr_id="+f, login)
		add("outcome by task", "PUT", "/import_raw_vdi?sr_uuid="+f+"&vdi="+f, login)
	}
	work := make(chan request)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for r := range work {
				a, err := rawRequest(h, r.head, nil, 20*time.Second)
				first, _, _ := strings.Cut(r.head, "\r\n")
				switch {
				case err != nil:
					t.Errorf("%.100q: %v", first, err)
				case bytes.Contains(a.Body, []byte(secret)):
					t.Errorf("%.100q reads what it must not", first)
				case r.what == "outcome by task" && a.Status == 200:
				case a.Status < 400 || a.Status >= 500 && a.Status != 503:
					t.Errorf("%.100q: %d %.200s", first, a.Status, a.Body)
				case r.what == "no credentials" && a.Status != 401 && a.Status != 400 && a.Status != 414 && a.Status != 431:
					t.Errorf("%.100q without credentials: %d", first, a.Status)
				}
			}
		})
	}
	for _, r := range requests {
		work <- r
	}
	close(work)
	wg.Wait()

	host, config := s.Host(), map[string]string{}
	sr := s.Call("VDI.get_SR", vdiOf(s, ref)).(string)
	for i, f := range forms {
		if plain, err := url.PathUnescape(f); err == nil && i%2 == 0 {
			f = plain
		}
		location := map[string]string{"location": f}
		if strings.HasPrefix(f, "../") || strings.Contains(f, "/../") {
			location["location"] = dir + "/" + f
		} else if filepath.IsAbs(f) { // an admin may name any folder, in plain words
			location["location"] = "/etc/" + f
		}
		for _, c := range []struct {
			method string
			params []any
		}{
			{"pool_patch.get_by_uuid", []any{f}}, {"VDI.get_by_uuid", []any{f}}, {"SR.get_by_uuid", []any{f}},
			{"SR.introduce", []any{f, "n", "", "file", "user", false, config}},
			{"VDI.introduce", []any{f, "n", "", sr, "user", false, false, config, f, config, config, true, "", ref, "19700101T00:00:00Z", nullRef}},
			{"SR.create", []any{host, location, "0", "n", "", "file", "user", false, config}},
			{"SR.probe", []any{host, location, "file", config}},
			{"patchd.patch_import", []any{f}},
			{"patchd.user_add", []any{f, "x", "../admin"}},
		} {
			if v, err := s.Try(c.method, c.params...); err == nil || isCode(err, xapi.InternalError) || strings.Contains(fmt.Sprint(err), secret) {
				t.Errorf("%s(%.80q): %v %v", c.method, f, v, err)
			}
		}
	}
	if after := tree(); len(after) != len(before) {
		t.Errorf("%d files where %d were: %.2000s", len(after), len(before), after)
	}
	t.Run("an SR in patchd's own folders", func(t *testing.T) {
		link := filepath.Join(dir, "link")
		if err := os.Symlink(h.StateDir, link); err != nil {
			t.Fatal(err)
		}
		for _, at := range []string{h.StateDir + "/jobs/x", h.StateDir + "/trusted-keys", link + "/jobs/x", link + "/trusted-keys/y/z", h.PatchDir, h.PatchDir + "/applied"} {
			if _, err := s.Try("SR.create", host, map[string]string{"location": at}, "0", "n", "", "file", "user", false, config); err == nil {
				t.Errorf("an SR was made at %s", at)
			}
		}
	})
}

// TestSecurity_patch_dir has in the patch-dir, and among the stampfiles, what
// should not be there. The daemon starts, soon, and follows none of it.
func TestSecurity_patch_dir(t *testing.T) {
	h := lab.Prepare(t, lab.Options{})
	outside := filepath.Join(t.TempDir(), "outside")
	good := &lab.Patch{}
	signed := good.Signed(t)
	other := (&lab.Patch{}).Signed(t)
	applied := filepath.Join(h.PatchDir, "applied")
	if err := os.MkdirAll(applied, 0o755); err != nil {
		t.Fatal(err)
	}
	os.WriteFile(outside, other, 0o644)
	os.WriteFile(filepath.Join(h.PatchDir, string(good.UUID)), signed, 0o644)
	for _, d := range []string{h.PatchDir, applied} {
		run(t, "mkfifo", filepath.Join(d, string(xapi.NewUUID())))
		os.Symlink(outside, filepath.Join(d, string(xapi.NewUUID())))
		os.Symlink("/dev/zero", filepath.Join(d, string(xapi.NewUUID())))
		os.Symlink("self", filepath.Join(d, "self"))
		os.Mkdir(filepath.Join(d, string(xapi.NewUUID())), 0o755)
		os.WriteFile(filepath.Join(d, "two\nlines"), other, 0o644)
		os.WriteFile(filepath.Join(d, "bad \xff name"), other, 0o644)
		os.WriteFile(filepath.Join(d, strings.Repeat("n", 255)), []byte("no patch"), 0o644)
		os.WriteFile(filepath.Join(d, string(xapi.NewUUID())), bytes.Repeat([]byte("<info "), 1<<18), 0o644)
		os.WriteFile(filepath.Join(d, string(xapi.NewUUID())), []byte(`<!DOCTYPE x [<!ENTITY a SYSTEM "/etc/passwd">]><info uuid="&a;"/>`), 0o644)
	}
	began := time.Now()
	h.Up()
	if took := time.Since(began); took > 15*time.Second {
		t.Errorf("the start took %s", took)
	}
	s := h.Root()
	if _, rec := s.One("pool_patch"); rec["uuid"] != string(good.UUID) {
		t.Errorf("imported: %v", rec)
	}
	pipe := filepath.Join(h.PatchDir, "pipe")
	run(t, "mkfifo", pipe)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() { _, err := s.Try("patchd.patch_import", pipe); done <- err }()
	select {
	case err := <-done:
		if err == nil {
			t.Error("a pipe was imported")
		}
	case <-ctx.Done():
		t.Error("the import of a pipe waits for its writer")
	}
	// The file of a record becomes something else: nothing of it is given away.
	file := filepath.Join(h.PatchDir, string(good.UUID))
	for what, change := range map[string]func(){
		"a link": func() { os.Symlink("/etc/passwd", file) }, "a pipe": func() { run(t, "mkfifo", file) }, "a folder": func() { os.Mkdir(file, 0o755) },
	} {
		os.RemoveAll(file)
		change()
		a, err := rawRequest(h, "GET /pool_patch_download?uuid="+string(good.UUID)+"&session_id="+s.Ref+" HTTP/1.1\r\nHost: x\r\n\r\n", nil, 20*time.Second)
		if err != nil || a.Status != http.StatusNotFound {
			t.Errorf("%s: %d %.100s %v", what, a.Status, a.Body, err)
		}
		if _, err := apply(s, s.Call("pool_patch.get_by_uuid", string(good.UUID)).(string)); err == nil {
			t.Errorf("%s was applied", what)
		}
	}
}
