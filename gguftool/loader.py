"""A checkpoint's model, with the weights of one module in memory at a time.

The model is built without weights; `materialise` and `release` bring a module's weights in and out, so that a model
whose experts do not fit into memory runs one decoder layer after the other. Stacks of experts are allocated once and
filled in place, expert by expert: a layer's peak is its own size.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .checkpoint import EXPERT_PARAMETERS, Checkpoint, Source
from .errors import GgufToolError
from .stored import first_line


class LayerLoader:
    """A model without weights, and what is needed to give each of its modules its weights.

    Attributes:
        model: the causal LM on the meta device, its buffers on `device`.
        sources: parameter name -> what fills it; every parameter of the model, every tensor of the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Raises GgufToolError where the checkpoint's names and shapes do not fill the model exactly."""
        self.checkpoint = checkpoint
        self.device = usable_device(device)
        self.model = empty_model(checkpoint, self.device, dtype)
        self.sources = parameter_sources(checkpoint, self.model)

    def materialise(self, path: str) -> nn.Module:
        """Loads every parameter under the module path (`model.embed_tokens`, `lm_head`, ...) and returns the module."""
        for name in self._names(path):
            value = torch.empty_like(self._tensor(name), device=self.device, dtype=self._dtype(name))
            for source in self.sources[name]:
                value[source.index].copy_(self.checkpoint.read_source(source))
            self._set(name, value)
        return self.model.get_submodule(path)

    def release(self, path: str) -> None:
        """Frees what `materialise` loaded."""
        for name in self._names(path):
            self._set(name, torch.empty_like(self._tensor(name), device="meta"))

    def materialise_layer(self, layer: int) -> nn.Module:
        """Loads decoder layer `layer` and returns it."""
        return self.materialise(f"{self.checkpoint.architecture.layers}.{layer}")

    def release_layer(self, layer: int) -> None:
        """Frees decoder layer `layer`."""
        self.release(f"{self.checkpoint.architecture.layers}.{layer}")

    def _names(self, path: str) -> list[str]:
        names = [name for name in self.sources if name.startswith(f"{path}.")]
        if not names:
            raise GgufToolError(f"the model has no parameters under {path!r}")
        return names

    def _tensor(self, name: str) -> Tensor:
        """A parameter, or a buffer that the checkpoint has."""
        path, _, attribute = name.rpartition(".")
        value: Tensor = getattr(self.model.get_submodule(path), attribute)
        return value

    def _dtype(self, name: str) -> torch.dtype:
        """F32 for what transformers keeps in it whatever the rest is: biases that only choose experts."""
        kept = getattr(self.model, "_keep_in_fp32_modules_strict", None) or ()
        return torch.float32 if any(part in name for part in kept) else self._tensor(name).dtype

    def _set(self, name: str, value: Tensor) -> None:
        path, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(path)
        is_buffer = attribute in module._buffers
        setattr(module, attribute, value if is_buffer else nn.Parameter(value, requires_grad=False))


def usable_device(device: str, *, solves: bool = False) -> torch.device:
    """The device. Raises GgufToolError for one that is not there.

    `solves`: whether equations in float64 have to be solved on it, which Metal cannot.
    """
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind = device.partition(":")[0]
    if not here.get(kind, True):
        name = {"cuda": "NVIDIA GPU", "mps": "Apple GPU"}[kind]
        raise GgufToolError(
            f"device {device!r} cannot be used: torch {torch.__version__} sees no {name} here; use --device cpu"
        )
    if kind == "mps" and solves:
        raise GgufToolError(
            "device 'mps' cannot be used for this: it solves in float64, which Metal lacks; use --device cpu"
        )
    try:
        return torch.zeros(1, dtype=torch.float32 if kind == "mps" else torch.float64, device=device).device
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise GgufToolError(f"device {device!r} cannot be used ({str(error).splitlines()[0]})") from error


def empty_model(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The causal LM in eval mode with parameters on the meta device, and with its buffers computed on `device`."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(checkpoint.config), dtype=dtype, trust_remote_code=False
            )
    except Exception as error:  # of whatever a number of config.json leads to
        raise GgufToolError(
            f"{checkpoint.path}: transformers makes no model of config.json ({type(error).__name__}: {first_line(error)})"
        ) from error
    for path, module in model.named_modules():
        # Buffers that a checkpoint has are loaded with the parameters.
        computed = module._non_persistent_buffers_set
        missing = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta and name in computed]
        if not missing:
            continue
        if not hasattr(module, "config"):
            raise GgufToolError(f"{checkpoint.name}: do not know how to compute {path}.{missing[0]}")
        with torch.device(device):
            fresh = type(module)(module.config)
        for name in missing:
            setattr(module, name, fresh.get_buffer(name))
    return model.eval().requires_grad_(False)


def parameter_sources(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, tuple[Source, ...]]:
    """For every parameter of the model the stored tensors that fill it, each tensor used.

    The experts' 3-D parameters are filled from one tensor an expert, or from a stack where the checkpoint has one.
    Raises GgufToolError that names a tensor which is missing, of another shape, or used by nothing.
    """
    row = checkpoint.architecture
    tied = bool(getattr(checkpoint.config, "tie_word_embeddings", False))
    embedding = next(name for name, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    sources: dict[str, tuple[Source, ...]] = {}
    for name, parameter in model.state_dict(keep_vars=True).items():
        layer, suffix = checkpoint.split_layer(name)
        stored = checkpoint.stored_name(name)
        experts, _, leaf = suffix.rpartition(".")
        if stored in checkpoint.tensors and not (tied and name == "lm_head.weight"):
            sources[name] = (Source(checkpoint.tensors[stored], ()),)
        elif layer is not None and experts == row.experts and leaf in EXPERT_PARAMETERS:
            sources[name] = tuple(checkpoint.expert_sources(layer, leaf))
        elif tied and name == "lm_head.weight":
            sources[name] = sources[embedding]
        else:
            raise GgufToolError(f"{checkpoint.path}: the checkpoint lacks tensor {stored}")
        meta = torch.empty(parameter.shape, device="meta")
        for source in sources[name]:
            if meta[source.index].shape != source.shape:
                raise GgufToolError(
                    f"{checkpoint.path}: {source.tensor.name} has shape {list(source.shape)},"
                    f" config.json says {list(meta[source.index].shape)}"
                )
    pieces = [source for found in sources.values() for source in found]
    used = {tensor.name for source in pieces for tensor in (source.tensor, source.scales) if tensor is not None}
    used |= {"lm_head.weight"} if tied else set()
    unused = [name for name in checkpoint.tensors if name not in used and not checkpoint.is_unread(name)]
    if unused:
        raise GgufToolError(
            f"{checkpoint.path}: {len(unused)} tensors have no place in the model, the first is {unused[0]}"
        )
    return sources
