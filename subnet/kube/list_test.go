package kube

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/watchlist"
)

func listOf(n int) *metav1.PartialObjectMetadataList {
	l := &metav1.PartialObjectMetadataList{}
	l.SetGroupVersionKind(metav1.SchemeGroupVersion.WithKind("PartialObjectMetadataList"))
	l.ResourceVersion = "4711"
	for i := range n {
		o := metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{
			Name: fmt.Sprintf("n%d", i), UID: types.UID(fmt.Sprintf("uid-%d", i)), ResourceVersion: strconv.Itoa(100 + i),
			CreationTimestamp: metav1.Unix(1_800_000_000+int64(i), 0), Generation: 300,
			Annotations: map[string]string{Subnets: fmt.Sprintf("10.244.%d.0/24", i), "example.com/other": "x"},
			Labels:      map[string]string{"kubernetes.io/os": "linux"}, Finalizers: []string{"example.com/f"},
			ManagedFields: []metav1.ManagedFieldsEntry{{
				Manager: "kubelet", Time: &metav1.Time{Time: time.Unix(1_800_000_000, 0)},
				FieldsV1: metav1.NewFieldsV1(`{"f:metadata":{}}`),
			}},
		}}
		o.SetGroupVersionKind(metav1.SchemeGroupVersion.WithKind("PartialObjectMetadata"))
		l.Items = append(l.Items, o)
	}
	return l
}

// reduced is what shall be left of listOf.
func reduced(n int) *metav1.PartialObjectMetadataList {
	l := &metav1.PartialObjectMetadataList{}
	l.ResourceVersion = "4711"
	for i := range n {
		l.Items = append(l.Items, metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{
			Name: fmt.Sprintf("n%d", i), UID: types.UID(fmt.Sprintf("uid-%d", i)), ResourceVersion: strconv.Itoa(100 + i),
			CreationTimestamp: metav1.Unix(1_800_000_000+int64(i), 0),
			Annotations:       map[string]string{Subnets: fmt.Sprintf("10.244.%d.0/24", i)},
		}})
	}
	return l
}

func encode(t testing.TB, media string, l *metav1.PartialObjectMetadataList) []byte {
	t.Helper()
	scheme := runtime.NewScheme()
	if err := metav1.AddMetaToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	info, ok := runtime.SerializerInfoForMediaType(serializer.NewCodecFactory(scheme).SupportedMediaTypes(), media)
	if !ok {
		t.Fatalf("nothing speaks %s", media)
	}
	var b bytes.Buffer
	if err := info.Serializer.Encode(l, &b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func mediaTypes() []string { return []string{runtime.ContentTypeProtobuf, runtime.ContentTypeJSON} }

func TestListKeepsWhatNobodyReads(t *testing.T) {
	for _, media := range mediaTypes() {
		got, err := readList(bytes.NewReader(encode(t, media, listOf(3))))
		if err != nil {
			t.Fatalf("%s: %v", media, err)
		}
		got.TypeMeta = metav1.TypeMeta{}
		for i := range got.Items {
			got.Items[i].TypeMeta = metav1.TypeMeta{}
		}
		if want := reduced(3); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got\n%+v, want\n%+v", media, got, want)
		}
	}
}

// Wherever an answer breaks off, it is not taken for a shorter list.
func TestListBreaksOffHalfWay(t *testing.T) {
	for _, media := range mediaTypes() {
		whole := encode(t, media, listOf(3))
		end := len(whole)
		switch media {
		case runtime.ContentTypeProtobuf:
			end -= 4 // after the list, the answer has two empty texts
		case runtime.ContentTypeJSON:
			end-- // a line feed
		}
		for i := range end {
			if got, err := readList(bytes.NewReader(whole[:i])); err == nil {
				t.Fatalf("%s: the first %d of %d bytes are taken for a list of %d", media, i, len(whole), len(got.Items))
			}
		}
		broken := io.MultiReader(bytes.NewReader(whole[:end/2]), errReader{})
		if _, err := readList(broken); !errors.Is(err, errBroken) {
			t.Errorf("%s: a connection that breaks is told as: %v", media, err)
		}
	}
}

var errBroken = errors.New("connection reset by peer")

type errReader struct{}

func (errReader) Read([]byte) (int, error) { return 0, errBroken }

func TestPartOfAListIsTakenForAll(t *testing.T) {
	part, unversioned := listOf(2), listOf(2)
	part.Continue, unversioned.ResourceVersion = "next", ""
	for _, media := range mediaTypes() {
		for what, l := range map[string]*metav1.PartialObjectMetadataList{
			"one of several pages": part, "a list without a version": unversioned,
		} {
			if _, err := readList(bytes.NewReader(encode(t, media, l))); err == nil {
				t.Errorf("%s: %s passes", media, what)
			}
		}
	}
}

// A later Kubernetes may add fields that we do not know.
func TestListHasUnknownFields(t *testing.T) {
	l := encode(t, runtime.ContentTypeProtobuf, listOf(2))
	more := []byte{
		0x78, 0x96, 0x01, // field 15, varint
		0x81, 0x01, 1, 2, 3, 4, 5, 6, 7, 8, // field 16, 64 bits
		0x8d, 0x01, 1, 2, 3, 4, // field 17, 32 bits
		0x92, 0x01, 2, 'h', 'i', // field 18, text
	}
	got, err := readList(bytes.NewReader(append(l, more...)))
	if err != nil || len(got.Items) != 2 {
		t.Fatalf("%v, %v", got, err)
	}
	for _, bad := range [][]byte{{0x7b}, {0x7f}, {0x78}, {0x81, 0x01, 1}, {0x92, 0x01, 9, 'h'}} {
		if _, err := readList(bytes.NewReader(append(bytes.Clone(l), bad...))); err == nil {
			t.Errorf("%x behind a list passes", bad)
		}
	}
}

// A limit or a resourceVersion in the request would have a part, or the past, taken for all; uncompressed, the answer
// is many times as long.
func TestListIsAskedForOtherwise(t *testing.T) {
	var got *http.Request
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got = r
		w.Header().Set("Content-Type", runtime.ContentTypeProtobuf)
		w.Header().Set("Content-Encoding", "gzip")
		z := gzip.NewWriter(w)
		_, _ = z.Write(encode(t, runtime.ContentTypeProtobuf, listOf(1000)))
		_ = z.Close()
	}))
	defer srv.Close()
	core, _, err := nodeClient(&rest.Config{Host: srv.URL})
	if err != nil {
		t.Fatal(err)
	}
	list, err := listMetadata(t.Context(), core)
	if err != nil || len(list.Items) != 1000 {
		t.Fatalf("%v", err)
	}
	if got.URL.String() != "/api/v1/nodes" || got.Header.Get("Accept-Encoding") != "gzip" ||
		!strings.HasPrefix(got.Header.Get("Accept"), "application/vnd.kubernetes.protobuf;as=PartialObjectMetadataList;") {
		t.Errorf("asked for %s with %v", got.URL, got.Header)
	}
}

func TestReflectorHasTheListStreamed(t *testing.T) {
	s, err := New(&rest.Config{Host: "https://192.0.2.1"}, Options{Node: "n1"}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if !watchlist.DoesClientNotSupportWatchListSemantics(s.nodes()) {
		t.Error("the list of all Nodes would come as a watch, which is not compressed")
	}
	if watchlist.DoesClientNotSupportWatchListSemantics(s.own()) {
		t.Error("the own Node would take two requests where one does")
	}
}

// FuzzReadList: whatever a server sends, it is a list that can be told again, or an error.
func FuzzReadList(f *testing.F) {
	for _, media := range mediaTypes() {
		f.Add(encode(f, media, listOf(2)))
	}
	f.Add([]byte("k8s\x00\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"))
	f.Fuzz(func(t *testing.T, answer []byte) {
		list, err := readList(bytes.NewReader(answer))
		if (list == nil) != (err != nil) {
			t.Fatalf("%v and %v", list, err)
		}
		if err != nil {
			return
		}
		again, err := readList(bytes.NewReader(encode(t, runtime.ContentTypeProtobuf, list)))
		if err != nil || len(again.Items) != len(list.Items) {
			t.Fatalf("%d Nodes told again: %v", len(list.Items), err)
		}
	})
}
