"""A training on two hosts whose link is cut in the middle, on one machine.

    sudo .venv/bin/python scripts/two_hosts.py

Receives a strategy and a time to wait. Makes two network namespaces joined by a virtual link, each with a torchrun node
of one rank on the CPU, and trains tests/tiny.yaml for 30 steps: once unbroken, once with the link cut after step 15.
Gives exit code 0 if both sides then stop with an error that names the other within the time, and if the run, started
again when the link is back, has the losses of the unbroken one; else 1. Needs Linux and root: 77 where it may make no
namespaces. Leaves no process and no namespace behind.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS, CUT_AFTER, CHECKPOINT_EVERY = (20, 10), 15, 5
"""Of both stages; and of the run."""
GLOBAL_BATCH = 16
MOST = 1e-5
"""Relative difference of a loss from that of the unbroken run."""
SLACK = 15.0
"""Seconds beyond `stop_after` in which a busy machine must have printed the error."""
START = 300.0
"""Seconds for a run to start and to train; it takes a tenth of that."""
SKIPPED = 77


class Failed(Exception):
    """What was to be shown is not so."""


# --- two hosts and the link between them ----------------------------------------------------------------------------


@dataclass
class Host:
    name: str
    namespace: str
    link: str
    address: str


def ip(*arguments: str) -> str:
    """Raises CalledProcessError, with what `ip` says."""
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Their namespaces and the link for the block; afterwards none of it is there, nor any process in them."""
    number = os.getpid()
    hosts = [Host(f"node-{x}", f"mmgem-{number}-{x}", f"link-{x}", f"10.213.7.{n}") for n, x in enumerate("ab", 1)]
    try:
        for host in hosts:
            ip("netns", "add", host.namespace)
        a, b = hosts
        ip("link", "add", a.link, "netns", a.namespace, "type", "veth", "peer", "name", b.link, "netns", b.namespace)
        for host in hosts:
            ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", host.link)
            ip("-n", host.namespace, "link", "set", "lo", "up")
            ip("-n", host.namespace, "link", "set", host.link, "up")
        yield hosts
    finally:
        for host in hosts:
            if subprocess.run(["ip", "netns", "pids", host.namespace], capture_output=True).returncode == 0:
                end_processes(host)
                ip("netns", "delete", host.namespace)  # the link goes with it


def end_processes(host: Host) -> None:
    while pids := ip("netns", "pids", host.namespace).split():
        for pid in pids:
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def cut(hosts: Sequence[Host]) -> None:
    """All packets are lost in silence: each host sends to a hardware address that nobody has.

    An interface that goes down, or a packet filter that answers, would tell the programs; a broken switch does not.
    """
    for host, other in (hosts, hosts[::-1]):
        neighbour = ["neighbour", "replace", other.address, "lladdr", "02:00:00:00:00:99", "nud", "permanent"]
        ip("-n", host.namespace, *neighbour, "dev", host.link)


def bring_back(hosts: Sequence[Host]) -> None:
    for host, other in (hosts, hosts[::-1]):
        ip("-n", host.namespace, "neighbour", "delete", other.address, "dev", host.link)


# --- the run on them ------------------------------------------------------------------------------------------------


@dataclass
class Node:
    """torchrun on one host, and the lines that it and its rank print, with the time of each."""

    host: Host
    process: subprocess.Popen[str]
    lines: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip()))

    def wait(self, seconds: float) -> int:
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Failed(f"{self.host.name} does not end within {seconds:.0f} s:\n{self.text}") from None
        self.reader.join(5)
        return code

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines[-60:])


def start(hosts: Sequence[Host], arguments: Sequence[str], port: int) -> list[Node]:
    nodes = []
    for rank, host in enumerate(hosts):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        place = ["--node-rank", str(rank), "--master-addr", hosts[0].address, "--master-port", str(port)]
        # Namespaces of names, too, so that each has a host name of its own.
        inside = ["ip", "netns", "exec", host.namespace, "unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"']
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": host.link,
            "TP_SOCKET_IFNAME": host.link,
            "PYTHONUNBUFFERED": "1",
        }
        process = subprocess.Popen(
            [*inside, host.name, *torchrun, *place, str(REPOSITORY / "train.py"), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C is for this script, which ends them
        )
        nodes.append(Node(host, process))
    return nodes


def finish(nodes: Sequence[Node]) -> None:
    for node in nodes:
        if node.wait(START):
            raise Failed(f"{node.host.name} ended with {node.process.returncode}:\n{node.text}")


def wait_until(true: Callable[[], bool], nodes: Sequence[Node], what: str) -> None:
    end = time.monotonic() + START
    while not true():
        for node in nodes:
            if node.process.poll() is not None:
                raise Failed(f"{node.host.name} ended before {what}:\n{node.text}")
        if time.monotonic() > end:
            raise Failed(f"no {what} within {START:.0f} s:\n{nodes[0].text}")
        time.sleep(0.002)


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


# --- what is shown --------------------------------------------------------------------------------------------------


def show_stop(nodes: Sequence[Node], cut_at: float, stop_after: float) -> None:
    """Both sides end, each with an error that names the other. Raises Failed."""
    for rank, node in enumerate(nodes):
        other = f"rank {1 - rank} (host {nodes[1 - rank].host.name})"
        code = node.wait(stop_after + SLACK + 60)  # torchrun takes its time after its rank
        errors = [(at, line) for at, line in node.lines if line.startswith("mmgem: error:")]
        if not code or not errors:
            raise Failed(f"{node.host.name} ended with {code}, and with no error of mmgem:\n{node.text}")
        at, error = errors[0]
        print(f"{node.host.name}, {at - cut_at:.1f} s after the cut: {error}", flush=True)
        if other not in error:
            raise Failed(f"the error does not name {other}")
        if at - cut_at > stop_after + SLACK:
            raise Failed(f"that is more than {stop_after:g} s")
        if not any("exitcode" in line and " 75 " in line for _, line in node.lines):
            raise Failed(f"its exit code is not 75:\n{node.text}")


def show_same_losses(run: Path, unbroken: Path) -> None:
    """Raises Failed."""
    ours, theirs = read_lines(run / "log.jsonl"), read_lines(unbroken / "log.jsonl")
    steps = list(range(1, sum(STEPS) + 1))
    if [line["step"] for line in ours] != steps or [line["step"] for line in theirs] != steps:
        raise Failed(f"not {len(steps)} steps: {len(ours)} and {len(theirs)}")
    if read_lines(run / "keys.jsonl") != read_lines(unbroken / "keys.jsonl"):
        raise Failed("the runs read other samples (keys.jsonl)")
    largest = 0.0
    for one, other in zip(ours, theirs, strict=True):
        for name in (name for name in other if name.startswith("loss") and other[name]):
            largest = max(largest, abs(one[name] / other[name] - 1))
    print(f"losses of {len(steps)} steps, largest relative difference from the unbroken run: {largest:.3g}", flush=True)
    if not largest < MOST:
        raise Failed(f"that is not below {MOST:g}")


def show(hosts: Sequence[Host], work: Path, settings: Sequence[str], stop_after: float) -> None:
    """Raises Failed."""
    data = work / "data"
    prepare = ["data", "prepare", "scenes", "--out", str(data), "--train", "96", "--val", "24", "--test", "24"]
    subprocess.run([sys.executable, "-m", "mmgem.cli", *prepare, "--size", "64"], check=True, cwd=REPOSITORY)
    samples = [f"stages.{number}.samples={steps * GLOBAL_BATCH}" for number, steps in enumerate(STEPS)]
    watch = [f"training.late_after={stop_after / 3:.3g}", f"training.stop_after={stop_after:g}"]
    often = f"training.checkpoint_every={CHECKPOINT_EVERY}"
    common = [f"data.path={data}", *samples, *watch, often, "training.log_keys=true", *settings]
    config = ["--config", str(REPOSITORY / "tests/tiny.yaml"), "--resume", "auto"]
    unbroken, run = work / "unbroken", work / "run"

    print("unbroken run", flush=True)
    finish(start(hosts, [*config, f"run={unbroken}", *common], 29500))

    print(f"run whose link is cut after step {CUT_AFTER}", flush=True)
    nodes = start(hosts, [*config, f"run={run}", *common], 29501)
    log = run / "log.jsonl"
    wait_until(lambda: log.is_file() and log.read_bytes().count(b"\n") >= CUT_AFTER, nodes, f"step {CUT_AFTER}")
    cut(hosts)
    cut_at = time.monotonic()
    show_stop(nodes, cut_at, stop_after)
    reached = len(read_lines(log))
    if not CUT_AFTER <= reached < sum(STEPS):
        raise Failed(f"the link was cut too late: the run had come to step {reached}")
    kept = sorted(file.name for file in (run / "checkpoints").iterdir())
    print(f"the log ends with step {reached}; checkpoints: {', '.join(kept)}", flush=True)

    print("the link is back, both start again", flush=True)
    bring_back(hosts)
    finish(start(hosts, [*config, f"run={run}", *common], 29502))
    show_same_losses(run, unbroken)


def why_not() -> str | None:
    """What keeps this machine from having namespaces."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs Linux and root"
    missing = [tool for tool in ("ip", "unshare", "hostname") if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)} (of iproute2, util-linux, hostname)"
    try:
        with two_hosts():
            return None
    except subprocess.CalledProcessError as error:
        return f"no namespaces: {error.stderr.strip()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--strategy", default="deepspeed_2", help="training.strategy (default deepspeed_2)")
    parser.add_argument("--stop-after", type=float, default=15.0, metavar="SECONDS", help="training.stop_after (15)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep data and both runs here (default: nowhere)")
    parser.add_argument("settings", nargs="*", metavar="key.path=value", help="more settings of both runs")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if reason := why_not():
        print(f"skipped: {reason}")
        return SKIPPED
    work = args.out or Path(tempfile.mkdtemp(prefix="two-hosts-"))
    try:
        with two_hosts() as hosts:
            show(hosts, work.resolve(), [f"training.strategy={args.strategy}", *args.settings], args.stop_after)
    except Failed as error:
        print(f"failed: {error}")
        return 1
    except subprocess.CalledProcessError as error:
        print(f"failed: {error} {error.stderr or ''}")
        return 1
    finally:
        if args.out is None:
            shutil.rmtree(work, ignore_errors=True)
    print("passed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
