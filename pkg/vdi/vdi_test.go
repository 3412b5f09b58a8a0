package vdi

import "testing"

func TestSize(t *testing.T) {
	for _, c := range []struct {
		name   string
		length int64
		want   int64
	}{
		{"a patch of no length", 0, 4 * mib},
		{"an unknown length", -1, 4 * gib},
		{"one byte", 1, 4 * mib},
		{"just 1 MiB", mib, 4 * mib},
		{"a byte more is rounded up", mib + 1, 5 * mib},
		{"8 GiB", 8 * gib, 32 * gib},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := Size(c.length); got != c.want {
				t.Errorf("Size(%d) = %d, want %d", c.length, got, c.want)
			}
		})
	}
}
