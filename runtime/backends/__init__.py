"""Libraries that run networks: ONNX Runtime and TensorRT."""
