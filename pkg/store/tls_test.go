package store

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/xapi"
)

// selfSigned writes a certificate for 127.0.0.1 that is its own authority.
func selfSigned(t *testing.T) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err1 := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	pkcs, err2 := x509.MarshalPKCS8PrivateKey(private)
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	dir := t.TempDir()
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for path, block := range map[string]*pem.Block{
		cert: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: pkcs},
	} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

func TestAClusterOverTLS(t *testing.T) {
	cert, key := selfSigned(t)
	addrs := freeAddrs(t, 2)
	p := play(t, "etcd", node{
		Name: "n", Dir: t.TempDir(), Client: "https://" + addrs[0], Peer: "http://" + addrs[1],
		Cluster: "n=http://" + addrs[1], Cert: cert, Key: key,
	})
	if line := p.says(t); line != "ready" {
		t.Fatal("etcd says", line)
	}
	at := "etcds://" + addrs[0]
	s := open(t, Options{URL: at, CA: cert, Cert: cert, Key: key})
	put(t, s, "VDI", xapi.NewRef(), disk{})
	for name, o := range map[string]Options{
		"without a certificate": {URL: at, CA: cert},
		"an unknown authority":  {URL: at, Cert: cert, Key: key},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		if other, err := Open(ctx, o); err == nil {
			t.Error(name, "was let in")
			closeStore(t, other)
		}
		cancel()
	}
	if _, err := Open(t.Context(), Options{URL: at, CA: key}); err == nil {
		t.Error("a key was taken for an authority")
	}
}
