package sr

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"syscall"
	"unicode"
	"unicode/utf8"

	"github.com/patchd/patchd/pkg/xapi"
)

// maxConfigValue bounds one value of device_config, in bytes.
const maxConfigValue = 4096

// CheckConfig holds device against what a driver knows: an unknown key, a
// missing one, or a value that is no plain text of at most 4096 bytes gives
// VALUE_NOT_SUPPORTED [field, value, reason].
func CheckConfig(info Info, device map[string]string) error {
	for _, key := range slices.Sorted(maps.Keys(device)) {
		if _, known := info.Config[key]; !known {
			known := slices.Sorted(maps.Keys(info.Config))
			return BadConfig(key, device[key], fmt.Sprintf("an SR of type %s knows only: %s", info.Type, strings.Join(known, ", ")))
		}
		if !plainText(device[key]) {
			return BadConfig(key, device[key], fmt.Sprintf("the value must be plain text of at most %d bytes", maxConfigValue))
		}
	}
	for _, key := range info.Required {
		if device[key] == "" {
			return BadConfig(key, "", fmt.Sprintf("an SR of type %s needs it: %s", info.Type, info.Config[key]))
		}
	}
	return nil
}

// BadConfig is the refusal of one entry of device_config: VALUE_NOT_SUPPORTED
// ["device_config:<key>", value, reason]. Key and value are cut to 256 bytes.
func BadConfig(key, value, reason string) *xapi.Error {
	return xapi.NewError(xapi.ValueNotSupported, "device_config:"+shorten(key), shorten(value), reason)
}

func plainText(s string) bool {
	return len(s) <= maxConfigValue && utf8.ValidString(s) && !strings.ContainsFunc(s, unicode.IsControl)
}

func shorten(s string) string {
	if len(s) > 256 {
		s = s[:256]
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return utf8.RuneError
		}
		return r
	}, strings.ToValidUTF8(s, "\uFFFD"))
}

// ErrUntouched is what the error of a Create is that failed before it changed
// anything: there is nothing to be taken back, now or later.
var ErrUntouched = errors.New("nothing was made")

// Untouched makes err one for which errors.Is(err, ErrUntouched) holds; text and
// code stay. nil stays nil.
func Untouched(err error) error {
	if err == nil {
		return nil
	}
	return untouched{err}
}

type untouched struct{ error }

func (e untouched) Unwrap() error        { return e.error }
func (e untouched) Is(target error) bool { return target == ErrUntouched }

// BackendFailure is SR_BACKEND_FAILURE with a text for the admin.
func BackendFailure(format string, args ...any) *xapi.Error {
	err := fmt.Errorf(format, args...)
	return xapi.NewError(xapi.SRBackendFailure, "1", "", err.Error()).Because(errors.Unwrap(err))
}

// NoSpace tells whether err says that an SR is full: OUT_OF_SPACE, or what a
// write to a volume answers (ENOSPC, EDQUOT).
func NoSpace(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || xapi.Is(err, xapi.OutOfSpace)
}

// Alive gives the reason why ctx has ended, or nil while it has not.
func Alive(ctx context.Context) error {
	if ctx.Err() == nil {
		return nil
	}
	return context.Cause(ctx)
}

// Sound is how a driver begins a call: the reason why ctx has ended, or
// INVALID_VALUE when a name holds what is not a uuid.
func Sound(ctx context.Context, names ...Name) error {
	for _, n := range names {
		if err := n.Validate(); err != nil {
			return xapi.NewError(xapi.InvalidValue, "volume", "").Because(err)
		}
	}
	return Alive(ctx)
}
