package subnet

import (
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Whatever a node publishes, it is leases or Problems. Each Problem is short, fit to print, and names a field and what
// stands there; and what is accepted is what would be published again.
func FuzzRecord(f *testing.F) {
	f.Add("10.244.7.0/24,fd00:10:244:7::/64", "192.0.2.17,2001:db8::17", "vxlan", `{"vni": 1}`,
		"10.244.0.0/16,fd00:10:244::/48", "198.51.100.7")
	f.Add("10.244.7.1/24", "fe80::1%eth0", "\xff", `{"mac":"02:zz"`, "10.244.0.0/16,10.0.0.0/8", ",")
	f.Add("", "", "", " ", "", "")
	const where = "annotation tweed.dev/"
	f.Fuzz(func(t *testing.T, subnets, host, backend, data, network, sources string) {
		r := Record{Subnets: subnets, Host: host, Backend: backend, Data: data, Network: network, Sources: sources}
		leases, problems := r.Leases("node-7", time.Unix(1, 0), where)
		checkBlame(t, r, where, problems)
		bad := slices.ContainsFunc(problems, func(p Problem) bool {
			return !strings.HasPrefix(p.Text, where+FieldNetwork) && !strings.HasPrefix(p.Text, where+FieldSources)
		})
		if bad != (len(leases) == 0) {
			t.Fatalf("leases %v with problems %v", leases, problems)
		}
		if bad {
			return
		}
		for i := range leases {
			leases[i].Sources = nil
		}
		again, problems := RecordOf(leases).Leases("node-7", time.Unix(1, 0), "")
		slices.SortFunc(leases, func(a, b Lease) int { return a.Subnet.Addr().BitLen() - b.Subnet.Addr().BitLen() })
		if problems != nil || !slices.EqualFunc(leases, again, Lease.Equal) {
			t.Errorf("%v became %v, %v", leases, again, problems)
		}
	})
}

// checkBlame holds each Problem to the field that it names: one for each, with a piece of its value in quotes.
func checkBlame(t *testing.T, r Record, where string, problems []Problem) {
	t.Helper()
	values := map[string]string{FieldSubnets: r.Subnets, FieldHost: r.Host, FieldBackend: r.Backend, FieldData: r.Data,
		FieldNetwork: r.Network, FieldSources: r.Sources}
	for _, p := range problems {
		field, what, _ := strings.Cut(strings.TrimPrefix(p.Text, where), ": ")
		value, unnamed := values[field]
		delete(values, field)
		if !unnamed || p.Node != "node-7" || p.Kind != KindAnnotation {
			t.Fatalf("problem %+v names no field, or one twice", p)
		}
		if len(p.Text) > 400 || strings.ContainsFunc(p.Text, func(r rune) bool { return !strconv.IsPrint(r) }) {
			t.Fatalf("unfit to print, %d bytes: %q", len(p.Text), p.Text)
		}
		quoted, err := strconv.QuotedPrefix(what)
		if err != nil {
			if value != "" || !strings.HasPrefix(what, "missing; ") {
				t.Fatalf("%q is blamed for %q", p.Text, value)
			}
			continue
		}
		if piece, err := strconv.Unquote(quoted); err != nil || !strings.Contains(value, piece) {
			t.Fatalf("%q quotes %q, which is not in %q: %v", p.Text, piece, value, err)
		}
	}
}
