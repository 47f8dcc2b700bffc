// Package cluster runs a Kubernetes control plane and nodes on one machine: real etcd, real kube-apiserver, and the
// programs under test, each in the namespaces that it would have.
package cluster

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"tweed.dev/tweed/e2e/build"
)

// serviceCIDRs are where services have their addresses; the API server has the first of each.
const serviceCIDRs = "10.96.0.0/16,fd00:96::/112"

func serviceAddrs() []netip.Addr {
	return []netip.Addr{netip.MustParseAddr("10.96.0.1"), netip.MustParseAddr("fd00:96::1")}
}

// controlPlaneNumber is the control plane's place on the underlay; nodes have 11 and up.
const controlPlaneNumber = 10

// A Cluster is a control plane and its nodes.
type Cluster struct {
	API   *kubernetes.Clientset
	Nodes []*Node // those that were not removed
	Hosts []*Host // those that were not removed

	programs     build.Programs
	underlay     underlay
	controlPlane NetNS
	pki          *pki
	etcd         *Process
	apiserver    *Process
	flags        []string // of the API server, beside those that it always has
	controllers  []*Process
	begun        time.Time
	numbers      int // of machines so far
}

// Start brings up a control plane without nodes, and an account for daemons. It ends with the test.
func Start(t testing.TB, p build.Programs) *Cluster {
	t.Helper()
	c := StartBare(t, p)
	c.prepareAPI(t)
	return c
}

// StartBare brings up a control plane in which nobody has made anything yet. It ends with the test.
func StartBare(t testing.TB, p build.Programs) *Cluster {
	t.Helper()
	c := &Cluster{programs: p, begun: time.Now(), underlay: newUnderlay(t)}
	c.controlPlane = NewNetNS(t, machinePath("cp"))
	c.underlay.attach(t, c.controlPlane, controlPlaneNumber)
	var err error
	addrs := underlayAddrs(controlPlaneNumber)
	if c.pki, err = newPKI(append(addrs[:], serviceAddrs()...)); err != nil {
		t.Fatalf("making certificates: %v", err)
	}
	if err := c.pki.write(filesOf("cp/pki")); err != nil {
		t.Fatalf("writing certificates: %v", err)
	}
	t.Cleanup(func() { c.stop(t) })
	c.startEtcd(t)
	c.StartAPIServer(t)
	c.API, err = kubernetes.NewForConfig(c.restConfig())
	if err != nil {
		t.Fatalf("a client for the API server: %v", err)
	}
	c.writeKubeconfig(t, "admin", "admin", "system:masters")
	c.Progress("control plane is up")
	return c
}

// Progress prints a line with the time since Start.
func (c *Cluster) Progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%6.1fs  %s\n", time.Since(c.begun).Seconds(), fmt.Sprintf(format, args...))
}

// Switch is where the underlay can be watched: each machine's port has the machine's name there.
func (c *Cluster) Switch() NetNS { return c.underlay.Switch }

func (c *Cluster) startEtcd(t testing.TB) {
	t.Helper()
	dir := filesOf("cp")
	const client, peer = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
	cmd := exec.Command(c.programs.Etcd, "--name=e2e", "--data-dir="+filepath.Join(dir, "etcd"), "--unsafe-no-fsync",
		"--listen-client-urls="+client, "--advertise-client-urls="+client, "--log-level=warn",
		"--listen-peer-urls="+peer, "--initial-advertise-peer-urls="+peer, "--initial-cluster=e2e="+peer)
	var err error
	if c.etcd, err = start(c.controlPlane, "etcd", filepath.Join(dir, "etcd.log"), cmd); err != nil {
		t.Fatal(err)
	}
}

// StartAPIServer starts kube-apiserver and waits until it is ready.
func (c *Cluster) StartAPIServer(t testing.TB) {
	t.Helper()
	dir := filesOf("cp")
	pki := filepath.Join(dir, "pki")
	cmd := exec.Command(c.programs.Kube("kube-apiserver"), "--etcd-servers=http://127.0.0.1:2379",
		"--advertise-address="+underlayAddrs(controlPlaneNumber)[0].String(), "--secure-port=6443",
		"--cert-dir="+pki, "--tls-cert-file="+pki+"/server.crt", "--tls-private-key-file="+pki+"/server.key",
		"--client-ca-file="+pki+"/ca.crt", "--requestheader-client-ca-file="+pki+"/ca.crt",
		"--requestheader-allowed-names=front-proxy", // as the two authorities are one
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
		"--kubelet-certificate-authority="+pki+"/ca.crt", "--kubelet-client-certificate="+pki+"/admin.crt",
		"--kubelet-client-key="+pki+"/admin.key", "--kubelet-preferred-address-types=InternalIP",
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file="+pki+"/token.key",
		"--service-account-signing-key-file="+pki+"/token.key",
		"--service-cluster-ip-range="+serviceCIDRs)
	cmd.Args = append(cmd.Args, c.flags...)
	var err error
	if c.apiserver, err = start(c.controlPlane, "kube-apiserver", filepath.Join(dir, "apiserver.log"), cmd); err != nil {
		t.Fatal(err)
	}
	Await(t, "the API server to be ready", func() error {
		if !c.apiserver.Running() {
			t.Fatalf("kube-apiserver ended:\n%s", c.apiserver.Tail(30))
		}
		return c.apiReady()
	})
}

// StopAPIServer kills kube-apiserver, as a crash would.
func (c *Cluster) StopAPIServer(t testing.TB) {
	t.Helper()
	c.apiserver.Stop(t, syscall.SIGKILL)
}

func (c *Cluster) apiReady() error {
	client, err := rest.HTTPClientFor(c.restConfig())
	if err != nil {
		return err
	}
	defer client.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.URL()+"/readyz", nil)
	if err != nil {
		return err
	}
	res, err := client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("/readyz answers %s", res.Status)
	}
	return nil
}

// URL is where nodes find the API server.
func (c *Cluster) URL() string {
	return "https://" + underlayAddrs(controlPlaneNumber)[0].String() + ":6443"
}

// restConfig is an administrator's, for use from anywhere in this process.
func (c *Cluster) restConfig() *rest.Config {
	return &rest.Config{
		Host: c.URL(), Dial: c.controlPlane.Dial, QPS: 500, Burst: 500, Timeout: 30 * time.Second,
		TLSClientConfig: rest.TLSClientConfig{CAData: c.pki.ca, CertData: c.pki.adminCert, KeyData: c.pki.admin},
	}
}

func (c *Cluster) stop(t testing.TB) {
	for _, n := range slices.Clone(c.Nodes) {
		c.removeMachine(t, n)
	}
	for _, h := range slices.Clone(c.Hosts) {
		c.removeHost(t, h)
	}
	for _, p := range append(c.controllers, c.apiserver, c.etcd) {
		if p != nil {
			p.Stop(t, syscall.SIGKILL)
		}
	}
	for _, ns := range []NetNS{c.controlPlane, c.underlay.Switch} {
		if err := ns.Remove(); err != nil {
			t.Error(err)
		}
	}
	if err := os.RemoveAll(filesDir); err != nil {
		t.Error(err)
	}
}
