"""The file that launchers name: `python train.py --config FILE …` is `mmgem train --config FILE …`."""

import sys

from mmgem.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["train", *sys.argv[1:]]))
