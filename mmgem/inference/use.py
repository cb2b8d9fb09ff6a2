"""What the commands `caption`, `regions` and `embed` do, on files (`search`: see there).

Receives a model and paths. Gives rows or a file of vectors. Refuses files that are no pictures, boxes that are no
boxes of the picture, empty texts, and a split with too many broken samples, each by name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmgem.data.samples import SampleError, decode_image, parse_sample
from mmgem.data.shards import ShardedDataset
from mmgem.errors import UserError
from mmgem.inference.encode import refuse_if_broken
from mmgem.model import MMGem
from mmgem.progress import Progress

BATCH = 64
PROBE = "a picture"
"""Whose vector stands in a file of vectors for the model that made it."""
ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def load_model(path: Path, device: str = "auto") -> MMGem:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU; use auto or cpu")
    return MMGem.from_pretrained(path, device)


def read_image(path: Path) -> Image.Image:
    """RGB, turned as EXIF says."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (IsADirectoryError, PermissionError) as e:
        raise UserError(f"{path}: cannot be read as a picture ({e.strerror})") from None
    try:
        return decode_image(parse_sample(str(path), content, {"captions": ["-"]}))
    except SampleError as e:
        raise UserError(f"{path}: {e.reason}; give a JPEG, PNG or WebP that opens") from e


def caption_images(model: MMGem, paths: Sequence[Path], writing: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row a picture: image, caption."""
    for start in range(0, len(paths), BATCH):
        chunk = paths[start : start + BATCH]
        for path, caption in zip(chunk, model.caption([read_image(p) for p in chunk], **writing), strict=True):
            yield {"image": str(path), "caption": caption}


def parse_box(text: str) -> tuple[float, float, float, float]:
    try:
        x1, y1, x2, y2 = (float(v) for v in text.split(","))
    except ValueError:
        raise UserError(f"--box {text}: four numbers x1,y1,x2,y2 are needed, e.g. --box 10,20,110,90") from None
    return x1, y1, x2, y2


def check_box(box: Sequence[float], image: Image.Image, name: str) -> None:
    x1, y1, x2, y2 = box
    shown = ",".join(f"{v:g}" for v in box)
    if not (x2 > x1 and y2 > y1):
        raise UserError(f"{name}: box {shown} has no area; x2 must be above x1 and y2 above y1")
    if x1 < 0 or y1 < 0 or x2 > image.width or y2 > image.height:
        raise UserError(f"{name}: box {shown} reaches outside the picture of {image.width} x {image.height} pixels")


def describe_regions(
    model: MMGem,
    path: Path,
    boxes: Sequence[Sequence[float]],
    *,
    caption: bool,
    embed: bool,
    query: str | None,
    writing: dict[str, Any],
) -> list[dict[str, Any]]:
    """One row a box, all from one vision pass: box, and what was asked for of caption, vector, similarity."""
    image = read_image(path)
    seen = model.preprocess.window(*image.size)
    for box in boxes:
        check_box(box, image, str(path))
        if not model.sees(image, box):
            raise UserError(
                f"{path}: the model sees {seen} of this picture (resize: crop), and box {tuple(box)} lies outside"
            )
    if query is not None and not query.strip():
        raise UserError("--query: the text is empty")
    vectors_RE = model.region_vectors([image], [boxes])[0]
    unit_RE = torch.nn.functional.normalize(vectors_RE, dim=-1)
    rows: list[dict[str, Any]] = [{"image": str(path), "box": list(box)} for box in boxes]
    if caption:
        for row, text in zip(rows, model.write(vectors_RE, **writing), strict=True):
            row["caption"] = text
    if query is not None:
        for row, cosine in zip(rows, (unit_RE @ model.embed_texts([query])[0]).tolist(), strict=True):
            row["similarity"] = cosine
    if embed:
        for row, vector in zip(rows, unit_RE.tolist(), strict=True):
            row["vector"] = vector
    return rows


def embed_to_file(
    model: MMGem, out: Path, *, images: Sequence[Path] | None, texts: Path | None, data: Path | None
) -> tuple[int, int]:
    """Writes `vectors` (N x E float32, each of length 1), `names`, and `probe` (see `search`); gives N and E."""
    if out.suffix != ".npz":
        raise UserError(f"--out {out}: name a file that ends in .npz")
    if texts is not None:
        names, parts = _embed_texts(model, texts)
    else:
        pictures = _from_files(images) if images is not None else _from_split(data)
        names, parts = _embed_pictures(model, pictures)
    vectors_NE = np.concatenate(parts)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.unfinished.npz")
    np.savez(unfinished, vectors=vectors_NE, names=np.array(names), probe=model.embed_texts([PROBE])[0].numpy())
    unfinished.replace(out)
    return vectors_NE.shape[0], vectors_NE.shape[1]


def _embed_texts(model: MMGem, file: Path) -> tuple[list[str], list[np.ndarray]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as e:
        raise UserError(f"--texts {file}: not a readable text file ({type(e).__name__})") from None
    empty = [i + 1 for i, line in enumerate(lines) if not line.strip()]
    if empty or not lines:
        raise UserError(
            f"--texts {file}: {f'line {empty[0]} is empty' if empty else 'no lines'}; one text a line is needed"
        )
    if cut := sum(model.codec.encode(lines)[1]):
        limit = model.codec.max_tokens
        print(f"{cut} of {len(lines)} texts were longer than the model's {limit} tokens and cut", file=sys.stderr)
    return lines, [model.embed_texts(lines).numpy()]


def _embed_pictures(model: MMGem, pictures: Iterable[tuple[str, Image.Image]]) -> tuple[list[str], list[np.ndarray]]:
    names: list[str] = []
    parts: list[np.ndarray] = []
    waiting: list[Image.Image] = []
    with Progress("embedding", None, "pictures") as progress:

        def flush() -> None:
            if waiting:
                parts.append(model.embed_images(waiting).numpy())
                progress.advance(len(waiting))
                waiting.clear()

        for name, image in pictures:
            names.append(name)
            waiting.append(image)
            if len(waiting) == BATCH:
                flush()
        flush()
    if not parts:
        raise UserError("no pictures to embed")
    return names, parts


def _from_files(paths: Sequence[Path]) -> Iterator[tuple[str, Image.Image]]:
    for path in paths:
        if path.is_dir():
            for file in sorted(p for p in path.rglob("*") if p.suffix.lower() in ENDINGS):
                yield str(file), read_image(file)
        else:
            yield str(path), read_image(path)


def _from_split(split: Path | None) -> Iterator[tuple[str, Image.Image]]:
    assert split is not None
    dataset = ShardedDataset(split)
    skipped: list[str] = []
    for index in range(len(dataset)):
        try:
            sample = dataset.sample(index)
            image = decode_image(sample)
        except SampleError as e:
            print(f"skipped {e}", file=sys.stderr)
            skipped.append(str(e))
            refuse_if_broken(skipped, len(dataset))
        else:
            yield sample.key, image
    if skipped:
        print(f"{len(skipped)} of {len(dataset)} samples were broken and left out", file=sys.stderr)
