"""torchrun, which ends with the exit code of the rank that failed first.

Receives torchrun's command line. Starts the ranks as torchrun does, but where torchrun ends with 1 for any failure,
this ends with the failed rank's own code (128 + number for a signal), and with 128 + number when it was itself told to
stop: a scheduler sees why the training ended, and whether to start it again.
"""

from __future__ import annotations

import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

EXPLAINED = (2, 75, *(128 + number for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)))
"""What the trainer itself ends with, having said why: bad input, late ranks, asked to stop."""


def launch() -> int:
    try:
        main()
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        # Of a process that a signal ended, torchrun gives that signal's number, negative.
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        print(f"the ranks ended with exit code {code}" if code in EXPLAINED else error, file=sys.stderr)
        return code
    except SignalException as error:
        print(error, file=sys.stderr)
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    raise SystemExit(launch())
