// Package xetest is a client of the thin-CLI protocol that behaves on the wire
// as a real xe does, for tests on machines that have none: HTTP/1.0 requests
// without a Host header, the command line one word a line, a second connection
// for files that waits for the status line before it sends the first byte,
// files opened only when they stand on its own command line.
//
// It has its own codec, written from the protocol and not from the server, so
// that one mistake cannot hide on both sides. Run works like the program: what
// it would print and its exit code are the result. A Step hook lets a test
// end the client at any point, as a killed process would.
package xetest
