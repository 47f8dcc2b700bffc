// Package kernel reads and changes this host's network: links, addresses, neighbours, FDB, routes, rules, sysctls and
// packet filter.
package kernel

import (
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"sync"

	"golang.org/x/sys/unix"
	"tweed.dev/tweed/backend/masq"
)

// DefaultSysctlRoot is where a host shows its sysctls.
const DefaultSysctlRoot = "/proc/sys"

// Options say how to reach a host.
type Options struct {
	// SysctlRoot is where sysctls are read and written; DefaultSysctlRoot if empty. In a container, where /proc/sys is
	// read-only, it is where the host's is mounted.
	SysctlRoot string
	// Log gets what a person should know but need not act on; nothing is logged if it is nil.
	Log *slog.Logger
	// NoPortLocks has ports of bridges treated as a kernel before 5.18 does, which cannot lock them.
	NoPortLocks bool
}

// A Kernel is the kernel of this host, in one network namespace. Its methods can be called by several goroutines, but
// only on threads of that namespace.
type Kernel struct {
	conn    *conn
	ioctl   int // a socket for ioctls
	root    string
	log     *slog.Logger
	filters map[masq.Variant]*filter // of iptables
	nft     *nftables
	sets    *ipsets
	seed    maphash.Seed // of memory's digests
	// noLocks is Options.NoPortLocks, and lockless says once that there are none.
	noLocks  bool
	lockless sync.Once

	mu    sync.Mutex
	index map[string]int               // of links, as last seen
	inUse map[masq.Family]masq.Variant // of iptables, as last seen
	named map[string]masq.Variant      // what programs are, by their paths
	inWay map[any]bool                 // strangers that stood where something of ours should, as last seen; see isInWay

	remembered memory
}

// errPermission is what every refusal for lack of rights ends in.
var errPermission = errors.New("needs root or CAP_NET_ADMIN")

// New opens the calling thread's network namespace. It fails without CAP_NET_ADMIN.
func New(o Options) (*Kernel, error) {
	if err := checkPermission(); err != nil {
		return nil, err
	}
	if o.SysctlRoot == "" {
		o.SysctlRoot = DefaultSysctlRoot
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	c, err := dial(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		c.close()
		return nil, fmt.Errorf("opening a socket for device settings: %w", err)
	}
	k := &Kernel{
		conn: c, ioctl: fd, root: o.SysctlRoot, log: o.Log, nft: dialNFT(), sets: dialIPSet(), index: map[string]int{},
		inUse: map[masq.Family]masq.Variant{}, named: map[string]masq.Variant{}, seed: maphash.MakeSeed(),
		noLocks: o.NoPortLocks,
	}
	k.filters = newFilters(k)
	return k, nil
}

// Close lets go of the namespace. Nothing in it changes.
func (k *Kernel) Close() {
	for _, f := range k.filters {
		f.close()
	}
	k.conn.close()
	k.nft.close()
	k.sets.close()
	unix.Close(k.ioctl)
}

func checkPermission() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("reading this process's capabilities: %w", err)
	}
	if data[0].Effective&(1<<unix.CAP_NET_ADMIN) == 0 {
		return fmt.Errorf("changing this host's network %w", errPermission)
	}
	return nil
}

// remember keeps the index of a link for operations on what hangs on it; 0 forgets it.
func (k *Kernel) remember(name string, index int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if index == 0 {
		delete(k.index, name)
	} else {
		k.index[name] = index
	}
}

// isInWay reports whether a stranger stood in our way when Observe looked last. The key of a link is its index, that of
// a route or a rule is State's.
func (k *Kernel) isInWay(key any) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.inWay[key]
}

// indexOf returns the index of the link called name.
func (k *Kernel) indexOf(name string) (int, error) {
	k.mu.Lock()
	index := k.index[name]
	k.mu.Unlock()
	if index != 0 {
		return index, nil
	}
	l, err := k.linkByName(name)
	if err != nil {
		return 0, err
	}
	k.remember(name, l.index)
	return l.index, nil
}

func (k *Kernel) linkByName(name string) (link, error) {
	m := linkMessage(0, 0, 0)
	m.string(unix.IFLA_IFNAME, name)
	m.u32(unix.IFLA_EXT_MASK, skipStats)
	return k.link(m, "device "+name)
}

func (k *Kernel) linkByIndex(index int) (link, error) {
	m := linkMessage(index, 0, 0)
	m.u32(unix.IFLA_EXT_MASK, skipStats)
	return k.link(m, fmt.Sprintf("the device with index %d", index))
}

func (k *Kernel) link(m message, what string) (link, error) {
	b, err := k.conn.get(unix.RTM_GETLINK, m)
	if errors.Is(err, unix.ENODEV) {
		return link{}, fmt.Errorf("%s does not exist: %w", what, unix.ENODEV)
	}
	if err != nil {
		return link{}, fmt.Errorf("reading %s: %w", what, err)
	}
	l, ok := parseLink(b)
	if !ok {
		return link{}, fmt.Errorf("reading %s: the kernel's answer is cut off", what)
	}
	return l, nil
}

// links returns the devices of one kind, or all if kind is empty.
func (k *Kernel) links(kind string) (links []link, err error) {
	m := linkMessage(0, 0, 0)
	m.u32(unix.IFLA_EXT_MASK, skipStats)
	if kind != "" {
		m.nest(unix.IFLA_LINKINFO, func(m *message) { m.bytes(unix.IFLA_INFO_KIND, []byte(kind)) })
	}
	err = k.conn.dump(unix.RTM_GETLINK, m, func() { links = links[:0] }, func(b []byte) {
		if l, ok := parseLink(b); ok && (kind == "" || l.kind == kind) {
			links = append(links, l)
		}
	})
	if err != nil {
		return nil, fmt.Errorf("listing links: %w", err)
	}
	return links, nil
}
