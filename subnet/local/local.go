// Package local keeps leases in a directory of files, for a machine without Kubernetes.
//
// Each node has one file, named for it with .json behind, which holds one JSON object:
//
//	{
//	  "node": "n1",
//	  "since": "2026-03-01T12:00:00Z",
//	  "subnets": "10.244.3.0/24,fd00:10:244:3::/64",
//	  "host": "192.0.2.13,2001:db8::13",
//	  "backend": "vxlan",
//	  "backend-data": {"vni": 1, "port": 8472, "mac": "0e:00:00:00:00:03"},
//	  "network": "10.244.0.0/16,fd00:10:244::/48"
//	}
//
// The first three keys are the lease, with the time at which it was taken; the others are what the node published. A
// file without them is a lease of a node that is not a peer yet. A further key, "sources", is an operator's. Values are
// those of subnet.Record. Other keys, or a node that is not the file's, are refused: then the file is a Problem.
//
// Files are replaced by rename, under a lock on the file .lock. To release a node's lease, delete its file.
package local

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"

	"tweed.dev/tweed/subnet"
)

// Pauses between attempts to watch the directory, and to take a lease where no file has changed in between.
const (
	watchRetry = time.Second
	leaseRetry = 5 * time.Second
)

// A Directory offers the leases in a directory, and leases and publishes those of one node.
type Directory struct {
	dir   string
	node  string
	log   *slog.Logger
	grown chan struct{} // network has changed

	mu      sync.Mutex
	network subnet.Network
	waited  time.Time // when first only such subnets of network were free as not all nodes accept; zero before
	current bool      // the directory is watched: nothing has changed that is not in list
	known   bool      // list is one
	list    subnet.List
	self    subnet.Node
	selfErr error // why self is not known
	err     error // why the directory is not watched
}

// New returns the leases in dir for the node of that name, with subnets of network. It neither reads nor writes there
// yet: an error means that it cannot work.
func New(dir, node string, network subnet.Network, log *slog.Logger) (*Directory, error) {
	if err := checkName(node); err != nil {
		return nil, err
	}
	if len(network) == 0 {
		return nil, errors.New("there is no pod network to lease subnets of; set Network or IPv6Network in net-conf.json")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	d := &Directory{dir: dir, node: node, network: network, log: log, grown: make(chan struct{}, 1)}
	d.selfErr = fmt.Errorf("waiting for the leases in %s to be read", dir)
	return d, nil
}

// Grow has subnets leased of network from now on, and a family that is new in it leased as well.
func (d *Directory) Grow(network subnet.Network) {
	d.mu.Lock()
	d.network, d.waited = network, time.Time{}
	d.mu.Unlock()
	select {
	case d.grown <- struct{}{}:
	default:
	}
}

// pods returns the pod network.
func (d *Directory) pods() subnet.Network {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.network
}

// ListOnce reads the leases in dir once.
func ListOnce(dir string) (subnet.List, error) {
	entries, err := readAll(dir)
	if err != nil {
		return subnet.List{}, err
	}
	list := subnet.List{Generation: 1, At: time.Now()}
	list.Leases, list.Problems = listOf(entries)
	return list, nil
}

// Look reads the directory once, leasing nothing: List and Self then say what is recorded. Run does not need it.
func (d *Directory) Look() error {
	entries, err := readAll(d.dir)
	if err != nil {
		return err
	}
	self, selfErr := d.recorded(entries)
	d.record(entries, self, selfErr)
	return nil
}

// Run leases subnets for the node, unless it holds some, and keeps list and lease up to date until ctx ends. Then it
// returns nil. It calls ring after each change of what List or Self return.
func (d *Directory) Run(ctx context.Context, ring func()) error {
	for {
		err := d.watch(ctx, ring)
		if ctx.Err() != nil {
			return nil
		}
		d.lost(err)
		select {
		case <-time.After(watchRetry):
		case <-ctx.Done():
			return nil
		}
	}
}

// watch follows the directory until that fails.
func (d *Directory) watch(ctx context.Context, ring func()) error {
	if err := os.MkdirAll(d.dir, 0o755); err != nil {
		return fmt.Errorf("making the directory of the leases: %w", err)
	}
	w, err := fsnotify.NewBufferedWatcher(1024) // of many events at once, await makes one
	if err != nil {
		return fmt.Errorf("watching the leases in %s: %w; see fs.inotify.max_user_instances in sysctl", d.dir, err)
	}
	defer w.Close()
	if err := w.Add(d.dir); err != nil {
		return fmt.Errorf("watching the leases in %s: %w; see fs.inotify.max_user_watches in sysctl", d.dir, err)
	}
	for {
		if err := d.refresh(ctx, ring); err != nil {
			return err
		}
		if err := d.await(ctx, w); err != nil {
			return err
		}
	}
}

// await returns when a lease file may have changed, or when leasing should be tried again. It takes all events that
// there are.
func (d *Directory) await(ctx context.Context, w *fsnotify.Watcher) error {
	var again <-chan time.Time
	if self, err := d.Self(); err != nil || !d.isComplete(self.Subnets) {
		again = time.After(leaseRetry)
	}
	for changed := false; ; {
		if changed && len(w.Events) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-again:
			return nil
		case <-d.grown:
			return nil
		case e := <-w.Events:
			if e.Name == d.dir && e.Has(fsnotify.Remove|fsnotify.Rename) {
				return fmt.Errorf("the directory of the leases, %s, has gone", d.dir)
			}
			changed = changed || filepath.Ext(e.Name) == suffix
		case err := <-w.Errors:
			if !errors.Is(err, fsnotify.ErrEventOverflow) {
				return fmt.Errorf("watching the leases in %s: %w", d.dir, err)
			}
			changed = true
		}
	}
}

// refresh reads the directory, and leases where this node holds nothing.
func (d *Directory) refresh(ctx context.Context, ring func()) error {
	entries, err := readAll(d.dir)
	if err != nil {
		return err
	}
	self, selfErr := d.recorded(entries)
	if selfErr == nil && !d.isComplete(self.Subnets) {
		err := locked(ctx, d.dir, func() error {
			_, selfErr = d.lease()
			return nil
		})
		if err != nil {
			return err
		}
		if entries, err = readAll(d.dir); err != nil {
			return err
		}
		if selfErr == nil || isLater(selfErr) && len(self.Subnets) > 0 {
			self, selfErr = d.recorded(entries)
		}
	}
	changed := d.record(entries, self, selfErr)
	d.found()
	if changed {
		ring()
	}
	return nil
}

// recorded is what this node's file says of it: a Node without subnets if there is no file.
func (d *Directory) recorded(entries []entry) (subnet.Node, error) {
	i := indexOf(entries, d.node)
	if i < 0 {
		return subnet.Node{}, nil
	}
	e := entries[i]
	path := filepath.Join(d.dir, d.node+suffix)
	if e.err != nil {
		return subnet.Node{}, fmt.Errorf("file %s: %w; correct it, or delete it and have another subnet leased",
			path, e.err)
	}
	subnets, err := e.file.record().ParseSubnets()
	if err != nil {
		return subnet.Node{}, fmt.Errorf("file %s: %s: %w; correct it, or delete it and have another subnet leased",
			path, subnet.FieldSubnets, err)
	}
	for _, s := range subnets {
		network := d.pods()
		r, ok := network.Range(s.Addr())
		if !ok || !network.Contains(s) || s.Bits() != r.Len {
			return subnet.Node{}, fmt.Errorf("node %s holds the lease %s, which is not one of the network %s; restore the "+
				"network in net-conf.json, or delete %s and have another subnet leased", d.node, s, d.describe(), path)
		}
	}
	return subnet.Node{Name: d.node, Subnets: subnets, Since: e.file.Since, Leased: true}, nil
}

func (d *Directory) describe() string {
	text := ""
	for _, r := range d.pods() {
		if text != "" {
			text += " and "
		}
		text += fmt.Sprintf("%s (nodes' subnets are /%d)", r.Prefix, r.Len)
	}
	return text
}

// isComplete reports whether subnets has one of each family of the network.
func (d *Directory) isComplete(subnets []netip.Prefix) bool {
	return !slices.ContainsFunc(d.pods(), func(r subnet.Range) bool {
		_, ok := subnetOf(r, subnets)
		return !ok
	})
}

func subnetOf(r subnet.Range, subnets []netip.Prefix) (netip.Prefix, bool) {
	i := slices.IndexFunc(subnets, func(s netip.Prefix) bool { return s.Addr().BitLen() == r.Prefix.Addr().BitLen() })
	if i < 0 {
		return netip.Prefix{}, false
	}
	return subnets[i], true
}

// lease returns this node's file, after it has taken a free subnet of each family in which the node had none. Where that
// is better done later, the error isLater, and the file is as it was. It is for the holder of the lock.
func (d *Directory) lease() (file, error) {
	if err := removeTemps(d.dir); err != nil {
		return file{}, fmt.Errorf("cleaning up in %s: %w", d.dir, err)
	}
	entries, err := readAll(d.dir)
	if err != nil {
		return file{}, err
	}
	held, err := d.recorded(entries)
	if err != nil {
		return file{}, err
	}
	f := file{Node: d.node, Since: time.Now().UTC()}
	if i := indexOf(entries, d.node); i >= 0 {
		f = entries[i].file
	} else if before, err := d.Self(); err == nil {
		f.Since = before.Since
	}
	if d.isComplete(held.Subnets) {
		return f, nil
	}
	subnets, err := d.choose(entries, held.Subnets)
	if err != nil {
		return f, err
	}
	f.Subnets = subnet.RecordOf(asLeases(subnets)).Subnets
	if err := write(d.dir, f); err != nil {
		return file{}, fmt.Errorf("recording the lease of node %s in %s: %w", d.node, d.dir, err)
	}
	d.log.Info("subnet leased", "node", d.node, "subnets", f.Subnets)
	return f, nil
}

func indexOf(entries []entry, node string) int {
	return slices.IndexFunc(entries, func(e entry) bool { return e.node == node })
}

func asLeases(subnets []netip.Prefix) (leases []subnet.Lease) {
	for _, s := range subnets {
		leases = append(leases, subnet.Lease{Subnet: s})
	}
	return leases
}

// choose completes held by a free subnet of each further family: the one that this process held before if that is still
// possible, so that pods keep their addresses when the file was deleted; else the first from a number on that is made
// from the node's name, so that a node mostly gets back what it had.
func (d *Directory) choose(entries []entry, held []netip.Prefix) ([]netip.Prefix, error) {
	var taken []netip.Prefix
	for _, e := range entries {
		taken = append(taken, e.subnets()...)
	}
	before, _ := d.Self()
	var subnets []netip.Prefix
	for _, r := range d.pods() {
		if s, ok := subnetOf(r, held); ok {
			subnets = append(subnets, s)
			continue
		}
		free := func(s netip.Prefix) bool { return !slices.ContainsFunc(taken, s.Overlaps) }
		if s, ok := subnetOf(r, before.Subnets); ok && r.Check(s) == nil && free(s) {
			subnets = append(subnets, s)
			continue
		}
		s, ok, err := d.pick(r, taken, standings(entries))
		if err != nil {
			return nil, err
		}
		if !ok {
			return nil, fmt.Errorf("no subnet is free for node %s: all %d of length /%d in %s are leased, the longest %s; "+
				"delete the files of nodes that are gone from %s, or configure a larger network",
				d.node, r.Count(), r.Len, r.Prefix, oldest(entries, r), d.dir)
		}
		subnets = append(subnets, s)
	}
	return subnets, nil
}

// A laterError says why subnets that are free are not leased yet.
type laterError struct{ error }

func isLater(err error) bool { return errors.As(err, new(laterError)) }

// pick chooses a free subnet, if possible of those that all nodes accept.
func (d *Directory) pick(r subnet.Range, taken []netip.Prefix, all subnet.Listing) (s netip.Prefix, ok bool, err error) {
	parts, by := all.Unaccepted(r, d.node)
	if s, ok = first(r, d.node, slices.Concat(taken, parts)); ok || len(parts) == 0 {
		return s, ok, nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if s, ok = first(r, d.node, taken); ok {
		if d.waited.IsZero() {
			d.waited = time.Now()
		}
		if time.Since(d.waited) < subnet.AcceptPatience {
			return s, false, laterError{errors.New(subnet.NotAccepted(r, by))}
		}
	}
	return s, ok, nil
}

func first(r subnet.Range, node string, taken []netip.Prefix) (netip.Prefix, bool) {
	h := fnv.New64a()
	h.Write([]byte(node))
	for s := range r.Free(h.Sum64(), taken) {
		return s, true
	}
	return netip.Prefix{}, false
}

// record makes what was read what List and Self return, and reports whether either has changed.
func (d *Directory) record(entries []entry, self subnet.Node, selfErr error) bool {
	leases, problems := listOf(entries)
	if selfErr == nil && len(self.Subnets) == 0 {
		selfErr = fmt.Errorf("node %s has no lease in %s; it takes one when the daemon runs", d.node, d.dir)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	listSame := d.known && slices.EqualFunc(d.list.Leases, leases, subnet.Lease.Equal) &&
		slices.Equal(d.list.Problems, problems)
	selfSame := slices.Equal(d.self.Subnets, self.Subnets) && d.self.Since.Equal(self.Since) &&
		equalErrors(d.selfErr, selfErr)
	if !listSame {
		d.list.Leases, d.list.Problems = leases, problems
		d.list.Generation++
	}
	d.list.At = time.Now()
	d.known = true
	d.self, d.selfErr = self, selfErr
	return !listSame || !selfSame
}

// found records that the directory is watched.
func (d *Directory) found() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil {
		d.log.Info("leases watched again", "dir", d.dir)
	}
	d.current, d.err = true, nil
}

func equalErrors(a, b error) bool {
	if a == nil || b == nil {
		return a == nil && b == nil
	}
	return a.Error() == b.Error()
}

// lost records that the directory cannot be watched, and why.
func (d *Directory) lost(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err == nil {
		d.log.Warn("leases cannot be watched, the last complete list stays in force", "err", err)
	}
	if d.current {
		d.list.At = time.Now()
	}
	d.current, d.err = false, err
}

// List returns what the directory's files say; false before they were first read. Its slices must not be changed.
func (d *Directory) List() (subnet.List, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	list := d.list
	if d.current {
		list.At = time.Now()
	}
	return list, d.known
}

// Self returns this node with its leased subnets, or an error that says what they wait for.
func (d *Directory) Self() (subnet.Node, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.selfErr != nil && d.err != nil {
		return subnet.Node{}, d.err
	}
	return d.self, d.selfErr
}

// Err says why List and Self may be out of date: the directory cannot be watched. It is nil while all is well.
func (d *Directory) Err() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err
}

// Publish writes this node's leases into its file, only if something differs from what is there. They are of subnets
// that Self returns; with none, the node keeps its subnets but is not a peer any more.
func (d *Directory) Publish(ctx context.Context, leases []subnet.Lease) error {
	for _, l := range leases {
		if !l.Host.IsValid() {
			return fmt.Errorf("cannot publish %s of node %s: it has no address for the tunnel yet", l.Subnet, d.node)
		}
	}
	want := subnet.RecordOf(leases)
	have := readEntry(d.dir, d.node)
	if have.err == nil && have.file.says(want) && checkHeld(have.subnets(), leases) == nil {
		return nil
	}
	err := locked(ctx, d.dir, func() error {
		f, err := d.lease()
		if err != nil && (f.Subnets == "" || !isLater(err)) {
			return err
		}
		if err := checkHeld(entry{file: f}.subnets(), leases); err != nil {
			return err
		}
		f.Host, f.Backend, f.Data, f.Network = want.Host, want.Backend, []byte(want.Data), want.Network
		return write(d.dir, f)
	})
	if err != nil {
		return fmt.Errorf("cannot publish the lease of node %s: %w", d.node, err)
	}
	return nil
}

func checkHeld(held []netip.Prefix, leases []subnet.Lease) error {
	for _, l := range leases {
		if !slices.Contains(held, l.Subnet) {
			return fmt.Errorf("%s is not leased any more, but %v; the next pass publishes that", l.Subnet, held)
		}
	}
	return nil
}
