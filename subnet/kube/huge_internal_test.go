package kube

import (
	"fmt"
	"runtime"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// hugeValue is as much as all annotations of a Node may have together: TotalAnnotationSizeLimitB of
// k8s.io/apimachinery/pkg/api/validation.
const hugeValue = 256 << 10

// TestHugeAnnotationsStayInMemory fills every annotation that there is in turn, and looks what is kept of many Nodes.
func TestHugeAnnotationsStayInMemory(t *testing.T) {
	const nodes, most = 20, 16 << 10 // bytes a node
	for _, key := range []string{
		"example.com/other", prefix + "later", Subnets, Host, Backend, BackendData, Network, Claim, HostOverride, Sources,
	} {
		for name, word := range map[string]string{"one word": "1", "addresses": "192.0.2.1,", "subnets": "10.244.7.0/24,",
			"JSON": `{"a":1}`} {
			var all table
			all.wake = func() {}
			store := nodeStore{&all, func() {}, func() {}}
			if err := store.Replace(nil, ""); err != nil {
				t.Fatal(err)
			}
			before := heap()
			for i := range nodes {
				kept := slim(hugeNode(i, key, word))
				if err := store.Update(&kept); err != nil {
					t.Fatal(err)
				}
			}
			if each := (heap() - before) / nodes; each > most {
				t.Errorf("%s full of %s: %d bytes are kept of each Node", key, name, each)
			}
			runtime.KeepAlive(&all)
		}
	}
}

func hugeNode(i int, key, word string) *metav1.PartialObjectMetadata {
	return &metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{
		Name: fmt.Sprintf("node-%d", i),
		Annotations: map[string]string{
			Subnets: fmt.Sprintf("10.244.%d.0/24", i), Host: "192.0.2.1", Backend: "vxlan", BackendData: "{}",
			key: strings.Repeat(word, hugeValue/len(word)),
		},
	}}
}

// heap is how many bytes are in use.
func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
