package kube_test

import (
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tweed.dev/tweed/subnet"
	"tweed.dev/tweed/subnet/kube"
)

// fourSubnets is a network of four, so that it is soon used up.
func fourSubnets(t *testing.T) subnet.Network {
	t.Helper()
	return networkOf(t, "10.244.0.0/22")
}

func networkOf(t *testing.T, prefixes ...string) subnet.Network {
	t.Helper()
	var ranges []subnet.Range
	for _, p := range prefixes {
		ranges = append(ranges, subnet.Range{Prefix: netip.MustParsePrefix(p)})
	}
	n, err := subnet.NewNetwork(ranges...)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// startLeaser is for a node that leases its subnet.
func startLeaser(t *testing.T, a *apiServer, change ...func(*kube.Options)) *daemon {
	t.Helper()
	o := kube.Options{Node: "n1", Origin: subnet.OriginLease, Network: fourSubnets(t)}
	for _, c := range change {
		c(&o)
	}
	return start(t, a, o)
}

// bare registers a Node of which nothing is known but its age.
func bare(a *apiServer, name string, age time.Duration) {
	a.put(name, func(n *corev1.Node) { n.CreationTimestamp = metav1.NewTime(time.Now().Add(-age)) })
}

func (d *daemon) awaitLease(a *apiServer) netip.Prefix {
	d.t.Helper()
	self := d.awaitSelf("")
	if len(self.Subnets) != 1 || !self.Leased {
		d.t.Fatalf("self: %+v", self)
	}
	if got := a.annotations(self.Name); got[kube.Subnets] != self.Subnets[0].String() || got[kube.Claim] != "" {
		d.t.Fatalf("annotations: %v; self: %v", got, self.Subnets)
	}
	return self.Subnets[0]
}

func TestLeaseIsClaimedThenTaken(t *testing.T) {
	servers(t, func(t *testing.T, a *apiServer) {
		bare(a, "n1", 0)
		d := startLeaser(t, a)
		leased := d.awaitLease(a)
		p := a.patched()
		if len(p) != 2 || !strings.Contains(p[0], kube.Claim) || strings.Contains(p[0], kube.Subnets) ||
			!strings.Contains(p[1], fmt.Sprintf("%q:%q", kube.Subnets, leased)) {
			t.Errorf("writes: %q", p)
		}
		d.await("the lease in the log", func() bool {
			return strings.Contains(d.log.String(), `msg="subnet leased" node=n1 subnets=`+leased.String()+" claims=1")
		})
		d.stop()
		d = startLeaser(t, a)
		if again := d.awaitLease(a); again != leased || len(a.patched()) != 2 || d.log.String() != "" {
			t.Errorf("after a restart: %v, before %v; writes %q; log %s", again, leased, a.patched(), d.log)
		}
	})
}

func TestClaimOfAnEarlierStartIsRemovedFirst(t *testing.T) {
	a := newAPIServer(t)
	bare(a, "n1", 0)
	set(a, "n1", map[string]string{kube.Claim: "10.244.0.0/24 other"})
	startLeaser(t, a).awaitLease(a)
	if p := a.patched(); len(p) != 3 || !strings.Contains(p[0], fmt.Sprintf("%q:null", kube.Claim)) {
		t.Errorf("writes: %q", p)
	}
}

// TestLastSubnetGoes has all subnets but one taken, and that one claimed by a node that never finishes.
func TestLastSubnetGoes(t *testing.T) {
	a := newAPIServer(t)
	bare(a, "n1", 0)
	for i, by := range []string{kube.Subnets, kube.Subnets, kube.Subnets, kube.Claim} {
		name := fmt.Sprintf("old%d", i)
		bare(a, name, time.Hour)
		text := fmt.Sprintf("10.244.%d.0/24", i)
		if by == kube.Claim {
			text += " x"
		}
		set(a, name, map[string]string{by: text})
	}
	d := startLeaser(t, a)
	d.awaitSelf("no subnet is free for node n1: all 4 of length /24 in 10.244.0.0/22 are taken, 3 by leases " +
		"(the oldest: 10.244.0.0/24 by old0")
	d.awaitSelf("1 by claims of nodes that have not finished leasing (the oldest: 10.244.3.0/24 by old3")
	if p := a.patched(); len(p) != 0 {
		t.Errorf("writes: %q", p)
	}
	gone := time.Now()
	a.remove("old3")
	if leased := d.awaitLease(a); leased.String() != "10.244.3.0/24" {
		t.Errorf("leased %v", leased)
	}
	if took := time.Since(gone); took > 25*time.Second {
		t.Errorf("a lease %v after a Node went", took)
	}
}

func TestNodeIsRecreatedWhileItsPodsRun(t *testing.T) {
	for name, c := range map[string]struct {
		taken string
		same  bool
	}{
		"subnet is still free":    {"10.244.0.0/24", true},
		"another node has it now": {"10.244.2.0/24", false},
	} {
		t.Run(name, func(t *testing.T) {
			a := newAPIServer(t)
			bare(a, "n1", 0)
			bare(a, "n2", 0)
			remembered := netip.MustParsePrefix("10.244.2.0/24")
			d := startLeaser(t, a, func(o *kube.Options) { o.Remembered = []netip.Prefix{remembered} })
			if got := d.awaitLease(a); got != remembered {
				t.Fatalf("leased %v", got)
			}
			a.remove("n1")
			d.awaitSelf("node n1 does not exist")
			set(a, "n2", map[string]string{kube.Subnets: c.taken})
			bare(a, "n1", 0)
			if got := d.awaitLease(a); (got == remembered) != c.same {
				t.Errorf("leased %v", got)
			}
			d.await("two leases in the log", func() bool { return strings.Count(d.log.String(), "subnet leased") == 2 })
			if said := strings.Contains(d.log.String(), "another subnet than before"); said == c.same {
				t.Errorf("log: %s", d.log)
			}
		})
	}
}

func TestAutoDecidesByCluster(t *testing.T) {
	auto := func(o *kube.Options) { o.Origin = subnet.OriginAuto }
	t.Run("NoNodeHasPodCIDRs", func(t *testing.T) {
		a := newAPIServer(t)
		bare(a, "n0", time.Hour)
		bare(a, "n1", 0)
		startLeaser(t, a, auto).awaitLease(a)
	})
	t.Run("AllNodesAreYoung", func(t *testing.T) {
		a := newAPIServer(t)
		bare(a, "n1", 57*time.Second)
		d := startLeaser(t, a, auto)
		d.awaitSelf("unless any Node has some when the oldest is a minute old")
		if n := len(a.patched()); n != 0 {
			t.Errorf("%d writes", n)
		}
		d.awaitLease(a)
		if n := a.node("n1"); time.Since(n.CreationTimestamp.Time) < time.Minute {
			t.Errorf("leased at the age of %v", time.Since(n.CreationTimestamp.Time))
		}
	})
	t.Run("AnotherNodeHasPodCIDRs", func(t *testing.T) {
		a := newAPIServer(t)
		bare(a, "n0", time.Hour)
		a.put("n0", func(n *corev1.Node) { n.Spec.PodCIDRs = []string{"10.244.0.0/24"} })
		bare(a, "n1", time.Hour)
		d := startLeaser(t, a, auto)
		d.awaitSelf("waiting for kube-controller-manager to fill it, which it does when it runs with " +
			"--allocate-node-cidrs=true and --cluster-cidr (node n0 has some)")
		a.put("n1", func(n *corev1.Node) { n.Spec.PodCIDRs = []string{"10.244.1.0/24"} })
		if self := d.awaitSelf(""); self.Leased || self.Subnets[0].String() != "10.244.1.0/24" {
			t.Errorf("self: %+v", self)
		}
		if n := len(a.patched()); n != 0 {
			t.Errorf("%d writes", n)
		}
	})
	t.Run("PodCIDRsAppearLater", func(t *testing.T) {
		a := newAPIServer(t)
		bare(a, "n1", time.Hour)
		d := startLeaser(t, a, auto)
		leased := d.awaitLease(a)
		a.put("n1", func(n *corev1.Node) { n.Spec.PodCIDRs = []string{"10.244.200.0/24"} })
		d.await("a problem", func() bool {
			self, err := d.Self()
			return err == nil && len(self.Problems) == 1 && self.Subnets[0] == leased && strings.Contains(
				self.Problems[0].Text, "spec.podCIDRs of node n1 is 10.244.200.0/24, and the subnet that it has leased is "+leased.String())
		})
	})
}

func TestLeasingIsRefused(t *testing.T) {
	a := newAPIServer(t, func(a *apiServer) { a.refuse["patch"] = http.StatusForbidden })
	bare(a, "n1", 0)
	d := startLeaser(t, a)
	d.awaitSelf(`the verb "patch" on the resource "nodes"`)
	a.with(func() { delete(a.refuse, "patch") })
	d.awaitLease(a)
}

func TestNewerVersionIsReadBeforeTheNextTry(t *testing.T) {
	a := newAPIServer(t)
	bare(a, "n1", 0)
	a.with(func() { a.stale = 2 })
	startLeaser(t, a).awaitLease(a)
}

// TestPublishNeverLeases publishes what the Node does not record: only the protocol may record it.
func TestPublishNeverLeases(t *testing.T) {
	a := newAPIServer(t)
	bare(a, "n3", 0)
	d := startLeaser(t, a, func(o *kube.Options) { o.Node = "n3" })
	leased := d.awaitLease(a)
	lease := mine("192.0.2.3")
	other := netip.MustParsePrefix("10.244.1.0/24")
	if leased == other {
		other = netip.MustParsePrefix("10.244.2.0/24")
	}
	lease[0].Subnet = other
	if err := d.Publish(t.Context(), lease); err == nil || !strings.Contains(err.Error(), "any more") {
		t.Errorf("published another subnet: %v", err)
	}
	lease[0].Subnet = leased
	if err := d.Publish(t.Context(), lease); err != nil {
		t.Errorf("own lease: %v", err)
	}
	if got := a.annotations("n3"); got[kube.Subnets] != leased.String() || got[kube.Host] != "192.0.2.3" {
		t.Errorf("annotations: %v", got)
	}
	a.with(func() { a.muted = true }) // the daemon does not know that its Node is another one
	a.remove("n3")
	bare(a, "n3", 0)
	lease[0].Host = netip.MustParseAddr("192.0.2.4")
	if err := d.Publish(t.Context(), lease); err == nil || a.annotations("n3")[kube.Subnets] != "" {
		t.Errorf("published to a Node that has leased nothing: %v; %v", err, a.annotations("n3"))
	}
}

func TestNetworkGrowsByAFamily(t *testing.T) {
	a := newAPIServer(t)
	bare(a, "n1", 0)
	d := startLeaser(t, a)
	leased := d.awaitLease(a)
	d.Grow(networkOf(t, "10.244.0.0/22", "fd00:10:244::/48"))
	d.await("a subnet of the new family", func() bool {
		self, err := d.Self()
		return err == nil && len(self.Subnets) == 2 && self.Subnets[0] == leased
	})
}

func TestNodeThatLeasesNothingHasNoClaim(t *testing.T) {
	a := newAPIServer(t)
	populate(a)
	set(a, "n1", map[string]string{kube.Claim: "10.244.0.0/24 old"})
	d := startDaemon(t, a, "n1")
	d.await("no claim", func() bool { return a.annotations("n1")[kube.Claim] == "" })
	if n := len(a.patched()); n != 1 {
		t.Errorf("%d writes", n)
	}
}

func TestOnlyALook(t *testing.T) {
	a := newAPIServer(t)
	bare(a, "n1", 0)
	d := startLeaser(t, a, func(o *kube.Options) { o.ReadOnly = true })
	d.awaitSelf("node n1 has no subnet yet")
	set(a, "n1", map[string]string{kube.Subnets: "10.244.1.0/24"})
	d.awaitLease(a)
	if n := len(a.patched()); n != 0 {
		t.Errorf("%d writes", n)
	}
}

func TestRecordOfALeaseIsSpoilt(t *testing.T) {
	a := newAPIServer(t)
	bare(a, "n1", 0)
	d := startLeaser(t, a)
	leased := d.awaitLease(a)
	set(a, "n1", map[string]string{kube.Subnets: "junk"})
	d.awaitSelf(`annotation tweed.dev/subnets of node n1: "junk" is not a subnet`)
	a.put("n1", func(n *corev1.Node) { delete(n.Annotations, kube.Subnets) })
	if again := d.awaitLease(a); again != leased {
		t.Errorf("leased %v, before %v", again, leased)
	}
}

func TestHostOverrideThatCannotBeRead(t *testing.T) {
	a := newAPIServer(t)
	populate(a)
	d := startDaemon(t, a, "n1")
	d.awaitSelf("")
	override := func(text, want string, problems int) {
		t.Helper()
		set(a, "n1", map[string]string{kube.HostOverride: text})
		d.await(text, func() bool {
			self, err := d.Self()
			return err == nil && self.HostOverride.String() == want && len(self.Problems) == problems &&
				!slices.ContainsFunc(self.Problems, func(p subnet.Problem) bool { return !strings.Contains(p.Text, text) })
		})
	}
	override("nonsense", "invalid IP", 1)
	override("203.0.113.7", "203.0.113.7", 0)
	override("127.0.0.1", "203.0.113.7", 1)
	override("203.0.113.8", "203.0.113.8", 0)
}
