"""`mmgem data check`: every planted fault is named and nothing else; leaks are found, look-alikes are not."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import math
import re
import shutil
import struct
import subprocess
import tarfile
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from mmgem.data.audit import findings as reasons
from mmgem.data.audit.check import check_data
from mmgem.data.audit.duplicates import Duplicates
from mmgem.data.audit.hashes import hashes, near_pairs, thumbnail
from mmgem.data.audit.histogram import histogram, summary
from mmgem.data.index import Index, ShardEntry, write_index
from mmgem.data.samples import parse_sample
from mmgem.data.scenes import render_scene
from mmgem.data.writer import ShardWriter, Totals, shard_entry
from mmgem.errors import UserError

Record = tuple[str, bytes, Any]
HOSTILE = "<script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\">"


def photo(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """Random structure at several scales, as photos have it."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for cells, weight in ((2, 60.0), (5, 40.0), (16, 25.0), (60, 10.0)):
        rough = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += weight * (np.asarray(rough.resize((width, height), Image.Resampling.BICUBIC)) / 127.5 - 1)
    return Image.fromarray(np.clip(total + 128, 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def record(key: str, image: bytes, **fields: Any) -> Record:
    return key, image, {"captions": [f"caption of {key}"], **fields}


def add(tar: tarfile.TarFile, name: str, data: bytes) -> list[int]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    return [tar.offset - -(-len(data) // 512) * 512, len(data)]


def write_shard(
    folder: Path,
    number: int,
    records: Sequence[Record],
    change: Callable[[dict[str, dict[str, list[int]]], bytearray], None] = lambda members, content: None,
) -> ShardEntry:
    """A shard as no writer of the project makes it: anything may be in it. `change` damages it before it is indexed."""
    members = {}
    tar_path = folder / f"shard-{number:06d}.tar"
    with tarfile.open(tar_path, "w") as tar:
        for key, image, meta in records:
            text = meta if isinstance(meta, bytes) else json.dumps(meta).encode()
            members[key] = {"jpg": add(tar, f"{key}.jpg", image), "json": add(tar, f"{key}.json", text)}
    content = bytearray(tar_path.read_bytes())
    change(members, content)
    tar_path.write_bytes(content)
    return shard_entry(folder, number, tar_path.name, tar_path, members)


def write_split(folder: Path, records: Sequence[Record], shard_size: int = 50) -> Path:
    with ShardWriter(folder, shard_size) as writer:
        for key, image, meta in records:
            writer.write(parse_sample(key, image, meta))
    return folder


def check(location: Path | str, out: Path, **options: Any) -> tuple[int, dict[str, Any]]:
    code = check_data(location, out=out, **{"processes": 1, **options})
    return code, json.loads((out / "check.json").read_text())


def named(split: Mapping[str, Any]) -> dict[str, list[str]]:
    return {row["reason"]: [Path(one["name"]).name for one in row["named"]] for row in split["findings"]}


def bomb() -> bytes:
    """The head of a PNG of 30,000 x 30,000 pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT5\xaf\x06\x1e"


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """One fault of each kind."""
    data, images = tmp_path / "data", map(photo, range(1000))
    train = data / "train"
    train.mkdir(parents=True)

    def good(count: int, prefix: str) -> list[Record]:
        return [record(f"{prefix}{n}", jpeg(next(images))) for n in range(count)]

    def box(*values: float, phrase: str = "thing") -> dict[str, Any]:
        return {"box": values, "phrase": phrase}

    samples = [
        *good(3, "good"),
        record("cut", jpeg(next(images))[:900]),
        record("zero", b""),
        record("words", b"this is no picture"),
        record("bomb", bomb()),
        ("brokenjson", jpeg(next(images)), b'{"captions": ["a'),
        record("notext", jpeg(next(images)), captions=[" "]),
        record("smaller", jpeg(next(images)), width=320, height=240, regions=[box(0, 0, 300, 200)]),
        record("noboxes", jpeg(next(images)), width=320, height=240),
        record("emptycaption", jpeg(next(images)), captions=["", "a", "  "]),
        record("emptyphrase", jpeg(next(images)), regions=[box(0, 0, 9, 9, phrase="")]),
        record("outside", jpeg(next(images)), regions=[box(200, 0, 300, 9), box(0, 0, 20, 20)]),
        record("flat", jpeg(next(images)), regions=[box(5, 5, 5, 9)]),
        record("nan", jpeg(next(images)), regions=[box(0, 0, math.nan, 9)]),
        record("clipped", jpeg(next(images)), regions=[box(-4, 0, 20, 20), box(0, 0, 160.5, 120)]),
    ]

    def misplace(members: dict[str, dict[str, list[int]]], content: bytearray) -> None:
        members["off0"]["jpg"][0] += 512
        members["off1"]["json"] = [len(content), 40]
        members["off2"]["json"] = members["off3"]["json"]

    def rot(members: dict[str, dict[str, list[int]]], content: bytearray) -> None:
        content[members["torn0"]["json"][0] - 500] ^= 255  # in a header: what follows is reached by offset only

    shards = [
        write_shard(train, 0, samples),
        write_shard(train, 1, [record("good1", jpeg(next(images)))]),
        *(write_shard(train, number, good(2, f"shard{number}_")) for number in (2, 3, 4, 5)),
        write_shard(train, 6, good(4, "off"), misplace),
        write_shard(train, 7, good(2, "torn"), rot),
    ]
    totals = vars(Totals(sum(shard.samples for shard in shards)))
    write_index(train, Index(shards, totals))
    with (train / "shard-000002.tar").open("r+b") as file:
        file.truncate(shards[2].bytes - 512)
    (train / "shard-000003.tar").unlink()
    with (train / "shard-000004.tar").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    (train / "members/000005.json").write_text("{}")
    write_split(data / "val", good(3, "val"))
    return data


def test_every_planted_fault_is_named_and_nothing_else(
    faulty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    code, found = check(faulty, tmp_path / "out")
    assert code == 1 and not found["passed"]
    assert named(found["splits"]["train"]) == {
        "shard cut short": ["shard-000002.tar"],
        reasons.UNREADABLE: ["shard-000003.tar"],
        "shard has another checksum": ["shard-000004.tar"],
        "shard's members file changed": ["shard-000005.tar"],
        reasons.BROKEN_TAR: ["shard-000007.tar"],
        reasons.OFF_MEMBER: ["off0", "off1", "off2"],
        "duplicate key": ["good1"],
        "broken image": ["cut", "words"],
        "empty image": ["zero"],
        "image too large": ["bomb"],
        "broken metadata": ["brokenjson"],
        "no caption and no region": ["notext"],
        "size differs from record": ["smaller"],
        reasons.OTHER_SIZE: ["noboxes"],
        "empty caption": ["emptycaption"],
        "empty phrase": ["emptyphrase"],
        "box outside image": ["outside"],
        "box without area": ["flat"],
        "box is not four numbers": ["nan"],
        reasons.BOX_OVER_BORDER: ["clipped"],
    }
    counts = {row["reason"]: row["count"] for row in found["splits"]["train"]["findings"]}
    assert counts["empty caption"] == 2 and counts[reasons.OFF_MEMBER] == 3
    assert {row["reason"] for row in found["splits"]["train"]["findings"] if not row["fails"]} < reasons.WARNINGS
    told = found["splits"]["train"]["counts"]
    assert (told["samples"], told["broken"], told["unread"]) == (16, 10, 6)
    assert found["splits"]["val"]["findings"] == [] and found["leaks"] == []
    page = (tmp_path / "out/check.html").read_text()
    for name in ("brokenjson", "shard-000003.tar", "off2"):
        assert name in page
    screen = capsys.readouterr().out
    assert "FAILS  train: 3 × file is not where the index says: off0 (" in screen and "the check failed" in screen


def test_several_processes_find_the_same_as_one(faulty: Path, tmp_path: Path):
    found = [check(faulty, tmp_path / str(n), processes=n)[1] for n in (1, 3)]
    assert all(one.pop("seconds") >= 0 for one in found)
    assert found[0] == found[1]


def test_without_decoding_only_what_the_head_shows_is_found(faulty: Path, tmp_path: Path):
    code, found = check(faulty / "train", tmp_path / "out", decode=False)
    assert code == 1 and list(found["splits"]) == ["train"]
    names = named(found["splits"]["train"])
    assert names["broken image"] == ["words"]  # not the one that was cut
    assert names["size differs from record"] == ["smaller"] and names["image too large"] == ["bomb"]


def test_a_clean_dataset_passes_and_its_figures_are_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    region = {"box": [0, 0, 80, 60], "phrase": "a red thing"}
    for split, first in (("train", 0), ("val", 7)):
        records = [
            record(f"k{n}", jpeg(photo(n)), captions=["one two", "one two three"][: 1 + n % 2], regions=[region])
            for n in range(first, first + 7)
        ]
        write_split(tmp_path / "data" / split, records, 3)
    assert check_data(tmp_path / "data", processes=1) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    found = json.loads((tmp_path / "data/check/check.json").read_text())
    train = found["splits"]["train"]
    assert found["passed"] and train["findings"] == [] and train["duplicates"]["pairs"] == []
    assert train["counts"] | {"bytes": 0} == {
        **{"samples": 7, "captions": 10, "regions": 7, "images_without_captions": 0},
        **{"broken": 0, "unread": 0, "shards": 3, "bytes": 0},
    }
    spread = train["distributions"]
    assert spread["caption_words"]["values"] == [[2, 7], [3, 3]]
    assert spread["phrase_words"]["values"] == [[3, 7]] and spread["width"]["values"] == [[160, 7]]
    assert spread["box_area"]["values"] == [[0.25, 7]] and spread["aspect"]["values"] == [[1.33, 7]]
    # The folder of the check is no split, and a second check replaces the first.
    assert check_data(tmp_path / "data", processes=1) == 0
    assert sorted(path.name for path in (tmp_path / "data/check").iterdir()) == ["check.html", "check.json"]


def test_an_index_that_counts_otherwise_fails(tmp_path: Path):
    write_split(tmp_path / "data/train", [record(f"k{n}", jpeg(photo(n))) for n in range(3)])
    path = tmp_path / "data/train/index.json"
    tree = json.loads(path.read_text())
    tree["totals"]["captions"] = 4
    path.write_text(json.dumps(tree))
    code, found = check(tmp_path / "data", tmp_path / "out")
    assert code == 1 and named(found["splits"]["train"]) == {reasons.OTHER_TOTALS: ["captions"]}


# --- duplicates -------------------------------------------------------------------------------------------------------


def variants(image: Image.Image) -> dict[str, bytes]:
    width, height = image.size

    def cut(share: float) -> Image.Image:
        x, y = width * share / 2, height * share / 2
        return image.crop((round(x), round(y), round(width - x), round(height - y)))

    return {
        "same": jpeg(image),
        "encoded": jpeg(image, 30),
        "half": jpeg(image.resize((width // 2, height // 2), Image.Resampling.BICUBIC)),
        "bright": jpeg(ImageEnhance.Brightness(image).enhance(1.2)),
        "grey": jpeg(image.convert("L")),
        "cut2": jpeg(cut(0.02)),
        "cut20": jpeg(cut(0.2)),
        "mirrored": jpeg(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    }


def test_leaks_are_found_however_they_were_encoded_and_named_with_their_partners(tmp_path: Path):
    write_split(tmp_path / "data/train", [record(f"t{n}", jpeg(photo(n))) for n in range(40)], 7)
    kinds = list(variants(photo(0)))
    copies = [record(f"v{n}_{kind}", variants(photo(n))[kind]) for n, kind in enumerate(kinds * 4)]
    write_split(tmp_path / "data/val", [*copies, *(record(f"w{n}", jpeg(photo(n))) for n in range(100, 110))], 7)
    code, found = check(tmp_path / "data", tmp_path / "out")
    (leak,) = found["leaks"]
    assert code == 1 and leak["splits"] == ["train", "val"]
    pairs = {pair["keys"][1]: pair for pair in leak["pairs"]}
    assert all(pair["keys"][0] == "t" + key[1:].split("_")[0] for key, pair in pairs.items())
    seen = [key.split("_")[1] for key in pairs]
    assert {kind: seen.count(kind) for kind in kinds} == {
        **dict.fromkeys(("same", "encoded", "half", "bright", "grey", "cut2"), 4),
        **{"cut20": 0, "mirrored": 0},
    }
    assert all(pair["identical"] == ("same" in key) for key, pair in pairs.items())
    assert leak["pictures"] == [24, 24] and (leak["identical"], leak["near"]) == (4, 20)
    page = (tmp_path / "out/check.html").read_text()
    assert page.count('<div class="pair">') == 24 and "v0_same" in page


def test_five_hundred_scenes_that_look_alike_are_no_duplicates(tmp_path: Path):
    for split in ("train", "val"):
        records = [record(f"{split}{n}", jpeg(render_scene(0, split, n).image, 95)) for n in range(250)]
        write_split(tmp_path / "data" / split, records)
    code, found = check(tmp_path / "data", tmp_path / "out")
    assert code == 0 and found["leaks"] == []
    assert all(split["duplicates"]["pairs"] == [] for split in found["splits"].values())


def test_plain_pictures_are_duplicates_by_their_bytes_only(tmp_path: Path):
    flat = {n: Image.new("RGB", (64, 48), (n * 40, 90, 200)) for n in range(4)}
    noise = np.random.default_rng(0).integers(118, 138, (2, 48, 64, 3), dtype=np.uint8)
    train = [
        *(record(f"t{n}", jpeg(image)) for n, image in flat.items()),
        record("tn", jpeg(Image.fromarray(noise[0]))),
    ]
    val = [record("v0", jpeg(flat[0], 70)), record("v1", jpeg(flat[1])), record("vn", jpeg(Image.fromarray(noise[1])))]
    write_split(tmp_path / "data/train", train)
    write_split(tmp_path / "data/val", [*val, record("v1again", jpeg(flat[1]))])
    _, found = check(tmp_path / "data", tmp_path / "out")
    assert [pair["keys"] for pair in found["leaks"][0]["pairs"]] == [["t1", "v1"], ["t1", "v1again"]]
    assert [pair["keys"] for pair in found["splits"]["val"]["duplicates"]["pairs"]] == [["v1", "v1again"]]
    assert found["splits"]["train"]["duplicates"]["plain_pictures"] == 5


def test_the_bands_miss_no_pair_that_all_against_all_would_find():
    images = [photo(n, 80, 60) for n in range(120)]
    shown = images + [Image.open(io.BytesIO(data)) for n in range(30) for data in variants(images[n]).values()]
    thumbs = np.stack([thumbnail(image) for image in shown])
    bits = hashes(thumbs)
    pairs = [np.stack([i, j], axis=1) for i, j, _ in near_pairs(bits, thumbs, np.arange(len(shown)))]
    found = list(map(tuple, np.sort(np.concatenate(pairs), axis=1).tolist()))
    cells = thumbs.astype(float).reshape(-1, 16, 16)
    edges = np.stack([np.diff(cells, axis=axis).reshape(len(shown), -1) for axis in (1, 2)], 1).reshape(len(shown), -1)
    grey, edge = np.corrcoef(cells.reshape(len(shown), -1)), (edges / np.linalg.norm(edges, axis=1)[:, None])
    wanted = set(zip(*np.nonzero(np.triu((grey >= 0.97) & (edge @ edge.T >= 0.85), 1)), strict=True))
    assert len(wanted) > 30 * 10 and len(found) == len(wanted) == len(wanted & {*found})


def test_many_copies_of_one_picture_make_as_many_pairs_as_pictures():
    noise = np.random.default_rng(0).integers(0, 3, (3001, 256), dtype=np.uint8)
    thumbs = np.stack([thumbnail(photo(0))] * 3000 + [thumbnail(photo(1))]) // 2 + noise
    digests = np.arange(1, 3002, dtype=np.uint64)  # other bytes each
    found = Duplicates(digests, hashes(thumbs), thumbs, [range(0, 2000), range(2000, 3001)])
    pairs = found.across[0, 1].pairs_P2
    assert len(pairs) <= 3000 and set(pairs[:, 0]) == set(range(2000)) and set(pairs[:, 1]) == set(range(2000, 3000))
    assert set(found.within[1].pairs_P2.ravel()) == set(range(2000, 3000))


def test_keys_that_two_splits_share_are_only_said(tmp_path: Path):
    for split, first in (("train", 0), ("val", 50)):
        write_split(tmp_path / "data" / split, [record(f"{n:03d}", jpeg(photo(first + n))) for n in range(3)])
    code, found = check(tmp_path / "data", tmp_path / "out")
    assert code == 0 and named(found["splits"]["val"]) == {reasons.KEY_ELSEWHERE: ["000", "001", "002"]}


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """Texts that would run where a page does not escape them, and a half character that UTF-8 does not have."""
    region = {"box": [10, 10, 90, 70], "phrase": HOSTILE}
    train = tmp_path / "data" / "train <script>"
    train.mkdir(parents=True)
    records = [
        record(f"{n}{HOSTILE.replace('/', '')}", jpeg(photo(n)), captions=[HOSTILE, "x"], regions=[region])
        for n in range(4)
    ]
    records += [record("<b>zero", b""), record("half", jpeg(photo(9)), captions=["\ud800 x"])]
    write_index(train, Index([write_shard(train, 0, records)], vars(Totals(6))))
    write_split(tmp_path / "data/val", [record(f"v{n}", jpeg(photo(n))) for n in range(3, 6)])
    check_data(tmp_path / "data", out=tmp_path / "out", processes=1)
    return tmp_path / "out/check.html"


def test_the_page_needs_nothing_from_outside_and_runs_nothing(hostile: Path):
    class Tags(HTMLParser):
        found: list[tuple[str, dict[str, str | None]]] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found.append((tag, dict(attrs)))

        handle_startendtag = handle_starttag

    page = hostile.read_text()
    Tags().feed(page)
    names = {tag for tag, _ in Tags.found}
    assert names.isdisjoint({"script", "img", "link", "iframe", "object", "b"})
    assert {"svg", "rect", "polygon", "image", "table"} <= names
    for tag, attrs in Tags.found:
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        assert all((attrs.get(name) or "data:image/jpeg").startswith("data:image/jpeg") for name in ("src", "href"))
    assert "@import" not in page and "url(" not in page and not re.search(r"https?://", page)
    drawn = [attrs for tag, attrs in Tags.found if tag == "rect" and attrs.get("class") == "box"]
    assert len(drawn) == 4 and drawn[0].items() >= {"x": "10.0", "y": "10.0", "width": "80.0", "height": "60.0"}.items()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
def test_a_browser_shows_the_page_and_no_text_runs(hostile: Path, tmp_path: Path):
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    shown = subprocess.run(
        [*command, "--dump-dom", hostile.as_uri()], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert "<title>Check of" in shown and "<script" not in shown and "<img" not in shown
    assert shown.count('<svg class="chart"') == 9 and "&lt;script&gt;" in shown


def test_quantiles_are_those_of_all_values():
    values = np.random.default_rng(0).integers(0, 50, 999)
    counts = dict(zip(*(part.tolist() for part in np.unique(values, return_counts=True)), strict=True))
    told = summary(counts)
    assert told["count"] == 999 and told["mean"] == pytest.approx(values.mean())
    shares = (0, 0.01, 0.25, 0.5, 0.75, 0.99, 1)
    assert list(told["quantiles"].values()) == [np.quantile(values, q, method="lower") for q in shares]
    assert summary({}) == {"count": 0}


@pytest.mark.parametrize("counts", [{5: 3}, {0.25: 7}, {1: 900, 2: 90, 500: 4}, {0.001: 5, 1.0: 5}])
def test_a_histogram_stays_in_its_frame_and_its_bars_hold_all_values(counts: dict[float, int]):
    svg = histogram("a & b", {"x<y": counts, "none": {}})
    points = [tuple(map(float, p.split(","))) for p in re.findall(r'points="([^"]+)"', svg)[0].split()]
    assert all(62 <= x <= 500 and 42 <= y <= 250 for x, y in points)
    top = max(float(y) for y in re.findall(r'class="y"[^>]*>([\d.]+)<', svg))
    heights = [(250 - y) / 208 * top for _, y in points[1:-1:2]]
    assert sum(heights) == pytest.approx(100, abs=0.2) and "x&lt;y" in svg and "a &amp; b" in svg


# --- where it lies, and bad input -------------------------------------------------------------------------------------


def test_a_dataset_behind_a_url_is_checked_like_one_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for split, first in (("train", 0), ("val", 5)):
        write_split(tmp_path / "data" / split, [record(f"{split}{n}", jpeg(photo(first + n))) for n in range(7)], 3)
    (tmp_path / "data/val/shard-000001.tar").unlink()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/data"
        with pytest.raises(UserError, match="--splits"):
            check_data(url, out=tmp_path / "x")
        with pytest.raises(UserError, match="--out"):
            check_data(f"{url}/train")
        code, remote = check(url, tmp_path / "remote", splits=["train", "val"], processes=2)
        server.shutdown()
    _, local = check(tmp_path / "data", tmp_path / "local")
    assert code == 1 and named(remote["splits"]["val"]) == {reasons.UNREADABLE: ["shard-000001.tar"]}
    for one in (remote, local):
        for row in one["splits"]["val"]["findings"]:
            row.pop("named")
    assert remote["splits"] == local["splits"] and remote["leaks"] == local["leaks"] != []


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K", b"0"])
@pytest.mark.parametrize("size", [b"40000000000", b"\x80" + (1 << 62).to_bytes(11, "big"), b"\xff" * 12])
def test_a_head_that_claims_what_is_not_there_costs_no_memory(tmp_path: Path, kind: bytes, size: bytes):
    def claim(members: dict[str, dict[str, list[int]]], content: bytearray) -> None:
        at = members["b"]["jpg"][0] - 512
        content[at + 124 : at + 136], content[at + 156 : at + 157] = size.ljust(12, b"\0"), kind
        content[at + 148 : at + 156] = b" " * 8
        content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])

    train = tmp_path / "data" / "train"
    train.mkdir(parents=True)
    records = [record(key, jpeg(photo(n))) for n, key in enumerate("abc")]
    write_index(
        train, Index([write_shard(train, 0, records, claim)], {**vars(Totals(3, 3)), "images_without_captions": 0})
    )
    tracemalloc.start()
    code, found = check(tmp_path / "data", tmp_path / "out")
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert code == 1 and named(found["splits"]["train"])[reasons.BROKEN_TAR] == ["shard-000000.tar"]
    assert found["splits"]["train"]["counts"]["samples"] == 3  # they are where the index says


def test_what_is_no_dataset_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="no such folder"):
        check_data(tmp_path / "none")
    with pytest.raises(UserError, match="no split in"):
        check_data(tmp_path)
    write_split(tmp_path / "data/train", [record("a", jpeg(photo(0)))])
    with pytest.raises(UserError, match="--processes"):
        check_data(tmp_path / "data", processes=0)
    with pytest.raises(UserError, match="test/index.json"):
        check_data(tmp_path / "data", splits=["test"])
    (tmp_path / "data/train/index.json").write_text("{}")
    with pytest.raises(UserError, match="not an index"):
        check_data(tmp_path / "data")
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["train"]


def test_a_split_whose_shards_are_all_missing_is_still_told_of(tmp_path: Path):
    write_split(tmp_path / "data/train", [record("a", jpeg(photo(0)))])
    content = (tmp_path / "data/train/shard-000000.tar").read_bytes()
    (tmp_path / "data/train/shard-000000.tar").unlink()
    code, found = check(tmp_path / "data", tmp_path / "out")
    assert code == 1 and found["splits"]["train"]["counts"]["unread"] == 1
    assert found["splits"]["train"]["distributions"]["width"] == {"count": 0}
    assert hashlib.sha256(content).hexdigest() in (tmp_path / "data/train/index.json").read_text()
