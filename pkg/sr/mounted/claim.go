package mounted

import (
	"bytes"
	"fmt"
	"os"
	"strings"

	"github.com/patchd/patchd/pkg/fault"
	"github.com/patchd/patchd/pkg/xapi"
)

const mib = 1 << 20

// trailer is the end of a device that is left out of the filesystem. The claim
// is at its beginning: tools wipe the last bytes of a device.
const trailer = 4 * mib

// Label is the label of every filesystem that patchd makes for an SR.
const Label = "patchd"

// claim says whose device it is: "patchd claim 1 <SR uuid> <type> <making|made>
// <found|own>" and zeros, 4096 bytes in all. own: patchd made the image file.
type claim struct {
	sr   xapi.UUID
	typ  string // of the filesystem
	made bool   // mkfs has ended well and is on disk
	own  bool
}

const (
	claimPrefix = "patchd claim 1 "
	claimSize   = 4096
)

func (c claim) bytes() []byte {
	words := []string{string(c.sr), c.typ, "making", "found"}
	if c.made {
		words[2] = "made"
	}
	if c.own {
		words[3] = "own"
	}
	b := make([]byte, claimSize)
	copy(b, claimPrefix+strings.Join(words, " ")+"\n")
	return b
}

// parseClaim reads what bytes gave; the zero claim is none.
func parseClaim(b []byte) claim {
	text, _, _ := bytes.Cut(b, []byte("\n"))
	words := strings.Fields(strings.TrimPrefix(string(text), claimPrefix))
	if len(words) != 4 {
		return claim{}
	}
	c := claim{sr: xapi.UUID(words[0]), typ: words[1], made: words[2] == "made", own: words[3] == "own"}
	if !c.sr.Valid() || !bytes.Equal(c.bytes(), b) {
		return claim{}
	}
	return c
}

// roomFor is how many bytes of a device the filesystem gets, and where the claim is.
func roomFor(size int64) int64 { return max(0, size-trailer) &^ (mib - 1) }

// write puts the claim on a device, durably.
func (c claim) write(f *os.File) error {
	if err := fault.Point("sr.claim"); err != nil {
		return err
	}
	size, err := length(f)
	if err != nil {
		return err
	}
	if _, err := f.WriteAt(c.bytes(), roomFor(size)); err != nil {
		return fmt.Errorf("claim %s: %w", f.Name(), err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("claim %s: %w", f.Name(), err)
	}
	return fault.Point("sr.claim.done")
}
