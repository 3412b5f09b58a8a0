package sr

import "context"

// Inspector is a Repository that can also name what lies in it and is not a
// volume: files that somebody else put there. patchd leaves them alone.
type Inspector interface {
	// Strangers gives up to limit names, sorted, and how many there are in all.
	Strangers(ctx context.Context, limit int) (names []string, total int, err error)
}
