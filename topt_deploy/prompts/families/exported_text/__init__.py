"""Text encoders that come as a graph of ONNX, such as optimum exports for feature extraction."""
