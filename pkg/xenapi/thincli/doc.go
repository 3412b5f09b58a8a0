// Package thincli answers POST /cli: it is the server half of xe, so that the
// unmodified command-line client of a pool admin works against patchd.
//
// # What it owns
//
// The thin-CLI protocol (version 0.2) on a hijacked connection, the command
// line as xe sends it, the table of commands, the tables of fields that say
// how each class is shown, and the texts of failures.
//
// # How a conversation runs
//
// The client posts its command line, one word a line, and then both sides
// leave HTTP: the server sends a magic string and its version, the client
// answers in kind, and from there on length-prefixed frames go both ways. The
// server prints by frames, asks the client to PUT a file or to GET one over a
// second connection, and ends with the exit code:
//
//	> POST /cli HTTP/1.0 … patch-upload\nfile-name=fix.xsupdate\nusername=…
//	< XenSource thin CLI protocol 0 2
//	> XenSource thin CLI protocol 0 2
//	< HttpPut fix.xsupdate /pool_patch_upload?session_id=…&task_id=…
//	> OK
//	< Print 35f5…
//	< Exit 0
//
// # What it refuses
//
// It knows no records and touches no disk: everything goes through API, under
// the client's own session, so roles are checked where every other call is
// checked. Nothing of the client's is trusted: bodies, frames and files are
// bounded, every write has a deadline, and a client that goes away ends its
// command (but never the work behind it, except a transfer that it was itself
// still feeding).
//
// # How it is wired
//
//	cli := thincli.New(thincli.Over(server), thincli.Options{Log: log, Local: thincli.TrustedRequest})
//	router.Handle("/cli", cli).Methods(http.MethodPost) // before server.Routes
//	…
//	tasks.Stop()
//	cli.Close()
package thincli
