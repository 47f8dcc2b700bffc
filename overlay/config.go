package overlay

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/backend/vxlan"
	"tweed.dev/tweed/overlay/podnet"
	"tweed.dev/tweed/subnet"
)

// Config is what net-conf.json says, checked and completed by its defaults. docs/configuration.md describes each key.
type Config struct {
	Network subnet.Network
	Backend BackendConfig
	// Underlay is the address family that carries the tunnel, 4 or 6; 0 for that of the node's first address.
	Underlay int
	// SubnetSource says where a Kubernetes node's subnets come from.
	SubnetSource subnet.Origin
	// PacketFilter says what this node's packet filter is written in.
	PacketFilter masq.Form
	// NonMasquerade holds addresses that see pods by their own addresses, the pod network's apart.
	NonMasquerade []netip.Prefix
	// Spoofing says which pods may send as others than themselves.
	Spoofing podnet.Spoofing
}

// BackendConfig says how packets reach other nodes.
type BackendConfig struct {
	Type string // "vxlan" or "host-gw"
	VNI  uint32
	Port uint16 // UDP
	// MTU is the underlay's, in bytes, as if the uplink had it; 0 for the uplink's own.
	MTU int
	// DirectRouting has nodes on one segment send each other pods' packets as they are.
	DirectRouting bool
	// ChecksumOffload is "auto" for what the kernel does by itself, or "off".
	ChecksumOffload string
	// Guard drops what others than nodes send to Port, and AcceptPeers lets what nodes send there past a host's own
	// filter.
	Guard, AcceptPeers bool
}

// smallestConfig is shown to who has none.
const smallestConfig = `{"Network": "10.244.0.0/16"}`

// The defaults of the backend. IANA has given VXLAN port 4789 (RFC 7348, section 5); 8472 is that of the kernel and of
// flannel.
const (
	defaultVNI  = 1
	defaultPort = 8472
)

// LoadConfig reads the file at path as ParseConfig does. Where there is no such file, the error is an fs.ErrNotExist.
func LoadConfig(path string) (Config, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return Config{}, fmt.Errorf("%w; it describes the pod network, and at its smallest is %s", err, smallestConfig)
	}
	if err != nil {
		return Config{}, err
	}
	c, err := ParseConfig(text)
	if err != nil {
		return Config{}, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// ParseConfig reads the text of a net-conf.json. It is strict: what it does not know, or would have to ignore, it
// refuses. An error names each key and value at fault and what is expected, one a line.
func ParseConfig(text []byte) (Config, error) {
	if len(bytes.TrimSpace(text)) == 0 {
		return Config{}, fmt.Errorf("the file is empty; at its smallest it is %s", smallestConfig)
	}
	if err := json.Unmarshal(text, new(json.RawMessage)); err != nil {
		return Config{}, syntaxError(text, err)
	}
	d := newDraft()
	d.object("", text, d.keys(), flannelKeys())
	if len(d.errs) == 0 {
		d.checkFamilies()
	}
	if len(d.errs) == 0 {
		d.checkBackend()
		d.checkMTU()
		d.buildNetwork()
		d.checkExceptions()
	}
	if err := errors.Join(d.errs...); err != nil {
		return Config{}, err
	}
	return d.Config, nil
}

// CheckAddrs refuses a pod network that holds one of addrs, the node's own: the node would look for them among its pods.
func (c Config) CheckAddrs(addrs []netip.Addr) error {
	for _, a := range addrs {
		if r, ok := c.Network.Range(a); ok && r.Prefix.Contains(a) {
			key := familyDraft{version: family(a)}.key("Network")
			return fmt.Errorf("address %s of this node is inside the pod network %s; set %s in net-conf.json to a range "+
				"that no node has an address of", a, r.Prefix, key)
		}
	}
	return nil
}

// checkSubnets refuses subnets of a node that are outside the pod network.
func (c Config) checkSubnets(node subnet.Node) error {
	for _, s := range node.Subnets {
		if !c.Network.Contains(s) {
			return fmt.Errorf("subnet %s of node %s is outside the pod network %s; set Network in net-conf.json to the "+
				"cluster's (kube-controller-manager's --cluster-cidr), or give the node another subnet",
				s, node.Name, listing(c.Network.Prefixes(), " and "))
		}
	}
	return nil
}

// draft is a Config while it is read.
type draft struct {
	Config
	ipv4, ipv6 familyDraft
	reserved   []netip.Prefix
	given      map[string]string // path of each key to its value as written
	errs       []error
}

// familyDraft is what is said about one family of the pod network.
type familyDraft struct {
	version         int
	enabled         bool
	prefix          netip.Prefix
	len             int
	lowest, highest netip.Addr
}

// key is the family's key for what is called field in IPv4.
func (f familyDraft) key(field string) string {
	if f.version == 6 {
		return "IPv6" + field
	}
	return field
}

func newDraft() *draft {
	return &draft{
		Config: Config{
			Backend: BackendConfig{
				Type: vxlan.Name, VNI: defaultVNI, Port: defaultPort, ChecksumOffload: "auto", Guard: true,
			},
			SubnetSource: subnet.OriginAuto,
			PacketFilter: masq.IPTables,
		},
		ipv4:  familyDraft{version: 4, enabled: true},
		ipv6:  familyDraft{version: 6},
		given: map[string]string{},
	}
}

// fail records what is wrong with the value of a key.
func (d *draft) fail(key, format string, args ...any) {
	name := key
	if value := d.given[key]; value != "" {
		name += " " + value
	}
	d.errs = append(d.errs, fmt.Errorf("%s: %w", name, fmt.Errorf(format, args...)))
}

// checkFamilies refuses keys that contradict each other about which families there are.
func (d *draft) checkFamilies() {
	if !d.ipv4.enabled && !d.ipv6.enabled {
		d.fail("EnableIPv4", "neither IPv4 nor IPv6 is enabled; pods need addresses of one at least")
		return
	}
	for _, f := range []familyDraft{d.ipv4, d.ipv6} {
		enable := fmt.Sprintf("EnableIPv%d", f.version)
		if f.enabled && !f.prefix.IsValid() {
			such, _ := example(f.version)
			d.fail(f.key("Network"), "missing; give the pods' IPv%d network, such as %q, or set %q: false",
				f.version, such, enable)
		}
		for _, field := range []string{"Network", "SubnetLen", "SubnetMin", "SubnetMax"} {
			if _, given := d.given[f.key(field)]; given && !f.enabled {
				d.fail(f.key(field), "means nothing without IPv%d; set %q: true, or remove the key", f.version, enable)
			}
		}
	}
}

// checkBackend refuses keys of the tunnel where there is none, and of its guard.
func (d *draft) checkBackend() {
	if d.Backend.Type == vxlan.Name {
		if d.Backend.AcceptPeers && !d.Backend.Guard {
			d.fail("Backend.AcceptPeers", `would accept what anybody sends; set Backend.Guard to true, or remove the key`)
		}
		return
	}
	for _, key := range []string{"VNI", "Port", "DirectRouting", "ChecksumOffload", "Guard", "AcceptPeers"} {
		if _, given := d.given["Backend."+key]; given {
			d.fail("Backend."+key, `means nothing with %q, which has no tunnel; remove the key, or set Backend.Type to %q`,
				d.Backend.Type, vxlan.Name)
		}
	}
}

// checkMTU refuses an underlay over which pods could not have the MTU that their family demands: 576 bytes for IPv4
// (RFC 791, section 3.2) and 1280 for IPv6 (RFC 8200, section 5), beside, in a tunnel, 50 and 70 bytes of headers at
// most.
func (d *draft) checkMTU() {
	smallest, headers := 576, 50
	if d.ipv6.enabled {
		smallest, headers = 1280, 70
	}
	if d.Backend.Type == vxlan.Name {
		smallest += headers
	}
	if m := d.Backend.MTU; m != 0 && m < smallest {
		d.fail("Backend.MTU", "too small for this pod network; want at least %d", smallest)
	}
}

func (d *draft) buildNetwork() {
	for _, f := range []familyDraft{d.ipv4, d.ipv6} {
		if f.enabled {
			d.addRange(f)
		}
	}
	for _, p := range d.reserved {
		if len(d.errs) == 0 && !d.Network.Contains(p) {
			d.fail("Reserved", "%s is not inside the pod network %v", p, d.Network.Prefixes())
		}
	}
}

// checkExceptions refuses exceptions from masquerading that could never be met.
func (d *draft) checkExceptions() {
	for _, p := range d.NonMasquerade {
		if _, ok := d.Network.Range(p.Addr()); !ok {
			d.fail("NonMasqueradeCIDRs", "%s means nothing without IPv%d in the pod network; remove it, or set %q: true",
				p, family(p.Addr()), fmt.Sprintf("EnableIPv%d", family(p.Addr())))
		}
	}
}

func (d *draft) addRange(f familyDraft) {
	r := subnet.Range{Prefix: f.prefix, Len: cmp.Or(f.len, subnet.DefaultLen(f.prefix))}
	r.Min, r.Max = netip.PrefixFrom(f.lowest, r.Len), netip.PrefixFrom(f.highest, r.Len)
	for _, p := range d.reserved {
		if f.prefix.Overlaps(p) {
			r.Reserved = append(r.Reserved, p)
		}
	}
	r, err := subnet.NewRange(r)
	var field *subnet.RangeError
	switch {
	case err == nil:
		d.Network = append(d.Network, r)
	case !errors.As(err, &field) || field.Field == "Reserved":
		d.errs = append(d.errs, err)
	default:
		keys := map[string]string{"Prefix": "Network", "Len": "SubnetLen", "Min": "SubnetMin", "Max": "SubnetMax"}
		d.fail(f.key(keys[field.Field]), "%s", field.Why)
	}
}
