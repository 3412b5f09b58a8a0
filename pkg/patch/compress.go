package patch

import (
	"bufio"
	"compress/bzip2"
	"compress/flate"
	"compress/zlib"
	"errors"
	"fmt"
	"io"
)

// decompressor reads what is in one compressed packet, which must be the whole
// message: its stream must end where the packet ends, and the packet where the
// data ends.
type decompressor struct {
	outer  *bufio.Reader
	packet *bufio.Reader
	stream io.Reader
	left   int64 // bytes that may still come out
	done   bool
}

// newDecompressor begins the compressed packet that r is at. At most limit
// bytes come out of it.
func newDecompressor(r *bufio.Reader, limit int64) (*decompressor, error) {
	h, err := readPacketHeader(r)
	if err != nil {
		return nil, unexpected(err)
	}
	d := &decompressor{outer: r, packet: bufio.NewReader(&packetBody{r, h}), left: limit}
	algorithm, err := d.packet.ReadByte()
	if err != nil {
		return nil, unexpected(err)
	}
	switch algorithm {
	case 0:
		d.stream = d.packet
	case 1:
		d.stream = flate.NewReader(d.packet)
	case 2:
		if d.stream, err = zlib.NewReader(d.packet); err != nil {
			return nil, unexpected(err)
		}
	case 3:
		d.stream = bzip2.NewReader(d.packet)
	default:
		return nil, fmt.Errorf("unknown compression algorithm %d", algorithm)
	}
	return d, nil
}

func (d *decompressor) Read(p []byte) (int, error) {
	if d.done {
		return 0, io.EOF
	}
	n, err := d.stream.Read(p)
	if d.left -= int64(n); d.left < 0 {
		return 0, errors.New("the message grows beyond the limit when it is decompressed: sign it uncompressed (gpg -z 0)")
	}
	if err == io.EOF {
		if err := d.atEnd(); err != nil {
			return n, err
		}
		d.done = true
	}
	return n, err
}

// atEnd makes sure that nothing follows, in the packet or after it.
func (d *decompressor) atEnd() error {
	for _, r := range []*bufio.Reader{d.packet, d.outer} {
		_, err := r.ReadByte()
		if err == nil {
			return errors.New("data after the end of the message")
		}
		if err != io.EOF {
			return err
		}
	}
	return nil
}
