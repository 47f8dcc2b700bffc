package kernel

import (
	"context"
	"errors"
	"fmt"
	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/masq"
)

// ObserveAll reads all that is ours on this host, whoever wanted it, and with the veths of pods. Sysctls have no owner,
// and are not among it.
func (k *Kernel) ObserveAll(ctx context.Context) (backend.State, error) {
	have, err := k.Observe(ctx, backend.State{})
	if err != nil {
		return backend.State{}, err
	}
	veths, err := k.links(string(backend.KindVeth))
	if err != nil {
		return backend.State{}, err
	}
	for _, l := range veths {
		if l.group == backend.Owner {
			have.Links[l.name] = backend.Link{Name: l.name, Type: backend.KindVeth, MAC: l.mac, MTU: l.mtu, Up: l.up}
		}
	}
	return have.State, nil
}

// ObserveAllFilters reads what is ours in every packet filter that this host has, whether packets get to it or not: in
// nftables, and in each variant of iptables, since the host or its kubelet may have changed from one to the other. What
// could be read is returned also with an error.
func (k *Kernel) ObserveAllFilters(ctx context.Context) (masq.Ruleset, error) {
	have := emptyRuleset()
	errs := []error{k.nft.observeAll(&have)}
	for _, v := range variants() {
		errs = append(errs, k.filters[v].observeAll(ctx, v, &have))
	}
	k.sets.forget()
	return have, errors.Join(append(errs, k.sets.observe(masq.Ruleset{}, &have))...)
}

// observeAll adds to have what is ours, guests that packets do not get to too. A kernel without nftables holds nothing.
func (n *nftables) observeAll(have *masq.Ruleset) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.seen = nil
	_, err := n.generation()
	if isNobody(err) {
		n.seen = &nftReading{}
		return nil
	}
	now, err := n.read()
	if err != nil {
		return fmt.Errorf("reading nftables: %w", err)
	}
	n.seen = now
	now.translate(masq.Ruleset{}, have)
	for host, c := range now.chains {
		if host.Table != masq.OwnTable {
			guests(host, c.rules, masq.Ruleset{}, have)
		}
	}
	return nil
}
