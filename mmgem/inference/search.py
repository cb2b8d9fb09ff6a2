"""What the command `search` does: the nearest of a file of vectors to texts or pictures.

Receives a model, and a file that `mmgem embed` wrote, perhaps with another. Gives the best names with their cosines.
Refuses, with a UserError, a file that is none, and one that another model made: of another width, or with another
vector for the same text.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmgem.errors import UserError
from mmgem.inference.use import PROBE, read_image
from mmgem.model import MMGem

_SAME = 0.999  # cosine: another machine, or bfloat16 weights, are still the same model
_UNIT = 0.01
_ROWS = 65_536  # of the file, at a time


@dataclass(slots=True)
class Index:
    """vectors_NE: float32, each of length 1, of what `names` says."""

    vectors_NE: np.ndarray
    names: list[str]


def open_index(path: Path, model: MMGem) -> Index:
    """Raises UserError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {name: np.asarray(file[name]) for name in ("vectors", "names", "probe") if name in file}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `mmgem embed` writes one") from None
    except (ValueError, TypeError, KeyError, AttributeError, OSError, EOFError, zlib.error, zipfile.BadZipFile) as e:
        raise UserError(f"{path}: not what `mmgem embed` writes ({e!r:.100}); embed again") from e
    vectors_NE, names, probe_E = (content.get(name, np.zeros(0)) for name in ("vectors", "names", "probe"))
    if vectors_NE.ndim != 2 or vectors_NE.dtype.kind != "f" or names.shape != vectors_NE.shape[:1] or not len(names):
        raise UserError(
            f"{path}: not what `mmgem embed` writes (vectors {vectors_NE.dtype} {vectors_NE.shape}, names "
            f"{names.shape}); embed again"
        )
    width = model.config.embed_dim
    if vectors_NE.shape[1] != width:
        raise UserError(
            f"{path}: its vectors have {vectors_NE.shape[1]} numbers, those of this model {width}: another model made "
            "it; name that model, or embed again with this one"
        )
    lengths_N = np.linalg.norm(vectors_NE.astype(np.float32), axis=1)
    if not np.all(np.abs(lengths_N - 1) < _UNIT):
        raise UserError(
            f"{path}: vector {int(np.argmax(~(np.abs(lengths_N - 1) < _UNIT)))} is not of length 1; embed again"
        )
    if "probe" in content:
        own_E = model.embed_texts([PROBE])[0].numpy()
        if probe_E.shape != own_E.shape or probe_E.dtype.kind != "f" or not float(probe_E @ own_E) >= _SAME:
            raise UserError(f"{path}: another model made these vectors; name that model, or embed again with this one")
    return Index(vectors_NE.astype(np.float32), [str(name) for name in names.tolist()])


def search(
    model: MMGem, index: Index, *, texts: Sequence[str] = (), images: Sequence[Path] = (), count: int = 10
) -> Iterator[dict[str, Any]]:
    """One row a query: `query`, and `found`: name and cosine of the nearest, best first. Raises UserError."""
    if count < 1:
        raise UserError(f"-k {count}: at least 1")
    for text in texts:
        if not text.strip():
            raise UserError("--text: the text is empty")
        if not _whole(text):
            raise UserError(f"--text {text!r}: no text in UTF-8")
    pictures: list[Image.Image] = [read_image(path) for path in images]
    parts = [model.embed_texts(list(texts)).numpy()] if texts else []
    parts += [model.embed_images(pictures).numpy()] if pictures else []
    if not parts:
        raise UserError("nothing to search for: give --text or --image")
    for query, vector_E in zip([*texts, *map(str, images)], np.concatenate(parts), strict=True):
        cosine_N = np.concatenate(
            [index.vectors_NE[n : n + _ROWS] @ vector_E for n in range(0, len(index.vectors_NE), _ROWS)]
        )
        best = np.argsort(-cosine_N, kind="stable")[:count]
        yield {"query": query, "found": [{"name": index.names[n], "cosine": float(cosine_N[n])} for n in best]}


def _whole(text: str) -> bool:
    """Without halves of characters, which the command line makes of bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
