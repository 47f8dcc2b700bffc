package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"

	"tweed.dev/tweed/backend/kernel"
	"tweed.dev/tweed/overlay"
	"tweed.dev/tweed/overlay/podnet"
	"tweed.dev/tweed/subnet/kube"
)

// cleanup is what a person says to tweed cleanup.
type cleanup struct {
	runDir, cniConfDir, pluginDir string
	dryRun, force, stay           bool
	annotations                   bool
	node, kubeconfig              string
}

func (c *cleanup) addTo(fs *pflag.FlagSet) {
	fs.BoolVar(&c.dryRun, "dry-run", false, "print what would be done, and change nothing")
	fs.BoolVar(&c.force, "force", false,
		"go on although pods are attached, and cut them off (default: refuse, because they would run without a network)")
	fs.BoolVar(&c.stay, "stay", false, "when nothing is left, wait to be ended; for a DaemonSet, whose pods must not end")
	fs.BoolVar(&c.annotations, "annotations", false,
		"also remove what this node has published on its Node, so that other nodes forget it")
	fs.StringVar(&c.node, "node-name", "", "for --annotations, the name of the Node (default $NODE_NAME)")
	fs.StringVar(&c.kubeconfig, "kubeconfig", "",
		"for --annotations, how to reach the API server (default: the pod's own service account)")
	fs.StringVar(&c.runDir, "run-dir", podnet.DefaultRunDir, "where daemon and plugin meet; emptied by a reboot")
	fs.StringVar(&c.cniConfDir, "cni-conf-dir", defaultConfDir, "where the container runtime looks for CNI configuration")
	fs.StringVar(&c.pluginDir, "cni-bin-dir", hostPlugins,
		"where the container runtime looks for plugins; tweed-cni goes, others may be somebody else's and stay")
}

func (c *cleanup) run(cmd *cobra.Command) error {
	record, err := c.record()
	if err != nil {
		return err
	}
	kern, err := kernel.New(kernel.Options{})
	if err != nil {
		return err
	}
	defer kern.Close()
	work := overlay.Cleanup{
		Remains: kern, CNI: overlay.CNIConf{Dir: c.cniConfDir, RunDir: c.runDir}, PluginDir: c.pluginDir, Record: record,
		Force: c.force, DryRun: c.dryRun, Say: func(command string) { fmt.Fprintln(cmd.OutOrStdout(), command) },
	}
	done, err := work.Run(cmd.Context())
	switch {
	case err != nil:
		return err
	case done == 0:
		fmt.Fprintln(cmd.ErrOrStderr(), "nothing of tweed is left here")
	case !c.dryRun:
		fmt.Fprintln(cmd.ErrOrStderr(), "nothing else of tweed is left here; host settings (net.ipv4.ip_forward, "+
			"net.ipv6.conf.all.forwarding, accept_ra) stay until a reboot, because others may rely on them")
	}
	if c.stay && !c.dryRun {
		<-cmd.Context().Done()
	}
	return nil
}

// record is what this node has published; nil unless that is to be removed.
func (c *cleanup) record() (overlay.Record, error) {
	if !c.annotations {
		return nil, nil
	}
	o := options{node: c.node, source: source{kubeconfig: c.kubeconfig}}
	node := o.nodeName()
	if node == "" {
		return nil, errors.New("--annotations: which Node this is must be said: --node-name, or NODE_NAME in the environment")
	}
	klog.SetSlogLogger(slog.New(slog.DiscardHandler))
	if c.kubeconfig != "" {
		cfg, err := o.restConfig()
		return nodeRecord{cfg, node}, err
	}
	cfg, err := rest.InClusterConfig()
	if err != nil {
		return nil, fmt.Errorf("--annotations: nothing says where the API server is: give --kubeconfig: %w", err)
	}
	return nodeRecord{cfg, node}, nil
}

// A nodeRecord is what a Node says by its annotations.
type nodeRecord struct {
	cfg  *rest.Config
	node string
}

// Published implements overlay.Record.
func (r nodeRecord) Published(ctx context.Context) (string, error) {
	keys, err := kube.Published(ctx, r.cfg, r.node)
	if len(keys) == 0 {
		return "", err
	}
	return fmt.Sprintf("kubectl annotate node %s %s-", r.node, strings.Join(keys, "- ")), err
}

// Withdraw implements overlay.Record.
func (r nodeRecord) Withdraw(ctx context.Context) error { return kube.Withdraw(ctx, r.cfg, r.node) }

func cleanupCommand() *cobra.Command {
	var c cleanup
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Take away from this node all that tweed has put there",
		Long: `Take away from this node all that tweed has put there: devices, routes, rules, the packet
filter's chains, the CNI configuration and plugin, and what is in /run/tweed. Each thing is said
as the command a person would type. What does not carry tweed's mark stays, and so do settings of
the kernel. No configuration is needed.

The daemon has to be ended and the node to be drained before: cleanup refuses while a daemon runs
or pods are attached.

Exit status: 0 nothing of tweed is left, 1 something is, and stderr names it.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return c.run(cmd) },
	}
	c.addTo(cmd.Flags())
	return cmd
}
