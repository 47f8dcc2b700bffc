package main

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/spf13/cobra"

	"tweed.dev/tweed/overlay"
	"tweed.dev/tweed/subnet/kube"
)

// patience is how long commands that look once wait for what they look at.
const patience = 10 * time.Second

// complain writes an event on this node's Node about what keeps the daemon from running: its log is where few look.
func (o *options) complain(ctx context.Context, log *slog.Logger, why error) {
	if o.singleNode || o.leases != "" {
		return
	}
	cfg, err := o.restConfig()
	if err != nil || o.nodeName() == "" {
		return // this is not a node of a cluster, as why says
	}
	reason := overlay.ReasonCannotStart
	if errors.As(why, new(configError)) {
		reason = overlay.ReasonConfigInvalid
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := kube.TellOnce(ctx, cfg, o.nodeName(), reason, "tweed cannot run: "+why.Error()); err != nil {
		log.Warn("event not written", "reason", reason, "err", err)
	}
}

// run is the daemon.
func (o *options) run(ctx context.Context, log *slog.Logger, cniConfDir string) error {
	p, done, err := o.planner(log, readWrite)
	if err != nil {
		return err
	}
	defer done()
	r := overlay.NewReconciler(p, overlay.CNIConf{Dir: cniConfDir, RunDir: o.runDir}, version, log)
	r.Announcer, _ = p.Publisher.(overlay.Announcer) // a directory has nowhere to announce anything
	return r.Run(ctx)
}

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
connected. 127.0.0.1:9479 answers /healthz, /readyz, /report and /leases.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			level := slog.LevelInfo
			if verbose {
				level = slog.LevelDebug
			}
			log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: level}))
			err := o.run(cmd.Context(), log, cniConfDir)
			if err != nil {
				o.complain(cmd.Context(), log, err)
			}
			return err
		},
	}
	o.addTo(cmd.Flags())
	cmd.Flags().StringVar(&cniConfDir, "cni-conf-dir", defaultConfDir,
		"where the container runtime looks for CNI configuration")
	cmd.Flags().BoolVarP(&verbose, "verbose", "v", false, "log more than changes and problems")
	return cmd
}
