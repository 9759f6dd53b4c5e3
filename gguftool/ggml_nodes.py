"""The nodes of ggml's graph as ctypes sees them: their layout, checked against the library, and their values."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import GgufToolError

_NUMPY = {0: np.float32, 1: np.float16, 26: np.int32}  # ggml.h, `enum ggml_type`


class Node(ctypes.Structure):
    """ggml.h, `struct ggml_tensor`."""


Node._fields_ = [
    ("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int), ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Node) * 10), ("view_src", ctypes.c_void_p), ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64), ("extra", ctypes.c_void_p), ("padding", ctypes.c_char * 8),
]  # fmt: skip
_OBJECT_BYTES = 32  # `struct ggml_object`, which ggml_tensor_overhead counts too
CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.POINTER(Node), ctypes.c_bool, ctypes.c_void_p)


def ggml_path(llama: Any) -> Path:
    """The ggml library beside the libllama that was loaded."""
    folder = Path(llama.llama_cpp._lib._name).parent
    for pattern in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll"):
        if (folder / pattern).exists():
            return folder / pattern
    raise GgufToolError(f"{folder}: no ggml library beside llama.cpp; run `gguftool runtime build` first")


class Ggml:
    """What is used of ggml."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.ggml_tensor_overhead.restype = ctypes.c_size_t
        self._library.ggml_op_name.restype = ctypes.c_char_p
        self._library.ggml_backend_buffer_is_host.restype = ctypes.c_bool
        self._library.ggml_backend_buffer_is_host.argtypes = [ctypes.c_void_p]
        self._library.ggml_backend_tensor_get.argtypes = [
            ctypes.POINTER(Node), ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t,
        ]  # fmt: skip
        if self._library.ggml_tensor_overhead() != _OBJECT_BYTES + ctypes.sizeof(Node):
            raise GgufToolError(f"{library}: this ggml lays out its tensors in another way than gguftool reads them")
        self._is_host = cache(self._library.ggml_backend_buffer_is_host)

    def op(self, name: str) -> int:
        """The number of an operation."""
        return next(i for i in range(256) if self._library.ggml_op_name(i) == name.encode())

    def read(self, tensor: Any) -> NDArray[Any]:
        """A copy of a node's values, the dimensions of `ne` reversed."""
        node = tensor.contents
        if node.type not in _NUMPY:
            raise GgufToolError(f"{name_of(node)}: values of ggml's type {node.type} are not read here")
        kind = np.dtype(_NUMPY[node.type])
        span = kind.itemsize + sum((n - 1) * step for n, step in zip(node.ne, node.nb, strict=True))
        if self._is_host(node.buffer):
            data = (ctypes.c_char * span).from_address(node.data)
        else:
            data = (ctypes.c_char * span)()
            self._library.ggml_backend_tensor_get(tensor, data, 0, span)
        return np.ndarray(tuple(node.ne)[::-1], kind, data, strides=tuple(node.nb)[::-1]).copy()


def name_of(node: Any) -> str:
    """A node's name; one that ggml cut off inside a character ends in a replacement."""
    name: bytes = node.name
    return name.decode(errors="replace")


def address(node: Any) -> int:
    """Which node a pointer points to."""
    return ctypes.cast(node, ctypes.c_void_p).value or 0
