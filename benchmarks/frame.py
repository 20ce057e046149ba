"""What every row of bench.py shares: sides that take turns, ratios, the machine."""

import os
import platform
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode


class Result(NamedTuple):
    """What one comparison found."""

    name: str  # what was measured, at which size
    seconds: dict  # {side: median of its repetitions}; the first side is ours
    ratios: dict  # {other side: (median, least, largest) of its seconds / ours}
    notes: dict  # further figures, by what they are


def compared(name, sides, repetitions, notes=None, shares=None, warm_up=True):
    """The Result of sides, {name: function}, that take turns after one round of warm-up.

    The first side is ours. shares: {side: share of the work that its function does}, 1 where it is
    not named; its seconds are divided by it. warm_up: False where each side has run before, as
    where a row asserts what it computes.
    """
    shares = shares or {}
    seconds = {side: [] for side in sides}
    if warm_up:
        for function in sides.values():
            function()
    _finish()
    for _ in range(repetitions):
        for side, function in sides.items():
            begin = time.perf_counter()
            function()
            _finish()
            seconds[side].append((time.perf_counter() - begin) / shares.get(side, 1))
    ours, *others = (np.array(seconds[side]) for side in sides)
    ratios = {}
    for side, other in zip(list(sides)[1:], others, strict=True):
        ratio = other / ours
        ratios[side] = (float(np.median(ratio)), float(ratio.min()), float(ratio.max()))
    medians = {side: float(np.median(values)) for side, values in seconds.items()}
    return Result(name, medians, ratios, notes or {})


def _finish():
    """Wait for what a GPU has still to do, so that no side pays for another."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def require_equal(condition, what):
    """End a row whose sides do not compute the same: their times mean nothing then."""
    if not condition:
        raise RuntimeError(f"bench: {what} are not the same on all sides")


def matrix_limit(device, precision, side, repetitions=5):
    """FLOP a second of a large square matrix product: what the machine can do at a precision."""
    one = torch.randn(side, side, device=device, dtype=precision)
    seconds = []
    for repetition in range(repetitions + 1):
        begin = time.perf_counter()
        one @ one
        _finish()
        if repetition > 0:
            seconds.append(time.perf_counter() - begin)
    return 2 * side**3 / float(np.median(seconds))


def with_share_of_limit(result, operations, device, precision, small):
    """A Result with the share of the `matrix_limit` that our side reaches.

    operations: floating point operations that our side executes, see `operations_of`.
    """
    ours = next(iter(result.seconds))
    limit = matrix_limit(device, precision, side=256 if small else 4096)
    speed = operations / result.seconds[ours]
    notes = {
        "GFLOP executed": operations / 1e9,
        "GFLOP a second": speed / 1e9,
        "of a large matrix product": limit / 1e9,
        "share of the machine's limit": speed / limit,
    }
    return result._replace(notes={**result.notes, **notes})


def operations_of(function):
    """Floating point operations of the matrix products and convolutions in a call.

    On CPUs torch does not count those within attention, a hundredth of a ViT-B/32.
    """
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def lines_of(row, result):
    """A Result as lines for people."""
    ours = next(iter(result.seconds))
    lines = [f"{row}: {result.name}"]
    for side, seconds in result.seconds.items():
        line = f"  {side:28} {1000 * seconds:10.2f} ms"
        if side != ours:
            line += "   ours is {:.2f} x as fast ({:.2f} to {:.2f})".format(*result.ratios[side])
        lines.append(line)
    for what, value in result.notes.items():
        shown = value if isinstance(value, dict) else {"": value}
        parts = [f"{name} {number:.4g}".strip() for name, number in shown.items()]
        lines.append(f"  {what}: {', '.join(parts)}")
    return lines


def _processor():
    """The processor's name; on Linux Python does not know it."""
    told = Path("/proc/cpuinfo")
    if told.is_file():
        for line in told.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine(device):
    """What the figures were measured on."""
    processor = _processor()
    if torch.device(device).type == "cuda":
        processor = torch.cuda.get_device_name(device)
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
