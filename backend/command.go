package backend

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Kind is "link".
func (Link) Kind() string { return "link" }

// Command is one or more commands of ip and ethtool. A change names only what differs.
func (l Link) Command(do Verb, was Object) string {
	switch do {
	case Delete:
		return "ip link del " + l.Name
	case Add:
		return l.add()
	}
	old, _ := was.(Link)
	return l.change(old)
}

func (l Link) add() string {
	add := line("ip link add", l.Name, "group", strconv.Itoa(Owner), "address", l.MAC.String())
	mtu := "mtu " + strconv.Itoa(l.MTU)
	if l.Type == KindBridge {
		// Only an MTU that was set on the living bridge stays: else it follows the ports (br_mtu_auto_adjust).
		return line(add, choose(l.Up, "up", ""), "type bridge", l.Bridge.options(Bridge{}, true)) +
			then("ip link set dev", l.Name, mtu)
	}
	v := l.VXLAN
	return line(add, mtu, choose(l.Up, "up", ""), "type vxlan id", strconv.FormatUint(uint64(v.VNI), 10),
		"dstport", strconv.Itoa(int(v.Port)), v.options(VXLAN{}, true)) + v.offload(VXLAN{}, l.Name)
}

// change has the type's options in a command of their own: the kernel takes no MTU of a VXLAN device beside them.
func (l Link) change(was Link) string {
	var common []string
	if l.MAC != was.MAC {
		common = append(common, "address", l.MAC.String())
	}
	if l.MTU != was.MTU {
		common = append(common, "mtu", strconv.Itoa(l.MTU))
	}
	if l.Up != was.Up {
		common = append(common, choose(l.Up, "up", "down"))
	}
	options := l.VXLAN.options(was.VXLAN, false)
	if l.Type == KindBridge {
		options = l.Bridge.options(was.Bridge, false)
	}
	commands := ""
	if options != "" {
		commands += then("ip link set dev", l.Name, "type", string(l.Type), options)
	}
	if common != nil {
		commands += then("ip link set dev", l.Name, line(common...))
	}
	return strings.TrimPrefix(commands+l.VXLAN.offload(was.VXLAN, l.Name), and)
}

// options are what can be set on a device that exists, or all of it for one that does not.
func (v VXLAN) options(was VXLAN, all bool) string {
	var o []string
	if all || v.Local != was.Local {
		o = append(o, "local", v.Local.String())
	}
	if v.Dev != was.Dev {
		o = append(o, "dev", v.Dev)
	}
	if all || v.Learning != was.Learning {
		o = append(o, choose(v.Learning, "learning", "nolearning"))
	}
	return line(o...)
}

func (v VXLAN) offload(was VXLAN, dev string) string {
	if v.NoTxChecksum == was.NoTxChecksum {
		return ""
	}
	return then("ethtool -K", dev, "tx", choose(v.NoTxChecksum, "off", "on"))
}

func (b Bridge) options(was Bridge, all bool) string {
	var o []string
	for _, f := range []struct {
		name     string
		now, was bool
	}{
		{"mcast_snooping", b.McastSnooping, was.McastSnooping},
		{"nf_call_iptables", b.CallIptables, was.CallIptables},
		{"nf_call_ip6tables", b.CallIp6tables, was.CallIp6tables},
	} {
		if all || f.now != f.was {
			o = append(o, f.name, choose(f.now, "1", "0"))
		}
	}
	return line(o...)
}

// Kind is "address".
func (Addr) Kind() string { return "address" }

// Command is an ip addr command.
func (a Addr) Command(do Verb, _ Object) string {
	words := a.Prefix.String()
	if a.Toward.IsValid() {
		words = fmt.Sprintf("%s peer %s/%d", a.Prefix.Addr(), a.Toward, a.Prefix.Bits())
	}
	if do == Delete {
		return line("ip addr del", words, "dev", a.Dev)
	}
	return line("ip addr add", words, "dev", a.Dev,
		choose(a.NoDAD, "nodad", ""), choose(a.NoPrefixRoute, "noprefixroute", ""))
}

// Kind is "neighbour".
func (Neigh) Kind() string { return "neighbour" }

// Command is an ip neigh command. The kernel may have made an entry of its own in the same place: adding replaces it.
func (n Neigh) Command(do Verb, _ Object) string {
	if do == Delete {
		return line("ip neigh del", n.Addr.String(), "dev", n.Dev)
	}
	return line("ip neigh replace", n.Addr.String(), "lladdr", n.MAC.String(), "dev", n.Dev, "nud permanent")
}

// Kind is "fdb".
func (FDBEntry) Kind() string { return "fdb" }

// Command is a bridge fdb command. Adding replaces, as for Neigh.
func (f FDBEntry) Command(do Verb, _ Object) string {
	verb := "replace"
	if do == Delete {
		verb = "del"
	}
	return line("bridge fdb", verb, f.MAC.String(), "dev", f.Dev, "dst", f.Dst.String(), "self permanent")
}

// Kind is "route".
func (Route) Kind() string { return "route" }

// Command is an ip route command.
func (r Route) Command(do Verb, _ Object) string {
	verb := map[Verb]string{Add: "add", Change: "replace", Delete: "del"}[do]
	metric := r.Metric
	if do == Delete && metric == 0 && r.Dst.Addr().Is6() {
		metric = 1024 // without one, any metric would do
	}
	return line(ip(r.Dst.Addr()), "route", verb, r.Dst.String(),
		option("via", r.Via, r.Via.IsValid()), "dev", r.Dev, choose(r.Onlink, "onlink", ""),
		"proto", strconv.Itoa(Owner),
		option("src", r.Src, r.Src.IsValid()),
		option("metric", metric, metric != 0),
		option("table", r.Table, r.Table != MainTable))
}

// Kind is "rule".
func (Rule) Kind() string { return "rule" }

// Command is an ip rule command.
func (r Rule) Command(do Verb, _ Object) string {
	verb, family, from := "add", r.From.Addr(), "all"
	if do == Delete {
		verb = "del"
	}
	if !r.From.IsValid() {
		family = r.To.Addr()
	} else if r.From.Bits() > 0 {
		from = r.From.String()
	}
	return line(ip(family), "rule", verb, "pref", strconv.Itoa(r.Priority), "from", from,
		option("to", r.To, r.To.IsValid()),
		option("fwmark", fmt.Sprintf("%#x/%#x", r.Mark, r.Mark), r.Mark != 0),
		"lookup", strconv.Itoa(r.Table), "proto", strconv.Itoa(Owner))
}

// Kind is "sysctl".
func (Sysctl) Kind() string { return "sysctl" }

// Command is a sysctl command.
func (s Sysctl) Command(Verb, Object) string {
	if strings.ContainsAny(s.Value, " \t") {
		return fmt.Sprintf("sysctl -w %s='%s'", s.Name, s.Value)
	}
	return "sysctl -w " + s.Name + "=" + s.Value
}

// ip is the command for the family of a, and for IPv4 where there is none.
func ip(a netip.Addr) string {
	if a.Is6() {
		return "ip -6"
	}
	return "ip"
}

// line joins words with single spaces, leaving out empty ones.
func line(words ...string) string {
	var b strings.Builder
	for _, w := range words {
		if w != "" && b.Len() > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(w)
	}
	return b.String()
}

const and = " && "

func then(words ...string) string { return and + line(words...) }

func choose(which bool, yes, no string) string {
	if which {
		return yes
	}
	return no
}

func option(name string, value any, there bool) string {
	if there {
		return fmt.Sprint(name, " ", value)
	}
	return ""
}

// Kind is "port".
func (Port) Kind() string { return "port" }

// Command is two commands of ip, because only what is a port of a bridge already can be set as one, and those of bridge
// that make the MAC known. Others are for a person to list.
func (p Port) Command(_ Verb, was Object) string {
	onOff := func(name string, on bool) string { return name + " " + choose(on, "on", "off") }
	commands := line("ip link set dev", p.Name, "master", p.Bridge, choose(p.Up, "up", "down")) +
		then("ip link set dev", p.Name, "type bridge_slave", onOff("hairpin", p.Hairpin), onOff("locked", p.Locked),
			onOff("learning", !p.NoLearning), onOff("flood", !p.NoFlood))
	if old, _ := was.(Port); old.Others {
		commands += then("bridge fdb flush dev", p.Name, "master")
	}
	if p.MAC != (MAC{}) {
		commands += then("bridge fdb replace", p.MAC.String(), "dev", p.Name, "master static sticky")
	}
	return commands
}
