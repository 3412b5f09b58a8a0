package server

import (
	"net"
	"net/netip"
	"net/url"
	"strings"
)

// address is what the host record and HOST_IS_SLAVE tell: what was configured;
// else the address of a listener that others can reach; else, where there are
// others, the one that reaches the database.
func (s *Server) address() string {
	if s.config.Address != "" {
		return s.config.Address
	}
	plain, secure := hostOf(s.config.Listen), hostOf(s.config.TLSListen)
	for _, host := range []string{plain, secure} {
		if host != "" && !loopback(host) {
			return host
		}
	}
	if host := addressTowards(s.towards()); host != "" && !loopback(host) {
		return host
	}
	if host := anyAddress(); secure == "" && s.config.TLSListen != "" && host != "" {
		return host
	}
	if plain != "" {
		return plain
	}
	return "127.0.0.1"
}

// anyAddress is the first address of this machine that others may reach, or "".
func anyAddress() string {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return ""
	}
	for _, a := range all {
		if n, ok := a.(*net.IPNet); ok && n.IP.IsGlobalUnicast() {
			return n.IP.String()
		}
	}
	return ""
}

// towards is the URL of what this host has to reach: the pool's database or, of a
// member, the coordinator; "" for a pool of one.
func (s *Server) towards() string {
	if s.member != nil {
		return s.member.Joined
	}
	return s.config.Store
}

// addressOf is the host of a URL, "" of none.
func addressOf(text string) string {
	u, err := url.Parse(text)
	if err != nil {
		return ""
	}
	return u.Hostname()
}

// url is where other hosts reach this one's TLS listener, or "".
func (s *Server) url() string {
	if s.ways.TLSAddr == nil {
		return ""
	}
	_, port, err := net.SplitHostPort(s.ways.TLSAddr.String())
	if err != nil {
		return ""
	}
	return "https://" + net.JoinHostPort(s.address(), port)
}

// hostOf is the host of host:port; "" for one that stands for all addresses.
func hostOf(addr string) string {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return ""
	}
	if ip, err := netip.ParseAddr(host); err == nil && ip.IsUnspecified() {
		return ""
	}
	return host
}

func loopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// addressTowards is this machine's address on the way to the first host of a
// store's URL, or "". Nothing is sent.
func addressTowards(store string) string {
	_, rest, ok := strings.Cut(store, "://")
	if !ok {
		return ""
	}
	hosts, _, _ := strings.Cut(rest, "/")
	first, _, _ := strings.Cut(hosts, ",")
	host, port, err := net.SplitHostPort(first)
	if err != nil {
		host, port = strings.Trim(first, "[]"), "2379"
	}
	c, err := net.Dial("udp", net.JoinHostPort(host, port))
	if err != nil {
		return ""
	}
	defer c.Close()
	return hostOf(c.LocalAddr().String())
}

// onHost is the URL of the same listener on another host: all hosts of a pool
// use the same ports.
func onHost(scheme string, local net.Addr, address string) (string, bool) {
	_, port, err := net.SplitHostPort(local.String())
	if err != nil {
		return "", false
	}
	u := url.URL{Scheme: scheme, Host: net.JoinHostPort(address, port)}
	return u.String(), true
}
