package podnet

import (
	"errors"
	"io"
	"io/fs"
	"net/netip"
	"os"
)

// A Usage is how many addresses of a subnet pods have, and how many more can be handed out.
type Usage struct {
	Subnet     netip.Prefix
	Used, Free int
}

// namesAtOnce bounds how many names of a directory are held at a time.
const namesAtOnce = 512

// UsageOf counts the addresses of each of subnets that runDir records. It opens no record: an address of a pod that is
// gone without a DEL is used until Sweep has freed it.
func UsageOf(runDir string, subnets []netip.Prefix) ([]Usage, error) {
	usage := make([]Usage, len(subnets))
	for i, s := range subnets {
		usage[i] = Usage{Subnet: s, Free: podCount(s)}
	}
	dir, err := os.Open((&store{runDir: runDir}).addrDir())
	if errors.Is(err, fs.ErrNotExist) {
		return usage, nil // before the first pod
	}
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	for {
		names, err := dir.Readdirnames(namesAtOnce)
		if errors.Is(err, io.EOF) {
			return usage, nil
		}
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			use(usage, name)
		}
	}
}

// use counts the address of that name, where it is one that pods can have.
func use(usage []Usage, name string) {
	a, err := netip.ParseAddr(name)
	if err != nil {
		return
	}
	for i := range usage {
		u := &usage[i]
		if first, last := podRange(u.Subnet); !a.Less(first) && !last.Less(a) {
			u.Used, u.Free = u.Used+1, u.Free-1
		}
	}
}

// podCount is how many addresses podRange spans. They are at most 2^30 in IPv4 and 2^16 in IPv6.
func podCount(subnet netip.Prefix) int {
	bits := min(subnet.Addr().BitLen()-subnet.Bits(), 30)
	if subnet.Addr().Is6() {
		bits = min(bits, 16)
	}
	return 1<<bits - 3
}
