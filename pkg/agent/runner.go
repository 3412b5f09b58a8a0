package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/fault"
	"github.com/patchd/patchd/pkg/patch"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// Run is what a runner shall do: run.json.
type Run struct {
	Kind     pool.JobKind `json:"kind"`
	Job      xapi.UUID    `json:"job"`
	PatchRef xapi.Ref     `json:"patch_ref"`
	Patch    xapi.UUID    `json:"patch"`
	Host     xapi.UUID    `json:"host"`
	Image    string       `json:"image"`             // the private image, writable
	SR       string       `json:"sr,omitempty"`      // that holds it, as errors name it
	VDIRef   xapi.Ref     `json:"vdi_ref,omitempty"` // of the golden image it was made of

	// Check asks for the image to be verified; it is false only when the golden
	// image was verified before and has not changed since. The image must equal
	// the block map in the journal folder, which has the digest Map. Then, unless
	// Attested tells what such an image holds, digest and signature of the
	// payload are verified against KeysDir and Pinned. Without a map only that is done.
	Check bool   `json:"check"`
	Map   string `json:"map,omitempty"`
	// Equal tells that each block of the image was checked while it was copied.
	Equal     bool               `json:"equal,omitempty"`
	Attested  patch.Attestations `json:"attested,omitempty"`
	Digest    string             `json:"digest"`
	Signature patch.Signature    `json:"signature"`
	KeysDir   string             `json:"keys_dir"`
	Pinned    []string           `json:"pinned,omitempty"`

	// KeepFree is the room in bytes that must stay free on the filesystem of
	// the image while the patch runs; 0: none.
	KeepFree int64 `json:"keep_free,omitempty"`

	PatchDir string   `json:"patch_dir"`
	Timeouts Timeouts `json:"timeouts"`
}

// Timeouts bound the verbs of a patch.
type Timeouts struct {
	Precheck time.Duration `json:"precheck"`
	Apply    time.Duration `json:"apply"`
	Grace    time.Duration `json:"grace"` // between TERM and KILL
}

// DefaultTimeouts are 10 minutes for precheck and 6 hours for apply.
var DefaultTimeouts = Timeouts{Precheck: 10 * time.Minute, Apply: 6 * time.Hour, Grace: 10 * time.Second}

// patchGroup is the control group of the patch itself, runnerGroup that of its
// runner: the patch can be killed while the runner lives to tell.
func patchGroup(job xapi.UUID) string  { return "patch-" + string(job) }
func runnerGroup(job xapi.UUID) string { return "runner-" + string(job) }

// RunRunner is the whole of `patchd runner DIR`: it reads run.json in dir,
// carries it out, and writes result.json as its last act. Its error is for the
// log: whoever reads the journal sees the same.
func RunRunner(ctx context.Context, d dom0.Dom0, dir string) error {
	var run Run
	if err := readJSON(filepath.Join(dir, fileRun), &run); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(dir, fileResult)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	room, err := reserveResult(dir)
	if err != nil {
		return err
	}
	r := &runner{dom0: d, dir: dir, run: run, mnt: filepath.Join(dir, dirMount)}
	res := r.execute(ctx)
	res.Finished = time.Now()
	if err := fault.Point("runner.result"); err != nil {
		return errors.Join(err, room.Close())
	}
	text, err := json.Marshal(res)
	if err != nil {
		return err
	}
	if err := writeResult(room, dir, text); err != nil {
		return err
	}
	return fault.Point("runner.result.done")
}

type runner struct {
	dom0 dom0.Dom0
	dir  string
	mnt  string
	run  Run
	out  *output
}

// execute attaches, mounts, verifies, runs, unmounts and detaches.
func (r *runner) execute(ctx context.Context) (res Result) {
	out, err := newOutput(filepath.Join(r.dir, fileOutput))
	if err != nil {
		res.Error = xapi.AsError(err).Description()
		return res
	}
	r.out = out
	var undo xapi.Undo
	err = r.steps(ctx, &undo, &res)
	if err != nil && ctx.Err() != nil {
		err = xapi.NewError(xapi.TaskCancelled).Because(err)
	}
	if uerr := undo.Run(ctx); uerr != nil {
		res.Cleanup = uerr.Error()
	}
	if oerr := out.Close(); oerr != nil { // what the patch did counts, not what is kept of its words
		res.Cleanup = strings.TrimPrefix(res.Cleanup+"; ", "; ") + "write the patch's output: " + oerr.Error()
	}
	if err != nil {
		res.Error, res.Why = xapi.AsError(err).Description(), err.Error()
	}
	return res
}

func (r *runner) steps(ctx context.Context, undo *xapi.Undo, res *Result) error {
	attested, err := r.checkImage(ctx)
	if err != nil {
		return err
	}
	dev, err := r.dom0.Attach(ctx, r.run.Image, false)
	if err != nil {
		return fmt.Errorf("attach the image of patch %s: %w", r.run.Patch, err)
	}
	undo.Push("detach", func(context.Context) error { return dev.Close() })
	err = r.dom0.Mount(ctx, dom0.Mount{
		Source: dev.Path(), Target: r.mnt, Type: "ext4", Options: "errors=remount-ro,noinit_itable",
	})
	if errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.EUCLEAN) {
		return r.changed("the image holds no ext4 filesystem").Because(err)
	}
	if err != nil {
		return fmt.Errorf("mount the image of patch %s: %w", r.run.Patch, err)
	}
	undo.Push("unmount", func(ctx context.Context) error { return r.dom0.Unmount(ctx, r.mnt) })
	if r.run.Check && !attested {
		if err := r.check(ctx); err != nil {
			return err
		}
	}
	res.Checked = true
	if err := os.Mkdir(filepath.Join(r.mnt, "scratch"), 0o700); err != nil {
		return fmt.Errorf("make the scratch room on %s: %w", r.where(), err)
	}
	if err := r.precheck(ctx, res); err != nil || r.run.Kind == pool.JobPrecheck {
		return err
	}
	return r.apply(ctx, res)
}

// check reads the payload through the mount: what is verified is what will be
// executed. Codes: VDI_CONTENT_CHANGED, INVALID_PATCH.
func (r *runner) check(ctx context.Context) error {
	keys, err := patch.LoadKeyring(r.run.KeysDir)
	if err != nil {
		return err
	}
	if err := r.alone(); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(r.mnt, vdi.FileName), os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return r.changed("the image holds no file called " + vdi.FileName).Because(err)
	}
	defer f.Close()
	digest, signer, err := patch.VerifySigner(ctx, f, r.run.Signature, keys, r.run.Pinned)
	if digest != "" && digest != r.run.Digest {
		return r.changed(fmt.Sprintf("the payload has SHA-256 %s, the record says %s", digest, r.run.Digest)).Because(err)
	}
	if err == nil {
		r.attest(signer)
	}
	return err
}

// alone makes sure that the image holds the payload as a plain file, and
// nothing else that a patch could take for its own: a link could lead to what
// changes after the check, and a file beside the payload is not signed.
func (r *runner) alone() error {
	entries, err := os.ReadDir(r.mnt)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() == vdi.FileName && e.Type().IsRegular() || e.Name() == "lost+found" && e.IsDir() {
			continue
		}
		return r.changed(fmt.Sprintf("the image holds %.64q, which is not of the upload", e.Name()))
	}
	return nil
}

func (r *runner) precheck(ctx context.Context, res *Result) error {
	end, stdout, err := r.verb(ctx, "precheck", r.run.Timeouts.Precheck)
	if err != nil {
		return err
	}
	res.Output = r.out.Text()
	if end.TimedOut {
		return xapi.NewError(xapi.PrecheckFailedUnknownError, string(r.run.PatchRef),
			fmt.Sprintf("precheck did not end within %s and was killed: %s", r.run.Timeouts.Precheck, r.out.Text()))
	}
	if err := patch.PrecheckError(r.run.PatchRef, exitOf(end), stdout, r.out.Text()); err != nil {
		if text := r.unsound(ctx); text != "" {
			return xapi.NewError(xapi.PrecheckFailedUnknownError, string(r.run.PatchRef), text).Because(err)
		}
		return err
	}
	if text, err := r.sound(ctx); err != nil {
		return xapi.NewError(xapi.PrecheckFailedUnknownError, string(r.run.PatchRef), text).Because(err)
	}
	return nil
}

func (r *runner) apply(ctx context.Context, res *Result) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := fault.Point("runner.begun"); err != nil {
		return err
	}
	if err := writeFile(filepath.Join(r.dir, fileBegun), nil, 0o600); err != nil {
		return err
	}
	res.Begun = true
	if err := fault.Point("runner.begun.done"); err != nil {
		return err
	}
	r.out.Restart()
	end, _, err := r.verb(ctx, "apply", r.run.Timeouts.Apply)
	if err != nil {
		return err
	}
	res.Output = r.out.Text()
	if end.TimedOut {
		return xapi.NewError(xapi.PatchApplyFailed,
			fmt.Sprintf("apply did not end within %s and was killed: %s", r.run.Timeouts.Apply, r.out.Text()))
	}
	if err := patch.ApplyError(exitOf(end), r.out.Text()); err != nil {
		if text := r.unsound(ctx); text != "" {
			return xapi.NewError(xapi.PatchApplyFailed, text).Because(err)
		}
		return err
	}
	if text, err := r.sound(ctx); err != nil {
		return xapi.NewError(xapi.PatchApplyFailed, text).Because(err)
	}
	return nil
}

// exitOf is the exit status as a shell would tell it: 128 + n for a signal.
func exitOf(end dom0.Result) int {
	if end.Signal != 0 {
		return 128 + end.Signal
	}
	return end.ExitCode
}

// verb runs the patch with one argument. Everything it prints goes to the
// output; stdout is what precheck printed there, capped.
func (r *runner) verb(ctx context.Context, verb string, timeout time.Duration) (dom0.Result, string, error) {
	progress, err := newProgress(filepath.Join(r.dir, fileProgress))
	if err != nil {
		return dom0.Result{}, "", err
	}
	stdout := &capped{max: maxStdout}
	var out io.Writer = r.out // one pipe with stderr: the order in which it was written
	if verb == "precheck" {
		out = r.out.tee(stdout)
	}
	full := r.guard(ctx)
	end, err := r.dom0.Run(ctx, dom0.Cmd{
		Path: filepath.Join(r.mnt, vdi.FileName), Args: []string{verb}, Dir: r.mnt, Env: r.environment(verb),
		Stdout: out, Stderr: r.out, ExtraFiles: []dom0.File{progress.w},
		Group: patchGroup(r.run.Job), Timeout: timeout, Grace: r.run.Timeouts.Grace,
	})
	if perr := progress.close(); err == nil {
		err = perr
	}
	if full() {
		return end, "", r.filled(verb)
	}
	if err != nil {
		return end, "", fmt.Errorf("run %s of patch %s: %w", verb, r.run.Patch, err)
	}
	if ctx.Err() != nil {
		return end, "", context.Cause(ctx)
	}
	return end, stdout.String(), nil
}

// environment is all that a patch sees: nothing of the daemon's own.
func (r *runner) environment(verb string) []string {
	return []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=/root", "LANG=C", "LC_ALL=C",
		"PATCHD_VERB=" + verb,
		"PATCHD_PATCH_UUID=" + string(r.run.Patch),
		"PATCHD_HOST_UUID=" + string(r.run.Host),
		"PATCHD_SCRATCH=" + filepath.Join(r.mnt, "scratch"),
		"PATCHD_ROOT=/",
		"PATCHD_MODE=live",
		"PATCHD_PATCH_DIR=" + r.run.PatchDir,
		"PATCHD_APPLIED_DIR=" + appliedDir(r.run.PatchDir),
	}
}
