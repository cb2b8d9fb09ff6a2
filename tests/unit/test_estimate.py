"""What `mmgem check` says of a step: counts against closed formulas and torch's own counter, memory and traffic against
the sums that ZeRO and DDP are known by, and refusals whose advice is followed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import LLAMA, codec
from torch.utils.flop_counter import FlopCounterMode

from mmgem.cli import main
from mmgem.config import Config, StageConfig, TrainingConfig, config_from_tree, load_config
from mmgem.data.plan import Machines
from mmgem.errors import UserError
from mmgem.model import MMGem
from mmgem.text import pack_texts, train_tokenizer
from mmgem.training.arithmetic import (
    TextCounts,
    count_parameters,
    made_up_texts,
    measure_shapes,
    set_stage,
    step_activations,
    step_flops,
    without_memory,
)
from mmgem.training.check import Assumptions, DataCounts, check, meta_counts
from mmgem.training.estimate import (
    GPUS,
    PLAIN,
    Engine,
    Gpu,
    Weights,
    engine_of,
    gpu_of,
    held_vectors,
    memory,
    states,
    step_time,
    traffic,
)

CONFIGS = Path(__file__).parents[2] / "configs"
CNN = {"name": "resnet10t", "config": {"channels": [16, 24, 32, 48], "stem_width": 8}, "image_size": 64}
VIT = {"library": "open_clip", "config": {"layers": 3, "width": 64, "head_width": 32, "patch_size": 16}}
VIT |= {"image_size": 64}


def config_of(vision: dict[str, Any] = CNN, stage: dict[str, Any] | None = None, **changes: Any) -> Config:
    model = {"vision": vision, "llm": {"config": LLAMA}, "embed_dim": 32, "max_tokens": 16}
    model |= changes.pop("model", {})
    stages = [{"steps": 10, "global_batch": 16, **(stage or {})}]
    return config_from_tree({"model": model, "stages": stages, **changes}, "test")


def on_meta(config: Config) -> MMGem:
    with torch.device("meta"):
        return MMGem(config.model, train_tokenizer(["a"], 300, lowercase=True), load_weights=False)


# --- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layers", "width", "key_width", "inner", "published"),
    [
        ("stage1_vit_l14_tinyllama", 22, 2048, 256, 5632, 1_100_048_384),
        ("stage1_vit_l14_7b_zero3", 32, 4096, 4096, 11008, 6_738_415_616),
    ],
)
def test_llms_have_the_published_parameters(
    name: str, layers: int, width: int, key_width: int, inner: int, published: int
) -> None:
    block = 2 * width**2 + 2 * width * key_width + 3 * width * inner + 2 * width
    counts, _ = meta_counts(load_config(CONFIGS / f"{name}.yaml"))
    assert counts["llm"] == 2 * 32000 * width + layers * block + width == published
    assert counts["vision"] == 303_179_776


def test_what_trains_in_a_stage() -> None:
    config = config_of({"name": "mobilenetv2_050", "image_size": 64, "train_from": "blocks.5"})
    model = on_meta(config)
    everything = count_parameters(model)
    set_stage(model, config.stages[0])
    trained = count_parameters(model, trained=True)
    assert trained["llm"] == everything["llm"] and 0 < trained["vision"] < everything["vision"]
    before = sum(p.numel() for p in model.vision.frozen_parameters())
    assert trained["vision"] == everything["vision"] - before
    set_stage(model, StageConfig(freeze=["vision", "llm"]))
    trained = count_parameters(model, trained=True)
    assert trained == {"vision": 0, "llm": 0, "projections": everything["projections"], "all": trained["projections"]}
    assert not model.vision.training and model.training


# --- texts and FLOPs ------------------------------------------------------------------------------------------------


def test_texts_are_counted_as_they_are_packed() -> None:
    words = codec()
    packed = pack_texts([[7, 8, 9], [7, 8, 9], [5]], words, 16, write=[True, False, True])
    # [BOS] x [EMB]: 5 (once, for two equal texts) and 3; [BOS] V [CAP] x: 6 and 4.
    counts = TextCounts.of(packed)
    assert (counts.tokens, counts.embed_tokens, counts.labels) == (5 + 3 + 6 + 4, 8, 4 + 2)
    assert (counts.pairs, counts.embed_pairs) == (15 + 6 + 21 + 10, 15 + 6)
    assert (counts.texts, counts.written) == (3, 2)
    assert (counts.padded_tokens, counts.padded_pairs) == (2 * 16, 2 * 16**2)


def test_flops_of_the_methods_own_size() -> None:
    """ViT-L/14: 24 blocks of 12 width² on 257 places and full attention, and the patches' projection."""
    config = load_config(CONFIGS / "stage1_vit_l14_tinyllama.yaml", ["stages.0.patch_dropout=0"])
    model = on_meta(config)
    set_stage(model, config.stages[0])
    shapes = measure_shapes(model, config.stages[0])
    width, places = 1024, 257
    blocks = 24 * (2 * places * 12 * width**2 + 4 * places**2 * width)
    assert shapes.picture == blocks + 2 * 256 * width * 3 * 14 * 14
    assert shapes.token == 2 * 22 * (2 * 2048**2 + 2 * 2048 * 256 + 3 * 2048 * 5632)
    assert shapes.pair == 22 * 4 * 2048 and shapes.label == 2 * 2048 * 32000
    assert shapes.trained == {"vision", "llm", "projections"} and shapes.trunk == 0
    # Half the patches left out: about half the tower.
    config.stages[0].patch_dropout = 0.5
    set_stage(model, config.stages[0])
    assert measure_shapes(model, config.stages[0]).picture == pytest.approx(0.49 * shapes.picture, rel=0.02)


@pytest.mark.parametrize("freeze", [[], ["llm"], ["vision"], ["vision", "llm"]])
@pytest.mark.parametrize("again", [False, True])
def test_flops_are_those_that_torch_counts(freeze: list[str], again: bool) -> None:
    """Of a real forward and backward pass, without losses."""
    vit = {"name": "vit_tiny_patch16_224", "config": {"img_size": 64, "depth": 3, "embed_dim": 64, "num_heads": 2}}
    vit |= {"image_size": 64, "gradient_checkpointing": again}
    llm = {"config": LLAMA, "attention": "eager", "gradient_checkpointing": again}
    config = config_of(vit, {"freeze": freeze}, model={"llm": llm})
    stage = config.stages[0]
    torch.manual_seed(0)
    model = MMGem(config.model, train_tokenizer(["a"], 300, lowercase=True))
    set_stage(model, stage)
    texts = made_up_texts(stage, 8, 6, model.codec, 32)
    shapes, counts = measure_shapes(model, stage), TextCounts.of(texts)
    with FlopCounterMode(display=False) as counter:
        out = model(torch.randn(8, 3, 64, 64), texts, torch.arange(8))
        (out.v_BE.sum() + out.t_ME.sum() + out.hidden_TD.sum()).backward()
    # torch counts no attention that is fused on CPU: the tower's, 17 places, forward, again, and twice backward.
    trained = "vision" not in freeze
    counted = counter.get_total_flops() + 8 * 3 * 4 * 17**2 * 64 * ((3 + again) if trained else 1)
    # We count a gradient for the pictures, too; and as recomputed also the patches' projection, and of each layer the
    # last product, which nothing needs and torch leaves out.
    patches, last = 8 * 2 * 16 * 64 * (3 * 16 * 16), 3 * 8 * 2 * 17 * 64 * 256
    counted += trained * patches + again * trained * (patches + last)
    counted += again * 2 * 2 * counts.padded_tokens * 64 * 96
    wanted = step_flops(shapes, stage, 8, counts)
    words = counts.labels * shapes.label
    losses = words * (3 + ("llm" in shapes.trained)) + 4 * 2 * 32 * 8 * counts.texts
    assert wanted.done - losses == pytest.approx(counted, rel=2e-3)
    assert wanted.model == pytest.approx(wanted.done - wanted.recomputed - wanted.padding)


def test_micro_batches_embed_twice() -> None:
    config = config_of(stage={"micro_batch": 4})
    stage = config.stages[0]
    model = on_meta(config)
    set_stage(model, stage)
    shapes, counts = measure_shapes(model, stage), TextCounts.of(made_up_texts(stage, 16, 6, model.codec, 32))
    assert step_flops(shapes, stage, 4, counts).embedded_again == 0  # one micro-batch is all of it
    again = step_flops(shapes, stage, 16, counts)
    tower_and_texts = 16 * shapes.picture + 16 * (8 * shapes.token + 36 * shapes.pair)
    assert tower_and_texts < again.embedded_again < 1.1 * tower_and_texts
    assert again.model == step_flops(shapes, StageConfig(), 16, counts).model


# --- activations ----------------------------------------------------------------------------------------------------


def traced(config: Config, samples: int = 8, **options: Any) -> int:
    model = on_meta(config)
    mode = without_memory(model)
    set_stage(model, config.stages[0])
    texts = made_up_texts(config.stages[0], samples, 8, model.codec, 32)
    return step_activations(model, mode, config.stages[0], samples, texts, **options).alone


def deeper(layers: int) -> dict[str, Any]:
    return VIT | {"config": VIT["config"] | {"layers": layers}}


def test_a_frozen_tower_keeps_no_activations() -> None:
    frozen = [traced(config_of(deeper(n), {"freeze": ["vision"]})) for n in (2, 6)]
    trained = [traced(config_of(deeper(n))) for n in (2, 6)]
    assert frozen[0] == frozen[1] < trained[0]
    # A block keeps at least its input, q, k, v and what attention, norms and the MLP (4 wide, twice) give.
    assert trained[1] - trained[0] >= 4 * 8 * 17 * 64 * 4 * 14


def test_activations_grow_with_samples_and_shrink_with_recomputing() -> None:
    few, many = (traced(config_of(VIT), samples) for samples in (32, 64))
    assert many == pytest.approx(2 * few, rel=0.05)
    llm = {"config": LLAMA | {"num_hidden_layers": 8}}
    plain = traced(config_of(deeper(8), model={"llm": llm}), 32)
    both = {"llm": llm | {"gradient_checkpointing": True}}
    assert traced(config_of(deeper(8) | {"gradient_checkpointing": True}, model=both), 32) < 0.5 * plain
    assert traced(config_of(deeper(8), model={"llm": llm}), 32, autocast=True) < 0.8 * plain


def test_boxes_are_held_too() -> None:
    assert traced(config_of(VIT, {"max_regions": 4})) > traced(config_of(VIT))


def test_attention_with_dropout_keeps_its_scores_on_cpu_only() -> None:
    """2 layers, 4 heads, rows of 32, a score and its dropped copy in fp32, and the mask of what was dropped."""
    gpt = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0}
    config = config_of(VIT, model={"llm": {"config": gpt | {"embd_pdrop": 0.0, "attn_pdrop": 0.1}}})
    model = on_meta(config)
    rows = len(made_up_texts(config.stages[0], 8, 8, model.codec, 32).ids_nL)
    more = traced(config, on_gpu=False) - traced(config, on_gpu=True)
    assert more > rows * 2 * 4 * 32**2 * 4


# --- engines, memory, traffic, time ---------------------------------------------------------------------------------


def test_what_auto_means() -> None:
    auto = TrainingConfig(precision="bf16")
    assert engine_of(auto, 1, True, True) == Engine(PLAIN, 1, 4, autocast=True)
    several = engine_of(auto, 8, True, True)
    assert (several.strategy, several.weight, several.autocast) == ("deepspeed_1", 2, False)
    assert engine_of(TrainingConfig(), 2, False, False).strategy == "ddp"
    settings = {"zero_optimization": {"reduce_bucket_size": 1e6, "overlap_comm": False}}
    told = engine_of(TrainingConfig(strategy="deepspeed_2", deepspeed=settings), 2, True, False)
    assert (told.bucket, told.overlap, told.weight) == (1_000_000, False, 4)


def test_memory_of_zero_as_its_paper_has_it() -> None:
    """Rajbhandari et al., figure 1: 7.5 B parameters on 64 GPUs; 120 GB, and 31.4, 16.6 and 1.9 GB at stages 1 to 3."""
    weights = Weights(7_500_000_000, 7_500_000_000, 1)
    wanted = {1: 31.4e9, 2: 16.6e9, 3: 1.9e9}
    for zero, total in wanted.items():
        held = states(Engine(f"deepspeed_{zero}", 64, 2), weights)
        assert held.weights + held.gradients + held.optimizer == pytest.approx(total, rel=0.02)
    held = states(Engine(PLAIN, 1, 4), weights)
    assert held.weights + held.gradients + held.optimizer == 16 * 7.5e9


def test_what_else_is_held() -> None:
    weights = Weights(100, 80, 10)
    assert states(Engine("ddp", 2, 4), weights).buffers == 4 * 80
    two = states(Engine("deepspeed_2", 2, 2, bucket=7), weights)
    assert (two.buffers, two.gradients, two.optimizer, two.update) == (2 * 7 * 2, 80, 12 * 80 / 2, 8 * 80 / 2)
    three = states(Engine("deepspeed_3", 2, 2, bucket=7, gathered=30), weights)
    assert (three.weights, three.buffers) == (100, 7 * 2 + 30 * 2)
    off = states(Engine("deepspeed_2", 2, 2, offload="optimizer", bucket=7), weights)
    assert (off.optimizer, off.gradients, off.host, off.update) == (0, 0, 16 * 80 / 2, 0)
    away = states(Engine("deepspeed_3", 2, 2, offload="parameters", bucket=7), weights)
    assert (away.weights, away.host) == (0, 16 * 80 / 2 + 100)
    assert states(Engine(PLAIN, 1, 4), weights, average=True).average == 400
    sharded = states(Engine("fsdp2", 4, 4, autocast=True), weights)
    assert (sharded.weights, sharded.gradients, sharded.optimizer) == (100, 80, 160)


def test_gradients_come_as_activations_go() -> None:
    held = states(Engine(PLAIN, 1, 4, on_gpu=False), Weights(100, 100, 1))
    once = memory(held, activations=1000, with_gradients=1100, vectors=0, one_pass=True)
    assert once.total == 400 + 800 + 1100
    assert (
        memory(held, activations=1000, with_gradients=1100, vectors=0, one_pass=False).total == 400 + 800 + 400 + 1000
    )


def test_traffic_as_performance_is_planned_with() -> None:
    """1.4 B in bf16 over many ranks: 5.6 GB for ZeRO 1, 8.4 GB for ZeRO 3; micro-batches multiply what is not once."""
    weights = Weights(1_400_000_000, 1_400_000_000, 1)

    def sent(strategy: str, micro_batches: int = 1) -> float:
        return traffic(Engine(strategy, 10_000, 2), weights, micro_batches, 0, 768).total

    assert sent("deepspeed_1") == pytest.approx(5.6e9, rel=1e-3) == sent("deepspeed_1", 4)
    assert sent("deepspeed_2", 4) == pytest.approx(2.8e9 * 5, rel=1e-3)
    assert sent("deepspeed_3") == pytest.approx(8.4e9, rel=1e-3)
    assert sent("deepspeed_3", 4) == pytest.approx(2.8e9 * (4 + 4 + 4 + 4), rel=1e-3)  # and a forward more for each
    assert traffic(Engine("ddp", 2, 4), weights, 1, 0, 8).gradients == 4 * 1.4e9
    assert traffic(Engine(PLAIN, 1, 4), weights, 1, 100, 8).total == 0
    assert traffic(Engine("ddp", 4, 4), Weights(0, 0, 1), 1, 100, 8).vectors == 4 * 400 * (2 * 8 + 6) * 3 / 4


def test_vectors_are_held_where_there_are_micro_batches() -> None:
    whole, cut = (held_vectors(StageConfig(micro_batch=n), 64, 64, 32, 2) for n in (64, 16))
    assert cut - whole == 4 * 32 * 2 * (64 + 64)


def test_time_of_a_step() -> None:
    gpu, weights = Gpu(100.0, 10.0, 1e9, 1000.0, 50.0, 5.0), Weights(100, 100, 1)
    time = step_time(200.0, 100.0, Engine("deepspeed_1", 4, 2), weights, gpu, nodes=1, mfu=0.5, network=None)
    assert (time.compute, time.communication, time.update) == (4.0, 2.0, 28 * 100 / 4 / 1000)
    assert (time.total, time.overlapped) == (6.7, 4.7)
    time = step_time(200.0, 100.0, Engine("ddp", 4, 4), weights, gpu, nodes=2, mfu=0.5, network=20.0)
    assert (time.compute, time.communication) == (40.0, 5.0)


def test_types_of_gpu() -> None:
    assert gpu_of("H200") is GPUS["h200"]
    with pytest.raises(UserError, match="--gpu h20: did you mean h200"):
        gpu_of("h20")


# --- the command ----------------------------------------------------------------------------------------------------

SMALL = Gpu(1e12, 1e12, 20e6 / 0.95, 1e11, 1e10, 1e9)


def test_advice_on_a_batch_that_does_not_fit_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GPUS, "small", SMALL)
    config = config_of(VIT, {"global_batch": 64}, training={"precision": "bf16"})
    report = check(config, Machines(), Assumptions("small", text_tokens=8))
    found = re.search(r"a rank needs .* MB, of the GPU's .* set stages.0.micro_batch to (\d+)$", report.refusal or "")
    assert found, report.refusal
    config.stages[0].micro_batch = int(found[1])
    fits = check(config, Machines(), Assumptions("small", text_tokens=8))
    assert fits.refusal is None and fits.estimates[0].memory.total <= 20e6
    config.stages[0].micro_batch = 64 // (64 // int(found[1]) - 1)
    assert check(config, Machines(), Assumptions("small", text_tokens=8)).refusal is not None


def test_advice_on_weights_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"zero_optimization": {"reduce_bucket_size": 1000, "stage3_max_live_parameters": 1000}}
    config = config_of(VIT, {"global_batch": 8}, training={"precision": "bf16"})
    weights = meta_counts(config)[0]["all"]
    monkeypatch.setitem(GPUS, "small", Gpu(1e12, 1e12, 12 * weights, 1e11, 1e10, 1e9))
    report = check(config, Machines(), Assumptions("small", text_tokens=8))
    assert (report.refusal or "").endswith("no setting makes it fit: take GPUs with more memory, or a smaller model")
    config = config_of(VIT, {"global_batch": 8}, training={"strategy": "deepspeed_1", "deepspeed": tiny})
    refusal = check(config, Machines(1, 8), Assumptions("small", text_tokens=8)).refusal
    assert refusal and "set training.strategy to deepspeed_" in refusal
    strategy = re.findall(r"deepspeed_\d", refusal)[0]
    config.training.strategy = strategy
    assert check(config, Machines(1, 8), Assumptions("small", text_tokens=8)).refusal is None


def test_the_data_say_how_much_text_there_is() -> None:
    config = config_of(CNN, {"captions_per_image": 2, "max_regions": 2, "epochs": 3, "steps": None})
    blind = check(config).estimates[0]
    seen = check(config, data=DataCounts(samples=160, captions=160, regions=160)).estimates[0]
    assert blind.steps is None and seen.steps == 30
    assert seen.tokens == pytest.approx(blind.tokens / 2, rel=0.02)
    assert seen.memory.activations == blind.memory.activations  # the fullest batch has to fit


def test_a_model_whose_course_depends_on_values_is_still_counted() -> None:
    moe = LLAMA | {"model_type": "mixtral", "num_local_experts": 4}
    text = check(config_of(model={"llm": {"config": moe}}, training={"precision": "bf16"})).text
    assert "note: this model's memory and FLOPs do not follow from shapes alone" in text or "memory of a rank" in text
    assert re.search(r"^llm +[\d,]+ parameters$", text, re.M)


def test_the_command_prints_and_then_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(GPUS, "small", SMALL)
    file = tmp_path / "config.yaml"
    model = {"vision": VIT, "llm": {"config": LLAMA}, "embed_dim": 32, "max_tokens": 16}
    stages = [{"steps": 100, "global_batch": 64}, {"name": "boxes", "epochs": 1, "global_batch": 8, "max_regions": 2}]
    file.write_text(yaml.safe_dump({"model": model, "stages": stages, "training": {"precision": "bf16"}}))
    command = ["check", "--config", str(file), "--no-data"]
    assert main([*command, "--gpu", "small", "--text-tokens", "8"]) == 2
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert "assumed: texts of 8 tokens (--text-tokens), 0.4 of small's 1 TFLOP/s (--mfu)" in lines
    header = next(line for line in lines if line.split() == ["global", "boxes"])
    table = lines[lines.index(header) :]
    assert len({len(line) for line in table}) == 1, "aligned"
    assert captured.err.startswith("mmgem: error: stage global: a rank needs ") and captured.err.count("\n") == 1
    days = next(line for line in table if line.startswith("days of the stage"))
    assert days.endswith("? (needs the data)")
    assert main([*command, "--gpu", "h200"]) == 0
    capsys.readouterr()
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "not known without --gpu" in out and "seconds of a step" not in out
    for wrong, said in (
        (["--gpu", "h20"], "did you mean h200"),
        (["--gpu", "h200", "--mfu", "2"], "--mfu 2: give a share above 0"),
        (["--text-tokens", "17"], "--text-tokens 17: give 1 to 16"),
        (["--network-gbit", "0"], "--network-gbit: give a number above 0"),
        (["--gpu", "h200", "training.device=cpu"], "training.device is cpu"),
    ):
        assert main([*command, *wrong]) == 2
        assert said in capsys.readouterr().err
