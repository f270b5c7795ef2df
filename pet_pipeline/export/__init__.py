"""Saved pipelines for other runtimes: ONNX files, and a static web page that runs them in a browser."""
