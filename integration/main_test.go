// Package integration holds the tests of the whole system: the real patchd as
// a process of its own, real signatures, real loop devices and mounts.
package integration

import (
	"testing"

	"github.com/patchd/patchd/integration/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }
