"""The operator benchmarks: every case with its inputs, its providers, the check of their results, bytes and operations.

`cases("cuda")` are the sizes of a Faster R-CNN R-50-FPN on images of 800 × 1333, `cases("cpu")` small ones. Providers:

    fastrcnn            the public operators of `fastrcnn.ops`
    torchvision         what users of torchvision or detectron2 run for the same result, in the layout that suits it
    reference           the definitions in `fastrcnn.ops.reference`, eager
    compiled reference  the same under `torch.compile`: one size per operator, on CUDA, where it compiles

A provider is called with the dictionary that `Case.make(device)` returned, and may be called again and again with it.
`Case.check` compares what it returned with the definition and raises AssertionError if it is wrong.
"""

from benchmarks.operators import anchors, box_coder, match, nms, proposals, roi_align
from benchmarks.operators.case import Case, Inputs, Provider

__all__ = ["Case", "Inputs", "Provider", "cases"]


def cases(device_type: str) -> list[Case]:
    """All cases for "cuda" or "cpu"."""
    makers = (roi_align.cases, nms.cases_of_many_sets, nms.cases_of_one_set, proposals.cases, anchors.cases)
    makers += (box_coder.cases, match.cases)
    return [case for make in makers for case in make(device_type == "cuda")]
