"""Documents of sources: conversations through a chat template, fields, limits, datasets of the hub."""

from __future__ import annotations

import hashlib
import json
import sys
from types import SimpleNamespace

import gguf
import pytest
from click.testing import CliRunner

from gguftool.chat import FIXED_DAY, ChatTemplate, conversation, template_of, template_of_gguf
from gguftool.cli import cli
from gguftool.corpus import load_domain, load_domains, read_scored, read_text
from gguftool.documents import Reading
from gguftool.errors import GgufToolError
from gguftool.sources import Source, parse_source
from models import sample_text, tiny_checkpoint, tiny_tokenizer
from test_corpus import Letters, spelled, write

TEMPLATE = (
    "{{ bos_token }}{% if tools %}[{{ tools | length }} tools]{% endif %}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}"
    "{% for call in m.tool_calls %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %};{% endfor %}"
)


class Chatty(Letters):
    """Letters with a chat template."""

    def __init__(self, template=TEMPLATE, end="", **kwargs):
        super().__init__(**kwargs)
        self.chat_template = template
        self.special_tokens_map = {
            "bos_token": chr(1),
            "eos_token": end or "</s>",
            "additional_special_tokens": ["<x>"],
        }


def say(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def jsonl(path, *documents):
    return write(path, "".join(json.dumps(document) + "\n" for document in documents))


def rendered(path, template=TEMPLATE, field=None, limit=None):
    reading = Reading(Source(str(path), field, limit), lambda: ChatTemplate({"default": template}, {}))
    return [document.text for document in reading]


def test_both_forms_of_a_conversation_become_the_same_text(tmp_path):
    ours = {"messages": say(("system", "S"), ("user", "hi"), ("assistant", "yo"))}
    theirs = {
        "conversations": [
            {"from": "system", "value": "S"},
            {"from": "human", "value": "hi"},
            {"from": "gpt", "value": "yo"},
        ]
    }
    apart = {"conversations": theirs["conversations"][1:], "system": "S"}
    columns = {"messages": {"role": ["system", "user", "assistant"], "content": ["S", "hi", "yo"]}}
    texts = [rendered(jsonl(tmp_path / "a.jsonl", document)) for document in (ours, theirs, apart, columns)]
    assert texts == [["s:S;u:hi;a:yo;"]] * 4
    dialog = {"dialog": ours["messages"], "text": "not this"}
    assert rendered(jsonl(tmp_path / "b.jsonl", dialog), field="dialog") == ["s:S;u:hi;a:yo;"]
    assert rendered(tmp_path / "b.jsonl") == ["not this"]


def test_tools_and_contents_that_are_missing_or_in_parts(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}, "id": None}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1"},
    ]
    path = jsonl(tmp_path / "a.jsonl", {"messages": messages, "tools": [{"name": "f"}]},
                 {"messages": messages, "tools": '[{"name": "f"}]'}, {"messages": messages, "tools": None})  # fmt: skip
    spoken = 'u:ab;a:f{"x": 1};t:1;'
    assert rendered(path) == [f"[1 tools]{spoken}", f"[1 tools]{spoken}", spoken]
    named = ChatTemplate({"default": "D", "tool_use": "T"}, {})
    assert named.render([], [{}], "") == "T" and named.render([], None, "") == "D"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"messages": []}, "line 1: 'messages' is empty"),
        ({"messages": "hi"}, "line 1: 'messages' is no list of messages but str"),
        ({"messages": {"role": ["user"], "content": []}}, "'messages' is no list of messages"),
        ({"messages": ["hi"]}, "line 1, message 1: str, not an object with a role"),
        ({"messages": [{"content": "hi"}]}, "message 1: no 'role' (or 'from')"),
        ({"messages": [{"role": "user"}]}, "message 1: no 'content' (or 'value')"),
        ({"messages": [{"from": "narrator", "value": "hi"}]}, "'from' is 'narrator', not one of human"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "images and sounds cannot be read"),
        ({"messages": say(("user", "hi")), "tools": "{"}, "'tools' is a string, and no JSON"),
        ({"messages": say(("user", "\ud800"))}, "half of a surrogate pair"),
        ({"messages": say(("critic", "hi"))}, "refuses the conversation (who is critic)"),
        ({"body": "hi", "id": 1}, "line 1: no field 'text', 'messages' or 'conversations'; it has 'body', 'id'"),
    ],
)
def test_what_is_wrong_with_a_conversation_is_said(tmp_path, document, message):
    template = "{% for m in messages %}{% if m.role == 'critic' %}{{ raise_exception('who is critic') }}{% endif %}{% endfor %}"
    path = jsonl(tmp_path / "a.jsonl", document)
    with pytest.raises(GgufToolError) as caught:
        rendered(path, template + TEMPLATE)
    assert message in str(caught.value) and "a.jsonl" in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_without_a_template_says_what_to_do(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"messages": say(("user", "hi")), "answer": "plain text"})
    for tokenizer in (Letters(), Chatty(template=None), tiny_tokenizer()):
        with pytest.raises(GgufToolError, match=r"line 1: .*no chat template.*chat_template.jinja.*SOURCE:FIELD"):
            load_domain(path, tokenizer, 4)
    assert spelled(load_domain(parse_source(f"{path}:answer"), Letters(), 5)[1]) == ["plain", " text"]
    with pytest.raises(GgufToolError, match="no chat template"):
        read_text(path)


def test_conversations_are_joined_as_a_model_meets_them(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *({"messages": say(("user", text))} for text in ("hi", "yo")))
    # A BOS that the template writes is not doubled at the start and stays between; $ is the end of text.
    assert spelled(load_domain(path, Chatty(bos=True), 12)[1]) == ["^u:hi;$^u:yo"]
    # A template that ends in the end-of-text token needs no second one.
    ended = Chatty(TEMPLATE + "\x02{{ '\\n' }}", end="\x02")
    assert spelled(load_domain(path, ended, 14)[1]) == ["^u:hi;$\n^u:yo;"]
    assert spelled(load_domain(path, Chatty(eos=False), 14)[1]) == ["^u:hi;\n\n^u:yo;"]
    template = template_of(Chatty())
    assert read_scored(path, lambda: template) == ("u:hi;\x01u:yo;", True)
    plain = jsonl(tmp_path / "b.jsonl", {"text": "a"}, {"text": "b"})
    assert read_scored(plain, lambda: template) == ("a\n\nb", False)
    mixed = jsonl(tmp_path / "c.jsonl", {"x": "a"}, {"x": say(("user", "b"))})
    with pytest.raises(GgufToolError, match="conversations and plain texts are mixed"):
        read_scored(parse_source(f"{mixed}:x"), lambda: template)


def test_the_domain_says_what_was_read(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *({"messages": say(("user", f"{n:03}")), "text": f"{n:04}"} for n in range(9)))
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    plain = load_domain(path, Chatty(), 5)[0]
    assert plain.as_dict() == {"name": "a.jsonl", "sha256": sha, "tokens": 40, "windows": None}
    chats = load_domain(parse_source(f"{path}:messages:5@2"), Chatty(), 8)[0].as_dict()
    template = hashlib.sha256(TEMPLATE.encode()).hexdigest()
    assert chats == {"name": "a.jsonl", "sha256": sha, "tokens": 32, "windows": None, "field": "messages",
                     "template": template, "limit": 5, "weight": 2.0}  # fmt: skip
    other = load_domain(parse_source(f"{path}:messages:5@2"), Chatty(TEMPLATE + "!"), 8)[0]
    assert other.template != template and other.sha256 == sha
    assert spelled(load_domain(parse_source(f"{path}:2"), Letters(), 9)[1]) == ["0000$0001"]


def test_an_array_of_documents_and_files_without_fields(tmp_path):
    path = write(tmp_path / "a.json", json.dumps([{"text": "abc"}, {"text": "def"}], indent=1))
    assert rendered(path) == ["abc", "def"] and rendered(path, limit=1) == ["abc"]
    assert rendered(write(tmp_path / "b.json", '{"text": "abc"}')) == ['{"text": "abc"}']
    for name, content, arguments, message in (
        ("c.json", '[{"text": "a"},\n{', {}, "c.json, line 2: not JSON"),
        ("c.json", "[]", {}, "the array is empty"),
        ("c.txt", "abc", {"field": "messages"}, "one text without fields or documents, so it has no field 'messages'"),
        ("c.txt", "abc", {"limit": 3}, "so it has no limit of 3 documents"),
        ("c.txt", "ab\0c", {}, "not text but binary: a zero byte at position 2"),
        ("c.jsonl", '{"text": "a"}\n{"txet": "b"}', {}, "line 2: no field 'text'; it has 'txet'"),
    ):
        with pytest.raises(GgufToolError) as caught:
            rendered(write(tmp_path / name, content), **arguments)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    assert rendered(tmp_path / "c.jsonl", limit=1) == ["a"], "what is behind the limit is not looked at"


def test_a_date_in_a_template_is_the_same_every_day():
    template = ChatTemplate({"default": "\n{{ strftime_now('%d %b %Y') }}|{{ strftime_now('%Y-%m-%d') }}"}, {})
    assert template.render([], None, "") == "\n01 Jan 2025|2025-01-01"
    assert template.fingerprint == hashlib.sha256(template.sources["default"].encode()).hexdigest()
    assert FIXED_DAY not in template.sources["default"]


def test_the_template_of_a_gguf(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_chat_template([{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "T"}])
    writer.add_token_list(["<s>", "</s>", "a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_tensor("token_embd.weight", __import__("numpy").zeros((3, 32), "float32"))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    template = template_of_gguf(tmp_path / "a.gguf")
    assert template.special == {"bos_token": "<s>", "eos_token": "</s>"}
    assert template.render(say(("user", "hi")), None, "") == "<s>u:hi;" and template.render([], [{}], "") == "T"
    assert template_of_gguf(tmp_path / "a.gguf").fingerprint == template.fingerprint
    assert template.ends("hi</s>\n") and not template.ends("hi")


def test_a_checkpoint_and_its_gguf_offer_the_same_template(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    loaded = template_of(AutoTokenizer.from_pretrained(tmp_path))
    assert loaded.fingerprint == hashlib.sha256(TEMPLATE.encode()).hexdigest()
    text = tokenizer.apply_chat_template(say(("user", "hi"), ("assistant", "yo")), tokenize=False)
    assert loaded.render(say(("user", "hi"), ("assistant", "yo")), None, "") == text


def test_conversation_keeps_what_a_template_may_ask_for():
    document = {"messages": [{"role": "assistant", "content": "a", "reasoning_content": "r", "name": None}]}
    assert conversation(document, "messages", "here")[0] == [
        {"role": "assistant", "content": "a", "reasoning_content": "r"}
    ]


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package `datasets`: an endless dataset that counts what was taken from it."""
    taken = []

    def load_dataset(name, config, *, split, streaming):
        assert streaming
        if name != "owner/name":
            raise ConnectionError(f"no {name}\non the Hub")

        def documents():
            for number in range(10**9):
                taken.append((config, split, number))
                yield {"text": f"{number:03}", "messages": say(("user", str(number)))}

        return documents()

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return taken


def test_a_dataset_is_read_as_far_as_windows_ask(hub):
    domain, windows = load_domain(parse_source("hf:owner/name/sub:test"), Letters(), 4, 3)
    assert spelled(windows) == ["000$", "001$", "002$"] and hub == [("sub", "test", n) for n in range(4)]
    assert domain.name == "owner/name/sub:test"
    again = load_domain(parse_source("hf:owner/name/sub:test"), Letters(), 4, 3)[0]
    assert again == domain != load_domain(parse_source("hf:owner/name/sub:test"), Letters(), 4, 9)[0]
    hub.clear()
    domain, windows = load_domain(parse_source("hf:owner/name:train:messages:2"), Chatty(), 4)
    assert len(hub) == 2 and (domain.limit, domain.field) == (2, "messages")
    drawn = load_domain(parse_source("hf:owner/name:20"), Letters(), 4, 3, seed=1)[0]
    assert len(drawn.windows) == 3
    assert read_text(parse_source("hf:owner/name:2")) == "000\n\n001"
    hub.clear()
    assert read_scored(parse_source("hf:owner/name"), lambda: None, 7) == ("000\n\n001\n\n002", False) and len(hub) == 3
    assert read_scored(parse_source("hf:owner/name:5"), lambda: None, 7)[0].endswith("004")


def test_what_is_wrong_with_a_dataset_is_said(hub, monkeypatch):
    for read in (lambda: load_domain(parse_source("hf:owner/name"), Letters(), 4),
                 lambda: load_domain(parse_source("hf:owner/name"), Letters(), 4, 3, seed=1),
                 lambda: read_text(parse_source("hf:owner/name"))):  # fmt: skip
        with pytest.raises(GgufToolError, match=r"all of the dataset would be read; .*hf:owner/name:train:2000"):
            read()
    with pytest.raises(
        GgufToolError, match="hf:other:train: the dataset cannot be read: ConnectionError: no other on the"
    ):
        load_domain(parse_source("hf:other"), Letters(), 4, 1)
    with pytest.raises(GgufToolError, match="document 1: no field 'content'; it has 'text', 'messages'"):
        load_domain(parse_source("hf:owner/name:train:content"), Letters(), 4, 1)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(GgufToolError, match=r"pip install 'gguftool\[datasets\]'"):
        load_domain(parse_source("hf:owner/name"), Letters(), 4, 1)


def test_weights_multiply_windows(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.txt", "".join(f"{name}{n:02}" for n in range(12)))
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"

    def counts(*sources, windows=4, seed=0):
        found = load_domains([parse_source(str(source)) for source in sources], Letters(), 3, windows, seed)
        assert all(domain.tokens == tokens.size for domain, tokens in found)
        return [len(tokens) for _, tokens in found]

    assert counts(a, b) == [4, 4] and counts(f"{a}@2", b) == [8, 4] and counts(f"{a}@0.5", f"{b}@1.5") == [2, 6]
    assert counts(f"{a}@2", b, seed=3) == [8, 4]
    assert counts(a, b, windows=None) == [12, 12] and counts(a, b, windows=99) == [12, 12]
    assert counts(f"{a}@3", b, windows=4) == [12, 4]
    with pytest.raises(
        GgufToolError, match=r"a.txt: 12 windows, and its weight of 3 asks for 15 .* take --windows 4 at most"
    ):
        counts(f"{a}@3", b, windows=5)
    with pytest.raises(
        GgufToolError, match=r"b.txt: 12 windows, and its weight of 1 asks for 14 .* --windows 12 at most"
    ):
        counts(f"{a}@0.5", b, windows=14)
    with pytest.raises(GgufToolError, match=r"say how many times --windows is taken; give --windows"):
        counts(f"{a}@2", b, windows=None)
    with pytest.raises(GgufToolError, match="at least 1"):
        counts(a, windows=0)


def test_calibrate_takes_conversations_with_limit_and_weight(tmp_path):
    """The command: what the texts were is in the stats, few tokens are said with their numbers."""
    model = tiny_checkpoint(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    words = sample_text(4000).split("\n")
    chats = jsonl(tmp_path / "chat.jsonl", *({"messages": say(("user", text), ("assistant", text))} for text in words))
    text = write(tmp_path / "plain.txt", sample_text(2000, seed=1))
    out = tmp_path / "s.safetensors"
    arguments = ["calibrate", str(model), "--data", f"{chats}:messages:300@2", "--data", str(text), "--windows", "3",
                 "--ctx", "32", "-o", str(out), "--quiet"]  # fmt: skip
    run = CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False)
    facts = json.loads(run.stdout)
    assert facts["tokens"] == 9 * 32 and facts["coverage"]["full"] == 2 * 32
    domains = json.loads(CliRunner().invoke(cli, ["stats", "show", str(out), "--json"]).stdout)["domains"]
    assert [domain["tokens"] for domain in domains] == [6 * 32, 3 * 32]
    assert (domains[0]["field"], domains[0]["limit"], domains[0]["weight"]) == ("messages", 300, 2.0)
    assert domains[0]["template"] == hashlib.sha256(TEMPLATE.encode()).hexdigest() and "template" not in domains[1]
    again = CliRunner().invoke(cli, [*arguments, "--force"], catch_exceptions=False)
    poor = any(layer["noisy"] for layer in facts["coverage"]["layers"])
    assert poor and "note: few tokens" in again.stdout
    with pytest.raises(GgufToolError, match="is an input"):
        CliRunner().invoke(
            cli, ["calibrate", str(model), "--data", f"{text}@2", "-o", str(text)], catch_exceptions=False
        )
