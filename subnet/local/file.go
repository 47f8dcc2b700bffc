package local

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"tweed.dev/tweed/subnet"
)

const (
	suffix     = ".json"
	lockName   = ".lock"
	tempPrefix = ".new-" // such a file is being written, or its writer died
	maxFile    = 16 << 10
	maxName    = 255 - len(suffix) // NAME_MAX of linux/limits.h
)

// A file is what a lease file says.
type file struct {
	Node    string          `json:"node"`
	Since   time.Time       `json:"since"`
	Subnets string          `json:"subnets"`
	Host    string          `json:"host,omitempty"`
	Backend string          `json:"backend,omitempty"`
	Data    json.RawMessage `json:"backend-data,omitempty"`
	Network string          `json:"network,omitempty"`
	Sources string          `json:"sources,omitempty"`
}

func (f file) record() subnet.Record {
	return subnet.Record{
		Subnets: f.Subnets, Host: f.Host, Backend: f.Backend, Data: string(f.Data), Network: f.Network, Sources: f.Sources,
	}
}

// published reports whether the node has said how it is reached. Until then it is not a peer.
func (f file) published() bool { return f.Host != "" || f.Backend != "" || len(f.Data) > 0 }

// says reports whether the file publishes what r does, subnets left aside.
func (f file) says(r subnet.Record) bool {
	return f.Host == r.Host && f.Backend == r.Backend && string(f.Data) == r.Data && f.Network == r.Network
}

// dnsSubdomain is the form of a Node's name (RFC 1123, section 2.1), which is also safe as that of a file.
var dnsSubdomain = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)

func checkName(node string) error {
	if len(node) > maxName || !dnsSubdomain.MatchString(node) {
		return fmt.Errorf("%s cannot be the name of a node: at most %d lower-case letters, digits, hyphens and dots are "+
			"possible, with a letter or digit at both ends; give another --node-name", subnet.Quote(node), maxName)
	}
	return nil
}

func decode(b []byte) (file, error) {
	var f file
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&f); err != nil {
		return f, fmt.Errorf("%s is not a lease: %s", subnet.Quote(string(b)), terse(err))
	}
	if _, err := d.Token(); err != io.EOF {
		return f, fmt.Errorf("%s is followed by something else", subnet.Quote(string(b)))
	}
	if f.Since.IsZero() {
		return f, errors.New(`the key "since" is missing`)
	}
	if len(f.Data) > 0 {
		var data bytes.Buffer
		if err := json.Compact(&data, f.Data); err != nil {
			return f, err
		}
		f.Data = data.Bytes()
	}
	return f, nil
}

// terse is what err says, without the end where it repeats a long value.
func terse(err error) string {
	const most = 120
	if s := err.Error(); len(s) > most {
		return strings.ToValidUTF8(s[:most], "") + "..."
	}
	return err.Error()
}

func encode(f file) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false) // what the backend wrote is kept to the letter
	err := e.Encode(f)
	return b.Bytes(), err
}

// An entry is one file of the directory: what it says, or why it cannot be read.
type entry struct {
	node string
	file file
	err  error
}

func readEntry(dir, node string) entry {
	e := entry{node: node}
	var b []byte
	if b, e.err = readLimited(filepath.Join(dir, node+suffix)); e.err != nil {
		return e
	}
	if e.file, e.err = decode(b); e.err == nil && e.file.Node != node {
		e.err = fmt.Errorf("names node %s instead of %s", subnet.Quote(e.file.Node), node)
	}
	return e
}

func readLimited(path string) ([]byte, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() { // a pipe would keep us waiting
		return nil, errors.New("is not a regular file")
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(b) > maxFile {
		err = fmt.Errorf("is larger than %d bytes", maxFile)
	}
	return b, err
}

// leases reads what the entry's node published.
func (e entry) leases() ([]subnet.Lease, []subnet.Problem) {
	where := e.node + suffix
	if e.err != nil {
		text := fmt.Sprintf("file %s: %v; pods on %s cannot be reached until tweed on %s writes it again",
			where, e.err, e.node, e.node)
		return nil, []subnet.Problem{{Node: e.node, Kind: subnet.KindAnnotation, Text: text}}
	}
	if !e.file.published() {
		return nil, nil
	}
	return e.file.record().Leases(e.node, e.file.Since, "file "+where+": ")
}

// subnets are those that the entry's node holds, as far as can be read.
func (e entry) subnets() []netip.Prefix {
	s, err := e.file.record().ParseSubnets()
	if err != nil {
		return nil
	}
	return s
}

// readAll reads the directory's lease files, in the order of their names.
func readAll(dir string) ([]entry, error) {
	names, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("reading the leases: %w; give the directory that the daemons were given", err)
	}
	var entries []entry
	for _, n := range names {
		node, ok := strings.CutSuffix(n.Name(), suffix)
		if !ok || strings.HasPrefix(node, ".") {
			continue
		}
		if err := checkName(node); err != nil {
			entries = append(entries, entry{node: subnet.Quote(node), err: err})
			continue
		}
		if e := readEntry(dir, node); !errors.Is(e.err, fs.ErrNotExist) { // else gone since
			entries = append(entries, e)
		}
	}
	return entries, nil
}

// standings are what the nodes hold and accept.
func standings(entries []entry) (all subnet.Listing) {
	for _, e := range entries {
		all = append(all, subnet.Standing{Node: e.node, Subnets: e.file.Subnets, Network: e.file.Network})
	}
	return all
}

func listOf(entries []entry) (leases []subnet.Lease, problems []subnet.Problem) {
	for _, e := range entries {
		l, p := e.leases()
		leases, problems = append(leases, l...), append(problems, p...)
	}
	return leases, problems
}

// oldest names up to three of the nodes that hold a subnet of r, those that have done so longest.
func oldest(entries []entry, r subnet.Range) string {
	entries = slices.Clone(entries)
	slices.SortStableFunc(entries, func(a, b entry) int { return a.file.Since.Compare(b.file.Since) })
	var texts []string
	for _, e := range entries {
		for _, s := range e.subnets() {
			if r.Prefix.Overlaps(s) && len(texts) < 3 {
				texts = append(texts, fmt.Sprintf("%s by %s since %s", s, e.node, e.file.Since.Format(time.RFC3339)))
			}
		}
	}
	return strings.Join(texts, ", ")
}

// write puts f into its place: readers see the old file or the new one, and so does whoever comes after a crash.
func write(dir string, f file) error {
	b, err := encode(f)
	if err != nil {
		return err
	}
	temp, err := os.CreateTemp(dir, tempPrefix)
	if err != nil {
		return err
	}
	defer os.Remove(temp.Name()) // fails once it is renamed
	_, err = temp.Write(b)
	err = errors.Join(err, temp.Chmod(0o644), temp.Sync(), temp.Close())
	if err != nil {
		return err
	}
	if err := os.Rename(temp.Name(), filepath.Join(dir, f.Node+suffix)); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// removeTemps removes what writers left behind that died. It is for the holder of the lock.
func removeTemps(dir string) error {
	names, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, n := range names {
		if strings.HasPrefix(n.Name(), tempPrefix) {
			err = errors.Join(err, os.Remove(filepath.Join(dir, n.Name())))
		}
	}
	return err
}
