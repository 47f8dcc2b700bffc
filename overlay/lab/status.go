package lab

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"runtime"
	"strconv"
	"strings"
	"text/tabwriter"

	"golang.org/x/sync/errgroup"

	"tweed.dev/tweed/overlay/podnet"
)

// A Status is how a lab stands at one moment.
type Status struct {
	Complete bool         `json:"complete"` // `up` came to its end
	Underlay string       `json:"underlay"` // "ipv4" or "ipv6"
	Nodes    []NodeStatus `json:"nodes"`
}

// A NodeStatus is how one node of a lab stands.
type NodeStatus struct {
	Name    string         `json:"name"`
	PID     int            `json:"pid"`       // of the daemon; 0 while none runs
	Ready   bool           `json:"ready"`     // as the daemon says
	Addrs   []netip.Addr   `json:"addresses"` // of eth0, on the underlay
	Subnets []netip.Prefix `json:"subnets"`   // the node's pods are in these
	Pods    []PodStatus    `json:"pods"`
	Problem string         `json:"problem,omitempty"`
}

// A PodStatus is how one pod of a lab stands.
type PodStatus struct {
	Name    string       `json:"name"`
	Addrs   []netip.Addr `json:"addresses"` // of eth0
	Problem string       `json:"problem,omitempty"`
}

// Healthy reports whether the lab is as `up` leaves it.
func (s Status) Healthy() bool { return len(s.problems()) == 0 }

// Status looks at every node and every pod. The error is ErrNone where there is no lab.
func (l *Lab) Status(ctx context.Context) (Status, error) {
	if err := needRoot(); err != nil {
		return Status{}, err
	}
	r, err := l.readRecord()
	if err != nil {
		return Status{}, err
	}
	s := Status{Complete: r.Complete, Underlay: r.Underlay, Nodes: make([]NodeStatus, r.Nodes)}
	var g errgroup.Group
	g.SetLimit(4 * runtime.GOMAXPROCS(0))
	for i := range s.Nodes {
		g.Go(func() error {
			s.Nodes[i] = l.nodeStatus(ctx, i+1, r.podNames())
			return nil
		})
	}
	_ = g.Wait() // none returns an error
	return s, ctx.Err()
}

func (l *Lab) nodeStatus(ctx context.Context, i int, pods []string) NodeStatus {
	node := nodeName(i)
	s := NodeStatus{Name: node, Addrs: nodeAddrs(i), Subnets: []netip.Prefix{}, Pods: make([]PodStatus, 0, len(pods))}
	if info, err := podnet.ReadNodeInfo(l.path(node, "run")); err == nil {
		s.Subnets = info.Subnets
	}
	if daemon, ok := l.daemon(node); !ok {
		s.Problem = fmt.Sprintf("the daemon is not running; `tweed lab restart %s` starts it", node)
	} else {
		s.PID = daemon.pid
		s.Ready = l.ready(ctx, node)
		if !s.Ready {
			s.Problem = fmt.Sprintf("the daemon is not ready; %s says why", l.path(node, "tweed.log"))
		}
	}
	for _, pod := range pods {
		p := PodStatus{Name: pod, Addrs: []netip.Addr{}}
		if addrs, err := l.podAddrs(node, pod); err != nil {
			p.Problem = err.Error()
		} else {
			p.Addrs = append(p.Addrs, addrs...)
			if err := dualStack(addrs); err != nil {
				p.Problem = err.Error()
			}
		}
		s.Pods = append(s.Pods, p)
	}
	return s
}

// WriteTable writes s for people.
func (s Status) WriteTable(w io.Writer) error {
	nodes := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(nodes, "NODE\tDAEMON\tREADY\tUNDERLAY\tPOD SUBNETS")
	for _, n := range s.Nodes {
		daemon := "not running"
		if n.PID != 0 {
			daemon = "pid " + strconv.Itoa(n.PID)
		}
		fmt.Fprintf(nodes, "%s\t%s\t%s\t%s\t%s\n", n.Name, daemon, yes(n.Ready), join(n.Addrs), join(n.Subnets))
	}
	if err := nodes.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(w)
	pods := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(pods, "POD\tADDRESSES")
	for _, n := range s.Nodes {
		for _, p := range n.Pods {
			fmt.Fprintf(pods, "%s/%s\t%s\n", n.Name, p.Name, join(p.Addrs))
		}
	}
	if err := pods.Flush(); err != nil {
		return err
	}
	if problems := s.problems(); len(problems) > 0 {
		fmt.Fprintf(w, "\n%s\n", strings.Join(problems, "\n"))
	}
	return nil
}

// problems are all there are, each with the name of its node or pod.
func (s Status) problems() []string {
	var all []string
	for _, n := range s.Nodes {
		if n.Problem != "" {
			all = append(all, n.Name+": "+n.Problem)
		}
		for _, p := range n.Pods {
			if p.Problem != "" {
				all = append(all, n.Name+"/"+p.Name+": "+p.Problem)
			}
		}
	}
	if !s.Complete {
		all = append(all, "this lab was never completed; `tweed lab down` removes it")
	}
	return all
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func join[T fmt.Stringer](values []T) string {
	if len(values) == 0 {
		return "-"
	}
	text := make([]string, len(values))
	for i, v := range values {
		text[i] = v.String()
	}
	return strings.Join(text, ",")
}
