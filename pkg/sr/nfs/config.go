package nfs

import (
	"fmt"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/xapi"
)

// The keys of device_config.
const (
	keyServer  = "server"
	keyPath    = "serverpath"
	keyVersion = "nfsversion"
	keyOptions = "options"
)

// export is a device_config that was read.
type export struct {
	server  string // host name or address
	path    string
	version string // "4.2"
	port    int
	timeo   int // tenths of a second
	retrans int
	options []string // further ones for mount(2), checked
}

// source is what is mounted, as mount(8) shows it.
func (e export) source() string {
	if strings.Contains(e.server, ":") {
		return "[" + e.server + "]:" + e.path
	}
	return e.server + ":" + e.path
}

// limit is how long one call may take: what the kernel takes to give up a
// request, and a bit.
func (e export) limit() time.Duration {
	return time.Duration(e.timeo*(1+e.retrans))*100*time.Millisecond + 3*time.Second
}

const maxLimit = 2 * time.Minute

// mountOptions is the text that mount(2) gets. give is how it gives up:
// "softerr" (ETIMEDOUT) or, for older kernels, "soft" (EIO).
func (e export) mountOptions(give string, server, client netip.Addr) string {
	list := []string{
		"vers=" + e.version, "addr=" + server.String(), "clientaddr=" + client.String(), "port=" + strconv.Itoa(e.port),
		give, "timeo=" + strconv.Itoa(e.timeo), "retrans=" + strconv.Itoa(e.retrans),
		"acdirmin=0", "acdirmax=0", "lookupcache=pos",
	}
	return strings.Join(append(list, e.options...), ",")
}

var hostName = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?(\.[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?)*$`)

// read holds c against the rules. It asks nobody yet.
func read(c sr.Config) (export, error) {
	e := export{server: c.Device[keyServer], path: c.Device[keyPath], version: "4.2", port: 2049, timeo: 40, retrans: 2}
	if err := sr.CheckConfig(info, c.Device); err != nil {
		return e, err
	}
	if !c.SR.Valid() {
		return e, xapi.NewError(xapi.InvalidValue, "uuid", "").Because(fmt.Errorf("%.64q is not a uuid", c.SR))
	}
	e.server = strings.TrimSuffix(strings.TrimPrefix(e.server, "["), "]")
	if _, err := netip.ParseAddr(e.server); err != nil && (len(e.server) > 253 || !hostName.MatchString(e.server)) || strings.Contains(e.server, "%") {
		return e, sr.BadConfig(keyServer, c.Device[keyServer], "is neither a host name nor an address")
	}
	if !path.IsAbs(e.path) || e.path != path.Clean(e.path) || len(e.path) > 1024 {
		return e, sr.BadConfig(keyPath, e.path, "must be an absolute path, without empty, '.' or '..' parts")
	}
	if v := c.Device[keyVersion]; v != "" {
		if v != "4.1" && v != "4.2" {
			return e, sr.BadConfig(keyVersion, v, "4.2 and 4.1 are supported")
		}
		e.version = v
	}
	if err := e.readOptions(c.Device[keyOptions]); err != nil {
		return e, err
	}
	if e.limit() > maxLimit {
		return e, sr.BadConfig(keyOptions, c.Device[keyOptions], fmt.Sprintf("timeo and retrans would let a call wait for %s; at most %s", e.limit(), maxLimit))
	}
	return e, nil
}

// numbers are the options with a number, and its bounds.
var numbers = map[string][2]int{
	"timeo": {5, 600}, "retrans": {0, 10}, "port": {1, 65535}, "rsize": {4096, 1 << 20}, "wsize": {4096, 1 << 20}, "nconnect": {1, 16},
}

// words are the options with one of a few words.
var words = map[string][]string{"proto": {"tcp", "tcp6"}, "sec": {"sys", "krb5", "krb5i", "krb5p"}}

const optionsKnown = "timeo, retrans, port, rsize, wsize and nconnect with a number, proto=tcp, proto=tcp6, sec=sys, sec=krb5, sec=krb5i, sec=krb5p"

// readOptions reads "timeo=50,retrans=3": only what is known, each once.
func (e *export) readOptions(text string) error {
	if text == "" {
		return nil
	}
	seen := map[string]bool{}
	for _, o := range strings.Split(text, ",") {
		key, value, _ := strings.Cut(o, "=")
		if seen[key] {
			return sr.BadConfig(keyOptions, text, key+" is given twice")
		}
		seen[key] = true
		if slices.Contains(words[key], value) {
			e.options = append(e.options, o)
			continue
		}
		bounds, known := numbers[key]
		if !known {
			return sr.BadConfig(keyOptions, text, "known options are "+optionsKnown)
		}
		n, err := strconv.Atoi(value)
		if err != nil || n < bounds[0] || n > bounds[1] || strconv.Itoa(n) != value {
			return sr.BadConfig(keyOptions, text, fmt.Sprintf("%s must be a number from %d to %d", key, bounds[0], bounds[1]))
		}
		switch key {
		case "timeo":
			e.timeo = n
		case "retrans":
			e.retrans = n
		case "port":
			e.port = n
		default:
			e.options = append(e.options, o)
		}
	}
	return nil
}
