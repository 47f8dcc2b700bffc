package kube

import (
	"context"
	"errors"
	"log/slog"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
)

// A wait is a watch under attendance.
type attendance struct {
	from    *watch.FakeWatcher
	to      watch.Interface
	stalled chan bool
}

func attend(listing bool) attendance {
	a := attendance{from: watch.NewFake(), stalled: make(chan bool, 1)}
	a.to = attended(a.from, listing, silence, func(stalled bool) { a.stalled <- stalled })
	return a
}

func bookmark(endsList bool) *metav1.PartialObjectMetadata {
	o := &metav1.PartialObjectMetadata{}
	if endsList {
		o.Annotations = map[string]string{metav1.InitialEventsAnnotationKey: "true"}
	}
	return o
}

func TestWatchSaysNothingForTooLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := attend(false)
		for range 5 { // as a server does that has nothing to tell
			time.Sleep(time.Minute)
			a.from.Action(watch.Bookmark, bookmark(false))
			if e := <-a.to.ResultChan(); e.Type != watch.Bookmark {
				t.Errorf("a bookmark became %v", e)
			}
		}
		begun := time.Now()
		if e, open := <-a.to.ResultChan(); open {
			t.Errorf("silence became %v", e)
		}
		if took := time.Since(begun); took != silence {
			t.Errorf("silence is noticed after %v", took)
		}
		if !<-a.stalled || !a.from.IsStopped() {
			t.Error("the silent watch goes on")
		}
	})
}

func TestReaderOfAWatchLeaves(t *testing.T) {
	for _, blocked := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			a := attend(false)
			if blocked {
				a.from.Action(watch.Bookmark, bookmark(false)) // that nobody takes
				synctest.Wait()
			}
			a.to.Stop()
			if <-a.stalled || !a.from.IsStopped() {
				t.Error("the watch goes on")
			}
		})
	}
}

func TestListBreaksOff(t *testing.T) {
	for name, c := range map[string]struct {
		before []*metav1.PartialObjectMetadata
		silent bool
		failed bool
	}{
		"at once":        {nil, false, true},
		"half way":       {[]*metav1.PartialObjectMetadata{bookmark(false)}, false, true},
		"into silence":   {nil, true, true},
		"after its end":  {[]*metav1.PartialObjectMetadata{bookmark(true)}, false, false},
		"silent, at end": {[]*metav1.PartialObjectMetadata{bookmark(true)}, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := attend(true)
				for _, b := range c.before {
					a.from.Action(watch.Bookmark, b)
					<-a.to.ResultChan()
				}
				if !c.silent {
					a.from.Stop()
				}
				e, failed := <-a.to.ResultChan()
				if failed != c.failed || failed && e.Type != watch.Error {
					t.Errorf("it ends with %v, %v", e, failed)
				}
				if failed && apierrors.FromObject(e.Object).Error() == "" {
					t.Errorf("it ends with %v", e.Object)
				}
			})
		})
	}
}

// A loop asks as a reflector would whose watches end at once.
func loop(t *testing.T, open func(context.Context, metav1.ListOptions) (watch.Interface, error)) (opened int) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		w, err := open(ctx, metav1.ListOptions{})
		if err != nil {
			return opened
		}
		opened++
		w.Stop()
	}
}

func TestWatchesEndAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &Source{log: slog.New(slog.DiscardHandler)}
		_, open := s.guarded("nodes", nil, func(context.Context, metav1.ListOptions) (watch.Interface, error) {
			return watch.NewEmptyWatch(), nil
		})
		if n := loop(t, open); n < 20 || n > 20+opensAtOnce {
			t.Errorf("%d watches are opened in a minute", n)
		}
		synctest.Wait()
	})
}

func TestNobodyAnswersForAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &Source{log: slog.New(slog.DiscardHandler)}
		list, open := s.guarded("nodes",
			func(ctx context.Context, _ metav1.ListOptions) (runtime.Object, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			},
			func(ctx context.Context, _ metav1.ListOptions) (watch.Interface, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			})
		begun := time.Now()
		streamed := true
		if _, err := open(t.Context(), metav1.ListOptions{SendInitialEvents: &streamed}); !errors.Is(err, errLate) {
			t.Errorf("opening: %v", err)
		}
		if _, err := list(t.Context(), metav1.ListOptions{}); !errors.Is(err, errLate) {
			t.Errorf("listing: %v", err)
		}
		if took := time.Since(begun); took != 2*answerTimeout {
			t.Errorf("both took %v", took)
		}
	})
}

func TestListWhereAStreamHasFailed(t *testing.T) {
	nodes := corev1.Resource("nodes")
	for name, c := range map[string]struct {
		err  error
		asks bool
	}{
		"nobody is there":    {syscall.ECONNREFUSED, false},
		"too many requests":  {apierrors.NewTooManyRequests("", 1), false},
		"not this token":     {apierrors.NewUnauthorized(""), false},
		"not allowed":        {apierrors.NewForbidden(nodes, "", nil), true},
		"no such option":     {apierrors.NewBadRequest("sendInitialEvents"), true},
		"a proxy holds back": {errLate, true},
	} {
		t.Run(name, func(t *testing.T) {
			asked := 0
			s := &Source{log: slog.New(slog.DiscardHandler)}
			list, open := s.guarded("nodes",
				func(context.Context, metav1.ListOptions) (runtime.Object, error) { asked++; return nil, nil },
				func(context.Context, metav1.ListOptions) (watch.Interface, error) { return nil, c.err })
			streamed := true
			if _, err := open(t.Context(), metav1.ListOptions{SendInitialEvents: &streamed}); !errors.Is(err, c.err) {
				t.Errorf("opening: %v", err)
			}
			if _, err := list(t.Context(), metav1.ListOptions{}); c.asks != (err == nil) || c.asks != (asked == 1) {
				t.Errorf("a list was asked for %d times: %v", asked, err)
			}
			if _, err := list(t.Context(), metav1.ListOptions{}); err != nil {
				t.Errorf("the next list: %v", err)
			}
		})
	}
}

func TestWatchGoesOnAfterNobodyAnswered(t *testing.T) {
	if err := resumable(errors.New("no route to host")); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("%v has all Nodes listed again", err)
	}
	if err := resumable(apierrors.NewResourceExpired("")); errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("%v has the watch tried again", err)
	}
	if err := resumable(nil); err != nil {
		t.Error(err)
	}
}
