//go:build faults

package fault

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// Enabled tells whether this build can be told to fail.
const Enabled = true

// Failure is the error of a point that was told to fail.
type Failure struct{ Name string }

func (f *Failure) Error() string { return "fault injected at " + f.Name }

var state struct {
	sync.Mutex
	n     int
	loads sync.Once
	plan
}

// plan is read from PATCHD_FAULT: "die@N" or "fail@N" counts every point of
// this process from 1; "die@NAME" or "fail@NAME" takes every point of that
// name, "fail@NAME#2" only the second. PATCHD_FAULT_TRACE names a file that
// gets one line for each point passed.
type plan struct {
	die   bool
	at    int
	name  string
	nth   int
	seen  int
	trace *os.File
}

func load() {
	p := &state.plan
	if path := os.Getenv("PATCHD_FAULT_TRACE"); path != "" {
		p.trace, _ = os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	}
	verb, where, ok := strings.Cut(os.Getenv("PATCHD_FAULT"), "@")
	if !ok {
		return
	}
	p.die = verb == "die"
	if n, err := strconv.Atoi(where); err == nil {
		p.at = n
		return
	}
	name, nth, ok := strings.Cut(where, "#")
	p.name = name
	if ok {
		p.nth, _ = strconv.Atoi(nth)
	}
}

// Point passes the place called name: it may end the process by SIGKILL or
// return a *Failure, as PATCHD_FAULT says.
func Point(name string) error {
	state.loads.Do(load)
	state.Lock()
	defer state.Unlock()
	state.n++
	p := &state.plan
	if p.trace != nil {
		fmt.Fprintf(p.trace, "%d %d %s\n", os.Getpid(), state.n, name)
	}
	hit := p.at > 0 && state.n == p.at
	if p.name != "" && p.name == name {
		p.seen++
		hit = p.nth == 0 || p.nth == p.seen
	}
	if !hit {
		return nil
	}
	if p.die {
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
	return &Failure{name}
}
