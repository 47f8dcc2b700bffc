package overlay

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"

	"tweed.dev/tweed/overlay/podnet"
	"tweed.dev/tweed/subnet"
)

// A netConf is what net-conf.json says while the daemon runs. Its directory may be a ConfigMap's, in which the kubelet
// swaps a link, so the file is read and compared: it is small.
type netConf struct {
	text   []byte // as it was last; nil before it was read
	config Config
	err    error // why config is not known
}

// read returns what the file at path says now.
func (n *netConf) read(path string) (Config, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return Config{}, err
	}
	if n.text == nil || !bytes.Equal(n.text, text) {
		n.text = text
		if n.config, n.err = ParseConfig(text); n.err != nil {
			n.err = fmt.Errorf("%s: %s", path, strings.ReplaceAll(n.err.Error(), "\n", "; "))
		}
	}
	return n.config, n.err
}

// reconfigure looks whether net-conf.json has changed, and brings it into force, as a whole or not at all. problem says
// what keeps it from that; refused is set where nothing is in force yet, and nothing may be touched.
func (p *Planner) reconfigure(ctx context.Context, list subnet.List) (problem string, refused *Waiting) {
	now := p.Config
	if p.NetConf != "" {
		var err error
		if now, err = p.netConf.read(p.NetConf); err != nil {
			problem, now = err.Error()+staleSuffix, p.Config
		}
	}
	if p.last.node.Name == "" {
		if refused = p.begin(now.Network); refused != nil {
			return "", refused
		}
	}
	if problem == "" && !reflect.DeepEqual(now, p.Config) {
		if err := p.change(ctx, now, list); err != nil {
			problem = fmt.Sprintf("%s: %v%s", p.confName(), err, staleSuffix)
		}
	}
	return problem, nil
}

// begin brings a network into force before the first plan of this process, unless pods that were attached since the
// node has booted would lose theirs.
func (p *Planner) begin(network subnet.Network) *Waiting {
	if info, err := podnet.ReadNodeInfo(p.RunDir); err == nil {
		if lost := lacks(network, info.Networks); lost != "" {
			return &Waiting{Reason: reasonRefused, For: fmt.Sprintf("%s: %s, which has been in force on this node since "+
				"it booted; nothing is touched. Restore it, or give a prefix that holds it. To change it all the same, "+
				"drain every node and then reboot it, or remove %s from it", p.confName(), lost,
				filepath.Join(p.RunDir, "node.json"))}
		}
	}
	p.grow(network)
	return nil
}

// change brings now into force, or says why it does not.
func (p *Planner) change(ctx context.Context, now Config, list subnet.List) error {
	if lost := lacks(now.Network, p.Config.Network.Prefixes()); lost != "" {
		return fmt.Errorf("%s, which is in force: a network may grow, not shrink or move; restore it, or give a prefix "+
			"that holds it", lost)
	}
	if other := needRestart(p.Config, now); len(other) > 0 {
		return fmt.Errorf("%s: takes effect when the daemon is restarted", listing(other, ", "))
	}
	if err := p.inhabited(now, list); err != nil {
		return err
	}
	live := goLive(p.Config, now)
	if err := p.try(ctx, now, len(live) > 0); err != nil {
		return err
	}
	p.grow(now.Network)
	p.Config, p.changes = now, append(p.changes, live...)
	return nil
}

// try says what would keep this node from being reached if now were in force: no interface has an address of the
// underlay's family, or the network would hold one of the node's own. A network may grow while the node is not known,
// because that may be just what it waits for; all else then waits.
func (p *Planner) try(ctx context.Context, now Config, live bool) error {
	if p.last.node.Name == "" {
		return nil // nothing is in force that could stay
	}
	ifaces, err := p.Kernel.Interfaces(ctx)
	if err != nil {
		return fmt.Errorf("listing interfaces: %w", err)
	}
	trial := Planner{Config: now, Choice: p.Choice, Publisher: p.Publisher, Kernel: p.Kernel}
	if _, _, waiting := trial.place(ctx, ifaces); waiting != nil && (live || !waiting.NoNode) {
		return *waiting
	}
	return nil
}

// grow brings a network into force. The next plan follows from it.
func (p *Planner) grow(network subnet.Network) {
	if reflect.DeepEqual(network, p.Config.Network) {
		return
	}
	p.Config.Network, p.grown = network, network
	p.Publisher.Grow(network)
}

func (p *Planner) confName() string {
	if p.NetConf == "" {
		return "net-conf.json"
	}
	return p.NetConf
}

// lacks says which of prefixes the network does not hold; "" if it holds them all.
func lacks(network subnet.Network, prefixes []netip.Prefix) string {
	for _, p := range prefixes {
		if network.Contains(p) {
			continue
		}
		key := familyDraft{version: family(p.Addr())}.key("Network")
		if r, ok := network.Range(p.Addr()); ok {
			return fmt.Sprintf("%s %s does not hold %s", key, r.Prefix, p)
		}
		return fmt.Sprintf("there is no %s any more to hold %s", key, p)
	}
	return ""
}

// inhabited says which node has an address that would become one of the pods'.
func (p *Planner) inhabited(now Config, list subnet.List) error {
	self := p.last
	if err := now.CheckAddrs(append([]netip.Addr{self.uplink.Local}, self.node.Addrs...)); err != nil {
		return err
	}
	for _, l := range list.Leases {
		for _, a := range l.NodeAddrs {
			r, ok := now.Network.Range(a)
			if ok && r.Prefix.Contains(a) && !p.Config.Network.Contains(netip.PrefixFrom(a, a.BitLen())) {
				return fmt.Errorf("address %s of node %s is inside the pod network %s; choose one that no node has an "+
					"address of", a, l.Node, r.Prefix)
			}
		}
	}
	return nil
}

// A difference is a key of net-conf.json that has another value in the file than the one in force.
type difference struct {
	key         string
	before, now any
}

func (d difference) String() string {
	return fmt.Sprintf("%s is %v in force and %v in the file", d.key, d.before, d.now)
}

// differing are those of all in which the values differ.
func differing(all []difference) (out []difference) {
	for _, d := range all {
		if d.before != d.now {
			out = append(out, d)
		}
	}
	return out
}

// needRestart names what has changed that only a daemon's start heeds, because leases are taken by it: with subnets of
// another length each node would refuse what all the others hold, and from another source a node would get another
// subnet under living pods.
func needRestart(before, now Config) []difference {
	all := []difference{{"SubnetSource", before.SubnetSource, now.SubnetSource}}
	for _, r := range before.Network {
		if s, ok := now.Network.Range(r.Prefix.Addr()); ok {
			all = append(all, difference{familyDraft{version: family(r.Prefix.Addr())}.key("SubnetLen"), r.Len, s.Len})
		}
	}
	return differing(all)
}

// goLive names what has changed that the next pass follows, but for the network.
func goLive(before, now Config) []difference {
	b, c := before.Backend, now.Backend
	return differing([]difference{
		{"Underlay", underlayName(before.Underlay), underlayName(now.Underlay)},
		{"PacketFilter", before.PacketFilter, now.PacketFilter},
		{"NonMasqueradeCIDRs", fmt.Sprint(before.NonMasquerade), fmt.Sprint(now.NonMasquerade)},
		{"PodSpoofing", spoofingName(before.Spoofing), spoofingName(now.Spoofing)},
		{"Backend.Type", b.Type, c.Type},
		{"Backend.VNI", b.VNI, c.VNI},
		{"Backend.Port", b.Port, c.Port},
		{"Backend.MTU", b.MTU, c.MTU},
		{"Backend.DirectRouting", b.DirectRouting, c.DirectRouting},
		{"Backend.ChecksumOffload", b.ChecksumOffload, c.ChecksumOffload},
		{"Backend.Guard", b.Guard, c.Guard},
		{"Backend.AcceptPeers", b.AcceptPeers, c.AcceptPeers},
	})
}

func underlayName(family int) string {
	if family == 0 {
		return "unset"
	}
	return fmt.Sprintf("ipv%d", family)
}
