package subnet

import (
	"slices"
	"strconv"
	"strings"
	"testing"
)

func TestClaimThatCannotBeRead(t *testing.T) {
	for _, c := range []struct{ claim, want string }{
		{"", "missing"},
		{"10.244.3.0/24", `"10.244.3.0/24" is not a claim such as 10.244.3.0/24 5f0c9a`},
		{"10.244.3.0/24 ", "the nonce is missing"},
		{" 5f0c9a", `" 5f0c9a" is not a claim such as 10.244.3.0/24 5f0c9a`},
		{"10.244.3.0/24  5f0c9a", `" 5f0c9a" is not a nonce: at most 63 lower-case letters and digits are possible`},
		{"10.244.3.0/24 5F", `"5F" is not a nonce: at most 63 lower-case letters and digits are possible`},
		{"10.244.3.0/24 " + strings.Repeat("a", 64),
			`"` + strings.Repeat("a", 40) + `"... is not a nonce: at most 63 lower-case letters and digits are possible`},
		{"10.244.3.1/24 5f", `"10.244.3.1/24" is not a subnet in its usual form; did you mean 10.244.3.0/24`},
		{"10.244.3.0/24,10.244.4.0/24 5f",
			`"10.244.3.0/24,10.244.4.0/24" has two subnets of one address family; at most one is possible`},
		{"10.244.3.0/24 " + strings.Repeat("a", 200),
			`"10.244.3.0/24 ` + strings.Repeat("a", 26) + `"... has 214 bytes; at most 192 are possible`},
	} {
		if _, err := ParseClaim(c.claim); err == nil || err.Error() != c.want {
			t.Errorf("%q: %v\nwant %s", c.claim, err, c.want)
		}
	}
}

func FuzzParseClaim(f *testing.F) {
	f.Add("10.244.3.0/24,fd00::/64 5f0c9a")
	f.Add("fd00::/64 x")
	f.Add("10.244.3.0/24 ")
	f.Add("10.244.3.1/24,::ffff:1.2.3.4/96 -")
	f.Fuzz(func(t *testing.T, s string) {
		c, err := ParseClaim(s)
		if err != nil {
			if text := err.Error(); len(text) > 400 ||
				strings.ContainsFunc(text, func(r rune) bool { return !strconv.IsPrint(r) }) {
				t.Errorf("unfit to print: %q", text)
			}
			return
		}
		if c.String() != s {
			t.Errorf("%q is read as %q", s, c)
		}
		if got := mentioned(s); !slices.Equal(got, c.Subnets) {
			t.Errorf("%q mentions %v, and is read as %v", s, got, c.Subnets)
		}
	})
}

func TestPrefixesAmongWhatCannotBeRead(t *testing.T) {
	got := mentioned("10.244.3.7/24,garbage, 10.244.3.0/24,fd00::/64 nonce,10.0.0.0/33,::ffff:10.0.0.0/104")
	if want := prefixes("10.244.3.0/24 10.244.3.0/24 fd00::/64"); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}
