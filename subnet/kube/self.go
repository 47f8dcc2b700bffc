package kube

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"

	"tweed.dev/tweed/subnet"
)

// A version is one state of this node's Node object, as far as writing to it needs to know.
type version struct {
	uid         types.UID
	resource    string // resourceVersion
	annotations map[string]string
	network     condition // NetworkUnavailable
	startup     []int     // places of the startup taint in spec.taints
}

func versionOf(n *corev1.Node) version {
	return version{n.UID, n.ResourceVersion, ours(n.Annotations), networkOf(n), startupTaints(n)}
}

// same reports whether nothing that is ours to write differs.
func (v version) same(w version) bool {
	return v.uid == w.uid && maps.Equal(v.annotations, w.annotations) && v.network.says(w.network) &&
		slices.Equal(v.startup, w.startup)
}

// own holds this node's own Node object.
type own struct {
	mu      sync.Mutex
	node    subnet.Node
	err     error // why node is not known
	version version
}

func (o *own) get() (subnet.Node, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.node, o.err
}

// current returns what is known to be written to the Node, or an error where no Node is known.
func (o *own) current() (version, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.version.uid == "" {
		return version{}, o.err
	}
	return o.version, nil
}

// wrote records the answer to a write that was made when have was known, unless the watch has told of a newer version
// since. What follows from the object's spec and status is left to the watch, so that a change in there still rings.
func (o *own) wrote(have, v version) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.version.uid == have.uid && o.version.resource == have.resource {
		o.version = v
	}
}

// set records the Node and reports whether what we read of it, or write to it, changed.
func (o *own) set(node subnet.Node, err error, v version) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	same := equalNodes(o.node, node) && equalErrors(o.err, err) && o.version.same(v)
	o.node, o.err, o.version = node, err, v
	return !same
}

func equalNodes(a, b subnet.Node) bool {
	return a.Name == b.Name && slices.Equal(a.Subnets, b.Subnets) && slices.Equal(a.Addrs, b.Addrs) &&
		a.Since.Equal(b.Since)
}

func equalErrors(a, b error) bool {
	if a == nil || b == nil {
		return a == nil && b == nil
	}
	return a.Error() == b.Error()
}

// readNode reads what a Node says about itself.
func readNode(n *corev1.Node) (subnet.Node, error) {
	subnets, err := podCIDRs(n)
	if err != nil {
		return subnet.Node{Name: n.Name}, err
	}
	return subnet.Node{Name: n.Name, Subnets: subnets, Addrs: internalIPs(n), Since: n.CreationTimestamp.UTC()}, nil
}

func podCIDRs(n *corev1.Node) ([]netip.Prefix, error) {
	field, texts := "spec.podCIDRs", n.Spec.PodCIDRs
	if len(texts) == 0 && n.Spec.PodCIDR != "" {
		field, texts = "spec.podCIDR", []string{n.Spec.PodCIDR}
	}
	if len(texts) == 0 {
		return nil, fmt.Errorf("spec.podCIDRs of node %s is empty; waiting for kube-controller-manager to fill it, "+
			"which it does when it runs with --allocate-node-cidrs=true and --cluster-cidr", n.Name)
	}
	var subnets []netip.Prefix
	for _, text := range texts {
		p, err := netip.ParsePrefix(text)
		if err != nil || p.Addr().Is4In6() || p != p.Masked() {
			return nil, fmt.Errorf("%s of node %s holds %s, which is not a subnet such as 10.244.3.0/24; "+
				"delete the Node object and let the kubelet register it again to get another one",
				field, n.Name, subnet.Quote(text))
		}
		if slices.ContainsFunc(subnets, func(q netip.Prefix) bool { return q.Addr().BitLen() == p.Addr().BitLen() }) {
			return nil, fmt.Errorf("%s of node %s holds two subnets of one address family, %s and one before it; "+
				"at most one a family is possible", field, n.Name, p)
		}
		subnets = append(subnets, p)
	}
	return subnets, nil
}

// internalIPs leaves out what is not an address: the node can still be reached by the others, or by an interface's.
func internalIPs(n *corev1.Node) []netip.Addr {
	var addrs []netip.Addr
	for _, a := range n.Status.Addresses {
		if ip, err := netip.ParseAddr(a.Address); err == nil && a.Type == corev1.NodeInternalIP && ip.Zone() == "" {
			addrs = append(addrs, ip.Unmap())
		}
	}
	return addrs
}

// An ownStore is where the reflector of this node's Node puts what it learns.
type ownStore struct {
	*own
	ring func()
	// complete is called after each list.
	complete func()
	name     string
	// missing says that there is no such Node.
	missing error
}

var _ cache.ReflectorStore = ownStore{}

func (s ownStore) Add(obj any) error { return s.Update(obj) }

func (s ownStore) Update(obj any) error {
	n, ok := obj.(*corev1.Node)
	if !ok {
		return fmt.Errorf("the API server sent a %T in place of a Node", obj)
	}
	node, err := readNode(n)
	s.put(node, err, versionOf(n))
	return nil
}

func (s ownStore) Delete(any) error {
	s.put(subnet.Node{Name: s.name}, s.missing, version{})
	return nil
}

func (s ownStore) Replace(objs []any, _ string) error {
	s.complete()
	switch len(objs) {
	case 0:
		return s.Delete(nil)
	case 1:
		return s.Update(objs[0])
	}
	return errors.New("the API server sent more than the one Node that it was asked for")
}

func (s ownStore) put(node subnet.Node, err error, v version) {
	if s.set(node, err, v) {
		s.ring()
	}
}

func (s ownStore) Resync() error { return nil }
