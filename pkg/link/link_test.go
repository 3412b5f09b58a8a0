package link

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/xapi"
)

func TestAHostGetsItsOrdersAndWorksThroughThem(t *testing.T) {
	r := newRig(t)
	h, other := r.host(), r.host()
	r.job(other)
	c := r.client(h)
	r.ready(c)
	jobs, rev, err := c.Jobs(h.ref)
	if err != nil || len(jobs) != 0 || rev < 1 {
		t.Fatalf("%v %d %v", jobs, rev, err)
	}
	o, ok := c.Orders()
	if !ok || o.Term != 7 || o.Pool != r.pool.PoolUUID || o.Host != h.ref || len(o.Coordinators) != 1 || o.Coordinators[0].URL != r.url {
		t.Errorf("%+v", o)
	}
	ref, id := r.job(h)
	r.must(c.WaitChange(t.Context(), rev))
	if jobs, _, _ = c.Jobs(h.ref); len(jobs) != 1 || jobs[0].Ref != ref || jobs[0].Host != h.uuid || jobs[0].Job.UUID != id {
		t.Fatalf("%+v", jobs)
	}
	attempt, err := c.JobClaim(t.Context(), ref)
	if err != nil || attempt != 1 {
		t.Fatal(attempt, err)
	}
	if _, err := c.JobClaim(t.Context(), ref); !xapi.Is(err, xapi.OtherOperationInProgress) {
		t.Errorf("claimed twice: %v", err)
	}
	r.must(c.JobReport(t.Context(), ref, 0.5, "half"))
	job, there, err := c.FindJob(t.Context(), id)
	if err != nil || !there || job.Progress != 0.5 || job.Tail != "half" || job.State != pool.JobClaimed {
		t.Errorf("%+v %v %v", job, there, err)
	}
	r.must(c.JobFinish(t.Context(), ref, pool.Outcome{Output: "out", Err: xapi.NewError(xapi.PatchApplyFailed, "why", "two"), Attempt: 1}))
	if job := get[pool.Job](r, pool.ClassJob, ref); job.State != pool.JobDone || job.Output != "out" || strings.Join(job.Error, ",") != "PATCH_APPLY_FAILED,why,two" {
		t.Errorf("%+v", job)
	}
	r.until("the job leaves the orders", func() bool { jobs, _, _ := c.Jobs(h.ref); return len(jobs) == 0 })
	if _, there, err := c.FindJob(t.Context(), xapi.NewUUID()); there || err != nil {
		t.Error("a job that never was is there:", err)
	}
}

func TestAHostTellsOfItself(t *testing.T) {
	r := newRig(t)
	h := r.host()
	c := r.client(h)
	ref, err := c.MessageCreate(t.Context(), "N", 3, "Host", h.uuid, "body")
	r.must(err)
	if m := get[pool.Message](r, pool.ClassMessage, ref); m.Body != "body" || m.ObjUUID != h.uuid {
		t.Errorf("%+v", m)
	}
	patch := pool.Patch{UUID: xapi.NewUUID(), NameLabel: "p"}
	when := time.Date(2020, 1, 2, 3, 4, 5, 0, time.UTC)
	r.must(c.Resync(t.Context(), h.ref, []pool.Stamp{{Patch: patch, Applied: when}}))
	ref, _, err = r.pool.PatchByUUID(patch.UUID)
	r.must(err)
	if ref.IsNull() {
		t.Error("the patch of the stampfile has no record")
	}
	r.must(c.Inventory(t.Context(), pool.Inventory{Full: true, Put: []pool.InventoryRecord{{Class: "SR", Ref: "x"}}}))
	if inv := r.back.inventories[h.ref]; len(inv) != 1 || !inv[0].Full || len(inv[0].Put) != 1 {
		t.Errorf("%+v", inv)
	}
	s, err := c.Sources(t.Context(), "abc", true)
	if err != nil || string(s.Ticket) != "abc" || !s.Peers[0].Partial || s.Peers[0].Name != string(h.ref) {
		t.Errorf("%+v %v", s, err)
	}
	if f := r.back.hellos[h.ref]; f.Hostname != "h-"+string(h.uuid) {
		t.Errorf("%+v", f)
	}
	big := pool.Inventory{Put: []pool.InventoryRecord{{Record: []byte(`"` + strings.Repeat("x", maxRequest) + `"`)}}}
	if err := c.Inventory(t.Context(), big); !xapi.Is(err, xapi.MessageTooLarge) {
		t.Errorf("%v", err)
	}
	nearly := pool.Inventory{Put: []pool.InventoryRecord{{Class: "VDI", Record: []byte(`"` + strings.Repeat("x", maxRequest-4096) + `"`)}}}
	r.must(c.Inventory(t.Context(), nearly))
}

// What belongs to another host is refused by each method, and nothing changes.
func TestWhatIsAnothersIsRefused(t *testing.T) {
	r := newRig(t)
	thief, victim := r.host(), r.host()
	job, id := r.job(victim)
	sr := r.put(pool.ClassSR, pool.SR{UUID: xapi.NewUUID()})
	r.put(pool.ClassPBD, pool.PBD{UUID: xapi.NewUUID(), Host: victim.ref, SR: sr})
	vdi := r.put(pool.ClassVDI, pool.VDI{UUID: xapi.NewUUID(), SR: sr, Map: "m"})
	c := r.client(thief)
	r.ready(c)
	for name, f := range map[string]func(context.Context) error{
		"claim":   func(ctx context.Context) error { _, err := c.JobClaim(ctx, job); return err },
		"report":  func(ctx context.Context) error { return c.JobReport(ctx, job, 1, "x") },
		"requeue": func(ctx context.Context) error { return c.JobRequeue(ctx, job) },
		"finish":  func(ctx context.Context) error { return c.JobFinish(ctx, job, pool.Outcome{}) },
		"promise": func(ctx context.Context) error {
			_, err := c.JobPromise(ctx, job, pool.Promise{SR: sr, Room: 1, Work: xapi.NewUUID()})
			return err
		},
		"job":     func(ctx context.Context) error { _, _, err := c.FindJob(ctx, id); return err },
		"damaged": func(ctx context.Context) error { return c.VDIDamaged(ctx, vdi, "bad") },
		"resync":  func(ctx context.Context) error { return c.Resync(ctx, victim.ref, nil) },
		"message": func(ctx context.Context) error {
			_, err := c.MessageCreate(ctx, "N", 3, "Host", victim.uuid, "")
			return err
		},
		"message about the pool": func(ctx context.Context) error {
			_, err := c.MessageCreate(ctx, "N", 3, "Pool", r.pool.PoolUUID, "")
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			before := r.revision()
			r.said.Reset()
			if err := f(t.Context()); !xapi.Is(err, xapi.OperationNotAllowed) {
				t.Errorf("%v", err)
			}
			if r.revision() != before {
				t.Error("something was changed")
			}
			if !r.logged("may not have", string(thief.uuid)) {
				t.Error("it was not logged")
			}
		})
	}
	r.must(r.client(victim).VDIDamaged(t.Context(), vdi, "bad"))
	if get[pool.VDI](r, pool.ClassVDI, vdi).Damage == "" {
		t.Error("who has the VDI could not tell of its damage")
	}
}

func TestAHostMayTellOfTheImageThatItsJobReads(t *testing.T) {
	r := newRig(t)
	h := r.host()
	vdi := r.put(pool.ClassVDI, pool.VDI{UUID: xapi.NewUUID(), SR: xapi.NewRef(), Map: "m"})
	job := r.put(pool.ClassJob, pool.Job{UUID: xapi.NewUUID(), Kind: pool.JobCall, Host: h.ref, State: pool.JobClaimed, VDI: vdi})
	c := r.client(h)
	r.must(c.VDIDamaged(t.Context(), vdi, "bad"))
	change(r, pool.ClassJob, job, func(j *pool.Job) { j.State = pool.JobDone })
	if err := c.VDIDamaged(t.Context(), vdi, "bad"); !xapi.Is(err, xapi.OperationNotAllowed) {
		t.Errorf("after the end of its job: %v", err)
	}
}

func TestAReplayedReportIsRefused(t *testing.T) {
	r := newRig(t)
	h := r.host()
	job, _ := r.job(h)
	c := r.client(h)
	for want := int64(1); want <= 2; want++ {
		n, err := c.JobClaim(t.Context(), job)
		if err != nil || n != want {
			t.Fatal(n, err)
		}
		if want == 1 {
			r.must(c.JobRequeue(t.Context(), job))
		}
	}
	if err := c.JobFinish(t.Context(), job, pool.Outcome{Attempt: 1}); !xapi.Is(err, xapi.OperationNotAllowed) {
		t.Errorf("%v", err)
	}
	if j := get[pool.Job](r, pool.ClassJob, job); j.State != pool.JobClaimed || j.Attempt != 2 {
		t.Errorf("%+v", j)
	}
	r.must(c.JobFinish(t.Context(), job, pool.Outcome{Attempt: 2}))
	r.must(c.JobFinish(t.Context(), job, pool.Outcome{Attempt: 2})) // repeated
	r.must(c.JobFinish(t.Context(), xapi.NewRef(), pool.Outcome{Attempt: 2}))
}

// Orders go to whom a change concerns, and what a host reports of its job is no
// news for it.
func TestOrdersGoToWhomTheyConcern(t *testing.T) {
	r := newRig(t)
	a, b := r.host(), r.host()
	ca, cb := r.client(a), r.client(b)
	r.ready(ca)
	r.ready(cb)
	job, _ := r.job(a)
	r.until("the job is in the orders", func() bool { jobs, _, _ := ca.Jobs(a.ref); return len(jobs) == 1 })
	_, err := ca.JobClaim(t.Context(), job)
	r.must(err)
	r.until("the claim is in the orders", func() bool {
		jobs, _, _ := ca.Jobs(a.ref)
		return jobs[0].Job.State == pool.JobClaimed
	})
	_, na, _ := ca.Jobs(a.ref)
	_, nb, _ := cb.Jobs(b.ref)
	for i := range 10 {
		r.must(ca.JobReport(t.Context(), job, float64(i)/10, fmt.Sprint(i)))
	}
	r.must(r.pool.JobCancel(t.Context(), job))
	r.must(ca.WaitChange(t.Context(), na))
	if jobs, n, _ := ca.Jobs(a.ref); n != na+1 || !jobs[0].Job.Cancel {
		t.Errorf("%d orders for one change; cancel %v", n-na, jobs[0].Job.Cancel)
	}
	if _, n, _ := cb.Jobs(b.ref); n != nb {
		t.Errorf("%d orders for a host that nothing concerned", n-nb)
	}
	r.revoke(strings.Repeat("a", 64))
	r.must(cb.WaitChange(t.Context(), nb))
	if o, _ := cb.Orders(); len(o.Revoked) != 1 {
		t.Errorf("%+v", o)
	}
}

func TestARevokedKeyIsCutAtOnceAndStaysOut(t *testing.T) {
	r := newRig(t)
	h := r.host()
	c := r.client(h)
	r.ready(c)
	r.revoke(h.id.Pin())
	r.until("the link is cut", func() bool { return !c.State().Connected && strings.Contains(c.State().Problem, "no host of the pool") })
	if r.hub.Connected(h.ref) {
		t.Error("the hub still has the link")
	}
	if !r.logged("a stranger was refused", h.id.Pin()) {
		t.Error("it was not logged")
	}
	resp, err := NewHTTP(h.id, r.url, c.trustsAll).Get(r.url + "/whoami")
	r.must(err)
	resp.Body.Close()
	if resp.StatusCode != http.StatusForbidden {
		t.Error(resp.Status)
	}
}

func (c *Client) trustsAll([]byte) bool { return true }

func TestAnEjectedHostIsCutAtOnceAndStaysOut(t *testing.T) {
	r := newRig(t)
	h, stays := r.host(), r.host()
	c, cs := r.client(h), r.client(stays)
	r.ready(c)
	r.ready(cs)
	r.must(r.delete(pool.ClassHost, h.ref))
	r.until("the link is cut", func() bool { return !c.State().Connected && strings.Contains(c.State().Problem, "no host of the pool") })
	if len(r.hub.Hosts()) != 1 || !cs.State().Connected {
		t.Error("it was not this one that went")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := c.JobRequeue(ctx, xapi.NewRef()); !xapi.Is(err, xapi.CannotContactHost) {
		t.Errorf("%v", err)
	}
}

// A host that was ejected while it was away learns of it, also with another key.
func TestAHostThatWasEjectedLearnsOfIt(t *testing.T) {
	for name, rotate := range map[string]bool{"with its key": false, "with the next key": true} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			h := r.host()
			r.must(r.pool.HostEject(t.Context(), h.ref, true))
			if rotate {
				r.must(h.id.Rotate(time.Now()))
			}
			told := make(chan struct{})
			c := r.client(h, func(c *Client) { c.o.Ejected = sync.OnceFunc(func() { close(told) }) })
			select {
			case <-told:
			case <-time.After(20 * time.Second):
				t.Errorf("it was not told: %+v", c.State())
			}
		})
	}
}

func TestAKeyThatIsTakenFromTheRecordIsCut(t *testing.T) {
	r := newRig(t)
	h := r.host()
	c := r.client(h)
	r.ready(c)
	r.change(pool.ClassHost, h.ref, func(rec *pool.Host) { rec.Keys = nil })
	r.until("the link is cut", func() bool { return !c.State().Connected })
	if !r.logged("key is not the host") {
		t.Error("the reason was not logged")
	}
}

func TestARotatedKeyIsLearnedAndTheOldOneGoes(t *testing.T) {
	r := newRig(t)
	h := r.host()
	c := r.client(h)
	r.ready(c)
	old := h.id.Pin()
	for range 2 { // one rotation is missed
		r.must(h.id.Rotate(time.Now()))
	}
	c.Reconnect()
	r.until("both keys are known", func() bool { return len(get[pool.Host](r, pool.ClassHost, h.ref).Keys) == 2 })
	r.until("the new one is let in", func() bool { return c.State().Connected })
	r.until("the link counts", func() bool { return r.hub.Connected(h.ref) })
	c.Reconnect()
	r.until("only the new key is known", func() bool {
		keys := get[pool.Host](r, pool.ClassHost, h.ref).Keys
		return len(keys) == 1 && string(keys[0].SPKI) == string(h.id.SPKI())
	})
	r.until("it is let in", func() bool { return c.State().Connected })
	if h.id.Pin() == old {
		t.Error("the key is the same")
	}
}

func TestASecondLinkTakesThePlaceOfTheFirst(t *testing.T) {
	r := newRig(t)
	h := r.host()
	first := r.dial(h)
	first.hello()
	second := r.dial(h)
	second.hello()
	first.cut()
	if err := second.send(`{"id":2,"method":"beat"}`); err != nil {
		t.Fatal(err)
	}
	if m, err := second.next(); err != nil || m.ID != 2 {
		t.Errorf("%+v %v", m, err)
	}
	if !r.hub.Connected(h.ref) {
		t.Error("the end of the first link counts as that of the second")
	}
}

func TestVersionsOneStepApartWorkTogether(t *testing.T) {
	for _, c := range []struct {
		host, hub int
		served    bool
	}{{5, 5, true}, {4, 5, true}, {5, 4, true}, {3, 5, false}, {5, 3, false}} {
		t.Run(fmt.Sprintf("host %d with coordinator %d", c.host, c.hub), func(t *testing.T) {
			r := newRigOf(t, quickTimes, c.hub)
			h := r.host()
			job, _ := r.job(h)
			cl := r.client(h, func(cl *Client) { cl.proto = c.host })
			if c.served {
				r.ready(cl)
				n, err := cl.JobClaim(t.Context(), job)
				if err != nil || n != 1 {
					t.Error(n, err)
				}
				return
			}
			r.until("the refusal is known", func() bool {
				p := cl.State().Problem
				return strings.Contains(p, fmt.Sprintf("protocol %d", c.host)) && strings.Contains(p, fmt.Sprintf("protocol %d", c.hub))
			})
			if r.hub.Connected(h.ref) {
				t.Error("it counts as connected")
			}
		})
	}
}

// A coordinator knows methods, fields and pushes that this one does not, and a
// host likewise.
func TestWhatIsUnknownIsRefusedOrIgnored(t *testing.T) {
	r := newRig(t)
	h := r.host()
	b := r.dial(h)
	b.hello()
	for line, code := range map[string]string{
		`{"id":2,"method":"fly","params":{}}`:                          xapi.MessageMethodUnknown,
		`{"id":3,"method":"claim","params":"x"}`:                       xapi.InvalidValue,
		`{"id":4,"method":"claim"}`:                                    xapi.InvalidValue,
		`{"id":5,"method":"claim","params":{"job":"x","new":1}}`:       xapi.HandleInvalid,
		`{"id":6,"new":1,"method":"claim","params":{"job":null}}`:      xapi.HandleInvalid,
		`{"id":7,"method":"finish","params":{"job":"OpaqueRef:gone"}}`: xapi.InvalidValue,
	} {
		if err := b.send(line); err != nil {
			t.Fatal(err)
		}
		if m, err := b.next(); err != nil || m.Error == nil || m.Error.Code != code {
			t.Errorf("%s: %+v %v", line, m, err)
		}
	}
	c := r.client(r.host())
	r.ready(c)
	s := c.link
	s.answered(message{ID: 99999}) // nobody waits for it
	r.must(s.ask(t.Context(), methodBeat, nil, nil))
}

func TestTheAnswerToAClaimIsLost(t *testing.T) {
	r := newRig(t)
	h := r.host()
	job, id := r.job(h)
	c := r.client(h)
	r.ready(c)
	r.back.onClaim(func() {
		r.back.onClaim(nil)
		c.Reconnect()
		r.until("the host has noticed", func() bool { return linkOf(r.hub, h.ref) == nil })
	})
	if _, err := c.JobClaim(t.Context(), job); !xapi.Is(err, xapi.CannotContactHost) {
		t.Fatalf("a claim that nobody knows the end of: %v", err)
	}
	got, there, err := c.FindJob(t.Context(), id) // waits for the next link
	if err != nil || !there || got.State != pool.JobClaimed || got.Attempt != 1 {
		t.Errorf("%+v %v %v", got, there, err)
	}
	r.must(c.JobFinish(t.Context(), job, pool.Outcome{Attempt: got.Attempt, Err: xapi.NewError(xapi.InternalError, "undone")}))
}

// linkOf is the link of a host that still reads.
func linkOf(h *Hub, host xapi.Ref) *hostLink {
	h.mu.Lock()
	defer h.mu.Unlock()
	l := h.index.members[host].link
	if l != nil && l.ctx.Err() != nil {
		return nil
	}
	return l
}

func TestRequestsWaitForALinkAndEndWithTheClient(t *testing.T) {
	r := newRig(t)
	h := r.host()
	job, _ := r.job(h)
	c, end := r.clientTo(h, "https://127.0.0.1:1")
	if _, _, err := c.Jobs(h.ref); !xapi.Is(err, xapi.CannotContactHost) {
		t.Errorf("%v", err)
	}
	r.must(c.JobReport(t.Context(), job, 1, "")) // left out
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(xapi.NewError(xapi.TaskCancelled, "x"))
	if err := c.JobRequeue(ctx, job); !xapi.Is(err, xapi.TaskCancelled) {
		t.Errorf("%v", err)
	}
	failed := make(chan error, 2)
	go func() { failed <- c.JobRequeue(context.Background(), job) }()
	go func() { failed <- c.WaitChange(context.Background(), 0) }()
	end()
	for range 2 {
		if err := <-failed; !xapi.Is(err, xapi.CannotContactHost) {
			t.Errorf("%v", err)
		}
	}
}

// A host that does not lead says who does; one whose term is over is left.
func TestAHostFindsWhoLeads(t *testing.T) {
	r := newRig(t)
	h := r.host()
	leader := r.peer(r.url)
	url, end := r.serve(NotLeading(func() (pool.Peer, bool) { return leader, true }), nil)
	defer end()
	var kept []Term
	c, _ := r.clientTo(h, url, func(c *Client) {
		c.o.SaveTerm = func(t Term) error { kept = append(kept, t); return nil }
	})
	r.ready(c)
	if got := c.State().Leader.URL; got != r.url {
		t.Errorf("it is connected to %s", got)
	}
	if len(kept) != 1 || kept[0] != (Term{r.store.ID(), 7}) {
		t.Errorf("%+v", kept)
	}
	nobody, end2 := r.serve(NotLeading(func() (pool.Peer, bool) { return pool.Peer{}, false }), nil)
	defer end2()
	c2, _ := r.clientTo(r.host(), nobody)
	r.until("nobody leads", func() bool { return strings.Contains(c2.State().Problem, xapi.HostIsSlave) })
	old, _ := r.clientTo(r.host(), r.url, func(c *Client) { c.term = Term{r.store.ID(), 8} })
	r.until("the term is over", func() bool { return strings.Contains(old.State().Problem, "term 7 is over") })
	if _, ok := old.Orders(); ok {
		t.Error("orders of a term that is over were taken")
	}
	restored, _ := r.clientTo(r.host(), r.url, func(c *Client) { c.term = Term{"another store", 800} })
	r.ready(restored)
}

// When the leader ends another one goes on, and what was asked meanwhile is
// answered.
func TestAHostGoesOverToTheNextLeader(t *testing.T) {
	r := newRig(t)
	h := r.host()
	_, id := r.job(h)
	next := r.newHub(quickTimes, Proto, 9)
	url, end := r.serve(next, next)
	defer end()
	connects := make(chan struct{}, 4)
	c := r.client(h, func(c *Client) {
		c.o.Coordinators = func() []pool.Peer { return []pool.Peer{r.peer(r.url), r.peer(url)} }
		c.o.Connected = func(context.Context) { connects <- struct{}{} }
	})
	r.ready(c)
	_, before, err := c.Jobs(h.ref)
	r.must(err)
	began := time.Now()
	r.quit()
	if _, there, err := c.FindJob(t.Context(), id); err != nil || !there {
		t.Errorf("%v %v", there, err)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("it took %s", took)
	}
	<-connects
	<-connects
	r.must(c.WaitChange(t.Context(), before))
	if o, _ := c.Orders(); c.State().Leader.URL != url || o.Term != 9 || len(o.Jobs) != 1 {
		t.Errorf("%+v %+v", c.State(), o)
	}
}

func TestFilesComeFromTheLeaderAndPeersAreTheirKeys(t *testing.T) {
	r := newRig(t)
	h := r.host()
	c := r.client(h)
	f, size, err := c.FetchPatch(t.Context(), "abc")
	r.must(err)
	b, err := io.ReadAll(f)
	f.Close()
	if string(b) != "patch abc" || size != int64(len(b)) || err != nil {
		t.Errorf("%q %d %v", b, size, err)
	}
	if _, _, err := c.FetchPatch(t.Context(), ""); !xapi.Is(err, xapi.CannotFindPatch) {
		t.Errorf("%v", err)
	}
	resp, err := c.HTTP(r.peer(r.url)).Get(r.url + "/whoami")
	r.must(err)
	b, _ = io.ReadAll(resp.Body)
	resp.Body.Close()
	if string(b) != string(h.ref) {
		t.Errorf("%q", b)
	}
	wrong := r.peer(r.url)
	wrong.Keys = [][]byte{identity(t).SPKI()}
	if resp, err := c.HTTP(wrong).Get(r.url + "/whoami"); err == nil {
		resp.Body.Close()
		t.Error("another key is as good")
	}
	stranger := NewHTTP(identity(t), r.url, c.trustsAll)
	resp, err = stranger.Get(r.url + "/whoami")
	r.must(err)
	resp.Body.Close()
	stranger.CloseIdleConnections()
	if resp.StatusCode != http.StatusForbidden {
		t.Error(resp.Status)
	}
}
