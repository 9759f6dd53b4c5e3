"""Calibration and evaluation texts: documents -> tokens -> windows of equal length.

The windows are those of llama.cpp's tools/perplexity: the whole text is tokenised once and cut into consecutive
windows, the remainder is dropped; a model that wants a BOS gets it before the text and in place of the first token of
every window.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import ceil
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .chat import template_of
from .documents import Document, Reading, Templates
from .errors import GgufToolError
from .sources import Source, as_source
from .stats import Domain

Tokens = NDArray[np.int64]


class Tokenizer(Protocol):
    """What is used of a checkpoint's tokenizer (transformers' `PreTrainedTokenizerBase` has it).

    One that has what `chat.Chats` asks for too can read conversations.
    """

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    def encode(self, text: str, *, add_special_tokens: bool, **kwargs: Any) -> list[int]: ...


def load_domains(
    sources: Sequence[Source | Path], tokenizer: Tokenizer, n_ctx: int, max_windows: int | None = None, seed: int = 0
) -> list[tuple[Domain, Tokens]]:
    """`load_domain` of every source: at most `max_windows` times its weight of each.

    Weights other than 1 are kept exactly, up to the rounding to whole windows, or refused: without `max_windows` there
    is nothing to share out, and where one text is too short for its share the others would weigh too much.

    Raises GgufToolError as `load_domain` does, and for such weights.
    """
    given = [as_source(source) for source in sources]
    weighted = any(source.weight != 1 for source in given)
    if max_windows is None:
        if weighted:
            raise GgufToolError("weights of --data (@WEIGHT) say how many times --windows is taken; give --windows")
        return [load_domain(source, tokenizer, n_ctx, None, seed) for source in given]
    if max_windows < 1:
        raise GgufToolError(f"{max_windows} windows were asked for; it takes at least 1")
    shares = [source.share(max_windows) for source in given]
    found = [load_domain(s, tokenizer, n_ctx, share, seed) for s, share in zip(given, shares, strict=True)]
    if weighted:
        _check_shares(given, shares, [len(windows) for _, windows in found])
    return found


def _check_shares(sources: Sequence[Source], shares: Sequence[int], have: Sequence[int]) -> None:
    short = [triple for triple in zip(sources, shares, have, strict=True) if triple[1] > triple[2]]
    if not short:
        return
    # The most windows n for which weight x n, rounded, is at most what there is, in every text.
    most = min(ceil((count + 0.5) / source.weight) - 1 for source, _, count in short)
    source, share, count = short[0]
    advice = f"take --windows {most} at most, or" if most >= 1 else "change the weights, or"
    raise GgufToolError(
        f"{source}: {count} windows, and its weight of {source.weight:g} asks for {share} beside the others; {advice} give "
        "more text"
    )


def load_domain(
    source: Source | Path, tokenizer: Tokenizer, n_ctx: int, max_windows: int | None = None, seed: int = 0
) -> tuple[Domain, Tokens]:
    """Reads a text and cuts it into windows.

    A `.jsonl` (or a `.json` that is an array) holds documents, as a dataset of the hub does; every other file is one text.
    Documents are joined by the tokenizer's end-of-text token, or by a blank line where it has none; conversations among
    them are rendered by the tokenizer's chat template and get no second end-of-text token. A further `.gz` is unpacked; the
    sha256 in the result is that of the unpacked bytes. Special tokens that the text spells out become special tokens, as
    they do in chat transcripts.

    With a `seed` above 0 it is not the first `max_windows` windows that are taken but a sample of them, drawn without
    replacement and kept in the order of the text; the domain then lists their numbers.

    Returns the domain and int64 token ids [windows, n_ctx], at most `max_windows` of them; the source's weight is not
    looked at.
    Raises GgufToolError for a source that is missing, empty, not UTF-8, badly formed or shorter than one window, for
    conversations without a chat template, for a dataset of the hub without any limit, and for a text of which there is
    nothing to draw because all of it would be taken.
    """
    source = as_source(source)
    if n_ctx < 2:
        raise GgufToolError(f"a context of {n_ctx} tokens predicts nothing; it takes at least 2")
    if max_windows is not None and max_windows < 1:
        raise GgufToolError(f"{source}: {max_windows} windows were asked for; it takes at least 1")
    wanted = None if max_windows is None or seed else max_windows * n_ctx
    if source.hub and wanted is None and source.limit is None:
        raise GgufToolError(
            f"{source}: all of the dataset would be read; give it a limit ({source}:2000), or --windows"
        )
    reading = Reading(source, lambda: template_of(tokenizer))
    bos = bos_token(tokenizer)
    tokens = _tokens(reading, tokenizer, bos, wanted)
    count = len(tokens) // n_ctx
    if not count:
        raise GgufToolError(
            f"{source}: {len(tokens)} tokens do not fill one window of {n_ctx}; use more text or a shorter context"
        )
    chosen: tuple[int, ...] | None = None
    if seed:
        chosen = _sample(source, count, max_windows, [seed, int(reading.sha256[:16], 16)])
    elif max_windows is not None:
        count = min(count, max_windows)
    windows = np.array(tokens[: count * n_ctx], dtype=np.int64).reshape(count, n_ctx)
    if chosen is not None:
        windows = windows[list(chosen)]
    if bos is not None:
        windows[:, 0] = bos
    return _domain(source, reading, windows.size, chosen), windows


def _domain(source: Source, reading: Reading, tokens: int, chosen: tuple[int, ...] | None) -> Domain:
    """What identifies a text: as in the first stats for plain ones, with more where more decided what was read."""
    return Domain(
        source.name, reading.sha256, tokens, chosen,
        field=None if reading.field == "text" else reading.field,
        template=None if reading.template is None else reading.template.fingerprint,
        limit=source.limit,
        weight=None if source.weight == 1 else source.weight,
    )  # fmt: skip


def _sample(source: Source, count: int, wanted: int | None, seed: list[int]) -> tuple[int, ...]:
    """The numbers of `wanted` windows out of `count`, in order."""
    if wanted is None or wanted >= count:
        raise GgufToolError(
            f"{source}: it has {count} windows and {'all' if wanted is None else wanted} would be taken, so another seed "
            "would not take others; take fewer (--windows), or give more text"
        )
    drawn = np.random.default_rng(seed).choice(count, wanted, replace=False)
    return tuple(sorted(drawn.tolist()))


def read_text(source: Source | Path) -> str:
    """A text as one string; documents are joined by blank lines.

    Raises GgufToolError as `load_domain` does, and for conversations.
    """
    return read_scored(source, lambda: None)[0]


def read_scored(source: Source | Path, template: Templates, enough: int | None = None) -> tuple[str, bool]:
    """A text to measure on as one string, and whether special tokens that it spells out are meant as such.

    They are where it consists of conversations. `template` gives the model's chat template; conversations are joined as
    it renders them, a BOS before the first is left to the tokenizer. Other documents are joined by blank lines.

    A dataset of the hub without a limit is read until its documents have `enough` characters; without that it is refused.
    Every other source is read to its end.

    Raises GgufToolError as `load_domain` does, and where conversations and other texts are mixed.
    """
    source = as_source(source)
    endless = source.hub and source.limit is None
    if endless and enough is None:
        raise GgufToolError(f"{source}: all of the dataset would be read; give it a limit ({source}:2000)")
    reading = Reading(source, template)
    documents = list(_until(reading, enough) if endless and enough is not None else reading)
    if not any(document.chat for document in documents):
        return "\n\n".join(document.text for document in documents), False
    if not all(document.chat for document in documents):
        raise GgufToolError(f"{source}: conversations and plain texts are mixed; measure on one or the other")
    bos = reading.template.special.get("bos_token", "") if reading.template is not None else ""
    return "".join(document.text for document in documents).removeprefix(bos), True


def _until(documents: Iterable[Document], enough: int) -> Iterator[Document]:
    """The documents up to the one that brings the `enough`-th character."""
    read = 0
    for document in documents:
        yield document
        read += len(document.text)
        if read >= enough:
            break


def bos_token(tokenizer: Tokenizer) -> int | None:
    """The id that the tokenizer itself puts before a text, or None where it puts none."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return None
    with_special = tokenizer.encode("a", add_special_tokens=True)
    return bos if with_special[:1] == [bos] else None


def _tokens(reading: Reading, tokenizer: Tokenizer, bos: int | None, wanted: int | None) -> list[int]:
    """Tokens of a text with the BOS before it; stops after the document that brings the `wanted`-th token."""
    tokens: list[int] = [] if bos is None else [bos]
    before: Document | None = None
    for document in reading:
        ids = _encode(tokenizer, document.text, str(reading.source))
        if before is not None:
            tokens += _between(reading, before, tokenizer)
        elif document.chat and bos is not None and ids[:1] == [bos]:
            ids = ids[1:]  # templates write it themselves
        tokens += ids
        before = document
        if wanted is not None and len(tokens) >= wanted:
            break
    return tokens


def _between(reading: Reading, before: Document, tokenizer: Tokenizer) -> list[int]:
    """What separates a document from the one before it."""
    if before.chat and reading.template is not None and reading.template.ends(before.text):
        return []
    eos = tokenizer.eos_token_id
    return _encode(tokenizer, "\n\n", str(reading.source)) if eos is None else [eos]


def _encode(tokenizer: Tokenizer, text: str, name: str) -> list[int]:
    """Token ids without those that the tokenizer would add by itself."""
    try:
        return tokenizer.encode(text, add_special_tokens=False, verbose=False)
    except (TypeError, ValueError, OverflowError) as error:
        raise GgufToolError(f"{name}: the tokenizer refuses the text ({error})") from error
