package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

func newPoolToken(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "token", Short: "make a token with which one host may join the pool", Args: cobra.NoArgs,
		Long: "Prints a token for one host, which may use it once within 15 minutes: `patchd pool join URL --token TOKEN`\n" +
			"on that host. The token also names the key of this coordinator, so that the host knows it has found the right one.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return g.with(cmd.Context(), func(ctx context.Context, c *client) error {
				var token string
				if err := c.call(ctx, &token, "patchd.join_token"); err != nil {
					return err
				}
				return g.printText("token", token)
			})
		},
	}
}

func newPoolJoin(g *global) *cobra.Command {
	var token, tokenFile, fingerprint string
	var trustKeys, align bool
	cmd := &cobra.Command{
		Use: "join URL", Short: "make this host a member of another pool", Args: cobra.ExactArgs(1),
		Long: "Asks the coordinator at URL (https://host:8443) to take this host in, either with a token that\n" +
			"`patchd pool token` has printed there, or as --user with a password and the --fingerprint of its key\n" +
			"(`patchd status` there tells it). The storage of this host and what it has applied come along; its users go,\n" +
			"and its pool database is kept as a back-up in the state directory.\n\n" +
			"The keys whose patches the pool accepts are shown. This host accepts them only with --trust-keys.",
		RunE: func(cmd *cobra.Command, args []string) error {
			options, err := g.joinOptions(cmd.Context(), token, tokenFile, fingerprint)
			if err != nil {
				return err
			}
			for name, on := range map[string]bool{"trust-keys": trustKeys, "align": align} {
				if on {
					options[name] = "true"
				}
			}
			if err := g.assertNoMember(cmd.Context()); err != nil {
				return err
			}
			var answer map[string]string
			err = g.with(cmd.Context(), func(ctx context.Context, c *client) error {
				if err := c.call(ctx, &answer, "patchd.pool_join", args[0], options); err != nil {
					return fmt.Errorf("join the pool at %s: %w", args[0], explain(ctx, c, err))
				}
				return nil
			})
			if err != nil {
				return err
			}
			if err := g.printJoined(answer, trustKeys, align); err != nil {
				return err
			}
			return g.awaitRole(cmd.Context(), true)
		},
	}
	cmd.Flags().StringVar(&token, "token", "", "what `patchd pool token` printed on the coordinator")
	cmd.Flags().StringVar(&tokenFile, "token-file", "", "file with the token (- for the standard input): it is not seen among the processes")
	cmd.Flags().StringVar(&fingerprint, "fingerprint", "", "SHA-256 of the coordinator's public key")
	cmd.Flags().BoolVar(&trustKeys, "trust-keys", false, "accept patches that the pool accepts")
	cmd.Flags().BoolVar(&align, "align", false, "have the pool apply the patches that this host lacks")
	return cmd
}

// joinOptions are the credentials of pool join.
func (g *global) joinOptions(ctx context.Context, token, tokenFile, fingerprint string) (map[string]string, error) {
	if tokenFile != "" {
		in, _, err := openInput(tokenFile)
		if err != nil {
			return nil, err
		}
		defer in.Close()
		b, err := io.ReadAll(io.LimitReader(in, maxKeyFile))
		if err != nil {
			return nil, err
		}
		token = strings.TrimSpace(string(b))
	}
	switch {
	case token != "" && fingerprint != "":
		return nil, usagef("a token names the key of the coordinator: --fingerprint is for --user")
	case token != "":
		return map[string]string{"token": token}, nil
	case fingerprint == "":
		return nil, usagef("give --token, or --user and --fingerprint")
	case g.server != "":
		return nil, usagef("with --server, --user is for that server: join by --token")
	}
	password, err := g.password(ctx)
	if err != nil {
		return nil, err
	}
	return map[string]string{"user": g.user, "password": password, "fingerprint": fingerprint}, nil
}

// joined is the outcome of pool join.
type joined struct {
	Pool named `json:"pool"`
	// Keys are the keys whose patches the pool accepts; Trusted tells whether
	// this host does, too.
	Keys    []string `json:"keys"`
	Trusted bool     `json:"trusted"`
	Lacks   []string `json:"lacks"`   // patches that other hosts have
	Patches []string `json:"patches"` // that the pool did not know before
}

func linesOf(text string) []string {
	if text = strings.TrimSpace(text); text == "" {
		return []string{}
	}
	return strings.Split(text, "\n")
}

func (g *global) printJoined(answer map[string]string, trusted, align bool) error {
	j := joined{
		Pool: named{answer["pool"], answer["name_label"]}, Keys: linesOf(answer["keys"]), Trusted: trusted,
		Lacks: linesOf(answer["lacks"]), Patches: linesOf(answer["patches"]),
	}
	if g.json() {
		return printJSON(os.Stdout, j)
	}
	fmt.Printf("joined pool %s\n", &j.Pool)
	show := func(head string, list []string, tail string) {
		if len(list) == 0 {
			return
		}
		fmt.Println(head)
		for _, line := range list {
			fmt.Println("  " + strings.TrimSpace(line))
		}
		if tail != "" {
			fmt.Println(tail)
		}
	}
	tail := "this host accepts only what its own keys have signed (`patchd key list`): for a key that it shall accept too, bring its\n" +
		"file here, such as from trusted-keys in the state directory of the coordinator, and say `patchd key trust FILE`"
	if trusted {
		tail = "this host accepts them from now on"
	}
	show("the pool accepts patches signed by", j.Keys, tail)
	show("new to the pool are the patches", j.Patches, "")
	tail = "on the coordinator `patchd patch pool-apply` applies them; --align would have done so"
	if align {
		tail = "the pool applies them now"
	}
	show("other hosts have and this one lacks", j.Lacks, tail)
	return nil
}

// assertNoMember refuses to have a member join: it has no records of its own to
// bring along.
func (g *global) assertNoMember(ctx context.Context) error {
	role, err := g.role(ctx)
	if err != nil || role["role"] != "member" {
		return nil // who does not answer is told of when the command logs in
	}
	return fmt.Errorf("this host is a member of pool %s already: eject it there (`patchd pool eject %s`), or say `patchd pool leave` here, and join then (OPERATION_NOT_ALLOWED)",
		role["pool"], role["host"])
}

// role asks the daemon what it is, without a login.
func (g *global) role(ctx context.Context) (role map[string]string, err error) {
	c, err := g.reach()
	if err != nil {
		return nil, err
	}
	return role, c.rpc(ctx, &role, "patchd.role")
}

// roleTime bounds how long a daemon may take to open in its new role.
const roleTime = 60 * time.Second

// awaitRole waits until the daemon has opened again as a member, or as none. The
// change itself is done and durable by then.
func (g *global) awaitRole(ctx context.Context, member bool) error {
	ctx, cancel := context.WithTimeout(ctx, roleTime)
	defer cancel()
	for {
		role, err := g.role(ctx)
		if err == nil && (role["role"] == "member") == member {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the daemon of this host has not opened again in its new role yet: `patchd status` tells when it has, its log why not")
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func newPoolEject(g *global) *cobra.Command {
	var force bool
	cmd := objectCommand(g, "host", "eject HOST", "take a host out of the pool", func(ctx context.Context, c *client, ref string, rec record) error {
		if err := c.call(ctx, nil, "patchd.host_eject", ref, force); err != nil {
			return err
		}
		return g.done("ejected", "host", rec)
	})
	cmd.Long = "Takes a host out of the pool: it is refused from this moment on. When it learns of that it becomes a pool of its\n" +
		"own, with its storage and with what it has applied."
	cmd.Flags().BoolVar(&force, "force", false, "also when the host has work to do: what runs there has an unknown outcome")
	return cmd
}

func newHostRevoke(g *global) *cobra.Command {
	return objectCommand(g, "host", "revoke HOST", "refuse the key of a host from now on", func(ctx context.Context, c *client, ref string, rec record) error {
		if err := c.call(ctx, nil, "patchd.host_revoke", ref); err != nil {
			return err
		}
		return g.done("revoked the key of", "host", rec)
	})
}

func newPoolRotateKey(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "rotate-key", Short: "give this host another TLS key", Args: cobra.NoArgs,
		Long: "Makes another key for this host, whose certificate the old key signs: the other hosts of the pool accept it and\n" +
			"learn it, also those that are away now. Clients that pin the key need the new --pin.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			var pin string
			if err := g.tellThisHost(cmd.Context(), &pin, "patchd.rotate_key"); err != nil {
				return err
			}
			return g.printText("pin", pin)
		},
	}
}

// tellThisHost makes a call about this very host, which any role answers: over
// the unix socket, without a login.
func (g *global) tellThisHost(ctx context.Context, into any, method string) error {
	if g.server != "" {
		return usagef("this is said on the host itself, without --server")
	}
	c, err := g.reach()
	if err != nil {
		return err
	}
	return explain(ctx, nil, c.rpc(ctx, into, method))
}

func newPoolLeave(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "leave", Short: "make this member a pool of its own, although nobody has ejected it", Args: cobra.NoArgs,
		Long: "For a member whose pool is lost. Where the coordinator is there, eject the host from it instead.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := g.tellThisHost(cmd.Context(), nil, "patchd.pool_leave"); err != nil {
				return err
			}
			if err := g.awaitRole(cmd.Context(), false); err != nil {
				return err
			}
			return g.printText("left", "this host is a pool of its own; where its old pool is still there, `patchd pool eject` removes it from the records")
		},
	}
}
