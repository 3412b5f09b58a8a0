package link

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/trust"
	"github.com/patchd/patchd/pkg/xapi"
)

// crowdPlan is what the process that plays the hosts is told.
type crowdPlan struct {
	URL  string
	Keys [][]byte
	Dir  string // of the tls.pem files of the hosts
	Beat time.Duration
}

// playHosts connects all hosts of a plan, says "connected", and keeps them
// until its standard input ends.
func playHosts() int {
	var p crowdPlan
	if err := json.Unmarshal([]byte(os.Getenv("LINK_TEST_HOSTS")), &p); err != nil {
		panic(err)
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	var ready sync.WaitGroup
	dialling := make(chan struct{}, 16)
	names, err := os.ReadDir(p.Dir)
	if err != nil {
		panic(err)
	}
	for _, n := range names {
		id, err := trust.Open(filepath.Join(p.Dir, n.Name()), "h")
		if err != nil {
			panic(err)
		}
		c, err := NewClient(ClientOptions{
			Identity: id, Log: log, Facts: func() pool.Facts { return pool.Facts{} },
			Coordinators: func() []pool.Peer { return []pool.Peer{{URL: p.URL, Keys: p.Keys}} },
		})
		if err != nil {
			panic(err)
		}
		c.times.beat = p.Beat
		ready.Go(func() {
			dialling <- struct{}{}
			defer func() { <-dialling }()
			all.Go(func() { _ = c.Run(ctx) })
			if err := c.Ready(ctx); err != nil {
				panic(err)
			}
		})
	}
	ready.Wait()
	fmt.Println("connected")
	_, _ = bufio.NewReader(os.Stdin).ReadByte()
	cancel()
	all.Wait()
	return 0
}

// TestIdle measures what idle hosts cost the coordinator: memory of each, and
// the part of one core, by hosts that are a process of their own and send their
// beats. LINK_IDLE_HOSTS says how many there are, LINK_IDLE_TIME for how many
// seconds; only then is the time held against the target. However many there are, as many beats come in a second as 10,000
// hosts send.
func TestIdle(t *testing.T) {
	hosts, span := setting("LINK_IDLE_HOSTS", 1000), time.Duration(setting("LINK_IDLE_TIME", 3))*time.Second
	r := newRigOf(t, defaultTimes, Proto)
	r.log.SetLevel(logrus.WarnLevel)
	r.said.Reset()
	dir := t.TempDir()
	r.crowd(dir, hosts)
	before := memory()
	plan, err := json.Marshal(crowdPlan{URL: r.url, Keys: [][]byte{r.id.SPKI()}, Dir: dir, Beat: defaultTimes.beat * time.Duration(hosts) / 10_000})
	r.must(err)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "LINK_TEST_HOSTS="+string(plan))
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	r.must(err)
	out, err := cmd.StdoutPipe()
	r.must(err)
	r.must(cmd.Start())
	defer func() { in.Close(); _ = cmd.Wait() }()
	began := time.Now()
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "connected\n" {
		t.Fatal(line, err)
	}
	connecting := time.Since(began)
	if n := len(r.hub.Hosts()); n != hosts {
		t.Fatalf("%d of %d hosts are connected", n, hosts)
	}
	each := (memory() - before) / int64(hosts)
	cpu, goroutines := cpuTime(), runtime.NumGoroutine()
	time.Sleep(span) // what is measured is that nothing happens
	share := float64(cpuTime()-cpu) / float64(span)
	t.Logf("%d hosts in %s: %d KiB each, %d goroutines, %.1f %% of one core", hosts, connecting.Round(time.Millisecond), each>>10, goroutines, 100*share)
	if each > 100_000 {
		t.Errorf("a host takes %d bytes", each)
	}
	if share > 0.1 && os.Getenv("LINK_IDLE_HOSTS") != "" { // what else this machine does is nobody's fault
		t.Errorf("idle hosts take %.1f %% of one core", 100*share)
	}
	if extra := goroutines - hosts; extra > 200 {
		t.Errorf("%d goroutines for %d hosts", goroutines, hosts)
	}
}

func setting(name string, def int) int {
	if n, err := strconv.Atoi(os.Getenv(name)); err == nil {
		return n
	}
	return def
}

// crowd makes the records of many hosts, and their keys as files in dir.
func (r *rig) crowd(dir string, n int) {
	r.t.Helper()
	for done := 0; done < n; {
		r.must(r.store.Update(r.t.Context(), func(tx *store.Tx) error {
			for range min(100, n-done) {
				id, err := trust.Open(filepath.Join(dir, string(xapi.NewUUID())), "h")
				if err != nil {
					return err
				}
				tx.Put(pool.ClassHost, xapi.NewRef(), pool.Host{UUID: xapi.NewUUID(), Keys: []pool.HostKey{{SPKI: id.SPKI()}}})
			}
			return nil
		}))
		done += min(100, n-done)
	}
}

// memory is what the process holds: heap and stacks after a collection.
func memory() int64 {
	debug.FreeOSMemory()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse + m.StackInuse)
}

// cpuTime is what the process has used of the processors.
func cpuTime() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
