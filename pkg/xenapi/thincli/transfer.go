package thincli

import (
	"context"
	"errors"
	"time"

	"github.com/patchd/patchd/pkg/xapi"
)

// clientError is the code of a transfer that failed at the client's side
// before the server could say anything about it. It has no parameters.
const clientError = "CLIENT_ERROR"

// A transfer is a file that the client puts or gets by a second connection. A
// task stands for it: the handler of that connection completes the task, and
// this side waits for both, the task and the client's own answer.

func patchUpload(r *run) error {
	query := ""
	if _, ok := r.line.params.lookup("sr-uuid"); ok {
		sr, err := r.byUUID("SR", "sr-uuid")
		if err != nil {
			return err
		}
		query = "&sr_id=" + sr
	}
	file := r.line.params.get("file-name")
	result, err := r.transfer("patch-upload "+file, func(task string) *frame {
		return newFrame(tagHTTPPut).string(file).
			string("/pool_patch_upload?session_id=" + string(r.session) + query + "&task_id=" + task)
	})
	if err != nil {
		return err
	}
	return r.printUUID("pool_patch", resultRef(result))
}

func vdiImport(r *run) error { return r.vdiTransfer("vdi-import", tagHTTPPut, "/import_raw_vdi") }

func vdiExport(r *run) error {
	if _, ok := r.line.params.lookup("base"); ok {
		return refusef("Only whole images are exported: leave out base")
	}
	return r.vdiTransfer("vdi-export", tagHTTPGet, "/export_raw_vdi")
}

func (r *run) vdiTransfer(label string, tag int, path string) error {
	if f, ok := r.line.params.lookup("format"); ok && f != "raw" {
		return refusef("Format %q is not known: the only one is raw", f)
	}
	vdi, err := r.byUUID("VDI", "uuid")
	if err != nil {
		return err
	}
	file := r.line.params.get("filename")
	_, err = r.transfer(label+" "+file, func(task string) *frame {
		return newFrame(tag).string(file).
			string(path + "?session_id=" + string(r.session) + "&task_id=" + task + "&vdi=" + vdi + "&format=raw")
	})
	return err
}

// maxLabel bounds a task's name: the file name in it is the client's.
const maxLabel = 256

// transfer makes a task, sends the frame that make gives for it and waits
// until the task and the client have finished. The task is destroyed at the
// end. A client that fails, falls silent or leaves while it still has
// something to send gets its task cancelled; once it has said OK, the work
// goes on without it.
func (r *run) transfer(label string, make func(task string) *frame) (result string, err error) {
	task, err := r.callText("task.create", label[:min(len(label), maxLabel)], "")
	if err != nil {
		return "", err
	}
	ctx, stop := context.WithCancel(r.ctx)
	finished := r.watch(ctx, task)
	defer func() {
		stop()
		<-finished.closed
	}()
	req, err := r.conn.ask(make(task), false)
	defer req.drop()
	ok := false
	if err == nil {
		ok, err = r.answer(req, finished)
	}
	switch {
	case err != nil:
		r.abandon(task, "")
		return "", err
	case !ok:
		return "", r.failedAtClient(task, finished)
	}
	select {
	case <-finished.closed:
	case <-ctx.Done():
		// The work goes on, and its task stays for whoever asks for it.
		return "", context.Cause(r.ctx)
	}
	return r.outcome(task, finished.err)
}

// answer waits for the client's last word. A task that failed while the client
// has not noticed yet does not wait longer than the client may idle.
func (r *run) answer(req *request, finished *watch) (ok bool, err error) {
	var idle <-chan time.Time
	reset := func() {}
	// Older clients send no heartbeats: nothing can be read from their silence
	// until the task has ended.
	if r.minor >= heartbeatMinor {
		t := time.NewTimer(r.h.o.IdleTimeout)
		defer t.Stop()
		idle, reset = t.C, func() { t.Reset(r.h.o.IdleTimeout) }
	}
	ended := finished.closed
	for {
		select {
		case a := <-req.answers:
			if a.tag != tagWait {
				return a.tag == tagOK, nil
			}
			reset()
		case <-ended:
			ended = nil
			t := time.NewTimer(r.h.o.SettleTimeout + r.h.o.LingerTimeout)
			defer t.Stop()
			idle, reset = t.C, func() {}
		case <-idle:
			return false, nil
		case <-r.ctx.Done():
			return false, context.Cause(r.ctx)
		}
	}
}

// failedAtClient gives the reason why a transfer failed: the task's own when
// it has one soon, else that the client did not manage.
func (r *run) failedAtClient(task string, finished *watch) error {
	settle := time.NewTimer(r.h.o.SettleTimeout)
	defer settle.Stop()
	select {
	case <-finished.closed:
		if finished.err != nil {
			break // the watch ended, not the task
		}
		_, err := r.outcome(task, nil)
		if err == nil {
			err = xapi.NewError(clientError)
		}
		return err
	case <-settle.C:
	case <-r.ctx.Done():
	}
	r.abandon(task, "the client did not transfer its file")
	return xapi.NewError(clientError)
}

// abandon cancels and removes a task whose client will send nothing more.
func (r *run) abandon(task, why string) {
	ctx, cancel := r.cleanup()
	defer cancel()
	log := r.log.WithField("task", task)
	if why != "" {
		log = log.WithField("reason", why)
	}
	log.Info("transfer abandoned")
	for _, method := range []string{"task.cancel", "task.destroy"} {
		_, err := r.h.call(ctx, r.session, method, []any{task})
		// One that has just finished cannot be cancelled, and is gone once destroyed.
		if err != nil && !xapi.Is(err, xapi.OperationNotAllowed) && !xapi.Is(err, xapi.HandleInvalid) {
			log.WithError(err).WithField("call", method).Warn("task of a transfer stays behind")
		}
	}
}

// outcome reads how a finished task ended, and destroys it.
func (r *run) outcome(task string, watched error) (result string, err error) {
	if watched != nil {
		return "", watched
	}
	ctx, cancel := r.cleanup() // the client may be gone, the task has to go
	defer cancel()
	v, err := r.h.call(ctx, r.session, "task.get_record", []any{task})
	if err != nil {
		return "", err
	}
	if _, err := r.h.call(ctx, r.session, "task.destroy", []any{task}); err != nil {
		r.log.WithError(err).WithField("task", task).Warn("task of a transfer stays behind")
	}
	rec := toRecord(v)
	if toText(rec["status"]) == "success" {
		return toText(rec["result"]), nil
	}
	if info := toList(rec["error_info"]); len(info) > 0 {
		return "", xapi.NewError(info[0], info[1:]...)
	}
	if s := toText(rec["status"]); s == "cancelled" || s == "cancelling" {
		return "", xapi.NewError(xapi.TaskCancelled, task)
	}
	return "", xapi.Internal("the task of the transfer failed without a reason")
}

// watch is a task that is waited for.
type watch struct {
	closed chan struct{} // closed when the task has finished or cannot be watched
	err    error         // why it cannot be watched; read after closed
}

// watch waits in the background until a task is no longer pending.
func (r *run) watch(ctx context.Context, task string) *watch {
	w := &watch{closed: make(chan struct{})}
	go func() {
		defer close(w.closed)
		w.err = r.events(ctx, []any{"task/" + task}, func(e map[string]any) bool {
			if toText(e["ref"]) != task {
				return false
			}
			if toText(e["operation"]) == "del" {
				return true
			}
			status := toText(toRecord(e["snapshot"])["status"])
			return status != "pending" && status != "cancelling"
		})
	}()
	return w
}

// events feeds every event of the classes to found, the present objects first,
// until it returns true.
func (r *run) events(ctx context.Context, classes []any, found func(map[string]any) bool) error {
	token := ""
	for {
		v, err := r.h.call(ctx, r.session, "event.from", []any{classes, token, r.h.o.EventTimeout.Seconds()})
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if xapi.Is(err, xapi.EventsLost) && token != "" {
			token = ""
			continue
		}
		if err != nil {
			return err
		}
		batch := toRecord(v)
		events, _ := batch["events"].([]any)
		for _, e := range events {
			if found(toRecord(e)) {
				return nil
			}
		}
		if token = toText(batch["token"]); token == "" {
			return errors.New("event.from gave no token")
		}
	}
}
