"""Quantizing through the real `llama-quantize`, with the type of every tensor decided here and checked afterwards.

Each type goes to the binary as one anchored pattern a tensor, so that neither its mix nor its silent fallbacks decide.
An importance matrix comes from the calibration's own sums: experts and neurons that were pruned are left out of it.
"""

from __future__ import annotations

import re
import subprocess
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from . import cut
from .durable import full, held_handles, replacing, scratch
from .encoding import FLOATS, MixFacts, assign, needs_imatrix, parse_target, quantizable
from .errors import GgufToolError
from .gguf_file import Bytes, GgufFile, KeyValue, Progress, check_output, check_space, write_gguf
from .gguf_model import OWN, fingerprint, first_integer, n_gqa
from .hf_to_gguf import FINGERPRINT_KEY
from .plan import LayerPlan, keep_all
from .processes import ending
from .stats import Array, CalibrationStats
from .tensors import TensorSpec

# Tensor -> (sums of squared inputs [matrices, columns], how many rows they run over [matrices]).
Imatrix = dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]

_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down|gate_up)_exps(?:\.(\d+))?\.weight")
_PROGRESS = re.compile(r"\[ *(\d+)/ *(\d+)\] (\S+)")
# The quantized file keeps this name, so that its size does not depend on a folder's.
IMATRIX_FILE = "gguftool.imatrix.gguf"
# Added by llama-quantize to the source's metadata: four entries about the imatrix.
_ADDED_KVS = 1024


@dataclass(frozen=True)
class QuantizeTool:
    """The `llama-quantize` to run. A tiered file needs that of the patched runtime; stock files take either.

    `progress` is called with (tensors done, tensors, name of the tensor).
    """

    binary: Path
    threads: int | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class Quantized:
    """What was written: the file, its size in bytes, and every tensor with its type."""

    path: Path
    nbytes: int
    tensors: tuple[TensorSpec, ...]


def quantize(
    source: Path,
    target: str,
    out: Path,
    *,
    tools: QuantizeTool,
    imatrix: CalibrationStats | None = None,
    force: bool = False,
    allow_requantize: bool = False,
    dry_run: bool = False,
) -> Quantized:
    """Writes `source` as `out` in the encoding `target`; `source` is only read. `dry_run`: checks and counts only.

    Raises:
        GgufToolError: an unknown target, an output that exists, too little disk, a source that is quantized already (without
            `allow_requantize`), an encoding that needs an importance matrix and has none, a failure of llama-quantize (its
            own words are given), or a result in which a tensor has another type than was asked for. No output is left behind.
    """
    check_output(out, force or dry_run, source)
    if not tools.binary.is_file():
        raise GgufToolError(f"{tools.binary}: no llama-quantize there; build the runtime first")
    file = GgufFile(source)
    specs = planned_types(file, target, has_imatrix=imatrix is not None)
    if not allow_requantize:
        _refuse_requantizing(file, specs)
    header = source.stat().st_size - sum(spec.padded_bytes for spec in file.tensors)
    expected = sum(spec.padded_bytes for spec in specs) + max(header, 0)
    check_space(out, expected + _ADDED_KVS)
    entries = _entries_for(file, target, specs, imatrix)
    if dry_run:
        return Quantized(out, expected, specs)
    with replacing(out) as partial, scratch(out.with_name(f".{out.name}.quantize")) as work:
        (work / "types.txt").write_text(_type_lines(specs), encoding="utf-8")
        options = ["--tensor-type-file", "types.txt"]
        if entries and imatrix:
            write_imatrix(entries, imatrix, work / IMATRIX_FILE)
            options += ["--imatrix", IMATRIX_FILE]
        if allow_requantize:
            options.append("--allow-requantize")
        # Absolute paths: llama-quantize takes an output whose name begins with a number for a file type.
        paths = [str(source.resolve()), str(partial.resolve())]
        threads = [str(tools.threads)] if tools.threads else []
        command = [str(tools.binary.resolve()), *options, *paths, parse_target(target).name, *threads]
        try:
            _run(command, work, tools.progress, out)
        finally:
            # First: that the input was written to, or cut short under the map of it, is why anything may have failed.
            file.check_unchanged()
        _verify(file, GgufFile(partial), specs, target)
    return Quantized(out, out.stat().st_size, specs)


def planned_types(file: GgufFile, target: str, *, has_imatrix: bool = False) -> tuple[TensorSpec, ...]:
    """Every tensor of `file` with the type that `quantize` will give it, in file order.

    Raises GgufToolError for a shard of a split model.
    """
    file.check_whole()
    return assign(file.tensors, target, mix_facts(file, has_imatrix=has_imatrix))


def mix_facts(file: GgufFile, *, has_imatrix: bool = False) -> MixFacts:
    """What the mix depends on, from a file's metadata; a pruned file counts as the model that it was cut from."""
    pruned = cut.read(file)
    return MixFacts(
        gguf_arch=file.arch,
        n_layer=int(file.arch_value("block_count")),
        n_expert=pruned.n_expert if pruned else first_integer(file, "expert_count", 0),
        n_gqa=n_gqa(file),
        has_imatrix=has_imatrix,
        twins=pruned is not None,
    )


def imatrix_entries(stats: CalibrationStats, kept: Iterable[LayerPlan], specs: Iterable[TensorSpec]) -> Imatrix:
    """The importance matrix of a file, from the sums of its calibration. As llama-imatrix collects it.

    gate and up see the input of their expert, sum of x^2: [experts, n_embd]; down sees its neurons, sum of h^2:
    [experts, width]; any other matrix of a block sees all tokens: [1, columns]. The count beside them is that of the
    tokens routed to the expert; where it is 0, llama-quantize weighs all columns alike. Neurons that `expand` padded
    with zeros have sum 0. Token embeddings and output have no entry, as in llama-imatrix, though the stats have the sums.

    Args:
        kept: what is left of each layer; one that is missing is whole.
        specs: tensors of the file. Those without a measurement (norms, routers, tier maps) get no entry.

    Raises:
        GgufToolError: the stats are of another model than the file.
    """
    model = stats.model
    counts = stats.expert("count")
    whole = keep_all(model.moe_layers, model.n_expert, model.n_ff_exp)
    layers = {layer.index: layer for layer in (*whole, *kept)}
    entries: Imatrix = {}
    for spec in specs:
        match = _EXPERTS.fullmatch(spec.name)
        if match is None:
            if spec.name in stats.linears and spec.name.startswith("blk.") and quantizable(spec):
                # Where there is a matrix for each head, all of them have the same input.
                heads = prod(spec.ne[2:])
                sums = np.tile(stats.linears[spec.name], (heads, 1))
                _add(entries, spec, sums, np.full(heads, stats.linear_tokens))
            continue
        index = int(match[1])
        if model.block_count - model.n_predict <= index < model.block_count:
            continue
        if index not in model.moe_layers:
            raise GgufToolError(f"{spec.name}: the stats have no MoE layer {index}; they are of another model")
        layer, measured = layers[index], model.moe_layers.index(index)
        rows = list(range(len(layer.router)) if match[3] is None else _tier_rows(layer, spec, int(match[3])))
        experts = [layer.router[row] for row in rows]
        if match[2] == "down":
            sums = _neuron_sums(stats.neurons["h_sq"][measured], layer, rows, spec)
        else:
            sums = stats.expert_inputs[measured][experts]
        _add(entries, spec, sums, counts[measured][experts])
    return entries


def write_imatrix(entries: Imatrix, stats: CalibrationStats, path: Path) -> None:
    """Writes llama.cpp's imatrix GGUF (tools/imatrix/imatrix.cpp, `save_imatrix`)."""
    kinds = gguf.GGUFValueType
    head = {
        "general.type": KeyValue("imatrix", kinds.STRING),
        "imatrix.datasets": KeyValue([domain.name for domain in stats.domains], kinds.ARRAY, kinds.STRING),
        "imatrix.chunk_count": KeyValue(max(1, stats.tokens // stats.n_ctx), kinds.UINT32),
        "imatrix.chunk_size": KeyValue(stats.n_ctx, kinds.UINT32),
    }
    arrays: dict[str, NDArray[np.float32]] = {}
    for name in sorted(entries):
        sums, counts = entries[name]
        arrays |= {f"{name}.in_sum2": sums, f"{name}.counts": counts[:, None]}
    specs = [TensorSpec(name, (values.shape[1], values.shape[0]), "F32") for name, values in arrays.items()]

    def produce(spec: TensorSpec) -> Bytes:
        return np.ascontiguousarray(arrays[spec.name], dtype="<f4").view(np.uint8)

    write_gguf(path, "imatrix", head, specs, produce)


def _entries_for(file: GgufFile, target: str, specs: Sequence[TensorSpec], stats: CalibrationStats | None) -> Imatrix:
    entries: Imatrix = {}
    if stats and parse_target(target).default not in FLOATS:
        pruned = None if _are_its_own(stats, file) else cut.read(file)
        _check_stats(file, pruned, stats)
        entries = imatrix_entries(stats, pruned.layers if pruned else (), specs)
    blind = [name for name in needs_imatrix(specs, target) if name not in entries]
    if blind and stats is None:
        raise GgufToolError(
            f"{target} needs an importance matrix for {len(blind)} tensors, {blind[0]} the first; "
            "give the calibration's stats, or take a larger encoding"
        )
    if blind:
        raise GgufToolError(
            f"{target} needs an importance matrix for {len(blind)} tensors that the calibration did not measure, "
            f"{blind[0]} the first; take a larger encoding"
        )
    return entries


def _are_its_own(stats: CalibrationStats, file: GgufFile) -> bool:
    """Whether this very file was calibrated: then it is whole to the stats, even where it was cut from another before."""
    return stats.model.fingerprint.startswith(OWN) and stats.model.fingerprint == fingerprint(file)


def _check_stats(file: GgufFile, pruned: cut.Cut | None, stats: CalibrationStats) -> None:
    """Raises GgufToolError for stats of another model than the one that the file was cut from."""
    model = stats.model
    # A file that says from which checkpoint it was made is quantized with that one's stats; those of a GGUF are of a file.
    key = f"{cut.KEY}base.fingerprint" if pruned else FINGERPRINT_KEY
    checked = pruned or not model.fingerprint.startswith(OWN)
    if checked and (known := file.value(key, "")) and known != model.fingerprint:
        made, name = ("cut", file.value(f"{cut.KEY}base.name", "a model")) if pruned else ("made", "a checkpoint")
        raise GgufToolError(
            f"{file.path} was {made} from {name} ({str(known)[:12]}), the "
            f"stats are of {model.name} ({model.fingerprint[:12]}): they are of another model, or of another version"
        )
    if pruned and (pruned.n_expert, pruned.n_ff_exp) != (model.n_expert, model.n_ff_exp):
        raise GgufToolError(
            f"{file.path} was cut from {pruned.n_expert} experts of {pruned.n_ff_exp} neurons, the stats are of "
            f"{model.n_expert} of {model.n_ff_exp}: they are of another model"
        )


def _tier_rows(layer: LayerPlan, spec: TensorSpec, index: int) -> tuple[int, ...]:
    tiers = layer.tiers()
    if index >= len(tiers):
        raise GgufToolError(f"{spec.name}: the file says that its layer has only {len(tiers)} widths")
    return tiers[index].rows


def _neuron_sums(h_sq: Array, layer: LayerPlan, rows: list[int], spec: TensorSpec) -> Array:
    """Sums of the neurons that stay, [rows, width]; zero where the stack is wider than what stays.

    `h_sq` is that of the unpruned layer, [n_expert, n_ff_exp].
    """
    sums = np.zeros((len(rows), spec.ne[0]))
    for out, row in zip(sums, rows, strict=True):
        values = h_sq[layer.router[row]][layer.retained[row]]
        if len(values) > len(out):
            raise GgufToolError(
                f"{spec.name} has {len(out)} neurons, but {len(values)} of expert {layer.router[row]} are said to stay: "
                "the stats are of another model"
            )
        out[: len(values)] = values
    return sums


def _add(entries: Imatrix, spec: TensorSpec, sums: Array, counts: Array) -> None:
    matrices = spec.ne[2] if len(spec.ne) > 2 else 1
    if sums.shape != (matrices, spec.ne[0]):
        raise GgufToolError(
            f"{spec.name} has {matrices} matrices with rows of {spec.ne[0]}, the stats {sums.shape[0]} with rows of "
            f"{sums.shape[1]}: they are of another model"
        )
    entries[spec.name] = (sums.astype(np.float32), counts.astype(np.float32))


def _refuse_requantizing(file: GgufFile, specs: Sequence[TensorSpec]) -> None:
    again = [
        have
        for have, want in zip(file.tensors, specs, strict=True)
        if have.type != want.type and have.type not in FLOATS
    ]
    if again:
        raise GgufToolError(
            f"{file.path}: {len(again)} tensors are quantized already ({again[0].name} is {again[0].type}); quantize the "
            "BF16 file instead, or, where there is none, --allow-requantize"
        )


def _type_lines(specs: Iterable[TensorSpec]) -> str:
    """One anchored pattern a line. The binary lowers their case, so a capital letter is matched by a dot."""
    return "".join(
        f"^{''.join(c if re.fullmatch('[a-z0-9_]', c) else '.' for c in spec.name)}$={spec.type.lower()}\n"
        for spec in specs
    )


def _run(command: list[str], folder: Path, progress: Progress | None, out: Path) -> None:
    """Runs llama-quantize; raises GgufToolError with its last lines where it fails. Stops it when we are stopped."""
    last: deque[str] = deque(maxlen=6)
    try:
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            encoding="utf-8", errors="replace", pass_fds=held_handles(),
        )  # fmt: skip
    except OSError as error:
        raise GgufToolError(f"{command[0]}: cannot be run ({error})") from error
    with process:
        try:
            for line in process.stdout or ():
                if line.strip(" =\n"):
                    last.append(line.strip())
                if progress and (match := _PROGRESS.search(line)):
                    progress(int(match[1]), int(match[2]), match[3])
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise GgufToolError(f"llama-quantize failed ({ending(process.returncode)}): {' | '.join(last)}{full(out)}")


def without_ones(ne: tuple[int, ...]) -> tuple[int, ...]:
    """The dimensions as llama-quantize writes them: a stack of one matrix is written as a matrix."""
    return ne if len(ne) == 1 or ne[-1] != 1 else without_ones(ne[:-1])


def _verify(source: GgufFile, result: GgufFile, specs: Sequence[TensorSpec], target: str) -> None:
    """Raises GgufToolError unless every tensor has its shape and type and every entry of the source was kept."""
    have = {spec.name: spec for spec in result.tensors}
    for spec in specs:
        got = have.pop(spec.name, None)
        if got is None or got.type != spec.type or without_ones(got.ne) != without_ones(spec.ne):
            found = f"{got.type} {got.ne}" if got else "missing"
            raise GgufToolError(f"{spec.name}: {spec.type} {spec.ne} was asked for, llama-quantize wrote: {found}")
    if have:
        raise GgufToolError(f"llama-quantize wrote a tensor that the source does not have: {next(iter(have))}")
    if (kind := result.value("general.file_type")) != parse_target(target).file_type:
        raise GgufToolError(f"llama-quantize wrote general.file_type {kind} for {target}")
    lost = set(source.keys()) - set(result.keys())
    if lost:
        raise GgufToolError(f"llama-quantize lost metadata: {', '.join(sorted(lost))}")
