package main

import (
	"time"

	"github.com/patchd/patchd/pkg/patch"
	"github.com/patchd/patchd/pkg/xapi"
)

// What is not a record of the XenAPI has its shape as JSON here: scripts rely
// on these names.

type keyShape struct {
	Fingerprint string   `json:"fingerprint"`
	Subkeys     []string `json:"subkeys"`
	UserIDs     []string `json:"user_ids"`
	Algorithm   string   `json:"algorithm"`
	Created     string   `json:"created"`
	Expires     string   `json:"expires"` // "" is never
	Usable      bool     `json:"usable"`
	Reason      string   `json:"reason"` // why it is not
	File        string   `json:"file"`
}

func keyShapes(keys []patch.Key) []keyShape {
	out := make([]keyShape, len(keys))
	for i, k := range keys {
		out[i] = keyShape{
			k.Fingerprint, append([]string{}, k.Subkeys...), append([]string{}, k.UserIDs...), k.Algorithm,
			moment(k.Created), moment(k.Expires), k.Usable, k.Reason, k.File,
		}
	}
	return out
}

// moment writes a time as RFC 3339, and none as "".
func moment(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}

type infoShape struct {
	UUID            xapi.UUID       `json:"uuid"`
	NameLabel       string          `json:"name_label"`
	NameDescription string          `json:"name_description"`
	Version         string          `json:"version"`
	Guidance        []xapi.Guidance `json:"after_apply_guidance"`
	ScratchSize     int64           `json:"scratch_size"`
}

func shapeInfo(i patch.Info) infoShape {
	return infoShape{i.UUID, i.NameLabel, i.NameDescription, i.Version, append([]xapi.Guidance{}, i.Guidance...), i.ScratchSize}
}

type signatureShape struct {
	Kind    string `json:"kind"`
	Signer  string `json:"signer"`
	Primary string `json:"primary"`
	UserID  string `json:"user_id"`
	Created string `json:"created"`
}

func shapeSignature(s patch.Signature) signatureShape {
	return signatureShape{string(s.Kind), s.Signer, s.Primary, s.UserID, moment(s.Created)}
}

func builtShape(path string, b patch.Built) any {
	return struct {
		infoShape
		Path        string         `json:"path"`
		Size        int64          `json:"size"`
		Digest      string         `json:"digest"`
		PayloadSize int64          `json:"payload_size"`
		NewUUID     bool           `json:"new_uuid"`
		Signature   signatureShape `json:"signature"`
	}{shapeInfo(b.Info), path, b.Size, b.Digest, b.PayloadSize, b.NewUUID, shapeSignature(b.Signature)}
}

func reportShape(r patch.Report) any {
	out := struct {
		Path        string          `json:"path"`
		Size        int64           `json:"size"`
		Kind        string          `json:"kind"`
		Compressed  bool            `json:"compressed"`
		Accepted    bool            `json:"accepted"`
		Reason      string          `json:"reason"`
		Signature   *signatureShape `json:"signature"` // null unless accepted
		Claimed     []string        `json:"claimed"`
		Digest      string          `json:"digest"`
		PayloadSize int64           `json:"payload_size"`
		Info        *infoShape      `json:"info"` // null when it was not asked
		InfoProblem string          `json:"info_problem"`
	}{
		Path: r.Path, Size: r.Size, Kind: string(r.Kind), Compressed: r.Compressed, Accepted: r.Accepted, Reason: r.Reason,
		Claimed: append([]string{}, r.Claimed...), Digest: r.Digest, PayloadSize: r.PayloadSize, InfoProblem: r.InfoProblem,
	}
	if r.Accepted {
		s := shapeSignature(r.Signature)
		out.Signature = &s
	}
	if r.Info != nil {
		i := shapeInfo(*r.Info)
		out.Info = &i
	}
	return out
}
