package xetest

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
)

const magic = "XenSource thin CLI protocol"

func getInt(b []byte) int { return int(int32(binary.LittleEndian.Uint32(b))) }

func putInt(b []byte, n int) []byte { return binary.LittleEndian.AppendUint32(b, uint32(int32(n))) }

// send sends one frame of ints.
func send(nc net.Conn, ints ...int) error {
	b := putInt(nil, 4*len(ints))
	for _, n := range ints {
		b = putInt(b, n)
	}
	_, err := nc.Write(b)
	return err
}

// message is one command of the server.
type message struct {
	tag   int
	texts []string
	code  int
}

// errMessage is a frame that a server may not send.
var errMessage = errors.New("unexpected message from server")

// readMessage reads one frame and takes it apart to its last byte.
func readMessage(r *bufio.Reader) (message, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return message{}, err
	}
	n := getInt(head[:])
	if n < 8 || n > 64<<20 {
		return message{}, fmt.Errorf("%w: %d bytes", errMessage, n)
	}
	p := make([]byte, n)
	if _, err := io.ReadFull(r, p); err != nil {
		return message{}, err
	}
	if getInt(p) != 9 {
		return message{}, fmt.Errorf("%w: group %d", errMessage, getInt(p))
	}
	m := message{tag: getInt(p[4:])}
	p = p[8:]
	var err error
	switch m.tag {
	case 0, 1, 15, 16, 17:
		p, err = m.takeText(p)
	case 12, 13:
		if p, err = m.takeText(p); err == nil {
			p, err = m.takeText(p)
		}
	case 14:
		p, err = m.takeError(p)
	case 4:
		if len(p) < 4 {
			return m, fmt.Errorf("%w: no exit code", errMessage)
		}
		m.code, p = getInt(p), p[4:]
	case 3:
	default:
		return m, fmt.Errorf("%w: command %d", errMessage, m.tag)
	}
	if err == nil && len(p) != 0 {
		err = fmt.Errorf("%w: %d bytes too many", errMessage, len(p))
	}
	return m, err
}

func (m *message) takeText(p []byte) ([]byte, error) {
	if len(p) < 4 || getInt(p) < 0 || len(p)-4 < getInt(p) {
		return nil, fmt.Errorf("%w: a text is cut short", errMessage)
	}
	n := getInt(p)
	m.texts = append(m.texts, string(p[4:4+n]))
	return p[4+n:], nil
}

func (m *message) takeError(p []byte) ([]byte, error) {
	p, err := m.takeText(p)
	if err != nil {
		return nil, err
	}
	if len(p) < 4 {
		return nil, fmt.Errorf("%w: no parameters", errMessage)
	}
	n := getInt(p)
	p = p[4:]
	for ; n > 0; n-- {
		if p, err = m.takeText(p); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// readHead reads a status line and headers; only Location is looked at.
func readHead(r *bufio.Reader) (status int, location string, err error) {
	line, err := r.ReadString('\n')
	if err != nil {
		return 0, "", err
	}
	words := strings.SplitN(line, " ", 3)
	if len(words) < 2 {
		return 0, "", fmt.Errorf("bad response: %q", line)
	}
	if status, err = strconv.Atoi(strings.TrimSpace(words[1])); err != nil {
		return 0, "", fmt.Errorf("bad response: %q", line)
	}
	for {
		h, err := r.ReadString('\n')
		if err != nil {
			return 0, "", err
		}
		if !strings.HasSuffix(h, "\r\n") {
			return 0, "", fmt.Errorf("a header does not end in CR LF: %q", h)
		}
		if h == "\r\n" {
			return status, location, nil
		}
		if k, v, ok := strings.Cut(strings.TrimSpace(h), ":"); ok && strings.EqualFold(k, "location") {
			location = strings.TrimSpace(v)
		}
	}
}
