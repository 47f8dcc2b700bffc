package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tweed.dev/tweed/backend/kernel/netnstest"
	"tweed.dev/tweed/backend/masq"
)

// cniPlugin builds tweed-cni, once, into the /run of the tests, which goes with them.
var cniPlugin = sync.OnceValues(func() ([]byte, error) {
	cmd := exec.Command("go", "build", "-o", "/run/cleanup/", "../tweed-cni")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("building tweed-cni: %w\n%s", err, out)
	}
	return os.ReadFile("/run/cleanup/tweed-cni")
})

// A leaving node is one that tweed is to be removed from. Others have things of theirs on it.
type leaving struct {
	host
	leases, dir, run, conf, bin string
}

func newLeaving(t *testing.T) *leaving {
	t.Helper()
	plugin, err := cniPlugin()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	n := &leaving{newHost(t), filepath.Join(dir, "leases"), dir, filepath.Join(dir, "run"), filepath.Join(dir, "cni"),
		filepath.Join(dir, "bin")}
	for _, d := range []string{n.leases, n.bin} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	n.configure(masq.IPTables, `,"DirectRouting":true`)
	n.write("leases/n1.json", `{"node":"n1","since":"2026-01-02T03:04:05Z","subnets":"10.244.1.0/24,fd00:10:244:1::/64"}`)
	n.write("leases/n2.json", `{"node":"n2","since":"2026-01-02T03:04:06Z","subnets":"10.244.2.0/24,fd00:10:244:2::/64",`+
		`"host":"192.0.2.12","backend":"vxlan","backend-data":{"vni":1,"port":8472,"mac":"0e:00:00:00:00:02"}}`)
	if err := os.WriteFile(filepath.Join(n.bin, "tweed-cni"), plugin, 0o755); err != nil {
		t.Fatal(err)
	}
	world := newHost(t)
	cable(n.host, "eth0", world, "eth0")
	world.types("ip link set eth0 up")
	// Forwarding is a setting of the host, and stays; with it the kernel has routes of its own.
	n.types(`
		sysctl -q -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
		ip link set eth0 up
		ip addr add 192.0.2.11/24 dev eth0
		ip addr add 2001:db8::11/64 dev eth0 nodad
		ip route add default via 192.0.2.1`)
	n.strangers()
	return n
}

// strangers puts on the node what tweed must leave alone.
func (n *leaving) strangers() {
	n.types(`
		ip link add br-theirs address 0e:00:00:00:0b:01 type bridge
		ip link set br-theirs up
		ip addr add 10.88.0.1/16 dev br-theirs
		ip link add theirs address 0e:00:00:00:0b:02 type veth peer name others address 0e:00:00:00:0b:03
		ip link set theirs master br-theirs
		ip link set theirs up
		ip link set others up
		ip link add flannel.7 address 0e:00:00:00:0b:04 type vxlan id 7 dstport 4789 local 192.0.2.11 dev eth0
		ip link set flannel.7 up
		bridge fdb append 0e:00:00:00:0b:05 dev flannel.7 dst 192.0.2.13
		ip neigh add 10.88.0.9 lladdr 0e:00:00:00:0b:06 dev br-theirs nud permanent
		ip route add 10.9.0.0/24 via 192.0.2.1 proto static
		ip route add 10.9.1.0/24 dev eth0 proto 117 table 100
		ip -6 route add fd00:9::/64 via 2001:db8::1 proto static
		ip rule add pref 100 from 10.9.0.0/24 lookup 100
		nft add table inet guard
		nft add chain inet guard in { type filter hook input priority 5 ; }
		nft add rule inet guard in tcp dport 22 accept
		ipset create theirs hash:ip
		ipset create tweed-theirs hash:net
		ipset add theirs 192.0.2.12`)
	for _, program := range []string{"iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy"} {
		for _, rule := range []string{
			"-N KUBE-FORWARD", "-A KUBE-FORWARD -m comment --comment theirs -j ACCEPT", "-A FORWARD -j KUBE-FORWARD",
			"-N DOCKER-USER", "-A FORWARD -j DOCKER-USER", "-A DOCKER-USER -j DROP",
			"-t nat -A POSTROUTING -m mark --mark 0x8000/0x8000 -j ACCEPT", "-A INPUT -p tcp --dport 23 -j DROP",
			"-t nat -A POSTROUTING -j MASQUERADE",
			"-t mangle -A INPUT -p tcp --dport 24 -j ACCEPT", "-t mangle -A FORWARD -p tcp --dport 24 -j ACCEPT",
			"-t mangle -A PREROUTING -p tcp --dport 24 -j ACCEPT",
			"-t raw -A PREROUTING -p tcp --dport 24 -j CT --notrack", "-t raw -A OUTPUT -p tcp --sport 24 -j CT --notrack",
		} {
			n.Run(n.t, program+" "+rule)
		}
	}
	n.settle()
}

// configure says how daemons to come write the packet filter, and more of how they reach others.
func (n *leaving) configure(form masq.Form, more ...string) {
	n.t.Helper()
	n.write("net-conf.json", fmt.Sprintf(`{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/48",
		"PacketFilter":%q,"Backend":{"Type":"vxlan"%s}}`, form, strings.Join(more, "")))
}

// settle waits for the kernel to take up IPv6 addresses, and the routes that come with them.
func (n *leaving) settle() {
	n.t.Helper()
	n.awaits("ip -6 addr show tentative", func(out string) bool { return out == "" })
}

// awaits waits until a command prints something of which ok is true.
func (n *leaving) awaits(command string, ok func(out string) bool) {
	n.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; {
		out := n.Run(n.t, command)
		if ok(out) {
			return
		}
		if time.Now().After(deadline) {
			n.t.Fatalf("%s: after 30 s it still prints\n%s", command, out)
		}
	}
}

// write writes a file below the node's directory.
func (n *leaving) write(name, text string) {
	n.t.Helper()
	if err := os.WriteFile(filepath.Join(n.dir, name), []byte(text), 0o644); err != nil {
		n.t.Fatal(err)
	}
}

// command is one on the node.
func (n *leaving) command(args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--net=" + n.Path(), "--"}, args...)...)
}

// daemon runs the daemon until what it returns is called.
func (n *leaving) daemon() (stop func()) {
	n.t.Helper()
	cmd := n.command("tweed", "run", "--leases", n.leases, "--node-name", "n1", "--net-conf",
		filepath.Join(n.dir, "net-conf.json"), "--run-dir", n.run, "--cni-conf-dir", n.conf)
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	stop = sync.OnceFunc(func() {
		_ = cmd.Process.Signal(unix.SIGTERM)
		if err := cmd.Wait(); err != nil {
			n.t.Errorf("the daemon ends with %v:\n%s", err, log.String())
		}
	})
	n.t.Cleanup(stop)
	n.await("curl -sf http://127.0.0.1:9479/readyz")
	return stop
}

// plugin has the plugin attach or detach a pod.
func (n *leaving) plugin(verb string, pod *netnstest.NS) {
	n.t.Helper()
	cmd := n.command(filepath.Join(n.bin, "tweed-cni"))
	cmd.Env = append(os.Environ(), "CNI_COMMAND="+verb, "CNI_CONTAINERID=c1", "CNI_NETNS="+pod.Path(), "CNI_IFNAME=eth0",
		"CNI_PATH="+n.bin)
	cmd.Stdin = strings.NewReader(fmt.Sprintf(
		`{"cniVersion":"1.0.0","name":"tweed","type":"tweed-cni","runDir":%q,"capabilities":{}}`, n.run))
	if out, err := cmd.CombinedOutput(); err != nil {
		n.t.Fatalf("%s: %v\n%s", verb, err, out)
	}
}

// cleanup runs the command and returns what it prints, and its exit status.
func (n *leaving) cleanup(flags ...string) (stdout []string, stderr string, status int) {
	n.t.Helper()
	where := []string{"tweed", "cleanup", "--run-dir", n.run, "--cni-conf-dir", n.conf, "--cni-bin-dir", n.bin}
	cmd := n.command(append(where, flags...)...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		n.t.Fatal(err)
	}
	return strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n"), errs.String(), cmd.ProcessState.ExitCode()
}

// passing is what differs between two looks at the same: counts, times of day, and how long a timer has to go.
var passing = regexp.MustCompile(`(?m)^#.*\n| \[\d+:\d+\]$|_timer +[\d.]+`)

// dump is all that a person can see of the node's network.
func (n *leaving) dump() string {
	n.t.Helper()
	var all strings.Builder
	for _, c := range []string{
		"ip -d -o link", "ip -o addr", "ip -4 route show table all", "ip -6 route show table all", "ip -4 rule", "ip -6 rule",
		"ip -4 neigh show nud permanent", "ip -6 neigh show nud permanent", "bridge fdb show",
	} {
		lines := strings.Split(passing.ReplaceAllString(n.Run(n.t, c), ""), "\n")
		slices.Sort(lines)
		fmt.Fprintf(&all, "%s\n%s\n", c, strings.Join(lines, "\n"))
	}
	for _, c := range []string{
		"iptables-nft-save", "ip6tables-nft-save", "iptables-legacy-save", "ip6tables-legacy-save", "nft -s list ruleset",
		"ipset save",
	} {
		fmt.Fprintf(&all, "%s\n%s\n", c, passing.ReplaceAllString(n.Run(n.t, c), ""))
	}
	return all.String()
}

// files lists what is in the node's directories of run time, configuration and plugins.
func (n *leaving) files() (found []string) {
	n.t.Helper()
	for _, dir := range []string{n.run, n.conf, n.bin} {
		err := filepath.Walk(dir, func(path string, _ os.FileInfo, err error) error {
			if err == nil && path != n.conf && path != n.bin {
				found = append(found, path)
			}
			return nil
		})
		if err != nil {
			n.t.Fatal(err)
		}
	}
	return found
}

func same(t *testing.T, what, before, after string) {
	t.Helper()
	if before == after {
		return
	}
	is, was := strings.Split(after, "\n"), strings.Split(before, "\n")
	for _, line := range is {
		if !slices.Contains(was, line) {
			t.Errorf("%s has come to be there: %s", what, line)
		}
	}
	for _, line := range was {
		if !slices.Contains(is, line) {
			t.Errorf("%s is gone: %s", what, line)
		}
	}
	if !t.Failed() {
		t.Errorf("%s stands in another order:\n%s", what, after)
	}
}

// legacyIptables has the daemon call the older iptables until what it returns is called.
func legacyIptables(t *testing.T) (restore func()) {
	t.Helper()
	dir, path := t.TempDir(), os.Getenv("PATH")
	for _, name := range []string{"iptables", "ip6tables"} {
		real, err := exec.LookPath(name + "-legacy")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(real, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+":"+path)
	return func() { t.Setenv("PATH", path) }
}

func TestCleanupLeavesSomethingOrTakesTooMuch(t *testing.T) {
	for form, says := range map[masq.Form][]string{
		masq.IPTables: {
			"iptables-nft -t filter -F TWEED-FWD && iptables-nft -t filter -X TWEED-FWD",
			"ip6tables-nft -t filter -D DOCKER-USER ",
		},
		masq.NFTables: {
			"nft delete table ip tweed", "nft delete table ip6 tweed", "nft delete rule ip filter FORWARD handle ",
			"nft delete rule ip6 filter DOCKER-USER handle ", "nft delete rule ip nat POSTROUTING handle ",
		},
	} {
		t.Run(string(form), func(t *testing.T) { testCleanup(t, form, says) })
	}
}

func testCleanup(t *testing.T, form masq.Form, says []string) {
	n := newLeaving(t)
	before := n.dump()
	n.inUse(form)

	foretold, said, status := []string(nil), "", 0
	n.unchangedBy("--dry-run", func() { foretold, said, status = n.cleanup("--dry-run") })
	if status != 0 {
		t.Errorf("--dry-run: %d, %s", status, said)
	}
	told, said, status := n.cleanup()
	if status != 0 || !strings.Contains(said, "net.ipv4.ip_forward") {
		t.Errorf("cleanup: %d, %s", status, said)
	}
	if !slices.Equal(told, foretold) {
		t.Errorf("--dry-run says\n%s\nand cleanup\n%s", strings.Join(foretold, "\n"), strings.Join(told, "\n"))
	}
	for _, want := range append(says,
		"rm "+n.conf+"/10-tweed.conflist", "ip link del tweed.1", "ip link del tweed.9", "ip link del tweed0",
		"ip route del 10.9.5.0/24", "ip route del 10.244.2.0/24 via 192.0.2.12 dev eth0 ",
		"ip6tables-legacy -t nat -D POSTROUTING -m comment --comment tweed -j TWEED-POSTRTG", "rm -r "+n.run+"/pods",
		"rm "+n.bin+"/tweed-cni", "rm "+n.run+"/daemon.lock", "rmdir "+n.run,
	) {
		if !slices.ContainsFunc(told, func(line string) bool { return strings.HasPrefix(line, want) }) {
			t.Errorf("it does not say %q but\n%s", want, strings.Join(told, "\n"))
		}
	}
	n.isAsBefore(before)

	told, said, status = n.cleanup()
	if status != 0 || told[0] != "" || !strings.Contains(said, "nothing of tweed is left here") {
		t.Errorf("once more: %d, %v, %s", status, told, said)
	}
	n.isAsBefore(before)
}

// inUse has daemons of two configurations run on the node, and a pod come and go. Beside each cleanup refuses.
func (n *leaving) inUse(form masq.Form) {
	t := n.t
	t.Helper()
	// The host is upgraded one day, and its iptables is another. What names no set stays there.
	back := legacyIptables(t)
	n.configure(masq.IPTables, `,"Guard":false`)
	n.daemon()()
	back()
	n.configure(form, `,"DirectRouting":true`)
	stop := n.daemon()
	if saved := n.Run(t, "iptables-legacy-save"); strings.Contains(saved, "TWEED") {
		t.Errorf("the daemon leaves, in the iptables that is not in use any more,\n%s", saved)
	}
	pod := netnstest.New(t)
	n.plugin("ADD", pod)
	_, said, status := n.cleanup("--force")
	if status != 1 || !strings.Contains(said, "a daemon runs on this node (process ") ||
		!strings.Contains(said, n.run+"/daemon.lock") {
		t.Errorf("beside a daemon: %d, %s", status, said)
	}
	stop()

	// What a daemon of another configuration has left; one that runs would remove it.
	n.types(`
		ip link add tweed.9 group 116 type vxlan id 9 dstport 4790 local 192.0.2.11
		ip route add 10.9.5.0/24 via 192.0.2.1 proto 116
		ip rule add pref 116 from 10.9.5.0/24 lookup 116 protocol 116
		ip6tables-legacy -t nat -N TWEED-POSTRTG
		ip6tables-legacy -t nat -A TWEED-POSTRTG -j RETURN
		ip6tables-legacy -t nat -I POSTROUTING -m comment --comment tweed -j TWEED-POSTRTG`)
	n.settle()
	n.unchangedBy("a refusal", func() { _, said, status = n.cleanup() })
	if status != 1 || !strings.Contains(said, "pods are attached to this node (1, by tweed") ||
		!strings.Contains(said, "will then need the plugin") {
		t.Errorf("beside a pod: %d, %s", status, said)
	}
	n.unchangedBy("--dry-run --force", func() { _, said, status = n.cleanup("--dry-run", "--force") })
	if status != 0 {
		t.Errorf("--dry-run --force: %d, %s", status, said)
	}
	n.plugin("DEL", pod)
	linkdown := func(out string) bool { return strings.Contains(out, "linkdown") }
	n.awaits("ip -4 route show table main dev tweed0", linkdown) // the bridge's last port is gone
	n.awaits("ip -4 route show table local dev tweed0", linkdown)
}

// unchangedBy holds that f changes nothing.
func (n *leaving) unchangedBy(what string, f func()) {
	n.t.Helper()
	before, files := n.dump(), n.files()
	f()
	same(n.t, "after "+what+" something", before, n.dump())
	if now := n.files(); !slices.Equal(now, files) {
		n.t.Errorf("after %s there are the files %v, were %v", what, now, files)
	}
}

// isAsBefore holds that nothing of tweed is there, and all that was there before.
func (n *leaving) isAsBefore(before string) {
	n.t.Helper()
	same(n.t, "something", before, n.dump())
	if left := n.files(); len(left) > 0 {
		n.t.Errorf("there are the files %v", left)
	}
}

func TestPodIsCutOffByForce(t *testing.T) {
	n := newLeaving(t)
	before := n.dump()
	stop := n.daemon()
	pod := netnstest.New(t)
	n.plugin("ADD", pod)
	stop()
	told, said, status := n.cleanup("--force")
	if status != 0 {
		t.Errorf("--force: %d, %s", status, said)
	}
	if !strings.Contains(strings.Join(told, "\n"), "\n# freed the addresses [10.244.1.") {
		t.Errorf("it does not say whose addresses are free:\n%s", strings.Join(told, "\n"))
	}
	same(t, "something", before, n.dump())
	if left := n.files(); !slices.Equal(left, []string{n.bin + "/tweed-cni"}) {
		t.Errorf("left: %v; want the plugin, which the DEL of the pod needs", left)
	}
	n.plugin("DEL", pod)
	if told, said, status = n.cleanup(); status != 0 || !slices.Equal(told, []string{"rm " + n.bin + "/tweed-cni"}) {
		t.Errorf("when the pod is gone: %d, %v, %s", status, told, said)
	}
}

// What cannot be removed keeps nothing else from being removed, is named, and goes with another try.
func TestChainThatSomebodyElseUses(t *testing.T) {
	n := newLeaving(t)
	before := n.dump()
	n.daemon()()
	n.Run(t, "iptables-nft -A INPUT -j TWEED-FWD")
	n.write("run/theirs", "a file of somebody else")
	told, said, status := n.cleanup()
	if status != 1 || !strings.Contains(said, "iptables-nft -t filter -X TWEED-FWD: ") {
		t.Errorf("cleanup: %d, %s", status, said)
	}
	if last := told[len(told)-1]; last != "# left, because it is not tweed's: "+n.run+"/theirs" {
		t.Errorf("last it says %s", last)
	}
	if left := n.files(); !slices.Equal(left, []string{n.run, n.run + "/theirs"}) {
		t.Errorf("left: %v", left)
	}
	n.Run(t, "iptables-nft -D INPUT -j TWEED-FWD")
	if _, said, status := n.cleanup(); status != 0 {
		t.Errorf("another try: %d, %s", status, said)
	}
	same(t, "something", before, n.dump())
}

func TestNodeStillPublishesWhatIsGone(t *testing.T) {
	const node = `{"apiVersion":"v1","kind":"Node","metadata":{"name":"n1","uid":"u1","resourceVersion":"7","annotations":{
"tweed.dev/subnets":"10.244.1.0/24","tweed.dev/claim":"10.244.1.0/24 abc","tweed.dev/sources":"192.0.2.9","other":"x"}}}`
	var patches []string
	kubeconfig := apiServer(t, func(method, path string, body []byte) (int, string) {
		if path != "/api/v1/nodes/n1" {
			t.Errorf("%s %s", method, path)
		}
		if method == http.MethodPatch {
			patches = append(patches, string(body))
			return 200, `{"apiVersion":"meta.k8s.io/v1","kind":"PartialObjectMetadata","metadata":{"name":"n1"}}`
		}
		return 200, node
	})
	dir := t.TempDir()
	args := []string{"cleanup", "--annotations", "--node-name", "n1", "--kubeconfig", kubeconfig, "--run-dir",
		filepath.Join(dir, "run"), "--cni-conf-dir", dir, "--cni-bin-dir", dir}
	const say = "kubectl annotate node n1 tweed.dev/subnets- tweed.dev/claim-\n"
	out, err := tweed(t, append(args, "--dry-run")...)
	if err != nil || out != say || len(patches) > 0 {
		t.Errorf("--dry-run: %v, %v, %s", err, patches, out)
	}
	out, err = tweed(t, args...)
	if err != nil || out != say {
		t.Errorf("it ends with %v and says\n%s", err, out)
	}
	want := []string{`{"metadata":{"annotations":{"tweed.dev/claim":null,"tweed.dev/subnets":null},` +
		`"resourceVersion":"7","uid":"u1"}}`}
	if !slices.Equal(patches, want) {
		t.Errorf("it wrote %q, want %q", patches, want)
	}
}

// A pod of a DaemonSet that ended would be started again, and again.
func TestCleanupEndsAlthoughItShouldStay(t *testing.T) {
	dir := t.TempDir()
	ctx, end := context.WithCancel(t.Context())
	defer end()
	said, stderr := io.Pipe()
	cmd := rootCommand()
	cmd.SetArgs([]string{"cleanup", "--stay", "--run-dir", filepath.Join(dir, "run"), "--cni-conf-dir", dir,
		"--cni-bin-dir", dir})
	cmd.SetOut(io.Discard)
	cmd.SetErr(stderr)
	ended := make(chan error, 1)
	go func() { ended <- errors.Join(cmd.ExecuteContext(ctx), stderr.Close()) }()
	line := make([]byte, 100)
	n, err := said.Read(line)
	if err != nil || !strings.Contains(string(line[:n]), "nothing of tweed is left here") {
		t.Fatalf("it says %q (%v)", line[:n], err)
	}
	go func() { _, _ = io.Copy(io.Discard, said) }()
	select {
	case err := <-ended:
		t.Fatalf("it ends by itself, with %v", err)
	case <-time.After(200 * time.Millisecond): // there is nothing to wait for
	}
	end()
	if err := <-ended; err != nil {
		t.Errorf("it ends with %v", err)
	}
}
