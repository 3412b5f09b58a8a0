package store

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
)

// DefaultPrefix is where the keys of a pool begin when nothing else is said.
const DefaultPrefix = "/patchd"

// Options say where the data is and how it is read.
type Options struct {
	// Dir is the data folder of the embedded etcd. It is used when URL is
	// empty, and made when it is missing. The caller holds the lock that keeps
	// a second daemon away.
	Dir string
	// URL names a cluster: etcd://h1:2379,h2:2379/prefix, or etcds:// for TLS.
	// The port may be left out (2379), and so may the prefix.
	URL string
	// Prefix is where the keys begin; "" is the path of URL, else DefaultPrefix.
	Prefix string
	// CA, Cert and Key are PEM files for etcds://. CA "" means the system's.
	CA, Cert, Key string
	// Indexes are the fields records can be looked up by. The field uuid of
	// every class is always one.
	Indexes []Index
	// LeaseTTL is how long a leader that is not heard of stays leader, in whole
	// seconds; 0: 3 s on a cluster, 60 s embedded (where a lease of an earlier
	// process is revoked at once). A cluster gives at least 1.5 times its own
	// election time-out.
	LeaseTTL time.Duration
	// Log gets what etcd has to say; nil: nothing is logged.
	Log logrus.FieldLogger
}

// Index declares that records of Class are looked up by Field.
type Index struct {
	Class string
	// Field is the JSON name of a string field.
	Field string
	// Parent, when set, is the class the field refers to. The parent has a
	// field derived from its children, so when a child appears, vanishes or
	// moves, the parent counts as modified in the same revision.
	Parent string
}

// target is where a URL points.
type target struct {
	endpoints []string
	tls       bool
	prefix    string
}

// parseURL takes etcd://h1:2379,h2:2379/prefix apart.
func parseURL(text string) (target, error) {
	var t target
	scheme, rest, ok := strings.Cut(text, "://")
	switch {
	case ok && scheme == "etcd":
	case ok && scheme == "etcds":
		t.tls = true
	default:
		return t, fmt.Errorf("store URL %q: want etcd://host:2379,… or etcds://…", text)
	}
	hosts, path, _ := strings.Cut(rest, "/")
	if strings.ContainsAny(rest, "@?#") {
		return t, fmt.Errorf("store URL %q: only hosts and a key prefix are understood", text)
	}
	for _, host := range strings.Split(hosts, ",") {
		if host == "" {
			return t, fmt.Errorf("store URL %q: a host is missing", text)
		}
		if _, _, err := net.SplitHostPort(host); err != nil {
			host = net.JoinHostPort(strings.Trim(host, "[]"), "2379")
		}
		t.endpoints = append(t.endpoints, host)
	}
	if path = strings.Trim(path, "/"); path != "" {
		t.prefix = "/" + path
	}
	return t, nil
}

// resolve checks o and gives the target with the prefix that holds.
func (o *Options) resolve() (target, error) {
	t := target{}
	if o.URL != "" {
		var err error
		if t, err = parseURL(o.URL); err != nil {
			return t, err
		}
	} else if o.Dir == "" {
		return t, errors.New("store: neither a folder nor a URL is given")
	}
	if p := strings.Trim(o.Prefix, "/"); p != "" {
		t.prefix = "/" + p
	}
	if t.prefix == "" {
		t.prefix = DefaultPrefix
	}
	for _, ix := range o.Indexes {
		if !validClass(ix.Class) || ix.Field == "" {
			return t, fmt.Errorf("store: bad index %+v", ix)
		}
	}
	return t, nil
}

// leaseTTL is the time to live of the leader's lease in seconds.
func (o *Options) leaseTTL() int64 {
	switch {
	case o.LeaseTTL > 0:
		return max(1, int64(o.LeaseTTL/time.Second))
	case o.URL != "":
		return 3
	}
	return 60
}

func (o *Options) tlsConfig() (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12}
	if o.CA != "" {
		pem, err := os.ReadFile(o.CA)
		if err != nil {
			return nil, fmt.Errorf("read store CA: %w", err)
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("store CA %s holds no certificate", o.CA)
		}
	}
	if o.Cert != "" || o.Key != "" {
		pair, err := tls.LoadX509KeyPair(o.Cert, o.Key)
		if err != nil {
			return nil, fmt.Errorf("read store certificate: %w", err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c, nil
}
