package kube_test

import (
	"net/netip"
	"testing"

	"tweed.dev/tweed/subnet/kube"
)

// Only what the node accepts has changed when its network has grown, and others wait to be told.
func TestGrownNetworkIsNotPublished(t *testing.T) {
	a := newAPIServer(t)
	populate(a)
	d := startDaemon(t, a, "n3")
	d.awaitSelf("")
	leases := mine("192.0.2.3")
	for _, network := range []string{"10.244.0.0/16", "10.240.0.0/12"} {
		for i := range leases {
			leases[i].Accepts = []netip.Prefix{netip.MustParsePrefix(network)}
		}
		before := len(a.patched())
		for range 2 {
			if err := d.Publish(t.Context(), leases); err != nil {
				t.Fatal(err)
			}
		}
		if got := a.annotations("n3")[kube.Network]; got != network {
			t.Errorf("the Node says %q, want %s", got, network)
		}
		if n := len(a.patched()) - before; n != 1 {
			t.Errorf("%d writes for %s", n, network)
		}
	}
	if err := d.Publish(t.Context(), nil); err != nil || a.annotations("n3")[kube.Network] != "" {
		t.Errorf("without a lease the Node says %q (%v)", a.annotations("n3")[kube.Network], err)
	}
}
