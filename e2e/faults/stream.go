package faults

import (
	"mime"
	"net/http"
	"sync"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/runtime/serializer/streaming"
	"k8s.io/apimachinery/pkg/watch"
	restwatch "k8s.io/client-go/rest/watch"
)

// A stream is the answer to a watch.
type stream struct {
	http.ResponseWriter

	mu     sync.Mutex
	silent bool
}

// Unwrap is for http.ResponseController.
func (s *stream) Unwrap() http.ResponseWriter { return s.ResponseWriter }

func (s *stream) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.silent {
		return len(b), nil
	}
	return s.ResponseWriter.Write(b)
}

func (s *stream) silence() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.silent = true
}

// expire says that the version is expired, and nothing more.
func (s *stream) expire() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.silent = true
	media, _, err := mime.ParseMediaType(s.Header().Get("Content-Type"))
	if err != nil {
		return err
	}
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	codecs := serializer.NewCodecFactory(scheme)
	info, _ := runtime.SerializerInfoForMediaType(codecs.SupportedMediaTypes(), media)
	frames := info.StreamSerializer.NewFrameWriter(s.ResponseWriter)
	encoder := restwatch.NewEncoder(streaming.NewEncoder(frames, info.StreamSerializer.Serializer), info.Serializer)
	status := expired().Status()
	status.APIVersion, status.Kind = "v1", "Status"
	if err := encoder.Encode(&watch.Event{Type: watch.Error, Object: &status}); err != nil {
		return err
	}
	return http.NewResponseController(s.ResponseWriter).Flush()
}
