"""Model families that encode prompts: a folder each, and in it how it reads a prompt and how PyTorch runs it."""
