"""Recalls, time and memory of this package's retrieval figures, beside CLIP_benchmark's, in one run.

    pip install --no-deps clip-benchmark
    python bench/retrieval.py [--images 5000] [--captions 5] [--dim 512] [--rounds 2]
    python bench/retrieval.py --million

Made-up vectors of the size of COCO's 5K test set. CLIP_benchmark: what its `evaluate` does once it has the vectors,
with its own `recall_at_k` and `batchify`, at 1, 5 and 10 and with its default batch of 64. This package:
`ranks_both_ways` and `retrieval_scores` in both directions, which give strict recall, mAP, mAP@R, median rank and
chance as well; with standard errors in a row of its own. They take turns, each in a process of its own; the least of
the rounds counts. Memory is the peak above what the process held with the vectors already there.

Ends with 1 where a mark is missed: recalls of both kinds equal to 1e-6, time and memory at most a tenth; `--no-marks`
leaves them out. Recalls are compared with `tie=0`, as the peer has no tolerance; what the tolerance of 1e-6, within
which a wrong answer counts as a tie and so as a loss, changes stands in a column of its own. `--million`: 1,000,000
texts x 100,000 images at width 256 instead, without a peer, which would need 400 GB for the scores alone: time, and the
peak of all memory of the process, for which the mark is 4 GB. Linux only. Set OMP_NUM_THREADS to the number of cores
that are free.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmgem.evaluation.metrics.retrieval import TIE, Positives, ranks_both_ways, retrieval_scores
from mmgem.progress import Progress

KS = (1, 5, 10)
BATCH = 64  # CLIP_benchmark's default
MARKS = {"time": 0.1, "memory": 0.1, "difference": 1e-6, "million": 4e9}
CASES = {"theirs": "CLIP_benchmark", "ours": "mmgem", "errors": "  with standard errors"}


def main() -> None:
    args = parse_arguments()
    if args.million:
        million(args)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "mmgem.evaluation.metrics"])
    found: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
    total = args.rounds * len(CASES)
    with tempfile.TemporaryDirectory() as folder, Progress("measuring", total, "processes") as progress:
        path = Path(folder) / "found.pt"
        for _ in range(args.rounds):
            for case in CASES:
                process = context.Process(target=measure, args=(args, path, case))
                process.start()
                process.join()
                if process.exitcode:
                    sys.exit("a process failed")
                found[case].append(torch.load(path))
                progress.advance()
    missed = print_all(args, found)
    if missed and not args.no_marks:
        sys.exit("missed: " + ", ".join(missed))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, help="default: 5000; 100,000 with --million")
    parser.add_argument("--captions", type=int, help="texts an image (default: 5; 10 with --million)")
    parser.add_argument("--dim", type=int, help="width of the vectors (default: 512; 256 with --million)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--million", action="store_true", help="1,000,000 texts x 100,000 images, without the peer")
    parser.add_argument("--no-marks", action="store_true", help="end with 0 whatever is found")
    args = parser.parse_args()
    args.images = args.images or (100_000 if args.million else 5000)
    args.captions = args.captions or (10 if args.million else 5)
    args.dim = args.dim or (256 if args.million else 512)
    if min(args.images, args.captions, args.dim, args.rounds) < 1:
        parser.error("--images, --captions, --dim and --rounds must be at least 1")
    return args


def inputs(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors of images and texts, of which two that belong together have a cosine of about 0.16; the image
    of each text. Made in parts, so that nothing else of their size is ever held."""
    generator = torch.Generator().manual_seed(0)
    image_NE = torch.randn(args.images, args.dim, generator=generator)
    of_M = torch.arange(args.images * args.captions) // args.captions
    text_ME = torch.randn(len(of_M), args.dim, generator=generator)
    for part_BE, of_B in zip(text_ME.split(8192), of_M.split(8192), strict=True):
        part_BE.mul_(6).add_(image_NE[of_B])
    for vectors in (image_NE, text_ME):
        for part_BE in vectors.split(8192):
            part_BE.copy_(F.normalize(part_BE, dim=1))
    return image_NE, text_ME, of_M


# --- what is measured ------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, path: Path, case: str) -> None:
    image_NE, text_ME, of_M = inputs(args)
    figures: Callable[..., dict[str, float]] = theirs if case == "theirs" else ours
    samples = 1000 if case == "errors" else 0
    figures(image_NE[:100], text_ME[: 100 * args.captions], of_M[: 100 * args.captions], samples)
    Path("/proc/self/clear_refs").write_text("5")
    memory, start, cpu = peak(), time.perf_counter(), time.process_time()
    values = figures(image_NE, text_ME, of_M, samples)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    memory = peak() - memory
    exact = ours(image_NE, text_ME, of_M, 0, tie=0.0) if case == "ours" else values
    torch.save({"time": seconds, "cpu": cpu, "memory": memory, "values": values, "exact": exact}, path)


def theirs(image_NE: Tensor, text_ME: Tensor, of_M: Tensor, _: int) -> dict[str, float]:
    """`evaluate` after the vectors; the strict recalls are the means it would have without asking for `> 0`."""
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

    scores = text_ME @ image_NE.t()
    positive_pairs = torch.zeros_like(scores, dtype=torch.bool)
    positive_pairs[torch.arange(len(scores)), of_M] = True
    out = {}
    for k in KS:
        for name, x, y in (("image", scores, positive_pairs), ("text", scores.T, positive_pairs.T)):
            recall_Q = batchify(recall_at_k, x, y, BATCH, "cpu", k=k)
            out[f"{name}_retrieval_recall@{k}"] = (recall_Q > 0).double().mean().item()
            out[f"{name}_retrieval_strict_recall@{k}"] = recall_Q.double().mean().item()
    return out


def ours(image_NE: Tensor, text_ME: Tensor, of_M: Tensor, samples: int, *, tie: float = TIE) -> dict[str, float]:
    to_image = Positives.from_ids(of_M, torch.arange(len(image_NE)))
    to_text = to_image.reversed()
    ranks, back = ranks_both_ways(text_ME, image_NE, to_image, tie=tie)
    scores = retrieval_scores("image_retrieval", ranks, to_image, ks=KS, groups=of_M.numpy(), samples=samples)
    scores.update(retrieval_scores("text_retrieval", back, to_text, ks=KS, samples=samples))
    return scores.metrics


def peak() -> int:
    # Not `ru_maxrss`, which also holds the peak of the process that this one was forked from.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def million(args: argparse.Namespace) -> None:
    image_NE, text_ME, of_M = inputs(args)
    print(f"{len(text_ME):,} texts x {len(image_NE):,} images, width {args.dim}; threads: {torch.get_num_threads()}")
    print(f"vectors {(image_NE.nbytes + text_ME.nbytes) / 1e9:.2f} GB, peak with them there {peak() / 1e9:.2f} GB")
    to_image = Positives.from_ids(of_M, torch.arange(len(image_NE)))
    start = time.perf_counter()
    ranks_P, back_P = ranks_both_ways(text_ME, image_NE, to_image)
    seconds = time.perf_counter() - start
    rate = 2 * len(text_ME) * len(image_NE) * args.dim / seconds / 1e9
    print(
        f"ranks both ways {seconds:.0f} s ({rate:.0f} GFLOP/s of the product alone), peak {peak() / 1e9:.2f} GB",
        flush=True,
    )
    for name, ahead_P, positives, groups in (
        ("image_retrieval", ranks_P, to_image, of_M.numpy()),
        ("text_retrieval", back_P, to_image.reversed(), None),
    ):
        start = time.perf_counter()
        scores = retrieval_scores(name, ahead_P, positives, ks=KS, groups=groups)
        print(f"{name}: figures and standard errors {time.perf_counter() - start:.0f} s, peak {peak() / 1e9:.2f} GB")
        print("  " + ", ".join(f"{n.removeprefix(name + '_')} {v:.4f}" for n, v in scores.metrics.items()), flush=True)
    if peak() > MARKS["million"] and not args.no_marks:
        sys.exit("missed: memory")


# --- what is printed -------------------------------------------------------------------------------------------------


def print_all(args: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Gives the marks that are missed."""
    print(f"{args.images:,} images x {args.images * args.captions:,} texts, width {args.dim}; ", end="")
    print(f"threads: {torch.get_num_threads()}; least of {args.rounds} rounds")
    least = {case: {f: min(r[f] for r in rs) for f in ("time", "cpu", "memory")} for case, rs in found.items()}
    print(f"{'':24}{'seconds':>9}{'CPU s':>9}{'MB':>9}")
    for case, name in CASES.items():
        print(f"{name:24}{least[case]['time']:9.2f}{least[case]['cpu']:9.2f}{least[case]['memory'] / 1e6:9.0f}")
    ratios = {f: least["ours"][f] / least["theirs"][f] for f in ("time", "cpu", "memory")}
    print(f"{'  ratio, without them':24}{ratios['time']:9.3f}{ratios['cpu']:9.3f}{ratios['memory']:9.3f}")
    wanted, exact, values = found["theirs"][0]["values"], found["ours"][0]["exact"], found["ours"][0]["values"]
    for name, value in wanted.items():
        print(
            f"  {name:34} {value:.6f}  difference {exact[name] - value:+.1e}  by ties {values[name] - exact[name]:+.1e}"
        )
    difference = max(abs(exact[name] - value) for name, value in wanted.items())
    missed = [f for f in ("time", "memory") if not ratios[f] <= MARKS[f]]
    return missed + (["recalls"] if not difference <= MARKS["difference"] else [])


if __name__ == "__main__":
    main()
