//go:build !faults

package fault

// Enabled tells whether this build can be told to fail.
const Enabled = false

// Point does nothing in a release build.
func Point(string) error { return nil }
