package podnet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"tweed.dev/tweed/backend/kernel/netnstest"
	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/subnet"
)

// wishes are what a pod asks for, in the runtime's words.
type wishes map[string]any

type port struct {
	HostPort      int    `json:"hostPort"`
	ContainerPort int    `json:"containerPort"`
	Protocol      string `json:"protocol"`
}

func webAndDNS() wishes {
	return wishes{"portMappings": []port{{8080, 80, "tcp"}, {8053, 53, "udp"}}}
}

// slow is what containerd makes of annotations, in its spelling.
func slow() wishes {
	return wishes{"bandwidth": struct{ IngressRate, IngressBurst, EgressRate, EgressBurst uint64 }{
		8_000_000, math.MaxUint32, 16_000_000, math.MaxUint32}}
}

func both() wishes {
	return wishes{"portMappings": webAndDNS()["portMappings"], "bandwidth": slow()["bandwidth"]}
}

// An attachment is a pod with wishes.
type attachment struct {
	n    *node
	rt   *libcni.RuntimeConf
	list *libcni.NetworkConfigList
}

func (n *node) wishing(container string, pod *netnstest.NS, w wishes) *attachment {
	n.t.Helper()
	rt := runtimeConf(container, pod.Path())
	rt.CapabilityArgs = w
	return &attachment{n, rt, n.conflist("1.1.0")}
}

func (a *attachment) add() (*types100.Result, error) { return a.n.addAs(a.rt, a.list) }

func (a *attachment) mustAdd() *types100.Result {
	a.n.t.Helper()
	r, err := a.add()
	if err != nil {
		a.n.t.Fatal(err)
	}
	return r
}

func (a *attachment) del() (err error) {
	a.n.Do(a.n.t, func() { err = a.n.cni.DelNetworkList(context.Background(), a.list, a.rt) })
	return err
}

func (a *attachment) check() (err error) {
	a.n.Do(a.n.t, func() { err = a.n.cni.CheckNetworkList(context.Background(), a.list, a.rt) })
	return err
}

func (n *node) sweep(path string) error {
	n.t.Helper()
	var err error
	n.Do(n.t, func() { _, err = Sweep(n.t.Context(), n.runDir, path) })
	return err
}

// wantNoDelegates sees that nothing of a delegate's is left but what pods share.
func (n *node) wantNoDelegates(after string) {
	n.t.Helper()
	left := n.Run(n.t, "iptables-save -t nat") + n.Run(n.t, "ip6tables-save -t nat")
	for line := range strings.Lines(left) {
		if strings.Contains(line, "CNI-DN-") || strings.Contains(line, "DNAT --to") {
			n.t.Errorf("after %s: left in the packet filter: %s", after, line)
		}
	}
	for line := range strings.Lines(n.portsInNft()) {
		if strings.Contains(line, "comment") && !strings.Contains(line, "portmap plugin") {
			n.t.Errorf("after %s: left in nftables: %s", after, line)
		}
	}
	if left := n.Run(n.t, "ip -brief link show type ifb"); left != "" {
		n.t.Errorf("after %s: devices: %s", after, left)
	}
}

// portsInNft is what portmap has in tables of its own.
func (n *node) portsInNft() string {
	var rules strings.Builder
	for table := range strings.Lines(n.Run(n.t, "nft list tables")) {
		if strings.HasSuffix(table, " cni_hostport\n") {
			rules.WriteString(n.Run(n.t, "nft list "+table))
		}
	}
	return rules.String()
}

// filter puts the daemon's own rules in place, those of iptables beside a firewall that forwards nothing by itself.
func (n *node) filter() {
	n.t.Helper()
	form := masq.Form(n.info.PacketFilter)
	network := subnet.Network{{Prefix: n.info.Networks[0]}, {Prefix: n.info.Networks[1]}}
	want := masq.Config{Form: form, Network: network, Subnets: n.info.Subnets, Port: 8472}.Desired()
	for _, op := range masq.Diff(want, masq.Ruleset{}) { // as commands for a shell
		var out []byte
		var err error
		n.Do(n.t, func() { out, err = exec.Command("sh", "-c", op.String()).CombinedOutput() })
		if err != nil {
			n.t.Fatalf("%s: %v: %s", op, err, out)
		}
	}
	n.Run(n.t, "sysctl -q -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")
	if form != masq.NFTables {
		n.Run(n.t, "iptables -P FORWARD DROP")
		n.Run(n.t, "ip6tables -P FORWARD DROP")
	}
}

// outside is a host beside the node.
func (n *node) outside() *netnstest.NS {
	n.t.Helper()
	out := netnstest.New(n.t)
	n.Run(n.t, "ip link add up0 type veth peer name eth0 netns "+out.Path())
	for at, ns := range map[string]*netnstest.NS{"up0 1": n.NS, "eth0 2": out} {
		dev, last, _ := strings.Cut(at, " ")
		ns.Run(n.t, "ip link set "+dev+" up")
		ns.Run(n.t, "ip address add 192.0.2."+last+"/24 dev "+dev)
		ns.Run(n.t, "ip address add 2001:db8::"+last+"/64 dev "+dev+" nodad")
	}
	return out
}

// answer has a pod say at TCP port 80 and UDP port 53 who calls.
func answer(t *testing.T, pod *netnstest.NS) {
	t.Helper()
	var tcp net.Listener
	var udp net.PacketConn
	var tcpErr, udpErr error
	pod.Do(t, func() {
		tcp, tcpErr = net.Listen("tcp", ":80")
		udp, udpErr = net.ListenPacket("udp", ":53")
	})
	if err := errors.Join(tcpErr, udpErr); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tcp.Close(); udp.Close() })
	go func() {
		for {
			conn, err := tcp.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(conn, conn.RemoteAddr())
			conn.Close()
		}
	}()
	go func() {
		for {
			_, from, err := udp.ReadFrom(make([]byte, 100))
			if err != nil {
				return
			}
			_, _ = udp.WriteTo([]byte(from.String()), from)
		}
	}()
}

// ask returns what the other end answers.
func ask(t *testing.T, from *netnstest.NS, network, addr string) (string, error) {
	t.Helper()
	var conn net.Conn
	var err error
	from.Do(t, func() { conn, err = net.DialTimeout(network, addr, 5*time.Second) })
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if network == "tcp" {
		_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
		text, err := io.ReadAll(conn)
		return string(text), err
	}
	text := make([]byte, 100)
	for range 20 { // the first one from a new namespace may be lost
		if _, err := conn.Write([]byte("?")); err != nil {
			return "", err
		}
		_ = conn.SetReadDeadline(time.Now().Add(250 * time.Millisecond))
		n, err := conn.Read(text)
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return string(text[:n]), err
		}
	}
	return "", os.ErrDeadlineExceeded
}

func TestHostPortCannotBeReached(t *testing.T) {
	for form, flush := range map[string]string{
		"iptables": "iptables -t nat -F CNI-HOSTPORT-DNAT",
		"nftables": "nft flush chain ip cni_hostport hostports",
	} {
		t.Run(form, func(t *testing.T) {
			n := newNode(t, subnet4, subnet6)
			n.info.PacketFilter = form
			n.publish(n.info)
			n.filter()
			outside := n.outside()
			pod, other := netnstest.New(t), netnstest.New(t)
			a := n.wishing("one", pod, webAndDNS())
			r := a.mustAdd()
			n.mustAdd("two", other)
			answer(t, pod)
			if len(r.Interfaces) != 2 || len(r.IPs) != 2 || r.CNIVersion != "1.1.0" || r.Interfaces[1].Mtu != 1430 {
				t.Errorf("result: %+v", r)
			}
			wantHostPorts(t, n, outside, pod, other)
			if err := a.check(); err != nil {
				t.Errorf("CHECK: %v", err)
			}
			n.Run(t, flush)
			if err := a.check(); err == nil || !strings.Contains(err.Error(), "portmap") {
				t.Errorf("CHECK without the rules: %v", err)
			}
			for _, which := range []string{"first", "second"} {
				if err := a.del(); err != nil {
					t.Errorf("%s DEL: %v", which, err)
				}
			}
			if err := n.del("two", other.Path()); err != nil {
				t.Error(err)
			}
			if seen, err := ask(t, outside, "tcp", "192.0.2.1:8080"); err == nil {
				t.Errorf("after DEL somebody answers: %s", seen)
			}
			n.Run(t, "ip link del up0")
			n.wantNothing("DEL")
			n.wantNoDelegates("DEL")
		})
	}
}

// wantHostPorts calls webAndDNS's ports from everywhere.
func wantHostPorts(t *testing.T, n *node, outside, pod, other *netnstest.NS) {
	t.Helper()
	for _, tt := range []struct {
		who  string
		from *netnstest.NS
		host string
		seen string // the address that the pod is called from, where it must be a certain one
	}{
		{who: "outside", from: outside, host: "192.0.2.1", seen: "192.0.2.2"},
		{who: "outside", from: outside, host: "2001:db8::1", seen: "2001:db8::2"},
		{who: "node", from: n.NS, host: "192.0.2.1"},
		{who: "node", from: n.NS, host: "2001:db8::1"},
		{who: "node itself", from: n.NS, host: "127.0.0.1", seen: "10.244.3.1"},
		{who: "another pod", from: other, host: "192.0.2.1"},
		{who: "another pod", from: other, host: "2001:db8::1"},
		{who: "another pod", from: other, host: "10.244.3.1"},
		{who: "another pod", from: other, host: "fd00:10:244:3::1"},
		{who: "the same pod", from: pod, host: "192.0.2.1", seen: "10.244.3.1"},
		{who: "the same pod", from: pod, host: "2001:db8::1", seen: "fd00:10:244:3::1"},
		{who: "the same pod", from: pod, host: "10.244.3.1", seen: "10.244.3.1"},
		{who: "the same pod", from: pod, host: "fd00:10:244:3::1", seen: "fd00:10:244:3::1"},
	} {
		for network, port := range map[string]string{"tcp": "8080", "udp": "8053"} {
			seen, err := ask(t, tt.from, network, net.JoinHostPort(tt.host, port))
			if who, _, _ := net.SplitHostPort(seen); err != nil || tt.seen != "" && who != tt.seen {
				t.Errorf("%s, %s at %s: %q, %v", tt.who, network, tt.host, seen, err)
			}
		}
	}
}

// pathWith is a PATH that leads to one program.
func pathWith(t *testing.T, program string) (dir string) {
	t.Helper()
	file, err := exec.LookPath(program)
	if err != nil {
		t.Fatal(err)
	}
	return fakes(t, map[string]string{program: `exec ` + file + ` "$@"`})
}

// TestPortsAreWrittenInAnotherForm than the node's packet filter, though they need not be.
func TestPortsAreWrittenInAnotherForm(t *testing.T) {
	both, older := os.Getenv("PATH"), []string{pluginDirWithout(t, "portmap"), debian}
	for _, tt := range []struct {
		name, form, path string
		plugins          []string
		nft              bool
	}{
		{"iptables", "iptables", both, nil, false},
		{"nftables", "nftables", both, nil, true},
		{"a daemon that does not say", "", both, nil, false},
		{"nftables without nft", "nftables", pathWith(t, "iptables"), nil, false},
		{"iptables without iptables", "iptables", pathWith(t, "nft"), nil, true},
		{"a portmap that knows iptables alone", "nftables", both, older, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t, subnet4)
			if tt.plugins != nil {
				n.usePlugins(tt.plugins...)
			}
			n.info.PacketFilter = tt.form
			n.publish(n.info)
			a := n.wishing("one", netnstest.New(t), webAndDNS())
			t.Setenv("PATH", tt.path)
			a.mustAdd()
			t.Setenv("PATH", both)
			if nft := strings.Contains(n.portsInNft(), "dnat to 10.244.3.2:80"); nft != tt.nft {
				t.Errorf("in nft: %t", nft)
			}
			if out := n.Run(t, "iptables-save -t nat"); strings.Contains(out, "DNAT --to-destination 10.244.3.2:80") == tt.nft {
				t.Errorf("iptables: %s", out)
			}
			n.info.PacketFilter = map[string]string{"nftables": "iptables"}[tt.form]
			n.publish(n.info)
			n.usePlugins(pluginDir(t))
			if err := a.del(); err != nil {
				t.Errorf("DEL where all is different: %v", err)
			}
			n.wantNothing("DEL")
			n.wantNoDelegates("DEL")
		})
	}
}

func TestInterfacesOfAPodShareAWish(t *testing.T) {
	n := newNode(t, subnet4, subnet6)
	pod := netnstest.New(t)
	var all []*attachment
	for i, iface := range []string{"eth0", "net1"} {
		a := n.further("one", pod, iface)
		a.rt.CapabilityArgs = wishes{"portMappings": []port{{8080 + i, 80, "tcp"}}, "bandwidth": slow()["bandwidth"]}
		a.mustAdd()
		all = append(all, a)
	}
	if err := all[1].del(); err != nil {
		t.Error(err)
	}
	if err := all[0].check(); err != nil {
		t.Errorf("CHECK of the first after DEL of the second: %v", err)
	}
	if err := all[0].del(); err != nil {
		t.Error(err)
	}
	n.wantNothing("DEL")
	n.wantNoDelegates("DEL")
}

func TestPodIsNotLimited(t *testing.T) {
	n := newNode(t, subnet4)
	a := n.wishing("one", netnstest.New(t), both())
	r := a.mustAdd()
	if len(r.Interfaces) != 3 || !strings.HasPrefix(r.Interfaces[2].Name, "bwp") {
		t.Fatalf("result: %v", r.Interfaces)
	}
	for dev, rate := range map[string]string{vethName("one", "eth0"): "rate 8Mbit", r.Interfaces[2].Name: "rate 16Mbit"} {
		if out := n.Run(t, "tc qdisc show dev "+dev); !strings.Contains(out, "tbf") || !strings.Contains(out, rate) {
			t.Errorf("%s: %s", dev, out)
		}
	}
	if err := a.check(); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	n.Run(t, "tc qdisc replace dev "+vethName("one", "eth0")+" root tbf rate 1mbit burst 100kb latency 25ms")
	if err := a.check(); err == nil || !strings.Contains(err.Error(), "bandwidth") {
		t.Errorf("CHECK with another limit: %v", err)
	}
	if err := a.del(); err != nil {
		t.Error(err)
	}
	n.wantNothing("DEL")
	n.wantNoDelegates("DEL")
}

// fakes makes a directory of programs, each a shell script.
func fakes(t *testing.T, scripts map[string]string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for name, script := range scripts {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func pluginDir(t *testing.T) string {
	t.Helper()
	bin, err := plugin()
	if err != nil {
		t.Fatal(err)
	}
	return bin
}

func TestPodThatAsksForNothingStartsProcesses(t *testing.T) {
	n := newNode(t, subnet4)
	called := filepath.Join(t.TempDir(), "called")
	scream := "echo $0 $CNI_COMMAND >> " + called + "; exit 1"
	n.usePlugins(fakes(t, map[string]string{"portmap": scream, "bandwidth": scream}), pluginDir(t))
	for _, w := range []wishes{
		nil,
		{"portMappings": []port{}},
		{"portMappings": nil, "bandwidth": nil},
		{"bandwidth": struct{ IngressRate, IngressBurst uint64 }{}},
		{"bandwidth": map[string]int{"ingressRate": 0, "egressBurst": 0}},
	} {
		a := n.wishing("one", netnstest.New(t), w)
		a.mustAdd()
		if err := errors.Join(a.check(), a.del(), a.del()); err != nil {
			t.Errorf("%v: %v", w, err)
		}
	}
	if text, err := os.ReadFile(called); err == nil {
		t.Errorf("called: %s", text)
	}
	n.wantNothing("DEL")
}

func TestHostHasOlderPlugins(t *testing.T) {
	n := newNode(t, subnet4, subnet6)
	n.usePlugins(pluginDirWithout(t, "portmap", "bandwidth"), debian)
	a := n.wishing("one", netnstest.New(t), both())
	if r := a.mustAdd(); len(r.Interfaces) != 3 || r.CNIVersion != "1.1.0" {
		t.Errorf("result: %v", r)
	}
	if out := n.Run(t, "iptables-save -t nat"); !strings.Contains(out, "DNAT --to-destination 10.244.3.2:80") {
		t.Errorf("rules: %s", out)
	}
	if err := a.del(); err != nil { // CHECK of their portmap fails by itself: it looks for rules of a family without ports
		t.Error(err)
	}
	n.wantNothing("DEL")
	n.wantNoDelegates("DEL")
}

// pluginDirWithout is a directory with all plugins but those.
func pluginDirWithout(t *testing.T, without ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range names(t, pluginDir(t)) {
		if slices.Contains(without, name) {
			continue
		}
		if err := os.Link(filepath.Join(pluginDir(t), name), filepath.Join(dir, name)); err != nil {
			if err = os.Symlink(filepath.Join(pluginDir(t), name), filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	return dir
}

func TestRuntimeSpeaksAnOlderVersionToPodsWithPorts(t *testing.T) {
	n := newNode(t, subnet4, subnet6)
	for _, version := range []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0"} {
		a := n.wishing("c"+version, netnstest.New(t), both())
		a.list = n.conflist(version)
		if r := a.mustAdd(); len(r.IPs) != 2 {
			t.Errorf("%s: result: %v", version, r)
		}
		if version > "0.3.1" { // older ones have no CHECK
			if err := a.check(); err != nil {
				t.Errorf("%s: CHECK: %v", version, err)
			}
		}
		if err := a.del(); err != nil {
			t.Errorf("%s: DEL: %v", version, err)
		}
	}
	n.wantNothing("DEL")
	n.wantNoDelegates("DEL")
}

func TestPluginForThePortsIsMissing(t *testing.T) {
	n := newNode(t, subnet4)
	dir := pluginDirWithout(t, "portmap")
	n.usePlugins(dir, "/run/none")
	_, err := n.wishing("one", netnstest.New(t), both()).add()
	wantCode(t, "ADD", err, 4, "CNI_PATH", dir+":/run/none", "portmap", "hostPort", "tweed install")
	n.wantNothing("the failed ADD")
	n.wantNoDelegates("the failed ADD")
}

func TestDelegatesAreToldSomethingElse(t *testing.T) {
	n := newNode(t, subnet4)
	log := filepath.Join(t.TempDir(), "log")
	note := `echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME ${CNI_NETNS:+netns }$CNI_ARGS" >> ` + log + `
		cat >> ` + log + `
		echo >> ` + log + `
		echo '{"cniVersion": "1.0.0", "interfaces": [{"name": "'$(basename $0)'"}]}'`
	n.usePlugins(fakes(t, map[string]string{"portmap": note, "bandwidth": note}), pluginDir(t))
	a := n.wishing("one", netnstest.New(t), wishes{"portMappings": []port{{8080, 80, "tcp"}},
		"bandwidth": map[string]int{"ingressRate": 8, "ingressBurst": 8}})
	a.rt.Args = [][2]string{{"K8S_POD_NAME", "web"}}
	r := a.mustAdd()
	if err := a.del(); err != nil {
		t.Error(err)
	}
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Interfaces) != 1 || r.Interfaces[0].Name != "bandwidth" {
		t.Errorf("the result is not the last one's: %v", r.Interfaces)
	}
	first := regexp.MustCompile(`"prevResult":\{"cniVersion":"1.0.0",.*"10.244.3.2/24".*\}`)
	got := first.ReplaceAllString(string(text), `"prevResult":"ours"}`)
	const ports = `{"cniVersion":"1.0.0","name":"tweed","type":"portmap","snat":true,"backend":"iptables",` +
		`"runtimeConfig":{"portMappings":[{"hostPort":8080,"containerPort":80,"protocol":"tcp"}]}`
	const limit = `{"cniVersion":"1.0.0","name":"tweed","type":"bandwidth",` +
		`"runtimeConfig":{"bandwidth":{"ingressBurst":8,"ingressRate":8}}`
	want := []string{
		"ADD one eth0 netns K8S_POD_NAME=web", ports + `,"prevResult":"ours"}`,
		"ADD one eth0 netns K8S_POD_NAME=web",
		limit + `,"prevResult":{"cniVersion":"1.0.0","interfaces":[{"name":"portmap"}]}}`,
		"DEL one eth0 K8S_POD_NAME=web", limit + "}",
		"DEL one eth0 K8S_POD_NAME=web", ports + "}",
	}
	if got != strings.Join(want, "\n")+"\n" {
		t.Errorf("calls:\n%s\nwant:\n%s", got, strings.Join(want, "\n"))
	}
	n.wantNothing("DEL")
}

func TestSecondDelegateFails(t *testing.T) {
	n := newNode(t, subnet4, subnet6)
	calls := filepath.Join(t.TempDir(), "calls")
	for says, script := range map[string]string{
		"no tokens; left":         `echo '{"code": 123, "msg": "no tokens", "details": "left"}'`,
		"exit status 3 it is hot": "echo it is hot >&2; exit 3",
		"old; put a newer one":    `echo '{"code": 1, "msg": "too old"}'`,
		"result":                  "exit 0",
	} {
		// Only its ADD fails.
		script = "echo $CNI_COMMAND >> " + calls + "\ncat > /dev/null\n[ $CNI_COMMAND = DEL ] && exit\n" + script + "\n" +
			"[ '" + says + "' = result ] || exit 3\n"
		n.usePlugins(fakes(t, map[string]string{"bandwidth": script}), pluginDir(t))
		_, err := n.wishing("one", netnstest.New(t), both()).add()
		if err == nil || !strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), "bandwidth") {
			t.Errorf("%s: ADD: %v", says, err)
		}
		n.wantNothing("the failed ADD")
		n.wantNoDelegates("the failed ADD")
	}
	if text, err := os.ReadFile(calls); err != nil || string(text) != strings.Repeat("ADD\nDEL\n", 4) {
		t.Errorf("calls: %s, %v", text, err)
	}
}

func TestHostHasNeitherIptablesNorNft(t *testing.T) {
	n := newNode(t, subnet4)
	a := n.wishing("one", netnstest.New(t), webAndDNS())
	path := os.Getenv("PATH")
	t.Setenv("PATH", "/run/none")
	for _, form := range []string{"iptables", "nftables"} {
		n.info.PacketFilter = form
		n.publish(n.info)
		_, err := a.add()
		wantCode(t, form, err, 4, "a hostPort needs the program iptables or nft", "neither is in /run/none", "install")
	}
	t.Setenv("PATH", path)
	n.wantNothing("an ADD that was refused")
	a.mustAdd()
	t.Setenv("PATH", "/run/none")
	// Nobody here can tell whether there are rules. The daemon, in its image, can.
	if err := a.del(); err == nil || !strings.Contains(err.Error(), "[10.244.3.2/24] stay taken") {
		t.Errorf("DEL: %v", err)
	}
	t.Setenv("PATH", path)
	if err := n.sweep(pluginDir(t)); err != nil {
		t.Error(err)
	}
	n.wantNothing("the sweep")
	t.Setenv("PATH", "/run/none")
	if err := a.del(); err != nil {
		t.Errorf("DEL after the sweep: %v", err)
	}
}

func TestHostHasNftAndAPortmapWithout(t *testing.T) {
	n := newNode(t, subnet4)
	n.usePlugins(pluginDirWithout(t, "portmap"), debian)
	a := n.wishing("one", netnstest.New(t), webAndDNS())
	path, dir := os.Getenv("PATH"), pathWith(t, "nft")
	t.Setenv("PATH", dir)
	_, err := a.add()
	t.Setenv("PATH", path)
	wantCode(t, "ADD", err, 4, debian+"/portmap cannot use nft", "iptables", dir, "portmap 1.6")
	n.wantNothing("an ADD that was refused")
}

func TestDelIsLost(t *testing.T) {
	n := newNode(t, subnet4, subnet6)
	n.wishing("one", netnstest.New(t), both()).mustAdd()
	n.Run(t, "ip link del "+vethName("one", "eth0"))
	if err := n.sweep("/run/none:/run/nowhere"); err == nil || !strings.Contains(err.Error(), "/run/none:/run/nowhere") {
		t.Errorf("sweep without plugins: %v", err)
	}
	if left := names(t, filepath.Join(n.runDir, "addrs")); len(left) != 2 {
		t.Errorf("while the rules stand, the addresses that are taken: %v", left)
	}
	if err := n.sweep("/run/none:" + pluginDir(t)); err != nil {
		t.Errorf("sweep: %v", err)
	}
	n.wantNothing("the sweep")
	n.wantNoDelegates("the sweep")
}

func TestPluginIsMissingAtDel(t *testing.T) {
	n := newNode(t, subnet4)
	a := n.wishing("one", netnstest.New(t), both())
	a.mustAdd()
	n.usePlugins(pluginDirWithout(t, "portmap"))
	if err := a.del(); err == nil || !strings.Contains(err.Error(), "CNI_PATH") {
		t.Errorf("DEL: %v", err)
	}
	if left := n.ports(); len(left) > 0 {
		t.Errorf("veths: %v", left)
	}
	if left := names(t, filepath.Join(n.runDir, "addrs")); len(left) != 1 {
		t.Errorf("while the rules stand, the addresses that are taken: %v", left)
	}
	if err := n.sweep(pluginDir(t)); err != nil {
		t.Error(err)
	}
	if err := a.del(); err != nil {
		t.Errorf("DEL after the sweep: %v", err)
	}
	n.wantNothing("the sweep")
	n.wantNoDelegates("the sweep")
}

func TestRecordOfPodWithPortsIsLost(t *testing.T) {
	for name, lose := range map[string]func(n *node) error{
		"removed": func(n *node) error { return os.RemoveAll(n.runDir) },
		"emptied": func(n *node) error { return os.Truncate(filepath.Join(n.runDir, "pods", vethName("one", "eth0")), 0) },
	} {
		n := newNode(t, subnet4, subnet6)
		a := n.wishing("one", netnstest.New(t), both())
		a.mustAdd()
		if err := lose(n); err != nil {
			t.Fatal(err)
		}
		if err := a.del(); err != nil {
			t.Errorf("%s: DEL: %v", name, err)
		}
		n.wantNothing("DEL")
		n.wantNoDelegates("DEL")
	}
}

// A gate is a portmap whose ADD waits before it does its work.
type gate struct{ dir string }

func newGate(t *testing.T) gate {
	g := gate{t.TempDir()}
	script := "cd " + g.dir + `
		if [ $CNI_COMMAND = ADD ]; then
			touch reached
			while [ ! -e open ]; do sleep 0.01; done
		fi
		exec ` + pluginDir(t) + "/portmap"
	if err := os.WriteFile(filepath.Join(g.dir, "portmap"), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	return g
}

func (g gate) reached() bool {
	_, err := os.Stat(filepath.Join(g.dir, "reached"))
	return err == nil
}

func (g gate) open(t *testing.T) {
	if err := os.WriteFile(filepath.Join(g.dir, "open"), nil, 0o644); err != nil {
		t.Error(err)
	}
}

// start begins an ADD of a pod with ports and returns when it is at the gate.
func (n *node) start(g gate, pod *netnstest.NS) *exec.Cmd {
	n.t.Helper()
	ports, err := json.Marshal(webAndDNS())
	if err != nil {
		n.t.Fatal(err)
	}
	cmd := n.command("ADD", "one", pod.Path(), fmt.Sprintf(
		`{"cniVersion": "1.1.0", "name": "tweed", "type": "tweed-cni", "runDir": %q, "runtimeConfig": %s}`, n.runDir, ports))
	cmd.Env = append(cmd.Env, "PATH="+os.Getenv("PATH"), "CNI_PATH="+g.dir)
	cmd.Stdout, cmd.WaitDelay = &strings.Builder{}, time.Minute
	n.Do(n.t, func() { err = cmd.Start() })
	if err != nil {
		n.t.Fatal(err)
	}
	await(n.t, "the delegate to be called", g.reached)
	return cmd
}

func TestAddIsKilledWhileADelegateWorks(t *testing.T) {
	n := newNode(t, subnet4, subnet6)
	pod, g := netnstest.New(t), newGate(t)
	cmd := n.start(g, pod)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := cmd.Process.Wait(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- n.wishing("one", pod, webAndDNS()).del() }()
	await(t, "DEL to wait for what the delegate does", func() bool { return len(done) > 0 || somebodyWaitsForALock(t) })
	if len(done) > 0 {
		t.Error("DEL did not wait for the delegate")
	}
	g.open(t)
	if err := <-done; err != nil {
		t.Errorf("DEL: %v", err)
	}
	n.wantNothing("DEL")
	n.wantNoDelegates("DEL")
}

// somebodyWaitsForALock looks at threads: /proc/locks is silent on locks whose first owner has ended.
func somebodyWaitsForALock(t *testing.T) bool {
	t.Helper()
	threads, err := filepath.Glob("/proc/[0-9]*/task/*/wchan")
	if err != nil || len(threads) == 0 {
		t.Fatal("no threads", err)
	}
	return slices.ContainsFunc(threads, func(file string) bool {
		text, err := os.ReadFile(file)
		return err == nil && string(text) == "locks_lock_inode_wait"
	})
}

func TestAddIsKilledWhileADelegateWorksAndThereIsNoDel(t *testing.T) {
	n := newNode(t, subnet4, subnet6)
	g := newGate(t)
	cmd := n.start(g, netnstest.New(t))
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := cmd.Process.Wait(); err != nil {
		t.Fatal(err)
	}
	n.Run(t, "ip link del "+vethName("one", "eth0"))
	if err := n.sweep(pluginDir(t)); err != nil {
		t.Errorf("sweep: %v", err)
	}
	if left := names(t, filepath.Join(n.runDir, "pods")); len(left) != 1 {
		t.Errorf("the sweep did not wait for the delegate; records: %v", left)
	}
	g.open(t)
	await(t, "a sweep that finds the delegate gone", func() bool {
		if err := n.sweep(pluginDir(t)); err != nil {
			t.Error(err)
		}
		return len(names(t, filepath.Join(n.runDir, "pods"))) == 0
	})
	n.wantNothing("the sweep")
	n.wantNoDelegates("the sweep")
}

func TestAddIsTerminatedWhileADelegateWorks(t *testing.T) {
	n := newNode(t, subnet4, subnet6)
	g := newGate(t)
	cmd := n.start(g, netnstest.New(t))
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	g.open(t)
	err := cmd.Wait()
	if out := fmt.Sprint(cmd.Stdout); err == nil || !strings.Contains(out, "interrupted") {
		t.Errorf("ADD: %v, %s", err, out)
	}
	n.wantNothing("SIGTERM")
	n.wantNoDelegates("SIGTERM")
}

func TestHostHasNftAlone(t *testing.T) {
	n := newNode(t, subnet4)
	a := n.wishing("one", netnstest.New(t), webAndDNS())
	path := os.Getenv("PATH")
	t.Setenv("PATH", pathWith(t, "nft"))
	a.mustAdd()
	t.Setenv("PATH", path)
	if out := n.Run(t, "nft list table ip cni_hostport"); !strings.Contains(out, "dnat") {
		t.Errorf("rules: %s", out)
	}
	n.Run(t, "ip link del "+vethName("one", "eth0"))
	t.Setenv("PATH", "/run/none")
	if err := n.sweep(pluginDir(t)); err == nil || !strings.Contains(err.Error(), "nft is not in /run/none") {
		t.Errorf("sweep without nft: %v", err)
	}
	t.Setenv("PATH", path)
	if err := n.sweep(pluginDir(t)); err != nil { // with iptables at hand
		t.Error(err)
	}
	if out := n.Run(t, "nft list ruleset"); strings.Contains(out, "dnat") {
		t.Errorf("after the sweep: %s", out)
	}
	n.wantNothing("the sweep")
}

func TestHostHasTheOlderIptables(t *testing.T) {
	dir := fakes(t, map[string]string{ // as some hosts have them: scripts that choose
		"iptables":  `exec /usr/sbin/iptables-legacy "$@"`,
		"ip6tables": `exec /usr/sbin/ip6tables-legacy "$@"`,
	})
	n := newNode(t, subnet4, subnet6)
	a := n.wishing("one", netnstest.New(t), webAndDNS())
	path := os.Getenv("PATH")
	t.Setenv("PATH", dir+":"+path)
	a.mustAdd()
	t.Setenv("PATH", path)
	rules := func() string { return n.Run(t, "iptables-legacy -t nat -S") + n.Run(t, "ip6tables-legacy -t nat -S") }
	for _, to := range []string{"10.244.3.2:80", "[fd00:10:244:3::3]:80"} {
		if out := rules(); !strings.Contains(out, "DNAT --to-destination "+to) {
			t.Errorf("no rule to %s: %s", to, out)
		}
	}
	n.Run(t, "ip link del "+vethName("one", "eth0"))
	if err := n.sweep(pluginDir(t)); err != nil { // with the newer iptables first
		t.Error(err)
	}
	if out := rules(); strings.Contains(out, "DNAT --to") {
		t.Errorf("after the sweep: %s", out)
	}
	if left, err := filepath.Glob(n.runDir + "/.iptables-*"); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	n.wantNothing("the sweep")
}

// TestPodCannotReachItselfByAService has what kube-proxy writes for a Service whose only endpoint is the pod that calls.
func TestPodCannotReachItselfByAService(t *testing.T) {
	n := newNode(t, subnet4, subnet6)
	n.filter()
	pod, other := netnstest.New(t), netnstest.New(t)
	n.mustAdd("one", pod)
	n.mustAdd("two", other)
	answer(t, pod)
	for iptables, s := range map[string]struct{ service, endpoint, gateway string }{
		"iptables":  {"10.96.0.10", "10.244.3.2", "10.244.3.1"},
		"ip6tables": {"fd00:10:96::a", "fd00:10:244:3::3", "fd00:10:244:3::1"},
	} {
		for protocol, port := range map[string]string{"tcp": "80", "udp": "53"} {
			match := "-d " + s.service + " -p " + protocol + " --dport " + port
			for _, rule := range []string{
				"PREROUTING -s " + s.endpoint + " " + match + " -j MARK --set-xmark 0x4000/0x4000",
				"PREROUTING " + match + " -j DNAT --to-destination " + net.JoinHostPort(s.endpoint, port),
			} {
				n.Run(t, iptables+" -t nat -A "+rule)
			}
		}
		n.Run(t, iptables+" -t nat -A POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE")
		for network, port := range map[string]string{"tcp": "80", "udp": "53"} {
			for who, from := range map[string]*netnstest.NS{s.gateway: pod, "": other} {
				seen, err := ask(t, from, network, net.JoinHostPort(s.service, port))
				if by, _, _ := net.SplitHostPort(seen); err != nil || who != "" && by != who {
					t.Errorf("%s at %s: %q, %v", network, s.service, seen, err)
				}
			}
		}
	}
}

func TestHostPortCannotBeReachedWhereThereIsOneFamily(t *testing.T) {
	for _, tt := range []struct{ subnet, outside, node, pod, gateway string }{
		{subnet4, "192.0.2.2", "192.0.2.1", "10.244.3.2", "10.244.3.1"},
		{subnet6, "2001:db8::2", "2001:db8::1", "fd00:10:244:3::3", "fd00:10:244:3::1"},
	} {
		n := newNode(t, tt.subnet)
		n.filter()
		outside, pod := n.outside(), netnstest.New(t)
		a := n.wishing("one", pod, webAndDNS())
		if r := a.mustAdd(); len(r.IPs) != 1 || r.IPs[0].Address.IP.String() != tt.pod {
			t.Errorf("result: %v", r)
		}
		answer(t, pod)
		for want, from := range map[string]*netnstest.NS{tt.outside: outside, tt.gateway: pod} {
			for network, port := range map[string]string{"tcp": "8080", "udp": "8053"} {
				seen, err := ask(t, from, network, net.JoinHostPort(tt.node, port))
				if who, _, _ := net.SplitHostPort(seen); err != nil || who != want {
					t.Errorf("%s at %s: %q, %v", network, tt.node, seen, err)
				}
			}
		}
		if err := a.check(); err != nil {
			t.Errorf("CHECK: %v", err)
		}
		if err := a.del(); err != nil {
			t.Error(err)
		}
		n.wantNoDelegates("DEL")
	}
}
