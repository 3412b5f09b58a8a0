package pool

import (
	"context"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// messageKeep is how many messages the pool remembers; the oldest go first.
const messageKeep = 1000

// The names of the messages patchd raises itself.
const (
	MessageApplyUnknown  = "PATCH_APPLY_OUTCOME_UNKNOWN"
	MessageCleanupFailed = "PATCH_CLEANUP_FAILED"
	MessageVDIDamaged    = "VDI_DAMAGED"
	MessageVDIRepaired   = "VDI_REPAIRED"
)

var messageClasses = map[string]string{
	"Host": ClassHost, "SR": ClassSR, "Pool": ClassPool, "VDI": ClassVDI,
	"VM": "", "VMPP": "", "VMSS": "", "PVS_proxy": "", "Certificate": "",
}

// MessageCreate leaves a notice about an object for the admin. priority is 1
// (critical) to 5. Codes: VALUE_NOT_SUPPORTED, UUID_INVALID [cls, uuid].
func (p *Pool) MessageCreate(ctx context.Context, name string, priority int64, cls string, obj xapi.UUID, body string) (xapi.Ref, error) {
	class, ok := messageClasses[cls]
	if !ok {
		return "", xapi.NewError(xapi.ValueNotSupported, "cls", cls, "not a class that messages are about")
	}
	ref := xapi.NewRef()
	err := p.Store.Update(ctx, func(tx *store.Tx) error {
		if class != "" {
			if _, ok := tx.ByUUID(class, obj); !ok {
				return xapi.NewError(xapi.UUIDInvalid, cls, string(obj))
			}
		}
		p.putMessage(tx, ref, Message{Name: name, Priority: priority, Cls: cls, ObjUUID: obj, Body: body})
		return nil
	})
	return ref, err
}

// putMessage adds a message, which gets its uuid and time, inside a transaction.
func (p *Pool) putMessage(tx *store.Tx, ref xapi.Ref, m Message) {
	all := tx.List(ClassMessage)
	for i := 0; i < len(all)-messageKeep+1 && i < 50; i++ {
		tx.Delete(ClassMessage, all[i].Ref)
	}
	m.UUID, m.Timestamp = xapi.NewUUID(), p.Now()
	tx.Put(ClassMessage, ref, m)
}

// MessageDestroy removes a message. Code: HANDLE_INVALID.
func (p *Pool) MessageDestroy(ctx context.Context, ref xapi.Ref) error {
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		if !tx.Has(ClassMessage, ref) {
			return xapi.NewError(xapi.HandleInvalid, ClassMessage, string(ref))
		}
		tx.Delete(ClassMessage, ref)
		return nil
	})
}
