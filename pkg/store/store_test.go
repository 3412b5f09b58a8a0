package store

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/patchd/patchd/pkg/xapi"
)

type disk struct {
	UUID xapi.UUID `json:"uuid"`
	SR   xapi.Ref  `json:"SR"`
	N    int       `json:"n"`
}

var testIndexes = []Index{{Class: "VDI", Field: "SR", Parent: "SR"}}

func openDir(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(t.Context(), Options{Dir: dir, Indexes: testIndexes})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func put(t *testing.T, s *Store, class string, ref xapi.Ref, v any) {
	t.Helper()
	if err := s.Update(t.Context(), func(tx *Tx) error { tx.Put(class, ref, v); return nil }); err != nil {
		t.Fatal(err)
	}
}

func TestSmoke(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	dir := t.TempDir()
	start := time.Now()
	s, err := Open(t.Context(), Options{Dir: dir, Indexes: testIndexes})
	if err != nil {
		t.Fatal(err)
	}
	t.Log("open", time.Since(start))
	ref := xapi.NewRef()
	start = time.Now()
	for n := range 500 {
		put(t, s, "VDI", ref, disk{N: n})
	}
	t.Log("txn", time.Since(start)/500)
	l, err := s.Campaign(t.Context(), "me")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 20 {
				err := s.Update(context.Background(), func(tx *Tx) error {
					d, err := Read[disk](tx, "VDI", ref)
					d.N++
					tx.Put("VDI", ref, d)
					return err
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	d, err := Get[disk](s.state.Load().view, "VDI", ref)
	fmt.Println(d, err, l.Revision)
	start = time.Now()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	t.Log("close", time.Since(start))
	start = time.Now()
	s, err = Open(t.Context(), Options{Dir: dir, Indexes: testIndexes})
	if err != nil {
		t.Fatal(err)
	}
	t.Log("open again", time.Since(start))
	s.Close()
}
