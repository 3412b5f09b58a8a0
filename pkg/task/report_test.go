package task

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

func TestProgressIsThrottledMonotonicAndEndsAtOne(t *testing.T) {
	r := newRig(t)
	ref := r.create(Spec{})
	_, err := r.Run(t.Context(), ref, func(_ context.Context, h *Handle) (string, error) {
		h.Progress(0.1)
		first := r.until(ref, func(rec Record) bool { return rec.Progress == 0.1 })
		for n := range 1000 {
			h.Progress(float64(n) / 2000)
		}
		h.Progress(0.3)
		h.Progress(-7)
		h.Progress(math.NaN())
		if it := item(r, ref); it.Modified != first {
			t.Error("a second write within the second")
		}
		r.clock.advance(time.Second)
		second := r.until(ref, func(rec Record) bool { return rec.Progress > 0.1 })
		if got := r.get(ref).Progress; got != 999.0/2000 {
			t.Errorf("progress %v", got)
		}
		r.clock.advance(time.Hour)
		if it := item(r, ref); it.Modified != second {
			t.Error("a write without anything new")
		}
		h.Progress(1e9)
		r.until(ref, func(rec Record) bool { return rec.Progress == 1 && rec.Status == Pending })
		return "", nil
	})
	wantCode(t, err, "")
	r.wantEnd(r.get(ref), Success)
}

func item(r *rig, ref xapi.Ref) (it store.Item) {
	_ = r.s.View(func(v *store.View) error {
		it, _ = v.Get(Class, ref)
		return nil
	})
	return it
}

func TestWhatWasReportedLastIsThereAtTheEnd(t *testing.T) {
	r := newRig(t)
	ref := r.create(Spec{})
	long := strings.Repeat("line é\n", 10000) + "the end"
	_, err := r.Run(t.Context(), ref, func(_ context.Context, h *Handle) (string, error) {
		h.Progress(0.5)
		for n := range 100 {
			h.Detail(fmt.Sprint("key", n), "v")
		}
		h.Output("first")
		h.Detail("key1", "new\xffest")
		h.Detail("key0", long)
		return "", errors.New("boom")
	})
	wantCode(t, xapi.AsError(err), xapi.InternalError)
	rec := r.get(ref)
	if n := len(rec.OtherConfig); n != maxDetails {
		t.Errorf("%d details", n)
	}
	if rec.OtherConfig["key1"] != "new\uFFFDest" {
		t.Errorf("%q", rec.OtherConfig["key1"])
	}
	if v := rec.OtherConfig["key0"]; len(v) > maxDetailValue || !strings.HasSuffix(v, "the end") || !utf8.ValidString(v) {
		t.Errorf("%d bytes", len(v))
	}
}

func TestOutputKeepsItsTail(t *testing.T) {
	r := newRig(t)
	h, err := r.Begin(t.Context(), Spec{})
	if err != nil {
		t.Fatal(err)
	}
	h.Output(strings.Repeat("x", 3*maxOutput) + "y")
	r.until(h.Ref(), func(rec Record) bool {
		out := rec.OtherConfig[OutputKey]
		return len(out) == maxOutput && strings.HasSuffix(out, "xy")
	})
	wantCode(t, r.Complete(t.Context(), h.Ref(), "", nil), "")
	h.Progress(0.5)
	h.Output("too late")
	r.Stop()
	if out := r.get(h.Ref()).OtherConfig[OutputKey]; out == "too late" {
		t.Error("a report after the end is written")
	}
}

func TestCutAndTailKeepWholeCharacters(t *testing.T) {
	for n := range 12 {
		for _, s := range []string{"", "abc", "éèü", "日本語", "a\xff\xfeb", "😀😀"} {
			for name, got := range map[string]string{"cut": cut(s, n), "tail": tail(s, n)} {
				if len(got) > n || !utf8.ValidString(got) {
					t.Errorf("%s(%q, %d) = %q", name, s, n, got)
				}
			}
		}
	}
	if cut("日本語", 7) != "日本" || tail("日本語", 7) != "本語" {
		t.Error(cut("日本語", 7), tail("日本語", 7))
	}
}

func TestReportsFromManyGoroutines(t *testing.T) {
	r := newRig(t)
	ref := r.create(Spec{})
	_, err := r.Run(t.Context(), ref, func(_ context.Context, h *Handle) (string, error) {
		var wg sync.WaitGroup
		for g := range 8 {
			wg.Go(func() {
				for n := range 50 {
					h.Progress(float64(n) / 50)
					h.Detail(fmt.Sprint("g", g), fmt.Sprint(n))
					r.clock.advance(200 * time.Millisecond)
				}
			})
		}
		wg.Wait()
		return "", nil
	})
	wantCode(t, err, "")
	rec := r.get(ref)
	for g := range 8 {
		if rec.OtherConfig[fmt.Sprint("g", g)] != "49" {
			t.Errorf("g%d: %q", g, rec.OtherConfig[fmt.Sprint("g", g)])
		}
	}
}
