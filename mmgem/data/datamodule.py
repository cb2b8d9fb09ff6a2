"""Shards, order, samples, transforms and batches as one LightningDataModule.

Receives the training data, what the model wants of pictures and texts, and a stage's settings. Gives the stage's
batches of one rank from any position on: its whole state is the number of samples consumed. A broken sample's place is
taken by the sample of the next position. Refuses regions asked of data without any, and data of which nearly nothing
can be read.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mmgem.config import DataConfig, StageConfig
from mmgem.data.batch import Batch, Broken, Collate, Item, Share
from mmgem.data.order import Order, draws
from mmgem.data.others import Others
from mmgem.data.plan import refuse_missing_regions, stage_steps
from mmgem.data.samples import OpenedPicture, SampleError
from mmgem.data.sources import Sources
from mmgem.data.transforms import View, draw_view, plain_view, view_picture
from mmgem.errors import UserError
from mmgem.images import Preprocess
from mmgem.text import TextCodec

# Purposes of `draws`.
CAPTIONS, REGIONS, VIEW, CACHED_VIEW, OTHERS = range(5)


class CachedPictures(Protocol):
    """What stands in for pictures when the frozen part of the tower was computed before."""

    def get(self, index: int, number: int) -> Tensor:
        """The trunk's output for view `number` of a sample."""
        ...


class Reader(Dataset):
    """Position -> Item, by arithmetic: sample, view, captions and boxes depend on (seed, epoch, sample) alone."""

    MOST_IN_A_ROW = 1000
    """Broken positions after which the data are given up."""

    def __init__(
        self,
        dataset: Sources,
        data: DataConfig,
        stage: StageConfig,
        preprocess: Preprocess,
        seed: int,
        cache: CachedPictures | None = None,
    ):
        refuse_missing_regions(dataset, stage)
        self.dataset, self.data, self.stage = dataset, data, stage
        self.preprocess, self.seed, self.cache = preprocess, seed, cache
        self.order = Order(dataset.sizes, seed, data.window, data.lanes, dataset.order_sources)
        self.others = Others(dataset, stage.negatives)

    def __getitems__(self, positions: Sequence[int]) -> list[Item | Broken]:
        """The positions of a batch, each an Item, with the broken ones whose place it took before it."""
        if self.dataset.remote:
            self._prefetch(positions)
        items: list[Item | Broken] = []
        epoch_P, sample_P = self.order.places(positions)
        for position, epoch, sample in zip(positions, epoch_P.tolist(), sample_P.tolist(), strict=True):
            items += self._first_good(position, epoch, sample)
        return items

    def __getitem__(self, position: int) -> Item | Broken:
        return self.__getitems__([position])[-1]

    def _first_good(self, position: int, epoch: int, sample: int) -> list[Item | Broken]:
        """The item of the first position from this one on that can be read, after what could not be."""
        broken: list[Item | Broken] = []
        while True:
            try:
                return [*broken, self._item(epoch, sample)]
            except SampleError as e:
                broken.append(Broken(e.key, e.reason, e.detail, e.shard))
                if len(broken) == self.MOST_IN_A_ROW:
                    raise UserError(
                        f"{self.dataset.name}: {len(broken)} samples in a row are broken, the last: {e}; "
                        "look at the data with `mmgem data check`"
                    ) from e
            position += 1
            epoch, sample = self.order.at(position)

    def _prefetch(self, positions: Sequence[int]) -> None:
        """Says which shards are needed now and, one window on, next."""
        self.dataset.prefetch(self.order.shards(positions))
        self.dataset.prefetch(self.order.shards(positions, windows_on=1))

    def _item(self, epoch: int, index: int) -> Item:
        """Raises SampleError."""
        sample = self.dataset.sample(index)
        if self.cache is None:
            rng = draws(self.seed, epoch, index, VIEW)
            opened = OpenedPicture(sample)
            view = draw_view(self.data, self.preprocess, *opened.size, rng)
            picture = view_picture(opened, view, self.preprocess, scaled=self.data.scaled_decoding)
        else:
            number = int(draws(self.seed, epoch, index, VIEW).integers(self.stage.cached_views))
            view = cached_view(self.data, self.preprocess, self.seed, index, number, sample.width, sample.height)
            picture = self.cache.get(index, number)
        captions, first = range(len(sample.captions)), self.others.first(sample)
        by_lot = _choose(captions, len(captions), draws(self.seed, epoch, index, CAPTIONS))
        chosen = sorted(by_lot, key=lambda n: n not in first)[: self.stage.captions_per_image]
        rng = draws(self.seed, epoch, index, OTHERS)
        others, painted = self.others.texts(sample, chosen, rng)
        regions: list[Any] = []
        boxes_R4 = torch.zeros(0, 4)
        if self.stage.max_regions:
            boxes_R4, kept = view.boxes([r.box for r in sample.regions])
            drawn = _choose(range(len(kept)), self.stage.max_regions, draws(self.seed, epoch, index, REGIONS))
            boxes_R4, regions = boxes_R4[list(drawn)], [sample.regions[kept[i]] for i in drawn]
        return Item(
            key=sample.key,
            picture=picture,
            captions=tuple(sample.captions[n] for n in chosen),
            boxes_R4=boxes_R4,
            phrases=tuple(r.phrase for r in regions),
            entities=tuple(r.entity or str(r.box) for r in regions),
            dropped=sample.dropped,
            others=others,
            made=(*self.others.shuffled(picture, rng), *(self._view_of(one, rng) for one in painted)),
        )

    def _view_of(self, drawn: Image.Image, rng: np.random.Generator) -> Tensor:
        """A picture that was drawn of a negative, looked at as the samples' own are."""
        return draw_view(self.data, self.preprocess, *drawn.size, rng).picture(drawn, self.preprocess)


def leave_signals_to_parent(worker: int) -> None:
    """Ctrl-C and schedulers reach the workers too; they must live until the parent has finished its step and saved.

    A second SIGTERM is obeyed: it is the parent's, when it leaves without having ended them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def cached_view(
    data: DataConfig, preprocess: Preprocess, seed: int, index: int, number: int, width: int, height: int
) -> View:
    """View `number` of a sample: 0 is the plain one, the others are drawn, for good, from (seed, sample, number)."""
    if number == 0:
        return plain_view(preprocess, width, height)
    return draw_view(data, preprocess, width, height, draws(seed, number, index, CACHED_VIEW))


def _choose(items: Any, count: int, rng: np.random.Generator) -> list[Any]:
    """At most `count` of them, without repetition, in a random order."""
    return [items[i] for i in rng.permutation(len(items))[:count]]


class StageSampler(Sampler[list[int]]):
    """A rank's positions of each step from `start` on, a micro-batch at a time."""

    def __init__(
        self,
        order: Order,
        start: int,
        steps: int,
        global_batch: int,
        rank: int = 0,
        ranks: int = 1,
        micro_batch: int | None = None,
    ):
        self.order, self.start, self.steps, self.global_batch = order, start, steps, global_batch
        self.rank, self.ranks = rank, ranks
        self.share = global_batch // ranks
        self.micro_batch = min(micro_batch or self.share, self.share)

    @property
    def micros(self) -> int:
        """Micro-batches a step; the last may be smaller."""
        return -(-self.share // self.micro_batch)

    def __len__(self) -> int:
        return (self.steps - self.start // self.global_batch) * self.micros

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start // self.global_batch, self.steps):
            share = self.order.step(step, self.global_batch, self.rank, self.ranks).tolist()
            for start in range(0, self.share, self.micro_batch):
                yield share[start : start + self.micro_batch]


class Shares:
    """What Lightning iterates over: a rank's share of each step. Its length is the whole stage's, so that a resumed run
    counts its steps from the stage's beginning."""

    def __init__(self, loader: DataLoader[Batch], steps: int, micros: int):
        self.loader, self.steps, self.micros = loader, steps, micros

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Share]:
        batches = iter(self.loader)
        while share := list(islice(batches, self.micros)):
            yield Share(share)


class StageData(L.LightningDataModule):
    """One stage's training batches."""

    def __init__(
        self,
        dataset: Sources,
        codec: TextCodec,
        preprocess: Preprocess,
        data: DataConfig,
        stage: StageConfig,
        seed: int,
        cache: CachedPictures | None = None,
        rank: int = 0,
        ranks: int = 1,
    ):
        super().__init__()
        self.reader = Reader(dataset, data, stage, preprocess, seed, cache)
        loss = stage.loss
        written_regions = stage.max_regions if stage.written_regions is None else stage.written_regions
        self.collate = Collate(
            codec,
            data.row_tokens,
            embed=loss.needs_vectors(stage.max_regions > 0),
            write_captions=loss.gen > 0 or loss.hard.written > 0,
            write_others=loss.hard.written > 0,
            order_robust=stage.negatives.order_robust,
            write_phrases=written_regions if loss.region_gen > 0 else 0,
        )
        self.data, self.stage, self.rank, self.ranks = data, stage, rank, ranks
        self.steps = stage_steps(stage, len(dataset))
        self.samples_consumed = 0
        self.collate.embed_first = self.micros > 1

    @property
    def micros(self) -> int:
        """Micro-batches a step."""
        return self._sampler().micros

    def _sampler(self) -> StageSampler:
        stage = self.stage
        return StageSampler(
            self.reader.order,
            self.samples_consumed,
            self.steps,
            stage.global_batch,
            self.rank,
            self.ranks,
            stage.micro_batch,
        )

    def train_dataloader(self) -> Shares:
        sampler = self._sampler()
        loader = DataLoader(
            self.reader,
            batch_sampler=sampler,
            collate_fn=self.collate,
            num_workers=self.data.workers,
            worker_init_fn=leave_signals_to_parent,
            persistent_workers=False,
        )
        return Shares(loader, self.steps, sampler.micros)

    def transfer_batch_to_device(self, batch: Share, device: torch.device, dataloader_idx: int) -> Share:
        """The step itself brings over one micro-batch at a time: what there is room for."""
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"samples_consumed": self.samples_consumed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.samples_consumed = state_dict["samples_consumed"]
