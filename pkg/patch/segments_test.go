package patch

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/ProtonMail/go-crypto/openpgp/packet"
)

// split takes a file apart into payload and framing, and checks that together
// they are the file.
func split(t testing.TB, file []byte, r io.Reader) (payload []byte, segments int, err error) {
	t.Helper()
	s := NewSegments(r)
	var all []byte
	for {
		isPayload, err := s.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, segments, err
		}
		b, err := io.ReadAll(s)
		if err != nil {
			return nil, segments, err
		}
		segments++
		all = append(all, b...)
		if isPayload {
			payload = append(payload, b...)
		}
	}
	if !bytes.Equal(all, file) {
		t.Fatalf("the segments are %d bytes, the file %d, and they differ", len(all), len(file))
	}
	return payload, segments, nil
}

func TestSegmentsTellPayloadFromFraming(t *testing.T) {
	small := []byte(sample)
	large := bytes.Repeat([]byte("0123456789abcdef"), 20<<10)
	path := writeFile(t, t.TempDir()+"/a-name", large)
	for _, c := range []struct {
		name    string
		file    []byte
		payload []byte
		least   int // segments
	}{
		{"a small one of gpg", gpg_(t, small, "-u", keyA, "-z", "0", "--sign"), small, 3},
		{"in parts of 8 KiB", gpg_(t, large, "-u", keyA, "-z", "0", "--sign"), large, 80},
		{"of a file with a name", gpg_(t, nil, "-u", keyA, "-z", "0", "-o", "-", "--sign", path), large, 3},
		{"two signatures", gpg_(t, small, "-u", keyA, "-u", keyB, "-z", "0", "--sign"), small, 3},
		{"nothing inside", gpg_(t, nil, "-u", keyA, "-z", "0", "--sign"), nil, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, r := range []io.Reader{bytes.NewReader(c.file), iotest.OneByteReader(bytes.NewReader(c.file))} {
				got, n, err := split(t, c.file, r)
				if err != nil || !bytes.Equal(got, c.payload) || n < c.least {
					t.Fatalf("%d bytes in %d segments, %v", len(got), n, err)
				}
			}
			o := outline(t, c.file)
			if want, m, err := readMessage(c.file, ringOf(t, keyA, keyB), Options{}); err != nil || !o.Segmented ||
				o.Digest != m.Digest() || o.PayloadSize != int64(len(want)) {
				t.Errorf("%+v, %v", o, err)
			}
			if _, _, err := split(t, nil, bytes.NewReader(c.file[:len(c.file)-1])); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("cut short: %v", err)
			}
		})
	}
}

func outline(t testing.TB, file []byte) Outline {
	t.Helper()
	o, err := ReadOutline(context.Background(), bytes.NewReader(file))
	if err != nil {
		t.Fatal(err)
	}
	if o.Size != int64(len(file)) || o.Sum != sha256.Sum256(file) {
		t.Errorf("%d bytes, sum %x", o.Size, o.Sum)
	}
	return o
}

// The digest is told of every kind of file that a pool may accept, and is the
// one that the pool records.
func TestOutlineOfFilesWithoutSegments(t *testing.T) {
	text := []byte("#!/bin/sh\necho '" + goodInfo + "'\n")
	for _, c := range []struct {
		name string
		file []byte
	}{
		{"armoured", gpg_(t, text, "-u", keyA, "-z", "0", "--armor", "--sign")},
		{"compressed", gpg_(t, text, "-u", keyA, "-z", "6", "--sign")},
		{"clear-signed", gpg_(t, text, "-u", keyA, "--clearsign")},
		{"unsigned", text},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, _, err := split(t, nil, bytes.NewReader(c.file)); !errors.Is(err, ErrNoSegments) {
				t.Errorf("%v", err)
			}
			o := outline(t, c.file)
			_, m, err := readMessage(c.file, ringOf(t, keyA), Options{Pinned: []string{sum(text)}})
			if err != nil || o.Segmented || o.Digest != m.Digest() || o.PayloadSize != m.Size() {
				t.Errorf("%+v, %v", o, err)
			}
			if (o.Info == nil) != (c.name == "unsigned") {
				t.Errorf("info %v", o.Info)
			}
		})
	}
	for name, file := range map[string]string{"nothing": "", "a broken armour": messageBegin + "\nxx", "a key": string(export(t, keyA)), "an old signature alone": "\x88\x01x"} {
		t.Run(name, func(t *testing.T) {
			if o := outline(t, []byte(file)); o.Segmented || o.Digest != "" {
				t.Errorf("%+v", o)
			}
		})
	}
}

func TestOutlineFindsTheInfo(t *testing.T) {
	want, err := ParseInfo([]byte(goodInfo))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		text  string
		found bool
	}{
		"in quotes":            {"#!/bin/sh\necho '" + goodInfo + "'\n\x00\xff", true},
		"the second one":       {"<info>what</info> <info uuid='1'/> <information/>" + goodInfo, true},
		"with children":        {strings.Replace(goodInfo, "/>", "><a><b/></a></info>", 1) + "<", true},
		"none":                 {"#!/bin/sh\n", false},
		"never ends":           {strings.TrimSuffix(goodInfo, "/>"), false},
		"far behind the start": {strings.Repeat("x", infoWithin) + goodInfo, false},
	} {
		o := outline(t, gpg_(t, []byte(c.text), "-u", keyA, "-z", "0", "--sign"))
		if (o.Info != nil) != c.found || c.found && (o.Info.UUID != want.UUID || o.Info.NameLabel != want.NameLabel) {
			t.Errorf("%s: %+v", name, o.Info)
		}
	}
}

func TestOutlineGivesTheErrorsOfItsReader(t *testing.T) {
	r, _ := zeroMessage(t, 3<<20, packet.CompressionNone)
	file, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if o := outline(t, file); o.PayloadSize != 3<<20 {
		t.Errorf("%+v", o)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := ReadOutline(ctx, bytes.NewReader(file)); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	broken := errors.New("broken")
	for _, n := range []int{0, len(file) / 2} {
		seeker := struct {
			io.Reader
			io.Seeker
		}{io.MultiReader(bytes.NewReader(file[:n]), iotest.ErrReader(broken)), bytes.NewReader(file)}
		if _, err := ReadOutline(context.Background(), seeker); !errors.Is(err, broken) {
			t.Errorf("broken after %d bytes: %v", n, err)
		}
	}
}

// FuzzSegments takes files apart: what comes out is the file, and where an
// upload would be accepted it is the payload.
func FuzzSegments(f *testing.F) {
	keys := fuzzKeys(f)
	f.Fuzz(func(t *testing.T, file []byte) {
		payload, _, err := split(t, file, bytes.NewReader(file))
		if _, oerr := ReadOutline(context.Background(), bytes.NewReader(file)); oerr != nil {
			t.Fatal(oerr)
		}
		got, m, merr := readMessage(file, keys, Options{Limits: Limits{Cleartext: 1 << 20, Decompressed: 1 << 20}})
		if merr != nil || errors.Is(err, ErrNoSegments) {
			return
		}
		if err != nil || !bytes.Equal(payload, got) {
			t.Fatalf("%d bytes, %v, of %d", len(payload), err, m.Size())
		}
	})
}
