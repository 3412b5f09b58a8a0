package main

import (
	"os"
	"path/filepath"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

	"github.com/patchd/patchd/pkg/agent"
	"github.com/patchd/patchd/pkg/dom0"
)

// newRunner is the process that runs one patch. The daemon starts it; it
// outlives the daemon.
func newRunner() *cobra.Command {
	var groups string
	cmd := &cobra.Command{
		Use:    "runner DIR",
		Short:  "run the patch of one journaled job (started by the daemon)",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			log := logrus.New()
			log.SetOutput(os.Stderr)
			dir, err := filepath.Abs(args[0])
			if err != nil {
				return err
			}
			d, err := dom0.New(dom0.Options{Log: log, CgroupPrefix: groups})
			if err != nil {
				return err
			}
			defer d.Close()
			return agent.RunRunner(cmd.Context(), d, dir)
		},
	}
	cmd.Flags().StringVar(&groups, "groups", "", "folder of the daemon's control groups")
	return cmd
}
