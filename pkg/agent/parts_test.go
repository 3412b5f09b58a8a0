package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/dom0"
	"github.com/patchd/patchd/pkg/dom0/dom0test"
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/xapi"
)

func TestMakePlan(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	vdi := func(sr xapi.Ref) *pool.VDI { return &pool.VDI{UUID: "22222222-2222-4222-8222-222222222222", SR: sr} }
	local := SRFact{Ref: "local", Clones: true, Free: 1000 * mib}
	plain := SRFact{Ref: "plain", Free: 1000 * mib}
	nfs := SRFact{Ref: "nfs", Shared: true, Free: 9000 * mib}
	big := SRFact{Ref: "big", Free: 5000 * mib}
	full := SRFact{Ref: "full", Clones: true, Free: mib}
	for name, c := range map[string]struct {
		patch pool.Patch
		vdi   *pool.VDI
		srs   []SRFact
		want  Plan
		code  string
	}{
		"clones where it can":           {pool.Patch{PayloadSize: 10 * mib}, vdi("local"), []SRFact{plain, local}, Plan{Way: WayClone, Source: "local", Target: "local", Room: 18 * mib}, ""},
		"scratch as info says":          {pool.Patch{PayloadSize: 10 * mib, ScratchSize: 100 * mib}, vdi("local"), []SRFact{local}, Plan{Way: WayClone, Source: "local", Target: "local", Room: 108 * mib}, ""},
		"copies in place first":         {pool.Patch{PayloadSize: 10 * mib}, vdi("plain"), []SRFact{big, plain}, Plan{Way: WayCopy, Source: "plain", Target: "plain", Room: 28 * mib}, ""},
		"a copy of a shared one":        {pool.Patch{PayloadSize: 10 * mib}, vdi("nfs"), []SRFact{nfs, plain, big}, Plan{Way: WayCopy, Source: "nfs", Target: "big", Room: 28 * mib}, ""},
		"local ones full":               {pool.Patch{PayloadSize: 2000 * mib}, vdi("plain"), []SRFact{plain, nfs}, Plan{Way: WayCopy, Source: "plain", Target: "nfs", Room: 4008 * mib}, ""},
		"no room to clone":              {pool.Patch{PayloadSize: 10 * mib}, vdi("full"), []SRFact{full, big}, Plan{}, xapi.PrecheckFailedOutOfSpace},
		"no room to copy":               {pool.Patch{PayloadSize: 9000 * mib}, vdi("plain"), []SRFact{plain, big}, Plan{}, xapi.PrecheckFailedOutOfSpace},
		"the SR is not here":            {pool.Patch{}, vdi("elsewhere"), []SRFact{plain}, Plan{}, xapi.HostCannotSeeSR},
		"not here, but there is a file": {pool.Patch{Filename: "f", Size: 3 * mib}, vdi("elsewhere"), []SRFact{plain}, Plan{Way: WayFetch, Target: "plain", Room: 14 * mib}, ""},
		"a file":                        {pool.Patch{Filename: "f", Size: 3 * mib, PayloadSize: 4 * mib}, nil, []SRFact{nfs, plain}, Plan{Way: WayFetch, Target: "plain", Room: 16 * mib}, ""},
		"a file, and no SR":             {pool.Patch{Filename: "f"}, nil, nil, Plan{Way: WayFetch}, ""},
		"a file, and no room":           {pool.Patch{Filename: "f", Size: 9000 * mib}, nil, []SRFact{plain}, Plan{}, xapi.PrecheckFailedOutOfSpace},
		"neither":                       {pool.Patch{}, nil, []SRFact{plain}, Plan{}, xapi.CannotFindPatch},
	} {
		got, err := MakePlan(Facts{Assignment: pool.Assignment{Patch: c.patch, VDI: c.vdi, PatchRef: "p", Job: pool.Job{Host: "h"}}, SRs: c.srs})
		if c.code != "" {
			e := wantCode(t, err, c.code)
			if c.code == xapi.PrecheckFailedOutOfSpace && (len(e.Params) != 3 || e.Params[0] != "p") {
				t.Errorf("%s: %v", name, e)
			}
			continue
		}
		if c.want.Way == WayClone || c.want.Way == WayCopy {
			c.want.Image = c.vdi.UUID
		}
		if err != nil || got != c.want {
			t.Errorf("%s: %+v, %v; want %+v", name, got, err, c.want)
		}
	}
}

func TestOutputIsCapped(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "output")
	o, err := newOutput(path)
	if err != nil {
		t.Fatal(err)
	}
	chunk := bytes.Repeat([]byte("0123456789abcde\n"), 4096) // 64 KiB
	for range maxOutputFile/len(chunk) + 10 {
		if n, err := o.Write(chunk); n != len(chunk) || err != nil {
			t.Fatal(n, err)
		}
	}
	fmt.Fprint(o, "the end\xff\x00")
	text := o.Text()
	if !strings.HasSuffix(text, "the end\uFFFD") || !strings.HasPrefix(text, "[") || len(text) > maxText+100 {
		t.Errorf("%d bytes, %.40q … %q", len(text), text, text[len(text)-20:])
	}
	o.Restart()
	if o.Text() != "" {
		t.Error("the tail is not forgotten")
	}
	if err := o.Close(); err != nil {
		t.Error(err)
	}
	if st, err := os.Stat(path); err != nil || st.Size() != maxOutputFile {
		t.Errorf("%v %v", st.Size(), err)
	}
	c := &capped{max: 5}
	if n, err := c.Write([]byte("1234567")); n != 7 || err != nil || c.String() != "12345" {
		t.Errorf("%d %v %q", n, err, c.String())
	}
}

func TestParseProgress(t *testing.T) {
	t.Parallel()
	for line, want := range map[string]string{
		"0.5 half": "0.5 half", "1": "1 ", "0": "0 ", " 0.25 x y ": "0.25 x y", "1.0 \x00bin\xff": "1 bin\uFFFD",
		"": "-", "1.5 x": "-", "-0.1": "-", "NaN": "-", "Inf": "-", "text": "-",
	} {
		f, text, ok := parseProgress(line)
		got := "-"
		if ok {
			got = fmt.Sprint(f) + " " + text
		}
		if got != want {
			t.Errorf("%q: %q, want %q", line, got, want)
		}
	}
}

func TestProgressFile(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "progress")
	p, err := newProgress(path)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(p.w, "%s\nnonsense\n0.25 a quarter\n0.5 too soon to show\n", strings.Repeat("x", 5000))
	if err := p.close(); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "0.250 a quarter" {
		t.Errorf("%q %v", b, err)
	}
}

// Progress and output of a running patch come to the task.
func TestReport(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.begin()
	ref, _ := r.patch()
	goOn := make(chan struct{})
	r.verbs["apply"] = func(ctx context.Context, p *dom0test.Process) dom0.Result {
		fmt.Fprintln(p.Stdout, "working")
		f := p.ExtraFiles[0].(io.Writer)
		fmt.Fprintln(f, "0.5 half")
		<-goOn
		return dom0.Result{}
	}
	done := make(chan error, 1)
	go func() { _, err := r.apply(ref); done <- err }()
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		jobs, _, err := r.pool.Jobs(r.pool.Self)
		r.must(err)
		if len(jobs) == 1 && jobs[0].Job.Progress == 0.5 && strings.Contains(jobs[0].Job.Tail, "half\nworking") {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%+v", jobs)
		}
	}
	close(goOn)
	if err := <-done; err != nil {
		t.Error(err)
	}
	r.tidy("at the end")
}

func TestChecks(t *testing.T) {
	t.Parallel()
	var c checks
	id, other := identity{ino: 1, size: 5, nanos: 7}, identity{ino: 1, size: 5, nanos: 8}
	job := xapi.NewUUID()
	if c.passed(id, "d") {
		t.Error("passed before it was seen")
	}
	c.await(job, id, "d")
	if c.passed(id, "d") {
		t.Error("passed before it was confirmed")
	}
	c.confirm(job)
	if !c.passed(id, "d") || c.passed(other, "d") || c.passed(id, "e") || c.passed(id, "") {
		t.Error("it does not remember exactly what was verified")
	}
	c.await(job, other, "d")
	c.forget(job)
	c.confirm(job)
	if c.passed(other, "d") {
		t.Error("what was forgotten is confirmed")
	}
	c.await(job, identity{}, "d")
	c.confirm(job)
	if c.passed(identity{}, "d") {
		t.Error("what has no identity passes")
	}
	for i := range maxGood + 1 {
		c.await(job, identity{ino: uint64(i + 10)}, "d")
		c.confirm(job)
	}
	if len(c.good) > maxGood {
		t.Error("it grows without bound")
	}
}

func TestJournal(t *testing.T) {
	t.Parallel()
	j := journal{filepath.Join(t.TempDir(), "jobs")}
	if good, bad, err := j.entries(); len(good)+len(bad) != 0 || err != nil {
		t.Fatal(good, bad, err)
	}
	e := Entry{Assignment: pool.Assignment{Job: pool.Job{UUID: xapi.NewUUID()}}, Plan: Plan{Way: WayClone, Target: "x"},
		Work: sr.Work(sr.Owner{Pool: xapi.NewUUID(), Host: xapi.NewUUID(), Job: xapi.NewUUID()}, xapi.NewUUID()), Created: time.Now().UTC()}
	if err := j.begin(e); err != nil {
		t.Fatal(err)
	}
	if err := j.order(e.uuid(), Run{Kind: pool.JobApply}); err != nil {
		t.Fatal(err)
	}
	empty, torn, alien := xapi.NewUUID(), xapi.NewUUID(), xapi.NewUUID()
	for id, text := range map[xapi.UUID]string{empty: "", torn: `{"assignment":`, alien: `{}`} {
		os.MkdirAll(j.path(id), 0o700)
		if text != "" {
			os.WriteFile(j.path(id, fileEntry), []byte(text), 0o600)
		}
	}
	os.WriteFile(filepath.Join(j.dir, "garbage"), nil, 0o600)
	good, bad, err := j.entries()
	if err != nil || len(good) != 1 || good[0].Work != e.Work || good[0].Plan != e.Plan || len(bad) != 2 || bad[torn] == nil || bad[alien] == nil {
		t.Errorf("%+v %v %v", good, bad, err)
	}
	if _, err := os.Stat(j.path(empty)); err == nil {
		t.Error("a folder without entry stays")
	}
	if _, ok, err := j.result(e.uuid()); ok || err != nil || j.begun(e.uuid()) {
		t.Error("a result before there is one")
	}
	os.WriteFile(j.path(e.uuid(), fileResult), []byte(`{"error":["A","b"],"checked":true}`), 0o600)
	if res, ok, err := j.result(e.uuid()); !ok || err != nil || res.err().Code != "A" || !res.Checked {
		t.Errorf("%+v %v %v", res, ok, err)
	}
	for range 2 {
		if err := j.end(e.uuid()); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(j.path(e.uuid())); err == nil {
		t.Error("the folder stays")
	}
}

func TestStamps(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	ref, rec := r.patch()
	if stamps, bad, err := readStamps(r.agent.PatchDir); len(stamps)+len(bad) != 0 || err != nil {
		t.Fatal(stamps, bad, err)
	}
	rolled, garbled, alien := xapi.NewUUID(), xapi.NewUUID(), xapi.NewUUID()
	r.must(writeStamp(r.agent.PatchDir, rec.UUID, rec.InfoXML))
	r.must(writeStamp(r.agent.PatchDir, rolled, fmt.Sprintf(testXML, rolled)))
	r.must(writeStamp(r.agent.PatchDir, garbled, "x"))
	r.must(writeStamp(r.agent.PatchDir, alien, fmt.Sprintf(testXML, rolled)))
	os.WriteFile(filepath.Join(appliedDir(r.agent.PatchDir), "README"), nil, 0o644)
	r.must(r.agent.ResyncStamps(t.Context()))
	if r.hostPatch(ref) != "applied" {
		t.Error("the stampfile is not believed")
	}
	other, _, err := r.pool.PatchByUUID(rolled)
	if err != nil || r.hostPatch(other) != "applied" {
		t.Errorf("%v", err)
	}
	for _, id := range []xapi.UUID{garbled, alien} {
		if _, _, err := r.pool.PatchByUUID(id); err == nil {
			t.Errorf("a record came of a stampfile that makes no sense")
		}
	}
	findings, err := r.agent.Examine()
	if err != nil || len(findings) != 2 {
		t.Errorf("%+v %v", findings, err)
	}
	// Garbage in the stampfile of a patch takes nothing away; its absence does.
	r.must(writeStamp(r.agent.PatchDir, rec.UUID, "garbage"))
	r.must(r.agent.ResyncStamps(t.Context()))
	if r.hostPatch(ref) != "applied" {
		t.Error("garbage has taken the record away")
	}
	for range 2 {
		r.must(removeStamp(r.agent.PatchDir, rec.UUID))
	}
	r.must(r.agent.ResyncStamps(t.Context()))
	if r.hostPatch(ref) != "absent" {
		t.Error("the record is still there")
	}
}

// A classic file in the patch-dir is imported, and applied from there.
func TestClassicFile(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.begin()
	id := xapi.NewUUID()
	b := []byte("#!/bin/sh\n# classic\n")
	r.payload[id] = b
	r.agent.Pinned = r.pinned()
	r.verbs["info"] = says(fmt.Sprintf(testXML, id), 0)
	path := filepath.Join(r.dir, "some.patch")
	r.must(os.WriteFile(path, b, 0o600))
	ref, err := r.pool.PatchImport(t.Context(), path)
	r.must(err)
	if _, rec, err := r.pool.PatchByUUID(id); err != nil || rec.Digest != sum(b) || rec.Filename == "" || !rec.VDI.IsNull() {
		t.Errorf("%+v %v", rec, err)
	}
	if _, err := r.pool.PatchImport(t.Context(), path); !xapi.Is(err, xapi.PatchAlreadyExists) {
		t.Errorf("%v", err)
	}
	if names, err := r.agent.Files(); err != nil || len(names) != 1 {
		t.Errorf("%v %v", names, err)
	}
	if _, err := r.apply(ref); err != nil {
		t.Error(err)
	}
	r.tidy("after a classic apply")

	// Without any SR the image lies in the journal.
	r.agent.Storage = nowhere{}
	other := []byte("#!/bin/sh\n# other\n")
	second := xapi.NewUUID()
	r.payload[second] = other
	r.agent.Pinned = r.pinned()
	r.verbs["info"] = says(fmt.Sprintf(testXML, second), 0)
	r.must(os.WriteFile(path, other, 0o600))
	ref, err = r.pool.PatchImport(t.Context(), path)
	r.must(err)
	if _, err := r.apply(ref); err != nil {
		t.Error(err)
	}
	r.tidy("after an apply without an SR")
	_, rec, err := r.pool.PatchByUUID(second)
	r.must(err)
	r.must(os.WriteFile(filepath.Join(r.agent.PatchDir, rec.Filename), b, 0o600))
	if _, err := r.precheck(ref); !xapi.Is(err, xapi.InvalidPatch) {
		t.Errorf("another patch in its place: %v", err)
	}
	r.must(os.Remove(filepath.Join(r.agent.PatchDir, rec.Filename)))
	if _, err := r.precheck(ref); !xapi.Is(err, xapi.CannotFindPatch) {
		t.Errorf("the file is gone: %v", err)
	}
	r.tidy("at the end")
}

type nowhere struct{}

func (nowhere) HostCall(context.Context, string, json.RawMessage) (string, error) { return "", nil }
func (nowhere) Replicas(string) ([]pool.Replica, error)                           { return nil, nil }
func (nowhere) VDIDamaged(context.Context, xapi.Ref, string) error                { return nil }
func (nowhere) Stage(context.Context, pool.StageSpec) (xapi.Ref, error) {
	return "", xapi.NewError(xapi.NotImplemented)
}
func (nowhere) AttachedSRs() ([]pool.AttachedSR, error) { return nil, nil }

// What is no patch is neither placed nor kept.
func TestImportRefuses(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	if _, err := r.pool.PatchImport(t.Context(), r.dir); err == nil {
		t.Error("a folder is a patch")
	}
	path := filepath.Join(r.dir, "x")
	r.must(os.WriteFile(path, []byte("unsigned"), 0o600))
	if _, err := r.pool.PatchImport(t.Context(), path); !xapi.Is(err, xapi.InvalidPatch) {
		t.Errorf("%v", err)
	}
	r.must(os.Symlink(path, filepath.Join(r.agent.PatchDir, "link")))
	if _, err := r.agent.Inspect(t.Context(), "link"); err == nil {
		t.Error("a link out of the patch-dir is followed")
	}
	r.must(os.Remove(filepath.Join(r.agent.PatchDir, "link")))
	if names, _ := os.ReadDir(r.agent.PatchDir); len(names) != 0 {
		t.Errorf("%v", names)
	}
	inside := filepath.Join(r.agent.PatchDir, "lies-here")
	r.must(os.WriteFile(inside, []byte("unsigned"), 0o600))
	if _, err := r.pool.PatchImport(t.Context(), inside); err == nil {
		t.Error("imported")
	}
	if _, err := os.Stat(inside); err != nil {
		t.Error("a file that lay there was removed")
	}
	r.must(r.pool.ImportPatchDir(t.Context())) // logged, and left
	r.tidy("at the end")
}

// Control groups of unknown jobs are ended at start, and doctor names what is
// left.
func TestRecoverStrangers(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	lost := xapi.NewUUID()
	begun := make(chan struct{}, 1)
	r.verbs["info"] = blocks(begun, nil)
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	r.must(err)
	defer null.Close()
	if _, err := r.machine.Spawn(t.Context(), dom0.Cmd{Path: "/x", Args: []string{"x"}, Dir: "/", Stdout: null, Stderr: null, Group: patchGroup(lost)}); err != nil {
		t.Fatal(err)
	}
	asked := dom0.Cmd{Path: "/x", Args: []string{"x"}, Dir: "/", Stdout: null, Stderr: null, Group: "info-" + string(lost)}
	if _, err := r.machine.Spawn(t.Context(), asked); err != nil {
		t.Fatal(err)
	}
	torn := xapi.NewUUID()
	r.must(os.MkdirAll(r.agent.journal.path(torn), 0o700))
	r.must(os.WriteFile(r.agent.journal.path(torn, fileEntry), []byte("{"), 0o600))
	r.must(r.agent.Recover(t.Context()))
	if l := r.machine.Leaks(); len(l) != 0 {
		t.Errorf("%v", l)
	}
	findings, err := r.agent.Examine()
	if err != nil || len(findings) != 1 || findings[0].OK || !strings.Contains(findings[0].Text, string(torn)) {
		t.Errorf("%+v %v", findings, err)
	}
	r.must(os.RemoveAll(r.agent.journal.path(torn)))
	if findings, err = r.agent.Examine(); err != nil || len(findings) != 1 || !findings[0].OK {
		t.Errorf("%+v %v", findings, err)
	}
}

// A patch that leaves too little room is killed, and told.
func TestGuard(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.begin()
	r.agent.KeepFree = func(string) int64 { return 1 << 30 }
	r.prepare = func(d *dom0test.Dom0) {
		d.Room = func(string) (dom0.Space, error) { return dom0.Space{Total: 1 << 40, Free: 1 << 20}, nil }
	}
	ref, _ := r.patch()
	r.verbs["apply"] = func(ctx context.Context, p *dom0test.Process) dom0.Result {
		f, err := os.OpenFile(r.image(p), os.O_WRONLY, 0)
		if err != nil {
			t.Error(err)
			return dom0.Result{ExitCode: 1}
		}
		defer f.Close()
		io.Copy(f, io.LimitReader(zeros{}, 2*ownShare))
		<-p.Killed
		return dom0.Result{}
	}
	_, err := r.apply(ref)
	if e := wantCode(t, err, xapi.PatchApplyFailed); !strings.Contains(e.Params[0], "filesystem of its scratch room got full") {
		t.Errorf("%v", e)
	}
	r.tidy("at the end")
}

// image is the work image of the job that p belongs to.
func (r *rig) image(p *dom0test.Process) string {
	var run Run
	if err := readJSON(filepath.Join(filepath.Dir(p.Dir), fileRun), &run); err != nil {
		r.t.Error(err)
	}
	return run.Image
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = 1
	}
	return len(p), nil
}
