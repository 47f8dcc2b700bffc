package kernel

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/backend/spoof"
)

// apply makes one change. If it cannot be made, what was read before counts no more: the change was planned from it.
func (n *nftables) apply(op backend.Op) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	err := explainSpoof(op, n.transact(op))
	if err != nil {
		n.seen = nil
	}
	return err
}

// transact makes one change, in one transaction that does not happen if others wrote since it was looked for its place.
func (n *nftables) transact(op backend.Op) error {
	for range nftTries {
		generation, err := n.generation()
		if err != nil {
			return err
		}
		changes, err := n.changes(op)
		if err != nil || len(changes) == 0 {
			return err
		}
		if err = n.conn.commit(generation, changes); !errors.Is(err, unix.ERESTART) {
			return err
		}
	}
	return errUnsteady
}

func (n *nftables) changes(op backend.Op) ([]nftChange, error) {
	switch o := op.What.(type) {
	case masq.Table:
		m := nfMessage(nfproto(o.Family))
		m.string(unix.NFTA_TABLE_NAME, o.Name)
		if op.Do == backend.Delete {
			return []nftChange{{typ: unix.NFT_MSG_DELTABLE, body: m}}, nil
		}
		return []nftChange{{unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE | unix.NLM_F_EXCL, m}}, nil
	case masq.Set:
		return changeSet(op.Do, o), nil
	case masq.Members:
		return changeMembers(op.Do, o), nil
	case masq.Chain:
		if op.Do == backend.Delete {
			return deleteChain(o), nil
		}
		return []nftChange{{unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE | unix.NLM_F_EXCL, chainMessage(o)}}, nil
	case masq.Jump:
		return n.changeJump(op.Do, o)
	case masq.Entry:
		return n.changeEntry(op.Do, o)
	case masq.Guest:
		return n.changeGuest(op.Do, o)
	case spoof.Rules, spoof.Pod:
		return spoofChanges(op.Do, o), nil
	}
	return nil, fmt.Errorf("nftables has no %s", op.What.Kind())
}

func deleteChain(c masq.Chain) []nftChange {
	return []nftChange{
		{typ: unix.NFT_MSG_DELRULE, body: ruleMessage(c)}, // all of its rules
		{typ: unix.NFT_MSG_DELCHAIN, body: chainMessage(c)},
	}
}

// changeJump makes the hook anew, whatever of that name was there: the table is ours.
func (n *nftables) changeJump(do backend.Verb, j masq.Jump) (changes []nftChange, err error) {
	_, there, err := n.chain(j.Base())
	if there {
		changes = deleteChain(j.Base())
	}
	if err != nil || do == backend.Delete {
		return changes, err
	}
	hook := masq.HookOf(j.From)
	m := chainMessage(j.Base())
	m.nest(unix.NFTA_CHAIN_HOOK, func(m *message) {
		m.be32(unix.NFTA_HOOK_HOOKNUM, hookNumber(hook))
		m.be32(unix.NFTA_HOOK_PRIORITY, uint32(int32(hook.Priority)))
	})
	m.be32(unix.NFTA_CHAIN_POLICY, nfAccept)
	m.string(unix.NFTA_CHAIN_TYPE, hook.Type)
	return append(changes, nftChange{unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE | unix.NLM_F_EXCL, m},
		newRule(j.Base(), jumpExprs(j), unix.NLM_F_APPEND, 0)), nil
}

// newRule puts a rule behind the one with the handle beside, or in front of it; if that is 0, at the end or the start.
func newRule(c masq.Chain, steps []nftExpr, behind int, beside uint64) nftChange {
	m := ruleMessage(c)
	m.nest(unix.NFTA_RULE_EXPRESSIONS, func(m *message) {
		for _, e := range steps {
			m.nest(unix.NFTA_LIST_ELEM, func(m *message) {
				m.string(unix.NFTA_EXPR_NAME, e.name)
				m.bytes(unix.NFTA_EXPR_DATA, e.data)
			})
		}
	})
	m.bytes(unix.NFTA_RULE_USERDATA, append([]byte{commentUdata, byte(len(masq.Comment) + 1)}, masq.Comment+"\x00"...))
	if beside != 0 {
		m.be64(unix.NFTA_RULE_POSITION, beside)
	}
	return nftChange{unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE | behind, m}
}

func deleteRule(c masq.Chain, handle uint64) nftChange {
	m := ruleMessage(c)
	m.be64(unix.NFTA_RULE_HANDLE, handle)
	return nftChange{typ: unix.NFT_MSG_DELRULE, body: m}
}

func (n *nftables) changeEntry(do backend.Verb, e masq.Entry) ([]nftChange, error) {
	rules, err := n.rules(e.Chain)
	if err != nil {
		return nil, err
	}
	steps := exprs(e.Chain.Family, e.Rule)
	switch {
	case do == backend.Delete:
		text := e.Rule.Unknown
		if text == "" {
			text = textOf(steps)
		}
		if e.At > len(rules) || textOf(rules[e.At-1].exprs) != text {
			return nil, fmt.Errorf("chain %s changed since the last look", e.Chain.Name)
		}
		return []nftChange{deleteRule(e.Chain, rules[e.At-1].handle)}, nil
	case e.At == 1:
		return []nftChange{newRule(e.Chain, steps, 0, 0)}, nil
	case e.At > len(rules)+1:
		return nil, fmt.Errorf("chain %s changed since the last look", e.Chain.Name)
	}
	return []nftChange{newRule(e.Chain, steps, unix.NLM_F_APPEND, rules[e.At-2].handle)}, nil
}

// changeGuest takes away all copies of a rule, those that packets do not get to too, before it adds one.
func (n *nftables) changeGuest(do backend.Verb, g masq.Guest) (changes []nftChange, err error) {
	host, there, err := n.chain(g.Host)
	if err == nil && there {
		host.rules, err = n.rules(g.Host)
	}
	if err != nil || !there && do == backend.Delete {
		return nil, err
	}
	steps := exprs(g.Host.Family, g.Rule)
	text := g.Rule.Unknown
	if text == "" {
		text = textOf(steps)
	}
	for _, r := range host.rules {
		if r.ours && textOf(r.exprs) == text {
			changes = append(changes, deleteRule(g.Host, r.handle))
		}
	}
	if do == backend.Delete {
		return changes, nil
	}
	if end := host.host().End; end > 0 {
		return append(changes, newRule(g.Host, steps, 0, host.rules[end-1].handle)), nil
	}
	return append(changes, newRule(g.Host, steps, unix.NLM_F_APPEND, 0)), nil
}
