package thincli

import (
	"strconv"
	"strings"
)

// messageSubjects are the parameters that name what a message is about.
var messageSubjects = []struct{ key, cls string }{
	{"pool-uuid", "Pool"}, {"sr-uuid", "SR"}, {"host-uuid", "Host"}, {"vdi-uuid", "VDI"},
}

func messageCreate(r *run) error {
	ps := r.line.params
	priority := ps.get("priority")
	if _, err := strconv.ParseInt(priority, 10, 64); err != nil {
		return refusef("The priority must be a whole number, not %q", priority)
	}
	var cls, uuid string
	for _, s := range messageSubjects {
		if v, ok := ps.lookup(s.key); ok && cls == "" {
			cls, uuid = s.cls, v
		}
	}
	if cls == "" {
		return refusef("Give one of host-uuid, sr-uuid, vdi-uuid or pool-uuid")
	}
	_, err := r.call("message.create", ps.get("name"), priority, cls, uuid, ps.get("body"))
	return err
}

func messageDestroy(r *run) error {
	var uuids []string
	if v, ok := r.line.params.lookup("uuid"); ok {
		uuids = append(uuids, v)
	}
	if v, ok := r.line.params.lookup("uuids"); ok {
		uuids = append(uuids, strings.Split(v, ",")...)
	}
	if len(uuids) == 0 {
		return usagef("Required parameter not found: uuid")
	}
	for _, uuid := range uuids {
		ref, err := r.callText("message.get_by_uuid", uuid)
		if err != nil {
			return err
		}
		if _, err := r.call("message.destroy", ref); err != nil {
			return err
		}
	}
	return nil
}
