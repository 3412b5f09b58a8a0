package store

import "os"

func playWriter() int { return 0 }
func playLeader() int { return len(os.Args) }
