package cluster

import (
	"os"
	"path/filepath"
	"testing"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// AsUser is a client with a certificate for a user who is in these groups.
func (c *Cluster) AsUser(t testing.TB, user string, groups ...string) *kubernetes.Clientset {
	t.Helper()
	cert, key, err := c.pki.client(user, groups...)
	if err != nil {
		t.Fatalf("a certificate for %s: %v", user, err)
	}
	return c.client(t, func(config *rest.Config) { config.CertData, config.KeyData = cert, key })
}

// AsDaemon is a client with the token of the daemon's pod on a node.
func (c *Cluster) AsDaemon(t testing.TB, node string) *kubernetes.Clientset {
	t.Helper()
	token := c.daemonToken(t, node)
	return c.client(t, func(config *rest.Config) { config.BearerToken = token })
}

// AsAccount is a client with a token of the daemons' service account that no pod has.
func (c *Cluster) AsAccount(t testing.TB) *kubernetes.Clientset {
	t.Helper()
	token := c.token(t, nil)
	return c.client(t, func(config *rest.Config) { config.BearerToken = token })
}

func (c *Cluster) client(t testing.TB, identify func(*rest.Config)) *kubernetes.Clientset {
	t.Helper()
	config := c.restConfig()
	config.CertData, config.KeyData = nil, nil
	identify(config)
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatalf("a client for the API server: %v", err)
	}
	return client
}

// UseCertificate gives the node's daemon, before its start, a certificate in place of the token of its pod.
func (n *Node) UseCertificate(t testing.TB, user string, groups ...string) {
	t.Helper()
	text, err := n.cluster.kubeconfig(user, groups...)
	if err == nil {
		err = os.WriteFile(filepath.Join(n.dir, "secrets/kubeconfig"), []byte(text), 0o600)
	}
	if err != nil {
		t.Fatalf("a kubeconfig for %s: %v", user, err)
	}
}
