"""Sample and Region: what one record is, parsed and validated.

Receives the bytes of a picture and the fields that lie beside it in a shard
(`{"captions": [...], "regions": [{"box": [...], "phrase": "..."}], "width": w, "height": h, ...}`,
or `{"caption": "..."}`, or the text of a KEY.txt). Gives a `Sample`, and the picture of one.
Refuses, with a `SampleError` that names the sample: a picture that cannot be read, and a sample
that is left with neither a caption nor a region. Bad captions, phrases and boxes of an otherwise
good sample are dropped and counted under the names below.

The box convention, which stands only here: a box is (x1, y1, x2, y2), floats, in absolute pixels
of the stored picture as it is seen (EXIF rotation applied), x to the right and y down from the top
left corner. Edges, not pixel centres: the whole picture is (0, 0, width, height), x2 and y2 are
exclusive, and the area is (x2 - x1) * (y2 - y1). A box that reaches over the border is clipped.
"""

from __future__ import annotations

import io
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

Box = tuple[float, float, float, float]
N = TypeVar("N", int, float)
T = TypeVar("T")

# The names under which dropped parts are counted; index files and reports print them as they are.
EMPTY_CAPTION = "empty caption"
EMPTY_PHRASE = "empty phrase"
BOX_OUTSIDE = "box outside image"
BOX_WITHOUT_AREA = "box without area"
BOX_NO_NUMBERS = "box is not four numbers"

# The reasons of a SampleError; stable, so that they can be counted.
NO_TEXT = "no caption and no region"
BROKEN_META = "broken metadata"
NO_IMAGE = "no image"
BROKEN_IMAGE = "broken image"
EMPTY_IMAGE = "empty image"
IMAGE_TOO_LARGE = "image too large"
SIZE_MISMATCH = "size differs from record"
DUPLICATE_KEY = "duplicate key"

# Pillow's own warning limit (a quarter of a gibibyte as RGB); above it a picture is taken for a
# decompression bomb, whatever Pillow's global setting says.
MAX_PIXELS = 89_478_485
# Of a progressive JPEG, which has about ten: each is few bytes, and takes its time over all pixels.
_MOST_SCANS = 100
# Bytes of a picture's file; of a record's JSON, of its text.
MOST_IMAGE = 256 << 20
MOST_TEXT = 16 << 20

# Pillow warns of odd EXIF, palettes and sizes, each in lines of its own: what cannot be read is a SampleError.
warnings.filterwarnings("ignore", module=r"PIL\.")

_HALF = re.compile("[\ud800-\udfff]")
_DEEPEST = 64
_OWN_FIELDS = ("captions", "caption", "regions", "width", "height")
_REGION_FIELDS = ("box", "phrase", "entity")
_EXIF_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Whose right, or lower, edge of the picture as seen is where the stored rows, or columns, begin.
_FROM_RIGHT, _FROM_BELOW = (2, 3, 6, 7), (3, 4, 7, 8)


class SampleError(Exception):
    """One sample cannot be used. `key` names it, `reason` is one of a few stable phrases.

    `shard` is set where the fault is that of a whole shard: it then names the tar, and every sample of it is broken.
    """

    def __init__(self, key: str, reason: str, detail: str = "", shard: str | None = None) -> None:
        super().__init__(key, reason, detail, shard)
        self.key = key
        self.reason = reason
        self.detail = detail
        self.shard = shard

    def __str__(self) -> str:
        what = f"sample {self.key}" if self.shard is None else f"shard {self.shard}"
        return f"{what}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True, slots=True)
class Region:
    """A box of a picture and the phrase that names it.

    `entity` is equal for the phrases and boxes of one picture that mean the same thing.
    """

    box: Box
    phrase: str
    entity: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture with its texts. Not empty: at least one caption or one region.

    `image` is the encoded picture; `width` and `height` are pixels after EXIF rotation. `meta` has
    every other field of the record; its entry "regions", where there is one, has the other fields
    of each region, in the order of `regions`. `dropped` names what was left out of it.
    """

    key: str
    image: bytes = field(repr=False)
    captions: tuple[str, ...]
    regions: tuple[Region, ...]
    width: int
    height: int
    meta: dict[str, Any]
    dropped: tuple[str, ...] = field(default=(), compare=False)


@dataclass
class Tally:
    """What was left out: `skipped` samples and `dropped` parts by reason, the first keys of each.

    `examples` has at most `keep` lines a reason, each with the key and the detail of the error.
    """

    skipped: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    keep: int = 5

    def skip(self, error: SampleError) -> None:
        self.skipped[error.reason] += 1
        listed = self.examples.setdefault(error.reason, [])
        if len(listed) < self.keep:
            listed.append(f"{error.key} ({error.detail})" if error.detail else error.key)

    @property
    def broken(self) -> int:
        """Skipped samples that are damaged; a repeated key is none."""
        return self.skipped.total() - self.skipped[DUPLICATE_KEY]


def parse_sample(key: str, image: bytes, meta: Mapping[str, Any] | str, counts: Counter[str] | None = None) -> Sample:
    """The validated sample; `meta` is a JSON object of a shard or the text of a KEY.txt.

    Texts lose the white space around them and are otherwise kept as they are. Where `meta` has no
    width and height, they are read from the head of the picture; the picture is not decoded. What
    is dropped is added to `counts`. Raises SampleError when nothing is left, when `meta` has
    another shape than the one above, and when the size has to be read and the head is broken.
    """
    dropped: Counter[str] = Counter()
    if isinstance(meta, str):
        meta = {"caption": meta}
    captions = parse_captions(key, meta, dropped)
    width, height = _stored_size(meta) or image_size(key, image)
    regions, extras = _parse_regions(key, meta, width, height, dropped)
    if counts is not None:
        counts.update(dropped)
    if not captions and not regions:
        raise SampleError(key, NO_TEXT)
    rest = {name: value for name, value in meta.items() if name not in _OWN_FIELDS}
    if any(extras):
        rest["regions"] = extras
    return Sample(key, image, captions, regions, width, height, rest, tuple(dropped.elements()))


def parse_captions(key: str, meta: Mapping[str, Any] | str, counts: Counter[str] | None = None) -> tuple[str, ...]:
    """The captions of a record, the empty ones dropped and counted. Raises SampleError."""
    if isinstance(meta, str):
        meta = {"caption": meta}
    if not isinstance(meta, Mapping):
        raise SampleError(key, BROKEN_META, f"an object is expected, not {_kind(meta)}")
    if "captions" in meta:
        listed = meta["captions"]
        if not isinstance(listed, list | tuple):
            raise SampleError(key, BROKEN_META, f"captions: {_kind(listed)} instead of a list")
    else:
        listed = [meta["caption"]] if "caption" in meta else []
    captions = []
    for caption in listed:
        if caption is not None and not isinstance(caption, str):
            raise SampleError(key, BROKEN_META, f"a caption is {_kind(caption)} instead of text")
        if caption and caption.strip():
            captions.append(_unicode(key, caption.strip()))
        elif counts is not None:
            counts[EMPTY_CAPTION] += 1
    return tuple(captions)


def merge_texts(key: str, record: bytes, text: bytes) -> dict[str, Any]:
    """The fields of KEY.json; where it has no caption, KEY.txt is the caption. Raises SampleError."""
    try:
        meta = json.loads(record) if record else {}
        if record.count(b"[") + record.count(b"{") > _DEEPEST:
            shallow(meta)
        caption = text.decode("utf-8")
    except (ValueError, RecursionError) as error:
        raise SampleError(key, BROKEN_META, str(error)) from error
    if not isinstance(meta, dict):
        raise SampleError(key, BROKEN_META, f"an object is expected, not {type(meta).__name__}")
    if text and meta.get("captions") is None and meta.get("caption") is None:
        meta = {k: v for k, v in meta.items() if k != "captions"} | {"caption": caption}
    return meta


def shallow(content: T) -> T:
    """The content of a JSON file, unless it is nested deeper than records are: pickle, for one, cannot go as deep as
    JSON. Raises ValueError."""
    level: list[Any] = [content]
    for _ in range(_DEEPEST):
        level = [part for item in level if isinstance(item, dict | list) for part in _parts(item)]
        if not level:
            return content
    raise ValueError(f"nested deeper than {_DEEPEST} levels")


def record_of(sample: Sample) -> dict[str, Any]:
    """The JSON object of a sample: `parse_sample(key, image, record_of(sample)) == sample`."""
    rest = dict(sample.meta)
    extras = rest.pop("regions", None) or [{}] * len(sample.regions)
    regions = []
    for region, extra in zip(sample.regions, extras, strict=True):
        entity = {} if region.entity is None else {"entity": region.entity}
        regions.append({"box": list(region.box), "phrase": region.phrase, **entity, **extra})
    record: dict[str, Any] = {"captions": list(sample.captions)}
    if regions:
        record["regions"] = regions
    return {**record, "width": sample.width, "height": sample.height, **rest}


class OpenedPicture:
    """The picture of a sample, its head read: its `size`, (width, height) as it is seen, is known before its pixels.

    Only a JPEG waits for `decode`; a picture of another format is decoded here. Raises SampleError.
    """

    def __init__(self, sample: Sample) -> None:
        self._sample = sample
        self._file = _open(sample.key, sample.image)
        if not isinstance(self._file, JpegImageFile):
            self._load()  # a PNG may have its EXIF at the end
        self._orientation = _orientation(self._file)
        self.size = _turned(self._file.size, self._orientation)

    def decode(self, needed: tuple[int, int] | None = None) -> Image.Image:
        """The picture as RGB, EXIF rotation applied; to be called once. Raises SampleError.

        A JPEG is decoded at the smallest of the scales 1/1, 1/2, 1/4 and 1/8 that leaves it the width and height
        `needed`, in pixels; without, and in another format, it comes in its full size. Transparency is dropped, grey
        of 16 bits is scaled to 8. Refuses a sample with boxes whose recorded size is not that of its picture: the
        boxes are then pixels of another one.
        """
        drafted = needed and self._file.draft(None, _turned(needed, self._orientation))
        self._load()
        image = self._upright_rgb()
        sample, (width, height) = self._sample, self.size
        if sample.regions and self.size != (sample.width, sample.height):
            sizes = f"record {sample.width}x{sample.height}, picture {width}x{height}"
            raise SampleError(sample.key, SIZE_MISMATCH, sizes)
        if drafted:
            width, height = _turned(drafted[1][2:], self._orientation)
        left = image.width - width if self._orientation in _FROM_RIGHT else 0
        top = image.height - height if self._orientation in _FROM_BELOW else 0
        self._shown = (left, top, left + width, top + height)
        return image

    def place(self, box: Box) -> Box:
        """A box of the full picture -> where it lies in the decoded one, in its pixels.

        A picture 99 pixels wide fills 49.5 of the 50 that it has at 1/2: what lies beyond is padding of the JPEG.
        """
        left, top, right, bottom = self._shown
        x, y = (right - left) / self.size[0], (bottom - top) / self.size[1]
        return (left + box[0] * x, top + box[1] * y, left + box[2] * x, top + box[3] * y)

    def _load(self) -> None:
        try:
            self._file.load()
        except Exception as error:  # Pillow's decoders raise nearly any type on broken data
            raise SampleError(self._sample.key, BROKEN_IMAGE, str(error)) from error

    def _upright_rgb(self) -> Image.Image:
        image: Image.Image = self._file
        try:
            if image.mode.startswith("I;16"):
                # Pillow's convert("RGB") would cut at 255 and give a white picture.
                image = image.point(lambda level: level * (1 / 256) + 0).convert("L")
            if image.mode != "RGB":
                image = image.convert("RGB")
        except Exception as error:
            raise SampleError(self._sample.key, BROKEN_IMAGE, str(error)) from error
        if self._orientation != 1:
            image = image.transpose(_TRANSPOSE[self._orientation])
            image.info = {}  # or the next reader of its EXIF would turn it again
        return image


def decode_image(sample: Sample) -> Image.Image:
    """The whole picture, in its full size: `OpenedPicture(sample).decode()`."""
    return OpenedPicture(sample).decode()


def image_size(key: str, image: bytes) -> tuple[int, int]:
    """(width, height) after EXIF rotation, from the head of the file. Raises SampleError."""
    opened = _open(key, image)
    return _turned(opened.size, _orientation(opened))


def clip_box(values: Any, width: float, height: float) -> Box | str:
    """The box cut to the picture, or the name under which a useless one is counted."""
    if not isinstance(values, list | tuple) or len(values) != 4:
        return BOX_NO_NUMBERS
    try:
        x1, y1, x2, y2 = (float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        return BOX_NO_NUMBERS
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        return BOX_NO_NUMBERS
    if x2 <= x1 or y2 <= y1:
        return BOX_WITHOUT_AREA
    x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    if x2 <= x1 or y2 <= y1:
        return BOX_OUTSIDE
    return (x1, y1, x2, y2) if (x2 - x1) * (y2 - y1) > 0 else BOX_WITHOUT_AREA  # 1e-200 times itself is 0


def _parse_regions(
    key: str, meta: Mapping[str, Any], width: int, height: int, counts: Counter[str]
) -> tuple[tuple[Region, ...], list[dict[str, Any]]]:
    """The good regions and, in the same order, their other fields."""
    listed = meta.get("regions") or []
    if not isinstance(listed, list | tuple):
        raise SampleError(key, BROKEN_META, f"regions: {_kind(listed)} instead of a list")
    regions, extras = [], []
    for item in listed:
        if not isinstance(item, Mapping):
            raise SampleError(key, BROKEN_META, f"a region is {_kind(item)}, not an object")
        phrase, entity = item.get("phrase"), item.get("entity")
        if phrase is not None and not isinstance(phrase, str):
            raise SampleError(key, BROKEN_META, f"a phrase is {_kind(phrase)} instead of text")
        if entity is not None and not isinstance(entity, str | int | float):
            raise SampleError(key, BROKEN_META, f"an entity is {_kind(entity)} instead of text or a number")
        box = clip_box(item.get("box"), width, height)
        if not phrase or not phrase.strip():
            counts[EMPTY_PHRASE] += 1
        elif isinstance(box, str):
            counts[box] += 1
        else:
            name = None if entity is None else _unicode(key, str(entity))
            regions.append(Region(box, _unicode(key, phrase.strip()), name))
            extras.append({k: v for k, v in item.items() if k not in _REGION_FIELDS})
    return tuple(regions), extras


def _stored_size(meta: Mapping[str, Any]) -> tuple[int, int] | None:
    """Width and height of the record where both are there and can be true."""
    width, height = meta.get("width"), meta.get("height")
    if type(width) is int and type(height) is int and width > 0 and height > 0 and width * height <= MAX_PIXELS:
        return width, height
    return None


def is_unicode(text: str) -> bool:
    """Whether it can be written: JSON may hold halves of a pair of UTF-16, which no tokenizer and no file takes."""
    return text.isascii() or _HALF.search(text) is None


def _unicode(key: str, text: str) -> str:
    """Raises SampleError."""
    if not is_unicode(text):
        raise SampleError(key, BROKEN_META, f"text that is no Unicode: {text[:40]!a}")
    return text


def _open(key: str, image: bytes) -> Image.Image:
    """The picture with its head read and its size checked, not decoded."""
    if not image:
        raise SampleError(key, EMPTY_IMAGE, "0 bytes")
    try:
        opened = Image.open(io.BytesIO(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SampleError(key, IMAGE_TOO_LARGE, str(error)) from error
    except Exception as error:  # Pillow's readers raise nearly any type on broken data
        detail = "not a picture" if type(error) is not OSError else str(error)
        raise SampleError(key, BROKEN_IMAGE, detail) from error
    width, height = opened.size
    if width * height > MAX_PIXELS:
        raise SampleError(key, IMAGE_TOO_LARGE, f"{width} x {height} pixels")
    if opened.format == "EPS":  # a program, which Pillow lets Ghostscript run, without end if it has none
        raise SampleError(key, BROKEN_IMAGE, "EPS is no picture")
    if "progressive" in opened.info and (scans := image.count(b"\xff\xda")) > _MOST_SCANS:
        raise SampleError(key, BROKEN_IMAGE, f"{scans} scans")
    return opened


def _orientation(image: Image.Image) -> int:
    """EXIF orientation from 1 to 8; 1 where there is none."""
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # broken EXIF says nothing of the picture itself, which may be whole
        return 1
    return orientation if orientation in _TRANSPOSE else 1


def _turned(size: tuple[N, N], orientation: int) -> tuple[N, N]:
    """The size as stored <-> as seen."""
    return (size[1], size[0]) if orientation >= 5 else size


def _parts(item: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return item.values() if isinstance(item, dict) else item


def _kind(value: object) -> str:
    return type(value).__name__
