package cluster

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"tweed.dev/tweed/e2e/jail"
)

// A Node is a machine on the underlay, its Node object, the daemon and the pods on it.
type Node struct {
	Name     string
	NetNS    NetNS
	Addrs    [2]netip.Addr // on the underlay, one a family
	PodCIDRs []string
	Pods     []*Pod
	Daemon   *Process // nil before the first StartDaemon

	cluster *Cluster
	dir     string
	second  *Process
}

// Where the daemon's container has its files.
const (
	daemonPath     = "/opt/tweed/tweed"
	kubeconfigPath = "/var/run/secrets/tweed/kubeconfig"
)

// NetConf is the net-conf.json that each node begins with.
const NetConf = `{
  "Network": "10.244.0.0/16", "IPv6Network": "fd00:10:244::/48", "EnableIPv6": true, "IPv6SubnetLen": 64,
  "Backend": {"Type": "vxlan"}
}
`

// AddNode gives the cluster a machine and its Node object with the given podCIDRs, perhaps none. Its daemon is not
// started. It is removed with the test at the latest.
func (c *Cluster) AddNode(t testing.TB, name string, podCIDRs ...string) *Node {
	t.Helper()
	n := c.AddMachine(t, name)
	n.PodCIDRs = podCIDRs
	c.Register(t, n)
	return n
}

// AddMachine is AddNode without a Node object.
func (c *Cluster) AddMachine(t testing.TB, name string) *Node {
	t.Helper()
	c.numbers++
	number := controlPlaneNumber + c.numbers
	n := &Node{Name: name, NetNS: NewNetNS(t, machinePath(name)), Addrs: underlayAddrs(number), cluster: c, dir: filesOf(name)}
	c.Nodes = append(c.Nodes, n)
	c.underlay.attach(t, n.NetNS, number)
	n.writeFiles(t, c.daemonToken(t, name))
	return n
}

// Register creates the Node objects of machines, all at once, as their kubelets would.
func (c *Cluster) Register(t testing.TB, machines ...*Node) {
	t.Helper()
	var wg sync.WaitGroup
	for _, n := range machines {
		wg.Go(func() {
			if err := c.createNode(t.Context(), n.Name, n.Addrs[:], n.PodCIDRs, nil); err != nil {
				t.Errorf("creating Node %s: %v", n.Name, err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
}

// Configure gives the machine another net-conf.json.
func (n *Node) Configure(t testing.TB, text string) {
	t.Helper()
	path := filepath.Join(n.dir, "etc/net-conf.json")
	err := os.WriteFile(path+".new", []byte(text), 0o600)
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// RemoveNode takes a node out of the cluster: first the machine, as a power cut does, then its Node.
func (c *Cluster) RemoveNode(t testing.TB, n *Node) {
	t.Helper()
	c.removeMachine(t, n)
	if err := c.forget(n.Name); err != nil {
		t.Error(err)
	}
}

func (c *Cluster) removeMachine(t testing.TB, n *Node) {
	c.Nodes = slices.DeleteFunc(c.Nodes, func(m *Node) bool { return m == n })
	for _, p := range []*Process{n.Daemon, n.second} {
		if p != nil {
			p.Stop(t, syscall.SIGKILL)
		}
	}
	for _, p := range slices.Clone(n.Pods) {
		if err := p.letGo(); err != nil {
			t.Error(err)
		}
	}
	if err := n.NetNS.Remove(); err != nil {
		t.Error(err)
	}
}

func (n *Node) writeFiles(t testing.TB, token string) {
	t.Helper()
	kubeconfig := fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: e2e
contexts: [{name: e2e, context: {cluster: e2e, user: tweed}}]
clusters: [{name: e2e, cluster: {server: %q, certificate-authority-data: %q}}]
users: [{name: tweed, user: {tokenFile: %q}}]
`, n.cluster.URL(), base64.StdEncoding.EncodeToString(n.cluster.pki.ca), filepath.Dir(kubeconfigPath)+"/token")
	for _, dir := range []string{"run/tweed", "net.d", "etc", "secrets"} {
		if err := os.MkdirAll(filepath.Join(n.dir, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for path, text := range map[string]string{
		"run/xtables.lock":   "",
		"etc/net-conf.json":  NetConf,
		"secrets/kubeconfig": kubeconfig,
		"secrets/token":      token,
	} {
		if err := os.WriteFile(filepath.Join(n.dir, path), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// GoBy has the node's daemon, from its next start, find the API server at that URL.
func (n *Node) GoBy(t testing.TB, url string) {
	t.Helper()
	path := filepath.Join(n.dir, "secrets/kubeconfig")
	b, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(path, []byte(strings.ReplaceAll(string(b), n.cluster.URL(), url)), 0o600)
	}
	if err != nil {
		t.Fatalf("leading the daemon on %s to %s: %v", n.Name, url, err)
	}
}

// ForgetRun empties /run/tweed, as a boot does.
func (n *Node) ForgetRun(t testing.TB) {
	t.Helper()
	dir := filepath.Join(n.dir, "run/tweed")
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// container is the plan of a program in the daemon's container.
func (n *Node) container(argv ...string) jail.Plan {
	return jail.Plan{
		NetNS: n.NetNS.Path, Container: true, Argv: argv,
		Binds: []jail.Bind{
			{From: n.cluster.programs.Tweed, To: daemonPath},
			{From: n.dir + "/run/tweed", To: "/run/tweed", Writable: true},
			{From: n.dir + "/run/xtables.lock", To: "/run/xtables.lock", Writable: true},
			{From: n.dir + "/net.d", To: "/etc/cni/net.d", Writable: true},
			{From: n.dir + "/etc", To: "/etc/tweed"},
			{From: n.dir + "/secrets", To: filepath.Dir(kubeconfigPath)},
		},
	}
}

// host is the plan of a program on the machine itself, beside containers: what a kubelet's runtime starts.
func (n *Node) host(argv ...string) jail.Plan {
	return jail.Plan{
		NetNS: n.NetNS.Path, Argv: argv,
		Binds: []jail.Bind{{From: n.dir + "/run", To: "/run", Writable: true}},
	}
}

// Result is how a program ended that ran to its end.
type Result struct {
	Stdout, Stderr string
	Status         int
}

// InContainer runs a program in the daemon's container, and tweed if the first word is that.
func (n *Node) InContainer(t testing.TB, argv ...string) Result {
	t.Helper()
	if argv[0] == "tweed" {
		argv[0] = daemonPath
	}
	cmd := jail.Command(n.container(argv...))
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if _, exited := err.(*exec.ExitError); err != nil && !exited {
		t.Fatalf("%v on %s: %v", argv, n.Name, err)
	}
	return Result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// SubnetStatus runs `tweed subnet status` with further arguments.
func (n *Node) SubnetStatus(t testing.TB, args ...string) Result {
	t.Helper()
	return n.InContainer(t, append([]string{"tweed", "subnet", "status", "--kubeconfig", kubeconfigPath}, args...)...)
}
