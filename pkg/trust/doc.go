// Package trust knows how hosts of a pool know each other: by public key, and
// by nothing else. It owns this host's key and certificate, the TLS between
// hosts, and the tickets by which one host lets another read blocks.
//
// # Keys
//
// A key is its SPKI: the DER of SubjectPublicKeyInfo. A pin is the SHA-256 of
// that. Names, authorities and dates of a certificate say nothing here; what
// counts is the key, and who has signed for it: whoever trusts a key trusts
// the one that the old key has signed a certificate for. See VerifyChain.
//
// # Two kinds of clients on one listener
//
// A client that offers the protocol "patchd/1" (ALPN) is a host: it gets TLS
// 1.3 and must show a certificate of any kind. Everybody else gets what they
// always got. Who the host is decides the one who answers its request.
package trust
