"""The evaluation tasks, by the names under which users ask for them.

Each is a module whose `run` has the protocol in its docstring, and a `VERSION` that grows when the same model would get
other figures. Tasks on a split are `run(model, encoded, options)` and share one pass of the model over the split; tasks
on a layout of their own, such as class folders, are `run(model, folder, options)`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mmgem.data.shards import ShardedDataset
from mmgem.evaluation.result import TaskResult
from mmgem.evaluation.tasks import (
    captioning,
    composition,
    region_captioning,
    region_retrieval,
    rerank,
    retrieval,
    similarity_map,
    zero_shot,
)
from mmgem.evaluation.tasks.common import TaskOptions
from mmgem.inference.encode import Encoded, Encoder

__all__ = ["TASKS", "LayoutTask", "SplitTask", "Task", "TaskOptions"]


@dataclass(frozen=True, slots=True)
class SplitTask:
    """A task, what has to be encoded for it (texts, regions), and whether it needs captions."""

    name: str
    run: Callable[[Encoder, Encoded, TaskOptions], TaskResult]
    version: int
    texts: bool = False
    regions: bool = False
    captions: bool = False

    def lacks(self, split: ShardedDataset) -> str:
        """What the task needs and the split has none of: "regions", "captions", or nothing ("")."""
        if self.regions and not split.has_regions:
            return "regions"
        return "captions" if self.captions and not split.has_captions else ""


@dataclass(frozen=True, slots=True)
class LayoutTask:
    """A task on files in a layout of others."""

    name: str
    run: Callable[[Encoder, Path, TaskOptions], TaskResult]
    version: int
    found: Callable[[Path, str], bool]
    """Whether a data folder is, or has, such a layout with the split."""
    check: Callable[[Path, TaskOptions], None]
    """Raises UserError for data that `run` would refuse, before a model is loaded."""


Task = SplitTask | LayoutTask

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        SplitTask(retrieval.NAME, retrieval.run, retrieval.VERSION, texts=True, captions=True),
        SplitTask(captioning.NAME, captioning.run, captioning.VERSION, captions=True),
        SplitTask(region_retrieval.NAME, region_retrieval.run, region_retrieval.VERSION, regions=True),
        SplitTask(region_captioning.NAME, region_captioning.run, region_captioning.VERSION, regions=True),
        SplitTask(rerank.NAME, rerank.run, rerank.VERSION, texts=True, captions=True),
        SplitTask(similarity_map.NAME, similarity_map.run, similarity_map.VERSION, regions=True),
        LayoutTask(zero_shot.NAME, zero_shot.run, zero_shot.VERSION, zero_shot.found, zero_shot.check),
        LayoutTask(composition.NAME, composition.run, composition.VERSION, composition.found, composition.check),
    )
}
