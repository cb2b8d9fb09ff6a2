"""Evaluation of one or several models on one split: figures, metrics.json, report.html, report.md.

Receives models (paths, or models in memory) by name, a data folder, a split and task names. Gives
the results, and writes both files. Refuses, with a UserError: unknown tasks and names, missing
data, and tasks on data without the regions or captions they need, all before a model is loaded.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from mmgem.data.samples import Sample
from mmgem.data.shards import ShardedDataset
from mmgem.errors import UserError
from mmgem.evaluation.items import save_items
from mmgem.evaluation.metrics.java_scores import java_kept
from mmgem.evaluation.report import About, write_report
from mmgem.evaluation.result import TaskResult, metrics_json, write_json
from mmgem.evaluation.tasks import TASKS, LayoutTask, SplitTask, Task, TaskOptions
from mmgem.evaluation.tasks.common import versions
from mmgem.inference.encode import MAX_BROKEN, Dataset, Encoded, Encoder, encode_dataset
from mmgem.inference.use import load_model
from mmgem.ranks import Ranks

Results = dict[str, dict[str, TaskResult]]

_NEEDED = {"regions": "boxes with phrases", "captions": "captions to compare with"}


@java_kept()
def evaluate(
    models: Mapping[str, str | Path | Encoder],
    data: str | Path,
    split: str,
    tasks: Sequence[str],
    out: str | Path,
    *,
    batch_size: int = 64,
    device: str = "auto",
    options: TaskOptions | None = None,
    crop_baseline: bool | Collection[str] = False,
    max_broken: float = MAX_BROKEN,
    run_dir: str | Path | None = None,
    title: str = "",
    ranks: Ranks | None = None,
) -> Results:
    """Runs the tasks on every model and gives `{model: {task: TaskResult}}`.

    Each split is encoded once a model. models: name → run folder or exported model, or the model
    itself; the order is that of the report's columns. crop_baseline: True, or the names of the
    models, whose region retrieval also gets the baseline from boxes cut out. run_dir: the run whose
    settings and curves the report shows; found beside the models if not given. ranks: share the work;
    all get the results, the first writes. Writes `out/metrics.json` (one result, or a
    list of several), `out/report.html`, `out/report.md`, and `out/items/` (see `items`).
    """
    ranks = ranks or Ranks()
    for name, given in (
        ("--join-captions", options and options.join_captions),
        ("--captions", options and options.captions),
    ):
        if given and set(tasks) - {"retrieval", "rerank"}:
            raise UserError(f"{name} is for retrieval and rerank: name one of them")
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: at least 1")
    if options is not None and options.queries < 1:
        raise UserError(f"--queries {options.queries}: at least 1")
    if options is not None and not (math.isfinite(options.alpha) and options.alpha >= 0):
        raise UserError(f"--alpha {options.alpha}: a number of 0 or more, 1 as a rule")
    chosen = _chosen(tasks)
    of_split = [task for task in chosen if isinstance(task, SplitTask)]
    if not models:
        raise UserError("no model to evaluate: name at least one")
    cropped = set(models) if crop_baseline is True else set(crop_baseline or ())
    if unknown := cropped - set(models):
        raise UserError(f"crop_baseline names {sorted(unknown)}, the models are {list(models)}")
    dataset = _open(Path(data), split, of_split) if of_split else None
    options = replace(options or TaskOptions(), split=split, data=Path(data).name, ranks=ranks)
    for task in chosen:
        if isinstance(task, LayoutTask):
            task.check(Path(data), options)
    results: Results = {}
    facts: list[tuple[str, str]] = []
    encoded: Encoded | None = None
    for name, given in models.items():
        model = _load(given, _device(device, ranks))
        facts.append((name, _sizes(model)))
        own = replace(options, baseline="crop" if name in cropped else "none")
        if dataset is not None:
            changed = own.join_captions or own.captions
            source = Recaptioned(dataset, own.captions, own.join_captions) if changed else dataset
            encoded = encode_for(of_split, model, source, own, batch_size, max_broken, name)
        results[name] = {task.name: _run(task, model, encoded, Path(data), own) for task in chosen}
        for result in results[name].values():
            result.model = name
        del model  # before the next is loaded
    if ranks.first:
        run = Path(run_dir) if run_dir is not None else find_run(models)
        about = _about(title, run, facts, dataset, encoded, options)
        _write(Path(out), [result for of_model in results.values() for result in of_model.values()], about)
    return results


class Recaptioned:
    """A dataset of which each image has only its first captions (0: all), or all of these as one, with spaces."""

    def __init__(self, dataset: Dataset, first: int, joined: bool):
        self.dataset, self.keys = dataset, dataset.keys
        self.first, self.joined = first or None, joined

    def __len__(self) -> int:
        return len(self.dataset)

    def sample(self, index: int, /) -> Sample:
        found = self.dataset.sample(index)
        captions = found.captions[: self.first]
        return replace(found, captions=(" ".join(captions),) if self.joined and captions else captions)


def encode_for(
    tasks: Sequence[SplitTask],
    model: Encoder,
    dataset: Dataset,
    options: TaskOptions,
    batch_size: int = 64,
    max_broken: float = MAX_BROKEN,
    title: str = "encode",
) -> Encoded:
    """The split, as far as these tasks need it."""
    return encode_dataset(
        model,
        dataset,
        batch_size=batch_size,
        **options.work,
        texts=any(task.texts for task in tasks),
        regions=any(task.regions for task in tasks),
        crops=options.baseline == "crop" and any(task.name == "region-retrieval" for task in tasks),
        max_broken=max_broken,
        title=title,
    )


def _run(task: Task, model: Encoder, encoded: Encoded | None, data: Path, options: TaskOptions) -> TaskResult:
    if isinstance(task, LayoutTask):
        return task.run(model, data, options)
    assert encoded is not None
    return task.run(model, encoded, options)


def _write(out: Path, results: Sequence[TaskResult], about: About) -> None:
    write_json(out / "metrics.json", metrics_json(results))
    for result in results:
        save_items(out, result)
        for name, content in result.files.items():
            stem, dot, ending = name.rpartition(".")
            several = len({r.model for r in results}) > 1
            write_json(out / (f"{stem}.{result.model}{dot}{ending}" if several else name), content)
    write_report(out / "report.html", results, about)


def _chosen(tasks: Sequence[str]) -> list[Task]:
    for name in tasks:
        if name not in TASKS:
            raise UserError(f"unknown task {name!r}; the tasks are {', '.join(TASKS)}")
    if not tasks:
        raise UserError(f"no task to run; the tasks are {', '.join(TASKS)}")
    return [TASKS[name] for name in dict.fromkeys(tasks)]


def tasks_for(data: Path, split: str) -> list[str]:
    """All tasks that the data allow; if they allow none, all: `evaluate` then says what they lack."""
    dataset = ShardedDataset(data / split) if (data / split / "index.json").is_file() else None

    def allows(task: Task) -> bool:
        if isinstance(task, LayoutTask):
            return task.found(data, split)
        return dataset is not None and not task.lacks(dataset)

    return [name for name, task in TASKS.items() if allows(task)] or list(TASKS)


def _open(data: Path, split: str, tasks: Sequence[SplitTask]) -> ShardedDataset:
    """The split, checked for what the tasks need."""
    if data.is_dir() and not (data / split).is_dir():
        splits = sorted(p.parent.name for p in data.glob("*/index.json"))
        has = f"it has {', '.join(splits)}" if splits else "make some with `mmgem data prepare`"
        raise UserError(f"{data}: no split {split!r}; {has}")
    dataset = ShardedDataset(data / split)
    refuse_lacking(tasks, dataset, f"{data}: split {split}")
    return dataset


def refuse_lacking(tasks: Sequence[SplitTask], dataset: ShardedDataset, name: str) -> None:
    """Raises UserError where the split, known to users as `name`, has not what the tasks need."""
    for task in tasks:
        if lacking := task.lacks(dataset):
            raise UserError(
                f"{name} has no {lacking}; {task.name} needs {_NEEDED[lacking]}, choose other data or another task"
            )


def _device(device: str, ranks: Ranks) -> str:
    """`auto` and `cuda` are a rank's own GPU where there are several ranks."""
    own = ranks.count > 1 and device in ("auto", "cuda") and torch.cuda.is_available()
    return f"cuda:{ranks.local_rank}" if own else device


def _load(source: str | Path | Encoder, device: str) -> Encoder:
    return load_model(Path(source), device) if isinstance(source, (str, Path)) else source


def _sizes(model: Encoder) -> str:
    """Parameters in all and by part: "12.3 M parameters: vision 2.2 M, language 9.8 M"."""
    if not isinstance(model, nn.Module):
        return "no parameters"
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    total = sum(p.numel() for p in model.parameters())
    named = ", ".join(f"{name} {_millions(n)}" for name, n in parts.items() if n)
    return f"{_millions(total)} parameters" + (f": {named}" if named else "")


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"


# --- what the report says of the run ---------------------------------------------------------


def find_run(models: Mapping[str, Any]) -> Path | None:
    """The run folder that the last model given by path lies in: it has a log.jsonl."""
    for source in reversed(list(models.values())):
        if isinstance(source, (str, Path)):
            path = Path(source).resolve()
            for folder in (path, *list(path.parents)[:3]):
                if (folder / "log.jsonl").is_file():
                    return folder
    return None


def _about(
    title: str,
    run: Path | None,
    facts: list[tuple[str, str]],
    dataset: ShardedDataset | None,
    encoded: Encoded | None,
    options: TaskOptions,
) -> About:
    settings = run / "config.yaml" if run is not None else None
    text = settings.read_text(encoding="utf-8") if settings and settings.is_file() else ""
    shown = [*facts, *describe_config(text)]
    if dataset is not None and encoded is not None:
        captions = sum(map(len, encoded.captions))
        data = f"{options.data}/{options.split}: {len(encoded.keys):,} images"
        data += f", {captions:,} captions, {dataset.totals.get('regions', 0):,} regions"
        shown.append(("Evaluated on", data))
    if encoded is not None and encoded.skipped:
        named = "; ".join(encoded.skipped[:3]) + (" …" if len(encoded.skipped) > 3 else "")
        shown.append(("Skipped", f"{len(encoded.skipped)} broken: {named}"))
    if run is not None and (broken := describe_broken(run / "broken.jsonl")):
        shown.append(("Broken in the training data", broken))
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    return About(
        title=title or f"mmgem · {run.name if run is not None else options.data}",
        subtitle="One model that retrieves and writes, for images and for any box of them.",
        facts=shown,
        settings=text,
        log=run / "log.jsonl" if run is not None else None,
        footer=f"Made by {packages}.",
    )


def describe_broken(file: Path) -> str:
    """What a run met of broken data, by what became of it: how many, and the first few by name."""
    found: dict[str, list[str]] = {}
    for text in file.read_text(encoding="utf-8").split("\n") if file.is_file() else []:
        if not text:
            continue
        line = json.loads(text)
        fate = "parts of samples left out" if line.get("dropped") else "samples and shards replaced"
        name = line["key"] or Path(line["shard"]).name
        found.setdefault(fate if line["step"] else "left out by the index", []).append(f"{name}: {line['reason']}")
    said = [
        f"{fate}: {len(names):,} ({', '.join(names[:3])}{', …' * (len(names) > 3)})" for fate, names in found.items()
    ]
    return "; ".join([*said, f"all are named in {file.name}"]) if said else ""


def describe_config(text: str) -> list[tuple[str, str]]:
    """The few lines of a run's resolved config.yaml that say what was trained, and how."""
    tree = yaml.safe_load(text) if text else None
    if not isinstance(tree, dict):
        return []
    model: dict[str, Any] = tree.get("model") or {}
    vision, llm = model.get("vision") or {}, model.get("llm") or {}
    weights = Path(str(vision.get("pretrained") or "random weights")).name
    shape = llm.get("config") or {}
    tower = _listed(
        ("{}", vision.get("name") or vision.get("config_file")),
        ("of {}", vision.get("library")),
        ("{}", weights),
        ("{} pixels", vision.get("image_size")),
    )
    language = _listed(
        ("{}", llm.get("name") or shape.get("model_type")),
        ("{}", "pretrained" if llm.get("name") else "random weights"),
        ("{} layers", shape.get("num_hidden_layers")),
        ("width {}", shape.get("hidden_size")),
    )
    out = [("Vision tower", tower), ("LLM", language)]
    for stage in tree.get("stages") or []:
        said = _listed(
            ("{:,} samples", stage.get("samples")),
            ("{:,} steps", stage.get("steps")),
            ("{:g} epochs", stage.get("epochs")),
            ("global batch {}", stage.get("global_batch")),
            ("at most {} regions an image", stage.get("max_regions")),
            ("learning rate {:g}", stage.get("lr")),
        )
        out.append((f"Stage {stage.get('name')}", said))
    return out


def _listed(*parts: tuple[str, Any]) -> str:
    """What is there, after its pattern, with commas."""
    return ", ".join(pattern.format(value) for pattern, value in parts if value)
