package server

import (
	"os"
	"runtime/debug"
	"runtime/metrics"
)

// roomForCalls is the memory that calls and transfers may use, in bytes,
// before garbage is collected more often than usual.
const roomForCalls = 160 << 20

// roomForHost is what the link of a host may take, in bytes. All hosts of a pool
// may connect in a moment, as after a coordinator has died.
const roomForHost = 64 << 10

// boundMemory sets from when on the collector works harder: what lives now,
// which is the pool's records for the most part, twice, roomForCalls, and
// roomForHost for each host. Who sets GOMEMLIMIT knows better.
func boundMemory(hosts int) {
	if os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(live)
	if live[0].Value.Kind() == metrics.KindUint64 {
		debug.SetMemoryLimit(int64(2*live[0].Value.Uint64()) + roomForCalls + int64(hosts)*roomForHost)
	}
}
