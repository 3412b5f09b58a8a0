package server

import (
	"net"
	"testing"
)

// guest is a connection that remembers being closed.
type guest struct {
	net.Conn
	closed bool
}

func (g *guest) Close() error { g.closed = true; return nil }

func TestACrowdPutsOutTheOldestStranger(t *testing.T) {
	c := &crowd{limit: 3}
	g := make([]*guest, 6)
	in := make([]*crowdConn, 6)
	for i := range 3 {
		g[i] = &guest{}
		in[i] = c.admit(g[i])
	}
	in[0].known()
	in[0].known() // twice is once
	for i := 3; i < 5; i++ {
		g[i] = &guest{}
		if in[i] = c.admit(g[i]); in[i] == nil {
			t.Fatalf("guest %d was not let in", i)
		}
	}
	for i, want := range []bool{false, true, true, false, false} {
		if g[i].closed != want {
			t.Errorf("guest %d: closed %v, want %v", i, g[i].closed, want)
		}
	}
	in[3].known()
	in[4].known()
	if c.admit(&guest{}) != nil {
		t.Error("a stranger was let in where everybody is known")
	}
	in[1].Close() // put out before: its place is given already
	in[3].Close()
	in[3].Close()
	if c.open != 2 {
		t.Errorf("%d are open, want 2", c.open)
	}
	g[5] = &guest{}
	if in[5] = c.admit(g[5]); in[5] == nil {
		t.Error("there was a place, and a stranger was not let in")
	}
	in[5].Close()
	in[5].known() // too late
	if c.unknown.Len() != 0 || c.open != 2 {
		t.Errorf("%d strangers, %d open", c.unknown.Len(), c.open)
	}
}
