package overlay

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/vxlan"
	"tweed.dev/tweed/subnet"
)

// A hostile is what a Node can publish to harm others: the record of Node number i, and whether the Node is younger
// than good ones. Where it is not, nothing but the record's own fault keeps it from winning.
type hostile struct {
	younger bool
	record  func(i int, good subnet.Record) subnet.Record
}

// hostiles makes every kind there is out of a record without fault, which has a subnet of its own.
func hostiles() map[string]hostile {
	data := func(vni uint32, mac string) string { return fmt.Sprintf(`{"vni":%d,"port":8472,"mac":%q}`, vni, mac) }
	change := func(younger bool, f func(i int, r *subnet.Record)) hostile {
		return hostile{younger, func(i int, r subnet.Record) subnet.Record { f(i, &r); return r }}
	}
	return map[string]hostile{
		"outside":       change(false, func(i int, r *subnet.Record) { r.Subnets = fmt.Sprintf("172.16.%d.0/24", i%256) }),
		"all addresses": change(false, func(_ int, r *subnet.Record) { r.Subnets = "0.0.0.0/0,::/0" }),
		"overlapping":   change(true, func(i int, r *subnet.Record) { r.Subnets = fmt.Sprintf("10.%d.0.0/16", 128+i%4) }),
		"inside":        change(true, func(i int, r *subnet.Record) { r.Subnets = fmt.Sprintf("10.128.%d.128/25", i%256) }),
		"same subnet": change(true, func(i int, r *subnet.Record) {
			r.Subnets = fmt.Sprintf("10.%d.%d.0/24,fd00:10:244:%x::/64", 128+i/256, i%256, 0x1000+i)
		}),
		"our subnet": change(true, func(_ int, r *subnet.Record) { r.Subnets = "10.244.1.0/24" }),
		"same MAC": change(true, func(i int, r *subnet.Record) {
			r.Data = data(1, vxlan.MAC(fmt.Sprintf("peer-%d", i)).String())
		}),
		"our MAC":        change(true, func(_ int, r *subnet.Record) { r.Data = data(1, vxlan.MAC("n1").String()) }),
		"group's MAC":    change(false, func(_ int, r *subnet.Record) { r.Data = data(1, "01:00:5e:00:00:01") }),
		"another VNI":    change(false, func(_ int, r *subnet.Record) { r.Data = data(7, "0e:00:00:00:00:01") }),
		"multicast host": change(false, func(_ int, r *subnet.Record) { r.Host = "239.1.1.1" }),
		"host in a pod":  change(false, func(_ int, r *subnet.Record) { r.Host = "10.128.0.5" }),
		"another family": change(false, func(_ int, r *subnet.Record) { r.Host = "2001:db8::1" }),
		"huge": change(false, func(_ int, r *subnet.Record) {
			r.Subnets = strings.Repeat("10.128.0.0/24,", 64<<10/14)
			r.Host, r.Data = strings.Repeat("9", 64<<10), `{"vni":`+strings.Repeat("1", 64<<10)+"}"
		}),
		"garbage": change(false, func(_ int, r *subnet.Record) {
			*r = subnet.Record{Subnets: "\x00", Host: "\xff", Backend: "VXLAN\n", Data: "{"}
		}),
	}
}

// hostileList is what is read of n hostile Nodes, of each kind in turn.
func hostileList(n int) (list subnet.List) {
	kinds := hostiles()
	names := slices.Sorted(maps.Keys(kinds))
	for i := range n {
		h := kinds[names[i%len(names)]]
		since := born.Add(-time.Hour)
		if h.younger {
			since = born.Add(2 * time.Hour)
		}
		name := fmt.Sprintf("hostile-%d", i)
		r := h.record(i, subnet.Record{
			Subnets: fmt.Sprintf("10.%d.%d.0/24", 64+i/256, i%256), Host: fmt.Sprintf("198.19.%d.%d", i/250, 1+i%250),
			Backend: vxlan.Name, Data: string(vxlan.Config{Node: name, VNI: 1, Port: 8472}.Data()),
		})
		leases, problems := r.Leases(name, since, "annotation tweed.dev/")
		list.Leases, list.Problems = append(list.Leases, leases...), append(list.Problems, problems...)
	}
	return list
}

// meet has the node see the leases of good Nodes among those of hostile ones.
func (n *node) meet(good int, bad subnet.List) {
	n.cluster.set(slices.Concat(bad.Leases, manyPeers(good))...)
	n.cluster.with(func(c *cluster) { c.list.Problems = bad.Problems })
}

func TestThousandHostileNodesAmongAThousandGoodOnes(t *testing.T) {
	const count = 1000
	plain, n := newNode(t), newNode(t)
	plain.meet(count, subnet.List{})
	n.meet(count, hostileList(count))
	want, rep := plain.step(t), n.step(t)
	if !rep.Converged || rep.Failed > 0 || rep.Done != want.Done || rep.Peers != want.Peers {
		t.Errorf("%d operations for %d peers, %d failed, converged %v; without hostile Nodes %d for %d",
			rep.Done, rep.Peers, rep.Failed, rep.Converged, want.Done, want.Peers)
	}
	if len(n.routes(t)) != 3*count { // one to each node too
		t.Errorf("%d routes to %d good dual-stack peers", len(n.routes(t)), count)
	}
	if ops, _ := backend.Diff(plain.state(t), backend.Observed{State: n.state(t)}); len(ops) > 0 {
		t.Errorf("the kernel differs from one without hostile Nodes by %d operations: %v...", len(ops), ops[0])
	}
	named := map[string]bool{}
	for _, p := range rep.Problems {
		if named[p.Node] = true; !strings.HasPrefix(p.Node, "hostile-") && !slices.Contains(want.Problems, p) {
			t.Errorf("a problem of a node without fault: %s", p)
		}
		if len(p.Text) > 400 {
			t.Errorf("a text of %d bytes: %.100s...", len(p.Text), p.Text)
		}
	}
	kinds := slices.Sorted(maps.Keys(hostiles()))
	for i := range count {
		if name := fmt.Sprintf("hostile-%d", i); !named[name] {
			t.Errorf("%s is not named: %s", name, kinds[i%len(kinds)])
		}
	}
	if again := n.step(t); again.Done+again.Failed > 0 {
		t.Errorf("the next pass has something to do: %+v", again)
	}
}

// BenchmarkHostile measures the pass that programs good peers on a real kernel, taking turns: with as many hostile
// Nodes among them, and without.
func BenchmarkHostile(b *testing.B) {
	const count, rounds = 1000, 5
	bad := hostileList(count)
	var with, without samples
	for b.Loop() {
		for range rounds {
			measureMeeting(b, count, subnet.List{}, &without)
			measureMeeting(b, count, bad, &with)
		}
	}
	b.Logf("program %d peers:              %v", count, without)
	b.Logf("the same among %d hostile ones: %v", count, with)
	b.ReportMetric(float64(with.median())/float64(without.median()), "ratio")
}

func measureMeeting(b *testing.B, good int, bad subnet.List, took *samples) {
	inNamespace(b, func() {
		n := onKernel(b)
		n.cluster.set()
		n.step(b)
		n.step(b)
		n.meet(good, bad)
		start := time.Now()
		rep := n.step(b)
		took.add(time.Since(start))
		if !rep.Converged || rep.Done != 5*good {
			b.Errorf("programmed %d objects: %v", rep.Done, rep.Waiting)
		}
	})
}
