package pool

import (
	"bytes"
	"encoding/json"
	"fmt"

	"github.com/patchd/patchd/pkg/xapi"
)

// DecodeList decodes a JSON list that another host has sent. A list of a million
// empty records takes three bytes each on the wire and a hundred times as much here,
// so it is given up at the first one beyond limit. Code: INVALID_VALUE.
func DecodeList[T any](b []byte, limit int) (list []T, err error) {
	d := json.NewDecoder(bytes.NewReader(b))
	switch t, err := d.Token(); {
	case err != nil || t == nil:
		return nil, err
	case t != json.Delim('['):
		return nil, fmt.Errorf("%.20s is no list", b)
	}
	for d.More() {
		if len(list) == limit {
			return nil, tooMany(limit)
		}
		var v T
		if err := d.Decode(&v); err != nil {
			return nil, err
		}
		list = append(list, v)
	}
	return list, nil
}

func tooMany(limit int) error {
	return xapi.NewError(xapi.InvalidValue, "list", fmt.Sprintf("more than %d entries", limit))
}

// UnmarshalJSON decodes an inventory of a bounded size.
func (inv *Inventory) UnmarshalJSON(b []byte) (err error) {
	var w struct {
		Full      bool
		Put, Gone json.RawMessage
	}
	if err := json.Unmarshal(b, &w); err != nil {
		return err
	}
	inv.Full = w.Full
	if inv.Put, err = listOf[InventoryRecord](w.Put, maxInventory); err == nil {
		inv.Gone, err = listOf[InventoryRecord](w.Gone, maxInventory)
	}
	return err
}

func listOf[T any](b json.RawMessage, limit int) ([]T, error) {
	if len(b) == 0 {
		return nil, nil
	}
	return DecodeList[T](b, limit)
}

// Stamps are the stampfiles of one host.
type Stamps []Stamp

// MaxStamps bounds the stampfiles of one host.
const MaxStamps = maxStamps

// UnmarshalJSON decodes a bounded number of them.
func (s *Stamps) UnmarshalJSON(b []byte) (err error) {
	*s, err = DecodeList[Stamp](b, maxStamps)
	return err
}

// JoinPatches are the patches that a new member brings, by the ref it has them under.
type JoinPatches map[xapi.Ref]Patch

// UnmarshalJSON decodes a bounded number of them.
func (p *JoinPatches) UnmarshalJSON(b []byte) error {
	d := json.NewDecoder(bytes.NewReader(b))
	switch t, err := d.Token(); {
	case err != nil || t == nil:
		return err
	case t != json.Delim('{'):
		return fmt.Errorf("%.20s is no object", b)
	}
	*p = JoinPatches{}
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return err
		}
		var rec Patch
		if err := d.Decode(&rec); err != nil {
			return err
		}
		if (*p)[xapi.Ref(fmt.Sprint(name))] = rec; len(*p) > maxJoinPatches {
			return tooMany(maxJoinPatches)
		}
	}
	return nil
}
