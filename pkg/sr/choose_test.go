package sr_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/xapi"
)

type choice struct {
	name       string
	requested  string
	defaultSR  xapi.Ref
	candidates []sr.Candidate
	want       xapi.Ref
	code       string
	param      string
	text       []string // in the last parameter
}

func choices() []choice {
	const (
		uuidA = "0a000000-0000-4000-8000-000000000000"
		uuidB = "0b000000-0000-4000-8000-000000000000"
		uuidC = "0c000000-0000-4000-8000-000000000000"
		other = "0d000000-0000-4000-8000-000000000000"
	)
	a := sr.Candidate{Ref: "OpaqueRef:" + uuidC, UUID: uuidA, Name: "plain", Plugged: true, Created: 1}
	b := sr.Candidate{Ref: "OpaqueRef:" + uuidA, UUID: uuidB, Name: "cloning", Plugged: true, Clones: true, Created: 3}
	c := sr.Candidate{Ref: "OpaqueRef:" + uuidB, UUID: uuidC, Name: "older cloning", Plugged: true, Clones: true, Created: 2}
	unplugged := func(c sr.Candidate) sr.Candidate { c.Plugged = false; return c }
	twin := c
	twin.UUID, twin.Ref = other, "OpaqueRef:"+other

	return []choice{
		{name: "the default is taken, though it does not clone", defaultSR: a.Ref, candidates: []sr.Candidate{a, b, c}, want: a.Ref},
		{name: "no default: the oldest that clones", candidates: []sr.Candidate{a, b, c}, want: c.Ref},
		{name: "the null ref is no default", defaultSR: xapi.NullRef, candidates: []sr.Candidate{c, b, a}, want: c.Ref},
		{name: "of two as old, the lower uuid", candidates: []sr.Candidate{twin, c}, want: c.Ref},
		{name: "a dangling default falls back", defaultSR: "OpaqueRef:" + other, candidates: []sr.Candidate{a, b}, want: b.Ref},
		{name: "an unplugged default falls back", defaultSR: a.Ref, candidates: []sr.Candidate{unplugged(a), b}, want: b.Ref},
		{name: "an unplugged SR is never fallen back to", candidates: []sr.Candidate{a, b, unplugged(c)}, want: b.Ref},

		{name: "named by ref", requested: string(a.Ref), defaultSR: b.Ref, candidates: []sr.Candidate{a, b, c}, want: a.Ref},
		{name: "named by uuid", requested: string(a.UUID), defaultSR: b.Ref, candidates: []sr.Candidate{a, b, c}, want: a.Ref},
		{name: "named by uuid in capitals", requested: strings.ToUpper(string(c.UUID)), candidates: []sr.Candidate{a, b, c}, want: c.Ref},
		{name: "named and unplugged never falls back", requested: string(a.Ref), defaultSR: b.Ref, candidates: []sr.Candidate{unplugged(a), b}, code: xapi.SRNotAttached, param: string(a.Ref)},
		{name: "an unknown ref never falls back", requested: "OpaqueRef:" + other, defaultSR: b.Ref, candidates: []sr.Candidate{a, b}, code: xapi.HandleInvalid, param: "SR"},
		{name: "the null ref as a name", requested: string(xapi.NullRef), candidates: []sr.Candidate{a, b}, code: xapi.HandleInvalid, param: "SR"},
		{name: "an unknown uuid never falls back", requested: other, defaultSR: b.Ref, candidates: []sr.Candidate{a, b}, code: xapi.UUIDInvalid, param: "SR"},
		{name: "rubbish never falls back", requested: "../../etc", candidates: []sr.Candidate{b}, code: xapi.HandleInvalid, param: "SR"},

		{name: "neither: nothing at all", code: xapi.DefaultSRNotFound, param: string(xapi.NullRef), text: []string{"not set", "no SR is plugged"}},
		{name: "neither: dangling", defaultSR: "OpaqueRef:" + other, candidates: []sr.Candidate{a}, code: xapi.DefaultSRNotFound, param: "OpaqueRef:" + other, text: []string{"does not exist", "VDI_CLONE", "Set pool.default_SR"}},
		{name: "neither: unplugged", defaultSR: a.Ref, candidates: []sr.Candidate{unplugged(a)}, code: xapi.DefaultSRNotFound, param: string(a.Ref), text: []string{`"plain"`, uuidA, "not plugged", "no SR is plugged"}},
	}
}

// S1-10 (no SR named), S1-11 (the default), S1-12 (else one that clones) and
// S1-13 (else an error that names both reasons).
func TestChoose(t *testing.T) {
	for _, test := range choices() {
		t.Run(test.name, func(t *testing.T) {
			given := slices.Clone(test.candidates)
			got, err := sr.Choose(test.requested, test.defaultSR, test.candidates)
			if !slices.Equal(given, test.candidates) {
				t.Error("the candidates were changed")
			}
			if test.code == "" {
				if err != nil || got != test.want {
					t.Fatalf("chose %s, %v; want %s", got, err, test.want)
				}
				return
			}
			var e *xapi.Error
			if !errors.As(err, &e) || e.Code != test.code || got != xapi.NullRef {
				t.Fatalf("chose %s, %v; want error %s", got, err, test.code)
			}
			if e.Params[0] != test.param {
				t.Errorf("first parameter is %q, want %q", e.Params[0], test.param)
			}
			for _, text := range test.text {
				if !strings.Contains(e.Params[len(e.Params)-1], text) {
					t.Errorf("%q does not say %q", e.Params[len(e.Params)-1], text)
				}
			}
		})
	}
}
