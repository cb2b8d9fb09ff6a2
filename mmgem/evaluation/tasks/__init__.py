"""The evaluation tasks, by the names under which users ask for them.

Each is a module with `run(model, encoded, options) -> TaskResult`, whose docstring states the
protocol, and a `VERSION` that grows when the same model would get other figures.
"""

from collections.abc import Callable
from dataclasses import dataclass

from mmgem.data.shards import ShardedDataset
from mmgem.evaluation.result import TaskResult
from mmgem.evaluation.tasks import captioning, region_captioning, region_retrieval, retrieval
from mmgem.evaluation.tasks.common import TaskOptions
from mmgem.inference.encode import Encoded, Encoder

__all__ = ["TASKS", "Task", "TaskOptions"]


@dataclass(frozen=True, slots=True)
class Task:
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


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(retrieval.NAME, retrieval.run, retrieval.VERSION, texts=True, captions=True),
        Task(captioning.NAME, captioning.run, captioning.VERSION, captions=True),
        Task(region_retrieval.NAME, region_retrieval.run, region_retrieval.VERSION, regions=True),
        Task(region_captioning.NAME, region_captioning.run, region_captioning.VERSION, regions=True),
    )
}
