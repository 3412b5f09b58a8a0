package xenapi

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// intakeServer answers with the length of the body it read, or with the status
// of the refusal. After reading it waits for hold, when there is one.
func intakeServer(t *testing.T, in *Intake, limit int64, hold chan struct{}) *httptest.Server {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, release, status, err := in.Read(w, r, limit)
		defer release()
		if err != nil {
			w.Header().Set("Connection", "close")
			w.WriteHeader(status)
			return
		}
		if hold != nil {
			<-hold
		}
		fmt.Fprint(w, len(body))
	}))
	t.Cleanup(s.Close)
	return s
}

func TestIntakeReadsWholeBodies(t *testing.T) {
	in := NewIntake(0)
	s := intakeServer(t, in, 1<<20, nil)
	for _, n := range []int{0, 1, 511, 512, 513, 4096, 4097, smallBody, smallBody + 1, 1<<20 - 1, 1 << 20, 1<<20 + 1} {
		for _, chunked := range []bool{false, true} {
			var body io.Reader = bytes.NewReader(make([]byte, n))
			if chunked {
				body = io.MultiReader(body)
			}
			res, err := http.Post(s.URL, "text/plain", body)
			if err != nil {
				t.Fatal(err)
			}
			got, _ := io.ReadAll(res.Body)
			res.Body.Close()
			switch {
			case n > 1<<20 && res.StatusCode != http.StatusRequestEntityTooLarge:
				t.Errorf("%d bytes, chunked %v: status %d", n, chunked, res.StatusCode)
			case n <= 1<<20 && string(got) != fmt.Sprint(n):
				t.Errorf("%d bytes, chunked %v: %d %q", n, chunked, res.StatusCode, got)
			}
		}
	}
	if in.free != bodyBudget {
		t.Errorf("%d bytes of the budget are lost", bodyBudget-in.free)
	}
}

func TestIntakeEndsSlowBodies(t *testing.T) {
	s := intakeServer(t, NewIntake(100*time.Millisecond), 1<<20, nil)
	nc, err := net.Dial("tcp", strings.TrimPrefix(s.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(20 * time.Second))
	fmt.Fprint(nc, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
	if got, _ := io.ReadAll(nc); !strings.HasPrefix(string(got), "HTTP/1.1 408 ") {
		t.Errorf("the server sent %q", got)
	}
}

// Large bodies are refused when others hold the budget, small ones are not.
func TestIntakeBudget(t *testing.T) {
	in, hold := NewIntake(0), make(chan struct{})
	in.free = 1 << 20
	s := intakeServer(t, in, 1<<20, hold)
	send := func(n int) int {
		res, err := http.Post(s.URL, "text/plain", bytes.NewReader(make([]byte, n)))
		if err != nil {
			t.Error(err)
			return 0
		}
		res.Body.Close()
		return res.StatusCode
	}
	done := make(chan int)
	go func() { done <- send(600 << 10) }()
	for taken := false; !taken; {
		in.mu.Lock()
		taken = in.free < smallBody // it has all that it will take
		in.mu.Unlock()
	}
	if got := send(600 << 10); got != http.StatusServiceUnavailable {
		t.Errorf("a second large body: %d", got)
	}
	go func() { done <- send(smallBody) }()
	close(hold)
	for range 2 {
		if got := <-done; got != http.StatusOK {
			t.Errorf("status %d", got)
		}
	}
}
