"""Pickles: arrays and plain containers come out as they went in; whatever could run code is refused."""

import collections
import os
import pickle
import re
import struct
from fractions import Fraction

import numpy as np
import pytest

from fastrcnn.weights import WeightError
from fastrcnn.weights.pickles import read_pickle


def contents():
    return {
        "blobs": collections.OrderedDict(
            conv1_w=np.arange(24, dtype=np.float32).reshape(2, 3, 4),
            half=np.float16([1.5, -2]),
            big_endian=np.array([1, 2, 3], dtype=">f4"),
            columns=np.asfortranarray(np.arange(6.0).reshape(2, 3)),
            turned=np.arange(24).reshape(2, 3, 4).transpose(1, 2, 0),
            nothing=np.zeros((0, 4), np.float32),
            count=np.array(7),
            mask=np.array([True, False]),
        ),
        "scalar": np.float32(2.5),
        "cfg": "MODEL: é\n",
        "bytes": b"\x00\xff",
        "plain": [1, 2.5, None, True, (1, 2), {"a": {3}}, 10**30],
    }


@pytest.mark.parametrize("protocol", range(6))
def test_contents_come_back(tmp_path, protocol):
    want = contents()
    if protocol < 4:
        del want["plain"][5]  # older protocols make sets by a call
    (tmp_path / "file.pkl").write_bytes(pickle.dumps(want, protocol))
    got = read_pickle(tmp_path / "file.pkl")
    for name, array in want.pop("blobs").items():
        found = got["blobs"][name]
        assert found.shape == array.shape
        assert found.dtype == array.dtype.newbyteorder("=")
        assert np.array_equal(found, array)
        assert found.flags.writeable
    del got["blobs"]
    assert got == want


def python2_pickle(array):
    """{"blobs": {"conv1_w": array}} as Python 2 wrote it: text of bytes, numpy's old module names, protocol 2."""

    def text(value):
        return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value

    def integer(value):
        return b"J" + struct.pack("<i", value)

    shape = b"(" + b"".join(integer(s) for s in array.shape) + b"t"
    dtype = b"cnumpy\ndtype\n(" + text(b"f4") + integer(0) + integer(1) + b"tR"
    dtype += b"(" + integer(3) + text(b"<") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
    value = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + integer(0) + b"t" + text(b"b") + b"tR"
    value += b"(" + integer(1) + shape + dtype + b"\x89" + text(array.tobytes()) + b"tb"
    return b"\x80\x02}" + text(b"blobs") + b"}" + text(b"conv1_w") + value + b"ss."


def test_pickles_of_python_2(tmp_path):
    array = np.random.default_rng(0).standard_normal((5, 40)).astype("<f4")
    path = tmp_path / "R-50.pkl"
    path.write_bytes(python2_pickle(array))
    with open(path, "rb") as file:
        assert np.array_equal(pickle.load(file, encoding="latin1")["blobs"]["conv1_w"], array)  # it is one
    assert np.array_equal(read_pickle(path)["blobs"]["conv1_w"], array)


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def text(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


def name(module, function):
    return b"\x80\x04" + text(module) + text(function) + b"\x93"


# an array of Python objects whose addresses stand in the file
POINTERS = name("numpy.core.numeric", "_frombuffer") + b"(C\x08" + b"A" * 8
POINTERS += name("numpy", "dtype") + b"(" + text("O8") + b"\x89\x88tRK\x01\x85" + text("C") + b"tR."


def hostile(path):
    """name -> (file, why it is refused); the first five leave the file `path` behind if their code runs."""
    shell, array, dtype = Call(os.system, f"touch {path}"), np.zeros(2), name("numpy", "dtype")
    return {
        "call": (pickle.dumps(shell), "it asks for posix.system"),
        "nested": (pickle.dumps({"blobs": {"conv1_w": array, "x": [(shell,)]}}), "it asks for posix.system"),
        "eval": (pickle.dumps({"model": {"a": Call(eval, f"open({str(path)!r}, 'w')")}}), "it asks for builtins.eval"),
        "old protocol": (pickle.dumps(shell, protocol=0), "it asks for posix.system"),
        "array of objects": (pickle.dumps({"conv1_w": np.array([shell], dtype=object)}), "an array of the type O8"),
        "array of pointers": (POINTERS, "an array of the type O8"),
        "getattr": (pickle.dumps(Call(getattr, "", "join")), "it asks for builtins.getattr"),
        "dotted": (
            name("collections", "OrderedDict.fromkeys") + b".",
            "it asks for collections.OrderedDict.",
        ),
        "reader": (name("numpy", "load") + text("a.npy") + b"\x85R.", "it asks for numpy.load"),
        "codec": (
            name("_codecs", "encode") + text("a") + text("rot13") + b"\x86R.",
            "the encoding rot13",
        ),
        "other class": (pickle.dumps({"conv1_w": array, "x": Fraction(1, 2)}), "it asks for fractions.Fraction"),
        "attribute": (dtype + b"}" + text("a") + b"K\x01sb.", "no attribute '__dict__'"),
        "slot": (
            dtype + b"N}" + text("__call__") + b"K\x01s\x86b.",
            "'__call__' is read-only",
        ),
        "of a class": (
            name("collections", "OrderedDict") + b"N}" + text("a") + b"Ns\x86b.",
            "immutable type",
        ),
        "new instance": (dtype + b")\x81.", "must be a type"),
        "persistent id": (b"\x80\x04" + text("a") + b"Q.", "persistent id"),
        "extension": (b"\x80\x04\x82\x01.", "unregistered extension"),
    }


@pytest.mark.parametrize("case", hostile(""))
def test_hostile_pickles_are_refused(tmp_path, case):
    content, reason = hostile(tmp_path / "owned")[case]
    (tmp_path / "model.pkl").write_bytes(content)
    with pytest.raises(WeightError, match=re.escape(reason)) as error:
        read_pickle(tmp_path / "model.pkl")
    assert str(error.value).startswith(str(tmp_path / "model.pkl"))
    assert not (tmp_path / "owned").exists()
    if case in list(hostile(""))[:5]:
        pickle.loads(content)  # the test's own proof: it does run code when it is let
        assert (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<!DOCTYPE html>",
        pickle.dumps(contents())[:200],
        b"\x80\x02]q\x00h\x00a.",
        b"\x80\x04\x95\xff\xff\xff\xff",
    ],
)
def test_damaged_files_are_told(tmp_path, content):
    path = tmp_path / "model.pkl"
    path.write_bytes(content)
    with pytest.raises(WeightError, match=r"model\.pkl"):
        read_pickle(path)
