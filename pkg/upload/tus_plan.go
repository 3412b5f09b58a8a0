package upload

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/vdi"
	"github.com/patchd/patchd/pkg/xapi"
)

// plan is what an upload was announced to be. It lies in the note of its draft,
// so that a restart knows it.
type plan struct {
	ID       xapi.UUID `json:"id"`
	Task     xapi.Ref  `json:"task"`
	User     string    `json:"user"`           // who made it; "" for a host of the pool
	Length   int64     `json:"length"`         // of what is sent, in bytes
	Size     int64     `json:"size"`           // of the signed file, in bytes
	Delta    bool      `json:"delta"`          // what is sent is a delta to Base
	Base     xapi.UUID `json:"base,omitempty"` // a pool_patch
	Payload  int64     `json:"payload_size"`   // of the payload in bytes, as the client says; 0: it does not
	Digest   string    `json:"digest,omitempty"`
	Filename string    `json:"filename,omitempty"`
	SR       xapi.Ref  `json:"SR"`
	// Wide tells that the message is compressed, so that the image is one for
	// a payload of any size.
	Wide bool `json:"wide,omitempty"`
	// Over tells that the image began as a clone of that of Base.
	Over bool `json:"over,omitempty"`
	// Layout is who laid out the image: who goes on has to do the same.
	Layout vdi.LayoutKind `json:"layout,omitempty"`
}

// The keys of the note.
const (
	noteKind = "kind"
	notePlan = "upload"
	noteTask = "task"
	// kindUpload marks the drafts of resumable uploads.
	kindUpload = "pool_patch_upload"
)

// note is p as the note of a draft.
func (p plan) note() (map[string]string, error) {
	text, err := json.Marshal(p)
	if err != nil {
		return nil, fmt.Errorf("note of upload %s: %w", p.ID, err)
	}
	return map[string]string{noteKind: kindUpload, noteTask: string(p.Task), notePlan: string(text)}, nil
}

// readPlan reads the note of a draft; ok is false for drafts of another kind.
func readPlan(note map[string]string) (p plan, ok bool, err error) {
	if note[noteKind] != kindUpload {
		return p, false, nil
	}
	if err := json.Unmarshal([]byte(note[notePlan]), &p); err != nil {
		return p, true, fmt.Errorf("note of an upload: %w", err)
	}
	if !p.ID.Valid() || p.Length <= 0 || p.Size <= 0 {
		return p, true, fmt.Errorf("note of an upload: %s of %d bytes, %d sent", p.ID, p.Size, p.Length)
	}
	return p, true, nil
}

// expect is the likely size of the payload in bytes, -1 when it may be any.
func (p plan) expect() int64 {
	switch {
	case p.Wide:
		return -1
	case p.Over:
		return p.Payload
	}
	return p.Size
}

// outcome is how an upload has ended.
type outcome struct {
	at   time.Time
	ref  xapi.Ref // the pool_patch
	err  error
	gone bool // it was deleted, cancelled or has expired
}

// DraftTasks are the tasks of the uploads that go on after a restart, for
// task.Manager.Repair. A note that cannot be read owns nothing.
func DraftTasks(drafts []pool.DraftInfo) map[xapi.Ref]bool {
	owned := map[xapi.Ref]bool{}
	for _, d := range drafts {
		if p, ok, err := readPlan(d.Note); ok && err == nil {
			owned[p.Task] = true
		}
	}
	return owned
}
