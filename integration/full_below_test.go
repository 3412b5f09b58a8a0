package integration

import (
	"os"
	"testing"

	"github.com/patchd/patchd/integration/lab"
)

// B5: the filesystem below the image file of an SR runs full, so that the SR
// meets I/O errors where it was promised room: a clear error that names the SR,
// nothing of what was acknowledged is lost, and when there is room again the SR
// works as before, at the latest when it is plugged again.
func TestB5_BelowTheSRItRunsFull(t *testing.T) {
	t.Parallel()
	for _, typ := range []string{"ext", "xfs"} {
		t.Run(typ, func(t *testing.T) {
			t.Parallel()
			lower := ext4FS(t, 320*mib)
			n := newNarrow(t, typ, lower)
			n.Call("PBD.unplug", pbdOf(n.Session, n.other))
			n.room = newFiller(t, lower)
			kept := vdiOf(n.Session, n.MustUpload(&lab.Patch{Pad: 2 << 20}))
			_, signed := newcomer(t)
			n.room.leave(20 * mib)
			n.full("PUT, refused", n.put(signed, 0, nil))
			n.room.empty()
			n.full("PUT", n.put(signed, 12<<20, n.room.full))
			n.room.empty()
			n.replug()
			n.sound(kept)
			n.tidy("PUT")
			w := n.waiting()
			w.lost(n, w.run(n, n.room.full))
			n.room.empty()
			n.replug()
			n.sound(kept)
			n.sound(w.golden)
			n.tidy("apply")
			if err := n.put(signed, 0, nil); err != nil {
				t.Errorf("PUT with room: %v", err)
			}
			if err := w.run(n, func() {}); err != nil || !n.applied(w.ref) {
				t.Errorf("apply with room: %v", err)
			}
			n.tidy("with room")
		})
	}
}

// replug unplugs the SR and plugs it again: a filesystem that has met errors may
// take no more until then.
func (n *narrow) replug() {
	n.t.Helper()
	pbd := pbdOf(n.Session, n.ref)
	n.Call("PBD.unplug", pbd)
	n.Call("PBD.plug", pbd)
}

// What a running patch was promised survives the death of the daemon, and ends
// with the patch.
func TestAPromiseOutlivesTheDaemon(t *testing.T) {
	t.Parallel()
	n := newNarrow(t, "xfs", t.TempDir())
	w := n.waiting()
	task := n.Call("Async.pool_patch.apply", w.ref, n.Host()).(string)
	until(t, "the patch to run", func() bool { return lines(w.begun) == 1 })
	before := n.promised()
	n.H.Kill()
	n.H.Up()
	n.Session = n.H.Root()
	if after := n.promised(); before < 12*mib || after < 12*mib || after > before {
		t.Errorf("%d bytes were promised, and after the start %d", before, after)
	}
	n.room.leave(30 * mib)
	_, signed := newcomer(t)
	n.full("PUT beside it", n.put(signed, 0, nil))
	n.emptied()
	if err := os.WriteFile(w.fifo, []byte("go\n"), 0); err != nil {
		t.Fatal(err)
	}
	if rec := n.Wait(task); rec["status"] != "success" {
		t.Errorf("%v", rec)
	}
	n.tidy("in the end")
}
