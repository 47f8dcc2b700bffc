package kernel

import (
	"testing"

	"tweed.dev/tweed/backend"
)

// remembering is a host that holds sample, and has seen that it does.
func remembering(t *testing.T) (*realHost, backend.State) {
	t.Helper()
	h, want := newRealHost(t), sample()
	want.Version = 7
	pass(t, h, want)
	if h.remembered.version != want.Version || len(h.remembered.digests) != 9 {
		t.Fatalf("remembered: %+v", h.remembered)
	}
	return h, want
}

func TestEntryThatChangedIsNotTakenForWhatItWas(t *testing.T) {
	h, want := remembering(t)
	for _, command := range []string{
		"ip route del 10.244.7.0/24",
		"ip -6 route del fd00:10:244:7::/64",
		"ip route replace 10.244.7.0/24 via 10.244.7.1 dev tweed.1 onlink proto 116",
		"ip -6 route add fd00:10:244:8::/64 via fe80::c00:ff:fe00:7 dev tweed.1 proto 116",
		"ip neigh del 10.244.7.0 dev tweed.1",
		"ip neigh replace 10.244.7.0 lladdr 0e:00:00:00:00:09 dev tweed.1 nud permanent",
		"ip neigh replace 10.244.9.0 lladdr 0e:00:00:00:00:09 dev tweed.1 nud permanent",
		"bridge fdb del 0e:00:00:00:00:07 dev tweed.1",
		"bridge fdb replace 0e:00:00:00:00:07 dev tweed.1 dst 192.0.2.19",
		"bridge fdb replace 0e:00:00:00:00:07 dev tweed.1 dst 192.0.2.17 port 99",
		"ip link del tweed.1",
	} {
		h.ns.Run(t, command)
		if ops, _ := plan(t, h, want); len(ops) == 0 {
			t.Errorf("%s: nothing to do", command)
		}
		pass(t, h, want)
		if h.remembered.version == 0 {
			t.Errorf("%s: not remembered again once it was repaired", command)
		}
	}
}

func TestStateThatChangedIsNotTakenForWhatIsHeld(t *testing.T) {
	h, want := remembering(t)
	for key := range want.Routes {
		delete(want.Routes, key)
		break
	}
	want.Version++
	if ops, _ := plan(t, h, want); len(ops) != 1 {
		t.Errorf("planned %v", ops)
	}
}

// What is remembered is not read: a state that lies about its version is believed.
func TestWhatIsRememberedIsNotReadAgain(t *testing.T) {
	h, want := remembering(t)
	for key := range want.Neighs {
		delete(want.Neighs, key)
		break
	}
	settled(t, h, want)
}
