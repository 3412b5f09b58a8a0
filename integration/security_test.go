package integration

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/patchd/patchd/integration/lab"
	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/xapi"
)

// message is one line of the table of messages, as pkg/xenapi keeps it.
type message struct {
	name   string
	params []string // types; a question mark at the end: may be left out
	role   session.Role
	words  string // task, writes, refused
}

func (m message) open() bool {
	return strings.Contains(m.name, "login") && !strings.HasPrefix(m.name, "session.logout")
}

// messageTable reads the table that the tests of pkg/xenapi hold against the code.
func messageTable(t testing.TB) []message {
	t.Helper()
	b, err := os.ReadFile("../pkg/xenapi/testdata/model.txt")
	if err != nil {
		t.Fatal(err)
	}
	var all []message
	for _, line := range strings.Split(string(b), "\n") {
		line, ok := strings.CutPrefix(line, "message ")
		if !ok {
			continue
		}
		name, rest, _ := strings.Cut(line, "(")
		params, rest, _ := strings.Cut(rest, ") -> ")
		words := rest[strings.LastIndex(rest, "; ")+2:]
		role, words, _ := strings.Cut(words, " ")
		m := message{name: name, role: session.Role(role), words: words}
		for _, p := range strings.Split(params, ", ") {
			if _, typ, ok := strings.Cut(p, ": "); ok {
				m.params = append(m.params, typ)
			}
		}
		all = append(all, m)
	}
	if len(all) < 500 {
		t.Fatalf("only %d messages", len(all))
	}
	return all
}

// user makes a user of a role and logs in as such.
func user(h *lab.Host, role session.Role) *lab.Session {
	h.T.Helper()
	name := "a-" + string(role)
	h.Root().Call("patchd.user_add", name, "pw of "+name, string(role))
	s, err := h.Login(name, "pw of "+name)
	if err != nil {
		h.T.Fatal(err)
	}
	return s
}

func isCode(err error, code string) bool {
	var e *xapi.Error
	return errors.As(err, &e) && e.Code == code
}

// TestSecurity_roles sends every message in every role. The values are of a
// type that nothing takes, so that what is allowed has no effect.
func TestSecurity_roles(t *testing.T) {
	h := lab.Start(t, lab.Options{})
	dead := h.Root()
	dead.Call("session.logout")
	sessions := map[session.Role]*lab.Session{
		session.ReadOnly: user(h, session.ReadOnly), session.PoolOperator: user(h, session.PoolOperator), session.PoolAdmin: user(h, session.PoolAdmin),
	}
	for _, m := range messageTable(t) {
		if m.open() || ofThisHost[m.name] || strings.HasSuffix(m.name, "logout") || m.name == "event.next" {
			continue
		}
		params := make([]any, len(m.params))
		for i := range params {
			params[i] = []any{map[string]any{}}
		}
		for _, async := range []string{"", "Async."} {
			if async != "" && !strings.Contains(m.words, "task") {
				continue
			}
			for role, s := range sessions {
				_, err := s.Try(async+m.name, params...)
				if denied := isCode(err, xapi.RBACPermissionDenied); denied == role.AtLeast(m.role) {
					t.Errorf("%s%s needs %s, and for %s it gave %v", async, m.name, m.role, role, err)
				}
			}
			for _, ref := range []any{dead.Ref, "", nil, 1, "OpaqueRef:NULL", "OpaqueRef:00000000-0000-4000-8000-000000000000", []any{}} {
				if _, err := h.RPC(async+m.name, append([]any{ref}, params...)...); !isCode(err, xapi.SessionInvalid) {
					t.Errorf("%s%s without a session (%v) gave %v", async, m.name, ref, err)
				}
			}
		}
	}
}

// ofThisHost are the messages about the host itself, which take no session: what
// changes something is said over the unix socket only.
var ofThisHost = map[string]bool{"patchd.role": true, "patchd.rotate_key": true, "patchd.pool_leave": true}

func TestSecurity_messages_of_the_host_itself(t *testing.T) {
	h := lab.Start(t, lab.Options{})
	_, pin, _ := strings.Cut(h.Must("status"), "pin")
	for name := range ofThisHost {
		_, err := h.RPC(name)
		if want := name != "patchd.role"; isCode(err, xapi.RBACPermissionDenied) != want || !want && err != nil {
			t.Errorf("%s over the network gave %v", name, err)
		}
	}
	if _, now, _ := strings.Cut(h.Must("status"), "pin"); now != pin || pin == "" {
		t.Error("a stranger has changed the key of the host")
	}
}

// TestSecurity_http_roles does the same for the paths that take and give files.
// Who is not known gets 401, the same for what is there and what is not.
func TestSecurity_http_roles(t *testing.T) {
	t.Parallel() // it waits most of the time
	h := lab.Start(t, lab.Options{})
	root := h.Root()
	patch := root.MustUpload(&lab.Patch{})
	uuid := root.Call("pool_patch.get_uuid", patch).(string)
	task := root.Call("task.create", "mine", "").(string)
	dead := h.Root()
	dead.Call("session.logout")
	reader, operator := user(h, session.ReadOnly), user(h, session.PoolOperator)
	ask := func(method, path, query string, dress func(*http.Request)) (int, string) {
		req, err := http.NewRequest(method, h.URL+path+"?"+query, nil)
		if err != nil {
			t.Fatal(err)
		}
		if dress != nil {
			dress(req)
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, _ := io.ReadAll(res.Body)
		res.Header.Del("Date")
		return res.StatusCode, fmt.Sprint(res.Header) + string(b)
	}
	cookie := func(s *lab.Session) func(*http.Request) {
		return func(r *http.Request) { r.AddCookie(&http.Cookie{Name: "session_id", Value: s.Ref}) }
	}
	basic := func(name, password string) func(*http.Request) {
		return func(r *http.Request) { r.SetBasicAuth(name, password) }
	}
	for _, p := range []struct{ method, path, there, missing string }{
		{"PUT", "/pool_patch_upload", "sr_id=" + vdiOf(root, patch), "sr_id=OpaqueRef:x"},
		{"GET", "/pool_patch_download", "uuid=" + uuid, "uuid=" + string(xapi.NewUUID())},
		{"PUT", "/import_raw_vdi", "vdi=" + vdiOf(root, patch), "vdi=" + string(xapi.NewUUID())},
		{"GET", "/export_raw_vdi", "vdi=" + vdiOf(root, patch), "vdi=" + string(xapi.NewUUID())},
	} {
		for who, dress := range map[string]func(*http.Request){
			"nobody": nil, "a dead session": cookie(dead), "a wrong password": basic("root", "x"), "an unknown name": basic("nobody", lab.Password),
			"a wrong pool secret": func(r *http.Request) { r.AddCookie(&http.Cookie{Name: "pool_secret", Value: "x"}) },
			"an empty password":   basic("root", ""),
		} {
			status, one := ask(p.method, p.path, p.there, dress)
			_, other := ask(p.method, p.path, p.missing, dress)
			_, third := ask(p.method, p.path+"/../../etc/passwd", p.missing, dress)
			if status != http.StatusUnauthorized || one != other || one != third {
				t.Errorf("%s %s by %s: %d\n%s\n%s\n%s", p.method, p.path, who, status, one, other, third)
			}
		}
		if status, body := ask(p.method, p.path, p.there+"&task_id="+task, cookie(reader)); status != http.StatusForbidden {
			t.Errorf("%s %s by a reader: %d %s", p.method, p.path, status, body)
		}
		if status, _ := ask(p.method, p.path, p.missing, cookie(operator)); status == 401 || status == 403 {
			t.Errorf("%s %s by an operator: %d", p.method, p.path, status)
		}
		// A task of somebody else cannot be taken over.
		if status, body := ask(p.method, p.path, p.there+"&task_id="+task, cookie(operator)); status != http.StatusForbidden && status != http.StatusBadRequest {
			t.Errorf("%s %s with a task of root's by an operator: %d %s", p.method, p.path, status, body)
		}
	}
	if status := root.Call("task.get_status", task); status != "pending" {
		t.Errorf("a task of root's was ended by others: %v", root.Call("task.get_record", task))
	}
}

// TestSecurity_owned: what is of one user is not for another of a lower role.
func TestSecurity_owned(t *testing.T) {
	h := lab.Start(t, lab.Options{})
	root, reader := h.Root(), user(h, session.ReadOnly)
	task := root.Call("task.create", "mine", "").(string)
	for _, m := range []struct {
		name   string
		params []any
	}{
		{"task.cancel", []any{task}}, {"task.destroy", []any{task}}, {"task.set_progress", []any{task, 0.5}},
		{"task.set_status", []any{task, "success"}}, {"task.set_result", []any{task, "x"}}, {"task.set_error_info", []any{task, []string{"x"}}},
		{"task.add_to_other_config", []any{task, "k", "v"}},
	} {
		if _, err := reader.Try(m.name, m.params...); !isCode(err, xapi.RBACPermissionDenied) {
			t.Errorf("%s on a task of root's: %v", m.name, err)
		}
	}
	// Sessions: neither by uuid, nor by listing, nor by events does one learn a
	// ref that logs in.
	uuid := root.Call("session.get_uuid", root.Ref).(string)
	if v, err := reader.Try("session.get_by_uuid", uuid); err == nil && v != nullRef {
		if _, err := h.RPC("host.get_all", v); err == nil {
			t.Errorf("session.get_by_uuid gave %v, which logs in", v)
		}
	}
	for _, class := range []string{"session", "task", "message"} {
		for _, m := range []string{".get_all", ".get_all_records"} {
			if v, err := reader.Try(class + m); err == nil && strings.Contains(fmt.Sprint(v), root.Ref) {
				t.Errorf("%s%s shows root's session", class, m)
			}
		}
	}
	v, err := reader.Try("event.from", []string{"*", "session", "user", "job"}, "", 0.1)
	if err == nil && strings.Contains(fmt.Sprint(v), root.Ref) {
		t.Error("events show root's session")
	}
	for _, class := range []string{"user", "job", "intent", "_user", "run", "run_host", "journal"} {
		v, err := root.Try("event.from", []string{class}, "", 0.1)
		if err != nil {
			continue
		}
		if events := v.(map[string]any)["events"].([]any); len(events) > 0 {
			t.Errorf("class %s has events: %v", class, events)
		}
	}
}

// value makes one for a parameter of a type: most of the time one that fits,
// with content that hurts.
func value(r *rand.Rand, typ string, known []string) any {
	texts := []string{
		"", "x", "../../../../etc/passwd", "/etc/cron.d/x", "a\x00b", "\u202e\ufffd", strings.Repeat("A", 5000), "-1", "NaN",
		"%s%n", "<x>&amp;", "file", "memory", "pending", "\n\n", "pool", "VDI", "class", "OpaqueRef:NULL", string(xapi.NewUUID()),
		"field \"uuid\" = \"x\"", "root", "true",
	}
	text := func() string {
		if len(known) > 0 && r.IntN(2) == 0 {
			return known[r.IntN(len(known))]
		}
		return texts[r.IntN(len(texts))]
	}
	typ = strings.TrimSuffix(typ, "?")
	if r.IntN(8) == 0 {
		typ = []string{"string", "int", "bool", "x set", "(string -> string) map", "nil"}[r.IntN(6)]
	}
	switch {
	case strings.HasSuffix(typ, " set"):
		list := []any{}
		for range r.IntN(4) {
			list = append(list, value(r, strings.TrimSuffix(typ, " set"), known))
		}
		return list
	case strings.HasSuffix(typ, " map"), strings.HasSuffix(typ, " record"):
		m := map[string]any{}
		keys := []string{"location", "uuid", "SR", "virtual_size", "name_label", "type", "host", "device_config", "other_config", "sharable", "", "path"}
		for range r.IntN(12) {
			m[keys[r.IntN(len(keys))]] = text()
		}
		return m
	case typ == "int":
		return []any{"0", "-1", "1", "9223372036854775807", "-9223372036854775808", "1048576", 5, 1.5}[r.IntN(8)]
	case typ == "float":
		return []any{0, 0.01, -1, 1e-300}[r.IntN(4)]
	case typ == "bool":
		return r.IntN(2) == 0
	case typ == "datetime":
		return []any{"20260101T00:00:00Z", "99999999T99:99:99Z", "0", ""}[r.IntN(4)]
	case typ == "nil":
		return nil
	}
	return text()
}

// TestSecurity_hostile_values sends every message values of the right type, and
// now and then of another, that mean harm. Whatever comes of it is no internal
// error, and what did not succeed has left nothing.
func TestSecurity_hostile_values(t *testing.T) { hostileValues(t, 4, 1) }

func hostileValues(t *testing.T, rounds int, seed uint64) {
	h := lab.Start(t, lab.Options{NoCheck: true})
	s := h.Root()
	s.MustUpload(&lab.Patch{})
	r := rand.New(rand.NewPCG(seed, 2))
	table := messageTable(t)
	before := h.Left()
	for round := range rounds {
		var known []string
		if round%2 == 1 { // refs and uuids of what is there
			for _, class := range []string{"SR", "VDI", "PBD", "SM", "pool", "host", "pool_patch"} {
				for ref, rec := range s.All(class) {
					known = append(known, ref, fmt.Sprint(rec["uuid"]))
				}
			}
		}
		for _, m := range table {
			if m.name == "event.next" || m.name == "patchd.user_passwd" || strings.HasSuffix(m.name, "logout") || m.open() {
				continue // would wait, or end our session
			}
			params := make([]any, len(m.params))
			for i, typ := range m.params {
				params[i] = value(r, typ, known)
			}
			name := m.name
			if strings.Contains(m.words, "task") && r.IntN(2) == 0 {
				name = "Async." + name
			}
			_, err := s.Try(name, params...)
			var e *xapi.Error
			if err != nil && (!errors.As(err, &e) || e.Code == xapi.InternalError || e.Code == "" || strings.Contains(err.Error(), "goroutine ")) {
				t.Errorf("%s(%.300q): %.300v", name, params, err)
			}
		}
	}
	for ref, rec := range s.All("task") {
		if strings.HasPrefix(fmt.Sprint(rec["name_label"]), "Async.") {
			rec = s.Wait(ref)
		}
		if info, _ := rec["error_info"].([]any); len(info) > 0 && info[0] == xapi.InternalError {
			t.Errorf("%v: %v", rec["name_label"], info)
		}
	}
	until(t, "nothing is left", func() bool { return len(h.Left()) <= len(before) })
}

// TestSoakSecurity_hostile_values is the same for longer.
func TestSoakSecurity_hostile_values(t *testing.T) {
	if os.Getenv("PATCHD_SOAK_N") == "" {
		t.Skip("only by make soak")
	}
	for seed := range uint64(8) {
		hostileValues(t, 40, seed)
	}
}
