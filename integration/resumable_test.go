package integration

import (
	"bufio"
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/integration/lab"
)

// tusClient speaks the tus protocol by hand and counts the bytes of bodies that
// it gives to its kernel.
type tusClient struct {
	*lab.Host
	location string
	sent     int64
}

func (c *tusClient) request(method, path string, headers ...string) (*http.Response, error) {
	r, err := http.NewRequest(method, c.URL+path, nil)
	if err != nil {
		return nil, err
	}
	r.SetBasicAuth("root", lab.Password)
	r.Header.Set("Tus-Resumable", "1.0.0")
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	res, err := http.DefaultClient.Do(r)
	if err == nil {
		res.Body.Close()
	}
	return res, err
}

func (c *tusClient) create(length int) {
	c.T.Helper()
	res, err := c.request(http.MethodPost, "/pool_patch_uploads", "Upload-Length", strconv.Itoa(length))
	if err != nil || res.StatusCode != http.StatusCreated {
		c.T.Fatalf("create: %v %v", res, err)
	}
	c.location = res.Header.Get("Location")
}

func (c *tusClient) offset() int64 {
	c.T.Helper()
	res, err := c.request(http.MethodHead, c.location)
	if err != nil {
		c.T.Fatal(err)
	}
	n, err := strconv.ParseInt(res.Header.Get("Upload-Offset"), 10, 64)
	if err != nil {
		c.T.Fatalf("HEAD: %d %v", res.StatusCode, res.Header)
	}
	return n
}

// send sends the rest of a message from an offset on, and calls at once so many
// bytes are given away. It gives the answer, or nil when the connection broke.
func (c *tusClient) send(message []byte, offset, so int64, at func(net.Conn)) *http.Response {
	c.T.Helper()
	nc, err := net.Dial("tcp", strings.TrimPrefix(c.URL, "http://"))
	if err != nil {
		c.T.Fatal(err)
	}
	defer nc.Close()
	nc.(*net.TCPConn).SetWriteBuffer(64 << 10)
	nc.SetDeadline(time.Now().Add(time.Minute))
	auth := base64.StdEncoding.EncodeToString([]byte("root:" + lab.Password))
	fmt.Fprintf(nc, "PATCH %s HTTP/1.1\r\nHost: x\r\nAuthorization: Basic %s\r\nTus-Resumable: 1.0.0\r\nContent-Type: application/offset+octet-stream\r\n"+
		"Upload-Offset: %d\r\nContent-Length: %d\r\n\r\n", c.location, auth, offset, int64(len(message))-offset)
	for rest := message[offset:]; len(rest) > 0; {
		n, err := nc.Write(rest[:min(len(rest), 32<<10)])
		c.sent += int64(n)
		rest = rest[n:]
		if so -= int64(n); so <= 0 && at != nil {
			at(nc)
			at = nil
		}
		if err != nil {
			return nil
		}
	}
	res, err := http.ReadResponse(bufio.NewReader(nc), nil)
	if err != nil {
		return nil
	}
	return res
}

// A daemon that is killed at random moments of an upload, 20 times by make soak,
// and a client that dies in between, cost next to nothing of what was sent.
func TestResumableUploadAcrossKills(t *testing.T) {
	t.Parallel()
	n, r := soak(t, 5)
	kills := min(n, 20)
	h := lab.Start(t, lab.Options{})
	p := &lab.Patch{Pad: kills * 6 << 20}
	payload := p.Payload()
	message := lab.DefaultKey(t).GPG(t, payload, "--sign", "-z", "0")
	c := &tusClient{Host: h}
	c.create(len(message))
	for range kills {
		at := c.offset()
		if at >= int64(len(message))*99/100 {
			t.Fatalf("%d bytes are there too early", at)
		}
		clientFirst := r.Intn(4) == 0
		c.send(message, at, r.Int63n(int64(len(message)/kills)), func(nc net.Conn) {
			if clientFirst {
				nc.Close()
			}
			h.Kill()
		})
		h.Up()
	}
	at := c.offset()
	res := c.send(message, at, 1<<60, nil)
	if res == nil || res.StatusCode != http.StatusNoContent || res.Header.Get("Patchd-Pool-Patch") == "" {
		t.Fatalf("the last request, from %d on: %v", at, res)
	}
	if most := int64(len(message)) * 105 / 100; c.sent > most {
		t.Errorf("%d bytes were sent for %d, at most %d may be", c.sent, len(message), most)
	}
	t.Logf("%.4f times the size was sent", float64(c.sent)/float64(len(message)))
	s := h.Root()
	_, rec := s.One("pool_patch")
	vdi := s.Call("VDI.get_uuid", rec["VDI"]).(string)
	checkImage(t, filepath.Join(h.StateDir, "sr", vdi+".img"), payload)
	for _, task := range s.All("task") {
		if task["name_label"] == "pool_patch_upload" && task["status"] != "success" {
			t.Errorf("task %v", task)
		}
	}
	if logs, err := os.ReadDir(filepath.Join(h.StateDir, "uploads")); err != nil || len(logs) > 0 {
		t.Errorf("logs are left: %v %v", logs, err)
	}
}
