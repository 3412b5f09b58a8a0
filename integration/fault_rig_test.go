package integration

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
	"github.com/patchd/patchd/pkg/xapi"
)

// answer is what a client knows of something it asked for.
type answer int

const (
	no    answer = iota // not asked, or refused
	maybe               // the connection broke before the answer
	yes
)

// heard makes an answer of the error of a call: a refusal is a no, a broken
// connection a maybe.
func heard(err error) answer {
	var refusal *xapi.Error
	switch {
	case err == nil:
		return yes
	case errors.As(err, &refusal):
		return no
	}
	return maybe
}

// told is what a client was told of one patch.
type told struct {
	*lab.Patch
	signed                                []byte
	digest                                string // of the payload
	effect                                string // a file that gets a line each time the patch is applied
	asked                                 int    // applies
	uploaded, applied, cleaned, destroyed answer
	golden, goldenMap                     string // SHA-256 of the image, and of its block map
	killed                                bool   // its runner: how the apply ended may be unknown
	spoilt                                bool   // its apply may have failed after it changed the host
}

// victim is a host that is made to fail, and what its clients were told.
type victim struct {
	*lab.Host
	s        *lab.Session
	dir      string
	patches  []*told        // those to look at
	old      []*told        // those looked at before
	ended    map[string]any // tasks that have ended, and how
	plan     string         // of the daemon
	runner   string         // of runners
	trace    string
	restarts int
	where    func(vdi string) string // the file of a VDI; nil: on the first SR
}

// newVictim starts a host with fault injection in it. dir may be "".
func newVictim(t testing.TB, o lab.Options) *victim {
	t.Helper()
	v := &victim{dir: t.TempDir(), ended: map[string]any{}}
	v.plan, v.runner, v.trace = filepath.Join(v.dir, "plan"), filepath.Join(v.dir, "runner-plan"), filepath.Join(v.dir, "trace")
	o.Binary = lab.FaultBinary(t)
	o.Env = append(o.Env, "PATCHD_FAULT_PLAN="+v.plan, "PATCHD_FAULT_RUNNER_PLAN="+v.runner, "PATCHD_FAULT_TRACE="+v.trace)
	v.Host = lab.Start(t, o)
	v.s = v.Root()
	return v
}

// let sets what the daemon and the runners are to die or fail of; "" is nothing.
func (v *victim) let(daemon, runner string) {
	v.T.Helper()
	for path, text := range map[string]string{v.plan: daemon, v.runner: runner} {
		if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
			v.T.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			v.T.Fatal(err)
		}
	}
}

// dead tells whether the daemon has ended.
func (v *victim) dead() bool {
	select {
	case <-v.Exited():
		return true
	default:
		return false
	}
}

// up starts the daemon again, without faults.
func (v *victim) up() {
	v.T.Helper()
	v.let("", "")
	http.DefaultClient.CloseIdleConnections()
	v.Up()
	v.restarts++
}

// mark is where the trace ends just now.
func (v *victim) mark() int64 {
	st, err := os.Stat(v.trace)
	if err != nil {
		return 0
	}
	return st.Size()
}

// passed lists the points passed since mark, by process.
func (v *victim) passed(mark int64) map[string][]string {
	v.T.Helper()
	b, err := os.ReadFile(v.trace)
	if err != nil {
		v.T.Fatal(err)
	}
	points := map[string][]string{}
	for _, line := range strings.Split(strings.TrimSpace(string(b[mark:])), "\n") {
		if f := strings.Fields(line); len(f) == 3 {
			points[f[0]] = append(points[f[0]], f[2])
		}
	}
	return points
}

// fresh makes a patch whose every apply leaves a trace on the host.
func (v *victim) fresh(p lab.Patch) *told {
	v.T.Helper()
	k := &told{Patch: &p, effect: filepath.Join(v.dir, "effect-"+string(xapi.NewUUID()))}
	p.Apply = fmt.Sprintf("echo applied >> %s; sync %s; echo work > $PATCHD_SCRATCH/work\n%s", k.effect, k.effect, p.Apply)
	payload := p.Payload()
	sum := sha256.Sum256(payload)
	k.digest, k.signed = hex.EncodeToString(sum[:]), lab.DefaultKey(v.T).Sign(v.T, payload)
	v.patches = append(v.patches, k)
	return k
}

// upload puts the patch, by a task of the client's own or without.
func (v *victim) upload(k *told, byTask bool) error {
	query := url.Values{}
	var task string
	if byTask {
		ref, err := v.s.Try("task.create", "upload", "")
		if err != nil {
			return err
		}
		task = ref.(string)
		query.Set("task_id", task)
	}
	a, err := v.s.Put("/pool_patch_upload", query, bytes.NewReader(k.signed), int64(len(k.signed)))
	if e := a.Err(); err == nil && e != nil {
		err = e
	}
	if err == nil && a.Status >= 300 {
		err = xapi.Internal("HTTP %d %s", a.Status, a.Body)
	}
	if err == nil && byTask {
		_, err = v.follow(task)
	}
	k.uploaded = heard(err)
	return err
}

// follow waits for a task like a client that may lose its connection.
func (v *victim) follow(task string) (string, error) {
	for {
		rec, err := v.s.Try("task.get_record", task)
		if err != nil {
			if !v.dead() && heard(err) == maybe {
				time.Sleep(20 * time.Millisecond)
				continue
			}
			return "", err
		}
		r := rec.(map[string]any)
		switch r["status"] {
		case "success":
			return fmt.Sprint(r["result"]), nil
		case "failure", "cancelled":
			var info []string
			for _, p := range r["error_info"].([]any) {
				info = append(info, p.(string))
			}
			if len(info) == 0 {
				info = []string{"TASK_CANCELLED"}
			}
			return "", xapi.NewError(info[0], info[1:]...)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func (v *victim) ref(k *told) (string, error) {
	ref, err := v.s.Try("pool_patch.get_by_uuid", string(k.UUID))
	text, _ := ref.(string)
	return text, err
}

// ways an apply can be asked for.
var ways = []string{"pool_patch.apply", "Async.pool_patch.apply", "pool_patch.pool_apply", "Async.pool_patch.pool_apply"}

func (v *victim) apply(k *told, way string) error {
	ref, err := v.ref(k)
	if err != nil {
		return err
	}
	params := []any{ref}
	if strings.HasSuffix(way, ".apply") {
		params = append(params, v.hostRef())
	}
	k.asked++
	out, err := v.s.Try(way, params...)
	if err == nil && strings.HasPrefix(way, "Async.") {
		_, err = v.follow(out.(string))
	}
	k.applied = max(k.applied, heard(err))
	return err
}

// hostRef is the ref of the only host, also while the daemon is down.
func (v *victim) hostRef() string {
	all, err := v.s.Try("host.get_all")
	if refs, ok := all.([]any); err == nil && ok && len(refs) == 1 {
		return refs[0].(string)
	}
	return ""
}

// story does the main job with two patches, and stops at the first thing that
// does not work. Its variants ask in different ways.
func (v *victim) story(variant int) error {
	a, b := v.fresh(lab.Patch{Pad: 3000, Precheck: "echo fine"}), v.fresh(lab.Patch{Pad: 100})
	steps := []func() error{
		func() error { return v.upload(a, variant%2 == 1) },
		func() error {
			ref, err := v.ref(a)
			if err == nil {
				_, err = v.s.Try("pool_patch.precheck", ref, v.hostRef())
			}
			return err
		},
		func() error { return v.apply(a, ways[variant%len(ways)]) },
		func() error { return v.clean(a) },
		func() error { return v.upload(b, variant%2 == 0) },
		func() error { return v.destroy(b) },
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func (v *victim) clean(k *told) error {
	ref, err := v.ref(k)
	if err != nil {
		return err
	}
	_, err = v.s.Try("pool_patch.pool_clean", ref)
	if k.cleaned = heard(err); k.cleaned == no {
		k.cleaned = maybe // it may have come half way
	}
	return err
}

func (v *victim) destroy(k *told) error {
	ref, err := v.ref(k)
	if err != nil {
		return err
	}
	_, err = v.s.Try("pool_patch.destroy", ref)
	k.destroyed = heard(err)
	k.cleaned = maybe // a refusal may come after VDI or file have gone
	return err
}
