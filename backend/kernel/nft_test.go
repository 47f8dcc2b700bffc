package kernel

import (
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/kernel/netnstest"
	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/subnet"
)

// sortedLines is text without the order of its lines: tables come in the order in which they were made.
func sortedLines(text string) string {
	lines := strings.Split(text, "\n")
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func nftFilter(t testing.TB) masq.Ruleset { return dualStack(t, masq.NFTables).Desired() }

// shell runs a line as a person would type it.
func shell(t testing.TB, ns *netnstest.NS, line string) string {
	t.Helper()
	var out []byte
	var err error
	ns.Do(t, func() { out, err = exec.Command("sh", "-ec", line).CombinedOutput() })
	if err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return string(out)
}

// filterOps returns what is to be done.
func filterOps(t testing.TB, h host, want masq.Ruleset) []backend.Op {
	t.Helper()
	have, err := h.ObserveFilter(t.Context(), want)
	if err != nil {
		t.Fatalf("observing the filter: %v", err)
	}
	return masq.Diff(want, have)
}

// What an operation prints, typed into a shell, does what the operation does, and nft makes the same rules of it.
func TestCommandsOfNFTDoWhatTheySay(t *testing.T) {
	h := newRealHost(t)
	h.dropForwarded()
	h.ns.Run(t, "iptables -A FORWARD -j DROP")
	typed := func(want masq.Ruleset) {
		t.Helper()
		for _, op := range filterOps(t, h, want) {
			shell(t, h.ns, op.String())
		}
		for _, op := range filterOps(t, h, want) {
			t.Errorf("still to do: %s", op)
		}
	}
	c := dualStack(t, masq.NFTables)
	typed(c.Desired())
	c.NonMasquerade = append(c.NonMasquerade, c.Network.Prefixes()[0].Masked(), c.Network.Prefixes()[1].Masked())
	typed(c.Desired())
	c.Port = 60000
	c.NonMasquerade = nil
	typed(c.Desired())
	grown, err := subnet.NewNetwork(subnet.Range{Prefix: netip.MustParsePrefix("10.0.0.0/9")}, c.Network[1])
	if err != nil {
		t.Fatal(err)
	}
	c.Network = grown
	typed(c.Desired())
	if rules := h.ns.Run(t, "nft list ruleset"); strings.Contains(rules, "10.244.0.0/16") {
		t.Errorf("the smaller network is still in\n%s", rules)
	}
	if rules := h.ns.Run(t, "iptables -S FORWARD"); !strings.HasSuffix(rules, "-A FORWARD -j DROP\n") {
		t.Errorf("not in front of the drop:\n%s", rules)
	}
	typed(masq.Ruleset{})
	if left := h.ns.Run(t, "nft list ruleset"); strings.Contains(left, "tweed") {
		t.Errorf("left:\n%s", left)
	}
}

func TestNodeWithoutIptables(t *testing.T) {
	h := newRealHost(t)
	t.Setenv("PATH", t.TempDir())
	filterPass(t, h, nftFilter(t))
	filterPass(t, h, masq.Ruleset{})
}

// A program that lists rules that it cannot express breaks, and with it whoever reads it: kube-proxy does.
func TestGuestsDoNotBreakIptables(t *testing.T) {
	h := newRealHost(t)
	h.dropForwarded()
	h.ns.Run(t, "iptables -t nat -A POSTROUTING -j MASQUERADE")
	h.ns.Run(t, "ip6tables -t nat -A POSTROUTING -j MASQUERADE")
	filterPass(t, h, nftFilter(t))
	for command, rule := range map[string]string{
		"iptables-save -t filter": "-A FORWARD -s 10.244.0.0/16 -m comment --comment tweed -j ACCEPT\n",
		"ip6tables-save":          "-A FORWARD -d fd00:10:244::/48 -m comment --comment tweed -j ACCEPT\n",
		"iptables-save":           "-A POSTROUTING -s 10.244.0.0/16 -d 10.244.0.0/16 -m comment --comment tweed -j ACCEPT\n",
	} {
		if saved := h.ns.Run(t, command); !strings.Contains(saved, rule) {
			t.Errorf("%s has no %s in\n%s", command, rule, saved)
		}
	}
	// Who saves and restores leaves them ours.
	shell(t, h.ns, "iptables-save | iptables-restore; ip6tables-save | ip6tables-restore")
	for _, op := range filterOps(t, h, nftFilter(t)) {
		t.Errorf("to do: %s", op)
	}
}

func TestTablesOfNFTChangedByHandAreRepaired(t *testing.T) {
	h := newRealHost(t)
	h.dropForwarded()
	want := nftFilter(t)
	filterPass(t, h, want)
	right := h.ns.Run(t, "nft -s list ruleset")
	h.ns.Run(t, "nft add table inet stranger")
	const foreign = "ip saddr 192.0.2.7"
	for _, c := range []string{
		"nft flush table ip tweed",
		"nft delete table ip6 tweed",
		"nft insert rule ip tweed translate ip saddr 192.0.2.1 masquerade",
		"nft insert rule ip tweed postrouting ip saddr 192.0.2.1 masquerade",
		"nft add rule ip6 tweed postrouting ip6 saddr 2001:db8::1 masquerade",
		"nft flush chain ip6 tweed postrouting",
		"nft 'flush chain ip tweed postrouting; delete chain ip tweed postrouting; " +
			"add chain ip tweed postrouting { type nat hook postrouting priority 99 ; }; " +
			"add rule ip tweed postrouting jump translate'",
		"nft flush chain ip filter FORWARD",
		"iptables -I FORWARD 1 -j DROP && nft insert rule ip filter FORWARD " + foreign + " accept",
	} {
		shell(t, h.ns, c)
		if len(filterOps(t, h, want)) == 0 {
			t.Errorf("%s: not seen", c)
		}
		filterPass(t, h, want)
		now := h.ns.Run(t, "nft -s list ruleset")
		if !strings.Contains(now, "table inet stranger") || strings.Contains(c, foreign) != strings.Contains(now, foreign) {
			t.Errorf("after %s, what others have written is not as it was:\n%s", c, now)
		}
	}
	shell(t, h.ns, "iptables -D FORWARD -j DROP; iptables -D FORWARD 1; nft delete table inet stranger")
	if now := h.ns.Run(t, "nft -s list ruleset"); sortedLines(now) != sortedLines(right) {
		t.Errorf("in the end:\n%s\nwant:\n%s", now, right)
	}

	shell(t, h.ns, "nft flush ruleset")
	filterPass(t, h, want)
	if now := h.ns.Run(t, "nft list ruleset"); !strings.Contains(now, "chain translate") {
		t.Errorf("after flush ruleset:\n%s", now)
	}
}

// A host that masquerades whatever it forwards would hide callers from pods, and pods from each other.
func TestMasqueradingOfEverythingIsOvertaken(t *testing.T) {
	h := newRealHost(t)
	world := outside(t, h)
	pass(t, h, sample())
	b := addPod(t, h, 11)
	inBoth(t, h, "-t nat -A POSTROUTING -j MASQUERADE")
	into := []hop{
		{"world to pod", world, b, "10.244.3.11", "", "10.244.3.1"},
		{"world to pod", world, b, "fd00:10:244:3::11", "", "fd00:10:244:3::1"},
	}
	for _, hop := range into {
		hop.check(t)
	}
	into[0].as, into[1].as = "192.0.2.1", "2001:db8::1"
	filterPass(t, h, nftFilter(t))
	for _, hop := range into {
		hop.check(t)
	}
}

// What we cannot overrule, a person has to be told, with the way out; and who took it is left in peace.
func TestDropThatCannotBeReachedIsNamed(t *testing.T) {
	for _, c := range []struct{ what, drop, says, out string }{
		{"a table of a stranger's",
			"nft add table inet fw; nft add chain inet fw forward '{ type filter hook forward priority 0 ; policy drop ; }'",
			"chain forward of table inet fw drops what it does not accept, packets of pods too; nft insert rule inet fw " +
				"forward ip daddr 10.244.0.0/16 accept comment tweed; ", ""},
		{"one family's",
			"nft add table ip6 fw; nft add chain ip6 fw forward '{ type filter hook forward priority 0 ; policy drop ; }'",
			"chain forward of table ip6 fw drops what it does not accept, packets of pods too; nft insert rule ip6 fw " +
				"forward ip6 daddr fd00:10:244::/48 accept comment tweed; ", ""},
		{"the older iptables", "iptables-legacy -P FORWARD DROP",
			"the policy of FORWARD in iptables-legacy is DROP", "iptables-legacy -P FORWARD ACCEPT"},
		{"the older ip6tables", "ip6tables-legacy -P FORWARD DROP",
			"the policy of FORWARD in ip6tables-legacy is DROP", "ip6tables-legacy -P FORWARD ACCEPT"},
	} {
		t.Run(c.what, func(t *testing.T) {
			h := newRealHost(t)
			filterPass(t, h, nftFilter(t))
			shell(t, h.ns, c.drop)
			filterPass(t, h, nftFilter(t)) // too early to look, but not forgotten
			drops := seenDrops(t, h)
			if len(drops) != 1 || !strings.HasPrefix(drops[0], c.says) {
				t.Fatalf("said: %q", drops)
			}
			if c.out == "" {
				_, c.out, _ = strings.Cut(drops[0], "too; ")
			}
			shell(t, h.ns, c.out)
			if drops := seenDrops(t, h); len(drops) > 0 {
				t.Errorf("after %s: %q", c.out, drops)
			}
		})
	}
}

// seenDrops is what is said at once; by itself it is said after a while.
func seenDrops(t *testing.T, h *realHost) []string {
	t.Helper()
	h.nft.looked = time.Time{}
	have, err := h.ObserveFilter(t.Context(), nftFilter(t))
	if err != nil {
		t.Fatal(err)
	}
	return have.Drops
}

// A flow through the packet filter outlives its change of form, and no new one is treated otherwise meanwhile.
func TestFormChangesUnderTraffic(t *testing.T) {
	h := newRealHost(t)
	world := outside(t, h)
	h.dropForwarded()
	pass(t, h, sample())
	a, b := addPod(t, h, 10), addPod(t, h, 11)
	filterPass(t, h, dualStack(t, masq.IPTables).Desired())
	hop{"pod to world", a, world, "192.0.2.1", "", "192.0.2.11"}.check(t)
	hop{"pod to world", a, world, "2001:db8::1", "", "2001:db8::11"}.check(t)
	hop{"world to pod", world, b, "fd00:10:244:3::11", "", "2001:db8::1"}.check(t)

	var streams []*stream
	for _, hop := range []hop{
		{"pod to world", a, world, "192.0.2.1", "", "192.0.2.11"},
		{"pod to world", a, world, "2001:db8::1", "", "2001:db8::11"},
		{"world to pod", world, b, "10.244.3.11", "", "192.0.2.1"},
		{"world to pod", world, b, "fd00:10:244:3::11", "", "2001:db8::1"},
	} {
		streams = append(streams, startStream(t, hop, false), startStream(t, hop, true))
	}
	for round := 0; round < 5 || round < 100 && slices.ContainsFunc(streams, (*stream).isShort); round++ {
		filterPass(t, h, nftFilter(t))
		filterPass(t, h, dualStack(t, masq.IPTables).Desired())
	}
	for _, s := range streams {
		s.stop(t)
	}
}

// A stream is a hop taken a thousand times a second, in one flow or, a tenth as often, in a new flow each time.
type stream struct {
	hop            hop
	fresh          bool
	server         *net.UDPConn
	quit, done     chan struct{}
	sent, returned atomic.Int64
	sources        sync.Map // seen, without the port where flows are fresh
}

func startStream(t *testing.T, way hop, fresh bool) *stream {
	t.Helper()
	port := uint16(6000)
	if fresh {
		port++
	}
	at := netip.AddrPortFrom(netip.MustParseAddr(way.addr), port)
	s := &stream{
		hop: way, fresh: fresh, server: bound(t, way.to, at), quit: make(chan struct{}), done: make(chan struct{}),
	}
	t.Cleanup(func() { s.server.Close() })
	_ = s.server.SetReadBuffer(1 << 20)
	go s.serve()
	clients := make([]*net.UDPConn, 1)
	if fresh { // one for each packet, made before
		clients = make([]*net.UDPConn, 1000)
	}
	for i := range clients {
		clients[i] = bound(t, way.from, way.sender(at.Addr()))
		t.Cleanup(func() { clients[i].Close() })
		_ = clients[i].SetReadBuffer(1 << 20)
		go s.count(clients[i])
	}
	go s.send(clients, at)
	return s
}

func (s *stream) serve() {
	buf := make([]byte, 100)
	for {
		n, from, err := s.server.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		if s.fresh {
			s.sources.Store(netip.AddrPortFrom(from.Addr(), 0), true)
		} else {
			s.sources.Store(from, true)
		}
		_, _ = s.server.WriteToUDPAddrPort(buf[:n], from)
	}
}

func (s *stream) count(c *net.UDPConn) {
	buf := make([]byte, 100)
	for {
		if _, err := c.Read(buf); err != nil {
			return
		}
		s.returned.Add(1)
	}
}

func (s *stream) send(clients []*net.UDPConn, to netip.AddrPort) {
	defer close(s.done)
	every := time.NewTicker(time.Millisecond * time.Duration(min(len(clients), 10)))
	defer every.Stop()
	for i := 0; ; i++ {
		select {
		case <-s.quit:
			return
		case <-every.C:
		}
		if s.fresh && i >= len(clients) {
			continue
		}
		if _, err := clients[i%len(clients)].WriteToUDPAddrPort([]byte("one of many"), to); err == nil {
			s.sent.Add(1)
		}
	}
}

// isShort reports whether a stream is of too few packets to prove anything.
func (s *stream) isShort() bool { return s.sent.Load() < 100 }

func (s *stream) stop(t *testing.T) {
	t.Helper()
	close(s.quit)
	<-s.done
	for range 100 {
		if s.returned.Load() == s.sent.Load() {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if sent, back := s.sent.Load(), s.returned.Load(); s.isShort() || back != sent {
		t.Errorf("%s, %s, each packet a new flow: %v: of %d packets %d came back",
			s.hop.what, s.hop.addr, s.fresh, sent, back)
	}
	var seen []string
	s.sources.Range(func(from, _ any) bool { seen = append(seen, from.(netip.AddrPort).Addr().String()); return true })
	if len(seen) != 1 || seen[0] != s.hop.as {
		t.Errorf("%s, %s: seen as %v, want one source at %s", s.hop.what, s.hop.addr, seen, s.hop.as)
	}
}
