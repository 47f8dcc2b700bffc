package cluster

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tweed.dev/tweed/e2e/faults"
)

// A Detour is a way to the API server on which a test decides what happens.
type Detour struct {
	*faults.Proxy
	// URL is where the API server seems to be.
	URL string

	cluster *Cluster
	port    int
}

// NewDetour opens one on the control plane's machine at a port of its own. It ends with the test.
func (c *Cluster) NewDetour(t testing.TB, port int) *Detour {
	t.Helper()
	addr := fmt.Sprintf("%s:%d", underlayAddrs(controlPlaneNumber)[0], port)
	cert, err := tls.X509KeyPair(c.pki.serverCert, c.pki.serverKey)
	if err != nil {
		t.Fatalf("the certificate of the detour: %v", err)
	}
	ca := x509.NewCertPool()
	ca.AddCert(c.pki.caCert)
	server, err := url.Parse(c.URL())
	if err != nil {
		t.Fatal(err)
	}
	listen := func() (l net.Listener, err error) {
		err = c.controlPlane.Do(func() error {
			l, err = net.Listen("tcp", addr)
			return err
		})
		return l, err
	}
	p, err := faults.Start(listen, cert, server, faults.Upstream(&tls.Config{RootCAs: ca}, c.controlPlane.Dial))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	d := &Detour{Proxy: p, URL: "https://" + addr, cluster: c, port: port}
	c.controlPlane.Run(t, "iptables -w -A "+d.syn())
	return d
}

// syn is a rule that counts those who ask for a connection, and no more.
func (d *Detour) syn() string { return fmt.Sprintf("INPUT -p tcp --syn --dport %d", d.port) }

// Knocks is how often somebody has asked for a connection so far.
func (d *Detour) Knocks(t testing.TB) (n int) {
	t.Helper()
	for line := range strings.Lines(d.cluster.controlPlane.Run(t, "iptables -w -v -S INPUT")) {
		rest, ok := strings.CutPrefix(line, fmt.Sprintf("-A INPUT -p tcp -m tcp --dport %d ", d.port))
		if _, counts, found := strings.Cut(rest, " -c "); ok && found && !strings.Contains(rest, "DROP") {
			fmt.Sscan(counts, &n)
		}
	}
	return n
}

// LosePackets has all packets of the detour lost, both ways, until arrive is called.
func (d *Detour) LosePackets(t testing.TB) (arrive func()) {
	t.Helper()
	rules := []string{
		fmt.Sprintf("INPUT -p tcp --dport %d -j DROP", d.port), fmt.Sprintf("OUTPUT -p tcp --sport %d -j DROP", d.port),
	}
	for _, r := range rules {
		d.cluster.controlPlane.Run(t, "iptables -w -A "+r)
	}
	return func() {
		for _, r := range rules {
			d.cluster.controlPlane.Run(t, "iptables -w -D "+r)
		}
	}
}

// NewToken returns another token for the node's daemon, which does not have it yet.
func (n *Node) NewToken(t testing.TB) string {
	t.Helper()
	return n.cluster.daemonToken(t, n.Name)
}

// SetToken gives the node's daemon that token, as a kubelet does: by another file of the same name.
func (n *Node) SetToken(t testing.TB, token string) {
	t.Helper()
	path := filepath.Join(n.dir, "secrets/token")
	err := os.WriteFile(path+".new", []byte(token), 0o600)
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		t.Fatalf("the token of %s: %v", n.Name, err)
	}
}
