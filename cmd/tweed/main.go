// Command tweed is the daemon that keeps a node's pod network, and the commands to look at it.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"syscall"

	"github.com/spf13/cobra"
)

// version is stamped by the linker.
var version = "unreleased"

// exitStatus ends a command with that status; what there is to say has been printed.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := rootCommand().ExecuteContext(ctx)
	stop()
	os.Exit(statusOf(err))
}

// statusOf says on stderr what went wrong, and returns the status to end with.
func statusOf(err error) int {
	if err == nil {
		return 0
	}
	var status exitStatus
	if errors.As(err, &status) {
		return int(status)
	}
	fmt.Fprintln(os.Stderr, "tweed:", err)
	return 1
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "tweed",
		Short: "A Kubernetes pod network: pods on different nodes reach one another with their own addresses, over VXLAN",
		Long: `tweed gives every node a subnet for its pods and lets pods on different nodes reach one
another with their own addresses, over VXLAN and without NAT.

A node runs "tweed run", and "tweed install" once before it; "tweed cleanup" takes away what they
have made. Other commands look, and change nothing; but "tweed lab" builds a cluster to play with.`,
		SilenceUsage:      true,
		SilenceErrors:     true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return flagDefaults(cmd, flagsFile) },
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return fmt.Errorf("%w; see %s --help", err, cmd.CommandPath())
	})
	root.AddCommand(runCommand(), planCommand(), subnetCommand(), installCommand(), cleanupCommand(), labCommand(),
		versionCommand())
	return root
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		Run: func(cmd *cobra.Command, _ []string) {
			fmt.Fprintf(cmd.OutOrStdout(), "tweed %s %s/%s %s\n", version, runtime.GOOS, runtime.GOARCH, runtime.Version())
		},
	}
}
