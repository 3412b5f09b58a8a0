package thincli

import (
	"context"
	"errors"
	"strings"

	"github.com/patchd/patchd/pkg/xapi"
)

// failure is how one code is told to a person: a sentence, and what its
// parameters are called.
type failure struct {
	text   string
	params []string
}

// explainCode shows an API failure: a known code by its sentence and one line
// a parameter, an unknown one as it is.
func (r *run) explainCode(e *xapi.Error) {
	if e.Code == xapi.SessionAuthenticationFailed && r.session == "" {
		text := "Authentication failed"
		if len(e.Params) > 0 && e.Params[0] == "" {
			text = "Username/password must be specified"
		}
		_ = r.conn.stderr(text)
		_ = r.conn.stderr("For usage run: 'xe help'")
		return
	}
	values := make([]string, len(e.Params))
	for i, p := range e.Params {
		values[i] = r.refName(p)
	}
	f, known := failures[e.Code]
	if !known {
		_ = r.conn.write(newFrame(tagError).string(e.Code).strings(values).bytes())
		return
	}
	lines := []string{f.text}
	for i, v := range values {
		name := "<extra>"
		if i < len(f.params) {
			name = f.params[i]
		}
		lines = append(lines, name+": "+v)
	}
	_ = r.conn.stderr(strings.Join(lines, "\n"))
}

// namedClasses are where the object of a reference is looked for.
var namedClasses = []string{"pool_patch", "host", "SR", "VDI", "PBD", "host_patch", "task", "pool"}

// refName is "uuid (name)" of the object that s refers to; any other text, and
// a reference to nothing, is as it was.
func (r *run) refName(s string) string {
	if !xapi.Ref(s).Valid() || r.session == "" || s == string(r.session) {
		return s
	}
	ctx, cancel := r.cleanup()
	defer cancel()
	for _, class := range namedClasses {
		v, err := r.h.call(ctx, r.session, class+".get_record", []any{s})
		if err != nil {
			continue // not of this class
		}
		rec := toRecord(v)
		name := toText(rec["uuid"])
		if label := toText(rec["name_label"]); label != "" {
			name += " (" + label + ")"
		}
		return name
	}
	return s
}

// ended tells whether the command stopped because of its client or its server.
func (r *run) ended(reason error) bool { return errors.Is(context.Cause(r.ctx), reason) }

// failures are the codes that have a sentence. The names of the parameters are
// in the order of the wire.
var failures = map[string]failure{
	xapi.InternalError: {"The server failed in a way it did not expect.", []string{"message"}},
	clientError:        {"The client did not transfer its file.", nil},

	xapi.SessionInvalid:                {"The session has ended or never was: log in again.", []string{"handle"}},
	xapi.SessionAuthenticationFailed:   {"The user name or the password is wrong.", []string{"username", "message"}},
	xapi.HostIsSlave:                   {"This host is not the coordinator of the pool: ask the host named below.", []string{"Master IP address"}},
	xapi.HostStillBooting:              {"The server is still starting: try again shortly.", nil},
	xapi.MessageMethodUnknown:          {"The server does not know this call.", []string{"method"}},
	xapi.MessageParameterCountMismatch: {"The call has the wrong number of parameters.", []string{"method", "expected", "received"}},
	xapi.MessageDeprecated:             {"This call is no longer offered.", nil},
	xapi.MessageRemoved:                {"This call has been removed.", nil},
	xapi.HandleInvalid:                 {"There is no such object (any more).", []string{"class", "handle"}},
	xapi.UUIDInvalid:                   {"There is no object with this uuid.", []string{"type", "uuid"}},
	xapi.FieldTypeError:                {"A value has the wrong type.", []string{"field"}},
	xapi.MapDuplicateKey:               {"The map already has this key.", []string{"type", "param_name", "uuid", "key"}},
	xapi.ValueNotSupported:             {"The value is not supported.", []string{"field", "value", "reason"}},
	xapi.InvalidValue:                  {"The value is not valid.", []string{"field", "value"}},
	xapi.OperationNotAllowed:           {"The operation is not allowed now.", []string{"reason"}},
	xapi.OtherOperationInProgress:      {"Another operation uses the object.", []string{"class", "object", "reason"}},
	xapi.RBACPermissionDenied:          {"Your role does not allow this.", []string{"permission", "message"}},
	xapi.TaskCancelled:                 {"The task was cancelled.", []string{"task"}},
	xapi.NotImplemented:                {"The server does not offer this function.", []string{"function"}},
	xapi.UserIsNotLocalSuperuser:       {"Only the local superuser may do this.", []string{"msg"}},
	xapi.ChangePasswordRejected:        {"The password was not changed.", []string{"msg"}},
	xapi.Timeout:                       {"It took too long.", []string{"what"}},
	xapi.MessageTooLarge:               {"The request is too large.", []string{"what", "limit"}},

	xapi.InvalidPatch:                    {"The file is not a valid signed patch.", []string{"reason"}},
	xapi.InvalidPatchWithLog:             {"The file is not a valid patch; what it printed follows.", []string{"log"}},
	xapi.PatchAlreadyExists:              {"The pool has this patch already.", []string{"uuid"}},
	xapi.PatchAlreadyApplied:             {"The host has this patch already.", []string{"patch"}},
	xapi.PatchIsApplied:                  {"A host has this patch, so it cannot be removed.", nil},
	xapi.PatchApplyFailed:                {"The patch could not be applied; what it printed follows.", []string{"output"}},
	xapi.PatchApplyFailedBackupFiles:     {"The patch could not be applied: backup files of an earlier one are in the way.", []string{"output"}},
	xapi.CannotFindPatch:                 {"The patch is no longer on the server: upload it again.", nil},
	xapi.CannotFetchPatch:                {"The host could not fetch the patch.", []string{"uuid"}},
	xapi.PrecheckFailedUnknownError:      {"The checks of the patch failed.", []string{"patch", "info"}},
	xapi.PrecheckFailedISOMounted:        {"The checks of the patch failed: the tools ISO is in use.", []string{"patch", "info"}},
	xapi.PrecheckFailedPrerequisite:      {"The checks of the patch failed: it needs other patches first.", []string{"patch", "prerequisite_patch_uuid_list"}},
	xapi.PrecheckFailedWrongVersion:      {"The checks of the patch failed: it is for another version of the server.", []string{"patch", "found_version", "required_version"}},
	xapi.PrecheckFailedWrongBuild:        {"The checks of the patch failed: it is for another build of the server.", []string{"patch", "found_build", "required_build"}},
	xapi.PrecheckFailedVMRunning:         {"The checks of the patch failed: virtual machines are running on the host.", []string{"patch"}},
	xapi.PrecheckFailedOutOfSpace:        {"The checks of the patch failed: the host has too little room.", []string{"patch", "found_space", "required_required"}},
	xapi.PrecheckFailedConflictPresent:   {"The checks of the patch failed: patches that it conflicts with are there.", []string{"patch", "conflicts"}},
	xapi.PrecheckFailedGPGKeyNotImported: {"The checks of the patch failed: its key is not trusted.", []string{"patch"}},
	xapi.LicenceRestriction:              {"The licence does not allow this.", []string{"feature"}},

	xapi.DefaultSRNotFound:       {"No SR can take it.", []string{"sr", "reason"}},
	xapi.OutOfSpace:              {"There is not enough room.", []string{"location"}},
	xapi.SRFull:                  {"The SR is full.", []string{"requested", "maximum"}},
	xapi.SRNotEmpty:              {"The SR still has disk images.", nil},
	xapi.SRHasPBD:                {"The SR is still plugged into a host.", []string{"sr"}},
	xapi.SRHasNoPBDs:             {"No host is linked to the SR.", []string{"sr"}},
	xapi.SRNotAttached:           {"The SR is not plugged.", []string{"sr", "reason"}},
	xapi.SRUnknownDriver:         {"There is no driver for SRs of this type.", []string{"driver"}},
	xapi.SRBackendFailure:        {"The driver of the SR failed.", []string{"status", "stdout", "stderr"}},
	xapi.SROperationNotSupported: {"The driver of the SR cannot do this.", []string{"sr"}},
	xapi.SRUUIDExists:            {"There is an SR with this uuid.", []string{"uuid"}},
	xapi.SRDeviceInUse:           {"Another SR uses this place.", nil},
	xapi.VDIInUse:                {"The disk image is in use.", []string{"vdi", "operation"}},
	xapi.VDINotAvailable:         {"The disk image cannot be reached from here.", []string{"vdi"}},
	xapi.VDINotManaged:           {"The disk image is not managed by the pool.", []string{"vdi"}},
	xapi.VDIMissing:              {"The disk image is no longer on its SR.", []string{"sr", "vdi"}},
	xapi.VDIReadonly:             {"The disk image must not be written.", []string{"vdi"}},
	xapi.VDIIOError:              {"The disk image could not be read or written.", []string{"device"}},
	xapi.VDITooSmall:             {"The disk image is too small.", []string{"vdi", "minimum size"}},
	xapi.VDIIncompatibleType:     {"The disk image has the wrong type for this.", []string{"vdi", "type"}},
	xapi.VDIContentChanged:       {"The disk image is not what it was when the patch was uploaded.", []string{"vdi", "reason"}},
	xapi.VDILocationMissing:      {"There is no disk image at this place.", []string{"sr", "location"}},
	xapi.LocationNotUnique:       {"There is a disk image at this place already.", []string{"sr", "location"}},
	xapi.HostCannotSeeSR:         {"The host cannot reach the SR.", []string{"host", "sr"}},
	xapi.PBDExists:               {"The host is linked to the SR already.", []string{"sr", "host", "pbd"}},
	xapi.CannotContactHost:       {"The host does not answer.", []string{"host"}},
	xapi.HostOffline:             {"The host is not there.", []string{"host"}},
	xapi.ImportError:             {"The data could not be imported.", []string{"msg"}},
}
