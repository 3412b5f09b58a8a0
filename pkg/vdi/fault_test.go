//go:build faults

package vdi

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"testing"

	"github.com/patchd/patchd/pkg/fault"
)

// TestMain lets the plan of faults change while the tests run.
func TestMain(m *testing.M) {
	plan, err := os.CreateTemp("", "plan")
	if err != nil {
		panic(err)
	}
	plan.Close()
	os.Setenv("PATCHD_FAULT_PLAN", plan.Name())
	code := m.Run()
	os.Remove(plan.Name())
	os.Exit(code)
}

func planFault(t *testing.T, text string) {
	t.Helper()
	if err := os.WriteFile(os.Getenv("PATCHD_FAULT_PLAN"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Every point of an image writer fails in turn: the error comes up, nothing
// runs on, and the image can be gone on with.
func TestEveryEffectOfAWriterCanFail(t *testing.T) {
	data, _ := io.ReadAll(payload(2*mib + 77))
	const size = 8 * mib
	eachLayout(t, func(t *testing.T, o Options) {
		t.Cleanup(func() { planFault(t, "") })
		o.Buffer = int(mib)
		before := runtime.NumGoroutine()
		for n := 1; ; n++ {
			f := fresh(t, size)
			planFault(t, fmt.Sprintf("fail@%d", n))
			done, err := writeSynced(f, o, data)
			planFault(t, "")
			quiet(t, before)
			if err == nil {
				if n < 8 {
					t.Errorf("only %d points", n)
				}
				return
			}
			var failure *fault.Failure
			if !errors.As(err, &failure) {
				t.Fatalf("point %d: %v", n, err)
			}
			if o.Done = done / blockSize * blockSize; o.Done == 0 {
				continue
			}
			planFault(t, fmt.Sprintf("fail@%d", 1)) // what follows fails too, at first
			if w, err := NewWriter(context.Background(), f, size, int64(len(data)), o); err == nil {
				w.Abort()
				t.Error("preparing passes no point")
			}
			planFault(t, "")
			goOn(t, f, o, size, data)
			o.Done = 0
			fsck(t, f.Name())
			p, err := OpenPayload(f)
			if err != nil {
				t.Fatal(err)
			}
			same(t, io.NewSectionReader(p, 0, p.Size()), bytes.NewReader(data))
		}
	})
}

// writeSynced writes an image and tells how much was flushed when it failed.
func writeSynced(f *os.File, o Options, data []byte) (int64, error) {
	w, err := NewWriter(context.Background(), f, 8*mib, int64(len(data)), o)
	if err != nil {
		return 0, err
	}
	defer w.Abort()
	_, err = w.Write(data)
	if err == nil {
		err = w.Sync()
	}
	if err == nil {
		_, err = w.Finish(context.Background())
	}
	return w.Flushed(), err
}
