package pool

import (
	"time"

	"github.com/patchd/patchd/pkg/xapi"
)

// The classes of records this package keeps. The first group is on the wire
// under the same name; the second is our own and never shown.
const (
	ClassPatch     = "pool_patch"
	ClassHostPatch = "host_patch"
	ClassHost      = "host"
	ClassPool      = "pool"
	ClassSR        = "SR"
	ClassVDI       = "VDI"
	ClassSM        = "SM"
	ClassPBD       = "PBD"
	ClassMessage   = "message"

	ClassJob    = "job"
	ClassIntent = "intent"
)

// The JSON name of a field is its XenAPI name, so that the wire can render a
// record from what is stored, and a generic setter can store a field without
// knowing this package. A field that begins with "_" is our own: it is stored
// and never shown. Derived fields (host_patches, VDIs, PBDs, patches) are not
// stored: a relation is kept once, on the owning side.

// Patch is the record of one patch (class pool_patch).
type Patch struct {
	UUID               xapi.UUID         `json:"uuid"`
	NameLabel          string            `json:"name_label"`
	NameDescription    string            `json:"name_description"`
	Version            string            `json:"version"`
	Size               int64             `json:"size"` // bytes of the signed file
	PoolApplied        bool              `json:"pool_applied"`
	AfterApplyGuidance []xapi.Guidance   `json:"after_apply_guidance"`
	VDI                xapi.Ref          `json:"VDI"`
	OtherConfig        map[string]string `json:"other_config"`

	// Filename is the patch as a file in the coordinator's patch-dir, one path
	// element, or "": the classic layout.
	Filename string `json:"_filename,omitempty"`
	// Digest is the SHA-256 of the payload, lower-case hexadecimal. The
	// payload is what stands in the image as `patch`.
	Digest      string `json:"_digest,omitempty"`
	PayloadSize int64  `json:"_payload_size,omitempty"`
	// Signature verifies the payload as a detached signature; see pkg/patch.
	Signature []byte `json:"_signature,omitempty"`
	// SignatureKind is patch.SignatureKind as text.
	SignatureKind string `json:"_signature_kind,omitempty"`
	// Signer is the fingerprint of the key that made the signature.
	Signer string `json:"_signer,omitempty"`
	// InfoXML is what `info` printed: the content of the stampfile.
	InfoXML string `json:"_info_xml,omitempty"`
	// ScratchSize is the room an apply may use beside the payload, in bytes; 0: not said.
	ScratchSize int64 `json:"_scratch_size,omitempty"`
	// Unconfirmed is set until enough hosts have the image: see Confirm.
	Unconfirmed *Unconfirmed `json:"_unconfirmed,omitempty"`
}

// HostPatch says that one host has a patch, or is getting it (class host_patch).
type HostPatch struct {
	UUID             xapi.UUID         `json:"uuid"`
	NameLabel        string            `json:"name_label"`
	NameDescription  string            `json:"name_description"`
	Version          string            `json:"version"`
	Host             xapi.Ref          `json:"host"`
	Applied          bool              `json:"applied"`
	TimestampApplied time.Time         `json:"timestamp_applied"`
	Size             int64             `json:"size"`
	PoolPatch        xapi.Ref          `json:"pool_patch"`
	OtherConfig      map[string]string `json:"other_config"`

	Job xapi.Ref `json:"_job,omitempty"`
}

// Host is one host (class host). Fields not kept here have a fixed value in
// the data model of pkg/xenapi.
type Host struct {
	UUID             xapi.UUID         `json:"uuid"`
	NameLabel        string            `json:"name_label"`
	NameDescription  string            `json:"name_description"`
	Hostname         string            `json:"hostname"`
	Address          string            `json:"address"`
	Enabled          bool              `json:"enabled"`
	SoftwareVersion  map[string]string `json:"software_version"`
	OtherConfig      map[string]string `json:"other_config"`
	Tags             []string          `json:"tags"`
	CPUInfo          map[string]string `json:"cpu_info"`
	Logging          map[string]string `json:"logging"`
	LicenseServer    map[string]string `json:"license_server"`
	GuestVCPUsParams map[string]string `json:"guest_VCPUs_params"`
	SuspendImageSR   xapi.Ref          `json:"suspend_image_sr"`
	CrashDumpSR      xapi.Ref          `json:"crash_dump_sr"`
	Display          string            `json:"display"`

	// Keys are the public keys by which other hosts know this one; the newest
	// is last. A host without one is not let in.
	Keys []HostKey `json:"_keys,omitempty"`
	// URL is where other hosts reach this one's TLS listener, without a slash at
	// the end: "https://192.0.2.7:8443".
	URL string `json:"_url,omitempty"`
	// Coordinator tells that the host has the pool database and may lead.
	Coordinator bool `json:"_coordinator,omitempty"`
	// Away is since when the host is not connected; zero: it is, or nobody has
	// looked yet. It is stored some time after the fact.
	Away time.Time `json:"_away,omitzero"`
	// Leaving tells that the host is being ejected: it is no member any more,
	// only some of its records are still there.
	Leaving bool `json:"_leaving,omitempty"`
	// Bare tells that the host has just come and has no first SR yet.
	Bare bool `json:"_bare,omitempty"`
}

// HostKey is one public key of a host.
type HostKey struct {
	SPKI  []byte    `json:"spki"` // DER of SubjectPublicKeyInfo
	Added time.Time `json:"added"`
}

// PoolRecord is the one pool (class pool).
type PoolRecord struct {
	UUID                 xapi.UUID         `json:"uuid"`
	NameLabel            string            `json:"name_label"`
	NameDescription      string            `json:"name_description"`
	Master               xapi.Ref          `json:"master"`
	DefaultSR            xapi.Ref          `json:"default_SR"`
	SuspendImageSR       xapi.Ref          `json:"suspend_image_SR"`
	CrashDumpSR          xapi.Ref          `json:"crash_dump_SR"`
	OtherConfig          map[string]string `json:"other_config"`
	GuiConfig            map[string]string `json:"gui_config"`
	HealthCheckConfig    map[string]string `json:"health_check_config"`
	Tags                 []string          `json:"tags"`
	HAAllowOvercommit    bool              `json:"ha_allow_overcommit"`
	WLBEnabled           bool              `json:"wlb_enabled"`
	WLBVerifyCert        bool              `json:"wlb_verify_cert"`
	PolicyNoVendorDevice bool              `json:"policy_no_vendor_device"`
	LivePatchingDisabled bool              `json:"live_patching_disabled"`

	// Revoked are the keys that no host may let in any more.
	Revoked []RevokedKey `json:"_revoked,omitempty"`
}

// RevokedKey is a key that was taken from a host, remembered until whatever was
// issued for it has run out.
type RevokedKey struct {
	Pin     string    `json:"pin"` // SHA-256 of the SPKI, hexadecimal
	Host    xapi.UUID `json:"host"`
	Ejected bool      `json:"ejected,omitempty"` // with the host as a whole
	Until   time.Time `json:"until"`
}

// SR is one storage repository (class SR).
type SR struct {
	UUID                xapi.UUID         `json:"uuid"`
	NameLabel           string            `json:"name_label"`
	NameDescription     string            `json:"name_description"`
	VirtualAllocation   int64             `json:"virtual_allocation"`
	PhysicalUtilisation int64             `json:"physical_utilisation"`
	PhysicalSize        int64             `json:"physical_size"`
	Type                string            `json:"type"`
	ContentType         string            `json:"content_type"`
	Shared              bool              `json:"shared"`
	OtherConfig         map[string]string `json:"other_config"`
	Tags                []string          `json:"tags"`
	SMConfig            map[string]string `json:"sm_config"`
}

// VDI is one disk image (class VDI).
type VDI struct {
	UUID                xapi.UUID         `json:"uuid"`
	NameLabel           string            `json:"name_label"`
	NameDescription     string            `json:"name_description"`
	SR                  xapi.Ref          `json:"SR"`
	VirtualSize         int64             `json:"virtual_size"`
	PhysicalUtilisation int64             `json:"physical_utilisation"`
	Type                string            `json:"type"` // "user" for a patch, too
	Sharable            bool              `json:"sharable"`
	ReadOnly            bool              `json:"read_only"`
	OtherConfig         map[string]string `json:"other_config"`
	Location            string            `json:"location"`
	Managed             bool              `json:"managed"`
	Missing             bool              `json:"missing"`
	XenstoreData        map[string]string `json:"xenstore_data"`
	SMConfig            map[string]string `json:"sm_config"`
	IsASnapshot         bool              `json:"is_a_snapshot"`
	SnapshotOf          xapi.Ref          `json:"snapshot_of"`
	SnapshotTime        time.Time         `json:"snapshot_time"`
	Tags                []string          `json:"tags"`

	// Map is the digest of the block map that lies beside the image, lower-case
	// hexadecimal; "" when there is none, as for a VDI that may be written to.
	Map string `json:"_map,omitempty"`
	// Damage says what the last check found wrong with the image; "" when it was
	// good, or never looked at.
	Damage string `json:"_damage,omitempty"`
	// Checked is when the whole image was last held against its map.
	Checked time.Time `json:"_checked,omitzero"`
}

// SM is one storage driver (class SM).
type SM struct {
	UUID               xapi.UUID         `json:"uuid"`
	NameLabel          string            `json:"name_label"`
	NameDescription    string            `json:"name_description"`
	Type               string            `json:"type"`
	Vendor             string            `json:"vendor"`
	Copyright          string            `json:"copyright"`
	Version            string            `json:"version"`
	RequiredAPIVersion string            `json:"required_api_version"`
	Configuration      map[string]string `json:"configuration"`
	Capabilities       []string          `json:"capabilities"`
	Features           map[string]int64  `json:"features"`
	OtherConfig        map[string]string `json:"other_config"`
	DriverFilename     string            `json:"driver_filename"`
}

// PBD links one host to one SR (class PBD).
type PBD struct {
	UUID              xapi.UUID         `json:"uuid"`
	Host              xapi.Ref          `json:"host"`
	SR                xapi.Ref          `json:"SR"`
	DeviceConfig      map[string]string `json:"device_config"`
	CurrentlyAttached bool              `json:"currently_attached"`
	OtherConfig       map[string]string `json:"other_config"`

	// Features are what the repository offered when it was plugged: facts of
	// this SR on this host.
	Features []string `json:"_features,omitempty"`
}

// Message is one notice to the admin (class message).
type Message struct {
	UUID      xapi.UUID `json:"uuid"`
	Name      string    `json:"name"`
	Priority  int64     `json:"priority"` // 1 critical … 5
	Cls       string    `json:"cls"`      // "Pool", "Host", "SR", "VDI", …
	ObjUUID   xapi.UUID `json:"obj_uuid"`
	Timestamp time.Time `json:"timestamp"`
	Body      string    `json:"body"`
}
