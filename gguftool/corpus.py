"""Calibration and evaluation texts: bytes -> text -> tokens -> windows of equal length.

The windows are those of llama.cpp's tools/perplexity: the whole text is tokenised once and cut into consecutive
windows, the remainder is dropped; a model that wants a BOS gets it before the text and in place of the first token of
every window.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import GgufToolError
from .stats import Domain

Tokens = NDArray[np.int64]

SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer(Protocol):
    """What is used of a checkpoint's tokenizer (transformers' `PreTrainedTokenizerBase` has it)."""

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    def encode(self, text: str, *, add_special_tokens: bool, **kwargs: Any) -> list[int]: ...


def load_domain(
    path: Path, tokenizer: Tokenizer, n_ctx: int, max_windows: int | None = None, seed: int = 0
) -> tuple[Domain, Tokens]:
    """Reads a text and cuts it into windows.

    `.txt` (or any other suffix) is one text; `.jsonl` holds a document a line in its field `text`, joined by the
    tokenizer's end-of-text token, or by a blank line where it has none. A further `.gz` is unpacked; the sha256 in the
    result is that of the unpacked bytes. Special tokens that the text spells out become special tokens, as they do in
    chat transcripts.

    With a `seed` above 0 it is not the first `max_windows` windows that are taken but a sample of them, drawn without
    replacement and kept in the order of the text; the domain then lists their numbers.

    Returns the domain and int64 token ids [windows, n_ctx], at most `max_windows` of them.
    Raises GgufToolError for a file that is missing, empty, not UTF-8, badly formed or shorter than one window, and for
    a text of which there is nothing to draw because all of it would be taken.
    """
    if n_ctx < 2:
        raise GgufToolError(f"a context of {n_ctx} tokens predicts nothing; it takes at least 2")
    if max_windows is not None and max_windows < 1:
        raise GgufToolError(f"{path}: {max_windows} windows were asked for; it takes at least 1")
    raw = _read(path)
    wanted = None if max_windows is None or seed else max_windows * n_ctx
    bos = bos_token(tokenizer)
    tokens: list[int] = [] if bos is None else [bos]
    if _is_jsonl(path):
        tokens += _document_tokens(_documents(raw, path), tokenizer, wanted)
    else:
        tokens += _encode(tokenizer, _decode(raw, path), path.name)
    count = len(tokens) // n_ctx
    if not count:
        raise GgufToolError(
            f"{path}: {len(tokens)} tokens do not fill one window of {n_ctx}; use more text or a shorter context"
        )
    sha256 = hashlib.sha256(raw).hexdigest()
    chosen: tuple[int, ...] | None = None
    if seed:
        chosen = _sample(path, count, max_windows, [seed, int(sha256[:16], 16)])
    elif max_windows is not None:
        count = min(count, max_windows)
    windows = np.array(tokens[: count * n_ctx], dtype=np.int64).reshape(count, n_ctx)
    if chosen is not None:
        windows = windows[list(chosen)]
    if bos is not None:
        windows[:, 0] = bos
    return Domain(path.name, sha256, windows.size, chosen), windows


def _sample(path: Path, count: int, wanted: int | None, seed: list[int]) -> tuple[int, ...]:
    """The numbers of `wanted` windows out of `count`, in order."""
    if wanted is None or wanted >= count:
        raise GgufToolError(
            f"{path}: it has {count} windows and {'all' if wanted is None else wanted} would be taken, so another seed "
            "would not take others; take fewer (--windows), or give more text"
        )
    drawn = np.random.default_rng(seed).choice(count, wanted, replace=False)
    return tuple(sorted(drawn.tolist()))


def read_text(path: Path) -> str:
    """The text of a file as one string; the documents of a `.jsonl` are joined by blank lines.

    Raises GgufToolError as `load_domain` does.
    """
    raw = _read(path)
    return "\n\n".join(_documents(raw, path)) if _is_jsonl(path) else _decode(raw, path)


def bos_token(tokenizer: Tokenizer) -> int | None:
    """The id that the tokenizer itself puts before a text, or None where it puts none."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return None
    with_special = tokenizer.encode("a", add_special_tokens=True)
    return bos if with_special[:1] == [bos] else None


def _is_jsonl(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith(".jsonl")


def _read(path: Path) -> bytes:
    """The bytes of the text, unpacked."""
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise GgufToolError(f"{path}: no such text file") from error
    except (EOFError, zlib.error, OSError) as error:
        raise GgufToolError(f"{path}: cannot be read ({error})") from error
    if not raw.strip():
        raise GgufToolError(f"{path}: the file is empty")
    return raw


def _decode(raw: bytes, path: Path) -> str:
    """UTF-8 text without a byte order mark. A failure states where the first bad byte is."""
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise GgufToolError(
            f"{path}: not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start} (line {line})"
        ) from error


def _documents(raw: bytes, path: Path) -> list[str]:
    """The `text` of every line that is not blank."""
    documents: list[str] = []
    for number, line in enumerate(_decode(raw, path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except json.JSONDecodeError as error:
            raise GgufToolError(f"{path}, line {number}: not JSON ({error.msg}, column {error.colno})") from error
        except (KeyError, TypeError) as error:
            raise GgufToolError(f"{path}, line {number}: no field 'text'") from error
        if not isinstance(text, str):
            raise GgufToolError(f"{path}, line {number}: 'text' is no string but {type(text).__name__}")
        if SURROGATE.search(text):
            raise GgufToolError(f"{path}, line {number}: 'text' holds half of a surrogate pair")
        documents.append(text)
    return documents


def _document_tokens(documents: list[str], tokenizer: Tokenizer, wanted: int | None) -> list[int]:
    """Tokens of the documents, joined; stops after the document that brings the `wanted`-th token."""
    eos = tokenizer.eos_token_id
    if eos is None:
        return _encode(tokenizer, "\n\n".join(documents), "documents")
    tokens: list[int] = []
    for index, text in enumerate(documents):
        if wanted is not None and len(tokens) >= wanted:
            break
        if index:
            tokens.append(eos)
        tokens += _encode(tokenizer, text, "documents")
    return tokens


def _encode(tokenizer: Tokenizer, text: str, name: str) -> list[int]:
    """Token ids without those that the tokenizer would add by itself."""
    try:
        return tokenizer.encode(text, add_special_tokens=False, verbose=False)
    except (TypeError, ValueError, OverflowError) as error:
        raise GgufToolError(f"{name}: the tokenizer refuses the text ({error})") from error
