package overlay

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"tweed.dev/tweed/backend/bridge"
	"tweed.dev/tweed/subnet"
)

// drawConfig draws a net-conf.json of one family or both, with subnets of any length, bounds and reservations.
func drawConfig(t *rapid.T) string {
	conf := map[string]any{}
	var reserved []string
	families := rapid.IntRange(1, 3).Draw(t, "families")
	conf["EnableIPv4"], conf["EnableIPv6"] = families&1 != 0, families&2 != 0
	for i, f := range []familyDraft{{version: 4}, {version: 6}} {
		if families&(1<<i) == 0 {
			continue
		}
		bases := []string{"10.0.0.0/8", "10.244.0.0/16", "192.168.64.0/24", "10.0.0.0/28"}
		longest := subnet.MaxLen4
		if f.version == 6 {
			bases, longest = []string{"fc00::/7", "fd00:10:244::/48", "fd00::/64", "fd00::/124"}, subnet.MaxLen6
		}
		p := netip.MustParsePrefix(rapid.SampledFrom(bases).Draw(t, f.key("Network")))
		conf[f.key("Network")] = p.String()
		length := subnet.DefaultLen(p)
		if rapid.Bool().Draw(t, f.key("odd")) {
			length = min(p.Bits()+rapid.IntRange(0, 14).Draw(t, f.key("SubnetLen")), longest)
			conf[f.key("SubnetLen")] = length
		}
		r, err := subnet.NewRange(subnet.Range{Prefix: p, Len: length})
		if err != nil {
			t.Fatal(err)
		}
		some := nth(r, rapid.SliceOfN(rapid.IntRange(0, 40), 3, 3).Draw(t, "some"))
		if rapid.Bool().Draw(t, f.key("bounds")) {
			conf[f.key("SubnetMin")], conf[f.key("SubnetMax")] = some[0].Addr().String(), some[2].Addr().String()
		}
		if rapid.Bool().Draw(t, f.key("reserve")) {
			reserved = append(reserved, some[1].String())
		}
	}
	if len(reserved) > 0 {
		conf["Reserved"] = reserved
	}
	text, err := json.Marshal(conf)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// nth returns subnets of r by number, in order.
func nth(r subnet.Range, numbers []int) (out []netip.Prefix) {
	slices.Sort(numbers)
	size := int(min(r.Count(), 41))
	for _, n := range numbers {
		for s := range r.Free(uint64(n%size), nil) {
			out = append(out, s)
			break
		}
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return out
}

// Whatever net-conf.json says, nodes lease what it says, until nothing is left; all that they lease stands, on every
// node, also when bounds and reservations change later; and no bridge's address is one that the tunnel has.
func TestSubnetsOfAnySizeStand(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		text := drawConfig(t)
		conf, err := ParseConfig([]byte(text))
		if err != nil {
			if !strings.Contains(err.Error(), "leaves no subnet") {
				t.Fatalf("%s\n%v", text, err)
			}
			return
		}
		var nodes subnet.Listing
		for i := range rapid.IntRange(1, 6).Draw(t, "nodes") {
			subnets, err := leaseOne(conf.Network, "n"+strconv.Itoa(i), nodes, rapid.Uint64().Draw(t, "random"))
			var none *subnet.ExhaustedError
			if errors.As(err, &none) && slices.ContainsFunc(conf.Network, func(r subnet.Range) bool {
				return r.Prefix == none.Network && r.Count() == uint64(i)
			}) {
				break
			}
			if err != nil || len(subnets) != len(conf.Network) {
				t.Fatalf("%s\nn%d leases %v: %v\n%v", text, i, subnets, err, nodes)
			}
			nodes = append(nodes, subnet.Standing{Node: "n" + strconv.Itoa(i), Subnets: subnet.FormatSubnets(subnets)})
		}
		var leases []subnet.Lease
		for i, n := range nodes {
			leases = append(leases, leasesOf(t, conf, n, i)...)
		}
		for _, network := range []subnet.Network{conf.Network, withoutBounds(conf.Network)} {
			peers, problems := subnet.Settle("other", subnet.Rules{Network: network, ExactLength: true}, leases)
			if len(peers) != len(leases) || len(problems) > 0 {
				t.Fatalf("%s\n%d of %d stand: %v", text, len(peers), len(leases), problems)
			}
		}
	})
}

// leaseOne has a Claimant lease beside nodes, and returns what it got or why it got nothing.
func leaseOne(n subnet.Network, name string, nodes subnet.Listing, random uint64) ([]netip.Prefix, error) {
	c, err := subnet.NewClaimant(name, n, "x", nil, func() uint64 { return random })
	if err != nil {
		return nil, err
	}
	own := subnet.Standing{Node: name, Version: subnet.Version{UID: name, Resource: "0"}}
	var all subnet.Listing
	for i := range 20 {
		step := c.Next(own, all)
		all = nil
		switch s := step.(type) {
		case subnet.ListNodes:
			all = append(slices.Clone(nodes), own)
			continue
		case subnet.PatchClaim:
			own.Claim = s.Claim.String()
		case subnet.PatchSubnets:
			own.Subnets, own.Claim = subnet.FormatSubnets(s.Subnets), ""
		case subnet.Done:
			return s.Subnets, nil
		case subnet.Stuck:
			return nil, s.Err
		default:
			return nil, fmt.Errorf("unexpected: %v", s)
		}
		own.Version.Resource = strconv.Itoa(i + 1)
	}
	return nil, errors.New("it does not end")
}

// leasesOf is what node number i of a cluster publishes, after a look at its subnets.
func leasesOf(t *rapid.T, conf Config, n subnet.Standing, i int) (leases []subnet.Lease) {
	subnets, err := subnet.Record{Subnets: n.Subnets}.ParseSubnets()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range subnets {
		r, _ := conf.Network.Range(s.Addr())
		if err := r.Check(s); err != nil {
			t.Fatal(err)
		}
		if gw := bridge.Gateway(s); !s.Contains(gw) || gw == s.Addr() {
			t.Fatalf("gateway %s of %s", gw, s)
		}
		leases = append(leases, subnet.Lease{
			Node: n.Node, Subnet: s, Host: netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)}), Since: time.Unix(int64(i), 0),
		})
	}
	return leases
}

// withoutBounds is n with other bounds and reservations: the last subnet may be leased alone.
func withoutBounds(n subnet.Network) (out subnet.Network) {
	for _, r := range n {
		out = append(out, subnet.Range{Prefix: r.Prefix, Len: r.Len, Min: r.Max, Max: r.Max})
	}
	return out
}

func TestNodesOfASizeAndFamilyConverge(t *testing.T) {
	for _, c := range []struct{ conf, own, others string }{
		{`{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48"}`,
			"fd00:10:244:1::/64", "fd00:10:244:2::/64"},
		{`{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00::/112", "IPv6SubnetLen": 126}`,
			"fd00::4/126", "fd00::8/126"},
		{`{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00::/16", "IPv6SubnetLen": 37}`,
			"fd00:0:800::/37", "fd00:0:1000::/37"},
		{`{"Network": "10.0.0.0/8", "SubnetLen": 13}`, "10.8.0.0/13", "10.16.0.0/13"},
		{`{"Network": "10.244.0.0/24", "SubnetLen": 30}`, "10.244.0.4/30", "10.244.0.8/30"},
		{`{"Network": "10.244.0.0/16"}`, "10.244.1.0/26", "10.244.2.0/23"}, // the cluster's choice
	} {
		t.Run(c.conf, func(t *testing.T) {
			n, _ := following(t, c.conf)
			own := netip.MustParsePrefix(c.own)
			n.cluster.self.Subnets = []netip.Prefix{own}
			n.cluster.set(peer("n2", c.others, "192.0.2.12"))
			rep := n.settle(t)
			if got := n.routes(t); rep.Peers != 1 || len(rep.Problems) > 0 || len(got) != 1 || got[c.others] == "" {
				t.Errorf("report is %+v, routes are %v", rep, got)
			}
			for key := range n.state(t).Addrs {
				if a := key.Prefix.Addr(); a.Is4() != own.Addr().Is4() && !a.IsLinkLocalUnicast() {
					t.Errorf("an address of another family: %v", key)
				}
			}
		})
	}
}
