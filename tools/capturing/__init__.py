"""The parts of tools/capture.py: candidates, what they take, the choice among them, tables and the plot."""
