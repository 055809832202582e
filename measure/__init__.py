"""What drives the finished house from outside, imported by nobody: demos, benches, proofs, the map of the house."""
