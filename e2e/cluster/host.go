package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"tweed.dev/tweed/e2e/image"
	"tweed.dev/tweed/e2e/machine"
)

// A Host is a machine with a container runtime, a kubelet and a service proxy on it. It has nothing of a pod network
// but what the cluster brings there.
type Host struct {
	*machine.Machine

	Name  string
	NetNS NetNS
	Addrs [2]netip.Addr // on the underlay, one a family

	cluster *Cluster
	number  int
}

// HostOptions say what a host is like.
type HostOptions struct {
	// ProxyMode is kube-proxy's: iptables or nftables.
	ProxyMode string
	// PodCIDRs is the pod network, one prefix a family. A host of a dual-stack cluster tells both its addresses.
	PodCIDRs []string
	// Taints are those that the kubelet registers with.
	Taints []string
	// Absent are files that the host lacks, beside /etc/cni and /opt/cni.
	Absent []string
	// Files are on the host from the start.
	Files map[string]string
}

// Where a host has what it shares with this computer.
const (
	hostPrograms = "/opt/e2e/kubernetes"
	hostImages   = "/opt/e2e/images"
)

// AddHost boots a machine that registers with the cluster. It is removed with the test at the latest.
func (c *Cluster) AddHost(t testing.TB, name string, o HostOptions) *Host {
	t.Helper()
	c.numbers++
	h := &Host{Name: name, cluster: c, number: controlPlaneNumber + c.numbers}
	h.Addrs = underlayAddrs(h.number)
	h.plugIn(t)
	files, err := c.hostFiles(h, o)
	if err != nil {
		t.Fatalf("files of %s: %v", name, err)
	}
	h.Machine, err = machine.New(machine.Spec{
		Name: name, Dir: filesOf(name), Files: files,
		Absent: append([]string{"/etc/cni", "/opt/cni", "/var/lib/cni", "/var/lib/etcd"}, o.Absent...),
		Shared: map[string]string{
			hostPrograms: c.programs.Kubernetes, hostImages + "/tests.tar": c.programs.TestImages,
			hostImages + "/tweed.tar": c.programs.Image,
		},
		Units: hostUnits(h, o),
	})
	if err != nil {
		t.Fatalf("making %s: %v", name, err)
	}
	c.Hosts = append(c.Hosts, h)
	h.SwitchOn(t)
	return h
}

// plugIn gives the host its network.
func (h *Host) plugIn(t testing.TB) {
	t.Helper()
	h.NetNS = NewNetNS(t, machinePath(h.Name))
	h.cluster.underlay.attach(t, h.NetNS, h.number)
	for _, gateway := range underlayAddrs(controlPlaneNumber) {
		h.NetNS.Run(t, "ip route add default via "+gateway.String())
	}
}

// SwitchOn boots the host.
func (h *Host) SwitchOn(t testing.TB) {
	t.Helper()
	if err := h.NetNS.Do(h.Boot); err != nil {
		t.Fatalf("booting %s: %v", h.Name, err)
	}
}

// Reboot switches the host off and on: its memory and its network devices are new, its disk is as it was but for files
// to be removed.
func (h *Host) Reboot(t testing.TB, without ...string) {
	t.Helper()
	if err := h.PowerCut(); err != nil {
		t.Fatalf("switching off %s: %v", h.Name, err)
	}
	for _, path := range without {
		if err := os.Remove(h.OnDisk(path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	h.cluster.underlay.Switch.Run(t, "ip link del "+h.Name) // the namespace alone would let go of it some time later
	if err := h.NetNS.Remove(); err != nil {
		t.Fatal(err)
	}
	h.plugIn(t)
	h.SwitchOn(t)
}

// RemoveHost takes a host out of the cluster: first the machine, as a power cut does, then its Node.
func (c *Cluster) RemoveHost(t testing.TB, h *Host) {
	t.Helper()
	c.removeHost(t, h)
	c.Kubectl(t, "delete", "node", h.Name, "--ignore-not-found")
}

func (c *Cluster) removeHost(t testing.TB, h *Host) {
	c.Hosts = slices.DeleteFunc(c.Hosts, func(o *Host) bool { return o == h })
	if err := h.Remove(); err != nil {
		t.Errorf("removing %s: %v", h.Name, err)
	}
	if err := h.NetNS.Remove(); err != nil {
		t.Error(err)
	}
}

func hostUnits(h *Host, o HostOptions) []machine.Unit {
	addrs := []string{h.Addrs[0].String()}
	if len(o.PodCIDRs) == 2 {
		addrs = append(addrs, h.Addrs[1].String())
	}
	kubelet := []string{
		hostPrograms + "/kubelet", "--config=/etc/kubernetes/kubelet.yaml", "--kubeconfig=/etc/kubernetes/kubelet.kubeconfig",
		"--node-ip=" + strings.Join(addrs, ","),
	}
	if len(o.Taints) > 0 {
		kubelet = append(kubelet, "--register-with-taints="+strings.Join(o.Taints, ","))
	}
	const importAll = "for f in " + hostImages + `/*.tar; do ctr --namespace k8s.io images import "$f" || exit 1; done`
	return []machine.Unit{
		{Name: "containerd", Argv: []string{"/usr/bin/containerd", "--config", "/etc/containerd/config.toml"}},
		{
			Name: "images", After: "/run/containerd/containerd.sock", Once: true,
			Argv: []string{"/bin/sh", "-c", importAll},
		},
		{Name: "kubelet", After: machine.Done("images"), Argv: kubelet},
		{
			Name: "kube-proxy", After: machine.Done("images"),
			Argv: []string{hostPrograms + "/kube-proxy", "--config=/etc/kubernetes/proxy.yaml"},
		},
	}
}

// hostFiles are what an administrator puts on a host before it joins.
func (c *Cluster) hostFiles(h *Host, o HostOptions) (map[string]string, error) {
	kubelet, err := c.kubeconfig("system:node:"+h.Name, "system:nodes")
	if err != nil {
		return nil, err
	}
	proxy, err := c.kubeconfig("system:kube-proxy")
	if err != nil {
		return nil, err
	}
	cert, key, err := c.pki.server(h.Name, h.Addrs[:])
	if err != nil {
		return nil, err
	}
	files := map[string]string{
		"/etc/hostname":                      h.Name + "\n",
		"/etc/hosts":                         "127.0.0.1 localhost\n::1 localhost\n" + h.Addrs[0].String() + " " + h.Name + "\n",
		"/etc/resolv.conf":                   "# no name server\n",
		"/etc/kubernetes/ca.crt":             string(c.pki.ca),
		"/etc/kubernetes/kubelet.crt":        string(cert),
		"/etc/kubernetes/kubelet.key":        string(key),
		"/etc/kubernetes/kubelet.kubeconfig": kubelet,
		"/etc/kubernetes/proxy.kubeconfig":   proxy,
		"/etc/kubernetes/kubelet.yaml":       kubeletConfig,
		"/etc/kubernetes/proxy.yaml":         fmt.Sprintf(proxyConfig, o.ProxyMode, strings.Join(o.PodCIDRs, ",")),
		"/etc/containerd/config.toml":        containerdConfig,
	}
	for path, text := range o.Files {
		files[path] = text
	}
	return files, nil
}

// Two settings are for a computer without CAP_SYS_RESOURCE or with cgroup version 1: restrict_oom_score_adj and
// failCgroupV1. All else a host could have anywhere.
const (
	containerdConfig = `version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "` + image.Pause + `"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
`
	kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: /etc/kubernetes/ca.crt}}
authorization: {mode: Webhook}
tlsCertFile: /etc/kubernetes/kubelet.crt
tlsPrivateKeyFile: /etc/kubernetes/kubelet.key
clusterDomain: cluster.local
clusterDNS: [10.96.0.53]
nodeStatusUpdateFrequency: 4s
failSwapOn: false
evictionHard: {memory.available: "0%", nodefs.available: "0%", nodefs.inodesFree: "0%", imagefs.available: "0%"}
imageGCHighThresholdPercent: 100
`
	proxyConfig = `apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection: {kubeconfig: /etc/kubernetes/proxy.kubeconfig}
mode: %q
clusterCIDR: %q
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
`
)

// IsReady says why the host's Node is not ready; nil when it is.
func (h *Host) IsReady() error {
	text, err := h.cluster.TryKubectl("get", "node", h.Name, "-o", "json")
	if err != nil {
		return err
	}
	var node corev1.Node
	if err := json.Unmarshal([]byte(text), &node); err != nil {
		return err
	}
	for _, c := range node.Status.Conditions {
		if c.Type == corev1.NodeReady {
			if c.Status == corev1.ConditionTrue {
				return nil
			}
			return fmt.Errorf("%s is not ready: %s: %s", h.Name, c.Reason, c.Message)
		}
	}
	return fmt.Errorf("%s has no condition Ready", h.Name)
}

// Host returns the host of that name.
func (c *Cluster) Host(name string) *Host {
	i := slices.IndexFunc(c.Hosts, func(h *Host) bool { return h.Name == name })
	return c.Hosts[i]
}

// PodNetNS finds the network namespace of the pod that has an address.
func (h *Host) PodNetNS(addr netip.Addr) (NetNS, error) {
	paths, err := filepath.Glob(h.Path("/run/netns/*"))
	if err != nil {
		return NetNS{}, err
	}
	for _, path := range paths {
		ns := NetNS{Path: path}
		var has bool
		err := ns.Do(func() error {
			addrs, err := net.InterfaceAddrs()
			has = slices.ContainsFunc(addrs, func(a net.Addr) bool {
				p, err := netip.ParsePrefix(a.String())
				return err == nil && p.Addr() == addr
			})
			return err
		})
		if err == nil && has {
			return ns, nil
		}
	}
	return NetNS{}, fmt.Errorf("no pod on %s has %s, of %d network namespaces", h.Name, addr, len(paths))
}

// DaemonPID is the daemon's process, as the test sees it.
func (h *Host) DaemonPID(t testing.TB) int {
	t.Helper()
	theirs, err := os.Readlink(filepath.Join("/proc", h.PID(), "ns/net"))
	if err != nil {
		t.Fatal(err)
	}
	var found []int
	links, err := filepath.Glob("/proc/[0-9]*/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		dir := filepath.Dir(filepath.Dir(link))
		command, err := os.ReadFile(dir + "/cmdline")
		if err != nil || !strings.HasPrefix(string(command), "/usr/bin/tweed\x00run") {
			continue
		}
		if here, err := os.Readlink(link); err != nil || here != theirs {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(dir)); err == nil {
			found = append(found, pid)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%s has daemons %v, want one", h.Name, found)
	}
	return found[0]
}

// Dump prints what a person would look at when the cluster does not do what it should.
func (c *Cluster) Dump(t testing.TB) {
	for _, args := range [][]string{
		{"get", "nodes", "-o", "wide"}, {"get", "pods", "-A", "-o", "wide"}, {"get", "events", "-A", "--sort-by=.lastTimestamp"},
		{"describe", "nodes"}, {"-n", "tweed", "logs", "-l", "app.kubernetes.io/name=tweed", "--all-containers", "--prefix", "--tail=40"},
	} {
		out, err := c.TryKubectl(args...)
		t.Logf("kubectl %s (%v)\n%s", strings.Join(args, " "), err, out)
	}
	for _, h := range c.Hosts {
		for _, log := range []string{"init", "containerd", "images", "kubelet", "kube-proxy"} {
			p := Process{Log: filepath.Join(h.Logs(), log+".log")}
			t.Logf("%s: %s says\n%s", h.Name, log, p.Tail(25))
		}
		for _, command := range []string{"ip -d link", "ip addr", "ip route", "ip -6 route", "bridge fdb show", "ip neigh", "iptables-save"} {
			out, err := h.NetNS.Try(command)
			t.Logf("%s: %s (%v)\n%s", h.Name, command, err, out)
		}
	}
}
