package podnet

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// A killing is a node on which calls of the plugin are killed. Its pods are limited, so that further plugins are called
// for them; what these have made are files in a directory.
type killing struct {
	*node
	env  []string
	name string // begins its containers' names
	made string
	pods int
}

func newKilling(t *testing.T, name string, subnets ...string) *killing {
	t.Helper()
	k := &killing{node: newNode(t, subnets...), name: name, made: t.TempDir()}
	dir := fakes(t, map[string]string{"bandwidth": `cat > /dev/null
		case $CNI_COMMAND in
		ADD) touch ` + k.made + `/$CNI_CONTAINERID; echo '{"cniVersion": "1.0.0", "ips": []}' ;;
		DEL) rm -f ` + k.made + `/$CNI_CONTAINERID ;;
		esac`})
	k.env = []string{"CNI_PATH=" + dir, "PATH=" + os.Getenv("PATH")}
	return k
}

func (k *killing) input() string {
	return strings.TrimSuffix(k.gcInput("tweed", ""), "}") + `, "runtimeConfig": {"bandwidth": {"ingressRate": 8}}}`
}

// pod makes a namespace with a name, which can be destroyed.
func (k *killing) pod() (container, netns string) {
	k.t.Helper()
	k.pods++
	container = fmt.Sprint(k.name, k.pods)
	k.Run(k.t, "ip netns add "+container)
	k.t.Cleanup(func() { _, _ = k.Try(k.t, "ip netns del "+container) })
	return container, "/run/netns/" + container
}

func (k *killing) plugin(verb, container, netns, stdin string) error {
	return k.call(verb, stdin, append([]string{"CNI_CONTAINERID=" + container, "CNI_NETNS=" + netns}, k.env...)...)
}

func (k *killing) mustCall(verb, container, netns string) {
	k.t.Helper()
	if err := k.plugin(verb, container, netns, k.input()); err != nil {
		k.t.Errorf("%s of %s: %v", verb, container, err)
	}
}

// want counts what there is of pods: records, addresses, veths, and what further plugins made.
func (k *killing) want(when string, pods int) {
	k.t.Helper()
	for what, have := range map[string]int{
		"records":   len(must((&Roster{}).Attached(k.runDir))),
		"addresses": len(names(k.t, filepath.Join(k.runDir, "addrs"))) / len(k.info.Subnets),
		"veths":     strings.Count(k.Run(k.t, "ip -brief link show type veth"), "\n"),
		"limits":    len(names(k.t, k.made)),
	} {
		if have != pods {
			k.t.Errorf("%s: %s for %d pods, want %d", when, what, have, pods)
		}
	}
}

// sweeps has the daemon sweep until nobody is at work any more: a plugin that was called by one that was killed may be.
func (k *killing) sweeps() {
	k.t.Helper()
	await(k.t, "the end of what was begun", func() bool {
		if err := k.sweep(strings.TrimPrefix(k.env[0], "CNI_PATH=")); err != nil {
			k.t.Error(err)
		}
		return !slices.ContainsFunc(names(k.t, filepath.Join(k.runDir, "pods")), func(name string) bool {
			return Busy(k.runDir, name)
		})
	})
	if err := k.sweep(strings.TrimPrefix(k.env[0], "CNI_PATH=")); err != nil {
		k.t.Error(err)
	}
	for _, name := range names(k.t, filepath.Join(k.runDir, "pods")) {
		if strings.HasPrefix(name, litter) {
			k.t.Errorf("the sweep left %s", name)
		}
	}
}

// destroy is the end of a pod without a DEL.
func (k *killing) destroy(container string) {
	k.t.Helper()
	k.Run(k.t, "ip netns del "+container)
	veth := vethName(container, "eth0")
	await(k.t, "the end of "+veth, func() bool { return !strings.Contains(strings.Join(k.ports(), " "), veth+"@") })
}

// each calls f with 1, 2 and so on, which kills a call of the plugin at that call to the kernel, until it was not
// killed.
func (k *killing) each(atLeast int, f func(at int, when string) trace) {
	k.t.Helper()
	for at := 1; ; at++ {
		tr := f(at, fmt.Sprint("killed at call ", at))
		if !tr.killed {
			k.t.Logf("%d calls: %v", len(tr.calls), tr.calls)
			if tr.status != 0 || len(tr.calls) < atLeast {
				k.t.Errorf("in the end it returned %d, %s, after %d calls", tr.status, tr.stdout, len(tr.calls))
			}
			return
		}
		if k.t.Failed() {
			k.t.Fatalf("killed before %v", tr.calls)
		}
	}
}

// kill has a call of the plugin killed, and sees that no address is free while its veth is there.
func (k *killing) kill(verb, container, netns, stdin string, at int) trace {
	k.t.Helper()
	tr := k.traced(verb, container, netns, stdin, at, k.env...)
	for _, port := range k.ports() {
		veth, _, ok := strings.Cut(port, "@")
		if !ok {
			continue
		}
		var rec record
		if text, err := os.ReadFile(filepath.Join(k.runDir, "pods", veth)); err == nil {
			rec, _ = readRecord(strings.NewReader(string(text)))
		}
		for _, subnet := range k.info.Subnets {
			if !slices.ContainsFunc(rec.Addrs, subnet.Overlaps) {
				k.t.Errorf("%s killed at call %d: %s is there, on record with %v", verb, at, veth, rec.Addrs)
			}
		}
		for _, a := range rec.Addrs {
			if _, err := os.Stat(filepath.Join(k.runDir, "addrs", a.Addr().String())); err != nil {
				k.t.Errorf("%s killed at call %d: %s is there: %v", verb, at, veth, err)
			}
		}
	}
	return tr
}

// again calls ADD once more, as a runtime that goes on as if nothing had been, or else as the specification says.
func (k *killing) again(when, container, netns string) {
	k.t.Helper()
	err := k.plugin("ADD", container, netns, k.input())
	if err == nil {
		return
	}
	wantCode(k.t, when, err, 4, "delete that first")
	k.mustCall("DEL", container, netns)
	k.mustCall("ADD", container, netns)
}

func TestAddIsKilledAtEachCall(t *testing.T) {
	t.Parallel()
	k := newKilling(t, "add", subnet4, subnet6)
	first := func() {
		for _, name := range []string{"pods", "addrs", "last-32", "last-128"} { // as at the node's first pod
			if err := os.RemoveAll(filepath.Join(k.runDir, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	k.each(15, func(at int, when string) trace {
		first()
		c, netns := k.pod()
		k.kill("ADD", c, netns, k.input(), at)
		k.again(when, c, netns)
		k.want(when+" and called again", 1)
		k.mustCall("DEL", c, netns)
		k.sweeps()
		k.want(when+", called again and deleted", 0)

		first()
		c, netns = k.pod()
		tr := k.kill("ADD", c, netns, k.input(), at)
		k.destroy(c)
		k.sweeps()
		k.want(when+" and never heard of again", 0)
		return tr
	})
}

func TestAddToAFullSubnetIsKilledAtEachCall(t *testing.T) {
	t.Parallel()
	k := newKilling(t, "full", "10.244.3.0/30") // one pod
	k.each(15, func(at int, when string) trace {
		c, netns := k.pod()
		k.mustCall("ADD", c, netns)
		k.destroy(c)
		c, netns = k.pod()
		tr := k.kill("ADD", c, netns, k.input(), at)
		k.again(when, c, netns)
		k.destroy(c)
		k.sweeps()
		k.want(when+", called again and never heard of again", 0)
		return tr
	})
}

// attach has some pods that live on.
func (k *killing) attach(pods int) {
	k.t.Helper()
	for range pods {
		c, netns := k.pod()
		k.mustCall("ADD", c, netns)
	}
}

func TestDelIsKilledAtEachCall(t *testing.T) {
	t.Parallel()
	k := newKilling(t, "del", subnet4, subnet6)
	k.attach(1)
	k.each(5, func(at int, when string) trace {
		c, netns := k.pod()
		k.mustCall("ADD", c, netns)
		k.kill("DEL", c, netns, k.input(), at)
		k.mustCall("DEL", c, netns)
		k.want(when+" and called again", 1)

		k.mustCall("ADD", c, netns)
		tr := k.kill("DEL", c, netns, k.input(), at)
		k.destroy(c)
		k.sweeps()
		k.want(when+" and never heard of again", 1)
		return tr
	})
}

func TestGCIsKilledAtEachCall(t *testing.T) {
	t.Parallel()
	k := newKilling(t, "gc", subnet4, subnet6)
	k.attach(1)
	collect := k.gcInput("tweed", valid(t, "gc1"))
	k.each(10, func(at int, when string) trace {
		var stale []string
		for range 2 {
			c, netns := k.pod()
			k.mustCall("ADD", c, netns)
			stale = append(stale, c)
		}
		tr := k.kill("GC", "", "", collect, at)
		if at%2 == 0 {
			for _, c := range stale {
				k.destroy(c)
			}
			k.sweeps()
		} else {
			await(t, "GC to find nobody at work", func() bool {
				if err := k.plugin("GC", "", "", collect); err != nil {
					t.Error(err)
				}
				return len(must((&Roster{}).Attached(k.runDir))) == 1
			})
		}
		k.want(when, 1)
		return tr
	})
}
