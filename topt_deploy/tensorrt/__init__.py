"""TensorRT's engines: which library is installed, what sizes an engine is made for, and building one from ONNX.

Core, because export builds engines ahead of time and the runtime builds them on the target. Imports neither torch nor
onnx, and TensorRT only when it is used.
"""
