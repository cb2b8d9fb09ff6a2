"""A model as a folder: model.safetensors, config.json, tokenizer files. No pickle, no training library needed.

Receives an MMGem, or such a folder (or a run folder, which has one as `model/`). Gives the other. Refuses folders
that lack a file or hold weights that do not fit, and names what is wrong.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmgem.config import ModelConfig, to_tree
from mmgem.errors import UserError, one_line
from mmgem.text import load_tokenizer

if TYPE_CHECKING:
    from mmgem.model.mmgem import MMGem

SCHEMA = 1


def save_pretrained(model: MMGem, path: Path) -> None:
    """Writes the folder whole or not at all: beside its place first, then renamed. An older model is replaced.

    Raises UserError for a folder that holds something else, since that would be lost.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_model

    refuse_to_replace(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        save_model(model, str(unfinished / "model.safetensors"))
        (unfinished / "model.safetensors").chmod(0o644)  # as the others, not for the owner alone
        model.codec.tokenizer.save_pretrained(unfinished)
        (unfinished / "config.json").write_text(config_json(model))
        unfinished.chmod(0o755)
        replace_folder(unfinished, path)
    except SafetensorError as e:  # what it makes of an OSError
        raise UserError(f"{path}: cannot be written ({one_line(e)}); make room, and try again") from e
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def refuse_to_replace(path: Path) -> None:
    """Raises UserError where something other than a model would be lost; files beside one count as its own."""
    if path.exists() and not (path.is_dir() and (_is_ours(path) or not any(path.iterdir()))):
        raise UserError(f"{path}: holds something other than a model; save to a new or empty folder")


def replace_folder(new: Path, place: Path) -> None:
    """Renames `new` to `place`; what stood there is moved aside first and removed last."""
    old = place.with_name(f".{place.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        os.rename(place, old)
    try:
        os.rename(new, place)
    except OSError:
        if old.exists():
            os.rename(old, place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def portable_config(model: MMGem) -> dict[str, Any]:
    """The model's settings with everything resolved, so that loading reaches for no hub and no other file."""
    tree = to_tree(model.config)
    vision, llm = tree["vision"], tree["llm"]
    vision["mean"], vision["std"] = list(model.vision.mean), list(model.vision.std)
    if vision["frozen_statistics"] is None:
        vision["frozen_statistics"] = vision["pretrained"] is not None
    vision["origin"], vision["pretrained"] = vision["pretrained"], None
    vision |= model.vision.portable
    llm["origin"], llm["name"] = llm["name"], None
    llm["config"] = json.loads(model.language.hf.config.to_json_string(use_diff=False))
    return {"model": tree}


def config_json(model: MMGem) -> str:
    """The text of config.json, from which `parse_config` and `inherit` build the model's shape again."""
    return json.dumps({"schema": SCHEMA, **portable_config(model)}, indent=2)


def inherit(settings: ModelConfig, origin: ModelConfig) -> ModelConfig:
    """The settings, and, where they leave something to an LLM's or a tower's source, what it said for `origin`.

    Weights tell the shapes, but not e.g. the base of rotary positions, or a tower's mean and standard deviation.
    """
    settings = copy.deepcopy(settings)
    settings.llm.config = {**origin.llm.config, **settings.llm.config}
    settings.vision.mean = settings.vision.mean or origin.vision.mean
    settings.vision.std = settings.vision.std or origin.vision.std
    if settings.vision.frozen_statistics is None:
        settings.vision.frozen_statistics = origin.vision.frozen_statistics
    return settings


def from_pretrained(path: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> MMGem:
    from mmgem.model.mmgem import MMGem

    folder = model_folder(path)
    model = MMGem(read_config(folder), load_tokenizer(folder), load_weights=False)
    load_weights(model, folder)
    exact = {n: b for n, b in model.named_buffers() if n.endswith("inv_freq")}
    scale = model.logit_scale.data.float()
    model.to(device=device, dtype=dtype).eval()
    model.logit_scale.data = scale.to(device)
    # Rotary frequencies rounded to half precision would turn late positions the wrong way.
    for name, buffer in exact.items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_buffer(leaf, buffer.to(device), persistent=False)
    return model


def load_weights(model: MMGem, folder: Path) -> None:
    """Fills a model of the same shapes with a folder's weights."""
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    try:
        load_model(model, str(folder / "model.safetensors"))
    except (SafetensorError, RuntimeError, OSError, ValueError) as e:
        raise UserError(f"{folder}/model.safetensors: does not load ({one_line(e)[:250]})") from e


def model_folder(path: Path) -> Path:
    """The folder itself, or the `model/` of a run folder."""
    for folder in (path, path / "model"):
        if _is_model(folder):
            return folder
    if not path.exists():
        raise UserError(f"{path}: no such folder; give a run folder or what save_pretrained wrote")
    raise UserError(f"{path}: no model here (config.json and model.safetensors are looked for, also in {path}/model)")


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


def _is_ours(folder: Path) -> bool:
    """Whether the folder is what `save_pretrained` wrote, and nothing has been put into it since."""
    if not _is_model(folder) or any(p.is_dir() for p in folder.iterdir()):
        return False
    try:
        tree = json.loads((folder / "config.json").read_text())
    except json.JSONDecodeError:
        return False
    return isinstance(tree, dict) and "schema" in tree and "model" in tree


def read_config(folder: Path) -> ModelConfig:
    file = folder / "config.json"
    return parse_config(file.read_text(errors="replace"), str(file))


def parse_config(text: str, source: str) -> ModelConfig:
    """What `config_json` gave, as settings. `source` names it in errors."""
    from pydantic import TypeAdapter, ValidationError

    try:
        tree = json.loads(text)
        if tree.get("schema") != SCHEMA:
            raise UserError(f"{source}: schema {tree.get('schema')}, this version reads {SCHEMA}; upgrade mmgem")
        tree["model"]["vision"].pop("origin", None)
        tree["model"]["llm"].pop("origin", None)
        return TypeAdapter(ModelConfig).validate_python(tree["model"])
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as e:
        raise UserError(f"{source}: not a model's config ({one_line(e)[:200]})") from e
