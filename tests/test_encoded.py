"""Encoded folders: read as they were written, of any size, at any place, damaged."""
import json
import os
import pickle
import shutil
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import prepare
from conftest import encode
from files.encoded import places, read_encoded, write_index
from mimi import Mimi
from test_prepare import small_world


def test_an_encoded_folder_may_be_moved(world, tmp_path):
    """With the whole checkout, or alone."""
    (tmp_path / "checkout/out").mkdir(parents=True)
    shutil.copy(world / "codec.pt", tmp_path / "checkout/out/codec.pt")
    folder = small_world(world, tmp_path / "checkout", 4)
    prepare.encode(str(folder), str(tmp_path / "checkout/out/codec.pt"), "bpe", 300, 1, 0.0, False, 1, "cpu")
    assert str(tmp_path) not in (folder / "encoded/meta.json").read_text()
    (tmp_path / "checkout").rename(tmp_path / "elsewhere")
    data = read_encoded(str(tmp_path / "elsewhere/toy/encoded"))
    assert len(data) == 4 and Mimi.load(data.meta["codec"]).config.codebooks == data.meta["codebooks"]
    (tmp_path / "elsewhere/toy/encoded").rename(tmp_path / "alone")
    shutil.rmtree(tmp_path / "elsewhere")
    data = read_encoded(str(tmp_path / "alone"))
    assert Mimi.load(data.meta["codec"]).config == Mimi.load(str(world / "codec.pt")).config
    assert len(data.codes(data.line(0)["turns"][0]["copies"][0]))


def test_what_is_read_is_what_was_encoded(world, tmp_path, monkeypatch):
    """From two folders with three shards and one, by threads, and after a pickle."""
    monkeypatch.setattr(prepare, "SHARD", 4)
    folder = small_world(world, tmp_path)
    encode(folder, world, name=str(world / "toy/encoded"))
    folders = [folder / "encoded", world / "toy/encoded"]
    data = pickle.loads(pickle.dumps(read_encoded(",".join(map(str, folders)))))
    wanted = []
    for at, where in zip((0, 3), folders):
        for shard in sorted(where.glob("*.jsonl")):
            wanted += [(json.loads(line), at, where) for line in open(shard)]

    def check(i):
        line, at, where = wanted[i]
        read, row = data.line(i), data.index[i]
        assert (row["split"].decode(), row["kind"].decode()) == (line["split"], line["kind"])
        assert (row["turns"], row["role"].decode()) == (len(line["turns"]), line["turns"][0]["role"])
        assert row["annotated"] and row["interjections"] == ("interjections" in line) and not row["sentences"]
        for place, original in zip(places(read), places(line), strict=True):
            codes = np.load(where / f"{original['shard']:05}.npy")
            codes = codes[original["offset"]:original["offset"] + original["frames"]]
            assert np.array_equal(data.codes(place), codes) and place["shard"] == at + original["shard"]
            place["shard"] -= at
        assert read == line
    assert len(data) == len(wanted) == len(data.index) and data.index["interjections"].any()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check, [*range(len(data)), *range(20)]))


@pytest.mark.parametrize("damage, says", [
    (lambda f: os.truncate(f / "00000.npy", 1000), "00000.npy from frame .* damaged, not"),
    (lambda f: np.save(f / "00000.npy", np.load(f / "00000.npy") + np.int16(99)), "codes below 32; encode"),
    (lambda f: os.truncate(f / "00000.jsonl", 9), "jsonl from byte 0: damaged"),
    (lambda f: (f / "00000.npy").unlink(), "00000.npy: not there; `python prepare.py encode` makes it"),
    (lambda f: (f / "index.npy").write_bytes(b"x"), "index.npy: damaged"),
    (lambda f: np.save(f / "index.npy", np.zeros(3)), "index.npy: is of another version"),
    (lambda f: shutil.rmtree(f), "meta.json: not there; `python prepare.py encode` makes it"),
])
def test_damaged_codes_are_one_clear_error(world, tmp_path, damage, says):
    shutil.copytree(world / "toy/encoded", tmp_path / "encoded")
    damage(tmp_path / "encoded")
    with pytest.raises((ValueError, OSError), match=says):
        data = read_encoded(str(tmp_path / "encoded"))
        for i in range(len(data)):
            for place in places(data.line(i)):
                data.codes(place)


def many_lines(world, folder, shards, lines):
    """An encoded folder with shards of this number of equal lines each."""
    shutil.copytree(world / "toy/encoded", folder)
    codes = np.load(folder / "00000.npy")[:50]
    line = next(line for line in open(folder / "00000.jsonl") if len(json.loads(line)["turns"]) == 2)
    line = json.loads(line)
    for shard in range(shards):
        np.save(folder / f"{shard:05}.npy", codes + np.int16(0))
        for place in places(line):
            place.update(shard=shard, offset=shard % 40, frames=10)
        (folder / f"{shard:05}.jsonl").write_text((json.dumps(line) + "\n") * lines)
    meta = json.loads((folder / "meta.json").read_text()) | {"shards": [[0, 0]] * shards}
    (folder / "meta.json").write_text(json.dumps(meta))
    assert write_index(str(folder), shards) == 50 * shards
    return codes


def test_a_thousand_shards_need_few_file_descriptors(world, tmp_path):
    resource = pytest.importorskip("resource")
    codes = many_lines(world, tmp_path / "encoded", 1000, 2)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd")), default=60) + 8
                                                if os.path.exists("/proc/self/fd") else 64, limits[1]))
    try:
        data = read_encoded(str(tmp_path / "encoded"))
        for i in range(0, 2000, 2):
            place = data.line(i)["turns"][0]["copies"][0]
            assert place["shard"] == i // 2
            assert np.array_equal(data.codes(place), codes[place["offset"]:place["offset"] + 10])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("shards, lines", [(20, 500), pytest.param(1000, 500, marks=pytest.mark.slow)])
def test_memory_of_many_lines(world, tmp_path, shards, lines):
    """At most 64 bytes a line: 32 MB for 500,000 of them."""
    many_lines(world, tmp_path / "encoded", shards, lines)
    read_encoded(str(world / "toy/encoded"))  # what every folder needs
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        data = read_encoded(str(tmp_path / "encoded"))
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(data) == shards * lines and held < 64 * len(data) + 500_000
