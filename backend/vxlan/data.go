package vxlan

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"

	"tweed.dev/tweed/backend"
)

const maxVNI = 1<<24 - 1 // RFC 7348, section 5: 24 bits

// Data is what a lease says for others to reach its node's VTEP.
type Data struct {
	VNI  uint32      `json:"vni"`
	Port uint16      `json:"port"`
	MAC  backend.MAC `json:"mac"`
	// Inside says of the node's own addresses which take part in the overlay. Nodes of older versions do not say.
	Inside Inside `json:"inside,omitzero"`
}

// Data is this node's own, as it goes into its leases.
func (c Config) Data() json.RawMessage {
	return fmt.Appendf(nil, `{"vni":%d,"port":%d,"mac":"%v","inside":%s}`, c.VNI, c.Port, MAC(c.Node), c.inside().text())
}

// ParseData reads the Data of a lease. Keys that it does not know are left for later versions.
func ParseData(raw json.RawMessage) (Data, error) {
	var keys map[string]json.RawMessage
	if err := json.Unmarshal(raw, &keys); err != nil || keys == nil {
		return Data{}, fmt.Errorf(`%s is not a JSON object like {"vni":1,"port":8472,"mac":"0e:6b:2c:01:02:03"}`, quote(raw))
	}
	var d Data
	if v, ok := keys["inside"]; ok && json.Unmarshal(v, &d.Inside) != nil {
		return Data{}, fmt.Errorf(`"inside" is %s, not a list of address families such as [4,6]`, quote(v))
	}
	for _, f := range []struct {
		key  string
		to   any
		good func() bool
		want string
	}{
		{"vni", &d.VNI, func() bool { return 0 < d.VNI && d.VNI <= maxVNI }, "a VNI from 1 to 16777215"},
		{"port", &d.Port, func() bool { return d.Port != 0 }, "a UDP port from 1 to 65535"},
		{"mac", &d.MAC, func() bool { return d.MAC.IsUnicast() }, "one interface's MAC address such as 0e:6b:2c:01:02:03"},
	} {
		v, ok := keys[f.key]
		if !ok {
			return Data{}, fmt.Errorf("%s has no %q", quote(raw), f.key)
		}
		if json.Unmarshal(v, f.to) != nil || !f.good() {
			return Data{}, fmt.Errorf("%q is %s, not %s", f.key, quote(v), f.want)
		}
	}
	return d, nil
}

// parse is ParseData, but quick where raw is just as this node would write it, for another MAC. Nearly all of it is, and
// there are thousands.
func (c Config) parse(raw json.RawMessage) (Data, error) {
	const macLen = len("0e:6b:2c:01:02:03")
	rest, vni := cutNumber(raw, `{"vni":`, uint64(c.VNI))
	rest, port := cutNumber(rest, `,"port":`, uint64(c.Port))
	rest, mac := bytes.CutPrefix(rest, []byte(`,"mac":"`))
	if !vni || !port || !mac || len(rest) < macLen {
		return ParseData(raw)
	}
	inside, plain := insideOf(rest[macLen:])
	if m, err := backend.ParseMAC(string(rest[:macLen])); plain && err == nil && m.IsUnicast() {
		return Data{VNI: c.VNI, Port: c.Port, MAC: m, Inside: inside}, nil
	}
	return ParseData(raw)
}

// cutNumber returns b without what it begins with, and whether that is prefix and n in decimal.
func cutNumber(b []byte, prefix string, n uint64) (rest []byte, found bool) {
	var digits [20]byte // as many as the largest has
	rest, prefixed := bytes.CutPrefix(b, []byte(prefix))
	rest, found = bytes.CutPrefix(rest, strconv.AppendUint(digits[:0], n, 10))
	return rest, prefixed && found
}

// quote shows a value that somebody else wrote: shortened, and nothing in it that a terminal obeys.
func quote(v []byte) string {
	const most = 80
	if len(v) > most {
		return fmt.Sprintf("%q...", v[:most])
	}
	odd := func(r rune) bool { return r < ' ' || r > '~' }
	if json.Valid(v) && bytes.IndexFunc(v, odd) < 0 {
		return string(v)
	}
	return fmt.Sprintf("%q", v)
}
