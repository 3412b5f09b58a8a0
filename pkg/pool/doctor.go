package pool

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/dustin/go-humanize"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// Finding is one thing that was looked at for an admin.
type Finding struct {
	Check string // what was looked at, such as "room"
	OK    bool
	Class string // the object it is about, or "" for the pool as a whole
	UUID  xapi.UUID
	Name  string
	Text  string // what was found and, when it is not OK, what helps
}

// lowRoom is the room below which an SR is worth a look, in bytes; of one that
// is small, a tenth of its size is.
const lowRoom = 1 << 30

// maxNames bounds the names that one finding tells.
const maxNames = 5

// Examine looks at what this host sees of the pool: default SR, SRs and what
// lies in them, outcomes that nobody knows, undone work, messages. It changes
// nothing.
func (p *Pool) Examine(ctx context.Context) ([]Finding, error) {
	var out []Finding
	looks := []func(context.Context) ([]Finding, error){
		p.examineDefaultSR, p.examineHosts, p.examineSRs, p.examineVDIs, p.examineOutcomes, p.examineMessages,
	}
	if p.Also != nil {
		looks = append(looks, p.Also)
	}
	for _, look := range looks {
		found, err := look(ctx)
		if err != nil {
			return nil, err
		}
		out = append(out, found...)
	}
	return out, nil
}

func (p *Pool) examineDefaultSR(context.Context) ([]Finding, error) {
	_, rec, err := p.Record()
	if err != nil {
		return nil, err
	}
	f := Finding{Check: "default SR", Text: "there is none: `patchd sr set-default SR` says where patches go"}
	if def, err := p.sr(rec.DefaultSR); err == nil {
		f.OK, f.Class, f.UUID, f.Name, f.Text = true, ClassSR, def.UUID, def.NameLabel, "uploads go there"
	} else if !xapi.Is(err, xapi.HandleInvalid) {
		return nil, err
	}
	return []Finding{f}, nil
}

// examineHosts tells which of the other hosts are away; nothing of a pool of one.
func (p *Pool) examineHosts(ctx context.Context) ([]Finding, error) {
	hosts, err := p.HostStates(ctx)
	if err != nil || len(hosts) < 2 {
		return nil, err
	}
	var out []Finding
	there := 0
	for _, h := range hosts {
		f := Finding{Check: "host", Class: ClassHost, UUID: h.UUID, Name: h.NameLabel}
		switch {
		case h.Rank != RankCoordinator && len(h.Keys) == 0:
			f.Text = "its key was revoked, and nobody lets it in. To have it back say `patchd pool leave`, `patchd pool rotate-key` and `patchd pool join` there; else eject it (`patchd pool eject`)"
		case !h.Connected && h.Since.IsZero():
			f.Text = "is not connected: is patchd running there, and does it reach this host?"
		case !h.Connected:
			f.Text = fmt.Sprintf("is not connected since %s: is patchd running there, and does it reach this host?", moment(h.Since))
		default:
			there++
			continue
		}
		out = append(out, f)
	}
	return append(out, Finding{Check: "hosts", OK: there == len(hosts), Text: fmt.Sprintf("%d of %d are connected", there, len(hosts))}), nil
}

// pluggings lists the SRs and why each is not plugged here, or "".
func (p *Pool) pluggings() (srs map[xapi.Ref]SR, unplugged map[xapi.Ref]string, err error) {
	srs, unplugged = map[xapi.Ref]SR{}, map[xapi.Ref]string{}
	err = p.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassSR) {
			var rec SR
			if err := it.Decode(&rec); err != nil {
				return err
			}
			srs[it.Ref], unplugged[it.Ref] = rec, "no host is linked to it: `patchd sr introduce` links one"
		}
		for _, it := range v.List(ClassPBD) {
			var rec PBD
			if err := it.Decode(&rec); err != nil {
				return err
			}
			switch {
			case rec.CurrentlyAttached:
				delete(unplugged, rec.SR)
			case unplugged[rec.SR] != "":
				why := rec.OtherConfig[keyPlugFailed]
				if why != "" {
					why = ", for at the last start: " + why
				}
				unplugged[rec.SR] = fmt.Sprintf("not plugged%s. `patchd sr plug %s` plugs it", why, srs[rec.SR].UUID)
			}
		}
		return nil
	})
	return srs, unplugged, err
}

func (p *Pool) examineSRs(ctx context.Context) ([]Finding, error) {
	srs, unplugged, err := p.pluggings()
	if err != nil {
		return nil, err
	}
	refs := slices.SortedFunc(maps.Keys(srs), func(a, b xapi.Ref) int {
		return strings.Compare(srs[a].NameLabel+string(srs[a].UUID), srs[b].NameLabel+string(srs[b].UUID))
	})
	var out []Finding
	for _, ref := range refs {
		rec := srs[ref]
		f := Finding{Check: "plugged", OK: true, Class: ClassSR, UUID: rec.UUID, Name: rec.NameLabel}
		if f.Text = unplugged[ref]; f.Text != "" {
			f.OK = false
			out = append(out, f)
			continue
		}
		if host, yes := p.elsewhere(ref); yes {
			out = append(out, p.examineFarSR(rec, host, f))
			continue
		}
		found, err := p.examineSR(ctx, ref, f)
		if err != nil {
			f.OK, f.Text = false, "it cannot be looked at: "+brief(err)
			found = []Finding{f}
		}
		out = append(out, found...)
	}
	return out, nil
}

// examineFarSR tells of an SR what the host that works on it has told.
func (p *Pool) examineFarSR(rec SR, host xapi.Ref, about Finding) Finding {
	name := string(host)
	if h, err := p.host(host); err == nil {
		name = strings.TrimSpace(fmt.Sprintf("%s (%s)", h.NameLabel, h.UUID))
	}
	free, low := max(0, rec.PhysicalSize-rec.PhysicalUtilisation), min(lowRoom, rec.PhysicalSize/10)
	about.Check, about.OK = "room", free >= low
	about.Text = fmt.Sprintf("plugged on host %s, which has told that %s are free", name, bytesText(free))
	if !about.OK {
		about.Text += ": remove disk images there (`patchd vdi list`)"
	}
	return about
}

func (p *Pool) host(ref xapi.Ref) (rec Host, err error) {
	err = p.Store.View(func(v *store.View) error {
		rec, err = store.Get[Host](v, ClassHost, ref)
		return err
	})
	return rec, err
}

// examineSR looks into one plugged SR; about is a finding that names it.
func (p *Pool) examineSR(ctx context.Context, ref xapi.Ref, about Finding) ([]Finding, error) {
	before, err := p.known(ref)
	if err != nil {
		return nil, err
	}
	repo, release, err := p.useSR(ref)
	if err != nil {
		return nil, err
	}
	defer release()
	stat, err := repo.Stat(ctx)
	if err != nil {
		return nil, err
	}
	volumes, err := repo.Scan(ctx)
	if err != nil {
		return nil, err
	}
	say := func(check string, ok bool, format string, args ...any) Finding {
		about.Check, about.OK, about.Text = check, ok, fmt.Sprintf(format, args...)
		return about
	}
	promised, err := p.promised(ctx, repo, ref, math.MaxInt64)
	if err != nil {
		return nil, err
	}
	of := ""
	if promised > 0 {
		of = fmt.Sprintf(", and %s of it are promised to uploads, copies and jobs", bytesText(promised))
	}
	low := min(lowRoom, stat.PhysicalSize/10)
	out := []Finding{say("room", stat.Free >= low, "plugged; %s may still be written%s", bytesText(stat.Free), of)}
	if stat.Free < low {
		out[0] = say("room", false, "only %s may still be written%s: remove disk images there (`patchd vdi list`), or set another default SR", bytesText(stat.Free), of)
	}
	found := p.sortVolumes(before, volumes)
	for _, k := range []struct {
		check string
		names []string
		cure  string
	}{
		{"disk images without a record", found.orphans, fmt.Sprintf("`patchd sr scan %s` gives them records as plain VDIs", about.UUID)},
		{"working data of jobs that are over", found.dead, fmt.Sprintf("`patchd sr scan %s` removes it, and so does the hourly sweep", about.UUID)},
		{"working data of other hosts or pools", found.foreign, "left alone; remove it by hand if that host is gone for good"},
		{"block maps without an image", found.maps, "nothing reads them; left alone, for patchd has not made them or has lost the record: remove them by hand"},
	} {
		if len(k.names) > 0 {
			out = append(out, say(k.check, false, "%s: %s", someOf(k.names, len(k.names)), k.cure))
		}
	}
	names, total, err := sr.Strangers(ctx, repo, maxNames)
	if err != nil {
		return nil, err
	}
	if total > 0 {
		out = append(out, say("foreign files", false, "%s: not patchd's, left alone; they take up room of the SR", someOf(names, total)))
	}
	return out, nil
}

// unaccounted are volumes that no record accounts for, by what they are.
type unaccounted struct{ orphans, dead, foreign, maps []string }

// sortVolumes picks the volumes that no record accounts for. A volume that came
// after the records were read is accounted for by the records as they are now.
func (p *Pool) sortVolumes(before known, volumes []sr.Volume) (u unaccounted) {
	now, err := p.known("")
	accounted := func(id xapi.UUID) bool { return before.has(id) || err != nil || now.has(id) }
	for _, v := range volumes {
		o, name := v.Name.Owner, v.Name.String()
		switch {
		case v.Name.Kind == sr.KindLive:
			if !accounted(v.Name.VDI) {
				u.orphans = append(u.orphans, name)
			}
		case v.Name.Kind == sr.KindMap:
			if !accounted(v.Name.VDI) {
				u.maps = append(u.maps, name)
			}
		case o.Pool != p.PoolUUID || o.Host != p.SelfUUID:
			u.foreign = append(u.foreign, name)
		case !p.ownerAlive(o.Job):
			u.dead = append(u.dead, name)
		}
	}
	return u
}

func bytesText(n int64) string { return humanize.IBytes(uint64(max(n, 0))) }

// someOf names a few of total things.
func someOf(names []string, total int) string {
	shown := names[:min(len(names), maxNames)]
	text := make([]string, len(shown))
	for i, n := range shown {
		text[i] = fmt.Sprintf("%.200q", n)
	}
	if total > len(shown) {
		return fmt.Sprintf("%s and %d more", strings.Join(text, ", "), total-len(shown))
	}
	return strings.Join(text, ", ")
}

// examineVDIs looks for records whose image is gone or damaged, tells which
// images nobody has looked at yet, and looks for work that could not be undone.
func (p *Pool) examineVDIs(context.Context) (out []Finding, err error) {
	var unchecked []string
	err = p.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassVDI) {
			var rec VDI
			if err := it.Decode(&rec); err != nil {
				return err
			}
			f := Finding{Check: "image", Class: ClassVDI, UUID: rec.UUID, Name: rec.NameLabel}
			switch {
			case rec.Missing:
				f.Text = "its image is gone from the SR: `patchd vdi destroy " + string(rec.UUID) + "` removes the record; upload the patch again if it was one"
			case rec.Damage != "":
				f.Check, f.Text = "damage", rec.Damage+": "+cureOf(rec)
			case rec.Map != "" && rec.Checked.IsZero():
				unchecked = append(unchecked, string(rec.UUID))
				continue
			default:
				continue
			}
			out = append(out, f)
		}
		for _, it := range v.List(ClassIntent) {
			var in Intent
			if err := it.Decode(&in); err != nil {
				return err
			}
			if in.Undo && !p.storage.isActive(in.UUID) {
				out = append(out, undoFinding(v, in))
			}
		}
		return nil
	})
	if len(unchecked) > 0 {
		out = append(out, Finding{Check: "images never checked", OK: true,
			Text: someOf(unchecked, len(unchecked)) + ": the scrub comes to them in time; `patchd vdi verify VDI` checks one now"})
	}
	return out, err
}

// undoFinding tells of an operation that has failed and could not be undone.
func undoFinding(v *store.View, in Intent) Finding {
	f := Finding{Check: "undo", Class: ClassVDI, UUID: in.VDI}
	what := "what was begun with it"
	if in.Kind == IntentMakeSR || in.Kind == IntentRemoveSR {
		f.Class, f.UUID = ClassSR, in.SRUUID
		what += fmt.Sprintf(" (type %s, %s)", in.Type, placeOf(in.Device))
	} else if of, err := store.Get[SR](v, ClassSR, in.SR); err == nil {
		what += fmt.Sprintf(" on SR %s (%s)", of.NameLabel, of.UUID)
	}
	f.Text = fmt.Sprintf("%s at %s (%s) could not be undone yet; it is tried hourly and at each start, and the log says why it fails",
		what, xapi.FormatTime(in.Created), in.Kind)
	return f
}

// placeOf writes a device_config in one line.
func placeOf(device map[string]string) string {
	var words []string
	for _, key := range slices.Sorted(maps.Keys(device)) {
		words = append(words, key+"="+device[key])
	}
	return strings.Join(words, ",")
}

// examineOutcomes looks for applies that were begun and whose end is unknown.
func (p *Pool) examineOutcomes(context.Context) (out []Finding, err error) {
	err = p.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassHostPatch) {
			var hp HostPatch
			if err := it.Decode(&hp); err != nil {
				return err
			}
			if hp.OtherConfig[KeyState] != StateUnknown {
				continue
			}
			patch, perr := store.Get[Patch](v, ClassPatch, hp.PoolPatch)
			host, herr := store.Get[Host](v, ClassHost, hp.Host)
			if err := errors.Join(perr, herr); err != nil {
				return err
			}
			out = append(out, Finding{Check: "apply outcome", Class: ClassPatch, UUID: patch.UUID, Name: patch.NameLabel,
				Text: fmt.Sprintf("nobody knows how its apply on host %s ended: look there, then `patchd patch settle %s %s --applied` or `--not-applied`", host.NameLabel, patch.UUID, host.UUID)})
		}
		return nil
	})
	if err == nil && len(out) == 0 {
		out = []Finding{{Check: "apply outcomes", OK: true, Text: "all known"}}
	}
	return out, err
}

func (p *Pool) examineMessages(context.Context) (out []Finding, err error) {
	err = p.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassMessage) {
			var m Message
			if err := it.Decode(&m); err != nil {
				return err
			}
			out = append(out, Finding{Check: "message " + m.Name, OK: m.Name == MessageVDIRepaired, Class: "message", UUID: m.UUID,
				Text: fmt.Sprintf("%s: %s (`patchd message destroy %s` when it is dealt with)", xapi.FormatTime(m.Timestamp), m.Body, m.UUID)})
		}
		return nil
	})
	return out, err
}
