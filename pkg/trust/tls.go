package trust

import (
	"crypto/tls"
	"errors"
	"slices"
)

// Protocol is the name under which hosts speak to each other (ALPN).
const Protocol = "patchd/1"

// ServerConfig is base for everybody but hosts, who offer Protocol: those get
// TLS 1.3 only and must show a certificate. Of whom it is, nothing was checked:
// the handler does that, with VerifyChain over the certificates as shown.
// Nothing is resumed, so each connection shows them anew.
func ServerConfig(base *tls.Config, id *Identity) *tls.Config {
	hosts := &tls.Config{
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return id.Certificate(), nil },
		MinVersion:     tls.VersionTLS13, NextProtos: []string{Protocol},
		ClientAuth: tls.RequireAnyClientCert, SessionTicketsDisabled: true,
	}
	c := base.Clone()
	c.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		if slices.Contains(hello.SupportedProtos, Protocol) {
			return hosts, nil
		}
		return nil, nil
	}
	return c
}

// ClientConfig is for a connection to a host whose key is trusted, or was
// signed for by one that is. A server that does not speak Protocol is refused.
func ClientConfig(id *Identity, trusted func(spki []byte) bool) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{Protocol},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return id.Certificate(), nil },
		InsecureSkipVerify:   true, // names and authorities do not count; VerifyConnection decides
		VerifyConnection: func(cs tls.ConnectionState) error {
			if cs.NegotiatedProtocol != Protocol {
				return errors.New("the server is no patchd, or one that knows nothing of pools")
			}
			_, _, err := VerifyChain(Shown(cs), trusted)
			return err
		},
	}
}

// Shown gives the certificates that the other side showed, the leaf first.
func Shown(cs tls.ConnectionState) [][]byte {
	raw := make([][]byte, len(cs.PeerCertificates))
	for i, c := range cs.PeerCertificates {
		raw[i] = c.Raw
	}
	return raw
}

// PeerKey is the SPKI of the leaf that the other side showed, or nil.
func PeerKey(cs tls.ConnectionState) []byte {
	if len(cs.PeerCertificates) == 0 {
		return nil
	}
	return cs.PeerCertificates[0].RawSubjectPublicKeyInfo
}
