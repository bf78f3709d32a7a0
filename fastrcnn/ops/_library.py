"""How operators are registered, in one place: nothing else in the package touches `torch.library`.

`FASTRCNN_KERNELS` chooses the implementation and is read once, at import:

    auto        CPU: torchvision's compiled operators or the reference; CUDA: Triton, or the reference without Triton
    triton      as auto, but a missing Triton is an error
    reference   the pure PyTorch definition everywhere
    interpret   the Triton kernels everywhere, on the CPU in Triton's interpreter (slow; for tests)
"""

import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor

LIBRARY = torch.library.Library("fastrcnn", "FRAGMENT")
MODES = ("auto", "triton", "reference", "interpret")
MODE = os.environ.get("FASTRCNN_KERNELS", "auto")
if MODE not in MODES:
    raise ValueError(f"FASTRCNN_KERNELS is {MODE!r}; it must be one of {', '.join(MODES)}")
if MODE == "interpret":
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when it is first imported, which happens in the launchers


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


if MODE in ("triton", "interpret") and not _has_triton():
    raise ImportError(f"FASTRCNN_KERNELS={MODE} needs the package triton, which is not installed")

USE_TRITON = MODE != "reference" and _has_triton()


def register(
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    cpu: Callable | None = None,
    triton: Callable | None = None,
    autograd: Callable | None = None,
) -> torch._ops.OpOverload:
    """Define `torch.ops.fastrcnn.<name>` and say who implements it; returns the operator.

    reference: the definition, on any device. fake: the shape rule (dtype and strides included).
    cpu: a faster CPU implementation. triton: allocates and launches kernels; imports `triton_kernels` itself.
    autograd: the function at the Autograd key, for differentiable operators (see `below_autograd`); the results of the
    others never require a gradient.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    on_gpu = _on_device(triton) if triton is not None and USE_TRITON else reference
    if MODE == "interpret" and triton is not None:
        on_cpu = triton
    elif MODE == "reference" or cpu is None:
        on_cpu = reference
    else:
        on_cpu = cpu
    LIBRARY.impl(name, on_cpu, "CPU")
    LIBRARY.impl(name, on_gpu, "CUDA")
    torch.library.register_fake(f"fastrcnn::{name}", fake, lib=LIBRARY)
    operator = getattr(torch.ops.fastrcnn, name).default

    def without_gradient(*args):
        with below_autograd():
            return operator(*args)

    LIBRARY.impl(name, autograd or without_gradient, "Autograd")
    return operator


def register_composite(schema: str, function: Callable) -> torch._ops.OpOverload:
    """Define an operator that is made of PyTorch's own: autograd, compilers and fakes look through it."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, function, "CompositeImplicitAutograd")
    return getattr(torch.ops.fastrcnn, name).default


def _on_device(launch: Callable) -> Callable:
    """Triton launches on the current device, not on that of its arguments: switch to it."""

    def launch_on_device(*args):
        first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return launch(*args)
        with torch.cuda.device_of(first):
            return launch(*args)

    return launch_on_device


def new_dynamic_size() -> torch.SymInt:
    """In a shape rule: a size that depends on data, so that compilers go on without knowing it."""
    return torch.library.get_ctx().new_dynamic_size()


def below_autograd():
    """Context in which calling an operator reaches its implementation and not its Autograd function again."""
    return torch._C._AutoDispatchBelowAutograd()


def needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def check_floating(error: type[Exception] = ValueError, **tensors: Tensor | None) -> None:
    """Raise `error`, naming the argument, for a tensor that is not of floating point."""
    for name, x in tensors.items():
        if x is not None and not x.is_floating_point():
            raise error(f"{name} must be of floating point, got {x.dtype}")


def check_one_device(error: type[Exception] = ValueError, **tensors: Tensor | None) -> None:
    """Raise `error`, naming the argument, for a tensor that is not on the device of the first."""
    given = [(name, x) for name, x in tensors.items() if x is not None]
    for name, x in given[1:]:
        if x.device != given[0][1].device:
            raise error(f"{name} must be on the device of {given[0][0]}, {given[0][1].device}, got {x.device}")
