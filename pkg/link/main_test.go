package link

import (
	"os"
	"testing"

	"go.uber.org/goleak"
)

// TestMain also plays the hosts of TestIdle in a process of their own.
func TestMain(m *testing.M) {
	if os.Getenv("LINK_TEST_HOSTS") != "" {
		os.Exit(playHosts())
	}
	goleak.VerifyTestMain(m)
}
