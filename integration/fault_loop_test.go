package integration

import (
	"fmt"
	"math/rand"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
)

// points runs the story once without faults, and counts the points that the
// daemon passes in it, and the runner of an apply.
func (v *victim) points(t testing.TB) (daemon, runner []string) {
	t.Helper()
	v.let("x", "") // count from here
	mark := v.mark()
	if err := v.story(0); err != nil {
		t.Fatal(err)
	}
	invariants(t, v)
	daemon, runner = v.lists(mark)
	for _, want := range []string{
		"store.update", "sr.create", "sr.open", "sr.rename", "sr.destroy", "vdi.sync", "dom0.run", "dom0.spawn.done", "agent.spawn",
		"journal.begin", "journal.run", "journal.end", "stamp.write",
	} {
		if !slices.Contains(daemon, want) {
			t.Errorf("the daemon does not pass %s", want)
		}
	}
	for _, want := range []string{"dom0.attach", "dom0.mount", "dom0.run", "runner.begun", "dom0.syncfs", "dom0.unmount", "runner.result"} {
		if !slices.Contains(runner, want) {
			t.Errorf("the runner does not pass %s", want)
		}
	}
	return daemon, runner
}

// soak is how many faults there are to be, and the seed of what is random.
func soak(t testing.TB, few int) (n int, r *rand.Rand) {
	t.Helper()
	seed := int64(8)
	n = few
	for name, set := range map[string]func(int64){
		"PATCHD_SOAK_N": func(x int64) { n = int(x) }, "PATCHD_SOAK_SEED": func(x int64) { seed = x },
	} {
		if text := os.Getenv(name); text != "" {
			set(number(t, text))
		}
	}
	t.Logf("%d faults, seed %d", n, seed)
	return n, rand.New(rand.NewSource(seed))
}

// sample draws up to n of the numbers from 1 to all, in random order.
func sample(r *rand.Rand, n, all int) []int {
	list := r.Perm(all)[:min(n, all)]
	for i := range list {
		list[i]++
	}
	return list
}

// A8: kill -9 of the daemon at its points, and of the runner at its own. After
// a restart everything is as design and clients expect.
func TestA8_SoakDieAtEveryPoint(t *testing.T) {
	t.Parallel()
	for name, fs := range map[string]func(testing.TB, int64) string{"copies": ext4FS, "clones": xfsFS} {
		few := map[string]int{"copies": 6, "clones": 24}[name]
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n, r := soak(t, few)
			v := newVictim(t, lab.Options{Dir: fs(t, 2*gib)})
			daemon, runner := v.points(t)
			t.Logf("%d points of the daemon, %d of the runner", len(daemon), len(runner))
			met := map[string]bool{}
			for i, at := range sample(r, n, len(daemon)) {
				v.dieDaemon(t, at, i, met)
			}
			for _, at := range sample(r, n/2, len(runner)) {
				v.dieRunner(t, at, met)
			}
			for range n / 5 {
				v.dieBoth(t, r, len(daemon), len(runner))
				v.dieAtStart(t, r, len(daemon))
			}
			v.finish(t)
			if name == "clones" && n == few && len(met) < 30 {
				t.Errorf("only %d points were met: %v", len(met), met)
			}
			t.Logf("it died at %d different points, %d restarts", len(met), v.restarts)
		})
	}
}

// dieDaemon lets the daemon die at one point of the story.
func (v *victim) dieDaemon(t testing.TB, at, variant int, met map[string]bool) {
	t.Helper()
	v.let(fmt.Sprintf("die@%d", at), "")
	mark := v.mark()
	err := v.story(variant)
	where := fmt.Sprintf("die@%d: %v", at, err)
	switch {
	case err == nil:
		v.let("", "") // this variant has fewer points
	case heard(err) == no:
		t.Errorf("die@%d: refused instead: %v", at, err)
	default:
		<-v.Exited()
		daemon, _ := v.lists(mark)
		where = fmt.Sprintf("die@%d at %s", at, daemon[len(daemon)-1])
		met["daemon "+where] = true
		v.up()
	}
	v.look(t, where)
}

// dieRunner lets the runner of an apply die.
func (v *victim) dieRunner(t testing.TB, at int, met map[string]bool) {
	t.Helper()
	k := v.fresh(lab.Patch{})
	if err := v.upload(k, false); err != nil {
		t.Fatal(err)
	}
	v.let("", fmt.Sprintf("die@%d", at))
	mark := v.mark()
	err := v.apply(k, "pool_patch.apply")
	v.let("", "")
	k.killed = true
	_, runner := v.lists(mark)
	last := runner[len(runner)-1]
	where := fmt.Sprintf("runner die@%d at %s: %v", at, last, err)
	met[fmt.Sprintf("runner die@%d at %s", at, last)] = true
	if (err == nil) != (last == "runner.result.done") {
		t.Error(where)
	}
	v.look(t, where)
}

// dieBoth lets the daemon die at one point and the runners at another.
func (v *victim) dieBoth(t testing.TB, r *rand.Rand, daemon, runner int) {
	t.Helper()
	at, its := 1+r.Intn(daemon), 1+r.Intn(runner)
	v.let(fmt.Sprintf("die@%d", at), fmt.Sprintf("die@%d", its))
	if err := v.story(r.Intn(4)); err != nil && heard(err) == maybe {
		<-v.Exited()
		v.up()
	}
	v.let("", "")
	for _, k := range v.patches {
		k.killed = true
	}
	v.look(t, fmt.Sprintf("die@%d, runner die@%d", at, its))
}

// dieAtStart lets the daemon die in the story, and again while it repairs what
// that has left.
func (v *victim) dieAtStart(t testing.TB, r *rand.Rand, daemon int) {
	t.Helper()
	first := fmt.Sprintf("die@%d", 1+r.Intn(daemon))
	v.let(first, "")
	if err := v.story(r.Intn(4)); heard(err) != maybe {
		v.Kill()
	}
	<-v.Exited()
	where := first
	for range 2 {
		again := fmt.Sprintf("die@%d", 1+r.Intn(25))
		where += ", at start " + again
		v.let(again, "")
		v.Launch()
		if v.Ready(time.Minute) == nil { // the start has fewer points
			v.Kill()
		}
	}
	v.up()
	v.look(t, where)
}

// A8: kill -9 during the very first start.
func TestA8_SoakDieAtTheFirstStart(t *testing.T) {
	t.Parallel()
	n, r := soak(t, 5)
	for _, at := range sample(r, n, 40) {
		v := &victim{dir: t.TempDir(), ended: map[string]any{}}
		v.Host = lab.Prepare(t, lab.Options{Binary: lab.FaultBinary(t)})
		v.Launch(fmt.Sprintf("PATCHD_FAULT=die@%d", at))
		if v.Ready(time.Minute) == nil {
			v.Kill()
		}
		<-v.Exited()
		v.Up()
		v.s = v.Root()
		for _, class := range []string{"host", "PBD"} {
			v.s.One(class)
		}
		sr, _ := v.s.One("SR")
		if _, pool := v.s.One("pool"); pool["default_SR"] != sr {
			t.Errorf("die@%d: the default SR is %v", at, pool["default_SR"])
		}
		v.works(t)
		v.finish(t)
		if t.Failed() {
			t.Fatalf("die@%d", at)
		}
	}
}

// A8: an effect that fails once is told to whoever asked, with a code, and
// leaves nothing; the daemon lives on.
func TestA8_SoakFailAtEveryPoint(t *testing.T) {
	t.Parallel()
	n, r := soak(t, 20)
	v := newVictim(t, lab.Options{Dir: xfsFS(t, 2*gib)})
	daemon, runner := v.points(t)
	pid := v.Pid()
	for i, at := range sample(r, n, len(daemon)) {
		v.let(fmt.Sprintf("fail@%d", at), "")
		v.failOnce(t, fmt.Sprintf("fail@%d %s", at, daemon[at-1]), i)
	}
	for i, at := range sample(r, n/2, len(runner)) {
		v.let("", fmt.Sprintf("fail@%d", at))
		v.failOnce(t, fmt.Sprintf("runner fail@%d %s", at, runner[at-1]), i)
	}
	if v.Pid() != pid || v.dead() {
		t.Error("the daemon did not live on")
	}
	v.Restart() // closes intents that could not be closed
	v.finish(t)
}

func (v *victim) failOnce(t testing.TB, where string, variant int) {
	t.Helper()
	err := v.story(variant)
	if err != nil && heard(err) != no {
		t.Errorf("%s: an error without a code: %v", where, err)
	}
	v.let("", "")
	for _, k := range v.patches {
		k.spoilt, k.killed = true, true
	}
	v.look(t, fmt.Sprintf("%s: %v", where, err))
}

// look checks the invariants and that the main job works again.
func (v *victim) look(t testing.TB, where string) {
	t.Helper()
	bad := t.Failed()
	invariants(t, v)
	v.works(t)
	if !bad && t.Failed() {
		t.Fatalf("after %s", where)
	}
}

// lists gives the points passed since mark by the daemon, and by the runner
// that passed most.
func (v *victim) lists(mark int64) (daemon, runner []string) {
	v.T.Helper()
	pid := strconv.Itoa(v.Pid())
	for p, points := range v.passed(mark) {
		if p == pid {
			daemon = points
		} else if len(points) > len(runner) {
			runner = points
		}
	}
	return daemon, runner
}
