package backend

// Verb is what an operation does to its object.
type Verb string

// The verbs.
const (
	Add    Verb = "add"    // create what is not there; fails if it is
	Change Verb = "change" // alter what is there and ours, in place
	Delete Verb = "delete"
)

// Kinds lists what Object.Kind can say.
func Kinds() []string {
	return []string{"link", "address", "neighbour", "fdb", "route", "rule", "sysctl", "port", "filter", "set", "spoof"}
}

// An Object is one entry of a State or of a packet filter's Ruleset: a thing that can be added, changed and deleted.
type Object interface {
	// Kind names the sort of thing for counting. It is one of Kinds.
	Kind() string
	// Command is the command a person would type to do this. was is what is there now where the verb is Change or
	// Delete, and nil otherwise.
	Command(do Verb, was Object) string
}

// An Op is one change to the kernel. Its String is the command that a person would type.
type Op struct {
	Do   Verb
	What Object
	// Was is what the kernel holds now, for Change and Delete.
	Was Object
	// Peer is the node that the change serves; empty where it is for this node itself.
	Peer string
}

func (o Op) String() string { return o.What.Command(o.Do, o.Was) }
