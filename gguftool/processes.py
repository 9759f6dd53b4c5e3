"""Which of the processes that torchrun started this one is, by its environment."""

from __future__ import annotations

import os

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
