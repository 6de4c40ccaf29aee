"""From a trained run to a bundle: ONNX graph, parity gate, golden vectors."""
