package thincli_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/xapi"
	"github.com/patchd/patchd/pkg/xenapi/thincli/xetest"
)

const payload = "the bytes of a signed patch, long enough to be sent in more than one block"

// tasksLeft are the tasks that a transfer has left behind.
func (w *world) tasksLeft() []string { return w.of("task") }

func TestPatchUploadPrintsTheUUID(t *testing.T) {
	w := newWorld(t, short())
	w.file("fix.xsupdate", payload)
	expect(t, w.xe("patch-upload", "file-name=fix.xsupdate"), xetest.Result{Stdout: uuid(35) + "\n"})
	if string(w.uploaded) != payload {
		t.Errorf("the server got %q", w.uploaded)
	}
	if !strings.HasPrefix(w.query, "session_id=OpaqueRef:") || !strings.Contains(w.query, "&task_id=OpaqueRef:") || strings.Contains(w.query, "sr_id") {
		t.Errorf("the query was %q", w.query)
	}
	if left := w.tasksLeft(); len(left) != 0 {
		t.Errorf("tasks left: %q", left)
	}
	if w.open() != 0 {
		t.Error("the session was left open")
	}
}

func TestPatchUploadOnAChosenSR(t *testing.T) {
	w := newWorld(t, short())
	furnish(w)
	w.file("fix", payload)
	expect(t, w.xe("patch-upload", "file-name="+filepath.Join(w.dir, "fix"), "sr-uuid="+uuid(3), "--minimal"),
		xetest.Result{Stdout: uuid(35) + "\n"})
	if !strings.Contains(w.query, "&sr_id="+ref(3)+"&") {
		t.Errorf("the query was %q", w.query)
	}
	got := w.xe("patch-upload", "file-name=fix", "sr-uuid="+uuid(99))
	expect(t, got, xetest.Result{Exit: 1, Stderr: "There is no object with this uuid.\ntype: SR\nuuid: " + uuid(99) + "\n"})
}

func TestUploadFailures(t *testing.T) {
	client := "The client did not transfer its file.\n"
	cases := []struct {
		name   string
		change func(w *world, c *xetest.Client)
		stderr string
	}{
		{"the server rejects the patch", func(w *world, _ *xetest.Client) { w.verdict = xapi.NewError(xapi.PatchAlreadyExists, uuid(8)) },
			"The pool has this patch already.\nuuid: " + uuid(8) + "\n"},
		{"the server rejects the request", func(w *world, _ *xetest.Client) { w.refuse = 403 }, client},
		{"the file is not there", func(w *world, c *xetest.Client) { os.Remove(filepath.Join(w.dir, "fix")) },
			"Operation failed. Error: file 'fix' does not exist\n"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, short())
			w.file("fix", payload)
			cl := w.client("patch-upload", "file-name=fix")
			c.change(w, cl)
			expect(t, w.run(cl), xetest.Result{Exit: 1, Stderr: c.stderr})
			w.until("no task and no session is left", func() bool { return len(w.tasksLeft()) == 0 && w.open() == 0 })
		})
	}
}

// A client that dies while it still has something to send gets its task
// cancelled; after its OK the work goes on without it.
func TestAClientThatDiesDuringAnUpload(t *testing.T) {
	steps := []struct {
		step      xetest.Step
		cancelled bool
	}{
		{xetest.Commanded, true}, {xetest.PutDialed, true}, {xetest.PutAsked, true},
		{xetest.PutStatus, true}, {xetest.PutHalf, true}, {xetest.PutDone, true},
		{xetest.OKSent, false},
	}
	for _, s := range steps {
		t.Run("after "+string(s.step), func(t *testing.T) {
			w := newWorld(t, short())
			w.verify = make(chan struct{})
			w.file("fix", payload)
			c := w.client("patch-upload", "file-name=fix")
			c.Block = 16
			c.Hook = func(at xetest.Step) error {
				if at == s.step {
					return errors.New("die")
				}
				return nil
			}
			if got := w.run(c); got.Exit != -1 {
				t.Fatalf("the client lived: %+v", got)
			}
			w.until("the session ends", func() bool { return w.open() == 0 })
			if got := w.called("task.cancel"); got != s.cancelled {
				t.Errorf("cancelled: %v, want %v; calls %q", got, s.cancelled, w.log())
			}
			if left := len(w.tasksLeft()); (left == 0) != s.cancelled {
				t.Errorf("%d tasks are left", left)
			}
			close(w.verify)
			if !s.cancelled {
				<-w.received
				if string(w.uploaded) != payload {
					t.Errorf("the server got %q", w.uploaded)
				}
			}
		})
	}
}

// A client that dies outside of a transfer ends nothing but itself.
func TestAClientThatDiesBeforeOrAfterItsCommand(t *testing.T) {
	for _, s := range []xetest.Step{xetest.Posted, xetest.HelloRead, xetest.HelloSent, xetest.PrintShown} {
		t.Run("after "+string(s), func(t *testing.T) {
			w := newWorld(t, short())
			furnish(w)
			c := w.client("sr-list")
			c.Hook = func(at xetest.Step) error {
				if at == s {
					return errors.New("die")
				}
				return nil
			}
			if got := w.run(c); got.Exit != -1 {
				t.Fatalf("the client lived: %+v", got)
			}
			w.handler.Close() // waits for the conversation
			if w.open() != 0 {
				t.Error("the session was left open")
			}
		})
	}
	t.Run("while a call runs", func(t *testing.T) {
		w := newWorld(t, short())
		furnish(w)
		hold := make(chan struct{})
		defer close(hold)
		w.holds["pool_patch.pool_apply"] = hold
		die := make(chan struct{})
		c := w.client("patch-pool-apply", "uuid="+uuid(20))
		c.Hook = func(at xetest.Step) error {
			if at == xetest.HelloSent {
				<-die
				return errors.New("die")
			}
			return nil
		}
		go func() {
			<-w.entered
			close(die)
		}()
		if got := w.run(c); got.Exit != -1 {
			t.Fatalf("the client lived: %+v", got)
		}
		w.until("the session ends", func() bool { return w.open() == 0 })
	})
}

func TestHeartbeatsAreAccepted(t *testing.T) {
	w := newWorld(t, short())
	w.file("fix", strings.Repeat(payload, 50))
	c := w.client("patch-upload", "file-name=fix")
	c.Block, c.Heartbeat = 64, time.Nanosecond
	expect(t, w.run(c), xetest.Result{Stdout: uuid(35) + "\n"})
}

func TestATransferWithoutHeartbeatsIsGivenUp(t *testing.T) {
	stall := func(t *testing.T, version [2]int) (*world, *xetest.Client, chan struct{}) {
		o := short()
		o.IdleTimeout = 30 * time.Millisecond
		w := newWorld(t, o)
		w.file("fix", payload)
		c := w.client("patch-upload", "file-name=fix")
		c.Version = version
		resume := make(chan struct{})
		c.Hook = func(at xetest.Step) error {
			if at == xetest.PutStatus {
				<-resume
			}
			return nil
		}
		return w, c, resume
	}
	t.Run("a client that can send them", func(t *testing.T) {
		w, c, resume := stall(t, [2]int{0, 2})
		go func() {
			w.until("the task is cancelled", func() bool { return w.called("task.destroy") })
			close(resume)
		}()
		expect(t, w.run(c), xetest.Result{Exit: 1, Stderr: "The client did not transfer its file.\n"})
		if !w.called("task.cancel") {
			t.Errorf("calls %q", w.log())
		}
	})
	t.Run("an older client cannot", func(t *testing.T) {
		w, c, resume := stall(t, [2]int{0, 1})
		time.AfterFunc(100*time.Millisecond, func() { close(resume) })
		expect(t, w.run(c), xetest.Result{Stdout: uuid(35) + "\n"})
	})
}

func TestVDIImportAndExport(t *testing.T) {
	w := newWorld(t, short())
	furnish(w)
	w.file("disk.raw", payload)
	expect(t, w.xe("vdi-import", "uuid="+uuid(4), "filename=disk.raw", "format=raw"), xetest.Result{})
	if string(w.uploaded) != payload || !strings.HasSuffix(w.query, "&vdi="+ref(4)+"&format=raw") {
		t.Errorf("the server got %q with %q", w.uploaded, w.query)
	}
	expect(t, w.xe("vdi-export", "uuid="+uuid(4), "filename=out.raw"), xetest.Result{})
	if got, err := os.ReadFile(filepath.Join(w.dir, "out.raw")); err != nil || string(got) != "content of the image" {
		t.Errorf("the client got %q, %v", got, err)
	}
	got := w.xe("vdi-export", "uuid="+uuid(4), "filename=out.raw")
	if got.Exit != 1 || !strings.Contains(got.Stderr, "file exists") {
		t.Errorf("a file of the client's was overwritten: %+v", got)
	}
	w.until("no task is left but the old one", func() bool { return slices.Equal(w.tasksLeft(), []string{ref(30)}) })
}

func TestATaskThatWasCancelledElsewhere(t *testing.T) {
	w := newWorld(t, short())
	w.verify = make(chan struct{})
	w.file("fix", payload)
	c := w.client("patch-upload", "file-name=fix")
	c.Hook = func(at xetest.Step) error {
		if at == xetest.OKSent {
			w.edit(w.tasksLeft()[0], object{"status": "cancelled", "error_info": []any{}})
		}
		return nil
	}
	got := w.run(c)
	close(w.verify)
	if got.Exit != 1 || !strings.HasPrefix(got.Stderr, "The task was cancelled.\ntask: OpaqueRef:") {
		t.Errorf("got %+v", got)
	}
}
