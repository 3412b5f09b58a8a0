//go:build bench

// Package bench measures the whole system.
package bench

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
)

// Targets are ratios to a baseline that runs in turn with what is measured, in
// the same process tree, so that the machine's moods cancel out.

const (
	benchRounds = 5
	mib         = int64(1) << 20
	gib         = int64(1) << 30
)

// row is one line of the table: got against base, pair by pair, or figures of
// their own.
type row struct {
	name           string // of the benchmark, for named runs
	what, baseline string
	target         float64 // a ratio, or a figure where baseline is ""
	got, base      []time.Duration
	figures        []float64
	unit           string
}

func median[T cmp.Ordered](d []T) T {
	s := slices.Clone(d)
	slices.Sort(s)
	return s[len(s)/2]
}

// value is the median of the ratios of the pairs, or of the figures.
func (r row) value() float64 {
	if r.figures != nil {
		return median(r.figures)
	}
	var rs []float64
	for i := range r.got {
		rs = append(rs, float64(r.got[i])/float64(r.base[i]))
	}
	return median(rs)
}

func (r row) print(t *testing.T) {
	got, base := "", ""
	if r.figures == nil {
		got, base = round(median(r.got)), round(median(r.base))
	}
	met := ""
	if r.value() > r.target {
		met = "  MISSED"
		t.Errorf("%s: %.3f %s, the target is %.3f", r.what, r.value(), r.unit, r.target)
	}
	fmt.Printf("%-58s %-40s %9s %9s %8.3f %-6s %8.3f%s\n", r.what, cmp.Or(r.baseline, "-"), got, base, r.value(), cmp.Or(r.unit, "ratio"), r.target, met)
}

func round(d time.Duration) string {
	if d < 100*time.Millisecond {
		return d.Round(10 * time.Microsecond).String()
	}
	return d.Round(time.Millisecond).String()
}

// save appends the samples as Go's benchmarks print them, for benchstat.
func (r row) save(f *os.File) {
	for i, d := range r.got {
		fmt.Fprintf(f, "Benchmark%s 1 %d ns/op %.4f ratio\n", r.name, d.Nanoseconds(), float64(d)/float64(r.base[i]))
		fmt.Fprintf(f, "Benchmark%s/baseline 1 %d ns/op\n", r.name, r.base[i].Nanoseconds())
	}
	for _, v := range r.figures {
		fmt.Fprintf(f, "Benchmark%s 1 %.4f %s\n", r.name, v, cmp.Or(r.unit, "ratio"))
	}
}

func TestMain(m *testing.M) { lab.Main(m) }

// bench is one run: what the measurements share.
type bench struct {
	*testing.T
	dir string
}

// pairs runs base and got in turn, after one round that warms up.
func (b *bench) pairs(r row, base, got func() time.Duration) row {
	b.Helper()
	for i := range benchRounds + 1 {
		x, y := base(), got()
		if i > 0 {
			r.base, r.got = append(r.base, x), append(r.got, y)
		}
	}
	return r
}

func timed(f func()) time.Duration {
	start := time.Now()
	f()
	return time.Since(start)
}

type measurement struct {
	name string
	run  func(*bench) []row
}

// measurements are those of one host, in the order of the table.
var measurements = []measurement{
	{"put", benchPut},
	{"tls", benchPutTLS},
	{"layout", benchLayout},
	{"memory", benchMemory},
	{"clone", benchClone},
	{"clones", benchClones},
	{"apply", benchApply},
	{"verify", benchVerify},
	{"copy", benchCopy},
	{"delta", benchDelta},
	{"resume", benchResume},
}

// poolMeasurements are those of many hosts.
var poolMeasurements = []measurement{
	{"apply", benchPoolApply},
	{"idle", benchIdle},
	{"job", benchJob},
	{"failover", benchFailover},
	{"run", benchRun},
}

// TestBenchPool prints the table of many hosts; see TestBench.
func TestBenchPool(t *testing.T) { table(t, poolMeasurements) }

// TestBench prints the table. PATCHD_BENCH_ONLY is a pattern for the names of
// the measurements to make; PATCHD_BENCH_OUT a file that keeps the samples.
func TestBench(t *testing.T) { table(t, measurements) }

func table(t *testing.T, measurements []measurement) {
	only, err := regexp.Compile(os.Getenv("PATCHD_BENCH_ONLY"))
	if err != nil {
		t.Fatal(err)
	}
	var rows []row
	for _, m := range measurements {
		if !only.MatchString(m.name) {
			continue
		}
		t.Run(m.name, func(t *testing.T) {
			rows = append(rows, m.run(&bench{t, t.TempDir()})...)
		})
	}
	if len(rows) == 0 {
		t.Fatalf("no measurement has a name like %q", only)
	}
	fmt.Printf("\n%-58s %-40s %9s %9s %8s %-6s %8s\n", "WHAT", "BASELINE", "MEDIAN", "BASELINE", "VALUE", "", "TARGET")
	for _, r := range rows {
		r.print(t)
	}
	keep(t, rows)
}

func keep(t *testing.T, rows []row) {
	path := os.Getenv("PATCHD_BENCH_OUT")
	if path == "" {
		return
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, r := range rows {
		r.save(f)
	}
	fmt.Println("samples are in", path)
}
