package xapi

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestRefsAndUUIDsHaveOneForm(t *testing.T) {
	for range 100 {
		u, r := NewUUID(), NewRef()
		if !u.Valid() || !r.Valid() || r.IsNull() || u[14] != '4' || !strings.ContainsRune("89ab", rune(u[19])) {
			t.Fatalf("%q, %q", u, r)
		}
	}
	for _, bad := range []string{"", "35f5", "35F5b3f1-0000-4000-8000-000000000000", "35f5b3f1-0000-4000-8000-00000000000g",
		"35f5b3f1_0000-4000-8000-000000000000", "{35f5b3f1-0000-4000-8000-00000000000}", "../../../../../../../../../../etc/passwd"} {
		if UUID(bad).Valid() || Ref("OpaqueRef:"+bad).Valid() {
			t.Errorf("%q passes for a uuid", bad)
		}
	}
	if u, err := ParseUUID("35F5B3F1-0000-4000-8000-000000000000"); err != nil || u != "35f5b3f1-0000-4000-8000-000000000000" {
		t.Errorf("upper case gives %q, %v", u, err)
	}
	if _, err := ParseUUID(strings.Repeat("x", 1<<20)); err == nil || len(err.Error()) > 200 {
		t.Errorf("a megabyte gives %v", err)
	}
	if !Ref("").IsNull() || !NullRef.IsNull() || Ref("").OrNull() != NullRef || NullRef.Valid() {
		t.Error("the null reference is not what it should be")
	}
}

func TestDatesAreReadInEveryFormAndWrittenInOne(t *testing.T) {
	want := time.Date(2026, 11, 22, 4, 5, 6, 0, time.UTC)
	for _, s := range []string{"20261122T04:05:06Z", "20261122T04:05:06", "2026-11-22T04:05:06Z", "2026-11-22T05:05:06+01:00", "20261122T040506Z"} {
		got, err := ParseTime(s)
		if err != nil || !got.Equal(want) || FormatTime(got) != "20261122T04:05:06Z" {
			t.Errorf("%s is read as %v, %v", s, got, err)
		}
	}
	if got := FormatTime(time.Time{}); got != "19700101T00:00:00Z" {
		t.Errorf("no date is written as %s", got)
	}
	if _, err := ParseTime("yesterday"); err == nil {
		t.Error("yesterday is a date")
	}
}

func TestACodeStaysTheFirstOnItsWayUp(t *testing.T) {
	cause := errors.New("disk on fire")
	err := fmt.Errorf("upload of x: %w", errors.Join(NewError(OutOfSpace, "sr").Because(cause), NewError(VDIInUse)))
	if !Is(err, OutOfSpace) || Is(err, VDIInUse) || !errors.Is(err, cause) {
		t.Errorf("%v", err)
	}
	if got := AsError(err).Description(); !slices.Equal(got, []string{"OUT_OF_SPACE", "sr"}) {
		t.Errorf("description %q", got)
	}
	if got := AsError(cause); got.Code != InternalError || got.Params[0] != "disk on fire" {
		t.Errorf("an error without a code is %v", got)
	}
	if NewError(OutOfSpace, "sr").Because(cause).Description()[1] != "sr" {
		t.Error("the cause shows in the description")
	}
	if err := Internal("x: %w", cause); !errors.Is(err, cause) || err.Code != InternalError {
		t.Errorf("%v", err)
	}
}

// S1-35: the newer words are mapped to the four; an unknown one is an error in
// a patch and restartHost in a record.
func TestS1_35_GuidanceWordsMapToFour(t *testing.T) {
	for word, want := range map[string]string{
		"restartHVM": "restartHVM", "restartPV": "restartPV", "restartHost": "restartHost", "restartXAPI": "restartXAPI",
		"RebootHost": "restartHost", "EvacuateHost": "restartHost", "RestartToolstack": "restartXAPI",
		"RestartDeviceModel": "restartHVM", "RestartVM": "restartHVM restartPV",
		"RebootHostOnLivePatchFailure": "restartHost", "RebootHostOnKernelLivePatchFailure": "restartHost", "RebootHostOnXenLivePatchFailure": "restartHost",
	} {
		got, err := ParseGuidance([]string{word})
		if err != nil || strings.Trim(fmt.Sprint(got), "[]") != want {
			t.Errorf("%s gives %v, %v", word, got, err)
		}
	}
	if got, err := ParseGuidance([]string{"RebootHost", "restartHost", "RestartVM", "restartPV"}); err != nil || len(got) != 3 {
		t.Errorf("doubled words give %v, %v", got, err)
	}
	for _, bad := range []string{"", "RestartHost", "restarthost", "rm -rf"} {
		if got, err := ParseGuidance([]string{bad}); err == nil {
			t.Errorf("%q gives %v", bad, got)
		}
	}
	if got := GuidanceFromRecord([]string{"SomethingNew", "restartXAPI"}); !slices.Equal(got, []Guidance{RestartHost, RestartXAPI}) {
		t.Errorf("an unknown word of another system gives %v", got)
	}
}

func TestUndoTakesBackInReverseAndLosesNoFailure(t *testing.T) {
	var order []int
	first, second := errors.New("first"), NewError(VDIInUse)
	build := func() *Undo {
		order = nil
		var u Undo
		for i, err := range []error{nil, first, second} {
			u.Push(fmt.Sprint(i), func(ctx context.Context) error {
				order = append(order, i)
				return errors.Join(err, ctx.Err())
			})
		}
		return &u
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel() // undoing does not end with the operation's context
	err := build().Close(ctx, NewError(OutOfSpace, "sr"))
	if !slices.Equal(order, []int{2, 1, 0}) || !Is(err, OutOfSpace) || !errors.Is(err, first) || !errors.Is(err, second) || errors.Is(err, context.Canceled) {
		t.Errorf("order %v, error %v", order, err)
	}
	u := build()
	if err := u.Close(ctx, nil); err != nil || order != nil {
		t.Errorf("success undid %v, %v", order, err)
	}
	if err := u.Run(ctx); err != nil || order != nil {
		t.Errorf("after success Run undid %v, %v", order, err)
	}
}
