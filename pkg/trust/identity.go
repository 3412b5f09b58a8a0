package trust

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// certYears is the life of a certificate.
const certYears = 10

// Identity is the key of this host and the certificate that it shows. Both are
// in one PEM file: the chain, then the key. Its methods may be called from any
// goroutine.
type Identity struct {
	path, hostname string

	change sync.Mutex // one Renew or Rotate at a time
	mu     sync.RWMutex
	cert   *tls.Certificate // replaced, never changed
}

// Open reads the identity of a host from the file, and makes it where there is
// none: a fresh key and a certificate that it signed itself. A file that makes
// no sense is an error and stays.
func Open(path, hostname string) (*Identity, error) {
	id := &Identity{path: path, hostname: hostname}
	cert, err := tls.LoadX509KeyPair(path, path)
	if err == nil {
		id.cert, err = parsed(cert)
		return id, err
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := id.issue(key, nil, time.Now())
	if err != nil {
		return nil, err
	}
	return id, id.keep([][]byte{der}, key)
}

// parsed fills in the leaf.
func parsed(cert tls.Certificate) (*tls.Certificate, error) {
	var err error
	if cert.Leaf == nil {
		cert.Leaf, err = x509.ParseCertificate(cert.Certificate[0])
	}
	return &cert, err
}

// Certificate is the newest one, with its chain and key.
func (id *Identity) Certificate() *tls.Certificate {
	id.mu.RLock()
	defer id.mu.RUnlock()
	return id.cert
}

// SPKI is the public key of this host.
func (id *Identity) SPKI() []byte { return id.Certificate().Leaf.RawSubjectPublicKeyInfo }

// Pin is the pin of SPKI.
func (id *Identity) Pin() string { return Pin(id.SPKI()) }

// Renew makes a new certificate for the same key when less than a third of the
// life of the present one is left, and tells whether it did. Whoever knows the
// key notices nothing. A certificate that somebody else has issued is left
// alone.
func (id *Identity) Renew(now time.Time) (renewed bool, err error) {
	id.change.Lock()
	defer id.change.Unlock()
	cert := id.Certificate()
	life := cert.Leaf.NotAfter.Sub(cert.Leaf.NotBefore)
	if cert.Leaf.NotAfter.Sub(now) > life/3 || !id.own(cert) {
		return false, nil
	}
	der, err := id.issue(cert.PrivateKey, nil, now)
	if err != nil {
		return false, err
	}
	older := cert.Certificate
	if signedBy(cert.Leaf, cert.Leaf) {
		older = older[1:] // it says nothing that the new one does not say
	}
	return true, id.keep(chain(der, older), cert.PrivateKey)
}

// own tells whether the certificate is of our making: signed by its own key,
// or by the one before it.
func (id *Identity) own(cert *tls.Certificate) bool {
	last, err := x509.ParseCertificate(cert.Certificate[len(cert.Certificate)-1])
	return err == nil && !last.IsCA && signedBy(last, last) || len(cert.Certificate) == maxChain
}

// Rotate makes a new key. Its certificate is signed by the old key and shown
// together with that one's, so who trusts the old key accepts the new one. The
// old key is forgotten by the time Rotate returns; after an error, or a crash
// before that, it holds on.
func (id *Identity) Rotate(now time.Time) error {
	id.change.Lock()
	defer id.change.Unlock()
	old := id.Certificate()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := id.issue(key, old, now)
	if err != nil {
		return err
	}
	return id.keep(chain(der, old.Certificate), key)
}

// chain puts a certificate before older ones, of which the oldest go.
func chain(der []byte, older [][]byte) [][]byte {
	all := append([][]byte{der}, older...)
	return all[:min(len(all), maxChain)]
}

// issue makes a certificate for key, signed by the key of by; nil: by itself.
func (id *Identity) issue(key crypto.PrivateKey, by *tls.Certificate, now time.Time) ([]byte, error) {
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("the key in %s cannot sign", id.path)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	cert := template(id.hostname, serial, now)
	parent, with := cert, key
	if by != nil {
		parent, with = by.Leaf, by.PrivateKey
	}
	return x509.CreateCertificate(rand.Reader, cert, parent, signer.Public(), with)
}

func template(hostname string, serial *big.Int, now time.Time) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: hostname}, DNSNames: []string{hostname, "localhost"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
		NotBefore:   now.Add(-time.Hour), NotAfter: now.AddDate(certYears, 0, 0),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
}

// keep makes a chain and its key the identity: durable first, shown then.
func (id *Identity) keep(chain [][]byte, key crypto.PrivateKey) error {
	var b bytes.Buffer
	for _, der := range chain {
		if err := pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: der}); err != nil {
			return err
		}
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	if err := pem.Encode(&b, &pem.Block{Type: "PRIVATE KEY", Bytes: der}); err != nil {
		return err
	}
	pair, err := tls.X509KeyPair(b.Bytes(), b.Bytes())
	if err != nil {
		return err
	}
	cert, err := parsed(pair)
	if err != nil {
		return err
	}
	if err := writeFile(id.path, b.Bytes()); err != nil {
		return fmt.Errorf("write %s: %w", id.path, err)
	}
	id.mu.Lock()
	defer id.mu.Unlock()
	id.cert = cert
	return nil
}

// writeFile replaces a file durably: it is the old one or the new one, whole.
func writeFile(path string, b []byte) error {
	dir, name := filepath.Split(path)
	tmp := filepath.Join(dir, "."+name+".new")
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
