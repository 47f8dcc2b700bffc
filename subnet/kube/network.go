package kube

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"tweed.dev/tweed/subnet"
)

// A condition is the Node's NetworkUnavailable; the zero value is that of a Node without one.
type condition struct {
	status          corev1.ConditionStatus
	reason, message string
	since           metav1.Time // of the status
	by              string      // who has written it last, other than we
}

func networkOf(n *corev1.Node) condition {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeNetworkUnavailable {
			return condition{c.Status, c.Reason, c.Message, c.LastTransitionTime, lastWriter(n.ManagedFields)}
		}
	}
	return condition{}
}

// lastWriter tells who but us has last written the condition NetworkUnavailable; "" if nobody has.
func lastWriter(fields []metav1.ManagedFieldsEntry) string {
	var last metav1.ManagedFieldsEntry
	for _, f := range fields {
		if f.Manager == manager || f.FieldsV1 == nil || f.Time == nil ||
			!strings.Contains(f.FieldsV1.GetRawString(), `k:{\"type\":\"NetworkUnavailable\"}`) {
			continue
		}
		if last.Time == nil || last.Time.Before(f.Time) {
			last = f
		}
	}
	return last.Manager
}

// says reports whether c tells the same as d, in whatever words.
func (c condition) says(d condition) bool { return c.status == d.status && c.reason == d.reason }

func (c condition) String() string {
	if c.status == "" {
		return "away"
	}
	return fmt.Sprintf("to %s (%s: %s)", c.status, cmp.Or(c.reason, "no reason"), subnet.Quote(c.message))
}

// SetNetwork has the Node's condition NetworkUnavailable say that there is a network or not, in one PATCH and only if
// status or reason differ from what is there. Where somebody else undoes that again and again, they get their way for an
// hour, and the error names them. A Node that does not exist says nothing, which is no error here.
func (s *Source) SetNetwork(ctx context.Context, up bool, reason, message string) error {
	want := condition{status: corev1.ConditionTrue, reason: reason, message: message}
	if up {
		want.status = corev1.ConditionFalse
	}
	have, err := s.self.current()
	if err != nil {
		return nil
	}
	if have.network.says(want) {
		s.rival.rest(time.Now())
		return nil
	}
	if s.rival.lost(have.uid, want, time.Now()) {
		return fmt.Errorf("the condition NetworkUnavailable of node %s was set to %s (%s) %d times, and each time %s set "+
			"it %s; it is left so for %v: end that other writer, perhaps another pod network or a cloud's route controller",
			s.node, want.status, want.reason, mostRounds, cmp.Or(have.network.by, "somebody"), have.network, truce)
	}
	return s.write(ctx, "set the condition NetworkUnavailable of", "nodes/status",
		func(ctx context.Context, v version) (version, error) { return s.setCondition(ctx, v, want) })
}

func (s *Source) setCondition(ctx context.Context, v version, want condition) (version, error) {
	if v.network.says(want) {
		return v, nil
	}
	now := metav1.Now()
	want.since = now
	if v.network.status == want.status {
		want.since = v.network.since
	}
	body, err := json.Marshal(map[string]any{
		"metadata": v.precondition(),
		"status": map[string]any{"conditions": []corev1.NodeCondition{{
			Type: corev1.NodeNetworkUnavailable, Status: want.status, Reason: want.reason, Message: want.message,
			LastHeartbeatTime: now, LastTransitionTime: want.since,
		}}},
	})
	if err != nil {
		return v, err
	}
	n := &corev1.Node{}
	err = s.core.Patch(types.StrategicMergePatchType).Resource("nodes").Name(s.node).SubResource("status").
		VersionedParams(s.patchOptions(), s.params).Body(body).Do(ctx).Into(n)
	if err != nil {
		return v, err
	}
	s.rival.wrote(v.uid, want, time.Now())
	return versionOf(n), nil
}

const (
	// mostRounds is how often a condition is written anew before another writer gets their way.
	mostRounds = 3
	// truce is the time until it is tried once more, and after which rounds are forgotten.
	truce = time.Hour
)

// A contest counts how often the same condition had to be written.
type contest struct {
	mu     sync.Mutex
	uid    types.UID
	want   condition
	rounds int
	last   time.Time
}

// wrote records that want was written to the Node of that uid.
func (c *contest) wrote(uid types.UID, want condition, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.uid != uid || !c.want.says(want) {
		c.uid, c.want, c.rounds = uid, want, 0
	}
	c.rounds++
	c.last = now
}

// lost reports whether want has been undone so often that it is not to be written now.
func (c *contest) lost(uid types.UID, want condition, now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.uid == uid && c.want.says(want) && c.rounds >= mostRounds && now.Sub(c.last) < truce
}

// rest forgets the rounds once what was written has stood for long enough.
func (c *contest) rest(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now.Sub(c.last) >= truce {
		c.rounds = 0
	}
}
