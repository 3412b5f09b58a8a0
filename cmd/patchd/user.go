package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/patchd/patchd/pkg/session"
	"github.com/patchd/patchd/pkg/xapi"
)

func newUser(g *global) *cobra.Command {
	cmd := &cobra.Command{Use: "user", Short: "users of the pool and their roles"}
	cmd.AddCommand(
		newUserAdd(g), newUserList(g),
		userCommand(g, "passwd NAME", "give a user a new password; their sessions end", func(ctx context.Context, c *client, name string) error {
			password, err := newPassword(ctx)
			if err != nil {
				return err
			}
			if err := c.call(ctx, nil, "patchd.user_passwd", name, password); err != nil {
				return err
			}
			return g.doneUser("new password", name)
		}),
		userCommand(g, "remove NAME", "remove a user; their sessions end", func(ctx context.Context, c *client, name string) error {
			if err := c.call(ctx, nil, "patchd.user_remove", name); err != nil {
				return err
			}
			return g.doneUser("removed", name)
		}),
	)
	return cmd
}

func userCommand(g *global, use, short string, f func(ctx context.Context, c *client, name string) error) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short, Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.with(cmd.Context(), func(ctx context.Context, c *client) error {
				err := f(ctx, c, args[0])
				var e *xapi.Error
				if errors.As(err, &e) && e.Code == xapi.InvalidValue && len(e.Params) == 2 && e.Params[0] == "name" && cmd.Name() != "add" {
					return fmt.Errorf("there is no user %q; `patchd user list` shows them", args[0])
				}
				if err != nil {
					return fmt.Errorf("%s of user %s: %w", cmd.Name(), args[0], explain(ctx, c, err))
				}
				return nil
			})
		},
	}
}

func newUserAdd(g *global) *cobra.Command {
	role := "read-only"
	cmd := userCommand(g, "add NAME", "add a user", func(ctx context.Context, c *client, name string) error {
		password, err := newPassword(ctx)
		if err != nil {
			return err
		}
		if err := c.call(ctx, nil, "patchd.user_add", name, password, role); err != nil {
			return err
		}
		return g.doneUser("added", name)
	})
	cmd.Flags().StringVar(&role, "role", role, "pool-admin, pool-operator or read-only")
	cmd.PreRunE = func(*cobra.Command, []string) error {
		if !session.Role(role).Valid() {
			return usagef("--role: %q is neither pool-admin, pool-operator nor read-only", role)
		}
		return nil
	}
	completeWords(cmd, "role", "pool-admin", "pool-operator", "read-only")
	return cmd
}

func (g *global) doneUser(verb, name string) error {
	if g.json() {
		return printJSON(os.Stdout, map[string]string{"name": name})
	}
	fmt.Printf("%s: user %s\n", verb, name)
	return nil
}

func newUserList(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "list the users", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return g.with(cmd.Context(), func(ctx context.Context, c *client) error {
				users := []map[string]string{}
				if err := c.call(ctx, &users, "patchd.user_list"); err != nil {
					return err
				}
				if g.json() {
					return printJSON(os.Stdout, users)
				}
				rows := make([][]string, len(users))
				for i, u := range users {
					rows[i] = []string{u["name"], u["role"], dateText(u["created"])}
				}
				printTable(os.Stdout, []string{"NAME", "ROLE", "CREATED"}, rows)
				return nil
			})
		},
	}
}

// newPassword asks twice on a terminal, else reads one line of the standard input.
func newPassword(ctx context.Context) (string, error) {
	if !term.IsTerminal(int(os.Stdin.Fd())) {
		line, err := bufio.NewReader(io.LimitReader(os.Stdin, 4096)).ReadString('\n')
		if err != nil && !errors.Is(err, io.EOF) {
			return "", err
		}
		if line = strings.TrimRight(line, "\r\n"); line == "" {
			return "", usagef("the password is read from the standard input, which is empty")
		}
		return line, nil
	}
	first, err := askPassword(ctx, "New password: ")
	if err != nil {
		return "", err
	}
	second, err := askPassword(ctx, "Once more: ")
	if err != nil {
		return "", err
	}
	if first != second {
		return "", fmt.Errorf("the two passwords differ: nothing was changed")
	}
	return first, nil
}
