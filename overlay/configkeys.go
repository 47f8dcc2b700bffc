package overlay

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"tweed.dev/tweed/backend/hostgw"
	"tweed.dev/tweed/backend/masq"
	"tweed.dev/tweed/backend/vxlan"
	"tweed.dev/tweed/subnet"
)

// A setter reads one key's value, as written, into the place that is meant for it.
type setter func(value json.RawMessage) error

// keys says how each key of net-conf.json is read.
func (d *draft) keys() map[string]setter {
	keys := map[string]setter{
		"EnableIPv4": boolean(&d.ipv4.enabled),
		"EnableIPv6": boolean(&d.ipv6.enabled),
		"Reserved":   prefixes("10.244.0.0/24", &d.reserved),
		"Underlay":   underlay(&d.Underlay),
		"SubnetSource": oneOf([]subnet.Origin{subnet.OriginAuto, subnet.OriginNodeSpec, subnet.OriginLease},
			&d.SubnetSource),
		"PacketFilter":       oneOf([]masq.Form{masq.IPTables, masq.NFTables}, &d.PacketFilter),
		"NonMasqueradeCIDRs": prefixes("10.0.0.0/8", &d.NonMasquerade),
		"PodSpoofing":        podSpoofing(&d.Spoofing),
		"Backend": func(v json.RawMessage) error {
			d.object("Backend", v, d.backendKeys(), flannelBackendKeys())
			return nil
		},
	}
	for f, longest := range map[*familyDraft]int{&d.ipv4: subnet.MaxLen4, &d.ipv6: subnet.MaxLen6} {
		keys[f.key("Network")] = prefixOf(f.version, &f.prefix)
		keys[f.key("SubnetLen")] = whole(1, longest, &f.len)
		keys[f.key("SubnetMin")] = addrOf(f.version, &f.lowest)
		keys[f.key("SubnetMax")] = addrOf(f.version, &f.highest)
	}
	return keys
}

func (d *draft) backendKeys() map[string]setter {
	b := &d.Backend
	return map[string]setter{
		"Type":            backendType(&b.Type),
		"VNI":             whole(1, 1<<24-1, &b.VNI),
		"Port":            whole(1, math.MaxUint16, &b.Port),
		"MTU":             whole(1, math.MaxUint16, &b.MTU),
		"DirectRouting":   boolean(&b.DirectRouting),
		"ChecksumOffload": oneOf([]string{"auto", "off"}, &b.ChecksumOffload),
		"Guard":           boolean(&b.Guard),
		"AcceptPeers":     boolean(&b.AcceptPeers),
	}
}

// flannelKeys returns keys that flannel knows and we do not, with what to do instead.
func flannelKeys() map[string]string {
	return map[string]string{
		"EnableNFTables": `write "PacketFilter": "nftables" for true; remove the key`,
	}
}

const (
	noEncryption = "nothing is encrypted here; encrypt the underlay, and remove the key"
	noCommands   = "no commands are run for subnets here; remove the key"
	noWindows    = "it is for Windows; remove the key"
)

// flannelBackendKeys returns the like for keys of Backend.
func flannelBackendKeys() map[string]string {
	return map[string]string{
		"GBP":                         "VXLAN group policy is not supported; remove the key",
		"Learning":                    "addresses are never learned, each comes from a lease; remove the key",
		"MacPrefix":                   noWindows,
		"Name":                        noWindows,
		"ApiVersion":                  noWindows,
		"DNSServerList":               noWindows,
		"PSK":                         noEncryption,
		"Mode":                        noEncryption,
		"PersistentKeepaliveInterval": noEncryption,
		"UDPEncap":                    noEncryption,
		"ESPProposal":                 noEncryption,
		"ListenPort":                  "the tunnel's UDP port is Port",
		"ListenPortV6":                "the tunnel's UDP port is Port, in both families",
		"RouteTableID":                "routes go into the main table, and into none of a cloud's; remove the key",
		"PreStartupCommand":           noCommands,
		"PostStartupCommand":          noCommands,
		"ShutdownCommand":             noCommands,
		"SubnetAddCommand":            noCommands,
		"SubnetRemoveCommand":         noCommands,
	}
}

// flannelBackends returns the backends that flannel has and we do not.
func flannelBackends() map[string]string {
	return map[string]string{
		"udp":         `use "vxlan"`,
		"ipip":        `use "vxlan"`,
		"wireguard":   `nothing is encrypted here; use "vxlan", over an encrypted underlay`,
		"ipsec":       `nothing is encrypted here; use "vxlan", over an encrypted underlay`,
		"alloc":       `use "vxlan", which makes subnets reachable too`,
		"extension":   `no commands are run for subnets here; use "vxlan"`,
		"ali-vpc":     `use "vxlan", which needs nothing from a cloud`,
		"aws-vpc":     `use "vxlan", which needs nothing from a cloud`,
		"gce":         `use "vxlan", which needs nothing from a cloud`,
		"tencent-vpc": `use "vxlan", which needs nothing from a cloud`,
	}
}

// object reads a JSON object, which is known to be well-formed, by its table of keys.
func (d *draft) object(path string, text json.RawMessage, known map[string]setter, instead map[string]string) {
	dec := json.NewDecoder(bytes.NewReader(text))
	if open, err := dec.Token(); err != nil || open != json.Delim('{') {
		d.errs = append(d.errs, errors.New(strings.TrimSpace(path+" "+quoted(text))+": want an object, { ... }"))
		return
	}
	for dec.More() {
		key, err := dec.Token()
		var value json.RawMessage
		if err == nil {
			err = dec.Decode(&value)
		}
		if err != nil {
			d.errs = append(d.errs, err)
			return
		}
		d.set(path, fmt.Sprint(key), value, known, instead)
	}
}

func (d *draft) set(path, key string, value json.RawMessage, known map[string]setter, instead map[string]string) {
	full := key
	if path != "" {
		full = path + "." + key
	}
	if _, twice := d.given[full]; twice {
		d.fail(full, "the key is there twice; remove one")
		return
	}
	if read, ok := known[key]; ok {
		// An object is not repeated in messages about it.
		if d.given[full] = quoted(value); value[0] == '{' {
			d.given[full] = ""
		}
		if err := read(value); err != nil {
			d.fail(full, "%w", err)
		}
		return
	}
	if what, ok := instead[key]; ok {
		d.fail(full, "a key of flannel that has no meaning here: %s", what)
		return
	}
	if !plain(full) {
		full = subnet.Quote(full)
	}
	d.fail(full, "unknown key; %s", suggest(key, slices.Sorted(maps.Keys(known))))
}

// plain reports whether a key can be shown as it is: one short word.
func plain(key string) bool {
	const most = 60
	odd := func(r rune) bool { return r <= ' ' || r > '~' }
	return key != "" && len(key) <= most && !strings.ContainsFunc(key, odd)
}

// suggest names the key that was probably meant, or else all.
func suggest(key string, known []string) string {
	for _, k := range known {
		if strings.EqualFold(k, key) {
			return fmt.Sprintf("did you mean %s? Upper and lower case matter", k)
		}
	}
	best := slices.MinFunc(known, func(a, b string) int { return distance(a, key) - distance(b, key) })
	if distance(best, key) <= 2 {
		return fmt.Sprintf("did you mean %s?", best)
	}
	return "known are " + strings.Join(known, ", ")
}

// distance counts the characters to insert, remove or replace to make b of a (Levenshtein).
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			replace := diagonal
			if a[i] != b[j] {
				replace++
			}
			diagonal = row[j+1]
			row[j+1] = min(replace, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// quoted is value as a message shows it: on one line and not too long.
func quoted(value json.RawMessage) string {
	const most = 60
	var line bytes.Buffer
	if err := json.Compact(&line, value); err != nil {
		return ""
	}
	if runes := []rune(line.String()); len(runes) > most {
		return string(runes[:most]) + "..."
	}
	return line.String()
}

// syntaxError says where text is not JSON.
func syntaxError(text []byte, err error) error {
	var at *json.SyntaxError
	if !errors.As(err, &at) {
		return err
	}
	before := text[:min(int(at.Offset), len(text))]
	line := bytes.Count(before, []byte("\n")) + 1
	if len(before) == len(text) && strings.HasPrefix(err.Error(), "unexpected end") {
		return fmt.Errorf("line %d: the text ends in the middle; was it cut off?", line)
	}
	return fmt.Errorf("line %d is not JSON: %w", line, err)
}

func boolean(to *bool) setter {
	return func(v json.RawMessage) error {
		var err error
		if *to = string(v) == "true"; !*to && string(v) != "false" {
			err = errors.New("want true or false, without quotes")
		}
		return err
	}
}

func whole[N ~int | ~uint16 | ~uint32](low, high int, to *N) setter {
	return func(v json.RawMessage) error {
		n, err := strconv.Atoi(string(v))
		if err != nil || n < low || n > high {
			return fmt.Errorf("want a whole number from %d to %d, without quotes", low, high)
		}
		*to = N(n)
		return nil
	}
}

// text reads a string. What is none becomes "", which nobody has a use for.
func text(v json.RawMessage) string {
	var s string
	if err := json.Unmarshal(v, &s); err != nil {
		return ""
	}
	return s
}

func oneOf[S ~string](choices []S, to *S) setter {
	return func(v json.RawMessage) error {
		s := S(text(v))
		if !slices.Contains(choices, s) {
			return fmt.Errorf("want %s", alternatives(choices))
		}
		*to = s
		return nil
	}
}

// alternatives is a list of choices, as in "a", "b" or "c".
func alternatives[S ~string](choices []S) string {
	var quoted []string
	for _, c := range choices {
		quoted = append(quoted, strconv.Quote(string(c)))
	}
	last := len(quoted) - 1
	if last == 0 {
		return quoted[0]
	}
	return strings.Join(quoted[:last], ", ") + " or " + quoted[last]
}

func underlay(to *int) setter {
	return func(v json.RawMessage) error {
		name := ""
		err := oneOf([]string{"ipv4", "ipv6"}, &name)(v)
		*to = map[string]int{"ipv4": 4, "ipv6": 6}[name]
		return err
	}
}

func backendType(to *string) setter {
	return func(v json.RawMessage) error {
		if what, ok := flannelBackends()[text(v)]; ok {
			return fmt.Errorf("a backend of flannel that is not here: %s", what)
		}
		return oneOf([]string{vxlan.Name, hostgw.Name}, to)(v)
	}
}

// example is a network of the family, and the first address of one of its subnets.
func example(family int) (prefix, addr string) {
	if family == 4 {
		return "10.244.0.0/16", "10.244.1.0"
	}
	return "fd00:10:244::/48", "fd00:10:244:1::"
}

func isOf(family int, a netip.Addr) bool {
	if family == 4 {
		return a.Is4()
	}
	return a.Is6() && !a.Is4In6() && a.Zone() == ""
}

func prefixOf(family int, to *netip.Prefix) setter {
	return func(v json.RawMessage) error {
		p, err := netip.ParsePrefix(text(v))
		if err != nil || !isOf(family, p.Addr()) {
			such, _ := example(family)
			return fmt.Errorf("want an IPv%d prefix, such as %q", family, such)
		}
		*to = p
		return unmasked(p)
	}
}

func unmasked(p netip.Prefix) error {
	if m := p.Masked(); m != p {
		return fmt.Errorf("host bits set; did you mean %s?", m)
	}
	return nil
}

func addrOf(family int, to *netip.Addr) setter {
	return func(v json.RawMessage) error {
		a, err := netip.ParseAddr(text(v))
		if err != nil || !isOf(family, a) {
			_, such := example(family)
			return fmt.Errorf("want the first address of a node's subnet, IPv%d, such as %q", family, such)
		}
		*to = a
		return nil
	}
}

func prefixes(such string, to *[]netip.Prefix) setter {
	return func(v json.RawMessage) error {
		var list []json.RawMessage
		if err := json.Unmarshal(v, &list); err != nil || v[0] != '[' {
			return fmt.Errorf("want a list of prefixes, such as [%q]", such)
		}
		for i, element := range list {
			p, err := netip.ParsePrefix(text(element))
			if err != nil || p.Addr().Is4In6() {
				return fmt.Errorf("number %d, %s: want a prefix, such as %q", i+1, quoted(element), such)
			}
			if err := unmasked(p); err != nil {
				return fmt.Errorf("number %d, %s: %w", i+1, quoted(element), err)
			}
			*to = append(*to, p)
		}
		return nil
	}
}
