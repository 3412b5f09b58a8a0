package pool

import (
	"fmt"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/xapi"
)

func TestWhoFetchesIsForgottenInTime(t *testing.T) {
	var f fetching
	now := time.Unix(1000, 0)
	a, b := xapi.NewRef(), xapi.NewRef()
	for i, step := range []struct {
		digest string
		host   xapi.Ref
		does   bool
		after  time.Duration
		want   int // others
	}{
		{"x", a, true, 0, 0},
		{"x", b, true, 0, 1},
		{"x", a, true, 0, 1},
		{"y", b, false, 0, 0},
		{"x", b, false, 0, 1},
		{"x", b, true, fetchingFor + 1, 0}, // a has said nothing for too long
		{"x", a, false, 0, 1},
		{"x", b, false, 0, 0},
	} {
		now = now.Add(step.after)
		if got := f.note(now, step.digest, step.host, step.does); len(got) != step.want {
			t.Errorf("step %d: %d others, want %d", i, len(got), step.want)
		}
	}
	if f.n != 0 || len(f.at) != 0 {
		t.Errorf("%d hosts of %d images are left", f.n, len(f.at))
	}
	for i := range 100 {
		f.note(now.Add(time.Duration(i)*time.Second), fmt.Sprint(i), a, true)
	}
	if f.n > int(fetchingFor/time.Second)+2 || len(f.at) != f.n {
		t.Errorf("%d hosts of %d images are remembered", f.n, len(f.at))
	}
}
