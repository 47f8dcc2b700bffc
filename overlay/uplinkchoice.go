package overlay

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
)

// UplinkChoice says how the uplink is to be found, and what is published of it. At most one of Iface, Match and Reach
// is set. Without them it is the interface that holds an address of the node, or else the default route's.
type UplinkChoice struct {
	// Iface is an interface's name.
	Iface string
	// Match finds the first interface whose name, or one of whose addresses, it matches.
	Match *regexp.Regexp
	// Reach is an address: the uplink is what packets to it leave by.
	Reach netip.Addr
	// Public are published in place of the uplink's own addresses of their family, at most one a family.
	Public []netip.Addr
}

// UplinkFlags is an UplinkChoice as a person types it. An empty flag is not given.
type UplinkFlags struct {
	Iface    string // --iface: a name
	Match    string // --iface-regex: a regular expression
	Reach    string // --iface-can-reach: an address
	PublicIP string // --public-ip: one address, or one of each family with a comma in between
}

// Parse reads the flags. The error names the flag at fault and its value.
func (f UplinkFlags) Parse() (c UplinkChoice, err error) {
	var given []string
	for _, flag := range []struct{ name, value string }{
		{"--iface", f.Iface}, {"--iface-regex", f.Match}, {"--iface-can-reach", f.Reach},
	} {
		if flag.value != "" {
			given = append(given, fmt.Sprintf("%s %q", flag.name, flag.value))
		}
	}
	if len(given) > 1 {
		return c, fmt.Errorf("%s each choose the uplink: give one of them", strings.Join(given, " and "))
	}
	c.Iface = f.Iface
	if f.Match != "" {
		if c.Match, err = regexp.Compile(f.Match); err != nil {
			return c, fmt.Errorf("--iface-regex %q: %w", f.Match, err)
		}
	}
	if f.Reach != "" {
		if c.Reach, err = parseUnicast(f.Reach); err != nil {
			return c, fmt.Errorf("--iface-can-reach %q: %w", f.Reach, err)
		}
	}
	if f.PublicIP != "" {
		if c.Public, err = parsePublic(f.PublicIP); err != nil {
			return c, fmt.Errorf("--public-ip %q: %w", f.PublicIP, err)
		}
	}
	return c, nil
}

func parsePublic(text string) (public []netip.Addr, err error) {
	for one := range strings.SplitSeq(text, ",") {
		a, err := parseUnicast(one)
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(public, func(b netip.Addr) bool { return family(a) == family(b) }) {
			return nil, fmt.Errorf("these are two %s addresses; at most one of each family is possible", familyName(family(a)))
		}
		public = append(public, a)
	}
	return public, nil
}

// parseUnicast reads an address that other hosts can be sent to by.
func parseUnicast(text string) (netip.Addr, error) {
	a, err := netip.ParseAddr(text)
	switch {
	case err != nil || a.Is4In6() || a.Zone() != "":
		return a, errors.New("want an IP address such as 192.0.2.13 or 2001:db8::13")
	case !a.IsGlobalUnicast():
		return a, fmt.Errorf("%s is an address that other hosts cannot send to (unspecified, loopback, link-local, "+
			"multicast or broadcast)", a)
	}
	return a, nil
}

// inPlace returns addrs with others in the places of those of the same family, or at the end.
func inPlace(addrs, others []netip.Addr) []netip.Addr {
	all := slices.Clone(addrs)
	for _, o := range others {
		i := slices.IndexFunc(all, func(a netip.Addr) bool { return family(a) == family(o) })
		if i < 0 {
			all = append(all, o)
		} else {
			all[i] = o
		}
	}
	return all
}
