"""Memory, time, gradients and bytes sent of this package's contrastive losses, beside open_clip's, in one run.

    python bench/contrastive.py [--n 16384] [--dim 512] [--rounds 3] [--dtype fp32] [--device cpu] [--ranks 2]

One step is `F.normalize`, the loss and its backward pass, from the vectors as the towers give them to their gradients.
`mmgem.losses.contrastive` and `open_clip.loss.ClipLoss` take turns, and so do the two sigmoid losses; the least of the
rounds counts. Each step has a process of its own, whose libraries a small step has warmed: memory is its peak above
what it held with the vectors already there (of the GPU with `--device cuda`). bf16: with autocast, as in training.

Gradients: the largest error of each, as a part of its largest value; of InfoNCE against fp64 (`in_fp64`), of ours of
the sigmoid losses against open_clip's. Then both InfoNCEs run in `--ranks` processes over gloo, each with its part of
the N, open_clip with `local_loss` and `gather_with_grad`. Bytes are those that the loopback interface sent: in a
network of their own where this process may make one; else whatever else uses the interface counts too.

Ends with 1 where a mark is missed: memory 0.1, time 1.1, bytes 0.6 of open_clip's, and in fp32 a gradient error of
1e-5. They are for N = 16,384 and width 512; `--no-marks` leaves them out. Linux only; needs some 6 GB at that size.
Where other work shares the cores, set OMP_NUM_THREADS=1: threads that wait for each other measure that work.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import importlib.metadata
import math
import multiprocessing
import os
import socket
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmgem.losses.contrastive import contrastive_loss
from mmgem.progress import Progress

PEER = f"open_clip {importlib.metadata.version('open_clip_torch')}"
NAMES = {
    "infonce": "InfoNCE, mmgem",
    "clip": f"InfoNCE, {PEER}",
    "sigmoid": "sigmoid, mmgem",
    "siglip": f"sigmoid, {PEER}",
}
PEERS = {"infonce": "clip", "sigmoid": "siglip"}
MARKS = {"memory": 0.1, "time": 1.1, "bytes": 0.6, "gradient": 1e-5}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLONE_NEWNET, SIOCSIFFLAGS, IFF_UP = 0x40000000, 0x8914, 0x1

Found = dict[str, Any]
"""What one process found: memory and bytes (MB), time and cpu (seconds), gradients."""
Rounds = dict[tuple[str, int], list[list[Found]]]
"""By case and number of ranks: of each round, of each rank."""


def main() -> None:
    args = parse_arguments()
    # A process that has imported all and computed nothing is forked for each step: equal starts, and quick ones.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["open_clip.loss", "mmgem.losses.contrastive"])
    runs = [(case, 1) for case in NAMES] + [(case, args.ranks) for case in ("infonce", "clip") if args.ranks > 1]
    found: Rounds = {run: [] for run in runs}
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress("measuring", args.rounds * len(runs) + 1, "steps") as progress,
    ):

        def measured(target: Callable[..., None], ranks: int, *arguments: Any) -> list[Found]:
            paths = [Path(folder) / f"{rank}.pt" for rank in range(ranks)]
            in_processes(context, [(target, (args, paths, *arguments))])
            progress.advance()
            return [torch.load(path) for path in paths]

        reference = measured(in_fp64, 1)[0]["gradients"]
        for _ in range(args.rounds):
            for case, ranks in runs:
                found[case, ranks].append(measured(in_ranks if ranks > 1 else measure, ranks, case))
    missed = print_steps(args, found, reference)
    if args.ranks > 1:
        missed += print_bytes(args, found, reference)
    if missed and not args.no_marks:
        sys.exit("missed: " + ", ".join(missed))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, default=16384, help="pairs, of all processes")
    parser.add_argument("--dim", type=int, default=512, help="width of the vectors")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, help="processes that send; 1: no such steps (default: 2; 1 with cuda)")
    parser.add_argument("--no-marks", action="store_true", help="end with 0 whatever is found")
    args = parser.parse_args()
    if args.ranks is None:
        args.ranks = 2 if args.device == "cpu" else 1
    if min(args.rounds, args.ranks, args.n, args.dim) < 1 or args.n % args.ranks:
        parser.error("--n, --dim, --rounds and --ranks must be at least 1, and --n a multiple of --ranks")
    if args.device == "cuda" and args.ranks > 1:
        parser.error("bytes are measured on the loopback interface: give --ranks 1 with --device cuda")
    return args


def in_processes(context: Any, calls: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
    """Each call in a process of its own, at the same time; ends this one if one of them fails."""
    processes = [context.Process(target=target, args=arguments) for target, arguments in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit("a process failed")


# --- what is measured ------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, paths: list[Path], case: str, rank: int = 0) -> None:
    """One step; writes what was found."""
    ranks = len(paths)
    leaves, loss = inputs(args, ranks, rank), loss_of(case, ranks, rank)
    warm = args.n if args.device == "cuda" else 256
    step(args, loss, [(t[:warm] if t.ndim else t).detach().requires_grad_() for t in leaves])
    sent, memory = bytes_sent(), start_of_peak(args.device)
    start, cpu = time.perf_counter(), time.process_time()
    step(args, loss, leaves)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    memory, sent = peak(args.device) - memory, bytes_sent() - sent
    factor = 2 if case == "clip" else 1  # ClipLoss is the mean of the two directions, ours their sum
    gradients = [t.grad.float().cpu() * factor for t in leaves if t.grad is not None]
    found = {"memory": memory / 1e6, "time": seconds, "cpu": cpu, "bytes": sent / 1e6, "gradients": gradients}
    torch.save(found, paths[rank])


def inputs(args: argparse.Namespace, ranks: int = 1, rank: int = 0) -> list[Tensor]:
    """This rank's image and text vectors, of which two that belong together have a cosine of about 0.45; the
    logarithm of the scale, and the bias."""
    generator = torch.Generator().manual_seed(0)
    image_NE = torch.randn(args.n, args.dim, generator=generator)
    text_NE = 2 * torch.randn(args.n, args.dim, generator=generator) + image_NE
    rows = slice(rank * args.n // ranks, (rank + 1) * args.n // ranks)
    vectors = [v_NE[rows].to(args.device, DTYPES[args.dtype], copy=True) for v_NE in (image_NE, text_NE)]
    scalars = [torch.tensor(value, device=args.device) for value in (2.659, -10.0)]
    return [t.requires_grad_() for t in (*vectors, *scalars)]


def loss_of(case: str, ranks: int, rank: int) -> Callable[..., Tensor]:
    from open_clip.loss import ClipLoss, SigLipLoss

    def ours(image_NE: Tensor, text_NE: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
        number_N = torch.arange(len(image_NE), device=image_NE.device) + rank * len(image_NE)
        return contrastive_loss(image_NE, number_N, text_NE, number_N, number_N, logit_scale, logit_bias, case)

    clip = ClipLoss(local_loss=ranks > 1, gather_with_grad=ranks > 1, rank=rank, world_size=ranks)
    siglip = SigLipLoss()

    def theirs(image_NE: Tensor, text_NE: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
        vectors = F.normalize(image_NE, dim=-1), F.normalize(text_NE, dim=-1)
        return clip(*vectors, logit_scale.exp()) if case == "clip" else siglip(*vectors, logit_scale.exp(), logit_bias)

    return ours if case in PEERS else theirs


def step(args: argparse.Namespace, loss: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bf16"):
        value = loss(*leaves)
    value.backward()
    if args.device == "cuda":
        torch.cuda.synchronize()


def start_of_peak(device: str) -> int:
    """Bytes in use now; from here on `peak` counts."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return peak(device)


def peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not `ru_maxrss`, which also holds the peak of the process that this one was forked from.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def in_fp64(args: argparse.Namespace, paths: list[Path]) -> None:
    """Gradients of InfoNCE, the sum of both directions, in tiles; written by hand from those of the scores,
    softmax over the row plus softmax over the column, less 2 for the pair itself."""
    image_NE, text_NE, logit_scale = (t.detach().double().requires_grad_() for t in inputs(args)[:3])
    normal = F.normalize(image_NE, dim=-1), F.normalize(text_NE, dim=-1), logit_scale.exp()
    x_NE, y_NE, scale = (t.detach() for t in normal)
    number_N, tiles = torch.arange(args.n, device=args.device), range(0, args.n, 512)
    sum_N = torch.cat([(scale * x_NE[t : t + 512] @ y_NE.T).logsumexp(1) for t in tiles])
    text_sum_N = torch.cat([(scale * y_NE[t : t + 512] @ x_NE.T).logsumexp(1) for t in tiles])
    dx_NE, dy_NE = torch.zeros_like(x_NE), torch.zeros_like(y_NE)
    for t in tiles:
        tile = slice(t, t + 512)
        score_CN = scale * x_NE[tile] @ y_NE.T
        d_CN = (score_CN - sum_N[tile, None]).exp() + (score_CN - text_sum_N).exp()
        d_CN[number_N[: len(d_CN)], number_N[tile]] -= 2
        dx_NE[tile] = scale / args.n * d_CN @ y_NE
        dy_NE += scale / args.n * d_CN.T @ x_NE[tile]
    torch.autograd.backward(normal, [dx_NE, dy_NE, (dx_NE * x_NE).sum() / scale])
    torch.save({"gradients": [t.grad.cpu() for t in (image_NE, text_NE, logit_scale) if t.grad is not None]}, paths[0])


# --- processes that send ---------------------------------------------------------------------------------------------


def in_ranks(args: argparse.Namespace, paths: list[Path], case: str) -> None:
    own_network()
    store = f"file://{paths[0].parent}/store-{os.getpid()}"
    calls = [(one_rank, (args, paths, case, rank, store)) for rank in range(len(paths))]
    in_processes(multiprocessing.get_context("fork"), calls)


def one_rank(args: argparse.Namespace, paths: list[Path], case: str, rank: int, store: str) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # open_clip's gather is deprecated
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=len(paths))
    measure(args, paths, case, rank)
    dist.barrier()
    dist.destroy_process_group()


def own_network() -> None:
    """A loopback interface for this process and its children alone, where it may have one."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if ctypes.CDLL(None).unshare(CLONE_NEWNET) == 0:
        with socket.socket() as any_socket:
            fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", IFF_UP))


def bytes_sent() -> int:
    """By all ranks up to here."""
    if not dist.is_initialized():
        return 0
    dist.barrier()
    (line,) = (line for line in Path("/proc/self/net/dev").read_text().splitlines() if line.lstrip().startswith("lo:"))
    dist.barrier()
    return int(line.split(":")[1].split()[8])


# --- what is printed -------------------------------------------------------------------------------------------------


def print_steps(args: argparse.Namespace, found: Rounds, reference: list[Tensor]) -> list[str]:
    """One process; gives the marks that are missed."""
    print(f"N {args.n}, width {args.dim}, {args.dtype}, {args.device}, threads: {torch.get_num_threads()}; ", end="")
    print(f"least of {args.rounds} rounds")
    print(f"{'':28}{'MB':>9}{'seconds':>9}{'CPU s':>9}   gradient error: image, text, scale")
    missed = []
    for ours, theirs in PEERS.items():
        wanted = reference if ours == "infonce" else gradients(found["siglip", 1])
        for case in (ours, theirs):
            figures = "".join(f"{least(found[case, 1], figure):9.2f}" for figure in ("memory", "time", "cpu"))
            print(f"{NAMES[case]:28}{figures}   {'' if case == 'siglip' else worded(errors(found[case, 1], wanted))}")
        ratios = {f: ratio(found[ours, 1], found[theirs, 1], f) for f in ("memory", "time", "cpu")}
        print(f"{'  ratio':28}" + "".join(f"{of_figure:9.3f}" for of_figure in ratios.values()))
        if ours == "infonce":
            missed += [figure for figure in ("memory", "time") if not ratios[figure] <= MARKS[figure]]
    return missed + missed_gradient(args, found, 1, reference)


def print_bytes(args: argparse.Namespace, found: Rounds, reference: list[Tensor]) -> list[str]:
    """Several processes; gives the marks that are missed."""
    print(f"{f'{args.ranks} processes':28}{'MB sent':>9}{'reckoned':>9}{'seconds':>9}   gradient error, as above")
    for case, sides in (("infonce", 1), ("clip", 2)):
        # In fp32, each rank sends its vectors of each side to all others, and to each what it owes of their gradients.
        reckoned = sides * 2 * (args.ranks - 1) * args.n * args.dim * 4 / 1e6
        runs = found[case, args.ranks]
        figures = f"{least(runs, 'bytes'):9.2f}{reckoned:9.2f}{least(runs, 'time'):9.2f}"
        print(f"{NAMES[case]:28}{figures}   {worded(errors(runs, reference))}")
    of_bytes = ratio(found["infonce", args.ranks], found["clip", args.ranks], "bytes")
    print(f"{'  ratio':28}{of_bytes:9.3f}")
    missed = [f"gradient in {args.ranks} processes"] if missed_gradient(args, found, args.ranks, reference) else []
    return missed + (["bytes"] if not of_bytes <= MARKS["bytes"] else [])


def missed_gradient(args: argparse.Namespace, found: Rounds, ranks: int, reference: list[Tensor]) -> list[str]:
    worst = max(errors(found["infonce", ranks], reference))
    return ["gradient"] if args.dtype == "fp32" and not worst < MARKS["gradient"] else []


def least(rounds: list[list[Found]], figure: str) -> float:
    """Over the rounds, of the rank that has most."""
    return min(max(rank[figure] for rank in ranks) for ranks in rounds)


def ratio(ours: list[list[Found]], theirs: list[list[Found]], figure: str) -> float:
    """Not a number where theirs is too small to be seen."""
    return least(ours, figure) / (least(theirs, figure) or math.nan)


def gradients(rounds: list[list[Found]]) -> list[Tensor]:
    """Those that DistributedDataParallel would give: the mean of the ranks'."""
    ranks = rounds[0]
    parts = zip(*(rank["gradients"] for rank in ranks), strict=True)
    return [torch.cat(part) / len(ranks) if part[0].ndim else torch.stack(part).mean() for part in parts]


def errors(rounds: list[list[Found]], wanted: list[Tensor]) -> list[float]:
    """Of the gradients of image, text and scale: the largest, as a part of the largest value."""
    pairs = zip(gradients(rounds)[:3], wanted[:3], strict=True)
    return [float((found - right).abs().max() / right.abs().max()) for found, right in pairs]


def worded(of_each: Iterable[float]) -> str:
    return " ".join(f"{one:.1e}" for one in of_each)


if __name__ == "__main__":
    main()
