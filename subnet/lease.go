// Package subnet says which node owns which pod addresses.
//
// It is pure: leases come from a directory of files or from Node annotations (packages local and kube), and what
// becomes of them in the kernel is package backend's to say.
package subnet

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"slices"
	"time"
)

// A Lease is one node's claim to one pod subnet. It has one address family; a dual-stack node holds two.
type Lease struct {
	// Node is the name of the node that holds the lease.
	Node string `json:"node"`
	// Subnet holds the addresses of the node's pods, masked.
	Subnet netip.Prefix `json:"subnet"`
	// Host is where encapsulated packets for the node go. Its family is that of the underlay, not of Subnet.
	Host netip.Addr `json:"host"`
	// NodeAddrs are the node's own published addresses, at most one a family; Host is among them.
	NodeAddrs []netip.Addr `json:"nodeAddrs"`
	// Sources are further addresses that the node's encapsulated packets may come from.
	Sources []netip.Addr `json:"sources,omitempty"`
	// Accepts are the pod networks in which the node accepts other nodes' leases, at most one a family. None is that of
	// a daemon which does not say so yet: it accepts them all.
	Accepts []netip.Prefix `json:"accepts,omitempty"`
	// Backend names how packets reach the node: "vxlan" or "host-gw".
	Backend string `json:"backend"`
	// Data is what that backend needs to know to reach it, in the backend's own JSON.
	Data json.RawMessage `json:"backendData"`
	// Since is when the node joined the cluster. Of two leases that exclude each other the older one stands.
	Since time.Time `json:"since"`
}

// NodeAddr is the node's published address of the family of Subnet; invalid where it has none.
func (l Lease) NodeAddr() netip.Addr {
	for _, a := range l.NodeAddrs {
		if sameFamily(a, l.Subnet.Addr()) {
			return a
		}
	}
	return netip.Addr{}
}

// Equal reports whether l and m claim the same thing in the same words.
func (l Lease) Equal(m Lease) bool {
	return l.Node == m.Node && l.Subnet == m.Subnet && l.Host == m.Host &&
		slices.Equal(l.NodeAddrs, m.NodeAddrs) && slices.Equal(l.Sources, m.Sources) &&
		slices.Equal(l.Accepts, m.Accepts) && l.Backend == m.Backend && bytes.Equal(l.Data, m.Data) && l.Since.Equal(m.Since)
}

// A Problem is one node's fault, or one thing that is wrong on this node. It never keeps other peers waiting.
type Problem struct {
	// Node is the node at fault; this node itself where the fault is local.
	Node string `json:"node"`
	// Kind groups problems for counting. It is one of the Kind constants.
	Kind string `json:"kind"`
	// Text says what is wrong with what, and what to do about it.
	Text string `json:"text"`
}

// The kinds of Problem.
const (
	KindAnnotation = "annotation" // what a node published cannot be read
	KindLease      = "lease"      // a lease is not one of this network, or a node waits for one
	KindConflict   = "conflict"   // two nodes claim the same subnet or VTEP
	KindStranger   = "stranger"   // something that is not ours occupies a place that we need
	KindKernel     = "kernel"     // the kernel refused an operation, or lacks something
	KindPublish    = "publish"    // this node's lease could not be written
	KindPods       = "pods"       // something on this node keeps pods from working
	KindConfig     = "config"     // this node's configuration has changed, and cannot come into force
	KindFight      = "fight"      // something else changes, again and again, what is repaired on this node
)

// Kinds lists the kinds of Problem.
func Kinds() []string {
	return []string{
		KindAnnotation, KindLease, KindConflict, KindStranger, KindKernel, KindPublish, KindPods, KindConfig,
		KindFight,
	}
}

func (p Problem) String() string { return p.Node + ": " + p.Text }

// A List is what a cluster's nodes have published, complete as of one moment.
type List struct {
	// Leases holds every lease that could be read, in no particular order, this node's included.
	Leases []Lease
	// Problems holds a Problem for each thing that could not be read.
	Problems []Problem
	// Generation changes whenever Leases or Problems do, and with nothing else.
	Generation uint64
	// At is when the list was last known to be current.
	At time.Time
}

// A Node is what this node is told about itself by whoever hands out subnets.
type Node struct {
	Name string
	// Subnets are this node's, at most one a family.
	Subnets []netip.Prefix
	// Addrs are the addresses that the cluster knows the node by, most preferred first; none on a machine without a
	// cluster.
	Addrs []netip.Addr
	// HostOverride is published in place of the node's own address of its family, for a node behind NAT; invalid for none.
	HostOverride netip.Addr
	// Since is when the node joined the cluster.
	Since time.Time
	// Leased is set where nodes lease their subnets themselves, so that these are of the configured length.
	Leased bool
	// Problems is what is wrong with what the node is told; none keeps it from working.
	Problems []Problem
}
