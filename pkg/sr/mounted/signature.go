package mounted

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/google/uuid"

	"github.com/patchd/patchd/pkg/xapi"
)

// found is what is on a device.
type found struct {
	size  int64
	fs    filesystem // zero when no filesystem that is looked for is there
	claim claim
	what  string // in words, "" when nothing is there
	own   bool   // the image file was made by patchd

	sr   xapi.UUID // the SR of the asked kind that the device belongs to, or ""
	made bool      // and its filesystem is complete
}

// filesystem is what a superblock says.
type filesystem struct {
	typ   string // as mount(2) names it
	uuid  xapi.UUID
	label string
}

// edges is how many bytes at each end of a device must be zero for it to count
// as empty: all places where a filesystem, a partition table, a volume manager
// or a RAID writes its signature.
const edges = 4 * mib

// examine looks at what is on the place, as seen by the driver of filesystem typ.
func (p place) examine(typ string) (found, error) {
	f, err := p.open(os.O_RDONLY)
	if err != nil {
		return found{}, err
	}
	defer f.Close()
	return examine(f, typ)
}

func examine(f *os.File, typ string) (found, error) {
	size, err := length(f)
	if err != nil {
		return found{}, err
	}
	head, err := readAt(f, 0, min(edges, size))
	if err != nil {
		return found{}, err
	}
	tail, err := readAt(f, max(0, size-edges), min(edges, size))
	if err != nil {
		return found{}, err
	}
	here := found{size: size, fs: superblock(head)}
	if at := roomFor(size) - (size - int64(len(tail))); at < 0 {
		b, err := readAt(f, roomFor(size), claimSize)
		if err != nil && size >= trailer {
			return found{}, err
		}
		here.claim = parseClaim(b)
	} else if at+claimSize <= int64(len(tail)) {
		here.claim = parseClaim(tail[at : at+claimSize])
	}
	here.judge(typ, head, tail)
	return here, nil
}

// judge says whose the device is. A claim counts while nothing contradicts it:
// a filesystem with another uuid was made by somebody else since.
func (h *found) judge(typ string, head, tail []byte) {
	claimed := h.claim.sr != "" && h.claim.typ == typ
	h.own = h.claim.own
	switch {
	case claimed && h.fs.uuid == h.claim.sr && h.fs.typ == typ:
		h.sr, h.made = h.claim.sr, h.claim.made
	case claimed && h.fs.typ == "" && known(head) == "":
		h.sr, h.made = h.claim.sr, h.claim.made // a filesystem that was made and is gone is damage
	case h.claim.sr == "" && h.fs.typ == typ && h.fs.label == Label:
		h.sr, h.made = h.fs.uuid, true // it was grown over the claim
	}
	switch {
	case h.sr != "":
		h.what = "SR " + string(h.sr)
	case h.claim.sr != "" && h.fs.typ == h.claim.typ && h.fs.uuid == h.claim.sr:
		h.what = fmt.Sprintf("SR %s (%s)", h.claim.sr, h.claim.typ)
	case h.fs.typ != "":
		h.what = fmt.Sprintf("a filesystem (%s, uuid %s, label %q)", h.fs.typ, h.fs.uuid, h.fs.label)
	case known(head) != "":
		h.what = known(head)
	case h.claim.sr != "":
		h.what = fmt.Sprintf("the unfinished SR %s (%s)", h.claim.sr, h.claim.typ)
	default:
		h.what = data(head, 0)
		if h.what == "" {
			h.what = data(tail, h.size-int64(len(tail)))
		}
	}
}

// data says where the first byte is that is not zero.
func data(b []byte, from int64) string {
	for i, c := range b {
		if c != 0 {
			return fmt.Sprintf("data (the first at byte %d)", from+int64(i))
		}
	}
	return ""
}

func readAt(f *os.File, at, n int64) ([]byte, error) {
	b := make([]byte, n)
	if _, err := f.ReadAt(b, at); err != nil && err != io.EOF {
		return nil, fmt.Errorf("read %s: %w", f.Name(), err)
	}
	return b, nil
}

// superblock reads the superblock of the filesystems that patchd makes.
func superblock(head []byte) filesystem {
	const extAt, btrfsAt = 1024, 64 << 10
	if at := head[min(extAt, len(head)):]; len(at) >= 1024 && binary.LittleEndian.Uint16(at[56:]) == 0xEF53 {
		typ := "ext4"
		const journal, extents = 4, 0x40
		if binary.LittleEndian.Uint32(at[96:])&extents == 0 {
			typ = "ext3"
			if binary.LittleEndian.Uint32(at[92:])&journal == 0 {
				typ = "ext2"
			}
		}
		return filesystem{typ, uuidAt(at[104:]), textAt(at[120:136])}
	}
	if len(head) >= 512 && bytes.HasPrefix(head, []byte("XFSB")) {
		return filesystem{"xfs", uuidAt(head[32:]), textAt(head[108:120])}
	}
	if at := head[min(btrfsAt, len(head)):]; len(at) >= 4096 && (string(at[64:72]) == "_BHRfS_M" || string(at[64:72]) == "!BHRfS_M") {
		return filesystem{"btrfs", uuidAt(at[32:]), textAt(at[299 : 299+256])}
	}
	return filesystem{}
}

func uuidAt(b []byte) xapi.UUID {
	id, err := uuid.FromBytes(b[:16])
	if err != nil {
		return ""
	}
	return xapi.UUID(id.String())
}

func textAt(b []byte) string {
	b, _, _ = bytes.Cut(b, []byte{0})
	return strings.ToValidUTF8(string(b), "?")
}

// signatures are what else is told by name. Anything that is not zero is
// refused, known or not; this is only for the words.
var signatures = []struct {
	at    int
	magic string
	what  string
}{
	{0, "LUKS\xba\xbe", "an encrypted volume (LUKS)"},
	{536, "LVM2 001", "a physical volume of LVM"},
	{24, "LVM2 001", "a physical volume of LVM"},
	{512, "EFI PART", "a partition table (GPT)"},
	{4096, "\xfc\x4e\x2b\xa9", "a member of a RAID (md)"},
	{0, "\xfc\x4e\x2b\xa9", "a member of a RAID (md)"},
	{4086, "SWAPSPACE2", "swap space"},
	{3, "NTFS    ", "a filesystem (NTFS)"},
	{3, "EXFAT   ", "a filesystem (exFAT)"},
	{54, "FAT", "a filesystem (FAT)"},
	{82, "FAT32", "a filesystem (FAT)"},
	{32769, "CD001", "a filesystem (ISO 9660)"},
	{0, "hsqs", "a filesystem (squashfs)"},
	{1024, "\x10\x20\xf5\xf2", "a filesystem (F2FS)"},
	{510, "\x55\xaa", "a partition table or boot sector"},
}

// known names the signature at the beginning of a device, or gives "".
func known(head []byte) string {
	for _, s := range signatures {
		if len(head) >= s.at+len(s.magic) && string(head[s.at:s.at+len(s.magic)]) == s.magic {
			return s.what
		}
	}
	return ""
}
