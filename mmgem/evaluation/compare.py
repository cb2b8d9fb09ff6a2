"""Two evaluations compared figure by figure on the same items.

Receives two places, each a folder with metrics.json and items/ (a report folder, or a run folder with report/ in it),
and after a colon which of its models where it has several. Gives for each figure in both: both values, the difference,
its standard error, 95 % interval and p; writes compare.json and compare.html. Refuses, with a UserError that names it,
what makes two figures incomparable: other data, other items, another protocol. Versions and dtypes may differ, and are
told.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmgem.errors import UserError
from mmgem.evaluation.items import items_file, load_items
from mmgem.evaluation.metrics.paired import Paired, figure, paired_bootstrap, same_units
from mmgem.evaluation.metrics.scores import Items
from mmgem.evaluation.result import write_json

SCHEMA = 1

TOLD = (
    "versions", "dtype", "stderr", "texts_cut", "texts_cut_share", "baseline", "absent", "logit_scale",
    "places",
)  # fmt: skip
"""Protocol lines that may differ: of the machine, of the model itself, or of other figures of the same task."""

FIGURES = ("alpha_sweep",)
"""Protocol lines that say what came out."""

_LOWER_IS_BETTER = ("median_rank", "mean_rank", "perplexity")


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two. results: by task, as metrics.json has them."""

    place: Path
    model: str
    results: dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class TaskComparison:
    """told: what differs and does not matter, or was left out, as sentences."""

    task: str
    figures: dict[str, Paired]
    told: list[str]
    items: dict[str, int]


@dataclass(frozen=True, slots=True)
class Comparison:
    a: Side
    b: Side
    names: tuple[str, str]
    tasks: list[TaskComparison]
    told: list[str]
    seed: int

    def to_json(self) -> dict[str, Any]:
        """compare.json of schema 1."""
        sides = {
            letter: {"name": name, "place": str(side.place), "model": side.model}
            for letter, name, side in zip("ab", self.names, (self.a, self.b), strict=True)
        }
        tasks = [
            {
                "task": one.task,
                "told": one.told,
                "figures": {name: {**asdict(paired), "items": one.items[name]} for name, paired in one.figures.items()},
            }
            for one in self.tasks
        ]
        method = "paired bootstrap, 95 % percentile interval, two-sided p of the inverted interval"
        return {"schema": SCHEMA, "method": method, "seed": self.seed, **sides, "told": self.told, "tasks": tasks}


def compare(a: str, b: str, *, samples: int = 10_000, seed: int = 0, allowed: Collection[str] = ()) -> Comparison:
    """Compares what both have. a, b: `FOLDER` or `FOLDER:MODEL`; the last model by default.

    allowed: protocol lines that may differ besides `TOLD`, e.g. "num_beams" to compare two ways of writing.
    """
    sides = read_side(a), read_side(b)
    one, two = sides
    shared = [task for task in one.results if task in two.results]
    if not shared:
        has = [f"{side.place} has {', '.join(side.results)}" for side in sides]
        raise UserError(f"no task in both: {has[0]}, {has[1]}; evaluate both for the same task")
    told = [f"{task} is in {side.place} only" for side in sides for task in side.results if task not in shared]
    tasks = [_of_task(task, one, two, samples, seed, {*TOLD, *allowed}) for task in shared]
    return Comparison(one, two, _names(one, two), tasks, told, seed)


def lower_is_better(metric: str) -> bool:
    return metric.endswith(_LOWER_IS_BETTER)


def verdict(metric: str, paired: Paired) -> str:
    """ "better" or "worse", said of b, where the interval excludes 0; else ""."""
    if paired.low <= 0 <= paired.high:
        return ""
    return "better" if (paired.difference > 0) != lower_is_better(metric) else "worse"


# --- reading ----------------------------------------------------------------------------------------------------------


def read_side(text: str) -> Side:
    """`FOLDER` or `FOLDER:MODEL`, if there is no folder of that whole name. Raises UserError."""
    place, chosen = Path(text), ""
    if not place.exists() and ":" in text:
        before, _, chosen = text.rpartition(":")
        place = Path(before)
    folder = next((f for f in (place, place / "report") if (f / "metrics.json").is_file()), None)
    if folder is None:
        raise UserError(f"{place}: no metrics.json here, nor in report/; run `mmgem eval`, or give the folder it wrote")
    file = folder / "metrics.json"
    of_model: dict[str, dict[str, dict[str, Any]]] = {}
    for result in _results(file):
        of_model.setdefault(result.get("model", ""), {})[result["task"]] = result
    model = chosen or list(of_model)[-1]
    if chosen and list(of_model) == [""]:
        raise UserError(f"{file}: names no models; give {place} without {chosen!r}")
    if model not in of_model:
        raise UserError(f"{file}: no model {model!r}; it has {', '.join(of_model)}")
    return Side(folder, model, of_model[model])


def _results(file: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        results = content if isinstance(content, list) else [content]
        for result in results:
            if result["schema"] != 1:
                raise UserError(f"{file}: schema {result['schema']} is not known here; use the mmgem that wrote it")
            if not all(isinstance(result[part], dict) for part in ("protocol", "metrics")) or not result["task"]:
                raise ValueError("parts missing")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{file}: not what `mmgem eval` writes ({e!r:.100}); evaluate again") from e
    if not results:
        raise UserError(f"{file}: has no results; evaluate again")
    return results


def _items(side: Side, task: str) -> tuple[dict[str, Items], list[str]]:
    """Those of the figures in metrics.json. Raises UserError if they are of another evaluation."""
    path = items_file(side.place, side.model, task)
    if not side.model and not path.is_file():  # a file of one result did not name its model
        found = sorted(path.parent.glob(f"*.{task}.npz"))
        path = found[0] if len(found) == 1 else path
    items, keys = load_items(path)
    for name, value in side.results[task]["metrics"].items():
        if name in items and abs(figure(items[name]) - value) > 1e-6 * max(1.0, abs(value)):
            raise UserError(
                f"{path}: {name} is {figure(items[name]):.6g} by its items and {value:.6g} in metrics.json; "
                "they are of two evaluations, evaluate again"
            )
    return {name: one for name, one in items.items() if name in side.results[task]["metrics"]}, keys


# --- comparing --------------------------------------------------------------------------------------------------------


def _names(a: Side, b: Side) -> tuple[str, str]:
    """Short ones that tell the two apart."""
    runs = [side.place.parent.name if side.place.name == "report" else side.place.name for side in (a, b)]
    models = [side.model or run for side, run in zip((a, b), runs, strict=True)]
    if models[0] != models[1]:
        return models[0], models[1]
    both = [run if run == model else f"{run}:{model}" for run, model in zip(runs, models, strict=True)]
    return (both[0], both[1]) if both[0] != both[1] else (f"A {both[0]}", f"B {both[1]}")


def _of_task(task: str, a: Side, b: Side, samples: int, seed: int, may_differ: Collection[str]) -> TaskComparison:
    told = list(_protocols(task, a, b, may_differ))
    (items_a, keys_a), (items_b, keys_b) = _items(a, task), _items(b, task)
    if keys_a != keys_b:
        raise UserError(f"{task}: {_keys_differ(keys_a, keys_b)}; evaluate {a.place} and {b.place} on the same data")
    for name in items_a:
        if name in items_b and not same_units(items_a[name], items_b[name]):
            counts = [len(items[name].values_NS) for items in (items_a, items_b)]
            how = f"{counts[0]:,} and {counts[1]:,} items" if counts[0] != counts[1] else "items grouped in another way"
            raise UserError(f"{task}: {name} was measured on {how}; evaluate {a.place} and {b.place} on the same data")
    both = [name for name in a.results[task]["metrics"] if name in items_a and name in items_b]
    left_out = dict.fromkeys([*a.results[task]["metrics"], *b.results[task]["metrics"]])
    if left := [name for name in left_out if name not in both]:
        told.append(f"not compared, since not both have them item by item: {', '.join(left)}")
    ordered = {name: items_a[name] for name in both}
    found = paired_bootstrap(ordered, items_b, samples=samples, seed=seed)
    return TaskComparison(task, found, told, {name: len(ordered[name].values_NS) for name in both})


def _protocols(task: str, a: Side, b: Side, may_differ: Collection[str]) -> Iterator[str]:
    """What differs and may. Raises UserError for what may not."""
    one, two = a.results[task]["protocol"], b.results[task]["protocol"]
    for name in dict.fromkeys([*one, *two]):
        if one.get(name) == two.get(name) or name in FIGURES:
            continue
        if name not in may_differ:
            raise UserError(
                f"{task}: the protocols differ in {name}: {_short(one.get(name))} in {a.place}, "
                f"{_short(two.get(name))} in {b.place}; evaluate both alike, or add --allow {name}"
            )
        if isinstance(one.get(name), dict) and isinstance(two.get(name), dict):
            yield from (f"{name}: {said}" for said in _inside(one[name], two[name]))
        else:
            yield f"{name}: {_short(one.get(name))} and {_short(two.get(name))}"


def _inside(one: Mapping[str, Any], two: Mapping[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys([*one, *two]):
        if one.get(name) != two.get(name):
            yield f"{name} {_short(one.get(name))} and {_short(two.get(name))}"


def _short(value: Any) -> str:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"


def _keys_differ(a: Sequence[str], b: Sequence[str]) -> str:
    only_a, only_b = [k for k in a if k not in set(b)], [k for k in b if k not in set(a)]
    if not only_a and not only_b:
        return "the same images in another order"
    said = [f"{len(only):,} images are only in {letter}, e.g. {only[0]}" for only, letter in
            ((only_a, "A"), (only_b, "B")) if only]  # fmt: skip
    return ", ".join(said)


# --- writing ----------------------------------------------------------------------------------------------------------


def write_comparison(out: Path, found: Comparison) -> None:
    """Writes `out/compare.json` and `out/compare.html`."""
    from mmgem.evaluation.compare_page import write_page

    write_json(out / "compare.json", found.to_json())
    write_page(out / "compare.html", found)


def table(found: Comparison) -> str:
    """For a terminal: a row a figure."""
    from mmgem.evaluation.figures import decimals

    rows = [["", *found.names, "B - A", "±", "95 % interval", "p", ""]]
    for one in found.tasks:
        rows.append([one.task] + [""] * 7)
        for name, p in one.figures.items():
            digits = decimals(max(abs(p.a), abs(p.b)))
            parts = [signed(value, digits) for value in (p.difference, p.low, p.high)]
            of_both = [f"{p.a:.{digits}f}", f"{p.b:.{digits}f}"]
            interval = f"{parts[1]} … {parts[2]}"
            error = f"{p.stderr:.{digits}f}"
            rows.append([f"  {name}", *of_both, parts[0], error, interval, p_value(p), verdict(name, p)])
    widths = [max(len(row[i]) for row in rows) for i in range(8)]
    lines = []
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:7], widths[1:7], strict=True)),
        ]
        lines.append("  ".join([*cells, row[7]]).rstrip())
    lines += [f"{one.task}: {said}" for one in found.tasks for said in one.told]
    return "\n".join([*lines, *found.told])


def signed(value: float, digits: int) -> str:
    """With its sign, unless all that is shown is 0."""
    text = f"{value:+.{digits}f}"
    return text if float(text) else text[1:]


def p_value(paired: Paired) -> str:
    """As small as the number of resamples can tell."""
    least = 2 / (paired.samples + 1)
    return f"≤ {least:.1g}" if paired.p <= least else f"{paired.p:.2g}" if paired.p < 0.1 else f"{paired.p:.2f}"
