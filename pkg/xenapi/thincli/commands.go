package thincli

import "sync"

// commandTable is every command by its name. It is made once and never changed.
var commandTable = sync.OnceValue(func() map[string]*command {
	table := map[string]*command{}
	add := func(cmds []*command) {
		for _, c := range cmds {
			table[c.name] = c
		}
	}
	for _, c := range classes() {
		add(c.commands())
	}
	add(patchCommands())
	add(srCommands())
	add(vdiCommands())
	add(pbdCommands())
	add(otherCommands())
	return table
})

var (
	needUUID     = []string{"uuid"}
	needUUIDHost = []string{"uuid", "host-uuid"}
)

// onObject is a command that calls one message on the object that uuid names
// and shows nothing.
func onObject(name, class, message, help string) *command {
	return &command{name: name, required: needUUID, help: help, do: func(r *run) error {
		ref, err := r.byUUID(class, "uuid")
		if err != nil {
			return err
		}
		_, err = r.call(class+"."+message, ref)
		return err
	}}
}

// onPatchAndHost is onObject for a patch on one host; show prints the text
// that the call returns.
func onPatchAndHost(name, message, help string, show bool) *command {
	return &command{name: name, required: needUUIDHost, help: help, do: func(r *run) error {
		patch, err := r.byUUID("pool_patch", "uuid")
		if err != nil {
			return err
		}
		host, err := r.byUUID("host", "host-uuid")
		if err != nil {
			return err
		}
		text, err := r.callText("pool_patch."+message, patch, host)
		if err != nil || !show {
			return err
		}
		return r.out.list(text)
	}}
}

func patchCommands() []*command {
	// The notice tells what to do instead, with the image's uuid when it has one.
	old := func(c *command) *command {
		c.notice = cleanNotice
		return c
	}
	return []*command{
		{name: "patch-upload", required: []string{"file-name"}, optional: []string{"sr-uuid"}, standard: true,
			help: "Uploads a patch into a disk image on an SR: sr-uuid, or else the pool's default SR.",
			do:   patchUpload},
		onPatchAndHost("patch-precheck", "precheck", "Runs the checks of an uploaded patch on one host.", true),
		onPatchAndHost("patch-apply", "apply", "Applies an uploaded patch to one host.", true),
		onObject("patch-pool-apply", "pool_patch", "pool_apply", "Applies an uploaded patch to every host that lacks it."),
		old(onObject("patch-clean", "pool_patch", "clean", "Deletes the patch as a file from the coordinator (deprecated).")),
		old(onPatchAndHost("patch-clean-on-host", "clean_on_host", "Deletes the patch as a file from one host (deprecated).", false)),
		old(onObject("patch-pool-clean", "pool_patch", "pool_clean", "Deletes the patch from every host, and its disk image (deprecated).")),
		onObject("patch-destroy", "pool_patch", "destroy", "Removes a patch that no host has, with its disk image."),
	}
}

// cleanNotice says what replaces the command.
func cleanNotice(r *run) string {
	uuid := "<uuid of the VDI>"
	if ref, err := r.byUUID("pool_patch", "uuid"); err == nil {
		if vdi, err := r.callText("pool_patch.get_VDI", ref); err == nil && !isNull(vdi) {
			if u, err := r.callText("VDI.get_uuid", vdi); err == nil {
				uuid = u
			}
		}
	}
	return r.line.name + " is deprecated. A patch lives in a disk image: free its space with 'xe vdi-destroy uuid=" + uuid + "'."
}

func pbdCommands() []*command {
	return []*command{
		{name: "pbd-create", required: []string{"host-uuid", "sr-uuid"}, optional: []string{"device-config:"},
			help: "Makes the link of one host to an SR.", do: pbdCreate},
		onObject("pbd-destroy", "PBD", "destroy", "Removes the link of one host to an SR."),
		onObject("pbd-plug", "PBD", "plug", "Connects a host to an SR."),
		onObject("pbd-unplug", "PBD", "unplug", "Disconnects a host from an SR."),
	}
}

func pbdCreate(r *run) error {
	host, err := r.byUUID("host", "host-uuid")
	if err != nil {
		return err
	}
	sr, err := r.byUUID("SR", "sr-uuid")
	if err != nil {
		return err
	}
	ref, err := r.callText("PBD.create", map[string]any{
		"host": host, "SR": sr,
		"device_config": r.line.params.group("device-config", true),
		"other_config":  map[string]any{},
	})
	if err != nil {
		return err
	}
	return r.printUUID("PBD", ref)
}

func otherCommands() []*command {
	return []*command{
		onObject("task-cancel", "task", "cancel", "Asks a running task to stop."),
		{name: "pool-sync-database", help: "Makes sure that every host has the pool's records.",
			do: func(r *run) error { _, err := r.call("pool.sync_database"); return err }},
		{name: "user-password-change", required: []string{"new"}, optional: []string{"old"},
			help: "Changes the password of the user who is logged in.",
			do: func(r *run) error {
				_, err := r.call("session.change_password", r.line.params.get("old"), r.line.params.get("new"))
				return err
			}},
		{name: "message-create", required: []string{"name", "priority", "body"},
			optional: []string{"host-uuid", "sr-uuid", "vdi-uuid", "pool-uuid"},
			help:     "Leaves a message about one object; exactly one uuid is needed.", do: messageCreate},
		{name: "message-destroy", optional: []string{"uuid", "uuids"},
			help: "Removes a message, or several: uuids=a,b.", do: messageDestroy},
		{name: "event-wait", required: []string{"class"},
			help: "Waits until an object of the class matches every field=value; field=/=value waits for anything else.",
			do:   eventWait},
	}
}
