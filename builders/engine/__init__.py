"""OnnxGraph -> Engine: TensorRT, of whole graphs and of ranks."""
