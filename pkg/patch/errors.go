package patch

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/patchd/patchd/pkg/xapi"
)

// MaxOutput bounds, in bytes, the text of a patch's output inside an error: of
// more, the end is kept.
const MaxOutput = 16 << 10

// InfoError says what an exit status of `info` other than 0 means. Exit 0 is
// no error.
//
// Codes: INVALID_PATCH_WITH_LOG ["Bad line endings?"] for exit 2, which is what
// a shell says to carriage returns; INVALID_PATCH [text] for all others.
func InfoError(exit int, output string) error {
	switch exit {
	case 0:
		return nil
	case 2:
		return xapi.NewError(xapi.InvalidPatchWithLog, "Bad line endings?").Because(errors.New("info ended with exit status 2: " + Tail(output)))
	}
	return xapi.NewError(xapi.InvalidPatch, withOutput(fmt.Sprintf("info %s", ended(exit)), output))
}

// PrecheckError says what the end of `precheck` means (S1-36). Exit 0 is no
// error. Exit 1 must have printed error XML on stdout; output is what was
// printed on stdout and stderr together, for the text of the error.
//
// Codes: PATCH_PRECHECK_FAILED_* and LICENCE_RESTRICTION with the parameters of
// the table in docs/patch-protocol.md, INVALID_PATCH_WITH_LOG [message] for XML
// that is not of that table, PATCH_PRECHECK_FAILED_UNKNOWN_ERROR [patch ref,
// text] for every other exit status.
func PrecheckError(patchRef xapi.Ref, exit int, stdout, output string) error {
	switch exit {
	case 0:
		return nil
	case 1:
		return precheckXML(patchRef, stdout, output)
	}
	text := fmt.Sprintf("Error running prechecks on patch %s: %s", patchRef, Tail(output))
	return xapi.NewError(xapi.PrecheckFailedUnknownError, string(patchRef), text)
}

func precheckXML(patchRef xapi.Ref, stdout, output string) error {
	e, err := parseXML([]byte(stdout))
	if err == nil {
		var coded *xapi.Error
		if coded, err = precheckTable(patchRef, e); err == nil {
			return coded
		}
	}
	text := withOutput("Unknown error code or malformed xml: "+err.Error(), output)
	return xapi.NewError(xapi.InvalidPatchWithLog, text).Because(err)
}

// precheckTable turns the `error` element into its coded error; the match is
// strict.
func precheckTable(ref xapi.Ref, e *element) (*xapi.Error, error) {
	code, ok := e.attr("errorcode")
	if e.Name != "error" || !ok || len(e.Attrs) != 1 {
		return nil, errors.New(`want one element "error" whose only attribute is "errorcode"`)
	}
	params := []string{string(ref)}
	var more []string
	var err error
	switch code {
	case xapi.PrecheckFailedUnknownError, xapi.PrecheckFailedISOMounted:
		if !e.blankText() {
			return nil, errors.New("text beside the element \"info\"")
		}
		more, err = texts(e, "info")
	case xapi.PrecheckFailedPrerequisite:
		more, err = uuids(e, "prerequisite")
	case xapi.PrecheckFailedConflictPresent:
		more, err = uuids(e, "conflict")
	case xapi.PrecheckFailedWrongVersion, xapi.PrecheckFailedWrongBuild, xapi.PrecheckFailedOutOfSpace:
		more, err = texts(e, "found", "required")
	case xapi.PrecheckFailedVMRunning, xapi.PrecheckFailedGPGKeyNotImported:
		more, err = texts(e)
	case xapi.LicenceRestriction:
		params = nil
		more, err = texts(e, "feature")
	default:
		return nil, fmt.Errorf("unknown errorcode %.64q", code)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", code, err)
	}
	return xapi.NewError(code, append(params, more...)...), nil
}

// texts gives the text of the children of those names, in that order. Each
// must be there once, hold only text, and there must be no other.
func texts(e *element, names ...string) ([]string, error) {
	if len(e.Children) != len(names) {
		return nil, fmt.Errorf("%d child elements where %d are wanted (%s)", len(e.Children), len(names), strings.Join(names, ", "))
	}
	var out []string
	for _, name := range names {
		var found *element
		for _, c := range e.Children {
			if c.Name == name {
				found = c
			}
		}
		if found == nil {
			return nil, fmt.Errorf("child element %q is missing", name)
		}
		if len(found.Attrs) > 0 || len(found.Children) > 0 {
			return nil, fmt.Errorf("element %q must hold text only", name)
		}
		out = append(out, Tail(strings.TrimSpace(found.Text)))
	}
	return out, nil
}

// uuids joins the uuid attributes of the children, all of that name, with ";".
func uuids(e *element, name string) ([]string, error) {
	if len(e.Children) == 0 {
		return nil, fmt.Errorf("child element %q is missing", name)
	}
	var out []string
	for _, c := range e.Children {
		uuid, ok := c.attr("uuid")
		if c.Name != name || !ok || len(c.Attrs) != 1 || uuid == "" || strings.ContainsAny(uuid, ";\r\n") {
			return nil, fmt.Errorf("want only elements %q with the one attribute \"uuid\"", name)
		}
		out = append(out, uuid)
	}
	return []string{Tail(strings.Join(out, ";"))}, nil
}

const backupMarker = "Backup files already present"

// ApplyError says what the end of `apply` means; output is what was printed on
// stdout and stderr together. Exit 0 is no error.
//
// Codes: PATCH_APPLY_FAILED_BACKUP_FILES_EXIST [info] when the output speaks of
// "Backup files already present" and is an `error` element with the code
// PATCH_PRECHECK_FAILED_UNKNOWN_ERROR and one `info`; else PATCH_APPLY_FAILED
// [output].
func ApplyError(exit int, output string) error {
	if exit == 0 {
		return nil
	}
	if strings.Contains(output, backupMarker) {
		if e, err := parseXML([]byte(output)); err == nil {
			coded, err := precheckTable("", e)
			if err == nil && coded.Code == xapi.PrecheckFailedUnknownError {
				return xapi.NewError(xapi.PatchApplyFailedBackupFiles, coded.Params[1])
			}
		}
	}
	text := Tail(output)
	if text == "" {
		text = "apply " + ended(exit)
	}
	return xapi.NewError(xapi.PatchApplyFailed, text)
}

func ended(exit int) string {
	if exit < 0 {
		return "was ended by a signal"
	}
	return fmt.Sprintf("ended with exit status %d", exit)
}

func withOutput(text, output string) string {
	if out := Tail(output); out != "" {
		return text + ": " + out
	}
	return text
}

// Tail makes a patch's output fit for an error and for the wire: the last
// MaxOutput bytes, valid UTF-8, without NULs and without a last line feed.
func Tail(output string) string {
	cut := len(output) > MaxOutput
	if cut {
		output = output[len(output)-MaxOutput:]
		for len(output) > 0 && !utf8.RuneStart(output[0]) {
			output = output[1:]
		}
	}
	output = strings.ToValidUTF8(output, "\uFFFD")
	output = strings.TrimRight(strings.ReplaceAll(output, "\x00", ""), "\r\n")
	if len(output) > MaxOutput { // the replacement is longer than what it replaces
		output = strings.ToValidUTF8(output[len(output)-MaxOutput:], "")
	}
	if cut {
		return "…" + output
	}
	return output
}
