package xenapi

import (
	"reflect"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

func TestEvents(t *testing.T) {
	r := newRig(t)
	token := r.good("event.inject", "pool", r.poolRef)
	batch := r.good("event.from", []string{"Pool", "VM"}, token, 10.0).(map[string]any)
	events := batch["events"].([]any)
	if len(events) != 1 || !reflect.DeepEqual(batch["valid_ref_counts"], map[string]any{"pool": 1.0, "vm": 0.0}) {
		t.Fatalf("%v", batch)
	}
	e := events[0].(map[string]any)
	id, _ := e["id"].(string)
	if e["class"] != "pool" || e["operation"] != "mod" || e["ref"] != string(r.poolRef) || e["timestamp"] != "0.0" || id == "" ||
		!reflect.DeepEqual(e["snapshot"], r.good("pool.get_record", r.poolRef)) {
		t.Errorf("%v", e)
	}
	r.good("pool.set_name_label", r.poolRef, "x") // the record of the snapshot is of its own revision
	_, err := r.call("event.inject", "Pool", r.poolRef)
	wantError(t, err, xapi.HandleInvalid, "Pool", string(r.poolRef))
	_, err = r.call("event.inject", "session", r.root.Stored)
	wantError(t, err, xapi.HandleInvalid)
	_, err = r.call("event.from", []string{"*"}, "rubbish", 1.0)
	wantError(t, err, xapi.EventFromTokenParseFailure, "rubbish")
	_, err = r.call("event.next")
	wantError(t, err, xapi.SessionNotRegistered, string(r.root.Ref))

	r.good("event.register", []string{"host_patch"})
	r.must(r.store.Update(t.Context(), func(tx *store.Tx) error {
		tx.Delete("host_patch", r.hostPatch)
		return nil
	}))
	next := r.good("event.next").([]any)
	e = next[0].(map[string]any)
	if _, has := e["snapshot"]; len(next) != 1 || e["operation"] != "del" || has {
		t.Errorf("%v", next)
	}
	if n := r.good("event.get_current_id").(string); n == "0" {
		t.Error(n)
	}
	r.good("event.unregister", []string{"host_patch"})
}

// Logout wakes who waits for events.
func TestLogoutEndsTheWaiting(t *testing.T) {
	r := newRig(t)
	r.good("event.register", []string{"*"})
	token := r.Events.Token()
	done := make(chan error, 2)
	for _, params := range [][]any{{"event.from", []any{"*"}, token, 3600.0}, {"event.next"}} {
		go func() {
			_, err := r.Call(t.Context(), r.root, params[0].(string), params[1:])
			done <- err
		}()
	}
	r.good("session.logout")
	for range 2 {
		err := <-done
		if !xapi.Is(err, xapi.SessionNotRegistered) {
			wantError(t, err, xapi.SessionInvalid, string(r.root.Ref))
		}
	}
	_, err := r.dispatch(t.Context(), "pool.get_all", []any{string(r.root.Ref)})
	wantError(t, err, xapi.SessionInvalid)
	if seconds(-1) != 0 || seconds(0.5) != 500*time.Millisecond || seconds(1e300) != maxWait {
		t.Error("time-outs are not bounded")
	}
}

func TestMessagesBySince(t *testing.T) {
	r := newRig(t)
	if v := r.good("message.get_since", "1969-12-31T00:00:00Z").(map[string]any); len(v) != 1 {
		t.Error(v)
	}
	if v := r.good("message.get_since", "20300101T00:00:00Z").(map[string]any); len(v) != 0 {
		t.Error(v)
	}
	if v := r.good("message.get", "Host", "", "19000101").(map[string]any); len(v) != 1 {
		t.Error(v)
	}
}
