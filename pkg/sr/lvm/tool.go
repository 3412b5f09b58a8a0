package lvm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/sr"
)

const (
	// toolTimeout bounds one command: one that takes longer waits for a device
	// that does not answer.
	toolTimeout = 2 * time.Minute
	toolGrace   = 20 * time.Second
	maxOutput   = 16 << 20
)

// tools runs the programs of lvm2 about one device.
type tools struct {
	dom0   dom0.Dom0
	device string // "" shows every device
}

// config is what the tools shall see and do, whatever /etc/lvm says.
func (t tools) config(udev bool) string {
	filter := `"a|.*|"`
	if t.device != "" {
		filter = `"a|^` + t.device + `$|","r|.*|"`
	}
	sync := "0"
	if udev {
		sync = "1"
	}
	return strings.Join([]string{
		`devices { filter=[` + filter + `] global_filter=["a|.*|"] use_devicesfile=0 obtain_device_list_from_udev=0 issue_discards=0 }`,
		`backup { backup=0 archive=0 }`,
		`activation { monitoring=0 retry_deactivation=0 thin_pool_autoextend_threshold=100 udev_sync=` + sync + ` udev_rules=` + sync + ` verify_udev_operations=0 }`,
		`global { use_lvmpolld=0 system_id_source="none" }`,
		`log { command_names=0 prefix="" }`,
	}, " ")
}

// failure is a command that ended with another status than 0.
type failure struct {
	command string
	status  int
	text    string
}

func (f *failure) Error() string {
	return fmt.Sprintf("%s: status %d: %.1000s", f.command, f.status, f.text)
}

// find gives the path of a program. The folders are those of a host, not of $PATH.
func find(name, pkg string) (string, error) {
	for _, dir := range []string{"/usr/sbin/", "/sbin/", "/usr/bin/", "/bin/"} {
		if fi, err := os.Stat(dir + name); err == nil && fi.Mode().IsRegular() {
			return dir + name, nil
		}
	}
	return "", sr.BackendFailure("there is no program %s: install the package %s", name, pkg)
}

// lvm runs one command of lvm2 and gives what it wrote. The error is a
// *failure when it refused.
func (t tools) lvm(ctx context.Context, command string, args ...string) ([]byte, error) {
	path, err := find("lvm", "lvm2")
	if err != nil {
		return nil, err
	}
	udev := hasUdev()
	return t.run(ctx, path, append([]string{command, "--config", t.config(udev)}, args...), udev)
}

// dmsetup runs one command of device-mapper.
func (t tools) dmsetup(ctx context.Context, args ...string) ([]byte, error) {
	path, err := find("dmsetup", "dmsetup")
	if err != nil {
		return nil, err
	}
	return t.run(ctx, path, args, hasUdev())
}

func hasUdev() bool {
	_, err := os.Stat("/run/udev/control")
	return err == nil
}

// run runs a program to its end, also when ctx ends meanwhile: a volume must
// not stay suspended.
func (t tools) run(ctx context.Context, path string, args []string, udev bool) ([]byte, error) {
	if t.dom0 == nil {
		return nil, sr.BackendFailure("this process runs no programs")
	}
	if err := sr.Alive(ctx); err != nil {
		return nil, err
	}
	env := []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "LVM_SUPPRESS_FD_WARNINGS=1"}
	if !udev {
		env = append(env, "DM_DISABLE_UDEV=1")
	}
	var out, errOut capped
	res, err := t.dom0.Run(context.WithoutCancel(ctx), dom0.Cmd{
		Path: path, Args: args, Env: env, Stdout: &out, Stderr: &errOut, Timeout: toolTimeout, Grace: toolGrace,
	})
	if err != nil {
		return nil, fmt.Errorf("run %s %s: %w", path, args[0], err)
	}
	if res.TimedOut {
		return nil, fmt.Errorf("run %s %s: no end within %s", path, args[0], toolTimeout)
	}
	if res.ExitCode != 0 {
		text := strings.Join(strings.Fields(errOut.String()), " ")
		return out.Bytes(), &failure{path + " " + args[0], res.ExitCode, text}
	}
	return out.Bytes(), nil
}

// capped keeps the first maxOutput bytes of what is written and takes the rest.
type capped struct{ bytes.Buffer }

// Write implements io.Writer.
func (c *capped) Write(p []byte) (int, error) {
	c.Buffer.Write(p[:max(0, min(len(p), maxOutput-c.Len()))])
	return len(p), nil
}

// row is one line of a report: column to value.
type row map[string]string

// report runs pvs, vgs or lvs and gives its rows.
func (t tools) report(ctx context.Context, command, columns string, args ...string) ([]row, error) {
	args = append([]string{"--reportformat", "json", "--units", "b", "--nosuffix", "-o", columns}, args...)
	out, err := t.lvm(ctx, command, args...)
	if err != nil {
		return nil, err
	}
	return parseReport(out, strings.TrimSuffix(command, "s"))
}

// parseReport reads the JSON of a report: of every list named kind the rows. A
// value is text, or, as newer tools write it, a number.
func parseReport(text []byte, kind string) ([]row, error) {
	var all struct {
		Report []map[string][]map[string]any `json:"report"`
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	if err := d.Decode(&all); err != nil {
		return nil, fmt.Errorf("read report of lvm: %w", err)
	}
	var rows []row
	for _, part := range all.Report {
		for _, columns := range part[kind] {
			r := row{}
			for name, v := range columns {
				if v != nil {
					r[name] = fmt.Sprint(v)
				}
			}
			rows = append(rows, r)
		}
	}
	return rows, nil
}

// number reads a count of bytes from a row.
func (r row) number(column string) (int64, error) {
	n, err := strconv.ParseInt(strings.TrimSuffix(r[column], "B"), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read report of lvm: column %s: %w", column, err)
	}
	return n, nil
}

// poolStatus is what device-mapper says of a thin pool.
type poolStatus struct {
	usedMeta, totalMeta, usedData, totalData int64 // in blocks
}

var errNoPool = errors.New("the thin pool does not answer: it has failed, see dmsetup status")

// poolLine finds the line about a pool: the device has the suffix -tpool while
// there are volumes in it.
func poolLine(text, name string) (string, bool) {
	for line := range strings.Lines(text) {
		device, _, _ := strings.Cut(line, ":")
		if device == name || device == name+"-tpool" {
			return line, true
		}
	}
	return "", false
}

// parsePool reads "<name>: 0 <sectors> thin-pool <transaction>
// <used>/<total metadata> <used>/<total data> …".
func parsePool(text string) (p poolStatus, err error) {
	f := strings.Fields(text)
	for i, word := range f {
		if word != "thin-pool" || i+3 >= len(f) {
			continue
		}
		if _, err := fmt.Sscanf(f[i+2]+" "+f[i+3], "%d/%d %d/%d", &p.usedMeta, &p.totalMeta, &p.usedData, &p.totalData); err != nil {
			return p, fmt.Errorf("%w: %.200s", errNoPool, text)
		}
		return p, nil
	}
	return p, fmt.Errorf("%w: %.200s", errNoPool, text)
}

// parseThins reads lines "<name>: 0 <sectors> thin <mapped> <highest>" and
// gives the bytes that each device has blocks for.
func parseThins(text string) map[string]int64 {
	mapped := map[string]int64{}
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		for i, word := range f {
			if word != "thin" || i == 0 || i+1 >= len(f) {
				continue
			}
			if n, err := strconv.ParseInt(f[i+1], 10, 64); err == nil {
				mapped[strings.TrimSuffix(f[0], ":")] = n * 512
			}
		}
	}
	return mapped
}
