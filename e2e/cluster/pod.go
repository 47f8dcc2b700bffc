package cluster

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"tweed.dev/tweed/e2e/probe"
)

// A Pod is a network namespace that the plugin attached to the pod network, with the servers of package probe in it.
type Pod struct {
	Name  string
	Node  *Node
	NetNS NetNS
	Addrs []netip.Addr

	servers io.Closer
}

// AddPod makes a pod as a runtime does: a namespace, then ADD with the configuration that the daemon wrote.
func (n *Node) AddPod(t testing.TB, name string) *Pod {
	t.Helper()
	p := n.NewPod(t, name)
	list, err := libcni.ConfListFromFile(n.AwaitConflist(t))
	if err != nil {
		t.Fatalf("reading the CNI configuration of %s: %v", n.Name, err)
	}
	result, err := n.cni().AddNetworkList(t.Context(), list, p.runtimeConf())
	if err != nil {
		t.Fatalf("ADD of %s: %v", p, err)
	}
	r, err := current.NewResultFromResult(result)
	if err != nil {
		t.Fatalf("ADD of %s: %v", p, err)
	}
	for _, ip := range r.IPs {
		addr, _ := netip.AddrFromSlice(ip.Address.IP)
		p.Addrs = append(p.Addrs, addr.Unmap())
	}
	if p.servers, err = probe.Serve(p.NetNS); err != nil {
		t.Fatalf("starting servers in %s: %v", p, err)
	}
	return p
}

// NewPod makes a pod's namespace, which is not attached.
func (n *Node) NewPod(t testing.TB, name string) *Pod {
	t.Helper()
	p := &Pod{Name: name, Node: n, NetNS: NewNetNS(t, filepath.Join(n.dir, "run/netns", name))}
	n.Pods = append(n.Pods, p)
	return p
}

// Attach runs ADD, and Detach DEL: no servers are in the pod, and it keeps its namespace.
func (p *Pod) Attach(ctx context.Context) error {
	return p.call(func(c *libcni.CNIConfig, list *libcni.NetworkConfigList) error {
		_, err := c.AddNetworkList(ctx, list, p.runtimeConf())
		return err
	})
}

// Detach runs DEL.
func (p *Pod) Detach(ctx context.Context) error {
	return p.call(func(c *libcni.CNIConfig, list *libcni.NetworkConfigList) error {
		return c.DelNetworkList(ctx, list, p.runtimeConf())
	})
}

func (p *Pod) String() string { return p.Node.Name + "/" + p.Name }

// Check runs CHECK.
func (p *Pod) Check(ctx context.Context) error {
	return p.call(func(c *libcni.CNIConfig, list *libcni.NetworkConfigList) error {
		return c.CheckNetworkList(ctx, list, p.runtimeConf())
	})
}

// Remove runs DEL and lets the namespace go.
func (p *Pod) Remove(ctx context.Context) error {
	if err := p.Detach(ctx); err != nil {
		return err
	}
	return p.letGo()
}

func (p *Pod) call(f func(*libcni.CNIConfig, *libcni.NetworkConfigList) error) error {
	list, err := libcni.ConfListFromFile(p.Node.dir + "/net.d/10-tweed.conflist")
	if err != nil {
		return err
	}
	return f(p.Node.cni(), list)
}

func (p *Pod) letGo() error {
	p.Node.Pods = slices.DeleteFunc(p.Node.Pods, func(o *Pod) bool { return o == p })
	if p.servers != nil {
		if err := p.servers.Close(); err != nil {
			return err
		}
	}
	return p.NetNS.Remove()
}

func (p *Pod) runtimeConf() *libcni.RuntimeConf {
	return &libcni.RuntimeConf{ContainerID: "e2e-" + p.Name, NetNS: "/run/netns/" + p.Name, IfName: "eth0"}
}

func (n *Node) cni() *libcni.CNIConfig {
	dirs := []string{filepath.Dir(n.cluster.programs.TweedCNI)}
	return libcni.NewCNIConfigWithCacheDir(dirs, n.dir+"/cni-cache", &onNode{node: n})
}

// onNode starts plugins on the node's machine.
type onNode struct {
	invoke.RawExec
	version.PluginDecoder
	node *Node
}

// FindInPath is invoke.Exec's: the plugin is where it is for everybody.
func (*onNode) FindInPath(plugin string, paths []string) (string, error) {
	return invoke.FindInPath(plugin, paths)
}

// ExecPlugin is invoke.Exec's.
func (e *onNode) ExecPlugin(ctx context.Context, path string, stdin []byte, env []string) ([]byte, error) {
	out, err := e.RawExec.ExecPlugin(ctx, "/proc/self/exe", stdin, append(env, e.node.host(path).Env()))
	if err != nil {
		return nil, fmt.Errorf("%s on %s: %w", filepath.Base(path), e.node.Name, err)
	}
	return out, nil
}
