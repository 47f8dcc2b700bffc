package local

import (
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"tweed.dev/tweed/subnet"
)

func TestNodeThatNeverAcceptsDelaysOthersOnly(t *testing.T) {
	n, err := subnet.NewNetwork(subnet.Range{Prefix: netip.MustParsePrefix("10.244.0.0/16")})
	if err != nil {
		t.Fatal(err)
	}
	d, err := New(t.TempDir(), "n1", n, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	stubborn := subnet.Listing{{Node: "n2", Subnets: "192.168.2.0/24", Network: "192.168.0.0/16"}}
	for _, c := range []struct {
		waited time.Duration
		taken  bool
	}{{0, false}, {subnet.AcceptPatience - time.Second, false}, {subnet.AcceptPatience, true}} {
		d.waited = time.Now().Add(-c.waited)
		if _, ok, err := d.pick(n[0], nil, stubborn); ok != c.taken || isLater(err) == c.taken {
			t.Errorf("after %v: %v, %v", c.waited, ok, err)
		}
	}
	d.Grow(n)
	if _, ok, err := d.pick(n[0], nil, stubborn); ok || !isLater(err) {
		t.Errorf("after the network has grown once more: %v, %v", ok, err)
	}
}
