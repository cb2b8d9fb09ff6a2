"""10,000 mutated tars, indexes, records, pictures and sources: each ends in a sample or in an error that says why.

None may crash, hang, warn, or need more than some memory; `campaign` says how much. The inputs are always the same.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from campaign import INPUTS, MEGABYTES, SECONDS

# What must have come of some of the inputs, or they would try nothing: of a part, words of its `check`.
SEEN = {
    "tars": {"all whole", "some left out", "UserError"},
    "indexes": {"whole", "some broken", "all broken", "empty", "UserError"},
    "records": {"whole", "whole, parts dropped", "SampleError"},
    "pictures": {"whole", "broken image", "image too large"},
    "sources": {
        *(
            f"{name}: written"
            for name in ("jsonl", "karpathy", "coco", "visual_genome", "flickr30k_entities", "folder")
        ),
        *(f"{name}: UserError" for name in ("jsonl", "karpathy", "coco", "visual_genome")),
    },
}


def test_there_are_ten_thousand_inputs():
    assert sum(INPUTS.values()) == 10_000 and INPUTS.keys() == SEEN.keys()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is measured in /proc")
@pytest.mark.parametrize("part", INPUTS)
def test_no_input_is_worse_than_refused(part: str, tmp_path: Path):
    command = [sys.executable, str(Path(__file__).with_name("campaign.py")), part, str(INPUTS[part]), "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-4000:]
    result = json.loads(done.stdout)
    assert result["inputs"] == sum(result["outcomes"].values()) == INPUTS[part]
    assert SEEN[part] <= result["outcomes"].keys()
    assert result["seconds"] < SECONDS and result["megabytes"] < (1100 if part == "pictures" else MEGABYTES)
