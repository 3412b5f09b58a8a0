package patch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/xapi"
)

// DefaultQueryTimeout is how long `info` may take.
const DefaultQueryTimeout = 10 * time.Second

const (
	maxInfoOutput = maxXML   // bytes of stdout
	maxInfoErrors = 16 << 10 // bytes of stderr that are kept
	infoGrace     = time.Second
)

// sandboxPath is the executable in the image of a patch.
const sandboxPath = "/patch"

// Query asks the patch in a disk image what it is: it runs `patch info`, locked
// down by the sandbox, for at most timeout (0: DefaultQueryTimeout), and reads
// the XML it prints. Call it only when the signature holds.
//
// Errors:
//
//   - INVALID_PATCH [text]: it cannot be run, was ended by a signal, ended with
//     an exit status other than 0 and 2, printed more than 64 KiB or what
//     ParseInfo refuses;
//   - INVALID_PATCH_WITH_LOG ["Bad line endings?"]: exit status 2;
//   - INVALID_PATCH_WITH_LOG [text]: it did not end in time;
//   - ctx's cause when it ended; anything else is a failure of this host.
func Query(ctx context.Context, d dom0.Dom0, image string, timeout time.Duration) (Info, error) {
	if timeout <= 0 {
		timeout = DefaultQueryTimeout
	}
	stdout := &head{most: maxInfoOutput}
	stderr := &tail{most: maxInfoErrors}
	res, err := d.Run(ctx, dom0.Cmd{
		Path:    sandboxPath,
		Args:    []string{"info"},
		Env:     []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "PATCHD_VERB=info"},
		Stdout:  stdout,
		Stderr:  stderr,
		Group:   "info-" + string(xapi.NewUUID()),
		Timeout: timeout,
		Grace:   infoGrace,
		Sandbox: &dom0.Sandbox{Image: image},
	})
	if ctx.Err() != nil {
		return Info{}, context.Cause(ctx)
	}
	if err != nil {
		return Info{}, startError(err)
	}
	output := stderr.String()
	if res.TimedOut {
		text := fmt.Sprintf("info did not end within %s and was killed", timeout)
		return Info{}, xapi.NewError(xapi.InvalidPatchWithLog, withOutput(text, output))
	}
	if res.ExitCode < 0 {
		return Info{}, xapi.NewError(xapi.InvalidPatch, withOutput(fmt.Sprintf("info was ended by signal %d", res.Signal), output))
	}
	if res.ExitCode != 0 {
		return Info{}, InfoError(res.ExitCode, output)
	}
	if stdout.cut {
		return Info{}, xapi.NewError(xapi.InvalidPatch, fmt.Sprintf("info printed more than %d bytes", maxInfoOutput))
	}
	return ParseInfo(stdout.Bytes())
}

// startError tells a payload that cannot be run from a host that cannot run it.
func startError(err error) error {
	var start *dom0.StartError
	if errors.As(err, &start) && (start.Step == "exec" || start.Step == "mount") {
		text := fmt.Sprintf("the patch cannot be run: %v (a program, or a script whose first line is #! and a program of the host, without a carriage return, is wanted)", start.Err)
		return xapi.NewError(xapi.InvalidPatch, text).Because(err)
	}
	return fmt.Errorf("run info: %w", err)
}

// head keeps the first bytes written to it and takes everything.
type head struct {
	bytes.Buffer
	most int
	cut  bool
}

func (h *head) Write(p []byte) (int, error) {
	room := h.most - h.Len()
	if len(p) > room {
		h.cut = true
		h.Buffer.Write(p[:room])
		return len(p), nil
	}
	return h.Buffer.Write(p)
}

// tail keeps the last bytes written to it and takes everything.
type tail struct {
	data []byte
	most int
}

func (t *tail) Write(p []byte) (int, error) {
	n := len(p)
	if len(p) > t.most {
		p = p[len(p)-t.most:]
	}
	if over := len(t.data) + len(p) - t.most; over > 0 {
		t.data = append(t.data[:0], t.data[over:]...)
	}
	t.data = append(t.data, p...)
	return n, nil
}

func (t *tail) String() string { return Tail(string(t.data)) }
