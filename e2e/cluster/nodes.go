package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
)

// fleetConf is a net-conf.json with room for a fleet, and fleetConf6 what it has besides where the fleet is dual-stack.
const (
	fleetConf  = `{"Network": "10.128.0.0/9",%s "Backend": {"Type": "vxlan"}}`
	fleetConf6 = `"IPv6Network": "fd00:10:244::/48", "EnableIPv6": true, "IPv6SubnetLen": 64,`
)

// fleetWriters is how many clients write a fleet at once: more only queue in the API server.
const fleetWriters = 12

// ttlAnnotation is a controller's, on every Node.
const ttlAnnotation = "node.alpha.kubernetes.io/ttl"

// imagesOfNode is how many images a kubelet tells of at most.
const imagesOfNode = 50

// A Fleet is a number of Nodes that have no machine: each is as large as a cloud's, says who has written what as real
// ones do, and publishes dual-stack leases that stand.
type Fleet struct {
	Size int

	api      *kubernetes.Clientset
	onlyIPv4 bool
}

// AddFleet registers so many Nodes. They stay until the cluster ends. The first is written by the requests that make a
// real one, each by its own field manager; the others are created as it is then, because that takes minutes for
// thousands.
func (c *Cluster) AddFleet(t testing.TB, size int) *Fleet {
	t.Helper()
	config := c.restConfig()
	config.QPS = -1
	config.ContentType = runtime.ContentTypeProtobuf
	api, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatalf("a client for the API server: %v", err)
	}
	f := &Fleet{Size: size, api: api}
	first, err := f.register(t.Context(), 0)
	if err != nil {
		t.Fatalf("registering Node %s: %v", fleetName(0), err)
	}
	f.each(t, 1, size, func(i int) error { return f.copy(t.Context(), first, i) })
	return f
}

// each calls write for the Nodes from that number up to another, several at once.
func (f *Fleet) each(t testing.TB, from, to int, write func(i int) error) {
	t.Helper()
	var next atomic.Int64
	next.Store(int64(from) - 1)
	var all sync.WaitGroup
	for range fleetWriters {
		all.Go(func() {
			for i := int(next.Add(1)); i < to && !t.Failed(); i = int(next.Add(1)) {
				if err := write(i); err != nil {
					t.Errorf("writing Node %s: %v", fleetName(i), err)
				}
			}
		})
	}
	all.Wait()
	if t.Failed() {
		t.FailNow()
	}
}

// OnlyIPv4 has all of a fleet publish IPv4 leases alone from now on. A daemon that joins speaks what the fleet does.
func (f *Fleet) OnlyIPv4(t testing.TB) {
	t.Helper()
	f.onlyIPv4 = true
	f.Replace(t, 0, f.Size, 0)
}

// Replace has the Nodes from that number up to another publish, all at once, the leases of Nodes whose numbers are
// higher by shift: other machines under the same names.
func (f *Fleet) Replace(t testing.TB, from, to, shift int) {
	t.Helper()
	f.each(t, from, to, func(i int) error { return f.publish(t.Context(), i, f.lease(i+shift)) })
}

// Withdraw has a Node publish nothing any more.
func (f *Fleet) Withdraw(t testing.TB, i int) {
	t.Helper()
	none := map[string]any{}
	for key := range fleetLease(i) {
		none[key] = nil
	}
	f.each(t, i, i+1, func(i int) error { return f.publish(t.Context(), i, none) })
}

func (f *Fleet) publish(ctx context.Context, i int, annotations map[string]any) error {
	body := map[string]any{"metadata": map[string]any{"annotations": annotations}}
	_, err := f.patch(ctx, fleetName(i), "tweed", body)
	return err
}

// lease is fleetLease in the families that the fleet speaks.
func (f *Fleet) lease(i int) map[string]any {
	all := map[string]any{}
	for key, value := range fleetLease(i) {
		if f.onlyIPv4 && key != "tweed.dev/backend-data" {
			value, _, _ = strings.Cut(value, ",")
		}
		all[key] = value
	}
	return all
}

// A Peer is what a node has to know of one of a fleet.
type Peer struct {
	Subnets []string // those of the families that the fleet speaks
	Host    string
	MAC     string
	Gateway string // the link-local address that belongs to MAC
}

// Peer returns what the Node with that number publishes.
func (f *Fleet) Peer(i int) Peer {
	p := Peer{Subnets: FleetSubnets(i), Host: fleetAddrs(i)[0], MAC: fleetMAC(i),
		Gateway: fmt.Sprintf("fe80::c6b:5aff:fe00:%x", i)}
	if f.onlyIPv4 {
		p.Subnets = p.Subnets[:1]
	}
	return p
}

// copy makes the Node with that number like the first.
func (f *Fleet) copy(ctx context.Context, first *corev1.Node, i int) error {
	n := fleetNode(i)
	maps.Copy(n.Annotations, fleetLease(i))
	n.Annotations[ttlAnnotation] = first.Annotations[ttlAnnotation]
	n.Spec.PodCIDRs = FleetSubnets(i)
	n.Spec.PodCIDR = n.Spec.PodCIDRs[0]
	n.Status.Conditions, n.Status.Images = first.Status.Conditions, first.Status.Images
	nodes := f.api.CoreV1().Nodes()
	n, err := nodes.Create(ctx, n, metav1.CreateOptions{FieldManager: "kubelet"})
	if err != nil {
		return err
	}
	// Whoever creates an object has written all of it; this is what says otherwise.
	n.ManagedFields = writersLike(first, n, time.Duration(i)*time.Second)
	n, err = nodes.Update(ctx, n, metav1.UpdateOptions{FieldManager: "kubelet"})
	if err == nil && len(n.ManagedFields) != len(first.ManagedFields) {
		err = fmt.Errorf("%d entries of who has written what, want %d", len(n.ManagedFields), len(first.ManagedFields))
	}
	return err
}

// writersLike is who has written what of n, so much later, if it was done as with the first.
func writersLike(first, n *corev1.Node, later time.Duration) (all []metav1.ManagedFieldsEntry) {
	for _, m := range first.ManagedFields {
		text := m.FieldsV1.GetRawString()
		for k, cidr := range first.Spec.PodCIDRs {
			text = strings.ReplaceAll(text, cidr, n.Spec.PodCIDRs[k])
		}
		at := metav1.NewTime(m.Time.Add(later))
		m.FieldsV1, m.Time = metav1.NewFieldsV1(text), &at
		all = append(all, m)
	}
	return all
}

// FleetSubnets are those of the fleet's Node with that number; those past the last are free.
func FleetSubnets(i int) []string {
	return []string{fmt.Sprintf("10.%d.%d.0/24", 128+i>>8, i&0xff), fmt.Sprintf("fd00:10:244:%x::/64", i+1)}
}

func fleetName(i int) string {
	return fmt.Sprintf("ip-198-18-%d-%d.eu-central-1.compute.internal", i>>8, i&0xff)
}

func fleetAddrs(i int) []string {
	return []string{fmt.Sprintf("198.18.%d.%d", i>>8, i&0xff), fmt.Sprintf("2001:db8:1::%x", i+1)}
}

// register makes a Node by the requests that make a real one, each by its own field manager.
func (f *Fleet) register(ctx context.Context, i int) (*corev1.Node, error) {
	n, err := f.api.CoreV1().Nodes().Create(ctx, fleetNode(i), metav1.CreateOptions{FieldManager: "kubelet"})
	if err != nil {
		return nil, err
	}
	return f.grow(ctx, n.Name, FleetSubnets(i), fleetLease(i))
}

// grow writes to a new Node what controllers, its daemon and its kubelet do. Without a lease the daemon has not come
// yet.
func (f *Fleet) grow(ctx context.Context, name string, subnets []string, lease map[string]string,
) (*corev1.Node, error) {
	type object = map[string]any
	spec := object{}
	if len(subnets) > 0 {
		spec = object{"podCIDR": subnets[0], "podCIDRs": subnets}
	}
	n, err := f.patch(ctx, name, "kube-controller-manager", object{
		"metadata": object{"annotations": object{ttlAnnotation: "300"}}, "spec": spec,
	})
	if err != nil {
		return nil, err
	}
	if lease != nil {
		if _, err = f.patch(ctx, name, "tweed", object{"metadata": object{"annotations": lease}}); err != nil {
			return nil, err
		}
		up := object{"status": object{"conditions": []corev1.NodeCondition{networkUp()}}}
		if n, err = f.patch(ctx, name, "tweed", up, "status"); err != nil {
			return nil, err
		}
	}
	n.Status.Images = images()
	for _, c := range kubeletConditions(time.Now(), corev1.ConditionTrue) {
		n.Status.Conditions = slices.DeleteFunc(n.Status.Conditions,
			func(old corev1.NodeCondition) bool { return old.Type == c.Type })
		n.Status.Conditions = append(n.Status.Conditions, c)
	}
	return f.api.CoreV1().Nodes().UpdateStatus(ctx, n, metav1.UpdateOptions{FieldManager: "kubelet"})
}

func (f *Fleet) patch(ctx context.Context, name, manager string, body any, part ...string) (*corev1.Node, error) {
	text, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	return f.api.CoreV1().Nodes().Patch(ctx, name, types.StrategicMergePatchType, text,
		metav1.PatchOptions{FieldManager: manager}, part...)
}

// Join makes the Node of a machine as large as the fleet's, and gives its daemon, before its start, their network. keys
// are more of net-conf.json, each with a comma behind it.
func (f *Fleet) Join(t testing.TB, n *Node, keys string) {
	t.Helper()
	if !f.onlyIPv4 {
		keys += fleetConf6
	}
	n.Configure(t, fmt.Sprintf(fleetConf, keys))
	if _, err := f.grow(t.Context(), n.Name, n.PodCIDRs, nil); err != nil {
		t.Fatalf("joining Node %s to the fleet: %v", n.Name, err)
	}
}

// Beat has one Node after the other tell of its health, as kubelets do, so many a second for that time. It returns how
// many did.
func (f *Fleet) Beat(t testing.TB, perSecond int, long time.Duration) (beats int) {
	t.Helper()
	ticker := time.NewTicker(time.Second / time.Duration(perSecond))
	defer ticker.Stop()
	var all sync.WaitGroup
	defer all.Wait()
	for end := time.Now().Add(long); time.Now().Before(end); beats++ {
		<-ticker.C
		name := fleetName(beats * 7 % f.Size)
		all.Go(func() {
			if err := f.beat(t.Context(), name); err != nil {
				t.Errorf("the heartbeat of %s: %v", name, err)
			}
		})
	}
	return beats
}

func (f *Fleet) beat(ctx context.Context, name string) error {
	body := map[string]any{"status": map[string]any{"conditions": kubeletConditions(time.Now(), corev1.ConditionTrue)}}
	_, err := f.patch(ctx, name, "kubelet", body, "status")
	return err
}

func fleetLease(i int) map[string]string {
	subnets, addrs := FleetSubnets(i), fleetAddrs(i)
	return map[string]string{
		"tweed.dev/subnets":      subnets[0] + "," + subnets[1],
		"tweed.dev/host":         addrs[0] + "," + addrs[1],
		"tweed.dev/network":      "10.128.0.0/9,fd00:10:244::/48",
		"tweed.dev/backend":      "vxlan",
		"tweed.dev/backend-data": fmt.Sprintf(`{"vni":1,"port":8472,"mac":%q,"inside":[4,6]}`, fleetMAC(i)),
	}
}

func fleetMAC(i int) string { return fmt.Sprintf("0e:6b:5a:00:%02x:%02x", i>>8, i&0xff) }

// fleetNode is what a kubelet registers where a cloud's machines are large and have a disk driver.
func fleetNode(i int) *corev1.Node {
	name, addrs := fleetName(i), fleetAddrs(i)
	instance := fmt.Sprintf("i-0%016x", 0x9e3779b97f4a7c15*uint64(i+1))[:19]
	zone := "eu-central-1" + string("abc"[i%3])
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
	n.Labels = map[string]string{
		"beta.kubernetes.io/arch": "amd64", "kubernetes.io/arch": "amd64",
		"beta.kubernetes.io/os": "linux", "kubernetes.io/os": "linux", "kubernetes.io/hostname": name,
		"beta.kubernetes.io/instance-type": "m5.2xlarge", "node.kubernetes.io/instance-type": "m5.2xlarge",
		"failure-domain.beta.kubernetes.io/region": zone[:12], "topology.kubernetes.io/region": zone[:12],
		"failure-domain.beta.kubernetes.io/zone": zone, "topology.kubernetes.io/zone": zone,
		"topology.ebs.csi.aws.com/zone": zone, "k8s.io/cloud-provider-aws": "1d2d8a1d4bc0bd8d9a0d9a0ec8aa7e1c",
		"node.kubernetes.io/pool": fmt.Sprintf("workers-%d", i%8), "node.kubernetes.io/lifecycle": "on-demand",
	}
	n.Annotations = map[string]string{
		"alpha.kubernetes.io/provided-node-ip":                   addrs[0],
		"csi.volume.kubernetes.io/nodeid":                        fmt.Sprintf(`{"ebs.csi.aws.com":"%s"}`, instance),
		"volumes.kubernetes.io/controller-managed-attach-detach": "true",
	}
	n.Spec.ProviderID = "aws:///" + zone + "/" + instance
	for _, a := range addrs {
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a})
	}
	n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeHostName, Address: name})
	n.Status.Conditions = kubeletConditions(time.Now().Add(-time.Minute), corev1.ConditionFalse)
	n.Status.Capacity = corev1.ResourceList{
		corev1.ResourceCPU: resource.MustParse("8"), corev1.ResourceMemory: resource.MustParse("32113808Ki"),
		corev1.ResourceEphemeralStorage: resource.MustParse("104845292Ki"), corev1.ResourcePods: resource.MustParse("110"),
		"hugepages-1Gi": resource.MustParse("0"), "hugepages-2Mi": resource.MustParse("0"),
	}
	n.Status.Allocatable = n.Status.Capacity
	n.Status.NodeInfo = corev1.NodeSystemInfo{
		MachineID: fmt.Sprintf("ec2%029x", i), SystemUUID: fmt.Sprintf("ec2%05x-1111-2222-3333-444444444444", i),
		BootID: fmt.Sprintf("%08x-5555-6666-7777-888888888888", i), KernelVersion: "6.12.48+deb13-cloud-amd64",
		OSImage: "Debian GNU/Linux 13 (trixie)", ContainerRuntimeVersion: "containerd://2.1.4",
		KubeletVersion: "v1.36.3", OperatingSystem: "linux", Architecture: "amd64",
	}
	return n
}

func kubeletConditions(now time.Time, ready corev1.ConditionStatus) []corev1.NodeCondition {
	condition := func(kind corev1.NodeConditionType, status corev1.ConditionStatus, reason, message string,
	) corev1.NodeCondition {
		return corev1.NodeCondition{Type: kind, Status: status, Reason: reason, Message: message,
			LastHeartbeatTime: metav1.NewTime(now), LastTransitionTime: metav1.Unix(1_800_000_000, 0)}
	}
	return []corev1.NodeCondition{
		condition("MemoryPressure", "False", "KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
		condition("DiskPressure", "False", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
		condition("PIDPressure", "False", "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
		condition("Ready", ready, "KubeletReady", "kubelet is posting ready status"),
	}
}

func networkUp() corev1.NodeCondition {
	now := metav1.Now()
	return corev1.NodeCondition{Type: corev1.NodeNetworkUnavailable, Status: corev1.ConditionFalse, Reason: "TweedIsUp",
		Message: "the pod network is up", LastHeartbeatTime: now, LastTransitionTime: now}
}

func images() (all []corev1.ContainerImage) {
	for i := range imagesOfNode {
		repository := fmt.Sprintf("registry.example.com/platform/team-%d/service-%d", i%7, i)
		all = append(all, corev1.ContainerImage{
			Names: []string{
				fmt.Sprintf("%s@sha256:%064x", repository, uint64(i+1)*0x9e3779b97f4a7c15),
				fmt.Sprintf("%s:v1.%d.%d", repository, i%5, i),
			},
			SizeBytes: 40_000_000 + int64(i)*1_234_567,
		})
	}
	return all
}
