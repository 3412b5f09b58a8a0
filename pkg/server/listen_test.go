package server

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	logtest "github.com/sirupsen/logrus/hooks/test"

	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/trust"
)

// Hosts and clients come in by one TLS listener. What a host's handler has taken
// over is the handler's, deadlines too, and its connection can be known.
func TestHostsAndClientsShareTheTLSListener(t *testing.T) {
	dir := t.TempDir()
	s, err := openStateDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	id, err := s.identity("host")
	if err != nil {
		t.Fatal(err)
	}
	log, _ := logtest.NewNullLogger()
	l, err := openListeners(Config{TLSListen: "127.0.0.1:0"}, s, id, log)
	if err != nil {
		t.Fatal(err)
	}
	defer l.close(0)
	l.setHandler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.TLS.NegotiatedProtocol != trust.Protocol {
			io.WriteString(w, "client")
			return
		}
		session.Proven(r.Context())
		if r.URL.Path != "/take" {
			io.WriteString(w, "host "+trust.Pin(trust.PeerKey(*r.TLS)))
			return
		}
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		if err := conn.SetReadDeadline(time.Now().Add(-time.Second)); err != nil {
			t.Error(err)
		}
		go func() {
			// If the server set a deadline after the handler, a read would wait.
			began := time.Now()
			for range 20 {
				if _, err := conn.Read(make([]byte, 1)); err == nil {
					t.Error("there was something to read")
				}
				time.Sleep(10 * time.Millisecond)
			}
			if took := time.Since(began); took > wasteTime/2 {
				t.Errorf("the handler's deadline does not hold: it took %s", took)
			}
			cc := inCrowd(conn)
			cc.crowd.mu.Lock()
			place := cc.place
			cc.crowd.mu.Unlock()
			fmt.Fprintf(conn, "taken %v\n", place == nil)
			conn.Close()
		}()
	}))
	me, err := trust.Open(filepath.Join(dir, "me.pem"), "me")
	if err != nil {
		t.Fatal(err)
	}
	for want, c := range map[string]*tls.Config{
		"client": {InsecureSkipVerify: true}, "host " + me.Pin(): trust.ClientConfig(me, trust.OneOf(id.SPKI())),
	} {
		client := http.Client{Transport: &http.Transport{TLSClientConfig: c, DisableKeepAlives: true}}
		resp, err := client.Get("https://" + l.TLSAddr.String() + "/")
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if string(b) != want || err != nil {
			t.Errorf("%q %v, want %q", b, err, want)
		}
	}
	nc, err := net.Dial("tcp", l.TLSAddr.String())
	if err != nil {
		t.Fatal(err)
	}
	conn := tls.Client(nc, trust.ClientConfig(me, trust.Pinned(id.Pin())))
	defer conn.Close()
	if _, err := io.WriteString(conn, "POST /take HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(conn).ReadString('\n')
	if strings.TrimSpace(line) != "taken true" {
		t.Errorf("%q %v", line, err)
	}
}
