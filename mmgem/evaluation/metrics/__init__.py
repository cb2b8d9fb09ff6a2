"""Figures as pure functions of tensors, arrays and strings. Imports nothing of ours."""

from mmgem.evaluation.metrics.captions import caption_scores, tokenize
from mmgem.evaluation.metrics.java_scores import java_scores
from mmgem.evaluation.metrics.retrieval import Positives, best_ranks, positive_ranks, retrieval_scores, top_k
from mmgem.evaluation.metrics.scores import Scores, bootstrap_stderr

__all__ = [
    "Positives",
    "Scores",
    "best_ranks",
    "bootstrap_stderr",
    "caption_scores",
    "java_scores",
    "positive_ranks",
    "retrieval_scores",
    "tokenize",
    "top_k",
]
