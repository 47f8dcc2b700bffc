package overlay

import (
	"encoding/json"
	"net/netip"
	"slices"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/hostgw"
	"tweed.dev/tweed/backend/vxlan"
	"tweed.dev/tweed/subnet"
)

// A way is how packets reach other nodes: what the backends have in common.
type way struct {
	backend string          // by its name in leases
	data    json.RawMessage // of this node's leases
	judge   func(subnet.Lease) (identity string, err error)
	device  string // ours that reaches other nodes; "" where there is none
	mtu     int    // of pods, in bytes
	port    uint16 // UDP, that encapsulated packets arrive at; 0 where nothing is encapsulated
	// desired is what the kernel must hold, and which peers are out of reach all the same.
	desired func(self, peers []subnet.Lease) (backend.State, []subnet.Problem)
}

// way is that of a node with an uplink.
func (c Config) way(node string, up backend.Uplink) way {
	b := c.Backend
	if b.Type == hostgw.Name {
		return way{
			backend: hostgw.Name, data: hostgw.Data(), judge: hostgw.Judge, mtu: up.MTUWithin(b.MTU),
			desired: func(_, peers []subnet.Lease) (backend.State, []subnet.Problem) {
				return hostgw.Desired(node, peers, up)
			},
		}
	}
	vx := vxlan.Config{
		Node: node, VNI: b.VNI, Port: b.Port, MTU: b.MTU, NoTxChecksum: b.ChecksumOffload == "off",
		Underlay: family(up.Local), Held: up.Held,
	}
	return way{
		backend: vxlan.Name, data: vx.Data(), judge: vx.Judge, device: vxlan.DeviceName(vx.VNI), mtu: vx.DeviceMTU(up),
		port: vx.Port,
		desired: func(self, peers []subnet.Lease) (backend.State, []subnet.Problem) {
			return vx.Desired(self, peers, up), nil
		},
	}
}

// own are the addresses of this node that other nodes' pods answer to the way they were asked: by the tunnel, that is,
// where state has them there.
func (w way) own(up backend.Uplink, state backend.State) []netip.Addr {
	return slices.DeleteFunc(slices.Clone(up.Held), func(a netip.Addr) bool {
		_, there := state.Addrs[backend.AddrKey{Dev: w.device, Prefix: netip.PrefixFrom(a, a.BitLen())}]
		return w.device != "" && !there
	})
}

// near are the addresses of nodes that state leads to without a tunnel, and which so send to pods here.
func (b BackendConfig) near(peers []subnet.Lease, state backend.State) (nodes []netip.Addr) {
	if !b.direct() {
		return nil
	}
	for _, l := range peers {
		r := state.Routes[backend.RouteKey{Table: backend.MainTable, Dst: l.Subnet}]
		if r.Via.IsValid() && r.Via == l.NodeAddr() {
			nodes = append(nodes, r.Via)
		}
	}
	return nodes
}

// direct reports whether it matters which nodes are reached without a router.
func (b BackendConfig) direct() bool { return b.DirectRouting || b.Type == hostgw.Name }

// Judge refuses leases as nodes of this configuration do. underlay is the family of their tunnel, 4 or 6.
func (c Config) Judge(underlay int) func(subnet.Lease) (identity string, err error) {
	local := netip.IPv6Unspecified()
	if underlay == 4 {
		local = netip.IPv4Unspecified()
	}
	return c.way("", backend.Uplink{Local: local}).judge
}
