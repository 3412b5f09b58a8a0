// Package task keeps the records of class task: what the pool is doing, how
// far it is, and how it ended.
//
// # Terms
//
// A task is pending, then perhaps cancelling, and at last exactly one of
// success, failure and cancelled. Those three are terminal: whoever writes the
// first of them wins, decided by a transaction, and nothing changes it
// afterwards, however Complete, Cancel, Repair and a client race.
//
// A task is driven once this server works on it (Run, Go, Adopt, Begin). A
// task that a client made with task.create and nobody drives belongs to that
// client: Cancel ends it at once, and the client itself may set its progress,
// result and status.
//
// # Life cycle
//
//	ref, err := tasks.Create(ctx, task.Spec{Label: "Async.SR.scan", Session: s.Stored, User: s.User})
//	tasks.Go(ref, func(ctx context.Context, t *task.Handle) (string, error) {
//		t.Progress(0.5)
//		return "<value></value>", pool.SRScan(ctx, sr)
//	})
//	rec, err := tasks.Wait(ctx, ref)
//
// The function runs under the task's context. That context ends when the task
// is cancelled, with the cause TASK_CANCELLED [task ref], or when the manager
// stops, with the cause ErrStopping; it never ends with the request that asked
// for the work. A function that is cut off by Stop leaves its task pending:
// after the next start its job resumes it, or Repair ends it.
//
// This package refuses to decide who may do what: a record names the session
// and the user that own it, and the wire asks OwnedBy.
package task
