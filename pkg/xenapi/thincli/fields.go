package thincli

import "github.com/patchd/patchd/pkg/xapi"

// classes are all that have -list and -param- commands. The order of the
// fields is the order they are shown in; names are xe's, with all their
// irregularities.
func classes() []*class {
	return []*class{
		patchClass(), srClass(), vdiClass(), pbdClass(), hostClass(),
		poolClass(), taskClass(), smClass(), messageClass(),
	}
}

func patchClass() *class {
	return &class{
		cli: "patch", api: "pool_patch", plural: "patches",
		defaults: []string{"uuid", "name-label", "name-description", "size", "hosts", "after-apply-guidance"},
		fields: []field{
			plain("uuid", "uuid"),
			plain("name-label", "name_label"),
			plain("name-description", "name_description"),
			plain("size", "size"),
			{name: "hosts", sep: ", ", set: patchHosts},
			set("after-apply-guidance", "after_apply_guidance", ", "),
			refUUID("vdi-uuid", "VDI", "VDI"),
			dict("other-config", "other_config").editable("other_config"),
		},
	}
}

// patchHosts are the uuids of the hosts that have the patch, or are getting it.
func patchHosts(r *row) ([]string, error) {
	var out []string
	for _, hp := range toList(r.rec["host_patches"]) {
		rec, ok := r.lookup("host_patch", hp)
		if !ok {
			return nil, xapi.NewError(xapi.HandleInvalid, "host_patch", hp)
		}
		host := toText(rec["host"])
		if _, ok := r.lookup("host", host); !ok {
			return nil, xapi.NewError(xapi.HandleInvalid, "host", host)
		}
		out = append(out, r.uuidOf("host", host))
	}
	return out, nil
}

func srClass() *class {
	return &class{
		cli: "sr", api: "SR", plural: "srs", standard: true,
		defaults: []string{"uuid", "name-label", "name-description", "host", "type", "content-type"},
		fields: []field{
			plain("uuid", "uuid"),
			plain("name-label", "name_label").writable("name_label", asText),
			plain("name-description", "name_description").writable("name_description", asText),
			{name: "host", text: srHost},
			set("allowed-operations", "allowed_operations", "; "),
			opSet("current-operations", "current_operations"),
			refSet("VDIs", "VDIs", "VDI"),
			refSet("PBDs", "PBDs", "PBD"),
			plain("virtual-allocation", "virtual_allocation"),
			plain("physical-utilisation", "physical_utilisation"),
			plain("physical-size", "physical_size"),
			plain("type", "type"),
			plain("content-type", "content_type"),
			plain("shared", "shared").writable("shared", asBool("shared")),
			refUUID("introduced-by", "introduced_by", "DR_task"),
			plain("is-tools-sr", "is_tools_sr"),
			dict("other-config", "other_config").editable("other_config"),
			dict("sm-config", "sm_config"),
			flat(dict("blobs", "blobs")),
			plain("local-cache-enabled", "local_cache_enabled"),
			set("tags", "tags", ", ").editable("tags"),
			plain("clustered", "clustered"),
		},
	}
}

// srHost is the name of the one host that has the SR.
func srHost(r *row) (string, error) {
	pbds := toList(r.rec["PBDs"])
	switch len(pbds) {
	case 0:
		return notInDatabase, nil
	case 1:
		rec, _ := r.lookup("PBD", pbds[0])
		return r.nameOf("host", toText(rec["host"])), nil
	}
	return "<shared>", nil
}

func vdiClass() *class {
	return &class{
		cli: "vdi", api: "VDI", plural: "vdis",
		defaults: []string{"uuid", "name-label", "name-description", "virtual-size", "read-only", "sharable", "sr-uuid"},
		fields: []field{
			plain("uuid", "uuid"),
			plain("name-label", "name_label").writable("name_label", asText),
			plain("name-description", "name_description").writable("name_description", asText),
			plain("is-a-snapshot", "is_a_snapshot"),
			refUUID("snapshot-of", "snapshot_of", "VDI"),
			flat(refSet("snapshots", "snapshots", "VDI")),
			plain("snapshot-time", "snapshot_time"),
			set("allowed-operations", "allowed_operations", "; "),
			opSet("current-operations", "current_operations"),
			refUUID("sr-uuid", "SR", "SR"),
			refName("sr-name-label", "SR", "SR"),
			refSet("vbd-uuids", "VBDs", "VBD"),
			refSet("crashdump-uuids", "crash_dumps", "crashdump"),
			plain("virtual-size", "virtual_size"),
			plain("physical-utilisation", "physical_utilisation"),
			plain("location", "location"),
			plain("type", "type"),
			plain("sharable", "sharable"),
			plain("read-only", "read_only"),
			plain("storage-lock", "storage_lock"),
			plain("managed", "managed"),
			refUUID("parent", "parent", "VDI").asDeprecated(),
			plain("missing", "missing"),
			plain("is-tools-iso", "is_tools_iso"),
			dict("other-config", "other_config").editable("other_config"),
			dict("xenstore-data", "xenstore_data"),
			dict("sm-config", "sm_config"),
			plain("on-boot", "on_boot").writable("on_boot", asText),
			plain("allow-caching", "allow_caching").writable("allow_caching", asBool("allow-caching")),
			plain("metadata-latest", "metadata_latest"),
			refUUID("metadata-of-pool", "metadata_of_pool", "pool"),
			set("tags", "tags", ", ").editable("tags"),
		},
	}
}

func pbdClass() *class {
	return &class{
		cli: "pbd", api: "PBD", plural: "pbds",
		defaults: []string{"uuid", "host-uuid", "sr-uuid", "device-config", "currently-attached"},
		fields: []field{
			plain("uuid", "uuid"),
			refUUID("host", "host", "host").asDeprecated(),
			refUUID("host-uuid", "host", "host"),
			refName("host-name-label", "host", "host"),
			refUUID("sr-uuid", "SR", "SR"),
			refName("sr-name-label", "SR", "SR"),
			dict("device-config", "device_config"),
			plain("currently-attached", "currently_attached"),
			dict("other-config", "other_config").editable("other_config"),
		},
	}
}

func taskClass() *class {
	return &class{
		cli: "task", api: "task", plural: "tasks",
		defaults: []string{"uuid", "name-label", "name-description", "status", "progress"},
		fields: []field{
			plain("uuid", "uuid"),
			plain("name-label", "name_label"),
			plain("name-description", "name_description"),
			refUUID("subtask_of", "subtask_of", "task"),
			flat(refSet("subtasks", "subtasks", "task")),
			refUUID("resident-on", "resident_on", "host"),
			plain("status", "status"),
			plain("progress", "progress"),
			plain("type", "type"),
			plain("result", "result"),
			plain("created", "created"),
			plain("finished", "finished"),
			flat(set("error_info", "error_info", "; ")),
			flat(set("allowed_operations", "allowed_operations", "; ")),
			dict("other-config", "other_config").editable("other_config"),
		},
	}
}

func smClass() *class {
	return &class{
		cli: "sm", api: "SM", plural: "sms",
		defaults: []string{"uuid", "type", "name-label", "name-description", "vendor", "copyright", "configuration"},
		fields: []field{
			plain("uuid", "uuid"),
			plain("name-label", "name_label"),
			plain("name-description", "name_description"),
			plain("type", "type"),
			plain("vendor", "vendor"),
			plain("copyright", "copyright"),
			plain("required-api-version", "required_api_version"),
			flat(set("capabilities", "capabilities", "; ")).asDeprecated(),
			dict("features", "features"),
			flat(dict("configuration", "configuration")),
			plain("driver-filename", "driver_filename"),
			flat(set("required-cluster-stack", "required_cluster_stack", ", ")),
		},
	}
}

func messageClass() *class {
	return &class{
		cli: "message", api: "message", plural: "messages",
		fields: []field{
			plain("uuid", "uuid"),
			plain("name", "name"),
			plain("priority", "priority"),
			plain("class", "cls"),
			plain("obj-uuid", "obj_uuid"),
			plain("timestamp", "timestamp"),
			plain("body", "body"),
		},
	}
}
