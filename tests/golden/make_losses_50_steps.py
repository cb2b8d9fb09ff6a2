"""Makes losses_50_steps.json: the losses of 25 + 25 steps of tests/tiny.yaml, both stages, on scenes.

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

OUT = Path(__file__).with_name("losses_50_steps.json")
CONFIG = Path(__file__).parents[1] / "tiny.yaml"
SCENES = ["--train", "96", "--val", "24", "--test", "24", "--size", "64", "--processes", "1"]


def make(folder: Path) -> dict[str, Any]:
    data, run = folder / "data", folder / "run"
    prepare = ["data", "prepare", "scenes", "--out", str(data), *SCENES]
    train = ["train", "--config", str(CONFIG), f"data.path={data}", f"run={run}"]
    if main(prepare) or main(train):
        sys.exit("the run failed; see above")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {
        "command": "python tests/golden/make_losses_50_steps.py",
        "versions": json.loads((run / "run.json").read_text())["versions"],
        "losses": [{k: v for k, v in line.items() if k in ("step", "stage") or k.startswith("loss")} for line in lines],
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        golden = make(Path(folder))
    losses = ",\n".join(f"  {json.dumps(line)}" for line in golden.pop("losses"))
    OUT.write_text(json.dumps(golden, indent=1)[:-2] + f',\n "losses": [\n{losses}\n ]\n}}\n')
    print(OUT)
