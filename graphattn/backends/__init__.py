"""Backends: who computes attention for a layer group."""
