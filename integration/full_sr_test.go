package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/patchd/patchd/integration/lab"
	"github.com/patchd/patchd/pkg/xapi"
)

// narrow is a small SR that somebody else fills.
type narrow struct {
	*lab.Session
	t     *testing.T
	ref   string
	uuid  string
	name  string // as errors name it
	mount string
	room  *filler // takes the room of the SR itself, or of the filesystem below
	other string  // an SR with plenty of room
}

// newNarrow makes an SR of 400 MiB in an image file in dir, the default one.
func newNarrow(t *testing.T, typ, dir string) *narrow {
	t.Helper()
	n := &narrow{Session: lab.Start(t, lab.Options{}).Root(), t: t}
	n.other = defaultSR(n.Session)
	n.ref, n.uuid = makeSR(n.Session, typ, "device="+filepath.Join(dir, "sr.disk")+",size=400MiB")
	n.name = fmt.Sprintf("the %s (%s)", typ, n.uuid)
	n.mount = filepath.Join(n.H.StateDir, "mnt", n.uuid)
	n.room = newFiller(t, n.mount)
	n.Call("pool.set_default_SR", n.pool(), n.ref)
	return n
}

func (n *narrow) pool() string {
	ref, _ := n.One("pool")
	return ref
}

// emptied gives the room back, and waits until the filesystem shows it: xfs frees
// what was removed in the background.
func (n *narrow) emptied() {
	n.t.Helper()
	n.room.empty()
	until(n.t, "the room", func() bool { return free(n.t, n.mount) > 160*mib })
}

// full fails the test unless err says that this SR is full.
func (n *narrow) full(what string, err error) {
	n.t.Helper()
	n.t.Logf("%s: %v", what, err)
	wantCode(n.t, err, "OUT_OF_SPACE", n.name)
}

// put uploads a patch; at so many bytes of it at is called.
func (n *narrow) put(signed []byte, at int, do func()) error {
	n.t.Helper()
	body := io.MultiReader(bytes.NewReader(signed[:at]), &event{do: do}, bytes.NewReader(signed[at:]))
	a, err := n.Put("/pool_patch_upload", nil, body, int64(len(signed)))
	return answered(a, err, http.StatusInsufficientStorage)
}

// answered is the refusal of an answer, which must have the status.
func answered(a lab.Answer, err error, status int) error {
	if e := a.Err(); err == nil && e != nil {
		if a.Status != status {
			return fmt.Errorf("HTTP %d: %w", a.Status, e)
		}
		return e
	}
	if err == nil && a.Status >= 300 {
		err = fmt.Errorf("HTTP %d %s", a.Status, a.Body)
	}
	return err
}

// event is a reader of nothing that does something once.
type event struct{ do func() }

func (e *event) Read([]byte) (int, error) {
	if e.do != nil {
		e.do()
		e.do = nil
	}
	return 0, io.EOF
}

// promised is what `patchd sr show` says is promised, in bytes.
func (n *narrow) promised() int64 {
	n.t.Helper()
	out, errs, code := n.H.CLI("sr", "show", n.uuid, "-o", "json")
	var shown struct{ Free, Promised string }
	if err := json.Unmarshal([]byte(out), &shown); err != nil || code != 0 {
		n.t.Fatalf("sr show: %d %s %s", code, out, errs)
	}
	number(n.t, shown.Free)
	return number(n.t, shown.Promised)
}

// tidy fails the test when there is anything but the VDIs of the SR: volumes,
// maps, drafts, intents, logs, loop devices, mounts, promises. What a call has
// left to be removed after its answer gets a moment.
func (n *narrow) tidy(when string) {
	n.t.Helper()
	left := ""
	until(n.t, when+": all but the VDIs to be gone", func() bool {
		if text := n.left(); text != left {
			left = text
			n.t.Logf("%s: %s", when, left)
		}
		return left == ""
	})
	if b := n.promised(); b != 0 {
		n.t.Errorf("%s: %d bytes are promised to nobody", when, b)
	}
	if out, _, _ := n.H.CLI("doctor"); strings.Contains(out, "could not be undone") {
		n.t.Errorf("%s: %s", when, out)
	}
	n.H.CheckNothingLeft()
}

// left tells what is there that belongs to no VDI of the SR, or "".
func (n *narrow) left() string {
	want := map[string]bool{}
	for _, rec := range n.All("VDI") {
		if rec["SR"] == n.ref {
			want[rec["uuid"].(string)] = true
		}
	}
	entries, err := os.ReadDir(n.mount)
	if err != nil {
		n.t.Fatal(err)
	}
	var left []string
	images := 0
	for _, e := range entries {
		name, suffix := strings.TrimSuffix(e.Name(), filepath.Ext(e.Name())), filepath.Ext(e.Name())
		switch {
		case suffix == ".img" && want[name]:
			images++
		case suffix == ".map" && want[name]:
		case suffix == ".img" || suffix == ".map":
			left = append(left, e.Name())
		}
	}
	if images != len(want) {
		left = append(left, fmt.Sprintf("%d images of %d VDIs", images, len(want)))
	}
	if logs, _ := os.ReadDir(filepath.Join(n.H.StateDir, "uploads")); len(logs) > 0 {
		left = append(left, fmt.Sprintf("%d logs of uploads", len(logs)))
	}
	return strings.Join(append(left, loopsOf(n.t, n.mount)...), "; ")
}

// image is the file of a VDI on this SR.
func (n *narrow) image(vdi string) string {
	n.t.Helper()
	return filepath.Join(n.mount, n.Call("VDI.get_uuid", vdi).(string)+".img")
}

// sound fails the test unless the image of a VDI is what its block map says.
func (n *narrow) sound(vdi string) {
	n.t.Helper()
	if said := n.Call("patchd.vdi_verify", vdi); said != "" {
		n.t.Errorf("the image is damaged: %v", said)
	}
}

// B5: the SR runs full during an upload, a resumable upload, a copy, an import
// and an apply, because somebody else takes its room: a clear error each time,
// nothing lost, nothing left, and the next attempt with room succeeds.
func TestB5_TheSRRunsFull(t *testing.T) {
	t.Parallel()
	for _, typ := range []string{"ext", "xfs"} {
		t.Run(typ, func(t *testing.T) {
			t.Parallel()
			n := newNarrow(t, typ, t.TempDir())
			kept := vdiOf(n.Session, n.MustUpload(&lab.Patch{Pad: 2 << 20}))
			n.fullWhilePut()
			n.fullWhileResumable()
			n.fullWhileCopied()
			n.fullWhileImported()
			n.Call("PBD.unplug", pbdOf(n.Session, n.other)) // no other place for a copy
			n.fullBeforeApply()
			n.fullWhileApplied()
			n.sound(kept)
		})
	}
}

// newcomer is a patch that does not fit into what full leaves.
func newcomer(t *testing.T) (*lab.Patch, []byte) {
	p := &lab.Patch{Pad: 40 << 20}
	return p, p.Signed(t)
}

func (n *narrow) fullWhilePut() {
	_, signed := newcomer(n.t)
	n.room.leave(20 * mib)
	n.full("PUT, refused", n.put(signed, 0, nil))
	if a := n.Upload(signed); !strings.Contains(string(a.Body), "bytes are needed") || !strings.Contains(string(a.Body), "are free") {
		n.t.Errorf("the answer tells neither found nor required: %s", a.Body)
	}
	n.tidy("PUT, refused")
	n.emptied()
	n.full("PUT", n.put(signed, 12<<20, n.room.full))
	n.tidy("PUT")
	n.emptied()
	if err := n.put(signed, 0, nil); err != nil {
		n.t.Errorf("PUT with room: %v", err)
	}
	n.tidy("PUT with room")
}

func (n *narrow) fullWhileResumable() {
	p, signed := newcomer(n.t)
	c := &tusClient{Host: n.H}
	n.room.leave(20 * mib)
	res, err := c.request(http.MethodPost, "/pool_patch_uploads", "Upload-Length", fmt.Sprint(len(signed)))
	if err != nil || res.StatusCode != http.StatusInsufficientStorage {
		n.t.Errorf("a resumable upload without room: %v %v", res, err)
	}
	n.tidy("resumable upload, refused")
	n.emptied()
	c.create(len(signed))
	if b := n.promised(); b < int64(len(signed)) {
		n.t.Errorf("%d bytes are promised to an upload of %d", b, len(signed))
	}
	res = c.send(signed, 0, 12<<20, func(net.Conn) { n.room.full() })
	if res == nil || res.StatusCode != http.StatusInsufficientStorage {
		n.t.Fatalf("the resumable upload: %v", res)
	}
	var said struct {
		Code   string
		Params []string
	}
	if err := json.NewDecoder(res.Body).Decode(&said); err != nil {
		n.t.Errorf("the resumable upload: %v", err)
	}
	n.full("resumable upload", xapi.NewError(said.Code, said.Params...))
	n.tidy("resumable upload")
	n.emptied()
	c.create(len(signed))
	if res := c.send(signed, 0, 1<<60, nil); res == nil || res.StatusCode != http.StatusNoContent {
		n.t.Errorf("the resumable upload with room: %v", res)
	}
	n.tidy("resumable upload with room")
	n.Call("VDI.destroy", vdiOf(n.Session, n.Call("pool_patch.get_by_uuid", string(p.UUID)).(string)))
}

func (n *narrow) fullWhileCopied() {
	signed := (&lab.Patch{Pad: 128 << 20}).Signed(n.t)
	a, err := n.Put("/pool_patch_upload", url.Values{"sr_id": {n.other}}, bytes.NewReader(signed), int64(len(signed)))
	if err = answered(a, err, 0); err != nil {
		n.t.Fatal(err)
	}
	source := a.Record()["VDI"].(string)
	n.room.leave(20 * mib)
	_, err = n.Try("VDI.copy", source, n.ref, nullRef, nullRef)
	n.full("copy, refused", err)
	n.tidy("copy, refused")
	n.emptied()
	done := make(chan error, 1)
	go func() {
		_, err := n.Try("VDI.copy", source, n.ref, nullRef, nullRef)
		done <- err
	}()
	part := ""
	until(n.t, "the copy to begin", func() bool {
		for _, name := range inSR(n.t, n.mount, "part.*") {
			if st, err := os.Stat(name); err == nil && st.Sys().(*syscall.Stat_t).Blocks > 0 {
				part = name
			}
		}
		return part != ""
	})
	syscall.Kill(n.H.Pid(), syscall.SIGSTOP)
	taken := allocated(n.t, part)
	n.room.full()
	syscall.Kill(n.H.Pid(), syscall.SIGCONT)
	if taken > 120*mib {
		n.t.Errorf("%d bytes were copied already", taken)
	}
	n.full("copy", <-done)
	n.tidy("copy")
	n.emptied()
	made, err := n.Try("VDI.copy", source, n.ref, nullRef, nullRef)
	if err != nil {
		n.t.Fatalf("copy with room: %v", err)
	}
	n.sound(made.(string))
	n.sound(source)
	n.tidy("copy with room")
	n.Call("VDI.destroy", made)
}

func (n *narrow) fullWhileImported() {
	const size = 40 << 20
	raw := make([]byte, size)
	io.ReadFull(noise(n.t, 2*size), raw)
	put := func(at int, do func()) error {
		task := n.Call("task.create", "import", "").(string)
		body := io.MultiReader(bytes.NewReader(raw[:at]), &event{do: do}, bytes.NewReader(raw[at:]))
		if _, err := n.Put("/import_raw_vdi", url.Values{"sr_id": {n.ref}, "task_id": {task}}, body, size); err != nil {
			n.t.Logf("import: %v", err) // the outcome is that of the task
		}
		rec := n.Wait(task)
		if rec["status"] == "success" {
			return nil
		}
		var info []string
		for _, p := range rec["error_info"].([]any) {
			info = append(info, p.(string))
		}
		return xapi.NewError(info[0], info[1:]...)
	}
	n.room.leave(4 * mib)
	n.full("import, refused", put(0, nil))
	n.emptied()
	n.full("import", put(12<<20, n.room.full))
	n.tidy("import")
	n.emptied()
	if err := put(0, nil); err != nil {
		n.t.Errorf("import with room: %v", err)
	}
	n.tidy("import with room")
}

// fullBeforeApply: what an apply needs is known before anything runs.
func (n *narrow) fullBeforeApply() {
	effect := filepath.Join(n.t.TempDir(), "effect")
	p := n.MustUpload(&lab.Patch{Pad: 16 << 20, Precheck: "echo ran >> " + effect})
	n.room.leave(20 * mib)
	for _, call := range []func(*lab.Session, string) (string, error){precheck, apply} {
		_, err := call(n.Session, p)
		params := hasCode(n.t, err, "PATCH_PRECHECK_FAILED_OUT_OF_SPACE")
		found, required := number(n.t, params[1]), number(n.t, params[2])
		if params[0] != p || found <= 0 || found > 20*mib || required <= 24*mib || required > 41*mib {
			n.t.Errorf("found %d, required %d", found, required)
		}
	}
	task := n.Call("Async.pool_patch.precheck", p, n.Host()).(string)
	said := fmt.Sprint(n.Wait(task)["other_config"])
	if !strings.Contains(said, n.name) {
		n.t.Errorf("the task does not name the SR: %s", said)
	}
	if _, errs, code := n.H.CLI("patch", "precheck", n.Call("pool_patch.get_uuid", p).(string)); code != 1 || !strings.Contains(errs, n.name) {
		n.t.Errorf("the command line does not name the SR: %d %s", code, errs)
	}
	if lines(effect) != 0 || len(n.All("host_patch")) != 0 {
		n.t.Error("something ran")
	}
	n.tidy("apply, refused")
	n.emptied()
	if _, err := apply(n.Session, p); err != nil || lines(effect) != 1 {
		n.t.Errorf("apply with room: %v", err)
	}
	n.tidy("apply with room")
	n.Call("VDI.destroy", vdiOf(n.Session, p))
}

// waiting is a patch that says when it runs, waits, then writes 12 MiB into its
// scratch room and says that all is well.
type waiting struct {
	begun, fifo string
	ref, golden string
	sum         string
}

func (n *narrow) waiting() *waiting {
	dir := n.t.TempDir()
	w := &waiting{begun: filepath.Join(dir, "begun"), fifo: filepath.Join(dir, "fifo")}
	run(n.t, "mkfifo", w.fifo)
	w.ref = n.MustUpload(&lab.Patch{Pad: 16 << 20, Apply: fmt.Sprintf(
		"echo begun >> %s\nread go < %s\nhead -c 12582912 /dev/urandom > $PATCHD_SCRATCH/more\necho done\nexit 0", w.begun, w.fifo)})
	w.golden = vdiOf(n.Session, w.ref)
	w.sum = fileSum(n.t, n.image(w.golden))
	return w
}

// run applies the patch and does something while it runs.
func (w *waiting) run(n *narrow, meanwhile func()) error {
	n.t.Helper()
	before := lines(w.begun)
	done := make(chan error, 1)
	go func() {
		_, err := apply(n.Session, w.ref)
		done <- err
	}()
	until(n.t, "the patch to run", func() bool { return lines(w.begun) > before })
	if b := n.promised(); b < 12*mib {
		n.t.Errorf("%d bytes are promised to a patch that runs", b)
	}
	if out, _, _ := n.H.CLI("doctor"); !strings.Contains(out, "promised to uploads, copies and jobs") {
		n.t.Errorf("doctor tells nothing of what is promised: %s", out)
	}
	meanwhile()
	if err := os.WriteFile(w.fifo, []byte("go\n"), 0); err != nil {
		n.t.Fatal(err)
	}
	return <-done
}

// lost fails the test unless err says that the scratch room of a patch was lost
// on this SR, and the patch counts as not applied.
func (w *waiting) lost(n *narrow, err error) {
	n.t.Helper()
	n.t.Logf("apply: %v", err)
	if text := hasCode(n.t, err, "PATCH_APPLY_FAILED"); !strings.Contains(text[0], "scratch room") || !strings.Contains(text[0], n.name) {
		n.t.Errorf("%q", text)
	}
	if len(n.All("host_patch")) != 0 && n.applied(w.ref) || exists(filepath.Join(n.H.PatchDir, "applied", n.Call("pool_patch.get_uuid", w.ref).(string))) {
		n.t.Error("a patch that has lost what it wrote counts as applied")
	}
}

func (n *narrow) applied(patch string) bool {
	for _, hp := range n.All("host_patch") {
		if hp["pool_patch"] == patch {
			return true
		}
	}
	return false
}

// fullWhileApplied: the room that was promised is taken by a foreign file while
// the patch runs.
func (n *narrow) fullWhileApplied() {
	w := n.waiting()
	w.lost(n, w.run(n, n.room.full))
	n.tidy("apply")
	if fileSum(n.t, n.image(w.golden)) != w.sum {
		n.t.Error("the golden image has changed")
	}
	n.emptied()
	if err := w.run(n, func() {}); err != nil || !n.applied(w.ref) {
		n.t.Errorf("apply with room: %v", err)
	}
	n.sound(w.golden)
	n.tidy("apply with room")
}
