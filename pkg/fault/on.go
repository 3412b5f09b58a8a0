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
	loads sync.Once
	file  string // PATCHD_FAULT_PLAN
	text  string // what the plan was made from
	trace *os.File
	n     int // points passed since the plan was made
	plan
}

// plan says where to die or fail: "die@N" or "fail@N" counts every point of
// this process from 1; "die@NAME" or "fail@NAME" takes every point of that
// name, "fail@NAME#2" only the second.
//
// It is taken from PATCHD_FAULT, or from the file that PATCHD_FAULT_PLAN names,
// which may change while the process runs: counting begins anew then.
// PATCHD_FAULT_TRACE names a file that gets one line for each point passed.
type plan struct {
	die  bool
	at   int
	name string
	nth  int
	seen int
}

func load() {
	if path := os.Getenv("PATCHD_FAULT_TRACE"); path != "" {
		state.trace, _ = os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	}
	state.file = os.Getenv("PATCHD_FAULT_PLAN")
	state.plan = parse(os.Getenv("PATCHD_FAULT"))
}

func parse(text string) (p plan) {
	verb, where, ok := strings.Cut(strings.TrimSpace(text), "@")
	if !ok {
		return p
	}
	p.die = verb == "die"
	if n, err := strconv.Atoi(where); err == nil {
		p.at = n
		return p
	}
	name, nth, ok := strings.Cut(where, "#")
	p.name = name
	if ok {
		p.nth, _ = strconv.Atoi(nth)
	}
	return p
}

// reload looks whether the plan in the file is another one. Call it with state
// locked.
func reload() {
	if state.file == "" {
		return
	}
	b, _ := os.ReadFile(state.file)
	if text := string(b); text != state.text {
		state.text, state.n, state.plan = text, 0, parse(text)
	}
}

// Point passes the place called name: it may end the process by SIGKILL or
// return a *Failure, as the plan says.
func Point(name string) error {
	state.loads.Do(load)
	state.Lock()
	defer state.Unlock()
	reload()
	state.n++
	p := &state.plan
	if state.trace != nil {
		fmt.Fprintf(state.trace, "%d %d %s\n", os.Getpid(), state.n, name)
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
