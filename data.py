"""Every dataset as one tensor, and batches of it on the device.

    dataset = load("digits")                             # x uint8 (60000, 1, 28, 28), y int64 (60000,)
    batches = Batches(dataset, batch=64, device="cuda")  # endless, shuffled, resumable
    x, y = next(batches)                                 # x float32 (64, 1, 28, 28) in [-1, 1], on the device
    for x, y in ordered(load("digits", split="test"), n=1000): ...   # always the same pictures in the same order

A whole dataset is small beside the memory of the machine that trains on it (CIFAR-10: 150 MB as bytes). So it is
decoded once, held as bytes and moved to the device once, and a batch is one `index_select`; resizing and scaling to
[-1, 1] happen on the device. There are no worker processes, and where a run stands in its data is two integers.

| name | train / test | what |
|---|---|---|
| `digits` | 60,000 / 10,000 | drawn here from pen strokes: 28x28, grey, 10 classes, no download |
| `stacked-digits`, `stacked-mnist` | 60,000 / 10,000 digits | three at random as red, green and blue: 1,000 modes |
| `mnist`, `fashion-mnist`, `cifar10` | as published | through torchvision; downloaded and checked when absent |
| `stl10` | 105,000 / 8,000 | train = its train + unlabeled pictures, so without labels |
| `celeba` | 162,770 / 19,962 | 140-pixel centre crop, then resized |
| `lsun-church` | 126,227 / 300 | church_outdoor, from LSUN's lmdb files (needs the package lmdb) |
| a folder | all, or its `train` / `test` | pictures, or a folder of pictures for each class |
| `grid25`, `ring8` | 100,000 / 10,000 points | Gaussians on a grid (std .05) and on a circle of radius 2 (std .02) |
| `swissroll` | 5,000 / 5,000 points | a spiral in the plane |

`python data.py NAME` draws a sheet of a hundred pictures: look at what you train on.
"""

import argparse
import contextlib
import difflib
import hashlib
import io
import math
import os
import socket
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import Tensor


class UserError(ValueError):
    """A mistake the user can mend: the command lines print it as one sentence and leave with exit code 2."""


@dataclass
class Dataset:
    """One split of one dataset, whole.

    x: images uint8 (N, C, H, W) in 0..255, or points float32 (N, 2). y: int64 (N,) in 0..classes-1, or None.
    A stacked set holds its digits (N, 1, 28, 28) with their labels 0..9; Batches and ordered make the triples.
    """

    name: str  # as asked for; of a folder its own name
    split: str  # "train" or "test": what it really holds (a folder without test/ gives "train" for both)
    x: Tensor
    y: Tensor | None
    classes: int  # 0 when unlabelled, 1000 for stacked sets
    stacked: bool = False

    @property
    def kind(self) -> str:
        return "points" if self.x.is_floating_point() else "images"

    @property
    def channels(self) -> int:
        return 3 if self.stacked else self.x.shape[1]

    def __len__(self) -> int:
        return len(self.x)


IMAGE_SETS = ("digits", "stacked-digits", "mnist", "stacked-mnist", "fashion-mnist", "cifar10", "stl10", "celeba",
              "lsun-church")
POINT_SETS = ("grid25", "ring8", "swissroll")


def load(name: str, root="data", size: int | None = None, split: str = "train") -> Dataset:
    """The whole of a dataset's `split` ("train" or "test"), the same at every call.

    root: where downloads and the cache of decoded pictures live.
    size: for folders, `celeba` and `lsun-church`, the pixels to decode to (default: the pictures' own size, 64, 64).
        The other sets keep the one size they come in: Batches and ordered resize on the device.
    Raises UserError for an unknown name, a dataset that cannot be had, a folder that cannot be used.
    """
    name = str(name)
    if split not in ("train", "test"):
        raise UserError(f"there is no split '{split}': it is train or test")
    if size is not None and size < 8:
        raise UserError(f"a size of {size} pixels is too small: give 8 or more")
    if name in POINT_SETS:
        return _points(name, split)
    if name == "celeba":
        return _celeba(root, size or 64, split)
    if name == "lsun-church":
        return _lsun(root, size or 64, split)
    if name in IMAGE_SETS:
        return _fixed_size(name, root, split)
    folder = Path(os.path.abspath(os.path.expanduser(name)))  # not resolve(): a link keeps its own name
    if not name or os.path.isfile(folder):
        raise UserError(f"'{name}' is {'a file' if name else 'no name'}: give a folder of pictures, or the name of a set")
    if os.path.isdir(folder):
        try:
            return _folder(folder, root, size, split)
        except OSError as error:  # no permission
            raise UserError(f"{folder} cannot be read ({error})") from None
    wanted = f"give a folder of pictures or one of {', '.join(IMAGE_SETS + POINT_SETS)}"
    if any(mark in name for mark in "/\\~."):
        raise UserError(f"there is no folder {name}: {wanted}")
    close = difflib.get_close_matches(name.lower(), IMAGE_SETS + POINT_SETS, n=1, cutoff=0.5)
    raise UserError(f"there is no dataset '{name}'{f', perhaps {close[0]} is meant' if close else ''}: {wanted}")


# ------------------------------------------------------------------------------------- bytes, floats, batches


def to_float(u8: torch.Tensor, size: int | None = None) -> torch.Tensor:
    """uint8 (B, C, H, W) -> float32 in [-1, 1]; (B, C, size, size), bilinear and antialiased, if that differs."""
    if u8.dtype != torch.uint8:
        raise ValueError(f"to_float takes uint8 images, not {u8.dtype}")
    x = u8.float()
    if size and x.shape[-2:] != (size, size):
        # Without antialiasing a reduction would skip pixels; FID reacts to that more than to most changes of a model.
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    return x.div_(127.5).sub_(1)


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """float in [-1, 1] -> uint8, rounded (truncation would darken) and clamped; undoes to_float exactly."""
    return x.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def _take(x: Tensor, y: Tensor | None, index: Tensor, size: int | None, device) -> tuple[Tensor, Tensor | None]:
    """Items `index` of a dataset as the networks want them; index (B,), or (B, 3) for the triples of a stacked set."""
    device = torch.device(device)

    def fetch(t: Tensor) -> Tensor:
        t = t.index_select(0, index.flatten())
        if t.device.type == "cpu" and device.type == "cuda":
            t = t.pin_memory()  # or else non_blocking would not let the copy run beside the computation
        return t.to(device, non_blocking=True)

    x, y = fetch(x), None if y is None else fetch(y)
    if index.dim() == 2:
        x = x.view(len(index), 3, *x.shape[2:])  # (3B, 1, H, W), a triple's digits adjacent -> (B, 3, H, W)
        y = y[0::3] * 100 + y[1::3] * 10 + y[2::3]  # red, green, blue -> 0..999
    return (to_float(x, size) if x.dtype == torch.uint8 else x), y


class Batches:
    """Endless iterator over shuffled training batches.

    Yields x float32 (batch, C, size, size) in [-1, 1] (points: (batch, D)) on `device`, and y int64 (batch,) or None.
    Each epoch is a fresh permutation that depends on (seed, epoch) alone, so the state is two integers and a resumed
    run sees what it would have seen. Rank r of `world` takes each world-th item of that one permutation, all ranks the
    same count; what does not fill a last batch is left out of that epoch. Stacked sets: three permutations an epoch.
    Raises UserError if a rank's share is smaller than a batch.
    """

    def __init__(self, dataset: Dataset, batch: int, device="cpu", size: int | None = None, seed: int = 0,
                 rank: int = 0, world: int = 1):
        if batch < 1:
            raise UserError(f"a batch of {batch} is no batch: give 1 or more")
        self.share = len(dataset) // world
        self.steps_per_epoch = self.share // batch
        if self.steps_per_epoch == 0:
            raise UserError(f"a batch of {batch} is more than the {self.share:,} items of {dataset.name}"
                            f"{' for each device' if world > 1 else ''}: give a smaller one")
        self.batch, self.size, self.seed, self.rank, self.world = batch, size, seed, rank, world
        self.device, self.stacked = torch.device(device), dataset.stacked
        self.x, self.y = dataset.x, dataset.y
        # A quarter of what is free there leaves room for training. A larger set stays here and its batches are copied.
        if self.device.type != "cuda" or self.x.nbytes < torch.cuda.mem_get_info(self.device)[0] / 4:
            self.x, self.y = self.x.to(self.device), None if self.y is None else self.y.to(self.device)
        self.epoch, self.position = 0, 0  # epochs completed; batches drawn of the one under way
        self._order, self._order_of = None, -1

    def _shuffle(self) -> Tensor:
        """This rank's items of the current epoch, (share,), or (share, 3) if stacked; lies where the data lie."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        orders = [torch.randperm(len(self.x), generator=generator) for _ in range(3 if self.stacked else 1)]
        mine = torch.stack(orders, 1)[self.rank : self.share * self.world : self.world]
        return (mine if self.stacked else mine[:, 0]).contiguous().to(self.x.device)

    def __iter__(self):
        return self

    def __next__(self) -> tuple[Tensor, Tensor | None]:
        if self._order_of != self.epoch:
            self._order, self._order_of = self._shuffle(), self.epoch
        index = self._order[self.position * self.batch : (self.position + 1) * self.batch]
        self.position += 1
        if self.position == self.steps_per_epoch:
            self.epoch, self.position = self.epoch + 1, 0
        return _take(self.x, self.y, index, self.size, self.device)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]):
        if not 0 <= state["position"] < self.steps_per_epoch:
            raise UserError(f"the saved run stands at batch {state['position']} of an epoch that now has "
                            f"{self.steps_per_epoch}: resume with its dataset, batch size and number of devices")
        self.epoch, self.position = state["epoch"], state["position"]


def ordered(dataset: Dataset, n: int | None = None, batch: int = 250, device="cpu", size: int | None = None,
            seed: int = 0):
    """The first n items (default and at most: all) in a fixed order; yields (x, y) as Batches does, the last one short.

    A set stored class by class, or without labels to tell, is first permuted by `seed`: its first n items might be of a
    few classes. Of a stacked set: n triples (default: as many as digits), drawn by `seed` with replacement.
    """
    generator, total = torch.Generator().manual_seed(seed), len(dataset)
    if dataset.stacked:
        index = torch.randint(total, (total if n is None else n, 3), generator=generator)
    elif dataset.kind == "images" if dataset.y is None else bool((dataset.y[1:] >= dataset.y[:-1]).all()):
        index = torch.randperm(total, generator=generator)[:n]
    else:
        index = torch.arange(total)[:n]
    for rows in index.split(batch) if len(index) else ():
        yield _take(dataset.x, dataset.y, rows.to(dataset.x.device), size, device)


# ------------------------------------------------------------------------------- digits, drawn from strokes

# Ours. One line is one way to write a digit: x,y in percent of the writing box, y downwards; "|" starts a new run, and
# a run is one smooth curve. Equal points are one point: runs that share it stay joined wherever it is moved (a corner),
# and a run that ends where it began is closed.
GLYPHS = (
    (0, "54,0 28,14 16,52 28,90 52,100 76,82 84,44 74,10 54,0"),
    (0, "62,4 34,10 22,50 30,94 52,98 72,70 76,30 62,4 46,2"),
    (1, "50,0 50,50 50,100"),
    (1, "32,22 44,14 54,0 | 54,0 52,50 52,100"),
    (2, "18,22 42,0 72,16 66,44 18,98 | 18,98 52,96 84,98"),
    (2, "20,18 46,0 72,20 58,58 28,94 12,88 30,76 56,92 88,94"),
    (3, "20,12 48,0 72,20 44,46 | 44,46 80,66 62,96 16,92"),
    (3, "20,4 76,2 | 76,2 46,40 | 46,40 80,60 68,92 40,100 14,88"),
    (4, "26,0 16,54 | 16,54 48,54 86,50 | 74,6 66,54 62,100"),
    (4, "66,0 12,66 | 12,66 88,64 | 66,0 64,50 66,100"),
    (5, "78,2 30,4 | 30,4 24,44 | 24,44 56,36 80,64 60,96 16,92"),
    (5, "32,8 26,46 | 26,46 62,42 74,74 48,100 16,88 | 32,6 82,0"),
    (6, "66,0 32,32 20,72 44,100 74,80 58,54 22,70"),
    (6, "48,0 26,38 24,80 50,100 76,80 60,58 28,72"),
    (7, "18,6 48,6 82,2 | 82,2 58,46 44,100"),
    (7, "18,6 80,4 | 80,4 42,100 | 36,54 78,50"),
    (8, "74,16 50,0 28,18 50,46 76,76 48,100 24,78 50,46 74,16"),
    (8, "50,0 28,22 50,46 74,22 50,0 | 50,46 22,74 50,100 80,74 50,46"),
    (9, "76,22 50,0 24,26 44,50 76,22 | 76,22 74,60 66,100"),
    (9, "74,18 46,2 26,28 48,48 74,18 | 74,18 76,62 56,98 24,92"),
)
SEGMENTS = 64  # of every glyph, each about a pixel or less: their sum below is then as good as an integral


def _spline(n: int, steps: int, closed: bool) -> Tensor:
    """Catmull-Rom through n points, as the matrix (steps + 1, n) that turns the points into points along the curve."""
    points = torch.eye(n)  # the curve is linear in its points, so that of the unit vectors is the matrix
    before = points[-2] if closed else 2 * points[0] - points[1]
    after = points[1] if closed else 2 * points[-1] - points[-2]
    padded = torch.cat([before[None], points, after[None]])
    t = torch.linspace(0, n - 1, steps + 1)
    k = t.long().clamp(max=n - 2)
    u = (t - k)[:, None]
    a, b, c, d = (padded[k + i] for i in range(4))
    return b + u / 2 * (c - a + u * (2 * a - 5 * b + 4 * c - d + u * (3 * (b - c) + d - a)))


@cache
def _glyph_tables() -> tuple[Tensor, Tensor, Tensor]:
    """The V glyphs, padded to K points: points (V, K, 2); ends (V, 2 * SEGMENTS, K), which gives the first and then the
    second ends of all segments; warp (V, K, K), which turns white noise into a smooth displacement of the points."""
    glyphs = [[[tuple(map(float, p.split(","))) for p in run.split()] for run in text.split("|")] for _, text in GLYPHS]
    most = max(len({p for run in runs for p in run}) for runs in glyphs)
    points, ends = torch.zeros(len(glyphs), most, 2), torch.zeros(len(glyphs), 2, SEGMENTS, most)
    for v, runs in enumerate(glyphs):
        unique = list(dict.fromkeys(p for run in runs for p in run))
        points[v, : len(unique)] = torch.tensor(unique)
        lengths = torch.tensor([sum(map(math.dist, run, run[1:])) for run in runs])
        stops = [0, *(lengths.cumsum(0) / lengths.sum() * SEGMENTS).round().long().tolist()]
        for run, start, stop in zip(runs, stops, stops[1:]):  # a run gets segments by its length
            to_unique = F.one_hot(torch.tensor([unique.index(p) for p in run]), most).float()
            curve = _spline(len(run), stop - start, closed=run[0] == run[-1]) @ to_unique
            ends[v, 0, start:stop], ends[v, 1, start:stop] = curve[:-1], curve[1:]
    # The elastic warp is a Gaussian random field (std 2.5 % of the box, changing over about 40 % of it) taken at the
    # points alone, since the curves follow; and 0.8 % of independent unsteadiness of the hand.
    distance2 = torch.cdist(points, points).square()
    covariance = 2.5**2 * torch.exp(-distance2 / (2 * 40**2)) + 0.8**2 * torch.eye(most)
    return points, ends.flatten(1, 2), torch.linalg.cholesky(covariance)


def _draw(glyph: Tensor, generator: torch.Generator) -> Tensor:
    """One picture of each index into GLYPHS: (B,) -> uint8 (B, 1, 28, 28), white on black, placed as in MNIST."""
    points, ends, warp = (table[glyph] for table in _glyph_tables())

    def normal(*shape):
        return torch.randn(len(glyph), *shape, generator=generator)

    def uniform(low, high):
        return low + (high - low) * torch.rand(len(glyph), 1, generator=generator)

    p = ends @ (points + warp @ normal(points.shape[1], 2))  # (B, 2 * SEGMENTS, 2)
    turn, slant, wide = 0.04 * normal(1), 0.18 + 0.08 * normal(1), uniform(0.9, 1.1)
    x, y = p[..., 0] * wide - slant * p[..., 1], p[..., 1]  # y points down, so minus leans to the right
    p = torch.stack([x * turn.cos() - y * turn.sin(), x * turn.sin() + y * turn.cos()], 2)

    # As MNIST was made: the longer side scaled to (about) 20 pixels, the centre of mass put in the picture's centre.
    half = uniform(0.95, 1.5)  # of the pen's width, pixels
    extent = (p.amax(1) - p.amin(1)).amax(1, keepdim=True)
    first, second = (p * ((uniform(17.5, 20.0) - 2 * half) / extent)[..., None]).chunk(2, 1)
    q, length = (first + second) / 2, (second - first).norm(dim=2, keepdim=True)  # (B, SEGMENTS, 2), (B, SEGMENTS, 1)
    q = q - (q * length).sum(1, keepdim=True) / length.sum(1, keepdim=True) + 13.5 + 0.4 * normal(1, 2)

    # The distance of each pixel to the strokes, as a smooth minimum over all segments. Along a straight line the
    # integral of exp(-|pixel - q|^2 / 2s^2) is s sqrt(2 pi) exp(-distance^2 / 2s^2), and the integrand is a factor in x
    # times one in y: the integral over the glyph, for all pixels, is one small matrix product. s rounds corners.
    s, grid = 0.7, torch.arange(28.0)
    # Cut off six pixels away, where all is black: further out are denormal numbers, which take many times as long.
    factor = (q[..., None] - grid).square_().mul_(-0.5 / s**2).clamp_(min=-40).exp_()  # (B, SEGMENTS, 2, 28)
    factor_x = factor[:, :, 0] * (length / (s * math.sqrt(2 * math.pi)))
    integral = factor[:, :, 1].transpose(1, 2) @ factor_x  # (B, 28 rows, 28 columns)
    distance = integral.log_().mul_(-2 * s * s).clamp_(min=0).sqrt_()
    ink = (0.5 + (half[..., None] - distance) / 1.2).clamp_(0, 1)  # an edge 1.2 pixels wide
    return (ink * 255).round_().to(torch.uint8)[:, None]


def draw_digits(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """n handwritten-looking digits: x uint8 (n, 1, 28, 28), y int64 (n,) = 0, 1, ... 9, 0, 1, ... Fixed by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 10
    digit = torch.tensor([d for d, _ in GLYPHS])
    count, start = digit.bincount(), torch.searchsorted(digit, torch.arange(10))
    glyph = start[y] + (torch.rand(n, generator=generator) * count[y]).long()
    # In pieces that fit the processor's caches, and by one thread: these are many small operations, and threads that
    # wait for each other at each are far slower than one as soon as the machine has anything else to do.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return torch.cat([_draw(part, generator) for part in glyph.split(500)]), y
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------------------- point sets and published sets


def mixture(name: str) -> tuple[Tensor, float] | None:
    """Means (K, 2) and standard deviation of the Gaussians of a point set: AIM's grid, or a ring; None for other names."""
    if name == "grid25":
        axis = torch.tensor([-4.0, -2.0, 0.0, 2.0, 4.0])
        return torch.cartesian_prod(axis, axis), 0.05
    if name == "ring8":
        angle = torch.arange(8) * (math.pi / 4)
        return 2 * torch.stack([angle.cos(), angle.sin()], 1), 0.02
    return None


def _points(name: str, split: str) -> Dataset:
    """Points in the plane, float32 (N, 2), labelled; train and test are different draws of the same distribution."""
    generator = torch.Generator().manual_seed({"train": 11, "test": 12}[split])
    if name == "swissroll":
        # The usual roll, t = 1.5 pi (1 + 2u), seen along its axis: (t cos t, t sin t), scaled into the unit disc. Ours:
        # LatentMap does not say how many dimensions its roll has; the depth of the 3-D roll is uniform and independent
        # of the rest, and without it data, reconstructions and 2-D codes are drawn alike. 5,000 points as in LatentMap.
        u = torch.rand(5_000, generator=generator)
        t = 1.5 * math.pi * (1 + 2 * u)
        x = torch.stack([t * t.cos(), t * t.sin()], 1) / (4.5 * math.pi)
        return Dataset(name, split, x, (10 * u).long(), 10)  # ten equal stretches of t, for colour
    centers, std = mixture(name)
    n = 100_000 if split == "train" else 10_000
    y = torch.randint(len(centers), (n,), generator=generator)
    return Dataset(name, split, centers[y] + std * torch.randn(n, 2, generator=generator), y, len(centers))


IDX_FILES = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte"
CELEBA_LISTS = "list_{eval_partition,attr_celeba,bbox_celeba,landmarks_align_celeba}.txt, identity_CelebA.txt"
BY_HAND = {  # where below root torchvision looks, and what has to be there
    "mnist": ("MNIST/raw", IDX_FILES),
    "fashion-mnist": ("FashionMNIST/raw", IDX_FILES),
    "cifar10": ("", "cifar-10-python.tar.gz"),
    "stl10": ("", "stl10_binary.tar.gz"),
    "celeba": ("celeba", f"{CELEBA_LISTS} and the folder img_align_celeba"),
}


def _torchvision(name: str, root, make):
    """make(download) -> a torchvision dataset: from what is in root, or else downloaded; UserError if neither works."""
    with contextlib.suppress(Exception):  # missing or damaged: what is wrong shows when the download does not mend it
        return make(False)  # never writes, so a root that may not be written to is as good
    place, files = Path(root) / BY_HAND[name][0], BY_HAND[name][1]
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # torchvision sets none and would wait for a silent server for ever
    try:
        if Path(root).is_dir() and not Path(root).stat().st_mode & 0o222:
            raise OSError("it is marked read-only")  # which does not stop the superuser
        print(f"{name} is not (whole) in {place}: downloading it", file=sys.stderr)
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            if not sys.stderr.isatty():  # a progress bar is for people
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            return make(True)
    except Exception as error:  # no network, a full disk, a wrong checksum, gdown missing: one sentence for all
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].rstrip(".")
        raise UserError(f"{name} could not be read from {place} nor downloaded to it ({reason}): to supply it by hand, "
                        f"put there {files}") from None
    finally:
        socket.setdefaulttimeout(patience)


def _fixed_size(name: str, root, split: str) -> Dataset:
    """The sets whose pictures all have one size: x as stored."""
    sets, train, base = torchvision.datasets, split == "train", name.removeprefix("stacked-")
    if base == "stl10":
        part = "train+unlabeled" if train else "test"
        got = _torchvision(base, root, lambda download: sets.STL10(root, part, download=download))
        # 95 % of the training pictures have no label, so none is given, in either split.
        return Dataset(name, split, torch.from_numpy(np.ascontiguousarray(got.data)), None, 0)
    if base == "digits":
        x, y = draw_digits(60_000, seed=1) if train else draw_digits(10_000, seed=2)
    else:
        kind = {"mnist": sets.MNIST, "fashion-mnist": sets.FashionMNIST, "cifar10": sets.CIFAR10}[base]
        got = _torchvision(base, root, lambda download: kind(root, train, download=download))
        x, y = torch.as_tensor(got.data), torch.as_tensor(got.targets).long()
        x = x.permute(0, 3, 1, 2).contiguous() if x.dim() == 4 else x[:, None]  # from (N, H, W, C) or (N, H, W)
    return Dataset(name, split, x, y, 10) if base == name else Dataset(name, split, x, y, 1000, stacked=True)


def _celeba(root, size: int, split: str) -> Dataset:
    """CelebA's aligned faces, 178x218: the central 140x140 (as IVAAE and WAE do), resized."""
    got = _torchvision("celeba", root, lambda download: torchvision.datasets.CelebA(root, split, download=download))
    folder = Path(root) / got.base_folder / "img_align_celeba"
    files = [str(folder / file) for file in got.filename]
    return Dataset("celeba", split, _pictures("celeba", split, folder, files, root, size, crop=140), None, 0)


def _lsun(root, size: int, split: str) -> Dataset:
    """LSUN's church_outdoor; test is its 300 `val` pictures."""
    part = "train" if split == "train" else "val"
    file = Path(root) / f"church_outdoor_{part}_lmdb" / "data.mdb"
    try:
        import lmdb
    except ImportError:
        raise UserError("lsun-church comes as an lmdb file: install the package with 'pip install lmdb'") from None
    if not file.is_file():
        raise UserError(f"lsun-church has no {file}: unpack church_outdoor_{part}_lmdb.zip from "
                        f"http://dl.yf.io/lsun/scenes/ in {root}")
    # Read here and not by torchvision's LSUN, which leaves a pickle of the keys in the current folder.
    damaged = UserError(f"{file} is damaged or was copied in part: unpack church_outdoor_{part}_lmdb.zip again")
    try:
        env = lmdb.open(str(file.parent), readonly=True, lock=False, readahead=False, meminit=False)
    except lmdb.Error:
        raise damaged from None
    if file.stat().st_size < (env.info()["last_pgno"] + 1) * env.stat()["psize"]:
        raise damaged  # lmdb maps the file: to read beyond its end would kill the process

    def read(key: bytes):
        with env.begin() as transaction:  # one for each picture: a transaction may not change threads
            return io.BytesIO(transaction.get(key))

    with env.begin() as transaction:
        keys = list(transaction.cursor().iternext(keys=True, values=False))
    if not keys:
        raise damaged
    return Dataset("lsun-church", split, _pictures("lsun-church", split, file, keys, root, size, read=read), None, 0)


# -------------------------------------------------------------------------------- folders of pictures, cached

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def _folder(folder: Path, root, size: int | None, split: str) -> Dataset:
    """A folder of pictures, or of one folder for each class; or with train/ and test/ (in any case) of either kind."""
    inside = {entry.name.lower(): entry for entry in folder.iterdir() if entry.is_dir()}
    train = inside.get("train", folder)
    base = inside.get("test", train) if split == "test" and train != folder else train
    beside = sorted(inside.keys() - {"train", "test", "val", "valid", "validation"}) if train != folder else []
    if beside and any(find_pictures(inside[name]) for name in beside if not name.startswith(".")):
        raise UserError(f"{folder} has pictures in train/ and beside it, in {', '.join(beside)}: are these classes, rename "
                        "train; else move them out")
    split = "train" if base == train else "test"
    files = find_pictures(base)
    if not files:
        raise UserError(f"there are no pictures ({' '.join(SUFFIXES)}) in {base}")
    found = _classes(base, files)
    # Numbered as in the training split, whatever the test split has of them.
    names = sorted(set(found if base == train else _classes(train, find_pictures(train))))
    if unknown := sorted(set(found) - set(names)):
        if "" in (unknown[0], names[0]):
            raise UserError(f"one of {train} and {base} has a folder for each class, the other has none: the two must agree")
        raise UserError(f"{base / unknown[0]} has pictures, but {train / unknown[0]} has none: the two must agree")
    x, y = _pictures(folder.name, split, base, files, root, size), None
    if len(names) > 1:  # a single class says nothing, so it is no label
        number = {name: i for i, name in enumerate(names)}
        y = torch.tensor([number[name] for name in found])
    return Dataset(folder.name, split, x, y, 0 if y is None else len(names))


def find_pictures(folder) -> list[str]:
    """The pictures at any depth below `folder`, in a fixed order; what is hidden is passed over."""
    found = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            found += find_pictures(entry.path)
        elif entry.name.lower().endswith(SUFFIXES):
            found.append(entry.path)
    return found


def _classes(base: Path, files: list[str]) -> list[str]:
    """For each file the folder of `base` that it is in, "" if it is in base itself; UserError if there are both."""
    parts = [file[len(str(base)) + 1 :].split(os.sep) for file in files]
    names = [part[0] if len(part) > 1 else "" for part in parts]
    if "" in names and any(names):
        raise UserError(f"{base} has pictures both beside and inside its folders ({max(names)}): keep one kind")
    return names


def cache_dir(root) -> Path:
    """root/cache, created if need be; ./data/cache where root is marked read-only or cannot be written to.

    The mode bits count as well as the system's answer, since the superuser may write anywhere. Raises UserError if
    neither place will do.
    """
    for place in (Path(root), Path("data")):
        folder = place / "cache"
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            if place.stat().st_mode & 0o222:
                folder.mkdir(exist_ok=True)
                if folder.stat().st_mode & 0o222 and os.access(folder, os.W_OK):
                    return folder
    raise UserError(f"neither {root} nor ./data can be written to: give a --root that can")


def _pictures(name: str, split: str, source: Path, items: list, root, size: int | None, crop: int | None = None,
              read=None) -> Tensor:
    """All pictures as uint8 (N, C, S, S): memory-mapped from a cache made from these very files, or else decoded.

    items: paths, or with `read` anything that read() turns into a file. The cache file's name says which source and
    size, `stamp` inside it which files: after a change it is replaced. All of a set has to fit in memory once, when it
    is decoded; later only the pages in use do.
    """
    stamp = hashlib.sha1(f"1 {crop}".encode())  # 1: count up when what is done to a picture changes
    for path in [source] if read else items:
        try:
            status = os.stat(path)
        except OSError as error:  # a link to nothing, or an archive unpacked in part
            raise UserError(f"{path}, a picture of {name}, cannot be found ({error.strerror})") from None
        stamp.update(os.fsencode(f"\n{path} {status.st_size} {status.st_mtime_ns}"))
    stamp, key = stamp.hexdigest(), hashlib.sha1(os.fsencode(os.path.abspath(source))).hexdigest()[:8]
    path = cache_dir(root) / f"{name}-{split}-{size or 'native'}-{key}.pt"
    try:
        saved = torch.load(path, mmap=True, weights_only=True)
        if saved["stamp"] == stamp:
            with zipfile.ZipFile(path) as whole:  # as all of torch's files: read once against its checksums
                if whole.testzip():
                    raise ValueError("checksum")
            return saved["x"]
    except FileNotFoundError:
        pass
    except Exception as error:  # cut short, overwritten, another program's: whatever it is, it is made anew
        print(f"{path} is damaged ({type(error).__name__}): made anew", file=sys.stderr)
    x = torch.from_numpy(_decode(name, items, size, crop, read))
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")  # renamed when whole, so nobody ever reads half a file
    try:
        torch.save({"stamp": stamp, "x": x}, unfinished)
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        print(f"{path} could not be written ({error}): it will be decoded again next time", file=sys.stderr)
    finally:  # Ctrl-C leaves none behind either
        with contextlib.suppress(OSError):
            unfinished.unlink()
    return x


def _decode(name: str, items: list, size: int | None, crop: int | None, read) -> np.ndarray:
    """Pictures -> uint8 (N, C, S, S), C = 1 if all are grey and else 3, in threads: Pillow lets go of Python's lock."""
    x, done, told, live = None, 0, time.monotonic(), sys.stderr.isatty()
    pool = ThreadPoolExecutor(min(16, os.cpu_count()))  # more would only queue for that lock
    try:
        chunks = [items[i : i + 64] for i in range(0, len(items), 64)]
        for pictures in pool.map(lambda chunk: [_picture(item, size, crop, read) for item in chunk], chunks):
            for picture in pictures:
                if x is None:
                    x = np.empty((len(items), *picture.shape), np.uint8)
                if picture.shape[1:] != x.shape[2:]:
                    raise UserError(f"the pictures of {name} differ in size ({items[0]}, {items[done]}): give a size")
                if len(picture) > x.shape[1]:  # the first in colour: those before it were grey
                    x = x.repeat(3, axis=1)
                x[done] = picture  # a grey one goes into all channels
                done += 1
            if done == len(items) or time.monotonic() - told > (0.2 if live else 10):
                end = "\r" if live and done < len(items) else "\n"
                print(f"decoding {name}: {done:,} of {len(items):,}", end=end, file=sys.stderr, flush=True)
                told = time.monotonic()
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, or Ctrl-C, the rest need not be decoded
    return x


def _picture(item, size: int | None, crop: int | None, read) -> np.ndarray:
    """One picture -> uint8 (C, S, S): upright, centre `crop`, shorter side to `size`, centre square."""
    try:
        with Image.open(read(item) if read else item) as image:
            image = _plain(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's decoders raise half a dozen kinds
        raise UserError(f"{item} cannot be read as a picture ({error}): replace or remove it") from None
    if min(image.size) < 8:
        raise UserError(f"{item} is only {image.width}x{image.height} pixels: 8 are the least")
    if crop:
        image = _centre(image, crop)
    if size:
        scale = size / min(image.size)
        scaled = (round(image.width * scale), round(image.height * scale))
        image = _centre(image if image.size == scaled else image.resize(scaled, Image.Resampling.BILINEAR), size)
    elif image.width != image.height:
        raise UserError(f"{item} is not square ({image.width}x{image.height}): give a size to crop to")
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _plain(image: Image.Image) -> Image.Image:
    """Any picture as 8-bit grey ("L") or colour ("RGB"): 16 bits are scaled down, transparency is laid over white."""
    if image.mode == "F":
        raise ValueError("pictures of floating-point numbers have no fixed range")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips it at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    grey = image.mode in ("1", "L", "LA")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if grey else "RGB")


def _centre(image: Image.Image, side: int) -> Image.Image:
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


# ------------------------------------------------------------------------------------------------ command line


def sheet(dataset: Dataset) -> Tensor:
    """What a network is shown, as one picture, uint8 (C, H, W): ten by ten images, or the density of the points."""
    if dataset.kind == "points":
        reach = 1.05 * float(dataset.x.abs().max())
        density = torch.histogramdd(dataset.x, [160, 160], range=[-reach, reach, -reach, reach]).hist
        shade = (density / density[density > 0].quantile(0.8)).clamp(max=1).T.flip(0)[None, None]  # x right, y up
        return to_uint8(1 - 2 * F.interpolate(shade, scale_factor=4))[0]
    x = next(ordered(dataset, n=100, batch=100))[0]
    x = F.interpolate(x, scale_factor=max(1, 64 // x.shape[-1]))  # nearest: shows the pixels
    return to_uint8(torchvision.utils.make_grid(x, nrow=10, pad_value=0.0))


class Parser(argparse.ArgumentParser):
    """argparse with its complaint as one sentence."""

    def error(self, message):
        raise UserError(f"{message}; see --help")


def main(argv=None) -> int:
    """The command line, `python data.py NAME`; returns the exit code (2 after one sentence for a user's mistake)."""
    parser = Parser(description="Look at a dataset: a summary, and a sheet of a hundred pictures.")
    parser.add_argument("name", help=f"{', '.join(IMAGE_SETS + POINT_SETS)}, or a folder of pictures")
    parser.add_argument("--root", default="data", help="where downloads and the cache live (default: data)")
    parser.add_argument("--size", type=int, help="pixels to decode to, for folders, celeba and lsun-church")
    parser.add_argument("--split", default="train", help="train (default) or test")
    parser.add_argument("--out", help="the sheet (default: NAME-SPLIT.png)")
    try:
        args = parser.parse_args(argv)
        folder = Path(args.name).expanduser().resolve()
        if args.name not in IMAGE_SETS + POINT_SETS and Path(args.out or "sheet.png").resolve().is_relative_to(folder):
            raise UserError(f"the sheet would become one of the pictures in {folder}: give another --out")
        dataset = load(args.name, args.root, args.size, args.split)
        out = args.out or f"{dataset.name}-{dataset.split}.png"
        try:
            Image.fromarray(sheet(dataset).permute(1, 2, 0).squeeze(2).numpy()).save(out)
        except (OSError, ValueError) as error:
            raise UserError(f"{out} cannot be written ({error}): give another --out") from None
    except UserError as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2
    x, y = dataset.x, dataset.y
    print(f"{dataset.name} ({dataset.split}): {str(x.dtype)[6:]} {tuple(x.shape)} from {x.min():g} to {x.max():g}")
    if y is None:
        print("no labels")
    else:
        count = y.bincount()
        print(f"{len(count)} labels, each {count.min():,} to {count.max():,} times"
              + (f"; in triples {dataset.classes:,} classes" if dataset.stacked else ""))
    print(f"drawn to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
