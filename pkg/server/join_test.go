package server

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/link"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/trust"
	"github.com/patchd/patchd/pkg/xapi"
)

// endless is a body that counts what is read of it.
type endless struct{ read atomic.Int64 }

func (e *endless) Read(p []byte) (int, error) {
	n := copy(p, bytes.Repeat([]byte(`{},`), len(p)/3+1))
	e.read.Add(int64(n))
	return n, nil
}

// A stranger is refused before anything of what it says is read.
func TestAStrangerThatJoinsIsNotListenedTo(t *testing.T) {
	s, stop := running(t, testConfig(t))
	defer stop()
	_, tls := s.Addresses()
	id, err := trust.Open(t.TempDir()+"/tls.pem", "stranger")
	if err != nil {
		t.Fatal(err)
	}
	base := "https://" + tls.String()
	client := link.NewHTTP(id, base, trust.OneOf(s.identity.SPKI()))
	defer client.CloseIdleConnections()
	for what, credentials := range map[string]string{
		"nothing":         "",
		"a wrong token":   bearer + string(xapi.NewUUID()) + ".x",
		"no token at all": bearer,
		"nonsense":        "Basic x",
	} {
		body := &endless{}
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, base+joinPath, io.MultiReader(strings.NewReader(`{"stamps":[`), body))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Authorization", credentials)
		r.Header.Set("Expect", "100-continue")
		res, err := client.Do(r)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		text, _ := io.ReadAll(res.Body)
		res.Body.Close()
		if res.StatusCode != http.StatusUnauthorized || body.read.Load() > 0 {
			t.Errorf("%s: %s %s, %d bytes were read", what, res.Status, text, body.read.Load())
		}
	}
}

// What a host gets while it asks to be taken in goes along.
func TestWhatComesWhileAHostJoinsGoesAlong(t *testing.T) {
	coordinator, stop := running(t, testConfig(t))
	defer stop()
	joiner, stopJoiner := running(t, testConfig(t))
	defer stopJoiner()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	token, err := coordinator.JoinToken(ctx)
	if err != nil {
		t.Fatal(err)
	}
	req, err := joiner.joinRequest()
	if err != nil {
		t.Fatal(err)
	}
	var pin string
	if req.Token, req.Secret, pin, err = parseToken(token); err != nil {
		t.Fatal(err)
	}
	if b, err := json.Marshal(req); err != nil || bytes.Contains(b, []byte(req.Secret)) {
		t.Errorf("the body has the secret: %v", err)
	}
	_, tls := coordinator.Addresses()
	base := "https://" + tls.String()
	a, err := joiner.askToJoin(ctx, base, pin, req)
	if err != nil {
		t.Fatal(err)
	}
	late := pool.Patch{UUID: xapi.NewUUID(), NameLabel: "late", VDI: xapi.NullRef, OtherConfig: map[string]string{}}
	ref := xapi.NewRef()
	err = joiner.store.Update(ctx, func(tx *store.Tx) error { tx.Put(pool.ClassPatch, ref, late); return nil })
	if err != nil {
		t.Fatal(err)
	}
	if a, err = joiner.bringTheRest(ctx, base, pin, req, a); err != nil || len(a.Patches) != 1 {
		t.Fatalf("%+v %v", a.Patches, err)
	}
	if _, _, err := coordinator.pool.PatchByUUID(late.UUID); err != nil {
		t.Errorf("the patch that came late is lost: %v", err)
	}
	// Something that has only begun cannot come along.
	err = joiner.store.Update(ctx, func(tx *store.Tx) error {
		tx.Put(pool.ClassJob, xapi.NewRef(), pool.Job{UUID: xapi.NewUUID(), Kind: pool.JobCall, Host: joiner.pool.Self, Call: "Resync", State: pool.JobClaimed})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := joiner.bringTheRest(ctx, base, pin, req, a); !xapi.Is(err, xapi.OtherOperationInProgress) {
		t.Errorf("%v", err)
	}
}

// refusing takes an inventory from the second connection on.
type refusing struct {
	tries chan bool // what is answered; whether it is taken
}

func (r refusing) Inventory(ctx context.Context, _ pool.Inventory) error {
	select {
	case ok := <-r.tries:
		if ok {
			return nil
		}
		return xapi.NewError(xapi.InvalidValue, "inventory", "refused")
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// An inventory that is refused is tried less and less often, but at once on a new
// connection.
func TestARefusedInventoryIsToldAgainOnANewConnection(t *testing.T) {
	s, stop := running(t, testConfig(t))
	defer stop()
	to := refusing{make(chan bool)}
	i := newInventory(s.store, s.pool, to, quietLog())
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	done := make(chan struct{})
	go func() { defer close(done); i.run(ctx) }()
	defer func() { cancel(); <-done }()
	for range 3 { // the pauses between these are 1 s and 2 s
		to.tries <- false
	}
	began := time.Now()
	i.reset()
	to.tries <- true
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("the new connection was told after %s", took)
	}
	if err := i.flush(ctx); err != nil {
		t.Error(err)
	}
}
