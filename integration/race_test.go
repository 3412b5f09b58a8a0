package integration

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/patchd/patchd/integration/lab"
)

// A10: two applies of one patch at the same moment.
func TestA10_TwoAppliesAtOnce(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	_, host := s.One("host")
	effect := filepath.Join(t.TempDir(), "effect")
	for round := range 5 {
		p := s.MustUpload(&lab.Patch{Apply: fmt.Sprintf("echo %d >> %s; sleep 0.3", round, effect)})
		errs := make([]error, 4)
		var wg sync.WaitGroup
		for i := range errs {
			wg.Go(func() { _, errs[i] = s.Try("pool_patch.apply", p, s.Host()) })
		}
		wg.Wait()
		good := 0
		for _, err := range errs {
			if err == nil {
				good++
				continue
			}
			params := hasCode(t, err, "OTHER_OPERATION_IN_PROGRESS")
			if len(params) != 3 || params[0] != "Pool_patch" || params[1] != p || !strings.Contains(params[2], host["name_label"].(string)) {
				t.Errorf("%q", params)
			}
		}
		if good != 1 {
			t.Errorf("%d of them ran", good)
		}
		if n := lines(effect); n != round+1 {
			t.Errorf("after %d rounds %d effects", round+1, n)
		}
	}
}

// While a patch is being applied, what would take it away or apply it again is
// refused.
func TestA10_WhileAPatchIsApplied(t *testing.T) {
	t.Parallel()
	s := lab.Start(t, lab.Options{}).Root()
	gate := filepath.Join(t.TempDir(), "gate")
	begun := gate + ".begun"
	p := s.MustUpload(&lab.Patch{Apply: fmt.Sprintf("touch %s; while [ ! -e %s ]; do sleep 0.02; done", begun, gate)})
	vdi := vdiOf(s, p)
	task := s.Call("Async.pool_patch.apply", p, s.Host()).(string)
	until(t, "the apply to begin", func() bool { return exists(begun) })
	_, err := s.Try("pool_patch.pool_apply", p)
	hasCode(t, err, "OTHER_OPERATION_IN_PROGRESS")
	_, err = s.Try("pool_patch.destroy", p)
	wantCode(t, err, "PATCH_IS_APPLIED")
	_, err = s.Try("VDI.destroy", vdi)
	hasCode(t, err, "VDI_IN_USE")
	_, err = s.Try("pool_patch.pool_clean", p)
	hasCode(t, err, "VDI_IN_USE")
	_, hp := s.One("host_patch")
	if hp["applied"] != false || hp["pool_patch"] != p {
		t.Errorf("%v", hp)
	}
	if err := os.WriteFile(gate, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if rec := s.Wait(task); rec["status"] != "success" {
		t.Errorf("%v", rec)
	}
}

// A10: 50 uploads of one patch at once.
func TestA10_FiftyUploadsAtOnce(t *testing.T) {
	t.Parallel()
	h := lab.Start(t, lab.Options{})
	s := h.Root()
	p := &lab.Patch{Pad: 200_000}
	signed := p.Signed(t)
	answers := make([]lab.Answer, 50)
	var wg sync.WaitGroup
	for i := range answers {
		wg.Go(func() {
			a, err := s.Put("/pool_patch_upload", nil, bytes.NewReader(signed), int64(len(signed)))
			if err != nil {
				t.Error(err)
			}
			answers[i] = a
		})
	}
	wg.Wait()
	made, refused := 0, 0
	for _, a := range answers {
		switch a.Status {
		case http.StatusCreated:
			made++
		case http.StatusConflict:
			refused++
			wantCode(t, a.Err(), "PATCH_ALREADY_EXISTS", string(p.UUID))
		default:
			t.Errorf("%d %s", a.Status, a.Body)
		}
	}
	if made != 1 || refused != 49 {
		t.Errorf("%d made, %d refused", made, refused)
	}
	ref, _ := s.One("pool_patch")
	vdi, _ := s.One("VDI")
	if vdiOf(s, ref) != vdi {
		t.Error("the record names another VDI")
	}
	if images, _ := filepath.Glob(filepath.Join(h.StateDir, "sr", "*.img")); len(images) != 1 {
		t.Errorf("%v", images)
	}
}

// S1-14: prechecks of one patch at the same time have an image each.
func TestS1_14_EachHasAnImageOfItsOwn(t *testing.T) {
	t.Parallel()
	for _, fs := range []func(testing.TB, int64) string{ext4FS, xfsFS} {
		h := lab.Start(t, lab.Options{Dir: fs(t, 2*gib)})
		s := h.Root()
		dir := t.TempDir()
		p := s.MustUpload(&lab.Patch{Precheck: fmt.Sprintf(`set -e
[ ! -e "$PATCHD_SCRATCH/id" ]
echo $$ > "$PATCHD_SCRATCH/id"; echo $$ >> "$0"
touch %[1]s/$$
while [ $(ls %[1]s | wc -l) -lt 3 ]; do sleep 0.02; done
[ $(cat "$PATCHD_SCRATCH/id") = $$ ]
[ "$(tail -n 1 "$0")" = $$ ]
exit 0`, dir)})
		golden := fileSum(t, image(s, vdiOf(s, p)))
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				if _, err := precheck(s, p); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if fileSum(t, image(s, vdiOf(s, p))) != golden {
			t.Error("the golden image has changed")
		}
		h.Down()
	}
}
