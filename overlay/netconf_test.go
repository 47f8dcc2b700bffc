package overlay

import (
	"bytes"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

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
		"grown, with another backend": {oneFamily, `{"Network": "10.240.0.0/12", "Backend": {"VNI": 7, "Port": 4789}}`,
			"Backend.VNI is 1 in force and 7 in the file, Backend.Port is 8472 in force and 4789 in the file: takes effect"},
		"another underlay": {oneFamily, strings.Replace(oneFamily, "{", `{"Underlay": "ipv6", `, 1),
			"Underlay is unset in force and ipv6 in the file: takes effect when the daemon is restarted"},
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
		default:
			v.SetUint(v.Uint() + 6)
		}
		if got := differences(before, now); len(got) != 1 {
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
