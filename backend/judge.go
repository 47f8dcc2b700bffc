package backend

import (
	"fmt"

	"tweed.dev/tweed/subnet"
)

// CheckType refuses a lease of a node with another backend than name, which is this node's.
func CheckType(l subnet.Lease, name string) error {
	if l.Backend != name {
		return fmt.Errorf("backend %q where this node has %q: all nodes must run the same backend", l.Backend, name)
	}
	return nil
}
