"""The tests, offline and on the CPU: `pytest test_all.py`.

What is compared with what: a loss with its equation written out naively, an estimator with a closed form or an enumeration,
a run with the same run interrupted, the README's tables with the file of results they are written from.
`python test_all.py` rewrites those tables.
"""

import contextlib
import copy
import dataclasses
import datetime
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import pickle
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import aim  # noqa: E402
import data  # noqa: E402
import ivgen  # noqa: E402
import latentmap  # noqa: E402
import metrics  # noqa: E402
from data import Batches, Dataset, UserError, load, ordered, to_float, to_uint8  # noqa: E402

# ======================================================================================================================
# data.py
# ======================================================================================================================


def counted(n, stacked=False, labels=True):
    """Pictures that tell their index: all pixels of picture i are i; its label is i % 10."""
    x = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 8, 8).contiguous()
    y = torch.arange(n) % 10 if labels else None
    return Dataset("counted", "train", x, y, 1000 if stacked else 10, stacked)


def indices(x):
    """The indices of such pictures in a batch: (B,), or (B, 3) of a stacked set."""
    return to_uint8(x)[:, :, 0, 0].long().squeeze(1)


def save_pictures(folder, n, size=(16, 16), mode="RGB", suffix=".png", seed=0):
    """n pictures of random pixels as folder/0.png ...; returns their pixels (n, H, W[, 3])."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = (n, size[1], size[0], 3) if mode == "RGB" else (n, size[1], size[0])
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    for i in range(n):
        Image.fromarray(pixels[i]).save(folder / f"{i}{suffix}")
    return pixels


# ----------------------------------------------------------------------------------------------- bytes, batches


def test_bytes_survive_the_floats_exactly():
    u8 = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = to_float(u8)
    assert x.min() == -1 and x.max() == 1 and x.dtype == torch.float32
    assert torch.equal(to_uint8(x), u8)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    assert to_uint8(torch.tensor(0.9999)).item() == 255  # rounded: truncation would give 254
    with pytest.raises(ValueError, match="uint8"):
        to_float(x)


def test_resizing():
    stripes = torch.tensor([255, 0, 0, 255], dtype=torch.uint8).repeat(8).expand(1, 1, 32, 32)
    small = to_float(stripes, 8)
    assert small.shape == (1, 1, 8, 8)
    assert small[..., 1:-1].abs().max() < 0.3  # antialiased: fine stripes turn grey; the middles alone are black
    flat = torch.full((2, 3, 28, 28), 77, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(flat, 64)), torch.full((2, 3, 64, 64), 77, dtype=torch.uint8))
    ramp = torch.arange(0, 256, 16, dtype=torch.uint8).expand(1, 1, 16, 16)
    assert torch.equal(to_float(ramp, 16), to_float(ramp))
    up = to_float(ramp, 32)[0, 0, 0]  # half-pixel centres: sample 2i + 1 lies a quarter of the way from i to i + 1
    assert torch.allclose((up[1:-1:2] + 1) * 127.5, torch.arange(15) * 16 + 4.0, atol=1e-3)


def test_an_epoch_is_a_permutation_of_everything_and_no_two_are_alike():
    batches = Batches(counted(60), 6, seed=3)
    assert batches.steps_per_epoch == 10
    epochs = [torch.cat([indices(next(batches)[0]) for _ in range(10)]).tolist() for _ in range(3)]
    assert all(sorted(epoch) == list(range(60)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])
    other = Batches(counted(60), 6, seed=4)
    assert torch.cat([indices(next(other)[0]) for _ in range(10)]).tolist() != epochs[0]
    x, y = next(Batches(counted(60), 6))
    assert x.shape == (6, 1, 8, 8) and torch.equal(y, indices(x) % 10)
    assert next(Batches(counted(60, labels=False), 6, size=12))[0].shape == (6, 1, 12, 12)
    assert next(Batches(counted(60, labels=False), 6))[1] is None


@pytest.mark.parametrize("kind", ["images", "stacked", "points"])
def test_batches_resume_bit_for_bit(kind):
    dataset = load("swissroll") if kind == "points" else counted(50, stacked=kind == "stacked")
    batch = 700 if kind == "points" else 7  # 7 batches an epoch, and some left over
    batches, told = Batches(dataset, batch, seed=5), []
    for _ in range(18):  # across two ends of an epoch
        told.append((batches.state_dict(), next(batches)))
    assert told[7][0] == {"epoch": 1, "position": 0} and told[15][0] == {"epoch": 2, "position": 1}
    for start in (0, 1, 6, 7, 8, 13, 14, 17):
        resumed = Batches(dataset, batch, seed=5)
        for _ in range(start % 4):  # whatever it did before is forgotten
            next(resumed)
        resumed.load_state_dict(told[start][0])
        for _, (x, y) in told[start:]:
            x2, y2 = next(resumed)
            assert torch.equal(x, x2) and torch.equal(y, y2)


def test_any_seed_will_do():
    first = [next(Batches(counted(40), 10, seed=seed))[0] for seed in (2**62, 2**62 + 1)]
    assert not torch.equal(*first)


def test_ranks_share_one_permutation():
    whole = Batches(counted(103), 100, seed=1)
    order = indices(next(whole)[0])
    shards = []
    for rank in range(4):
        batches = Batches(counted(103), 5, seed=1, rank=rank, world=4)
        assert batches.steps_per_epoch == 5
        shards.append(torch.cat([indices(next(batches)[0]) for _ in range(5)]))
        assert torch.equal(shards[-1], order[rank::4])
    assert sorted(torch.cat(shards).tolist()) == sorted(order.tolist())


def test_batches_that_cannot_be_drawn():
    with pytest.raises(UserError, match="a batch of 11 is more than the 10 items of counted: give"):
        Batches(counted(10), 11)
    with pytest.raises(UserError, match=r"5 items of counted for each device"):
        Batches(counted(10), 6, world=2)
    with pytest.raises(UserError, match="batch 9 of an epoch that now has 2"):
        Batches(counted(10), 5).load_state_dict({"epoch": 0, "position": 9})


def test_ordered():
    dataset = counted(25)
    parts = list(ordered(dataset, batch=10))
    assert [len(x) for x, _ in parts] == [10, 10, 5]
    assert torch.cat([indices(x) for x, _ in parts]).tolist() == list(range(25))
    assert indices(next(ordered(dataset, n=3))[0]).tolist() == [0, 1, 2]
    assert sum(len(x) for x, _ in ordered(dataset, n=99)) == 25
    assert not list(ordered(dataset, n=0))
    assert next(ordered(dataset, n=2, size=12))[0].shape == (2, 1, 12, 12)
    bare = indices(next(ordered(counted(200, labels=False), n=20))[0])  # nothing tells in what order they lie
    assert bare.max() > 100 and len(bare.unique()) == 20
    dataset.y = dataset.y.sort().values  # stored class by class: the first ten would be of five classes at most
    a, b = next(ordered(dataset, n=10)), next(ordered(dataset, n=10))
    assert torch.equal(a[0], b[0]) and len(a[1].unique()) > 5
    assert torch.equal(dataset.y[indices(a[0])], a[1])


def test_stacked_channels_carry_the_label():
    dataset = counted(50, stacked=True)
    assert dataset.channels == 3 and dataset.classes == 1000 and len(dataset) == 50
    batches, seen = Batches(dataset, 10), []
    for _ in range(5):
        x, y = next(batches)
        assert x.shape == (10, 3, 8, 8)
        seen.append(indices(x))
        assert torch.equal(y, (seen[-1] % 10 * torch.tensor([100, 10, 1])).sum(1))
    seen = torch.cat(seen)
    for channel in range(3):  # three permutations: every digit once in each colour
        assert sorted(seen[:, channel].tolist()) == list(range(50))
    assert (seen[:, 0] == seen[:, 1]).sum() < 10 and (seen[:, 1] == seen[:, 2]).sum() < 10
    x, y = next(ordered(dataset, n=200, batch=200))  # more triples than digits
    assert len(x) == 200 and torch.equal(y, (indices(x) % 10 * torch.tensor([100, 10, 1])).sum(1))
    assert torch.equal(x, next(ordered(dataset, n=200, batch=200))[0])
    assert not torch.equal(x, next(ordered(dataset, n=200, batch=200, seed=1))[0])


# ------------------------------------------------------------------------------------------------ drawn digits


def test_digits_as_loaded():
    train, test = load("digits"), load("digits", split="test")
    assert train.x.shape == (60_000, 1, 28, 28) and test.x.shape == (10_000, 1, 28, 28)
    assert train.x.dtype == torch.uint8 and train.classes == 10 and (train.kind, train.channels) == ("images", 1)
    assert train.y.bincount().tolist() == [6000] * 10 and test.y.bincount().tolist() == [1000] * 10
    everything = {picture.tobytes() for x in (train.x, test.x) for picture in x.numpy()}
    assert len(everything) == 70_000  # no picture twice, in or across the splits
    assert torch.equal(load("stacked-digits", split="test").x, test.x)


def test_digits_follow_from_the_seed_alone():
    global_state = torch.random.get_rng_state()
    threads = torch.get_num_threads()
    (a, y), (b, _), (c, _) = data.draw_digits(1200, 1), data.draw_digits(1200, 1), data.draw_digits(1200, 2)
    assert torch.equal(a, b) and not (a == c).flatten(1).all(1).any()
    assert torch.equal(y, torch.arange(1200) % 10)
    assert torch.equal(torch.random.get_rng_state(), global_state) and torch.get_num_threads() == threads


def test_digits_look_like_mnist_to_the_numbers():
    x = data.draw_digits(2000, 3)[0].float()
    assert x.max() == 255 and x.min() == 0
    assert 22 < x.mean() < 42  # MNIST: 33.3
    assert ((x > 0) & (x < 255)).float().mean() < 0.2  # edges, and else black or white
    assert x[:, :, 0].max(2).values.gt(0).float().mean() < 0.01  # the frame stays black
    ones, columns = x[1::10, 0].mean(0), torch.arange(28)
    top, bottom = ((rows * columns).sum() / rows.sum() for rows in (ones[4:9], ones[19:24]))
    assert top > bottom + 1  # in writing, the top leans to the right
    grid, mass = torch.arange(28.0), x.sum((1, 2, 3))
    for axis in (2, 3):
        centre = (x.sum(axis).squeeze(1) * grid).sum(1) / mass
        assert (centre - 13.5).abs().max() < 2.5 and (centre.mean() - 13.5).abs() < 0.1


def test_digits_can_be_told_apart_and_are_not_all_alike():
    (train, y), (test, truth) = data.draw_digits(4000, 1), data.draw_digits(500, 2)
    distances = torch.cdist(test.flatten(1).float() / 255, train.flatten(1).float() / 255)
    nearest, index = distances.min(1)
    assert (y[index] == truth).float().mean() > 0.97
    assert nearest.min() > 0.3  # no test picture is a training picture, nor nearly one
    for digit in range(10):
        same = train[y == digit].float()
        assert same.std(0).max() > 60  # grey levels: each digit is written in many ways


def test_splines_go_through_their_points():
    line = data._spline(5, 16, closed=False)
    assert torch.allclose(line[::4], torch.eye(5), atol=1e-6) and torch.allclose(line.sum(1), torch.ones(17), atol=1e-6)
    straight = torch.arange(5.0)
    assert torch.allclose(line @ straight, torch.linspace(0, 4, 17), atol=1e-5)
    closed = data._spline(5, 400, closed=True) @ torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1], [0, 0]])
    start, end = closed[1] - closed[0], closed[-1] - closed[-2]
    assert torch.allclose(start / start.norm(), end / end.norm(), atol=0.05)  # no corner where it closes


def test_glyphs_use_all_their_segments():
    points, ends, _ = data._glyph_tables()
    digits = [digit for digit, _ in data.GLYPHS]
    assert digits == sorted(digits) and set(digits) == set(range(10))  # draw_digits looks them up by position
    segments = (ends @ points).view(len(points), 2, data.SEGMENTS, 2)
    length = (segments[:, 1] - segments[:, 0]).norm(dim=2)
    assert length.min() > 0 and (length / 5).max() < 1.6  # pixels, the box of 100 being 20 of them
    way = (segments[:, 1] - segments[:, 0]) / length[..., None]
    assert (way[0, 0] * way[0, -1]).sum() > 0.95  # the first zero closes without a corner


# -------------------------------------------------------------------------------------------------- point sets


@pytest.mark.parametrize("name, modes, std", [("grid25", 25, 0.05), ("ring8", 8, 0.02)])
def test_gaussian_mixtures(name, modes, std):
    train, test = load(name), load(name, split="test")
    assert train.x.shape == (100_000, 2) and train.x.dtype == torch.float32 and train.kind == "points"
    assert train.classes == modes and train.y.unique().tolist() == list(range(modes))
    centres = torch.stack([train.x[train.y == k].mean(0) for k in range(modes)])
    if name == "grid25":
        wanted = {(a, b) for a in (-4, -2, 0, 2, 4) for b in (-4, -2, 0, 2, 4)}
        assert {tuple(c) for c in centres.round().int().tolist()} == wanted
        assert (centres - centres.round()).abs().max() < 0.01
    else:
        assert (centres.norm(dim=1) - 2).abs().max() < 0.01
        assert torch.allclose(torch.cdist(centres, centres).fill_diagonal_(9).min(1).values,
                              torch.tensor(4 * np.sin(np.pi / 8), dtype=torch.float32), atol=0.01)
    spread = (train.x - centres[train.y]).std(0)
    assert (spread - std).abs().max() < 0.02 * std
    assert (train.y.bincount() - 100_000 / modes).abs().max() < 5 * (100_000 / modes) ** 0.5
    assert torch.equal(load(name).x, train.x) and not torch.equal(train.x[:10_000], test.x)


def test_swissroll_is_the_spiral():
    train, test = load("swissroll"), load("swissroll", split="test")
    assert train.x.shape == (5000, 2) and train.channels == 2
    radius = train.x.norm(dim=1)  # t / 4.5 pi, and t is uniform from 1.5 pi to 4.5 pi
    assert 1 / 3 - 1e-6 < radius.min() < 0.335 and 0.998 < radius.max() <= 1 + 1e-6
    t = radius * 4.5 * np.pi
    assert torch.allclose(train.x, torch.stack([radius * t.cos(), radius * t.sin()], 1), atol=1e-4)
    assert (train.y + 0.5 - (t / np.pi - 1.5) / 3 * 10).abs().max() < 0.501 and train.classes == 10
    assert (radius.mean() - 2 / 3).abs() < 0.01
    assert not torch.isin(test.x[:, 0], train.x[:, 0]).all()


# ---------------------------------------------------------------------------------------------- published sets


def write_mnist(root, n=20, folder="MNIST"):
    """Files in the genuine idx format: magic number, sizes as big-endian integers, bytes."""
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (2, n, 28, 28), dtype=np.uint8)
    for part, images in zip(("train", "t10k"), pixels):
        header = np.array([0x803, n, 28, 28], ">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = (np.arange(n) % 10).astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(np.array([0x801, n], ">i4").tobytes() + labels.tobytes())
    return pixels


def no_network(*args, **kwargs):
    raise OSError("Network is unreachable")


def test_mnist_is_read_where_it_lies(tmp_path, monkeypatch):
    pixels = write_mnist(tmp_path)
    write_mnist(tmp_path, folder="FashionMNIST")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    for i, split in enumerate(("train", "test")):
        got = load("mnist", tmp_path, split=split)
        assert torch.equal(got.x, torch.from_numpy(pixels[i])[:, None]) and got.y.tolist() == [*range(10)] * 2
        assert (got.name, got.split, got.classes) == ("mnist", split, 10) and got.y.dtype == torch.int64
    assert load("fashion-mnist", tmp_path).classes == 10
    stacked = load("stacked-mnist", tmp_path)
    assert stacked.stacked and stacked.name == "stacked-mnist" and stacked.classes == 1000
    x, y = next(ordered(stacked, n=5))
    assert x.shape == (5, 3, 28, 28) and int(y.max()) < 1000
    assert sorted(tmp_path.rglob("*")) == before  # nothing was written


def test_mnist_cut_short_is_one_sentence(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:1000])
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(UserError, match="mnist could not be read from") as error:
        load("mnist", tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, says", [
    ("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw"), ("stacked-mnist", "t10k-labels-idx1-ubyte"),
    ("cifar10", "cifar-10-python.tar.gz"), ("stl10", "stl10_binary.tar.gz"), ("celeba", "img_align_celeba")])
def test_a_failed_download_says_what_to_put_where(tmp_path, monkeypatch, capsys, name, says):
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(UserError, match="by hand, put there") as error:
        load(name, tmp_path)
    message = str(error.value)
    assert message.startswith(name.removeprefix("stacked-")) and str(tmp_path) in message and says in message
    assert "\n" not in message and ("unreachable" in message or "gdown" in message)
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1  # torchvision itself is not heard


def test_a_download_is_announced_in_one_line_and_else_silent(tmp_path, capsys):
    def make(download):
        if not download:
            raise RuntimeError("Dataset not found")
        print("torchvision's talk")
        print("and its progress bar", file=sys.stderr)
        return "the dataset"

    assert data._torchvision("cifar10", tmp_path, make) == "the dataset"
    out, err = capsys.readouterr()
    assert out == "" and err == f"cifar10 is not (whole) in {tmp_path}: downloading it\n"


def test_nothing_is_downloaded_into_a_root_marked_read_only(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(UserError, match="read-only"):
            load("fashion-mnist", tmp_path)
        assert list(tmp_path.iterdir()) == []
    finally:
        tmp_path.chmod(0o755)


def test_cifar10_in_its_own_format(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)  # they are not the real ones
    folder, rows = tmp_path / "cifar-10-batches-py", np.random.default_rng(0).integers(0, 256, (6, 4, 3072), np.uint8)
    folder.mkdir()
    for part, name in zip(rows, [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        (folder / name).write_bytes(pickle.dumps({"data": part, "labels": [0, 1, 2, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["x"] * 10}))
    train, test = load("cifar10", tmp_path), load("cifar10", tmp_path, split="test")
    assert np.array_equal(train.x, rows[:5].reshape(20, 3, 32, 32)) and train.y.tolist() == [0, 1, 2, 9] * 5
    assert np.array_equal(test.x, rows[5].reshape(4, 3, 32, 32)) and test.x.is_contiguous()


def test_stl10_in_its_own_format(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    folder, rng = tmp_path / "stl10_binary", np.random.default_rng(0)
    folder.mkdir()
    pixels = {part: rng.integers(0, 256, (n, 3, 96, 96), np.uint8) for part, n in
              {"train": 2, "unlabeled": 3, "test": 2}.items()}
    for part, images in pixels.items():
        (folder / f"{part}_X.bin").write_bytes(images.transpose(0, 1, 3, 2).tobytes())  # stored column by column
        (folder / f"{part}_y.bin").write_bytes(bytes([1, 2]))
    train, test = load("stl10", tmp_path), load("stl10", tmp_path, split="test")
    assert np.array_equal(train.x.numpy(), np.concatenate([pixels["train"], pixels["unlabeled"]]))
    assert np.array_equal(test.x.numpy(), pixels["test"]) and train.y is test.y is None and train.classes == 0


def test_celeba_is_cropped_to_140(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CelebA, "_check_integrity", lambda self: True)
    folder = tmp_path / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{i:06d}.png" for i in range(1, 6)]
    for name in names:  # white inside the central 140x140 of 178x218, black outside
        pixels = np.zeros((218, 178, 3), np.uint8)
        pixels[39:179, 19:159] = 255
        Image.fromarray(pixels).save(folder / "img_align_celeba" / name)
    rows = {"list_eval_partition.txt": " 0", "identity_CelebA.txt": " 7", "list_bbox_celeba.txt": " 1 2 3 4",
            "list_landmarks_align_celeba.txt": " 1" * 10, "list_attr_celeba.txt": " 1" * 40}
    for file, row in rows.items():
        head = "" if file in ("list_eval_partition.txt", "identity_CelebA.txt") else "5\nheader\n"
        last = " 2" if "partition" in file else row  # the last two are test pictures
        (folder / file).write_text(head + "".join(f"{n}{row if n in names[:3] else last}\n" for n in names))
    train, test = load("celeba", tmp_path), load("celeba", tmp_path, 32, split="test")
    assert train.x.shape == (3, 3, 64, 64) and test.x.shape == (2, 3, 32, 32) and train.y is None
    assert train.x.min() == test.x.min() == 255  # nothing of the black frame, not even mixed in
    (folder / "img_align_celeba" / names[2]).unlink()
    with pytest.raises(UserError, match=r"000003.png, a picture of celeba, cannot be found"):
        load("celeba", tmp_path)


def test_lsun_without_lmdb_and_without_its_files(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(UserError, match="pip install lmdb"):
        load("lsun-church", tmp_path)
    monkeypatch.setitem(sys.modules, "lmdb", types.ModuleType("lmdb"))
    with pytest.raises(UserError, match=r"church_outdoor_val_lmdb\.zip"):
        load("lsun-church", tmp_path, split="test")


@pytest.fixture
def church(tmp_path, monkeypatch):
    """lsun-church under tmp_path / "root", read by a stand-in for lmdb: its `stored` pictures, its `file`, its `lmdb`."""
    stored = {}
    for i in range(3):
        file = io.BytesIO()
        Image.new("RGB", (40, 30), (10 * i, 20, 30)).save(file, "png")
        stored[f"key{i}".encode()] = file.getvalue()

    class Environment:  # what data.py asks of lmdb's
        def info(self):
            return {"last_pgno": 1}

        def stat(self):
            return {"psize": 4096}

        def begin(self):
            return self

        def cursor(self):
            return self

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def iternext(self, keys, values):
            return iter(stored) if keys and not values else None

        def get(self, key):
            return stored[key]

    lmdb = types.ModuleType("lmdb")
    lmdb.Error, lmdb.open = type("Error", (Exception,), {}), lambda path, **kwargs: Environment()
    monkeypatch.setitem(sys.modules, "lmdb", lmdb)
    file = tmp_path / "root" / "church_outdoor_train_lmdb" / "data.mdb"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"stands for the database".ljust(8192))
    return types.SimpleNamespace(stored=stored, file=file, lmdb=lmdb)


def test_lsun_is_read_from_lmdb(church, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    got = load("lsun-church", tmp_path / "root")
    assert got.x.shape == (3, 3, 64, 64) and got.x[2, :, 5, 5].tolist() == [20, 20, 30] and got.y is None
    assert os.listdir(tmp_path) == ["root"]  # no pickle of the keys left in the current folder


@pytest.mark.parametrize("damage", ["no keys", "half of it", "not opened"])
def test_a_damaged_lsun_is_one_sentence(church, damage, tmp_path):
    if damage == "no keys":
        church.stored.clear()
    elif damage == "half of it":                                            # lmdb itself would die of SIGBUS
        church.file.write_bytes(b"half".ljust(4096))
    else:
        church.lmdb.open = lambda path, **kwargs: (_ for _ in ()).throw(church.lmdb.Error)
    with pytest.raises(UserError, match="damaged or was copied in part"):
        load("lsun-church", tmp_path / "root")


# --------------------------------------------------------------------------------------------------- folders


def test_a_flat_folder(tmp_path):
    pixels = save_pictures(tmp_path / "cats", 5)
    (tmp_path / "cats" / "readme.txt").write_text("not a picture")
    (tmp_path / "cats" / ".hidden.png").write_text("nor this")
    got = load(str(tmp_path / "cats"), tmp_path / "root", split="test")
    assert (got.name, got.split, got.classes, got.y) == ("cats", "train", 0, None)  # there is no test/: it says train
    assert torch.equal(got.x, torch.from_numpy(pixels).permute(0, 3, 1, 2))


def test_a_folder_a_class(tmp_path):
    for i, name in enumerate(("ant", "bee", "cow")):
        save_pictures(tmp_path / "zoo" / name, i + 1, suffix=".jpg", seed=i)
    (tmp_path / "zoo" / "empty").mkdir()
    save_pictures(tmp_path / "zoo" / "bee" / "deeper", 1)
    got = load(tmp_path / "zoo", tmp_path / "root")
    assert got.y.tolist() == [0, 1, 1, 1, 2, 2, 2] and got.classes == 3 and got.x.shape == (7, 3, 16, 16)


def test_train_and_test_number_their_classes_alike(tmp_path):
    for name in ("ant", "bee", "cow"):
        save_pictures(tmp_path / "zoo" / "train" / name, 2)
    save_pictures(tmp_path / "zoo" / "test" / "cow", 3)  # class 0 of those that are here, class 2 of all
    train, test = (load(tmp_path / "zoo", tmp_path / "root", split=split) for split in ("train", "test"))
    assert train.y.tolist() == [0, 0, 1, 1, 2, 2] and train.split == "train"
    assert test.y.tolist() == [2, 2, 2] and test.classes == 3 and test.split == "test"
    save_pictures(tmp_path / "zoo" / "test" / "dog", 1)
    with pytest.raises(UserError, match=r"test/dog has pictures, but .*train/dog has none"):
        load(tmp_path / "zoo", tmp_path / "root", split="test")


def test_pictures_of_differing_sizes_are_cropped(tmp_path):
    folder = tmp_path / "mix"
    folder.mkdir()
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = 200  # the central square
    Image.fromarray(wide).save(folder / "a.png")
    Image.fromarray(wide.transpose(1, 0, 2)).save(folder / "b.png")
    Image.new("RGB", (100, 80), (200, 200, 200)).save(folder / "c.webp", lossless=True)
    got = load(folder, tmp_path / "root", size=8)
    assert got.x.shape == (3, 3, 8, 8)
    assert got.x[..., 1:-1, 1:-1].eq(200).all()  # resizing before the crop mixes the neighbours into its edge only
    assert load(folder, tmp_path / "root", size=24).x.shape == (3, 3, 24, 24)
    with pytest.raises(UserError, match=r"a.png is not square \(48x16\): give a size"):
        load(folder, tmp_path / "root")
    (folder / "a.png").unlink()
    (folder / "b.png").unlink()
    save_pictures(folder, 1, size=(80, 80))
    with pytest.raises(UserError, match=r"c.webp is not square"):
        load(folder, tmp_path / "root")
    (folder / "c.webp").unlink()
    save_pictures(folder / "more", 0)
    Image.new("RGB", (20, 20)).save(folder / "c.png")
    with pytest.raises(UserError, match=r"pictures of mix differ in size \(.*0.png, .*c.png\): give a size"):
        load(folder, tmp_path / "root")


def test_grey_and_colour(tmp_path):
    grey = save_pictures(tmp_path / "grey", 3, mode="L")
    got = load(tmp_path / "grey", tmp_path / "root")
    assert got.channels == 1 and torch.equal(got.x[:, 0], torch.from_numpy(grey))
    for place in ("0", "z"):  # a colour picture before all grey ones, or after them
        folder = tmp_path / f"mixed{place}"
        folder.mkdir()
        for i in range(3):
            Image.fromarray(grey[i]).save(folder / f"{i + 1}.png")
        Image.new("RGB", (16, 16), (1, 2, 3)).save(folder / f"{place}.png")
        x = load(folder, tmp_path / "root").x
        colour = 0 if place == "0" else 3
        assert x.shape == (4, 3, 16, 16) and x[colour, :, 4, 4].tolist() == [1, 2, 3]
        rest = torch.cat([x[:colour], x[colour + 1 :]])
        assert torch.equal(rest, torch.from_numpy(grey)[:, None].expand(-1, 3, -1, -1))


def test_unusual_pictures(tmp_path):
    def read(image, **options):
        image.save(tmp_path / "x.png", **options)
        return data._picture(str(tmp_path / "x.png"), None, None, None)

    sixteen = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    got = read(Image.fromarray(sixteen))
    assert got.shape == (1, 16, 16) and np.abs(got[0].astype(float) - sixteen / 257).max() <= 0.5
    got = read(Image.new("RGBA", (16, 16), (255, 0, 0, 0)))
    assert got.shape == (3, 16, 16) and (got == 255).all()  # invisible: white
    got = read(Image.new("LA", (16, 16), (100, 255)))
    assert got.shape == (1, 16, 16) and (got == 100).all()
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert read(palette)[:, 3, 3].tolist() == [10, 20, 30]
    assert (read(palette, transparency=1) == 255).all()
    assert set(read(Image.new("1", (16, 16), 1)).flatten()) == {255}
    image = Image.fromarray(np.repeat(np.uint8([[0], [255]]), [8, 8], 0).repeat(16, 1))  # black above white
    exif = Image.Exif()
    exif[0x0112] = 3  # the camera was held upside down
    got = read(image, exif=exif)
    assert (got[0, :8] == 255).all() and (got[0, 8:] == 0).all()


def test_the_cache_is_used_while_nothing_changes(tmp_path, monkeypatch, capsys):
    folder, root = tmp_path / "cats", tmp_path / "root"
    save_pictures(folder, 4)
    decoded = []
    real = data._decode
    monkeypatch.setattr(data, "_decode", lambda *args: decoded.append(1) or real(*args))
    first = load(folder, root).x
    assert "decoding cats: 4 of 4" in capsys.readouterr().err
    again = load(folder, root).x
    assert len(decoded) == 1 and torch.equal(first, again) and capsys.readouterr().err == ""
    assert load(folder, root, size=8).x.shape[-1] == 8 and len(decoded) == 2
    assert len(list((root / "cache").iterdir())) == 2  # one file a size, nothing unfinished

    image = folder / "2.png"
    Image.new("RGB", (16, 16), (9, 9, 9)).save(image)  # other content
    assert load(folder, root).x[2].unique().tolist() == [9] and len(decoded) == 3
    os.utime(image, ns=(1, 1))  # the same content, but who knows
    assert len(load(folder, root)) == 4 and len(decoded) == 4
    image.unlink()
    assert len(load(folder, root)) == 3 and len(decoded) == 5
    folder.rename(tmp_path / "dogs")
    assert load(tmp_path / "dogs", root).name == "dogs" and len(decoded) == 6
    assert len(list((root / "cache").iterdir())) == 3  # changes replaced the file of the old state


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "flipped", "other"])
def test_a_damaged_cache_is_made_anew(tmp_path, capsys, damage):
    folder, root = tmp_path / "cats", tmp_path / "root"
    save_pictures(folder, 40)
    wanted = load(folder, root).x.clone()
    (file,) = (root / "cache").iterdir()
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.unlink()  # the first load may still have it mapped
    if damage == "other":
        torch.save([1, 2, 3], file)
    else:
        file.write_bytes({"empty": b"", "cut": whole[:middle], "noise": bytes(range(256)) * 40,
                          "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]}[damage])
    capsys.readouterr()
    assert torch.equal(load(folder, root).x, wanted)
    assert "is damaged" in capsys.readouterr().err
    assert torch.equal(load(folder, root).x, wanted) and "damaged" not in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_does_not_stop_the_run(tmp_path, monkeypatch, capsys):
    pixels = save_pictures(tmp_path / "cats", 3)
    monkeypatch.setattr(torch, "save", no_network)
    assert torch.equal(load(tmp_path / "cats", tmp_path / "root").x, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert "could not be written" in capsys.readouterr().err
    assert list((tmp_path / "root" / "cache").iterdir()) == []


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data.cache_dir(tmp_path / "new") == tmp_path / "new" / "cache" and (tmp_path / "new" / "cache").is_dir()
    marked = tmp_path / "marked"
    marked.mkdir(mode=0o555)
    assert data.cache_dir(marked) == Path("data/cache") and (tmp_path / "data" / "cache").is_dir()
    assert list(marked.iterdir()) == []
    (tmp_path / "file").write_text("not a folder")
    assert data.cache_dir(tmp_path / "file") == Path("data/cache")
    (tmp_path / "data" / "cache").chmod(0o555)
    with pytest.raises(UserError, match=r"neither .*marked nor \./data can be written to"):
        data.cache_dir(marked)


# ------------------------------------------------------------------------------------------ what users are told


@pytest.mark.parametrize("name, says", [
    ("mnits", "there is no dataset 'mnits', perhaps mnist is meant: give a folder of pictures or one of digits"),
    ("CIFAR10", "perhaps cifar10 is meant"),
    ("qqqq", "there is no dataset 'qqqq': give"),
    ("./qqqq", "there is no folder ./qqqq: give"),
    ("pictures.zip", "there is no folder pictures.zip: give")])
def test_unknown_names(name, says):
    with pytest.raises(UserError) as error:
        load(name)
    assert says in str(error.value) and "swissroll" in str(error.value)


def test_wrong_splits_and_sizes():
    with pytest.raises(UserError, match="no split 'valid': it is train or test"):
        load("digits", split="valid")
    with pytest.raises(UserError, match="4 pixels is too small"):
        load("digits", size=4)


def test_a_class_called_train_hides_no_other(tmp_path):
    for name in ("train", "bus"):
        save_pictures(tmp_path / "veh" / name, 2)
    with pytest.raises(UserError, match="has pictures in train/ and beside it, in bus"):
        load(tmp_path / "veh", tmp_path)
    for name in ("Train", "Test"):
        save_pictures(tmp_path / "two" / name, 2 if name == "Train" else 1)
    assert [len(load(tmp_path / "two", tmp_path, split=split)) for split in ("train", "test")] == [2, 1]


def test_folders_that_cannot_be_used(tmp_path):
    folder, root = tmp_path / "cats", tmp_path / "root"
    folder.mkdir()
    with pytest.raises(UserError, match=r"there are no pictures \(.jpg .*\) in .*cats"):
        load(folder, root)
    save_pictures(folder, 3)
    whole = (folder / "1.png").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a picture"):
        (folder / "1.png").write_bytes(damaged)
        with pytest.raises(UserError, match=r"cats/1.png cannot be read as a picture \(.*\): replace or remove it"):
            load(folder, root)
    Image.new("RGB", (16, 7)).save(folder / "1.png")
    with pytest.raises(UserError, match=r"1\.png is only 16x7 pixels: 8 are the least"):
        load(folder, root, size=16)
    (folder / "1.png").write_bytes(whole)
    (folder / "9.png").symlink_to("nothing")
    with pytest.raises(UserError, match=r"9\.png, a picture of cats, cannot be found \(No such file"):
        load(folder, root)
    (folder / "9.png").unlink()
    save_pictures(folder / "kittens", 1)
    with pytest.raises(UserError, match=r"both beside and inside its folders \(kittens\)"):
        load(folder, root)
    assert not (root / "cache").exists() or list((root / "cache").iterdir()) == []  # no failure was cached
    for part in ("train/a", "train/b", "test"):
        save_pictures(tmp_path / "halves" / part, 1)
    with pytest.raises(UserError, match="has a folder for each class, the other has none"):
        load(tmp_path / "halves", root, split="test")


def test_pictures_whose_names_are_no_utf8(tmp_path):
    save_pictures(tmp_path / "latin", 2)
    try:
        os.rename(os.fsencode(tmp_path / "latin" / "0.png"), os.fsencode(tmp_path / "latin") + b"/caf\xe9.png")
    except OSError:
        pytest.skip("this file system knows no such names")
    for _ in range(2):
        assert len(load(tmp_path / "latin", tmp_path / "root")) == 2


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert data.main(["stacked-digits", "--split", "test"]) == 0
    out = capsys.readouterr().out
    assert "(10000, 1, 28, 28)" in out and "1,000 classes" in out
    drawn = np.asarray(Image.open("stacked-digits-test.png"))
    assert drawn.shape[2] == 3 and drawn.shape[0] == drawn.shape[1] > 560 and drawn.std() > 20
    assert data.main(["ring8", "--out", "ring.png"]) == 0
    ring = np.asarray(Image.open("ring.png")) < 250  # dark where points are: on the circle, not in its middle
    middle = ring.shape[0] // 2
    assert ring.any() and not ring[middle - 100 : middle + 100, middle - 100 : middle + 100].any()
    save_pictures(tmp_path / "pictures", 3)
    assert data.main(["pictures"]) == 0 and Path("pictures-train.png").exists()
    monkeypatch.chdir(tmp_path / "pictures")                    # where the sheet would be one picture more
    for wrong in (["mnits"], ["digits", "--out", "nowhere/x.png"], ["digits", "--split", "all"], ["."],
                  ["../pictures", "--out", "sheet.png"]):
        capsys.readouterr()
        assert data.main(wrong) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("data.py: ") and len(err.splitlines()) == 1


SHARED = Path(data.__file__).resolve().parent.parent / "shared" / "data"


@pytest.mark.skipif(not (SHARED / "MNIST").is_dir(), reason="the genuine MNIST is not beside the repository")
def test_the_genuine_mnist():
    train, test = load("mnist", SHARED), load("mnist", SHARED, split="test")
    assert train.x.shape == (60_000, 1, 28, 28) and test.x.shape == (10_000, 1, 28, 28)
    assert train.y.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert abs(train.x.float().mean().item() / 255 - 0.1307) < 1e-4  # the mean that every MNIST example prints


def test_seeds_do_not_share_epochs():
    a, b = data.Batches(counted(60), 60, seed=0), data.Batches(counted(60), 60, seed=1)
    orders = [indices(next(s)[0]).tolist() for s in (a, a, b, b)]
    assert all(one != two for one, two in itertools.combinations(orders, 2))


# ======================================================================================================================
# metrics.py
# ======================================================================================================================


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(d, seed=0, rank=None):
    a = normal(rank or 2 * d, d, seed)
    return a.T @ a / len(a)


# ------------------------------------------------------------------------------------------------ Frechet distance


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form():
    s1, s2, mu1, mu2 = (normal(1, 7, seed)[0] for seed in range(4))
    expected = (mu1 - mu2).square().sum() + (s1.abs() - s2.abs()).square().sum()
    got = metrics.frechet_distance(mu1, torch.diag(s1**2), mu2, torch.diag(s2**2))
    assert got == pytest.approx(expected.item(), rel=1e-12)


def test_frechet_distance_of_commuting_covariances_is_the_closed_form():
    q = torch.linalg.qr(normal(9, 9))[0]
    l1, l2 = normal(1, 9, 1)[0].abs(), normal(1, 9, 2)[0].abs()
    zero = torch.zeros(9)
    got = metrics.frechet_distance(zero, q * l1 @ q.T, zero, q * l2 @ q.T)
    assert got == pytest.approx((l1.sqrt() - l2.sqrt()).square().sum().item(), rel=1e-10)


def test_frechet_distance_of_a_shift_is_its_square_and_it_is_symmetric():
    cov, shift = covariance(6), normal(1, 6, 3)[0]
    assert metrics.frechet_distance(shift, cov, 0 * shift, cov) == pytest.approx(shift.square().sum().item(), rel=1e-9)
    other = covariance(6, 5)
    there = metrics.frechet_distance(shift, cov, 0 * shift, other)
    assert there == pytest.approx(metrics.frechet_distance(0 * shift, other, shift, cov), rel=1e-12)


def test_frechet_distance_in_one_dimension_is_the_integral_over_quantiles():
    # W2 squared in one dimension: integral over u of (F1^-1(u) - F2^-1(u))^2, by the midpoint rule
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    quantile = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0).icdf(u)
    integral = ((0.3 + 2.0 * quantile) - (-1.0 + 0.5 * quantile)).square().mean().item()
    one = torch.ones(1, 1)
    got = metrics.frechet_distance(torch.tensor([0.3]), 4 * one, torch.tensor([-1.0]), 0.25 * one)
    assert got == pytest.approx(1.3**2 + 1.5**2, rel=1e-6)
    assert got == pytest.approx(integral, rel=1e-4)


@pytest.mark.parametrize("rank", [None, 3, 1])
def test_frechet_distance_of_equal_inputs_is_zero(rank):
    mu, cov = normal(1, 8)[0], covariance(8, rank=rank)
    assert metrics.frechet_distance(mu, cov, mu, cov) == 0.0
    nearly = metrics.frechet_distance(mu, cov, mu, cov * (1 + 1e-15))
    assert 0 <= nearly < 1e-12  # without the shortcut for equal inputs


def test_frechet_distance_of_singular_covariances_agrees_with_the_regular_case():
    d, low = 12, 4
    a, b = covariance(low, 1), covariance(low, 2)
    wide = torch.zeros(2, d, d, dtype=torch.float64)
    wide[0, :low, :low], wide[1, :low, :low] = a, b
    q = torch.linalg.qr(normal(d, d, 3))[0]
    expected = metrics.frechet_distance(torch.zeros(low), a, torch.zeros(low), b)
    got = metrics.frechet_distance(torch.zeros(d), q @ wide[0] @ q.T, torch.zeros(d), q @ wide[1] @ q.T)
    assert got == pytest.approx(expected, rel=1e-9)  # low rank = full
    regular = covariance(d, 4)  # one singular, one not: either order
    there = metrics.frechet_distance(torch.zeros(d), regular, torch.zeros(d), q @ wide[0] @ q.T)
    back = metrics.frechet_distance(torch.zeros(d), q @ wide[0] @ q.T, torch.zeros(d), regular)
    assert there == pytest.approx(back, rel=1e-9)
    zero = torch.zeros(d, d)
    assert metrics.frechet_distance(torch.zeros(d), zero, torch.zeros(d), regular) == pytest.approx(regular.trace().item())


@pytest.mark.parametrize("n1, n2, d", [(20, 30, 50), (50, 50, 50), (20, 90, 50), (200, 300, 5), (2, 2, 40)])
def test_frechet_distance_features_equals_that_of_the_statistics(n1, n2, d):
    f1, f2 = normal(n1, d, 1), 1.5 * normal(n2, d, 2) + 0.1
    expected = metrics.Moments.of(f1).distance(metrics.Moments.of(f2))
    assert metrics.frechet_distance_features(f1, f2) == pytest.approx(expected, rel=1e-8)
    assert metrics.frechet_distance_features(f1, f1) == 0.0
    assert 0 <= metrics.frechet_distance_features(f1, f1.flip(0)) < 1e-11


def test_frechet_distance_refuses_what_it_cannot_be_computed_from():
    mu, cov = torch.zeros(3), torch.eye(3)
    with pytest.raises(ValueError, match="covariances"):
        metrics.frechet_distance(mu, cov, torch.zeros(4), torch.eye(4))
    with pytest.raises(ValueError, match="finite"):
        metrics.frechet_distance(mu, cov, mu, cov * math.nan)
    assert metrics.frechet_distance(0., 4., 3., 1.) == pytest.approx(9 + 1)     # of one number, as np.cov gives it
    assert metrics.frechet_distance(.1, 1., [.3], [[1.]]) == pytest.approx(.04, rel=1e-14)      # in float64, as they come
    small = torch.diag(torch.tensor([1., 1e-6, 1.]))
    for pair in ((cov, -cov), (-cov, cov), (-cov, torch.diag(torch.tensor([1., 1., 0.]))), (-cov, -cov),
                 (small, torch.diag(torch.tensor([1., -1., 1.]))), (torch.ones(3, 3) - cov, cov)):
        with pytest.raises(ValueError, match="semidefinite"):
            metrics.frechet_distance(mu, pair[0], mu, pair[1])
    with pytest.raises(ValueError, match="at least 2"):
        metrics.frechet_distance_features(torch.zeros(1, 3), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="dimensions"):
        metrics.frechet_distance_features(torch.zeros(5, 3), torch.zeros(5, 4))
    with pytest.raises(ValueError, match="finite"):
        metrics.frechet_distance_features(torch.zeros(5, 3) / 0, torch.zeros(5, 3))


def test_frechet_latent_distance_is_the_distance_to_a_standard_normal():
    z = 1.7 * normal(50, 6) + 0.4
    moments = metrics.Moments.of(z)
    expected = metrics.frechet_distance(moments.mean, moments.cov, torch.zeros(6), torch.eye(6))
    assert metrics.frechet_latent_distance(z) == pytest.approx(expected, rel=1e-9)
    white = torch.linalg.qr(normal(500, 4) - normal(500, 4).mean(0))[0] * math.sqrt(499)
    assert metrics.frechet_latent_distance(white) < 1e-20
    with pytest.raises(ValueError, match="at least 2"):
        metrics.frechet_latent_distance(z[:1])


# ------------------------------------------------------------------------------------------------------ statistics


def test_moments_are_those_of_torch_whatever_the_order_and_the_batches():
    f = (normal(301, 10) * 5 + 1000).float()  # far from 0: a sum of squares would lose its digits
    exact = f.double()
    for seed, size in ((None, 301), (1, 1), (2, 7), (3, 64)):
        g = f if seed is None else f[torch.randperm(301, generator=torch.Generator().manual_seed(seed))]
        moments = metrics.Moments(10)
        for part in g.split(size):
            moments.update(part)
        assert moments.n == 301
        assert (moments.mean - exact.mean(0)).abs().max() < 1e-9
        assert (moments.cov - exact.T.cov()).abs().max() < 1e-9


def test_merged_parts_are_the_whole():
    f = normal(100, 6) + 3
    parts = [metrics.Moments(6)] + [metrics.Moments.of(part) for part in f.split([1, 30, 69])]
    merged = metrics.Moments(6)
    for part in parts:
        merged.merge(part)
    assert merged.n == 100
    torch.testing.assert_close(merged.mean, f.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(merged.cov, f.T.cov(), rtol=1e-11, atol=1e-12)


def test_moments_refuse_one_sample_other_dimensions_and_nan():
    with pytest.raises(ValueError, match="at least 2 samples"):
        metrics.Moments.of(torch.zeros(1, 3)).cov  # noqa: B018
    moments = metrics.Moments(3)
    for bad, words in ((torch.zeros(2, 4), "3 dimensions"), (torch.full((2, 3), math.nan), "finite"),
                       (torch.zeros(3), "shape"), (torch.zeros(0, 3), "at least 1")):
        with pytest.raises(ValueError, match=words):
            moments.update(bad)
    with pytest.raises(ValueError, match="dimensions"):
        moments.merge(metrics.Moments(4))
    assert moments.n == 0
    array = np.arange(12.).reshape(4, 3)
    assert metrics.Moments.of(array).mean.tolist() == [4.5, 5.5, 6.5]


def _metrics_rank(i, rank, folder, f):
    patience = datetime.timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2, timeout=patience)
    mine = f[:5] if rank == 0 else f[5:]
    moments = metrics.Moments(f.shape[1]).update(mine).merge_ranks()
    torch.save((moments.state(), metrics.gather_rows(mine)), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_of_different_counts_merge_to_the_whole(tmp_path):
    f = normal(32, 4) + 7
    other = torch.multiprocessing.spawn(_metrics_rank, (1, str(tmp_path), f), join=False)
    _metrics_rank(0, 0, str(tmp_path), f)
    other.join()
    whole = metrics.Moments.of(f)
    for rank in range(2):
        state, rows = torch.load(tmp_path / f"rank{rank}.pt")
        assert state["n"] == 32
        torch.testing.assert_close(state["mean"], whole.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(state["scatter"], whole.scatter, rtol=1e-10, atol=1e-12)
        assert torch.equal(rows, f)
    assert torch.equal(metrics.gather_rows(f), f)  # without torch.distributed


def test_cache_is_reused_and_a_damaged_or_stale_file_is_rebuilt(tmp_path, capsys):
    built = []

    def build():
        built.append(1)
        return {"values": torch.arange(1000.0), "n": len(built)}

    first = metrics.cached(tmp_path, "kind", {"a": 1}, build)
    assert metrics.cached(tmp_path, "kind", {"a": 1}, build)["n"] == 1 == first["n"]
    assert metrics.cached(tmp_path, "kind", {"a": 2}, build)["n"] == 2  # another key, another file
    assert len(built) == 2 and not capsys.readouterr().err
    path = next(p for p in sorted(tmp_path.iterdir()) if torch.load(p)["n"] == 1)
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1  # one bit of the tensor, which torch.load would not notice
    stale = torch.load(path) | {"key": "{}"}
    for i, damage in enumerate((good[: len(good) // 2], b"", bytes(flipped), stale)):
        torch.save(damage, path) if isinstance(damage, dict) else path.write_bytes(damage)
        again = metrics.cached(tmp_path, "kind", {"a": 1}, build)
        assert len(built) == 3 + i and torch.equal(again["values"], first["values"])
        assert "rebuilding" in capsys.readouterr().err
        assert torch.load(path)["n"] == len(built)
    assert not list(tmp_path.glob("*.tmp"))


# ------------------------------------------------------------------------------------------------------- distances


def naive_kid(x, y):
    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b)) / len(a) + 1) ** 3

    x, y, n = x.tolist(), y.tolist(), len(x)
    same = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return same - 2 * sum(kernel(a, b) for a in x for b in y) / n**2


def test_kernel_distance_equals_a_double_loop():
    x, y = normal(12, 5, 1), normal(12, 5, 2) + 0.5
    mean, std = metrics.kernel_distance(x, y, subsets=3, size=12)
    assert mean == pytest.approx(naive_kid(x, y), rel=1e-10)
    assert std < 1e-12  # every subset is the whole set


def test_kernel_distance_is_unbiased():
    f = normal(4000, 4)
    values = torch.tensor([metrics.kernel_distance(a, b, 1, 10)[0] for a, b in zip(f[:2000].split(10), f[2000:].split(10))])
    assert values.mean().abs() < 4 * values.std() / math.sqrt(len(values))
    assert values.min() < 0 < values.max()
    # counting the diagonals would shift it by far more than that error
    biased = (f.square().sum(1) / 4 + 1).pow(3).mean() / 10 * 2
    assert biased > 8 * values.std() / math.sqrt(len(values))


def test_kernel_distance_refuses_subsets_larger_than_the_sets():
    for arguments in ((normal(5, 3), normal(9, 3), 2, 6), (normal(5, 3), normal(5, 3), 2, 1)):
        with pytest.raises(ValueError, match="cannot draw"):
            metrics.kernel_distance(*arguments)
    with pytest.raises(ValueError, match="dimensions"):
        metrics.kernel_distance(normal(5, 3), normal(5, 4), 2, 2)


def test_inception_score_of_uniform_is_one_and_of_balanced_certainty_the_number_of_classes():
    assert metrics.inception_score(torch.full((100, 7), 1 / 7)) == pytest.approx((1.0, 0.0), abs=1e-6)
    one_hot = torch.eye(7).repeat(20, 1)
    assert metrics.inception_score(one_hot) == pytest.approx((7.0, 0.0), rel=1e-12)
    # two splits, one of them all one class: mean and population std of 7 and 1
    half = torch.cat([one_hot, torch.eye(7)[:1].repeat(140, 1)])
    assert metrics.inception_score(half, splits=2) == pytest.approx((4.0, 3.0), rel=1e-12)


def test_inception_score_refuses_too_few_rows_and_what_are_no_probabilities():
    with pytest.raises(ValueError, match="splits"):
        metrics.inception_score(torch.full((9, 2), 0.5))
    for bad in (torch.ones(10, 2), torch.tensor([[1.5, -0.5]]).repeat(10, 1)):
        with pytest.raises(ValueError, match="probabilities"):
            metrics.inception_score(bad)
    with pytest.raises(ValueError, match="finite"):
        metrics.inception_score(torch.full((10, 2), math.nan))


def test_precision_recall_on_constructed_sets():
    real = torch.arange(10.0)[:, None]  # with k=1 each ball has radius 1
    cases = [(real, (1.0, 1.0)), (real + 100, (0.0, 0.0)),
             (torch.tensor([[0.0], [1.0], [2.0], [500.0]]), (0.75, 1.0)),  # 500 has a ball of 498 that covers all
             (torch.tensor([[0.0], [0.25], [0.5], [0.75]]), (1.0, 0.2))]  # balls of .25: of the real ones 0 and 1
    for fake, expected in cases:
        assert metrics.precision_recall(real, fake, k=1, chunk=3) == pytest.approx(expected)
    edge = torch.tensor([[-1.0], [20.0], [40.0]])  # -1 lies on the boundary of 0's ball: inside
    assert metrics.precision_recall(real, edge, k=1)[0] == pytest.approx(1 / 3)
    far = 1e6 + .01 * torch.randn(60, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    apart = metrics.precision_recall(far[:30], far[30:])        # by differences, which 1e6 costs no digits
    assert apart == metrics.precision_recall(far[:30] - 1e6, far[30:] - 1e6) and min(apart) < 1
    with pytest.raises(ValueError, match="at least 4 rows"):
        metrics.precision_recall(real[:3], real, k=3)
    with pytest.raises(ValueError, match="k must"):
        metrics.precision_recall(real, real, k=0)


def test_grid_modes_counts_high_quality_points_and_includes_the_edge():
    centers = torch.tensor([[0.0, 0.0], [8.0, 0.0], [0.0, 8.0]])
    points = torch.tensor([[0.0, 0.0], [0.75, 0.0], [0.0, -0.7501], [8.0, 0.5], [4.0, 4.0]])
    assert metrics.grid_modes(points, centers, 0.25) == (2, pytest.approx(3 / 5))  # .75 is 3 std; .7501 beyond
    assert metrics.grid_modes(points[4:], centers, 0.25) == (0, 0.0)
    grid = torch.cartesian_prod(*[torch.arange(-4., 5., 2.)] * 2)           # .05 and 3 std are not exact in binary
    for dtype in (torch.float32, torch.float64):
        edge, beyond = (grid.to(dtype) + torch.tensor([x, 0.], dtype=dtype) for x in (.15, .15001))
        assert metrics.grid_modes(edge, grid, 0.05) == (25, 1.0) and metrics.grid_modes(beyond, grid, 0.05) == (0, 0.0)
        runaway = torch.tensor([[1e7, 0.]], dtype=dtype)        # makes no other point better
        assert metrics.grid_modes(torch.cat([beyond, runaway]), grid, 0.05) == (0, 0.0)
    with pytest.raises(ValueError, match="std"):
        metrics.grid_modes(points, centers, 0.0)
    with pytest.raises(ValueError, match="dimensions"):
        metrics.grid_modes(torch.zeros(3, 3), centers, 1.0)


def test_stacked_modes_of_counted_labels():
    assert metrics.stacked_modes(torch.arange(1000)) == (1000, pytest.approx(0.0, abs=1e-12))
    modes, kl = metrics.stacked_modes(torch.tensor([3, 3, 3, 999]))
    assert modes == 2 and kl == pytest.approx(0.75 * math.log(750) + 0.25 * math.log(250))
    assert metrics.stacked_modes(torch.tensor([1, 1]), classes=4) == (1, pytest.approx(math.log(4)))
    assert metrics.stacked_modes(torch.tensor([3, 250], dtype=torch.uint8))[0] == 2     # 999 is no uint8
    for bad in (torch.tensor([-1]), torch.tensor([1000]), torch.zeros(2), torch.zeros(0, dtype=torch.long)):
        with pytest.raises(ValueError, match="labels must"):
            metrics.stacked_modes(bad)


def test_reconstruction_mse_is_the_mean_square_in_float64():
    x = torch.zeros(2, 1, 2, 2)
    assert metrics.reconstruction_mse(x, x + 0.5) == 0.25
    assert metrics.reconstruction_mse(x.double(), x + 1e-20) == pytest.approx(1e-40)  # 0 in float32
    assert metrics.reconstruction_mse([.1], [.3]) == pytest.approx(.04, rel=1e-14)
    with pytest.raises(ValueError, match="one shape"):
        metrics.reconstruction_mse(x, x[:1])


# ----------------------------------------------------------------------------------------------- Inception network


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """(path, state dict): random weights of the published shapes, scaled so that activations neither die nor grow."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, value in metrics.Inception().state_dict().items():
        draw = torch.randn(value.shape, generator=generator)
        if name.endswith(("conv.weight", "fc.weight")):
            state[name] = draw * math.sqrt(2 / value[0].numel())
        elif name.endswith(("bn.weight", "running_var")):
            state[name] = 1 + 0.2 * draw.clamp(-2, 2)
        else:
            state[name] = 0.1 * draw
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(state, path)
    return path, state


@pytest.fixture
def inception(random_inception, monkeypatch):
    """The path of the random weights, which pass for the genuine ones while a test runs."""
    path, _ = random_inception
    monkeypatch.setattr(metrics, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    return str(path)


def test_inception_has_the_checkpoints_names_and_shapes():
    state = metrics.Inception().state_dict()
    assert len(state) == 472 == 94 * 5 + 2 and sum(v.numel() for v in state.values()) == 23_885_392
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    per_unit = {"conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"}
    units = {k.rsplit(".", 2)[0] for k in state if not k.startswith("fc")}
    assert len(units) == 94 and all(f"{u}.{t}" in state for u in units for t in per_unit)
    for name, shape in {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "Conv2d_4a_3x3.conv.weight": (192, 80, 3, 3),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1), "Mixed_5c.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_5d.branch3x3dbl_3.conv.weight": (96, 96, 3, 3), "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6a.branch3x3dbl_3.conv.weight": (96, 96, 3, 3), "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6b.branch7x7dbl_5.conv.weight": (192, 128, 1, 7), "Mixed_6c.branch7x7dbl_2.conv.weight": (160, 160, 7, 1),
        "Mixed_6e.branch7x7_3.bn.running_var": (192,), "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3), "Mixed_7b.branch3x3_2b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1), "Mixed_7c.branch1x1.conv.weight": (320, 2048, 1, 1),
        "fc.weight": (1008, 2048), "fc.bias": (1008,),
    }.items():  # fmt: skip
        assert shapes[name] == shape, name


def test_folded_network_equals_the_unfolded_one(inception, random_inception):
    plain = metrics.Inception().eval()
    plain.load_state_dict(random_inception[1], strict=False)
    x = torch.rand(2, 3, 299, 299, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        expected, got = plain(x), metrics.load_inception(inception)(x)
    assert (got - expected).norm() / expected.norm() < 1e-5
    assert expected.std() > 0.1  # alive


def test_pools_do_not_count_padding_and_the_last_block_takes_the_maximum():
    def identity(block):  # let the pooling branch show the pooled input: kernel 1, weight 1, no shift
        unit = block.branch_pool
        torch.nn.init.dirac_(unit.conv.weight)
        unit.bn.eps = 0.0
        block.chains = []
        return block.eval()

    x = torch.rand(1, 2048, 5, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mean = identity(metrics.block_8(2048, "avg"))(x)
        most = identity(metrics.block_8(2048, "max"))(x)
    for i, j in ((0, 0), (0, 2), (2, 2), (4, 1)):
        window = x[0, :192, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].flatten(1)
        torch.testing.assert_close(mean[0, :, i, j], window.mean(1))
        torch.testing.assert_close(most[0, :, i, j], window.amax(1))
    blocks = dict(metrics.Inception().named_children())
    kinds = {name: block.pool for name, block in blocks.items() if name.startswith("Mixed")}
    assert [name for name, kind in kinds.items() if kind == "max"] == ["Mixed_7c"]
    assert [name for name, kind in kinds.items() if kind == "reduce"] == ["Mixed_6a", "Mixed_7a"]


def test_input_flavours_are_their_definitions_and_differ():
    u8 = torch.randint(0, 256, (1, 3, 20, 30), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    ours, tf = metrics.inception_input(u8, "pytorch-fid"), metrics.inception_input(u8, "tf")
    assert ours.shape == tf.shape == (1, 3, 299, 299) and (ours - tf).abs().mean() > 0.01
    for offset, got, scale in ((0.5, ours, lambda v: v / 127.5 - 1), (0.0, tf, lambda v: (v - 128) / 128)):
        for i, j in ((0, 0), (150, 77), (298, 298), (13, 201)):
            y, x = (max((k + offset) * n / 299 - offset, 0) for k, n in ((i, 20), (j, 30)))
            a, b = int(y), int(x)
            c, d = min(a + 1, 19), min(b + 1, 29)
            p = u8[0].double()
            top = p[:, a, b] * (1 - x + b) + p[:, a, d] * (x - b)
            bottom = p[:, c, b] * (1 - x + b) + p[:, c, d] * (x - b)
            expected = scale(top * (1 - y + a) + bottom * (y - a))
            torch.testing.assert_close(got[0, :, i, j].double(), expected, rtol=0, atol=2e-5)
    grey = u8[:, :1]
    assert torch.equal(metrics.inception_input(grey, "tf"), metrics.inception_input(grey.expand(-1, 3, -1, -1), "tf"))


def test_features_of_a_list_of_sizes_are_those_of_each_alone_and_logits_have_no_bias(inception, random_inception):
    images = [torch.randint(0, 256, (3, n, n), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
              for n in (16, 24, 16)]
    extract = metrics.InceptionFeatures(inception)
    features, logits = extract(images)
    assert features.shape == (3, 2048) and logits.shape == (3, 1008)
    for i, image in enumerate(images):
        alone = extract(image[None])[0][0]
        assert (features[i] - alone).norm() / alone.norm() < 1e-5
    torch.testing.assert_close(logits, features @ random_inception[1]["fc.weight"].T)
    rough = metrics.InceptionFeatures(inception, amp="bf16")
    error = (rough(images)[0] - features).norm() / features.norm()
    assert 1e-4 < error < 0.2 and "bf16" in rough.name and rough.key != extract.key


def test_only_the_genuine_weights_are_read(random_inception, inception, tmp_path, monkeypatch):
    path, state = random_inception
    pickled = tmp_path / "code.pth"
    torch.save({"x": print}, pickled)

    def genuine(file):
        monkeypatch.setattr(metrics, "INCEPTION_SHA256", hashlib.sha256(file.read_bytes()).hexdigest()[:8])

    counted = tmp_path / "counted.pth"  # some conversions carry batch norm's counters
    torch.save({**state, "Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(0)}, counted)
    genuine(counted)
    metrics.load_inception(str(counted))
    short = tmp_path / "short.pth"
    torch.save({k: v for k, v in state.items() if k != "Mixed_6b.branch1x1.conv.weight"}, short)
    wide = tmp_path / "wide.pth"
    torch.save({**state, "fc.bias": torch.zeros(1000)}, wide)
    for file, words in ((pickled, "tensors"), (short, "Mixed_6b.branch1x1.conv.weight"), (wide, "fc.bias")):
        genuine(file)
        with pytest.raises(metrics.UserError, match=words):
            metrics.load_inception(str(file))
    monkeypatch.undo()  # back to the published hash, which random weights do not have
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "hub/checkpoints" / metrics.INCEPTION_FILE).write_bytes(path.read_bytes())      # torch.hub would not look
    with pytest.raises(metrics.UserError, match="is not the 2015"):
        metrics.load_inception("auto")
    for file, words in ((path, "is not the 2015"), (pickled, "is not the 2015"), (tmp_path / "none", "no file")):
        with pytest.raises(metrics.UserError, match=words) as error:
            metrics.InceptionFeatures(str(file))
        assert metrics.INCEPTION_FILE in str(error.value) and metrics.INCEPTION_URL in str(error.value)


def test_failed_download_is_one_sentence_naming_file_place_and_remedy(monkeypatch):
    def offline(url, **options):
        assert url == metrics.INCEPTION_URL and options["check_hash"] and options["weights_only"]
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(metrics.UserError, match="no network") as error:
        metrics.load_inception("auto")
    assert all(word in str(error.value) for word in (metrics.INCEPTION_FILE, metrics.INCEPTION_URL, "checkpoints"))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------ classifier and evaluator


def quadrants(n, split, seed, channels=1, stacked=False):
    """A labelled set anyone can classify: noise, and one bright quadrant of four (ten classes are declared if stacked)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 120, (n, channels, 16, 16), generator=generator, dtype=torch.uint8)
    y = torch.arange(n) % 4
    for image, label in zip(x, y):
        row, column = divmod(int(label), 2)
        image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 120
    name = "stacked-quadrants" if stacked else "quadrants"
    return data.Dataset(name, split, x, y, 1000 if stacked else 4, stacked)


@pytest.fixture(scope="module")
def sets():
    return quadrants(2000, "train", 1), quadrants(300, "test", 2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("metrics-cache")


def test_classifier_learns_is_cached_and_leaves_the_random_numbers_alone(sets, cache, monkeypatch, tmp_path):
    before = torch.random.get_rng_state()
    with torch.inference_mode():  # as a training loop may call it
        first = metrics.ClassifierFeatures(*sets, root=cache)
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.accuracy > 0.97 and first.name == "quadrants classifier features (d=128)"
    trained = metrics.train_classifier
    monkeypatch.setattr(metrics, "train_classifier", lambda *_: pytest.fail("trained again"))
    again = metrics.ClassifierFeatures(*sets, root=cache)
    features, logits = again(sets[1].x)
    assert again.accuracy == first.accuracy == (logits.argmax(1) == sets[1].y).float().mean().item()
    assert torch.equal(first(sets[1].x)[0], features) and features.shape == (300, 128)
    # statistics in its features are cached under its weights: trained on another machine, they are others
    monkeypatch.setitem(metrics.RECIPE, "lr", .09)
    monkeypatch.setattr(metrics, "train_classifier", trained)
    other = metrics.ClassifierFeatures(*sets, root=tmp_path)
    assert other.key["weights"] != first.key["weights"] == again.key["weights"]
    monkeypatch.undo()
    # a changed set, and a changed recipe, are not served from the cache
    calls = []
    monkeypatch.setattr(metrics, "train_classifier", lambda *a: calls.append(1) or trained(*a))
    monkeypatch.setitem(metrics.RECIPE, "seed", 5)
    metrics.ClassifierFeatures(*sets, root=cache)
    changed = quadrants(2000, "train", 1)
    changed.x[7, 0, 3, 3] += 1
    metrics.ClassifierFeatures(changed, sets[1], root=cache)
    assert len(calls) == 2


def test_classifier_is_deterministic(sets):
    recipe = metrics.classifier_recipe(1, torch.device("cpu")) | {"epochs": 1}
    one, two = (metrics.train_classifier(sets[0], 4, recipe, torch.device("cpu")) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):  # a caller's own changes nothing
        three = metrics.train_classifier(sets[0], 4, recipe, torch.device("cpu"))
    for other in two, three:
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


def test_classifiers_features_are_float32_under_a_callers_autocast(sets, cache):
    features = metrics.ClassifierFeatures(*sets, root=cache)
    plain = features(sets[1].x[:8])
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(plain, features(sets[1].x[:8])))


def test_distorted_images_are_turned_and_moved_as_far_as_said():
    """Li et al.'s copies: up to 15 degrees and 2 pixels, one in five untouched, black where nothing was."""
    dot = torch.full((2000, 1, 28, 28), -1.)
    dot[:, :, 10:14, 17:21] = 1.                                    # centre (11.5, 18.5), 5.83 from the picture's (13.5, 13.5)
    weight = lambda x: (x + 1).flatten(1) / (x + 1).flatten(1).sum(1, keepdim=True)
    rows, cols = (g.flatten().double() for g in torch.meshgrid(torch.arange(28.), torch.arange(28.), indexing="ij"))
    centre = lambda x: torch.stack([weight(x.double()) @ rows, weight(x.double()) @ cols], 1) - 13.5
    torch.manual_seed(0)
    moved = centre(metrics.distort(dot, 0, 2, 0.)) - centre(dot)
    assert 1.9 < moved[:, 0].max() <= 2.001 and -2.001 <= moved[:, 1].min() < -1.9 and moved.mean(0).abs().max() < .1
    turned = centre(metrics.distort(dot, 15, 0, 0.))
    assert turned.norm(dim=1).sub(centre(dot).norm(dim=1)).abs().max() < .1                   # about the middle
    angle = torch.rad2deg(torch.atan2(turned[:, 0], turned[:, 1]) - torch.atan2(centre(dot)[:, 0], centre(dot)[:, 1]))
    assert 14 < angle.max() < 15.5 and -15.5 < angle.min() < -14
    mixed = metrics.distort(dot, 15, 2, .2)
    same = (mixed - dot).flatten(1).abs().amax(1) < 1e-4
    assert .15 < same.double().mean() < .25 and mixed.min() > -1.001 and mixed[:, :, 25:].max() < -.999


def test_li_classifier_is_li_et_al_s_and_scores_what_it_is_asked_to(sets, cache, monkeypatch):
    """AIM's Table 1 scores MNIST by it. It is trained once, and the caller's random numbers stay."""
    net = metrics.build_classifier(metrics.LI, 10)
    shapes = [tuple(p.shape) for p in net.parameters() if p.dim() > 1]
    assert shapes == [(32, 1, 5, 5), (64, 32, 5, 5), (1024, 3136), (10, 1024)] and net.head[0].p == .3      # it keeps .7
    kinds = "Conv2d BatchNorm2d ReLU MaxPool2d Conv2d ReLU MaxPool2d Flatten Linear BatchNorm1d ReLU".split()
    assert [type(m).__name__ for m in net.body] == kinds
    features, logits = net(torch.zeros(3, 1, 28, 28))
    assert features.shape == (3, 1024) and logits.shape == (3, 10) and features.min() >= 0
    monkeypatch.setitem(metrics.LI, "epochs", 3)
    evaluator = metrics.Evaluator(*sets, 16, root=cache, samples=300, batch=100, li=True)
    real = data.to_float(sets[1].x)
    before = torch.random.get_rng_state()
    result = evaluator(lambda n: real[torch.randint(len(real), (n,))])
    assert torch.equal(before, torch.random.get_rng_state())
    assert evaluator.li.accuracy > .9 and 3.5 < result["is_li_real"] <= 4 and 3.5 < result["is_li"] <= 4
    probs = evaluator.li(sets[1].x)[1].double().softmax(1)
    assert result["is_li_real"] == pytest.approx(metrics.inception_score(probs)[0], rel=1e-5)
    one = evaluator(lambda n: real[:1].expand(n, -1, -1, -1))       # a single image: nothing to tell apart
    assert one["is_li"] == pytest.approx(1, abs=1e-5) and one["is_li_std"] == pytest.approx(0, abs=1e-5)
    assert "is_li: Li et al.'s classifier" in result["protocol"]
    monkeypatch.setattr(metrics, "train_classifier", lambda *_: pytest.fail("trained again"))
    plain = metrics.Evaluator(*sets, 16, root=cache, samples=300, batch=100)(lambda n: real[:n])
    again = metrics.Evaluator(*sets, 16, root=cache, samples=300, batch=100, li=True)(lambda n: real[:1].expand(n, -1, -1, -1))
    assert "is_li" not in plain and again == one
    coloured = dataclasses.replace(sets[1], x=sets[1].x.expand(-1, 3, -1, -1))
    with pytest.raises(ValueError, match="grey"):
        metrics.Evaluator(coloured, coloured, 16, root=cache, samples=300, li=True)


def test_aim_scores_mnist_by_li_et_al_s_classifier_and_nothing_else(tmp_path, monkeypatch):
    for folder in ("MNIST", "FashionMNIST"):
        write_mnist(tmp_path, 40, folder)
    monkeypatch.setitem(metrics.LI, "epochs", 1)
    flags = ["--steps", "1", "--batch", "10", "--samples", "20", "--device", "cpu", "--root", str(tmp_path), "--width", "4"]
    for dataset, asked in (("mnist", True), ("fashion-mnist", False)):
        assert cli(aim, "--dataset", dataset, *flags, "--out", str(tmp_path / dataset)) == 0
        last = json.loads((tmp_path / dataset / "log.jsonl").read_text().splitlines()[-1])
        assert ("is_li" in last) == ("is_li_real" in last) == asked and "is" in last
    pictures = tmp_path / "of" / "mnist"                            # a folder of this name is not the data set
    save_pictures(pictures, 20)
    assert cli(aim, "--dataset", str(pictures), *flags, "--out", str(tmp_path / "folder")) == 0


def test_classifier_needs_labels(sets, cache):
    bare = data.Dataset("bare", "train", sets[0].x, None, 0)
    with pytest.raises(metrics.UserError, match="no labels"):
        metrics.ClassifierFeatures(bare, bare, root=cache)


def test_evaluator_of_real_images_is_near_zero_deterministic_and_leaves_the_random_numbers_alone(sets, cache):
    evaluator = metrics.Evaluator(*sets, 16, root=cache, samples=300, batch=70)
    real = data.to_float(sets[1].x)

    def sample(n):  # real images, drawn at random
        return real[torch.randint(len(real), (n,))]

    before = torch.random.get_rng_state()
    one, two = evaluator(sample, lambda x: x * 0.5), evaluator(sample, lambda x: x * 0.5)
    assert torch.equal(before, torch.random.get_rng_state()) and one == two
    noise = evaluator(lambda n: torch.rand(n, 1, 16, 16) * 2 - 1)
    assert 0 <= one["fcd"] < 0.1 * noise["fcd"] and "mse" not in noise and "fid" not in one
    assert one["mse_pm1"] == pytest.approx(real.square().mean().item() / 4, rel=1e-6)
    assert one["mse"] == pytest.approx(one["mse_pm1"] / 4)
    assert len(one["class_share"]) == 4 and sum(one["class_share"]) == pytest.approx(1, abs=1e-5)
    assert one["class_min"] == pytest.approx(min(one["class_share"]), abs=1e-5)
    assert one["class_max"] == pytest.approx(max(one["class_share"]), abs=1e-5)
    assert 3 < one["is_real"] <= 4 and 3 < one["is"] <= 4 and one["confident"] > 0.5
    assert one["classifier_accuracy"] > 0.97
    expected = "fcd: quadrants classifier features (d=128), 300 test images vs 300 samples, 16x16; mse: 300 test images, 16x16"
    assert one["protocol"] == expected
    json.dumps(one)


def test_evaluator_scores_samples_as_they_would_be_saved(sets, cache):
    evaluator = metrics.Evaluator(*sets, 16, root=cache, samples=40, batch=40)
    exact = data.to_float(sets[1].x[:40])
    assert evaluator(lambda n: exact)["fcd"] == evaluator(lambda n: exact + 0.4 / 127.5)["fcd"]  # rounds to the same
    assert evaluator(lambda n: exact)["fcd"] != evaluator(lambda n: exact + 0.6 / 127.5)["fcd"]


def test_evaluator_refuses_bad_samples_points_and_too_few(sets, cache):
    evaluator = metrics.Evaluator(*sets, 16, root=cache, samples=20, batch=20)
    for bad in (torch.zeros(19, 1, 16, 16), torch.zeros(20, 256)):
        with pytest.raises(ValueError, match="must give 20 images"):
            evaluator(lambda n, bad=bad: bad)
    with pytest.raises(metrics.NotFinite, match="finite"):
        evaluator(lambda n: torch.full((20, 1, 16, 16), math.nan))
    with pytest.raises(metrics.NotFinite, match="finite"):
        evaluator(None, lambda x: x * math.nan)
    with pytest.raises(ValueError, match="10 samples"):
        metrics.Evaluator(*sets, 16, root=cache, samples=9)
    points = data.Dataset("grid25", "train", torch.zeros(50, 2), None, 0)
    with pytest.raises(ValueError, match="points"):
        metrics.Evaluator(points, points, 16, root=cache)


def test_evaluator_of_an_unlabelled_set_measures_reconstructions_only(sets, cache, capsys):
    bare = data.Dataset("bare", "train", sets[0].x[:50], None, 0)
    metrics.Evaluator(bare, bare, 16, root=cache)
    assert "bare has no labels" in capsys.readouterr().err
    result = metrics.Evaluator(bare, bare, 16, root=cache, samples=50)(lambda n: pytest.fail("drawn in vain"), lambda x: x)
    assert result == {"mse_pm1": 0.0, "mse": 0.0, "mse_std": 0.0, "protocol": "mse: 50 train images, 16x16"}
    half = metrics.Evaluator(bare, bare, 16, root=cache)(None, lambda x: x + 2 * (x.flatten(1).sum(1) > 0)[:, None, None, None])
    moved = data.to_float(bare.x).flatten(1).sum(1) > 0
    assert half["mse"] == pytest.approx(moved.double().mean().item(), rel=1e-6)      # error 1 where moved, else 0
    assert half["mse_std"] == pytest.approx(moved.double().std(correction=0).item(), rel=1e-6)
    with pytest.raises(ValueError, match="reconstruct must give"):
        metrics.Evaluator(bare, bare, 16, root=cache)(None, lambda x: x[:1])


def test_evaluator_of_a_stacked_set_counts_modes(cache):
    train, test = quadrants(2000, "train", 1, stacked=True), quadrants(300, "test", 2, stacked=True)
    evaluator = metrics.Evaluator(train, test, 16, root=cache, samples=640, batch=64)
    digits = [data.to_float(test.x[k : k + 1]) for k in range(4)]  # one image of each class
    triple = torch.cat([digits[3], digits[0], digits[2]], 1)
    result = evaluator(lambda n: triple.expand(n, -1, -1, -1))
    assert (result["modes"], result["kl"]) == (1, pytest.approx(math.log(1000)))
    assert evaluator.classifier.stacked_labels(data.to_uint8(triple)).tolist() == [302]
    assert result["modes_real"] == 64 and "fcd" not in result and "modes, kl" in result["protocol"]
    every = torch.stack([torch.cat([digits[a], digits[b], digits[c]], 1)[0]
                         for a in range(4) for b in range(4) for c in range(4)])
    result = evaluator(lambda n: every)
    assert (result["modes"], result["kl"]) == (64, pytest.approx(math.log(1000 / 64)))


def test_evaluator_prints_fid_with_the_weights_and_caches_the_real_statistics(sets, cache, inception, monkeypatch):
    train, test = sets[0], data.Dataset("quadrants", "test", sets[1].x[:12], sets[1].y[:12], 4)
    evaluator = metrics.Evaluator(train, test, 16, root=cache, samples=10, inception=inception)
    result = evaluator(lambda n: torch.zeros(n, 1, 16, 16))
    assert result["fid"] > 0 and "fid: 2015 Inception features (d=2048, pytorch-fid flavour), 12 test" in result["protocol"]
    monkeypatch.setattr(metrics, "collect", lambda *_: pytest.fail("the real statistics were computed again"))
    metrics.Evaluator(train, test, 16, root=cache, samples=10, inception=inception)
    with pytest.raises(pytest.fail.Exception):  # another size is another statistic
        metrics.Evaluator(train, test, 8, root=cache, samples=10, inception=inception)


def test_fid_on_mnist_is_against_the_training_set_as_published(sets, cache, inception, monkeypatch):
    """IVGAN's Table 2: 60,000 training images. Only fid, and only there: fcd keeps the test images."""
    train = dataclasses.replace(sets[0], name="mnist", x=sets[0].x[:14], y=sets[0].y[:14])
    test = dataclasses.replace(sets[1], name="mnist", x=sets[1].x[:12], y=sets[1].y[:12])
    asked = []
    monkeypatch.setattr(metrics, "ClassifierFeatures", lambda *_: types.SimpleNamespace(metric="fcd", name="c", accuracy=1.))
    monkeypatch.setattr(metrics, "real_statistics", lambda real, n, size, extract, *_: asked.append(
        (extract.metric, real.split, n)) or {"moments": None, "is": 1.})
    evaluator = metrics.Evaluator(train, test, 16, root=cache, samples=10, inception=inception)
    assert asked == [("fcd", "test", 12), ("fid", "train", 14)]
    assert evaluator.reference["fid"][0] is train and evaluator.reference["fcd"] == (test, 12)
    train, test, asked[:] = dataclasses.replace(train, name="cifar10"), dataclasses.replace(test, name="cifar10"), []
    metrics.Evaluator(train, test, 16, root=cache, samples=10, inception=inception)
    metrics.Evaluator(train, test, 16, root=cache, samples=10, inception=inception, fid_on_train=13)    # LatentMap's D11
    assert asked == [("fcd", "test", 12), ("fid", "test", 12), ("fcd", "test", 12), ("fid", "train", 13)]


# ---------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of pictures of several sizes and modes, one of them with subfolders."""
    base = tmp_path_factory.mktemp("pictures")
    for seed, name in enumerate(("a", "b")):
        (base / name / "sub").mkdir(parents=True)
        for i in range(10):
            size = (3, 16, 16) if i % 3 else (3, 20, 12)
            u8 = torch.randint(0, 256 - 80 * seed, size, generator=torch.Generator().manual_seed(100 * seed + i))
            image = Image.fromarray(u8.permute(1, 2, 0).to(torch.uint8).numpy())
            image = image.convert("L") if i == 5 else image
            image.save(base / name / ("sub" if i % 2 else ".") / f"{i}.png")
    return base


def command(capsys, *arguments):
    code = metrics.main([str(a) for a in arguments])
    return code, *capsys.readouterr()


def test_command_line_compares_folders_and_saved_statistics(folders, inception, tmp_path, capsys):
    a, b = folders / "a", folders / "b"
    weights = ("--weights", inception, "--device", "cpu", "--json")
    code, out, err = command(capsys, a, b, *weights, "--fid", "--kid", "--is", "--pr")
    result = json.loads(out)
    assert code == 0 and set(result) == {"fid", "kid", "kid_std", "is", "is_std", "precision", "recall", "protocol", "note"}
    assert result["fid"] > 0 and "n=10 is below 10,000" in result["note"]
    assert "pytorch-fid flavour" in result["protocol"] and "10/10" in err
    assert result["protocol"].endswith("a (n=10, mixed sizes) vs b (n=10, mixed sizes), kid: 100 subsets of 10, "
                                       "is: of B, 10 splits, precision and recall: k=3")
    saved = tmp_path / "a.pt"
    assert command(capsys, "stats", a, saved, *weights)[0] == 0
    code, out, _ = command(capsys, saved, b, *weights)
    assert json.loads(out)["fid"] == pytest.approx(result["fid"], rel=1e-6)  # singular covariances against the Gram form
    assert json.loads(out)["protocol"].endswith("a.pt (n=10, mixed sizes) vs b (n=10, mixed sizes)")
    assert json.loads(command(capsys, saved, saved, *weights)[1])["fid"] == 0.0
    few = json.loads(command(capsys, a, a, *weights, "--n", 5, "--batch", 2)[1])
    assert few["fid"] == 0.0 and "(n=5, mixed sizes)" in few["protocol"]
    code, out, err = command(capsys, saved, b, *weights, "--flavour", "tf")
    assert code == 2 and not out and "pytorch-fid flavour" in err and "tf flavour" in err
    code, out, err = command(capsys, saved, b, *weights, "--kid")
    assert code == 2 and "need pictures" in err
    linked = tmp_path / "linked"                                        # as data.py sees it: links followed, hidden ones not
    linked.mkdir()
    (linked / "far").symlink_to(b)
    save_pictures(linked / ".thumbs", 3)
    assert json.loads(command(capsys, a, linked, *weights)[1])["fid"] == result["fid"]
    content = bytearray(saved.read_bytes())
    content[len(content) // 2] ^= 1
    saved.write_bytes(content)
    code, out, err = command(capsys, saved, b, *weights)
    assert code == 2 and "no file of statistics" in err


def test_command_line_prints_no_fid_without_the_weights(folders, tmp_path, capsys, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    code, out, err = command(capsys, folders / "a", folders / "b")
    assert code == 2 and not out and err.count("\n") == 1 and metrics.INCEPTION_FILE in err
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: print("Downloading") or offline())
    code, out, err = command(capsys, folders / "a", folders / "b", "--json")
    assert code == 2 and not out and "Downloading" in err           # stdout is for the result alone
    wrong = tmp_path / "wrong.pth"
    torch.save({}, wrong)
    code, out, err = command(capsys, folders / "a", folders / "b", "--weights", wrong)
    assert code == 2 and not out and "not the 2015 Inception" in err


def test_command_line_fcd_needs_no_weights(folders, sets, capsys, monkeypatch, cache):
    monkeypatch.setattr(data, "load", lambda name, root, size=None, split="train": sets[split == "test"])
    code, out, _ = command(capsys, "quadrants:test", folders / "b", "--fcd", "--root", cache, "--device", "cpu", "--json")
    result = json.loads(out)
    assert code == 0 and result["fcd"] > 1 and "fid" not in result
    assert result["protocol"] == "quadrants classifier features (d=128), quadrants:test (n=300, 16x16) vs b (n=10, mixed sizes)"
    same = command(capsys, "quadrants:test", "quadrants:test", "--fcd", "--root", cache, "--device", "cpu", "--json")[1]
    assert json.loads(same)["fcd"] == 0.0
    assert "fcd" in command(capsys, "quadrants:test", "quadrants:train", "--fcd", "--root", cache, "--device", "cpu")[1]


def test_command_line_mistakes_are_one_sentence(folders, inception, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    bad = tmp_path / "bad"
    bad.mkdir()
    good = (folders / "a" / "0.png").read_bytes()
    (bad / "good.png").write_bytes(good)
    (bad / "cut.png").write_bytes(good[: len(good) // 2])
    (bad / "text.jpg").write_text("no picture")
    junk = tmp_path / "junk.pt"
    junk.write_bytes(b"junk")
    deep = tmp_path / "deep"
    deep.mkdir()
    (deep / "good.png").write_bytes(good)
    Image.fromarray(np.full((16, 16), 300, np.uint16)).save(deep / "dark.png")
    save_pictures(tmp_path / "split/Train", 2)
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "again").symlink_to(tmp_path / "loop")
    a, one = folders / "a", tmp_path / "one"
    one.mkdir()
    (one / "good.png").write_bytes(good)
    for arguments, words in (
        ((a,), ["two sources"]),
        (("stats", a), ["two sources"]),
        ((a, tmp_path / "empty"), ["holds no pictures"]),
        ((a, bad), ["cut.png", "text.jpg"]),
        ((a, one), ["at least 2"]),
        ((a, junk), ["junk.pt", "statistics"]),
        ((a, "nosuchset"), ["nosuchset"]),
        ((a, a, "--fcd"), ["labelled"]),
        ((a, a, "--n", "1"), ["--n"]),
        ((a, "grid25"), ["points"]),
        (("stats", a, tmp_path / "none" / "out.pt"), ["cannot write"]),
        (("stats", a, tmp_path / "out.stats"), ["cannot write", ".pt"]),
        ((a, a, "--is", "--n", "5"), ["--is needs 10 pictures, not 5"]),
        ((a, a, "--pr", "--n", "3"), ["--pr needs 4 pictures, not 3"]),
        ((a, a, "--device", "abacus"), ["--device abacus"]),
        ((a, deep), ["dark.png", "8 bits"]),
        ((a, tmp_path / "split"), ["training", f"{tmp_path / 'split'}:train"]),
        ((a, tmp_path / "loop"), ["loop"]),
        ((a, "x" * 300), ["xxx"]),
        (("stats", a, tmp_path / "out.pt", "--kid"), ["stats"]),
    ):
        code, out, err = command(capsys, *arguments, "--weights", inception, "--root", tmp_path)
        last = err.strip().splitlines()[-1]
        assert code == 2 and not out and last.startswith("metrics.py: "), (arguments, err)
        assert all(word in last for word in words) and "good.png" not in last, last
    if not torch.cuda.is_available():
        assert "no CUDA" in command(capsys, a, a, "--device", "cuda")[2]


def test_metrics_imports_alone(tmp_path):
    import subprocess
    import sys

    (tmp_path / "metrics.py").write_text(open(metrics.__file__).read())
    code = "import metrics, torch; print(metrics.frechet_latent_distance(torch.eye(3)))"
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and float(done.stdout) > 0, done.stderr


def test_kernel_distances_std_has_ddof_0():
    x, y = normal(40, 5, 1), normal(40, 5, 2)
    first = metrics.kernel_distance(x, y, 1, 10)[0]                 # the same seed: the first of the two
    mean, std = metrics.kernel_distance(x, y, 2, 10)
    assert std == pytest.approx(abs(first - mean)) and std > 1e-3


def test_compare_keeps_real_and_generated_apart(monkeypatch):
    f = {"real": torch.arange(20.)[:, None].double(), "fake": torch.tensor([[0.], [.1], [.2], [.3], [500.]]).double()}
    logits = 50 * torch.eye(10).repeat_interleave(10, 0)            # B lies class by class
    monkeypatch.setattr(metrics, "measure", lambda source, *_: {"features": f[source["name"]], "logits": logits})
    extract = types.SimpleNamespace(metric="fid", dim=2048, name="")
    source = lambda name, n: {"name": name, "n": n, "sizes": {(8, 8)}}
    compare = lambda wanted, n: metrics.compare(source("real", 20), source("fake", n), extract, wanted, None)
    got = compare({"pr"}, 5)
    assert got["precision"] == pytest.approx(.8) and got["recall"] == 1.
    assert compare({"is"}, 100)["is"] > 5


def test_statistics_of_another_count_or_network_are_others(tmp_path):
    class Extract:
        metric, dim, device, key = "x", 64, torch.device("cpu"), {"network": 1}
        __call__ = lambda self, u8: (u8.flatten(1).float(), u8.flatten(1).float())

    dataset, extract = counted(50), Extract()
    of = lambda n, size=None: metrics.real_statistics(dataset, n, size, extract, tmp_path)["moments"]
    assert [of(n).n for n in (20, 40, 20)] == [20, 40, 20]
    torch.testing.assert_close(of(40).mean, torch.full((64,), 19.5).double())           # those very images, unchanged
    extract.key = {"network": 2}
    extract.__class__.__call__ = lambda self, u8: (u8.flatten(1).float() + 1, u8.flatten(1).float())
    assert of(40).mean[0] == 20.5


# ======================================================================================================================
# ivgen.py: Intervention GAN
# ======================================================================================================================


def small(model="ivlsgan", **changes):
    """A small model of `model`'s kind in float32 on the CPU, and a batch for it."""
    config = dataclasses.replace(ivgen.preset(model, "digits"), size=32, width=4, latent=8, k=4, channels=1, batch=8,
                                 steps=100, noise=0., **changes)
    torch.manual_seed(0)
    return ivgen.IVGAN(config), torch.rand(8, 1, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def weights(network):
    return [p.detach().clone() for p in network.parameters()]


def moved(before, network):
    return any(not torch.equal(a, b) for a, b in zip(before, network.parameters()))


def test_block_substitution_is_an_intervention():
    """Definition 1: N(0, I) in, N(0, I) out; exactly the named block changes; Definition 2: together all coordinates."""
    z, noise = torch.randn(40_000, 12), torch.randn(40_000, 12)
    index = torch.randint(4, (40_000,))
    out = ivgen.block_substitute(z, index, 4, noise)
    assert out.mean(0).abs().max() < .03
    assert (torch.cov(out.T) - torch.eye(12)).abs().max() < .04
    changed = (out != z).view(-1, 4, 3)
    assert torch.equal(changed.all(2), F.one_hot(index, 4).bool()) and torch.equal(changed.any(2), changed.all(2))
    touched = [(ivgen.block_substitute(z[:1], torch.tensor([i]), 4, noise[:1]) != z[:1])[0] for i in range(4)]
    assert torch.stack(touched).sum(0).tolist() == [1] * 12
    with pytest.raises(ValueError, match="5 blocks do not divide a code of 12"):
        ivgen.block_substitute(z, index, 5, noise)


def test_block_substitution_passes_gradient_only_where_the_code_stays():
    z = torch.randn(3, 6, requires_grad=True)
    ivgen.block_substitute(z, torch.tensor([0, 1, 2]), 3, torch.randn(3, 6)).sum().backward()
    assert z.grad.tolist() == [[0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0]]


@pytest.mark.parametrize("size", [32, 64, 128])
def test_ivgan_networks_have_table_1s_shapes(size):
    z, x = torch.randn(2, 100), torch.randn(2, 3, size, size)
    g, d, e = ivgen.Generator(100, 3, size, 8), ivgen.Discriminator(3, size, 8, 4), ivgen.Encoder(100, 3, size, 8)
    assert g(z).shape == x.shape and g(z).abs().max() <= 1
    assert [tuple(o.shape) for o in d(x)] == [(2,), (2, 4)] and e(x).shape == (2, 100)


def test_ivgan_networks_at_64_pixels_are_table_1():
    convs = lambda net, kind: [(m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0])
                               for m in net.modules() if isinstance(m, kind)]
    trunk = [(3, 64, 4, 2), (64, 128, 4, 2), (128, 256, 4, 2), (256, 512, 4, 2)]
    d, e = ivgen.Discriminator(), ivgen.Encoder()
    assert convs(d, torch.nn.Conv2d) == trunk and d.real.in_features == 512 * 4 * 4 and d.block.out_features == 4
    assert convs(e, torch.nn.Conv2d) == [*trunk, (512, 100, 4, 2)] and not e[-1].affine
    assert convs(ivgen.Generator(), torch.nn.ConvTranspose2d) == [
        (100, 512, 4, 1), (512, 256, 4, 2), (256, 128, 4, 2), (128, 64, 4, 2), (64, 3, 4, 2)]
    norms = lambda norm: [type(m).__name__ == "BatchNorm2d" for m in ivgen.Discriminator(norm=norm).trunk if not
                          isinstance(m, torch.nn.LeakyReLU)]
    assert norms("table1") == [False, True] * 4 and norms("dcgan") == [False] + [False, True] * 3
    assert not any(norms("none"))
    weight = d.trunk[6].weight
    assert abs(weight.std() - .02) < 1e-3 and abs(d.trunk[7].weight.mean() - 1) < .01 and d.real.bias.item() == 0


def test_adversarial_losses_are_their_equations():
    real, fake = torch.randn(5), torch.randn(5)
    p, q = torch.sigmoid(real), torch.sigmoid(fake)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    close(ivgen.adversarial_loss_d("dcgan", real, fake), -(p.log().sum() + (1 - q).log().sum()) / 10)      # Eq. (1)
    close(ivgen.adversarial_loss_g("dcgan", fake), -q.log().mean())
    close(ivgen.adversarial_loss_d("lsgan", real, fake), (((real - 1) ** 2).sum() + ((fake + 1) ** 2).sum()) / 10)
    close(ivgen.adversarial_loss_g("lsgan", fake), (fake ** 2).mean() / 2)
    for base in ("wgan", "wgan-gp"):
        close(ivgen.adversarial_loss_d(base, real, fake), fake.mean() - real.mean())
        close(ivgen.adversarial_loss_g(base, fake), -fake.mean())
    logits, index = torch.randn(3, 4), torch.tensor([0, 3, 1])
    naive = sum(-math.log(math.exp(logits[j, i]) / sum(math.exp(v) for v in logits[j])) for j, i in enumerate(index)) / 3
    assert abs(ivgen.classification_loss(logits, index).item() - naive) < 1e-6                               # Eq. (3)
    x, y = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    close(ivgen.reconstruction_loss(x, y), (x - y).abs().sum() / x.numel())                                  # Eq. (6)


def test_gradient_penalty_of_a_linear_critic():
    """A critic <a, x> has gradient a everywhere: the penalty is (||a|| - 1)^2, whatever the images."""
    a = torch.randn(1, 4, 4, requires_grad=True)
    penalty = ivgen.gradient_penalty(lambda x: (x * a).sum((1, 2, 3)), torch.randn(6, 1, 4, 4), torch.randn(6, 1, 4, 4))
    assert abs(penalty.item() - (a.norm().item() - 1) ** 2) < 1e-4
    gradient, = torch.autograd.grad(penalty, a)                     # it is itself differentiable: that is what D descends
    torch.testing.assert_close(gradient, 2 * (a.norm() - 1) * a / a.norm())


def test_theorem_3_the_optimal_classifier_and_its_loss():
    """A table of logits trained on L_IV reaches f_i = p_i / sum_j p_j and the loss log k - JS(p_1..p_k)."""
    k, states = 4, 7
    p = torch.rand(k, states, dtype=torch.float64) + .05
    p /= p.sum(1, keepdim=True)
    logits = torch.zeros(states, k, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([logits], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def loss():
        return -(p.T * F.log_softmax(logits, 1)).sum() / k          # Eq. (3): E_i E_{x ~ p_i} -log f_i(x)

    def closure():
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    optimiser.step(closure)
    torch.testing.assert_close(F.softmax(logits, 1), (p / p.sum(0)).T, rtol=0, atol=1e-4)      # Eq. (4)
    assert abs(loss().item() - (math.log(k) - ivgen.multi_js(p).item())) < 1e-7                # Eq. (5)


def test_multi_js_of_equation_2():
    p = torch.rand(2, 9, dtype=torch.float64)
    p /= p.sum(1, keepdim=True)
    m = p.mean(0)
    two = .5 * (p[0] * (p[0] / m).log()).sum() + .5 * (p[1] * (p[1] / m).log()).sum()
    assert abs(ivgen.multi_js(p) - two) < 1e-12
    assert abs(ivgen.multi_js(p[[0, 0, 0]])) < 1e-12                                           # zero iff all equal
    assert abs(ivgen.multi_js(torch.eye(4, dtype=torch.float64)) - math.log(4)) < 1e-12        # log k where disjoint
    assert abs(ivgen.multi_js(p, torch.tensor([1., 0.], dtype=torch.float64))) < 1e-12


def test_example_1_square_fitting():
    """On a grid of cells: JS(X0, X1) is log 2 for every a in (0, 1], the four-way JS is (1 + a) log 2."""
    n = 20

    def square(left, low):
        cells = torch.zeros(2 * n, 2 * n, dtype=torch.float64)
        cells[low:low + n, left:left + n] = 1 / n ** 2
        return cells.flatten()

    seen = []
    for shift in range(1, n + 1):
        a = shift / n
        x0, x1, y1, y2 = square(0, 0), square(shift, n), square(0, n), square(shift, 0)
        assert abs(ivgen.multi_js(torch.stack([x0, x1])) - math.log(2)) < 1e-12
        seen.append(ivgen.multi_js(torch.stack([x0, x1, y1, y2])).item())
        assert abs(seen[-1] - (1 + a) * math.log(2)) < 1e-12
    assert seen == sorted(set(seen))               # so it has a slope in a, towards overlap


def only(monkeypatch, term):
    """Switches every term but `term` off, by weight where there is one and by a zero loss otherwise."""
    zero = lambda base, *logits: sum(v.sum() * 0 for v in logits)
    if term != "adv":
        monkeypatch.setattr(ivgen, "adversarial_loss_d", zero)
        monkeypatch.setattr(ivgen, "adversarial_loss_g", zero)
    on = {"iv": dict(lam=0., lam_e=0.), "rec": dict(mu=0., mu_e=0.), "adv": dict(lam=0., mu=0., lam_e=1e-30, mu_e=0.)}
    return on[term]


def one_half(model, x, half):
    """Forwards with fixed noise, then D's half or G's and E's half of an iteration; the losses before the update."""
    torch.manual_seed(5)
    images = model.forwards(x)
    return model.step_d(x, images) if half == "d" else model.step_g_and_e(x, images)


@pytest.mark.parametrize("half,term,watch,sign,movers", [
    ("d", "adv", "d_adv", -1, {"D"}), ("d", "iv", "f_ce", -1, {"D"}),
    ("g", "adv", "g_adv", -1, {"G"}), ("g", "iv", "iv", -1, {"G", "E"}), ("g", "rec", "rec", -1, {"G", "E"})])
def test_each_term_moves_its_networks_its_way(monkeypatch, half, term, watch, sign, movers):
    """D and f lower the cross entropy; G and E raise it (iv = -CE falls); all lower the reconstruction; G fools D."""
    model, x = small(**only(monkeypatch, term), lr=1e-4, lr_e=1e-4)
    if term == "adv":
        model.optimisers["E"].param_groups[0]["lr"] = 0.
    before = {name: weights(net) for name, net in model.named_children()}
    value = lambda losses: (losses["rec_x"] + losses["rec_z"] if watch == "rec" else losses[watch]).item()
    first = value(one_half(model, x, half))
    assert {name for name, net in model.named_children() if moved(before[name], net)} == movers
    assert sign * (value(one_half(model, x, half)) - first) > 0
    for mover in movers & {"G", "E"} if len(movers) > 1 else ():    # each of the two alone goes the same way
        model, x = small(**only(monkeypatch, term), lr=1e-4, lr_e=1e-4)
        model.optimisers[({"G", "E"} - {mover}).pop()].param_groups[0]["lr"] = 0.
        first = value(one_half(model, x, half))
        assert sign * (value(one_half(model, x, half)) - first) > 0, mover


def test_classifier_term_reaches_trunk_and_its_own_head_only(monkeypatch):
    model, x = small(**only(monkeypatch, "iv"))
    trunk, real, block = (weights(net) for net in (model.D.trunk, model.D.real, model.D.block))
    one_half(model, x, "d")
    assert moved(trunk, model.D.trunk) and moved(block, model.D.block) and not moved(real, model.D.real)


def test_e_sign_code_lets_e_lower_the_cross_entropy(monkeypatch):
    model, x = small(**only(monkeypatch, "iv"), e_sign="code", lr=1e-4, lr_e=1e-4)
    model.optimisers["G"].param_groups[0]["lr"] = 0.
    first = one_half(model, x, "g")["iv"].item()
    assert one_half(model, x, "g")["iv"].item() > first             # iv = -CE rises: E now helps f


def test_gradients_are_equation_11_in_each_networks_own_weights():
    """G's and E's gradients against a naive evaluation of Eq. (11), term by term, with weights no two of which agree."""
    model, x = small(mu=.5, lam=.25, mu_e=.7, lam_e=1.3)
    twin = copy.deepcopy(model)
    for name, optimiser in model.optimisers.items():
        model.optimisers[name] = torch.optim.SGD(optimiser.param_groups[0]["params"], lr=1.)
    before = {name: weights(getattr(model, name)) for name in "GE"}
    one_half(model, x, "g")
    torch.manual_seed(5)
    z = torch.randn(8, 8)
    fake, w = twin.G(z), twin.E(x)
    x_w = twin.G(w)
    index = torch.randint(4, (8,))
    noise, w_i = torch.randn(8, 8), w.clone()
    for j in range(8):                                              # Alg. 1, line 8, sample by sample
        at = slice(2 * index[j], 2 * index[j] + 2)
        w_i[j, at] = noise[j, at]
    x_i = twin.G(w_i)
    adv = (twin.D(fake)[0] ** 2).mean() / 2
    recon = (x_w - x).abs().mean() + (twin.E(x_i) - w_i).abs().mean()
    l_iv = (twin.D(x_i)[1].log_softmax(1)[torch.arange(8), index]).mean()
    for name, loss in (("G", adv + .25 * recon + .5 * l_iv), ("E", 1.3 * recon + .7 * l_iv)):
        want = torch.autograd.grad(loss, list(getattr(twin, name).parameters()), retain_graph=True)
        for old, new, gradient in zip(before[name], getattr(model, name).parameters(), want):
            torch.testing.assert_close(old - new.detach(), gradient, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("iv,plain", [("ivdcgan", "dcgan"), ("ivlsgan", "lsgan")])
def test_baselines_are_ivgan_with_terms_off(iv, plain):
    runs = []
    for name, off in ((iv, dict(mu=0., lam=0., mu_e=0., lam_e=0.)), (plain, {})):
        model, x = small(name, **off)
        torch.manual_seed(3)
        for _ in range(3):
            model.step(x)
        runs.append(model.state_dict())
    assert runs[0].keys() == runs[1].keys() and all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0] if "extra" not in k)


def test_mrgan_moves_towards_what_d_calls_real():
    """D9: G and E lower -log D(G(E(x))); the authors' code has the sign reversed."""
    model, x = small("mrgan", lr=1e-4, lr_e=1e-4, lam=0., lam_e=0.)
    first = one_half(model, x, "g")
    assert set(first) == {"g_adv", "mode"}                          # without lam no reconstruction
    assert one_half(model, x, "g")["mode"] < first["mode"]


@pytest.mark.parametrize("name", ["wgan", "wgan-gp"])
def test_wgan_moves_g_every_fifth_step(name):
    model, x = small(name)
    for step in range(1, 11):
        before = weights(model.G)
        losses = model.step(x)
        assert moved(before, model.G) == (step % 5 == 0) and ("g_adv" in losses) == (step % 5 == 0)
    clipped = max(p.abs().max().item() for p in model.D.parameters()) <= .01
    assert clipped == (name == "wgan") and ("d_gp" in losses) == (name == "wgan-gp")


def test_e_steps_counts_updates():
    model, x = small(e_steps=10)
    model.step(x)
    assert {n: next(iter(o.state.values()))["step"].item() for n, o in model.optimisers.items()} == {"D": 1, "G": 1, "E": 10}


def test_instance_noise_follows_its_schedule():
    model, _ = small()
    assert ivgen.preset("ivlsgan", "cifar10").noise_schedule == ivgen.LSGAN_NOISE
    model.config.noise, model.config.steps, model.config.noise_schedule = 1., 400, ivgen.LSGAN_NOISE
    x, seen = torch.zeros(64, 1, 32, 32), []
    for epoch in (0, 49, 50, 99, 100, 199, 200, 399):               # the authors' epochs, of 400
        model.iteration = epoch
        seen.append(round(model.noisy(x).std().item(), 3))
    assert seen == [.05, .05, .01, .01, .001, .001, 0., 0.]


def test_ema_averages_g_and_is_what_samples():
    model, x = small(ema=.5)
    start, z = weights(model.G), torch.randn(4, 8)
    model.step(x)
    for mean, a, b in zip(model.average.parameters(), start, model.G.parameters()):
        torch.testing.assert_close(mean, (a + b) / 2)
        assert mean.is_leaf                                         # no graph that grows with every step
    model.average.eval()
    assert torch.equal(model.decode(z), model.average(z))


def test_inference_has_no_side_effects():
    model, x = small()
    model.step(x)
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    z = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([model.decode(z[i:i + 1]) for i in range(3)])
    torch.testing.assert_close(model.decode(z), alone, atol=1e-5, rtol=1e-4)    # no image depends on its neighbours
    assert model.encode(x).shape == (8, 8) and torch.equal(rng, torch.get_rng_state()) and model.sample(5).shape[0] == 5
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items() if "extra" not in k) and model.G.training
    with pytest.raises(ValueError, match="dcgan has no encoder"):
        small("dcgan")[0].encode(x)


def test_presets_are_the_papers():
    c = ivgen.preset("ivlsgan", "cifar10")
    assert (c.size, c.width, c.latent, c.batch, c.epochs, c.steps) == (64, 64, 100, 64, 400, 0)
    assert (c.k, c.lam, c.mu, c.lam_e, c.mu_e, c.lr, c.lr_e, c.beta1, c.beta2) == (4, .25, .5, 1, 1, 1e-4, 5e-3, .5, .999)
    assert {m: ivgen.preset(m, "mnist").base for m in ivgen.MODELS} == {
        "dcgan": "dcgan", "lsgan": "lsgan", "wgan": "wgan", "wgan-gp": "wgan-gp", "mrgan": "dcgan", "ivdcgan": "dcgan",
        "ivlsgan": "lsgan"}
    assert ivgen.preset("ivlsgan", "stacked-mnist").steps == 100_000


def test_flags_scale_a_weights_companion():
    flags = dict.fromkeys(f.name for f in dataclasses.fields(ivgen.Config)) | {"dataset": "cifar10", "lr": 2e-4, "mu": 0.}
    c = ivgen.settings(flags, None, ivgen.preset)
    assert (c.lr, round(c.lr_e, 9), c.mu, c.mu_e, c.lam_e) == (2e-4, 1e-2, 0, 0, 1)


def sgd_step(model, part, network, seed=6):
    """The gradient by which `part()` moves `network`: SGD at rate 1 in the optimiser's place."""
    model.optimisers[network] = torch.optim.SGD(getattr(model, network).parameters(), 1.)
    before = weights(getattr(model, network))
    torch.manual_seed(seed)
    part()
    return [a - b.detach() for a, b in zip(before, getattr(model, network).parameters())]


def test_ds_gradient_is_line_10_on_noisy_images():
    model, x = small(mu=.3)
    model.config.noise, model.config.noise_schedule = 1., ((0, .5),)
    images, twin = model.forwards(x), copy.deepcopy(model.D)
    got = sgd_step(model, lambda: model.step_d(x, images), "D")
    torch.manual_seed(6)
    real = x + .5 * torch.randn_like(x)
    fake = images["x_z"].detach() + .5 * torch.randn_like(images["x_z"])
    loss = ((twin(real)[0] - 1) ** 2).mean() / 2 + ((twin(fake)[0] + 1) ** 2).mean() / 2
    loss = loss + .3 * F.cross_entropy(twin(images["x_i"].detach())[1], images["index"])
    for a, b in zip(got, torch.autograd.grad(loss, list(twin.parameters()))):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("name, changes", [("ivlsgan", {}), ("ivlsgan", dict(e_sign="code")), ("mrgan", {})])
def test_gs_and_es_gradients_on_noisy_images(name, changes):
    """As Eq. (11)'s test, with noise, and of MRGAN (D9) and `--e-sign code` (D3) too."""
    model, x = small(name, mu=.5, lam=.25, mu_e=.7, lam_e=1.3, **changes)
    model.config.noise, model.config.noise_schedule = 1., ((0, .5),)
    torch.manual_seed(5)
    images, twin = model.forwards(x), copy.deepcopy(model.D)
    g, e = list(model.G.parameters()), list(model.E.parameters())
    fresh = copy.deepcopy(model)
    torch.manual_seed(5)
    images2 = fresh.forwards(x)
    old = {n: weights(getattr(fresh, n)) for n in "GE"}
    for n in "GE":
        fresh.optimisers[n] = torch.optim.SGD(getattr(fresh, n).parameters(), 1.)
    torch.manual_seed(6)
    fresh.step_g_and_e(x, images2)
    torch.manual_seed(6)
    noisy = lambda y: y + .5 * torch.randn_like(y)
    d = twin(noisy(images["x_z"]))[0]
    rec = (images["x_w"] - x).abs().mean()
    if name == "mrgan":
        adv, extra = F.softplus(-d).mean(), F.softplus(-twin(noisy(images["x_w"]))[0]).mean()
    else:
        adv, extra = d.square().mean() / 2, -F.cross_entropy(twin(images["x_i"])[1], images["index"])
        rec = rec + (model.E(images["x_i"]) - images["w_i"]).abs().mean()
    e_loss = -.7 * extra if changes else 1.3 * rec + .7 * extra
    for n, params, loss in (("G", g, adv + .25 * rec + .5 * extra), ("E", e, e_loss)):
        want = torch.autograd.grad(loss, params, retain_graph=True)
        for a, new, b in zip(old[n], getattr(fresh, n).parameters(), want):
            torch.testing.assert_close(a - new.detach(), b, rtol=1e-3, atol=2e-6)


def test_gradient_penalty_is_taken_between_real_and_generated_with_weight_10(monkeypatch):
    seen = []
    critic = lambda x: seen.append(x.detach()) or x.square().sum((1, 2, 3)) / 2          # its gradient is x
    penalty = ivgen.gradient_penalty(critic, torch.full((200, 1, 2, 2), 3.), torch.ones(200, 1, 2, 2))
    x = seen[0]
    assert (x == x[:, :1, :1, :1]).all() and 1 <= x.min() < 1.1 and 2.9 < x.max() <= 3    # one u for each image
    torch.testing.assert_close(penalty.detach(), (x.flatten(1).norm(dim=1) - 1).square().mean())
    points = torch.ones(200, 3)                                     # and of points, where the critic's gradient is 1
    assert ivgen.gradient_penalty(lambda x: x[:, 0], 2 * points, points).item() == 0
    model, x = small("wgan-gp")
    monkeypatch.setattr(ivgen, "adversarial_loss_d", lambda base, *v: sum(u.sum() * 0 for u in v))
    monkeypatch.setattr(ivgen, "gradient_penalty", lambda critic, real, fake: critic(x).mean())
    twin, images = copy.deepcopy(model.D), model.forwards(x)
    got = sgd_step(model, lambda: model.step_d(x, images), "D")
    want = torch.autograd.grad(twin(x)[0].mean(), list(twin.parameters()), allow_unused=True)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else 10 * b, rtol=1e-3, atol=2e-6)


def test_d_moves_before_g_and_e():
    model, x = small(e_steps=2)
    called = []
    recorded = lambda name, f: lambda *a, **k: called.append(name) or f(*a, **k)
    for name in ("forwards", "step_d", "step_g_and_e"):
        setattr(model, name, recorded(name, getattr(model, name)))
    model.step(x)
    assert called == ["forwards", "step_d", "step_g_and_e", "forwards", "step_g_and_e"]


def test_gs_running_statistics_are_those_of_prior_noise():
    model, x = small("ivlsgan")
    seen, norm = [], next(m for m in model.G if isinstance(m, torch.nn.BatchNorm2d))
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().mean((0, 2, 3))))
    for _ in range(3):
        model.step(x)
    expected = torch.zeros_like(seen[0])
    for mean in seen[::3]:                                          # G(z), G(E(x)), G(O_i(E(x))), ...
        expected = .9 * expected + .1 * mean
    assert len(seen) == 9
    torch.testing.assert_close(norm.running_mean, expected)


def test_ema_takes_gs_running_statistics():
    model, x = small(ema=.5)
    model.step(x)
    assert all(torch.equal(a, b) for a, b in zip(model.average.buffers(), model.G.buffers()))


def test_presets_of_the_baselines_and_of_ivaae_in_full():
    of = lambda model, dataset, *names: tuple(getattr(ivgen.preset(model, dataset), n) for n in names)
    assert of("wgan", "cifar10", "lr", "critic_steps", "mu", "lam") == (5e-5, 5, 0, 0)
    assert of("wgan-gp", "cifar10", "lr", "beta1", "beta2", "critic_steps") == (1e-4, 0, .9, 5)
    assert of("mrgan", "cifar10", "mu", "lam", "mu_e", "lam_e", "noise_schedule") == (.25, .25, .25, .25, ())
    assert of("ivdcgan", "cifar10", "noise_schedule")[0] == ((0, .05), (.25, .01), (.5, .003), (.75, .001))
    assert of("ivlsgan", "cifar10", "noise_schedule")[0] == ((0, .05), (.125, .01), (.25, .001), (.5, 0.))
    assert of("ivaae-rad", "mnist", "network", "width", "decay", "lam_mmd") == ("fc", 128, ((100, .5), (200, .25)), 10)
    assert of("ivaae-rad", "celeba", "network", "width", "t", "lam", "mu", "mu_e", "decay", "lam_mmd") == (
        "conv", 128, 4, 1, 4, 2, ((30, .5), (50, .1), (100, .01)), 100)
    assert [aim.preset(m, "cifar10").lam for m in aim.MODELS] == [None, None, 1, None, 0, 1, 1]
    c = latentmap.preset("age", "cifar10")
    assert (c.size, c.age_steps, c.age_mu, c.age_lam) == (32, 2, 5, 500)
    assert (c.alpha, c.critic_steps, c.d_steps, c.r1) == (.25, 2, 5, 10)


# ======================================================================================================================
# Runs: what every command line promises
# ======================================================================================================================


def folder_of_pictures(path, n=96, size=32):
    """n unlabelled pictures of random blobs: a data set that needs no classifier, so a run of it takes a second."""
    path.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(n):
        coarse = torch.rand(1, 3, 4, 4, generator=generator)
        torchvision.utils.save_image(F.interpolate(coarse, (size, size), mode="bilinear"), path / f"{i:03d}.png")
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return folder_of_pictures(tmp_path_factory.mktemp("pictures") / "blobs")


def cli(module, *args):
    """(exit code) of a command line, in this process."""
    return module.run_cli(lambda: module.main([str(a) for a in args]))


def quick(pictures, tmp_path, *more):
    """Flags of a run of a few seconds."""
    return ("--dataset", pictures, "--root", tmp_path / "root", "--size", 32, "--width", 4, "--latent", 8, "--batch", 16,
            "--samples", 50, "--device", "cpu", "--amp", "off", *more)


def final_weights(run):
    return torch.load(run / "last.pt", weights_only=True)["weights"]


def test_a_run_leaves_what_it_promises(pictures, tmp_path):
    run = tmp_path / "run"
    assert cli(ivgen, *quick(pictures, tmp_path, "--steps", 6, "--eval-every", 3, "--out", run)) == 0
    config = json.loads((run / "config.json").read_text())
    assert config["model"] == "ivlsgan" and config["k"] == 4 and {"command", "torch", "device", "revision"} <= set(config)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "d_adv" in line] == [3, 6]   # no step's losses are missing from the means
    assert {"d_adv", "f_ce", "g_adv", "rec_x", "rec_z", "iv", "img_per_s", "epoch"} <= set(lines[0])
    assert [line["step"] for line in lines if "protocol" in line] == [3, 6] and "mse" in lines[-1]
    assert not any("fid" in line for line in lines)                 # no Inception weights here, so no such number
    for name in ("samples/000003.png", "samples/000006.png", "recon/000006.png", "figures/interventions-000006.png",
                 "figures/real.png", "last.pt", "best.pt"):
        assert (run / name).stat().st_size > 0
    assert not list(run.glob("*.tmp"))
    state = torch.load(run / "last.pt", weights_only=True)          # plain data only
    assert state["step"] == 6 and state["model"] == "ivlsgan" and state["file"] == "ivgen"
    assert cli(ivgen, *quick(pictures, tmp_path, "--steps", 2, "--out", run)) == 0
    assert torch.load(tmp_path / "run.1" / "last.pt", weights_only=True)["step"] == 6      # moved aside, not overwritten


def test_a_killed_run_resumes_bit_for_bit(pictures, tmp_path):
    """SIGKILL at a step of no importance, and again after resuming: the end is that of a run never stopped."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = quick(pictures, tmp_path, "--steps", 24, "--eval-every", 8, "--ema", .9)
    assert cli(ivgen, *flags, "--out", whole) == 0
    script = ("import sys, os, signal, torch, ivgen; at = int(sys.argv.pop(1)); torch.set_num_threads(int(sys.argv.pop(1)))\n"
              "add = ivgen.Run.add\n"
              "def kill(self, step, losses):\n"
              "    add(self, step, losses)\n"
              "    if step == at: os.kill(os.getpid(), signal.SIGKILL)\n"
              "ivgen.Run.add = kill\n"
              "sys.exit(ivgen.run_cli(ivgen.main))")
    for at, how in ((5, (*flags, "--out", killed)), (19, ("--resume", killed, "--device", "cpu"))):
        done = subprocess.run([sys.executable, "-c", script, str(at), str(torch.get_num_threads()), *map(str, how)], cwd=HERE)
        assert done.returncode == -signal.SIGKILL
    with open(killed / "log.jsonl", "a") as log:
        log.write('{"step": 1')                                     # a line torn by the kill
    assert cli(ivgen, "--resume", killed, "--device", "cpu") == 0
    a, b = (torch.load(run / "last.pt", weights_only=True) for run in (whole, killed))
    assert a["step"] == b["step"] == 24 and a["best"] == b["best"]
    for key, value in a["weights"].items():
        assert torch.equal(value, b["weights"][key]) if torch.is_tensor(value) else value == b["weights"][key], key
    for name in a["optimisers"]:
        for n, slot in a["optimisers"][name]["state"].items():
            assert all(torch.equal(v, b["optimisers"][name]["state"][n][k]) for k, v in slot.items())
    timeless = lambda run: [{k: v for k, v in json.loads(line).items() if k not in ("img_per_s", "eval_s", "eval_seconds")}
                            for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line for line in timeless(whole) if "protocol" in line] == [line for line in timeless(killed) if "protocol" in line]


def test_sigterm_saves_and_leaves(pictures, tmp_path, monkeypatch, capsys):
    run, add = tmp_path / "run", ivgen.Run.add
    handler = signal.getsignal(signal.SIGTERM)

    def stop(self, step, losses):
        add(self, step, losses)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ivgen.Run, "add", stop)
    assert cli(ivgen, *quick(pictures, tmp_path, "--steps", 9, "--out", run)) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == handler              # a notebook's Ctrl-C is its own again
    assert torch.load(run / "last.pt", weights_only=True)["step"] == 4 and "--resume" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run(pictures, tmp_path, monkeypatch, capsys):
    run, step = tmp_path / "run", ivgen.IVGAN.step

    def bad(self, x):
        losses = step(self, x)
        return losses | {"rec_x": losses["rec_x"] * float("nan")} if self.iteration == 7 else losses

    monkeypatch.setattr(ivgen.IVGAN, "step", bad)
    assert cli(ivgen, *quick(pictures, tmp_path, "--steps", 20, "--eval-every", 5, "--out", run)) == 3
    err = capsys.readouterr().err
    assert "step 7" in err and "'rec_x' is nan" in err and "Traceback" not in err
    assert torch.load(run / "last.pt", weights_only=True)["step"] == 5


def test_sample_and_bench(pictures, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli(ivgen, *quick(pictures, tmp_path, "--steps", 2, "--out", run)) == 0
    log = (run / "log.jsonl").read_text()
    assert cli(ivgen, "--resume", run, "--sample", 7, "--device", "cpu") == 0
    assert len(list((run / "drawn").glob("*.png"))) == 7 and (run / "drawn.png").exists()
    assert (run / "log.jsonl").read_text() == log
    capsys.readouterr()
    assert cli(ivgen, "--bench", 2, "--width", 4, "--size", 32, "--batch", 4, "--device", "cpu") == 0
    timed = json.loads(capsys.readouterr().out)
    assert min(timed[k] for k in ("images_per_s", "gflop_per_step", "tflop_per_s", "peak_memory_mib")) > 0
    assert timed["steps"] == 5                                      # a whole round of WGAN's


def test_a_relative_folder_is_found_again_and_commands_are_kept(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(pictures.parent)
    run = tmp_path / "here" / "run"
    assert cli(ivgen, *quick(pictures.name, tmp_path, "--steps", 1, "--out", run)) == 0
    monkeypatch.chdir(run)
    assert cli(ivgen, "--resume", ".", "--steps", 2, "--device", "cpu") == 0
    monkeypatch.setattr(sys, "argv", ["ivgen.py", "third"])
    assert cli(ivgen, "--resume", ".", "--steps", 3, "--device", "cpu") == 0
    config = json.loads((run / "config.json").read_text())
    assert config["dataset"] == str(pictures) and config["command"] == "ivgen.py third" and len(config["earlier_commands"]) == 2
    (run / "config.json").write_text("{")                           # damaged: no reason not to go on
    assert cli(ivgen, "--resume", ".", "--steps", 4, "--device", "cpu") == 0
    capsys.readouterr()
    assert cli(ivgen, *quick(pictures, tmp_path, "--steps", 1, "--out", ".")) == 2
    assert "cannot be moved aside from within" in capsys.readouterr().err


def test_best_starts_anew_with_another_metric_or_folder(tmp_path):
    state = {"best": .5, "config": {"inception": "", "samples": 50}}
    config = types.SimpleNamespace(inception="", samples=50)
    assert ivgen.best_so_far(state, config, tmp_path) is None       # no best.pt here
    (tmp_path / "best.pt").touch()
    assert ivgen.best_so_far(state, config, tmp_path) == .5
    assert ivgen.best_so_far(state, types.SimpleNamespace(inception="auto", samples=50), tmp_path) is None  # fid now, not fcd
    assert ivgen.best_so_far(state, types.SimpleNamespace(inception="", samples=60), tmp_path) is None      # less biased


def test_a_run_outlives_a_damaged_log_a_moved_folder_and_a_full_disk(pictures, tmp_path, monkeypatch, capsys):
    run, first = tmp_path / "run", tmp_path / "first"
    shutil.copytree(pictures, first)
    assert cli(ivgen, *quick(first, tmp_path, "--steps", 1, "--out", run)) == 0
    lines = (run / "log.jsonl").read_bytes()
    (run / "log.jsonl").write_bytes(lines + b'[1]\n{"a": 1}\n{"step": "x"}\n\xff\xfe\n')
    first.rename(tmp_path / "second")
    assert cli(ivgen, "--resume", run, "--steps", 2, "--device", "cpu") == 2
    assert cli(ivgen, "--resume", run, "--steps", 2, "--device", "cpu", "--dataset", tmp_path / "second") == 0
    log = (run / "log.jsonl").read_bytes()
    assert log.startswith(lines) and {json.loads(line)["step"] for line in log.splitlines()} == {1, 2}
    capsys.readouterr()

    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 64 vs 0\nand a long tale")

    whole = (run / "last.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert cli(ivgen, "--resume", run, "--steps", 3, "--device", "cpu") == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "step 3: " in err and "cannot be written" in err and (run / "last.pt").read_bytes() == whole
    for name in ("config.json", "log.jsonl"):                       # still a run, and not to be written into
        (run / name).unlink()
    assert cli(ivgen, *quick(pictures, tmp_path, "--steps", 1, "--out", run)) == 0
    assert (tmp_path / "run.1" / "last.pt").read_bytes() == whole


def test_a_compiler_that_fails_is_a_sentence(pictures, tmp_path, monkeypatch, capsys):
    def fails(model):
        raise torch._dynamo.exc.TorchRuntimeError("no g++ here\nand a long tale")

    monkeypatch.setattr(ivgen, "compile_networks", fails)
    assert cli(ivgen, *quick(pictures, tmp_path, "--steps", 1, "--compile", "--out", tmp_path / "run")) == 2
    assert "--compile failed (no g++ here)" in capsys.readouterr().err.splitlines()[-1]


def test_a_file_alone_can_be_timed(tmp_path):
    shutil.copy(aim.__file__, tmp_path)
    flags = ["--bench", "1", "--batch", "4", "--device", "cpu", "--dataset", "mnist", "--width", "4", "--amp", "off"]
    done = subprocess.run([sys.executable, "aim.py", *flags], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode == 0 and json.loads(done.stdout)["steps"] == 5, done.stderr


@pytest.mark.parametrize("dataset, flags, samples", [
    ("stacked-mnist", (), 26_000), ("stacked-mnist", ("--inception", "auto"), 26_000),     # PacGAN's
    ("cifar10", ("--inception", "auto"), 50_000), ("mnist", ("--inception", "auto"), 60_000), ("mnist", (), 10_000)])
def test_samples_are_the_protocols(dataset, flags, samples, monkeypatch):
    seen = []
    monkeypatch.setattr(ivgen, "train", lambda config, *_: seen.append(config.samples))
    assert cli(ivgen, "--dataset", dataset, "--device", "cpu", *flags) == 0 and seen == [samples]


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_noticed_or_harmless(tmp_path):
    keys = ("file", "model", "config", "step", "weights", "optimisers", "scaler", "batches", "rng", "best")
    state = dict.fromkeys(keys) | {"file": "ivgen", "weights": {"w": torch.arange(50.)}}
    path, refused = tmp_path / "last.pt", 0
    torch.save(state, path)
    whole = path.read_bytes()
    inside = whole.index(torch.arange(50.).numpy().tobytes())
    for position in [*range(inside, inside + 200, 20), *range(0, len(whole), 11)]:
        changed = bytearray(whole)
        changed[position] ^= 4
        path.write_bytes(changed)
        try:
            assert torch.equal(ivgen.load_checkpoint(path, "ivgen")["weights"]["w"], torch.arange(50.))
        except ivgen.UserError:
            refused += 1
        else:
            assert not inside <= position < inside + 200
    assert refused > 20


def test_two_processes_train_one_model(pictures, tmp_path):
    run, script = tmp_path / "run", tmp_path / "script.py"
    script.write_text("import sys, torch; sys.path.insert(0, sys.argv.pop(1)); import ivgen\nsave = ivgen.Run.save\n"
                      "def keep(self, name, file, model, step, *rest):\n    save(self, name, file, model, step, *rest)\n"
                      "    torch.save(dict(model.named_parameters()), f'{self.folder}.{step}.{self.machine.rank}.pt')\n"
                      "ivgen.Run.save = keep\nsys.exit(ivgen.run_cli(ivgen.main))")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone", script,
         HERE, *map(str, quick(pictures, tmp_path, "--steps", 4, "--eval-every", 4, "--out", run))],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=HERE)
    assert done.returncode == 0, done.stderr[-2000:]
    state = torch.load(run / "last.pt", weights_only=True)
    assert state["step"] == 4 and len(state["rng"]) == 2 and not torch.equal(state["rng"][0][0], state["rng"][1][0])
    assert state["config"]["steps_per_epoch"] == 3                  # 96 pictures, 16 a rank and step: each rank sees its half
    for step in (0, 4):
        one, two = (torch.load(f"{run}.{step}.{rank}.pt") for rank in range(2))
        assert all(torch.equal(one[k], two[k]) for k in one), step


@pytest.mark.parametrize("world", [1, 2])
def test_a_gradient_is_applied_to_its_own_weights_however_it_lies(world, monkeypatch):
    """Fused Adam walks memory: of a gradient laid out otherwise than its weight it would apply each number to another."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: t.mul_(2))       # as if the other rank had the same
    start, g = torch.randn(4, 3, 4, 4), torch.randn(4, 3, 4, 4)
    after = []
    for layout, fused in ((torch.contiguous_format, False), (torch.channels_last, True)):
        p = torch.nn.Parameter(start.clone(memory_format=layout))
        optimiser, machine = torch.optim.Adam([p], .1, fused=fused), ivgen.Machine()
        machine.world = world
        for n in range(3):
            machine.apply(optimiser, [p], [g.cos() * n + g])        # contiguous
        after.append(p.detach())
    torch.testing.assert_close(after[1], after[0])


def test_two_ranks_with_one_batch_are_one_rank(monkeypatch):
    """A whole step of a convolutional model through the averaging of ranks, with equal ranks."""
    states = []
    for world in (1, 2):
        model, x = small("ivlsgan")
        model.machine.world = world
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: t.mul_(2))
        torch.manual_seed(2)
        model.step(x)
        states.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*states))


def test_half_precision_steps_e_twice_and_can_be_switched_to(pictures, tmp_path, capsys):
    """Loss scaling allows an optimiser one step an update; a run without it has nothing of it in its checkpoint."""
    run = tmp_path / "run"
    assert cli(ivgen, *quick(pictures, tmp_path, "--steps", 2, "--out", run)) == 0
    assert cli(ivgen, "--resume", run, "--steps", 4, "--amp", "fp16") == 0, capsys.readouterr().err
    assert json.loads((run / "config.json").read_text())["precision"] == "fp16"
    model, x = small("ivlsgan", e_steps=3)
    model = ivgen.IVGAN(model.config, ivgen.Machine("cpu", "fp16"))
    assert all(v.isfinite() for v in model.step(x).values())


def test_es_running_statistics_are_those_of_data(monkeypatch):
    """What `encode` normalises with; G(O_i(E(x))) passes through E as well, in Eq. (6), and must not count (D12)."""
    model, x = small("ivlsgan")
    seen = []
    last = list(model.E)[-1]
    last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().float().mean(0)))
    for _ in range(3):
        model.step(x)
    expected = torch.zeros_like(seen[0])
    for mean in seen[::2]:                                          # E(x), E(x_i), E(x), ...
        expected = .9 * expected + .1 * mean
    assert len(seen) == 6
    torch.testing.assert_close(last.running_mean, expected)


def test_an_evaluation_takes_es_statistics_anew(pictures, tmp_path):
    """D12: last.pt's are the plain mean over whole batches of training images with the final weights; those of training lag."""
    run = tmp_path / "run"
    assert cli(ivgen, *quick(pictures, tmp_path, "--steps", 3, "--out", run)) == 0
    state = ivgen.load_checkpoint(run, "ivgen")
    names = {field.name for field in dataclasses.fields(ivgen.Config)}
    config = ivgen.Config(**{k: v for k, v in state["config"].items() if k in names})
    model, seen = ivgen.build(config), []
    model.load_state_dict(state["weights"])
    last = list(model.E)[-1]
    mean, var = last.running_mean.clone(), last.running_var.clone()
    last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    train_set = data.load(str(pictures), tmp_path / "root", config.size, "train")
    for x, _ in data.ordered(train_set, 50 * config.batch, config.batch, "cpu", config.size):
        if len(x) == config.batch:
            model.E(x)
    assert len(seen) > 1
    torch.testing.assert_close(mean, torch.stack([h.mean(0) for h in seen]).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(var, torch.stack([h.var(0) for h in seen]).mean(0), rtol=1e-4, atol=1e-5)
    assert {m.momentum for m in model.E.modules() if hasattr(m, "momentum")} == {.1}


@pytest.mark.parametrize("off, missing", [(dict(mu=0., mu_e=0.), {"iv", "f_ce"}), (dict(lam=0., lam_e=0.), {"rec_x", "rec_z"})])
def test_a_term_without_weight_is_not_computed(off, missing):
    model, x = small("ivlsgan", **off)
    torch.manual_seed(1)
    losses, before = model.step(x), weights(model)
    full, _ = small("ivlsgan")
    assert missing == set(full.step(x)) - set(losses) and all(torch.isfinite(p).all() for p in before)


def test_e_without_anything_to_descend_rests():
    model, x = small("ivlsgan", e_sign="code", mu=0., mu_e=0.)      # G still reconstructs: lam
    before = weights(model.E)
    assert {"g_adv", "rec_x", "rec_z"} <= set(model.step(x)) and not moved(before, model.E)
    model, x = small("mrgan", mu=0., lam=0., mu_e=0., lam_e=0.)     # DCGAN again
    assert set(model.step(x)) == {"d_adv", "g_adv"} and model.E is None


def test_a_weight_that_is_not_finite_ends_the_run(tmp_path, capsys):
    """The very step that is saved and evaluated: its losses were finite, its update was not."""
    run = tmp_path / "run"
    assert cli(aim, *aim_quick(tmp_path, "--steps", 1, "--lr", 1e39, "--out", run)) == 3
    assert "step 1: the weights" in capsys.readouterr().err
    assert torch.load(run / "last.pt", weights_only=True)["step"] == 0


def test_a_run_is_not_resumed_into_another(pictures, tmp_path, capsys):
    for name in ("a", "b"):
        assert cli(ivgen, *quick(pictures, tmp_path, "--steps", 1, "--out", tmp_path / name)) == 0
    assert cli(ivgen, "--resume", tmp_path / "a", "--steps", 2, "--out", tmp_path / "b") == 2
    assert "holds something else" in capsys.readouterr().err
    assert cli(ivgen, "--resume", tmp_path / "a", "--sample", 3, "--device", "cpu") == 0
    assert cli(ivgen, "--resume", tmp_path / "a", "--sample", 2, "--device", "cpu") == 0
    assert len(list((tmp_path / "a/drawn").iterdir())) == 2         # never of two checkpoints


def test_a_finished_run_is_not_resumed_in_silence(pictures, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli(ivgen, *quick(pictures, tmp_path, "--steps", 2, "--out", run)) == 0
    for flags in ((), ("--steps", 1), ("--epochs", .01)):
        assert cli(ivgen, "--resume", run, *flags) == 0
        assert "the run is at step 2 already" in capsys.readouterr().err
        assert json.loads((run / "config.json").read_text())["steps"] == 2


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ivgen, "load_both", lambda *_: pytest.fail("work was begun"))
    (tmp_path / "file").write_text("")
    assert cli(ivgen, *quick(pictures, tmp_path, "--steps", 1, "--out", tmp_path / "file/run")) == 2
    assert "cannot write to the run folder" in capsys.readouterr().err


def test_grey_and_coloured_halves_do_not_go_together(tmp_path, capsys):
    folder_of_pictures(tmp_path / "set/train")
    for path in folder_of_pictures(tmp_path / "set/test").glob("**/*.png"):
        Image.open(path).convert("L").save(path)
    assert cli(ivgen, *quick(tmp_path / "set", tmp_path, "--steps", 1)) == 2
    assert "training pictures have 3 channels, test pictures 1" in capsys.readouterr().err


BAD_FLAGS = {
    "no steps": (["--steps", "0"], "argument --steps: 0 must be a number from 1 up"),
    "seed too large": (["--seed", "1" + "0" * 20], "argument --seed"),
    "endless": (["--epochs", "inf"], "argument --epochs: inf must be a number from 0 up"),
    "no sample": (["--resume", "RUN", "--sample", "0"], "argument --sample: 0 must be a number from 1 up"),
    "weight of no term": (["--model", "dcgan", "--mu", "1"], "--mu does nothing for --model dcgan"),
    "k does not divide d": (["--k", "7"], "--k 7 does not divide the latent dimension 16"),
    "unknown model": (["--model", "vqgan"], "--model vqgan is not one of dcgan"),
    "unknown flag": (["--learning-rate", "1"], "unrecognized arguments: --learning-rate"),
    "flag of another kind": (["--steps", "many"], "invalid int value: 'many'"),
    "size not a power of two": (["--size", "48"], "--size 48 is not a power of two"),
    "sample without a run": (["--sample", "4"], "--sample needs --resume"),
    "no such run": (["--resume", "/nowhere/run"], "there is no checkpoint"),
    "unknown device": (["--device", "abacus"], "--device abacus"),
    "not a number": (["--mu", "nan"], "--mu nan must be a number"),
    "unknown dataset": (["--dataset", "minst"], "mnist"),
    "no such folder": (["--dataset", "/nowhere/pictures"], "/nowhere/pictures"),
    "points": (["--dataset", "grid25"], "needs images"),
    "too many steps": (["--steps", "1" + "0" * 20], "argument --steps: 1" + "0" * 20 + " is too large"),
    "too large": (["--size", str(2 ** 60)], "is too large"),
    "too long a name": (["--resume", "x" * 300], "name too long"),
    "unset variable": (["--resume", ""], "argument --resume: an empty path was given"),
    "two things at once": (["--resume", "RUN", "--sample", "2", "--bench", "2"], "not allowed with argument"),
    "no encoder to use it": (["--mu", "0", "--lam", "0", "--e-steps", "2"], "--e-steps does nothing"),
    "timing of nothing": (["--bench", "2", "--dataset", "/nowhere/pictures"], "/nowhere/pictures"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_end_in_one_sentence(case, capsys, tmp_path):
    flags, sentence = BAD_FLAGS[case]
    assert cli(ivgen, *flags, "--out", tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_that_is_absent_is_an_error(capsys):
    assert cli(ivgen, "--device", "cuda") == 2
    assert "no usable CUDA device" in capsys.readouterr().err


class Evil:
    def __reduce__(self):
        return print, ("code in a pickle was run",)


def test_bad_folders_and_checkpoints_end_in_one_sentence(pictures, tmp_path, capsys, monkeypatch):
    def ends(sentence, *flags):
        assert cli(ivgen, *flags) == 2
        captured = capsys.readouterr()
        err = captured.err.splitlines()[-1]
        assert sentence in err and "Traceback" not in captured.err and "was run" not in captured.out, captured.err

    flags = quick(pictures, tmp_path, "--steps", 2)
    (tmp_path / "empty").mkdir()
    ends("empty", "--dataset", tmp_path / "empty", "--root", tmp_path / "root")
    broken = folder_of_pictures(tmp_path / "broken", n=3)
    (broken / "001.png").write_bytes((broken / "001.png").read_bytes()[:60])
    ends("001.png", "--dataset", broken, "--root", tmp_path / "root", "--size", 32)
    tiny = folder_of_pictures(tmp_path / "tiny", n=3, size=4)
    ends("000.png", "--dataset", tiny, "--root", tmp_path / "root", "--size", 32)
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    ends("mnist", "--dataset", "mnist", "--root", tmp_path / "nothing")
    (tmp_path / "file").write_text("in the way")
    ends("cannot write", *flags, "--out", tmp_path / "file" / "run")

    run = tmp_path / "run"
    assert cli(ivgen, *flags, "--out", run) == 0
    capsys.readouterr()
    ends("model ivlsgan, not dcgan", "--resume", run, "--model", "dcgan")
    ends("width 4, not 8", "--resume", run, "--width", 8)
    whole = (run / "last.pt").read_bytes()
    (run / "last.pt").write_bytes(whole[:len(whole) // 2])
    ends("damaged or truncated", "--resume", run)
    torch.save(Evil(), run / "last.pt")
    ends("refused", "--resume", run)
    torch.save({"weights": {}}, run / "last.pt")
    ends("not a checkpoint of ivgen.py", "--resume", run)
    state = torch.load(io.BytesIO(whole), weights_only=True)
    torch.save(state | {"file": "aim"}, run / "last.pt")
    ends("written by aim.py", "--resume", run)
    torch.save(state | {"config": state["config"] | {"width": 8}}, run / "last.pt")
    ends("another shape", "--resume", run)


def test_gradients_of_unlike_ranks_are_averaged(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: t.mul_(3))           # the other rank's is twice ours
    p, machine = torch.nn.Parameter(torch.zeros(3)), ivgen.Machine()
    machine.world = 2
    machine.apply(torch.optim.SGD([p], 1.), [p], [torch.ones(3)])
    assert p.tolist() == [-1.5] * 3


def test_drawn_pictures_are_the_samples_as_they_would_be_scored(tmp_path):
    x = torch.rand(300, 3, 8, 8) - .4                               # a narrow range, which must stay one
    parts = iter(x.split([250, 50]))
    ivgen.draw_images(types.SimpleNamespace(sample=lambda n: next(parts)), tmp_path, 300)
    files = sorted((tmp_path / "drawn").glob("*.png"))
    got = torch.stack([torch.from_numpy(np.array(Image.open(f))).permute(2, 0, 1) for f in files])
    assert len(files) == 300 and (got.int() - data.to_uint8(x).int()).abs().max() <= 1


# ======================================================================================================================
# ivgen.py: Intervention Adversarial Auto-Encoder (uses cli, weights and moved of the parts above)
# ======================================================================================================================


def small_ivaae(model="ivaae-bw", **changes):
    """A small IVAAE in float32 on the CPU, and a batch for it."""
    config = dataclasses.replace(ivgen.preset(model, "digits"), size=16, width=4, latent=8, channels=1, batch=16, steps=10)
    torch.manual_seed(0)
    model = ivgen.IVAAE(dataclasses.replace(config, **changes))
    return model, torch.rand(16, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def substitutions():
    return [ivgen.prefix_substitute, ivgen.radial_substitute]


@pytest.mark.parametrize("substitute", substitutions())
def test_bridges_run_from_the_code_to_the_prior_and_keep_the_prior(substitute):
    """T_0 is the identity, T_t pure noise, and N(0, I) stays N(0, I) under every T_k (IVAAE, Definition 1)."""
    z, noise = torch.randn(40_000, 12), torch.randn(40_000, 12)
    assert torch.equal(substitute(z, 0, 4, noise), z) and torch.equal(substitute(z, 4, 4, noise), noise)
    for k in range(5):
        out = substitute(z, k, 4, noise)
        assert out.mean(0).abs().max() < .03 and (torch.cov(out.T) - torch.eye(12)).abs().max() < .04
    for k in (-1, 5):
        with pytest.raises(ValueError, match=r"0 .*4|0\.\.4"):
            substitute(z, k, 4, noise)


def test_bridges_approach_the_prior_step_by_step():
    """From a code at 3 with no spread: blocks are replaced from the first on; the radial mean falls as a cosine."""
    z, noise = torch.full((20_000, 8), 3.), torch.randn(20_000, 8)
    for k in range(5):
        blocks = ivgen.prefix_substitute(z, k, 4, noise)
        assert torch.equal(blocks[:, :2 * k], noise[:, :2 * k]) and torch.equal(blocks[:, 2 * k:], z[:, 2 * k:])
        angle = k * math.pi / 8
        radial = ivgen.radial_substitute(z, k, 4, noise)
        assert abs(radial.mean() - 3 * math.cos(angle)) < .02 and abs(radial.std() - math.sin(angle)) < .02
    with pytest.raises(ValueError, match="divide a code of 8"):
        ivgen.prefix_substitute(z, 1, 3, noise)


def test_svgd_step_is_eq_2():
    """Against the double loop, with the kernel's gradient taken by autograd."""
    torch.manual_seed(0)
    z, h, epsilon = torch.randn(7, 3, dtype=torch.double), 1.7, .6
    moved_to = torch.zeros_like(z)
    for i in range(7):
        direction = torch.zeros(3, dtype=torch.double)
        for j in range(7):
            z_j = z[j].clone().requires_grad_()
            k = torch.exp(-(z_j - z[i]).square().sum() / h)
            direction += k.detach() * -z[j] + torch.autograd.grad(k, z_j)[0]        # grad log N(z_j; 0, I) = -z_j
        moved_to[i] = z[i] + epsilon / 7 * direction
    assert torch.allclose(ivgen.svgd_step(z, h, epsilon), moved_to, atol=1e-12)
    assert torch.autograd.gradcheck(lambda z: ivgen.svgd_step(z, h, epsilon), z.requires_grad_())


def test_svgd_of_points_that_nearly_coincide():
    """The bandwidth follows them down, and 2 / h up: what it multiplies must be exact."""
    z = torch.full((64, 8), .3)
    moved = ivgen.svgd_step(z, ivgen.median_bandwidth(z))           # no forces between them: -z, over epsilon = 1
    assert moved.abs().max() < 1e-6
    for spread in (1e-4, 1e-3, 1e-2):
        z = torch.randn(8) + spread * torch.randn(64, 8)
        h = ivgen.median_bandwidth(z)
        torch.testing.assert_close(ivgen.svgd_step(z, h), ivgen.svgd_step(z.double(), h.double()).float(), atol=1e-4, rtol=1e-4)


def test_svgd_keeps_the_prior_and_pulls_what_is_off_it():
    torch.manual_seed(0)
    z = torch.randn(2000, 2)
    h = ivgen.median_bandwidth(z, 1.)
    assert (ivgen.svgd_step(z, h) - z).norm(dim=1).mean() < .05
    shifted, means = z + 2, []
    for _ in range(20):
        shifted = ivgen.svgd_step(shifted, h)
        means.append(shifted.mean().item())
    assert means == sorted(means, reverse=True) and -.1 < means[-1] < 1.2   # from 2 towards 0
    narrow = z * .2
    assert ivgen.svgd_step(narrow, ivgen.median_bandwidth(narrow, 1.)).std() > narrow.std()        # repulsion


def test_median_bandwidth():
    z = torch.tensor([[0.], [1.], [5.]])                                    # distances 1, 4, 5
    assert ivgen.median_bandwidth(z) == pytest.approx(100 * 16 / math.log(3))


def test_svgd_chain():
    """z^0 is E(x); t - 1 bridges, each two noisy steps on; the last is the prior's. Gradients come back through all."""
    torch.manual_seed(0)
    z = (torch.randn(64, 6) * .3 + 2).requires_grad_()
    chain = ivgen.svgd_chain(z, 4)
    assert len(chain) == 5 and chain[0] is z
    means = [c.mean().item() for c in chain[:4]]
    assert means[0] > means[1] and abs(means[3]) < abs(means[0]) and abs(chain[4].mean()) < .2
    for link in chain[1:4]:
        assert torch.autograd.grad(link.square().sum(), z, retain_graph=True)[0].abs().max() > 0
    assert not chain[4].requires_grad
    torch.manual_seed(1)
    one = ivgen.svgd_chain(z.detach(), 2)[1]
    torch.manual_seed(1)
    expected = z.detach()
    for _ in range(2):
        expected = ivgen.svgd_step(expected, ivgen.median_bandwidth(expected))
        expected = expected + .1 * torch.randn_like(expected)
    assert torch.equal(one, expected)


def test_bridge_loss_is_eq_1():
    logits = torch.randn(3, 5, 3)                                           # t = 2
    naive = -sum(logits[k, j].log_softmax(0)[k] for k in range(3) for j in range(5)) / 15
    assert ivgen.bridge_loss(logits) == pytest.approx(naive.item(), rel=1e-6)
    naive = -sum(logits[k, j].log_softmax(0)[2] for k in range(2) for j in range(5)) / 10
    assert ivgen.prior_loss(logits) == pytest.approx(naive.item(), rel=1e-6)


def test_theorem_2_of_ivaae():
    """On discrete distributions: the best D is p_i / sum p_j, its loss log(t + 1) - JS; no other D does better."""
    torch.manual_seed(0)
    p = torch.randn(4, 6, dtype=torch.double).softmax(1)                    # t = 3, six atoms
    loss = lambda d: -(p * d.log()).sum(1).mean()                           # Eq. (1) by enumeration; d (4, 6), columns sum to 1
    best = p / p.sum(0)
    assert loss(best) == pytest.approx((math.log(4) - ivgen.multi_js(p)).item(), abs=1e-12)
    for _ in range(20):
        assert loss((best.log() + .1 * torch.randn(4, 6)).softmax(0)) > loss(best)
    two = p[:2]                                                             # t = 1 is the GAN's JS
    gan = .5 * sum((q * (q / two.mean(0)).log()).sum() for q in two)
    assert ivgen.multi_js(two) == pytest.approx(gan.item(), abs=1e-12)


def test_aae_is_ivaae_with_one_bridge():
    """At t = 1 both substitutions are the code against the prior, D's two outputs a sigmoid, the weights AAE's 2 and 1."""
    model, x = small_ivaae("aae")
    assert model.config.t == 1 and model.config.mu / 2 == 2 and model.config.mu_e / 2 == 1
    z, noise = torch.randn(5, 8), torch.randn(5, 8)
    assert all(torch.equal(s(z, 1, 1, noise), noise) and torch.equal(s(z, 0, 1, noise), z) for s in substitutions())
    logits = model.judge([z, noise])
    real = logits[..., 1] - logits[..., 0]                                  # log odds of "from the prior"
    target = torch.stack([torch.zeros(5), torch.ones(5)])
    assert ivgen.bridge_loss(logits).item() == pytest.approx(F.binary_cross_entropy_with_logits(real, target).item(), rel=1e-5)
    other, _ = small_ivaae("ivaae-rad", t=1)
    for m in (model, other):
        torch.manual_seed(3)
        m.step(x)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


def test_mmd_is_unbiased_and_equals_the_double_loop():
    torch.manual_seed(0)
    a, b, naive = torch.randn(5, 3, dtype=torch.double), torch.randn(6, 3, dtype=torch.double) + 1, 0.
    for scale in (.1, .2, .5, 1, 2, 5, 10):
        c = 2 * 3 * scale
        k = lambda p, q, c=c: c / (c + (p - q).square().sum())
        naive += sum(k(a[i], a[j]) for i in range(5) for j in range(5) if i != j) / 20
        naive += sum(k(b[i], b[j]) for i in range(6) for j in range(6) if i != j) / 30
        naive -= 2 * sum(k(p, q) for p in a for q in b) / 30
    assert ivgen.mmd_imq(a, b) == pytest.approx(naive.item(), rel=1e-10)
    draws = torch.stack([ivgen.mmd_imq(torch.randn(8, 3), torch.randn(8, 3)) for _ in range(600)])
    assert draws.mean().abs() < 4 * draws.std() / math.sqrt(600) and draws.min() < 0
    assert ivgen.mmd_imq(torch.randn(64, 3) + 2, torch.randn(64, 3)) > .5
    assert torch.autograd.gradcheck(lambda a: ivgen.mmd_imq(a, b), a.requires_grad_())


def test_squared_error_is_waes():
    x, y = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    assert ivgen.wae_reconstruction(x, y) == pytest.approx(.05 * ((x - y) ** 2).sum().item() / 2, rel=1e-5)


def test_ivaae_networks_are_tables_3_and_4():
    def shape(net):
        return [(m.in_features, m.out_features) if isinstance(m, torch.nn.Linear) else
                (m.out_channels, m.kernel_size[0], m.stride[0]) for m in net.modules()
                if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d))]
    with torch.device("meta"):
        mnist, celeba = (("fc", 16, 1, 64, 128), ("conv", 64, 3, 64, 128))
        assert shape(ivgen.CodeEncoder(*mnist)) == [(4096, 1024), (1024, 1024), (1024, 16)]
        assert shape(ivgen.CodeGenerator(*mnist)) == [(16, 1024), (1024, 1024), (1024, 4096)]
        assert shape(ivgen.CodeDiscriminator("fc", 16, 128, 4)) == [(16, 1024), (1024, 1024), (1024, 5)]
        assert shape(ivgen.CodeEncoder(*celeba)) == [(128, 5, 2), (256, 5, 2), (512, 5, 2), (1024, 5, 2), (16384, 64)]
        assert shape(ivgen.CodeGenerator(*celeba)) == [(64, 65536), (512, 5, 1), (256, 5, 1), (128, 6, 2), (3, 4, 2)]
        assert shape(ivgen.CodeDiscriminator("conv", 64, 128, 4)) == [(64, 512)] + [(512, 512)] * 3 + [(512, 5)]
    for network, channels, size in (("fc", 1, 32), ("conv", 3, 64)):
        z = ivgen.CodeEncoder(network, 6, channels, size, 4)(torch.randn(2, channels, size, size))
        x = ivgen.CodeGenerator(network, 6, channels, size, 4)(z)
        assert z.shape == (2, 6) and x.shape == (2, channels, size, size) and x.abs().max() <= 1


@pytest.mark.parametrize("model", ["aae", "ivaae-bw", "ivaae-rad", "ivaae-svgd"])
def test_ivaae_moves_d_down_and_e_up_the_intervention_loss(model):
    """Alg. 1's signs. D alone moves in `step_d`, and its loss falls; E climbs it through every bridge, SVGD included."""
    net, x = small_ivaae(model, lr_d=1e-2)
    z = net.E(x)
    chain = [part.detach() for part in net.bridges(z)]
    before, d = {n: weights(getattr(net, n)) for n in "EGD"}, ivgen.bridge_loss(net.judge(chain))
    losses = [net.step_d(chain)["d_iv"].item() for _ in range(5)]
    assert moved(before["D"], net.D) and not moved(before["E"], net.E) and not moved(before["G"], net.G)
    assert losses[0] == pytest.approx(d.item()) and losses[-1] < losses[0]
    # E: a step against encoder_loss's gradient raises D's loss on the same noise
    params = list(net.E.parameters())

    def loss():
        torch.manual_seed(5)
        return net.judge(net.bridges(net.E(x)))

    grads = torch.autograd.grad(net.encoder_loss(loss()), params)
    assert all(g.abs().max() > 0 for g in grads)
    was = ivgen.bridge_loss(loss())
    with torch.no_grad():
        for p, g in zip(params, grads):
            p -= 1e-2 * g / g.norm()
    assert ivgen.bridge_loss(loss()) > was


def test_ivaae_gradient_of_every_bridge_reaches_e():
    net, x = small_ivaae("ivaae-svgd")
    logits = net.judge(net.bridges(net.E(x)))
    for k in range(4):
        loss = -logits[k].log_softmax(1)[:, k].mean()
        assert torch.autograd.grad(loss, net.E[1].weight, retain_graph=True)[0].abs().max() > 0
    with pytest.raises(RuntimeError):                                       # z_t is the prior's: nothing to give
        torch.autograd.grad(net.judge([net.bridges(net.E(x))[4]]).sum(), net.E[1].weight)


@pytest.mark.parametrize("model", list(ivgen.IVAAE_MODELS))
def test_ivaaes_step_is_algorithm_1(model):
    """One step against the algorithm written out: G by lam L_recon alone, E by lam L_recon + mu2 L_IV, D before both."""
    net, x = small_ivaae(model)
    twin, c = copy.deepcopy(net), net.config
    torch.manual_seed(7)
    losses = net.step(x)
    torch.manual_seed(7)
    z = twin.E(x)
    recon = .05 * (twin.G(z) - x).square().flatten(1).sum(1).mean()
    if model == "wae-mmd":
        assert twin.D is None
        e_loss = c.lam_mmd * ivgen.mmd_imq(z, torch.randn_like(z))
    else:
        chain = twin.bridges(z)
        ce = sum(F.cross_entropy(twin.D(part.detach()), torch.full((16,), k)) for k, part in enumerate(chain)) / (c.t + 1)
        assert losses["d_iv"].item() == pytest.approx(ce.item(), rel=1e-5)
        optimiser = torch.optim.Adam(twin.D.parameters(), c.lr_d, (c.beta1, c.beta2))
        (4 / (c.t + 1) * ce).backward()
        optimiser.step()
        ce = sum(F.cross_entropy(twin.D(part), torch.full((16,), k)) for k, part in enumerate(chain)) / (c.t + 1)
        e_loss = -2 / (c.t + 1) * ce
    for network, rate, loss in ((twin.G, c.lr, recon), (twin.E, c.lr_e, recon + e_loss)):
        params = list(network.parameters())
        grads = torch.autograd.grad(loss, params, retain_graph=True)
        optimiser = torch.optim.Adam(params, rate, (c.beta1, c.beta2))
        for p, g in zip(params, grads):
            p.grad = g
        network.optimiser = optimiser
    for network in (twin.G, twin.E):
        network.optimiser.step()
    for a, b in zip(net.parameters(), twin.parameters()):
        assert torch.allclose(a, b, atol=1e-5)


def test_prior_form_of_es_loss_pulls_codes_to_the_prior():
    net, x = small_ivaae("aae", e_loss="prior")
    logits = net.judge(net.bridges(net.E(x)))
    assert net.encoder_loss(logits).item() == pytest.approx(ivgen.prior_loss(logits).item())
    naive = F.softplus(logits[0, :, 0] - logits[0, :, 1]).mean()            # -log sigmoid of the odds "from the prior"
    assert ivgen.prior_loss(logits).item() == pytest.approx(naive.item(), rel=1e-5)


def test_ivaae_learning_rates_decay():
    net, x = small_ivaae(lr=4e-3, lr_e=2e-3, lr_d=1e-3, decay=((1, .5), (2, .1)), steps_per_epoch=2)
    rates = []
    for _ in range(5):
        net.step(x)
        rates.append([net.optimisers[n].param_groups[0]["lr"] for n in "GED"])
    assert [r[0] for r in rates] == pytest.approx([4e-3, 4e-3, 2e-3, 2e-3, 4e-4])
    assert all(r == pytest.approx([r[0], r[0] / 2, r[0] / 4]) for r in rates)


def test_ivaae_presets_are_the_papers():
    mnist, celeba, cifar = (ivgen.preset("ivaae-rad", d) for d in ("mnist", "celeba", "cifar10"))
    assert (mnist.latent, mnist.batch, mnist.lr, mnist.lr_d, mnist.lr_e, mnist.size) == (16, 64, 1e-4, 1e-4, 5e-5, 64)
    assert (celeba.latent, celeba.batch, celeba.lr, celeba.lr_d, celeba.lr_e) == (64, 100, 1e-3, 5e-4, 1e-3)
    assert (cifar.latent, cifar.batch, cifar.epochs, cifar.samples) == (128, 128, 300, 20_000)
    for name in ivgen.IVAAE_MODELS:
        for dataset in ("mnist", "celeba", "cifar10", "digits"):
            ivgen.preset(name, dataset).check()


def ivaae_flags(pictures, tmp_path, *more):
    return ("--dataset", pictures, "--root", tmp_path / "root", "--width", 2, "--latent", 8, "--batch", 16, "--samples", 50,
            "--device", "cpu", "--amp", "off", *more)


@pytest.mark.parametrize("model", list(ivgen.IVAAE_MODELS))
def test_an_ivaae_run_leaves_its_figures_and_numbers(model, pictures, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli(ivgen, *ivaae_flags(pictures, tmp_path, "--model", model, "--steps", 2, "--out", run)) == 0
    line = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert line["fld"] > 0 and line["fld_n"] == 96 and "mse" in line
    for name in ("samples/000002", "recon/000002", "figures/interpolations-000002", "figures/covariance-000002"):
        assert (run / f"{name}.png").stat().st_size > 0
    capsys.readouterr()
    code = cli(ivgen, "--resume", run, "--probe", "discriminator", "--steps", 3, "--device", "cpu")
    out = capsys.readouterr()
    if model == "wae-mmd":
        assert code == 2 and "has no discriminator" in out.err
        return
    lines = [json.loads(line) for line in (run / "probe-discriminator.jsonl").read_text().splitlines()]
    assert code == 0 and [line["iteration"] for line in lines] == [1, 2, 3]
    assert all(line["loss"] > 0 and line["gradient"] > 0 and line["gradient_iv"] > 0 for line in lines)
    assert (run / "figures/probe-discriminator-loss.png").stat().st_size > 0
    assert cli(ivgen, "--resume", run, "--probe", "classifier", "--device", "cpu") == 2
    assert "has no labels" in capsys.readouterr().err


def test_probes_leave_the_frozen_networks_alone(tmp_path):
    net, _ = small_ivaae("ivaae-rad")
    digits = load("digits", tmp_path, 16, "train")
    digits = dataclasses.replace(digits, x=digits.x[:600], y=digits.y[:600])
    before = copy.deepcopy(net.state_dict())
    lines = ivgen.probe_discriminator(net, Batches(digits, 32, size=16), 30)
    assert sum(line["loss"] for line in lines[-5:]) < sum(line["loss"] for line in lines[:5])
    after = net.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items() if not k.startswith(("D.", "_extra")))
    lines = ivgen.probe_classifier(net, Batches(digits, 60, size=16), digits, 60, every=20)
    assert [line["iteration"] for line in lines] == [20, 40, 60] and lines[-1]["error"] < .8
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in after.items() if not k.startswith("_extra"))


@pytest.mark.parametrize("flags, words", [
    (("--model", "ivaae-bw", "--t", 5), "--t 5 does not divide the latent dimension 16"),
    (("--model", "ivaae-rad", "--t", 0), "--t 0"),
    (("--model", "ivaae-rad", "--dataset", "cifar10", "--size", 32), "Table 4's networks are for 64 pixels"),
    (("--model", "aae", "--t", 4), "--model aae is IVAAE at t = 1"),
    (("--model", "ivaae-bw", "--k", 2), "--k does nothing for --model ivaae-bw"),
    (("--model", "wae-mmd", "--mu", 1), "--mu does nothing for --model wae-mmd"),
    (("--model", "dcgan", "--t", 2), "--t does nothing for --model dcgan"),
    (("--probe", "classifier"), "--probe needs --resume RUN"),
])
def test_ivaaes_bad_flags_end_in_a_sentence(flags, words, capsys):
    assert cli(ivgen, *flags) == 2
    assert words in capsys.readouterr().err


def test_ivaaes_weights_are_used_and_lr_takes_d_along():
    net, x = small_ivaae("ivaae-rad", lam=0.)
    before = weights(net.G)
    net.step(x)
    assert not moved(before, net.G)                               # lam = 0: nothing moves G
    flags = dict.fromkeys(f.name for f in dataclasses.fields(ivgen.Config)) | dict(model="ivaae-rad", dataset="celeba", lr=2e-3)
    c = ivgen.settings(flags, None, ivgen.preset)
    assert (c.lr, c.lr_e, c.lr_d) == (2e-3, 2e-3, 1e-3)


def test_each_bridge_draws_noise_of_its_own():
    z = torch.zeros(16, 8)
    chain = small_ivaae("ivaae-bw")[0].bridges(z)
    assert not any(torch.equal(a[:, :2], b[:, :2]) for a, b in itertools.combinations(chain[1:], 2))


def test_the_probes_gradient_is_fig_3s():
    net, x = small_ivaae("ivaae-bw")
    twin = copy.deepcopy(net)
    line, = ivgen.probe_discriminator(net, iter([(x, None)]), 1)
    logits = twin.D(twin.E(x))
    gradient = torch.autograd.grad(-logits.log_softmax(1)[:, -1].mean(), list(twin.E.parameters()))
    assert line["gradient"] == pytest.approx(torch.cat([g.flatten() for g in gradient]).norm().item(), rel=1e-4)


def test_the_probe_leaves_es_running_statistics_alone():
    net, _ = small_ivaae("ivaae-rad", network="conv", size=64, width=2)     # Table 3's networks have no BN to disturb
    before = copy.deepcopy(net.E.state_dict())
    ivgen.probe_discriminator(net, iter([(torch.rand(8, 1, 64, 64) * 2 - 1, None)]), 1)
    assert all(torch.equal(v, net.E.state_dict()[k]) for k, v in before.items())


def test_the_classifier_probe_reads_the_last_hidden_layer(monkeypatch):
    net, _ = small_ivaae("ivaae-rad")
    widths, linear = [], torch.nn.Linear
    monkeypatch.setattr(ivgen.nn, "Linear", lambda n, m: widths.append(n) or linear(n, m))
    test = quadrants(40, "test", 2)
    ivgen.probe_classifier(net, data.Batches(test, 10, size=16), test, 1)
    assert widths == [8 * net.config.width, 1000, 1000]


# ======================================================================================================================
# aim.py: Adversarial Inference by Matching (uses cli, weights, moved and the fixture `pictures` of the parts above)
# ======================================================================================================================


def aim_small(model="aim", dataset="grid25", **changes):
    """A small model of `model`'s kind in float32 on the CPU, a batch of data and one of codes for it."""
    size = aim.preset(model, dataset).size
    config = dataclasses.replace(aim.preset(model, dataset), width=8, latent=3 if size else 2, channels=1 if size else 2,
                                 batch=8, steps_per_epoch=10)
    config = dataclasses.replace(config, **changes)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    x = torch.rand((8, config.channels) + (size, size) * (size > 0), generator=generator) * 2 - 1
    return aim.build(config), x, torch.randn(8, config.latent, generator=generator)


def random_joint(seed, rows=4, columns=3):
    """A discrete joint distribution (X, Z), all positive, float64."""
    p = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + .05
    return p / p.sum()


@pytest.mark.parametrize("seed", range(5))
def test_eq_2_and_3_decompose_the_matching_of_priors_and_conditionals(seed):
    """Both sides of Eq. (3), and of Eq. (2) for each z, by enumeration, with nothing but sums of logarithms."""
    p, q = random_joint(seed), random_joint(seed + 100)
    X, Z = range(p.shape[0]), range(p.shape[1])
    pz, qz = ([sum(joint[x][z] for x in X) for z in Z] for joint in (p, q))
    qx = [sum(q[x][z] for z in Z) for x in X]
    left = right = constant = 0.
    for z in Z:
        kl_conditionals = sum(p[x][z] / pz[z] * math.log((p[x][z] / pz[z]) / (q[x][z] / qz[z])) for x in X)
        kl_to_data = sum(p[x][z] / pz[z] * math.log((p[x][z] / pz[z]) / qx[x]) for x in X)
        nll = -sum(p[x][z] / pz[z] * math.log(q[x][z] / qx[x]) for x in X)
        assert abs(kl_conditionals - (kl_to_data + nll + math.log(qz[z]))) < 1e-12                      # Eq. (2)
        left += pz[z] * (kl_conditionals + math.log(pz[z] / qz[z]))                                     # Eq. (1)
        right += pz[z] * (kl_to_data + nll)
        constant -= pz[z] * math.log(pz[z])
    assert abs(left + constant - right) < 1e-12 and left > 0                                            # Eq. (3)
    matching, objective = aim.matching_objective(p, q)
    assert abs(matching - left) < 1e-12 and abs(objective - right) < 1e-12


def test_proposition_1_the_joints_are_equal_at_the_minimum():
    """p(z) and q(x) given, p(x|z) and q(z|x) free: descending Eq. (3) alone ends at its bound H(p(z)), in equal joints."""
    generator = torch.Generator().manual_seed(0)
    p_z, q_x = random_joint(1).sum(0), random_joint(2).sum(1)
    a, b = (torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    optimiser = torch.optim.LBFGS([a, b], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14)
    bound = -(p_z * p_z.log()).sum()
    joints = lambda: (a.softmax(0) * p_z, b.softmax(1) * q_x[:, None])

    def closure():
        optimiser.zero_grad()
        objective = aim.matching_objective(*joints())[1]
        objective.backward()
        return objective

    start = closure().item()
    optimiser.step(closure)
    with torch.no_grad():
        p, q = joints()
        matching, objective = aim.matching_objective(p, q)
    assert start > bound + .3 and objective >= bound - 1e-12
    assert objective - bound < 1e-7 and matching < 1e-7 and (p - q).abs().max() < 1e-4
    elsewhere = torch.softmax(a.detach() + torch.randn(4, 3, generator=generator, dtype=torch.float64), 0) * p_z
    assert aim.matching_objective(elsewhere, q)[1] > bound + .01


def test_posterior_nll_is_eq_8():
    z, mu, log_var = torch.randn(3, 64, 5, dtype=torch.float64).unbind()
    expected = -torch.distributions.Normal(mu, (log_var / 2).exp()).log_prob(z).sum(1)
    torch.testing.assert_close(aim.posterior_nll(z, mu, log_var), expected, rtol=1e-12, atol=1e-12)
    expected = -torch.distributions.Normal(mu.float(), (log_var.float() / 2).exp()).log_prob(z.float()).sum(1)
    torch.testing.assert_close(aim.posterior_nll(z.float(), mu.float(), log_var.float()), expected, rtol=1e-5, atol=1e-5)
    half_distance = (z - mu).square().sum(1) / 2 + 5 / 2 * math.log(2 * math.pi)                        # AIM-: sigma = 1
    torch.testing.assert_close(aim.posterior_nll(z, mu, torch.zeros_like(z)), half_distance)


def test_aim_losses_are_their_equations():
    real, fake, close = torch.randn(6), torch.randn(6), torch.testing.assert_close
    p, q = torch.sigmoid(real), torch.sigmoid(fake)
    close(aim.discriminator_loss(real, fake), -p.log().mean() - (1 - q).log().mean())                   # Eq. (7), negated
    close(aim.generator_loss(fake), -q.log().mean())
    close(aim.discriminator_loss(real, fake, "fgan"), -(real.mean() + (-torch.exp(fake - 1)).mean()))   # Eq. (6), negated
    close(aim.generator_loss(fake, "fgan"), (-torch.exp(fake - 1)).mean())
    close(aim.joint_loss(real, fake), -(1 - p).log().mean() - q.log().mean())                           # ALI, swapped
    x, y = torch.randn(2, 4, 2).unbind()
    close(aim.cycle_loss(x, y, 1), F.l1_loss(x, y))
    close(aim.cycle_loss(x, y, 2), F.mse_loss(x, y))


def test_eq_6_estimates_the_kl_divergence():
    """Sec. 4.4: with the best D, 1 + log(q/p) pointwise, the value function bounds KL(q || p) from below, and attains it."""
    p, q = random_joint(3, 6, 1)[:, 0], random_joint(4, 6, 1)[:, 0]
    value = lambda d: (q * d).sum() - (p * (d - 1).exp()).sum()
    best, kl = 1 + (q / p).log(), (q * (q / p).log()).sum()
    assert abs(value(best) - kl) < 1e-12
    assert all(value(best + .3 * torch.randn(6, dtype=torch.float64)) < kl for _ in range(20))


def test_maxout_is_the_largest_of_its_pieces():
    layer, x = aim.Maxout(3, 4, pieces=5), torch.randn(7, 3)
    weight, bias = layer.linear.weight.view(5, 4, 3), layer.linear.bias.view(5, 4)
    for b in range(7):
        for n in range(4):
            assert abs(layer(x)[b, n] - max((weight[k, n] @ x[b] + bias[k, n]).item() for k in range(5))) < 1e-6


def test_aim_networks_are_tables_3_and_4():
    def table(network):
        kinds = {torch.nn.Conv2d: "conv", torch.nn.ConvTranspose2d: "up", torch.nn.Linear: "fc"}
        found = []
        for m in network.modules():
            if type(m) in kinds:
                ends = (m.in_features, m.out_features) if type(m) is torch.nn.Linear else (
                    m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0])
                found.append([kinds[type(m)], *ends, False])
            elif isinstance(m, torch.nn.modules.batchnorm._BatchNorm):
                found[-1][-1] = True
        return found

    fc = lambda i, o, norm: ["fc", i, o, norm]
    conv = lambda i, o, k, s, norm: ["conv", i, o, k, s, norm]
    up = lambda i, o, k, s, norm: ["up", i, o, k, s, norm]
    assert table(aim.Generator(28, 32, 1, 64)) == [                                                     # Table 3
        fc(32, 1024, True), fc(1024, 6272, True), up(128, 64, 4, 2, True), up(64, 1, 4, 2, False)]
    assert table(aim.Features(28, 1, 64)) == [conv(1, 64, 4, 2, False), conv(64, 128, 4, 2, True)]
    assert table(aim.Critic(28, 64)) == [fc(6272, 1024, True), fc(1024, 64, False), fc(64, 1, False)]
    head = [fc(576, 32, True), fc(32, 32, False)]
    assert table(aim.Encoder(28, 32, 64)) == [conv(128, 64, 4, 2, True), *head, *head]
    assert table(aim.Generator(64, 64, 3, 128)) == [                                                    # Table 4
        up(64, 1024, 4, 1, True), up(1024, 512, 4, 2, True), up(512, 256, 4, 2, True), up(256, 128, 4, 2, True),
        up(128, 3, 4, 2, False)]
    assert table(aim.Features(64, 3, 128)) == [conv(3, 128, 4, 2, False), conv(128, 256, 4, 2, True),
                                               conv(256, 512, 4, 2, True), conv(512, 1024, 4, 2, True)]
    assert table(aim.Critic(64, 128)) == [conv(1024, 1, 4, 1, False)]
    head = [fc(512, 64, True), fc(64, 64, False)]
    assert table(aim.Encoder(64, 64, 128)) == [conv(1024, 512, 4, 2, False), conv(512, 512, 4, 2, True),
                                               conv(512, 256, 2, 1, True), conv(256, 128, 1, 1, True), *head, *head]
    slopes = lambda *networks: {m.negative_slope for n in networks for m in n.modules() if isinstance(m, torch.nn.LeakyReLU)}
    assert slopes(aim.Features(28, 1, 4), aim.Critic(28, 4), aim.Encoder(28, 4, 4)) == {.1}
    assert slopes(aim.Features(64, 1, 4), aim.Encoder(64, 4, 4)) == {.2}


@pytest.mark.parametrize("dataset", ["grid25", "mnist", "cifar10"])
@pytest.mark.parametrize("model", ["aim", "aim-minus", "aim-fgan", "gan", "ali", "alice", "alice-adv"])
def test_every_aim_model_steps_and_answers_its_verbs(model, dataset):
    net, x, z = aim_small(model, dataset)
    losses = net.step(x)
    assert all(v.isfinite() for v in losses.values()) and set(losses) == (
        {"d", "g"} if model in ("gan", "ali") else {"d", "g", "e"})
    assert net.decode(z).shape == x.shape and net.sample(5).shape == x[:5].shape
    if dataset != "grid25":
        assert net.sample(5).abs().max() <= 1
    if model == "gan":
        with pytest.raises(ValueError, match="gan has no encoder"):
            net.encode(x)
    else:
        assert net.encode(x).shape == z.shape and net.reconstruct(x).shape == x.shape
        assert net.neighbours(x, 3).shape == (8, 3, *x.shape[1:])


@pytest.mark.parametrize("model", ["aim", "ali", "alice", "alice-adv"])
def test_gs_running_statistics_are_those_of_the_prior(model):
    """What `sample` normalises with (aim.py's D9): one batch of draws counts in each step, ALICE's cycle does not."""
    net, x, _ = aim_small(model, std=.2)
    norm, seen = next(m for m in net.G if isinstance(m, torch.nn.BatchNorm1d)), []
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().mean(0)))
    net.step(x)
    assert len(seen) == (2 if "alice" in model else 1)
    torch.testing.assert_close(norm.running_mean, .1 * seen[0])     # G(z) is the first in each step
    assert norm.momentum == .1


def test_d_feature_sees_table_3s_scale():
    net, x, z = aim_small("aim", "mnist")
    sigmoid = torch.nn.Sequential(*list(net.G)[:-1])(z)             # all but the conversion to [-1, 1]
    seen = net.features[0](net.G(z))
    torch.testing.assert_close(seen, sigmoid)
    assert 0 <= seen.min() and seen.max() <= 1 and net.G(z).min() < 0 <= net.features[0](x).min()


def test_aim_initial_weights():
    net, _, _ = aim_small("aim", "cifar10", width=32)
    weight = net.G[1].weight
    assert abs(weight.std() - .02) < 1e-3 and abs(weight.mean()) < 1e-3 and net.critic[0].bias.item() == 0
    for model in ("aim", "ali"):                                    # D4: samples as wide as the data, D's kinks among them
        net, _, _ = aim_small(model, width=400)
        assert 2 < net.G(torch.randn(500, 2)).std() < 6
        maxout = (net.features if model == "aim" else net.E[0])[0]
        w, b = maxout.linear.weight.view(5, 200, 2), maxout.linear.bias.view(5, 200)
        kink = ((b[0] - b[1]) / (w[0] - w[1]).norm(dim=1)).abs()    # how far from the origin the first two pieces meet
        assert 1 < kink.median() < 4
        flat, _, _ = aim_small(model, std=.02)
        assert all((p == 0).all() for name, p in flat.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("dataset", ["grid25", "mnist"])
def test_l_e_moves_g_and_e_and_not_d_feature(dataset):
    """Sec. 5: E reads D_feature without updating it; but L_e reaches G through it."""
    net, x, z = aim_small("aim", dataset)
    held = [id(p) for group in net.optimisers["G"].param_groups for p in group["params"]]
    for network, inside in ((net.G, True), (net.E, True), (net.features, False), (net.critic, False)):
        assert all((id(p) in held) == inside for p in network.parameters())
    gradient = torch.autograd.grad(net.losses(x, z)["e"], list(net.G.parameters()))
    assert sum(g.abs().sum() for g in gradient) > 0
    net.losses(x, z)["e"].backward()
    assert all(p.grad is None for p in net.critic.parameters())

    for optimiser in ("D", "G"):                                    # an update of the one leaves the other's networks alone
        net, x, z = aim_small("aim", dataset)
        net.machine.apply = lambda o, p, g, net=net, name=optimiser: (
            aim.Machine.apply(net.machine, o, p, g) if o is net.optimisers[name] else None)
        before = {name: weights(n) for name, n in net.named_children()}
        net.step(x)
        assert {name for name, n in net.named_children() if moved(before[name], n)} == (
            {"features", "critic"} if optimiser == "D" else {"G", "E"})


@pytest.mark.parametrize(("model", "lowered", "by"), [
    ("gan", "d", "D"), ("gan", "g", "G"), ("aim", "d", "D"), ("aim", "g+e", "G"), ("aim-fgan", "d", "D"),
    ("aim-fgan", "g+e", "G"), ("ali", "d", "D"), ("ali", "g", "G"), ("alice", "g+e", "G"), ("alice-adv", "d", "D"),
    ("alice-adv", "g+e", "G")])
def test_aim_losses_descend(model, lowered, by):
    """Signs: a few small steps of one optimiser, the other at rest, lower its own loss on the same data and codes."""
    net, x, z = aim_small(model, std=.2, lr=1e-4)
    net.optimisers["D" if by == "G" else "G"].step = lambda *a, **k: None

    def loss():
        torch.manual_seed(5)
        losses = net.losses(x, z)
        return sum(losses[name] for name in lowered.split("+")).item()

    before = loss()
    for _ in range(3):
        torch.manual_seed(5)
        losses = net.losses(x, z)
        for name, params, terms in (("D", net.d_params(), losses["d"]),
                                    ("G", net.g_params(), losses["g"] + losses.get("e", 0.))):
            if name == by:
                net.machine.apply(net.optimisers[name], params, net.machine.gradients(terms, params))
    assert loss() < before - 1e-6


def test_one_term_alone_moves_what_it_should():
    """lambda = 0: E rests while G moves. A step goes against the gradient of L_g + L_e in G and E, of L_d in D."""
    net, x, _ = aim_small(lam=0.)
    before = {name: weights(n) for name, n in net.named_children()}
    net.step(x)
    assert {name for name, n in net.named_children() if moved(before[name], n)} == {"G", "features", "critic"}

    net, x, _ = aim_small(std=.2)
    torch.manual_seed(3)
    losses = net.losses(x, torch.randn(8, 2))                       # on the codes that `step` will draw
    expected = [(params, torch.autograd.grad(total, params, retain_graph=True), [p.detach().clone() for p in params])
                for params, total in ((net.d_params(), losses["d"]), (net.g_params(), losses["g"] + losses["e"]))]
    torch.manual_seed(3)
    net.step(x)
    for params, gradients, old in expected:
        for p, g, before in zip(params, gradients, old):            # Adam's first step is -lr * sign(gradient)
            big = g.abs() > 1e-5
            assert torch.equal((p - before)[big].sign(), -g[big].sign())


def test_aim_minus_is_aim_with_sigma_1():
    """AIM whose log-variance head gives 0 takes the very step AIM- takes."""
    aim_net, x, _ = aim_small("aim", std=.2)
    minus, _, _ = aim_small("aim-minus", std=.2)
    torch.nn.init.zeros_(aim_net.E.log_var[-1].weight)
    state = aim_net.state_dict()
    minus.load_state_dict({k: v for k, v in state.items() if "log_var" not in k})
    for net in (aim_net, minus):
        torch.manual_seed(7)
        net.losses_seen = net.step(x)
    assert torch.equal(aim_net.losses_seen["e"], minus.losses_seen["e"])
    assert all(torch.equal(v, aim_net.state_dict()[k]) for k, v in minus.state_dict().items() if torch.is_tensor(v))
    assert torch.equal(minus.posterior(x)[1], torch.ones(8, 2)) and not torch.equal(aim_net.posterior(x)[1], torch.ones(8, 2))


def test_gan_is_aim_without_e():
    net, x, _ = aim_small("aim", lam=0.)
    gan, _, _ = aim_small("gan")
    gan.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("E.")})
    for each in (net, gan):
        torch.manual_seed(7)
        each.step(x)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in gan.state_dict().items() if torch.is_tensor(v))


@pytest.mark.parametrize("dataset", ["grid25", "mnist"])
def test_algorithm_1s_losses(dataset):
    net, x, z = aim_small("aim", dataset, std=.2)
    losses, x_tilde = net.losses(x, z), net.G(z)
    rho_q, rho_p = (net.critic(net.features(each)) for each in (x, x_tilde))
    mu, log_var = net.E(net.features(x_tilde))
    torch.testing.assert_close(losses["d"], F.softplus(-rho_q).mean() + F.softplus(rho_p).mean())
    torch.testing.assert_close(losses["g"], F.softplus(-rho_p).mean())
    nll = -torch.distributions.Normal(mu, (log_var / 2).exp()).log_prob(z).sum(1)
    torch.testing.assert_close(losses["e"], nll.mean() / net.config.latent)


def test_aim_learning_rate_is_alpha_over_root_epoch():
    net, x, _ = aim_small(lr=1e-3)                                  # ten steps an epoch
    seen = []
    for _ in range(40):
        net.step(x)
        seen.append({g["lr"] for o in net.optimisers.values() for g in o.param_groups})
    for epoch in (1, 2, 3, 4):
        assert all(rates == {1e-3 / math.sqrt(epoch)} for rates in seen[10 * epoch - 10:10 * epoch])
    net.config.decay = "none"
    assert net.learning_rate() == 1e-3


def test_aim_clamps_the_log_variance():
    net, x, _ = aim_small()
    for bias, sigma in ((50., math.exp(5)), (-50., math.exp(-5))):
        torch.nn.init.constant_(net.E.log_var[-1].bias, bias)
        torch.testing.assert_close(net.posterior(x)[1], torch.full((8, 2), sigma))


def test_neighbours_are_drawn_from_the_posterior():
    net, x, _ = aim_small(std=.3)
    mu, sigma = net.posterior(x)
    net.G = torch.nn.Identity()                                     # so that the neighbours are the codes themselves
    z = net.neighbours(x, 4000)
    assert ((z.mean(1) - mu).abs() < 5 * sigma / 4000 ** .5).all() and ((z.std(1) / sigma - 1).abs() < .06).all()
    assert torch.equal(net.reconstruct(x), mu)


def test_aim_inference_has_no_side_effects():
    net, x, z = aim_small("aim", "mnist")
    net.step(x)
    before, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    torch.testing.assert_close(net.decode(z), torch.cat([net.decode(z[i:i + 1]) for i in range(8)]), atol=1e-5, rtol=1e-4)
    net.reconstruct(x)
    assert torch.equal(rng, torch.get_rng_state()) and net.training
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items() if torch.is_tensor(v))


def test_aim_presets_are_the_papers():
    c = aim.preset("aim", "mnist")
    assert (c.size, c.width, c.latent, c.batch, c.epochs, c.lr, c.beta1, c.decay) == (28, 64, 32, 100, 400, 2e-4, .5, "sqrt")
    c = aim.preset("aim", "celeba")
    assert (c.size, c.width, c.latent, c.batch, c.epochs, c.lr, c.beta1, c.std) == (64, 128, 64, 100, 300, 2e-4, .5, .02)
    assert c.lam is None and aim.preset("aim-fgan", "celeba").lam == 1 and aim.preset().dataset == "grid25"
    assert all(aim.preset(m, d).model == m for m in aim.MODELS for d in aim.DATASETS)


@pytest.mark.parametrize("name", ["grid25", "ring8"])
def test_mixture_is_where_the_points_are(name):
    import data

    means, std = data.mixture(name)
    test = data.load(name, split="test")
    apart, nearest = torch.cdist(test.x, means).min(1)
    assert nearest.unique().numel() == test.classes == len(means)
    assert abs(apart.square().mean().sqrt() / 2 ** .5 / std - 1) < .02


def test_point_metrics():
    """The test points as their own reconstruction and as samples are perfect, up to the .989 of a 2-D Gaussian in 3 std."""
    import data

    test = data.load("grid25", split="test")
    net, _, _ = aim_small()
    net.reconstruct, net.decode = lambda x: x, lambda z: test.x[:len(z)]
    m = aim.PointMetrics(test, 2500, 2)(net)
    assert m["modes"] == 25 and abs(m["high_quality"] - (1 - math.exp(-4.5))) < .01 and m["mse"] == 0 and m["same_mode"] == 1
    net.reconstruct, net.decode = lambda x: x + 2, lambda z: test.x[:len(z)] + 1
    m = aim.PointMetrics(test, 2500, 2)(net)
    assert m["modes"] == 0 and m["high_quality"] == 0 and abs(m["mse"] - 4) < 1e-5 and m["same_mode"] < .1
    assert "2500 samples" in m["protocol"] and "10000 test points" in m["protocol"]


def test_scatter_puts_points_where_they_belong():
    picture = aim.scatter(torch.tensor([[.5, .5], [-.5, -.5], [3., 0.]]), torch.tensor([0, 1, 1]), 2, reach=1, side=100)
    ink = (picture < 1).any(0).nonzero().float()
    assert len(ink) == 8                                            # two dots of 2 x 2 pixels; the third point is outside
    upper, lower = ink[ink[:, 0] < 50].mean(0), ink[ink[:, 0] > 50].mean(0)
    assert (upper - torch.tensor([24.5, 75.5])).abs().max() < 2 and (lower - torch.tensor([74.5, 25.5])).abs().max() < 2


def aim_quick(tmp_path, *more):
    """Flags of a run on the grid of a second or two."""
    return ("--root", tmp_path / "root", "--width", 8, "--batch", 20, "--samples", 100, "--device", "cpu", *more)


def test_an_aim_run_leaves_what_it_promises(tmp_path):
    run = tmp_path / "run"
    assert cli(aim, *aim_quick(tmp_path, "--steps", 60, "--eval-every", 30, "--out", run)) == 0
    config = json.loads((run / "config.json").read_text())
    assert config["model"] == "aim" and config["lam"] is None and {"command", "torch", "device", "revision"} <= set(config)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert {"d", "g", "e", "img_per_s", "epoch"} <= set(lines[0])
    assert [line["step"] for line in lines if "protocol" in line] == [30, 60]
    assert {"modes", "high_quality", "mse", "sigma", "same_mode"} <= set(lines[-1])
    for name in ("samples/000030.png", "samples/000060.png", "recon/000060.png", "figures/panels-000060.png",
                 "figures/mse.png", "figures/high_quality.png", "last.pt", "best.pt"):
        assert (run / name).stat().st_size > 0
    state = torch.load(run / "last.pt", weights_only=True)
    assert state["step"] == 60 and state["file"] == "aim" and state["weights"]["_extra_state"] == 60
    assert cli(aim, "--resume", run, "--sample", 7, "--device", "cpu") == 0
    assert len((run / "drawn/points.csv").read_text().splitlines()) == 7 and (run / "drawn.png").exists()


@pytest.mark.parametrize("flags", [("--size", 64, "--width", 4, "--latent", 3), ("--size", 28, "--width", 4, "--latent", 2)])
def test_an_aim_run_on_pictures_leaves_the_papers_figures(flags, pictures, tmp_path):
    from PIL import Image

    run = tmp_path / "run"
    assert cli(aim, "--dataset", pictures, "--root", tmp_path / "root", "--batch", 16, "--samples", 50, "--device", "cpu",
               "--amp", "off", *flags, "--steps", 4, "--eval-every", 2, "--out", run) == 0
    names = ["samples/000004.png", "recon/000004.png", "figures/neighbours-000004.png", "figures/traversals-000004.png",
             "figures/mse.png", "figures/real.png"] + ["figures/manifold-000004.png"] * ("2" in map(str, flags))
    for name in names:
        assert (run / name).stat().st_size > 0
    pixels, latent = flags[1], flags[5]
    with Image.open(run / "figures/traversals-000004.png") as picture:      # a row for each dimension of the code
        assert picture.size == (10 * (pixels + 1) + 1, latent * (pixels + 1) + 1)
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert last["mse"] > 0 and last["sigma"] > 0 and "mse" in last["protocol"]
    assert cli(aim, "--resume", run, "--sample", 3, "--device", "cpu") == 0 and len(list((run / "drawn").glob("*.png"))) == 3


@pytest.mark.parametrize("model", ["aim", "alice-adv"])
def test_a_killed_aim_run_resumes_bit_for_bit(model, tmp_path):
    """SIGKILL between two saves; the learning rate's epoch, BN's statistics and the codes drawn go on as if it had not been
    (1,250 of 5,000 points a step: four steps an epoch)."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = aim_quick(tmp_path, "--model", model, "--dataset", "swissroll", "--batch", 1250, "--steps", 12, "--eval-every", 4)
    assert cli(aim, *flags, "--out", whole) == 0
    script = ("import sys, os, signal, torch, aim; torch.set_num_threads(int(sys.argv.pop(1)))\n"
              "add = aim.Run.add\n"
              "def kill(self, step, losses):\n"
              "    add(self, step, losses)\n"
              "    if step == 6: os.kill(os.getpid(), signal.SIGKILL)\n"
              "aim.Run.add = kill\n"
              "sys.exit(aim.run_cli(aim.main))")
    done = subprocess.run([sys.executable, "-c", script, str(torch.get_num_threads()), *map(str, flags), "--out", str(killed)],
                          cwd=HERE)
    assert done.returncode == -signal.SIGKILL
    assert cli(aim, "--resume", killed, "--device", "cpu") == 0
    a, b = (torch.load(run / "last.pt", weights_only=True) for run in (whole, killed))
    assert a["step"] == b["step"] == 12 and a["best"] == b["best"]
    for key, value in a["weights"].items():
        assert torch.equal(value, b["weights"][key]) if torch.is_tensor(value) else value == b["weights"][key], key
    assert all(torch.equal(v, b["optimisers"][name]["state"][n][k]) for name in a["optimisers"]
               for n, slot in a["optimisers"][name]["state"].items() for k, v in slot.items())


def test_an_aim_loss_that_is_not_finite_ends_the_run(tmp_path, monkeypatch, capsys):
    run, step = tmp_path / "run", aim.AIM.step

    def bad(self, x):
        losses = step(self, x)
        return losses | {"e": losses["e"] * float("nan")} if self.iteration == 7 else losses

    monkeypatch.setattr(aim.AIM, "step", bad)
    assert cli(aim, *aim_quick(tmp_path, "--steps", 20, "--eval-every", 5, "--out", run)) == 3
    err = capsys.readouterr().err
    assert "step 7" in err and "'e' is nan" in err and "Traceback" not in err
    assert torch.load(run / "last.pt", weights_only=True)["step"] == 5


def test_aim_bench(capsys):
    assert cli(aim, "--bench", 2, "--width", 8, "--batch", 4, "--device", "cpu") == 0
    timed = json.loads(capsys.readouterr().out)
    assert min(timed[k] for k in ("images_per_s", "gflop_per_step", "tflop_per_s", "peak_memory_mib")) >= 0
    assert timed["size"] == 0 and timed["images_per_s"] > 0


BAD_AIM_FLAGS = {
    "unknown model": (["--model", "bigan"], "--model bigan is not one of aim"),
    "unknown flag": (["--learning-rate", "1"], "unrecognized arguments: --learning-rate"),
    "flag of another kind": (["--steps", "many"], "invalid int value: 'many'"),
    "a size without a table": (["--dataset", "cifar10", "--size", "32"], "--size 32: the paper has networks for 28"),
    "points with a size": (["--size", "28"], "--size 28 does not suit grid25, which holds points"),
    "images without one": (["--dataset", "digits", "--size", "0"], "--size 0 does not suit digits, which holds images"),
    "odd width": (["--width", "5"], "--width 5 is not an even number"),
    "no codes": (["--latent", "0"], "--latent 0 is too small"),
    "no norm": (["--model", "alice", "--k", "0.5"], "--k 0.5 is no norm"),
    "no initial weights": (["--dataset", "digits", "--std", "0"], "--std 0 is the initialisation of the 2-D networks"),
    "not a number": (["--lam", "nan"], "--lam nan must be a number"),
    "a batch beyond the data": (["--batch", "200000"], "a batch of 200000 is more than the 100,000 items"),
    "sample without a run": (["--sample", "4"], "--sample needs --resume"),
    "no such run": (["--resume", "/nowhere/run"], "there is no checkpoint"),
    "unknown device": (["--device", "abacus"], "--device abacus"),
    "unknown dataset": (["--dataset", "gird25"], "grid25"),
    "no such folder": (["--dataset", "/nowhere/pictures"], "/nowhere/pictures"),
}


@pytest.mark.parametrize("case", BAD_AIM_FLAGS)
def test_bad_aim_flags_end_in_one_sentence(case, capsys, tmp_path):
    flags, sentence = BAD_AIM_FLAGS[case]
    assert cli(aim, *flags, "--out", tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_bad_aim_checkpoints_end_in_one_sentence(tmp_path, capsys):
    run = tmp_path / "run"
    assert cli(aim, *aim_quick(tmp_path, "--steps", 2, "--out", run)) == 0
    whole = (run / "last.pt").read_bytes()
    state = torch.load(io.BytesIO(whole), weights_only=True)

    def ends(sentence, content, *flags):
        (run / "last.pt").write_bytes(content) if isinstance(content, bytes) else torch.save(content, run / "last.pt")
        capsys.readouterr()
        assert cli(aim, "--resume", run, *flags) == 2
        err = capsys.readouterr().err
        assert sentence in err and err.count("\n") == 1 and "Traceback" not in err

    ends("model aim, not gan", whole, "--model", "gan")
    ends("lam None, not 0.3", whole, "--lam", .3)
    ends("damaged or truncated", whole[:len(whole) // 2])
    ends("not a checkpoint of aim.py", {"weights": {}})
    ends("written by ivgen.py", state | {"file": "ivgen"})
    ends("another shape", state | {"config": state["config"] | {"width": 16}})


@pytest.mark.parametrize("model", ["ali", "alice", "alice-adv"])
def test_alis_losses_are_written_out(model):
    net, x, z = aim_small(model, std=.3, lam=0. if model == "ali" else .7, k=1.)
    torch.manual_seed(5)
    got = net.losses(x, z)
    torch.manual_seed(5)
    mu, log_var = net.E(x)
    z_hat = mu + (log_var / 2).exp() * torch.randn_like(mu)
    x_hat, p, q = net.G(z_hat), net.D(x, z_hat).sigmoid(), net.D(net.G(z), z).sigmoid()
    want = {"d": -p.log().mean() - (1 - q).log().mean(), "g": -(1 - p).log().mean() - q.log().mean()}
    if model == "alice":
        want["e"] = .7 * (x - x_hat).abs().mean()
    if model == "alice-adv":
        same, cycle = (net.pairs(torch.cat([x, y], 1)).sigmoid() for y in (x, x_hat))
        want["d"] = want["d"] - .7 * (same.log().mean() + (1 - cycle).log().mean())
        want["e"] = -.7 * cycle.log().mean()
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)


# ======================================================================================================================
# latentmap.py: without prior distribution matching (uses cli, weights, moved and the fixture `pictures` of the parts above)
# ======================================================================================================================


LATENT_MODELS = list(latentmap.MODELS)


def lm_small(model="latentmap", dataset="swissroll", **changes):
    """A small model of `model`'s kind in float32 on the CPU, in its first phase, and a batch of data for it."""
    base = latentmap.preset(model, dataset)
    config = dataclasses.replace(base, width=8 if base.size == 0 else 4, latent=2 if base.size == 0 else 5, batch=12,
                                 channels=3 if base.size else 2, map_width=16, map_from=10 ** 9)
    config = dataclasses.replace(config, **changes)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    x = torch.rand((12, config.channels) + (config.size, config.size) * (config.size > 0), generator=generator) * 2 - 1
    return latentmap.build(config), x


def lm_losses(net, x, only=None, seed=7):
    """{optimiser: the loss it was asked to lower} of one step on fixed noise, in which only `only` moves."""
    seen, update = {}, type(net).update

    def watch(name, loss):
        seen[name] = loss.item()
        if name == only:
            update(net, name, loss)

    net.update = watch
    torch.manual_seed(seed)
    out = net.step(x)
    del net.update
    return seen | {f"out {k}": v.item() for k, v in out.items()}


# ---------------------------------------------------------------------------------------------------------- losses


def lm_vectors(*shape, seed=0, n=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for _ in range(n)]


def test_eq_9_and_10_are_written_out():
    d_x, d_mix, d_mu = lm_vectors(6, n=3)
    mu = torch.rand(6, generator=torch.Generator().manual_seed(3)) / 2
    rows = zip(*(v.tolist() for v in (d_x, d_mix, d_mu, mu)))
    naive = sum(a ** 2 + (b - .3) ** 2 + (c - m - .3) ** 2 for a, b, c, m in rows) / 6
    assert latentmap.critic_loss(d_x, d_mix, d_mu, mu, .3).item() == pytest.approx(naive, rel=1e-5)
    assert latentmap.critic_loss(torch.zeros(6), torch.full((6,), .3), mu + .3, mu, .3) < 1e-12    # its minimum

    x, x_hat = lm_vectors(6, 3, 4, 4, n=2)
    for recon, distance in (("l2", lambda a: a * a), ("l1", abs)):
        naive = sum(distance(a - b) for a, b in zip(x.flatten().tolist(), x_hat.flatten().tolist())) / x.numel()
        naive += sum(.7 * a ** 2 + 1.3 * b ** 2 for a, b in zip(d_mu.tolist(), d_mix.tolist())) / 6
        assert latentmap.autoencoder_loss(x, x_hat, d_mu, d_mix, .7, 1.3, recon).item() == pytest.approx(naive, rel=1e-5)


def test_eq_12_and_13_are_the_hinge():
    real, fake = torch.tensor([2., .5, -1.]), torch.tensor([-3., 0., .5])
    assert latentmap.hinge_loss_d(real, fake).item() == pytest.approx((0 + .5 + 2) / 3 + (0 + 1 + 1.5) / 3)
    assert latentmap.hinge_loss_g(fake).item() == pytest.approx(2.5 / 3)


def test_x_mu_lies_nearer_to_the_item_itself():
    code, = lm_vectors(5, 3)
    mu = torch.tensor([0., .1, .25, .4, .5])
    got = latentmap.interpolate(code, mu)
    assert torch.equal(got, latentmap.interpolate(code, mu[:, None]))
    for i in range(5):                                              # mu weights x_1, the partner in the reversed batch
        torch.testing.assert_close(got[i], mu[i] * code[4 - i] + (1 - mu[i]) * code[i])
    assert torch.equal(got[0], code[0])

    net, x = lm_small()
    seen = []
    net.G = torch.nn.Identity()
    torch.manual_seed(0)
    for _ in range(200):
        mu, x_mu = net.blend(x)
        seen.append(mu)
        torch.testing.assert_close(x_mu, mu[:, None] * x.flip(0) + (1 - mu[:, None]) * x)
    seen = torch.stack(seen)
    assert mu.shape == (12,) and 0 <= seen.min() < .01 and .49 < seen.max() <= .5 and abs(seen.mean() - .25) < .02
    assert seen.std(1).min() > 0                                    # one for each item, not one for the batch


def test_d_is_asked_about_data_blends_and_interpolations():
    """What Eq. (9) shows d, and its targets: gamma is the share of the data."""
    net, x = lm_small(gamma=.25, lam=.4, critic_steps=1, omega1=1., omega2=1.)
    seen = []
    forward = net.d.forward
    net.d.forward = lambda y: seen.append(y.detach()) or forward(y)
    losses = lm_losses(net, x)
    with torch.no_grad():
        code = F.batch_norm(net.E(x), None, None, training=True)
        x_hat = net.G(code)
        torch.manual_seed(7)
        mu = torch.rand(12, 1) / 2
        x_mu = net.G(mu * code.flip(0) + (1 - mu) * code)
        torch.testing.assert_close(seen[0], torch.cat([x, .25 * x + .75 * x_hat, x_mu]))
        mu_e = torch.rand(12, 1) / 2
        torch.testing.assert_close(seen[1], torch.cat([net.G(mu_e * code.flip(0) + (1 - mu_e) * code), x_hat]))
        a, b, c = forward(seen[0]).chunk(3)
        d_mu, d_hat = forward(seen[1]).chunk(2)
    expected = (a ** 2).mean() + ((b - .4) ** 2).mean() + ((c - mu[:, 0] - .4) ** 2).mean()
    assert losses["d"] == pytest.approx(expected.item(), rel=.05)  # the spectral norm's estimate goes on with each forward
    assert losses["AE"] == pytest.approx((F.mse_loss(x_hat, x) + (d_mu ** 2).mean() + (d_hat ** 2).mean()).item(), rel=.05)


def test_kl_and_elbo_are_those_of_torch_distributions():
    mu, log_var = lm_vectors(7, 4, n=2)
    q = torch.distributions.Normal(mu, (log_var / 2).exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0., 1.)).sum(1)
    torch.testing.assert_close(latentmap.kl_normal(mu, log_var), kl)
    x, x_hat = lm_vectors(7, 3, 2, 2, seed=1, n=2)
    log_p = torch.distributions.Normal(x_hat, 5 ** -.5).log_prob(x).flatten(1).sum(1)      # variance 1 / beta
    constant = 12 / 2 * math.log(2 * math.pi / 5)
    torch.testing.assert_close(latentmap.negative_elbo(x, x_hat, mu, log_var, 5.), (kl - log_p).mean() - constant)


def test_proposition_2_by_example():
    """q(z|x) = N(x, s^2), x in [0, 1], decoder N(z, s^2): as s falls, reconstruction gains and KL loses the same log(1/s)."""
    x = torch.linspace(0, 1, 11)[:, None].double()
    kl, likelihood = [], []
    for s in (1., .1, .01, .001):
        kl.append(latentmap.kl_normal(x, torch.full_like(x, 2 * math.log(s))).max().item())
        grid = torch.linspace(-8, 8, 4001).double()                 # E log N(x; z, s^2) over z ~ N(x, s^2), integrated
        log_p = -grid.square() / 2 - math.log(s * math.sqrt(2 * math.pi))
        likelihood.append(((-grid.square() / 2).exp() / math.sqrt(2 * math.pi) * log_p).sum().item() * 16 / 4000)
        assert kl[-1] == pytest.approx((1 + s * s - 1) / 2 - math.log(s))                   # the supremum is at x = 1
    steps = math.log(10)
    assert all(b - a == pytest.approx(steps, rel=1e-6) for a, b in itertools.pairwise(likelihood))
    assert [b - a for a, b in itertools.pairwise(kl)] == pytest.approx([steps] * 3, rel=.25) and kl[-1] > 6.9


def test_mmd_is_a_double_loop_and_unbiased():
    a, b = lm_vectors(6, 3, n=2)
    b = b * 2 + 1

    def kernel(u, v):
        distance = sum((p - q) ** 2 for p, q in zip(u.tolist(), v.tolist()))
        return sum(c / (c + distance) for c in (2 * 3 * s for s in (.1, .2, .5, 1, 2, 5, 10)))

    naive = sum(kernel(u[i], u[j]) for u in (a, b) for i in range(6) for j in range(6) if i != j) / 30
    naive -= 2 * sum(kernel(p, q) for p in a for q in b) / 36
    assert latentmap.mmd(a, b).item() == pytest.approx(naive, rel=1e-4)
    assert latentmap.mmd(a[:4], b).item() == pytest.approx(ivgen.mmd_imq(a[:4], b).item(), rel=1e-6)    # 4 against 6
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([latentmap.mmd(*torch.randn(2, 10, 3, generator=generator)) for _ in range(2000)])
    error = draws.std() / 2000 ** .5
    assert abs(draws.mean()) < 4 * error and error < .02 and draws.min() < 0
    assert latentmap.mmd(torch.randn(200, 3, generator=generator), 2 + torch.randn(200, 3, generator=generator)) > .5


def test_introvae_losses_are_eq_11_and_12():
    kl_real, kl_rec, kl_gen, error = (v.abs() for v in lm_vectors(5, n=4))
    m, alpha, beta = .8, .3, .6
    rows = list(zip(*(v.tolist() for v in (kl_real, kl_rec, kl_gen, error))))
    naive_e = sum(a + alpha * (max(0, m - r) + max(0, m - g)) + beta * e for a, r, g, e in rows) / 5
    naive_g = sum(alpha * (r + g) + beta * e for _, r, g, e in rows) / 5
    assert latentmap.introvae_loss_e(kl_real, kl_rec, kl_gen, error, m, alpha, beta).item() == pytest.approx(naive_e, rel=1e-5)
    assert latentmap.introvae_loss_g(kl_rec, kl_gen, error, alpha, beta).item() == pytest.approx(naive_g, rel=1e-5)


def test_age_losses_are_a_fitted_gaussians():
    real, fake = lm_vectors(50, 3, n=2)
    fake = fake * torch.tensor([.5, 1., 2.]) + 1
    x, x_hat = lm_vectors(50, 2, seed=2, n=2)

    def delta(code):
        q = torch.distributions.Normal(code.mean(0), code.std(0, unbiased=False))
        return torch.distributions.kl_divergence(q, torch.distributions.Normal(0., 1.)).mean()

    torch.testing.assert_close(latentmap.kl_fit(fake), delta(fake))
    torch.testing.assert_close(latentmap.age_loss_e(real, fake, x, x_hat, 3.), delta(real) - delta(fake)
                               + 3 * (x - x_hat).abs().mean())
    unit = latentmap.project(real) / 3 ** .5, latentmap.project(fake) / 3 ** .5
    torch.testing.assert_close(latentmap.age_loss_g(fake, real, 5.), delta(fake) + 5 * (1 / 3 - (unit[0] * unit[1]).mean()))
    assert latentmap.kl_fit(torch.zeros(4, 2)).isfinite()


def test_gan_losses_and_reciprocity():
    real, fake = lm_vectors(9, n=2)
    cross = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(latentmap.gan_loss_d(real, fake), cross(real, torch.ones(9)) + cross(fake, torch.zeros(9)))
    torch.testing.assert_close(latentmap.gan_loss_g(fake), cross(fake, torch.ones(9)))
    w, w_hat = lm_vectors(4, 3, n=2)
    assert latentmap.reciprocity_loss(w, w_hat).item() == pytest.approx(sum(
        (a - b) ** 2 for a, b in zip(w.flatten().tolist(), w_hat.flatten().tolist())) / 12, rel=1e-5)


def test_r1_of_a_quadratic_and_that_it_can_be_lowered():
    x, = lm_vectors(8, 3)
    x.requires_grad_()
    a = torch.tensor([[2., .5, 0.], [.5, 1., 0.], [0., 0., 3.]], requires_grad=True)
    penalty = latentmap.r1_penalty((x @ a * x).sum(1) / 2, x)       # the gradient of x'Ax / 2 is Ax
    torch.testing.assert_close(penalty, (x @ a).square().sum(1).mean())
    gradient, = torch.autograd.grad(penalty, a)
    torch.testing.assert_close((gradient + gradient.T) / 2, (lambda m: (m + m.T) / 2)(2 * (x.T @ x @ a) / 8), rtol=1e-4,
                               atol=1e-4)


# --------------------------------------------------------------------------------------------------------- geometry


def test_spearman_on_constructed_cases():
    v = torch.tensor([.3, -1., 2., 8., 5.])
    assert latentmap.spearman(v, v.exp()) == pytest.approx(1) and latentmap.spearman(v, -v ** 3) == pytest.approx(-1)
    other = torch.tensor([1., 0., 3., 2., 4.])                      # ranks 1 0 2 4 3 against 1 0 3 2 4: sum d^2 = 6
    assert latentmap.spearman(v, other) == pytest.approx(1 - 6 * 6 / (5 * 24))
    assert latentmap.average_ranks(torch.tensor([5., 1., 5., 0., 5.])).tolist() == [3, 1, 3, 0, 3]
    assert latentmap.spearman(v, torch.ones(5)) == 0
    generator = torch.Generator().manual_seed(0)
    assert abs(latentmap.spearman(torch.randn(5000, generator=generator), torch.randn(5000, generator=generator))) < .05


def test_trustworthiness_is_the_double_loop():
    x, = lm_vectors(30, 4)
    code, = lm_vectors(30, 2, seed=1)

    def order(points, i):                                           # the others, nearest first
        return sorted((j for j in range(30) if j != i), key=lambda j: (points[i] - points[j]).norm().item())

    for k in (1, 5, 12):
        penalty = sum(order(x, i).index(j) + 1 - k for i in range(30) for j in order(code, i)[:k]
                      if j not in order(x, i)[:k])
        assert latentmap.trustworthiness(x, code, k) == pytest.approx(1 - 2 * penalty / (30 * k * (60 - 3 * k - 1)))
    assert latentmap.trustworthiness(x, 3 * x + 1) == 1
    assert latentmap.trustworthiness(x.view(30, 1, 2, 2), x) == 1
    line = torch.tensor([[0.], [1.], [1.9], [3.]])
    folded = torch.tensor([[0.], [5.], [5.2], [.1]])                # k = 1: 0 and 3 become neighbours, both of rank 3
    assert latentmap.trustworthiness(line, folded, 1) == pytest.approx(1 - 2 * (2 + 2) / (4 * 1 * (8 - 3 - 1)))
    with pytest.raises(ValueError, match="fewer than half"):
        latentmap.trustworthiness(x, code, 15)


def test_chamfer_and_what_lies_on_the_roll():
    points, manifold = torch.tensor([[0., 0.], [0., 1.], [3., 0.]]), torch.tensor([[0., 0.], [4., 0.]])
    assert [distances.tolist() for distances in latentmap.chamfer(points, manifold)] == [[0, 1, 1], [0, 1]]
    roll = data.load("swissroll", split="test")
    assert latentmap.chamfer(roll.x, latentmap.spiral())[0].max() < 2e-3
    curve = latentmap.spiral(20_000)
    along = (curve[1:] - curve[:-1]).norm(dim=1).cumsum(0)          # the polyline's own length
    arc = latentmap.arc_length(curve)
    torch.testing.assert_close((arc[1:] - arc[0]).float(), along, rtol=1e-3, atol=1e-4)


def test_geometry_sees_the_roll_unrolled():
    curve = latentmap.spiral(300)
    arc = latentmap.arc_length(curve)[:, None].float()
    unrolled, flat = latentmap.geometry(curve, arc, roll=True), latentmap.geometry(curve, curve)
    assert unrolled["rank_corr_arc"] > .999 and unrolled["rank_corr"] < .9 and unrolled["trust"] > .99
    assert flat["rank_corr"] > .9999 and "rank_corr_arc" not in flat


def test_latentmaps_point_metrics():
    """The roll as its own reconstruction and sample is near perfect; moved away it is not; half of it covers half."""
    test = data.load("swissroll", split="test")
    net, _ = lm_small()
    net.reconstruct, net.decode = lambda x: x, lambda z: test.x[:len(z)]
    m = latentmap.PointMetrics(test, 5000)(net)
    assert m["chamfer"] < .003 and m["coverage"] == m["rec_coverage"] == 1 and m["mse"] == 0 and m["rec_dist"] < .001
    assert "5000 samples" in m["protocol"] and m["chamfer"] == pytest.approx(m["gen_dist"] + m["gen_gap"])
    inner = test.x[test.y < 5]
    net.reconstruct, net.decode = lambda x: x + 2, lambda z: inner[torch.arange(len(z)) % len(inner)]
    m = latentmap.PointMetrics(test, 5000)(net)
    assert m["gen_dist"] < .001 < .1 < m["gen_gap"] and .5 < m["coverage"] < .56 and m["mse"] == pytest.approx(4, abs=1e-4)
    assert m["rec_dist"] > 1 and m["rec_coverage"] < .1


def test_code_metrics_compare_generated_codes_with_the_datas():
    net, _ = lm_small()
    x = lm_vectors(600, 2)[0]
    net.encode, net.prior, net.generated_codes = lambda x: x, lambda n, seed: x[:n], lambda z: z
    metrics, protocol = latentmap.code_metrics(net, x, 50)
    assert metrics["latent_fd"] == 0 and metrics["rank_corr"] == pytest.approx(1) and metrics["trust"] == 1
    assert "600 codes" in protocol and "50 items" in protocol and "rank_corr_arc" in metrics
    net.generated_codes = lambda z: z + 3
    assert latentmap.code_metrics(net, x, 50)[0]["latent_fd"] == pytest.approx(18, rel=1e-4)       # 3^2 in both coordinates
    assert set(latentmap.code_metrics(net, x[:20], 50)[0]) == {"latent_fd"}


# ---------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("dataset", ["swissroll", "mnist", "celeba"])
@pytest.mark.parametrize("model", LATENT_MODELS)
def test_every_latentmap_model_steps_and_answers_its_verbs(model, dataset):
    net, x = lm_small(model, dataset, map_from=2)
    for _ in range(3):                                              # of LatentMap the third is in the second phase
        assert all(v.isfinite() and v.dim() == 0 for v in net.step(x).values())
    assert net.iteration == 3 and net.get_extra_state() == 3
    d = net.config.latent
    assert net.encode(x).shape == (12, d) and net.decode(torch.zeros(4, d)).shape == (4, *x.shape[1:])
    assert net.sample(5).shape == x[:5].shape and net.reconstruct(x).shape == x.shape
    assert net.generated_codes(net.prior(6)).shape == (6, d)
    if dataset != "swissroll":
        assert net.sample(5).abs().max() <= 1


def test_64_pixel_networks_are_mimicrys():
    g = latentmap.Decoder(64, 128, 3, 64)
    assert g[0].weight.shape == (4 * 4 * 1024, 128) and g[1].unflattened_size == (1024, 4, 4)
    blocks = [m for m in g if isinstance(m, latentmap.Up)]
    assert [b.conv1.weight.shape[:2] for b in blocks] == [(512, 1024), (256, 512), (128, 256), (64, 128)]
    d = latentmap.Critic(64, 3, 128, 64, "spectral")
    blocks = [m for m in d if isinstance(m, latentmap.Down)]
    assert [b.shortcut[1].weight.shape[:2] for b in blocks] == [(64, 3), (128, 64), (256, 128), (512, 256), (1024, 512)]
    assert isinstance(d[0].residual[0], torch.nn.Conv2d)            # the first has no ReLU before
    assert isinstance(d[1].residual[1], torch.nn.ReLU)
    assert d[-1].weight.shape == (128, 1024)
    h, = lm_vectors(2, 3, 2, 2)
    torch.testing.assert_close(d[-2](h), h.clamp_min(0).sum((2, 3)))        # d sums over positions, E takes the mean
    torch.testing.assert_close(latentmap.Encoder(64, 3, 7, 2, "batch")[-2](h), h.clamp_min(0).mean((2, 3)))
    bound = math.sqrt(2) * math.sqrt(6 / (512 * 9 + 1024 * 9))      # xavier, gain sqrt(2), of 1024 -> 512, 3 x 3
    weight = g[2].conv1.weight
    assert weight.abs().max() <= bound and weight.abs().max() > .99 * bound
    for size, hidden in ((64, [(8, 32), (16, 16), (32, 8), (64, 4), (128, 2)]), (32, [(8, 16), (16, 8), (32, 4)])):
        e, x = latentmap.Encoder(size, 3, 7, 8, "batch"), torch.randn(2, 3, size, size)
        shapes = []
        for layer in e:
            x = layer(x)
            if isinstance(layer, (latentmap.Down, torch.nn.LeakyReLU)):
                shapes.append((x.shape[1], x.shape[2]))
        assert shapes == hidden and x.shape == (2, 7)


def test_up_enlarges_after_its_shortcut_as_if_before():
    block, (x,) = latentmap.Up(6, 4).eval(), lm_vectors(2, 6, 5, 5)
    up = lambda h: F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=False)
    residual = block.conv2(F.relu(block.second(block.conv1(up(F.relu(block.first(x)))))))
    torch.testing.assert_close(block(x), residual + block.shortcut(up(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dataset", ["swissroll", "mnist", "celeba"])
def test_d_has_spectral_norm_and_e_has_bn(dataset):
    net, x = lm_small("latentmap", dataset)
    for network in (net.d, net.D) if dataset != "swissroll" else (net.D,):
        layers = [m for m in network.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
        assert [torch.nn.utils.parametrize.is_parametrized(m) for m in layers] == [True] * (len(layers) - 1) + [False]
        assert not any(isinstance(m, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)) for m in network.modules())
    for _ in range(30):
        net.D(torch.randn(2, net.config.latent))
    largest = torch.linalg.matrix_norm(net.D[0].weight, 2).item()
    assert largest == pytest.approx(1, abs=.02)
    assert not any(torch.nn.utils.parametrize.is_parametrized(m) for m in [*net.E.modules(), *net.G.modules()])
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in net.E.modules()) == (dataset != "swissroll")
    torch.testing.assert_close(net.d(x), super(latentmap.Critic, net.d).forward(x).mean(1), rtol=.1, atol=.02)
    assert net.d(x).shape == (12,)


def test_g_has_four_layers_and_a_last_bn():
    net, _ = lm_small()
    assert [sum(isinstance(m, kind) for m in net.g) for kind in (torch.nn.Linear, torch.nn.BatchNorm1d)] == [4, 4]
    assert isinstance(net.g[-1], torch.nn.BatchNorm1d) and net.g[-1].weight is None
    bare, _ = lm_small("latentmap-nobn")
    assert isinstance(bare.g[-1], torch.nn.Linear) and isinstance(bare.normalise, torch.nn.Identity)


def test_priors():
    z = latentmap.draw_prior(4000, 6, "sphere", torch.Generator().manual_seed(0))
    torch.testing.assert_close(z.norm(dim=1), torch.full((4000,), 6 ** .5))
    assert z.mean(0).abs().max() < .06 and (z.var(0) - 1).abs().max() < .06
    normal = latentmap.draw_prior(4000, 6, "gauss", torch.Generator().manual_seed(0))
    assert normal.norm(dim=1).std() > .3 and (normal.var(0) - 1).abs().max() < .1
    net, _ = lm_small()
    rng = torch.get_rng_state()
    assert torch.equal(net.prior(5, seed=3), net.prior(5, seed=3)) and torch.equal(rng, torch.get_rng_state())
    net, x = lm_small("age")
    torch.testing.assert_close(net.encode(x).norm(dim=1), torch.full((12,), 2 ** .5))


def test_eq_11_normalises_the_code():
    net, x = lm_small(width=64)
    code = net.code(x * 20)
    assert code.mean(0).abs().max() < 1e-5 and (code.var(0, unbiased=False) - 1).abs().max() < .01
    assert net.normalise.weight is None
    for _ in range(5):
        net.step(x * 1.5)
    bn = net.normalise
    with torch.no_grad():
        expected = (net.E(x[:1]) - bn.running_mean) / (bn.running_var + bn.eps).sqrt()
    torch.testing.assert_close(net.encode(x[:1]), expected)         # of one item: running statistics, not the batch's
    assert net.training


# ------------------------------------------------------------------------------------------------- who moves, and where


LATENT_MOVES = [  # model, first phase?, optimiser, networks it moves
    ("latentmap", True, "d", {"d"}), ("latentmap", True, "AE", {"E", "G"}), ("latentmap", False, "D", {"D"}),
    ("latentmap", False, "g", {"g"}), ("latentmap-nobn", True, "AE", {"E", "G"}), ("latentmap-noreg", False, "g", {"g"}),
    ("vae", True, "AE", {"E", "G"}), ("aae", True, "AE", {"E", "G"}), ("aae", True, "D", {"D"}), ("aae", True, "E", {"E"}),
    ("wae", True, "AE", {"E", "G"}), ("introvae", True, "E", {"E"}), ("introvae", True, "G", {"G"}),
    ("age", True, "E", {"E"}), ("age", True, "G", {"G"}), ("alae", True, "ED", {"E", "D"}), ("alae", True, "FG", {"F", "G"}),
    ("alae", True, "AE", {"E", "G"}),
]


@pytest.mark.parametrize("dataset", ["swissroll", "mnist"])
@pytest.mark.parametrize(("model", "first", "name", "movers"), LATENT_MOVES)
def test_each_loss_moves_its_own_networks_and_goes_down(model, first, name, movers, dataset):
    net, x = lm_small(model, dataset, map_from=10 ** 9 if first else 0, critic_steps=1, d_steps=1, lr=3e-4,
                      width=32 if dataset == "swissroll" else 4)
    for _ in range(5):
        lm_losses(net, x)                                           # lets the spectral norms settle
    before, start = {n: weights(m) for n, m in net.named_children()}, lm_losses(net, x)[name]
    lm_losses(net, x, only=name)
    assert {n for n, m in net.named_children() if moved(before[n], m)} == movers
    for _ in range(9):
        lm_losses(net, x, only=name)
    assert lm_losses(net, x)[name] < start - 1e-5


def lm_outputs(net, x, only, steps=20):
    """What step() returns before and after some steps of one optimiser alone."""
    before = lm_losses(net, x)
    for _ in range(steps):
        lm_losses(net, x, only=only)
    return before, lm_losses(net, x)


def test_directions_of_latentmaps_networks():
    net, x = lm_small(critic_steps=1, lr=1e-3)
    x_hat = lambda: net.reconstruct(x)
    ask = lambda y: net.infer(net.d, y)
    apart = (ask(x_hat()).mean() - ask(x).mean()).item()
    for _ in range(60):
        lm_losses(net, x, only="d")
    assert ask(x_hat()).mean() - ask(x).mean() > apart              # d: reconstructions up, data down
    reach = ask(x_hat()).square().mean()
    net.config.omega2 = net.config.omega1 = 1e3                     # so that reconstruction does not matter
    d_before = weights(net.d)
    for _ in range(20):
        lm_losses(net, x, only="AE")
    assert ask(x_hat()).square().mean() < reach and not moved(d_before, net.d)

    net, x = lm_small(map_from=0, d_steps=1, lr=1e-3)
    code, z = net.encode(x), net.prior(500, seed=0)
    judge = lambda: (net.infer(net.D, code).mean().item(), net.infer(net.D, net.generated_codes(z)).mean().item())
    real, fake = judge()
    for _ in range(30):
        lm_losses(net, x, only="D")
    assert judge()[0] - judge()[1] > real - fake
    fake = judge()[1]
    for _ in range(30):
        lm_losses(net, x, only="g")
    assert judge()[1] > fake


def test_directions_of_the_baselines_games():
    net, x = lm_small("introvae", lr=1e-3)
    net.config.beta, net.config.alpha = 0., 10.                     # at first E cannot tell them apart: let samples outweigh
    before, after = lm_outputs(net, x, "E", 60)
    assert after["out kl_gen"] > before["out kl_gen"]               # E keeps samples' KL up, G brings it down
    before, after = lm_outputs(net, x, "G")
    assert after["out kl_gen"] < before["out kl_gen"]

    net, x = lm_small("age", lr=1e-3)
    net.config.age_mu = 0.
    before, after = lm_outputs(net, x, "E", 40)
    gap = lambda o: o["out kl_fake"] - o["out kl_real"]
    assert gap(after) > gap(before)
    net.config.age_lam = 0.
    before, after = lm_outputs(net, x, "G")
    assert after["out kl_fake"] < before["out kl_fake"]

    net, x = lm_small("wae", lr=1e-3)
    net.config.wae_lam = 1e4
    before, after = lm_outputs(net, x, "AE")
    assert after["out mmd"] < before["out mmd"]

    net, x = lm_small("alae", lr=1e-3)
    before, after = lm_outputs(net, x, "AE", 40)
    assert after["out w"] < before["out w"]
    net.config.r1 = 1e4
    before, after = lm_outputs(net, x, "ED", 40)
    assert after["out r1"] < before["out r1"]


def test_introvaes_e_sees_what_g_makes_as_given():
    """ng() of its Eq. (11): no gradient to E through the reconstruction it judges."""
    net, x = lm_small("introvae", alpha=5., beta=0., margin=50.)
    params, got = list(net.E.parameters()), {}
    net.update = lambda name, loss: got.setdefault(name, torch.autograd.grad(loss, params, retain_graph=True))
    torch.manual_seed(7)
    net.step(x)
    torch.manual_seed(7)
    mu, log_var = net.posterior(x)
    made = net.G(net.draw(mu, log_var)).detach(), net.G(net.prior(12)).detach()
    kl = [latentmap.kl_normal(*net.posterior(y)) for y in (x, *made)]
    for a, b in zip(got["E"], torch.autograd.grad(latentmap.introvae_loss_e(*kl, torch.zeros(12), 50., 5., 0.), params)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dataset", ["swissroll", "mnist", "celeba"])
def test_the_second_phase_leaves_the_autoencoder_bit_for_bit(dataset):
    net, x = lm_small("latentmap", dataset, map_from=2)
    for _ in range(2):
        assert set(net.step(x)) == {"d", "ae", "rec"}
    before = copy.deepcopy(net.state_dict())
    for _ in range(3):
        assert set(net.step(x)) == {"D", "g"}
    after = net.state_dict()
    same = {k.split(".")[0] for k, v in after.items() if torch.is_tensor(v) and torch.equal(v, before[k])}
    changed = {k.split(".")[0] for k, v in after.items() if torch.is_tensor(v) and not torch.equal(v, before[k])}
    assert {"E", "G", "normalise", "d"}.isdisjoint(changed) and changed == {"D", "g"} and {"E", "G", "normalise"} <= same


def test_the_first_phase_leaves_the_map_alone_and_joint_moves_all():
    net, x = lm_small()
    before = copy.deepcopy(net.state_dict())
    net.step(x)
    changed = {k.split(".")[0] for k, v in net.state_dict().items() if torch.is_tensor(v) and not torch.equal(v, before[k])}
    assert changed == {"E", "G", "normalise", "d"}
    net, x = lm_small(joint=True, map_from=0, d_steps=5)
    assert set(net.step(x)) == {"d", "ae", "rec", "D", "g"}
    counts = {}
    update = net.update
    net.update = lambda name, loss: counts.update({name: counts.get(name, 0) + 1}) or update(name, loss)
    net.step(x)
    assert list(counts.items()) == [("d", 2), ("AE", 1), ("D", 5), ("g", 1)]               # the author code's


def test_ablations_are_latentmap_with_terms_off():
    for model in ("latentmap-nobn", "latentmap-noreg"):
        net, x = lm_small(model)
        assert not hasattr(net, "d") and set(net.step(x)) == {"ae", "rec"}
    # with weights so small that they round away, the regularised model takes the unregularised one's step
    a, x = lm_small("latentmap-noreg", seed=0)
    b, _ = lm_small("latentmap", omega1=1e-30, omega2=0.)
    b.E.load_state_dict(a.E.state_dict())
    b.G.load_state_dict(a.G.state_dict())
    a.step(x)
    b.step(x)
    assert all(torch.allclose(p, q, atol=1e-7) for p, q in zip([*a.E.parameters(), *a.G.parameters()],
                                                               [*b.E.parameters(), *b.G.parameters()]))


def test_latentmap_inference_has_no_side_effects():
    for model in LATENT_MODELS:
        net, x = lm_small(model, "mnist")
        net.step(x)
        before, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
        one = torch.cat([net.reconstruct(x[i:i + 1]) for i in range(12)])
        torch.testing.assert_close(net.reconstruct(x), one, atol=1e-4, rtol=1e-3)
        assert torch.equal(rng, torch.get_rng_state()) and net.training
        net.sample(4)
        assert all(torch.equal(before[k], v) for k, v in net.state_dict().items() if torch.is_tensor(v))


def test_latentmap_presets_are_the_papers():
    c = latentmap.preset("latentmap", "celeba")
    assert (c.size, c.width, c.latent, c.batch, c.epochs, c.lr, c.beta1) == (64, 64, 128, 32, 25, 2e-4, 0)
    assert (c.gamma, c.lam, c.omega1, c.omega2, c.recon, c.prior, c.joint) == (.2, .2, 1, 1, "l2", "gauss", False)
    c = latentmap.preset("latentmap", "mnist")
    assert (c.size, c.latent) == (32, 256) and latentmap.preset().dataset == "swissroll"
    assert latentmap.preset("wae", "mnist").wae_lam == 10 and latentmap.preset("wae", "celeba").wae_lam == 100
    assert latentmap.preset("latentmap", "swissroll").latent == 2 and latentmap.preset("age", "celeba").prior == "sphere"
    nobn, noreg = (latentmap.preset(f"latentmap-{name}", "mnist") for name in ("nobn", "noreg"))
    assert not nobn.normalise and nobn.omega1 == nobn.omega2 == noreg.omega1 == noreg.omega2 == 0 and noreg.normalise
    assert all(latentmap.preset(m, d).model == m for m in latentmap.MODELS for d in latentmap.DATASETS)


def test_codes_are_shown_on_their_principal_axes():
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(400, 2, generator=generator) * torch.tensor([3., 1.])
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    code = torch.cat([plane, torch.zeros(400, 4)], 1) @ rotation
    panels = latentmap.code_panels(code, code, torch.zeros(400, dtype=torch.long), 1)
    assert list(panels) == ["codes of the data", "codes made from the prior"]
    ink = (panels["codes of the data"] < 1).any(0).nonzero().float()
    assert ink[:, 1].std() > 2.5 * ink[:, 0].std()                  # the first component lies across
    assert latentmap.code_panels(code[:, :1], code[:, :1], None, 0) == {}


# -------------------------------------------------------------------------------------------------------------- runs


def lm_quick(tmp_path, *more):
    """Flags of a run on the roll of a second or two."""
    return ("--root", tmp_path / "root", "--width", 8, "--batch", 50, "--samples", 100, "--device", "cpu", *more)


def test_a_latentmap_run_leaves_what_it_promises(tmp_path):
    run = tmp_path / "run"
    assert cli(latentmap, *lm_quick(tmp_path, "--steps", 80, "--eval-every", 20, "--out", run)) == 0
    config = json.loads((run / "config.json").read_text())
    assert config["model"] == "latentmap" and config["map_from"] == 48 and {"command", "torch", "revision"} <= set(config)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "protocol" in line]
    assert [(line["step"], line.get("phase")) for line in evaluations] == [(20, "autoencoder"), (40, "autoencoder"),
                                                                           (60, None), (80, None)]
    assert {"chamfer", "gen_dist", "gen_gap", "coverage", "rec_dist", "rec_coverage", "mse", "latent_fd", "rank_corr",
            "rank_corr_arc", "trust"} <= set(lines[-1])
    for name in ("samples/000060.png", "recon/000080.png", "figures/panels-000080.png", "figures/codes-000080.png",
                 "figures/mse.png", "figures/chamfer.png", "last.pt", "best.pt"):
        assert (run / name).stat().st_size > 0
    best, last = (torch.load(run / name, weights_only=True) for name in ("best.pt", "last.pt"))
    assert best["step"] > 48 and last["step"] == 80 and last["file"] == "latentmap" and last["weights"]["_extra_state"] == 80
    assert best["best"] == min(line["chamfer"] for line in evaluations[2:])
    assert latentmap.score_of({"phase": "autoencoder", "chamfer": 0.}) is None
    assert latentmap.score_of({"chamfer": .2, "mse": .1}) == .2 and latentmap.score_of({"fid": 9., "fcd": 2., "mse": 1.}) == 9.
    assert cli(latentmap, "--resume", run, "--sample", 7, "--device", "cpu") == 0
    assert len((run / "drawn/points.csv").read_text().splitlines()) == 7 and (run / "drawn.png").exists()
    assert cli(latentmap, "--resume", run, "--steps", 100, "--device", "cpu") == 0          # longer: its boundary stays
    assert json.loads((run / "config.json").read_text())["map_from"] == 48


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("model", ["latentmap", "vae"])
def test_a_latentmap_run_on_pictures_leaves_the_papers_figures(model, size, pictures, tmp_path):
    from PIL import Image

    run = tmp_path / "run"
    assert cli(latentmap, "--model", model, "--dataset", pictures, "--root", tmp_path / "root", "--batch", 16, "--samples", 50,
               "--device", "cpu", "--amp", "off", "--size", size, "--width", 2, "--latent", 6, "--steps", 3, "--eval-every", 1,
               "--out", run) == 0
    for name in ("samples/000003.png", "recon/000003.png", "figures/interpolations-000003.png", "figures/codes-000003.png",
                 "figures/mse.png", "figures/real.png", "best.pt"):
        assert (run / name).stat().st_size > 0
    with Image.open(run / "figures/interpolations-000003.png") as picture:
        assert picture.size == (10 * (size + 1) + 1, 10 * (size + 1) + 1)
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert last["mse"] > 0 and {"latent_fd", "rank_corr", "trust"} <= set(last) and "fid" not in last
    assert "mse" in last["protocol"] and "latent_fd" in last["protocol"] and "rank_corr_arc" not in last
    assert cli(latentmap, "--resume", run, "--sample", 3, "--device", "cpu") == 0
    assert len(list((run / "drawn").glob("*.png"))) == 3


@pytest.mark.parametrize("model", [m for m in LATENT_MODELS if m != "latentmap"])
def test_every_latentmap_baseline_runs_on_the_roll(model, tmp_path):
    run = tmp_path / "run"
    assert cli(latentmap, *lm_quick(tmp_path, "--model", model, "--steps", 3, "--out", run)) == 0
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 3 and all(math.isfinite(last[k]) for k in ("chamfer", "mse", "latent_fd", "rank_corr", "trust"))
    assert (run / "best.pt").exists() and (run / "figures/panels-000003.png").exists()


def lm_same(a, b):
    """Two last.pt hold the same, bit for bit."""
    a, b = (torch.load(run / "last.pt", weights_only=True) for run in (a, b))
    assert a["step"] == b["step"] and a["best"] == b["best"]
    for key, value in a["weights"].items():
        assert torch.equal(value, b["weights"][key]) if torch.is_tensor(value) else value == b["weights"][key], key
    assert all(torch.equal(v, b["optimisers"][name]["state"][n][k]) for name in a["optimisers"]
               for n, slot in a["optimisers"][name]["state"].items() for k, v in slot.items())


def test_a_killed_latentmap_run_resumes_bit_for_bit(tmp_path):
    """SIGKILL in the second phase, whose last save is of the first, and again within the second."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = lm_quick(tmp_path, "--steps", 12, "--eval-every", 5)
    assert cli(latentmap, *flags, "--out", whole) == 0
    script = ("import sys, os, signal, torch, latentmap; at = int(sys.argv.pop(1))\n"
              "torch.set_num_threads(int(sys.argv.pop(1)))\n"
              "add = latentmap.Run.add\n"
              "def kill(self, step, losses):\n"
              "    add(self, step, losses)\n"
              "    if step == at: os.kill(os.getpid(), signal.SIGKILL)\n"
              "latentmap.Run.add = kill\n"
              "sys.exit(latentmap.run_cli(latentmap.main))")
    for at, how in ((8, (*flags, "--out", killed)), (11, ("--resume", killed, "--device", "cpu"))):
        done = subprocess.run([sys.executable, "-c", script, str(at), str(torch.get_num_threads()), *map(str, how)], cwd=HERE)
        assert done.returncode == -signal.SIGKILL
    assert cli(latentmap, "--resume", killed, "--device", "cpu") == 0
    lm_same(whole, killed)


@pytest.mark.parametrize("model", ["introvae", "alae"])
def test_a_baseline_resumes_bit_for_bit(model, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = lm_quick(tmp_path, "--model", model, "--steps", 8, "--eval-every", 4)
    assert cli(latentmap, *flags, "--out", whole) == 0
    add = latentmap.Run.add

    def power_cut(self, step, losses):
        if step == 6:
            raise OSError("the power is gone")
        add(self, step, losses)

    with monkeypatch.context() as patch:
        patch.setattr(latentmap.Run, "add", power_cut)
        with pytest.raises(OSError, match="power"):
            cli(latentmap, *flags, "--out", cut)
    assert torch.load(cut / "last.pt", weights_only=True)["step"] == 4
    assert cli(latentmap, "--resume", cut, "--device", "cpu") == 0
    lm_same(whole, cut)


def test_a_latentmap_loss_that_is_not_finite_ends_the_run(tmp_path, monkeypatch, capsys):
    run, step = tmp_path / "run", latentmap.LatentMap.step

    def bad(self, x):
        losses = step(self, x)
        return losses | {"ae": losses["ae"] * float("nan")} if self.iteration == 7 else losses

    monkeypatch.setattr(latentmap.LatentMap, "step", bad)
    assert cli(latentmap, *lm_quick(tmp_path, "--steps", 20, "--eval-every", 5, "--out", run)) == 3
    err = capsys.readouterr().err
    assert "step 7" in err and "'ae' is nan" in err and "Traceback" not in err
    assert torch.load(run / "last.pt", weights_only=True)["step"] == 5


@pytest.mark.parametrize("flags", [(), ("--dataset", "mnist", "--width", 2), ("--model", "alae"), ("--joint",)])
def test_latentmap_bench(flags, capsys):
    assert cli(latentmap, "--bench", 2, "--batch", 4, "--latent", 4, "--device", "cpu", *flags) == 0
    timed = json.loads(capsys.readouterr().out)
    assert timed["images_per_s"] > 0 and timed["peak_memory_mib"] > 0 and timed["batch"] == 4


@pytest.mark.parametrize("model", ["latentmap", "vae", "alae"])
def test_latentmap_keeps_its_losses_in_float32_under_autocast(model):
    config = dataclasses.replace(latentmap.preset(model, "mnist"), width=2, latent=4, batch=8, channels=1, map_width=8,
                                 joint=True)
    net = latentmap.build(config, latentmap.Machine("cpu", "bf16"))
    x = torch.rand(8, 1, 32, 32) * 2 - 1
    losses = net.step(x)
    assert all(v.dtype == torch.float32 and v.isfinite() for v in losses.values())
    assert net.sample(3).dtype == net.encode(x).dtype == torch.float32


BAD_LATENTMAP_FLAGS = {
    "unknown model": (["--model", "vqvae"], "--model vqvae is not one of latentmap"),
    "unknown flag": (["--learning-rate", "1"], "unrecognized arguments: --learning-rate"),
    "flag of another kind": (["--steps", "many"], "invalid int value: 'many'"),
    "a size without networks": (["--dataset", "cifar10", "--size", "28"], "--size 28: there are networks for 32"),
    "points with a size": (["--size", "32"], "--size 32 does not suit swissroll, which holds points"),
    "images without one": (["--dataset", "digits", "--size", "0"], "--size 0 does not suit digits, which holds images"),
    "no codes": (["--latent", "0"], "--latent 0 is too small"),
    "a batch of one": (["--batch", "1"], "--batch 1 is too small"),
    "not a number": (["--lam", "nan"], "--lam nan must be a number"),
    "a negative weight": (["--omega1", "-1"], "--omega1 -1.0 must be a number from 0 up"),
    "more than all": (["--gamma", "1.5"], "--gamma 1.5 is a share of the data"),
    "another distance": (["--recon", "l3"], "invalid choice: 'l3'"),
    "another prior": (["--prior", "cube"], "invalid choice: 'cube'"),
    "a sphere of two points": (["--prior", "sphere", "--latent", "1"], "--latent 1 is too small for a prior on the sphere"),
    "compiled second derivatives": (["--model", "alae", "--compile"], "--compile does not go with alae"),
    "a batch beyond the data": (["--batch", "6000"], "a batch of 6000 is more than the 5,000 items"),
    "sample without a run": (["--sample", "4"], "--sample needs --resume"),
    "no such run": (["--resume", "/nowhere/run"], "there is no checkpoint"),
    "unknown device": (["--device", "abacus"], "--device abacus"),
    "unknown dataset": (["--dataset", "swissrole"], "swissrole"),
    "no such folder": (["--dataset", "/nowhere/pictures"], "/nowhere/pictures"),
}


@pytest.mark.parametrize("case", BAD_LATENTMAP_FLAGS)
def test_bad_latentmap_flags_end_in_one_sentence(case, capsys, tmp_path):
    flags, sentence = BAD_LATENTMAP_FLAGS[case]
    assert cli(latentmap, *flags, "--out", tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_bad_latentmap_checkpoints_end_in_one_sentence(tmp_path, capsys):
    run = tmp_path / "run"
    assert cli(latentmap, *lm_quick(tmp_path, "--steps", 2, "--out", run)) == 0
    whole = (run / "last.pt").read_bytes()
    state = torch.load(io.BytesIO(whole), weights_only=True)

    def ends(sentence, content, *flags):
        (run / "last.pt").write_bytes(content) if isinstance(content, bytes) else torch.save(content, run / "last.pt")
        capsys.readouterr()
        assert cli(latentmap, "--resume", run, *flags) == 2
        err = capsys.readouterr().err
        assert sentence in err and err.count("\n") == 1 and "Traceback" not in err

    ends("model latentmap, not vae", whole, "--model", "vae")
    ends("gamma 0.2, not 0.3", whole, "--gamma", .3)
    ends("damaged or truncated", whole[:len(whole) // 2])
    ends("written by aim.py", state | {"file": "aim"})
    ends("another shape", state | {"config": state["config"] | {"width": 16}})


@pytest.mark.parametrize("model", ["latentmap", "introvae", "age", "alae"])
def test_latentmaps_running_statistics_follow_data_and_their_codes_only(model):
    """D10: with nothing learnt (lr 0), E's running means are those of data, and LatentMap's G's those of the data's codes."""
    net, x = lm_small(model, "mnist", lr=0.)
    twin, norms = copy.deepcopy(net), lambda n: [m for m in n.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    net.step(x)
    twin.train()
    code = twin.code(x) if model != "introvae" else twin.posterior(x)[0]
    assert norms(net.E) and all(torch.allclose(a.running_mean, b.running_mean, atol=1e-5) and
                                torch.allclose(a.running_var, b.running_var, atol=1e-5)
                                for a, b in zip(norms(net.E), norms(twin.E)))
    if model == "latentmap":
        twin.G(code)
        assert all(torch.allclose(a.running_var, b.running_var, atol=1e-5) for a, b in zip(norms(net.G), norms(twin.G)))
    assert all(m.momentum == .1 for m in norms(net))


def test_ages_g_works_with_the_statistics_of_draws():
    """All that its G is trained on, and what `sample` decodes (D10)."""
    net, x = lm_small("age", "mnist", lr=0.)
    z, twin = latentmap.draw_prior(len(x), net.config.latent, "sphere"), copy.deepcopy(net.G).train()
    net.prior = lambda n, **_: z
    net.step(x)
    for _ in range(net.config.age_steps):
        twin(z)
    pairs = [(a, b) for a, b in zip(net.G.modules(), twin.modules()) if isinstance(a, torch.nn.BatchNorm2d)]
    assert pairs
    for a, b in pairs:
        torch.testing.assert_close(a.running_var, b.running_var)


def test_a_vaes_latents_are_draws():
    """latent_fd compares what G was trained on; the means alone lack the posterior's variance."""
    net, x = lm_small("vae", "mnist")
    mu, log_var = net.infer(lambda x: torch.cat(net.posterior(x), 1), x).chunk(2, 1)
    torch.testing.assert_close(net.encode(x), mu)
    draws = torch.stack([net.latents(x) for _ in range(2000)])
    assert (draws.mean(0) - mu).abs().max() < .15 * (log_var / 2).exp().max()
    torch.testing.assert_close(draws.var(0), log_var.exp(), rtol=.3, atol=0)


def test_latentmap_does_not_sample_from_an_untrained_map(tmp_path, capsys):
    run = tmp_path / "run"
    flags = ("--steps", 8, "--eval-every", 8, "--samples", 50, "--width", 16, "--device", "cpu", "--root", tmp_path)
    assert cli(latentmap, *flags, "--out", run) == 0
    state = torch.load(run / "last.pt", weights_only=True)
    torch.save(state | {"step": 2}, run / "last.pt")
    assert cli(latentmap, "--resume", run, "--sample", 2, "--device", "cpu") == 2
    assert "step 2 is in the first phase" in capsys.readouterr().err
    assert cli(latentmap, "--resume", run, "--steps", 3, "--device", "cpu") == 2
    assert f"needs more than {state['config']['map_from']}" in capsys.readouterr().err


@pytest.mark.parametrize("module, flags", [
    (aim, ("--model", "gan", "--lam", 1)), (aim, ("--k", 1)), (latentmap, ("--model", "vae", "--omega1", 1)),
    (latentmap, ("--model", "age", "--recon", "l1")), (latentmap, ("--model", "latentmap-noreg", "--gamma", .5)),
    (latentmap, ("--inception", "auto")), (ivgen, ("--model", "ivaae-rad", "--ema", .9)),
])
def test_a_flag_without_effect_is_refused(module, flags, capsys):
    assert cli(module, *flags) == 2
    assert "does nothing for --model" in capsys.readouterr().err


def test_a_checkpoint_inside_a_run_may_be_named(pictures, tmp_path):
    """`--resume RUN/best.pt` draws from the best one, into the run's folder."""
    run = tmp_path / "run"
    assert cli(ivgen, *ivaae_flags(pictures, tmp_path, "--model", "ivaae-rad", "--steps", 2, "--out", run)) == 0
    assert cli(ivgen, "--resume", run / "best.pt", "--sample", 3, "--device", "cpu") == 0
    assert len(list((run / "drawn").glob("*.png"))) == 3


def test_baselines_ask_for_their_papers_losses():
    """What each optimiser is asked to lower, written out, with weights no two of which agree."""
    square, kl = lambda a, b: (a - b).square().flatten(1).sum(1), latentmap.kl_normal
    bce = lambda logit, target: F.binary_cross_entropy_with_logits(logit, torch.full_like(logit, target))

    def asks(model, naive, **changes):
        net, x = lm_small(model, **changes)
        got = lm_losses(net, x)
        torch.manual_seed(7)
        for name, value in naive(net, x).items():
            assert got[name] == pytest.approx(value.item(), rel=1e-4), (model, name)

    def vae(net, x):
        mu, log_var = net.posterior(x)
        return {"AE": (1.5 * square(x, net.G(mu + (log_var / 2).exp() * torch.randn_like(mu))) + kl(mu, log_var)).mean()}

    def wae(net, x):
        code = net.E(x)
        return {"AE": .05 * square(x, net.G(code)).mean() + 3 * latentmap.mmd(code, torch.randn(12, 2))}

    def aae(net, x):
        z, code = torch.randn(12, 2), net.E(x)
        return {"AE": F.mse_loss(net.G(code), x), "D": bce(net.D(z), 1.) + bce(net.D(code), 0.), "E": bce(net.D(code), 1.)}

    def introvae(net, x):
        mu, log_var = net.posterior(x)
        rec = net.G(mu + (log_var / 2).exp() * torch.randn_like(mu))
        k, error = [kl(*net.posterior(y)) for y in (x, rec, net.G(torch.randn(12, 2)))], square(x, rec) / 2
        return {"E": (k[0] + .3 * (F.relu(2 - k[1]) + F.relu(2 - k[2])) + 3 * error).mean(),
                "G": (.3 * (k[1] + k[2]) + 3 * error).mean()}

    def age(net, x):
        real, fake = net.code(x), net.code(net.G(net.prior(12)))
        return {"E": latentmap.kl_fit(real) - latentmap.kl_fit(fake) + 3 * (x - net.G(real)).abs().mean()}

    def alae(net, x):
        x = x.clone().requires_grad_()
        made, real = net.G(net.F(torch.randn(12, 2))), net.D(net.E(x))
        r1 = torch.autograd.grad(real.sum(), x, retain_graph=True)[0].square().sum(1).mean()
        again = net.D(net.E(net.G(net.F(torch.randn(12, 2)))))
        return {"ED": bce(real, 1.) + bce(net.D(net.E(made)), 0.) + 3e4 * r1, "FG": bce(again, 1.)}

    asks("vae", vae, beta=3.)
    asks("wae", wae, wae_lam=3.)
    asks("aae", aae)
    asks("introvae", introvae, alpha=.3, beta=3., margin=2.)
    asks("age", age, age_mu=3., age_lam=7.)
    asks("alae", alae, r1=6e4)


@pytest.mark.parametrize("recon", ["l2", "l1"])
def test_eq_10s_gradient_comes_through_d(recon):
    net, x = lm_small(omega1=.7, omega2=1.3, critic_steps=0, recon=recon)
    params, got = [*net.E.parameters(), *net.G.parameters()], {}
    net.d.eval()                                                    # the spectral norm's estimate stays
    net.update = lambda name, loss: got.update({name: torch.autograd.grad(loss, params, retain_graph=True)})
    torch.manual_seed(7)
    net.step(x)
    torch.manual_seed(7)
    code = F.batch_norm(net.E(x), None, None, training=True)
    mu, x_hat = torch.rand(12, 1) / 2, net.G(code)
    distance = (x - x_hat).square().mean() if recon == "l2" else (x - x_hat).abs().mean()
    x_mu = net.G(mu * code.flip(0) + (1 - mu) * code)
    loss = distance + .7 * net.d(x_mu).square().mean() + 1.3 * net.d(x_hat).square().mean()
    for a, b in zip(got["AE"], torch.autograd.grad(loss, params)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_sphere_prior_is_what_training_draws_and_a_vaes_latent_fd_is_of_draws():
    net, _ = lm_small(prior="sphere")
    torch.testing.assert_close(net.prior(5).norm(dim=1), torch.full((5,), 2 ** .5))
    net, _ = lm_small("vae")
    x = torch.randn(200, 2)
    net.encode, net.prior = lambda x: x, lambda n, seed: x[:n]
    net.latents = net.generated_codes = lambda x: x + 3
    assert latentmap.code_metrics(net, x, 50)[0]["latent_fd"] == 0


def test_introvaes_g_works_with_codes_and_draws_in_turn():
    net, x = lm_small("introvae", "mnist", lr=0.)
    twin, norm = copy.deepcopy(net), lambda n: next(m for m in n.G.modules() if isinstance(m, torch.nn.BatchNorm2d))
    torch.manual_seed(7)
    net.step(x)
    torch.manual_seed(7)
    twin.G(twin.draw(*twin.posterior(x)))
    twin.G(twin.prior(len(x)))
    torch.testing.assert_close(norm(net).running_mean, norm(twin).running_mean)


@pytest.mark.parametrize("module, flags", [
    (ivgen, ()), (ivgen, ("--model", "ivaae-rad", "--size", 64)), (aim, ()), (latentmap, ())])
def test_evaluations_do_not_change_the_training(module, flags, pictures, tmp_path):
    ends = []
    args = quick(pictures, tmp_path, *flags) if module is ivgen else (aim_quick if module is aim else lm_quick)(tmp_path)
    for every in (2, 6):
        run = tmp_path / f"run{every}"
        assert cli(module, *args, "--steps", 6, "--eval-every", every, "--out", run) == 0
        ends.append(torch.load(run / "last.pt", weights_only=True))
    assert torch.equal(ends[0]["rng"][0][0], ends[1]["rng"][0][0])
    assert all(torch.equal(v, ends[1]["weights"][k]) for k, v in ends[0]["weights"].items() if torch.is_tensor(v))


@pytest.mark.parametrize("module, args, model", [
    (aim, aim_quick, "aim"), (aim, aim_quick, "gan"), (aim, None, "aim"), (latentmap, lm_quick, "vae"),
    (latentmap, None, "vae"), (ivgen, None, "wae-mmd")])
def test_what_an_evaluation_finds_first_ends_the_run_too(module, args, model, pictures, tmp_path, capsys):
    """Losses and weights may be finite where what is generated or encoded is not: exit code 3, and the file stays JSON."""
    run = tmp_path / "run"
    sizes = {ivgen: 64, aim: 28, latentmap: 32}
    args = args(tmp_path) if args else quick(pictures, tmp_path, "--size", sizes[module])
    assert cli(module, *args, "--model", model, "--steps", 4, "--eval-every", 1, "--lr", 1e12, "--out", run) == 3
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.count("last good checkpoint") == 1 and "step" in err
    strict = {"parse_constant": lambda word: pytest.fail(f"{word} is no JSON")}
    assert all(json.loads(line, **strict) for line in (run / "log.jsonl").read_text().splitlines())
    kept = torch.load(run / "last.pt", weights_only=True)["weights"].values()
    assert all(p.isfinite().all() for p in kept if torch.is_tensor(p))


def test_too_large_a_model_is_a_sentence(tmp_path, capsys):
    assert cli(aim, *aim_quick(tmp_path, "--latent", 10 ** 14)) == 2
    assert "out of memory; try a smaller" in capsys.readouterr().err
    assert cli(aim, *aim_quick(tmp_path, "--device", "meta")) == 2
    assert "--device meta cannot be used here" in capsys.readouterr().err
    assert cli(aim, *aim_quick(tmp_path, "--device", "hpu")) == 2
    assert "--device hpu cannot be used here" in capsys.readouterr().err


@pytest.mark.parametrize("module", [ivgen, aim, latentmap])
def test_a_length_in_epochs(module):
    batches = types.SimpleNamespace(steps_per_epoch=7)
    flags = dict.fromkeys(f.name for f in dataclasses.fields(module.Config)) | {"dataset": "digits", "epochs": 2.5}
    config = module.settings(flags, None, module.preset)            # its preset is in steps
    module.set_length(config, batches, None)
    assert (config.steps, config.steps_per_epoch) == (18, 7)
    module.set_length(config, batches, {"step": 30})
    assert config.steps == 30


def test_bench_counts_one_steps_operations():
    w = torch.rand(1000, 500)
    model = types.SimpleNamespace(step=lambda x: x @ w)
    assert ivgen.benchmark(model, torch.rand(10, 1000), 1)["gflop_per_step"] == 2 * 10 * 1000 * 500 / 1e9


@pytest.mark.parametrize("module", [ivgen, aim, latentmap])
@pytest.mark.parametrize("best, kept", [(None, [1, 2, 4]), (1.5, [2, 4]), (.5, [])])
def test_best_is_the_least_score(module, best, kept):
    saved, scores = [], iter((3., 1., 2., 1.))
    nothing = dict.fromkeys(("start_clock", "add", "log", "status", "say"), lambda *_, **__: None)
    run = types.SimpleNamespace(save=lambda name, file, model, step, *_: saved.append((name, step)), flush=dict,
                                images_per_s=lambda *_: 0., interrupted=lambda step: False, **nothing)
    batches = type("B", (), {"steps_per_epoch": 2, "__next__": lambda self: (None, None)})()
    model = types.SimpleNamespace(step=lambda x: {}, named_parameters=lambda: [])
    module.loop(module.Config(steps=4, eval_every=1), module.Machine(), model, batches, run, 0, best,
                lambda step, epoch: {"mse": next(scores)})
    assert [step for name, step in saved if name == "best.pt"] == kept
    assert aim.score_of({"modes": 25, "high_quality": .8}) < aim.score_of({"modes": 25, "high_quality": .7}) < aim.score_of(
        {"modes": 24, "high_quality": .9})


@pytest.mark.parametrize("module, args", [(aim, aim_quick), (latentmap, lm_quick)])
def test_a_resumed_run_remembers_its_best(module, args, tmp_path):
    run = tmp_path / "run"
    assert cli(module, *args(tmp_path, "--steps", 4, "--eval-every", 4, "--out", run)) == 0
    torch.save(torch.load(run / "last.pt", weights_only=True) | {"best": -1e9}, run / "last.pt")
    (run / "best.pt").write_bytes(b"kept")
    assert cli(module, "--resume", run, "--steps", 8, "--device", "cpu") == 0
    assert (run / "best.pt").read_bytes() == b"kept" and torch.load(run / "last.pt", weights_only=True)["best"] == -1e9
    assert cli(module, "--resume", run, "--steps", 12, "--device", "cpu", "--out", tmp_path / "new") == 0
    assert torch.load(tmp_path / "new" / "best.pt", weights_only=True)["step"] == 12        # a new folder gets its own


# ======================================================================================================================
# The house
# ======================================================================================================================


PAPERS = [name for name in ("ivgen", "aim", "latentmap") if (HERE / f"{name}.py").exists()]


def test_plumbing_is_the_same_text_in_every_paper_file():
    def plumbing(name):
        text = (HERE / f"{name}.py").read_text()
        return text[text.index("# Plumbing: "):text.index("# End of the plumbing")]

    assert len({plumbing(name) for name in PAPERS}) == 1 and len(plumbing("ivgen")) > 5000


def any_model(module, model, kind):
    """(a small model of `module` on pictures ("images") or points, a batch for it)."""
    make = (small_ivaae if model in ivgen.IVAAE_MODELS else small) if module is ivgen else \
        {aim: aim_small, latentmap: lm_small}[module]
    return make(model, *(() if module is ivgen else ("mnist" if kind == "images" else "swissroll",)))[:2]


@pytest.mark.parametrize("module, model, kind", [
    (ivgen, "ivlsgan", "images"), (ivgen, "ivaae-bw", "images"), (aim, "aim", "images"), (aim, "alice-adv", "points"),
    (latentmap, "latentmap", "points")])
def test_compiled_networks_train_as_plain_ones(module, model, kind, monkeypatch):
    """torch.compile's tracing and its backward graphs, without the minutes that generating code takes."""
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    torch._dynamo.reset()
    (plain, x), (compiled, _) = any_model(module, model, kind), any_model(module, model, kind)
    module.compile_networks(compiled)
    seen = []
    for net in (plain, compiled):
        torch.manual_seed(3)
        seen.append([{k: v.item() for k, v in net.step(x).items()} for _ in range(2)])
    assert seen[0] == seen[1]
    for (name, a), b in zip(plain.state_dict().items(), compiled.state_dict().values()):
        assert not torch.is_tensor(a) or torch.equal(a, b), name


def test_a_compiled_run_is_the_plain_one(pictures, tmp_path, monkeypatch):
    """With its evaluations, whose other modes and sizes must not use up the compiler's patience (and end in eager steps)."""
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    monkeypatch.setattr(torch._dynamo.config, "fail_on_cache_limit_hit", True)
    torch._dynamo.reset()
    ends = []
    for name, flags in (("plain", ()), ("compiled", ("--compile",))):
        assert cli(ivgen, *quick(pictures, tmp_path, "--steps", 4, "--eval-every", 2, "--out", tmp_path / name, *flags)) == 0
        ends.append(final_weights(tmp_path / name))
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items() if torch.is_tensor(v)) and len(ends[0]) == len(ends[1])


EVERY_MODEL = [(ivgen, m, "images") for m in (*ivgen.MODELS, *ivgen.IVAAE_MODELS)] + [
    (module, m, kind) for module in (aim, latentmap) for m in module.MODELS for kind in ("images", "points")]


@pytest.mark.parametrize("module, model, kind", EVERY_MODEL)
def test_a_preset_alone_makes_a_model_that_trains(module, model, kind):
    """As source to copy from: build, step, losses as plain numbers; what `train` would set from the data has a default."""
    dataset = "mnist" if kind == "images" else next(iter(module.POINT_SETS))
    config = dataclasses.replace(module.preset(model, dataset), width=4, batch=8)
    if module is ivgen:
        config.size, config.network = 32, "fc"
    net = module.build(config)
    shape = (8, 1, config.size, config.size) if kind == "images" else (8, 2)
    before = weights(net.E if getattr(net, "E", None) is not None else net.G)
    for _ in range(config.critic_steps if module is ivgen and not config.bridge else 1):
        losses = net.step(torch.rand(shape) * 2 - 1)
    assert losses and not any(value.requires_grad for value in losses.values())
    assert moved(before, net.E if getattr(net, "E", None) is not None else net.G)
    assert net.sample(3).shape == (3, *shape[1:])
    for name, rate in (("learning_rate", config.lr), ("lr", None)):
        if hasattr(net, name) and rate:
            net.iteration = 500                                     # the epoch is unknown: still the first
            assert getattr(net, name)() == rate


@pytest.mark.parametrize("module, model, kind", EVERY_MODEL)
def test_optimisers_hold_every_weight_at_its_rate(module, model, kind):
    net, _ = any_model(module, model, kind)
    c, held = net.config, {id(p) for o in net.optimisers.values() for g in o.param_groups for p in g["params"]}
    assert held == {id(p) for p in net.parameters() if p.requires_grad}
    for name, optimiser in net.optimisers.items():
        rates = {"E": c.lr_e, "D": c.lr_d if c.bridge else c.lr} if module is ivgen else {}
        assert type(optimiser) is (torch.optim.RMSprop if model == "wgan" else torch.optim.Adam)
        for group in optimiser.param_groups:
            assert group["lr"] == rates.get(name, c.lr) and group.get("betas", (c.beta1, c.beta2)) == (c.beta1, c.beta2)


def test_generators_end_in_a_nonlinearity_that_keeps_minus_1_to_1():
    for g in (ivgen.Generator(8, 1, 32, 4), ivgen.CodeGenerator("fc", 8, 1, 8, 4), ivgen.CodeGenerator("conv", 8, 1, 64, 2),
              aim.Generator(28, 8, 1, 4), aim.Generator(64, 8, 1, 4),
              latentmap.Decoder(32, 8, 1, 4), latentmap.Decoder(64, 8, 1, 2)):
        last = [m for m in g.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d))][-1]
        last.weight.data *= 1e3                                     # at its initial weights every output is small anyway
        assert .99 < g(torch.randn(16, 8)).abs().max() <= 1
    nets = (ivgen.Discriminator(1, 32, 4), ivgen.Encoder(8, 1, 32, 4))
    assert {m.negative_slope for n in nets for m in n.modules() if isinstance(m, torch.nn.LeakyReLU)} == {.2}
    kinds = lambda net: [type(m).__name__ for m in net if not isinstance(m, torch.nn.modules.conv._ConvNd)]
    assert kinds(ivgen.CodeEncoder("conv", 8, 1, 64, 2)) == ["BatchNorm2d", "ReLU"] * 4 + ["Flatten", "Linear"]
    assert kinds(ivgen.CodeGenerator("conv", 8, 1, 64, 2)) == ["Linear", "Unflatten"] + ["BatchNorm2d", "ReLU"] * 3 + ["Tanh"]
    assert kinds(ivgen.CodeDiscriminator("fc", 8, 2, 4)) == ["Linear", "ReLU"] * 2 + ["Linear"]
    assert sum(isinstance(m, torch.nn.Linear) for m in aim.Generator(0, 2, 2, 8)) == 5
    for net in (ivgen.Generator(100, 3, 64, 64), ivgen.Encoder(100, 3, 64, 64)):        # DCGAN's initial weights in all three
        weight = [m for m in net.modules() if isinstance(m, torch.nn.modules.conv._ConvNd)][1].weight
        assert abs(weight.std() - .02) < 1e-3


@pytest.mark.parametrize("module, model, kind", EVERY_MODEL)
def test_no_tensor_of_a_step_is_left_on_the_cpu(module, model, kind, monkeypatch):
    """On a pretended CUDA device: shapes and devices are followed, and checked at each operation, without numbers."""
    def to(self, device=None, memory_format=None):                  # Module.to, which cannot move pretended tensors
        for part in self.modules():
            for name, p in (*part._parameters.items(), *part._buffers.items()):
                if p is not None:
                    moved = p.detach().to(device)
                    where = part._parameters if name in part._parameters else part._buffers
                    where[name] = torch.nn.Parameter(moved, p.requires_grad) if where is part._parameters else moved
        return self

    def grad(loss, inputs, *_, **__):                               # the engine itself wants a real device
        loss = loss if torch.is_tensor(loss) else loss[0]
        assert loss.device.type == "cuda"
        return [torch.zeros_like(p) + loss.sum() for p in ([inputs] if torch.is_tensor(inputs) else inputs)]

    net, x = any_model(module, model, kind)
    machine = module.Machine()
    machine.device, machine.autocast = torch.device("cuda:0"), contextlib.nullcontext
    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(torch.autograd, "grad", grad)
    phases = [dict(map_from=10 ** 9), dict(map_from=0)] if module is latentmap else [{}]
    with FakeTensorMode():
        for phase in phases:
            net = type(net)(dataclasses.replace(net.config, **phase), machine)
            for _ in range(2):
                losses = net.step(torch.zeros(x.shape, device="cuda"))
            out = [*losses.values(), net.sample(2), net.decode(torch.zeros(2, net.config.latent))]
            assert losses and {v.device.type for v in out} == {"cuda"}
            if getattr(net, "E", None) is not None:
                assert net.encode(torch.zeros(x.shape)).device.type == "cuda"   # images come from the CPU when evaluating


@pytest.mark.parametrize("name", [*PAPERS, "metrics", "data"])
def test_each_file_imports_alone(name, tmp_path):
    """Copying is a feature: the file in an empty folder, with nothing of this repository beside it."""
    (tmp_path / f"{name}.py").write_text((HERE / f"{name}.py").read_text())
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = ['.']; import {name}; print({name}.__file__)"],
                          cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0 and str(tmp_path) in done.stdout, done.stderr
    if name in PAPERS:                                              # it says what it would need to train
        done = subprocess.run([sys.executable, f"{name}.py", "--device", "cpu"], cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": ""})
        assert done.returncode == 2 and done.stderr == f"{name}.py: put data.py beside it, which training needs\n"


def results():
    """The lines of assets/results.jsonl: one measured number each, with what is needed to measure it again."""
    return [json.loads(line) for line in (HERE / "assets/results.jsonl").read_text().splitlines()]


def number(value, std=None, n=None):
    text = "not run" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return text if std is None else f"{text} ± {std:.2g} ({n})"


def render(table, lines):
    """One README table: a row a system, and for each metric the paper's value (where it has one) beside ours."""
    lines = [line for line in lines if line["table"] == table]
    metrics_of = list(dict.fromkeys(line["metric"] for line in lines))
    paper = {m for m in metrics_of if any(line["metric"] == m and line.get("published") is not None for line in lines)}
    heads = [h for m in metrics_of for h in ([f"{m}, paper", f"{m}, here"] if m in paper else [m])]
    text = [f"| | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for row in dict.fromkeys(line["row"] for line in lines):
        cells = []
        for m in metrics_of:
            line = next((x for x in lines if x["row"] == row and x["metric"] == m), None)
            if m in paper:
                cells.append("–" if line is None or line.get("published") is None else number(line["published"]))
            cells.append("–" if line is None else number(line["value"], line.get("std"), line.get("n_seeds")))
        text.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(text)


def readme_with_tables(text):
    """README.md with each `<!-- table NAME -->` ... `<!-- end -->` filled from the results."""
    lines = results()
    fill = lambda match: f"<!-- table {match[1]} -->\n{render(match[1], lines)}\n<!-- end -->"
    return re.sub(r"<!-- table (\S+) -->.*?<!-- end -->", fill, text, flags=re.DOTALL)


def test_the_readmes_tables_are_the_results():
    text = (HERE / "README.md").read_text()
    assert text == readme_with_tables(text), "python test_all.py rewrites the tables"
    assert {line["table"] for line in results()} == set(re.findall(r"<!-- table (\S+) -->", text))


def test_every_result_can_be_measured_again():
    for line in results():
        assert {"table", "row", "metric", "value"} <= set(line)
        if line["value"] is not None:
            assert {"command", "protocol", "machine", "versions"} <= set(line)
            assert "fid" not in line["metric"].lower().split() or "pt_inception-2015-12-05" in line["protocol"]


def test_readme_names_only_what_is_there():
    text = (HERE / "README.md").read_text()
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (HERE / path).exists(), path


if __name__ == "__main__":
    (HERE / "README.md").write_text(readme_with_tables((HERE / "README.md").read_text()))
