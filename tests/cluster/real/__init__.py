"""The test bed: what must hold in any cluster, in a namespace of its own (`make test-cluster`)."""
