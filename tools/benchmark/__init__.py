"""The parts of tools/bench.py: workloads, peers, what was measured on, plots and the page."""
