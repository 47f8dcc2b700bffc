package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/duration"

	"tweed.dev/tweed/overlay"
	"tweed.dev/tweed/subnet"
)

// A daemonStatus is how the daemon of this node fares.
type daemonStatus struct {
	// Converged is set when everything local is done and each peer was tried.
	Converged bool `json:"converged"`
	// Waiting says what has to come before pods can be attached.
	Waiting string `json:"waiting,omitempty"`
	// ListAge is how long ago its list of leases was last known to be current, in seconds; -1 before the first.
	ListAge float64 `json:"listAge"`
}

// daemonHere asks the daemon of this node. It returns nil where none answers: most who look are not on a node.
func daemonHere(ctx context.Context) *daemonStatus {
	var r overlay.Report
	if err := askDaemon(ctx, "/report", &r); err != nil || r.Version == "" {
		return nil
	}
	return &daemonStatus{r.Converged, r.Waiting, r.ListAge}
}

// leasesHere are the leases that the daemon of this node has.
func leasesHere(ctx context.Context) (subnet.List, error) {
	var l overlay.LeaseList
	if err := askDaemon(ctx, "/leases", &l); err != nil {
		return subnet.List{}, fmt.Errorf("this node's daemon has no leases either: %w", err)
	}
	return subnet.List{Leases: l.Leases, Problems: l.Problems}, nil
}

// askDaemon reads JSON from the daemon of this node. It is quick: where nothing listens, that is refused at once.
func askDaemon(ctx context.Context, path string, to any) error {
	const most = 64 << 20 // bytes; several times the leases of ten thousand nodes
	direct := &http.Transport{DisableKeepAlives: true}
	client := http.Client{Timeout: 2 * time.Second, Transport: direct}
	url := fmt.Sprintf("http://127.0.0.1:%d%s", overlay.Port, path)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	res, err := client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, most))
	if err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s", strings.TrimSpace(string(body)))
	}
	return json.Unmarshal(body, to)
}

// age is that of the daemon's list of leases, for people.
func (d daemonStatus) age() string {
	return duration.HumanDuration(time.Duration(d.ListAge * float64(time.Second)))
}

func (d daemonStatus) String() string {
	s := "This node's daemon: "
	if !d.Converged {
		s += "not "
	}
	s += "converged"
	if d.Waiting != "" {
		s += " (" + d.Waiting + ")"
	}
	if d.ListAge < 0 {
		return s + "; it has no list of leases yet."
	}
	return s + "; its list of leases is " + d.age() + " old."
}
