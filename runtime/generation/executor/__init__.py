"""What runs a decoder's step on a CPU; the seam is `runtime.step.StepExecutor`."""
