package main

import (
	"context"
	"log/slog"
	"os"
	"os/signal"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"tweed.dev/tweed/overlay"
)

// What odd-tweed reads from its environment.
const (
	deafVar     = "ODD_TWEED_DEAF"     // not empty: the kernel tells it of nothing
	intervalVar = "ODD_TWEED_INTERVAL" // the time between passes for which no bell rings
)

// oddTweed is the daemon with what no flag can set.
func oddTweed() {
	var o options
	flags := pflag.NewFlagSet("odd-tweed", pflag.ExitOnError)
	o.addTo(flags)
	cniConfDir := flags.String("cni-conf-dir", "", "")
	metricsAddress := flags.String("metrics-address", "", "")
	err := flags.Parse(os.Args[2:])
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	ctx, cancel := signal.NotifyContext(context.Background(), unix.SIGTERM)
	if err == nil {
		err = o.runOddly(ctx, log, *cniConfDir, *metricsAddress)
	}
	cancel()
	if err != nil {
		log.Error("ends", "err", err)
		os.Exit(1)
	}
}

func (o *options) runOddly(ctx context.Context, log *slog.Logger, cniConfDir, metricsAddress string) error {
	p, done, err := o.planner(log, readWrite)
	if err != nil {
		return err
	}
	defer done()
	if os.Getenv(deafVar) != "" {
		p.Kernel = deaf{p.Kernel}
	}
	r := overlay.NewReconciler(p, overlay.CNIConf{Dir: cniConfDir, RunDir: o.runDir}, version, log)
	r.MetricsAddress = metricsAddress
	if r.Interval, err = time.ParseDuration(os.Getenv(intervalVar)); err != nil {
		return err
	}
	return r.Run(ctx)
}

// A deaf kernel tells of nothing.
type deaf struct{ overlay.Kernel }

func (deaf) Watch(ctx context.Context, _ func(string) bool, _ func()) error { <-ctx.Done(); return nil }
