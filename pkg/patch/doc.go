// Package patch knows what one patch is: a signed executable that answers
// `info`, `precheck` and `apply`. It owns the signature check, the XML of the
// protocol with its error table, the trusted keys, the question `info` put to
// a patch that is locked away, and the tool that makes a signed patch of a
// folder. docs/patch-protocol.md is the same for people who write patches.
//
// It refuses whatever is not signed by a trusted key: unsigned, encrypted,
// nested, lengthened and shortened messages, weak hashes and keys, keys that
// are revoked or expired now or were when they signed. The one exception is an
// unsigned file whose SHA-256 stands in the configuration file (Options.Pinned).
//
// # Terms
//
// The message is what is uploaded: an OpenPGP signed message, binary or
// armoured, or cleartext signed text. The payload is the executable inside; it
// is what is stored, and all digests are of it. The Signature that is kept
// verifies the stored payload alone, as a detached signature.
//
// # Payload of a cleartext message
//
// A cleartext signature does not cover blanks at the end of a line, nor the
// kind of line ending, nor whether the last line is ended. So that nothing
// unsigned is ever run, the payload is a function of the signed text: every
// line without its trailing blanks, tabs and carriage returns, ended by one
// line feed. For text with line feeds this is what `gpg --decrypt` writes.
//
// # Reading
//
//	keys, err := patch.LoadKeyring(dir)
//	m, err := patch.Open(body, keys, patch.Options{Pinned: pinned})
//	_, err = io.Copy(image, m) // err is nil only when the signature holds
//	sig := m.Signature()
//
// The bytes flow before they are verified: until Read has given io.EOF they
// are worth nothing, and on any other error they must be thrown away.
package patch
