"""Numbers for generative models: FID, KID, inception score, precision and recall, and what this project adds to them.

Plain functions of tensors; nothing here knows of a model. Six sections:

    features      the 2015 FID Inception network, written out, and its two input flavours
    statistics    streaming mean and covariance, mergeable over batches and ranks; caches
    distances     frechet_distance, kernel_distance, inception_score, precision_recall, modes, errors
    classifier    a small network trained on first use for labelled data; `fcd` is measured in its features. And Li et al.'s,
                  with which papers score MNIST
    evaluator     what a training loop calls
    command line  python metrics.py A B

What the names mean, since published numbers of one model differ by a factor of two for want of it:

    fid   Frechet distance in the pooled features of the 2015 TensorFlow Inception network. Without its genuine weights
          nothing is printed under this name.
    fcd   Frechet distance in the features of this file's own classifier; comparable with an fcd of the same data only.
    is_li inception score of MNIST by Li et al.'s classifier, trained anew: AIM's Table 1 (D10 there).
          `is` of a run is by the file's own.
    FLD   Frechet distance between a set of codes and N(0, I).

Where pytorch-fid, torch-fidelity, torchmetrics and clean-fid agree, this file agrees with them to rounding. Where they
differ, it follows:

    network's input     `pytorch-fid` (default) or `tf`, the TensorFlow original and torch-fidelity: inception_input
    logits for the IS   pooled features times fc.weight, without its bias (TensorFlow original, torch-fidelity)
    order for the IS    pictures in a seeded random order (torch-fidelity)

FID is biased upwards for few samples. Two sets of one distribution were measured (2048 dimensions, this project) at

    N         500   1,000   2,000   5,000
    FID      25.0    16.1     9.1     3.6

so numbers of different N do not compare; below N = 10,000 the command line says so in its output.

    python metrics.py cifar10:test samples/                 FID of a folder of pictures against a data set
    python metrics.py real/ fake/ --fid --kid --is --pr     everything; --json for one line of JSON
    python metrics.py stats real/ real.pt                   the statistics of a folder, once; then
    python metrics.py real.pt fake/
    python metrics.py mnist:test samples/ --fcd             needs no downloaded weights
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# The published conversion of the TensorFlow graph. The sha256 of the genuine file starts with the eight digits in its
# name; a file that does not is refused. (The tests change this constant to that of a file of random weights: the one
# way to run the network without the genuine file.)
INCEPTION_SHA256 = "6726825d"
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + INCEPTION_FILE
REFERENCE = 10_000  # at most so many real test images are the reference of fcd and fid in an Evaluator
# fid against training images: MNIST's published one is, and LSUN has only 300 others (50,000: ours)
FID_ON_TRAIN = {"mnist": 60_000, "fashion-mnist": 60_000, "lsun-church": 50_000}
SEED = 2020  # of everything drawn here; evaluations are comparable because it never changes


class UserError(ValueError):
    """What a user can cause and mend: the command line prints it as one sentence and exits with code 2."""


class NotFinite(ValueError, FloatingPointError):
    """NaN or infinity where a statistic was asked for: of a training run that it has diverged."""


# ====================================================================================================================
# Features: the Inception network of 2015
# ====================================================================================================================
# Beside torchvision's inception_v3: 1008 outputs, no auxiliary head, average pools that do not count the padding, and a
# max pool in the last block (a slip of the original graph that every FID since has inherited). Names of parameters are
# those of the published checkpoint.


class Unit(nn.Module):
    """Convolution without bias, batch norm (eps 1e-3), ReLU. (B, cin, H, W) -> (B, cout, H', W')."""

    def __init__(self, cin, cout, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=1e-3)
        self.bn.num_batches_tracked = None  # not among the checkpoint's 472 tensors

    def forward(self, x, pool=None):
        x = self.bn(self.conv(x))
        return F.relu(pool(x) if pool else x, inplace=True)  # a maximum and a ReLU commute: the ReLU on fewer numbers

    def fold(self):
        """Move the batch norm, in use a fixed affine map, into the convolution."""
        scale = self.bn.weight.double() / (self.bn.running_var.double() + self.bn.eps).sqrt()
        shift = self.bn.bias.double() - self.bn.running_mean.double() * scale
        weight = self.conv.weight.double() * scale[:, None, None, None]
        self.conv.weight.data = weight.float()
        self.conv.bias = nn.Parameter(shift.float())
        self.bn = nn.Identity()


def unit(cin, spec):
    """One unit from its spec: "64:3" is 64 maps, kernel 3; "64:1x7" a flat kernel; "64:3/2" stride 2.

    Stride 1 keeps the size; the stride-2 units inside the blocks have no padding.
    """
    width, _, kernel = spec.partition(":")
    kernel, _, stride = kernel.partition("/")
    kernel = tuple(int(k) for k in kernel.split("x")) if "x" in kernel else (int(kernel), int(kernel))
    padding = (0, 0) if stride else (kernel[0] // 2, kernel[1] // 2)
    return Unit(cin, int(width), kernel, int(stride or 1), padding)


def max_pool(x):
    """Halves the size: 3x3 windows, two apart, no padding."""
    return F.max_pool2d(x, 3, 2)


def mean_of_neighbours(x):
    """3x3 mean that does not count the padding: of 6 values at an edge, of 4 in a corner."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class Block(nn.Module):
    """Parallel branches, concatenated in the order given, the pooling branch last.

    `branches` maps a name to its chain of units, as in "64:1 96:3". Their parameters are called `<name>_1`, `<name>_2`
    and so on, or just `<name>` where the chain has one unit; "384:1x3|384:3x1" at the end of a chain is a fork into
    `<name>_2a` and `<name>_2b`. `pool` is "avg", "max" (each followed by a unit of `pool_width` maps) or "reduce".
    """

    def __init__(self, cin, pool, pool_width=0, **branches):
        super().__init__()
        self.pool, self.chains = pool, []
        for name, chain in branches.items():
            width, steps, specs = cin, [], chain.split()
            for i, spec in enumerate(specs, 1):
                forks = spec.split("|")
                key = f"{name}_{i}" if len(specs) > 1 else name
                names = [key] if len(forks) == 1 else [key + "a", key + "b"]
                for key, fork in zip(names, forks):
                    self.add_module(key, unit(width, fork))
                width = int(spec.partition(":")[0])
                steps.append(names)
            self.chains.append(steps)
        if pool_width:
            self.branch_pool = unit(cin, f"{pool_width}:1")

    def forward(self, x):
        out = []
        for steps in self.chains:
            h = [x]
            for names in steps:
                h = [self._modules[name](h[0]) for name in names]
            out += h
        if self.pool == "avg":  # a mean commutes with the unit's 1x1 convolution, and behind it there are fewer maps
            out.append(self.branch_pool(x, mean_of_neighbours))
        elif self.pool == "max":
            out.append(self.branch_pool(F.max_pool2d(x, 3, 1, 1)))
        else:
            out.append(max_pool(x))
        return torch.cat(out, 1)


def block_35(cin, pool_width):
    return Block(cin, "avg", pool_width, branch1x1="64:1", branch5x5="48:1 64:5", branch3x3dbl="64:1 96:3 96:3")


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
        self.Conv2d_1a_3x3 = unit(3, "32:3/2")  # -> (B, 32, 149, 149)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = unit(32, "64:3")  # -> (B, 64, 147, 147)
        self.Conv2d_3b_1x1 = unit(64, "80:1")
        self.Conv2d_4a_3x3 = Unit(80, 192, 3)  # -> (B, 192, 71, 71)
        self.Mixed_5b = block_35(192, 32)  # -> (B, 256, 35, 35)
        self.Mixed_5c = block_35(256, 64)
        self.Mixed_5d = block_35(288, 64)
        self.Mixed_6a = Block(288, "reduce", branch3x3="384:3/2", branch3x3dbl="64:1 96:3 96:3/2")  # -> 17x17
        self.Mixed_6b = block_17(128)
        self.Mixed_6c = block_17(160)
        self.Mixed_6d = block_17(160)
        self.Mixed_6e = block_17(192)
        self.Mixed_7a = Block(768, "reduce", branch3x3="192:1 320:3/2", branch7x7x3="192:1 192:1x7 192:7x1 192:3/2")
        self.Mixed_7b = block_8(1280, "avg")  # (B, 1280, 8, 8) -> (B, 2048, 8, 8)
        self.Mixed_7c = block_8(2048, "max")
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)), max_pool)  # -> (B, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x), max_pool)  # -> (B, 192, 35, 35)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean((2, 3))  # (B, 2048, 8, 8) -> (B, 2048)


def load_inception(weights="auto"):
    """The network with the genuine weights, ready for use: batch norm folded, channels last, no gradients.

    `weights` is "auto" (torch.hub's cache, or a download with a check of the hash) or a path. Only a file whose sha256
    starts with INCEPTION_SHA256 is read, and only tensors are read from it. UserError otherwise.
    """
    by_hand = f"get {INCEPTION_FILE} from {INCEPTION_URL} and give its path (metrics.py: --weights; else --inception)"
    kept = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if weights == "auto" and kept.is_file():  # torch.hub checks what it downloads, not what lies there
        weights = kept
    if weights == "auto":
        try:
            with redirect_stdout(sys.stderr):  # torch.hub says there what it downloads, which is no result
                state = torch.hub.load_state_dict_from_url(
                    INCEPTION_URL, map_location="cpu", check_hash=True, weights_only=True, progress=sys.stderr.isatty()
                )
        except Exception as error:  # no network, a proxy's page instead of the file, a damaged file in the cache
            raise UserError(
                f"the weights FID needs could not be downloaded ({error}): {by_hand}, "
                f"or put it into {kept.parent}"
            ) from error
    else:
        if not Path(weights).is_file():
            raise UserError(f"there is no file of Inception weights at {weights}: {by_hand}")
        with open(weights, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not digest.startswith(INCEPTION_SHA256):
            raise UserError(f"{weights} is not the 2015 Inception network (sha256 {digest[:8]}...): {by_hand}")
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(f"{weights} is not a file of tensors: {by_hand}") from error
    with torch.device("meta"):  # an initialisation would take time, and draw from the caller's random numbers
        net = Inception()
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    expected = {k: v.shape for k, v in net.state_dict().items()}
    wrong = sorted(k for k in expected.keys() | state.keys() if k not in state or expected.get(k) != state[k].shape)
    if wrong:
        raise UserError(f"the Inception weights do not fit the network, first at {wrong[0]}: {by_hand}")
    net.load_state_dict(state, strict=False, assign=True)  # checked above; batch norm's loader would miss its counters
    for module in net.modules():
        if isinstance(module, Unit):
            module.fold()
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def resize_tf(x, size=299):
    """TensorFlow 1's bilinear resize: source = destination * in / out, so without the half-pixel offset, no antialias.

    (B, C, H, W) -> (B, C, size, size), float32, any range. It shifts pictures by up to half a source pixel: a fault,
    but the one the first published FIDs were made with.
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
    """uint8 (B, 1 or 3, H, W) -> float32 (B, 3, 299, 299), as `flavour` ("pytorch-fid" or "tf") prepares it.

    The two differ by several per cent in FID, so the flavour is part of every protocol line.
    """
    x = u8.float()
    x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
    if flavour == "tf":  # torch-fidelity and the TensorFlow original
        return (resize_tf(x) - 128) / 128
    # pytorch-fid: half-pixel centres, no antialias
    return 2 * F.interpolate(x / 255, size=(299, 299), mode="bilinear", align_corners=False) - 1


def stack_images(images, prepare):
    """`prepare` applied to a batch (B, C, H, W), or to a list of (C, H, W) of any sizes, equal ones together."""
    if isinstance(images, Tensor):
        return prepare(images)
    groups, out = {}, [None] * len(images)
    for i, image in enumerate(images):
        groups.setdefault(image.shape, []).append(i)
    for rows in groups.values():
        for i, x in zip(rows, prepare(torch.stack([images[i] for i in rows]))):
            out[i] = x
    return torch.stack(out)


@contextmanager
def full_float32():
    """Without tf32, which would cost three digits; the switches are put back, for a training run may want it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class InceptionFeatures:
    """uint8 images -> (features (B, 2048), logits (B, 1008)), float32, with the genuine 2015 weights only.

    Images: a batch (B, C, H, W), or a list of (C, H, W) of any sizes. `flavour`: see inception_input. `amp`: None, or
    "bf16", which is faster at an error of some 5e-3 and is named in the protocol.
    """

    metric, dim = "fid", 2048

    def __init__(self, weights="auto", device="cpu", flavour="pytorch-fid", amp=None):
        if flavour not in ("pytorch-fid", "tf"):
            raise UserError(f"flavour is pytorch-fid or tf, not {flavour}")
        self.net = load_inception(weights).to(device)
        amp = None if amp == "off" else amp
        if amp not in (None, "bf16"):
            raise UserError(f"Inception features are computed in float32 or bf16, not {amp}")
        self.device, self.flavour, self.amp = torch.device(device), flavour, amp
        self.name = f"2015 Inception features (d=2048, {flavour} flavour{', bf16' if amp else ''})"
        self.key = {"features": "inception", "sha256": INCEPTION_SHA256, "flavour": flavour, "amp": amp}

    @torch.no_grad()
    def __call__(self, images):
        parts = []
        for start in range(0, len(images), 64):  # 64 pictures of 299x299 take some 2 GB on their way through
            part = images[start : start + 64]
            x = stack_images(part, lambda u8: inception_input(u8.to(self.device), self.flavour))
            with full_float32():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp == "bf16"):
                    parts.append(self.net(x.contiguous(memory_format=torch.channels_last)).float())
        features = torch.cat(parts)
        with full_float32():
            return features, features @ self.net.fc.weight.T  # no bias: "logits_unbiased" of the original score


# ====================================================================================================================
# Statistics
# ====================================================================================================================


def as_tensor(x):
    """A tensor or an array as it is; plain numbers and lists in float64, not rounded to torch's default."""
    return torch.as_tensor(x, dtype=None if hasattr(x, "dtype") else torch.float64)


def check_features(f, least=1):
    """Refuse what no statistic can be computed from: a wrong shape, too few rows, NaN or infinity (ValueError)."""
    if f.ndim != 2 or f.shape[1] == 0:
        raise ValueError(f"features must have the shape (N, d), not {tuple(f.shape)}")
    if len(f) < least:
        raise ValueError(f"needs at least {least} rows of features, got {len(f)}")
    if not torch.isfinite(f.sum(dtype=torch.float64)):  # one pass, and no mask as large as f
        raise NotFinite("features must be finite, but some are NaN or infinite")


def check_pair(f1, f2, least):
    """Both sets as check_features wants them, and of one dimension."""
    check_features(f1, least)
    check_features(f2, least)
    if f1.shape[1] != f2.shape[1]:
        raise ValueError(f"the two sets have {f1.shape[1]} and {f2.shape[1]} dimensions")


class Moments:
    """Streaming mean (d,) and covariance (d, d) in float64, exact under any order and division of the rows.

    Pairwise update of Chan, Golub and LeVeque (1979): sums of squares are kept about the running mean, so no digits
    cancel, which they do in E[xx'] - E[x]E[x]'. Memory is d*d numbers whatever N is.
    """

    def __init__(self, dim, device="cpu"):
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # sum of (x - mean)(x - mean)'

    def update(self, features):
        """Take in features (B, d). Returns self. Refuses non-finite values and another d with a ValueError."""
        features = as_tensor(features)
        check_features(features)
        if features.shape[1] != len(self.mean):
            raise ValueError(f"these are statistics of {len(self.mean)} dimensions, not {features.shape[1]}")
        rows = features.detach().to(self.mean)  # float64, and where the statistics are
        self._combine(len(rows), rows.mean(0), rows - rows.mean(0))
        return self

    def merge(self, other):
        """Take in another set's statistics, as if its rows had come here. Returns self."""
        if len(other.mean) != len(self.mean):
            raise ValueError(f"cannot merge statistics of {len(self.mean)} and {len(other.mean)} dimensions")
        if other.n:
            self.scatter += other.scatter.to(self.mean)
            self._combine(other.n, other.mean.to(self.mean), self.scatter[:0])
        return self

    def _combine(self, n, mean, rows):
        total = self.n + n
        delta = mean - self.mean
        between = (math.sqrt(self.n * n / total) * delta)[None]  # one more row carries the distance of the two means
        rows = torch.cat([rows, between])
        self.scatter.addmm_(rows.T, rows)
        self.mean += delta * (n / total)
        self.n = total

    def merge_ranks(self):
        """Over torch.distributed: every rank ends with the statistics of all rows of all ranks. Returns self."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.mean, self.scatter = reducible(self.mean), reducible(self.scatter)
            weighted = torch.cat([self.mean * self.n, self.mean.new_tensor([self.n])])
            torch.distributed.all_reduce(weighted)
            total = int(weighted[-1].item())
            mean = weighted[:-1] / max(total, 1)
            self.scatter.addr_(self.mean - mean, self.mean - mean, alpha=self.n)  # now about the common mean
            torch.distributed.all_reduce(self.scatter)
            self.n, self.mean = total, mean
        return self

    @property
    def cov(self):
        """Unbiased covariance (d, d); ValueError for fewer than two rows."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.n}")
        return self.scatter / (self.n - 1)

    def state(self):
        return {"n": self.n, "mean": self.mean.cpu().clone(), "scatter": self.scatter.cpu().clone()}

    @classmethod
    def of(cls, state):
        """From state(), or from the features (N, d) themselves."""
        if not isinstance(state, dict):
            state = as_tensor(state)
            check_features(state)
            return cls(state.shape[1]).update(state)
        self = cls(0)
        self.n, self.mean, self.scatter = state["n"], state["mean"].clone(), state["scatter"].clone()
        return self

    def distance(self, other):
        return frechet_distance(self.mean.cpu(), self.cov.cpu(), other.mean.cpu(), other.cov.cpu())


def reducible(x):
    """x where the ranks can exchange it: NCCL knows CUDA tensors only."""
    return x.cuda() if torch.distributed.get_backend() == "nccl" else x


def gather_rows(x):
    """(n, ...) -> (N, ...): the rows of all ranks, for what needs the samples themselves (labels, codes, KID)."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return x
    counts = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(counts, len(x))  # ranks may hold different counts: pad, gather, cut
    padded = reducible(torch.cat([x, x.new_zeros(max(counts) - len(x), *x.shape[1:])]))
    parts = [torch.empty_like(padded) for _ in counts]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, counts)]).to(x.device)


def progress(what, done, total, began, step=1):
    """A status line on stderr: rewritten in place on a terminal, otherwise one line for each tenth."""
    terminal, last = sys.stderr.isatty(), done >= total
    if terminal or last or done * 10 // total != max(done - step, 0) * 10 // total:
        rate = done / max(time.time() - began, 1e-9)
        line = f"{what}: {done:,}/{total:,}  {rate:,.1f}/s  {max(total - done, 0) / rate:,.0f} s left"
        print(line, end="\r" if terminal and not last else "\n", file=sys.stderr, flush=True)


@torch.no_grad()
def collect(batches, extractors, total, keep=(), label=None):
    """Run the extractors over batches of uint8 images. Returns {metric: {"moments": Moments, ...}}.

    FID needs the moments only, so nothing of size N x d is held but what `keep` names: pairs of a metric and "features"
    or "logits". `total` images are expected; `label`: show progress under this name.
    """
    out, began, done = {}, time.time(), 0
    for extract in extractors:
        device = extract.device if extract.device.type == "cuda" else "cpu"  # not every accelerator has float64
        out[extract.metric] = {"moments": Moments(extract.dim, device)}
    for images in batches:
        for extract in extractors:
            features, logits = extract(images)
            got = out[extract.metric]
            got["moments"].update(features)
            for name, value in (("features", features), ("logits", logits)):
                if (extract.metric, name) in keep:
                    if name not in got:  # one allocation: a list and its concatenation would be two
                        got[name] = torch.empty(total, value.shape[1])
                    got[name][done : done + len(value)] = value
        done += len(images)
        if label:
            progress(label, done, total, began, len(images))
    return out


def fingerprint(dataset):
    """A digest of a data set's content, so that a changed set is noticed (a second for each GB or two)."""
    digest = hashlib.sha256(repr(tuple(dataset.x.shape)).encode())
    for part in (dataset.x, dataset.y):
        if part is not None:
            digest.update(part.contiguous().numpy().data)
    return digest.hexdigest()[:16]


def digest_of(key):
    """16 hexadecimal digits for a dict of plain values."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def read_saved(path):
    """What torch.save put there; an exception if anything is wrong with it, a flipped bit too, which torch.load lets pass."""
    with zipfile.ZipFile(path) as whole:
        if whole.testzip():
            raise ValueError("checksum")
    return torch.load(path, map_location="cpu", weights_only=True)


def save_atomic(content, path):
    """torch.save under a temporary name, then a rename: a reader never sees half a file."""
    temporary = Path(path).with_suffix(f".{os.getpid()}.tmp")
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a missing folder as a RuntimeError
        raise UserError(f"cannot write {path}: {error}") from error
    finally:  # Ctrl-C leaves none behind either
        with suppress(OSError):
            temporary.unlink()


def cached(folder, kind, key, build):
    """The dict build() returns, from `folder` if it was built before under this very `key` (a dict of plain values).

    A file that cannot be read, was damaged or belongs to another key is rebuilt, and stderr says so.
    """
    text = json.dumps(key, sort_keys=True)
    path = Path(folder) / f"{kind}-{digest_of(key)}.pt"
    if path.exists():
        try:
            saved = read_saved(path)
            if saved["key"] == text:
                return saved
        except Exception:  # truncated, another format, or with code in it: all are rebuilt
            pass
        print(f"{path} is damaged or out of date: rebuilding it", file=sys.stderr)
    saved = {"key": text, **build()}
    save_atomic(saved, path)
    return saved


def real_statistics(dataset, n, size, extract, root="data", batch=250, label=None):
    """Moments of the first `n` images of a data set at `size` pixels (None: as they are), computed once and cached.

    Keyed by data set, split, content, count, size, and by `extract.key`: network, weights, flavour, precision. Images
    are rounded to uint8 at `size`, as a model's samples are. Returns a dict: `moments`, and `is`, the inception score
    of the real images by a classifier (otherwise None).
    """
    import data

    def build():
        batches = (data.to_uint8(x) for x, _ in data.ordered(dataset, n, batch, extract.device, size))
        got = collect(batches, [extract], n, {("fcd", "logits")}, label)[extract.metric]
        score = inception_score(got["logits"].double().softmax(1))[0] if "logits" in got and n >= 10 else None
        return {**got["moments"].state(), "is": score}

    key = {"dataset": dataset.name, "split": dataset.split, "content": fingerprint(dataset), "n": n, "size": size}
    saved = cached(data.cache_dir(root), "stats", {**key, **extract.key}, build)
    return {**saved, "moments": Moments.of(saved)}


# ====================================================================================================================
# Distances
# ====================================================================================================================


def frechet_distance(mu1, cov1, mu2, cov2):
    """Squared Frechet (Wasserstein-2) distance of two Gaussians: |mu1-mu2|^2 + Tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)).

    Means (d,), covariances (d, d), symmetric, positive semidefinite, of any rank; in one dimension plain numbers will do.
    Computed in float64; returns a float that is never negative and never NaN, and 0.0 for equal inputs. ValueError for
    mismatched dimensions, values that are not finite, and covariances with clearly negative eigenvalues.
    Source: Dowson and Landau 1982; Heusel et al. 2017, arXiv:1706.08500. Bias for few samples: see the top.
    """
    mu1, mu2 = (torch.atleast_1d(as_tensor(mu).detach().double()) for mu in (mu1, mu2))
    cov1, cov2 = (torch.atleast_2d(as_tensor(cov).detach().double()) for cov in (cov1, cov2))
    d = mu1.numel()
    if mu1.shape != (d,) or mu2.shape != (d,) or cov1.shape != (d, d) or cov2.shape != (d, d):
        shapes = ", ".join(str(tuple(t.shape)) for t in (mu1, cov1, mu2, cov2))
        raise ValueError(f"means must be (d,) and covariances (d, d) with one d, got {shapes}")
    if not all(torch.isfinite(t).all() for t in (mu1, cov1, mu2, cov2)):
        raise NotFinite("means and covariances must be finite, but some values are NaN or infinite")
    if torch.equal(mu1, mu2) and torch.equal(cov1, cov2):
        check_semidefinite(cov1)
        return 0.0  # exactly; rounding would leave some 1e-10
    traces = (cov1.trace() + cov2.trace()).item()
    return max(0.0, (mu1 - mu2).square().sum().item() + traces - 2 * trace_of_root(cov1, cov2))


def check_semidefinite(cov):
    """ValueError for clearly negative eigenvalues: a thousandth of its scale makes up for rounding, and a Cholesky factor
    exists."""
    shifted = cov.clone()
    shifted.diagonal().add_(1e-3 * cov.diagonal().abs().max())
    if torch.linalg.cholesky_ex(shifted).info and cov.any():
        raise ValueError("a covariance must be positive semidefinite, but one has negative eigenvalues")


def trace_of_root(cov1, cov2):
    """Tr (cov1 cov2)^(1/2) by symmetric eigenproblems only; no square root of a matrix is ever formed.

    With cov1 = L L' (Cholesky) the eigenvalues of cov1 cov2 are those of L' cov2 L, which is symmetric. Where neither
    matrix is positive definite (N <= d), the trace is the nuclear norm of F1' F2 for any factors cov = F F', taken
    here from the eigenvectors whose eigenvalues are not rounding errors.
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

    Where both sets have at most d rows the covariances are singular and need not be formed: with centred rows C,
    Tr (cov1 cov2)^(1/2) is the nuclear norm of C1 C2' / sqrt((N1-1)(N2-1)), an N1 x N2 problem (Gram form): exact, and
    many times faster than d x d.
    """
    f1, f2 = as_tensor(f1), as_tensor(f2)
    check_pair(f1, f2, 2)
    if max(len(f1), len(f2)) > f1.shape[1]:
        return Moments.of(f1).distance(Moments.of(f2))
    if torch.equal(f1, f2):
        return 0.0
    mu1, mu2 = (f.detach().mean(0, dtype=torch.float64) for f in (f1, f2))
    c1, c2 = f1.detach() - mu1, f2.detach() - mu2       # float64 by promotion, in one pass
    n1, n2 = len(f1) - 1, len(f2) - 1
    spread = (torch.linalg.vector_norm(c1).square() / n1 + torch.linalg.vector_norm(c2).square() / n2).item()
    trace = nuclear_norm(c1 @ c2.T, known_zero=1) / math.sqrt(n1 * n2)      # 1: the rows of c1 add up to zero
    return max(0.0, (mu1 - mu2).square().sum().item() + spread - 2 * trace)


def nuclear_norm(m, known_zero=0):
    """Sum of the singular values of m (a, b) in float64, of which `known_zero` are known to vanish.

    Taken as roots of the eigenvalues of m m', at a third of the cost. A root magnifies the rounding of small ones: where the
    error to be expected of that exceeds 1e-8 of the sum, the singular values themselves are computed. Source: ours.
    """
    m = m if len(m) <= m.shape[1] else m.T
    squares = torch.linalg.eigvalsh(m @ m.T)[known_zero:].clamp(min=0)                              # ascending
    values, rounding = squares.sqrt(), torch.finfo(torch.float64).eps * squares[-1:]
    if (rounding / values).sum() < 1e-8 * values.sum():                                             # not for 0 / 0
        return values.sum().item()
    return torch.linalg.svdvals(m).sum().item()


def frechet_latent_distance(z):
    """FLD: Frechet distance between codes (N, d), N >= 2, and N(0, I): |mean|^2 + Tr(S + I - 2 S^(1/2)).

    With s^2 the eigenvalues of the covariance S that is |mean|^2 + sum (s - 1)^2, which cannot come out negative.
    Source: the IVAAE paper, which uses 60,000 codes.
    """
    z = as_tensor(z).detach().double()
    check_features(z, 2)
    spread = torch.linalg.eigvalsh(torch.cov(z.T).view(z.shape[1], -1)).clamp(min=0).sqrt()     # of Sigma^1/2
    return (z.mean(0).square().sum() + (spread - 1).square().sum()).item()


def kernel_distance(f1, f2, subsets=100, size=1000, seed=2020):
    """KID: unbiased squared MMD with the kernel (x.y/d + 1)^3, as (mean, std) over random subsets of `size` rows.

    Features (N, d). Being unbiased it may come out negative. std has ddof 0. ValueError where a set has fewer than
    `size` rows. Source: Binkowski et al. 2018, arXiv:1801.01401 (100 subsets of 1,000).
    """
    f1, f2 = as_tensor(f1), as_tensor(f2)
    check_pair(f1, f2, 2)
    if size < 2 or subsets < 1 or min(len(f1), len(f2)) < size:
        raise ValueError(f"cannot draw {subsets} subsets of {size} rows (at least 2) from {len(f1)} and {len(f2)} rows")
    generator, values = torch.Generator().manual_seed(seed), []
    for _ in range(subsets):
        x, y = (f[torch.randperm(len(f), generator=generator)[:size].to(f.device)].double() for f in (f1, f2))
        xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        # the diagonals pair a sample with itself: left out, or the estimate is biased upwards
        same = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        values.append((same - 2 * xy.mean()).item())
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), values.std(correction=0).item()


def inception_score(probs, splits=10):
    """exp of the mean KL(p(y|x) || p(y)) of class probabilities (N, C), as (mean, std with ddof 0) over `splits` parts.

    Between 1 and C. The parts are consecutive rows, so rows must be in random order. Pass float64 probabilities where
    nine digits matter. ValueError for fewer rows than splits and for rows that are no distributions.
    Source: Salimans et al. 2016, arXiv:1606.03498.
    """
    probs = as_tensor(probs)
    check_features(probs, 1)
    if splits < 1 or len(probs) < splits:
        raise ValueError(f"cannot divide {len(probs)} rows into {splits} splits")
    probs = probs.detach().double()
    if (probs < 0).any() or ((probs.sum(1) - 1).abs() > 1e-3).any():
        raise ValueError("inception_score takes probabilities: rows that are not negative and sum to 1")
    scores = []
    for i in range(splits):
        p = probs[i * len(probs) // splits : (i + 1) * len(probs) // splits]
        q = p.mean(0, keepdim=True)
        # xlogy(0, 0) = 0: a class nobody predicts adds nothing
        scores.append((torch.xlogy(p, p) - torch.xlogy(p, q)).sum(1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def precision_recall(real, fake, k=3, chunk=1000):
    """(precision, recall): share of fake (real) rows inside the k-nearest-neighbour manifold of the real (fake) rows.

    A set's manifold is the union of balls around its rows, each reaching to its k-th nearest neighbour, boundary (to
    rounding) included; features (N, d), more than k rows each. Distances in float64, `chunk` rows at a time.
    Source: Kynkaanniemi et al. 2019, arXiv:1904.06991 (k = 3).
    """
    real, fake = as_tensor(real), as_tensor(fake)
    check_pair(real, fake, k + 1)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    middle = real.detach().mean(0, dtype=torch.float64)  # cdist multiplies matrices: far from 0 that would cost digits
    real, fake = real.detach() - middle, fake.detach() - middle

    def covered(points, centers):
        # k + 1: a row is its own nearest neighbour, at distance 0
        radius = torch.cat([torch.cdist(c, centers).kthvalue(k + 1).values for c in centers.split(chunk)])
        inside = [(torch.cdist(p, centers) <= radius).any(1) for p in points.split(chunk)]
        return torch.cat(inside).double().mean().item()

    return covered(fake, real), covered(real, fake)


def grid_modes(points, centers, std):
    """(modes reached, share of high-quality points) of points (N, D) for a mixture with means (K, D) and this std.

    High quality: within 3 std of the nearest mean, the edge (to rounding) included. A mode is reached if it is the
    nearest mean of at least one high-quality point. Source: the AIM paper, 2-D grid.
    """
    points, centers = as_tensor(points), as_tensor(centers)
    check_pair(points, centers, 1)
    if not std > 0:
        raise ValueError(f"std must be positive, got {std}")
    # differences, not cdist: its matrix-product form loses the digits that decide at the edge
    distance = (points.detach().double()[:, None] - centers.to(points.device).double()).norm(dim=2)  # (N, K)
    nearest, mode = distance.min(1)
    reach = centers.abs().max().item() + 3 * std  # how large the numbers of a point at an edge are
    good = nearest <= 3 * std + 4 * torch.finfo(torch.promote_types(points.dtype, torch.float32)).eps * reach
    return mode[good].unique().numel(), good.double().mean().item()


def stacked_modes(labels, classes=1000):
    """(modes reached, KL(p || uniform) in nats) of labels (N,), integers in 0..classes-1.

    p is the distribution of the labels. Source: PacGAN, arXiv:1712.04086: 26,000 samples, 1,000 classes.
    """
    labels = torch.as_tensor(labels)
    if labels.ndim != 1 or not len(labels) or labels.is_floating_point():
        raise ValueError(f"labels must be integers of the shape (N,), got {labels.dtype} {tuple(labels.shape)}")
    labels = labels.long()  # of int8 or uint8 `classes` would overflow
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels must lie in 0..{classes - 1}, got {labels.min().item()}..{labels.max().item()}")
    counts = torch.bincount(labels.cpu(), minlength=classes)
    p = counts.double() / len(labels)
    return int((counts > 0).sum()), max(0.0, torch.xlogy(p, p * classes).sum().item())


def reconstruction_mse(x, y):
    """Mean squared error over every number of x and y (same shape), in float64, in the scale they are given in.

    For images in [-1, 1] this is `mse_pm1`; a quarter of it is the error on the [0, 1] scale, `mse`.
    """
    x, y = as_tensor(x), as_tensor(y)
    if x.shape != y.shape or not x.numel():
        raise ValueError(f"needs two tensors of one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    return F.mse_loss(y.detach().double(), x.detach().double()).item()


# ====================================================================================================================
# Classifier
# ====================================================================================================================
# For labelled data: what class a sample is of, how sure that is, and features to measure fcd in. Small enough to be
# trained where it is needed, so nothing has to be downloaded; one recipe, so two users' classifiers differ little.
#
# An inception score hangs on its classifier: one that is surer of itself gives generated and real images alike a higher
# score. AIM's Table 1 has those of MNIST from the classifier of Li et al. (ALICE, NeurIPS 2017; github.com/ChunyuanLI/
# MNIST_Inception_Score), by which real test images score 9.879, so that one is here too, for `is_li`, trained anew.

RECIPE = {"version": 1, "side": 32, "features": 128, "batch": 128, "lr": 0.1, "weight_decay": 5e-4, "seed": 0}


def classifier_recipe(channels, device):
    """The settings of the training, part of the cache's key. Grey: 99.3 % on MNIST, 10 s on two cores."""
    if channels == 1:
        return {**RECIPE, "channels": 1, "width": 16, "epochs": 2, "flip": False}
    return {**RECIPE, "channels": 3, "width": 32, "epochs": 30 if device.type == "cuda" else 8, "flip": True}


# Li et al.: ten epochs of 55,000 images and four fixed copies of each, turned by up to 15 degrees and moved by up to 2 pixels,
# in batches of 50, by Adam at 1e-4; the weights that are best on 5,000 more. Ours: copies that are new each time, all 60,000
# images, the last weights, batches of 200 and one cycle of a larger rate, a third of the time. Real test images score 9.875.
LI = {"version": 1, "network": "Li et al. 2017", "side": 28, "features": 1024, "channels": 1, "batch": 200, "lr": 2e-3,
      "epochs": 20, "degrees": 15, "pixels": 2, "plain": 0.2, "seed": 0}


class LiClassifier(nn.Module):
    """Li et al.'s network: (B, 1, 28, 28) -> (features (B, 1024), not negative; logits (B, classes))."""

    def __init__(self, channels, classes, features):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 5, 1, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(49 * 64, features, bias=False), nn.BatchNorm1d(features), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(features, classes))

    def forward(self, x):
        features = self.body(x)
        return features, self.head(features)


def distort(x, degrees, pixels, plain):
    """Images (B, C, S, S) in [-1, 1], each turned by up to `degrees` and moved by up to `pixels` along either of its turned
    axes at random, but for a share `plain` of them; what comes in from outside is black. Source: Li et al. (whole numbers)."""
    n, side = len(x), x.shape[2]
    angle = (torch.rand(n, device=x.device) * 2 - 1) * (degrees * math.pi / 180)
    shift = (torch.rand(n, 2, device=x.device) * 2 - 1) * (pixels * 2 / side)
    moved = torch.rand(n, device=x.device) >= plain
    angle, shift = angle * moved, shift * moved[:, None]
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2)
    grid = F.affine_grid(torch.cat([turn, shift[:, :, None]], 2), x.shape, align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1


class Classifier(nn.Module):
    """(B, C, 32, 32) in [-1, 1] -> (features (B, features), not negative; logits (B, classes))."""

    def __init__(self, channels, classes, width, features):
        super().__init__()
        layers, cin = [], channels
        for cout, kernel, stride in ((width, 5, 2), (2 * width, 3, 1), (2 * width, 3, 2), (4 * width, 3, 2)):  # -> 4x4
            layers += [nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(cout), nn.ReLU()]
            cin = cout
        layers += [nn.Flatten(), nn.Linear(16 * cin, features, bias=False), nn.BatchNorm1d(features), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(features, classes)

    def forward(self, x):
        features = self.body(x)
        return features, self.head(features)


def build_classifier(recipe, classes):
    """The network of a recipe, RECIPE's or LI."""
    if "degrees" in recipe:
        return LiClassifier(recipe["channels"], classes, recipe["features"])
    return Classifier(recipe["channels"], classes, recipe["width"], recipe["features"])


@contextmanager
def seeded(device, seed):
    """Random numbers start from `seed` in here; afterwards the caller's go on as if nothing had happened."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def train_classifier(dataset, classes, recipe, device):
    """A Classifier of `dataset`'s images (uint8, (N, C, H, W)) and labels: SGD, one cycle of lr, bf16 where native.
    Or, if `recipe` is LI, a LiClassifier by that."""
    import data

    n, li = len(dataset.x), "degrees" in recipe
    whose = "Li et al.'s" if li else "the"
    if li:
        print(f"first {whose} classifier is trained, once: ten minutes or more on a CPU", file=sys.stderr)
    batch = min(recipe["batch"], n)
    steps, began = recipe["epochs"] * (n // batch), time.time()
    cuda = device.type == "cuda"
    # elsewhere bf16 is emulated, and slower than float32
    native = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else torch.cpu._is_amx_tile_supported()
    # the caller may be in no_grad, in inference_mode, or in an autocast, whose cache would hold the first step's weights
    alone = torch.autocast(device.type, enabled=False, cache_enabled=False)
    with seeded(device, recipe["seed"]), torch.inference_mode(False), torch.enable_grad(), alone:
        net = build_classifier(recipe, classes).to(device, memory_format=torch.channels_last)
        if li:
            optimizer = torch.optim.Adam(net.parameters(), recipe["lr"], fused=device.type in ("cpu", "cuda"))
        else:
            optimizer = torch.optim.SGD(net.parameters(), recipe["lr"], 0.9, 0, recipe["weight_decay"], nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["lr"], max(steps, 2))
        orders = [torch.randperm(n)[: n // batch * batch] for _ in range(recipe["epochs"])]
        for step, rows in enumerate(torch.cat(orders).split(batch), 1):
            x = data.to_float(dataset.x[rows].to(device), recipe["side"])
            if li:
                x = distort(x, recipe["degrees"], recipe["pixels"], recipe["plain"])
            elif recipe["flip"]:
                x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(3), x)
            with torch.autocast(device.type, torch.bfloat16, enabled=native):
                logits = net(x.contiguous(memory_format=torch.channels_last))[1]
            loss = F.cross_entropy(logits.float(), dataset.y[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress(f"training {whose} {dataset.name} classifier, steps", step, steps, began)
    return net.eval().requires_grad_(False)


def is_labelled(dataset):
    """Whether a classifier can be trained on this data set: images, at least two classes, a label for each."""
    labelled = dataset.y is not None and dataset.classes > 1 and int(dataset.y.min()) >= 0
    return labelled and dataset.x.dtype == torch.uint8


class ClassifierFeatures:
    """uint8 images -> (features (B, d), logits (B, classes)), float32, by the data set's own classifier: the small one, at
    32x32, with d = 128, or, with `recipe` LI, Li et al.'s, at 28x28.

    Images: a batch (B, C, H, W), or a list of (C, H, W) of any sizes. Trained on `train`, its `accuracy` on `test`;
    cached in data.cache_dir(root). Stacked sets have the classifier of their base digits: see stacked_labels.
    """

    metric = "fcd"

    def __init__(self, train, test, device="cpu", root="data", recipe=None):
        import data

        if not (is_labelled(train) and is_labelled(test)):
            raise UserError(f"{train.name} has no labels, which a classifier (and so fcd) needs")
        self.device, classes = torch.device(device), 10 if train.stacked else train.classes
        self.recipe = recipe = recipe or classifier_recipe(train.x.shape[1], self.device)
        self.dim, name = recipe["features"], train.name.removeprefix("stacked-")
        self.name = f"{name} classifier features (d={self.dim})"
        self.key = {"classifier": recipe, "classes": classes, "train": fingerprint(train), "test": fingerprint(test)}

        def build():
            self.net = train_classifier(train, classes, recipe, self.device)
            right = 0
            for x, y in zip(test.x.split(500), test.y.split(500)):
                right += (self(x)[1].argmax(1).cpu() == y).sum().item()
            return {"accuracy": right / len(test.x), "net": {k: v.cpu() for k, v in self.net.state_dict().items()}}

        saved = cached(data.cache_dir(root), f"classifier-{name}", self.key, build)
        with torch.device("meta"):  # an initialisation would draw from the caller's random numbers
            net = build_classifier(recipe, classes)
        net.load_state_dict(saved["net"], assign=True)
        self.net = net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.accuracy = saved["accuracy"]
        weights = hashlib.sha256(b"".join(v.numpy().tobytes() for v in saved["net"].values()))
        self.key = {**self.key, "weights": weights.hexdigest()}  # trained anew elsewhere, they are others

    @torch.no_grad()
    def __call__(self, images):
        import data

        x = stack_images(images, lambda u8: data.to_float(self._recolour(u8.to(self.device)), self.recipe["side"]))
        with full_float32(), torch.autocast(self.device.type, enabled=False):
            return self.net(x.contiguous(memory_format=torch.channels_last))

    def _recolour(self, u8):
        if u8.shape[1] == self.recipe["channels"]:
            return u8
        if u8.shape[1] == 1:
            return u8.expand(-1, 3, -1, -1)
        weights = torch.tensor([0.299, 0.587, 0.114], device=u8.device)[:, None, None]  # grey as by Rec. 601, so as PIL
        return (u8.float() * weights).sum(1, keepdim=True).round().to(torch.uint8)

    def stacked_labels(self, u8):
        """Three digits as R, G, B: uint8 (B, 3, H, W) -> labels (B,) in 0..999, the red digit being the hundreds."""
        digits = self(u8.flatten(0, 1)[:, None])[1].argmax(1).view(-1, 3)  # each channel is a picture of its own
        return (digits * digits.new_tensor([100, 10, 1])).sum(1)


# ====================================================================================================================
# Evaluator
# ====================================================================================================================


class Evaluator:
    """What the training loops report of a set of images (KID and precision are the command line's), of a model given as two
    functions.

    train, test: data.Dataset of images; size: the model's pixels; inception: None (no fid), "auto" or a path of the
    weights; amp: precision of the Inception features. Labelled sets get a classifier, trained once, and with it fcd and
    its company. The reference is at most 10,000 real test images at `size` (of fid, `fid_on_train` training images if
    given, else FID_ON_TRAIN's); its statistics are cached under `root`. li: score samples by Li et al.'s classifier, too, as
    published tables of MNIST do (minutes of training on first use).
    In a distributed run one rank calls it: nothing here waits for the others.
    """

    def __init__(
        self, train, test, size, device="cpu", root="data", samples=10_000, inception=None, batch=250, amp=None,
        fid_on_train=None, li=False,
    ):
        import data

        if train.x.dtype != torch.uint8:
            raise ValueError(f"an Evaluator is for images, and {train.name} holds points")
        if li and test.channels != LI["channels"]:
            raise ValueError(f"Li et al.'s classifier is of grey digits, and {test.name} has {test.channels} channels")
        self.test, self.size, self.batch, self.samples = test, size, batch, samples
        self.device, self.count = torch.device(device), min(REFERENCE, len(test))
        if min(samples, self.count) < 10:
            raise UserError(f"an evaluation needs 10 samples and 10 test images, not {samples} and {self.count}")
        # first, since it can fail for want of its weights, and the classifier is a minute's work on some data
        inception_features = [InceptionFeatures(inception, device, amp=amp)] if inception else []
        labelled = is_labelled(train) and is_labelled(test)
        self.classifier = ClassifierFeatures(train, test, device, root) if labelled else None
        self.extractors = ([self.classifier] if self.classifier and not test.stacked else []) + inception_features
        if not self.classifier and not inception:
            print(f"{train.name} has no labels: without Inception weights samples are drawn but not scored", file=sys.stderr)
        # the Inception network takes minutes on a CPU, the classifier a second: only the former shows progress
        self.label = "Inception features" if inception else None
        self.reference = {e.metric: (test, self.count) for e in self.extractors}
        fid_on_train = fid_on_train or FID_ON_TRAIN.get(train.name)
        if "fid" in self.reference and fid_on_train:
            self.reference["fid"] = (train, min(fid_on_train, len(train)))
        real = {e.metric: real_statistics(*self.reference[e.metric], size, e, root, batch, self.label) for e in self.extractors}
        self.real = {metric: statistics["moments"] for metric, statistics in real.items()}
        self.fixed = {"classifier_accuracy": self.classifier.accuracy} if self.classifier else {}
        if "fcd" in real:
            self.fixed["is_real"] = real["fcd"]["is"]
        self.li = ClassifierFeatures(train, test, device, root, LI) if li else None
        if li:
            self.fixed["is_li_real"] = real_statistics(test, self.count, size, self.li, root, batch)["is"]
        if test.stacked:  # what as many real triples score: the floor that the number of samples sets
            triples = (data.to_uint8(x) for x, _ in data.ordered(test, samples, batch, device, size))
            labels = torch.cat([self.classifier.stacked_labels(u8) for u8 in triples])
            self.fixed["modes_real"], self.fixed["kl_real"] = stacked_modes(labels)

    @torch.no_grad()
    def __call__(self, sample, reconstruct=None):
        """sample(n) -> (n, C, H, W) in [-1, 1], or None; reconstruct(x) -> like x, or None. Returns a flat dict:

        labelled sets: fcd, is, is_std, class_share (list), class_min, class_max, confident (share of samples with
        confidence > .9), is_real, classifier_accuracy; with li: is_li, is_li_std, is_li_real; stacked sets: modes, kl (nats),
        modes_real, kl_real; with weights: fid, and is_inception, is_inception_std, the score in Inception's own classes; with
        reconstruct: mse (pixels in [0, 1]), its standard deviation over images mse_std, and mse_pm1 ([-1, 1]), of test images;
        always: protocol.

        Samples are rounded to uint8, so they are scored as they would be saved; reconstructions are not. Random numbers
        start from one seed at every call, so evaluations compare models, not draws; the caller's are left as they were.
        ValueError for samples of another shape, NotFinite, which is one, for NaN or infinity.
        """
        with seeded(self.device, SEED):
            result, protocol = self._score(sample) if sample else ({}, [])
            if reconstruct:
                errors = self._reconstruction_errors(reconstruct)
                result["mse_pm1"] = errors.mean().item()
                result["mse"] = result["mse_pm1"] / 4  # [-1, 1] is twice as wide as [0, 1]
                result["mse_std"] = errors.std(correction=0).item() / 4
                protocol.append(f"mse: {self.count} {self.test.split} images, {self.size}x{self.size}")
        return {**result, **self.fixed, "protocol": "; ".join(protocol)}

    def _score(self, sample):
        labels, li = [], []
        keep = {("fcd", "logits"), ("fid", "logits")}
        got = collect(self._draw(sample, labels, li), self.extractors, self.samples, keep, self.label)
        result = {metric: self.real[metric].distance(got[metric]["moments"]) for metric in got}
        protocol = []
        for extract in self.extractors:
            real, n = self.reference[extract.metric]
            protocol.append(f"{extract.metric}: {extract.name}, {n} {real.split} images vs {self.samples} samples, "
                            f"{self.size}x{self.size}")
        if "fcd" in got:
            probs = got["fcd"]["logits"].double().softmax(1)
            share = torch.bincount(probs.argmax(1), minlength=probs.shape[1]).double() / len(probs)
            result["is"], result["is_std"] = inception_score(probs)
            result["class_share"] = [round(s, 6) for s in share.tolist()]
            result["class_min"], result["class_max"] = share.min().item(), share.max().item()
            result["confident"] = (probs.amax(1) > 0.9).double().mean().item()
        if "fid" in got:
            scores = inception_score(got["fid"]["logits"].double().softmax(1))
            result["is_inception"], result["is_inception_std"] = scores
        if li:
            result["is_li"], result["is_li_std"] = inception_score(torch.cat(li).double().softmax(1))
            protocol.append(f"is_li: Li et al.'s classifier, trained here, right on {self.li.accuracy:.2%} of the test images, "
                            f"{self.samples} samples in 10 splits, {self.size}x{self.size}")
        if labels:
            result["modes"], result["kl"] = stacked_modes(torch.cat(labels))
            protocol.append(f"modes, kl: {self.classifier.name}, {self.samples} samples, {self.size}x{self.size}")
        return result, protocol

    def _draw(self, sample, labels, li):
        """The samples in batches of uint8; to `labels` go those of stacked sets, to `li` Li et al.'s logits where wanted."""
        import data

        needed = self.samples if self.classifier or self.extractors else 0
        for start in range(0, needed, self.batch):
            n = min(self.batch, needed - start)
            x = sample(n)
            if tuple(x.shape) != (n, self.test.channels, self.size, self.size):
                raise ValueError(f"sample({n}) must give {n} images of {self.test.channels} channels and "
                                 f"{self.size}x{self.size}, got {tuple(x.shape)}")
            if not torch.isfinite(x).all():
                raise NotFinite("samples must be finite, but some numbers are NaN or infinite")
            u8 = data.to_uint8(x)
            if self.test.stacked:
                labels.append(self.classifier.stacked_labels(u8))
            if self.li:
                li.append(self.li(u8)[1].cpu())
            yield u8

    def _reconstruction_errors(self, reconstruct):
        """Each test image's mean squared error, (count,), pixels in [-1, 1]."""
        import data

        errors = []
        for x, _ in data.ordered(self.test, self.count, self.batch, self.device, self.size):
            y = reconstruct(x)
            if y.shape != x.shape:
                raise ValueError(f"reconstruct must give what it is given, {tuple(x.shape)}, not {tuple(y.shape)}")
            if not torch.isfinite(y).all():
                raise NotFinite("reconstructions must be finite, but some numbers are NaN or infinite")
            errors.append((y.double() - x.double()).square().flatten(1).mean(1).cpu())
        return torch.cat(errors)


# ====================================================================================================================
# Command line
# ====================================================================================================================


def read_picture(path):
    """uint8 (3, H, W), as pytorch-fid reads it (PIL, RGB); None where it cannot be read, or has more than 8 bits."""
    import numpy as np
    from PIL import Image  # both come with torchvision

    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # PIL would cut 16 bits off at 255: white
                return None
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except Exception:  # PIL raises some ten types for damaged files
        return None


def read_pictures(files, batch, sizes):
    """Lists of `batch` pictures, uint8 (3, H, W), any `sizes`, which are noted; the next are read meanwhile. UserError names
    bad ones."""
    parts = [files[start : start + batch] for start in range(0, len(files), batch)]
    with ThreadPoolExecutor() as pool:
        ahead = pool.map(read_picture, parts[0])
        for names, following in zip(parts, [*parts[1:], []]):
            images, ahead = list(ahead), pool.map(read_picture, following)
            bad = [str(name) for name, image in zip(names, images) if image is None]
            if bad:  # to leave them out would quietly change N
                raise UserError(f"cannot read {', '.join(bad)}: mend or remove what is no picture of 8 bits")
            sizes.update(tuple(image.shape[1:]) for image in images)
            yield images


def open_source(name, args):
    """What A or B is: a dict of `name`, `n`, `sizes` ({(H, W)}, of a folder filled as it is read), and `state` (of a saved
    file), `files` (of a folder) or `dataset`."""
    import data

    path = Path(name)
    if path.suffix == ".pt":
        try:
            state = read_saved(path)
            return {"name": path.name, "n": state["n"], "state": state, "of": state["of"], "key": state["key"],
                    "sizes": set(state["sizes"])}
        except Exception as error:
            raise UserError(f"{path} is no file of statistics saved by `metrics.py stats`") from error
    if path.is_dir():
        if any(entry.is_dir() and entry.name.lower() == "train" for entry in path.iterdir()):
            raise UserError(f"{path} has a training and perhaps a test set: say {path}:train or {path}:test")
        files = data.find_pictures(path)
        if not files:
            raise UserError(f"{path} holds no pictures ({', '.join(data.SUFFIXES)})")
        # a seeded order: --n takes a fair sample, and the splits of the inception score are not classes
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(SEED))[: args.n]
        return {"name": path.resolve().name, "n": len(order), "files": [files[i] for i in order.tolist()], "sizes": set()}
    name, _, split = name.partition(":")
    dataset = data.load(name, args.root, split=split or "train")
    if dataset.x.dtype != torch.uint8:
        raise UserError(f"{name} holds points, not images")
    return {"name": f"{name}:{dataset.split}", "n": min(args.n or len(dataset), len(dataset)), "dataset": dataset,
            "sizes": {tuple(dataset.x.shape[2:])}}


def described(source):
    """A source for the protocol: its name, how many pictures were used, and their size."""
    sizes = source["sizes"]
    size = "mixed sizes" if len(sizes) > 1 else "x".join(map(str, *sizes))
    return f"{source['name']} (n={source['n']}, {size})"


def measure(source, extract, keep, args):
    """What collect() gives for a source, from its saved statistics or the cache where `keep` asks for no more."""
    n, label = source["n"], f"{source['name']}, {extract.metric}"
    if n < 2:
        raise UserError(f"{source['name']} holds {n} picture, and statistics need at least 2")
    if "state" in source:
        if source["of"] != extract.name or source["key"] != digest_of(extract.key):
            raise UserError(f"{source['name']} holds statistics of {source['of']}, not of {extract.name} as they are here")
        if keep:
            raise UserError(f"{source['name']} holds a mean and a covariance, but --kid, --is and --pr need pictures")
        return {"moments": Moments.of(source["state"])}
    if "files" in source:
        batches = read_pictures(source["files"], args.batch, source["sizes"])
    else:
        import data

        if not keep:
            return real_statistics(source["dataset"], n, None, extract, args.root, args.batch, label)
        batches = (data.to_uint8(x) for x, _ in data.ordered(source["dataset"], n, args.batch, extract.device))
    return collect(batches, [extract], n, {(extract.metric, what) for what in keep}, label)[extract.metric]


def compare(a, b, extract, wanted, args):
    """Every wanted number of B against A in the features of `extract`, as a flat dict."""
    # at most d pictures: the Gram form needs their features, which are then no more than a covariance
    few = max(a["n"], b["n"]) <= extract.dim and "state" not in a and "state" not in b
    inception = extract.metric == "fid"
    both = ["features"] if few or (inception and {"kid", "pr"} & wanted) else []
    got_a = measure(a, extract, both, args)
    got_b = measure(b, extract, both + ["logits"] * (inception and "is" in wanted), args)
    result, f1, f2 = {}, got_a.get("features"), got_b.get("features")
    protocol = f"{extract.name}, {described(a)} vs {described(b)}"
    if extract.metric in wanted:
        distance = frechet_distance_features(f1, f2) if few else got_a["moments"].distance(got_b["moments"])
        result[extract.metric] = distance
    if inception and "kid" in wanted:
        subset = min(1000, a["n"], b["n"])
        result["kid"], result["kid_std"] = kernel_distance(f1, f2, 100, subset)
        protocol += f", kid: 100 subsets of {subset}"
    if inception and "is" in wanted:
        mixed = torch.randperm(b["n"], generator=torch.Generator().manual_seed(SEED))  # a data set may lie in order
        result["is"], result["is_std"] = inception_score(got_b["logits"][mixed].double().softmax(1))
        protocol += ", is: of B, 10 splits"
    if inception and "pr" in wanted:
        result["precision"], result["recall"] = precision_recall(f1, f2, 3)
        protocol += ", precision and recall: k=3"
    result["protocol"] = protocol
    return result


def run(args):
    """The command line's work: a dict to print. UserError for what the user can mend."""
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}, but there is no CUDA here: use --device cpu")
    try:
        device = torch.device(args.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device} cannot be used here ({str(error).splitlines()[0]}): "
                        "use --device cpu") from None
    if (args.n is not None and args.n < 2) or args.batch < 1:
        raise UserError("--n must be at least 2 and --batch at least 1")
    saving = args.sources[0] == "stats"
    if len(args.sources) != 2 + saving:
        raise UserError("give two sources, A and B, or `stats A out.pt`; see --help")
    wanted = {name for name in ("fid", "fcd", "kid", "is", "pr") if getattr(args, name)} or {"fid"}
    if saving and wanted not in ({"fid"}, {"fcd"}):
        raise UserError("`stats` saves what one of --fid and --fcd needs")
    out = Path(args.sources[2]) if saving else None
    if out and (out.suffix != ".pt" or not out.parent.is_dir()):
        raise UserError(f"cannot write {out}: give the name of a .pt file in a folder that exists")
    opened = [open_source(name, args) for name in args.sources[saving : saving + 2 - saving]]
    for name, least, sets in (("is", 10, opened[1:]), ("pr", 4, opened)):
        if name in wanted and min(source["n"] for source in sets) < least:
            raise UserError(f"--{name} needs {least} pictures, not {min(source['n'] for source in sets)}")
    extractors = []
    if "fcd" in wanted:
        import data

        name, known = args.sources[saving].partition(":")[0], opened[0].get("dataset")
        if known is None or not is_labelled(known) or known.stacked:
            raise UserError(f"--fcd needs the name of a labelled data set as A, for instance mnist:test, not {name} (saved "
                            "statistics of such a set can be B)")
        pair = {split: data.load(name, args.root, split=split) for split in {"train", "test"} - {known.split}}
        extractors.append(ClassifierFeatures(**{known.split: known, **pair}, device=device, root=args.root))
    if wanted - {"fcd"}:
        extractors.append(InceptionFeatures(args.weights or "auto", device, args.flavour, args.amp))
    if saving:
        moments = measure(opened[0], extractors[0], [], args)["moments"]
        about = {"sizes": sorted(opened[0]["sizes"]), "of": extractors[0].name, "key": digest_of(extractors[0].key)}
        save_atomic({**moments.state(), **about}, out)
        return {"saved": str(out), "n": moments.n, "protocol": f"{extractors[0].name}, {described(opened[0])}"}
    results = [compare(*opened, extract, wanted, args) for extract in extractors]
    result = {k: v for r in results for k, v in r.items()} | {"protocol": "; ".join(r["protocol"] for r in results)}
    n = min(source["n"] for source in opened)
    if n < 10_000 and {"fid", "fcd"} & result.keys():
        result["note"] = (f"n={n} is below 10,000: a Frechet distance is biased upwards for few samples, fid by about "
                          "25 at n=500, 16 at 1,000, 9 at 2,000, 4 at 5,000; compare only numbers of equal n")
    return result


class Parser(argparse.ArgumentParser):
    """argparse with its complaint as one sentence."""

    def error(self, message):
        raise UserError(f"{message}; see --help")


def main(argv=None):
    """Parse, run, print. Returns the exit code: 0, or 2 after one sentence on stderr."""
    parser = Parser(description="Compare two sets of images. `metrics.py stats A out.pt` saves the statistics of A. What each "
                                "number means stands at the top of the file.")
    add = parser.add_argument
    add("sources", nargs="+", metavar="A B", help="folder, data set (mnist, cifar10:test) or saved .pt; A is real")
    add("--fid", action="store_true", help="Frechet Inception distance (the default)")
    add("--kid", action="store_true", help="kernel Inception distance, 100 subsets of at most 1,000")
    add("--is", action="store_true", help="inception score of B, 10 splits")
    add("--pr", action="store_true", help="precision and recall of B, k=3")
    add("--fcd", action="store_true", help="Frechet distance in a classifier trained on the labelled data set A")
    add("--n", type=int, help="take this many pictures of each, a seeded random choice of a folder's")
    add("--json", action="store_true", help="print one line of JSON")
    add("--weights", help=f"path of {INCEPTION_FILE} (default: torch.hub's cache, or a download)")
    add("--flavour", choices=["pytorch-fid", "tf"], default="pytorch-fid", help="how pictures are resized and scaled")
    add("--amp", choices=["bf16"], help="precision of the Inception features (default: float32)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--batch", type=int, default=32)
    add("--root", default="data", help="where data sets and caches are")
    try:
        result = run(args := parser.parse_args(argv))
    except (ValueError, OSError) as error:  # OSError: a loop of links, no permission, a name too long
        if not isinstance(error, OSError) and type(error).__name__ != "UserError":  # data.py has a class of this name too
            raise
        print(f"metrics.py: {error}", file=sys.stderr)
        return 2
    lines = [f"{k:>10}  {f'{v:.6g}' if isinstance(v, float) else v}" for k, v in result.items()]
    print(json.dumps(result) if args.json else "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
