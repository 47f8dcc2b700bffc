package main

import (
	"fmt"
	"log/slog"

	"github.com/spf13/cobra"
)

func planCommand() *cobra.Command {
	var o options
	cmd := &cobra.Command{
		Use:   "plan",
		Short: "Print the operations that a pass would make, as commands, and change nothing",
		Long: `Print the operations that a pass of the daemon would make on this node, as the commands a
person would type, and change nothing. Problems go to stderr.

Exit status: 0 nothing to do, 2 there are operations, 1 error; where only a part could be read,
the operations are those of the part.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			p, done, err := o.planner(slog.New(slog.DiscardHandler), readOnly)
			if err != nil {
				return err
			}
			defer done()
			plan, err := planOnce(cmd.Context(), p)
			if err != nil {
				return err
			}
			for _, pr := range plan.Problems {
				fmt.Fprintln(cmd.ErrOrStderr(), pr)
			}
			for _, op := range plan.Ops {
				fmt.Fprintln(cmd.OutOrStdout(), op)
			}
			switch {
			case plan.Unread > 0:
				return exitStatus(1) // a Problem says why
			case len(plan.Ops) > 0:
				return exitStatus(2)
			}
			return nil
		},
	}
	o.addTo(cmd.Flags())
	return cmd
}
