package store

import (
	"fmt"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/patchd/patchd/pkg/xapi"
)

const (
	// MaxOps is how many operations, and how many comparisons, etcd takes in
	// one transaction. Each record written costs one of each, each class whose
	// membership changes one more, and two are for the store itself.
	MaxOps = 128
	// MaxBytes is the size of one transaction in bytes.
	MaxBytes = 1536<<10 - 16<<10
)

// plan is a transaction as etcd gets it, but for the slot.
type plan struct {
	id    string // of this run
	cmps  []clientv3.Cmp
	ops   []clientv3.Op
	fence *Leadership
}

// plan turns what the function did into comparisons and operations. A plan
// without operations has nothing to commit.
func (tx *Tx) plan(k keys, fence *Leadership) (plan, error) {
	p := plan{id: string(xapi.NewUUID()), fence: fence}
	if tx.err != nil {
		return p, tx.err
	}
	size := tx.planWrites(k, &p)
	if len(p.ops) == 0 {
		return p, nil
	}
	tx.planReads(k, &p)
	if fence != nil {
		p.cmps = append(p.cmps, fence.held())
	}
	// One operation and one comparison more are for the slot.
	if n := max(len(p.ops), len(p.cmps)) + 1; n > MaxOps {
		return p, xapi.Internal("%w: %d operations and %d comparisons, at most %d of each: do it in batches",
			ErrTooBig, len(p.ops)+1, len(p.cmps)+1, MaxOps)
	}
	if size > MaxBytes {
		return p, xapi.NewError(xapi.MessageTooLarge, "transaction of the pool database", fmt.Sprint(MaxBytes)).
			Because(fmt.Errorf("%w: %d bytes", ErrTooBig, size))
	}
	return p, nil
}

// planWrites adds the operations and gives their size in bytes.
func (tx *Tx) planWrites(k keys, p *plan) (size int) {
	gens := map[string]bool{}
	for _, i := range tx.order {
		if tx.idle(i) {
			continue
		}
		e, w := tx.reads[i], tx.writes[i]
		if w != nil {
			p.ops = append(p.ops, clientv3.OpPut(k.record(i), string(*w)))
			size += len(*w)
		} else {
			p.ops = append(p.ops, clientv3.OpDelete(k.record(i)))
			if e.touched {
				p.ops = append(p.ops, clientv3.OpDelete(k.touch(i)))
			}
		}
		delete(tx.touch, i)
		if tx.moves(i) && !gens[i.class] {
			gens[i.class] = true
			p.ops = append(p.ops, clientv3.OpPut(k.gen(i.class), ""))
		}
		size += 256
	}
	for i := range tx.touch {
		if tx.v.entry(i) != nil {
			p.ops = append(p.ops, clientv3.OpPut(k.touch(i), ""))
			size += 256
		}
	}
	return size
}

// planReads adds a comparison for everything that was read.
func (tx *Tx) planReads(k keys, p *plan) {
	for i, e := range tx.reads {
		switch {
		case tx.listed[i.class]: // the class as a whole is compared
		case e == nil:
			p.cmps = append(p.cmps, clientv3.Compare(clientv3.CreateRevision(k.record(i)), "=", 0))
		default:
			p.cmps = append(p.cmps, clientv3.Compare(clientv3.ModRevision(k.record(i)), "=", e.recorded))
		}
	}
	next := tx.v.rev + 1
	for class := range tx.listed {
		all := clientv3.Compare(clientv3.ModRevision(k.folder(class)), "<", next).WithPrefix()
		p.cmps = append(p.cmps, all)
		tx.looked[class] = true
	}
	for class := range tx.looked {
		p.cmps = append(p.cmps, clientv3.Compare(clientv3.ModRevision(k.gen(class)), "<", next))
	}
}
