package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"tweed.dev/tweed/e2e/cluster"
	"tweed.dev/tweed/e2e/probe"
)

// What a user may build on: the defaults of the configuration, and what VXLAN costs over IPv4.
const (
	vxlanPort   = 8472
	vni         = 1
	underlayMTU = 1500
	podMTU      = underlayMTU - 50
)

func (s *suite) podsPing(t *testing.T) {
	s.pairs(t, func(from *cluster.Pod, to netip.Addr) error { return probe.Ping(from.NetNS, to) })
}

func (s *suite) podsAreSeen(t *testing.T) {
	s.pairs(t, func(from *cluster.Pod, to netip.Addr) error {
		seen, err := probe.WhoAmI(from.NetNS, to)
		if err == nil && seen != sameFamily(from.Addrs, to) {
			err = fmt.Errorf("it is seen as %s", seen)
		}
		return err
	})
}

func (s *suite) underlayCarriesVXLAN(t *testing.T) {
	from, to := s.nodes[0].Pods[0], s.nodes[1].Pods[0]
	capture, err := probe.StartCapture(s.Switch(), s.nodes[0].Name)
	if err != nil {
		t.Fatal(err)
	}
	for _, addr := range to.Addrs {
		if err := probe.Ping(from.NetNS, addr); err != nil {
			t.Error(err)
		}
	}
	packets, err := capture.Stop()
	if err != nil {
		t.Fatal(err)
	}
	for _, addr := range to.Addrs {
		own := sameFamily(from.Addrs, addr)
		for _, way := range []struct{ from, to, outerFrom, outerTo netip.Addr }{
			{own, addr, s.nodes[0].Addrs[0], s.nodes[1].Addrs[0]},
			{addr, own, s.nodes[1].Addrs[0], s.nodes[0].Addrs[0]},
		} {
			i := slices.IndexFunc(packets, func(p probe.Tunneled) bool { return p.InnerFrom == way.from && p.InnerTo == way.to })
			if i < 0 {
				t.Errorf("no VXLAN packet from %s to %s among %+v", way.from, way.to, packets)
				continue
			}
			p := packets[i]
			if p.VNI != vni || p.Port != vxlanPort || p.From != way.outerFrom || p.To != way.outerTo {
				t.Errorf("from %s to %s the underlay carries %+v, want VNI %d, port %d, from %s to %s",
					way.from, way.to, p, vni, vxlanPort, way.outerFrom, way.outerTo)
			}
		}
	}
}

func (s *suite) transfer(t *testing.T) {
	for _, addr := range s.nodes[1].Pods[0].Addrs {
		begun := time.Now()
		const size = 100e6
		if err := probe.Transfer(s.nodes[0].Pods[0].NetNS, addr, size); err != nil {
			t.Errorf("to %s: %v", addr, err)
		}
		s.Progress("  100 MB to %s, checksums included: %.0f MB/s", addr, size/1e6/time.Since(begun).Seconds())
	}
}

func (s *suite) mtu(t *testing.T) {
	from, to := s.nodes[0].Pods[0], s.nodes[1].Pods[0]
	for _, addr := range to.Addrs {
		capture, err := probe.StartCapture(s.Switch(), s.nodes[0].Name)
		if err != nil {
			t.Fatal(err)
		}
		if err := probe.Unfragmented(from.NetNS, addr, podMTU); err != nil {
			t.Errorf("%d bytes to %s: %v", podMTU, addr, err)
		}
		packets, err := capture.Stop()
		if err != nil {
			t.Fatal(err)
		}
		full := func(p probe.Tunneled) bool { return p.Length == underlayMTU && !p.Fragment }
		if !slices.ContainsFunc(packets, full) {
			t.Errorf("no packet of %d bytes in one piece on the underlay: %+v", underlayMTU, packets)
		}
		var timeout interface{ Timeout() bool }
		err = probe.Unfragmented(from.NetNS, addr, podMTU+1)
		if !errors.Is(err, syscall.EMSGSIZE) && !(errors.As(err, &timeout) && timeout.Timeout()) {
			t.Errorf("%d bytes to %s: %v, want them too large", podMTU+1, addr, err)
		}
	}
}

func (s *suite) annotationsAreTheContract(t *testing.T) {
	for _, n := range s.nodes {
		if err := s.published(t, n); err != nil {
			t.Error(err)
		}
	}
}

// published says how a Node's annotations differ from what its daemon has to write there.
func (s *suite) published(t *testing.T, n *cluster.Node) error {
	t.Helper()
	want := map[string]string{
		"tweed.dev/subnets":      strings.Join(n.PodCIDRs, ","),
		"tweed.dev/host":         fmt.Sprintf("%s,%s", n.Addrs[0], n.Addrs[1]),
		"tweed.dev/backend":      "vxlan",
		"tweed.dev/backend-data": fmt.Sprintf(`{"vni":%d,"port":%d,"mac":%q,"inside":[4,6]}`, vni, vxlanPort, vtepMAC(t, n)),
		"tweed.dev/network":      "10.244.0.0/16,fd00:10:244::/48",
	}
	have := s.Annotations(t, n.Name)
	maps.DeleteFunc(have, func(key, _ string) bool { return !strings.HasPrefix(key, "tweed.dev/") })
	if !maps.Equal(have, want) {
		return fmt.Errorf("Node %s has annotations\n%v, want\n%v", n.Name, have, want)
	}
	return nil
}

// vtepMAC is the address of a node's VXLAN device.
func vtepMAC(t *testing.T, n *cluster.Node) string {
	t.Helper()
	var links []struct{ Address string }
	out := n.NetNS.Run(t, "ip -j link show dev tweed.1")
	if err := json.Unmarshal([]byte(out), &links); err != nil || len(links) != 1 {
		t.Fatalf("%s: ip -j link show dev tweed.1: %v\n%s", n.Name, err, out)
	}
	return links[0].Address
}
