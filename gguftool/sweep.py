"""sweep: methods x ratios x encodings on one model, each measured for its size and its KL divergence. Resumable.

Model files are made, measured and removed, at most `BATCH` of them at a time; the base runs once for each text and
batch. What was measured stays in `rows/`, a small file for each model and group of texts, named after everything that
the numbers depend on. A sweep that was stopped, or asked for more, measures what is not there yet and nothing else.

Peak disk, without --keep-files: the base GGUF, the stats of every seed, BATCH measured files, and for one method at one
ratio the pruned file of the base's types with its refitted weights. Fewer files are kept at a time where the disk is
short. Peak memory: that of `calibrate` (a layer, and the sums), the stats of one seed, or the base and as many of a
batch as fit into half of the machine's memory, whichever is most.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from . import __version__, encoding
from .chat import template_of_gguf
from .checkpoint import open_checkpoint
from .corpus import load_domains, read_scored
from .coverage import coverage
from .durable import settle
from .errors import GgufToolError
from .evaluate import Comparison, compare_many
from .gguf_file import GgufFile
from .gguf_model import is_gguf
from .inventory import model_facts
from .loader import usable_device
from .measurements import Store, digest, measured_facts, plain
from .pipeline import build, quantize_base
from .planner import fingerprint, make_plan
from .prepare import Job, Prepared, prepare
from .recipe import Recipe
from .refitting import kind_of
from .stats import CalibrationStats
from .sweep_report import CONTROL, PRUNED, UNPRUNED, Name, SweepReport, SweepRow
from .variants import Variant
from .workspace import Say, Workspace

BATCH = 8
SCRATCH = "sweep.work"
_GROUP = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Grid:
    """What a sweep is asked for.

    Attributes:
        variants, ratios, targets: every one of each with all others; a target of None keeps the base's types.
        unpruned: targets of the unpruned model.
        groups: texts to measure on, by the name of their group; a group is measured as one long text.
        seeds: calibrations; the first takes the first windows of each text, every other a sample of them.
        keep_files: do not remove the model files.
    """

    variants: Sequence[Variant]
    ratios: Sequence[float]
    targets: Sequence[str | None]
    unpruned: Sequence[str]
    groups: Mapping[str, Sequence[Path]]
    seeds: int = 1
    keep_files: bool = False


def parse_groups(texts: Sequence[str]) -> dict[str, list[Path]]:
    """GROUP:FILE or FILE, a group of its own named by its stem -> the files of each group.

    Raises GgufToolError for a name that stands for two groups and a file that is in one group twice.
    """
    groups: dict[str, list[Path]] = {}
    alone: set[str] = set()
    for text in texts:
        group, colon, rest = text.partition(":")
        if colon and rest and _GROUP.fullmatch(group) and not Path(text).exists():
            name, path = group, Path(rest)
        else:
            name, path = Path(text).stem, Path(text)
            alone.add(name)
        if path in groups.setdefault(name, []):
            raise GgufToolError(f"--eval {text}: the file is in the group {name!r} already")
        groups[name].append(path)
    for name in sorted(alone):
        if len(groups[name]) > 1:
            raise GgufToolError(f"--eval: two groups would be called {name!r}; write GROUP:FILE with another name")
    return groups


def parse_targets(names: Sequence[str]) -> list[str | None]:
    """Encodings by their own names, each once; `none` becomes None. Raises GgufToolError for an unknown one."""
    found: list[str | None] = [None if name == "none" else encoding.parse_target(name).name for name in names]
    return list(dict.fromkeys(found))


def run(job: Job, out: Path, grid: Grid, say: Say) -> SweepReport:
    """The whole sweep. `job.evaluation` is not looked at: the grid has the texts. Writes sweep.json and sweep.md."""
    job = replace(job, evaluation=_texts(grid), seed=0)
    check(job, grid)
    work = Workspace(out, say)
    store = Store(out / "rows")
    runs: dict[Name, list[dict[str, Any]]] = {}
    base_type, source = "", None
    for seed in range(grid.seeds):
        source = prepare(replace(job, seed=seed), work, [])
        base_type = encoding.file_type_name(int(GgufFile(source.base).value("general.file_type")))
        bench = _Bench(replace(job, seed=seed), work, source, grid, store, say)
        cells = bench.cells(base_type)
        bench.measure(cells)
        for candidate in (candidate for cell in cells for candidate in cell):
            runs.setdefault(candidate.name, []).append(bench.run_facts(candidate))
    assert source is not None
    shutil.rmtree(out / SCRATCH, ignore_errors=True)
    report = _report(job, grid, source, runs)
    report.save(out)
    return report


def check(job: Job, grid: Grid) -> None:
    """Raises GgufToolError for everything that can be known to be impossible before the first dear step."""
    if grid.seeds < 1:
        raise GgufToolError(f"--seeds {grid.seeds}: at least 1 calibration is needed")
    if not grid.groups:
        raise GgufToolError("a sweep needs texts to measure on: --eval GROUP:FILE")
    if not grid.unpruned and not (grid.variants and grid.ratios and grid.targets):
        raise GgufToolError("the sweep is empty: give --method, --ratio and --quant, or --unpruned")
    for name in grid.unpruned:
        encoding.parse_target(name)
    if is_gguf(job.model):
        raise GgufToolError(f"{job.model}: sweep compares what comes of a checkpoint; compress takes a GGUF")
    checkpoint = open_checkpoint(job.model)
    blank = CalibrationStats.blank(model_facts(checkpoint))
    refits = []
    for variant, ratio, target in _combinations(grid):
        plan = make_plan(blank, variant.recipe(ratio, target, 0))
        variant.check(plan, blank.model.norm_topk)
        try:
            refits.append(kind_of(checkpoint, plan, variant.refit)[0])
        except GgufToolError as error:
            raise GgufToolError(f"--method {variant.name}: {error}") from error
    usable_device(job.device, solves=any(refits))
    if grid.seeds > 1:
        load_domains(job.calibration, checkpoint.tokenizer(), job.n_ctx, job.windows, seed=1)


def _texts(grid: Grid) -> list[Path]:
    """All texts, each once: one may stand in several groups."""
    return list(dict.fromkeys(path for paths in grid.groups.values() for path in paths))


def _combinations(grid: Grid) -> list[tuple[Variant, float, str | None]]:
    return [(v, ratio, target) for v in grid.variants for ratio in grid.ratios for target in grid.targets]


@dataclass(frozen=True)
class Candidate:
    """A model that is to be measured.

    Attributes:
        key: everything that its file depends on.
        kept: share of routed-expert parameters that stay.
    """

    name: Name
    variant: Variant | None
    recipe: Recipe | None
    target: str | None
    key: Mapping[str, Any]
    kept: float
    formula: str
    notes: tuple[str, ...]

    @property
    def digest(self) -> str:
        """A short name of `key`."""
        return digest(self.key)


class _Bench:
    """One seed of a sweep: its candidates, and measuring them."""

    def __init__(self, job: Job, work: Workspace, source: Prepared, grid: Grid, store: Store, say: Say) -> None:
        self.job, self.work, self.source, self.grid, self.store, self.say = job, work, source, grid, store, say
        self.scratch = work.folder / SCRATCH
        self._facts: dict[str, Any] = {
            "gguftool": __version__,
            "base": work.state.get("base.gguf"),
            "stats": fingerprint(source.stats),
            "runtime": job.runtime.path.name,
        }
        self._groups = {
            name: {
                "texts": [hashlib.sha256(self._text(path)[0].encode()).hexdigest() for path in paths],
                "n_ctx": job.n_ctx,
                "windows": job.eval_windows,
                "backend": job.runtime.backend,
            }
            for name, paths in grid.groups.items()
        }

    def cells(self, base_type: str) -> list[list[Candidate]]:
        """What belongs together because it shares a pruned file: a variant at a ratio in all targets.

        The unpruned model comes last, each of its types alone, and only for the first seed.
        """
        seed, grid = self.job.seed, self.grid
        # The base's own type by its name is the same file as without a target.
        targets = [
            target
            for target in grid.targets
            if target is None or None not in grid.targets or not self.source.has_encoding(target)
        ]
        cells = [
            [self._pruned(variant, ratio, target, base_type) for target in targets]
            for variant in grid.variants
            for ratio in grid.ratios
        ]
        return cells + [[self._unpruned(target)] for target in grid.unpruned if seed == 0]

    def _pruned(self, variant: Variant, ratio: float, target: str | None, base_type: str) -> Candidate:
        recipe = variant.recipe(ratio, target, self.job.seed)
        plan = make_plan(self.source.stats, recipe)
        label = f"{variant.name} {100 * ratio:g} %" + (f" {target}" if target else "")
        kind = CONTROL if variant.is_control else PRUNED
        quantized = target is not None and target not in encoding.FLOATS
        name = Name(label, variant.name, kind, ratio, target or base_type, quantized)
        key = self._facts | {"recipe": asdict(plan.recipe), "kept": plan.kept_hash, "refit": variant.refit}
        return Candidate(name, variant, recipe, target, plain(key), plan.kept_share, plan.formula, plan.notes)

    def _unpruned(self, target: str) -> Candidate:
        quantized = target not in encoding.FLOATS
        name = Name(f"unpruned {target}", "none", UNPRUNED, 0.0, target, quantized)
        return Candidate(name, None, None, target, plain(self._facts | {"unpruned": target}), 1.0, "", ())

    def missing(self, candidate: Candidate) -> list[str]:
        """The groups that a candidate was not measured on yet."""
        return [group for group in self.grid.groups if self.store.load(self._row_key(candidate, group)) is None]

    def is_done(self, candidate: Candidate) -> bool:
        """Whether it was measured on every group, and its file is there where files are to be kept."""
        return not self.missing(candidate) and (not self.grid.keep_files or self._kept(candidate).exists())

    def run_facts(self, candidate: Candidate) -> dict[str, Any]:
        """What a row keeps of one seed; everything must have been measured."""
        groups = {group: self.store.load(self._row_key(candidate, group)) for group in self.grid.groups}
        size = next(iter(groups.values()), None) or {}
        return {
            "seed": self.job.seed, "bytes": size["bytes"], "kept": candidate.kept, "formula": candidate.formula,
            "notes": list(candidate.notes), "groups": groups,
        }  # fmt: skip

    def measure(self, cells: Sequence[Sequence[Candidate]]) -> None:
        """Makes and measures what is missing, in batches of whole cells."""
        todo = [[candidate for candidate in cell if not self.is_done(candidate)] for cell in cells]
        total, done = sum(len(cell) for cell in cells), sum(len(cell) for cell in cells) - sum(map(len, todo))
        seed = f"seed {self.job.seed}: " if self.grid.seeds > 1 else ""
        kept = " and kept" if self.grid.keep_files else ""
        self.say(f"{seed}{done} of {total} models are measured{kept} already")
        self._clear_scratch([candidate for cell in todo for candidate in cell])
        batch: list[tuple[Candidate, Path]] = []
        for cell in filter(None, todo):
            if batch and (len(batch) + len(cell) > BATCH or self._is_disk_short(len(cell))):
                self._measure_batch(batch)
                done += len(batch)
                self.say(f"{seed}{done} of {total} models are measured{kept}")
                batch = []
            batch += self._build(cell)
        if batch:
            self._measure_batch(batch)
            self.say(f"{seed}{done + len(batch)} of {total} models are measured{kept}")

    def _is_disk_short(self, n_files: int) -> bool:
        """Whether a further cell may not fit: its files, its pruned file and refit, each at most as large as the base."""
        need = (n_files + 2) * self.source.base.stat().st_size
        return shutil.disk_usage(self.work.folder).free < need

    def _clear_scratch(self, wanted: Sequence[Candidate]) -> None:
        """Removes what a stopped run with other options left behind."""
        names = {f"{candidate.digest}.gguf" for candidate in wanted} | {f"cell-{c.digest}" for c in wanted}
        for path in self.scratch.glob("*"):
            if path.name not in names:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _build(self, cell: Sequence[Candidate]) -> list[tuple[Candidate, Path]]:
        """The files of a cell. Each is moved out of the cell's own folder when all are made, and the folder goes."""
        paths = {candidate.digest: self._file(candidate) for candidate in cell}
        if any(not path.exists() for path in paths.values()):
            # Named by its first candidate, so that a stopped run finds it again.
            work = Workspace(self.scratch / f"cell-{cell[0].digest}", self.say)
            work.state["base.gguf"] = self.work.state["base.gguf"]
            made = [
                (candidate, self._make(candidate, work)) for candidate in cell if not paths[candidate.digest].exists()
            ]
            for candidate, path in made:
                settle(path, paths[candidate.digest])
            shutil.rmtree(work.folder)
        return [(candidate, paths[candidate.digest]) for candidate in cell]

    def _make(self, candidate: Candidate, work: Workspace) -> Path:
        job, source = self.job, self.source
        if candidate.recipe is None or candidate.variant is None:
            assert candidate.target is not None
            return quantize_base(job, work, source, candidate.target).path
        return build(job, work, source, candidate.recipe, refit=candidate.variant.refit).path

    def _file(self, candidate: Candidate) -> Path:
        """Where a candidate's file lies until it is measured: where an earlier run kept it, or in the scratch folder."""
        kept = self._kept(candidate)
        return kept if kept.exists() else self.scratch / f"{candidate.digest}.gguf"

    def _kept(self, candidate: Candidate) -> Path:
        label = re.sub(r"[^A-Za-z0-9.+_-]+", "-", candidate.name.label.replace(" %", "").replace(",", "_"))
        model = self.source.stats.model.name
        return self.work.folder / "models" / f"{model}-{label}-{candidate.digest[:8]}.gguf"

    def _measure_batch(self, batch: Sequence[tuple[Candidate, Path]]) -> None:
        for group, texts in self.grid.groups.items():
            missing = [(candidate, path) for candidate, path in batch if group in self.missing(candidate)]
            if not missing:
                continue
            files = [path for _, path in missing]
            found = [self._compare(files, group, path) for path in texts]
            for index, (candidate, path) in enumerate(missing):
                parts = [results[index] for results in found]
                self.store.save(self._row_key(candidate, group), measured_facts(path, parts, texts))
        for candidate, path in batch:
            kept = self._kept(candidate)
            if self.grid.keep_files and path != kept:
                kept.parent.mkdir(exist_ok=True)
                settle(path, kept)
            elif path != kept:
                path.unlink()

    def _compare(self, files: Sequence[Path], group: str, text: Path) -> list[Comparison]:
        job, backend = self.job, self.job.runtime.backend
        job.progress(0, 1, f"measuring {len(files)} models on {group}: {text.name}")
        content, special = self._text(text)
        return compare_many(
            self.source.base, files, content, llama=job.llama, n_ctx=job.n_ctx, max_windows=job.eval_windows,
            backend=backend, progress=job.progress, n_gpu_layers=job.runtime.n_gpu_layers,
            parse_special=special,
        )  # fmt: skip

    def _text(self, path: Path) -> tuple[str, bool]:
        return read_scored(path, lambda: template_of_gguf(self.source.base))

    def _row_key(self, candidate: Candidate, group: str) -> dict[str, Any]:
        return {"model": candidate.key, "group": self._groups[group]}


def _report(job: Job, grid: Grid, source: Prepared, runs: Mapping[Name, Sequence[dict[str, Any]]]) -> SweepReport:
    rows = [SweepRow(name, found) for name, found in runs.items()]
    groups = rows[0].runs[0]["groups"]
    names = [path.name for path in _texts(grid)]

    def called(path: Path) -> str:
        return path.name if names.count(path.name) == 1 else str(path)

    # What was measured earlier has the names that files of the same bytes had then.
    texts = {
        name: [{**text, "name": called(path)} for path, text in zip(grid.groups[name], facts["texts"], strict=True)]
        for name, facts in groups.items()
    }
    base = {name: {**facts["base"], "tokens": facts["tokens"], "texts": texts[name]} for name, facts in groups.items()}
    windows = "; ".join(
        f"{name}: {sum(text['windows'] for text in facts['texts'])} windows, {facts['tokens']} tokens"
        for name, facts in base.items()
    )
    protocol = (
        f"llama-perplexity's protocol: windows of {job.n_ctx} tokens, second half scored ({windows}); KL divergence to "
        f"the original in nats; ± is one standard error; backend {groups[next(iter(groups))]['texts'][0]['backend']}"
    )
    notes = [
        f"calibrated on {', '.join(f'{domain.name} ({domain.tokens} tokens)' for domain in source.stats.domains)}",
        "unpruned files are quantized with the imatrix of the same calibration, as pruned ones are",
        "win and loss: by more than two standard errors of the difference to the unpruned files' line of log KL over size",
    ]
    notes += [
        *source.again(*dict.fromkeys(filter(None, [*grid.targets, *grid.unpruned]))),
        *coverage(source.stats).notes(),
    ]
    if grid.seeds > 1:
        notes.append(
            f"means over {grid.seeds} calibrations, on the first windows of each text and on samples of it; 'seeds' is "
            "the standard deviation over them, ± is the error from the choice of evaluation text"
        )
    return SweepReport(source.stats.model.name, source.base.stat().st_size, base, rows, protocol, tuple(notes))
