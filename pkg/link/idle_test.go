package link

func playHosts() int { return 0 }
