"""prune: base GGUF + plan -> pruned GGUF. expand: tiered GGUF -> stock GGUF, padded with zero neurons.

Both stream: one tensor in memory at a time. The writer decides nothing: shapes, types and order come from `layout`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import gguf
import numpy as np
from gguf import GGUFValueType as V

from . import cut, encoding, layout
from .down_weights import DownWeights
from .errors import GgufToolError
from .gguf_file import Bytes, GgufFile, KeyValue, Progress, check_output, header_bytes, write_gguf
from .layout import STOCK, Piece, parse
from .plan import PrunePlan
from .requant import quantize_rows, take_columns
from .tensors import BLOCKS, TensorSpec


@dataclass
class PruneReport:
    """What a prune wrote, or would write.

    Attributes:
        layout: stock or tiered.
        tensors: of the pruned file.
        file_bytes: of the pruned file, header included.
        requantized: names of tensors in which something had to be quantized anew.
        notes: what a person should know.
    """

    layout: str
    tensors: tuple[TensorSpec, ...]
    file_bytes: int
    requantized: list[str]
    notes: list[str]


def prune(
    base: Path,
    plan: PrunePlan,
    out: Path,
    *,
    ggml: Path | None = None,
    refit: DownWeights | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PruneReport:
    """Writes `plan` applied to `base`. Blocks of quantized tensors are copied bit for bit wherever whole blocks stay.

    Args:
        ggml: shared library of ggml, needed where quantized down columns must be cut.
        refit: down columns that replace the base file's where experts are narrowed.
        dry_run: check everything, count every byte, write nothing.

    Raises:
        GgufToolError: the plan is for another model, the disk is too small, `out` exists, `base` is damaged.
    """
    if not dry_run:
        check_output(out, force, base)
    if refit is not None:
        refit.check(plan.kept_hash)
    file = GgufFile(base)
    pieces = layout.pieces(plan, file.tensors, encoding.TWINS)
    _check_model(file, plan)
    entries = _entries(file, plan, refit is not None)
    by_name = {piece.spec.name: piece for piece in pieces}
    specs = tuple(piece.spec for piece in pieces)
    header = header_bytes(file.arch, entries, specs, out.parent if out.parent.is_dir() else Path("."))
    size = header + sum(spec.padded_bytes for spec in specs)
    report = PruneReport(layout.layout_of(plan), specs, size, [], _compare_with_plan(file, plan))
    if not dry_run:
        produce = _producer(file, plan, by_name, _Source(ggml, refit), report)
        write_gguf(out, file.arch, entries, specs, produce, progress)
    return report


def _check_model(file: GgufFile, plan: PrunePlan) -> None:
    if file.arch != plan.gguf_arch:
        raise GgufToolError(f"{file.path} is a {file.arch} model, the plan was made for {plan.gguf_arch}")
    facts = {"expert_count": plan.n_expert, "expert_used_count": plan.n_expert_used}
    for key, want in facts.items():
        if (have := int(file.arch_value(key))) != want:
            raise GgufToolError(f"{file.path} has {key} {have}, the plan {want}: it was made for another model")
    groups = int(file.arch_value("expert_group_count", 0) or 0)
    for layer in plan.layers if groups > 1 else ():
        by_group = np.bincount([e * groups // plan.n_expert for e in layer.router], minlength=groups)
        if len(set(by_group.tolist())) > 1:
            raise GgufToolError(
                f"layer {layer.index}: the router has {groups} groups and the plan keeps {by_group.tolist()} experts of "
                "them; groups must stay equal"
            )


def _compare_with_plan(file: GgufFile, plan: PrunePlan) -> list[str]:
    """A note where the base has other tensors than the plan counted, so that the planned bytes do not hold."""
    expected = {t.name: t for t in plan.tensors if parse(t.name) is None}
    actual = {t.name: t for t in file.tensors if parse(t.name) is None}
    if expected == actual or not plan.tensors:
        return []
    differing = sorted(n for n in expected.keys() | actual.keys() if expected.get(n) != actual.get(n))
    return [
        f"{len(differing)} tensors differ from what the plan counted (such as {differing[0]}): its bytes are not exact"
    ]


def _entries(file: GgufFile, plan: PrunePlan, refitted: bool) -> dict[str, KeyValue]:
    """The base file's metadata with what pruning changes."""
    entries = {key: file.entry(key) for key in file.keys()}
    kind = layout.layout_of(plan)
    percent = round(100 * (1 - plan.kept_share))
    base_name = str(file.value("general.name", plan.model_name))
    if all(layout.untouched(layer, plan) for layer in plan.layers):
        return entries
    if kind == STOCK:
        width, count = plan.layers[0].widths[0], len(plan.layers[0].router)
        entries[f"{file.arch}.expert_count"] = KeyValue(count, V.UINT32)
        entries[_width_key(file)] = KeyValue(width, V.UINT32)
    label = f"{plan.recipe.method.upper()}{percent}"
    entries["general.name"] = KeyValue(f"{base_name} {label}", V.STRING)
    entries["general.finetune"] = KeyValue(label, V.STRING)
    if "general.base_model.count" not in entries:
        entries["general.base_model.count"] = KeyValue(1, V.UINT32)
        entries["general.base_model.0.name"] = KeyValue(base_name, V.STRING)
    return entries | cut.entries(plan, kind) | {f"{cut.KEY}refit": KeyValue(refitted, V.BOOL)}


def _width_key(file: GgufFile) -> str:
    key = f"{file.arch}.expert_feed_forward_length"
    return key if file.value(key, None) is not None else f"{file.arch}.feed_forward_length"


@dataclass(frozen=True)
class _Source:
    """Where the down columns of a narrowed expert come from: its refit, or the base file's rows."""

    ggml: Path | None
    refit: DownWeights | None

    def columns(self, rows: Bytes, piece: Piece, expert: int, neurons: np.ndarray) -> tuple[Bytes, bool]:
        """Rows of the piece's type with the kept columns, and whether quantized weights were quantized anew."""
        assert piece.source is not None and piece.layer is not None
        target = piece.spec.type
        fitted = self.refit.weights.get((piece.layer.index, expert)) if self.refit else None
        if fitted is None:
            return take_columns(rows, piece.source.type, target, neurons, self.ggml)
        if fitted.shape != (len(rows), len(neurons)):
            raise GgufToolError(
                f"the refit of expert {expert} has shape {fitted.shape}, not {len(rows)} x {len(neurons)}"
            )
        return quantize_rows(fitted, target, self.ggml), BLOCKS[target][0] > 1


def _producer(
    file: GgufFile, plan: PrunePlan, pieces: dict[str, Piece], source: _Source, report: PruneReport
) -> Callable[[TensorSpec], Bytes]:
    def produce(spec: TensorSpec) -> Bytes:
        piece = pieces[spec.name]
        if piece.source is None:
            assert piece.layer is not None
            return cut.tier_map(piece.layer).view(np.uint8)
        raw = file.raw(piece.source)
        if piece.layer is None:
            return raw
        if piece.tier is None:
            return raw[list(piece.layer.router)]
        return _stack(raw, piece, plan.n_ff_exp, source, report)

    return produce


def _stack(raw: Bytes, piece: Piece, n_ff: int, source: _Source, report: PruneReport) -> Bytes:
    """One tier's stack out of the whole stack [experts, rows, row bytes] (or [experts, row bytes] for biases)."""
    assert piece.layer is not None and piece.tier is not None and piece.source is not None
    name = parse(piece.source.name)
    assert name is not None
    parts = []
    for row in piece.tier.rows:
        expert, neurons = piece.layer.router[row], piece.layer.retained[row]
        one = raw[expert] if raw.ndim > 1 else raw.reshape(-1, BLOCKS[piece.source.type][1])[expert]
        if (len(neurons) == n_ff and piece.spec.type == piece.source.type) or name.suffix == "scale":
            parts.append(one)
        elif name.suffix == "bias":
            parts.append(
                one if name.role == "down" else _rows(one.reshape(-1, 4), neurons, name.role, n_ff).reshape(-1)
            )
        elif name.role == "down":
            taken, anew = source.columns(one, piece, expert, neurons)
            if anew and piece.spec.name not in report.requantized:
                report.requantized.append(piece.spec.name)
            parts.append(taken)
        else:
            parts.append(_rows(one, neurons, name.role, n_ff))
    return np.stack(parts)


def _rows(stack: Bytes, neurons: np.ndarray, role: str, n_ff: int) -> Bytes:
    """Rows of gate or up; of a merged gate_up stack, which holds all gate rows before all up rows, those of both."""
    return stack[np.concatenate([neurons, neurons + n_ff])] if role == "gate_up" else stack[neurons]


def expand(source: Path, out: Path, *, force: bool = False, progress: Progress | None = None) -> list[str]:
    """Writes a tiered file as a stock file: narrow experts padded with zero neurons. The same function, more bytes.

    Returns:
        Notes: stacks whose tiers have different types, which only F32 holds without loss.

    Raises:
        GgufToolError: not tiered, or layers keep different numbers of experts (no stock file can say that).
    """
    check_output(out, force, source)
    file = GgufFile(source)
    pruned = cut.read(file)
    if pruned is None or not any(t.name.endswith("ffn_exps_tier.weight") for t in file.tensors):
        raise GgufToolError(f"{source}: not a tiered file; every llama.cpp can read it as it is")
    count = int(file.arch_value("expert_count"))
    for layer in pruned.layers:
        if len(layer.router) != count:
            raise GgufToolError(
                f"{source}: layer {layer.index} keeps {len(layer.router)} experts and the model has {count}: "
                "a stock file cannot hold layers with different numbers of experts"
            )
    stacks, specs, notes = _expanded(file, pruned)
    entries = {key: file.entry(key) for key in file.keys()}
    entries[f"{cut.KEY}layout"] = KeyValue("expanded", V.STRING)

    def produce(spec: TensorSpec) -> Bytes:
        tiers = stacks.get(spec.name)
        return file.raw(spec) if tiers is None else _pad(file, spec, tiers, pruned.n_ff_exp)

    write_gguf(out, file.arch, entries, specs, produce, progress)
    return notes


def _expanded(file: GgufFile, pruned: cut.Cut) -> tuple[dict[str, list[TensorSpec]], list[TensorSpec], list[str]]:
    """Tier stacks by the name of the stock tensor they become; every tensor of the stock file; notes."""
    stacks: dict[str, list[TensorSpec]] = {}
    order: list[TensorSpec | str] = []
    for spec in file.tensors:
        name = parse(spec.name)
        if name is None or name.role == "router" or (name.tier is None and name.role != "map"):
            order.append(spec)
        elif name.role != "map":
            stock = f"blk.{name.layer}.ffn_{name.role}_exps.{name.suffix}"
            if stock not in stacks:
                stacks[stock] = []
                order.append(stock)
            stacks[stock].append(spec)
    notes: list[str] = []
    specs = [item if isinstance(item, TensorSpec) else _stock_spec(item, stacks[item], pruned, notes) for item in order]
    return stacks, specs, notes


def _stock_spec(stock: str, tiers: list[TensorSpec], pruned: cut.Cut, notes: list[str]) -> TensorSpec:
    name = parse(stock)
    assert name is not None
    n_ff = pruned.n_ff_exp
    layer = next(layer for layer in pruned.layers if layer.index == name.layer)
    count = len(layer.router)
    if name.suffix == "scale":
        return TensorSpec(stock, (count,), tiers[0].type)
    if name.suffix == "bias":
        length = tiers[0].ne[0] if name.role == "down" else n_ff * (2 if name.role == "gate_up" else 1)
        return TensorSpec(stock, (length, count), tiers[0].type)
    kind = tiers[0].type
    if len({tier.type for tier in tiers}) > 1 or (name.role == "down" and n_ff % BLOCKS[kind][0]):
        notes.append(f"{stock}: its tiers are {', '.join(t.type for t in tiers)}; written as F32 to lose nothing")
        kind = "F32"
    rows = n_ff * (2 if name.role == "gate_up" else 1)
    ne = (n_ff, tiers[0].ne[1], count) if name.role == "down" else (tiers[0].ne[0], rows, count)
    return TensorSpec(stock, ne, kind)


def _pad(file: GgufFile, spec: TensorSpec, tiers: list[TensorSpec], n_ff: int) -> Bytes:
    """The stock stack of `spec`. A block of zero bytes is a block of zeros in every ggml type."""
    name = parse(spec.name)
    assert name is not None
    tier_map = cut.read_tier_map(file, name.layer)
    assert tier_map is not None
    out = np.zeros(spec.nbytes, dtype=np.uint8).reshape(*reversed(spec.ne[1:]), -1)
    out = out.reshape(spec.ne[-1], -1, spec.nbytes // prod(spec.ne[1:])) if len(spec.ne) == 3 else out
    for tier, row in zip(tiers, tier_map, strict=True):
        raw = file.raw(tier)
        if tier.type != spec.type:
            floats = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[tier.type])
            raw = quantize_rows(floats.reshape(-1, floats.shape[-1]), spec.type, None).reshape(*floats.shape[:-1], -1)
        for expert in np.nonzero(row >= 0)[0]:
            _place(out, int(expert), raw, int(row[expert]), name, n_ff)
    return out


def _place(out: Bytes, expert: int, raw: Bytes, index: int, name: layout.ExpertName, n_ff: int) -> None:
    if name.suffix == "scale":
        out.reshape(-1, 4)[expert] = raw.reshape(-1, 4)[index]
    elif name.suffix == "bias" or name.role == "down":
        one = raw[index]
        if name.suffix == "bias" and name.role == "gate_up":
            half = one.shape[-1] // 2
            out[expert, :half], out[expert, n_ff * 4 : n_ff * 4 + half] = one[:half], one[half:]
        else:
            out[expert, ..., : one.shape[-1]] = one
    elif name.role == "gate_up":
        width = raw.shape[1] // 2
        out[expert, :width], out[expert, n_ff : n_ff + width] = raw[index, :width], raw[index, width:]
    else:
        out[expert, : raw.shape[1]] = raw[index]
