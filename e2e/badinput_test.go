package e2e

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"syscall"
	"testing"

	"tweed.dev/tweed/e2e/cluster"
)

// A ghost is a Node that is only annotations: what a peer with a fault, or an earlier version, may have published.
type ghostNode struct {
	name, subnet string
	annotations  map[string]string
}

// ghost is one without any fault.
func ghost(number int) ghostNode {
	subnet := fmt.Sprintf("10.244.%d.0/24", number)
	return ghostNode{
		name: fmt.Sprintf("ghost-%d", number), subnet: subnet,
		annotations: map[string]string{
			"tweed.dev/subnets":      subnet,
			"tweed.dev/host":         fmt.Sprintf("192.0.2.%d", number),
			"tweed.dev/backend":      "vxlan",
			"tweed.dev/backend-data": fmt.Sprintf(`{"vni":1,"port":8472,"mac":"0e:00:00:00:00:%02x"}`, number),
		},
	}
}

// haunt puts a faulty Node into the cluster: each node has to name it in a Problem with these words, and so has `subnet
// status`; nobody else may suffer. Then the Node goes, and with it the Problem.
func (s *suite) haunt(t *testing.T, g ghostNode, words ...string) {
	t.Helper()
	s.CreateNode(t, g.name, nil, nil, g.annotations)
	for _, n := range s.nodes {
		awaitProblem(t, n, g.name, words...)
	}
	if r := s.nodes[0].SubnetStatus(t); r.Status != 2 || contains(r.Stdout, append(words, g.name)...) != nil {
		t.Errorf("subnet status: status %d, want 2; %v\n%s%s", r.Status, contains(r.Stdout, append(words, g.name)...),
			r.Stdout, r.Stderr)
	}
	s.podsPing(t)
	s.DeleteNode(t, g.name)
	s.awaitHealth(t)
}

// awaitProblem waits until a node names another, or itself, in Problems with these words, and is ready all the same.
func awaitProblem(t *testing.T, n *cluster.Node, about string, words ...string) {
	t.Helper()
	cluster.Await(t, fmt.Sprintf("%s to name %s with %q", n.Name, about, words), func() error {
		r, err := n.Report()
		if err != nil {
			return err
		}
		if !r.Converged {
			return fmt.Errorf("it has not converged: %v", r.Problems)
		}
		if err := contains(strings.Join(r.Names(about), "\n"), words...); err != nil {
			return fmt.Errorf("%w in %v", err, r.Problems)
		}
		return nil
	})
}

// awaitHealth waits until no node has a Problem.
func (s *suite) awaitHealth(t *testing.T) {
	t.Helper()
	s.awaitPeers(t)
	for _, n := range s.Nodes {
		cluster.Await(t, n.Name+" to have no problem", func() error {
			r, err := n.Report()
			if err == nil && len(r.Problems) > 0 {
				err = fmt.Errorf("it has %v", r.Problems)
			}
			return err
		})
	}
	if r := s.nodes[0].SubnetStatus(t); r.Status != 0 {
		t.Errorf("subnet status: status %d, want 0\n%s%s", r.Status, r.Stdout, r.Stderr)
	}
}

func (s *suite) garbageInAnnotations(t *testing.T) {
	const garbage = "garbage!"
	all := ghost(66)
	all.annotations["tweed.dev/sources"] = ""
	var words []string
	for _, key := range slices.Sorted(maps.Keys(all.annotations)) {
		all.annotations[key] = garbage
		words = append(words, key, garbage)
		g := ghost(66)
		g.annotations[key] = garbage
		s.haunt(t, g, key, garbage)
	}
	s.haunt(t, all, words...)
	missing := ghost(66)
	delete(missing.annotations, "tweed.dev/host")
	s.haunt(t, missing, "tweed.dev/host")
	// As much as the API server takes: 256 KB for all annotations of an object.
	huge := ghost(66)
	huge.annotations["tweed.dev/subnets"] = strings.Repeat("10.244.66.0/24,", 128<<10/15)
	huge.annotations["example.com/other"] = strings.Repeat("x", 120<<10)
	s.haunt(t, huge, "tweed.dev/subnets", "has 131070 bytes; at most ")
}

// faultyNode runs a daemon on a node whose podCIDRs are wrong, while f looks. It has to say so with these words and to
// go on, and nobody else may suffer.
func (s *suite) faultyNode(t *testing.T, podCIDRs []string, words []string, f func(n5 *cluster.Node)) {
	t.Helper()
	n5 := s.AddNode(t, "n5", podCIDRs...)
	defer func() {
		if t.Failed() {
			n5.Dump(t)
		}
		s.RemoveNode(t, n5)
		s.awaitHealth(t)
	}()
	n5.StartDaemon(t)
	cluster.Await(t, "n5 to say what is wrong", func() error { return n5.Daemon.LogContains(words...) })
	f(n5)
	if !n5.Daemon.Running() {
		t.Errorf("the daemon on n5 ended:\n%s", n5.Daemon.Tail(20))
	}
	s.podsPing(t)
}

func (s *suite) podCIDROutside(t *testing.T) {
	s.faultyNode(t, []string{"10.99.5.0/24"}, []string{"10.99.5.0/24", "10.244.0.0/16"}, func(n5 *cluster.Node) {
		if err := n5.Ready(); err == nil {
			t.Error("a node with a podCIDR outside the network says that it is ready")
		}
	})
	g := ghost(66)
	g.annotations["tweed.dev/subnets"] = "10.99.6.0/24"
	s.haunt(t, g, "10.99.6.0/24", "outside the network 10.244.0.0/16")
}

func (s *suite) oneSubnetTwice(t *testing.T) {
	taken := podCIDRs(2)
	s.faultyNode(t, taken, []string{taken[0], "n2"}, func(*cluster.Node) {
		for _, n := range s.nodes {
			awaitProblem(t, n, "n5", taken[0], taken[1], "n2")
		}
	})
	g := ghost(66)
	g.annotations["tweed.dev/subnets"] = taken[0]
	s.haunt(t, g, taken[0], "n2")
}

func (s *suite) oneMACTwice(t *testing.T) {
	mac := vtepMAC(t, s.nodes[1])
	g := ghost(66)
	g.annotations["tweed.dev/backend-data"] = fmt.Sprintf(`{"vni":1,"port":8472,"mac":%q}`, mac)
	s.haunt(t, g, mac, "n2")
}

func (s *suite) noPodCIDRs(t *testing.T) {
	n6 := s.AddNode(t, "n6")
	defer func() {
		s.RemoveNode(t, n6)
		s.awaitHealth(t)
	}()
	n6.StartDaemon(t)
	words := []string{"spec.podCIDRs", "n6", "--allocate-node-cidrs"}
	cluster.Await(t, "the daemon to say what it waits for", func() error { return n6.Daemon.LogContains(words...) })
	if err := n6.Ready(); err == nil {
		t.Error("a node without podCIDRs says that it is ready")
	} else if lacks := contains(err.Error(), words...); lacks != nil {
		t.Errorf("%v: %v", err, lacks)
	}
	if r := n6.InContainer(t, "/bin/ls", "/etc/cni/net.d"); r.Stdout != "" {
		t.Errorf("a node without podCIDRs has CNI configuration: %s", r.Stdout)
	}
	n6.PodCIDRs = podCIDRs(6)
	s.PatchNode(t, n6.Name, fmt.Sprintf(`{"spec":{"podCIDR":%q,"podCIDRs":[%q,%q]}}`,
		n6.PodCIDRs[0], n6.PodCIDRs[0], n6.PodCIDRs[1]))
	s.awaitPeers(t)
	n6.AddPod(t, "pod1")
	s.podsPing(t)
}

func (s *suite) twoDaemons(t *testing.T) {
	n := s.nodes[0]
	first, second := n.Daemon, n.StartSecondDaemon(t)
	cluster.Await(t, "the second daemon to say that it waits", func() error {
		if !second.Running() {
			return errors.New("it ended:\n" + second.Tail(10))
		}
		return second.LogContains("another tweed daemon", "waiting")
	})
	if err := n.Ready(); err != nil || !first.Running() {
		t.Errorf("the first daemon suffers: %v\n%s", err, first.Tail(10))
	}
	first.Stop(t, syscall.SIGTERM)
	n.PromoteSecondDaemon()
	s.awaitPeers(t)
	s.podsPing(t)
}
