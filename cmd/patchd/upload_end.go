package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/patchd/patchd/pkg/xapi"
)

// lost finds out how an upload has ended that is not there any more: its task
// tells, else err is all that is known.
func (s *sending) lost(ctx context.Context, err error) (record, error) {
	var task record
	if terr := s.call(ctx, &task, "task.get_record", s.at.Task); terr != nil {
		if isFinal(ctx, terr) {
			return nil, err
		}
		return nil, terr
	}
	switch info, _ := task["error_info"].([]any); {
	case task.text("status") == "success":
		ref := strings.TrimSuffix(strings.TrimPrefix(task.text("result"), "<value>"), "</value>")
		return s.record(ctx, ref)
	case task.text("status") == "failure" && len(info) > 0 && info[0] == xapi.InternalError:
		return nil, errors.Join(errGone, err) // a restart has cut it off: perhaps it goes better now
	case task.text("status") == "failure" && len(info) > 0:
		params := make([]string, len(info)-1)
		for i := range params {
			params[i] = fmt.Sprint(info[i+1])
		}
		return nil, xapi.NewError(fmt.Sprint(info[0]), params...)
	case task.text("status") == "cancelled":
		return nil, xapi.NewError(xapi.TaskCancelled, s.at.Task)
	}
	return nil, err
}

// record reads the patch that was made.
func (s *sending) record(ctx context.Context, ref string) (record, error) {
	var rec record
	if err := s.call(ctx, &rec, "pool_patch.get_record", ref); err != nil {
		return nil, err
	}
	rec["ref"] = ref
	return rec, nil
}

// explain says how it goes on after an error.
func (s *sending) explain(ctx context.Context, err error) error {
	var p passing
	stopped := ctx.Err() != nil
	if !stopped && !errors.As(err, &p) {
		return err
	}
	why := "interrupted"
	if !stopped {
		why = p.Error()
	}
	text := why + ": nothing was sent"
	if s.at.Location != "" {
		text = why + ": " + s.stand(ctx)
	}
	if !stopped {
		return unreachableError{errors.New(text)}
	}
	return errors.New(text)
}

// stand tells how far the upload is, and how it goes on.
func (s *sending) stand(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	far, until := "what was sent stays there", s.at.Expires
	if p, err := s.c.look(ctx, s.at.Location); err == nil {
		if p.patch != "" || p.offset == p.length {
			return afterTheLastByte
		}
		far = fmt.Sprintf("%s of %s are there", humanize.IBytes(uint64(p.offset)), humanize.IBytes(uint64(p.length)))
		until = p.expires
	}
	if s.memory == nil {
		return far + ", but cannot be gone on with: " + noMemory
	}
	return fmt.Sprintf("%s, and the same command goes on from there until %s", far, until.UTC().Format("2006-01-02 15:04:05Z"))
}

const noMemory = "the folder ~/.local/state/patchd ($XDG_STATE_HOME) cannot be written to"
