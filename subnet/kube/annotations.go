package kube

import (
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tweed.dev/tweed/subnet"
)

const prefix = "tweed.dev/"

// The annotations on a Node. They are a contract between versions: a meaning never changes. Their values are described
// at subnet.Record.
const (
	// The node's own daemon writes these five.
	Subnets     = prefix + subnet.FieldSubnets
	Host        = prefix + subnet.FieldHost
	Backend     = prefix + subnet.FieldBackend
	BackendData = prefix + subnet.FieldData
	Network     = prefix + subnet.FieldNetwork
	// Claim stands only while a node takes a lease. Peers ignore it.
	Claim = prefix + subnet.FieldClaim
	// An operator writes these two. HostOverride is an address to publish in place of the node's first, behind NAT.
	HostOverride = prefix + "host-override"
	Sources      = prefix + subnet.FieldSources
)

// lasting lists what stays on a Node for as long as it holds a lease.
func lasting() []string { return []string{Subnets, Host, Backend, BackendData, Network} }

// Parse reads what a Node publishes. A Node without our annotations publishes nothing, which is no Problem, and one that
// has just leased a subnet, nothing yet.
func Parse(m *metav1.ObjectMeta) ([]subnet.Lease, []subnet.Problem) {
	r := subnet.Record{
		Subnets: m.Annotations[Subnets],
		Host:    m.Annotations[Host],
		Backend: m.Annotations[Backend],
		Data:    m.Annotations[BackendData],
	}
	if r == (subnet.Record{}) {
		return nil, nil
	}
	if _, err := r.ParseSubnets(); err == nil && r == (subnet.Record{Subnets: r.Subnets}) {
		return nil, nil
	}
	r.Network, r.Sources = m.Annotations[Network], m.Annotations[Sources]
	// The API server writes times in UTC, but they are decoded as local ones.
	return r.Leases(m.Name, m.CreationTimestamp.UTC(), "annotation "+prefix)
}

// Format is the reverse of Parse: the annotations with which a Node publishes its leases. Sources are an operator's and
// not among them.
func Format(leases []subnet.Lease) map[string]string {
	r := subnet.RecordOf(leases)
	annotations := map[string]string{
		Subnets: r.Subnets, Host: r.Host, Backend: r.Backend, BackendData: r.Data, Network: r.Network,
	}
	for key, value := range annotations {
		if value == "" {
			delete(annotations, key)
		}
	}
	return annotations
}

// ours is the part of a Node's annotations that belongs to tweed.
func ours(annotations map[string]string) map[string]string {
	out := map[string]string{}
	for key, value := range annotations {
		if strings.HasPrefix(key, prefix) {
			out[key] = value
		}
	}
	return out
}
