"""Offline work: everything that ends in files."""
