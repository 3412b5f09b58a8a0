package thincli

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/patchd/patchd/pkg/xapi"
)

// param is one key=value of a command line, in the order it was given.
type param struct{ key, value string }

// params are the parameters of one command; of a key given twice the first
// counts.
type params []param

// commandLine is one parsed command.
type commandLine struct {
	name    string
	params  params
	session xapi.Ref // a session the caller already has, or ""
}

// switches are the options with a value of their own that may reach the
// server; xe itself takes most of them off.
var switches = map[string]string{
	"-u": "username", "-pw": "password", "-s": "server", "-h": "server", "-p": "port",
}

// standard are the parameters that every command understands and no filter sees.
var standard = map[string]bool{
	"server": true, "password": true, "port": true, "username": true, "minimal": true,
	"force": true, "multiple": true, "all": true, "message-priority": true, "trace": true,
}

// usageError is a command line that cannot be run; its text is shown with the
// hint where to find help.
type usageError struct{ text string }

func (e *usageError) Error() string { return e.text }

func usagef(format string, args ...any) error { return &usageError{fmt.Sprintf(format, args...)} }

// refusal is a failure of a command that is not one of the API's.
type refusal struct{ text string }

func (e *refusal) Error() string { return e.text }

func refusef(format string, args ...any) error { return &refusal{fmt.Sprintf(format, args...)} }

// parseCommandLine reads the body of POST /cli: the words of a command line,
// one a line. A first line session_id=… names a session to use instead of a
// login.
func parseCommandLine(body string) (commandLine, error) {
	words := strings.Split(body, "\n")
	for i, w := range words {
		words[i] = strings.TrimSuffix(w, "\r")
	}
	var cmd commandLine
	if ref, ok := strings.CutPrefix(words[0], "session_id="); ok {
		cmd.session, words = xapi.Ref(ref), words[1:]
	}
	if len(words) == 0 || words[0] == "" || strings.Contains(words[0], "=") {
		return cmd, usagef("Syntax error: the command name is missing")
	}
	cmd.name = words[0]
	var err error
	cmd.params, err = parseParams(words[1:])
	return cmd, err
}

func parseParams(words []string) (params, error) {
	var ps params
	for len(words) > 0 {
		w := words[0]
		words = words[1:]
		if flag, ok := strings.CutPrefix(w, "--"); ok {
			key, value, given := strings.Cut(flag, "=")
			if !given {
				value = "true"
			}
			ps = append(ps, param{key, value})
			continue
		}
		if strings.HasPrefix(w, "-") {
			key, ok := switches[w]
			if !ok {
				return ps, usagef("Syntax error: unknown switch %q", w)
			}
			if len(words) == 0 {
				return ps, usagef("Syntax error: switch %s needs a value", w)
			}
			ps = append(ps, param{key, words[0]})
			words = words[1:]
			continue
		}
		key, value, _ := strings.Cut(w, "=")
		ps = append(ps, param{key, value})
	}
	return ps, nil
}

// lookup finds the first value of key.
func (ps params) lookup(key string) (string, bool) {
	for _, p := range ps {
		if p.key == key {
			return p.value, true
		}
	}
	return "", false
}

// get is the value of key, or "".
func (ps params) get(key string) string {
	v, _ := ps.lookup(key)
	return v
}

// bool reads a flag; absent it is def.
func (ps params) bool(key string, def bool) (bool, error) {
	v, ok := ps.lookup(key)
	if !ok {
		return def, nil
	}
	return parseBool(key, v)
}

// flag is bool for what decides how a failure is shown: what cannot be read is false.
func (ps params) flag(key string) bool {
	b, err := ps.bool(key, false)
	return err == nil && b
}

func parseBool(key, v string) (bool, error) {
	switch strings.ToLower(v) {
	case "true", "t", "1":
		return true, nil
	case "false", "f", "0":
		return false, nil
	}
	return false, refusef("Failed to parse parameter '%s': it must be 'true' or 'false'", key)
}

// group gathers name:key=value into a map. The old form name-key=value is
// understood too where old is set.
func (ps params) group(name string, old bool) map[string]any {
	m := map[string]any{}
	for _, p := range ps {
		key, ok := strings.CutPrefix(p.key, name)
		if !ok || len(key) < 2 || key[0] != ':' && !(old && key[0] == '-') {
			continue
		}
		if _, have := m[key[1:]]; !have {
			m[key[1:]] = p.value
		}
	}
	return m
}

// without gives the parameters that are neither standard nor among keys.
func (ps params) without(keys ...string) params {
	var out params
next:
	for _, p := range ps {
		if standard[p.key] {
			continue
		}
		for _, k := range keys {
			if p.key == k {
				continue next
			}
		}
		out = append(out, p)
	}
	return out
}

// units are the suffixes of a size, all of them powers of 1024.
var units = map[string]int64{
	"": 1, "b": 1, "bytes": 1,
	"k": 1 << 10, "kb": 1 << 10, "kib": 1 << 10,
	"m": 1 << 20, "mb": 1 << 20, "mib": 1 << 20,
	"g": 1 << 30, "gb": 1 << 30, "gib": 1 << 30,
	"t": 1 << 40, "tb": 1 << 40, "tib": 1 << 40,
}

// parseSize reads a number of bytes with an optional suffix (KiB, MiB, GiB,
// TiB, or their first letter), as in 4GiB or "4 GiB".
func parseSize(field, s string) (int64, error) {
	bad := func() (int64, error) {
		return 0, refusef("Failed to parse field '%s': %q is not a number of bytes (a suffix KiB, MiB, GiB or TiB is understood)", field, s)
	}
	s = strings.TrimSpace(s)
	end := 0
	for end < len(s) && s[end] >= '0' && s[end] <= '9' {
		end++
	}
	unit, known := units[strings.ToLower(strings.TrimSpace(s[end:]))]
	if end == 0 || !known {
		return bad()
	}
	n, err := strconv.ParseInt(s[:end], 10, 64)
	if err != nil || n > math.MaxInt64/unit {
		return bad()
	}
	return n * unit, nil
}
