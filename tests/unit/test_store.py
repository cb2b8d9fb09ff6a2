"""Splits of URLs: the same samples as from the folder, whatever the net does; a cache that keeps its bound."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from helpers import sample, write_split
from web import WebServer, serve

from mmgem.data.cache import locked
from mmgem.data.index import read_index, write_index
from mmgem.data.remote import Remote
from mmgem.data.samples import SampleError
from mmgem.data.shards import ShardedDataset
from mmgem.data.store import RemoteStore, open_store
from mmgem.errors import UserError

COUNT, PER_SHARD = 12, 2
QUICK = Remote(retries=3, timeout=0.4, backoff=0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset whose split `train` has six shards."""
    root = tmp_path_factory.mktemp("dataset")
    write_split(root / "train", [sample(n) for n in range(COUNT)], PER_SHARD)
    return root


@pytest.fixture
def web(folder: Path) -> Iterator[WebServer]:
    with serve(folder) as server:
        yield server


@pytest.fixture(scope="module")
def s3_url(folder: Path) -> Iterator[str]:
    """The split in a bucket. Its server is found by AWS_ENDPOINT_URL, as a user would say it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        import boto3

        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket="photos")
        for path in (folder / "train").rglob("*.*"):
            client.upload_file(str(path), "photos", str(path.relative_to(folder)))
        yield "s3://photos/train"
    server.stop()


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "train").glob("*.tar")) // (COUNT // PER_SHARD)


def remote_split(url: str, cache: Path, gb: float = 1.0, remote: Remote = QUICK) -> ShardedDataset:
    return ShardedDataset(url, store=open_store(url, cache_dir=cache, cache_gb=gb, remote=remote))


def taken(cache: Path) -> int:
    """What the finished files of a cache have, in bytes; 0 where files came or went meanwhile: it would be the sum of
    files that were never there together."""
    before = {path.name for path in cache.iterdir()}
    try:
        total = sum((cache / name).stat().st_size for name in before if len(name) == 64)
    except FileNotFoundError:
        return 0
    return total if before == {path.name for path in cache.iterdir()} else 0


def tars_asked(web: WebServer) -> dict[str, int]:
    return {name: count for name, count in web.requests.items() if name.endswith(".tar")}


def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come about in 10 s")


def url_of(web: WebServer, service: str, patch: pytest.MonkeyPatch) -> str:
    """The split as the server of the web gives it, also if it is taken for one of S3."""
    for name, value in (("ENDPOINT_URL", web.url), ("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b")):
        patch.setenv(f"AWS_{name}", value)
    return "s3://train" if service == "s3" else f"{web.url}/train"


def test_a_split_of_a_url_gives_what_the_folder_gives(folder: Path, web: WebServer, tmp_path: Path):
    local, url = ShardedDataset(folder / "train"), f"{web.url}/train"
    dataset = remote_split(url, tmp_path)
    assert (dataset.name, dataset.checksum, dataset.totals) == (url, local.checksum, local.totals)
    assert dataset.remote and not local.remote
    assert [dataset.sample(i) for i in range(COUNT)] == [local.sample(i) for i in range(COUNT)]
    assert dataset.keys == local.keys and list(dataset.iter_texts()) == list(local.iter_texts())
    assert set(web.requests.values()) == {1} and len(web.requests) == 13  # an index, six shards, their members
    again = remote_split(f"{url}/", tmp_path)
    assert again.sample(COUNT - 1) == local.sample(COUNT - 1)
    assert {name for name, count in web.requests.items() if count > 1} == {"index.json"}
    assert dataset.store.exists("index.json") and not dataset.store.exists("broken.jsonl")


@pytest.mark.parametrize("service", ["http", "s3"])
@pytest.mark.parametrize(("method", "processes"), [("fork", 4), ("spawn", 2)])
def test_processes_fetch_each_shard_once_for_all(
    folder: Path, web: WebServer, tmp_path: Path, request: Any, service: str, method: str, processes: int
):
    url = f"{web.url}/train" if service == "http" else request.getfixturevalue("s3_url")
    wanted = [ShardedDataset(folder / "train").sample(i) for i in range(COUNT)]
    dataset = remote_split(url, tmp_path)
    dataset.sample(0)  # there is a connection now, which children must leave alone
    web.latency = 0.05
    order = [i for n in range(processes) for i in random.Random(n).sample(range(COUNT), COUNT)]
    with multiprocessing.get_context(method).Pool(processes) as pool:
        found = pool.starmap(ShardedDataset.sample, [(dataset, i) for i in order], chunksize=COUNT)
    assert found == [wanted[i] for i in order]
    assert [dataset.sample(i) for i in range(COUNT)] == wanted
    if service == "http":
        assert tars_asked(web) == {f"shard-{n:06d}.tar": 1 for n in range(6)}
    assert {path.suffix for path in tmp_path.iterdir()} == {""}  # neither locks nor partial files stay


def test_workers_of_a_data_loader_read_and_fetch_ahead(folder: Path, web: WebServer, tmp_path: Path):
    from torch.utils.data import DataLoader, Dataset

    class Keys(Dataset):
        def __init__(self, split: ShardedDataset):
            self.split = split

        def __len__(self) -> int:
            return len(self.split)

        def __getitem__(self, index: int) -> str:
            self.split.prefetch(range(6))
            return self.split.sample(index).key

    dataset = remote_split(f"{web.url}/train", tmp_path)
    dataset.prefetch([5])
    dataset.sample(0)
    for _ in range(2):
        loader = DataLoader(Keys(dataset), batch_size=3, num_workers=2)
        assert [key for batch in loader for key in batch] == ShardedDataset(folder / "train").keys
    assert set(tars_asked(web).values()) == {1}


def test_the_cache_keeps_its_bound_and_gives_up_what_was_longest_not_used(folder: Path, web: WebServer, tmp_path: Path):
    bound = 3.6 * size_of(folder)  # three shards with their members
    dataset = remote_split(f"{web.url}/train", tmp_path, bound / 1e9)
    (tmp_path / "mine.txt").write_bytes(b"x" * 9999)
    for index in (0, 2, 4):
        dataset.sample(index)
        assert taken(tmp_path) <= bound
        time.sleep(0.02)
    dataset.prefetch([0])  # said to be needed: shard 1 is now the one longest not used
    dataset.sample(6)
    assert taken(tmp_path) <= bound
    assert dataset.sample(1).key == "key001" and tars_asked(web)["shard-000000.tar"] == 1
    assert dataset.sample(3).key == "key003" and tars_asked(web)["shard-000001.tar"] == 2
    assert (tmp_path / "mine.txt").stat().st_size == 9999


def test_who_has_a_shard_open_can_read_it_after_it_gave_way(folder: Path, web: WebServer, tmp_path: Path):
    dataset = remote_split(f"{web.url}/train", tmp_path, 1.5 * size_of(folder) / 1e9)
    store, shards = dataset.store, dataset.shards
    first = store.open(shards[0])
    for shard in shards[1:]:
        store.open(shard).close()
    assert os.fstat(first.fileno()).st_nlink == 0
    assert first.readall() == (folder / "train" / shards[0].path).read_bytes()
    for index in (2, 0, 2, 0):  # the dataset closes what gave way, and fetches it again
        assert dataset.sample(index).key == f"key{index:03d}"
    held = [os.fstat(file.fileno()).st_nlink for file, _ in dataset._opened.values()]
    assert held.count(0) <= 1


def read_in_a_small_cache(dataset: ShardedDataset, seed: int) -> bool:
    order = random.Random(seed).choices(range(COUNT), k=25)
    return [dataset.sample(i).key for i in order] == [f"key{i:03d}" for i in order]


def test_many_readers_of_a_cache_for_two_shards_read_right_and_it_keeps_its_bound(
    folder: Path, web: WebServer, tmp_path: Path
):
    bound = 2.1 * size_of(folder)
    dataset = remote_split(f"{web.url}/train", tmp_path, bound / 1e9)
    dataset.store.open(dataset.shards[0]).close()
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            most.append(taken(tmp_path))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.starmap(read_in_a_small_cache, [(dataset, seed) for seed in range(4)], chunksize=1)
    done.set()
    watcher.join()
    assert found == [True] * 4 and 0 < max(most) <= bound


def test_a_lock_is_held_by_one_at_a_time(tmp_path: Path):
    inside, most = [0], [0]

    def work() -> None:
        for _ in range(300):
            with locked(tmp_path / "a.lock"):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0)
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and list(tmp_path.iterdir()) == []
    waiting = threading.Thread(target=work)
    with locked(tmp_path / "a.lock"):
        waiting.start()
        time.sleep(0.1)
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        child.start()  # it has the lock's file open
    until(lambda: not waiting.is_alive())
    child.kill()
    child.join()


def test_a_shard_larger_than_the_cache_is_refused(folder: Path, web: WebServer, tmp_path: Path):
    dataset = remote_split(f"{web.url}/train", tmp_path, size_of(folder) / 2e9)
    with pytest.raises(UserError, match=r"train/shard-000000\.tar has .* GB.*shard_cache_gb"):
        dataset.sample(0)
    assert tars_asked(web) == {}


def test_prefetch_fetches_before_anything_is_read(folder: Path, web: WebServer, tmp_path: Path):
    dataset = remote_split(f"{web.url}/train", tmp_path)
    dataset.prefetch([4, 1, 2])
    dataset.prefetch([4, 1, 2])
    until(lambda: len(list(tmp_path.glob("?" * 64))) == 6)
    assert tars_asked(web) == {f"shard-{n:06d}.tar": 1 for n in (4, 1, 2)}
    web.faults.update({path.name: [500] * 99 for path in (folder / "train").rglob("*.*")})
    assert [dataset.sample(i).key for i in (2, 3, 4, 5, 8)] == ["key002", "key003", "key004", "key005", "key008"]


def test_prefetch_leaves_what_is_in_use_and_is_silent_about_errors(folder: Path, web: WebServer, tmp_path: Path, capfd):
    dataset = remote_split(f"{web.url}/train", tmp_path, 2.4 * size_of(folder) / 1e9)
    dataset.sample(0)
    web.faults["shard-000001.tar"] = [404]
    dataset.prefetch([1])
    until(lambda: web.requests["shard-000001.tar"] == 1)
    dataset.prefetch([2, 3, 4])  # there is room for one beside shard 0
    until(lambda: threading.active_count() <= 4 or not any(t.name == "shards ahead" for t in threading.enumerate()))
    assert len(tars_asked(web)) <= 3
    assert dataset.sample(1).key == "key001" and tars_asked(web)["shard-000000.tar"] == 1
    assert dataset.sample(2).key == "key002"
    assert capfd.readouterr() == ("", "")


def test_prefetch_goes_on_after_errors_and_in_a_forked_process(web: WebServer, tmp_path: Path):
    dataset = remote_split(f"{web.url}/train", tmp_path, remote=Remote())
    names = [f"shard-{n:06d}.tar" for n in range(6)]
    web.faults.update({name: [404] for name in names[:5]})
    dataset.prefetch(range(5))
    until(lambda: all(web.requests[name] for name in names[:5]))
    dataset.prefetch([5])
    until(lambda: web.requests[names[5]] == 1)
    busy = remote_split(f"{web.url}/train", tmp_path / "other", remote=Remote())
    web.faults.update({name: [("hang", 0)] for name in names[:4]})
    busy.prefetch(range(4))  # as many as are fetched at a time
    until(lambda: sum(web.requests.values()) == 2 + 6 + 6 + 4 + 4)
    child = multiprocessing.get_context("fork").Process(target=lambda: (busy.prefetch([5]), time.sleep(20)))
    child.start()
    until(lambda: web.requests[names[5]] == 2)
    child.kill()
    child.join()


@pytest.mark.timeout(30)  # s3fs's own time-outs are longer
@pytest.mark.parametrize("service", ["http", "s3"])
@pytest.mark.parametrize("fault", [("drop", 70), ("drop", 0), ("hang", 70), 500, 503, 429])
def test_what_may_pass_is_tried_again(
    folder: Path, web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, service: str, fault: Any
):
    url = url_of(web, service, monkeypatch)
    web.faults["shard-000000.tar"] = [fault] * 2
    web.faults["000000.json"] = [fault]
    dataset = remote_split(url, tmp_path, remote=Remote(retries=3, timeout=0.4, backoff=0.01))
    assert dataset.sample(1) == ShardedDataset(folder / "train").sample(1)
    assert web.requests["shard-000000.tar"] == 3 and web.requests["000000.json"] == 2


@pytest.mark.parametrize("service", ["http", "s3"])
@pytest.mark.parametrize(
    ("fault", "last"), [(503, "503|Unavail"), (("hang", 0), "imeout"), (("drop", 9), "payload|onnect")]
)
def test_what_does_not_pass_is_given_up_with_a_clear_error(
    web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, service: str, fault: Any, last: str
):
    web.faults["shard-000000.tar"] = [fault] * 99
    url = url_of(web, service, monkeypatch)
    dataset = remote_split(url, tmp_path, remote=Remote(retries=3, timeout=0.4, backoff=0.01))
    with pytest.raises(UserError, match=rf"{url}/shard-000000\.tar, tried 4 times: .*({last})") as caught:
        dataset.sample(0)
    assert "\n" not in str(caught.value) and web.requests["shard-000000.tar"] == 4
    assert [path.name for path in tmp_path.iterdir() if len(path.name) != 64] == []


@pytest.mark.parametrize(("fault", "message"), [(404, "no such file"), (403, "not allowed"), (400, "mistake")])
def test_what_will_not_pass_is_an_error_at_once(web: WebServer, tmp_path: Path, fault: int, message: str):
    web.faults["shard-000000.tar"] = [fault]
    dataset = remote_split(f"{web.url}/train", tmp_path)
    with pytest.raises(UserError, match=rf"{message}.*{web.url}/train/shard-000000\.tar|{web.url}.*{message}"):
        dataset.sample(0)
    assert web.requests["shard-000000.tar"] == 1
    with pytest.raises(UserError, match=rf"no such file: {web.url}/none/index\.json"):
        remote_split(f"{web.url}/none", tmp_path)


def test_nobody_listens(tmp_path: Path):
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/x/index\.json, tried 4 times: .*onnect"):
        remote_split("http://127.0.0.1:9/x", tmp_path)


def test_other_bytes_are_fetched_once_more_and_then_the_shards_fault(folder: Path, web: WebServer, tmp_path: Path):
    whole = (folder / "train" / "shard-000000.tar").read_bytes()
    other = b"?" + whole[1:]
    web.faults["shard-000000.tar"] = [other]
    dataset = remote_split(f"{web.url}/train", tmp_path)
    assert dataset.sample(0).key == "key000"  # the way was at fault
    for number, (content, reason) in enumerate(
        [(other, "another checksum"), (whole[:-512], "cut short"), (whole + b"\0" * 512, "changed")], start=1
    ):
        name = f"shard-{number:06d}.tar"
        web.faults[name] = [content] * 2
        for index in (2 * number, 2 * number + 1):
            with pytest.raises(SampleError, match=reason) as caught:
                dataset.sample(index)
            assert caught.value.shard == f"{web.url}/train/{name}"
        assert web.requests[name] == 2


def test_what_somebody_cut_in_the_cache_is_fetched_again(web: WebServer, tmp_path: Path):
    dataset = remote_split(f"{web.url}/train", tmp_path)
    first = dataset.sample(0)
    for path in tmp_path.iterdir():
        os.truncate(path, 100)
    assert remote_split(f"{web.url}/train", tmp_path).sample(0) == first
    assert web.requests["shard-000000.tar"] == web.requests["000000.json"] == 2


def test_a_killed_download_leaves_nothing_that_is_taken_for_whole(folder: Path, web: WebServer, tmp_path: Path):
    bound = 1.5 * size_of(folder) / 1e9
    dataset = remote_split(f"{web.url}/train", tmp_path, bound, Remote())
    web.pause = 0.2
    child = multiprocessing.get_context("fork").Process(target=dataset.sample, args=(0,))
    child.start()
    until(lambda: any(tmp_path.glob("*.partial")) and web.requests["shard-000000.tar"] == 1)
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    web.pause = 0.0
    assert not [path for path in tmp_path.iterdir() if path.name == dataset.shards[0].sha256]
    assert dataset.sample(2).key == "key002"  # there is room for it: what the dead one had taken is free
    assert list(tmp_path.glob("*.partial")) == []
    assert dataset.sample(0) == ShardedDataset(folder / "train").sample(0)


def test_a_bucket(folder: Path, s3_url: str, tmp_path: Path):
    local, dataset = ShardedDataset(folder / "train"), remote_split(s3_url, tmp_path)
    assert [dataset.sample(i) for i in range(COUNT)] == [local.sample(i) for i in range(COUNT)]
    with pytest.raises(UserError, match="no such file: s3://photos/none/index.json"):
        remote_split("s3://photos/none", tmp_path)
    with pytest.raises(UserError, match="no such file: s3://none/index.json"):
        remote_split("s3://none", tmp_path)


def test_no_credentials_and_missing_packages_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match="not allowed to read s3://photos/train/index.json.*credentials"):
        remote_split("s3://photos/train", tmp_path, remote=Remote())
    with pytest.raises(UserError, match="cannot read nonsense://x/index.json"):
        remote_split("nonsense://x", tmp_path)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gs://b/index\.json.*pip install 'mmgem\[gs\]'"):
        remote_split("gs://b", tmp_path)


def test_an_index_may_name_shards_that_lie_elsewhere(folder: Path, web: WebServer, tmp_path: Path):
    local = ShardedDataset(folder / "train")
    index = read_index(local.store)
    places = [f"{web.url}/train/shard-000000.tar", str(folder / "train" / "shard-000001.tar"), "../shard-000002.tar"]
    for number, place in enumerate(places):
        object.__setattr__(index.shards[number], "path", place)
    here = tmp_path / "set" / "train"
    for file in (folder / "train" / "members").iterdir():
        (here / "members").mkdir(parents=True, exist_ok=True)
        (here / "members" / file.name).write_bytes(file.read_bytes())
    for place, number in ((here.parent, 2), (here, 3), (here, 4), (here, 5)):
        name = f"shard-{number:06d}.tar"
        (place / name).write_bytes((folder / "train" / name).read_bytes())
    write_index(here, index)
    for path in here.parent.rglob("*.*"):
        MemoryFileSystem().pipe(f"/set/{path.relative_to(here.parent)}", path.read_bytes())
    for url in (str(here), f"file://{here}", "memory://set/train"):
        dataset = remote_split(url, tmp_path / "cache")
        assert dataset.remote and isinstance(dataset.store, RemoteStore) == ("://" in url)
        assert [dataset.sample(i) for i in range(COUNT)] == [local.sample(i) for i in range(COUNT)]
    assert tars_asked(web) == {"shard-000000.tar": 1}
    os.truncate(here / "shard-000005.tar", 512)
    with pytest.raises(SampleError, match=r"shard file://.*/shard-000005\.tar: shard cut short"):
        remote_split(f"file://{here}", tmp_path / "new").sample(COUNT - 1)


def test_the_cache_is_in_the_users_folder_unless_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert RemoteStore("http://x").cache.folder == tmp_path / "mmgem" / "shards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/a")
    assert str(RemoteStore("http://x").cache.folder) == "/home/a/.cache/mmgem/shards"
    (tmp_path / "file").touch()
    with serve(tmp_path) as web, pytest.raises(UserError, match=r"cannot keep shards in .*file/x.*shard_cache"):
        write_split(tmp_path / "train", [sample(1)])
        remote_split(f"{web.url}/train", tmp_path / "file" / "x").sample(0)
