"""One reader per public format → shards.

Gives `FORMATS`: the name of a format, as `mmgem data prepare NAME` takes it, and the function that
prepares it. Every function takes its source (but `scenes`, which has none) and `out` by position,
options by name, with the same names and defaults for the same thing (`WriteOptions` where shards
are written); it writes a dataset (one folder a split), prints an account, and returns it as a dict
(see `writing.prepare`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmgem.data.prepare.coco import prepare_coco
from mmgem.data.prepare.flickr30k_entities import prepare_flickr30k_entities
from mmgem.data.prepare.folder import prepare_folder
from mmgem.data.prepare.img2dataset import prepare_img2dataset
from mmgem.data.prepare.jsonl import prepare_jsonl
from mmgem.data.prepare.karpathy import prepare_karpathy
from mmgem.data.prepare.refcoco import prepare_refcoco
from mmgem.data.prepare.scenes import prepare_scenes
from mmgem.data.prepare.visual_genome import prepare_visual_genome
from mmgem.data.prepare.writing import WriteOptions

FORMATS: dict[str, Callable[..., dict[str, Any]]] = {
    "jsonl": prepare_jsonl,
    "coco": prepare_coco,
    "karpathy": prepare_karpathy,
    "flickr30k-entities": prepare_flickr30k_entities,
    "visual-genome": prepare_visual_genome,
    "refcoco": prepare_refcoco,
    "folder": prepare_folder,
    "img2dataset": prepare_img2dataset,
    "scenes": prepare_scenes,
}

__all__ = [
    "FORMATS",
    "WriteOptions",
    "prepare_coco",
    "prepare_flickr30k_entities",
    "prepare_folder",
    "prepare_img2dataset",
    "prepare_jsonl",
    "prepare_karpathy",
    "prepare_refcoco",
    "prepare_scenes",
    "prepare_visual_genome",
]
