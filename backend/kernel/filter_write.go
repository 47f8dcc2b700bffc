package kernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/masq"
)

const (
	// lockWait is how long, in seconds, iptables waits for another program's change to end. What else a pass has to do
	// waits as long.
	lockWait = 2
	// stuck is how long a program that writes may take, the lock included, before it is ended.
	stuck = 10 * time.Second
	// wary is how long changes are made one by one after a batch of which nobody can say how far it came.
	wary = time.Minute
	// lockHeld is what iptables says, among other words, when it waited for the lock in vain.
	lockHeld = "xtables lock"
)

// errNotStarted is of a process that never was, and so changed nothing.
var errNotStarted = errors.New("cannot be started")

// apply makes one change.
func (f *filter) apply(op backend.Op) error { return f.applyAll([]backend.Op{op})[0] }

// applyAll makes changes of one family in their order, many in one process, and returns what became of each. What was
// seen before counts no more, however they end. Where another program has the lock, it is waited for once in a pass,
// and not once for each change.
func (f *filter) applyAll(ops []backend.Op) []error {
	f.mu.Lock()
	defer f.mu.Unlock()
	defer func() {
		for _, s := range f.sides {
			s.looked = false
		}
	}()
	var errs []error
	for len(errs) < len(ops) {
		if rest := ops[len(errs):]; len(rest) == 1 || time.Since(f.unclear) < wary {
			errs = append(errs, f.applyOne(rest[0]))
		} else {
			errs = append(errs, f.applyBatch(rest)...)
		}
	}
	return errs
}

// applyOne says in iptables' own words why a change cannot be made, which iptables-restore often does not.
func (f *filter) applyOne(op backend.Op) error {
	if f.locked != nil {
		return f.locked
	}
	now, err := f.saved(op)
	if err != nil {
		return err
	}
	commands, err := now.commands(op)
	if err != nil {
		return err
	}
	c, _ := chainOf(op.What)
	for _, words := range commands {
		if err := f.run(c.Family, append([]string{"-t", c.Table}, words...)...); err != nil {
			return explainFilter(err)
		}
	}
	return nil
}

// applyBatch makes changes in one process, and returns what became of the first of them: of all, or of those up to the
// end of a table of which one could not be made. In that table nothing had changed, so there they were made one by one.
func (f *filter) applyBatch(ops []backend.Op) []error {
	errs := make([]error, len(ops))
	if f.locked != nil {
		return failAll(errs, f.locked)
	}
	now, err := f.saved(ops...)
	if err != nil {
		return failAll(errs, err)
	}
	blocks, text := now.compose(ops, errs)
	c, _ := chainOf(ops[0].What)
	err = f.restore(c.Family, text)
	switch refused, ok := refusedIn(blocks, err); {
	case err == nil:
		return errs
	case errors.Is(err, errNotStarted):
		refused = block{first: 0, end: len(ops)}
		fallthrough
	case ok:
		for i := refused.first; i < refused.end; i++ {
			if errs[i] == nil {
				errs[i] = f.applyOne(ops[i])
			}
		}
		return errs[:refused.end]
	case f.locked == nil:
		f.unclear = time.Now()
	}
	return failAll(errs, explainFilter(err))
}

// failAll sets what has no error yet to one.
func failAll(errs []error, err error) []error {
	for i := range errs {
		if errs[i] == nil {
			errs[i] = err
		}
	}
	return errs
}

// A block is operations on one table that follow each other: all of them are made or none.
type block struct {
	first, end int // of the operations
	line       int // the last of the block in what iptables-restore is given, counted from 1
}

// compose writes operations down for iptables-restore. Those that have an error are left out.
func (l lines) compose(ops []backend.Op, errs []error) (blocks []block, text string) {
	line := 0
	var all strings.Builder
	for end := 0; end < len(ops); {
		b := block{first: end}
		c, _ := chainOf(ops[end].What)
		var words []string
		for ; end < len(ops) && inTable(ops[end], c.Table); end++ {
			var commands [][]string
			commands, errs[end] = l.commands(ops[end])
			for _, w := range commands {
				words = append(words, strings.Join(w, " "))
			}
		}
		if len(words) > 0 { // an empty block would make the table
			fmt.Fprintf(&all, "*%s\n%s\nCOMMIT\n", c.Table, strings.Join(words, "\n"))
			line += len(words) + 2
		}
		b.end, b.line = end, line
		blocks = append(blocks, b)
	}
	return blocks, all.String()
}

func inTable(op backend.Op, table string) bool {
	c, _ := chainOf(op.What)
	return c.Table == table
}

// refusedIn returns the block in which something was refused, and false where that is not known. Those before it were
// made, it and those behind it were not.
func refusedIn(blocks []block, err error) (block, bool) {
	var exit *exec.ExitError
	// An answer that got lost may be one of success.
	if !errors.As(err, &exit) || !exit.Exited() || strings.Contains(strings.ToLower(err.Error()), unix.ENOBUFS.Error()) {
		return block{}, false
	}
	found := regexp.MustCompile(`\bline:? (\d+)`).FindStringSubmatch(err.Error())
	if found == nil {
		return block{}, false
	}
	line, _ := strconv.Atoi(found[1])
	i := slices.IndexFunc(blocks, func(b block) bool { return line <= b.line })
	if i < 0 {
		return block{}, false
	}
	return blocks[i], true
}

// lines are the rules of chains as in a reading.
type lines map[masq.Chain][]string

// saved reads what stands now, if one of ops takes something away: a number is only as good as the moment it was
// counted in, and of a jump there may be many.
func (f *filter) saved(ops ...backend.Op) (lines, error) {
	if !slices.ContainsFunc(ops, func(op backend.Op) bool { return op.Do == backend.Delete }) {
		return lines{}, nil
	}
	c, _ := chainOf(ops[0].What)
	name, err := f.kernel.command(f.variant, c.Family)
	if err != nil {
		return nil, err
	}
	s, err := startSaving(name+"-save", c.Family, glimpse{}, f.limit)
	if err != nil {
		return nil, err
	}
	<-s.done
	if errors.Is(s.err, context.DeadlineExceeded) {
		f.locked = s.err
	}
	return s.chains, s.err
}

// commands returns an operation in iptables' words, without the program and the table, and changes l as it does.
func (l lines) commands(op backend.Op) ([][]string, error) {
	switch o := op.What.(type) {
	case masq.Chain:
		if op.Do == backend.Delete {
			return l.deleteChain(o), nil
		}
		l[plain(o)] = nil
		return [][]string{{"-N", o.Name}}, nil
	case masq.Jump:
		if op.Do == backend.Delete {
			return l.deleteJumps(o), nil
		}
		return [][]string{l.add(o.Base(), o.At, o.Args())}, nil
	case masq.Entry:
		if op.Do == backend.Delete {
			return l.deleteEntry(o)
		}
		return [][]string{l.add(o.Chain, o.At, o.Rule.Args())}, nil
	}
	return nil, fmt.Errorf("the packet filter has no %s", op.What.Kind())
}

// add puts a rule into a chain, at the end if at is 0.
func (l lines) add(c masq.Chain, at int, rule []string) []string {
	c = plain(c)
	text := strings.Join(rule, " ")
	if at == 0 {
		l[c] = append(l[c], text)
		return append([]string{"-A", c.Name}, rule...)
	}
	l[c] = slices.Insert(l[c], min(at-1, len(l[c])), text) // of a chain that was not read there is less here
	return append([]string{"-I", c.Name, strconv.Itoa(at)}, rule...)
}

func (l lines) deleteEntry(e masq.Entry) ([][]string, error) {
	c := plain(e.Chain)
	if e.At > len(l[c]) || e.Rule.Unknown != "" && l[c][e.At-1] != e.Rule.Unknown {
		return nil, fmt.Errorf("chain %s changed since the last look", c.Name)
	}
	l[c] = slices.Delete(l[c], e.At-1, e.At)
	return [][]string{{"-D", c.Name, strconv.Itoa(e.At)}}, nil
}

// deleteJumps takes away all copies of a jump.
func (l lines) deleteJumps(j masq.Jump) (commands [][]string) {
	from := plain(j.Base())
	l[from] = slices.DeleteFunc(l[from], func(rule string) bool {
		if !isJump(rule, j) {
			return false
		}
		commands = append(commands, append([]string{"-D", j.From}, j.Args()...))
		return true
	})
	return commands
}

// deleteChain takes away what holds a chain, too: a jump that packets do not get to is not ours to see.
func (l lines) deleteChain(c masq.Chain) (commands [][]string) {
	if _, there := l[plain(c)]; !there {
		return nil
	}
	for _, way := range ways(c.Family, c.Variant) {
		if way.Chain == c {
			commands = append(commands, l.deleteJumps(way)...)
		}
	}
	delete(l, plain(c))
	return append(commands, []string{"-F", c.Name}, []string{"-X", c.Name})
}

// restore gives iptables-restore what it is to do, and to leave the rest as it is.
func (f *filter) restore(family masq.Family, text string) error {
	if text == "" {
		return nil
	}
	name, err := f.kernel.command(f.variant, family)
	if err != nil {
		return err
	}
	return f.start(text, name+"-restore", "--noflush", "-w", strconv.Itoa(lockWait))
}

// run has iptables do one thing.
func (f *filter) run(family masq.Family, args ...string) error {
	name, err := f.kernel.command(f.variant, family)
	if err != nil {
		return err
	}
	return f.start("", name, append([]string{"-w", strconv.Itoa(lockWait)}, args...)...)
}

// start has a program do something and waits for it. One that waits for the lock in vain, or hangs, is the last of a
// pass.
func (f *filter) start(input, name string, args ...string) error {
	ctx, end := context.WithTimeout(context.Background(), f.limit)
	defer end()
	cmd := exec.CommandContext(ctx, name, args...)
	var said bytes.Buffer
	cmd.Stdin, cmd.Stderr = strings.NewReader(input), &said
	endsWithAll(cmd)
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("%s %w: %w", name, errNotStarted, err)
	}
	err := cmd.Wait()
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		f.locked = hung(cmd, f.limit)
		return f.locked
	}
	err = fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, strings.Join(strings.Fields(said.String()), " "))
	if strings.Contains(err.Error(), lockHeld) {
		f.locked = explainFilter(err)
	}
	return err
}

// endsWithAll has what a program has started end with it when its time is over.
func endsWithAll(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = time.Second // for what has left its group
}

// hung is why nothing came of a program that took more than its time.
func hung(cmd *exec.Cmd, limit time.Duration) error {
	return fmt.Errorf("%s had not ended after %v and was killed: %w; call it by hand on this node to see "+
		"what it waits for",
		strings.Join(cmd.Args, " "), limit, context.DeadlineExceeded)
}

// explainFilter says what is behind an exit status (xtables.h: RESOURCE_PROBLEM).
func explainFilter(err error) error {
	var e *exec.ExitError
	if errors.As(err, &e) && e.ExitCode() == 4 {
		return fmt.Errorf("%w (another program holds the packet filter, or it %w)", err, errPermission)
	}
	return err
}
