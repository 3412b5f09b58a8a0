package memory_test

import (
	"testing"

	"github.com/patchd/patchd/pkg/sr"
	"github.com/patchd/patchd/pkg/sr/memory"
	"github.com/patchd/patchd/pkg/sr/srtest"
	"github.com/patchd/patchd/pkg/xapi"
)

func TestConformance(t *testing.T) {
	for name, clones := range map[string]bool{"copies": false, "clones": true} {
		t.Run(name, func(t *testing.T) {
			srtest.Run(t, srtest.Suite{
				Double: true,
				New: func(*testing.T) (sr.Driver, sr.Config) {
					return &memory.Driver{Clones: clones}, config()
				},
				Small: func(*testing.T) (sr.Driver, sr.Config) {
					return &memory.Driver{Clones: clones, Capacity: 8 << 20}, config()
				},
				Hostile: []map[string]string{{"tag": "a\x00b"}, {"tag": "a\nb"}, {"tag": "\xff"}},
			})
		})
	}
}

func config() sr.Config {
	return sr.Config{SR: xapi.NewUUID(), Device: map[string]string{"tag": "t"}}
}
