package subnet

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// FieldClaim names the claim among what a node says of itself.
const FieldClaim = "claim"

// A Claim says which subnets a node is about to lease, of all families at once, and which process is at it. It stands
// only until the lease is taken or given up. Peers route nothing for it.
type Claim struct {
	Subnets []netip.Prefix // at most one a family
	Nonce   string         // drawn anew by each process
}

// In bytes; see the limits of Record.
const (
	maxNonce = 63
	maxClaim = maxSubnets + 1 + maxNonce
)

// ParseClaim reads what String makes: 10.244.3.0/24,fd00::/64 5f0c9a.
func ParseClaim(s string) (Claim, error) {
	if err := checkLength(s, maxClaim); err != nil {
		return Claim{}, err
	}
	text, nonce, ok := strings.Cut(s, " ")
	if !ok || text == "" {
		return Claim{}, fmt.Errorf("%s is not a claim such as 10.244.3.0/24 5f0c9a", Quote(s))
	}
	subnets, err := parseSubnets(text)
	if err != nil {
		return Claim{}, err
	}
	return Claim{subnets, nonce}, checkNonce(nonce)
}

// String is the claim as a node publishes it.
func (c Claim) String() string { return join(c.Subnets) + " " + c.Nonce }

func checkNonce(s string) error {
	if s == "" {
		return errors.New("the nonce is missing")
	}
	if len(s) > maxNonce || strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789") != "" {
		return fmt.Errorf("%s is not a nonce: at most %d lower-case letters and digits are possible", Quote(s), maxNonce)
	}
	return nil
}

// mentioned lists every prefix in a list of them, readable or not as a whole. What another node seems to have is not
// taken from it because a word beside it cannot be read.
func mentioned(s string) (out []netip.Prefix) {
	for word := range strings.FieldsFuncSeq(s, func(r rune) bool { return r == ',' || r == ' ' }) {
		if p, err := netip.ParsePrefix(word); err == nil && !p.Addr().Is4In6() {
			out = append(out, p.Masked())
		}
	}
	return out
}
