"""Other engines on this layer: each changed in place for a process, and restored."""
