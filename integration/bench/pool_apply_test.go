//go:build bench

package bench

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/patchd/patchd/integration/lab"
)

const (
	fleetHosts = 8
	fleetMbit  = 400
	fleetBytes = 256 * mib
)

// benchPoolApply brings a patch of 256 MiB onto 8 hosts that have no SR with it,
// through an uplink of 400 Mbit/s, against scp and ssh to all of them at once.
func benchPoolApply(b *bench) []row {
	p := lab.NewPool(b, fleetHosts+1, nil)
	p.JoinAll()
	first, members := p.Hosts[0], p.Hosts[1:]
	s := first.Root()
	ssh := startSSH(b, p)
	first.Node.Narrow(fleetMbit)
	r := row{name: "PoolApply", what: "pool_apply of 256 MiB to 8 hosts that must fetch it", baseline: "scp and ssh to all at once", target: 0.5}
	sent := row{name: "PoolApplySent", what: "bytes that leave the coordinator for it", baseline: "the patch", target: 3}
	for i := range 2 {
		patch := &lab.Patch{Label: "of the fleet", Apply: "echo $PATCHD_PATCH_UUID >> " + filepath.Join(b.dir, "effects")}
		path := b.signedFile(patch, noise(byte(i+1), fleetBytes))
		plain := filepath.Join(b.dir, "payload")
		b.run("sh", "-c", fmt.Sprintf("GNUPGHOME=%s gpg --batch --yes --quiet --decrypt --output %s %s 2>/dev/null", lab.DefaultKey(b).Home(), plain, path))
		b.run("sync")
		r.base = append(r.base, timed(func() { ssh.apply(plain) }))

		first.Must("patch", "upload", path)
		b.run("sync")
		names := []string{}
		for _, h := range members {
			names = append(names, h.UUID())
		}
		before, _ := first.Node.Traffic()
		r.got = append(r.got, timed(func() {
			first.Must("patch", "pool-apply", string(patch.UUID), "--hosts", strings.Join(names, ","), "--at-once", fmt.Sprint(fleetHosts))
		}))
		after, _ := first.Node.Traffic()
		sent.figures = append(sent.figures, float64(after-before)/float64(fleetBytes))
		if n := len(s.All("host_patch")); n != fleetHosts*(i+1) {
			b.Fatalf("%d hosts have it", n)
		}
		s.Call("pool_patch.pool_clean", s.Call("pool_patch.get_by_uuid", string(patch.UUID)))
	}
	return []row{r, sent}
}

// fleetSSH is an SSH server in the namespace of each member.
type fleetSSH struct {
	*bench
	p           *lab.Pool
	key, config string
}

func startSSH(b *bench, p *lab.Pool) *fleetSSH {
	b.Helper()
	f := &fleetSSH{bench: b, p: p, key: filepath.Join(b.dir, "id"), config: filepath.Join(b.dir, "sshd_config")}
	for _, name := range []string{"id", "hostkey"} {
		b.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(b.dir, name))
	}
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil { // sshd parts with its rights in there
		b.Fatal(err)
	}
	text := fmt.Sprintf("HostKey %s\nAuthorizedKeysFile %s.pub\nStrictModes no\nUsePAM no\nPermitRootLogin yes\nPidFile none\nSubsystem sftp internal-sftp\nMaxStartups 100\n",
		filepath.Join(b.dir, "hostkey"), f.key)
	if err := os.WriteFile(f.config, []byte(text), 0o600); err != nil {
		b.Fatal(err)
	}
	for _, h := range p.Hosts[1:] {
		cmd := h.Node.Command("/usr/sbin/sshd", "-D", "-f", f.config, "-o", "ListenAddress="+h.IP)
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
			c, err := p.Hosts[0].Dial(b.Context(), "tcp", h.IP+":22")
			if err == nil {
				c.Close()
				break
			}
			if time.Now().After(end) {
				b.Fatal(err)
			}
		}
	}
	return f
}

// apply copies a patch to all members at once and runs it there.
func (f *fleetSSH) apply(path string) {
	f.Helper()
	options := []string{"-q", "-i", f.key, "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"}
	var all sync.WaitGroup
	failed := make(chan string, len(f.p.Hosts))
	run := func(cmd *exec.Cmd) bool {
		out, err := cmd.CombinedOutput()
		if err != nil {
			failed <- fmt.Sprintf("%v: %v\n%s", cmd.Args, err, out)
		}
		return err == nil
	}
	from := f.p.Hosts[0].Node
	for _, h := range f.p.Hosts[1:] {
		to := filepath.Join(h.StateDir, "by-scp")
		all.Go(func() {
			defer os.Remove(to)
			if run(from.Command("scp", append(options, path, "root@"+h.IP+":"+to)...)) {
				run(from.Command("ssh", append(options, "root@"+h.IP, "bash "+to+" apply")...))
			}
		})
	}
	all.Wait()
	select {
	case text := <-failed:
		f.Fatal(text)
	default:
	}
}

// benchFailover kills the coordinator and waits for the next call that is served.
func benchFailover(b *bench) []row {
	etcd := lab.StartEtcd(b, 3)
	var all []lab.Options
	for range 3 {
		all = append(all, lab.Options{Store: etcd.URL("")})
	}
	p := &lab.Pool{T: b, Hosts: lab.StartAll(b, all...)}
	r := row{name: "Failover", what: "coordinator killed: until the next call is served", target: 5, unit: "s"}
	for range benchRounds {
		old := p.Leader().H
		time.Sleep(2 * time.Second) // the others stand by
		old.Kill()
		took := timed(func() { p.Leader().All("pool_patch") })
		r.figures = append(r.figures, took.Seconds())
		old.Up()
	}
	return []row{r}
}
