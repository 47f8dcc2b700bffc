package podnet

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
)

// What runtime and daemon write is read here, as long as it is as they write it. encoding/json finds out by reflection
// what it could know, anew in each process, and that is a quarter of the time of an ADD. Whatever looks unusual is left
// to it, and with it every error; so nothing here has to be complete, but all of it has to be right.

// members takes a JSON object apart: names, and values as they are written. It declines (nil) what is no object or not
// plain, and names twice.
func members(text []byte) map[string]json.RawMessage {
	text = bytes.Trim(text, space)
	if plainSize(text) != len(text) || len(text) == 0 || text[0] != '{' {
		return nil
	}
	found := map[string]json.RawMessage{}
	for rest := skip(text[1:]); rest[0] != '}'; {
		size := plainSize(rest)
		name, _ := plainString(rest[:size])
		if _, twice := found[name]; twice {
			return nil
		}
		rest = skip(skip(rest[size:])[1:]) // the colon
		size = plainSize(rest)
		found[name] = json.RawMessage(rest[:size])
		if rest = skip(rest[size:]); rest[0] == ',' {
			rest = skip(rest[1:])
		}
	}
	return found
}

// elements is members for an array; ok is false where it declines.
func elements(text []byte) (found []json.RawMessage, ok bool) {
	if plainSize(text) != len(text) || len(text) == 0 || text[0] != '[' {
		return nil, false
	}
	for rest := skip(text[1:]); rest[0] != ']'; {
		size := plainSize(rest)
		found = append(found, json.RawMessage(rest[:size]))
		if rest = skip(rest[size:]); rest[0] == ',' {
			rest = skip(rest[1:])
		}
	}
	return found, true
}

const space = " \t\r\n" // as JSON has it

func skip(text []byte) []byte { return bytes.TrimLeft(text, space) }

// plainSize is the length of the JSON value (RFC 8259) that text begins with; 0 where there is none, or one that is not
// plain: deep, or with strings that plainString declines, or numbers other than small natural ones.
func plainSize(text []byte) int { return plainSizeWithin(text, 10) }

func plainSizeWithin(text []byte, depth int) int {
	if len(text) == 0 || depth == 0 {
		return 0
	}
	switch c := text[0]; {
	case c == '{' || c == '[':
		return plainListSize(text, depth)
	case c == '"':
		end := bytes.IndexByte(text[1:], '"') + 2
		if _, ok := plainString(text[:end]); !ok || end < 2 {
			return 0
		}
		return end
	case '1' <= c && c <= '9':
		end := len(text) - len(bytes.TrimLeft(text, "0123456789"))
		if _, ok := plainNumber(text[:end]); !ok {
			return 0
		}
		return end
	}
	for _, word := range []string{"true", "false", "null", "0"} {
		if bytes.HasPrefix(text, []byte(word)) {
			return len(word)
		}
	}
	return 0
}

// plainListSize is plainSizeWithin for an object or an array.
func plainListSize(text []byte, depth int) int {
	last := text[0] + 2 // in ASCII, what closes comes two after what opens
	rest := skip(text[1:])
	for first := true; ; first = false {
		if first && len(rest) > 0 && rest[0] == last {
			return len(text) - len(rest) + 1
		}
		if last == '}' {
			size := 0
			if len(rest) > 0 && rest[0] == '"' {
				size = plainSizeWithin(rest, depth-1)
			}
			if rest = skip(rest[size:]); size == 0 || len(rest) == 0 || rest[0] != ':' {
				return 0
			}
			rest = skip(rest[1:])
		}
		size := plainSizeWithin(rest, depth-1)
		if rest = skip(rest[size:]); size == 0 || len(rest) == 0 {
			return 0
		}
		switch rest[0] {
		case last:
			return len(text) - len(rest) + 1
		case ',':
			rest = skip(rest[1:])
		default:
			return 0
		}
	}
}

// plainString reads a string of printable ASCII without escapes.
func plainString(value []byte) (s string, ok bool) {
	if len(value) < 2 || value[0] != '"' {
		return "", false
	}
	for _, c := range value[1 : len(value)-1] {
		if c < ' ' || c > '~' || c == '\\' {
			return "", false
		}
	}
	return string(value[1 : len(value)-1]), true
}

// unmarshal is json.Unmarshal, with a short way to a string and to an object taken apart.
func unmarshal(value json.RawMessage, to any) error {
	switch to := to.(type) {
	case *string:
		if s, ok := plainString(value); ok {
			*to = s
			return nil
		}
	case *map[string]json.RawMessage:
		if m := members(value); m != nil {
			*to = m
			return nil
		}
	case *json.RawMessage:
		*to = value
		return nil
	}
	return json.Unmarshal(value, to)
}

// plain reads a NodeInfo as Write writes it, and reports whether it could.
func (n *NodeInfo) plain(text []byte) bool {
	for name, value := range members(text) {
		ok := false
		switch name {
		case "version":
			ok = string(value) == "1"
			n.Version = 1
		case "converged":
			n.Converged = string(value) == "true"
			ok = n.Converged || string(value) == "false"
		case "bootID":
			n.BootID, ok = plainString(value)
		case "node":
			n.Node, ok = plainString(value)
		case "bridge":
			n.Bridge, ok = plainString(value)
		case "device":
			n.Device, ok = plainString(value)
		case "packetFilter":
			n.PacketFilter, ok = plainString(value)
		case "spoofing":
			ok = string(value) == "{}" || json.Unmarshal(value, &n.Spoofing) == nil
		case "networks":
			n.Networks, ok = plainList(value, netip.ParsePrefix)
		case "subnets":
			n.Subnets, ok = plainList(value, netip.ParsePrefix)
		case "gateways":
			n.Gateways, ok = plainList(value, netip.ParseAddr)
		case "mtu":
			n.MTU, ok = plainNumber(value)
		}
		if !ok {
			return false
		}
	}
	return n.Version == 1
}

func plainList[T any](value []byte, parse func(string) (T, error)) (list []T, ok bool) {
	texts, ok := elements(value)
	if !ok {
		return nil, false
	}
	list = make([]T, 0, len(texts))
	for _, text := range texts {
		s, ok := plainString(text)
		if !ok {
			return nil, false
		}
		one, err := parse(s)
		if err != nil {
			return nil, false
		}
		list = append(list, one)
	}
	return list, true
}

// plainNumber reads a natural number of at most nine digits.
func plainNumber(value []byte) (n int, ok bool) {
	for _, c := range value {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = 10*n + int(c-'0')
	}
	return n, len(value) > 0 && len(value) < 10
}

// plain is r as encoding/json writes it; nil where it declines, as it does for what has delegates.
func (r record) plain() []byte {
	w := plainWriter{fine: len(r.Delegates) == 0 && r.Delegates != nil}
	w.add(`{"network":`).quote(r.Network).add(`,"container":`).quote(r.Container)
	w.add(`,"interface":`).quote(r.Interface).add(`,"veth":`).quote(r.Veth)
	w.add(`,"ifindex":` + strconv.Itoa(r.Index) + `,"mac":"` + r.MAC.String() + `","addresses":`).list(r.Addrs)
	if len(r.Apart) > 0 {
		w.add(`,"apart":`).list(r.Apart)
	}
	if r.Namespace != "" {
		w.add(`,"namespace":`).quote(r.Namespace)
	}
	w.add(`,"delegates":[]}`)
	if !w.fine {
		return nil
	}
	return w.text
}

// PrintResult prints a result as types.PrintResult does, but for its spaces.
func PrintResult(r *types100.Result, version string) error {
	text := plainResult(r, version)
	if text == nil {
		return types.PrintResult(r, version)
	}
	_, err := os.Stdout.Write(text)
	return err
}

// plainResult is r in JSON; nil where it declines, as it does for what Attach by itself does not make.
func plainResult(r *types100.Result, version string) []byte {
	if version != "1.0.0" && version != "1.1.0" || !r.DNS.IsEmpty() {
		return nil
	}
	w := plainWriter{fine: true}
	w.add(`{"cniVersion":`).quote(version).add(`,"interfaces":[`)
	for i, f := range r.Interfaces {
		w.comma(i).add(`{"name":`).quote(f.Name).add(`,"mac":`).quote(f.Mac).add(`,"mtu":` + strconv.Itoa(f.Mtu))
		if f.Sandbox != "" {
			w.add(`,"sandbox":`).quote(f.Sandbox)
		}
		w.add("}").fine = w.fine && f.Mtu > 0 && f.Mac != "" && f.SocketPath == "" && f.PciID == ""
	}
	w.add(`],"ips":[`)
	for i, ip := range r.IPs {
		if ip.Interface == nil || ip.Gateway == nil {
			return nil
		}
		w.comma(i).add(`{"interface":` + strconv.Itoa(*ip.Interface) + `,"address":`).quote(ip.Address.String())
		w.add(`,"gateway":`).quote(ip.Gateway.String()).add("}")
	}
	w.add(`],"routes":[`)
	for i, route := range r.Routes {
		bare := types.Route{Dst: route.Dst, GW: route.GW}
		w.comma(i).add(`{"dst":`).quote(bare.Dst.String()).add(`,"gw":`).quote(bare.GW.String()).add("}")
		w.fine = w.fine && bare.GW != nil && route.String() == bare.String()
	}
	w.add("]}")
	if !w.fine || len(r.Interfaces) == 0 || len(r.IPs) == 0 || len(r.Routes) == 0 {
		return nil
	}
	return w.text
}

// A plainWriter collects JSON, and stays fine as long as no string needs an escape.
type plainWriter struct {
	text []byte
	fine bool
}

func (w *plainWriter) add(text string) *plainWriter {
	w.text = append(w.text, text...)
	return w
}

func (w *plainWriter) comma(i int) *plainWriter {
	if i > 0 {
		w.text = append(w.text, ',')
	}
	return w
}

func (w *plainWriter) list(prefixes []netip.Prefix) *plainWriter {
	if prefixes == nil {
		return w.add("null")
	}
	w.add("[")
	for i, p := range prefixes {
		w.comma(i).add(`"` + p.String() + `"`)
	}
	return w.add("]")
}

func (w *plainWriter) quote(s string) *plainWriter {
	for _, c := range []byte(s) {
		w.fine = w.fine && c >= ' ' && c <= '~' && !strings.ContainsRune(`"\<>&`, rune(c))
	}
	w.text = append(append(append(w.text, '"'), s...), '"')
	return w
}
