package kube_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/runtime/serializer/streaming"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	restwatch "k8s.io/client-go/rest/watch"
)

// An apiServer keeps Nodes and speaks as much of the Kubernetes API as is needed to list, watch and patch them.
type apiServer struct {
	t      *testing.T
	onlyOf string // the one media type that it speaks; "" is protobuf
	listed bool   // it does not stream lists, as servers before Kubernetes 1.32

	mu      sync.Mutex
	changed chan struct{} // closed with the next change
	rv      int
	uids    int
	nodes   map[string]*corev1.Node
	events  []event
	silent  bool           // withholds the end of a list, however it comes
	muted   bool           // withholds all events
	oldest  int            // watches from before it are answered with 410
	refuse  map[string]int // HTTP status by verb: list, watch, get, patch, patch status, create events, patch events
	why     string         // what is said with 403
	stale   int            // how many PATCHes are answered with 409, whatever they say
	hung    chan struct{}  // PATCHes of status are not answered before it is closed
	patches []string
	amended int
	told    map[string]*corev1.Event
	maps    map[string]map[string]string // ConfigMaps of namespace tweed
	server  *httptest.Server
	addr    string
}

type event struct {
	rv   int
	kind watch.EventType
	node *corev1.Node
}

func newAPIServer(t *testing.T, change ...func(*apiServer)) *apiServer {
	a := &apiServer{t: t, nodes: map[string]*corev1.Node{}, refuse: map[string]int{}, changed: make(chan struct{}),
		told: map[string]*corev1.Event{}, why: "not allowed", rv: 100, addr: "127.0.0.1:0"}
	for _, c := range change {
		c(a)
	}
	a.start()
	t.Cleanup(a.stop)
	return a
}

func (a *apiServer) start() {
	l, err := net.Listen("tcp", a.addr)
	if err != nil {
		a.t.Fatal(err)
	}
	a.addr = l.Addr().String()
	a.server = &httptest.Server{Listener: l, Config: &http.Server{Handler: http.HandlerFunc(a.serve)}}
	a.server.Start()
}

func (a *apiServer) stop() {
	a.server.CloseClientConnections()
	a.server.Listener.Close()
	a.server.CloseClientConnections()
}

// forget makes the server unable to tell what happened before.
func (a *apiServer) forget() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.rv++
	a.oldest = a.rv
}

// cut ends all connections; the server goes on.
func (a *apiServer) cut() { a.server.CloseClientConnections() }

func (a *apiServer) config() *rest.Config { return &rest.Config{Host: "http://" + a.addr} }

// with changes the server's mind.
func (a *apiServer) with(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
	a.ping()
}

func (a *apiServer) ping() {
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *apiServer) put(name string, change func(*corev1.Node)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	kind := watch.Modified
	n := &corev1.Node{}
	if old := a.nodes[name]; old != nil {
		n = old.DeepCopy()
	} else {
		kind = watch.Added
		a.uids++
		n.Name = name
		n.UID = types.UID(fmt.Sprintf("uid-%d", a.uids))
		n.CreationTimestamp = metav1.Unix(1_800_000_000+int64(a.uids), 0)
		n.Annotations = map[string]string{}
	}
	change(n)
	a.nodes[name] = n
	a.record(kind, n)
}

func (a *apiServer) remove(name string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	n := a.nodes[name].DeepCopy()
	delete(a.nodes, name)
	a.record(watch.Deleted, n)
}

// bookmark tells all watchers that nothing has changed.
func (a *apiServer) bookmark() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.record(watch.Bookmark, &corev1.Node{})
}

func (a *apiServer) record(kind watch.EventType, n *corev1.Node) {
	a.rv++
	n.ResourceVersion = strconv.Itoa(a.rv)
	a.events = append(a.events, event{a.rv, kind, n.DeepCopy()})
	a.ping()
}

// heartbeat is what a kubelet does all the time.
func (a *apiServer) heartbeat(name string) {
	a.put(name, func(n *corev1.Node) {
		n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, LastHeartbeatTime: metav1.Now()}}
		n.Labels = map[string]string{"beat": strconv.Itoa(a.rv)}
		n.ManagedFields = []metav1.ManagedFieldsEntry{{Manager: "kubelet", Time: &metav1.Time{Time: time.Now()}}}
	})
}

func (a *apiServer) annotations(name string) map[string]string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return maps.Clone(a.nodes[name].Annotations)
}

func (a *apiServer) patched() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.patches)
}

func (a *apiServer) serve(w http.ResponseWriter, r *http.Request) {
	verb, name := parseRequest(r)
	v := a.view(w, r)
	a.mu.Lock()
	code, why := a.refuse[verb], a.why
	a.mu.Unlock()
	switch code {
	case 0:
	case http.StatusForbidden:
		v.fail(apierrors.NewForbidden(nodes, name, errors.New(why)))
		return
	case http.StatusUnauthorized:
		v.fail(apierrors.NewUnauthorized("Unauthorized"))
		return
	default:
		w.WriteHeader(code)
		return
	}
	switch verb {
	case "get configmap":
		a.getConfigMap(v, name)
	case "watch":
		a.watch(v, r)
	case "list":
		a.list(v)
	case "get":
		a.get(v, name)
	case "patch":
		a.patch(v, name)
	case "patch status":
		a.patchStatus(v, name)
	case "create events":
		a.createEvent(v)
	case "patch events":
		a.patchEvent(v, name)
	}
}

func parseRequest(r *http.Request) (verb, name string) {
	path := strings.TrimPrefix(r.URL.Path, "/api/v1/")
	verb = map[string]string{http.MethodPatch: "patch", http.MethodGet: "get", http.MethodPost: "create"}[r.Method]
	if name, ok := strings.CutPrefix(path, "namespaces/default/events"); ok {
		return verb + " events", strings.TrimPrefix(name, "/")
	}
	if path, ok := strings.CutPrefix(path, "namespaces/tweed/configmaps/"); ok {
		return verb + " configmap", path
	}
	name = strings.TrimPrefix(strings.TrimPrefix(path, "nodes"), "/")
	switch {
	case r.URL.Query().Get("watch") != "":
		verb = "watch"
	case name == "":
		verb = "list"
	}
	if of, ok := strings.CutSuffix(name, "/status"); ok {
		return verb + " status", of
	}
	return verb, name
}

var nodes = schema.GroupResource{Resource: "nodes"}

func (a *apiServer) get(v view, name string) {
	a.mu.Lock()
	n := a.nodes[name]
	a.mu.Unlock()
	if n == nil {
		v.fail(apierrors.NewNotFound(nodes, name))
		return
	}
	v.write(v.one(n))
}

func (a *apiServer) list(v view) {
	a.mu.Lock()
	var found []*corev1.Node
	for _, name := range slices.Sorted(maps.Keys(a.nodes)) {
		if v.wants(name) {
			found = append(found, a.nodes[name])
		}
	}
	rv := strconv.Itoa(a.rv)
	a.mu.Unlock()
	all := v.encode(v.many(found, rv))
	_, _ = v.w.Write(all[:len(all)/2])
	v.w.(http.Flusher).Flush()
	if a.await(v.r, func() bool { return !a.silent }) {
		_, _ = v.w.Write(all[len(all)/2:])
	}
}

func (a *apiServer) watch(v view, r *http.Request) {
	q := r.URL.Query()
	streamed := q.Get("sendInitialEvents") == "true"
	if streamed && a.listed {
		v.fail(apierrors.NewInvalid(schema.GroupKind{Kind: "ListOptions"}, "", nil))
		return
	}
	seen, _ := strconv.Atoi(q.Get("resourceVersion"))
	a.mu.Lock()
	expired := !streamed && seen < a.oldest
	a.mu.Unlock()
	if expired {
		v.fail(apierrors.NewResourceExpired("too old resource version"))
		return
	}
	send := v.stream()
	if streamed {
		a.mu.Lock()
		seen = a.rv
		var found []*corev1.Node
		for _, name := range slices.Sorted(maps.Keys(a.nodes)) {
			found = append(found, a.nodes[name])
		}
		a.mu.Unlock()
		for _, n := range found {
			if v.wants(n.Name) {
				send(watch.Added, n)
			}
		}
		if !a.await(r, func() bool { return !a.silent }) {
			return
		}
		end := &corev1.Node{}
		end.ResourceVersion = strconv.Itoa(seen)
		end.Annotations = map[string]string{metav1.InitialEventsAnnotationKey: "true"}
		send(watch.Bookmark, end)
	}
	for {
		var news []event
		if !a.await(r, func() bool {
			news = slices.Clone(a.events[len(a.events)-a.after(seen):])
			return len(news) > 0 && !a.muted
		}) {
			return
		}
		for _, e := range news {
			seen = e.rv
			if e.kind == watch.Bookmark || v.wants(e.node.Name) {
				send(e.kind, e.node)
			}
		}
	}
}

// after counts the events after rv.
func (a *apiServer) after(rv int) int {
	n := 0
	for _, e := range a.events {
		if e.rv > rv {
			n++
		}
	}
	return n
}

// await returns when ok does so, or false when the client has gone.
func (a *apiServer) await(r *http.Request, ok func() bool) bool {
	for {
		a.mu.Lock()
		done, changed := ok(), a.changed
		a.mu.Unlock()
		if done {
			return true
		}
		select {
		case <-changed:
		case <-r.Context().Done():
			return false
		}
	}
}

// identity is what a PATCH says of the object that it is made for.
type identity struct {
	UID             types.UID
	ResourceVersion string
}

// amend makes a change to a Node, unless another one was meant. It holds a.mu.
func (a *apiServer) amend(v view, name string, meant identity, change func(*corev1.Node) error) {
	old := a.nodes[name]
	switch {
	case old == nil:
		v.fail(apierrors.NewNotFound(nodes, name))
		return
	case meant.UID != old.UID:
		v.fail(apierrors.NewInvalid(schema.GroupKind{Kind: "Node"}, name, nil))
		return
	case a.stale > 0 || meant.ResourceVersion != old.ResourceVersion:
		a.stale--
		v.fail(apierrors.NewConflict(nodes, name, errors.New("the object has been modified")))
		return
	}
	n := old.DeepCopy()
	if err := change(n); err != nil {
		a.t.Error(err)
	}
	a.nodes[name] = n
	a.amended++
	a.record(watch.Modified, n)
	v.write(v.one(n))
}

// writes counts the PATCHes of Nodes that had an effect. One that meets a newer Node has none, and is made again.
func (a *apiServer) writes() (n int) {
	a.with(func() { n = a.amended })
	return n
}

func (a *apiServer) patch(v view, name string) {
	body, _ := io.ReadAll(v.r.Body)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.patches = append(a.patches, string(body))
	if v.r.URL.Query().Get("fieldManager") != "tweed" {
		a.t.Errorf("PATCH %s has no manager", v.r.URL)
	}
	switch t := v.r.Header.Get("Content-Type"); t {
	case string(types.MergePatchType):
		a.patchAnnotations(v, name, body)
	case string(types.JSONPatchType):
		a.patchTaints(v, name, body)
	default:
		a.t.Errorf("PATCH with content type %s", t)
	}
}

func (a *apiServer) patchAnnotations(v view, name string, body []byte) {
	var p struct {
		Metadata struct {
			identity
			Annotations map[string]*string
		}
	}
	if err := json.Unmarshal(body, &p); err != nil {
		a.t.Errorf("PATCH %s: %v", body, err)
	}
	a.amend(v, name, p.Metadata.identity, func(n *corev1.Node) error {
		for key, value := range p.Metadata.Annotations {
			if value == nil {
				delete(n.Annotations, key)
			} else {
				n.Annotations[key] = *value
			}
		}
		return nil
	})
}

// patchTaints takes tests of the object, and then of each taint that is removed.
func (a *apiServer) patchTaints(v view, name string, body []byte) {
	var ops []struct{ Op, Path, Value string }
	if err := json.Unmarshal(body, &ops); err != nil || len(ops) < 2 || ops[0].Path != "/metadata/uid" ||
		ops[1].Path != "/metadata/resourceVersion" {
		a.t.Errorf("PATCH %s: %v", body, err)
		return
	}
	a.amend(v, name, identity{types.UID(ops[0].Value), ops[1].Value}, func(n *corev1.Node) error {
		for _, o := range ops[2:] {
			var i int
			if _, err := fmt.Sscanf(o.Path, "/spec/taints/%d", &i); err != nil || i >= len(n.Spec.Taints) {
				return fmt.Errorf("PATCH %s of %v", body, n.Spec.Taints)
			}
			switch {
			case o.Op == "test" && strings.HasSuffix(o.Path, "/key") && o.Value == n.Spec.Taints[i].Key:
			case o.Op == "remove" && o.Path == fmt.Sprintf("/spec/taints/%d", i):
				n.Spec.Taints = slices.Delete(n.Spec.Taints, i, i+1)
			default:
				return fmt.Errorf("PATCH %s of %v", body, n.Spec.Taints)
			}
		}
		return nil
	})
}

func (a *apiServer) patchStatus(v view, name string) {
	body, _ := io.ReadAll(v.r.Body)
	a.mu.Lock()
	hung := a.hung
	a.mu.Unlock()
	if hung != nil {
		<-hung
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.patches = append(a.patches, string(body))
	if t := v.r.Header.Get("Content-Type"); t != string(types.StrategicMergePatchType) {
		a.t.Errorf("PATCH of status with content type %s", t)
	}
	var p struct {
		Metadata identity
		Status   struct{ Conditions []corev1.NodeCondition }
	}
	strict := json.NewDecoder(bytes.NewReader(body))
	strict.DisallowUnknownFields()
	if err := strict.Decode(&p); err != nil {
		a.t.Errorf("PATCH %s: %v", body, err)
	}
	a.amend(v, name, p.Metadata, func(n *corev1.Node) error {
		for _, c := range p.Status.Conditions { // their merge key is the type
			i := slices.IndexFunc(n.Status.Conditions, func(h corev1.NodeCondition) bool { return h.Type == c.Type })
			if i < 0 {
				n.Status.Conditions = append(n.Status.Conditions, c)
			} else {
				n.Status.Conditions[i] = c
			}
		}
		return nil
	})
}

func (a *apiServer) getConfigMap(v view, name string) {
	a.mu.Lock()
	m := a.maps[name]
	a.mu.Unlock()
	if m == nil {
		v.fail(apierrors.NewNotFound(schema.GroupResource{Resource: "configmaps"}, name))
		return
	}
	c := &corev1.ConfigMap{Data: m}
	c.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("ConfigMap"))
	v.write(c)
}

func (a *apiServer) createEvent(v view) {
	body, _ := io.ReadAll(v.r.Body)
	e := &corev1.Event{}
	info, _ := runtime.SerializerInfoForMediaType(v.codecs.SupportedMediaTypes(), v.r.Header.Get("Content-Type"))
	if _, _, err := info.Serializer.Decode(body, nil, e); err != nil {
		a.t.Errorf("decoding an Event: %v", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.told[e.Name] != nil {
		v.fail(apierrors.NewAlreadyExists(schema.GroupResource{Resource: "events"}, e.Name))
		return
	}
	a.told[e.Name] = e
	v.write(e)
}

func (a *apiServer) patchEvent(v view, name string) {
	body, _ := io.ReadAll(v.r.Body)
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := json.Unmarshal(body, a.told[name]); err != nil {
		a.t.Errorf("PATCH %s: %v", body, err)
	}
	a.told[name].Count++ // only here: how often it was told
	v.write(a.told[name])
}

// toldEvents returns the Events that there are.
func (a *apiServer) toldEvents() (events []corev1.Event) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(a.told)) {
		events = append(events, *a.told[name])
	}
	return events
}

// node returns a Node.
func (a *apiServer) node(name string) *corev1.Node {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.nodes[name].DeepCopy()
}

// A view is how one request wants Nodes to be shown.
type view struct {
	t    *testing.T
	w    http.ResponseWriter
	r    *http.Request
	info runtime.SerializerInfo
	meta bool // metadata only

	codecs serializer.CodecFactory
}

func (a *apiServer) view(w http.ResponseWriter, r *http.Request) view {
	media := a.onlyOf
	if media == "" {
		media = runtime.ContentTypeProtobuf
	}
	accept := r.Header.Get("Accept")
	if !strings.Contains(accept, media) {
		a.t.Errorf("%s %s does not accept %s: %s", r.Method, r.URL, media, accept)
	}
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		a.t.Error(err)
	}
	if err := metav1.AddMetaToScheme(scheme); err != nil {
		a.t.Error(err)
	}
	codecs := serializer.NewCodecFactory(scheme)
	info, _ := runtime.SerializerInfoForMediaType(codecs.SupportedMediaTypes(), media)
	return view{a.t, w, r, info, strings.Contains(accept, "as=PartialObjectMetadata"), codecs}
}

func (v view) wants(name string) bool {
	s := v.r.URL.Query().Get("fieldSelector")
	return s == "" || s == "metadata.name="+name
}

func (v view) one(n *corev1.Node) runtime.Object {
	if v.meta {
		o := &metav1.PartialObjectMetadata{ObjectMeta: n.ObjectMeta}
		o.SetGroupVersionKind(metav1.SchemeGroupVersion.WithKind("PartialObjectMetadata"))
		return o
	}
	n = n.DeepCopy()
	n.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Node"))
	return n
}

func (v view) many(found []*corev1.Node, rv string) runtime.Object {
	if v.meta {
		l := &metav1.PartialObjectMetadataList{}
		l.SetGroupVersionKind(metav1.SchemeGroupVersion.WithKind("PartialObjectMetadataList"))
		l.ResourceVersion = rv
		for _, n := range found {
			l.Items = append(l.Items, *v.one(n).(*metav1.PartialObjectMetadata))
		}
		return l
	}
	l := &corev1.NodeList{}
	l.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("NodeList"))
	l.ResourceVersion = rv
	for _, n := range found {
		l.Items = append(l.Items, *n)
	}
	return l
}

// write sends an object. A client that is gone is no error.
func (v view) write(o runtime.Object) { _, _ = v.w.Write(v.encode(o)) }

// encode returns an object in the form that was asked for, and has the answer say which that is.
func (v view) encode(o runtime.Object) []byte {
	v.w.Header().Set("Content-Type", v.info.MediaType)
	b := bytes.Buffer{}
	if err := v.info.Serializer.Encode(o, &b); err != nil {
		v.t.Errorf("encoding %T: %v", o, err)
	}
	return b.Bytes()
}

func (v view) fail(err *apierrors.StatusError) {
	status := err.Status()
	status.APIVersion, status.Kind = "v1", "Status"
	v.w.Header().Set("Content-Type", runtime.ContentTypeJSON)
	v.w.WriteHeader(int(status.Code))
	_ = json.NewEncoder(v.w).Encode(status)
}

// stream starts an answer made of events. A client that is gone is no error.
func (v view) stream() func(watch.EventType, *corev1.Node) {
	v.w.Header().Set("Content-Type", v.info.MediaType+";stream=watch")
	v.w.WriteHeader(http.StatusOK)
	flush := v.w.(http.Flusher).Flush
	flush()
	frames := v.info.StreamSerializer.NewFrameWriter(v.w)
	encoder := restwatch.NewEncoder(streaming.NewEncoder(frames, v.info.StreamSerializer.Serializer), v.info.Serializer)
	return func(kind watch.EventType, n *corev1.Node) {
		_ = encoder.Encode(&watch.Event{Type: kind, Object: v.one(n)})
		flush()
	}
}
