package thincli

import (
	"bytes"
	"errors"
	"reflect"
	"strings"
	"testing"
)

func TestParseCommandLine(t *testing.T) {
	cases := []struct {
		name, body string
		want       commandLine
	}{
		{"key=value", "sr-list\ntype=nfs", commandLine{name: "sr-list", params: params{{"type", "nfs"}}}},
		{"the value keeps further equals signs", "x\na=b=c", commandLine{name: "x", params: params{{"a", "b=c"}}}},
		{"a flag is true", "x\n--force", commandLine{name: "x", params: params{{"force", "true"}}}},
		{"a flag may have a value", "x\n--force=false", commandLine{name: "x", params: params{{"force", "false"}}}},
		{"a bare word is a key", "help\nsr-list", commandLine{name: "help", params: params{{"sr-list", ""}}}},
		{"a switch takes the next word", "x\n-u\nme", commandLine{name: "x", params: params{{"username", "me"}}}},
		{"carriage returns go", "x\r\na=b\r", commandLine{name: "x", params: params{{"a", "b"}}}},
		{"a session in front", "session_id=OpaqueRef:1\nx", commandLine{name: "x", session: "OpaqueRef:1"}},
		{"spaces and commas stay", "x\nname-label=a, b", commandLine{name: "x", params: params{{"name-label", "a, b"}}}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			got, err := parseCommandLine(c.body)
			if err != nil || !reflect.DeepEqual(got, c.want) {
				t.Errorf("got %+v, %v", got, err)
			}
		})
	}
	for _, body := range []string{"", "\n", "a=b", "x\n-z", "x\n-u", "session_id=1"} {
		var usage *usageError
		if _, err := parseCommandLine(body); !errors.As(err, &usage) {
			t.Errorf("%q: %v", body, err)
		}
	}
}

func TestOfAKeyGivenTwiceTheFirstCounts(t *testing.T) {
	ps := params{{"a", "1"}, {"a", "2"}, {"m:k", "1"}, {"m:k", "2"}}
	if got := ps.get("a"); got != "1" {
		t.Errorf("got %q", got)
	}
	if got := ps.group("m", false); got["k"] != "1" {
		t.Errorf("got %v", got)
	}
}

func TestGroup(t *testing.T) {
	ps := params{{"device-config:a", "1"}, {"device-config-b", "2"}, {"device-config:", "3"}, {"device-configs", "4"}, {"other", "5"}}
	if got := ps.group("device-config", true); !reflect.DeepEqual(got, map[string]any{"a": "1", "b": "2"}) {
		t.Errorf("old and new: %v", got)
	}
	if got := ps.group("device-config", false); !reflect.DeepEqual(got, map[string]any{"a": "1"}) {
		t.Errorf("new: %v", got)
	}
}

func TestParseSize(t *testing.T) {
	good := map[string]int64{
		"0": 0, "42": 42, "42B": 42, "1k": 1024, "1KiB": 1024, "3MiB": 3 << 20, "2gib": 2 << 30, "1 TiB": 1 << 40,
		" 5 ": 5, "8388607TiB": 8388607 << 40, "9223372036854775807": 1<<63 - 1,
	}
	for s, want := range good {
		if got, err := parseSize("f", s); err != nil || got != want {
			t.Errorf("%q: %d, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "x", "-1", "1.5GiB", "KiB", "1PiB", "9223372036854775808", "8388608TiB", "1 2", "0x10"} {
		if got, err := parseSize("f", s); err == nil {
			t.Errorf("%q was read as %d", s, got)
		}
	}
}

func TestPasswordsAreNotLogged(t *testing.T) {
	line := params{{"username", "root"}, {"password", "p1"}, {"new", "p2"}, {"old", "p3"},
		{"device-config:chapPassword", "p4"}, {"device-config:secret_key", "p5"}}.censored()
	for _, p := range []string{"p1", "p2", "p3", "p4", "p5"} {
		if strings.Contains(line, p) {
			t.Errorf("%s stands in %q", p, line)
		}
	}
	if !strings.Contains(line, "username=root") {
		t.Errorf("got %q", line)
	}
}

func TestLayoutOfOddRecords(t *testing.T) {
	if got := layout(nil); got != "\n" {
		t.Errorf("no field: %q", got)
	}
	if got := layout([]cell{{"a", "1\n2"}}); got != "a    : 1\n2\n" {
		t.Errorf("two lines: %q", got)
	}
}

func TestValues(t *testing.T) {
	for _, c := range []struct {
		v    any
		want string
	}{{nil, ""}, {"x", "x"}, {true, "true"}, {0.5, "0.500"}, {int64(7), "7"}} {
		if got := toText(c.v); got != c.want {
			t.Errorf("%v: %q", c.v, got)
		}
	}
	for _, s := range []string{"OpaqueRef:1", "<value>OpaqueRef:1</value>", "<value><string>OpaqueRef:1</string></value>\n"} {
		if got := resultRef(s); got != "OpaqueRef:1" {
			t.Errorf("%q: %q", s, got)
		}
	}
	if toList("x") != nil || toMap("x") != nil || toRecord(nil) != nil {
		t.Error("a value of the wrong shape was not empty")
	}
}

// Names of commands and of fields are unique, and every default names a field.
func TestTablesAreConsistent(t *testing.T) {
	for _, c := range classes() {
		seen := map[string]bool{}
		for _, f := range c.fields {
			if seen[f.name] {
				t.Errorf("%s: %s stands twice", c.cli, f.name)
			}
			seen[f.name] = true
			readers := 0
			for _, has := range []bool{f.text != nil, f.set != nil, f.pairs != nil} {
				if has {
					readers++
				}
			}
			if readers != 1 {
				t.Errorf("%s: %s is read in %d ways", c.cli, f.name, readers)
			}
		}
		for _, d := range c.defaults {
			if !seen[d] {
				t.Errorf("%s: the default %s is no field", c.cli, d)
			}
		}
	}
	for name, cmd := range commandTable() {
		if cmd.help == "" || cmd.do == nil || name != cmd.name {
			t.Errorf("%s is not complete", name)
		}
	}
}

func FuzzAnswer(f *testing.F) {
	f.Add([]byte("\x08\x00\x00\x00\x0a\x00\x00\x00\x05\x00\x00\x00"))
	f.Add([]byte("\x0c\x00\x00\x00\x0b\x00\x00\x00\x07\x00\x00\x00\x10\x00\x00\x00"))
	f.Add([]byte("\xff\xff\xff\xff"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := readAnswer(bytes.NewReader(b))
		if err != nil {
			return
		}
		// What was understood is written back as the same bytes.
		group, rest := tagResponse, []int(nil)
		switch a.tag {
		case tagOK, tagFailed, tagWait:
		case tagEnd:
			group = tagBlob
		case tagChunk:
			group, rest = tagBlob, []int{int(a.length)}
			if a.length < 0 {
				t.Fatalf("a chunk of %d bytes", a.length)
			}
		default:
			t.Fatalf("tag %d", a.tag)
		}
		g := &frame{b: make([]byte, 4)}
		g.int(group).int(a.tag)
		for _, n := range rest {
			g.int(n)
		}
		if w := g.bytes(); !bytes.HasPrefix(b, w) {
			t.Fatalf("%x was read as %x", b, w)
		}
	})
}

func FuzzCommandLine(f *testing.F) {
	f.Add("patch-upload\nfile-name=fix\nusername=root\npassword=x")
	f.Add("sr-create\ndevice-config:location=/a\n--minimal\n-u\nroot")
	f.Add("session_id=OpaqueRef:1\nhelp\n--all")
	f.Add("x\n-")
	f.Add("x\nphysical-size=9223372036854775807TiB")
	f.Fuzz(func(t *testing.T, body string) {
		line, err := parseCommandLine(body)
		if err != nil {
			return
		}
		if line.name == "" || strings.Contains(line.name, "=") {
			t.Fatalf("a command named %q", line.name)
		}
		for _, p := range line.params {
			if n, err := parseSize(p.key, p.value); err == nil && n < 0 {
				t.Fatalf("%q is %d bytes", p.value, n)
			}
			for _, c := range classes() {
				if f, sub, err := c.target(p.key); err == nil && f.name != p.key && !strings.HasSuffix(p.key, sub) {
					t.Fatalf("%q is %s of %s", p.key, sub, f.name)
				}
			}
		}
		line.params.group("device-config", true)
		line.params.without("uuid")
		line.params.censored()
	})
}
