package server

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"time"

	"github.com/BurntSushi/toml"

	"github.com/patchd/patchd/pkg/upload"
	"github.com/patchd/patchd/pkg/vdi"
)

// Config is everything that can be set. Each key has one name: as a flag
// (--state-dir), as a variable (PATCHD_STATE_DIR) and in the TOML file
// (state-dir). Flags win over variables, variables over the file. The keys
// marked file-only have neither flag nor variable.
type Config struct {
	StateDir  string `toml:"state-dir" help:"folder of the pool database, the journal, keys and the first SR"`
	Listen    string `toml:"listen" help:"address for plain HTTP; empty: none"`
	TLSListen string `toml:"tls-listen" help:"address for TLS; empty: none"`
	PatchDir  string `toml:"patch-dir" help:"folder of classic patch files and of stampfiles"`

	Store       string `toml:"store" help:"pool database: empty for the embedded one, else etcd://host:port,… or etcds://…"`
	StorePrefix string `toml:"store-prefix" help:"first part of every key in the pool database"`
	StoreCA     string `toml:"store-ca" help:"CA certificate of an etcds:// store"`
	StoreCert   string `toml:"store-cert" help:"client certificate for an etcds:// store"`
	StoreKey    string `toml:"store-key" help:"key of the client certificate"`

	Address string `toml:"address" help:"address by which clients and other hosts reach this one"`

	Copies        int64    `toml:"copies" help:"how many hosts must have an uploaded patch before the upload ends; 0: 2 with --store, else 1"`
	CopiesTimeout Duration `toml:"copies-timeout" help:"how long that may take before the upload fails"`

	PrecheckTimeout  Duration `toml:"precheck-timeout" help:"how long a patch's precheck may take"`
	ApplyTimeout     Duration `toml:"apply-timeout" help:"how long a patch's apply may take"`
	GraceTimeout     Duration `toml:"grace-timeout" help:"time between TERM and KILL when a patch is ended"`
	StallTimeout     Duration `toml:"stall-timeout" help:"how long an upload may stay silent"`
	UploadExpiry     Duration `toml:"upload-expiry" help:"how long an unfinished resumable upload waits for its client"`
	BadPasswordDelay Duration `toml:"bad-password-delay" help:"how long a login with a wrong password waits for its answer"`

	ScrubInterval Duration `toml:"scrub-interval" help:"how long a checked disk image is not looked at again; 0: images are not checked in the background"`
	ScrubRate     int64    `toml:"scrub-rate" help:"how much of disk images is read in the background, in bytes a second; 0: no bound"`

	MaxCleartext int64 `toml:"max-cleartext" help:"largest clear-signed patch, in bytes"`

	ImageLayout string `toml:"image-layout" help:"who makes the filesystem of a disk image: auto, go or mke2fs"`

	LogLevel  string `toml:"log-level" help:"debug, info, warning or error"`
	LogFormat string `toml:"log-format" help:"text or json"`

	// PinnedSHA256 lists unsigned patch files that are accepted nonetheless.
	// It is file-only.
	PinnedSHA256 []string `toml:"pinned-sha256" file:"only"`
}

// Duration is a time.Duration that is written as text, such as "10m".
type Duration time.Duration

// UnmarshalText reads the form of time.ParseDuration; negative ones are refused.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return err
	}
	if v < 0 {
		return fmt.Errorf("duration %s is negative", v)
	}
	*d = Duration(v)
	return nil
}

// String writes the duration as UnmarshalText reads it.
func (d Duration) String() string { return time.Duration(d).String() }

// DefaultConfig is what holds where nothing is said.
func DefaultConfig() Config {
	return Config{
		StateDir: "/var/lib/patchd", Listen: "127.0.0.1:8080", TLSListen: ":8443", PatchDir: "/var/patch",
		CopiesTimeout:   Duration(2 * time.Minute),
		PrecheckTimeout: Duration(10 * time.Minute), ApplyTimeout: Duration(6 * time.Hour),
		GraceTimeout: Duration(10 * time.Second), StallTimeout: Duration(5 * time.Minute),
		UploadExpiry:     Duration(upload.DefaultUploadExpiry),
		BadPasswordDelay: Duration(5 * time.Second), MaxCleartext: 64 << 20,
		ScrubInterval: Duration(7 * 24 * time.Hour), ScrubRate: 32 << 20,
		ImageLayout: "auto",
		LogLevel:    "info", LogFormat: "text",
	}
}

// Setting is one key of Config that has a flag and a variable.
type Setting struct {
	Name  string // "state-dir"
	Help  string
	value reflect.Value
}

// Env is the name of the setting's variable.
func (s Setting) Env() string {
	return "PATCHD_" + strings.ToUpper(strings.ReplaceAll(s.Name, "-", "_"))
}

// String is the setting's value.
func (s Setting) String() string { return fmt.Sprint(s.value.Interface()) }

// Type names the kind of value in help texts.
func (s Setting) Type() string { return "value" }

// Set parses a value from text.
func (s Setting) Set(text string) error {
	switch v := s.value.Addr().Interface().(type) {
	case *string:
		*v = text
		return nil
	case *Duration:
		return v.UnmarshalText([]byte(text))
	case *int64:
		_, err := fmt.Sscan(text, v)
		return err
	}
	return fmt.Errorf("setting %s cannot be set from text", s.Name)
}

// Settings lists the keys of c that have a flag and a variable.
func (c *Config) Settings() []Setting {
	var out []Setting
	v := reflect.ValueOf(c).Elem()
	for i := range v.NumField() {
		f := v.Type().Field(i)
		if f.Tag.Get("file") == "only" {
			continue
		}
		out = append(out, Setting{Name: f.Tag.Get("toml"), Help: f.Tag.Get("help"), value: v.Field(i)})
	}
	return out
}

// Load reads a TOML file into c. A key that does not exist is an error with its line.
func (c *Config) Load(path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	md, err := toml.Decode(string(b), c)
	if err != nil {
		var perr toml.ParseError
		if errors.As(err, &perr) {
			return fmt.Errorf("%s:%d: %s", path, perr.Position.Line, perr.Message)
		}
		return fmt.Errorf("%s: %w", path, err)
	}
	for _, key := range md.Undecoded() {
		return fmt.Errorf("%s:%d: there is no setting called %q", path, lineOf(string(b), key), key)
	}
	return nil
}

// lineOf finds the line of a key that the decoder did not know.
func lineOf(text string, key toml.Key) int {
	for i, line := range strings.Split(text, "\n") {
		name, _, _ := strings.Cut(strings.TrimSpace(line), "=")
		name = strings.Trim(strings.TrimSpace(name), `"'[]`)
		if name == key.String() || name == key[0] {
			return i + 1
		}
	}
	return 0
}

// LoadEnv takes the PATCHD_* variables; unknown ones are ignored.
func (c *Config) LoadEnv(lookup func(string) (string, bool)) error {
	for _, s := range c.Settings() {
		text, ok := lookup(s.Env())
		if !ok {
			continue
		}
		if err := s.Set(text); err != nil {
			return fmt.Errorf("%s: %w", s.Env(), err)
		}
	}
	return nil
}

// Validate refuses what cannot work, and makes paths absolute.
func (c *Config) Validate() error {
	for name, dir := range map[string]*string{"state-dir": &c.StateDir, "patch-dir": &c.PatchDir} {
		if *dir == "" {
			return fmt.Errorf("%s is empty", name)
		}
		abs, err := filepath.Abs(*dir)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if abs == "/" {
			return fmt.Errorf("%s is the root of the filesystem", name)
		}
		*dir = abs
	}
	for name, file := range map[string]*string{"store-ca": &c.StoreCA, "store-cert": &c.StoreCert, "store-key": &c.StoreKey} {
		if *file == "" {
			continue
		}
		abs, err := filepath.Abs(*file)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		*file = abs
	}
	if c.Copies < 0 || c.Copies > maxCopies {
		return fmt.Errorf("copies: %d is not between 0 and %d", c.Copies, maxCopies)
	}
	for name, addr := range map[string]string{"listen": c.Listen, "tls-listen": c.TLSListen} {
		if addr == "" {
			continue
		}
		if _, _, err := net.SplitHostPort(addr); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	if c.Listen == "" && c.TLSListen == "" {
		return errors.New("listen and tls-listen are both empty: nobody could reach patchd")
	}
	if _, err := c.layout(); err != nil {
		return fmt.Errorf("image-layout: %w", err)
	}
	for _, p := range c.PinnedSHA256 {
		if len(p) != 64 || strings.Trim(p, "0123456789abcdef") != "" {
			return fmt.Errorf("pinned-sha256: %.80q is not a SHA-256 in lower-case hexadecimal", p)
		}
	}
	return nil
}

// layout is the layout writer of disk images.
func (c *Config) layout() (vdi.LayoutKind, error) { return vdi.ParseLayout(c.ImageLayout) }

// maxCopies bounds the setting copies.
const maxCopies = 100

// copies is how many hosts must have an upload before it ends.
func (c *Config) copies() int {
	switch {
	case c.Copies > 0:
		return int(c.Copies)
	case c.Store != "":
		return 2
	}
	return 1
}
