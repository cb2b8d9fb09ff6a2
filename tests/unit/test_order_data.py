"""Reader, batches, loader: all follows from seed and position, nothing from what was read before or by whom."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TEXTS, codec, encoded, picture, positives, sample, write_split
from torch import Tensor

from mmgem.config import DataConfig, LossConfig, SourceConfig, StageConfig
from mmgem.data.batch import Batch, Broken, Collate, Item, OtherText, stable_id
from mmgem.data.datamodule import CAPTIONS, Reader, StageData, cached_view
from mmgem.data.order import Order, draws
from mmgem.data.samples import Region
from mmgem.data.shards import ShardedDataset
from mmgem.data.sources import Sources, open_split, open_training_data
from mmgem.data.transforms import plain_view
from mmgem.errors import UserError
from mmgem.images import Preprocess
from mmgem.text import PackedTexts

PREPROCESS = Preprocess(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
AUGMENT = DataConfig(flip=0.5, crop_scale=(0.5, 1.0), color_jitter=0.2, row_tokens=64)
COUNT = 13


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_split(tmp_path_factory.mktemp("data") / "train", [sample(n) for n in range(COUNT)])


def stage(**changes: Any) -> StageConfig:
    return StageConfig(**{"samples": 40, "global_batch": 4, "captions_per_image": 1, "max_regions": 2, **changes})


def reader(split: Path, data: DataConfig = AUGMENT, seed: int = 0, **changes: Any) -> Reader:
    return Reader(Sources([ShardedDataset(split)]), data, stage(**changes), PREPROCESS, seed)


def stage_data(
    source: Path | Sources, data: DataConfig = AUGMENT, seed: int = 0, rank: int = 0, ranks: int = 1, **changes: Any
) -> StageData:
    dataset = source if isinstance(source, Sources) else Sources([ShardedDataset(source)])
    return StageData(dataset, codec(24), PREPROCESS, data, stage(**changes), seed, None, rank, ranks)


def item(source: Reader, position: int) -> Item:
    found = source[position]
    assert isinstance(found, Item)
    return found


def flat(value: Any) -> list[Any]:
    """A batch as plain values, to compare bit by bit."""
    if isinstance(value, Tensor):
        return [value.dtype, value.shape, value.numpy().tobytes()]
    if isinstance(value, (Batch, PackedTexts, Item)):
        return [flat(getattr(value, f.name)) for f in dataclasses.fields(value)]
    return [value]


def batches(data: StageData) -> list[Batch]:
    return [batch for share in data.train_dataloader() for batch in share.micros]


# --- reader ----------------------------------------------------------------------------------------------------------


def test_an_item_follows_from_its_position(split: Path):
    forward, backward = reader(split), reader(split)
    wanted = [flat(forward[p]) for p in range(40)]
    assert [flat(backward[p]) for p in reversed(range(40))] == wanted[::-1]
    assert flat(reader(split, seed=1)[0]) != wanted[0]
    assert flat(reader(split)[5]) == wanted[5]


def test_captions_are_drawn_by_seed_epoch_and_sample(split: Path):
    """Over the epochs all three of a picture come, each about as often; and not all pictures at once."""
    source, drawn = reader(split), Counter()
    for position in range(60 * COUNT):
        epoch, index = source.order.at(position)
        own = source.dataset.captions(index)
        (caption,) = item(source, position).captions if position < COUNT else _captions(source, position)
        drawn[own.index(caption)] += 1
        if epoch == 0:
            assert caption in own
    assert len(drawn) == 3 and min(drawn.values()) > 0.27 * sum(drawn.values())
    in_first_epoch = {item(source, p).captions[0][-1] for p in range(COUNT)}
    assert len(in_first_epoch) > 1


def _captions(source: Reader, position: int) -> tuple[str, ...]:
    """As the reader draws them, without decoding the picture."""
    epoch, index = source.order.at(position)
    own = source.dataset.captions(index)
    return (own[draws(source.seed, epoch, index, CAPTIONS).permutation(len(own))[0]],)


def test_the_number_of_captions(split: Path):
    for wanted, found in ((1, 1), (2, 2), (3, 3), (5, 3)):
        captions = item(reader(split, captions_per_image=wanted), 0).captions
        assert len(captions) == len(set(captions)) == found


def test_changing_one_setting_changes_nothing_else(split: Path):
    """The purposes of random numbers do not mix: more boxes, the same view and captions."""
    few, many = item(reader(split), 3), item(reader(split, max_regions=3, captions_per_image=2), 3)
    assert torch.equal(few.picture, many.picture)
    assert many.captions[:1] == few.captions
    plain = item(reader(split, data=DataConfig()), 3)
    assert plain.captions == few.captions and not torch.equal(plain.picture, few.picture)


def test_no_more_boxes_than_max_regions(split: Path):
    for limit in (0, 1, 2, 3, 9):
        source, counts = reader(split, data=DataConfig(), max_regions=limit), set()
        for position in range(COUNT):
            found = item(source, position)
            assert len(found.boxes_R4) == len(found.phrases) == len(found.entities)
            assert len(set(found.phrases)) == len(found.phrases)
            counts.add(len(found.phrases))
        assert counts == {min(limit, 3)}
    chosen = {frozenset(item(reader(split, max_regions=1), p).phrases) for p in range(3 * COUNT)}
    assert len(chosen) > COUNT  # another box in another epoch


def test_boxes_go_with_their_phrases(split: Path):
    source = reader(split, data=DataConfig(), max_regions=3)
    found = item(source, 0)
    own = {r.phrase: r for r in source.dataset.sample(source.order.at(0)[1]).regions}
    for box_4, phrase, entity in zip(found.boxes_R4, found.phrases, found.entities, strict=True):
        region = own[phrase]
        assert torch.allclose(box_4, torch.tensor(region.box) / torch.tensor([80.0, 60.0, 80.0, 60.0]))
        assert entity == (region.entity or str(region.box))
    assert len(set(found.entities)) == 2


def test_boxes_that_a_crop_cuts_away_are_left_out(tmp_path: Path):
    regions = [Region((0.0, 0.0, 8.0, 8.0), "corner"), Region((36.0, 26.0, 44.0, 34.0), "middle")]
    split = write_split(tmp_path / "train", [sample(0, regions=regions)])
    source = reader(split, data=DataConfig(crop_scale=(0.4, 0.6), flip=0.5))
    seen = [item(source, p).phrases for p in range(60)]
    assert 0 < sum("corner" in phrases for phrases in seen) < 45
    assert sum("middle" in phrases for phrases in seen) == 60


def test_the_picture_is_the_samples(split: Path):
    source = reader(split, data=DataConfig())
    number = source.order.at(0)[1]
    exact = PREPROCESS(picture(number))
    assert (item(source, 0).picture - exact).abs().mean() < 0.1  # JPEG
    assert item(source, 0).key == f"key{number:03d}"


def test_regions_asked_of_data_without_any_are_refused(tmp_path: Path):
    split = write_split(tmp_path / "train", [sample(n, regions=[]) for n in range(3)])
    with pytest.raises(UserError, match=r"stage global: max_regions=2, but .*train has no regions; set max_regions: 0"):
        reader(split)
    assert item(reader(split, max_regions=0), 0).phrases == ()


def test_pictures_without_boxes_or_captions_are_taken_as_they_are(tmp_path: Path):
    samples = [sample(0, regions=[]), sample(1, captions=[]), sample(2)]
    source = reader(write_split(tmp_path / "train", samples), data=DataConfig())
    items = {i.key: i for i in (item(source, p) for p in range(3))}
    assert (len(items["key000"].captions), len(items["key000"].phrases)) == (1, 0)
    assert (len(items["key001"].captions), len(items["key001"].phrases)) == (0, 2)
    batch = Collate(codec(24), 64)([items[f"key00{n}"] for n in range(3)])
    assert batch.text_vector_M.tolist() == [0, 2, 3, 4, 5, 6]
    assert batch.region_image_R.tolist() == [1, 1, 2, 2]


# --- cached views ----------------------------------------------------------------------------------------------------


class Cache:
    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def get(self, index: int, number: int) -> Tensor:
        self.asked.append((index, number))
        return torch.full((4, 2, 2), float(10 * index + number))


def test_a_cache_stands_in_for_pictures_and_the_boxes_follow_its_views(split: Path):
    cache = Cache()
    config = stage(max_regions=3, cached_views=3, freeze=["vision"])
    source = Reader(Sources([ShardedDataset(split)]), AUGMENT, config, PREPROCESS, 0, cache)
    for position in range(3 * COUNT):
        found = item(source, position)
        index, number = cache.asked[-1]
        assert index == source.order.at(position)[1] and 0 <= number < 3
        assert torch.equal(found.picture, torch.full((4, 2, 2), float(10 * index + number)))
        view = cached_view(AUGMENT, PREPROCESS, 0, index, number, 80, 60)
        regions = source.dataset.sample(index).regions
        boxes_R4, kept = view.boxes([r.box for r in regions])
        wanted = {regions[k].phrase: box.tolist() for k, box in zip(kept, boxes_R4, strict=True)}
        assert dict(zip(found.phrases, found.boxes_R4.tolist(), strict=True)) == wanted
    assert {number for _, number in cache.asked} == {0, 1, 2}


def test_cached_views_are_fixed_and_differ():
    views = [cached_view(AUGMENT, PREPROCESS, 0, 5, n, 80, 60) for n in range(4)]
    assert views[0] == plain_view(PREPROCESS, 80, 60)
    assert len(set(views)) == 4
    assert views == [cached_view(AUGMENT, PREPROCESS, 0, 5, n, 80, 60) for n in range(4)]
    assert cached_view(AUGMENT, PREPROCESS, 0, 6, 1, 80, 60) != views[1]


# --- broken samples --------------------------------------------------------------------------------------------------

BROKEN = {"key002": "broken image", "key004": "size differs from record", "key005": "broken image"}


@pytest.fixture(scope="module")
def with_broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of eight samples: two torn JPEGs, a record of the wrong size with boxes, and a good one, without boxes."""
    samples = [sample(n) for n in range(8)]
    for torn in (2, 5):
        samples[torn] = dataclasses.replace(samples[torn], image=samples[torn].image[:300])
    samples[4] = dataclasses.replace(samples[4], width=160)
    samples[6] = dataclasses.replace(samples[6], width=160, height=120, regions=())
    return write_split(tmp_path_factory.mktemp("broken") / "train", samples)


def test_a_broken_samples_place_is_taken_by_the_next_positions_sample(with_broken: Path):
    source = reader(with_broken)
    keys = [f"key{source.order.at(p)[1]:03d}" for p in range(100)]
    read, in_a_row = source.__getitems__(range(80)), set()
    for position in range(80):
        good = next(p for p in range(position, 100) if keys[p] not in BROKEN)
        for missing in keys[position:good]:
            one = read.pop(0)
            assert isinstance(one, Broken) and (one.key, one.reason) == (missing, BROKEN[missing])
            assert one.shard is None and not one.dropped
        in_a_row.add(good - position)
        # Not only the same sample: its view, captions and boxes are those that it has at its own position.
        assert flat(read.pop(0)) == flat(item(source, good))
    assert not read and in_a_row >= {0, 1, 2}


def test_what_stands_in_depends_on_the_position_alone(with_broken: Path):
    whole = [flat(one) for one in reader(with_broken).__getitems__(range(40))]
    in_parts = reader(with_broken)
    parts = {begin: in_parts.__getitems__(range(begin, begin + 5)) for begin in reversed(range(0, 40, 5))}
    assert [flat(one) for begin in sorted(parts) for one in parts[begin]] == whole
    alone = reader(with_broken)
    assert [flat(alone[p]) for p in range(40)] == [one for one in whole if not isinstance(one[0], Broken)]


def test_batches_stay_whole_and_name_what_they_replaced(with_broken: Path):
    found = batches(stage_data(with_broken, samples=16, global_batch=4))
    assert [len(b.keys) for b in found] == [len(b.pictures) for b in found] == [4] * 4
    named = {(one.key, one.reason) for batch in found for one in batch.broken}
    assert named == set(BROKEN.items())
    assert {key for batch in found for key in batch.keys} == {f"key00{n}" for n in (0, 1, 3, 6, 7)}
    for workers in (1, 2):
        data = dataclasses.replace(AUGMENT, workers=workers)
        again = batches(stage_data(with_broken, data, samples=16, global_batch=4))
        assert [flat(b) for b in again] == [flat(b) for b in found]


def test_a_broken_shard_is_named_for_each_of_its_samples(tmp_path: Path):
    split = write_split(tmp_path / "train", [sample(n) for n in range(8)])
    shard = split / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:1024])
    dataset = Sources([ShardedDataset(split, verify=True)])
    read = Reader(dataset, AUGMENT, stage(), PREPROCESS, 0).__getitems__(range(8))
    broken = [one for one in read if isinstance(one, Broken)]
    assert {one.shard for one in broken} == {str(shard)} and len({one.reason for one in broken}) == 1
    assert {one.key for one in read if isinstance(one, Item)} == {f"key00{n}" for n in range(4)}
    assert sum(isinstance(one, Item) for one in read) == 8


@pytest.mark.parametrize("workers", [0, 1])
def test_data_of_which_nothing_can_be_read_are_given_up(tmp_path: Path, workers: int):
    samples = [dataclasses.replace(sample(n), image=sample(n).image[:300]) for n in range(3)]
    split = write_split(tmp_path / "train", samples)
    said = (
        r"train: 1000 samples in a row are broken, the last: sample key00[012]: broken image \(.+\); "
        "look at the data with `mmgem data check`"
    )
    with pytest.raises(UserError, match=said):
        batches(stage_data(split, dataclasses.replace(AUGMENT, workers=workers)))


# --- batches ---------------------------------------------------------------------------------------------------------


def make_item(key: str, captions: list[str], phrases: list[str], entities: list[str] | None = None) -> Item:
    boxes_R4 = torch.arange(4.0 * len(phrases)).reshape(-1, 4) / 100
    return Item(key, torch.zeros(3, 4, 4), tuple(captions), boxes_R4, tuple(phrases), tuple(entities or phrases))


def test_a_batch_says_which_text_describes_what():
    items = [
        make_item("a", ["one", "two"], ["x"]),
        Broken("broken", "why"),
        make_item("b", ["three"], []),
        make_item("c", [], ["y", "z"]),
    ]
    batch = Collate(codec(), 64)(items)
    assert batch.keys == ["a", "b", "c"] and [b.key for b in batch.broken] == ["broken"]
    assert batch.captions == 3
    assert batch.text_vector_M.tolist() == [0, 0, 1, 3, 4, 5]  # of [3 images; 3 regions]
    assert batch.region_image_R.tolist() == [0, 2, 2]
    assert batch.boxes_R4.shape == (3, 4)
    assert batch.caption_owner_M.tolist() == batch.image_id_B[[0, 0, 1]].tolist()
    words = ["one", "two", "three", "x", "y", "z"]
    ids = batch.texts.ids_nL.flatten()[batch.texts.word_index_W].tolist()
    assert ids == [i for text in codec().encode(words)[0] for i in text] * 2  # in both streams
    assert torch.equal(batch.boxes_R4, torch.cat([i.boxes_R4 for i in items if isinstance(i, Item)]))


def test_ids_of_what_belongs_together():
    items = [
        make_item("a", ["A red ball .", "something"], ["the dog", "brown dog", "tree"], ["e1", "e1", "e2"]),
        make_item("b", ["  a red ball .", "else"], ["Dog", "bench"], ["e1", "e3"]),
    ]
    batch = Collate(codec(), 64)(items)
    captions = positives(batch.image_id_B, batch.caption_owner_M, batch.caption_text_M)
    assert captions.int().tolist() == [[1, 1, 1, 0], [1, 0, 1, 1]]
    regions = positives(batch.entity_id_R, batch.entity_id_R, batch.phrase_text_R)
    # e1 of picture a is called dog twice; picture b's e1 is another entity, but its phrase is the same.
    assert regions.int().tolist() == [
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 0],
        [0, 0, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("robust", [False, True])
def test_whose_a_negative_is(robust: bool):
    others = (OtherText(0, "a blue ball", 0), OtherText(1, "a tall cone", 1, picture=1))
    made = (torch.ones(3, 4, 4), torch.zeros(3, 4, 4))  # shuffled patches; drawn of the second text
    item = dataclasses.replace(make_item("b", ["a red ball", "a small cone"], []), others=others, made=made)
    batch = Collate(codec(), 64, order_robust=robust)([make_item("a", ["one"], []), item])
    assert batch.other_caption_X.tolist() == [1, 2] and batch.other_picture_X.tolist() == [-1, 1]
    own, nobody, drawn = batch.image_id_B[1].item(), *batch.other_owner_X.tolist()
    assert batch.made_sample_H.tolist() == [1, 1]
    if robust:
        assert {nobody, drawn, *batch.made_id_H.tolist()} == {own}
    else:
        # The text and its picture belong together, the rest to nothing.
        assert drawn == batch.made_id_H[1].item()
        assert len({*batch.image_id_B.tolist(), nobody, *batch.made_id_H.tolist()}) == 5


def test_stable_ids():
    assert stable_id("text", "a dog") == stable_id("text", "a dog") != stable_id("image", "a dog")
    assert stable_id("image", "aB") != stable_id("image", "Ab")  # two files
    assert stable_id("entity", "a", "bc") != stable_id("entity", "ab", "c")
    assert 0 <= stable_id("x") < 1 << 62
    assert stable_id("image", "key000") == 1132960956923121709  # the same in every process and version


def test_long_texts_are_cut_before_emb_and_counted():
    long = "dog " * 60
    codes = codec(10)
    batch = Collate(codes, 32)([make_item("a", ["a dog", long], [long]), make_item("b", ["cat"], ["tree"])])
    assert batch.texts_cut == 2
    ids_N = batch.texts.ids_nL.flatten()
    assert (ids_N[batch.texts.emb_index_M] == codes.emb_id).all()
    cut = codes.encode([long])[0][0]
    assert len(cut) == 10
    for m in (1, 3):  # the second caption and the first phrase
        end = int(batch.texts.emb_index_M[m])
        assert ids_N[end - 10 : end].tolist() == cut
        labels = batch.texts.labels_T[batch.texts.label_text_T == m].tolist()
        assert labels == [*cut, codes.eos_id]


@pytest.mark.parametrize(
    ("loss", "embed", "captions", "phrases"),
    [
        (LossConfig(), True, True, True),
        (LossConfig(gen=0, region_gen=0), True, False, False),
        (LossConfig(region_gen=0), True, True, False),
        (LossConfig(emb=0, region_emb=0), False, True, True),
        (LossConfig(emb=0, gen=0, region_emb=0), False, False, True),
    ],
)
def test_streams_without_a_loss_are_not_packed(
    split: Path, loss: LossConfig, embed: bool, captions: bool, phrases: bool
):
    batch = batches(stage_data(split, loss=loss, samples=4))[0]
    assert (len(batch.texts.emb_index_M) > 0) == embed
    written_K = batch.texts.written_K
    assert (written_K < batch.captions).sum() == (batch.captions if captions else 0)
    assert (written_K >= batch.captions).sum() == (len(batch.boxes_R4) if phrases else 0) and len(batch.boxes_R4)


def test_some_of_the_drawn_boxes_are_written(split: Path):
    (batch,) = batches(stage_data(split, samples=4, max_regions=3, written_regions=2))
    image_R = batch.region_image_R
    written = [int(m) - batch.captions for m in batch.texts.written_K if m >= batch.captions]
    assert Counter(image_R.tolist()) == dict.fromkeys(range(4), 3)
    assert Counter(image_R[written].tolist()) == dict.fromkeys(range(4), 2)
    assert len(batch.texts.emb_index_M) == batch.captions + 12


def test_a_batch_moves_as_one(split: Path):
    batch = batches(stage_data(split, samples=4))[0]
    moved = batch.to(torch.device("meta"))
    assert moved.keys == batch.keys and moved.texts_cut == batch.texts_cut
    for name in batch.__slots__:
        if isinstance(getattr(batch, name), Tensor):
            assert getattr(moved, name).device.type == "meta", name
    assert moved.texts.ids_nL.device.type == "meta"


# --- the stage's batches ---------------------------------------------------------------------------------------------


def test_the_batches_of_a_stage(split: Path):
    data = stage_data(split)
    found = batches(data)
    assert data.steps == len(found) == len(data.train_dataloader()) == 10
    order = Order([4, 4, 4, 1], 0)
    keys = [[f"key{sample:03d}" for sample in order.places(order.step(step, 4))[1].tolist()] for step in range(10)]
    assert [b.keys for b in found] == keys
    again = batches(stage_data(split))
    assert [flat(b) for b in again] == [flat(b) for b in found]
    assert [flat(b) for b in batches(stage_data(split, seed=1))] != [flat(b) for b in found]


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Of 13 and of 6 samples, the second a quarter of what is seen."""
    folder = tmp_path_factory.mktemp("sources")
    write_split(folder / "one" / "train", [sample(n) for n in range(COUNT)])
    write_split(folder / "two" / "train", [sample(n) for n in range(100, 106)], shard_size=5)
    sources = [SourceConfig(path=str(folder / "one"), weight=3.0), SourceConfig(path=str(folder / "two"), weight=1.0)]
    return dataclasses.replace(AUGMENT, sources=sources, window=2, lanes=3)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 1), (1, 2), (2, 0), (2, 2), (4, 1)])
def test_global_batches_depend_neither_on_ranks_nor_on_workers(two_sources: DataConfig, ranks: int, workers: int):
    data, dataset = dataclasses.replace(two_sources, workers=workers), open_training_data(two_sources)
    alone = stage_data(dataset, two_sources, samples=48, global_batch=8)
    of_ranks = [
        batches(stage_data(dataset, data, rank=rank, ranks=ranks, samples=48, global_batch=8)) for rank in range(ranks)
    ]
    assert [len(found) for found in of_ranks] == [6] * ranks
    for whole, *parts in zip(batches(alone), *of_ranks, strict=True):
        assert [len(part.keys) for part in parts] == [8 // ranks] * ranks
        assert [key for part in parts for key in part.keys] == whole.keys
        assert torch.equal(torch.cat([part.pictures for part in parts]), whole.pictures)
        assert torch.equal(torch.cat([part.boxes_R4 for part in parts]), whole.boxes_R4)
        assert torch.equal(torch.cat([part.caption_text_M for part in parts]), whole.caption_text_M)
        assert sum(key.startswith("1:") for key in whole.keys) in (1, 2, 3)


@pytest.mark.parametrize(("micro_batch", "sizes"), [(3, [3, 3, 2]), (8, [8]), (100, [8]), (None, [8]), (1, [1] * 8)])
def test_a_share_comes_in_micro_batches(split: Path, micro_batch: int | None, sizes: list[int]):
    whole = batches(stage_data(split, samples=16, global_batch=8))
    data = stage_data(split, samples=16, global_batch=8, micro_batch=micro_batch)
    shares = list(data.train_dataloader())
    assert [[len(batch.keys) for batch in share.micros] for share in shares] == [sizes] * 2
    for share, batch in zip(shares, whole, strict=True):
        assert share.keys == batch.keys and share.regions == len(batch.boxes_R4)
        assert torch.equal(torch.cat([part.pictures for part in share.micros]), batch.pictures)
        for part in share.micros:
            alone = part.embedded_texts
            if len(sizes) == 1:
                assert alone is None
                continue
            assert alone is not None and len(alone.written_K) == 0
            assert len(alone.emb_index_M) == len(part.texts.emb_index_M)
            assert alone.useful_tokens < part.texts.useful_tokens
    resumed = stage_data(split, samples=16, global_batch=8, micro_batch=micro_batch)
    resumed.load_state_dict({"samples_consumed": 8})
    (last,) = resumed.train_dataloader()
    assert last.keys == whole[1].keys


@pytest.mark.parametrize("consumed", [4, 12, 28, 40])
def test_a_resumed_stage_goes_on_bit_by_bit(split: Path, consumed: int):
    whole = batches(stage_data(split))
    resumed = stage_data(split)
    resumed.load_state_dict({"samples_consumed": consumed})
    assert resumed.state_dict() == {"samples_consumed": consumed}
    rest = batches(resumed)
    assert len(rest) == 10 - consumed // 4
    assert [flat(b) for b in rest] == [flat(b) for b in whole[consumed // 4 :]]
    assert len(resumed.train_dataloader()) == 10  # the whole stage's, so that steps are counted on


# --- a split that is not there ---------------------------------------------------------------------------------------


def test_splits_that_cannot_be_opened_are_refused(split: Path, tmp_path: Path):
    data = DataConfig()
    with pytest.raises(UserError, match="data.path is missing: name a folder made by `mmgem data prepare`"):
        open_training_data(data)
    with pytest.raises(UserError, match=r"data.path=.*nowhere: no such folder; make it with `mmgem data prepare`"):
        open_split(data, str(tmp_path / "nowhere"), "train")
    with pytest.raises(UserError, match="no split val in .*; it has train"):
        open_split(data, str(split.parent), "val")
    write_split(tmp_path / "empty" / "train", [])
    with pytest.raises(UserError, match="empty/train: no samples"):
        open_split(data, str(tmp_path / "empty"), "train")
    assert len(open_split(data, str(split.parent), "train")) == COUNT


def test_the_helpers_captions_differ():
    """What the tests above rest on: texts that are told apart, pictures that JPEG keeps."""
    assert len(set(TEXTS)) == 8
    assert len({encoded(picture(n)) for n in range(COUNT)}) == COUNT
