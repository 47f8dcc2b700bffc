package kernel

import (
	"context"
	"errors"
	"fmt"
	"os/exec"

	"golang.org/x/sys/unix"
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
		if k.mayHold(v) {
			errs = append(errs, k.iptables(v).observeAll(ctx, &have))
		}
	}
	k.sets.forget()
	_, err := k.sets.observe(masq.Ruleset{}, &have)
	return have, errors.Join(append(errs, err)...)
}

// observeOthers adds to have what is ours in a variant of iptables that is not in use: the host or its kubelet has
// changed from one to the other, and its rules go by sets that would not be kept any more.
func (k *Kernel) observeOthers(ctx context.Context, want masq.Ruleset, have *masq.Ruleset) {
	inUse := masq.NFT
	if k.filter.isLegacy() {
		inUse = masq.Legacy
	}
	for _, v := range []masq.Variant{masq.NFT, masq.Legacy} {
		if want.Has(masq.IPTables) && v == inUse || !k.mayHold(v) {
			continue
		}
		if err := k.iptables(v).observeAll(ctx, have); err != nil {
			have.Drops = append(have.Drops, fmt.Sprintf("rules of tweed in %s go by addresses that are not kept any more, "+
				"and cannot be read; remove them: %v", v.Command(masq.IPv4), err))
		}
	}
}

// variants lists the variants of iptables whose programs are here; where neither is, an iptables that has no other name
// may be.
func variants() (all []masq.Variant) {
	for _, v := range []masq.Variant{masq.NFT, masq.Legacy} {
		if _, err := exec.LookPath(v.Command(masq.IPv4)); err == nil {
			all = append(all, v)
		}
	}
	if all == nil {
		return []masq.Variant{""}
	}
	return all
}

// mayHold reports whether chains of ours may be in a variant of iptables. It asks the kernel: a host without any needs
// no iptables.
func (k *Kernel) mayHold(v masq.Variant) bool {
	return v != masq.Legacy && k.nft.iptables() || v != masq.NFT && hasLegacyTables()
}

// observeAll adds to have what is ours, and trusts nothing that was read before. IPv6 may be missing on a host, IPv4
// may not.
func (f *filter) observeAll(ctx context.Context, have *masq.Ruleset) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := f.begin()
	var errs []error
	for _, family := range []masq.Family{masq.IPv4, masq.IPv6} {
		if err := f.readFamily(ctx, family, now); err != nil && (family == masq.IPv4 || !cannotFilter(err)) {
			errs = append(errs, err)
		}
	}
	f.seen = now
	return errors.Join(append(errs, f.translate(masq.Ruleset{}, have))...)
}

// observeAll adds to have what is ours, guests that packets do not get to too. A kernel without nftables holds nothing.
func (n *nftables) observeAll(have *masq.Ruleset) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.seen = nil
	_, err := n.generation()
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EINVAL) { // nobody is there to answer
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
