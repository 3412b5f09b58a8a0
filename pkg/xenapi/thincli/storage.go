package thincli

import (
	"strconv"
	"strings"

	"github.com/patchd/patchd/pkg/xapi"
)

func srCommands() []*command {
	return []*command{
		{name: "sr-create", required: []string{"name-label", "type"},
			optional: []string{"name-description", "host-uuid", "device-config:", "shared", "physical-size", "content-type", "sm-config:"},
			help:     "Makes an SR and links it to the host, or with shared=true to every host. device-config:key-filename=FILE sends the content of FILE.",
			do:       srCreate},
		{name: "sr-introduce", required: []string{"name-label", "type", "uuid"},
			optional: []string{"name-description", "shared", "content-type", "sm-config:"},
			help:     "Makes the pool know an SR that exists already.", do: srIntroduce},
		{name: "sr-probe", required: []string{"type"}, optional: []string{"host-uuid", "device-config:", "sm-config:"},
			help: "Asks a driver what it finds at a place.", do: srProbe},
		onObject("sr-scan", "SR", "scan", "Compares the records of an SR with what is on it."),
		onObject("sr-destroy", "SR", "destroy", "Destroys an SR and what is on it."),
		onObject("sr-forget", "SR", "forget", "Forgets an SR; what is on it stays."),
		onObject("sr-update", "SR", "update", "Reads the fields of an SR anew from its driver."),
	}
}

// host finds the host of an SR command: host-uuid, the only host, or the
// coordinator where any host will do.
func (r *run) host(anyHost bool) (string, error) {
	if _, ok := r.line.params.lookup("host-uuid"); ok {
		return r.byUUID("host", "host-uuid")
	}
	if !anyHost {
		hosts, err := r.call("host.get_all")
		if err != nil {
			return "", err
		}
		if len(toList(hosts)) != 1 {
			return "", refusef("Required parameter not found: host-uuid")
		}
	}
	pools, err := r.call("pool.get_all")
	if err != nil {
		return "", err
	}
	refs := toList(pools)
	if len(refs) == 0 {
		return "", xapi.Internal("there is no pool")
	}
	return r.callText("pool.get_master", refs[0])
}

func srCreate(r *run) error {
	ps := r.line.params
	shared, err := ps.bool("shared", false)
	if err != nil {
		return err
	}
	size := int64(0)
	if v, ok := ps.lookup("physical-size"); ok {
		if size, err = parseSize("physical-size", v); err != nil {
			return err
		}
	}
	host, err := r.host(shared)
	if err != nil {
		return err
	}
	config, err := r.deviceConfig()
	if err != nil {
		return err
	}
	ref, err := r.callText("SR.create", host, config, strconv.FormatInt(size, 10),
		ps.get("name-label"), ps.get("name-description"), ps.get("type"), ps.get("content-type"),
		shared, ps.group("sm-config", true))
	if err != nil {
		return err
	}
	return r.printUUID("SR", ref)
}

// deviceConfig gathers device-config:key=value. The value of key-filename is a
// file of the client's, whose content becomes the value of key.
func (r *run) deviceConfig() (map[string]any, error) {
	given := r.line.params.group("device-config", true)
	config := map[string]any{}
	for _, k := range sortedKeys(given) {
		name, isFile := strings.CutSuffix(k, "-filename")
		if !isFile {
			config[k] = given[k]
			continue
		}
		file := toText(given[k])
		data, found, err := r.conn.load(r.ctx, file)
		if err != nil {
			return nil, err
		}
		if !found {
			return nil, refusef("File not found: %s", file)
		}
		config[name] = string(data)
	}
	return config, nil
}

func srIntroduce(r *run) error {
	ps := r.line.params
	shared, err := ps.bool("shared", false)
	if err != nil {
		return err
	}
	_, err = r.call("SR.introduce", ps.get("uuid"), ps.get("name-label"), ps.get("name-description"),
		ps.get("type"), ps.get("content-type"), shared, ps.group("sm-config", true))
	if err != nil {
		return err
	}
	return r.out.list(ps.get("uuid"))
}

func srProbe(r *run) error {
	host, err := r.host(true)
	if err != nil {
		return err
	}
	config, err := r.deviceConfig()
	if err != nil {
		return err
	}
	text, err := r.callText("SR.probe", host, config, r.line.params.get("type"), r.line.params.group("sm-config", true))
	if err != nil {
		return err
	}
	return r.out.list(text)
}

func vdiCommands() []*command {
	return []*command{
		{name: "vdi-create", required: []string{"sr-uuid", "name-label", "virtual-size"},
			optional: []string{"type", "sm-config:", "sharable", "tags:"},
			help:     "Makes a disk image. virtual-size takes KiB, MiB, GiB or TiB.", do: vdiCreate},
		onObject("vdi-destroy", "VDI", "destroy", "Destroys a disk image."),
		onObject("vdi-forget", "VDI", "forget", "Forgets a disk image; it stays on its SR."),
		onObject("vdi-update", "VDI", "update", "Reads the fields of a disk image anew from its driver."),
		{name: "vdi-clone", required: needUUID, optional: []string{"driver-params-", "new-name-label", "new-name-description"},
			help: "Makes a second image that shares its blocks with the first.", do: vdiClone},
		{name: "vdi-snapshot", required: needUUID, optional: []string{"driver-params-"},
			help: "Keeps the present state of an image.",
			do: func(r *run) error {
				return r.derive("VDI.snapshot", r.line.params.group("driver-params", true))
			}},
		{name: "vdi-introduce", required: []string{"uuid", "sr-uuid", "type", "location"},
			optional: []string{"name-label", "name-description", "sharable", "read-only", "managed", "other-config:", "xenstore-data:", "sm-config:"},
			help:     "Makes the pool know a disk image that exists already.", do: vdiIntroduce},
		{name: "vdi-import", required: []string{"uuid", "filename"}, optional: []string{"format", "progress"},
			help: "Fills an image with the content of a file. The format is raw.", do: vdiImport},
		{name: "vdi-export", required: []string{"uuid", "filename"}, optional: []string{"format", "base", "progress"},
			help: "Writes the content of an image into a new file. The format is raw.", do: vdiExport},
		{name: "vdi-resize", required: []string{"uuid", "disk-size"}, optional: []string{"online"},
			help: "Makes an image larger. disk-size takes KiB, MiB, GiB or TiB.", do: vdiResize},
		{name: "vdi-copy", required: needUUID, optional: []string{"sr-uuid", "base-vdi-uuid", "into-vdi-uuid"},
			help: "Copies an image to an SR, or into an image that is there.", do: vdiCopy},
	}
}

var vdiTypes = map[string]bool{"system": true, "user": true, "suspend": true, "crashdump": true}

func vdiCreate(r *run) error {
	ps := r.line.params
	size, err := parseSize("virtual-size", ps.get("virtual-size"))
	if err != nil {
		return err
	}
	sharable, err := ps.bool("sharable", false)
	if err != nil {
		return err
	}
	typ := "user"
	if v, ok := ps.lookup("type"); ok {
		typ = v
	}
	if !vdiTypes[typ] {
		return refusef("Unknown vdi type: %s", typ)
	}
	sr, err := r.byUUID("SR", "sr-uuid")
	if err != nil {
		return err
	}
	tags := []any{}
	for _, t := range sortedKeys(ps.group("tags", true)) {
		tags = append(tags, t)
	}
	ref, err := r.callText("VDI.create", map[string]any{
		"name_label": ps.get("name-label"), "name_description": "", "SR": sr,
		"virtual_size": strconv.FormatInt(size, 10), "type": typ,
		"sharable": sharable, "read_only": false, "other_config": map[string]any{},
		"xenstore_data": map[string]any{}, "sm_config": ps.group("sm-config", true), "tags": tags,
	})
	if err != nil {
		return err
	}
	return r.printUUID("VDI", ref)
}

// derive makes a new image from the one that uuid names and shows its uuid.
func (r *run) derive(method string, more ...any) error {
	ref, err := r.derived(method, more...)
	if err != nil {
		return err
	}
	return r.printUUID("VDI", ref)
}

func (r *run) derived(method string, more ...any) (string, error) {
	vdi, err := r.byUUID("VDI", "uuid")
	if err != nil {
		return "", err
	}
	return r.callText(method, append([]any{vdi}, more...)...)
}

func vdiClone(r *run) error {
	ref, err := r.derived("VDI.clone", r.line.params.group("driver-params", true))
	if err != nil {
		return err
	}
	for _, f := range []struct{ key, method string }{
		{"new-name-label", "VDI.set_name_label"}, {"new-name-description", "VDI.set_name_description"},
	} {
		if v, ok := r.line.params.lookup(f.key); ok {
			if _, err := r.call(f.method, ref, v); err != nil {
				return err
			}
		}
	}
	return r.printUUID("VDI", ref)
}

func vdiIntroduce(r *run) error {
	ps := r.line.params
	if !vdiTypes[ps.get("type")] {
		return refusef("Unknown vdi type: %s", ps.get("type"))
	}
	var flags [3]bool
	for i, f := range []struct {
		key string
		def bool
	}{{"sharable", false}, {"read-only", false}, {"managed", true}} {
		var err error
		if flags[i], err = ps.bool(f.key, f.def); err != nil {
			return err
		}
	}
	sr, err := r.byUUID("SR", "sr-uuid")
	if err != nil {
		return err
	}
	null := string(xapi.NullRef)
	ref, err := r.callText("VDI.introduce",
		ps.get("uuid"), ps.get("name-label"), ps.get("name-description"), sr, ps.get("type"),
		flags[0], flags[1], ps.group("other-config", true), ps.get("location"),
		ps.group("xenstore-data", true), ps.group("sm-config", true), flags[2],
		"0", "0", null, false, xapi.FormatTime(xapi.Epoch), null)
	if err != nil {
		return err
	}
	return r.printUUID("VDI", ref)
}

func vdiResize(r *run) error {
	size, err := parseSize("disk-size", r.line.params.get("disk-size"))
	if err != nil {
		return err
	}
	online, err := r.line.params.bool("online", false)
	if err != nil {
		return err
	}
	vdi, err := r.byUUID("VDI", "uuid")
	if err != nil {
		return err
	}
	method := "VDI.resize"
	if online {
		method = "VDI.resize_online"
	}
	_, err = r.call(method, vdi, strconv.FormatInt(size, 10))
	return err
}

func vdiCopy(r *run) error {
	_, toSR := r.line.params.lookup("sr-uuid")
	_, into := r.line.params.lookup("into-vdi-uuid")
	if toSR == into {
		return refusef("Give either sr-uuid, to make a new image there, or into-vdi-uuid, to fill an image that exists")
	}
	refs := map[string]string{}
	for _, p := range []struct{ key, class string }{
		{"sr-uuid", "SR"}, {"base-vdi-uuid", "VDI"}, {"into-vdi-uuid", "VDI"},
	} {
		refs[p.key] = string(xapi.NullRef)
		if _, ok := r.line.params.lookup(p.key); ok {
			ref, err := r.byUUID(p.class, p.key)
			if err != nil {
				return err
			}
			refs[p.key] = ref
		}
	}
	return r.derive("VDI.copy", refs["sr-uuid"], refs["base-vdi-uuid"], refs["into-vdi-uuid"])
}
