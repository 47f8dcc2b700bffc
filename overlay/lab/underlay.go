package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// The underlay's networks are set aside for documentation (RFC 5737, RFC 3849): no machine has them.
const (
	gateway4 = "192.0.2.1"
	gateway6 = "2001:db8::1"
)

// nodeAddrs are the addresses of node i, the same number in both families.
func nodeAddrs(i int) []netip.Addr {
	return []netip.Addr{
		netip.MustParseAddr(fmt.Sprintf("192.0.2.%d", 10+i)),
		netip.MustParseAddr(fmt.Sprintf("2001:db8::%d", 10+i)),
	}
}

// nodeMAC is the address of node i's eth0 (locally administered), the same number once more.
func nodeMAC(i int) string { return fmt.Sprintf("02:00:c0:00:02:%02x", 10+i) }

// All network namespaces share the kernel's neighbour tables, which hold no more learned entries than gc_thresh3 says
// (arp(7)); permanent ones do not count.
const (
	// mostLearned is the number of nodes up to which they find each other by ARP and ND, as they would anywhere. With
	// more, the entries are permanent.
	mostLearned = 20
	// defaultThresh is gc_thresh3 where it cannot be read, which is everywhere but in the first network namespace.
	defaultThresh = 1024
)

// checkNeighbours refuses a lab whose pods, when each talks to each, would not fit into the neighbour tables.
func checkNeighbours(o Options) error {
	// A pod learns the gateway and the other pods of its node; the node learns each pod.
	need := o.Nodes * o.Pods * (o.Pods + 1)
	if o.Nodes <= mostLearned {
		need += o.Nodes * (o.Nodes - 1)
	}
	need += need / 4 // for the rest of the machine
	for _, family := range []string{"ipv4", "ipv6"} {
		thresh := defaultThresh
		name := "net/" + family + "/neigh/default/gc_thresh3"
		if b, err := os.ReadFile("/proc/sys/" + name); err == nil {
			if n, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil {
				thresh = n
			}
		}
		if need > thresh {
			return fmt.Errorf("--nodes %d with --pods %d: the pods would need %d entries in the kernel's neighbour table, "+
				"which holds %d; take fewer, or run `sysctl -w %s=%d`", o.Nodes, o.Pods, need, thresh, name, need)
		}
	}
	return nil
}

// introduce tells a node of a large lab the link-layer addresses of all others.
func (l *Lab) introduce(ctx context.Context, node string, o Options) error {
	var commands []string
	for i, other := range o.nodeNames() {
		if other == node {
			continue
		}
		for _, addr := range nodeAddrs(i + 1) {
			commands = append(commands, fmt.Sprintf("neigh add %v lladdr %s dev eth0 nud permanent", addr, nodeMAC(i+1)))
		}
	}
	return l.ip(ctx, l.netns(node), commands...)
}

// makeSwitch makes the underlay bridge. It is every node's default gateway too, so that one can see what leaves the
// cluster.
func (l *Lab) makeSwitch(ctx context.Context) error {
	sw := l.netns("sw")
	if err := l.ip(ctx, "", "netns add "+sw); err != nil {
		return err
	}
	err := l.ip(ctx, sw,
		"link set lo up",
		"link add underlay type bridge mcast_snooping 0",
		"addr add "+gateway4+"/24 dev underlay",
		"addr add "+gateway6+"/64 dev underlay nodad",
		"link set underlay up")
	if err != nil {
		return err
	}
	// Where br_netfilter is loaded, the underlay's frames are none of the packet filter's business.
	for _, name := range []string{"iptables", "ip6tables", "arptables"} {
		if err := setSysctl(sw, "net/bridge/bridge-nf-call-"+name, "0"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// makeNode makes node i and plugs its eth0 into the underlay.
func (l *Lab) makeNode(ctx context.Context, i int) error {
	node := nodeName(i)
	ns, addrs := l.netns(node), nodeAddrs(i)
	if err := l.ip(ctx, "", "netns add "+ns); err != nil {
		return err
	}
	err := l.ip(ctx, ns,
		"link set lo up",
		fmt.Sprintf("link add eth0 address %s type veth peer name %s netns %s", nodeMAC(i), node, l.netns("sw")),
		fmt.Sprintf("addr add %v/24 dev eth0", addrs[0]),
		fmt.Sprintf("addr add %v/64 dev eth0 nodad", addrs[1]),
		"link set eth0 up",
		"route add default via "+gateway4,
		"route add ::/0 via "+gateway6)
	if err != nil {
		return err
	}
	// A namespace inherits this from the host, and whether the daemon sets it should not depend on the host.
	if err := setSysctl(ns, "net/ipv4/ip_forward", "0"); err != nil {
		return err
	}
	return l.ip(ctx, l.netns("sw"), fmt.Sprintf("link set %s master underlay up", node))
}

func setSysctl(netns, name, value string) error {
	return inNetns(netns, func() error { return os.WriteFile("/proc/sys/"+name, []byte(value), 0o644) })
}

// failedLine is how ip names the command of a batch that failed.
var failedLine = regexp.MustCompile(`Command failed -:(\d+)`)

// ip runs ip commands inside a network namespace, or on the host if netns is empty, up to the first that fails.
func (l *Lab) ip(ctx context.Context, netns string, commands ...string) error {
	program, err := ipProgram()
	if err != nil {
		return err
	}
	args := []string{"-batch", "-"}
	if netns != "" {
		args = []string{"-netns", netns, "-batch", "-"}
	}
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Stdin = strings.NewReader(strings.Join(commands, "\n") + "\n")
	if l.lock != nil {
		cmd.ExtraFiles = []*os.File{l.lock}
	}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err = cmd.Run()
	if err == nil || ctx.Err() != nil {
		return ctx.Err()
	}
	said := strings.TrimSpace(out.String())
	what := strings.Join(commands, "; ")
	if m := failedLine.FindStringSubmatch(said); m != nil {
		if n, _ := strconv.Atoi(m[1]); n >= 1 && n <= len(commands) {
			what = commands[n-1]
		}
		said = strings.TrimSpace(failedLine.ReplaceAllString(said, ""))
	}
	if netns != "" {
		what = "-netns " + netns + " " + what
	}
	return fmt.Errorf("ip %s: %s (%w)", what, said, err)
}

func ipProgram() (string, error) {
	for _, name := range []string{"ip", "/usr/sbin/ip", "/sbin/ip"} { // su keeps a user's PATH, without sbin
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	return "", errors.New("the ip program is missing; it comes with the Debian package iproute2")
}

// isMount reports whether something is mounted on path.
func isMount(path string) bool {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, 0, &st)
	return err == nil && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}
