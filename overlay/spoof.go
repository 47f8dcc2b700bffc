package overlay

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/backend/spoof"
	"tweed.dev/tweed/overlay/podnet"
)

// inhabitants is what the kernel should hold for those pods that are recorded just now. They come and go all the time
// without a pass, so it is no part of what is desired.
type inhabitants struct {
	ports   map[string]backend.Port
	entries map[spoof.Entry]bool
	err     error // why it cannot be told
}

// pods says how the pods' ends on this host should be, and who they may send as. Of one whose record cannot be read it
// is not known, and nothing is done about it.
func (p *Planner) pods(spoofing podnet.Spoofing) inhabitants {
	attached, err := p.roster.Attached(p.RunDir)
	if err != nil {
		return inhabitants{err: fmt.Errorf("reading which pods there are: %w", err)}
	}
	all := inhabitants{
		ports: make(map[string]backend.Port, len(attached)), entries: make(map[spoof.Entry]bool, 5*len(attached)),
	}
	for _, a := range attached {
		if a.MAC == (backend.MAC{}) {
			continue
		}
		judged := !spoofing.Allows(a.Namespace)
		all.ports[a.Veth] = backend.Port{
			Name: a.Veth, Bridge: BridgeName, Up: true, Hairpin: true,
			Locked: judged, NoLearning: judged, NoFlood: judged, MAC: a.MAC,
		}
		if judged {
			for _, e := range spoof.Entries(a.Veth, a.MAC, a.Addrs) {
				all.entries[e] = true
			}
		}
	}
	return all
}

// inUse reports whether op is for a pod that a plugin is at work on just now.
func (p *Planner) inUse(op backend.Op) bool {
	switch what := op.What.(type) {
	case backend.Port:
		return podnet.Busy(p.RunDir, what.Name)
	case spoof.Pod:
		if op.Do == backend.Delete { // perhaps of one that has no record any more
			return podnet.Attending(p.RunDir, what.Port)
		}
		return podnet.Busy(p.RunDir, what.Port)
	}
	return false
}

// judgeAll adds to want what nftables should know of pods. Where that is not known, it is left as it is.
func (all inhabitants) judgeAll(want *masq.Ruleset, have masq.Ruleset) {
	if want.Spoof.Entries = all.entries; all.err != nil {
		want.Spoof = have.Spoof
	}
}

// spoofCounted are the chains that count what pods sent in others' names, with what each rule drops frames for.
func spoofCounted() map[masq.Chain][]string {
	counted := map[masq.Chain][]string{}
	for _, c := range spoof.Chains() {
		at := masq.Chain{Family: masq.Bridge, Table: spoof.Name, Name: c.Name}
		for _, r := range c.Rules {
			counted[at] = append(counted[at], r.Drops)
		}
	}
	return counted
}

// apart parts those from the chains of the guard.
func apart(counted map[masq.Chain][]string) (guard, pods map[masq.Chain][]string) {
	guard, pods = map[masq.Chain][]string{}, map[masq.Chain][]string{}
	for c, reasons := range counted {
		if c.Family == masq.Bridge {
			pods[c] = reasons
		} else {
			guard[c] = reasons
		}
	}
	return guard, pods
}

// wantSpoofing says what PodSpoofing can be.
const wantSpoofing = `want "deny", "allow", or {"allow": ["metallb-system"]} with the namespaces whose pods may`

// podSpoofing reads "deny", "allow", or the namespaces whose pods may.
func podSpoofing(to *podnet.Spoofing) setter {
	return func(v json.RawMessage) error {
		switch text(v) {
		case "deny":
			*to = podnet.Spoofing{}
			return nil
		case "allow":
			*to = podnet.Spoofing{All: true}
			return nil
		}
		var list map[string][]string
		if err := json.Unmarshal(v, &list); err != nil || len(list) != 1 || len(list["allow"]) == 0 {
			return errors.New(wantSpoofing)
		}
		names := slices.Clone(list["allow"])
		for _, name := range names {
			if !isNamespace(name) {
				return fmt.Errorf("%q is no name of a namespace: a namespace has up to 63 of a-z, 0-9 and -", name)
			}
		}
		slices.Sort(names)
		*to = podnet.Spoofing{Namespaces: slices.Compact(names)}
		return nil
	}
}

// isNamespace reports whether a namespace can have the name (RFC 1123, section 2.1).
func isNamespace(name string) bool {
	const most = 63
	odd := func(r rune) bool { return r != '-' && (r < '0' || r > '9') && (r < 'a' || r > 'z') }
	return name != "" && len(name) <= most && !strings.ContainsFunc(name, odd) &&
		!strings.HasPrefix(name, "-") && !strings.HasSuffix(name, "-")
}

// spoofingName is what net-conf.json says, on one line.
func spoofingName(s podnet.Spoofing) string {
	switch {
	case s.All:
		return "allow"
	case len(s.Namespaces) > 0:
		return "allow for " + strings.Join(s.Namespaces, ", ")
	}
	return "deny"
}
