"""The evaluation tasks, by the names under which users ask for them.

Each is a module with `run(model, encoded, options) -> TaskResult`, whose docstring states the
protocol, and a `VERSION` that grows when the same model would get other figures.
"""

from collections.abc import Callable
from dataclasses import dataclass

from mmgem.evaluation.result import TaskResult
from mmgem.evaluation.tasks import captioning, region_captioning, region_retrieval, retrieval
from mmgem.evaluation.tasks.common import TaskOptions
from mmgem.inference.encode import Encoded, Encoder

__all__ = ["TASKS", "Task", "TaskOptions"]


@dataclass(frozen=True, slots=True)
class Task:
    """A task and what has to be encoded for it."""

    name: str
    run: Callable[[Encoder, Encoded, TaskOptions], TaskResult]
    version: int
    texts: bool = False
    regions: bool = False


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(retrieval.NAME, retrieval.run, retrieval.VERSION, texts=True),
        Task(captioning.NAME, captioning.run, captioning.VERSION),
        Task(region_retrieval.NAME, region_retrieval.run, region_retrieval.VERSION, regions=True),
        Task(region_captioning.NAME, region_captioning.run, region_captioning.VERSION, regions=True),
    )
}
