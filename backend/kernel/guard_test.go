package kernel

import (
	"net/netip"
	"testing"

	"tweed.dev/tweed/backend/masq"
)

// guarded is a filter that guards the tunnel's port, in one family of the underlay.
func guarded(t testing.TB, form masq.Form, underlay masq.Family, peers ...string) masq.Config {
	t.Helper()
	c := dualStack(t, form)
	c.Guard, c.Underlay = true, underlay
	for _, p := range peers {
		c.Peers = append(c.Peers, netip.MustParseAddr(p))
	}
	return c
}

func askGuard(t *testing.T, h host) {
	h.dropForwarded()
	for _, form := range []masq.Form{masq.NFTables, masq.IPTables, masq.NFTables} {
		c := guarded(t, form, masq.IPv4, "192.0.2.12", "192.0.2.13", "2001:db8::12")
		filterPass(t, h, c.Desired())
		c.Peers, c.AcceptPeers = c.Peers[1:], true
		filterPass(t, h, c.Desired())
		c.Guard = false
		filterPass(t, h, c.Desired())
		c.Guard, c.Underlay, c.Port = true, masq.IPv6, 4789
		filterPass(t, h, c.Desired())
	}
	takeAllAway(t, h)
}

func TestCommandsOfTheGuardDoWhatTheySay(t *testing.T) {
	inEachForm(t, func(t *testing.T, form masq.Form) {
		for _, underlay := range []masq.Family{masq.IPv4, masq.IPv6} {
			h := newRealHost(t)
			h.dropForwarded()
			c := guarded(t, form, underlay, "192.0.2.12", "2001:db8::12")
			c.AcceptPeers = true
			for _, want := range []masq.Ruleset{c.Desired(), {}} {
				for _, op := range filterOps(t, h, want) {
					shell(t, h.ns, op.String())
				}
				h.filter.changes.Add(1)
				for _, op := range filterOps(t, h, want) {
					t.Errorf("IPv%d, still to do: %s", underlay, op)
				}
			}
		}
	})
}
