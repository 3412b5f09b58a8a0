package pool

import (
	"testing"
	"time"
)

// BenchmarkRunOfAThousandHosts holds a run of 1,000 light hosts, 50 at once, against
// the time that their patches alone take: x-ideal is what it takes more.
func BenchmarkRunOfAThousandHosts(b *testing.B) {
	const hosts, atOnce, takes = 1000, 50, time.Second
	for b.Loop() {
		b.StopTimer()
		h := newHerd(b, hosts)
		h.takes = takes
		b.StartTimer()
		began := time.Now()
		id := h.begin(Policy{AtOnce: atOnce, Coordinator: CoordinatorAny})
		run, _ := h.ended(id, RunDone)
		if run.Counts[HostApplied] != hosts || h.most > atOnce {
			b.Errorf("%v, %d at once", run.Counts, h.most)
		}
		ideal := takes * hosts / atOnce
		b.ReportMetric(float64(time.Since(began))/float64(ideal), "x-ideal")
		h.stop()
	}
}
