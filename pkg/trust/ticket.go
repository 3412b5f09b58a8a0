package trust

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/patchd/patchd/pkg/xapi"
)

// TicketLife is how long a ticket holds.
const TicketLife = 15 * time.Minute

// maxTicket is the length of an encoded ticket, in bytes.
const maxTicket = 4 << 10

// ticketDomain keeps the signature of a ticket from being one of anything else.
const ticketDomain = "patchd block ticket 1\x00"

// Ticket says that one host of a pool may read the blocks of the images with
// one map. A coordinator signs it; each host that has such blocks looks at it.
type Ticket struct {
	Pool    xapi.UUID `json:"pool"`
	Host    xapi.UUID `json:"host"` // the reader
	Pin     string    `json:"pin"`  // of the key that the reader shows
	Map     string    `json:"map"`  // digest of the block map
	Expires time.Time `json:"expires"`
}

// sealed is an encoded ticket.
type sealed struct {
	Ticket    []byte `json:"ticket"` // the JSON of it
	Signature []byte `json:"signature"`
}

// Seal encodes t and signs it with the key of this host.
func (id *Identity) Seal(t Ticket) ([]byte, error) {
	body, err := json.Marshal(t)
	if err != nil {
		return nil, err
	}
	signer, ok := id.Certificate().PrivateKey.(crypto.Signer)
	if !ok {
		return nil, errors.New("this host's key cannot sign")
	}
	signature, err := signer.Sign(rand.Reader, ticketDigest(body), crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("sign a ticket: %w", err)
	}
	return json.Marshal(sealed{body, signature})
}

func ticketDigest(body []byte) []byte {
	sum := sha256.Sum256(append([]byte(ticketDomain), body...))
	return sum[:]
}

// OpenTicket decodes a ticket that the owner of one of the keys (SPKIs) signed
// and that holds at now. Whether it is for the pool, the map and the reader at
// hand tells Allows. Code: OPERATION_NOT_ALLOWED.
func OpenTicket(b []byte, keys [][]byte, now time.Time) (Ticket, error) {
	var t Ticket
	var s sealed
	if len(b) > maxTicket || json.Unmarshal(b, &s) != nil {
		return t, refused("it makes no sense")
	}
	if !signedByAny(s, keys) {
		return t, refused("no coordinator of this pool has signed it")
	}
	if json.Unmarshal(s.Ticket, &t) != nil {
		return t, refused("it makes no sense")
	}
	if !now.Before(t.Expires) {
		return t, refused("it expired at " + t.Expires.UTC().Format(time.RFC3339))
	}
	if t.Expires.Sub(now) > 2*TicketLife {
		return t, refused("it would hold for too long: the clocks of the two hosts differ too much")
	}
	return t, nil
}

// Allows tells whether the ticket lets the owner of a key read the blocks of a
// map in a pool. Code: OPERATION_NOT_ALLOWED.
func (t Ticket) Allows(pool xapi.UUID, mapDigest, pin string) error {
	switch {
	case t.Pool != pool:
		return refused("it is of another pool")
	case mapDigest == "" || t.Map != mapDigest:
		return refused("it is for other blocks")
	case pin == "" || t.Pin != pin:
		return refused("it is another host's")
	}
	return nil
}

func refused(why string) error {
	return xapi.NewError(xapi.OperationNotAllowed, "the ticket is refused: "+why)
}

func signedByAny(s sealed, keys [][]byte) bool {
	digest := ticketDigest(s.Ticket)
	for _, spki := range keys {
		key, err := x509.ParsePKIXPublicKey(spki)
		if err != nil {
			continue
		}
		switch k := key.(type) {
		case *ecdsa.PublicKey:
			if ecdsa.VerifyASN1(k, digest, s.Signature) {
				return true
			}
		case *rsa.PublicKey:
			if rsa.VerifyPKCS1v15(k, crypto.SHA256, digest, s.Signature) == nil {
				return true
			}
		}
	}
	return false
}
