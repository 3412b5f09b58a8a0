package upload

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/task"
	"github.com/patchd/patchd/pkg/xapi"
)

func TestTusClientIsKilled(t *testing.T) {
	e := newTusEnv(t)
	uuid := xapi.NewUUID()
	payload := program(uuid, 3*mib)
	message := sign(t, payload, "-z", "0")
	location := e.create(len(message))
	at := 0
	for range 10 {
		n := 1 + rand.IntN(len(message)/12)
		e.sendPart(location, int64(at), message[at:at+n], int64(len(message)-at))
		at += n // every byte counts
	}
	e.finished(e.send(location, int64(at), message[at:]), uuid, payload, len(message))
	e.clean(1)
}

func TestTusRestarts(t *testing.T) {
	e := newTusEnv(t)
	for name, shape := range shapes {
		t.Run(name, func(t *testing.T) {
			e.env.t = t
			uuid := xapi.NewUUID()
			payload := payloadFor(name, uuid, 3*mib+123)
			message := shape(t, payload)
			location := e.create(len(message))
			ref := e.head(location).header.Get("Task-Id")
			sent := 0
			for _, part := range []int{10, 40, 60, 90, 100} {
				at, to := e.head(location).offset(t), len(message)*part/100
				if a := e.send(location, at, message[at:to]); part < 100 && (a.status != 204 || a.offset(t) != int64(to)) {
					t.Fatalf("up to %d %%: %d %s", part, a.status, a.text)
				} else if part == 100 {
					e.finished(a, uuid, payload, len(message))
				}
				sent += to - int(at)
				if rec := e.task(ref); part < 100 && rec.Status != task.Pending {
					t.Fatalf("task at %d %%: %v", part, rec.Status)
				}
				if part < 100 {
					e.restart()
				}
			}
			if sent != len(message) {
				t.Errorf("%d bytes were sent, for %d", sent, len(message))
			}
			if rec := e.task(ref); rec.Status != task.Success {
				t.Errorf("task %v %v", rec.Status, rec.ErrorInfo)
			}
		})
	}
	e.env.t = t
	e.clean(len(shapes))
}

func TestTusRestartWithAllBytesFinishesByItself(t *testing.T) {
	e := newTusEnv(t)
	uuid := xapi.NewUUID()
	message := sign(t, program(uuid, 200000), "--armor")
	location := e.create(len(message))
	last := int64(len(message) - 1)
	e.send(location, 0, message[:last])
	e.restart()
	if at := e.head(location).offset(t); at != last {
		t.Fatalf("offset %d, want %d", at, last)
	}
	// As if the process had died just after the last byte.
	f, err := os.OpenFile(e.handler.logPath(xapi.UUID(location[len(tusPath)+1:])), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	l := &uploadLog{f: f, end: st.Size() - ringSize}
	l.bytes(message[last:])
	if err := errors.Join(l.write(0), f.Close()); err != nil {
		t.Fatal(err)
	}
	e.restart()
	e.await("the patch", func() bool { return e.head(location).header.Get(PatchHeader) != "" })
	if a := e.send(location, int64(len(message)), nil); a.status != 204 || a.header.Get(PatchHeader) == "" {
		t.Errorf("an empty PATCH at the end: %d %s", a.status, a.text)
	}
	e.patchOf(uuid)
	e.clean(1)
}

func TestTusAnotherRequestTakesOver(t *testing.T) {
	e := newTusEnv(t)
	uuid := xapi.NewUUID()
	payload := program(uuid, mib)
	message := sign(t, payload, "-z", "0")
	location := e.create(len(message))
	pr, pw := io.Pipe()
	defer pw.Close()
	first := make(chan answer)
	go func() {
		a, _ := e.try(context.Background(), http.MethodPatch, location, pr,
			"Content-Type", offsetStream, "Upload-Offset", "0")
		first <- a
	}()
	pw.Write(message[:1000])
	e.await("the first bytes", func() bool { return e.head(location).offset(t) == 1000 })
	if a := e.send(location, 500, message[500:]); a.status != 409 || a.offset(t) != 1000 {
		t.Errorf("another offset: %d %v", a.status, a.header)
	}
	// The first is half open: it brings nothing any more.
	e.finished(e.send(location, 1000, message[1000:]), uuid, payload, len(message))
	pw.Close()
	if a := <-first; a.status != 409 && a.status != 0 {
		t.Errorf("the first request: %d %s", a.status, a.text)
	}
	e.clean(1)
}

func TestTusWhatIsLostIsRemovedAtStart(t *testing.T) {
	e := newTusEnv(t)
	location := e.create(5000)
	ref := e.head(location).header.Get("Task-Id")
	if err := os.Remove(e.handler.logPath(xapi.UUID(location[len(tusPath)+1:]))); err != nil {
		t.Fatal(err)
	}
	stray := e.handler.logPath(xapi.NewUUID())
	if err := os.WriteFile(stray, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	e.restart()
	if a := e.head(location); a.status != 404 {
		t.Errorf("HEAD: %d", a.status)
	}
	if rec := e.task(ref); rec.Status != task.Failure {
		t.Errorf("task %v", rec.Status)
	}
	e.clean(0)
}

func TestTusManyUploadsAtOnce(t *testing.T) {
	e := newTusEnv(t)
	e.handler.liveOnes = make(chan struct{}, 3)
	message := sign(t, program(xapi.NewUUID(), 20000), "-z", "0")
	var locations []string
	for range 8 { // more than may be in memory
		location := e.create(len(message))
		if a := e.send(location, 0, message[:9000]); a.status != 204 {
			t.Fatalf("%d %s", a.status, a.text)
		}
		locations = append(locations, location)
	}
	for _, location := range locations {
		at := e.head(location).offset(t)
		if a := e.send(location, at, message[at:10000]); a.status != 204 || a.header.Get("Upload-Offset") != strconv.Itoa(10000) {
			t.Fatalf("%d %s", a.status, a.text)
		}
	}
	for _, location := range locations {
		if a := e.do(http.MethodDelete, location, nil); a.status != 204 {
			t.Fatalf("%d %s", a.status, a.text)
		}
	}
	e.clean(0)
}

// slowly begins a request whose body never ends, and gives its answer.
func (e *tusEnv) slowly(location string, first []byte) (<-chan answer, *io.PipeWriter) {
	e.t.Helper()
	pr, pw := io.Pipe()
	got := make(chan answer, 1)
	go func() {
		a, _ := e.try(context.Background(), http.MethodPatch, location, pr, "Content-Type", offsetStream, "Upload-Offset", "0")
		got <- a
	}()
	if _, err := pw.Write(first); err != nil {
		e.t.Fatal(err)
	}
	e.await("the first bytes", func() bool { return e.head(location).offset(e.t) == int64(len(first)) })
	return got, pw
}

func TestTusDeleteEndsTheRequestAtWork(t *testing.T) {
	e := newTusEnv(t)
	location := e.create(mib)
	first, pw := e.slowly(location, sign(t, program(xapi.NewUUID(), mib), "-z", "0")[:1000])
	if a := e.do(http.MethodDelete, location, nil); a.status != 204 {
		t.Errorf("DELETE: %d %s", a.status, a.text)
	}
	pw.Close()
	if a := <-first; a.status != 410 && a.status != 0 {
		t.Errorf("the request at work: %d %s", a.status, a.text)
	}
	e.clean(0)
}

func TestTusStopWhileARequestIsAtWork(t *testing.T) {
	e := newTusEnv(t)
	uuid := xapi.NewUUID()
	payload := program(uuid, mib)
	message := sign(t, payload, "-z", "0")
	location := e.create(len(message))
	first, pw := e.slowly(location, message[:1000])
	e.tasks.Stop()
	e.handler.Close()
	pw.Close()
	if a := <-first; a.status != 503 && a.status != 0 {
		t.Errorf("the request at work: %d %s", a.status, a.text)
	}
	e.restart()
	at := e.head(location).offset(t)
	if at != 1000 {
		t.Errorf("offset %d after the restart, want 1000", at)
	}
	e.finished(e.send(location, at, message[at:]), uuid, payload, len(message))
	e.clean(1)
}

func TestTusStall(t *testing.T) {
	e := newTusEnv(t)
	e.handler.Stall = 50 * time.Millisecond
	location := e.create(mib)
	first, pw := e.slowly(location, sign(t, program(xapi.NewUUID(), mib), "-z", "0")[:1000])
	if a := <-first; a.status != 408 || a.problem.Code != xapi.Timeout {
		t.Errorf("a client that sends nothing: %d %s", a.status, a.text)
	}
	pw.Close()
	if a := e.head(location); a.offset(t) != 1000 {
		t.Errorf("what came before does not count: %v", a.header)
	}
}
