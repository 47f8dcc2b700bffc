package cluster

import (
	"encoding/base64"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// ControllerOptions say what the controller manager does beside what it always does.
type ControllerOptions struct {
	// PodCIDRs is the pod network that nodes are given subnets of, one prefix a family; none gives them none.
	PodCIDRs []string
}

// StartControllers starts kube-controller-manager and kube-scheduler.
func (c *Cluster) StartControllers(t testing.TB, o ControllerOptions) {
	t.Helper()
	dir := filesOf("cp")
	pki := filepath.Join(dir, "pki")
	manager := []string{
		"--kubeconfig=" + c.writeKubeconfig(t, "kube-controller-manager", "system:kube-controller-manager"),
		"--leader-elect=false", "--use-service-account-credentials", "--root-ca-file=" + pki + "/ca.crt",
		"--service-account-private-key-file=" + pki + "/token.key",
		// With the default of 20 a second, its controllers start one by one, and nodes have to wait for their subnets.
		"--kube-api-qps=200", "--kube-api-burst=400",
	}
	if len(o.PodCIDRs) > 0 {
		manager = append(manager, "--allocate-node-cidrs", "--cluster-cidr="+strings.Join(o.PodCIDRs, ","))
	}
	if len(o.PodCIDRs) == 2 {
		manager = append(manager, "--node-cidr-mask-size-ipv4=24", "--node-cidr-mask-size-ipv6=64")
	}
	c.startController(t, "kube-controller-manager", manager...)
	c.startController(t, "kube-scheduler", "--leader-elect=false",
		"--kubeconfig="+c.writeKubeconfig(t, "kube-scheduler", "system:kube-scheduler"))
}

// StopControllers kills them, as a crash would.
func (c *Cluster) StopControllers(t testing.TB) {
	t.Helper()
	for _, p := range c.controllers {
		p.Stop(t, syscall.SIGKILL)
	}
	c.controllers = nil
}

func (c *Cluster) startController(t testing.TB, name string, args ...string) {
	t.Helper()
	log := filepath.Join(filesOf("cp"), name+".log")
	p, err := start(c.controlPlane, name, log, exec.Command(c.programs.Kube(name), args...))
	if err != nil {
		t.Fatal(err)
	}
	c.controllers = append(c.controllers, p)
}

// kubeconfig lets a user who is in the given groups talk to the API server.
func (c *Cluster) kubeconfig(user string, groups ...string) (string, error) {
	cert, key, err := c.pki.client(user, groups...)
	if err != nil {
		return "", err
	}
	encode := base64.StdEncoding.EncodeToString
	return fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: e2e
contexts: [{name: e2e, context: {cluster: e2e, user: e2e}}]
clusters: [{name: e2e, cluster: {server: %q, certificate-authority-data: %q}}]
users: [{name: e2e, user: {client-certificate-data: %q, client-key-data: %q}}]
`, c.URL(), encode(c.pki.ca), encode(cert), encode(key)), nil
}

// writeKubeconfig puts a kubeconfig beside the control plane's files and returns its path.
func (c *Cluster) writeKubeconfig(t testing.TB, name, user string, groups ...string) string {
	t.Helper()
	text, err := c.kubeconfig(user, groups...)
	path := filepath.Join(filesOf("cp"), name+".kubeconfig")
	if err == nil {
		err = os.WriteFile(path, []byte(text), 0o600)
	}
	if err != nil {
		t.Fatalf("a kubeconfig for %s: %v", user, err)
	}
	return path
}
