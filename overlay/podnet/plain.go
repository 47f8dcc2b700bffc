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

// members takes a JSON object apart: names, and values as they are written. It declines (nil) what is no object, and
// names with escapes or twice.
func members(text []byte) map[string]json.RawMessage {
	if !json.Valid(text) { // from here on, what begins also ends
		return nil
	}
	text = bytes.TrimSpace(text)
	if text[0] != '{' {
		return nil
	}
	found := map[string]json.RawMessage{}
	for rest := skip(text[1:]); rest[0] != '}'; {
		size := valueSize(rest)
		name, ok := plainString(rest[:size])
		if _, twice := found[name]; twice || !ok {
			return nil
		}
		rest = skip(skip(rest[size:])[1:]) // the colon
		size = valueSize(rest)
		found[name] = json.RawMessage(rest[:size])
		if rest = skip(rest[size:]); rest[0] == ',' {
			rest = skip(rest[1:])
		}
	}
	return found
}

// elements is members for an array; ok is false where it declines.
func elements(text []byte) (found []json.RawMessage, ok bool) {
	if len(text) == 0 || text[0] != '[' {
		return nil, false
	}
	for rest := skip(text[1:]); rest[0] != ']'; {
		size := valueSize(rest)
		found = append(found, json.RawMessage(rest[:size]))
		if rest = skip(rest[size:]); rest[0] == ',' {
			rest = skip(rest[1:])
		}
	}
	return found, true
}

func skip(text []byte) []byte { return bytes.TrimLeft(text, " \t\r\n") }

// valueSize is the length of the value that valid JSON begins with.
func valueSize(text []byte) int {
	depth, quoted := 0, false
	for i := 0; i < len(text); i++ {
		switch c := text[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
			if !quoted && depth == 0 {
				return i + 1
			}
		case quoted:
		case c == '{' || c == '[':
			depth++
		case c == '}' || c == ']':
			if depth == 0 { // the end of what the value is in
				return i
			}
			if depth--; depth == 0 {
				return i + 1
			}
		case depth == 0 && strings.IndexByte(", \t\r\n", c) >= 0:
			return i
		}
	}
	return len(text)
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

func (w *plainWriter) quote(s string) *plainWriter {
	for _, c := range []byte(s) {
		w.fine = w.fine && c >= ' ' && c <= '~' && !strings.ContainsRune(`"\<>&`, rune(c))
	}
	w.text = append(append(append(w.text, '"'), s...), '"')
	return w
}
