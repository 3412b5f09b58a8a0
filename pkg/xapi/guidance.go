package xapi

import "fmt"

// Guidance is one of the four words a record's after_apply_guidance can hold.
type Guidance string

// The four words of the classic data model (enum after_apply_guidance).
const (
	RestartHVM  Guidance = "restartHVM"
	RestartPV   Guidance = "restartPV"
	RestartHost Guidance = "restartHost"
	RestartXAPI Guidance = "restartXAPI"
)

// guidanceWords maps every word a patch may say to the four. The newer words
// (S1-35) are those of updateinfo files.
var guidanceWords = map[string][]Guidance{
	"restartHVM":  {RestartHVM},
	"restartPV":   {RestartPV},
	"restartHost": {RestartHost},
	"restartXAPI": {RestartXAPI},

	"RebootHost":         {RestartHost},
	"EvacuateHost":       {RestartHost},
	"RestartToolstack":   {RestartXAPI},
	"RestartDeviceModel": {RestartHVM},
	"RestartVM":          {RestartHVM, RestartPV},

	"RebootHostOnLivePatchFailure":       {RestartHost},
	"RebootHostOnKernelLivePatchFailure": {RestartHost},
	"RebootHostOnXenLivePatchFailure":    {RestartHost},
}

// ParseGuidance maps the words of a patch's `info` to the four, each at most
// once, in the order they first appear. An unknown word is an error.
func ParseGuidance(words []string) ([]Guidance, error) {
	out := []Guidance{}
	for _, w := range words {
		gs, ok := guidanceWords[w]
		if !ok {
			return nil, fmt.Errorf("unknown after-apply-guidance %.64q (known: restartHVM, restartPV, restartHost, restartXAPI and the newer RebootHost, EvacuateHost, RestartToolstack, RestartDeviceModel, RestartVM)", w)
		}
		out = addGuidance(out, gs)
	}
	return out, nil
}

// GuidanceFromRecord maps the words of a record or event of another, perhaps
// newer, system. There an unknown word counts as restartHost: the safe side.
func GuidanceFromRecord(words []string) []Guidance {
	out := []Guidance{}
	for _, w := range words {
		gs, ok := guidanceWords[w]
		if !ok {
			gs = []Guidance{RestartHost}
		}
		out = addGuidance(out, gs)
	}
	return out
}

func addGuidance(have, more []Guidance) []Guidance {
next:
	for _, g := range more {
		for _, h := range have {
			if h == g {
				continue next
			}
		}
		have = append(have, g)
	}
	return have
}
