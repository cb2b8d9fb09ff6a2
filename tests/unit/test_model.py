"""The path of MM-GEM as one model: what sees what, one vision pass, one LLM pass, and the methods of use."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import (
    TEXTS,
    build,
    clip_vit,
    cnn,
    distance,
    gradients,
    model_config,
    picture,
    shared_model,
    timm_vit,
    tokenizer,
)
from PIL import Image
from torch import Tensor

from mmgem import MMGem
from mmgem.config import VisionConfig
from mmgem.errors import UserError
from mmgem.images import move_boxes
from mmgem.model import Output
from mmgem.text import PackedTexts, pack_texts

PICTURES = [picture(n, 60 + 12 * n, 90 - 7 * n) for n in range(4)]
BOXES = [[(0.0, 0.0, 30.0, 40.0), (20.0, 5.0, 60.0, 70.0)], [], [(5.0, 5.0, 50.0, 60.0)], [(20.5, 0.5, 22.0, 2.0)]]
# Four images with two captions each for the first and the last, one for the others; then the boxes' phrases.
OF_CAPTION = [0, 0, 1, 2, 3, 3]
OF_REGION = [0, 0, 2, 3]


def batch_for(model: MMGem) -> dict[str, Any]:
    boxes = [move_boxes(b, model.preprocess.window(*i.size)) for i, b in zip(PICTURES, BOXES, strict=True)]
    texts = [*TEXTS[:6], "thing", "a red thing", "other", "the sky"]
    return {
        "pictures": torch.stack([model.preprocess(i) for i in PICTURES]),
        "texts": pack_texts(model.codec.encode(texts)[0], model.codec, 48),
        "text_vector_M": torch.tensor([*OF_CAPTION, *range(4, 8)]),
        "boxes_R4": torch.cat(boxes),
        "region_image_R": torch.tensor(OF_REGION),
    }


def run(model: MMGem, **changes: Any) -> Output:
    return model(**{**batch_for(model), **changes})


# --- forward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vision", [cnn(), timm_vit(), clip_vit(), cnn(resize="crop")])
def test_training_and_use_see_the_same_vectors(vision: VisionConfig):
    model = build(model_config(vision=vision))
    out = run(model)
    v_NE, r = model.image_and_region_vectors(PICTURES, BOXES)
    assert out.v_BE.shape == (4, 32) and out.r_RE.shape == (4, 32) and out.t_ME.shape == (10, 32)
    assert distance(out.v_BE.detach(), v_NE) < 1e-5
    assert distance(out.r_RE.detach(), torch.cat(r)) < 1e-5
    texts = [*TEXTS[:6], "thing", "a red thing", "other", "the sky"]
    assert distance(out.t_ME.detach(), model.text_vectors(texts)) < 1e-5


def test_a_forward_is_one_pass_of_the_tower_and_one_of_the_llm():
    model, calls = build(), []
    model.vision.model.register_forward_hook(lambda *_: calls.append("vision"))  # pyright: ignore
    model.vision.register_forward_pre_hook(lambda *_: calls.append("vision"))
    model.language.backbone.register_forward_pre_hook(lambda *_: calls.append("llm"))
    run(model)
    assert calls == ["vision", "llm"]
    calls.clear()
    model.image_and_region_vectors(PICTURES, BOXES)
    assert calls == ["vision"]


def test_from_the_trunks_output():
    config = VisionConfig(name="mobilenetv2_050", image_size=64, train_from="blocks.4")
    for vision in (config, cnn(), clip_vit()):
        model = build(model_config(vision=vision))
        hidden = model.vision.trunk(batch_for(model)["pictures"])
        cached, whole = run(model, pictures=hidden, from_trunk=True), run(model)
        for name in ("v_BE", "r_RE", "t_ME", "hidden_TD"):
            assert distance(getattr(cached, name).detach(), getattr(whole, name).detach()) < 1e-5, name


def test_the_embedding_stream_never_sees_an_image():
    """Although both streams stand in the same rows."""
    model = build()
    pictures = batch_for(model)["pictures"].requires_grad_()
    out = run(model, pictures=pictures)

    def seen(x: Tensor) -> float:
        weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        return torch.autograd.grad((x * weights).sum(), pictures, retain_graph=True)[0].abs().sum().item()

    assert seen(out.t_ME) == 0.0
    assert seen(out.hidden_TD) > 1e-3 and seen(out.v_BE) > 1e-3


def test_a_caption_sees_its_own_image_or_box_and_no_other():
    model = build()
    texts: PackedTexts = batch_for(model)["texts"]
    before = run(model).hidden_TD

    def changed(**inputs: Any) -> set[int]:
        """The texts whose states at label positions moved."""
        moved_T = (run(model, **inputs).hidden_TD - before).abs().amax(dim=1) > 1e-4
        return set(texts.label_text_T[moved_T].tolist())

    other = batch_for(model)["pictures"].clone()
    other[2] = other[2].flip(1)
    # Image 2: its caption (the fourth text), and the phrase of its box (the ninth).
    assert changed(pictures=other) == {3, 8}
    boxes_R4 = batch_for(model)["boxes_R4"].clone()
    boxes_R4[1] = torch.tensor([0.0, 0.0, 0.2, 0.2])
    assert changed(boxes_R4=boxes_R4) == {7}
    swapped = torch.tensor([*OF_CAPTION, 5, 4, 6, 7])
    assert changed(text_vector_M=swapped) == {6, 7}


def test_the_visual_token_is_made_of_the_vector_that_is_retrieved_with():
    """h3 of the un-normalised v and r, written into the one place before [CAP]."""
    model, seen = build(), {}
    model.h3.register_forward_hook(lambda _, given, gave: seen.update(given=given[0], gave=gave))
    model.language.register_forward_pre_hook(lambda _, given: seen.update(rows=given[0]))
    out, texts = run(model), batch_for(model)["texts"]
    assert torch.equal(seen["given"], torch.cat([out.v_BE, out.r_RE])[batch_for(model)["text_vector_M"]])
    rows_ND = seen["rows"].flatten(0, 1)
    assert torch.equal(rows_ND[texts.visual_index_K], seen["gave"])
    # Everywhere else stand the words' own embeddings.
    rest = torch.ones(len(rows_ND), dtype=torch.bool).index_fill(0, texts.visual_index_K, False)
    assert torch.equal(rows_ND[rest], model.language.embed(texts.ids_nL).flatten(0, 1)[rest])
    v_NE = model.image_vectors(PICTURES)
    assert model.write(v_NE, max_new_tokens=8) != model.write(10 * v_NE, max_new_tokens=8)


def test_gradients_reach_every_part_from_each_loss():
    model = build()
    for name, kind in (("t_ME", "text"), ("hidden_TD", "written"), ("r_RE", "box")):
        model.zero_grad(set_to_none=True)
        (getattr(run(model), name) * torch.randn(1)).square().sum().backward()
        found = {n.split(".")[0] for n, g in gradients(model).items() if g.any()}
        assert (
            found
            == {
                "text": {"language", "h2"},
                "written": {"vision", "h1", "h3", "language"},
                "box": {"vision", "h1"},
            }[kind]
        )


def test_no_boxes_and_streams_left_out():
    model = build()
    ids = model.codec.encode(list(TEXTS[:6]))[0]
    plain: dict[str, Any] = {"text_vector_M": torch.tensor(OF_CAPTION), "boxes_R4": None, "region_image_R": None}
    out = run(model, texts=pack_texts(ids, model.codec, 48), **plain)
    assert out.r_RE.shape == (0, 32) and out.t_ME.shape == (6, 32)
    none = torch.zeros(0, dtype=torch.long)
    same = run(model, texts=pack_texts(ids, model.codec, 48), **{**plain, "boxes_R4": torch.zeros(0, 4), "region_image_R": none})  # fmt: skip # noqa: E501
    assert torch.equal(same.v_BE, out.v_BE) and same.r_RE.shape == (0, 32)
    read = run(model, texts=pack_texts(ids, model.codec, 48, write=[False] * 6), **plain)
    assert distance(read.t_ME, out.t_ME) < 1e-5 and len(read.hidden_TD) == 0
    some = pack_texts(ids, model.codec, 48, write=[False, False, True, False, True, True])
    few, full_T = run(model, texts=some, **plain), pack_texts(ids, model.codec, 48).label_text_T
    assert distance(few.hidden_TD, out.hidden_TD[(full_T == 2) | (full_T >= 4)]) < 1e-5
    wrote = run(model, texts=pack_texts(ids, model.codec, 48, embed=False), **plain)
    assert wrote.t_ME.shape == (0, 32) and distance(wrote.hidden_TD, out.hidden_TD) < 1e-5


def test_bf16_autocast_runs_with_boxes():
    model = build()
    exact = run(model)
    with torch.autocast("cpu", torch.bfloat16):
        half = run(model)
        sum(getattr(half, n).float().square().mean() for n in ("v_BE", "r_RE", "t_ME", "hidden_TD")).backward()
    for name in ("v_BE", "r_RE", "t_ME", "hidden_TD"):
        similar = torch.cosine_similarity(getattr(half, name).float(), getattr(exact, name), dim=-1)
        assert similar.min() > 0.98, name
    assert all(torch.isfinite(g).all() for g in gradients(model).values())


# --- dropout, standard, parts ----------------------------------------------------------------------------------------


def test_dropout_is_in_training_only():
    model = build(model_config(visual_dropout=0.3, head_dropout=0.3, token_dropout=0.3))
    plain = build()
    plain.load_state_dict(model.state_dict())
    assert distance(run(model).hidden_TD, run(plain).hidden_TD) < 1e-6
    for settings, moved in (
        ({"visual_dropout": 0.5}, {"v_BE", "r_RE", "hidden_TD"}),
        ({"head_dropout": 0.5}, {"t_ME", "hidden_TD"}),
        ({"token_dropout": 0.5}, {"t_ME", "hidden_TD"}),
    ):
        model = build(model_config(vision=clip_vit(), **settings)).train()  # a tower without batch norm
        torch.manual_seed(1)
        first, second = run(model), run(model)
        names = {"v_BE", "r_RE", "t_ME", "hidden_TD"}
        assert {n for n in names if distance(getattr(first, n), getattr(second, n)) > 1e-3} == moved


def test_token_dropout_hides_words_and_nothing_else():
    model = build(model_config(vision=clip_vit(), token_dropout=0.999999)).train()
    batch = batch_for(model)
    ids = model.codec.encode(["a red dog on the grass", "two men ride a bicycle"])[0]
    length = min(map(len, ids))
    texts = pack_texts([i[:length] for i in ids], model.codec, 48)
    one_image = {**batch, "text_vector_M": torch.tensor([0, 0]), "boxes_R4": None, "region_image_R": None}
    out = model(**{**one_image, "texts": texts})
    first, second = (out.hidden_TD[texts.label_text_T == m] for m in (0, 1))
    assert distance(first, second) < 1e-5  # no word is left to tell them apart …
    assert distance(out.t_ME[0], out.t_ME[1]) < 1e-5  # … in either stream
    out = model(**{**one_image, "texts": texts, "text_vector_M": torch.tensor([0, 1])})
    first, second = (out.hidden_TD[texts.label_text_T == m] for m in (0, 1))
    assert torch.dist(first, second) > 0.1  # the image is still seen


def test_the_standard_of_the_map():
    model = build()
    pooled_NC = torch.randn(200, 32) * torch.linspace(0.5, 2, 32) + torch.linspace(-3, 3, 32)
    pooled_NC[:, 5] = 1.0  # a channel that never moves
    model.set_standard(pooled_NC)
    seen = {}
    model.h1.register_forward_pre_hook(lambda _, given: seen.update(x=given[0]))
    model.project_visual(pooled_NC)
    assert seen["x"].mean(dim=0).abs().max() < 1e-4
    std_C = seen["x"].std(dim=0)
    moving = torch.arange(32) != 5
    assert torch.allclose(std_C[moving], torch.ones(31), atol=1e-3)
    assert std_C[5] == 0 and model.map_std_C[5] > 0.01
    again = build(seed=3)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.map_std_C, model.map_std_C)  # it is part of the model


def test_each_parameter_is_in_one_part():
    model = build()
    parts = model.parts()
    names = [name for parameters in parts.values() for name, _ in parameters]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert {n for n, _ in parts["projections"]} == {
        "language.added.rows_2D",
        "logit_scale",
        *(f"h{i}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")),
    }
    assert all(n.startswith("vision.") for n, _ in parts["vision"]) and parts["vision"]
    assert all(n.startswith("language.hf.") for n, _ in parts["llm"]) and parts["llm"]


def test_the_scale_starts_at_clips_and_is_clamped():
    model = build()
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    model.logit_scale.data.fill_(9.0)
    model.clamp_logit_scale()
    assert model.logit_scale.item() == pytest.approx(math.log(100))
    model.logit_scale.data.fill_(1.0)
    model.clamp_logit_scale()
    assert model.logit_scale.item() == 1.0


def test_it_can_be_built_without_memory():
    with torch.device("meta"):
        model = MMGem(model_config(), tokenizer(), load_weights=False)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    real = build()
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}


# --- use -------------------------------------------------------------------------------------------------------------


def test_vectors_do_not_depend_on_the_batch():
    model = shared_model()
    v_NE, r = model.image_and_region_vectors(PICTURES, BOXES)
    assert torch.pdist(v_NE).min() > 0.01 and v_NE.dtype == torch.float32
    assert [len(x) for x in r] == [2, 0, 1, 1] and all(x.shape[1] == 32 for x in r)
    again_NE, again = model.image_and_region_vectors(PICTURES, BOXES, batch_size=3)
    assert distance(again_NE, v_NE) < 1e-5
    for x, y in zip(again, r, strict=True):
        assert torch.allclose(x, y, atol=1e-5)
    assert distance(model.image_vectors(PICTURES), v_NE) < 1e-5
    assert distance(torch.cat(model.region_vectors(PICTURES, BOXES)), torch.cat(r)) < 1e-5
    with pytest.raises(ValueError):
        model.region_vectors(PICTURES, BOXES[:2])


def test_nothing_in_nothing_out():
    model = shared_model()
    assert model.image_vectors([]).shape == (0, 32)
    assert model.text_vectors([]).shape == (0, 32)
    assert model.region_vectors([], []) == []


def test_a_box_of_the_whole_picture_is_the_picture():
    model = shared_model()
    whole = [[(0.0, 0.0, float(i.width), float(i.height))] for i in PICTURES]
    v_NE, r = model.image_and_region_vectors(PICTURES, whole)
    assert distance(torch.cat(r), v_NE) < 1e-5


def test_a_box_is_of_its_place():
    """The vector of a box follows what is inside it: a patch moved over the picture is found again."""
    model = build(model_config(vision=clip_vit()))
    patch = picture(77, 16, 16)

    def with_patch(x: int, y: int) -> Image.Image:
        image = Image.new("RGB", (64, 64), (90, 90, 90))
        image.paste(patch, (x, y))
        return image

    places = [(0, 0), (48, 16), (16, 48)]
    boxes = [[(x, y, x + 16, y + 16) for x, y in places]] * 3
    plain = torch.stack(model.region_vectors([Image.new("RGB", (64, 64), (90, 90, 90))] * 3, boxes))
    moved = torch.stack(model.region_vectors([with_patch(*p) for p in places], boxes))
    change = (moved - plain).norm(dim=-1)  # picture x box
    assert change.argmax(dim=1).tolist() == [0, 1, 2]


def test_h1_serves_pooled_boxed_and_single_places_alike():
    model = build()
    model.set_standard(torch.randn(50, 32) * 2 + 1)
    map_BCHW = torch.randn(2, 32, 3, 5)
    places_BHWE = model.project_visual(model.aggregator.locations(map_BCHW))
    assert torch.allclose(places_BHWE.mean(dim=(1, 2)), model.image_vectors_from_map(map_BCHW), atol=1e-5)


def test_embed_gives_vectors_of_length_one():
    model = shared_model()
    v_NE, t_NE = model.embed_images(PICTURES), model.embed_texts(TEXTS)
    r = model.embed_regions(PICTURES, BOXES)
    for x in (v_NE, t_NE, torch.cat(r)):
        assert torch.allclose(x.norm(dim=1), torch.ones(len(x)), atol=1e-5)
    assert torch.allclose(v_NE, torch.nn.functional.normalize(model.image_vectors(PICTURES), dim=1))
    assert [len(x) for x in r] == [2, 0, 1, 1]


def test_the_similarity_map():
    model = shared_model()
    found_HW = model.similarity_map(PICTURES[1], TEXTS[0])
    assert found_HW.shape == (2, 2)
    map_1CHW = model.vision(model.preprocess(PICTURES[1])[None])
    place_E = model.project_visual(map_1CHW[0, :, 1, 0])
    wanted = torch.cosine_similarity(place_E, model.text_vectors([TEXTS[0]])[0], dim=0)
    assert found_HW[1, 0].item() == pytest.approx(wanted.item(), abs=1e-5)
    assert found_HW.std() > 1e-4


def test_the_methods_of_clip():
    model = build()
    pixels_B3SS = torch.stack([model.preprocess(i) for i in PICTURES])
    v_BE, t_BE = model.encode_image(pixels_B3SS), model.encode_text(model.tokenize(TEXTS))
    assert v_BE.requires_grad and t_BE.requires_grad
    assert distance(v_BE.detach(), model.image_vectors(PICTURES)) < 1e-5
    assert distance(t_BE.detach(), model.text_vectors(TEXTS)) < 1e-5
    assert torch.allclose(model.encode_image(pixels_B3SS, normalize=True).norm(dim=1), torch.ones(4), atol=1e-5)
    assert torch.allclose(model.encode_text(model.tokenize(TEXTS), normalize=True).norm(dim=1), torch.ones(8), atol=1e-5)  # fmt: skip # noqa: E501
    lists = [model.codec.embedding_stream(i) for i in model.codec.encode(TEXTS)[0]]
    assert torch.equal(model.encode_text(lists), t_BE)


def test_use_in_the_middle_of_training_leaves_everything_as_it_was():
    """Parts that training has put into evaluation, since they are frozen, must stay there."""
    model = build().train()
    model.vision.eval()
    flags = {n: m.training for n, m in model.named_modules()}
    statistics = {n: b.clone() for n, b in model.vision.named_buffers()}
    model.caption(PICTURES[:1], max_new_tokens=2)
    model.image_and_region_vectors(PICTURES, BOXES)
    model.text_vectors(TEXTS)
    model.similarity_map(PICTURES[0], TEXTS[0])
    assert {n: m.training for n, m in model.named_modules()} == flags
    assert all(torch.equal(b, statistics[n]) for n, b in model.vision.named_buffers())
    with pytest.raises(ValueError):
        model.region_vectors(PICTURES, BOXES[:1])
    assert {n: m.training for n, m in model.named_modules()} == flags  # after an error, too


def test_use_is_without_dropout_and_gradient():
    model = build(model_config(vision=clip_vit(), visual_dropout=0.5, head_dropout=0.5)).train()
    first: Tensor = model.image_vectors(PICTURES)
    assert torch.equal(first, model.image_vectors(PICTURES)) and not first.requires_grad
    assert torch.equal(model.text_vectors(TEXTS), model.text_vectors(TEXTS))


def test_long_texts_are_cut():
    model = shared_model()
    long = " ".join(["dog"] * 40)
    cut = model.codec.decode(model.codec.encode([long])[0][0])
    assert len(cut) < len(long)
    assert distance(model.text_vectors([long]), model.text_vectors([cut])) < 1e-6


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((10, 10, 10, 40), "has no area"),
        ((40, 10, 10, 40), "has no area"),
        ((10, 40, 40, 10), "has no area"),
        ((float("nan"), 0, 40, 10), "has no area"),
        ((60, 10, 80, 40), "lies outside what the model sees of a picture of 60 x 90 pixels"),
        ((10, -40, 40, -2), "lies outside"),
    ],
)
def test_boxes_of_which_nothing_is_seen_are_refused(box: tuple[float, float, float, float], message: str):
    with pytest.raises(UserError, match=message):
        shared_model().embed_regions([PICTURES[0]], [[(5, 5, 20, 20), box]])


def test_a_box_outside_the_central_square_is_refused_where_only_that_is_seen():
    model = build(model_config(vision=cnn(resize="crop")))
    assert model.embed_regions([picture(0, 60, 90)], [[(5, 10, 20, 20)]])[0].shape[0] == 1  # a part of it is seen
    with pytest.raises(UserError, match="lies outside what the model sees"):
        model.embed_regions([picture(0, 60, 90)], [[(5, 0, 20, 14)]])


def test_a_box_over_the_border_is_clipped():
    model = shared_model()
    wide, clipped = model.embed_regions([PICTURES[0]], [[(-20, 10, 40, 120), (0, 10, 40, 90)]])[0]
    assert distance(wide, clipped) < 1e-6
