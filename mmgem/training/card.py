"""The model card of an export, as Hugging Face shows it: YAML front matter, then what is known of the model.

Receives `Facts`, and a run's folder and data settings to gather some of them from. Gives the text of README.md. Refuses
a metrics.json that is none. What is not known is said to be unknown, and nothing is invented, a license least of all.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from jinja2 import Environment, StrictUndefined

from mmgem.config import Config, DataConfig, ModelConfig, to_tree
from mmgem.data.index import Index, read_index
from mmgem.data.remote import Remote
from mmgem.data.store import open_store
from mmgem.errors import UserError
from mmgem.training.checkpoint import RunFolder

TAGS = ["mmgem", "image-captioning", "image-text-retrieval", "region-captioning", "region-retrieval"]
TASKS = {
    "retrieval": "image-text-retrieval",
    "captioning": "image-to-text",
    "region-retrieval": "region-text-retrieval",
    "region-captioning": "region-to-text",
}
"""The task's type in the front matter, which wants one."""


@dataclass(frozen=True)
class SplitFacts:
    name: str
    """Of its place: the last part of a path, a URL without what may be secret in it."""
    split: str
    weight: float | None
    index: Index | None
    """None: it could not be read."""

    @property
    def checksum(self) -> str:
        return self.index.checksum if self.index is not None else ""


@dataclass(frozen=True)
class Result:
    """One result of a metrics.json. of: whose it is, "" for this model."""

    of: str
    task: str
    protocol: dict[str, Any]
    metrics: dict[str, float]
    stderr: dict[str, float]
    chance: dict[str, float]


@dataclass(frozen=True)
class Facts:
    name: str
    config: Config
    weights: str
    """Which they are: of the finished run, or of a checkpoint and its step."""
    dtype: str
    parameters: dict[str, int]
    """By part, and `all`."""
    splits: list[SplitFacts]
    checksum: str | None
    """Of the training data, as the run noted it."""
    results: list[Result]
    compared: list[str]
    trained_with: dict[str, str]
    exported_with: dict[str, str]

    @property
    def changed(self) -> bool:
        """Whether other training data are at their place now."""
        found = [split.checksum for split in self.splits if split.split == self.config.data.train_split]
        now = found[0] if len(found) == 1 else hashlib.sha256(" ".join(found).encode()).hexdigest()
        return self.checksum is not None and all(found) and now != self.checksum


# --- what the run's folder and its data say ---------------------------------------------------------------------------


def split_facts(data: DataConfig) -> list[SplitFacts]:
    """Of what the run trained on and validated with. An index that is not to be had soon is left out."""
    places = [(data.path, None)] if data.path else [(source.path, source.weight) for source in data.sources]
    found = [
        SplitFacts(shown_place(place), data.train_split, weight, _index(place, data.train_split))
        for place, weight in places
    ]
    if data.val_split is not None and (index := _index(f"{places[0][0].rstrip('/')}/{data.val_split}")) is not None:
        found.append(SplitFacts(shown_place(places[0][0]), data.val_split, None, index))
    return found


def _index(place: str, split: str = "") -> Index | None:
    """That of the split, or of the place itself where that is one."""
    for location in dict.fromkeys((f"{place.rstrip('/')}/{split}".rstrip("/"), place)):
        try:
            return read_index(open_store(location, remote=Remote(retries=0, timeout=10)))
        except UserError:
            continue
    return None


def find_results(folder: RunFolder, config: Config, finished: bool) -> list[Result]:
    """From each metrics.json of the run and its stages. finished: the card is that of the finished run's model."""
    names = [stage.name for stage in config.stages]
    found = [*_results(folder.path / "report", names, names[-1], finished)]
    for name in names:
        found += _results(folder.stages / name / "report", names, name, finished)
    return sorted(found, key=lambda result: result.of != "")


def _results(report: Path, stages: list[str], default: str, finished: bool) -> Iterator[Result]:
    """default: the stage whose model it is, where the file does not name another."""
    file = report / "metrics.json"
    if not file.is_file():
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        for one in content if isinstance(content, list) else [content]:
            stage = one["model"] if one.get("model") in stages else default
            last = stage == stages[-1]
            of = f"the model after stage {stage}" if not last else "" if finished else "the finished run"
            yield Result(of, one["task"], one["protocol"], one["metrics"], one["stderr"], one["chance"])
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{file}: not what `mmgem eval` writes ({e!r:.100}); remove it, or evaluate again") from e


# --- the text ---------------------------------------------------------------------------------------------------------


def card(facts: Facts) -> str:
    front = yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True)
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters |= {"count": "{:,}".format, "cell": _cell}
    body = environment.from_string(TEMPLATE).render(
        facts=facts, model=facts.config.model, tower=_tower(facts.config.model), llm=_llm(facts.config.model),
        settings=_settings(facts.config), protocol=_protocol, described=_described,
    )  # fmt: skip
    return f"---\n{front}---\n{body}"


def front_matter(facts: Facts) -> dict[str, Any]:
    base = base_models(facts.config.model)
    index = [_index_entry(result) for result in facts.results if not result.of]
    return {
        "library_name": "mmgem",
        "pipeline_tag": "image-to-text",
        "tags": TAGS,
        **({"base_model": base} if base else {}),
        **({"model-index": [{"name": facts.name, "results": index}]} if index else {}),
    }


def _index_entry(result: Result) -> dict[str, Any]:
    data = str(result.protocol.get("data") or "unnamed")
    return {
        "task": {"type": TASKS.get(result.task, result.task), "name": result.task},
        "dataset": {"type": data, "name": data, "split": str(result.protocol.get("split", ""))},
        "metrics": [{"type": name, "name": name, "value": value} for name, value in result.metrics.items()],
    }


def base_models(model: ModelConfig) -> list[str]:
    """The hub's names of what the model began with; none for local files."""
    return [name for name in (_hub_tower(model), _hub_id(model.llm.name)) if name]


def _hub_tower(model: ModelConfig) -> str | None:
    vision = model.vision
    name, weights = vision.name, vision.pretrained
    if name is not None and name.startswith("hf-hub:"):
        return _hub_id(name.removeprefix("hf-hub:"))
    if name is None or weights is None or Path(weights).suffix or "/" in weights:
        return None
    if vision.library == "timm":
        from timm.models import get_pretrained_cfg

        try:
            settings = get_pretrained_cfg(name if weights == "default" else f"{name}.{weights}")
        except RuntimeError:  # this version of timm does not know the tag
            return None
        return _hub_id(getattr(settings, "hf_hub_id", None))
    from open_clip import get_pretrained_cfg as get_tag

    return _hub_id(get_tag(name, weights).get("hf_hub"))


def _hub_id(name: str | None) -> str | None:
    """A name as the hub has them, unless there is such a folder here."""
    name = (name or "").rstrip("/")
    return name if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) and not Path(name).exists() else None


def shown_place(place: str) -> str:
    """How a path or URL stands in a card: without the folders of a machine, without user, password and query."""
    if "://" not in place:
        return Path(place).resolve().name
    parts = urlsplit(place)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def shown_source(name: str | None) -> str | None:
    """How weights' origin stands in a card and config.json: a hub's name, a tag, or a file without its folders."""
    return name if name is None else _hub_id(name) or Path(name).name


def _tower(model: ModelConfig) -> str:
    vision = model.vision
    name = vision.name or (Path(vision.config_file).name if vision.config_file else "its own settings")
    return f"{name} of {vision.library}, from {shown_source(vision.pretrained) or 'random weights'}"


def _llm(model: ModelConfig) -> str:
    if model.llm.name:
        return f"{shown_source(model.llm.name)}, pretrained"
    kind = model.llm.config.get("model_type")
    return f"{kind}, from random weights" if kind else "as the model it was begun with"


def _settings(config: Config) -> str:
    """What decides the result, as the run's config.yaml says it; the model's own part is config.json."""
    tree = to_tree(config)
    data = {name: tree["data"][name] for name in ("row_tokens", "flip", "crop_scale", "color_jitter")}
    training = {name: tree["training"][name] for name in ("precision", "strategy")}
    shown = {"seed": tree["seed"], "data": data, "stages": tree["stages"], "training": training}
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)


def _protocol(result: Result) -> str:
    """All that stands beside the figures, but for versions and what is empty."""
    hidden = ("data", "split", "versions", "version", "stderr")
    return ", ".join(f"{k} {v}" for k, v in result.protocol.items() if k not in hidden and v not in (None, False, ""))


def _described(split: SplitFacts) -> str:
    name = f"`{split.name}`, {split.split}" + (f", weight {split.weight:g}" if split.weight is not None else "")
    if split.index is None:
        return f"{name}: its index could not be read when this was written"
    index, totals, shards = split.index, split.index.totals, len(split.index.shards)
    return (
        f"{name}: {totals['samples']:,} samples in {shards:,} shard{'s' * (shards != 1)}, {totals['captions']:,} "
        f"captions, {totals['regions']:,} regions; left out when it was prepared: of samples {_counts(index.skipped)}, "
        f"of captions, phrases and boxes {_counts(index.dropped)}; checksum `{index.checksum}`"
    )


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} ({reason})" for reason, count in counts.items()) or "none"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


TEMPLATE = """
# {{ facts.name }}

One model that retrieves and writes, for whole images and for any box of them: a vision tower, a pooling of its map (or
of a box of it) into one vector, and one LLM that embeds texts and writes captions. The method is MM-GEM
([arXiv 2405.19333](https://arxiv.org/abs/2405.19333)).

- vision tower: {{ tower }}; pictures of {{ model.vision.image_size }} x {{ model.vision.image_size }} pixels,
  {{ "the whole picture, its aspect lost" if model.vision.resize == "squash" else "the central square" }}
- LLM: {{ llm }}; texts of up to {{ model.max_tokens }} tokens, longer ones are cut
- vectors of {{ model.embed_dim }} numbers
{% if facts.config.init_from %}
- begun with the weights of another mmgem model
{% endif %}
- weights: {{ facts.weights }}; stored in {{ facts.dtype }}

| part | parameters |
|---|---|
{% for part, count in facts.parameters.items() %}
| {{ part }} | {{ count | count }} |
{% endfor %}

## Use

It is loaded with the Python package `mmgem`; DeepSpeed and Lightning are not needed for it. In this folder, with a
picture `photo.jpg`:

```python
from PIL import Image

from mmgem import MMGem

model = MMGem.from_pretrained(".")  # or device="cuda", dtype=torch.bfloat16
image = Image.open("photo.jpg").convert("RGB")
boxes = [(10, 20, 60, 80)]  # x1, y1, x2, y2 in its pixels

images = model.embed_images([image])  # 1 x {{ model.embed_dim }}, each row of length 1
texts = model.embed_texts(["a red ball", "a dog on the grass"])  # 2 x {{ model.embed_dim }}
print((texts @ images.T).squeeze(1))  # cosines
print(model.embed_regions([image], [boxes])[0].shape)  # boxes x {{ model.embed_dim }}
print(model.caption([image]))
print(model.caption_regions([image], [boxes]))
```

```sh
mmgem caption --model . photo.jpg
mmgem regions --model . photo.jpg --box 10,20,60,80 --caption --query "a red ball"
mmgem embed   --model . --images photo.jpg --out vectors.npz
```

## Data

{% for split in facts.splits %}
- {{ described(split) }}
{% endfor %}

Checksum of the training data, noted by the run: {{ "`%s`" % facts.checksum if facts.checksum else "none" }}.
{% if facts.changed %}
The data at that place have changed since: the counts above are of what is there now.
{% endif %}

## Training

{% for stage in facts.config.stages %}
- stage `{{ stage.name }}`: global batch {{ stage.global_batch }}, learning rate {{ stage.lr }},
  {{ "up to %d regions an image" % stage.max_regions if stage.max_regions else "images and captions" }},
  {{- " frozen: " }}{{ stage.freeze | join(", ") or "nothing" }}
{% endfor %}

All settings of the stages:

```yaml
{{ settings -}}
```

## Results

{% if not facts.results %}
No results were found in the run's folder.
{% endif %}
{% for result in facts.results %}
### {{ result.task }} on {{ result.protocol.data or "unnamed data" }}, {{ result.protocol.split }}
{{- ": " if result.of }}{{ result.of }}

{{ protocol(result) }}

| metric | value | standard error | chance |
|---|---|---|---|
{% for name, value in result.metrics.items() %}
| {{ name }} | {{ value | cell }} | {{ result.stderr.get(name) | cell }} | {{ result.chance.get(name) | cell }} |
{% endfor %}

{% endfor %}
{% if facts.results %}
Recall, BLEU, METEOR and ROUGE are fractions of 1; CIDEr is as coco-caption prints it.
{% endif %}

## Export

Loaded anew after it was written, and compared with the weights that it was made from:

{% for line in facts.compared %}
- {{ line }}
{% endfor %}

Trained with {{ facts.trained_with.items() | map("join", " ") | join(", ") or "versions that the run did not note" }}.
Exported with {{ facts.exported_with.items() | map("join", " ") | join(", ") }}.

## Limits

- No license is stated here: those of the training data and of the weights that training began with apply.
- It knows what its training texts say of pictures like its training pictures, with their errors and their slant;
  captions can be wrong.
- Only what stands under Results was measured, on the data named there.
"""
