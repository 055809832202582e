"""A checked graph -> files of a runtime for small devices, and that runtime as an executor. One file a runtime."""
