"""OnnxGraph -> Engine."""
