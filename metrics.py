"""What is measured and drawn: FID, KID, inception score, precision and recall; pictures, curves.

Plain functions of tensors, and an `Evaluator` for training loops. What the names mean here:

    fid    Frechet distance in the pooled features of the 2015 TensorFlow Inception network.
           Without its genuine weights, nothing is printed under this name.
    fcd    Frechet distance in the features of this file's own classifier, trained on first use.
           It compares only with another fcd on the same data.
    is     inception score of a run, by this file's own classifier.
    is_li  the same by Li et al.'s classifier of MNIST, trained anew (AIM's Table 1).
    FLD    Frechet distance between a set of codes and N(0, I).

Where pytorch-fid, torch-fidelity and torchmetrics agree, this file agrees with them to rounding.
Where they differ, the network's input follows pytorch-fid (or, as `tf`, the original and
torch-fidelity), and the inception score torch-fidelity: logits without bias, in random order.

FID is biased upwards, the more so the fewer the samples, even between two sets of one distribution.
So numbers of different N do not compare.

    python metrics.py cifar10:test RUN/drawn/               FID of a folder against a data set
    python metrics.py real/ fake/ --fid --kid --is --pr     everything; --json for a line of JSON
    python metrics.py stats real/ real.pt                   its statistics, to be given as A or B
    python metrics.py mnist:test RUN/drawn/ --fcd           needs no downloaded weights

A and B: a folder or data set, also as FOLDER:test; statistics, .pt of `stats`, or .npz with mu and
sigma as pytorch-fid writes them; uint8 pictures as one array, .npy, or arr_0 in a .npz.
"""

import colorsys
import functools
import hashlib
import itertools
import json
import math
import os
import resource
import signal
import sys
import time
from collections import Counter, OrderedDict
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while torch is imported leaves no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

try:
    from data import (  # noqa: I001
        Dataset, NotFinite, Parser, UserError, cache_dir, compile_networks, fingerprint,
        first_line, fits, hardware, json_lines, load, multiplies_bf16, oblique, ordered,
        pictures_of, random_state_kept, read_pictures, read_saved, rounded, run_command,
        save_atomic, to_float, to_uint8, whole_name, write_text)
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"metrics.py: put data.py beside it ({error})", file=sys.stderr)
    sys.exit(2)

# The published conversion of the TensorFlow graph. Any file with another sha256 is refused.
INCEPTION_SHA256 = "6726825d"
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
FOLDER = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights"
INCEPTION_URL = f"{FOLDER}/{INCEPTION_FILE}"
BY_HAND = f"get {INCEPTION_URL} and give its path (metrics.py: --weights; else --inception)"
INCEPTION_RATE = 10  # images a second through that network on two slow cores; with AMX three times
REFERENCE = 10_000  # at most so many real test images are an Evaluator's reference
# fid against training images: MNIST's published one is, and LSUN has only 300 others.
FID_ON_TRAIN = {"mnist": 60_000, "fashion-mnist": 60_000, "lsun-church": 50_000}
LEAST = {"is": 20, "kid": 2, "pr": 4}  # pictures: two in each split, two, more than k
SEED = 2020  # of everything drawn here: it never changes, so evaluations compare


# ---- Features: the Inception network of 2015 -----------------------------------------------------
# It differs from torchvision's inception_v3: 1008 outputs, no auxiliary head, average pools that do
# not count the padding, and a max pool in the last block (a slip of the original graph, which every
# FID since has inherited). Its names are those of the published checkpoint.

HALVE = nn.MaxPool2d(3, 2)
NEIGHBOURS_MEAN = nn.AvgPool2d(3, 1, 1, count_include_pad=False)  # over 6 at an edge, 4 in a corner


class Unit(nn.Module):
    """Convolution, batch norm, ReLU. spec: "64:3/2" is 64 maps, kernel 3 (or "1x7"), stride 2."""

    def __init__(self, cin, spec, padded=True):
        super().__init__()
        width, _, kernel = spec.partition(":")
        kernel, _, stride = kernel.partition("/")
        sides = [int(k) for k in kernel.split("x")]
        kernel = (sides[0], sides[-1])
        padding = (kernel[0] // 2, kernel[1] // 2) if padded and not stride else 0
        self.conv = nn.Conv2d(cin, int(width), kernel, int(stride or 1), padding, bias=False)
        self.bn = nn.BatchNorm2d(int(width), eps=1e-3)
        self.bn.num_batches_tracked = None  # not among the checkpoint's 472 tensors

    def forward(self, x, pool=None):
        x = self.bn(self.conv(x))
        if pool:  # cheaper here: a maximum commutes with the ReLU, a mean with the rest
            x = pool(x)
        return F.relu(x, inplace=True)

    def fold(self):
        """Move the batch norm, a fixed affine map when evaluating, into the convolution."""
        scale = self.bn.weight.double() / (self.bn.running_var.double() + self.bn.eps).sqrt()
        shift = self.bn.bias.double() - self.bn.running_mean.double() * scale
        self.conv.weight.data = (self.conv.weight.double() * scale[:, None, None, None]).float()
        self.conv.bias = nn.Parameter(shift.float())
        self.bn = nn.Identity()


class Block(nn.Module):
    """Parallel branches, concatenated in the order given, the pooling branch last.

    branches: by name a chain of units, as in "64:1 96:3". They are called `<name>_1`, `<name>_2`,
    ..., or just `<name>` if there is one. "384:1x3|384:3x1" at the end is a fork into `<name>_2a`
    and `<name>_2b`. pool: "avg" or "max", followed by a unit of `pool_width` maps, or "reduce".
    """

    def __init__(self, cin, pool, pool_width=0, **branches):
        super().__init__()
        self.pool = pool
        self.chains = []  # for each branch: for each step, the names of its one or two units
        for name, chain in branches.items():
            specs = chain.split()
            width = cin
            steps = []
            for i, spec in enumerate(specs, 1):
                forks = spec.split("|")
                key = f"{name}_{i}" if len(specs) > 1 else name
                names = [key] if len(forks) == 1 else [key + "a", key + "b"]
                for key, fork in zip(names, forks):
                    self.add_module(key, Unit(width, fork))
                width = int(spec.partition(":")[0])
                steps.append(names)
            self.chains.append(steps)
        if pool_width:
            self.branch_pool = Unit(cin, f"{pool_width}:1")

    def forward(self, x):
        """(B, cin, H, W) -> the branches, concatenated."""
        out = []
        for steps in self.chains:
            h = [x]
            for names in steps:
                h = [self._modules[name](h[0]) for name in names]
            out += h
        if self.pool == "avg":
            out.append(self.branch_pool(x, NEIGHBOURS_MEAN))
        elif self.pool == "max":
            out.append(self.branch_pool(F.max_pool2d(x, 3, 1, 1)))
        else:
            out.append(HALVE(x))
        return torch.cat(out, 1)


def block_35(cin, pool_width):
    return Block(cin, "avg", pool_width,
                 branch1x1="64:1", branch5x5="48:1 64:5", branch3x3dbl="64:1 96:3 96:3")


def block_17(c):
    return Block(768, "avg", 192, branch1x1="192:1", branch7x7=f"{c}:1 {c}:1x7 192:7x1",
                 branch7x7dbl=f"{c}:1 {c}:7x1 {c}:1x7 {c}:7x1 192:1x7")


def block_8(cin, pool):
    return Block(cin, pool, 192, branch1x1="320:1", branch3x3="384:1 384:1x3|384:3x1",
                 branch3x3dbl="448:1 384:3 384:1x3|384:3x1")


class Inception(nn.Module):
    """The FID Inception network: (B, 3, 299, 299) in [-1, 1] -> pooled features (B, 2048)."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, "32:3/2")  # -> (B, 32, 149, 149)
        self.Conv2d_2a_3x3 = Unit(32, "32:3", padded=False)
        self.Conv2d_2b_3x3 = Unit(32, "64:3")  # -> (B, 64, 147, 147)
        self.Conv2d_3b_1x1 = Unit(64, "80:1")
        self.Conv2d_4a_3x3 = Unit(80, "192:3", padded=False)  # -> (B, 192, 71, 71)
        self.Mixed_5b = block_35(192, 32)  # -> (B, 256, 35, 35)
        self.Mixed_5c = block_35(256, 64)
        self.Mixed_5d = block_35(288, 64)
        self.Mixed_6a = Block(288, "reduce",  # -> (B, 768, 17, 17)
                              branch3x3="384:3/2", branch3x3dbl="64:1 96:3 96:3/2")
        self.Mixed_6b = block_17(128)
        self.Mixed_6c = block_17(160)
        self.Mixed_6d = block_17(160)
        self.Mixed_6e = block_17(192)
        self.Mixed_7a = Block(768, "reduce", branch3x3="192:1 320:3/2",  # -> (B, 1280, 8, 8)
                              branch7x7x3="192:1 192:1x7 192:7x1 192:3/2")
        self.Mixed_7b = block_8(1280, "avg")  # -> (B, 2048, 8, 8)
        self.Mixed_7c = block_8(2048, "max")
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)), HALVE)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x), HALVE)  # -> (B, 192, 35, 35)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean((2, 3))  # (B, 2048, 8, 8) -> (B, 2048)


def inception_state(weights):
    """The tensors of the genuine weights, downloaded ("auto") or of a path; UserError otherwise."""
    path = Path(os.path.expanduser(weights))
    if weights == "auto":  # torch.hub checks what it downloads, not what lies there already
        path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if weights == "auto" and not path.is_file():
        try:
            with redirect_stdout(sys.stderr):  # where torch.hub says what it downloads: no result
                return torch.hub.load_state_dict_from_url(
                    INCEPTION_URL, map_location="cpu", check_hash=True, weights_only=True,
                    progress=sys.stderr.isatty())
        except Exception as error:  # no network, a proxy's page instead of the file, a full disk
            raise UserError(f"the weights FID needs could not be downloaded ({error}): {BY_HAND}, "
                            f"or put it into {path.parent}") from error
    if not path.is_file():
        raise UserError(f"there is no file of Inception weights at {path}: {BY_HAND}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(INCEPTION_SHA256):
        raise UserError(f"{path} is not the 2015 Inception network ({digest[:8]}...): {BY_HAND}")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_inception(weights="auto"):
    """The genuine network, ready for use: batch norm folded, channels last, no gradients.

    weights: "auto" (torch.hub's cache, or a download) or a path. Only tensors are read, and only
    from a file whose sha256 starts with INCEPTION_SHA256. UserError otherwise.
    """
    with torch.device("meta"):  # initial weights would take time and the caller's random numbers
        net = Inception()
    # The file is known by its hash. Strict, batch norm's loader would mind its counters.
    net.load_state_dict(inception_state(weights), strict=False, assign=True)
    for module in net.modules():
        if isinstance(module, Unit):
            module.fold()
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def inception_default(asked, paper_has_fid, device, samples=50_000, what="FID"):
    """The weights for an Evaluator ("auto", a path, or None) from what --inception asked.

    asked: None (flag not given), "off", "auto" or a path. Without the flag, FID is measured on CUDA
    if the paper prints it for this data. Otherwise stderr says why not. samples: per evaluation;
    what: what the paper prints by those features.
    """
    if asked or not paper_has_fid:
        return None if asked == "off" else asked
    if torch.device(device).type == "cuda":
        try:
            inception_state("auto")
            return "auto"
        except UserError as error:
            why = f"{what} is not measured, but where there are labels fcd is: {error}"
    else:
        minutes = math.ceil(samples / INCEPTION_RATE / 60)
        why = (f"{what} is not measured by default on a CPU, where {samples:,} samples would take "
               f"about {minutes} minutes at each evaluation: --inception auto asks for it")
    print(f"{why} (--inception off silences this sentence)", file=sys.stderr)
    return None


def resize_tf(x, size=299):
    """TensorFlow 1's bilinear resize, not antialiased: (B, C, H, W) -> (B, C, size, size), float32.

    It lacks an offset of half a pixel: a fault, but the first published FIDs were made with it.
    """
    for dim in (2, 3):
        n = x.shape[dim]
        source = torch.arange(size, dtype=torch.float32, device=x.device) * (n / size)
        low = source.floor().long().clamp(max=n - 1)
        high = (low + 1).clamp(max=n - 1)
        weight = (source - low).view((-1, 1) if dim == 2 else (-1,))
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), weight)
    return x


def inception_input(u8, flavour):
    """uint8 (B, 1 or 3, H, W) -> float32 (B, 3, 299, 299), prepared as `flavour` has it.

    "pytorch-fid" and "tf" differ by several per cent in FID, so every protocol line names it.
    """
    x = u8.float()
    if x.shape[1] == 1:
        x = x.expand(-1, 3, -1, -1)
    if flavour == "tf":  # torch-fidelity and the TensorFlow original
        return (resize_tf(x) - 128) / 128
    # pytorch-fid: half-pixel centres, no antialias
    return 2 * F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False) - 1


def stack_images(images, prepare):
    """`prepare` of a batch (B, C, H, W), or of a list of (C, H, W), equal sizes together."""
    if isinstance(images, Tensor):
        return prepare(images)
    out = [None] * len(images)
    for shape in {image.shape for image in images}:
        rows = [i for i, image in enumerate(images) if image.shape == shape]
        for i, x in zip(rows, prepare(torch.stack([images[i] for i in rows]))):
            out[i] = x
    return torch.stack(out)


@contextmanager
def full_float32():
    """Without tf32, which would cost three digits; a training run gets its switches back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class InceptionFeatures:
    """uint8 images -> (features (B, 2048), logits (B, 1008)), float32, by the genuine weights only.

    Images: a batch (B, C, H, W), or a list of (C, H, W) of any sizes. flavour: see inception_input.
    amp: None, or "bf16", which is faster at an error of some 5e-3 and is named in the protocol.
    """

    metric = "fid"
    dim = 2048

    def __init__(self, weights="auto", device="cpu", flavour="pytorch-fid", amp=None):
        if flavour not in ("pytorch-fid", "tf") or amp not in (None, "off", "bf16"):
            raise UserError(f"Inception features have no flavour {flavour} with amp {amp}")
        self.net = weights and load_inception(weights).to(device)  # None: statistics alone
        self.device = torch.device(device)
        self.flavour = flavour
        self.amp = "bf16" if amp == "bf16" else None
        amp = ", bf16" if self.amp else ""
        self.name = f"2015 Inception features (d=2048, {flavour} flavour{amp})"
        self.key = {"features": "inception", "sha256": INCEPTION_SHA256, "flavour": flavour,
                    "amp": self.amp}

    @torch.no_grad()
    def __call__(self, images):
        bf16 = torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp == "bf16")
        parts = []
        for start in range(0, len(images), 64):  # 64 pictures of 299x299 need some 2 GB
            x = stack_images(images[start : start + 64],
                             lambda u8: inception_input(u8.to(self.device), self.flavour))
            with full_float32(), bf16:
                parts.append(self.net(x.contiguous(memory_format=torch.channels_last)).float())
        features = torch.cat(parts)
        with full_float32(), torch.autocast(self.device.type, enabled=False):
            return features, features @ self.net.fc.weight.T  # "logits_unbiased" of the original


# ---- Statistics ----------------------------------------------------------------------------------

def as_tensor(x):
    """A tensor or an array as it is; plain numbers and lists in float64."""
    return torch.as_tensor(x, dtype=None if hasattr(x, "dtype") else torch.float64)


def finite(x, what):
    """x itself. NotFinite for NaN, infinity, and beyond 1e75: covariances' products overflow."""
    least, most = x.detach().aminmax()  # one pass, and no mask as large as x
    if not max(-least, most) < 1e75:
        raise NotFinite(f"{what} must be finite, but some are NaN or infinite")
    return x


def as_features(f, least=1):
    """f as a tensor (N, d) of at least `least` rows, otherwise ValueError. NotFinite for NaN."""
    f = as_tensor(f).detach()
    if f.ndim != 2 or f.shape[1] == 0:
        raise ValueError(f"features must have the shape (N, d), not {tuple(f.shape)}")
    if len(f) < least:
        raise ValueError(f"needs at least {least} rows of features, got {len(f)}")
    return finite(f, "features")


def as_pair(f1, f2, least):
    """Both as as_features makes them, and of one dimension, otherwise ValueError."""
    f1, f2 = (as_features(f, least) for f in (f1, f2))
    if f1.shape[1] != f2.shape[1]:
        raise ValueError(f"the two sets have {f1.shape[1]} and {f2.shape[1]} dimensions")
    return f1, f2


class Moments:
    """Streaming mean (d,) and covariance (d, d) in float64, for rows in any order and division.

    Sums of squares are kept about the running mean, so no digits cancel as in E[xx'] - E[x]E[x]'.
    Memory is d*d numbers, whatever N is. Source: Chan, Golub and LeVeque 1979, pairwise update.
    """

    def __init__(self, dim, device="cpu"):
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        # sum of (x - mean)(x - mean)'
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features):
        """Take in features (B, d). Returns self. ValueError for NaN, infinity and another d."""
        rows = as_features(features)
        if rows.shape[1] != len(self.mean):
            raise ValueError(f"these rows have {rows.shape[1]} not {len(self.mean)} dimensions")
        rows = rows.to(self.mean)  # float64, and where the statistics are
        mean = rows.mean(0)
        total = self.n + len(rows)
        delta = mean - self.mean
        # One more row carries the distance between the two means.
        between = (math.sqrt(self.n * len(rows) / total) * delta)[None]
        deviations = torch.cat([rows - mean, between])
        self.scatter.addmm_(deviations.T, deviations)
        self.mean += delta * (len(rows) / total)
        self.n = total
        return self

    @property
    def cov(self):
        """Unbiased covariance (d, d); ValueError for fewer than two rows."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.n}")
        return self.scatter / (self.n - 1)

    def state(self):
        """Plain values and CPU tensors, to be saved; `of` makes Moments of them again."""
        return {"n": self.n, "mean": self.mean.cpu().clone(), "scatter": self.scatter.cpu().clone()}

    @classmethod
    def of(cls, state, dim=None):
        """From features (N, d), or a state() out of any file; ValueError for none of `dim`."""
        if not isinstance(state, dict):
            return cls(as_features(state).shape[1]).update(state)
        if not fits(state, {"n": int, "mean": Tensor, "scatter": Tensor}):
            raise ValueError("it lacks a count, a mean or a covariance")
        moments = cls(0)
        moments.n = state["n"]
        moments.mean = state["mean"].double().clone()
        moments.scatter = state["scatter"].double().clone()
        if dim not in (None, moments.mean.numel()):
            raise ValueError(f"it has {moments.mean.numel()} dimensions, not {dim}")
        moments.distance(moments)  # checks count, shapes, symmetry, eigenvalues, that all is finite
        return moments

    def distance(self, other):
        """frechet_distance to other Moments."""
        return frechet_distance(self.mean.cpu(), self.cov.cpu(), other.mean.cpu(), other.cov.cpu())


def progress(what, done, total, began, step=1):
    """A status line on stderr: rewritten in place on a terminal, else a line for each tenth."""
    terminal = sys.stderr.isatty()
    last = done >= total
    if terminal or last or done * 10 // total != max(done - step, 0) * 10 // total:
        rate = done / max(time.time() - began, 1e-9)
        left = max(total - done, 0) / rate
        line = f"{what}: {done:,}/{total:,}  {rate:,.1f}/s  {left:,.0f} s left"
        print(line, end="\r" if terminal and not last else "\n", file=sys.stderr, flush=True)


@torch.no_grad()
def collect(batches, extractors, total, keep=(), label=None):
    """Run the extractors over batches of uint8 images. Returns {metric: {"moments": Moments, ...}}.

    keep: "features", "logits" or both, to be held for all `total` images. label: name of progress.
    """
    out = {}
    for extract in extractors:
        device = extract.device if extract.device.type == "cuda" else "cpu"  # others lack float64
        out[extract.metric] = {"moments": Moments(extract.dim, device)}
    began = time.time()
    done = 0
    for images in batches:
        for extract in extractors:
            got = out[extract.metric]
            values = dict(zip(("features", "logits"), extract(images)))
            got["moments"].update(values["features"])
            for name in keep:
                if name not in got:  # one allocation: a list and its concatenation are two
                    got[name] = torch.empty(total, values[name].shape[1])
                got[name][done : done + len(images)] = values[name]
        done += len(images)
        if label:
            progress(label, done, total, began, len(images))
    return out


def digest_of(key):
    """16 hexadecimal digits for a dict of plain values."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def cached(folder, kind, key, build, use):
    """use(build()), a dict that is kept in `folder` under `key`; built anew where use() raises."""
    text = json.dumps(key, sort_keys=True)
    path = Path(folder) / f"{kind}-{digest_of(key)}.pt"
    with suppress(Exception):  # absent, cut short, another format, code in it: all are built anew
        saved = read_saved(path)
        if saved["key"] == text:
            return use(saved)
    if path.exists():
        print(f"{path} is damaged or out of date: rebuilding it", file=sys.stderr)
    saved = {"key": text, **build()}
    try:
        save_atomic(saved, path)
    except UserError as error:
        print(f"{error}: it will be made again next time", file=sys.stderr)
    return use(saved)


def real_images(dataset, n, batch, device, size=None):
    """n images in batches of uint8 at `size` pixels, rounded as a model's samples are.

    The first n in a fixed order, in which a part is a random one.
    """
    part = n < len(dataset)
    return (to_uint8(x) for x, _ in ordered(dataset, n, batch, device, size, permuted=part))


def real_statistics(dataset, n, size, extract, root="data", batch=250, label=None):
    """{"moments", "is"} of `real_images`, at `size` pixels (None: their own), cached.

    `is`: None without a classifier. The cache's key holds data, network, weights and precision.
    """

    def build():
        images = real_images(dataset, n, batch, extract.device, size)
        scored = extract.metric == "fcd" and n >= LEAST["is"]
        got = collect(images, [extract], n, ["logits"] * scored, label)[extract.metric]
        score = inception_score(got["logits"].double().softmax(1))[0] if scored else None
        return {**got["moments"].state(), "is": score}

    key = {"dataset": dataset.name, "split": dataset.split, "content": fingerprint(dataset),
           "n": n, "size": size} | ({"permuted": True} if n < len(dataset) else {})
    return cached(cache_dir(root), "stats", {**key, **extract.key}, build, lambda saved: {
        "moments": Moments.of(saved, extract.dim), "is": saved["is"] and float(saved["is"])})


# ---- Distances -----------------------------------------------------------------------------------

def frechet_distance(mu1, cov1, mu2, cov2):
    """Squared Frechet distance of Gaussians, |mu1-mu2|^2 + Tr(cov1 + cov2 - 2(cov1 cov2)^(1/2)).

    Means (d,), covariances (d, d), positive semidefinite of any rank; plain numbers for d = 1. In
    float64, never negative, 0.0 for equal inputs. ValueError for mismatched dimensions, NotFinite,
    asymmetry, negative eigenvalues. Source: Dowson and Landau 1982; Heusel et al. 2017.
    """
    mu1, mu2 = (torch.atleast_1d(as_tensor(mu).detach().double()) for mu in (mu1, mu2))
    cov1, cov2 = (torch.atleast_2d(as_tensor(cov).detach().double()) for cov in (cov1, cov2))
    d = mu1.numel()
    if mu1.shape != (d,) or mu2.shape != (d,) or cov1.shape != (d, d) or cov2.shape != (d, d):
        raise ValueError("means must be (d,) and covariances (d, d), with one d for all")
    finite(torch.cat([mu1[None], mu2[None], cov1, cov2]), "means and covariances")
    for cov in (cov1, cov2):
        if ((cov - cov.T).abs() > 1e-3 * cov.abs().max()).any():
            raise ValueError("covariances must be symmetric")
    if torch.equal(mu1, mu2) and torch.equal(cov1, cov2):
        check_semidefinite(cov1)
        return 0.0  # exactly: rounding would leave some 1e-10
    between = (mu1 - mu2).square().sum().item()
    traces = (cov1.trace() + cov2.trace()).item()
    return max(0.0, between + traces - 2 * trace_of_root(cov1, cov2))


def check_semidefinite(cov):
    """ValueError for negative eigenvalues beyond rounding, 1e-3 of the scale."""
    shifted = cov.clone()
    shifted.diagonal().add_(1e-3 * cov.diagonal().abs().max())
    if torch.linalg.cholesky_ex(shifted).info and cov.any():
        raise ValueError("covariances must be positive semidefinite, without negative eigenvalues")


def trace_of_root(cov1, cov2):
    """Tr (cov1 cov2)^(1/2) by symmetric eigenproblems; no square root of a matrix is ever formed.

    With cov1 = L L' (Cholesky) the eigenvalues of cov1 cov2 are those of L' cov2 L. If neither
    matrix is positive definite (N <= d), the trace is the nuclear norm of F1' F2 for any factors
    cov = F F'. Here F is made of the eigenvectors whose eigenvalues are not rounding errors.
    """
    least = len(cov1) * torch.finfo(torch.float64).eps
    for a, b in ((cov1, cov2), (cov2, cov1)):
        factor, failed = torch.linalg.cholesky_ex(a)
        pivots = factor.diagonal().square()
        if not failed and pivots.min() > least * pivots.max():
            check_semidefinite(b)
            return torch.linalg.eigvalsh(factor.T @ b @ factor).clamp(min=0).sqrt().sum().item()
    factors = []
    for a in (cov1, cov2):
        check_semidefinite(a)
        values, vectors = torch.linalg.eigh(a)
        kept = values > least * values[-1]
        factors.append(vectors[:, kept] * values[kept].sqrt())
    return nuclear_norm(factors[0].T @ factors[1])


def frechet_distance_features(f1, f2):
    """frechet_distance of the Gaussians fitted to features (N1, d) and (N2, d), N >= 2 each.

    For at most d rows each, no covariance is formed: with centred rows C, Tr (cov1 cov2)^(1/2) is
    the nuclear norm of C1 C2' / sqrt((N1-1)(N2-1)), exactly (Gram form), and many times faster.
    """
    f1, f2 = as_pair(f1, f2, 2)
    if max(len(f1), len(f2)) > f1.shape[1]:
        return Moments.of(f1).distance(Moments.of(f2))
    if torch.equal(f1, f2):
        return 0.0
    mu1, mu2 = (f.mean(0, dtype=torch.float64) for f in (f1, f2))
    c1 = f1 - mu1  # float64 by promotion, in one pass
    c2 = f2 - mu2
    squares1, squares2 = (torch.linalg.vector_norm(c).square() for c in (c1, c2))
    n1, n2 = (len(f) - 1 for f in (f1, f2))
    between = (mu1 - mu2).square().sum().item()
    traces = (squares1 / n1 + squares2 / n2).item()
    # The rows of c1 add up to zero, so one singular value is known to vanish.
    root = nuclear_norm(c1 @ c2.T, known_zero=1) / math.sqrt(n1 * n2)
    return max(0.0, between + traces - 2 * root)


def nuclear_norm(m, known_zero=0):
    """Sum of the singular values of m (a, b) in float64; `known_zero` of them vanish. Source: ours.

    Taken as roots of the eigenvalues of m m', at a third of the cost. A root magnifies the rounding
    of small ones. If that may come to 1e-8 of the sum, the singular values themselves are computed.
    """
    if len(m) > m.shape[1]:
        m = m.T
    squares = torch.linalg.eigvalsh(m @ m.T)[known_zero:].clamp(min=0)  # ascending
    values = squares.sqrt()
    rounding = torch.finfo(torch.float64).eps * squares[-1:]
    if (rounding / values).sum() < 1e-8 * values.sum():  # False for 0 / 0
        return values.sum().item()
    return torch.linalg.svdvals(m).sum().item()


def frechet_latent_distance(z):
    """FLD: Frechet distance between codes z (N, d), N >= 2, and N(0, I).

    |mean|^2 + Tr(S + I - 2 S^(1/2)) = |mean|^2 + sum (s - 1)^2, with s^2 the eigenvalues of the
    covariance S. ValueError for fewer rows, NotFinite. Source: the IVAAE paper (60,000 codes).
    """
    z = as_features(as_tensor(z).double(), 2)
    s = torch.linalg.eigvalsh(torch.cov(z.T).view(z.shape[1], -1)).clamp(min=0).sqrt()
    return (z.mean(0).square().sum() + (s - 1).square().sum()).item()


def kernel_distance(f1, f2, subsets=100, size=1000, seed=2020):
    """KID: unbiased squared MMD with the kernel (x.y/d + 1)^3, as (mean, std) over random subsets.

    Features (N, d); subsets of `size` rows, else ValueError. Unbiased, so it can be negative. The
    std has ddof 0; None where no two subsets differ. Source: Binkowski et al. 2018, 1801.01401.
    """
    f1, f2 = as_pair(f1, f2, 2)
    if size < 2 or subsets < 1 or min(len(f1), len(f2)) < size:
        raise ValueError(f"cannot draw {subsets} subsets of {size} of {len(f1)}, {len(f2)} rows")
    generator = torch.Generator().manual_seed(seed)

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    values = []
    for _ in range(subsets):
        x, y = (f[torch.randperm(len(f), generator=generator)[:size]].double() for f in (f1, f2))
        xx = kernel(x, x)
        yy = kernel(y, y)
        # The diagonals pair a sample with itself. Counted, they would bias the estimate upwards.
        same = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        values.append((same - 2 * kernel(x, y).mean()).item())
    values = torch.tensor(values, dtype=torch.float64)
    differ = subsets > 1 and size < max(len(f1), len(f2))
    return values.mean().item(), values.std(correction=0).item() if differ else None


def mmd_imq(a, b):
    """WAE-MMD's penalty: the unbiased MMD^2 of codes a (n, d) and b (m, d), n, m >= 2; a scalar.

    Kernels C / (C + |a - b|^2), C = 2 d s, summed over s in {.1, .2, .5, 1, 2, 5, 10}; 2 d is the
    mean squared distance of two draws from N(0, I). Unbiased, so it can be negative.
    """
    def kernel(u, v):
        d2 = (u.square().sum(1)[:, None] + v.square().sum(1) - 2 * u @ v.T).clamp_min(0)
        scales = [2 * a.shape[1] * s for s in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)]
        return sum(c / (c + d2) for c in scales)

    def within(k):
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    return within(kernel(a, a)) + within(kernel(b, b)) - 2 * kernel(a, b).mean()


def inception_score(probs, splits=10):
    """exp of the mean KL(p(y|x) || p(y)), as (mean, std with ddof 0) over `splits` parts.

    probs: distributions (N, C) over classes, otherwise ValueError, in random order, since the parts
    are consecutive; each of 2 rows or more, as one alone has always the score 1. The score lies in
    1..C. Source: Salimans et al. 2016, arXiv:1606.03498.
    """
    probs = as_features(probs).double()
    if splits < 1 or len(probs) < 2 * splits:
        raise ValueError(f"cannot divide {len(probs)} rows into {splits} splits of 2 or more")
    if (probs < 0).any() or ((probs.sum(1) - 1).abs() > 1e-3).any():
        raise ValueError("inception_score takes probabilities: rows, not negative, that sum to 1")
    scores = []
    for i in range(splits):
        p = probs[i * len(probs) // splits : (i + 1) * len(probs) // splits]
        q = p.mean(0, keepdim=True)
        # xlogy(0, 0) = 0: a class that is never predicted adds nothing.
        scores.append((torch.xlogy(p, p) - torch.xlogy(p, q)).sum(1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def precision_recall(real, fake, k=3, chunk=1000):
    """(precision, recall): share of fake (real) rows inside the manifold of the real (fake) rows.

    A set's manifold is the union of balls around its rows, each reaching to its k-th nearest
    neighbour, the boundary (to rounding) included. Features (N, d), more than k rows each, else
    ValueError. In float64, `chunk` rows at a time. Source: Kynkaanniemi et al. 2019 (k = 3).
    """
    real, fake = as_pair(real, fake, k + 1)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    middle = real.mean(0, dtype=torch.float64)
    # cdist multiplies matrices, which far from 0 would cost digits.
    real, fake = (f - middle for f in (real, fake))
    small = 1e-5 * max(f.norm(dim=1).max() for f in (real, fake))

    def distances(a, b, near=0):  # rows with more than `near` small ones from differences
        d = torch.cdist(a, b)
        rounded = (d <= small).sum(1) > near
        d[rounded] = torch.cdist(a[rounded], b, compute_mode="donot_use_mm_for_euclid_dist")
        return d

    def covered(points, centers):
        # k + 1, because a row is its own nearest neighbour, at distance 0.
        radii = [distances(c, centers, 1).kthvalue(k + 1).values for c in centers.split(chunk)]
        reach = torch.cat(radii) * (1 + 1e-9)
        inside = [(distances(p, centers) <= reach).any(1) for p in points.split(chunk)]
        return torch.cat(inside).double().mean().item()

    return covered(fake, real), covered(real, fake)


def grid_modes(points, centers, std):
    """(modes reached, share of high-quality points) of points (N, D) for a mixture of Gaussians.

    centers: its means (K, D); std: theirs, positive. High quality is within 3 std of the nearest
    mean, edge (to rounding) included; that mode is then reached. Source: the AIM paper, 2-D grid.
    """
    points, centers = as_pair(points, centers, 1)
    if not std > 0:
        raise ValueError(f"std must be positive, got {std}")
    # Not cdist: as a product of matrices it loses the digits that decide at the edge.
    differences = points.double()[:, None] - centers.to(points.device).double()
    nearest, mode = differences.norm(dim=2).min(1)  # (N, K) -> (N,)
    largest = centers.abs().max().item() + 3 * std  # coordinate of a point at an edge
    eps = torch.finfo(torch.promote_types(points.dtype, torch.float32)).eps
    good = nearest <= 3 * std + 4 * eps * largest
    return mode[good].unique().numel(), good.double().mean().item()


def stacked_modes(labels, classes=1000):
    """(modes reached, KL to uniform in nats) of integer labels (N,) in 0..classes-1 (PacGAN)."""
    labels = torch.as_tensor(labels)
    if labels.ndim != 1 or not len(labels) or labels.is_floating_point():
        raise ValueError(f"labels must be integers (N,), not {labels.dtype} {tuple(labels.shape)}")
    labels = labels.long()  # in int8 or uint8 `classes` would overflow
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels must lie in 0..{classes - 1}, got {labels.min()}..{labels.max()}")
    counts = torch.bincount(labels.cpu(), minlength=classes)
    p = counts.double() / len(labels)
    return int((counts > 0).sum()), max(0.0, torch.xlogy(p, p * classes).sum().item())


def reconstruction_mse(x, y):
    """Mean squared error of x and y in float64; of images in [-1, 1] it is `mse_pm1`, 4 `mse`."""
    x, y = (as_tensor(t).detach() for t in (x, y))
    if x.shape != y.shape or not x.numel():
        raise ValueError(f"needs two tensors of one shape, got {tuple(x.shape)}, {tuple(y.shape)}")
    return F.mse_loss(y.double(), x.double()).item()


# ---- Classifiers ---------------------------------------------------------------------------------
# An inception score depends on its classifier. AIM's Table 1 scores MNIST by that of Li et al.
# (ALICE, NeurIPS 2017; github.com/ChunyuanLI/MNIST_Inception_Score): real test images get 9.879.
# They train on 55,000 images and four fixed copies of each, turned by up to 15 degrees and moved by
# up to 2 pixels, and choose weights on 5,000 more. Here copies are new each time, of 60,000 images,
# the last weights are taken, and the rate is larger, in one cycle. Real test images get 9.875.

RECIPE = {"version": 1, "side": 32, "features": 128, "batch": 128, "lr": 0.1, "weight_decay": 5e-4,
          "seed": 0}
LI = {"version": 1, "network": "Li et al. 2017", "side": 28, "features": 1024, "channels": 1,
      "batch": 200, "lr": 2e-3, "epochs": 20, "degrees": 15, "pixels": 2, "plain": 0.2, "seed": 0}


def classifier_recipe(channels, device):
    """The settings of the training, part of the cache's key. Grey: 99 % on MNIST in seconds."""
    if channels == 1:
        return {**RECIPE, "channels": 1, "width": 16, "epochs": 2, "flip": False}
    epochs = 30 if device.type == "cuda" else 8
    return {**RECIPE, "channels": 3, "width": 32, "epochs": epochs, "flip": True}


def build_classifier(recipe, classes):
    """The network of a recipe, ours for 32 x 32 pixels or Li et al.'s for 28 x 28.

    Images (B, C, S, S) in [-1, 1] -> `body`: features (B, d), not negative -> `head`: logits.
    """
    d = recipe["features"]
    if recipe.get("network") == LI["network"]:
        body = nn.Sequential(
            nn.Conv2d(1, 32, 5, 1, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(49 * 64, d, bias=False), nn.BatchNorm1d(d), nn.ReLU())
        head = nn.Sequential(nn.Dropout(0.3), nn.Linear(d, classes))
        return nn.Sequential(OrderedDict(body=body, head=head))
    layers = []
    channels = recipe["channels"]
    for factor, kernel, stride in ((1, 5, 2), (2, 3, 1), (2, 3, 2), (4, 3, 2)):  # 32x32 -> 4x4
        maps = factor * recipe["width"]
        layers += [nn.Conv2d(channels, maps, kernel, stride, kernel // 2, bias=False),
                   nn.BatchNorm2d(maps), nn.ReLU()]
        channels = maps
    layers += [nn.Flatten(), nn.Linear(16 * channels, d, bias=False), nn.BatchNorm1d(d), nn.ReLU()]
    return nn.Sequential(OrderedDict(body=nn.Sequential(*layers), head=nn.Linear(d, classes)))


def distort(x, degrees, pixels, plain):
    """Images (B, C, S, S) in [-1, 1], turned and moved at random by up to `degrees` and `pixels`.

    A share `plain` is not; what comes in is black. Source: Li et al., who move by whole pixels.
    """
    n = len(x)
    angle = (torch.rand(n, device=x.device) * 2 - 1) * (degrees * math.pi / 180)
    shift = (torch.rand(n, 2, device=x.device) * 2 - 1) * (pixels * 2 / x.shape[2])
    moved = torch.rand(n, device=x.device) >= plain
    angle = angle * moved
    shift = shift * moved[:, None]
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2)
    grid = F.affine_grid(torch.cat([turn, shift[:, :, None]], 2), x.shape, align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1


def train_classifier(dataset, classes, recipe, device):
    """A recipe's network, trained on a data.Dataset; bf16 where the hardware multiplies it."""
    li = recipe.get("network") == LI["network"]
    whose = "Li et al.'s" if li else "the"
    n = len(dataset.x)
    batch = min(recipe["batch"], n)
    steps = recipe["epochs"] * (n // batch)
    bf16 = multiplies_bf16(device)
    began = time.time()
    # The caller may be in no_grad, inference_mode, or an autocast whose cache keeps old weights.
    alone = torch.autocast(device.type, enabled=False, cache_enabled=False)
    with random_state_kept(recipe["seed"]), torch.inference_mode(False), torch.enable_grad(), alone:
        net = build_classifier(recipe, classes).to(device, memory_format=torch.channels_last)
        if li:
            fused = device.type in ("cpu", "cuda")
            optimiser = torch.optim.Adam(net.parameters(), recipe["lr"], fused=fused)
        else:
            optimiser = torch.optim.SGD(net.parameters(), recipe["lr"], momentum=0.9,
                                        weight_decay=recipe["weight_decay"], nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe["lr"], max(steps, 2))
        orders = [torch.randperm(n)[: n // batch * batch] for _ in range(recipe["epochs"])]
        for step, rows in enumerate(torch.cat(orders).split(batch), 1):
            x = to_float(dataset.x[rows].to(device), recipe["side"])
            if li:
                x = distort(x, recipe["degrees"], recipe["pixels"], recipe["plain"])
            elif recipe["flip"]:
                flipped = torch.rand(len(x), 1, 1, 1, device=device) < 0.5
                x = torch.where(flipped, x.flip(3), x)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = net(x.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), dataset.y[rows].to(device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            progress(f"training {whose} {dataset.name} classifier, steps", step, steps, began)
    return net.eval().requires_grad_(False)


def is_labelled(dataset):
    """Whether a classifier can be trained on it: images, all labelled, with two labels or more."""
    labelled = dataset.y is not None and dataset.kind == "images"
    return labelled and bool(0 <= dataset.y.min() < dataset.y.max() < dataset.classes)


class ClassifierFeatures:
    """uint8 images -> (features (B, d), logits (B, classes)), float32, by a set's own classifier.

    Ours or, with recipe=LI, Li et al.'s: trained on `train`, its `accuracy` that on `test`, cached
    under `root`. Images: a batch (B, C, H, W), or a list of (C, H, W) of any sizes. Stacked sets
    have the classifier of their digits. UserError for sets without labels of two classes.
    """

    metric = "fcd"

    def __init__(self, train, test, device="cpu", root="data", recipe=None):
        if not (is_labelled(train) and is_labelled(test)):
            raise UserError(f"{train.name} has no labels, or of one class only, in train or test: "
                            "a classifier (and so fcd) needs them")
        self.device = torch.device(device)
        self.recipe = recipe or classifier_recipe(train.x.shape[1], self.device)
        self.dim = self.recipe["features"]
        classes = 10 if train.stacked else train.classes
        name = train.name.removeprefix("stacked-")
        self.name = f"{name} classifier features (d={self.dim})"
        key = {"classifier": self.recipe, "classes": classes,
               "train": fingerprint(train), "test": fingerprint(test)}

        def build():
            self.net = train_classifier(train, classes, self.recipe, self.device)
            logits = torch.cat([self(x)[1].cpu() for x in test.x.split(500)])
            right = (logits.argmax(1) == test.y).sum().item()
            state = {name: value.cpu() for name, value in self.net.state_dict().items()}
            return {"accuracy": right / len(test.x), "net": state}

        def use(saved):
            with torch.device("meta"):  # initial weights would take the caller's random numbers
                net = build_classifier(self.recipe, classes)
            state = {name: finite(value, name).float() for name, value in saved["net"].items()}
            net.load_state_dict(state, assign=True)
            return saved, net, float(saved["accuracy"])

        saved, net, self.accuracy = cached(cache_dir(root), f"classifier-{name}", key, build, use)
        self.net = net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        # Trained anew elsewhere, the weights are others, and so are statistics of its features.
        weights = b"".join(value.numpy().tobytes() for value in saved["net"].values())
        self.key = {**key, "weights": hashlib.sha256(weights).hexdigest()}

    @torch.no_grad()
    def __call__(self, images):
        x = stack_images(images, self._prepare).contiguous(memory_format=torch.channels_last)
        with full_float32(), torch.autocast(self.device.type, enabled=False):
            features = self.net.body(x)
            return features, self.net.head(features)

    def _prepare(self, u8):
        """uint8 (B, 1 or 3, H, W) -> float32 (B, C, S, S), grey or coloured as in training."""
        u8 = u8.to(self.device)
        if u8.shape[1] < self.recipe["channels"]:
            u8 = u8.expand(-1, 3, -1, -1)
        elif u8.shape[1] > self.recipe["channels"]:
            weights = torch.tensor([0.299, 0.587, 0.114], device=u8.device)  # Rec. 601, as in PIL
            u8 = (u8.float() * weights[:, None, None]).sum(1, keepdim=True).round().to(torch.uint8)
        return to_float(u8, self.recipe["side"])

    def stacked_labels(self, u8):
        """Three digits as R, G, B: uint8 (B, 3, H, W) -> labels (B,) in 0..999, red: hundreds."""
        digits = self(u8.flatten(0, 1)[:, None])[1].argmax(1).view(-1, 3)
        return (digits * digits.new_tensor([100, 10, 1])).sum(1)


# ---- Evaluator -----------------------------------------------------------------------------------

class Evaluator:
    """What training loops report of images, for a model given as two functions.

    train, test: data.Dataset of images. size: the model's pixels. samples: how many are drawn.
    inception: None (no fid), "auto" or a path of the weights.
    Labelled sets get a classifier, and with it fcd, is, ...; li: Li et al.'s too. They are
    trained once and, as all statistics, cached under `root`. The reference is at most 10,000 real
    test images at `size`; that of fid is `fid_on_train` training images, or FID_ON_TRAIN's.
    UserError for too few samples or images, ValueError for points, and for colours with `li`.
    """

    def __init__(self, train, test, size, device="cpu", root="data", samples=10_000, inception=None,
                 batch=250, fid_on_train=None, li=False):
        if train.x.dtype != torch.uint8:
            raise ValueError(f"an Evaluator is for images, and {train.name} holds points")
        if li and test.channels != LI["channels"]:
            raise ValueError(f"Li et al.'s classifier is of grey digits, not of {test.name}")
        self.test = test
        self.size = size
        self.pixels = f"{size}x{size}"
        self.batch = batch
        self.samples = samples
        self.device = torch.device(device)
        self.count = min(REFERENCE, len(test))
        labelled = is_labelled(train) and is_labelled(test)
        least = LEAST["is"] if inception or labelled else 2
        if min(samples, self.count) < least:
            raise UserError(f"an evaluation needs {least} samples and test images, not {samples} "
                            f"and {self.count}")
        # Inception comes first: its weights may be missing, and a classifier takes a minute.
        self.extractors = [InceptionFeatures(inception, device)] if inception else []
        self.classifier = None
        if labelled:
            self.present = train.y.unique()  # labels without a picture have no share
            self.classifier = ClassifierFeatures(train, test, device, root)
            if not test.stacked:
                self.extractors.insert(0, self.classifier)
        elif not inception:
            print(f"{train.name} has no labels, or of one class only, in train or test: only "
                  "Inception can score samples (--inception auto)", file=sys.stderr)
        self.li = ClassifierFeatures(train, test, device, root, LI) if li else None
        self.reference = {extract.metric: (test, self.count) for extract in self.extractors}
        fid_on_train = fid_on_train or FID_ON_TRAIN.get(train.name)
        if inception and fid_on_train:
            self.reference["fid"] = (train, min(fid_on_train, len(train)))
        self.label = "Inception features" if inception else None
        self.real = {}  # metric -> Moments
        self.fixed = {}  # what every evaluation reports of the real images
        self._measure_real(root)

    def _measure_real(self, root):
        if self.classifier:
            self.fixed["classifier_accuracy"] = self.classifier.accuracy
        for extract, (dataset, n) in zip(self.extractors, self.reference.values()):
            got = real_statistics(dataset, n, self.size, extract, root, self.batch, self.label)
            self.real[extract.metric] = got["moments"]
            if extract.metric == "fcd":
                self.fixed["is_real"] = got["is"]
        if self.li:
            got = real_statistics(self.test, self.count, self.size, self.li, root, self.batch)
            self.fixed["is_li_real"] = got["is"]
        if self.test.stacked:  # as many real triples: the floor that the number of samples sets
            triples = real_images(self.test, self.samples, self.batch, self.device, self.size)
            labels = torch.cat([self.classifier.stacked_labels(u8) for u8 in triples])
            self.fixed["modes_real"], self.fixed["kl_real"] = stacked_modes(labels)

    @torch.no_grad()
    def __call__(self, sample, reconstruct=None):
        """sample(n) -> (n, C, H, W) in [-1, 1], or None; reconstruct(x) -> like x, or None.

        Returns a flat dict:
            always         protocol
            labelled sets  fcd, is, is_std, is_real, class_share (list), class_min, class_max,
                           confident (share of samples with confidence > .9), classifier_accuracy
            with li        is_li, is_li_std, is_li_real
            stacked sets   modes, kl (nats), modes_real, kl_real, classifier_accuracy
            with weights   fid, is_inception, is_inception_std (in Inception's own classes)
            reconstruct    mse (pixels in [0, 1]), mse_std over images, mse_pm1 (in [-1, 1])

        Samples are scored as they would be saved, as uint8. Random numbers start from one seed, and
        the caller's go on undisturbed. ValueError for another shape, NotFinite for NaN.
        """
        with random_state_kept(SEED):
            result, protocol = self._score(sample) if sample else ({}, [])
            if reconstruct:
                errors = self._reconstruction_errors(reconstruct)
                result["mse_pm1"] = errors.mean().item()
                result["mse"] = result["mse_pm1"] / 4  # [-1, 1] is twice as wide as [0, 1]
                result["mse_std"] = errors.std(correction=0).item() / 4
                protocol.append(f"mse: {self.count} {self.test.split} images, {self.pixels}")
        return {**result, **self.fixed, "protocol": "; ".join(protocol)}

    def _score(self, sample):
        labels = []
        li_logits = []
        batches = self._draw(sample, labels, li_logits)
        got = collect(batches, self.extractors, self.samples, ["logits"], self.label)
        result = {metric: self.real[metric].distance(got[metric]["moments"]) for metric in got}
        drawn = f"{self.samples} samples, {self.pixels}"
        protocol = [f"{extract.metric}: {extract.name}, {n} {real.split} images vs {drawn}"
                    for extract, (real, n) in zip(self.extractors, self.reference.values())]
        if "fcd" in got:
            probs = got["fcd"]["logits"].double().softmax(1)
            share = torch.bincount(probs.argmax(1), minlength=probs.shape[1]).double() / len(probs)
            result["is"], result["is_std"] = inception_score(probs)
            result["class_share"] = [round(s, 6) for s in share.tolist()]
            result["class_min"] = share[self.present].min().item()
            result["class_max"] = share.max().item()
            result["confident"] = (probs.amax(1) > 0.9).double().mean().item()
        if "fid" in got:
            scores = inception_score(got["fid"]["logits"].double().softmax(1))
            result["is_inception"], result["is_inception_std"] = scores
        if li_logits:
            scores = inception_score(torch.cat(li_logits).double().softmax(1))
            result["is_li"], result["is_li_std"] = scores
            protocol.append("is_li: Li et al.'s classifier, trained here, right on "
                            f"{self.li.accuracy:.2%} of the test images, {self.samples} samples in "
                            f"10 splits, {self.pixels}")
        if labels:
            result["modes"], result["kl"] = stacked_modes(torch.cat(labels))
            protocol.append(f"modes, kl: {self.classifier.name}, {drawn}")
        return result, protocol

    def _draw(self, sample, labels, li_logits):
        """The samples in batches of uint8, with their labels and logits added to the lists."""
        needed = self.samples if self.classifier or self.extractors else 0
        for start in range(0, needed, self.batch):
            n = min(self.batch, needed - start)
            x = sample(n)
            if tuple(x.shape) != (n, self.test.channels, self.size, self.size):
                raise ValueError(f"sample({n}) must give {n} images of {self.test.channels} "
                                 f"channels and {self.pixels}, got {tuple(x.shape)}")
            u8 = to_uint8(finite(x, "samples"))
            if self.test.stacked:
                labels.append(self.classifier.stacked_labels(u8))
            if self.li:
                li_logits.append(self.li(u8)[1].cpu())
            yield u8

    def _reconstruction_errors(self, reconstruct):
        """Each test image's mean squared error, (count,), pixels in [-1, 1]."""
        errors = []
        for x, _ in ordered(self.test, self.count, self.batch, self.device, self.size):
            y = reconstruct(x)
            if y.shape != x.shape:
                raise ValueError(f"reconstruct must give {tuple(x.shape)}, not {tuple(y.shape)}")
            difference = finite(y, "reconstructions").double() - x.double()
            errors.append(difference.square().flatten(1).mean(1).cpu())
        return torch.cat(errors)


def best_first(metrics, names):
    """metrics[name] of the first of `names` that is there, else None: what best.pt is chosen by."""
    return next((metrics[name] for name in names if name in metrics), None)


# ---- Pictures and curves -------------------------------------------------------------------------

def fixed_noise(n, d, seed=0):
    """(n, d) from N(0, I) on the CPU, always the same; a training's random numbers go on."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def save_picture(path, picture):
    """A Pillow image, or a tensor (C, H, W) in [0, 1], as a PNG: never half of one."""
    from torchvision.utils import save_image

    write = save_image if isinstance(picture, torch.Tensor) else Image.Image.save
    save_atomic(picture, path, functools.partial(write, format="PNG"))


def save_grid(path, x, columns=10):
    """Images (n, C, S, S) in [-1, 1] as one picture, row by row; or one image (C, S, S)."""
    from torchvision.utils import make_grid

    grid = make_grid(x.float().cpu(), nrow=columns, normalize=True, value_range=(-1, 1), padding=1)
    save_picture(path, grid)


def scatter(points, labels, classes, reach, side=420):
    """Points (n, 2), or (n, 3) seen obliquely, within [-reach, reach]^2 as dots: (3, side, side).

    labels: (n,) of 0 to classes - 1, a colour each; None: all of one colour.
    """
    if labels is None:
        labels = torch.zeros(len(points), dtype=torch.long)
        classes = 1
    hues = [i * 0.618 % 1 for i in range(classes)]  # golden ratio: neighbouring labels differ
    colours = torch.tensor([colorsys.hsv_to_rgb(hue, 1, 0.85) for hue in hues]).T  # (3, classes)
    at = ((oblique(points).cpu().float() + reach) / (2 * reach) * side).long()
    inside = ((at >= 1) & (at < side - 1)).all(1)
    across, up = at[inside].T
    colour = colours[:, labels.cpu()[inside]]
    picture = torch.ones(3, side, side)
    for right, down in itertools.product((0, 1), repeat=2):  # a dot is 2 x 2 pixels
        picture[:, side - 1 - up + down, across + right] = colour
    return picture


def save_panels(path, panels):
    """{title: picture (3, S, S)} side by side, framed and titled."""
    wide = torch.cat([F.pad(p, (4, 4, 20, 4), value=0.88) for p in panels.values()], 2)
    image = Image.fromarray((wide * 255).byte().permute(1, 2, 0).contiguous().numpy())
    for n, title in enumerate(panels):
        ImageDraw.Draw(image).text((8 + n * wide.shape[2] // len(panels), 4), title, fill="black")
    save_picture(path, image)


def draw_curves(path, curves, title):
    """{name: [(x, y), ...]} as line plots over one pair of axes, both from 0; a PNG."""
    colours = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b")
    points = [point for curve in curves.values() for point in curve]
    x_max = max(x for x, _ in points) or 1
    y_max = max(y for _, y in points) or 1

    def place(x, y):
        return 60 + x / x_max * 560, 370 - y / y_max * 340

    picture = Image.new("RGB", (640, 400), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((60, 2), title, fill="black")
    for part in (0, 0.25, 0.5, 0.75, 1):
        x, y = place(part * x_max, part * y_max)
        draw.line((60, y, 620, y), fill="#dddddd")
        draw.text((6, y - 6), rounded(part * y_max, 4), fill="black")
        text = rounded(part * x_max, 5)
        draw.text((x - 3 * len(text), 378), text, fill="black")
    for n, (name, curve) in enumerate(curves.items()):
        colour = colours[n % len(colours)]
        draw.line([place(x, y) for x, y in curve], fill=colour, width=2)
        draw.text((60 + n * 560 // len(curves), 16), name, fill=colour)  # no line comes here
    save_picture(path, picture)


def draw_log_curves(folder, names, title_of_run):
    """FOLDER/figures/NAME.png of the names that two lines or more of log.jsonl have."""
    folder = Path(folder)
    lines = json_lines(folder / "log.jsonl")
    for name in names:
        kept = [line for line in lines if name in line]
        if len(kept) > 1:
            curve = {name: [(line["epoch"], line[name]) for line in kept]}
            draw_curves(folder / f"figures/{name}.png", curve, f"{name} by epoch, {title_of_run}")


def draw_samples(model, folder, n, seed=0):
    """n samples of `model` in FOLDER/drawn, NNNNNN.png or points.csv, and as FOLDER/drawn.png."""
    drawn = Path(folder) / "drawn"
    drawn.mkdir(parents=True, exist_ok=True)
    one = finite(model.sample(1), "samples")
    torch.manual_seed(seed)
    if one.ndim == 2:
        points = finite(model.sample(n), "samples").cpu()
        rows = [",".join(f"{value:.6g}" for value in row) + "\n" for row in points.tolist()]
        save_atomic("".join(rows), drawn / "points.csv", write_text)
        picture = scatter(points, None, 1, reach=1.2 * oblique(points).abs().max())
        save_picture(drawn.with_suffix(".png"), picture)
    else:
        for old in drawn.glob("[0-9]*.png"):
            old.unlink()
        for start in range(0, n, 250):
            images = finite(model.sample(min(250, n - start)), "samples")
            if start == 0:
                save_grid(drawn.with_suffix(".png"), images[:100])
            for i, image in enumerate(images, start):
                save_grid(drawn / f"{i:06d}.png", image)
    print(f"{n} samples in {drawn}")


# ---- Benchmark -----------------------------------------------------------------------------------

def benchmark(model, x, steps, compiled=False):
    """Speed, FLOP/s and peak memory of `model.step(x)`, after warming up, as a dict for JSON."""
    cuda = x.device.type == "cuda"
    steps = math.ceil(steps / 5) * 5  # WGAN's G moves at each fifth only

    def run(n):
        for _ in range(n):
            model.step(x)
        if cuda:
            torch.cuda.synchronize()

    counter = FlopCounterMode(display=False)
    # Its hooks that count by module fail where WGAN-GP differentiates by D's input.
    counter.mod_tracker = nullcontext()
    counter.mod_tracker.parents = {"Global"}
    with counter:  # before compiling, which hides operations
        run(5)
    flops = counter.get_total_flops() / 5
    if compiled:
        compile_networks(model)
    run(5)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    run(steps)
    seconds = (time.perf_counter() - began) / steps
    if cuda:
        peak = torch.cuda.max_memory_allocated()
    else:
        unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB, macOS in bytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    rate = flops / seconds / 1e12
    conv, matmul = machine_rates(model.machine)
    return {"model": model.config.model, "size": model.config.size, "width": model.config.width,
            "device": str(model.machine.device), "precision": model.machine.amp,
            "compiled": compiled, "steps": steps, "batch": len(x),
            "images_per_s": round(len(x) / seconds, 1), "ms_per_step": round(seconds * 1e3, 2),
            "gflop_per_step": float(f"{flops / 1e9:.4g}"),
            "tflop_per_s": float(f"{rate:.3g}"), "conv_tflop_per_s": float(f"{conv:.3g}"),
            "matmul_tflop_per_s": float(f"{matmul:.3g}"), "share_of_conv": round(rate / conv, 3),
            "share_of_matmul": round(rate / matmul, 3), "peak_memory_mib": peak >> 20}


def machine_rates(machine, seconds=0.3):
    """TFLOP/s here, in the machine's precision, of a 3 x 3 convolution and of a matrix product.

    What a step's own rate can be compared with: 64 images of 64 channels at 32 x 32, and 1024^3; on
    CUDA 1,024 images, and 8192^3, beside which the time to launch them is nothing.
    """
    cuda = machine.device.type == "cuda"
    images = 1024 if cuda else 64
    side = 8192 if cuda else 1024
    each = 10 if cuda else 1  # to wait after each call would be most of a GPU's time
    options = dict(device=machine.device, dtype=machine.dtype or torch.float32)
    x = torch.randn(images, 64, 32, 32, **options).to(memory_format=torch.channels_last)
    w = torch.randn(64, 64, 3, 3, **options).to(memory_format=torch.channels_last)
    a = torch.randn(side, side, **options)

    def run(work):
        for _ in range(each):
            work()
        if cuda:
            torch.cuda.synchronize()

    def rate(work, flops):
        run(work)  # not timed: it chooses its algorithm
        n = 0
        began = time.perf_counter()
        while n < 3 or time.perf_counter() - began < seconds:
            run(work)
            n += each
        return n * flops / (time.perf_counter() - began) / 1e12

    conv = rate(lambda: F.conv2d(x, w, padding=1), 2 * images * 32 * 32 * 64 * 64 * 9)
    return conv, rate(lambda: a @ a, 2 * side**3)


# ---- Command line --------------------------------------------------------------------------------

@dataclass
class Source:
    """A or B of the command line."""

    kind: str  # "folder", "dataset" or "statistics"
    content: object  # the files, the data.Dataset, or (Moments, what they are of, its key)
    name: str  # in the protocol
    n: int | None  # how many pictures are taken; None where the file does not say
    sizes: set  # {(H, W)}
    about: str = ""  # what else the protocol says

    def __str__(self):
        size = "mixed sizes" if len(self.sizes) > 1 else "x".join(map(str, *self.sizes or [()]))
        if any(height != width for height, width in self.sizes):
            size += ", squeezed to squares (--size S cuts them)"
        return f"{self.name} (n={self.n or 'unknown'}{', ' * bool(size)}{size}{self.about})"


def open_source(name, args, labelled=False):
    """The Source that `name` means, a folder with its classes if `labelled`; UserError for none."""
    path = Path(os.path.expanduser(name))
    if path.suffix.lower() in (".pt", ".npz", ".npy"):
        dataset = open_file(path)
        if isinstance(dataset, Source):
            return dataset
    else:
        place = name.removesuffix(":train").removesuffix(":test")
        split = name[len(place) + 1 :]
        try:
            whole = whole_name(place)
        except UserError as error:
            raise UserError(f"{error}, or one with :train or :test, or a .pt, .npz, .npy") from None
        if os.path.isabs(whole) and not split and not labelled:
            return open_folder(Path(whole), args)
        dataset = load(place, args.root, args.size, split=split or "train")
        if dataset.kind != "images":
            raise UserError(f"{name} holds points, not images")
        if split and dataset.split != split:
            raise UserError(f"{place} has no {split} pictures apart: leave :{split} out")
    n = min(args.n or len(dataset), len(dataset))
    size = (args.size, args.size) if args.size else tuple(dataset.x.shape[2:])
    return Source("dataset", dataset, f"{dataset.name}:{dataset.split}", n, {size})


def open_file(path):
    """A file's statistics as a Source, or its array of pictures as a Dataset. UserError."""
    try:
        if not path.is_file():  # of a pipe the reading might never end
            raise ValueError("there is no such file")
        if path.suffix.lower() == ".pt":
            saved = read_saved(path)
            if not fits(saved, {"of": str, "key": str, "sizes": [tuple]}):
                raise ValueError("it holds something else")
            content = (Moments.of(saved), saved["of"], saved["key"])
            sizes = {(int(height), int(width)) for height, width in saved["sizes"]}
            return Source("statistics", content, path.name, saved["n"], sizes)
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            found = {"arr_0": found}
        if "mu" not in found:
            return Dataset(path.name, "array", of_array(found["arr_0"]), None, 0)
        mean, cov = (torch.from_numpy(found[name]) for name in ("mu", "sigma"))
        moments = Moments.of({"n": 2, "mean": mean, "scatter": cov})  # so scatter / (n - 1) is cov
        about = "; count, flavour and weights are the file's own word"
        return Source("statistics", (moments, "", ""), path.name, None, set(), about)
    except Exception as error:  # the readers of zip files, arrays and tensors raise a dozen kinds
        raise UserError(f"{path} holds neither statistics nor pictures ({first_line(error)}): it "
                        "has to be a .pt of `metrics.py stats`, a .npz of mu and sigma, or a .npy "
                        "or .npz (arr_0) of uint8 pictures") from None


def of_array(x):
    """Pictures (N, S, S), (N, S, S, C) or (N, C, S, S) -> (N, C, S, S); ValueError for others."""
    if x.ndim not in (3, 4) or x.dtype.kind not in "buif":
        raise ValueError(f"{x.dtype} of shape {x.shape}")
    if x.dtype != np.uint8:
        if not np.isfinite(x).all():
            raise ValueError("some numbers are NaN or infinite")
        how = "scale it to 0..255 and save it as uint8"
        bytes_of = {(0, 255): "x", (-1, 1): "((x + 1) * 127.5)", (0, 1): "(x * 255)"}
        for (low, high), pixels in bytes_of.items():  # the last range that fits is the closest
            if low <= x.min() and x.max() <= high:
                how = f"save {pixels}.round().clip(0, 255).astype('uint8')"
        raise ValueError(f"{x.dtype} from {x.min():.3g} to {x.max():.3g}, not bytes: {how}")
    y = x[:, None] if x.ndim == 3 else x
    if y.shape[3] in (1, 3):
        y = y.transpose(0, 3, 1, 2)
    if y.shape[1] not in (1, 3) or not 8 <= y.shape[2] == y.shape[3]:
        raise ValueError(f"of the shape {x.shape}, not of square pictures of 8 pixels or more")
    return torch.tensor(y)


def open_folder(folder, args):
    """The pictures of a folder, or args.n of them. Each is read once now, so that faults show."""
    for run in (folder, folder.parent):
        of_run = (run / "log.jsonl").exists() and (run / "config.json").exists()
        if of_run and folder != run / "drawn":
            raise UserError(f"{folder} has sheets of a run's pictures: draw samples with "
                            f"--sample N --resume {run}, and give {run / 'drawn'}")
    if any(entry.is_dir() and entry.name.lower() == "train" for entry in folder.iterdir()):
        raise UserError(f"{folder} has a training set: say {folder}:train or {folder}:test")
    files = pictures_of(folder)
    # In a seeded order --n is a fair sample, and the splits of the inception score are mixed.
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(SEED))
    files = [files[i] for i in order[: args.n].tolist()]
    remarks = Counter()
    pictures = read_pictures(folder.name, files, args.size, changed=remarks)
    sizes = {picture.shape[1:] for picture in pictures}
    about = "".join(f"; {n} of {len(files)}: {remark}" for remark, n in remarks.most_common())
    return Source("folder", files, folder.name, len(files), sizes, about)


def check_source(source, wanted, extractors):
    """UserError if the wanted numbers need more pictures, or other features than were saved."""
    for name in sorted(wanted):
        least = LEAST.get(name, 2)
        saved = source.kind == "statistics"
        if (saved and name in LEAST) or (not saved and source.n < least):
            held = "statistics" if saved else source.n
            raise UserError(f"--{name} needs at least {least} pictures; {source.name} holds {held}")
    for extract in extractors if source.kind == "statistics" else ():
        moments, of, key = source.content
        if moments.mean.numel() != extract.dim or (of, key) not in (
                ("", ""), (extract.name, digest_of(extract.key))):
            raise UserError(f"{source.name} holds statistics of {of or 'other features'}, not of "
                            f"{extract.name} as they are here")


def measure(source, extract, keep, args):
    """What collect() gives for a source; without `keep`, of saved or cached statistics too."""
    content = source.content
    label = f"{source.name}, {extract.metric}"
    if source.kind == "statistics":
        return {"moments": content[0]}
    if source.kind == "folder":
        pictures = map(torch.tensor, read_pictures(source.name, content, args.size))
        batches = iter(lambda: list(itertools.islice(pictures, args.batch)), [])
    elif keep:
        batches = real_images(content, source.n, args.batch, extract.device, args.size)
    else:
        return real_statistics(content, source.n, args.size, extract, args.root, args.batch, label)
    return collect(batches, [extract], source.n, keep, label)[extract.metric]


def compare(a, b, extract, wanted, args):
    """Every wanted number of B against A in the features of `extract`, as a flat dict."""
    inception = extract.metric == "fid"
    # For at most d pictures the Gram form takes their features, no more than a covariance.
    few = "statistics" not in (a.kind, b.kind) and max(a.n, b.n) <= extract.dim
    both = ["features"] if few or (inception and wanted & {"kid", "pr"}) else []
    got_a = measure(a, extract, both, args)
    got_b = measure(b, extract, both + ["logits"] * (inception and "is" in wanted), args)
    f1, f2 = (got.get("features") for got in (got_a, got_b))
    protocol = f"{extract.name}, {a} vs {b}"
    result = {}
    if extract.metric in wanted:
        result[extract.metric] = (frechet_distance_features(f1, f2) if few
                                  else got_a["moments"].distance(got_b["moments"]))
    if inception and "kid" in wanted:
        size = min(1000, a.n, b.n)
        subsets = 1 if size == max(a.n, b.n) else 100
        protocol += f", kid: {subsets} subsets of {size}" if subsets > 1 else f", kid: all {size}"
        result["kid"], result["kid_std"] = kernel_distance(f1, f2, subsets, size)
        if torch.equal(f1, f2):  # its estimate is unbiased for independent draws only
            protocol += ", none of a set and itself"
            result["kid"] = result["kid_std"] = None
    if inception and "is" in wanted:  # in random order: a data set may lie class by class
        mixed = torch.randperm(b.n, generator=torch.Generator().manual_seed(SEED))
        probs = got_b["logits"][mixed].double().softmax(1)
        result["is"], result["is_std"] = inception_score(probs)
        protocol += f", is: of B, 10 splits of {b.n // 10}"
    if inception and "pr" in wanted:
        result["precision"], result["recall"] = precision_recall(f1, f2, 3)
        protocol += ", precision and recall: k=3"
    return {name: x for name, x in result.items() if x is not None} | {"protocol": protocol}


def features_for(wanted, sources, name, device, args):
    """The extractors that the wanted numbers need; `name` is what the first source was called."""
    extractors = []
    if "fcd" in wanted:
        a = sources[0]
        if a.kind != "dataset" or not is_labelled(a.content) or a.content.stacked:
            raise UserError("--fcd needs a labelled data set as A, for instance mnist:test, or a "
                            f"folder with one of pictures for each class, not {name}")
        place = name.removesuffix(f":{a.content.split}")
        [other] = {"train", "test"} - {a.content.split}
        sets = {a.content.split: a.content, other: load(place, args.root, args.size, other)}
        extractors.append(ClassifierFeatures(**sets, device=device, root=args.root))
    if wanted - {"fcd"}:
        weights = None if all(source.kind == "statistics" for source in sources) else args.weights
        extractors.append(InceptionFeatures(weights, device, args.flavour, args.amp))
    elif args.flavour != "pytorch-fid" or args.amp or args.weights != "auto":
        raise UserError("--flavour, --amp and --weights are of Inception's features, not --fcd's")
    return extractors


def run(args):
    """The command line's work: a dict to print. UserError for what the user can mend."""
    device, _ = hardware(args.device, "off")
    for name, least in (("n", 2), ("batch", 1), ("size", 8)):
        if not (getattr(args, name) is None or getattr(args, name) >= least):
            raise UserError(f"--{name} must be at least {least}")
    saving = args.sources[0] == "stats"
    if len(args.sources) != (3 if saving else 2):
        raise UserError("give two sources, A and B, or `stats A out.pt`; see --help")
    wanted = {name for name in ("fid", "fcd", "kid", "is", "pr") if getattr(args, name)} or {"fid"}
    if saving and wanted not in ({"fid"}, {"fcd"}):
        raise UserError("`stats` saves what one of --fid and --fcd needs")
    out = Path(os.path.expanduser(args.sources[-1]))
    if saving and (out.suffix not in (".pt", ".npz") or not out.parent.is_dir()):
        raise UserError(f"cannot write {out}: give a .pt or .npz in a folder that exists")
    if saving and out.exists() and not isinstance(open_file(out), Source):
        raise UserError(f"{out} holds pictures: give another name")
    names = args.sources[saving:2]
    sources = [open_source(name, args, "fcd" in wanted and name == names[0]) for name in names]
    if saving and sources[0].n is None:
        raise UserError(f"{names[0]} does not say of how many pictures it is: stats needs the "
                        "pictures, or a .pt")
    check_source(sources[0], wanted - {"is"}, [])
    check_source(sources[-1], wanted, [])
    extractors = features_for(wanted, sources, names[0], device, args)
    for source in sources:
        check_source(source, [], extractors)
        if source.kind != "statistics":
            continue
        if args.size and source.sizes not in (set(), {(args.size, args.size)}):
            raise UserError(f"{source.name} holds statistics of other pictures than --size "
                            f"{args.size} makes: leave --size out, or save them with it")
        if saving and args.n not in (None, source.n):
            raise UserError(f"{source.name} holds statistics: --n cannot take a part of them")
    if saving:
        return save_statistics(sources[0], extractors[0], out, args)
    results = [compare(*sources, extract, wanted, args) for extract in extractors]
    result = results[0] | results[-1]
    result["protocol"] = "; ".join(each["protocol"] for each in results)
    notes = []
    n = min(source.n or REFERENCE for source in sources)
    if n < REFERENCE and wanted & {"fid", "fcd"}:
        notes.append(f"n={n} is below 10,000: Frechet distances are biased upwards; compare only "
                     "numbers of equal n")
    folders = [source.content for source in sources if source.kind == "folder"]
    jpegs = [sum(".jp" in file[-5:].lower() for file in files) / len(files) for files in folders]
    if max(jpegs, default=0) - min(jpegs, default=0) > 0.5:
        notes.append("one folder is of JPEGs and the other not: that alone makes a distance")
    return result | ({"note": "; ".join(notes)} if notes else {})


def save_arrays(arrays, path):
    with open(path, "wb") as file:  # Given a path, numpy would add a suffix to it.
        np.savez(file, **arrays)


def save_statistics(source, extract, out, args):
    """The line of `stats`: the moments of a source, as our .pt or as pytorch-fid's .npz."""
    moments = measure(source, extract, [], args)["moments"]
    if out.suffix == ".pt":
        about = {"sizes": sorted(source.sizes), "of": extract.name, "key": digest_of(extract.key)}
        save_atomic(moments.state() | about, out)
    else:
        arrays = {"mu": moments.mean.cpu().numpy(), "sigma": moments.cov.cpu().numpy()}
        save_atomic(arrays, out, save_arrays)
    return {"saved": str(out), "n": moments.n, "protocol": f"{extract.name}, {source}"}


def main(argv=None):
    """The command line: parse, run, print. Raises UserError for what the user can mend."""
    parser = Parser(description="Compare two sets of images, or save statistics: stats A out.pt")
    add = parser.add_argument
    add("sources", nargs="+", metavar="A B", help="FOLDER, mnist, both with :test; .pt, .npz, .npy")
    add("--fid", action="store_true", help="Frechet Inception distance (the default)")
    add("--kid", action="store_true", help="kernel Inception distance, 100 subsets of up to 1,000")
    add("--is", action="store_true", help="inception score of B, 10 splits")
    add("--pr", action="store_true", help="precision and recall of B, k=3")
    add("--fcd", action="store_true", help="Frechet distance in a classifier trained on the set A")
    add("--n", type=int, help="take this many pictures of each folder or set, a seeded choice")
    add("--json", action="store_true", help="print one line of JSON")
    add("--weights", default="auto", help=f"path of {INCEPTION_FILE} (default: a download)")
    add("--flavour", choices=("pytorch-fid", "tf"), default="pytorch-fid", help="of its input")
    add("--amp", choices=("bf16",), help="precision of Inception features (default: float32)")
    add("--size", type=int, help="resize to SxS first, oblong pictures cut as in training")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:0")
    add("--batch", type=int, default=32)
    add("--root", default="data", help="where data sets and caches are")
    args = parser.parse_args(argv)
    result = run(args)
    if args.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:>10}  {value:.6g}" if isinstance(value, float) else f"{name:>10}  {value}")


if __name__ == "__main__":
    sys.exit(run_command(main))
