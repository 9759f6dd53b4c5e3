"""The experts module of a layer, however transformers lays it out, as plain stacks: a view that copies nothing.

transformers says how a module's weights lie by `is_transposed` ([E, d, 2K] and [E, K, d]), `is_concatenated` (all gate
rows before all up rows, or in turns) and `has_bias`, and what is done between the projections by `_apply_gate`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

STACKS = ("gate_up_proj", "down_proj")


class PlainExperts(nn.Module):
    """`gate_up_proj` [E, 2K, d] and `down_proj` [E, d, K] as views of transposed ones, with the same biases and gate.

    In `gate_up_proj` gate and up rows still lie as in the original: `is_concatenated` tells.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, value in module.named_parameters(recurse=False):
            view = value.transpose(1, 2) if name in STACKS else value
            self.register_parameter(name, nn.Parameter(view.detach(), requires_grad=False))
        self.act_fn = getattr(module, "act_fn", nn.Identity())
        self.is_concatenated = bool(getattr(module, "is_concatenated", True))
        self.has_bias = bool(getattr(module, "has_bias", False))
        self.is_transposed, self.has_gate = False, bool(getattr(module, "has_gate", True))
        self.__dict__["_apply_gate"] = module._apply_gate


def canonical(module: nn.Module) -> nn.Module:
    """The experts as plain stacks: the module itself, or a view of one whose stacks are transposed."""
    return PlainExperts(module) if getattr(module, "is_transposed", False) else module


def neurons_of(module: nn.Module, expert: int, x: Tensor) -> Tensor:
    """h of one expert, act(gate) * up or what the family makes of the two, for tokens x [n, d]: [n, K]."""
    both = functional.linear(
        x, module.get_parameter("gate_up_proj")[expert], _bias(module, "gate_up_proj_bias", expert)
    )
    gate: Any = getattr(module, "_apply_gate", None)
    if gate is not None:
        return torch.as_tensor(gate(both))
    gated, up = both.chunk(2, dim=-1)
    activation: Any = module.act_fn
    return torch.as_tensor(activation(gated) * up)


def output_of(module: nn.Module, expert: int, h: Tensor) -> Tensor:
    """What one expert makes of its neurons h [n, K], before the router's weight: [n, d]."""
    return functional.linear(h, module.get_parameter("down_proj")[expert], _bias(module, "down_proj_bias", expert))


def down_bias(module: nn.Module, expert: int) -> Tensor | None:
    """The bias [d] of one expert's output, where the family has one. An expert without neurons loses it too."""
    return _bias(module, "down_proj_bias", expert)


def gate_up_rows(module: nn.Module, neurons: Tensor) -> Tensor:
    """Rows of `gate_up_proj` that belong to the neurons (a mask [K] gives a mask [2K])."""
    if getattr(module, "is_concatenated", True):
        return torch.cat([neurons, neurons])
    return neurons.repeat_interleave(2)


def _bias(module: nn.Module, name: str, expert: int) -> Tensor | None:
    bias = module._parameters.get(name)
    return None if bias is None else bias[expert]
