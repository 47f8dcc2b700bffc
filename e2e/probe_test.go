package e2e

import (
	"errors"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"tweed.dev/tweed/e2e/cluster"
	"tweed.dev/tweed/e2e/probe"
)

// twoPlaces are namespaces joined by VXLAN devices made by hand: 10.1.0.1 and fd00:1::1 are in the first, farEnds in the
// second.
func twoPlaces(t *testing.T) (a, b cluster.NetNS) {
	t.Helper()
	a, b = cluster.NewNetNS(t, "/run/netns/a"), cluster.NewNetNS(t, "/run/netns/b")
	t.Cleanup(func() {
		for _, ns := range []cluster.NetNS{a, b} {
			if err := ns.Remove(); err != nil {
				t.Error(err)
			}
		}
	})
	a.Run(t, "ip link add eth0 up type veth peer name eth0 netns b")
	b.Run(t, "ip link set eth0 up")
	for i, ns := range []cluster.NetNS{a, b} {
		self, other := string("12"[i]), string("21"[i])
		ns.Run(t, "ip addr add 192.0.2."+self+"/24 dev eth0")
		ns.Run(t, "ip link add vx up mtu 1450 type vxlan id 1 dstport 8472 remote 192.0.2."+other+" dev eth0")
		ns.Run(t, "ip addr add 10.1.0."+self+"/24 dev vx")
		ns.Run(t, "ip addr add fd00:1::"+self+"/64 dev vx nodad")
	}
	servers, err := probe.Serve(b)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { servers.Close() })
	for _, to := range farEnds() {
		cluster.Await(t, "the way to "+to.String(), func() error { return probe.Ping(a, to) })
	}
	return a, b
}

func farEnds() [2]netip.Addr {
	return [2]netip.Addr{netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("fd00:1::2")}
}

// TestProbesNoticeWhatGoesWrong keeps the other tests honest: a probe that cannot fail proves nothing.
func TestProbesNoticeWhatGoesWrong(t *testing.T) {
	a, b := twoPlaces(t)
	t.Run("Nothing", func(t *testing.T) {
		capture, err := probe.StartCapture(a, "eth0")
		if err != nil {
			t.Fatal(err)
		}
		for _, to := range farEnds() {
			seen, err := probe.WhoAmI(a, to)
			err = errors.Join(err, probe.Ping(a, to), probe.Transfer(a, to, 1e6), probe.Unfragmented(a, to, 1450))
			if err != nil {
				t.Errorf("%s: %v", to, err)
			}
			if want := strings.TrimSuffix(to.String(), "2") + "1"; seen.String() != want {
				t.Errorf("seen as %s, want %s", seen, want)
			}
			if err := probe.Unfragmented(a, to, 1451); !errors.Is(err, syscall.EMSGSIZE) {
				t.Errorf("1451 bytes to %s: %v, want %v", to, err, syscall.EMSGSIZE)
			}
		}
		packets, err := capture.Stop()
		if err != nil {
			t.Fatal(err)
		}
		if len(packets) == 0 {
			t.Error("the capture saw no VXLAN")
		}
	})
	t.Run("SourceIsTranslated", func(t *testing.T) {
		a.Run(t, "ip addr add 10.1.0.9/24 dev vx")
		a.Run(t, "iptables -t nat -A POSTROUTING -d 10.1.0.2 -j SNAT --to-source 10.1.0.9")
		defer a.Run(t, "iptables -t nat -F")
		if seen, err := probe.WhoAmI(a, farEnds()[0]); err != nil || seen.String() != "10.1.0.9" {
			t.Errorf("seen as %s, %v; want 10.1.0.9", seen, err)
		}
	})
	t.Run("DatagramsAreLost", func(t *testing.T) {
		stream, err := probe.StartStream(a, b, farEnds()[0])
		if err != nil {
			t.Fatal(err)
		}
		b.Run(t, "iptables -A INPUT -p udp -m statistic --mode nth --every 50 --packet 0 -i vx -j DROP")
		defer b.Run(t, "iptables -F")
		cluster.Await(t, "a datagram to be dropped", func() error {
			if strings.Contains(b.Run(t, "iptables -L INPUT -v -x -n"), " 0        0 DROP") {
				return errors.New("none was")
			}
			return nil
		})
		if _, err := stream.Stop(); err == nil || !strings.Contains(err.Error(), "lost") {
			t.Errorf("a stream that lost datagrams says %v", err)
		}
	})
	t.Run("NobodyAnswers", func(t *testing.T) {
		b.Run(t, "ip link set vx down")
		begun := time.Now()
		if err := probe.Ping(a, farEnds()[0]); err == nil {
			t.Error("a ping over a link that is down is answered")
		}
		t.Logf("noticed after %v", time.Since(begun))
	})
}
