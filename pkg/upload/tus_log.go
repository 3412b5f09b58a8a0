package upload

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/fault"
)

// An upload log says how the bytes that were received come to stand again after
// a restart: those that are not payload lie in it, those that are lie in the
// image, and the last of them, which may not have got there yet, in a ring at the
// beginning of the file. After the ring it is a row of batches, each with its length and CRC-32, so that one
// that was half written is none; a batch is a row of entries, each a number
// (kind in the lowest three bits) and, where the kind has them, bytes.
const (
	entryBytes   = iota // that many bytes were received: here they are
	entryPayload        // that many bytes were received: they are the next of the payload
	entryFlushed        // that many bytes of the payload, from its beginning, are in the image
	entrySynced         // all that is said before is on the disk
	entryBoot           // the boot of the system in which what follows was written; its id has that many bytes
)

const (
	batchHeader = 8
	maxBatch    = 4 * mib
	// maxRun is how long an entry of bytes gets in memory.
	maxRun = 64 << 10
	// ringSize is how many bytes of payload the ring holds: more than is on the
	// way between a request and the image.
	ringSize = 4 * mib
	// maxUploadLog is how large a log may grow, without the ring. An upload that needs more
	// begins again after a restart.
	maxUploadLog = 64 * mib
)

var (
	errLogFull = errors.New("the log of the upload has grown too long")
	errLogRoom = errors.New("the state directory has no room for the log of the upload")
)

// roomForLog is how much a log grows between two looks at the room for it.
const roomForLog = mib

// uploadLog writes one log. One goroutine uses it.
type uploadLog struct {
	f    *os.File
	end  int64 // bytes written, after the ring
	pend []byte
	run  []byte // received, not payload, not in pend yet
	pay  int64  // received, payload, not in pend yet
	at   int64  // of the payload: bytes received
	err  error  // the log is of no use any more
	room func() int64
}

func (l *uploadLog) entry(kind int, n int64) {
	l.pend = binary.AppendUvarint(l.pend, uint64(n)<<3|uint64(kind))
}

// bytes notes bytes that are not payload.
func (l *uploadLog) bytes(p []byte) {
	if l.pay > 0 {
		l.close()
	}
	l.run = append(l.run, p...)
	if len(l.run) >= maxRun {
		l.close()
	}
}

// payload notes n bytes of payload that are in the image or in the ring.
func (l *uploadLog) payload(n int64) {
	if len(l.run) > 0 {
		l.close()
	}
	l.pay += n
	l.at += n
}

// keep notes bytes of payload and puts them into the ring.
func (l *uploadLog) keep(p []byte) {
	for at := l.at; len(p) > 0 && l.err == nil; {
		n := min(int64(len(p)), ringSize-at%ringSize)
		if _, err := l.f.WriteAt(p[:n], at%ringSize); err != nil {
			l.spoil(fmt.Errorf("write the log of the upload: %w", err))
			return
		}
		l.payload(n)
		at, p = at+n, p[n:]
	}
}

// ringReader reads bytes of payload from the ring of a log, from one on.
type ringReader struct {
	f  io.ReaderAt
	at int64
}

func (r *ringReader) Read(p []byte) (int, error) {
	n, err := r.f.ReadAt(p[:min(int64(len(p)), ringSize-r.at%ringSize)], r.at%ringSize)
	r.at += int64(n)
	return n, err
}

// close puts what was noted last into an entry.
func (l *uploadLog) close() {
	if len(l.run) > 0 {
		l.entry(entryBytes, int64(len(l.run)))
		l.pend = append(l.pend, l.run...)
		l.run = l.run[:0]
	}
	if l.pay > 0 {
		l.entry(entryPayload, l.pay)
		l.pay = 0
	}
}

func (l *uploadLog) boot(id string) {
	l.entry(entryBoot, int64(len(id)))
	l.pend = append(l.pend, id...)
}

// write hands everything noted to the kernel, and that flushed bytes of the
// payload are in the image: a death of this process loses none of it.
func (l *uploadLog) write(flushed int64) error {
	l.close()
	l.entry(entryFlushed, flushed)
	return l.batch()
}

// sync is to be called after the image is synced: not even a death of the
// system loses what was noted before.
func (l *uploadLog) sync(flushed int64) error {
	l.close()
	l.entry(entryFlushed, flushed)
	l.entry(entrySynced, 0)
	if err := l.batch(); err != nil {
		return err
	}
	if err := unix.Fdatasync(int(l.f.Fd())); err != nil {
		l.err = fmt.Errorf("sync the log of the upload: %w", err)
	}
	return l.err
}

func (l *uploadLog) batch() error {
	if l.err != nil {
		l.pend = l.pend[:0]
		return l.err
	}
	if l.end+batchHeader+int64(len(l.pend)) > maxUploadLog {
		l.spoil(errLogFull)
		return l.err
	}
	if next := l.end + batchHeader + int64(len(l.pend)); l.room != nil && next/roomForLog > l.end/roomForLog && l.room() < 2*roomForLog {
		l.spoil(errLogRoom)
		return l.err
	}
	b := make([]byte, batchHeader, batchHeader+len(l.pend))
	binary.LittleEndian.PutUint32(b, uint32(len(l.pend)))
	binary.LittleEndian.PutUint32(b[4:], crc32.ChecksumIEEE(l.pend))
	b = append(b, l.pend...)
	l.pend = l.pend[:0]
	if err := fault.Point("upload.log"); err != nil {
		l.spoil(err)
		return l.err
	}
	if _, err := l.f.WriteAt(b, ringSize+l.end); err != nil {
		l.spoil(fmt.Errorf("write the log of the upload: %w", err))
		return l.err
	}
	l.end += int64(len(b))
	if err := fault.Point("upload.log.done"); err != nil {
		l.spoil(err)
	}
	return l.err
}

// spoil gives the log up: an upload that goes on without one begins again
// after a restart.
func (l *uploadLog) spoil(err error) {
	l.err = errors.Join(err, l.f.Truncate(0))
	l.end, l.pend, l.run, l.pay = 0, nil, nil, 0
}

type entry struct {
	kind int
	n    int64
	data []byte // of entryBytes and entryBoot, until the next entry is read
}

// logReader reads the entries of a log one after another, as far as the
// batches hold.
type logReader struct {
	r     *bufio.Reader
	batch *bytes.Reader
	buf   []byte
}

func newLogReader(f io.ReaderAt) *logReader {
	return &logReader{r: bufio.NewReaderSize(io.NewSectionReader(f, ringSize, maxUploadLog), 64<<10), batch: bytes.NewReader(nil)}
}

// next gives the next entry; io.EOF when no more can be trusted.
func (l *logReader) next() (entry, error) {
	if l.batch.Len() == 0 {
		if err := l.load(); err != nil {
			return entry{}, err
		}
	}
	word, err := binary.ReadUvarint(l.batch)
	if err != nil || word>>3 > 1<<60 {
		return entry{}, io.EOF
	}
	e := entry{kind: int(word & 7), n: int64(word >> 3)}
	if e.kind == entryBytes || e.kind == entryBoot {
		if e.n > int64(l.batch.Len()) {
			return entry{}, io.EOF
		}
		from := l.batch.Size() - int64(l.batch.Len())
		e.data = l.buf[from : from+e.n]
		if _, err := l.batch.Seek(e.n, io.SeekCurrent); err != nil {
			return entry{}, err
		}
	}
	return e, nil
}

// load reads the next batch.
func (l *logReader) load() error {
	var h [batchHeader]byte
	if _, err := io.ReadFull(l.r, h[:]); err != nil {
		return logEnd(err)
	}
	n := binary.LittleEndian.Uint32(h[:])
	if n == 0 || n > maxBatch {
		return io.EOF
	}
	l.buf = append(l.buf[:0], make([]byte, n)...)
	if _, err := io.ReadFull(l.r, l.buf); err != nil {
		return logEnd(err)
	}
	if crc32.ChecksumIEEE(l.buf) != binary.LittleEndian.Uint32(h[4:]) {
		return io.EOF
	}
	l.batch.Reset(l.buf)
	return nil
}

func logEnd(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return io.EOF
	}
	return err
}
