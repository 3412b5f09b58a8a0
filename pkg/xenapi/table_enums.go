package xenapi

// The enums of the fields and parameters above, as classic servers knew them.
var (
	enumTaskAllowedOperations = EnumOf("task_allowed_operations",
		"cancel", "destroy")
	enumTaskStatusType = EnumOf("task_status_type",
		"pending", "success", "failure", "cancelling", "cancelled")
	enumPoolAllowedOperations = EnumOf("pool_allowed_operations",
		"ha_enable", "ha_disable")
	enumAfterApplyGuidance = EnumOf("after_apply_guidance",
		"restartHVM", "restartPV", "restartHost", "restartXAPI")
	enumHostAllowedOperations = EnumOf("host_allowed_operations",
		"provision", "evacuate", "shutdown", "reboot", "power_on", "vm_start", "vm_resume", "vm_migrate")
	enumHostDisplay = EnumOf("host_display",
		"enabled", "disable_on_reboot", "disabled", "enable_on_reboot")
	enumStorageOperations = EnumOf("storage_operations",
		"scan", "destroy", "forget", "plug", "unplug", "update", "vdi_create", "vdi_introduce", "vdi_destroy", "vdi_resize", "vdi_clone", "vdi_snapshot", "vdi_mirror", "pbd_create", "pbd_destroy")
	enumVdiOperations = EnumOf("vdi_operations",
		"clone", "copy", "resize", "resize_online", "snapshot", "mirror", "destroy", "forget", "update", "force_unlock", "generate_config", "blocked")
	enumVdiType = EnumOf("vdi_type",
		"system", "user", "ephemeral", "suspend", "crashdump", "ha_statefile", "metadata", "redo_log", "rrd")
	enumOnBoot = EnumOf("on_boot",
		"reset", "persist")
	enumCls = EnumOf("cls",
		"VM", "Host", "SR", "Pool", "VMPP", "VDI")
)
