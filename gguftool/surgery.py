"""What pruning does, on a loaded model: the reference for everything that is written to a file.

A kept set is, for every MoE layer (by its decoder index), a list over experts of the sorted indices of the neurons that
stay, and optionally the experts that stay in the router. An expert that stays in the router with no neuron may still be
chosen and adds nothing; one that leaves the router is gone, and the router's weights are those of the survivors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from .architectures import Architecture, for_model_type
from .errors import GgufToolError
from .experts import canonical, down_bias, gate_up_rows

Neurons = Sequence[NDArray[np.int64]]


@torch.no_grad()
def mask_model(
    model: PreTrainedModel, retained: Mapping[int, Neurons], router: Mapping[int, Sequence[int]] | None = None
) -> None:
    """Prunes a loaded causal LM in place, without changing the width of its experts.

    Args:
        retained: decoder index -> for every expert of the layer the neurons that stay. The gate and up rows and the down
            columns of all others become zero. Layers that are not mentioned stay as they are.
        router: decoder index -> the experts that stay in the router, ascending. The rows of the others are cut out of the
            router and of the expert stacks.

    Raises GgufToolError for a layer without experts, an index out of range or fewer experts than are routed per token.
    """
    row = for_model_type(model.config.model_type)
    for layer, neurons in retained.items():
        experts = _submodule(model, row, layer, row.experts)
        _mask_neurons(experts, neurons, layer)
    for layer, kept in (router or {}).items():
        experts = _submodule(model, row, layer, row.experts)
        _slice_router(model, row, experts, kept, layer)


def _check_neurons(kept: NDArray[np.int64], width: int, where: str) -> None:
    """Raises GgufToolError unless the indices are ascending, different and below `width`."""
    kept = np.asarray(kept)
    if kept.size and (kept.min() < 0 or kept.max() >= width or (np.diff(kept) <= 0).any()):
        raise GgufToolError(f"{where}: the neurons are no ascending indices below {width}")


def _submodule(model: PreTrainedModel, row: Architecture, layer: int, path: str) -> nn.Module:
    try:
        return model.get_submodule(f"{row.layers}.{layer}.{path}")
    except AttributeError as error:
        raise GgufToolError(f"layer {layer}: the model has no {path} there") from error


def _mask_neurons(module: nn.Module, neurons: Neurons, layer: int) -> None:
    """Zeroes the gate and up rows and the down columns of the neurons that go, and all of an expert that keeps none."""
    experts = canonical(module)
    gate_up, down = experts.get_parameter("gate_up_proj"), experts.get_parameter("down_proj")
    n_expert, _, width = down.shape
    if len(neurons) != n_expert:
        raise GgufToolError(f"layer {layer}: the neurons of {len(neurons)} experts are given, the layer has {n_expert}")
    for expert, kept in enumerate(neurons):
        _check_neurons(kept, width, f"layer {layer}, expert {expert}")
        gone = torch.ones(width, dtype=torch.bool, device=down.device)
        gone[torch.as_tensor(np.asarray(kept, dtype=np.int64), device=down.device)] = False
        down[expert][:, gone] = 0
        gate_up[expert][gate_up_rows(experts, gone)] = 0
        bias = down_bias(experts, expert)
        if bias is not None and not len(kept):
            bias.zero_()


def _slice_router(
    model: PreTrainedModel, row: Architecture, experts: nn.Module, kept: Sequence[int], layer: int
) -> None:
    """Leaves only the kept experts in the router and in the stacks."""
    router = _submodule(model, row, layer, row.router)
    entries = [_entry(model, row, layer, name) for name in row.router_rows]
    n_expert, top_k = entries[0][2].shape[0], int(getattr(router, "top_k", 1))
    if list(kept) != sorted(set(kept)) or (kept and not 0 <= kept[0] <= kept[-1] < n_expert):
        raise GgufToolError(f"layer {layer}: the experts that stay are no ascending indices below {n_expert}")
    if len(kept) < top_k:
        raise GgufToolError(f"layer {layer}: {len(kept)} experts would remain but {top_k} are routed per token")
    index = torch.as_tensor(list(kept), dtype=torch.int64, device=entries[0][2].device)
    entries += [(experts, name, value) for name, value in experts.named_parameters(recurse=False)]
    for module, name, value in entries:
        # A bias may lie as [1, E].
        sliced = value.detach().index_select(0 if value.shape[0] == n_expert else value.ndim - 1, index)
        is_buffer = name in module._buffers
        setattr(module, name, sliced if is_buffer else nn.Parameter(sliced, requires_grad=False))
    router.num_experts = experts.num_experts = len(kept)  # type: ignore[assignment]


def _entry(model: PreTrainedModel, row: Architecture, layer: int, name: str) -> tuple[nn.Module, str, torch.Tensor]:
    """A parameter or buffer of a layer: the module that has it, its name there, its value."""
    path, _, attribute = name.rpartition(".")
    module = _submodule(model, row, layer, path)
    value: torch.Tensor = getattr(module, attribute)
    return module, attribute, value
