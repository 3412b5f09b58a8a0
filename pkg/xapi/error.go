package xapi

import (
	"errors"
	"fmt"
	"strings"
)

// Error is a failure with a stable code, as it goes over the wire: element 0
// of ErrorDescription is Code, the rest are Params. It is made where its
// meaning is known and never rewritten on its way up.
//
// The cause, when there is one, is for the log and for errors.Is; it is never
// sent to a client.
type Error struct {
	Code   string
	Params []string
	cause  error
}

// NewError makes an Error with the code and its parameters.
func NewError(code string, params ...string) *Error {
	return &Error{Code: code, Params: params}
}

// Because gives a copy of e that carries cause.
func (e *Error) Because(cause error) *Error {
	return &Error{Code: e.Code, Params: e.Params, cause: cause}
}

// Error is the code and its parameters, then the cause: for logs.
func (e *Error) Error() string {
	s := e.Code
	if len(e.Params) > 0 {
		s += " [" + strings.Join(e.Params, "; ") + "]"
	}
	if e.cause != nil {
		s += ": " + e.cause.Error()
	}
	return s
}

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.cause }

// Description is the code followed by the parameters: the form of
// ErrorDescription and of task.error_info.
func (e *Error) Description() []string {
	return append([]string{e.Code}, e.Params...)
}

// Is tells whether err is, or wraps, an Error with that code.
func Is(err error, code string) bool {
	var e *Error
	return errors.As(err, &e) && e.Code == code
}

// AsError finds the Error in err. Whatever has no code is INTERNAL_ERROR with
// the text of err.
func AsError(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return NewError(InternalError, err.Error()).Because(err)
}

// Internal makes an INTERNAL_ERROR with a text for the client.
func Internal(format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return NewError(InternalError, err.Error()).Because(errors.Unwrap(err))
}

// The codes of the wire. The comment names the parameters.
const (
	InternalError = "INTERNAL_ERROR" // message

	// Sessions and calls.
	SessionInvalid                 = "SESSION_INVALID"                    // session ref
	SessionAuthenticationFailed    = "SESSION_AUTHENTICATION_FAILED"      // user name, message
	SessionNotRegistered           = "SESSION_NOT_REGISTERED"             // session ref
	HostIsSlave                    = "HOST_IS_SLAVE"                      // address of the coordinator
	HostStillBooting               = "HOST_STILL_BOOTING"                 //
	MessageMethodUnknown           = "MESSAGE_METHOD_UNKNOWN"             // method
	MessageParameterCountMismatch  = "MESSAGE_PARAMETER_COUNT_MISMATCH"   // method, expected, received
	MessageDeprecated              = "MESSAGE_DEPRECATED"                 //
	MessageRemoved                 = "MESSAGE_REMOVED"                    //
	HandleInvalid                  = "HANDLE_INVALID"                     // class, ref
	UUIDInvalid                    = "UUID_INVALID"                       // class, uuid
	FieldTypeError                 = "FIELD_TYPE_ERROR"                   // field
	MapDuplicateKey                = "MAP_DUPLICATE_KEY"                  // class, field, uuid, key
	ValueNotSupported              = "VALUE_NOT_SUPPORTED"                // field, value, reason
	InvalidValue                   = "INVALID_VALUE"                      // field, value
	OperationNotAllowed            = "OPERATION_NOT_ALLOWED"              // reason
	OtherOperationInProgress       = "OTHER_OPERATION_IN_PROGRESS"        // class, ref[, text]
	RBACPermissionDenied           = "RBAC_PERMISSION_DENIED"             // permission, message
	TaskCancelled                  = "TASK_CANCELLED"                     // task ref
	EventsLost                     = "EVENTS_LOST"                        //
	EventFromTokenParseFailure     = "EVENT_FROM_TOKEN_PARSE_FAILURE"     // token
	EventSubscriptionParseFailure  = "EVENT_SUBSCRIPTION_PARSE_FAILURE"   // subscription
	NotImplemented                 = "NOT_IMPLEMENTED"                    // function
	UserIsNotLocalSuperuser        = "USER_IS_NOT_LOCAL_SUPERUSER"        // message
	ChangePasswordRejected         = "CHANGE_PASSWORD_REJECTED"           // message
	DBUniquenessConstraintViolated = "DB_UNIQUENESS_CONSTRAINT_VIOLATION" // table, field, value
	XenAPIMissingPlugin            = "XENAPI_MISSING_PLUGIN"              // name of the plug-in
	Timeout                        = "TIMEOUT"                            // what timed out (ours)
	MessageTooLarge                = "MESSAGE_TOO_LARGE"                  // what, limit in bytes (ours)

	// Patches.
	InvalidPatch                    = "INVALID_PATCH"                              // [] or exception text
	InvalidPatchWithLog             = "INVALID_PATCH_WITH_LOG"                     // log
	PatchAlreadyExists              = "PATCH_ALREADY_EXISTS"                       // uuid
	PatchAlreadyApplied             = "PATCH_ALREADY_APPLIED"                      // patch ref
	PatchIsApplied                  = "PATCH_IS_APPLIED"                           //
	PatchApplyFailed                = "PATCH_APPLY_FAILED"                         // output
	PatchApplyFailedBackupFiles     = "PATCH_APPLY_FAILED_BACKUP_FILES_EXIST"      // info
	CannotFindPatch                 = "CANNOT_FIND_PATCH"                          //
	CannotFetchPatch                = "CANNOT_FETCH_PATCH"                         // uuid
	NotAllowedOnOEMEdition          = "NOT_ALLOWED_ON_OEM_EDITION"                 // operation; never raised here
	PrecheckFailedUnknownError      = "PATCH_PRECHECK_FAILED_UNKNOWN_ERROR"        // patch ref, info
	PrecheckFailedISOMounted        = "PATCH_PRECHECK_FAILED_ISO_MOUNTED"          // patch ref, info
	PrecheckFailedPrerequisite      = "PATCH_PRECHECK_FAILED_PREREQUISITE_MISSING" // patch ref, uuids joined with ;
	PrecheckFailedWrongVersion      = "PATCH_PRECHECK_FAILED_WRONG_SERVER_VERSION" // patch ref, found, required
	PrecheckFailedWrongBuild        = "PATCH_PRECHECK_FAILED_WRONG_SERVER_BUILD"   // patch ref, found, required
	PrecheckFailedVMRunning         = "PATCH_PRECHECK_FAILED_VM_RUNNING"           // patch ref
	PrecheckFailedOutOfSpace        = "PATCH_PRECHECK_FAILED_OUT_OF_SPACE"         // patch ref, found, required (bytes)
	PrecheckFailedConflictPresent   = "PATCH_PRECHECK_FAILED_CONFLICT_PRESENT"     // patch ref, conflicts joined with ;
	PrecheckFailedGPGKeyNotImported = "PATCH_PRECHECK_FAILED_GPGKEY_NOT_IMPORTED"  // patch ref
	LicenceRestriction              = "LICENCE_RESTRICTION"                        // feature

	// Storage.
	DefaultSRNotFound       = "DEFAULT_SR_NOT_FOUND"       // SR ref, text
	OutOfSpace              = "OUT_OF_SPACE"               // location
	SRFull                  = "SR_FULL"                    // requested, maximum
	SRNotEmpty              = "SR_NOT_EMPTY"               //
	SRHasPBD                = "SR_HAS_PBD"                 // SR ref
	SRHasNoPBDs             = "SR_HAS_NO_PBDS"             // SR ref
	SRNotAttached           = "SR_NOT_ATTACHED"            // SR ref
	SRUnknownDriver         = "SR_UNKNOWN_DRIVER"          // type
	SRBackendFailure        = "SR_BACKEND_FAILURE"         // status, stdout, stderr
	SROperationNotSupported = "SR_OPERATION_NOT_SUPPORTED" // SR ref
	SRUUIDExists            = "SR_UUID_EXISTS"             // uuid
	SRDeviceInUse           = "SR_DEVICE_IN_USE"           // text: what was found (ours)
	VDIInUse                = "VDI_IN_USE"                 // VDI ref, operation
	VDINotAvailable         = "VDI_NOT_AVAILABLE"          // VDI ref
	VDINotManaged           = "VDI_NOT_MANAGED"            // VDI ref
	VDIMissing              = "VDI_MISSING"                // SR ref, VDI ref
	VDIReadonly             = "VDI_READONLY"               // VDI ref
	VDIIOError              = "VDI_IO_ERROR"               // device
	VDITooSmall             = "VDI_TOO_SMALL"              // VDI ref, minimum size
	VDIIncompatibleType     = "VDI_INCOMPATIBLE_TYPE"      // VDI ref, type
	VDIContentChanged       = "VDI_CONTENT_CHANGED"        // VDI ref, text (ours): a golden image is not what it was
	VDILocationMissing      = "VDI_LOCATION_MISSING"       // SR ref, location
	LocationNotUnique       = "LOCATION_NOT_UNIQUE"        // SR ref, location
	HostCannotSeeSR         = "HOST_CANNOT_SEE_SR"         // host ref, SR ref
	PBDExists               = "PBD_EXISTS"                 // SR ref, host ref, PBD ref
	CannotContactHost       = "CANNOT_CONTACT_HOST"        // host ref
	HostOffline             = "HOST_OFFLINE"               // host ref
	HostEjected             = "HOST_EJECTED"               // pool uuid (ours): this host is none of that pool any more
	ImportError             = "IMPORT_ERROR"               // message
)
