// Package delta sends a new patch as its difference to one that the receiver
// has. It cuts bytes into chunks by their content, lists the chunks of a base
// (Index), writes what a file has that the base has not (Encode), and makes the
// file again (Decoder). It knows no patches, no HTTP and no files.
//
// # Terms
//
// The base is the payload that the receiver has: what stands in its image. The
// file is what is sent: a signed message, of which some ranges are payload and
// the rest is framing (Source). Only payload is looked for in the base; the
// delta gives back the file, byte for byte, so that whoever receives it does
// with it what is done with a whole one.
//
//	ix, err := delta.BuildIndex(base, size)         // where the base is
//	err = delta.Encode(w, delta.File{…}, ix)        // where the file is
//	r := delta.NewDecoder(stream, base, size)       // where the base is
//
// # What is promised
//
// The same file and index give the same delta to the byte, so that a transfer
// that was interrupted can go on. A Decoder works in constant memory, never
// gives more than the size that the delta begins with, and ends with io.EOF only
// when length and SHA-256 are right. Nobody is believed: not the index, which
// can only make a delta longer or useless, and not the delta.
//
// docs/delta.md is the format.
package delta
