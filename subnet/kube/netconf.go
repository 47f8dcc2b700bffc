package kube

import (
	"context"
	"fmt"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"
)

// Where a cluster keeps the pod network's configuration.
const (
	NetConfNamespace = "tweed"
	NetConfMap       = "tweed"
	NetConfKey       = "net-conf.json"
)

// NetConf reads the pod network's configuration from the cluster's ConfigMap.
func NetConf(ctx context.Context, cfg *rest.Config) (string, error) {
	cfg, err := reach(cfg)
	if err != nil {
		return "", err
	}
	core, _, err := nodeClient(cfg)
	if err != nil {
		return "", err
	}
	m := &corev1.ConfigMap{}
	err = core.Get().Resource("configmaps").Namespace(NetConfNamespace).Name(NetConfMap).
		Do(klog.NewContext(ctx, logr.Discard())).Into(m)
	switch {
	case apierrors.IsNotFound(err):
		return "", fmt.Errorf("there is no ConfigMap %s in namespace %s at %s", NetConfMap, NetConfNamespace, cfg.Host)
	case err != nil:
		return "", explain("get", "configmaps", cfg.Host, err)
	}
	text, ok := m.Data[NetConfKey]
	if !ok {
		return "", fmt.Errorf("ConfigMap %s in namespace %s has no key %s", NetConfMap, NetConfNamespace, NetConfKey)
	}
	return text, nil
}
