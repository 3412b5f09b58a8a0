package xenapi

import (
	"context"
	"strconv"

	"github.com/patchd/patchd/pkg/xapi"
)

// RoomPool is the side of the room on an SR.
type RoomPool interface {
	SRRoom(ctx context.Context, sr xapi.Ref) (free, promised int64, err error)
}

// roomMessages are not of the XenAPI, whose SR tells what is used but neither what
// may still be written nor what is kept for others.
func roomMessages() []*Message {
	return []*Message{look("patchd", "sr_room", stringMap, srRoom, refParam("sr", "SR"))}
}

// srRoom gives, in bytes, free: what may still be written to a plugged SR, and
// promised: how much of that is kept for uploads, copies and jobs under way.
func srRoom(c *call) (any, error) {
	free, promised, err := c.srv.Pool.SRRoom(c.ctx, c.ref(0))
	if err != nil {
		return nil, err
	}
	return map[string]any{"free": strconv.FormatInt(free, 10), "promised": strconv.FormatInt(promised, 10)}, nil
}
