package subnet

import (
	"fmt"
	"net/netip"
	"strings"
	"time"
)

// A Version names one state of one Node object. The server refuses a write that is made for another one: for an older
// state because of Resource, for another object of the same name because of UID.
type Version struct {
	UID      string
	Resource string // resourceVersion
}

// A Standing is what one Node says of its lease, as text, in one version of it.
type Standing struct {
	Node    string
	Version Version
	Since   time.Time // when the Node was created
	Subnets string    // the field Subnets of its Record, "" for none
	Network string    // the field Network of its Record, "" for none
	Claim   string    // a Claim, "" for none
}

// A Listing holds what all Nodes said at one moment.
type Listing []Standing

// A Step is what a Claimant wants done next. It is one of the types below.
type Step interface {
	fmt.Stringer
	step()
}

// ListNodes asks for what all Nodes say. A Fresh one has to be one read that began after the step was returned, of one
// moment for all Nodes and from the store itself: no cache, and no pages that may be of different age. For the others a
// cache will do.
type ListNodes struct{ Fresh bool }

// PatchClaim asks for a write of the claim to this node's Node, if it is of version If.
type PatchClaim struct {
	Claim Claim
	If    Version
}

// PatchSubnets asks for one write that records the lease in this node's Node and removes the claim, if it is of version
// If.
type PatchSubnets struct {
	Subnets []netip.Prefix
	If      Version
}

// RemoveClaim asks for a write that removes the claim from this node's Node, if it is of version If.
type RemoveClaim struct {
	If  Version
	Why string
}

// Wait asks for a pause, and then for a read of this node's Node.
type Wait struct {
	For time.Duration
	Why string
}

// Done says that the node's Node records its lease. It stays so until the Node says otherwise.
type Done struct{ Subnets []netip.Prefix }

// Stuck says that the node cannot lease a subnet, or not of every family. It may be asked again after For, and at once
// when a Node goes or what is wrong is changed. What the Node records already stays in force.
type Stuck struct {
	Err error // an *ExhaustedError where no subnet is free
	For time.Duration
}

func (ListNodes) step()    {}
func (PatchClaim) step()   {}
func (PatchSubnets) step() {}
func (RemoveClaim) step()  {}
func (Wait) step()         {}
func (Done) step()         {}
func (Stuck) step()        {}

func (s ListNodes) String() string {
	if s.Fresh {
		return "list all Nodes anew"
	}
	return "list all Nodes"
}

func (s PatchClaim) String() string {
	return fmt.Sprintf("patch claim=%s %s", strings.ReplaceAll(s.Claim.String(), " ", "/"), s.If)
}

func (s PatchSubnets) String() string {
	return fmt.Sprintf("patch subnets=%s claim- %s", join(s.Subnets), s.If)
}

func (s RemoveClaim) String() string { return fmt.Sprintf("patch claim- %s: %s", s.If, s.Why) }

func (s Wait) String() string { return fmt.Sprintf("wait %v: %s", s.For, s.Why) }

func (s Done) String() string { return "done: " + join(s.Subnets) }

func (s Stuck) String() string { return "stuck: " + s.Err.Error() }

func (v Version) String() string { return "uid=" + v.UID + " resourceVersion=" + v.Resource }

// An ExhaustedError says that a network has no free subnet for a node.
type ExhaustedError struct {
	Node    string
	Network netip.Prefix
	Len     int    // of a node's subnet
	Total   uint64 // how many such subnets could be leased if none was taken
	Leased  []string
	Claimed []string // by nodes that have not finished, or never will; such a claim goes with its Node
}

// named is how many holders an ExhaustedError names of each kind.
const named = 3

func (e *ExhaustedError) Error() string {
	text := fmt.Sprintf("no subnet is free for node %s: all %d of length /%d in %s are taken, %d by leases%s",
		e.Node, e.Total, e.Len, e.Network, len(e.Leased), oldestOf(e.Leased))
	if len(e.Claimed) > 0 {
		text += fmt.Sprintf(" and %d by claims of nodes that have not finished leasing%s",
			len(e.Claimed), oldestOf(e.Claimed))
	}
	return text + "; delete the Nodes that are gone, or configure a larger network"
}

func oldestOf(holders []string) string {
	if len(holders) == 0 {
		return ""
	}
	return " (the oldest: " + strings.Join(holders[:min(named, len(holders))], ", ") + ")"
}
