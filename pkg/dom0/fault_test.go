//go:build faults

package dom0

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// An effect that fails before or after it happened leaves nothing behind.
func TestEveryEffectCanFail(t *testing.T) {
	newSystem(t, Options{}) // for its check at the end
	image := newImage(t, map[string]string{"patch": "hello"})
	for _, effect := range []string{"attach", "mount", "unmount", "syncfs", "run", "spawn", "kill"} {
		for _, point := range []string{effect, effect + ".done"} {
			cmd := exec.Command("/proc/self/exe", "helper", "effects", image, t.TempDir())
			cmd.Env = append(os.Environ(), "PATCHD_FAULT=fail@dom0."+point+"#1")
			out, err := cmd.CombinedOutput()
			if err == nil || !strings.Contains(string(out), "fault injected at dom0."+point) {
				t.Errorf("%s: %v, %s", point, err, out)
			}
			if strings.Contains(string(out), "left behind") {
				t.Errorf("%s: %s", point, out)
			}
			eventually(t, fmt.Sprintf("nothing is left of %s", point), func() error { return leaks(t) })
		}
	}
}
