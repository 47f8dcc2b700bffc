package kernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/backend/spoof"
)

const (
	// nftTries is how often a reading, or a change that follows from one, starts over because others wrote meanwhile.
	nftTries = 20
	// trust is how long nobody looks anew for strangers that drop packets.
	trust = 30 * time.Second
)

var errUnsteady = errors.New("others changed nftables again and again while we looked")

// An nftables is the packet filter in its newer form, and what was last read of it. It is read and written by netlink
// alone. The kernel numbers its generations, so at rest nothing but that number is asked for.
type nftables struct {
	conn   *conn
	noConn error

	mu       sync.Mutex
	seen     *nftReading // nil before the first
	looked   time.Time   // when strangers' chains were last looked at
	lookedAt uint32      // of which generation they were then, or an earlier one
	drops    []nftChain  // those that drop what nothing else takes
}

// An nftReading is what the kernel said, all of one generation.
type nftReading struct {
	generation uint32
	tables     map[masq.Table]bool
	sets       map[masq.Set]nftSet     // of our tables
	chains     map[masq.Chain]nftChain // those of ours and of our hosts that are there
	spoof      spoof.Table
}

func dialNFT() *nftables {
	n := &nftables{}
	n.conn, n.noConn = dial(unix.NETLINK_NETFILTER)
	return n
}

func (n *nftables) close() {
	if n.conn != nil {
		n.conn.close()
	}
}

// observe adds to have what is ours, and the chains of others that it stands in.
func (n *nftables) observe(_ context.Context, want masq.Ruleset, have *masq.Ruleset) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	generation, err := n.generation()
	if err == nil && (n.seen == nil || n.seen.generation != generation) {
		var now *nftReading
		if now, err = n.read(); err == nil {
			n.seen = now
		}
	}
	if err != nil {
		return fmt.Errorf("reading nftables: %w", err)
	}
	n.seen.translate(want, have)
	if want.Has(masq.NFTables) {
		if n.lookedAt != generation && time.Since(n.looked) >= trust {
			err = n.look()
		}
		have.Drops = n.unreachable(want)
	}
	if err != nil && !errors.Is(err, errInterrupted) { // by others who write much just now; there will be another pass
		have.Drops = append(have.Drops, fmt.Sprintf("whether chains of others drop packets of pods cannot be told: %v", err))
	}
	return nil
}

func (n *nftables) generation() (uint32, error) {
	if n.noConn != nil {
		return 0, n.noConn
	}
	b, err := n.conn.get(nftType(unix.NFT_MSG_GETGEN), nfMessage(unix.AF_UNSPEC))
	return getBE32(attr(nfBody(b), unix.NFTA_GEN_ID)), err
}

// read reads anew, over again until one generation lasted from before to after it.
func (n *nftables) read() (*nftReading, error) {
	generation, err := n.generation()
	for range nftTries {
		now := &nftReading{
			generation: generation, tables: map[masq.Table]bool{}, sets: map[masq.Set]nftSet{},
			chains: map[masq.Chain]nftChain{},
		}
		for _, family := range families() {
			if err == nil {
				err = n.readFamily(family, now)
			}
		}
		if err == nil {
			now.spoof, err = n.readSpoof()
		}
		if err == nil {
			generation, err = n.generation()
		}
		if err != nil || generation == now.generation {
			return now, err
		}
	}
	return nil, errUnsteady
}

func (n *nftables) readFamily(family masq.Family, into *nftReading) error {
	table := masq.Table{Family: family, Name: masq.OwnTable}
	m := nfMessage(nfproto(family))
	m.string(unix.NFTA_TABLE_NAME, table.Name)
	if _, err := n.conn.get(nftType(unix.NFT_MSG_GETTABLE), m); err == nil {
		into.tables[table] = true
	} else if !isNoNFT(err) {
		return err
	}
	if err := n.readSets(family, into); err != nil {
		return err
	}
	chains := nftHosts(family)
	for _, way := range masq.Ways(masq.NFTables, family) {
		chains = append(chains, way.Chain, way.Base())
	}
	for _, c := range chains {
		chain, there, err := n.chain(c)
		if err == nil && there {
			chain.rules, err = n.rules(c)
			into.chains[c] = chain
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// glimpse looks at what iptables in its newer form holds.
func (n *nftables) glimpse(family masq.Family) (g glimpse, err error) {
	var text strings.Builder
	for _, c := range places(family) {
		there, err := n.holds(c.Chain)
		if err != nil {
			return glimpse{}, err
		}
		if !there {
			continue
		}
		rules, err := n.rules(c.Chain)
		if err != nil {
			return glimpse{}, err
		}
		var texts []string
		for _, r := range rules {
			texts = append(texts, r.still())
		}
		g.note(&text, c, texts)
	}
	g.text = text.String()
	return g, nil
}

// holds reports whether a chain is there. A kernel without nftables holds none.
func (n *nftables) holds(c masq.Chain) (bool, error) {
	if n.noConn != nil {
		return false, nil
	}
	_, there, err := n.chain(c)
	if isNobody(err) {
		return false, nil
	}
	return there, err
}

// isNobody reports whether err says that this kernel has no nftables.
func isNobody(err error) bool {
	return errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EINVAL)
}

// nftHosts lists the chains of others that rules of ours may stand in.
func nftHosts(family masq.Family) []masq.Chain {
	return []masq.Chain{
		{Family: family, Table: masq.FilterTable, Name: masq.BaseForward},
		{Family: family, Table: masq.FilterTable, Name: masq.DockerUser},
		{Family: family, Table: masq.FilterTable, Name: masq.BaseInput},
		{Family: family, Table: masq.NatTable, Name: masq.BasePostrouting},
	}
}

// isNoNFT reports whether err says that something is not there, or that this kernel does not know its family.
func isNoNFT(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP)
}

func (n *nftables) chain(c masq.Chain) (chain nftChain, there bool, err error) {
	b, err := n.conn.get(nftType(unix.NFT_MSG_GETCHAIN), chainMessage(c))
	if isNoNFT(err) {
		return nftChain{}, false, nil
	}
	return parseNFTChain(b), err == nil, err
}

func (n *nftables) rules(c masq.Chain) ([]nftRule, error) { return n.dumpRules(c.Name, ruleMessage(c)) }

func (n *nftables) dumpRules(chain string, of message) (rules []nftRule, err error) {
	err = n.conn.dump(nftType(unix.NFT_MSG_GETRULE), of, func() { rules = nil }, func(b []byte) {
		if r := parseNFTRule(bytes.Clone(b)); r.chain == chain {
			rules = append(rules, r)
		}
	})
	return rules, err
}

func chainMessage(c masq.Chain) message {
	m := nfMessage(nfproto(c.Family))
	m.string(unix.NFTA_CHAIN_TABLE, c.Table)
	m.string(unix.NFTA_CHAIN_NAME, c.Name)
	return m
}

func ruleMessage(c masq.Chain) message {
	m := nfMessage(nfproto(c.Family))
	m.string(unix.NFTA_RULE_TABLE, c.Table)
	m.string(unix.NFTA_RULE_CHAIN, c.Name)
	return m
}

// look finds strangers' chains that drop what nothing else takes. There can be many chains, kube-proxy's by the
// thousands, so it is done no more often than a person needs.
func (n *nftables) look() error {
	var drops []nftChain
	m := nfMessage(unix.AF_UNSPEC)
	err := n.conn.dump(nftType(unix.NFT_MSG_GETCHAIN), m, func() { drops = nil }, func(b []byte) {
		c := parseNFTChain(b)
		if c.base && c.hook == unix.NF_INET_FORWARD && c.policy == nfDrop && nftFamilies[c.family] != "" && !c.isHost() {
			drops = append(drops, c)
		}
	})
	if err != nil {
		return err
	}
	for i, c := range drops {
		m := nfMessage(c.family)
		m.string(unix.NFTA_RULE_TABLE, c.table)
		m.string(unix.NFTA_RULE_CHAIN, c.name)
		if drops[i].rules, err = n.dumpRules(c.name, m); err != nil && !isNoNFT(err) {
			return err
		}
	}
	n.looked, n.lookedAt, n.drops = time.Now(), n.seen.generation, drops
	return nil
}

// nftFamilies are those whose chains see packets of pods that are forwarded.
var nftFamilies = map[uint8]string{unix.NFPROTO_INET: "inet", unix.NFPROTO_IPV4: "ip", unix.NFPROTO_IPV6: "ip6"}

// isHost reports whether c is a chain that our guests stand in.
func (c nftChain) isHost() bool {
	return c.family != unix.NFPROTO_INET && c.table == masq.FilterTable && c.name == masq.BaseForward
}

// unreachable names what drops packets of pods although everything is as desired, and the way out. Where somebody took
// that way, a rule with our comment tells.
func (n *nftables) unreachable(want masq.Ruleset) (drops []string) {
	for _, c := range n.drops {
		if slices.ContainsFunc(c.rules, func(r nftRule) bool { return r.ours }) {
			continue
		}
		family := nftFamilies[c.family]
		drops = append(drops, fmt.Sprintf("chain %s of table %s %s drops what it does not accept, packets of pods too; %s",
			c.name, family, c.table, wayOut(want, c.family, fmt.Sprintf("nft insert rule %s %s %s", family, c.table, c.name))))
	}
	for _, family := range families() {
		if legacyDrops(family) {
			command := masq.Legacy.Command(family)
			drops = append(drops, fmt.Sprintf("the policy of FORWARD in %s is DROP, for packets of pods too; have it accept "+
				"(%s -P FORWARD ACCEPT), or set PacketFilter in net-conf.json to \"iptables\"", command, command))
		}
	}
	return drops
}

// wayOut lists the commands by which a chain of one of nftables' families accepts packets of pods.
func wayOut(want masq.Ruleset, family uint8, command string) string {
	var lines []string
	for g := range want.Guests {
		if g.Host.Name == masq.BaseForward && (family == unix.NFPROTO_INET || family == nfproto(g.Host.Family)) {
			lines = append(lines, command+" "+strings.Join(g.Rule.Words(g.Host.Family), " "))
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "; ")
}

// translate tells what was read in terms of what is wanted.
func (s *nftReading) translate(want masq.Ruleset, have *masq.Ruleset) {
	have.Spoof = s.spoof
	for t := range s.tables {
		have.Tables[t] = true
	}
	for name, set := range s.sets {
		set.tell(name, want, have)
	}
	for _, family := range families() {
		for _, way := range masq.Ways(masq.NFTables, family) {
			if c, there := s.chains[way.Chain]; there {
				have.Chains[way.Chain], have.Handles[way.Chain] = c.known(family, want.Chains[way.Chain])
			}
			if base, there := s.chains[way.Base()]; there && base.leads(way) {
				have.Jumps[way] = true
			}
		}
		for _, host := range nftHosts(family) {
			if c, there := s.chains[host]; there {
				have.Hosts[host] = c.host()
				guests(host, c.reached(), want, have)
			}
		}
	}
}

// known returns the rules of a chain of ours, as those of want that they are or else as unknown ones, and their
// handles.
func (c nftChain) known(family masq.Family, want []masq.Rule) (rules []masq.Rule, handles []uint64) {
	byText := map[string]masq.Rule{}
	for _, r := range want {
		byText[textOf(exprs(family, r))] = r
	}
	rules = []masq.Rule{}
	for _, r := range c.rules {
		text := textOf(r.exprs)
		rule, known := byText[text]
		if !known {
			rule = masq.Rule{Unknown: text}
		}
		rules, handles = append(rules, rule), append(handles, r.handle)
	}
	return rules, handles
}

// leads reports whether c is the hook of way, and holds the jump and nothing else.
func (c nftChain) leads(way masq.Jump) bool {
	hook := masq.HookOf(way.From)
	return c.base && c.typ == hook.Type && c.hook == hookNumber(hook) && int(c.priority) == hook.Priority &&
		c.policy == nfAccept && len(c.rules) == 1 &&
		textOf(c.rules[0].exprs) == textOf(jumpExprs(way))
}

// hookNumber is what the kernel calls a hook.
func hookNumber(h masq.Hook) uint32 {
	switch h.Name {
	case masq.PreroutingHook:
		return unix.NF_INET_PRE_ROUTING
	case masq.InputHook:
		return unix.NF_INET_LOCAL_IN
	case masq.ForwardHook:
		return unix.NF_INET_FORWARD
	case masq.OutputHook:
		return unix.NF_INET_LOCAL_OUT
	}
	return unix.NF_INET_POST_ROUTING
}

// reached returns those rules of c that packets get to.
func (c nftChain) reached() []nftRule {
	if end := c.host().End; end > 0 {
		return c.rules[:end-1]
	}
	return c.rules
}

// guests adds those of some rules in a chain of others that are ours. A jump with our comment is iptables'.
func guests(host masq.Chain, rules []nftRule, want masq.Ruleset, have *masq.Ruleset) {
	byText := map[string]masq.Guest{}
	for g := range want.Guests {
		if g.Host == host {
			byText[textOf(exprs(host.Family, g.Rule))] = g
		}
	}
	for _, r := range rules {
		if !r.ours || r.jumps() {
			continue
		}
		text := textOf(r.exprs)
		g, known := byText[text]
		if !known {
			g = masq.Guest{Host: host, Rule: masq.Rule{Unknown: text}}
		}
		have.Guests[g] = r.handle
	}
}
