"""What is on disk: data sets and batches of them; runs, logs and checkpoints; settings and flags.

    dataset = load("digits")                             # x uint8 (60000, 1, 28, 28), y (60000,)
    batches = Batches(dataset, batch=64, device="cuda")  # endless, shuffled, resumable
    x, y = next(batches)                                 # x float32 (64, 1, 28, 28) in [-1, 1]
    for x, y in ordered(load("digits", split="test"), n=1000): ...   # always the same pictures

A whole data set is small beside the memory of the machine that trains on it (CIFAR-10: 150 MB as
bytes). So it is decoded once, held as bytes and moved to the device once, and a batch is one
`index_select`; resizing and scaling to [-1, 1] happen on the device. There are no worker processes,
and where a run stands in its data is two integers.

| name | train / test | what |
|---|---|---|
| `digits` | 60,000 / 10,000 | drawn here from pen strokes: 28x28, grey, 10 classes, no download |
| `stacked-digits`, `stacked-mnist` | as many digits | three at random as R, G, B: 1,000 modes |
| `mnist`, `fashion-mnist`, `cifar10` | as published | through torchvision; downloaded when absent |
| `stl10` | 105,000 / 8,000 | train = its train + unlabeled pictures, so without labels |
| `celeba` | 162,770 / 19,962 | 140-pixel centre crop, then resized |
| `lsun-church` | 126,227 / 300 | church_outdoor, from LSUN's lmdb files (needs the package lmdb) |
| a folder | all, or `train` / `test` (`val`) in it | pictures, or a folder of them for each class |
| `grid25`, `ring8` | 100,000 / 10,000 points | Gaussians on a grid (std .05), a circle (std .01) |
| `swissroll`, `swissroll3d` | 5,000 / 5,000 points | a spiral in the plane; rolled, noisy sheet |

`python data.py NAME` draws a sheet of a hundred pictures: look at what you train on.
"""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import difflib
import fcntl
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import pickle
import platform
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while torch is imported leaves no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

# torchvision is imported where it is used: with it, --help and a mistake take twice as long.

warnings.filterwarnings("ignore", module="PIL")  # What a user has to know is said in a sentence.

# ---- Errors and exit codes -----------------------------------------------------------------------


class UserError(ValueError):
    """A mistake the user can mend: ends a command with this one sentence and exit code 2."""

    code = 2


class NotFinite(ValueError, ArithmeticError):
    """A loss, a weight or a metric became NaN or infinite: ends a command with exit code 3."""

    code = 3


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, signal `number`, arrived: ends a command with exit code 128 + number."""

    def __init__(self, sentence, number):
        super().__init__(sentence)
        self.code = 128 + number


class Steady:
    """A stream that goes on where nobody reads it any more (`| head -1`) or its disk is full."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None: it was closed from the start
        self.error = None
        if hasattr(self.stream, "reconfigure"):  # a name may have letters that its encoding lacks
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        found = getattr(self.stream, name)
        return functools.partial(self.attempt, found) if name in ("write", "flush") else found

    def attempt(self, action, *given):
        try:
            return action(*given)
        except (OSError, ValueError) as error:
            self.error = error
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())  # what is still buffered goes there


class Parser(argparse.ArgumentParser):
    """argparse with its complaint as one sentence."""

    def error(self, message):
        raise UserError(f"{message}; see --help")

    def parse_known_args(self, args=None, namespace=None):
        """Both ways of parsing come here. Of `--flag=--` argparse makes an empty list."""
        found, rest = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            if value in ([], ""):
                self.error(f"argument {flag_of(name)}: expected one argument")
        return found, rest


def run_command(main, argv=None):
    """Calls main(argv) -> exit code. What can go wrong becomes a sentence on stderr and a code.

    2: the user can mend it; 3: a number is not finite; 128 + n: signal n. Anything else is a
    defect of ours and keeps its traceback.
    """
    def stop(number, frame):
        on_signals(signal.SIG_IGN)  # a second one, on the way out, changes nothing
        raise Interrupted("interrupted", number)

    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Steady, streams)
    handlers = on_signals(stop)
    together = False  # whether all ranks come to the end
    try:
        code = main(argv) or 0
        together = True
        sys.stdout.flush()
        if not isinstance(sys.stdout.error, BrokenPipeError | None):
            raise UserError(f"what was printed is not whole ({sys.stdout.error})")
        return code
    except (Exception, Interrupted) as error:
        together = isinstance(error, Interrupted)
        sentence = what_to_mend(error)
        if sentence is None:
            raise
        print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
        code = getattr(error, "code", 2)
        if dist.is_initialized() and not together:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # NCCL's group would wait for lost ranks; gloo's may abort, code -6
        return code
    finally:
        on_signals(signal.SIG_IGN)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sys.stdout.flush()
        sys.stdout, sys.stderr = streams
        if together and dist.is_initialized():
            dist.destroy_process_group()


def on_signals(handler):
    """handler(number, frame) for Ctrl-C and SIGTERM. Returns {number: what was there before}.

    Only the main thread gets signals: in another one (a notebook's, a server's) nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}


@contextlib.contextmanager
def random_state_kept(seed=None):
    """Whatever is drawn inside (from `seed`, if given), the caller's random numbers go on after it
    as if nothing had been."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def what_to_mend(error):
    """The sentence for an error that is no defect; None for one that is."""
    if isinstance(error, (UserError, NotFinite, Interrupted)):
        return str(error)
    if isinstance(error, OSError) and error.errno:  # no permission, a full disk
        return str(error)
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"--compile failed ({first_line(error)}): it needs a C++ compiler or Triton"
    lost = ("by peer", "Broken pipe", "imed out", "Socket Timeout", "NCCL")
    if dist.is_initialized() and any(sign in str(error) for sign in lost):
        return f"another rank has ended or does not answer ({first_line(error)})"
    signs = ("allocate memory", "out of memory", "size calculation overflowed")
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in signs):
        need = f" ({error})" if type(error).__module__.startswith("numpy") else ""  # in GiB
        return f"out of memory{need}; try a smaller --batch, --width, --latent, --size or --samples"
    return None


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:90]


@functools.cache
def say(sentence):
    """A line on stderr, once, however often there is cause for it."""
    print(sentence, file=sys.stderr)


def fits(value, form):
    """Whether a value from a file has this form: a type, {key: form, ...}, or [form] of each item.

    An int counts something: 0 to 2**62. A float is any finite number.
    """
    if isinstance(form, dict):
        return isinstance(value, dict) and all(fits(value.get(k), form[k]) for k in form)
    if isinstance(form, list):
        return isinstance(value, list) and all(fits(item, form[0]) for item in value)
    if form is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    if form is int:
        return type(value) is int and 0 <= value < 2**62
    return isinstance(value, form)


# ---- Data sets: one split, whole, as one tensor --------------------------------------------------


@dataclasses.dataclass
class Dataset:
    """One split of one data set, whole.

    x: images uint8 (N, C, H, W), or points float32 (N, D). y: int64 (N,) in 0..classes-1, or None.
    A stacked set holds digits labelled 0..9, of which `Batches` and `ordered` make triples.
    """

    name: str  # as asked for; of a folder its own name
    split: str  # what it really holds: a folder without test/ gives "train" for both
    x: Tensor
    y: Tensor | None
    classes: int  # 0 when unlabelled, 1000 for stacked sets
    stacked: bool = False

    @property
    def kind(self):
        return "points" if self.x.is_floating_point() else "images"

    @property
    def channels(self):
        return 3 if self.stacked else self.x.shape[1]

    def __len__(self):
        return len(self.x)


IMAGE_SETS = ("digits", "stacked-digits", "mnist", "stacked-mnist", "fashion-mnist", "cifar10",
              "stl10", "celeba", "lsun-church")
POINT_SETS = ("grid25", "ring8", "swissroll", "swissroll3d")
ROLL_UNIT = {"swissroll": 4.5 * math.pi, "swissroll3d": 15.0}  # so that all lies in [-1, 1]


def load(name, root="data", size=None, split="train"):
    """The whole of a data set's `split` ("train" or "test"), the same at every call.

    root: where downloads and the cache of decoded pictures live.
    size: pixels to decode folders, `celeba` and `lsun-church` to (default: own size, 64, 64). The
        other sets keep their one size; `Batches` and `ordered` can resize.
    Raises UserError for an unknown name, a set that cannot be had, a folder that cannot be used.
    """
    name = str(name)
    root = os.path.expanduser(root)
    if split not in ("train", "test"):
        raise UserError(f"there is no split '{split}': it is train or test")
    if size is not None and not 8 <= size <= 8192:
        raise UserError(f"a size of {size} pixels is out of range: 8 to 8192")
    if name in POINT_SETS:
        return _points(name, split)
    if name == "celeba":
        return _celeba(root, size or 64, split)
    if name == "lsun-church":
        return _lsun(root, size or 64, split)
    if name in IMAGE_SETS:
        return _fixed_size(name, root, split)
    folder = Path(whole_name(name))
    try:
        return _folder(folder, root, size, split)
    except OSError as error:  # no permission
        raise UserError(f"{folder} cannot be read ({error})") from None


def whole_name(dataset):
    """The name of a set, or the absolute path of a folder; UserError if it is neither."""
    name = str(dataset)
    folder = os.path.abspath(os.path.expanduser(name))  # A link keeps its own name.
    if name in IMAGE_SETS + POINT_SETS:
        if os.path.isdir(folder):
            say(f"{name} is a data set and a folder: the data set is taken, ./{name} is the folder")
        return name
    if name and os.path.isdir(folder):
        return folder
    wanted = f"give a folder of pictures or one of {', '.join(IMAGE_SETS + POINT_SETS)}"
    if any(mark in name for mark in "/\\~.") or os.path.isfile(folder):
        raise UserError(f"there is no folder {name}: {wanted}")
    close = difflib.get_close_matches(name.lower(), IMAGE_SETS + POINT_SETS, n=1, cutoff=0.5)
    perhaps = f", perhaps {close[0]} is meant" if close else ""
    raise UserError(f"there is no dataset '{name}'{perhaps}: {wanted}")


def load_pair(name, root="data", size=None):
    """(train, test), as `load` gives them; UserError also if they differ in channels.

    Under torchrun one rank of each host loads first: the others find what it has cached.
    """
    local = os.environ.get("LOCAL_RANK") if dist.is_initialized() else None
    if local not in (None, "0"):
        dist.barrier()
    train, test = (load(name, root, size, split) for split in ("train", "test"))
    if local == "0":
        dist.barrier()
    if train.channels != test.channels:
        raise UserError(f"--dataset {name}: training pictures have {train.channels} channels, test "
                        f"pictures {test.channels}; make all grey or all coloured")
    return train, test


def fixed_triples(train, test, n, seed=0):
    """n stacked images of the digits of both splits, drawn once, with replacement (PacGAN's data).

    As an ordinary set of 1,000 classes, x uint8 (n, 3, H, W). UserError for sets not stacked.
    """
    if not train.stacked:
        raise UserError(f"--triples: {train.name} is no set of stacked digits")
    x = torch.cat([train.x, test.x])[:, 0]
    y = torch.cat([train.y, test.y])
    index = torch.randint(len(x), (n, 3), generator=torch.Generator().manual_seed(seed))
    label = (y[index] * torch.tensor([100, 10, 1])).sum(1)
    return Dataset(train.name, "train and test", x[index], label, 1000)


def channels_of(name):
    """Channels of a set's images, or dimensions of its points, before it is loaded; else 3."""
    return {"digits": 1, "mnist": 1, "fashion-mnist": 1,
            "grid25": 2, "ring8": 2, "swissroll": 2}.get(name, 3)


def fingerprint(*datasets):
    """16 hexadecimal digits of what data sets hold, so that a changed set is noticed."""
    digest = hashlib.sha256()
    for dataset in datasets:
        digest.update(repr(tuple(dataset.x.shape)).encode())
        for part in (dataset.x, dataset.y):
            if part is not None:
                digest.update(part.contiguous().numpy().data)
    return digest.hexdigest()[:16]


# ---- Bytes, floats, batches ----------------------------------------------------------------------


def to_float(u8, size=None):
    """uint8 (B, C, H, W) -> float32 in [-1, 1], resized to (B, C, size, size) if that differs."""
    if u8.dtype != torch.uint8:
        raise ValueError(f"to_float takes uint8 images, not {u8.dtype}")
    x = u8.float()
    if size and x.shape[-2:] != (size, size):
        # Without antialiasing a reduction would skip pixels, and FID reacts to that strongly.
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    return x.div_(127.5).sub_(1)


def to_uint8(x):
    """float in [-1, 1] -> uint8, rounded and clamped; undoes `to_float` exactly."""
    return x.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def _take(dataset, index, size, device):
    """Items `index` (B,), or triples (B, 3), as networks want them: (x, y) on `device`."""
    index = index.flatten().to(dataset.x.device)

    def fetch(t):
        t = t.index_select(0, index)
        if t.device.type == "cpu" and device.type == "cuda":
            t = t.pin_memory()  # Only from such memory is a copy made beside the computation.
        return t.to(device, non_blocking=True)

    x = fetch(dataset.x)
    y = None if dataset.y is None else fetch(dataset.y)
    if dataset.stacked:
        x = x.view(-1, 3, *x.shape[2:])  # (3B, 1, H, W) -> (B, 3, H, W)
        y = y[0::3] * 100 + y[1::3] * 10 + y[2::3]  # red, green, blue -> 0..999
    if dataset.kind == "images":
        x = to_float(x, size)
    return x, y


class Batches:
    """Endless iterator over shuffled training batches.

    Yields x float32 (batch, C, size, size) in [-1, 1] (points: (batch, D)) on `device`, and y int64
    (batch,) or None. Each epoch is a permutation fixed by (seed, epoch) alone, so the state is two
    integers; a stacked set has three permutations. Rank r of `world` takes each world-th item, all
    ranks the same count. What does not fill a last batch is left out of that epoch.
    Raises UserError if a rank's share is smaller than a batch.
    """

    def __init__(self, dataset, batch, device="cpu", size=None, seed=0, rank=0, world=1):
        if batch < 1:
            raise UserError(f"a batch of {batch} is no batch: give 1 or more")
        share = len(dataset) // world
        self.steps_per_epoch = share // batch
        if self.steps_per_epoch == 0:
            raise UserError(f"a batch of {batch} is more than the {share:,} items of {dataset.name}"
                            f"{' for each device' * (world > 1)}: give a smaller one")
        self.batch = batch
        self.device = torch.device(device)
        self.size = size
        self.seed = seed
        self.mine = slice(rank, share * world, world)
        cuda = self.device.type == "cuda"  # A larger set stays here, and its batches are copied.
        if not cuda or dataset.x.nbytes < torch.cuda.mem_get_info(self.device)[0] / 4:
            x = dataset.x.to(self.device)
            y = None if dataset.y is None else dataset.y.to(self.device)
            dataset = dataclasses.replace(dataset, x=x, y=y)
        self.dataset = dataset
        self.load_state_dict({"epoch": 0, "position": 0})

    def state_dict(self):
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state):
        """Goes on from there; UserError for a place that an epoch of these does not have."""
        if not 0 <= state["position"] < self.steps_per_epoch:
            raise UserError(f"the saved run stands at batch {state['position']} of an epoch that "
                            f"now has {self.steps_per_epoch}: resume with its batch size and ranks")
        self.epoch = state["epoch"]
        self.position = state["position"]  # counts the batches drawn of this epoch
        self.order = None

    def __iter__(self):
        return self

    def __next__(self):
        if self.order is None:
            # Of the current epoch, this rank's items: (share, 1), or (share, 3) if stacked.
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
            orders = [torch.randperm(len(self.dataset), generator=generator)
                      for _ in range(3 if self.dataset.stacked else 1)]
            self.order = torch.stack(orders, 1)[self.mine].contiguous().to(self.dataset.x.device)
        index = self.order[self.position * self.batch : (self.position + 1) * self.batch]
        self.position += 1
        if self.position == self.steps_per_epoch:
            self.load_state_dict({"epoch": self.epoch + 1, "position": 0})
        return _take(self.dataset, index, self.size, self.device)


def ordered(dataset, n=None, batch=250, device="cpu", size=None, seed=0, permuted=False):
    """The first n items (default and at most: all) in a fixed order; yields (x, y) as Batches does.

    A set stored class by class, or without labels to tell, is first permuted by `seed`, as any set
    is with `permuted`: its first n items might be of a few classes, or, as in MNIST's test set, of
    other writers than the rest. Of a stacked set: n triples (default: as many as digits), drawn by
    `seed` with replacement. The last batch may be short.
    """
    generator = torch.Generator().manual_seed(seed)
    total = len(dataset)
    y = dataset.y
    by_class = dataset.kind == "images" if y is None else bool((y[1:] >= y[:-1]).all())
    if dataset.stacked:
        index = torch.randint(total, (total if n is None else n, 3), generator=generator)
    elif by_class or permuted:
        index = torch.randperm(total, generator=generator)[:n]
    else:
        index = torch.arange(total)[:n]
    for start in range(0, len(index), batch):
        yield _take(dataset, index[start : start + batch], size, torch.device(device))


# ---- Digits, drawn from strokes ------------------------------------------------------------------

# Ours. One line is one way to write a digit: x,y in percent of the writing box, y downwards. "|"
# starts a new run, and a run is one smooth curve. Equal points are one point: runs that share it
# stay joined wherever it is moved, and a run that ends where it began is closed.
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
SEGMENTS = 64  # Of a glyph each is about a pixel or less, so a sum over them is as an integral.


def _spline(n, steps, closed):
    """Catmull-Rom through n points, as the matrix (steps + 1, n) that takes points to the curve."""
    points = torch.eye(n)  # The curve is linear in its points: that of unit vectors is the matrix.
    before = points[-2] if closed else 2 * points[0] - points[1]
    after = points[1] if closed else 2 * points[-1] - points[-2]
    padded = torch.cat([before[None], points, after[None]])
    t = torch.linspace(0, n - 1, steps + 1)
    k = t.long().clamp(max=n - 2)
    u = (t - k)[:, None]
    a, b, c, d = (padded[k + i] for i in range(4))
    return b + u / 2 * (c - a + u * (2 * a - 5 * b + 4 * c - d + u * (3 * (b - c) + d - a)))


@functools.cache
def _glyph_tables():
    """The V glyphs of up to K points: points (V, K, 2); ends (V, 2 * SEGMENTS, K), from points to
    the first, then the second ends of segments; warp (V, K, K), from noise to a displacement.
    """
    glyphs = [[[tuple(map(float, point.split(","))) for point in run.split()]
               for run in text.split("|")] for _, text in GLYPHS]
    most = max(len({point for run in runs for point in run}) for runs in glyphs)
    points = torch.zeros(len(glyphs), most, 2)
    ends = torch.zeros(len(glyphs), 2, SEGMENTS, most)
    for v, runs in enumerate(glyphs):
        unique = list(dict.fromkeys(point for run in runs for point in run))
        points[v, : len(unique)] = torch.tensor(unique)
        lengths = torch.tensor([sum(map(math.dist, run, run[1:])) for run in runs])
        stops = [0, *(lengths.cumsum(0) / lengths.sum() * SEGMENTS).round().long().tolist()]
        for run, start, stop in zip(runs, stops, stops[1:]):  # A run gets segments by its length.
            chosen = F.one_hot(torch.tensor([unique.index(p) for p in run]), most).float()
            curve = _spline(len(run), stop - start, closed=run[0] == run[-1]) @ chosen
            ends[v, :, start:stop] = torch.stack([curve[:-1], curve[1:]])
    # The warp is a Gaussian field (std 2.5 % of the box, changing over about 40 % of it), taken at
    # the points alone since the curves follow. The hand adds 0.8 % of independent unsteadiness.
    distance2 = torch.cdist(points, points).square()
    covariance = 2.5**2 * torch.exp(-distance2 / (2 * 40**2)) + 0.8**2 * torch.eye(most)
    return points, ends.flatten(1, 2), torch.linalg.cholesky(covariance)


def _draw(glyph, generator):
    """A picture of each index into GLYPHS: (B,) -> uint8 (B, 1, 28, 28), white on black."""
    points, ends, warp = (table[glyph] for table in _glyph_tables())

    def normal(*shape):
        return torch.randn(len(glyph), *shape, generator=generator)

    def uniform(low, high):
        return low + (high - low) * torch.rand(len(glyph), 1, generator=generator)

    p = ends @ (points + warp @ normal(points.shape[1], 2))  # (B, 2 * SEGMENTS, 2)
    turn = 0.04 * normal(1)
    slant = 0.18 + 0.08 * normal(1)
    x = p[..., 0] * uniform(0.9, 1.1) - slant * p[..., 1]  # y points down: minus leans to the right
    y = p[..., 1]
    p = torch.stack([x * turn.cos() - y * turn.sin(), x * turn.sin() + y * turn.cos()], 2)

    # MNIST scales the longer side to (about) 20 pixels and centres each digit's mass.
    half = uniform(0.95, 1.5)  # half of the pen's width, in pixels
    extent = (p.amax(1) - p.amin(1)).amax(1, keepdim=True)
    scale = (uniform(17.5, 20.0) - 2 * half) / extent
    first, second = (p * scale[..., None]).chunk(2, 1)
    q = (first + second) / 2  # (B, SEGMENTS, 2)
    length = (second - first).norm(dim=2, keepdim=True)  # (B, SEGMENTS, 1)
    q = q - (q * length).sum(1, keepdim=True) / length.sum(1, keepdim=True)
    return _ink(q + 13.5 + 0.4 * normal(1, 2), length, half)


def _ink(q, length, half):
    """Segments at q (B, S, 2) of `length` (B, S, 1), pen of half width (B, 1) -> the picture.

    Each pixel's distance to the strokes is a smooth minimum. Along a straight line the integral of
    exp(-|pixel - q|^2 / 2s^2) is s sqrt(2 pi) exp(-distance^2 / 2s^2). Its integrand is a factor in
    x times one in y, so the integral over the glyph is one matrix product for all pixels.
    """
    s = 0.7  # The larger s is, the rounder are the corners.
    grid = torch.arange(28.0)
    # Six pixels away all is black. Further out are denormal numbers, which take many times as long.
    factor = (q[..., None] - grid).square_().mul_(-0.5 / s**2).clamp_(min=-40).exp_()
    factor_x = factor[:, :, 0] * (length / (s * math.sqrt(2 * math.pi)))
    integral = factor[:, :, 1].transpose(1, 2) @ factor_x  # (B, 28 rows, 28 columns)
    distance = integral.log_().mul_(-2 * s * s).clamp_(min=0).sqrt_()
    ink = (0.5 + (half[..., None] - distance) / 1.2).clamp_(0, 1)  # an edge 1.2 pixels wide
    return (ink * 255).round_().to(torch.uint8)[:, None]


def draw_digits(n, seed):
    """n handwritten-looking digits, fixed by `seed`: x uint8 (n, 1, 28, 28), y int64 (n,)."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 10
    glyph = 2 * y + (2 * torch.rand(n, generator=generator)).long()  # GLYPHS has two of each
    # Pieces of 500 fit the processor's caches. One thread draws them: threads that wait for each
    # other at many small operations are far slower on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return torch.cat([_draw(part, generator) for part in glyph.split(500)]), y
    finally:
        torch.set_num_threads(threads)


# ---- Point sets and published sets ---------------------------------------------------------------


def mixture(name):
    """Means (K, 2) and standard deviation of the Gaussians of a point set; None for other names."""
    if name == "grid25":
        axis = torch.tensor([-4.0, -2.0, 0.0, 2.0, 4.0])
        return torch.cartesian_prod(axis, axis), 0.05
    if name == "ring8":
        angle = torch.arange(8) * (math.pi / 4)
        return torch.stack([angle.cos(), angle.sin()], 1), 0.01  # PacGAN's and VEEGAN's
    return None


def _points(name, split):
    """Labelled points (N, D); train and test are different draws of the same distribution."""
    generator = torch.Generator().manual_seed({"train": 11, "test": 12}[split])
    if name in ROLL_UNIT:
        # The usual roll, seen along its axis and scaled into the unit disc. Ours: LatentMap gives
        # its 5,000 points but not its dimensions. Depth would be independent of the rest.
        u = torch.rand(5_000, generator=generator)
        t = 1.5 * math.pi * (1 + 2 * u)
        x = torch.stack([t * t.cos(), t * t.sin()], 1)
        if name == "swissroll3d":  # sklearn's; that of LatentMap's authors is half as deep
            depth = 21 * torch.rand(5_000, generator=generator) - 10.5
            x = torch.stack([x[:, 0], depth, x[:, 1]], 1)
            x += 0.05 * torch.randn(5_000, 3, generator=generator)
        x /= ROLL_UNIT[name]
        return Dataset(name, split, x, (10 * u).long(), 10)  # ten equal stretches of t, for colour
    centers, std = mixture(name)
    n = 100_000 if split == "train" else 10_000
    y = torch.randint(len(centers), (n,), generator=generator)
    x = centers[y] + std * torch.randn(n, 2, generator=generator)
    return Dataset(name, split, x, y, len(centers))


IDX_FILES = "{train,t10k}-{images-idx3,labels-idx1}-ubyte"
BY_HAND = {  # where below root torchvision looks, and what has to be there
    "mnist": ("MNIST/raw", IDX_FILES),
    "fashion-mnist": ("FashionMNIST/raw", IDX_FILES),
    "cifar10": ("", "cifar-10-python.tar.gz"),
    "stl10": ("", "stl10_binary.tar.gz"),
    "celeba": ("celeba",
               "list_{eval_partition,attr_celeba,bbox_celeba,landmarks_align_celeba}.txt, "
               "identity_CelebA.txt and the folder img_align_celeba"),
}


def _torchvision(name, root, make):
    """make(download) -> a torchvision set, from root or else downloaded; UserError if neither."""
    with contextlib.suppress(Exception):  # What is wrong shows if the download does not mend it.
        return make(False)
    place = Path(root) / BY_HAND[name][0]
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # torchvision would wait for a silent server for ever.
    try:
        if Path(root).is_dir() and not Path(root).stat().st_mode & 0o222:
            raise OSError("it is marked read-only")  # This would not stop the superuser.
        print(f"{name} is not (whole) in {place}: downloading it", file=sys.stderr)
        bar = sys.stderr if sys.stderr.isatty() else io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(bar):
            return make(True)
    except Exception as error:  # no network, a full disk, a wrong checksum, gdown missing
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].rstrip(".")
        raise UserError(f"{name} could not be read from {place} nor downloaded to it ({reason}): "
                        f"to supply it by hand, put there {BY_HAND[name][1]}") from None
    finally:
        socket.setdefaulttimeout(patience)


def _fixed_size(name, root, split):
    """The sets whose pictures all have one size: x as stored."""
    import torchvision.datasets as sets

    train = split == "train"
    base = name.removeprefix("stacked-")
    if base == "stl10":
        part = "train+unlabeled" if train else "test"
        got = _torchvision(base, root, lambda download: sets.STL10(root, part, download=download))
        # 95 % of the training pictures have no label, so none is given, in either split.
        return Dataset(name, split, torch.from_numpy(np.ascontiguousarray(got.data)), None, 0)
    if base == "digits":
        x, y = draw_digits(60_000, seed=1) if train else draw_digits(10_000, seed=2)
    else:
        kinds = {"mnist": sets.MNIST, "fashion-mnist": sets.FashionMNIST, "cifar10": sets.CIFAR10}
        got = _torchvision(base, root, lambda download: kinds[base](root, train, download=download))
        x = torch.as_tensor(got.data)  # (N, H, W, C) or (N, H, W)
        x = x.permute(0, 3, 1, 2).contiguous() if x.dim() == 4 else x[:, None]
        y = torch.as_tensor(got.targets).long()
        if not len(x) == len(y) or not len(y) or y.min() < 0 or y.max() > 9:
            raise UserError(f"{base} in {Path(root) / BY_HAND[base][0]} is damaged: it has not one "
                            "label from 0 to 9 for each picture; put whole files there")
    stacked = base != name
    return Dataset(name, split, x, y, 1000 if stacked else 10, stacked)


def _celeba(root, size, split):
    """CelebA's aligned faces, 178x218: the central 140x140 (as IVAAE and WAE do), resized."""
    import torchvision.datasets as sets

    got = _torchvision("celeba", root, lambda download: sets.CelebA(root, split, download=download))
    folder = Path(root) / got.base_folder / "img_align_celeba"
    files = [str(folder / file) for file in got.filename]
    return _pictures("celeba", split, folder, files, root, size, crop=(19, 39, 159, 179))


def _lsun(root, size, split):
    """LSUN's church_outdoor; test is its 300 `val` pictures."""
    folder = f"church_outdoor_{'train' if split == 'train' else 'val'}_lmdb"
    file = Path(root) / folder / "data.mdb"
    try:
        import lmdb  # torchvision's own LSUN leaves a pickle of the keys in the current folder.
    except ImportError:
        raise UserError("lsun-church is an lmdb file: install 'pip install lmdb'") from None
    if not file.is_file():
        raise UserError(f"lsun-church has no {file}: unpack {folder}.zip from "
                        f"http://dl.yf.io/lsun/scenes/ in {root}")
    damaged = UserError(f"{file} is damaged or was copied in part: unpack {folder}.zip again")
    options = dict(readonly=True, lock=False, readahead=False, meminit=False)
    try:
        with lmdb.open(str(file.parent), **options) as env:
            if file.stat().st_size < (env.info()["last_pgno"] + 1) * env.stat()["psize"]:
                raise damaged  # lmdb maps the file: to read beyond its end would kill the process.
            with env.begin() as transaction:
                keys = list(transaction.cursor().iternext(keys=True, values=False))

            def read(key):
                with env.begin() as transaction:  # Each has its own: it may not change threads.
                    return io.BytesIO(transaction.get(key))

            if not keys:
                raise damaged
            return _pictures("lsun-church", split, file, keys, root, size, read=read)
    except lmdb.Error:
        raise damaged from None


# ---- Folders of pictures, cached -----------------------------------------------------------------

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")  # Pillow knows others by programs.


def _folder(folder, root, size, split):
    """Pictures, or one folder for each class; or of either kind train/ and test/, else val/ or
    valid/ or validation/ (in any case)."""
    inside = {entry.name.lower(): entry for entry in folder.iterdir() if entry.is_dir()}
    train = inside.get("train", folder)
    base = train
    tests = ("test", "val", "valid", "validation")
    if train != folder:
        if split == "test":
            base = next((inside[name] for name in tests if name in inside), train)
        beside = sorted(inside.keys() - {"train", *tests})
        if any(find_pictures(inside[name]) for name in beside if not name.startswith(".")):
            raise UserError(f"{folder} has pictures in train/ and beside it, in "
                            f"{', '.join(beside)}: are these classes, rename train; else move them")
        loose = [entry for entry in folder.iterdir() if entry.name.lower().endswith(SUFFIXES)]
        if loose:
            say(f"{folder}: {len(loose)} pictures beside train/ are left out")
    files = pictures_of(base)
    found = _classes(base, files)
    splits = sorted(name for name in set(found) if name.lower() in ("training", "testing", *tests))
    if train == folder and splits:
        raise UserError(f"{folder} has {splits[0]}/ but no train/: call splits train and test, "
                        "and a class otherwise")
    # The training split numbers the classes, whatever the test split has of them.
    names = sorted(set(found if base == train else _classes(train, find_pictures(train))))
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise UserError(f"{base / unknown[0]} has pictures of its own, but {train / unknown[0]} "
                        "has none: the two must have the same folders")
    split = "train" if base == train else "test"
    name = f"folder-{folder.name}" if folder.name in IMAGE_SETS else folder.name
    dataset = _pictures(name, split, base, files, root, size)  # never called as a published set
    if len(names) > 1:  # A single class says nothing, so it is no label.
        number = {name: i for i, name in enumerate(names)}
        dataset.y = torch.tensor([number[name] for name in found])
        dataset.classes = len(names)
    return dataset


def find_pictures(folder, passed=None):
    """The pictures at any depth below `folder`, in a fixed order; what is hidden is passed over.

    passed: a list that is given the names of all other files.
    """
    found = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            found += find_pictures(entry.path, passed)
        elif entry.name.lower().endswith(SUFFIXES):
            found.append(entry.path)
        elif passed is not None:
            passed.append(entry.name)
    return found


def pictures_of(folder):
    """find_pictures() of a folder that must have some; what is passed over is said in a line."""
    passed = []
    files = find_pictures(folder, passed)
    if not files:
        raise UserError(f"there are no pictures ({' '.join(SUFFIXES)}) in {folder}")
    if passed:
        kinds = collections.Counter(os.path.splitext(name)[1].lower() or name for name in passed)
        text = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(5))
        say(f"{folder}: {len(passed)} files passed over for their suffix: {text}")
    return files


def _classes(base, files):
    """For each file the folder of `base` that it is in, "" for base itself; UserError for both."""
    parts = [file[len(str(base)) + 1 :].split(os.sep) for file in files]
    names = [part[0] if len(part) > 1 else "" for part in parts]
    if "" in names and any(names):
        raise UserError(f"{base} has pictures both beside and inside its folders ({max(names)}): "
                        "keep one kind")
    return names


def cache_dir(root):
    """root/cache, made if need be; ./data/cache where root is read-only or cannot be written to.

    The mode bits count as well as the system's answer, since the superuser may write anywhere.
    Raises UserError if neither place will do.
    """
    for place in (Path(os.path.expanduser(root)), Path("data")):
        folder = place / "cache"
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            if place.stat().st_mode & 0o222:
                folder.mkdir(exist_ok=True)
                if folder.stat().st_mode & 0o222 and os.access(folder, os.W_OK):
                    return folder
    raise UserError(f"neither {root} nor ./data can be written to: give a --root that can")


def _pictures(name, split, source, items, root, size, crop=None, read=None):
    """All pictures, without labels; mapped from a cache of these very files, or decoded.

    items: paths, or with `read` anything that read() turns into a file. The cache file's name says
    which source and size, `stamp` inside it which files: after a change it is replaced. A set has
    to fit in memory only when it is decoded; later only the pages in use do.
    """
    digest = hashlib.sha1(f"3 {crop}".encode())  # Count the 3 up when pictures are read otherwise.
    for path in [source] if read else items:
        with contextlib.suppress(OSError):  # What is missing is named when all are read.
            status = os.stat(path)
            digest.update(os.fsencode(f"\n{path} {status.st_size} {status.st_mtime_ns}"))
    stamp = digest.hexdigest()
    key = hashlib.sha1(os.fsencode(os.path.abspath(source))).hexdigest()[:8]
    plain = name.encode(errors="replace").decode()  # torch maps no file whose name is not UTF-8
    path = cache_dir(root) / f"{plain}-{split}-{size or 'native'}-{key}.pt"
    if path.exists():
        try:
            saved = read_saved(path, mmap=True)
            x = saved["x"]
            n, channels, height, width = x.shape
            whole = x.dtype == torch.uint8 and x.is_contiguous() and channels in (1, 3)
            if not whole or not 8 <= height == width == (size or height):
                raise ValueError
            if saved["stamp"] == stamp and n == len(items):
                return Dataset(name, split, x, None, 0)
        except Exception:  # damaged, or another program's: whatever it is, it is made anew
            print(f"{path} is damaged: made anew", file=sys.stderr)
    x = torch.from_numpy(_decode(name, items, size, crop, read))
    try:
        save_atomic({"stamp": stamp, "x": x}, path)
    except UserError as error:
        print(f"{error}: the pictures will be decoded again next time", file=sys.stderr)
    return Dataset(name, split, x, None, 0)


def _decode(name, items, size, crop, read):
    """Pictures -> uint8 array (N, C, S, S), C = 1 if all are grey and else 3."""
    x = None
    told = time.monotonic()
    live = sys.stderr.isatty()
    for i, picture in enumerate(read_pictures(name, items, size, crop, read)):
        if picture.shape[1] != picture.shape[2]:
            shape = f"{picture.shape[2]}x{picture.shape[1]}"
            raise UserError(f"{items[i]} is not square ({shape}): give a size")
        if x is None:
            x = np.empty((len(items), *picture.shape), np.uint8)
        if picture.shape[1:] != x.shape[2:]:
            raise UserError(f"the pictures of {name} differ in size ({items[0]}, {items[i]}): "
                            "give a size")
        if len(picture) > x.shape[1]:  # The first in colour: those before it were grey.
            x = x.repeat(3, axis=1)
        x[i] = picture  # A grey one goes into all channels.
        last = i + 1 == len(items)
        if last or time.monotonic() - told > (0.2 if live else 10):
            text = f"decoding {name}: {i + 1:,} of {len(items):,}"
            print(text, end="\r" if live and not last else "\n", file=sys.stderr, flush=True)
            told = time.monotonic()
    return x


def read_pictures(name, items, size=None, crop=None, read=None, changed=None):
    """Yields each item's picture as read_picture() has it, in order, read ahead by threads.

    items: paths, or with `read` anything that read() turns into a file. In the end a line on stderr
    counts what was changed, as does the Counter `changed` if one is given. Raises UserError, and
    names all that cannot be read at once.
    """
    def attempt(item):
        try:
            return read_picture(read(item) if read else item, size, crop)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise half a dozen kinds.
            reason = getattr(error, "strerror", None) or first_line(error)
            if isinstance(error, UnidentifiedImageError):
                reason = "not a picture"
            return None, [f"{item} ({reason})"]

    changed = collections.Counter() if changed is None else changed
    bad = []
    pool = ThreadPoolExecutor(min(16, os.cpu_count()))  # Pillow lets go of Python's lock.
    try:
        for start in range(0, len(items), 64):  # No more than these wait to be taken.
            for picture, remarks in pool.map(attempt, items[start : start + 64]):
                if picture is None:
                    bad += remarks
                elif not bad:
                    changed.update(remarks)
                    yield picture
    finally:
        pool.shutdown(cancel_futures=True)  # After an error or Ctrl-C the rest is not needed.
    if bad:
        more = f" and {len(bad) - 10:,} more" if len(bad) > 10 else ""
        raise UserError(f"{len(bad):,} of {len(items):,} pictures of {name} cannot be read; mend "
                        f"or remove them: {', '.join(bad[:10])}{more}")
    if changed:
        counts = (f"{n:,} of {len(items):,}: {remark}" for remark, n in changed.most_common())
        say(f"pictures of {name} were changed: {'; '.join(counts)}")


def read_picture(file, size=None, crop=None):
    """A path, or an open file -> (uint8 (C, H, W), [what was changed]); grey has one channel.

    It is made upright and 8-bit; then the box `crop` is taken (left, upper, right, lower), and with
    `size` the central square is resized. Raises what Pillow does; ValueError for a file that is
    empty or not regular, and for too few or too many pixels.
    """
    changes = []
    if not hasattr(file, "read"):
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):  # of a pipe the reading might never end
            raise ValueError("not a regular file")
        if not status.st_size:
            raise ValueError("empty")
    with Image.open(file, formats=FORMATS) as image:
        if min(image.size) < 8:
            raise ValueError(f"{image.width}x{image.height} pixels: too few")
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise ValueError(f"{image.width}x{image.height} pixels: too many")
        image = _plain(image, changes)
    if crop:
        image = image.crop(crop)
    if size:
        if image.width != image.height:
            changes.append("oblong, cut to the central square")
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1), changes


def _plain(image, changes):
    """Any picture upright, as 8-bit grey or colour; remarks on what that took go to `changes`."""
    if image.mode == "F":
        raise ValueError("floating-point numbers, which have no fixed range")
    if getattr(image, "is_animated", False):
        changes.append("the first of several frames")
    # Of colours of 16 bits Pillow keeps 8: only the tiles tell. Grey it keeps whole, in a mode I.
    if ";16" in str(image.tile) or image.mode.startswith("I"):
        changes.append("16 bits, scaled to 8")
    image.load()
    with contextlib.suppress(SyntaxError):  # EXIF that is no EXIF turns nothing
        if image.getexif().get(ExifTags.Base.Orientation) in range(2, 9):
            changes.append("turned upright")
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # which Pillow's own conversion clips at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit numbers, which have no fixed range")
        if values.max() < 4096:
            changes.append("nearly black, as no value of 65,535 is above 4,095: rescale them")
        return Image.fromarray((values / 257).round().astype(np.uint8))
    palette = image.getpalette() or [0, 1, 2]  # red, green, blue, red, ...
    grey = image.mode in ("1", "L", "LA") or palette[::3] == palette[1::3] == palette[2::3]
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            changes.append("transparent, laid over white")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if grey else "RGB")


# ---- Hardware and ranks --------------------------------------------------------------------------

BF16_UNITS = {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}


def from_environment(name, default):
    """A number that torchrun leaves in the environment. Raises UserError where it is none."""
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise UserError(f"the environment has {name}={text}, which is no number; unset it")
    return int(text)


def hardware(device="auto", amp="auto"):
    """(device, precision), as Machine takes them, of --device and --amp; joins torchrun's ranks.

    "auto": CUDA where there is one; bf16 wherever the hardware multiplies it (GPUs of compute
    capability 8.0 and later, AMX, AVX512-BF16). Raises UserError for a device that is not there:
    never silently the CPU.
    """
    name = device
    if device == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: there is no usable CUDA device; use --device cpu")
    if name == "cuda":
        name = f"cuda:{from_environment('LOCAL_RANK', '0')}"
    try:
        torch.empty(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {device} cannot be used here ({first_line(error)}); "
                        "give auto, cpu, cuda or cuda:0") from None
    backend = "gloo"
    if name.startswith("cuda"):
        backend = "nccl"
        torch.cuda.set_device(name)
        torch.backends.cudnn.benchmark = True  # fixed shapes: cuDNN picks its fastest convolution
        torch.set_float32_matmul_precision("high")  # tf32 for what stays in float32
    world = from_environment("WORLD_SIZE", "1")
    if from_environment("RANK", "0") >= world:
        raise UserError("the environment's RANK is not below its WORLD_SIZE; use torchrun")
    if world > 1 and name.startswith("cuda") and device not in ("auto", "cuda"):
        raise UserError(f"--device {device} is one GPU for {world} ranks; give --device cuda")
    if world > 1 and not dist.is_initialized():
        try:  # The ranks meet soon or never. Later the others wait while rank 0 evaluates.
            soon = datetime.timedelta(seconds=20)  # of which torch may take twice
            store, rank, world = next(dist.rendezvous("env://", timeout=soon))
            dist.init_process_group(backend, store=store, rank=rank, world_size=world,
                                    device_id=torch.device(name) if backend == "nccl" else None,
                                    timeout=datetime.timedelta(hours=4))
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the other ranks cannot be joined ({first_line(error)}); "
                            "use torchrun") from None
    if amp == "auto":
        amp = "bf16" if multiplies_bf16(name) else "off"
    return name, amp


def multiplies_bf16(device):
    """Whether this device multiplies bf16 in hardware; where it does not, float32 is faster."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return any(getattr(torch.cpu, check, bool)() for check in BF16_UNITS.values())


def average(tensor):
    """The mean over the ranks, in place."""
    dist.all_reduce(tensor)
    tensor /= dist.get_world_size()


def compile_networks(model):
    """torch.compile, in place, of each network: the names of its weights stay what they were."""
    torch._functorch.config.donated_buffer = False  # one forward is differentiated for two losses
    torch._dynamo.config.cache_size_limit = 64  # of all networks in all their modes; 8 are too few
    for network in model.children():
        network.compile()


# ---- Settings, from whose fields the flags are made ----------------------------------------------


def setting(default, text="", kind=None, least=None, most=2**48, choices=None, models=None):
    """A field of a settings dataclass: its value, and its help text with the source.

    With a text it is a flag, of these `models` only (None: of all). kind: its type, where the
    default does not tell. least, most, choices: what it may be, beside a default of None.
    """
    about = dict(text=text, kind=kind or type(default), least=least, most=most, choices=choices,
                 models=models)
    return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass
class Settings:
    """What every run has. The settings of a paper add `model`, `dataset` and their own fields."""

    root: str = setting("data", "where data sets lie, or are downloaded to")
    steps: int | None = setting(None, "training steps; else --epochs decides", int, 1)
    seed: int = setting(0, "of weights, noise and the order of the data", int, 0, 2**63 - 1)
    amp: str = setting("auto", "autocast: off, bf16, fp16, or auto: bf16 where it is in hardware",
                       choices=("auto", "off", "bf16", "fp16"))
    compile: bool = setting(False, "torch.compile the networks")
    eval_every: int | None = setting(None, "steps between evaluations", int, 1)
    samples: int | None = setting(None, "generated items a metric is computed from", int, 20)
    inception: str | None = setting(None, "weights for fid: auto (downloads), a path, off", str)
    tensorboard: bool = setting(False, "also write scalars and pictures for TensorBoard")

    def check(self):
        """Raises UserError, in one sentence, for a value of another type or out of its range."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            flag = flag_of(field.name)
            about = field.metadata
            kind = about["kind"]
            if value is None and field.default is None:
                continue
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise UserError(f"{flag} {value!r} is not of the type {kind.__name__}")
            if about["choices"] and value not in about["choices"]:
                raise UserError(f"{flag} {value} is not one of {', '.join(about['choices'])}")
            if kind is str and not value:
                raise UserError(f"{flag} is empty")
            if value != value:
                raise UserError(f"{flag} {value} is not a number")
            if about["least"] is not None and value < about["least"]:
                raise UserError(f"{flag} {value} is too small: at least {about['least']:g}")
            if kind in (int, float) and value > about["most"]:
                raise UserError(f"{flag} {value} is too large: at most {about['most']:g}")


FREE = ("dataset", "root", "steps", "epochs", "amp", "compile", "eval_every", "samples",
        "inception", "tensorboard")  # what may change when resuming; other data need --out
COMMAND = list(sys.argv)  # as config.json keeps it


def flag_of(name):
    return "--" + name.replace("_", "-")


def add_flags(parser, settings):
    """A flag for each field of `settings` that has a text and that its model has."""
    for field in dataclasses.fields(settings):
        about = field.metadata
        if not about["text"] or (about["models"] and settings.model not in about["models"]):
            continue
        value = getattr(settings, field.name)
        text = about["text"].replace("%", "%%") + ("" if value is None else f" ({value})")
        how = dict(type=about["kind"], metavar="X")
        if about["kind"] is bool:
            how = dict(action=argparse.BooleanOptionalAction)  # --no-compile, when resuming
        parser.add_argument(flag_of(field.name), help=text, **how)


def parse(argv, file, about, preset, extra=None, tables=()):
    """The command line of a paper's file -> (args, settings, checkpoint or None).

    The flags are those of the system that --model names, or that --resume holds, with its values
    as defaults: preset(model, dataset), or what else it is a function of. A flag sets the field of
    its name, and when resuming only fields in FREE may change. extra(parser, instead) adds a file's
    own. Raises UserError.
    """
    if argv is not None:  # from a notebook
        COMMAND[:] = [f"{file}.py", *map(str, argv)]
    first = Parser(add_help=False, allow_abbrev=False)
    names = inspect.signature(preset).parameters
    for name in (*names, "resume"):
        switch = name in names and names[name].default is False
        how = dict(action=argparse.BooleanOptionalAction, default=False) if switch else {}
        first.add_argument(flag_of(name), **how)
    known = vars(first.parse_known_args(argv)[0])
    checkpoint = known["resume"] and load_checkpoint(known["resume"], file)
    if checkpoint:
        settings = settings_of(checkpoint, preset)
    else:
        if known["dataset"] is not None:
            known["dataset"] = whole_name(known["dataset"])
        settings = preset(*(known[name] for name in names))
    parser = Parser(prog=f"{file}.py", description=about.splitlines()[0], allow_abbrev=False,
                    epilog=f"The flags of --model {settings.model} on {settings.dataset}.")
    add_flags(parser, settings)
    add = parser.add_argument
    add("--device", default="auto", metavar="X", help="auto, cpu, cuda, cuda:1")
    add("--out", metavar="DIR", help=f"the run's folder (runs/{file}-MODEL-DATASET-sSEED)")
    add("--resume", metavar="RUN", help="continue the run in this folder")
    add("--table", metavar="NAME", help="train the rows of a table or figure of the paper, print "
        f"published beside measured: {', '.join(tables)}; with --seeds N, --report, --out DIR, and "
        "flags for all rows")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--sample", type=int, metavar="N", help="with --resume: draw N samples")
    instead.add_argument("--bench", type=int, metavar="N", help="only time N steps; prints JSON")
    if extra:
        extra(parser, instead)
    args = parser.parse_args(argv)
    for name, value in (("--sample", args.sample), ("--bench", args.bench)):
        if value is not None and not 0 < value < 2**31:
            raise UserError(f"{name} {value} is out of range: 1 or more")
    alone = args.sample or args.bench or getattr(args, "probe", None)
    if alone and from_environment("WORLD_SIZE", "1") > 1:
        raise UserError("--sample, --bench and --probe are for one process: leave torchrun out")
    if args.sample and not checkpoint:
        raise UserError("--sample needs --resume RUN, the run to draw from")
    free = (*FREE, "seed") if args.sample else FREE
    given = {k: v for k, v in vars(args).items() if v is not None and hasattr(settings, k)}
    settings = with_flags(settings, given, free if checkpoint else given)
    if checkpoint and settings.dataset != checkpoint["settings"]["dataset"]:
        usual = preset(*(getattr(settings, name) for name in names))
        hidden = {f.name: getattr(usual, f.name) for f in dataclasses.fields(usual)
                  if not f.metadata["text"]}  # which no flag sets: they are the new data set's
        settings = dataclasses.replace(settings, **hidden)
        settings.check()
    return args, settings, checkpoint


def with_flags(settings, given, free):
    """The settings with the given values. Raises UserError for what cannot be, or is not free."""
    if "dataset" in given:
        given["dataset"] = whole_name(given["dataset"])
        if (given["dataset"] in POINT_SETS) != (settings.dataset in POINT_SETS):
            raise UserError(f"--dataset {given['dataset']}: a run does not go from points to "
                            "pictures, nor back")
    if "epochs" in given and "steps" not in given:
        given["steps"] = None  # a length in epochs replaces one in steps
    for name, value in given.items():
        before = getattr(settings, name)
        if value != before and name not in free:
            raise UserError(f"--resume: the run has {name} {before}, not {value}; "
                            f"leave {flag_of(name)} out")
    settings = dataclasses.replace(settings, **given)
    settings.check()
    return settings


def settings_of(checkpoint, preset):
    """The settings that a checkpoint was trained with. Raises UserError if they do not fit."""
    saved = checkpoint["settings"]
    try:
        usual = preset(**{name: saved[name] for name in inspect.signature(preset).parameters})
        settings = type(usual)(**saved)
        settings.check()
        for field in dataclasses.fields(usual):
            if not field.metadata["text"] and saved[field.name] != getattr(usual, field.name):
                raise ValueError(f"{field.name} is {saved[field.name]}")
    except (TypeError, LookupError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError("--resume: the checkpoint's settings are not of this version of the file "
                        f"({first_line(error)})") from None
    return settings


# ---- Checkpoints, written and read ---------------------------------------------------------------


def save_atomic(content, path, write=None):
    """torch.save, or write(content, path), to a temporary name, then a rename: never half a file.

    Raises UserError if that fails, for want of space for instance; what was there before stays.
    """
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        (write or torch.save)(content, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(f"{path} cannot be written ({first_line(error)}); what was there before "
                        "is whole") from None
    finally:  # Ctrl-C leaves none behind either
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_saved(path, mmap=False):
    """What `save_atomic` put there, tensors and plain values only. ValueError for anything else.

    The checksums are read first, since torch.load lets a flipped bit in a tensor pass. A file that
    may not be read is a PermissionError.
    """
    try:
        with zipfile.ZipFile(path) as whole:
            packed = any(part.compress_type != zipfile.ZIP_STORED for part in whole.infolist())
            if packed or whole.testzip() is not None:  # torch.save packs nothing
                raise ValueError
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise ValueError("it holds more than tensors and plain values, so it was refused") from None
    except PermissionError:  # It may be whole.
        raise
    except Exception:  # half a dozen kinds, depending on which byte it is
        raise ValueError("it is damaged or truncated") from None


CHECKPOINT = dict(file=str, settings=dict, step=int, data=str, channels=int, weights=dict,
                  optimisers=dict, scaler=dict, batches=dict(epoch=int, position=int),
                  random=[[Tensor]], losses=[dict(step=int, name=str, value=float)])
SCALER = dict(scale=float, growth_factor=float, backoff_factor=float, growth_interval=int,
              _growth_tracker=int)


def load_checkpoint(path, file):
    """The checkpoint in a run's folder (or the .pt itself), as plain data on the CPU.

    Raises UserError if it is absent, damaged, of another file, or a pickle that would run code.
    """
    path = Path(os.path.expanduser(path))
    if path.is_dir() or path.suffix != ".pt":
        path = path / "last.pt"
    if not path.is_file():
        raise UserError(f"--resume: there is no checkpoint {path}")
    try:
        state = read_saved(path)
    except ValueError as error:
        raise UserError(f"--resume: {path}: {error}; an older best.pt may still be whole") from None
    if not fits(state, CHECKPOINT):
        raise UserError(f"--resume: {path} is not a checkpoint of {file}.py")
    if state["file"] != file:
        raise UserError(f"--resume: {path} was written by {state['file']}.py, not by {file}.py")
    return state


def optimisers_of(model):
    """{name: optimiser}: the attributes of a model that are optimisers."""
    return {k: v for k, v in vars(model).items() if isinstance(v, torch.optim.Optimizer)}


MOMENTS = {torch.optim.Adam: ("exp_avg", "exp_avg_sq"), torch.optim.RMSprop: ("square_avg",)}


def restore(checkpoint, model):
    """Puts weights and optimisers back.

    Raises UserError if the networks are of another shape, NotFinite if a number is not.
    """
    try:
        model.load_state_dict(checkpoint["weights"])
        for name, optimiser in optimisers_of(model).items():
            restore_optimiser(optimiser, checkpoint["optimisers"][name]["state"])
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        raise UserError("--resume: the checkpoint's networks are of another shape than the "
                        f"settings ask for ({reason})") from None
    model.iteration = checkpoint["step"]
    check_finite(model)


def restore_optimiser(optimiser, state):
    """Copies {number of the parameter: its moments}; rates and the like are the model's own.

    Raises an error for what does not fit the parameter: a fused step would write beyond its end.
    """
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    copies = {}
    for number, saved in state.items():
        like = dict.fromkeys(MOMENTS[type(optimiser)], parameters[number])
        like["step"] = torch.ones(())
        for name, tensor in like.items():
            if (saved[name].shape, saved[name].dtype) != (tensor.shape, tensor.dtype):
                raise ValueError(f"{name} of an optimiser is not of its parameter's shape")
        copies[number] = {k: torch.empty_like(v).copy_(saved[k]) for k, v in like.items()}
    optimiser.load_state_dict(optimiser.state_dict() | {"state": copies})


def check_finite(model):
    """Raises NotFinite for a weight, buffer or optimiser's moment that is not."""
    values = list(model.state_dict().items())
    for name, optimiser in optimisers_of(model).items():
        for state in optimiser.state.values():
            values += [(f"{name} {key}", value) for key, value in state.items()]
    for name, value in values:
        if not value.isfinite().all():
            raise NotFinite(f"the weights '{name}' are not finite")


# ---- Run folders ---------------------------------------------------------------------------------

LOG_EVERY = 50  # steps (ours)
SAVE_EVERY = 500


def is_taken(folder):
    """Whether a run, or what could be one, has left something there (a log just opened is not)."""
    log = folder / "log.jsonl"
    written = log.exists() and log.stat().st_size > 0
    return written or (folder / "config.json").exists() or any(folder.glob("*.pt"))


def run_folder(args, default):
    """The run's folder: that of --resume, or the first free name of --out, NAME, NAME-2, ...

    Raises UserError if it holds something else than the run that is to be continued in it.
    """
    out = Path(os.path.expanduser(args.out or default))
    if out.name in ("", ".."):  # such a name cannot be given a -2
        out = out.resolve()
    if args.resume is None:
        names = (out if n == 1 else out.with_name(f"{out.name}-{n}") for n in itertools.count(1))
        return next(name for name in names if not is_taken(name))
    named = Path(os.path.expanduser(args.resume))
    resumed = named.parent if named.is_file() else named
    if args.out is None or out.resolve() == resumed.resolve():
        if not (resumed / "log.jsonl").exists():
            raise UserError(f"--resume: {resumed} holds a checkpoint, but it is no run's folder; "
                            "give the --out of a new one")
        draws = args.sample or getattr(args, "probe", None)
        if named.suffix == ".pt" and named.name != "last.pt" and not draws:
            raise UserError(f"--resume {args.resume} may go back behind its run's last step; give "
                            "the --out of a new run")
        return resumed
    if is_taken(out):
        raise UserError(f"--out {out} holds something else; give a new folder, or leave it out to "
                        f"go on in {resumed}")
    return out


def commands_of(folder):
    """The commands that a run's config.json names, the oldest first; none if there is no such."""
    try:
        about = json.loads((folder / "config.json").read_text())
        return [*about.get("earlier_commands", ()), about["command"]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []


def write_text(text, path):
    path.write_text(text, encoding="utf-8", errors="surrogateescape")


def versions():
    """What a number was measured with, as config.json keeps it; "+": with uncommitted changes."""
    import torchvision

    revision = None
    with contextlib.suppress(OSError):
        command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
        here = Path(__file__).resolve().parent
        revision = subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()
    units = [unit for unit, check in BF16_UNITS.items() if getattr(torch.cpu, check, bool)()]
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    threads = torch.get_num_threads()
    processor = ", ".join([platform.machine(), *units])
    machine = f"{os.cpu_count()} cores, {processor}; {card}; {threads} threads"
    return dict(python=sys.version.split()[0], torch=torch.__version__, machine=machine,
                torchvision=torchvision.__version__, revision=revision or None, threads=threads)


class Run:
    """The folder of one run: its settings, log and checkpoints. Of several ranks only 0 writes.

    config.json   every setting, the commands, versions, hardware
    log.jsonl     a JSON object a line: `step`, `epoch`, then either `img_per_s` and mean losses
                  since the line before, or an evaluation: `steps`, the length of the run, its
                  metrics, and `protocol`, what they were computed from
    samples/, recon/, figures/   pictures by step
    last.pt, best.pt             checkpoints: the latest, and the best by the file's `score_of`
    drawn/, probe-NAME.jsonl     what --sample and --probe leave
    tensorboard/                 with --tensorboard: losses, metrics, samples, reconstructions

    It is made before anything is computed; what was there before changes only once the loop begins.
    Until it ends no other run can write there. Raises UserError if the folder cannot be written or
    is among the pictures of the data set, and if the run has another number of ranks.
    """

    def __init__(self, folder, file, settings, machine, checkpoint=None):
        self.folder = Path(folder)
        self.file = file
        self.settings = settings
        self.machine = machine
        self.checkpoint = checkpoint
        self.rank = from_environment("RANK", "0")
        self.world = from_environment("WORLD_SIZE", "1")
        self.main = self.rank == 0
        self.best = None  # the least score so far, of evaluations by one protocol
        self.protocol = None
        self.signal = 0
        self.step = 0
        self.losses = []
        self.board = None
        self.text = ""
        self.shown = 0.0
        if checkpoint and len(checkpoint["random"]) != self.world:
            raise UserError(f"--resume: the run has {len(checkpoint['random'])} ranks, and here "
                            f"are {self.world}; start as many with torchrun")
        if self.world > 1:
            dist.barrier()  # every rank has chosen the same folder before it is made
        if self.main:
            self.open_folder()

    def open_folder(self):
        """Makes the folder, for this run alone, and opens its log."""
        dataset = self.settings.dataset
        if self.folder.resolve().is_relative_to(Path(dataset).resolve()) and os.sep in dataset:
            raise UserError(f"the run folder {self.folder} is inside its data set, which would get "
                            "the run's pictures; choose another with --out")
        try:
            for name in ("samples", "recon", "figures"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / ".lock", "w")
            self.log_file = open(self.folder / "log.jsonl", "a")
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run writes to {self.folder}; wait for its end, or choose "
                            "another folder with --out") from None
        except OSError as error:
            raise UserError(f"cannot write to the run folder {self.folder}: {error.strerror}; "
                            "choose another with --out") from None
        if self.settings.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard needs a package: pip install tensorboard") from None
            self.board = SummaryWriter(self.folder / "tensorboard")

    def write_config(self):
        """config.json, with the commands that were there before."""
        about = dict(command=" ".join(COMMAND), earlier_commands=commands_of(self.folder),
                     world=self.world, device=str(self.machine.device), precision=self.machine.amp)
        about = dataclasses.asdict(self.settings) | about | versions()
        save_atomic(json.dumps(about, indent=1) + "\n", self.folder / "config.json", write_text)

    def expect(self, *datasets):
        """Notes what the data are. Raises UserError if the run that goes on here had others."""
        self.data = fingerprint(*datasets)
        self.other_data = bool(self.checkpoint) and self.checkpoint["data"] != self.data
        if self.other_data and any(self.folder.glob("*.pt")):  # none in a new --out
            raise UserError(f"--resume: {self.settings.dataset} holds other data than the run was "
                            "trained on; --out NEW starts a new run from its weights")

    def begin(self, model, batches, steps):
        """Puts a checkpoint back, and lets the ranks train one model. Returns the steps done.

        steps: the length of the run. In a new folder other data start a new run from the
        checkpoint's weights. Raises UserError if it is of other networks.
        """
        self.model = model
        self.batches = batches
        self.steps = steps
        torch.manual_seed(self.settings.seed + 1000 * self.rank)  # each rank has its own noise
        if self.checkpoint:
            self.put_back(self.checkpoint)
        for parameter in model.parameters():
            # so an optimiser descends the mean loss of the joint batch, and no model knows of ranks
            if self.world > 1 and parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: average(p.grad))
        if model.iteration == steps and self.main:
            print(f"the run is at step {steps} already; --steps beyond that would continue it",
                  file=sys.stderr)
        self.first = self.step = model.iteration
        self.began = time.time()
        self.start_clock(model.iteration)
        return model.iteration

    def put_back(self, state):
        """Goes on from a checkpoint. Raises UserError, as `begin` says, if that cannot be."""
        restore(state, self.model)
        if self.other_data:
            say(f"{self.settings.dataset} holds other data than the run was trained on: this is a "
                "new run, from step 0, that begins with its weights")
            self.model.iteration = 0
            for optimiser in optimisers_of(self.model).values():
                optimiser.state.clear()  # else Adam would count on from the old run's steps
            return
        if fits(state["scaler"], SCALER):  # empty where the run was not of fp16 so far
            self.machine.scaler.load_state_dict(state["scaler"])
        self.batches.load_state_dict(state["batches"])
        self.losses = [(one["step"], one["name"],
                        torch.tensor(float(one["value"]), device=self.machine.device))
                       for one in state["losses"]]
        try:
            for module, saved in zip(self.generators(), state["random"][self.rank]):
                module.set_rng_state(saved)
        except (RuntimeError, TypeError) as error:
            raise UserError("--resume: the checkpoint's random numbers do not go on here "
                            f"({first_line(error)})") from None
        if (self.folder / "best.pt").exists() and fits(state.get("best"), float):
            self.best = state["best"]
            self.protocol = state.get("protocol")

    def generators(self):
        """The modules that keep the state of the random numbers in use."""
        return [torch, torch.cuda] if self.machine.device.type == "cuda" else [torch]

    def forget_after(self, step):
        """Drops log lines past the checkpoint, and a line torn by a kill: they are redone."""
        path = self.folder / "log.jsonl"
        kept = [line for line in json_lines(path) if fits(line, {"step": int})]
        kept = [json.dumps(line) + "\n" for line in kept if line["step"] <= step]
        self.log_file.close()
        save_atomic("".join(kept), path, write_text)
        self.log_file = open(path, "a")

    def __enter__(self):
        """From here to the end of the `with`, Ctrl-C and SIGTERM are only noted: the loop saves."""
        def note(number, frame):
            self.signal = number

        if self.main:
            for torn in self.folder.glob("*.tmp"):  # of a run that was killed: the lock is ours
                torn.unlink(missing_ok=True)
            self.write_config()
            self.forget_after(self.model.iteration)
        self.handlers = on_signals(note)
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.main:
            self.log_file.close()
            self.lock.close()
        if self.board:
            self.board.close()
        if error is None and self.signal:  # it came during the last evaluation
            self.leave(self.step)
        if isinstance(error, NotFinite):  # a loss, a weight, or what an evaluation found
            raise NotFinite(f"step {self.step}: {error}; the last good checkpoint is "
                            f"{self.folder / 'last.pt'}") from None

    def add(self, step, losses):
        """Keeps one step's losses on the device: reading each at once would stall a GPU."""
        self.step = step
        self.losses += [(step, name, value.detach().float()) for name, value in losses.items()]
        for buffer in self.model.buffers() if self.world > 1 else ():
            if buffer.is_floating_point():  # running statistics: the ranks keep one model
                average(buffer)

    def mean_losses(self):
        """{name: mean since the last line}. Raises NotFinite, first bad step and term."""
        means = {}
        values = torch.stack([v for *_, v in self.losses]).tolist() if self.losses else []
        for (at, name, _), value in zip(self.losses, values):
            if not math.isfinite(value):
                self.step = at
                raise NotFinite(f"the loss '{name}' is {value}")
            means.setdefault(name, []).append(value)
        return {name: round(sum(v) / len(v), 6) for name, v in means.items()}

    def log_losses(self, step):
        """A line of mean losses since the last one. Raises NotFinite."""
        means = self.mean_losses()
        images = (step - self.counted) * self.batches.batch * self.world
        rate = round(images / max(time.time() - self.since, 1e-9), 1)
        self.log(step, img_per_s=rate, **means)
        self.text = "  ".join(f"{k} {v:.3f}" for k, v in means.items()) + f"  {rate:.0f} img/s"
        self.losses = []
        self.start_clock(step)

    def start_clock(self, step):
        """Images a second are counted from here: those of training alone."""
        self.counted = step
        self.since = time.time()

    def log(self, step, **values):
        """One line of log.jsonl. Raises NotFinite for a number that JSON has no word for."""
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise NotFinite(f"'{name}' is {value}")
            if self.board and isinstance(value, int | float):
                self.board.add_scalar(name, value, step)
        if self.main:
            epoch = round(step / self.batches.steps_per_epoch, 3)
            self.log_file.write(json.dumps({"step": step, "epoch": epoch} | values) + "\n")
            self.log_file.flush()

    def status(self, step):
        """One line, rewritten in place on a terminal; elsewhere a line every half minute."""
        terminal = sys.stderr.isatty()
        if self.main and (terminal or time.time() - self.shown > 30 or step == self.steps):
            self.shown = time.time()
            each = (self.shown - self.began) / max(step - self.first, 1)
            minutes, seconds = divmod(round(each * (self.steps - step)), 60)
            line = f"step {step}/{self.steps}  {self.text}  {minutes}:{seconds:02} left"
            print(f"\r\033[K{line}" if terminal else line, end="" if terminal else "\n",
                  file=sys.stderr, flush=True)

    def report(self, step, metrics):
        """Logs an evaluation, and says it in a line that a person reads."""
        precision = self.machine.amp
        if precision == "off":  # on such a GPU `hardware` has asked for tf32
            cuda = self.machine.device.type == "cuda"
            precision = "tf32" if cuda and multiplies_bf16(self.machine.device) else "float32"
        measured = metrics.get("protocol", "")
        if measured != self.protocol:
            self.best = None  # scores by two protocols do not compare
        self.protocol = measured
        protocol = f"{measured}; trained in {precision}".lstrip("; ")
        self.log(step, steps=self.steps, **metrics | {"protocol": protocol})
        for name in ("samples", "recon") if self.board else ():
            path = self.folder / f"{name}/{step:06d}.png"
            if path.exists():
                picture = np.asarray(Image.open(path).convert("RGB"))  # however large it is
                self.board.add_image(name, picture, step, dataformats="HWC")
        shown = {k: rounded(v, 4) if isinstance(v, (int, float)) else v for k, v in metrics.items()
                 if k != "protocol" and not isinstance(v, list)}
        print("\r\033[K" if sys.stderr.isatty() else "", end="", file=sys.stderr, flush=True)
        print(f"step {step}: " + "  ".join(f"{k} {v}" for k, v in shown.items()), flush=True)
        self.start_clock(step)

    def agree(self, flag):
        """True on every rank if `flag` is true on any."""
        if self.world == 1:
            return flag
        most = torch.tensor(float(flag), device=self.machine.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return bool(most)

    def interrupted(self, step):
        """True once Ctrl-C or SIGTERM has arrived; several ranks agree on it every 20 steps."""
        return (self.world == 1 or step % 20 == 0) and self.agree(self.signal > 0)

    def is_best(self, score):
        """Whether this score is the least so far. None never is."""
        better = self.agree(score is not None and (self.best is None or score <= self.best))
        if better:
            self.best = score
        return better

    def check_finite(self):
        """Raises NotFinite for a loss not logged yet, a weight, or fp16's gradients."""
        self.mean_losses()
        check_finite(self.model)
        if self.machine.scaler.get_scale() < 1e-3:  # halved by each step that it had to skip
            raise NotFinite("fp16's gradients are not finite at any scale; use --amp bf16 or off")

    def save(self, name, step):
        """Writes all that resuming needs, as tensors and plain values. Every rank calls it."""
        random = [module.get_rng_state() for module in self.generators()]
        every = [random] * self.world
        if self.world > 1:
            dist.all_gather_object(every, random)
        if self.main:
            state = dict(
                file=self.file, settings=dataclasses.asdict(self.settings), step=step,
                best=self.best, protocol=self.protocol, data=self.data, random=every,
                channels=self.batches.dataset.channels, weights=self.model.state_dict(),
                optimisers={k: v.state_dict() for k, v in optimisers_of(self.model).items()},
                scaler=self.machine.scaler.state_dict(), batches=self.batches.state_dict(),
                losses=[dict(step=at, name=k, value=v.item()) for at, k, v in self.losses])
            save_atomic(state, self.folder / name)

    def leave(self, step):
        """Ends the loop after a signal."""
        raise Interrupted(f"stopped at step {step} and saved; continue with --resume {self.folder}",
                          self.signal or signal.SIGTERM)


# ---- A table of a paper by one command -----------------------------------------------------------

SCORES = ("fid", "fcd", "kl", "mse")  # by the first that is measured: `score_of` of each file


def asks_for_table(argv):
    """Whether --table is among the arguments: the others are then those of its rows."""
    argv = sys.argv[1:] if argv is None else argv
    return any(argument.partition("=")[0] == "--table" for argument in argv)


def run_table(argv, file, tables, main):
    """`--table NAME [--seeds N] [--report] [--out DIR] [other flags]`; returns the exit code.

    Trains each row that has no finished run in DIR by main(flags), and goes on with one that was
    interrupted. Other flags go to every row. Then prints published beside measured, and leaves it
    in DIR/table.md and, a JSON object a number, DIR/results.jsonl. --report trains nothing.

    A table is a dict: title; columns, (heading, data set, metric) each, in % where the heading has
    the sign; rows, {name: (flags, then the published value of each column, or None)}; and, if need
    be, choose, "min" over evaluations or "best" as best.pt; probe, a --probe of ivgen.py; runs, the
    table of the same runs: without --out they lie in its folder, and are trained once for both.
    """
    parser = Parser(prog=f"{file}.py", epilog="Other flags go to every row.", allow_abbrev=False)
    parser.add_argument("--table", choices=list(tables))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--report", action="store_true")
    for flag in ("--device", "--root", "--out", "--dataset"):
        parser.add_argument(flag)
    args, flags = parser.parse_known_args(argv)
    own = {"--resume", "--sample", "--bench", "--probe", "--seed", "--model", "--no-authors"}
    if own & {flag.partition("=")[0] for flag in flags}:
        raise UserError(f"--table sets {', '.join(sorted(own))} by itself; leave them out")
    if not 1 <= args.seeds <= 1000:
        raise UserError(f"--seeds {args.seeds} is out of range: 1 to 1000")
    table = tables[args.table]
    if args.dataset:
        if args.dataset not in [dataset for _, dataset, _ in table["columns"]]:
            flags += ["--dataset", args.dataset]
        table = table_on(table, args.dataset)
    name = f"{file}-table{args.table}"
    folder = Path(os.path.expanduser(args.out or f"runs/{name}"))
    before = [line.get("table") for line in json_lines(folder / "results.jsonl")]
    if (folder / "results.jsonl").exists() and set(before) != {name}:
        raise UserError(f"{folder} holds other results than those of this table; choose another "
                        "folder with --out")
    shared = Path(f"runs/{file}-table{table.get('runs', args.table)}")
    runs = table_runs(file, table, args.seeds, flags, folder if args.out else shared)
    check_flags(runs)
    here = [f"--{flag}={getattr(args, flag)}" for flag in ("device", "root") if getattr(args, flag)]
    missing = {} if args.report else train_runs(runs, here, table, main)
    waiting = {run["folder"] for run in runs if not is_finished(run, table)}
    lines, text = table_text(name, table, runs, waiting)
    text += ["", *table_notes(table, flags, runs, lines, waiting, missing)]
    if from_environment("RANK", "0") == 0:
        if lines:
            folder.mkdir(parents=True, exist_ok=True)  # the runs may lie in that of another table
            save_atomic("\n".join(text) + "\n", folder / "table.md", write_text)
            numbers = "".join(json.dumps(line) + "\n" for line in lines)
            save_atomic(numbers, folder / "results.jsonl", write_text)
        print("\n".join(text))
    return 2 if missing and not lines else 0


def table_on(table, dataset):
    """The table with its columns of this data set or, if it has none, with those of all metrics."""
    kept = [n for n, column in enumerate(table["columns"]) if column[1] == dataset]
    metrics = dict.fromkeys(metric for _, _, metric in table["columns"])
    columns = [table["columns"][n] for n in kept] or [(m, dataset, m) for m in metrics]
    rows = {row: (flags, *([published[n] for n in kept] or [None] * len(columns)))
            for row, (flags, *published) in table["rows"].items()}
    return table | dict(columns=columns, rows=rows)


def table_runs(file, table, seeds, flags, folder):
    """The runs of a table: for each a dict of row, dataset, seed, flags, folder, command."""
    runs = []
    after = f"; --resume RUN --probe {table['probe']}" if table.get("probe") else ""
    for row, (own, *_) in table["rows"].items():
        for dataset in dict.fromkeys(c[1] for c in table["columns"]):
            for seed in range(seeds):
                # named by its flags, so that two rows of the same system share their runs
                name = re.sub(r"[^a-z0-9.]+", "-", f"{own} {Path(dataset).name}".lower())
                given = [*own.split(), "--dataset", dataset, *flags, "--seed", str(seed)]
                runs.append(dict(row=row, dataset=dataset, seed=seed, flags=given,
                                 folder=folder / f"{name.strip('-')}-s{seed}",
                                 command=f"python {file}.py {' '.join(given[:-1])} S{after}"))
    return runs


def json_lines(path):
    """The objects of a file of JSON lines; what is none, as a line torn by a kill, is left out."""
    found = []
    with contextlib.suppress(OSError):
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]


def check_flags(runs):
    """Raises UserError for a run of a table that was trained otherwise than it would be now."""
    for run in runs:
        for first in commands_of(run["folder"])[:1]:  # none if it has not begun
            if " ".join(run["flags"]) + " " not in first:  # seed 1 is not seed 10
                raise UserError(f"{run['folder']} was trained by '{first}': give the same flags, "
                                "or another folder with --out")


def is_finished(run, table):
    lines = json_lines(run["folder"] / "log.jsonl")
    probed = not table.get("probe") or (run["folder"] / f"probe-{table['probe']}.jsonl").exists()
    return probed and any("steps" in line and line["steps"] == line.get("step") for line in lines)


def train_runs(runs, here, table, main):
    """Trains what is not finished, `here`: flags. Returns {folder of a run: why it cannot be}."""
    missing = {}
    began = time.time()
    todo = {run["folder"]: run for run in runs if not is_finished(run, table)}  # rows share runs
    for n, run in enumerate(todo.values()):
        text = f"run {n + 1} of {len(todo)}: {run['row']} on {run['dataset']}, seed {run['seed']}"
        if n:
            left = (time.time() - began) / n * (len(todo) - n) / 60
            text += f", about {left:.0f} min left"
        print(text, file=sys.stderr)
        resume = ["--resume", str(run["folder"]), *here]
        fresh = [*run["flags"], *here, "--out", str(run["folder"])]
        try:
            if not is_finished(run, {}):  # else it only lacks the probe, and stays as it is
                main(resume if (run["folder"] / "last.pt").exists() else fresh)
            if table.get("probe"):
                main([*resume, "--probe", table["probe"]])
        except (UserError, NotFinite) as error:
            if dist.is_initialized():  # the other ranks may not have met it
                raise
            missing[run["folder"]] = str(error)
    return missing


def table_text(name, table, runs, waiting):
    """(lines for results.jsonl, the table as lines of Markdown). waiting: unfinished folders."""
    lines = []
    headings = [heading for heading, _, _ in table["columns"]]
    text = [table["title"], "",
            f"| | {' | '.join(f'{h}, published | {h}, here' for h in headings)} |",
            f"|---|{'---:|' * 2 * len(headings)}"]
    for row, (_, *published) in table["rows"].items():
        cells = [row]
        for (heading, dataset, metric), value in zip(table["columns"], published):
            mine = [run for run in runs if run["row"] == row and run["dataset"] == dataset]
            line = measured(mine, metric, table, 100 if "%" in heading else 1)
            cells += ["–" if value is None else f"{value:g}", "–"]
            if line:
                cells[-1] = rounded(line["value"], 4)
                if "std" in line:
                    cells[-1] += f" ± {rounded(line['std'], 2)} ({line['n_seeds']})"
                lines.append(dict(table=name, row=row, metric=heading, published=value) | line)
                if line["key"] != metric:  # fcd, which is not what was published
                    cells[-1] += f" ({line['key']})"
                    lines[-1] |= dict(metric=f"{heading} ({line['key']})", published=None)
                if any(run["folder"] in waiting for run in mine):
                    cells[-1] += " (unfinished)"
        text.append(f"| {' | '.join(cells)} |")
    return lines, text


def rounded(value, digits):
    """A number with so many significant digits: 490 and not 4.9e+02; beyond a million, 1.2e+13."""
    return f"{float(f'{value:.{digits}g}'):g}"


def measured(runs, metric, table, scale=1):
    """What the runs of one cell, a seed each, have measured: a line for results.jsonl, or None.

    `key` is the metric in their logs: where fid was not measured, for want of its weights, fcd.
    """
    values = []
    seeds = []
    file = f"probe-{table['probe']}.jsonl" if table.get("probe") else "log.jsonl"
    logs = [json_lines(run["folder"] / file) for run in runs]
    if metric == "fid" and not any("fid" in e for log in logs for e in log):
        metric = "fcd"
    for run, log in zip(runs, logs):
        done = [e for e in log if isinstance(e.get(metric), (int, float))]
        if not done:
            continue
        chosen = done[-1]
        by = ""
        if table.get("choose") == "min":
            chosen = min(done, key=lambda e: e[metric])
        elif table.get("choose") == "best":
            score = next((k for k in SCORES if k in chosen), metric)
            chosen = min((e for e in done if score in e), key=lambda e: e[score])
            by = f"; at the best {score}"
        seeds.append(run["seed"])
        protocol = (chosen.get("protocol") or f"iteration {chosen.get('iteration')}") + by
        values.append(scale * chosen[metric])
        try:
            about = json.loads((run["folder"] / "config.json").read_text())
            line = dict(key=metric, command=run["command"], step=chosen.get("step"),
                        protocol=protocol, machine=about["machine"], revision=about["revision"],
                        versions={k: about[k] for k in ("python", "torch", "torchvision")},
                        precision=about["precision"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"{run['folder']} has a damaged config.json ({first_line(error)}): "
                            "remove the run to train it anew") from None
    if not values:
        return None
    mean = sum(values) / len(values)
    if len(values) == 1:
        return dict(value=mean, seed=seeds[0]) | line
    std = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    return dict(value=mean, std=std, n_seeds=len(values), seed=seeds, each=values) | line


def table_notes(table, flags, runs, lines, waiting, missing):
    """What stands under a table: protocol, departures, what is unfinished or cannot be had."""
    text = [f"Protocol: {protocol}" for protocol in dict.fromkeys(x["protocol"] for x in lines)]
    if flags:
        text.append(f"Departures from the paper, in every row: {' '.join(flags)}")
    for why in dict.fromkeys(missing.values()):
        of = (f"{r['row']} on {r['dataset']}" for r in runs if missing.get(r["folder"]) == why)
        text.append(f"{', '.join(dict.fromkeys(of))} cannot be had: {why}")
    for heading, _, metric in table["columns"]:
        if lines and heading not in [line["metric"] for line in lines]:
            how = " (by --inception auto)" if metric in ("fid", "is_inception") else ""
            text.append(f"Not measured: {heading}{how}")
    left = len(waiting - missing.keys())
    if left:
        text.append(f"{left} of {len({run['folder'] for run in runs})} runs are not finished: the "
                    "same command without --report trains them")
    return text


# ---- The command line: look at what you train on -------------------------------------------------


def oblique(points):
    """Points (n, 2) as they are, (n, 3) as seen obliquely, the second axis running back: (n, 2)."""
    depth = points[:, 1:-1].sum(1, keepdim=True)
    return points[:, [0, -1]] + depth * points.new_tensor([0.25, 0.1])


def sheet(dataset):
    """What a network is shown, uint8 (C, H, W): ten by ten images, or the points' density."""
    import torchvision

    if dataset.kind == "points":
        x = oblique(dataset.x)
        reach = 1.05 * float(x.abs().max())
        density = torch.histogramdd(x, [160, 160], range=[-reach, reach] * 2).hist
        shade = (density / density[density > 0].quantile(0.8)).clamp(max=1)
        shade = shade.T.flip(0)[None, None]  # x to the right, y upwards
        return to_uint8(1 - 2 * F.interpolate(shade, scale_factor=4))[0]
    x, _ = next(ordered(dataset, n=100, batch=100))
    x = F.interpolate(x, scale_factor=max(1, 64 // x.shape[-1]))  # `nearest` shows the pixels.
    return to_uint8(torchvision.utils.make_grid(x, nrow=10, pad_value=0.0))


def main(argv=None):
    """`python data.py NAME`: a summary and a sheet of a hundred pictures. Raises UserError."""
    parser = Parser(description="Look at a dataset: a summary, and a sheet of a hundred pictures.")
    names = ", ".join(IMAGE_SETS + POINT_SETS)
    parser.add_argument("name", help=f"{names}, or a folder of pictures")
    parser.add_argument("--root", default="data", help="where downloads and the cache live (data)")
    parser.add_argument("--size", type=int, help="pixels, for folders, celeba and lsun-church")
    parser.add_argument("--split", default="train", help="train (default) or test")
    parser.add_argument("--out", help="the sheet (default: NAME-SPLIT.png)")
    args = parser.parse_args(argv)
    folder = Path(os.path.expanduser(args.name)).resolve()
    if args.out and not args.out.lower().endswith(".png"):
        raise UserError(f"--out {args.out} is no name for the sheet: it has to end in .png")
    args.out = os.path.expanduser(args.out or "")
    inside = Path(args.out or "sheet.png").resolve().is_relative_to(folder)
    if args.name not in IMAGE_SETS + POINT_SETS and inside:
        raise UserError(f"the sheet would be one of the pictures in {folder}: give another --out")
    dataset = load(args.name, args.root, args.size, args.split)
    out = args.out or f"{dataset.name}-{dataset.split}.png"
    picture = Image.fromarray(sheet(dataset).permute(1, 2, 0).squeeze(2).numpy())
    save_atomic(picture, out, functools.partial(Image.Image.save, format="PNG"))
    x = dataset.x
    print(f"{dataset.name} ({dataset.split}): {str(x.dtype)[6:]} {tuple(x.shape)} "
          f"from {x.min():g} to {x.max():g}")
    if dataset.y is None:
        print("no labels")
    else:
        count = dataset.y.bincount()
        triples = f"; in triples {dataset.classes:,} classes" if dataset.stacked else ""
        print(f"{len(count)} labels, each {count.min():,} to {count.max():,} times{triples}")
    print(f"drawn to {out}")


if __name__ == "__main__":
    sys.exit(run_command(main))
