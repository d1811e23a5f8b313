"""Continuous batching over the layer: requests, scheduling, and the public `LLM`."""
