package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"tweed.dev/tweed/e2e/cluster"
)

// A suite is one cluster with its long-lived nodes n1, n2, n3 and two pods on each. Every step leaves it as it was.
type suite struct {
	*cluster.Cluster
	nodes []*cluster.Node
}

// TestCluster runs its steps in order on one cluster; -run TestCluster/Name takes some of them.
func TestCluster(t *testing.T) {
	s := suite{Cluster: cluster.Start(t, programs(t))}
	s.bringUp(t)
	s.step(t, "ContainerHasTwoCapabilitiesAndNoWritableRoot", s.containerIsTight)
	s.step(t, "AnnotationsAreTheWireContract", s.annotationsAreTheContract)
	s.step(t, "EveryPodPingsEveryOther", s.podsPing)
	s.step(t, "EveryPodIsSeenByItsOwnAddress", s.podsAreSeen)
	s.step(t, "UnderlayCarriesVXLAN", s.underlayCarriesVXLAN)
	s.step(t, "HundredMegabytesArriveUnchanged", s.transfer)
	s.step(t, "PacketOfMTUPassesAndOneByteMoreDoesNot", s.mtu)
	s.step(t, "StatusIsHealthy", s.statusIsHealthy)
	s.step(t, "NodeJoinsAndLeaves", s.nodeJoinsAndLeaves)
	s.step(t, "DaemonIsKilledUnderTraffic", s.daemonIsKilled)
	s.step(t, "DaemonIsUpdatedUnderTraffic", s.daemonIsUpdated)
	s.step(t, "AnnotationsAreChangedByHand", s.annotationsAreChanged)
	s.step(t, "NodeIsReachedByAnotherAddress", s.hostOverride)
	s.step(t, "NodesChangeTheirVNIOneByOne", s.nodesChangeVNI)
	s.step(t, "APIServerGoesAway", s.apiServerGoesAway)
	s.step(t, "DaemonStartsWhileAPIServerIsAway", s.daemonStartsAlone)
	s.step(t, "GarbageInAnnotations", s.garbageInAnnotations)
	s.step(t, "PodCIDROutsideTheNetwork", s.podCIDROutside)
	s.step(t, "TwoNodesWithOneSubnet", s.oneSubnetTwice)
	s.step(t, "TwoNodesWithOneMAC", s.oneMACTwice)
	s.step(t, "NodeWithoutPodCIDRs", s.noPodCIDRs)
	s.step(t, "TwoDaemonsOnOneNode", s.twoDaemons)
	s.step(t, "PodsLeaveNothing", s.podsLeaveNothing)
}

func (s *suite) step(t *testing.T, name string, f func(*testing.T)) { step(t, s, name, f) }

// Dump prints what a person would look at.
func (s *suite) Dump(t testing.TB) {
	for _, n := range s.Nodes {
		n.Dump(t)
	}
}

// bringUp makes the nodes and the pods, and ends the test unless everything is there.
func (s *suite) bringUp(t *testing.T) {
	t.Helper()
	defer explain(t, s)
	for i := 1; i <= 3; i++ {
		s.nodes = append(s.nodes, s.AddNode(t, fmt.Sprintf("n%d", i), podCIDRs(i)...))
	}
	for _, n := range s.nodes {
		n.StartDaemon(t)
	}
	s.Progress("daemons are started")
	s.awaitPeers(t)
	s.Progress("nodes are ready")
	for i, n := range s.nodes {
		for _, name := range []string{"pod1", "pod2"} {
			attached(t, n.AddPod(t, name), i+1)
		}
	}
	if t.Failed() {
		t.FailNow()
	}
	s.Progress("pods are attached")
}

// attached checks what ADD answered for a pod on the node with that number.
func attached(t *testing.T, p *cluster.Pod, number int) {
	t.Helper()
	if len(p.Addrs) != 2 {
		t.Errorf("%s has addresses %v, want one a family", p, p.Addrs)
	}
	for _, cidr := range podCIDRs(number) {
		if !slices.ContainsFunc(p.Addrs, netip.MustParsePrefix(cidr).Contains) {
			t.Errorf("%s has addresses %v, none of %s", p, p.Addrs, cidr)
		}
	}
	if err := p.Check(t.Context()); err != nil {
		t.Errorf("CHECK of %s: %v", p, err)
	}
}

// podCIDRs are those of the node with that number.
func podCIDRs(number int) []string {
	return []string{fmt.Sprintf("10.244.%d.0/24", number), fmt.Sprintf("fd00:10:244:%d::/64", number)}
}

func (s *suite) containerIsTight(t *testing.T) {
	for _, c := range []struct {
		script, want string
		status       int
	}{
		{"grep -E '^Cap(Inh|Prm|Eff|Bnd|Amb)' /proc/self/status | tr -s '\t\n' ' '",
			"CapInh: 0000000000000000 CapPrm: 0000000000003000 CapEff: 0000000000003000 " +
				"CapBnd: 0000000000003000 CapAmb: 0000000000000000 ", 0},
		{"id -u", "0\n", 0},
		{"touch /x", "", 1},
		{"touch /etc/tweed/x", "", 1},
		{"echo 1 >/proc/sys/net/ipv4/ip_forward", "", 2},
		{"mount -t tmpfs x /run", "", 32},
		{"echo 9 >/host/proc/sys/net/ipv4/conf/lo/tag && cat /proc/sys/net/ipv4/conf/lo/tag", "9\n", 0},
		{"touch /run/tweed/x && rm /run/tweed/x", "", 0},
		{"ip link add x type bridge && ip link del x", "", 0},
		{"echo /proc/[0-9]*", "/proc/1\n", 0},
		{"ls -d /sys/class/net/[el]*", "/sys/class/net/eth0\n/sys/class/net/lo\n", 0},
	} {
		r := s.nodes[0].InContainer(t, "/bin/sh", "-c", c.script)
		if r.Status != c.status || r.Stdout != c.want {
			t.Errorf("%s: status %d, output %q; want %d, %q\n%s", c.script, r.Status, r.Stdout, c.status, c.want, r.Stderr)
		}
	}
}

// awaitPeers waits until every node has every other with a daemon as a peer, in both families.
func (s *suite) awaitPeers(t *testing.T) {
	t.Helper()
	for _, n := range s.Nodes {
		n.AwaitReady(t)
		awaitPeerCount(t, n, 2*(len(s.Nodes)-1))
	}
}

// pods are those of all nodes.
func (s *suite) pods() (all []*cluster.Pod) {
	for _, n := range s.Nodes {
		all = append(all, n.Pods...)
	}
	return all
}

// pairs calls f for each two pods, both ways, and each address of the second.
func (s *suite) pairs(t *testing.T, f func(from *cluster.Pod, to netip.Addr) error) {
	t.Helper()
	count, slowest, path := 0, time.Duration(0), ""
	for _, from := range s.pods() {
		for _, to := range s.pods() {
			if from == to {
				continue
			}
			for _, addr := range to.Addrs {
				count++
				begun := time.Now()
				err := f(from, addr)
				if took := time.Since(begun); took > slowest {
					slowest, path = took, fmt.Sprintf("%s to %s at %s", from, to, addr)
				}
				if err != nil {
					t.Errorf("%s to %s at %s: %v", from, to, addr, err)
				}
			}
		}
	}
	s.Progress("  %d paths, the slowest from %s in %v", count, path, slowest.Round(time.Millisecond))
	if want := 6 * 5 * 2; count < want {
		t.Errorf("%d paths were tried, want at least %d", count, want)
	}
}

// sameFamily is the one of addrs that has the family of a.
func sameFamily(addrs []netip.Addr, a netip.Addr) netip.Addr {
	i := slices.IndexFunc(addrs, func(b netip.Addr) bool { return a.Is4() == b.Is4() })
	if i < 0 {
		return netip.Addr{}
	}
	return addrs[i]
}

func (s *suite) statusIsHealthy(t *testing.T) {
	for _, format := range [][]string{nil, {"-o", "wide"}, {"-o", "json"}, {"-o", "yaml"}} {
		r := s.nodes[0].SubnetStatus(t, format...)
		if r.Status != 0 {
			t.Errorf("subnet status %v: status %d\n%s%s", format, r.Status, r.Stdout, r.Stderr)
		}
		for i, n := range s.nodes {
			for _, want := range append(podCIDRs(i+1), n.Name, n.Addrs[0].String()) {
				if !strings.Contains(r.Stdout, want) {
					t.Errorf("subnet status %v lacks %s:\n%s", format, want, r.Stdout)
				}
			}
		}
	}
}

func (s *suite) podsLeaveNothing(t *testing.T) {
	for _, n := range s.nodes {
		for _, p := range slices.Clone(n.Pods) {
			if err := p.Remove(t.Context()); err != nil {
				t.Errorf("DEL of %s: %v", p, err)
			}
		}
		if out := n.NetNS.Run(t, "ip -o link show type veth"); strings.Count(out, "\n") != 1 {
			t.Errorf("beside eth0, %s still has\n%s", n.Name, out)
		}
	}
}

// contains says which words text lacks.
func contains(text string, words ...string) (err error) {
	for _, w := range words {
		if !strings.Contains(text, w) {
			err = errors.Join(err, fmt.Errorf("%q is missing", w))
		}
	}
	return err
}
