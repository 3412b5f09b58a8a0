package xenapi

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/xapi"
)

// RunPool is the side of runs by a policy, and of what hosts have and lack.
type RunPool interface {
	RunStart(ctx context.Context, patch xapi.Ref, policy pool.Policy) (xapi.UUID, error)
	RunPreview(patch xapi.Ref, policy pool.Policy) (pool.RunInfo, []pool.RunHostInfo, error)
	RunList() ([]pool.RunInfo, error)
	RunShow(run xapi.UUID) (pool.RunInfo, []pool.RunHostInfo, error)
	RunPause(ctx context.Context, run xapi.UUID, by string) error
	RunResume(ctx context.Context, run xapi.UUID) error
	RunCancel(ctx context.Context, run xapi.UUID, by string) error
	RunRetry(ctx context.Context, run xapi.UUID, hosts []xapi.Ref) error
	Why(ctx context.Context, host, patch xapi.Ref) ([]string, error)
	Compliance(patch xapi.Ref) ([]pool.Compliance, error)
	HostExempt(ctx context.Context, host, patch xapi.Ref, exempt bool, reason string) error
	HostResync(ctx context.Context, host xapi.Ref) error
}

// runMessages are not of the XenAPI, whose pool_apply knows no policy. A policy is
// the JSON of pool.Policy; a run is named by its uuid.
func runMessages() []*Message {
	patch, host, policy, run := refParam("patch", "pool_patch"), refParam("host", "host"), textParam("policy"), textParam("run")
	hosts := Param{Name: "hosts", Type: stringSet}.or([]any{})
	return []*Message{
		write("patchd", "run_start", String, runStart, patch, policy, hosts),
		look("patchd", "run_plan", stringMap, runPlan, patch, policy, hosts),
		look("patchd", "run_plan_hosts", SetOf(stringMap), runPlanHosts, patch, policy, hosts),
		look("patchd", "run_list", SetOf(stringMap), runList),
		look("patchd", "run_show", stringMap, runShow, run),
		look("patchd", "run_hosts", SetOf(stringMap), runHosts, run),
		write("patchd", "run_pause", Void, func(c *call) (any, error) {
			return nil, c.srv.Pool.RunPause(c.ctx, xapi.UUID(c.text(0)), c.sess.User)
		}, run),
		write("patchd", "run_resume", Void, func(c *call) (any, error) {
			return nil, c.srv.Pool.RunResume(c.ctx, xapi.UUID(c.text(0)))
		}, run),
		write("patchd", "run_cancel", Void, func(c *call) (any, error) {
			return nil, c.srv.Pool.RunCancel(c.ctx, xapi.UUID(c.text(0)), c.sess.User)
		}, run),
		write("patchd", "run_retry", Void, runRetry, run, hosts),
		look("patchd", "why", stringSet, why, host, patch),
		look("patchd", "compliance", SetOf(stringMap), compliance, patch.or(xapi.NullRef)),
		write("patchd", "host_exempt", Void, func(c *call) (any, error) {
			return nil, c.srv.Pool.HostExempt(c.ctx, c.ref(0), c.ref(1), c.flag(2), c.text(3))
		}, host, patch, boolParam("exempt"), textParam("reason")),
		work("patchd", "host_resync", Void, func(c *call) (any, error) {
			return nil, c.srv.Pool.HostResync(c.ctx, c.ref(0))
		}, host),
	}
}

// policyOf reads the policy of a call, the second parameter; the third are more hosts
// than fit into a text. Code: VALUE_NOT_SUPPORTED.
func policyOf(c *call) (pol pool.Policy, err error) {
	text := c.text(1)
	d := json.NewDecoder(strings.NewReader(text))
	d.DisallowUnknownFields()
	if err = d.Decode(&pol); err == nil {
		if _, more := d.Token(); more != io.EOF {
			err = fmt.Errorf("something follows the policy")
		}
	}
	if err != nil {
		return pol, xapi.NewError(xapi.ValueNotSupported, "policy", fmt.Sprintf("%.64s", text), err.Error())
	}
	for _, h := range c.texts(2) {
		pol.Hosts = append(pol.Hosts, xapi.Ref(h))
	}
	return pol, nil
}

func runStart(c *call) (any, error) {
	pol, err := policyOf(c)
	if err != nil {
		return nil, err
	}
	id, err := c.srv.Pool.RunStart(c.ctx, c.ref(0), pol)
	return string(id), err
}

func runPlan(c *call) (any, error) {
	pol, err := policyOf(c)
	if err != nil {
		return nil, err
	}
	info, _, err := c.srv.Pool.RunPreview(c.ref(0), pol)
	if err != nil {
		return nil, err
	}
	m := runMap(info)
	for _, k := range []string{"uuid", "task", "created", "since", "finished", "state"} {
		delete(m, k) // there is no such run
	}
	return m, nil
}

func runPlanHosts(c *call) (any, error) {
	pol, err := policyOf(c)
	if err != nil {
		return nil, err
	}
	_, hosts, err := c.srv.Pool.RunPreview(c.ref(0), pol)
	return hostMaps(hosts), err
}

func runList(c *call) (any, error) {
	all, err := c.srv.Pool.RunList()
	out := make([]any, len(all))
	for i, info := range all {
		out[i] = runMap(info)
	}
	return out, err
}

func runShow(c *call) (any, error) {
	info, _, err := c.srv.Pool.RunShow(xapi.UUID(c.text(0)))
	if err != nil {
		return nil, err
	}
	return runMap(info), nil
}

func runHosts(c *call) (any, error) {
	_, hosts, err := c.srv.Pool.RunShow(xapi.UUID(c.text(0)))
	return hostMaps(hosts), err
}

func runRetry(c *call) (any, error) {
	var hosts []xapi.Ref
	for _, h := range c.texts(1) {
		hosts = append(hosts, xapi.Ref(h))
	}
	return nil, c.srv.Pool.RunRetry(c.ctx, xapi.UUID(c.text(0)), hosts)
}

// runMap gives a run as texts: moments as of the XenAPI or "", waves and policy as
// JSON, words a sentence a line, and count_STATE for each state that a host is in.
func runMap(r pool.RunInfo) map[string]any {
	m := map[string]any{
		"uuid": string(r.UUID), "patch": string(r.PatchUUID), "patch_name": r.PatchName, "state": string(r.State), "reason": r.Reason,
		"by": r.By, "task": string(r.TaskUUID), "created": when(r.Created), "since": when(r.Since), "finished": when(r.Finished),
		"total": strconv.Itoa(r.Total), "classic": strconv.FormatBool(r.Classic), "words": strings.Join(r.Policy.Words(), "\n"),
		"waves": jsonText(r.Waves), "policy": jsonText(r.Policy), "ended": strconv.FormatBool(r.State.Ended()),
	}
	for state, n := range r.Now {
		m["count_"+string(state)] = strconv.Itoa(n)
	}
	return m
}

// hostMaps gives the hosts of a run as texts.
func hostMaps(hosts []pool.RunHostInfo) []any {
	out := make([]any, len(hosts))
	for i, h := range hosts {
		m := map[string]any{
			"host": string(h.UUID), "name": h.Name, "wave": h.InWave, "state": string(h.State), "reason": h.Reason,
			"since": when(h.Since), "deadline": when(h.Deadline), "attempts": strconv.Itoa(h.Attempts), "away": when(h.Away),
		}
		if len(h.Error) > 0 {
			m["error"] = h.Error[0]
		}
		if h.Proof != nil {
			m["stamp_sha256"], m["payload_sha256"] = h.Proof.Stamp, h.Proof.Payload
		}
		out[i] = m
	}
	return out
}

// when is a moment of the XenAPI, or "".
func when(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return xapi.FormatTime(t)
}

// jsonText is for what is made of texts and numbers only.
func jsonText(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		return ""
	}
	return string(b)
}

func why(c *call) (any, error) {
	lines, err := c.srv.Pool.Why(c.ctx, c.ref(0), c.ref(1))
	out := make([]any, len(lines))
	for i, l := range lines {
		out[i] = l
	}
	return out, err
}

// compliance gives host, host_name, patch, patch_name, value (yes, no, unknown,
// exempt), since and note.
func compliance(c *call) (any, error) {
	all, err := c.srv.Pool.Compliance(c.ref(0))
	out := make([]any, len(all))
	for i, a := range all {
		out[i] = map[string]any{
			"host": string(a.Host), "host_name": a.HostName, "patch": string(a.Patch), "patch_name": a.PatchName,
			"value": a.Value, "since": when(a.Since), "note": a.Note,
		}
	}
	return out, err
}
