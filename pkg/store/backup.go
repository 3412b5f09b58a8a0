package store

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/patchd/patchd/pkg/xapi"
)

// A backup is lines of JSON: a header, one line for each record in the order
// the records were made, and a footer with their number and the SHA-256 of all
// lines before it.
const (
	backupFormat = "patchd-store"
	backupLine   = 4 << 20 // bytes of the longest line that is read
	restoreBatch = 100     // records in one transaction
)

type backupHeader struct {
	Format   string `json:"format"`
	Schema   int    `json:"schema"`
	Store    string `json:"store"`
	Revision int64  `json:"revision"`
}

type backupRecord struct {
	Class   string          `json:"class"`
	Ref     xapi.Ref        `json:"ref"`
	Created int64           `json:"created"`
	Value   json.RawMessage `json:"value"`
}

type backupFooter struct {
	Records int    `json:"records"`
	SHA256  string `json:"sha256"`
}

// Backup writes all records, as of one revision, to w. Leases, elections and
// touches are not part of it.
func (s *Store) Backup(ctx context.Context, w io.Writer) error {
	if err := s.Sync(ctx); err != nil {
		return err
	}
	v := s.state.Load().view
	sum := sha256.New()
	out := bufio.NewWriter(io.MultiWriter(w, sum))
	enc := json.NewEncoder(out)
	enc.SetEscapeHTML(false)
	err := enc.Encode(backupHeader{backupFormat, Schema, v.store, v.rev})
	items := v.everything()
	for n := 0; n < len(items) && err == nil; n++ {
		if err = context.Cause(ctx); err == nil {
			it := items[n]
			err = enc.Encode(backupRecord{it.Class, it.Ref, it.Created, it.Raw})
		}
	}
	if err = errors.Join(err, out.Flush()); err == nil {
		err = json.NewEncoder(w).Encode(backupFooter{len(items), hex.EncodeToString(sum.Sum(nil))})
	}
	if err != nil {
		return fmt.Errorf("back up the store: %w", err)
	}
	return nil
}

// everything is all records in the order they were made.
func (v *View) everything() []Item {
	items := make([]Item, 0, v.ordered.Len())
	v.ordered.Ascend(func(e *entry) bool {
		items = append(items, e.item())
		return true
	})
	slices.SortStableFunc(items, func(a, b Item) int { return cmp.Compare(a.Created, b.Created) })
	return items
}

// Restore fills the empty data of o from a backup. The restored store has a new
// identity, so that event tokens of the old one are not taken for its own. Data
// that is there is refused; a restore that did not finish leaves data that Open
// refuses and the next Restore clears.
func Restore(ctx context.Context, o Options, r io.Reader) (err error) {
	s, err := connect(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	if err := s.answers(ctx); err != nil {
		return err
	}
	in := newBackupReader(r)
	if err := in.header(); err != nil {
		return fmt.Errorf("restore the store: %w", err)
	}
	if err := s.beginRestore(ctx); err != nil {
		return fmt.Errorf("restore the store: %w", err)
	}
	if err := s.restore(ctx, in); err != nil {
		_, wipe := s.client.Delete(ctx, s.keys.all(), clientv3.WithPrefix())
		return errors.Join(fmt.Errorf("restore the store: %w", err), wipe)
	}
	return nil
}

// answerTime is how long a cluster may be silent to who cannot wait for it.
const answerTime = 15 * time.Second

// answers is nil when the cluster gives an answer, whatever it is.
func (s *Store) answers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	if _, err := s.client.Get(ctx, s.keys.meta("id")); err != nil && Unreachable(err) {
		return fmt.Errorf("the store %s does not answer: is etcd running there, and does this host reach it? %w", s.opts.URL, err)
	}
	return nil
}

// Migrate copies all records of s into the empty data of to.
func (s *Store) Migrate(ctx context.Context, to Options) error {
	r, w := io.Pipe()
	sent := make(chan error, 1)
	go func() {
		err := s.Backup(ctx, w)
		w.CloseWithError(err)
		sent <- err
	}()
	err := Restore(ctx, to, r)
	r.CloseWithError(errors.New("the restore ended"))
	if e := <-sent; err == nil {
		err = e
	}
	return err
}

// beginRestore marks the data as half restored, and clears what an earlier
// restore left.
func (s *Store) beginRestore(ctx context.Context) error {
	mark := s.keys.meta("restoring")
	half, err := s.client.Get(ctx, mark)
	if err != nil {
		return err
	}
	if len(half.Kvs) == 0 {
		any, err := s.client.Get(ctx, s.keys.all(), clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err != nil {
			return err
		}
		if any.Count > 0 {
			return errors.New("there is data already: restore into an empty store")
		}
	} else if err := s.clearAllBut(ctx, mark); err != nil {
		return err
	}
	_, err = s.client.Put(ctx, mark, "")
	return err
}

// clearAllBut deletes every key below the prefix but one.
func (s *Store) clearAllBut(ctx context.Context, key string) error {
	end := clientv3.GetPrefixRangeEnd(s.keys.all())
	if _, err := s.client.Delete(ctx, s.keys.all(), clientv3.WithRange(key)); err != nil {
		return err
	}
	_, err := s.client.Delete(ctx, key+"\x00", clientv3.WithRange(end))
	return err
}

// restore writes all records, and the identity last. Records that were made
// together are made together again, so that their order stays.
func (s *Store) restore(ctx context.Context, in *backupReader) error {
	var batch []clientv3.Op
	var created int64
	size := 0
	flush := func() error {
		if len(batch) == 0 {
			return nil
		}
		_, err := s.client.Txn(ctx).Then(batch...).Commit()
		batch, size = nil, 0
		return err
	}
	for {
		rec, more, err := in.next()
		if err != nil {
			return err
		}
		if !more {
			break
		}
		if rec.Created != created || len(batch) == restoreBatch || size+len(rec.Value) > MaxBytes {
			if err := flush(); err != nil {
				return err
			}
		}
		batch = append(batch, clientv3.OpPut(s.keys.record(id{rec.Class, rec.Ref}), string(rec.Value)))
		created, size = rec.Created, size+len(rec.Value)+256
	}
	if err := flush(); err != nil {
		return err
	}
	_, err := s.client.Txn(ctx).Then(s.identity([]clientv3.Op{clientv3.OpDelete(s.keys.meta("restoring"))})...).Commit()
	return err
}

// backupReader reads and checks a backup line by line.
type backupReader struct {
	lines *bufio.Scanner
	sum   hash.Hash
	count int
}

func newBackupReader(r io.Reader) *backupReader {
	b := &backupReader{lines: bufio.NewScanner(r), sum: sha256.New()}
	b.lines.Buffer(make([]byte, 0, 64<<10), backupLine)
	return b
}

func (b *backupReader) line() ([]byte, error) {
	if b.lines.Scan() {
		return b.lines.Bytes(), nil
	}
	if err := b.lines.Err(); err != nil {
		return nil, fmt.Errorf("read the backup: %w", err)
	}
	return nil, errors.New("the backup is cut short")
}

func (b *backupReader) take(line []byte) {
	b.sum.Write(line)
	b.sum.Write([]byte{'\n'})
}

func (b *backupReader) header() error {
	line, err := b.line()
	if err != nil {
		return err
	}
	var h backupHeader
	if json.Unmarshal(line, &h) != nil || h.Format != backupFormat {
		return errors.New("this is not a backup of a patchd store")
	}
	b.take(line)
	return checkSchema(fmt.Sprint(h.Schema))
}

// next gives the next record; more is false after the last one, when the footer
// was there and right.
func (b *backupReader) next() (rec backupRecord, more bool, err error) {
	line, err := b.line()
	if err != nil {
		return rec, false, err
	}
	if bytes.HasPrefix(line, []byte(`{"records":`)) {
		return rec, false, b.footer(line)
	}
	if err := json.Unmarshal(line, &rec); err != nil {
		return rec, false, fmt.Errorf("line %d of the backup: %w", b.count+2, err)
	}
	if !validClass(rec.Class) || !validRef(rec.Ref) || len(rec.Value) == 0 || len(rec.Value) > MaxBytes {
		return rec, false, fmt.Errorf("line %d of the backup is not a record", b.count+2)
	}
	b.take(line)
	b.count++
	return rec, true, nil
}

func (b *backupReader) footer(line []byte) error {
	var f backupFooter
	if err := json.Unmarshal(line, &f); err != nil {
		return fmt.Errorf("the last line of the backup: %w", err)
	}
	if f.Records != b.count || f.SHA256 != hex.EncodeToString(b.sum.Sum(nil)) {
		return errors.New("the backup is damaged: its checksum does not hold")
	}
	return nil
}
