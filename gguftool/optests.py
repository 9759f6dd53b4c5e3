"""llama.cpp's own tests of single operations, run on a device and counted from what they print."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from .runtime_base import Runtime

# Operations whose ids may be -1, alone and as backends fuse them (patch 0003 has the cases, under these exact names), and
# the stock ones that the patches must leave as they were.
SKIP_OPS = ("MUL_MAT_ID_SKIP", "ADD_ID_SKIP", "MUL_MAT_VEC_FUSION_SKIP")
# Backends that the patches teach to skip rows; their CPUs and GPUs say so to the scheduler.
SKIPPING = ("cpu", "cuda", "metal")
STOCK_OPS = ("MUL_MAT_ID", "ADD_ID")
# Of the thousand cases of the stock operations a hundred: every type, one token and several, 2 of 4 experts.
SAMPLE = "n_mats=4,n_used=2.*,n=(1|17),k|n_token="
TIMEOUT = 3600

_CASE = re.compile(r"^\s*([A-Z_]+)\((.*)\):.*?(OK|FAIL|not supported|skipping)")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class OpCounts:
    """What came of the cases of one operation on one device.

    Attributes:
        passed, failed: cases that the device computed rightly or wrongly.
        refused: cases that the device says it does not compute: the scheduler gives them to the CPU. No fault.
        failures: the failed cases' names, or why the test did not run to its end.
        refusable: whether the device may refuse all of them.
    """

    op: str
    passed: int
    refused: int
    failed: int
    failures: tuple[str, ...] = ()
    refusable: bool = True

    @property
    def ok(self) -> bool:
        """No case failed, the test ran to its end, and it had cases; the device computed some where it has to."""
        done = self.passed + self.refused if self.refusable else self.passed
        return not self.failed and not self.failures and done > 0

    def __str__(self) -> str:
        text = f"{self.passed} passed, {self.refused} on CPU, {self.failed} failed"
        why = self.failures[:2]
        if not why and self.refused and not self.ok:
            why = ("it refuses what its backend was patched to compute",)
        return f"{text}: {'; '.join(why)}" if why else text


def run_backend_ops(runtime: Runtime, device: str, ops: Sequence[str], sample: str | None = None) -> list[OpCounts]:
    """`test-backend-ops` on one device, against ggml's reference on the CPU: an entry for each operation.

    Args:
        sample: only the cases whose parameters match this expression.
    """
    command = [str(runtime.tool("test-backend-ops")), "test", "-b", device, "-o", ",".join(ops)]
    code, output, errors = _run([*command, *(["-p", sample] if sample else [])])
    return count_backend_ops(ops, code, output, errors)


def count_backend_ops(ops: Sequence[str], code: int, output: str, errors: str = "") -> list[OpCounts]:
    """The cases of every one of `ops` in what `test-backend-ops` printed and exited with."""
    cases = [match for line in _COLOUR.sub("", output).splitlines() if (match := _CASE.match(line))]
    unexplained = code != 0 and not any(match[3] == "FAIL" for match in cases)
    counts = []
    for op in ops:
        results = [(match[2], match[3]) for match in cases if match[1] == op]
        failures = [f"{op}({parameters})" for parameters, result in results if result == "FAIL"]
        number = len(failures)
        if unexplained:
            failures.append(_died("test-backend-ops", code, errors or output))
        elif not results:
            failures.append("no case was run")
        tally = [result for _, result in results]
        counts.append(OpCounts(op, tally.count("OK"), tally.count("not supported"), number, tuple(failures)))
    return counts


def run_moe_skip(runtime: Runtime) -> OpCounts:
    """`test-moe-skip`: skipped rows in every buffer type of the CPU, against a reference in double."""
    code, output, errors = _run([str(runtime.tool("test-moe-skip"))])
    return count_moe_skip(code, output, errors)


def count_moe_skip(code: int, output: str, errors: str = "") -> OpCounts:
    """The total in what `test-moe-skip` printed and exited with."""
    total = re.search(r"^(\d+) cases, (\d+) failed", output, re.MULTILINE)
    ran, failed = (int(total[1]), int(total[2])) if total else (0, 0)
    failures: tuple[str, ...] = ()
    if total is None or (code and not failed):
        failures = (_died("test-moe-skip", code, errors or output),)
    elif failed:
        failures = tuple(line.strip() for line in output.splitlines() if re.search(r"\b[1-9]\d* failed", line))
    return OpCounts("test-moe-skip", ran - failed, 0, failed, failures)


def _run(command: list[str]) -> tuple[int, str, str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return 1, "", f"no end after {TIMEOUT} s"
    return done.returncode, done.stdout, done.stderr


def _died(tool: str, code: int, output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    how = f"was killed by signal {-code}" if code < 0 else f"exited with {code}"
    return f"{tool} {how}: {lines[-1] if lines else 'no output'}"
