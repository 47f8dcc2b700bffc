package main

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A published is what a third node has published, by mistake or not.
type published struct {
	node    string
	subnets string
	mac     string
	host    string // 192.0.2.99 if empty
	vni     int    // 1 if 0
	since   string // after n1 and n2 if empty
}

func (v *victim) path(node string) string { return filepath.Join(v.leases, node+".json") }

func (v *victim) publishes(p published) {
	v.t.Helper()
	mac := ""
	if p.mac != "" {
		mac = fmt.Sprintf(`,"mac":%q`, p.mac)
	}
	text := fmt.Sprintf(`{"node":%q,"since":%q,"subnets":%q,"host":%q,"backend":"vxlan",
		"backend-data":{"vni":%d,"port":8472%s}}`, p.node, cmp.Or(p.since, "2026-01-03T00:00:00Z"), p.subnets,
		cmp.Or(p.host, "192.0.2.99"), cmp.Or(p.vni, 1), mac)
	if err := os.WriteFile(v.path(p.node), []byte(text), 0o644); err != nil {
		v.t.Fatal(err)
	}
}

func (v *victim) leaves(node string) {
	v.t.Helper()
	if err := os.Remove(v.path(node)); err != nil {
		v.t.Fatal(err)
	}
}

// leads waits until n1's kernel holds all of some, and none of others, of routes, neighbours and FDB entries.
func (v *victim) leads(what string, to []string, not ...string) {
	v.t.Helper()
	out, wrong := "", ""
	for start := time.Now(); time.Since(start) < soon(); {
		out, wrong = v.shell(`ip route show proto 116; ip -6 route show proto 116; ip neigh show dev tweed.1 nud permanent
			ip -6 neigh show dev tweed.1 nud permanent; bridge fdb show dev tweed.1`), ""
		for _, text := range to {
			if !strings.Contains(out, text) {
				wrong = "there is no " + text
			}
		}
		for _, text := range not {
			if strings.Contains(out, text) {
				wrong = "there still is " + text
			}
		}
		if wrong == "" {
			return
		}
	}
	v.t.Errorf("%s: after %v %s in\n%s", what, soon(), wrong, out)
}

// names waits until n1's report has a problem with that text.
func (v *victim) names(text string) {
	v.t.Helper()
	v.awaitShows("curl -s http://127.0.0.1:9479/report", text)
}

// Whatever a third node publishes, rightly and wrongly, and takes back is followed or refused, and n1 and n2 go on
// talking.
func TestThirdNodeDoesWhatNodesDo(t *testing.T) {
	t.Parallel()
	v := newVictim(t, "nftables", intervalVar+"=1h")
	began := time.Now()
	if _, gap := v.talk.goesOn(began); gap > soon() {
		t.Fatalf("no call is answered for %v", gap)
	}

	const old, renewed = "0e:00:00:00:00:09", "0e:00:00:00:00:19"
	third := published{node: "n3", subnets: "10.244.9.0/24,fd00:10:244:9::/64", mac: old}
	v.publishes(third)
	v.leads("a node comes", []string{"10.244.9.0/24 via", "fd00:10:244:9::/64 via", old + " dst 192.0.2.99"})

	third.mac = renewed
	v.publishes(third)
	v.leads("another MAC", []string{"10.244.9.0 lladdr " + renewed, renewed + " dst 192.0.2.99"}, old)

	third.host = "192.0.2.98"
	v.publishes(third)
	v.leads("another address", []string{renewed + " dst 192.0.2.98"}, "192.0.2.99")

	third.subnets = "10.244.29.0/24,fd00:10:244:9::/64"
	v.publishes(third)
	v.leads("another subnet of one family", []string{"10.244.29.0/24 via 10.244.29.0 ", "fd00:10:244:9::/64 via"},
		"10.244.9.0")
	third.subnets = "10.244.29.0/24,fd00:10:244:29::/64"
	v.publishes(third)
	v.leads("another subnet of the other", []string{"10.244.29.0/24 via", "fd00:10:244:29::/64 via"}, "fd00:10:244:9::")
	third.subnets = "10.244.29.0/24"
	v.publishes(third)
	v.leads("one family less", []string{"10.244.29.0/24 via"}, "fd00:10:244:29::")

	// What a peer leaves behind is gone already, and the next one does not wait for it.
	v.shell("ip route del 10.244.29.0/24; ip neigh del 10.244.29.0 dev tweed.1")
	v.shell("bridge fdb del " + renewed + " dev tweed.1")
	v.leaves("n3")
	v.publishes(published{node: "n4", subnets: "10.244.4.0/24", mac: "0e:00:00:00:00:04"})
	v.leads("a peer that is gone already", []string{"10.244.4.0/24 via", "0e:00:00:00:00:04"}, "10.244.29.0", renewed)

	refused := []struct {
		published
		why, not string
	}{
		{published{node: "n5", subnets: "10.244.5.0/24"}, "has no ", "10.244.5.0"},
		{published{node: "n6", subnets: "10.96.0.0/12", mac: "0e:00:00:00:00:06"}, "10.96.0.0/12", "10.96.0.0"},
		{published{node: "n7", subnets: "10.244.7.0/24", mac: "0e:00:00:00:00:07", vni: 7}, "VNI 7", "10.244.7.0"},
		{published{node: "n8", subnets: "10.244.2.0/24", mac: "0e:00:00:00:00:08"}, "10.244.2.0/24", "0e:00:00:00:00:08"},
	}
	writes := v.metric(`tweed_operations_total{kind="route",result="done"}`)
	for i, r := range refused {
		v.publishes(r.published)
		v.publishes(published{node: fmt.Sprintf("m%d", i), subnets: fmt.Sprintf("10.244.%d.0/24", 100+i),
			mac: fmt.Sprintf("0e:00:00:00:01:%02x", i)})
		v.leads(r.node+" beside one that is all right", []string{fmt.Sprintf("10.244.%d.0/24 via", 100+i)}, r.not)
		v.names(`"node": "` + r.node + `"`)
		v.names(r.why)
	}
	for _, r := range refused { // those that had no right to it take nothing with them
		v.leaves(r.node)
	}
	v.pass()
	v.leads("refused nodes are gone", []string{"10.244.2.0/24 via 10.244.2.0 ", "10.244.4.0/24 via"})
	if n := v.metric(`tweed_operations_total{kind="route",result="done"}`) - writes; n != len(refused) {
		t.Errorf("%d routes were written for %d nodes", n, len(refused))
	}

	// While nobody looks.
	v.daemon.stop()
	v.leaves("n4")
	v.shell("ip route del 10.244.2.0/24")
	v.daemon.start()
	v.leads("a peer left while the daemon was down", []string{"10.244.2.0/24 via 10.244.2.0 ", "10.244.100.0/24 via"},
		"10.244.4.0", "0e:00:00:00:00:04")
	if back, _ := v.talk.goesOn(time.Now()); !back {
		t.Error("n1 and n2 do not talk any more")
	}
}
