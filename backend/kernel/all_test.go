package kernel

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"testing"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/subnet"
)

func (h *realHost) ObserveAll(ctx context.Context) (have backend.State, err error) {
	h.ns.Do(h.t, func() { have, err = h.Kernel.ObserveAll(ctx) })
	return have, err
}

func (h *realHost) ObserveAllFilters(ctx context.Context) (have masq.Ruleset, err error) {
	h.ns.Do(h.t, func() { have, err = h.Kernel.ObserveAllFilters(ctx) })
	return have, err
}

// askAll has all that is ours found by who does not know what to look for, and taken away in the order of Diff.
func askAll(t *testing.T, h host) {
	want := sample()
	plain, near := segment(t, h).Route(subnet.Lease{Node: "node-8", Subnet: netip.MustParsePrefix("10.244.8.0/24"),
		NodeAddrs: []netip.Addr{netip.MustParseAddr("192.0.2.18")}})
	if !near {
		t.Fatal("192.0.2.18 is not near")
	}
	put(want, plain)
	pass(t, h, want)
	filters := inAllForms(t)
	h.dropForwarded()
	leaveAll(t, h, filters)
	have, err := h.ObserveAll(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want.Sysctls = nil
	if have.Len() != want.Len() || !reflect.DeepEqual(have.Links, want.Links) {
		t.Errorf("found\n%+v\nof\n%+v", have, want)
	}
	rules, err := h.ObserveAllFilters(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// Of the guests no more than those in FORWARD are due.
	if rules.Len() != filters.Len() || len(rules.Tables) != 2 || len(rules.Guests) != 4 {
		t.Errorf("found\n%+v\nof\n%+v", rules, filters)
	}
	takeAllAway(t, h)
}

// inAllForms is what there is of ours where the form changed and nobody tidied up: in nftables, in the iptables in use,
// and in the older one.
func inAllForms(t *testing.T) masq.Ruleset {
	t.Helper()
	all, older := dualStack(t, masq.NFTables).Desired(), dualStackFilter(t)
	maps.Copy(all.Chains, older.Chains)
	maps.Copy(all.Jumps, older.Jumps)
	for c, rules := range older.Chains {
		c.Variant = masq.Legacy
		all.Chains[c] = rules
	}
	for j := range older.Jumps {
		j.Chain.Variant = masq.Legacy
		all.Jumps[j] = true
	}
	return all
}

func leaveAll(t *testing.T, h host, want masq.Ruleset) {
	t.Helper()
	for _, op := range filterOps(t, h, want) {
		if err := h.Apply(t.Context(), op); err != nil {
			t.Errorf("%s: %v", op, err)
		}
	}
}

func takeAllAway(t *testing.T, h host) {
	t.Helper()
	for _, op := range removals(t, h) {
		if err := h.Apply(t.Context(), op); err != nil {
			t.Errorf("%s: %v", op, err)
		}
	}
	for _, op := range removals(t, h) {
		t.Errorf("still to do: %s", op)
	}
}

func removals(t *testing.T, h host) []backend.Op {
	t.Helper()
	have, err := h.ObserveAll(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	rules, err := h.ObserveAllFilters(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ops, _ := backend.Diff(backend.State{}, backend.Observed{State: have})
	return append(ops, masq.Diff(masq.Ruleset{}, rules)...)
}

func TestLeftoversOfAnotherConfigurationAreOverlooked(t *testing.T) {
	h := newRealHost(t)
	for _, c := range []string{
		"ip link add tweed.7 group 116 type vxlan id 7 dstport 4789 local 192.0.2.11",
		"ip link add tweedab group 116 type veth peer name pod",
		"ip link add theirs type veth peer name other", "ip link set theirs up",
		"ip route add 10.9.0.0/24 via 192.0.2.1 proto 116", "ip route add 10.9.1.0/24 via 192.0.2.1 table 77 proto 116",
		"ip route add 10.9.0.0/24 via 192.0.2.1 metric 5",
		"ip route add unreachable 10.9.2.0/24 proto 116", "ip route add fd00:9::/64 via 2001:db8::1 proto 116",
		"ip -6 route add fd00:9:1::/64 proto 116 nexthop via 2001:db8::1 nexthop via 2001:db8::2",
	} {
		h.ns.Run(t, c)
	}
	takeAllAway(t, h)
	h.ns.Run(t, "ip link show theirs")
	if left := h.ns.Run(t, "ip link show group 116") + h.ns.Run(t, "ip route show table all proto 116") +
		h.ns.Run(t, "ip -6 route show table all proto 116"); left != "" {
		t.Errorf("left:\n%s", left)
	}
	if routes := h.ns.Run(t, "ip route"); !strings.Contains(routes, "10.9.0.0/24 via 192.0.2.1 dev eth0 metric 5") {
		t.Errorf("a stranger's route is gone:\n%s", routes)
	}
}

// A kubelet that changed from one iptables to the other has left our chains in the one that nobody looks into any more.
// All of the new ones stand before any of the old go.
func TestKubeletChangesItsIptables(t *testing.T) {
	for from, to := range map[string]string{"nft": "legacy", "legacy": "nft"} {
		t.Run(from+" to "+to, func(t *testing.T) {
			h := newRealHost(t)
			inFamilies := func(rest string) {
				h.ns.Run(t, "iptables-"+rest)
				h.ns.Run(t, "ip6tables-"+rest)
			}
			inFamilies(from + " -t mangle -N KUBE-IPTABLES-HINT")
			filterPass(t, h, dualStackFilter(t))
			inFamilies(from + " -t mangle -X KUBE-IPTABLES-HINT")
			inFamilies(to + " -t mangle -N KUBE-IPTABLES-HINT")
			forget(h)
			removing := false
			for _, op := range filterOps(t, h, dualStackFilter(t)) {
				isOld := strings.Contains(op.String(), "tables-"+from)
				if isOld != (op.Do == backend.Delete) || removing && !isOld {
					t.Errorf("%s comes too early, or is for the other", op)
				}
				removing = removing || isOld
			}
			filterPass(t, h, dualStackFilter(t))
			for _, program := range []string{"iptables-", "ip6tables-"} {
				if saved := h.ns.Run(t, program+from+"-save"); strings.Contains(saved, "TWEED") {
					t.Errorf("%s%s-save:\n%s", program, from, saved)
				}
				if saved := h.ns.Run(t, program+to+"-save"); !strings.Contains(saved, "TWEED") {
					t.Errorf("nothing of ours in %s%s-save:\n%s", program, to, saved)
				}
			}
		})
	}
}

// forget has the older iptables looked at although it was a moment ago.
func forget(h *realHost) {
	for _, s := range h.filters[masq.Legacy].sides {
		s.looked = false
	}
}

// A guest that packets do not get to does nothing, and is ours all the same; what the operator wrote, and what others
// did, is not.
func TestGuestBehindADropIsOverlooked(t *testing.T) {
	h := newRealHost(t)
	h.dropForwarded()
	shell(t, h.ns, `
		iptables -N DOCKER-USER; iptables -A FORWARD -j DOCKER-USER; iptables -A DOCKER-USER -j DROP
		iptables -A FORWARD -s 10.244.0.0/16 -m comment --comment theirs -j ACCEPT
		ip6tables -t nat -A POSTROUTING -j MASQUERADE
		nft add table inet fw; nft add chain inet fw forward '{ type filter hook forward priority 0 ; policy drop ; }'
		nft add rule inet fw forward ip saddr 10.244.0.0/16 accept comment tweed`)
	before := h.ns.Run(t, "nft -s list ruleset")
	filterPass(t, h, nftFilter(t))
	h.ns.Run(t, "iptables -I FORWARD 1 -j ACCEPT")
	h.ns.Run(t, "iptables -I DOCKER-USER 1 -j ACCEPT")
	h.ns.Run(t, "ip6tables -t nat -I POSTROUTING 1 -j ACCEPT")
	takeAllAway(t, h)
	h.ns.Run(t, "iptables -D FORWARD 1")
	h.ns.Run(t, "iptables -D DOCKER-USER 1")
	h.ns.Run(t, "ip6tables -t nat -D POSTROUTING 1")
	if now := h.ns.Run(t, "nft -s list ruleset"); now != before {
		t.Errorf("left:\n%s\nof\n%s", now, before)
	}
}

// A node whose packet filter is nftables needs no iptables, and no more does who tidies up there.
func TestHostWithoutIptablesCannotBeTidied(t *testing.T) {
	h := newRealHost(t)
	filterPass(t, h, nftFilter(t))
	path := os.Getenv("PATH")
	t.Setenv("PATH", t.TempDir())
	takeAllAway(t, h)
	t.Setenv("PATH", path)
	if left := h.ns.Run(t, "nft list ruleset"); left != "" {
		t.Errorf("left:\n%s", left)
	}

	filterPass(t, h, dualStackFilter(t))
	t.Setenv("PATH", t.TempDir())
	h.open()
	if _, err := h.ObserveAllFilters(t.Context()); !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("chains that nobody could take away: %v", err)
	}
}

func TestLookingForLeftoversMakesTables(t *testing.T) {
	h := newRealHost(t)
	takeAllAway(t, h)
	for _, c := range []string{
		"cat /proc/thread-self/net/ip_tables_names", "cat /proc/thread-self/net/ip6_tables_names", "nft list ruleset",
	} {
		if out := h.ns.Run(t, c); out != "" {
			t.Errorf("%s:\n%s", c, out)
		}
	}
}
