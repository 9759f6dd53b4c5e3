"""One calibration in several parts that know nothing of each other: cutting the texts, adding up the stats.

Sums add up, whatever the parts were. What is no sum: `max_out` is a maximum; norms of the weights are the same in every part;
OBS costs are solved from second moments that no file keeps, and those of two halves do not give those of the whole, so they
are left out. (Ranks of one run add up the moments before they solve: there the costs are exact.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from .errors import GgufToolError
from .stats import EXPERT_SUMS, NEURON_SUMS, SOLVED, WEIGHT_NORMS, Array, CalibrationStats, Domain


def parse_part(text: str) -> tuple[int, int]:
    """'2/3' -> (1, 3): the second of three parts, counted from 0. Raises GgufToolError for anything else."""
    first, _, second = text.partition("/")
    if not (first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
        raise GgufToolError(f"--part {text!r}: it takes I/N with I from 1 to N, as 1/2")
    return int(first) - 1, int(second)


def part_of(
    domains: Sequence[tuple[Domain, NDArray[np.int64]]], index: int, count: int
) -> list[tuple[Domain, NDArray[np.int64]]]:
    """Part `index` of `count` of the windows of every text; the domains list which windows those are.

    A text with too few windows to have any in this part is left out. Raises GgufToolError where none is left.
    """
    found = []
    for domain, windows in domains:
        part = slice(len(windows) * index // count, len(windows) * (index + 1) // count)
        mine = windows[part]
        if len(mine):
            numbers = window_numbers(domain, windows.shape[1])[part]
            found.append((replace(domain, tokens=mine.size, windows=tuple(numbers)), mine))
    if not found:
        most = max((len(windows) for _, windows in domains), default=0)
        raise GgufToolError(f"part {index + 1} of {count} has no window: the longest text has {most}")
    return found


def window_numbers(domain: Domain, n_ctx: int) -> Sequence[int]:
    """Which windows of its text a domain covers."""
    return range(domain.tokens // n_ctx) if domain.windows is None else domain.windows


def merge(stats: Sequence[CalibrationStats]) -> tuple[CalibrationStats, tuple[str, ...]]:
    """The stats of all parts together, and notes on what they lack.

    Domains of the same text become one, in the order in which they are first met.

    Raises:
        GgufToolError: other models or context lengths, a window of a text in two parts, sums that only some have.
    """
    if len(stats) < 2:
        raise GgufToolError(f"{len(stats)} stats file to merge; it takes two or more")
    first = stats[0]
    for number, other in enumerate(stats[1:], start=2):
        _check_alike(first, other, number)
    domains, places = _merge_domains(stats)
    experts: dict[str, Array] = {}
    for name in EXPERT_SUMS:
        experts[name] = np.zeros((len(domains), *first.experts[name].shape[1:]))
        add = np.maximum if name == "max_out" else np.add
        for one, place in zip(stats, places, strict=True):
            for index, target in enumerate(place):
                add(experts[name][target], one.experts[name][index], out=experts[name][target])
    neurons = {name: _sum([one.neurons[name] for one in stats]) for name in NEURON_SUMS}
    neurons |= {name: first.neurons[name] for name in WEIGHT_NORMS}
    residuals = [one.residual_inverse for one in stats]
    notes = []
    if any(name in one.neurons for one in stats for name in SOLVED):
        notes.append(
            "OBS costs are left out: they are solved from second moments that the files do not keep, and do not add up. For "
            "the method auto calibrate in one run; torchrun shares it among processes"
        )
    if any(value is None for value in residuals) and not all(value is None for value in residuals):
        notes.append("the length of the residual stream is left out: not every file has it")
    merged = replace(
        first,
        domains=tuple(domains),
        experts=experts,
        neurons=neurons,
        expert_inputs=_sum([one.expert_inputs for one in stats]),
        residual_inverse=None
        if any(value is None for value in residuals)
        else _sum([v for v in residuals if v is not None]),
        linears={name: _sum([one.linears[name] for one in stats]) for name in first.linears},
        linear_tokens=sum(one.linear_tokens for one in stats),
    )
    merged.check()
    return merged, tuple(notes)


def _sum(values: Sequence[Array]) -> Array:
    total = values[0].copy()
    for value in values[1:]:
        total += value
    return total


def _check_alike(first: CalibrationStats, other: CalibrationStats, number: int) -> None:
    """Raises GgufToolError where the stats of file `number` cannot be added to those of the first one."""
    if other.model.fingerprint != first.model.fingerprint:
        raise GgufToolError(
            f"file {number} is of another model ({other.model.name}, fingerprint {other.model.fingerprint[:12]}) than the "
            f"first ({first.model.name}, {first.model.fingerprint[:12]}); only stats of one checkpoint add up"
        )
    if other.n_ctx != first.n_ctx:
        raise GgufToolError(
            f"file {number} has windows of {other.n_ctx} tokens, the first has {first.n_ctx}; calibrate with one --ctx"
        )
    if other.linears.keys() != first.linears.keys():
        odd = sorted(other.linears.keys() ^ first.linears.keys())
        raise GgufToolError(f"file {number} and the first do not both have sums of {odd[0]}; calibrate again")
    for name in WEIGHT_NORMS:
        if not _near(other.neurons, first.neurons, name):
            raise GgufToolError(f"file {number} has another {name!r} than the first; calibrate again")


def _near(one: Mapping[str, Array], other: Mapping[str, Array], name: str) -> bool:
    """Equal up to what another type of the computation rounds away."""
    return bool(np.allclose(one[name], other[name], rtol=1e-2, atol=1e-6))


def _merge_domains(stats: Sequence[CalibrationStats]) -> tuple[list[Domain], list[list[int]]]:
    """The domains of all files, and for each file where each of its domains goes."""
    domains: list[Domain] = []
    covered: dict[tuple[str, str | None, str | None], dict[int, int]] = {}
    places: list[list[int]] = []
    for number, one in enumerate(stats, start=1):
        places.append([])
        for domain in one.domains:
            mine = window_numbers(domain, one.n_ctx)
            seen = covered.setdefault((domain.sha256, domain.field, domain.template), {})
            twice = sorted(set(mine) & seen.keys())
            if twice:
                raise GgufToolError(
                    f"{domain.name}: {len(twice)} of its windows, the first is {twice[0]}, are in file {seen[twice[0]]} and in "
                    f"file {number}; they would count twice. Parts are made with --part 1/2, --part 2/2"
                )
            seen |= dict.fromkeys(mine, number)
            target = next((i for i, d in enumerate(domains) if _text_of(d) == _text_of(domain)), len(domains))
            if target == len(domains):
                domains.append(domain)
            else:
                both = sorted([*window_numbers(domains[target], one.n_ctx), *mine])
                tokens = domains[target].tokens + domain.tokens
                domains[target] = replace(domain, tokens=tokens, windows=_in_short(both))
            places[-1].append(target)
    return domains, places


def _in_short(numbers: Sequence[int]) -> tuple[int, ...] | None:
    """None for the first windows of a text, as `stats.Domain` has it."""
    return None if list(numbers) == list(range(len(numbers))) else tuple(numbers)


def _text_of(domain: Domain) -> Domain:
    """What two domains of the same text share."""
    return replace(domain, tokens=0, windows=None)
