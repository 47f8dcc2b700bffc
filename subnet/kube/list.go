package kube

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

// metadataList asks for a list of metadata, by protobuf where the server speaks it.
const metadataList = runtime.ContentTypeProtobuf + onlyMetadata + "," + runtime.ContentTypeJSON + onlyMetadata

const onlyMetadata = ";as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"

// listMetadata reads the metadata of all Nodes as they are at one moment, in one request, and keeps of each its name,
// uid, resourceVersion, time of creation and our annotations. It returns all of them or an error.
//
// The answer is compressed, which a list that comes as a watch (sendInitialEvents) is not, and reduced while it
// arrives: most of it says who has written which field.
func listMetadata(ctx context.Context, core *rest.RESTClient) (*metav1.PartialObjectMetadataList, error) {
	// Without a resourceVersion, and without a limit: pages are of one moment only as long as the server remembers it.
	body, err := core.Get().Resource("nodes").SetHeader("Accept", metadataList).Stream(ctx)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	list, err := readList(body)
	if err != nil {
		return nil, fmt.Errorf("the answer cannot be used: %w", err)
	}
	return list, nil
}

// slim keeps of a Node's metadata what we read. Nothing of the rest stays in memory.
func slim(o *metav1.PartialObjectMetadata) metav1.PartialObjectMetadata {
	return metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{
		Name: o.Name, UID: o.UID, ResourceVersion: o.ResourceVersion, CreationTimestamp: o.CreationTimestamp,
		Annotations: ours(o.Annotations),
	}}
}

// compressed has a reflector fetch lists with List.
type compressed struct{ *cache.ListWatch }

// IsWatchListSemanticsUnSupported is what a reflector asks before it has a list come as a watch.
func (compressed) IsWatchListSemanticsUnSupported() bool { return true }

// protobufMagic begins each object in Kubernetes' protobuf.
const protobufMagic = "k8s\x00"

func readList(r io.Reader) (*metav1.PartialObjectMetadataList, error) {
	list := &metav1.PartialObjectMetadataList{}
	b := bufio.NewReader(r)
	head, err := b.Peek(len(protobufMagic))
	if err != nil {
		return nil, unexpected(err)
	}
	if string(head) == protobufMagic {
		err = readProtobuf(b, list)
	} else {
		err = readJSON(b, list)
	}
	switch {
	case err != nil:
		return nil, err
	case list.ResourceVersion == "":
		return nil, errors.New("it is a list without a resourceVersion")
	case list.Continue != "":
		return nil, errors.New("it is a part where all was asked for")
	}
	return list, nil
}

func readJSON(r io.Reader, list *metav1.PartialObjectMetadataList) error {
	if err := json.NewDecoder(r).Decode(list); err != nil {
		return unexpected(err)
	}
	for i := range list.Items {
		list.Items[i] = slim(&list.Items[i])
	}
	return nil
}

// A listReader puts a list together from the protobuf of a runtime.Unknown, which is around every object, with a
// PartialObjectMetadataList in it. The numbers of fields are those of generated.proto in k8s.io/apimachinery, in
// pkg/runtime and pkg/apis/meta/v1.
type listReader struct {
	list *metav1.PartialObjectMetadataList
	buf  bytes.Buffer
}

func readProtobuf(r *bufio.Reader, list *metav1.PartialObjectMetadataList) error {
	if _, err := r.Discard(len(protobufMagic)); err != nil {
		return err
	}
	l := listReader{list: list}
	return eachField(r, l.unknown)
}

func (l *listReader) unknown(field uint64, m *message) error {
	if field == 2 { // raw
		return eachField(m, l.of)
	}
	return nil
}

func (l *listReader) of(field uint64, m *message) error {
	switch field {
	case 1: // metadata
		b, err := l.read(m)
		if err != nil {
			return err
		}
		return l.list.ListMeta.Unmarshal(b)
	case 2: // items
		l.list.Items = append(l.list.Items, metav1.PartialObjectMetadata{})
		return eachField(m, l.item)
	}
	return nil
}

func (l *listReader) item(field uint64, m *message) error {
	if field == 1 { // metadata
		return eachField(m, l.metadata)
	}
	return nil
}

// metadata leaves what slim would leave.
func (l *listReader) metadata(field uint64, m *message) error {
	o := &l.list.Items[len(l.list.Items)-1].ObjectMeta
	switch field {
	case 1, 5, 6, 8:
	case 12: // annotations
		return l.annotation(o, m)
	default:
		return nil
	}
	b, err := l.read(m)
	if err != nil {
		return err
	}
	switch field {
	case 1:
		o.Name = string(b)
	case 5:
		o.UID = types.UID(b)
	case 6:
		o.ResourceVersion = string(b)
	case 8:
		return o.CreationTimestamp.Unmarshal(b)
	}
	return nil
}

func (l *listReader) annotation(o *metav1.ObjectMeta, m *message) error {
	var key, value string
	err := eachField(m, func(field uint64, m *message) error {
		b, err := l.read(m)
		switch field {
		case 1:
			key = string(b)
		case 2:
			value = string(b)
		}
		return err
	})
	if err == nil && strings.HasPrefix(key, prefix) {
		if o.Annotations == nil {
			o.Annotations = map[string]string{}
		}
		o.Annotations[key] = value
	}
	return err
}

// read returns what there is of a message; it is good until the next one is read.
func (l *listReader) read(m *message) ([]byte, error) {
	l.buf.Reset()
	_, err := l.buf.ReadFrom(m)
	return l.buf.Bytes(), err
}

type byteReader interface {
	io.Reader
	io.ByteReader
}

// A message is a message of protobuf, or a text, within another.
type message struct {
	in   byteReader
	left uint64 // bytes
}

func (m *message) Read(b []byte) (int, error) {
	if m.left == 0 {
		return 0, io.EOF
	}
	n, err := m.in.Read(b[:min(uint64(len(b)), m.left)])
	m.left -= uint64(n)
	return n, unexpected(err)
}

func (m *message) ReadByte() (byte, error) {
	if m.left == 0 {
		return 0, io.EOF
	}
	b, err := m.in.ReadByte()
	m.left--
	return b, unexpected(err)
}

// unexpected is err where there should have been more.
func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// eachField reads protobuf up to the end of r, and calls take with each field that is a message or a text. What take
// leaves of it is skipped, as other fields are. A message is good until take returns.
func eachField(r byteReader, take func(field uint64, m *message) error) error {
	m := &message{in: r}
	for {
		tag, err := binary.ReadUvarint(r)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		isMessage := false
		switch tag & 7 { // https://protobuf.dev/programming-guides/encoding/#structure
		case 0:
			_, err = binary.ReadUvarint(r)
		case 1:
			m.left = 8
		case 2:
			isMessage = true
			m.left, err = binary.ReadUvarint(r)
		case 5:
			m.left = 4
		default:
			err = fmt.Errorf("field %d has the unknown type %d", tag>>3, tag&7)
		}
		if err == nil && isMessage {
			err = take(tag>>3, m)
		}
		if err == nil {
			_, err = io.Copy(io.Discard, m)
		}
		if err != nil {
			return unexpected(err)
		}
	}
}
