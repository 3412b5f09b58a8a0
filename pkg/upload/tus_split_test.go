package upload

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/patchd/patchd/pkg/patch"
	"github.com/patchd/patchd/pkg/xapi"
)

// shapes are the ways in which gpg makes a signed file.
var shapes = map[string]func(t *testing.T, payload []byte) []byte{
	"partial lengths": func(t *testing.T, p []byte) []byte { return sign(t, p, "-z", "0") },
	"a definite length": func(t *testing.T, p []byte) []byte {
		file := filepath.Join(t.TempDir(), "a name that stands in the message")
		if err := os.WriteFile(file, p, 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := gpg(nil, "-u", signer, "-z", "0", "-o", "-", "--sign", file)
		if err != nil {
			t.Fatal(err)
		}
		return out
	},
	"two signatures": func(t *testing.T, p []byte) []byte { return sign(t, p, "-z", "0", "-u", signer) },
	"rfc4880":        func(t *testing.T, p []byte) []byte { return sign(t, p, "-z", "0", "--rfc4880") },
	"compressed":     func(t *testing.T, p []byte) []byte { return sign(t, p, "-z", "6") },
	"armoured":       func(t *testing.T, p []byte) []byte { return sign(t, p, "-z", "0", "--armor") },
	"clear-signed": func(t *testing.T, p []byte) []byte {
		out, err := gpg(p, "-u", signer, "--clearsign")
		if err != nil {
			t.Fatal(err)
		}
		return out
	},
}

// payloadFor is a program of that size that the shape can hold: text for a
// clear-signed one.
func payloadFor(shape string, uuid xapi.UUID, size int) []byte {
	if shape == "clear-signed" {
		return program(uuid, 0)
	}
	return program(uuid, size)
}

// chop gives p in pieces of random length.
func chop(p []byte, most int, f func([]byte)) {
	for len(p) > 0 {
		n := min(len(p), 1+rand.IntN(most))
		f(p[:n])
		p = p[n:]
	}
}

func TestSplitterFindsThePayload(t *testing.T) {
	keys := patch.NewKeyring("test", publicKey)
	opaque := map[string]bool{"compressed": true, "armoured": true, "clear-signed": true}
	for _, size := range []int{1, 100, 8191, 8192, 70000, 3 * mib} {
		for name, shape := range shapes {
			message := shape(t, payloadFor(name, xapi.NewUUID(), size))
			m, err := patch.Open(bytes.NewReader(message), keys, patch.Options{})
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			want, err := io.ReadAll(m)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			for _, most := range []int{1, 40, 100000} {
				if len(message) > 100*most*most { // takes long and shows nothing new
					continue
				}
				var s splitter
				var payload, rest []byte
				chop(message, most, func(p []byte) {
					for len(p) > 0 {
						n, is := s.next(p)
						if n < 1 {
							t.Fatalf("%s: next gives %d", name, n)
						}
						if is {
							payload = append(payload, p[:n]...)
						} else {
							rest = append(rest, p[:n]...)
						}
						p = p[n:]
					}
				})
				if opaque[name] {
					if len(payload) > 0 {
						t.Errorf("%s: %d bytes taken for payload", name, len(payload))
					}
					continue
				}
				if !bytes.Equal(payload, want) {
					t.Errorf("%s of %d bytes in pieces of %d: %d bytes of payload, not the %d of the message", name, size, most, len(payload), len(want))
				}
				if len(rest) > 4096+len(message)/1000 {
					t.Errorf("%s: %d bytes around a payload of %d", name, len(rest), len(want))
				}
			}
		}
	}
}

func TestSplitterTakesAnything(t *testing.T) {
	for range 2000 {
		p := make([]byte, 1+rand.IntN(300))
		for i := range p {
			p[i] = byte(rand.IntN(256))
		}
		p[0] |= 0x80
		var s splitter
		seen := 0
		chop(p, 50, func(p []byte) {
			for len(p) > 0 {
				n, _ := s.next(p)
				if n < 1 || n > len(p) {
					t.Fatalf("next of %d bytes gives %d", len(p), n)
				}
				seen += n
				p = p[n:]
			}
		})
		if seen != len(p) {
			t.Fatal("bytes got lost")
		}
	}
}

// logged writes a message into a log as a receiver does, with flushed bytes of
// payload in the image, and syncs at one place.
func logged(t *testing.T, l *uploadLog, message []byte, flushed func(payload int64) int64) {
	t.Helper()
	var s splitter
	var payload int64
	l.boot("boot 1")
	chop(message, 300000, func(p []byte) {
		for len(p) > 0 {
			n, is := s.next(p)
			if is {
				l.keep(p[:n])
				payload += int64(n)
			} else {
				l.bytes(p[:n])
			}
			p = p[n:]
		}
		if err := l.write(flushed(payload)); err != nil {
			t.Fatal(err)
		}
	})
}

func newTestLog(t *testing.T) *uploadLog {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return &uploadLog{f: f}
}

func TestReplayIsTheBytesThatWereReceived(t *testing.T) {
	for name, shape := range shapes {
		t.Run(name, func(t *testing.T) {
			payload := payloadFor(name, xapi.NewUUID(), 2*mib+777)
			message := shape(t, payload)
			lag := func(n int64) int64 { return max(0, (n-3*mib/2)/blockSize*blockSize) }
			l := newTestLog(t)
			logged(t, l, message, lag)
			p, err := findResumePoint(l.f, "boot 1")
			if err != nil {
				t.Fatal(err)
			}
			if p.offset != int64(len(message)) || p.done%blockSize != 0 {
				t.Errorf("resume at %+v of %d bytes", p, len(message))
			}
			kept := newTestLog(t)
			if err := p.copyTo(kept, l.f); err != nil {
				t.Fatal(err)
			}
			again, err := findResumePoint(kept.f, "boot 1")
			if err != nil || again != p {
				t.Errorf("the copied log says %+v, %v, want %+v", again, err, p)
			}
			got, err := io.ReadAll(newReplay(kept.f, p, bytes.NewReader(payload[:min(p.done, int64(len(payload)))])))
			if err != nil || !bytes.Equal(got, message[:p.offset]) {
				t.Errorf("%d bytes again (%v), want the first %d of the message", len(got), err, p.offset)
			}
		})
	}
}

func TestALogOfAnotherBootCountsAsFarAsItWasSynced(t *testing.T) {
	l := newTestLog(t)
	l.boot("one")
	l.bytes([]byte("head"))
	l.payload(8192)
	if err := l.sync(8192); err != nil {
		t.Fatal(err)
	}
	l.payload(100000)
	if err := l.write(65536); err != nil {
		t.Fatal(err)
	}
	for boot, want := range map[string]resumePoint{
		"one": {offset: 4 + 108192, payload: 108192, done: 65536, boot: "one"},
		"two": {offset: 4 + 8192, payload: 8192, done: 8192, boot: "one"},
	} {
		if got, err := findResumePoint(l.f, boot); err != nil || got != want {
			t.Errorf("in boot %s: %+v, %v, want %+v", boot, got, err, want)
		}
	}
}

func TestPayloadThatIsNeitherInTheImageNorInTheRingIsLost(t *testing.T) {
	l := newTestLog(t)
	l.boot("one")
	l.bytes([]byte("head"))
	payload := program(xapi.NewUUID(), 3*ringSize)
	l.keep(payload[:ringSize+5000])
	l.bytes([]byte("x"))
	l.keep(payload[ringSize+5000:])
	if err := l.write(12288 + 77); err != nil {
		t.Fatal(err)
	}
	want := resumePoint{offset: 4 + 12288, payload: 12288, done: 12288, boot: "one"}
	if got, err := findResumePoint(l.f, "one"); err != nil || got != want {
		t.Errorf("%+v, %v, want %+v", got, err, want)
	}
}

func TestADamagedLogCountsUpToTheDamage(t *testing.T) {
	message := sign(t, program(xapi.NewUUID(), mib), "-z", "0")
	l := newTestLog(t)
	logged(t, l, message, func(n int64) int64 { return n / blockSize * blockSize })
	whole, err := os.ReadFile(l.f.Name())
	if err != nil {
		t.Fatal(err)
	}
	last := int64(1 << 60)
	for cut := len(whole); cut >= ringSize; cut -= 97 {
		for _, b := range [][]byte{whole[:cut], append(bytes.Clone(whole[:cut]), make([]byte, 50)...), flip(whole, cut)} {
			p, err := findResumePoint(bytes.NewReader(b), "boot 1")
			if err != nil || p.offset > int64(len(message)) || p.payload > p.done+ringSize {
				t.Fatalf("cut at %d: %+v, %v", cut, p, err)
			}
			if len(b) == cut && p.offset > last {
				t.Errorf("a shorter log says more: %+v", p)
			}
			if len(b) == cut {
				last = p.offset
			}
		}
	}
}

func flip(p []byte, at int) []byte {
	p = bytes.Clone(p)
	if at < len(p) {
		p[at] ^= 1
	}
	return p
}

func TestALogThatGrowsTooLongIsGivenUp(t *testing.T) {
	l := newTestLog(t)
	noise := bytes.Repeat([]byte("x"), mib)
	var err error
	for n := 0; err == nil && n < 100; n++ {
		l.bytes(noise)
		err = l.write(0)
	}
	if !errors.Is(err, errLogFull) {
		t.Fatalf("%v, want the log to be full", err)
	}
	if st, err := l.f.Stat(); err != nil || st.Size() != 0 {
		t.Errorf("a log that was given up has %d bytes", st.Size())
	}
	l.bytes(noise)
	if p, err := findResumePoint(l.f, ""); l.write(0) == nil || err != nil || p.offset != 0 {
		t.Errorf("it goes on: %+v %v", p, err)
	}
}
