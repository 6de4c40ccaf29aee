"""A prompt encoder's networks as quantised ONNX, made shard by shard from the checkpoint's files."""
