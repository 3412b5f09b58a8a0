package agent

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/patchd/patchd/pkg/patch"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// A golden image with a block map is checked before it is mounted: every byte of
// it must be as the map says, by several cores at once. What the payload is, and
// that it was signed, is learned once: by the host that took the upload, or by
// the first runner that reads it through the mount. From then on it is an
// attestation of this host, and equality with the map is all there is to check.

// openMap reads the block map of the golden image, which lies beside it in repo,
// and puts it into the journal for the runner. It gives nil where there is none.
// Code: VDI_CONTENT_CHANGED [VDI ref, text].
func (e *execution) openMap(repo sr.Repository, entry Entry, run *Run) (*vdi.Map, error) {
	golden := entry.Assignment.VDI
	if golden.Map == "" {
		return nil, nil
	}
	m, err := sr.ReadMap(e.ctx, repo, entry.Plan.Image, golden.Map)
	if err != nil {
		if _, serr := repo.Stat(e.ctx); serr != nil || e.ctx.Err() != nil {
			return nil, fmt.Errorf("read the block map of VDI %s: %w", entry.Plan.Image, err)
		}
		return nil, changed(run.VDIRef, pool.DamagedMap).Because(err)
	}
	f, err := os.OpenFile(e.agent.journal.path(e.id, fileMap), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	w := bufio.NewWriter(f)
	if err := errors.Join(m.Encode(w), w.Flush(), f.Close()); err != nil {
		return nil, fmt.Errorf("hand the block map to the runner: %w", err)
	}
	run.Map = golden.Map
	return m, nil
}

// copy makes the work image of a golden one in another place, and checks each
// block on its way.
func (e *execution) copy(dst, src sr.Repository, entry Entry, run *Run) error {
	m, err := e.openMap(src, entry, run)
	if err != nil {
		return err
	}
	err = sr.CopyVerified(e.ctx, dst, entry.Work, src, sr.Live(entry.Plan.Image), m, false, nil)
	var damage *vdi.DamageError
	if errors.As(err, &damage) {
		return changed(run.VDIRef, damage.Error()).Because(err)
	}
	run.Equal = err == nil && m != nil
	return err
}

// changed is the error of an image that is not what was uploaded.
func changed(ref xapi.Ref, text string) *xapi.Error {
	return xapi.NewError(xapi.VDIContentChanged, string(ref), text)
}

// reportDamage tells the pool of a golden image, or of a replica of it, that was
// found damaged. Of a replica this host's own records tell, too: it is not used again.
func (e *execution) reportDamage(ctx context.Context, j pool.Assignment, err *xapi.Error) error {
	if err == nil || err.Code != xapi.VDIContentChanged || len(err.Params) != 2 || j.VDI == nil {
		return nil
	}
	ref := xapi.Ref(err.Params[0])
	var rerr error
	if ref != j.VDIRef {
		replicas, err := e.agent.Storage.Replicas(j.VDI.Map)
		if err != nil || !slices.ContainsFunc(replicas, func(r pool.Replica) bool { return r.Ref == ref }) {
			return err
		}
	}
	text := err.Params[1]
	if rerr = e.agent.Coordinator.VDIDamaged(ctx, ref, text); rerr == nil && ref != j.VDIRef {
		rerr = e.agent.Storage.VDIDamaged(ctx, ref, text)
	}
	if rerr != nil && !xapi.Is(rerr, xapi.HandleInvalid) {
		return fmt.Errorf("record the damage of VDI %s: %w", ref, rerr)
	}
	return nil
}

// checkImage holds the private image against the block map, before anything is
// written to it. attested tells that this host knows what such an image holds,
// by a key that it still trusts. Code: VDI_CONTENT_CHANGED.
func (r *runner) checkImage(ctx context.Context) (attested bool, err error) {
	if !r.run.Check || r.run.Map == "" {
		return false, nil
	}
	if !r.run.Equal {
		if err := r.verifyMap(ctx); err != nil {
			return false, err
		}
	}
	keys, err := patch.LoadKeyring(r.run.KeysDir)
	if err != nil {
		return false, err
	}
	return r.run.Attested.Holds(r.run.Map, r.run.Digest, keys, r.run.Pinned), nil
}

func (r *runner) verifyMap(ctx context.Context) error {
	f, err := os.Open(filepath.Join(r.dir, fileMap))
	if err != nil {
		return err
	}
	m, err := vdi.ReadMap(bufio.NewReader(f), r.run.Map)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("the block map in the journal: %w", err)
	}
	image, err := os.Open(r.run.Image)
	if err != nil {
		return err
	}
	err = m.Verify(ctx, image, nil)
	var damage *vdi.DamageError
	if errors.As(err, &damage) {
		err = r.changed(damage.Error()).Because(damage)
	}
	return errors.Join(err, image.Close())
}

// changed is the error of an image that is not what was uploaded: it names the
// VDI, or the patch where the image was made of a file.
func (r *runner) changed(text string) *xapi.Error {
	ref := r.run.VDIRef
	if ref.IsNull() {
		ref = r.run.PatchRef
	}
	return changed(ref, text)
}

// attest remembers what the image with this map holds. Should that fail, the
// next check reads the payload again, which is all it costs.
func (r *runner) attest(signer string) {
	if r.run.Map == "" {
		return
	}
	err := r.run.Attested.Remember(patch.Attestation{
		Map: r.run.Map, Digest: r.run.Digest, Kind: r.run.Signature.Kind, Signer: signer,
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err) // the runner's log
	}
}

// sound makes sure that what a verb has written has reached the storage, and
// more can be written: a failing or full SR shows only here, for write() had
// succeeded. text is "" when all is well.
func (r *runner) sound(ctx context.Context) (text string, err error) {
	if err := r.dom0.SyncFS(ctx, r.mnt); err != nil {
		return "the scratch room could not be written to " + r.where() + ": " + err.Error(), err
	}
	space, err := r.dom0.Space(r.mnt)
	if err != nil {
		return "the scratch room cannot be looked at: " + err.Error(), err
	}
	if space.ReadOnly {
		err := errors.New("the filesystem of the image has become read-only")
		return "the scratch room has become read-only, as it does after an I/O error of " + r.where(), err
	}
	return "", nil
}

// where names the storage repository that holds the scratch room, and tells when
// it is full.
func (r *runner) where() string {
	if r.run.SR == "" {
		return "the filesystem of the state directory"
	}
	space, err := r.dom0.Space(filepath.Dir(r.run.Image))
	if err == nil && space.Free < fullBelow {
		return fmt.Sprintf("storage repository %s, which has %d bytes free", r.run.SR, space.Free)
	}
	return "storage repository " + r.run.SR
}

// fullBelow is the room with which a storage repository is called full, in bytes.
const fullBelow = headroom

// unsound is what a failed verb is told to have failed of when its scratch room
// is not sound: what the patch itself says of that is worth less. "" when it is.
func (r *runner) unsound(ctx context.Context) string {
	text, err := r.sound(ctx)
	if err == nil {
		return ""
	}
	if out := r.out.Text(); out != "" {
		text += ". The patch said: " + out
	}
	return text
}
