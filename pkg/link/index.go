package link

import (
	"maps"
	"slices"
	"time"

	"golang.org/x/time/rate"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/trust"
	"github.com/patchd/patchd/pkg/xapi"
)

// index is what a hub knows of the records, as of one view: it follows the
// changes, so its cost is theirs. The hub's mu guards it.
type index struct {
	view    *store.View // nil: nothing was read yet
	members map[xapi.Ref]*member
	keys    map[string]xapi.Ref // pin to host
	jobs    map[xapi.Ref]openJob
	peers   map[xapi.Ref]pool.Peer // the hosts that lead or may lead
	leader  xapi.Ref
	uuid    xapi.UUID // of the pool
	name    string
	revoked map[string]time.Time
	ejected map[string]bool // of those: the host itself was ejected
}

// member is one host of the pool.
type member struct {
	ref  xapi.Ref
	uuid xapi.UUID
	pins []string
	away bool // its record says so

	link      *hostLink // nil: not connected
	since     time.Time // when link came, or went; zero: nothing was seen of it
	ask, tell *rate.Limiter

	process string    // that was connected last
	former  []string  // those before it
	warned  time.Time // when it was said that the host is there twice
}

// MessageHostTwice is the notice of a host whose key two processes have.
const MessageHostTwice = "PATCHD_HOST_TWICE"

// warnAgain is when that is said again, and maxFormer how many processes of a host
// are remembered.
const (
	warnAgain = time.Hour
	maxFormer = 4
)

// meets notes which process of the host connects. One that comes back after another
// has taken its place is not the only one: a process that was started again is new.
func (m *member) meets(process string) (again bool) {
	if process == "" || process == m.process {
		return false
	}
	again = slices.Contains(m.former, process)
	if m.process != "" && !slices.Contains(m.former, m.process) {
		m.former = append(m.former[max(0, len(m.former)-maxFormer+1):], m.process)
	}
	m.process = process
	return again
}

// openJob is what of an open job concerns its host: not how far the host says
// it has come.
type openJob struct {
	host    xapi.Ref
	state   pool.JobState
	cancel  bool
	attempt int64
}

func newIndex() index {
	return index{
		members: map[xapi.Ref]*member{}, keys: map[string]xapi.Ref{}, jobs: map[xapi.Ref]openJob{},
		peers: map[xapi.Ref]pool.Peer{}, revoked: map[string]time.Time{},
	}
}

// concern is whom a change concerns.
type concern struct {
	all   bool
	hosts map[xapi.Ref]bool
}

func (c *concern) add(host xapi.Ref) {
	if c.hosts == nil {
		c.hosts = map[xapi.Ref]bool{}
	}
	c.hosts[host] = true
}

// advance brings the index up to the newest view, cuts the links that have lost
// their right, and has orders sent to whom the changes concern.
func (h *Hub) advance() {
	var v *store.View
	if h.o.Store.View(func(now *store.View) error { v = now; return nil }) != nil {
		return // it is closed
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.index.view != nil && v.Revision() <= h.index.view.Revision() {
		return
	}
	var c concern
	changes, ok := []store.Change(nil), false
	if h.index.view != nil {
		changes, ok = v.Since(h.index.view.Revision())
	}
	h.index.view = v
	if !ok {
		changes = h.everything(v)
		c.all = true
	}
	for _, ch := range changes {
		h.take(ch, &c)
	}
	h.tell(c)
}

// everything gives the records that an index is made from, as changes, and
// those of hosts and jobs that it has and the view has not.
func (h *Hub) everything(v *store.View) []store.Change {
	var all []store.Change
	for _, class := range []string{pool.ClassPool, pool.ClassHost, pool.ClassJob} {
		for _, it := range v.List(class) {
			all = append(all, store.Change{Class: class, Ref: it.Ref, Op: store.Add, Item: it})
		}
	}
	gone := func(class string, ref xapi.Ref) {
		if _, ok := v.Get(class, ref); !ok {
			all = append(all, store.Change{Class: class, Ref: ref, Op: store.Del})
		}
	}
	for ref := range h.index.members {
		gone(pool.ClassHost, ref)
	}
	for ref := range h.index.jobs {
		gone(pool.ClassJob, ref)
	}
	return all
}

// take notes one change. A record that does not decode counts as gone: nobody
// is let in because of it.
func (h *Hub) take(ch store.Change, c *concern) {
	switch ch.Class {
	case pool.ClassJob:
		h.takeJob(ch, c)
	case pool.ClassHost:
		h.takeHost(ch, c)
	case pool.ClassPool:
		h.takePool(ch, c)
	}
}

func (h *Hub) takeJob(ch store.Change, c *concern) {
	old, had := h.index.jobs[ch.Ref]
	var job pool.Job
	if ch.Op == store.Del || ch.Item.Decode(&job) != nil || job.State == pool.JobDone {
		if had {
			delete(h.index.jobs, ch.Ref)
			c.add(old.host)
		}
		return
	}
	now := openJob{job.Host, job.State, job.Cancel, job.Attempt}
	if now == old {
		return
	}
	h.index.jobs[ch.Ref] = now
	c.add(now.host)
	if had {
		c.add(old.host)
	}
}

func (h *Hub) takeHost(ch store.Change, c *concern) {
	m := h.index.members[ch.Ref]
	var rec pool.Host
	if ch.Op == store.Del || ch.Item.Decode(&rec) != nil {
		if m != nil {
			h.forget(m, c)
		}
		return
	}
	if m == nil {
		m = &member{ref: ch.Ref}
		m.ask, m.tell = newLimits()
		h.index.members[ch.Ref] = m
		c.add(ch.Ref)
		h.leaves(m, h.o.Now())
	}
	m.uuid, m.away = rec.UUID, !rec.Away.IsZero()
	if m.away && (m.link != nil || m.ref == h.o.Self) {
		h.back(m.ref)
	}
	if h.takeKeys(m, rec.Keys) {
		c.add(ch.Ref)
	}
	h.takePeer(ch.Ref, rec, c)
}

// takePeer notes a host that leads or may lead as others must know it.
func (h *Hub) takePeer(ref xapi.Ref, rec pool.Host, c *concern) {
	old, had := h.index.peers[ref]
	if !rec.Coordinator && ref != h.index.leader || rec.URL == "" || len(rec.Keys) == 0 {
		delete(h.index.peers, ref)
		c.all = c.all || had
		return
	}
	p := pool.Peer{Host: rec.UUID, URL: rec.URL}
	for _, k := range rec.Keys {
		p.Keys = append(p.Keys, k.SPKI)
	}
	if !had || old.URL != p.URL || !slices.EqualFunc(old.Keys, p.Keys, slices.Equal) {
		h.index.peers[ref], c.all = p, true
	}
}

// takeKeys makes the keys of a record those that let the host in, and tells
// whether they have changed.
func (h *Hub) takeKeys(m *member, keys []pool.HostKey) bool {
	var pins []string
	for _, k := range keys {
		pins = append(pins, trust.Pin(k.SPKI))
	}
	if slices.Equal(pins, m.pins) {
		return false
	}
	for _, p := range m.pins {
		if h.index.keys[p] == m.ref {
			delete(h.index.keys, p)
		}
	}
	for _, p := range pins {
		h.index.keys[p] = m.ref
	}
	m.pins = pins
	h.checkKey(m)
	return true
}

// checkKey cuts the link of a host when the key that it has shown lets it in no
// more.
func (h *Hub) checkKey(m *member) {
	if m.link == nil {
		return
	}
	if !slices.Contains(m.pins, m.link.caller.pin) {
		m.link.cut("the key is not the host's any more")
	} else if _, bad := h.index.revoked[m.link.caller.pin]; bad {
		m.link.cut("the key was revoked")
	}
}

// forget ends a host that is of the pool no more.
func (h *Hub) forget(m *member, c *concern) {
	if m.link != nil {
		m.link.cut("the host is of the pool no more")
	}
	h.takeKeys(m, nil)
	delete(h.index.members, m.ref)
	if _, had := h.index.peers[m.ref]; had {
		delete(h.index.peers, m.ref)
		c.all = true
	}
}

func (h *Hub) takePool(ch store.Change, c *concern) {
	var rec pool.PoolRecord
	if ch.Op == store.Del || ch.Item.Decode(&rec) != nil {
		return
	}
	h.index.uuid = rec.UUID
	if h.index.name != rec.NameLabel {
		h.index.name, c.all = rec.NameLabel, true
	}
	if h.index.leader != rec.Master {
		before := h.index.leader
		h.index.leader, c.all = rec.Master, true
		for _, ref := range []xapi.Ref{before, rec.Master} {
			if it, ok := h.index.view.Get(pool.ClassHost, ref); ok {
				h.takeHost(store.Change{Class: pool.ClassHost, Ref: ref, Op: store.Mod, Item: it}, c)
			}
		}
	}
	revoked := map[string]time.Time{}
	h.index.ejected = map[string]bool{}
	for _, k := range rec.Revoked {
		revoked[k.Pin] = k.Until
		h.index.ejected[k.Pin] = k.Ejected
		_, known := h.index.revoked[k.Pin]
		c.all = c.all || !known
	}
	h.index.revoked = revoked
	for _, m := range h.index.members {
		h.checkKey(m)
	}
}

// tell has orders sent to whom a change concerns.
func (h *Hub) tell(c concern) {
	if c.all {
		for _, m := range h.index.members {
			if m.link != nil {
				m.link.order()
			}
		}
		return
	}
	for ref := range c.hosts {
		if m := h.index.members[ref]; m != nil && m.link != nil {
			m.link.order()
		}
	}
}

// owner is the host that a key lets in; nil: none. A copy, to be read without
// the lock.
func (h *Hub) owner(pin string) *member {
	h.mu.Lock()
	defer h.mu.Unlock()
	m := h.index.members[h.index.keys[pin]]
	if _, bad := h.index.revoked[pin]; m == nil || bad {
		return nil
	}
	return &member{ref: m.ref, uuid: m.uuid}
}

// isEjected tells whether a key was that of a host which was ejected, and from
// which pool.
func (h *Hub) isEjected(pin string) (from xapi.UUID, yes bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.index.uuid, h.index.ejected[pin]
}

func (h *Hub) isRevoked(pin string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	_, bad := h.index.revoked[pin]
	return bad
}

// leavesKeys tells whether a host has shown its newest key while its record
// still has older ones.
func (h *Hub) leavesKeys(c caller) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	m := h.index.members[c.host]
	return m != nil && len(m.pins) > 1 && m.pins[len(m.pins)-1] == c.pin
}

// orders are those of a host, all of one view.
func (h *Hub) orders(l *hostLink) (pool.Orders, error) {
	h.mu.Lock()
	v := h.index.view
	o := pool.Orders{
		Term: h.o.Term(), Revision: v.Revision(), Pool: h.index.uuid, PoolName: h.index.name, Host: l.caller.host,
		Coordinators: h.coordinators(), Jobs: []pool.Assignment{}, Revoked: []string{},
	}
	for pin, until := range h.index.revoked {
		if h.o.Now().Before(until) {
			o.Revoked = append(o.Revoked, pin)
		}
	}
	h.mu.Unlock()
	slices.Sort(o.Revoked)
	if l.standby {
		return o, nil
	}
	jobs, err := h.o.Pool.JobsIn(v, l.caller.host)
	o.Jobs = append(o.Jobs, jobs...)
	return o, err
}

// coordinators are the hosts that lead or may lead, the leader first, then in
// the order of their uuids. Call it with mu held.
func (h *Hub) coordinators() []pool.Peer {
	leader := h.index.peers[h.index.leader].Host
	peers := slices.AppendSeq([]pool.Peer{}, maps.Values(h.index.peers))
	slices.SortFunc(peers, func(a, b pool.Peer) int {
		switch {
		case a.Host == b.Host:
			return 0
		case a.Host == leader || b.Host != leader && a.Host < b.Host:
			return -1
		}
		return 1
	})
	return peers
}
