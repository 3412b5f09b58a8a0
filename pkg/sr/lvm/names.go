package lvm

import (
	"encoding/base64"
	"encoding/hex"
	"strings"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/xapi"
)

const (
	poolName    = "pool"
	trashPrefix = "trash."
	livePrefix  = "vdi."
	mapPrefix   = "map."
)

// compact are the 64 characters of the names of working data: LVM allows few
// others, and "_" could spell one of the words it keeps for itself.
var compact = base64.NewEncoding("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+.").WithPadding(base64.NoPadding).Strict()

// kinds gives the first letter of the name of working data.
var kinds = map[sr.Kind]byte{sr.KindPart: 'P', sr.KindWork: 'W', sr.KindMapPart: 'M'}

// groupPrefix is what every group of patchd begins with.
const groupPrefix = "pd_"

// groupName is the volume group of an SR.
func groupName(uuid xapi.UUID) string { return groupPrefix + strings.ReplaceAll(string(uuid), "-", "") }

// physicalUUID is the uuid of the SR's physical volume, in the form LVM wants.
// By it a device that lost its group half way through Create or Destroy is known.
func physicalUUID(uuid xapi.UUID) string {
	h := strings.ReplaceAll(string(uuid), "-", "")
	parts := []string{h[0:6], h[6:10], h[10:14], h[14:18], h[18:22], h[22:26], h[26:32]}
	return strings.Join(parts, "-")
}

// logicalName is the name of a volume's LV: "vdi." or "map." and the uuid, or a
// letter and the four uuids as 86 characters. Group and name together may have
// 124, which is why working data is written so.
func logicalName(n sr.Name) string {
	switch n.Kind {
	case sr.KindLive:
		return livePrefix + string(n.VDI)
	case sr.KindMap:
		return mapPrefix + string(n.VDI)
	}
	var b []byte
	for _, id := range []xapi.UUID{n.Owner.Pool, n.Owner.Host, n.Owner.Job, n.VDI} {
		raw, err := hex.DecodeString(strings.ReplaceAll(string(id), "-", ""))
		if err != nil {
			return "" // cannot be: the name was validated
		}
		b = append(b, raw...)
	}
	return string(kinds[n.Kind]) + compact.EncodeToString(b)
}

// volumeName reads what logicalName wrote. ok is false for anything else: it is not ours.
func volumeName(lv string) (n sr.Name, ok bool) {
	if id, found := strings.CutPrefix(lv, livePrefix); found {
		n = sr.Live(xapi.UUID(id))
		return n, n.Validate() == nil
	}
	if id, found := strings.CutPrefix(lv, mapPrefix); found {
		n = sr.Live(xapi.UUID(id)).Map()
		return n, n.Validate() == nil
	}
	if lv == "" {
		return sr.Name{}, false
	}
	b, err := compact.DecodeString(lv[1:])
	if err != nil || len(b) != 4*16 {
		return sr.Name{}, false
	}
	for kind, letter := range kinds {
		if letter == lv[0] {
			n = sr.Name{Kind: kind, VDI: uuidOf(b[48:]), Owner: sr.Owner{Pool: uuidOf(b), Host: uuidOf(b[16:]), Job: uuidOf(b[32:])}}
			return n, n.Validate() == nil && logicalName(n) == lv
		}
	}
	return sr.Name{}, false
}

func uuidOf(b []byte) xapi.UUID {
	h := hex.EncodeToString(b[:16])
	return xapi.UUID(strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:]}, "-"))
}

// mapperName is the name that device-mapper knows a logical volume by.
func mapperName(group, lv string) string {
	double := strings.NewReplacer("-", "--")
	return double.Replace(group) + "-" + double.Replace(lv)
}

// node is the path of a logical volume's device.
func node(group, lv string) string { return "/dev/mapper/" + mapperName(group, lv) }
