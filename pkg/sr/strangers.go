package sr

import "context"

// Inspector is a Repository that can also name what lies in it and is not a
// volume: files that somebody else put there. patchd leaves them alone.
type Inspector interface {
	// Strangers gives up to limit names, sorted, and how many there are in all.
	Strangers(ctx context.Context, limit int) (names []string, total int, err error)
}

// Strangers asks a repository that is an Inspector; others have none to name.
func Strangers(ctx context.Context, r Repository, limit int) (names []string, total int, err error) {
	if f, ok := r.(*faulty); ok {
		r = f.Repository
	}
	if i, ok := r.(Inspector); ok {
		return i.Strangers(ctx, limit)
	}
	return nil, 0, nil
}
