package xenapi

import (
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// srMessages are the explicit messages of SR.
func srMessages() []*Message {
	sr := refParam("sr", "SR")
	smConfig := mapParam("sm_config").or(noConfig())
	return []*Message{
		work("SR", "create", RefTo("SR"), srCreate,
			refParam("host", "host"), mapParam("device_config"), intParam("physical_size"), textParam("name_label"),
			textParam("name_description"), textParam("type"), textParam("content_type"), boolParam("shared"), smConfig),
		work("SR", "introduce", RefTo("SR"), srIntroduce,
			textParam("uuid"), textParam("name_label"), textParam("name_description"), textParam("type"),
			textParam("content_type"), boolParam("shared"), smConfig),
		work("SR", "probe", String, func(c *call) (any, error) {
			return textResult(c.srv.Pool.SRProbe(c.ctx, c.ref(0), c.dict(1), c.text(2), c.dict(3)))
		}, refParam("host", "host"), mapParam("device_config"), textParam("type"), smConfig),
		work("SR", "forget", Void, func(c *call) (any, error) { return nil, c.srv.Pool.SRForget(c.ctx, c.ref(0)) }, sr),
		work("SR", "destroy", Void, func(c *call) (any, error) { return nil, c.srv.Pool.SRDestroy(c.ctx, c.ref(0)) }, sr),
		work("SR", "scan", Void, func(c *call) (any, error) { return nil, c.srv.Pool.SRScan(c.ctx, c.ref(0)) }, sr),
		work("SR", "update", Void, func(c *call) (any, error) { return nil, c.srv.Pool.SRUpdate(c.ctx, c.ref(0)) }, sr),
		look("SR", "get_supported_types", stringSet, supportedTypes),
		work("SR", "set_shared", Void, func(c *call) (any, error) {
			return nil, c.srv.Pool.SRSetShared(c.ctx, c.ref(0), c.flag(1))
		}, sr, boolParam("value")),
		work("SR", "set_name_label", Void, func(c *call) (any, error) {
			return nil, c.srv.Pool.SRSetNameLabel(c.ctx, c.ref(0), c.text(1))
		}, sr, textParam("value")),
		work("SR", "set_name_description", Void, func(c *call) (any, error) {
			return nil, c.srv.Pool.SRSetNameDescription(c.ctx, c.ref(0), c.text(1))
		}, sr, textParam("value")),
		work("SR", "set_physical_size", Void, func(c *call) (any, error) {
			return nil, c.srv.Pool.SRSetPhysicalSize(c.ctx, c.ref(0), c.number(1))
		}, refParam("self", "SR"), intParam("value")),
	}
}

func srCreate(c *call) (any, error) {
	return refResult(c.srv.Pool.SRCreate(c.ctx, pool.SRSpec{
		Host: c.ref(0), DeviceConfig: c.dict(1), PhysicalSize: c.number(2), NameLabel: c.text(3),
		NameDescription: c.text(4), Type: c.text(5), ContentType: c.text(6), Shared: c.flag(7), SMConfig: c.dict(8),
	}))
}

func srIntroduce(c *call) (any, error) {
	uuid, err := xapi.ParseUUID(c.text(0))
	if err != nil {
		return nil, xapi.NewError(xapi.UUIDInvalid, "SR", clip(c.text(0), 128))
	}
	return refResult(c.srv.Pool.SRIntroduce(c.ctx, uuid, pool.SRSpec{
		NameLabel: c.text(1), NameDescription: c.text(2), Type: c.text(3), ContentType: c.text(4),
		Shared: c.flag(5), SMConfig: c.dict(6),
	}))
}

// supportedTypes are the types of the drivers that have a record.
func supportedTypes(c *call) (any, error) {
	out := []any{}
	err := c.srv.Store.View(func(v *store.View) error {
		for _, it := range v.List("SM") {
			rec, err := decodeStored(it)
			if err != nil {
				return err
			}
			out = append(out, rec.text("type"))
		}
		return nil
	})
	return out, err
}

// pbdMessages are the explicit messages of PBD.
func pbdMessages() []*Message {
	self := refParam("self", "PBD")
	return []*Message{
		work("PBD", "create", RefTo("PBD"), pbdCreate, Param{Name: "args", Type: RecordOf("PBD")}),
		work("PBD", "destroy", Void, func(c *call) (any, error) { return nil, c.srv.Pool.PBDDestroy(c.ctx, c.ref(0)) }, self),
		work("PBD", "plug", Void, func(c *call) (any, error) { return nil, c.srv.Pool.PBDPlug(c.ctx, c.ref(0)) }, self),
		work("PBD", "unplug", Void, func(c *call) (any, error) { return nil, c.srv.Pool.PBDUnplug(c.ctx, c.ref(0)) }, self),
		work("PBD", "set_device_config", Void, func(c *call) (any, error) {
			return nil, c.srv.Pool.PBDSetDeviceConfig(c.ctx, c.ref(0), c.dict(1))
		}, self, mapParam("value")),
	}
}

func pbdCreate(c *call) (any, error) {
	r := newRecordArg(c, "PBD", "host", "SR")
	rec := pool.PBD{
		Host: r.ref("host"), SR: r.ref("SR"), DeviceConfig: r.dict("device_config"), OtherConfig: r.dict("other_config"),
	}
	if r.err != nil {
		return nil, r.err
	}
	return refResult(c.srv.Pool.PBDCreate(c.ctx, rec))
}

// recordArg takes a record apart that a client sent to a constructor. Fields
// that the client may not set are ignored, whatever is in them; those it may
// leave out have the table's default.
type recordArg struct {
	class  *Class
	values map[string]any
	err    error
}

// newRecordArg reads the first argument; the fields named in must have to be there.
func newRecordArg(c *call, class string, must ...string) *recordArg {
	r := &recordArg{values: c.record(0)}
	r.class, _ = c.srv.model.Class(class)
	for _, name := range must {
		if _, ok := r.values[name]; !ok && r.err == nil {
			r.err = xapi.NewError(xapi.FieldTypeError, name)
		}
	}
	return r
}

// get is the field in the form of arguments, nil where it is absent.
func (r *recordArg) get(name string) any {
	f, known := r.class.Field(name)
	v, there := r.values[name]
	if !known || !there || r.err != nil {
		return nil
	}
	out, err := convert(f.Type, name, v)
	if err != nil {
		r.err = err
		return nil
	}
	return out
}

func (r *recordArg) text(name string) string  { s, _ := r.get(name).(string); return s }
func (r *recordArg) number(name string) int64 { n, _ := r.get(name).(int64); return n }
func (r *recordArg) flag(name string) bool    { b, _ := r.get(name).(bool); return b }

func (r *recordArg) ref(name string) xapi.Ref {
	ref, _ := r.get(name).(xapi.Ref)
	return ref.OrNull()
}

func (r *recordArg) dict(name string) map[string]string {
	m, _ := r.get(name).(map[string]any)
	return textMap(m)
}

func (r *recordArg) texts(name string) []string {
	l, _ := r.get(name).([]any)
	out := make([]string, 0, len(l))
	for _, e := range l {
		s, _ := e.(string)
		out = append(out, s)
	}
	return out
}
