package podnet

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"

	"tweed.dev/tweed/backend/kernel/netnstest"
)

// What the plugin is held to.
const (
	addGoal      = 5 * time.Millisecond // the median of an ADD
	addRatio     = 3                    // how many times the median of the chain with portmap is that of an ADD
	delGoal      = 4 * time.Millisecond // what the median of a DEL may take beyond the floor's
	startGoal    = 2500 * time.Microsecond
	crowd        = 50  // ADDs at once
	crowdRatio   = 0.5 // of the time that the chain with portmap takes for as many
	pluginSize   = 6 << 20
	benchRounds  = 200
	dualRounds   = 20 // the bridge plugin waits for duplicate address detection
	crowdRounds  = 5
	benchSubnet4 = "10.99.0.0/24"
	benchSubnet6 = "fd00:99::/64"
)

// rivals builds the upstream plugins and the floor, of this module's versions and with its Go.
var rivals = sync.OnceValues(func() (string, error) {
	const dir = "/run/rivals"
	cmd := exec.Command("go", "build", "-ldflags", "-s -w", "-o", dir+"/", "./testdata/floor", upstream+"main/bridge",
		upstream+"ipam/host-local", upstream+"meta/portmap")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return dir, nil
})

// BenchmarkCNI measures ADD and DEL of tweed-cni, in turns with the upstream plugins and with the floor, which makes a
// veth and nothing else. All are called through libcni, and each pod has a new network namespace.
func BenchmarkCNI(b *testing.B) {
	b.Run("start", benchStart)
	b.Run("ipv4", func(b *testing.B) {
		for b.Loop() {
			r := newRace(b, subnet4)
			r.run(benchRounds)
			r.report()
			r.judge()
		}
	})
	b.Run("dual", func(b *testing.B) {
		for b.Loop() {
			r := newRace(b, subnet4, subnet6)
			r.run(dualRounds)
			r.report()
		}
	})
	b.Run("crowd", benchCrowd)
}

// TestPluginIsCalledBesideOthers is a round of the benchmark, without its goals for times.
func TestPluginIsCalledBesideOthers(t *testing.T) {
	r := newRace(t, subnet4)
	r.run(1)
	r.crowd(4)
	for _, c := range r.contestants {
		if len(c.adds) != 1 || len(c.dels) != 1 || len(c.crowds) != 1 {
			t.Errorf("%s: ADD %v, DEL %v, at once %v", c.name, c.adds, c.dels, c.crowds)
		}
	}
	bin, _ := plugin()
	info, err := os.Stat(bin + "/tweed-cni")
	if err != nil || info.Size() > pluginSize {
		t.Errorf("%v; tweed-cni has %d bytes, more than %d", err, info.Size(), pluginSize)
	}
}

// A race is one node, and plugins that take turns on it.
type race struct {
	testing.TB
	*node
	contestants []*contestant
}

// The contestants, by what they are in a race.
const (
	ours = iota
	chain
	chainWithPortmap
	floor
)

func newRace(t testing.TB, subnets ...string) *race {
	dir, err := rivals()
	if err != nil {
		t.Fatal(err)
	}
	n := newNode(t, subnets...)
	r := &race{TB: t, node: n}
	r.contestants = append(r.contestants, &contestant{name: "tweed", cni: n.cni, list: n.conflist("1.0.0")})
	ranges := fmt.Sprintf(`[{"subnet": %q}]`, benchSubnet4)
	if len(subnets) > 1 {
		ranges += fmt.Sprintf(`, [{"subnet": %q}]`, benchSubnet6)
	}
	bridge := func(device string) string {
		return fmt.Sprintf(`{"type": "bridge", "bridge": %q, "isDefaultGateway": true, "hairpinMode": true, "mtu": 1430,
			"ipam": {"type": "host-local", "dataDir": %q, "ranges": [%s]}}`, device, t.TempDir(), ranges)
	}
	for _, c := range []struct{ name, plugins string }{
		{"bridge+host-local", bridge("cni0")},
		{"bridge+host-local+portmap",
			bridge("cni1") + `, {"type": "portmap", "snat": true, "capabilities": {"portMappings": true}}`},
		{"floor", `{"type": "floor"}`},
	} {
		text := fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "rival", "plugins": [%s]}`, c.plugins)
		list, err := libcni.NetworkConfFromBytes([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		exec := &invoke.DefaultExec{RawExec: &invoke.RawExec{Stderr: os.Stderr}}
		cni := libcni.NewCNIConfigWithCacheDir([]string{dir}, t.TempDir(), exec)
		r.contestants = append(r.contestants, &contestant{name: c.name, cni: cni, list: list})
	}
	return r
}

type contestant struct {
	name       string
	cni        *libcni.CNIConfig
	list       *libcni.NetworkConfigList
	adds, dels times
	crowds     times
}

// run has each contestant add and delete a pod, in turns.
func (r *race) run(rounds int) {
	for i := range rounds {
		for _, c := range r.contestants {
			r.turn(c, fmt.Sprint("c", i))
		}
	}
}

func (r *race) turn(c *contestant, container string) {
	pod := netnstest.New(r)
	rt := runtimeConf(container, pod.Path())
	var addErr, delErr error
	r.Do(r, func() {
		start := time.Now()
		_, addErr = c.cni.AddNetworkList(context.Background(), c.list, rt)
		added := time.Now()
		delErr = c.cni.DelNetworkList(context.Background(), c.list, rt)
		c.adds, c.dels = append(c.adds, added.Sub(start)), append(c.dels, time.Since(added))
	})
	if addErr != nil || delErr != nil {
		r.Fatalf("%s: ADD: %v, DEL: %v", c.name, addErr, delErr)
	}
}

// crowd has each contestant add that many pods at once, and delete them.
func (r *race) crowd(pods int) {
	namespaces := make([]*netnstest.NS, pods)
	for _, c := range r.contestants {
		for i := range namespaces {
			namespaces[i] = netnstest.New(r)
		}
		each := func(call func(*libcni.RuntimeConf) error) error {
			errs := make([]error, pods)
			var wg sync.WaitGroup
			for i, pod := range namespaces {
				wg.Go(func() {
					r.Do(r, func() { errs[i] = call(runtimeConf(fmt.Sprint("c", i), pod.Path())) })
				})
			}
			wg.Wait()
			return errors.Join(errs...)
		}
		start := time.Now()
		err := each(func(rt *libcni.RuntimeConf) error {
			_, err := c.cni.AddNetworkList(context.Background(), c.list, rt)
			return err
		})
		c.crowds = append(c.crowds, time.Since(start))
		err = errors.Join(err, each(func(rt *libcni.RuntimeConf) error {
			return c.cni.DelNetworkList(context.Background(), c.list, rt)
		}))
		if err != nil {
			r.Fatalf("%s, %d at once: %v", c.name, pods, err)
		}
	}
}

func (r *race) report() {
	for _, c := range r.contestants {
		r.Logf("ADD %-26s %v", c.name, c.adds)
	}
	for _, c := range r.contestants {
		r.Logf("DEL %-26s %v", c.name, c.dels)
	}
}

// judge holds times to their goals.
func (r *race) judge() {
	add, del := r.contestants[ours].adds.median(), r.contestants[ours].dels.median()
	times := float64(r.contestants[chainWithPortmap].adds.median()) / float64(add)
	beyond := del - r.contestants[floor].dels.median()
	r.Logf("ADD is %.2f times as fast as the chain, %.2f times with portmap; DEL takes %.2f ms beyond the floor",
		float64(r.contestants[chain].adds.median())/float64(add), times, ms(beyond))
	if add > addGoal {
		r.Errorf("ADD takes %.2f ms; it is to be at most %v", ms(add), addGoal)
	}
	if times < addRatio {
		r.Errorf("ADD is %.2f times as fast as the chain with portmap; it is to be %v", times, addRatio)
	}
	if beyond > delGoal {
		r.Errorf("DEL takes %.2f ms beyond the floor's; it is to be at most %v", ms(beyond), delGoal)
	}
}

func benchCrowd(b *testing.B) {
	for b.Loop() {
		r := newRace(b, subnet4)
		for range crowdRounds {
			r.crowd(crowd)
		}
		for _, c := range r.contestants {
			b.Logf("%d ADDs at once, %-26s %v", crowd, c.name, c.crowds)
		}
		part := float64(r.contestants[ours].crowds.median()) / float64(r.contestants[chainWithPortmap].crowds.median())
		b.Logf("that is %.2f of the time of the chain with portmap", part)
		if part > crowdRatio {
			b.Errorf("%d ADDs at once take %.2f of the time of the chain with portmap; it is to be %v", crowd, part, crowdRatio)
		}
	}
}

// benchStart measures what is before and after any work: from the call until a process that has none has ended.
func benchStart(b *testing.B) {
	bin, err := plugin()
	if err != nil {
		b.Fatal(err)
	}
	dir, err := rivals()
	if err != nil {
		b.Fatal(err)
	}
	var ours, floor times
	for b.Loop() {
		for range benchRounds {
			for file, of := range map[string]*times{bin + "/tweed-cni": &ours, dir + "/floor": &floor} {
				start := time.Now()
				if out, err := exec.Command(file, "--version").CombinedOutput(); err != nil {
					b.Fatalf("%v: %s", err, out)
				}
				*of = append(*of, time.Since(start))
			}
		}
	}
	b.Logf("start of tweed-cni  %v", ours)
	b.Logf("start of the floor  %v", floor)
	if ours.median() > startGoal {
		b.Errorf("starting takes %.2f ms; it is to be at most %v", ms(ours.median()), startGoal)
	}
}

// times are those of one thing done several times.
type times []time.Duration

func (t times) at(percent int) time.Duration {
	return slices.Sorted(slices.Values(t))[len(t)*percent/100]
}

func (t times) median() time.Duration { return t.at(50) }

func (t times) String() string {
	return fmt.Sprintf("median %6.2f ms, p99 %6.2f ms, %d times", ms(t.median()), ms(t.at(99)), len(t))
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
