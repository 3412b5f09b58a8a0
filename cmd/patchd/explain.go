package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/patchd/patchd/pkg/xapi"
)

// trouble is a refusal of the pool for people.
type trouble struct {
	code, meaning, cure string
}

// troubles says, for each code an admin is likely to meet, what it means and
// what helps. %1, %2, … are the parameters, with refs replaced by name and
// uuid. The same table stands in docs/operations.md.
var troubles = []trouble{
	{xapi.SessionAuthenticationFailed, "user name or password is wrong (user %1)", "`patchd user passwd NAME` over the socket of the host gives a new one"},
	{xapi.SessionInvalid, "the session has ended", "log in again"},
	{xapi.RBACPermissionDenied, "the role of this user does not allow %1", "ask a pool-admin, or have the role changed"},
	{xapi.ChangePasswordRejected, "the new password is refused: %1", "choose another"},
	{xapi.HostIsSlave, "this host is not the coordinator", "talk to %1"},
	{xapi.CannotContactHost, "nobody answers at %1: %2", "see whether patchd runs there, and whether address and port are those of its TLS listener"},
	{xapi.HostStillBooting, "patchd is starting, and repairs what an earlier process left", "try again in a moment"},
	{xapi.DefaultSRNotFound, "no storage repository can take the patch: %2", "set one with `patchd sr set-default SR`, or name one with --sr"},
	{xapi.OutOfSpace, "there is not enough room on %1", "make room there, or name another SR with --sr"},
	{xapi.InvalidPatch, "the file is not a patch that this host accepts: its signature does not hold, its key is not trusted there, or its `info` makes no sense. %1", "`patchd patch verify FILE` tells more, `patchd key list` on that host shows the keys it trusts, `patchd key trust FILE` there adds some"},
	{xapi.InvalidPatchWithLog, "the patch could not be asked who it is: %1", "the one who wrote it must build it again"},
	{xapi.PatchAlreadyExists, "the pool has the patch %1 already", "`patchd patch show` shows it"},
	{xapi.PatchAlreadyApplied, "the host has the patch already", "nothing is to be done"},
	{xapi.PatchIsApplied, "a host has the patch, or is getting it: its record stays", "`patchd vdi destroy` frees the room it takes"},
	{xapi.CannotFindPatch, "the patch has neither a disk image nor a file any more", "upload it again"},
	{xapi.CannotFetchPatch, "the host could not fetch the patch %1 from the coordinator", "upload it into a VDI, or see in the log of the host why"},
	{xapi.HostCannotSeeSR, "the host %1 does not reach the storage repository %2 that holds the patch", "plug the SR there (`patchd sr plug`), or copy the VDI to one that is (`patchd vdi copy`)"},
	{xapi.PatchApplyFailed, "the patch itself failed", "what it did until then stays done, and it may be applied again. It printed:\n%1"},
	{xapi.PatchApplyFailedBackupFiles, "files of an earlier run of the patch are in the way: %1", "look at them, remove them and apply again"},
	{xapi.PrecheckFailedUnknownError, "the precheck of %1 refuses: %2", ""},
	{xapi.PrecheckFailedPrerequisite, "before %1 other patches must be applied: %2", "apply them first"},
	{xapi.PrecheckFailedConflictPresent, "%1 does not go with patches that are applied: %2", "it cannot be applied to this host"},
	{xapi.PrecheckFailedWrongVersion, "%1 is for another version: the host has %2, it needs %3", "get the patch for this version"},
	{xapi.PrecheckFailedWrongBuild, "%1 is for another build: the host has %2, it needs %3", "get the patch for this build"},
	{xapi.PrecheckFailedGPGKeyNotImported, "%1 needs a key that the host has not imported", "import the key it names"},
	{xapi.PrecheckFailedOutOfSpace, "%1 needs %3 bytes, and %2 are free", "make room on the filesystem it names"},
	{xapi.PrecheckFailedVMRunning, "virtual machines run on the host, and %1 needs it empty", "shut them down or move them"},
	{xapi.PrecheckFailedISOMounted, "%1 cannot go on while an ISO is mounted: %2", "eject it"},
	{xapi.OtherOperationInProgress, "something else is going on with %1 %2: %3", "wait for it (`patchd task list`)"},
	{xapi.OperationNotAllowed, "that is not possible now: %1", ""},
	{xapi.VDIInUse, "the disk image %1 is in use: %2", "wait until it is not"},
	{xapi.VDINotAvailable, "the image of %1 is not where it should be", "`patchd sr scan` compares records and files, `patchd doctor` tells what is missing"},
	{xapi.VDIContentChanged, "the disk image %1 is not what was uploaded: %2", "`patchd vdi repair` takes good blocks from another VDI; where none has them, destroy it and upload the patch again"},
	{xapi.VDIReadonly, "the disk image %1 is read-only", "work on a copy"},
	{xapi.VDITooSmall, "the disk image %1 is too small: %2", "give a larger size"},
	{xapi.SRNotEmpty, "the storage repository still holds disk images", "destroy them first (`patchd vdi list`)"},
	{xapi.SRHasPBD, "the storage repository %1 is still linked to a host", "unplug it first (`patchd sr unplug`)"},
	{xapi.SRHasNoPBDs, "no host is linked to the storage repository %1", "`patchd sr introduce` links one"},
	{xapi.PBDExists, "the storage repository %1 is linked to the host %2 already", "`patchd sr plug` plugs it"},
	{xapi.SRNotAttached, "the storage repository %1 is not plugged on this host. %2", "`patchd doctor` tells why; `patchd patch stage` brings the image of a patch to a host"},
	{xapi.SRDeviceInUse, "the place is taken: %1", "`patchd sr introduce` takes up an SR that is there"},
	{xapi.SRUnknownDriver, "there is no storage of type %1", "`patchd sr create --help` shows the types"},
	{xapi.SROperationNotSupported, "storage of this kind cannot do that (%1)", "copy instead of clone"},
	{xapi.SRBackendFailure, "the storage failed: %2 %3", "the log of the host has the cause"},
	{xapi.ValueNotSupported, "%1 cannot be %2: %3", ""},
	{xapi.InvalidValue, "%1 cannot be %2", "correct it"},
	{xapi.UUIDInvalid, "there is no %1 with the uuid %2", "`patchd %1 list` shows what there is"},
	{xapi.HandleInvalid, "there is no %1 %2 any more", "somebody else has removed it"},
	{xapi.TaskCancelled, "the task was cancelled", "nothing of it is left"},
	{xapi.HostOffline, "the host %1 does not answer", "see whether its patchd runs"},
	{xapi.DBUniquenessConstraintViolated, "%3 is taken already", "choose another name"},
	{xapi.MessageTooLarge, "the request is larger than the server takes", "send less at once"},
	{xapi.InternalError, "patchd itself failed: %1", "the log of the host has the cause; please report it"},
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
	if e.Code == xapi.UUIDInvalid && len(params) > 0 {
		params[0] = groupOf(params[0])
	}
	text := strings.Join(params, "; ")
	for _, t := range troubles {
		if t.code == e.Code {
			text = fill(t.meaning, params)
			if told := strings.Contains(text, "upload the patch again"); t.cure != "" && !told {
				text += ": " + fill(t.cure, params)
			}
		}
	}
	switch {
	case e.Code == xapi.SessionAuthenticationFailed && len(params) > 1 && params[0] == "":
		text = params[1] // a join token, which is nobody's password
	case e.Code == xapi.OtherOperationInProgress && len(params) > 2 && params[0] == "run":
		text = fill("something else is going on: %3: wait for it (`patchd run list`), or cancel it (`patchd run cancel`)", params)
	case text == "":
		text = "refused"
	}
	if e.Code == xapi.PrecheckFailedOutOfSpace && e.Unwrap() != nil {
		text += ". " + strings.TrimSpace(e.Unwrap().Error())
	}
	// What stood before the code in err, such as "upload of x:", stays.
	before, _, _ := strings.Cut(err.Error(), e.Error())
	return &explained{before + text, e}
}

// fill puts parameters into a text and drops what is left of those that are
// missing.
func fill(text string, params []string) string {
	for i := 4; i > 0; i-- {
		value := ""
		if i <= len(params) {
			value = strings.TrimSpace(params[i-1])
		}
		text = strings.ReplaceAll(text, fmt.Sprintf("%%%d", i), value)
	}
	for _, gap := range [][2]string{{" be :", " be empty:"}, {"  ", " "}, {" ()", ""}, {" :", ":"}} {
		text = strings.ReplaceAll(text, gap[0], gap[1])
	}
	return strings.TrimRight(text, " :.")
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
