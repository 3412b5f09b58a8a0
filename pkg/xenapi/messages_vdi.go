package xenapi

import (
	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/xapi"
)

// vdiMessages are the explicit messages of VDI.
func vdiMessages(m *Model) []*Message {
	vdi, self, sr := refParam("vdi", "VDI"), refParam("self", "VDI"), refParam("sr", "SR")
	driverParams := mapParam("driver_params").or(noConfig())
	return []*Message{
		work("VDI", "create", RefTo("VDI"), vdiCreate, Param{Name: "args", Type: RecordOf("VDI")}),
		work("VDI", "introduce", RefTo("VDI"), vdiIntroduce, vdiIntroduceParams()...),
		work("VDI", "destroy", Void, func(c *call) (any, error) { return nil, c.srv.Pool.VDIDestroy(c.ctx, c.ref(0)) }, self),
		work("VDI", "forget", Void, func(c *call) (any, error) { return nil, c.srv.Pool.VDIForget(c.ctx, c.ref(0)) }, vdi),
		work("VDI", "update", Void, func(c *call) (any, error) { return nil, c.srv.Pool.VDIUpdate(c.ctx, c.ref(0)) }, vdi),
		work("VDI", "clone", RefTo("VDI"), func(c *call) (any, error) {
			return refResult(c.srv.Pool.VDIClone(c.ctx, c.ref(0), c.dict(1)))
		}, vdi, driverParams),
		work("VDI", "snapshot", RefTo("VDI"), func(c *call) (any, error) {
			return refResult(c.srv.Pool.VDISnapshot(c.ctx, c.ref(0), c.dict(1)))
		}, vdi, driverParams),
		work("VDI", "copy", RefTo("VDI"), func(c *call) (any, error) {
			return refResult(c.srv.Pool.VDICopy(c.ctx, c.ref(0), c.ref(1), c.ref(2), c.ref(3)))
		}, vdi, sr, refParam("base_vdi", "VDI").or(xapi.NullRef), refParam("into_vdi", "VDI").or(xapi.NullRef)),
		work("VDI", "pool_migrate", RefTo("VDI"), func(c *call) (any, error) {
			return refResult(c.srv.Pool.VDIPoolMigrate(c.ctx, c.ref(0), c.ref(1), c.dict(2)))
		}, vdi, sr, mapParam("options")),
		work("VDI", "resize", Void, vdiResize, vdi, intParam("size")),
		work("VDI", "resize_online", Void, vdiResize, vdi, intParam("size")),
		work("VDI", "set_name_label", Void, func(c *call) (any, error) {
			return nil, c.srv.Pool.VDISetNameLabel(c.ctx, c.ref(0), c.text(1))
		}, self, textParam("value")),
		work("VDI", "set_name_description", Void, func(c *call) (any, error) {
			return nil, c.srv.Pool.VDISetNameDescription(c.ctx, c.ref(0), c.text(1))
		}, self, textParam("value")),
		work("VDI", "set_read_only", Void, func(c *call) (any, error) {
			return nil, c.srv.Pool.VDISetReadOnly(c.ctx, c.ref(0), c.flag(1))
		}, self, boolParam("value")),
		work("VDI", "set_sharable", Void, func(c *call) (any, error) {
			return nil, c.srv.Pool.VDISetSharable(c.ctx, c.ref(0), c.flag(1))
		}, self, boolParam("value")),
		refused("VDI", "set_on_boot", self, Param{Name: "value", Type: enumOnBoot}),
		refused("VDI", "set_allow_caching", self, boolParam("value")),
	}
}

func vdiResize(c *call) (any, error) { return nil, c.srv.Pool.VDIResize(c.ctx, c.ref(0), c.number(1)) }

func vdiCreate(c *call) (any, error) {
	r := newRecordArg(c, "VDI", "SR", "virtual_size")
	rec := pool.VDI{
		NameLabel: r.text("name_label"), NameDescription: r.text("name_description"), SR: r.ref("SR"),
		VirtualSize: r.number("virtual_size"), Type: r.text("type"), Sharable: r.flag("sharable"),
		ReadOnly: r.flag("read_only"), OtherConfig: r.dict("other_config"), XenstoreData: r.dict("xenstore_data"),
		SMConfig: r.dict("sm_config"), Tags: r.texts("tags"), SnapshotOf: xapi.NullRef,
	}
	if rec.Type == "" {
		rec.Type = "user"
	}
	if r.err != nil {
		return nil, r.err
	}
	if rec.VirtualSize < 0 {
		return nil, xapi.NewError(xapi.ValueNotSupported, "virtual_size", c.plain("virtual_size"), "negative")
	}
	return refResult(c.srv.Pool.VDICreate(c.ctx, rec))
}

// plain is a member of the record of the first argument, for an error.
func (c *call) plain(field string) string { return clip(plainText(c.record(0)[field]), 64) }

func vdiIntroduceParams() []Param {
	return []Param{
		textParam("uuid"), textParam("name_label"), textParam("name_description"), refParam("SR", "SR"),
		{Name: "type", Type: enumVdiType}, boolParam("sharable"), boolParam("read_only"), mapParam("other_config"),
		textParam("location"), mapParam("xenstore_data").or(noConfig()), mapParam("sm_config").or(noConfig()),
		boolParam("managed").or(true), intParam("virtual_size").or(int64(0)), intParam("physical_utilisation").or(int64(0)),
		refParam("metadata_of_pool", "pool").or(xapi.NullRef), boolParam("is_a_snapshot").or(false),
		Param{Name: "snapshot_time", Type: Datetime}.or(xapi.Epoch), refParam("snapshot_of", "VDI").or(xapi.NullRef),
	}
}

// vdiIntroduce makes a record for an image that is on the SR already.
func vdiIntroduce(c *call) (any, error) {
	uuid, err := xapi.ParseUUID(c.text(0))
	if err != nil {
		return nil, xapi.NewError(xapi.UUIDInvalid, "VDI", clip(c.text(0), 128))
	}
	return refResult(c.srv.Pool.VDIIntroduce(c.ctx, pool.VDIIntro{UUID: uuid, VDI: pool.VDI{
		UUID: uuid, NameLabel: c.text(1), NameDescription: c.text(2), SR: c.ref(3), Type: c.text(4),
		Sharable: c.flag(5), ReadOnly: c.flag(6), OtherConfig: c.dict(7), Location: c.text(8),
		XenstoreData: c.dict(9), SMConfig: c.dict(10), Managed: c.flag(11), VirtualSize: c.number(12),
		PhysicalUtilisation: c.number(13), IsASnapshot: c.flag(15), SnapshotTime: c.when(16), SnapshotOf: c.ref(17),
	}}))
}
