"""What `--data` names."""

from __future__ import annotations

from pathlib import Path

import pytest

from gguftool.errors import GgufToolError
from gguftool.sources import Source, as_source, files, parse_source


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("a.jsonl", Source("a.jsonl")),
        ("a.jsonl:messages", Source("a.jsonl", "messages")),
        ("a.jsonl:messages:2000", Source("a.jsonl", "messages", 2000)),
        ("a.jsonl:2000", Source("a.jsonl", None, 2000)),
        ("a.jsonl:\u00b2", Source("a.jsonl", "\u00b2")),
        ("a.jsonl::2000", Source("a.jsonl", None, 2000)),
        ("a.jsonl@2", Source("a.jsonl", weight=2)),
        ("a.jsonl:messages:2000@0.5", Source("a.jsonl", "messages", 2000, 0.5)),
        ("data/a.jsonl:content@1e1", Source("data/a.jsonl", "content", weight=10)),
        (r"C:\texts\a.jsonl", Source(r"C:\texts\a.jsonl")),
        (r"C:\texts\a.jsonl:messages:7", Source(r"C:\texts\a.jsonl", "messages", 7)),
        ("C:a", Source("C:a")),
        ("me@home/a.txt", Source("me@home/a.txt")),
        ("hf:owner/name", Source("owner/name", hub=True)),
        ("hf:owner/name:test", Source("owner/name", hub=True, split="test")),
        ("hf:owner/name:train_sft:messages:100@3", Source("owner/name", "messages", 100, 3, True, None, "train_sft")),
        ("hf:owner/name:500", Source("owner/name", None, 500, hub=True)),
        ("hf:owner/name::messages", Source("owner/name", "messages", hub=True)),
        ("hf:owner/name/sub-set.1:test:500", Source("owner/name", None, 500, 1, True, "sub-set.1", "test")),
        ("hf:name", Source("name", hub=True)),
    ],
)
def test_a_source_is_read_from_the_right(text, source, tmp_path, monkeypatch):
    """Nothing of that name exists, so that the parts are told by their looks alone."""
    monkeypatch.chdir(tmp_path)
    assert parse_source(text) == source


def test_the_longest_name_that_exists_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "a.jsonl:messages", "b@2", "c:d.txt", "hf:x"):
        Path(name).write_text("x")
    assert parse_source("a.jsonl:messages") == Source("a.jsonl:messages")
    assert parse_source("a.jsonl:messages:content:5") == Source("a.jsonl:messages", "content", 5)
    assert parse_source("a.jsonl:text:5") == Source("a.jsonl", "text", 5)
    assert parse_source("a.jsonl:field with blanks") == Source("a.jsonl", "field with blanks")
    assert parse_source("b@2") == Source("b@2") and parse_source("b@2@3") == Source("b@2", weight=3)
    assert parse_source("c:d.txt@2") == Source("c:d.txt", weight=2)
    assert parse_source("hf:x") == Source("hf:x")
    Path("of:mine").mkdir()
    assert parse_source("hf:of:mine:test:messages:3") == Source("of:mine", "messages", 3, 1, True, None, "test")
    assert files([parse_source("a.jsonl:text"), parse_source("hf:owner/name")]) == [Path("a.jsonl")]
    assert as_source(Path("a.jsonl")) == Source("a.jsonl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jsonl:messages:0", "a limit of 0 documents leaves none"),
        ("a.jsonl@0", "a weight of 0 is no finite number above 0"),
        ("a.jsonl@-1", "a weight of -1"),
        ("a.jsonl@1e999", "a weight of inf"),
        ("a.jsonl@1.2.3", "'1.2.3' is no weight"),
        ("a.jsonl:5:6", "'5' is not [FIELD][:LIMIT]"),
        ("a.jsonl:a:b", "'a:b' is not [FIELD][:LIMIT]"),
        ("hf:a/b/c/d", "write hf:OWNER/NAME"),
        ("hf:", "write hf:OWNER/NAME"),
        ("hf:a/b:train:text:more", "'text:more' is not"),
        ("hf:a/b:train[:100]", "write hf:OWNER/NAME"),
    ],
)
def test_what_is_no_source_is_said(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GgufToolError) as caught:
        parse_source(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_share_is_windows_times_weight():
    assert [Source("a", weight=w).share(10) for w in (1, 2, 0.25, 0.05, 1.449)] == [10, 20, 3, 1, 14]
    with pytest.raises(GgufToolError, match="10 windows times its weight of 0.04 is none"):
        Source("a", weight=0.04).share(10)
