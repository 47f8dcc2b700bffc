package subnet

import (
	"cmp"
	"errors"
	"fmt"
	"iter"
	"math"
	"net/netip"
	"slices"
	"strconv"
)

// A Range is the part of a pod network that has one address family. Nodes hold subnets of it, all of one length.
// NewRange makes one that can be relied on.
type Range struct {
	// Prefix holds every pod's address, masked.
	Prefix netip.Prefix
	// Len is the prefix length of a node's subnet, in bits. 0 stands for DefaultLen.
	Len int
	// Min and Max are the first and the last subnet that may be leased. Invalid ones stand for the first and the last
	// of Prefix: no subnet is left out unasked.
	Min, Max netip.Prefix
	// Reserved lists prefixes inside Prefix that are never leased, nor is a subnet that overlaps one.
	Reserved []netip.Prefix
}

// The longest prefixes that a node's subnet may have. An IPv4 subnet gives its first address to the tunnel, the second
// to the bridge and the last to broadcast; an IPv6 one its first three to subnet-router anycast (RFC 4291, section
// 2.6.1), the bridge and the tunnel. One address at least is left for a pod.
const (
	MaxLen4 = 30
	MaxLen6 = 126
)

// The usual lengths of a node's subnet.
const (
	usualLen4 = 24
	usualLen6 = 64
)

// DefaultLen is the length of a node's subnet where none is configured: /24 in IPv4 and /64 in IPv6. A network that
// holds fewer than four of these is divided by four instead, as far as MaxLen4 and MaxLen6 allow.
func DefaultLen(prefix netip.Prefix) int {
	usual := usualLen6
	if prefix.Addr().Is4() {
		usual = usualLen4
	}
	return min(max(usual, prefix.Bits()+2), maxLen(prefix.Addr()))
}

func maxLen(a netip.Addr) int {
	if a.Is4() {
		return MaxLen4
	}
	return MaxLen6
}

// A RangeError says which field of a Range cannot be used, and why.
type RangeError struct {
	Field string // the field's name in Range
	Value string
	Why   string
}

func (e *RangeError) Error() string { return fmt.Sprintf("%s %s: %s", e.Field, e.Value, e.Why) }

// NewRange completes r by its defaults and checks it. An error is a *RangeError.
func NewRange(r Range) (Range, error) {
	if why := unfit(r.Prefix); why != "" {
		return Range{}, &RangeError{"Prefix", r.Prefix.String(), why}
	}
	if r.Len == 0 {
		r.Len = DefaultLen(r.Prefix)
	}
	if low, high := r.Prefix.Bits(), maxLen(r.Prefix.Addr()); low > high {
		return Range{}, &RangeError{"Prefix", r.Prefix.String(), fmt.Sprintf("too small, want at most /%d", high)}
	} else if r.Len < low || r.Len > high {
		return Range{}, &RangeError{"Len", strconv.Itoa(r.Len),
			fmt.Sprintf("want %d to %d for nodes' subnets of %s", low, high, r.Prefix)}
	}
	if err := r.completeBounds(); err != nil {
		return Range{}, err
	}
	r.Reserved = slices.Clone(r.Reserved)
	for _, p := range r.Reserved {
		if p != p.Masked() || !r.contains(p) {
			return Range{}, &RangeError{"Reserved", p.String(), "want a prefix inside " + r.Prefix.String()}
		}
	}
	if r.Count() == 0 {
		return Range{}, &RangeError{"Reserved", fmt.Sprint(r.Reserved),
			fmt.Sprintf("leaves no subnet between %s and %s", r.Min, r.Max)}
	}
	return r, nil
}

// completeBounds fills in Min and Max and checks them.
func (r *Range) completeBounds() error {
	if !r.Min.IsValid() {
		r.Min = netip.PrefixFrom(r.Prefix.Addr(), r.Len)
	}
	if !r.Max.IsValid() {
		r.Max = netip.PrefixFrom(last(r.Prefix), r.Len).Masked()
	}
	if err := r.checkBound("Min", r.Min); err != nil {
		return err
	}
	if err := r.checkBound("Max", r.Max); err != nil {
		return err
	}
	if r.Max.Addr().Less(r.Min.Addr()) {
		return &RangeError{"Min", r.Min.Addr().String(), "comes after the last subnet, " + r.Max.String()}
	}
	return nil
}

// checkBound says what keeps p from being the first or last subnet of r.
func (r Range) checkBound(field string, p netip.Prefix) error {
	var why string
	switch {
	case p.Addr().BitLen() != r.Prefix.Addr().BitLen() || !r.Prefix.Contains(p.Addr()):
		why = "outside the network " + r.Prefix.String()
	case p.Bits() != r.Len:
		why = fmt.Sprintf("has length /%d, want /%d", p.Bits(), r.Len)
	case p != p.Masked():
		why = fmt.Sprintf("not the first address of a /%d; did you mean %s", r.Len, p.Masked().Addr())
	default:
		return nil
	}
	return &RangeError{field, p.Addr().String(), why}
}

// unfit says why prefix cannot hold pods' addresses: its form, or addresses in it with another meaning (RFC 6890).
func unfit(prefix netip.Prefix) string {
	if !prefix.IsValid() {
		return "not a prefix"
	}
	if m := prefix.Masked(); m != prefix {
		return fmt.Sprintf("host bits set; did you mean %s", m)
	}
	for _, special := range [...]struct{ block, what string }{
		{"0.0.0.0/8", "this-network"},
		{"127.0.0.0/8", "loopback"},
		{"169.254.0.0/16", "link-local"},
		{"224.0.0.0/4", "multicast"},
		{"255.255.255.255/32", "broadcast"},
		{"::/127", "unspecified and loopback"},
		{"::ffff:0:0/96", "IPv4-mapped"},
		{"fe80::/10", "link-local"},
		{"ff00::/8", "multicast"},
	} {
		if prefix.Overlaps(netip.MustParsePrefix(special.block)) {
			return fmt.Sprintf("holds %s addresses (%s); choose a private range", special.what, special.block)
		}
	}
	return ""
}

// Check says what keeps p from being leased, whoever holds what: it has another length, lies outside of Prefix or of
// Min and Max, or overlaps a reserved prefix. It is for taking leases: to Settle, what a node has leased stays good when
// Min, Max and Reserved change.
func (r Range) Check(p netip.Prefix) error {
	switch {
	case !r.contains(p):
		return fmt.Errorf("subnet %s is outside the network %s", p, r.Prefix)
	case p != p.Masked():
		return fmt.Errorf("subnet %s: host bits set; did you mean %s", p, p.Masked())
	case p.Bits() != r.Len:
		return fmt.Errorf("subnet %s has length /%d; subnets of %s have /%d", p, p.Bits(), r.Prefix, r.Len)
	case p.Addr().Less(r.Min.Addr()) || r.Max.Addr().Less(p.Addr()):
		return fmt.Errorf("subnet %s is not one of those to be leased, %s to %s", p, r.Min, r.Max)
	}
	for _, q := range r.Reserved {
		if q.Overlaps(p) {
			return fmt.Errorf("subnet %s overlaps the reserved %s", p, q)
		}
	}
	return nil
}

// Count says how many subnets nodes may lease. Where it would not fit, it is the largest uint64.
func (r Range) Count() uint64 { return count(r.gaps(nil)) }

// Free yields each subnet that may be leased and overlaps none of taken, in order, from number start on (counted from
// Min, and modulo the number of subnets from Min to Max) and round to where it began. It looks at taken once, not at
// each subnet; of a range with more than 2^64 subnets it knows the first 2^64.
func (r Range) Free(start uint64, taken []netip.Prefix) iter.Seq[netip.Prefix] {
	gaps := r.gaps(taken)
	if n := r.span(); n < math.MaxUint64 {
		start %= n + 1
	}
	return func(yield func(netip.Prefix) bool) {
		for _, g := range slices.Concat(from(gaps, start), before(gaps, start)) {
			for i := g.first; ; i++ {
				if !yield(r.subnet(i)) {
					return
				}
				if i == g.last {
					break
				}
			}
		}
	}
}

// A run is subnets of a Range by number, from first to last, both included.
type run struct{ first, last uint64 }

// span is the number of Max, counted from Min.
func (r Range) span() uint64 { return r.number(r.Max.Addr()) }

// gaps lists what is left between Min and Max by the reserved prefixes and taken, in order.
func (r Range) gaps(taken []netip.Prefix) []run {
	var holes []run
	for _, p := range slices.Concat(r.Reserved, taken) {
		if !p.Overlaps(r.Prefix) {
			continue
		}
		lowest, highest := p.Masked().Addr(), last(p)
		if highest.Less(r.Min.Addr()) || r.Max.Addr().Less(lowest) && !r.Max.Contains(lowest) {
			continue
		}
		if lowest.Less(r.Min.Addr()) {
			lowest = r.Min.Addr()
		}
		holes = append(holes, run{r.number(lowest), r.number(highest)})
	}
	slices.SortFunc(holes, func(a, b run) int { return cmp.Compare(a.first, b.first) })
	var gaps []run
	next := uint64(0)
	for _, h := range holes {
		if h.first > next {
			gaps = append(gaps, run{next, h.first - 1})
		}
		if h.last == math.MaxUint64 {
			return gaps
		}
		next = max(next, h.last+1)
	}
	if next <= r.span() {
		gaps = append(gaps, run{next, r.span()})
	}
	return gaps
}

// from is the part of gaps from number n on, before the part below it.
func from(gaps []run, n uint64) (out []run) {
	for _, g := range gaps {
		if g.last >= n {
			out = append(out, run{max(g.first, n), g.last})
		}
	}
	return out
}

func before(gaps []run, n uint64) (out []run) {
	for _, g := range gaps {
		if g.first < n {
			out = append(out, run{g.first, min(g.last, n-1)})
		}
	}
	return out
}

func count(gaps []run) uint64 {
	n := uint64(0)
	for _, g := range gaps {
		size := g.last - g.first
		if size == math.MaxUint64 || n > math.MaxUint64-size-1 {
			return math.MaxUint64
		}
		n += size + 1
	}
	return n
}

func (r Range) contains(p netip.Prefix) bool {
	return r.Prefix.Overlaps(p) && p.Bits() >= r.Prefix.Bits()
}

// number says which subnet, counted from Min, a lies in; a is not below Min. The largest uint64 stands for all beyond.
func (r Range) number(a netip.Addr) uint64 {
	return wordsOf(a).minus(wordsOf(r.Min.Addr())).shiftRight(a.BitLen() - r.Len)
}

// subnet is the reverse of number.
func (r Range) subnet(n uint64) netip.Prefix {
	lowest := r.Min.Addr()
	a := wordsOf(lowest).plus(words{lo: n}.shiftLeft(lowest.BitLen() - r.Len))
	return netip.PrefixFrom(a.addr(lowest.Is4()), r.Len)
}

// A Network is where pods have their addresses: at most one Range a family. NewNetwork makes one that can be relied on.
type Network []Range

// NewNetwork completes and checks ranges as NewRange does, IPv4 first.
func NewNetwork(ranges ...Range) (Network, error) {
	if len(ranges) == 0 {
		return nil, errors.New("a network needs a range of IPv4 or IPv6 addresses, or one of each")
	}
	var n Network
	for _, r := range ranges {
		r, err := NewRange(r)
		if err != nil {
			return nil, err
		}
		if other, ok := n.Range(r.Prefix.Addr()); ok {
			return nil, &RangeError{"Prefix", r.Prefix.String(),
				fmt.Sprintf("a second range of one family beside %s; a network has one", other.Prefix)}
		}
		n = append(n, r)
	}
	slices.SortFunc(n, func(a, b Range) int { return a.Prefix.Addr().Compare(b.Prefix.Addr()) })
	return n, nil
}

// Range returns the range of the same address family as of, whether of lies in it or not.
func (n Network) Range(of netip.Addr) (Range, bool) {
	for _, r := range n {
		if r.Prefix.Addr().BitLen() == of.BitLen() {
			return r, true
		}
	}
	return Range{}, false
}

// Contains reports whether p lies in n with all of its addresses.
func (n Network) Contains(p netip.Prefix) bool {
	r, ok := n.Range(p.Addr())
	return ok && r.contains(p)
}

// Prefixes lists the prefixes of the ranges, IPv4 first.
func (n Network) Prefixes() []netip.Prefix {
	var out []netip.Prefix
	for _, r := range n {
		out = append(out, r.Prefix)
	}
	return out
}

// A Usage says how far a Range is used up.
type Usage struct {
	Network netip.Prefix `json:"network"`
	// Len is the prefix length of the subnets that Free and Total count, in bits.
	Len int `json:"subnetLen"`
	// Leased counts the leases in Network, whatever their length.
	Leased int `json:"leased"`
	// Free counts the subnets that can still be leased, Total those that can be leased where none is.
	Free  uint64 `json:"free"`
	Total uint64 `json:"total"`
}

// Usage says how far leases use up each range of n. A subnet that is leased twice counts once.
func (n Network) Usage(leases []Lease) []Usage {
	var out []Usage
	for _, r := range n {
		leased := map[netip.Prefix]bool{}
		var taken []netip.Prefix
		for _, l := range leases {
			if r.contains(l.Subnet) && !leased[l.Subnet] {
				leased[l.Subnet] = true
				taken = append(taken, l.Subnet)
			}
		}
		out = append(out, Usage{r.Prefix, r.Len, len(taken), count(r.gaps(taken)), r.Count()})
	}
	return out
}
