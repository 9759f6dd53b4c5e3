"""What stands in a report beside its numbers of quality: trial runs, the model card's facts, hashes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .chat import template_of_gguf
from .corpus import read_scored
from .errors import GgufToolError
from .gguf_file import GgufFile
from .journal import Journal
from .model_card import card_facts
from .plan import STOCK
from .prepare import Job, Prepared
from .provenance import provenance
from .sources import Source
from .trial import MESSAGE, PLAIN, TRANSCRIPT, Prompt, Tried, opening, trial

PROMPTS = 3
SPEED = "speed, memory, routing and completions"


@dataclass(frozen=True)
class Extras:
    """What to add.

    Attributes:
        measure: whether to run models for it and to read the inputs again for their hashes.
        prompts: what the models are to go on from; by default how the evaluation texts begin.
        command: the command line, to be repeated.
    """

    measure: bool = True
    prompts: tuple[str, ...] = ()
    command: str = ""

    def __post_init__(self) -> None:
        if self.prompts and not self.measure:
            raise GgufToolError("--no-extras runs no model that could go on from --prompt; leave one of the two out")


# All of it, with the default prompts.
ALL = Extras()


def add_extras(
    journal: Journal, job: Job, source: Prepared, models: Sequence[Tried], extras: Extras, known: Mapping[str, str]
) -> None:  # fmt: skip
    """Adds the sections of `trial`, `provenance` and `model_card` to the journal; `models` without the original, the report's
    main row first; `known` are hashes of outputs that there are already, by name.

    A trial that fails is said in the report and costs nothing else of it.
    """
    base = source.base
    if extras.measure:
        journal.stage("speed, memory, routing, completions")
        try:
            texts = {path.stem: read_scored(path, lambda: template_of_gguf(base)) for path in job.evaluation}
            original = Tried("original", base)
            prompts = make_prompts(base, job.evaluation, extras.prompts)
            journal.learn(
                **trial(job.runtime, [original, *models], prompts, texts, progress=job.progress)
            )  # fmt: skip
        except GgufToolError as error:
            journal.learn(speed={"error": str(error)})
    main = journal.report.main
    if main is not None and models:
        plan = models[0].plan
        layout = STOCK if plan is None else plan.layout
        journal.learn(card=card_facts(GgufFile(base), job.model, models[0].path, main.encoding, layout))
    journal.stage("hashes" if extras.measure else "provenance")
    # A model of the hub lies in the cache: job.model is its name there, and no path.
    inputs = [source.model.path, *_files(job.calibration), *job.evaluation]
    outputs = [journal.folder / name for name in dict.fromkeys([*journal.stages, "recipe.toml", "verified.json"])]
    journal.learn(
        provenance=provenance(
            job.runtime, extras.command, inputs, [path for path in outputs if path.is_file()],
            hashes=extras.measure, known=known, progress=job.progress,
        )
    )  # fmt: skip


def _files(sources: Sequence[Source | Path]) -> list[Path]:
    """The calibration texts that are files; of datasets of the hub the stats have the hash of what was read."""
    paths = [source if isinstance(source, Path) else Path(source.place) for source in sources
             if isinstance(source, Path) or not source.hub]  # fmt: skip
    return [path for path in paths if path.is_file()]


def make_prompts(base: Path, evaluation: Sequence[Path], given: Sequence[str]) -> list[Prompt]:
    """What the models go on from. Prompts that were given go through the model's chat template where it has one."""
    template = template_of_gguf(base)
    if not given:
        texts = [(path.stem, read_scored(path, lambda: template)) for path in evaluation[:PROMPTS]]
        return [
            replace(opening(name, text), special=special, how=TRANSCRIPT if special else PLAIN)
            for name, (text, special) in texts
        ]
    if template is None:
        return [Prompt(f"prompt {i}", text, text) for i, text in enumerate(given, 1)]
    bos = template.special.get("bos_token", "")
    return [
        Prompt(
            f"prompt {i}", text,
            template.render([{"role": "user", "content": text}], None, "--prompt", reply=True).removeprefix(bos), True,
            MESSAGE,
        )
        for i, text in enumerate(given, 1)
    ]  # fmt: skip
