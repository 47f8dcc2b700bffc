// Package overlay keeps this node's kernel in step with the cluster's leases.
//
// A pass plans (what should the kernel hold, what does it hold, which operations lie between) and then applies. Whatever
// happens outside, a lease or a link or an address that changes, only asks for another pass.
package overlay

import (
	"context"
	"net/netip"

	"tweed.dev/tweed/backend"
	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/subnet"
)

// Leases tells what the nodes of the cluster have published.
type Leases interface {
	// Run keeps the list current until ctx ends, and calls ring after each change of it.
	Run(ctx context.Context, ring func()) error
	// List returns the last complete list, and false before the first.
	List() (subnet.List, bool)
	// Err says why the list cannot be kept current at the moment; nil while it can.
	Err() error
}

// Publisher is this node's own side of the leases.
type Publisher interface {
	// Self tells what this node is and which subnets it has. It answers from memory. The error says what is waited for.
	Self() (subnet.Node, error)
	// Publish records the leases of this node for the others to see. It writes nothing where they stand already.
	Publish(ctx context.Context, leases []subnet.Lease) error
	// Grow makes network the one that subnets are leased of. It holds the one before, unless this node has not been
	// planned for yet.
	Grow(network subnet.Network)
}

// Kernel is this host's network.
type Kernel interface {
	// Interfaces lists what an uplink can be chosen from.
	Interfaces(ctx context.Context) ([]backend.Interface, error)
	// RouteTo tells how a packet to addr would leave; the path is the zero one where nothing leads there.
	RouteTo(ctx context.Context, addr netip.Addr) (backend.Path, error)
	// RouterAdvertised lists devices whose routes come from router advertisements that the kernel will stop to take
	// once it forwards.
	RouterAdvertised(ctx context.Context) ([]string, error)
	// Observe reads what the kernel holds of ours, and the strangers in the way of want.
	Observe(ctx context.Context, want backend.State) (backend.Observed, error)
	// ObserveFilter reads what the packet filter holds of ours.
	ObserveFilter(ctx context.Context, want masq.Ruleset) (masq.Ruleset, error)
	// RuleCounts returns how many packets each rule of a chain of ours has matched, in their order.
	RuleCounts(ctx context.Context, c masq.Chain) ([]uint64, error)
	// ApplyAll makes changes in their order and returns what came of each. One that fails keeps none of the others from
	// being made.
	ApplyAll(ctx context.Context, ops []backend.Op) []error
	// Watch calls ring, until ctx ends, whenever something of ours or of an uplink may have changed.
	Watch(ctx context.Context, uplink func(dev string) bool, ring func()) error
}
