package kernel

import (
	"context"
	"errors"
	"maps"
	"os/exec"
	"time"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/masq"
)

// legacy is the older form of iptables.
const legacy = "legacy"

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

// ObserveAllFilters reads what is ours in every packet filter that this host has: that of each form of iptables, since
// the host or its kubelet may have changed from one to the other. What could be read is returned also with an error.
func (k *Kernel) ObserveAllFilters(ctx context.Context) (masq.Ruleset, error) {
	all := masq.Ruleset{
		Chains: map[masq.Chain][]masq.Rule{}, Jumps: map[masq.Jump]bool{}, Ends: map[masq.Chain]int{},
	}
	var errs []error
	for _, form := range forms() {
		f := k.filterOf(masq.Chain{Form: form})
		have, err := f.observeAll(ctx)
		errs = append(errs, err)
		maps.Copy(all.Chains, have.Chains)
		maps.Copy(all.Jumps, have.Jumps)
		maps.Copy(all.Ends, have.Ends)
	}
	return all, errors.Join(errs...)
}

// forms lists the forms of iptables whose programs are here; an iptables that has no other name is of form "".
func forms() (all []string) {
	for _, form := range []string{"nft", legacy} {
		if _, err := exec.LookPath(masq.Chain{Family: masq.IPv4, Form: form}.Program()); err == nil {
			all = append(all, form)
		}
	}
	if all == nil {
		return []string{""}
	}
	return all
}

// filterOf returns the packet filter that holds a chain.
func (k *Kernel) filterOf(c masq.Chain) *filter {
	if c.Form == "" {
		return k.filter
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.forms == nil {
		k.forms = map[string]*filter{}
	}
	if k.forms[c.Form] == nil {
		k.forms[c.Form] = &filter{form: c.Form}
	}
	return k.forms[c.Form]
}

// observeAll reads without trusting what was read before. IPv6 may be missing on a host, IPv4 may not.
func (f *filter) observeAll(ctx context.Context) (masq.Ruleset, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := &reading{
		at: time.Now(), changes: f.changes.Load(),
		chains: map[masq.Chain][]string{}, exists: map[masq.Entry]bool{},
	}
	var errs []error
	for _, family := range []masq.Family{masq.IPv4, masq.IPv6} {
		if err := f.readFamily(ctx, family, now); err != nil && (family == masq.IPv4 || !cannotFilter(err)) {
			errs = append(errs, err)
		}
	}
	f.seen = now
	have, err := f.translate(masq.Ruleset{})
	return have, errors.Join(append(errs, err)...)
}
