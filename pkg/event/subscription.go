package event

import (
	"fmt"
	"strings"

	"github.com/patchd/patchd/pkg/store"
	"github.com/patchd/patchd/pkg/xapi"
)

// subscriptions are the classes, by exact name, and objects that are wanted.
// A class with no refs is wanted as a whole.
type subscriptions struct {
	classes map[string]map[xapi.Ref]bool
}

func (b *Broker) parse(subs []string) (subscriptions, error) {
	want := subscriptions{map[string]map[xapi.Ref]bool{}}
	if len(subs) > maxSubscriptions {
		return want, xapi.NewError(xapi.EventSubscriptionParseFailure,
			fmt.Sprintf("%d subscriptions, at most %d", len(subs), maxSubscriptions))
	}
	for _, sub := range subs {
		if sub == "*" {
			for _, class := range b.classes {
				want.classes[class] = nil
			}
			continue
		}
		class, ref, one := strings.Cut(sub, "/")
		if !validClass(class) || one && !validRef(ref) {
			return want, xapi.NewError(xapi.EventSubscriptionParseFailure, sub)
		}
		exact, served := b.classes[strings.ToLower(class)]
		if !served {
			continue
		}
		refs, known := want.classes[exact]
		switch {
		case !one:
			want.classes[exact] = nil
		case !known:
			want.classes[exact] = map[xapi.Ref]bool{xapi.Ref(ref): true}
		case refs != nil:
			refs[xapi.Ref(ref)] = true
		}
	}
	return want, nil
}

func (s subscriptions) has(class string, ref xapi.Ref) bool {
	refs, ok := s.classes[class]
	return ok && (refs == nil || refs[ref])
}

// counts is how many objects v has of each wanted class.
func (s subscriptions) counts(v *store.View) map[string]int {
	counts := make(map[string]int, len(s.classes))
	for class := range s.classes {
		counts[strings.ToLower(class)] = v.Count(class)
	}
	return counts
}

// add merges other into s.
func (s subscriptions) add(other subscriptions) {
	for class, refs := range other.classes {
		mine, known := s.classes[class]
		switch {
		case refs == nil || known && mine == nil:
			s.classes[class] = nil
		case !known:
			s.classes[class] = refs
		default:
			for ref := range refs {
				mine[ref] = true
			}
		}
	}
}

// remove takes other out of s. An object of a class that is wanted as a whole
// stays wanted.
func (s subscriptions) remove(other subscriptions) {
	for class, refs := range other.classes {
		for ref := range refs {
			delete(s.classes[class], ref)
		}
		if mine, known := s.classes[class]; refs == nil || known && mine != nil && len(mine) == 0 {
			delete(s.classes, class)
		}
	}
}

func (s subscriptions) size() int {
	n := len(s.classes)
	for _, refs := range s.classes {
		n += len(refs)
	}
	return n
}

func validClass(class string) bool {
	if class == "" || len(class) > 64 {
		return false
	}
	for i := 0; i < len(class); i++ {
		c := class[i] | 0x20
		if (c < 'a' || c > 'z') && (class[i] < '0' || class[i] > '9') && class[i] != '_' {
			return false
		}
	}
	return true
}

func validRef(ref string) bool {
	return xapi.Ref(ref) == xapi.NullRef || xapi.Ref(ref).Valid()
}
