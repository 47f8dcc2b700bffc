package subnet

import (
	"errors"
	"math"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func prefixes(s string) (out []netip.Prefix) {
	for f := range strings.FieldsSeq(s) {
		out = append(out, prefix(f))
	}
	return out
}

func mustRange(t testing.TB, r Range) Range {
	t.Helper()
	r, err := NewRange(r)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestRangeIsCompletedByDefaults(t *testing.T) {
	for _, c := range []struct {
		prefix   string
		min, max string
		count    uint64
	}{
		{"10.244.0.0/16", "10.244.0.0/24", "10.244.255.0/24", 256},
		{"10.0.0.0/22", "10.0.0.0/24", "10.0.3.0/24", 4},
		{"10.0.0.0/24", "10.0.0.0/26", "10.0.0.192/26", 4},
		{"10.0.0.0/29", "10.0.0.0/30", "10.0.0.4/30", 2},
		{"10.0.0.0/30", "10.0.0.0/30", "10.0.0.0/30", 1},
		{"240.0.0.0/8", "240.0.0.0/24", "240.255.255.0/24", 65536},
		{"fd00:10:244::/48", "fd00:10:244::/64", "fd00:10:244:ffff::/64", 65536},
		{"fd00::/112", "fd00::/114", "fd00::c000/114", 4},
		{"fd00::/125", "fd00::/126", "fd00::4/126", 2},
		{"8000::/2", "8000::/64", "bfff:ffff:ffff:ffff::/64", 1 << 62},
	} {
		r := mustRange(t, Range{Prefix: prefix(c.prefix)})
		if r.Min != prefix(c.min) || r.Max != prefix(c.max) || r.Count() != c.count {
			t.Errorf("%s: %s to %s, %d subnets; want %s to %s, %d", c.prefix, r.Min, r.Max, r.Count(), c.min, c.max, c.count)
		}
	}
}

func TestRangeThatCannotBeUsed(t *testing.T) {
	for _, c := range []struct{ prefix, min, max, reserved, want string }{
		{prefix: "10.244.3.0/16", want: "Prefix 10.244.3.0/16: host bits set; did you mean 10.244.0.0/16"},
		{prefix: "224.0.0.0/8", want: "Prefix 224.0.0.0/8: holds multicast addresses (224.0.0.0/4); choose a private range"},
		{prefix: "127.0.0.0/16", want: "Prefix 127.0.0.0/16: holds loopback"},
		{prefix: "169.254.1.0/24", want: "Prefix 169.254.1.0/24: holds link-local"},
		{prefix: "0.0.0.0/0", want: "Prefix 0.0.0.0/0: holds this-network"},
		{prefix: "240.0.0.0/4", want: "Prefix 240.0.0.0/4: holds broadcast"},
		{prefix: "fe80::/64", want: "Prefix fe80::/64: holds link-local"},
		{prefix: "ff00::/16", want: "Prefix ff00::/16: holds multicast"},
		{prefix: "::/8", want: "Prefix ::/8: holds unspecified and loopback"},
		{prefix: "::ffff:10.0.0.0/112", want: "Prefix ::ffff:10.0.0.0/112: holds IPv4-mapped"},
		{prefix: "10.0.0.0/31", want: "Prefix 10.0.0.0/31: too small, want at most /30"},
		{prefix: "fd00::/127", want: "Prefix fd00::/127: too small, want at most /126"},
		{prefix: "10.0.0.0/16", min: "10.1.0.0/24", want: "Min 10.1.0.0: outside the network 10.0.0.0/16"},
		{prefix: "10.0.0.0/16", min: "fd00::/24", want: "Min fd00::: outside the network 10.0.0.0/16"},
		{prefix: "10.0.0.0/16", max: "10.0.3.0/25", want: "Max 10.0.3.0: has length /25, want /24"},
		{prefix: "10.0.0.0/16", max: "10.0.3.7/24",
			want: "Max 10.0.3.7: not the first address of a /24; did you mean 10.0.3.0"},
		{prefix: "10.0.0.0/16", min: "10.0.9.0/24", max: "10.0.3.0/24",
			want: "Min 10.0.9.0: comes after the last subnet, 10.0.3.0/24"},
		{prefix: "10.0.0.0/16", reserved: "10.1.0.0/24", want: "Reserved 10.1.0.0/24: want a prefix inside 10.0.0.0/16"},
		{prefix: "10.0.0.0/16", reserved: "10.0.0.0/8", want: "Reserved 10.0.0.0/8: want a prefix inside 10.0.0.0/16"},
		{prefix: "10.0.0.0/16", reserved: "10.0.0.0/17 10.0.128.0/17",
			want: "Reserved [10.0.0.0/17 10.0.128.0/17]: leaves no subnet between 10.0.0.0/24 and 10.0.255.0/24"},
	} {
		in := Range{Prefix: prefix(c.prefix), Reserved: prefixes(c.reserved)}
		if c.min != "" {
			in.Min = prefix(c.min)
		}
		if c.max != "" {
			in.Max = prefix(c.max)
		}
		_, err := NewRange(in)
		var field *RangeError
		if !errors.As(err, &field) || !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("%+v: %v\nwant %s", in, err, c.want)
		}
	}
	for _, n := range []int{-1, 15, 31} {
		if _, err := NewRange(Range{Prefix: prefix("10.0.0.0/16"), Len: n}); err == nil {
			t.Errorf("Len %d accepted", n)
		}
	}
	if _, err := NewRange(Range{}); err == nil {
		t.Error("empty Range accepted")
	}
}

func TestNetworkOfTwoRangesOfOneFamily(t *testing.T) {
	if _, err := NewNetwork(Range{Prefix: prefix("10.0.0.0/16")}, Range{Prefix: prefix("10.1.0.0/16")}); err == nil {
		t.Error("two IPv4 ranges accepted")
	}
	if _, err := NewNetwork(); err == nil {
		t.Error("no range accepted")
	}
}

func TestNetworkContains(t *testing.T) {
	n, err := NewNetwork(Range{Prefix: prefix("fd00:10::/32")}, Range{Prefix: prefix("10.244.0.0/16")})
	if err != nil {
		t.Fatal(err)
	}
	if got := n.Prefixes(); !slices.Equal(got, prefixes("10.244.0.0/16 fd00:10::/32")) {
		t.Errorf("Prefixes: %v", got)
	}
	for p, want := range map[string]bool{
		"10.244.7.0/24": true, "10.244.0.0/16": true, "10.244.0.0/15": false, "10.245.0.0/24": false,
		"fd00:10:1::/64": true, "fd00::/8": false, "::ffff:10.244.7.0/120": false,
	} {
		if n.Contains(prefix(p)) != want {
			t.Errorf("Contains(%s) is %v", p, !want)
		}
	}
	if n.Contains(netip.Prefix{}) {
		t.Error("contains the invalid prefix")
	}
}

func TestCheckRefusesWhatMayNotBeLeased(t *testing.T) {
	r := mustRange(t, Range{Prefix: prefix("10.0.0.0/16"), Min: prefix("10.0.4.0/24"), Max: prefix("10.0.9.0/24"),
		Reserved: prefixes("10.0.6.5/32")})
	for p, want := range map[string]string{
		"10.0.4.0/24": "", "10.0.9.0/24": "",
		"10.1.0.0/24":  "subnet 10.1.0.0/24 is outside the network 10.0.0.0/16",
		"10.0.5.0/25":  "subnet 10.0.5.0/25 has length /25; subnets of 10.0.0.0/16 have /24",
		"10.0.5.1/24":  "subnet 10.0.5.1/24: host bits set; did you mean 10.0.5.0/24",
		"10.0.3.0/24":  "subnet 10.0.3.0/24 is not one of those to be leased, 10.0.4.0/24 to 10.0.9.0/24",
		"10.0.10.0/24": "subnet 10.0.10.0/24 is not one of those to be leased, 10.0.4.0/24 to 10.0.9.0/24",
		"10.0.6.0/24":  "subnet 10.0.6.0/24 overlaps the reserved 10.0.6.5/32",
		"fd00::/64":    "subnet fd00::/64 is outside the network 10.0.0.0/16",
	} {
		got := ""
		if err := r.Check(prefix(p)); err != nil {
			got = err.Error()
		}
		if got != want {
			t.Errorf("Check(%s): %q, want %q", p, got, want)
		}
	}
}

// Every subnet is tried, one after the other, as the definition of Free has it.
func TestFreeSubnetsAreThoseThatNothingOverlaps(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		bases := prefixes("10.0.0.0/16 10.0.0.0/24 fd00::/56 fd00::/60 fd00::/120")
		r := Range{Prefix: rapid.SampledFrom(bases).Draw(t, "network")}
		r.Len = min(r.Prefix.Bits()+rapid.IntRange(0, 7).Draw(t, "bits"), maxLen(r.Prefix.Addr()))
		r, err := NewRange(r)
		if err != nil {
			t.Fatal(err)
		}
		all := slices.Collect(r.Free(0, nil))
		some := func(label string, n int) []netip.Prefix {
			return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) netip.Prefix {
				p := rapid.SampledFrom(all).Draw(t, "at")
				return netip.PrefixFrom(p.Addr(), rapid.IntRange(r.Prefix.Bits(), p.Addr().BitLen()).Draw(t, "len")).Masked()
			}), 0, n).Draw(t, label)
		}
		low, high := rapid.IntRange(0, len(all)-1).Draw(t, "min"), rapid.IntRange(0, len(all)-1).Draw(t, "max")
		low, high = min(low, high), max(low, high)
		r.Min, r.Max = all[low], all[high]
		r.Reserved = some("reserved", 3)
		r, err = NewRange(r)
		if err != nil {
			return // all of it is reserved
		}
		taken := append(some("taken", 6), prefix("192.0.2.0/24"), prefix("2001:db8::/32"), netip.Prefix{})

		start := rapid.Uint64().Draw(t, "start")
		var want []netip.Prefix
		for i := range uint64(high - low + 1) {
			n := uint64(high - low + 1)
			p := all[uint64(low)+(start%n+i)%n]
			if r.Check(p) == nil && !slices.ContainsFunc(taken, p.Overlaps) {
				want = append(want, p)
			}
		}
		if got := slices.Collect(r.Free(start, taken)); !slices.Equal(got, want) {
			t.Fatalf("free of %+v\nfrom %d without %v:\n got %v\nwant %v", r, start, taken, got, want)
		}
		if n := len(slices.Collect(r.Free(start, nil))); uint64(n) != r.Count() {
			t.Fatalf("Count is %d, and with none taken %d are free", r.Count(), n)
		}
	})
}

func TestHugeRangeIsNotWalked(t *testing.T) {
	r := mustRange(t, Range{Prefix: prefix("fd00::/8"), Len: 120})
	if r.Count() != math.MaxUint64 {
		t.Errorf("Count is %d", r.Count())
	}
	for p := range r.Free(1, prefixes("fd00::/66 fd00:0:0:0:4000::/67")) {
		if want := prefix("fd00:0:0:0:6000::/120"); p != want {
			t.Errorf("first free is %s, want %s", p, want)
		}
		break
	}
	r = mustRange(t, Range{Prefix: prefix("fd00::/8"), Len: 64})
	for p := range r.Free(math.MaxUint64, prefixes("fd80::/9")) {
		if want := prefix("fd00::/64"); p != want {
			t.Errorf("first free is %s, want %s", p, want)
		}
		break
	}
	for p := range r.Free(7, prefixes("fd00::/8")) {
		t.Fatalf("%s is free of a network that is leased as a whole", p)
	}
}

func TestUsageCountsWhatIsLeasedTwiceOnce(t *testing.T) {
	n, err := NewNetwork(
		Range{Prefix: prefix("10.0.0.0/16"), Reserved: prefixes("10.0.0.0/23")},
		Range{Prefix: prefix("fd00::/48")})
	if err != nil {
		t.Fatal(err)
	}
	var leases []Lease
	for _, p := range prefixes("10.0.5.0/24 10.0.5.0/24 10.0.6.0/25 10.9.0.0/24 fd00:0:0:1::/64") {
		leases = append(leases, Lease{Subnet: p})
	}
	want := []Usage{{prefix("10.0.0.0/16"), 24, 2, 252, 254}, {prefix("fd00::/48"), 64, 1, 65535, 65536}}
	if got := n.Usage(leases); !slices.Equal(got, want) {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
}
