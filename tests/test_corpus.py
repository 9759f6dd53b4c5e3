"""Texts to windows."""

from __future__ import annotations

import gzip
import hashlib
import json

import numpy as np
import pytest

from gguftool.corpus import bos_token, load_domain, read_text
from gguftool.errors import GgufToolError
from models import sample_text, tiny_tokenizer


class Letters:
    """One token a character; optionally puts a BOS (id 1) before a text, optionally knows an end of text (id 2)."""

    def __init__(self, bos=False, eos=True):
        self.bos_token_id = 1
        self.eos_token_id = 2 if eos else None
        self.bos = bos

    def encode(self, text, *, add_special_tokens, **_):
        return [1] * (self.bos and add_special_tokens) + [ord(c) for c in text]


def spelled(windows):
    return ["".join({1: "^", 2: "$"}.get(i, chr(i)) for i in row) for row in windows.tolist()]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_text_is_cut_into_consecutive_windows(tmp_path):
    path = write(tmp_path / "a.txt", "abcdefghij")
    domain, windows = load_domain(path, Letters(), 4)
    assert spelled(windows) == ["abcd", "efgh"]
    assert windows.dtype == np.int64
    assert domain.name == "a.txt"
    assert domain.tokens == 8
    assert domain.sha256 == hashlib.sha256(b"abcdefghij").hexdigest()


def test_at_most_max_windows(tmp_path):
    domain, windows = load_domain(write(tmp_path / "a.txt", "abcdefghij"), Letters(), 3, 2)
    assert spelled(windows) == ["abc", "def"]
    assert domain.tokens == 6


def test_a_seed_draws_whole_windows_in_the_order_of_the_text(tmp_path):
    path = write(tmp_path / "a.txt", "".join(f"{number:03}" for number in range(50)) + "x")
    first, windows = load_domain(path, Letters(), 3, 8)
    assert spelled(windows) == [f"{number:03}" for number in range(8)] and first.windows is None
    drawn, windows = load_domain(path, Letters(), 3, 8, seed=1)
    assert spelled(windows) == [f"{number:03}" for number in drawn.windows]
    assert list(drawn.windows) == sorted(set(drawn.windows)) and len(drawn.windows) == 8 and max(drawn.windows) > 8
    assert drawn.tokens == first.tokens == 24 and drawn.sha256 == first.sha256
    assert load_domain(path, Letters(), 3, 8, seed=1)[0] == drawn != load_domain(path, Letters(), 3, 8, seed=2)[0]
    assert all(row[0] == 1 for row in load_domain(path, Letters(bos=True), 3, 8, seed=1)[1])


def test_a_seed_draws_from_all_documents(tmp_path):
    path = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": f"{number:02}"}) + "\n" for number in range(60)))
    drawn, windows = load_domain(path, Letters(), 3, 4, seed=3)
    assert spelled(windows) == [f"{number:02}$" for number in drawn.windows] and max(drawn.windows) > 4


@pytest.mark.parametrize("windows", [None, 3, 4])
def test_a_seed_needs_something_to_leave_out(tmp_path, windows):
    with pytest.raises(GgufToolError, match="has 3 windows"):
        load_domain(write(tmp_path / "a.txt", "abcdefghij"), Letters(), 3, windows, seed=1)


def test_a_bos_stands_before_the_text_and_at_the_start_of_every_window(tmp_path):
    """As llama-perplexity has it: ^abcdefghij is cut, then the first token of every window is overwritten."""
    _, windows = load_domain(write(tmp_path / "a.txt", "abcdefghijk"), Letters(bos=True), 4)
    assert spelled(windows) == ["^abc", "^efg", "^ijk"]
    assert bos_token(Letters(bos=False)) is None


def test_documents_are_joined_by_the_end_of_text(tmp_path):
    lines = [json.dumps({"text": text}) for text in ("abc", "d\ne", "fgh")]
    path = write(tmp_path / "a.jsonl", lines[0] + "\n\n" + "\n".join(lines[1:]) + "\n")
    assert spelled(load_domain(path, Letters(), 4)[1]) == ["abc$", "d\ne$"]
    assert spelled(load_domain(path, Letters(), 4, 1)[1]) == ["abc$"]
    assert spelled(load_domain(path, Letters(eos=False), 4)[1]) == ["abc\n", "\nd\ne", "\n\nfg"]
    assert read_text(path) == "abc\n\nd\ne\n\nfgh"


def test_gzip_is_the_same_text(tmp_path):
    plain = load_domain(write(tmp_path / "a.txt", "abcdefgh"), Letters(), 4)
    packed = load_domain(write(tmp_path / "a.txt.gz", gzip.compress(b"abcdefgh", mtime=0)), Letters(), 4)
    assert packed[0].sha256 == plain[0].sha256
    assert np.array_equal(packed[1], plain[1])


def test_line_ends_stay_and_a_byte_order_mark_goes(tmp_path):
    _, windows = load_domain(write(tmp_path / "a.txt", b"\xef\xbb\xbfab\r\ncd"), Letters(), 3)
    assert spelled(windows) == ["ab\r", "\ncd"]


def test_a_real_tokenizer(tmp_path):
    tokenizer = tiny_tokenizer()
    text = sample_text(300)
    _, windows = load_domain(write(tmp_path / "a.txt", text), tokenizer, 16)
    assert text.startswith(tokenizer.decode(windows.flatten()))
    again = load_domain(tmp_path / "a.txt", tiny_tokenizer(), 16)[1]
    assert np.array_equal(windows, again)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "the file is empty"),
        ("a.txt", b" \n\n", "the file is empty"),
        ("a.txt", b"abc", "3 tokens do not fill one window of 4"),
        ("a.txt", b"ab\nc\xffd and more", "byte 0xff at position 4 (line 2)"),
        ("a.txt.gz", b"not packed at all", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"abcdefgh" * 99, mtime=0)[:-9], "cannot be read"),
        ("a.jsonl", b'{"text": "abcd"}\n{"text": ', "line 2: not JSON"),
        ("a.jsonl", b'{"text": "abcd"}\n{"body": "abcd"}', "line 2: no field 'text'"),
        ("a.jsonl", b'{"text": "abcd"}\n\n["text"]', "line 3: no field 'text'"),
        ("a.jsonl", b'{"text": 5}', "line 1: 'text' is no string but int"),
        ("a.jsonl", b'{"text": "ab\\ud800cd"}', "line 1: 'text' holds half of a surrogate pair"),
    ],
)
def test_what_is_wrong_with_a_text_is_said(tmp_path, name, content, message):
    with pytest.raises(GgufToolError) as caught:
        load_domain(write(tmp_path / name, content), Letters(), 4)
    assert message in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_text(tmp_path):
    with pytest.raises(GgufToolError, match="no such text file"):
        load_domain(tmp_path / "a.txt", Letters(), 4)
    with pytest.raises(GgufToolError, match="no text file but a folder"):
        load_domain(tmp_path, Letters(), 4)


@pytest.mark.parametrize(("n_ctx", "windows"), [(1, None), (0, None), (4, 0)])
def test_sizes_that_make_no_sense(tmp_path, n_ctx, windows):
    with pytest.raises(GgufToolError, match="at least"):
        load_domain(write(tmp_path / "a.txt", "abcdefgh"), Letters(), n_ctx, windows)
