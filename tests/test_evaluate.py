"""Perplexity and KL divergence: the statistics by hand, the protocol against llama-perplexity."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguftool.checkpoint import open_checkpoint
from gguftool.divergence import (
    DivergenceSum,
    KlStatistics,
    divergence,
    ln_ratio,
    mean,
    perplexity,
    root_mean_square,
    score,
    share,
)
from gguftool.errors import GgufToolError
from gguftool.evaluate import _groups, compare, compare_many, measure
from gguftool.perplexity import LoadedModel, open_session
from gguftool.planner import make_plan
from gguftool.recipe import Recipe
from gguftool.stats import CalibrationStats
from gguftool.writer import prune

# --- statistics ---------------------------------------------------------------------------------------------------


def logits_of(*rows: tuple[float, ...]) -> np.ndarray:
    """Logits whose softmax is the given probabilities, moved by a constant that must not matter."""
    return (np.log(np.array(rows)) + 7).astype(np.float32)


def test_scores_by_hand() -> None:
    got = score(logits_of((0.25, 0.75), (0.5, 0.5)), np.array([0, 1], dtype=np.int32))
    np.testing.assert_allclose(got.nll, [np.log(4), np.log(2)], atol=1e-6)
    np.testing.assert_allclose(got.log_z, [7, 7], atol=1e-6)
    assert got.top.tolist() == [1, 0]  # of two equals, the first


def test_divergence_by_hand() -> None:
    base, other = logits_of((0.5, 0.5), (0.25, 0.75)), logits_of((0.25, 0.75), (0.25, 0.75))
    targets = np.array([0, 1], dtype=np.int32)
    got = divergence(base, score(base, targets), other, score(other, targets))
    # 1/2 ln((1/2)/(1/4)) + 1/2 ln((1/2)/(3/4)) = ln 2 - 1/2 ln 3
    np.testing.assert_allclose(got, [np.log(2) - 0.5 * np.log(3), 0], atol=1e-6)
    same = divergence(base, score(base, targets), base, score(base, targets))
    assert same.tolist() == [0, 0]


def test_large_vocabularies_are_cut_into_pieces_without_a_seam() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0, 3, (7, 200_003)).astype(np.float32)
    other = base + rng.normal(0, 0.1, base.shape).astype(np.float32)
    targets = rng.integers(0, base.shape[1], 7).astype(np.int32)

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

    p, q = log_softmax(base), log_softmax(other)
    scores = score(base, targets), score(other, targets)
    np.testing.assert_allclose(scores[0].nll, -p[np.arange(7), targets], rtol=1e-12)
    np.testing.assert_allclose(divergence(base, scores[0], other, scores[1]), (np.exp(p) * (p - q)).sum(1), rtol=1e-9)


def test_estimates_by_hand() -> None:
    values = np.array([1.0, 2.0, 3.0, 6.0])
    # mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5, error sqrt(3.5 / 3)
    assert mean(values) == pytest.approx((3.0, np.sqrt(3.5 / 3)))
    assert mean(values[:1]) == (1.0, 0.0)
    assert perplexity(values) == pytest.approx((np.exp(3), np.exp(3) * np.sqrt(3.5 / 3)))
    assert share(np.array([True, True, True, False])) == pytest.approx((0.75, np.sqrt(0.75 * 0.25 / 3)))
    squares = mean(values**2)
    assert root_mean_square(values) == pytest.approx((np.sqrt(12.5), 0.5 / np.sqrt(12.5) * squares.error))
    assert root_mean_square(np.zeros(3)) == (0.0, 0.0)


def test_the_error_of_the_ratio_counts_the_covariance() -> None:
    rng = np.random.default_rng(0)
    base = rng.exponential(2, 500)
    other = base + rng.normal(0.1, 0.05, 500)
    a, b, n = mean(other), mean(base), 500
    covariance = ((other * base).mean() - other.mean() * base.mean()) / (n - 1)
    expected = np.sqrt(a.error**2 + b.error**2 - 2 * covariance)
    assert ln_ratio(other, base) == pytest.approx((a.value - b.value, expected))
    assert ln_ratio(other, base).error < a.error / 10


def test_quantiles_by_hand() -> None:
    got = KlStatistics.of(np.arange(101.0))
    assert (got.median, got.p90, got.p95, got.p99, got.max) == (50, 90, 95, 99, 100)
    assert got.p999 == pytest.approx(99.9)


def test_windows_add_up() -> None:
    rng = np.random.default_rng(0)
    base, other = rng.normal(size=(2, 20, 50)).astype(np.float32)
    targets = rng.integers(0, 50, 20).astype(np.int32)
    whole, parts = DivergenceSum(), DivergenceSum()
    whole.add(base, score(base, targets), other, score(other, targets))
    for rows in (slice(0, 7), slice(7, 20)):
        parts.add(base[rows], score(base[rows], targets[rows]), other[rows], score(other[rows], targets[rows]))
    assert whole.result() == parts.result()
    assert whole.result().tokens == 20


def test_texts_are_pooled_exactly() -> None:
    rng = np.random.default_rng(1)
    base, other = rng.normal(size=(2, 30, 40)).astype(np.float32)
    targets = rng.integers(0, 40, 30).astype(np.int32)
    whole, texts = DivergenceSum(), [DivergenceSum(), DivergenceSum()]
    for total, rows in ((texts[0], slice(0, 10)), (texts[0], slice(10, 12)), (texts[1], slice(12, 30))):
        scores = score(base[rows], targets[rows]), score(other[rows], targets[rows])
        for sums in (total, whole):
            sums.add(base[rows], scores[0], other[rows], scores[1])
    before = texts[0].result()
    assert DivergenceSum.pooled(texts).result() == whole.result()
    assert texts[0].result() == before and before.tokens == 12


# --- against llama-perplexity -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized(base_gguf: Path, runtime: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base in two encodings, so that there is something to measure."""
    folder = tmp_path_factory.mktemp("quantized")
    out = {}
    for target in ("Q4_0", "Q2_K"):
        out[target] = folder / f"{target}.gguf"
        command = [str(runtime.tool("llama-quantize")), str(base_gguf), str(out[target]), target]
        subprocess.run(command, capture_output=True, check=True)
    return out


@pytest.fixture(scope="module")
def tiered(base_gguf: Path, stats: CalibrationStats, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with experts of different widths, which only the patched runtime runs."""
    out = tmp_path_factory.mktemp("tiered") / "tiered.gguf"
    plan = make_plan(stats, Recipe("global", 0.4))
    assert not plan.uniform
    prune(base_gguf, plan, out)
    return out


WINDOWS = 6


def llama_perplexity(runtime: Any, model: Path, text: Path, *options: str, last: str = "Final estimate") -> str:
    """What llama-perplexity prints. It may exit before its logger has written the end, so it gets a few tries."""
    command = [str(runtime.tool("llama-perplexity")), "-m", str(model), "-f", str(text), "--chunks", str(WINDOWS)]
    output = ""
    for _ in range(5):
        run = subprocess.run([*command, "-ngl", "0", *options], capture_output=True, text=True, check=True)
        output = run.stdout + run.stderr
        if last in output:
            return output
    raise AssertionError(f"{last} not in {output[-3000:]}")


def printed(output: str, name: str) -> tuple[float, float]:
    """A number and its error, as llama-perplexity prints them."""
    match = re.search(re.escape(name) + r"\s*[:=]\s*(-?[\d.]+)\s*(?:±|\+/-)\s*([\d.]+)", output)
    assert match, f"{name} not in {output[-3000:]}"
    return float(match[1]), float(match[2])


def test_perplexity_equals_llama_perplexity(llama: Any, runtime: Any, base_gguf: Path, eval_text: Path) -> None:
    theirs = printed(llama_perplexity(runtime, base_gguf, eval_text), "PPL")
    text = eval_text.read_text(encoding="utf-8")
    ours = measure(base_gguf, text, llama=llama, max_windows=WINDOWS)
    assert ours.ppl == pytest.approx(theirs, rel=1e-3)
    assert (ours.protocol.windows, ours.protocol.tokens) == (WINDOWS, WINDOWS * 255)


@pytest.mark.parametrize("target", ["Q4_0", "Q2_K"])
def test_divergence_equals_llama_perplexity(
    target: str, llama: Any, runtime: Any, base_gguf: Path, eval_text: Path, quantized: dict[str, Path], tmp_path: Path
) -> None:
    logits = ("--kl-divergence-base", str(tmp_path / "logits"))
    llama_perplexity(runtime, base_gguf, eval_text, *logits)
    theirs = llama_perplexity(runtime, quantized[target], eval_text, *logits, "--kl-divergence", last="Same top p:")
    text = eval_text.read_text(encoding="utf-8")
    ours = compare(base_gguf, quantized[target], text, llama=llama, max_windows=WINDOWS).divergence
    assert ours.ppl == pytest.approx(printed(theirs, "Mean PPL(Q)"), rel=1e-3)
    assert ours.base_ppl == pytest.approx(printed(theirs, "Mean PPL(base)"), rel=1e-3)
    assert ours.ln_ppl_ratio == pytest.approx(printed(theirs, "Mean ln(PPL(Q)/PPL(base))"), abs=1e-4)
    mean_kld, err = printed(theirs, "Mean    KLD")
    assert ours.kld.mean == pytest.approx(mean_kld, rel=0.01)
    assert ours.kld.err == pytest.approx(err, rel=0.05, abs=2e-6)
    for name, value in (("Maximum", ours.kld.max), ("99.0%  ", ours.kld.p99), ("Median ", ours.kld.median)):
        match = re.search(re.escape(name) + r" KLD:\s*([\d.]+)", theirs)
        assert match and value == pytest.approx(float(match[1]), rel=0.02, abs=2e-5), name
    # Their 16-bit log-probabilities tie where two tokens are nearly equal: a few positions may differ.
    same_top = printed(theirs, "Same top p")
    assert 100 * ours.same_top.value == pytest.approx(same_top[0], abs=0.5)
    assert 100 * ours.rms_dp.value == pytest.approx(printed(theirs, "RMS Δp")[0], abs=0.005)


def test_a_tiered_file_is_measured_as_llama_perplexity_does(
    llama: Any, runtime: Any, base_gguf: Path, tiered: Path, eval_text: Path, tmp_path: Path
) -> None:
    logits = ("--kl-divergence-base", str(tmp_path / "logits"))
    llama_perplexity(runtime, base_gguf, eval_text, *logits)
    theirs = llama_perplexity(runtime, tiered, eval_text, *logits, "--kl-divergence", last="Same top p:")
    text = eval_text.read_text(encoding="utf-8")
    ours = compare(base_gguf, tiered, text, llama=llama, max_windows=WINDOWS).divergence
    assert ours.ppl.value == pytest.approx(printed(theirs, "Mean PPL(Q)")[0], rel=1e-3)
    assert ours.kld.mean == pytest.approx(printed(theirs, "Mean    KLD")[0], rel=0.01) and ours.kld.mean > 0.01


def with_entries(base: Path, out: Path, changed: dict[str, Any]) -> Path:
    """A copy of a GGUF with other metadata."""
    gguf = pytest.importorskip("gguf")
    from gguftool.gguf_file import GgufFile, KeyValue, write_gguf

    kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, list: gguf.GGUFValueType.ARRAY}
    file = GgufFile(base)
    entries = {key: file.entry(key) for key in file.keys()}
    for key, value in changed.items():
        sub_type = entries[key].sub_type if isinstance(value, list) else None
        entries[key] = KeyValue(value, kinds[type(value)], sub_type)
    write_gguf(out, file.arch, entries, file.tensors, file.raw)
    return out


def test_bos_stands_first_in_each_window(
    llama: Any, runtime: Any, base_gguf: Path, eval_text: Path, tmp_path: Path
) -> None:
    flags = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 5}
    model = with_entries(base_gguf, tmp_path / "bos.gguf", flags)
    text = eval_text.read_text(encoding="utf-8")
    ours = measure(model, text, llama=llama, max_windows=WINDOWS)
    assert ours.protocol.bos
    assert ours.ppl == pytest.approx(printed(llama_perplexity(runtime, model, eval_text), "PPL"), rel=1e-3)
    assert ours.ppl.value != measure(base_gguf, text, llama=llama, max_windows=WINDOWS).ppl.value


# --- the rest of the contract --------------------------------------------------------------------------------------


def test_many_at_once_equal_one_at_a_time(
    llama: Any, base_gguf: Path, eval_text: Path, quantized: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    text, files = eval_text.read_text(encoding="utf-8"), [*quantized.values(), base_gguf]
    seen: list[tuple[int, int, str]] = []
    together = compare_many(
        base_gguf, files, text, llama=llama, max_windows=2, threads=1, progress=lambda *now: seen.append(now)
    )
    grouped = compare_many(base_gguf, files, text, llama=llama, max_windows=2, threads=1, memory=0)
    alone = [compare(base_gguf, path, text, llama=llama, max_windows=2, threads=1) for path in files]
    assert together == grouped == alone
    assert [now[:2] for now in seen] == [(1, 2), (2, 2)]
    itself = together[-1].divergence
    assert (itself.kld.mean, itself.kld.max, itself.same_top.value, itself.ln_ppl_ratio.value) == (0, 0, 1, 0)
    assert capfd.readouterr() == ("", "")  # llama.cpp's log goes nowhere


def test_stable_keys(llama: Any, base_gguf: Path, eval_text: Path, quantized: dict[str, Path]) -> None:
    text = eval_text.read_text(encoding="utf-8")
    got = compare(base_gguf, quantized["Q4_0"], text, llama=llama, n_ctx=128, max_windows=1, backend="cpu").as_dict()
    assert json.loads(json.dumps(got)) == got
    for side, path in (("base", base_gguf), ("pruned", quantized["Q4_0"])):
        assert got[side]["bytes"] == path.stat().st_size and got[side]["ppl"] > 1 and got[side]["ppl_err"] > 0
    assert {"mean", "err", "median", "p90", "p95", "p99", "p999", "max", "histogram"} == set(got["kld"])
    assert {"ln_ppl_ratio", "ln_ppl_ratio_err", "same_top", "same_top_err", "rms_dp", "rms_dp_err"} <= set(got)
    assert (got["n_ctx"], got["windows"], got["tokens"]) == (128, 1, 63)
    assert len(got["text_sha256"]) == 64 and got["backend"] == "cpu"


def test_files_are_grouped_by_memory(tmp_path: Path) -> None:
    paths = [tmp_path / str(size) for size in (30, 50, 90, 10)]
    for path in paths:
        path.write_bytes(b"x" * int(path.name))
    assert _groups(paths, 100, overhead=0) == [paths[:2], paths[2:]]
    assert _groups(paths, 100, overhead=20) == [paths[:1], paths[1:2], paths[2:3], paths[3:]]
    assert _groups(paths, 0, overhead=0) == [[path] for path in paths]
    assert _groups([], 100, overhead=0) == []


def test_refusals(llama: Any, base_gguf: Path, eval_text: Path, tmp_path: Path) -> None:
    text = eval_text.read_text(encoding="utf-8")
    with pytest.raises(GgufToolError, match="tokens, less than one window of 512"):
        measure(base_gguf, text[:200], llama=llama)
    with pytest.raises(GgufToolError, match="no such file"):
        compare(base_gguf, tmp_path / "nothing.gguf", text, llama=llama)
    with pytest.raises(GgufToolError, match="leaves nothing to score"):
        measure(base_gguf, text, llama=llama, n_ctx=2)
    with pytest.raises(GgufToolError, match="0 windows"):
        measure(base_gguf, text, llama=llama, max_windows=0)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(base_gguf.read_bytes()[: base_gguf.stat().st_size // 2])
    with pytest.raises(GgufToolError, match="cannot load it: .*(not within|corrupted|bounds)"):
        measure(damaged, text, llama=llama)


def test_another_vocabulary_is_refused(llama: Any, base_gguf: Path, eval_text: Path, tmp_path: Path) -> None:
    from gguftool.gguf_file import GgufFile

    words = list(GgufFile(base_gguf).value("tokenizer.ggml.tokens"))
    words[-1] = "<another>"
    other = with_entries(base_gguf, tmp_path / "other.gguf", {"tokenizer.ggml.tokens": words})
    with pytest.raises(GgufToolError, match="other tokens"):
        compare(base_gguf, other, eval_text.read_text(encoding="utf-8"), llama=llama, max_windows=1)


def test_special_tokens_count_as_such_where_it_is_asked(
    llama, base_gguf: Path, checkpoint_dir: Path, eval_text: Path
) -> None:
    """Conversations: the tokens are those that the checkpoint's tokenizer sees in them; other texts spell them out."""
    tokenizer = open_checkpoint(checkpoint_dir).tokenizer()
    end = tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id)
    text = end.join(eval_text.read_text(encoding="utf-8")[:3000].split("\n\n"))
    wanted = tokenizer.encode(text, add_special_tokens=False)
    assert wanted.count(tokenizer.eos_token_id) > 2
    for special in (True, False):
        with open_session(llama, n_ctx=4, parse_special=special) as session, LoadedModel(session, base_gguf) as model:
            windows = model.windows(text)
            assert model.protocol(windows, text).parse_special is special
        found = windows.flatten().tolist()
        assert (found == wanted[: len(found)]) is special and (tokenizer.eos_token_id in found) is special
