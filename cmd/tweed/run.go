package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
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
func (o *options) run(ctx context.Context, log *slog.Logger, cniConfDir, metricsAddress string) error {
	if metricsAddress != "" {
		if err := overlay.CheckMetricsAddress(metricsAddress); err != nil {
			return fmt.Errorf("--metrics-address %w", err)
		}
	}
	p, done, err := o.planner(log, readWrite)
	if err != nil {
		return err
	}
	defer done()
	r := overlay.NewReconciler(p, overlay.CNIConf{Dir: cniConfDir, RunDir: o.runDir}, version, log)
	r.MetricsAddress = metricsAddress
	r.Announcer, _ = p.Publisher.(overlay.Announcer) // a directory has nowhere to announce anything
	return r.Run(ctx)
}

func runCommand() *cobra.Command {
	var o options
	var cniConfDir, metricsAddress string
	var verbose bool
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run the daemon of this node",
		Long: `Keep this node's part of the pod network: lease or take its pod subnet, tell the other nodes,
and keep the VXLAN device, the bridge, routes and packet filter as they have to be.

On a Kubernetes node the leases are annotations of Node objects; elsewhere give --single-node,
or --leases for machines that share a directory. Ending the daemon takes nothing away: pods stay
connected. 127.0.0.1:9479 answers /healthz, /readyz, /report, /leases and /metrics.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			level := slog.LevelInfo
			if verbose {
				level = slog.LevelDebug
			}
			if os.Getenv("GOGC") == "" {
				// Most of the memory is what passes have left behind: with Go's 100 a daemon of 5,000 peers holds 60 MB,
				// with 50 it is 49, and at rest it costs no time.
				debug.SetGCPercent(50)
			}
			log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: level}))
			err := o.run(cmd.Context(), log, cniConfDir, metricsAddress)
			if err != nil {
				o.complain(cmd.Context(), log, err)
			}
			return err
		},
	}
	o.addTo(cmd.Flags())
	cmd.Flags().StringVar(&cniConfDir, "cni-conf-dir", defaultConfDir,
		"where the container runtime looks for CNI configuration")
	cmd.Flags().StringVar(&metricsAddress, "metrics-address", "",
		"HOST:PORT to serve /metrics at, and nothing else, such as :9480 (default: nowhere but on 127.0.0.1:9479, because "+
			"whoever reaches the port can read them)")
	cmd.Flags().BoolVarP(&verbose, "verbose", "v", false, "log more than changes and problems")
	return cmd
}
