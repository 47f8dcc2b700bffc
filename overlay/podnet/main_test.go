package podnet

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"tweed.dev/tweed/backend/kernel/netnstest"
)

func TestMain(m *testing.M) {
	if os.Getenv(sweepVariable) != "" {
		os.Exit(sweepAsContainer())
	}
	netnstest.Main(m)
}

// upstream is where the plugins are that others have written.
const upstream = "github.com/containernetworking/plugins/plugins/"

// debian is where Debian's containernetworking-plugins has its plugins.
const debian = "/usr/lib/cni"

// plugin builds tweed-cni and what it delegates to, once, into the /run of the tests, which goes with them.
var plugin = sync.OnceValues(func() (string, error) {
	const dir = "/run/bin"
	cmd := exec.Command("go", "build", "-ldflags", "-s -w", "-o", dir+"/",
		"tweed.dev/tweed/cmd/tweed-cni", upstream+"meta/portmap", upstream+"meta/bandwidth")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return dir, nil
})

// A node is a network namespace as the daemon leaves it, and a container runtime in it.
type node struct {
	*netnstest.NS
	t      testing.TB
	runDir string
	info   NodeInfo
	cni    *libcni.CNIConfig
	cache  string
}

// usePlugins makes dirs the runtime's CNI_PATH.
func (n *node) usePlugins(dirs ...string) {
	exec := &invoke.DefaultExec{RawExec: &invoke.RawExec{Stderr: os.Stderr}}
	n.cni = libcni.NewCNIConfigWithCacheDir(dirs, n.cache, exec)
}

func newNode(t testing.TB, subnets ...string) *node {
	t.Helper()
	bin, err := plugin()
	if err != nil {
		t.Fatal(err)
	}
	n := &node{NS: netnstest.New(t), t: t, runDir: filepath.Join(t.TempDir(), "run"), cache: t.TempDir()}
	n.usePlugins(bin)
	n.Run(t, "ip link add tweed0 address 0e:00:00:00:00:01 mtu 1430 group 116 type bridge mcast_snooping 0")
	n.Run(t, "ip link add tweed.1 group 116 type bridge")
	n.Run(t, "ip link set tweed0 up")
	n.info = NodeInfo{
		Converged: true, Node: "n1", Networks: prefixes("10.244.0.0/16", "fd00:10:244::/48"), Subnets: prefixes(subnets...),
		Bridge: "tweed0", Device: "tweed.1", MTU: 1430,
	}
	for _, s := range n.info.Subnets {
		gw := netip.PrefixFrom(s.Addr().Next(), s.Bits())
		n.info.Gateways = append(n.info.Gateways, gw.Addr())
		nodad := ""
		if gw.Addr().Is6() {
			nodad = " nodad"
		}
		n.Run(t, "ip address add "+gw.String()+" dev tweed0"+nodad)
	}
	n.publish(n.info)
	return n
}

const (
	subnet4 = "10.244.3.0/24"
	subnet6 = "fd00:10:244:3::/64"
)

func (n *node) publish(info NodeInfo) {
	n.t.Helper()
	if err := info.Write(n.runDir); err != nil {
		n.t.Fatal(err)
	}
}

// conflist is what the runtime reads, with further keys for the plugin.
func (n *node) conflist(version string, more ...string) *libcni.NetworkConfigList {
	n.t.Helper()
	keys := strings.Join(append([]string{`"type": "tweed-cni"`, fmt.Sprintf(`"runDir": %q`, n.runDir),
		`"capabilities": {"portMappings": true, "bandwidth": true, "ips": true, "mac": true}`}, more...), ", ")
	text := fmt.Sprintf(`{"cniVersion": %q, "name": "tweed", "plugins": [{%s}]}`, version, keys)
	list, err := libcni.NetworkConfFromBytes([]byte(text))
	if err != nil {
		n.t.Fatal(err)
	}
	return list
}

func runtimeConf(container, netns string) *libcni.RuntimeConf {
	return &libcni.RuntimeConf{ContainerID: container, NetNS: netns, IfName: "eth0"}
}

func (n *node) add(container, netns string, more ...string) (*types100.Result, error) {
	n.t.Helper()
	return n.addAs(runtimeConf(container, netns), n.conflist("1.1.0", more...))
}

func (n *node) addAs(rt *libcni.RuntimeConf, list *libcni.NetworkConfigList) (r *types100.Result, err error) {
	n.t.Helper()
	n.Do(n.t, func() {
		var raw types.Result
		if raw, err = n.cni.AddNetworkList(context.Background(), list, rt); err == nil {
			r, err = types100.GetResult(raw)
		}
	})
	return r, err
}

func (n *node) mustAdd(container string, pod *netnstest.NS) *types100.Result {
	n.t.Helper()
	r, err := n.add(container, pod.Path())
	if err != nil {
		n.t.Fatal(err)
	}
	return r
}

func (n *node) del(container, netns string, more ...string) (err error) {
	n.t.Helper()
	list := n.conflist("1.1.0", more...)
	n.Do(n.t, func() { err = n.cni.DelNetworkList(context.Background(), list, runtimeConf(container, netns)) })
	return err
}

func (n *node) check(container, netns string) (err error) {
	n.t.Helper()
	list := n.conflist("1.1.0")
	n.Do(n.t, func() { err = n.cni.CheckNetworkList(context.Background(), list, runtimeConf(container, netns)) })
	return err
}

func (n *node) status() (err error) {
	n.t.Helper()
	list := n.conflist("1.1.0")
	n.Do(n.t, func() { err = n.cni.GetStatusNetworkList(context.Background(), list) })
	return err
}

// command is the plugin as a process that is not yet started.
func (n *node) command(verb, container, netns, stdin string) *exec.Cmd {
	bin, err := plugin()
	if err != nil {
		n.t.Fatal(err)
	}
	cmd := exec.Command(bin + "/tweed-cni")
	cmd.Env = []string{"CNI_COMMAND=" + verb, "CNI_CONTAINERID=" + container, "CNI_NETNS=" + netns, "CNI_IFNAME=eth0",
		"CNI_PATH=" + bin}
	cmd.Stdin = strings.NewReader(stdin)
	return cmd
}

// call runs the plugin with the environment changed and returns its error.
func (n *node) call(verb, stdin string, env ...string) error {
	cmd := n.command(verb, "c1", "/proc/1/ns/net", stdin)
	cmd.Env = append(cmd.Env, env...)
	var out bytes.Buffer
	cmd.Stdout = &out
	var err error
	n.Do(n.t, func() { err = cmd.Run() })
	if err == nil {
		return nil
	}
	var e types.Error
	if json.Unmarshal(out.Bytes(), &e) != nil {
		return fmt.Errorf("%w: %s", err, &out)
	}
	return &e
}

// ports are the veths on the node.
func (n *node) ports() []string {
	n.t.Helper()
	return strings.Fields(n.Run(n.t, "ip -brief link show type veth"))
}

// wantNothing sees that no address is taken and no veth is left.
func (n *node) wantNothing(after string) {
	n.t.Helper()
	for _, dir := range []string{"pods", "addrs"} {
		if left := names(n.t, filepath.Join(n.runDir, dir)); len(left) > 0 {
			n.t.Errorf("after %s: left in %s: %v", after, dir, left)
		}
	}
	if left := n.ports(); len(left) > 0 {
		n.t.Errorf("after %s: veths: %v", after, left)
	}
}

func wantCode(t testing.TB, what string, err error, code uint, texts ...string) {
	t.Helper()
	var e *types.Error
	if !errors.As(err, &e) || e.Code != code {
		t.Errorf("%s: got %v, want code %d", what, err, code)
		return
	}
	for _, text := range texts {
		if !strings.Contains(e.Error(), text) {
			t.Errorf("%s: %q does not say %q", what, e.Error(), text)
		}
	}
}
