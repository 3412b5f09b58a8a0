package task

import (
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// Class is the class name of the records, on the wire and in the store.
const Class = "task"

// sessionClass is where the owner's record lives; its derived field "tasks"
// changes with ours.
const sessionClass = "session"

// Status is the enum task_status_type.
type Status string

// The statuses of a task. The last three are terminal.
const (
	Pending    Status = "pending"
	Cancelling Status = "cancelling"
	Success    Status = "success"
	Failure    Status = "failure"
	Cancelled  Status = "cancelled"
)

// Finished tells whether s is terminal.
func (s Status) Finished() bool { return s == Success || s == Failure || s == Cancelled }

// The words of the enum task_allowed_operations.
const (
	opCancel  = "cancel"
	opDestroy = "destroy"
)

// Where a client looks at a task's output: the key in other_config that holds
// its last 16 KiB.
const OutputKey = "patchd-output"

// Record is what is known about one task. The JSON names are those of the
// XenAPI; names that begin with "_" are stored and never shown. The field
// subtasks is derived, see Subtasks.
type Record struct {
	UUID              xapi.UUID         `json:"uuid"`
	NameLabel         string            `json:"name_label"`
	NameDescription   string            `json:"name_description"`
	AllowedOperations []string          `json:"allowed_operations"`
	CurrentOperations map[string]string `json:"current_operations"`
	Created           time.Time         `json:"created"`
	Finished          time.Time         `json:"finished"` // the epoch until it is
	Status            Status            `json:"status"`
	ResidentOn        xapi.Ref          `json:"resident_on"`
	Progress          float64           `json:"progress"` // 0 to 1
	Type              string            `json:"type"`
	Result            string            `json:"result"`     // XML-RPC encoding of a value
	ErrorInfo         []string          `json:"error_info"` // code, parameters
	OtherConfig       map[string]string `json:"other_config"`
	SubtaskOf         xapi.Ref          `json:"subtask_of"`
	Backtrace         string            `json:"backtrace"`

	// Session is the stored ref of the session that owns the task, and User
	// the name of its user; both empty for the server's own tasks.
	Session xapi.Ref `json:"_session,omitempty"`
	User    string   `json:"_user,omitempty"`
	// Driven says that the server works, or has worked, on it.
	Driven bool `json:"_driven,omitempty"`
	// Settled is the result of work that has come true while its task had not
	// ended; see Settle.
	Settled string `json:"_settled,omitempty"`
	// Destroy says that the record goes as soon as the task has finished.
	Destroy bool `json:"_destroy,omitempty"`
}

// OwnedBy tells whether the task belongs to that session (its stored ref) or
// to another session of the same user. A task of the server belongs to nobody.
func (r Record) OwnedBy(session xapi.Ref, user string) bool {
	if r.Session != "" && r.Session == session {
		return true
	}
	return r.User != "" && r.User == user
}

// Err is the failure a finished task stands for: nil after success and while
// it goes on, else its code and parameters.
func (r Record) Err() error {
	if !r.Status.Finished() || r.Status == Success {
		return nil
	}
	if len(r.ErrorInfo) == 0 {
		return xapi.NewError(xapi.InternalError, "the task ended as "+string(r.Status)+" without saying why")
	}
	return xapi.NewError(r.ErrorInfo[0], r.ErrorInfo[1:]...)
}

// Indexes are the lookups this package needs; they go into store.Options.
// A task that appears, moves or goes is a change of its parent, whose derived
// field subtasks shows it, and of its session.
func Indexes() []store.Index {
	return []store.Index{
		{Class: Class, Field: "subtask_of", Parent: Class},
		{Class: Class, Field: "_session", Parent: sessionClass},
		{Class: Class, Field: "_user"},
	}
}

// Subtasks is the derived field subtasks of a task, oldest first.
func Subtasks(v *store.View, parent xapi.Ref) []xapi.Ref {
	return v.Refs(Class, "subtask_of", string(parent))
}

// OfSession is the derived field tasks of a session, given its stored ref.
func OfSession(v *store.View, session xapi.Ref) []xapi.Ref {
	return v.Refs(Class, "_session", string(session))
}

// Spec says what a new task is.
type Spec struct {
	// Label and Description are shown to people; at most 1 KiB and 64 KiB.
	Label, Description string
	// Session is the stored ref of the owner's session and User its name;
	// empty for tasks of the server itself.
	Session xapi.Ref
	User    string
	// SubtaskOf is the parent, or empty.
	SubtaskOf xapi.Ref
	// Type is shown as it is; "" gives the usual "<none/>".
	Type string
}

const (
	maxLabel       = 1 << 10
	maxDescription = 64 << 10
)

func (s Spec) check() error {
	if len(s.Label) > maxLabel {
		return xapi.NewError(xapi.ValueNotSupported, "label", cut(s.Label, 64)+"…", "longer than 1024 bytes")
	}
	if len(s.Description) > maxDescription {
		return xapi.NewError(xapi.ValueNotSupported, "description", cut(s.Description, 64)+"…", "longer than 65536 bytes")
	}
	return nil
}

func (s Spec) record(now time.Time, host xapi.Ref) Record {
	r := Record{
		UUID:              xapi.NewUUID(),
		NameLabel:         s.Label,
		NameDescription:   s.Description,
		AllowedOperations: []string{opCancel, opDestroy},
		CurrentOperations: map[string]string{},
		Created:           now.UTC(),
		Finished:          xapi.Epoch,
		Status:            Pending,
		ResidentOn:        host.OrNull(),
		Type:              s.Type,
		ErrorInfo:         []string{},
		OtherConfig:       map[string]string{},
		SubtaskOf:         s.SubtaskOf.OrNull(),
		Backtrace:         "()",
		Session:           s.Session,
		User:              s.User,
	}
	if r.Session.IsNull() {
		r.Session = ""
	}
	if r.Type == "" {
		r.Type = "<none/>"
	}
	return r
}
