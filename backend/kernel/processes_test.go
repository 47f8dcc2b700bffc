package kernel

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"tweed.dev/tweed/backend/masq"
)

// programs stand in front of those of iptables, and write down how they were called. The one whose turn it is, or all,
// ends as it is told to, before it has done anything or after.
type programs struct {
	t   *testing.T
	dir string
}

const program = `#!/bin/sh
read n <%[1]s/n; n=$((n+1)); echo $n >%[1]s/n; echo "${0##*/} $*" >>%[1]s/log
read turn how <%[1]s/turn
if [ $n != $turn ] && [ $turn != all ]; then how=; fi
case $how in
held) echo "Another app is currently holding the xtables lock." >&2; exit 4;;
killed) kill -KILL $$;;
late) %[2]s "$@" >/dev/null; echo "netlink: Error: No buffer space available" >&2; exit 4;;
esac
exec %[2]s "$@"
`

func newPrograms(t *testing.T) *programs {
	t.Helper()
	p := &programs{t, t.TempDir()}
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, variant := range []string{"", "-nft", "-legacy"} {
			for _, job := range []string{"", "-save", "-restore"} {
				name := family + variant + job
				real, err := exec.LookPath(name)
				if err != nil {
					continue
				}
				text := fmt.Sprintf(program, p.dir, real)
				if err := os.WriteFile(filepath.Join(p.dir, name), []byte(text), 0o755); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	t.Setenv("PATH", p.dir+":"+os.Getenv("PATH"))
	p.begin("none", "")
	return p
}

// begin counts from 1 again.
func (p *programs) begin(turn, how string) {
	for name, text := range map[string]string{"n": "0", "turn": turn + " " + how, "log": ""} {
		if text != "" {
			text += "\n"
		}
		if err := os.WriteFile(filepath.Join(p.dir, name), []byte(text), 0o644); err != nil {
			p.t.Fatal(err)
		}
	}
}

// end lets all work, and returns what was called.
func (p *programs) end() []string {
	log, err := os.ReadFile(filepath.Join(p.dir, "log"))
	if err != nil {
		p.t.Fatal(err)
	}
	p.begin("none", "")
	return strings.Split(strings.TrimSpace(string(log)), "\n")
}

// job is what a command line is for, whatever the chain and family.
func job(line string) string {
	words := strings.Fields(line)
	name := strings.TrimPrefix(strings.Replace(words[0], "ip6", "ip", 1), "iptables")
	for _, w := range words[1:] {
		if strings.HasPrefix(w, "--v") || len(w) == 2 && strings.IndexByte("NAIDSCFXP", w[1]) >= 0 {
			return name + " " + w
		}
	}
	return name
}

func TestProgramFailsOnceAndTheNextPassMendsIt(t *testing.T) {
	p := newPrograms(t)
	withVictim(t, masq.IPTables, "", func(v *victim) {
		l := v.start(v.unfiltered)
		l.ready()
		p.begin("none", "")
		l.pass()
		tried := map[string]bool{}
		for n, line := range p.end() {
			if tried[job(line)] {
				continue
			}
			tried[job(line)] = true
			for _, how := range []string{"held", "killed", "late"} {
				v.failProgram(l, p, n+1, how)
				if v.t.Failed() {
					v.t.Fatalf("(%s: %s)", line, how)
				}
			}
		}
	})
}

func (v *victim) failProgram(l life, p *programs, n int, how string) {
	v.t.Helper()
	l.ready()
	p.begin(strconv.Itoa(n), how)
	rep := l.pass()
	p.end()
	if left := v.left(); rep.Failed == 0 && len(left) > 0 {
		v.t.Errorf("not done, and nobody says so: %v", left)
	}
	if rep.Failed > 0 && !strings.Contains(said(rep), "tables") {
		v.t.Errorf("the program is not named: %q", said(rep))
	}
	v.healed(aRetry)
}

// unfiltered takes away one chain of ours, with what leads to it.
func (v *victim) unfiltered() {
	filters, err := v.host.ObserveAllFilters(v.t.Context())
	if err != nil {
		v.t.Fatal(err)
	}
	other := func(c masq.Chain) bool { return c.Table != masq.FilterTable || c.Family != masq.IPv4 }
	maps.DeleteFunc(filters.Chains, func(c masq.Chain, _ []masq.Rule) bool { return other(c) })
	maps.DeleteFunc(filters.Jumps, func(j masq.Jump, _ bool) bool { return other(j.Chain) })
	for _, op := range masq.Diff(masq.Ruleset{}, filters) {
		switch op.What.(type) {
		case masq.Jump, masq.Chain:
			v.apply(op)
		}
	}
}

func TestProgramThatNeverWorksIsNamedAndHealsOnceItDoes(t *testing.T) {
	p := newPrograms(t)
	for _, how := range []string{"held", "killed"} {
		withVictim(t, masq.IPTables, "", func(v *victim) {
			l := v.start(v.unfiltered)
			l.ready()
			p.begin("all", how)
			rep := l.pass()
			if rep.Ready() || rep.Failed == 0 || !strings.Contains(said(rep), "tables") {
				v.t.Errorf("%s: failed %d, said %q", how, rep.Failed, said(rep))
			}
			time.Sleep(aRetry)
			p.end()
			v.healed(2 * aRetry)
		})
	}
}
