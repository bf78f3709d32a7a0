"""Where torchvision has the function, arguments and defaults are torchvision's."""

import inspect

import pytest
import torchvision.ops as theirs

from fastrcnn import ops as ours

NAMES = """
    nms batched_nms roi_align RoIAlign.__init__ RoIAlign.forward MultiScaleRoIAlign.__init__ MultiScaleRoIAlign.forward
    box_area box_iou box_convert clip_boxes_to_image remove_small_boxes sigmoid_focal_loss
""".split()


def arguments(module, name: str) -> list[tuple]:
    value = module
    for part in name.split("."):
        value = getattr(value, part)
    return [(p.name, p.kind, p.default) for p in inspect.signature(value).parameters.values()]


@pytest.mark.parametrize("name", NAMES)
def test_signature_is_torchvisions(name):
    assert arguments(ours, name) == arguments(theirs, name)
