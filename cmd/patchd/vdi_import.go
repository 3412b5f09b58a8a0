package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"

	"github.com/klauspost/compress/zstd"
	"github.com/spf13/cobra"
)

// vdiImport is one import into a disk image.
type vdiImport struct {
	sr, vdi, name string
}

func newVDIImport(g *global) *cobra.Command {
	var i vdiImport
	cmd := &cobra.Command{
		Use: "import FILE", Short: "make a disk image of a file, or change one", Args: cobra.ExactArgs(1),
		Long: "Sends a file that `patchd vdi export` wrote, or any raw image, compressed by zstd or not: into a new disk\n" +
			"image on --sr, or over the one named by --vdi. A FILE of - is the standard input. Prints the uuid.\n\n" +
			"In a new disk image, what the file does not name is zeros. In one that is there, a raw file replaces as many\n" +
			"bytes as it has, extents replace the whole image they are of, blocks replace just those blocks.",
		PreRunE: func(*cobra.Command, []string) error {
			if (i.sr == "") == (i.vdi == "") {
				return usagef("name either --sr or --vdi")
			}
			if i.vdi != "" && i.name != "" {
				return usagef("--name is for a new disk image")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.with(cmd.Context(), func(ctx context.Context, c *client) error {
				ref, err := c.importVDI(ctx, i, args[0])
				if err != nil {
					return fmt.Errorf("import of %s: %w", args[0], explain(ctx, c, err))
				}
				var uuid string
				if err := c.call(ctx, &uuid, "VDI.get_uuid", ref); err != nil {
					return err
				}
				if i.name != "" {
					if err := c.call(ctx, nil, "VDI.set_name_label", ref, i.name); err != nil {
						return err
					}
				}
				return g.printText("uuid", uuid)
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&i.sr, "sr", "", "SR (uuid or name) for a new disk image")
	f.StringVar(&i.vdi, "vdi", "", "disk image (uuid or name) to write over")
	f.StringVar(&i.name, "name", "", "name of the new disk image")
	g.completeFlag(cmd, "sr", "SR")
	g.completeFlag(cmd, "vdi", "VDI")
	return cmd
}

// importVDI sends a file under a task of its own and gives the disk image.
func (c *client) importVDI(ctx context.Context, i vdiImport, path string) (string, error) {
	f := os.Stdin
	if path != "-" {
		var err error
		if f, err = os.Open(path); err != nil {
			return "", err
		}
		defer f.Close()
	}
	in, query, err := lookAtImage(f)
	if err != nil {
		return "", err
	}
	if i.sr != "" {
		ref, _, err := c.find(ctx, "SR", i.sr)
		if err != nil {
			return "", err
		}
		query.Set("sr_id", ref)
	} else {
		ref, _, err := c.find(ctx, "VDI", i.vdi)
		if err != nil {
			return "", err
		}
		query.Set("vdi", ref)
	}
	var task string
	if err := c.call(ctx, &task, "task.create", "vdi import", filepath.Base(path)); err != nil {
		return "", err
	}
	query.Set("task_id", task)
	if err := c.sendVDI(ctx, in, query, task); err != nil {
		return "", err
	}
	ref, err := c.follow(ctx, "import", task)
	return ref, errors.Join(err, c.call(ctx, nil, "task.destroy", task))
}

// image is a file that is sent.
type image struct {
	name   string
	r      io.Reader
	length int64 // -1: not known
	zstd   bool
}

// lookAtImage finds out in which form an image is.
func lookAtImage(f *os.File) (image, url.Values, error) {
	st, err := f.Stat()
	if err != nil {
		return image{}, nil, err
	}
	r := bufio.NewReaderSize(f, 1<<20)
	in := image{name: filepath.Base(f.Name()), r: r, length: -1}
	if st.Mode().IsRegular() {
		in.length = st.Size()
	}
	const magic = "patchd vdi frames 1\n"
	head, _ := r.Peek(64 << 10)
	in.zstd = bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd})
	if in.zstd {
		if head, err = decompressHead(head, len(magic)+8); err != nil {
			return image{}, nil, err
		}
	}
	query := url.Values{"format": {"raw"}}
	if len(head) >= len(magic)+8 && string(head[:len(magic)]) == magic {
		format, ok := map[uint64]string{1: "extents", 2: "blocks"}[binary.LittleEndian.Uint64(head[len(magic):])]
		if !ok {
			return image{}, nil, fmt.Errorf("%s: frames of a kind that this patchd does not know", f.Name())
		}
		query.Set("format", format)
		return in, query, nil
	}
	if !in.zstd && in.length < 0 {
		return image{}, nil, usagef("the length of raw bytes must be known: give a file, or export with --format extents")
	}
	if in.zstd {
		size, err := decompressedSize(f, in.length)
		if err != nil {
			return image{}, nil, err
		}
		query.Set("virtual_size", strconv.FormatInt(size, 10))
		r.Reset(f)
	}
	return in, query, nil
}

// decompressHead gives the first n bytes of what is compressed in head.
func decompressHead(head []byte, n int) ([]byte, error) {
	d, err := zstd.NewReader(bytes.NewReader(head), zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	out := make([]byte, n)
	k, _ := io.ReadFull(d, out) // cut off, or damaged: the server tells
	return out[:k], nil
}

// decompressedSize reads a compressed file once to know how long its content is.
func decompressedSize(f *os.File, length int64) (int64, error) {
	if length < 0 {
		return 0, usagef("the length of compressed raw bytes must be known: give a file, or export with --format extents")
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return 0, err
	}
	d, err := zstd.NewReader(f, zstd.WithDecoderConcurrency(1))
	if err != nil {
		return 0, err
	}
	defer d.Close()
	n, err := io.Copy(io.Discard, d)
	if err != nil {
		return 0, fmt.Errorf("decompress %s: %w", f.Name(), err)
	}
	_, err = f.Seek(0, io.SeekStart)
	return n, err
}

// sendVDI sends the bytes. Whether they are taken the task tells.
func (c *client) sendVDI(ctx context.Context, in image, query url.Values, task string) error {
	b := newBar(in.name, max(in.length, 0))
	defer b.done()
	body := &counted{in.r, b.add}
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, c.base+"/import_raw_vdi?"+query.Encode(), body)
	if err != nil {
		return err
	}
	req.ContentLength = in.length
	if in.zstd {
		req.Header.Set("Content-Encoding", "zstd")
	}
	req.AddCookie(&http.Cookie{Name: "session_id", Value: c.session})
	res, err := c.http.Do(req)
	if err == nil {
		defer res.Body.Close()
		if res.StatusCode != http.StatusOK {
			return refusalOf(res)
		}
		_, err = io.Copy(io.Discard, res.Body) // ends when the server has read everything
	}
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return errors.New("interrupted: a new disk image is not made, one that was there is changed in part")
	}
	// The server may have ended it, and the task says why.
	var rec record
	if c.call(ctx, &rec, "task.get_record", task) == nil {
		if done, _, failed := ended(rec); done {
			return failed
		}
	}
	return unreachableError{reason(err)}
}
