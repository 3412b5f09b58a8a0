// Package event answers event.from, event.inject and the legacy event.next from
// the view of the pool database.
//
// # Terms
//
// A token is "<store id>:<revision>": everything up to that revision is known
// to its holder. A subscription is "*", a class in any case, or
// "class/OpaqueRef:…" for one object. A batch is what happened to subscribed
// objects after a token, once for each object: add when it appeared, del when
// it vanished, else mod; what came and went in between is not in it.
//
// # One revision
//
// Events, snapshots, counts and the new token of a batch are all of one view.
// Who waits is woken by a change and looks at what changed, not at everything.
//
// # What it refuses
//
// Tokens of other data, of the future, or of a past that is forgotten answer
// EVENTS_LOST: clients then start afresh. What is no token at all answers
// EVENT_FROM_TOKEN_PARSE_FAILURE. Classes that are not served have no events;
// to subscribe to one is no error, for clients of richer pools do.
package event
