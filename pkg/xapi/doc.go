// Package xapi is the vocabulary every other package speaks: references and
// uuids, the time format of the wire, the error codes with their parameters,
// the words of after-apply guidance, and the undo stack.
//
// The names are those of the XenAPI. A ref, a uuid and a record are three
// different things: a Ref names an object for as long as it lives in this
// database, a UUID names it for ever and everywhere, and a record is what is
// known about it. This package imports nothing but the standard library and
// google/uuid.
package xapi
