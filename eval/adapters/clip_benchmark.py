"""CLIP_benchmark (PyPI `clip-benchmark`) with a model of ours, and with our data.

Gives `load_mmgem`, its loader for one of our models, which `register` puts into its table under the type `mmgem`; and
a prepared split as its zero-shot retrieval reads data, in memory (`as_clip_benchmark_dataset`) or as a folder for its
`--dataset wds/…` (`write_webdataset`). Refuses what `adapters.split` refuses.

Its recalls are those of `mmgem eval retrieval` in float32 (`--no_amp`): on the CPU and on GPUs it computes in half
precision unless told not to. Equal scores are what differs: `mmgem eval` counts a tie with a wrong answer as a loss,
CLIP_benchmark takes what `torch.topk` happens to put first. Captions that several images share are such ties.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from adapters.split import open_split, picture_file, readable, refuse_without_captions
from mmgem.data.samples import SampleError, decode_image
from mmgem.errors import UserError
from mmgem.model import MMGem

MODEL_TYPE = "mmgem"
SHARD_BYTES = 1_000_000_000
SHARDS = 8
"""At least, where there are as many images: a worker without a shard is an error to CLIP_benchmark, which starts 4."""


def load_mmgem(
    model_name: str = "mmgem",
    pretrained: str = "",
    cache_dir: str | None = None,
    device: str | torch.device = "cpu",
) -> tuple[MMGem, Callable[[Image.Image], Tensor], Callable[[list[str]], Tensor]]:
    """(model, transform, tokenizer) as CLIP_benchmark asks for them.

    pretrained: a run folder or an exported model. `model_name` only names the result; nothing is downloaded, so that
    there is nothing to cache. Raises UserError where there is no model.
    """
    model = MMGem.from_pretrained(pretrained, device)
    return model, model.preprocess, model.tokenize


def register() -> None:
    """Makes `--model_type mmgem` known to CLIP_benchmark in this process, and its accuracies work with NumPy 2.4."""
    from clip_benchmark import models

    _mend_accuracy()
    models.TYPE2FUNC[MODEL_TYPE] = load_mmgem  # pyright: ignore[reportArgumentType]
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)  # the list itself is what its command line has imported


def _mend_accuracy() -> None:
    """CLIP_benchmark 1.6.2 makes a float of an array of one element, which NumPy 2.4 refuses
    (https://github.com/LAION-AI/CLIP_benchmark/issues/147); where it still does, `accuracy` takes its place."""
    from clip_benchmark.metrics import linear_probe, zeroshot_classification

    try:
        zeroshot_classification.accuracy(torch.eye(2), torch.arange(2))
    except TypeError:
        zeroshot_classification.accuracy = linear_probe.accuracy = accuracy


def accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[float]:
    """The share of rows of scores (N x C) whose class (N) is among the k highest, for each k."""
    hit_NK = output.topk(max(topk), dim=1).indices == target[:, None]
    return [float(hit_NK[:, :k].any(dim=1).double().mean()) for k in topk]


class RetrievalSplit(Dataset[tuple[Any, list[str]]]):
    """Item i is the i-th image, through `transform`, and the list of its captions."""

    def __init__(self, data: str | Path, split: str, transform: Callable[[Image.Image], Any] | None = None) -> None:
        self.samples = open_split(data, split)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, list[str]]:
        """Raises UserError for a broken sample: a data set with holes has no item i."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            sample = self.samples.sample(index)
            image = decode_image(sample)
        except SampleError as error:
            raise UserError(f"{error}; `write_webdataset` leaves broken samples out") from error
        refuse_without_captions(sample)
        return (image if self.transform is None else self.transform(image)), list(sample.captions)


def as_clip_benchmark_dataset(
    data: str | Path, split: str, transform: Callable[[Image.Image], Any] | None = None
) -> RetrievalSplit:
    """A prepared split for `clip_benchmark.metrics.zeroshot_retrieval`.

    Its DataLoader needs `collate_fn=clip_benchmark.datasets.builder.image_captions_collate_fn`.
    """
    return RetrievalSplit(data, split, transform)


def write_webdataset(data: str | Path, split: str, out: str | Path) -> int:
    """Writes a split to `out/SPLIT/0.tar …`, for `--dataset wds/NAME --dataset_root out`; gives the number of images.

    One caption a line is what CLIP_benchmark reads, so that a line break in a caption becomes a space. Broken samples
    are left out. Raises UserError where `out/SPLIT` is there already.
    """
    from webdataset.writer import ShardWriter

    dataset = open_split(data, split)
    folder = Path(out) / split
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty; give another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    written = 0
    most = min(10_000, math.ceil(len(dataset) / SHARDS))
    with ShardWriter(str(folder / "%d.tar"), maxcount=most, maxsize=SHARD_BYTES, verbose=0) as sink:
        for sample, image in readable(dataset):
            ending, content = picture_file(sample, image)
            lines = "\n".join(" ".join(caption.splitlines()) for caption in sample.captions)
            sink.write({"__key__": f"{written:09d}", ending: content, "txt": lines})
            written += 1
    shards = len(list(folder.glob("*.tar")))
    # Last: CLIP_benchmark refuses a folder without it, and so one that was not finished.
    (folder.parent / "dataset_type.txt").write_text("retrieval\n")
    (folder / "nshards.txt").write_text(f"{shards}\n")
    return written
