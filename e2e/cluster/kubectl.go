package cluster

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Kubectl runs kubectl as an administrator and returns what it printed.
func (c *Cluster) Kubectl(t testing.TB, args ...string) string {
	t.Helper()
	out, err := c.TryKubectl(args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TryKubectl is Kubectl for what may fail.
func (c *Cluster) TryKubectl(args ...string) (string, error) { return c.KubectlWith("", args...) }

// KubectlWith runs kubectl with text as its standard input.
func (c *Cluster) KubectlWith(stdin string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	cmd := c.KubectlCommand(ctx, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	err := c.controlPlane.Do(cmd.Run)
	if err != nil {
		err = fmt.Errorf("kubectl %s: %w\n%s%s", strings.Join(args, " "), err, stdout.String(), stderr.String())
	}
	return stdout.String(), err
}

// KubectlCommand prepares kubectl as an administrator; start it in the network namespace of ControlPlane.
func (c *Cluster) KubectlCommand(ctx context.Context, args ...string) *exec.Cmd {
	dir := filesOf("cp")
	cmd := exec.CommandContext(ctx, c.programs.Kube("kubectl"), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.AdminKubeconfig(), "KUBECACHEDIR="+filepath.Join(dir, "cache"))
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// ControlPlane is the namespace of the control plane, which stands beside the cluster's nodes.
func (c *Cluster) ControlPlane() NetNS { return c.controlPlane }

// AdminKubeconfig is where an administrator's kubeconfig is.
func (c *Cluster) AdminKubeconfig() string { return filepath.Join(filesOf("cp"), "admin.kubeconfig") }

// Apply applies a manifest that is given as text.
func (c *Cluster) Apply(t testing.TB, manifest string) {
	t.Helper()
	if _, err := c.KubectlWith(manifest, "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
}
