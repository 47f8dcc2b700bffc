package kube

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

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
	given       []netip.Prefix // spec.podCIDRs
	network     condition      // NetworkUnavailable
	startup     []int          // places of the startup taint in spec.taints
}

func versionOf(n *corev1.Node) version {
	given, _ := podCIDRs(n)
	return version{n.UID, n.ResourceVersion, ours(n.Annotations), given, networkOf(n), startupTaints(n)}
}

// same reports whether nothing that is ours to write, or follow, differs.
func (v version) same(w version) bool {
	return v.uid == w.uid && maps.Equal(v.annotations, w.annotations) && slices.Equal(v.given, w.given) &&
		v.network.says(w.network) && slices.Equal(v.startup, w.startup)
}

// An object is what this node's Node says in one version of it.
type object struct {
	version
	since    time.Time
	addrs    []netip.Addr
	recorded []netip.Prefix // by the annotation
	override netip.Addr
	// badCIDRs, badRecord and badOverride say why one of these cannot be read.
	badCIDRs, badRecord, badOverride error
}

func objectOf(n *corev1.Node) *object {
	o := &object{version: versionOf(n), since: n.CreationTimestamp.UTC(), addrs: internalIPs(n)}
	_, o.badCIDRs = podCIDRs(n)
	if text := n.Annotations[Subnets]; text != "" {
		if o.recorded, o.badRecord = (subnet.Record{Subnets: text}).ParseSubnets(); o.badRecord != nil {
			o.badRecord = fmt.Errorf("annotation %s of node %s: %w; correct or remove it", Subnets, n.Name, o.badRecord)
		}
	}
	if text := n.Annotations[HostOverride]; text != "" {
		o.override, o.badOverride = parseOverride(text)
	}
	return o
}

// parseOverride reads an address that packets for a node can be sent to.
func parseOverride(text string) (netip.Addr, error) {
	a, err := netip.ParseAddr(text)
	switch {
	case err != nil || a.Is4In6() || a.Zone() != "":
		return netip.Addr{}, fmt.Errorf("%s is not an IP address such as 203.0.113.7", subnet.Quote(text))
	case !a.IsGlobalUnicast():
		return netip.Addr{}, fmt.Errorf("%s is not an address that other nodes can send to", a)
	}
	return a, nil
}

// own holds this node's own Node object, and where its subnets come from.
type own struct {
	name string

	mu     sync.Mutex
	object *object // nil where none is known
	err    error   // why none is known
	origin subnet.Origin
	why    error // why the node has no subnet, or not one of every family
	// override is the last one that could be read, for as long as there is one.
	override netip.Addr
}

// get says what follows from the Node.
func (o *own) get() (subnet.Node, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.node()
}

func (o *own) node() (subnet.Node, error) {
	if o.object == nil {
		return subnet.Node{Name: o.name}, o.err
	}
	n := subnet.Node{Name: o.name, Addrs: o.object.addrs, Since: o.object.since, HostOverride: o.override}
	problem := func(kind, format string, args ...any) {
		n.Problems = append(n.Problems, subnet.Problem{Node: o.name, Kind: kind, Text: fmt.Sprintf(format, args...)})
	}
	if o.object.badOverride != nil {
		instead := "the address of its uplink"
		if o.override.IsValid() {
			instead = o.override.String()
		}
		problem(subnet.KindAnnotation, "annotation %s: %v; until it is corrected or removed, %s is published",
			HostOverride, o.object.badOverride, instead)
	}
	switch o.origin {
	case subnet.OriginNodeSpec:
		if o.object.badCIDRs != nil {
			return subnet.Node{Name: o.name}, o.object.badCIDRs
		}
		n.Subnets = o.object.given
	case subnet.OriginLease:
		if o.object.badRecord != nil {
			return subnet.Node{Name: o.name}, o.object.badRecord
		}
		n.Subnets, n.Leased = o.object.recorded, true
	}
	if len(n.Subnets) == 0 {
		return subnet.Node{Name: o.name}, cmp.Or(o.why, fmt.Errorf("node %s has no subnet yet", o.name))
	}
	if n.Leased && o.why != nil {
		problem(subnet.KindLease, "%v", o.why)
	}
	if given := o.object.given; n.Leased && len(given) > 0 && !sameSet(given, n.Subnets) {
		problem(subnet.KindLease, "spec.podCIDRs of node %s is %s, and the subnet that it has leased is %s, which stays: its "+
			"pods have addresses of it; run kube-controller-manager with --allocate-node-cidrs=false, or drain the node, "+
			"delete its Node object and let the kubelet register it again",
			o.name, subnet.FormatSubnets(given), o.object.annotations[Subnets])
	}
	return n, nil
}

// current returns what is known to be written to the Node, or an error where no Node is known.
func (o *own) current() (version, error) {
	obj, err := o.known()
	if err != nil {
		return version{}, err
	}
	return obj.version, nil
}

// known returns the Node as it is known, or an error where none is.
func (o *own) known() (object, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.object == nil {
		return object{}, o.err
	}
	return *o.object, nil
}

// wrote records the answer to a write that was made when have was known, unless the watch has told of a newer version
// since. What follows from the object's spec and status is left to the watch, so that a change in there still rings.
func (o *own) wrote(have, v version) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.object != nil && o.object.uid == have.uid && o.object.resource == have.resource {
		changed := *o.object
		changed.version = v
		o.object = &changed
	}
}

// set records the Node, or why there is none, and reports whether what we read of it, or write to it, changed.
func (o *own) set(obj *object, err error) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.change(func() {
		o.object, o.err = obj, err
		if obj != nil && obj.badOverride == nil {
			o.override = obj.override
		}
	})
}

// decide records where the node's subnets come from, and why it has none, and reports whether that changes anything.
func (o *own) decide(origin subnet.Origin, why error) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.change(func() { o.origin, o.why = origin, why })
}

// decided returns where the subnets come from, OriginAuto as long as that is open.
func (o *own) decided() subnet.Origin {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.origin
}

// change makes a change and reports whether anything follows from it.
func (o *own) change(f func()) bool {
	var v, w version
	if o.object != nil {
		v = o.object.version
	}
	node, err := o.node()
	f()
	if o.object != nil {
		w = o.object.version
	}
	then, thenErr := o.node()
	return !v.same(w) || !equalNodes(node, then) || !equalErrors(err, thenErr)
}

func equalNodes(a, b subnet.Node) bool {
	return a.Name == b.Name && slices.Equal(a.Subnets, b.Subnets) && slices.Equal(a.Addrs, b.Addrs) &&
		a.HostOverride == b.HostOverride && a.Since.Equal(b.Since) && a.Leased == b.Leased &&
		slices.Equal(a.Problems, b.Problems)
}

func equalErrors(a, b error) bool {
	if a == nil || b == nil {
		return a == nil && b == nil
	}
	return a.Error() == b.Error()
}

func podCIDRTexts(n *corev1.Node) (field string, texts []string) {
	if len(n.Spec.PodCIDRs) == 0 && n.Spec.PodCIDR != "" {
		return "spec.podCIDR", []string{n.Spec.PodCIDR}
	}
	return "spec.podCIDRs", n.Spec.PodCIDRs
}

// podCIDRs reads what the cluster has given the node; it may be nothing.
func podCIDRs(n *corev1.Node) ([]netip.Prefix, error) {
	field, texts := podCIDRTexts(n)
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

func sameSet(a, b []netip.Prefix) bool {
	return len(a) == len(b) && !slices.ContainsFunc(a, func(p netip.Prefix) bool { return !slices.Contains(b, p) })
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
	// ring is called after each change of what follows from the Node.
	ring func()
	// complete is called after each list.
	complete func()
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
	s.put(objectOf(n), nil)
	return nil
}

func (s ownStore) Delete(any) error {
	s.put(nil, s.missing)
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

func (s ownStore) put(obj *object, err error) {
	if s.set(obj, err) {
		s.ring()
	}
}

func (s ownStore) Resync() error { return nil }
