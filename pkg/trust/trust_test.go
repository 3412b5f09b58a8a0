package trust

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/patchd/patchd/pkg/xapi"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t *testing.T) *Identity {
	t.Helper()
	id, err := Open(filepath.Join(t.TempDir(), "tls.pem"), "host")
	must(t, err)
	return id
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestPins(t *testing.T) {
	pin := Pin([]byte("key"))
	if len(pin) != 64 || pin != strings.ToLower(pin) {
		t.Fatal(pin)
	}
	var colons []string
	for i := 0; i < len(pin); i += 2 {
		colons = append(colons, strings.ToUpper(pin[i:i+2]))
	}
	for _, typed := range []string{pin, strings.ToUpper(pin), strings.Join(colons, ":"), strings.Join(colons, " "), " SHA256:" + pin + "\n"} {
		if got, err := ParsePin(typed); got != pin || err != nil {
			t.Errorf("%q: %q %v", typed, got, err)
		}
	}
	for _, typed := range []string{"", pin[1:], pin + "00", strings.Replace(pin, pin[:1], "g", 1), "sha1:" + pin} {
		if got, err := ParsePin(typed); err == nil {
			t.Errorf("%q is a pin: %s", typed, got)
		}
	}
}

func TestAnIdentityIsMadeOnceAndKept(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tls.pem")
	id, err := Open(path, "host")
	must(t, err)
	again, err := Open(path, "other")
	must(t, err)
	if id.Pin() != again.Pin() || !id.Certificate().Leaf.Equal(again.Certificate().Leaf) {
		t.Error("it is another one")
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Error(st.Mode(), err)
	}
	must(t, os.WriteFile(path, []byte("garbage"), 0o600))
	if _, err := Open(path, "host"); err == nil {
		t.Error("garbage is an identity")
	}
	if b, _ := os.ReadFile(path); string(b) != "garbage" {
		t.Error("the file was replaced")
	}
	if _, err := Open(filepath.Join(path, "x"), "host"); err == nil {
		t.Error("an identity that cannot be kept")
	}
}

// kept tells whether the file has what the identity shows.
func kept(t *testing.T, id *Identity) {
	t.Helper()
	again, err := Open(id.path, "host")
	must(t, err)
	if !slices.EqualFunc(again.Certificate().Certificate, id.Certificate().Certificate, slices.Equal) {
		t.Error("the file has another chain")
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(id.path), ".*")); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

func TestRenewKeepsTheKey(t *testing.T) {
	id := open(t)
	pin, now := id.Pin(), time.Now()
	for years, want := range map[int]bool{0: false, 5: false} {
		if done, err := id.Renew(now.AddDate(years, 0, 0)); done != want || err != nil {
			t.Errorf("after %d years: %v %v", years, done, err)
		}
	}
	later := now.AddDate(8, 0, 0)
	done, err := id.Renew(later)
	if !done || err != nil || id.Pin() != pin || len(id.Certificate().Certificate) != 1 {
		t.Fatal(done, err, len(id.Certificate().Certificate))
	}
	if end := id.Certificate().Leaf.NotAfter; end.Before(later.AddDate(9, 0, 0)) {
		t.Error("it ends", end)
	}
	kept(t, id)
}

func TestRenewAfterARotationLeavesTheWayFromTheOldKey(t *testing.T) {
	id := open(t)
	old := id.SPKI()
	must(t, id.Rotate(time.Now()))
	rotated := id.SPKI()
	if done, err := id.Renew(time.Now().AddDate(9, 0, 0)); !done || err != nil {
		t.Fatal(done, err)
	}
	if string(id.SPKI()) != string(rotated) {
		t.Error("the key has changed")
	}
	if leaf, via, err := VerifyChain(id.Certificate().Certificate, OneOf(old)); err != nil || !via || string(leaf) != string(rotated) {
		t.Error(via, err)
	}
	kept(t, id)
}

func TestACertificateOfAnAuthorityIsNotReplaced(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	ca := template("ca", big.NewInt(1), time.Now())
	ca.IsCA, ca.KeyUsage = true, x509.KeyUsageCertSign
	leafKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, key.Public(), key)
	must(t, err)
	der, err := x509.CreateCertificate(rand.Reader, template("h", big.NewInt(2), time.Now()), ca, leafKey.Public(), key)
	must(t, err)
	for name, chain := range map[string][][]byte{"with its authority": {der, caDER}, "alone": {der}} {
		id := &Identity{path: filepath.Join(t.TempDir(), "tls.pem"), hostname: "h"}
		must(t, id.keep(chain, leafKey))
		if done, err := id.Renew(time.Now().AddDate(20, 0, 0)); done || err != nil {
			t.Errorf("%s: %v %v", name, done, err)
		}
	}
}

func TestARotationThatCannotBeKeptChangesNothing(t *testing.T) {
	id := open(t)
	pin := id.Pin()
	must(t, os.Mkdir(filepath.Join(filepath.Dir(id.path), ".tls.pem.new"), 0o700)) // in the way
	if err := id.Rotate(time.Now()); err == nil || id.Pin() != pin {
		t.Errorf("%v; the key is the same: %v", err, id.Pin() == pin)
	}
	again, err := Open(id.path, "host")
	if err != nil || again.Pin() != pin {
		t.Error(err)
	}
}

// shown is the chain of an identity at one moment.
func shown(id *Identity) [][]byte { return id.Certificate().Certificate }

func TestChains(t *testing.T) {
	id, stranger := open(t), open(t)
	first, chain1 := id.SPKI(), shown(id)
	var spki [][]byte
	var all [][][]byte
	for range 5 {
		spki, all = append(spki, id.SPKI()), append(all, shown(id))
		must(t, id.Rotate(time.Now()))
	}
	kept(t, id)
	now, last := id.SPKI(), shown(id)
	if len(last) != maxChain {
		t.Fatalf("the chain has %d certificates", len(last))
	}
	imposter := forged(t, stranger, id.Certificate().Leaf, nil)           // its own key under the host's name
	claims := forged(t, stranger, id.Certificate().Leaf, stranger.key(t)) // says that the host has issued it
	reordered := [][]byte{all[0][0], shown(id)[0]}                        // old leaf, then the new one
	others := [][]byte{shown(stranger)[0], chain1[0]}                     // a trusted certificate hung behind
	skipped := [][]byte{last[0], last[2], last[3]}                        // one link is missing
	swapped := [][]byte{last[1], last[0], last[2], last[3]}               // the new leaf is not the first
	foreign := append([][]byte{shown(stranger)[0]}, last...)              // a leaf of its own before a good chain
	damaged := [][]byte{slices.Clone(last[0]), last[1]}                   // the signature of the old key is broken
	damaged[0][len(damaged[0])-3] ^= 1                                    //
	long := append(append([][]byte{}, last...), all[1][len(all[1])-1])    // the trusted one is the fifth
	for name, c := range map[string]struct {
		chain   [][]byte
		trusted []byte
		via, ok bool
	}{
		"the key itself":                    {chain1, first, false, true},
		"the newest key":                    {last, now, false, true},
		"signed by the key before":          {last, spki[4], true, true},
		"three rotations were missed":       {last, spki[2], true, true},
		"four rotations were missed":        {last, spki[1], false, false},
		"beyond the fourth":                 {long, spki[1], false, false},
		"nothing":                           {nil, first, false, false},
		"another key":                       {shown(stranger), first, false, false},
		"an old certificate, a new trust":   {chain1, now, false, false},
		"an imposter with the same name":    {[][]byte{imposter}, now, false, false},
		"an imposter and the real one":      {[][]byte{imposter, last[0]}, now, false, false},
		"who says that the host signed it":  {[][]byte{claims, last[0]}, now, false, false},
		"the wrong way round":               {reordered, now, false, false},
		"a trusted one that did not sign":   {others, first, false, false},
		"a link is missing":                 {skipped, spki[2], false, false},
		"two are swapped":                   {swapped, spki[3], false, false},
		"a leaf before a good chain":        {foreign, now, false, false},
		"a broken signature":                {damaged, spki[4], false, false},
		"garbage":                           {[][]byte{[]byte("x")}, first, false, false},
		"garbage behind an untrusted leaf":  {[][]byte{shown(stranger)[0], []byte("x")}, first, false, false},
		"garbage behind a trusted leaf":     {[][]byte{last[0], []byte("x")}, now, false, true},
		"an empty key is no key, not a hit": {last, nil, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			leaf, via, err := VerifyChain(c.chain, OneOf(c.trusted))
			if (err == nil) != c.ok || via != c.via {
				t.Errorf("via the old key %v, %v", via, err)
			}
			if c.ok && Pin(leaf) != leafPin(t, c.chain) {
				t.Error("it gives another key than the leaf's")
			}
		})
	}
	if _, _, err := VerifyChain(shown(stranger), OneOf(now)); !errors.Is(err, ErrUntrusted) || !strings.Contains(err.Error(), stranger.Pin()) {
		t.Error(err)
	}
	if _, _, err := VerifyChain(last, Pinned(id.Pin())); err != nil {
		t.Error(err)
	}
}

func leafPin(t *testing.T, chain [][]byte) string {
	cert, err := x509.ParseCertificate(chain[0])
	must(t, err)
	return Pin(cert.RawSubjectPublicKeyInfo)
}

func (id *Identity) key(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	return id.Certificate().PrivateKey.(*ecdsa.PrivateKey)
}

// forged is a certificate for the key of id that looks like the victim's, or,
// with by, as if the victim had issued it: but that key signed it.
func forged(t *testing.T, id *Identity, victim *x509.Certificate, by *ecdsa.PrivateKey) []byte {
	t.Helper()
	cert := template("host", victim.SerialNumber, time.Now())
	parent := cert
	if by != nil {
		parent = &x509.Certificate{Subject: victim.Subject, RawSubject: victim.RawSubject, SubjectKeyId: victim.SubjectKeyId}
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, parent, id.key(t).Public(), id.key(t))
	must(t, err)
	return der
}

// A listener for both kinds of clients.
type rig struct {
	id      *Identity
	address string
}

func serve(t *testing.T) rig {
	t.Helper()
	r := rig{id: open(t)}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	base := &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return r.id.Certificate(), nil }, MinVersion: tls.VersionTLS12}
	others, hosts := Split(ln, ServerConfig(base, r.id), time.Second, func(error) {})
	s := &http.Server{ConnContext: WithConn, Handler: Request(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		_, _ = io.WriteString(w, q.TLS.NegotiatedProtocol+" "+Pin(PeerKey(*q.TLS)))
	}))}
	var wg sync.WaitGroup
	wg.Go(func() { _ = s.Serve(others) })
	wg.Go(func() { _ = s.Serve(hosts) })
	t.Cleanup(func() { s.Close(); wg.Wait() })
	r.address = ln.Addr().String()
	return r
}

func (r rig) get(t *testing.T, c *tls.Config) (string, error) {
	t.Helper()
	client := http.Client{Transport: &http.Transport{TLSClientConfig: c, DisableKeepAlives: true}}
	resp, err := client.Get("https://" + r.address)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

func TestHostsAndClientsShareAListener(t *testing.T) {
	r, me := serve(t), open(t)
	nobody := " " + Pin(nil)
	for name, version := range map[string]uint16{"TLS 1.2": tls.VersionTLS12, "TLS 1.3": tls.VersionTLS13} {
		if got, err := r.get(t, &tls.Config{InsecureSkipVerify: true, MaxVersion: version}); got != nobody || err != nil {
			t.Errorf("%s: %q %v", name, got, err)
		}
	}
	asked := false
	_, err := r.get(t, &tls.Config{InsecureSkipVerify: true, GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		asked = true
		return me.Certificate(), nil
	}})
	if asked || err != nil {
		t.Errorf("a client was asked for a certificate: %v %v", asked, err)
	}
	old := r.id.SPKI()
	must(t, r.id.Rotate(time.Now()))
	for name, trusted := range map[string]func([]byte) bool{"its key": OneOf(r.id.SPKI()), "the key before": OneOf(old), "its pin": Pinned(r.id.Pin())} {
		if got, err := r.get(t, ClientConfig(me, trusted)); got != Protocol+" "+me.Pin() || err != nil {
			t.Errorf("%s: %q %v", name, got, err)
		}
	}
	if _, err := r.get(t, ClientConfig(me, OneOf(me.SPKI()))); !errors.Is(err, ErrUntrusted) {
		t.Errorf("another key: %v", err)
	}
	if _, err := r.get(t, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{Protocol}}); err == nil {
		t.Error("a host that shows no certificate was let in")
	}
	if _, err := r.get(t, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{Protocol}, MaxVersion: tls.VersionTLS12, Certificates: []tls.Certificate{*me.Certificate()}}); err == nil {
		t.Error("a host with TLS 1.2 was let in")
	}
}

func TestAServerThatKnowsNothingOfPoolsIsRefused(t *testing.T) {
	id := open(t)
	ln, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{*id.Certificate()}})
	must(t, err)
	s := &http.Server{}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(ln) }()
	defer func() { s.Close(); <-done }()
	if _, err := (rig{id, ln.Addr().String()}).get(t, ClientConfig(open(t), OneOf(id.SPKI()))); err == nil || !strings.Contains(err.Error(), "knows nothing of pools") {
		t.Error(err)
	}
}

func TestAConnectionThatSaysNothingIsLetGo(t *testing.T) {
	r := serve(t)
	c, err := net.Dial("tcp", r.address)
	must(t, err)
	defer c.Close()
	must(t, c.SetReadDeadline(time.Now().Add(10*time.Second)))
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Error(err)
	}
}

func TestTickets(t *testing.T) {
	id, other, reader := open(t), open(t), open(t)
	now := time.Now()
	good := Ticket{Pool: xapi.NewUUID(), Host: xapi.NewUUID(), Pin: reader.Pin(), Map: "m", Expires: now.Add(TicketLife)}
	sealedBy := func(id *Identity, t2 Ticket) []byte {
		b, err := id.Seal(t2)
		must(t, err)
		return b
	}
	changed := func(f func(*Ticket)) Ticket { c := good; f(&c); return c }
	ticket := sealedBy(id, good)
	altered := func() []byte {
		var s sealed
		must(t, json.Unmarshal(ticket, &s))
		s.Ticket = []byte(strings.Replace(string(s.Ticket), `"map":"m"`, `"map":"n"`, 1))
		b, err := json.Marshal(s)
		must(t, err)
		return b
	}()
	undivided := func() []byte { // the same words, signed for something else
		var s sealed
		must(t, json.Unmarshal(ticket, &s))
		digest := sha256.Sum256(s.Ticket)
		sig, err := ecdsa.SignASN1(rand.Reader, id.key(t), digest[:])
		must(t, err)
		s.Signature = sig
		b, err := json.Marshal(s)
		must(t, err)
		return b
	}()
	keys := [][]byte{[]byte("no key"), other.SPKI(), id.SPKI()}
	for name, c := range map[string]struct {
		ticket []byte
		keys   [][]byte
		when   time.Time
		pool   xapi.UUID
		digest string
		pin    string
		ok     bool
	}{
		"good":                         {ticket, keys, now, good.Pool, "m", good.Pin, true},
		"good in its last second":      {ticket, keys, good.Expires.Add(-time.Second), good.Pool, "m", good.Pin, true},
		"expired":                      {ticket, keys, good.Expires, good.Pool, "m", good.Pin, false},
		"for ever":                     {sealedBy(id, changed(func(t *Ticket) { t.Expires = now.AddDate(1, 0, 0) })), keys, now, good.Pool, "m", good.Pin, false},
		"other blocks":                 {ticket, keys, now, good.Pool, "n", good.Pin, false},
		"no blocks":                    {sealedBy(id, changed(func(t *Ticket) { t.Map = "" })), keys, now, good.Pool, "", good.Pin, false},
		"another reader":               {ticket, keys, now, good.Pool, "m", other.Pin(), false},
		"no reader":                    {sealedBy(id, changed(func(t *Ticket) { t.Pin = "" })), keys, now, good.Pool, "m", "", false},
		"another pool":                 {ticket, keys, now, xapi.NewUUID(), "m", good.Pin, false},
		"altered":                      {altered, keys, now, good.Pool, "n", good.Pin, false},
		"signed for something else":    {undivided, keys, now, good.Pool, "m", good.Pin, false},
		"signed by the reader himself": {sealedBy(reader, good), keys, now, good.Pool, "m", good.Pin, false},
		"nobody may sign":              {ticket, nil, now, good.Pool, "m", good.Pin, false},
		"garbage":                      {[]byte("x"), keys, now, good.Pool, "m", good.Pin, false},
		"nothing":                      {nil, keys, now, good.Pool, "m", good.Pin, false},
		"too long":                     {append(slices.Clone(ticket), make([]byte, maxTicket)...), keys, now, good.Pool, "m", good.Pin, false},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := OpenTicket(c.ticket, c.keys, c.when)
			if err == nil {
				err = got.Allows(c.pool, c.digest, c.pin)
			}
			if (err == nil) != c.ok {
				t.Error(err)
			}
			if err != nil && !xapi.Is(err, xapi.OperationNotAllowed) {
				t.Errorf("%v has no code", err)
			}
		})
	}
}

// A key that an admin has put there may be of another kind.
func TestATicketOfAnRSAKey(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	cert := template("h", big.NewInt(1), time.Now())
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
	must(t, err)
	path := filepath.Join(t.TempDir(), "tls.pem")
	b := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})...)
	must(t, os.WriteFile(path, b, 0o600))
	id, err := Open(path, "h")
	must(t, err)
	old := id.SPKI()
	ticket, err := id.Seal(Ticket{Map: "m", Expires: time.Now().Add(time.Minute)})
	must(t, err)
	if _, err := OpenTicket(ticket, [][]byte{old}, time.Now()); err != nil {
		t.Error(err)
	}
	if _, err := OpenTicket(ticket, [][]byte{open(t).SPKI()}, time.Now()); err == nil {
		t.Error("another key has signed it")
	}
	must(t, id.Rotate(time.Now()))
	if _, via, err := VerifyChain(shown(id), OneOf(old)); !via || err != nil {
		t.Error(via, err)
	}
}
