"""Getting a city's data and training on it, with PyTorch."""
