package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/util/duration"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/yaml"

	"tweed.dev/tweed/overlay"
	"tweed.dev/tweed/subnet"
	"tweed.dev/tweed/subnet/kube"
	"tweed.dev/tweed/subnet/local"
)

// configMap is where a cluster keeps net-conf.json, for people.
const configMap = kube.NetConfMap + " in namespace " + kube.NetConfNamespace

func subnetCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "subnet",
		Short: "Look at who leases which pod subnet, and which pod has which address",
		Args:  cobra.NoArgs,
	}
	cmd.AddCommand(statusCommand(), addressesCommand())
	return cmd
}

func statusCommand() *cobra.Command {
	var s source
	var netConf, output string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show every node's lease and what is wrong with it",
		Long: `Show every node's subnets, where its packets go, and what is wrong; and how much of the pod
network is leased. Which leases are good is judged by net-conf.json, or else by what the cluster
has of it in ConfigMap ` + configMap + `.

On a node it also tells how the daemon fares; and while the API server does not answer, it shows
the leases that this daemon has.

Exit status: 0 all is well, 2 something is wrong, 1 error.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !slices.Contains([]string{"", "wide", "json", "yaml"}, output) {
				return fmt.Errorf("--output %q: it is wide, json or yaml, or not given for a table", output)
			}
			st, err := s.status(cmd.Context(), netConf, cmd.Flags().Changed("net-conf"))
			if err != nil {
				return err
			}
			if err := st.print(cmd.OutOrStdout(), output, time.Now()); err != nil {
				return err
			}
			if !st.isWell() {
				return exitStatus(2)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&s.kubeconfig, "kubeconfig", "",
		"how to reach the API server (default: as kubectl finds it, or the pod's own service account)")
	cmd.Flags().StringVar(&s.leases, "leases", "", "directory that nodes share leases in, instead of an API server")
	cmd.Flags().StringVar(&netConf, "net-conf", netConfPath,
		"the pod network's configuration; the cluster's ConfigMap where there is no such file")
	cmd.Flags().StringVarP(&output, "output", "o", "", "wide, json or yaml (default: a table)")
	return cmd
}

// status reads all leases once and judges them by the configuration at netConf; asked is set where that was asked for.
func (s *source) status(ctx context.Context, netConf string, asked bool) (status, error) {
	short, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	daemon := daemonHere(ctx)
	list, err := s.list(short)
	var away awayError
	if errors.As(err, &away) && daemon != nil {
		if list, err = leasesHere(ctx); err != nil {
			return status{}, fmt.Errorf("%w; %w", away, err)
		}
	}
	if err != nil {
		return status{}, err
	}
	cfg, unknown, err := s.config(short, netConf, asked)
	if err != nil {
		return status{}, err
	}
	st := newStatus(list, cfg)
	st.unknown, st.Daemon = unknown, daemon
	if away.error != nil {
		st.Away = away.Error()
	}
	return st, nil
}

// An awayError is why an API server could not be asked.
type awayError struct{ error }

// list reads all leases once.
func (s *source) list(ctx context.Context) (subnet.List, error) {
	if s.leases != "" {
		return local.ListOnce(s.leases)
	}
	cfg, err := s.adminConfig()
	if err != nil {
		return subnet.List{}, err
	}
	list, err := kube.ListOnce(ctx, cfg)
	var refusal apierrors.APIStatus
	if err != nil && (!errors.As(err, &refusal) || refusal.Status().Code >= http.StatusInternalServerError) {
		err = awayError{err}
	}
	return list, err
}

// config reads the pod network's configuration: the file at path, or else, where that was not asked for, what the cluster
// has. unknown says why there is none.
func (s *source) config(ctx context.Context, path string, asked bool) (cfg *overlay.Config, unknown, err error) {
	c, err := overlay.LoadConfig(path)
	if err == nil {
		return &c, nil, nil
	}
	if asked || !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, err
	}
	if s.leases != "" {
		return nil, fmt.Errorf("there is no %s", path), nil
	}
	server, err := s.adminConfig()
	if err != nil {
		return nil, nil, err
	}
	text, unknown := kube.NetConf(ctx, server)
	if unknown != nil {
		return nil, unknown, nil
	}
	if c, err = overlay.ParseConfig([]byte(text)); err != nil {
		return nil, nil, fmt.Errorf("ConfigMap %s: %w", configMap, err)
	}
	return &c, nil, nil
}

// adminConfig finds an API server as kubectl does.
func (s *source) adminConfig() (*rest.Config, error) {
	if s.kubeconfig == "" {
		rules := clientcmd.NewDefaultClientConfigLoadingRules()
		cfg, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, nil).ClientConfig()
		if err == nil || !clientcmd.IsEmptyConfig(err) {
			return cfg, err
		}
	}
	return s.restConfig()
}

// A status is what `subnet status` shows, and the struct that -o json prints.
type status struct {
	Nodes []nodeStatus `json:"nodes"`
	// Network says how far the pod network is leased; absent where there is no net-conf.json to say what it is.
	Network []subnet.Usage `json:"network,omitempty"`
	// Problems are those of all nodes.
	Problems []subnet.Problem `json:"problems"`
	// Daemon is how this node's daemon fares; absent where none answers.
	Daemon *daemonStatus `json:"daemon,omitempty"`
	// Away is why the API server could not be asked. The leases are those that this node's daemon has then.
	Away string `json:"apiServerAway,omitempty"`

	unknown error // why there is no configuration to judge by
}

// nodeStatus is one node's line.
type nodeStatus struct {
	Node      string          `json:"node"`
	Subnets   []netip.Prefix  `json:"subnets"`
	Host      netip.Addr      `json:"host,omitzero"`
	NodeAddrs []netip.Addr    `json:"nodeAddrs,omitempty"`
	Sources   []netip.Addr    `json:"sources,omitempty"`
	Backend   string          `json:"backend,omitempty"`
	Data      json.RawMessage `json:"backendData,omitempty"`
	Since     time.Time       `json:"since,omitzero"`
	// Problems are the texts of this node's problems.
	Problems []string `json:"problems"`
}

func (st status) isWell() bool {
	return len(st.Problems) == 0 && st.Away == "" && (st.Daemon == nil || st.Daemon.Converged && st.Daemon.Waiting == "")
}

// newStatus judges a list of leases by cfg; without one, only what cannot be read is wrong.
func newStatus(list subnet.List, cfg *overlay.Config) status {
	st := status{Problems: slices.Clone(list.Problems)}
	if cfg != nil {
		st.Problems = append(st.Problems, judge(list.Leases, *cfg)...)
		st.Network = cfg.Network.Usage(list.Leases)
	}
	nodes := map[string]*nodeStatus{}
	node := func(name string) *nodeStatus {
		if nodes[name] == nil {
			nodes[name] = &nodeStatus{Node: name, Subnets: []netip.Prefix{}, Problems: []string{}}
		}
		return nodes[name]
	}
	for _, l := range list.Leases {
		n := node(l.Node)
		n.Subnets = append(n.Subnets, l.Subnet)
		n.Host, n.NodeAddrs, n.Sources, n.Backend, n.Data, n.Since = l.Host, l.NodeAddrs, l.Sources, l.Backend, l.Data, l.Since
	}
	for _, p := range st.Problems {
		n := node(p.Node)
		n.Problems = append(n.Problems, p.Text)
	}
	for _, n := range nodes {
		slices.SortFunc(n.Subnets, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
		st.Nodes = append(st.Nodes, *n)
	}
	slices.SortFunc(st.Nodes, func(a, b nodeStatus) int { return naturally(a.Node, b.Node) })
	slices.SortFunc(st.Problems, func(a, b subnet.Problem) int {
		return cmp.Or(naturally(a.Node, b.Node), cmp.Compare(a.Text, b.Text))
	})
	return st
}

// judge settles the leases as a node does that has none itself. What family the underlay has is for the oldest lease
// to say where the configuration leaves it open.
func judge(leases []subnet.Lease, cfg overlay.Config) []subnet.Problem {
	underlay := cfg.Underlay
	if underlay == 0 && len(leases) > 0 {
		oldest := slices.MinFunc(leases, func(a, b subnet.Lease) int {
			return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.Node, b.Node))
		})
		underlay = 6
		if oldest.Host.Is4() {
			underlay = 4
		}
	}
	rules := subnet.Rules{
		Network: cfg.Network, ExactLength: cfg.SubnetSource == subnet.OriginLease, Judge: cfg.Judge(underlay),
	}
	_, problems := subnet.Settle("", rules, leases)
	return problems
}

func (st status) print(w io.Writer, output string, now time.Time) error {
	switch output {
	case "json":
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(st)
	case "yaml":
		text, err := yaml.Marshal(st)
		if err != nil {
			return err
		}
		_, err = w.Write(text)
		return err
	}
	return st.table(w, output == "wide", now)
}

func (st status) table(w io.Writer, wide bool, now time.Time) error {
	if st.Away != "" {
		fmt.Fprintf(w, "The API server could not be asked: %s.\n"+
			"These are the leases that this node's daemon has, as of %s ago.\n\n", st.Away, st.Daemon.age())
	}
	if len(st.Nodes) == 0 {
		fmt.Fprintln(w, "No node has a lease.")
	} else {
		t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
		head := []string{"NODE", "SUBNETS", "HOST", "BACKEND", "AGE", "PROBLEMS"}
		if wide {
			head = append(head, "ADDRESSES", "SOURCES", "DATA")
		}
		fmt.Fprintln(t, strings.Join(head, "\t"))
		for _, n := range st.Nodes {
			fmt.Fprintln(t, strings.Join(n.cells(wide, now), "\t"))
		}
		if err := t.Flush(); err != nil {
			return err
		}
	}
	fmt.Fprintln(w)
	if st.Network == nil {
		fmt.Fprintf(w, "The pod network is not known here, so leases are not judged by it: %v; name a net-conf.json with "+
			"--net-conf.\n", st.unknown)
	}
	for _, u := range st.Network {
		fmt.Fprintf(w, "Network %s: %d of %d subnets leased, %d free.\n", u.Network, u.Leased, u.Total, u.Free)
	}
	if st.Daemon != nil {
		fmt.Fprintln(w, st.Daemon)
	}
	if len(st.Problems) > 0 {
		fmt.Fprintln(w, "\nProblems:")
		for _, p := range st.Problems {
			fmt.Fprintln(w, " ", p)
		}
	}
	return nil
}

func (n nodeStatus) cells(wide bool, now time.Time) []string {
	age, problems := "-", "-"
	if !n.Since.IsZero() {
		age = duration.HumanDuration(now.Sub(n.Since))
	}
	if len(n.Problems) > 0 {
		problems = strconv.Itoa(len(n.Problems))
	}
	host := "-"
	if n.Host.IsValid() {
		host = n.Host.String()
	}
	cells := []string{n.Node, list(n.Subnets), host, cmp.Or(n.Backend, "-"), age, problems}
	if wide {
		cells = append(cells, list(n.NodeAddrs), list(n.Sources), cmp.Or(string(n.Data), "-"))
	}
	return cells
}

func list[T fmt.Stringer](items []T) string {
	var s []string
	for _, i := range items {
		s = append(s, i.String())
	}
	return cmp.Or(strings.Join(s, ","), "-")
}

// naturally compares names as people do: n2 before n10.
func naturally(a, b string) int {
	x, y := trailingNumber(a), trailingNumber(b)
	if a[:len(a)-len(x)] == b[:len(b)-len(y)] && len(x) != len(y) && x != "" && y != "" {
		return cmp.Compare(len(x), len(y))
	}
	return cmp.Compare(a, b)
}

func trailingNumber(s string) string {
	return s[len(strings.TrimRight(s, "0123456789")):]
}
