"""The devices that a built runtime can compute on, as ggml lists them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from .runtime_base import Runtime

# enum ggml_backend_dev_type
_TYPES = {0: "cpu", 1: "gpu", 2: "igpu", 3: "accel"}


@dataclass(frozen=True)
class Device:
    """A device. `handle` is ggml's own, good in this process; `type` one of cpu, gpu, igpu, accel, other."""

    name: str
    description: str
    type: str
    handle: int

    @property
    def runs_models(self) -> bool:
        """Whether a model's layers can be put on it. The others (BLAS) help the CPU with single operations."""
        return self.type in ("cpu", "gpu", "igpu")


def devices(runtime: Runtime) -> list[Device]:
    """Every device of a runtime whose libraries are loaded here, or may be: a process can load one runtime only."""
    ggml = ctypes.CDLL(str(runtime.library("ggml")))
    ggml.ggml_backend_load_all()
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    ggml.ggml_backend_dev_get.restype = ctypes.c_void_p
    ggml.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    ggml.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    for name in ("ggml_backend_dev_name", "ggml_backend_dev_description"):
        getattr(ggml, name).restype = ctypes.c_char_p
        getattr(ggml, name).argtypes = [ctypes.c_void_p]
    found = []
    for index in range(ggml.ggml_backend_dev_count()):
        handle = ggml.ggml_backend_dev_get(index)
        name, text = ggml.ggml_backend_dev_name(handle), ggml.ggml_backend_dev_description(handle)
        kind = _TYPES.get(ggml.ggml_backend_dev_type(handle), "other")
        found.append(Device(name.decode(), text.decode().strip(), kind, handle))
    return found
