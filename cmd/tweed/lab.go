package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"tweed.dev/tweed/overlay/lab"
)

func labCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "lab",
		Short: "Build a small cluster out of network namespaces on this machine, and use it",
		Long: `Build a small cluster out of network namespaces on this machine: nodes n1, n2, ... with an
uplink eth0 on a common bridge, the real daemon on each, and pods pod1, pod2, ... on each node,
attached by the real CNI plugin. Nothing is made in the machine's own network namespace.`,
		Example: `  tweed lab up
  tweed lab exec n1/pod1 -- ping -c 3 10.244.1.2
  tweed lab exec n1 -- tweed plan
  tweed lab down`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(labUpCommand(), labExecCommand(), labStatusCommand(), labRestartCommand(), labDownCommand())
	return cmd
}

// theLab is the lab of this machine, with this very program on its nodes.
func theLab(cmd *cobra.Command) (*lab.Lab, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return lab.New(self, cmd.OutOrStdout()), nil
}

func labUpCommand() *cobra.Command {
	var o lab.Options
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Build the lab; ends when every pod has reached every other",
		Long: `Build the lab. It ends when every pod has reached every other, in both families, with its own
source address. Interrupted, it removes what it has built; "tweed lab down" removes what is left
of a build that was killed.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := theLab(cmd)
			if err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
			defer stop()
			return l.Up(ctx, o)
		},
	}
	cmd.Flags().IntVar(&o.Nodes, "nodes", 3, fmt.Sprintf("number of nodes, 1 to %d", lab.MaxNodes))
	cmd.Flags().IntVar(&o.Pods, "pods", 2, fmt.Sprintf("number of pods on each node, 0 to %d", lab.MaxPods))
	cmd.Flags().StringVar(&o.Underlay, "underlay", "ipv4", "what carries the tunnel between nodes: ipv4 or ipv6")
	return cmd
}

func labExecCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "exec NODE[/POD] -- COMMAND...",
		Short: "Run a command on a node or in a pod",
		Long: `Run a command on a node (n1) or in a pod (n1/pod1). Its input, output and exit status are those
of this command. On a node, it sees the node's own /etc/tweed, /etc/cni/net.d and /run/tweed.`,
		Example: `  tweed lab exec n1 -- ip route
  tweed lab exec n1/pod1 -- ping -c 3 10.244.1.2`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := theLab(cmd)
			if err != nil {
				return err
			}
			command := args[1:]
			if len(command) > 0 && command[0] == "--" {
				command = command[1:]
			}
			err = l.Exec(args[0], command)
			var failed *lab.CommandError
			if errors.As(err, &failed) {
				fmt.Fprintln(cmd.ErrOrStderr(), "tweed lab exec:", err)
				return exitStatus(failed.Status)
			}
			return err
		},
	}
	cmd.Flags().SetInterspersed(false) // flags after NODE are the command's
	return cmd
}

func labStatusCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show nodes, daemons and pods",
		Long: `Show nodes, daemons and pods.

Exit status: 0 healthy, 2 something is wrong, 1 error, or no lab.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "table" && output != "json" {
				return fmt.Errorf("--output %q: expected table or json", output)
			}
			l, err := theLab(cmd)
			if err != nil {
				return err
			}
			status, err := l.Status(cmd.Context())
			if err != nil {
				return err
			}
			if err := writeLabStatus(cmd, status, output); err != nil {
				return err
			}
			if !status.Healthy() {
				return exitStatus(2)
			}
			return nil
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "table", "how to print it: table or json")
	return cmd
}

func writeLabStatus(cmd *cobra.Command, status lab.Status, output string) error {
	if output == "table" {
		return status.WriteTable(cmd.OutOrStdout())
	}
	e := json.NewEncoder(cmd.OutOrStdout())
	e.SetIndent("", "  ")
	return e.Encode(status)
}

func labRestartCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "restart NODE",
		Short: "Stop a node's daemon, start it again, and wait until it is ready",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := theLab(cmd)
			if err != nil {
				return err
			}
			return l.Restart(cmd.Context(), args[0])
		},
	}
}

func labDownCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "down",
		Short: "Remove the lab, also one that was not completed",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := theLab(cmd)
			if err != nil {
				return err
			}
			removed, err := l.Down(cmd.Context())
			if errors.Is(err, lab.ErrNone) {
				fmt.Fprintln(cmd.OutOrStdout(), "there is no lab; nothing to remove")
				return nil
			}
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "removed: %v\n", removed)
			return nil
		},
	}
}
