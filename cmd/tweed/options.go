package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"

	"github.com/spf13/pflag"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"

	"tweed.dev/tweed/backend/kernel"
	"tweed.dev/tweed/overlay"
	"tweed.dev/tweed/overlay/podnet"
	"tweed.dev/tweed/subnet/kube"
	"tweed.dev/tweed/subnet/local"
)

const (
	netConfPath     = "/etc/tweed/net-conf.json"
	singleNodeStore = "/var/lib/tweed/leases"
	mountedSysctls  = "/host/proc/sys"
)

// options are the flags that say what this node is.
type options struct {
	node, netConf string
	source
	singleNode         bool
	uplink             overlay.UplinkFlags
	runDir, sysctlRoot string
}

func (o *options) addTo(fs *pflag.FlagSet) {
	fs.StringVar(&o.node, "node-name", "",
		"this node's name; as the Node object has it (default $NODE_NAME, and without Kubernetes the host's name)")
	fs.StringVar(&o.netConf, "net-conf", netConfPath, "the pod network's configuration")
	o.source.addTo(fs)
	fs.BoolVar(&o.singleNode, "single-node", false,
		"run without Kubernetes and without other nodes: lease from "+singleNodeStore)
	fs.StringVar(&o.uplink.Iface, "iface", "",
		"name of the interface that carries packets to other nodes (default: the one that holds the node's address, because "+
			"the cluster knows the node by that; then the default route's)")
	fs.StringVar(&o.uplink.Match, "iface-regex", "",
		"instead of --iface, for nodes that name theirs differently: the first interface whose name, or one of whose "+
			"addresses, this regular expression matches")
	fs.StringVar(&o.uplink.Reach, "iface-can-reach", "",
		"instead of --iface, where routing knows best: the interface that packets to this address leave by; asked again in "+
			"each pass")
	fs.StringVar(&o.uplink.PublicIP, "public-ip", "",
		"address to tell other nodes, or one of each family with a comma in between, for a NAT in front of this node "+
			"(default: the interface's own, which is right without a NAT)")
	fs.StringVar(&o.runDir, "run-dir", podnet.DefaultRunDir, "where daemon and plugin meet; emptied by a reboot")
	fs.StringVar(&o.sysctlRoot, "sysctl-root", defaultSysctlRoot(),
		"where the host's /proc/sys is found; a container's own is read-only, so "+mountedSysctls+" where that is mounted")
}

// defaultSysctlRoot is where the manifest mounts the host's, so that commands need no flag in the daemon's container.
func defaultSysctlRoot() string {
	if st, err := os.Stat(mountedSysctls); err == nil && st.IsDir() {
		return mountedSysctls
	}
	return "/proc/sys"
}

// access says what a command may do with leases.
type access int

const (
	readOnly  access = iota // looks, and leases nothing
	readWrite               // the daemon's
)

// store is where leases come from, and where this node's go.
type store interface {
	overlay.Leases
	overlay.Publisher
}

// A configError is what is wrong with net-conf.json.
type configError struct{ error }

func (e configError) Unwrap() error { return e.error }

// planner puts together what a pass needs. done releases it.
func (o *options) planner(log *slog.Logger, a access) (p *overlay.Planner, done func(), err error) {
	choice, err := o.uplink.Parse()
	if err != nil {
		return nil, nil, err
	}
	cfg, err := overlay.LoadConfig(o.netConf)
	if err != nil {
		return nil, nil, configError{err}
	}
	leases, err := o.store(cfg, log, a)
	if err != nil {
		return nil, nil, err
	}
	kern, err := kernel.New(kernel.Options{SysctlRoot: o.sysctlRoot, Log: log})
	if err != nil {
		return nil, nil, err
	}
	return &overlay.Planner{
		Config: cfg, NetConf: o.netConf, Choice: choice, Leases: leases, Publisher: leases, Kernel: kern,
		RunDir: o.runDir, SysctlRoot: o.sysctlRoot,
	}, func() { kern.Close() }, nil
}

// store opens the leases.
func (o *options) store(cfg overlay.Config, log *slog.Logger, a access) (store, error) {
	dir := o.leases
	if o.singleNode {
		if dir != "" || o.kubeconfig != "" {
			return nil, errors.New("--single-node is for a machine of its own: give neither --leases nor --kubeconfig")
		}
		dir = singleNodeStore
	}
	if dir != "" {
		name, err := o.hostName()
		if err != nil {
			return nil, err
		}
		return openDirectory(dir, name, cfg, log, a)
	}
	restConfig, err := o.restConfig()
	if err != nil {
		return nil, err
	}
	name := o.nodeName()
	if name == "" {
		return nil, errors.New("which Node this is must be said: --node-name, or NODE_NAME in the environment " +
			"(spec.nodeName by the downward API)")
	}
	klog.SetSlogLogger(slog.New(slog.DiscardHandler)) // what matters of it, kube says itself, and once
	before, _ := podnet.ReadNodeInfo(o.runDir)        // of this boot; its pods keep their addresses if that is possible
	return kube.New(restConfig, kube.Options{
		Node: name, Origin: cfg.SubnetSource, Network: cfg.Network, Remembered: before.Subnets, ReadOnly: a == readOnly,
	}, log)
}

func openDirectory(dir, name string, cfg overlay.Config, log *slog.Logger, a access) (store, error) {
	d, err := local.New(dir, name, cfg.Network, log)
	if err != nil || a == readWrite {
		return d, err
	}
	return onlyLook{d}, nil
}

// onlyLook is a directory of leases in which this node takes none.
type onlyLook struct{ *local.Directory }

// Run reads the directory once.
func (l onlyLook) Run(context.Context, func()) error { return l.Look() }

func (o *options) nodeName() string {
	if o.node != "" {
		return o.node
	}
	return os.Getenv("NODE_NAME")
}

// hostName is the name of a node that no cluster has named.
func (o *options) hostName() (string, error) {
	if name := o.nodeName(); name != "" {
		return name, nil
	}
	name, err := os.Hostname()
	if err != nil {
		return "", fmt.Errorf("naming this node after its host: %w; give --node-name", err)
	}
	return strings.ToLower(name), nil
}

// source is where leases are read from.
type source struct {
	kubeconfig, leases string
}

func (s *source) addTo(fs *pflag.FlagSet) {
	fs.StringVar(&s.kubeconfig, "kubeconfig", "",
		"how to reach the API server (default: the pod's own service account)")
	fs.StringVar(&s.leases, "leases", "",
		"directory that nodes share leases in, for labs and machines without Kubernetes")
}

// restConfig says how to reach the API server.
func (s *source) restConfig() (*rest.Config, error) {
	if s.kubeconfig != "" {
		cfg, err := clientcmd.BuildConfigFromFlags("", s.kubeconfig)
		if err != nil {
			return nil, fmt.Errorf("--kubeconfig %s: %w", s.kubeconfig, err)
		}
		return cfg, nil
	}
	cfg, err := rest.InClusterConfig()
	if errors.Is(err, rest.ErrNotInCluster) {
		return nil, errors.New("nothing says where leases are: give --kubeconfig for a Kubernetes node (inside a pod none " +
			"is needed), --single-node for a machine of its own, or --leases DIR for machines that share a directory")
	}
	if err != nil {
		return nil, fmt.Errorf("reading the pod's service account: %w", err)
	}
	return cfg, nil
}

// planOnce waits for what a plan needs, and makes it.
func planOnce(ctx context.Context, p *overlay.Planner) (overlay.Plan, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	bell := make(chan struct{}, 1)
	ring := func() {
		select {
		case bell <- struct{}{}:
		default:
		}
	}
	failed := make(chan error, 1)
	go func() { failed <- p.Leases.Run(ctx, ring) }()
	for {
		plan, err := p.Plan(ctx)
		var waiting overlay.Waiting
		if !errors.As(err, &waiting) {
			return plan, err
		}
		select {
		case <-bell:
		case err := <-failed:
			if err != nil {
				return plan, err
			}
			return p.Plan(ctx) // all that there is to read has been read
		case <-ctx.Done():
			return plan, waiting
		}
	}
}
