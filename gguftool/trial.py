"""What a report measures beyond perplexity: speed, memory, where the router sends tokens, and what the models write.

Every model has a process of its own (trial_worker); where memory allows they are loaded together and asked in turns, so
that what else the machine does meets all of them alike. All of it is bounded: a few rounds, short texts.

Sections of `Report.facts`:
    speed        models: [{label, file, bytes, memory, prompt {median, low, high}, generate {...}}] in tokens/s and bytes;
                 rounds, in_turns, prompt_tokens, generated_tokens, threads, backend; skipped: [{label, why}]
    routing      tokens, texts, label (of the pruned model), layers: [{layer, original [E], pruned [E]}]: shares of the tokens
                 by the expert's id in the original model
    completions  how, n_tokens, prompts: [{name, prompt, left_out, answers: [{label, text, same, tokens, stopped}]}]; `same`
                 counts the tokens up to the first one that is not the original's, None where the original was not run;
                 `left_out` those at the prompt's start that the context had no room for
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from .bench import Options, Progress, Worker, working
from .errors import GgufToolError
from .perplexity import usable_cpus
from .plan import PrunePlan
from .report_facts import rounded
from .runtime import Runtime

PROGRAM = "gguftool.trial_worker"
KINDS = ("prompt", "generate")
# What a prompt is, as a person reads it behind "prompts are".
PLAIN = "continued as plain text"
TRANSCRIPT = "the beginning of a conversation, as the model's chat template writes it down, continued as text"
MESSAGE = "given as a user's message, through the model's chat template"
# A process takes this beside the file: buffers, logits, Python.
OVERHEAD = 1 << 29


@dataclass(frozen=True)
class Effort:
    """How much is measured: tokens at once, tokens one by one, rounds at most and seconds for all of them, tokens that a
    prompt is continued by and seconds for each, tokens of each text that the router is watched on."""

    prompt: int = 256
    generate: int = 32
    rounds: int = 5
    seconds: float = 40.0
    complete: int = 64
    complete_seconds: float = 15.0
    watched: int = 2048


@dataclass(frozen=True)
class Prompt:
    """What is continued: `text` is what the model is given, `shown` what a person reads; `special`: a chat template's
    tokens in it are meant as such; `how` is one of the three above."""

    name: str
    shown: str
    text: str
    special: bool = False
    how: str = PLAIN


@dataclass(frozen=True)
class Tried:
    """A model that takes part; the plan it was cut by, where it was."""

    label: str
    path: Path
    plan: PrunePlan | None = None


def opening(name: str, text: str, size: int = 240) -> Prompt:
    """The first characters of a text as a prompt, cut behind a word."""
    if len(text) > size:
        text = text[:size]
        text = text[: max(text.rfind(" "), text.rfind("\n"))] if " " in text[1:] or "\n" in text[1:] else text
    return Prompt(name, text, text)


def trial(
    runtime: Runtime, models: Sequence[Tried], prompts: Sequence[Prompt], texts: Mapping[str, tuple[str, bool]], *,
    progress: Progress | None = None, effort: Effort = Effort(), room: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The three sections; `models` starts with the original.

    Args:
        texts: by name, a text to watch the router on and whether special tokens that it spells out are such.
        room: bytes of memory that models may take; by default what is free.

    Raises GgufToolError where a model does not run.
    """
    room = available_memory() if room is None else room
    sizes = {model.label: model.path.stat().st_size for model in models}
    fitting = [model for model in models if sizes[model.label] + OVERHEAD <= room]
    together = sum(sizes[model.label] + OVERHEAD for model in fitting) <= room
    options = Options(threads=usable_cpus(), n_gpu_layers=runtime.n_gpu_layers)
    found: dict[str, dict[str, Any]] = {}
    for group in [fitting] if fitting and together else [[model] for model in fitting]:
        with ExitStack() as stack:
            workers = {}
            for model in group:
                _tell(progress, f"loading {model.path.name}")
                workers[model.label] = stack.enter_context(
                    working(runtime, model.path, options, huge_pages=False, program=PROGRAM)
                )
            found |= _one_life(workers, prompts, texts, effort, progress)
    skipped = [
        {"label": m.label, "why": f"{sizes[m.label]:,} bytes, and {room:,} of memory are free"}
        for m in models if m not in fitting
    ]  # fmt: skip
    speed = {
        "models": [
            {"label": m.label, "file": m.path.name, "bytes": sizes[m.label], **found[m.label]["speed"]} for m in fitting
        ],
        "skipped": skipped, "in_turns": together, "prompt_tokens": effort.prompt, "generated_tokens": effort.generate,
        "threads": options.threads, "backend": runtime.backend,
    }  # fmt: skip
    sections: dict[str, Any] = {"speed": speed}
    if fitting and prompts:
        original = models[0] if models[0] in fitting else None
        sections["completions"] = _completions(original, fitting, prompts, found, effort)
    pruned = next((model for model in fitting if model.plan is not None), None)
    if texts and pruned is not None and models[0] in fitting:
        sections["routing"] = _routing(models[0], pruned, texts, found)
    return sections


def _one_life(
    workers: Mapping[str, Worker], prompts: Sequence[Prompt], texts: Mapping[str, tuple[str, bool]], effort: Effort,
    progress: Progress | None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Everything that is asked of processes which are loaded together. Memory is asked before what needs more of it."""
    speed = _speeds(workers, effort, progress)
    out: dict[str, dict[str, Any]] = {}
    for label, worker in workers.items():
        memory = worker.ask("memory")
        taken = memory["peak"] - memory["before"] if memory["before"] else None
        _tell(progress, f"{worker.model.name}: completions")
        answers = [
            worker.ask("complete", effort.complete, text=p.text, special=p.special, seconds=effort.complete_seconds)
            for p in prompts
        ]
        _tell(progress, f"{worker.model.name}: routing")
        routes = [worker.ask("routes", effort.watched, text=text, special=special) for text, special in texts.values()]
        out[label] = {"speed": {"memory": taken, **speed[label]}, "answers": answers, "routes": routes}
    return out


def _speeds(workers: Mapping[str, Worker], effort: Effort, progress: Progress | None) -> dict[str, dict[str, Any]]:
    """Tokens per second of each, over rounds in which every process is asked once, each round starting with another one."""
    tokens = {"prompt": effort.prompt, "generate": effort.generate}
    seconds: dict[str, dict[str, list[float]]] = {label: {kind: [] for kind in KINDS} for label in workers}
    labels, start = list(workers), 0.0
    for number in range(-1, effort.rounds):
        if number == 0:
            start = time.monotonic()  # the first round, in which everything is read for the first time, is not counted
        if number > 0 and time.monotonic() - start > effort.seconds:
            break
        if progress:
            progress(number + 1, effort.rounds + 1, "measuring speed")
        for label in labels[max(number, 0) % len(labels) :] + labels[: max(number, 0) % len(labels)]:
            for kind, n in tokens.items():
                taken = workers[label].seconds(kind, n, max(number, 0))
                if number >= 0:
                    seconds[label][kind].append(taken)
    return {
        label: {"rounds": len(kinds["prompt"])}
        | {
            kind: {"median": n / median(kinds[kind]), "low": n / max(kinds[kind]), "high": n / min(kinds[kind])}
            for kind, n in tokens.items()
        }
        for label, kinds in seconds.items()
    }


def _completions(
    original: Tried | None, models: Sequence[Tried], prompts: Sequence[Prompt], found: Mapping[str, Any], effort: Effort
) -> dict[str, Any]:  # fmt: skip
    """What `models` write, held against what the original does, where that was run."""
    rows = []
    for index, prompt in enumerate(prompts):
        first = None if original is None else found[original.label]["answers"][index]["tokens"]
        answers = []
        for model in models:
            answer = found[model.label]["answers"][index]
            answers.append({
                "label": model.label, "text": answer["text"], "stopped": answer["stopped"],
                "tokens": len(answer["tokens"]),
                "same": None if first is None else same_start(first, answer["tokens"]),
            })  # fmt: skip
        left_out = found[models[0].label]["answers"][index]["left_out"]
        rows.append({"name": prompt.name, "prompt": prompt.shown, "left_out": left_out, "answers": answers})
    return {"how": _how(prompts), "n_tokens": effort.complete, "prompts": rows}


def _how(prompts: Sequence[Prompt]) -> str:
    """What the prompts are; where they are of several kinds, which of them is what."""
    kinds = list(dict.fromkeys(prompt.how for prompt in prompts))
    if len(kinds) == 1:
        return kinds[0]
    return "; ".join(f"{how} ({', '.join(p.name for p in prompts if p.how == how)})" for how in kinds)


def same_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two lists have in common from the start."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _routing(
    original: Tried, pruned: Tried, texts: Mapping[str, tuple[str, bool]], found: Mapping[str, Any]
) -> dict[str, Any]:
    assert pruned.plan is not None
    before, after = (_counts(found[model.label]["routes"]) for model in (original, pruned))
    tokens = sum(answer["tokens"] for answer in found[original.label]["routes"])
    layers = []
    for layer in pruned.plan.layers:
        if layer.index not in before or layer.index not in after:
            continue
        kept = np.zeros(pruned.plan.n_expert)
        if len(after[layer.index]) != len(layer.router) or len(before[layer.index]) != pruned.plan.n_expert:
            raise GgufToolError(
                f"layer {layer.index}: {len(after[layer.index])} experts were watched in {pruned.path.name}, the plan has "
                f"{len(layer.router)}"
            )
        kept[list(layer.router)] = after[layer.index]
        layers.append({
            "layer": layer.index, "original": rounded(before[layer.index] / tokens), "pruned": rounded(kept / tokens),
        })  # fmt: skip
    return {"tokens": tokens, "texts": list(texts), "label": pruned.label, "layers": layers}


def _counts(answers: Sequence[Mapping[str, Any]]) -> dict[int, np.ndarray]:
    """How often each row of each layer's router was chosen, over all texts."""
    layers = {int(layer) for answer in answers for layer in answer["chosen"]}
    return {layer: np.sum([a["chosen"][str(layer)] for a in answers], axis=0).astype(np.float64) for layer in layers}


def available_memory() -> int:
    """Bytes that programs can still take without swapping; half of all where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):  # no sysconf on this system
        return 8 << 30


def _tell(progress: Progress | None, text: str) -> None:
    if progress:
        progress(0, 1, text)
