package overlay

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"time"
)

// Port is where the daemon answers on 127.0.0.1: /healthz, /readyz and /report.
const Port = 9479

// stuck is the time without a finished pass after which the daemon counts as stuck: the slow timer alone asks for one
// twice as often.
const stuck = 4 * slow

// Serve answers on 127.0.0.1 until ctx ends.
func (r *Reconciler) Serve(ctx context.Context) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", r.healthz)
	mux.HandleFunc("GET /readyz", r.readyz)
	mux.HandleFunc("GET /report", r.serveReport)
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 10 * time.Second}

	addr := fmt.Sprintf("127.0.0.1:%d", Port)
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return fmt.Errorf("opening %s for /healthz, /readyz and /report: %w; end the process that holds it", addr, err)
	}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	if err := srv.Serve(ln); ctx.Err() == nil {
		return err
	}
	return nil
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

func (r *Reconciler) serveReport(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	_ = enc.Encode(r.Report()) // a client that went away is no fault of ours
}
