"""Encoding a city with PyTorch, in one process or several."""
