package patch

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
)

// CleartextBegin is how a clear-signed message begins. It is read into memory
// as a whole, all others as a stream.
const CleartextBegin = "-----BEGIN PGP SIGNED MESSAGE-----"

const (
	messageBegin   = "-----BEGIN PGP MESSAGE-----"
	signatureBegin = "-----BEGIN PGP SIGNATURE-----"
	messageKind    = "PGP MESSAGE"
	signatureKind  = "PGP SIGNATURE"
)

// blanks are what a cleartext signature does not cover at the end of a line.
const blanks = " \t\r"

// readCleartext takes a cleartext signed message apart, all of it in memory.
// The payload is every line without its trailing blanks, ended by one line
// feed. limit is the most bytes the text may have.
func readCleartext(r *bufio.Reader, limit int64) (payload, packets []byte, err error) {
	line, err := readLine(r)
	if err != nil {
		return nil, nil, unexpected(err)
	}
	if string(line) != CleartextBegin {
		return nil, nil, errors.New("not a cleartext signed message")
	}
	if err := readHashHeaders(r); err != nil {
		return nil, nil, err
	}
	if payload, err = readText(r, limit); err != nil {
		return nil, nil, err
	}
	a, err := newArmour(r, signatureKind)
	if err != nil {
		return nil, nil, err
	}
	if packets, err = readAtMost(a, maxSignatures*maxSignatureSize); err != nil {
		return nil, nil, fmt.Errorf("signature: %w", err)
	}
	return payload, packets, onlySignatures(packets)
}

// readHashHeaders reads the headers of the text, of which only Hash may be
// there. What it says is not signed and not used.
func readHashHeaders(r *bufio.Reader) error {
	for range maxArmourHeaders {
		line, err := readLine(r)
		if err != nil {
			return unexpected(err)
		}
		if len(line) == 0 {
			return nil
		}
		if !bytes.HasPrefix(line, []byte("Hash: ")) {
			return fmt.Errorf("a header other than Hash in the signed text: %.32q", line)
		}
	}
	return errors.New("too many headers in the signed text")
}

// readText reads the lines up to the beginning of the signature.
func readText(r *bufio.Reader, limit int64) ([]byte, error) {
	var payload []byte // grows by a quarter at a time: it may be large
	for {
		line, err := readLongLine(r, &limit)
		if err != nil {
			return nil, err
		}
		if line[0] == '-' {
			if string(bytes.TrimRight(line, blanks+"\n")) == signatureBegin {
				return payload, nil
			}
			if !bytes.HasPrefix(line, []byte("- ")) {
				return nil, errors.New("a line of the signed text begins with a dash that is not escaped")
			}
			line = line[2:]
		}
		payload = append(payload, bytes.TrimRight(line, blanks+"\n")...)
		payload = append(payload, '\n')
	}
}

// readLongLine reads one line of any length with its line feed and takes it off
// the limit.
func readLongLine(r *bufio.Reader, limit *int64) ([]byte, error) {
	var long []byte
	for {
		part, err := r.ReadSlice('\n')
		if *limit -= int64(len(part)); *limit < 0 {
			return nil, errors.New("the signed text is too long for cleartext: sign it with `gpg --sign` instead of `--clearsign`")
		}
		if err == nil && long == nil {
			return part, nil
		}
		long = append(long, part...)
		if err == nil {
			return long, nil
		}
		if err != bufio.ErrBufferFull {
			return nil, unexpected(err)
		}
	}
}

// onlySignatures makes sure that packets is a row of signatures and no more.
func onlySignatures(packets []byte) error {
	r := bufio.NewReader(bytes.NewReader(packets))
	for n := 0; ; n++ {
		h, err := readPacketHeader(r)
		if err == io.EOF && n > 0 {
			return nil
		}
		if err != nil {
			return unexpected(err)
		}
		if h.tag != tagSignature || n == maxSignatures {
			return errors.New("something other than signatures where the signature should be")
		}
		if err := h.bounded(maxSignatureSize); err != nil {
			return err
		}
		if _, err := r.Discard(int(h.length)); err != nil {
			return unexpected(err)
		}
	}
}

// signedText reads the payload of a cleartext message as what was signed: all
// but the last line feed. It refuses blanks at the end of a line, which no
// stored payload has and the signature would not notice.
type signedText struct {
	r    io.Reader
	last byte // held back: the last byte read
	held bool
}

func (s *signedText) Read(p []byte) (int, error) {
	if len(p) < 2 {
		return 0, io.ErrShortBuffer
	}
	at := 0
	if s.held {
		p[0], at = s.last, 1
	}
	n, err := s.r.Read(p[at:])
	n += at
	if n > 0 {
		if err := noBlanks(p[:n]); err != nil {
			return 0, err
		}
		s.last, s.held = p[n-1], true
		n--
	}
	if err == io.EOF && s.held && s.last != '\n' {
		err = errors.New("the last line of the stored text is not ended")
	}
	return n, err
}

func noBlanks(p []byte) error {
	for i := 1; i < len(p); i++ {
		if p[i] == '\n' && strings.IndexByte(blanks, p[i-1]) >= 0 {
			return errors.New("blanks at the end of a line of the stored text")
		}
	}
	return nil
}
