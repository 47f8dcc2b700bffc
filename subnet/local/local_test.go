package local_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"tweed.dev/tweed/subnet"
	"tweed.dev/tweed/subnet/local"
)

const leaseIn = "TWEED_TEST_LEASE_IN"

// TestMain lets the test binary be a process that leases: TestProcessesLeaseAtTheSameTime starts it as that.
func TestMain(m *testing.M) {
	dir := os.Getenv(leaseIn)
	if dir == "" {
		os.Exit(m.Run())
	}
	if err := leaseOnce(dir, os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func leaseOnce(dir, node string) error {
	d, err := local.New(dir, node, fifty(), quiet())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return d.Run(ctx, func() {
		if _, err := d.Self(); err == nil {
			cancel()
		}
	})
}

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

func network(prefixes ...string) subnet.Network {
	var ranges []subnet.Range
	for _, p := range prefixes {
		ranges = append(ranges, subnet.Range{Prefix: netip.MustParsePrefix(p)})
	}
	return must(subnet.NewNetwork(ranges...))
}

// fifty is a network with 50 subnets.
func fifty() subnet.Network {
	return must(subnet.NewNetwork(subnet.Range{
		Prefix: netip.MustParsePrefix("10.244.0.0/16"), Len: 24,
		Min: netip.MustParsePrefix("10.244.10.0/24"), Max: netip.MustParsePrefix("10.244.60.0/24"),
		Reserved: []netip.Prefix{netip.MustParsePrefix("10.244.20.0/24")},
	}))
}

func must(n subnet.Network, err error) subnet.Network {
	if err != nil {
		panic(err)
	}
	return n
}

// A daemon is a Directory that runs until its test ends.
type daemon struct {
	*local.Directory
	t     *testing.T
	rings atomic.Int64
	stop  func()
}

func start(t *testing.T, dir, node string, n subnet.Network) *daemon {
	t.Helper()
	d := &daemon{t: t}
	var err error
	if d.Directory, err = local.New(dir, node, n, quiet()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx, func() { d.rings.Add(1) }) }()
	d.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(d.stop)
	return d
}

func (d *daemon) await(what string, ok func() bool) {
	d.t.Helper()
	deadline := time.After(time.Minute)
	for !ok() {
		select {
		case <-deadline:
			list, _ := d.List()
			self, err := d.Self()
			d.t.Fatalf("waited in vain: %s\nlist: %+v\nself: %v, %v\nerr: %v", what, list, self, err, d.Err())
		case <-time.After(2 * time.Millisecond):
		}
	}
}

func (d *daemon) awaitSelf() subnet.Node {
	d.t.Helper()
	var self subnet.Node
	d.await("a lease", func() (ok bool) {
		var err error
		self, err = d.Self()
		return err == nil
	})
	return self
}

func (d *daemon) awaitErr(part string) {
	d.t.Helper()
	d.await(part, func() bool {
		_, err := d.Self()
		return err != nil && strings.Contains(err.Error(), part)
	})
}

func (d *daemon) awaitPeers(names ...string) subnet.List {
	d.t.Helper()
	var list subnet.List
	d.await(fmt.Sprint(names), func() bool {
		var ok bool
		list, ok = d.List()
		var got []string
		for _, l := range list.Leases {
			got = append(got, l.Node)
		}
		return ok && slices.Equal(got, names)
	})
	return list
}

func published(self subnet.Node, host string) (leases []subnet.Lease) {
	for _, s := range self.Subnets {
		leases = append(leases, subnet.Lease{
			Node: self.Name, Subnet: s, Host: netip.MustParseAddr(host), NodeAddrs: []netip.Addr{netip.MustParseAddr(host)},
			Backend: "vxlan", Data: json.RawMessage(`{"note":"<&>","vni":1}`), Since: self.Since,
		})
	}
	return leases
}

func (d *daemon) publish(host string) {
	d.t.Helper()
	if err := d.Publish(d.t.Context(), published(d.awaitSelf(), host)); err != nil {
		d.t.Fatal(err)
	}
}

func put(t *testing.T, dir, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func drop(t *testing.T, dir, name string) {
	t.Helper()
	if err := os.Remove(filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
}

func peer(name, prefix, host string) string {
	return fmt.Sprintf(`{"node":%q,"since":"2026-03-01T12:00:00Z","subnets":%q,"host":%q,"backend":"vxlan",`+
		`"backend-data":{ "vni": 1 }}`, name, prefix, host)
}

func TestNodesComeChangeAndLeave(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "not", "made", "yet")
	n := network("10.244.0.0/16", "fd00:10:244::/48")
	n1, n2 := start(t, dir, "n1", n), start(t, dir, "n2", n)
	self := n1.awaitSelf()
	n1.publish("192.0.2.1")
	n2.publish("192.0.2.2")
	for _, d := range []*daemon{n1, n2} {
		list := d.awaitPeers("n1", "n1", "n2", "n2")
		want := published(self, "192.0.2.1")
		if !slices.EqualFunc(list.Leases[:2], want, subnet.Lease.Equal) {
			t.Errorf("leases of n1: %+v\nwant %+v", list.Leases[:2], want)
		}
		if time.Since(list.At) > time.Second || len(list.Problems) != 0 {
			t.Errorf("list at %v with problems %v", list.At, list.Problems)
		}
	}
	earlier, _ := n1.List()
	if later, _ := n1.List(); !later.At.After(earlier.At) || later.Generation != earlier.Generation {
		t.Errorf("a watched list grows old: %v, then %v", earlier.At, later.At)
	}
	if err := n2.Publish(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	n1.awaitPeers("n1", "n1")
	put(t, dir, "n3.json", peer("n3", "10.244.3.0/24", "192.0.2.3"))
	n1.awaitPeers("n1", "n1", "n3")
	drop(t, dir, "n3.json")
	n1.awaitPeers("n1", "n1")
}

func TestSameWordsRingNoBell(t *testing.T) {
	dir := t.TempDir()
	d := start(t, dir, "n1", fifty())
	d.publish("192.0.2.1")
	put(t, dir, "n3.json", peer("n3", "10.244.30.0/24", "192.0.2.3"))
	before := d.awaitPeers("n1", "n3")
	rings := d.rings.Load()
	for range 20 {
		put(t, dir, "n3.json.tmp", peer("n3", "10.244.30.0/24", "192.0.2.3")+"\n")
		if err := os.Rename(filepath.Join(dir, "n3.json.tmp"), filepath.Join(dir, "n3.json")); err != nil {
			t.Fatal(err)
		}
		d.publish("192.0.2.1")
	}
	put(t, dir, "n4.json", peer("n4", "10.244.40.0/24", "192.0.2.4"))
	after := d.awaitPeers("n1", "n3", "n4")
	d.await("the bell", func() bool { return d.rings.Load() > rings })
	if n := d.rings.Load() - rings; n > 2 || after.Generation > before.Generation+2 { // n4's file may be seen half written
		t.Errorf("%d rings; generation %d became %d", n, before.Generation, after.Generation)
	}
}

func TestPublishWritesOnlyWhatChanged(t *testing.T) {
	dir := t.TempDir()
	old := peer("n1", "10.244.30.0/24", "192.0.2.9")
	put(t, dir, "n1.json", strings.Replace(old, "}}", `},"sources":"192.0.2.77"}`, 1))
	d := start(t, dir, "n1", fifty())
	inode := func() uint64 {
		info, err := os.Stat(filepath.Join(dir, "n1.json"))
		if err != nil {
			t.Fatal(err)
		}
		return info.Sys().(*syscall.Stat_t).Ino
	}
	d.publish("192.0.2.1")
	first := inode()
	d.publish("192.0.2.1")
	if inode() != first {
		t.Error("the same words were written again")
	}
	d.publish("192.0.2.2")
	if inode() == first {
		t.Error("a new address was not written")
	}
	list, err := local.ListOnce(dir)
	if err != nil || len(list.Leases) != 1 || list.Leases[0].Host.String() != "192.0.2.2" ||
		fmt.Sprint(list.Leases[0].Sources) != "[192.0.2.77]" {
		t.Errorf("got %+v, %v", list, err)
	}
	for want, l := range map[string]subnet.Lease{
		"no address for the tunnel": {Node: "n1", Subnet: netip.MustParsePrefix("10.244.30.0/24")},
		"10.244.31.0/24 is not leased any more, but": {
			Subnet: netip.MustParsePrefix("10.244.31.0/24"), Host: netip.MustParseAddr("192.0.2.1"),
		},
	} {
		if err := d.Publish(t.Context(), []subnet.Lease{l}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}

func TestLeasesTakenAtTheSameTime(t *testing.T) {
	dir := t.TempDir()
	var daemons []*daemon
	for i := range 50 {
		daemons = append(daemons, start(t, dir, fmt.Sprintf("n%d", i), fifty()))
	}
	for _, d := range daemons {
		d.awaitSelf()
	}
	checkDistinct(t, dir, 50)
	late := start(t, dir, "late", fifty())
	late.awaitErr("all 50 of length /24 in 10.244.0.0/16 are leased, the longest 10.244.")
	daemons[0].stop()
	drop(t, dir, "n0.json")
	if got, want := late.awaitSelf().Subnets, mustSelf(t, daemons[0]).Subnets; !slices.Equal(got, want) {
		t.Errorf("leased %v, free was %v", got, want)
	}
}

func mustSelf(t *testing.T, d *daemon) subnet.Node {
	t.Helper()
	self, err := d.Self()
	if err != nil {
		t.Fatal(err)
	}
	return self
}

func TestProcessesLeaseAtTheSameTime(t *testing.T) {
	dir := t.TempDir()
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			cmd := exec.CommandContext(t.Context(), "/proc/self/exe", fmt.Sprintf("n%d", i))
			cmd.Env = append(os.Environ(), leaseIn+"="+dir)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("n%d: %v\n%s", i, err, out)
			}
		})
	}
	wg.Wait()
	checkDistinct(t, dir, 50)
}

func checkDistinct(t *testing.T, dir string, n int) {
	t.Helper()
	holder := map[string]string{}
	names, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil || len(names) != n {
		t.Fatalf("%d files, want %d: %v", len(names), n, err)
	}
	for _, name := range names {
		var f struct{ Subnets string }
		b, err := os.ReadFile(name)
		if err == nil {
			err = json.Unmarshal(b, &f)
		}
		if err != nil || f.Subnets == "" || holder[f.Subnets] != "" {
			t.Errorf("%s: %v: %s is also held by %q", name, err, f.Subnets, holder[f.Subnets])
		}
		holder[f.Subnets] = name
	}
	if rest, _ := filepath.Glob(filepath.Join(dir, ".new-*")); len(rest) != 0 {
		t.Errorf("left behind: %v", rest)
	}
}

func TestRestartKeepsTheLease(t *testing.T) {
	dir := t.TempDir()
	d := start(t, dir, "n1", network("10.244.0.0/16"))
	before := d.awaitSelf()
	d.stop()
	after := start(t, dir, "n1", network("10.244.0.0/16")).awaitSelf()
	if !slices.Equal(after.Subnets, before.Subnets) || !after.Since.Equal(before.Since) || after.Since.IsZero() {
		t.Errorf("%v became %v", before, after)
	}
	dual := start(t, dir, "n1", network("10.244.0.0/16", "fd00:10:244::/48")).awaitSelf()
	if len(dual.Subnets) != 2 || dual.Subnets[0] != before.Subnets[0] || !dual.Since.Equal(before.Since) {
		t.Errorf("%v became %v in a network with IPv6", before, dual)
	}
}

func TestNetworkChangesUnderALease(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, "n1.json", peer("n1", "10.244.3.0/24", "192.0.2.1"))
	for _, n := range []subnet.Network{network("10.99.0.0/16"), network("fd00:10:244::/48"), network("10.244.3.0/24")} {
		d := start(t, dir, "n1", n)
		d.awaitErr("node n1 holds the lease 10.244.3.0/24, which is not one of the network " + n[0].Prefix.String())
		d.stop()
	}
	b, err := os.ReadFile(filepath.Join(dir, "n1.json"))
	if err != nil || string(b) != peer("n1", "10.244.3.0/24", "192.0.2.1") {
		t.Errorf("the file was changed: %s, %v", b, err)
	}
}

func TestOwnFileIsDeletedOrGarbage(t *testing.T) {
	dir := t.TempDir()
	d := start(t, dir, "n1", network("10.244.0.0/16"))
	d.publish("192.0.2.1")
	d.awaitPeers("n1")
	before := d.awaitSelf()
	drop(t, dir, "n1.json")
	d.publish("192.0.2.1")
	d.awaitPeers("n1")
	if after := d.awaitSelf(); !slices.Equal(after.Subnets, before.Subnets) || !after.Since.Equal(before.Since) {
		t.Errorf("%v became %v", before, after)
	}
	put(t, dir, "n1.json", "garbage")
	d.awaitErr(`"garbage" is not a lease`)
	if err := d.Publish(t.Context(), published(before, "192.0.2.1")); err == nil {
		t.Error("garbage was overwritten")
	}
	drop(t, dir, "n1.json")
	d.awaitSelf()
}

func TestOwnSubnetIsTakenWhileTheFileIsAway(t *testing.T) {
	dir := t.TempDir()
	d := start(t, dir, "n1", network("10.244.0.0/16"))
	before := d.awaitSelf()
	d.stop()
	put(t, dir, "n2.json", peer("n2", before.Subnets[0].String(), "192.0.2.2"))
	drop(t, dir, "n1.json")
	err := d.Publish(t.Context(), published(before, "192.0.2.1"))
	if err == nil || !strings.Contains(err.Error(), "is not leased any more") {
		t.Errorf("published a subnet of n2: %v", err)
	}
	if after := start(t, dir, "n1", network("10.244.0.0/16")).awaitSelf(); slices.Equal(after.Subnets, before.Subnets) {
		t.Errorf("leased %v, which is n2's", after.Subnets)
	}
}

func TestGarbageFilesLeaveTheOthersAlone(t *testing.T) {
	dir := t.TempDir()
	good := peer("bad", "10.244.30.0/24", "192.0.2.9")
	d := start(t, dir, "n1", fifty())
	d.publish("192.0.2.1")
	put(t, dir, "n2.json", peer("n2", "10.244.31.0/24", "192.0.2.2"))
	put(t, dir, "n3.json", `{"node":"n3","since":"2026-03-01T12:00:00Z","subnets":"10.244.32.0/24"}`)
	for text, want := range map[string]string{
		"":                 `"" is not a lease`,
		"garbage":          `"garbage" is not a lease`,
		good[:len(good)-1]: "unexpected EOF",
		good + good:        "followed by something else",
		strings.Replace(good, `"bad"`, `"n2"`, 1):                       `names node "n2" instead of bad`,
		strings.Replace(good, "since", "sinc", 1):                       `unknown field "sinc"`,
		strings.Replace(good, "2026-03-01", "yesterday", 1):             "is not a lease",
		strings.Replace(good, `"since":"2026-03-01T12:00:00Z",`, "", 1): `the key "since" is missing`,
		strings.Replace(good, "10.244.30.0", "10.244.30.1", 1):          "subnets: \"10.244.30.1/24\" is not a subnet",
		strings.Replace(good, "192.0.2.9", "here", 1):                   "host: \"here\" is not an IP address",
		strings.Replace(good, `"vxlan"`, `""`, 1):                       "backend: missing",
		strings.Replace(good, `{ "vni": 1 }`, "null", 1):                "backend-data: \"null\" is not a JSON object",
		good[:len(good)-1] + strings.Repeat(" ", 1<<20) + "}":           "is larger than 16384 bytes",
	} {
		put(t, dir, "bad.json", text)
		d.await(want, func() bool {
			list, _ := d.List()
			return len(list.Problems) == 1 && len(list.Leases) == 2 && list.Problems[0].Node == "bad" &&
				strings.HasPrefix(list.Problems[0].Text, "file bad.json: ") &&
				strings.Contains(list.Problems[0].Text, want) &&
				strings.Contains(list.Problems[0].Text, "pods on bad cannot be reached")
		})
	}
	drop(t, dir, "bad.json")
	put(t, dir, "Not A Node.json", good)
	if err := syscall.Mkfifo(filepath.Join(dir, "pipe.json"), 0o644); err != nil {
		t.Fatal(err)
	}
	put(t, dir, "README", "not ours")
	d.await("a bad name and a pipe", func() bool {
		list, _ := d.List()
		return len(list.Problems) == 2 && len(list.Leases) == 2 &&
			strings.Contains(list.Problems[0].Text, "cannot be the name of a node") &&
			strings.Contains(list.Problems[1].Text, "is not a regular file")
	})
}

func TestWriterDiedHalfway(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, ".new-123", `{"node":"n2"`)
	put(t, dir, ".new-456", peer("n3", "10.244.30.0/24", "192.0.2.3"))
	d := start(t, dir, "n1", fifty())
	d.awaitSelf()
	list, _ := d.List()
	if len(list.Leases) != 0 || len(list.Problems) != 0 {
		t.Errorf("list: %v", list)
	}
	checkDistinct(t, dir, 1)
}

func TestDirectoryIsRemoved(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "leases")
	d := start(t, dir, "n1", fifty())
	d.publish("192.0.2.1")
	before := d.awaitPeers("n1").Leases[0].Subnet
	if err := os.Rename(dir, dir+".away"); err != nil {
		t.Fatal(err)
	}
	d.await("its being missed", func() bool { return d.Err() != nil })
	if list, ok := d.List(); !ok || len(list.Leases) != 1 {
		t.Errorf("the list did not stay: %v", list)
	}
	d.await("its being back", func() bool { return d.Err() == nil })
	d.publish("192.0.2.1")
	if after := d.awaitPeers("n1").Leases[0].Subnet; after != before {
		t.Errorf("%v became %v", before, after)
	}
}

func TestLockIsHeldByAnother(t *testing.T) {
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, ".lock"))
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	d := start(t, dir, "n1", fifty())
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	err = d.Publish(ctx, nil)
	if err == nil || !strings.Contains(err.Error(), "another process holds "+f.Name()) {
		t.Errorf("Publish: %v", err)
	}
	if _, err := d.Self(); err == nil {
		t.Error("leased without the lock")
	}
	f.Close()
	d.awaitSelf()
}

func TestLookLeasesNothing(t *testing.T) {
	dir := t.TempDir()
	d, err := local.New(dir, "n1", fifty(), quiet())
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := d.List(); ok {
		t.Error("a list from nowhere")
	}
	if err := d.Look(); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Self(); err == nil || !strings.Contains(err.Error(), "node n1 has no lease in "+dir) {
		t.Errorf("self: %v", err)
	}
	if names, _ := os.ReadDir(dir); len(names) != 0 {
		t.Errorf("wrote %v", names)
	}
	put(t, dir, "n1.json", peer("n1", "10.244.30.0/24", "192.0.2.1"))
	if err := d.Look(); err != nil {
		t.Fatal(err)
	}
	if self, err := d.Self(); err != nil || fmt.Sprint(self.Subnets) != "[10.244.30.0/24]" {
		t.Errorf("self: %v, %v", self, err)
	}
}

func TestNamesThatCannotBeFiles(t *testing.T) {
	long := strings.Repeat("a", 251)
	for _, name := range []string{"", "../n1", "n1/n2", ".n1", "N1", "n_1", "-n1", "n1.", "n\n1", long} {
		if _, err := local.New(t.TempDir(), name, fifty(), quiet()); err == nil {
			t.Errorf("%q was taken for a node's name", name)
		}
	}
	if _, err := local.New(t.TempDir(), "n1", nil, quiet()); err == nil {
		t.Error("leases of no network")
	}
	if _, err := local.ListOnce("/nonexistent"); err == nil {
		t.Error("leases of no directory")
	}
	start(t, t.TempDir(), strings.Repeat("a", 250), fifty()).publish("192.0.2.1")
}

// Whatever a file says, it is a peer, a lease or a Problem of the node that the file is named for.
func FuzzFile(f *testing.F) {
	f.Add([]byte(peer("n1", "10.244.30.0/24", "192.0.2.1")))
	f.Add([]byte(accepting("n1", "10.244.30.0/24", "192.0.2.1", "10.244.0.0/16,fd00::/48")))
	f.Add([]byte(accepting("n1", "10.244.30.0/24", "192.0.2.1", "10.244.0.0/16,10.0.0.0/8")))
	f.Add([]byte(`{"node":"n1","since":"2026-03-01T12:00:00Z","subnets":"10.244.30.0/24"}`))
	f.Add([]byte(`{"node":"n1","since":"2026-03-01T12:00:00Z","subnets":"","backend-data":null}`))
	f.Add([]byte("{}{"))
	f.Add([]byte(`{"node":"n1","since":"` + strings.Repeat("x", 1000) + `"}`))
	f.Add([]byte(`{"` + strings.Repeat("x", 1000) + `":1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := t.TempDir()
		put(t, dir, "n1.json", string(b))
		list, err := local.ListOnce(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range list.Leases {
			if l.Node != "n1" || !l.Host.IsValid() || !bytes.HasPrefix(l.Data, []byte("{")) {
				t.Errorf("lease %+v", l)
			}
		}
		for _, p := range list.Problems {
			if p.Node != "n1" || len(p.Text) > 600 || strings.ContainsFunc(p.Text, func(r rune) bool { return r < ' ' }) {
				t.Errorf("problem %+v", p)
			}
		}
	})
}

func accepting(name, prefix, host, networks string) string {
	return strings.Replace(peer(name, prefix, host), "}}", fmt.Sprintf(`},"network":%q}`, networks), 1)
}

func TestNetworkGrowsByAFamily(t *testing.T) {
	dir := t.TempDir()
	n4, dual := network("10.244.0.0/16"), network("10.0.0.0/8", "fd00:10:244::/48")
	dual[0].Len, dual[0].Min = 24, netip.MustParsePrefix("10.0.0.0/24")
	put(t, dir, "n2.json", accepting("n2", "10.244.2.0/24", "192.0.2.2", "10.244.0.0/16"))
	d := start(t, dir, "n1", n4)
	before := d.awaitSelf()
	d.publish("192.0.2.1")
	d.Grow(dual)

	// n2 does not accept leases of the new family yet, and has to learn that n1 does.
	leases := published(before, "192.0.2.1")
	leases[0].Accepts = dual.Prefixes()
	if err := d.Publish(t.Context(), leases); err != nil {
		t.Fatal(err)
	}
	d.await("what n1 accepts", func() bool {
		list, _ := d.List()
		return len(list.Leases) == 2 && slices.Equal(list.Leases[0].Accepts, dual.Prefixes())
	})
	if self := mustSelf(t, d); !slices.Equal(self.Subnets, before.Subnets) {
		t.Errorf("%v became %v before n2 accepts it", before.Subnets, self.Subnets)
	}

	put(t, dir, "n2.json", accepting("n2", "10.244.2.0/24", "192.0.2.2", "10.0.0.0/8,fd00:10:244::/48"))
	d.await("a lease of both families", func() bool { return len(mustSelf(t, d).Subnets) == 2 })
	if self := mustSelf(t, d); self.Subnets[0] != before.Subnets[0] {
		t.Errorf("%v became %v", before.Subnets, self.Subnets)
	}
}

func TestNodeLeasesWhatOthersAccept(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, "n2.json", accepting("n2", "10.244.2.0/24", "192.0.2.2", "10.244.2.0/23"))
	d := start(t, dir, "n1", network("10.244.0.0/16"))
	if got := d.awaitSelf().Subnets; fmt.Sprint(got) != "[10.244.3.0/24]" {
		t.Errorf("leased %v", got)
	}
	late := start(t, dir, "late", network("10.244.0.0/16"))
	late.awaitErr("every free subnet of 10.244.0.0/16 is one that not all nodes accept yet, because their pod network " +
		"does not hold it: n2")
	drop(t, dir, "n2.json")
	late.awaitSelf()
}

// No file changes when the network grows on a machine of its own.
func TestNetworkGrowsWhileNothingElseHappens(t *testing.T) {
	d := start(t, t.TempDir(), "n1", network("10.244.0.0/16"))
	before := d.awaitSelf()
	d.Grow(network("10.244.0.0/16", "fd00:10:244::/48"))
	d.await("a lease of both families", func() bool { return len(mustSelf(t, d).Subnets) == 2 })
	if self := mustSelf(t, d); self.Subnets[0] != before.Subnets[0] {
		t.Errorf("%v became %v", before.Subnets, self.Subnets)
	}
}
