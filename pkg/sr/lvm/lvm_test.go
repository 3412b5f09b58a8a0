package lvm

import (
	"errors"
	"strings"
	"testing"

	"github.com/patchd/patchd/pkg/dom0/dom0test"
	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/xapi"
)

func TestNamesComeBack(t *testing.T) {
	owner := sr.Owner{Pool: xapi.NewUUID(), Host: xapi.NewUUID(), Job: xapi.NewUUID()}
	group := groupName(xapi.NewUUID())
	for _, n := range []sr.Name{
		sr.Live(xapi.NewUUID()), sr.Live(xapi.NewUUID()).Map(), sr.Part(owner, xapi.NewUUID()),
		sr.Part(owner, xapi.NewUUID()).Map(), sr.Work(owner, xapi.NewUUID()),
		sr.Work(sr.Owner{Pool: "ffffffff-ffff-4fff-bfff-ffffffffffff", Host: owner.Host, Job: owner.Job}, "00000000-0000-4000-8000-000000000000"),
	} {
		lv := logicalName(n)
		if got, ok := volumeName(lv); !ok || got != n {
			t.Errorf("%s became %q and %v, %v", n, lv, got, ok)
		}
		if len(group)+len(lv) > 124 || len(mapperName(group, lv)) > 127 {
			t.Errorf("%s/%s is too long for LVM", group, lv)
		}
		if strings.ContainsFunc(lv, func(r rune) bool {
			return !strings.ContainsRune("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+.-", r)
		}) {
			t.Errorf("%q holds what LVM refuses", lv)
		}
	}
}

func TestForeignNamesAreNotVolumes(t *testing.T) {
	mine := logicalName(sr.Work(sr.Owner{Pool: xapi.NewUUID(), Host: xapi.NewUUID(), Job: xapi.NewUUID()}, xapi.NewUUID()))
	for _, lv := range []string{
		"", "pool", "root", "vdi.", "vdi.x", "vdi." + strings.ToUpper("0a0a0a0a-0a0a-4a0a-8a0a-0a0a0a0a0a0a"), "map.", "W", "X" + mine[1:],
		mine[:80], mine + "A", "lvol0", "trash.0", "[pool_tdata]", "vdi.0a0a0a0a-0a0a-4a0a-8a0a-0a0a0a0a0a0a_x",
	} {
		if n, ok := volumeName(lv); ok {
			t.Errorf("%q was taken for volume %s", lv, n)
		}
	}
}

func TestGroupAndPhysicalVolumeCarryTheUUID(t *testing.T) {
	u := xapi.UUID("01234567-89ab-4def-8123-456789abcdef")
	if g := groupName(u); g != "pd_0123456789ab4def8123456789abcdef" {
		t.Error(g)
	}
	if got, ok := srOfGroup(groupName(u)); !ok || got != u {
		t.Errorf("%s, %v", got, ok)
	}
	if p := physicalUUID(u); p != "012345-6789-ab4d-ef81-2345-6789-abcdef" {
		t.Error(p)
	}
	for _, g := range []string{"", "vg0", "pd_", "pd_" + strings.Repeat("x", 32), "PD_0123456789ab4def8123456789abcdef"} {
		if u, ok := srOfGroup(g); ok {
			t.Errorf("%q was taken for SR %s", g, u)
		}
	}
}

func TestReportsAreRead(t *testing.T) {
	for name, text := range map[string]string{
		"text": `{"report": [{"lv": [{"lv_name":"pool", "lv_size":"1064304640", "chunk_size":"65536"}, {"lv_name":"vdi.x", "lv_size":"512", "chunk_size":"0"}]}]}`,
		"json_std": `{"report": [{"lv": [{"lv_name":"pool", "lv_size":1064304640, "chunk_size":65536, "other":null}, {"lv_name":"vdi.x", "lv_size":512}]}],
			"log": []}`,
	} {
		rows, err := parseReport([]byte(text), "lv")
		if err != nil || len(rows) != 2 {
			t.Fatalf("%s: %v, %v", name, rows, err)
		}
		if n, err := rows[0].number("lv_size"); err != nil || n != 1064304640 {
			t.Errorf("%s: %d, %v", name, n, err)
		}
		if _, err := rows[1].number("absent"); err == nil {
			t.Errorf("%s: a column that is not there was read", name)
		}
	}
	if rows, err := parseReport([]byte(`{"report": [{"pv": []}]}`), "pv"); err != nil || len(rows) != 0 {
		t.Errorf("an empty report: %v, %v", rows, err)
	}
	if _, err := parseReport([]byte("WARNING"), "lv"); err == nil {
		t.Error("text that is no JSON was read")
	}
}

func TestStatusOfDeviceMapperIsRead(t *testing.T) {
	p, err := parsePool("patchd01-pool-tpool: 0 2078720 thin-pool 2 61/512 48/16240 - rw discard_passdown error_if_no_space - 128 \n")
	if want := (poolStatus{61, 512, 48, 16240}); err != nil || p != want {
		t.Errorf("%+v, %v", p, err)
	}
	for _, text := range []string{"", "x: 0 1 thin-pool Fail", "x: 0 1 linear 7:0 0", "x: 0 1 thin-pool 1 a/b c/d"} {
		if _, err := parsePool(text); !errors.Is(err, errNoPool) {
			t.Errorf("%q: %v", text, err)
		}
	}
	const two = "a-pool-tpool: 0 8 thin-pool 1 1/2 3/4 -\nb-pool: 0 8 thin-pool 1 5/6 7/8 -\n"
	for name, want := range map[string]int64{"a-pool": 3, "b-pool": 7} {
		line, found := poolLine(two, name)
		if p, err := parsePool(line); !found || err != nil || p.usedData != want {
			t.Errorf("pool %s: %+v, %v", name, p, err)
		}
	}
	if line, found := poolLine(two, "pool"); found {
		t.Errorf("another pool was found: %q", line)
	}
	m := parseThins("a-b: 0 4194304 thin 6144 20479\na-c: 0 8 thin 0 -\na-d: 0 8 thin Fail\n")
	if len(m) != 2 || m["a-b"] != 6144*512 || m["a-c"] != 0 {
		t.Errorf("%v", m)
	}
}

func TestExtentsAndChunksFollowTheDevice(t *testing.T) {
	const gib, tib = 1 << 30, 1 << 40
	for _, c := range []struct{ size, sector, extent, chunk int64 }{
		{gib, 512, 512, 64 << 10}, {2*tib - gib, 512, 512, 64 << 10}, {2 * tib, 512, 1024, 64 << 10}, {gib, 4096, 4096, 64 << 10},
		{8 * tib, 512, 4096, 128 << 10}, {15 * tib, 512, 4096, 128 << 10},
	} {
		if e := extentFor(c.size, c.sector); e != c.extent {
			t.Errorf("extent for %d, %d: %d, want %d", c.size, c.sector, e, c.extent)
		}
		if k := chunkFor(c.size); k != c.chunk {
			t.Errorf("chunk for %d: %d, want %d", c.size, k, c.chunk)
		}
	}
}

// Hostile are device_configs that must be refused before anything is looked at.
var hostile = []map[string]string{
	nil, {"device": ""}, {"device": "sda"}, {"device": "/etc/passwd"}, {"device": "/dev/../etc/passwd"}, {"device": "/dev//sda"}, {"device": "/dev/"},
	{"device": "/dev/sda\"] }"}, {"device": "/dev/sd a"}, {"device": "/dev/sd|a"}, {"device": "/dev/sda$"}, {"device": "/dev/" + strings.Repeat("a", 5000)},
	{"device": "/dev/sda", "group": "x"}, {"device": "/dev/null"}, {"device": "/dev/no-such-device"},
}

func TestHostileConfigIsRefusedByACode(t *testing.T) {
	d, fake := &Driver{}, dom0test.New(nil)
	for _, device := range hostile {
		c := sr.Config{SR: xapi.NewUUID(), Device: device, Dom0: fake}
		_, probe := d.Probe(t.Context(), c)
		_, attach := d.Attach(t.Context(), c)
		for verb, err := range map[string]error{"probe": probe, "create": d.Create(t.Context(), c), "attach": attach} {
			var coded *xapi.Error
			if !errors.As(err, &coded) {
				t.Errorf("%s with %.100q: %v, want a code", verb, device, err)
			}
		}
	}
	if calls := fake.Calls(); len(calls) != 0 {
		t.Errorf("programs were run: %v", calls)
	}
}
