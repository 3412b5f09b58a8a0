//go:build bench

package bench

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/integration/lab"
	"github.com/patchd/patchd/pkg/link"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/trust"
	"github.com/patchd/patchd/pkg/xapi"
)

// herd is a coordinator and light hosts: real links with keys of their own, in
// the process of the benchmark, and nothing behind them.
type herd struct {
	*bench
	h     *lab.Host
	s     *lab.Session
	patch *lab.Patch
	ref   string // of patch
	hosts []*lightHost
}

type lightHost struct {
	ref    xapi.Ref
	id     *trust.Identity
	client *link.Client
	took   chan time.Time // when a job was claimed
}

// lightTag is on all light hosts.
const lightTag = "light"

// newHerd starts a coordinator, uploads a patch and writes the records of n
// light hosts, which are not connected yet.
func newHerd(b *bench, n int) *herd {
	b.Helper()
	etcd := lab.StartEtcd(b, 1)
	r := &herd{bench: b, h: lab.Start(b, lab.Options{Store: etcd.URL(""), Flags: []string{"--copies", "1", "--log-level", "warning"}}), patch: &lab.Patch{}}
	r.s = (&lab.Pool{T: b, Hosts: []*lab.Host{r.h}}).Leader()
	r.ref = r.s.MustUpload(r.patch)
	st, err := store.Open(b.Context(), store.Options{URL: etcd.URL("")})
	if err != nil {
		b.Fatal(err)
	}
	dir, err := os.MkdirTemp("/dev/shm", "patchd-herd-") // keys are written durably, one by one
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { os.RemoveAll(dir) })
	for len(r.hosts) < n {
		batch := r.make(dir, min(100, n-len(r.hosts)))
		err := st.Update(b.Context(), func(tx *store.Tx) error {
			for _, l := range batch {
				tx.Put(pool.ClassHost, l.ref, pool.Host{
					UUID: xapi.NewUUID(), NameLabel: string(l.ref), Tags: []string{lightTag}, Enabled: true,
					Keys:            []pool.HostKey{{SPKI: l.id.SPKI(), Added: time.Now()}},
					SoftwareVersion: map[string]string{}, OtherConfig: map[string]string{}, CPUInfo: map[string]string{},
					Logging: map[string]string{}, LicenseServer: map[string]string{}, GuestVCPUsParams: map[string]string{},
				})
			}
			return nil
		})
		if err != nil {
			b.Fatal(err)
		}
		r.hosts = append(r.hosts, batch...)
	}
	if err := st.Close(); err != nil {
		b.Fatal(err)
	}
	r.h.Restart() // it knows its hosts, as one that they have joined does
	r.s = (&lab.Pool{T: b, Hosts: []*lab.Host{r.h}}).Leader()
	return r
}

// make makes light hosts and their keys.
func (r *herd) make(dir string, n int) (all []*lightHost) {
	r.Helper()
	for range n {
		id, err := trust.Open(filepath.Join(dir, string(xapi.NewUUID())), "light")
		if err != nil {
			r.Fatal(err)
		}
		all = append(all, &lightHost{ref: xapi.NewRef(), id: id, took: make(chan time.Time, 1)})
	}
	return all
}

// connect connects all light hosts and has them carry out what they are given:
// an apply takes so long. It gives what ends them.
func (r *herd) connect(takes time.Duration) (end func()) {
	r.Helper()
	coordinator, err := trust.Open(filepath.Join(r.h.StateDir, "tls.pem"), "")
	if err != nil {
		r.Fatal(err)
	}
	leader := pool.Peer{Host: xapi.UUID(r.h.UUID()), URL: r.h.TLSURL, Keys: [][]byte{coordinator.SPKI()}}
	log := logrus.New()
	log.SetOutput(io.Discard)
	ctx, cancel := context.WithCancel(context.Background())
	var all, ready sync.WaitGroup
	dialling := make(chan struct{}, 16)
	for _, l := range r.hosts {
		l.client, err = link.NewClient(link.ClientOptions{
			Identity: l.id, Log: log, Coordinators: func() []pool.Peer { return []pool.Peer{leader} },
			Facts: func() pool.Facts {
				return pool.Facts{Hostname: "light", Address: "127.0.0.1", URL: "https://127.0.0.1:1", SoftwareVersion: map[string]string{}}
			},
		})
		if err != nil {
			r.Fatal(err)
		}
		ready.Go(func() {
			dialling <- struct{}{}
			defer func() { <-dialling }()
			all.Go(func() { _ = l.client.Run(ctx) }) // it ends with ctx
			if l.client.Ready(ctx) == nil && takes >= 0 {
				all.Go(func() { l.work(ctx, takes) })
			}
		})
	}
	ready.Wait()
	end = func() { cancel(); all.Wait() }
	r.Cleanup(end)
	return end
}

// work takes jobs until ctx ends.
func (l *lightHost) work(ctx context.Context, takes time.Duration) {
	begun := map[xapi.UUID]bool{}
	for {
		jobs, rev, err := l.client.Jobs(l.ref)
		if err != nil {
			return
		}
		for _, j := range jobs {
			if begun[j.Job.UUID] {
				continue
			}
			begun[j.Job.UUID] = true
			attempt, err := l.client.JobClaim(ctx, j.Ref)
			if err != nil {
				continue
			}
			select {
			case l.took <- time.Now():
			default:
			}
			select {
			case <-time.After(takes):
			case <-ctx.Done():
				return
			}
			stamp := sha256.Sum256([]byte(j.Patch.InfoXML))
			_ = l.client.JobFinish(ctx, j.Ref, pool.Outcome{At: time.Now(), Attempt: attempt, Proof: &pool.Proof{
				Stamp: hex.EncodeToString(stamp[:]), Payload: j.Patch.Digest, UUID: j.Patch.UUID, Version: j.Patch.Version,
			}}) // the run tells what has failed
		}
		if l.client.WaitChange(ctx, rev) != nil {
			return
		}
	}
}

// benchIdle connects 10,000 hosts that have nothing to do.
func benchIdle(b *bench) []row {
	const n, settle, span = 10_000, 20 * time.Second, 50 * time.Second // in which each host beats once
	r := newHerd(b, n)
	time.Sleep(2 * time.Second) // the records are in
	before := rss(b, r.h.Pid())
	took := timed(func() { r.connect(-1) })
	b.Logf("%d hosts have connected in %s", n, took.Round(time.Millisecond))
	time.Sleep(settle)
	busy := cpuOf(b, r.h.Pid())
	time.Sleep(span) // what is measured is that nothing happens
	busy = cpuOf(b, r.h.Pid()) - busy
	return []row{
		{name: "IdleCPU", what: "10,000 idle hosts: part of one core", target: 0.10, unit: "cores", figures: []float64{float64(busy) / float64(span)}},
		{name: "IdleMemory", what: "10,000 idle hosts: memory of the coordinator for each", target: 100, unit: "KB", figures: []float64{float64(rss(b, r.h.Pid())-before) / n / 1000}},
	}
}

// benchJob measures how long a job takes from the call to its claim on the host,
// which is when it begins there. All of it is on one machine: there is no network
// to take away.
func benchJob(b *bench) []row {
	r := newHerd(b, 21)
	r.connect(0)
	figures := []float64{}
	for i, l := range r.hosts {
		began := time.Now()
		task := r.s.Call("Async.pool_patch.apply", r.ref, string(l.ref)).(string)
		ms := (<-l.took).Sub(began).Seconds() * 1000
		if rec := r.s.Wait(task); rec["status"] != "success" {
			b.Fatal(rec)
		}
		if i > 0 {
			figures = append(figures, ms)
		}
	}
	return []row{{name: "JobStart", what: "a job, from the call to its start on the host", target: 50, unit: "ms", figures: figures}}
}

// benchRun has 1,000 light hosts apply a patch that takes a second, 50 at once.
func benchRun(b *bench) []row {
	const n, atOnce, takes = 1000, 50, time.Second
	r := newHerd(b, n)
	r.connect(takes)
	began := time.Now()
	words := strings.Fields(r.h.Must("patch", "pool-apply", string(r.patch.UUID), "--tag", lightTag, "--at-once", strconv.Itoa(atOnce), "--no-precheck", "--coordinator", "any", "--detach"))
	run := words[len(words)-1]
	var rec map[string]any
	for {
		rec = r.s.Call("patchd.run_show", run).(map[string]any)
		if rec["ended"] == "true" {
			break
		}
		time.Sleep(200 * time.Millisecond)
	}
	took := time.Since(began)
	if rec["state"] != "done" || rec["count_applied"] != strconv.Itoa(n) {
		b.Fatalf("%v", rec)
	}
	return []row{{
		name: "Run1000", what: "pool_apply on 1,000 light hosts, 50 at once", baseline: "the patches' own time", target: 1.2,
		got: []time.Duration{took}, base: []time.Duration{takes * n / atOnce},
	}}
}

// rss is what a process has in memory now, in bytes.
func rss(t testing.TB, pid int) int64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.ParseInt(strings.Fields(string(b))[1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return pages * int64(os.Getpagesize())
}

// cpuOf is what a process has used of the processors.
func cpuOf(t testing.TB, pid int) time.Duration {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	user, err1 := strconv.ParseInt(f[11], 10, 64)
	system, err2 := strconv.ParseInt(f[12], 10, 64)
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	return time.Duration(user+system) * 10 * time.Millisecond // a tick of /proc is 1/100 s
}
