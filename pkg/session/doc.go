// Package session knows who calls: users and their passwords, roles, and the
// records of class session.
//
// # Terms
//
// A session ref is a secret: who has it, is logged in. The store never holds
// it; the record lies under its stored ref, which is made from the SHA-256 of
// the secret one (StoredRef) and opens nothing. A user has a name, a password,
// kept as an argon2id hash, and a Role. A local session is root's over the
// unix socket; a pool session is that of another host, which showed the pool
// secret. Sessions that last for one HTTP request, or for the 60 seconds that
// Basic credentials are remembered, are kept in memory only.
//
// # Life cycle
//
//	ref, err := sessions.Login(ctx, "root", password, "xo", "192.0.2.7:41234")
//	s, err := sessions.Get(ref)        // by every call; SESSION_INVALID [ref]
//	err = s.Require(session.PoolOperator, "pool_patch.apply")
//	err = sessions.Logout(ctx, ref)    // s.Context() ends: SESSION_INVALID [ref]
//
// A session ends by Logout, when it was idle for 24 hours, when its user is
// removed or gets another password, and as the least recently used one of a
// user who has too many. Whatever ends it ends its Context.
//
// # What is refused
//
// A login flood costs two hashes at a time (38 MiB) and a bounded number of
// waiters, which are served in turn address by address, so that a flood from
// one address does not keep an admin at another out. Passwords, refs and the
// pool secret never stand in an error or a log line, but for SESSION_INVALID,
// which repeats to a client the dead ref it sent.
package session
