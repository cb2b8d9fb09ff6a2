"""A run's model as a folder to use and to share: `mmgem export RUN OUT`.

Receives a run's folder, finished or not, and which of its checkpoints to take. Gives `OUT`: safetensors, config.json,
tokenizer and README.md (the model card), whole or not at all, after what was written has been loaded anew and gave the
checkpoint's vectors and captions. Refuses what is no run or no checkpoint of it, a place that holds something else, and
a copy that differs.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from mmgem.config import Config, DataConfig, config_from_tree, load_config
from mmgem.data.samples import Box, Region, SampleError, decode_image
from mmgem.data.scenes import iter_scenes
from mmgem.data.shards import ShardedDataset
from mmgem.data.sources import Sources, open_training_data, open_validation_data
from mmgem.data.store import is_url
from mmgem.errors import UserError, one_line
from mmgem.model import MMGem
from mmgem.model.pretrained import inherit, parse_config, refuse_to_replace, replace_folder, save_pretrained
from mmgem.training import frozen
from mmgem.training.arithmetic import count_parameters
from mmgem.training.build import fill, make_tokenizer
from mmgem.training.card import Facts, card, find_results, shown_source, split_facts
from mmgem.training.checkpoint import RunFolder, versions
from mmgem.training.saved import Saved, read_checkpoint

DType = Literal["float32", "bfloat16"]
MOST_DIFFERENCE = 1e-6
"""Between numbers of vectors of length 1."""
PICTURES, BOXES, TEXTS, NEW_TOKENS = 4, 2, 3, 20
"""Compared: so many pictures, of each so many boxes and texts at most, and captions of so many tokens."""
Taken = list[tuple[Image.Image, Sequence[str], Sequence[Region]]]
OWN = ("model", "stages", "checkpoints", "tokenizer", "report", "cache")
"""Folders of a run, which an export must not take the place of."""


@dataclass(frozen=True)
class Origin:
    """Where the exported weights come from."""

    config: Config
    name: str
    """The path, for the screen."""
    weights: str
    """In words, for the card."""
    finished: bool
    """It is what the run ended with."""


def export(run: Path, out: Path, checkpoint: str | None = None, dtype: DType = "float32") -> list[str]:
    """Writes `out`. Gives lines that say what was compared. Raises UserError."""
    folder, place = RunFolder(run), out.resolve()
    if not folder.config.is_file():
        raise UserError(f"{run}: no run here (config.yaml is looked for); give a folder that `mmgem train` made")
    if any(place.is_relative_to((folder.path / name).resolve()) for name in OWN):
        raise UserError(f"{out}: is the run's own; name another place, e.g. runs/exported")
    refuse_to_replace(place)
    model, origin = _model(folder, checkpoint)
    examples = examples_of(model, origin.config.data)
    wanted = answers(model, examples)
    if not torch.isfinite(wanted.vectors_NE).all():
        raise UserError(f"{origin.name}: its vectors are not finite, its training has diverged; choose another")
    rounding: list[str] = []
    if dtype == "bfloat16":
        exact = wanted
        _cast(model, torch.bfloat16)
        _cast(model, torch.float32)
        wanted = answers(model, examples)
        rounding = [f"rounded to bfloat16: {_rounded(exact, wanted)}"]
        _cast(model, torch.bfloat16)
    parameters = count_parameters(model)
    with _beside(place, out) as unfinished:
        save_pretrained(model, unfinished)
        del model  # before the other is loaded
        compared = _compare(answers(MMGem.from_pretrained(unfinished), examples), wanted, examples, origin.name, out)
        lines = [*rounding, compared]
        text = card(_facts(folder, origin, place.name, dtype, parameters, lines))
        (unfinished / "README.md").write_text(text, encoding="utf-8")
        replace_folder(unfinished, place)
    return lines


@contextmanager
def _beside(place: Path, out: Path) -> Iterator[Path]:
    """An empty folder beside `place`, to be renamed to it; removed if it was not."""
    unfinished = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
        yield unfinished
    except Exception as e:
        # tokenizers has no class of its own for a full disk.
        if not isinstance(e, (OSError, SafetensorError)) and type(e) is not Exception:
            raise
        reason = e.strerror if isinstance(e, OSError) and e.strerror else one_line(e)[:150]
        raise UserError(f"{out}: cannot be written ({reason}); make room, or name another place") from e
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)


def _cast(model: MMGem, dtype: torch.dtype) -> None:
    """The weights, but not logit_scale and logit_bias, and no statistics, which are few and need their digits."""
    for parameter in model.parameters():
        if parameter.ndim:
            parameter.data = parameter.data.to(dtype)


# --- the model --------------------------------------------------------------------------------------------------------


def _model(folder: RunFolder, checkpoint: str | None) -> tuple[MMGem, Origin]:
    if checkpoint is not None or not folder.finished:
        return _from_checkpoint(folder, _find_checkpoint(folder, checkpoint))
    config = load_config(folder.config)
    model = MMGem.from_pretrained(folder.model)
    _keep_origin(model, config)
    steps = [line["step"] for line in folder.lines(folder.log)[-1:]]
    weights = "those of the finished run" + "".join(f", after its last step, {step}" for step in steps)
    return model, Origin(config, str(folder.model), weights, finished=True)


def _find_checkpoint(folder: RunFolder, name: str | None) -> Path:
    if name is None:
        newest = folder.newest()
        if newest is None:
            raise UserError(f"{folder.path}: neither a finished model nor a checkpoint here; go on with --resume auto")
        return newest
    for path in (folder.checkpoints / name, Path(name)):
        if path.exists():
            return path
    found = ", ".join(sorted(path.name for path in folder.checkpoints.glob("*.ckpt"))) or "none"
    raise UserError(f"--checkpoint {name}: no such checkpoint; in {folder.checkpoints} there are: {found}")


def _from_checkpoint(folder: RunFolder, path: Path) -> tuple[MMGem, Origin]:
    """The model as the checkpoint has it, in fp32, on CPU; an average of the weights where one is kept."""
    saved = read_checkpoint(path)
    config = config_from_tree(saved.settings, f"{path}: settings")
    _refuse_other_run(folder, saved)
    # This describes it without hub and files; where frozen parts come from those, they are loaded as in training.
    settings, loads = parse_config(saved.architecture, str(path)), frozen.is_pretrained(saved.frozen)
    if loads:
        settings = inherit(config.model, settings)
    model = MMGem(settings, _tokenizer(folder, config), load_weights=loads)
    if config.training.precision == "64":
        model.double()  # the hashes of frozen parts are of what was in memory
    fill(model, saved, folder.path, whole=True)
    model.float().eval()
    _keep_origin(model, config)
    return model, Origin(config, str(path), _where(path, saved, config), finished=False)


def _refuse_other_run(folder: RunFolder, saved: Saved) -> None:
    """Its tokenizer and its frozen parts are looked for in the run's folder."""
    run = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    same = all(run.get(key) == saved.settings.get(key) for key in ("model", "init_from", "seed"))
    checksums = folder.data_checksums
    if not same or any(checksums.get(split, checksum) != checksum for split, checksum in saved.data.items()):
        raise UserError(f"{saved.path}: is a checkpoint of another run than {folder.path}; give the run it is of")


def _tokenizer(folder: RunFolder, config: Config) -> Any:
    elsewhere = config.init_from or config.model.tokenizer.path or config.model.llm.name
    if not elsewhere and not folder.tokenizer.is_dir():
        raise UserError(f"{folder.tokenizer}: missing, and the model's texts were read with it; put it back")
    no_texts: Any = None  # nothing is trained: the tokenizer is there
    return make_tokenizer(config, no_texts, folder, fresh=False)


def _keep_origin(model: MMGem, config: Config) -> None:
    """So that config.json says what the parts began as."""
    model.config.vision.pretrained = shown_source(config.model.vision.pretrained)
    model.config.llm.name = shown_source(config.model.llm.name)


def _where(path: Path, saved: Saved, config: Config) -> str:
    state, name = saved.run_state, path.resolve().name
    stage = config.stages[state.stage]
    step = re.fullmatch(r"step-(\d+)\.ckpt", name)
    of_run = f", step {int(step[1])} of the run" if step else ""
    average = ", the moving average" if stage.ema else ""
    where = f"step {state.samples // stage.global_batch} of stage {stage.name} ({state.samples:,} samples)"
    return f"those of checkpoint {name}{average}: {where}{of_run}"


# --- the comparison ---------------------------------------------------------------------------------------------------


class Examples(NamedTuple):
    name: str
    images: list[Image.Image]
    boxes: list[list[Box]]
    texts: list[str]


class Answers(NamedTuple):
    vectors_NE: Tensor
    """Of pictures, boxes and texts, each of length 1."""
    captions: list[str]
    """Greedy, of pictures and boxes."""


def examples_of(model: MMGem, data: DataConfig) -> Examples:
    """Pictures, boxes and texts of the run's data, if they lie on this machine; else rendered ones."""
    name, taken = _own_examples(data) or _rendered_examples()
    boxes = [[r.box for r in regions if model.sees(image, r.box)][:BOXES] for image, _, regions in taken]
    texts = [text for _, captions, regions in taken for text in [*captions, *(r.phrase for r in regions)][:TEXTS]]
    return Examples(name, [image for image, _, _ in taken], boxes, list(dict.fromkeys(texts)))


def _own_examples(data: DataConfig) -> tuple[str, Taken] | None:
    """None where the data are not at hand, or their shards would have to be fetched."""
    data = replace(data, verify=False)
    if any(is_url(place) for place in (data.path, *(source.path for source in data.sources))):
        return None
    try:
        dataset: ShardedDataset | Sources = open_validation_data(data) or open_training_data(data)
    except UserError:
        return None
    if dataset.remote:
        return None
    taken: Taken = []
    for index in range(min(len(dataset), 10 * PICTURES)):
        try:
            sample = dataset.sample(index)
            taken.append((decode_image(sample), sample.captions, sample.regions))
        except (SampleError, UserError):
            continue
        if len(taken) == PICTURES:
            break
    return ("the run's data", taken) if taken else None


def _rendered_examples() -> tuple[str, Taken]:
    scenes = iter_scenes(0, "test", PICTURES)
    return "rendered scenes", [(scene.image, scene.captions, scene.regions) for scene in scenes]


def answers(model: MMGem, examples: Examples) -> Answers:
    v_NE, regions = model.image_and_region_vectors(examples.images, examples.boxes)
    visual_NE = torch.cat([v_NE, *regions])
    vectors_NE = F.normalize(torch.cat([visual_NE, model.text_vectors(examples.texts)]), dim=-1)
    if not torch.isfinite(visual_NE).all():
        return Answers(vectors_NE, [])
    return Answers(vectors_NE, model.write(visual_NE, max_new_tokens=NEW_TOKENS))


def _compare(found: Answers, wanted: Answers, examples: Examples, name: str, out: Path) -> str:
    """Says what was compared. Raises UserError where it is not the same."""
    difference = (found.vectors_NE - wanted.vectors_NE).abs().max().item()
    outcome = f"max |difference| of vectors {difference:.2g}, {_same_captions(found, wanted)}"
    if not difference <= MOST_DIFFERENCE or found.captions != wanted.captions:
        raise UserError(f"{out}: what was written does not give what {name} does ({outcome}); nothing was kept of it")
    boxes = sum(map(len, examples.boxes))
    counts = f"{len(examples.images)} pictures, {boxes} boxes and {len(examples.texts)} texts of {examples.name}"
    return f"{counts}: {outcome}"


def _rounded(exact: Answers, rounded: Answers) -> str:
    cosine = F.cosine_similarity(exact.vectors_NE, rounded.vectors_NE, dim=-1).min().item()
    return f"least cosine with float32 {cosine:.6f}, {_same_captions(rounded, exact)}"


def _same_captions(one: Answers, other: Answers) -> str:
    same = sum(a == b for a, b in zip(one.captions, other.captions, strict=True))
    return f"{same} of {len(one.captions)} captions equal"


def _facts(
    folder: RunFolder, origin: Origin, name: str, dtype: DType, parameters: dict[str, int], compared: list[str]
) -> Facts:
    config = origin.config
    return Facts(
        name=name,
        config=config,
        weights=origin.weights,
        dtype=dtype,
        parameters=parameters,
        splits=split_facts(config.data),
        checksum=folder.data_checksums.get(config.data.train_split),
        results=find_results(folder, config, origin.finished),
        compared=compared,
        trained_with=json.loads(folder.facts.read_text()).get("versions", {}) if folder.facts.is_file() else {},
        exported_with=versions(),
    )
