package overlay

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"tweed.dev/tweed/subnet"
)

func get(n *node, path string) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	n.handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	return w
}

func TestLeasesBeforeTheFirstList(t *testing.T) {
	n := newNode(t)
	n.cluster.away = errors.New("cannot list nodes at https://192.0.2.1:6443: connection refused")
	n.step(t)
	if w := get(n, "/leases"); w.Code != http.StatusServiceUnavailable || !strings.Contains(w.Body.String(), "192.0.2.1") {
		t.Errorf("status %d: %s", w.Code, w.Body)
	}
}

// TestLeasesWhileTheServerIsAway reads what is in force and how old it is, as it was written.
func TestLeasesWhileTheServerIsAway(t *testing.T) {
	n := newNode(t)
	odd := peer("n3", "10.244.3.0/24", "192.0.2.13")
	odd.Data = json.RawMessage(`{"mac":"<b>"}`)
	leases := []subnet.Lease{peer("n2", "10.244.2.0/24", "192.0.2.12"), odd}
	n.cluster.set(leases...)
	n.cluster.with(func(c *cluster) {
		c.list.At = time.Now().Add(-time.Minute)
		c.list.Problems = []subnet.Problem{{Node: "n4", Kind: subnet.KindAnnotation, Text: "garbage"}}
		c.away = errors.New("connection refused")
	})
	w := get(n, "/leases")
	var got LeaseList
	if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil || w.Code != http.StatusOK {
		t.Fatalf("status %d, %v: %s", w.Code, err, w.Body)
	}
	if got.ListAge < 60 || got.ListAge > 120 || len(got.Problems) != 1 || got.Problems[0].Node != "n4" {
		t.Errorf("got %+v", got)
	}
	if !slices.EqualFunc(got.Leases, leases, subnet.Lease.Equal) {
		t.Errorf("%+v became %+v", leases, got.Leases)
	}
	n.step(t)
	if !n.step(t).Ready() || get(n, "/readyz").Code != http.StatusOK {
		t.Errorf("readiness is red although all is in force: %s", get(n, "/readyz").Body)
	}
}
