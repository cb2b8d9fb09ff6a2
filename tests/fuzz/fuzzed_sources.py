"""What `mmgem data prepare` reads: JSON, lines of JSON, XML, texts and lists of public formats, and the dataset that it
makes of them, every sample of it."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import reading
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from mutations import CHANGES, DAMAGES, SOMETIMES, changed, changed_json, damaged

from mmgem.data import prepare
from mmgem.errors import UserError

PICTURES = {name: reading.encoded(reading.picture(n), kind) for n, (name, kind) in enumerate(
    [("a.jpg", "JPEG"), ("b.png", "PNG"), ("c.webp", "WEBP"), ("d.bmp", "BMP")])}  # fmt: skip
NAMES = list(PICTURES)

CAPTIONS = [{"image": name, "split": "train", "captions": ["one", "two"], "width": 48, "height": 36} for name in NAMES]
REGIONS = [{"image": name, "split": "train", "box": [1, 2, 30, 20.5], "phrase": "it", "entity_id": 3} for name in NAMES]
_SAID = {"filepath": "", "sentences": [{"raw": "a"}, {"tokens": ["a", "b"]}]}
_SPLITS = zip(NAMES, ("train", "restval", "val", "test"), strict=True)
KARPATHY = {"images": [{"filename": name, "split": split, "cocoid": 1, **_SAID} for name, split in _SPLITS]}
COCO = {
    "images": [{"id": n, "file_name": name, "width": 48, "height": 36} for n, name in enumerate(NAMES)],
    "annotations": [{"image_id": n, "id": n, "caption": "a"} for n in range(4)],
}
_BOX = {"id": 7, "category_id": 1, "bbox": [1, 2, 30, 20.5], "iscrowd": 0, "segmentation": [[1, 2, 3, 4]]}
INSTANCES = {
    "images": COCO["images"],
    "categories": [{"id": 1, "name": "cat"}],
    "annotations": [{**_BOX, "image_id": n} for n in range(4)],
}
_REGION = {"x": 1, "y": 2, "width": 20, "height": 9.5, "phrase": "it", "region_id": 5}
GENOME = [{"id": n, "regions": [_REGION, _REGION]} for n in range(4)]
_SIZE = {"width": 48, "height": 36}
GENOME_IMAGES = [{"image_id": n, "url": f"http://x/VG_100K/{name}", **_SIZE} for n, name in enumerate(NAMES)]
SPLITS = {"train": ["a.jpg", "b.png"], "val": ["c.webp"]}

SENTENCES = "[/EN#1/people A man] sees [/EN#2/other a ball] .\n[/EN#1/people He] plays .\n"
XML = """<annotation><filename>a.jpg</filename><size><width>48</width><height>36</height></size>
<object><name>1</name><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>20</xmax><ymax>21</ymax></bndbox></object>
<object><name>2</name><nobndbox>1</nobndbox></object></annotation>"""


def entities(levels: int, times: int, length: int) -> str:
    """Entities of entities ("billion laughs"), whose last one is the width."""
    lines = [f'<!ENTITY e0 "{"1" * length}">']
    lines += [f'<!ENTITY e{n} "{f"&e{n - 1};" * times}">' for n in range(1, levels + 1)]
    return f"<!DOCTYPE annotation [{''.join(lines)}]>" + XML.replace("48", f"&e{levels};")


HOSTILE_XML = [
    *(entities(*of) for of in [(1, 2, 1), (3, 10, 3), (9, 10, 3), (30, 2, 3), (1, 5000, 2000), (1, 60_000, 100)]),
    '<!DOCTYPE annotation [<!ENTITY e SYSTEM "file:///dev/zero">]>' + XML.replace("48", "&e;"),
    '<!DOCTYPE annotation SYSTEM "http://127.0.0.1:9/x.dtd">' + XML,
    '<!DOCTYPE a [<!ENTITY % p SYSTEM "file:///etc/passwd">%p;]>' + XML,
    '<!DOCTYPE a [<!ENTITY e "&e;">]>' + XML.replace("48", "&e;"),
    *(f'<?xml version="1.0" encoding="{name}"?>{XML}' for name in ("utf-16", "nowhere", "utf-7", "latin-1", "cp037")),
    "<a>" * 100_000 + "</a>" * 100_000,
    "<object>" * 20_000,
    XML.replace("<name>1", "<name>1</name>" * 3000 + "<name>1"),
    XML.replace("<size>", "<size " + " ".join(f'a{n}="{n}"' for n in range(20_000)) + ">"),
    XML.replace("<width>48", "<width>" + "9" * 10_000),
    *(
        XML.replace("20", number)
        for number in ("nan", "inf", "-inf", "1e999", "", " 20 ", "0x14", "٢٠", "1_0", "9" * 5000)
    ),
    XML.replace("<size>", "<size/><size>").replace("<bndbox>", "<bndbox/><bndbox>"),
    "",
]


def lines_of(rows: list[dict[str, Any]]) -> SearchStrategy[bytes]:
    def made(changes: list[Any], tear: bool, damages: Any) -> bytes:
        lines = [changed(row, of_row) for row, of_row in zip(rows, changes, strict=True)]
        whole = b"\n".join(lines) + b"\n"
        return damaged(whole, damages) if tear else whole

    none = st.just([])
    changes = [st.sampled_from([none] * 5 + [CHANGES]).flatmap(lambda kind: kind) for _ in rows]
    return st.builds(made, st.tuples(*changes), SOMETIMES, DAMAGES)


def damaged_text(*texts: str) -> SearchStrategy[bytes]:
    whole = st.sampled_from([text.encode() for text in texts])
    return whole | st.builds(damaged, whole, DAMAGES)


FORMATS: dict[str, dict[str, SearchStrategy[bytes]]] = {
    "jsonl": {"captions.jsonl": lines_of(CAPTIONS), "regions.jsonl": lines_of(REGIONS)},
    "karpathy": {"dataset.json": changed_json(KARPATHY)},
    "coco": {"captions_train2017.json": changed_json(COCO), "instances_train2017.json": changed_json(INSTANCES)},
    "visual_genome": {"region_descriptions.json": changed_json(GENOME), "image_data.json": changed_json(GENOME_IMAGES)},
    "flickr30k_entities": {
        "Sentences/a.txt": damaged_text(SENTENCES) | damaged_text("[/EN#" + "a" * 70_000, "[/EN#1/a b " * 20_000),
        "Annotations/a.xml": damaged_text(XML) | damaged_text(*HOSTILE_XML),
        "train.txt": damaged_text("a\nb\n"),
        "val.txt": damaged_text("c\n"),
    },
    "folder": {"a.txt": damaged_text("one\ntwo\n"), "c.txt": damaged_text("three")},
}
INPUTS = st.sampled_from(list(FORMATS)).flatmap(
    lambda name: st.tuples(
        st.just(name),
        st.fixed_dictionaries(FORMATS[name]),
        st.none() | st.none() | st.none() | changed_json(SPLITS) | st.just(b"train=0.5,val=0.5"),
    )
)


def prepared(name: str, source: Path, out: Path, options: dict[str, Any]) -> None:
    images = source / "images"
    if name == "karpathy":
        prepare.prepare_karpathy(source / "dataset.json", out, images=images, **options)
    elif name == "coco":
        captions, instances = source / "captions_train2017.json", source / "instances_train2017.json"
        prepare.prepare_coco([captions], out, images=images, instances=[instances], **options)
    elif name == "visual_genome":
        prepare.prepare_visual_genome(source, out, images=images, **options)
    elif name == "flickr30k_entities":
        prepare.prepare_flickr30k_entities(source, out, images=images, **options)
    elif name == "folder":
        prepare.prepare_folder(images, out, **options)
    else:
        prepare.prepare_jsonl(source, out, **options)


def check(content: tuple[str, Mapping[str, bytes], bytes | None]) -> str:
    name, files, split_by = content
    with tempfile.TemporaryDirectory(dir=reading.memory()) as folder:
        source, out = Path(folder) / "source", Path(folder) / "out"
        for place in ("images", "Sentences", "Annotations"):
            (source / place).mkdir(parents=True)
        for picture, data in PICTURES.items():
            (source / "images" / picture).write_bytes(data)
        (source / "images" / "never.jpg").symlink_to("/dev/zero")
        os.mkfifo(source / "images" / "pipe.jpg")
        for path, data in files.items():
            (source / ("images" if name == "folder" else "") / path).write_bytes(data)
        options: dict[str, Any] = {"processes": 1, "max_broken": 1.0, "shard_size": 3}
        if split_by is not None:
            (source / "splits.json").write_bytes(split_by)
            options["split_by"] = split_by.decode() if split_by.startswith(b"train=") else source / "splits.json"
        try:
            prepared(name, source, out, options)
        except UserError as error:
            return f"{name}: {reading.refused(error)}"
        found: Counter[str] = Counter()
        for split in out.iterdir():
            found += reading.read_split(split, verify=True)
        # What was written is whole.
        assert found["SampleError"] == found["UserError"] == 0, found
        return f"{name}: written" if found else f"{name}: nothing written"


def warm_up() -> None:
    whole = {"captions.jsonl": b"\n".join(json.dumps(row).encode() for row in CAPTIONS)}
    assert check(("jsonl", whole, None)) == "jsonl: written"
