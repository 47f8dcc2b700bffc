package backend_test

import (
	"testing"

	"tweed.dev/tweed/backend/kernel/netnstest"
)

func TestMain(m *testing.M) { netnstest.Main(m) }
