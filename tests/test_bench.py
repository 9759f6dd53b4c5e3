"""The benchmark: its files run, its arithmetic is right, and a missed bar is called one. Nothing here is timed."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

from gguftool import bench, bench_calibrate
from gguftool.bench_calibrate import QUICK
from gguftool.errors import GgufToolError
from gguftool.gguf_file import GgufFile
from gguftool.inspection import check, inspect
from gguftool.random_model import SHAPES, active_bytes, pruned_widths, split_widths, write_random_model
from typed import typed


def tiny(name: str):
    """A shape with the tensors of `name`, a few experts and narrow ones."""
    return replace(SHAPES[name], n_expert=8, n_expert_used=2, n_ff_exp=96)


@pytest.mark.parametrize("name", SHAPES)
def test_the_files_run_and_split_is_stock(name, runtime, tmp_path):
    shape = tiny(name)
    paths = {"stock": None, "split": split_widths(shape), "pruned": pruned_widths(shape)}
    for kind, widths in paths.items():
        write_random_model(tmp_path / kind, shape, "Q8_0", 2, runtime.ggml, widths)
        faults = check(inspect(GgufFile(tmp_path / kind)))
        assert not faults
    logits = {}
    for kind in paths:
        with bench.working(runtime, tmp_path / kind, bench.Options(), routes=True) as worker:
            logits[kind] = np.array(worker.ask("logits", 5, seed=1)["logits"])
            chosen = np.array(worker.ask("routes", 7, seed=2)["chosen"])
        assert chosen.shape == (2, 8) and (chosen.sum(axis=1) == 7 * 2).all()
    assert np.isfinite(logits["stock"]).all() and logits["stock"].std() > 0
    assert np.array_equal(logits["split"], logits["stock"])
    assert not np.allclose(logits["pruned"], logits["stock"])


def test_the_real_sizes_are_those_of_the_models():
    """Parameters of one layer's routed experts, from the models' cards."""
    want = {
        "qwen3-30b-a3b": 128 * 3 * 2048 * 768, "gpt-oss-20b": 32 * 3 * 2880 * 2880,
        "deepseek-v2-lite": 64 * 3 * 2048 * 1408, "mixtral-8x7b": 8 * 3 * 4096 * 14336,
    }  # fmt: skip
    assert {name: s.n_expert * 3 * s.n_embd * s.n_ff_exp for name, s in SHAPES.items()} == want


@pytest.mark.parametrize("name", SHAPES)
def test_about_three_fifths_are_kept(name):
    shape = SHAPES[name]
    widths, tier = pruned_widths(shape)
    assert 0.57 < widths.sum() / (shape.n_expert * shape.n_ff_exp) < 0.63
    assert [len(set(widths[tier == t])) for t in range(3)] == [1, 1, 1]


def test_active_bytes_by_hand():
    shape = replace(SHAPES["qwen3-30b-a3b"], n_expert=2, n_expert_used=1, n_ff_exp=64)
    # F32: everything that is no expert, without the embedding, then the experts as often as they were chosen.
    fixed = 4 * (2048 + 2048 * 2048 + (2048 + 128 + 128 + 2048) + 2 * 2048 * 4096 + 2 * 2048 * 512 + 2 * 2048)
    expert = 4 * 3 * 2048 * 64
    assert active_bytes(shape, "F32", 1, np.array([[3.0, 1.0]])) == fixed + expert
    halved = active_bytes(shape, "F32", 1, np.array([[3.0, 1.0]]), np.array([64, 32]))
    assert halved == fixed + expert * (0.75 + 0.25 / 2)


def test_a_missed_bar_is_named():
    fine = {key: bench.Ratio(1.0, 0.0) for key in bench.BARS}
    result = bench.Result("m", "Q4_K", 1, {}, fine, 1.0, 1.0, 1.0, {}, True)
    assert result.missed() == []
    slow = replace(result, ratios=fine | {"split_prompt": bench.Ratio(0.949, 0.01)})
    assert slow.missed() == ["m Q4_K: split_prompt 0.9490 ± 0.0100, the bar is 0.97"]
    near = replace(result, ratios=fine | {"split_prompt": bench.Ratio(0.9699, 0.003)})
    assert near.missed() == ["m Q4_K: split_prompt 0.9699 ± 0.0030, the bar is 0.97"]
    noisy = replace(result, ratios=fine | {"split_prompt": bench.Ratio(0.969, 0.03)})
    assert "split_prompt 0.9690 ± 0.0300, the bar is 0.97, and noise hides it" in noisy.missed()[0]
    above = replace(result, ratios=fine | {"split_prompt": bench.Ratio(0.98, 0.03)})
    assert above.missed() == []
    fat = replace(result, ratios=fine | {"pruned_memory": bench.Ratio(1.03, 0.0)})
    assert fat.missed() == ["m Q4_K: pruned_memory 1.0300 ± 0.0000, the bar is 1.02"]
    assert len(replace(result, same_logits=False).missed()) == 1


def test_a_measurement_from_end_to_end(runtime, plain_runtime, tmp_path, monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "tiny", replace(tiny("qwen3-30b-a3b"), name="tiny"))
    monkeypatch.setattr(bench, "_WORK", {"generate": 2, "prompt": 16})
    monkeypatch.setattr(bench, "GENERATED_TOKENS", 2)
    result = bench.measure(
        "tiny", "Q8_0", tmp_path, runtime, plain_runtime, bench.Options(), starts=2, rounds=1, n_layer=1
    )
    assert result.same_logits and set(bench.BARS) <= set(result.ratios)
    assert all(ratio.value > 0 and ratio.error >= 0 for ratio in result.ratios.values())
    assert result.ratios["split_prompt"].error > 0
    assert 1 < result.active_bytes_ratio < 2
    assert not list(tmp_path.iterdir())


def starts_of(*seconds: float):
    """Starts in which split took so long and everything else a second."""
    names = {"stock": [1.0, 1.0], "pruned": [1.0]}
    return [
        bench._Start({n: dict.fromkeys(bench._WORK, s) for n, s in {**names, "split": [took, took]}.items()}, True)
        for took in seconds
    ]


def test_starts_go_on_while_noise_hides_a_bar():
    """By hand: of 1 ± 0.1 nothing can be said; of 0.9 ± 0.001 and of 1 ± 0.001 all."""
    assert not bench._settled(bench._ratios(starts_of(0.9, 1.1)))
    assert bench._settled(bench._ratios(starts_of(1.11, 1.112)))
    assert bench._settled(bench._ratios(starts_of(0.999, 1.001)))


def test_every_process_is_asked_for_the_same_tokens_and_the_first_round_does_not_count(monkeypatch):
    asked = []

    class Slow:
        """The first round takes no time, so that it would show."""

        def __init__(self, *_):
            self.rounds = {kind: 0 for kind in bench._WORK}

        def ask(self, *_, **__):
            return {"logits": [0.0]}

        def parts(self, kind, n, seed):
            asked.append((kind, n, seed))
            self.rounds[kind] += 1
            return [1.0, 2.0] if self.rounds[kind] > bench.TURNS[kind] else [0.0, 0.0]

    monkeypatch.setattr(bench, "working", lambda *args: nullcontext(Slow(*args)))
    start = bench._start([("stock", None, None), ("pruned", None, None)], bench.Options(), 3, seed=7)
    assert start.seconds == {
        "stock": {kind: [3.0, 3.0] for kind in bench._WORK},
        "pruned": {kind: [3.0] for kind in bench._WORK},
    }
    assert set(asked) == {(kind, n, 7) for kind, n in bench._WORK.items()} and len(asked) == (3 + 1) * 3 * 4


def test_what_counts_is_the_time_beside_the_others_in_the_same_round():
    """By hand: three processes, the last takes twice as long, while the machine gets slower and one round is disturbed."""
    round_, part = np.array([1.0, 1.0, 3.0]), np.array([1.0, 2.0])
    times = np.array([1.0, 1.0, 2.0])[:, None, None] * round_[:, None] * part
    np.testing.assert_allclose(bench._typical(times), [3.0, 3.0, 6.0])
    times[0, 1] *= 50
    np.testing.assert_allclose(bench._typical(times)[1:] / bench._typical(times)[0], [1.0, 2.0])


@pytest.mark.parametrize(("noise", "count"), [((1.0, 1.0), 2), ((0.9, 1.1), 4)])
def test_no_more_starts_than_needed(noise, count, runtime, tmp_path, monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "tiny", replace(tiny("qwen3-30b-a3b"), name="tiny"))
    monkeypatch.setattr(bench, "GENERATED_TOKENS", 2)
    made = starts_of(*noise, *noise)
    monkeypatch.setattr(bench, "_start", lambda *_: made.pop(0))
    result = bench.measure("tiny", "Q8_0", tmp_path, runtime, None, bench.Options(), starts=2, rounds=1, n_layer=1)
    assert result.starts == count


def test_a_ratio_by_hand():
    """Half and double speed are 1 in the mean; of log 2 and -log 2 the standard deviation is sqrt(2) log 2."""
    ratio = bench._ratio(np.array([0.5, 2.0]))
    assert ratio.value == pytest.approx(1.0) and ratio.error == pytest.approx(np.log(2))
    assert bench._ratio(np.array([1.25])) == bench.Ratio(pytest.approx(1.25), 0.0)


def test_what_cannot_be_measured_is_refused(runtime, tmp_path):
    with pytest.raises(GgufToolError, match="no model 'gpt5'; known are qwen3-30b-a3b"):
        bench.check_names(["gpt5"], ["Q8_0"])
    with pytest.raises(GgufToolError, match="no type 'Q9'"):
        bench.check_names(["mixtral-8x7b"], ["Q9"])
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    with (
        pytest.raises(GgufToolError, match="does not load"),
        bench.working(runtime, tmp_path / "no.gguf", bench.Options()),
    ):
        pass


def test_what_calibrate_cannot_be_measured_by_is_refused_before_anything_is_written(tmp_path):
    for wrong, said in (
        ({"layers": (0, 2)}, "two depths"),
        ({"observer_windows": 5}, "--observer-windows 5: they are taken from the timed ones, of which there are 4"),
        ({"memory": "much"}, "'much' is no size"),
    ):
        with pytest.raises(GgufToolError, match=said):
            bench_calibrate.measure("qwen3-30b-a3b", replace(QUICK, **wrong), tmp_path / "missing", quick=True)


def test_quick_leaves_what_is_given(monkeypatch):
    asked = []

    def measure(_model, options, _folder, **_):
        asked.append(options)
        raise GgufToolError("enough")

    monkeypatch.setattr(bench_calibrate, "measure", measure)
    typed("bench", "calibrate", "--quick", "--threads", 2, "--layers", "3,5", "--no-obs", code=1)
    typed("bench", "calibrate", "--quick", code=1)
    typed("bench", "calibrate", code=1)
    assert asked == [replace(QUICK, threads=2, layers=(3, 5), obs=False), QUICK, bench_calibrate.Options()]


@pytest.mark.parametrize(
    "arguments",
    [
        "bench runtime --starts 0", "bench runtime --rounds 0", "bench runtime --threads -1", "bench runtime --layers -1",
        "bench calibrate --batch 0", "bench calibrate --rounds 0", "bench calibrate --ctx 32769", "runtime build --jobs 0",
        "sensitivity b --stats s --data t -o o --windows 0", "sensitivity b --stats s --data t -o o --ctx 3",
        "validate b p --data t --windows -1", "plan s --ratio 0.4 -o p --seed -1", "calibrate m --data t -o o --windows 0",
    ],
)  # fmt: skip
def test_numbers_that_mean_nothing_are_refused_at_once(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("m", "t"):
        (tmp_path / name).touch()
    assert "is not in the range" in typed(*arguments.split(), code=2)
