package integration

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
	"github.com/patchd/patchd/pkg/xapi"
)

// work does a few things, one after the other.
func (s *soaker) work(t *testing.T, w int, r *rand.Rand) {
	if w == 0 && s.broken != nil {
		s.repair(t, r, s.broken)
	}
	type job struct {
		name string
		do   func(t *testing.T, r *rand.Rand)
	}
	jobs := []job{
		{"put", s.putPatch}, {"put", s.putPatch}, {"upload", s.uploadPatch}, {"upload", s.uploadPatch}, {"revision", s.uploadRevision},
		{"copy", s.copyImage}, {"copy", s.copyImage}, {"copy", s.copyImage}, {"import", s.importImage}, {"import over", s.importOver},
		{"export", s.exportImage}, {"verify", s.verifyImage}, {"apply", s.applyPatch}, {"apply", s.applyPatch},
		{"destroy", s.destroyThing}, {"destroy patch", s.destroyPatch}, {"migrate", s.migrate}, {"scan", s.scan},
	}
	for range 4 {
		if s.dead() {
			return
		}
		j := jobs[r.Intn(len(jobs))]
		s.mu.Lock()
		s.done[j.name]++
		s.mu.Unlock()
		j.do(t, r)
	}
}

// client runs the command line as a process of its own and kills it in the
// middle, when r is not nil, every second time within some milliseconds.
func (s *soaker) client(r *rand.Rand, within int, args ...string) (stdout, stderr string, code int, killed bool) {
	cmd := exec.Command(s.binary, args...)
	cmd.Env = append(os.Environ(), "PATCHD_STATE_DIR="+s.StateDir, "XDG_STATE_HOME="+filepath.Join(s.dir, "user"))
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Start(); err != nil {
		s.T.Errorf("patchd %v: %v", args, err)
		return "", err.Error(), 2, false
	}
	if r != nil && r.Intn(2) == 0 {
		timer := time.AfterFunc(time.Duration(r.Intn(within))*time.Millisecond, func() { cmd.Process.Kill() })
		defer timer.Stop()
	}
	cmd.Wait()
	code = cmd.ProcessState.ExitCode()
	killed = code == -1
	s.note("%s: exit %d %s%s", strings.Join(args, " "), code, out.String(), errs.String())
	return out.String(), errs.String(), code, killed
}

// said is what the end of a command tells its user.
func said(code int, stderr string) answer {
	switch {
	case code == 0:
		return yes
	case code == 1 && !strings.Contains(stderr, "EOF") && !strings.Contains(stderr, "connection") && !strings.Contains(stderr, "no patchd answers"):
		return no
	}
	return maybe
}

// anSR is any of the SRs.
func (s *soaker) anSR(r *rand.Rand) soakSR { return s.srs[r.Intn(len(s.srs))] }

// aGold is a patch whose image was good at the last check, or nil.
func (s *soaker) aGold(r *rand.Rand) *gold {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*gold
	for _, k := range s.golds {
		if k.vdi != "" && !k.away {
			all = append(all, k)
		}
	}
	if len(all) == 0 {
		return nil
	}
	return all[r.Intn(len(all))]
}

// take gives a VDI that nobody else changes meanwhile, or nil.
func (s *soaker) take(r *rand.Rand) *thing {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*thing
	for _, it := range s.things {
		if it.old && !it.away {
			all = append(all, it)
		}
	}
	if len(all) == 0 {
		return nil
	}
	it := all[r.Intn(len(all))]
	it.away = true
	return it
}

// newGold makes a patch; as a revision of base most of its data is the same.
func (s *soaker) newGold(r *rand.Rand, base *gold) *gold {
	p := &lab.Patch{UUID: xapi.NewUUID()}
	k := &gold{told: &told{Patch: p, effect: filepath.Join(s.dir, "effect-"+string(p.UUID))}}
	p.Apply = fmt.Sprintf("echo applied >> %[1]s; sync %[1]s; echo work > $PATCHD_SCRATCH/work; sleep 0.1", k.effect)
	k.data = make([]byte, r.Intn(5<<20))
	r.Read(k.data)
	if base != nil {
		at := r.Intn(len(base.data) + 1)
		k.data = replaced(base.data, at, 0, k.data[:min(len(k.data), 1000)])
	}
	payload := append(p.Payload(), k.data...)
	sum := sha256.Sum256(payload)
	k.digest, k.signed = hex.EncodeToString(sum[:]), lab.DefaultKey(s.T).Sign(s.T, payload)
	k.file = filepath.Join(s.dir, string(p.UUID)+".xsupdate")
	if err := os.WriteFile(k.file, k.signed, 0o644); err != nil {
		s.T.Error(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.golds = append(s.golds, k)
	return k
}

// putPatch uploads by one PUT; some clients go away in the middle.
func (s *soaker) putPatch(t *testing.T, r *rand.Rand) {
	k, sr := s.newGold(r, nil), s.anSR(r)
	var body io.Reader = bytes.NewReader(k.signed)
	gone := r.Intn(3) == 0
	if gone {
		body = io.MultiReader(io.LimitReader(body, r.Int63n(int64(len(k.signed)))), broken{})
	}
	query := url.Values{"sr_uuid": {sr.uuid}}
	if r.Intn(2) == 0 {
		if v, err := s.s.Try("task.create", "upload", ""); err == nil {
			k.task = v.(string)
			query.Set("task_id", k.task)
		}
	}
	a, err := s.s.Put("/pool_patch_upload", query, body, int64(len(k.signed)))
	if e := a.Err(); err == nil && e != nil {
		err = e
	}
	if err == nil && a.Status >= 300 {
		err = fmt.Errorf("HTTP %d", a.Status) // such as 503 at the start
	}
	if err == nil && k.task != "" {
		_, err = s.follow(k.task)
	}
	s.mu.Lock()
	if k.uploaded = heard(err); gone {
		k.uploaded = no
	}
	s.mu.Unlock()
	s.note("%s: PUT of %d bytes to %s: client gone %v, %v", k.UUID, len(k.signed), sr.name, gone, err)
	if !gone && k.uploaded == no && !s.stopping {
		t.Errorf("PUT of %s: %v", k.UUID, err)
	}
}

// broken is a body whose client dies.
type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, errors.New("the client is gone") }

func (s *soaker) uploadPatch(t *testing.T, r *rand.Rand) { s.uploadBy(t, r, s.newGold(r, nil)) }

func (s *soaker) uploadRevision(t *testing.T, r *rand.Rand) {
	base := s.aGold(r)
	if base == nil {
		return
	}
	s.uploadBy(t, r, s.newGold(r, base), "--base", string(base.UUID))
}

// uploadBy uploads with patchd's own client, which goes on when the daemon is
// back.
func (s *soaker) uploadBy(t *testing.T, r *rand.Rand, k *gold, more ...string) {
	args := append([]string{"patch", "upload", k.file, "--retry-for", "60s"}, more...)
	if r.Intn(2) == 0 {
		args = append(args, "--sr", s.anSR(r).uuid)
	}
	out, errs, code, killed := s.client(r, 600, args...)
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case killed || code == 3: // or nobody answered
		k.uploaded, k.resume = maybe, args
	case code == 0 && strings.TrimSpace(out) == string(k.UUID):
		k.uploaded = yes
	case len(more) > 0: // its base was destroyed meanwhile
		k.uploaded = maybe
	default:
		k.uploaded = maybe
		t.Errorf("upload of %s: %d %s", k.UUID, code, errs)
	}
}

// add is a VDI that somebody is about to make.
func (s *soaker) add(what, sum string, golden bool) *thing {
	s.mu.Lock()
	defer s.mu.Unlock()
	it := &thing{what: what, sum: sum, golden: golden, made: maybe}
	s.things = append(s.things, it)
	return it
}

// copyImage copies or clones the image of a patch; some copies are cancelled.
func (s *soaker) copyImage(t *testing.T, r *rand.Rand) {
	k := s.aGold(r)
	if k == nil {
		return
	}
	sr := s.anSR(r)
	it := s.add("copy of the image of "+string(k.UUID), k.golden, true)
	method, params := "VDI.copy", []any{k.vdi, sr.ref, nullRef, nullRef}
	if r.Intn(4) == 0 {
		method, params = "VDI.clone", []any{k.vdi, map[string]string{}}
	}
	cancel, async := r.Intn(4) == 0, r.Intn(2) == 0
	if async {
		method = "Async." + method
	}
	v, err := s.s.Try(method, params...)
	ref, _ := v.(string)
	if err == nil && async {
		s.mu.Lock()
		it.task = ref
		s.mu.Unlock()
		if cancel {
			s.s.Try("task.cancel", ref)
		}
		ref, err = s.follow(ref)
	}
	s.mu.Lock()
	it.made = heard(err)
	switch {
	case it.made == yes:
		it.ref = plain(ref)
	case it.made == no && s.stopping:
		it.made = maybe // the copy goes on at the next start, under its task
	}
	s.mu.Unlock()
	s.note("%s of %s (%s) to %s: cancelled %v, %v %v", method, k.vdi, k.UUID, sr.name, cancel, ref, err)
}

// importImage makes a plain VDI of random bytes.
func (s *soaker) importImage(t *testing.T, r *rand.Rand) {
	file, sum := s.image(r, int64(1+r.Intn(4))<<20)
	it := s.add("import", sum, false)
	out, errs, code, killed := s.client(r, 300, "vdi", "import", file, "--sr", s.anSR(r).uuid)
	s.mu.Lock()
	it.made = said(code, errs)
	s.mu.Unlock()
	if killed || it.made != yes {
		return
	}
	ref, err := s.s.Try("VDI.get_by_uuid", strings.TrimSpace(out))
	if text, ok := ref.(string); err == nil && ok {
		s.mu.Lock()
		it.ref = text
		s.mu.Unlock()
	}
}

// image writes a file of random bytes.
func (s *soaker) image(r *rand.Rand, size int64) (file, sum string) {
	b := make([]byte, size)
	r.Read(b)
	for at := range b {
		if at>>18%3 == 1 {
			b[at] = 0
		}
	}
	hash := sha256.Sum256(b)
	file = filepath.Join(s.dir, "import-"+string(xapi.NewUUID()))
	if err := os.WriteFile(file, b, 0o600); err != nil {
		s.T.Error(err)
	}
	return file, hex.EncodeToString(hash[:])
}

// importOver writes over a VDI; over one that is the copy of a patch, too, which
// ends as a plain VDI then.
func (s *soaker) importOver(t *testing.T, r *rand.Rand) {
	it := s.take(r)
	if it == nil {
		return
	}
	rec, err := s.s.Try("VDI.get_record", it.ref)
	if err != nil {
		return
	}
	size := number(t, rec.(map[string]any)["virtual_size"])
	file, sum := s.image(r, size)
	_, errs, code, _ := s.client(r, 300, "vdi", "import", file, "--vdi", rec.(map[string]any)["uuid"].(string))
	s.mu.Lock()
	defer s.mu.Unlock()
	if it.golden && code != 0 {
		// Its map may be gone, and its bytes others; the check finds out.
		it.sum = ""
		return
	}
	it.sum, it.golden = "", false
	if said(code, errs) == yes {
		it.sum = sum
	}
}

// exportImage reads the image of a patch; an export that broke off goes on.
func (s *soaker) exportImage(t *testing.T, r *rand.Rand) {
	k := s.aGold(r)
	if k == nil {
		return
	}
	rec, err := s.s.Try("VDI.get_uuid", k.vdi)
	if err != nil {
		return
	}
	file := filepath.Join(s.dir, "export-"+string(xapi.NewUUID()))
	_, _, code, killed := s.client(r, 300, "vdi", "export", rec.(string), file)
	if killed {
		_, _, code, _ = s.client(nil, 0, "vdi", "export", rec.(string), file)
	}
	if code == 0 && fileSum(t, file) != k.golden {
		t.Errorf("the export of the image of %s is another", k.UUID)
	}
	os.Remove(file)
}

// verifyImage: an image that nobody touched is never called damaged.
func (s *soaker) verifyImage(t *testing.T, r *rand.Rand) {
	k := s.aGold(r)
	if k == nil {
		return
	}
	v, err := s.s.Try("patchd.vdi_verify", k.vdi)
	s.note("verify of %s: %v %v", k.vdi, v, err)
	if err == nil && v != "" {
		t.Errorf("the image of %s is said to be damaged: %v", k.UUID, v)
	}
}

func (s *soaker) applyPatch(t *testing.T, r *rand.Rand) {
	if k := s.aGold(r); k != nil {
		s.applyBy(k, ways[r.Intn(len(ways))])
	}
}

func (s *soaker) applyBy(k *gold, way string) error {
	ref, err := s.ref(k.told)
	if err != nil {
		return err
	}
	params := []any{ref}
	if strings.HasSuffix(way, ".apply") {
		params = append(params, s.hostRef())
	}
	s.mu.Lock()
	k.asked++
	s.mu.Unlock()
	out, err := s.s.Try(way, params...)
	if err == nil && strings.HasPrefix(way, "Async.") {
		_, err = s.follow(out.(string))
	}
	s.mu.Lock()
	k.applied = max(k.applied, heard(err))
	s.mu.Unlock()
	s.note("%s of %s: %v", way, k.UUID, err)
	return err
}

func (s *soaker) destroyThing(t *testing.T, r *rand.Rand) {
	it := s.take(r)
	if it == nil {
		return
	}
	_, err := s.s.Try("VDI.destroy", it.ref)
	s.mu.Lock()
	it.gone = heard(err)
	s.mu.Unlock()
	s.note("VDI.destroy of %s, %s: %v", it.ref, it.what, err)
	if it.gone == no && !s.stopping {
		t.Errorf("VDI.destroy of %s: %v", it.what, err)
	}
}

func (s *soaker) destroyPatch(t *testing.T, r *rand.Rand) {
	k := s.aGold(r)
	if k == nil {
		return
	}
	ref, err := s.ref(k.told)
	if err != nil {
		return
	}
	_, err = s.s.Try("pool_patch.destroy", ref)
	s.mu.Lock()
	k.destroyed, k.cleaned = max(k.destroyed, heard(err)), maybe
	s.mu.Unlock()
	s.note("destroy of %s: %v", k.UUID, err)
}

// migrate moves the image of a patch to another SR.
func (s *soaker) migrate(t *testing.T, r *rand.Rand) {
	k := s.aGold(r)
	if k == nil {
		return
	}
	sr := s.anSR(r)
	v, err := s.s.Try("VDI.pool_migrate", k.vdi, sr.ref, map[string]string{})
	s.note("VDI.pool_migrate of %s (%s) to %s: %v %v", k.vdi, k.UUID, sr.name, v, err)
}

func (s *soaker) scan(t *testing.T, r *rand.Rand) {
	sr := s.anSR(r)
	_, err := s.s.Try("SR.scan", sr.ref)
	s.note("SR.scan of %s: %v", sr.name, err)
}

// damageOne changes one byte of the image of a patch, or of its map, behind the
// back of the daemon; a copy of it is on another SR.
func (s *soaker) damageOne(t *testing.T, r *rand.Rand) {
	t.Helper()
	s.broken = nil
	if r.Intn(3) > 0 {
		return
	}
	for _, k := range s.golds {
		for _, it := range s.things {
			if !it.golden || it.sum != k.golden || k.vdi == "" {
				continue
			}
			k.away, it.away = true, true
			path := s.path(t, s.s.Call("VDI.get_record", k.vdi).(map[string]any))
			off := int64(40)
			if r.Intn(3) == 0 {
				path = mapBeside(path)
			} else {
				st, err := os.Stat(path)
				if err != nil {
					t.Fatal(err)
				}
				off = r.Int63n(st.Size())
			}
			flipByte(t, path, off)
			s.note("%s: byte %d of %s is changed", k.UUID, off, path)
			s.broken = k
			return
		}
	}
}

// repair asks for a repair of a damaged image, which may be killed, and for an
// apply before it.
func (s *soaker) repair(t *testing.T, r *rand.Rand, k *gold) {
	before := lines(k.effect)
	if r.Intn(2) == 0 {
		if err := s.applyBy(k, "pool_patch.apply"); err == nil || lines(k.effect) != before {
			t.Errorf("the damaged %s was applied: %v", k.UUID, err)
		}
	}
	uuid, err := s.s.Try("VDI.get_uuid", k.vdi)
	if err != nil {
		return
	}
	if _, errs, code, _ := s.client(r, 300, "vdi", "repair", uuid.(string)); said(code, errs) == no && !s.stopping {
		t.Errorf("repair of %s: %s", k.UUID, errs)
	}
}
