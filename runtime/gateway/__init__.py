"""The door: an HTTP front that may face a network, which Triton's own may not; it speaks OpenAI's API and KServe v2."""
