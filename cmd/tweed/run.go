package main

import (
	"log/slog"
	"time"

	"github.com/spf13/cobra"

	"tweed.dev/tweed/overlay"
)

// patience is how long commands that look once wait for what they look at.
const patience = 10 * time.Second

func runCommand() *cobra.Command {
	var o options
	var cniConfDir string
	var verbose bool
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run the daemon of this node",
		Long: `Keep this node's part of the pod network: lease or take its pod subnet, tell the other nodes,
and keep the VXLAN device, the bridge, routes and packet filter as they have to be.

On a Kubernetes node the leases are annotations of Node objects; elsewhere give --single-node,
or --leases for machines that share a directory. Ending the daemon takes nothing away: pods stay
connected. 127.0.0.1:9479 answers /healthz, /readyz and /report.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			level := slog.LevelInfo
			if verbose {
				level = slog.LevelDebug
			}
			log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: level}))
			p, done, err := o.planner(log, readWrite)
			if err != nil {
				return err
			}
			defer done()
			cni := overlay.CNIConf{Dir: cniConfDir, RunDir: o.runDir}
			return overlay.NewReconciler(p, cni, version, log).Run(cmd.Context())
		},
	}
	o.addTo(cmd.Flags())
	cmd.Flags().StringVar(&cniConfDir, "cni-conf-dir", "/etc/cni/net.d",
		"where the container runtime looks for CNI configuration")
	cmd.Flags().BoolVarP(&verbose, "verbose", "v", false, "log more than changes and problems")
	return cmd
}
