// Package peer moves the blocks of disk images between hosts. An image is known
// by the digest of its block map, so it does not matter who made it or where it
// lies: whoever has a block that is as the map says may give it.
//
// A Node is one host. It serves what its storage has, and what it is fetching
// itself; and it pulls an image from several others at once.
//
//	GET /patchd/map?map=DIGEST               the encoded block map
//	GET /patchd/blocks?map=DIGEST&have=1     one bit for each block of the map, in its order, the lowest first: it is here
//	GET /patchd/blocks?map=DIGEST&blocks=3,17-20[&first=1]
//
// The last one gives the bytes of those blocks one after the other, at most 16.
// Each is held against the map before it is sent; an answer that ends early ends
// before a block that is not. With first=1 a host gives no block that it has given to
// another one lately: that one has it, or soon will, and is to be asked. So an
// image that many fetch at once leaves the first host little more than once.
//
// Every request carries a ticket in X-Patchd-Ticket. Answers: 200; 400 for what
// makes no sense; 403 for a ticket that does not hold; 404 when nothing of the
// image is here; 409 with the blocks that are missing, or were given already; 503
// with Retry-After when too many read at once.
//
// The package knows no records, no keys and no hosts: who may read what, and how
// a host is reached, are functions that it is given.
package peer
