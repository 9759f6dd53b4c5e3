"""Processes: which of those that torchrun started this one is, by its environment, and how one ended that we started."""

from __future__ import annotations

import os
import signal

GIVEN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def process_count() -> int:
    """How many processes torchrun started together; 1 where it did not."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in GIVEN) else 1


def process_rank() -> int:
    """This process' number among them, from 0."""
    return int(os.environ["RANK"]) if process_count() > 1 else 0


def own_device(device: str) -> str:
    """The device of this process: of the GPUs of a machine each takes the one with its number there."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and process_count() > 1 else device


def ending(code: int) -> str:
    """How a process ended, from what `subprocess` has as its return code (minus the signal that killed it)."""
    if code >= 0:
        return f"it ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    # What a system does to the process that it takes memory back from.
    why = ", as a system does when its memory runs out" if name == "SIGKILL" else ""
    return f"it was killed by {name}{why}"
