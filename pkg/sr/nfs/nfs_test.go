package nfs

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/patchd/patchd/pkg/dom0/dom0test"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/xapi"
)

func config(device map[string]string) sr.Config {
	return sr.Config{SR: xapi.NewUUID(), Device: device}
}

func TestWhatIsMounted(t *testing.T) {
	server, client := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.9")
	const always = ",acdirmin=0,acdirmax=0,lookupcache=pos"
	for name, c := range map[string]struct {
		device          map[string]string
		source, options string
		limit           time.Duration
	}{
		"as little as can be said": {
			map[string]string{"server": "nas.example.com", "serverpath": "/srv/sr"}, "nas.example.com:/srv/sr",
			"vers=4.2,addr=192.0.2.1,clientaddr=192.0.2.9,port=2049,softerr,timeo=40,retrans=2" + always, 15 * time.Second,
		},
		"an address and an old server": {
			map[string]string{"server": "192.0.2.1", "serverpath": "/", "nfsversion": "4.1"}, "192.0.2.1:/",
			"vers=4.1,addr=192.0.2.1,clientaddr=192.0.2.9,port=2049,softerr,timeo=40,retrans=2" + always, 15 * time.Second,
		},
		"all options": {
			map[string]string{"server": "[2001:db8::1]", "serverpath": "/a b", "options": "timeo=20,retrans=1,port=20049,proto=tcp6,sec=krb5p,rsize=65536,nconnect=4"}, "[2001:db8::1]:/a b",
			"vers=4.2,addr=192.0.2.1,clientaddr=192.0.2.9,port=20049,softerr,timeo=20,retrans=1" + always + ",proto=tcp6,sec=krb5p,rsize=65536,nconnect=4", 7 * time.Second,
		},
	} {
		e, err := read(config(c.device))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got := e.source(); got != c.source {
			t.Errorf("%s: source %q, want %q", name, got, c.source)
		}
		if got := e.mountOptions("softerr", server, client); got != c.options {
			t.Errorf("%s: options %q, want %q", name, got, c.options)
		}
		if got := e.limit(); got != c.limit {
			t.Errorf("%s: limit %s, want %s", name, got, c.limit)
		}
	}
}

func TestHostileConfigIsRefusedByACode(t *testing.T) {
	d, fake := &Driver{}, dom0test.New(nil)
	with := func(key, value string) map[string]string {
		m := map[string]string{"server": "nas", "serverpath": "/srv"}
		m[key] = value
		return m
	}
	for _, device := range []map[string]string{
		nil, {"server": "nas"}, {"serverpath": "/srv"}, with("no_such_key", "x"),
		with("server", ""), with("server", "nas,hard"), with("server", "-nas"), with("server", "nas:/x"), with("server", "nas/x"), with("server", "fe80::1%eth0"), with("server", strings.Repeat("a", 300)),
		with("serverpath", "srv"), with("serverpath", "/srv/../etc"), with("serverpath", "/srv//x"), with("serverpath", "/srv/"), with("serverpath", "/"+strings.Repeat("a", 2000)), with("serverpath", "/a\nb"),
		with("nfsversion", "3"), with("nfsversion", "4.2,hard"),
		with("options", "hard"), with("options", "suid"), with("options", "timeo"), with("options", "timeo=0"), with("options", "timeo=+40"), with("options", "timeo=40,timeo=41"), with("options", "timeo=600,retrans=10"),
		with("options", "sec=none"), with("options", "sec="), with("options", "proto=tcp tcp6"), with("options", ","), with("options", "addr=192.0.2.1"), with("options", "retrans=2,nosuid=0"),
	} {
		c := sr.Config{SR: xapi.NewUUID(), Device: device, Dom0: fake, MountDir: t.TempDir()}
		_, probe := d.Probe(t.Context(), c)
		_, attach := d.Attach(t.Context(), c)
		for verb, err := range map[string]error{"probe": probe, "create": d.Create(t.Context(), c), "attach": attach, "destroy": d.Destroy(t.Context(), c)} {
			if !xapi.Is(err, xapi.ValueNotSupported) {
				t.Errorf("%s with %.200q: %v, want %s", verb, device, err, xapi.ValueNotSupported)
			}
		}
	}
	if calls := fake.Calls(); len(calls) != 0 {
		t.Errorf("something was done: %v", calls)
	}
}

func testGate() *gate { return newGate(func() string { return "SR one" }, 15*time.Second) }

// A server that does not answer: the call ends in time and names the SR, the
// next ones are refused at once, and when the server is back all is as before.
func TestACallThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, back := testGate(), make(chan struct{})
		late := 0
		hang := func(context.Context) (int, error) { <-back; return 7, nil }
		begin := time.Now()
		_, err := call(t.Context(), g, "scan", hang, func(v int) { late = v })
		if took := time.Since(begin); took != 15*time.Second {
			t.Errorf("ended after %s", took)
		}
		if !xapi.Is(err, xapi.SRBackendFailure) || !errors.Is(err, os.ErrDeadlineExceeded) || !strings.Contains(err.Error(), "SR one: scan") {
			t.Errorf("error %v", err)
		}
		begin = time.Now()
		for range 100 {
			if _, err := call(t.Context(), g, "scan", hang, nil); !xapi.Is(err, xapi.SRBackendFailure) {
				t.Errorf("error %v", err)
			}
		}
		if took := time.Since(begin); took != 0 || g.stuck != 1 {
			t.Errorf("refused after %s, %d calls are left behind", took, g.stuck)
		}
		close(back)
		synctest.Wait()
		if late != 7 || g.hung() {
			t.Errorf("the late answer was %d, hung %v", late, g.hung())
		}
		if v, err := call(t.Context(), g, "scan", hang, nil); v != 7 || err != nil {
			t.Errorf("afterwards: %d, %v", v, err)
		}
	})
}

// However many call at once, few are left behind.
func TestFewCallsAreLeftBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, back := testGate(), make(chan struct{})
		running := 0
		errs := make(chan error)
		for range 100 {
			go func() {
				errs <- g.do(t.Context(), "open", func(context.Context) error {
					g.mu.Lock()
					running++
					g.mu.Unlock()
					<-back
					return nil
				})
			}()
		}
		for range 100 {
			if err := <-errs; !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("error %v", err)
			}
		}
		if running != maxCalls || g.stuck != maxCalls {
			t.Errorf("%d ran, %d are left behind", running, g.stuck)
		}
		close(back)
		synctest.Wait()
		if g.hung() || len(g.slots) != 0 {
			t.Errorf("hung %v, %d slots are taken", g.hung(), len(g.slots))
		}
	})
}

// A cancelled call to a server that answers ends by itself and stops nobody else.
func TestACancelledCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, why := testGate(), errors.New("the reason")
		ctx, cancel := context.WithCancelCause(t.Context())
		err := g.do(ctx, "scan", func(ctx context.Context) error {
			cancel(why)
			time.Sleep(time.Second) // the system call that was on its way
			return context.Cause(ctx)
		})
		if err != why || g.hung() {
			t.Errorf("error %v, hung %v", err, g.hung())
		}
		ctx, cancel = context.WithCancelCause(t.Context())
		back := make(chan struct{})
		begin := time.Now()
		err = g.do(ctx, "scan", func(context.Context) error { cancel(why); <-back; return nil })
		if took := time.Since(begin); err != why || took != graceAfterCancel || !g.hung() {
			t.Errorf("error %v after %s, hung %v", err, took, g.hung())
		}
		close(back)
		synctest.Wait()
	})
}

func TestErrorsOfTheKernelNameTheSR(t *testing.T) {
	g := testGate()
	for _, errno := range []error{syscall.ETIMEDOUT, syscall.EIO, syscall.ESTALE, syscall.EFBIG} {
		err := g.do(t.Context(), "stat", func(context.Context) error { return &os.PathError{Op: "stat", Path: "x", Err: errno} })
		if !xapi.Is(err, xapi.SRBackendFailure) || !errors.Is(err, errno) || !strings.Contains(err.Error(), "SR one: stat") {
			t.Errorf("%v became %v", errno, err)
		}
	}
	for _, err := range []error{os.ErrExist, xapi.NewError(xapi.VDINotAvailable, "x"), xapi.NewError(xapi.OutOfSpace, "x")} {
		if got := g.do(t.Context(), "stat", func(context.Context) error { return err }); got != err {
			t.Errorf("%v became %v", err, got)
		}
	}
}
