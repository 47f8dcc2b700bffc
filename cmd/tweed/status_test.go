package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tweed.dev/tweed/backend/vxlan"
	"tweed.dev/tweed/overlay"
	"tweed.dev/tweed/subnet"
)

// remembered are the leases that a daemon has.
type remembered struct{ list *subnet.List }

func (remembered) Run(ctx context.Context, _ func()) error { <-ctx.Done(); return nil }
func (remembered) Err() error                              { return errors.New("connection refused") }
func (k remembered) List() (subnet.List, bool) {
	if k.list == nil {
		return subnet.List{}, false
	}
	return *k.list, true
}

// serveReal answers as a daemon that has made no pass yet, for as long as the test takes. It has the tests' own network
// namespace for itself.
func serveReal(t *testing.T, list *subnet.List) {
	t.Helper()
	r := overlay.NewReconciler(&overlay.Planner{Leases: remembered{list}}, overlay.CNIConf{}, "test",
		slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- r.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	for daemonHere(ctx) == nil {
		select {
		case err := <-ended:
			t.Fatal(err)
		default:
		}
	}
}

// serveFake answers everything on the daemon's port with one text.
func serveFake(t *testing.T, text string) {
	t.Helper()
	ln, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", overlay.Port))
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, text) })}
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(ln) }()
	t.Cleanup(func() {
		srv.Close()
		if err := <-ended; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
}

// runStatus runs `subnet status` for a cluster of two nodes, with a configuration that finds no fault with them.
func runStatus(t *testing.T, apiStatus int, args ...string) (string, error) {
	t.Helper()
	kubeconfig := apiServer(t, func(string, string, []byte) (int, string) {
		if apiStatus != http.StatusOK {
			return apiStatus, fmt.Sprintf(`{"kind":"Status","apiVersion":"v1","status":"Failure","code":%d}`, apiStatus)
		}
		return apiStatus, nodeList
	})
	file := filepath.Join(t.TempDir(), "net-conf.json")
	if err := os.WriteFile(file, []byte(`{"Network":"10.0.0.0/8","SubnetLen":24}`), 0o600); err != nil {
		t.Fatal(err)
	}
	return tweed(t, append([]string{"subnet", "status", "--kubeconfig", kubeconfig, "--net-conf", file}, args...)...)
}

func oneLease() *subnet.List {
	host := netip.MustParseAddr("192.0.2.13")
	return &subnet.List{At: time.Now().Add(-42 * time.Second), Leases: []subnet.Lease{{
		Node: "n3", Subnet: netip.MustParsePrefix("10.244.3.0/24"), Host: host, NodeAddrs: []netip.Addr{host},
		Backend: vxlan.Name, Data: vxlan.Config{Node: "n3", VNI: 1, Port: 8472}.Data(), Since: time.Unix(1, 0),
	}}}
}

// hold checks that a text has these words, and that err is a status to exit with; 0 is none.
func hold(t *testing.T, out string, err error, status int, words ...string) {
	t.Helper()
	got := exitStatus(0)
	if err != nil && !errors.As(err, &got) || int(got) != status {
		t.Errorf("ends with %v, want status %d", err, status)
	}
	for _, w := range words {
		if !strings.Contains(out, w) {
			t.Errorf("it lacks %q:\n%s", w, out)
		}
	}
}

func TestStatusWhileTheServerIsAway(t *testing.T) {
	const away = http.StatusServiceUnavailable
	t.Run("on a node", func(t *testing.T) {
		serveReal(t, oneLease())
		out, err := runStatus(t, away)
		hold(t, out, err, 2, "The API server could not be asked: cannot list nodes at http://127.0.0.1:", "n3 ",
			"that this node's daemon has, as of 4", "10.244.3.0/24", "1 of 65536 subnets leased",
			"This node's daemon: not converged (starting); its list of leases is 4")
		if strings.Contains(out, "n1") {
			t.Errorf("it has leases of somebody else:\n%s", out)
		}
		out, err = runStatus(t, away, "-o", "json")
		hold(t, out, err, 2, `"apiServerAway": "cannot list nodes at`, `"listAge": 4`, `"waiting": "starting"`,
			`"node": "n3"`)
	})
	t.Run("on a node that fares well", func(t *testing.T) {
		serveFake(t, `{"version":"1","converged":true,"listAge":3,"leases":[],"problems":[]}`)
		out, err := runStatus(t, away)
		hold(t, out, err, 2, "as of 3s ago", "No node has a lease.", "This node's daemon: converged;")
	})
	t.Run("with nothing behind its address", func(t *testing.T) {
		serveReal(t, oneLease())
		kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
		text := `{"apiVersion":"v1","kind":"Config","clusters":[{"name":"c","cluster":{"server":"http://127.0.0.1:1"}}],
"contexts":[{"name":"c","context":{"cluster":"c"}}],"current-context":"c"}`
		if err := os.WriteFile(kubeconfig, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := tweed(t, "subnet", "status", "--kubeconfig", kubeconfig)
		hold(t, out, err, 2, "http://127.0.0.1:1: dial tcp 127.0.0.1:1: connect: connection refused.", "n3 ",
			"The pod network is not known here")
	})
	t.Run("since before the daemon started", func(t *testing.T) {
		serveReal(t, nil)
		_, err := runStatus(t, away)
		if err == nil || !strings.Contains(err.Error(), "has no leases either: starting") {
			t.Errorf("it ends with %v", err)
		}
	})
	t.Run("without a daemon", func(t *testing.T) {
		_, err := runStatus(t, away)
		if err == nil || strings.Count(err.Error(), "cannot list nodes") != 1 || strings.Contains(err.Error(), "daemon") {
			t.Errorf("it ends with %v", err)
		}
	})
}

// TestStatusThatIsRefused has no leases of a daemon instead: they could be those of another cluster's node.
func TestStatusThatIsRefused(t *testing.T) {
	serveReal(t, oneLease())
	if out, err := runStatus(t, http.StatusForbidden); err == nil || !strings.Contains(err.Error(), "give our account") {
		t.Errorf("it ends with %v:\n%s", err, out)
	}
}

func TestStatusOnANode(t *testing.T) {
	for name, c := range map[string]struct {
		answer, line string
		status       int
	}{
		"all is well": {`{"version":"1","converged":true,"listAge":3.4}`,
			"This node's daemon: converged; its list of leases is 3s old.", 0},
		"not converged": {`{"version":"1","listAge":-1,"waiting":"waiting for the API server"}`,
			"This node's daemon: not converged (waiting for the API server); it has no list of leases yet.", 2},
		"another program has the port": {`{"hello":"world"}`, "", 0},
		"another program in HTML":      {`<html>`, "", 0},
	} {
		t.Run(name, func(t *testing.T) {
			serveFake(t, c.answer)
			out, err := runStatus(t, http.StatusOK)
			hold(t, out, err, c.status, c.line, "n1 ")
			if c.line == "" && strings.Contains(out, "daemon") {
				t.Errorf("it tells of a daemon:\n%s", out)
			}
		})
	}
	t.Run("as JSON", func(t *testing.T) {
		serveFake(t, `{"version":"1","converged":true,"listAge":3}`)
		out, err := runStatus(t, http.StatusOK, "-o", "json")
		hold(t, out, err, 0, "\"daemon\": {\n    \"converged\": true,\n    \"listAge\": 3\n  }")
	})
	t.Run("without a daemon", func(t *testing.T) {
		out, err := runStatus(t, http.StatusOK, "-o", "yaml")
		hold(t, out, err, 0, "node: n1")
		if strings.Contains(out, "daemon") || strings.Contains(out, "Away") {
			t.Errorf("it tells of what is not there:\n%s", out)
		}
	})
}
