package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// A peerFile is what a node n2 has published in a directory of leases.
const peerFile = `{"node":"n2","since":"2026-01-02T03:04:06Z","subnets":"10.244.2.0/24,fd00:10:244:2::/64",
"host":"192.0.2.12","backend":"vxlan","backend-data":{"vni":1,"port":8472,"mac":"0e:00:00:00:00:02"}}`

// A metered is a node n1 that serves its metrics, and has one peer.
type metered struct {
	host
	leases string
	spoilt int // how many lease files have been spoilt
}

func newMetered(t *testing.T) *metered {
	t.Helper()
	h := &metered{host: newHost(t), leases: t.TempDir()}
	if err := os.WriteFile(filepath.Join(h.leases, "n2.json"), []byte(peerFile), 0o644); err != nil {
		t.Fatal(err)
	}
	h.types(`
		ip link add eth0 type veth peer name world
		ip addr add 192.0.2.11/24 dev eth0
		ip link set eth0 up
		ip link set world up`)
	daemon(h.host, h.leases, 1, underlay{family: "ipv4"}.conf(), "--metrics-address", ":9480")
	h.await("curl -sf http://127.0.0.1:9480/metrics")
	return h
}

// drift reads the counters of drift.
func (h *metered) drift() map[string]int {
	h.t.Helper()
	counts := map[string]int{}
	for line := range strings.Lines(h.Run(h.t, "curl -sf http://[::1]:9480/metrics")) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		kind, ok := strings.CutPrefix(name, `tweed_drift_repaired_total{kind="`)
		if !ok {
			continue
		}
		n, err := strconv.Atoi(value)
		if err != nil {
			h.t.Fatal(err)
		}
		counts[strings.TrimSuffix(kind, `"}`)] = n
	}
	return counts
}

// pass has a pass made whatever the kernel tells of, by a lease file that cannot be read, and waits for it.
func (h *metered) pass() {
	h.t.Helper()
	path := func() string { return filepath.Join(h.leases, fmt.Sprintf("spoilt-%d.json", h.spoilt)) }
	_ = os.Remove(path())
	h.spoilt++
	if err := os.WriteFile(path(), []byte("{"), 0o644); err != nil {
		h.t.Fatal(err)
	}
	name := strings.TrimSuffix(filepath.Base(path()), ".json")
	for deadline := time.Now().Add(30 * time.Second); !strings.Contains(h.report(), name); {
		if time.Now().After(deadline) {
			h.t.Fatalf("no pass within 30 s knows of %s", name)
		}
	}
}

func (h *metered) report() string { return h.Run(h.t, "curl -s http://127.0.0.1:9479/report") }

// quiet waits until two passes after one another have found nothing to do.
func (h *metered) quiet() {
	h.t.Helper()
	for clean := 0; clean < 2; {
		h.pass()
		var rep struct{ Done, Failed, Skipped int }
		if err := json.Unmarshal([]byte(h.report()), &rep); err != nil {
			h.t.Fatal(err)
		}
		clean++
		if rep.Done+rep.Failed+rep.Skipped > 0 {
			clean = 0
		}
	}
}

// TestMetricsAddressServesMore asks there for what is served on the daemon's own port.
func TestMetricsAddressServesMore(t *testing.T) {
	h := newMetered(t)
	for _, path := range []string{"", "/", "/report", "/healthz", "/readyz", "/leases", "/metrics/", "/debug/pprof/"} {
		h.shows("curl -s -o /dev/null -w %{http_code} http://192.0.2.11:9480"+path, "404")
	}
	h.shows("curl -s -o /dev/null -w %{http_code} -X POST http://192.0.2.11:9480/metrics", "405")
	for _, at := range []string{"192.0.2.11:9480", "127.0.0.1:9480", "[::1]:9480", "127.0.0.1:9479"} {
		h.shows("curl -sf http://"+at+"/metrics", "tweed_peers_programmed 1\n")
	}
}
