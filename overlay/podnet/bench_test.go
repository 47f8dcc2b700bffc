package podnet

import (
	"context"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"

	"tweed.dev/tweed/backend/kernel/netnstest"
)

// debian is where Debian's containernetworking-plugins has its plugins.
const debian = "/usr/lib/cni"

// BenchmarkCNI measures ADD and DEL of tweed-cni beside those of the bridge and host-local plugins, taking turns,
// through libcni. Each pod has a new network namespace.
func BenchmarkCNI(b *testing.B) {
	if _, err := os.Stat(debian + "/host-local"); err != nil {
		b.Fatalf("%v: apt-get install containernetworking-plugins", err)
	}
	const v4 = `[{"subnet": "10.99.0.0/24"}]`
	b.Run("ipv4", func(b *testing.B) { compare(b, 200, v4, subnet4) })
	// The bridge plugin waits for duplicate address detection here.
	b.Run("dual", func(b *testing.B) { compare(b, 20, v4+`, [{"subnet": "fd00:99::/64"}]`, subnet4, subnet6) })
}

func compare(b *testing.B, rounds int, ranges string, subnets ...string) {
	n := newNode(b, subnets...)
	theirs, err := libcni.NetworkConfFromBytes(fmt.Appendf(nil, `{"cniVersion": "1.0.0", "name": "theirs", "plugins": [
		{"type": "bridge", "bridge": "cni0", "isDefaultGateway": true, "hairpinMode": true, "mtu": 1430,
		 "ipam": {"type": "host-local", "dataDir": %q, "ranges": [%s]}}]}`, b.TempDir(), ranges))
	if err != nil {
		b.Fatal(err)
	}
	exec := &invoke.DefaultExec{RawExec: &invoke.RawExec{Stderr: os.Stderr}}
	contestants := []*contestant{
		{name: "tweed", cni: n.cni, list: n.conflist("1.0.0")},
		{name: "bridge+host-local", cni: libcni.NewCNIConfigWithCacheDir([]string{debian}, b.TempDir(), exec), list: theirs},
	}
	for b.Loop() {
		for i := range rounds {
			for _, c := range contestants {
				c.turn(b, n, fmt.Sprint("c", i))
			}
		}
	}
	for _, verb := range []string{"ADD", "DEL"} {
		var medians []time.Duration
		for _, c := range contestants {
			times := c.adds
			if verb == "DEL" {
				times = c.dels
			}
			slices.Sort(times)
			median, p99 := times[len(times)/2], times[len(times)*99/100]
			medians = append(medians, median)
			b.Logf("%s %-18s %4d times: median %7.2f ms, p99 %7.2f ms", verb, c.name, len(times), ms(median), ms(p99))
			b.ReportMetric(ms(median), fmt.Sprintf("%s-%s-median-ms", c.name, verb))
		}
		b.Logf("%s takes %.2f of the time", verb, float64(medians[0])/float64(medians[1]))
	}
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

type contestant struct {
	name       string
	cni        *libcni.CNIConfig
	list       *libcni.NetworkConfigList
	adds, dels []time.Duration
}

// turn adds and deletes one pod, measuring both.
func (c *contestant) turn(b *testing.B, n *node, container string) {
	pod := netnstest.New(b)
	rt := runtimeConf(container, pod.Path())
	var addErr, delErr error
	n.Do(b, func() {
		start := time.Now()
		_, addErr = c.cni.AddNetworkList(context.Background(), c.list, rt)
		added := time.Now()
		delErr = c.cni.DelNetworkList(context.Background(), c.list, rt)
		c.adds, c.dels = append(c.adds, added.Sub(start)), append(c.dels, time.Since(added))
	})
	if addErr != nil || delErr != nil {
		b.Fatalf("%s: ADD: %v, DEL: %v", c.name, addErr, delErr)
	}
}
