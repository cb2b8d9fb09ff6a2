"""The launch files under docker/: linted, of one mind with the code and the config, and slurm.sbatch run for real.

The script runs with real torchruns and ranks over gloo; only Slurm's commands are stand-ins. That they do what Slurm
22.05 does was seen on a cluster: scancel --signal reaches every process of a step and not the batch script; a preempted
job with a grace time gets SIGTERM in its step only; srun ends with the highest exit code of its tasks.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tiny import Tiny, read_lines
from torch.distributed.run import get_args_parser

from mmgem.cli import COMMANDS, _parse
from mmgem.config import load_config

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
PAGE = ROOT / "docs" / "multinode.md"
BIN = Path(sys.executable).parent
DEFAULT = "configs/stage1_vit_l14_tinyllama.yaml"


# --- linters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "hadolint --config docker/hadolint.yaml docker/Dockerfile",
        "shellcheck docker/slurm.sbatch",
        "yamllint --strict --config-file docker/yamllint.yaml docker",
        "check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml",
        "kubernetes-validate --strict docker/kubernetes.yaml",
    ],
)
def test_a_linter_finds_nothing(command: str):
    name, *arguments = command.split()
    done = subprocess.run([BIN / name, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_pods_of_the_pytorchjob_are_valid():
    """Its own schema is a cluster's; that of its pods is Kubernetes's."""
    from kubernetes_validate import latest_version, validate

    for replica in manifest("pytorchjob.yaml")["spec"]["pytorchReplicaSpecs"].values():
        kind = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "mmgem"}}
        validate(kind | {"template": replica["template"]}, latest_version(), strict=True)


# --- of one mind ----------------------------------------------------------------------------------------------------


def manifest(name: str) -> dict[str, Any]:
    """The file's last document."""
    return list(yaml.safe_load_all((DOCKER / name).read_text()))[-1]


def pods() -> dict[str, dict[str, Any]]:
    job, kubeflow = manifest("kubernetes.yaml"), manifest("pytorchjob.yaml")
    replicas = kubeflow["spec"]["pytorchReplicaSpecs"]
    return {
        "kubernetes": job["spec"]["template"]["spec"],
        "master": replicas["Master"]["template"]["spec"],
        "worker": replicas["Worker"]["template"]["spec"],
    }


def launches() -> dict[str, list[str]]:
    """File -> the arguments of docker/launch.py in it, with what outside variables default to."""
    compose = manifest("compose.yaml")["services"]["train"]["command"]
    script = (DOCKER / "slurm.sbatch").read_text()
    started = re.search(r"\"\$python\" docker/launch\.py(.*?--resume auto)", script, re.S)
    default = re.search(r"set -- (--config .*)", script)
    assert started and default
    slurm = started[1].replace("\\\n", " ").replace('"$@"', default[1]).replace('"', "").split()
    found = {"compose": compose, "slurm": slurm} | {n: pod["containers"][0]["args"] for n, pod in pods().items()}
    return {name: [outside(argument) for argument in arguments] for name, arguments in found.items()}


def outside(text: str) -> str:
    text = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", text)
    numbers = {"node-rank": "0", "nnodes": "2", "master-port": "29500", "master-addr": "node0"}
    return re.sub(r"--([\w-]+)=\$.*", lambda m: f"--{m[1]}={numbers[m[1]]}", text)


def mmgem_arguments(command: str, arguments: list[str]) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    COMMANDS[command][1](parser)
    return _parse(parser, arguments)


def torchrun_of(name: str) -> Any:
    if "--shutdown-timeout" not in get_args_parser().format_help():
        pytest.skip("the torch here is older than the image's")
    return get_args_parser().parse_args(launches()[name])


@pytest.mark.parametrize("name", ["compose", "slurm", "kubernetes", "master", "worker"])
def test_torchrun_and_mmgem_accept_the_arguments(name: str):
    torchrun = torchrun_of(name)
    assert (ROOT / torchrun.training_script).is_file()
    train = mmgem_arguments("train", torchrun.training_script_args)
    assert train.config == DEFAULT and train.resume == "auto"
    load_config(ROOT / train.config, train.overrides)


@pytest.mark.parametrize("file", sorted([*DOCKER.iterdir(), PAGE]), ids=lambda f: f.name)
def test_named_files_exist(file: Path):
    named = re.findall(r"(?<![\w/.])(?:configs/|docker/[^d]|docs/|mmgem/|tests/)[\w./-]*\w", file.read_text())
    assert not [name for name in named if not (ROOT / name).exists()]


def test_pods_may_take_as_long_as_torchrun_waits():
    for name, pod in pods().items():
        assert torchrun_of(name).shutdown_timeout < pod["terminationGracePeriodSeconds"]
    compose = manifest("compose.yaml")["services"]["train"]
    assert torchrun_of("compose").shutdown_timeout < 600 and compose["stop_grace_period"] == "10m"


def test_a_job_has_as_many_pods_as_torchrun_waits_for():
    job, kubeflow = manifest("kubernetes.yaml")["spec"], manifest("pytorchjob.yaml")["spec"]["pytorchReplicaSpecs"]
    nodes = {name: torchrun_of(name).nnodes for name in pods()}
    assert int(nodes["kubernetes"]) == job["completions"] == job["parallelism"]
    assert int(nodes["master"]) == int(nodes["worker"]) == sum(r["replicas"] for r in kubeflow.values())


def test_no_container_is_root_or_writes_to_the_data():
    assert "../data}:/app/data:ro" in (DOCKER / "compose.yaml").read_text()
    for pod in pods().values():
        mounts = {mount["name"]: mount for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts["data"]["readOnly"] and mounts["configs"]["readOnly"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    for stage in re.split(r"^FROM ", (DOCKER / "Dockerfile").read_text(), flags=re.M)[1:]:
        users = re.findall(r"^USER (.*)$", stage, re.M)
        assert " AS packages\n" in stage or int(users[-1]) > 0


def test_what_the_dockerfile_copies_exists_and_is_not_ignored():
    allowed = [line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    for line in re.findall(r"^COPY (?!--from)(.*)$", (DOCKER / "Dockerfile").read_text(), re.M):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists() and source in allowed, source


# --- locked versions ------------------------------------------------------------------------------------------------


def locked() -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)", (DOCKER / "requirements.lock").read_text(), re.M))


def test_the_lock_satisfies_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"--extra (\w+)", (DOCKER / "requirements.lock").read_text())
    assert {"log", "s3"} <= set(extras)
    lines = [*project["dependencies"], *(line for name in extras for line in project["optional-dependencies"][name])]
    pins = locked()
    for requirement in map(Requirement, lines):
        pin = pins.get(canonicalize_name(requirement.name), "")
        assert pin and requirement.specifier.contains(pin), (
            f"{requirement}: docker/requirements.lock has {pin or 'none'}; make it anew by the command in its head"
        )


def test_every_locked_package_has_a_hash():
    blocks = re.findall(r"^[\w.-]+==.*\n(.*)$", (DOCKER / "requirements.lock").read_text(), re.M)
    assert len(blocks) == len(locked()) and all("--hash=sha256:" in first for first in blocks)


def test_the_image_has_the_cuda_of_the_locked_torch():
    image = re.search(r"^ARG CUDA=(\d+\.\d+)", (DOCKER / "Dockerfile").read_text(), re.M)
    assert image and locked()["cuda-toolkit"].startswith(image[1] + ".")


# --- the page -------------------------------------------------------------------------------------------------------


def commands_of_page() -> list[str]:
    """Each command of the page's sh blocks, its lines joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert blocks
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("command", commands_of_page())
def test_a_command_of_the_page_is_right(command: str):
    checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    words = [outside(word) for word in re.sub(r"\s#.*", "", command).split()]
    if "torchrun" in words:
        torchrun = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
        words = ["mmgem", "train", *torchrun.training_script_args]
    elif "docker/slurm.sbatch" in words:
        words = ["mmgem", "train", *words[words.index("docker/slurm.sbatch") + 1 :]]
    elif "compose" in words and "mmgem" in words:
        words = words[words.index("mmgem") :]
    if words[0] == "mmgem":
        arguments = mmgem_arguments(words[1], words[2:])
        if "config" in arguments:
            load_config(ROOT / arguments.config, arguments.overrides)


# --- the Slurm script, run ------------------------------------------------------------------------------------------

TRAIN = '''
"""Steps like the trainer's: a signal finishes the step, saves, ends with 128 + its number; a second one is an error."""
import os, signal, sys, time

options = dict(word.split("=") for word in sys.argv[1:] if "=" in word)
assert sys.argv[-2:] == ["--resume", "auto"] and "--config" in sys.argv
if "code" in options:
    sys.exit(int(options["code"]))
import torch
import torch.distributed as dist

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
asked = []
def ask(number, frame):
    if asked:
        os._exit(99)
    asked.append(number)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, ask)
dist.init_process_group("gloo")
begun = int(open("checkpoint").read()) if os.path.exists("checkpoint") else 0
print(f"rank {rank} of {world} begins at {begun}", flush=True)
if options.get("lost") == str(rank):
    os.kill(os.getpid(), signal.SIGKILL)
if options.get("refuses") == str(rank):
    sys.exit(2)
for step in range(begun, int(options.get("steps", 2000))):
    time.sleep(0.02)
    number = torch.tensor([asked[0] if asked else 0])
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    if number:
        if rank == 0:
            time.sleep(0.5)
            open("checkpoint", "w").write(str(step + 1))
        dist.barrier()
        dist.destroy_process_group()
        sys.exit(128 + int(number))
dist.destroy_process_group()
'''

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_NODEID=$node "$@" & pids+=($!)
done
echo "${pids[@]}" >"$STAND_INS/step"
for pid in "${pids[@]}"; do
    wait "$pid"; code=$?
    [ "$code" -le "${highest:-0}" ] || highest=$code
done
exit "${highest:-0}"
"""

SCONTROL = """#!/bin/bash
case $1 in
    show) echo 127.0.0.1 ;;
    requeue) echo "$2" >>"$STAND_INS/requeued" ;;
esac
"""

SCANCEL = f"""#!{sys.executable}
import os, pathlib, signal, sys
import psutil
number = getattr(signal, "SIG" + sys.argv[1].removeprefix("--signal="))
for task in pathlib.Path(os.environ["STAND_INS"], "step").read_text().split():
    task = psutil.Process(int(task))
    for process in [task, *task.children(recursive=True)]:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            pass
"""


class Slurm:
    """A job of two nodes with one rank each, submitted from a folder of its own."""

    def __init__(self, folder: Path):
        self.folder, self.stand_ins, self.log = folder, folder / "bin", folder / "log"
        (folder / "docker").mkdir(parents=True)
        for name in ("launch.py", "slurm.sbatch"):
            shutil.copy(DOCKER / name, folder / "docker")
        (folder / "train.py").write_text(TRAIN)
        self.stand_ins.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
            (self.stand_ins / name).write_text(text)
            (self.stand_ins / name).chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{self.stand_ins}:{os.environ['PATH']}",
            "STAND_INS": str(self.stand_ins),
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "SLURM_SUBMIT_DIR": str(folder),
            "SLURM_JOB_ID": str(10_000 + free_port() - 20_000),
            "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_NNODES": "2",
            "SLURM_CPUS_ON_NODE": "1",
            "SLURM_GPUS_ON_NODE": "1",
        }
        self.running: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str, until: str = "rank 0 of 2 begins") -> None:
        """Until the log says so."""
        self.log.write_text("")
        with self.log.open("ab") as log:
            command = ["bash", "docker/slurm.sbatch", "--config", "FILE", *arguments]
            self.running = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        self.wait_for(lambda: until in self.log.read_text())

    def wait_for(self, reached: Any) -> None:
        assert self.running is not None
        end = time.monotonic() + 240
        while not reached():
            going = self.running.poll() is None and time.monotonic() < end
            assert going or reached(), self.log.read_text()
            time.sleep(0.05)

    def run(self, *arguments: str) -> int:
        self.start(*arguments, until="")
        return self.end()

    def end(self) -> int:
        assert self.running is not None
        return self.running.wait(timeout=240)

    def to_script(self, number: int) -> None:
        """What `#SBATCH --signal=B:…` does."""
        assert self.running is not None
        self.running.send_signal(number)

    def to_step(self, name: str) -> None:
        """What a preemption with a grace time does."""
        subprocess.run([self.stand_ins / "scancel", f"--signal={name}"], env=self.environment, check=True)

    @property
    def requeued(self) -> int:
        file = self.stand_ins / "requeued"
        jobs = file.read_text().split() if file.exists() else []
        assert set(jobs) <= {self.environment["SLURM_JOB_ID"]}
        return len(jobs)

    @property
    def saved(self) -> int:
        return int((self.folder / "checkpoint").read_text())

    def stop(self) -> None:
        if self.running is not None and self.running.poll() is None:
            self.to_step("KILL")
            self.running.kill()


def free_port() -> int:
    for port in range(20_000 + os.getpid() % 9_000, 30_000):
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no free port")


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    job = Slurm(tmp_path / "submitted")
    yield job
    job.stop()


def test_the_time_is_up_then_requeued_and_finished(slurm: Slurm):
    slurm.start()
    slurm.to_script(signal.SIGUSR1)
    assert slurm.end() == 0 and slurm.requeued == 1
    assert slurm.saved > 0 and "exit code 138" in slurm.log.read_text()

    slurm.start(f"steps={slurm.saved + 5}", until=f"begins at {slurm.saved}")
    assert slurm.end() == 0 and slurm.requeued == 1
    assert "mmgem: finished" in slurm.log.read_text()


def test_preempted_with_a_grace_time_is_requeued(slurm: Slurm):
    """No rank may be signalled twice, by Slurm and by torchrun: it would stop at once and save nothing."""
    slurm.start()
    slurm.to_step("TERM")
    assert slurm.end() == 0 and slurm.requeued == 1
    assert slurm.saved > 0 and "exit code 143" in slurm.log.read_text()


def test_cancelled_is_not_requeued(slurm: Slurm):
    slurm.start()
    slurm.to_script(signal.SIGTERM)
    slurm.to_step("TERM")
    assert slurm.end() == 143 and slurm.requeued == 0
    assert slurm.saved > 0


def test_bad_input_is_not_requeued(slurm: Slurm):
    slurm.environment["SLURM_NNODES"] = "1"
    assert slurm.run("code=2") == 2
    assert slurm.requeued == 0


def test_bad_input_on_one_node_is_not_requeued(slurm: Slurm):
    """The other node's ranks then fail in some other way."""
    assert slurm.run("refuses=1") == 2
    assert slurm.requeued == 0


def test_late_ranks_are_requeued_but_not_for_ever(slurm: Slurm):
    slurm.environment["SLURM_NNODES"] = "1"
    for before in (0, 1):
        assert slurm.run("code=75") == 0 and slurm.requeued == before + 1
    assert slurm.run("code=75") == 75 and slurm.requeued == 2


def test_a_lost_rank_is_requeued(slurm: Slurm):
    assert slurm.run("lost=1") == 0
    assert slurm.requeued == 1 and "exit code 137" in slurm.log.read_text()


def test_submitted_from_elsewhere_is_refused(slurm: Slurm, tmp_path: Path):
    slurm.environment["SLURM_SUBMIT_DIR"] = str(tmp_path)
    assert slurm.run() == 2 and "submit from the repository's folder" in slurm.log.read_text()


@pytest.mark.slow
def test_the_trainer_itself_is_preempted_and_goes_on(slurm: Slurm, tiny: Tiny):
    shutil.copy(ROOT / "train.py", slurm.folder)
    config = slurm.folder / "FILE"
    shutil.copy(ROOT / "tests" / "tiny.yaml", config)
    run = slurm.folder / "run"
    settings = [
        f"run={run}",
        f"data.path={tiny.data}",
        "stages.1=null",
        "stages.0.samples=1600",
        "training.sample_every=0",
    ]
    log = run / "log.jsonl"

    def steps() -> int:
        return log.read_text().count("\n") if log.is_file() else 0

    for before, stop in enumerate((lambda: slurm.to_step("TERM"), lambda: slurm.to_script(signal.SIGUSR1))):
        begun = steps()
        slurm.start(*settings, until="")
        slurm.wait_for(lambda begun=begun: steps() > begun + 2)
        stop()
        assert slurm.end() == 0 and slurm.requeued == before + 1, slurm.log.read_text()
        assert not (run / "model").exists() and steps() < 100

    assert slurm.run(*settings) == 0 and slurm.requeued == 2, slurm.log.read_text()
    assert (run / "model").is_dir() and [line["step"] for line in read_lines(log)] == list(range(1, 101))
    assert slurm.run(*settings, "stages.0.no_such_key=1") == 2 and slurm.requeued == 2


# --- in a pod -------------------------------------------------------------------------------------------------------


def test_a_pod_that_is_told_to_end_saves_first(tmp_path: Path):
    """There SIGTERM reaches torchrun only, which has to pass it on, once, and wait."""
    (tmp_path / "train.py").write_text(TRAIN)
    options = ["--standalone", "--nproc-per-node=2", "--shutdown-timeout=60"]
    command = [sys.executable, DOCKER / "launch.py", *options, "train.py", "--config", "FILE", "--resume", "auto"]
    with (tmp_path / "log").open("wb") as log:
        pod = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 240
        while "begins" not in (tmp_path / "log").read_text():
            assert pod.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.05)
        time.sleep(0.5)
        pod.terminate()
        assert pod.wait(timeout=60) == 143, (tmp_path / "log").read_text()
    finally:
        pod.terminate()
    assert int((tmp_path / "checkpoint").read_text()) > 0
