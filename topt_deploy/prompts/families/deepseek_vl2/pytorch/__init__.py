"""DeepSeek-VL2 in PyTorch."""
