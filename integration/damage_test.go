package integration

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/patchd/patchd/integration/lab"
	"github.com/patchd/patchd/pkg/xapi"
)

// flipByte changes one byte of a file in place; off counts from the end when it
// is negative. Twice is as before.
func flipByte(t testing.TB, path string, off int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if off < 0 {
		st, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		off += st.Size()
	}
	b := []byte{0}
	if _, err := f.ReadAt(b, off); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
}

// damages are the messages about damaged images.
func damages(s *lab.Session) (bodies []string) {
	for _, m := range s.All("message") {
		if m["name"] == "VDI_DAMAGED" {
			bodies = append(bodies, m["body"].(string))
		}
	}
	return bodies
}

// verifyVDI is what `patchd vdi verify` asks for: "" when an image is good.
func verifyVDI(s *lab.Session, vdi string) string {
	s.H.T.Helper()
	return s.Call("patchd.vdi_verify", vdi).(string)
}

// damaged is one patch on SR a with a copy of its image on SR b.
type damaged struct {
	s           *lab.Session
	patch, vdi  string
	image, mark string
	payload     int64 // where it begins in the image
	size        int64 // of the payload, in bytes
	want        []byte
}

func newDamaged(t *testing.T, s *lab.Session, copyTo string) damaged {
	t.Helper()
	d := damaged{s: s, mark: filepath.Join(t.TempDir(), "mark")}
	p := &lab.Patch{Apply: "echo ran >> " + d.mark, Pad: 3 << 20}
	payload := p.Payload()
	d.size = int64(len(payload))
	a := s.Upload(lab.DefaultKey(t).Sign(t, payload))
	if err := a.Err(); err != nil {
		t.Fatal(err)
	}
	d.patch = a.Record()["ref"].(string)
	d.vdi = vdiOf(s, d.patch)
	d.image = image(s, d.vdi)
	var err error
	if d.want, err = os.ReadFile(d.image); err != nil {
		t.Fatal(err)
	}
	if d.payload = int64(bytes.Index(d.want, payload)); d.payload < 0 {
		t.Fatal("the payload does not stand in the image in one piece")
	}
	if copyTo != "" {
		s.Call("VDI.copy", d.vdi, copyTo, nullRef, nullRef)
	}
	return d
}

// mapFile is the block map of an image.
func (d damaged) mapFile() string { return strings.TrimSuffix(d.image, ".img") + ".map" }

// refused fails unless apply and verify find the damage, once each and with one message.
func (d damaged) refused(t *testing.T) {
	t.Helper()
	for range 2 {
		_, err := apply(d.s, d.patch)
		if params := hasCode(t, err, xapi.VDIContentChanged); len(params) != 2 || params[0] != d.vdi {
			t.Errorf("%q", params)
		}
	}
	if lines(d.mark) != 0 {
		t.Error("it ran")
	}
	if text := verifyVDI(d.s, d.vdi); text == "" {
		t.Error("verify finds nothing")
	}
	uuid := d.s.Call("VDI.get_uuid", d.vdi).(string)
	if told := damages(d.s); len(told) != 1 || !strings.Contains(told[0], uuid) || !strings.Contains(told[0], "patchd vdi repair "+uuid) {
		t.Errorf("messages: %q", told)
	}
}

// TestB4_FlippedBytes: any byte of a golden image that changes behind patchd's
// back is found by apply and verify, and comes back from a second SR.
func TestB4_FlippedBytes(t *testing.T) {
	t.Parallel()
	// On XFS images are cloned and remembered as verified, on ext4 copied.
	for fs, make := range map[string]func(testing.TB, int64) string{"xfs": xfsFS, "ext4": ext4FS} {
		t.Run(fs, func(t *testing.T) {
			dir := make(t, 2*gib)
			h := lab.Start(t, lab.Options{Dir: dir})
			s := h.Root()
			second := newSR(s, "second", filepath.Join(dir, "second"))
			for what, flip := range map[string]func(d damaged){
				"the first byte of the payload": func(d damaged) { flipByte(t, d.image, d.payload) },
				"the last byte of the payload":  func(d damaged) { flipByte(t, d.image, d.payload+d.size-1) },
				"the superblock":                func(d damaged) { flipByte(t, d.image, 1024+0x78) }, // its volume name
				"a hole of the scratch room":    func(d damaged) { flipByte(t, d.image, -5) },
				"the block map":                 func(d damaged) { flipByte(t, d.mapFile(), 40) },
				"no block map at all":           func(d damaged) { os.Remove(d.mapFile()) },
				"map and image": func(d damaged) {
					flipByte(t, d.mapFile(), 40)
					flipByte(t, d.image, d.payload+100)
				},
				"a shorter image": func(d damaged) { os.Truncate(d.image, 2<<20) },
			} {
				t.Run(what, func(t *testing.T) {
					d := newDamaged(t, s, second)
					flip(d)
					d.refused(t)
					s.Call("patchd.vdi_repair", d.vdi)
					if got, err := os.ReadFile(d.image); err != nil || !bytes.Equal(got, d.want) {
						t.Errorf("the repaired image is another: %v", err)
					}
					if text := verifyVDI(s, d.vdi); text != "" || len(damages(s)) != 0 {
						t.Errorf("after the repair: %q %q", text, damages(s))
					}
					if _, err := apply(s, d.patch); err != nil || lines(d.mark) != 1 {
						t.Errorf("after the repair: %v, ran %d times", err, lines(d.mark))
					}
				})
			}
			h.CheckNothingLeft()
			h.Down()
		})
	}
}

// TestB4_NoGoodCopy: what cannot be repaired says so, and stays as it is.
func TestB4_NoGoodCopy(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	d := newDamaged(t, s, "")
	flipByte(t, d.image, d.payload)
	d.refused(t)
	_, err := s.Try("patchd.vdi_repair", d.vdi)
	if params := hasCode(t, err, xapi.VDIContentChanged); len(params) != 2 || !strings.Contains(params[1], "upload the patch again") {
		t.Errorf("%q", params)
	}
	uuid := s.Call("VDI.get_uuid", d.vdi).(string)
	out, stderr, code := h.CLI("vdi", "verify", uuid)
	if code != 1 || !strings.Contains(stderr, "damaged") || out != "" {
		t.Errorf("verify: %d %q %q", code, out, stderr)
	}
	if out, stderr, code := h.CLI("vdi", "show", uuid); code != 0 || !strings.Contains(out, "damaged") || !strings.Contains(out, "checked") {
		t.Errorf("show: %d %q %q", code, out, stderr)
	}
	if out, _, code := h.CLI("doctor"); code != 1 || !strings.Contains(out, "patchd vdi repair "+uuid) {
		t.Errorf("doctor: %d %q", code, out)
	}
	flipByte(t, d.image, d.payload)
	if out, stderr, code := h.CLI("vdi", "repair", uuid); code != 0 {
		t.Errorf("repair of what is good again: %d %q %q", code, out, stderr)
	}
	if _, err := apply(s, d.patch); err != nil {
		t.Error(err)
	}
}

// TestB4_ScrubFindsDamage: nobody has to ask.
func TestB4_ScrubFindsDamage(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{Flags: []string{"--scrub-interval", "300ms", "--scrub-rate", "0"}})
	s := h.Root()
	d := newDamaged(t, s, "")
	flipByte(t, d.image, -5)
	until(t, "the scrub finds it", func() bool { return len(damages(s)) == 1 })
	h.Restart()
	s = h.Root()
	if told := damages(s); len(told) != 1 {
		t.Errorf("after a restart: %q", told)
	}
	flipByte(t, d.image, -5)
	until(t, "the scrub finds it good again", func() bool { return len(damages(s)) == 0 })
	s.Call("VDI.destroy", d.vdi)
}

// TestB4_AttestationIsOfThisHostAndKey: a byte-identical image is not enough
// when the key is gone.
func TestB4_AttestationIsOfThisHostAndKey(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	d := newDamaged(t, s, "")
	attested := filepath.Join(h.StateDir, "attested")
	if names, err := os.ReadDir(attested); err != nil || len(names) != 1 {
		t.Fatalf("attested by the upload: %v %v", names, err)
	}
	key := lab.DefaultKey(t)
	h.Distrust(key)
	_, err := precheck(s, d.patch)
	wantCode(t, err, xapi.InvalidPatch)
	h.Trust(key)
	if err := os.RemoveAll(attested); err != nil {
		t.Fatal(err)
	}
	if _, err := precheck(s, d.patch); err != nil {
		t.Error(err)
	}
	if names, err := os.ReadDir(attested); err != nil || len(names) != 1 {
		t.Errorf("attested by the first check: %v %v", names, err)
	}
}

// TestB4_PlantedImageWithMap: image and block map under a new uuid, a record
// that looks the same: it is a VDI, never a patch.
func TestB4_PlantedImageWithMap(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	d := newDamaged(t, s, "")
	sr := s.Call("VDI.get_SR", d.vdi).(string)
	planted := string(xapi.NewUUID())
	run(t, "cp", "--sparse=always", d.image, filepath.Join(filepath.Dir(d.image), planted+".img"))
	run(t, "cp", d.mapFile(), filepath.Join(filepath.Dir(d.image), planted+".map"))
	s.Call("SR.scan", sr)
	vdi := s.Call("VDI.get_by_uuid", planted).(string)
	s.Call("VDI.set_name_label", vdi, "Patch lab patch")
	s.Call("VDI.add_to_other_config", vdi, "patchd-patch-uuid", s.Call("pool_patch.get_uuid", d.patch))
	if n := len(s.All("pool_patch")); n != 1 {
		t.Errorf("%d patches", n)
	}
	_, err := s.Try("patchd.vdi_verify", vdi)
	hasCode(t, err, xapi.OperationNotAllowed)
	// Nor does it mend anything.
	flipByte(t, d.image, d.payload)
	_, err = s.Try("patchd.vdi_repair", d.vdi)
	hasCode(t, err, xapi.VDIContentChanged)
	s.Call("pool_patch.pool_clean", d.patch)
	if got := vdiOf(s, d.patch); got != nullRef {
		t.Errorf("the patch found itself another VDI: %s", got)
	}
	if _, err := apply(s, d.patch); err == nil {
		t.Error("a patch was applied from a planted image")
	}
	s.Call("VDI.destroy", vdi)
	for _, kind := range []string{".img", ".map"} {
		if exists(filepath.Join(filepath.Dir(d.image), planted+kind)) {
			t.Errorf("%s is left", kind)
		}
	}
}

// TestB4_FailingStorage: a filesystem of an image that meets an error becomes
// read-only, and the apply that went on regardless has failed.
func TestB4_FailingStorage(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	fail := `dev=$(basename $(df --output=source . | tail -1)); echo x > /sys/fs/ext4/$dev/trigger_fs_error`
	ref := s.MustUpload(&lab.Patch{Apply: fail})
	_, err := apply(s, ref)
	hasCode(t, err, xapi.PatchApplyFailed)
	if len(s.All("host_patch")) != 0 {
		t.Error("the host is said to have it")
	}
	ref = s.MustUpload(&lab.Patch{Precheck: fail})
	_, err = apply(s, ref)
	hasCode(t, err, xapi.PrecheckFailedUnknownError)
}
