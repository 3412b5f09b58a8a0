package server

import (
	"os"
	"runtime/debug"
	"runtime/metrics"
)

// roomForCalls is the memory that calls and transfers may use, in bytes,
// before garbage is collected more often than usual.
const roomForCalls = 160 << 20

// boundMemory sets from when on the collector works harder: what lives now,
// which is the pool's records for the most part, twice, and roomForCalls. Who
// sets GOMEMLIMIT knows better.
func boundMemory() {
	if os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(live)
	if live[0].Value.Kind() == metrics.KindUint64 {
		debug.SetMemoryLimit(int64(2*live[0].Value.Uint64()) + roomForCalls)
	}
}
