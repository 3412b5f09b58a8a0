// Command patchd puts signed patches onto every host of a pool. One binary is
// the daemon, the runner of patches, and the command line, which is an
// ordinary XenAPI client.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/patchd/patchd/pkg/dom0"
)

// version is set by the linker.
var version = "dev"

func main() {
	dom0.MaybeShim() // a re-executed child never returns from here
	os.Exit(run(os.Args[1:]))
}

// The exit codes, for scripts.
const (
	exitOK          = 0
	exitFailed      = 1 // refused or failed
	exitUsage       = 2 // wrong usage
	exitUnreachable = 3 // no patchd answers
)

func run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	root := newRoot()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	code := exitCode(err)
	if code == exitUsage {
		fmt.Fprintf(os.Stderr, "patchd: %v\nTry 'patchd %s--help'.\n", err, subcommand(root, args))
	} else {
		fmt.Fprintf(os.Stderr, "patchd: %v\n", err)
	}
	return code
}

// usageError is a command line that makes no sense.
type usageError struct{ error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// unreachableError is a daemon that does not answer.
type unreachableError struct{ error }

func (e unreachableError) Unwrap() error { return e.error }

func exitCode(err error) int {
	var usage usageError
	var unreachable unreachableError
	switch {
	case errors.As(err, &usage):
		return exitUsage
	case errors.As(err, &unreachable):
		return exitUnreachable
	}
	return exitFailed
}

// subcommand is the command that args name, for the hint after a wrong usage.
func subcommand(root *cobra.Command, args []string) string {
	cmd, _, err := root.Find(args)
	if err != nil || cmd == root {
		return ""
	}
	return cmd.CommandPath()[len(root.Name())+1:] + " "
}

// newRoot is the whole command tree.
func newRoot() *cobra.Command {
	g := &global{}
	root := &cobra.Command{
		Use:   "patchd",
		Short: "signed patches for every host of a pool",
		Long: "patchd stores signed patches inside disk images and puts them onto every host of a pool.\n" +
			"It speaks the XenAPI: xe, XenCenter, Xen Orchestra and scripts work unchanged.",
		Version: version, SilenceErrors: true, SilenceUsage: true,
		PersistentPreRunE: func(*cobra.Command, []string) error { return g.validate() },
		Args:              cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			return noCommand(cmd, args[0])
		},
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	g.register(root.PersistentFlags())
	root.AddCommand(
		newServe(), newRunner(),
		newStatus(g), newDoctor(g), newPatch(g), newSR(g), newVDI(g), newHost(g), newPool(g),
		newRun(g), newWhy(g), newTask(g), newMessage(g), newKey(g), newUser(g), newStore(), newMan(root),
	)
	completeWords(root, "output", "table", "json")
	argsAreUsage(root)
	return root
}

// noCommand is the complaint about a command that does not exist.
func noCommand(cmd *cobra.Command, name string) error {
	cmd.SuggestionsMinimumDistance = 2
	if like := cmd.SuggestionsFor(name); len(like) > 0 {
		return usagef("there is no command %q; is %q meant?", cmd.CommandPath()+" "+name, cmd.CommandPath()+" "+like[0])
	}
	return usagef("there is no command %q; there are:\n%s", cmd.CommandPath()+" "+name, commandsOf(cmd))
}

// commandsOf lists the commands of a group, one a line.
func commandsOf(cmd *cobra.Command) string {
	var lines []string
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			lines = append(lines, fmt.Sprintf("  %-12s %s", c.Name(), c.Short))
		}
	}
	return strings.Join(lines, "\n")
}

// argsAreUsage makes every complaint about arguments a usage error, and every
// group without a subcommand one as well.
func argsAreUsage(cmd *cobra.Command) {
	for _, c := range cmd.Commands() {
		if check := c.Args; check != nil {
			c.Args = func(cmd *cobra.Command, args []string) error {
				if err := check(cmd, args); err != nil {
					return usagef("%w: %s", err, cmd.UseLine())
				}
				return nil
			}
		}
		if c.HasSubCommands() && c.RunE == nil && c.Run == nil {
			c.Args = cobra.ArbitraryArgs
			c.RunE = func(cmd *cobra.Command, args []string) error {
				if len(args) > 0 {
					return noCommand(cmd, args[0])
				}
				return usagef("%q needs one of its commands:\n%s", cmd.CommandPath(), commandsOf(cmd))
			}
		}
		argsAreUsage(c)
	}
}
