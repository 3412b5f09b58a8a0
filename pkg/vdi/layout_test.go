package vdi

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"
)

// layOut makes an image whose `patch` has size bytes, of which only the last
// 5000 are not zero, without a Writer: the layout alone.
func layOut(t *testing.T, o Options, image, size int64) *os.File {
	t.Helper()
	f := fresh(t, image)
	l, err := newLayout(context.Background(), image, o)
	if err != nil {
		t.Fatal(err)
	}
	var runs []run
	for n := blocksFor(size); n > 0; {
		r, err := l.next()
		if err != nil {
			t.Fatal(err)
		}
		r.count = min(r.count, n)
		if err := l.take(r.count); err != nil {
			t.Fatal(err)
		}
		runs = appendRun(runs, r)
		n -= r.count
	}
	end, err := l.finish(size, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := end.pages.writeTo(f); err != nil {
		t.Fatal(err)
	}
	tail, _ := io.ReadAll(payload(5000))
	for i, c := range tail[:min(size, 5000)] {
		at := size - min(size, 5000) + int64(i)
		for _, r := range runs {
			if n := r.count * blockSize; at >= n {
				at -= n
				continue
			}
			if _, err := f.WriteAt([]byte{c}, r.start*blockSize+at); err != nil {
				t.Fatal(err)
			}
			break
		}
	}
	return f
}

func TestLayoutOfLargeFiles(t *testing.T) {
	eachLayout(t, func(t *testing.T, o Options) {
		for _, c := range []struct{ image, size int64 }{
			{Size(1 << 31), 1<<31 - 1}, {Size(1 << 31), 1 << 31}, {Size(1 << 31), 1<<31 + 1},
			{Size(1 << 32), 1<<32 - 1}, {Size(1 << 32), 1 << 32}, {Size(1 << 32), 1<<32 + 1},
			{44 * gib, 40 * gib},
		} {
			t.Run(fmt.Sprint(c.size, " bytes"), func(t *testing.T) {
				f := layOut(t, o, c.image, c.size)
				fsck(t, f.Name())
				checkEnd(t, f.Name(), c.size, 5000)
			})
		}
	})
}

// A file is cut where its extent tree gets another form: in the inode, in one
// block, in several, in several levels.
func TestCutWhereTheExtentTreeChanges(t *testing.T) {
	const extent = maxInitialised * blockSize
	eachLayout(t, func(t *testing.T, o Options) {
		if o.Layout == LayoutGo {
			return // nothing is cut: its file grows
		}
		for _, size := range []int64{
			0, 1, blockSize, 4*extent - blockSize, 4 * extent, 4*extent + 1, 5 * extent,
			340*extent - blockSize, 341 * extent, 700 * extent, 1400 * extent,
		} {
			t.Run(fmt.Sprint(size, " bytes"), func(t *testing.T) {
				f := layOut(t, o, 200*gib, size)
				fsck(t, f.Name())
				p, err := OpenPayload(f)
				if err != nil || p.Size() != size {
					t.Fatalf("%+v, %v", p, err)
				}
			})
		}
	})
}

func TestTheLargestFilesystem(t *testing.T) {
	for _, o := range layouts(t) {
		if o.Layout == LayoutMke2fs {
			f := layOut(t, o, maxSize, 900*gib)
			fsck(t, f.Name())
			checkEnd(t, f.Name(), 900*gib, 5000)
		}
	}
}

func TestLayoutIsChosen(t *testing.T) {
	with := layouts(t)[1].Dom0
	dirs := toolDirs
	t.Cleanup(func() { toolDirs = dirs })
	kind := func(l layouter) string { return strings.TrimPrefix(fmt.Sprintf("%T", l), "*vdi.") }
	for _, c := range []struct {
		name   string
		dirs   []string
		o      Options
		size   int64
		want   string
		failed string
	}{
		{"a small image is go's", dirs, Options{Dom0: with}, 8 * mib, "goLayout", ""},
		{"a large one is mke2fs's", dirs, Options{Dom0: with}, gib, "fileLayout", ""},
		{"a large one is go's where nothing can be run", dirs, Options{}, gib, "goLayout", ""},
		{"a large one is go's where mke2fs is not installed", nil, Options{Dom0: with}, gib, "goLayout", ""},
		{"go is go", dirs, Options{Layout: LayoutGo, Dom0: with}, gib, "goLayout", ""},
		{"mke2fs is mke2fs", dirs, Options{Layout: LayoutMke2fs, Dom0: with}, 8 * mib, "fileLayout", ""},
		{"mke2fs that is not installed is an error", nil, Options{Layout: LayoutMke2fs, Dom0: with}, gib, "", "mke2fs is not installed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			toolDirs = c.dirs
			checked := CheckLayout(c.o.Layout, c.o.Dom0)
			l, err := newLayout(context.Background(), c.size, c.o)
			if c.failed == "" {
				if err != nil || kind(l) != c.want || checked != nil {
					t.Errorf("%T, %v; checked: %v; want %s", l, err, checked, c.want)
				}
				return
			}
			for _, err := range []error{err, checked} {
				if err == nil || !strings.Contains(err.Error(), c.failed) {
					t.Errorf("%v, want %q", err, c.failed)
				}
			}
		})
	}
}

// A tool of that name that does something else, or nothing, is found out.
func TestAnotherMke2fs(t *testing.T) {
	with := layouts(t)[1].Dom0
	dirs := toolDirs
	t.Cleanup(func() { toolDirs = dirs })
	for _, c := range []struct{ name, script, want string }{
		{"it fails", "echo no such option >&2; exit 3", "mke2fs ended with 3: no such option"},
		{"it does nothing", "exit 0", "no ext4 superblock"},
		{"it knows no hugefiles", "exec " + mke2fsPath() + ` -q -F -t ext4 -b 4096 -N 1024 -O 64bit,^has_journal,^resize_inode,^metadata_csum,^uninit_bg -E lazy_itable_init=0 /proc/self/fd/3`, `no file "patch"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(dir+"/mke2fs", []byte("#!/bin/sh\n"+c.script+"\n"), 0o755); err != nil {
				t.Fatal(err)
			}
			toolDirs = []string{dir}
			_, err := newLayout(context.Background(), gib, Options{Layout: LayoutMke2fs, Dom0: with})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			l, err := newLayout(context.Background(), gib, Options{Dom0: with})
			if _, ok := l.(*goLayout); !ok {
				t.Errorf("a free choice gives %T, %v", l, err)
			}
		})
	}
}

func TestParseLayout(t *testing.T) {
	for name, want := range map[string]LayoutKind{"auto": LayoutAuto, "": LayoutAuto, "go": LayoutGo, "mke2fs": LayoutMke2fs} {
		if got, err := ParseLayout(name); got != want || err != nil {
			t.Errorf("%q: %q, %v", name, got, err)
		}
	}
	if _, err := ParseLayout("mkfs"); err == nil {
		t.Error("any name is a layout writer")
	}
	if err := CheckLayout("mkfs", nil); err == nil {
		t.Error("any kind passes the check")
	}
}
