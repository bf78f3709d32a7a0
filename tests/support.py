"""Helpers that several test modules import."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# relative RMS and maximum error against the fp64 reference on inputs already rounded to the dtype
TOLERANCES = {torch.float32: (1e-6, 1e-5), torch.float16: (1e-3, 4e-3), torch.bfloat16: (5e-3, 2e-2)}

# options that make the quick start's model and schedule as small as they can be
TINY = (
    "MODEL.DEVICE cpu MODEL.RESNETS.WIDTH_PER_GROUP 8 MODEL.RESNETS.RES2_OUT_CHANNELS 16 "
    "MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.BACKBONE_OUT_CHANNELS 16 MODEL.ROI_BOX_HEAD.MLP_HEAD_DIM 16 "
    "MODEL.ROI_MASK_HEAD.CONV_LAYERS (16,) MODEL.ROI_HEADS.DETECTIONS_PER_IMG 5 MODEL.ROI_HEADS.SCORE_THRESH 0.01 "
    "INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 SOLVER.MAX_ITER 4 SOLVER.STEPS (3,) SOLVER.IMS_PER_BATCH 2 "
    "TEST.IMS_PER_BATCH 2 SOLVER.LOG_PERIOD 1 SOLVER.CHECKPOINT_PERIOD 2 SOLVER.WARMUP_ITERS 2"
).split()


def assert_accurate(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    """got, as the op returned it, against the fp64 reference: relative RMS and maximum error within TOLERANCES[dtype].

    The maximum is relative to the largest magnitude of the reference; NaN anywhere fails.
    """
    assert got.shape == want.shape
    if want.numel() == 0:
        return
    error = (got.double() - want.double()).abs()
    rms_limit, max_limit = TOLERANCES[dtype]
    rms = error.square().mean().sqrt() / want.double().square().mean().sqrt().clamp(min=1e-30)
    worst = error.max() / want.double().abs().max().clamp(min=1e-30)
    assert rms <= rms_limit, f"relative RMS error {rms:.2e} over {rms_limit:.0e}"
    assert worst <= max_limit, f"relative maximum error {worst:.2e} over {max_limit:.0e}"


def without_values(model: torch.nn.Module, mode: FakeTensorMode) -> torch.nn.Module:
    """The model with parameters and buffers that have a shape and a device only."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = torch.nn.Parameter(mode.from_tensor(parameter.data), parameter.requires_grad)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = mode.from_tensor(buffer)
    return model
