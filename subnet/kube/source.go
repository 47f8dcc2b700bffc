// Package kube keeps leases in annotations of Kubernetes Node objects, and has a Node say how its network fares.
//
// Every Node is watched by its metadata alone, and of that only what our annotations say is kept: a heartbeat changes
// nothing and rings no bell. This node's own Node is watched whole, for its spec.podCIDRs, its addresses, the condition
// NetworkUnavailable and the startup taint. The account needs the verbs get, list, watch and patch on nodes, patch on
// nodes/status, and create and patch on events.
package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"tweed.dev/tweed/subnet"
)

// A Source offers the leases of a cluster and publishes those of one of its nodes.
type Source struct {
	node   string
	server string // the API server's URL, for people
	log    *slog.Logger
	meta   metadata.Getter
	core   *rest.RESTClient
	params runtime.ParameterCodec
	all    table
	self   own
	lessor *lessor
	clock  clock
	health health
	rival  contest // for the condition NetworkUnavailable
	ring   func()  // of Run

	patience time.Duration // with a write
}

// Options say for which node a Source is, and where that gets its subnets from.
type Options struct {
	Node   string
	Origin subnet.Origin
	// Network is what subnets are leased from.
	Network subnet.Network
	// Remembered are the subnets that the node's pods have addresses of, to be leased again if nobody else has; at most one
	// a family.
	Remembered []netip.Prefix
	// ReadOnly has nothing leased.
	ReadOnly bool
}

// New returns a Source. It asks the API server nothing yet: an error means that cfg cannot work.
func New(cfg *rest.Config, o Options, log *slog.Logger) (*Source, error) {
	if o.Node == "" {
		return nil, errors.New("the name of this node is not known; give that of its Node object with --node-name")
	}
	s := &Source{node: o.Node, log: log, health: health{log: log}, patience: writeTimeout, ring: func() {}}
	s.self.name, s.self.origin = o.Node, subnet.OriginAuto
	s.lessor = newLessor(s, o)
	s.all.wake = s.lessor.rouse
	cfg = rest.CopyConfig(cfg)
	cfg.Wrap(s.clock.listen)
	cfg, err := reach(cfg)
	if err != nil {
		return nil, err
	}
	if s.meta, s.server, err = metadataClient(cfg); err != nil {
		return nil, err
	}
	if s.core, s.params, err = nodeClient(cfg); err != nil {
		return nil, err
	}
	s.self.err = fmt.Errorf("waiting for the API server at %s to send node %s", s.server, o.Node)
	return s, nil
}

func metadataClient(cfg *rest.Config) (metadata.Getter, string, error) {
	server, _, err := rest.DefaultServerUrlFor(cfg)
	if err != nil {
		return nil, "", fmt.Errorf("%q is not the address of an API server: %w", cfg.Host, err)
	}
	cfg = rest.CopyConfig(cfg)
	cfg.WarningHandler = rest.NoWarnings{}
	client, err := metadata.NewForConfig(cfg) // speaks protobuf where the server does
	if err != nil {
		return nil, "", fmt.Errorf("setting up a client for the API server at %s: %w", server, err)
	}
	return client.Resource(corev1.SchemeGroupVersion.WithResource("nodes")), server.String(), nil
}

// nodeClient is a client for whole Nodes. That of k8s.io/client-go/kubernetes carries every type that Kubernetes has.
func nodeClient(cfg *rest.Config) (*rest.RESTClient, runtime.ParameterCodec, error) {
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		return nil, nil, err
	}
	cfg = rest.CopyConfig(cfg)
	cfg.APIPath = "/api"
	cfg.GroupVersion = &corev1.SchemeGroupVersion
	cfg.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	cfg.ContentType = runtime.ContentTypeProtobuf
	cfg.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	cfg.WarningHandler = rest.NoWarnings{}
	client, err := rest.RESTClientFor(cfg)
	if err != nil {
		return nil, nil, fmt.Errorf("setting up a client for the API server at %s: %w", cfg.Host, err)
	}
	return client, runtime.NewParameterCodec(scheme), nil
}

// ListOnce asks the API server once for the leases of all nodes.
func ListOnce(ctx context.Context, cfg *rest.Config) (subnet.List, error) {
	cfg, err := reach(cfg)
	if err != nil {
		return subnet.List{}, err
	}
	core, _, err := nodeClient(cfg)
	if err != nil {
		return subnet.List{}, err
	}
	nodes, err := listMetadata(klog.NewContext(ctx, logr.Discard()), core)
	if err != nil {
		return subnet.List{}, explain("list", "nodes", cfg.Host, err)
	}
	list := subnet.List{Generation: 1, At: time.Now()}
	for i := range nodes.Items {
		leases, problems := Parse(&nodes.Items[i].ObjectMeta)
		list.Leases = append(list.Leases, leases...)
		list.Problems = append(list.Problems, problems...)
	}
	return list, nil
}

// Run keeps the Source up to date until ctx ends, and then returns nil. It calls ring after each change of what List or
// Self return, and when Err begins or ends. While the API server is away, what it said last stays.
func (s *Source) Run(ctx context.Context, ring func()) error {
	ctx = s.quiet(ctx)
	s.ring = ring
	nodes := nodeStore{&s.all, ring, func() { s.note(ctx, "list", "nodes", nil) }}
	self := ownStore{&s.self, func() { s.lessor.rouse(); ring() },
		func() { s.note(ctx, "list", "own node", nil) }, s.missing()}
	var wg sync.WaitGroup
	wg.Go(func() { s.lessor.run(ctx) })
	wg.Go(func() { follow(ctx, s.nodes(), &metav1.PartialObjectMetadata{}, nodes) })
	wg.Go(func() { follow(ctx, s.own(), &corev1.Node{}, self) })
	wg.Wait()
	return nil
}

// List returns the last complete list; false before the first. Its slices must not be changed.
func (s *Source) List() (subnet.List, bool) { return s.all.snapshot() }

// Self returns what this node's Node says of it, or its name alone and an error that says what is waited for.
func (s *Source) Self() (subnet.Node, error) {
	if _, unknown := s.self.current(); unknown != nil {
		if away := s.Err(); away != nil {
			return subnet.Node{Name: s.node}, away
		}
	}
	return s.self.get()
}

// Grow has subnets leased from n from now on.
func (s *Source) Grow(n subnet.Network) { s.lessor.grow(n) }

// Err says why List and Self may be out of date: the API server does not answer, or refuses. It is nil otherwise.
func (s *Source) Err() error { return s.health.err() }

func (s *Source) missing() error {
	return fmt.Errorf("node %s does not exist at %s; waiting for its kubelet to register it, unless another --node-name "+
		"is meant", s.node, s.server)
}

// follow keeps store equal to what lw lists and watches. Pauses between attempts grow to 3.5 s, jitter included.
func follow(ctx context.Context, lw cache.ListerWatcher, object any, store cache.ReflectorStore) {
	logger := klog.FromContext(ctx)
	r := cache.NewReflectorWithOptions(lw, object, store, cache.ReflectorOptions{
		Logger: &logger,
		Name:   "tweed",
		Backoff: &wait.Backoff{
			Duration: 500 * time.Millisecond, Factor: 2, Cap: 2500 * time.Millisecond, Jitter: 0.4, Steps: 8,
		},
	})
	r.RunWithContext(ctx)
}

// nodes lists and watches every Node's metadata.
func (s *Source) nodes() cache.ListerWatcher {
	return compressed{s.listWatch("nodes",
		func(ctx context.Context, _ metav1.ListOptions) (runtime.Object, error) {
			return listMetadata(ctx, s.core)
		},
		s.meta.Watch)}
}

// own lists and watches this node's Node.
func (s *Source) own() cache.ListerWatcher {
	name := fields.OneTermEqualSelector(metav1.ObjectNameField, s.node).String()
	return s.listWatch("own node",
		func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.FieldSelector = name
			list := &corev1.NodeList{}
			return list, s.core.Get().Resource("nodes").VersionedParams(&o, s.params).Do(ctx).Into(list)
		},
		func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector, o.Watch = name, true
			return s.core.Get().Resource("nodes").VersionedParams(&o, s.params).Watch(ctx)
		})
}

// listWatch has the outcome of each request noted.
func (s *Source) listWatch(what string, list cache.ListWithContextFunc, open cache.WatchFuncWithContext,
) *cache.ListWatch {
	list, open = s.guarded(what, list, open)
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			if o.ResourceVersion == "0" {
				// The reflector would take whatever an API server has in its cache. One that lags behind must
				// not make us forget peers.
				o.ResourceVersion = ""
			}
			obj, err := list(ctx, o)
			s.note(ctx, "list", what, err)
			return obj, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			w, err := open(ctx, o)
			if o.SendInitialEvents == nil {
				s.note(ctx, "watch", what, err)
				return w, resumable(err)
			}
			if err != nil {
				// Not every server streams lists. Any failure here makes the reflector ask for a plain list
				// and have that noted. For a refused connection it has a loop of its own, hidden from it here,
				// which goes on for seconds after ctx has ended.
				return nil, errors.New(err.Error())
			}
			s.note(ctx, "watch", what, nil)
			return w, nil
		},
	}
}

func (s *Source) note(ctx context.Context, verb, what string, err error) {
	// A server that remembers no version as old as ours answers: what it cannot tell, the list that follows does.
	if ctx.Err() != nil || apierrors.IsResourceExpired(err) || apierrors.IsGone(err) {
		return
	}
	if err != nil {
		err = explain(verb, "nodes", s.server, err)
	}
	if s.health.note(verb+" "+what, err) {
		s.ring()
	}
}

// quiet has what client-go logs under ctx logged at debug level.
func (s *Source) quiet(ctx context.Context) context.Context {
	return klog.NewContext(ctx, logr.FromSlogHandler(quietHandler{s.log.Handler()}))
}

// A quietHandler logs everything at debug level: what matters of it, the Source says itself, and once.
type quietHandler struct{ slog.Handler }

func (h quietHandler) Enabled(ctx context.Context, l slog.Level) bool {
	return l >= slog.LevelDebug && h.Handler.Enabled(ctx, slog.LevelDebug)
}

// Handle asks Enabled once more, because logr does not before it logs an error.
func (h quietHandler) Handle(ctx context.Context, r slog.Record) error {
	if !h.Enabled(ctx, slog.LevelDebug) {
		return nil
	}
	r.Level = slog.LevelDebug
	return h.Handler.Handle(ctx, r)
}

func (h quietHandler) WithAttrs(a []slog.Attr) slog.Handler {
	return quietHandler{h.Handler.WithAttrs(a)}
}

func (h quietHandler) WithGroup(name string) slog.Handler {
	return quietHandler{h.Handler.WithGroup(name)}
}
