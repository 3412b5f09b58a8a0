package link

import (
	"encoding/json"
	"reflect"
	"testing"
	"time"

	"github.com/patchd/patchd/pkg/pool"
	"github.com/patchd/patchd/pkg/xapi"
)

// Whatever is added to an outcome has to go over the wire, too.
func TestAnOutcomeGoesOverTheWireAsAWhole(t *testing.T) {
	o := pool.Outcome{
		Output: "text", Err: xapi.NewError("CODE", "a", "b"), Unknown: true, At: time.Unix(5, 0).UTC(), Attempt: 3,
		Proof: &pool.Proof{Stamp: "s", Payload: "p", UUID: "u", Version: "v"},
	}
	v := reflect.ValueOf(o)
	for i := range v.NumField() {
		if v.Field(i).IsZero() {
			t.Errorf("the test says nothing of %s", v.Type().Field(i).Name)
		}
	}
	b, err := json.Marshal(outcomeOf(o))
	if err != nil {
		t.Fatal(err)
	}
	var w outcome
	if err := json.Unmarshal(b, &w); err != nil {
		t.Fatal(err)
	}
	if got := w.outcome(); !reflect.DeepEqual(got, o) {
		t.Errorf("%+v, want %+v", got, o)
	}
}
