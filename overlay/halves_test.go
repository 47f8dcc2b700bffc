package overlay

import (
	"context"
	"errors"
	"testing"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/masq"
)

// blind is a host that can be read in part, or not at all.
type blind struct {
	Kernel
	filter, state error
}

func (b *blind) ObserveFilter(ctx context.Context, want masq.Ruleset) (masq.Ruleset, error) {
	if b.filter != nil {
		return masq.Ruleset{}, b.filter
	}
	return b.Kernel.ObserveFilter(ctx, want)
}

func (b *blind) Observe(ctx context.Context, want backend.State) (backend.Observed, error) {
	if b.state != nil {
		return backend.Observed{}, b.state
	}
	return b.Kernel.Observe(ctx, want)
}

func newBlind(t *testing.T) (*node, *blind) {
	t.Helper()
	n := newNode(t)
	n.cluster.set(peer("n2", "10.244.2.0/24", "192.0.2.12"))
	b := &blind{Kernel: n.kern}
	n.planner.Kernel = b
	return n, b
}

// Who keeps us from the packet filter keeps no peer from being reached, and is named until that ends.
func TestPacketFilterThatCannotBeReadKeepsPeersWaiting(t *testing.T) {
	n, b := newBlind(t)
	b.filter = errors.New("iptables-save has not ended")
	for range 2 {
		rep := n.step(t)
		if rep.Converged || rep.Failed != 1 || !hasProblem(rep, "n1", "reading the packet filter: iptables-save has not") {
			t.Errorf("%+v", rep)
		}
		if n.hasConflist() {
			t.Error("pods are let in")
		}
	}
	if n.routes(t)["10.244.2.0/24"] == "" {
		t.Error("n2 is not reached")
	}
	n.cluster.set(peer("n2", "10.244.2.0/24", "192.0.2.12"), peer("n3", "10.244.3.0/24", "192.0.2.13"))
	n.step(t)
	if n.routes(t)["10.244.3.0/24"] == "" {
		t.Error("n3, which has joined meanwhile, is not reached")
	}
	b.filter = nil
	if rep := n.step(t); !rep.Converged || len(rep.Problems) > 0 || rep.Drift > 0 {
		t.Errorf("when it can be read again: %+v", rep)
	}
}

func TestNetworkThatCannotBeReadKeepsThePacketFilterOpen(t *testing.T) {
	n, b := newBlind(t)
	b.state = errors.New("the dump was interrupted")
	rep := n.step(t)
	if rep.Converged || rep.Failed != 1 || !hasProblem(rep, "n1", "network state: the dump was interrupted") {
		t.Errorf("%+v", rep)
	}
	rules, err := n.kern.ObserveFilter(t.Context(), masq.Ruleset{})
	if err != nil || !rules.Has(masq.IPTables) {
		t.Errorf("the packet filter is empty: %v", err)
	}
	b.state = nil
	if rep := n.step(t); !rep.Converged || rep.census.programmed != 1 || rep.Drift > 0 {
		t.Errorf("when it can be read again: %+v", rep)
	}
	b.state = errors.New("the dump was interrupted")
	if rep := n.step(t); rep.census.programmed != 1 || rep.Converged {
		t.Errorf("peers that were reached count as lost: %+v", rep)
	}
}

func TestHostThatCannotBeReadAtAllIsTakenForAnEmptyOne(t *testing.T) {
	n, b := newBlind(t)
	n.step(t)
	ops := len(n.kern.Ops())
	b.filter, b.state = errors.New("no filter"), errors.New("no network")
	if rep := n.step(t); rep.Converged || rep.Failed != 1 || rep.Waiting == "" || rep.Peers != 1 {
		t.Errorf("%+v", rep)
	}
	if len(n.kern.Ops()) != ops {
		t.Errorf("changed: %v", n.kern.Ops()[ops:])
	}
}

// Where the form changes and the new one cannot be written, the old one is all that there is.
func TestOldFormGoesAlthoughTheNewOneCannotBeWritten(t *testing.T) {
	n := newNode(t)
	n.cluster.set()
	n.step(t)
	n.planner.Config.PacketFilter, n.planner.last = masq.NFTables, inputs{}
	n.kern.Fail(func(op backend.Op) error {
		if _, table := op.What.(masq.Table); table && op.Do == backend.Add {
			return errors.New("another program holds the packet filter")
		}
		return nil
	})
	rep := n.step(t)
	rules, err := n.kern.ObserveFilter(t.Context(), masq.Ruleset{})
	if err != nil || !rules.Has(masq.IPTables) || rep.Skipped == 0 || rep.Converged {
		t.Errorf("%v, %+v", err, rep)
	}
	if form := n.info(t).PacketFilter; form != "iptables" {
		t.Errorf("host ports are written in %q, where the old form is in force", form)
	}
	n.kern.Fail(nil)
	rep = n.step(t)
	rules, err = n.kern.ObserveFilter(t.Context(), masq.Ruleset{})
	if err != nil || rules.Has(masq.IPTables) || !rules.Has(masq.NFTables) || !rep.Converged {
		t.Errorf("in the end: %v, %+v", err, rep)
	}
	if form := n.info(t).PacketFilter; form != "nftables" {
		t.Errorf("in the end host ports are written in %q", form)
	}
}
