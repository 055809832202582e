"""Results of stages, kept under keys that forget nothing they depend on."""
