package overlay

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/subnet"
)

const (
	// calm is the time after which what happens again counts as happening for the first time. It is longer than what a
	// job that runs every minute, or our own slow timer, needs to come round.
	calm = 2 * time.Minute
	// oftenEnough makes a fight of repairs, and chatter of a line in the log: that many, each within calm of the one
	// before.
	oftenEnough = 5
	// mostFights bounds how many fights are named at a time. The counters have all.
	mostFights = 8
	// mostRemembered bounds what a streak remembers.
	mostRemembered = 4096
)

// A streak counts how often a thing has happened, each time within calm of the time before.
type streak struct{ runs map[string]run }

type run struct {
	times int
	last  time.Time
}

// again takes in that a thing has happened, and returns how often it has by now.
func (s *streak) again(what string, now time.Time) int {
	if s.runs == nil {
		s.runs = map[string]run{}
	}
	r, known := s.runs[what]
	if !known && len(s.runs) >= mostRemembered {
		return 1
	}
	if now.Sub(r.last) > calm {
		r.times = 0
	}
	s.runs[what] = run{r.times + 1, now}
	return r.times + 1
}

// times is how often a thing has happened.
func (s *streak) times(what string) int { return s.runs[what].times }

// forget drops what has not happened for so long that it would count as new.
func (s *streak) forget(now time.Time) {
	maps.DeleteFunc(s.runs, func(_ string, r run) bool { return now.Sub(r.last) > calm })
}

// fights knows which objects somebody else changes as often as they are repaired. They are repaired as soon as all
// others: what the other takes away is there again for most of the time, and pods notice least.
type fights struct {
	repairs streak            // by command
	named   map[string]string // the command of each fight that is a Problem, with the kind of its object
}

// note takes in what a pass did, and returns the fights that are on. over reports whether all that the pass did was to
// go on with them.
func (f *fights) note(plan Plan, res result, now time.Time) (problems []subnet.Problem, over bool) {
	f.repairs.forget(now)
	maps.DeleteFunc(f.named, func(command, _ string) bool { return !f.on(command) })
	over = len(res.of) > 0
	made := remade(plan, res)
	for i, op := range plan.Ops[:len(res.of)] {
		if made[backend.Device(op.What)] {
			continue // its fate is the link's
		}
		command := op.String()
		if plan.Again && res.of[i] == done {
			f.repairs.again(command, now)
		}
		if !f.on(command) {
			over = false
			continue
		}
		if len(f.named) < mostFights {
			if f.named == nil {
				f.named = map[string]string{}
			}
			f.named[command] = op.What.Kind()
		}
	}
	for _, command := range slices.Sorted(maps.Keys(f.named)) {
		problems = append(problems, subnet.Problem{Kind: subnet.KindFight, Text: fightText(command, f.named[command])})
	}
	return problems, over
}

// on reports whether the object that a command repairs is fought over.
func (f *fights) on(command string) bool { return f.repairs.times(command) >= oftenEnough }

// remade holds the links that a pass has made, or changed: it had to restore what hangs on them too.
func remade(plan Plan, res result) map[string]bool {
	made := map[string]bool{}
	for i, op := range plan.Ops[:len(res.of)] {
		if l, ok := op.What.(backend.Link); ok && res.of[i] == done {
			made[l.Name] = true
		}
	}
	return made
}

// fightText is the same for as long as a fight lasts, so that it is one Problem and one event.
func fightText(command, kind string) string {
	const networkd = "; where systemd-networkd runs it is the likely one, and stops with " +
		"/etc/systemd/networkd.conf.d/10-tweed.conf (ManageForeignRoutes=no; docs/install.md)"
	const unmanaged = "; look for systemd-networkd (which stops with /etc/systemd/network/10-tweed.network), " +
		"NetworkManager (/etc/NetworkManager/conf.d/10-tweed.conf; both in docs/install.md) and other pod networks"
	const firewall = "; look for a firewall that is written anew again and again: firewalld, ufw, a script"
	suspects := map[string]string{
		"route":     networkd,
		"rule":      networkd,
		"address":   unmanaged,
		"link":      unmanaged,
		"port":      unmanaged,
		"neighbour": "; look for another pod network's daemon, or a script",
		"fdb":       "; look for another pod network's daemon, or a script",
		"sysctl":    "; look for the setting in /etc/sysctl.d, and in what tunes or hardens this host",
		"filter":    firewall,
		"spoof":     firewall,
	}
	return fmt.Sprintf("something on this node undoes what `%s` does: it was necessary %d times and more, each within "+
		"%v minutes of the time before%s", command, oftenEnough, calm.Minutes(),
		cmp.Or(suspects[kind], "; look for another program that configures this host's network"))
}
