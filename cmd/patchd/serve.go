package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"runtime/debug"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

	"github.com/patchd/patchd/pkg/server"
)

func newServe() *cobra.Command {
	c := server.DefaultConfig()
	var file string
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "run the daemon of this host",
		Long: "Runs the daemon until SIGTERM or SIGINT. Patches that are being applied go on after it ends.\n\n" +
			"Each setting is a flag, a variable (PATCHD_STATE_DIR for --state-dir) and a key of the TOML file\n" +
			"(state-dir): a flag wins over the variable, the variable over the file.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			given := map[string]string{}
			for _, s := range c.Settings() {
				if cmd.Flags().Changed(s.Name) {
					given[s.Name] = s.String()
				}
			}
			loaded, err := loadConfig(file, given)
			if err != nil {
				return usageError{err}
			}
			return serve(cmd.Context(), loaded)
		},
	}
	cmd.Flags().StringVar(&file, "config", "", "TOML file with settings")
	for _, s := range c.Settings() {
		cmd.Flags().Var(s, s.Name, s.Help)
	}
	return cmd
}

// loadConfig puts file, variables and flags together, the later over the earlier.
func loadConfig(file string, flags map[string]string) (server.Config, error) {
	c := server.DefaultConfig()
	if file == "" {
		file = os.Getenv("PATCHD_CONFIG")
	}
	if file != "" {
		if err := c.Load(file); err != nil {
			return c, err
		}
	}
	if err := c.LoadEnv(os.LookupEnv); err != nil {
		return c, err
	}
	for _, s := range c.Settings() {
		if text, ok := flags[s.Name]; ok {
			if err := s.Set(text); err != nil {
				return c, fmt.Errorf("--%s: %w", s.Name, err)
			}
		}
	}
	return c, c.Validate()
}

func newLogger(level, format string) (*logrus.Logger, error) {
	log := logrus.New()
	log.SetOutput(os.Stderr)
	l, err := logrus.ParseLevel(level)
	if err != nil {
		return nil, usageError{fmt.Errorf("log-level: %w", err)}
	}
	log.SetLevel(l)
	switch format {
	case "text":
		log.SetFormatter(&logrus.TextFormatter{FullTimestamp: true})
	case "json":
		log.SetFormatter(&logrus.JSONFormatter{})
	default:
		return nil, usagef("log-format: %q is neither text nor json", format)
	}
	return log, nil
}

func serve(ctx context.Context, c server.Config) (err error) {
	log, err := newLogger(c.LogLevel, c.LogFormat)
	if err != nil {
		return err
	}
	debug.SetMemoryLimit(1 << 30) // a soft bound: the collector works harder before it
	// No folder it was started in is held: a patch may have started it.
	if err := os.Chdir("/"); err != nil {
		return err
	}
	return server.Serve(ctx, c, server.Options{Log: log, Version: version}, func(s *server.Server) {
		plain, tls := s.Addresses()
		log.WithField("http", addressText(plain)).WithField("tls", addressText(tls)).WithField("version", version).Info("patchd is ready")
		if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
			log.WithError(err).Warn("the init system could not be told that patchd is ready")
		}
	})
}

// addressText is "" for a listener that there is not.
func addressText(a net.Addr) string {
	if a == nil {
		return ""
	}
	return a.String()
}
