package kernel

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"time"

	"tweed.dev/tweed/backend/masq"
)

const (
	// patience is how long a pass waits for what reads the packet filter. It goes on, and the next pass takes what it read.
	patience = 2 * time.Second
	// hang is how long a program that reads may take before it is ended.
	hang = time.Minute
	// unwatched is how long the older iptables counts as unchanged, because the kernel does not tell of its changes. It is
	// a little less than the time from one pass to the next where nothing happens.
	unwatched = 25 * time.Second
	// steadyTries is how often a reading starts over because others wrote meanwhile.
	steadyTries = 3
)

// A glimpse is what the kernel itself says, without iptables, of the chains that a reading is of. Two that are equal are
// of the same rules.
type glimpse struct {
	text string // of their rules, but for what they have counted; empty if there is none
	ours bool   // some of the chains are ours
}

// note adds a chain to a glimpse whose text is not complete. An empty one of others says nothing.
func (g *glimpse) note(text *strings.Builder, c place, rules []string) {
	g.ours = g.ours || c.ours
	if c.ours || len(rules) > 0 {
		fmt.Fprintf(text, "%s %s %d\n", c.Table, c.Name, len(rules))
	}
	for _, r := range rules {
		fmt.Fprintf(text, "%d:%s\n", len(r), r)
	}
}

// A place is a chain of ours, or one that we jump from.
type place struct {
	masq.Chain
	ours bool
}

// places lists those of one family, each once.
func places(family masq.Family) (all []place) {
	for _, way := range ways(family, "") {
		for _, p := range []place{{way.Chain, true}, {way.Base(), false}} {
			if !slices.Contains(all, p) {
				all = append(all, p)
			}
		}
	}
	return all
}

// A side is one family of a filter.
type side struct {
	looked     bool // since the last write
	glimpse    glimpse
	at         time.Time // of glimpse
	generation uint32    // of glimpse, or an earlier one, where nftables has such

	reading *reading // nil before the first
	saving  *saving  // what reads just now
}

// A reading is what iptables printed. Its chains have no Variant.
type reading struct {
	of     glimpse
	chains map[masq.Chain][]string // of ours and of the kernel's, each line without "-A CHAIN"
	exists map[masq.Entry]bool     // whether iptables takes a rule for there that it spells otherwise
}

// A saving is a process that reads.
type saving struct {
	of     glimpse // before it was started
	name   string
	begun  time.Time
	end    context.CancelFunc
	done   chan struct{}
	chains map[masq.Chain][]string
	err    error
}

// observe adds to have what one family holds of ours, its chains as those of a variant.
func (f *filter) observe(ctx context.Context, family masq.Family, as masq.Variant, want masq.Ruleset,
	have *masq.Ruleset) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.locked = nil
	s := f.sides[family]
	if err := f.look(family, s); err != nil {
		return err
	}
	inUse := as == ""
	if inUse {
		if _, err := f.kernel.command(f.variant, family); err != nil && wanted(want, family) {
			return err
		}
	}
	if !inUse && !s.glimpse.ours {
		return nil
	}
	if err := f.read(ctx, family, s); err != nil {
		return err
	}
	return f.translate(family, as, want, have, inUse)
}

func wanted(want masq.Ruleset, family masq.Family) bool {
	for c := range want.Chains {
		if c.Family == family && c.Form() == masq.IPTables {
			return true
		}
	}
	return false
}

// look asks the kernel, where it may say something new.
func (f *filter) look(family masq.Family, s *side) (err error) {
	if f.variant == masq.Legacy {
		if s.looked && time.Since(s.at) < unwatched {
			return nil
		}
		s.at = time.Now()
		s.glimpse, err = legacyGlimpse(family)
	} else {
		var generation uint32
		generation, err = f.kernel.nft.generation()
		if isNobody(err) {
			return nil
		}
		if err == nil && s.looked && generation == s.generation {
			return nil
		}
		if err == nil {
			s.generation = generation
			s.glimpse, err = f.kernel.nft.glimpse(family)
		}
	}
	s.looked = err == nil
	if err != nil {
		return fmt.Errorf("looking at %s: %w", f.variant.Command(family), err)
	}
	return nil
}

// read reads anew what is not as it was at the last reading.
func (f *filter) read(ctx context.Context, family masq.Family, s *side) error {
	for range steadyTries {
		if s.reading != nil && s.reading.of == s.glimpse {
			return nil
		}
		now := &reading{of: s.glimpse, exists: map[masq.Entry]bool{}}
		if s.glimpse.text != "" {
			saved, err := f.save(ctx, family, s)
			if err != nil {
				return err
			}
			now.of, now.chains = saved.of, saved.chains
			s.looked = false
			if err := f.look(family, s); err != nil {
				return err
			}
		}
		s.reading = now
	}
	if s.reading.of == s.glimpse {
		return nil
	}
	return fmt.Errorf("others changed %s again and again while it was read", f.variant.Command(family))
}

// save has iptables print all that there is, once, and waits for it as long as there is time.
func (f *filter) save(ctx context.Context, family masq.Family, s *side) (*saving, error) {
	if s.saving == nil {
		name, err := f.kernel.command(f.variant, family)
		if err == nil {
			s.saving, err = startSaving(name+"-save", family, s.glimpse, hang)
		}
		if err != nil {
			return nil, err
		}
	}
	now := s.saving
	select {
	case <-now.done:
	case <-ctx.Done():
		return nil, fmt.Errorf("%s has not ended after %v", now.name, time.Since(now.begun).Round(time.Second))
	}
	s.saving = nil
	return now, now.err
}

// startSaving starts a process in the calling thread's network namespace, which may take as long as limit.
func startSaving(name string, family masq.Family, of glimpse, limit time.Duration) (*saving, error) {
	ctx, end := context.WithTimeout(context.Background(), limit)
	s := &saving{of: of, name: name, begun: time.Now(), end: end, done: make(chan struct{})}
	cmd := exec.CommandContext(ctx, name)
	endsWithAll(cmd)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		end()
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	go func() {
		defer close(s.done)
		defer end()
		s.chains, s.err = parseSaved(out, family)
		_, _ = io.Copy(io.Discard, out)
		if err := cmd.Wait(); errors.Is(ctx.Err(), context.DeadlineExceeded) {
			s.err = hung(cmd, limit)
		} else if err != nil {
			s.err = fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(said.String()))
		}
	}()
	return s, nil
}

// close ends what reads.
func (f *filter) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.sides {
		if s.saving != nil {
			s.saving.end()
			<-s.saving.done
			s.saving = nil
		}
	}
}

// parseSaved returns, of what iptables-save prints, the rules of our chains and of those that lead there.
func parseSaved(r io.Reader, family masq.Family) (map[masq.Chain][]string, error) {
	chains := map[masq.Chain][]string{}
	c := masq.Chain{Family: family}
	lines := bufio.NewScanner(r)
	const longest = 1 << 20 // bytes of a line; the kernel's own limit for a rule is less
	lines.Buffer(nil, longest)
	for lines.Scan() {
		line := lines.Text()
		switch {
		case strings.HasPrefix(line, "# Table `") && strings.Contains(line, "incompatible"):
			if c.Table, _, _ = strings.Cut(line[len("# Table `"):], "'"); isWayIn(c.Table) {
				return nil, fmt.Errorf("%s cannot print table %s, because somebody has put something there that it does not "+
					"know; nft list table %s %s shows it", family.Command(), c.Table, family.NFT(), c.Table)
			}
		case strings.HasPrefix(line, "*"):
			c.Table = line[1:]
		case strings.HasPrefix(line, ":"):
			c.Name, _, _ = strings.Cut(line[1:], " ")
			if concerns(c.Table, c.Name) {
				chains[c] = []string{}
			}
		default:
			name, rule, ok := ruleOf(line)
			c.Name = name
			if _, known := chains[c]; ok && known {
				chains[c] = append(chains[c], rule)
			}
		}
	}
	return chains, lines.Err()
}

// isWayIn reports whether rules of ours are in a table.
func isWayIn(table string) bool {
	return slices.ContainsFunc(places(masq.IPv4), func(p place) bool { return p.Table == table })
}

// ruleOf takes apart a line of iptables that adds a rule.
func ruleOf(line string) (chain, rule string, ok bool) {
	line, ok = strings.CutPrefix(line, "-A ")
	chain, rule, _ = strings.Cut(line, " ")
	return chain, rule, ok
}

// translate tells what was read in terms of what is wanted. What the hosts of our jumps hold matters only where they are
// to stand.
func (f *filter) translate(family masq.Family, as masq.Variant, want masq.Ruleset, have *masq.Ruleset,
	inUse bool) error {
	seen := f.sides[family].reading
	for _, way := range ways(family, as) {
		if lines, there := seen.chains[plain(way.Chain)]; there {
			rules, err := f.translateRules(way.Chain, want.Chains[way.Chain], lines)
			if err != nil {
				return err
			}
			have.Chains[way.Chain] = rules
		}
		base := seen.chains[plain(way.Base())]
		end := slices.IndexFunc(base, func(rule string) bool { ends, _ := takesAll(rule); return ends })
		host := masq.Host{End: end + 1}
		if end >= 0 {
			_, host.Harms = takesAll(base[end])
			base = base[:end]
		}
		if inUse {
			have.Hosts[way.Base()] = host
		}
		if slices.ContainsFunc(base, func(rule string) bool { return isJump(rule, way) }) {
			have.Jumps[way] = true
		}
	}
	return nil
}

// plain is c as a reading knows it.
func plain(c masq.Chain) masq.Chain {
	c.Variant = ""
	return c
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
	seen := f.sides[e.Chain.Family].reading
	if there, known := seen.exists[e]; known {
		return there, nil
	}
	err := f.run(e.Chain.Family, append([]string{"-t", e.Chain.Table, "-C", e.Chain.Name}, e.Rule.Args()...)...)
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 1) {
		return false, explainFilter(err)
	}
	seen.exists[e] = err == nil
	return err == nil, nil
}

// isJump reports whether a rule is j. Some versions of iptables put quotes around every comment.
func isJump(rule string, j masq.Jump) bool {
	return strings.ReplaceAll(rule, `"`, "") == strings.Join(j.Args(), " ")
}

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

// observeAll adds to have what is ours, and trusts nothing that was read before.
func (f *filter) observeAll(ctx context.Context, as masq.Variant, have *masq.Ruleset) error {
	ctx, hurry := context.WithTimeout(ctx, hang)
	defer hurry()
	var errs []error
	for _, family := range families() {
		f.mu.Lock()
		f.sides[family].looked, f.sides[family].reading = false, nil
		f.mu.Unlock()
		errs = append(errs, f.observe(ctx, family, as, masq.Ruleset{}, have))
	}
	return errors.Join(errs...)
}
