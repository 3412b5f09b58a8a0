package sr_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/sr/all"
	"github.com/patchd/patchd/pkg/sr/memory"
	"github.com/patchd/patchd/pkg/sr/srtest"
	"github.com/patchd/patchd/pkg/xapi"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("unexpected error: %v", err)
	}
}

// attached gives an attached SR in memory.
func attached(t *testing.T, d *memory.Driver) sr.Repository {
	t.Helper()
	c := sr.Config{SR: xapi.NewUUID(), Device: map[string]string{"tag": "t"}}
	must(t, d.Create(t.Context(), c))
	r, err := d.Attach(t.Context(), c)
	must(t, err)
	return r
}

func TestTheListOfDriversHasEachTypeOnce(t *testing.T) {
	seen := map[string]bool{}
	for _, d := range all.Drivers() {
		i := d.Info()
		if i.Type == "" || seen[i.Type] {
			t.Errorf("driver type %q is empty or there twice", i.Type)
		}
		seen[i.Type] = true
	}
	if !seen["file"] {
		t.Error("the file driver is missing")
	}
}

func TestNames(t *testing.T) {
	u := func(c string) xapi.UUID {
		return xapi.UUID(strings.NewReplacer("x", c).Replace("xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx"))
	}
	o := sr.Owner{Pool: u("1"), Host: u("2"), Job: u("3")}
	for _, n := range []sr.Name{sr.Live(u("a")), sr.Part(o, u("b")), sr.Work(o, u("c"))} {
		if got, ok := sr.ParseName(n.String()); !ok || got != n {
			t.Errorf("%s reads back as %v, %v", n, got, ok)
		}
	}
	for _, s := range []string{"", "x", "vdi." + sr.Part(o, u("b")).String()[5:], sr.Live(u("A")).String(), "part....", sr.Work(o, u("c")).String() + ".x"} {
		if n, ok := sr.ParseName(s); ok {
			t.Errorf("%q was read as %v", s, n)
		}
	}
}

func TestCheckConfig(t *testing.T) {
	info := sr.Info{Type: "x", Config: map[string]string{"need": "what", "may": "be"}, Required: []string{"need"}}
	for name, device := range map[string]map[string]string{
		"a missing key":   {"may": "1"},
		"an empty value":  {"need": ""},
		"an unknown key":  {"need": "1", "server": "x"},
		"a line break":    {"need": "1\n2"},
		"a NUL":           {"need": "1\x00"},
		"no UTF-8":        {"need": "\xff\xfe"},
		"a huge value":    {"need": strings.Repeat("a", 5000)},
		"a hostile key":   {"need": "1", "\x1b[2J": "x"},
		"nothing at all ": nil,
	} {
		err := sr.CheckConfig(info, device)
		if !xapi.Is(err, xapi.ValueNotSupported) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, p := range xapi.AsError(err).Params {
			if len(p) > 400 || strings.ContainsAny(p, "\x00\x1b\n") {
				t.Errorf("%s: parameter %q", name, p)
			}
		}
	}
	must(t, sr.CheckConfig(info, map[string]string{"need": "ü"}))
}

// fail makes the nth point fail.
func fail(n int) (point func(string) error, fired *bool) {
	fired = new(bool)
	return func(name string) error {
		if n--; n == -1 {
			*fired = true
			return fmt.Errorf("failed at %s", name)
		}
		return nil
	}, fired
}

// Copy, failing at effect 0, 1, 2 … until nothing fires any more, leaves nothing
// but, when the answer of the undo itself is lost, the copy under its own name.
func TestCopyFailingAtEveryEffectLeavesNothing(t *testing.T) {
	ctx := t.Context()
	src := attached(t, &memory.Driver{})
	golden := sr.Live(xapi.NewUUID())
	_, err := src.Create(ctx, golden, 1<<20)
	must(t, err)
	for n := 0; ; n++ {
		point, fired := fail(n)
		plain := attached(t, &memory.Driver{})
		dst := sr.FaultyAt(plain, point)
		err := sr.Copy(ctx, dst, sr.Live(xapi.NewUUID()), src, golden, nil)
		list, serr := plain.Scan(ctx)
		must(t, serr)
		if !*fired {
			must(t, err)
			if n < 4 || len(list) != 1 {
				t.Errorf("%d points, %d volumes", n, len(list))
			}
			return
		}
		// "create.done": the caller never learned that it exists; its name is its owner's.
		if err == nil || len(list) > 0 && !strings.Contains(err.Error(), "create.done") {
			t.Errorf("point %d: error %v, left %v", n, err, list)
		}
	}
}

func TestCopyIsRefusedWithoutRoom(t *testing.T) {
	ctx := t.Context()
	src := attached(t, &memory.Driver{})
	golden := sr.Live(xapi.NewUUID())
	_, err := src.Create(ctx, golden, 8<<20)
	must(t, err)
	f, err := src.Open(ctx, golden, sr.ReadWrite)
	must(t, err)
	_, err = f.WriteAt(make([]byte, 4<<20), 0)
	must(t, errors.Join(err, f.Close()))
	dst := attached(t, &memory.Driver{Capacity: 2 << 20})
	if err := sr.Copy(ctx, dst, golden, src, golden, nil); !xapi.Is(err, xapi.OutOfSpace) {
		t.Errorf("copy of 4 MiB into 2 MiB: %v", err)
	}
	if list, err := dst.Scan(ctx); err != nil || len(list) > 0 {
		t.Errorf("left %v, %v", list, err)
	}
}

// A decorated driver passes the whole suite, and its points are passed in pairs.
func TestFaultyIsTransparent(t *testing.T) {
	srtest.Run(t, srtest.Suite{Double: true, New: func(*testing.T) (sr.Driver, sr.Config) {
		return sr.FaultyDriver(&memory.Driver{Clones: true}), sr.Config{SR: xapi.NewUUID(), Device: map[string]string{"tag": "t"}}
	}})
	var seen []string
	d := sr.FaultyDriverAt(&memory.Driver{}, func(name string) error { seen = append(seen, name); return nil })
	c := sr.Config{SR: xapi.NewUUID(), Device: map[string]string{"tag": "t"}}
	must(t, d.Create(t.Context(), c))
	r, err := d.Attach(t.Context(), c)
	must(t, err)
	_, err = r.Create(t.Context(), sr.Live(xapi.NewUUID()), 4096)
	must(t, err)
	if got := strings.Join(seen, " "); got != "sr.make sr.make.done sr.attach sr.attach.done sr.create sr.create.done" {
		t.Errorf("points: %s", got)
	}
}
