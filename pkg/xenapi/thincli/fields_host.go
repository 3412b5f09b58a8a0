package thincli

import "github.com/patchd/patchd/pkg/xapi"

func hostClass() *class {
	return &class{
		cli: "host", api: "host", plural: "hosts",
		defaults: []string{"uuid", "name-label", "name-description"},
		fields: []field{
			plain("uuid", "uuid"),
			plain("name-label", "name_label").writable("name_label", asText),
			plain("name-description", "name_description").writable("name_description", asText),
			set("allowed-operations", "allowed_operations", "; "),
			opSet("current-operations", "current_operations"),
			plain("enabled", "enabled"),
			plain("display", "display"),
			plain("API-version-major", "API_version_major"),
			plain("API-version-minor", "API_version_minor"),
			plain("API-version-vendor", "API_version_vendor"),
			dict("API-version-vendor-implementation", "API_version_vendor_implementation"),
			dict("logging", "logging").editable("logging"),
			refUUID("suspend-image-sr-uuid", "suspend_image_sr", "SR").writable("suspend_image_sr", asRef("SR")),
			refUUID("crash-dump-sr-uuid", "crash_dump_sr", "SR").writable("crash_dump_sr", asRef("SR")),
			dict("software-version", "software_version"),
			set("capabilities", "capabilities", "; "),
			dict("other-config", "other_config").editable("other_config"),
			dict("cpu_info", "cpu_info"),
			dict("chipset-info", "chipset_info"),
			plain("hostname", "hostname"),
			plain("address", "address"),
			set("supported-bootloaders", "supported_bootloaders", "; "),
			flat(dict("blobs", "blobs")),
			plain("memory-overhead", "memory_overhead"),
			hostMetric("memory-total", "memory_total"),
			hostMetric("memory-free", "memory_free"),
			hostMetric("host-metrics-live", "live"),
			field{name: "patches", sep: ", ", set: hostPatches}.asDeprecated(),
			flat(set("ha-statefiles", "ha_statefiles", "; ")),
			flat(set("ha-network-peers", "ha_network_peers", "; ")),
			plain("external-auth-type", "external_auth_type"),
			plain("external-auth-service-name", "external_auth_service_name"),
			dict("external-auth-configuration", "external_auth_configuration"),
			plain("edition", "edition"),
			dict("license-server", "license_server"),
			plain("power-on-mode", "power_on_mode"),
			dict("power-on-config", "power_on_config"),
			refUUID("local-cache-sr", "local_cache_sr", "SR"),
			set("tags", "tags", ", ").editable("tags"),
			plain("ssl-legacy", "ssl_legacy"),
			dict("guest_VCPUs_params", "guest_VCPUs_params").editable("guest_VCPUs_params"),
			set("virtual-hardware-platform-versions", "virtual_hardware_platform_versions", "; "),
			refSet("resident-vms", "resident_VMs", "VM"),
		},
	}
}

// hostMetric is a field of the host's metrics, which a pool may not keep.
func hostMetric(name, src string) field {
	return field{name: name, text: func(r *row) (string, error) {
		rec, ok := r.lookup("host_metrics", toText(r.rec["metrics"]))
		if !ok {
			return notInDatabase, nil
		}
		return toText(rec[src]), nil
	}}
}

// hostPatches are the uuids of the patches that the host has, or is getting.
func hostPatches(r *row) ([]string, error) {
	var out []string
	for _, hp := range toList(r.rec["patches"]) {
		rec, ok := r.lookup("host_patch", hp)
		if !ok {
			return nil, xapi.NewError(xapi.HandleInvalid, "host_patch", hp)
		}
		patch := toText(rec["pool_patch"])
		if _, ok := r.lookup("pool_patch", patch); !ok {
			return nil, xapi.NewError(xapi.HandleInvalid, "pool_patch", patch)
		}
		out = append(out, r.uuidOf("pool_patch", patch))
	}
	return out, nil
}

func poolClass() *class {
	sr := func(name, src string) field { return refUUID(name, src, "SR").writable(src, asRef("SR")) }
	flag := func(name, src string) field { return plain(name, src).writable(src, asBool(name)) }
	return &class{
		cli: "pool", api: "pool", plural: "pools",
		defaults: []string{"uuid", "name-label", "name-description", "master", "default-SR"},
		fields: []field{
			plain("uuid", "uuid"),
			plain("name-label", "name_label").writable("name_label", asText),
			plain("name-description", "name_description").writable("name_description", asText),
			refUUID("master", "master", "host"),
			sr("default-SR", "default_SR"),
			sr("crash-dump-SR", "crash_dump_SR"),
			sr("suspend-image-SR", "suspend_image_SR"),
			field{name: "supported-sr-types", text: supportedTypes}.asExpensive(),
			dict("other-config", "other_config").editable("other_config"),
			set("allowed-operations", "allowed_operations", "; "),
			opSet("current-operations", "current_operations"),
			plain("ha-enabled", "ha_enabled"),
			flat(dict("ha-configuration", "ha_configuration")),
			flat(set("ha-statefiles", "ha_statefiles", "; ")),
			plain("ha-host-failures-to-tolerate", "ha_host_failures_to_tolerate"),
			plain("ha-plan-exists-for", "ha_plan_exists_for"),
			flag("ha-allow-overcommit", "ha_allow_overcommit"),
			plain("ha-overcommitted", "ha_overcommitted"),
			flat(dict("blobs", "blobs")),
			plain("wlb-url", "wlb_url"),
			plain("wlb-username", "wlb_username"),
			flag("wlb-enabled", "wlb_enabled"),
			flag("wlb-verify-cert", "wlb_verify_cert"),
			dict("gui-config", "gui_config").editable("gui_config"),
			dict("health-check-config", "health_check_config").editable("health_check_config"),
			plain("vswitch-controller", "vswitch_controller").asHidden(),
			flat(dict("restrictions", "restrictions")),
			set("tags", "tags", ", ").editable("tags"),
			plain("ha-cluster-stack", "ha_cluster_stack"),
			dict("guest-agent-config", "guest_agent_config"),
			dict("cpu_info", "cpu_info"),
			flag("policy-no-vendor-device", "policy_no_vendor_device"),
		},
	}
}

func supportedTypes(r *row) (string, error) {
	v, err := r.call("SR.get_supported_types")
	if err != nil {
		return "", err
	}
	f := set("", "types", "; ")
	return f.read(&row{rec: map[string]any{"types": v}})
}
