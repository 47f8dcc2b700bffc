package overlay

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"time"

	"tweed.dev/tweed/subnet"
)

// Port is where the daemon answers on 127.0.0.1: /healthz, /readyz, /report, /leases and /metrics.
const Port = 9479

// stuck is the time without a finished pass after which the daemon counts as stuck: the slow timer alone asks for one
// twice as often.
const stuck = 4 * slow

// Serve answers on 127.0.0.1 until ctx ends.
func (r *Reconciler) Serve(ctx context.Context) error {
	addr := fmt.Sprintf("127.0.0.1:%d", Port)
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return fmt.Errorf("opening %s for /healthz, /readyz, /report, /leases and /metrics: %w; end the process that "+
			"holds it", addr, err)
	}
	return serve(ctx, ln, r.handler())
}

func (r *Reconciler) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", r.healthz)
	mux.HandleFunc("GET /readyz", r.readyz)
	mux.HandleFunc("GET /report", r.serveReport)
	mux.HandleFunc("GET /leases", r.serveLeases)
	mux.Handle("GET /metrics", r.meter.handler())
	return mux
}

func (r *Reconciler) healthz(w http.ResponseWriter, _ *http.Request) {
	if age := time.Since(time.Unix(0, r.passed.Load())); age > stuck {
		http.Error(w, fmt.Sprintf("no pass has ended for %s", age.Round(time.Second)), http.StatusServiceUnavailable)
		return
	}
	fmt.Fprintln(w, "ok")
}

func (r *Reconciler) readyz(w http.ResponseWriter, _ *http.Request) {
	rep := r.Report()
	if rep.Ready() {
		fmt.Fprintln(w, "ok")
		return
	}
	w.WriteHeader(http.StatusServiceUnavailable)
	if rep.Waiting != "" {
		fmt.Fprintln(w, rep.Waiting)
	}
	for _, p := range rep.Problems {
		fmt.Fprintln(w, p)
	}
}

func (r *Reconciler) serveReport(w http.ResponseWriter, _ *http.Request) { answer(w, r.Report(), "  ") }

// A LeaseList is the list of leases that is in force on a node. It is served as JSON at /leases; before the first
// complete list, the answer is 503 and says what is waited for.
type LeaseList struct {
	// ListAge is how long ago the list was last known to be current, in seconds.
	ListAge float64 `json:"listAge"`
	// Leases are those of all nodes, judged by nobody yet.
	Leases []subnet.Lease `json:"leases"`
	// Problems are with what could not be read.
	Problems []subnet.Problem `json:"problems"`
}

func (r *Reconciler) serveLeases(w http.ResponseWriter, _ *http.Request) {
	list, ok := r.planner.Leases.List()
	if !ok {
		http.Error(w, r.Report().Waiting, http.StatusServiceUnavailable)
		return
	}
	// Not indented, because a lease's data would be indented with it.
	answer(w, LeaseList{
		ListAge:  time.Since(list.At).Seconds(),
		Leases:   append([]subnet.Lease{}, list.Leases...),
		Problems: append([]subnet.Problem{}, list.Problems...),
	}, "")
}

// answer writes v as JSON. A client that went away is no fault of ours.
func answer(w http.ResponseWriter, v any, indent string) {
	w.Header().Set("Content-Type", "application/json")
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false) // what others wrote is kept to the letter
	enc.SetIndent("", indent)
	_ = enc.Encode(v)
}
