"""What runs an encoder's graph on a CPU; the seam is `runtime.graph.GraphExecutor`."""
