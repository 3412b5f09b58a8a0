package lab

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// Work is a patch that leaves a line on each host that it is applied to, and
// does on chosen hosts what it is told. All of it is files in one folder.
type Work struct {
	*Patch
	T   testing.TB
	dir string

	mu     sync.Mutex
	asked  map[string]int  // more than once, by host uuid
	unsure map[string]bool // hosts where it may have been killed
}

// Order is what a Work does on one host instead of succeeding.
type Order string

// The orders. Those of apply are looked at when it begins, but for Hold.
const (
	Hold   Order = "hold"   // apply waits as long as the order stands
	Fail   Order = "fail"   // apply fails before the effect
	Refuse Order = "refuse" // precheck refuses
	Die    Order = "die"    // apply kills itself before the effect
	Orphan Order = "orphan" // apply kills its runner before the effect
	Late   Order = "late"   // apply kills its runner behind the effect
)

// NewWork makes such a patch of p, whose own precheck and apply run where
// nothing was ordered.
func NewWork(t testing.TB, p Patch) *Work {
	t.Helper()
	w := &Work{Patch: &p, T: t, dir: t.TempDir(), asked: map[string]int{}, unsure: map[string]bool{}}
	shell := func(s string) string {
		if s == "" {
			return ":"
		}
		return s
	}
	p.Precheck = fmt.Sprintf(`d=%s h=$PATCHD_HOST_UUID
echo >> $d/prechecked.$h
if [ -e $d/refuse.$h ]; then
	echo '<error errorcode="PATCH_PRECHECK_FAILED_UNKNOWN_ERROR"><info>told to refuse</info></error>'
	exit 1
fi
%s`, w.dir, shell(p.Precheck))
	p.Apply = fmt.Sprintf(`d=%s h=$PATCHD_HOST_UUID
echo "$h $(cat /proc/sys/kernel/random/boot_id) $$ $(date +%%s.%%N)" >> $d/begun.$h
while [ -e $d/hold.$h ]; do sleep 0.02; done
if [ -e $d/fail.$h ]; then echo told to fail; exit 1; fi
if [ -e $d/die.$h ]; then kill -9 $$; fi
if [ -e $d/orphan.$h ]; then kill -9 $PPID; sleep 60; fi
%s
echo "$h $(cat /proc/sys/kernel/random/boot_id) $$ $(date +%%s.%%N)" >> $d/effect.$h
sync $d/effect.$h
if [ -e $d/late.$h ]; then kill -9 $PPID; sleep 60; fi
echo done on $h`, w.dir, shell(p.Apply))
	return w
}

func (w *Work) file(what, host string) string { return filepath.Join(w.dir, what+"."+host) }

// Tell gives hosts an order, until Relent.
func (w *Work) Tell(o Order, hosts ...*Host) {
	w.T.Helper()
	for _, h := range hosts {
		if err := os.WriteFile(w.file(string(o), h.UUID()), nil, 0o600); err != nil {
			w.T.Fatal(err)
		}
		if o == Die || o == Orphan || o == Late {
			w.Unsure(h)
		}
	}
}

// Relent takes an order back.
func (w *Work) Relent(o Order, hosts ...*Host) {
	w.T.Helper()
	for _, h := range hosts {
		if err := os.Remove(w.file(string(o), h.UUID())); err != nil {
			w.T.Fatal(err)
		}
	}
}

// Asked tells that the patch was explicitly asked for once more on a host.
func (w *Work) Asked(h *Host) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.asked[h.UUID()]++
}

// Unsure tells that patch or runner was killed on a host: how the apply ended
// may be unknown.
func (w *Work) Unsure(hosts ...*Host) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, h := range hosts {
		w.unsure[h.UUID()] = true
	}
}

// Begun is how often apply has begun on a host, Effects how often it came as
// far as its effect, Prechecked how often precheck ran.
func (w *Work) Begun(h *Host) int      { return w.lines("begun", h) }
func (w *Work) Effects(h *Host) int    { return w.lines("effect", h) }
func (w *Work) Prechecked(h *Host) int { return w.lines("prechecked", h) }

// Span is when the last apply began on a host, and when it came to its effect;
// zero when it did not.
func (w *Work) Span(h *Host) (begun, effect time.Time) {
	w.T.Helper()
	return w.last("begun", h), w.last("effect", h)
}

func (w *Work) last(what string, h *Host) time.Time {
	w.T.Helper()
	b, _ := os.ReadFile(w.file(what, h.UUID()))
	f := strings.Fields(string(b))
	if len(f) == 0 {
		return time.Time{}
	}
	seconds, nanos, _ := strings.Cut(f[len(f)-1], ".")
	sec, err1 := strconv.ParseInt(seconds, 10, 64)
	nsec, err2 := strconv.ParseInt(nanos, 10, 64)
	if err := errors.Join(err1, err2); err != nil {
		w.T.Fatal(err)
	}
	return time.Unix(sec, nsec)
}

func (w *Work) lines(what string, h *Host) int {
	b, _ := os.ReadFile(w.file(what, h.UUID()))
	return bytes.Count(b, []byte("\n"))
}

// stamped tells whether the host has the stampfile.
func (w *Work) stamped(h *Host) bool {
	_, err := os.Stat(filepath.Join(h.PatchDir, "applied", string(w.UUID)))
	return err == nil
}

// check compares what was done to a host with its stampfile and the state of
// the host_patch: "absent", "applied", "unknown", or a text.
func (w *Work) check(h *Host, state string) {
	w.T.Helper()
	w.mu.Lock()
	asked, unsure := 1+w.asked[h.UUID()], w.unsure[h.UUID()]
	w.mu.Unlock()
	begun, effects, stamp := w.Begun(h), w.Effects(h), w.stamped(h)
	bad := func(text string) {
		w.T.Helper()
		w.T.Errorf("patch %s on host %s: %s (host_patch %s, stampfile %v, begun %d times, effect %d times, asked %d times)",
			w.UUID, h.UUID(), text, state, stamp, begun, effects, asked)
	}
	if begun > asked {
		bad("it ran again without being asked")
	}
	switch state {
	case "applied":
		if !stamp || effects == 0 {
			bad("it is said to be applied")
		}
		if effects > 1 && !unsure {
			bad("it is applied twice")
		}
	case "unknown":
		if stamp || !unsure {
			bad("its end should be known")
		}
	case "absent":
		if stamp || effects > 0 && !unsure {
			bad("the record has forgotten it")
		}
	default:
		bad("it has not ended")
	}
}
