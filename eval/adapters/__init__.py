"""Between this package and other people's evaluation harnesses: one module a harness, named after it.

`clip_benchmark` and `mteb` run a model of ours in theirs, `open_clip` runs a model of theirs in ours. The scripts
beside this folder, `run_*.py`, are their commands.
"""
