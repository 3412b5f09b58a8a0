package thincli

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// The magic string that opens both directions, and the version spoken here.
const (
	magic        = "XenSource thin CLI protocol"
	majorVersion = 0
	minorVersion = 2
)

// heartbeatMinor is the first minor version whose clients send Wait while a
// transfer runs.
const heartbeatMinor = 2

// The tags of the protocol. A payload begins with one of the three groups.
const (
	tagCommand  = 9
	tagResponse = 10
	tagBlob     = 11

	tagPrint       = 0
	tagLoad        = 1
	tagExit        = 4
	tagOK          = 5
	tagFailed      = 6
	tagChunk       = 7
	tagEnd         = 8
	tagHTTPGet     = 12
	tagHTTPPut     = 13
	tagError       = 14
	tagPrintStderr = 16
	tagWait        = 18
)

// maxClientFrame bounds the payload of a frame from the client, in bytes. The
// longest it may send is a blob header: three ints.
const maxClientFrame = 12

// errProtocol is what a client gets its connection closed for.
var errProtocol = errors.New("not the thin CLI protocol")

// answer is one message from the client: a response or a blob header.
type answer struct {
	tag    int   // tagOK, tagFailed, tagWait, tagChunk or tagEnd
	length int64 // of a chunk: how many raw bytes follow
	data   []byte
}

// decodeAnswer reads the payload of one frame from the client. It fails on
// anything that a client may not send, trailing bytes included.
func decodeAnswer(p []byte) (answer, error) {
	if len(p) < 8 || len(p)%4 != 0 || len(p) > maxClientFrame {
		return answer{}, fmt.Errorf("%w: a payload of %d bytes", errProtocol, len(p))
	}
	group, tag := binary.LittleEndian.Uint32(p), binary.LittleEndian.Uint32(p[4:])
	rest := p[8:]
	switch {
	case group == tagResponse && (tag == tagOK || tag == tagFailed || tag == tagWait) && len(rest) == 0:
		return answer{tag: int(tag)}, nil
	case group == tagBlob && tag == tagEnd && len(rest) == 0:
		return answer{tag: tagEnd}, nil
	case group == tagBlob && tag == tagChunk && len(rest) == 4:
		n := int32(binary.LittleEndian.Uint32(rest))
		if n < 0 {
			return answer{}, fmt.Errorf("%w: a chunk of %d bytes", errProtocol, n)
		}
		return answer{tag: tagChunk, length: int64(n)}, nil
	}
	return answer{}, fmt.Errorf("%w: message %d/%d with %d more bytes", errProtocol, group, tag, len(rest))
}

// readAnswer reads one frame from the client.
func readAnswer(r io.Reader) (answer, error) {
	var buf [4 + maxClientFrame]byte
	if _, err := io.ReadFull(r, buf[:4]); err != nil {
		return answer{}, err
	}
	n := binary.LittleEndian.Uint32(buf[:4])
	if n > maxClientFrame {
		return answer{}, fmt.Errorf("%w: a frame of %d bytes", errProtocol, n)
	}
	p := buf[4 : 4+n]
	if _, err := io.ReadFull(r, p); err != nil {
		return answer{}, fmt.Errorf("frame cut short: %w", err)
	}
	return decodeAnswer(p)
}

// frame builds one server-to-client frame: a command tag, then ints and
// strings as the protocol lays them out.
type frame struct{ b []byte }

func newFrame(tag int) *frame {
	f := &frame{b: make([]byte, 4, 64)} // the length comes last
	return f.int(tagCommand).int(tag)
}

func (f *frame) int(n int) *frame {
	f.b = binary.LittleEndian.AppendUint32(f.b, uint32(int32(n)))
	return f
}

func (f *frame) string(s string) *frame {
	f.int(len(s))
	f.b = append(f.b, s...)
	return f
}

func (f *frame) strings(list []string) *frame {
	f.int(len(list))
	for _, s := range list {
		f.string(s)
	}
	return f
}

// bytes is the whole frame, length first.
func (f *frame) bytes() []byte {
	binary.LittleEndian.PutUint32(f.b, uint32(len(f.b)-4))
	return f.b
}

// hello is the opening of either side.
func hello(major, minor int) []byte {
	b := []byte(magic)
	b = binary.LittleEndian.AppendUint32(b, uint32(int32(major)))
	return binary.LittleEndian.AppendUint32(b, uint32(int32(minor)))
}

// readHello reads the other side's opening.
func readHello(r io.Reader) (major, minor int, err error) {
	var b [len(magic) + 8]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return 0, 0, fmt.Errorf("read the client's version: %w", err)
	}
	if string(b[:len(magic)]) != magic {
		return 0, 0, fmt.Errorf("%w: the client opened with %q", errProtocol, b[:len(magic)])
	}
	v := b[len(magic):]
	return int(int32(binary.LittleEndian.Uint32(v))), int(int32(binary.LittleEndian.Uint32(v[4:]))), nil
}
