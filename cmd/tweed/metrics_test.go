package main

import (
	"encoding/json"
	"fmt"
	"maps"
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

// TestFaultMovesAnotherCounter deletes and changes one object of each kind after the other. What the kernel itself
// takes away with an object is repaired too, and counted by its own kind.
func TestFaultMovesAnotherCounter(t *testing.T) {
	h := newMetered(t)
	h.quiet()
	for kind, n := range h.drift() {
		if n != 0 {
			t.Errorf("%d of %s were repaired before anybody did anything", n, kind)
		}
	}
	for _, fault := range []struct {
		commands string
		want     map[string]int
	}{
		{"ip route del 10.244.2.0/24", map[string]int{"route": 1}},
		{"ip -6 route del fd00:10:244:2::/64", map[string]int{"route": 1}},
		{"ip route replace 10.244.2.0/24 via 10.244.2.9 dev tweed.1 onlink proto 116", map[string]int{"route": 1}},
		{"ip route add 10.99.0.0/24 dev eth0 proto 116", map[string]int{"route": 1}},
		{"ip neigh del 10.244.2.0 dev tweed.1", map[string]int{"neighbour": 1}},
		{"ip neigh replace 10.244.2.0 lladdr 0e:00:00:00:00:09 dev tweed.1 nud permanent",
			map[string]int{"neighbour": 1}},
		{"bridge fdb del 0e:00:00:00:00:02 dev tweed.1", map[string]int{"fdb": 1}},
		{"bridge fdb replace 0e:00:00:00:00:02 dev tweed.1 dst 192.0.2.99 self permanent", map[string]int{"fdb": 1}},
		{"bridge fdb add 0e:00:00:00:00:07 dev tweed.1 dst 192.0.2.7 self permanent", map[string]int{"fdb": 1}},
		{"ip addr del fd00:10:244:1::2/128 dev tweed.1", map[string]int{"address": 1}},
		{"ip addr add 10.244.1.77/24 dev tweed0 noprefixroute", map[string]int{"address": 1}},
		{"ip rule add pref 100 from 10.99.0.0/24 lookup main proto 116", map[string]int{"rule": 1}},
		{"ip rule del pref 116", map[string]int{"rule": 1}},
		{"sysctl -w net.ipv4.ip_forward=0", map[string]int{"sysctl": 1}},
		{"sysctl -w net.ipv6.conf.tweed/1.accept_ra=1", map[string]int{"sysctl": 1}},
		{"iptables -t nat -D POSTROUTING 1", map[string]int{"filter": 1}},
		{"ip6tables -D TWEED-FWD 1", map[string]int{"filter": 1}},
		{"iptables -I TWEED-FWD -j ACCEPT", map[string]int{"filter": 1}},
		{"ip link set tweed.1 mtu 1400", map[string]int{"link": 1}},
		{"ip link set tweed0 type bridge mcast_snooping 1", map[string]int{"link": 1}},
		// With the last IPv4 address of a device, its routes and neighbours go.
		{"ip addr del 10.244.1.0/32 dev tweed.1", map[string]int{"address": 1, "neighbour": 1, "route": 1}},
		{"ip link set tweed.1 down", map[string]int{"link": 1, "address": 1, "neighbour": 2, "route": 2}},
		{"ip link del tweed.1",
			map[string]int{"link": 1, "address": 2, "neighbour": 2, "fdb": 1, "route": 2, "sysctl": 2}},
		{"ip link del tweed0", map[string]int{"link": 1, "address": 2, "route": 2, "sysctl": 2}},
	} {
		before := h.drift()
		h.Run(t, fault.commands)
		h.quiet()
		moved := map[string]int{}
		for kind, n := range h.drift() {
			if n != before[kind] {
				moved[kind] = n - before[kind]
			}
		}
		if !maps.Equal(moved, fault.want) {
			t.Errorf("%s: moved %v, want %v", fault.commands, moved, fault.want)
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
