"""Clients by others against a served model: what each asks, and whether it gets what the model itself gives."""
