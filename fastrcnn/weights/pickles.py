"""Pickles of numpy arrays, read without running anything that they name."""

import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastrcnn.weights.errors import WeightError


class _Dtype:
    """Stands for numpy.dtype while a pickle is read: numbers and booleans only."""

    __slots__ = ("value",)

    def __init__(self, code: str, *_: object):
        self.value = np.dtype(str(code))
        if self.value.kind not in "biufc":
            raise pickle.UnpicklingError(f"it holds an array of the type {code}")

    def __setstate__(self, state: tuple) -> None:
        if state[1] in ("<", ">"):
            self.value = self.value.newbyteorder(state[1])


class _Array:
    """Stands for an array until its bytes are known."""

    __slots__ = ("value",)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = _from_bytes(raw, dtype, shape, "F" if fortran else "C").value


def _from_bytes(raw: Any, dtype: _Dtype, shape: tuple, order: str, axes: tuple | None = None) -> _Array:
    """numpy's _frombuffer: order "K" is a transposed array, axes the order of its axes."""
    # Python 2 wrote bytes as text, which the encoding latin1 gives back one to one
    data = raw.encode("latin1") if isinstance(raw, str) else raw
    # a copy in the machine's byte order, which owns its memory
    values = np.frombuffer(data, dtype.value).astype(dtype.value.newbyteorder("="))
    array = _Array()
    array.value = values.reshape(shape).transpose(axes) if axes is not None else values.reshape(shape, order=order)
    return array


def _scalar(dtype: _Dtype, raw: bytes | str) -> Any:
    return _from_bytes(raw, dtype, (), "C").value.item()


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it holds text in the encoding {encoding}")
    return text.encode("latin1")


def _sealed(function: Callable) -> Any:
    """A callable without attributes, so that a pickle can set none."""

    class Sealed:
        __slots__ = ()

        def __call__(self, *args: Any) -> Any:
            return function(*args)

    return Sealed()


_ADMITTED = {
    ("collections", "OrderedDict"): OrderedDict,
    # how protocol 2 writes bytes, and no bytes
    ("_codecs", "encode"): _sealed(_encode),
    ("__builtin__", "bytes"): _sealed(lambda: b""),
    ("numpy", "ndarray"): _sealed(lambda *_: _Array()),
    ("numpy", "dtype"): _sealed(_Dtype),
}
for _core in ("numpy.core", "numpy._core"):  # before and since numpy 2
    _ADMITTED[f"{_core}.multiarray", "_reconstruct"] = _sealed(lambda *_: _Array())
    _ADMITTED[f"{_core}.multiarray", "scalar"] = _sealed(_scalar)
    _ADMITTED[f"{_core}.numeric", "_frombuffer"] = _sealed(_from_bytes)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def read_pickle(path: Path) -> Any:
    """The contents of a pickle of numpy arrays, OrderedDicts, plain containers, text, bytes and numbers.

    Nothing that the file names is looked up or called: arrays are built here from their bytes. A file with anything
    else in it, and a damaged one, is a WeightError.
    """
    try:
        with open(path, "rb") as file:
            return _resolve(_Unpickler(file, encoding="latin1").load())
    except pickle.UnpicklingError as error:
        raise WeightError(
            f"{path} is not a file of weights that can be read safely: {' '.join(str(error).split())}; a pickle may "
            "hold numpy arrays and plain containers, nothing else"
        ) from error
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to say
        raise WeightError(f"{path} is no file of weights, or a damaged one: {type(error).__name__} {error}") from error


def _resolve(value: Any) -> Any:
    """The same containers with arrays in the place of their stand-ins."""
    if isinstance(value, (_Array, _Dtype)):
        return value.value
    if isinstance(value, dict):
        return {key: _resolve(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_resolve(item) for item in value)
    return value
