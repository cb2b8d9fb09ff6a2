"""The examples of a report: a section a task, made of cards by the kind of example.

Receives results with their examples. Gives for each task what the template shows: pictures drawn by lot with the
answers of every model, and the worst of the last model. A task is a line of `SECTIONS`; one without gets a section that
is named after it. Refuses nothing.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from mmgem.evaluation.result import (
    CaptionExample,
    ChoiceExample,
    Example,
    Hit,
    MapExample,
    RegionExample,
    SearchExample,
    TaskResult,
)
from mmgem.page import COLOURS, Mark, cutout, heated, picture

OPEN = 6
"""Examples shown at once; the others are folded."""

_CARD, _TILE = 360, 150  # longest side of the embedded pictures, in pixels
_REFERENCES = 5
_HIT, _MISS = "#2fb36a", "#d9dde1"

Fetch = Callable[[int], Image.Image]
Group = list[tuple[str, Any]]
"""One item shown: (model, its example), all of one class."""


@dataclass(frozen=True, slots=True)
class Section:
    """What stands over a task's examples. worst: after "Where it fails: ", and before the model's name."""

    title: str
    note: str
    worst: str


_IMAGES = "Green: right. Dashed: the right one, where it is not among them."
_BOXES = "Green: the box carries the phrase. Dashed: the best right one, where it is not among the five."
_CHOICES = "The texts to choose from with their scores, best first. ✓: right, ✗: wrong."

SECTIONS = {
    "captioning": Section(
        "Captions", "Images drawn by lot, not chosen. Below the line: the captions of the data.", "the lowest CIDEr of"
    ),
    "region-captioning": Section(
        "Phrases for boxes",
        "Images drawn by lot. Beside each number the phrase of the data, then what the model wrote.",
        "the images that went worst for",
    ),
    "retrieval": Section(
        "From a text to an image",
        f"Captions drawn by lot, with the five best of all images of the split. {_IMAGES}",
        "the worst ranks of",
    ),
    "rerank": Section(
        "Ranked again by what the model would write",
        f"Captions drawn by lot, with the five best of all images after ranking again. {_IMAGES}",
        "the worst ranks of",
    ),
    "region-retrieval": Section(
        "From a phrase to a box",
        f"Phrases drawn by lot, with the five best of all boxes of the split and what stands about them. {_BOXES}",
        "the worst ranks of",
    ),
    "zero-shot": Section("Which class", f"Images drawn by lot. {_CHOICES}", "the surest mistakes of"),
    "composition": Section("Which text is true", f"Images drawn by lot. {_CHOICES}", "the surest mistakes of"),
    "similarity-map": Section(
        "Where a text is seen",
        "Texts drawn by lot, with the cosine of each place of the picture: bright is near. Ring: the nearest place. "
        "✓: it lies in a box that the text names.",
        "the worst of",
    ),
}


def sections(results: Sequence[TaskResult]) -> list[dict[str, Any]]:
    """One a task with examples, in the order of the results; what the template shows of each."""
    last = results[-1].model
    found = []
    for task in dict.fromkeys(r.task for r in results):
        of_task = [r for r in results if r.task == task]
        words = SECTIONS.get(task) or Section(task.replace("-", " ").capitalize(), "Drawn by lot.", "the worst of")
        # The gallery and pictures of the last result: all models see the same data.
        drawn = _built(_drawn(of_task), of_task[-1])
        worst = _built([[(r.model, e)] for r in of_task if r.model == last for e in _of(r, "worst")], of_task[-1])
        if drawn or worst:
            note = words.note + " ✓ and ✗: colour and shape right or wrong." * _judged(of_task)
            fails = f"Where it fails: {words.worst} {last or 'the model'}"
            found.append({"title": words.title, "note": note, "fails": fails, "drawn": drawn, "worst": worst})
    return found


def _judged(results: Sequence[TaskResult]) -> bool:
    """Whether it is said of any box if what was written for it is right."""
    examples = (e for r in results for e in r.examples if isinstance(e, RegionExample))
    return any(note.right is not None for e in examples for note in e.notes)


def _of(result: TaskResult, kind: str) -> list[Example]:
    return [e for e in result.examples if e.kind == kind]


def _drawn(results: Sequence[TaskResult]) -> list[Group]:
    """The same items of all models together."""
    groups: dict[Any, Group] = {}
    for result in results:
        seen: Counter[Any] = Counter()  # one question may be asked of a picture more than once, with other choices
        for example in _of(result, "drawn"):
            what = _identity(example)
            groups.setdefault((what, seen[what]), []).append((result.model, example))
            seen[what] += 1
    return list(groups.values())


def _identity(example: Example) -> Any:
    """What makes examples of two models the same item."""
    if isinstance(example, SearchExample):
        return SearchExample, example.query, example.wanted.image if example.wanted.box is None else None
    if isinstance(example, ChoiceExample):
        return ChoiceExample, example.image, example.question
    if isinstance(example, MapExample):
        return MapExample, example.image, example.text, example.boxes
    return type(example), example.image


def _built(groups: Sequence[Group], result: TaskResult) -> list[dict[str, Any]]:
    """Blocks of one kind of card each: its first few, and those that are folded."""
    blocks = []
    if result.picture is None:
        return []
    for kind, (shape, build) in _BUILDERS.items():
        of_kind = [group for group in groups if isinstance(group[0][1], kind)]
        cards = [build(group, result.picture, result) for group in of_kind]
        if cards:
            blocks.append({"shape": shape, "shown": cards[:OPEN], "folded": cards[OPEN:]})
    return blocks


# --- cards ------------------------------------------------------------------------------------------------------------


def _written(model: str, text: str) -> dict[str, Any]:
    return {"model": model or "model", "text": text or "(nothing)"}


def _caption(group: Group, fetch: Fetch, _: TaskResult) -> dict[str, Any]:
    first: CaptionExample = group[0][1]
    return {
        "picture": picture(fetch(first.image), _CARD, "image with captions"),
        "references": first.references[:_REFERENCES],
        "written": [_written(m, e.written) | {"score": f"{e.score:.2f}"} for m, e in group],
    }


def _region(group: Group, fetch: Fetch, _: TaskResult) -> dict[str, Any]:
    first: RegionExample = group[0][1]
    marks, notes = [], []
    for n, note in enumerate(first.notes):
        colour, badge = COLOURS[n % len(COLOURS)], str(n + 1)
        marks.append(Mark(note.box, colour, badge))
        first_phrase, *others = note.phrases
        given = first_phrase + (f" (+{len(others)})" if others else "")
        written = [_written(m, e.notes[n].written) | {"right": e.notes[n].right} for m, e in group]
        notes.append({"colour": colour, "badge": badge, "given": given, "written": written})
    return {"picture": picture(fetch(first.image), _CARD, "image with numbered boxes", marks), "notes": notes}


def _search(group: Group, fetch: Fetch, result: TaskResult) -> dict[str, Any]:
    gallery = result.protocol.get("boxes", result.protocol.get("images", 0))
    answers = []
    for model, example in group:
        tiles = [
            _tile(hit, fetch, "hit" if hit.right else "", f"{place} · {hit.score:.2f}")
            for place, hit in enumerate(example.hits, 1)
        ]
        if not any(hit.right for hit in example.hits):
            text = f"place {example.place} · {example.wanted.score:.2f}"
            tiles.append(_tile(example.wanted, fetch, "wanted", text))
        place = {"place": f"{example.place:,}", "gallery": f"{gallery:,}" if gallery else ""}
        answers.append({"model": model or "model", "tiles": tiles} | place)
    return {"query": group[0][1].query, "answers": answers}


def _tile(hit: Hit, fetch: Fetch, kind: str, text: str) -> dict[str, Any]:
    image = fetch(hit.image)
    alt = "right result" if hit.right else "result"
    if hit.box is None:
        drawn = picture(image, _TILE, alt)
    else:
        drawn = cutout(image, hit.box, _TILE, alt, _HIT if hit.right else _MISS)
    return {"picture": drawn, "kind": kind, "text": text}


def _choice(group: Group, fetch: Fetch, _: TaskResult) -> dict[str, Any]:
    first: ChoiceExample = group[0][1]
    answers = [
        {
            "model": model or "model",
            "taken": example.taken,
            "choices": [{"text": t, "score": f"{score:.3f}", "right": right} for t, score, right in example.choices],
        }
        for model, example in group
    ]
    return {"picture": picture(fetch(first.image), _CARD, "image"), "question": first.question, "answers": answers}


def _map(group: Group, fetch: Fetch, _: TaskResult) -> dict[str, Any]:
    maps = []
    for model, example in group:
        image = heated(fetch(example.image), example.scores, example.window)
        marks = [Mark(box, COLOURS[0]) for box in example.boxes]
        drawn = picture(image, _CARD, f"where {example.text} is seen", marks, [example.peak])
        low, high = (f(map(f, example.scores)) for f in (min, max))
        span = f"{low:.2f} to {high:.2f}"
        maps.append({"model": model or "model", "picture": drawn, "hit": example.hit, "span": span})
    return {"text": group[0][1].text, "maps": maps}


_BUILDERS: dict[type, tuple[str, Callable[[Group, Fetch, TaskResult], dict[str, Any]]]] = {
    CaptionExample: ("captions", _caption),
    RegionExample: ("regions", _region),
    SearchExample: ("searches", _search),
    ChoiceExample: ("choices", _choice),
    MapExample: ("maps", _map),
}
