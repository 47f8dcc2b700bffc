package overlay

import (
	"bytes"
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

// reconfigure looks whether net-conf.json has changed, and brings a network that has grown into force. problem says what
// it cannot bring into force; refused is set where nothing is in force yet, and nothing may be touched.
func (p *Planner) reconfigure(list subnet.List) (problem string, refused *Waiting) {
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
		problem = p.change(now, list)
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

// change brings into force what has changed in now, or says why it does not.
func (p *Planner) change(now Config, list subnet.List) (problem string) {
	if lost := lacks(now.Network, p.Config.Network.Prefixes()); lost != "" {
		return fmt.Sprintf("%s: %s, which is in force: a network may grow, not shrink or move; restore it, or give a "+
			"prefix that holds it%s", p.confName(), lost, staleSuffix)
	}
	if other := differences(p.Config, now); len(other) > 0 {
		return fmt.Sprintf("%s: %s: takes effect when the daemon is restarted%s",
			p.confName(), strings.Join(other, ", "), staleSuffix)
	}
	if err := p.inhabited(now, list); err != nil {
		return fmt.Sprintf("%s: %v%s", p.confName(), err, staleSuffix)
	}
	p.grow(now.Network)
	return ""
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

// differences names what a restart is needed for, each by its key and both values.
func differences(before, now Config) (out []string) {
	differ := func(key string, before, now any) {
		if before != now {
			out = append(out, fmt.Sprintf("%s is %v in force and %v in the file", key, before, now))
		}
	}
	for _, r := range before.Network {
		if s, ok := now.Network.Range(r.Prefix.Addr()); ok {
			differ(familyDraft{version: family(r.Prefix.Addr())}.key("SubnetLen"), r.Len, s.Len)
		}
	}
	b, c := before.Backend, now.Backend
	differ("Underlay", underlayName(before.Underlay), underlayName(now.Underlay))
	differ("SubnetSource", before.SubnetSource, now.SubnetSource)
	differ("PacketFilter", before.PacketFilter, now.PacketFilter)
	differ("NonMasqueradeCIDRs", fmt.Sprint(before.NonMasquerade), fmt.Sprint(now.NonMasquerade))
	differ("Backend.Type", b.Type, c.Type)
	differ("Backend.VNI", b.VNI, c.VNI)
	differ("Backend.Port", b.Port, c.Port)
	differ("Backend.MTU", b.MTU, c.MTU)
	differ("Backend.DirectRouting", b.DirectRouting, c.DirectRouting)
	differ("Backend.ChecksumOffload", b.ChecksumOffload, c.ChecksumOffload)
	differ("Backend.Guard", b.Guard, c.Guard)
	differ("Backend.AcceptPeers", b.AcceptPeers, c.AcceptPeers)
	return out
}

func underlayName(family int) string {
	if family == 0 {
		return "unset"
	}
	return fmt.Sprintf("ipv%d", family)
}
