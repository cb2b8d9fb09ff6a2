"""Before torch is imported: one thread a process, since tests and the processes they start share the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
