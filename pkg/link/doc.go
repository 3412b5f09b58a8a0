// Package link is the connection between a host and the coordinator of its
// pool: a Hub on the coordinator's side, a Client on the host's.
//
// # Words
//
// A link is one TLS connection that a host dials and keeps. It begins as
// `POST /patchd/link`, is upgraded, and carries JSON, one message a line, both
// ways: a request {"id","method","params"}, its answer {"id","result"} or
// {"id","error":{"code","params"}}, and from the coordinator pushes, which are
// requests without an id that nobody answers.
//
// # Life
//
// The host says hello, with its protocol version and its facts, and is told the
// term, the pool and its own record. Then it is pushed its orders, again and
// whole whenever something in them has changed. It claims, reports and ends its
// jobs by requests. Every 45 s it sends a beat, which is answered: a side that
// hears nothing for long enough cuts the link. When a link has ended the host
// dials again, soon and with jitter, whoever of the coordinators leads.
//
// # Who may what
//
// A host is the one whose record has the key that it showed. Every request is
// checked for being about that host: its jobs, the images those name, the
// repositories it has plugged, itself. All else is refused and logged. The hub
// holds nothing that is not in the pool database but who is connected.
//
// What one side can make the other hold is bounded: length of a line, requests
// at once, requests in a second, time to take what was sent.
package link
