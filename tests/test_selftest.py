"""runtime selftest and validate on several backends: right devices pass, and each kind of fault is found."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from math import exp, inf, nan, sqrt

import numpy as np
import pytest

from gguftool import cli, selftest
from gguftool.crosscheck import crosscheck, judge
from gguftool.errors import GgufToolError
from gguftool.evaluate import ln_ppl_tolerance
from gguftool.gguf_file import GgufFile, copied_entries, write_gguf
from gguftool.optests import SKIP_OPS, OpCounts, count_backend_ops, count_moe_skip, run_backend_ops
from gguftool.runtime import built, find, locate, require
from gguftool.runtime_base import patch_files

GREEN, RED, END = "\x1b[1;32m", "\x1b[1;31m", "\x1b[0m"
PRINTED = f"""Testing 1 devices

Backend 1/1: CUDA0
  Device description: a GPU
  MUL_MAT_ID_SKIP(type_a=f32,type_b=f32,n_mats=8,skip=0): {GREEN}OK{END}
  MUL_MAT_ID_SKIP(type_a=f16,type_b=f32,n_mats=8,skip=1): [MUL_MAT_ID_SKIP] ERR = 0.1 > 0.0005 compare failed {RED}FAIL{END}
  MUL_MAT_ID_SKIP(type_a=iq1_s,type_b=f32,n_mats=8,skip=1): not supported [CUDA0]
  ADD_ID_SKIP(type_a=f32,type_b=f32,n_embd=32): {GREEN}OK{END}
  1/2 tests passed
  Backend CUDA0: {RED}FAIL{END}
0/1 backends passed
{RED}FAIL{END}
"""


def test_cases_are_counted_as_they_are_printed():
    multiply, add = count_backend_ops(("MUL_MAT_ID_SKIP", "ADD_ID_SKIP"), 1, PRINTED)
    name = "MUL_MAT_ID_SKIP(type_a=f16,type_b=f32,n_mats=8,skip=1)"
    assert multiply == OpCounts("MUL_MAT_ID_SKIP", 1, 1, 1, (name,)) and not multiply.ok and name in str(multiply)
    assert add == OpCounts("ADD_ID_SKIP", 1, 0, 0) and add.ok
    refused = "  ADD_ID_SKIP(type_a=f32): not supported [Vulkan0]\n"
    (count,) = count_backend_ops(("ADD_ID_SKIP",), 0, refused)
    assert count.ok and str(count) == "0 passed, 1 on CPU, 0 failed"


def test_every_operation_that_the_patches_add_cases_of_is_run():
    """test-backend-ops matches names exactly: one that is not asked for is not run, without a word."""
    added = {
        name for path in patch_files() for name in re.findall(r'^\+ +return "(\w+_SKIP)";', path.read_text(), re.M)
    }
    assert added == set(SKIP_OPS)


@pytest.mark.parametrize(
    ("backend", "kind", "ok"),
    [
        ("cpu", "cpu", False),
        ("cuda", "gpu", False),
        ("cuda", "igpu", False),
        ("metal", "gpu", False),
        ("vulkan", "cpu", False),
        ("vulkan", "gpu", True),
        ("metal", "accel", True),
    ],
)
def test_a_device_that_has_to_compute_may_not_refuse_everything(backend, kind, ok, runtime, monkeypatch):
    """CUDA without its word for skipping rows: the scheduler gives it none, and every case is "not supported"."""
    refused = OpCounts("MUL_MAT_ID_SKIP", 0, 7, 0)
    monkeypatch.setattr(selftest, "run_backend_ops", lambda *_: [refused, replace(refused, passed=1)])
    monkeypatch.setattr(selftest, "run_moe_skip", lambda _: OpCounts("test-moe-skip", 1, 0, 0))
    where = selftest._Where(replace(runtime, backend=backend), "X0", "a device")
    found = list(selftest._check_operations(where, kind, False))
    assert [check.ok for check in found[:4]] == [ok, True, ok, True]
    assert ("refuses what its backend was patched to compute" in found[0].text) is not ok
    assert [check.name for check in found[4:]] == ["test-moe-skip"] * (kind == "cpu") and all(c.ok for c in found[4:])


@pytest.mark.parametrize(
    ("code", "output", "reason"),
    [
        (0, "Backend 1/1: CPU\n  Skipping\n", "no case was run"),
        (-6, "  ADD_ID_SKIP(type_a=f32): ", "killed by signal 6: GGML_ASSERT"),
        (1, f"  ADD_ID_SKIP(type_a=f32): {GREEN}OK{END}\n", "exited with 1: GGML_ASSERT"),
    ],
)
def test_a_test_that_does_not_run_to_its_end_fails(code, output, reason):
    (count,) = count_backend_ops(("ADD_ID_SKIP",), code, output, "GGML_ASSERT(x) failed" if code else "")
    assert not count.ok and reason in str(count)


def test_the_total_of_moe_skip_is_counted():
    line = "MUL_MAT_ID CPU_REPACK threads = 3:  4 types,  120 cases, {} failed\n2191 cases, {} failed\n"
    assert count_moe_skip(0, line.format(0, 0)) == OpCounts("test-moe-skip", 2191, 0, 0)
    wrong = count_moe_skip(1, line.format(2, 2))
    assert not wrong.ok and wrong.failed == 2 and "CPU_REPACK" in str(wrong)
    for code, output in ((-11, "MUL_MAT_ID CPU"), (1, line.format(0, 0)), (0, "")):
        assert not count_moe_skip(code, output).ok


def test_a_device_that_is_not_there_fails(runtime):
    assert not any(count.ok for count in run_backend_ops(runtime, "CUDA7", ("ADD_ID_SKIP", "ADD_ID")))


# Few cases of every operation.
FEW = "m=48,n=4,k|type_a=(f32|q4_K),.*n_used=2,b=0,m=512,n=1,k|n_token=1(,|$)|type=(f32|q4_K),.*,m=8,.*,skip=3"


@pytest.fixture
def quick(monkeypatch, base_gguf):
    """The selftest as it is, with a few cases of each operation and without the conversion; what it finds is not noted."""
    monkeypatch.setattr(import_module("gguftool.doctor"), "note_selftest", lambda found: list(found))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(
        selftest, "run_backend_ops", lambda by, device, ops, _=None: run_backend_ops(by, device, ops, FEW)
    )
    monkeypatch.setattr(selftest, "run_moe_skip", lambda _: OpCounts("test-moe-skip", 1, 0, 0))
    original = selftest.selftest
    monkeypatch.setattr(selftest, "selftest", lambda backend, **options: original(backend, **options, base=base_gguf))


def command(capsys, monkeypatch, *arguments):
    """Exit code, JSON on stdout, stderr of `gguftool`, in this process."""
    monkeypatch.setattr(sys, "argv", ["gguftool", *map(str, arguments), "--json", "--quiet"])
    code = cli.run()
    said = capsys.readouterr()
    return code, json.loads(said.out), said.err


def test_the_cpu_passes(quick, runtime, capsys, monkeypatch):
    code, found, _ = command(capsys, monkeypatch, "runtime", "selftest", "--backend", "cpu")
    assert code == 0 and found["ok"]
    checks = {check["check"]: check for check in found["checks"]}
    assert set(checks) == {
        *SKIP_OPS, "MUL_MAT_ID", "ADD_ID", "test-moe-skip",
        "BF16, prompt", "BF16, generation", "Q4_K_M, prompt", "Q4_K_M, generation",
    }  # fmt: skip
    assert all(checks[op]["passed"] > 0 and not checks[op]["failed"] for op in (*SKIP_OPS, "ADD_ID"))
    # A skipped row is zero and a padded neuron adds zero: on x86 nothing at all differs.
    models = [check for check in checks.values() if "kld" in check]
    assert all(0 <= check["kld"] < check["kld_tolerance"] / 10 and 5 < check["ppl"] < 50 for check in models)
    # Nor is it one computation four times.
    assert len({check["ppl"] for check in models}) == 4


def test_a_failing_case_is_exit_code_1(quick, runtime, capsys, monkeypatch):
    broken = OpCounts("ADD_ID_SKIP", 1, 0, 1, ("ADD_ID_SKIP(type_a=f32)",))
    monkeypatch.setattr(selftest, "run_backend_ops", lambda *_: [broken])
    code, found, said = command(capsys, monkeypatch, "runtime", "selftest", "--backend", "cpu")
    assert code == 1 and not found["ok"] and said == "error: 2 of 7 checks failed\n"
    assert "ADD_ID_SKIP(type_a=f32)" in found["checks"][0]["result"]


def test_one_wrong_expert_is_exit_code_1(quick, runtime, capsys, monkeypatch):
    """The smallest fault that the tolerance must find: one expert of one layer adds nothing."""
    monkeypatch.setattr(selftest, "run_backend_ops", lambda *_: [OpCounts("ADD_ID_SKIP", 1, 0, 0)])
    original = selftest._outputs

    def computed(by, device, models, folder):
        if "padded" not in models["BF16"].name:
            models = models | {"BF16": damaged(models["BF16"], folder / "damaged.gguf")}
        return original(by, device, models, folder)

    monkeypatch.setattr(selftest, "_outputs", computed)
    code, found, _ = command(capsys, monkeypatch, "runtime", "selftest", "--backend", "cpu")
    failed = {check["check"]: check for check in found["checks"] if not check["ok"]}
    assert code == 1 and set(failed) == {"BF16, prompt", "BF16, generation"}
    assert all(check["kld"] > check["kld_tolerance"] for check in failed.values())


def damaged(path, out):
    file = GgufFile(path)

    def produce(spec):
        data = np.array(file.raw(spec))
        if spec.name == "blk.3.ffn_down_exps.2.weight":
            data[0] = 0
        return data

    write_gguf(out, file.arch, copied_entries(file)[0], file.tensors, produce)
    return out


def test_a_perplexity_beyond_the_tolerance_fails_where_the_divergence_does_not(tmp_path, runtime, monkeypatch):
    output = selftest._Output(np.zeros((4, 3), dtype=np.float32), np.zeros(4, dtype=np.int32))
    right = selftest._compare(output, output)
    where = selftest._Where(runtime, "X0", "a device")
    for shift, ok in ((0.0, True), (0.9, True), (1.1, False), (-1.1, False)):
        limit = ln_ppl_tolerance(4, selftest.KLD_TOLERANCE["BF16"])
        found = replace(right, ln_ppl_ratio=right.ln_ppl_ratio._replace(value=shift * limit))
        monkeypatch.setattr(selftest, "_outputs", lambda *_: {"BF16, prompt": output})
        monkeypatch.setattr(selftest, "_compare", lambda *_, result=found: result)
        (check,) = selftest._check_models(where, False, {}, {"BF16, prompt": output}, tmp_path)
        assert check.ok is ok


def test_the_tolerance_by_hand():
    assert ln_ppl_tolerance(10_000, 0.02) == pytest.approx(0.02 + 3 * sqrt(0.04 / 10_000))
    assert ln_ppl_tolerance(10**12) == pytest.approx(0.005, rel=1e-3)


@pytest.fixture
def two_runtimes(runtime, tmp_path, monkeypatch):
    """A cache with the runtime of the CPU, and once more under the name of vulkan: two backends on a machine of one."""
    monkeypatch.setenv("GGUFTOOL_CACHE", str(tmp_path))
    for name in ("cpu", "vulkan"):
        folder = locate(name)
        folder.mkdir()
        for part in ("bin", "convert"):
            (folder / part).symlink_to(runtime.path / part)
        facts = json.loads((runtime.path / "build.json").read_text()) | {"backend": name}
        (folder / "build.json").write_text(json.dumps(facts))
    return require("cpu"), require("vulkan")


def test_a_runtime_without_its_gpu_is_said(quick, two_runtimes, capsys, monkeypatch):
    monkeypatch.setattr(selftest, "run_backend_ops", lambda *_: [OpCounts("ADD_ID_SKIP", 1, 0, 0)])
    code, found, _ = command(capsys, monkeypatch, "runtime", "selftest")
    failed = [check for check in found["checks"] if not check["ok"]]
    assert code == 1 and [(check["backend"], check["check"]) for check in failed] == [("vulkan", "devices")]
    assert {check["backend"] for check in found["checks"] if check["ok"]} == {"cpu"}


def test_a_device_that_crashes_takes_only_its_own_rows(two_runtimes, monkeypatch):
    worker = subprocess.run

    def run(command, **options):
        if "vulkan" in options["input"]:
            return subprocess.CompletedProcess(command, -6, "", "ggml_vulkan: device lost\n")
        return worker(command, **options)

    monkeypatch.setattr(selftest.subprocess, "run", run)
    assert [device["name"] for device in selftest._ask({"runtime": str(two_runtimes[0].path)})["devices"]] == ["CPU"]
    with pytest.raises(GgufToolError, match="killed by SIGABRT: ggml_vulkan: device lost"):
        selftest._ask({"runtime": str(two_runtimes[1].path)})


# --- validate on several backends -------------------------------------------------------------------------------------


def test_validate_runs_every_backend_and_compares(two_runtimes, base_gguf, eval_text, capsys, monkeypatch):
    arguments = ("validate", base_gguf, base_gguf, "--data", eval_text, "--windows", 1, "--ctx", 128)
    code, found, _ = command(capsys, monkeypatch, *arguments, "--backend", "cpu,vulkan")
    assert code == 0 and found["ok"] and found["ln_ppl_difference"] == 0
    assert {name: one["backend"] for name, one in found["backends"].items()} == {"cpu": "cpu", "vulkan": "vulkan"}
    assert found["ln_ppl_tolerance"] == ln_ppl_tolerance(63)
    monkeypatch.setattr(sys, "argv", ["gguftool", *map(str, arguments), "--backend", "cpu,vulkan"])
    assert cli.run() == 0
    said = capsys.readouterr().out
    assert "vulkan" in said and "within the tolerance" in said


def test_backends_that_differ_are_exit_code_1(two_runtimes, base_gguf, eval_text, capsys, monkeypatch):
    from gguftool import crosscheck as module

    def measured(backend, *_):
        ppl = 10.0 if backend == "cpu" else 10.0 * exp(1.01 * ln_ppl_tolerance(6120))
        side = {"ppl": 10.0, "ppl_err": 0.1}
        return {
            "base": side,
            "pruned": side | {"ppl": ppl},
            "tokens": 6120,
            "n_ctx": 512,
            "kld": {"mean": 0.1, "err": 0.1},
        }

    monkeypatch.setattr(module, "_validate", measured)
    arguments = ("validate", base_gguf, base_gguf, "--data", eval_text, "--backend", "cpu,vulkan")
    code, found, said = command(capsys, monkeypatch, *arguments)
    assert code == 1 and not found["ok"] and "the backends differ by" in said and "selftest" in said
    assert judge({"a": measured("cpu"), "b": measured("cpu")}).ok


def test_a_backend_whose_perplexity_is_not_finite_agrees_with_none():
    def measured(ppl):
        return {"base": {"ppl": 10.0}, "pruned": {"ppl": ppl}, "tokens": 6120}

    for broken in (nan, inf):
        assert not judge({"a": measured(10.0), "b": measured(broken)}).ok


def test_a_backend_that_is_not_built_is_named_before_anything_runs(runtime, base_gguf, eval_text, monkeypatch):
    from gguftool import crosscheck as module

    monkeypatch.setattr(module, "_validate", lambda *_: pytest.fail("it ran"))
    with pytest.raises(GgufToolError, match=r"for metal has been built; run `gguftool runtime build --backend metal`"):
        crosscheck(["cpu", "metal"], base_gguf, base_gguf, eval_text)


def test_what_fails_on_a_backend_is_said_with_its_name(runtime, base_gguf, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(GgufToolError, match="on cpu: the text has .* tokens, less than one window of 512"):
        crosscheck(["cpu"], base_gguf, base_gguf, tmp_path / "short.txt")


def test_the_runtime_asked_for_last_is_the_one_in_use(two_runtimes):
    usual, other = locate("cpu"), locate("cpu", cmake=["-DGGML_OPENMP=OFF"])
    assert other.name.startswith(usual.name + "-") and built("cpu").path == usual
    shutil.copytree(usual, other, symlinks=True)
    os.utime(other / "build.json", ns=(2**61, 2**61))
    assert built("cpu").path == other
    shutil.copytree(other, other.with_name(other.name + ".partial"), symlinks=True)
    os.utime(other.with_name(other.name + ".partial") / "build.json", ns=(2**61 + 1, 2**61 + 1))
    assert built("cpu").path == other
    os.utime(usual / "build.json", ns=(2**61 + 2, 2**61 + 2))
    assert built("cpu").path == usual
    # Of several backends auto takes the fastest.
    assert find().backend == "vulkan"
