package masq

// The hooks that chains of nftables' own making can be at, by their names in nft. A chain of ours at one has its name; of
// two at one the second has a longer one.
const (
	PreroutingHook = "prerouting"
	InputHook      = "input"
	ForwardHook    = "forward"
	OutputHook     = "output"
	NatHook        = "postrouting"
	// MarksHook is at prerouting too, where connections are known.
	MarksHook = "prerouting-mark"
)

// The places of ours at their hooks.
const (
	// NatPriority is just behind what others hook into there (NF_IP_PRI_NAT_SRC is 100). The first chain that translates
	// a connection decides, so kube-proxy's masquerading comes before ours.
	NatPriority = 101
	// GuardPriority is that of mangle (NF_IP_PRI_MANGLE): fragments have been put together.
	GuardPriority = -150
	// RawPriority is that of raw (NF_IP_PRI_RAW), before connections are tracked.
	RawPriority = -300
)

// A Hook is what a chain at a hook of nftables is made with.
type Hook struct {
	Type     string // "nat" or "filter"
	Name     string
	Priority int
}

// HookOf returns how the chain of ours at a hook is made.
func HookOf(name string) Hook {
	switch name {
	case NatHook:
		return Hook{"nat", name, NatPriority}
	case PreroutingHook, OutputHook:
		return Hook{"filter", name, RawPriority}
	case MarksHook:
		return Hook{"filter", PreroutingHook, GuardPriority}
	}
	return Hook{"filter", name, GuardPriority}
}
