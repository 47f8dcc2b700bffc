package podnet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
)

// DelegatePath is where Sweep finds the plugins that pods' ports and bandwidth were delegated to, in the form of
// CNI_PATH: where tweed's image has them, and where hosts do.
const DelegatePath = "/usr/lib/tweed/cni:/opt/cni/bin:/usr/lib/cni"

// delegateVersion is the newest CNI version that delegates are called with. Those on many hosts, Debian 12's among
// them, know none newer, and what they do needs none.
const delegateVersion = "1.0.0"

// A delegate is a plugin of others that does a part of the work for those pods that ask for it.
type delegate struct {
	Plugin string
	// Capability is what it is asked by, a key of runtimeConfig (CNI conventions, "Dynamic Plugin specific Fields").
	Capability string
	// Wish is what a pod's manifest says.
	Wish string
}

// delegates are in the order of ADD.
func delegates() []delegate {
	return []delegate{
		{"portmap", "portMappings", "hostPort"},
		{"bandwidth", "bandwidth", "bandwidth limit"},
	}
}

// Capabilities are what a network configuration must declare for the runtime to say what a pod asks for.
func Capabilities() map[string]bool {
	declared := map[string]bool{"ips": true, "mac": true}
	for _, d := range delegates() {
		declared[d.Capability] = true
	}
	return declared
}

// A delegation is the network configuration that a delegate is called with. Neither delegate needs the result of the
// ADD to take back what it did, so it is not kept.
type delegation struct {
	CNIVersion    string                     `json:"cniVersion"`
	Name          string                     `json:"name"` // of the network; delegates name their things after it
	Type          string                     `json:"type"`
	SNAT          bool                       `json:"snat,omitempty"`
	Backend       string                     `json:"backend,omitempty"`
	RuntimeConfig map[string]json.RawMessage `json:"runtimeConfig"`
	PrevResult    json.RawMessage            `json:"prevResult,omitempty"`
	// Container stands for the container's name where that is not the pod's first interface: delegates name their things
	// after the container alone. It is for us alone.
	Container string `json:"tweed.dev/container,omitempty"`
	// Legacy says that the host's iptables is the older one, which keeps its rules apart. It is for us alone.
	Legacy bool `json:"tweed.dev/legacy,omitempty"`
}

// firstInterface is what runtimes call a pod's first interface.
const firstInterface = "eth0"

// Delegates reports whether the pod asks for what further plugins do, which can take long.
func (c Config) Delegates() bool {
	return slices.ContainsFunc(delegates(), func(d delegate) bool { return asks(c.RuntimeConfig[d.Capability]) })
}

// delegations are what this call's configuration asks for, on a node whose packet filter has that form. The error says
// what the host lacks for one that is left out.
func (c Config) delegations(p Pod, form string) (wanted []delegation, err error) {
	for _, d := range delegates() {
		if !asks(c.RuntimeConfig[d.Capability]) {
			continue
		}
		n, lacks := c.delegation(d, p, form)
		if lacks == nil {
			wanted = append(wanted, n)
		} else if err == nil {
			err = lacks
		}
	}
	return wanted, err
}

func (c Config) delegation(d delegate, p Pod, form string) (delegation, error) {
	wish := c.RuntimeConfig[d.Capability]
	n := delegation{CNIVersion: c.CNIVersion, Name: c.Name, Type: d.Plugin}
	if newer, err := version.GreaterThan(n.CNIVersion, delegateVersion); err == nil && newer {
		n.CNIVersion = delegateVersion
	}
	if p.Interface != firstInterface {
		n.Container = p.Container + "-" + vethName(p.Container, p.Interface)
	}
	file, err := findPlugin(d.Plugin, p.Path)
	if err != nil {
		return n, err
	}
	switch d.Plugin {
	case "portmap":
		if n.Backend, err = portmapBackend(form, file); err != nil {
			return n, err
		}
		n.SNAT, n.Legacy = true, n.Backend == iptables && legacyIptables()
	case "bandwidth":
		wish = withBurst(wish)
	}
	n.RuntimeConfig = map[string]json.RawMessage{d.Capability: wish}
	return n, nil
}

// A limit is a bandwidth wish. Rates are in bits per second, bursts in bits.
type limit struct {
	IngressRate  uint64 `json:"ingressRate,omitempty"`
	IngressBurst uint64 `json:"ingressBurst,omitempty"`
	EgressRate   uint64 `json:"egressRate,omitempty"`
	EgressBurst  uint64 `json:"egressBurst,omitempty"`
}

// withBurst gives a wish bursts where the runtime has none in mind, and says so by the largest number: a pod would have
// its first gigabytes without any limit.
func withBurst(wish json.RawMessage) json.RawMessage {
	var l limit
	if json.Unmarshal(wish, &l) != nil || max(l.IngressBurst, l.EgressBurst) < math.MaxInt32 {
		return wish
	}
	for _, way := range []struct {
		rate  uint64
		burst *uint64
	}{{l.IngressRate, &l.IngressBurst}, {l.EgressRate, &l.EgressBurst}} {
		if way.rate > 0 && *way.burst >= math.MaxInt32 {
			// 100 ms' worth; 16 KiB, because what is larger than a burst never passes
			*way.burst = max(way.rate/10, 16<<10*8)
		}
	}
	text, err := json.Marshal(l)
	if err != nil {
		return wish
	}
	return text
}

// asks reports whether a value of runtimeConfig asks for anything: runtimes also pass what is empty.
func asks(wish json.RawMessage) bool {
	var list []json.RawMessage
	if json.Unmarshal(wish, &list) == nil {
		return len(list) > 0
	}
	var limits map[string]uint64 // each runtime has its own spelling of the keys
	if json.Unmarshal(wish, &limits) == nil {
		for _, limit := range limits {
			if limit > 0 {
				return true
			}
		}
		return false
	}
	return len(wish) > 0 // the delegate says what is wrong with it
}

// delegate has the delegates do their part, each written down before it is called. It returns the last one's result.
func (h *hold) delegate(ctx context.Context, wanted []delegation, p Pod, r *types100.Result) (*types100.Result, error) {
	for _, d := range wanted {
		if err := h.note(d); err != nil {
			return nil, err
		}
		var err error
		if d.PrevResult, err = resultIn(d.CNIVersion, r); err != nil {
			return nil, fmt.Errorf("%s: %w", d.Type, err)
		}
		// It is not killed when ctx ends: what it has started would go on.
		out, err := h.store.call("ADD", d, p, h.file)
		if err != nil {
			return nil, err
		}
		if r, err = readResult(d.CNIVersion, out); err != nil {
			return nil, fmt.Errorf("%s: its result: %w", d.Type, err)
		}
		if err := context.Cause(ctx); err != nil {
			return nil, fmt.Errorf("interrupted (%w)", err)
		}
	}
	return r, nil
}

// note writes down that a delegate will be called.
func (h *hold) note(d delegation) error {
	text, err := json.Marshal(d)
	if err != nil {
		return err
	}
	h.Delegates = append(h.Delegates, text)
	return h.save()
}

// undelegate has the delegates take back what they did, the last one first.
func (h *hold) undelegate() error {
	var errs []error
	for _, text := range slices.Backward(h.Delegates) {
		var d delegation
		if err := json.Unmarshal(text, &d); err != nil {
			errs = append(errs, err)
			continue
		}
		_, err := h.store.call("DEL", d, Pod{Container: h.Container, Interface: h.Interface}, h.file)
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("container %s, interface %s: %w; until that can be done the addresses %v stay taken, and the "+
			"tweed daemon tries again every 30 s, with the plugins of its image", h.Container, h.Interface, err, h.Addrs)
	}
	return nil
}

// undelegateUnrecorded does what the runtime alone remembers. Nobody can tell whether there is anything to take back,
// or ever will, so a failure is said and is none.
func (s *store) undelegateUnrecorded(c Config, p Pod) {
	info, _ := ReadNodeInfo(s.runDir) // without one, the form is iptables
	wanted, err := c.delegations(p, info.PacketFilter)
	errs := []error{err}
	for _, d := range slices.Backward(wanted) {
		_, err := s.call("DEL", d, p, nil)
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		fmt.Fprintf(os.Stderr, "tweed-cni: container %s has no record; taking back what it may have had: %v\n",
			p.Container, err)
	}
}

// brokenDelegates asks the delegates what is wrong with their part.
func (s *store) brokenDelegates(c Config, p Pod, rec record) (broken []error) {
	for _, text := range rec.Delegates {
		broken = append(broken, s.checkDelegate(c, p, text))
	}
	return slices.DeleteFunc(broken, func(err error) bool { return err == nil })
}

func (s *store) checkDelegate(c Config, p Pod, text json.RawMessage) error {
	var d delegation
	if err := json.Unmarshal(text, &d); err != nil {
		return err
	}
	prev, err := readResult(c.CNIVersion, c.PrevResult)
	if err != nil {
		return fmt.Errorf("prevResult: %w", err)
	}
	if d.PrevResult, err = resultIn(d.CNIVersion, prev); err != nil {
		return fmt.Errorf("%s: %w", d.Type, err)
	}
	_, err = s.call("CHECK", d, p, nil)
	return err
}

func resultIn(version string, r *types100.Result) (json.RawMessage, error) {
	older, err := r.GetAsVersion(version)
	if err != nil {
		return nil, err
	}
	return json.Marshal(older)
}

func readResult(v string, text []byte) (*types100.Result, error) {
	r, err := version.NewResult(v, text)
	if err != nil {
		return nil, err
	}
	return types100.GetResult(r)
}
