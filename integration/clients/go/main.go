// Command go drives patchd by a client library for the XenAPI that is generated
// from the data model and refuses values of another type than the model's.
package main

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"reflect"
	"strings"
	"time"

	xenapi "github.com/terra-farm/go-xen-api-client"
)

type plan struct {
	URL, User, Password string
	Patches             map[string]struct{ File, UUID string }
}

func main() {
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println("ok")
}

func run(file string) error {
	var p plan
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, &p); err != nil {
		return err
	}
	c, err := xenapi.NewClient(p.URL, nil)
	if err != nil {
		return err
	}
	s, err := c.Session.LoginWithPassword(p.User, p.Password, "1.0", "go client")
	if err != nil {
		return err
	}
	f := flow{p, c, s, &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}}
	for _, step := range []func() error{f.session, f.patch, f.storage, f.everything} {
		if err := step(); err != nil {
			return err
		}
	}
	if err := c.Session.Logout(s); err != nil {
		return err
	}
	_, err = c.Pool.GetAll(s)
	return code(err, xenapi.ERR_SESSION_INVALID)
}

type flow struct {
	plan
	c    *xenapi.Client
	s    xenapi.SessionRef
	http *http.Client
}

// code is nil when err is that API error.
func code(err error, want string) error {
	var e *xenapi.Error
	if errors.As(err, &e) && e.Code() == want {
		return nil
	}
	return fmt.Errorf("got %v, want %s", err, want)
}

func same(what string, got, want any) error {
	if !reflect.DeepEqual(got, want) {
		return fmt.Errorf("%s: got %v, want %v", what, got, want)
	}
	return nil
}

func (f flow) host() (xenapi.HostRef, error) { return f.c.Session.GetThisHost(f.s, f.s) }

func (f flow) session() error {
	host, err := f.host()
	if err != nil {
		return err
	}
	rec, err := f.c.Session.GetRecord(f.s, f.s)
	if err != nil {
		return err
	}
	if age := time.Since(rec.LastActive); age < -time.Minute || age > time.Minute {
		return fmt.Errorf("the session was active at %v", rec.LastActive)
	}
	h, err := f.c.Host.GetRecord(f.s, host)
	if err != nil {
		return err
	}
	return errors.Join(same("originator", rec.Originator, "go client"), same("host", rec.ThisHost, host),
		same("version", []int{h.APIVersionMajor, h.APIVersionMinor}, []int{2, 5}))
}

// upload puts a patch under a task and gives its ref.
func (f flow) upload(name string) (xenapi.PoolPatchRef, error) {
	task, err := f.c.Task.Create(f.s, "upload", "by the go client")
	if err != nil {
		return "", err
	}
	b, err := os.ReadFile(f.Patches[name].File)
	if err != nil {
		return "", err
	}
	req, err := http.NewRequest(http.MethodPut, fmt.Sprintf("%s/pool_patch_upload?session_id=%s&task_id=%s", f.URL, f.s, task), bytes.NewReader(b))
	if err != nil {
		return "", err
	}
	res, err := f.http.Do(req)
	if err != nil {
		return "", err
	}
	res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return "", errors.New(res.Status)
	}
	rec, err := f.wait(task)
	if err != nil {
		return "", err
	}
	if rec.Status != xenapi.TaskStatusTypeSuccess {
		return "", fmt.Errorf("upload: %v", rec.ErrorInfo)
	}
	if rec.Finished.Before(rec.Created) || rec.Progress != 1 {
		return "", fmt.Errorf("upload: %+v", rec)
	}
	ref := strings.TrimSuffix(strings.TrimPrefix(rec.Result, "<value>"), "</value>")
	return xenapi.PoolPatchRef(ref), f.c.Task.Destroy(f.s, task)
}

func (f flow) wait(task xenapi.TaskRef) (rec xenapi.TaskRecord, err error) {
	for range 1000 {
		if rec, err = f.c.Task.GetRecord(f.s, task); err != nil || rec.Status != xenapi.TaskStatusTypePending {
			return rec, err
		}
		time.Sleep(20 * time.Millisecond)
	}
	return rec, fmt.Errorf("the task does not end: %+v", rec)
}

func (f flow) patch() error {
	host, err := f.host()
	if err != nil {
		return err
	}
	ref, err := f.upload("first")
	if err != nil {
		return err
	}
	if again, err := f.c.PoolPatch.GetByUUID(f.s, f.Patches["first"].UUID); err != nil || again != ref {
		return fmt.Errorf("%v is not %v: %v", again, ref, err)
	}
	if out, err := f.c.PoolPatch.Precheck(f.s, ref, host); err != nil || out != "checked <ok> & \"fine\"" { // it drops the line's end
		return fmt.Errorf("precheck: %q %v", out, err)
	}
	if out, err := f.c.PoolPatch.Apply(f.s, ref, host); err != nil || out != "applied first" {
		return fmt.Errorf("apply: %q %v", out, err)
	}
	_, err = f.c.PoolPatch.Apply(f.s, ref, host)
	if err := code(err, xenapi.ERR_PATCH_ALREADY_APPLIED); err != nil {
		return err
	}
	if err := code(f.c.PoolPatch.Destroy(f.s, ref), xenapi.ERR_PATCH_IS_APPLIED); err != nil {
		return err
	}
	if err := f.c.PoolPatch.PoolApply(f.s, ref); err != nil {
		return err
	}
	all, err := f.c.HostPatch.GetAllRecords(f.s)
	if err != nil || len(all) != 1 {
		return fmt.Errorf("host patches: %v %v", all, err)
	}
	for _, rec := range all {
		if !rec.Applied || rec.PoolPatch != ref || time.Since(rec.TimestampApplied) > time.Minute {
			return fmt.Errorf("host patch: %+v", rec)
		}
	}
	second, err := f.upload("second")
	if err != nil {
		return err
	}
	for _, call := range []func() error{
		func() error { return f.c.PoolPatch.AddToOtherConfig(f.s, second, "k", "v <&> é") },
		func() error { return f.c.PoolPatch.Clean(f.s, second) },
		func() error { return f.c.PoolPatch.CleanOnHost(f.s, second, host) },
		func() error { return f.c.PoolPatch.PoolClean(f.s, second) },
		func() error { return f.c.PoolPatch.Destroy(f.s, second) },
	} {
		if err := call(); err != nil {
			return err
		}
	}
	_, err = f.c.PoolPatch.GetByUUID(f.s, f.Patches["second"].UUID)
	return code(err, xenapi.ERR_UUID_INVALID)
}

// storage makes a VDI from a record with every field that the library knows,
// most of them empty.
func (f flow) storage() error {
	pools, err := f.c.Pool.GetAllRecords(f.s)
	if err != nil || len(pools) != 1 {
		return fmt.Errorf("pools: %v %v", pools, err)
	}
	var sr xenapi.SRRef
	for _, p := range pools {
		sr = p.DefaultSR
	}
	vdi, err := f.c.VDI.Create(f.s, xenapi.VDIRecord{NameLabel: "made by go", SR: sr, VirtualSize: 1 << 20, Type: xenapi.VdiTypeUser, OtherConfig: map[string]string{"a": "b"}})
	if err != nil {
		return err
	}
	rec, err := f.c.VDI.GetRecord(f.s, vdi)
	if err != nil {
		return err
	}
	if rec.NameLabel != "made by go" || rec.VirtualSize != 1<<20 || rec.OtherConfig["a"] != "b" {
		return fmt.Errorf("VDI: %+v", rec)
	}
	return f.c.VDI.Destroy(f.s, vdi)
}

// everything asks for all records of every class of the library; what is
// served has to have the types of the data model.
func (f flow) everything() error {
	var served int
	classes := reflect.ValueOf(*f.c)
	for i := range classes.NumField() {
		all := classes.Field(i).MethodByName("GetAllRecords")
		if !all.IsValid() {
			continue
		}
		out := all.Call([]reflect.Value{reflect.ValueOf(f.s)})
		err, _ := out[1].Interface().(error)
		if err != nil {
			if code(err, xenapi.ERR_MESSAGE_METHOD_UNKNOWN) != nil {
				return fmt.Errorf("%s: %w", classes.Type().Field(i).Name, err)
			}
			continue
		}
		served++
		if err := f.getters(classes.Field(i), out[0]); err != nil {
			return fmt.Errorf("%s: %w", classes.Type().Field(i).Name, err)
		}
	}
	if served < 20 {
		return fmt.Errorf("only %d classes are served", served)
	}
	return nil
}

// getters calls every getter of a class for each of its objects, but for the
// host's log, which is not one.
func (f flow) getters(class, records reflect.Value) error {
	for _, ref := range records.MapKeys() {
		for i := range class.NumMethod() {
			name := class.Type().Method(i).Name
			m := class.Method(i)
			if !strings.HasPrefix(name, "Get") || name == "GetLog" || m.Type().NumIn() != 2 || m.Type().In(1) != ref.Type() {
				continue
			}
			out := m.Call([]reflect.Value{reflect.ValueOf(f.s), ref})
			err, _ := out[1].Interface().(error)
			if err != nil && code(err, xenapi.ERR_MESSAGE_METHOD_UNKNOWN) != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
	}
	return nil
}
