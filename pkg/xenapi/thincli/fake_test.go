package thincli_test

import (
	"context"
	"fmt"
	"sort"
	"strconv"
	"strings"
	"sync"

	"github.com/patchd/patchd/pkg/xapi"
)

type object = map[string]any

// fake is the API in memory: records, sessions, events and tasks work; every
// other call is written down and does nothing.
type fake struct {
	mu       sync.Mutex
	changed  chan struct{} // closed and replaced at every change
	rev      int
	order    []string          // refs, oldest first
	class    map[string]string // of a ref
	objects  map[string]object
	revs     map[string]int
	sessions map[xapi.Ref]bool
	logins   int
	calls    []string
	fails    map[string]error         // what a method answers
	answers  map[string]any           // what a method returns
	holds    map[string]chan struct{} // a method waits for this
	entered  chan string              // a held method says that it was called
	lose     int                      // how often event.from says EVENTS_LOST to a token
}

func newFake() *fake {
	f := &fake{changed: make(chan struct{}), class: map[string]string{}, objects: map[string]object{},
		revs: map[string]int{}, sessions: map[xapi.Ref]bool{}, fails: map[string]error{},
		answers: map[string]any{}, holds: map[string]chan struct{}{}, entered: make(chan string, 16)}
	return f
}

// ref and uuid make references and uuids that a reader can tell apart.
func ref(n int) string  { return "OpaqueRef:" + uuid(n) }
func uuid(n int) string { return fmt.Sprintf("%08d-0000-4000-8000-%012d", n, n) }

func (f *fake) add(class string, n int, fields object) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	r := ref(n)
	fields["uuid"] = uuid(n)
	f.put(class, r, fields)
	return r
}

// put is called with the lock held.
func (f *fake) put(class, r string, o object) {
	if _, ok := f.objects[r]; !ok {
		f.order = append(f.order, r)
	}
	f.class[r], f.objects[r] = class, o
	f.touch(r)
}

func (f *fake) touch(r string) {
	f.rev++
	f.revs[r] = f.rev
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *fake) get(r string) object {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.objects[r]
}

// edit changes a record; a nil change removes it.
func (f *fake) edit(r string, change object) {
	f.mu.Lock()
	defer f.mu.Unlock()
	old, ok := f.objects[r]
	if !ok {
		return
	}
	if change == nil {
		delete(f.objects, r)
		f.touch(r)
		return
	}
	o := object{}
	for k, v := range old {
		o[k] = v
	}
	for k, v := range change {
		o[k] = v
	}
	f.put(f.class[r], r, o)
}

func (f *fake) log() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]string(nil), f.calls...)
}

func (f *fake) called(method string) bool {
	for _, c := range f.log() {
		if strings.HasPrefix(c, method+"(") {
			return true
		}
	}
	return false
}

func (f *fake) of(class string) []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []string
	for _, r := range f.order {
		if f.class[r] == class && f.objects[r] != nil {
			out = append(out, r)
		}
	}
	return out
}

func (f *fake) open() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.sessions)
}

func (f *fake) Login(_ context.Context, user, password, originator, _ string) (xapi.Ref, error) {
	if user == "slave" {
		return "", xapi.NewError(xapi.HostIsSlave, "192.0.2.7")
	}
	if password != "secret" || originator != "cli" {
		return "", xapi.NewError(xapi.SessionAuthenticationFailed, user, "wrong")
	}
	return f.LoginLocal(context.Background(), originator)
}

func (f *fake) LoginLocal(context.Context, string) (xapi.Ref, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.logins++
	s := xapi.Ref(ref(900000 + f.logins))
	f.sessions[s] = true
	return s, nil
}

func (f *fake) Logout(_ context.Context, s xapi.Ref) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.sessions[s] {
		return xapi.NewError(xapi.SessionInvalid, string(s))
	}
	delete(f.sessions, s)
	return nil
}

func (f *fake) Call(ctx context.Context, s xapi.Ref, method string, params []any) (any, error) {
	f.mu.Lock()
	live, hold, fail := f.sessions[s], f.holds[method], f.fails[method]
	answer, answered := f.answers[method]
	reading := strings.Contains(method, ".get_") || method == "event.from"
	if !reading {
		f.calls = append(f.calls, method+text(params))
	}
	f.mu.Unlock()
	if !live {
		return nil, xapi.NewError(xapi.SessionInvalid, string(s))
	}
	if hold != nil {
		f.entered <- method
		select {
		case <-hold:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if fail != nil {
		return nil, fail
	}
	if answered {
		return answer, nil
	}
	if method == "event.from" {
		return f.from(ctx, params)
	}
	class, message, _ := strings.Cut(method, ".")
	return f.perform(class, message, params)
}

// text is the parameters as one line, maps in the order of their keys.
func text(v any) string {
	switch v := v.(type) {
	case []any:
		parts := make([]string, len(v))
		for i, e := range v {
			parts[i] = text(e)
		}
		return "(" + strings.Join(parts, ", ") + ")"
	case map[string]any:
		var parts []string
		for k, e := range v {
			parts = append(parts, k+"="+text(e))
		}
		sort.Strings(parts)
		return "{" + strings.Join(parts, " ") + "}"
	case string:
		return v
	}
	return fmt.Sprint(v)
}

func (f *fake) perform(class, message string, params []any) (any, error) {
	if v, done, err := f.read(class, message, params); done {
		return v, err
	}
	arg := func(i int) string { return params[i].(string) }
	switch {
	case class == "task" && message == "create":
		f.mu.Lock()
		n := 700000 + len(f.order)
		f.mu.Unlock()
		return f.add("task", n, object{"name_label": arg(0), "status": "pending", "result": "", "error_info": []any{}}), nil
	case class == "task" && message == "cancel":
		if s := f.get(arg(0))["status"]; s != "pending" {
			return nil, xapi.NewError(xapi.OperationNotAllowed, "finished")
		}
		f.edit(arg(0), object{"status": "cancelled"})
	case message == "destroy":
		f.edit(arg(0), nil)
	case strings.HasPrefix(message, "set_"):
		f.edit(arg(0), object{message[4:]: params[1]})
	case strings.HasPrefix(message, "add_to_"):
		m := object{}
		old, _ := f.get(arg(0))[message[7:]].(object)
		for k, v := range old {
			m[k] = v
		}
		if _, ok := m[arg(1)]; ok {
			return nil, xapi.NewError(xapi.MapDuplicateKey, class, message[7:], arg(0), arg(1))
		}
		m[arg(1)] = arg(2)
		f.edit(arg(0), object{message[7:]: m})
	case strings.HasPrefix(message, "remove_from_"):
		m := object{}
		old, _ := f.get(arg(0))[message[12:]].(object)
		for k, v := range old {
			if k != arg(1) {
				m[k] = v
			}
		}
		f.edit(arg(0), object{message[12:]: m})
	}
	return "", nil
}

// read answers the getters.
func (f *fake) read(class, message string, params []any) (v any, done bool, err error) {
	refs := f.of(class)
	switch {
	case message == "get_all":
		out := []any{}
		for _, r := range refs {
			out = append(out, r)
		}
		return out, true, nil
	case message == "get_all_records":
		out := object{}
		for _, r := range refs {
			out[r] = f.get(r)
		}
		return out, true, nil
	case message == "get_by_uuid":
		for _, r := range refs {
			if f.get(r)["uuid"] == params[0] {
				return r, true, nil
			}
		}
		return nil, true, xapi.NewError(xapi.UUIDInvalid, class, params[0].(string))
	case strings.HasPrefix(message, "get_"):
		for _, r := range refs {
			if r != params[0] {
				continue
			}
			if message == "get_record" {
				return f.get(r), true, nil
			}
			return f.get(r)[message[4:]], true, nil
		}
		return nil, true, xapi.NewError(xapi.HandleInvalid, class, params[0].(string))
	}
	return nil, false, nil
}

// from is event.from: the present objects for an empty token, else what
// changed since.
func (f *fake) from(ctx context.Context, params []any) (any, error) {
	since := 0
	if token := params[1].(string); token != "" {
		since, _ = strconv.Atoi(token)
		f.mu.Lock()
		lost := f.lose > 0
		f.lose--
		f.mu.Unlock()
		if lost {
			return nil, xapi.NewError(xapi.EventsLost)
		}
	}
	for {
		f.mu.Lock()
		changed, rev := f.changed, f.rev
		var events []any
		for _, r := range f.order {
			for _, sub := range params[0].([]any) {
				class, one, only := strings.Cut(sub.(string), "/")
				if !strings.EqualFold(class, f.class[r]) || only && one != r || f.revs[r] <= since {
					continue
				}
				e := object{"class": strings.ToLower(class), "ref": r, "operation": "mod"}
				if o := f.objects[r]; o != nil {
					e["snapshot"] = o
				} else if e["operation"] = "del"; since == 0 {
					continue
				}
				events = append(events, e)
			}
		}
		f.mu.Unlock()
		if len(events) > 0 || since == 0 {
			return object{"events": events, "token": strconv.Itoa(rev), "valid_ref_counts": object{}}, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
