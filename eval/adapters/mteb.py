"""MTEB 2 (PyPI `mteb`) with a model of ours, and with our data.

Gives `MMGemEncoder`, one of our models under MTEB's `EncoderProtocol`, for its image and text tasks; and a prepared
split as two of its retrieval tasks, text → image and image → text (`retrieval_tasks`). Refuses what `adapters.split`
refuses, and an input that holds neither text nor images.

Of MTEB's figures, `recall_at_k` of text → image is `image_retrieval_recall@k` of `mmgem eval`, and `hit_rate_at_k` of
image → text is `text_retrieval_recall@k`; its `recall_at_k` there is the share of an image's captions that are found.
MTEB rounds to five places. Equal scores are what differs: `mmgem eval` counts a tie with a wrong answer as a loss,
MTEB goes by the names of the answers.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset, Features, Image, Value
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from torch import Tensor
from torch.utils.data import DataLoader

from adapters.split import open_split, picture_file, readable
from mmgem.errors import UserError
from mmgem.inference.use import load_model
from mmgem.model import MMGem
from mmgem.model.pretrained import model_folder


class MMGemEncoder(AbsEncoder):
    """A run folder or an exported model, as MTEB's encoders are: `MMGemEncoder("runs/quickstart")`.

    A text with an image, as in some of MTEB's queries, is the sum of their two unit vectors. No prompts are used: the
    model was trained without.
    """

    def __init__(self, model_name: str, revision: str | None = None, *, device: str | None = None, **_: Any) -> None:
        """model_name: the folder. revision: only a name for the weights; by default a digest of them, so that MTEB's
        cache of results never takes one checkpoint for another. Raises UserError where there is no model."""
        folder = model_folder(Path(model_name))
        self.mmgem: MMGem = load_model(folder, device or "auto")
        self.mteb_model_meta = describe(Path(model_name), self.mmgem, revision or digest(folder))

    def encode(self, inputs: DataLoader[Any], **_: Any) -> Tensor:
        """Batches with a list of texts, of PIL images, or of both -> N x E, unit vectors, float32, on the CPU."""
        parts = [self._vectors(batch) for batch in inputs]
        return torch.cat(parts) if parts else torch.zeros(0, self.mmgem.config.embed_dim)

    def _vectors(self, batch: dict[str, list[Any]]) -> Tensor:
        found = []
        if "text" in batch:
            found.append(F.normalize(self.mmgem.text_vectors(list(batch["text"])), dim=-1))
        if "image" in batch:
            found.append(F.normalize(self.mmgem.image_vectors(list(batch["image"])), dim=-1))
        if not found:
            raise UserError(f"a batch of MTEB holds {sorted(batch)}; the model takes `text` and `image`")
        return F.normalize(torch.stack(found).sum(dim=0), dim=-1) if len(found) > 1 else found[0]


def describe(path: Path, model: MMGem, revision: str) -> ModelMeta:
    """What MTEB notes of a model; what it asks and the folder does not say stays open."""
    parameters = list(model.parameters())
    return ModelMeta(
        loader=None,
        name=f"mmgem/{path.resolve().name}",
        revision=revision,
        release_date=None,
        languages=None,
        n_parameters=sum(p.numel() for p in parameters),
        memory_usage_mb=sum(p.numel() * p.element_size() for p in parameters) / 2**20,
        max_tokens=model.config.max_tokens,
        embed_dim=model.config.embed_dim,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch", "safetensors"],
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=False,
        training_datasets=None,
        modalities=["image", "text"],
    )


def digest(folder: Path) -> str:
    """Twelve hexadecimal digits that change with the weights or the settings."""
    total = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        with (folder / name).open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:12]


# --- a prepared split as tasks ----------------------------------------------------------------------------------------


class SplitRetrieval(AbsTaskRetrieval):
    """Retrieval on a prepared split, read when MTEB asks for it; `retrieval_tasks` makes the two of a split."""

    location: tuple[Path, str]

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:
        """Broken samples are left out as `mmgem eval` leaves them out."""
        if self.data_loaded:
            return
        data, split = self.location
        images: list[dict[str, Any]] = []
        texts: list[dict[str, str]] = []
        for sample, picture in readable(open_split(data, split)):
            # As bytes: a column of decoded pictures would be written anew, some with loss.
            images.append({"id": sample.key, "image": {"bytes": picture_file(sample, picture)[1], "path": None}})
            texts += [{"id": f"{sample.key}#{n}", "text": text} for n, text in enumerate(sample.captions)]
        owner = {text["id"]: text["id"].rpartition("#")[0] for text in texts}
        relevant: dict[str, dict[str, int]] = {}
        for text, image in owner.items():
            query, document = (text, image) if self.metadata.category == "t2i" else (image, text)
            relevant.setdefault(query, {})[document] = 1
        image_rows = Dataset.from_list(images, features=Features({"id": Value("string"), "image": Image()}))
        text_rows = Dataset.from_list(texts)
        asks_text = self.metadata.category == "t2i"
        self.dataset = {
            "default": {
                split: RetrievalSplitData(
                    queries=text_rows if asks_text else image_rows,
                    corpus=image_rows if asks_text else text_rows,
                    relevant_docs=relevant,
                    top_ranked=None,
                )
            }
        }
        self.data_loaded = True


def retrieval_tasks(data: str | Path, split: str, language: str = "eng-Latn") -> list[AbsTaskRetrieval]:
    """[text → image, image → text] on a prepared split; the whole split is held in memory while a task runs.

    They are called after the data's folder and the split, e.g. ScenesTestT2I. language: of the captions, as MTEB
    writes it. Raises UserError where there is no such split.
    """
    folder = Path(data)
    checksum = open_split(folder, split).checksum  # so that MTEB keeps the results of other data apart
    name = "".join(part.capitalize() for part in (*folder.resolve().name.split("-"), split))
    tasks: list[AbsTaskRetrieval] = []
    for category in ("t2i", "i2t"):
        metadata = TaskMetadata(
            name=f"{name}{category.upper()}",
            description=f"Retrieval {category} on the split {split} of {folder.resolve().name}.",
            dataset={"path": str(folder), "revision": checksum},
            type="Any2AnyRetrieval",
            category=category,
            modalities=["image", "text"],
            eval_splits=[split],
            eval_langs=[language],
            main_score="recall_at_1" if category == "t2i" else "hit_rate_at_1",
        )
        made = type(metadata.name, (SplitRetrieval,), {"metadata": metadata, "location": (folder, split)})
        tasks.append(made())
    return tasks
