package pool

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// ClassJoinToken is the class of JoinToken records, never on the wire.
const ClassJoinToken = "join_token"

// TokenLife is how long a join token may be used.
const TokenLife = 15 * time.Minute

// JoinToken lets one host into the pool, once. The secret itself is not kept.
type JoinToken struct {
	UUID    xapi.UUID `json:"uuid"`
	Hash    string    `json:"hash"` // SHA-256 of the secret, hexadecimal
	Expires time.Time `json:"expires"`
	// Host and Key are who has used it: that host may repeat its request, as it
	// must when the answer was lost.
	Host xapi.UUID `json:"host,omitempty"`
	Key  []byte    `json:"key,omitempty"`
}

// NewJoinToken makes a token and gives its id and its secret.
func (p *Pool) NewJoinToken(ctx context.Context) (id xapi.UUID, secret string, err error) {
	raw := make([]byte, 24)
	if _, err := rand.Read(raw); err != nil {
		return "", "", err
	}
	secret = base64.RawURLEncoding.EncodeToString(raw)
	t := JoinToken{UUID: xapi.NewUUID(), Hash: tokenHash(secret), Expires: p.Now().Add(TokenLife).UTC()}
	err = p.Store.Update(ctx, func(tx *store.Tx) error {
		for _, it := range tx.List(ClassJoinToken) {
			var old JoinToken
			if err := it.Decode(&old); err != nil || p.Now().After(old.Expires) {
				tx.Delete(ClassJoinToken, it.Ref)
			}
		}
		tx.Put(ClassJoinToken, xapi.NewRef(), t)
		return nil
	})
	return t.UUID, secret, err
}

func tokenHash(secret string) string {
	sum := sha256.Sum256([]byte("patchd join " + secret))
	return hex.EncodeToString(sum[:])
}

// JoinRequest is what a host says that wants to become a member. Its key is
// that of the connection.
type JoinRequest struct {
	// Token and Secret, or User and Password, which the caller checks. They are no
	// part of the body: whoever takes the request checks them before it reads that.
	Token    xapi.UUID `json:"-"`
	Secret   string    `json:"-"`
	User     string    `json:"-"`
	Password string    `json:"-"`

	Ref       xapi.Ref    `json:"ref"` // of Host, which it keeps
	Host      Host        `json:"host"`
	Facts     Facts       `json:"facts"`
	Inventory Inventory   `json:"inventory"`
	Patches   JoinPatches `json:"patches"`
	Stamps    Stamps      `json:"stamps"`
	// Align asks for the patches that other hosts have.
	Align bool `json:"align,omitempty"`
}

// JoinAnswer is what the pool tells its new member.
type JoinAnswer struct {
	Pool         xapi.UUID `json:"pool"`
	PoolName     string    `json:"pool_name"`
	Term         int64     `json:"term"`
	Host         xapi.Ref  `json:"host"`
	Coordinators []Peer    `json:"coordinators"`
	// SRs are those the pool knows already, by the ref that the host had: it
	// takes the pool's.
	SRs map[xapi.Ref]xapi.Ref `json:"SRs"`
	// Keys are the signing keys that the coordinator trusts; the host trusts
	// none of them before its admin says so.
	Keys []SigningKey `json:"keys"`
	// Lacks are the patches that other hosts have and this one has not.
	Lacks []PatchName `json:"lacks"`
	// Patches are those the pool did not know before.
	Patches []PatchName `json:"patches"`
}

// SigningKey is one public key for patches.
type SigningKey struct {
	Fingerprint string `json:"fingerprint"`
	Name        string `json:"name"`
	Public      []byte `json:"public"` // as it lies in trusted-keys
}

// PatchName names a patch for people.
type PatchName struct {
	UUID    xapi.UUID `json:"uuid"`
	Name    string    `json:"name"`
	Version string    `json:"version"`
}

// maxJoinPatches bounds what a new member brings.
const maxJoinPatches = 10000

// Admit takes a host into the pool. key is the public key it has shown. byUser
// tells that the caller has checked user and password; else the token counts.
// It may be repeated by the same host. Codes: SESSION_AUTHENTICATION_FAILED for
// a token that is not valid, INVALID_VALUE, OPERATION_NOT_ALLOWED when another
// host has that uuid or key.
func (p *Pool) Admit(ctx context.Context, req JoinRequest, key []byte, byUser bool) (JoinAnswer, error) {
	if err := checkJoin(req); err != nil {
		return JoinAnswer{}, err
	}
	if !byUser {
		if err := p.CheckJoinToken(req.Token, req.Secret); err != nil {
			return JoinAnswer{}, err
		}
	}
	srs, inv, err := p.knownSRs(req.Ref, req.Inventory)
	if err != nil {
		return JoinAnswer{}, err
	}
	err = p.Store.Update(ctx, func(tx *store.Tx) error {
		if !byUser {
			if err := p.useToken(tx, req, key); err != nil {
				return err
			}
		}
		return p.admitHost(tx, req, key)
	})
	if err != nil {
		return JoinAnswer{}, err
	}
	if err := p.TakeInventory(ctx, req.Ref, inv); err != nil {
		return JoinAnswer{}, fmt.Errorf("introduce the storage of host %s: %w", req.Host.UUID, err)
	}
	a := JoinAnswer{Host: req.Ref, SRs: srs}
	if a.Patches, err = p.mergePatches(ctx, req.Ref, req.Patches); err != nil {
		return a, fmt.Errorf("merge the patches of host %s: %w", req.Host.UUID, err)
	}
	if err := p.Resync(ctx, req.Ref, req.Stamps); err != nil {
		return a, fmt.Errorf("compare the stampfiles of host %s: %w", req.Host.UUID, err)
	}
	if err := p.SettlePoolApplied(ctx); err != nil {
		return a, err
	}
	p.Log.WithField("host", req.Host.UUID).WithField("name", req.Host.NameLabel).Info("a host has joined the pool")
	return a, p.describe(&a, req.Ref)
}

func checkJoin(req JoinRequest) error {
	switch {
	case !req.Host.UUID.Valid() || !req.Ref.Valid():
		return xapi.NewError(xapi.InvalidValue, "host", "has no uuid or ref")
	case req.Facts.URL == "":
		return xapi.NewError(xapi.InvalidValue, "url", "the host does not listen on TLS")
	case len(req.Host.NameLabel) > maxFact || !isLine(req.Host.NameLabel):
		return xapi.NewError(xapi.InvalidValue, "name_label", "is too long, or not one line of text")
	case len(req.Patches) > maxJoinPatches:
		return xapi.NewError(xapi.InvalidValue, "patches", fmt.Sprintf("more than %d", maxJoinPatches))
	}
	for ref, rec := range req.Patches {
		if !rec.UUID.Valid() || !ref.Valid() {
			return xapi.NewError(xapi.InvalidValue, "patches", fmt.Sprintf("%.64q", rec.UUID))
		}
	}
	return req.Facts.check()
}

var errToken = xapi.NewError(xapi.SessionAuthenticationFailed, "", "the join token is not valid: it may be used once, within 15 minutes; `patchd pool token` on the coordinator makes another")

// CheckJoinToken looks whether a token may let a host in, before anything else that
// the host says is read. Code: SESSION_AUTHENTICATION_FAILED.
func (p *Pool) CheckJoinToken(id xapi.UUID, secret string) error {
	return p.Store.View(func(v *store.View) error {
		var t JoinToken
		if it, ok := v.ByUUID(ClassJoinToken, id); !ok || it.Decode(&t) != nil || !t.opens(secret, p.Now()) {
			return errToken
		}
		return nil
	})
}

// opens tells whether a secret is that of the token, and the token holds.
func (t JoinToken) opens(secret string, now time.Time) bool {
	return subtle.ConstantTimeCompare([]byte(t.Hash), []byte(tokenHash(secret))) == 1 && !now.After(t.Expires)
}

// useToken marks the token as used by this host.
func (p *Pool) useToken(tx *store.Tx, req JoinRequest, key []byte) error {
	ref, ok := tx.ByUUID(ClassJoinToken, req.Token)
	if !ok {
		return errToken
	}
	t, err := store.Read[JoinToken](tx, ClassJoinToken, ref)
	if err != nil {
		return err
	}
	used := t.Host != "" && (t.Host != req.Host.UUID || !bytes.Equal(t.Key, key))
	if used || !t.opens(req.Secret, p.Now()) {
		return errToken
	}
	t.Host, t.Key = req.Host.UUID, key
	tx.Put(ClassJoinToken, ref, t)
	return nil
}

// admitHost writes the record of a new member.
func (p *Pool) admitHost(tx *store.Tx, req JoinRequest, key []byte) error {
	for _, it := range tx.List(ClassHost) {
		var h Host
		if err := it.Decode(&h); err != nil {
			return err
		}
		own := h.hasKey(key)
		if len(h.Keys) == 0 && !h.Leaving && !h.Coordinator && h.UUID == req.Host.UUID && it.Ref == req.Ref {
			continue // its key was revoked, and it comes back with another
		}
		if own && (h.UUID != req.Host.UUID || it.Ref != req.Ref) || !own && (h.UUID == req.Host.UUID || it.Ref == req.Ref) {
			return xapi.NewError(xapi.OperationNotAllowed, fmt.Sprintf(
				"the pool has a host %s (%s) with this uuid or key already: eject it first", h.NameLabel, h.UUID))
		}
		if own {
			return nil // the answer to its first request was lost
		}
	}
	if rec, err := p.poolRecord(tx); err != nil {
		return err
	} else if rec.revoked(key, p.Now()) {
		return xapi.NewError(xapi.OperationNotAllowed, "the key of this host was revoked: give it another with `patchd pool rotate-key` and join again")
	}
	rec := fullHost(ownFacts(req.Host))
	if old, err := store.Read[Host](tx, ClassHost, req.Ref); err == nil {
		rec = old // the pool's words about it
	}
	rec.Keys = []HostKey{{SPKI: key, Added: p.Now().UTC()}}
	rec.Coordinator, rec.Away = false, time.Time{}
	rec.take(req.Facts)
	if delete(rec.OtherConfig, keyAlign); req.Align {
		rec.OtherConfig[keyAlign] = "true"
	}
	tx.Put(ClassHost, req.Ref, rec)
	return nil
}

// hasKey tells whether a public key is one of the host's.
func (h Host) hasKey(spki []byte) bool {
	for _, k := range h.Keys {
		if bytes.Equal(k.SPKI, spki) {
			return true
		}
	}
	return false
}

// take writes down what a host says of itself.
func (h *Host) take(f Facts) {
	h.Hostname, h.Address, h.URL = f.Hostname, f.Address, f.URL
	h.SoftwareVersion, h.CPUInfo = notNil(f.SoftwareVersion), notNil(f.CPUInfo)
}

// fullHost is a record without anything that another one could choke on.
func fullHost(h Host) Host {
	h.OtherConfig, h.Logging, h.LicenseServer = notNil(h.OtherConfig), notNil(h.Logging), notNil(h.LicenseServer)
	h.GuestVCPUsParams, h.Tags = notNil(h.GuestVCPUsParams), notNilSet(h.Tags)
	h.SuspendImageSR, h.CrashDumpSR = xapi.NullRef, xapi.NullRef
	if h.Display == "" {
		h.Display = "enabled"
	}
	return h
}

// HostHello takes what a host says of itself when it connects. Codes: HANDLE_INVALID,
// INVALID_VALUE.
func (p *Pool) HostHello(ctx context.Context, host xapi.Ref, f Facts) error {
	if err := f.check(); err != nil {
		return err
	}
	return p.Store.Update(ctx, func(tx *store.Tx) error {
		rec, err := store.Read[Host](tx, ClassHost, host)
		if err != nil {
			return err
		}
		rec.take(f)
		tx.Put(ClassHost, host, rec)
		return nil
	})
}

// knownSRs gives the SRs of an inventory that the pool has under another ref,
// and the inventory with the pool's refs, without the VDIs in those. Code:
// OPERATION_NOT_ALLOWED for one that is not shared and another host's.
func (p *Pool) knownSRs(host xapi.Ref, inv Inventory) (known map[xapi.Ref]xapi.Ref, out Inventory, err error) {
	known, out = map[xapi.Ref]xapi.Ref{}, Inventory{Full: inv.Full}
	err = p.Store.View(func(v *store.View) error {
		for _, r := range inv.Put {
			var rec SR
			if r.Class != ClassSR || json.Unmarshal(r.Record, &rec) != nil {
				continue
			}
			it, ok := v.ByUUID(ClassSR, rec.UUID)
			if !ok {
				continue
			}
			if err := assertShared(v, host, it); err != nil {
				return err
			}
			if it.Ref != r.Ref {
				known[r.Ref] = it.Ref
			}
		}
		return nil
	})
	if err != nil {
		return nil, out, err
	}
	for _, r := range inv.Put {
		switch {
		case r.Class == ClassSR && known[r.Ref] != "":
			continue
		case r.Class == ClassPBD:
			var rec PBD
			if err := json.Unmarshal(r.Record, &rec); err != nil {
				return nil, out, err
			}
			if to := known[rec.SR]; to != "" {
				rec.SR = to
				if r.Record, err = json.Marshal(rec); err != nil {
					return nil, out, err
				}
			}
		case r.Class == ClassVDI:
			var rec VDI
			if err := json.Unmarshal(r.Record, &rec); err != nil {
				return nil, out, err
			}
			if known[rec.SR] != "" {
				continue
			}
		}
		out.Put = append(out.Put, r)
	}
	return known, out, nil
}

// assertShared refuses an SR that is another host's.
func assertShared(v *store.View, host xapi.Ref, it store.Item) error {
	var rec SR
	if err := it.Decode(&rec); err != nil || rec.Shared {
		return err
	}
	for _, ref := range v.Refs(ClassPBD, "SR", string(it.Ref)) {
		link, err := store.Get[PBD](v, ClassPBD, ref)
		if err != nil {
			return err
		}
		if link.Host != host {
			return xapi.NewError(xapi.OperationNotAllowed, fmt.Sprintf(
				"the pool has SR %s (%s) on another host, and it is not shared: say so with SR.set_shared where it is, else forget it on one of them", rec.NameLabel, rec.UUID))
		}
	}
	return nil
}

// mergePatches introduces the patches that a new member brings, one by one. A
// patch that the pool knows stays as it is, but gets an image where it has none.
// An image is one that lies with the host, or has a block map and lies in an SR that
// the host is linked to.
func (p *Pool) mergePatches(ctx context.Context, host xapi.Ref, patches map[xapi.Ref]Patch) (fresh []PatchName, err error) {
	for ref, said := range patches {
		isNew := false
		err := p.Store.Update(ctx, func(tx *store.Tx) (err error) {
			isNew, err = p.mergePatch(tx, host, ref, said)
			return err
		})
		if err != nil {
			return nil, err
		}
		if isNew {
			fresh = append(fresh, PatchName{said.UUID, said.NameLabel, said.Version})
		}
	}
	return fresh, nil
}

func (p *Pool) mergePatch(tx *store.Tx, host, ref xapi.Ref, rec Patch) (isNew bool, err error) {
	brings, err := p.brings(tx, host, rec.VDI)
	if err != nil {
		return false, err
	}
	if !brings {
		rec.VDI = xapi.NullRef
	}
	rec.PoolApplied, rec.OtherConfig, rec.Filename, rec.Unconfirmed = false, notNil(rec.OtherConfig), "", nil
	known, ok := tx.ByUUID(ClassPatch, rec.UUID)
	if !ok {
		if tx.Has(ClassPatch, ref) {
			ref = xapi.NewRef() // it is another patch's here
		}
		tx.Put(ClassPatch, ref, rec)
		return true, nil
	}
	old, err := store.Read[Patch](tx, ClassPatch, known)
	same := old.Digest == rec.Digest || old.Digest == "" && old.InfoXML == rec.InfoXML
	if err != nil || !brings || !same || tx.Has(ClassVDI, old.VDI) {
		return false, err
	}
	if old.Digest != "" {
		old.VDI = rec.VDI
		tx.Put(ClassPatch, known, old)
		return false, nil
	}
	rec.NameLabel, rec.NameDescription, rec.OtherConfig = old.NameLabel, old.NameDescription, old.OtherConfig
	rec.PoolApplied, rec.Filename, rec.Unconfirmed = old.PoolApplied, old.Filename, old.Unconfirmed
	tx.Put(ClassPatch, known, rec)
	return false, nil
}

// brings tells whether a VDI may be the image of a patch that a host brings.
func (p *Pool) brings(tx *store.Tx, host, ref xapi.Ref) (bool, error) {
	if !tx.Has(ClassVDI, ref) {
		return false, nil
	}
	rec, err := store.Read[VDI](tx, ClassVDI, ref)
	if err != nil {
		return false, err
	}
	for _, link := range tx.Refs(ClassPBD, "SR", string(rec.SR)) {
		pbd, err := store.Read[PBD](tx, ClassPBD, link)
		if err != nil {
			return false, err
		}
		if pbd.Host == host && rec.Map != "" {
			return true, nil
		}
	}
	return p.worksOn(tx, host, rec.SR)
}

// describe fills in what a new member is told of the pool.
func (p *Pool) describe(a *JoinAnswer, host xapi.Ref) error {
	return p.Store.View(func(v *store.View) error {
		for _, it := range v.List(ClassPool) {
			var rec PoolRecord
			if err := it.Decode(&rec); err != nil {
				return err
			}
			a.Pool, a.PoolName = rec.UUID, rec.NameLabel
		}
		_, a.Term = v.Leader()
		var err error
		if a.Coordinators, err = coordinatorsIn(v); err != nil {
			return err
		}
		has := map[xapi.Ref]bool{}
		for _, ref := range v.Refs(ClassHostPatch, "host", string(host)) {
			hp, err := store.Get[HostPatch](v, ClassHostPatch, ref)
			if err != nil {
				return err
			}
			has[hp.PoolPatch] = hp.Applied
		}
		for _, it := range v.List(ClassPatch) {
			var rec Patch
			if err := it.Decode(&rec); err != nil {
				return err
			}
			if !has[it.Ref] && len(v.Refs(ClassHostPatch, "pool_patch", string(it.Ref))) > 0 {
				a.Lacks = append(a.Lacks, PatchName{rec.UUID, rec.NameLabel, rec.Version})
			}
		}
		return nil
	})
}

// Coordinators are the hosts that lead or may lead, the leader first.
func (p *Pool) Coordinators() (peers []Peer, err error) {
	err = p.Store.View(func(v *store.View) error {
		peers, err = coordinatorsIn(v)
		return err
	})
	return peers, err
}

func coordinatorsIn(v *store.View) ([]Peer, error) {
	leader, _ := v.Leader()
	var out []Peer
	for _, it := range v.List(ClassHost) {
		var h Host
		if err := it.Decode(&h); err != nil {
			return nil, err
		}
		if !h.Coordinator {
			continue
		}
		out = append(out, h.Peer())
		if string(h.UUID) == leader {
			last := len(out) - 1
			out[0], out[last] = out[last], out[0]
		}
	}
	return out, nil
}

// Peer is the host as others connect to it.
func (h Host) Peer() Peer {
	p := Peer{Host: h.UUID, URL: h.URL}
	for _, k := range h.Keys {
		p.Keys = append(p.Keys, k.SPKI)
	}
	return p
}

func (p *Pool) poolRecord(tx *store.Tx) (rec PoolRecord, err error) {
	for _, it := range tx.List(ClassPool) {
		return rec, it.Decode(&rec)
	}
	return rec, errors.New("the store holds no pool record")
}
