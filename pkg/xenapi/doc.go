// Package xenapi is the wire: it speaks the XenAPI as unmodified clients of
// the classic family (API 2.5) know it.
//
// It owns the two codecs (XML-RPC and JSON-RPC), the table of the data model
// (classes, fields, messages, roles), the rendering of records from what the
// store holds, the dispatch of calls with their roles, tasks and audit lines,
// and the HTTP handlers of the RPC endpoints.
//
// # How a call goes
//
// A codec decodes the body into a method name and a list of values. [Server.Call]
// finds the one [Message] bound to that name, counts and checks the
// parameters against their types, checks the session's role, and runs the
// handler: inside a task when the message is one that changes something. The
// handler converts and delegates to pool, task, session or event. The codec
// encodes the result by the forms of the values alone.
//
// # Values
//
// A value is one of string (also for ints, enums and refs), bool, float64,
// []any and map[string]any, and nil for void. Results have two more inside this
// package: [Date], and [Int32] for the one place of the wire that has real
// integers.
//
// # What it refuses
//
// The package touches no disk, makes no records of its own and knows no
// storage. What a client sends is bounded before it is looked at: size of the
// body, depth, number of values, length of texts.
package xenapi
