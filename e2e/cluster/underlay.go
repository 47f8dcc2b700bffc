package cluster

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"testing"

	"tweed.dev/tweed/e2e/world"
)

// The underlay is one segment with documentation addresses (RFC 5737, RFC 3849). Its switch is a bridge in a namespace
// of its own, with a port for each machine, named like it.
type underlay struct{ Switch NetNS }

func newUnderlay(t testing.TB) underlay {
	u := underlay{Switch: NewNetNS(t, "/run/netns/switch")}
	u.Switch.Run(t, "ip link add br0 up type bridge mcast_snooping 0")
	return u
}

// underlayAddrs are the addresses of the machine with that number, below 100.
func underlayAddrs(number int) [2]netip.Addr {
	return [2]netip.Addr{
		netip.AddrFrom4([4]byte{192, 0, 2, byte(number)}),
		netip.MustParseAddr(fmt.Sprintf("2001:db8::%d", number)),
	}
}

// ControlPlaneAddrs are those of the machine with the control plane, one a family.
func ControlPlaneAddrs() [2]netip.Addr { return underlayAddrs(controlPlaneNumber) }

// attach gives a machine its eth0.
func (u underlay) attach(t testing.TB, machine NetNS, number int) {
	t.Helper()
	port := filepath.Base(machine.Path)
	u.Switch.Run(t, "ip link add "+port+" master br0 up type veth peer name eth0 netns "+port)
	machine.Run(t, "ip link set eth0 up")
	addrs := underlayAddrs(number)
	machine.Run(t, "ip addr add "+addrs[0].String()+"/24 dev eth0")
	machine.Run(t, "ip addr add "+addrs[1].String()+"/64 dev eth0 nodad")
}

func machinePath(name string) string { return "/run/netns/" + name }

// filesDir is where a cluster keeps its files.
const filesDir = world.Dir + "/cluster"

func filesOf(machine string) string { return filepath.Join(filesDir, machine) }
