"""Fuzzing: files are damaged at random, and nothing but a result or a one-line ``SvdlabError`` may come of it.

The suite runs a fixed number of cases from a fixed seed. For others::

    make fuzz SECONDS=600                                                    all of them for so long, from a new seed
    SVDLAB_FUZZ_SEED=31 SVDLAB_FUZZ_CASES=1 pytest tests/test_fuzz_checkpoint.py          a case that a failure names
"""

from __future__ import annotations

import copy
import os
import random
import resource
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from svdlab.errors import SvdlabError

LIMIT_S = 20.0
MIB = 2**20


class TooSlow(BaseException):
    """Raised inside a case after ``LIMIT_S``; nothing that catches ``Exception`` swallows it."""


def fuzz(attack: Callable[[random.Random], object], cases: int = 300, memory: int = 256 * MIB) -> Counter[str]:
    """Run an attack with many seeds; fail with a line for every place in the code that fell.

    Args:
        attack: given a case's source of chance, damages something and uses it.
        cases: how many; ``SVDLAB_FUZZ_CASES`` and ``SVDLAB_FUZZ_SECONDS`` override it. Case n has the seed
            ``SVDLAB_FUZZ_SEED`` + n.
        memory: by how many bytes a case may make the process grow, at its peak; at least 64 MiB, which is noise.

    Returns:
        how many cases were "accepted" and "refused", for a test to assert that there are some of both.
    """
    seed, cases = int(os.environ.get("SVDLAB_FUZZ_SEED", 0)), int(os.environ.get("SVDLAB_FUZZ_CASES", cases))
    seconds = float(os.environ.get("SVDLAB_FUZZ_SECONDS", 0))
    stop = time.monotonic() + seconds
    tally: Counter[str] = Counter()
    fell: Counter[str] = Counter()
    first: dict[str, str] = {}
    number = seed
    while time.monotonic() < stop if seconds else number < seed + cases:
        outcome, detail = _outcome(attack, number, max(memory, 64 * MIB))
        tally[outcome if outcome in ("accepted", "refused") else "fell"] += 1
        if outcome not in ("accepted", "refused"):
            fell[outcome] += 1
            first.setdefault(outcome, f"SVDLAB_FUZZ_SEED={number}: {detail[:200]!r}")
        number += 1
    print(f"{attack.__name__}: {number - seed} cases from seed {seed}: {dict(tally)}")
    lines = [f"{count} cases: {what}; such as {first[what]}" for what, count in fell.items()]
    assert not lines, f"{tally['fell']} of {number - seed} cases fell, in {len(lines)} ways\n" + "\n".join(lines)
    return tally


def _outcome(attack: Callable[[random.Random], object], seed: int, memory: int) -> tuple[str, str]:
    """Whether a case was "accepted", "refused", or what fell and where; and what was said."""
    started = time.monotonic()
    try:
        with _time_limit(LIMIT_S), _memory_limit(memory):
            attack(random.Random(seed))
    except SvdlabError as error:
        text = str(error)
        if len(text) > 1000 or not text.isprintable():
            return f"an error that is no short line at {_place(error)}", text
        outcome = "refused", text
    except TooSlow as error:
        return f"over {LIMIT_S:.0f} s at {_place(error)}", ""
    except Exception as error:
        return f"{type(error).__name__} at {_place(error)}", str(error)
    else:
        outcome = "accepted", ""
    # A signal waits for the end of a call into C.
    return outcome if time.monotonic() - started < LIMIT_S else (f"{outcome[0]}, after over {LIMIT_S:.0f} s", "")


def _place(error: BaseException) -> str:
    """The innermost line of svdlab that an exception passed."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}svdlab{os.sep}" in f.filename]
    frames = frames or list(traceback.extract_tb(error.__traceback__))
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _memory_limit(limit: int) -> Iterator[None]:
    """Raise where the process has grown by more; one that asks for far more is stopped by the system."""
    if not Path("/proc/self/clear_refs").exists():  # no Linux
        yield
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, soft_and_hard = _status(), resource.getrlimit(resource.RLIMIT_AS)
    # Threads and allocators reserve addresses that they never use: hence the 4 GiB.
    resource.setrlimit(resource.RLIMIT_AS, (before["VmSize"] + limit + 4096 * MIB, soft_and_hard[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, soft_and_hard)
        grown = _status()["VmHWM"] - before["VmRSS"]
        if grown > limit:
            raise MemoryError(f"grew by {grown / MIB:.0f} MiB, allowed: {limit / MIB:.0f}")


def _status() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {name: int(kib.split()[0]) * 1024 for name, _, kib in (line.partition(":") for line in lines) if "kB" in kib}


ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 10**6, 10**9, -(2**63), 10**420),
    *(0.0, -0.0, 0.5, 1.5, 1e39, 1e308, 5e-324, float("nan"), float("inf"), -float("inf")),
    *("", "x", "0", "nan", "a\0b", "\x1b[31mred\x1b[0m", "[/x]", "\n", "../../etc/passwd", "/", "é", "x" * 100_000),
    *([], {}, [[]], [None], [1, "a"], {"x": 1}, [0] * 10_000),
)


def damage_json(chance: random.Random, value: Any, times: int = 1) -> Any:
    """A JSON value with some of what it holds replaced, deleted, moved, repeated or renamed.

    Args:
        chance: the case's.
        value: stays as it is.
        times: how many changes.
    """
    value = copy.deepcopy(value)
    for _ in range(times):
        if not (places := list(_places(value))):
            return _odd(chance)
        holder, key = chance.choice(places)
        way = chance.randrange(7)
        if way <= 2:
            holder[key] = _odd(chance)
        elif way == 3:
            del holder[key]
        elif way == 4:
            other, there = chance.choice(places)
            holder[key] = copy.deepcopy(other[there])
        elif way == 5 and isinstance(holder[key], (int, float)):
            holder[key] = holder[key] * chance.choice((-1, 2, 10, 1000, 10**12))
        elif way == 5:
            holder[key] = [holder[key]] * chance.choice((1, 2, 3))
        elif isinstance(holder, dict):
            holder[chance.choice(("x", "", "é", key.upper(), key + "2", f"_{key}"))] = holder.pop(key)
        else:
            holder.insert(key, _odd(chance))
    return value


def _odd(chance: random.Random) -> Any:
    return copy.deepcopy(chance.choice(ODD))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything that a JSON value holds."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from _places(inner)


def damage_bytes(chance: random.Random, data: bytes, times: int = 1) -> bytes:
    """Bytes with some flipped, cut out, cut off, repeated or put in, mostly near the start, where headers are."""
    changed = bytearray(data)
    for _ in range(times):
        end = chance.choice((8, 64, 512, len(changed)))
        at = chance.randrange(min(end, len(changed)) + 1)
        some = chance.choice((1, 2, 8, 100))
        way = chance.randrange(5)
        if way == 0:
            changed[at : at + some] = chance.randbytes(len(changed[at : at + some]))
        elif way == 1:
            del changed[at : at + some]
        elif way == 2:
            del changed[at:]
        elif way == 3:
            changed[at:at] = changed[at : at + some]
        else:
            changed[at:at] = chance.choice((b"\0", b"\xff" * 8, b"[" * 2000, b"9" * 5000, b"{", b'"', b"\n"))
    return bytes(changed)
