package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"tweed.dev/tweed/e2e/jail"
)

// A Report is what the daemon says of its last pass at /report.
type Report struct {
	Version   string `json:"version"`
	Converged bool   `json:"converged"`
	Peers     int    `json:"peers"` // leases of other nodes
	// TookMs is the duration of the pass in milliseconds; no two passes take the same.
	TookMs float64 `json:"tookMs"`
	// ListAge is how old the list of leases is, in seconds; -1 before the first.
	ListAge  float64 `json:"listAge"`
	Problems []struct {
		Node, Kind, Text string
	} `json:"problems"`
}

// Names returns the texts of the problems with that node.
func (r Report) Names(node string) (texts []string) {
	for _, p := range r.Problems {
		if p.Node == node {
			texts = append(texts, p.Text)
		}
	}
	return texts
}

// StartDaemon starts `tweed run` in its container. Call it again after the daemon was stopped.
func (n *Node) StartDaemon(t testing.TB) {
	t.Helper()
	n.Daemon = n.launch(t, "tweed")
}

// StartSecondDaemon starts another one beside the first.
func (n *Node) StartSecondDaemon(t testing.TB) *Process {
	t.Helper()
	n.second = n.launch(t, "second")
	return n.second
}

// PromoteSecondDaemon makes the second daemon the node's.
func (n *Node) PromoteSecondDaemon() { n.Daemon, n.second = n.second, nil }

// State is what the kernel holds for the pod network on the node, as text that can be compared.
func (n *Node) State(t testing.TB) string {
	t.Helper()
	var all strings.Builder
	for _, command := range []string{
		"ip -br link", "ip -br addr", "ip route show proto 116", "ip -6 route show proto 116", "bridge fdb show dev tweed.1",
		"ip neigh show nud permanent", "ip -6 neigh show nud permanent", "iptables -t nat -S", "iptables -S", "ip6tables -S",
	} {
		all.WriteString(n.NetNS.Run(t, command))
	}
	return all.String()
}

func (n *Node) launch(t testing.TB, name string) *Process {
	t.Helper()
	cmd := jail.Command(n.container(daemonPath, "run",
		"--node-name", n.Name, "--kubeconfig", kubeconfigPath, "--sysctl-root", "/host/proc/sys"))
	p, err := start(NetNS{}, name+" on "+n.Name, n.dir+"/"+name+".log", cmd)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// AwaitReady waits until the daemon says that its node is ready.
func (n *Node) AwaitReady(t testing.TB) {
	t.Helper()
	Await(t, "the daemon on "+n.Name+" to be ready", func() error {
		if !n.Daemon.Running() {
			t.Fatalf("the daemon on %s ended:\n%s", n.Name, n.Daemon.Tail(20))
		}
		return n.Ready()
	})
}

// Ready asks /readyz; the error says what it answers.
func (n *Node) Ready() error {
	_, err := n.get("/readyz")
	return err
}

// Report reads /report.
func (n *Node) Report() (r Report, err error) {
	b, err := n.get("/report")
	if err != nil {
		return r, err
	}
	return r, json.Unmarshal(b, &r)
}

// Passes is how many passes the daemon has made, by its metrics.
func (n *Node) Passes(t testing.TB) int {
	t.Helper()
	b, err := n.get("/metrics")
	if err != nil {
		t.Fatalf("the metrics of the daemon on %s: %v", n.Name, err)
	}
	for line := range strings.Lines(string(b)) {
		var passes int
		if n, _ := fmt.Sscanf(line, "tweed_pass_duration_seconds_count %d", &passes); n == 1 {
			return passes
		}
	}
	t.Fatalf("the metrics of the daemon on %s do not count passes", n.Name)
	return 0
}

func (n *Node) get(path string) ([]byte, error) {
	client := http.Client{
		Timeout:   5 * time.Second,
		Transport: &http.Transport{DialContext: n.NetNS.Dial, DisableKeepAlives: true},
	}
	req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, "http://127.0.0.1:9479"+path, nil)
	if err != nil {
		return nil, err
	}
	res, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s answers %s: %s", path, res.Status, strings.TrimSpace(string(b)))
	}
	return b, err
}

// AwaitConflist waits for the daemon's CNI configuration and returns its path.
func (n *Node) AwaitConflist(t testing.TB) string {
	t.Helper()
	path := n.dir + "/net.d/10-tweed.conflist"
	Await(t, path, func() error {
		_, err := os.Stat(path)
		return err
	})
	return path
}

// LogContains reports whether the daemon of that log wrote each of the words; the error says which it did not.
func (p *Process) LogContains(words ...string) error {
	b, err := os.ReadFile(p.Log)
	if err != nil {
		return err
	}
	for _, w := range words {
		if !strings.Contains(string(b), w) {
			err = errors.Join(err, fmt.Errorf("the log of %s lacks %q", p.Name, w))
		}
	}
	return err
}

// Dump prints what a person would look at when the node does not do what it should.
func (n *Node) Dump(t testing.TB) {
	if n.Daemon == nil {
		t.Logf("%s: no daemon", n.Name)
		return
	}
	t.Logf("%s: the daemon's log ends with\n%s", n.Name, n.Daemon.Tail(40))
	report, err := n.get("/report")
	t.Logf("%s: /report %s (%v)", n.Name, report, err)
	for _, command := range []string{
		"ip -d link", "ip addr", "ip route show table all", "ip -6 route show table all", "ip neigh", "ip -6 neigh",
		"bridge fdb show", "iptables-save", "ip6tables-save",
	} {
		out, err := n.NetNS.Try(command)
		t.Logf("%s: %s (%v)\n%s", n.Name, command, err, out)
	}
}
