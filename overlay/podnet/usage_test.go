package podnet

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestUsageIsWrongAboutWhatPodsCanHave(t *testing.T) {
	for _, c := range []struct {
		subnet string
		names  []string
		used   int
		free   int
	}{
		{"10.244.1.0/24", nil, 0, 253},
		{"10.244.1.0/24", []string{"10.244.1.2", "10.244.1.254", "10.244.2.2", "fd00::3", ".new-1", "note"}, 2, 251},
		{"10.244.1.0/24", []string{"10.244.1.0", "10.244.1.1", "10.244.1.255"}, 0, 253}, // nobody hands these out
		{"10.244.1.4/30", []string{"10.244.1.6"}, 1, 0},
		{"fd00:1::/64", []string{"fd00:1::3", "fd00:1::ffff", "fd00:1::1:0", "fd00:1::2"}, 2, 1<<16 - 5},
		{"fd00:1::/126", nil, 0, 1},
	} {
		run := t.TempDir()
		if c.names != nil {
			if err := os.Mkdir(filepath.Join(run, "addrs"), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		for _, name := range c.names {
			if err := os.WriteFile(filepath.Join(run, "addrs", name), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		subnet := netip.MustParsePrefix(c.subnet)
		got, err := UsageOf(run, []netip.Prefix{subnet})
		if want := []Usage{{subnet, c.used, c.free}}; err != nil || !slices.Equal(got, want) {
			t.Errorf("%v: got %+v, %v; want %+v", c.names, got, err, want)
		}
	}
}

// TestUsageDiffersFromWhatIsHandedOut fills a subnet, and reads more names than fit in at a time.
func TestUsageDiffersFromWhatIsHandedOut(t *testing.T) {
	s := &store{runDir: t.TempDir(), alive: func(string, int) (bool, error) { return true, nil }}
	subnet := netip.MustParsePrefix("10.244.0.0/22")
	for i := range podCount(subnet) {
		veth := vethName("container", string(rune('a'+i)))
		h, err := s.take(record{Container: "container", Interface: string(rune('a' + i)), Veth: veth}, []netip.Prefix{subnet})
		if err != nil {
			t.Fatalf("pod %d: %v", i, err)
		}
		h.release()
	}
	got, err := UsageOf(s.runDir, []netip.Prefix{subnet})
	if want := []Usage{{subnet, podCount(subnet), 0}}; err != nil || !slices.Equal(got, want) {
		t.Errorf("got %+v, %v; want %+v", got, err, want)
	}
}
