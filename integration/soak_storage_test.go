package integration

import (
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
)

// B6: everything that touches disk images is done by several clients at once
// while daemon and clients are killed at random; each time all that was
// acknowledged is there to the byte, and nothing else is.
func TestB6_KillsAtRandom(t *testing.T) {
	t.Parallel()
	soakStorage(t, 3, 8)
}

// The same for as long as one likes: make soak N=200 SEED=7.
func TestB6_SoakKills(t *testing.T) {
	t.Parallel()
	n, r := soak(t, 1)
	soakStorage(t, n, r.Int63())
}

func soakStorage(t *testing.T, rounds int, seed int64) {
	s := newSoaker(t)
	for i := range rounds {
		// A round is the same whatever came before it, as far as clients that
		// race each other can be.
		s.round(t, fmt.Sprintf("round %d", i), rand.New(rand.NewSource(seed+int64(i))))
	}
	s.finishSoak(t)
	t.Logf("%d rounds, %d restarts, what was done: %v", rounds, s.restarts, s.done)
}

// soakSR is an SR, and the folder that its volumes are in.
type soakSR struct{ name, ref, uuid, dir string }

// gold is a patch that was, or is to be, uploaded.
type gold struct {
	*told
	data   []byte   // behind its script
	file   string   // the signed patch
	task   string   // that tells how a PUT ended
	vdi    string   // ref, at the last check; "" before the first
	resume []string // the command of a client that was killed
	away   bool     // damaged in this round: others let it be
}

// thing is a VDI that is not the image of a patch.
type thing struct {
	what       string
	ref        string // "" until somebody is told
	task       string // that makes it
	made, gone answer
	sum        string // SHA-256 of all its bytes; "" when a write broke off
	golden     bool   // it has a block map
	old        bool   // it was there at the last check
	away       bool
}

// soaker is a host with several SRs, and what its clients were told.
type soaker struct {
	*victim
	binary string
	srs    []soakSR
	disks  string // the folder of those that are filesystems in a file

	mu     sync.Mutex // guards what is below, while clients are at work
	begun  time.Time  // of the round
	tale   []string
	golds  []*gold
	things []*thing
	points []string // of the daemon that can be named
	done   map[string]int

	// Uploads expire within seconds at the daemon that runs, and at the one before.
	soon, soonBefore bool

	stopping bool  // the daemon is ended by TERM in this round, and refuses before
	broken   *gold // its image is damaged in this round
}

func newSoaker(t *testing.T) *soaker {
	t.Helper()
	other := ext4FS(t, gib)
	s := &soaker{victim: newVictim(t, lab.Options{Dir: xfsFS(t, 3*gib)}), binary: lab.FaultBinary(t), disks: t.TempDir(), done: map[string]int{}}
	newSR(s.s, "files", filepath.Join(other, "sr"))
	for _, typ := range []string{"ext", "xfs"} {
		dir := filepath.Join(s.disks, typ)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		makeSR(s.s, typ, "device="+filepath.Join(dir, "disk.img")+",size=1GiB")
	}
	for ref, rec := range s.s.All("SR") {
		sr := soakSR{rec["name_label"].(string), ref, rec["uuid"].(string), ""}
		where := s.s.Call("PBD.get_device_config", pbdOf(s.s, ref)).(map[string]any)
		if sr.dir, _ = where["location"].(string); sr.dir == "" {
			sr.dir = filepath.Join(s.StateDir, "mnt", sr.uuid)
		}
		s.srs = append(s.srs, sr)
	}
	slices.SortFunc(s.srs, func(a, b soakSR) int { return strings.Compare(a.name, b.name) })
	s.where = func(vdi string) string { return s.path(t, s.s.Call("VDI.get_record", vdi).(map[string]any)) }
	return s
}

// note adds a line to what is told of a round that fails.
func (s *soaker) note(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tale = append(s.tale, fmt.Sprintf("%7.3f ", time.Since(s.begun).Seconds())+fmt.Sprintf(format, args...))
}

// round is one kill, and a look at everything after it.
func (s *soaker) round(t *testing.T, name string, r *rand.Rand) {
	t.Helper()
	s.begun, s.tale = time.Now(), nil
	s.damageOne(t, r)
	how, delay := s.plan(r), time.Duration(r.Intn(1500))*time.Millisecond
	s.stopping = how == "TERM"
	s.note("%s: %s, after %s", name, how, delay)
	var wg sync.WaitGroup
	worked := make(chan struct{})
	for w := range 4 {
		one := rand.New(rand.NewSource(r.Int63()))
		wg.Go(func() { s.work(t, w, one) })
	}
	go func() {
		wg.Wait()
		close(worked)
	}()
	select {
	case <-time.After(delay):
	case <-s.Exited():
	}
	if how == "TERM" {
		s.Down()
	} else {
		s.Kill()
	}
	s.note("the daemon is down")
	s.startAgain(r)
	<-worked
	s.note("the clients are done")
	s.settle(t, r)
	s.check(t)
	if !t.Failed() {
		s.thin(t)
	}
	if t.Failed() {
		t.Fatalf("%s failed:\n%s", name, strings.Join(s.tale, "\n"))
	}
}

// plan chooses how the daemon ends.
func (s *soaker) plan(r *rand.Rand) string {
	s.T.Helper()
	names := map[string]bool{}
	for _, n := range s.points {
		names[n] = true
	}
	for _, points := range s.passed(0) {
		for _, n := range points {
			names[n] = true
		}
	}
	if err := os.Truncate(s.trace, 0); err != nil {
		s.T.Fatal(err)
	}
	s.points = nil
	for n := range names {
		s.points = append(s.points, n)
	}
	slices.Sort(s.points)
	switch r.Intn(8) {
	case 0:
		return "TERM"
	case 1, 2, 3:
		at := fmt.Sprintf("die@%s#%d", s.points[r.Intn(len(s.points))], 1+r.Intn(4))
		s.let(at, "")
		return at
	}
	return "KILL"
}

// startAgain starts the daemon; sometimes it is killed again while it mends
// what was left.
func (s *soaker) startAgain(r *rand.Rand) {
	s.T.Helper()
	var env []string
	s.soonBefore, s.soon = s.soon, r.Intn(3) == 0
	if s.soon {
		env = append(env, "PATCHD_UPLOAD_EXPIRY=2s")
	}
	if r.Intn(3) == 0 {
		env = append(env, "PATCHD_SCRUB_INTERVAL=100ms", "PATCHD_SCRUB_RATE=0")
	}
	if r.Intn(3) == 0 {
		at := fmt.Sprintf("die@%d", 1+r.Intn(60))
		s.note("at the start %s", at)
		s.let(at, "")
		s.Launch(env...)
		if s.Ready(time.Minute) == nil {
			s.Kill()
		}
		<-s.Exited()
	}
	s.let("", "")
	s.Up(env...)
	s.restarts++
	s.note("the daemon is up, %v", env)
}

// settle ends what the clients have left unfinished.
func (s *soaker) settle(t *testing.T, r *rand.Rand) {
	t.Helper()
	way := r.Intn(3)
	for _, k := range s.golds {
		again := k.resume
		if k.resume = nil; again == nil || way > 0 {
			continue // or nobody comes back to it
		}
		out, errs, code, _ := s.client(nil, 0, again...)
		s.note("%s: the same upload again: %d %s %s", k.UUID, code, out, errs)
		if code == 1 && slices.Contains(again, "--base") {
			continue // it may have been destroyed
		}
		if code != 0 || strings.TrimSpace(out) != string(k.UUID) {
			t.Errorf("upload of %s, gone on with: %d %s", k.UUID, code, errs)
		} else {
			k.uploaded = yes
		}
	}
	if s.broken != nil {
		uuid := s.s.Call("VDI.get_uuid", s.broken.vdi).(string)
		if _, errs, code, _ := s.client(nil, 0, "vdi", "repair", uuid); code != 0 {
			t.Errorf("repair of the image of %s: %d %s", s.broken.UUID, code, errs)
		}
		for ref, m := range s.s.All("message") {
			if m["name"] == "VDI_REPAIRED" {
				s.s.Call("message.destroy", ref)
			}
		}
		s.broken = nil
	}
	s.endUploads(t, way == 1 && r.Intn(4) == 0)
	s.allEnded(t)
	for _, k := range s.golds {
		if k.task != "" && k.uploaded == maybe {
			k.uploaded, _ = s.outcome(k.task)
		}
	}
	for _, it := range s.things {
		it.away = false
		if it.task == "" || it.made != maybe {
			continue
		}
		it.made, it.ref = s.outcome(it.task)
	}
}

// outcome is what a task that has ended tells.
func (s *soaker) outcome(task string) (answer, string) {
	s.T.Helper()
	rec := s.s.Call("task.get_record", task).(map[string]any)
	if rec["status"] != "success" {
		return no, ""
	}
	return yes, plain(rec["result"].(string))
}

// endUploads ends the uploads that nobody goes on with: when they may expire it
// waits for that. Those that have hours left are cancelled.
func (s *soaker) endUploads(t *testing.T, expire bool) {
	t.Helper()
	limit := time.Duration(0)
	if expire && (s.soon || s.soonBefore) {
		limit = 30 * time.Second
	}
	for end := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		var pending []string
		for ref, rec := range s.s.All("task") {
			if rec["name_label"] == "pool_patch_upload" && rec["status"] == "pending" {
				pending = append(pending, ref)
			}
		}
		if len(pending) == 0 {
			return
		}
		if time.Now().Before(end) {
			continue
		}
		for _, ref := range pending {
			if _, err := s.s.Try("task.cancel", ref); err != nil {
				s.note("cancel of %s: %v", ref, err) // it has ended by itself
			}
		}
		return
	}
}

// plain takes the result of a task out of its wrapping.
func plain(result string) string {
	return strings.TrimSuffix(strings.TrimPrefix(result, "<value>"), "</value>")
}

// thin destroys what is too much, which must work.
func (s *soaker) thin(t *testing.T) {
	t.Helper()
	for len(s.things) > 6 {
		s.s.Call("VDI.destroy", s.things[0].ref)
		s.things = s.things[1:]
	}
	for len(s.golds) > 6 {
		k := s.golds[0]
		s.s.Call("pool_patch.pool_clean", s.ofPatch(k))
		s.golds = s.golds[1:]
		k.cleaned = yes
		if k.asked == 0 {
			s.s.Call("pool_patch.destroy", s.ofPatch(k))
		}
	}
}

func (s *soaker) ofPatch(k *gold) string {
	return s.s.Call("pool_patch.get_by_uuid", string(k.UUID)).(string)
}

// finishSoak looks at what only the database shows, and takes everything away.
func (s *soaker) finishSoak(t *testing.T) {
	t.Helper()
	for _, it := range s.things {
		s.s.Call("VDI.destroy", it.ref)
	}
	for _, k := range s.golds {
		s.s.Call("pool_patch.pool_clean", s.ofPatch(k))
	}
	s.golds, s.things, s.patches, s.old = nil, nil, nil, nil
	s.check(t)
	for _, sr := range s.srs {
		if rec := s.s.Call("SR.get_record", sr.ref).(map[string]any); rec["type"] != "file" {
			_, errs, code := s.CLI("sr", "destroy", sr.uuid)
			if code != 0 {
				t.Errorf("sr destroy %s: %s", sr.name, errs)
			}
		}
	}
	if left := append(loopsOf(t, s.disks), mountsBelow(t, s.StateDir)...); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	s.victim.finish(t)
}
