package subnet

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// A Record is what one node publishes of itself, as text: what its Node's annotations or its lease file say. An empty
// field is a missing one.
type Record struct {
	Subnets string // 10.244.3.0/24,fd00:10:244:3::/64: at most one a family
	Host    string // 192.0.2.13,2001:db8::13: the tunnel endpoint, then, if any, one address of the other family
	Backend string // vxlan or host-gw
	Data    string // a JSON object that the backend understands
	Network string // 10.244.0.0/16,fd00:10:244::/48: where the node accepts others' leases, at most one a family
	Sources string // 192.0.2.99,...: further addresses that encapsulated packets come from; set by an operator
}

// The names of a Record's fields.
const (
	FieldSubnets = "subnets"
	FieldHost    = "host"
	FieldBackend = "backend"
	FieldData    = "backend-data"
	FieldNetwork = "network"
	FieldSources = "sources"
)

// Longer values are refused unread, in bytes. Each is several times of what a sane value needs.
const (
	maxSubnets = 128
	maxHost    = 128
	maxBackend = 63
	maxData    = 4096
	maxNetwork = 128
	maxSources = 1024
)

// RecordOf is what a node that holds leases publishes. Sources stay empty, since nodes do not publish them. The leases
// are one node's: those of them that differ in more than their subnet are not one record.
func RecordOf(leases []Lease) Record {
	if len(leases) == 0 {
		return Record{}
	}
	l := leases[0]
	r := Record{Backend: l.Backend, Data: string(l.Data), Network: join(l.Accepts)}
	var subnets []netip.Prefix
	for _, l := range leases {
		subnets = append(subnets, l.Subnet)
	}
	slices.SortFunc(subnets, func(a, b netip.Prefix) int { return cmp.Compare(a.Addr().BitLen(), b.Addr().BitLen()) })
	r.Subnets = join(subnets)
	if !l.Host.IsValid() {
		return r
	}
	hosts := []netip.Addr{l.Host}
	for _, a := range l.NodeAddrs {
		if a != l.Host {
			hosts = append(hosts, a)
		}
	}
	r.Host = join(hosts)
	return r
}

// Leases reads what node published, where says in: "annotation tweed.dev/". Each field that cannot be read is one
// Problem. With one of them bad there are no leases, except for Network and Sources, without which they stand.
func (r Record) Leases(node string, since time.Time, where string) ([]Lease, []Problem) {
	var problems []Problem
	blame := func(field, consequence string, err error) {
		if err != nil {
			text := fmt.Sprintf("%s%s: %v; %s", where, field, err, consequence)
			problems = append(problems, Problem{Node: node, Kind: KindAnnotation, Text: text})
		}
	}
	unreachable := fmt.Sprintf("pods on %s cannot be reached until tweed on %s writes it again", node, node)
	subnets, err := parseSubnets(r.Subnets)
	blame(FieldSubnets, unreachable, err)
	hosts, err := parseHost(r.Host)
	blame(FieldHost, unreachable, err)
	blame(FieldBackend, unreachable, checkBackend(r.Backend))
	data, err := parseData(r.Data)
	blame(FieldData, unreachable, err)
	broken := len(problems) > 0
	accepts, err := parseNetwork(r.Network)
	blame(FieldNetwork, fmt.Sprintf("it counts as missing until tweed on %s writes it again", node), err)
	sources, err := parseSources(r.Sources)
	blame(FieldSources, "packets from these addresses are not accepted until an operator corrects it", err)
	if broken {
		return nil, problems
	}
	var leases []Lease
	for _, s := range subnets {
		leases = append(leases, Lease{
			Node: node, Subnet: s, Host: hosts[0], NodeAddrs: hosts, Sources: sources,
			Accepts: accepts, Backend: r.Backend, Data: data, Since: since,
		})
	}
	return leases, problems
}

// FormatSubnets writes the field Subnets.
func FormatSubnets(subnets []netip.Prefix) string { return join(subnets) }

// ParseSubnets reads the field Subnets.
func (r Record) ParseSubnets() ([]netip.Prefix, error) { return parseSubnets(r.Subnets) }

// parseNetwork reads the field Network. Those of older daemons lack it.
func parseNetwork(s string) ([]netip.Prefix, error) {
	if s == "" {
		return nil, nil
	}
	return parsePrefixes(s, "pod network", "10.244.0.0/16", maxNetwork)
}

func parseSubnets(s string) ([]netip.Prefix, error) {
	return parsePrefixes(s, "subnet", "10.244.3.0/24", maxSubnets)
}

// parsePrefixes reads a list of what is called name, such as example: at most one of an address family.
func parsePrefixes(s, name, example string, limit int) ([]netip.Prefix, error) {
	if err := checkLength(s, limit); err != nil {
		return nil, err
	}
	var prefixes []netip.Prefix
	for text := range strings.SplitSeq(s, ",") {
		p, err := netip.ParsePrefix(text)
		switch {
		case err != nil || p.Addr().Is4In6():
			return nil, fmt.Errorf("%s is not a %s such as %s", Quote(text), name, example)
		case p.Masked().String() != text:
			return nil, fmt.Errorf("%s is not a %s in its usual form; did you mean %s", Quote(text), name, p.Masked())
		}
		if slices.ContainsFunc(prefixes, func(q netip.Prefix) bool { return sameFamily(p.Addr(), q.Addr()) }) {
			return nil, fmt.Errorf("%s has two %ss of one address family; at most one is possible", Quote(s), name)
		}
		prefixes = append(prefixes, p)
	}
	return prefixes, nil
}

func parseHost(s string) ([]netip.Addr, error) {
	addrs, err := parseAddrs(s, maxHost)
	if err != nil {
		return nil, err
	}
	if len(addrs) > 2 || len(addrs) == 2 && sameFamily(addrs[0], addrs[1]) {
		return nil, fmt.Errorf("%s has two addresses of one family; at most one is possible", Quote(s))
	}
	return addrs, nil
}

func parseSources(s string) ([]netip.Addr, error) {
	if s == "" {
		return nil, nil
	}
	addrs, err := parseAddrs(s, maxSources)
	if err != nil {
		return nil, err
	}
	for _, a := range addrs {
		if !a.IsGlobalUnicast() {
			return nil, fmt.Errorf("%q is not an address that packets between nodes can come from", a)
		}
	}
	return addrs, nil
}

func parseAddrs(s string, limit int) ([]netip.Addr, error) {
	if err := checkLength(s, limit); err != nil {
		return nil, err
	}
	var addrs []netip.Addr
	for text := range strings.SplitSeq(s, ",") {
		a, err := netip.ParseAddr(text)
		switch {
		case err != nil || a.Is4In6() || a.Zone() != "":
			return nil, fmt.Errorf("%s is not an IP address such as 192.0.2.13", Quote(text))
		case a.String() != text:
			return nil, fmt.Errorf("%s is not an IP address in its usual form; did you mean %s", Quote(text), a)
		}
		addrs = append(addrs, a)
	}
	return addrs, nil
}

func checkBackend(s string) error {
	if err := checkLength(s, maxBackend); err != nil {
		return err
	}
	if strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		return fmt.Errorf("%s is not the name of a backend such as vxlan", Quote(s))
	}
	return nil
}

func parseData(s string) (json.RawMessage, error) {
	if err := checkLength(s, maxData); err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := json.Compact(&b, []byte(s)); err != nil || b.Bytes()[0] != '{' {
		return nil, fmt.Errorf("%s is not a JSON object", Quote(s))
	}
	return b.Bytes(), nil
}

func checkLength(s string, limit int) error {
	switch {
	case s == "":
		return errors.New("missing")
	case len(s) > limit:
		return fmt.Errorf("%s has %d bytes; at most %d are possible", Quote(s), len(s), limit)
	}
	return nil
}

// Quote puts a stranger's text into quotes, with its beginning only where it is long, for use in one line.
func Quote(s string) string {
	const limit = 40
	if len(s) <= limit {
		return fmt.Sprintf("%q", s)
	}
	cut := limit
	for cut > limit-utf8.UTFMax && !utf8.RuneStart(s[cut]) {
		cut--
	}
	return fmt.Sprintf("%q...", s[:cut])
}

func sameFamily(a, b netip.Addr) bool { return a.BitLen() == b.BitLen() }

func join[T fmt.Stringer](values []T) string {
	texts := make([]string, len(values))
	for i, v := range values {
		texts[i] = v.String()
	}
	return strings.Join(texts, ",")
}
