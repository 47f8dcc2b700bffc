package kube

import "time"

// SetPatience has writes time out sooner.
func (s *Source) SetPatience(d time.Duration) { s.patience = d }
