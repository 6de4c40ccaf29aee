"""The parts of each model family for export."""
