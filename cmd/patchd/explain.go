package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/patchd/patchd/pkg/xapi"
)

// cures says, for each code an admin is likely to meet, what it means and what
// helps. %1, %2, … are the parameters, with refs replaced by name and uuid.
var cures = map[string]string{
	xapi.SessionAuthenticationFailed: "user name or password is wrong (user %1)",
	xapi.RBACPermissionDenied:        "your role does not allow this (%1): ask a pool-admin",
	xapi.DefaultSRNotFound:           "no storage repository can take the patch: %2. Set one with `patchd sr set-default`, or name one with --sr",
	xapi.OutOfSpace:                  "there is not enough room on %1: make room there, or name another SR with --sr",
	xapi.InvalidPatch:                "the file is not a patch that this pool accepts: its signature does not hold, the key is not trusted, or its `info` makes no sense. %1 `patchd patch verify FILE` tells more; `patchd key list` shows the trusted keys",
	xapi.InvalidPatchWithLog:         "the patch could not be asked who it is: %1",
	xapi.PatchAlreadyExists:          "the pool has the patch %1 already; `patchd patch list` shows it",
	xapi.PatchAlreadyApplied:         "patch %1 is applied to this host already",
	xapi.PatchIsApplied:              "the patch is applied to a host, or being applied: it cannot be destroyed; free its room with `patchd vdi destroy`",
	xapi.CannotFindPatch:             "the patch has neither a VDI nor a file any more: upload it again",
	xapi.CannotFetchPatch:            "the host could not fetch patch %1 from the coordinator",
	xapi.PatchApplyFailed:            "the patch failed; it printed:\n%1",
	xapi.OtherOperationInProgress:    "something else is going on with %2: %3. Wait for it; `patchd task list` shows it",
	xapi.PrecheckFailedOutOfSpace:    "precheck of %1: %2 bytes are free on the storage repository, %3 are needed",
	xapi.PrecheckFailedPrerequisite:  "precheck of %1: these patches must be applied first: %2",
	xapi.PrecheckFailedWrongVersion:  "precheck of %1: the host has version %2, the patch needs %3",
	xapi.PrecheckFailedWrongBuild:    "precheck of %1: the host has build %2, the patch needs %3",
	xapi.PrecheckFailedVMRunning:     "precheck of %1: virtual machines run on the host; shut them down or move them",
	xapi.PrecheckFailedUnknownError:  "precheck of %1 failed: %2",
	xapi.PrecheckFailedISOMounted:    "precheck of %1: an ISO is mounted: %2; eject it",
	xapi.VDIInUse:                    "the disk image %1 is in use (%2): wait until it is not",
	xapi.VDIContentChanged:           "the image of patch %1 is not what was uploaded: %2. Destroy its VDI and upload the patch again",
	xapi.SRNotEmpty:                  "the storage repository still holds disk images: destroy them first",
	xapi.SRHasPBD:                    "the storage repository %1 is still plugged: unplug it first",
	xapi.SRNotAttached:               "the storage repository %1 is not plugged on this host",
	xapi.HostCannotSeeSR:             "host %1 does not reach the storage repository %2 that holds the patch",
	xapi.TaskCancelled:               "the task was cancelled",
	xapi.HostIsSlave:                 "this host is not the coordinator: talk to %1",
	xapi.HandleInvalid:               "there is no %1 %2 any more",
	xapi.UUIDInvalid:                 "there is no %1 with the uuid %2",
}

// explained is a failure of the pool in words, with its code.
type explained struct {
	text string
	err  *xapi.Error
}

func (e *explained) Error() string { return e.text + " (" + e.err.Code + ")" }
func (e *explained) Unwrap() error { return e.err }

// explain puts a code into words that name the objects and the cure.
func explain(ctx context.Context, c *client, err error) error {
	var e *xapi.Error
	if err == nil || !errors.As(err, &e) {
		return err
	}
	var done *explained
	if errors.As(err, &done) {
		return err
	}
	params := make([]string, len(e.Params))
	for i, p := range e.Params {
		params[i] = nameRef(ctx, c, p)
	}
	text, ok := cures[e.Code]
	if !ok {
		return &explained{strings.TrimSpace(e.Code + " " + strings.Join(params, "; ")), e}
	}
	for i := 9; i > 0; i-- {
		value := ""
		if i <= len(params) {
			value = params[i-1]
		}
		text = strings.ReplaceAll(text, fmt.Sprintf("%%%d", i), value)
	}
	return &explained{strings.TrimSpace(strings.ReplaceAll(text, "  ", " ")), e}
}

// nameRef turns a ref into "name (uuid)" where the object still exists.
func nameRef(ctx context.Context, c *client, p string) string {
	if c == nil || !xapi.Ref(p).Valid() {
		return p
	}
	for _, class := range []string{"pool_patch", "VDI", "SR", "host", "task"} {
		var rec record
		if c.call(ctx, &rec, class+".get_record", p) == nil {
			return strings.TrimSpace(fmt.Sprintf("%s (%s)", rec.text("name_label"), rec.text("uuid")))
		}
	}
	return p
}
