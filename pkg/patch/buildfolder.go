package patch

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/BurntSushi/toml"
	"golang.org/x/sys/unix"

	"github.com/patchd/patchd/pkg/xapi"
)

// The names in the folder of a patch.
const (
	infoFile     = "info.toml"
	precheckFile = "precheck"
	applyFile    = "apply"
	filesDir     = "files"
)

const (
	maxInfoFile = 64 << 10 // bytes
	maxMembers  = 1 << 20
)

// memberTime is the date of every file in the archives: the same folder makes
// the same bytes. tar complains of dates near 1970.
var memberTime = time.Unix(315532800, 0) // 1980-01-01

// folder is a patch folder that was looked at: the plan of a build.
type folder struct {
	dir      string
	info     Info
	guidance []string // as written
	newUUID  bool
	control  []member // apply and precheck
	files    []member // files/ and all below, in the order of their names
	unpacked int64    // bytes that apply unpacks
}

// member is one entry of an archive.
type member struct {
	name string // in the archive, with slashes
	mode int64
	kind byte // tar.TypeReg, TypeDir, TypeSymlink
	size int64
	link string
}

// readFolder looks at the folder of a patch. Its errors name the file and the
// cure.
func readFolder(dir string) (*folder, error) {
	f := &folder{dir: dir}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("the folder of the patch: %w", err)
	}
	for _, e := range entries {
		switch name := e.Name(); {
		case name == infoFile, name == precheckFile, name == applyFile, name == filesDir:
		case strings.HasPrefix(name, "."), strings.HasPrefix(name, "README"):
		default:
			return nil, fmt.Errorf("%s: not part of a patch: files that the patch brings along belong into %s/", filepath.Join(dir, name), filesDir)
		}
	}
	if err := f.readInfo(); err != nil {
		return nil, err
	}
	if err := f.addProgram(applyFile, true); err != nil {
		return nil, err
	}
	if err := f.addProgram(precheckFile, false); err != nil {
		return nil, err
	}
	if err := f.addFiles(); err != nil {
		return nil, err
	}
	for _, m := range append(f.control, f.files...) {
		f.unpacked += (m.size + 4095) / 4096 * 4096
	}
	if f.info.ScratchSize += f.unpacked; f.info.ScratchSize > maxScratch {
		return nil, fmt.Errorf("%s: scratch-size and the files together are more than %d bytes", filepath.Join(dir, infoFile), int64(maxScratch))
	}
	return f, nil
}

// infoTOML is info.toml.
type infoTOML struct {
	UUID        string   `toml:"uuid"`
	Version     string   `toml:"version"`
	Label       string   `toml:"name-label"`
	Description string   `toml:"name-description"`
	Guidance    []string `toml:"after-apply-guidance"`
	Scratch     int64    `toml:"scratch-size"`
}

func (f *folder) readInfo() error {
	name := filepath.Join(f.dir, infoFile)
	file, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s is missing: it says version, name-label, name-description and after-apply-guidance", name)
	}
	if err != nil {
		return err
	}
	defer file.Close()
	text, err := readAtMost(file, maxInfoFile)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	var t infoTOML
	meta, err := toml.Decode(string(text), &t)
	var syntax toml.ParseError
	if errors.As(err, &syntax) {
		return fmt.Errorf("%s: line %d: %s", name, syntax.Position.Line, syntax.Message)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if unknown := meta.Undecoded(); len(unknown) > 0 {
		key := unknown[0].String()
		return fmt.Errorf("%s: line %d: unknown key %q (known: uuid, version, name-label, name-description, after-apply-guidance, scratch-size)", name, lineOf(text, unknown[0]), key)
	}
	var missing []string
	for _, key := range []string{"version", "name-label", "name-description", "after-apply-guidance"} {
		if !meta.IsDefined(key) {
			missing = append(missing, key)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("%s: %s is missing", name, strings.Join(missing, ", "))
	}
	if err := f.takeInfo(t); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

func (f *folder) takeInfo(t infoTOML) error {
	guidance, err := xapi.ParseGuidance(t.Guidance)
	if err != nil {
		return err
	}
	if t.Scratch < 0 {
		return fmt.Errorf("scratch-size %d is negative", t.Scratch)
	}
	uuid := xapi.NewUUID()
	if f.newUUID = t.UUID == ""; !f.newUUID {
		if uuid, err = xapi.ParseUUID(t.UUID); err != nil {
			return fmt.Errorf("uuid: %w", err)
		}
	}
	f.guidance = t.Guidance
	f.info = Info{
		UUID: uuid, Version: t.Version, NameLabel: t.Label, NameDescription: t.Description,
		Guidance: guidance, ScratchSize: t.Scratch,
	}
	// What info will print must be what ParseInfo takes.
	got, err := parseInfo([]byte(encodeInfo(f.info, f.guidance)))
	if err != nil {
		return err
	}
	if got.NameLabel != t.Label || got.NameDescription != t.Description || got.Version != t.Version {
		return errors.New("name-label, name-description and version must be one line each, without tabs")
	}
	return nil
}

// lineOf finds the line of a key that has no meaning here, for people.
func lineOf(text []byte, key toml.Key) int {
	want := key[0]
	for n, line := range strings.Split(string(text), "\n") {
		name, _, ok := strings.Cut(strings.TrimSpace(line), "=")
		if !ok {
			name = line
		}
		if strings.Trim(name, " \t\r[]\"'") == want || strings.HasPrefix(strings.Trim(name, " \t[]\"'"), want+".") {
			return n + 1
		}
	}
	return 0
}

// addProgram takes precheck or apply into the control archive, as an
// executable, whatever its mode is in the folder.
func (f *folder) addProgram(name string, must bool) error {
	full := filepath.Join(f.dir, name)
	st, err := os.Lstat(full)
	if errors.Is(err, fs.ErrNotExist) {
		if must {
			return fmt.Errorf("%s is missing: it is the program that applies the patch", full)
		}
		return nil
	}
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("%s: must be a file", full)
	}
	if err := checkProgram(full); err != nil {
		return err
	}
	f.control = append(f.control, member{name: name, mode: 0o755, kind: tar.TypeReg, size: st.Size()})
	return nil
}

func checkProgram(full string) error {
	file, err := os.Open(full)
	if err != nil {
		return err
	}
	defer file.Close()
	begin := make([]byte, 256)
	n, err := io.ReadFull(file, begin)
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return err
	}
	begin = begin[:n]
	if bytes.HasPrefix(begin, []byte("\x7fELF")) {
		return nil
	}
	if !bytes.HasPrefix(begin, []byte("#!")) {
		return fmt.Errorf("%s: neither a script that begins with #! nor an ELF program", full)
	}
	if line, _, _ := bytes.Cut(begin, []byte("\n")); bytes.HasSuffix(line, []byte("\r")) {
		return fmt.Errorf("%s: has carriage returns at its line ends: save it with plain line feeds", full)
	}
	return nil
}

// addFiles takes all of files/ into the archive of the files.
func (f *folder) addFiles() error {
	root := filepath.Join(f.dir, filesDir)
	if _, err := os.Lstat(root); errors.Is(err, fs.ErrNotExist) {
		f.files = []member{{name: filesDir + "/", mode: 0o755, kind: tar.TypeDir}}
		return nil
	}
	return filepath.WalkDir(root, func(full string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(f.dir, full)
		if err != nil {
			return err
		}
		m, err := fileMember(full, filepath.ToSlash(rel), st)
		if err != nil {
			return fmt.Errorf("%s: %w", full, err)
		}
		if len(f.files) == maxMembers {
			return fmt.Errorf("%s: more than %d files: pack them into one", root, maxMembers)
		}
		f.files = append(f.files, m)
		return nil
	})
}

func fileMember(full, name string, st fs.FileInfo) (member, error) {
	m := member{name: name, mode: 0o644, kind: tar.TypeReg}
	if st.Mode()&(fs.ModeSetuid|fs.ModeSetgid) != 0 && !st.IsDir() {
		return m, errors.New("is set-uid or set-gid: patches do not carry that; let apply set it")
	}
	switch {
	case st.Mode().IsRegular():
		if st.Mode()&0o111 != 0 {
			m.mode = 0o755
		}
		m.size = st.Size()
	case st.IsDir():
		m.name, m.mode, m.kind = name+"/", 0o755, tar.TypeDir
	case st.Mode()&fs.ModeSymlink != 0:
		link, err := os.Readlink(full)
		if err != nil {
			return m, err
		}
		m.mode, m.kind, m.link = 0o777, tar.TypeSymlink, link
	default:
		return m, errors.New("neither a file, a folder nor a symbolic link: leave it out")
	}
	return m, nil
}

// archive writes the members as a tar. With content false the files are zeros:
// only the length counts.
func (f *folder) archive(ctx context.Context, w io.Writer, members []member, content bool) error {
	t := tar.NewWriter(w)
	for _, m := range members {
		h := &tar.Header{
			Format: tar.FormatGNU, Typeflag: m.kind, Name: m.name, Linkname: m.link,
			Mode: m.mode, Size: m.size, ModTime: memberTime,
		}
		if err := t.WriteHeader(h); err != nil {
			return fmt.Errorf("%s: %w", m.name, err)
		}
		if m.kind != tar.TypeReg {
			continue
		}
		var err error
		if content {
			err = f.copyFile(ctx, t, m)
		} else {
			_, err = io.CopyN(t, zeros{}, m.size)
		}
		if err != nil {
			return err
		}
	}
	return t.Close()
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func (f *folder) copyFile(ctx context.Context, w io.Writer, m member) error {
	full := filepath.Join(f.dir, filepath.FromSlash(path.Clean(m.name)))
	file, err := os.OpenFile(full, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	r := &contextReader{ctx, file}
	n, err := io.CopyN(w, r, m.size)
	if err == io.EOF {
		return fmt.Errorf("%s: changed while the patch was built: %d bytes instead of %d", full, n, m.size)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", full, err)
	}
	if n, _ := file.Read(make([]byte, 1)); n > 0 {
		return fmt.Errorf("%s: grew while the patch was built", full)
	}
	return nil
}
