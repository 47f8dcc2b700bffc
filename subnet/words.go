package subnet

import (
	"encoding/binary"
	"math"
	"math/bits"
	"net/netip"
)

// words is an address as a number of 128 bits; an IPv4 address is held as the IPv6 address that it maps to.
type words struct{ hi, lo uint64 }

func wordsOf(a netip.Addr) words {
	b := a.As16()
	return words{binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])}
}

func (w words) addr(is4 bool) netip.Addr {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], w.hi)
	binary.BigEndian.PutUint64(b[8:], w.lo)
	if is4 {
		return netip.AddrFrom16(b).Unmap()
	}
	return netip.AddrFrom16(b)
}

func (w words) plus(v words) words {
	lo, carry := bits.Add64(w.lo, v.lo, 0)
	hi, _ := bits.Add64(w.hi, v.hi, carry)
	return words{hi, lo}
}

func (w words) minus(v words) words {
	lo, borrow := bits.Sub64(w.lo, v.lo, 0)
	hi, _ := bits.Sub64(w.hi, v.hi, borrow)
	return words{hi, lo}
}

// shiftLeft is w * 2^n for n from 0 to 127, without what does not fit.
func (w words) shiftLeft(n int) words {
	if n >= 64 {
		return words{hi: w.lo << (n - 64)}
	}
	return words{w.hi<<n | w.lo>>(64-n), w.lo << n}
}

// shiftRight is w without its lowest n bits, or the largest uint64 where that does not fit.
func (w words) shiftRight(n int) uint64 {
	if n >= 64 {
		return w.hi >> (n - 64)
	}
	if w.hi>>n != 0 {
		return math.MaxUint64
	}
	return w.hi<<(64-n) | w.lo>>n
}

// last is the last address of p.
func last(p netip.Prefix) netip.Addr {
	host := p.Addr().BitLen() - p.Bits()
	ones := words{math.MaxUint64, math.MaxUint64}
	if host < 128 {
		ones = words{lo: 1}.shiftLeft(host).minus(words{lo: 1})
	}
	return wordsOf(p.Masked().Addr()).plus(ones).addr(p.Addr().Is4())
}
