"""The prompt encoder's host side: templates, geo-text, images and token ids in numpy, the same for PyTorch and ONNX."""
