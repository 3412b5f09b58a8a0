package lvm

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/xapi"
)

// flag is set once.
type flag struct{ v atomic.Bool }

func (f *flag) is() bool { return f.v.Load() }

func isTrash(lv string) bool { return strings.HasPrefix(lv, trashPrefix) }

// Destroy removes a volume. LVM keeps one that is open: it gets another name
// then, stays readable for whoever has it open, and goes later.
func (r *repository) Destroy(ctx context.Context, n sr.Name) error {
	leave, err := r.enter(ctx, n)
	if err != nil {
		return err
	}
	defer leave()
	r.emptyTrash(ctx)
	_, err = r.tools.lvm(ctx, "lvremove", "--yes", "--force", r.lv(n))
	if err == nil {
		return nil
	}
	ctx = context.WithoutCancel(ctx)
	have, lerr := r.list(ctx)
	if lerr == nil && !have[logicalName(n)] {
		return nil
	}
	trash := trashPrefix + strings.ReplaceAll(string(xapi.NewUUID()), "-", "")
	if _, rerr := r.tools.lvm(ctx, "lvrename", r.group, logicalName(n), trash); rerr != nil {
		return r.coded(ctx, fmt.Errorf("%w; %w", err, rerr), "destroy a volume of")
	}
	r.turn.trash = true
	return nil
}

// emptyTrash removes what was destroyed while it was open and is open no
// more. What cannot be removed waits for the next call.
func (r *repository) emptyTrash(ctx context.Context) {
	if !r.turn.trash || sr.Alive(ctx) != nil {
		return
	}
	rows, err := r.volumes(ctx)
	if err != nil {
		return
	}
	left := false
	for _, row := range rows {
		if !isTrash(row["lv_name"]) {
			continue
		}
		if row["lv_device_open"] == "open" {
			left = true
			continue
		}
		_, err := r.tools.lvm(ctx, "lvremove", "--yes", "--force", r.group+"/"+row["lv_name"])
		left = left || err != nil
	}
	r.turn.trash = left
}

// Detach deactivates the volumes when nobody in this process has the SR
// attached any more. While one is in use the SR stays attached, and
// errors.Is(err, syscall.EBUSY) holds.
func (r *repository) Detach(ctx context.Context) error {
	release, err := r.turn.take(ctx)
	if err != nil {
		return err
	}
	defer release()
	if r.closed.is() {
		return nil
	}
	if r.turn.users > 1 {
		r.closed.v.Store(true)
		r.turn.users--
		return nil
	}
	r.emptyTrash(ctx)
	rows, err := r.volumes(ctx)
	if err != nil {
		return r.coded(ctx, err, "detach")
	}
	for _, row := range rows {
		if row["lv_device_open"] == "open" && !isTrash(row["lv_name"]) {
			return r.coded(ctx, fmt.Errorf("%w: volume %s is open", unix.EBUSY, row["lv_name"]), "detach")
		}
	}
	if !r.turn.trash {
		if _, err := r.tools.lvm(ctx, "vgchange", "--activate", "n", r.group); err != nil {
			return r.coded(ctx, err, "detach")
		}
	}
	r.closed.v.Store(true)
	r.turn.users--
	return nil
}
