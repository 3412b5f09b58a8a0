package patch

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strings"
)

const maxArmourHeaders = 32 // lines

// armourReader reads the bytes of one armoured block, which must be the whole
// rest of the data but for white space. It is strict where gpg is: the block
// has a beginning, an empty line, an end, and the right checksum if any.
type armourReader struct {
	r       *bufio.Reader
	kind    string // "PGP MESSAGE"
	line    []byte // base64 of the present line
	padded  bool   // the last base64 was padded: nothing may follow
	ended   bool
	want    []byte // the checksum as it stands there, or nil
	crc     uint32
	decoded io.Reader
}

// newArmour begins the block whose first line has been read already.
func newArmour(r *bufio.Reader, kind string) (*armourReader, error) {
	a := &armourReader{r: r, kind: kind, crc: crc24Init}
	a.decoded = base64.NewDecoder(base64.StdEncoding.Strict(), (*armourLines)(a))
	for range maxArmourHeaders {
		line, err := readLine(r)
		if err != nil {
			return nil, unexpected(err)
		}
		if len(line) == 0 {
			return a, nil
		}
		if !bytes.Contains(line, []byte(":")) {
			return nil, errors.New("armour: the empty line after the headers is missing")
		}
	}
	return nil, errors.New("armour: too many headers")
}

func (a *armourReader) Read(p []byte) (int, error) {
	n, err := a.decoded.Read(p)
	a.crc = crc24(a.crc, p[:n])
	if err != io.EOF {
		return n, err
	}
	if !a.ended {
		return n, fmt.Errorf("armour: the end is missing: %w", io.ErrUnexpectedEOF)
	}
	sum := []byte{byte(a.crc >> 16), byte(a.crc >> 8), byte(a.crc)}
	if a.want != nil && !bytes.Equal(a.want, sum) {
		return n, errors.New("armour: the checksum is wrong")
	}
	return n, io.EOF
}

// armourLines reads the base64 text of an armourReader, without line ends.
type armourLines armourReader

func (a *armourLines) Read(p []byte) (int, error) {
	for len(a.line) == 0 {
		if a.ended {
			return 0, io.EOF
		}
		if err := a.next(); err != nil {
			return 0, err
		}
	}
	n := copy(p, a.line)
	a.line = a.line[n:]
	return n, nil
}

func (a *armourLines) next() error {
	line, err := readLine(a.r)
	if err != nil {
		return unexpected(err)
	}
	switch {
	case len(line) == 0:
		return nil
	case line[0] == '=':
		return a.checksum(line)
	case line[0] == '-':
		return a.end(line)
	case a.padded:
		return errors.New("armour: data after its end")
	}
	if bytes.ContainsAny(line, " \t\r") {
		return errors.New("armour: a blank in a line")
	}
	a.padded = line[len(line)-1] == '='
	a.line = line
	return nil
}

func (a *armourLines) checksum(line []byte) error {
	want, err := base64.StdEncoding.DecodeString(string(line[1:]))
	if err != nil || len(want) != 3 {
		return errors.New("armour: not a checksum")
	}
	a.want = want
	if line, err = readLine(a.r); err != nil {
		return unexpected(err)
	}
	return a.end(line)
}

// end takes the last line of the block and makes sure that nothing follows.
func (a *armourLines) end(line []byte) error {
	if string(line) != "-----END "+a.kind+"-----" {
		return errors.New("armour: the end is missing")
	}
	for {
		c, err := a.r.ReadByte()
		if err == io.EOF {
			a.ended = true
			return nil
		}
		if err != nil {
			return err
		}
		if !strings.ContainsRune(" \t\r\n", rune(c)) {
			return errors.New("data after the end of the message")
		}
	}
}

// readLine reads one line and takes blanks and line ends off its end. The line
// is valid until the next read, and not longer than the reader's buffer. A last
// line without an end is one; io.EOF means that there is none.
func readLine(r *bufio.Reader) ([]byte, error) {
	line, err := r.ReadSlice('\n')
	if err == bufio.ErrBufferFull {
		return nil, errors.New("armour: a line is too long")
	}
	if err != nil && (err != io.EOF || len(line) == 0) {
		return nil, err
	}
	return bytes.TrimRight(line, " \t\r\n"), nil
}

const crc24Init = 0xb704ce

var crc24Table = func() (table [256]uint32) {
	for i := range table {
		c := uint32(i) << 16
		for range 8 {
			if c <<= 1; c&0x1000000 != 0 {
				c ^= 0x1864cfb
			}
		}
		table[i] = c & 0xffffff
	}
	return table
}()

// crc24 is the checksum of armour (RFC 9580, 6.1).
func crc24(crc uint32, p []byte) uint32 {
	for _, b := range p {
		crc = (crc<<8 ^ crc24Table[byte(crc>>16)^b]) & 0xffffff
	}
	return crc
}
