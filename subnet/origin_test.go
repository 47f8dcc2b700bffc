package subnet

import (
	"testing"
	"time"
)

func TestWhereSubnetsComeFrom(t *testing.T) {
	a, b := "10.244.1.0/24", "10.244.1.0/24 fd00::/64"
	for _, c := range []struct {
		name     string
		podCIDRs string
		recorded string
		any      bool
		oldest   time.Duration
		want     Origin
		again    time.Duration
	}{
		{"ours are there", a, "", true, time.Hour, OriginNodeSpec, 0},
		{"ours are the first of all", a, "", false, 0, OriginNodeSpec, 0},
		{"others have some, ours will come", "", "", true, time.Hour, OriginAuto, 0},
		{"others have some in a new cluster", "", "", true, time.Second, OriginAuto, 0},
		{"nobody has any in an old cluster", "", "", false, time.Hour, OriginLease, 0},
		{"nobody has any yet", "", "", false, 20 * time.Second, OriginAuto, 41 * time.Second},
		{"a minute, as far as whole seconds can tell", "", "", false, time.Minute, OriginAuto, time.Second},
		{"more than a minute", "", "", false, 61 * time.Second, OriginLease, 0},
		{"a Node from the future", "", "", false, -time.Hour, OriginAuto, 61 * time.Second},
		{"recorded from podCIDRs", b, "fd00::/64 10.244.1.0/24", true, time.Hour, OriginNodeSpec, 0},
		{"leased before", "", a, false, time.Second, OriginLease, 0},
		{"leased before podCIDRs came", "10.9.1.0/24", a, true, time.Hour, OriginLease, 0},
		{"leased before podCIDRs came with one more", b, a, true, time.Hour, OriginLease, 0},
		{"leased more than podCIDRs have", a, b, true, time.Hour, OriginLease, 0},
	} {
		e := Evidence{prefixes(c.podCIDRs), prefixes(c.recorded), c.any, c.oldest}
		if got, again := e.Decide(); got != c.want || again != c.again {
			t.Errorf("%s: %s after %v, want %s after %v", c.name, got, again, c.want, c.again)
		}
	}
}
