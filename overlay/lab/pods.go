package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/libcni"
)

const (
	pluginName = "tweed-cni"
	conflist   = "10-tweed.conflist"
)

// findPlugin looks for the CNI plugin beside the tweed program, where a build puts it, then where a node has it.
func (l *Lab) findPlugin() (string, error) {
	beside := filepath.Dir(l.Tweed)
	for _, dir := range []string{beside, "/opt/cni/bin"} {
		path := filepath.Join(dir, pluginName)
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
			return path, nil
		} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	}
	return "", fmt.Errorf("the CNI plugin %s is neither in %s nor in /opt/cni/bin; run `make build`", pluginName, beside)
}

// addPod makes a pod's network namespace and has the plugin connect it, called the way that a container runtime calls
// it: on the node, with the configuration that the daemon wrote.
func (l *Lab) addPod(ctx context.Context, plugin, node, pod string) error {
	if err := l.ip(ctx, "", "netns add "+l.netns(node, pod)); err != nil {
		return err
	}
	if err := l.ip(ctx, l.netns(node, pod), "link set lo up"); err != nil {
		return err
	}
	err := l.onNode(node, func() error {
		conf, err := libcni.NetworkConfFromFile(filepath.Join("/etc/cni/net.d", conflist))
		if err != nil {
			return err
		}
		cni := libcni.NewCNIConfigWithCacheDir([]string{filepath.Dir(plugin)}, l.path(node, "results"), nil)
		_, err = cni.AddNetworkList(ctx, conf, &libcni.RuntimeConf{
			ContainerID: node + "-" + pod,
			NetNS:       filepath.Join(netnsDir, l.netns(node, pod)),
			IfName:      "eth0",
		})
		return err
	})
	if err != nil {
		return fmt.Errorf("attaching %s/%s: %w", node, pod, err)
	}
	return nil
}

// podAddrs are the addresses that a pod's eth0 has, link-local ones left out.
func (l *Lab) podAddrs(node, pod string) ([]netip.Addr, error) {
	var addrs []netip.Addr
	err := inNetns(l.netns(node, pod), func() error {
		dev, err := net.InterfaceByName("eth0")
		if err != nil {
			return errors.New("it has no eth0")
		}
		found, err := dev.Addrs()
		if err != nil {
			return err
		}
		for _, a := range found {
			p, err := netip.ParsePrefix(a.String())
			if err != nil {
				return err
			}
			if !p.Addr().IsLinkLocalUnicast() {
				addrs = append(addrs, p.Addr())
			}
		}
		return nil
	})
	return addrs, err
}
