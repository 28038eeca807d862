"""The page without a server: a step of conversation as an ONNX graph, which the browser runs itself."""
