package kernel

import (
	"context"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend"
)

// batchSize is how many changes go to the kernel at once. It does them one after the other and answers only those that
// fail, and the last: so many answers fit into a socket's receive buffer as it comes (net.core.rmem_default).
const batchSize = 100

// A change is a request that has no answer but that it was done or why not.
type change struct {
	typ   uint16
	flags int
	body  message
}

// ApplyAll makes changes in their order, and returns what Apply would for each. One that fails keeps none of the others
// from being made.
func (k *Kernel) ApplyAll(ctx context.Context, ops []backend.Op) []error {
	errs := make([]error, len(ops))
	var changes []change
	var of []int // of which operations they are
	send := func() {
		for i, err := range k.conn.doAll(changes) {
			errs[of[i]] = explain(ops[of[i]], err)
		}
		changes, of = changes[:0], of[:0]
	}
	for i := 0; i < len(ops); i++ {
		c, ok, err := k.changeOf(ops[i])
		switch {
		case err != nil:
			errs[i] = explain(ops[i], err)
		case ok:
			changes, of = append(changes, c), append(of, i)
		default:
			send()
			i += copy(errs[i:], k.applyFiltered(ctx, ops[i:])) - 1
		}
		if len(changes) == batchSize {
			send()
		}
	}
	send()
	return errs
}

// applyFiltered makes the first of ops, together with those behind it that are for the same family of the same
// iptables, and returns what became of them.
func (k *Kernel) applyFiltered(ctx context.Context, ops []backend.Op) (errs []error) {
	f, family := k.filterOf(ops[0].What)
	n := 1
	for ; f != nil && n < len(ops); n++ {
		if other, itsFamily := k.filterOf(ops[n].What); other != f || itsFamily != family {
			break
		}
	}
	if n == 1 || ctx.Err() != nil {
		return []error{k.Apply(ctx, ops[0])}
	}
	errs = f.applyAll(ops[:n])
	for i, err := range errs {
		errs[i] = explain(ops[i], err)
	}
	return errs
}

// changeOf returns the one request that an operation on an entry of a table consists of, and false for other objects.
func (k *Kernel) changeOf(op backend.Op) (c change, ok bool, err error) {
	switch o := op.What.(type) {
	case backend.Addr:
		c, err = k.addrChange(op.Do, o)
	case backend.Neigh:
		c, err = k.neighChange(op.Do, o)
	case backend.FDBEntry:
		c, err = k.fdbChange(op.Do, o)
	case backend.Route:
		c, err = k.routeChange(op.Do, o)
	default:
		return c, false, nil
	}
	return c, true, err
}

// doAll asks for changes, at most batchSize, and waits until all have been tried.
func (c *conn) doAll(changes []change) []error {
	if len(changes) == 0 {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	first := c.seq + 1
	c.seq += uint32(len(changes))
	var b []byte
	for i, change := range changes {
		flags := change.flags
		if i == len(changes)-1 {
			flags |= unix.NLM_F_ACK
		}
		b = appendRequest(b, change.typ, flags, first+uint32(i), change.body)
	}
	errs := make([]error, len(changes))
	known, err := 0, c.wire.send(b)
	for err == nil && known < len(changes) {
		err = c.receive(0, func(h syscall.NlMsghdr, body []byte) {
			if i := h.Seq - first; h.Type == unix.NLMSG_ERROR && i < uint32(len(changes)) {
				errs[i] = refusal(h.Type, h.Flags, body)
				known = int(i) + 1 // the kernel goes in order, so what was before it is known too
			}
		})
	}
	if err != nil {
		c.drain()
	}
	for i := known; i < len(changes); i++ {
		errs[i] = fmt.Errorf("the kernel's answer is missing: %w", err)
	}
	return errs
}
