package kube

import (
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Whatever stands in this node's own Node, what is read of it can be used, and what cannot be read is said in few
// words.
func FuzzOwnNode(f *testing.F) {
	f.Add("10.244.7.0/24", "fd00:10:244:7::/64", "10.244.7.0/24,fd00:10:244:7::/64", "203.0.113.7", "192.0.2.17")
	f.Add("10.244.7.1/24", "10.244.8.0/24", "pods", "fe80::1%eth0", "node-7")
	f.Add("", "", "", "::ffff:192.0.2.1", "")
	f.Fuzz(func(t *testing.T, cidr, second, recorded, override, addr string) {
		n := &corev1.Node{
			ObjectMeta: metav1.ObjectMeta{Name: "node-7", Annotations: map[string]string{
				Subnets: recorded, HostOverride: override,
			}},
			Spec: corev1.NodeSpec{PodCIDRs: []string{cidr, second}},
			Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
				{Type: corev1.NodeInternalIP, Address: addr},
			}},
		}
		given, badCIDRs := podCIDRs(n)
		o := objectOf(n)
		for text, err := range map[string]error{
			cidr + second: badCIDRs, recorded: o.badRecord, override: o.badOverride,
		} {
			if err == nil {
				continue
			}
			if s := err.Error(); len(s) > 500 || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' }) {
				t.Errorf("%q is refused, unfit to print: %q", text, s)
			}
		}
		if (badCIDRs == nil) != (len(given) == 2) {
			t.Errorf("podCIDRs %q and %q are read as %v, and wrong is %v", cidr, second, given, badCIDRs)
		}
		for _, p := range slices.Concat(given, o.recorded) {
			if p != p.Masked() || p.Addr().Is4In6() {
				t.Errorf("subnet %s", p)
			}
		}
		if o.override.IsValid() && (!o.override.IsGlobalUnicast() || o.override.Zone() != "" || o.override.Is4In6()) {
			t.Errorf("packets are to go to %s", o.override)
		}
		for _, a := range o.addrs {
			if a.Zone() != "" || a.Is4In6() {
				t.Errorf("address %s", a)
			}
		}
	})
}
