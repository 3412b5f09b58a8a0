package patch

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
)

// scriptBlock is what the length of the script is rounded up to, in bytes.
const scriptBlock = 4096

// script is the head of a built patch. Behind it stand two tar archives: the
// programs, then the files. precheck unpacks only the first.
const script = `#!/bin/sh
# A patch made by "patchd patch build". Two tar archives stand behind this
# script: the programs precheck and apply, then the folder files.

say() { echo "patch: $*" >&2; }

base=${PATCHD_SCRATCH:-$(dirname "$0")}

# room FAILURE: is there room in the scratch folder for what apply unpacks and
# needs? Prints the typed error of precheck.
room() {
	free=$(df -Pk "$base" 2>/dev/null | { read -r _; read -r _ _ _ kib _; echo "$kib"; })
	case $free in
	''|*[!0-9]*) return 0 ;;
	esac
	if [ "$free" -lt @NEED@ ]; then
		echo "<error errorcode=\"PATCH_PRECHECK_FAILED_OUT_OF_SPACE\"><found>$((free * 1024))</found><required>$((@NEED@ * 1024))</required></error>"
		exit 1
	fi
}

# unpack FAILURE: puts the programs into a fresh folder and goes there.
unpack() {
	work=$(mktemp -d "$base/patch.XXXXXX") || { say "cannot make a folder in $base"; exit "$1"; }
	trap 'cd / && rm -rf "$work"' EXIT
	trap 'exit 143' HUP INT TERM
	tail -c +@CONTROL@ "$0" | head -c @CONTROLSIZE@ | tar -xf - -C "$work" || { say "cannot unpack the programs into $work"; exit "$1"; }
}

case ${1-} in
info)
	echo '@INFO@'
	exit 0
	;;
precheck)
	room
	if [ @PRECHECK@ = yes ]; then
		unpack 3
		(cd "$work" && exec ./precheck)
		exit
	fi
	exit 0
	;;
apply)
	unpack 1
	tail -c +@FILES@ "$0" | tar -xf - -C "$work" || { say "cannot unpack the files into $work"; exit 1; }
	(cd "$work" && exec ./apply)
	exit
	;;
esac
say "usage: patch info | precheck | apply"
exit 64
`

// script gives the head of the payload for this folder: a multiple of
// scriptBlock bytes.
func (f *folder) script(ctx context.Context) ([]byte, error) {
	var control counter
	if err := f.archive(ctx, &control, f.control, false); err != nil {
		return nil, err
	}
	precheck := "no"
	if len(f.control) > 1 {
		precheck = "yes"
	}
	need := (f.info.ScratchSize + 1023) / 1024
	// The script is written by "echo", which some shells let read backslashes.
	info := strings.ReplaceAll(encodeInfo(f.info, f.guidance), `\`, "&#92;")
	for length := int64(scriptBlock); ; length += scriptBlock {
		text := strings.NewReplacer(
			"@NEED@", fmt.Sprint(need),
			"@CONTROL@", fmt.Sprint(length+1),
			"@CONTROLSIZE@", fmt.Sprint(int64(control)),
			"@FILES@", fmt.Sprint(length+int64(control)+1),
			"@PRECHECK@", precheck,
			"@INFO@", info,
		).Replace(script)
		if room := length - int64(len(text)); room > 0 {
			text += strings.Repeat("#", int(room)-1) + "\n"
			return []byte(text), nil
		}
	}
}

// writePayload writes the executable: script, programs, files.
func (f *folder) writePayload(ctx context.Context, w io.Writer) error {
	head, err := f.script(ctx)
	if err != nil {
		return err
	}
	if _, err := io.Copy(w, bytes.NewReader(head)); err != nil {
		return err
	}
	if err := f.archive(ctx, w, f.control, true); err != nil {
		return err
	}
	return f.archive(ctx, w, f.files, true)
}

// counter counts what is written to it.
type counter int64

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}
