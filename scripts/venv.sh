#!/bin/sh
# Makes .venv with mmgem and what its tests need; leaves a good one alone, makes a broken or outdated one anew.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
stamp=.venv/.made-for
wanted=$(cksum < pyproject.toml)

good() {
    [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] &&
        [ "$(.venv/bin/python -c 'import sys; print(sys.prefix)' 2>/dev/null)" = "$(pwd -P)/.venv" ] &&
        .venv/bin/python -c 'import torch, torchvision.ops, transformers, lightning, pytest, mmgem' 2>/dev/null
}

if good; then exit 0; fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "mmgem needs Python 3.11 or newer; '$python' is not. Name another: make PYTHON=python3.12 …" >&2
    exit 2
fi
echo "making .venv (a few minutes, about 6 GB)" >&2
rm -rf .venv
"$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
echo "$wanted" > "$stamp"
if ! good; then
    echo "the new .venv does not work; run .venv/bin/python -c 'import torch, torchvision.ops, mmgem' to see why" >&2
    exit 1
fi
