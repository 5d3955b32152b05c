"""The encoder as a file for another runtime: ONNX, PyTorch's own pt2, OpenVINO."""

from .exporting import FORMATS, Export, ExportError, Format, export_encoder


__all__ = ["FORMATS", "Export", "ExportError", "Format", "export_encoder"]
