package xenapi

import "github.com/patchd/patchd/pkg/session"

// sessionClass is the class session: one login. Its ref is a secret: it is in no list and has no events.
func sessionClass() *Class {
	return &Class{Name: "session", noAll: true, setRole: session.PoolAdmin, Fields: []Field{
		ro("uuid", String, "1.1"),
		ro("this_host", RefTo("host"), "1.1"),
		ro("this_user", RefTo("user"), "1.1"),
		ro("last_active", Datetime, "1.1"),
		ro("pool", Bool, "1.1"),
		rw("other_config", stringMap, "1.2"),
		ro("is_local_superuser", Bool, "1.6"),
		ro("subject", RefTo("subject"), "1.6"),
		ro("validation_time", Datetime, "1.6"),
		ro("auth_user_sid", String, "1.6"),
		ro("auth_user_name", String, "1.7"),
		roc("rbac_permissions", stringSet, "1.7"),
		ro("tasks", SetOf(RefTo("task")), "1.7").from(children("task", "_session")),
		roc("parent", RefTo("session"), "1.7"),
		ro("originator", String, "2.0"),
	}}
}

// taskClass is the class task: one piece of work.
func taskClass() *Class {
	return &Class{Name: "task", Fields: []Field{
		ro("uuid", String, "1.1"),
		ro("name_label", String, "1.1"),
		ro("name_description", String, "1.1"),
		ro("allowed_operations", SetOf(enumTaskAllowedOperations), "1.1"),
		ro("current_operations", MapOf(String, enumTaskAllowedOperations), "1.1"),
		ro("created", Datetime, "1.1"),
		ro("finished", Datetime, "1.1"),
		ro("status", enumTaskStatusType, "1.1"),
		ro("resident_on", RefTo("host"), "1.1"),
		ro("progress", Float, "1.1"),
		ro("type", String, "1.1"),
		ro("result", String, "1.1"),
		ro("error_info", stringSet, "1.1"),
		rw("other_config", stringMap, "1.2"),
		ro("subtask_of", RefTo("task"), "1.3"),
		ro("subtasks", SetOf(RefTo("task")), "1.3").from(children("task", "subtask_of")),
		ro("backtrace", String, "2.5").or("()"),
	}}
}

// messageClass is the class message: one notice to the admin; it has no getters of single fields.
func messageClass() *Class {
	return &Class{Name: "message", noGetters: true, Fields: []Field{
		ro("uuid", String, "1.1"),
		ro("name", String, "1.1"),
		ro("priority", Int, "1.1"),
		ro("cls", enumCls, "1.3"),
		ro("obj_uuid", String, "1.1"),
		ro("timestamp", Datetime, "1.1"),
		ro("body", String, "1.1"),
	}}
}
