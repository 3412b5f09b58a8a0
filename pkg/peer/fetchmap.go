package peer

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/patchd/patchd/pkg/vdi"
)

// FetchMap gets the block map of that digest from the first of sources that has
// it. Error: it names them.
func (n *Node) FetchMap(ctx context.Context, digest string, sources []Source, ticket []byte) (*vdi.Map, error) {
	errs := []error{fmt.Errorf("the block map %s could not be fetched", digest)}
	for _, reserved := range []bool{false, true} {
		for _, s := range sources {
			if s.Reserved != reserved {
				continue
			}
			m, err := n.fetchMap(ctx, s, digest, ticket)
			if err == nil {
				return m, nil
			}
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			errs = append(errs, fmt.Errorf("%s (%s): %w", s.Name, s.Host, err))
		}
	}
	if len(errs) == 1 {
		errs = append(errs, errors.New("there is no host that has it"))
	}
	return nil, errors.Join(errs...)
}

// mapTime is how long a map may be on its way: one of a TiB has 40 MiB.
const mapTime = time.Minute

func (n *Node) fetchMap(ctx context.Context, s Source, digest string, ticket []byte) (*vdi.Map, error) {
	ctx, cancel := context.WithTimeout(ctx, max(mapTime, n.Stall))
	defer cancel()
	begun := time.AfterFunc(n.Stall, cancel) // until it answers
	defer begun.Stop()
	resp, err := get(ctx, n.Client(s), s.URL+PathMap+"?map="+digest, ticket)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	begun.Stop()
	r := bufio.NewReaderSize(resp.Body, 64<<10)
	if resp.StatusCode != http.StatusOK {
		raw, _ := r.Peek(min(maxRefusal, r.Size()))
		return nil, refused(resp.StatusCode, raw)
	}
	return vdi.ReadMap(r, digest)
}
