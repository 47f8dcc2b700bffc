package podnet

import (
	"encoding/binary"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"tweed.dev/tweed/backend/spoof"
)

// unguarded names what is wrong with what keeps a pod to its own addresses. By then the daemon is about to repair it.
func (h *host) unguarded(rec record, end link, spoofing Spoofing) (broken []error) {
	if !h.placed(rec, end.Index) {
		broken = append(broken, fmt.Errorf("the bridge does not know for good that %s is behind its port %s", rec.MAC,
			rec.Veth))
	}
	if spoofing.Allows(rec.Namespace) {
		return broken
	}
	for _, s := range []struct {
		setting uint16
		want    byte
		what    string
	}{
		{unix.IFLA_BRPORT_LEARNING, 0, "learns addresses"},
		{unix.IFLA_BRPORT_UNICAST_FLOOD, 0, "is flooded with what is for others"},
		{unix.IFLA_BRPORT_LOCKED, 1, "is not locked"},
	} {
		// A setting that the kernel does not tell of it does not have.
		if have, told := end.port[s.setting]; told && have != s.want {
			broken = append(broken, fmt.Errorf("its bridge port %s %s", rec.Veth, s.what))
		}
	}
	if err := judged(rec); err != nil {
		broken = append(broken, fmt.Errorf("nftables does not judge what it sends (table bridge %s: %w)", spoof.Name, err))
	}
	return broken
}

// placed reports whether the bridge knows where a pod is.
func (h *host) placed(rec record, index int) bool {
	req := h.request(unix.RTM_GETNEIGH, 0)
	msg := make(raw, unix.SizeofNdMsg)
	msg[0], msg[10] = unix.AF_BRIDGE, unix.NTF_MASTER
	binary.NativeEndian.PutUint32(msg[4:], uint32(index))
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.NDA_LLADDR, rec.MAC[:]))
	answers, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWNEIGH)
	if err != nil || len(answers) != 1 || len(answers[0]) < unix.SizeofNdMsg {
		return false
	}
	a := answers[0]
	return int(binary.NativeEndian.Uint32(a[4:])) == index && a[10]&ntfSticky != 0 &&
		binary.NativeEndian.Uint16(a[8:])&unix.NUD_NOARP != 0
}

// judged says what nftables does not know of a pod: it is asked for the very elements that ADD has put there.
func judged(rec record) error {
	for _, add := range spoof.Add(rec.entries()) {
		req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETSETELEM, unix.NLM_F_ACK)
		req.AddData(raw(add.Body))
		if _, err := req.Execute(unix.NETLINK_NETFILTER, 0); err != nil {
			return err
		}
	}
	return nil
}
