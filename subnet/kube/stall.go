package kube

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/flowcontrol"
)

const (
	// silence is how long a watch may say nothing before another is opened. The API server sends a bookmark about once
	// a minute: defaultBookmarkFrequency in k8s.io/apiserver/pkg/storage/cacher, to two seconds.
	silence = 80 * time.Second
	// answerTimeout bounds a list, and the opening of a watch. The API server gives up a request after a minute
	// (--request-timeout).
	answerTimeout = time.Minute
	// opens is how many watches a second a reflector may open, whatever makes it do so; opensAtOnce need no pause between
	// them. It has pauses of its own, but not after a watch that is opened and ends at once.
	opens, opensAtOnce = 1.0 / 3, 6
)

// guarded bounds how often the server is asked, and how long it may leave us without a word.
func (s *Source) guarded(what string, list cache.ListWithContextFunc, open cache.WatchFuncWithContext,
) (cache.ListWithContextFunc, cache.WatchFuncWithContext) {
	pace := flowcontrol.NewTokenBucketRateLimiter(opens, opensAtOnce)
	var hopeless error // of the list that the reflector asks for after a streamed one has failed
	return func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			if err := hopeless; err != nil {
				hopeless = nil
				return nil, err
			}
			ctx, cancel := context.WithTimeoutCause(ctx, answerTimeout, errLate)
			defer cancel()
			obj, err := list(ctx, o)
			return obj, causeOf(ctx, err)
		}, func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			if err := pace.Wait(ctx); err != nil {
				return nil, err
			}
			streamed := o.SendInitialEvents != nil
			w, end, err := opened(ctx, open, o)
			if err != nil {
				if streamed && isHopeless(err) {
					hopeless = err
				}
				return nil, err
			}
			return attended(w, streamed, silence, func(stalled bool) {
				end()
				if stalled {
					s.log.Info("watch was silent, another is opened", "of", what, "for", silence)
				}
			}), nil
		}
}

// opened opens a watch, whose resources end frees.
func opened(ctx context.Context, open cache.WatchFuncWithContext, o metav1.ListOptions) (
	w watch.Interface, end func(), err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	late := time.AfterFunc(answerTimeout, func() { cancel(errLate) })
	defer late.Stop()
	if w, err = open(ctx, o); err != nil {
		defer cancel(nil)
		return nil, nil, causeOf(ctx, err)
	}
	return w, func() { cancel(nil) }, nil
}

// isHopeless reports whether another request would fare no better.
func isHopeless(err error) bool {
	if apierrors.IsTooManyRequests(err) || apierrors.IsUnauthorized(err) {
		return true
	}
	var status apierrors.APIStatus
	return !errors.As(err, &status) && !errors.Is(err, errLate) // a proxy on the way may hold back a stream alone
}

var errLate = fmt.Errorf("no answer in %v", answerTimeout)

// causeOf returns what ended ctx, where that is what err is about.
func causeOf(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); err != nil && errors.Is(cause, errLate) {
		return cause
	}
	return err
}

// attended is w until it has been silent for too long; then it ends, and the reflector opens another that goes on from
// there. One that begins with a list ends with an error unless that was complete: without, the reflector opens the next
// at once. ended is called after the end.
func attended(w watch.Interface, listing bool, silence time.Duration, ended func(stalled bool)) watch.Interface {
	events := make(chan watch.Event)
	p := watch.NewProxyWatcher(events)
	go func() {
		defer close(events)
		stalled := relay(w, events, p.StopChan(), listing, silence)
		w.Stop()
		ended(stalled)
	}()
	return p
}

// relay passes events on until there are no more, or stop is closed, or there was none for too long.
func relay(w watch.Interface, to chan<- watch.Event, stop <-chan struct{}, listing bool, silence time.Duration,
) (stalled bool) {
	quiet := time.NewTimer(silence)
	defer quiet.Stop()
	for {
		var e watch.Event
		ok := false
		select {
		case <-stop:
			return false
		case e, ok = <-w.ResultChan():
		case <-quiet.C:
			stalled = true
		}
		switch {
		case ok:
			listing = listing && e.Type != watch.Error && !endsList(e)
		case listing:
			e = watch.Event{Type: watch.Error, Object: &errHalf.ErrStatus}
		default:
			return stalled
		}
		select {
		case <-stop:
			return stalled
		case to <- e:
		}
		if !ok {
			return stalled
		}
		quiet.Reset(silence)
	}
}

var errHalf = apierrors.NewGenericServerResponse(
	http.StatusGatewayTimeout, "watch", corev1.Resource("nodes"), "", "the list broke off", 0, true)

func endsList(e watch.Event) bool {
	if e.Type != watch.Bookmark {
		return false
	}
	m, err := meta.Accessor(e.Object)
	return err == nil && m.GetAnnotations()[metav1.InitialEventsAnnotationKey] == "true"
}

// resumable has the reflector go on from where it was when no answer came. It does so after a refused connection alone,
// and after all else asks for the whole list.
func resumable(err error) error {
	var status apierrors.APIStatus
	if err == nil || errors.As(err, &status) {
		return err
	}
	return fmt.Errorf("%w, which is as good as: %w", err, syscall.ECONNREFUSED)
}
