package kube_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"pgregory.net/rapid"

	"tweed.dev/tweed/subnet"
	"tweed.dev/tweed/subnet/kube"
)

var born = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func meta(annotations map[string]string) *metav1.ObjectMeta {
	return &metav1.ObjectMeta{Name: "node-7", CreationTimestamp: metav1.NewTime(born), Annotations: annotations}
}

// good is what a healthy dual-stack node publishes.
func good() map[string]string {
	return map[string]string{
		kube.Subnets:     "10.244.7.0/24,fd00:10:244:7::/64",
		kube.Host:        "192.0.2.17,2001:db8::17",
		kube.Backend:     "vxlan",
		kube.BackendData: `{"vni":1,"port":8472,"mac":"0e:00:00:00:00:07"}`,
		kube.Network:     "10.244.0.0/16,fd00:10:244::/48",
	}
}

func TestAnnotationsOfAHealthyNode(t *testing.T) {
	a := good()
	a[kube.Sources] = "198.51.100.7,2001:db8:1::7"
	a[kube.Claim] = "garbage nobody reads"
	a["example.com/other"] = "left alone"
	leases, problems := kube.Parse(meta(a))
	var want []subnet.Lease
	for _, s := range []string{"10.244.7.0/24", "fd00:10:244:7::/64"} {
		want = append(want, subnet.Lease{
			Node: "node-7", Subnet: netip.MustParsePrefix(s), Host: netip.MustParseAddr("192.0.2.17"),
			NodeAddrs: []netip.Addr{netip.MustParseAddr("192.0.2.17"), netip.MustParseAddr("2001:db8::17")},
			Sources:   []netip.Addr{netip.MustParseAddr("198.51.100.7"), netip.MustParseAddr("2001:db8:1::7")},
			Accepts:   []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:10:244::/48")},
			Backend:   "vxlan", Data: json.RawMessage(good()[kube.BackendData]), Since: born,
		})
	}
	if !reflect.DeepEqual(leases, want) || problems != nil {
		t.Errorf("got %+v, problems %v\nwant %+v", leases, problems, want)
	}
	delete(a, kube.Sources)
	delete(a, kube.Claim)
	delete(a, "example.com/other")
	if got := kube.Format(leases); !reflect.DeepEqual(got, a) {
		t.Errorf("Format gives %v, want %v", got, a)
	}
}

func TestNodeWithoutOurAnnotationsIsNothing(t *testing.T) {
	for _, a := range []map[string]string{
		nil,
		{"example.com/other": "x"},
		{kube.HostOverride: "198.51.100.7", kube.Sources: "rubbish", kube.Claim: "10.244.3.0/24 n1"},
		{kube.Network: "10.244.0.0/16"},
	} {
		if leases, problems := kube.Parse(meta(a)); leases != nil || problems != nil {
			t.Errorf("%v: got %v, %v", a, leases, problems)
		}
	}
}

func TestGarbageInOneAnnotation(t *testing.T) {
	long := strings.Repeat("ü", 128<<10)
	for _, c := range []struct{ key, value, want string }{
		{kube.Subnets, "", "missing"},
		{kube.Subnets, "pods", `"pods" is not a subnet`},
		{kube.Subnets, "10.244.7.0/24,", `"" is not a subnet`},
		{kube.Subnets, "10.244.7.0/24, fd00::/64", `" fd00::/64" is not a subnet`},
		{kube.Subnets, "10.244.7.1/24", "did you mean 10.244.7.0/24"},
		{kube.Subnets, "FD00:10:244:7::/64", "did you mean fd00:10:244:7::/64"},
		{kube.Subnets, "10.244.7.0/24,10.244.8.0/24", "two subnets of one address family"},
		{kube.Subnets, "::ffff:10.244.7.0/120", "is not a subnet"},
		{kube.Subnets, "fe80::%eth0/64", "is not a subnet"},
		{kube.Subnets, long, "has 262144 bytes; at most 128 are possible"},
		{kube.Host, "", "missing"},
		{kube.Host, "node-7.example.com", `"node-7.example.com" is not an IP address`},
		{kube.Host, "192.0.2.017", "is not an IP address"},
		{kube.Host, "fe80::1%eth0", "is not an IP address"},
		{kube.Host, "::ffff:192.0.2.17", "is not an IP address"},
		{kube.Host, "2001:db8:0::17", "did you mean 2001:db8::17"},
		{kube.Host, "192.0.2.17,192.0.2.18", "two addresses of one family"},
		{kube.Host, "192.0.2.17,2001:db8::17,192.0.2.18", "two addresses of one family"},
		{kube.Host, long, "at most 128 are possible"},
		{kube.Backend, "", "missing"},
		{kube.Backend, "VXLAN!", `"VXLAN!" is not the name of a backend`},
		{kube.Backend, long, "at most 63 are possible"},
		{kube.BackendData, "", "missing"},
		{kube.BackendData, "02:zz", `"02:zz" is not a JSON object`},
		{kube.BackendData, `["vni"]`, "is not a JSON object"},
		{kube.BackendData, `{"vni":1}{}`, "is not a JSON object"},
		{kube.BackendData, `{"vni":1`, "is not a JSON object"},
		{kube.BackendData, " ", "is not a JSON object"},
		{kube.BackendData, long, "at most 4096 are possible"},
	} {
		a := good()
		a[c.key] = c.value
		leases, problems := kube.Parse(meta(a))
		if leases != nil || len(problems) != 1 {
			t.Errorf("%s: %.50q: got %v, %v", c.key, c.value, leases, problems)
			continue
		}
		p := problems[0]
		if p.Node != "node-7" || p.Kind != subnet.KindAnnotation || len(p.Text) > 300 ||
			!strings.HasPrefix(p.Text, "annotation "+c.key+": ") || !strings.Contains(p.Text, c.want) ||
			!strings.Contains(p.Text, "; pods on node-7 cannot be reached") {
			t.Errorf("%s: %.50q: got problem %+v, want %q in it", c.key, c.value, p, c.want)
		}
	}
}

func TestGarbageInSourcesKeepsTheLease(t *testing.T) {
	long := strings.Repeat("192.0.2.1,", 200)
	for _, value := range []string{"x", "192.0.2.1,", "127.0.0.1", "ff02::1", "0.0.0.0", long} {
		a := good()
		a[kube.Sources] = value
		leases, problems := kube.Parse(meta(a))
		if len(leases) != 2 || leases[0].Sources != nil || len(problems) != 1 {
			t.Errorf("%.50q: got %v, %v", value, leases, problems)
		}
	}
}

func TestGarbageInNetworkKeepsTheLease(t *testing.T) {
	long := strings.Repeat("10.244.0.0/16,", 20)
	for value, want := range map[string]string{
		"x": `"x" is not a pod network such as 10.244.0.0/16`, "10.244.0.0/16,": `"" is not a pod network`,
		"10.244.1.0/16":             `is not a pod network in its usual form; did you mean 10.244.0.0/16`,
		"10.244.0.0/16,10.0.0.0/16": "two pod networks of one address family", long: "at most 128 are possible",
	} {
		a := good()
		a[kube.Network] = value
		leases, problems := kube.Parse(meta(a))
		if len(leases) != 2 || leases[0].Accepts != nil || len(problems) != 1 ||
			!strings.Contains(problems[0].Text, want) || !strings.Contains(problems[0].Text, "it counts as missing") {
			t.Errorf("%.50q: got %v, %v", value, leases, problems)
		}
	}
}

func TestDaemonThatDoesNotSayWhatItAccepts(t *testing.T) {
	a := good()
	delete(a, kube.Network)
	leases, problems := kube.Parse(meta(a))
	if len(leases) != 2 || leases[0].Accepts != nil || problems != nil {
		t.Errorf("got %v, %v", leases, problems)
	}
	if _, there := kube.Format(leases)[kube.Network]; there {
		t.Error("an empty annotation would be published")
	}
}

func TestGarbageInAllAnnotations(t *testing.T) {
	a := map[string]string{}
	for key := range good() {
		a[key] = "\x00garbage\n"
	}
	leases, problems := kube.Parse(meta(a))
	if leases != nil || len(problems) != len(a) { // one each
		t.Fatalf("got %v, %v", leases, problems)
	}
	for _, p := range problems {
		if strings.ContainsAny(p.Text, "\x00\n") {
			t.Errorf("unquoted: %q", p.Text)
		}
	}
}

func TestAnnotationsSurviveARoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		leases := drawLeases(t)
		got, problems := kube.Parse(meta(kube.Format(leases)))
		if problems != nil || !slices.EqualFunc(got, leases, subnet.Lease.Equal) {
			t.Fatalf("got %v, problems %v\nwant %v", got, problems, leases)
		}
	})
}

func drawLeases(t *rapid.T) []subnet.Lease {
	hosts := rapid.SampledFrom([]string{"192.0.2.7", "2001:db8::7", "192.0.2.7,2001:db8::7", "2001:db8::7,192.0.2.7"})
	var addrs []netip.Addr
	for text := range strings.SplitSeq(hosts.Draw(t, "hosts"), ",") {
		addrs = append(addrs, netip.MustParseAddr(text))
	}
	l := subnet.Lease{
		Node: "node-7", Host: addrs[0], NodeAddrs: addrs, Since: born,
		Backend: rapid.StringMatching(`[a-z0-9-]{1,20}`).Draw(t, "backend"),
	}
	data, err := json.Marshal(rapid.MapOfN(rapid.String(), rapid.String(), 0, 5).Draw(t, "data"))
	if err != nil {
		t.Fatal(err)
	}
	l.Data = data
	for i, size := range []int{4, 16} {
		if rapid.Bool().Draw(t, fmt.Sprint("accepts", i)) {
			l.Accepts = append(l.Accepts, drawPrefix(t, size))
		}
	}
	var leases []subnet.Lease
	families := rapid.IntRange(1, 3).Draw(t, "families")
	if families&1 != 0 {
		l.Subnet = drawPrefix(t, 4)
		leases = append(leases, l)
	}
	if families&2 != 0 {
		l.Subnet = drawPrefix(t, 16)
		leases = append(leases, l)
	}
	return leases
}

func drawPrefix(t *rapid.T, size int) netip.Prefix {
	b := rapid.SliceOfN(rapid.Byte(), size, size).Draw(t, "address")
	if size == 16 {
		b[0] = 0xfd // not an IPv4 address in IPv6's clothes
	}
	a, _ := netip.AddrFromSlice(b)
	return netip.PrefixFrom(a, rapid.IntRange(0, size*8).Draw(t, "length")).Masked()
}

// Whatever stands in all annotations of a Node, Parse keeps its promises: leases or a Problem of that Node, short texts
// that name the annotation, nothing of what is not for peers, and what it accepts is what Format would have written.
func FuzzParse(f *testing.F) {
	g := good()
	f.Add(g[kube.Subnets], g[kube.Host], g[kube.Backend], g[kube.BackendData], "10.244.0.0/16", "198.51.100.7",
		"203.0.113.7", "x", "y")
	f.Add("10.244.7.0/24", "2001:db8::17", "host-gw", "{}", "", "", "", "", "")
	f.Add("10.244.7.1/24", "fe80::1%eth0", "\xff", `{"mac":"02:zz"`, "pods", ",", "::1", "10.244.7.0/24 5f", "")
	f.Add("", "", "", " ", "", "", "", "", "")
	f.Fuzz(func(t *testing.T, subnets, host, backend, data, network, sources, override, claim, other string) {
		a := map[string]string{kube.Subnets: subnets, kube.Host: host, kube.Backend: backend, kube.BackendData: data,
			kube.Network: network, kube.Sources: sources}
		leases, problems := kube.Parse(meta(a))
		a[kube.HostOverride], a[kube.Claim], a["tweed.dev/later"], a["example.com/other"] = override, claim, other, other
		leases2, problems2 := kube.Parse(meta(a))
		if !slices.EqualFunc(leases, leases2, subnet.Lease.Equal) || !slices.Equal(problems, problems2) {
			t.Errorf("with what is not for peers %v, %v; without %v, %v", leases2, problems2, leases, problems)
		}
		if len(leases) == 0 && len(problems) == 0 && subnets+host+backend+data != "" {
			t.Errorf("neither leases nor problems")
		}
		for _, p := range problems {
			if p.Node != "node-7" || len(p.Text) > 400 || !strings.HasPrefix(p.Text, "annotation tweed.dev/") {
				t.Errorf("problem of %q, %d bytes: %s", p.Node, len(p.Text), p.Text)
			}
		}
		if len(leases) == 0 {
			return
		}
		again, problems := kube.Parse(meta(kube.Format(leases)))
		for i := range leases {
			leases[i].Sources = nil
		}
		slices.SortFunc(leases, func(a, b subnet.Lease) int { return a.Subnet.Addr().BitLen() - b.Subnet.Addr().BitLen() })
		if problems != nil || !slices.EqualFunc(leases, again, subnet.Lease.Equal) {
			t.Errorf("%v became %v, %v", leases, again, problems)
		}
	})
}

func BenchmarkParse(b *testing.B) {
	m := meta(good())
	for b.Loop() {
		if leases, _ := kube.Parse(m); len(leases) != 2 {
			b.Fatal(leases)
		}
	}
}

func BenchmarkParseHostile(b *testing.B) {
	a := good()
	for key := range a {
		a[key] = strings.Repeat("1", 64<<10)
	}
	m := meta(a)
	for b.Loop() {
		if _, problems := kube.Parse(m); len(problems) != len(a) {
			b.Fatal(problems)
		}
	}
}

// nth is what node number n of a test cluster publishes.
func nth(n int) map[string]string {
	return map[string]string{
		kube.Subnets:     fmt.Sprintf("10.244.%d.0/24", n),
		kube.Host:        fmt.Sprintf("192.0.2.%d", n),
		kube.Backend:     "vxlan",
		kube.BackendData: fmt.Sprintf(`{"vni":1,"port":8472,"mac":"0e:00:00:00:00:%02x"}`, n),
		kube.Network:     "10.244.0.0/16",
	}
}
