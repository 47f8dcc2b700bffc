package podnet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"tweed.dev/tweed/backend/spoof"
)

// A Spoofing says which pods may send as others than themselves. The zero one lets none.
type Spoofing struct {
	All        bool     `json:"all,omitempty"`
	Namespaces []string `json:"namespaces,omitempty"`
}

// Allows reports whether pods of a Kubernetes namespace may. Without Kubernetes pods have none.
func (s Spoofing) Allows(namespace string) bool {
	return s.All || namespace != "" && slices.Contains(s.Namespaces, namespace)
}

// NamespaceOf finds a pod's Kubernetes namespace in what the runtime says beside the CNI spec (CNI_ARGS); "" where it
// does not say.
func NamespaceOf(args string) string {
	for pair := range strings.SplitSeq(args, ";") {
		if namespace, ok := strings.CutPrefix(pair, "K8S_POD_NAMESPACE="); ok {
			return namespace
		}
	}
	return ""
}

// ntfSticky is NTF_STICKY of linux/neighbour.h: the address stays behind its port, whoever else sends from it.
const ntfSticky = 1 << 6

// isolation are those settings of a bridge's port that keep its pod from filling the bridge's table, frames for others
// from it, and those from other MACs than the bridge knows there from going on. Kernels before 5.18 do not know the
// last one, and pass over it.
func isolation(on bool) []*nl.RtAttr {
	yes, no := byte(1), byte(0)
	if !on {
		yes, no = no, yes
	}
	return []*nl.RtAttr{
		nl.NewRtAttr(unix.IFLA_BRPORT_LEARNING, nl.Uint8Attr(no)),
		nl.NewRtAttr(unix.IFLA_BRPORT_UNICAST_FLOOD, nl.Uint8Attr(no)),
		nl.NewRtAttr(unix.IFLA_BRPORT_LOCKED, nl.Uint8Attr(yes)),
	}
}

// guard has the bridge know where the pod is, and nftables judge what it sends. The pod's end is not up yet.
//
// What nftables refuses keeps no pod from its network: the daemon makes good for it, or has told that this kernel
// cannot.
func (h *host) guard(v veth, held *hold) error {
	if err := h.place(v, held.Index); err != nil {
		return fmt.Errorf("bridge fdb replace %s dev %s master static sticky: %w", v.podMAC, v.name, err)
	}
	if !v.guarded {
		return nil
	}
	if err := judge(held.entries()); err != nil {
		fmt.Fprintf(os.Stderr, "tweed-cni: nftables does not judge yet what pod %s sends (table bridge %s: %v); "+
			"the tweed daemon sees to it, or says in its log what is missing\n", held.Container, spoof.Name, err)
	}
	return nil
}

// place puts the pod's MAC into the bridge's table, for good.
func (h *host) place(v veth, index int) error {
	req := h.request(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE)
	msg := make(raw, unix.SizeofNdMsg) // struct ndmsg, linux/neighbour.h
	msg[0], msg[10] = unix.AF_BRIDGE, unix.NTF_MASTER|ntfSticky
	binary.NativeEndian.PutUint32(msg[4:], uint32(index))
	binary.NativeEndian.PutUint16(msg[8:], unix.NUD_NOARP)
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.NDA_LLADDR, v.podMAC[:]))
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return meaning(err)
}

// raw is a piece of a message.
type raw []byte

// Len implements nl.NetlinkRequestData.
func (r raw) Len() int { return len(r) }

// Serialize implements nl.NetlinkRequestData.
func (r raw) Serialize() []byte { return r }

// entries are those of the pod in nftables.
func (r record) entries() []spoof.Entry { return spoof.Entries(r.Veth, r.MAC, r.ips()) }

func (r record) ips() []netip.Addr {
	ips := make([]netip.Addr, 0, len(r.Addrs))
	for _, a := range r.Addrs {
		ips = append(ips, a.Addr())
	}
	return ips
}

// judge adds entries, and with them the table where it is missing: what it does not know it lets pass, so that it can
// be there before other pods have theirs.
func judge(entries []spoof.Entry) error {
	nft, err := dialNFT()
	if err != nil {
		return err
	}
	defer nft.close()
	add := spoof.Add(entries)
	err = nft.transact(add)
	if errors.Is(err, unix.ENOENT) {
		err = nft.transact(slices.Concat(spoof.Make(), add))
	}
	if errors.Is(err, unix.EEXIST) { // made meanwhile
		err = nft.transact(add)
	}
	return err
}

// removeJudged removes a pod's veth, and what nftables knows of it. To begin with nothing is taken in from the pod any
// more, so nothing gets past nftables meanwhile.
//
// Both wait for a long moment, in which no processor looks at what goes any more. nftables begins its own on the side, and
// waits for its end when the socket is closed, with a lock held that removing a device needs. So that is done last: by
// then the other wait is over, and with it this one.
//
// What nftables knows of a pod whose record was lost does no harm: no other pod gets the name of the veth. The daemon
// takes it away.
func (h *host) removeJudged(rec record) error {
	acquit := func() {}
	if nft, err := dialNFT(); err == nil {
		defer nft.close()
		acquit = func() { nft.acquit(rec) }
	}
	if h.shut(rec) == nil {
		acquit()
		return h.remove(rec.Veth, rec.Index)
	}
	err := h.remove(rec.Veth, rec.Index) // gone, or no port, or an open one: that stays judged as long as it is there
	if err == nil {
		acquit()
	}
	return err
}

// acquit takes away what nftables knows of a pod. The table may be gone, or not know it.
func (n nft) acquit(r record) {
	if len(r.Addrs) > 0 {
		_ = n.transact(spoof.Delete(r.entries()))
	}
}

// shut has a bridge take nothing in from a pod's port any more. The error is ENODEV where there is none that is ours.
func (h *host) shut(rec record) error {
	l, err := h.link(rec.Veth)
	if err == nil && (!l.ours("veth") || l.Index != rec.Index) {
		err = unix.ENODEV
	}
	if err != nil {
		return err
	}
	const disabled = 0 // BR_STATE_DISABLED of linux/if_bridge.h
	return h.setPort(l.Index, 0, nl.NewRtAttr(nl.IFLA_BRPORT_STATE, nl.Uint8Attr(disabled)))
}

// An nft is a netlink socket to nftables.
type nft int

// dialNFT opens one in the network namespace of the calling thread.
func dialNFT() (nft, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	return nft(fd), err
}

func (n nft) close() { unix.Close(int(n)) }

// transact makes all of some changes, or none.
func (n nft) transact(changes []spoof.Message) error {
	if err := unix.Sendto(int(n), batch(changes), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return meaning(err)
	}
	// The kernel has done its work by now, and answers only what it refuses.
	var refused error
	buf := make([]byte, 16<<10)
	for {
		size, _, err := unix.Recvfrom(int(n), buf, unix.MSG_DONTWAIT)
		if errors.Is(err, unix.EAGAIN) {
			return refused
		}
		msgs, parseErr := syscall.ParseNetlinkMessage(buf[:max(0, size)])
		if err := errors.Join(err, parseErr); err != nil {
			return err
		}
		if refused == nil {
			refused = refusal(msgs)
		}
	}
}

// refusal is the first among the kernel's answers.
func refusal(msgs []syscall.NetlinkMessage) error {
	for _, m := range msgs {
		if m.Header.Type == unix.NLMSG_ERROR && len(m.Data) >= 4 {
			if errno := syscall.Errno(-int32(binary.NativeEndian.Uint32(m.Data))); errno != 0 {
				return meaning(errno)
			}
		}
	}
	return nil
}

// batch puts changes between what begins and what ends a transaction (linux/netfilter/nfnetlink.h).
func batch(changes []spoof.Message) (out []byte) {
	add := func(typ, flags int, body []byte) {
		out = binary.NativeEndian.AppendUint32(out, uint32(unix.SizeofNlMsghdr+len(body)))
		out = binary.NativeEndian.AppendUint16(out, uint16(typ))
		out = binary.NativeEndian.AppendUint16(out, uint16(unix.NLM_F_REQUEST|flags))
		out = append(append(out, make([]byte, 8)...), body...)
	}
	bound := []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES}
	add(unix.NFNL_MSG_BATCH_BEGIN, 0, bound)
	for _, c := range changes {
		add(unix.NFNL_SUBSYS_NFTABLES<<8|c.Type, c.Flags, c.Body)
	}
	add(unix.NFNL_MSG_BATCH_END, 0, bound)
	return out
}
