"""Parts by name; tests/docs/test_extending.py runs the examples of docs/extending.md."""

import pytest

import fastrcnn
from fastrcnn.config import ConfigError
from fastrcnn.models.registry import BACKBONES, ROI_BOX_FEATURE_EXTRACTORS, Registry, import_parts


def test_registry():
    parts = Registry()

    @parts.register("b")
    class Part:
        pass

    parts.register("a")(len)
    assert parts == {"b": Part, "a": len}
    assert parts.find("b", "MODEL.PART") is Part
    with pytest.raises(ConfigError, match=r"MODEL.PART is 'c'; it must be one of b, a$"):
        parts.find("c", "MODEL.PART")
    with pytest.raises(ValueError, match="'a' is registered already, as <built-in function len>"):
        parts.register("a")(max)


def test_names_are_maskrcnn_benchmarks():
    """With R-152 and the small ones throughout."""
    resnets = {f"R-{depth}-{top}" for depth in (50, 101) for top in ("C4", "C5", "FPN", "FPN-RETINANET")}
    assert resnets | {"R-152-FPN", "FBNet"} <= set(BACKBONES)
    assert {
        "ResNet50Conv5ROIFeatureExtractor",
        "FPN2MLPFeatureExtractor",
        "FPNXconv1fcFeatureExtractor",
    } <= set(ROI_BOX_FEATURE_EXTRACTORS)


def test_modules_that_cannot_be_imported():
    cfg = fastrcnn.load_config(None, ["MODEL.IMPORT", "('no_such_parts',)"])
    with pytest.raises(ConfigError, match=r"MODEL.IMPORT names 'no_such_parts', which cannot be imported: No module"):
        import_parts(cfg)
