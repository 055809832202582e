"""OnnxGraph -> quantised OnnxGraph, one file a scheme."""
