"""Makes losses_50_steps.json: the losses of 25 + 25 steps of tests/tiny.yaml, both stages, on scenes, as it is and in
fp64, which other machines give again nearly to the last digit.

    python tests/golden/make_losses_50_steps.py

Run it when a change is meant to move the losses, and say in the commit why they moved.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from mmgem.cli import main

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import CONFIG, FP64  # noqa: E402

OUT = Path(__file__).with_name("losses_50_steps.json")
SCENES = ["--train", "96", "--val", "24", "--test", "24", "--size", "64", "--processes", "1"]


def make(folder: Path) -> dict[str, Any]:
    if main(["data", "prepare", "scenes", "--out", str(folder / "data"), *SCENES]):
        sys.exit("the scenes failed; see above")
    golden: dict[str, Any] = {"command": "python tests/golden/make_losses_50_steps.py"}
    for name, settings in (("fp32", ()), ("fp64", FP64)):
        run = folder / name
        if main(["train", "--config", str(CONFIG), f"data.path={folder / 'data'}", f"run={run}", *settings]):
            sys.exit("the run failed; see above")
        golden["versions"] = json.loads((run / "run.json").read_text())["versions"]
        golden[name] = [
            {k: v for k, v in json.loads(line).items() if k in ("step", "stage") or k.startswith("loss")}
            for line in (run / "log.jsonl").read_text().splitlines()
        ]
    return golden


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        golden = make(Path(folder))
    lists = {name: ",\n".join(f"  {json.dumps(line)}" for line in golden.pop(name)) for name in ("fp32", "fp64")}
    texts = [f' "{name}": [\n{lines}\n ]' for name, lines in lists.items()]
    OUT.write_text(json.dumps(golden, indent=1)[:-2] + ",\n" + ",\n".join(texts) + "\n}\n")
    print(OUT)
