package integration

import (
	"bytes"
	"fmt"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"testing"

	"github.com/patchd/patchd/integration/lab"
)

// A daemon that is killed right after the transaction that makes an upload or an
// import true, and before the task of it has ended: the task tells of success
// after the restart, for the thing is there.
func TestB6_WhatIsThereIsNoFailure(t *testing.T) {
	t.Parallel()
	v := newVictim(t, lab.Options{})
	sr := defaultSR(v.s)
	uploads := &tusClient{Host: v.Host}
	ways := map[string]struct {
		class string
		do    func() // with a task of its own
	}{
		"PUT": {"pool_patch", func() { v.upload(v.fresh(lab.Patch{Pad: 1000}), true) }},
		"resumable": {"pool_patch", func() {
			k := v.fresh(lab.Patch{Pad: 1000})
			res, err := uploads.request(http.MethodPost, "/pool_patch_uploads", "Upload-Length", fmt.Sprint(len(k.signed)))
			if err != nil {
				t.Fatal(err)
			}
			uploads.location = res.Header.Get("Location")
			uploads.send(k.signed, 0, 1, nil)
		}},
		"import": {"VDI", func() {
			task := v.s.Call("task.create", "import", "").(string)
			v.s.Put("/import_raw_vdi", url.Values{"task_id": {task}, "sr_id": {sr}}, bytes.NewReader(random(1<<20)), 1<<20)
			v.follow(task)
		}},
		"create": {"VDI", func() {
			task := v.s.Call("Async.VDI.create", map[string]any{"SR": sr, "virtual_size": fmt.Sprint(4 << 20), "name_label": "x"}).(string)
			v.follow(task)
		}},
	}
	for way, w := range ways {
		t.Run(way, func(t *testing.T) {
			made, tasks := "", map[string]map[string]any{}
			// Where something else has written meanwhile, such as the progress of the
			// task, the commit is another update: then it is looked for once more.
			for attempt := 0; made == "" && attempt < 5; attempt++ {
				v.let("x", "")
				mark := v.mark()
				w.do()
				all, _ := v.lists(mark)
				nth := 0
				for i, renamed := 0, strings.LastIndex(strings.Join(all, " ")+" ", "sr.rename.done "); i < len(all); i++ {
					if all[i] == "store.update.done" {
						nth++
						if len(strings.Join(all[:i], " ")) > renamed {
							break // the commit
						}
					}
				}
				before := v.s.All(w.class)
				tasks = v.s.All("task")
				v.let(fmt.Sprintf("die@store.update.done#%d", nth), "")
				w.do()
				<-v.Exited()
				v.up()
				for ref := range v.s.All(w.class) {
					if before[ref] == nil {
						made = ref
					}
				}
				if made == "" {
					t.Logf("update %d of %v is not the commit", nth, all)
				}
			}
			if made == "" {
				t.Fatal("the commit was not met")
			}
			for ref, rec := range v.s.All("task") {
				if tasks[ref] == nil && (rec["status"] != "success" || plain(rec["result"].(string)) != made) {
					t.Errorf("%s was made, and the task says %v", made, rec)
				}
			}
		})
	}
}

// An upload that needs another image than it began with, for its message is
// compressed, goes on also when the daemon dies between the two.
func TestB6_KilledBetweenTwoDrafts(t *testing.T) {
	t.Parallel()
	for _, plan := range []string{"die@sr.create.done#2", "die@sr.destroy#1", "die@sr.destroy.done#1", "die@sr.destroy.done#2"} {
		t.Run(plan, func(t *testing.T) {
			t.Parallel()
			v := newVictim(t, lab.Options{})
			payload := (&lab.Patch{Pad: 1 << 20}).Payload()
			message := lab.DefaultKey(t).GPG(t, payload, "--sign", "-z", "6")
			c := &tusClient{Host: v.Host}
			v.let(plan, "")
			c.create(len(message))
			c.send(message, 0, 1, nil)
			<-v.Exited()
			v.up()
			res := c.send(message, c.offset(), 1, nil)
			if res == nil || res.StatusCode != http.StatusNoContent || res.Header.Get("Patchd-Pool-Patch") == "" {
				t.Fatalf("the upload does not go on: %v", res)
			}
			vdi := vdiOf(v.s, res.Header.Get("Patchd-Pool-Patch"))
			checkImage(t, image(v.s, vdi), payload)
			if left := append(inSR(t, filepath.Join(v.StateDir, "sr"), "*"), v.uploads()...); len(left) != 2 {
				t.Errorf("the SR holds %v", left)
			}
		})
	}
}
