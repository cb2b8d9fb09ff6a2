"""Tiny samples of public datasets, in the layouts that they are published in."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(number: int = 0, kind: str = "JPEG", size: tuple[int, int] = (48, 32)) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def save(path: Path, number: int = 0, size: tuple[int, int] = (64, 48)) -> bytes:
    """A picture of its own, whose bytes are given back."""
    content = picture(number, "PNG" if path.suffix == ".png" else "JPEG", size)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return content


def as_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def lines(path: Path, items: list[Any]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


def jsonl_folder(folder: Path, count: int = 6) -> Path:
    """Six pictures, the last two of val; boxes on the first two."""
    (folder / "images").mkdir(parents=True)
    captions = []
    for n in range(count):
        name, split = f"{n}_a.jpg", "train" if n < count - 2 else "val"
        (folder / "images" / name).write_bytes(picture(n))
        line = {"image": name, "split": split, "width": 48, "height": 32}
        captions.append({**line, "captions": [f"picture {n} .", f"Number {n}"]})
    lines(folder / "captions.jsonl", captions)
    region = {"image": "0_a.jpg", "split": "train", "types": ["people"]}
    group = {**region, "phrase": "two men", "entity_id": 7, "boxes_of_entity": 2}
    lines(
        folder / "regions.jsonl",
        [
            {**group, "box": [0, 0, 20, 20]},
            {**group, "box": [20, 0, 40, 20]},
            {"image": "1_a.jpg", "split": "train", "box": [1.5, 2, 30, 31], "phrase": "a dog"},
        ],
    )
    return folder


def coco(folder: Path, split: str, numbers: list[int], nested: bool = True) -> tuple[Path, Path]:
    """annotations/captions_SPLIT.json and instances_SPLIT.json, as COCO 2017 has them, and the pictures."""
    images, captions, boxes = [], [], []
    for n in numbers:
        name = f"{n:012d}.jpg"
        save(folder / (f"images/{split}" if nested else "images") / name, n)
        images.append({"license": 4, "file_name": name, "coco_url": f"http://images.cocodataset.org/{split}/{name}",
                       "height": 48, "width": 64, "date_captured": "2013-11-14 17:02:52", "id": n})  # fmt: skip
        captions += [{"image_id": n, "id": 10 * n + i, "caption": f"Caption {i} of {n}. "} for i in range(2)]
        outline = [[1.0, 2.0, 30.0, 2.0, 30.0, 40.0]]
        common = {"image_id": n, "segmentation": outline, "area": 100.5}
        boxes += [
            {**common, "iscrowd": 0, "bbox": [4.5, 8.25, 16.25, 32.5], "category_id": 18, "id": 900000 + n},
            {**common, "iscrowd": 0, "bbox": [0, 0, 64, 48], "category_id": 90, "id": 910000 + n},
        ]
    boxes.append({**boxes[0], "segmentation": {"counts": [1], "size": [48, 64]}, "iscrowd": 1, "id": 920000})
    categories = [{"supercategory": "animal", "id": 18, "name": "dog"},
                  {"supercategory": "indoor", "id": 90, "name": "hair drier"}]  # fmt: skip
    common = {"info": {"year": 2017}, "licenses": [], "images": images}
    return (
        as_json(folder / f"annotations/captions_{split}.json", {**common, "annotations": captions}),
        as_json(
            folder / f"annotations/instances_{split}.json", {**common, "annotations": boxes, "categories": categories}
        ),
    )


SENTENCES = {
    "101": """[/EN#11/people Two small robots] wave at [/EN#12/vehicles/other a red tram] in [/EN#13/scene the yard] .
[/EN#11/people Two robots] , [/EN#14/clothing hats] on , wave at [/EN#0/notvisual each other] .
[/EN#11/people Two small robots] and [/EN#12/other a tram] 's driver .
""",
    "102": "[/EN#21/animals A cat] sleeps on [/EN#22/other a shelf] .\nNothing is marked here .\n",
    "103": "[/EN#31/people A woman] reads [/EN#32/other a book] .\n",
}
OBJECTS = {
    "101": [(("11",), (1, 2, 20, 40)), (("11", "14"), (30, 2, 50, 40)), (("12",), (5, 1, 64, 48)), (("13",), None)],
    "102": [(("21",), (3, 4, 10, 12)), (("22",), (1, 1, 64, 48))],
    "103": [(("31",), (10, 10, 20, 20)), (("32",), None)],
}
RAW = {
    "101": ["Two small robots wave at a red tram in the yard.", "Two robots, hats on, wave at each other.",
            "Two small robots and a tram's driver."],
    "102": ["A cat sleeps on a shelf.", "Nothing is marked here."],
    "103": ["A woman reads a book."],
}  # fmt: skip


def entities(folder: Path, lists: dict[str, list[str]]) -> Path:
    """Annotations/, Sentences/ and the lists, as the annotations.zip and the repository have them."""
    for number, name in enumerate(SENTENCES):
        save(folder / f"flickr30k-images/{name}.jpg", number)
        objects = []
        for names, box in OBJECTS[name]:
            inner = "".join(f"\t\t<name>{entity}</name>\n" for entity in names)
            if box is None:
                inner += "\t\t<scene>1</scene>\n\t\t<nobndbox>0</nobndbox>\n"
            else:
                corners = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
                inner += "\t\t<bndbox>" + "".join(f"<{tag}>{at}</{tag}>" for tag, at in corners) + "</bndbox>\n"
            objects.append(f"\t<object>\n{inner}\t</object>\n")
        size = "\t<size>\n\t\t<width>64</width>\n\t\t<height>48</height>\n\t\t<depth>3</depth>\n\t</size>\n"
        xml = f"<annotation>\n\t<filename>{name}.jpg</filename>\n{size}{''.join(objects)}</annotation>\n"
        for kind, text in (("Annotations/{}.xml", xml), ("Sentences/{}.txt", SENTENCES[name])):
            path = folder / kind.format(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    for split, names in lists.items():
        (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return folder


def karpathy(path: Path, splits: dict[str, str]) -> Path:
    """dataset_flickr30k.json of the pictures of `entities`. splits: picture -> split."""
    listed = [
        {"sentids": [], "imgid": n, "sentences": [{"tokens": raw.lower().strip(".").split(), "raw": raw, "imgid": n,
                                                         "sentid": 0} for raw in RAW[name]],
         "split": splits[name], "filename": f"{name}.jpg"}
        for n, name in enumerate(splits)
    ]  # fmt: skip
    return as_json(path, {"images": listed, "dataset": "flickr30k"})


def genome(folder: Path, flat: bool) -> tuple[Path, Path]:
    pictures = {1: ("VG_100K_2", "1.jpg"), 2370463: ("VG_100K", "2370463.jpg"), 7: ("VG_100K", "7.jpg")}
    described, known = [], []
    for name, (part, file) in pictures.items():
        save(folder / "images" / ("" if flat else part) / file, name)
        url = f"https://cs.stanford.edu/people/rak248/{part}/{file}"
        known.append({"width": 64, "url": url, "height": 48, "image_id": name, "coco_id": None, "flickr_id": name + 1})
        regions = [
            {"region_id": 10 * name + i, "width": 20 + i, "height": 30, "image_id": name, "phrase": f"thing {i}",
             "y": 5, "x": 4} for i in range(2)
        ]  # fmt: skip
        described.append({"regions": regions, "id": name})
    described[1]["regions"].append({**described[1]["regions"][0], "x": 70, "phrase": "beyond the border"})
    as_json(folder / "region_descriptions.json", described)
    as_json(folder / "image_data.json", known)
    return folder, folder / "images"


def laion(folder: Path, tars: int = 2, samples: int = 3) -> Path:
    """What img2dataset writes: tars of KEY.jpg, KEY.txt, KEY.json, and beside them what was downloaded and how."""
    folder.mkdir(parents=True)
    for shard in range(tars):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for n in range(samples):
                key = f"{shard:05d}{n:04d}"
                record = {"caption": f"Text {key}", "url": f"http://x/{n}", "key": key, "status": "success",
                          "error_message": None, "width": 64, "height": 48, "original_width": 640,
                          "original_height": 480, "exif": "{}", "sha256": "ab"}  # fmt: skip
                members = (("jpg", picture(100 * shard + n, size=(64, 48))), ("txt", f"Text {key}".encode()),
                           ("json", json.dumps(record, indent=4).encode()))  # fmt: skip
                for extension, data in members:
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1 what was downloaded PAR1")
        as_json(folder / f"{shard:05d}_stats.json", {"count": samples, "successes": samples})
    return folder


class _RunsCode:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("exit 1",)


def refcoco(folder: Path) -> tuple[Path, Path]:
    """Two pictures of COCO with three objects, in the umd split; and a refs file that would run code.

    Gives the folder of the refs files and that of the pictures.
    """
    source, images = folder / "refcocog", folder / "coco"
    source.mkdir(parents=True)
    names = {number: f"COCO_train2014_{number:012}.jpg" for number in (1, 2)}
    for number, name in names.items():
        save(images / "train2014" / name, number)
    boxes = {11: (1, [4.5, 8.25, 16.25, 32.5]), 12: (1, [0, 0, 64, 48]), 21: (2, [1, 2, 30, 20])}
    annotations = [
        {"id": name, "image_id": image, "bbox": box, "category_id": 1, "iscrowd": 0, "segmentation": [[1, 2, 3, 4]]}
        for name, (image, box) in boxes.items()
    ]
    content = {
        "images": [{"id": number, "file_name": name, "width": 64, "height": 48} for number, name in names.items()],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "dog"}],
    }
    (source / "instances.json").write_text(json.dumps(content))
    said = [
        (11, "train", ["the left dog", "dog in the caf\u00e9"]),
        (21, "test", ["a dog"]),
        (12, "train", ["all of it"]),
    ]
    refs = [
        {
            "ref_id": n,
            "ann_id": name,
            "image_id": boxes[name][0],
            "file_name": f"{names[boxes[name][0]][:-4]}_{name}.jpg",
            "category_id": 1,
            "split": split,
            "sent_ids": list(range(len(texts))),
            "sentences": [
                {"tokens": t.split(), "raw": t.title(), "sent": t, "sent_id": k} for k, t in enumerate(texts)
            ],
        }
        for n, (name, split, texts) in enumerate(said)
    ]
    (source / "refs(umd).p").write_bytes(pickle.dumps(refs, protocol=0))
    (source / "refs(google).p").write_bytes(pickle.dumps([_RunsCode()]))
    return source, images
