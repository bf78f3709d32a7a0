"""Detectors as files that run without this package: torch.export, AOTInductor and, in `fastrcnn.export.onnx`, ONNX."""

from fastrcnn.export.module import ExportModule, outputs
from fastrcnn.export.program import (
    METADATA,
    export_aoti,
    export_program,
    export_pt2,
    load_aoti,
    load_pt2,
    metadata,
)

__all__ = [
    "METADATA",
    "ExportModule",
    "export_aoti",
    "export_program",
    "export_pt2",
    "load_aoti",
    "load_pt2",
    "metadata",
    "outputs",
]
