package sr

import "fmt"

// Shortage is why an SR is refused: numbers that a client may see, in bytes.
type Shortage struct {
	Needed   int64
	Free     int64
	Promised int64 // of Free, to others
}

// Error tells all three.
func (s *Shortage) Error() string {
	return fmt.Sprintf("%d bytes are needed, %d are free, of which %d are promised to others", s.Needed, s.Free, s.Promised)
}
