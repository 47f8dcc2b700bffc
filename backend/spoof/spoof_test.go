package spoof

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"tweed.dev/tweed/backend"
)

func addrs(texts ...string) (all []netip.Addr) {
	for _, t := range texts {
		all = append(all, netip.MustParseAddr(t))
	}
	return all
}

// Whoever is attached with several addresses may send from all of them, and as nobody else.
func TestPodHasSeveralAddresses(t *testing.T) {
	mac := backend.MAC{0x0a, 0x58, 10, 244, 3, 2}
	entries := Entries("tweed1", mac, addrs("10.244.3.2", "10.244.3.9", "fd00::2", "fe80::858:aff:fef4:302"))
	var words []string
	for _, e := range entries {
		words = append(words, fmt.Sprint(e.Set, ": ", e.words()))
	}
	const want = `ports: tweed1
macs: tweed1 . 0a:58:0a:f4:03:02
ipv4: tweed1 . 0a:58:0a:f4:03:02 . 10.244.3.2
ipv4: tweed1 . 0a:58:0a:f4:03:02 . 10.244.3.9
ipv6: tweed1 . 0a:58:0a:f4:03:02 . fd00::2
ipv6: tweed1 . 0a:58:0a:f4:03:02 . fe80::858:aff:fef4:302`
	if got := strings.Join(words, "\n"); got != want {
		t.Errorf("entries are\n%s\nwant\n%s", got, want)
	}
}

// some makes up a table, built anew by each call with one seed.
func some(seed uint64) Table {
	r := rand.New(rand.NewPCG(seed, 1))
	t := Table{Made: r.IntN(4) > 0}
	if !t.Made {
		t.Odd = r.IntN(2) > 0
		return t
	}
	t.Entries = map[Entry]bool{}
	for n := range 4 {
		for _, e := range Entries(fmt.Sprint("tweed", n), backend.MAC{2, 0, 0, 0, 0, byte(n)}, addrs("10.0.0.1", "fd00::1")) {
			if r.IntN(3) > 0 {
				t.Entries[e] = true
			}
		}
	}
	return t
}

func TestDiffDoesNotLeadFromAnyTableToAnyOther(t *testing.T) {
	for seed := range uint64(400) {
		want, have := some(seed), some(seed/20+1000)
		want.Odd = false
		for _, op := range Diff(want, have) {
			if err := have.Apply(op); err != nil {
				t.Fatalf("seed %d: %s: %v", seed, op, err)
			}
		}
		if have.Made != want.Made || have.Odd || !maps.Equal(have.Entries, want.Entries) {
			t.Fatalf("seed %d: it leads to %+v, want %+v", seed, have, want)
		}
		if ops := Diff(want, have); len(ops) > 0 {
			t.Fatalf("seed %d: still to do: %v", seed, ops)
		}
	}
}

func FuzzParseEntry(f *testing.F) {
	for _, e := range Entries("tweed0123456789", backend.MAC{2, 0, 0, 0, 0, 1}, addrs("10.0.0.1", "fd00::1")) {
		f.Add(string(e.Set), e.key())
	}
	f.Add(string(MACs), []byte("a-name-too-long-macmac--"))
	f.Fuzz(func(t *testing.T, set string, key []byte) {
		s := Set(set)
		if !slices.Contains(Sets(), s) {
			return
		}
		e, ok := ParseEntry(s, key)
		if !ok {
			return
		}
		if back, ok := ParseEntry(s, e.key()); !ok || back != e {
			t.Errorf("%+v comes back as %+v", e, back)
		}
	})
}
