"""Networks as ONNX files, with weights as small as in the packed file."""

from qsv.deploy.onnx.export import export_onnx, to_onnx

__all__ = ["export_onnx", "to_onnx"]
