package link_test

import (
	"github.com/patchd/patchd/pkg/agent"
	"github.com/patchd/patchd/pkg/link"
)

var _ agent.Coordinator = (*link.Client)(nil)
