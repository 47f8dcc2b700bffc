package kernel

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coreos/go-iptables/iptables"
	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/masq"
)

const (
	// lockWait is how long, in seconds, iptables waits for another program's change to end.
	lockWait = 10
	// trust is how long the packet filter counts as unchanged where the kernel would not tell of a change: nobody is
	// watching, or iptables is of the older form (legacy).
	trust = 30 * time.Second
	// hint is a chain in mangle that each kubelet makes for others to see which iptables it uses (Kubernetes' KEP 3178).
	hint = "KUBE-IPTABLES-HINT"
)

// A filter is the packet filter by way of iptables, and what was last read of it. Reading starts a process for each chain, so at rest it
// is not read.
type filter struct {
	variant  masq.Variant  // of iptables, where one is meant
	changes  atomic.Uint64 // how often the packet filter changed, or may have
	watchers atomic.Int32  // how many tell of changes

	mu     sync.Mutex
	tables map[masq.Family]*iptables.IPTables
	legacy bool
	seen   *reading // nil before the first
	clean  bool     // nothing of ours was there when it was read last
}

// A reading is what iptables printed.
type reading struct {
	at      time.Time
	changes uint64                  // of filter, when it began
	chains  map[masq.Chain][]string // of ours and of the kernel's, each line without "-A CHAIN"
	exists  map[masq.Entry]bool     // whether iptables takes a rule for there that it spells otherwise
}

// A form is one way in which this host's packet filter is written.
type form interface {
	apply(op backend.Op) error
}

// ObserveFilter reads what the packet filter holds of ours, in whichever form: the chains of package masq, and the ways
// into them that packets get to. A rule reads as the one in want that it is, or as an unknown one.
func (k *Kernel) ObserveFilter(ctx context.Context, want masq.Ruleset) (masq.Ruleset, error) {
	have := emptyRuleset()
	// A kernel without nftables holds nothing in that form.
	if err := k.nft.observe(ctx, want, &have); err != nil && want.Has(masq.NFTables) {
		return masq.Ruleset{}, err
	}
	if want.Has(masq.IPTables) || k.nft.iptables() || k.filter.mayHoldLegacy() {
		if err := k.filter.observe(ctx, want, &have); err != nil {
			return masq.Ruleset{}, err
		}
	}
	held, err := k.sets.observe(want, &have)
	if err == nil && held {
		k.observeOthers(ctx, want, &have)
		_, err = k.sets.observe(want, &have)
	}
	return have, err
}

// formOf returns what an object of the packet filter is written by.
func (k *Kernel) formOf(what backend.Object) form {
	var c masq.Chain
	switch o := what.(type) {
	case masq.Chain:
		c = o
	case masq.Jump:
		c = o.Chain
	case masq.Entry:
		c = o.Chain
	case masq.Set:
		return k.formOfSet(o)
	case masq.Members:
		return k.formOfSet(o.Set)
	default: // tables and guests
		return k.nft
	}
	if c.Form() == masq.NFTables {
		return k.nft
	}
	return k.iptables(c.Variant)
}

func (k *Kernel) formOfSet(s masq.Set) form {
	if s.Form() == masq.NFTables {
		return k.nft
	}
	return k.sets
}

// iptables returns the packet filter of one variant of iptables.
func (k *Kernel) iptables(v masq.Variant) *filter {
	if v == "" {
		return k.filter
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.variants == nil {
		k.variants = map[masq.Variant]*filter{}
	}
	if k.variants[v] == nil {
		k.variants[v] = &filter{variant: v}
	}
	return k.variants[v]
}

func emptyRuleset() masq.Ruleset {
	return masq.Ruleset{
		Tables: map[masq.Table]bool{}, Chains: map[masq.Chain][]masq.Rule{}, Jumps: map[masq.Jump]bool{},
		Sets: map[masq.Set]map[netip.Addr]bool{}, Taken: map[masq.Set]string{},
		Guests: map[masq.Guest]uint64{}, Hosts: map[masq.Chain]masq.Host{}, Handles: map[masq.Chain][]uint64{},
	}
}

func (f *filter) observe(ctx context.Context, want masq.Ruleset, have *masq.Ruleset) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.fresh() {
		if err := f.read(ctx, want); err != nil {
			return err
		}
	}
	before := len(have.Chains)
	err := f.translate(want, have)
	f.clean = len(have.Chains) == before
	return err
}

// mayHoldLegacy reports whether the older form of iptables may hold something of ours: it has tables, and was not read
// and found without since this process began.
func (f *filter) mayHoldLegacy() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return !f.clean && hasLegacyTables()
}

// hasLegacyTables reports whether this network namespace has a table of the older form that chains of ours may be in.
func hasLegacyTables() bool {
	for _, family := range []masq.Family{masq.IPv4, masq.IPv6} {
		for _, way := range ways(family, masq.Legacy) {
			if hasLegacy(family, way.Chain.Table) {
				return true
			}
		}
	}
	return false
}

// heard notes a change that the kernel tells of.
func (f *filter) heard(m syscall.NetlinkMessage) bool {
	if newGeneration(m) {
		f.changes.Add(1)
		return true
	}
	return false
}

func (f *filter) fresh() bool {
	return f.seen != nil && f.seen.changes == f.changes.Load() &&
		(f.watchers.Load() > 0 && !f.legacy || time.Since(f.seen.at) < trust)
}

// program returns the program for a family.
func (f *filter) program(family masq.Family) (*iptables.IPTables, error) {
	if ipt := f.tables[family]; ipt != nil {
		return ipt, nil
	}
	proto := iptables.ProtocolIPv4
	if family == masq.IPv6 {
		proto = iptables.ProtocolIPv6
	}
	name := f.variant.Command(family)
	if f.variant == "" {
		name = command(family)
	}
	ipt, err := iptables.New(iptables.IPFamily(proto), iptables.Timeout(lockWait), iptables.Path(name))
	if errors.Is(err, exec.ErrNotFound) {
		return nil, fmt.Errorf("the program %s is not here; install Debian's package iptables, or what holds it: %w",
			name, exec.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("asking %s for its version: %w", name, err)
	}
	version, err := exec.Command(name, "--version").Output()
	if err != nil {
		return nil, fmt.Errorf("asking %s for its version: %w", name, err)
	}
	f.legacy = f.legacy || !strings.Contains(string(version), "nf_tables")
	if f.tables == nil {
		f.tables = map[masq.Family]*iptables.IPTables{}
	}
	f.tables[family] = ipt
	return ipt, nil
}

// command returns which iptables to start. There are two, and neither lists the other's rules (xtables-nft(8),
// xtables-legacy(8)). It is the one in which the kubelet made its hint; without a hint, the one that the host or the
// image calls iptables.
func command(family masq.Family) string {
	nft, legacy := masq.NFT.Command(family), masq.Legacy.Command(family)
	switch {
	case hinted(nft):
		return nft
	case hasLegacy(family, "mangle") && hinted(legacy): // to look for a chain would make the table
		return legacy
	}
	return family.Command()
}

func hinted(command string) bool {
	return exec.Command(command, "-w", strconv.Itoa(lockWait), "-t", "mangle", "-S", hint).Run() == nil
}

// hasLegacy reports whether this network namespace has a table of the older form of iptables.
func hasLegacy(family masq.Family, table string) bool {
	name := "/proc/thread-self/net/ip_tables_names"
	if family == masq.IPv6 {
		name = "/proc/thread-self/net/ip6_tables_names"
	}
	tables, err := os.ReadFile(name)
	return err == nil && slices.Contains(strings.Fields(string(tables)), table)
}

// ways lists our chains of one family with the chains that each is reached from.
func ways(family masq.Family, v masq.Variant) []masq.Jump {
	all := masq.Ways(masq.IPTables, family)
	for i := range all {
		all[i].Chain.Variant = v
	}
	return all
}

func (f *filter) begin() *reading {
	return &reading{
		at: time.Now(), changes: f.changes.Load(),
		chains: map[masq.Chain][]string{}, exists: map[masq.Entry]bool{},
	}
}

// read reads anew. A family that is not wanted, and that this host cannot filter, holds nothing.
func (f *filter) read(ctx context.Context, want masq.Ruleset) error {
	now := f.begin()
	for _, family := range []masq.Family{masq.IPv4, masq.IPv6} {
		if err := f.readFamily(ctx, family, now); err != nil && (wanted(want, family) || !cannotFilter(err)) {
			return err
		}
	}
	f.seen = now
	return nil
}

func wanted(want masq.Ruleset, family masq.Family) bool {
	for c := range want.Chains {
		if c.Family == family && c.Form() == masq.IPTables {
			return true
		}
	}
	return false
}

// cannotFilter reports whether err says that program or kernel lack a family altogether. iptables ends with 3 when it
// cannot reach a table.
func cannotFilter(err error) bool {
	var e *iptables.Error
	return errors.Is(err, exec.ErrNotFound) || errors.As(err, &e) && e.ExitStatus() == 3
}

func (f *filter) readFamily(ctx context.Context, family masq.Family, into *reading) error {
	ipt, err := f.program(family)
	if err != nil {
		return err
	}
	for _, way := range ways(family, f.variant) {
		if (f.variant == masq.Legacy || f.legacy && way.Chain.Table != masq.FilterTable) &&
			!hasLegacy(family, way.Chain.Table) { // to look would make it
			continue
		}
		for _, c := range []masq.Chain{way.Chain, way.Base()} {
			if err := ctx.Err(); err != nil {
				return err
			}
			if _, read := into.chains[c]; read {
				continue // several ways lead to it
			}
			lines, err := ipt.List(c.Table, c.Name)
			if (c == way.Chain || c.Name == masq.DockerUser) && isAbsent(err) {
				continue
			}
			if err != nil {
				return explainFilter(err)
			}
			into.chains[c] = rules(c, lines)
		}
	}
	return nil
}

// isAbsent reports whether err says that a chain is not there, for which each form of iptables has other words.
func isAbsent(err error) bool {
	var e *iptables.Error
	return errors.As(err, &e) && e.ExitStatus() == 1
}

func explainFilter(err error) error {
	var e *iptables.Error
	if errors.As(err, &e) && e.ExitStatus() == 4 {
		return fmt.Errorf("%w (another program holds the packet filter, or it %w)", err, errPermission)
	}
	return err
}

// rules returns the rules among the lines that iptables -S prints for c, without "-A CHAIN". It is never nil.
func rules(c masq.Chain, lines []string) []string {
	out := []string{}
	for _, line := range lines {
		if rule, ok := strings.CutPrefix(line, "-A "+c.Name+" "); ok {
			out = append(out, rule)
		}
	}
	return out
}

// translate tells what was read in terms of what is wanted. Where iptables is of the older form, its chains are others
// than those that nftables has by the same names; those of the wanted form count.
func (f *filter) translate(want masq.Ruleset, have *masq.Ruleset) error {
	counts := want.Has(masq.IPTables)
	for _, family := range []masq.Family{masq.IPv4, masq.IPv6} {
		for _, way := range ways(family, f.variant) {
			lines, there := f.seen.chains[way.Chain]
			if there {
				rules, err := f.translateRules(way.Chain, want.Chains[way.Chain], lines)
				if err != nil {
					return err
				}
				have.Chains[way.Chain] = rules
			}
			base := f.seen.chains[way.Base()]
			end := slices.IndexFunc(base, func(rule string) bool { ends, _ := takesAll(rule); return ends })
			host := masq.Host{End: end + 1}
			if end >= 0 {
				_, host.Harms = takesAll(base[end])
				base = base[:end]
			}
			if counts {
				have.Hosts[way.Base()] = host
			}
			isJump := func(rule string) bool { return unquoted(rule) == strings.Join(way.Args(), " ") }
			if slices.ContainsFunc(base, isJump) {
				have.Jumps[way] = true
			}
		}
	}
	return nil
}

func (f *filter) translateRules(c masq.Chain, want []masq.Rule, lines []string) ([]masq.Rule, error) {
	byText := map[string]masq.Rule{}
	for _, r := range want {
		byText[strings.Join(r.Args(), " ")] = r
	}
	have := make([]masq.Rule, len(lines))
	for i, line := range lines {
		if r, known := byText[line]; known {
			have[i] = r
			continue
		}
		have[i] = masq.Rule{Unknown: line}
		// Another version of iptables may print the same rule in other words.
		if len(want) == len(lines) {
			same, err := f.isThere(masq.Entry{Chain: c, At: i + 1, Rule: want[i]})
			if err != nil {
				return nil, err
			}
			if same {
				have[i] = want[i]
			}
		}
	}
	return have, nil
}

// isThere asks iptables itself whether its chain holds a rule.
func (f *filter) isThere(e masq.Entry) (bool, error) {
	if there, known := f.seen.exists[e]; known {
		return there, nil
	}
	ipt, err := f.program(e.Chain.Family)
	if err != nil {
		return false, err
	}
	there, err := ipt.Exists(e.Chain.Table, e.Chain.Name, e.Rule.Args()...)
	if err != nil {
		return false, explainFilter(err)
	}
	f.seen.exists[e] = there
	return there, nil
}

// unquoted drops the quotes that some versions of iptables put around every comment.
func unquoted(rule string) string { return strings.ReplaceAll(rule, `"`, "") }

// takesAll reports whether no packet gets past a rule, and whether it harms those that are stopped there: it drops or
// translates them.
func takesAll(rule string) (ends, harms bool) {
	if strings.HasPrefix(rule, "-m comment --comment ") { // which matches everything
		if _, after, ok := strings.Cut(rule, " -j "); ok {
			rule = "-j " + after
		}
	}
	words := strings.Fields(rule)
	if len(words) < 2 || words[0] != "-j" {
		return false, false
	}
	ends, harms, _ = effectOf(words[1])
	return ends, harms
}

// apply makes one change. What was read before counts no more, however the change ends.
func (f *filter) apply(op backend.Op) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	defer f.changes.Add(1)
	switch o := op.What.(type) {
	case masq.Chain:
		return f.applyChain(op.Do, o)
	case masq.Jump:
		return f.applyJump(op.Do, o)
	case masq.Entry:
		return f.applyEntry(op.Do, o)
	}
	return fmt.Errorf("the packet filter has no %s", op.What.Kind())
}

func (f *filter) applyChain(do backend.Verb, c masq.Chain) error {
	ipt, err := f.program(c.Family)
	if err != nil {
		return err
	}
	if do != backend.Delete {
		return explainFilter(ipt.NewChain(c.Table, c.Name))
	}
	for _, way := range ways(c.Family, f.variant) {
		if way.Chain == c { // a jump that packets do not get to is not ours to see, but holds the chain
			if err := deleteJumps(ipt, way); err != nil {
				return err
			}
		}
	}
	return explainFilter(ipt.ClearAndDeleteChain(c.Table, c.Name))
}

func (f *filter) applyJump(do backend.Verb, j masq.Jump) error {
	ipt, err := f.program(j.Chain.Family)
	switch {
	case err != nil:
		return err
	case do == backend.Delete:
		return deleteJumps(ipt, j)
	case j.At == 0:
		return explainFilter(ipt.Append(j.Chain.Table, j.From, j.Args()...))
	}
	return explainFilter(ipt.Insert(j.Chain.Table, j.From, j.At, j.Args()...))
}

// deleteJumps takes away all copies of a jump.
func deleteJumps(ipt *iptables.IPTables, j masq.Jump) error {
	for {
		there, err := ipt.Exists(j.Chain.Table, j.From, j.Args()...)
		if err == nil && there {
			err = ipt.Delete(j.Chain.Table, j.From, j.Args()...)
		}
		if err != nil || !there {
			return explainFilter(err)
		}
	}
}

func (f *filter) applyEntry(do backend.Verb, e masq.Entry) error {
	ipt, err := f.program(e.Chain.Family)
	if err != nil {
		return err
	}
	if do != backend.Delete {
		return explainFilter(ipt.Insert(e.Chain.Table, e.Chain.Name, e.At, e.Rule.Args()...))
	}
	// A number is only as good as the moment it was counted in.
	lines, err := ipt.List(e.Chain.Table, e.Chain.Name)
	if err != nil {
		return explainFilter(err)
	}
	now := rules(e.Chain, lines)
	if e.At > len(now) || e.Rule.Unknown != "" && now[e.At-1] != e.Rule.Unknown {
		return fmt.Errorf("chain %s changed since the last look", e.Chain.Name)
	}
	return explainFilter(ipt.DeleteById(e.Chain.Table, e.Chain.Name, e.At))
}
