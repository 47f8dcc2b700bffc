package overlay

import (
	"bytes"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/overlay/podnet"
	"tweed.dev/tweed/subnet"
)

const (
	oneFamily   = `{"Network": "10.244.0.0/16"}`
	twoFamilies = `{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48"}`
)

func parsed(t testing.TB, text string) Config {
	t.Helper()
	c, err := ParseConfig([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// following is a node whose daemon was started with a net-conf.json of this text, and follows it. Its log is kept.
func following(t *testing.T, text string) (n *node, log *bytes.Buffer) {
	t.Helper()
	n = newNode(t)
	n.planner.Config, n.planner.NetConf = parsed(t, text), filepath.Join(t.TempDir(), "net-conf.json")
	n.rewrite(t, text)
	n.cluster.self.Subnets = n.cluster.self.Subnets[:len(n.planner.Config.Network)]
	n.cluster.set()
	log = &bytes.Buffer{}
	n.log = slog.New(slog.NewTextHandler(log, nil))
	return n, log
}

func (n *node) rewrite(t *testing.T, text string) {
	t.Helper()
	if err := os.WriteFile(n.planner.NetConf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// settle makes passes until the node has converged and published, and checks that nothing is left to do.
func (n *node) settle(t *testing.T) Report {
	t.Helper()
	n.step(t)
	rep := n.step(t)
	if !rep.Ready() || rep.Done != 0 {
		t.Fatalf("not settled: %+v", rep)
	}
	return rep
}

func TestNetworkGrowsUnderLivingPods(t *testing.T) {
	for name, c := range map[string]struct{ before, after, joins string }{
		"a larger prefix": {oneFamily, `{"Network": "10.240.0.0/12"}`, "10.245.2.0/24"},
		"a family":        {oneFamily, twoFamilies, "fd00:10:244:2::/64"},
		"both, and other bounds": {oneFamily, strings.Replace(twoFamilies, "{", `{"SubnetMin": "10.244.9.0", `, 1),
			"fd00:10:244:2::/64"},
		"the other family's part": {twoFamilies, strings.Replace(twoFamilies, ":244::/48", "::/32", 1), "fd00:10:9:2::/64"},
	} {
		t.Run(name, func(t *testing.T) {
			n, log := following(t, c.before)
			n.cluster.set(peer("n2", c.joins, "192.0.2.12"))
			if rep := n.settle(t); rep.Peers != 0 || !hasProblem(rep, "n2", c.joins) {
				t.Fatalf("before: %+v", rep)
			}
			n.rewrite(t, c.after)
			rep := n.step(t)
			if rep.Peers != 1 || n.routes(t)[c.joins] == "" || hasProblem(rep, "n2", "") {
				t.Errorf("the peer is not accepted: %+v", rep)
			}
			want := parsed(t, c.after).Network
			if !reflect.DeepEqual(n.cluster.network, want) {
				t.Errorf("subnets are leased of %v, want %v", n.cluster.network, want)
			}
			if info, err := podnet.ReadNodeInfo(n.planner.RunDir); err != nil || !slices.Equal(info.Networks, want.Prefixes()) {
				t.Errorf("pods are told of %v (%v)", info.Networks, err)
			}
			n.settle(t)
			own := n.cluster.look()
			if own.writes != 2 || !slices.Equal(own.published[0].Accepts, want.Prefixes()) {
				t.Errorf("published %+v in %d writes", own.published, own.writes)
			}
			if got := strings.Count(log.String(), "pod network changed"); got != 1 {
				t.Errorf("logged %d times:\n%s", got, log)
			}
		})
	}
}

// What is not a growth is told, with both values, and nothing else happens.
func TestNetConfThatCannotComeIntoForce(t *testing.T) {
	for name, c := range map[string]struct{ before, after, want string }{
		"shrunk": {oneFamily, `{"Network": "10.244.0.0/17"}`, "Network 10.244.0.0/17 does not hold 10.244.0.0/16, which is " +
			"in force: a network may grow, not shrink or move; restore it, or give a prefix that holds it"},
		"moved": {oneFamily, `{"Network": "10.99.0.0/16"}`,
			"Network 10.99.0.0/16 does not hold 10.244.0.0/16, which is in force"},
		"one grown, the other shrunk": {twoFamilies, `{"Network": "10.240.0.0/12", "EnableIPv6": true, ` +
			`"IPv6Network": "fd00:10:244::/49"}`, "IPv6Network fd00:10:244::/49 does not hold fd00:10:244::/48"},
		"a family gone": {twoFamilies, oneFamily, "there is no IPv6Network any more to hold fd00:10:244::/48"},
		"grown, with other subnets": {oneFamily, `{"Network": "10.240.0.0/12", "SubnetLen": 25}`,
			"SubnetLen is 24 in force and 25 in the file: takes effect when the daemon is restarted"},
		"an underlay that no interface is on": {oneFamily, strings.Replace(oneFamily, "{", `{"Underlay": "ipv6", `, 1),
			"uplink eth0 (no other interface has an address) has no global IPv6 address; give it one"},
		"grown, with an underlay that no interface is on": {oneFamily, `{"Network": "10.240.0.0/12", "Underlay": "ipv6"}`,
			"has no global IPv6 address"},
		"another backend, with other subnets": {oneFamily, strings.Replace(oneFamily, "}", `, "SubnetLen": 25,
			"Backend": {"VNI": 7}}`, 1), "SubnetLen is 24 in force and 25 in the file: takes effect"},
		"another source": {oneFamily, strings.Replace(oneFamily, "{", `{"SubnetSource": "lease", `, 1),
			"SubnetSource is auto in force and lease in the file: takes effect when the daemon is restarted"},
		"broken": {oneFamily, "{\n\"Network\": 7,\n\"Port\": 1}",
			`Network 7: want an IPv4 prefix, such as "10.244.0.0/16"; Port`},
		"cut off": {oneFamily, `{"Network": "10.2`, "line 1: the text ends in the middle; was it cut off?"},
		"empty":   {oneFamily, "", "the file is empty"},
	} {
		t.Run(name, func(t *testing.T) {
			n, log := following(t, c.before)
			n.settle(t)
			before, ops := n.planner.Config, len(n.kern.Ops())
			n.rewrite(t, c.after)
			n.refuses(t, n.planner.NetConf, c.want)
			n.rewrite(t, c.before)
			if rep := n.step(t); hasProblem(rep, "n1", n.planner.NetConf) || len(n.kern.Ops()) != ops ||
				n.cluster.look().writes != 1 || n.cluster.network != nil || !reflect.DeepEqual(n.planner.Config, before) {
				t.Errorf("after all: %+v\n%v\n%s", rep, n.kern.Ops()[ops:], log)
			}
		})
	}
}

// Whatever does not concern leases is followed by the pass after the change, and by the one after a change back.
func TestNetConfChangesUnderLivingPods(t *testing.T) {
	tunnel := func(keys string) string { return strings.Replace(oneFamily, "}", `, "Backend": {`+keys+"}}", 1) }
	top := func(key string) string { return strings.Replace(oneFamily, "}", ", "+key+"}", 1) }
	for name, c := range map[string]struct {
		text, data string // data is this node's, as then published
		ops        string // some of those that follow
	}{
		"VNI":  {tunnel(`"VNI": 7`), `"vni":7,"port":8472`, "ip link del tweed.1\nip link add tweed.7 "},
		"port": {tunnel(`"Port": 4789`), `"vni":1,"port":4789`, "ip link del tweed.1\nip link add tweed.1 "},
		"MTU": {tunnel(`"MTU": 1400`), `"vni":1`, "ip link set dev tweed.1 mtu 1350\n" +
			"ip link set dev tweed0 mtu 1350"},
		"checksums":        {tunnel(`"ChecksumOffload": "off"`), `"vni":1`, "ethtool -K tweed.1 tx off"},
		"without a tunnel": {tunnel(`"Type": "host-gw"`), `{}`, "ip link del tweed.1\nip link set dev tweed0 mtu 1500"},
		"direct routing": {tunnel(`"DirectRouting": true`), `"vni":1`,
			"ip route replace 10.244.2.0/24 via 192.0.2.12 dev eth0 proto 116"},
		"no masquerading": {top(`"NonMasqueradeCIDRs": ["192.0.2.0/24"]`), `"vni":1`, "iptables -t nat -I TWEED-POSTRTG"},
		"packet filter":   {top(`"PacketFilter": "nftables"`), `"vni":1`, "nft add table ip tweed"},
		"underlay": {top(`"Underlay": "ipv6"`), `"vni":1`, "ip link del tweed.1\nip link add tweed.1 group 116 address " +
			"1e:4f:9b:43:26:b5 mtu 1430 up type vxlan id 1 dstport 8472 local 2001:db8::11 "},
	} {
		t.Run(name, func(t *testing.T) {
			n, log := following(t, oneFamily)
			n.kern.SetInterface(backend.Interface{Name: "eth0", MTU: 1500, Up: true, Addrs: []netip.Prefix{
				netip.MustParsePrefix("192.0.2.11/24"), netip.MustParsePrefix("2001:db8::11/64")}})
			n.cluster.set(peer("n2", "10.244.2.0/24", "192.0.2.12"))
			n.settle(t)
			before := n.state(t)
			ops := len(n.kern.Ops())
			n.rewrite(t, c.text)
			rep := n.step(t)
			if rep.Done == 0 || rep.Drift > 0 || hasProblem(rep, "n1", n.planner.NetConf) {
				t.Errorf("report is %+v", rep)
			}
			if did := listing(n.kern.Ops()[ops:], "\n"); !strings.Contains(did, c.ops) {
				t.Errorf("did\n%s\nwant\n%s", did, c.ops)
			}
			if own := n.cluster.look().published; !strings.Contains(string(own[0].Data), c.data) {
				t.Errorf("published %s, want %s", own[0].Data, c.data)
			}
			if got := strings.Count(log.String(), "configuration changed"); got != 1 {
				t.Errorf("logged %d times:\n%s", got, log)
			}
			n.settle(t)
			n.rewrite(t, oneFamily)
			n.step(t)
			n.settle(t)
			if after := n.state(t); !after.Equal(before) {
				t.Errorf("after a change there and back the kernel holds\n%+v\nand before\n%+v", after, before)
			}
		})
	}
}

// While this node is not known, its network may grow, because that may be what is missing, and all else waits.
func TestNetConfChangesWhileTheNodeIsNotKnown(t *testing.T) {
	n, _ := following(t, oneFamily)
	n.settle(t)
	n.cluster.selfErr = errors.New("the Node is not there")
	n.rewrite(t, strings.Replace(oneFamily, "}", `, "Backend": {"Type": "host-gw"}}`, 1))
	if rep := n.step(t); !hasProblem(rep, "n1", n.planner.NetConf+": the Node is not there") ||
		n.planner.Config.Backend.Type != "vxlan" {
		t.Errorf("report is %+v", rep)
	}
	n.rewrite(t, `{"Network": "10.240.0.0/12"}`)
	if n.step(t); n.planner.Config.Network[0].Prefix.String() != "10.240.0.0/12" {
		t.Error("the network does not grow")
	}
	n.cluster.selfErr = nil
	n.rewrite(t, `{"Network": "10.240.0.0/12", "Backend": {"Type": "host-gw"}}`)
	if n.step(t); n.planner.Config.Backend.Type != "host-gw" {
		t.Error("the node is known, and still the change waits")
	}
}

// refuses makes passes that name the net-conf.json at path and say why it is not in force, and do nothing.
func (n *node) refuses(t *testing.T, path, why string) {
	t.Helper()
	for range 2 {
		rep := n.step(t)
		i := slices.IndexFunc(rep.Problems, func(p subnet.Problem) bool { return p.Kind == subnet.KindConfig })
		if !rep.Ready() || rep.Done != 0 || i < 0 {
			t.Fatalf("report is %+v; want the node ready, and to be told", rep)
		}
		p := rep.Problems[i]
		if p.Node != "n1" || !strings.Contains(p.Text, path) || !strings.Contains(p.Text, why) ||
			!strings.HasSuffix(p.Text, staleSuffix) || strings.Contains(p.Text, "\n") {
			t.Errorf("problem is %s: %s\nwant %s", p.Node, p.Text, why)
		}
	}
}

func TestNetConfGoes(t *testing.T) {
	n, _ := following(t, oneFamily)
	n.settle(t)
	if err := os.Remove(n.planner.NetConf); err != nil {
		t.Fatal(err)
	}
	n.refuses(t, n.planner.NetConf, "no such file")
}

func TestNetworkGrowsAroundANode(t *testing.T) {
	n, _ := following(t, oneFamily)
	n.cluster.self.Addrs = []netip.Addr{netip.MustParseAddr("10.1.0.11")}
	n.settle(t)
	n.rewrite(t, `{"Network": "10.0.0.0/8"}`)
	n.refuses(t, n.planner.NetConf, "address 10.1.0.11 of this node is inside the pod network 10.0.0.0/8")

	n, _ = following(t, oneFamily)
	n.cluster.set(peer("n2", "10.244.2.0/24", "10.1.0.12"))
	n.settle(t)
	n.rewrite(t, `{"Network": "10.0.0.0/8"}`)
	n.refuses(t, n.planner.NetConf, "address 10.1.0.12 of node n2 is inside the pod network 10.0.0.0/8")
	n.cluster.set()
	if n.step(t); n.planner.Config.Network[0].Prefix.String() != "10.0.0.0/8" {
		t.Error("still refused when that node has gone")
	}
}

// again is n's daemon, started anew with a net-conf.json of this text.
func (n *node) again(t *testing.T, text string) *node {
	t.Helper()
	m, _ := following(t, oneFamily)
	m.kern, m.planner.Kernel, m.planner.RunDir = n.kern, n.kern, n.planner.RunDir
	m.planner.Config = parsed(t, text)
	m.rewrite(t, text)
	m.cluster.set()
	return m
}

func TestDaemonStartsWithANetworkThatItsPodsAreNotIn(t *testing.T) {
	for _, text := range []string{`{"Network": "10.99.0.0/16"}`, `{"Network": "10.244.0.0/17"}`} {
		n, _ := following(t, oneFamily)
		n.settle(t)
		m := n.again(t, text)
		ops := len(m.kern.Ops())
		link := n.state(t).Links["tweed.1"]
		rep := m.step(t)
		prefix := m.planner.Config.Network[0].Prefix.String()
		for _, want := range []string{m.planner.NetConf, prefix, "10.244.0.0/16", "Restore it", "drain", "node.json"} {
			if rep.Ready() || !strings.Contains(rep.Waiting, want) {
				t.Errorf("waiting is %q, want %s in it", rep.Waiting, want)
			}
		}
		if rep.lack.reason != "NetworkRefused" || rep.lack.noLease {
			t.Errorf("lack is %+v", rep.lack)
		}
		if len(m.kern.Ops()) != ops || m.state(t).Links["tweed.1"] != link || m.cluster.look().writes != 0 {
			t.Errorf("did %v", m.kern.Ops()[ops:])
		}
		m.rewrite(t, oneFamily)
		if m.settle(t); m.planner.Config.Network[0].Prefix.String() != "10.244.0.0/16" || m.cluster.network == nil {
			t.Errorf("restored, and %v is in force", m.planner.Config.Network)
		}
	}
}

func TestDaemonStartsWithANetworkThatHasGrown(t *testing.T) {
	n, _ := following(t, oneFamily)
	n.settle(t)
	m := n.again(t, `{"Network": "10.240.0.0/12"}`)
	m.settle(t)
}

func TestNodeHasRebootedIntoAnotherNetwork(t *testing.T) {
	n, _ := following(t, oneFamily)
	n.settle(t)
	info, err := podnet.ReadNodeInfo(n.planner.RunDir)
	if err != nil {
		t.Fatal(err)
	}
	info.BootID = "an earlier one"
	if err := info.Write(n.planner.RunDir); err != nil {
		t.Fatal(err)
	}
	m := n.again(t, `{"Network": "10.244.0.0/17"}`)
	m.settle(t)
}

// Before anything is in force, what keeps it from that can be corrected without a restart.
func TestNetConfIsCorrectedBeforeItWasEverInForce(t *testing.T) {
	n, _ := following(t, `{"Network": "10.0.0.0/8"}`)
	n.cluster.self.Addrs = []netip.Addr{netip.MustParseAddr("10.1.0.11")}
	if rep := n.step(t); rep.lack.reason != reasonOverlap {
		t.Fatalf("report is %+v", rep)
	}
	n.rewrite(t, oneFamily)
	n.settle(t)
}

// A key that is compared with nothing could be changed without a word.
func TestChangedKeyThatNobodyNames(t *testing.T) {
	before := parsed(t, oneFamily)
	var paths [][]int
	for _, f := range reflect.VisibleFields(reflect.TypeFor[Config]()) {
		switch f.Name {
		case "Network": // has its own rules
		case "Backend":
			for _, b := range reflect.VisibleFields(f.Type) {
				paths = append(paths, append(slices.Clone(f.Index), b.Index...))
			}
		default:
			paths = append(paths, f.Index)
		}
	}
	for _, path := range paths {
		now := before
		v := reflect.ValueOf(&now).Elem().FieldByIndex(path)
		switch v.Kind() {
		case reflect.String:
			v.SetString("other")
		case reflect.Bool:
			v.SetBool(!v.Bool())
		case reflect.Int:
			v.SetInt(v.Int() + 6)
		case reflect.Slice:
			v.Set(reflect.ValueOf([]netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}))
		case reflect.Struct:
			v.Set(reflect.ValueOf(podnet.Spoofing{Namespaces: []string{"lab"}}))
		default:
			v.SetUint(v.Uint() + 6)
		}
		if got := append(needRestart(before, now), goLive(before, now)...); len(got) != 1 {
			t.Errorf("%v: %v", path, got)
		}
	}
	if len(paths) < 8 {
		t.Errorf("looked at %d keys", len(paths))
	}
}

func TestWhatANetworkHasToHold(t *testing.T) {
	for _, c := range []struct{ before, now, want string }{
		{oneFamily, oneFamily, ""},
		{oneFamily, `{"Network": "10.244.0.0/15"}`, ""},
		{oneFamily, `{"Network": "10.0.0.0/8", "Reserved": ["10.244.0.0/16"], "SubnetMin": "10.245.0.0"}`, ""},
		{oneFamily, twoFamilies, ""},
		{twoFamilies, strings.Replace(twoFamilies, ":244::/48", "::/32", 1), ""},
		{oneFamily, `{"Network": "10.244.128.0/17"}`, "Network 10.244.128.0/17 does not hold 10.244.0.0/16"},
		{oneFamily, `{"Network": "10.245.0.0/16"}`, "Network 10.245.0.0/16 does not hold 10.244.0.0/16"},
		{twoFamilies, oneFamily, "there is no IPv6Network any more to hold fd00:10:244::/48"},
		{twoFamilies, `{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48"}`,
			"there is no Network any more to hold 10.244.0.0/16"},
		{`{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48"}`, twoFamilies, ""},
	} {
		if got := lacks(parsed(t, c.now).Network, parsed(t, c.before).Network.Prefixes()); got != c.want {
			t.Errorf("%s\n%s\n got %q\nwant %q", c.before, c.now, got, c.want)
		}
	}
}
