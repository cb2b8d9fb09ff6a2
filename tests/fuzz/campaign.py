"""One part of the fuzzing, in a process of its own: `python campaign.py PART INPUTS SEED`.

Gives one line of JSON: how many inputs there were, what became of them, the longest time of one, and by how many MB one
let the process grow. Ends with 1, the input on stderr, at the first that does not end in a sample or an error of ours,
takes more than SECONDS, lets the process grow by more than MEGABYTES (or the part's own), or makes anybody warn.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

SECONDS = 5.0
"""Of work; of waiting, ten times as many."""
MEGABYTES = 100
INPUTS = {"tars": 2000, "indexes": 2500, "records": 3000, "pictures": 1500, "sources": 1000}


class Hung(BaseException):
    """Nobody's `except Exception` takes it for a broken picture."""


class Limited:
    """`check` says in a word what became of an input; what it does within the limits is counted."""

    def __init__(self, check: Callable[[Any], str], megabytes: float) -> None:
        self._check, self._most = check, megabytes
        self.outcomes: Counter[str] = Counter()
        self.seconds = self.megabytes = 0.0
        for number in (signal.SIGALRM, signal.SIGPROF):
            signal.signal(number, _hung)

    def __call__(self, content: Any) -> None:
        warned: list[str] = []
        warnings.showwarning = lambda message, *_, **__: warned.append(f"{type(message).__name__}: {message}")
        began, before = time.process_time(), _peak(reset=True)
        signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                outcome = self._check(content)
        except Hung as error:
            raise AssertionError("not done in time") from error
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)
        grown = _peak() - before
        assert not warned, warned
        assert grown < self._most, f"{grown:.0f} MB more"
        self.seconds, self.megabytes = max(self.seconds, time.process_time() - began), max(self.megabytes, grown)
        self.outcomes[outcome] += 1


def _hung(*_: object) -> None:
    raise Hung


def _peak(*, reset: bool = False) -> float:
    """The most MB that the process has had in memory, or, where the system can do so, from now on."""
    if reset:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


def main(part: str, inputs: int, number: int) -> None:
    for category in (UserWarning, RuntimeWarning, FutureWarning):  # all that are shown, which by default are once
        warnings.simplefilter("always", category)
    module = import_module(f"fuzzed_{part}")
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        module.warm_up()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), resource.RLIM_INFINITY))  # to ask for more is an error
    exact = settings(
        max_examples=inputs,
        database=None,
        derandomize=False,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
        phases=[Phase.generate],
    )
    test = Limited(module.check, getattr(module, "MEGABYTES", MEGABYTES))

    @seed(number)
    @exact
    @given(module.INPUTS)
    def run(content: Any) -> None:
        test(content)

    run()
    result = {"inputs": test.outcomes.total(), "outcomes": test.outcomes}
    print(json.dumps({**result, "seconds": test.seconds, "megabytes": test.megabytes}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
