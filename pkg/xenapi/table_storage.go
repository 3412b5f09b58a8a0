package xenapi

// smClass is the class SM: one storage driver.
func smClass() *Class {
	return &Class{Name: "SM", Fields: []Field{
		ro("uuid", String, "1.1"),
		ro("name_label", String, "1.1"),
		ro("name_description", String, "1.1"),
		ro("type", String, "1.1"),
		ro("vendor", String, "1.1"),
		ro("copyright", String, "1.1"),
		ro("version", String, "1.1"),
		ro("required_api_version", String, "1.1"),
		ro("configuration", stringMap, "1.1"),
		ro("capabilities", stringSet, "1.2").deprecated(),
		ro("features", MapOf(String, Int), "2.0"),
		rw("other_config", stringMap, "1.2"),
		ro("driver_filename", String, "1.3"),
		ro("required_cluster_stack", stringSet, "2.5"),
	}}
}

// srClass is the class SR: one storage repository.
func srClass() *Class {
	return &Class{Name: "SR", Fields: []Field{
		ro("uuid", String, "1.1"),
		roc("name_label", String, "1.1"),
		roc("name_description", String, "1.1"),
		ro("allowed_operations", SetOf(enumStorageOperations), "1.1").from(srOperations),
		ro("current_operations", MapOf(String, enumStorageOperations), "1.1"),
		ro("VDIs", SetOf(RefTo("VDI")), "1.1").from(children("VDI", "SR")),
		ro("PBDs", SetOf(RefTo("PBD")), "1.1").from(children("PBD", "SR")),
		ro("virtual_allocation", Int, "1.1"),
		ro("physical_utilisation", Int, "1.1"),
		roc("physical_size", Int, "1.1"),
		roc("type", String, "1.1"),
		roc("content_type", String, "1.1"),
		ro("shared", Bool, "1.1"),
		rw("other_config", stringMap, "1.1"),
		rw("tags", stringSet, "1.3"),
		rw("sm_config", stringMap, "1.2"),
		ro("blobs", MapOf(String, RefTo("blob")), "1.3"),
		ro("local_cache_enabled", Bool, "1.8"),
		ro("introduced_by", RefTo("DR_task"), "1.9"),
		ro("clustered", Bool, "2.5"),
		ro("is_tools_sr", Bool, "2.5"),
	}}
}

// vdiClass is the class VDI: one disk image.
func vdiClass() *Class {
	return &Class{Name: "VDI", Fields: []Field{
		ro("uuid", String, "1.1"),
		roc("name_label", String, "1.1"),
		roc("name_description", String, "1.1"),
		ro("allowed_operations", SetOf(enumVdiOperations), "1.1").from(vdiOperations),
		ro("current_operations", MapOf(String, enumVdiOperations), "1.1"),
		roc("SR", RefTo("SR"), "1.1"),
		ro("VBDs", SetOf(RefTo("VBD")), "1.1"),
		ro("crash_dumps", SetOf(RefTo("crashdump")), "1.1"),
		roc("virtual_size", Int, "1.1"),
		ro("physical_utilisation", Int, "1.1"),
		roc("type", enumVdiType, "1.1").or("user"),
		roc("sharable", Bool, "1.1"),
		roc("read_only", Bool, "1.1"),
		rw("other_config", stringMap, "1.1"),
		ro("storage_lock", Bool, "1.1"),
		ro("location", String, "1.2"),
		ro("managed", Bool, "1.1"),
		ro("missing", Bool, "1.1"),
		ro("parent", RefTo("VDI"), "1.1").deprecated(),
		rw("xenstore_data", stringMap, "1.2"),
		rw("sm_config", stringMap, "1.2"),
		ro("is_a_snapshot", Bool, "1.3"),
		ro("snapshot_of", RefTo("VDI"), "1.3"),
		ro("snapshots", SetOf(RefTo("VDI")), "1.3").from(children("VDI", "snapshot_of")),
		ro("snapshot_time", Datetime, "1.3"),
		rw("tags", stringSet, "1.3"),
		ro("allow_caching", Bool, "1.8"),
		ro("on_boot", enumOnBoot, "1.8").or("persist"),
		ro("metadata_of_pool", RefTo("pool"), "1.9"),
		ro("metadata_latest", Bool, "1.9"),
		ro("is_tools_iso", Bool, "2.5"),
	}}
}

// pbdClass is the class PBD: the link of one host to one SR.
func pbdClass() *Class {
	return &Class{Name: "PBD", Fields: []Field{
		ro("uuid", String, "1.1"),
		roc("host", RefTo("host"), "1.1"),
		roc("SR", RefTo("SR"), "1.1"),
		roc("device_config", stringMap, "1.1"),
		ro("currently_attached", Bool, "1.1"),
		rw("other_config", stringMap, "1.2"),
	}}
}
