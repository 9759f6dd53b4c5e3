"""Train the small MoE language model that ships with gguftool.

    python scripts/train_builtin.py --minutes 55 --out gguftool/builtin_data
    python scripts/train_builtin.py --minutes 55 --out gguftool/builtin_data --resume

The text is what every Python has: the standard library's sources (docstrings
taken out) are the code domain, its docstrings and pydoc's topics the prose
domain. Modules and topics named in HELD_OUT_* are never trained on; the
evaluation texts are cut from them alone. Seeds are fixed, so the corpus, the
tokenizer and the order of the windows follow from the Python version; how far
the training comes in its minutes depends on the machine.

Every worker is a process of one thread that takes its share of each batch and
of the optimizer's work; on a busy machine threads that wait for each other at
every operation cost many times more.

The model is a transformers Qwen3MoeForCausalLM. It is stored as int8 values
with one float16 scale per row, and those are the model: gguftool.builtin
defines every weight as bfloat16(value * scale).

Needs torch, transformers, tokenizers, safetensors and numpy, and a Python that
carries its standard library as source. The work directory keeps the state for
--resume; every --publish minutes the model as it stands is written to --out.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import os
import platform
import re
import sys
import sysconfig
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pydoc_data.topics import topics as PYDOC_TOPICS
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

SEED = 20240229
VOCAB = 1536
EOS = "<|endoftext|>"
EOS_ID = 0
WINDOW = 512
PROSE_SHARE = 0.38
BATCH_WINDOWS = 8
MICRO_WINDOWS = 4
MATRIX_LR = 6e-3
OTHER_LR = 3e-3
WEIGHT_DECAY = 0.1
WARMUP = 0.03
FINAL_LR = 0.02
TOP_K = 4
CALIB_BYTES = 100_000
EVAL_BYTES = 80_000

# qwen2's pre-tokenizer, as llama.cpp knows it by the name "qwen2".
PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Neither the source nor the docstrings of these are ever trained on.
HELD_OUT_CODE = (
    "configparser", "csv", "fractions", "ftplib", "graphlib", "heapq",
    "plistlib", "queue", "sched", "shlex", "tempfile", "textwrap", "zipapp",
)  # fmt: skip
HELD_OUT_PROSE = ("calendar", "difflib", "mailbox", "optparse", "statistics", "contextlib", "shutil", "pickletools")
HELD_OUT_TOPICS = (
    "assert", "bltin-null-object", "class", "comparisons", "compound", "context-managers",
    "debugger", "del", "exceptions", "for", "formatstrings", "function", "global", "import",
    "integers", "lambda", "lists", "numbers", "pass", "raise", "return", "shifting", "slicings",
    "string-methods", "strings", "try", "typesmapping", "while", "with", "yield",
)  # fmt: skip

SKIPPED_PARTS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "_bundled"}
)


# --- the text ---------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Documents of both domains, the trained ones apart from the held out."""

    code: dict[str, str]
    prose: dict[str, str]
    held_code: dict[str, str]
    held_prose: dict[str, str]


def gather() -> Corpus:
    """Read the running Python's standard library; the same Python gives the same corpus."""
    corpus = Corpus({}, {}, {}, {})
    for name, source in _library_sources():
        code, docs = split_docstrings(source)
        if _is_named(name, HELD_OUT_CODE):
            corpus.held_code[name] = code
        elif _is_named(name, HELD_OUT_PROSE):
            corpus.held_prose[name] = docs
        else:
            if not _mostly_numbers(code):
                corpus.code[name] = code
            if len(docs) > 200:
                corpus.prose[name] = docs
    for topic, text in sorted(PYDOC_TOPICS.items()):
        held = topic in HELD_OUT_TOPICS
        (corpus.held_prose if held else corpus.prose)["topic:" + topic] = clean(text)
    _drop_shared_paragraphs(corpus)
    return corpus


def _library_sources() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_PARTS & set(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        try:
            text = clean(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
        yield relative.with_suffix("").as_posix(), text


def _is_named(module: str, names: tuple[str, ...]) -> bool:
    return any(part.removeprefix("_") in names for part in module.split("/"))


def clean(text: str) -> str:
    """NFC text with plain newlines and no control or private characters."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").expandtabs(8))
    kept = (c for c in text if c == "\n" or unicodedata.category(c)[0] != "C")
    return re.sub(r"[ ]+\n", "\n", "".join(kept)).strip("\n") + "\n"


def _mostly_numbers(code: str) -> bool:
    return sum(c.isdigit() for c in code) > 0.15 * max(len(code), 1)


def split_docstrings(source: str) -> tuple[str, str]:
    """Source without its docstrings, and the docstrings as text."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return source, ""
    lines = source.split("\n")
    docs: list[str] = []
    found = [node for node in ast.walk(tree) if _docstring(node)]
    for node in sorted(found, key=lambda n: n.body[0].lineno, reverse=True):  # type: ignore[attr-defined]
        body = node.body  # type: ignore[attr-defined]
        text = ast.get_docstring(node)  # type: ignore[arg-type]
        if text:
            docs.append(_titled(node, text))
        stand_in = [" " * body[0].col_offset + "pass"] if len(body) == 1 else []
        if len(body) > 1 and body[1].lineno <= body[0].end_lineno:
            continue  # "doc"; statement on one line
        if lines[body[0].lineno - 1][: body[0].col_offset].strip():
            continue  # def f(): "doc"
        lines[body[0].lineno - 1 : body[0].end_lineno] = stand_in
    return clean("\n".join(lines)), clean("\n\n".join(reversed(docs)))


def _docstring(node: ast.AST) -> bool:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None


def _titled(node: ast.AST, text: str) -> str:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        names = ", ".join(a.arg for a in node.args.posonlyargs + node.args.args)
        return f"{node.name}({names})\n\n{text}"
    return f"class {node.name}\n\n{text}" if isinstance(node, ast.ClassDef) else text


def _drop_shared_paragraphs(corpus: Corpus) -> None:
    """Topics quote each other: take out of the trained prose what the held-out prose says."""
    held = {p.strip() for text in corpus.held_prose.values() for p in text.split("\n\n")}
    held = {p for p in held if len(p) > 40}
    for name, text in corpus.prose.items():
        corpus.prose[name] = "\n\n".join(p for p in text.split("\n\n") if p.strip() not in held)


def excerpt(documents: dict[str, str], size: int) -> str:
    """About `size` bytes: every document gives the same share from its start, whole lines."""
    names = sorted(documents)
    share = size
    while sum(min(len(documents[n]), share) for n in names) > size:
        share = int(share * 0.95)
    return "\n".join(documents[n][:share].rsplit("\n", 1)[0] + "\n" for n in names)


def shipped_texts(corpus: Corpus) -> dict[str, str]:
    """The four data files; both kinds of prose are given half of theirs."""
    code_names = sorted(corpus.code)[3::12]
    trained_code = {n: corpus.code[n] for n in code_names if len(corpus.code[n]) > 2000}
    texts = {
        "calib_code.txt": excerpt(trained_code, CALIB_BYTES),
        "eval_code.txt": excerpt(corpus.held_code, EVAL_BYTES),
    }
    for file, documents, size, step in (
        ("calib_prose.txt", corpus.prose, CALIB_BYTES, 2),
        ("eval_prose.txt", corpus.held_prose, EVAL_BYTES, 1),
    ):
        topics = sorted(n for n in documents if n.startswith("topic:"))[::step]
        modules = sorted(n for n in documents if not n.startswith("topic:"))[::step]
        halves = [excerpt({n: documents[n] for n in names}, size // 2) for names in (topics, modules)]
        texts[file] = "\n".join(halves)
    return texts


# --- the tokenizer ----------------------------------------------------------


def train_tokenizer(corpus: Corpus) -> Tokenizer:
    """A byte-level BPE of VOCAB tokens with qwen2's pre-tokenizer; EOS is token EOS_ID."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*corpus.code.values(), *corpus.prose.values()], trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: dict[str, str]) -> np.ndarray:
    """Documents in an order fixed by SEED, EOS after each, as one int32 row."""
    names = sorted(documents)
    np.random.default_rng(SEED).shuffle(names)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch([documents[n] for n in names]):
        ids += [*encoding.ids, EOS_ID]
    return np.array(ids, dtype=np.int32)


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """tokenizer.json without indentation, and the configuration that names its class."""
    data = json.loads(tokenizer.to_str())
    (directory / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False, separators=(",", ":")) + "\n")
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "errors": "replace",
        "model_max_length": 1024,
        "pad_token": EOS,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


# --- the model --------------------------------------------------------------


def make_config() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        num_experts=16,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        router_aux_loss_coef=0.005,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=None,
        architectures=["Qwen3MoeForCausalLM"],
        dtype="float32",
    )


class _GroupedExperts(torch.autograd.Function):
    """The experts' sum with its own gradient: each expert's tokens stay in the cache, no copy of all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, index: Tensor) -> Tensor:
        top_k = index.shape[1]
        order = index.reshape(-1).argsort(stable=True)
        counts = torch.bincount(index.reshape(-1), minlength=gate_up.shape[0]).tolist()
        groups = order.split(counts)
        out = torch.zeros_like(x)
        flat = weights.reshape(-1)
        projected: list[Tensor] = []
        for expert, group in enumerate(groups):
            token = group // top_k
            both = x[token] @ gate_up[expert].T
            gate, up = both.chunk(2, dim=-1)
            hidden = F.silu(gate).mul_(up).mul_(flat[group, None])
            out.index_add_(0, token, hidden @ down[expert].T)
            projected.append(both)
        ctx.save_for_backward(x, flat, gate_up, down)
        ctx.groups, ctx.projected, ctx.top_k = groups, projected, top_k
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        (grad,) = grads
        x, flat, gate_up, down = ctx.saved_tensors
        dx, dflat = torch.zeros_like(x), torch.zeros_like(flat)
        dgate_up, ddown = torch.zeros_like(gate_up), torch.zeros_like(down)
        for expert, (group, both) in enumerate(zip(ctx.groups, ctx.projected, strict=True)):
            token, weight = group // ctx.top_k, flat[group, None]
            gate, up = both.chunk(2, dim=-1)
            sigmoid = gate.sigmoid()
            silu = gate * sigmoid
            dy = grad[token]
            dhidden = dy @ down[expert]
            hidden = silu * up
            dflat[group] = (dhidden * hidden).sum(-1)
            dhidden *= weight
            torch.mm(dy.T, hidden.mul_(weight), out=ddown[expert])
            dgate = (dhidden * up).mul_(sigmoid + silu - silu * sigmoid)
            dboth = torch.cat([dgate, dhidden.mul_(silu)], dim=-1)
            torch.mm(dboth.T, x[token], out=dgate_up[expert])
            dx.index_add_(0, token, dboth @ gate_up[expert])
        return dx, dflat.view(-1, ctx.top_k), dgate_up, ddown, None


def _grouped_experts(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return _GroupedExperts.apply(x, weights, module.gate_up_proj, module.down_proj, index)


def make_model() -> Qwen3MoeForCausalLM:
    ALL_EXPERTS_FUNCTIONS.register("grouped_in_cache", _grouped_experts)
    torch.manual_seed(SEED)
    config = make_config()
    config._experts_implementation = "grouped_in_cache"
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj")):
                parameter /= math.sqrt(2 * config.num_hidden_layers)
    return model


# --- the training -----------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, https://kellerjordan.github.io/posts/muon/.

    Takes matrices and stacks of matrices. Updates are scaled to the size AdamW's
    have (0.2 * sqrt(longer side), https://arxiv.org/abs/2502.16982).
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalise(parameter.grad.lerp(buffer, group["momentum"]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape[-2:])))


def orthogonalise(matrices: Tensor) -> Tensor:
    """Newton-Schulz towards the nearest (semi-)orthogonal matrix, over the last two axes."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


@dataclass(frozen=True)
class Team:
    """The workers; each updates the matrices of its own layers and hands them to the others."""

    rank: int = 0
    size: int = 1

    def average(self, tensors: list[Tensor]) -> None:
        if self.size > 1:
            flat = torch.cat([t.flatten() for t in tensors])
            dist.all_reduce(flat)
            _unflatten(flat.div_(self.size), tensors)

    def hand_out(self, shares: list[list[nn.Parameter]]) -> None:
        if self.size > 1:
            for rank, share in enumerate(shares):
                tensors = [p.detach() for p in share]
                flat = torch.cat([t.flatten() for t in tensors])
                dist.broadcast(flat, rank)
                _unflatten(flat, tensors)

    def agree(self, value: float) -> float:
        """The first worker's value, for all."""
        tensor = torch.tensor([value], dtype=torch.float64)
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return float(tensor.item())


def _unflatten(flat: Tensor, tensors: list[Tensor]) -> None:
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def split_parameters(model: nn.Module, size: int) -> tuple[list[list[nn.Parameter]], list[nn.Parameter]]:
    """The matrices, dealt out by layer, and the embedding, routers and norms, which every worker updates alike."""
    shares: list[list[nn.Parameter]] = [[] for _ in range(size)]
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        layer = re.search(r"layers\.(\d+)\.", name)
        if layer and parameter.ndim > 1 and "mlp.gate." not in name:
            shares[int(layer[1]) % size].append(parameter)
        else:
            others.append(parameter)
    return shares, others


def make_optimizers(
    shares: list[list[nn.Parameter]], others: list[nn.Parameter], team: Team
) -> list[torch.optim.Optimizer]:
    adam = torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [Muon(shares[team.rank], MATRIX_LR, WEIGHT_DECAY), adam]


def learning_rate(progress: float) -> float:
    """Share of the peak: linear warm-up, then a cosine down to FINAL_LR."""
    if progress < WARMUP:
        return (progress + 1e-3) / WARMUP
    done = min((progress - WARMUP) / (1 - WARMUP), 1.0)
    return FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass
class Progress:
    """What --resume needs beside the tensors, and the log that is published."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    log: list[dict[str, float]] = field(default_factory=list)


def windows_for(step: int, code: np.ndarray, prose: np.ndarray) -> Tensor:
    """The step's windows: a function of the step alone, so that a resumed run sees the same."""
    rng = np.random.default_rng((SEED, step))
    rows = []
    for _ in range(BATCH_WINDOWS):
        ids = prose if rng.random() < PROSE_SHARE else code
        start = int(rng.integers(0, len(ids) - WINDOW))
        rows.append(ids[start : start + WINDOW])
    return torch.from_numpy(np.stack(rows)).long()


def imbalance(router_logits: Tensor) -> Tensor:
    """One layer's auxiliary loss, https://arxiv.org/abs/2101.03961; TOP_K where all experts are used alike.

    transformers takes it over all layers together, which lets an expert die in one layer and be busy in another.
    """
    probabilities = router_logits.softmax(-1)
    chosen = probabilities.topk(TOP_K, dim=-1).indices.flatten()
    used = torch.bincount(chosen, minlength=probabilities.shape[-1]) / len(probabilities)
    return probabilities.shape[-1] * (used * probabilities.mean(0)).sum()


def compute_gradients(model: Qwen3MoeForCausalLM, windows: Tensor) -> float:
    """Adds to the gradients; returns the cross-entropy without the router's auxiliary loss."""
    model.train()
    total = 0.0
    parts = windows.split(MICRO_WINDOWS)
    for part in parts:
        out = model(input_ids=part, output_router_logits=True, use_cache=False)
        loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), part[:, 1:].flatten())
        balance = model.router_aux_loss_coef * sum(imbalance(logits) for logits in out.router_logits)
        ((loss + balance) / len(parts)).backward()
        total += loss.item() / len(parts)
    return total


@torch.no_grad()
def held_out_loss(model: Qwen3MoeForCausalLM, ids: np.ndarray, windows: int) -> float:
    """Mean cross-entropy in nats per token over evenly spread windows."""
    model.eval()
    starts = np.linspace(0, len(ids) - WINDOW, windows).astype(int)
    losses = []
    for chunk in np.array_split(starts, max(windows // MICRO_WINDOWS, 1)):
        batch = torch.from_numpy(np.stack([ids[s : s + WINDOW] for s in chunk])).long()
        logits = model(input_ids=batch, use_cache=False).logits
        losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).item() * len(chunk))
    return sum(losses) / windows


# --- storing ----------------------------------------------------------------


def quantise(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """int8 values and float16 scales per row for matrices; vectors in float32 as they are."""
    stored: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "lm_head.weight":
            continue  # tied
        if tensor.ndim == 1:
            stored[name] = tensor.float().contiguous()
            continue
        scale = (tensor.abs().amax(-1) / 127).clamp_min(2.0**-14).half()
        values = (tensor / scale.float()[..., None]).round().clamp(-127, 127)
        stored[name] = values.to(torch.int8)
        stored[name + ".scale"] = scale
    return stored


def restore(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model that the stored values define: bfloat16(value * scale), as float32."""
    state = {}
    for name, tensor in stored.items():
        if name.endswith(".scale"):
            continue
        scale = stored.get(name + ".scale")
        exact = tensor.float() if scale is None else tensor.float() * scale.float()[..., None]
        state[name] = exact.bfloat16().float()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


@torch.no_grad()
def expert_shares(model: Qwen3MoeForCausalLM, ids: np.ndarray, windows: int = 16) -> list[list[float]]:
    """Per layer, the share of the routed slots that each expert takes."""
    starts = np.linspace(0, len(ids) - WINDOW, windows).astype(int)
    counts = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    for start in starts:
        batch = torch.from_numpy(ids[None, start : start + WINDOW]).long()
        routers = model(input_ids=batch, output_router_logits=True, use_cache=False).router_logits
        for layer, logits in enumerate(routers):
            counts[layer] += torch.bincount(logits.topk(TOP_K, dim=-1).indices.flatten(), minlength=counts.shape[1])
    return [[round(share, 4) for share in row.tolist()] for row in counts / counts.sum(-1, keepdim=True)]


@dataclass(frozen=True)
class Data:
    """Everything that follows from the Python version alone."""

    tokenizer: Tokenizer
    texts: dict[str, str]
    code: np.ndarray
    prose: np.ndarray
    held_code: np.ndarray
    held_prose: np.ndarray


def prepare() -> Data:
    corpus = gather()
    tokenizer = train_tokenizer(corpus)
    texts = shipped_texts(corpus)
    held = {name: encode(tokenizer, {name: texts[name]}) for name in ("eval_code.txt", "eval_prose.txt")}
    return Data(
        tokenizer,
        texts,
        encode(tokenizer, corpus.code),
        encode(tokenizer, corpus.prose),
        held["eval_code.txt"],
        held["eval_prose.txt"],
    )


def publish(out: Path, model: Qwen3MoeForCausalLM, data: Data, progress: Progress, windows: int = 0) -> dict[str, Any]:
    """Write everything that ships; returns what training.json says. Losses over `windows`, or all of the text."""
    out.mkdir(parents=True, exist_ok=True)
    stored = quantise({k: v.detach() for k, v in model.state_dict().items()})
    rounded = make_model()
    rounded.load_state_dict(restore(stored))
    report = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": progress.step,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 1),
        "window": WINDOW,
        "batch_windows": BATCH_WINDOWS,
        "corpus_tokens": {"code": len(data.code), "prose": len(data.prose)},
        "held_out_tokens": {"code": len(data.held_code), "prose": len(data.held_prose)},
        "held_out_loss": losses(model, data, windows),
        "held_out_loss_int8": losses(rounded, data, windows),
        "expert_share": {
            "code": expert_shares(rounded, data.held_code),
            "prose": expert_shares(rounded, data.held_prose),
        },
        "log": progress.log,
    }
    files = out / "model.int8.safetensors"
    _replace(files, lambda path: save_file(stored, path))
    _write_config(out)
    write_tokenizer(data.tokenizer, out)
    for name, text in data.texts.items():
        (out / name).write_text(text, encoding="utf-8")
    (out / "LICENSE-texts.md").write_text(LICENSE_NOTE, encoding="utf-8")
    (out / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


LICENSE_NOTE = (
    "The texts in this directory (calib_*.txt, eval_*.txt) are excerpts of CPython's standard library and\n"
    "documentation, Copyright (c) 2001 Python Software Foundation; All Rights Reserved, used under the Python\n"
    "Software Foundation License Version 2 (PSF-2.0, https://docs.python.org/3/license.html). Docstrings were\n"
    "separated from code and white space was normalised. The model was trained on text of the same source.\n"
)


def losses(model: Qwen3MoeForCausalLM, data: Data, windows: int = 0) -> dict[str, float]:
    """Held-out losses of both domains, over all of the evaluation text unless told."""
    return {
        domain: round(held_out_loss(model, ids, windows or len(ids) // WINDOW), 5)
        for domain, ids in (("code", data.held_code), ("prose", data.held_prose))
    }


def _write_config(out: Path) -> None:
    config = json.loads(make_config().to_json_string(use_diff=True))
    config["dtype"] = "bfloat16"
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    generation = {"_from_model_config": True, "eos_token_id": EOS_ID, "transformers_version": transformers.__version__}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def _replace(path: Path, write: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    write(partial)
    partial.chmod(0o644)
    os.replace(partial, path)


# --- the run ----------------------------------------------------------------


def save_state(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], progress: Progress) -> None:
    state = {
        "model": model.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
        "progress": asdict(progress),
    }
    _replace(path, lambda partial: torch.save(state, partial))


def load_state(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Progress:
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return Progress(**state["progress"])


def run_worker(rank: int, args: argparse.Namespace, data: Data) -> None:
    torch.set_num_threads(1)
    team = Team(rank, args.workers)
    if team.size > 1:
        dist.init_process_group("gloo", f"file://{args.work.resolve()}/meeting", rank=rank, world_size=team.size)
    train(args, data, team)
    if team.size > 1:
        dist.destroy_process_group()


def train(args: argparse.Namespace, data: Data, team: Team) -> None:
    """Every worker runs this in step; the first also logs and publishes."""
    model = make_model()
    shares, others = split_parameters(model, team.size)
    optimizers = make_optimizers(shares, others, team)
    state = args.work / f"state-{team.rank}-of-{team.size}.pt"
    progress = load_state(state, model, optimizers) if args.resume else Progress()
    before = progress.seconds
    began = saved = time.monotonic()
    next_publish = progress.seconds + args.publish * 60
    recent: list[float] = []
    while progress.seconds < args.minutes * 60:
        rate = learning_rate(progress.seconds / (args.minutes * 60))
        for optimizer, peak in zip(optimizers, (MATRIX_LR, OTHER_LR), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
        windows = windows_for(progress.step, data.code, data.prose)
        recent.append(compute_gradients(model, windows[team.rank :: team.size]))
        team.average([p.grad for p in model.parameters() if p.grad is not None])
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        team.hand_out(shares)
        progress.step += 1
        progress.tokens += BATCH_WINDOWS * WINDOW
        progress.seconds = team.agree(before + time.monotonic() - began)
        if progress.step % args.log_every == 0 and team.rank == 0:
            log(progress, recent, model, data)
            recent.clear()
        if team.agree(time.monotonic() - saved) > 120:
            save_state(state, model, optimizers, progress)
            saved = time.monotonic()
        if progress.seconds > next_publish:
            next_publish += args.publish * 60
            if team.rank == 0:
                publish(args.out, model, data, progress, 12)
    save_state(state, model, optimizers, progress)
    if team.rank == 0:
        report = publish(args.out, model, data, progress)
        say(json.dumps({k: v for k, v in report.items() if k != "log"}))


def run(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "meeting").unlink(missing_ok=True)
    data = prepare()
    digest = hashlib.sha256(data.code.tobytes() + data.prose.tobytes()).hexdigest()[:16]
    say(f"corpus {digest}: {len(data.code)} code and {len(data.prose)} prose tokens")
    if args.workers == 1:
        run_worker(0, args, data)
    else:
        torch.multiprocessing.spawn(run_worker, (args, data), nprocs=args.workers)


def log(progress: Progress, recent: list[float], model: Qwen3MoeForCausalLM, data: Data) -> None:
    held = losses(model, data, 8)
    entry = {
        "step": progress.step,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 1),
        "loss": round(sum(recent) / len(recent), 4),
        "held_out_code": held["code"],
        "held_out_prose": held["prose"],
    }
    progress.log.append(entry)
    say(json.dumps(entry))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the model that ships with gguftool.")
    parser.add_argument("--out", type=Path, required=True, help="directory to publish to")
    parser.add_argument("--work", type=Path, default=Path("out/train_builtin"), help="directory of the state")
    parser.add_argument("--minutes", type=float, default=55, help="wall time of the training")
    parser.add_argument("--publish", type=float, default=10, help="minutes between interim models")
    parser.add_argument("--log-every", type=int, default=25, help="steps between lines of the log")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --work")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
