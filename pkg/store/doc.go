// Package store is the pool database: records as JSON in etcd, read from one
// view in memory and changed by optimistic transactions.
//
// # Terms
//
// A record is one JSON object, named by class and ref. The view is all records
// as of one revision; it never changes once it is handed out, and a newer one
// takes its place when something changes. A revision is a number that grows
// with every change. A touch makes an event of a record that does not change
// it. The leader is the one store, of all that are open on the same data,
// whose writes are fenced by an election key.
//
// # Where the data is
//
// Without a URL the data is an etcd of our own, inside the process, in one
// folder, with no listener at all. With etcd:// or etcds:// the same code uses
// a cluster. Below the prefix lie:
//
//	<class>/<ref>         one record
//	touch/<class>/<ref>   the last touch of that record
//	gen/<class>           put when a record of the class appears, vanishes or
//	                      changes an indexed field
//	txn/<store>-<n>       the last transaction of one writer
//	leader/<lease>        candidates, the oldest leads
//	meta/id, meta/schema  the identity of the data, and its version
//
// # A worked example
//
//	err := s.Update(ctx, func(tx *store.Tx) error {
//		var patch pool.Patch
//		if err := tx.Get("pool_patch", ref, &patch); err != nil {
//			return err // HANDLE_INVALID [pool_patch, ref]
//		}
//		patch.VDI = vdi
//		tx.Put("pool_patch", ref, patch)
//		return nil
//	})
//
// The function may run several times, so it must have no effect but on tx.
// When Update returns nil the change is durable and the local view shows it.
//
// # What is refused
//
// Data of a newer schema version, a transaction of more than MaxOps
// operations or MaxBytes bytes, writes of a leader that was deposed, and
// restoring over data that is there.
package store
