"""prune: base GGUF + plan -> pruned GGUF, one tensor in memory at a time.

The writer decides nothing: shapes, types and order come from `layout`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf import GGUFValueType as V

from . import cut, encoding, layout
from .errors import GgufToolError
from .gguf_file import Bytes, GgufFile, KeyValue, Progress, check_output, copied_entries, header_bytes, write_gguf
from .gguf_model import OWN, fingerprint, tied
from .hf_to_gguf import FINGERPRINT_KEY
from .layout import ExpertName, Piece, parse
from .overrides import Overrides
from .plan import STOCK, Neurons, PrunePlan
from .requant import check_quantizer, copies, quantize_rows, take_columns
from .tensors import BLOCKS, TensorSpec


@dataclass
class PruneReport:
    """What a prune wrote, or would write.

    Attributes:
        layout: stock or tiered.
        tensors: of the pruned file.
        file_bytes: of the pruned file, header included.
        requantized: names of tensors in which something has to be quantized anew.
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
    overrides: Overrides | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PruneReport:
    """Writes `plan` applied to `base`. Blocks of quantized tensors are copied bit for bit wherever whole blocks stay.

    Args:
        ggml: shared library of ggml, needed where quantized tensors must be cut or get new values.
        overrides: matrices that replace the base file's; of whole experts and of narrowed ones.
        dry_run: check everything, count every byte, write nothing.

    Raises:
        GgufToolError: the plan is for another model, the disk is too small, `out` exists, `base` is damaged, an override
            belongs to nothing in the plan, or something has to be quantized anew and cannot be.
    """
    check_output(out, force or dry_run, base, *(overrides.files if overrides is not None else ()))
    file = GgufFile(base)
    file.check_whole()
    kind = _layout_in(file, plan)
    pieces = layout.pieces(plan, file.tensors, encoding.TWINS, layout=kind, whole=_predictors(file))
    _check_model(file, plan)
    if overrides is not None:
        _check_overrides(overrides, file, plan)
        pieces = _with_overridden(pieces, overrides, plan)
    source = _Source(ggml, overrides, plan.n_ff_exp)
    requantized = source.requantized(pieces)
    copied, notes = copied_entries(file)
    entries = _entries(copied, file, plan, kind, overrides.origin.made_by if overrides else None)
    specs = tuple(piece.spec for piece in pieces)
    size = header_bytes(file.arch, entries, specs) + sum(spec.padded_bytes for spec in specs)
    notes = [*_compare_with_plan(plan, specs), *notes]
    report = PruneReport(kind, specs, size, requantized, notes)
    if not dry_run:
        produce = _producer(file, {piece.spec.name: piece for piece in pieces}, source)
        write_gguf(out, file.arch, entries, specs, produce, progress, file)
    return report


def outline(
    file: GgufFile, plan: PrunePlan, made_by: str | None, copied: Mapping[str, KeyValue]
) -> tuple[dict[str, KeyValue], tuple[TensorSpec, ...]]:
    """The metadata and the tensors that `prune` would write, without looking at a weight.

    Args:
        made_by: the command that the new weights come from; None without any.
        copied: `copied_entries(file)`, which reads the vocabulary and so takes a while.
    """
    kind = _layout_in(file, plan)
    pieces = layout.pieces(plan, file.tensors, encoding.TWINS, layout=kind, whole=_predictors(file))
    return _entries(copied, file, plan, kind, made_by), tuple(piece.spec for piece in pieces)


def _predictors(file: GgufFile) -> range:
    """The layers at the end that predict further tokens (MTP): no forward pass runs them, so they stay whole."""
    blocks = file.arch_integer("block_count")
    return range(blocks - file.arch_integer("nextn_predict_layers", 0), blocks)


def _layout_in(file: GgufFile, plan: PrunePlan) -> str:
    """The plan's layout; what the file demands where nobody decided. A tiered file can hold every plan.

    Raises GgufToolError where the plan counts on a stock file, and this base cannot become one.
    """
    facts = (plan, file.tensors, tied(file), _predictors(file))
    if plan.layout == STOCK and (others := layout.bystanders(*facts)):
        _check_model(file, plan)
        raise GgufToolError(
            f"{file.path}: the plan counts on a stock file, in which {others[0]} of this base would change with the experts; "
            "the plan was made for a file of another converter: calibrate and plan this one"
        )
    return plan.layout or layout.decide(*facts)


def _check_model(file: GgufFile, plan: PrunePlan) -> None:
    if file.arch != plan.gguf_arch:
        raise GgufToolError(f"{file.path} is a {file.arch} model, the plan was made for {plan.gguf_arch}")
    _check_fingerprint(file, plan)
    facts = {"expert_count": plan.n_expert, "expert_used_count": plan.n_expert_used}
    for key, want in facts.items():
        if (have := file.arch_integer(key)) != want:
            raise GgufToolError(f"{file.path} has {key} {have}, the plan {want}: it was made for another model")
    layout.check_routers(plan, file.tensors, max(1, file.arch_integer("expert_group_count", 1)))


def _check_fingerprint(file: GgufFile, plan: PrunePlan) -> None:
    """Raises GgufToolError where the base is known to be another model, or another version, than the plan was made for.

    Files of other converters do not say what they were made from; theirs is compared where the plan was made from a GGUF.
    """
    have = file.value(FINGERPRINT_KEY, "")
    if plan.model_fingerprint.startswith(OWN):
        have = fingerprint(file)
    if have and have != plan.model_fingerprint:
        raise GgufToolError(
            f"{file.path} is another model, or another version of it ({have[:12]}), than the plan was made for "
            f"({plan.model_name}, {plan.model_fingerprint[:12]}): convert, calibrate and plan it anew"
        )


def _check_overrides(overrides: Overrides, file: GgufFile, plan: PrunePlan) -> None:
    """Raises GgufToolError for an override that is not for this plan, or that has no place in the base file."""
    stacks = {spec: name for spec in file.tensors if (name := parse(spec.name)) and name.suffix == "weight"}
    down = next((spec for spec, name in stacks.items() if name.role == "down"), None)
    if down is None:
        raise GgufToolError(f"{file.path}: no layer has experts")
    overrides.check(plan, down.ne[1])
    places = {(name.layer, role) for name in stacks.values() for role in _roles(name)}
    for layer, expert, role in overrides.keys():
        if (layer, role) not in places:
            raise GgufToolError(f"the weights have a {role} of layer {layer}, expert {expert}; the base file has none")


def _with_overridden(pieces: Sequence[Piece], overrides: Overrides, plan: PrunePlan) -> tuple[Piece, ...]:
    """The pieces, where stacks that would be copied whole are put together anew if an override is in them."""
    layers = {layer.index: layer for layer in plan.layers}
    changed = {(layer, role) for layer, _, role in overrides.keys()}

    def renewed(piece: Piece) -> Piece:
        name = parse(piece.spec.name)
        if piece.layer is not None or name is None or name.suffix != "weight":
            return piece
        if not any((name.layer, role) in changed for role in _roles(name)):
            return piece
        layer = layers[name.layer]
        return replace(piece, layer=layer, tier=layer.tiers()[0])

    return tuple(map(renewed, pieces))


def _compare_with_plan(plan: PrunePlan, specs: Sequence[TensorSpec]) -> list[str]:
    """A note where the file gets other tensors than the plan counted, so that the planned bytes do not hold."""
    expected, actual = _facts(plan.tensors), _facts(specs)
    if expected == actual or not plan.tensors:
        return []
    differing = sorted(n for n in expected.keys() | actual.keys() if expected.get(n) != actual.get(n))
    return [
        f"{len(differing)} tensors differ from what the plan counted (such as {differing[0]}): its bytes are not exact"
    ]


def _facts(specs: Sequence[TensorSpec]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape, without the ones at its end, and type by name."""
    return {t.name: (t.ne[: max((i + 1 for i, n in enumerate(t.ne) if n != 1), default=0)], t.type) for t in specs}


def _entries(
    copied: Mapping[str, KeyValue], file: GgufFile, plan: PrunePlan, kind: str, made_by: str | None
) -> dict[str, KeyValue]:
    """The base file's metadata with what pruning changes; `made_by` is that of the new weights, None without any."""
    entries = dict(copied)
    percent = round(100 * (1 - plan.kept_share))
    base_name = str(file.value("general.name", plan.model_name))
    # A file that was pruned before says then that it was cut from that one, or its stats would not be known for its own.
    if (
        all(layout.untouched(layer, plan) for layer in plan.layers)
        and not made_by
        and f"{cut.KEY}version" not in entries
    ):
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
    if plan.dataset and not any(key.startswith("general.dataset") for key in entries):
        entries["general.dataset.count"] = KeyValue(len(plan.dataset), V.UINT32)
        for index, (name, _) in enumerate(plan.dataset):
            entries[f"general.dataset.{index}.name"] = KeyValue(name, V.STRING)
    entries.pop("general.size_label", None)  # it counts parameters and experts, and they have changed
    entries |= cut.entries(plan, kind)
    if made_by:
        entries[f"{cut.KEY}weights"] = KeyValue(made_by, V.STRING)
    return entries


def _width_key(file: GgufFile) -> str:
    key = f"{file.arch}.expert_feed_forward_length"
    return key if file.value(key, None) is not None else f"{file.arch}.feed_forward_length"


@dataclass(frozen=True)
class _Source:
    """Where an expert's rows come from: its override, or the base file's rows."""

    ggml: Path | None
    overrides: Overrides | None
    n_ff: int

    def requantized(self, pieces: Sequence[Piece]) -> list[str]:
        """Names of the tensors that need something quantized anew. Raises GgufToolError where that cannot be done."""
        found = [piece.spec for piece in pieces if self._is_anew(piece)]
        for spec in found:
            check_quantizer(spec.type, self.ggml)
        return [spec.name for spec in found]

    def _is_anew(self, piece: Piece) -> bool:
        if piece.source is None or piece.layer is None or piece.tier is None:
            return False
        name = parse(piece.source.name)
        if name is None or name.suffix != "weight":
            return False
        in_blocks = BLOCKS[piece.spec.type][0] > 1
        for row in piece.tier.rows:
            neurons = piece.layer.retained[row]
            key = (piece.layer.index, piece.layer.router[row])
            given = [self.overrides is not None and (*key, role) in self.overrides for role in _roles(name)]
            if any(given) and in_blocks:
                return True
            is_cut = name.role == "down" and not given[0] and not self.is_whole(piece, neurons)
            if is_cut and not copies(piece.source.type, piece.spec.type, neurons):
                return True
        return False

    def is_whole(self, piece: Piece, neurons: Neurons) -> bool:
        """Whether an expert keeps every neuron and its type."""
        assert piece.source is not None
        return len(neurons) == self.n_ff and piece.spec.type == piece.source.type

    def given(self, piece: Piece, row: int, role: str) -> Bytes | None:
        """The override of the expert in router row `row` as rows of the piece's type, or None."""
        assert piece.layer is not None
        if self.overrides is None:
            return None
        values = self.overrides.get(piece.layer.index, piece.layer.router[row], role)
        return None if values is None else quantize_rows(values, piece.spec.type, self.ggml)

    def kept(self, one: Bytes, piece: Piece, name: ExpertName, neurons: Neurons) -> Bytes:
        """The kept neurons' part of one expert's rows (or of its row of biases) in the base file."""
        assert piece.source is not None
        if self.is_whole(piece, neurons) or name.suffix.endswith("scale"):
            return one
        if name.suffix == "bias":
            size = BLOCKS[piece.source.type][1]
            return (
                one if name.role == "down" else _rows(one.reshape(-1, size), neurons, name.role, self.n_ff).reshape(-1)
            )
        if name.role == "down":
            return take_columns(one, piece.source.type, piece.spec.type, neurons, self.ggml)[0]
        return _rows(one, neurons, name.role, self.n_ff)


def _producer(file: GgufFile, pieces: dict[str, Piece], source: _Source) -> Callable[[TensorSpec], Bytes]:
    def produce(spec: TensorSpec) -> Bytes:
        piece = pieces[spec.name]
        if piece.source is None:
            assert piece.layer is not None
            return cut.tier_map(piece.layer).view(np.uint8)
        if piece.tier is not None:
            return _stack(file, piece, source)
        raw = file.raw(piece.source)
        if piece.layer is None:
            return raw
        # One row an expert, whether the tensor is the router's matrix or a vector of biases.
        rows = raw.reshape(layout.n_entries(piece.source.ne), -1)[list(piece.layer.router)]
        return rows.reshape(*reversed(spec.ne[1:]), -1)

    return produce


def _stack(file: GgufFile, piece: Piece, source: _Source) -> Bytes:
    """One tier's stack [experts, rows, row bytes], or its biases [experts, row bytes]. Only its experts are read, in turn."""
    assert piece.tier is not None
    rows = piece.tier.rows
    first = _expert(file, piece, rows[0], source)
    stack = np.empty((len(rows), *first.shape), np.uint8)
    stack[0] = first
    for place, row in enumerate(rows[1:], start=1):
        stack[place] = _expert(file, piece, row, source)
    return stack


def _expert(file: GgufFile, piece: Piece, row: int, source: _Source) -> Bytes:
    """What a tier's stack holds of the expert in router row `row`."""
    assert piece.layer is not None and piece.source is not None
    name = parse(piece.source.name)
    assert name is not None
    given = [source.given(piece, row, role) for role in _roles(name)] if name.suffix == "weight" else []
    new = [rows for rows in given if rows is not None]
    if new and len(new) == len(given):
        # The base file's columns are not even read: to cut them could cost a quantizer that is not needed.
        return np.concatenate(new)
    one = file.expert(piece.source, piece.layer.router[row])
    kept = source.kept(one, piece, name, piece.layer.retained[row])
    if new:
        halves = zip(np.split(kept, len(given)), given, strict=True)
        kept = np.concatenate([own if rows is None else rows for own, rows in halves])
    return kept


def _roles(name: ExpertName) -> tuple[str, ...]:
    """The matrices of an expert that lie one above the other in a stack: all gate rows are before all up rows."""
    return ("gate", "up") if name.role == "gate_up" else (name.role,)


def _rows(stack: Bytes, neurons: Neurons, role: str, n_ff: int) -> Bytes:
    """Rows of gate or up; of a merged gate_up stack, which holds all gate rows before all up rows, those of both."""
    return stack[np.concatenate([neurons, neurons + n_ff])] if role == "gate_up" else stack[neurons]
