module tweed.dev/tweed/overlay/podnet/testdata/libcni

go 1.26.8

require github.com/containernetworking/cni v1.1.2
