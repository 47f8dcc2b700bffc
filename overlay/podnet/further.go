package podnet

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"tweed.dev/tweed/backend"
)

// The interface that is first in a pod has its default route, of each family. One that comes later leads out, too, but
// only what comes from its own address: that is looked up in a table of the interface's own. So each address is
// reached, and answers, through the interface that has it, as strict rp_filter and the network want it.

// firstTable and the interface's index make the number of its table.
const firstTable = 11600

// leadOut gives an address of the end its way to everywhere. It must be called within the pod's namespace.
func (e *end) leadOut(pod *host, index int, a netip.Prefix, gw netip.Addr, sysctlRoot string) error {
	taken, err := pod.hasDefault(family(a.Addr()))
	if err != nil {
		return err
	}
	if taken {
		e.apart = append(e.apart, a)
		return e.leadApart(index, a, gw, sysctlRoot)
	}
	if err := pod.defaultRoute(index, gw); err != nil {
		return fmt.Errorf("ip route add default via %s dev %s: %w", gw, e.iface, err)
	}
	return nil
}

// leadApart is leadOut for an address that leaves the pod's default route to another interface.
func (e *end) leadApart(index int, a netip.Prefix, gw netip.Addr, sysctlRoot string) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("opening a netlink socket: %w", err)
	}
	defer h.Close()
	table := firstTable + index
	near := &netlink.Route{LinkIndex: index, Dst: ipNet(a.Masked()), Table: table}
	if a.Addr().Is4() {
		near.Scope, near.Src = netlink.SCOPE_LINK, a.Addr().AsSlice()
		if err := answerForOwn(h, a, sysctlRoot); err != nil {
			return err
		}
	}
	err = addRoute(h, near, fmt.Sprintf("%s dev %s table %d", a.Masked(), e.iface, table))
	if err == nil {
		route := &netlink.Route{LinkIndex: index, Dst: ipNet(everything(gw)), Gw: gw.AsSlice(), Table: table}
		err = addRoute(h, route, fmt.Sprintf("default via %s dev %s table %d", gw, e.iface, table))
	}
	if err != nil {
		return err
	}
	rule := ruleFor(a)
	rule.Table = table
	if err := h.RuleAdd(rule); err != nil {
		return fmt.Errorf("ip rule add from %s lookup %d: %w", a.Addr(), table, meaning(err))
	}
	return nil
}

// hasDefault reports whether the main table has a default route of a family.
func (h *host) hasDefault(family int) (bool, error) {
	req := h.request(unix.RTM_GETROUTE, unix.NLM_F_DUMP)
	req.AddData(&nl.RtMsg{RtMsg: unix.RtMsg{Family: uint8(family)}})
	msgs, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWROUTE)
	if err != nil {
		return false, fmt.Errorf("listing routes: %w", meaning(err))
	}
	return slices.ContainsFunc(msgs, func(msg []byte) bool {
		if len(msg) < unix.SizeofRtMsg {
			return false
		}
		r := nl.DeserializeRtMsg(msg)
		return r.Dst_len == 0 && r.Type == unix.RTN_UNICAST && r.Table == unix.RT_TABLE_MAIN
	}), nil
}

func addRoute(h *netlink.Handle, r *netlink.Route, text string) error {
	if err := h.RouteAdd(r); err != nil {
		return fmt.Errorf("ip route add %s: %w", text, meaning(err))
	}
	return nil
}

// ruleFor sends what comes from an address to a table that is to be filled in.
func ruleFor(a netip.Prefix) *netlink.Rule {
	rule := netlink.NewRule()
	rule.Family, rule.Protocol = family(a.Addr()), backend.Owner
	rule.Src = ipNet(netip.PrefixFrom(a.Addr(), a.Addr().BitLen()))
	return rule
}

// answerForOwn has each interface in a's subnet answer ARP for none but its own address. By itself the kernel answers
// on any interface for all of them, and who asks believes the fastest.
func answerForOwn(h *netlink.Handle, a netip.Prefix, sysctlRoot string) error {
	addrs, err := h.AddrList(nil, netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("listing addresses: %w", err)
	}
	for _, have := range addrs {
		if ip, ok := netip.AddrFromSlice(have.IP.To4()); !ok || !a.Contains(ip) {
			continue
		}
		l, err := h.LinkByIndex(have.LinkIndex)
		if err == nil {
			err = setSysctl(filepath.Join(sysctlRoot, "net/ipv4/conf", l.Attrs().Name, "arp_ignore"), "1")
		}
		if err != nil {
			return fmt.Errorf("keeping ARP of several interfaces apart: %w (sysctlRoot in the network configuration says "+
				"where settings are found)", err)
		}
	}
	return nil
}

// brokenApart names what an address that is apart lacks. It must be called within the pod's namespace.
func (e *end) brokenApart(h *netlink.Handle, l netlink.Link, a netip.Prefix, gw netip.Addr) error {
	table := firstTable + l.Attrs().Index
	rules, err := h.RuleListFiltered(family(a.Addr()), ruleFor(a), netlink.RT_FILTER_SRC)
	if err != nil {
		return fmt.Errorf("listing rules: %w", err)
	}
	if !slices.ContainsFunc(rules, func(r netlink.Rule) bool { return r.Table == table }) {
		return fmt.Errorf("there is no rule from %s lookup %d", a.Addr(), table)
	}
	routes, err := h.RouteListFiltered(family(a.Addr()), &netlink.Route{Table: table}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return fmt.Errorf("listing routes: %w", err)
	}
	if !slices.ContainsFunc(routes, func(r netlink.Route) bool { return isDefault(r, gw) }) {
		return fmt.Errorf("there is no default route via %s dev %s in table %d", gw, e.iface, table)
	}
	return nil
}

// join takes back the rules of addresses that are apart, which do not go with the interface. One that stays does no
// harm: it is for an address that the pod has no more.
func join(netns string, apart []netip.Prefix) {
	if len(apart) == 0 || netns == "" {
		return
	}
	ns, err := openNetNS(netns)
	if err != nil {
		return // with the namespace the rules are gone
	}
	defer ns.Close()
	_ = within(ns, func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		for _, a := range apart {
			_ = h.RuleDel(ruleFor(a))
		}
		return nil
	})
}
