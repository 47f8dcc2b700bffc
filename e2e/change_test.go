package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"tweed.dev/tweed/e2e/cluster"
	"tweed.dev/tweed/e2e/probe"
)

func (s *suite) nodeJoinsAndLeaves(t *testing.T) {
	n4 := s.AddNode(t, "n4", podCIDRs(4)...)
	removed := false
	defer func() {
		if !removed {
			s.RemoveNode(t, n4)
		}
	}()
	n4.StartDaemon(t)
	s.awaitPeers(t)
	n4.AddPod(t, "pod1")
	s.podsAreSeen(t)
	before := traces(t, s.nodes[0], n4)
	if len(before) == 0 {
		t.Error("while n4 is there, n1 has no route, neighbour or FDB entry for it")
	}
	mac := vtepMAC(t, n4)
	s.RemoveNode(t, n4)
	removed = true
	for _, n := range s.nodes {
		cluster.Await(t, n.Name+" to forget n4", func() error {
			if left := grep(t, n, append(n4.PodCIDRs, mac, n4.Addrs[0].String())...); len(left) > 0 {
				return fmt.Errorf("it still has\n%s", strings.Join(left, "\n"))
			}
			return nil
		})
	}
	s.podsPing(t)
}

// traces are the kernel's entries on a node that lead to another.
func traces(t *testing.T, on, to *cluster.Node) []string {
	t.Helper()
	return grep(t, on, append(to.PodCIDRs, vtepMAC(t, to), to.Addrs[0].String())...)
}

// grep returns the routes, FDB entries and permanent neighbours of a node's VXLAN device that contain one of the words.
func grep(t *testing.T, n *cluster.Node, words ...string) (found []string) {
	t.Helper()
	for _, command := range []string{
		"ip route show", "ip -6 route show", "ip neigh show dev tweed.1", "ip -6 neigh show dev tweed.1",
		"bridge fdb show dev tweed.1",
	} {
		for line := range strings.Lines(n.NetNS.Run(t, command)) {
			for _, w := range words {
				if strings.Contains(line, w+" ") {
					found = append(found, strings.TrimSpace(line))
					break
				}
			}
		}
	}
	return found
}

func (s *suite) daemonIsKilled(t *testing.T) { s.restart(t, syscall.SIGKILL, -1) }

func (s *suite) daemonIsUpdated(t *testing.T) { s.restart(t, syscall.SIGTERM, 0) }

// restart ends the daemons of both ends of a stream and starts them again; no datagram may be lost.
func (s *suite) restart(t *testing.T, how syscall.Signal, status int) {
	t.Helper()
	from, to := s.nodes[0], s.nodes[1]
	s.uninterrupted(t, from, to, func() {
		for _, n := range []*cluster.Node{from, to} {
			if got := n.Daemon.Stop(t, how); got != status {
				t.Errorf("after %v the daemon on %s ends with status %d, want %d\n%s", how, n.Name, got, status, n.Daemon.Tail(10))
			}
		}
		s.podsPing(t) // nobody needs the daemons for that
		for _, n := range []*cluster.Node{from, to} {
			n.StartDaemon(t)
		}
		s.awaitPeers(t)
	})
}

// uninterrupted has pods of two nodes talk to each other while f runs, over UDP and over TCP. Nothing may be lost.
func (s *suite) uninterrupted(t *testing.T, a, b *cluster.Node, f func()) {
	t.Helper()
	s.podsPing(t) // neighbours that are still unknown lose datagrams of their own
	var streams []*probe.Stream
	var transfers []*probe.LongTransfer
	for _, way := range [][2]*cluster.Pod{{a.Pods[0], b.Pods[0]}, {b.Pods[0], a.Pods[0]}} {
		for _, addr := range way[1].Addrs {
			stream, err := probe.StartStream(way[0].NetNS, way[1].NetNS, addr)
			if err != nil {
				t.Fatal(err)
			}
			transfer, err := probe.StartTransfer(way[0].NetNS, addr)
			if err != nil {
				t.Fatal(err)
			}
			streams, transfers = append(streams, stream), append(transfers, transfer)
		}
	}
	f()
	for i, stream := range streams {
		sent, lost := stream.Stop()
		bytes, broken := transfers[i].Stop()
		if err := errors.Join(lost, broken); err != nil {
			t.Errorf("between %s and %s: %v", a.Name, b.Name, err)
		}
		s.Progress("  %d datagrams and %d MB between %s and %s", sent, bytes/1e6, a.Name, b.Name)
	}
}

func (s *suite) annotationsAreChanged(t *testing.T) {
	n := s.nodes[2]
	for _, patch := range []string{
		`{"metadata":{"annotations":{"tweed.dev/subnets":"garbage!"}}}`,
		`{"metadata":{"annotations":{"tweed.dev/host":null,"tweed.dev/backend":null}}}`,
	} {
		s.PatchNode(t, n.Name, patch)
		cluster.Await(t, "the daemon to publish again after "+patch, func() error { return s.published(t, n) })
	}
	s.awaitPeers(t)
	s.podsPing(t)
}

// hostOverride has the others send to an address of n3 that is not its InternalIP, as if there were a NAT. What n3 sends
// comes from the address that it always came from, as it would not with a NAT, so the others have to be told.
func (s *suite) hostOverride(t *testing.T) {
	n, other := s.nodes[2], netip.MustParseAddr("192.0.2.203")
	n.NetNS.Run(t, "ip addr add "+other.String()+"/24 dev eth0")
	defer n.NetNS.Run(t, "ip addr del "+other.String()+"/24 dev eth0")
	annotate := func(key, value string) {
		s.PatchNode(t, n.Name, `{"metadata":{"annotations":{"tweed.dev/`+key+`":`+value+`}}}`)
	}
	override := func(value string) { annotate("host-override", value) }
	annotate("sources", fmt.Sprintf("%q", n.Addrs[0]))
	defer annotate("sources", "null")
	reachedBy := func(host netip.Addr) {
		cluster.Await(t, "n1 to send to n3 at "+host.String(), func() error {
			if got := s.Annotations(t, n.Name)["tweed.dev/host"]; got != host.String()+","+n.Addrs[1].String() {
				return fmt.Errorf("n3 publishes %s", got)
			}
			if len(grep(t, s.nodes[0], "dst "+host.String())) == 0 {
				return errors.New("there is no FDB entry for that")
			}
			return nil
		})
		s.podsPing(t)
	}
	defer override("null")
	override(fmt.Sprintf("%q", other))
	reachedBy(other)
	override(`"198.51.100.300"`)
	awaitProblem(t, n, n.Name, "tweed.dev/host-override", "198.51.100.300", other.String())
	reachedBy(other)
	override("null")
	s.awaitPeers(t)
	reachedBy(n.Addrs[0])
}

// nodesChangeVNI gives the nodes another VNI one by one, and then the old one. Two that differ name each other, and two
// that do not reach each other's pods. No daemon is restarted.
func (s *suite) nodesChangeVNI(t *testing.T) {
	daemon := s.nodes[0].Daemon
	other := strings.Replace(cluster.NetConf, `"vxlan"`, `"vxlan", "VNI": 7`, 1)
	for _, change := range []struct{ conf, device, says string }{
		{other, "tweed.7", "VNI 1 where this node has 7"},
		{cluster.NetConf, "tweed.1", "VNI 7 where this node has 1"},
	} {
		for i, n := range s.nodes {
			n.Configure(t, change.conf)
			cluster.Await(t, n.Name+" to have "+change.device+" and no other", func() error {
				if got := n.NetNS.Run(t, "ip -o link show type vxlan"); strings.Count(got, "\n") != 1 ||
					!strings.Contains(got, " "+change.device+":") {
					return fmt.Errorf("it has\n%s", got)
				}
				return nil
			})
			for _, not := range s.nodes[i+1:] {
				awaitProblem(t, n, not.Name, change.says)
				awaitProblem(t, not, n.Name, "where this node has")
			}
			for _, from := range s.nodes[:i] {
				for _, addr := range n.Pods[0].Addrs {
					cluster.Await(t, fmt.Sprintf("%s to reach %s", from.Pods[0], addr), func() error {
						return probe.Ping(from.Pods[0].NetNS, addr)
					})
				}
			}
		}
		s.awaitPeers(t)
		s.podsPing(t)
	}
	if s.nodes[0].Daemon != daemon {
		t.Error("the daemon of n1 was started anew")
	}
	s.awaitHealth(t)
}

// apiServerGoesAway needs no API server for pods that talk, nor to repair.
func (s *suite) apiServerGoesAway(t *testing.T) {
	s.uninterrupted(t, s.nodes[1], s.nodes[2], func() { s.goesAway(t) })
}

func (s *suite) goesAway(t *testing.T) {
	n := s.nodes[0]
	s.StopAPIServer(t)
	s.podsPing(t)
	entry := tunnelEntry(t, n)
	n.NetNS.Run(t, "bridge fdb del "+entry)
	cluster.Await(t, "the FDB entry "+entry+" to come back while the API server is away", func() error {
		if tunnelEntry(t, n) == "" {
			return errors.New("there is none")
		}
		return hasEntry(t, n, entry)
	})
	s.podsPing(t)
	r := n.SubnetStatus(t)
	words := []string{"n1 ", "n2 ", "n3 ", s.URL(), "as of ", "This node's daemon: converged; its list of leases is "}
	if lacks := contains(r.Stdout, words...); lacks != nil || r.Status != 2 {
		t.Errorf("subnet status while the API server is away: status %d; %v\n%s%s", r.Status, lacks, r.Stdout, r.Stderr)
	}
	s.StartAPIServer(t)
	s.somethingNewArrives(t)
}

// somethingNewArrives proves that all nodes hear of changes: a Node comes, gets its route everywhere, and goes.
func (s *suite) somethingNewArrives(t *testing.T) {
	t.Helper()
	g := ghost(77)
	s.CreateNode(t, g.name, nil, nil, g.annotations)
	for _, n := range s.nodes {
		cluster.Await(t, "a route to the new node on "+n.Name, func() error {
			if len(grep(t, n, g.subnet)) == 0 {
				return errors.New("there is none")
			}
			return nil
		})
	}
	s.DeleteNode(t, g.name)
	s.awaitPeers(t)
}

// tunnelEntry is the first FDB entry towards a peer, as `bridge fdb del` takes it.
func tunnelEntry(t *testing.T, n *cluster.Node) string {
	t.Helper()
	for line := range strings.Lines(n.NetNS.Run(t, "bridge fdb show dev tweed.1")) {
		if words := strings.Fields(line); len(words) > 2 && words[1] == "dst" {
			return words[0] + " dev tweed.1 dst " + words[2] + " self"
		}
	}
	return ""
}

func hasEntry(t *testing.T, n *cluster.Node, entry string) error {
	t.Helper()
	mac, rest, _ := strings.Cut(entry, " dev tweed.1 ")
	out := n.NetNS.Run(t, "bridge fdb show dev tweed.1")
	if !strings.Contains(out, mac+" "+strings.TrimSuffix(rest, " self")) {
		return fmt.Errorf("it has only\n%s", out)
	}
	return nil
}

func (s *suite) daemonStartsAlone(t *testing.T) {
	n := s.nodes[0]
	n.Daemon.Stop(t, syscall.SIGTERM)
	s.StopAPIServer(t)
	before := n.State(t)
	n.StartDaemon(t)
	cluster.Await(t, "readiness that names the API server", func() error {
		err := n.Ready()
		if err == nil {
			t.Fatal("the daemon says that it is ready without ever having seen the API server")
		}
		return contains(err.Error(), "503", s.URL())
	})
	s.podsPing(t)
	if after := n.State(t); after != before {
		t.Errorf("a daemon that knows nothing changed\n%s\nto\n%s", before, after)
	}
	s.StartAPIServer(t)
	s.awaitPeers(t)
	s.podsPing(t)
}
