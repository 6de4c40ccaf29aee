"""The prompt encoder in PyTorch: published checkpoints through transformers, and DeepSeek-VL2, which it lacks."""
