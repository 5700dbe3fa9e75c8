"""The tests, offline and on the CPU: `pytest test_all.py`.

What is compared with what: a loss with its equation written out naively, an estimator with a closed
form or an enumeration, a run with the same run interrupted, the tables of README.md and
assets/RESULTS.md with the file of results that they are written from. `python test_all.py` rewrites
those tables.
"""

import ast
import copy
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import runpy
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import types
import zipfile
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import aim  # noqa: E402
import data  # noqa: E402
import ivgen  # noqa: E402
import latentmap  # noqa: E402
import metrics  # noqa: E402

torch.set_num_threads(1)  # most tensors here are small; the other core has the subprocesses

PAPERS = (ivgen, aim, latentmap)


def cli(module, *args):
    """The exit code of a command line, in this process. Paths and numbers may be given as such."""
    return data.run_command(module.main, [str(arg) for arg in args])


def settings_from(module, *flags):
    """The settings that a command line asks for."""
    flags = [str(flag) for flag in flags]
    return data.parse(flags, module.FILE, module.__doc__, module.preset)[1]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 96 unlabelled pictures of random blobs: without classifier, runs take seconds."""
    path = tmp_path_factory.mktemp("pictures") / "blobs"
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(96):
        coarse = torch.rand(1, 3, 4, 4, generator=generator)
        fine = F.interpolate(coarse, (32, 32), mode="bilinear")
        torchvision.utils.save_image(fine, path / f"{i:03d}.png")
    return path


def quick(module, dataset, root, *more):
    """Flags of a run of `module` of a second or so, on a folder of pictures or a set of points.

    A later flag overrides an earlier one, so `more` may change any of them.
    """
    flags = ["--dataset", dataset, "--root", root, "--device", "cpu", "--amp", "off"]
    if dataset in data.POINT_SETS:
        flags += ["--width", 8, "--batch", 50, "--samples", 100]
    else:
        size = {ivgen: 32, aim: 28, latentmap: 32}[module]
        flags += ["--size", size, "--width", 4, "--latent", 8, "--batch", 16, "--samples", 50]
    return [*flags, *more]


def saved(run, name="last.pt"):
    """A checkpoint of a run, as plain data."""
    return torch.load(run / name, weights_only=True)


def log_of(run):
    """The lines of a run's log, as dicts."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def alike(a, b):
    """Whether two networks have the same weights, bit for bit."""
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def who_moved(net, step):
    """The names of the networks of which step() changes a weight."""
    before = dict(copy.deepcopy(net).named_children())
    step()
    return {name for name, network in net.named_children() if not alike(network, before[name])}


def asked_of(net, x):
    """What a step that moves nothing returns, and what it asks of its optimisers, call by call:
    [[(name, loss), ...], ...]; the pairs of a call move together.

    The random numbers start anew: they are those of the step again when this returns.
    """
    names = {id(value): name[10:] for name, value in data.optimisers_of(net).items()}
    torch.manual_seed(5)
    with mock.patch.object(net.machine, "descend_together") as descend_together:
        losses = net.step(x)
    torch.manual_seed(5)
    return losses, [[(names[id(optimiser)], loss) for optimiser, loss in call.args]
                    for call in descend_together.call_args_list]


def gradients_of(net, name, loss):
    """Those that optimiser_NAME would have, zeros where the loss does not reach."""
    own = [p for g in getattr(net, f"optimiser_{name}").param_groups for p in g["params"]]
    return torch.autograd.grad(loss, own, retain_graph=True, materialize_grads=True)


def assert_asked(net, calls, wanted):
    """The optimisers are asked in turn to lower these losses, in value and in gradient."""
    asked = [pair for call in calls for pair in call]
    assert [name for name, _ in asked] == [name for name, _ in wanted]
    for one, other in zip(asked, wanted):
        found, expected = ([loss, *gradients_of(net, name, loss)] for name, loss in (one, other))
        largest = max(g.abs().max().item() for g in expected[1:])
        assert largest > 1e-6
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * largest)


# ==================================================================================================
# data.py: data sets
# ==================================================================================================


def counted(n, stacked=False, labels=True):
    """Pictures that tell their index: all pixels of picture i are i; its label is i % 10."""
    x = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 8, 8).contiguous()
    y = torch.arange(n) % 10 if labels else None
    return data.Dataset("counted", "train", x, y, 1000 if stacked else 10, stacked)


def indices(x):
    """The indices of such pictures in a batch: (B,), or (B, 3) of a stacked set."""
    return data.to_uint8(x)[:, :, 0, 0].long().squeeze(1)


def drawn(batches, n):
    """The indices in the next n batches, as one list."""
    return torch.cat([indices(next(batches)[0]) for _ in range(n)]).tolist()


def save_pictures(folder, n, size=(16, 16), mode="RGB", suffix=".png", seed=0):
    """n pictures of random pixels as folder/0.png ...; returns their pixels (n, H, W[, 3])."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = (n, size[1], size[0], 3) if mode == "RGB" else (n, size[1], size[0])
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    for i in range(n):
        Image.fromarray(pixels[i]).save(folder / f"{i}{suffix}")
    return pixels


def refuses(sentence):
    return pytest.raises(data.UserError, match=sentence)


def no_network(*args, **kwargs):
    raise OSError("Network is unreachable")


def test_bytes_survive_the_floats_exactly():
    u8 = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = data.to_float(u8)
    assert x.min() == -1 and x.max() == 1 and x.dtype == torch.float32
    assert torch.equal(data.to_uint8(x), u8)
    assert data.to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    assert data.to_uint8(torch.tensor(0.9999)).item() == 255  # Truncation would give 254.
    with pytest.raises(ValueError, match="uint8"):
        data.to_float(x)


def test_resizing():
    stripes = torch.tensor([255, 0, 0, 255], dtype=torch.uint8).repeat(8).expand(1, 1, 32, 32)
    small = data.to_float(stripes, 8)
    assert small.shape == (1, 1, 8, 8)
    assert small[..., 1:-1].abs().max() < 0.3  # Antialiased: stripes turn grey, not black.
    flat = torch.full((2, 3, 28, 28), 77, dtype=torch.uint8)
    large = torch.full((2, 3, 64, 64), 77, dtype=torch.uint8)
    assert torch.equal(data.to_uint8(data.to_float(flat, 64)), large)
    ramp = torch.arange(0, 256, 16, dtype=torch.uint8).expand(1, 1, 16, 16)
    assert torch.equal(data.to_float(ramp, 16), data.to_float(ramp))
    # Of half-pixel centres, sample 2i + 1 lies a quarter of the way from i to i + 1.
    up = data.to_float(ramp, 32)[0, 0, 0]
    assert torch.allclose((up[1:-1:2] + 1) * 127.5, torch.arange(15) * 16 + 4.0, atol=1e-3)


def test_an_epoch_is_a_permutation_of_everything_and_no_two_are_alike():
    orders = []
    for seed in (0, 1, 2**62 + 5, 2**62 + 6):  # Any seed will do.
        batches = data.Batches(counted(60), 6, seed=seed)
        assert batches.steps_per_epoch == 10
        orders += [drawn(batches, 10) for _ in range(3)]
    assert all(sorted(order) == list(range(60)) for order in orders)
    orders.append(list(range(60)))
    assert len({tuple(order) for order in orders}) == len(orders)
    x, y = next(data.Batches(counted(60), 6))
    assert x.shape == (6, 1, 8, 8) and torch.equal(y, indices(x) % 10)
    x, y = next(data.Batches(counted(60, labels=False), 6, size=12))
    assert x.shape == (6, 1, 12, 12) and y is None


@pytest.mark.parametrize("kind", ["images", "stacked", "points"])
def test_batches_resume_bit_for_bit(kind):
    dataset = counted(50, stacked=kind == "stacked")
    batch = 7  # 7 batches are an epoch, and some items are left over.
    if kind == "points":
        dataset = data.load("swissroll")
        batch = 700
    batches = data.Batches(dataset, batch, seed=5)
    told = [(batches.state_dict(), next(batches)) for _ in range(18)]  # two ends of an epoch
    assert told[7][0] == {"epoch": 1, "position": 0} and told[15][0] == {"epoch": 2, "position": 1}
    for start in (0, 1, 6, 7, 8, 13, 14, 17):
        resumed = data.Batches(dataset, batch, seed=5)
        for _ in range(start % 4):  # Whatever it did before is forgotten.
            next(resumed)
        resumed.load_state_dict(told[start][0])
        for _, (x, y) in told[start:]:
            x2, y2 = next(resumed)
            assert torch.equal(x, x2) and torch.equal(y, y2)


def test_ranks_share_one_permutation():
    order = drawn(data.Batches(counted(103), 100, seed=1), 1)
    shards = []
    for rank in range(4):
        batches = data.Batches(counted(103), 5, seed=1, rank=rank, world=4)
        assert batches.steps_per_epoch == 5
        shard = drawn(batches, 5)
        assert shard == order[rank::4]
        shards += shard
    assert sorted(shards) == sorted(order)


def test_batches_that_cannot_be_drawn():
    with refuses("11 is more than the 10 items of counted: give"):
        data.Batches(counted(10), 11)
    with refuses("5 items of counted for each device"):
        data.Batches(counted(10), 6, world=2)
    with refuses("a batch of 0 is no batch"):
        data.Batches(counted(10), 0)
    with refuses("batch 9 of an epoch that now has 2"):
        data.Batches(counted(10), 5).load_state_dict({"epoch": 0, "position": 9})


def test_ordered():
    dataset = counted(25)
    parts = list(data.ordered(dataset, batch=10))
    assert [len(x) for x, _ in parts] == [10, 10, 5]
    assert torch.cat([indices(x) for x, _ in parts]).tolist() == list(range(25))
    assert indices(next(data.ordered(dataset, n=3))[0]).tolist() == [0, 1, 2]
    assert sum(len(x) for x, _ in data.ordered(dataset, n=99)) == 25
    assert not list(data.ordered(dataset, n=0))
    assert next(data.ordered(dataset, n=2, size=12))[0].shape == (2, 1, 12, 12)
    bare = indices(next(data.ordered(counted(200, labels=False), n=20))[0])
    assert bare.max() > 100 and len(bare.unique()) == 20  # Nothing tells in what order they lie.
    asked = indices(next(data.ordered(counted(200), n=20, permuted=True))[0])
    assert torch.equal(asked, bare)
    # Stored class by class, the first ten would be of five classes at most.
    dataset.y = dataset.y.sort().values
    x, y = next(data.ordered(dataset, n=10))
    assert torch.equal(x, next(data.ordered(dataset, n=10))[0]) and len(y.unique()) > 5
    assert torch.equal(dataset.y[indices(x)], y)


def test_stacked_channels_carry_the_label():
    dataset = counted(50, stacked=True)
    assert dataset.channels == 3 and dataset.classes == 1000 and len(dataset) == 50
    weights = torch.tensor([100, 10, 1])
    batches = data.Batches(dataset, 10)
    seen = []
    for _ in range(5):
        x, y = next(batches)
        assert x.shape == (10, 3, 8, 8) and torch.equal(y, (indices(x) % 10 * weights).sum(1))
        seen.append(indices(x))
    seen = torch.cat(seen)
    for channel in range(3):  # Three permutations give every digit once in each colour.
        assert sorted(seen[:, channel].tolist()) == list(range(50))
    assert (seen[:, 0] == seen[:, 1]).sum() < 10 and (seen[:, 1] == seen[:, 2]).sum() < 10
    x, y = next(data.ordered(dataset, n=200, batch=200))  # more triples than digits
    assert len(x) == 200 and torch.equal(y, (indices(x) % 10 * weights).sum(1))
    assert torch.equal(x, next(data.ordered(dataset, n=200, batch=200))[0])
    assert not torch.equal(x, next(data.ordered(dataset, n=200, batch=200, seed=1))[0])


def test_a_fingerprint_is_of_the_content_alone():
    known = data.fingerprint(counted(20))
    assert known == "bae0b8e2133eaae4"  # Checkpoints and caches of earlier runs hold such digits.
    others = [counted(21), counted(20, labels=False)]
    for name in ("x", "y"):
        changed = counted(20)
        getattr(changed, name)[7] += 1
        others.append(changed)
    flat = counted(20)
    flat.x = flat.x.view(20, 1, 4, 16)
    assert len({known, *map(data.fingerprint, [*others, flat])}) == 6
    renamed = dataclasses.replace(counted(20), name="other", split="test")
    renamed.x = renamed.x.transpose(2, 3)  # equal, but lies differently in memory
    assert data.fingerprint(renamed) == known


def test_digits_as_loaded():
    train, test = data.load_pair("digits")
    assert train.x.shape == (60_000, 1, 28, 28) and test.x.shape == (10_000, 1, 28, 28)
    assert train.x.dtype == torch.uint8 and train.classes == 10
    assert (train.kind, train.channels, train.split, test.split) == ("images", 1, "train", "test")
    assert train.y.bincount().tolist() == [6000] * 10 and test.y.bincount().tolist() == [1000] * 10
    everything = {picture.tobytes() for x in (train.x, test.x) for picture in x.numpy()}
    assert len(everything) == 70_000  # There is no picture twice, in or across the splits.
    assert torch.equal(data.load("stacked-digits", split="test").x, test.x)


def test_digits_follow_from_the_seed_alone(monkeypatch):
    state = torch.random.get_rng_state()
    threads = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    a, y = data.draw_digits(1200, 1)
    assert torch.equal(a, data.draw_digits(1200, 1)[0])
    assert not (a == data.draw_digits(1200, 2)[0]).flatten(1).all(1).any()
    assert torch.equal(y, torch.arange(1200) % 10)
    assert torch.equal(torch.random.get_rng_state(), state) and threads == [1, 7] * 3


def test_digits_look_like_mnist_to_the_numbers():
    x = data.draw_digits(2000, 3)[0].float()
    assert x.max() == 255 and x.min() == 0
    assert 22 < x.mean() < 42  # MNIST: 33.3
    assert ((x > 0) & (x < 255)).float().mean() < 0.2  # The rest is black or white.
    assert x[:, :, 0].max(2).values.gt(0).float().mean() < 0.01  # The frame stays black.
    ones = x[1::10, 0].mean(0)
    columns = torch.arange(28)
    top, bottom = ((rows * columns).sum() / rows.sum() for rows in (ones[4:9], ones[19:24]))
    assert top > bottom + 1  # In writing, the top leans to the right.
    for axis in (2, 3):
        centre = (x.sum(axis).squeeze(1) * torch.arange(28.0)).sum(1) / x.sum((1, 2, 3))
        assert (centre - 13.5).abs().max() < 2.5 and (centre.mean() - 13.5).abs() < 0.1


def test_digits_can_be_told_apart_and_are_not_all_alike():
    train, y = data.draw_digits(4000, 1)
    test, truth = data.draw_digits(500, 2)
    distances = torch.cdist(test.flatten(1).float() / 255, train.flatten(1).float() / 255)
    nearest, index = distances.min(1)
    assert (y[index] == truth).float().mean() > 0.97
    assert nearest.min() > 0.3  # No test picture is a training picture, nor nearly one.
    for digit in range(10):
        assert train[y == digit].float().std(0).max() > 60  # Each is written in many ways.


def test_splines_go_through_their_points():
    line = data._spline(5, 16, closed=False)
    assert torch.allclose(line[::4], torch.eye(5), atol=1e-6)
    assert torch.allclose(line.sum(1), torch.ones(17), atol=1e-6)
    assert torch.allclose(line @ torch.arange(5.0), torch.linspace(0, 4, 17), atol=1e-5)
    square = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1], [0, 0]])
    closed = data._spline(5, 400, closed=True) @ square
    start = F.normalize(closed[1] - closed[0], dim=0)
    end = F.normalize(closed[-1] - closed[-2], dim=0)
    assert torch.allclose(start, end, atol=0.05)  # There is no corner where it closes.


def test_glyphs_use_all_their_segments():
    points, ends, _ = data._glyph_tables()
    assert [digit for digit, _ in data.GLYPHS] == sorted([*range(10)] * 2)  # so draw_digits counts
    first, second = (ends @ points).view(len(points), 2, data.SEGMENTS, 2).unbind(1)
    length = (second - first).norm(dim=2)
    assert length.min() > 0 and (length / 5).max() < 1.6  # pixels: 20 are the box of 100
    way = (second - first) / length[..., None]
    assert (way[0, 0] * way[0, -1]).sum() > 0.95  # The first zero closes without a corner.


@pytest.mark.parametrize("name, modes, std", [("grid25", 25, 0.05), ("ring8", 8, 0.01)])
def test_gaussian_mixtures(name, modes, std):
    train, test = data.load_pair(name)
    assert train.x.shape == (100_000, 2) and train.x.dtype == torch.float32
    assert train.kind == "points" and len(test) == 10_000
    assert train.classes == modes and train.y.unique().tolist() == list(range(modes))
    centres = torch.stack([train.x[train.y == k].mean(0) for k in range(modes)])
    if name == "grid25":
        wanted = {(a, b) for a in (-4, -2, 0, 2, 4) for b in (-4, -2, 0, 2, 4)}
        assert {tuple(c) for c in centres.round().int().tolist()} == wanted
        assert (centres - centres.round()).abs().max() < 0.01
    else:
        assert (centres.norm(dim=1) - 1).abs().max() < 0.01
        nearest = torch.cdist(centres, centres).fill_diagonal_(9).min(1).values
        assert (nearest - 2 * math.sin(math.pi / 8)).abs().max() < 0.01
    means, told = data.mixture(name)
    assert told == std and (means - centres).abs().max() < 0.01 and data.mixture("digits") is None
    spread = (train.x - centres[train.y]).std(0)
    assert (spread - std).abs().max() < 0.02 * std
    each = 100_000 / modes
    assert (train.y.bincount() - each).abs().max() < 5 * each**0.5
    assert torch.equal(data.load(name).x, train.x)
    assert not torch.equal(train.x[:10_000], test.x)


def test_swissroll_is_the_spiral():
    train, test = data.load_pair("swissroll")
    assert train.x.shape == (5000, 2) and train.channels == 2 and train.classes == 10
    radius = train.x.norm(dim=1)  # t / 4.5 pi, and t is uniform from 1.5 pi to 4.5 pi
    assert 1 / 3 - 1e-6 < radius.min() < 0.335 and 0.998 < radius.max() <= 1 + 1e-6
    t = radius * 4.5 * math.pi
    spiral = torch.stack([radius * t.cos(), radius * t.sin()], 1)
    assert torch.allclose(train.x, spiral, atol=1e-4)
    assert (train.y + 0.5 - (t / math.pi - 1.5) / 3 * 10).abs().max() < 0.501
    assert (radius.mean() - 2 / 3).abs() < 0.01
    assert not torch.isin(test.x[:, 0], train.x[:, 0]).all()


def write_mnist(root, n=20, folder="MNIST"):
    """Files in the genuine idx format: magic number, sizes as big-endian integers, bytes."""
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (2, n, 28, 28), dtype=np.uint8)
    labels = (np.arange(n) % 10).astype(np.uint8)
    for part, images in zip(("train", "t10k"), pixels):
        header = np.array([0x803, n, 28, 28], ">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = np.array([0x801, n], ">i4").tobytes()
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return pixels


def test_mnist_is_read_where_it_lies(tmp_path, monkeypatch):
    pixels = write_mnist(tmp_path)
    write_mnist(tmp_path, folder="FashionMNIST")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    for got, split, wanted in zip(data.load_pair("mnist", tmp_path), ("train", "test"), pixels):
        assert torch.equal(got.x, torch.from_numpy(wanted)[:, None])
        assert got.y.tolist() == [*range(10)] * 2 and got.y.dtype == torch.int64
        assert (got.name, got.split, got.classes) == ("mnist", split, 10)
    assert data.load("fashion-mnist", tmp_path).classes == 10
    stacked = data.load("stacked-mnist", tmp_path)
    assert stacked.stacked and (stacked.name, stacked.classes) == ("stacked-mnist", 1000)
    x, y = next(data.ordered(stacked, n=5))
    assert x.shape == (5, 3, 28, 28) and int(y.max()) < 1000
    assert sorted(tmp_path.rglob("*")) == before  # Nothing was written.
    labels = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    header = np.array([0x801, 20], ">i4").tobytes()
    fewer = np.array([0x801, 7], ">i4").tobytes()
    for content in (header + bytes(range(20)), fewer + bytes(7)):
        labels.write_bytes(content)
        with refuses("mnist in .*MNIST/raw is damaged: it has not one label from 0 to 9 for each"):
            data.load("mnist", tmp_path)


@pytest.mark.parametrize("name, says", [
    ("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw"), ("celeba", "img_align_celeba"),
    ("stacked-mnist", "labels-idx1"), ("cifar10", "cifar-10-python.tar.gz"),
    ("stl10", "stl10_binary.tar.gz"), ("mnist cut short", "MNIST/raw"),
    ("mnist read-only", "it is marked read-only")])
def test_a_failed_download_says_what_to_put_where(tmp_path, monkeypatch, capsys, name, says):
    name, _, state = name.partition(" ")
    if state == "cut short":
        write_mnist(tmp_path)
        file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
        file.write_bytes(file.read_bytes()[:1000])
    if state == "read-only":
        tmp_path.chmod(0o555)
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setitem(sys.modules, "gdown", None)
    with refuses("by hand, put there") as error:
        data.load(name, tmp_path)
    message = str(error.value)
    assert message.startswith(f"{name.removeprefix('stacked-')} could not be read from {tmp_path}")
    assert says in message and "\n" not in message
    assert state or "unreachable" in message or "gdown" in message
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == (state != "read-only")  # torchvision is silent.
    assert state != "read-only" or not list(tmp_path.iterdir())


def test_a_download_is_announced_in_one_line_and_else_silent(tmp_path, capsys):
    def make(download):
        if not download:
            raise RuntimeError("Dataset not found")
        print("torchvision's talk")
        print("and its progress bar", file=sys.stderr)
        return "the dataset"

    assert data._torchvision("cifar10", tmp_path, make) == "the dataset"
    announced = f"cifar10 is not (whole) in {tmp_path}: downloading it\n"
    assert capsys.readouterr() == ("", announced)


def test_cifar10_in_its_own_format(tmp_path, monkeypatch):
    # The files are not the real ones, so their checksums are let pass.
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rows = np.random.default_rng(0).integers(0, 256, (6, 4, 3072), np.uint8)
    for part, name in zip(rows, [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        (folder / name).write_bytes(pickle.dumps({"data": part, "labels": [0, 1, 2, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["x"] * 10}))
    train, test = data.load_pair("cifar10", tmp_path)
    assert np.array_equal(train.x, rows[:5].reshape(20, 3, 32, 32))
    assert np.array_equal(test.x, rows[5].reshape(4, 3, 32, 32)) and test.x.is_contiguous()
    assert train.y.tolist() == [0, 1, 2, 9] * 5


def test_stl10_in_its_own_format(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (7, 3, 96, 96), np.uint8)
    for part, images in zip(("train", "unlabeled", "test"), np.split(pixels, [2, 5])):
        columns = images.transpose(0, 1, 3, 2)  # as they are stored
        (folder / f"{part}_X.bin").write_bytes(columns.tobytes())
        (folder / f"{part}_y.bin").write_bytes(bytes([1, 2]))
    train, test = data.load_pair("stl10", tmp_path)
    assert np.array_equal(train.x, pixels[:5]) and np.array_equal(test.x, pixels[5:])
    assert train.y is test.y is None and train.classes == 0


def test_celeba_is_cropped_to_140(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CelebA, "_check_integrity", lambda self: True)
    folder = tmp_path / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{i:06d}.png" for i in range(1, 6)]
    pixels = np.zeros((218, 178, 3), np.uint8)
    pixels[39:179, 19:159] = 255  # White inside the central 140x140, black outside.
    for name in names:
        Image.fromarray(pixels).save(folder / "img_align_celeba" / name)
    header = "5\nheader\n"
    for file, head, row in (("list_eval_partition", "", "0"), ("identity_CelebA", "", "7"),
                            ("list_bbox_celeba", header, "1 2 3 4"),
                            ("list_landmarks_align_celeba", header, "1 " * 10),
                            ("list_attr_celeba", header, "1 " * 40)):
        rows = [row] * 3 + ["2" if row == "0" else row] * 2  # The last two are test pictures.
        text = head + "".join(f"{name} {row.strip()}\n" for name, row in zip(names, rows))
        (folder / f"{file}.txt").write_text(text)
    train = data.load("celeba", tmp_path)
    test = data.load("celeba", tmp_path, 32, split="test")
    assert train.x.shape == (3, 3, 64, 64) and test.x.shape == (2, 3, 32, 32) and train.y is None
    assert train.x.min() == test.x.min() == 255  # None of the black frame is mixed in.
    (folder / "img_align_celeba" / names[2]).unlink()
    with refuses(r"1 of 3 pictures of celeba .*/000003\.png \(No such file or directory\)"):
        data.load("celeba", tmp_path)


@pytest.mark.parametrize("damage, says", [
    (None, None), ("no keys", "damaged or"), ("half", "damaged or was copied in part"),
    ("not opened", "damaged or"), ("no file", r"church_outdoor_val_lmdb\.zip"),
    ("no lmdb", "pip install lmdb")])
def test_lsun_is_read_from_lmdb(damage, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stored = {}
    for i in range(0 if damage == "no keys" else 3):
        picture = io.BytesIO()
        Image.new("RGB", (40, 30), (10 * i, 20, 30)).save(picture, "png")
        stored[b"key%d" % i] = picture.getvalue()
    lmdb = mock.MagicMock(Error=type("Error", (Exception,), {}))
    lmdb.open.side_effect = lmdb.Error if damage == "not opened" else None
    env = lmdb.open.return_value.__enter__.return_value
    env.info.return_value = env.stat.return_value = dict(last_pgno=1, psize=4096)
    transaction = env.begin.return_value.__enter__.return_value
    transaction.get = stored.get

    def iternext(keys, values):
        return list(stored) if keys and not values else None

    transaction.cursor.return_value.iternext = iternext
    monkeypatch.setitem(sys.modules, "lmdb", None if damage == "no lmdb" else lmdb)
    file = Path("root/church_outdoor_train_lmdb/data.mdb")
    file.parent.mkdir(parents=True)
    file.write_bytes(bytes(4096 if damage == "half" else 8192))  # Of half lmdb would die of SIGBUS.
    if damage:
        with refuses(says):
            data.load("lsun-church", "root", split="test" if damage == "no file" else "train")
        return
    got = data.load("lsun-church", "root")
    assert got.x.shape == (3, 3, 64, 64) and got.x[2, :, 5, 5].tolist() == [20, 20, 30]
    assert got.y is None and os.listdir() == ["root"]  # No pickle of the keys lies here.
    lmdb.open.return_value.__exit__.assert_called_once()  # It cannot be opened twice.


def test_folders_with_and_without_classes(tmp_path):
    pixels = save_pictures(tmp_path / "cats", 5)
    (tmp_path / "cats" / "readme.txt").write_text("not a picture")
    (tmp_path / "cats" / ".hidden.png").write_text("nor this")
    got = data.load(str(tmp_path / "cats"), tmp_path / "root", split="test")
    # There is no test/, so it says train.
    assert (got.name, got.split, got.classes, got.y) == ("cats", "train", 0, None)
    assert torch.equal(got.x, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    for i, name in enumerate(("ant", "bee", "cow")):
        save_pictures(tmp_path / "zoo" / name, i + 1, suffix=".jpg", seed=i)
    (tmp_path / "zoo" / "empty").mkdir()
    save_pictures(tmp_path / "zoo" / "bee" / "deeper", 1)
    got = data.load(tmp_path / "zoo", tmp_path / "root")
    assert got.y.tolist() == [0, 1, 1, 1, 2, 2, 2] and got.classes == 3
    assert got.x.shape == (7, 3, 16, 16)


def test_train_and_test_number_their_classes_alike(tmp_path, capsys):
    zoo = tmp_path / "zoo"
    for name in ("ant", "bee", "cow"):
        save_pictures(zoo / "Train" / name, 2)
    save_pictures(zoo / "test" / "cow", 3)  # class 0 of those that are here, class 2 of all
    train, test = data.load_pair(zoo, tmp_path / "root")
    assert train.y.tolist() == [0, 0, 1, 1, 2, 2] and train.split == "train"
    assert test.y.tolist() == [2, 2, 2] and test.classes == 3 and test.split == "test"
    (zoo / "test").rename(zoo / "Valid")
    assert data.load(zoo, tmp_path / "root", split="test").y.tolist() == [2, 2, 2]
    (zoo / "Valid").rename(zoo / "test")
    save_pictures(zoo / "test" / "dog", 1)
    with refuses("test/dog has pictures of its own, but .*dog has none"):
        data.load(zoo, tmp_path / "root", split="test")
    for part in ("train/a", "train/b", "test"):
        save_pictures(tmp_path / "halves" / part, 1)
    with refuses("test has pictures of its own, but .*train has none"):
        data.load(tmp_path / "halves", tmp_path / "root", split="test")
    save_pictures(tmp_path / "halves", 3)
    capsys.readouterr()
    data.load(tmp_path / "halves" / ".." / "halves", tmp_path / "root")
    assert "3 pictures beside train/ are left out" in capsys.readouterr().err
    save_pictures(zoo / "bus", 2)  # A class called train hides no other.
    with refuses("has pictures in train/ and beside it, in bus"):
        data.load(zoo, tmp_path)


@pytest.mark.parametrize("rank, order", [("0", "train test barrier"), ("3", "barrier train test"),
                                         (None, "train test")])
def test_one_rank_of_each_host_loads_first(rank, order, monkeypatch):
    done = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: done.append("barrier"))
    monkeypatch.setattr(data, "load", lambda *args: done.append(args[3]) or counted(9))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    data.load_pair("celeba")
    assert " ".join(done) == order


def test_pictures_of_differing_sizes_are_cropped(tmp_path):
    folder = tmp_path / "mix"
    folder.mkdir()
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = 200  # the central square
    Image.fromarray(wide).save(folder / "a.png")
    Image.fromarray(wide.transpose(1, 0, 2)).save(folder / "b.png")
    Image.new("RGB", (100, 80), (200, 200, 200)).save(folder / "c.webp", lossless=True)
    got = data.load(folder, tmp_path / "root", size=8)
    assert got.x.shape == (3, 3, 8, 8)
    # Resizing before the crop mixes the neighbours into its edge only.
    assert got.x[..., 1:-1, 1:-1].eq(200).all()
    assert data.load(folder, tmp_path / "root", size=24).x.shape == (3, 3, 24, 24)
    for name, shape in (("a.png", "48x16"), ("b.png", "16x48"), ("c.webp", "100x80")):
        with refuses(rf"{name} is not square \({shape}\): give a size"):
            data.load(folder, tmp_path / "root")
        (folder / name).unlink()
    Image.new("RGB", (80, 80)).save(folder / "0.png")
    Image.new("RGB", (20, 20)).save(folder / "c.png")
    with refuses(r"mix differ in size \(.*0.png, .*c.png\): give a"):
        data.load(folder, tmp_path / "root")


def test_grey_and_colour(tmp_path):
    grey = torch.from_numpy(save_pictures(tmp_path / "grey", 3, mode="L"))
    got = data.load(tmp_path / "grey", tmp_path / "root")
    assert got.channels == 1 and torch.equal(got.x[:, 0], grey)
    for place, colour in (("!", 0), ("z", 3)):  # before all grey ones, or after them
        folder = tmp_path / f"mixed{colour}"
        save_pictures(folder, 3, mode="L")
        Image.new("RGB", (16, 16), (1, 2, 3)).save(folder / f"{place}.png")
        x = data.load(folder, tmp_path / "root").x
        assert x.shape == (4, 3, 16, 16) and x[colour, :, 4, 4].tolist() == [1, 2, 3]
        rest = torch.cat([x[:colour], x[colour + 1 :]])
        assert torch.equal(rest, grey[:, None].expand(-1, 3, -1, -1))
    save_pictures(tmp_path / "two" / "train", 2)
    save_pictures(tmp_path / "two" / "test", 2, mode="L")
    with refuses("two: training pictures have 3 channels, test pictures 1; make all grey or all"):
        data.load_pair(str(tmp_path / "two"), tmp_path)


def test_unusual_pictures(tmp_path):
    """Each is read in one way, and what was changed is said."""
    said = ""

    def read(image, suffix="png", **options):
        image.save(tmp_path / f"x.{suffix}", **options)
        picture, changes = data.read_picture(tmp_path / f"x.{suffix}")
        assert said in "; ".join(changes) and bool(said) == bool(changes)
        return picture

    got = read(Image.new("LA", (16, 16), (100, 255)))
    assert got.shape == (1, 16, 16) and (got == 100).all()
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert read(palette)[:, 3, 3].tolist() == [10, 20, 30]
    palette.putpalette([0, 0, 0, 70, 70, 70])
    assert read(palette, "gif").shape == (1, 16, 16) and (read(palette, "gif") == 70).all()
    assert set(read(Image.new("1", (16, 16), 1)).flatten()) == {255}
    said = "transparent, laid over white"
    got = read(Image.new("RGBA", (16, 16), (255, 0, 0, 0)))
    assert got.shape == (3, 16, 16) and (got == 255).all()  # What is invisible is white.
    assert (read(palette, transparency=1) == 255).all()
    said = ""
    for suffix in ("png", "webp", "jpg"):  # EXIF that is none
        assert read(Image.new("L", (16, 16), 9), suffix, exif=b"Exif\0\0garbage!").max() < 12
    said = "16 bits, scaled to 8"
    sixteen = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    got = read(Image.fromarray(sixteen))
    assert got.shape == (1, 16, 16) and np.abs(got[0].astype(float) - sixteen / 257).max() <= 0.5
    rows = b"".join(b"\0" + bytes([200, 100, 50, 100, 0, 100] * 16) for _ in range(16))
    png = b"\x89PNG\r\n\x1a\n"
    header = b"IHDR" + b"\0\0\0\x10\0\0\0\x10\x10\x02\0\0\0"
    for part in (header, b"IDAT" + zlib.compress(rows), b"IEND"):
        png += (len(part) - 4).to_bytes(4, "big") + part + zlib.crc32(part).to_bytes(4, "big")
    (tmp_path / "x.png").write_bytes(png)  # 16 x 16 RGB of 16 bits, which Pillow cannot write
    got, changes = data.read_picture(tmp_path / "x.png")
    assert got[:, 3, 3].tolist() == [200, 50, 0] and changes == [said]
    said = "nearly black, as no value of 65,535 is above"
    assert read(Image.fromarray(sixteen // 16)).max() == 16  # 12 bits stored in 16
    wide = sixteen.astype(np.int32)
    assert read(Image.fromarray(wide // 256), "tif").max() == 1
    for values in (2 * wide, wide - 9):
        with pytest.raises(ValueError, match="32-bit numbers, which have no fixed range"):
            read(Image.fromarray(values), "tif")
    said = "turned upright"
    rows = np.repeat(np.uint8([[0], [255]]), [8, 8], 0)  # black above white
    exif = Image.Exif()
    exif[0x0112] = 3  # The camera was held upside down.
    got = read(Image.fromarray(rows.repeat(16, 1)), exif=exif)
    assert (got[0, :8] == 255).all() and (got[0, 8:] == 0).all()
    said = "the first of several frames"
    frames = [Image.new("L", (16, 16), shade) for shade in (0, 90, 255)]
    for suffix in ("gif", "webp", "tif", "png"):
        assert read(frames[0], suffix, save_all=True, append_images=frames[1:]).max() == 0


def test_what_was_changed_or_passed_over_is_counted(tmp_path, capsys):
    folder = tmp_path / "zoo"
    save_pictures(folder / "ant", 3, size=(16, 24))
    save_pictures(folder / "bee", 2)
    Image.fromarray(np.full((16, 16), 50_000, np.uint16)).save(folder / "bee" / "9.png")
    for name in ("a.jfif", "b.HEIC", "c.jfif", "README", ".hidden"):
        (folder / "bee" / name).write_text("x")
    assert len(data.load(folder, tmp_path / "root", 8)) == 6
    passed, decoded, changed = capsys.readouterr().err.splitlines()
    assert passed == f"{folder}: 4 files passed over for their suffix: 2 .jfif, 1 README, 1 .heic"
    assert "decoding zoo" in decoded
    assert changed == ("pictures of zoo were changed: 3 of 6: oblong, cut to the central square; "
                       "1 of 6: 16 bits, scaled to 8")
    data.load(folder, tmp_path / "root", 8)
    assert capsys.readouterr().err == ""  # It has been said.


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_all_that_cannot_be_read_is_named_at_once(tmp_path):
    """Before anything is computed; a pipe does not hang, and no other program is called."""
    folder = tmp_path / "cats"
    save_pictures(folder, 3)
    whole = (folder / "1.png").read_bytes()
    (folder / "a.png").write_bytes(whole[:len(whole) // 2])
    (folder / "b.png").write_bytes(b"")
    (folder / "c.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\nshowpage\n")
    os.mkfifo(folder / "d.png")
    (folder / "e.png").symlink_to("nothing")
    Image.fromarray(np.zeros((14_000, 14_000), bool)).save(folder / "f.png")
    Image.new("1", (9_600, 9_600)).save(folder / "g.png")
    Image.new("RGB", (16, 7)).save(folder / "h.png")
    Image.new("F", (16, 16)).save(folder / "i.tif")
    with refuses("9 of 12 pictures of cats cannot be read; mend or remove them: ") as error:
        data.load(folder, tmp_path / "root", 16)
    named = re.findall(r"/(\w)\.\w+ \((.*?)\)", str(error.value))
    reasons = ("truncated", "empty", "not a picture", "not a regular file", "No such file",
               "196000000", "9600x9600 pixels: too many", "16x7 pixels: too few", "floating-point")
    assert [name for name, _ in named] == list("abcdefghi")
    for (_, found), reason in zip(named, reasons):
        assert reason in found
    for n in range(9):
        shutil.copy(folder / "b.png", folder / f"z{n}.png")
    with refuses(r"18 of 21 pictures .*, [^,]*/z0.png \(empty\) and 8 more$"):
        data.load(folder, tmp_path / "root", 16)
    assert not list((tmp_path / "root").glob("cache/*"))  # No failure was cached.


def test_more_pictures_than_memory_is_a_sentence_with_the_need(tmp_path, monkeypatch, capsys):
    save_pictures(tmp_path / "cats", 3)
    empty = np.empty
    monkeypatch.setattr(np, "empty", lambda shape, dtype: empty((10**12, *shape), dtype))
    assert cli(data, tmp_path / "cats", "--root", tmp_path) == 2
    said = capsys.readouterr().err
    assert "out of memory (Unable to allocate 2.05 PiB for an array with shape" in said
    assert "--size" in said and said.count("\n") == 1


def test_the_cache_is_used_while_nothing_changes(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "cats"
    root = tmp_path / "root"
    save_pictures(folder, 4)
    decoded = []
    real = data._decode
    monkeypatch.setattr(data, "_decode", lambda *args: decoded.append(1) or real(*args))
    first = data.load(folder, root).x
    assert "decoding cats: 4 of 4" in capsys.readouterr().err
    again = data.load(folder, root).x
    assert len(decoded) == 1 and torch.equal(first, again) and capsys.readouterr().err == ""
    assert data.load(folder, root, size=8).x.shape[-1] == 8 and len(decoded) == 2
    assert len(list((root / "cache").iterdir())) == 2  # one file a size, nothing unfinished

    image = folder / "2.png"
    Image.new("RGB", (16, 16), (9, 9, 9)).save(image)  # other content
    assert data.load(folder, root).x[2].unique().tolist() == [9] and len(decoded) == 3
    os.utime(image, ns=(1, 1))  # The content is the same, but who knows.
    assert len(data.load(folder, root)) == 4 and len(decoded) == 4
    image.unlink()
    assert len(data.load(folder, root)) == 3 and len(decoded) == 5
    folder.rename(tmp_path / "dogs")
    assert data.load(tmp_path / "dogs", root).name == "dogs" and len(decoded) == 6
    assert len(list((root / "cache").iterdir())) == 3  # Changes replaced the old state's file.


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "flipped", "other", "shape", "dtype"])
def test_a_damaged_cache_is_made_anew(tmp_path, capsys, damage):
    folder = tmp_path / "cats"
    root = tmp_path / "root"
    save_pictures(folder, 40)
    wanted = data.load(folder, root).x.clone()
    (file,) = (root / "cache").iterdir()
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.unlink()  # The first load may still have it mapped.
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    broken = dict(empty=b"", cut=whole[:middle], noise=bytes(range(256)) * 40, flipped=flipped)
    stamp = torch.load(io.BytesIO(whole))["stamp"]
    made = {"other": [1, 2, 3], "shape": {"stamp": stamp, "x": wanted[:, 0]},
            "dtype": {"stamp": stamp, "x": wanted.float()}}
    if damage in made:
        torch.save(made[damage], file)
    else:
        file.write_bytes(broken[damage])
    capsys.readouterr()
    assert torch.equal(data.load(folder, root).x, wanted)
    assert f"{file} is damaged: made anew\n" in capsys.readouterr().err
    assert torch.equal(data.load(folder, root).x, wanted) and capsys.readouterr().err == ""


def test_a_cache_that_cannot_be_written_does_not_stop_the_run(tmp_path, monkeypatch, capsys):
    pixels = torch.from_numpy(save_pictures(tmp_path / "cats", 3))
    monkeypatch.setattr(torch, "save", no_network)
    got = data.load(tmp_path / "cats", tmp_path / "root")
    assert torch.equal(got.x, pixels.permute(0, 3, 1, 2))
    sentence = capsys.readouterr().err.splitlines()[1]
    assert "cannot be written" in sentence and "decoded again next time" in sentence
    assert list((tmp_path / "root" / "cache").iterdir()) == []


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new = tmp_path / "new"
    assert data.cache_dir(new) == new / "cache" and (new / "cache").is_dir()
    marked = tmp_path / "marked"
    marked.mkdir(mode=0o555)
    (tmp_path / "file").write_text("not a folder")
    for root in (marked, tmp_path / "file"):
        assert data.cache_dir(root) == Path("data/cache") and Path("data/cache").is_dir()
    assert list(marked.iterdir()) == []
    (tmp_path / "data" / "cache").chmod(0o555)
    with refuses(r"neither .*marked nor \./data can be written to"):
        data.cache_dir(marked)


@pytest.mark.parametrize("name, says", [
    ("mnits", "there is no dataset 'mnits', perhaps mnist is meant: give a folder of pictures or "
              "one of digits"),
    ("CIFAR10", "perhaps cifar10 is meant"), ("qqqq", "there is no dataset 'qqqq': give"),
    ("", "there is no dataset '': give"), ("./qqqq", "there is no folder ./qqqq: give"),
    ("pictures.zip", "there is no folder pictures.zip: give"), ("file", "there is no folder file")])
def test_unknown_names(name, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("not a folder")
    for what in (data.load, data.load_pair, data.whole_name):
        with pytest.raises(data.UserError) as error:
            what(name)
        assert says in str(error.value) and "swissroll" in str(error.value)


def test_a_name_is_the_same_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "cats").mkdir()
    (tmp_path / "link").symlink_to("cats")
    assert [data.whole_name(name) for name in ("mnist", "ring8")] == ["mnist", "ring8"]
    for name in ("cats", "./cats/", "~/cats", tmp_path / "cats"):
        assert data.whole_name(name) == str(tmp_path / "cats")
    assert data.cache_dir("~/of") == tmp_path / "of/cache"
    monkeypatch.setitem(sys.modules, "lmdb", mock.MagicMock())
    with refuses(f"no {tmp_path}/none/church_outdoor"):
        data.load("lsun-church", "~/none")
    with refuses(f"{tmp_path}/w.pth"):
        metrics.load_inception("~/w.pth")
    assert data.whole_name("link") == str(tmp_path / "link") and not capsys.readouterr().err
    (tmp_path / "ring8").mkdir()
    assert data.whole_name("ring8") == "ring8" and data.whole_name("./ring8") == f"{tmp_path}/ring8"
    assert "ring8 is a data set and a folder" in capsys.readouterr().err


def test_folders_that_cannot_be_used(tmp_path):
    folder = tmp_path / "cats"
    folder.mkdir()

    def refused(says, size=None):
        with refuses(says):
            data.load(folder, tmp_path, size)

    refused(r"there are no pictures \(.jpg .*\) in .*cats")
    save_pictures(folder, 3)
    for size in (7, 8193):
        refused(f"a size of {size} pixels is out of range: 8 to 8192", size)
    save_pictures(folder / "kittens", 1)
    refused(r"both beside and inside its folders \(kittens\)")
    for name in ("Training", "validation", "test"):  # without train/, each would be a class
        folder = tmp_path / f"of-{name}"
        save_pictures(folder / name / "cats", 1)
        save_pictures(folder / "dogs", 1)
        refused(f"has {name}/ but no train/: call splits train and test")


def test_a_folder_is_never_called_as_a_published_set(tmp_path):
    """Or a protocol would name that set, and fid take its training images for the reference."""
    save_pictures(tmp_path / "cifar10", 2)
    save_pictures(tmp_path / "cifar11", 2)
    names = [data.load(tmp_path / name, tmp_path / "root").name for name in ("cifar10", "cifar11")]
    assert names == ["folder-cifar10", "cifar11"]


def test_pictures_whose_names_are_no_utf8(tmp_path, capsys):
    """Those of the folder and of a file; from the cache, too."""
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    try:
        save_pictures(odd, 2)
        (odd / "0.png").rename(odd / f"{odd.name}.png")
    except OSError:
        pytest.skip("this file system knows no such names")
    for decoded in (True, False):
        assert cli(data, odd, "--root", tmp_path / "root", "--out", tmp_path / "sheet.png") == 0
        assert bool(capsys.readouterr().err) == decoded


def test_the_command_line_draws_a_sheet(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert data.run_command(data.main, ["stacked-digits", "--split", "test"]) == 0
    out = capsys.readouterr().out
    assert "(10000, 1, 28, 28)" in out and "1,000 classes" in out
    sheet = np.asarray(Image.open("stacked-digits-test.png"))
    assert sheet.shape[2] == 3 and sheet.shape[0] == sheet.shape[1] > 560 and sheet.std() > 20
    assert data.run_command(data.main, ["ring8", "--out", "ring.png"]) == 0
    # It is dark where points are: on the circle, not in its middle.
    ring = np.asarray(Image.open("ring.png")) < 250
    middle = slice(ring.shape[0] // 2 - 100, ring.shape[0] // 2 + 100)
    assert ring.any() and not ring[middle, middle].any()
    save_pictures(tmp_path / "pictures", 3)
    capsys.readouterr()
    assert data.run_command(data.main, ["pictures"]) == 0 and Path("pictures-train.png").exists()
    assert "no labels\ndrawn to pictures-train.png\n" in capsys.readouterr().out


@pytest.mark.parametrize("flags, says", [
    ("mnits", "perhaps mnist is meant"), ("ring8 --out nowhere/x.png", "cannot be written"),
    ("digits --split all", "no split 'all': it is train or test"), ("ring8 --wide", "--wide"),
    ("digits --size 4", "4 pixels is out of range"), (".", "would be one of the pictures in"),
    ("x --size=--", "argument --size: expected one argument"),
    ("../pictures --out sheet.png", "give another --out")])
def test_the_command_line_refuses_in_one_sentence(flags, says, tmp_path, monkeypatch, capsys):
    save_pictures(tmp_path / "pictures", 1)
    monkeypatch.chdir(tmp_path / "pictures")
    assert data.run_command(data.main, flags.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and len(err.splitlines()) == 1


# ==================================================================================================
# metrics.py
# ==================================================================================================


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(d, seed=0):
    a = normal(2 * d, d, seed)
    return a.T @ a / len(a)


def test_frechet_distance_has_its_closed_forms():
    frechet = metrics.frechet_distance
    mu1, mu2 = (normal(1, 7, seed)[0] for seed in (2, 3))
    s1, s2 = (normal(1, 7, seed)[0].abs() for seed in (0, 1))
    shift = pytest.approx((mu1 - mu2).square().sum().item(), rel=1e-9)
    squares = (mu1 - mu2).square().sum() + (s1 - s2).square().sum()
    apart = pytest.approx(squares.item(), rel=1e-10)
    assert frechet(mu1, torch.diag(s1**2), mu2, torch.diag(s2**2)) == apart
    q = torch.linalg.qr(normal(7, 7))[0]
    assert frechet(mu1, q * s1**2 @ q.T, mu2, q * s2**2 @ q.T) == apart  # they commute
    cov, other = (covariance(7, seed) for seed in (0, 5))
    assert frechet(mu1, cov, mu2, cov) == shift
    assert frechet(mu1, cov, mu2, other) == pytest.approx(frechet(mu2, other, mu1, cov), rel=1e-12)
    assert frechet(0.0, 4.0, 3.0, 1.0) == pytest.approx(9 + 1)  # plain numbers, in float64
    assert frechet(0.1, 1.0, [0.3], [[1.0]]) == pytest.approx(0.04, rel=1e-14)


@pytest.mark.parametrize("rank", [8, 3, 1])
def test_frechet_distance_of_singular_covariances(rank):
    def frechet(a, b):
        return metrics.frechet_distance(torch.zeros(len(a)), a, torch.zeros(len(b)), b)

    a, b = (covariance(rank, seed) for seed in (1, 2))
    q = torch.linalg.qr(normal(8, 8, 3))[0][:, :rank]
    wide = q @ a @ q.T
    regular = covariance(8, 4)
    assert frechet(wide, wide) == 0.0 <= frechet(wide, wide * (1 + 1e-15)) < 1e-12
    assert frechet(wide, q @ b @ q.T) == pytest.approx(frechet(a, b), rel=1e-9)
    assert frechet(regular, wide) == pytest.approx(frechet(wide, regular), rel=1e-9)
    assert frechet(0 * wide, regular) == pytest.approx(regular.trace().item())


def test_frechet_distance_features_is_that_of_the_statistics():
    for n1, n2, d in ((20, 90, 50), (200, 300, 5), (2, 2, 40)):
        f1 = normal(n1, d, 1)
        f2 = 1.5 * normal(n2, d, 2) + 0.1
        c1, c2 = ((f - f.mean(0)) / math.sqrt(len(f) - 1) for f in (f1, f2))
        root = torch.linalg.svdvals(c1 @ c2.T).sum()  # trace of the root, by the rows themselves
        squares = (f1.mean(0) - f2.mean(0)).square().sum() + c1.square().sum() + c2.square().sum()
        expected = pytest.approx((squares - 2 * root).item(), rel=1e-7)
        assert metrics.frechet_distance_features(f1, f2) == expected
        assert metrics.frechet_distance_features(f1, f1) == 0.0
        assert 0 <= metrics.frechet_distance_features(f1, f1.flip(0)) < 1e-11


def test_frechet_latent_distance_is_the_distance_to_a_standard_normal():
    z = 1.7 * normal(50, 6) + 0.4
    moments = metrics.Moments.of(z)
    expected = metrics.frechet_distance(moments.mean, moments.cov, torch.zeros(6), torch.eye(6))
    assert metrics.frechet_latent_distance(z) == pytest.approx(expected, rel=1e-9)
    white = torch.linalg.qr(normal(500, 4) - normal(500, 4).mean(0))[0] * math.sqrt(499)
    assert metrics.frechet_latent_distance(white) < 1e-20


def test_kernel_distance_equals_a_double_loop_and_is_unbiased():
    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b)) / len(a) + 1) ** 3

    x = normal(12, 5, 1)
    y = normal(12, 5, 2) + 0.5
    same = 0
    for s in (x.tolist(), y.tolist()):
        same += sum(kernel(a, b) for a in s for b in s if a is not b) / (12 * 11)
    between = sum(kernel(a, b) for a in x.tolist() for b in y.tolist()) / 12**2
    mean, std = metrics.kernel_distance(x, y, subsets=3, size=12)
    assert mean == pytest.approx(same - 2 * between, rel=1e-10)
    assert std is None  # every subset is the whole set
    assert metrics.kernel_distance(x, torch.cat([y, y]), 3, 12)[1] > 0  # of one set only
    first, std = metrics.kernel_distance(x, y, 1, 6)  # the same seed: the first of the two
    assert std is None
    mean, std = metrics.kernel_distance(x, y, 2, 6)
    assert std == pytest.approx(abs(first - mean)) and std > 1e-3  # ddof 0


def test_inception_score_of_known_distributions():
    uniform = torch.full((100, 7), 1 / 7)
    assert metrics.inception_score(uniform) == pytest.approx((1.0, 0.0), abs=1e-6)
    one_hot = torch.eye(7).repeat(20, 1)
    assert metrics.inception_score(one_hot) == pytest.approx((7.0, 0.0), rel=1e-12)
    # Two splits, one of them all one class: mean and std (ddof 0) of 7 and 1.
    half = torch.cat([one_hot, torch.eye(7)[:1].repeat(140, 1)])
    assert metrics.inception_score(half, splits=2) == pytest.approx((4.0, 3.0), rel=1e-12)


def test_precision_recall_on_constructed_sets():
    def column(*values):
        return torch.tensor(values)[:, None]

    real = torch.arange(10.0)[:, None]  # with k = 1 each ball has radius 1
    for fake, expected in (
        (real, (1, 1)),
        (real + 100, (0, 0)),
        (column(0.0, 1.0, 2.0, 500.0), (0.75, 1)),  # 500 has a ball of 498, which covers all
        (column(0.0, 0.25, 0.5, 0.75), (1, 0.2)),  # balls of .25: of the real ones 0 and 1
        (column(-1.0, 20.0, 40.0), (1 / 3, 1)),  # -1 lies on the boundary of 0's ball: inside
    ):
        assert metrics.precision_recall(real, fake, k=1, chunk=3) == pytest.approx(expected)
    far = 1e6 + 0.01 * normal(60, 8)
    apart = metrics.precision_recall(far[:30], far[30:])  # 1e6 costs no digits
    assert apart == metrics.precision_recall(far[:30] - 1e6, far[30:] - 1e6) and min(apart) < 1


def test_precision_recall_of_ties_and_repeated_rows_is_not_left_to_rounding():
    """Against integers, on a lattice whose distances are all ties; balls of repeats are points."""
    def brute(real, fake, k):
        def covered(points, centers):
            between = (centers[:, None] - centers).square().sum(2)
            reach = between.sort(1).values[:, k]
            inside = (points[:, None] - centers).square().sum(2) <= reach
            return inside.any(1).double().mean().item()

        return covered(fake, real), covered(real, fake)

    lattice = torch.cartesian_prod(*[torch.arange(6.0).double()] * 2)
    repeated = lattice.repeat(5, 1)
    moved = torch.cat([lattice[:9], lattice[:27] + torch.tensor([1, 3])])
    for real, fake in ((lattice, moved), (repeated, moved), (repeated, moved.repeat(2, 1)),
                       (repeated[:5] * 0, repeated)):
        for scale, shift in ((1.0, 0.0), (0.1, 100.0)):
            got = metrics.precision_recall(scale * real + shift, scale * fake + shift, chunk=50)
            assert got == brute(real, fake, 3)
    assert metrics.precision_recall(repeated, repeated * (1 + 1e-9)) == (5 / 180, 5 / 180)


def test_grid_modes_counts_high_quality_points_and_includes_the_edge():
    centers = torch.tensor([[0.0, 0.0], [8.0, 0.0], [0.0, 8.0]])
    points = torch.tensor([[0.0, 0.0], [0.75, 0.0], [0.0, -0.7501], [8.0, 0.5], [4.0, 4.0]])
    assert metrics.grid_modes(points, centers, 0.25) == (2, 3 / 5)  # .75 is 3 std, .7501 more
    assert metrics.grid_modes(points[4:], centers, 0.25) == (0, 0.0)
    grid = torch.cartesian_prod(*[torch.arange(-4.0, 5.0, 2.0)] * 2)
    for dtype in (torch.float32, torch.float64):  # .05 and 3 std are not exact in binary
        edge = grid.to(dtype) + torch.tensor([0.15, 0.0], dtype=dtype)
        beyond = grid.to(dtype) + torch.tensor([0.15001, 0.0], dtype=dtype)
        assert metrics.grid_modes(edge, grid, 0.05) == (25, 1.0)
        assert metrics.grid_modes(beyond, grid, 0.05) == (0, 0.0)
        beyond[0] = 1e7  # which makes no other point better
        assert metrics.grid_modes(beyond, grid, 0.05) == (0, 0.0)


def test_stacked_modes_and_reconstruction_mse_of_what_can_be_counted():
    assert metrics.stacked_modes(torch.arange(1000)) == (1000, pytest.approx(0.0, abs=1e-12))
    modes, kl = metrics.stacked_modes(torch.tensor([3, 3, 3, 999]))
    assert modes == 2 and kl == pytest.approx(0.75 * math.log(750) + 0.25 * math.log(250))
    assert metrics.stacked_modes(torch.tensor([1, 1]), 4) == (1, pytest.approx(math.log(4)))
    assert metrics.stacked_modes(torch.tensor([3, 250], dtype=torch.uint8))[0] == 2  # 999 > 255
    x = torch.zeros(2, 1, 2, 2)
    assert metrics.reconstruction_mse(x, x + 0.5) == 0.25
    assert metrics.reconstruction_mse(x.double(), x + 1e-20) == pytest.approx(1e-40)  # 0 in float32
    assert metrics.reconstruction_mse([0.1], [0.3]) == pytest.approx(0.04, rel=1e-14)


ZERO = torch.zeros(5, 3)
ONES = torch.ones(20, 2)
EYE = torch.eye(3)
SKEW = torch.tensor([[0.0, 0.5, 0], [0, 0, 0], [0, 0, 0]])
BENT, FLAT, THIN = (torch.diag(torch.tensor([1.0, x, 1.0])) for x in (-1, 0, 1e-6))
PAIRS = ((EYE, -EYE), (-EYE, EYE), (-EYE, FLAT), (-EYE, -EYE), (THIN, BENT), (1 - EYE, EYE))
LABELS = (torch.tensor([-1]), torch.tensor([1000]), torch.zeros(2), torch.zeros(0).long())


@pytest.mark.parametrize("function, arguments, words", [
    ("frechet_distance", (ZERO[0], EYE, torch.zeros(4), torch.eye(4)), "covariances"),
    ("frechet_distance", (ZERO[0], EYE, ZERO[0], EYE * math.nan), "finite"),
    ("frechet_distance", (ZERO[0].double(), EYE, ZERO[0], EYE.double() * 1e80), "finite"),
    ("frechet_distance", (ZERO[0], EYE, ZERO[0], EYE + SKEW), "symmetric"),
    ("frechet_distance", (ZERO[0], EYE + SKEW, ZERO[0], EYE), "symmetric"),
    *(("frechet_distance", (ZERO[0], a, ZERO[0], b), "semidefinite") for a, b in PAIRS),
    ("frechet_distance_features", (ZERO[:1], ZERO), "at least 2"),
    ("frechet_distance_features", (ZERO, torch.zeros(5, 4)), "dimensions"),
    ("frechet_distance_features", (ZERO / 0, ZERO), "finite"),
    ("frechet_latent_distance", (ZERO[:1],), "at least 2"),
    ("kernel_distance", (ZERO, torch.zeros(9, 3), 2, 6), "cannot draw"),
    ("kernel_distance", (ZERO, ZERO, 2, 1), "cannot draw"),
    ("kernel_distance", (ZERO, torch.zeros(5, 4), 2, 2), "dimensions"),
    ("inception_score", (torch.full((19, 2), 0.5),), "splits of 2"),
    ("inception_score", (ONES,), "probabilities"),
    ("inception_score", (torch.tensor([[1.5, -0.5]]).repeat(20, 1),), "probabilities"),
    ("inception_score", (ONES * math.nan,), "finite"),
    ("precision_recall", (ONES[:3], ONES), "at least 4 rows"),
    ("precision_recall", (ONES, ONES, 0), "k must"),
    ("grid_modes", (ONES, ONES, 0.0), "std"),
    ("grid_modes", (ZERO, ONES, 1.0), "dimensions"),
    *(("stacked_modes", (labels,), "labels must") for labels in LABELS),
    ("reconstruction_mse", (ONES, ONES[:1]), "one shape"),
])
def test_distances_refuse_what_they_cannot_be_computed_from(function, arguments, words):
    with pytest.raises(ValueError, match=words) as error:
        getattr(metrics, function)(*arguments)
    assert (words == "finite") == isinstance(error.value, data.NotFinite)


def test_moments_are_those_of_torch_whatever_the_order_and_the_batches():
    f = (normal(301, 10) * 5 + 1000).float()  # far from 0: a sum of squares would lose its digits
    for seed, size in ((0, 301), (1, 1), (2, 7), (3, 64)):
        order = torch.randperm(301, generator=torch.Generator().manual_seed(seed))
        moments = metrics.Moments(10)
        for part in f[order].split(size):
            moments.update(part)
        assert moments.n == 301
        assert (moments.mean - f.double().mean(0)).abs().max() < 1e-9
        assert (moments.cov - f.double().T.cov()).abs().max() < 1e-9
    assert torch.equal(metrics.Moments.of(moments.state()).cov, moments.cov)
    assert metrics.Moments.of(np.arange(12.0).reshape(4, 3)).mean.tolist() == [4.5, 5.5, 6.5]
    with pytest.raises(ValueError, match="at least 2 samples"):
        metrics.Moments.of(torch.zeros(1, 3)).cov  # noqa: B018
    for bad, words in ((torch.zeros(2, 4), "10 dimensions"), (torch.zeros(3), "shape"),
                       (f[:2] * math.nan, "finite"), (f[:0], "at least 1")):
        with pytest.raises(ValueError, match=words):
            moments.update(bad)
    assert moments.n == 301


def test_cache_is_reused_and_a_damaged_or_stale_file_is_rebuilt(tmp_path, capsys, monkeypatch):
    def cached(a):
        return metrics.cached(tmp_path, "kind", {"a": a}, build, use)

    def use(saved):  # raises an error for another type
        return saved | {"values": saved["values"].float()}

    def build():
        built.append(1)
        return {"values": torch.arange(1000.0), "n": len(built)}

    built = []
    assert [cached(a)["n"] for a in (1, 1, 2)] == [1, 1, 2]  # another key, another file
    assert len(built) == 2 and not capsys.readouterr().err
    path = next(p for p in sorted(tmp_path.iterdir()) if torch.load(p)["n"] == 1)
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1  # one bit of the tensor, which torch.load would not notice
    stale = io.BytesIO()
    torch.save(torch.load(path) | {"key": "{}"}, stale)
    another = io.BytesIO()
    torch.save(torch.load(path) | {"values": "a word"}, another)
    damaged = (good[: len(good) // 2], b"", bytes(flipped), stale.getvalue(), another.getvalue())
    for n, content in enumerate(damaged, 3):
        path.write_bytes(content)
        assert torch.equal(cached(1)["values"], torch.arange(1000.0)) and len(built) == n
        assert "rebuilding" in capsys.readouterr().err and torch.load(path)["n"] == n
    assert not list(tmp_path.glob("*.tmp"))
    monkeypatch.setattr(torch, "save", lambda *_: open("/dev/full", "w").write("x" * 10**5))
    assert cached(3)["n"] == 8 and "made again next time" in capsys.readouterr().err


def test_statistics_of_another_count_or_network_are_others(tmp_path):
    def extract(shift):
        def features(u8):
            return (u8.flatten(1).float() + shift,) * 2

        return mock.Mock(side_effect=features, metric="x", dim=64, device=torch.device("cpu"),
                         key={"network": shift})

    def moments(n, shift):
        return metrics.real_statistics(counted(50), n, None, extract(shift), tmp_path)["moments"]

    assert [moments(n, 0).n for n in (20, 40, 20)] == [20, 40, 20]
    assert moments(50, 0).mean[0] == 24.5 and moments(20, 0).mean[0] != 9.5  # a part is random
    part = moments(40, 0).mean[0].item()
    for file in (tmp_path / "cache").iterdir():  # an honest checksum, and what cannot be
        torch.save(torch.load(file) | {"mean": torch.zeros(3)}, file)
    assert moments(20, 0).mean.shape == (64,)
    for shift in (0, 1):  # those very images, unchanged
        assert (moments(40, shift).mean - part - shift).abs().max() < 1e-12


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """(path, state dict): random weights, so scaled that activations neither die nor grow."""
    state = {}
    torch.manual_seed(0)
    for name, value in metrics.Inception().state_dict().items():
        state[name] = 0.1 * torch.randn(value.shape)
        if name.endswith(("conv.weight", "fc.weight")):
            state[name] *= 10 * math.sqrt(2 / value[0].numel())
        elif name.endswith(("bn.weight", "running_var")):
            state[name] = 1 + state[name].clamp(-0.4, 0.4)
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(state, path)
    return path, state


@pytest.fixture
def genuine(monkeypatch):
    """Lets the weights in a file pass for the genuine ones while a test runs."""
    def passes(path):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setattr(metrics, "INCEPTION_SHA256", digest[:8])
        return str(path)

    return passes


@pytest.fixture
def quick_inception(monkeypatch):
    """In the place of the Inception network one of 64 features that takes no time."""
    def network(weights):
        torch.manual_seed(0)
        net = nn.Sequential(nn.AvgPool2d(23), nn.Flatten(), nn.Linear(3 * 13 * 13, 64))
        net.forward = nn.Sequential(*net).forward
        net.fc = nn.Linear(64, 1008)
        return net.requires_grad_(False)

    monkeypatch.setattr(metrics, "load_inception", network)
    monkeypatch.setattr(metrics.InceptionFeatures, "dim", 64)


def test_inception_has_the_checkpoints_names_and_shapes():
    state = metrics.Inception().state_dict()
    assert len(state) == 472 == 94 * 5 + 2 and sum(v.numel() for v in state.values()) == 23_885_392
    assert tuple(state["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape) == (384, 384, 3, 1)
    lines = "".join(f"{name} {tuple(value.shape)}\n" for name, value in sorted(state.items()))
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == "87badd6119d153f7"


def test_folded_network_equals_the_unfolded_one(genuine, random_inception):
    path, state = random_inception
    plain = metrics.Inception().eval()
    plain.load_state_dict(state, strict=False)
    x = torch.rand(2, 3, 299, 299, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        expected = plain(x)
        got = metrics.load_inception(genuine(path))(x)
    assert (got - expected).norm() / expected.norm() < 1e-5 and expected.std() > 0.1  # alive


def test_pools_do_not_count_padding_and_the_last_block_takes_the_maximum():
    def pooled(kind):  # the pooling branch alone, its unit made the identity
        block = metrics.block_8(2048, kind).eval()
        torch.nn.init.dirac_(block.branch_pool.conv.weight)
        block.branch_pool.bn.eps = 0.0
        block.chains = []
        with torch.no_grad():
            return block(x)[0]

    x = torch.rand(1, 2048, 5, 5, generator=torch.Generator().manual_seed(0))
    mean, most = (pooled(kind) for kind in ("avg", "max"))
    for i, j in ((0, 0), (0, 2), (2, 2), (4, 1)):
        window = x[0, :192, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].flatten(1)
        torch.testing.assert_close(mean[:, i, j], window.mean(1))
        torch.testing.assert_close(most[:, i, j], window.amax(1))
    blocks = [block for block in metrics.Inception().children() if hasattr(block, "pool")]
    kinds = [block.pool for block in blocks]
    assert kinds == [*["avg"] * 3, "reduce", *["avg"] * 4, "reduce", "avg", "max"]


def test_input_flavours_are_their_definitions_and_differ():
    def at(offset, i, j):  # bilinear interpolation, by hand
        y = max((i + offset) * 20 / 299 - offset, 0)
        x = max((j + offset) * 30 / 299 - offset, 0)
        rows = u8[0].double()[:, int(y) : int(y) + 2, :]
        row = rows[:, 0] * (1 - y % 1) + rows[:, -1] * (y % 1)
        pair = row[:, int(x) : int(x) + 2]
        return pair[:, 0] * (1 - x % 1) + pair[:, -1] * (x % 1)

    torch.manual_seed(0)
    u8 = torch.randint(0, 256, (1, 3, 20, 30), dtype=torch.uint8)
    ours, tf = (metrics.inception_input(u8, flavour).double() for flavour in ("pytorch-fid", "tf"))
    assert ours.shape == tf.shape == (1, 3, 299, 299) and (ours - tf).abs().mean() > 0.01
    for i, j in ((0, 0), (150, 77), (298, 298), (13, 201)):
        assert (ours[0, :, i, j] - (at(0.5, i, j) / 127.5 - 1)).abs().max() < 2e-5
        assert (tf[0, :, i, j] - (at(0.0, i, j) - 128) / 128).abs().max() < 2e-5
    grey = metrics.inception_input(u8[:, :1], "tf")
    assert torch.equal(grey, metrics.inception_input(u8[:, :1].expand(-1, 3, -1, -1), "tf"))


def test_features_of_a_list_of_sizes_are_those_of_each_alone(genuine, random_inception):
    path, state = random_inception
    torch.manual_seed(0)
    images = [torch.randint(0, 256, (3, n, n), dtype=torch.uint8) for n in (16, 24, 16)]
    extract = metrics.InceptionFeatures(genuine(path))
    features, logits = extract(images)
    assert features.shape == (3, 2048) and logits.shape == (3, 1008)
    for i, image in enumerate(images):
        alone = extract(image[None])[0][0]
        assert (features[i] - alone).norm() / alone.norm() < 1e-5
    torch.testing.assert_close(logits, features @ state["fc.weight"].T)  # no bias
    with torch.autocast("cpu", torch.bfloat16):  # of the caller, whose features are float32, too
        assert torch.equal(extract(images)[1], logits)
    rough = metrics.InceptionFeatures(path, amp="bf16")
    error = (rough(images)[0] - features).norm() / features.norm()
    assert 1e-4 < error < 0.2 and "bf16" in rough.name and rough.key != extract.key
    with refuses("no flavour vanilla"):
        metrics.InceptionFeatures(path, flavour="vanilla")


def test_only_the_genuine_weights_are_read(
        random_inception, genuine, tmp_path, monkeypatch, pictures, capsys):
    def offline(url, **options):
        print("Downloading")  # as torch.hub does, on stdout
        assert url == metrics.INCEPTION_URL and url.endswith(metrics.INCEPTION_FILE)
        assert options["check_hash"] and options["weights_only"]
        raise OSError("no network")

    path, state = random_inception
    file = tmp_path / "weights.pth"
    counter = {"Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(0)}  # in some conversions
    torch.save(state | counter, file)
    metrics.load_inception(genuine(file))
    monkeypatch.undo()  # back to the published hash, which random weights do not have
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with refuses("no network.* and give its path .*, or put it into .*checkpoints$"):
        metrics.load_inception("auto")
    kept = tmp_path / "hub/checkpoints" / metrics.INCEPTION_FILE  # torch.hub would not look at it
    kept.parent.mkdir(parents=True)
    kept.write_bytes(path.read_bytes())
    for weights, words in (("auto", "is not the 2015"), (path, "is not the 2015"),
                           (tmp_path / "none", "no file")):
        with refuses(words) as error:
            metrics.InceptionFeatures(weights)
        assert metrics.INCEPTION_URL in str(error.value)
    kept.unlink()
    assert metrics.INCEPTION_FILE in refusal(capsys, pictures, pictures)
    assert "not the 2015" in refusal(capsys, pictures, pictures, "--weights", path)


def test_fid_is_the_default_where_it_is_published_and_can_be_had(monkeypatch, capsys, tmp_path):
    def default(asked, published, device):
        weights = metrics.inception_default(asked, published, device, samples=6000)
        return weights, capsys.readouterr().err

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    for asked, weights in (("off", None), ("auto", "auto"), ("/a/path", "/a/path")):
        assert default(asked, True, "cuda") == default(asked, False, "cpu") == (weights, "")
    assert default(None, False, "cuda") == (None, "")
    weights, slow = default(None, True, "cpu")
    minutes = 6000 / metrics.INCEPTION_RATE / 60
    assert f"6,000 samples would take about {minutes:.0f} minutes" in slow
    assert "--inception auto" in slow and weights is None
    weights, absent = default(None, True, torch.device("cuda"))
    assert "unreachable" in absent and "fcd is" in absent and weights is None
    for sentence in (slow, absent):
        assert sentence.count("\n") == 1 and "--inception off silences" in sentence
    monkeypatch.setattr(metrics, "inception_state",
                        lambda weights: metrics.Inception().state_dict())
    assert default(None, True, "cuda:0") == ("auto", "")


def quadrants(n, split, seed, stacked=False):
    """A set anyone can classify: noise, and one bright quadrant of four (stacked: ten classes)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 120, (n, 1, 16, 16), generator=generator, dtype=torch.uint8)
    y = torch.arange(n) % 4
    for image, label in zip(x, y):
        row, column = divmod(8 * int(label), 16)
        image[:, 8 * row : 8 * row + 8, column : column + 8] += 120
    name = "stacked-quadrants" if stacked else "quadrants"
    return data.Dataset(name, split, x, y, 1000 if stacked else 4, stacked)


def unlabelled(n):
    return dataclasses.replace(quadrants(n, "train", n), y=None, classes=0)


@pytest.fixture(scope="module")
def sets():
    return quadrants(2000, "train", 1), quadrants(300, "test", 2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("metrics-cache")


def never(*_, **__):
    pytest.fail("computed in vain, or again")


def test_classifier_learns_and_is_cached(sets, cache, monkeypatch, tmp_path):
    def trained_elsewhere(*_):
        calls.append(1)
        net = copy.deepcopy(first.net)
        net.head.bias.data += len(calls)
        return net

    calls = []
    before = torch.random.get_rng_state()
    with torch.inference_mode():  # as a training loop may call it
        first = metrics.ClassifierFeatures(*sets, root=cache)
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.accuracy > 0.97 and first.name == "quadrants classifier features (d=128)"
    monkeypatch.setattr(metrics, "train_classifier", never)
    again = metrics.ClassifierFeatures(*sets, root=cache)
    features, logits = again(sets[1].x)
    right = (logits.argmax(1) == sets[1].y).float().mean().item()
    assert again.accuracy == first.accuracy == right
    assert torch.equal(first(sets[1].x)[0], features) and features.shape == (300, 128)
    with torch.autocast("cpu", torch.bfloat16):  # a caller's own changes nothing
        assert torch.equal(again(sets[1].x)[0], features)
    # A changed set and a changed recipe are not served from the cache.
    monkeypatch.setattr(metrics, "train_classifier", trained_elsewhere)
    changed = quadrants(2000, "train", 1)
    changed.x[7, 0, 3, 3] += 1
    metrics.ClassifierFeatures(changed, sets[1], root=cache)
    monkeypatch.setitem(metrics.RECIPE, "seed", 5)
    metrics.ClassifierFeatures(*sets, root=cache)
    assert len(calls) == 2
    # Statistics in its features are cached under its weights: trained elsewhere, they are others.
    other = metrics.ClassifierFeatures(*sets, root=tmp_path)
    assert other.key["weights"] != first.key["weights"] == again.key["weights"]
    # A file with an honest checksum and no such network is as a damaged one.
    file, = (tmp_path / "cache").iterdir()
    state = torch.load(file)
    for wrong in ({"accuracy": "high"}, {"net": state["net"] | {"head.bias": torch.zeros(3)}},
                  {"net": state["net"] | {"head.bias": torch.full((4,), math.nan)}}):
        torch.save(state | wrong, file)
        assert metrics.ClassifierFeatures(*sets, root=tmp_path).accuracy == other.accuracy
    assert len(calls) == 6
    for y, classes in ((None, 0), (sets[0].y * 0, 4), (sets[0].y + 7, 10)):  # none, one, too large
        bare = data.Dataset("bare", "train", sets[0].x, y, classes)
        with refuses("no labels"):
            metrics.ClassifierFeatures(bare, bare, root=cache)


def test_classifier_is_deterministic(sets):
    def state():
        return metrics.train_classifier(few, 4, recipe, torch.device("cpu")).state_dict()

    few = dataclasses.replace(sets[0], x=sets[0].x[:640], y=sets[0].y[:640])
    recipe = metrics.classifier_recipe(1, torch.device("cpu")) | {"epochs": 1}
    one, two = (state() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):  # a caller's own changes nothing
        three = state()
    assert all(torch.equal(one[k], two[k]) and torch.equal(one[k], three[k]) for k in one)


def test_distorted_images_are_turned_and_moved_as_far_as_said():
    """Li et al.'s copies: up to 15 degrees and 2 pixels, one in five untouched, outside black."""
    def centre(x):
        ink = x.double()[:, 0] + 1
        ink /= ink.sum((1, 2), keepdim=True)
        return torch.stack([ink.sum(2) @ at, ink.sum(1) @ at], 1) - 13.5

    def degrees(offset):
        return torch.rad2deg(torch.atan2(offset[:, 0], offset[:, 1]))

    at = torch.arange(28.0).double()
    dot = torch.full((2000, 1, 28, 28), -1.0)
    dot[:, :, 10:14, 17:21] = 1.0
    torch.manual_seed(0)
    moved = centre(metrics.distort(dot, 0, 2, 0.0)) - centre(dot)
    assert 1.9 < moved[:, 0].max() <= 2.001 and -2.001 <= moved[:, 1].min() < -1.9
    assert moved.mean(0).abs().max() < 0.1
    turned = centre(metrics.distort(dot, 15, 0, 0.0))
    assert (turned.norm(dim=1) - centre(dot).norm(dim=1)).abs().max() < 0.1  # about the middle
    angle = degrees(turned) - degrees(centre(dot))
    assert 14 < angle.max() < 15.5 and -15.5 < angle.min() < -14
    mixed = metrics.distort(dot, 15, 2, 0.2)
    same = ((mixed - dot).abs().amax((1, 2, 3)) < 1e-4).double().mean()
    assert 0.15 < same < 0.25 and mixed.min() > -1.001 and mixed[:, :, 25:].max() < -0.999


def test_li_classifier_is_li_et_al_s_and_scores_what_it_is_asked_to(sets, cache, monkeypatch):
    """AIM's Table 1 scores MNIST by it. It is trained once; the caller's random numbers stay."""
    def evaluator(**options):
        return metrics.Evaluator(*sets, 16, root=cache, samples=300, batch=100, **options)

    def at_random(n):
        return real[torch.randint(len(real), (n,))]

    def the_same_image(n):  # nothing to tell apart
        return real[:1].expand(n, -1, -1, -1)

    net = metrics.build_classifier(metrics.LI, 10)
    shapes = [tuple(p.shape) for p in net.parameters() if p.dim() > 1]
    assert shapes == [(32, 1, 5, 5), (64, 32, 5, 5), (1024, 3136), (10, 1024)]
    assert net.head[0].p == 0.3  # it keeps .7
    kinds = ("Conv2d BatchNorm2d ReLU MaxPool2d Conv2d ReLU MaxPool2d Flatten Linear BatchNorm1d "
             "ReLU")
    assert [type(m).__name__ for m in net.body] == kinds.split()
    features = net.body(torch.zeros(3, 1, 28, 28))
    assert features.shape == (3, 1024) and features.min() >= 0
    for setting, value in (("epochs", 2), ("features", 128), ("lr", 6e-3)):
        monkeypatch.setitem(metrics.LI, setting, value)
    by_li = evaluator(li=True)
    real = data.to_float(sets[1].x)
    before = torch.random.get_rng_state()
    result = by_li(at_random)
    assert torch.equal(before, torch.random.get_rng_state())
    assert by_li.li.accuracy > 0.9
    assert 3 < result["is_li_real"] <= 4 and 3 < result["is_li"] <= 4
    probs = by_li.li(sets[1].x)[1].double().softmax(1)
    assert result["is_li_real"] == pytest.approx(metrics.inception_score(probs)[0], rel=1e-5)
    assert "is_li: Li et al.'s classifier" in result["protocol"]
    one = by_li(the_same_image)
    assert (one["is_li"], one["is_li_std"]) == pytest.approx((1, 0), abs=1e-5)
    monkeypatch.setattr(metrics, "train_classifier", never)
    assert "is_li" not in evaluator()(at_random)
    assert evaluator(li=True)(the_same_image) == one
    coloured = dataclasses.replace(sets[1], x=sets[1].x.expand(-1, 3, -1, -1))
    with pytest.raises(ValueError, match="grey"):
        metrics.Evaluator(coloured, coloured, 16, root=cache, samples=300, li=True)


def test_evaluator_of_real_images_is_near_zero_and_deterministic(sets, cache):
    def evaluate():  # real images, drawn at random
        return evaluator(lambda n: real[torch.randint(len(real), (n,))], lambda x: x * 0.5)

    evaluator = metrics.Evaluator(*sets, 16, root=cache, samples=300, batch=70)
    real = data.to_float(sets[1].x)
    before = torch.random.get_rng_state()
    one = evaluate()
    assert one == evaluate() and torch.equal(before, torch.random.get_rng_state())
    noise = evaluator(lambda n: torch.rand(n, 1, 16, 16) * 2 - 1)
    assert 0 <= one["fcd"] < 0.1 * noise["fcd"] and "mse" not in noise and "fid" not in one
    assert one["mse_pm1"] == pytest.approx(real.square().mean().item() / 4, rel=1e-6)
    assert one["mse"] == pytest.approx(one["mse_pm1"] / 4)
    share = one["class_share"]
    assert (len(share), sum(share)) == pytest.approx((4, 1), abs=1e-5)
    extremes = (one["class_min"], one["class_max"])
    assert extremes == pytest.approx((min(share), max(share)), abs=1e-5)
    assert 3 < one["is_real"] <= 4 and 3 < one["is"] <= 4
    blend = torch.lerp(real, real.roll(1, 0), torch.linspace(0, 1, 300)[:, None, None, None])
    parts = iter(blend.split(70))
    sure = evaluator.classifier(data.to_uint8(blend))[1].softmax(1).amax(1)
    confident = evaluator(lambda n: next(parts))["confident"]
    assert confident == (sure > 0.9).double().mean().item() < (sure > 0.5).double().mean().item()
    assert one["classifier_accuracy"] > 0.97
    assert one["protocol"] == ("fcd: quadrants classifier features (d=128), 300 test images vs "
                               "300 samples, 16x16; mse: 300 test images, 16x16")
    json.dumps(one)
    three = [dataclasses.replace(d, x=d.x[d.y > 0], y=d.y[d.y > 0]) for d in sets]
    found = metrics.Evaluator(*three, 16, root=cache, samples=300)(lambda n: real[:n])
    assert len(found["class_share"]) == 4 and found["class_min"] > 0  # of labels with a picture


def test_evaluator_scores_samples_as_they_would_be_saved_and_refuses_bad_ones(sets, cache):
    evaluator = metrics.Evaluator(*sets, 16, root=cache, samples=40, batch=40)
    exact = data.to_float(sets[1].x[:40])
    whole, less, more = (evaluator(lambda n: exact + part / 127.5) for part in (0, 0.4, 0.6))
    assert whole["fcd"] == less["fcd"] != more["fcd"]  # .4 rounds to the same
    for bad in (exact[:39], exact.flatten(1)):
        with pytest.raises(ValueError, match="must give 40 images"):
            evaluator(lambda n: bad)
    with pytest.raises(ValueError, match="reconstruct must give"):
        evaluator(None, lambda x: x[:1])
    with pytest.raises(data.NotFinite, match="samples must be finite"):
        evaluator(lambda n: exact / 0)
    with pytest.raises(data.NotFinite, match="reconstructions must be finite"):
        evaluator(None, lambda x: x * math.nan)
    with refuses("20 samples"):
        metrics.Evaluator(*sets, 16, root=cache, samples=19)
    points = data.Dataset("grid25", "train", torch.zeros(50, 2), None, 0)
    with pytest.raises(ValueError, match="points"):
        metrics.Evaluator(points, points, 16, root=cache)


def test_evaluator_of_an_unlabelled_set_measures_reconstructions_only(sets, cache, capsys):
    def bright(x):
        return x.mean((1, 2, 3), keepdim=True) > x.mean()

    bare = data.Dataset("bare", "train", sets[0].x[:50], None, 0)
    evaluator = metrics.Evaluator(bare, bare, 16, root=cache, samples=50)
    assert "bare has no labels, or of one class only" in capsys.readouterr().err
    assert evaluator(never, lambda x: x) == {
        "mse_pm1": 0.0, "mse": 0.0, "mse_std": 0.0, "protocol": "mse: 50 train images, 16x16"}
    result = evaluator(None, lambda x: x + 2 * bright(x))
    error = bright(data.to_float(bare.x)).double()  # 1 or 0
    assert 0 < error.mean() < 1
    assert result["mse"] == pytest.approx(error.mean().item(), rel=1e-6)
    assert result["mse_std"] == pytest.approx(error.std(correction=0).item(), rel=1e-6)


def test_evaluator_of_a_stacked_set_counts_modes(cache):
    train = quadrants(2000, "train", 1, stacked=True)
    test = quadrants(300, "test", 2, stacked=True)
    evaluator = metrics.Evaluator(train, test, 16, root=cache, samples=640, batch=64)
    digits = data.to_float(test.x[:4])[:, 0]  # one image of each class
    triple = digits[[3, 0, 2]]
    assert evaluator.classifier.stacked_labels(data.to_uint8(triple[None])).tolist() == [302]
    result = evaluator(lambda n: triple.expand(n, -1, -1, -1))
    assert (result["modes"], result["kl"]) == (1, pytest.approx(math.log(1000)))
    assert result["modes_real"] == 64 and "fcd" not in result
    assert "modes, kl" in result["protocol"]
    every = torch.cartesian_prod(*[torch.arange(4)] * 3)
    result = evaluator(lambda n: digits[every])
    assert (result["modes"], result["kl"]) == (64, pytest.approx(math.log(1000 / 64)))


def test_evaluator_prints_fid_with_the_weights_and_caches_the_real_statistics(
        sets, tmp_path, quick_inception, monkeypatch):
    def evaluator(size):
        return metrics.Evaluator(sets[0], test, size, root=tmp_path, samples=20, inception="auto")

    test = dataclasses.replace(sets[1], x=sets[1].x[:22], y=sets[1].y[:22])
    result = evaluator(16)(lambda n: torch.zeros(n, 1, 16, 16))
    protocol = "fid: 2015 Inception features (d=2048, pytorch-fid flavour), 22 test"
    assert result["fid"] > 0 and protocol in result["protocol"]
    assert result["is_inception"] >= 1 > result["is_inception_std"]
    monkeypatch.setattr(metrics, "collect", never)
    evaluator(16)
    with pytest.raises(pytest.fail.Exception):  # another size is another statistic
        evaluator(8)


@pytest.mark.parametrize("name, options, of_fid", [
    ("mnist", {}, ("train", 24)), ("cifar10", {}, ("test", 22)),
    ("cifar10", {"fid_on_train": 23}, ("train", 23))])  # LatentMap's D10
def test_fid_is_against_the_training_set_where_so_published(
        name, options, of_fid, sets, cache, quick_inception, monkeypatch):
    """IVGAN's Table 2: 60,000 training images of MNIST. Only fid: fcd keeps the test images."""
    def statistics(real, n, size, extract, *_):
        asked[extract.metric] = (real.split, n)
        return {"moments": None, "is": 1.0}

    asked = {}
    classifier = types.SimpleNamespace(metric="fcd", name="c", accuracy=1.0)
    monkeypatch.setattr(metrics, "ClassifierFeatures", lambda *_: classifier)
    monkeypatch.setattr(metrics, "real_statistics", statistics)
    train = dataclasses.replace(sets[0], name=name, x=sets[0].x[:24], y=sets[0].y[:24])
    test = dataclasses.replace(sets[1], name=name, x=sets[1].x[:22], y=sets[1].y[:22])
    metrics.Evaluator(train, test, 16, root=cache, samples=20, inception="auto", **options)
    assert asked == {"fcd": ("test", 22), "fid": of_fid}


def pixels(path):
    return torch.from_numpy(np.array(Image.open(path))).movedim(-1, 0)


def test_scatter_puts_points_where_they_belong(tmp_path):
    points = torch.tensor([[3.0, 0.0], [0.5, 0.5], [-0.5, -0.5]])
    picture = metrics.scatter(points, torch.tensor([1, 0, 1]), 2, reach=1, side=100)
    ink = (picture < 1).any(0).nonzero().float()
    assert len(ink) == 8  # two dots of 2 x 2 pixels; the first point is outside
    upper, lower = (ink[half].mean(0) for half in (ink[:, 0] < 50, ink[:, 0] > 50))
    assert (upper - torch.tensor([24.5, 75.5])).abs().max() < 2
    assert (lower - torch.tensor([74.5, 25.5])).abs().max() < 2
    red, blue = (picture[:, *at.long()] for at in (upper, lower))  # label 0 is red
    assert red.tolist() == pytest.approx([0.85, 0, 0]) and blue.argmax() == 2
    metrics.save_panels(tmp_path / "panels.png", {"one": picture, "two": 1 - picture})
    panels = pixels(tmp_path / "panels.png")
    assert torch.equal(panels[:, 20:-4, 4:104], (picture * 255).byte())
    assert torch.equal(panels[:, 20:-4, 112:-4], ((1 - picture) * 255).byte())


def test_drawn_pictures_are_the_samples_as_they_would_be_scored(tmp_path):
    model = types.SimpleNamespace(sample=lambda n: torch.rand(n, 3, 8, 8) - 0.4)
    torch.manual_seed(0)
    x = torch.cat([model.sample(250), model.sample(50)])  # a narrow range, which must stay one
    for n in (302, 300):  # the second time without leftovers of the first
        torch.manual_seed(0)
        metrics.draw_samples(model, tmp_path, n)
        (tmp_path / "drawn" / "mine.png").write_text("x")  # what is not a sample stays
    (tmp_path / "drawn" / "mine.png").unlink()
    got = torch.stack([pixels(file) for file in sorted((tmp_path / "drawn").iterdir())])
    assert len(got) == 300 and (got.int() - data.to_uint8(x).int()).abs().max() <= 1
    grid = pixels(tmp_path / "drawn.png")
    assert grid.shape == (3, 91, 91) and torch.equal(grid[:, 1:9, 10:18], got[1])  # ten by ten
    for shape in ((3, 8, 8), (2,)):  # what is not finite is no sample; what was drawn stays
        model = types.SimpleNamespace(sample=lambda n: torch.full((n, *shape), math.nan))
        with pytest.raises(data.NotFinite, match="samples"):
            metrics.draw_samples(model, tmp_path, 5)
    assert len(list((tmp_path / "drawn").iterdir())) == 300


def test_drawn_points_are_a_table_and_a_picture(tmp_path):
    noise = metrics.fixed_noise(300, 2)
    model = types.SimpleNamespace(sample=lambda n: torch.randn(n, 2))
    torch.manual_seed(0)
    metrics.draw_samples(model, tmp_path, 300)
    assert torch.equal(noise, metrics.fixed_noise(300, 2))  # whatever the random numbers are
    got = np.loadtxt(tmp_path / "drawn/points.csv", delimiter=",")
    assert np.allclose(got, noise, rtol=1e-5)  # of the same seed
    assert 600 < (pixels(tmp_path / "drawn.png") < 255).any(0).sum() <= 4 * 300


def test_curves_are_drawn_of_what_the_log_has_twice(tmp_path):
    lines = [{"epoch": 1, "d": 0.1, "fid": 50, "mse": 3.0}, {"epoch": 2, "d": 0.2},
             {"epoch": 4, "fid": 40, "mse": 1.0, "kl": 2}]
    (tmp_path / "figures").mkdir()
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics.draw_log_curves(tmp_path, ("fid", "mse", "kl", "fcd"), "a run")
    assert sorted(os.listdir(tmp_path / "figures")) == ["fid.png", "mse.png"]
    picture = pixels(tmp_path / "figures/mse.png")
    blue = (picture == torch.tensor([0x1F, 0x77, 0xB4])[:, None, None]).all(0).nonzero()
    blue = blue[blue[:, 0] > 28]  # below the curve's name, which is as blue
    assert abs(blue[:, 1].min() - (60 + 560 / 4)) < 3  # from epoch 1 of 4
    assert abs(blue[:, 0].max() - (370 - 340 / 3)) < 3  # down to a third of the height
    metrics.draw_curves(tmp_path / "two.png", {"a": [(0, 9), (9, 9)], "b": [(0, 0), (9, 9)]}, "")
    two = pixels(tmp_path / "two.png")
    assert (two[:, 15:28, 340:] < 255).any() and (two[:, 32:60, 60:560] == 255).all()
    assert metrics.best_first({"mse": 0.0, "is": 1}, ("fid", "mse")) == 0.0
    assert metrics.best_first({"is": 1}, ("fid", "mse")) is None


def test_bench_counts_one_steps_operations():
    def step(x):
        steps.append(1)
        x = x.clone().requires_grad_()
        gradient, = torch.autograd.grad(layer(x).sum(), x, create_graph=True)  # WGAN-GP does so
        return gradient

    steps = []
    layer = nn.Linear(1000, 500, bias=False)
    config = types.SimpleNamespace(model="m", size=None, width=8)
    machine = ivgen.Machine("cpu", "bf16")
    model = types.SimpleNamespace(step=step, config=config, machine=machine)
    timed = metrics.benchmark(model, torch.rand(10, 1000), 7)
    about = {"model": "m", "size": None, "width": 8, "device": "cpu", "precision": "bf16",
             "compiled": False}
    assert about.items() <= timed.items()
    assert timed["gflop_per_step"] == 2 * (2 * 10 * 1000 * 500) / 1e9  # forwards and backwards
    assert timed["steps"] == 10 and timed["batch"] == 10 and len(steps) == 5 + 5 + 10
    assert min(timed[k] for k in ("images_per_s", "ms_per_step", "tflop_per_s")) > 0
    assert timed["peak_memory_mib"] > 50 and json.dumps(timed)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of pictures of several sizes and modes, with subfolders."""
    base = tmp_path_factory.mktemp("pictures")
    for seed, name in enumerate(("a", "b")):
        (base / name / "sub").mkdir(parents=True)
        generator = torch.Generator().manual_seed(seed)
        for i in range(20):
            size = (16, 16, 3) if i % 3 else (20, 12, 3)
            u8 = torch.randint(0, 256 - 80 * seed, size, generator=generator).to(torch.uint8)
            image = Image.fromarray(u8.numpy()).convert("L" if i == 5 else "RGB")
            image.save(base / name / ("sub" if i % 2 else ".") / f"{i}.png")
    return base


def compared(capsys, *arguments):
    """(exit code, the dict printed or None, stderr) of `python metrics.py`."""
    code = cli(metrics, *arguments, "--device", "cpu", "--json")
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


def refusal(capsys, *arguments):
    """The last line on stderr of a command that is refused."""
    code, result, err = compared(capsys, *arguments)
    assert code == 2 and result is None  # stdout is for the result alone
    return err.strip().splitlines()[-1]


def test_command_line_compares_folders_and_saved_statistics(
        folders, quick_inception, tmp_path, capsys):
    a, b = (folders / name for name in "ab")
    saved = tmp_path / "a.pt"
    code, result, err = compared(capsys, a, b, "--fid", "--kid", "--is", "--pr")
    assert code == 0 and "20/20" in err and result["fid"] > 0
    assert list(result) == ["fid", "kid", "is", "is_std", "precision", "recall", "protocol", "note"]
    assert "n=20 is below 10,000" in result["note"] and "JPEG" not in result["note"]
    size = "(n=20, mixed sizes, squeezed to squares (--size S cuts them))"
    assert result["protocol"] == (
        f"2015 Inception features (d=2048, pytorch-fid flavour), a {size} vs b {size}, "
        "kid: all 20, is: of B, 10 splits of 2, precision and recall: k=3")
    data.say.cache_clear()
    _, few, err = compared(capsys, a, b, "--n", 15, "--batch", 4, "--size", 16)
    cut = "3 of 15: oblong, cut to the central square"  # as the trainer says it
    assert "a (n=15, 16x16" in few["protocol"] and err.count(cut) == 2 == few["protocol"].count(cut)
    assert compared(capsys, "stats", a, saved)[0] == 0 == compared(capsys, "stats", a, saved)[0]
    again = compared(capsys, saved, b)[1]
    assert again["fid"] == pytest.approx(result["fid"], rel=1e-6)
    assert again["protocol"].endswith(f"a.pt {size} vs b {size}")
    assert compared(capsys, saved, saved)[1]["fid"] == 0.0
    same = compared(capsys, a, a, "--fid", "--kid", "--pr")[1]
    assert (same["fid"], same["precision"], same["recall"]) == (0, 1, 1) and "kid" not in same
    linked = tmp_path / "linked"  # as data.py sees it: links followed, hidden ones not
    save_pictures(linked / ".thumbs", 3)
    (linked / "far").symlink_to(b)
    assert compared(capsys, a, linked)[1]["fid"] == result["fid"]
    assert refusal(capsys, saved, b, "--flavour", "tf").count("flavour") == 2
    assert "holds statistics" in refusal(capsys, saved, b, "--kid")
    assert "leave --size out" in refusal(capsys, saved, b, "--size", 64)
    assert "cannot take a part" in refusal(capsys, "stats", saved, tmp_path / "c.pt", "--n", 5)
    small = tmp_path / "small.pt"
    assert compared(capsys, "stats", a, small, "--size", 16)[0] == 0
    assert compared(capsys, small, b, "--size", 16)[1]["fid"] > 0
    content = bytearray(saved.read_bytes())
    content[len(content) // 2] ^= 1
    saved.write_bytes(content)
    assert "neither statistics nor pictures" in refusal(capsys, saved, b)


def test_command_line_reads_pictures_as_the_trainer_does(quick_inception, tmp_path, capsys):
    """A copy has distance 0, whatever is special about its files; what was changed is said."""
    deep = save_pictures(tmp_path / "deep", 24, mode="L").astype(np.uint16)
    for i, pixels in enumerate(deep):
        Image.fromarray(257 * pixels if i % 2 else pixels).save(tmp_path / f"deep/{i}.png")
    (tmp_path / "deep/notes.txt").write_text("a text")
    x = data.load(str(tmp_path / "deep"), tmp_path).x
    np.save(tmp_path / "copy.npy", x.numpy())
    capsys.readouterr()
    data.say.cache_clear()
    code, result, err = compared(capsys, tmp_path / "deep", tmp_path / "copy.npy")
    assert code == 0 and result["fid"] < 1e-6  # the order is another, so not exactly
    changed = "24 of 24: 16 bits, scaled to 8; 12 of 24: nearly black"
    assert changed in err and changed in result["protocol"]
    assert err.count("24 of 24: 16 bits") == 1 == err.count("1 files passed over")
    for i, pixels in enumerate(x[:, 0].numpy()):
        (tmp_path / "jpegs").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"jpegs/{i}.jpg", quality=100)
    assert "of JPEGs" in compared(capsys, tmp_path / "deep", tmp_path / "jpegs")[1]["note"]


def test_command_line_takes_arrays_and_pytorch_fids_statistics(quick_inception, tmp_path, capsys):
    nhwc = save_pictures(tmp_path / "a", 30)
    nchw = nhwc.transpose(0, 3, 1, 2)
    np.savez(tmp_path / "guided.npz", arr_0=nhwc, arr_1=np.arange(30))
    np.save(tmp_path / "nchw.npy", nchw)
    np.save(tmp_path / "grey.npy", nhwc[..., 0])
    b = tmp_path / "nchw.npy"
    assert compared(capsys, tmp_path / "guided.npz", b)[1]["fid"] == 0.0
    result = compared(capsys, tmp_path / "a", b, "--fid", "--is")[1]
    assert result["fid"] < 1e-6 and "nchw.npy:array (n=30, 16x16)" in result["protocol"]
    grey = compared(capsys, tmp_path / "a", tmp_path / "grey.npy")[1]["fid"]
    assert grey > 0.01
    (tmp_path / "b.tmp.npz").write_text("mine")
    assert compared(capsys, "stats", b, tmp_path / "b.npz")[0] == 0
    assert (tmp_path / "b.tmp.npz").read_text() == "mine"
    with np.load(tmp_path / "b.npz") as saved:  # as pytorch-fid reads it
        mu = saved["mu"]
        sigma = saved["sigma"]
    features = metrics.InceptionFeatures()(torch.from_numpy(nchw.copy()))[0].double()
    assert np.allclose(mu, features.mean(0)) and np.allclose(sigma, features.T.cov())
    result = compared(capsys, tmp_path / "b.npz", tmp_path / "grey.npy")[1]
    assert result["fid"] == pytest.approx(grey, rel=1e-6)
    assert "b.npz (n=unknown; count, flavour and weights are the file's own" in result["protocol"]
    assert compared(capsys, "stats", b, tmp_path / "b.npz")[0] == 0  # of the same kind: replaced
    with refuses("b.npz does not say of how many pictures it is"):
        metrics.main(["stats", str(tmp_path / "b.npz"), str(tmp_path / "c.pt")])


def with_saved(**changed):
    """Statistics of the quick features as `stats` saves them, with some values of another kind."""
    moments = metrics.Moments.of(normal(100, 64)).state()
    return moments | {"sizes": [(16, 16)], "of": "x", "key": "y"} | changed


@pytest.mark.parametrize("name, content, words", [
    ("a.pt", [1, 2], "something else"), ("a.pt", {"n": 5}, "something else"),
    *(("a.pt", with_saved(**changed), words) for changed, words in (
        ({}, "statistics of x, not of 2015"), ({"n": -1}, "lacks"), ({"n": 1}, "at least 2"),
        ({"n": "5"}, "lacks"), ({"mean": None}, "lacks"), ({"mean": torch.zeros(3)}, "means must"),
        ({"mean": torch.full((64,), math.inf)}, "finite"), ({"sizes": [("a", 1)]}, "neither"),
        ({"scatter": torch.zeros(64)}, "means must"), ({"sizes": [(1, 2, 3)]}, "neither"),
        ({"scatter": torch.eye(64) + torch.eye(64).roll(1, 0)}, "symmetric"),
        ({"scatter": -torch.eye(64)}, "semidefinite"), ({"of": 5}, "something else"))),
    ("a.npz", {"mu": np.zeros(64)}, "sigma"), ("a.npz", {"arr_1": np.zeros(3)}, "arr_0"),
    ("a.npz", {"mu": np.zeros(3), "sigma": np.eye(3)}, "statistics of other features, not of"),
    ("a.npz", {"mu": np.array(["x"] * 64), "sigma": np.eye(64)}, "neither"),
    ("a.npz", {"mu": np.array([print] * 64), "sigma": np.eye(64)}, "allow_pickle=False"),
    ("a.npz", {"arr_0": np.zeros((9, 16, 16, 3), np.float32)}, "save (x * 255).round()"),
    ("a.npy", np.full((9, 3, 16, 16), -0.5), "save ((x + 1) * 127.5).round().clip(0, 255)"),
    ("a.npy", np.zeros((9, 16, 16, 4), np.uint8), "shape (9, 16, 16, 4)"),
    ("a.npy", np.full((9, 16, 16), 254.7), "from 255 to 255, not bytes: save x.round()"),
    ("a.npy", np.full((9, 16, 16), 65535, np.uint16), "not bytes: scale it to 0..255 and save"),
    ("a.npy", np.linspace(-3, 3, 2304).reshape(9, 16, 16), "not bytes: scale it to 0..255"),
    ("a.npy", np.full((9, 16, 16), math.nan), "some numbers are NaN or infinite"),
    ("a.npy", np.zeros((0, 3, 16, 16), np.uint8), "at least 2 pictures"),
    ("a.npy", np.zeros((4, 4, 4), np.uint8), "8 pixels"), ("a.npy", b"no array", "neither"),
    ("a.npz", b"PK\3\4", "neither")])
def test_saved_files_are_not_trusted(
        name, content, words, quick_inception, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        Path(name).write_bytes(content)
    elif name == "a.pt":
        torch.save(content, name)
    elif name == "a.npz":
        np.savez(name, **content)
    else:
        np.save(name, content)
    assert words in refusal(capsys, name, name)


def test_command_line_fcd_needs_no_weights(folders, sets, capsys, monkeypatch, cache, tmp_path):
    def fcd(a, b):
        code, result, _ = compared(capsys, a, b, "--fcd", "--root", cache)
        assert code == 0 and "fid" not in result
        return result

    test = "quadrants:test"
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "whole_name",
                      lambda name: name if name == "quadrants" else data.whole_name(name))
        patch.setattr(metrics, "load",
                      lambda name, root, size=None, split="train": sets[split == "test"])
        result = fcd(test, folders / "b")
        assert result["fcd"] > 1 and result["protocol"].startswith(
            "quadrants classifier features (d=128), quadrants:test (n=300, 16x16) vs b (n=20, ")
        assert fcd(test, test)["fcd"] == 0.0 < fcd(test, "quadrants:train")["fcd"]
        cli(metrics, test, "quadrants:train", "--fcd", "--root", cache, "--device", "cpu")
        assert re.match(r" +fcd  \d.*\n +protocol  quadrants", capsys.readouterr().out)
    for split, part in (("train", sets[0]), ("test", sets[1])):  # a folder with labels, as A
        for label in range(4):
            (tmp_path / f"own/{split}/{label}").mkdir(parents=True)
            for i, x in enumerate(part.x[part.y == label][:20, 0]):
                Image.fromarray(x.numpy()).save(tmp_path / f"own/{split}/{label}/{i}.png")
    own = tmp_path / "own"
    result = fcd(f"{own}:test", f"{own}:train")
    assert "own:test (n=80, 16x16) vs own:train (n=80, 16x16)" in result["protocol"]
    assert fcd(own, f"{own}:test")["fcd"] == pytest.approx(result["fcd"])
    assert "apart" in refusal(capsys, f"{own}:test", f"{own / 'train'}:test", "--fcd")
    for flag in (("--flavour", "tf"), ("--amp", "bf16"), ("--weights", "x.pth")):
        assert "of Inception's features" in refusal(
            capsys, f"{own}:test", f"{own}:train", "--fcd", "--root", cache, *flag)


def test_compare_keeps_real_and_generated_apart(monkeypatch):
    features = {"real": torch.arange(20.0).double()[:, None],
                "fake": torch.tensor([0.0, 0.1, 0.2, 0.3, 500.0]).double()[:, None]}
    logits = 50 * torch.eye(10).repeat_interleave(10, 0)  # B lies class by class
    monkeypatch.setattr(metrics, "measure", lambda source, *_: {
        "features": features[source.name], "logits": logits})
    extract = types.SimpleNamespace(metric="fid", dim=2048, name="")
    a, b, mixed = (metrics.Source("folder", None, name, n, {(8, 8)})
                   for name, n in (("real", 20), ("fake", 5), ("fake", 100)))
    got = metrics.compare(a, b, extract, {"pr", "kid"}, None)
    assert (got["precision"], got["recall"]) == pytest.approx((0.8, 1.0))
    assert got["kid_std"] > 0 and "kid: 100 subsets of 5" in got["protocol"]  # all of B, some of A
    assert metrics.compare(a, mixed, extract, {"is"}, None)["is"] > 5


@pytest.mark.parametrize("arguments, words", [
    ("A", "two sources"), ("stats A", "two sources"), ("A A --n 1", "--n"), ("A grid25", "points"),
    ("A empty", "no pictures"), ("A bad", "2 of 3 pictures of bad"), ("A one", "at least 2"),
    ("A nosuchset", "nosuchset"), ("A none.npz", "none.npz"), ("A run", "run/drawn"),
    ("A run/samples", "run/drawn"),
    ("A nosuchset", ":train or :test"), ("A digits --batch 0", "--batch must be at least 1"),
    ("A junk.pt", "junk.pt holds neither"), ("A split", "split:train"), ("A loop", "loop"),
    ("A " + "x" * 300, "xxx"), ("two A --fcd", "labelled"), ("stats A out.pt --kid", "stats"),
    ("stats A none/out.pt", "cannot write none/out.pt"), ("stats A out.stats", "give a .pt or"),
    ("A A --is --n 19", "--is needs at least 20 pictures"), ("A A --device cuda", "CUDA"),
    ("A A --pr --n 3", "--pr needs at least 4 pictures"), ("A A --flavour vanilla", "--flavour"),
    ("A A --device abacus", "--device abacus"), ("A A --size 7", "--size must be at least 8"),
    ("stats A junk.pt", "junk.pt holds"), ("stats A x.npz", "x.npz holds pictures")])
def test_command_line_mistakes_are_one_sentence(
        arguments, words, folders, quick_inception, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    good = (folders / "a/2.png").read_bytes()
    for name in ("one", "two", "bad", "split/Train", "empty", "loop", "run/samples"):
        Path(name).mkdir(parents=True)
    for name in ("one/", "two/", "two/as_", "bad/", "split/Train/", "run/", "run/samples/"):
        Path(name + "good.png").write_bytes(good)
    Path("bad/cut.png").write_bytes(good[: len(good) // 2])
    Path("bad/text.jpg").write_text("no picture")
    Path("loop/again").symlink_to(tmp_path / "loop")
    Path("A").symlink_to(folders / "a")
    for name in ("junk.pt", "run/config.json", "run/log.jsonl"):
        Path(name).write_bytes(b"junk")
    np.savez("x.npz", np.zeros((2, 8, 8), np.uint8))
    assert cli(metrics, *arguments.split(), "--root", tmp_path) == 2
    out, err = capsys.readouterr()
    last = err.strip().splitlines()[-1]
    assert not out and words in last and "good.png" not in last
    assert Path("junk.pt").read_bytes() == b"junk"


# ==================================================================================================
# ivgen.py: Intervention GAN (Part I), Intervention Adversarial Auto-Encoder (Part II)
# ==================================================================================================


def small_iv(model="ivlsgan", machine=None, steps=100, steps_per_epoch=None, **changes):
    """A small system of either Part in float32 on the CPU, and eight images for it."""
    usual = dict(size=32, width=4, latent=8, noise_schedule=())
    if model in ivgen.IVAAE_MODELS:
        usual = dict(size=16, width=32, latent=8)
    config = dataclasses.replace(ivgen.preset(model, "digits"), **usual | changes)
    torch.manual_seed(0)
    net = ivgen.build(config, machine, 1, steps, steps_per_epoch)
    shape = (8, 1, config.size, config.size)
    return net, torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def near(a, b, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def test_descend_moves_its_own_parameters_by_gradients_taken_before():
    a, b, c = (nn.Parameter(torch.tensor(value)) for value in (2.0, 3.0, 5.0))
    product = a * b * c                                 # a part of the graph that both losses need
    pairs = [(torch.optim.SGD([p], 0.1), product * p) for p in (a, b)]
    ivgen.Machine().descend_together(*pairs)            # both gradients are 2 a b c, at (2, 3, 5)
    assert [p.item() for p in (a, b, c)] == pytest.approx([2 - 6, 3 - 6, 5])
    ivgen.Machine().descend(torch.optim.SGD([c], 0.1), b * c)
    assert [p.item() for p in (a, b, c)] == pytest.approx([2 - 6, 3 - 6, 5 + 0.3])
    assert [p.grad for p in (a, b, c)] == [None, None, None]


@pytest.mark.parametrize("make, updates, moved", [
    (lambda: small_iv(e_steps=3), 4, "DGE"),            # D; G and E; E; E
    (lambda: small_iv("wgan-gp"), 1, "D"),              # D's gradient of a gradient
    (lambda: small_aim("unrolled", "mnist"), 1, "G"),   # G's, of D's five steps
    (lambda: lm_small("alae", "mnist"), 3, "EFGD")])
def test_fp16_scales_the_losses_and_no_step_is_left_out(make, updates, moved):
    net, x = make()
    net.machine = ivgen.Machine("cpu", "fp16")
    net.machine.scaler = torch.amp.GradScaler("cpu", 64.0)  # a scale at which nothing overflows
    before = copy.deepcopy(net)
    assert all(value.isfinite() for value in net.step(x).values())
    assert net.machine.scaler.get_scale() == 64     # halved if a gradient is not finite
    assert net.machine.scaler.state_dict()["_growth_tracker"] == updates
    assert not any(alike(getattr(net, n), getattr(before, n)) for n in moved)


def test_bridges_run_from_code_to_prior():
    z, noise = torch.randn(2, 100, 12)
    for k in range(5):
        prefix = torch.cat([noise[:, :3 * k], z[:, 3 * k:]], 1)     # blocks from the first on
        assert torch.equal(ivgen.prefix_substitute(z, k, 4, noise), prefix)
        angle = k * math.pi / 8
        near(ivgen.radial_substitute(z, k, 4, noise), z * math.cos(angle) + noise * math.sin(angle))
    for substitute in (ivgen.prefix_substitute, ivgen.radial_substitute):
        assert torch.equal(substitute(z, 0, 4, noise), z)
        assert torch.equal(substitute(z, 4, 4, noise), noise)
        for k in (-1, 5):
            with pytest.raises(ValueError, match=rf"step {k} "):
                substitute(z, k, 4, noise)


def test_block_substitution_replaces_the_named_block():
    z = torch.randn(100, 12, requires_grad=True)
    noise = torch.randn(100, 12)
    index = torch.randint(4, (100,))
    out = ivgen.block_substitute(z, index, 4, noise)
    replaced = F.one_hot(index, 4).bool().repeat_interleave(3, 1)
    assert torch.equal(out, torch.where(replaced, noise, z))        # so together all (Def. 2)
    out.sum().backward()
    assert torch.equal(z.grad, (~replaced).float())
    for substitute, i in ((ivgen.block_substitute, index), (ivgen.prefix_substitute, 1)):
        with pytest.raises(ValueError, match="divide a code of 12"):
            substitute(noise, i, 5, noise)
    chain = small_iv("ivaae-bw")[0].bridges(torch.zeros(9, 8))
    assert len({z_k[0, 0].item() for z_k in chain}) == 5            # D19: each its own noise


def test_ivgens_losses_are_their_equations():
    real = torch.randn(5)
    fake = torch.randn(5)
    p = torch.sigmoid(real)
    q = torch.sigmoid(fake)
    for name, loss_d, loss_g in (
            ("dcgan", -(p.log() + (1 - q).log()).sum() / 10, -q.log().mean()),      # Eq. (1), D11
            ("lsgan", ((real - 1) ** 2 + (fake + 1) ** 2).sum() / 10, (fake ** 2).mean() / 2),
            ("wgan", fake.mean() - real.mean(), -fake.mean()),
            ("wgan-gp", fake.mean() - real.mean(), -fake.mean())):
        near(ivgen.adversarial_loss_d(name, real, fake), loss_d)
        near(ivgen.adversarial_loss_g(name, fake), loss_g)
    x, x_hat = torch.randn(2, 2, 3, 4, 4)
    near(ivgen.squared_error(x_hat, x), 0.05 * (x - x_hat).square().sum() / 2)      # D14
    logits = torch.randn(2, 5, 2)                       # of IVAAE's D at t = 1: a GAN's loss
    near(ivgen.prior_loss(logits), F.softplus(logits[0, :, 0] - logits[0, :, 1]).mean())


def test_gradient_penalty_between_real_and_generated():
    """A critic <a, x> has gradient a everywhere: the penalty is (||a|| - 1)^2 for any images."""
    a = torch.randn(1, 4, 4, requires_grad=True)
    penalty = ivgen.gradient_penalty(lambda x: (x * a).sum((1, 2, 3)), *torch.randn(2, 6, 1, 4, 4))
    near(penalty, (a.norm() - 1) ** 2)
    gradient, = torch.autograd.grad(penalty, a)         # D descends it: it is differentiable
    near(gradient, 2 * (a.norm() - 1) * a / a.norm())

    def critic(x):
        seen.append(x.detach())
        return x.square().flatten(1).sum(1) / 2         # its gradient is x

    seen = []
    ones = torch.ones(200, 1, 2, 2)
    penalty = ivgen.gradient_penalty(critic, 3 * ones, ones)
    x = seen[0].flatten(1)
    assert (x == x[:, :1]).all()                        # one u for each image
    assert 1 <= x.min() < 1.1 and 2.9 < x.max() <= 3
    near(penalty.detach(), (x.norm(dim=1) - 1).square().mean())


def test_multi_js_is_in_the_best_classifiers_loss():
    """Theorem 3 (of IVAAE: 2): at f_i = p_i / sum_j p_j the loss is log k - JS(p_1..p_k)."""
    p = torch.randn(4, 7, dtype=torch.double).softmax(1)
    loss = -(p * (p / p.sum(0)).log()).sum() / 4                                # Eqs. (3), (4)
    assert abs(loss - (math.log(4) - ivgen.multi_js(p))) < 1e-12                # Eq. (5)
    assert abs(ivgen.multi_js(torch.eye(4).double()) - math.log(4)) < 1e-12
    assert abs(ivgen.multi_js(p[:2], torch.tensor([1.0, 0.0]).double())) < 1e-12


def test_example_1_square_fitting():
    """The JS of X0, X1 is log 2 for every a in (0, 1]; the four-way JS is (1 + a) log 2."""
    n = 20

    def square(left, low):
        cells = torch.zeros(2 * n, 2 * n, dtype=torch.double)
        cells[low:low + n, left:left + n] = 1 / n ** 2
        return cells.flatten()

    for shift in range(1, n + 1):
        four = torch.stack([square(0, 0), square(shift, n), square(0, n), square(shift, 0)])
        assert abs(ivgen.multi_js(four[:2]) - math.log(2)) < 1e-12
        assert abs(ivgen.multi_js(four) - (1 + shift / n) * math.log(2)) < 1e-12


def layers_of(network):
    """512k4s2: a convolution to 512 channels, kernel 4, stride 2; 16-5: fully connected."""
    found = []
    for m in network.modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
            found.append(f"{m.out_channels}k{m.kernel_size[0]}s{m.stride[0]}")
        elif isinstance(m, nn.Linear):
            found.append(f"{m.in_features}-{m.out_features}")
        elif isinstance(m, (nn.LeakyReLU, nn.ReLU, nn.Tanh, nn.modules.batchnorm._BatchNorm)):
            found.append(type(m).__name__.rstrip("12d").replace("BatchNorm", "BN"))
            if getattr(m, "negative_slope", 0.2) != 0.2:
                found[-1] += str(m.negative_slope)
    return " ".join(found)


D_BODY = "128k4s2 BN LeakyReLU 256k4s2 BN LeakyReLU 512k4s2 BN LeakyReLU"
PAC_BODY = "64k5s2 LeakyReLU " + D_BODY.replace("k4", "k5")


def test_ivgens_networks_are_the_tables():
    c = ivgen.IVGANConfig()
    pac = ivgen.IVGANConfig(network="pacgan", size=28)
    with torch.device("meta"):
        d = [ivgen.Discriminator(ivgen.convolutions(c, 3, norm), 4)
             for norm in ("table1", "dcgan", "none")]
        trunks = [ivgen.convolutions(config, 3, "dcgan") for config in (c, pac, pac, pac)]
        found = [*d, ivgen.Encoder(trunks[0], 100), ivgen.Generator(),
                 *ivgen.table3_networks(16, 1, 64, 1024, 5), *ivgen.table4_networks(64, 3, 128, 5),
                 ivgen.Discriminator(trunks[1], 4), ivgen.Encoder(trunks[2], 100),
                 ivgen.PairDiscriminator(trunks[3], 100), ivgen.PacGenerator()]
    assert [layers_of(network) for network in found] == [
        f"64k4s2 BN LeakyReLU {D_BODY} 8192-1 8192-4",                              # Table 1
        f"64k4s2 LeakyReLU {D_BODY} 8192-1 8192-4",                                 # D2
        f"64k4s2 LeakyReLU {D_BODY} 8192-1 8192-4".replace("BN ", ""),
        f"64k4s2 LeakyReLU {D_BODY} 100k4s2 BN",
        "512k4s1 BN ReLU 256k4s2 BN ReLU 128k4s2 BN ReLU 64k4s2 BN ReLU 3k4s2 Tanh",
        "4096-1024 ReLU 1024-1024 ReLU 1024-16",                                    # Table 3
        "16-1024 ReLU 1024-1024 ReLU 1024-4096 Tanh",
        "16-1024 ReLU 1024-1024 ReLU 1024-5",
        "128k5s2 BN ReLU 256k5s2 BN ReLU 512k5s2 BN ReLU 1024k5s2 BN ReLU 16384-64",    # Table 4
        "64-65536 512k5s1 BN ReLU 256k5s1 BN ReLU 128k6s2 BN ReLU 3k4s2 Tanh",      # D17
        "64-512 ReLU 512-512 ReLU 512-512 ReLU 512-512 ReLU 512-5",
        f"{PAC_BODY} 2048-1 2048-4", f"{PAC_BODY} 100k2s2 BN",                      # D20
        f"{PAC_BODY} 2148-200 LeakyReLU 200-1",                                     # D24
        "100-2048 BN ReLU 256k5s2 BN ReLU 128k5s2 BN ReLU 64k5s2 BN ReLU 3k5s2 Tanh"]
    assert not found[3][-1].affine                      # the code's scale is not E's to choose
    trunk = ivgen.convolutions(c, 3, "table1")
    for network in (ivgen.Discriminator(trunk, 4), ivgen.Encoder(trunk, 100), ivgen.Generator()):
        weights = [p for p in network.parameters() if p.numel() > 1e5]              # DCGAN's
        assert weights and all(abs(p.std() - 0.02) < 1e-3 for p in weights)
    d = ivgen.Discriminator(trunk, 4)
    assert abs(d.trunk[7].weight.mean() - 1) < 0.01 and d.real.bias.item() == 0
    config = dataclasses.replace(ivgen.preset("mrgan", "cifar10"), size=128, width=4, latent=8)
    net = ivgen.build(config, channels=2)               # of one stage more
    x = net.sample(2)
    assert x.shape == (2, 2, 128, 128) and net.encode(x).shape == (2, 8)


@pytest.mark.parametrize("model, changes", [
    *((name, {}) for name in ("dcgan", "lsgan", "wgan-gp", "mrgan", "ivdcgan", "ivlsgan")),
    ("ivlsgan", dict(e_sign="code"))])
def test_each_network_descends_its_own_loss(model, changes):
    """Algorithm 1 written out, on noisy images, with weights no two of which agree."""
    net, x = small_iv(model, mu=0.5, lam=0.25, mu_e=0.7, lam_e=1.3, steps_of_d=1,
                      noise_schedule=((0, 0.5),), **changes)
    losses, calls = asked_of(net, x)
    G = net.G
    D = net.D
    E = net.E
    name = net.config.loss
    x_z = G(torch.randn(8, 8))
    if E:
        w = E(x)
        x_hat = G(w)
        rec = (x_hat - x).abs().mean()
    if model in ivgen.IV:
        index = torch.randint(4, (8,))
        noise = torch.randn(8, 8)
        w_i = w.clone()
        for j in range(8):                              # lines 6 and 7, sample by sample
            place = slice(2 * index[j], 2 * index[j] + 2)
            w_i[j, place] = noise[j, place]
        x_i = G(w_i)
        rec = rec + (E(x_i) - w_i).abs().mean()

    def noisy(images):
        return images + 0.5 * torch.randn_like(images)

    real = noisy(x)
    fake = noisy(x_z.detach())
    loss_d = ivgen.adversarial_loss_d(name, D(real)[0], D(fake)[0])
    if name == "wgan-gp":
        loss_d = loss_d + 10 * ivgen.gradient_penalty(lambda x: D(x)[0], real, fake)
    loss_g = ivgen.adversarial_loss_g(name, D(noisy(x_z))[0])
    if model == "mrgan":                                # D9
        mode = -D(noisy(x_hat))[0].sigmoid().log().mean()
        loss_g = loss_g + 0.25 * rec + 0.5 * mode
        loss_e = 1.3 * rec + 0.7 * mode
    elif E:
        iv = D(x_i)[1].log_softmax(1)[torch.arange(8), index].mean()        # = -V_class
        near(losses["iv"], iv.detach())
        near(losses["rec"], rec.detach())
        loss_d = loss_d + 0.5 * F.cross_entropy(D(x_i.detach())[1], index)  # line 12
        loss_g = loss_g + 0.25 * rec + 0.5 * iv         # Eq. (11)
        loss_e = 1.3 * rec + 0.7 * iv                   # lines 16 and 17
        if changes:
            loss_e = -0.7 * iv                          # D3: E helps f, and reconstructs nothing
    wanted = [("d", loss_d), ("g", loss_g)]
    assert_asked(net, calls, [*wanted, ("e", loss_e)] if E else wanted)


@pytest.mark.parametrize("model, changes", [
    *((name, {}) for name in ivgen.IVAAE_MODELS), ("ivaae-rad", dict(e_loss="prior"))])
def test_ivaaes_networks_descend_algorithm_1(model, changes):
    """D by mu1 L_IV, G by lam L_recon alone, E by lam L_recon - mu2 L_IV."""
    net, x = small_iv(model, lam=1.5, mu1=3.0, mu2=7.0, lam_mmd=5.0, **changes)
    losses, calls = asked_of(net, x)
    z = net.E(x)
    rec = 1.5 * ivgen.squared_error(net.G(z), x)
    if model == "wae-mmd":
        assert net.D is None
        loss_e = rec + 5 * metrics.mmd_imq(z, torch.randn_like(z))
        return assert_asked(net, calls, [("eg", loss_e)])
    n = net.config.t + 1
    chain = net.bridges(z)
    log_d = [net.D(z_k).log_softmax(1) for z_k in chain]
    ce = -sum(log_d[k][:, k].mean() for k in range(n)) / n                          # Eq. (1)
    near(losses["d_iv"], ce.detach())
    loss_e = rec - 7 / n * ce
    if changes:                                         # D15: every z_k shall look like the prior's
        loss_e = rec - 7 / n * sum(log_d[k][:, -1].mean() for k in range(n - 1)) / (n - 1)
    assert_asked(net, calls, [("d", 3 / n * ce), ("eg", loss_e)])       # of G's weights: rec alone
    for k in range(n - 1):                              # each bridge but the last reaches E
        gradient, = torch.autograd.grad(log_d[k][:, k].sum(), net.E[1].weight, retain_graph=True)
        assert gradient.abs().max() > 0


def test_g_and_e_face_the_d_that_has_just_moved():
    for model, others in (("ivlsgan", ("g", "e")), ("ivaae-bw", ("eg",))):
        net, x = small_iv(model)
        for name in others:
            getattr(net, f"optimiser_{name}").step = mock.Mock()
        before = copy.deepcopy(net)
        torch.manual_seed(5)
        losses = net.step(x)
        assert alike(net.G, before.G) and alike(net.E, before.E) and not alike(net.D, before.D)
        torch.manual_seed(5)
        if model == "ivlsgan":
            x_z = net.G(net.prior(8))
            _, _, index, x_i = net.intervene(x)
            near(losses["f_ce"], F.cross_entropy(before.D(x_i)[1], index).detach())
            near(losses["iv"], -F.cross_entropy(net.D(x_i)[1], index).detach())
            near(losses["g_adv"], ivgen.adversarial_loss_g("lsgan", net.D(x_z)[0]).detach())
        else:
            chain = net.bridges(net.E(x))
            near(losses["d_iv"], ivgen.bridge_loss(before.judge(chain)).detach())
            near(losses["e_adv"], -2 / 5 * ivgen.bridge_loss(net.judge(chain)).detach())


def test_at_t_1_ds_two_outputs_are_aaes_one():
    """Their difference (D18)."""
    net, _ = small_iv("aae")
    logits = net.judge(torch.randn(2, 5, 8))
    odds = logits[..., 1] - logits[..., 0]              # of "from the prior"
    target = torch.tensor([[0.0] * 5, [1.0] * 5])
    near(ivgen.bridge_loss(logits), F.binary_cross_entropy_with_logits(odds, target))


@pytest.mark.parametrize("name", ["wgan", "wgan-gp"])
def test_wgan_moves_g_every_fifth_step(name):
    """D10, with WGAN's clipping or WGAN-GP's penalty."""
    net, x = small_iv(name)
    for step in range(1, 11):
        before = copy.deepcopy(net)
        losses = net.step(x)
        assert alike(before.G, net.G) == (step % 5 > 0) == ("g_adv" not in losses)
        assert not alike(before.D, net.D)
    largest = max(p.abs().max().item() for p in net.D.parameters())
    clipped = largest == pytest.approx(0.01)
    assert clipped == (name == "wgan") and ("d_gp" in losses) == (name == "wgan-gp")


def test_the_prior_of_pacgan_is_uniform(tmp_path, monkeypatch):
    """D21. The pictures of a run are of fixed codes, and these of the prior as well."""
    net, x = small_iv("pacdcgan")
    z = net.prior(4000).flatten().sort().values
    near(z, torch.linspace(-1, 1, len(z)), rtol=0, atol=0.02)
    drawn = {}
    monkeypatch.setattr(metrics, "save_grid", lambda path, *grid: drawn.update({path.stem: grid}))
    ivgen.figures_ivgan(net, tmp_path, 2, x)
    noise = metrics.fixed_noise(100, 8)
    near(drawn["000002"][0], net.decode(torch.special.erf(noise / math.sqrt(2))))
    assert small_iv("ivdcgan", network="pacgan", size=28)[0].prior(4000).std() > 0.9


def test_packs_are_drawn_and_judged_as_pacgan_has_them():
    """Real ones from the batch, fake ones by m calls of G; both steps of G on the same codes."""
    net, x = small_iv("pacdcgan", pack=3)
    judged = []
    codes = []
    net.D.register_forward_pre_hook(lambda module, inputs: judged.append(inputs[0].detach()))
    net.G.register_forward_hook(lambda module, inputs, out: codes.append(inputs[0]))
    _, calls = asked_of(net, x)
    real, fake, *again = judged
    assert torch.equal(real[:, :1], x)
    for place in (1, 2):
        same = (real[:, place, None] == x[None, :, 0]).flatten(2).all(2)        # (pack, image)
        assert same.any(1).all() and not same.diagonal().all()
    assert [z.shape for z in codes] == 6 * [(8, 8)] and len(again) == 2
    assert all(torch.equal(a, b) for a, b in zip(codes[:3], codes[3:]))
    assert len({z[0, 0].item() for z in codes}) == 3
    packs = torch.cat([net.G(z) for z in codes[:3]], 1)
    near(packs.detach(), fake)
    loss_d = ivgen.adversarial_loss_d("dcgan", net.D(real)[0], net.D(fake)[0])
    loss_g = F.softplus(-net.D(packs)[0]).mean()
    assert_asked(net, calls, [("d", loss_d), ("g", loss_g), ("g", loss_g)])


def test_packing_widens_ds_first_layer_alone():
    shapes = [[p.shape for p in small_iv("pacdcgan", pack=m)[0].parameters()] for m in (1, 4)]
    changed = [(a, b) for a, b in zip(*shapes) if a != b]
    assert changed == [((4, 1, 4, 4), (4, 4, 4, 4))]


def adam_by_hand(optimiser, weights, loss, steps):
    """The weights after so many of Adam's steps down loss(weights), as its paper has them."""
    group = optimiser.param_groups[0]
    beta1, beta2 = group["betas"]
    state = [optimiser.state[p] for p in weights]
    m = [s["exp_avg"] for s in state]
    v = [s["exp_avg_sq"] for s in state]
    done = int(state[0]["step"])
    for t in range(done + 1, done + steps + 1):
        gradients = torch.autograd.grad(loss(weights), weights, create_graph=True)
        m = [beta1 * a + (1 - beta1) * g for a, g in zip(m, gradients)]
        v = [beta2 * b + (1 - beta2) * g * g for b, g in zip(v, gradients)]
        rate = group["lr"] * math.sqrt(1 - beta2 ** t) / (1 - beta1 ** t)
        small = 1e-8 * math.sqrt(1 - beta2 ** t)
        weights = [w - rate * a / (b.sqrt() + small) for w, a, b in zip(weights, m, v)]
    return weights


def test_unrolled_gan_moves_g_at_the_d_ahead_and_d_by_one_step():
    """At K = 0 it is the GAN; at K > 0 G's gradient is another, and D takes the same step."""
    losses = []
    gradients = []
    for model, changes in (("unrolled", dict(unroll=0)), ("dcgan", {})):
        net, x = small_iv(model, **changes)
        loss, calls = asked_of(net, x)
        losses.append(loss)
        gradients.append({name: gradients_of(net, name, loss) for (name, loss), in calls})
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for n in "dg" for a, b in zip(*(g[n] for g in gradients)))
    made = [small_iv("unrolled", unroll=k, lr_d=1e-3) for k in (0, 2)]
    nets = [net for net, _ in made]
    start = copy.deepcopy(nets[0])
    for net, x in made:
        torch.manual_seed(5)
        assert net.step(x).keys() == {"d_adv", "g_adv"}
        assert {s["step"].item() for s in net.optimiser_d.state.values()} == {1}
    assert all(torch.equal(a, b) for a, b in zip(nets[0].D.buffers(), nets[1].D.buffers()))
    assert alike(nets[0].D, nets[1].D) and not alike(nets[0].D, start.D)
    assert not alike(nets[0].G, nets[1].G)


def test_veegans_networks_descend_their_own_terms():
    net, x = small_iv("veegan", noise_schedule=((0, 0.5),))
    losses, calls = asked_of(net, x)
    z = torch.randn(8, 8)
    x_z = net.G(z)
    rec = 0.5 * (z - net.E(x_z)).square().sum() / 8 + 4 * math.log(2 * math.pi)
    from_z = net.D(z, x_z + 0.5 * torch.randn_like(x))
    code = (net.E(x) + torch.randn(8, 8)).detach()
    from_x = net.D(code, x + 0.5 * torch.randn_like(x))
    p = from_z.sigmoid()                                # label 1: (z, G(z))
    q = from_x.sigmoid()                                # label 0: (F(x) + noise, x)
    loss_d = -(p.log() + (1 - q).log()).mean() / 2
    assert_asked(net, calls, [("d", loss_d), ("g", from_z.mean() + rec), ("e", rec)])
    near(losses["rec"], rec.detach())
    near(losses["g_adv"], from_z.mean().detach())


def test_e_steps_counts_es_updates():
    """D4: each on codes of the E that has moved."""
    net, x = small_iv(e_steps=10, lr_e=2e-3)
    codes = []
    net.E.register_forward_hook(lambda *call: codes.append(call[2].detach().clone()))
    net.step(x)
    assert [next(iter(optimiser.state.values()))["step"].item()
            for optimiser in (net.optimiser_d, net.optimiser_g, net.optimiser_e)] == [1, 1, 10]
    assert len(codes) == 20 and not torch.equal(codes[0], codes[2])     # E(x), E(x_i), E(x), ...


@pytest.mark.parametrize("off, missing", [
    (dict(mu=0.0, mu_e=0.0), {"iv", "f_ce"}), (dict(lam=0.0, lam_e=0.0), {"rec"}),
    (dict(e_sign="code", mu=0.0, mu_e=0.0, e_steps=2), {"iv", "f_ce"})])
def test_a_term_without_weight_is_not_computed(off, missing):
    net, x = small_iv(**off)
    before = copy.deepcopy(net.E)
    assert set(net.step(x)) == {"d_adv", "f_ce", "g_adv", "rec", "iv"} - missing
    assert alike(before, net.E) == ("e_sign" in off)    # there E has nothing to descend


def test_instance_noise_and_rates_follow_their_schedules():
    """D7: the authors' epochs, as shares of their 400. IVAAE's rates decay by epoch."""
    x = torch.zeros(64, 1, 32, 32)
    for model, wanted in (
            ("ivlsgan", [0.05, 0.05, 0.01, 0.01, 0.001, 0.001, 0, 0, 0, 0]),
            ("ivdcgan", [0.05, 0.05, 0.05, 0.05, 0.01, 0.01, 0.003, 0.003, 0.001, 0.001])):
        schedule = ivgen.preset(model, "cifar10").noise_schedule
        net, _ = small_iv(model, steps=400, noise_schedule=schedule)
        for epoch, deviation in zip((0, 49, 50, 99, 100, 199, 200, 299, 300, 399), wanted):
            net.iteration = epoch
            assert net.noisy(x).std().item() == pytest.approx(deviation, rel=0.02)
    for model in ("ivaae-bw", "wae-mmd"):
        net, x = small_iv(model, steps_per_epoch=2, lr=4e-3, lr_e=2e-3, lr_d=1e-3,
                          decay=((1, 0.5), (2, 0.1)))
        for factor in (1, 1, 0.5, 0.5, 0.1):
            net.step(x)
            rates = [g["lr"] for o in data.optimisers_of(net).values() for g in o.param_groups]
            wanted = [factor * rate for rate in (2e-3, 4e-3, 1e-3)]
            assert rates == pytest.approx(wanted[:2 if model == "wae-mmd" else 3])
    for model in ("dcgan", "wgan", "ivlsgan", "mrgan", "pacdcgan", "unrolled", "veegan"):  # D8
        for decay, factors in (("linear", (1, 1, 1, 1, 0.75, 0.5, 0.25)), ("none", (1,) * 7)):
            net, x = small_iv(model, steps=8, lr=1e-3, decay=decay)
            at_first = [o.param_groups[0]["lr"] for o in data.optimisers_of(net).values()]
            for n, factor in zip((0, 1, 2, 4, 5, 6, 7), factors):
                net.iteration = n
                net.step(x)
                rates = [o.param_groups[0]["lr"] for o in data.optimisers_of(net).values()]
                assert rates == pytest.approx([factor * rate for rate in at_first])


def test_running_statistics_are_of_what_they_normalise_later(tmp_path):
    """D12: G's follow G(z), E's E(x), until an evaluation takes E's anew from training images."""
    net, x = small_iv()
    norm = next(m for m in net.G if isinstance(m, nn.BatchNorm2d))
    last = net.E[-1]
    seen = {norm: [], last: []}
    for module in seen:
        module.register_forward_pre_hook(lambda m, inputs: seen[m].append(inputs[0].detach()))
    for _ in range(3):
        net.step(x)
    for module, per_step in ((norm, 3), (last, 2)):     # G(z), G(E(x)), G(w_i); E(x), E(x_i)
        assert len(seen[module]) == 3 * per_step
        expected = 0.0
        for h in seen[module][::per_step]:
            expected = 0.9 * expected + 0.1 * h.transpose(0, 1).flatten(1).mean(1)
        near(module.running_mean, expected)
    evaluated(net, tmp_path, n=100)
    found = copy.deepcopy(last)
    seen[last].clear()
    for x, _ in data.ordered(unlabelled(100), 96, net.config.batch, size=32):
        net.E(x)
    near(found.running_mean, torch.stack([h.mean(0) for h in seen[last]]).mean(0))
    near(found.running_var, torch.stack([h.var(0) for h in seen[last]]).mean(0))
    assert len(seen[last]) == 3 and last.momentum == 0.1


def test_svgd_step_is_eq_2():
    """Against the double loop, with the kernel's gradient taken by autograd."""
    z = torch.randn(7, 3, dtype=torch.double) + 1
    expected = torch.zeros_like(z)
    for i in range(7):
        direction = 0.0
        for j in range(7):
            z_j = z[j].clone().requires_grad_()
            k = torch.exp(-(z_j - z[i]).square().sum() / 1.7)
            grad_k, = torch.autograd.grad(k, z_j)
            direction += k.detach() * -z[j] + grad_k    # grad log N(z_j; 0, I) is -z_j
        expected[i] = z[i] + 0.6 / 7 * direction
    near(ivgen.svgd_step(z, 1.7, 0.6), expected, atol=1e-12)
    assert torch.autograd.gradcheck(lambda z: ivgen.svgd_step(z, 1.7, 0.6), z.requires_grad_())


def test_svgd_chain():
    """z^0 is E(x); each of t - 1 bridges is two noisy steps on; the last is the prior's (D16)."""
    z = torch.randn(64, 6) * 0.3 + 2
    torch.manual_seed(1)
    chain = ivgen.svgd_chain(z, 4)
    torch.manual_seed(1)
    assert len(chain) == 5 and chain[0] is z
    for k in range(1, 4):
        for _ in range(2):
            z = ivgen.svgd_step(z, ivgen.median_bandwidth(z))
            z = z + 0.1 * torch.randn_like(z)
        assert torch.equal(chain[k], z)
    assert torch.equal(chain[4], torch.randn_like(z))
    same = torch.cat([torch.full((90, 4), 3.0), torch.randn(10, 4)])    # many equal codes
    three = torch.tensor([[0.0], [1.0], [5.0]])         # distances 1, 4, 5
    assert ivgen.median_bandwidth(three) == pytest.approx(100 * 16 / math.log(3))
    h = ivgen.median_bandwidth(same)
    exact = ivgen.svgd_step(same.double(), h.double()).float()
    near(ivgen.svgd_step(same, h), exact, atol=1e-3)


def test_mmd_is_unbiased_and_equals_the_double_loop():
    a = torch.randn(5, 3, dtype=torch.double)
    b = torch.randn(6, 3, dtype=torch.double) + 1

    def kernel(p, q):                                   # C = 2 d s
        squares = (p - q).square().sum()
        return sum(6 * s / (6 * s + squares) for s in (0.1, 0.2, 0.5, 1, 2, 5, 10))

    naive = sum(kernel(a[i], a[j]) for i in range(5) for j in range(5) if i != j) / 20
    naive += sum(kernel(b[i], b[j]) for i in range(6) for j in range(6) if i != j) / 30
    naive -= 2 * sum(kernel(p, q) for p in a for q in b) / 30
    near(metrics.mmd_imq(a, b), naive, rtol=1e-10, atol=0)
    assert torch.autograd.gradcheck(lambda a: metrics.mmd_imq(a, b), a.requires_grad_())


def test_the_flag_network_chooses_a_preset():
    """As --model and --dataset do; of DCGAN's settings it chooses PacGAN's with it (D21)."""
    for model in ("dcgan", "lsgan", "ivlsgan"):
        flags = ("--dataset", "stacked-mnist", "--model", model)
        plain = settings_from(ivgen, *flags)
        assert settings_from(ivgen, *flags, "--network", "table1") == plain
        more = dict(network="pacgan", size=28, d_norm="dcgan")
        wanted = dataclasses.replace(plain, **more | (ivgen.PACGAN if model == "dcgan" else {}))
        assert settings_from(ivgen, *flags, "--network", "pacgan") == wanted


def test_fixed_triples_are_of_all_digits(sets):
    train = quadrants(80, "train", 1, stacked=True)
    test = quadrants(20, "test", 2, stacked=True)
    fixed = data.fixed_triples(train, test, 400)
    assert fixed.x.shape == (400, 3, 16, 16) and fixed.channels == 3 and fixed.classes == 1000
    assert data.fingerprint(fixed) == data.fingerprint(data.fixed_triples(train, test, 400))
    digits = {picture.numpy().tobytes(): y.item() for part in (train, test)
              for picture, y in zip(part.x, part.y)}
    used = [[picture.numpy().tobytes() for picture in x] for x in fixed.x]
    assert len({picture for triple in used for picture in triple}) == 100      # of both splits
    assert fixed.y.tolist() == [int("".join(str(digits[p]) for p in triple)) for triple in used]
    with pytest.raises(data.UserError, match="--triples: quadrants is no set of stacked digits"):
        data.fixed_triples(*sets, 5)


def test_a_run_on_fixed_triples(tmp_path, monkeypatch):
    """It trains on these, and its classifier on the digits of the training split, as without."""
    pair = [quadrants(n, "train", n, stacked=True) for n in (200, 60)]
    monkeypatch.setattr(data, "load_pair", lambda *_: pair)
    monkeypatch.setattr(data, "load", lambda *_, **__: pair[0])
    learned = []
    monkeypatch.setattr(metrics, "is_labelled", lambda d: learned.append(d) or True)
    run = tmp_path / "run"
    flags = ("--dataset", "stacked-digits", "--network", "pacgan", "--model", "pacdcgan", "--width",
             4, "--samples", 50, "--triples", 130, "--steps", 3, "--root", tmp_path, "--out", run)
    assert cli(ivgen, *flags, "--device", "cpu", "--amp", "off") == 0
    assert all(d is pair[0] or d is pair[1] for d in learned)
    state = saved(run)
    assert state["data"] == data.fingerprint(data.fixed_triples(*pair, 130), pair[1])
    assert state["batches"] == {"epoch": 1, "position": 1} and state["channels"] == 3
    assert log_of(run)[-1]["modes"] > 0
    assert cli(ivgen, "--resume", run, "--steps", 4, "--device", "cpu") == 0


def test_the_rows_of_ivgens_tables_are_their_systems():
    models = {"WAE-MMD": "wae-mmd", "AAE": "aae", "AAE (WAE-GAN)": "aae", "IVAAE, radial":
              "ivaae-rad", "IVAAE, blockwise": "ivaae-bw", "IVAAE, SVGD": "ivaae-svgd",
              "Unrolled GAN": "unrolled"}
    for name, table in ivgen.TABLES.items():
        for row, (flags, *_) in table["rows"].items():
            for _, dataset, _ in table["columns"]:
                config = settings_from(ivgen, "--dataset", dataset, *flags.split())
                if name == "4":
                    assert f"mu = {config.mu:g}, k = {config.k}".replace("0.", ".") == row
                    assert (config.model, config.mu_e) == ("ivlsgan", 2 * config.mu)    # Sec. 5
                elif name == "ivaae-fig2":
                    assert f"{config.model}, d = {config.latent}" == row
                else:
                    assert config.model == models.get(row, row.lower())


def test_published_values_are_those_beside_our_results():
    found = {line["row"]: line["published"] for line in results() if line["metric"] == "FLD"
             and line["table"] == "ivaae-mnist" and line["published"]}
    assert found == {row: cells[1] for row, cells in ivgen.TABLES["ivaae-2"]["rows"].items()}


def evaluated(net, folder, n=96):
    """The metrics of an evaluation of `net`, and the names of the pictures it leaves."""
    for name in ("samples", "recon", "figures"):
        (folder / name).mkdir()
    bare = unlabelled(n)
    x, _ = next(data.ordered(bare, 100, 100, size=net.config.size))
    evaluator = metrics.Evaluator(bare, bare, net.config.size, root=folder, samples=50)
    result = ivgen.evaluate(net, evaluator, folder, 2, x, bare)
    return result, " ".join(sorted(path.stem for path in folder.rglob("*.png")))


@pytest.mark.parametrize("model, left", [
    ("dcgan", "000002 real"), ("pacdcgan", "000002 real"),
    ("mrgan", "000002 000002 real"), ("veegan", "000002 000002 real"),
    ("ivlsgan", "000002 000002 interventions-000002 real"),
    *((m, "000002 000002 covariance-000002 interpolations-000002") for m in ivgen.IVAAE_MODELS)])
def test_an_evaluation_leaves_its_numbers_and_figures(model, left, tmp_path, monkeypatch):
    net, _ = small_iv(model)
    asked = mock.Mock(wraps=data.ordered)
    monkeypatch.setattr(data, "ordered", asked)
    result, found = evaluated(net, tmp_path)
    assert found == left
    counts = [call.args[1] for call in asked.call_args_list]
    assert (60_000 in counts) == ("fld" in result)      # Sec. 4
    assert ("mse" in result) == ("dcgan" not in model.removeprefix("iv"))
    assert ("fld" in result) == (model in ivgen.IVAAE_MODELS)
    if "fld" in result:                                 # IVAAE's Table 2
        images, _ = next(data.ordered(unlabelled(96), 96, size=16))
        wanted = metrics.frechet_latent_distance(net.encode(images))
        assert result["fld"] == pytest.approx(wanted, rel=1e-4) and result["fld_n"] == 96
        assert "fld: 96 train images; mse: " in result["protocol"]


def test_figure_1_shows_the_interventions(monkeypatch, tmp_path):
    net, x = small_iv()
    drawn = {}
    monkeypatch.setattr(metrics, "save_grid", lambda path, *grid: drawn.update({path.stem: grid}))
    ivgen.figures_ivgan(net, tmp_path, 2, x)
    grid, columns = drawn["interventions-000002"]
    assert columns == 6 and len(grid) == 8 * 6 and torch.equal(grid[6], x[1])
    w = net.encode(x)
    near(grid[7], net.decode(w)[1])
    w_i = w[1].repeat(4, 1)
    for i in range(4):
        w_i[i, 2 * i:2 * i + 2] = metrics.fixed_noise(100, 8)[1, 2 * i:2 * i + 2]
    near(grid[8:12], net.decode(w_i))


def test_probes_leave_the_frozen_networks_alone(monkeypatch):
    """Fig. 2's D learns and Fig. 5's classifier too; E and G, batch norms included, do not."""
    train = quadrants(600, "train", 1)
    net, _ = small_iv("ivaae-rad")
    before = copy.deepcopy(net)
    lines = ivgen.probe_discriminator(net, data.Batches(train, 32, size=16), 30)
    loss = [line["loss"] for line in lines]
    assert sum(loss[-5:]) < sum(loss[:5]) and not alike(net.D, before.D)
    inputs = []
    linear = nn.Linear
    monkeypatch.setattr(ivgen.nn, "Linear", lambda n, m: inputs.append(n) or linear(n, m))
    rates = []
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda of, lr: rates.append(lr) or adam(of, lr))
    lines = ivgen.probe_classifier(net, data.Batches(train, 60, size=16), train, 60, every=20)
    assert rates == [1e-4]                              # printed in Sec. 4
    assert inputs == [32, 1000, 1000]                   # E's last hidden layer, then 1000 nodes
    assert [line["iteration"] for line in lines] == [20, 40, 60] and lines[-1]["error"] < 0.5
    assert alike(net.E, before.E) and alike(net.G, before.G)


def test_the_probes_gradients_are_fig_3s(monkeypatch):
    net, x = small_iv("ivaae-bw", network="conv", size=64, width=2)
    before = copy.deepcopy(net)
    torch.manual_seed(5)
    line, = ivgen.probe_discriminator(net, iter([(x, None)]), 1)
    torch.manual_seed(5)
    assert net.training and all(map(torch.equal, net.E.buffers(), before.E.buffers()))
    before.E.eval()
    logits = before.judge(before.bridges(before.E(x)))
    for name, loss in (("gradient", -logits[0].log_softmax(1)[:, -1].mean()),
                       ("gradient_iv", before.encoder_loss(logits))):
        parts = torch.autograd.grad(loss, list(before.E.parameters()), retain_graph=True)
        norm = torch.cat([g.flatten() for g in parts]).norm().item()
        assert line[name] == pytest.approx(norm, rel=1e-4)


def test_the_command_probe_on_a_finished_run(pictures, tmp_path, capsys):
    for model, kind, words in (("ivaae-svgd", "discriminator", ""),
                               ("ivaae-svgd", "classifier", "has no labels"),
                               ("wae-mmd", "discriminator", "wae-mmd has no discriminator"),
                               ("lsgan", "classifier", "lsgan is not one of IVAAE's systems")):
        run = tmp_path / model
        more = ("--size", 64, "--model", model, "--steps", 1, "--out", run)
        if not run.exists():
            assert cli(ivgen, *quick(ivgen, pictures, tmp_path / "root", *more)) == 0
        code = cli(ivgen, "--resume", run, "--probe", kind, "--steps", 3, "--device", "cpu")
        assert code == (2 if words else 0) and words in capsys.readouterr().err
    run = tmp_path / "ivaae-svgd"
    lines = (run / "probe-discriminator.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    assert [line["iteration"] for line in lines] == [1, 2, 3]
    assert all(line[name] > 0 for line in lines for name in ("loss", "gradient", "gradient_iv"))
    assert (run / "figures/probe-discriminator-loss.png").stat().st_size > 0


# ==================================================================================================
# aim.py: Adversarial Inference by Matching priors and conditionals
# ==================================================================================================


def small_aim(model="aim", dataset="grid25", authors=False, **changes):
    """A small model of `model`'s kind in float32 on the CPU, and a batch of data for it."""
    preset = aim.preset(model, dataset, authors)
    small = dict(width=8, latent=3 if preset.size else 2, batch=8)
    config = dataclasses.replace(preset, **small | changes)
    torch.manual_seed(0)
    shape = (1, config.size, config.size) if config.size else (2,)
    net = aim.build(config, channels=shape[0], steps_per_epoch=10)
    return net, torch.rand((8, *shape), generator=torch.Generator().manual_seed(1)) * 2 - 1


def losses_of_step(net, x):
    """[loss of D, loss of G and E] of a step, as asked_of() has them."""
    _, [((d, loss_d), (g, loss_g))] = asked_of(net, x)  # D3: in one call, so none moves before
    assert (d, g) == ("d", "g")
    return [loss_d, loss_g]


# ---- losses --------------------------------------------------------------------------------------


def test_eq_8_at_its_least_is_the_posterior():
    """Proposition 1, E's half: of z ~ N(0, 1) and x = az + s noise, E ends at N(z; mu(x), sigma^2)
    = p(z|x), and L_e at the entropy of z given x."""
    a = 1.5
    s = 0.6
    generator = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 100_000, 1, generator=generator, dtype=torch.float64)
    x = a * z + s * noise
    slope, shift, log_var = parameters = [torch.ones(1, dtype=torch.float64, requires_grad=True)
                                          for _ in range(3)]
    optimiser = torch.optim.LBFGS(parameters, max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = aim.posterior_nll(z, slope * x + shift, log_var.expand_as(z)).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    variance = s ** 2 / (a ** 2 + s ** 2)
    assert abs(slope.item() - a / (a ** 2 + s ** 2)) < 0.01 and abs(shift.item()) < 0.01
    assert abs(log_var.exp().item() / variance - 1) < 0.02
    assert abs(closure().item() - math.log(2 * math.pi * math.e * variance) / 2) < 0.01


def test_eq_6_estimates_the_kl_divergence():
    """Sec. 4.4: the value function bounds KL(q || p) from below, and the best D attains it: of
    q = N(1, 1) and p = N(0, 1), KL is 1/2 and D = 1 + log q/p = x + 1/2."""
    x = torch.special.ndtri((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)

    def value(D):
        return -aim.fgan_loss_of_d(D(x + 1), D(x)).item()

    assert abs(value(lambda x: x + 0.5) - 0.5) < 1e-3
    for other in (torch.sin, torch.cos, torch.tanh, torch.square, torch.ones_like):
        for step in (-0.1, 0.1):
            assert value(lambda x: x + 0.5 + step * other(x)) < 0.5 - 1e-3


@pytest.mark.parametrize("model", ["aim", "aim-minus", "aim-fgan", "gan"])
@pytest.mark.parametrize("dataset", ["grid25", "mnist", "cifar10"])
def test_algorithm_1s_losses(model, dataset):
    net, x = small_aim(model, dataset, std=0.2)
    _, calls = asked_of(net, x)
    z = torch.randn(8, net.latent)
    rho_q, rho_p = (net.critic(net.features(each)) for each in (x, net.G(z)))
    if model == "aim-fgan":
        fake = (rho_p - 1).exp().mean()
        wanted = [fake - rho_q.mean(), -fake]
    else:
        wanted = [-rho_q.sigmoid().log().mean() - (1 - rho_p.sigmoid()).log().mean(),
                  -rho_p.sigmoid().log().mean()]
    if model != "gan":
        mu, log_var = net.E(net.features(net.G(z)))
        nll = -torch.distributions.Normal(mu, (log_var / 2).exp()).log_prob(z).sum(1).mean()
        wanted[1] = wanted[1] + nll / (1 if model == "aim-fgan" else net.latent)
        assert model != "aim-minus" or not log_var.any()
    assert len(calls) == 1  # D3: no network moves before both gradients are known
    assert_asked(net, calls, list(zip("dg", wanted)))


@pytest.mark.parametrize("model, authors", [
    ("ali", False), ("alice", False), ("alice-adv", False), ("alice", True), ("alice-adv", True)])
@pytest.mark.parametrize("dataset", ["grid25", "mnist", "cifar10"])
def test_alis_losses_are_written_out(model, authors, dataset):
    """ALICE's of its authors has a cycle of codes besides."""
    net, x = small_aim(model, dataset, authors, std=0.2, lam=0.7, k=1.0, g_steps=1)
    losses = losses_of_step(net, x)

    def code(mu, log_var):
        return mu + (log_var / 2).exp() * torch.randn_like(mu)

    z = torch.randn(8, net.latent)
    z_hat = code(*net.E(x))
    p = net.D(x, z_hat).sigmoid()
    q = net.D(net.G(z), z).sigmoid()
    wanted = [-p.log().mean() - (1 - q).log().mean(), -(1 - p).log().mean() - q.log().mean()]
    cycles = {"D_cycle": (x, net.G(z_hat))} if "alice" in model else {}
    if authors:
        cycles["D_code"] = (z, code(*net.E(net.G(z))))
    for name, pair in cycles.items():
        if model == "alice":
            wanted[1] = wanted[1] + 0.7 * (pair[0] - pair[1]).abs().mean()
        else:
            critic = getattr(net, name)
            same, cycle = (critic(torch.cat([pair[0], each], 1)).sigmoid() for each in pair)
            wanted[0] = wanted[0] - 0.7 * (same.log().mean() + (1 - cycle).log().mean())
            wanted[1] = wanted[1] - 0.7 * cycle.log().mean()
    torch.testing.assert_close(losses, wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(aim.cycle_loss(x, -x, 2), (4 * x.square()).mean())


# ---- networks ------------------------------------------------------------------------------------


def test_maxout_is_the_largest_of_its_pieces():
    layer = aim.Maxout(3, 4, pieces=5)
    x = torch.randn(7, 3)
    weight = layer.linear.weight.view(5, 4, 3)
    bias = layer.linear.bias.view(5, 4)
    for b, n in itertools.product(range(7), range(4)):
        largest = max((weight[k, n] @ x[b] + bias[k, n]).item() for k in range(5))
        assert abs(layer(x)[b, n] - largest) < 1e-6


def rows_of(network):
    """The rows of a network: operation, feature maps in and out, kernel, stride, BN."""
    rows = []
    for m in network.modules():
        if isinstance(m, nn.Linear):
            rows.append(f"fc {m.in_features} {m.out_features}")
        elif isinstance(m, nn.modules.conv._ConvNd):
            kind = "up" if m.transposed else "conv"
            rows.append(f"{kind} {m.in_channels} {m.out_channels} {m.kernel_size[0]} {m.stride[0]}")
        elif isinstance(m, nn.modules.batchnorm._BatchNorm):
            rows[-1] += " BN"
    return ", ".join(rows)


FEATURES4 = "conv 3 128 4 2, conv 128 256 4 2 BN, conv 256 512 4 2 BN, conv 512 1024 4 2 BN"


@pytest.mark.parametrize("table, network, printed", [
    ("Table3", "generator", "fc 32 1024 BN, fc 1024 6272 BN, up 128 64 4 2 BN, up 64 1 4 2"),
    ("Table3", "features", "conv 1 64 4 2, conv 64 128 4 2 BN"),
    ("Table3", "critic", "fc 6272 1024 BN, fc 1024 64, fc 64 1"),
    ("Table3", "encoder", "conv 128 64 4 2 BN, fc 576 32 BN, fc 32 32, fc 576 32 BN, fc 32 32"),
    ("Table4", "generator", "up 64 1024 4 1 BN, up 1024 512 4 2 BN, up 512 256 4 2 BN, "
                            "up 256 128 4 2 BN, up 128 3 4 2"),
    ("Table4", "features", FEATURES4),
    ("Table4", "critic", "conv 1024 1 4 1"),
    ("Table4", "encoder", "conv 1024 512 4 2, conv 512 512 4 2 BN, conv 512 256 2 1 BN, "
                          "conv 256 128 1 1 BN, fc 512 64 BN, fc 64 64, fc 512 64 BN, fc 64 64"),
    # D7: the codes join what D_feature gives, and Table 3's D_con follows.
    ("Table3", "pair_critic", "conv 1 64 4 2, conv 64 128 4 2 BN, "
                              "fc 6304 1024 BN, fc 1024 64, fc 64 1"),
    ("Table4", "pair_critic", f"{FEATURES4}, fc 16448 1024 BN, fc 1024 64, fc 64 1"),
    # D4: ALI's, with maxout layers of 200 times 5 pieces, and the heads of Table 3.
    ("Points", "generator", "fc 2 400 BN, fc 400 400 BN, fc 400 400 BN, fc 400 400 BN, fc 400 2"),
    ("Points", "features", "fc 2 1000, fc 200 1000"),
    ("Points", "critic", "fc 200 1000, fc 200 1"),
    ("Points", "encoder", "fc 200 200, fc 200 2, fc 200 200, fc 200 2"),
    ("Points", "pair_critic", "fc 4 1000, fc 200 1000, fc 200 1000, fc 200 1")])
def test_networks_are_the_tables(table, network, printed):
    assert rows_of(getattr(getattr(aim, table)(), network)()) == printed


@pytest.mark.parametrize("model, G, E, D", [
    ("pacgan", "fc 2 400 BN, fc 400 400 BN, fc 400 400 BN, fc 400 400 BN, fc 400 2", "",
     "fc 8 1000, fc 200 1000, fc 200 1000, fc 200 1"),  # packs of four
    ("ali", "fc 2 400 BN, fc 400 400 BN, fc 400 400 BN, fc 400 400 BN, fc 400 2",
     "fc 4 400 BN, fc 400 400 BN, fc 400 2", "fc 4 1000, fc 200 1000, fc 200 1000, fc 200 1"),
    ("unrolled", "fc 256 128, fc 128 128, fc 128 2", "", "fc 2 128, fc 128 128, fc 128 1"),
    ("veegan", "fc 254 128, fc 128 128, fc 128 2", "fc 2 128, fc 128 128, fc 128 254",
     "fc 256 128, fc 128 1"),
    ("alice", "fc 2 256, fc 256 256, fc 256 2", "fc 4 256, fc 256 256, fc 256 2",
     "fc 4 256, fc 256 256, fc 256 1")])
def test_networks_of_the_authors_2d_code(model, G, E, D):
    net = aim.build(aim.preset(model, "grid25", authors=True))
    of_d = net.D if E else nn.Sequential(net.features, net.critic)
    assert [rows_of(n) if n else "" for n in (net.G, net.E, of_d)] == [G, E, D]
    weight = (net.G[2] if model == "unrolled" else net.G[0]).weight.detach()
    if model == "unrolled":
        torch.testing.assert_close(weight @ weight.T, 1.4 ** 2 * torch.eye(128))
        assert any(isinstance(layer, nn.Tanh) for layer in net.G)
    std = {"pacgan": 0.02, "ali": 0.02, "veegan": (2 / 382) ** 0.5, "alice": (2 / 258) ** 0.5}
    assert model not in std or abs(weight.std() / std[model] - 1) < 0.1
    biases = [p for name, p in net.named_parameters() if name.endswith("bias")]
    assert not any(bias.any() for bias in biases)


@pytest.mark.parametrize("table, slope, size", [(aim.Table3, 0.1, 28), (aim.Table4, 0.2, 64)])
def test_shapes_slopes_and_ends(table, slope, size):
    make = table(width=4, latent=3, channels=2)
    G, D_feature, *others = networks = [make.generator(), make.features(), make.critic(),
                                        make.encoder(), make.pair_critic()]
    slopes = {m.negative_slope for net in networks for m in net.modules()
              if isinstance(m, nn.LeakyReLU)}
    z = torch.randn(5, 3)
    h = D_feature(G(z))
    assert slopes == {slope} and G(z).shape == (5, 2, size, size)
    assert others[0](h).shape == others[2](G(z), z).shape == (5,)
    assert [code.shape for code in others[1](h)] == [z.shape] * 2
    last = [m for m in G if isinstance(m, nn.ConvTranspose2d)][-1]
    last.weight.data *= 1e3  # at its initial weights every output is small
    assert 0.99 < G(z).abs().max() <= 1


def test_d_feature_sees_table_3s_scale():
    net, x = small_aim("aim", "mnist")
    z = torch.randn(8, 3)
    seen = net.features[0](net.G(z))
    torch.testing.assert_close(seen, net.G[:-1](z))  # all but the conversion to [-1, 1]
    assert 0 <= seen.min() and seen.max() <= 1 and net.G(z).min() < 0 <= net.features[0](x).min()


def test_initial_weights():
    net, _ = small_aim("aim", "cifar10", width=32)
    weight = net.G[1].weight
    assert abs(weight.std() - 0.02) < 1e-3 and abs(weight.mean()) < 1e-3
    assert net.critic[0].bias.item() == 0
    for model in ("aim", "ali"):  # D4: samples as wide as the data, and D bends among them
        net, x = small_aim(model, width=400)
        assert 2 < net.G(torch.randn(500, 2)).std() < 6
        maxout = (net.features if model == "aim" else net.E[0])[0]
        w = maxout.linear.weight.view(5, 200, 2)
        b = maxout.linear.bias.view(5, 200)
        kink = ((b[0] - b[1]) / (w[0] - w[1]).norm(dim=1)).abs()  # where two pieces meet
        assert 1 < kink.median() < 4
        assert torch.equal(net.posterior(x)[1], torch.ones(8, 2))
        assert 0.5 < net.G[1].bias.std() < 0.65 and net.G[1].bias.abs().max() <= 1
        flat, _ = small_aim(model, std=0.02)
        assert not any(p.any() for name, p in flat.named_parameters() if name.endswith("bias"))


# ---- what a step moves ---------------------------------------------------------------------------


@pytest.mark.parametrize("model", aim.MODELS)
def test_each_optimiser_moves_its_own_networks_down_its_own_loss(model):
    """With the other one at rest: signs, and whom a step leaves alone (E reads D_feature)."""
    of_d = dict(ali="D", veegan="D", alice="D") | {"alice-adv": "D D_cycle"}
    of_d = of_d.get(model, "features critic")
    of_g = "G" if model in ("gan", "pacgan", "unrolled") else "G E"
    for n, (other, networks) in enumerate((("optimiser_g", of_d), ("optimiser_d", of_g))):
        net, x = small_aim(model, std=0.2, lr=1e-4)
        getattr(net, other).step = mock.Mock()
        before = losses_of_step(net, x)[n]
        for _ in range(3):
            assert who_moved(net, functools.partial(net.step, x)) == set(networks.split())
            after = losses_of_step(net, x)[n]
        assert after < before - 1e-6


def test_without_lambda_e_rests_and_the_rest_is_the_gan():
    """Left to the paper, lambda is 1 / d."""
    assert small_aim()[0].lam == 1 / 2 and small_aim("aim", "mnist", latent=5)[0].lam == 1 / 5
    net, x = small_aim(lam=0.0)
    gan, _ = small_aim("gan")
    gan.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("E.")})
    for each in (net, gan):
        torch.manual_seed(7)
        assert who_moved(each, functools.partial(each.step, x)) == {"G", "features", "critic"}
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in gan.state_dict().items())


@pytest.mark.parametrize("model", ["aim", "ali", "alice", "alice-adv"])
def test_gs_running_statistics_are_those_of_the_prior(model):
    """D9: a batch of draws counts in each step, ALICE's cycle does not."""
    net, x = small_aim(model, std=0.2)
    norm = next(m for m in net.G if isinstance(m, nn.BatchNorm1d))
    seen = []
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().mean(0)))
    net.step(x)
    assert len(seen) == (2 if "alice" in model else 1)
    torch.testing.assert_close(norm.running_mean, 0.1 * seen[0])  # G(z) comes first in each step


@pytest.mark.parametrize("decay", ["sqrt", "linear", "none"])
def test_learning_rate_is_alpha_over_root_epoch(decay):
    net, x = small_aim(lr=1e-3, decay=decay)  # ten steps an epoch
    net.steps = 36
    for step in range(36):
        net.step(x)
        factor = {"sqrt": 1 / math.sqrt(1 + step // 10), "none": 1,
                  "linear": 1 if step <= 18 else (36 - step) / 18}[decay]
        for optimiser in (net.optimiser_d, net.optimiser_g):
            assert [group["lr"] for group in optimiser.param_groups] == [
                pytest.approx(1e-3 * factor)]


# ---- PacGAN, Unrolled GAN, VEEGAN, and systems as their authors have them ------------------------


@pytest.mark.parametrize("make, model, plain, changes", [
    *((small_iv, f"iv{name}", name, dict(mu=0.0, lam=0.0, mu_e=weight, lam_e=weight))
      for name in ("dcgan", "lsgan") for weight in (0.0, 1.0)),
    (small_iv, "pacdcgan", "dcgan", ivgen.PACGAN | dict(pack=1)),
    (small_iv, "ivaae-rad", "aae", dict(t=1)), (small_iv, "ivaae-bw", "aae", dict(t=1)),
    *((small_aim, "pacgan", "gan", dict(dataset=name, pack=1)) for name in ("grid25", "mnist"))])
def test_systems_that_coincide_take_the_same_steps(make, model, plain, changes):
    """Where an IV system's E has weights it trains on beside them, and D and G do not notice."""
    (net, x), (other, _) = (make(name, **changes) for name in (model, plain))
    start = copy.deepcopy(net)
    losses = []
    for seed, m in itertools.product(range(4), (net, other)):
        torch.manual_seed(seed)
        losses.append(m.step(x))
    assert all(a[name] == b[name] for a, b in zip(losses[::2], losses[1::2]) for name in b)
    for name, network in other.named_children():
        assert alike(getattr(net, name), network) and not alike(network, getattr(start, name))
    if "pack" in changes:
        assert_same(net.state_dict(), other.state_dict())
    if "mu_e" in changes:
        assert alike(net.E, start.E) == (changes["mu_e"] == 0) and other.E is None


@pytest.mark.parametrize("dataset", ["grid25", "mnist"])
def test_packs(dataset):
    """As many as items, real or generated alone, of different ones; each item is in m of them."""
    net, x = small_aim("pacgan", dataset, pack=3)
    seen = []
    samples = []
    net.features.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net.G.register_forward_hook(lambda _, z, x_tilde: samples.append(x_tilde))
    net.step(x)
    real, fake = (packs.unflatten(1, (3, -1)) for packs in seen)  # (8, 3, C, ...)
    for i, n in itertools.product(range(8), range(3)):
        assert torch.equal(real[i, n], x[(i + n) % 8])
    assert len(samples) == 3 and torch.equal(fake, torch.stack(samples, 1))
    assert not torch.equal(samples[0], samples[1])


@pytest.mark.parametrize("K", [0, 1, 5])
@pytest.mark.parametrize("make", [small_iv, functools.partial(small_aim, authors=True)])
def test_unrolling_is_k_steps_of_adam_written_out(make, K, monkeypatch):
    """In value, and in gradients, which flow through all K steps and their moments. D stays."""
    monkeypatch.setattr(torch.Tensor, "float", lambda logits: logits)  # so that it stays float64
    net, x = make("unrolled", latent=8, lr_d=1e-2, unroll=K)
    x = x.double()
    monkeypatch.setattr(net.double(), "prior", lambda n: torch.randn(n, 8, dtype=torch.float64))
    for _ in range(3):  # then Adam has moments
        net.step(x)
    D = net.D if make is small_iv else nn.Sequential(net.features, net.critic)
    twin = copy.deepcopy(D)
    losses, calls = asked_of(net, x)
    asked = dict(itertools.chain(*calls))
    near(list(losses.values()), [asked["d"], asked["g"]])
    x_tilde = net.G(net.prior(8))
    for images in (x, x_tilde):  # what D sees in its one step; the steps ahead leave no trace
        twin(images)
    near(twin.state_dict(), D.state_dict(), rtol=0, atol=0)
    own = {name: p for name, p in D.named_parameters() if "block" not in name}  # f takes no part
    weights = list(own.values())

    def judged(weights, images):
        logits = torch.func.functional_call(D, dict(zip(own, weights)), images)
        return (logits[0] if make is small_iv else logits).sigmoid()

    def loss_d(weights):
        loss = -judged(weights, x).log().mean() - (1 - judged(weights, x_tilde)).log().mean()
        return loss / 2 if make is small_iv else loss  # D11 of ivgen.py

    def loss_g(weights):  # in aim.py all of L_d, which G maximises
        return -judged(weights, x_tilde).log().mean() if make is small_iv else -loss_d(weights)

    wanted = {"d": loss_d(weights), "g": loss_g(adam_by_hand(net.optimiser_d, weights, loss_d, K))}
    near(asked, wanted, rtol=1e-9, atol=0)
    close = dict(rtol=1e-6, atol=1e-10) if make is small_iv else dict(rtol=1e-9, atol=1e-9)
    for name in "dg":
        found = gradients_of(net, name, asked[name])
        near(found, gradients_of(net, name, wanted[name]), **close)
    still = gradients_of(net, "g", loss_g(weights))
    moved_by = max((a - b).abs().max().item() for a, b in zip(found, still))
    assert (moved_by < 1e-12) == (K == 0)


@pytest.mark.parametrize("authors", [False, True])
def test_the_unrolled_d_is_where_torchs_adam_would_be(authors):
    """K real steps on one batch, after none and after two; and these leave D itself alone."""
    for steps in (0, 2):
        net, x = small_aim("unrolled", authors=authors, unroll=3, lr=1e-2)
        for _ in range(steps):
            net.step(x)
        unrolled = losses_of_step(net, x)[1]
        fake = net.G(net.prior(8)).detach()
        for _ in range(3):
            loss = aim.gan_loss_of_d(net.judge(x), net.judge(fake))
            net.machine.descend(net.optimiser_d, loss)
        torch.testing.assert_close(-unrolled, aim.gan_loss_of_d(net.judge(x), net.judge(fake)),
                                   rtol=1e-4, atol=1e-5)


def test_adam_steps_over_a_weight_without_a_gradient():
    """Its square root has none at 0: one piece of a maxout layer may never be the largest."""
    g = torch.tensor([0.0, 0.5], requires_grad=True)
    zero = torch.zeros(2)
    new, _ = aim.adam_step([torch.ones(2)], [g], [(zero, zero)], 1, 0.1, (0.5, 0.999))
    gradient, = torch.autograd.grad(new[0].sum(), g)
    assert new[0].tolist() == pytest.approx([1, 0.9]) and gradient.isfinite().all()


@pytest.mark.parametrize("dataset, authors", [("grid25", 0), ("grid25", 1), ("mnist", 0)])
def test_veegans_four_terms(dataset, authors):
    """Whose weights each term moves, and which way: -log D(z, G(z)) and -log(1 - D(F(x) + e, x))
    move D, the logit of (z, G(z)) G, and -log N(z; F(G(z)), I) G and F."""
    net, x = small_aim("veegan", dataset, authors)
    losses, calls = asked_of(net, x)
    z = net.prior(8)
    x_tilde = net.G(z)
    noisy = net.E(x)[0] + torch.randn(8, net.latent)
    reconstruction = torch.distributions.Normal(net.E(x_tilde)[0], 1.0).log_prob(z).sum(1)
    p = net.D(x_tilde, z)
    loss_d = -p.sigmoid().log().mean() - (1 - net.D(x, noisy).sigmoid()).log().mean()
    wanted = {"d": loss_d, "g": p.mean(), "e": -reconstruction.mean()}
    torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=1e-4)
    assert_asked(net, calls, [("d", loss_d), ("g", wanted["g"] + wanted["e"])])


@pytest.mark.parametrize("model", ["ali", "alice", "alice-adv"])
def test_an_implicit_encoder_draws_codes(model):
    """With its own noise, fresh at each call; so reconstructions and neighbours differ too."""
    net, x = small_aim(model, authors=True, width=16, std=0.5)
    mu, sigma = net.posterior(x)
    assert not sigma.any() and not torch.equal(mu, net.posterior(x)[0])
    assert not torch.equal(net.reconstruct(x), net.reconstruct(x))
    assert (net.neighbours(x, 50).std(1) > 0).all()


def test_five_steps_of_g_for_one_of_d():
    net, x = small_aim("alice-adv", authors=True)
    net.step(x)
    steps = {name: {s["step"].item() for s in optimiser.state.values()}
             for name, optimiser in data.optimisers_of(net).items()}
    assert steps == {"optimiser_d": {1}, "optimiser_g": {5}}


# ---- Algorithm 2 ---------------------------------------------------------------------------------


def test_the_log_variance_is_clamped():
    net, x = small_aim()
    for bias, sigma in ((50.0, math.exp(5)), (-50.0, math.exp(-5))):
        nn.init.constant_(net.E.log_var[-1].bias, bias)
        torch.testing.assert_close(net.posterior(x)[1], torch.full((8, 2), sigma))


def test_neighbours_are_drawn_from_the_posterior():
    net, x = small_aim(std=0.3)
    nn.init.constant_(net.E.log_var[-1].bias, -2.0)
    mu, sigma = net.posterior(x)
    net.G = nn.Identity()  # so that the neighbours are the codes themselves
    z = net.neighbours(x, 4000)
    assert ((z.mean(1) - mu).abs() < 5 * sigma / 4000 ** 0.5).all()
    assert ((z.std(1) / sigma - 1).abs() < 0.06).all() and torch.equal(net.reconstruct(x), mu)


# ---- settings and metrics ------------------------------------------------------------------------


def test_sigma_is_the_mean_deviation_of_q(tmp_path):
    net, x = small_aim("aim", latent=2, std=0.3)  # else E begins at sigma = 1 everywhere
    for name in ("samples", "recon", "figures"):
        (tmp_path / name).mkdir()
    x = x.repeat(15, 1)
    result = aim.evaluate(net, lambda model: {}, tmp_path, 3, (x, torch.zeros(120).long()), 1)
    assert result["sigma"] == pytest.approx(net.posterior(x[:100])[1].mean().item())


@pytest.mark.parametrize("flags, values", [
    ("--model pacgan", "1e-4 none .8 100 400"), ("--model ali", "1e-4 none .8 100 200"),
    ("--model unrolled", "1e-3 none .5 512 25000"), ("--model veegan", "1e-3 none .5 500 100000"),
    ("--model alice", "1e-3 none .5 128 1600"), ("--model alice-adv", "1e-3 none .5 128 1600"),
    ("--model veegan --batch 32 --epochs 3 --lr .5", ".5 none .5 32 3"),
    ("--model alice --dataset mnist", "2e-4 sqrt .5 100 400"),
    ("--model veegan --no-authors", "1e-3 none .5 500 100000")])
def test_settings_of_the_authors_are_defaults_of_the_flags(flags, values):
    config = settings_from(aim, *flags.split(), "--authors")
    found = [config.lr, config.decay, config.beta1, config.batch, config.steps or config.epochs]
    lr, decay, *others = values.split()
    assert found == [float(lr), decay, *map(float, others)] and config.authors
    assert config.lr_d == (1e-4 if config.model == "unrolled" else None)


def test_which_systems_have_settings_of_their_authors():
    settings = {("alice", "mnist"): (1, 2), ("alice", "cifar10"): (1e-6, 1),
                ("alice", "celeba"): (1, 1), ("alice-adv", "mnist"): (0.1, 2)}
    for (model, dataset), (lam, k) in settings.items():
        config = aim.preset(model, dataset, True)
        assert (config.lam, config.k) == (lam, k)
    assert not settings_from(aim, "--model", "veegan", "--authors", "--no-authors").authors
    assert settings_from(aim, "--model", "veegan", "--authors", "--no-authors") == settings_from(
        aim, "--model", "veegan")
    for model, dataset in (("ali", "mnist"), ("pacgan", "/a/folder"), ("gan", "grid25")):
        with pytest.raises(data.UserError, match=f"no such settings of {model} on {dataset}"):
            aim.preset(model, dataset, True)


@pytest.mark.parametrize("flags, table, width, latent", [
    ("--dataset mnist", aim.Table3, 64, 32), ("--dataset cifar10", aim.Table4, 128, 64),
    ("--dataset cifar10 --size 28", aim.Table3, 64, 32), ("", aim.Points, 400, 2),
    ("--dataset mnist --size 64 --latent 5", aim.Table4, 128, 5),
    ("--width 80", aim.Points, 80, 2)])
def test_a_size_brings_the_networks_of_its_table(flags, table, width, latent):
    make = aim.networks_of(settings_from(aim, *flags.split()))
    assert (type(make), make.w, make.d) == (table, width, latent)


def test_point_metrics(monkeypatch):
    """The test points as reconstructions and samples are perfect, up to the .989 of a 2-D Gaussian
    that lie within 3 standard deviations."""
    test = data.load("grid25", split="test")
    net, _ = small_aim()
    monkeypatch.setattr(net, "reconstruct", lambda x: x)
    monkeypatch.setattr(net, "decode", lambda z: test.x[:len(z)])
    found = aim.point_metrics(net, test, 2500)
    assert found["modes"] == 25 and abs(found["high_quality"] - (1 - math.exp(-4.5))) < 0.01
    assert found["mse"] == 0 and found["same_mode"] == 1
    assert "2500 samples" in found["protocol"] and "10000 test points" in found["protocol"]
    monkeypatch.setattr(net, "reconstruct", lambda x: x + 2)
    monkeypatch.setattr(net, "decode", lambda z: test.x[:len(z)] + 1)
    found = aim.point_metrics(net, test, 2500)
    assert found["modes"] == found["high_quality"] == 0
    assert abs(found["mse"] - 4) < 1e-5 and found["same_mode"] < 0.1
    net.E = None
    assert set(aim.point_metrics(net, test, 100)) == {"modes", "high_quality", "protocol"}


# ==================================================================================================
# latentmap.py: a generative model without prior distribution matching
# ==================================================================================================

LM_SETS = ("swissroll", "mnist", "celeba")  # three families of networks: points, 32, 64 pixels
LM_NETWORKS = (*LM_SETS, "swissroll3d")  # the fourth
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def lm_small(model="latentmap", dataset="swissroll", map_from=None, authors=False, **changes):
    """A small model in float32 on the CPU, in its first phase, and a batch (12, ...) for it."""
    config = latentmap.preset(model, dataset, authors)
    size = config.size
    small = dict(width=4, latent=5) if size else dict(width=8, latent=2)
    config = dataclasses.replace(config, **small | dict(batch=12, map_width=16) | changes)
    torch.manual_seed(0)
    net = latentmap.CLASSES[model](config)
    if map_from is not None:
        net.map_from = map_from
    shape = (12, net.channels, size, size) if size else (12, net.channels)
    return net, torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def lm_changed(net, before):
    """The children of which some weight or buffer differs from the state dict `before`."""
    after = net.state_dict()
    return {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}


def lm_norms(network):
    return [module for module in network.modules() if isinstance(module, BATCH_NORMS)]


# ---- losses: each step's written out, by nothing of latentmap.py but its networks ----------------


def kl_by_hand(mu, log_var):
    q = torch.distributions.Normal(mu, (log_var / 2).exp())
    return torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1)


def square(a, b):
    return (a - b).square().flatten(1).sum(1)


def bce(logit, target):
    return F.binary_cross_entropy_with_logits(logit, torch.full_like(logit, target))


def on_sphere(z, radius=1.0):
    return radius * z / z.norm(dim=1, keepdim=True)


def drawn_by_hand(mu, log_var):
    return mu + (log_var / 2).exp() * torch.randn_like(mu)


def latentmap_by_hand(net, x):
    """Eqs. (9), (10), (12) and (13). mu weights x_1, the partner in the reversed batch."""
    code = F.batch_norm(net.E(x), None, None, training=True)
    x_hat = net.G(code)

    def interpolated():
        mu = torch.rand(12, 1) / 2
        return mu[:, 0], net.G(mu * code.flip(0) + (1 - mu) * code)

    for _ in range(2):
        mu, x_mu = interpolated()
        a, b, c = (net.d(y) for y in (x, 0.25 * x + 0.75 * x_hat, x_mu))
        critic = (a ** 2 + (b - 0.4) ** 2 + (c - mu - 0.4) ** 2).mean()
        yield "critic", critic
    d_mu, d_hat = (net.d(y) for y in (interpolated()[1], x_hat))
    distance = (x - x_hat).abs() if net.config.recon == "l1" else (x - x_hat).square()
    loss = distance.mean() + (0.7 * d_mu ** 2 + 1.3 * d_hat ** 2).mean()
    yield "eg", loss
    for _ in range(5):
        fake = net.D(net.g(torch.randn(12, 2)))
        real = net.D(code)
        assert 0 < (real > 1).sum() < 12                # both sides of the hinge
        yield "map_d", (F.relu(1 - real) + F.relu(1 + fake)).mean()
    yield "map_g", -net.D(net.g(torch.randn(12, 2))).mean()
    logged = dict(critic=critic, autoencoder=loss, reconstruction=distance.mean())
    yield from ((f"log {name}", value) for name, value in logged.items())


def vae_by_hand(net, x):
    mu, log_var = net.E(x).chunk(2, 1)
    if net.config.authors:
        x_hat = net.G(on_sphere(drawn_by_hand(mu, log_var)))
        yield "eg", (x - x_hat).square().mean() + 3.2e-5 * kl_by_hand(mu, log_var).sum()
    else:
        x_hat = net.G(drawn_by_hand(mu, log_var))
        yield "eg", (1.5 * square(x, x_hat) + kl_by_hand(mu, log_var)).mean()


def wae_by_hand(net, x):
    code = net.E(x)
    penalty = metrics.mmd_imq(code, torch.randn(12, 2))
    yield "eg", 0.05 * square(x, net.G(code)).mean() + 3 * penalty
    yield "log mmd", penalty


def aae_by_hand(net, x):
    code = net.E(x)
    yield "eg", (net.G(code) - x).square().mean()
    yield "d", bce(net.D(torch.randn(12, 2)), 1.0) + bce(net.D(code), 0.0)
    yield "e", 0.6 * bce(net.D(code), 1.0)


def authors_aae_by_hand(net, x):
    code = on_sphere(net.E(x))
    for name in ("e", "g"):
        yield name, (x - net.G(code)).square().mean()
    for _ in range(5):
        real = net.D(on_sphere(torch.randn(12, 5)))
        fake = net.D(code)
        assert 0 < (fake < -1).sum() < 12               # both sides of the hinge
        yield "d", (F.relu(1 - real) + F.relu(1 + fake)).mean()
    yield "e", -fake.mean() / 10


def introvae_by_hand(net, x):
    """E sees what G makes as given: ng() of its Eq. (11)."""
    authors = net.config.authors

    def kl_of(y):
        return kl_by_hand(*net.E(y).chunk(2, 1))

    mu, log_var = net.E(x).chunk(2, 1)
    z = [drawn_by_hand(mu, log_var), torch.randn_like(mu)]
    x_rec, x_gen = (net.G(on_sphere(each) if authors else each) for each in z)
    a = kl_by_hand(mu, log_var)
    b, c = (kl_of(y.detach()) for y in (x_rec, x_gen))
    yield "log kl_gen", c.mean()
    if authors:
        mse = (x - x_rec).square().mean()
        hinges = F.relu(100 - b.mean()) + F.relu(100 - c.mean())
        yield "e", 5 * mse + 1e-3 * (a.mean() + 0.25 * hinges)
        yield "g", 5 * mse + 1e-3 * 0.25 * (kl_of(x_rec) + kl_of(x_gen)).mean()
    else:
        error = square(x, x_rec) / 2
        assert 0 < (b < 0.3).sum() < 12                 # both sides of the hinge
        yield "e", (a + 0.3 * (F.relu(0.3 - b) + F.relu(0.3 - c)) + 3 * error).mean()
        yield "g", (0.3 * (kl_of(x_rec) + kl_of(x_gen)) + 3 * error).mean()


def age_by_hand(net, x):
    """Delta is the KL of the Gaussian that is fitted to codes."""
    d = net.config.latent

    def delta(code):
        fitted = code.mean(0), 2 * code.std(0, unbiased=False).log()
        return kl_by_hand(*(row[None] for row in fitted)).mean() / d

    real = on_sphere(net.E(x), d ** 0.5)
    fake = on_sphere(net.E(net.G(on_sphere(torch.randn(12, d), d ** 0.5)).detach()), d ** 0.5)
    yield "e", delta(real) - delta(fake) + 3 * (x - net.G(real)).abs().mean()
    for _ in range(3):
        z = on_sphere(torch.randn(12, d))
        fake = on_sphere(net.E(net.G(d ** 0.5 * z)), d ** 0.5)
        yield "g", delta(fake) + 7 / d * (1 - (z * on_sphere(fake)).sum(1).mean())
    yield "log kl_gen", delta(fake)


def alae_by_hand(net, x):
    x = x.clone().requires_grad_()
    d = net.config.latent
    real = net.D(net.E(x))
    fake = net.D(net.E(net.G(net.F(torch.randn(12, d)))))
    gradient, = torch.autograd.grad(real.sum(), x, create_graph=True)
    penalty = square(gradient, 0).mean()
    yield "ed", bce(real, 1.0) + bce(fake, 0.0) + 3e4 * penalty
    yield "fg", bce(net.D(net.E(net.G(net.F(torch.randn(12, d))))), 1.0)
    w = net.F(torch.randn(12, d))
    reciprocity = (net.E(net.G(w)) - w.detach()).square().mean()    # only its target is detached
    for name in ("ed", "fg") if net.config.authors else ("eg",):
        yield name, reciprocity
    yield from {"log r1": penalty, "log reciprocity": reciprocity}.items()


AUTHORS = dict(authors=True, dataset="mnist")
JOINT = dict(gamma=0.25, lam=0.4, omega1=0.7, omega2=1.3, joint=True, map_d_steps=5)


@pytest.mark.parametrize(("model", "by_hand", "settings", "constants"), [
    ("latentmap", latentmap_by_hand, JOINT, {}),
    ("latentmap", latentmap_by_hand, JOINT | dict(recon="l1"), {}),
    ("vae", vae_by_hand, {}, dict(beta_points=3.0)), ("vae", vae_by_hand, AUTHORS, {}),
    ("wae", wae_by_hand, {}, dict(lam_points=3.0)),
    ("aae", aae_by_hand, {}, dict(weight_points=0.6)),
    ("aae", authors_aae_by_hand, AUTHORS, {}), ("introvae", introvae_by_hand, AUTHORS, {}),
    ("introvae", introvae_by_hand, {}, dict(alpha=0.3, beta_points=3.0, margin_points=0.3)),
    *(("age", age_by_hand, settings, dict(mu=3.0, lam=7.0)) for settings in ({}, AUTHORS)),
    *(("alae", alae_by_hand, settings, dict(gamma=6e4)) for settings in ({}, AUTHORS))])
def test_what_each_optimiser_is_asked_to_lower(model, by_hand, settings, constants):
    """In turn, in value and in gradient; with weights of terms no two of which agree."""
    net, x = lm_small(model, **settings)
    vars(net).update(constants)
    for p in net.parameters():
        p.data *= 2                                     # at first all outputs are alike
    if hasattr(net, "D"):
        net.D.eval()                                    # so that spectral norms rest
        net.D[-2].weight.data *= 10                     # so that its answers lie about 1 and -1
    log, calls = asked_of(net, x)
    wanted = list(by_hand(net, x))
    for name, loss in wanted:
        if name.startswith("log "):
            torch.testing.assert_close(log[name[4:]], loss.detach(), rtol=1e-4, atol=1e-5)
    wanted = [pair for pair in wanted if "log " not in pair[0]]
    assert_asked(net, calls, wanted)
    optimisers = data.optimisers_of(net)
    assert optimisers.keys() == {f"optimiser_{name}" for name, _ in wanted}
    for name, optimiser in optimisers.items():  # each holds the networks that its name says
        letters = {"critic": "d", "map_d": "D", "map_g": "g"}.get(name[10:], name[10:].upper())
        own = [p for network in letters for p in getattr(net, network).parameters()]
        assert set(map(id, optimiser.param_groups[0]["params"])) == set(map(id, own))


def test_age_s_delta_of_collapsed_codes_is_finite():
    assert latentmap.kl_fit(torch.zeros(4, 2)).isfinite()


# ---- geometry and evaluation ---------------------------------------------------------------------


def test_proposition_2_by_example():
    """q(z|x) = N(x, s^2), x in [0, 1]: the KL grows by log 10 where s is a tenth."""
    x = torch.linspace(0, 1, 11)[:, None].double()
    kl = []
    for s in (1.0, 0.1, 0.01, 0.001):
        kl.append(latentmap.kl_normal(x, torch.full_like(x, 2 * math.log(s))).max().item())
        assert kl[-1] == pytest.approx((1 + s * s - 1) / 2 - math.log(s))  # the supremum is at 1
    assert np.diff(kl) == pytest.approx(math.log(10), rel=0.25) and kl[-1] > 6.9


def test_spearman_on_constructed_cases():
    v = torch.tensor([0.3, -1, 2, 8, 5])
    assert latentmap.spearman(v, v.exp()) == pytest.approx(1)
    assert latentmap.spearman(v, -(v**3)) == pytest.approx(-1)
    other = torch.tensor([1.0, 0, 3, 2, 4])  # ranks 1 0 2 4 3 against 1 0 3 2 4: sum d^2 = 6
    assert latentmap.spearman(v, other) == pytest.approx(1 - 6 * 6 / (5 * 24))
    assert latentmap.average_ranks(torch.tensor([5.0, 1, 5, 0, 5])).tolist() == [3, 1, 3, 0, 3]
    assert latentmap.spearman(v, torch.ones(5)) == 0


def test_trustworthiness_is_the_double_loop():
    x = normal(30, 4)
    code = normal(30, 2, seed=1)

    def order(points, i):  # the others, nearest first
        others = [j for j in range(30) if j != i]
        return sorted(others, key=lambda j: (points[i] - points[j]).norm().item())

    for k in (1, 5, 12):
        penalty = 0
        for i in range(30):
            nearest = order(x, i)
            intruders = [j for j in order(code, i)[:k] if j not in nearest[:k]]
            penalty += sum(nearest.index(j) + 1 - k for j in intruders)
        expected = 1 - 2 * penalty / (30 * k * (60 - 3 * k - 1))
        assert latentmap.trustworthiness(x, code, k) == pytest.approx(expected)
    assert latentmap.trustworthiness(x, 3 * x + 1) == 1
    assert latentmap.trustworthiness(x.view(30, 1, 2, 2), x) == 1
    with pytest.raises(ValueError, match="fewer than half"):
        latentmap.trustworthiness(x, code, 15)


def test_distances_to_the_roll_and_along_it():
    points = torch.tensor([[0.0, 0], [0, 1], [3, 0]])
    manifold = torch.tensor([[0.0, 0], [4, 0]])
    assert latentmap.nearest_distances(points, manifold).tolist() == [0, 1, 1]
    assert latentmap.nearest_distances(manifold, points).tolist() == [0, 1]
    unit = data.ROLL_UNIT["swissroll"]
    roll = data.load("swissroll", split="test").x
    assert latentmap.roll_distances(roll, unit).max() < 2e-3
    expected = latentmap.nearest_distances(points, latentmap.spiral())
    assert torch.equal(latentmap.roll_distances(points, unit), expected)
    curve = latentmap.spiral(20_000)
    along = (curve[1:] - curve[:-1]).norm(dim=1).cumsum(0)  # the polyline's own length
    arc = latentmap.unrolled(curve, unit)
    torch.testing.assert_close((arc[1:] - arc[0]).float()[:, 0], along, rtol=1e-3, atol=1e-4)


def test_the_roll_in_three_dimensions_is_sklearns():
    train, test = data.load_pair("swissroll3d")
    assert train.x.shape == (5000, 3) and train.channels == 3 and train.kind == "points"
    assert torch.equal(train.x, data.load("swissroll3d").x) and not torch.equal(train.x, test.x)
    assert train.x.abs().max() < 1 and train.y.unique().tolist() == list(range(10))
    unit = data.ROLL_UNIT["swissroll3d"]
    x = train.x * unit  # t cos t, 21 v - 10.5, t sin t, and noise .05
    t = x[:, [0, 2]].norm(dim=1)
    assert 1.5 * math.pi - 0.2 < t.min() and t.max() < 4.5 * math.pi + 0.2
    turn = torch.atan2(x[:, 2], x[:, 0]) - t  # a multiple of 2 pi, but for noise
    assert (turn - 2 * math.pi * (turn / (2 * math.pi)).round()).std() < 0.06
    depth = x[:, 1]
    assert abs(depth.mean()) < 0.2 and abs(depth.std() - 21 / 12**0.5) < 0.1
    assert abs(torch.corrcoef(torch.stack([t, depth]))[0, 1]) < 0.03
    label = ((t / (1.5 * math.pi) - 1) / 2 * 10).clamp(0, 9.99).long()
    assert (label == train.y).double().mean() > 0.93  # ten stretches of t
    off = latentmap.roll_distances(train.x, unit) * unit
    assert abs(off.square().mean().sqrt() - 0.05) < 0.003  # across the sheet: one dimension of it

    # Distances by brute force, off the sheet's edges and on a dense sheet; lengths along it.
    sheet = latentmap.sheet(unit, 1500, 300)
    assert latentmap.roll_distances(sheet[::997], unit).max() < 1e-3
    points = torch.tensor([[0.0, 0, 0], [0.5, 1, 0.2], [-0.4, -0.9, 0.1], [2.0, 0.3, 0]])
    expected = latentmap.nearest_distances(points, sheet)
    got = latentmap.roll_distances(points, unit)
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=0)
    flat = latentmap.unrolled(sheet, unit)  # along the curve as in the plane; depth as it is
    expected = torch.cat([latentmap.unrolled(sheet[:, [0, 2]], unit), sheet[:, 1:2]], 1)
    assert torch.equal(flat, expected)
    code = latentmap.unrolled(test.x[:400], unit)
    assert latentmap.geometry(test.x[:400], code, unit)["rank_corr_arc"] > 0.9999


def test_points_of_three_dimensions_are_drawn_obliquely(tmp_path):
    x = data.load("swissroll3d").x
    assert torch.equal(data.oblique(x[:, :2]), x[:, :2])
    moved = x + torch.tensor([0.0, 0.2, 0])
    step = (data.oblique(moved) - data.oblique(x))
    assert (step > 0).all() and step.std(0).max() < 1e-6  # depth goes one way
    flat = x * torch.tensor([1.0, 0, 1])
    torch.testing.assert_close(data.oblique(flat), x[:, [0, 2]])
    assert cli(data, "swissroll3d", "--out", tmp_path / "sheet.png") == 0
    picture = metrics.scatter(x, None, 1, 1.2)
    assert 0.02 < (picture < 1).any(0).double().mean() < 0.2


@pytest.mark.parametrize(("dataset", "off", "gap", "share"), [
    ("swissroll", 0.001, 0.002, 1), ("swissroll3d", 0.004, 0.03, 0.97)])
def test_latentmaps_point_metrics(dataset, off, gap, share, monkeypatch):
    """The roll as its own reconstruction and sample is near perfect; half of it covers half."""
    test = data.load(dataset, split="test")
    net, _ = lm_small("latentmap", dataset)
    monkeypatch.setattr(net, "reconstruct", lambda x: x)
    monkeypatch.setattr(net, "decode", lambda z: test.x[:len(z)])
    m = latentmap.point_metrics(net, test, 5000)
    assert m["gen_gap"] < gap and m["coverage"] == m["rec_coverage"] >= share
    assert m["mse"] == 0 and m["rec_dist"] < off and "5000 samples" in m["protocol"]
    assert m["chamfer"] == pytest.approx(m["gen_dist"] + m["gen_gap"], rel=1e-5)
    inner = test.x[test.y < 5]
    monkeypatch.setattr(net, "reconstruct", lambda x: x + 2)
    monkeypatch.setattr(net, "decode", lambda z: inner[torch.arange(len(z)) % len(inner)])
    m = latentmap.point_metrics(net, test, 5000)
    assert m["gen_dist"] < off < 0.1 < m["gen_gap"] and 0.49 < m["coverage"] < 0.56
    assert m["mse"] == pytest.approx(4, abs=1e-4) and m["rec_dist"] > 1 and m["rec_coverage"] < 0.1


@pytest.mark.parametrize("model", ["latentmap", "vae"])
def test_code_metrics_compare_generated_codes_with_the_datas(model, monkeypatch):
    net, _ = lm_small(model)
    x = normal(600, 2).float()
    monkeypatch.setattr(net, "encode", lambda x: x)
    monkeypatch.setattr(net, "prior", lambda n, seed: x[:n])
    shift = 0
    if model == "vae":  # whose latent_fd is of draws, which is what its G was trained on
        shift = 3
        monkeypatch.setattr(net, "latents", lambda x: x.flip(0) + shift)  # item by item others
    monkeypatch.setattr(net, "generated_codes", lambda z: z + shift)
    result, protocol = latentmap.code_metrics(net, x, 50)
    assert (result["latent_fd"], result["rank_corr"]) == pytest.approx((0, 1), abs=1e-6)
    assert result["trust"] == 1 and "rank_corr_arc" in result
    assert "600 codes" in protocol and "50 items" in protocol
    monkeypatch.setattr(net, "generated_codes", lambda z: z + shift + 3)
    result = latentmap.code_metrics(net, x, 50)[0]
    assert result["latent_fd"] == pytest.approx(18, rel=1e-4)  # 3^2 in both coordinates
    assert set(latentmap.code_metrics(net, x[:20], 50)[0]) == {"latent_fd"}


def test_codes_are_shown_on_their_principal_axes(monkeypatch):
    panels = {}
    monkeypatch.setattr(metrics, "save_panels", lambda path, shown: panels.update(shown))
    plane = normal(400, 2) * torch.tensor([3.0, 1.0])
    rotation = torch.linalg.qr(normal(6, 6, seed=1)).Q
    code = torch.cat([plane, torch.zeros(400, 4)], 1) @ rotation
    for nothing in (code[:, :1], code * math.nan):
        latentmap.draw_codes("", nothing, nothing, code, None, 0)
    assert panels == {}
    latentmap.draw_codes("", code, code, code, torch.zeros(400, dtype=torch.long), 1)
    assert list(panels) == ["codes of the data", "codes made from the prior"]
    ink = (panels["codes of the data"] < 1).any(0).nonzero().float()
    assert ink[:, 1].std() > 2.5 * ink[:, 0].std()  # the first component lies across
    latentmap.draw_codes("", plane, plane, plane, None, 1)
    assert "prior" in panels


@pytest.mark.parametrize("dataset", LM_NETWORKS)
def test_an_evaluation_of_the_first_phase_scores_no_samples(dataset, tmp_path):
    """g is untrained there. (What pictures there are is a test of runs, below.)"""
    net, x = lm_small("latentmap", dataset, map_from=0)
    test = (torch.cat([x, -x, x]), None if net.config.size else torch.arange(36) % 4)
    for name in ("samples", "recon", "figures"):
        (tmp_path / name).mkdir()
    seen = []

    def evaluator(*functions):
        seen.append(functions)
        return {"mse": 0.1, "chamfer": 0.2, "protocol": "of a test"}

    result = latentmap.evaluate(net, evaluator, tmp_path, 7, test, 4)
    assert "phase" not in result and "of a test; latent_fd: 36 codes" in result["protocol"]
    net.map_from = 7  # the last step of the first phase
    result = latentmap.evaluate(net, evaluator, tmp_path, 7, test, 4)
    assert result["phase"] == "autoencoder" and latentmap.score_of(result) is None
    assert result["mse"] == 0.1 and not {"chamfer", "latent_fd"} & result.keys()
    if net.config.size:
        assert seen == [(net.sample, net.reconstruct), (None, net.reconstruct)]
        with Image.open(tmp_path / "figures/interpolations-000007.png") as picture:
            assert picture.size == (10 * (net.config.size + 1) + 1,) * 2
    else:
        assert seen == [(net,), (net,)]


# ---- settings ------------------------------------------------------------------------------------


def test_authors_settings_are_defaults_that_flags_override():
    """--authors, like --model, chooses the defaults (D8); what is given by hand stays."""
    for model, lr, beta1, beta2, batch, prior in (
            ("vae", 5e-4, 0.5, 0.999, 64, "sphere"), ("aae", 2e-4, 0.5, 0.999, 64, "sphere"),
            ("introvae", 2e-4, 0.5, 0.999, 64, "sphere"), ("age", 2e-4, 0.5, 0.999, 64, "sphere"),
            ("alae", 2e-4, 0.0, 0.99, 32, "gauss")):
        c = settings_from(latentmap, "--model", model, "--dataset", "celeba", "--authors")
        assert c == latentmap.preset(model, "celeba", authors=True) and c.authors
        assert (c.lr, c.beta1, c.beta2, c.batch, c.prior) == (lr, beta1, beta2, batch, prior)
        ours = latentmap.preset(model, "celeba")
        assert (ours.lr, ours.beta1, ours.beta2, ours.batch) == (2e-4, 0.0, 0.999, 32)
        points = latentmap.preset(model, "swissroll3d", authors=True)
        assert points.prior == ("sphere" if model == "age" else "gauss")  # D4
    given = "--model vae --dataset celeba --authors --lr 1e-3 --batch 7"
    c = settings_from(latentmap, *given.split())
    assert (c.lr, c.batch, c.beta1, c.authors) == (1e-3, 7, 0.5, True)
    for model in ("latentmap", "latentmap-nobn", "wae"):
        with pytest.raises(data.UserError, match="unrecognized arguments: --authors"):
            settings_from(latentmap, "--model", model, "--authors")


@pytest.mark.parametrize(("model", "name", "points", "digits", "pictures"), [
    ("vae", "beta", 1000, 2, 2), ("introvae", "beta", 1000, 2, 2),
    ("introvae", "alpha", 0.25, 0.25, 0.25),
    ("introvae", "margin", 5, 25, 25), ("wae", "lam", 0.5, 10, 100), ("age", "mu", 5, 5, 5),
    ("age", "lam", 500, 500, 500), ("age", "steps_of_g", 3, 3, 3), ("alae", "gamma", 10, 10, 10)])
def test_constants_of_the_baselines(model, name, points, digits, pictures):
    got = [lm_small(model, dataset)[0].constant(name) for dataset in LM_SETS]
    assert got == [points, digits, pictures]
    assert lm_small("age", "cifar10")[0].constant("steps_of_g") == 2  # its authors'


def test_the_first_phase_has_its_share_of_the_steps():
    points, pictures = (latentmap.preset("latentmap", name) for name in ("swissroll", "celeba"))
    pictures = dataclasses.replace(pictures, width=1, latent=2, map_width=4)
    for steps, last in ((80, 48), (1, 1), (2, 1)):
        assert latentmap.build(points, steps=steps).map_from == last
    assert latentmap.build(pictures, steps=80).map_from == 64
    assert latentmap.build(points).map_from > 10**9  # told no length
    assert latentmap.build(dataclasses.replace(points, joint=True), steps=80).map_from == 0
    assert latentmap.build(latentmap.preset("vae"), steps=80).map_from == 0


def test_tables_name_systems_and_numbers_that_there_are():
    tables = latentmap.TABLES
    assert list(tables) == ["1", "2", "fig4", "fig4-3d", "fig6"]
    for table in tables.values():
        for name, (flags, *published) in table["rows"].items():
            assert name.endswith("(--authors)") == flags.endswith("--authors")
            assert not name.endswith("(--authors)") or published == [None] * len(published)
    assert [column[1:] for column in tables["2"]["columns"]] == [
        ("cifar10", "fid"), ("cifar10", "mse_pm1"), ("celeba", "fid"), ("celeba", "mse_pm1")]
    assert tables["1"]["rows"]["AGE"] == ("--model age", 116, 0.0889)
    assert tables["1"]["rows"]["LatentMap"] == ("--model latentmap", 62, 0.0165)
    assert tables["2"]["rows"]["LatentMap"] == ("--model latentmap", None, None, 63, 0.0165)
    assert tables["2"]["rows"]["VAE"] == ("--model vae", 189, 0.0626, 80, 0.0383)
    assert tables["fig4"]["rows"] == tables["fig4-3d"]["rows"]
    assert {"ALAE", "ALAE (--authors)"} < set(tables["fig4"]["rows"])


# ---- networks ------------------------------------------------------------------------------------


def test_64_pixel_networks_are_mimicrys():
    g = latentmap.decoder_64(128, 3, 64)
    assert g[0].weight.shape == (4 * 4 * 1024, 128) and g[1].unflattened_size == (1024, 4, 4)
    shapes = [block.conv1.weight.shape[:2] for block in g if isinstance(block, latentmap.Up)]
    assert shapes == [(512, 1024), (256, 512), (128, 256), (64, 128)]
    bound = math.sqrt(2) * math.sqrt(6 / (512 * 9 + 1024 * 9))  # xavier, gain sqrt(2), 1024 -> 512
    assert 0.99 * bound < g[2].conv1.weight.abs().max() <= bound
    d = latentmap.encoder_64(3, 128, 64, spectral=True)
    shapes = [block.shortcut[1].weight.shape[:2] for block in d[:-2]]
    assert shapes == [(64, 3), (128, 64), (256, 128), (512, 256), (1024, 512)]
    assert isinstance(d[0].residual[0], nn.Conv2d)  # the first has no ReLU before
    assert isinstance(d[1].residual[1], nn.ReLU) and d[-1].weight.shape == (128, 1024)
    h = normal(6, 4).view(2, 3, 2, 2)
    torch.testing.assert_close(d[-2](h), h.clamp_min(0).sum((2, 3)))
    mean = latentmap.encoder_64(3, 7, 2, spectral=False)[-2]  # E takes the mean
    torch.testing.assert_close(mean(h), h.clamp_min(0).mean((2, 3)))


@pytest.mark.parametrize(("size", "hidden"), [
    (64, [(8, 32), (16, 16), (32, 8), (64, 4), (128, 2)]), (32, [(8, 16), (16, 8), (32, 4)])])
def test_where_the_encoders_halve_the_image(size, hidden):
    x = torch.randn(2, 3, size, size)
    shapes = []
    for layer in latentmap.ENCODERS[size](3, 7, 8, spectral=False):
        x = layer(x)
        if isinstance(layer, (latentmap.Down, nn.LeakyReLU)):
            shapes.append((x.shape[1], x.shape[2]))
    assert shapes == hidden and x.shape == (2, 7)


def test_up_enlarges_after_its_shortcut_as_if_before():
    block = latentmap.Up(6, 4).eval()
    x = normal(12, 25).float().view(2, 6, 5, 5)

    def up(h):
        return F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=False)

    h = block.conv1(up(F.relu(block.first(x))))
    expected = block.conv2(F.relu(block.second(h))) + block.shortcut(up(x))
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dataset", LM_SETS)
def test_d_has_spectral_norm_and_e_has_bn(dataset):
    net, x = lm_small("latentmap", dataset)
    is_normed = nn.utils.parametrize.is_parametrized
    for network in (net.d, net.D) if dataset != "swissroll" else (net.D,):
        layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        assert [is_normed(m) for m in layers] == [True] * (len(layers) - 1) + [False]
        assert not lm_norms(network)
    for _ in range(30):
        net.D(torch.randn(2, net.config.latent))
    assert torch.linalg.matrix_norm(net.D[0].weight, 2).item() == pytest.approx(1, abs=0.02)
    assert not any(is_normed(m) for m in [*net.E.modules(), *net.G.modules()])
    assert bool(lm_norms(net.E)) == (dataset != "swissroll")
    net.d.eval()
    outputs = latentmap.Network.forward(net.d, x)
    assert outputs.shape == (12, net.config.latent)  # d is shaped as an encoder
    torch.testing.assert_close(net.d(x), outputs.mean(1))


def test_g_has_four_layers_and_a_last_bn():
    net, _ = lm_small()
    assert sum(isinstance(m, nn.Linear) for m in net.g) == len(lm_norms(net.g)) == 4
    roll = latentmap.CLASSES["vae"](latentmap.preset("vae", "swissroll3d"))  # author code's MLPs
    names = [[type(m).__name__ for m in network] for network in (roll.E, roll.G)]
    assert names[0] == ["Linear", "BatchNorm1d", "LeakyReLU", "Linear"]
    assert names[1] == [*names[0], "Tanh"] and roll.E[2].negative_slope == 0  # a ReLU
    assert [m.weight.shape for m in (roll.E[0], roll.E[3])] == [(400, 3), (4, 400)]
    assert isinstance(net.g[-1], nn.BatchNorm1d) and net.g[-1].weight is None
    assert net.normalise.weight is None  # D3
    bare, _ = lm_small("latentmap-nobn")
    assert isinstance(bare.g[-1], nn.Linear) and isinstance(bare.normalise, nn.Identity)


def test_priors():
    net, _ = lm_small(prior="sphere", latent=6)
    torch.manual_seed(0)
    z = net.prior(4000)
    torch.testing.assert_close(z.norm(dim=1), torch.full((4000,), 6**0.5))
    assert z.mean(0).abs().max() < 0.06 and (z.var(0) - 1).abs().max() < 0.06
    torch.testing.assert_close(net.prior(5, seed=2).norm(dim=1), torch.full((5,), 6**0.5))
    net, _ = lm_small(latent=6)
    z = net.prior(4000)
    assert z.norm(dim=1).std() > 0.3 and (z.var(0) - 1).abs().max() < 0.1
    rng = torch.get_rng_state()
    assert torch.equal(net.prior(5, seed=3), net.prior(5, seed=3))
    assert torch.equal(rng, torch.get_rng_state())
    for model, authors, dataset, radius in (
            ("age", False, "swissroll", 2**0.5), ("age", True, "mnist", 5**0.5),
            ("vae", True, "mnist", 1), ("introvae", True, "mnist", 1), ("aae", True, "mnist", 1)):
        net, x = lm_small(model, dataset, authors=authors)
        for z in (net.encode(x), net.latents(x), net.prior(12), net.prior(12, seed=0)):
            torch.testing.assert_close(z.norm(dim=1), torch.full((12,), float(radius)))
    net, x = lm_small("aae", "mnist", prior="sphere")  # ours: the prior alone
    assert net.encode(x).norm(dim=1).std() > 1e-3


# ---- who moves, and where ------------------------------------------------------------------------

def test_authors_alae_shows_running_means():
    net, x = lm_small("alae", "mnist", authors=True, lr=0.1)  # steps that a small share shows
    a, b = (normal(12, 5, seed).float() for seed in (1, 2))
    torch.testing.assert_close(net.D(a + b), net.D(a) + net.D(b) - net.D(0 * a))  # linear
    assert sum(isinstance(m, nn.Linear) for m in net.D) == 3

    start = copy.deepcopy(net.shown.state_dict())
    assert not any(p.requires_grad for p in net.shown.parameters())
    net.step(x)
    share = 1 - 0.5 ** (12 / 10_000)
    now = {f"{name}.{key}": value for name in "EFG"
           for key, value in getattr(net, name).state_dict().items()}
    for key, value in net.shown.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, start[key] + share * (now[key] - start[key]))
    shown = net.encode(x)
    for p in [*net.E.parameters(), *net.F.parameters(), *net.G.parameters()]:
        p.data.zero_()
    assert net.encode(x).equal(shown) and net.sample(3).std() > 0
    ours, x = lm_small("alae", "mnist")
    before = ours.encode(x)
    ours.step(x)
    assert not ours.encode(x).equal(before) and "shown.E.0.weight" not in ours.state_dict()


# ---- phases, ablations, running statistics -------------------------------------------------------


@pytest.mark.parametrize("dataset", LM_SETS)
def test_the_two_phases_leave_each_others_networks_bit_for_bit(dataset):
    net, x = lm_small("latentmap", dataset, map_from=2)
    before = copy.deepcopy(net.state_dict())
    for _ in range(2):
        assert set(net.step(x)) == {"critic", "autoencoder", "reconstruction"}
    assert lm_changed(net, before) == {"E", "G", "normalise", "d"}
    before = copy.deepcopy(net.state_dict())
    for _ in range(3):
        with mock.patch.object(net, "train_map", wraps=net.train_map) as train_map:
            assert set(net.step(x)) == {"map_d", "map_g"}
        torch.testing.assert_close(train_map.call_args.args[0], net.encode(x))  # Eq. (12)
    assert lm_changed(net, before) == {"D", "g"}


def test_ablations_are_latentmap_with_terms_off():
    for model in ("latentmap-nobn", "latentmap-noreg"):
        net, x = lm_small(model)
        assert not hasattr(net, "d") and set(net.step(x)) == {"autoencoder", "reconstruction"}
    # With weights so small that they round away, the regularised model takes the other's step.
    a, x = lm_small("latentmap-noreg")
    b, _ = lm_small("latentmap", omega1=1e-30, omega2=0.0)
    b.E.load_state_dict(a.E.state_dict())
    b.G.load_state_dict(a.G.state_dict())
    a.step(x)
    b.step(x)
    for network, other in ((a.E, b.E), (a.G, b.G)):
        for p, q in zip(network.parameters(), other.parameters()):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-7)


@pytest.mark.parametrize("model", ["latentmap", "introvae", "age", "alae"])
def test_running_statistics_follow_data_and_their_codes_only(model):
    """D9, with nothing learnt (lr 0): E's are those of data; G's those of codes, draws, or both."""
    net, x = lm_small(model, "mnist", lr=0.0)
    twin = copy.deepcopy(net)
    torch.manual_seed(7)
    net.step(x)
    torch.manual_seed(7)
    if model == "introvae":
        mu, log_var = twin.posterior(x)
        twin.G(twin.draw(mu, log_var))
        twin.G(twin.prior(12))
    elif model == "latentmap":
        twin.G(twin.code(x))
    elif model == "age":
        twin.code(x)
        twin.prior(12)  # what E is shown
        for _ in range(twin.constant("steps_of_g")):
            twin.G(twin.prior(12))
    else:
        twin.code(x)
    for network, other in ((net.E, twin.E), (net.G, twin.G))[:1 if model == "alae" else 2]:
        assert lm_norms(network)
        for a, b in zip(lm_norms(network), lm_norms(other)):
            torch.testing.assert_close(a.running_mean, b.running_mean, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(a.running_var, b.running_var, rtol=1e-4, atol=1e-5)
            assert a.momentum == 0.1


def test_a_vaes_latents_are_draws():
    """latent_fd compares what G was trained on; the means alone lack the posterior's variance."""
    net, x = lm_small("vae", "mnist")
    with net.machine.inference(net):
        mu, log_var = net.posterior(x)
    torch.testing.assert_close(net.encode(x), mu)
    draws = torch.stack([net.latents(x) for _ in range(1000)])
    assert (draws.mean(0) - mu).abs().max() < 0.15 * (log_var / 2).exp().max()
    torch.testing.assert_close(draws.var(0), log_var.exp(), rtol=0.3, atol=0)


@pytest.mark.parametrize("model", ["vae", "introvae"])
def test_reconstructions_on_the_sphere_are_of_codes_of_training(model):
    """A weak signal put on the sphere alone would become as long as signal and noise together."""
    net, x = lm_small(model, "mnist", authors=True)
    with net.machine.inference(net):
        mu, log_var = net.posterior(x)
    signal = F.normalize(mu, dim=1)
    assert (mu.norm(dim=1) < log_var.exp().sum(1).sqrt()).all()  # weak, at the beginning
    along = torch.stack([(net.latents(x) * signal).sum(1) for _ in range(300)])
    total = (mu.square().sum(1) + log_var.exp().sum(1)).sqrt()
    torch.testing.assert_close(along.mean(0), mu.norm(dim=1) / total, rtol=0.3, atol=0.1)
    torch.testing.assert_close(net.encode(x), signal)
    torch.manual_seed(0)
    x_hat = net.reconstruct(x)
    torch.manual_seed(0)
    torch.testing.assert_close(x_hat, net.decode(net.latents(x)))


# ==================================================================================================
# Runs: what holds for every paper file
# ==================================================================================================

ROLL = "swissroll"
RUNS = {  # name: (file, data set, or None for the folder of pictures, flags)
    "ivlsgan": (ivgen, None, ()),
    "wgan": (ivgen, None, ("--model", "wgan")),  # RMSprop; G moves at each fifth step
    "ivaae-rad": (ivgen, None, ("--model", "ivaae-rad", "--size", 64, "--width", 2)),
    "aim": (aim, "grid25", ()),
    "aim-images": (aim, None, ("--latent", 2)),
    "alice-adv": (aim, ROLL, ("--model", "alice-adv", "--batch", 1250)),  # four steps an epoch
    "latentmap": (latentmap, ROLL, ()),
    "latentmap-images": (latentmap, None, ("--width", 2)),
    "introvae": (latentmap, ROLL, ("--model", "introvae")),
    "alae": (latentmap, ROLL, ("--model", "alae")),
}
STEPS = 8
EVALUATIONS = [3, 6, 8]
for_each_file = pytest.mark.parametrize("name", ["ivlsgan", "aim", "latentmap"])


@pytest.fixture(scope="session")
def flags_of(pictures, tmp_path_factory):
    """flags_of(name, *more): the command line of a run of RUNS, without its length."""
    root = tmp_path_factory.mktemp("root")

    def flags(name, *more):
        module, dataset, own = RUNS[name]
        return quick(module, dataset or pictures, root, *own, *more)

    return flags


@pytest.fixture(autouse=True)
def fewer_points(request, monkeypatch):
    """Of runs that are compared with runs, what LatentMap measures on a roll need not be exact."""
    if "flags_of" in request.fixturenames:
        coarse = functools.partial(latentmap.spiral, 100)
        monkeypatch.setattr(latentmap, "spiral", coarse)
        few = functools.partial(latentmap.code_metrics, few=50)
        monkeypatch.setattr(latentmap, "code_metrics", few)


@pytest.fixture(scope="session")
def finished(flags_of, tmp_path_factory):
    """finished(name): the folder of a run; finished(name, n): what a kill at step n leaves."""
    folder = tmp_path_factory.mktemp("runs")
    add = data.Run.add

    def keep(self, step, losses):
        add(self, step, losses)
        shutil.copytree(self.folder, f"{self.folder}-{step}")

    @functools.cache
    def whole(name):
        flags = flags_of(name, "--steps", STEPS, "--eval-every", 3, "--out", folder / name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data.Run, "add", keep)
            assert cli(RUNS[name][0], *flags) == 0
        return folder / name

    def find(name, step=None):
        return whole(name) if step is None else Path(f"{whole(name)}-{step}")

    return find


@pytest.fixture
def copied(finished, tmp_path):
    """The same folders, as copies that may be changed."""
    def copy_of(name, step=None):
        return Path(shutil.copytree(finished(name, step), tmp_path / f"{name}-{step}"))

    return copy_of


def resume(name, run, *more):
    return cli(RUNS[name][0], "--resume", run, "--device", "cpu", *more)


@pytest.fixture
def fails(capsys):
    """fails(sentence, module, *args): the command ends with code 2 and this one line on stderr."""
    def check(sentence, module, *args):
        capsys.readouterr()
        code = cli(module, "--device", "cpu", *args)
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if "no labels" not in line]
        assert code == 2 and len(lines) == 1 and sentence in lines[0], said
        assert "was run" not in said.out  # what the pickle below would print

    return check


def assert_same(a, b, where="checkpoint"):
    """Two checkpoints hold the same, bit for bit."""
    if torch.is_tensor(a):
        assert torch.equal(a, b), where
    elif isinstance(a, (dict, list, tuple)):
        assert len(a) == len(b), where
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_same(a[key], b[key], f"{where}, {key}")
    else:
        assert a == b, where


def timeless(run):
    """The log without what the clock decides."""
    clock = ("img_per_s", "eval_s")
    return [{k: v for k, v in line.items() if k not in clock} for line in log_of(run)]


LEFT = {  # losses; metrics; pictures of each evaluation, and of the whole run
    "ivlsgan": ("d_adv f_ce g_adv rec iv", "mse", "samples recon figures/interventions", "real"),
    "ivaae-rad": ("rec d_iv e_adv", "mse fld",
                  "samples recon figures/interpolations figures/covariance", "fld"),
    "aim": ("d g e", "modes high_quality mse sigma same_mode", "samples recon figures/panels",
            "mse high_quality"),
    "aim-images": ("d g e", "mse sigma", "samples recon figures/neighbours figures/traversals "
                   "figures/manifold", "mse real"),
    "latentmap": ("critic autoencoder reconstruction map_d map_g", "chamfer gen_dist gen_gap "
                  "coverage rec_dist rec_coverage mse latent_fd rank_corr rank_corr_arc trust",
                  "samples recon figures/panels figures/codes", "mse chamfer"),
    "latentmap-images": ("critic autoencoder reconstruction map_d map_g", "mse latent_fd rank_corr "
                         "trust", "samples recon figures/interpolations figures/codes", "mse real"),
}


@pytest.mark.parametrize("name", LEFT)
def test_a_run_leaves_what_it_promises(name, finished):
    losses, measured, each, once = (words.split() for words in LEFT[name])
    module, dataset, _ = RUNS[name]
    run = finished(name)
    state = saved(run)
    config = json.loads((run / "config.json").read_text())
    assert state["settings"].keys() <= config.keys() and config["precision"] == "off"
    assert {"command", "device", "torch", "revision", "threads"} <= config.keys()
    assert (state["step"], state["file"]) == (STEPS, module.FILE)
    assert state["channels"] == (2 if dataset else 3)
    trained = [line for line in log_of(run) if "img_per_s" in line]
    evaluated = [line for line in log_of(run) if "protocol" in line]
    assert [line["step"] for line in trained] == [line["step"] for line in evaluated] == EVALUATIONS
    assert {"epoch", *losses} <= set().union(*trained)  # No step's losses are missing.
    assert {"epoch", *measured} <= evaluated[-1].keys() and "mse" in evaluated[-1]["protocol"]
    assert not any("fid" in line for line in log_of(run))  # There are no Inception weights here.
    files = [f"figures/{picture}.png" for picture in once]
    for step in EVALUATIONS:
        mark = {True: f"-{step:06d}.png", False: f"/{step:06d}.png"}
        files += [picture + mark["/" in picture] for picture in each]
    for file in [*files, "last.pt", "best.pt"]:
        assert (run / file).stat().st_size > 0, file
    assert not list(run.glob("*.tmp*"))
    # The best is the least score, and the later of equals; LatentMap's first phase has none.
    best = saved(run, "best.pt")
    scores = [(module.score_of(line), -line["step"]) for line in evaluated if "phase" not in line]
    assert (best["best"], -best["step"]) == min(scores)


def test_best_is_chosen_by_the_first_of_fid_fcd_kl_and_mse():
    """Of AIM's points by modes, then by quality."""
    for module in PAPERS:
        found = {"mse": 1.0, "kl": 2.0, "fcd": 3.0, "fid": 4.0}
        for name in ("fid", "fcd", "kl", "mse"):
            assert module.score_of(found) == found.pop(name)
    found = [dict(modes=n, high_quality=share) for n, share in ((25, 0.8), (25, 0.7), (24, 0.9))]
    assert found == sorted(found, key=aim.score_of)
    assert latentmap.score_of({"chamfer": 0.2, "mse": 0.1}) == 0.2


@for_each_file
def test_a_new_run_takes_the_first_free_name(name, flags_of, tmp_path, monkeypatch, capsys):
    module, dataset, _ = RUNS[name]
    monkeypatch.chdir(tmp_path)

    def train(config, machine, folder, checkpoint):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("")

    monkeypatch.setattr(module, "train", train)
    usual = f"runs/{module.FILE}-{name}-{dataset or 'blobs'}-s5"
    for taken in ("mine/log.jsonl", "a/m.pt"):  # Of whatever has been there nothing is lost.
        Path(taken).parent.mkdir()
        Path(taken).write_text("x")
    assert cli(module, *flags_of(name, "--out", "a")) == 0
    assert capsys.readouterr().out == "run: a-2\n"
    shutil.rmtree("mine")
    monkeypatch.chdir(tmp_path / "a")
    for out, folder in ((".", "a-3"), ("..", f"{tmp_path.name}-2")):
        (tmp_path / "config.json").write_text("")
        assert cli(module, *flags_of(name, "--out", out)) == 0
        assert capsys.readouterr().out.endswith(f"/{folder}\n")
    monkeypatch.chdir(tmp_path)
    for folder, out in (("mine", ("--out", "mine")), (usual, ())):
        for number in ("", "-2", "-3"):
            assert cli(module, *flags_of(name, "--seed", 5, *out)) == 0
            assert capsys.readouterr().out == f"run: {folder}{number}\n"


# ---- killed, stopped and resumed -----------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in RUNS if not name.endswith("images")])
def test_a_killed_run_resumes_bit_for_bit(name, copied, finished, monkeypatch):
    """What SIGKILL leaves at some step, in another place, with a damaged log, ends as if unstopped.

    The saves before are of steps 3 and 6, in the two phases of LatentMap.
    """
    for step in (5, 7) if name in ("ivlsgan", "aim", "latentmap") else (5,):
        killed = copied(name, step)
        assert saved(killed)["step"] == step // 3 * 3
        with open(killed / "log.jsonl", "ab") as log:
            log.write(b'[1]\n{"a": 1}\n{"step": "x"}\n\xff\xfe\n{"step": 1')
        (killed / "last.pt.1.tmp").write_text("half a checkpoint")
        monkeypatch.chdir(killed)
        assert resume(name, ".") == 0
        for file in finished(name).glob("*.pt"):
            assert_same(saved(finished(name), file.name), saved(killed, file.name))
        assert timeless(killed) == timeless(finished(name)) and not list(killed.glob("*.tmp"))


@for_each_file
def test_ctrl_c_and_sigterm_save_and_leave(name, flags_of, finished, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    stops = {2: signal.SIGINT, 7: signal.SIGTERM}
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    add = data.Run.add

    def stop(self, step, losses):
        add(self, step, losses)
        if step in stops:
            os.kill(os.getpid(), stops.pop(step))

    monkeypatch.setattr(data.Run, "add", stop)
    flags = flags_of(name, "--steps", STEPS, "--eval-every", 3, "--out", run)
    for step, code in ((2, 130), (7, 143), (STEPS, 0)):
        assert cli(RUNS[name][0], *flags) == code and saved(run)["step"] == step
        end = f"stopped at step {step} and saved; continue with --resume {run}\n"
        assert capsys.readouterr().err.endswith(end) or code == 0
        assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        flags = ["--resume", run, "--device", "cpu"]
    assert_same(saved(run), saved(finished(name)))
    assert timeless(run) == timeless(finished(name))


@for_each_file
def test_a_signal_is_heard_before_the_loop_and_in_the_last_evaluation(name, flags_of, tmp_path,
                                                                      monkeypatch, capsys):
    module = RUNS[name][0]
    for function, code in (("build", 143), ("evaluate", 130)):
        original = getattr(module, function)

        def stopped(*args):
            os.kill(os.getpid(), {143: signal.SIGTERM, 130: signal.SIGINT}[code])
            return original(*args)

        run = tmp_path / function
        with monkeypatch.context() as patch:
            patch.setattr(module, function, stopped)
            assert cli(module, *flags_of(name, "--steps", 2, "--out", run)) == code
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.endswith("interrupted" if code == 143 else f"continue with --resume {run}")
    assert saved(run)["step"] == 2 and "mse" in log_of(run)[-1]


def test_ctrl_c_while_torch_is_imported(tmp_path):
    (tmp_path / "torch.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(60)\n")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    for name in PRODUCT:
        process = subprocess.Popen([sys.executable, HERE / f"{name}.py"], env=env, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[1] == "" and process.returncode == 130


def test_a_folder_has_one_writer(copied, fails):
    """Another process holds the run. When it is gone, the run goes on."""
    run = copied("aim")
    script = ("import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
              "print('held', flush=True); input()")
    holder = subprocess.Popen([sys.executable, "-c", script, run / ".lock"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    before = {path: path.read_bytes() for path in run.glob("*.*")}
    fails(f"another run writes to {run}", aim, "--resume", run, "--steps", 9)
    assert before == {path: path.read_bytes() for path in run.glob("*.*")}
    holder.communicate(b"\n")
    assert resume("aim", run, "--steps", 9) == 0


def test_a_run_is_not_among_its_own_pictures(pictures, flags_of, fails, monkeypatch):
    monkeypatch.chdir(pictures)
    for more in (("--out", pictures / "run"), ("--dataset", ".")):
        fails("is inside its data set", ivgen, *flags_of("ivlsgan", "--steps", 1), *more)
    assert not (pictures / "run").exists() and not (pictures / "runs").exists()


@pytest.mark.parametrize("error, code", [
    (BrokenPipeError(32, "Broken pipe"), 0), (OSError(28, "No space left on device"), 2)])
def test_nobody_has_to_read_what_a_run_prints(error, code, flags_of, tmp_path, monkeypatch):
    """`| head -1`, a full disk, a closed stderr: the run goes on; of a full disk the code tells."""
    run = tmp_path / "run"
    fails = {"write.side_effect": error, "fileno.side_effect": io.UnsupportedOperation}
    monkeypatch.setattr(sys, "stdout", mock.Mock(**fails))
    monkeypatch.setattr(sys, "stderr", None)
    assert cli(aim, *flags_of("aim", "--steps", 2, "--out", run)) == code
    assert saved(run)["step"] == 2 and sys.stderr is None


def test_a_closed_pipe_leaves_no_message(tmp_path):
    """The buffer that Python flushes at its end included."""
    script = "import sys, data; sys.exit(data.run_command(lambda argv: print('x' * 100_000)))"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=HERE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 0


@for_each_file
def test_a_notebook_s_thread_trains_and_keeps_its_random_numbers(name, flags_of, tmp_path):
    module = RUNS[name][0]
    flags = [str(flag) for flag in flags_of(name, "--steps", 2, "--out", tmp_path / "run")]
    codes = []
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    thread = threading.Thread(target=lambda: codes.append(module.main(flags)))
    thread.start()
    thread.join()
    assert codes == [0] and torch.equal(torch.rand(3), expected)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["command"] == " ".join([f"{module.FILE}.py", *flags])


def test_tensorboard_gets_scalars_and_pictures_or_one_sentence(flags_of, tmp_path, fails,
                                                               monkeypatch):
    stub = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    run = tmp_path / "run"
    flags = flags_of("aim", "--steps", 3, "--tensorboard", "--eval-every", 2, "--out")
    assert cli(aim, *flags, run) == 0
    stub.SummaryWriter.assert_called_once_with(run / "tensorboard")
    *calls, last = stub.SummaryWriter.return_value.method_calls
    told = {verb: {(key, step): value for name, (key, value, step), _ in calls if name == verb}
            for verb in ("add_scalar", "add_image")}
    logged = {(key, line["step"]): value for line in log_of(run) for key, value in line.items()
              if isinstance(value, int | float) and key not in ("step", "epoch")}
    assert told["add_scalar"] == logged and {("mse", 2), ("mse", 3)} <= logged.keys()
    shown = told["add_image"]
    assert shown.keys() == {(key, step) for key in ("samples", "recon") for step in (2, 3)}
    assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in shown.values())
    assert last == mock.call.close()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    fails("--tensorboard needs a package: pip install tensorboard", aim, *flags, tmp_path / "2")


@pytest.mark.parametrize("name", ["ivlsgan", "aim-images", "latentmap-images"])
def test_a_run_is_continued_from_within_its_folder(name, flags_of, pictures, tmp_path, monkeypatch):
    """Its pictures were given by a relative path, and move later on."""
    here = tmp_path / "here"
    shutil.copytree(pictures, here / "first")
    monkeypatch.chdir(here)
    flags = flags_of(name, "--dataset", "first", "--steps", 1, "--out", "run")
    assert cli(RUNS[name][0], *flags) == 0
    monkeypatch.chdir(here / "run")
    (here / "first").rename(here / "second")
    assert resume(name, ".", "--steps", 4) == 2
    assert resume(name, ".", "--steps", 4, "--dataset", here / "second") == 0
    config = json.loads(Path("config.json").read_text())
    assert config["dataset"] == str(here / "second") and len(config["earlier_commands"]) == 1
    assert config["command"].startswith(f"{RUNS[name][0].FILE}.py --resume . --device cpu --steps")
    Path("config.json").write_text("{")  # Damaged, it is no reason not to go on.
    assert resume(name, ".", "--steps", 5) == 0 and saved(here / "run")["step"] == 5


@for_each_file
def test_where_and_how_far_a_run_is_resumed(name, copied, fails, tmp_path, capsys):
    module = RUNS[name][0]
    run = copied(name)
    new = tmp_path / "new"
    longer = ("--steps", STEPS + 1, "--out")
    alone = tmp_path / "alone" / "m.pt"
    alone.parent.mkdir()
    shutil.copy(run / "last.pt", alone)
    fails("holds a checkpoint, but it is no run's folder", module, "--resume", alone)
    assert os.listdir(alone.parent) == ["m.pt"]
    fails("may go back behind its run's last step", module, "--resume", run / "best.pt")
    early = copied(name, 5)
    fails("holds something else; give a new folder", module, "--resume", run, *longer, early)
    assert resume(name, run, "--out", new) == 0  # nothing is left to train
    assert_same(saved(new)["weights"], saved(run)["weights"])
    shutil.rmtree(new)
    shutil.copy(early / "last.pt", run / "best.pt")
    assert resume(name, run / "best.pt", *longer, new) == 0  # a checkpoint may be named, of step 3
    assert [line["step"] for line in log_of(new) if "protocol" in line] == [6, 9]
    assert saved(new)["step"] == STEPS + 1 and (new / "best.pt").exists()
    assert saved(run)["step"] == STEPS
    for flags in ((), ("--steps", 1), ("--epochs", 1e-4)):
        capsys.readouterr()
        assert resume(name, run, *flags) == 0
        assert f"the run is at step {STEPS} already; --steps beyond" in capsys.readouterr().err
    assert resume(name, run, *longer, run) == 0 and saved(run)["step"] == STEPS + 1


def test_a_length_in_epochs_replaces_one_in_steps(pictures, tmp_path):
    """96 pictures are six batches of sixteen."""
    for module in PAPERS:
        settings = settings_from(module, "--dataset", "digits", "--epochs", 2.5)
        assert module.preset(None, "digits").steps and settings.steps is None
    run = tmp_path / "run"
    flags = quick(aim, pictures, tmp_path, "--epochs", 1.3, "--eval-every", 99, "--out", run)
    assert cli(aim, *flags) == 0
    assert saved(run)["step"] == 8 and log_of(run)[-1]["epoch"] == 1.333


@for_each_file
def test_a_run_has_its_seed_and_its_length(name, flags_of, tmp_path, monkeypatch):
    """First weights, batches and random numbers are the seed's; rates fall by the run's length."""
    module = RUNS[name][0]
    made = []
    for of, what in ((module, "build"), (data, "Batches")):
        make = getattr(of, what)
        monkeypatch.setattr(of, what, lambda *args, make=make: [
            made.append([args, make(*args)]), copy.deepcopy(made[-1][1])][1])
    evaluate = mock.Mock(return_value={"mse": 1.0, "protocol": "p"})
    monkeypatch.setattr(module, "evaluate", evaluate)
    for seed in (3, 4):
        flags = ("--steps", 12, "--seed", seed, "--out", tmp_path / str(seed))
        assert cli(module, *flags_of(name, *flags)) == 0
    (_, a), (args, net), (_, b), (_, other) = made
    assert args[3:] == ((12,) if module is latentmap else (12, a.steps_per_epoch))
    assert not alike(net, other) and not torch.equal(next(a)[0], next(b)[0])
    one, two = (saved(tmp_path / seed)["random"] for seed in "34")
    with pytest.raises(AssertionError):
        assert_same(one, two)
    assert evaluate.call_count == 2 * 12  # --eval-every's default: a twelfth of a short run


@pytest.mark.parametrize("name", ["ivlsgan", "ivaae-rad", "aim", "latentmap"])
def test_evaluations_do_not_change_the_training(name, flags_of, finished, tmp_path):
    run = tmp_path / "run"
    flags = flags_of(name, "--steps", STEPS, "--eval-every", STEPS, "--out", run)
    assert cli(RUNS[name][0], *flags) == 0
    for part in ("weights", "optimisers", "random", "batches"):
        assert_same(saved(run)[part], saved(finished(name))[part], part)


@pytest.mark.parametrize("name", ["aim", "latentmap"])
def test_best_starts_anew_with_another_protocol(name, copied):
    """A score of 50 samples says nothing beside one of 60, and a best.pt may be gone."""
    run = copied(name)
    torch.save(saved(run) | {"best": -1e9}, run / "last.pt")
    (run / "best.pt").write_bytes(b"kept")
    assert resume(name, run, "--steps", 9) == 0
    assert (run / "best.pt").read_bytes() == b"kept" and saved(run)["best"] == -1e9
    assert resume(name, run, "--steps", 10, "--samples", 60) == 0
    assert saved(run, "best.pt")["step"] == 10 and saved(run)["best"] > -1e9
    torch.save(saved(run) | {"best": -1e9}, run / "last.pt")
    (run / "best.pt").unlink()
    assert resume(name, run, "--steps", 11) == 0 and saved(run, "best.pt")["step"] == 11


def test_a_run_goes_on_with_its_data_and_another_folder_begins_anew(pictures, flags_of, tmp_path,
                                                                    fails, capsys):
    """Content decides, not the name: a moved folder is the same, one more picture is not."""
    folder = Path(shutil.copytree(pictures, tmp_path / "first"))
    run = tmp_path / "run"
    flags = flags_of("ivlsgan", "--dataset", folder, "--steps", 2, "--out", run)
    few = data.Dataset("few", "test", torch.zeros(2, 1, 8, 8, dtype=torch.uint8), None, 0)
    assert data.fingerprint(few, few) != data.fingerprint(few)  # test pictures count as well
    assert cli(ivgen, *flags) == 0
    shutil.copy(folder / "000.png", folder / "one-more.png")
    logged = (run / "log.jsonl").read_bytes()
    assert resume("ivlsgan", run, "--steps", 4) == 2
    assert "first holds other data than the run was trained on" in capsys.readouterr().err
    fails("--out NEW starts a new run from its weights", ivgen, "--resume", run, "--steps", 4)
    assert (run / "log.jsonl").read_bytes() == logged
    new = tmp_path / "new"
    assert resume("ivlsgan", run, "--steps", 1, "--out", new) == 0
    assert "this is a new run, from step 0, that begins with its weights" in capsys.readouterr().err
    assert (saved(new)["step"], saved(new)["batches"]) == (1, {"epoch": 0, "position": 1})
    assert saved(new)["data"] != saved(run)["data"]
    assert resume("ivlsgan", new, "--steps", 5) == 0  # From now on these are its data.
    (folder / "one-more.png").unlink()
    folder.rename(tmp_path / "moved")
    assert resume("ivlsgan", run, "--steps", 4, "--dataset", tmp_path / "moved") == 0
    assert saved(run)["step"] == 4


@pytest.mark.parametrize("module, flags, dataset, hidden", [
    (ivgen, "--model ivlsgan --dataset digits", "mnist", "noise_schedule"),
    (ivgen, "--model ivaae-rad --dataset digits", "mnist", None),
    (ivgen, "--model ivaae-rad --dataset digits", "cifar10", "networks"),
    (aim, "--model aim --dataset grid25", "ring8", "reach"),
    (latentmap, "--model vae --dataset digits", "mnist", None)])
def test_a_new_run_on_other_data_has_that_data_sets_hidden_settings(module, flags, dataset, hidden,
                                                                    monkeypatch):
    """Those that no flag sets. So it can itself be resumed."""
    first = settings_from(module, *flags.split())
    monkeypatch.setattr(data, "load_checkpoint", lambda *_: {"settings": dataclasses.asdict(first)})
    flags = ["--resume", "x", "--out", "y", "--dataset", dataset]
    if hidden == "networks":  # of 64 pixels, and the run has 32
        with refuses("Table 4's networks are for 64 pixels"):
            settings_from(module, *flags)
        return
    settings = settings_from(module, *flags)
    assert data.settings_of({"settings": dataclasses.asdict(settings)}, module.preset) == settings
    assert (settings.model, settings.width) == (first.model, first.width)
    if hidden:
        assert getattr(settings, hidden) != getattr(first, hidden)


@for_each_file
def test_a_new_run_on_other_data_has_its_own_length(name, finished, tmp_path, monkeypatch):
    run = finished(name)
    monkeypatch.setattr(data, "fingerprint", lambda *_: "other")
    assert resume(name, run, "--steps", 2, "--out", tmp_path / "new") == 0
    assert [line["step"] for line in log_of(tmp_path / "new")] == [2, 2]  # losses, evaluation
    moments = [state for optimiser in saved(tmp_path / "new")["optimisers"].values()
               for state in optimiser["state"].values()]
    assert min(state["step"] for state in moments) <= 2  # they begin anew as well
    if name == "latentmap":
        assert saved(tmp_path / "new")["weights"]["_extra_state"] == 1  # the last of phase one


def test_latentmap_does_not_sample_from_an_untrained_map(copied, fails):
    run = copied("latentmap", 5)
    assert saved(run)["step"] == 3 and not (run / "best.pt").exists()
    fails("step 3 is in the first phase", latentmap, "--resume", run, "--sample", 2)
    fails("needs more than 5", latentmap, "--resume", run, "--steps", 4)
    assert resume("latentmap", run, "--steps", 12) == 0  # Longer now: the boundary stays.
    phases = {line["step"]: line.get("phase") for line in log_of(run) if "protocol" in line}
    assert phases == {3: "autoencoder", 6: None, 9: None, 12: None}


@pytest.mark.parametrize("module, model, dataset, given, samples, has_fid", [
    (ivgen, None, "stacked-mnist", None, 26_000, False), (ivgen, None, "cifar10", 70, 70, True),
    (ivgen, None, "cifar10", None, 50_000, True), (ivgen, None, "mnist", None, 60_000, True),
    (ivgen, "aae", "celeba", None, 20_000, True), (ivgen, "aae", "digits", None, 20_000, False),
    (aim, None, "mnist", None, 50_000, False), (aim, None, "cifar10", None, 50_000, True),
    (aim, None, "fashion-mnist", None, 50_000, False),
    (aim, None, "/a/folder/mnist", None, 10_000, False),
    (latentmap, None, "celeba", None, 50_000, True), (latentmap, None, "digits", None, 5000, False),
    (latentmap, None, "mnist", None, 10_000, False)])
def test_samples_and_fid_are_the_protocols(module, model, dataset, given, samples, has_fid,
                                           tmp_path, monkeypatch):
    """On a machine with CUDA and the weights: Inception, and for AIM Li et al.'s network, only
    where the paper prints its scores."""
    class Seen(Exception):
        """Ends the run where its Evaluator would be made."""

    def evaluator(train_set, test_set, size, device, root, samples, inception, li=None,
                  fid_on_train=None):
        raise Seen(samples, inception, li, fid_on_train)

    def weights_if(asked, has_fid, *_):
        return "weights" if has_fid else None

    few = data.Dataset(dataset, "train", torch.zeros(300, 3, 8, 8, dtype=torch.uint8), None, 0)
    monkeypatch.setattr(data, "load_pair", lambda *_: (few, few))
    monkeypatch.setattr(metrics, "inception_default", weights_if)
    monkeypatch.setattr(metrics, "Evaluator", evaluator)
    config = dataclasses.replace(module.preset(model, dataset), width=2, batch=8)
    if given:
        config = dataclasses.replace(config, samples=given)
    with pytest.raises(Seen) as seen:
        module.train(config, module.Machine(), tmp_path / "run")
    of_li = dataset == "mnist" if module is aim else None
    on_train = 300 if module is latentmap else None  # its D10
    assert seen.value.args == (samples, "weights" if has_fid else None, of_li, on_train)


# ---- numbers that are not finite -----------------------------------------------------------------


def test_a_line_of_the_log_has_the_means_since_the_last():
    losses = [(step, name, torch.tensor(value))
              for step, name, value in ((1, "d", 1.0), (2, "d", 4.0), (2, "g", 7.0))]
    run = mock.Mock(losses=losses, counted=0, since=time.time() - 10, world=3)
    run.batches.batch = 50
    run.mean_losses = functools.partial(data.Run.mean_losses, run)
    data.Run.log_losses(run, 2)
    run.log.assert_called_once_with(2, img_per_s=pytest.approx(30, abs=1), d=2.5, g=7)
    assert run.losses == [] and run.start_clock.call_args == mock.call(2)


@for_each_file
@pytest.mark.parametrize("what", ["loss", "interrupted", "weight", "buffer", "metric", "fp16"])
def test_a_number_that_is_not_finite_ends_the_run(name, what, flags_of, tmp_path, monkeypatch,
                                                  capsys):
    """With exit code 3, step and name; the last good checkpoint stays, after Ctrl-C as well."""
    module = RUNS[name][0]
    model = {ivgen: ivgen.IVGAN, aim: aim.AIM, latentmap: latentmap.LatentMap}[module]
    step = model.step
    evaluate = module.evaluate
    sentence = {"weight": "the weights", "buffer": "the weights", "metric": "'mse' is inf",
                "fp16": "fp16's gradients"}
    sentence = sentence.get(what, r"the loss '\w+' is nan")
    at = 3 if what == "interrupted" else 4  # at 3 only the signal has it saved

    def bad_step(self, x):
        losses = step(self, x)
        if self.iteration == at and what in ("loss", "interrupted"):
            if what == "interrupted":
                signal.raise_signal(signal.SIGINT)
            return {key: value * math.nan for key, value in losses.items()}
        if self.iteration == at and what == "fp16":  # so many steps were skipped
            self.machine.scaler = torch.amp.GradScaler("cpu", 1e-4)
        elif self.iteration == at:
            values = self.parameters() if what == "weight" else self.buffers()
            next(value for value in values if value.is_floating_point()).data.fill_(math.inf)
        return losses

    def bad_metric(*args):
        bad = log_of(tmp_path / "run")[-1]["step"] == 4
        return evaluate(*args) | ({"mse": math.inf} if bad else {})

    if what == "metric":
        monkeypatch.setattr(module, "evaluate", bad_metric)
    else:
        monkeypatch.setattr(model, "step", bad_step)
    flags = flags_of(name, "--steps", 8, "--eval-every", 2, "--out", tmp_path / "run")
    flags += ["--amp", "fp16"] * (what == "fp16")
    assert cli(module, *flags) == 3
    said = capsys.readouterr().err.splitlines()[-1]
    end = "; the last good checkpoint is .*/run/last.pt$"
    assert re.search(f": step {at}: {sentence}.*{end}", said)
    assert saved(tmp_path / "run")["step"] == 2


@pytest.mark.parametrize("name, model, lr, every", [
    ("aim", "aim", 1e12, 1), ("aim", "gan", 1e12, 1), ("aim-images", "aim", 1e12, 1),
    ("latentmap", "vae", 1e12, 1), ("latentmap-images", "vae", 1e12, 1),
    ("ivaae-rad", "wae-mmd", 1e12, 1), ("ivlsgan", "dcgan", 1e10, 3)])
def test_what_an_evaluation_finds_first_ends_the_run_too(name, model, lr, every, flags_of, tmp_path,
                                                         capsys):
    """Losses and weights may be finite where what is generated or encoded is not.

    In the last the running statistics overflow.
    """
    run = tmp_path / "run"
    flags = flags_of(name, "--model", model, "--steps", 6, "--eval-every", every, "--lr", lr)
    assert cli(RUNS[name][0], *flags, "--out", run) == 3
    said = capsys.readouterr().err
    assert said.count("last good checkpoint") == 1 and ": step " in said
    log = (run / "log.jsonl").read_text()
    assert "NaN" not in log and "Infinity" not in log
    for path in run.glob("*.pt"):
        assert all(value.isfinite().all() for value in saved(run, path.name)["weights"].values())
    assert (run / "last.pt").exists()


@for_each_file
@pytest.mark.parametrize("what", ["weights", "optimisers"])
def test_a_checkpoint_that_is_not_finite_is_not_used(name, what, copied, capsys):
    """The last of its buffers or of its moments is infinite."""
    run = copied(name)
    state = saved(run)
    values = [value for value in state["weights"].values() if value.is_floating_point()]
    if what == "optimisers":
        values = [moments["exp_avg"] for optimiser in state["optimisers"].values()
                  for moments in optimiser["state"].values()]
    values[-1].fill_(math.inf)
    torch.save(state, run / "last.pt")
    for flags in (("--sample", 2), ("--steps", 9)):
        assert resume(name, run, *flags) == 3
        assert "are not finite" in capsys.readouterr().err
    assert not (run / "drawn").exists()


# ---- mistakes end in one sentence ----------------------------------------------------------------

HUGE = "1" + "0" * 20
SYSTEMS = {ivgen: (*ivgen.IVGAN_MODELS, *ivgen.IVAAE_MODELS), aim: (*aim.MODELS,),
           latentmap: (*latentmap.MODELS,)}


@pytest.mark.parametrize("module, model, dataset, wanted", [
    (ivgen, "ivlsgan", "cifar10", dict(
        network="table1", size=64, width=64, latent=100, batch=64, epochs=400, steps=None, k=4,
        lam=0.25, mu=0.5, lam_e=1, mu_e=1, lr=1e-4, lr_e=5e-3, beta1=0.5, beta2=0.999, loss="lsgan",
        e_steps=1, e_sign="paper", d_norm="table1", prior="normal", pack=1, triples=None,
        noise_schedule=((0, 0.05), (0.125, 0.01), (0.25, 0.001), (0.5, 0.0)))),
    (ivgen, "ivdcgan", "mnist", dict(
        loss="dcgan", noise_schedule=((0, 0.05), (0.25, 0.01), (0.5, 0.003), (0.75, 0.001)))),
    (ivgen, "ivlsgan", "stacked-mnist", dict(steps=100_000, samples=26_000)),
    (ivgen, "dcgan", "mnist", dict(loss="dcgan", noise_schedule=(), steps_of_d=1)),
    (ivgen, "lsgan", "mnist", dict(loss="lsgan", noise_schedule=())),
    (ivgen, "wgan", "cifar10", dict(loss="wgan", lr=5e-5, steps_of_d=5)),
    (ivgen, "wgan-gp", "cifar10", dict(loss="wgan-gp", lr=1e-4, beta1=0, beta2=0.9, steps_of_d=5)),
    (ivgen, "mrgan", "cifar10", dict(loss="dcgan", mu=0.25, lam=0.25, mu_e=0.25, lam_e=0.25)),
    (ivgen, "mrgan", "digits", dict(noise_schedule=((0, 0.2),), lr=1.5e-3, decay="linear")),
    (ivgen, "pacdcgan", "stacked-mnist", dict(pack=2, size=64, batch=64, **ivgen.PACGAN)),
    (ivgen, "unrolled", "stacked-mnist", dict(unroll=5, lr=1e-4, lr_d=2e-4, steps_of_g=1)),
    (ivgen, "veegan", "stacked-mnist", dict(lr=2e-4, lr_e=2e-4, beta1=0.5, prior="normal")),
    (ivgen, "ivaae-rad", "mnist", dict(
        network="fc", width=1024, size=64, latent=16, batch=64, lr=1e-4, lr_d=1e-4, lr_e=5e-5,
        epochs=300, lam_mmd=10, decay=((100, 0.5), (200, 0.25)), samples=20_000, e_loss="iv")),
    (ivgen, "ivaae-bw", "celeba", dict(
        network="conv", width=128, latent=64, batch=100, lr=1e-3, lr_d=5e-4, lr_e=1e-3, t=4, lam=1,
        mu1=4, mu2=2, lam_mmd=100, decay=((30, 0.5), (50, 0.1), (100, 0.01)))),
    (ivgen, "ivaae-svgd", "cifar10", dict(latent=128, batch=128, epochs=300, lam_mmd=100, t=4)),
    (ivgen, "aae", "mnist", dict(t=1, mu1=4, mu2=2)),
    *((aim, "aim", name, dict(size=size, epochs=epochs, batch=100, lr=2e-4, beta1=0.5, decay="sqrt",
                              lam=None, std=0.02, width=None))
      for name, size, epochs in (("mnist", 28, 400), ("celeba", 64, 300), ("cifar10", 64, 300))),
    *((aim, name, "celeba", dict(lam=1 if name in ("aim-fgan", "alice", "alice-adv") else None))
      for name in aim.MODELS),
    (aim, None, None, dict(model="aim", dataset="grid25", reach=4, lr=5e-4, beta1=0.8, epochs=12,
                           decay="linear")),            # D4
    (aim, "aim", "swissroll", dict(reach=1)),
    (latentmap, "latentmap", "celeba", dict(
        size=64, width=64, latent=128, batch=32, epochs=25, lr=2e-4, gamma=0.2, lam=0.2, omega1=1,
        omega2=1, beta1=0, recon="l2", prior="gauss", joint=False, normalise=True, critic_steps=2,
        map_d_steps=5, ae_share=0.8)),
    (latentmap, "latentmap", "mnist", dict(size=32, latent=256)),
    (latentmap, "age", "celeba", dict(prior="sphere")),
    (latentmap, None, None, dict(model="latentmap", dataset="swissroll", size=None, latent=2,
        ae_share=0.6, lr=1e-3, steps=6000, batch=500, width=128, omega1=0.3)),      # D7
    *((latentmap, name, "swissroll", dict(lr=lr))
      for name, lr in (("vae", 1e-3), ("aae", 2e-3), ("alae", 2e-4))),
    (latentmap, "latentmap", "swissroll3d", dict(
        size=None, width=400, latent=2, networks="swissroll3d")),
    *((latentmap, f"latentmap-{name}", "mnist", dict(omega1=0, omega2=0, normalise=name == "noreg"))
      for name in ("nobn", "noreg"))])
def test_presets_are_the_papers(module, model, dataset, wanted):
    config = module.preset(model, dataset)
    assert {name: getattr(config, name) for name in wanted} == wanted


@pytest.mark.parametrize("module", PAPERS)
def test_every_preset_and_every_row_of_a_table_can_be_asked_for(module):
    points = data.POINT_SETS if module is not ivgen else ()
    for model, dataset in itertools.product(SYSTEMS[module], (*data.IMAGE_SETS, *points, "/a/b")):
        config = module.preset(model, dataset)
        config.check()
        assert (config.model, config.dataset) == (model, dataset)
    for table in module.TABLES.values():
        for flags, *published in table["rows"].values():
            assert len(published) == len(table["columns"])
            for _, dataset, _ in table["columns"]:
                settings_from(module, *flags.split(), "--dataset", dataset)


@pytest.mark.parametrize("module, model, field, value", [
    (ivgen, "ivlsgan", "lr", 2e-4), (ivgen, "ivlsgan", "mu", 2.0), (ivgen, "ivlsgan", "lam", 1.0),
    (ivgen, "mrgan", "mu_e", 3.0), (ivgen, "ivaae-rad", "lr", 2e-3), (ivgen, "ivaae-rad", "mu2", 1),
    (ivgen, "pacdcgan", "pack", 4), (ivgen, "unrolled", "unroll", 0),
    (ivgen, "unrolled", "lr_d", 1e-3), (ivgen, "dcgan", "triples", 9), (aim, "alice", "lam", 2.0),
    (aim, "pacgan", "pack", 3), (latentmap, "latentmap-nobn", "recon", "l1"),
    (latentmap, "aae", "prior", "sphere"), (latentmap, "latentmap", "gamma", 0.1),
    (latentmap, "latentmap", "omega2", 0.1), (latentmap, "introvae", "size", 32)])
def test_a_flag_sets_the_field_of_its_name_and_no_other(module, model, field, value):
    flag = "--" + field.replace("_", "-")
    settings = settings_from(module, "--dataset", "cifar10", "--model", model, flag, value)
    assert settings == dataclasses.replace(module.preset(model, "cifar10"), **{field: value})


MISTAKES = {  # of every file, then of each
    None: {
        "--steps 0": "--steps 0 is too small: at least 1",
        "--steps many": "argument --steps: invalid int value: 'many'",
        f"--steps {HUGE}": f"--steps {HUGE} is too large",
        f"--seed {HUGE}": f"--seed {HUGE} is too large",
        "--epochs inf": "--epochs inf is too large",
        "--batch 1": "--batch 1 is too small: at least 2",
        "--batch 200000": "a batch of 200000 is more than the",
        "--lr nan": "--lr nan is not a number",
        f"--width {2**60}": "is too large",
        "--latent 0": "--latent 0 is too small",
        "--amp tf32": "--amp tf32 is not one of auto, off, bf16, fp16",
        "--model vqgan": "--model vqgan is not one of",
        "--learning-rate 1": "unrecognized arguments: --learning-rate",
        "--step 3": "unrecognized arguments: --step",  # no abbreviations
        "--sample 4": "--sample needs --resume RUN",
        "--resume RUN --sample 0": "--sample 0 is out of range",
        "--resume RUN --sample 2 --bench 2": "not allowed with argument",
        "--resume=": "argument --resume: expected one argument",
        "--resume /nowhere/run": "there is no checkpoint /nowhere/run",
        f"--resume {'x' * 300}": "too long",
        "--dataset gird25": "there is no dataset 'gird25', perhaps grid25 is meant",
        "--dataset /nowhere/pictures --bench 2": "there is no folder /nowhere/pictures",
        **{f"--device {name}": f"--device {name} cannot be used here"
           for name in ("abacus", "meta", "hpu", "meta:1", "mps")},
        "--bench=--": "argument --bench: expected one argument",
        "--resume ~nobody-of-this-name/x": "there is no checkpoint ~nobody-of-this-name/x",
        "--resume RUN --seed 4": "the run has seed 0, not 4",
        "--out FILE/run": "cannot write to the run folder",
    },
    ivgen: {
        **{f"--model {model} {flag}": f"unrecognized arguments: {flag}" for model, flag in (
            ("dcgan", "--k 4"), ("dcgan", "--mu 1"), ("dcgan", "--pack 2"), ("dcgan", "--t 2"),
            ("dcgan", "--unroll 1"), ("mrgan", "--e-sign code"), ("mrgan", "--e-steps 2"),
            ("mrgan", "--k 4"), ("aae", "--network fc"), ("aae", "--t 4"), ("aae", "--triples 9"),
            ("ivaae-bw", "--k 2"), ("wae-mmd", "--mu1 1"))},
        "--k 7": "--k 7 does not divide the latent dimension 16",
        "--e-sign both": "--e-sign both is not one of paper, code",
        "--size 48": "--size 48 is no power of two",
        "--model ivaae-bw --dataset mnist --t 3": "--t 3 does not divide the latent dimension 16",
        "--model ivaae-rad --dataset celeba --size 32": "Table 4's networks are for 64 pixels",
        "--model wgan-gp --compile": "--compile does not go with wgan-gp",
        "--dataset grid25": "holds points; ivgen.py needs images",
        "--probe classifier": "--probe needs --resume RUN",
        "--network vgg": "vgg is not one of table1, pacgan",
        "--network pacgan --size 32": "are for 28 pixels",
        "--size 28": "28 is no power of two",
        "--model unrolled --compile": "differentiates twice",
        "--model unrolled --amp fp16": "use bf16 or off",
        "--mu 0": "leaves f untrained",
        "--resume RUN --dataset grid25 --out new": "does not go from points to pictures, nor back",
        "--mu 0 --mu-e 0 --e-sign code": "no term of E has a weight",
        "--mu-e 0 --lam-e 0": "no term of E has a weight",
        "--mu 0 --mu-e 0 --lam 0 --e-sign code": "no term of E has a weight",
        "--model mrgan --mu-e 0 --lam-e 0": "no term of E has a weight",
        "--dataset grid25 --bench 1": "holds points; ivgen.py needs images",
    },
    aim: {
        "--resume RUN --dataset digits --out new": "does not go from points to pictures, nor",
        "--model gan --lam 1": "unrecognized arguments: --lam",
        "--k 1": "unrecognized arguments: --k",
        "--size 28": "unrecognized arguments: --size 28",
        "--inception auto": "unrecognized arguments: --inception auto",
        "--dataset cifar10 --size 32": "--size 32: the paper has networks for 28",
        "--dataset digits --size 0": "--size 0: the paper has networks for 28",
        "--width 5": "--width 5 is not an even number",
        "--model alice --k .5": "--k 0.5 is too small",
        "--std 0": "--std 0.0 is too small",
        "--decay cosine": "--decay cosine is not one of sqrt, linear, none",
        f"--latent {10**14}": "out of memory; try a smaller",
        "--model unrolled --compile": "--compile does not go with unrolled",
        "--model pacgan --pack 9 --batch 8": "--pack 9: there are only 8 items",
    },
    latentmap: {
        "--resume RUN --dataset digits --out new": "does not go from points to pictures, nor",
        **{f"--model {model} {flag}": f"unrecognized arguments: {flag}" for model, flag in (
            ("latentmap", "--size 32"), ("latentmap", "--inception off"),
            ("latentmap-nobn", "--gamma 1"), ("latentmap-noreg", "--omega1 1"), ("vae", "--joint"),
            ("vae", "--prior gauss"), ("introvae", "--prior sphere"), ("wae", "--recon l1"),
            ("aae", "--lam 1"), ("age", "--recon l1"), ("alae", "--gamma 1"))},
        "--dataset cifar10 --size 28": "--size 28: there are networks for 32",
        "--dataset digits --size 0": "--size 0: there are networks for 32",
        "--omega1 -1": "--omega1 -1.0 is too small: at least 0",
        "--gamma 1.5": "--gamma 1.5 is too large: at most 1",
        "--recon l3": "--recon l3 is not one of l2, l1",
        "--prior cube": "--prior cube is not one of gauss, sphere",
        "--prior sphere --latent 1": "--latent 1 is too small for a prior on the sphere",
        "--model alae --compile": "--compile does not go with alae",
    },
}


@pytest.mark.parametrize("module, flags, sentence", [
    (module, *mistake) for owner, mistakes in MISTAKES.items()
    for module in ([owner] if owner else PAPERS) for mistake in mistakes.items()])
def test_bad_flags_end_in_one_sentence(module, flags, sentence, finished, fails, tmp_path,
                                       monkeypatch):
    """Those that no data set has to be looked at for, before any work."""
    late = any(word in sentence for word in ("a batch of", "out of memory"))
    run = finished({ivgen: "ivlsgan", aim: "aim", latentmap: "latentmap"}[module])
    if not late:
        monkeypatch.setattr(data, "load_pair", lambda *_: pytest.fail("work was begun"))
    (tmp_path / "FILE").write_text("in the way")
    monkeypatch.chdir(tmp_path)
    fails(sentence, module, *flags.replace("RUN", str(run)).split())
    assert late or len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("module", PAPERS)
def test_devices_and_ranks_that_are_not_there(module, fails, monkeypatch):
    for device in ("cuda:99", "cuda"):
        if device == "cuda:99" or not torch.cuda.is_available():
            fails(f"--device {device}", module, "--device", device)
    for name, device in (("WORLD_SIZE", "cpu"), ("RANK", "cpu"), ("LOCAL_RANK", "cuda")):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setenv(name, "two")
            fails(f"the environment has {name}=two, which is no", module, "--device", device)
    monkeypatch.setenv("RANK", "1")
    fails("RANK is not below its WORLD_SIZE", module)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for flags in (("--bench", 3), ("--sample", 3)):
        fails("--probe are for one process: leave torchrun out", module, *flags)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "empty", lambda *_, **options: torch.zeros(1))
    fails("cuda:1 is one GPU for 2 ranks; give --device cuda", module, "--device", "cuda:1")


def test_ranks_part_together_or_not_at_all(monkeypatch):
    """After a mistake that one rank met the group would wait for the others, or abort."""
    left = mock.MagicMock()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", left)
    monkeypatch.setattr(os, "_exit", lambda code: sys.exit(f"at once with {code}"))
    for end, code in (([0], 0), (data.Interrupted("agreed upon", signal.SIGINT), 130)):
        left.reset_mock()
        assert data.run_command(mock.Mock(side_effect=end)) == code
        assert left.called
    left.reset_mock()
    with pytest.raises(SystemExit, match="at once with 2"):
        data.run_command(mock.Mock(side_effect=data.UserError("only here")))
    assert not left.called


def test_ranks_that_do_not_meet_or_are_lost(tmp_path):
    """Without torchrun: no master, no other rank, one that dies. Each ends by itself, soon."""
    script = tmp_path / "script.py"
    script.write_text("""if True:
        import os, sys
        sys.path.insert(0, sys.argv[1])
        import datetime, torch, data
        real = datetime.timedelta
        datetime.timedelta = lambda seconds=0, hours=0: real(seconds=seconds / 15, hours=hours)

        def main(argv):
            data.hardware("cpu", "off")
            if os.environ["RANK"] == "1":
                os._exit(9)
            for _ in range(9):
                torch.distributed.all_reduce(torch.ones(1))

        sys.exit(data.run_command(main))
        """)
    started = {}
    free = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]  # all open: three ports
    ports = [server.getsockname()[1] for server in free]
    for server in free:
        server.close()
    for port, ranks in zip(ports, ("1", "0", "01")):
        for rank in ranks:
            about = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2",
                         RANK=rank, OMP_NUM_THREADS="1")
            started[port, rank] = subprocess.Popen(
                [sys.executable, script, HERE], env=os.environ | about, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    ends = [process.communicate(timeout=60)[1] for process in started.values()]
    alone, waiting, left, _ = [text.splitlines()[-1:] for text in ends]
    assert "the other ranks cannot be joined" in alone[0], ends
    assert "the other ranks cannot be joined" in waiting[0], ends
    assert "another rank has ended or does not answer" in left[0], ends
    assert [process.returncode for process in started.values()] == [2, 2, 2, 9], ends


class Evil:
    def __reduce__(self):
        return print, ("code in a pickle was run",)


def spoilt(optimisers, spoil):
    """A copy, of whose first optimiser's state {number: moments} something is changed."""
    changed = copy.deepcopy(optimisers)
    spoil(next(iter(changed.values()))["state"])
    return changed


@for_each_file
def test_bad_checkpoints_end_in_one_sentence(name, copied, finished, fails):
    module = RUNS[name][0]
    path = copied(name) / "last.pt"
    whole = path.read_bytes()
    state = saved(path.parent)
    settings = state["settings"]
    other = saved(finished({"ivlsgan": "aim", "aim": "latentmap", "latentmap": "ivlsgan"}[name]))
    another = {ivgen: "dcgan", aim: "gan", latentmap: "vae"}[module]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        with zipfile.ZipFile(path) as parts:
            for part in parts.namelist():
                archive.writestr(part, parts.read(part))
    for sentence, content, *flags in (
            (f"the run has model {settings['model']}, not {another}", whole, "--model", another),
            (f"not {settings['width'] + 2}; leave --width out", whole, "--width",
             settings["width"] + 2),
            ("does not go from points" if module is ivgen else "holds other data", whole,
             "--dataset", "ring8"),
            ("--out NEW starts a new run from its weights", state | {"data": "0" * 16}),
            ("damaged or truncated", whole[:len(whole) // 2]),
            ("damaged or truncated", packed.getvalue()),
            ("it holds more than tensors and plain values, so it was refused", Evil()),
            (f"is not a checkpoint of {module.FILE}.py", {"weights": {}}),
            *((f"is not a checkpoint of {module.FILE}.py", state | {key: value})
              for key, value in (("step", "8"), ("step", -1), ("step", True), ("step", 2**70),
                                 ("batches", {"epoch": 0, "position": 1.0}), ("random", [[1]]),
                                 ("weights", [1]), ("channels", None), ("losses", [[]]),
                                 ("losses", [{"step": 1, "name": "d", "value": math.nan}]))),
            ("do not go on here", state | {"random": [[torch.zeros(9, dtype=torch.uint8)]]}),
            *(("another shape", state | {"optimisers": spoilt(state["optimisers"], spoil)})
              for spoil in (lambda s: s[0].pop("step"), lambda s: s.update({-1: s[0]}),
                            lambda s: s[0].update(exp_avg=torch.zeros(1)), lambda s: s.update(x=1),
                            lambda s: s[0].update(exp_avg_sq=s[0]["exp_avg_sq"].double()),
                            lambda s: s.update({10**6: s[0]}), lambda s: s[0].update(exp_avg=1))),
            (f"was written by {other['file']}.py, not by {module.FILE}.py", other),
            ("settings are not of this version", state | {"settings": {"model": another}}),
            *(("settings are not of this version", state | {"settings": settings | {key: value}})
              for key, value in (("seed", -1), ("beta2", -1.0), ("width", "8"), ("model", [1]))),
            ("another shape", state | {"settings": settings | {"width": 16}}),
            ("the run has 2 ranks, and here are 1", state | {"random": state["random"] * 2}),
            ("stands at batch 99999", state | {"batches": {"epoch": 0, "position": 99999}})):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        before = {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()}
        fails(sentence, module, "--resume", path.parent, "--steps", 9, *flags)
        after = {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()}
        assert after == before  # What cannot be honoured is refused before anything is written.
    denied = PermissionError(13, "Permission denied", "last.pt")  # which is not damage
    with mock.patch.object(zipfile, "ZipFile", side_effect=denied):
        fails("Permission denied", module, "--resume", path.parent)
    path.unlink()
    fails("there is no checkpoint", module, "--resume", path.parent)


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_noticed_or_harmless(tmp_path):
    values = torch.arange(50.0)
    state = {name: form() if isinstance(form, type) else {"epoch": 0, "position": 0}
             for name, form in data.CHECKPOINT.items()}
    path = tmp_path / "last.pt"
    torch.save(state | {"file": "ivgen", "weights": {"w": values}, "random": []}, path)
    whole = path.read_bytes()
    inside = whole.index(values.numpy().tobytes())
    refused = 0
    for position in [*range(inside, inside + 200, 20), *range(0, len(whole), 11)]:
        changed = bytearray(whole)
        changed[position] ^= 4
        path.write_bytes(changed)
        try:
            assert torch.equal(data.load_checkpoint(path, "ivgen")["weights"]["w"], values)
        except data.UserError:
            refused += 1
        else:
            assert not inside <= position < inside + 200
    assert refused > 20


@for_each_file
def test_a_full_disk_and_a_compiler_that_fails_are_sentences(name, copied, flags_of, monkeypatch,
                                                            capsys):
    run = copied(name)
    whole = (run / "last.pt").read_bytes()
    full = RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos\nlong tale")
    no_compiler = torch._dynamo.exc.TorchRuntimeError("no g++ here\nand a long tale")
    monkeypatch.setattr(data, "compile_networks", mock.Mock(side_effect=no_compiler))
    monkeypatch.setattr(torch, "save", mock.Mock(side_effect=full))
    for flags, sentence in (((), "cannot be written"),
                            (("--compile",), "--compile failed (no g++ here)")):
        assert resume(name, run, "--steps", 9, "--eval-every", 99, *flags) == 2
        assert sentence in capsys.readouterr().err.splitlines()[-1]
        assert (run / "last.pt").read_bytes() == whole and not list(run.glob("*.tmp*"))


# ---- --sample, --bench, --amp, --compile ---------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "stacked-digits", *data.POINT_SETS])
def test_channels_are_known_before_a_set_is_loaded(name):
    assert data.channels_of(name) == data.load(name, split="test").channels
    assert [data.channels_of(name) for name in ("mnist", "cifar10", "stl10", "a/b")] == [1, 3, 3, 3]


@pytest.mark.parametrize("name", LEFT)
def test_samples_are_drawn_into_the_runs_folder(name, copied):
    """By the latest checkpoint or by a named one, never of two at once."""
    run = copied(name)
    log = (run / "log.jsonl").read_bytes()
    seen = []
    for n, checkpoint, *seed in ((7, run), (7, run, "--seed", 1), (7, run), (3, run / "best.pt")):
        assert resume(name, checkpoint, "--sample", n, *seed) == 0
        seen.append((run / "drawn.png").read_bytes())
        if RUNS[name][1]:
            assert len((run / "drawn/points.csv").read_text().splitlines()) == n
        else:
            assert len(list((run / "drawn").glob("*.png"))) == n
    assert (run / "log.jsonl").read_bytes() == log
    assert seen[0] == seen[2] != seen[1]  # Another seed draws others; the default stays.


@pytest.mark.parametrize("module, flags", [
    (ivgen, "--width 4"), (ivgen, "--model wgan --dataset mnist --width 4 --size 32"),
    (ivgen, "--model aae"), (aim, "--width 8"), (aim, "--dataset mnist --size 64 --width 4"),
    (aim, "--dataset cifar10 --size 28 --width 4"), (latentmap, ""),
    (latentmap, "--dataset mnist --width 2"), (latentmap, "--model alae"), (latentmap, "--joint")])
def test_bench_prints_json_of_the_data_sets_own_shape(module, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    built = []
    build = module.build
    monkeypatch.setattr(module, "build", lambda *args: [built.append(args), build(*args)][1])
    monkeypatch.setattr(metrics, "machine_rates", lambda machine: (1.0, 1.0))
    shape = ("--batch", 4, "--latent", 4, "--device", "cpu")
    assert cli(module, "--bench", 2, *shape, *flags.split()) == 0
    [(config, _, channels)] = built
    assert channels == data.channels_of(config.dataset)
    timed = json.loads(capsys.readouterr().out)
    for name in ("images_per_s", "ms_per_step", "gflop_per_step", "peak_memory_mib"):
        assert timed[name] > 0, name
    assert timed["steps"] == 5 and timed["batch"] == 4  # a whole round of WGAN's
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("amx, avx512, capability, precision", [
    (True, False, None, "bf16"), (False, True, None, "bf16"), (False, False, None, "off"),
    (True, True, (7, 5), "off"), (False, False, (8, 0), "bf16"), (False, False, (9, 0), "bf16")])
def test_auto_precision_is_bf16_wherever_the_hardware_has_it(amx, avx512, capability, precision,
                                                             monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    if capability is None:
        assert data.hardware("cpu", "auto") == ("cpu", precision)
    device = "cuda:0" if capability else "cpu"
    assert data.multiplies_bf16(device) is (precision == "bf16")
    run = mock.MagicMock(machine=ivgen.Machine(device), board=None)
    data.Run.report(run, 1, {"protocol": "p"})
    full = "tf32" if capability and precision == "bf16" else "float32"  # of all but bf16
    assert run.log.call_args.kwargs["protocol"] == f"p; trained in {full}"
    assert data.hardware("cpu", "fp16") == ("cpu", "fp16")  # never by itself, but on demand


@pytest.mark.parametrize("name", ["ivlsgan", "ivaae-rad", "aim-images", "latentmap-images"])
def test_a_run_can_be_switched_to_half_precision(name, copied):
    """Its scaler starts anew there, and is part of the checkpoint from then on."""
    run = copied(name)
    assert saved(run)["scaler"] == {}
    for steps, amp in ((10, "fp16"), (12, "fp16"), (13, "bf16")):
        assert resume(name, run, "--steps", steps, "--amp", amp, "--eval-every", 99) == 0
        assert json.loads((run / "config.json").read_text())["precision"] == amp
        if amp == "fp16":
            scaler = saved(run)["scaler"]
            assert scaler["scale"] > 4 if steps == 10 else scaler["scale"] <= 4
            torch.save(saved(run) | {"scaler": scaler | {"scale": 4.0}}, run / "last.pt")


@pytest.fixture
def traced(monkeypatch):
    """torch.compile's tracing and backward graphs, without the minutes that generating code takes.

    Where its patience ends, in eager steps, is an error.
    """
    eager = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", eager)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("name", ["ivlsgan", "alice-adv", "latentmap"])
def test_a_compiled_run_is_the_plain_one(name, flags_of, finished, tmp_path, traced):
    """With its evaluations, which have other modes and sizes."""
    run = tmp_path / "run"
    flags = flags_of(name, "--compile", "--steps", STEPS, "--eval-every", 3, "--out", run)
    assert cli(RUNS[name][0], *flags) == 0
    assert_same(saved(run)["weights"], saved(finished(name))["weights"])


# ---- several ranks -------------------------------------------------------------------------------

TRAIN_EACH = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch, aim, data, ivgen, latentmap
save = data.Run.save

def keep(self, name, step):
    save(self, name, step)
    save(self, f"{step}.pt", step)
    torch.save(dict(self.model.named_parameters()), f"{self.folder}.{step}.{self.rank}.pt")

data.Run.save = keep
for module, flags in json.loads(sys.argv[2]):
    sys.modules[module].main(flags)
    resumed = ["--resume", flags[-1] + "/6.pt", "--out", flags[-1] + "-6", "--device", "cpu"]
    sys.modules[module].main(resumed)
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="session")
def two_ranks_started(flags_of, tmp_path_factory):
    """The folder of runs by two processes: NAME, and NAME-6, resumed from its step 6."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "script.py").write_text(TRAIN_EACH)
    commands = []
    for name in ("ivlsgan", "aim", "latentmap"):
        flags = flags_of(name, "--steps", STEPS, "--eval-every", 3, "--out", folder / name)
        commands.append((RUNS[name][0].FILE, [str(flag) for flag in flags]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                "--standalone", folder / "script.py", HERE, json.dumps(commands)]
    with open(folder / "said", "w") as said:
        process = subprocess.Popen(torchrun, stdout=said, stderr=said, cwd=folder,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
    return folder, process


@pytest.fixture(scope="session", autouse=True)
def started_early(request):
    """The two processes work beside the other tests, which use one core."""
    if len({item.name.split("[")[0] for item in request.session.items}) > 20:
        request.getfixturevalue("two_ranks_started")


@pytest.fixture(scope="session")
def two_ranks(two_ranks_started):
    folder, process = two_ranks_started
    assert process.wait(300) == 0, (folder / "said").read_text()[-3000:]
    return folder


@for_each_file
def test_two_processes_train_one_model_and_resume_bit_for_bit(name, two_ranks, finished):
    """LatentMap's second phase reads running statistics, so these must be one as well."""
    state = saved(two_ranks / name)
    assert state["step"] == STEPS and len(state["random"]) == 2
    assert not torch.equal(state["random"][0][0], state["random"][1][0])
    for step in (0, *EVALUATIONS):
        ranks = [torch.load(two_ranks / f"{name}.{step}.{rank}.pt") for rank in range(2)]
        assert_same(*ranks, f"step {step}")
    again = saved(two_ranks / f"{name}-6")
    for part in ("weights", "optimisers", "random", "batches"):
        assert_same(state[part], again[part], part)
    # Each rank sees its half of the data, so an epoch has half the steps.
    ratio = log_of(two_ranks / name)[-1]["epoch"] / log_of(finished(name))[-1]["epoch"]
    assert ratio == pytest.approx(2, rel=0.01)


def test_a_row_that_fails_under_torchrun_ends_the_table(tmp_path, monkeypatch):
    """Only one rank may have met it; alone, a table goes on with its next row."""
    def fails(argv):
        raise data.UserError("only here")

    runs = [dict(row="a", dataset="x", seed=0, flags=[], folder=tmp_path / "a")]
    assert data.train_runs(runs, [], {}, fails) == {tmp_path / "a": "only here"}
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with refuses("only here"):
        data.train_runs(runs, [], {}, fails)


def test_gradients_of_unlike_ranks_are_averaged_however_weights_lie(tmp_path, monkeypatch):
    """Rank 0 of two: the other's are twice ours, the mean 1.5 times ours. Fused Adam walks memory:
    of a gradient laid out otherwise than its weight it would apply each number to another."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t, **_: t.mul_(1 + 2))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    x = torch.randn(8, 3, 6, 6)
    plain = nn.Conv2d(3, 4, 4)
    net = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    net.iteration = 0
    net.register_parameter("frozen", nn.Parameter(torch.ones(2), requires_grad=False))
    net.machine = ivgen.Machine()
    data.Run(tmp_path, "ivgen", ivgen.preset(), net.machine).begin(net, None, 9)
    strides = []
    net.weight.register_post_accumulate_grad_hook(lambda p: strides.append(p.grad.stride()))
    trained = [net.weight, net.bias]
    net.machine.descend(torch.optim.SGD(trained, 0.1), net(x).square().mean())
    plain(x).square().mean().backward()
    for a, b in zip(trained, plain.parameters()):
        torch.testing.assert_close(a, b - 0.15 * b.grad)
    assert strides == [net.weight.stride()] and strides != [plain.weight.stride()]


# ---- every model of every file -------------------------------------------------------------------

VARIANTS = [  # every model: its file, itself, the data set, what else its preset is a function of
    *((ivgen, name, "mnist", {}) for name in (*ivgen.IVGAN_MODELS, *ivgen.IVAAE_MODELS)),
    *((ivgen, name, "stacked-mnist", dict(network="pacgan")) for name in ivgen.IVGAN_MODELS),
    (ivgen, "ivaae-bw", "celeba", {}),
    *((aim, name, dataset, {}) for name in aim.MODELS
      for dataset in ("mnist", "grid25", "cifar10")),
    *((latentmap, name, dataset, {}) for name in latentmap.MODELS for dataset in LM_NETWORKS),
    *((latentmap, name, dataset, dict(authors=True)) for name in latentmap.AUTHORS
      for dataset in LM_NETWORKS)]


def tiny_config(module, model, dataset, **more):
    smaller = dict(latent=8) if module is ivgen else {}
    if module is ivgen and dataset == "mnist":
        smaller["size"] = 32
    return dataclasses.replace(module.preset(model, dataset, **more), width=4, batch=8, **smaller)


@pytest.mark.parametrize("module, model, dataset, more", VARIANTS)
def test_a_preset_alone_makes_a_model_that_trains_and_answers(module, model, dataset, more):
    """As source to copy from: what `train` would set from the data has a default. Inference leaves
    weights, statistics, mode and random numbers as they are, and no item depends on others."""
    def rates():
        return [g["lr"] for o in data.optimisers_of(net).values() for g in o.param_groups]

    torch.manual_seed(0)
    net = module.build(tiny_config(module, model, dataset, **more))
    net.config.check()
    x = torch.rand_like(net.sample(8)) * 2 - 1
    start = copy.deepcopy(net)
    at_first = rates()
    net.iteration = 499  # The epoch is unknown: still the first, at its learning rates.
    for _ in range(5 if "wgan" in model else 2):
        losses = net.step(x)
        values = losses.values()
        assert losses and all(v.isfinite() and not v.requires_grad and v.dim() == 0 for v in values)
        if module is latentmap:
            net.map_from = net.iteration  # after the first step of LatentMap one of the map
    assert net.iteration > 500 and rates() == at_first
    for name, network in net.named_children():
        trained = any(p.requires_grad for p in network.parameters())
        assert not trained or not alike(network, getattr(start, name)), name
    if module is aim:
        cycle = dict.fromkeys(("alice", "alice-adv"), "d g cycle")
        names = dict.fromkeys(("gan", "pacgan", "unrolled", "ali"), "d g") | cycle
        assert list(losses) == names.get(model, "d g e").split()

    samples = net.sample(5)
    assert samples.shape == x[:5].shape and (x.dim() == 2 or samples.abs().max() <= 1)
    if net.E is None:
        with pytest.raises(ValueError, match=f"{model} has no encoder"):
            net.encode(x)
        return
    before = copy.deepcopy(net.state_dict())
    random = torch.get_rng_state()
    z = net.encode(x)
    assert z.shape == (8, getattr(net, "latent", net.config.latent)) and not z.requires_grad
    alone = torch.cat([net.decode(net.encode(item[None])) for item in x])
    near(net.decode(z), alone)
    assert alone.shape == x.shape and torch.equal(random, torch.get_rng_state())
    if module is not ivgen:
        assert net.reconstruct(x).shape == x.shape
    if module is aim:
        assert net.neighbours(x, 3).shape == (8, 3, *x.shape[1:])
    if module is latentmap:
        assert net.latents(x).shape == net.generated_codes(net.prior(8)).shape == z.shape
    net.sample(3)
    assert net.training and all(torch.equal(before[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize("module, model, dataset, more", VARIANTS)
def test_every_weight_is_in_an_optimiser_at_its_rate(module, model, dataset, more):
    """In one of them; AAE's E and ALAE's E and G are trained in two turns."""
    net = module.build(tiny_config(module, model, dataset, **more))
    c = net.config
    names = {id(p): name for name, p in net.named_parameters() if p.requires_grad}
    held = []
    for optimiser in data.optimisers_of(net).values():
        assert type(optimiser) is (torch.optim.RMSprop if model == "wgan" else torch.optim.Adam)
        betas = (getattr(c, "beta1", 0.5), getattr(c, "beta2", 0.999))
        for group in optimiser.param_groups:
            assert group.get("betas", betas) == betas
            for key in map(id, group["params"]):
                own = getattr(c, f"lr_{names[key][0].lower()}", None)
                assert group["lr"] == (c.lr if own is None else own)
                held.append(key)
    assert set(held) == set(names)
    in_two_turns = module is latentmap and model in ("aae", "alae") and not more
    assert len(held) == len(names) or in_two_turns


@pytest.mark.parametrize("module, model, dataset", [
    case[:3] for case in VARIANTS if case[2] in ("mnist", "grid25", ROLL) and not case[3]])
def test_a_step_on_cuda_waits_for_nothing(module, model, dataset, monkeypatch):
    """On a pretended CUDA device, in bf16: shapes, devices, types are followed, without numbers.

    A step that waited for a number would be refused, as there is none.
    """
    def to(self, device=None, memory_format=None):  # Module.to cannot move pretended tensors.
        for part in self.modules():
            for name, p in part._parameters.items():
                if p is not None:
                    part._parameters[name] = nn.Parameter(p.detach().to(device), p.requires_grad)
            for name, b in part._buffers.items():
                part._buffers[name] = None if b is None else b.detach().to(device)
        return self

    def grad(loss, inputs, *_, **__):  # The engine itself wants a real device.
        assert loss.device.type == "cuda"
        inputs = [inputs] if torch.is_tensor(inputs) else inputs
        return [torch.zeros_like(p) + loss.sum() for p in inputs]

    def backward(loss, inputs, **_):
        for parameter, gradient in zip(inputs, grad(loss, inputs)):
            parameter.grad = gradient

    config = tiny_config(module, model, dataset)
    shape = (8, 1, config.size, config.size) if config.size else (8, 2)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(nn.Module, "to", to)
    machine = module.Machine("cuda:0", "bf16")
    monkeypatch.setattr(torch.autograd, "grad", grad)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with FakeTensorMode():
        net = module.build(config, machine, shape[1], 2)
        seen = [net.sample(2)]
        for _ in range(5 if "wgan" in model else 3):  # LatentMap's two phases
            seen += net.step(torch.zeros(shape, device="cuda")).values()
        if net.E is not None:  # When evaluating, x is on the CPU.
            seen += [net.encode(torch.zeros(shape)), net.decode(net.encode(torch.zeros(shape)))]
        assert {value.device.type for value in seen} == {"cuda"}
        assert {value.dtype for value in seen} == {torch.float32}


# ---- the house -----------------------------------------------------------------------------------

PRODUCT = ("data", "metrics", "ivgen", "aim", "latentmap")


def source(name):
    return (HERE / f"{name}.py").read_text()


def definitions(name):
    """{name: node} of the functions and classes of a file."""
    nodes = ast.parse(source(name)).body
    return {node.name: node for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize("name, part, make", [
    ("ivgen", 1, "IVGAN(preset_ivgan('ivlsgan', 'digits'), channels=1)"),
    ("ivgen", 2, "IVAAE(preset_ivaae('ivaae-rad', 'digits'), channels=1)"),
    ("aim", 0, "AIM(preset('aim', 'grid25'), channels=2)"),
    ("latentmap", 0, "LatentMap(preset('latentmap', 'swissroll'), channels=2)")])
def test_a_part_pasted_into_an_empty_namespace_trains(name, part, make):
    """With the imports and Machine. A Part ends where the next, or the tables begin."""
    lines = source(name).splitlines()
    machine = definitions(name)["Machine"].end_lineno
    tables = next(n for n, line in enumerate(lines) if line.startswith("TABLES = "))
    parts = "\n".join(lines[machine:tables]).split("\n# PART ")
    names = {}
    exec("\n".join(lines[:machine]), names)
    exec(f"# {parts[part]}", names)
    model = eval(make, names)
    losses = model.step(model.sample(8))
    assert losses and all(value.isfinite() for value in losses.values())


@pytest.mark.parametrize("name", PRODUCT[1:])
def test_a_file_alone_says_what_it_needs(name, tmp_path, monkeypatch, capsys):
    """With nothing beside it, or with a folder called data, where data sets may lie."""
    shutil.copy(HERE / f"{name}.py", tmp_path)
    elsewhere = [path for path in sys.path if path not in (str(HERE), "")]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *elsewhere])
    for _ in range(2):
        for module in ("data", "metrics"):
            monkeypatch.delitem(sys.modules, module, raising=False)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(tmp_path / f"{name}.py"), run_name="__main__")
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.startswith(f"{name}.py: put data.py")
        assert said.count("\n") == 1
        (tmp_path / "data").mkdir(exist_ok=True)


def test_nothing_is_written_twice():
    """Machine is the same text thrice. Else no run of eight lines stands in two files but train."""
    machines = [ast.get_source_segment(source(paper.FILE), definitions(paper.FILE)["Machine"])
                for paper in PAPERS]
    assert len(set(machines)) == 1
    places = {}
    for name in PRODUCT:
        lines = source(name).splitlines()
        kept = [node for node in ast.parse(source(name)).body
                if not isinstance(node, (ast.Import, ast.ImportFrom, ast.Try))
                and getattr(node, "name", None) not in ("Machine", "train")]
        text = [line for node in kept for line in lines[node.lineno - 1:node.end_lineno]]
        text = [" ".join(line.split()) for line in text if line.strip()]
        for n in range(len(text) - 7):
            places.setdefault("\n".join(text[n:n + 8]), set()).add(name)
    assert [text for text, names in places.items() if len(names) > 1] == []


@pytest.mark.parametrize("name", [*PRODUCT, "test_all"])
def test_style(name):
    """100 columns, no paired assignment, no named lambda; short functions, with docstrings."""
    lines = source(name).splitlines()
    found = [(n, "over 100 columns") for n, line in enumerate(lines, 1) if len(line) > 100]
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            found.append((node.lineno, "a named lambda"))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            left = sorted(map(ast.unparse, getattr(node.targets[0], "elts", ())))
            if left and left != sorted(map(ast.unparse, node.value.elts)):  # a swap
                found.append((node.lineno, "a paired assignment"))
        if name in PRODUCT and isinstance(node, (ast.Import, ast.ImportFrom)):
            words = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            if words & set(PRODUCT[2:]):
                found.append((node.lineno, "a paper file is imported"))
    for node in definitions(name).values() if name in PRODUCT else ():
        for part in (node, *(node.body if isinstance(node, ast.ClassDef) else ())):
            length = part.end_lineno - part.lineno + 1
            function = isinstance(part, ast.FunctionDef)
            if function and length > (90 if part.name == "train" else 60):
                found.append((part.lineno, f"{part.name} has {length} lines"))
            public = isinstance(part, ast.ClassDef) or (function and part.name[0] != "_")
            if public and length > 8 and not ast.get_docstring(part):
                found.append((part.lineno, f"{part.name} has no docstring"))
    assert not found


@pytest.mark.parametrize("choose, fids, good, by, cells", [
    (None, [5, 800], [25, 50], "", "402.5 ± 560 (2) | – | 37.5 ± 18 (2)"),
    ("min", [3, 800], [25, 50], "", "401.5 ± 560 (2) | – | 37.5 ± 18 (2)"),
    ("best", [3, 800], [75, 50], "; at the best fid", "401.5 ± 560 (2) | – | 62.5 ± 18 (2)")])
def test_the_numbers_of_a_table(choose, fids, good, by, cells, tmp_path):
    """Two seeds of A; of B, whose fid could not be measured, the fcd, which has no such name."""
    columns = [("FID", "digits", "fid"), ("good, %", "digits", "good")]
    table = dict(title="T", columns=columns, choose=choose,
                 rows={"A": ("--model a", 7.5, None), "B": ("--model b", 2, 50)})
    logs = [[dict(step=1, fid=3, fcd=9, good=0.75), dict(step=2, fid=5, good=0.25), dict(d=1)],
            [dict(step=2, fid=800, good=0.5)], [dict(step=2, fcd=0.5, good=1)], []]
    runs = data.table_runs("x", table, 2, ["--lr", "1"], tmp_path)
    about = dict.fromkeys(("machine", "revision", "python", "torch", "torchvision", "precision"), 0)
    for run, log in zip(runs, logs):
        run["folder"].mkdir()
        (run["folder"] / "config.json").write_text(json.dumps(about))
        log = "\n".join(json.dumps(line | {"protocol": "p"}) for line in log)
        (run["folder"] / "log.jsonl").write_text(log)
        assert run["flags"][2:] == ["--dataset", "digits", "--lr", "1", "--seed", str(run["seed"])]
    assert [(run["row"], run["seed"]) for run in runs] == [("A", 0), ("A", 1), ("B", 0), ("B", 1)]
    lines, text = data.table_text("x-tableT", table, runs, {runs[3]["folder"]})
    assert text[-2:] == [f"| A | 7.5 | {cells} |",
                         "| B | 2 | 0.5 (fcd) (unfinished) | 50 | 100 (unfinished) |"]
    wanted = [("A", "FID", 7.5, "fid", fids), ("A", "good, %", None, "good", good),
              ("B", "FID (fcd)", None, "fcd", None), ("B", "good, %", 50, "good", None)]
    assert [(line["row"], line["metric"], line["published"], line["key"], line.get("each"))
            for line in lines] == wanted
    assert lines[0]["protocol"] == "p" + by and lines[0]["seed"] == [0, 1]
    assert lines[0]["std"] == statistics.stdev(fids)
    with open(runs[0]["folder"] / "log.jsonl", "a") as log:
        log.write('\n{"step": 3, "fid": null}')
    assert data.measured(runs, "fid", {"choose": choose})["each"] == fids
    for text in ('{"machine": 0}', "[]", "{"):
        (runs[0]["folder"] / "config.json").write_text(text)
        with refuses(f"{runs[0]['folder'].name} has a damaged config.json"):
            data.measured(runs, "fid", {})


@pytest.mark.parametrize("module, name, flags, metric", [
    (ivgen, "ivaae-2", "--dataset PICTURES --width 4 --batch 8 --samples 50", "fld"),
    (ivgen, "ivaae-fig3", "--dataset PICTURES --width 4 --batch 8 --samples 50", "gradient"),
    (aim, "2", "--width 8 --batch 50 --samples 100", "modes"),
    (latentmap, "fig4", "--width 8 --batch 50 --samples 100", "chamfer")])
@pytest.mark.usefixtures("flags_of")  # on fewer points
def test_a_table_by_one_command(module, name, flags, metric, pictures, monkeypatch, tmp_path,
                                capsys):
    """Trains two rows, goes on where it was stopped, then prints published beside measured."""
    table = module.TABLES[name]
    rows = dict(list(table["rows"].items())[:2])
    monkeypatch.setitem(module.TABLES, name, table | {"rows": rows})
    probe = ivgen.probe_discriminator
    monkeypatch.setattr(ivgen, "probe_discriminator", lambda net, x, _: probe(net, x, 9))
    command = ["--table", name, "--out", tmp_path / "t", "--steps", 2, "--eval-every", 1,
               "--root", tmp_path, "--device", "cpu",
               *flags.replace("PICTURES", str(pictures)).split()]
    assert cli(module, *command, "--report") == 0
    assert "2 of 2 runs are not finished" in capsys.readouterr().out
    assert not (tmp_path / "t").exists()
    step = data.Run.add
    monkeypatch.setattr(data.Run, "add", lambda self, n, losses: [
        step(self, n, losses), setattr(self, "signal", signal.SIGINT)])
    assert cli(module, *command) == 130                         # Ctrl-C in the first row
    monkeypatch.setattr(data.Run, "add", step)
    assert cli(module, *command, "--seeds", 1) == 0
    out = capsys.readouterr().out
    assert "Departures from the paper, in every row: --steps 2" in out
    assert out.count("\nrun: ") == 2
    lines = [json.loads(line) for line in (tmp_path / "t/results.jsonl").read_text().splitlines()]
    assert {line["row"] for line in lines} == set(rows)
    for line in lines:
        assert {"command", "protocol", "machine", "versions", "precision", "seed"} <= line.keys()
        assert math.isfinite(line["value"])
    assert metric in {line["key"] for line in lines}
    for log in (tmp_path / "t").glob("*/log.jsonl"):
        log.write_text('{"st\n' + log.read_text())              # a line torn by a kill
    assert cli(module, *command) == 0                           # nothing is left to train
    assert "\nrun: " not in capsys.readouterr().out
    assert cli(module, *command[:3], tmp_path / "u", *command[4:], "--bogus", 1) == 2
    assert capsys.readouterr().out.count("unrecognized arguments: --bogus 1") == 1
    with pytest.raises(SystemExit):
        cli(module, *command, "--help")
    assert "--seeds" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")  # another than the first prints and writes nothing
    assert cli(module, *command) == 0 and not capsys.readouterr().out
    monkeypatch.delenv("RANK")
    found = (tmp_path / "t/results.jsonl").read_text()
    other = found.replace(f"{module.FILE}-table{name}", "another table")
    # Publishing a result is appending these lines to assets/results.jsonl.
    assert render(f"{module.FILE}-table{name}", lines).count("\n") == len(rows) + 1  # header, rule
    for wrong, words, held in ((["--seed", 1], "sets", found), (["--seeds", 0], "out of", found),
                               (["--no-authors"], "sets", found),
                               (["--table", "nine"], "invalid choice", found),
                               (["--steps", 3], "was trained by", found),
                               ([], "holds other results", other)):
        (tmp_path / "t/results.jsonl").write_text(held)  # which stays as it is
        assert cli(module, *command, *wrong) == 2 and words in capsys.readouterr().err
        assert (tmp_path / "t/results.jsonl").read_text() == held


@pytest.mark.parametrize("module", PAPERS)
def test_no_run_of_a_table_is_trained_for_another(module):
    """Runs of equal settings, however their flags are written, lie in one folder."""
    found = {}
    for name, table in module.TABLES.items():
        for run in data.table_runs(module.FILE, table, 2, [], Path(table.get("runs", name))):
            settings = repr(settings_from(module, *run["flags"]))
            assert found.setdefault(settings, run["folder"]) == run["folder"]


def test_tables_of_the_same_runs(pictures, monkeypatch, tmp_path, capsys):
    """The second trains nothing, the third only probes. Each has its own numbers."""
    monkeypatch.chdir(tmp_path)
    probe = ivgen.probe_discriminator
    monkeypatch.setattr(ivgen, "probe_discriminator", lambda net, x, _: probe(net, x, 3))
    flags = ["--dataset", pictures, "--width", 4, "--batch", 8, "--samples", 50, "--steps", 1]
    for name, trained, probed, change in (
            ("ivaae-2", 2, 0, {}), ("ivaae-1", 0, 0, {}),
            ("ivaae-fig5", 0, 2, {"probe": "discriminator", "columns": [("loss", "", "loss")]})):
        rows = {row: ivgen.TABLES[name]["rows"][row] for row in ("AAE (WAE-GAN)", "IVAAE, radial")}
        monkeypatch.setitem(ivgen.TABLES, name, ivgen.TABLES[name] | {"rows": rows} | change)
        before = {path: path.read_bytes() for path in Path("runs").glob("*/*/*.*")}
        assert cli(ivgen, "--table", name, "--device", "cpu", *flags) == 0
        out = capsys.readouterr().out
        assert out.count("\nrun: ") == trained and out.count("after_step") == probed
        assert all(path.read_bytes() == whole for path, whole in before.items())
    assert len(list(Path("runs/ivgen-tableivaae-1").glob("*/last.pt"))) == 2
    for name, key in (("ivaae-2", "fld"), ("ivaae-fig5", "loss")):
        lines = data.json_lines(Path(f"runs/ivgen-table{name}/results.jsonl"))
        assert [(line["row"], line["key"]) for line in lines] == [(row, key) for row in rows]


# ==================================================================================================
# speed: each method's step as the reader of its paper would first write it, beside ours
# ==================================================================================================
# Forwards are repeated for each network, in float32, NCHW, with Adam as it comes. `python
# test_all.py --bench` alternates these with the files' own steps.


def plain(net, *names):
    """Copies of a model's networks, NCHW, each with its own Adam: [(network, Adam)]."""
    made = []
    for name in names:
        mine = getattr(net, name)
        first = next(mine.parameters())
        group = next(g for o in data.optimisers_of(net).values() for g in o.param_groups
                     if any(p is first for p in g["params"]))
        network = copy.deepcopy(mine).to(memory_format=torch.contiguous_format)
        made.append((network, torch.optim.Adam(network.parameters(), group["lr"], group["betas"],
                                               group["eps"])))
    return made


def plain_ivgan_step(net):
    """Algorithm 1 of IVGAN, for IVLSGAN without instance noise. Returns step(x)."""
    c = net.config
    made = plain(net, "G", "D", "E")
    (G, adam_g), (D, adam_d), (E, adam_e) = made

    def step(x):
        z = torch.randn(len(x), c.latent)
        index = torch.randint(c.k, (len(x),))
        noise = torch.randn(len(x), c.latent)

        adam_d.zero_grad()                                      # lines 9-12
        x_i = G(ivgen.block_substitute(E(x), index, c.k, noise))
        d_adv = ivgen.adversarial_loss_d(c.loss, D(x)[0], D(G(z).detach())[0])
        (d_adv + c.mu * F.cross_entropy(D(x_i.detach())[1], index)).backward()
        adam_d.step()

        def penalties():
            w = E(x)
            w_i = ivgen.block_substitute(w, index, c.k, noise)
            x_i = G(w_i)
            rec = (G(w) - x).abs().mean() + (E(x_i) - w_i).abs().mean()
            return rec, -F.cross_entropy(D(x_i)[1], index)

        adam_g.zero_grad()                                      # lines 13-15
        rec, iv = penalties()
        g_adv = ivgen.adversarial_loss_g(c.loss, D(G(z))[0])
        (g_adv + c.lam * rec + c.mu * iv).backward()
        adam_e.zero_grad()                                      # lines 16-17, from the same point
        gradients = [p.grad.clone() for p in G.parameters()]
        rec, iv = penalties()
        (c.lam_e * rec + c.mu_e * iv).backward()
        for p, gradient in zip(G.parameters(), gradients):
            p.grad = gradient
        adam_g.step()
        adam_e.step()

    return step, [network for network, _ in made]


def plain_aim_step(net):
    """Algorithm 1 of AIM. Returns step(x)."""
    made = plain(net, "G", "features", "critic", "E")
    (G, adam_g), (features, adam_f), (critic, adam_c), (E, adam_e) = made

    def step(x):
        z = torch.randn(len(x), net.latent)
        for adam in (adam_f, adam_c):
            adam.zero_grad()
        aim.gan_loss_of_d(critic(features(x)), critic(features(G(z).detach()))).backward()
        gradients = [p.grad.clone() for m in (features, critic) for p in m.parameters()]
        for adam in (adam_g, adam_e):
            adam.zero_grad()
        h = features(G(z))
        mu, log_var = E(h)
        nll = aim.posterior_nll(z, mu, log_var).mean()
        (aim.gan_loss_of_g(critic(h)) + net.lam * nll).backward()
        for p, gradient in zip([*features.parameters(), *critic.parameters()], gradients):
            p.grad = gradient
        for adam in (adam_f, adam_c, adam_g, adam_e):
            adam.step()

    return step, [network for network, _ in made]


def plain_ivaae_step(net):
    """Algorithm 1 of IVAAE. Returns step(x)."""
    c = net.config
    made = plain(net, "E", "G", "D")
    (E, adam_e), (G, adam_g), (D, adam_d) = made

    def loss_iv(chain):
        logits = torch.stack([D(z_k) for z_k in chain])
        return ivgen.bridge_loss(logits)

    def bridges(z, noises):
        made = [ivgen.radial_substitute(z, k, c.t, n) for k, n in enumerate(noises, 1)]
        return [z, *made]

    def step(x):
        noises = [torch.randn(len(x), c.latent) for _ in range(c.t)]
        adam_d.zero_grad()                                      # lines 10-11
        chain = [z_k.detach() for z_k in bridges(E(x), noises)]
        (c.mu1 / (c.t + 1) * loss_iv(chain)).backward()
        adam_d.step()
        adam_g.zero_grad()                                      # lines 13-14
        (c.lam * ivgen.squared_error(G(E(x)), x)).backward()
        gradients = [p.grad.clone() for p in G.parameters()]
        adam_e.zero_grad()                                      # lines 15-16
        z = E(x)
        rec = c.lam * ivgen.squared_error(G(z), x)
        (rec - c.mu2 / (c.t + 1) * loss_iv(bridges(z, noises))).backward()
        for p, gradient in zip(G.parameters(), gradients):
            p.grad = gradient
        adam_g.step()
        adam_e.step()

    return step, [network for network, _ in made]


def plain_latentmap_step(net):
    """The first phase of LatentMap, Eqs. (9) and (10). Returns step(x)."""
    c = net.config
    made = plain(net, "E", "G", "d")
    (E, adam_e), (G, adam_g), (d, adam_d) = made
    norm = copy.deepcopy(net.normalise)

    def step(x):
        for _ in range(c.critic_steps):
            adam_d.zero_grad()
            code = norm(E(x))
            mu = torch.rand(len(x)) / 2
            x_mu = G(latentmap.interpolate(code, mu)).detach()
            mixed = (c.gamma * x + (1 - c.gamma) * G(code)).detach()
            latentmap.critic_loss(d(x), d(mixed), d(x_mu), mu, c.lam).backward()
            adam_d.step()
        adam_e.zero_grad()
        adam_g.zero_grad()
        code = norm(E(x))
        x_mu = G(latentmap.interpolate(code, torch.rand(len(x)) / 2))
        x_hat = G(code)
        latentmap.autoencoder_loss(x, x_hat, d(x_mu), d(x_hat), c.omega1, c.omega2).backward()
        adam_e.step()
        adam_g.step()

    return step, [network for network, _ in made]


PLAIN = {  # of each method: its plain step, networks, file, system, data set, settings of the test
    "IVLSGAN 64 x 64": (plain_ivgan_step, "GDE", ivgen, "ivlsgan", "cifar10", dict(width=4)),
    "AIM, MNIST": (plain_aim_step, "", aim, "aim", "mnist", dict(width=8)),
    "AIM, points": (plain_aim_step, "", aim, "aim", "grid25", dict(width=20)),
    "LatentMap 32 x 32": (plain_latentmap_step, "EGd", latentmap, "latentmap", "mnist",
                          dict(width=4)),
    "IVAAE, MNIST": (plain_ivaae_step, "EGD", ivgen, "ivaae-rad", "mnist", dict(width=16)),
}


def models_of(name, amp="off", **changes):
    """(our model, a batch, the plain step on copies of its networks, those copies)."""
    make, _, module, model, dataset, _ = PLAIN[name]
    config = module.preset(model, dataset)
    names = {field.name for field in dataclasses.fields(config)}
    changes = {"noise_schedule": (), **changes}
    config = dataclasses.replace(config, **{k: v for k, v in changes.items() if k in names})
    channels = {"cifar10": 3, "grid25": 2}.get(dataset, 1)
    torch.manual_seed(0)
    net = module.build(config, module.Machine("cpu", amp), channels)
    shape = [config.batch, channels, *[config.size or 1] * (2 if config.size else 0)]
    for optimiser in data.optimisers_of(net).values():
        for group in optimiser.param_groups:
            group["eps"] = changes.get("eps", group["eps"])
    return net, torch.rand(shape) * 2 - 1, *make(net)


@pytest.mark.parametrize("name", [name for name in PLAIN if name[:9] != "LatentMap"])
def test_our_step_is_the_plain_one(name):
    """With a large epsilon Adam moves along its gradients. LatentMap's d has spectral norm, whose
    power iteration counts forwards: its equations are compared in its own section."""
    _, names, *_, small = PLAIN[name]
    net, x, step, networks = models_of(name, batch=6, latent=8, eps=1.0, **small)
    names = names or ["G", "features", "critic", "E"]
    before = [copy.deepcopy(network) for network in networks]
    for seed in range(2):
        torch.manual_seed(seed)
        net.step(x)
        torch.manual_seed(seed)
        step(x)
    for mine, other, old in zip(names, networks, before):
        vectors = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in
                   (getattr(net, mine), other, old)]
        assert (vectors[0] - vectors[1]).norm() < 1e-3 * (vectors[1] - vectors[2]).norm(), mine


def bench(rounds=5, seconds=2.0):
    """`--bench`: plain and ours in turn; a JSON line for each method and precision."""
    for name in PLAIN:
        for amp in ("off", "bf16"):
            net, x, step, _ = models_of(name, amp)
            times = {"plain": [], "ours": []}
            for turn in range(rounds + 1):
                for which, run in (("plain", step), ("ours", net.step)):
                    n = 0
                    began = time.perf_counter()
                    while time.perf_counter() - began < seconds:
                        run(x)
                        n += 1
                    if turn:                                    # the first round warms up
                        times[which].append(n * len(x) / (time.perf_counter() - began))
            middle = {which: float(np.median(rates)) for which, rates in times.items()}
            print(json.dumps({"method": name, "precision": amp, "rounds": rounds,
                              **{f"{k}_per_s": round(v, 1) for k, v in middle.items()},
                              "ratio": round(middle["ours"] / middle["plain"], 2),
                              "machine": data.versions()["machine"]}), flush=True)


# ==================================================================================================
# Results: README.md and assets/RESULTS.md, whose tables are written from assets/results.jsonl
# ==================================================================================================

PAGES = (HERE / "README.md", HERE / "assets/RESULTS.md")
PICTURES = str(HERE / "assets")
STAND_INS = {"S": "0", "DIR": PICTURES, "path/to/pictures": PICTURES}     # what a user fills in
SUMMARY = [  # the README's table: paper, command; table, row and metric in results.jsonl
    ("AIM, Table 2", "python aim.py", "aim-grid", "AIM", "modes of 25"),
    ("AIM, Table 2", "python aim.py", "aim-grid", "AIM", "high quality, %"),
    ("AIM, Table 1", "python aim.py --dataset mnist", "aim-table1", "AIM", "inception score MNIST"),
    ("AIM, Table 1", "python aim.py --dataset mnist", "aim-table1", "AIM", "MSE MNIST"),
    ("IVAAE, Table 2", "python ivgen.py --dataset mnist --model aae --epochs 50", "ivaae-mnist",
     "AAE (WAE-GAN)", "FLD"),
    ("IVAAE, Table 2", "python ivgen.py --dataset mnist --model ivaae-rad --epochs 50",
     "ivaae-mnist", "IVAAE, radial", "FLD"),
    ("LatentMap, Fig. 4", "python latentmap.py", "roll", "LatentMap", "generated: Chamfer"),
    ("IVGAN", "python ivgen.py", "digits", "IVLSGAN", "fcd"),
]
LINK = r"(?:\]\(|^\[[^]]+\]: )(?!http)([^)#\s]*)#?([^)\s]*)"    # [text](target#anchor), [name]: ...
TOOLS = ("here", "pytorch-fid", "torch-fidelity", "torchmetrics")
PEERS = [  # the README's five rows of the metrics tables: metric, and the row of each tool
    ("images/s", "features, {}"),
    ("seconds", "Fréchet distance, n = 10,000, {}"),
    ("peak memory, MiB", "FID of 2 × 10,000 JPEGs, {}"),
    ("relative difference", "FID, MNIST against JPEG folder, against {} (n = 2,080)"),
    ("relative difference",
     "KID, same features, MNIST against JPEG folder, against {} (n = 1,000)"),
]


def results():
    """The lines of assets/results.jsonl: a measured number each, and how to measure it again."""
    text = (HERE / "assets/results.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def result_line(lines, row, metric):
    return next((x for x in lines if x["row"] == row and x["metric"] == metric), None)


def number(value, std=None, n=None):
    """A number as the tables print it: with the deviation over n seeds; None: a dash."""
    if value is None:
        return "–"
    text = f"{value:,}" if isinstance(value, int) else data.rounded(value, 4)
    return text if std is None else f"{text} ± {data.rounded(std, 2)} ({n})"


def cell(line):
    return "–" if line is None else number(line["value"], line.get("std"), line.get("n_seeds"))


def markdown_table(heads, rows, words=1):
    """The first `words` columns are words, the others numbers."""
    rule = ["---"] * words + ["---:"] * (len(heads) - words)
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, rule, *rows])


def render(table, lines):
    """A table of RESULTS.md: a row a system; a metric's published values stand beside ours."""
    lines = [line for line in lines if line["table"] == table]
    names = list(dict.fromkeys(line["metric"] for line in lines))
    published = {line["metric"] for line in lines if line.get("published") is not None}
    heads = [""]
    for name in names:
        heads += [f"{name}, paper", f"{name}, here"] if name in published else [name]
    rows = []
    for row in dict.fromkeys(line["row"] for line in lines):
        rows.append([row])
        for name in names:
            line = result_line(lines, row, name)
            if name in published:
                rows[-1].append(number(line and line.get("published")))
            rows[-1].append(cell(line))
    return markdown_table(heads, rows)


def render_summary(lines):
    """The README's table. IVAAE's values of epoch 50 stand beside those published for 300."""
    rows = []
    for paper, command, table, row, metric in SUMMARY:
        line = result_line([line for line in lines if line["table"] == table], row, metric)
        text = "picture" if "Fig." in paper else number(line["published"])
        rows.append([paper, f"{row}, {metric}", f"`{command}`", text, cell(line)])
    return markdown_table(["paper", "system, metric", "command", "published", "ours"], rows, 3)


def render_peers(lines):
    """Five rows of metrics-agreement and metrics-speed, a column a tool."""
    rows = []
    for metric, pattern in PEERS:
        what = re.sub(r",( against)? \{\}", "", pattern)
        cells = [cell(result_line(lines, pattern.format(tool), metric)) for tool in TOOLS]
        rows.append([f"{what}: {metric}", *cells])
    return markdown_table(["", *TOOLS], rows)


def settings_of_command(command):
    """The settings that a command asks for, without those that do not change what is measured.

    Raises UserError for a flag that the system does not have. Of "a; b" it reads a.
    """
    words = command.partition(";")[0].split()
    at = next(n for n, word in enumerate(words) if word.endswith(".py"))
    paper = next(paper for paper in PAPERS if words[at] == f"{paper.FILE}.py")
    settings = settings_from(paper, *(STAND_INS.get(word, word) for word in words[at + 1:]))
    return dataclasses.replace(settings, root="data", seed=0, eval_every=None)


def published_cells():
    """The published numbers of TABLES: (cell, value, command).

    The cell is (file, table, system, heading), so that "SYSTEM (own settings)" is another way to
    measure a number of SYSTEM; None for a number which is not the paper's own but PacGAN's.
    """
    for paper in PAPERS:
        for name, table in paper.TABLES.items():
            for row, (flags, *values) in table["rows"].items():
                for (heading, dataset, _), value in zip(table["columns"], values):
                    cell = (paper.FILE, name, row.removesuffix(" (own settings)"), heading)
                    if "published by" in table["title"] + row or row.startswith("PacGAN"):
                        cell = None
                    if value is not None:
                        yield cell, value, f"{paper.FILE}.py --dataset {dataset} {flags}"


def render_count(lines):
    """How many published numbers have been measured at the paper's recipe, as a sentence.

    A number of TABLES counts as measured if a line of results.jsonl names it as its published value
    and the line's command asks for the settings of its row in TABLES, nothing shorter or smaller.
    What a paper does not print of its recipe is ours there.
    """
    done = [(settings_of_command(line["command"]), line["published"]) for line in lines
            if line.get("published") is not None]
    cells = set()
    found = {}  # cell: whether it is of points
    for cell, value, command in published_cells():
        if cell:
            settings = settings_of_command(command)
            cells.add(cell)
            if (settings, value) in done:
                found[cell] = settings.dataset in data.POINT_SETS
    return (f"The papers print {len(cells)} numbers. {len(found)} are measured here at full length "
            f"and size; {sum(found.values())} of these are on points, whose recipe is ours, since "
            "none is printed.")


def filled(text):
    """A page with each `<!-- table NAME -->` ... `<!-- end -->` written from the results."""
    lines = results()
    special = {"summary": render_summary, "peers": render_peers, "count": render_count}

    def fill(match):
        name = match[1]
        content = special[name](lines) if name in special else render(name, lines)
        return f"<!-- table {name} -->\n{content}\n<!-- end -->"

    return re.sub(r"<!-- table (\S+) -->.*?<!-- end -->", fill, text, flags=re.DOTALL)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_tables_of_a_page_are_the_results(path):
    text = path.read_text()
    assert text == filled(text), "python test_all.py rewrites the tables"


def test_every_result_stands_in_a_table_and_can_be_measured_again():
    names = re.findall(r"<!-- table (\S+) -->", PAGES[1].read_text())
    assert {line["table"] for line in results()} == set(names) - {"count"}
    cells = set()
    for _, value, command in published_cells():
        settings = settings_of_command(command)
        cells.add((type(settings), settings.model, settings.dataset, value))
    for line in results():
        assert {"table", "row", "metric", "command", "protocol", "machine", "versions"} <= set(line)
        assert line["value"] is not None
        if line.get("key") == "fid" or "fid" in line["metric"].lower().split():
            assert "2015 Inception features" in line["protocol"]
        first = line["command"].partition(";")[0]
        if re.match(r"python (ivgen|aim|latentmap)\.py", first) and "--resume" not in first:
            settings = settings_of_command(first)               # every flag still exists
            if line.get("published") is not None:
                name = (type(settings), settings.model, settings.dataset, line["published"])
                assert name in cells, line


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_names_only_what_is_there(path):
    text = path.read_text()
    for target, anchor in re.findall(LINK, text, re.MULTILINE):
        there = path.parent / target if target else path
        assert there.exists(), target
        headings = re.findall(r"^#+ (.*)", there.read_text(), re.MULTILINE) if anchor else []
        anchors = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
        assert not anchor or anchor in anchors, anchor
    for name in re.findall(r"\]\[([^]]+)\]", text):
        assert f"\n[{name}]: " in text, name
    for command in re.findall(r"(?:ivgen|aim|latentmap)\.py(?: [^`\n#]*)?(?=[`\n#])", text):
        words = command.split()
        if "--table" in words:
            paper = next(paper for paper in PAPERS if paper.FILE in words[0])
            assert "--table" == words[-1] or words[words.index("--table") + 1] in paper.TABLES
        elif not {"--resume", "--help"} & set(words):
            settings_of_command(command)                        # a wrong flag raises UserError


def test_the_notebook_example_runs():
    code = re.search(r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL)[1]
    names = {}
    exec(code.replace("range(100)", "range(1)"), names)
    assert names["images"].shape == (16, 1, 32, 32)


if __name__ == "__main__":
    if "--bench" in sys.argv:
        bench()
    else:
        for page in PAGES:
            page.write_text(filled(page.read_text()))
