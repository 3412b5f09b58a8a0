package upload

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/xapi"
)

// However many uploads one user keeps half open, others have places.
func TestTusOneUserDoesNotTakeAllPlaces(t *testing.T) {
	e := newTusEnv(t)
	ctx := t.Context()
	if err := e.sessions.AddUser(ctx, "eve", "a long password", session.PoolOperator); err != nil {
		t.Fatal(err)
	}
	eve, err := e.sessions.Login(ctx, "eve", "a long password", "test", "127.0.0.1:1")
	if err != nil {
		t.Fatal(err)
	}
	uuid := xapi.NewUUID()
	payload := program(uuid, 20000)
	message := sign(t, payload, "-z", "0")
	own := e.session
	e.session = eve
	var answers []<-chan answer
	var bodies []*io.PipeWriter
	var locations []string
	for range maxLivePerUser {
		location := e.create(len(message))
		got, body := e.slowly(location, message[:100])
		answers, bodies, locations = append(answers, got), append(bodies, body), append(locations, location)
	}
	location := e.create(len(message))
	pr, late := io.Pipe()
	got := make(chan answer, 1)
	go func() {
		a, _ := e.try(ctx, http.MethodPatch, location+"?session_id="+string(eve), pr, "Content-Type", offsetStream, "Upload-Offset", "0")
		got <- a
	}()
	if n := len(e.handler.liveOnes); n != maxLivePerUser {
		t.Errorf("%d uploads are live", n)
	}
	e.session = own
	e.finished(e.send(e.create(len(message)), 0, message), uuid, payload, len(message))
	e.session = eve
	for i, body := range bodies {
		body.Close()
		<-answers[i]
		e.do(http.MethodDelete, locations[i], nil)
	}
	late.Close()
	if a := <-got; a.status != http.StatusNoContent && a.status != http.StatusBadRequest {
		t.Errorf("the one that had to wait: %d %s", a.status, a.text)
	}
	e.do(http.MethodDelete, location, nil)
	e.clean(1)
}

// What a delta gives is bounded by what was announced, and so by the room that
// was promised.
func TestTusADeltaGivesNoMoreThanItSaid(t *testing.T) {
	e := newTusEnv(t)
	base := xapi.NewUUID()
	old := noise(program(base, mib))
	message := sign(t, old, "-z", "0")
	e.finished(e.send(e.create(len(message)), 0, message), base, old, len(message))
	payload := append(program(xapi.NewUUID(), 0), make([]byte, 32*mib)...)
	message = sign(t, payload, "-z", "0")
	d := deltaOf(t, message, old)
	for _, said := range []int{1, len(message) / 2, len(message) - 1} {
		location := e.create(len(d), "encoding", "delta", "base", string(base), "size", strconv.Itoa(said))
		if a := e.send(location, 0, d); a.status != http.StatusUnprocessableEntity || a.problem.Code != xapi.InvalidPatch || !strings.Contains(string(a.text), "announced") {
			t.Errorf("%d of %d bytes were announced: %d %s", said, len(message), a.status, a.text)
		}
	}
	e.clean(1)
}

// The logs of uploads never take the room that the database needs: an upload
// goes on without one.
func TestTusLogsLeaveRoom(t *testing.T) {
	e := newTusEnv(t)
	room := int64(1 << 40)
	e.handler.LogRoom = func() int64 { return room }
	uuid := xapi.NewUUID()
	payload := noise(program(uuid, 3*mib))
	message := sign(t, payload, "--armor", "-z", "0") // all of it lies in the log
	location := e.create(len(message))
	room = 0
	if a := e.do(http.MethodPost, tusPath, nil, "Upload-Length", "1000"); a.status != http.StatusInsufficientStorage || a.problem.Code != xapi.OutOfSpace {
		t.Errorf("another upload: %d %s", a.status, a.text)
	}
	if a := e.send(location, 0, message[:3*mib]); a.status != http.StatusNoContent {
		t.Fatalf("%d %s", a.status, a.text)
	}
	if n := e.logBytes(); n > mib {
		t.Errorf("the log has %d bytes", n)
	}
	e.finished(e.send(location, 3*mib, message[3*mib:]), uuid, payload, len(message))
	e.clean(1)
}

// logBytes is what the logs hold.
func (e *tusEnv) logBytes() (n int64) {
	e.t.Helper()
	entries, err := os.ReadDir(e.options.UploadsDir)
	if err != nil {
		e.t.Fatal(err)
	}
	for _, entry := range entries {
		if st, err := entry.Info(); err == nil {
			n += max(0, st.Size()-ringSize)
		}
	}
	return n
}

func TestALogWithoutRoomIsGivenUp(t *testing.T) {
	l := newTestLog(t)
	left := int64(5 * mib)
	l.room = func() int64 { left -= mib; return left }
	var err error
	for n := 0; err == nil && n < 10; n++ {
		l.bytes(bytes.Repeat([]byte("x"), mib))
		err = l.write(0)
	}
	if !errors.Is(err, errLogRoom) {
		t.Fatalf("%v, want no room", err)
	}
}

// A list of blocks takes little memory, whatever is in it.
func TestReadBlockList(t *testing.T) {
	for text, want := range map[string]string{
		"[]": "[]", "[3,1,2]": "[{1 3}]", " [ 1 , 1,1, 5 ] ": "[{1 1} {5 5}]",
		"": "", "{}": "", "[-1]": "", "[1.5]": "", "[1": "", `["1"]`: "", "[9223372036854775807]": "", "[9223372036854775808]": "", "[[1]]": "",
	} {
		list, err := readBlockList(strings.NewReader(text))
		if got := fmt.Sprint(list); (err == nil) != (want != "") || err == nil && got != want {
			t.Errorf("%q: %s %v, want %s", text, got, err, want)
		}
	}
	row := func(n int, of func(int) int) string {
		b := []byte("[0")
		for i := range n {
			b = strconv.AppendInt(append(b, ','), int64(of(i)), 10)
		}
		return string(append(b, ']'))
	}
	if list, err := readBlockList(strings.NewReader(row(2*mib, func(i int) int { return i % 1000 }))); err != nil || len(list) != 1 || cap(list) > 4*maxBlockRanges {
		t.Errorf("the same blocks again and again: %d stretches in room for %d, %v", len(list), cap(list), err)
	}
	if list, err := readBlockList(strings.NewReader(row(mib, func(i int) int { return 2 * i }))); err == nil {
		t.Errorf("%d stretches", len(list))
	}
}
