package integration

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/integration/lab"
	"github.com/patchd/patchd/pkg/link"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/trust"
	"github.com/patchd/patchd/pkg/xapi"
)

// identityOf is the key of a host, as one has it who has stolen its state directory.
func identityOf(t testing.TB, h *lab.Host) *trust.Identity {
	t.Helper()
	id, err := trust.Open(filepath.Join(h.StateDir, "tls.pem"), "stolen")
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// agentWith connects to a coordinator as the host whose key it is; what it says
// of itself is that it is h. It ends with end, and with the test.
func agentWith(t testing.TB, id *trust.Identity, h, coordinator *lab.Host) (c *link.Client, end func()) {
	t.Helper()
	log := logrus.New()
	log.SetOutput(io.Discard)
	leader := pool.Peer{Host: xapi.UUID(coordinator.UUID()), URL: coordinator.TLSURL, Keys: [][]byte{identityOf(t, coordinator).SPKI()}}
	c, err := link.NewClient(link.ClientOptions{
		Identity: id, Log: log, Version: "test",
		Coordinators: func() []pool.Peer { return []pool.Peer{leader} },
		Facts: func() pool.Facts {
			return pool.Facts{Hostname: "test", Address: h.IP, URL: h.TLSURL, SoftwareVersion: map[string]string{}}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = c.Run(ctx) // it ends with ctx
	}()
	end = func() { cancel(); <-done }
	t.Cleanup(end)
	return c, end
}

// ready waits for the first orders.
func ready(t testing.TB, c *link.Client) pool.Orders {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := c.Ready(ctx); err != nil {
		t.Fatalf("no orders: %v (%s)", err, c.State().Problem)
	}
	o, _ := c.Orders()
	return o
}

// refusedLink waits until a client was refused, and not let in.
func refusedLink(t testing.TB, c *link.Client, why string) {
	t.Helper()
	until(t, "the link to be refused: "+why, func() bool {
		st := c.State()
		if st.Connected {
			t.Fatalf("it was let in")
		}
		return strings.Contains(st.Problem, why)
	})
	if _, ok := c.Orders(); ok {
		t.Error("it was told what others do")
	}
}

// C9: an agent that is not whom it claims to be, or that tells of what is not
// its own, is refused, that is logged, and nothing changes.
func TestC9_AgentsThatLie(t *testing.T) {
	t.Parallel()
	p := lab.PoolHere(t, 3, nil)
	p.JoinAll()
	first, liar, victim := p.Hosts[0], p.Hosts[1], p.Hosts[2]
	s := first.Root()
	w := p.Work(lab.Patch{})
	ref := s.MustUpload(w.Patch)
	w.Tell(lab.Hold, victim)
	task := s.Call("Async.pool_patch.apply", ref, s.HostRef(victim)).(string)
	until(t, "the patch to be at work", func() bool { return w.Begun(victim) == 1 })
	victim.Kill() // the patch goes on
	asVictim, end := agentWith(t, identityOf(t, victim), victim, first)
	orders := ready(t, asVictim)
	if len(orders.Jobs) != 1 {
		t.Fatalf("the host has %d jobs", len(orders.Jobs))
	}
	job := orders.Jobs[0]

	// A report of an attempt that is over.
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	failure := xapi.NewError(xapi.PatchApplyFailed, "replayed")
	err := asVictim.JobFinish(ctx, job.Ref, pool.Outcome{Err: failure, At: time.Now(), Attempt: job.Job.Attempt - 1})
	hasCode(t, err, xapi.OperationNotAllowed)
	end()

	liar.Kill()
	asLiar, endLiar := agentWith(t, identityOf(t, liar), liar, first)
	if o := ready(t, asLiar); len(o.Jobs) != 0 {
		t.Errorf("it is told the jobs of others: %v", o.Jobs)
	}
	lies := map[string]func() error{
		"claim":   func() error { _, err := asLiar.JobClaim(ctx, job.Ref); return err },
		"promise": func() error { _, err := asLiar.JobPromise(ctx, job.Ref, pool.Promise{}); return err },
		"report":  func() error { return asLiar.JobReport(ctx, job.Ref, 0.9, "lies") },
		"requeue": func() error { return asLiar.JobRequeue(ctx, job.Ref) },
		"finish": func() error {
			return asLiar.JobFinish(ctx, job.Ref, pool.Outcome{Output: "done, surely", At: time.Now(), Attempt: job.Job.Attempt})
		},
		"find": func() error { _, _, err := asLiar.FindJob(ctx, job.Job.UUID); return err },
		"resync": func() error {
			return asLiar.Resync(ctx, xapi.Ref(s.HostRef(victim)), []pool.Stamp{{Patch: pool.Patch{UUID: w.UUID, NameLabel: "lies", Version: "1.0"}, Applied: time.Now()}})
		},
		"message": func() error {
			_, err := asLiar.MessageCreate(ctx, "LIES", 1, "Host", xapi.UUID(victim.UUID()), "it is broken")
			return err
		},
		"blocks": func() error { _, err := asLiar.Sources(ctx, strings.Repeat("ab", 32), false); return err },
	}
	for name, lie := range lies {
		err := lie()
		var e *xapi.Error
		if !errors.As(err, &e) || e.Code != xapi.OperationNotAllowed {
			t.Errorf("%s: %v", name, err)
		}
	}
	if said := first.Log(); strings.Count(said, string(identityOf(t, liar).Pin())) < len(lies) {
		t.Errorf("the log does not tell who has asked:\n%s", said)
	}
	if n := w.Begun(liar); n != 0 || s.State(w, liar) != "absent" {
		t.Errorf("begun %d times, %s", n, s.State(w, liar))
	}
	if msgs := s.All("message"); len(msgs) != 0 {
		t.Errorf("messages: %v", msgs)
	}
	endLiar()

	// A key that nobody knows.
	id, err := trust.Open(filepath.Join(t.TempDir(), "tls.pem"), "stranger")
	if err != nil {
		t.Fatal(err)
	}
	stranger, endStranger := agentWith(t, id, victim, first)
	refusedLink(t, stranger, "403")
	endStranger()
	if !strings.Contains(first.Log(), id.Pin()) {
		t.Error("the stranger is not in the log")
	}

	lab.UpAll(liar, victim)
	w.Relent(lab.Hold, victim)
	if rec := s.Wait(task); rec["status"] != "success" {
		t.Errorf("%v", rec)
	}
	everywhere(t, s, w, victim)
	untouched(t, w, liar)

	// The same report again, once all is over.
	victim.Kill()
	asVictim, end = agentWith(t, identityOf(t, victim), victim, first)
	ready(t, asVictim)
	if err := asVictim.JobFinish(ctx, job.Ref, pool.Outcome{Err: failure, At: time.Now(), Attempt: job.Job.Attempt}); err != nil {
		t.Logf("replayed: %v", err)
	}
	end()
	victim.Up()
	everywhere(t, s, w, victim)
	p.Finish()
}

// C9: from the moment that a key is revoked it is worth nothing, anywhere.
func TestC9_RevokedKey(t *testing.T) {
	t.Parallel()
	p := lab.PoolHere(t, 3, nil)
	p.JoinAll()
	first, other, revoked := p.Hosts[0], p.Hosts[1], p.Hosts[2]
	s := first.Root()
	w := p.Work(lab.Patch{})
	ref := s.MustUpload(w.Patch)
	id := identityOf(t, revoked)
	asks := func(h *lab.Host, path string) (status int, says string) {
		t.Helper()
		c := link.NewHTTP(id, h.TLSURL, trust.OneOf(identityOf(t, h).SPKI()))
		defer c.CloseIdleConnections()
		res, err := c.Get(h.TLSURL + path)
		if err != nil {
			t.Logf("%s%s: %v", h.TLSURL, path, err)
			return 0, ""
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, string(b)
	}
	download := "/pool_patch_download?uuid=" + string(w.UUID)
	// It is known, and has no job that the file is for.
	if got, says := asks(first, download); got != http.StatusForbidden || !strings.Contains(says, xapi.OperationNotAllowed) {
		t.Fatalf("before it is revoked: %d %s", got, says)
	}
	host := s.HostRef(revoked)
	first.Must("host", "revoke", revoked.UUID())
	if got, says := asks(first, download); got != http.StatusForbidden || !strings.Contains(says, "no host of the pool") {
		t.Errorf("the coordinator answers %d %s", got, says)
	}
	if got, _ := asks(other, "/patchd/blocks?have=1&map="+strings.Repeat("ab", 32)); got != http.StatusForbidden && got != 0 {
		t.Errorf("another host answers %d", got)
	}
	c, end := agentWith(t, id, revoked, first)
	refusedLink(t, c, "403")
	end()
	until(t, "the refusal to be logged", func() bool { return strings.Contains(first.Log(), "a stranger was refused") })
	task := s.Call("Async.pool_patch.apply", ref, host).(string)
	s.Call("task.cancel", task)
	if rec := s.Wait(task); rec["status"] == "success" {
		t.Errorf("a host without a key has applied a patch: %v", rec)
	}
	untouched(t, w, revoked)
	revoked.Down()
}

// C9: a token lets in one host, once, for a quarter of an hour.
func TestC9_Tokens(t *testing.T) {
	t.Parallel()
	etcd := lab.StartEtcd(t, 1)
	first := lab.Start(t, lab.Options{Store: etcd.URL("")})
	hosts := lab.StartAll(t, lab.Options{}, lab.Options{})
	refused := func(h *lab.Host, token string) {
		t.Helper()
		before := h.UUID()
		_, errs, code := h.CLI("pool", "join", first.TLSURL, "--token", token)
		if code != 1 || !strings.Contains(errs, "token") {
			t.Errorf("join: exit %d, %s", code, errs)
		}
		if n := len(first.Root().All("host")); n > 2 {
			t.Errorf("the pool has %d hosts", n)
		}
		if _, err := h.Login("root", lab.Password); err != nil || h.UUID() != before {
			t.Errorf("the host is no pool of its own any more: %v", err)
		}
	}
	token := func() string { return strings.TrimSpace(first.Must("pool", "token")) }

	expired := token()
	age(t, etcd)
	refused(hosts[0], expired)

	parts := strings.Split(token(), ".")
	if len(parts) != 3 {
		t.Fatalf("a token has %d parts", len(parts))
	}
	refused(hosts[0], parts[0]+"."+parts[1]+"x."+parts[2])
	_, errs, code := hosts[0].CLI("pool", "join", first.TLSURL, "--token", parts[0]+"."+parts[1]+"."+strings.Repeat("0", len(parts[2])))
	if code != 1 || !strings.Contains(errs, "key") {
		t.Errorf("the key of another coordinator: exit %d, %s", code, errs)
	}

	once := token()
	hosts[0].Must("pool", "join", first.TLSURL, "--token", once)
	refused(hosts[1], once)
	if !strings.Contains(first.Log(), "not taken into the pool") {
		t.Errorf("nothing is logged:\n%s", first.Log())
	}
}

// age lets every join token expire.
func age(t testing.TB, e *lab.Etcd) {
	t.Helper()
	ask := func(method string, body map[string]string) (answer struct{ Kvs []struct{ Key, Value string } }) {
		t.Helper()
		b, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		res, err := http.Post(fmt.Sprintf("http://%s:2379/v3/kv/%s", e.Nodes[0].IP, method), "application/json", bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		if err := json.NewDecoder(res.Body).Decode(&answer); err != nil || res.StatusCode != http.StatusOK {
			t.Fatalf("%s: %s %v", method, res.Status, err)
		}
		return answer
	}
	all := base64.StdEncoding.EncodeToString([]byte{0})
	aged := 0
	for _, kv := range ask("range", map[string]string{"key": all, "range_end": all}).Kvs {
		key, err1 := base64.StdEncoding.DecodeString(kv.Key)
		value, err2 := base64.StdEncoding.DecodeString(kv.Value)
		if err := errors.Join(err1, err2); err != nil {
			t.Fatal(err)
		}
		var rec pool.JoinToken
		if !strings.Contains(string(key), "/"+pool.ClassJoinToken+"/") || json.Unmarshal(value, &rec) != nil {
			continue
		}
		rec.Expires = rec.Expires.Add(-pool.TokenLife - time.Second)
		if value, err1 = json.Marshal(rec); err1 != nil {
			t.Fatal(err1)
		}
		ask("put", map[string]string{"key": kv.Key, "value": base64.StdEncoding.EncodeToString(value)})
		aged++
	}
	if aged == 0 {
		t.Fatal("there is no token")
	}
}

// C11: who has stolen the coordinator's state directory can schedule, but what
// no key that a host itself trusts has signed does not run there.
func TestC11_StolenCoordinator(t *testing.T) {
	t.Parallel()
	p := lab.PoolHere(t, 2, nil)
	p.JoinAll()
	first, member := p.Hosts[0], p.Hosts[1]
	known := p.Work(lab.Patch{Label: "signed by a key that all trust"})
	evil := p.Work(lab.Patch{Label: "signed by the thief"})
	thief := lab.NewKey(t, "Thief <thief@example.test>")
	first.Down()

	stolen := lab.Start(t, lab.Options{Dir: copyOf(t, first), Address: first.IP})
	stolen.Trust(thief)
	until(t, "the member to obey the thief", func() bool {
		s := stolen.Root()
		states := s.Call("patchd.host_states").([]any)
		for _, st := range states {
			if st := st.(map[string]any); st["ref"] == s.HostRef(member) {
				return st["connected"] == "true"
			}
		}
		return false
	})
	s := stolen.Root()
	a := s.Upload(thief.Sign(t, evil.Payload()))
	if a.Status != http.StatusCreated {
		t.Fatalf("the stolen coordinator itself trusts the key: %d %s", a.Status, a.Body)
	}
	ref := s.Call("pool_patch.get_by_uuid", string(evil.UUID))
	host := s.HostRef(member)
	for _, call := range []string{"pool_patch.precheck", "pool_patch.apply"} {
		_, err := s.Try(call, ref, host)
		hasCode(t, err, xapi.InvalidPatch)
	}
	if said := member.Log(); !strings.Contains(said, "the job has failed: INVALID_PATCH") {
		t.Errorf("the host does not tell what it has refused:\n%s", said)
	}
	if n := evil.Begun(member) + evil.Prechecked(member); n != 0 {
		t.Errorf("it ran %d times", n)
	}
	if state := s.State(evil, member); state != "absent" {
		t.Errorf("it is %s", state)
	}

	s.Call("pool_patch.apply", s.MustUpload(known.Patch), host)
	everywhere(t, s, known, member)
}

// copyOf copies the state directory of a host that is down, and gives where.
func copyOf(t testing.TB, h *lab.Host) string {
	t.Helper()
	to := t.TempDir()
	run(t, "cp", "-a", h.StateDir, to)
	return to
}
