package task

import "time"

// Clock is the time as this package sees it; tests bring their own.
type Clock interface {
	Now() time.Time
	// AfterFunc runs f in its own goroutine after d. The function it returns
	// gives true when f will not run any more, as time.Timer.Stop does.
	AfterFunc(d time.Duration, f func()) (stop func() bool)
}

type realClock struct{}

func (realClock) Now() time.Time { return time.Now() }

func (realClock) AfterFunc(d time.Duration, f func()) func() bool {
	return time.AfterFunc(d, f).Stop
}
