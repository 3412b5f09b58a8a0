package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"sort"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/xapi"
)

func newRun(g *global) *cobra.Command {
	cmd := &cobra.Command{Use: "run", Short: "patches on their way to many hosts, by a policy"}
	cmd.AddCommand(
		newRunList(g),
		runCommand(g, "show", "show a run and its hosts; without RUN the newest", func(ctx context.Context, c *client, r *shownRun) error {
			return g.printRun(os.Stdout, r)
		}),
		runCommand(g, "watch", "follow a run to its end; without RUN the newest", func(ctx context.Context, c *client, r *shownRun) error {
			return g.watchRun(ctx, c, r.id())
		}),
		runCommand(g, "pause", "begin nothing more; what is at work goes on; without RUN the open one", func(ctx context.Context, c *client, r *shownRun) error {
			return g.turnRun(ctx, c, r, "run_pause", "paused")
		}),
		runCommand(g, "resume", "let a paused run go on; without RUN the open one", func(ctx context.Context, c *client, r *shownRun) error {
			return g.turnRun(ctx, c, r, "run_resume", "goes on")
		}),
		runCommand(g, "cancel", "cancel what is at work, and begin nothing more; without RUN the open one", func(ctx context.Context, c *client, r *shownRun) error {
			return g.turnRun(ctx, c, r, "run_cancel", "cancel asked for")
		}),
		newRunRetry(g),
	)
	return cmd
}

// shownRun is a run as run_show and run_hosts tell it.
type shownRun struct {
	Run   record   `json:"run"`
	Hosts []record `json:"hosts"`
}

func (r *shownRun) id() string { return r.Run.text("uuid") }

func (r *shownRun) ended() bool { return r.Run.text("ended") == "true" }

// failure tells what of a run that has ended did not work; nil: nothing.
func (r *shownRun) failure() error {
	var bad []string
	names := hostLabels(r.Hosts, "name")
	for i, h := range r.Hosts {
		if s := h.text("state"); s == string(pool.HostFailed) || s == string(pool.HostUnknown) {
			bad = append(bad, fmt.Sprintf("%s %s: %s", names[i], s, strings.TrimSpace(h.text("reason"))))
		}
	}
	state := r.Run.text("state")
	if state == string(pool.RunDone) && len(bad) == 0 {
		return nil
	}
	const most = 5
	if len(bad) > most {
		bad = append(bad[:most], fmt.Sprintf("and %d more", len(bad)-most))
	}
	text := fmt.Sprintf("run %s is %s", r.id(), state)
	if reason := r.Run.text("reason"); reason != "" {
		text += ": " + reason
	}
	if len(bad) > 0 {
		text += "\n  " + strings.Join(bad, "\n  ")
	}
	return fmt.Errorf("%s\n`patchd run retry %s` goes on once the cause is gone", text, r.id())
}

// hostLabels are the names of hosts for people, in their order: field of the record,
// with the uuid behind a name that several hosts have.
func hostLabels(hosts []record, field string) []string {
	count := map[string]int{}
	for _, h := range hosts {
		count[h.text(field)]++
	}
	out := make([]string, len(hosts))
	for i, h := range hosts {
		out[i] = h.text(field)
		if count[out[i]] > 1 {
			out[i] = (&named{h.text("host"), out[i]}).String()
		}
	}
	return out
}

// openRun is the uuid of the one run that has not ended.
func (c *client) openRun(ctx context.Context) (string, error) {
	var all []record
	if err := c.call(ctx, &all, "patchd.run_list"); err != nil {
		return "", err
	}
	var open []string
	for _, r := range all {
		if r.text("ended") != "true" {
			open = append(open, r.text("uuid"))
		}
	}
	switch len(open) {
	case 1:
		return open[0], nil
	case 0:
		return "", fmt.Errorf("no run is open; `patchd run list` shows all")
	}
	return "", usagef("%d runs are open: name one; `patchd run list` shows them", len(open))
}

// run reads a run by its uuid; "" is the newest.
func (c *client) run(ctx context.Context, id string) (*shownRun, error) {
	if id == "" {
		var all []record
		if err := c.call(ctx, &all, "patchd.run_list"); err != nil {
			return nil, err
		}
		if len(all) == 0 {
			return nil, fmt.Errorf("there has been no run; `patchd patch pool-apply` begins one")
		}
		id = all[len(all)-1].text("uuid")
	}
	r := &shownRun{}
	if err := c.call(ctx, &r.Run, "patchd.run_show", id); err != nil {
		return nil, err
	}
	unpackRun(r.Run)
	return r, c.call(ctx, &r.Hosts, "patchd.run_hosts", id)
}

// unpackRun makes values of the fields that come as JSON in a text: the policy, and
// the names of the waves.
func unpackRun(r record) {
	for _, field := range []string{"policy", "waves"} {
		text, _ := r[field].(string)
		var v any
		if json.Unmarshal([]byte(text), &v) != nil {
			continue
		}
		if v == nil {
			v = []any{}
		}
		r[field] = v
	}
}

// runCommand does something with one run.
func runCommand(g *global, name, short string, f func(ctx context.Context, c *client, r *shownRun) error) *cobra.Command {
	return &cobra.Command{
		Use: name + " [RUN]", Short: short, Args: cobra.MaximumNArgs(1), ValidArgsFunction: g.completeRun,
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.with(cmd.Context(), func(ctx context.Context, c *client) error {
				id, err := strings.Join(args, ""), error(nil)
				if id == "" && name != "show" && name != "watch" {
					id, err = c.openRun(ctx)
				}
				if err != nil {
					return err
				}
				r, err := c.run(ctx, id)
				if err != nil {
					return err
				}
				return f(ctx, c, r)
			})
		},
	}
}

// completeRun offers the runs to the shell, over the unix socket only.
func (g *global) completeRun(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	var out []cobra.Completion
	if g.fromEnv() != nil || len(args) > 0 || g.server != "" {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	err := g.with(cmd.Context(), func(ctx context.Context, c *client) error {
		var all []record
		err := c.call(ctx, &all, "patchd.run_list")
		for i := len(all) - 1; i >= 0; i-- {
			out = append(out, cobra.CompletionWithDesc(all[i].text("uuid"), all[i].text("patch_name")+" "+all[i].text("state")))
		}
		return err
	})
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp // a shell has no place for errors
	}
	return out, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveKeepOrder
}

func (g *global) turnRun(ctx context.Context, c *client, r *shownRun, message, said string) error {
	if err := c.call(ctx, nil, "patchd."+message, r.id()); err != nil {
		return err
	}
	return g.saidOfRun(said, r.id())
}

// saidOfRun says that something was done with a run.
func (g *global) saidOfRun(said, id string) error {
	if g.json() {
		return printJSON(os.Stdout, map[string]string{"uuid": id})
	}
	fmt.Printf("%s: run %s\n", said, id)
	return nil
}

func newRunList(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "list the runs that are remembered", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return g.with(cmd.Context(), func(ctx context.Context, c *client) error {
				all := []record{}
				if err := c.call(ctx, &all, "patchd.run_list"); err != nil {
					return err
				}
				for _, r := range all {
					unpackRun(r)
				}
				if g.json() {
					return printJSON(os.Stdout, all)
				}
				rows := make([][]string, len(all))
				for i, r := range all {
					rows[i] = []string{r.text("uuid"), r.text("patch_name"), r.text("state"), r.text("total"), counts(r), dateText(r.text("created")), r.text("reason")}
				}
				printTable(os.Stdout, []string{"UUID", "PATCH", "STATE", "HOSTS", "OF THEM", "CREATED", "REASON"}, rows)
				return nil
			})
		},
	}
}

// counts tells how many hosts of a run are in which state.
func counts(r record) string {
	var parts []string
	for k := range r {
		if state, ok := strings.CutPrefix(k, "count_"); ok {
			parts = append(parts, r.text(k)+" "+state)
		}
	}
	sort.Strings(parts)
	return strings.Join(parts, ", ")
}

func newRunRetry(g *global) *cobra.Command {
	var detach bool
	cmd := &cobra.Command{
		Use: "retry RUN [HOST…]", Short: "take up a run that has ended: what failed, and what had no turn", Args: cobra.MinimumNArgs(1),
		ValidArgsFunction: g.completeRun,
		Long: "Takes up a run that has ended: the hosts that failed, were away or cancelled, and those that never\n" +
			"had their turn; with HOST only those. A host whose outcome is unknown is tried again only when it\n" +
			"is named, since the patch may then run on it a second time.",
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.with(cmd.Context(), func(ctx context.Context, c *client) error {
				hosts, err := c.hostRefs(ctx, args[1:])
				if err != nil {
					return err
				}
				if err := c.call(ctx, nil, "patchd.run_retry", args[0], hosts); err != nil {
					return err
				}
				if detach {
					return g.saidOfRun("goes on", args[0])
				}
				return g.watchRun(ctx, c, args[0])
			})
		},
	}
	cmd.Flags().BoolVar(&detach, "detach", false, "do not wait for the end")
	return cmd
}

// hostRefs finds hosts by uuid or name.
func (c *client) hostRefs(ctx context.Context, names []string) ([]string, error) {
	refs := []string{}
	for _, n := range names {
		ref, _, err := c.find(ctx, "host", n)
		if err != nil {
			return nil, err
		}
		refs = append(refs, ref)
	}
	return refs, nil
}

// printRun shows a run and all of its hosts.
func (g *global) printRun(w io.Writer, r *shownRun) error {
	if g.json() {
		return printJSON(w, r)
	}
	for _, line := range runHead(r) {
		fmt.Fprintln(w, line)
	}
	if words := r.Run.text("words"); words != "" {
		fmt.Fprintln(w, "policy   "+strings.ReplaceAll(words, "\n", "\n         "))
	}
	fmt.Fprintln(w)
	printTable(w, hostTitles, hostRows(r.Hosts))
	return nil
}

func runHead(r *shownRun) []string {
	state := r.Run.text("state")
	if reason := r.Run.text("reason"); reason != "" {
		state += ": " + reason
	}
	lines := []string{
		fmt.Sprintf("patch    %s (%s)", r.Run.text("patch_name"), r.Run.text("patch")),
		fmt.Sprintf("hosts    %s: %s", r.Run.text("total"), counts(r.Run)),
	}
	if r.id() != "" {
		lines = append([]string{"run      " + r.id()}, append(lines, "state    "+state)...)
	}
	return lines
}

var hostTitles = []string{"HOST", "WAVE", "STATE", "SINCE", "REASON"}

func hostRows(hosts []record) [][]string {
	rows := make([][]string, len(hosts))
	names := hostLabels(hosts, "name")
	for i, h := range hosts {
		reason, _, _ := strings.Cut(strings.TrimSpace(h.text("reason")), "\n")
		rows[i] = []string{names[i], h.text("wave"), h.text("state"), dateText(h.text("since")), reason}
	}
	return rows
}

// watchRun follows a run to its end. On a terminal its table is drawn in place, else
// each change is a line, and as JSON the end is one object. The error tells of what
// did not work.
func (g *global) watchRun(ctx context.Context, c *client, id string) error {
	show := &runScreen{out: os.Stdout, was: map[string]string{}}
	if g.json() {
		show = nil
	} else if term.IsTerminal(int(os.Stdout.Fd())) {
		show.width, show.height, _ = term.GetSize(int(os.Stdout.Fd()))
	}
	token := ""
	for {
		r, err := c.run(ctx, id)
		if err == nil && show != nil {
			show.draw(r)
		}
		if err == nil && r.ended() {
			if g.json() {
				err = printJSON(os.Stdout, r)
			}
			if err == nil {
				err = r.failure()
			}
			return err
		}
		if err == nil {
			token, err = c.runChange(ctx, r, token)
		}
		if ctx.Err() != nil {
			return fmt.Errorf("interrupted: the run goes on. `patchd run watch %[1]s` follows it, `patchd run cancel %[1]s` ends it", id)
		}
		if err != nil {
			return err
		}
	}
}

// runChange waits until something about a run may have changed: its task, or what
// hosts have.
func (c *client) runChange(ctx context.Context, r *shownRun, token string) (string, error) {
	classes := []string{"host_patch"}
	var task string
	err := c.call(ctx, &task, "task.get_by_uuid", r.Run.text("task"))
	switch {
	case err == nil:
		classes = append(classes, "task/"+task)
	case !xapi.Is(err, xapi.UUIDInvalid):
		return "", err
	}
	var batch struct {
		Token string `json:"token"`
	}
	if err := c.call(ctx, &batch, "event.from", classes, token, 30.0); err != nil && !xapi.Is(err, xapi.EventsLost) {
		return "", err
	}
	return batch.Token, nil
}

// runScreen shows a run that goes on.
type runScreen struct {
	out           io.Writer
	width, height int // of the terminal; 0: there is none
	drawn         int // lines to go back
	was           map[string]string
}

func (s *runScreen) draw(r *shownRun) {
	if s.height == 0 {
		s.lines(r)
		return
	}
	var b strings.Builder
	for _, line := range runHead(r) {
		b.WriteString(line + "\n")
	}
	hosts := r.Hosts
	if room := max(s.height-8, 3); len(hosts) > room {
		hosts = busiest(hosts)[:room]
	}
	printTable(&b, hostTitles, hostRows(hosts))
	if len(hosts) < len(r.Hosts) {
		fmt.Fprintf(&b, "and %d more; `patchd run show` shows all\n", len(r.Hosts)-len(hosts))
	}
	lines := strings.Split(strings.TrimRight(b.String(), "\n"), "\n")
	if s.drawn > 0 {
		fmt.Fprintf(s.out, "\x1b[%dA\x1b[J", s.drawn)
	}
	for _, l := range lines {
		if runes := []rune(l); s.width > 0 && len(runes) > s.width {
			l = string(runes[:s.width])
		}
		fmt.Fprintln(s.out, l)
	}
	s.drawn = len(lines)
}

// busiest puts the hosts first that an admin wants to see: those that failed, then
// those at work.
func busiest(hosts []record) []record {
	rank := map[string]int{
		string(pool.HostFailed): -4, string(pool.HostUnknown): -4, string(pool.HostApplying): -3, string(pool.HostPrechecking): -2, string(pool.HostAway): -1,
	}
	sorted := append([]record(nil), hosts...)
	sort.SliceStable(sorted, func(i, j int) bool { return rank[sorted[i].text("state")] < rank[sorted[j].text("state")] })
	return sorted
}

// lines tells what has changed since the last time.
func (s *runScreen) lines(r *shownRun) {
	tell := func(uuid, name, state, reason string) {
		if s.was[uuid] == state {
			return
		}
		s.was[uuid] = state
		if reason != "" {
			state += ": " + reason
		}
		fmt.Fprintln(s.out, name+" "+state)
	}
	names := hostLabels(r.Hosts, "name")
	for i, h := range r.Hosts {
		uuid, state := h.text("host"), h.text("state")
		if _, known := s.was[uuid]; !known && state == string(pool.HostWaiting) {
			s.was[uuid] = state
		}
		tell(uuid, names[i], state, strings.TrimSpace(h.text("reason")))
	}
	tell(r.id(), "run "+r.id(), r.Run.text("state"), r.Run.text("reason"))
}

// policyFlags are the flags of pool-apply that make a policy.
type policyFlags struct {
	pol                pool.Policy
	hosts              []string
	canary             string // a number, or names
	deadline, waitAway time.Duration
	detach, dryRun     bool
}

// policyFlagNames are those that make pool-apply a run by a policy.
var policyFlagNames = []string{
	"hosts", "tag", "at-once", "canary", "waves", "coordinator", "stop-after", "stop-percent", "deadline", "wait-away", "no-precheck", "dry-run", "detach",
}

func (p *policyFlags) register(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringSliceVar(&p.hosts, "hosts", nil, "only these hosts, by name or uuid")
	f.StringSliceVar(&p.pol.Tags, "tag", nil, "only the hosts with one of these tags")
	f.IntVar(&p.pol.AtOnce, "at-once", 1, "how many hosts apply at the same time")
	f.StringVar(&p.canary, "canary", "", "so many hosts first, or these (names or uuids); one failure there stops the run")
	f.StringSliceVar(&p.pol.Waves, "waves", nil, "sizes of the waves after the canary, as 10%,50% or 1,5; the rest is the last")
	f.StringVar(&p.pol.Coordinator, "coordinator", pool.CoordinatorFirst, "when the coordinator comes: first, last or any")
	f.IntVar(&p.pol.StopAfter, "stop-after", 0, "stop when so many hosts have failed (default: at the first)")
	f.IntVar(&p.pol.StopPercent, "stop-percent", 0, "stop when this percentage of the hosts has failed")
	f.DurationVar(&p.deadline, "deadline", 0, "how long one host may take (default 4h)")
	f.DurationVar(&p.waitAway, "wait-away", 0, "how long a host that is away is waited for (default: it is passed over)")
	f.BoolVar(&p.pol.NoPrecheck, "no-precheck", false, "no precheck of all hosts before the first is touched; each host's own stays")
	f.BoolVar(&p.dryRun, "dry-run", false, "only tell what would be done")
	f.BoolVar(&p.detach, "detach", false, "do not wait for the end")
	completeWords(cmd, "coordinator", pool.CoordinatorFirst, pool.CoordinatorLast, pool.CoordinatorAny)
}

// check refuses flags that say nothing: an empty list of hosts, as of a variable that
// is not set, must not become every host.
func (p *policyFlags) check(cmd *cobra.Command) error {
	for name, list := range map[string][]string{"hosts": p.hosts, "tag": p.pol.Tags, "canary": {p.canary}, "waves": p.pol.Waves} {
		if cmd.Flags().Changed(name) && strings.Trim(strings.Join(list, ""), " ") == "" {
			return usagef("--%s is empty: say what it shall be, or leave the flag out", name)
		}
	}
	if p.pol.AtOnce < 1 {
		return usagef("--at-once: %d is not the number of hosts that apply at the same time", p.pol.AtOnce)
	}
	return nil
}

func (p *policyFlags) given(cmd *cobra.Command) bool {
	for _, n := range policyFlagNames {
		if cmd.Flags().Changed(n) {
			return true
		}
	}
	return false
}

// policy makes the policy that the flags say, as JSON, and the hosts named.
func (p *policyFlags) policy(ctx context.Context, c *client) (policy string, hosts []string, err error) {
	pol := p.pol
	pol.HostDeadline, pol.WaitAway = int64(p.deadline/time.Second), int64(p.waitAway/time.Second)
	if hosts, err = c.hostRefs(ctx, p.hosts); err != nil {
		return "", nil, err
	}
	if _, err := fmt.Sscanf(p.canary, "%d", &pol.Canary); p.canary != "" && (err != nil || fmt.Sprint(pol.Canary) != p.canary) {
		pol.Canary = 0
		named, err := c.hostRefs(ctx, strings.Split(p.canary, ","))
		if err != nil {
			return "", nil, err
		}
		for _, h := range named {
			pol.CanaryHosts = append(pol.CanaryHosts, xapi.Ref(h))
		}
	}
	b, err := json.Marshal(pol)
	return string(b), hosts, err
}

// start begins a run by the policy, or tells what it would do.
func (p *policyFlags) start(ctx context.Context, g *global, c *client, patch string) error {
	policy, hosts, err := p.policy(ctx, c)
	if err != nil {
		return err
	}
	if p.dryRun {
		r := &shownRun{}
		if err := c.call(ctx, &r.Run, "patchd.run_plan", patch, policy, hosts); err != nil {
			return err
		}
		if err := c.call(ctx, &r.Hosts, "patchd.run_plan_hosts", patch, policy, hosts); err != nil {
			return err
		}
		unpackRun(r.Run)
		return g.printRun(os.Stdout, r)
	}
	var id string
	if err := c.call(ctx, &id, "patchd.run_start", patch, policy, hosts); err != nil {
		return err
	}
	if p.detach {
		return g.saidOfRun("begun", id)
	}
	return g.watchRun(ctx, c, id)
}
