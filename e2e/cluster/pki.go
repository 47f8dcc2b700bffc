package cluster

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"
)

// A pki is the cluster's certificate authority with all that it signed, and the key that signs tokens, as PEM.
type pki struct {
	ca                  []byte
	serverCert          []byte
	serverKey           []byte
	adminCert, admin    []byte
	tokenKey            []byte
	caCert              *x509.Certificate
	caKey               *ecdsa.PrivateKey
	serial              int64
	notBefore, notAfter time.Time
}

func newPKI(server []netip.Addr) (*pki, error) {
	now := time.Now()
	p := &pki{notBefore: now.Add(-time.Minute), notAfter: now.Add(24 * time.Hour)}
	if err := p.authority(); err != nil {
		return nil, err
	}
	var err error
	if p.serverCert, p.serverKey, err = p.server("kube-apiserver", server); err != nil {
		return nil, err
	}
	if p.adminCert, p.admin, err = p.client("admin", "system:masters"); err != nil {
		return nil, err
	}
	_, p.tokenKey, err = newKey()
	return p, err
}

func (p *pki) authority() error {
	key, _, err := newKey()
	if err != nil {
		return err
	}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "e2e"},
		NotBefore: p.notBefore, NotAfter: p.notAfter,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, key.Public(), key)
	if err != nil {
		return err
	}
	if p.caCert, err = x509.ParseCertificate(der); err != nil {
		return err
	}
	p.caKey, p.serial = key, 1
	p.ca = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return nil
}

// server signs a certificate for a server with these addresses.
func (p *pki) server(name string, addrs []netip.Addr) (cert, key []byte, err error) {
	serving := &x509.Certificate{
		Subject:     pkix.Name{CommonName: name},
		DNSNames:    []string{name, "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, a := range addrs {
		serving.IPAddresses = append(serving.IPAddresses, net.IP(a.AsSlice()))
	}
	return p.sign(serving)
}

// client signs a certificate for a user and the groups it is in.
func (p *pki) client(user string, groups ...string) (cert, key []byte, err error) {
	return p.sign(&x509.Certificate{
		Subject:     pkix.Name{CommonName: user, Organization: groups},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
}

func (p *pki) sign(c *x509.Certificate) (cert, key []byte, err error) {
	private, key, err := newKey()
	if err != nil {
		return nil, nil, err
	}
	p.serial++
	c.SerialNumber = big.NewInt(p.serial)
	c.NotBefore, c.NotAfter = p.notBefore, p.notAfter
	c.KeyUsage = x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, c, p.caCert, private.Public(), p.caKey)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), key, nil
}

func newKey() (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, nil, err
	}
	return key, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), nil
}

// write puts what kube-apiserver reads into dir.
func (p *pki) write(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for name, b := range map[string][]byte{
		"ca.crt": p.ca, "server.crt": p.serverCert, "server.key": p.serverKey, "token.key": p.tokenKey,
		"admin.crt": p.adminCert, "admin.key": p.admin,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			return err
		}
	}
	return nil
}
