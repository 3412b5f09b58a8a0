package xenapi

// poolPatchClass is the class pool_patch: one patch. VDI is our one addition to the published fields: the image
// that holds the patch; it may name an image that is gone.
func poolPatchClass() *Class {
	return &Class{Name: "pool_patch", Fields: []Field{
		ro("uuid", String, "1.1"),
		roc("name_label", String, "1.1"),
		roc("name_description", String, "1.1"),
		roc("version", String, "1.2"),
		ro("size", Int, "1.2"),
		ro("pool_applied", Bool, "1.2"),
		ro("host_patches", SetOf(RefTo("host_patch")), "1.2").from(children("host_patch", "pool_patch")),
		ro("after_apply_guidance", SetOf(enumAfterApplyGuidance), "1.2"),
		rw("other_config", stringMap, "1.2"),
		ro("VDI", RefTo("VDI"), ""),
	}}
}

// hostPatchClass is the class host_patch: one patch on one host.
func hostPatchClass() *Class {
	return &Class{Name: "host_patch", Fields: []Field{
		ro("uuid", String, "1.1"),
		roc("name_label", String, "1.1"),
		roc("name_description", String, "1.1"),
		roc("version", String, "1.1"),
		roc("host", RefTo("host"), "1.1"),
		ro("applied", Bool, "1.1"),
		ro("timestamp_applied", Datetime, "1.1"),
		ro("size", Int, "1.1"),
		roc("pool_patch", RefTo("pool_patch"), "1.2"),
		rw("other_config", stringMap, "1.2"),
	}}
}
