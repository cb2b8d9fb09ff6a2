"""`mmgem eval retrieval` for a model of open_clip, alone or beside ours: the same data, protocol and report.

    python eval/run_open_clip.py --model ViT-B-32 --pretrained laion2b_s34b_b79k --mmgem runs/flickr8k \\
        --data data/flickr8k --split val --out runs/flickr8k/beside

`--pretrained` is a tag, which open_clip downloads, or a file. Without it a config's weights are random, and those of
`--model local-dir:FOLDER` are the folder's (`open_clip_config.json`, `open_clip_model.safetensors`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from adapters.open_clip import load_open_clip
from mmgem.errors import UserError
from mmgem.evaluation.run import evaluate


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run_open_clip.py", description="mmgem eval retrieval for open_clip models.")
    parser.add_argument("--model", required=True, help="a config's name, or local-dir:FOLDER, or hf-hub:ORG/NAME")
    parser.add_argument("--pretrained", help="a tag or a file")
    parser.add_argument("--mmgem", type=Path, help="one of our models, to compare with")
    parser.add_argument("--data", type=Path, required=True, help="a folder of `mmgem data prepare`")
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", type=Path, required=True, help="gets metrics.json and report.html")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args(argv)
    try:
        models: dict[str, Any] = {args.model: load_open_clip(args.model, args.pretrained, args.device)}
        if args.mmgem is not None:
            models[args.mmgem.resolve().name] = args.mmgem
        results = evaluate(models, args.data, args.split, ["retrieval"], args.out, device=args.device)
    except UserError as error:
        print(f"run_open_clip: error: {error}", file=sys.stderr)
        return 2
    for name, tasks in results.items():
        figures = tasks["retrieval"].metrics
        print(f"{name}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items() if "recall" in k))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
