"""LatentMap, a generative model without prior distribution matching, with its baselines.

    Cong Geng, Jia Wang, Li Chen, Zhiyong Gao: "Generative Model without Prior Distribution
    Matching". Sections, equations, tables and figures named below are this paper's.

A variational autoencoder, Eqs. (1) to (3), asks two things of one code: that it tell the data
apart, and that it be distributed like a prior. They conflict (Propositions 1 and 2, Eq. (4), Fig.
1): the second may destroy the geometry of the data. LatentMap asks only the first: an autoencoder
is trained for reconstruction, and a prior is fitted to its codes afterwards, Eqs. (7) and (8).
A discriminator d learns how unreal decoded codes are, Eq. (9); the autoencoder lowers d's answer,
Eq. (10), so that straight lines between codes decode to data. Batch normalisation, Eq. (11), keeps
codes near a sphere without bending them. Then a small network g learns to turn Gaussian noise into
codes, in a GAN between vectors, Eqs. (12) and (13). A sample is G(g(z)).

    python latentmap.py                             the Swiss roll (Figs. 4 and 5), offline
    python latentmap.py --model vae                 a baseline: vae, aae, alae, wae, introvae, age
    python latentmap.py --model vae --authors       ... as LatentMap's authors' script has it (D8)
    python latentmap.py --dataset swissroll3d       the roll in 3-D, with their E and G (D6)
    python latentmap.py --dataset mnist             Fig. 6; --model latentmap-nobn, latentmap-noreg
    python latentmap.py --dataset celeba            Tables 1 and 2: 64 x 64, 25 epochs
    python latentmap.py --dataset FOLDER            one's own pictures
    python latentmap.py --model vae --help          the flags of one system
    python latentmap.py --resume RUN --sample 100   draws from a run

What to expect: of `python latentmap.py`, in minutes on two CPU cores, samples on average .02 off
the spiral and nearly all over it, reconstructions at an MSE of .001; see assets/RESULTS.md.
"""

import contextlib
import copy
import dataclasses
import json
import math
import os
import signal
import sys
import time

if __name__ == "__main__":  # Ctrl-C while torch is imported leaves no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

try:
    import data
    import metrics
    from data import POINT_SETS, Settings, UserError, setting
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"latentmap.py: put data.py and metrics.py beside it ({error})", file=sys.stderr)
    sys.exit(2)

FILE = "latentmap"


class Machine:
    """Where and how a model computes: device, precision, one update. `Machine()`: the CPU, float32.

    device: "cpu", "cuda", "cuda:1"; amp: "off", "bf16", or "fp16", whose losses are scaled.
    """

    def __init__(self, device="cpu", amp="off"):
        self.device = torch.device(device)
        self.amp = amp
        self.dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def adam(self, parameters, lr, betas):
        fused = self.device.type in ("cpu", "cuda")
        return torch.optim.Adam(parameters, lr, betas, fused=fused)

    def descend(self, optimiser, loss):
        """One step of `optimiser` down `loss`: only its own parameters get a gradient."""
        self.descend_together((optimiser, loss))

    def descend_together(self, *pairs):
        """A step of each optimiser down its loss. All gradients come before any network moves."""
        for n, (optimiser, loss) in enumerate(pairs, 1):
            own = [p for group in optimiser.param_groups for p in group["params"]]
            self.scaler.scale(loss).backward(inputs=own, retain_graph=n < len(pairs))
        for optimiser, _ in pairs:
            self.scaler.step(optimiser)
            optimiser.zero_grad()
        self.scaler.update()

    @contextlib.contextmanager
    def inference(self, model):
        """Running statistics instead of the batch's, and no graph."""
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), self.autocast():
                yield
        finally:
            model.train(training)

    @staticmethod
    def without_running_stats(network, x, weights=None):
        """`network(x)`, of other `weights` if given; its batch norms' running statistics stay."""
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        return torch.func.functional_call(network, buffers | (weights or {}), x)


# ==================================================================================================
# LatentMap
#
# Notation.  paper          here            shape
#            x ~ p_r(x)     x               (B, C, S, S) in [-1, 1], or points (B, C)
#            z = E(x)       E(x)            (B, dim)
#            z^ = BN(z)     code            (B, dim), mean 0, variance 1 in each coordinate
#            x^ = G(z^)     x_hat           like x
#            mu ~ U[0, .5]  mu              (B,), one for each item
#            x_mu           x_mu            like x: G(mu z^_1 + (1 - mu) z^_2)
#            gamma, lambda  gamma, lam      x's share of a blend with x^; d's target for it
#            omega_1, _2    omega1, omega2  weights
#            d(x)           d(x)            (B,), the mean of the outputs of a net shaped like E
#            g(z), D        g(z), D(code)   (B, dim), (B,)
#
# Algorithm (the paper prints none). A call of `LatentMap.step` is, up to step map_from,
#     line 1    code = BN(E(x));  x^ = G(code)                                            Eq. (11)
#     line 2    d, twice:  down  ||d(x)||^2 + ||d(gamma x + (1 - gamma) x^) - lam||^2
#                                + ||d(x_mu) - mu - lam||^2                                Eq. (9)
#     line 3    E, G:      down  ||x - x^||^2 + omega1 ||d(x_mu)||^2 + omega2 ||d(x^)||^2 Eq. (10)
# and from then on, while E, BN, G and d rest and `code` comes from the running statistics,
#     line 4    D, five times (of points, twice):
#                          down  relu(1 - D(code)) + relu(1 + D(g(z)))                    Eq. (12)
#     line 5    g:              down  -D(g(z))                                            Eq. (13)
#
# Deviations and choices (the authors' code is gengcong940126/AGE).
#     | paper                       | authors' code         | here                     | switch
# D1  | ||x - x^||^2                | mean of |x - x^|      | mean of squares          | --recon
#       A sum over 12,288 numbers would drown the other terms, which are of the order of lam^2.
# D2  | silent on gamma, lambda,    | .2, .2, 1, 1; 2e-4,   | as theirs; Adam's own    | --gamma
#     | omegas, optimiser, counts   | beta1 0, batch 32     | beta2; d x 2, D x 5      | --lr ...
#       All steps of d use one x, all of D one code; z and mu, one for each item, are drawn anew.
#       x_1 is the batch reversed, x_2 the batch: as mu <= .5, x_mu is nearer to x_2.
# D3  | BN to mean 0, variance 1    | scale, shift learnt   | no scale, no shift       |
#       Eqs. (9), (10) and (12) print E(x): read here as BN(E(x)), by Eq. (11).
# D4  | prior: Gaussian             | unit sphere           | Gaussian; or the sphere  | --prior
#     |                             | (roll: Gaussian)      | of radius sqrt(dim)      |
#       With --authors the radius is 1, but for AGE.
# D5  | autoencoder, then map       | both in every step    | .8, then .2 of the steps | --joint
#       The paper does not say how long (points: .6, .4). best.pt comes from the second phase. With
#       --joint each step has lines 1 to 5, and D sees line 1's codes, those of the batch's BN.
# D6  | G, g, D, d: "Mimicry's      | G, E, d: its SNGAN-64 | as theirs                | --size
#     | architectures"              | g, D: MLPs            |                          |
#       E is d with BN for spectral norm and a mean over positions for the sum. d's and D's last
#       layers go without spectral norm, which would leave them too small a range. The MLPs' sizes
#       are ours, and the networks for 32 pixels and points, but E and G of swissroll3d (theirs).
# D7  | Swiss roll, 5,000 points    | in 3-D, noise .05     | a plane spiral           | --dataset
#       Their sheet is half as deep as sklearn's; swissroll3d's is not. The rolls' steps (D's too),
#       rates, weights and batch are ours (theirs in 3-D: all 5,000 points, 75,000 steps, 2e-4
#       halved thrice): each of four systems has the best of six settings on seed 100, those of the
#       3-D roll at width 128, 6,000 steps. Ours, too: 25 epochs but on CelebA (the scripts have 100
#       on CIFAR-10). 32 pixels are the scripts', CelebA's 128 dimensions theirs and Mimicry's.
# D8  | baselines: networks, epochs | AUTHORS, script_*,    | their own papers', where | --authors
#     | as LatentMap's; else silent | NAME_authors          | not marked "ours"        |
#       They share E, G, optimiser and batch. With the switch, vae, aae, introvae are as in scripts
#       of LatentMap's authors, age, alae as in their own authors'. Networks stay, but for two Ds.
#       In the scripts vae and introvae reconstruct a draw of q(z|x): with the switch, so here, but
#       not of points. For points the switch has the losses, rates and batch of the scripts for
#       pictures (alae keeps its rate and batch), not of those for the 3-D roll (D7).
# D9  | silent on running           | of all batches        | E's follow data only,    |
#     | statistics                  |                       | G's the codes of data    |
#       Blended codes (into G) and samples (into E) have other moments, and would shift these. G of
#       ALAE follows F(z), that of AGE the prior's draws, that of IntroVAE codes and draws in turn.
# D10 | FID against training images | MSE of [-1, 1] pixels | so: fid and `mse_pm1`    |
#       The script takes the MSE of one batch of 64 images (of CelebA it holds none back for tests);
#       here it is of up to 10,000 test images.
# D11 | CelebA: resized to 64       | the central 178 x 179 | the central 140 x 140    |
#       of the 178 x 218 aligned faces, as IVAAE and WAE crop them.

# ---- Settings ------------------------------------------------------------------------------------

FULL = ("latentmap",)
LATENTMAPS = (*FULL, "latentmap-nobn", "latentmap-noreg")
WITH_PRIOR = (*LATENTMAPS, "aae", "wae", "age", "alae")
MODELS = {  # the systems, and what each changes of the settings; for their classes see CLASSES
    "latentmap": {},
    "latentmap-nobn": dict(normalise=False, omega1=0.0, omega2=0.0),  # Fig. 6, first row
    "latentmap-noreg": dict(omega1=0.0, omega2=0.0),  # Fig. 6, second row
    "vae": {}, "aae": {}, "wae": {}, "introvae": {}, "age": dict(prior="sphere"), "alae": {},
}
SCRIPT = dict(lr=2e-4, beta1=0.5, batch=64, prior="sphere")  # of AGE its own authors', too
AUTHORS = {  # what --authors changes of the settings (D8); of points the prior stays (D4)
    "vae": SCRIPT | dict(lr=5e-4), "aae": SCRIPT, "introvae": SCRIPT, "age": SCRIPT,
    "alae": dict(beta2=0.99),
}
POINTS = dict(width=128, latent=2, batch=500, steps=6000, lr=1e-3, ae_share=0.6, map_d_steps=2,
              map_width=128, omega1=0.3, omega2=0.3, amp="off")  # ours (D7)
TUNED = {  # what a system changes on a data set: ours (D7)
    ("aae", "swissroll"): dict(lr=2e-3), ("alae", "swissroll"): dict(lr=2e-4),
    ("vae", "swissroll3d"): dict(lr=2e-3), ("aae", "swissroll3d"): dict(lr=2e-3),
    ("alae", "swissroll3d"): dict(lr=2e-4),
}
DIGITS = dict(size=32, latent=256)  # ablation study: "256D"; 32 pixels: author code
DIGIT_SETS = ("mnist", "fashion-mnist", "digits", "stacked-mnist", "stacked-digits")
DATASETS = dict.fromkeys(POINT_SETS, POINTS) | dict.fromkeys(DIGIT_SETS, DIGITS) | {
    "swissroll3d": POINTS | dict(width=400, lr=5e-4, steps=20_000),  # author code's width
    "digits": DIGITS | dict(width=16, latent=64, steps=3000),  # ours: minutes on two cores
    "cifar10": dict(size=32),
}  # what a data set changes of the settings


@dataclasses.dataclass
class LatentMapConfig(Settings):
    """Every setting of a run, with CelebA's values (Table 1). Those with a text are flags."""

    model: str = setting("latentmap", ", ".join(MODELS), choices=tuple(MODELS))
    dataset: str = setting("swissroll", "a name (python data.py --help) or a folder of pictures")
    size: int | None = setting(64, "pixels, 32 or 64 (D6, D7)", int)
    width: int = setting(64, "channels at full size (Mimicry); of points hidden units", least=1)
    latent: int = setting(128, "dim, the numbers of a code (D7)", least=1)
    batch: int = setting(32, "items a step and rank (D2, D7, D8)", least=2)
    epochs: float = setting(25.0, "length, where --steps is not given (CelebA)", least=1e-9)
    lr: float = setting(2e-4, "Adam's rate (D2, D7, D8)", least=0)
    beta1: float = setting(0.0)  # author code
    beta2: float = setting(0.999)  # Adam's own
    authors: bool = setting(False, "the baseline as its authors or LatentMap's have it (D8), and "
                            "defaults of the other flags", models=tuple(AUTHORS))
    recon: str = setting("l2", "reconstruction error: l2, or l1, author code of Eq. (10) (D1)",
                         choices=("l2", "l1"), models=(*LATENTMAPS, "aae"))
    prior: str = setting("gauss", "gauss, or sphere, of radius sqrt(dim) (D4)",
                         choices=("gauss", "sphere"), models=WITH_PRIOR)
    gamma: float = setting(0.2, "share of x in a blend (author code)", least=0, most=1, models=FULL)
    lam: float = setting(0.2, "d's target for a blend (author code)", least=0, models=FULL)
    omega1: float = setting(1.0, "weight of ||d(x_mu)||^2 (D2, D7)", least=0, models=FULL)
    omega2: float = setting(1.0, "weight of ||d(x^)||^2 (D2, D7)", least=0, models=FULL)
    joint: bool = setting(False, "both phases in every step (author code; D5)", models=LATENTMAPS)
    normalise: bool = setting(True)  # Eq. (11)
    ae_share: float = setting(0.8)  # of the steps, for the first phase (D5)
    critic_steps: int = setting(2)  # of d for one of E and G (author code)
    map_d_steps: int = setting(5)  # of D for one of g (author code)
    map_width: int = setting(512)  # hidden units of g, D and ALAE's F (ours)

    @property
    def kind(self):
        """What selects constants: "points", "digits", or "pictures" (CelebA's)."""
        if self.dataset in POINT_SETS:
            return "points"
        return "digits" if self.dataset in DIGIT_SETS else "pictures"

    @property
    def networks(self):
        """The key of ENCODERS and DECODERS: pixels, "points" or "swissroll3d"."""
        return self.size or (self.dataset if self.dataset in ENCODERS else "points")

    def check(self):
        """Raises UserError, in one sentence, for settings that cannot work."""
        super().check()
        if self.size not in (32, 64, None):
            raise UserError(f"--size {self.size}: there are networks for 32 and for 64 pixels")
        if self.prior == "sphere" and self.latent < 2:
            raise UserError(f"--latent {self.latent} is too small for a prior on the sphere")
        if self.compile and self.model == "alae":
            raise UserError("--compile does not go with alae: its penalty differentiates twice")


@dataclasses.dataclass
class PointsConfig(LatentMapConfig):
    """The settings for points: without pixels and FID, so without these two flags."""

    size: int | None = setting(None)
    inception: str | None = setting(None)


def preset(model=None, dataset=None, authors=False):
    """The paper's values, changed by data set, --authors and model. UserError: no such model."""
    model = model or "latentmap"
    dataset = dataset or "swissroll"
    if model not in MODELS:
        raise UserError(f"--model {model} is not one of {', '.join(MODELS)}")
    changes = DATASETS.get(dataset, {}) | TUNED.get((model, dataset), {})
    if authors and model in AUTHORS:
        changes |= AUTHORS[model] | dict(authors=True)
        if dataset in POINT_SETS:
            changes |= dict(prior="gauss")
    config = PointsConfig if dataset in POINT_SETS else LatentMapConfig
    return config(model=model, dataset=dataset, **(changes | MODELS[model]))


# ---- Networks (D6) -------------------------------------------------------------------------------


def xavier(layer, gain=1.0):
    """`layer` with Xavier's uniform weights, as in Mimicry."""
    nn.init.xavier_uniform_(layer.weight, gain)
    return layer


def conv(c_in, c_out, kernel, gain=1.0, spectral=False, stride=1, bias=True):
    """A Xavier convolution that keeps the size (odd kernel) or halves it (kernel 4, stride 2)."""
    layer = xavier(nn.Conv2d(c_in, c_out, kernel, stride, (kernel - 1) // 2, bias=bias), gain)
    if bias:
        nn.init.zeros_(layer.bias)
    return spectral_norm(layer) if spectral else layer


class Up(nn.Module):
    """Mimicry's residual block of G: (B, c_in, S, S) -> (B, c_out, 2S, 2S)."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.first = nn.BatchNorm2d(c_in)
        self.second = nn.BatchNorm2d(c_out)
        self.conv1 = conv(c_in, c_out, 3, 2**0.5)
        self.conv2 = conv(c_out, c_out, 3, 2**0.5)
        self.shortcut = conv(c_in, c_out, 1)
        self.enlarge = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)

    def forward(self, x):
        h = self.conv1(self.enlarge(F.relu(self.first(x))))
        h = self.conv2(F.relu(self.second(h)))
        return h + self.enlarge(self.shortcut(x))  # in this order cheaper, and the same


class Down(nn.Module):
    """Mimicry's residual block of d, spectral, or of E, with BN instead.

    (B, c_in, S, S) -> (B, c_out, S/2, S/2); a network's first block does not begin with a ReLU.
    """

    def __init__(self, c_in, c_out, spectral, first=False):
        super().__init__()
        norm = nn.Identity if spectral else nn.BatchNorm2d
        c = c_out if first else c_in
        before = [] if first else [norm(c_in), nn.ReLU()]
        self.residual = nn.Sequential(
            *before, conv(c_in, c, 3, 2**0.5, spectral), norm(c), nn.ReLU(),
            conv(c, c_out, 3, 2**0.5, spectral), nn.AvgPool2d(2))
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), conv(c_in, c_out, 1, spectral=spectral))

    def forward(self, x):
        return self.residual(x) + self.shortcut(x)


class Pool(nn.Module):
    """(B, C, S, S) -> (B, C): ReLU, then the sum over positions (Mimicry's d) or the mean (E)."""

    def __init__(self, total):
        super().__init__()
        self.pool = torch.sum if total else torch.mean

    def forward(self, h):
        return self.pool(F.relu(h), (2, 3))


class Network(nn.Sequential):
    """Layers whose output is float32, whatever precision they compute in."""

    def forward(self, x):
        return super().forward(x).float()


class Critic(Network):
    """d: layers as an encoder's; data -> (B,), the mean over their outputs."""

    def forward(self, x):
        return super().forward(x).mean(1)


def mlp(n_in, hidden, n_out, norm=None, slope=0.0, depth=3):
    """Layers (B, n_in) -> (B, n_out): `depth` linear ones, each with (leaky) ReLU, and a last one.

    norm: "batch", BN before each ReLU; "spectral", of all linear layers but the last.
    """
    layers = []
    for width in [n_in] + [hidden] * (depth - 1):
        layer = nn.Linear(width, hidden)
        layers.append(spectral_norm(layer) if norm == "spectral" else layer)
        if norm == "batch":
            layers.append(nn.BatchNorm1d(hidden))
        layers.append(nn.LeakyReLU(slope))
    return [*layers, nn.Linear(hidden, n_out)]


def judge(dim, hidden, norm=None):
    """D: codes (B, dim) -> logits (B,); norm: as of `mlp`."""
    return Network(*mlp(dim, hidden, 1, norm, slope=0.2), nn.Flatten(0))


# encoder_*: the layers of E (with BN) or of d (spectral), data -> (B, n_out).
# decoder_*: those of G, codes (B, dim) -> data.

def encoder_64(channels, n_out, width, spectral):
    """Images (B, C, 64, 64): Mimicry's SNGAN-64 discriminator."""
    last = xavier(nn.Linear(16 * width, n_out))
    blocks = [Down(channels, width, spectral, first=True)]  # 64 -> 32
    for c in (width, 2 * width, 4 * width, 8 * width):  # 32 -> 16 -> 8 -> 4 -> 2
        blocks.append(Down(c, 2 * c, spectral))
    return [*blocks, Pool(total=spectral), last]

def decoder_64(latent, channels, width):
    """Images (B, C, 64, 64) in [-1, 1]: Mimicry's SNGAN-64 generator."""
    layers = [xavier(nn.Linear(latent, 256 * width)), nn.Unflatten(1, (16 * width, 4, 4))]
    for c in (16 * width, 8 * width, 4 * width, 2 * width):  # 4 -> 8 -> 16 -> 32 -> 64
        layers.append(Up(c, c // 2))
    return [*layers, nn.BatchNorm2d(width), nn.ReLU(), conv(width, channels, 3), nn.Tanh()]

def encoder_32(channels, n_out, width, spectral):
    """Images (B, C, 32, 32), ours."""
    layers = []
    for c_in, c in ((channels, width), (width, 2 * width), (2 * width, 4 * width)):  # 32 -> 4
        layers.append(conv(c_in, c, 4, 2**0.5, spectral, stride=2, bias=spectral))
        if not spectral:
            layers.append(nn.BatchNorm2d(c))
        layers.append(nn.LeakyReLU(0.2))
    return [*layers, nn.Flatten(), nn.Linear(64 * width, n_out)]

def decoder_32(latent, channels, width):
    """Images (B, C, 32, 32) in [-1, 1], ours."""
    layers = [nn.Linear(latent, 64 * width, bias=False), nn.Unflatten(1, (4 * width, 4, 4))]
    for c, c_out in ((4 * width, 2 * width), (2 * width, width), (width, channels)):  # 4 -> 32
        layers += [nn.BatchNorm2d(c), nn.ReLU(), nn.ConvTranspose2d(c, c_out, 4, 2, 1)]
    return [*layers, nn.Tanh()]

def encoder_points(channels, n_out, width, spectral):
    """Points (B, C), ours: no norm in any of E, G and d."""
    return mlp(channels, width, n_out, slope=0.2 if spectral else 0.0)

def decoder_points(latent, channels, width):
    """Points (B, C), unbounded, ours."""
    return mlp(latent, width, channels)

def encoder_roll(channels, n_out, width, spectral):
    """Points (B, 3), author code; it has no d, so d is that of other points."""
    if spectral:
        return encoder_points(channels, n_out, width, spectral)
    return mlp(channels, width, n_out, "batch", depth=1)

def decoder_roll(latent, channels, width):
    """Points (B, 3) in [-1, 1], author code."""
    return [*mlp(latent, width, channels, "batch", depth=1), nn.Tanh()]

# by `networks` of the settings
ENCODERS = {64: encoder_64, 32: encoder_32, "points": encoder_points, "swissroll3d": encoder_roll}
DECODERS = {64: decoder_64, 32: decoder_32, "points": decoder_points, "swissroll3d": decoder_roll}


# ---- Losses, to be minimised: scalars, means over the batch where nothing else is said -----------

def interpolate(code, mu):
    """mu E(x_1) + (1 - mu) E(x_2) below Eq. (9), x_1 the batch reversed (D2).

    code (B, dim), mu (B,) -> (B, dim).
    """
    mu = mu.reshape(-1, 1)
    return mu * code.flip(0) + (1 - mu) * code

def critic_loss(d_x, d_blend, d_mu, mu, lam):
    """Eq. (9): d's outputs (B,) on x, gamma x + (1 - gamma) x^ and x_mu; mu (B,).

    Their targets are 0, lambda and mu + lambda.
    """
    data_term = d_x.square().mean()
    blend_term = (d_blend - lam).square().mean()
    interpolation_term = (d_mu - mu - lam).square().mean()
    return data_term + blend_term + interpolation_term

def reconstruction_loss(x, x_hat, recon="l2"):
    """Eq. (10), first term: mean over all numbers of the squared, or absolute, error (D1)."""
    return F.mse_loss(x_hat, x) if recon == "l2" else F.l1_loss(x_hat, x)

def autoencoder_loss(x, x_hat, d_mu, d_hat, omega1, omega2, recon="l2"):
    """Eq. (10): d's outputs (B,) on x_mu and on x^."""
    reconstruction = reconstruction_loss(x, x_hat, recon)
    return reconstruction + omega1 * d_mu.square().mean() + omega2 * d_hat.square().mean()

def hinge_loss_d(real, fake):
    """Eq. (12): D's outputs (B,) on codes and on g(z)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()

def hinge_loss_g(fake):
    """Eq. (13): D's outputs (B,) on g(z)."""
    return -fake.mean()

def squared_error(x, x_hat):
    """||x - x^||^2 of each item: (B,)."""
    return (x - x_hat).square().flatten(1).sum(1)

def kl_normal(mu, log_var):
    """KL(N(mu, sigma^2) || N(0, I)) of each item: (B, dim) twice -> (B,)."""
    return (mu.square() + log_var.exp() - log_var - 1).sum(1) / 2

def negative_elbo(x, x_hat, mu, log_var, beta):
    """-Eq. (2) up to a constant, for p(x|z) = N(G(z), I / beta); mu, log_var (B, dim)."""
    return (beta / 2 * squared_error(x, x_hat) + kl_normal(mu, log_var)).mean()

def script_vae_loss(x, x_hat, mu, log_var, weight):
    """LatentMap's authors' VAE: the mean squared error, plus weight times the batch's summed KL."""
    return F.mse_loss(x_hat, x) + weight * kl_normal(mu, log_var).sum()

def gan_loss_d(real, fake):
    """-log sigmoid(real) - log(1 - sigmoid(fake)) of logits (B,): AAE's and ALAE's D."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()

def gan_loss_g(fake):
    """-log sigmoid(fake), which does not saturate: AAE's E, ALAE's F and G."""
    return F.softplus(-fake).mean()

def introvae_loss_e(kl_real, kl_rec, kl_gen, x, x_rec, margin, alpha, beta):
    """IntroVAE's Eq. (11): the KL of data stays low, that of what G makes goes to the margin.

    The KL of data, reconstructions, samples: (B,) each.
    """
    made = F.relu(margin - kl_rec) + F.relu(margin - kl_gen)
    return (kl_real + alpha * made + beta / 2 * squared_error(x, x_rec)).mean()

def introvae_loss_g(kl_rec, kl_gen, x, x_rec, alpha, beta):
    """IntroVAE's Eq. (12), of the same KLs (B,): G wants E to take what it makes for data."""
    return (alpha * (kl_rec + kl_gen) + beta / 2 * squared_error(x, x_rec)).mean()

def script_introvae_loss_e(kl_real, kl_rec, kl_gen, x, x_rec, margin, alpha):
    """LatentMap's authors' IntroVAE, of the same KLs (B,): their means are held to the margin."""
    made = F.relu(margin - kl_rec.mean()) + F.relu(margin - kl_gen.mean())
    return 5 * F.mse_loss(x_rec, x) + 0.001 * (kl_real.mean() + alpha * made)

def script_introvae_loss_g(kl_rec, kl_gen, x, x_rec, alpha):
    """LatentMap's authors' IntroVAE: G's loss, of the same KLs (B,)."""
    return 5 * F.mse_loss(x_rec, x) + 0.001 * alpha * (kl_rec.mean() + kl_gen.mean())

def kl_fit(code):
    """AGE's Delta: KL(N(m, s^2) || N(0, I)) / dim, m and s^2 being those of codes (B, dim)."""
    mean = code.mean(0)
    var = code.var(0, unbiased=False).clamp_min(1e-8)  # a collapsed coordinate has no log
    return (mean.square() + var - var.log() - 1).mean() / 2

def age_loss_e(real, fake, x, x_hat, mu):
    """AGE: e maximises Delta(e(g(Z))) - Delta(e(X)); negated, plus mu |x - g(e(x))|; (B, dim)."""
    return kl_fit(real) - kl_fit(fake) + mu * (x - x_hat).abs().mean()

def age_loss_g(fake, z, lam):
    """AGE: g minimises Delta(e(g(Z))), plus lam / dim times 1 - cos(z, e(g(z))); (B, dim) each.

    Up to a constant that is the mean of -z e(g(z)) on the unit sphere, as in its authors' code.
    """
    return kl_fit(fake) + lam * (1 - F.cosine_similarity(z, fake)).mean() / z.shape[1]

def r1_penalty(logits, x):
    """ALAE's R1: ||d logits / d x||^2, a mean over items; logits (B,) of x with a gradient."""
    gradient, = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()

def reciprocity_loss(w, w_hat):
    """ALAE: ||F(z) - E(G(F(z)))||^2, a mean over the numbers of codes (B, dim)."""
    return (w - w_hat).square().mean()


# ---- Models --------------------------------------------------------------------------------------


def project(z, radius=None):
    """(n, dim) -> the same directions, on the sphere of that radius, or of sqrt(dim)."""
    return F.normalize(z, dim=1) * (radius or z.shape[1] ** 0.5)


def logged(**losses):
    """What a step returns: its losses by name, without their graphs."""
    return {name: loss.detach() for name, loss in losses.items()}


class Autoencoder(nn.Module):
    """What all systems share: E, G, Adam, and the verbs `sample(n)`, `encode(x)`, `decode(z)`.

    A system adds `step(x)`; its other networks and optimisers; `code(x)` where that is not E(x);
    `to_code(z)` where that is not z; an entry in MODELS and in CLASSES. channels: of x; None: 3, or
    2 of points in the plane.
    """

    map_from = 0  # the last step of the first phase, which only LatentMap has
    outputs = 1  # of E for each number of a code
    rivals = False  # whether E and G have an optimiser each, and none in common
    embeds = False  # whether codes are put on the prior's sphere, if it has one
    embeds_authors = True
    radius = None  # that sphere's: sqrt(dim)
    radius_authors = 1.0

    def __init__(self, config, machine=None, channels=None):
        super().__init__()
        c = config
        self.config = c
        self.machine = machine or Machine()
        self.channels = channels or (2 if c.networks == "points" else 3)
        self.iteration = 0  # steps done
        n_out = self.outputs * c.latent
        encoder = ENCODERS[c.networks](self.channels, n_out, c.width, spectral=False)
        self.E = self.place(Network(*encoder))
        self.G = self.place(Network(*DECODERS[c.networks](c.latent, self.channels, c.width)))
        if self.constant("rivals"):
            self.optimiser_e = self.adam(self.E)
            self.optimiser_g = self.adam(self.G)
        else:
            self.optimiser_eg = self.adam(self.E, self.G)

    def place(self, network):
        return network.to(self.machine.device, memory_format=torch.channels_last)

    def adam(self, *networks):
        parameters = [p for network in networks for p in network.parameters()]
        c = self.config
        return self.machine.adam(parameters, c.lr, (c.beta1, c.beta2))

    def constant(self, name):
        """The first there is of NAME_authors (with --authors), NAME_DATASET, NAME_KIND, NAME."""
        c = self.config
        endings = [f"_{c.dataset}", f"_{c.kind}", ""]
        if c.authors:
            endings.insert(0, "_authors")
        return next(getattr(self, name + end) for end in endings if hasattr(self, name + end))

    def begin(self, x):
        """Begins a step: counts it, and gives images the networks' memory format."""
        self.iteration += 1
        return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x

    def prior(self, n, seed=None):
        """z (n, dim): N(0, I), or uniform on the sphere (D4); with a seed the same at each call."""
        if seed is None:
            z = torch.randn(n, self.config.latent, device=self.machine.device)
        else:
            z = metrics.fixed_noise(n, self.config.latent, seed).to(self.machine.device)
        return project(z, self.constant("radius")) if self.config.prior == "sphere" else z

    def to_code(self, z):
        return z

    def embed(self, code):
        """Codes (n, dim), put on the sphere if the prior is there and the system `embeds`."""
        on_sphere = self.config.prior == "sphere" and self.constant("embeds")
        return project(code, self.constant("radius")) if on_sphere else code

    def code(self, x):
        return self.embed(self.E(x))

    def infer(self, function, x):
        with self.machine.inference(self):
            return function(x.to(self.machine.device)).float()

    def encode(self, x):
        """Data (n, ...) -> codes (n, dim), as `decode` takes them; a VAE's are posterior means."""
        return self.infer(self.code, x)

    def latents(self, x):
        """Data (n, ...) -> codes (n, dim), as G meets them in training; a VAE's are draws."""
        return self.encode(x)

    def decode(self, z):
        """Codes (n, dim) -> images (n, C, S, S) in [-1, 1], or points (n, C)."""
        return self.infer(self.G, z)

    def reconstruct(self, x):
        return self.decode(self.encode(x))

    def generated_codes(self, z):
        """Draws z (n, dim) of the prior -> codes (n, dim) that samples are decoded from."""
        return self.infer(self.to_code, z)

    def sample(self, n):
        """n images (n, C, S, S) in [-1, 1], or points (n, C)."""
        return self.decode(self.generated_codes(self.prior(n)))


class LatentMap(Autoencoder):
    """The paper's model (Fig. 2); its ablations have omega1 = omega2 = 0, one no BN (Fig. 6).

    map_from: the last step that trains the autoencoder; later ones train the map. `build` sets it
    by the length of the run; without one, `model.map_from = model.iteration` begins the map.
    It logs critic, Eq. (9); autoencoder, Eq. (10), and reconstruction, the first term of that;
    map_d, Eq. (12); map_g, Eq. (13).
    """

    def __init__(self, config, machine=None, channels=None):
        super().__init__(config, machine, channels)
        c = config
        self.map_from = 0 if c.joint else 2**62
        self.regularised = c.omega1 > 0 or c.omega2 > 0
        if self.regularised:  # else no loss reads d
            body = ENCODERS[c.networks](self.channels, c.latent, c.width, spectral=True)
            self.d = self.place(Critic(*body))
            self.optimiser_critic = self.adam(self.d)
        normalise = nn.BatchNorm1d(c.latent, affine=False) if c.normalise else nn.Identity()
        self.normalise = self.place(normalise)  # Eq. (11), D3
        g = mlp(c.latent, c.map_width, c.latent, "batch")
        if c.normalise:  # what g is to match has mean 0 and variance 1
            g.append(nn.BatchNorm1d(c.latent, affine=False))
        self.g = self.place(Network(*g))
        self.D = self.place(judge(c.latent, c.map_width, "spectral"))
        self.optimiser_map_d = self.adam(self.D)
        self.optimiser_map_g = self.adam(self.g)

    def get_extra_state(self):
        return torch.tensor(self.map_from)  # so a resumed run keeps its boundary

    def set_extra_state(self, map_from):
        self.map_from = int(map_from)

    def code(self, x):
        return self.normalise(self.E(x))  # Eq. (11): x -> z -> BN(z) = z^

    def to_code(self, z):
        return self.g(z)

    def step(self, x):
        """One iteration on data x, in one of the two phases. Returns its losses as scalars."""
        x = self.begin(x)
        if self.config.joint:
            losses, code = self.train_autoencoder(x)
            return losses | self.train_map(code)
        if self.iteration <= self.map_from:
            return self.train_autoencoder(x)[0]
        return self.train_map(self.encode(x))

    def interpolations(self, code):
        """mu (B,), and x_mu, the decoding of each item's code mixed with its partner's."""
        mu = torch.rand(len(code), device=code.device) / 2  # U[0, .5]
        return mu, self.machine.without_running_stats(self.G, interpolate(code, mu))

    def train_autoencoder(self, x):
        """The first phase, lines 1 to 3, on data x. Returns its losses, and codes (B, dim)."""
        c = self.config
        losses = {}
        with self.machine.autocast():
            code = self.code(x)  # line 1
            x_hat = self.G(code)  # once: E and G rest while d moves
        for _ in range(c.critic_steps if self.regularised else 0):
            with self.machine.autocast():
                with torch.no_grad():
                    mu, x_mu = self.interpolations(code)
                    blend = c.gamma * x + (1 - c.gamma) * x_hat
                d_x, d_blend, d_mu = self.d(torch.cat([x, blend, x_mu])).chunk(3)  # d has no BN
            losses["critic"] = critic_loss(d_x, d_blend, d_mu, mu, c.lam)
            self.machine.descend(self.optimiser_critic, losses["critic"])  # line 2
        d_mu = d_hat = torch.zeros_like(code[:, 0])
        if self.regularised:
            with self.machine.autocast():
                _, x_mu = self.interpolations(code)
                d_mu, d_hat = self.d(torch.cat([x_mu, x_hat])).chunk(2)
        loss = autoencoder_loss(x, x_hat, d_mu, d_hat, c.omega1, c.omega2, c.recon)
        self.machine.descend(self.optimiser_eg, loss)  # line 3
        reconstruction = reconstruction_loss(x, x_hat, c.recon)
        return logged(**losses, autoencoder=loss, reconstruction=reconstruction), code.detach()

    def train_map(self, code):
        """The second phase, lines 4 and 5, on codes (B, dim). Returns its losses."""
        for _ in range(self.config.map_d_steps):
            with self.machine.autocast():
                with torch.no_grad():
                    fake = self.g(self.prior(len(code)))
                real, fake = self.D(torch.cat([code, fake])).chunk(2)
            loss_d = hinge_loss_d(real, fake)
            self.machine.descend(self.optimiser_map_d, loss_d)  # line 4
        with self.machine.autocast():
            fake = self.D(self.g(self.prior(len(code))))
        loss_g = hinge_loss_g(fake)
        self.machine.descend(self.optimiser_map_g, loss_g)  # line 5
        return logged(map_d=loss_d, map_g=loss_g)


class VAE(Autoencoder):
    """E gives mean and log variance of q(z|x), Eq. (3). It logs negative_elbo, kl, reconstruction.

    beta: p(x|z) has the variance 1 / beta; 2 makes its term the plain sum of squares (ours).
    kl_weight: of LatentMap's authors' loss, logged as negative_elbo with --authors. For 3 x 64 x 64
    numbers and a batch of 64 that is a multiple of ours at beta = .08.
    """

    outputs = 2
    beta = 2.0
    beta_points = 1000.0
    kl_weight = 3.2e-5

    def posterior(self, x, made=False):
        """mu, log sigma^2 of Eq. (3), (B, dim) each. made: x is G's, so E's statistics rest."""
        out = self.machine.without_running_stats(self.E, x) if made else self.E(x)
        mu, log_var = out.chunk(2, 1)
        return mu, log_var.clamp(-15, 10)  # its exponential stays a number

    def draw(self, mu, log_var):
        return self.embed(mu + (log_var / 2).exp() * torch.randn_like(mu))

    def code(self, x):
        return self.embed(self.posterior(x)[0])

    def reconstruct(self, x):
        """Through the mean of q(z|x); on the sphere, with --authors, through a draw, as in the
        script. There the mean alone would be stretched to a code that G has never met."""
        return self.decode(self.latents(x) if self.config.prior == "sphere" else self.encode(x))

    def latents(self, x):
        return self.infer(lambda x: self.draw(*self.posterior(x)), x)

    def step(self, x):
        """One iteration on data x. Returns its losses as scalars."""
        x = self.begin(x)
        with self.machine.autocast():
            mu, log_var = self.posterior(x)
            x_hat = self.G(self.draw(mu, log_var))
        if self.config.authors:
            loss = script_vae_loss(x, x_hat, mu, log_var, self.kl_weight)
        else:
            loss = negative_elbo(x, x_hat, mu, log_var, self.constant("beta"))
        self.machine.descend(self.optimiser_eg, loss)
        return logged(negative_elbo=loss, kl=kl_normal(mu, log_var).mean(),
                      reconstruction=reconstruction_loss(x, x_hat))


class AAE(Autoencoder):
    """AAE, Eq. (5) at alpha = lambda = 1: a D matches codes to the prior. Order: E and G; D; E.

    E's second update is by the Adam of its first with --authors, else by one of its own. It logs
    reconstruction (D1); discriminator, D's loss; encoder, E's loss against D.
    """

    rivals_authors = True
    norm = None  # of D
    norm_authors = "spectral"
    steps_of_d = 1
    steps_of_d_authors = 5  # on one batch, as LatentMap's (D2)
    weight = 1.0  # of E's loss against D
    weight_points = 0.3  # ours (D7)
    weight_authors = 0.1

    def __init__(self, config, machine=None, channels=None):
        super().__init__(config, machine, channels)
        c = config
        self.D = self.place(judge(c.latent, c.map_width, self.constant("norm")))
        self.optimiser_d = self.adam(self.D)
        if not c.authors:
            self.optimiser_e = self.adam(self.E)

    def step(self, x):
        """One iteration on data x. Returns its losses as scalars."""
        x = self.begin(x)
        authors = self.config.authors
        with self.machine.autocast():
            x_hat = self.G(self.code(x))
        reconstruction = reconstruction_loss(x, x_hat, self.config.recon)
        if authors:
            both = (self.optimiser_e, reconstruction), (self.optimiser_g, reconstruction)
            self.machine.descend_together(*both)
        else:
            self.machine.descend(self.optimiser_eg, reconstruction)
        with self.machine.autocast():
            code = self.code(x)
        for _ in range(self.constant("steps_of_d")):
            with self.machine.autocast():
                real, fake = self.D(torch.cat([self.prior(len(x)), code.detach()])).chunk(2)
            loss_d = hinge_loss_d(real, fake) if authors else gan_loss_d(real, fake)
            self.machine.descend(self.optimiser_d, loss_d)
        with self.machine.autocast():
            fake = self.D(code)
        against_d = hinge_loss_g(fake) if authors else gan_loss_g(fake)
        loss_e = self.constant("weight") * against_d
        self.machine.descend(self.optimiser_e, loss_e)
        return logged(reconstruction=reconstruction, discriminator=loss_d, encoder=loss_e)


class WAE(Autoencoder):
    """MMD matches the codes to the prior, Eq. (6): .05 ||x - x^||^2 + lam MMD (its authors').

    Theirs for MNIST, 10, goes with pixels in [0, 1], where the squared error is a quarter of that
    here. It logs reconstruction (a mean) and mmd.
    """

    lam = 100.0  # CelebA
    lam_digits = 10.0
    lam_points = 0.5  # ours

    def step(self, x):
        """One iteration on data x. Returns its losses as scalars."""
        x = self.begin(x)
        with self.machine.autocast():
            code = self.E(x)
            x_hat = self.G(code)
        penalty = metrics.mmd_imq(code, self.prior(len(x)))
        loss = 0.05 * squared_error(x, x_hat).mean() + self.constant("lam") * penalty
        self.machine.descend(self.optimiser_eg, loss)
        return logged(reconstruction=reconstruction_loss(x, x_hat), mmd=penalty)


class IntroVAE(VAE):
    """A VAE whose E tells data from what G makes, by the KL of their codes, item by item (ours).

    One alpha, its authors' for E (G has twice that there); margin and beta are ours. It logs
    encoder and decoder, IntroVAE's Eqs. (11), (12); kl_real, kl_gen, of data and samples;
    reconstruction.
    """

    rivals = True
    alpha = 0.25
    margin = 25.0
    margin_points = 5.0
    margin_authors = 100.0

    def step(self, x):
        """One iteration on data x. Returns its losses as scalars."""
        x = self.begin(x)
        authors = self.config.authors
        margin = self.constant("margin")
        beta = self.constant("beta")
        with self.machine.autocast():
            mu, log_var = self.posterior(x)
            z = self.draw(mu, log_var)
            x_rec = self.G(z)
            with torch.no_grad():
                z_prior = self.prior(len(x))
                x_gen = self.machine.without_running_stats(self.G, z_prior)
            kl_rec = kl_normal(*self.posterior(x_rec.detach(), made=True))  # IntroVAE's ng()
            kl_gen = kl_normal(*self.posterior(x_gen, made=True))
        kl_real = kl_normal(mu, log_var)
        if authors:
            loss_e = script_introvae_loss_e(kl_real, kl_rec, kl_gen, x, x_rec, margin, self.alpha)
        else:
            loss_e = introvae_loss_e(kl_real, kl_rec, kl_gen, x, x_rec, margin, self.alpha, beta)
        self.machine.descend(self.optimiser_e, loss_e)
        with self.machine.autocast():  # the same codes, for the E just moved
            x_rec = self.machine.without_running_stats(self.G, z.detach())
            x_gen = self.G(z_prior)
            kl_rec = kl_normal(*self.posterior(x_rec, made=True))
            kl_gen = kl_normal(*self.posterior(x_gen, made=True))
        if authors:
            loss_g = script_introvae_loss_g(kl_rec, kl_gen, x, x_rec, self.alpha)
        else:
            loss_g = introvae_loss_g(kl_rec, kl_gen, x, x_rec, self.alpha, beta)
        self.machine.descend(self.optimiser_g, loss_g)
        return logged(encoder=loss_e, decoder=loss_g, kl_real=kl_real.mean(), kl_gen=kl_gen.mean(),
                      reconstruction=reconstruction_loss(x, x_rec))


class AGE(Autoencoder):
    """A game of G and E alone: E spreads the codes of samples off the prior, G brings them back.

    Codes and prior are on the sphere by default. Its authors' code takes the variance for the
    deviation, and so gets about twice the KL: their weights 10 and 1000 are halved. It logs encoder
    and decoder, the losses of E and G; kl_real, kl_gen, Delta of data's and samples' codes;
    reconstruction.
    """

    rivals = True
    embeds = True
    radius_authors = None
    mu = 5.0  # weight of |x - x^|, for E
    lam = 500.0  # weight of 1 - cos(z, E(G(z))), for G
    steps_of_g = 3  # CelebA
    steps_of_g_cifar10 = 2

    def code(self, x, made=False):
        return self.embed(self.machine.without_running_stats(self.E, x) if made else self.E(x))

    def step(self, x):
        """One iteration on data x. Returns its losses as scalars."""
        x = self.begin(x)
        with self.machine.autocast():
            real = self.code(x)
            x_hat = self.machine.without_running_stats(self.G, real)
            with torch.no_grad():
                x_gen = self.machine.without_running_stats(self.G, self.prior(len(x)))
            fake = self.code(x_gen, made=True)
        loss_e = age_loss_e(real, fake, x, x_hat, self.mu)
        self.machine.descend(self.optimiser_e, loss_e)
        for _ in range(self.constant("steps_of_g")):
            with self.machine.autocast():
                z = self.prior(len(x))
                fake = self.code(self.G(z), made=True)  # G's statistics are those of draws (D9)
            loss_g = age_loss_g(fake, z, self.lam)
            self.machine.descend(self.optimiser_g, loss_g)
        return logged(encoder=loss_e, decoder=loss_g, kl_real=kl_fit(real), kl_gen=kl_fit(fake),
                      reconstruction=reconstruction_loss(x, x_hat))


class ALAE(Autoencoder):
    """F: z -> w, G: w -> x, E: x -> w, D: w -> logit: a GAN of G(F(z)) against D(E(x)).

    Its third update holds F still, as LatentMap's authors' does, and moves E and G by an Adam of
    its own (ours). With --authors it moves F too, by the Adams of the game; D is linear; `encode`,
    `decode` and `sample` use running means of the weights. It logs discriminator, the loss of E
    and D without r1; r1, the penalty; generator, the loss of F and G; reciprocity.
    """

    gamma = 10.0  # of R1 (its authors' code)

    def __init__(self, config, machine=None, channels=None):
        super().__init__(config, machine, channels)
        c = config
        self.F = self.place(Network(*mlp(c.latent, c.map_width, c.latent, "batch")))
        self.D = self.place(judge(c.latent, c.map_width))
        self.shown = {"E": self.E, "F": self.F, "G": self.G}
        if c.authors:
            d = [nn.Linear(c.latent, c.latent), nn.Linear(c.latent, c.latent)]
            self.D = self.place(Network(*d, nn.Linear(c.latent, 1), nn.Flatten(0)))
            self.shown = copy.deepcopy(nn.ModuleDict(self.shown)).requires_grad_(False)
            del self.optimiser_eg  # the third update is by the other two
        self.optimiser_ed = self.adam(self.E, self.D)
        self.optimiser_fg = self.adam(self.F, self.G)

    def code(self, x):
        return self.shown["E"](x)

    def to_code(self, z):
        return self.shown["F"](z)

    def decode(self, z):
        return self.infer(self.shown["G"], z)

    def average(self):
        """Running means of weights and statistics, with a half-life of 10,000 items (of a rank)."""
        share = 1 - 0.5 ** (self.config.batch / 10_000)
        for name, mean in self.shown.items():
            now = getattr(self, name).state_dict()
            for key, value in mean.state_dict().items():
                if value.is_floating_point():
                    value.lerp_(now[key], share)

    def step(self, x):
        """One iteration on data x. Returns its losses as scalars."""
        x = self.begin(x)
        authors = self.config.authors
        with self.machine.autocast():
            with torch.no_grad():
                made = self.G(self.F(self.prior(len(x))))
            x = x.detach().requires_grad_()
            real = self.D(self.E(x))
            fake = self.D(self.machine.without_running_stats(self.E, made))
        r1 = r1_penalty(real, x)
        loss_d = gan_loss_d(real, fake)
        self.machine.descend(self.optimiser_ed, loss_d + self.gamma / 2 * r1)
        with self.machine.autocast():
            made = self.G(self.F(self.prior(len(x))))
            fake = self.D(self.machine.without_running_stats(self.E, made))
        loss_g = gan_loss_g(fake)
        self.machine.descend(self.optimiser_fg, loss_g)
        with self.machine.autocast():
            with torch.set_grad_enabled(authors):
                w = self.F(self.prior(len(x)))
            w_hat = self.machine.without_running_stats(self.E, self.G(w))
        reciprocity = reciprocity_loss(w.detach(), w_hat)
        if authors:
            game = (self.optimiser_ed, reciprocity), (self.optimiser_fg, reciprocity)
            self.machine.descend_together(*game)
            self.average()
        else:
            self.machine.descend(self.optimiser_eg, reciprocity)
        return logged(discriminator=loss_d, r1=r1, generator=loss_g, reciprocity=reciprocity)


CLASSES = dict.fromkeys(LATENTMAPS, LatentMap)
CLASSES |= dict(vae=VAE, aae=AAE, wae=WAE, introvae=IntroVAE, age=AGE, alae=ALAE)


def build(config, machine=None, channels=None, steps=None, steps_per_epoch=None):
    """The model that `config.model` names; LatentMap's first phase has ae_share of the `steps`.

    Without `steps` that phase never ends. channels: as of Autoencoder. steps_per_epoch is here as
    in the other files, and not used: no learning rate decays in this one. To add a system: see
    Autoencoder.
    """
    model = CLASSES[config.model](config, machine, channels)
    if steps and isinstance(model, LatentMap) and not config.joint:
        model.map_from = max(1, min(round(config.ae_share * steps), steps - 1))
    return model


# ---- Geometry: what a code keeps of the data (the paper shows it; these are numbers for it) ------

def average_ranks(v):
    """(n,) -> ranks 0 .. n - 1, float64; equal values share the mean of theirs."""
    _, group, count = torch.unique(v, return_inverse=True, return_counts=True)
    last = count.cumsum(0).double() - 1
    return (last - (count.double() - 1) / 2)[group]

def spearman(a, b):
    """Rank correlation of two vectors (n,); 0 where one of them is constant."""
    ranks = torch.stack([average_ranks(a), average_ranks(b)])
    return torch.corrcoef(ranks)[0, 1].nan_to_num(0).item()

def trustworthiness(x, code, k=12):
    """Venna and Kaski 2001: 1 if each item's k nearest by code are its k nearest by data.

    Each other one among them costs as its rank by data. x (n, ...), code (n, dim); ValueError
    unless 0 < k < n / 2.
    """
    n = len(x)
    if not 0 < k < n / 2:
        raise ValueError(f"{k} neighbours of {n} items: fewer than half are needed")
    orders = []
    for points in (x.flatten(1).double(), code.flatten(1).double()):
        distances = torch.cdist(points, points).fill_diagonal_(-1)  # itself first, even if doubled
        orders.append(distances.argsort(1))
    rank = orders[0].argsort(1)  # (n, n): j is the rank[i, j]-th nearest of i
    nearest = orders[1][:, 1:k + 1]
    excess = (rank.gather(1, nearest) - k).clamp_min(0).sum().item()
    return 1 - 2 * excess / (n * k * (2 * n - 3 * k - 1))

def nearest_distances(a, b):
    """Of each point of a (n, C) the distance to the nearest of b (m, C): (n,)."""
    exact = "donot_use_mm_for_euclid_dist"  # by products of matrices 0 would become some 1e-4
    return torch.cat([torch.cdist(part, b, compute_mode=exact).amin(1) for part in a.split(1000)])

# data.py's two Swiss rolls on a regular grid, t from 1.5 to 4.5 pi. `unit`, its ROLL_UNIT, divides
# all coordinates. The depth of the sheet is the second of three.

def spiral(n=5000, unit=4.5 * math.pi):
    """n points (n, 2) of the curve, equally spaced in t."""
    t = torch.linspace(1.5 * math.pi, 4.5 * math.pi, n)
    return torch.stack([t * t.cos(), t * t.sin()], 1) / unit

def sheet(unit, along=250, across=40):
    """Points (along * across, 3) of the sheet, equally spaced in t and in depth."""
    curve = spiral(along, unit).repeat_interleave(across, 0)
    depth = torch.linspace(-10.5, 10.5, across).repeat(along) / unit
    return torch.stack([curve[:, 0], depth, curve[:, 1]], 1)

def roll_distances(x, unit):
    """Of points (n, 2) the distance to the curve, of points (n, 3) to the sheet: (n,)."""
    beyond = (x[:, 1:-1].abs() - 10.5 / unit).clamp_min(0).sum(1)  # the sheet's edges
    return torch.hypot(nearest_distances(x[:, [0, -1]], spiral(unit=unit)), beyond)

def unrolled(x, unit):
    """Points of a roll (n, C) -> (n, C - 1), flat: ds^2 = (1 + t^2) dt^2 along the curve; depth."""
    t = x[:, [0, -1]].double().norm(dim=1, keepdim=True) * unit
    arc = (t * (1 + t * t).sqrt() + t.asinh()) / 2 / unit
    return torch.cat([arc, x[:, 1:-1]], 1)

def geometry(x, code, unit=None):
    """rank_corr: rank correlation of the distances of data (n, ...) and of codes (n, dim); trust:
    trustworthiness; of a Swiss roll also rank_corr_arc, by the distances along it."""
    between = torch.pdist(code.flatten(1).double())
    rank_corr = spearman(torch.pdist(x.flatten(1).double()), between)
    result = {"rank_corr": rank_corr, "trust": trustworthiness(x, code)}
    if unit:
        result["rank_corr_arc"] = spearman(torch.pdist(unrolled(x, unit)), between)
    return result


# ---- Figures -------------------------------------------------------------------------------------


def draw_codes(path, code, made, z, labels, classes):
    """Fig. 5: codes (n, dim) by label, generated (m, dim), z of a plane prior.

    On MNIST it is Fig. 3, which shows the zeros alone, red here.
    Of more than two dimensions, the codes' first two principal components are shown. Draws nothing
    where codes have one dimension, or are not finite, which the metrics report.
    """
    code = code.cpu().double()
    made = made.cpu().double()
    if code.shape[1] < 2 or not code.isfinite().all():
        return
    panels = {}
    if z.shape[1] == 2:
        panels["prior"] = metrics.scatter(z, None, 1, reach=4)
    if code.shape[1] > 2:
        axes = torch.linalg.eigh(torch.cov(code.T)).eigenvectors[:, -2:].flip(1)  # (dim, 2)
        mean = code.mean(0)
        code = (code - mean) @ axes
        made = (made - mean) @ axes
    reach = 1.2 * max(code.abs().max().item(), 1e-3)
    panels["codes of the data"] = metrics.scatter(code, labels, classes, reach)
    panels["codes made from the prior"] = metrics.scatter(made, None, 1, reach)
    metrics.save_panels(path, panels)


def figures_of_points(model, folder, step, x, labels, classes):
    """Figs. 4 and 5, x (n, C): data, reconstructions, samples; prior, codes, generated codes."""
    z = model.prior(len(x), seed=0)
    code = model.encode(x)
    made = model.generated_codes(z)
    points = model.decode(made).cpu()
    reach = 1.2 * data.oblique(x).abs().max().item()
    nearest = torch.cat([torch.cdist(part, x).argmin(1) for part in points.split(1000)])
    panels = {"data": metrics.scatter(x, labels, classes, reach),
              "reconstructions": metrics.scatter(model.decode(code), labels, classes, reach),
              "samples": metrics.scatter(points, labels[nearest], classes, reach)}
    metrics.save_picture(folder / f"samples/{step:06d}.png", panels["samples"])
    metrics.save_picture(folder / f"recon/{step:06d}.png", panels["reconstructions"])
    metrics.save_panels(folder / f"figures/panels-{step:06d}.png", panels)
    draw_codes(folder / f"figures/codes-{step:06d}.png", code, made, z, labels, classes)


def figures_of_images(model, folder, step, x, labels, classes):
    """Figs. 6, 7 and 8, and the codes, of test images x (n, C, S, S) with labels (n,) or None."""
    code = torch.cat([model.encode(part) for part in x.split(250)])
    z = model.prior(len(x), seed=0)
    made = torch.cat([model.generated_codes(part) for part in z.split(250)])
    samples = model.decode(model.generated_codes(model.prior(100, seed=0)))
    metrics.save_grid(folder / f"samples/{step:06d}.png", samples)  # Fig. 7
    if not (folder / "figures/real.png").exists():
        metrics.save_grid(folder / "figures/real.png", x[:100])
    pairs = torch.stack([x[:50].cpu(), model.reconstruct(x[:50]).cpu()], dim=1).flatten(0, 1)
    metrics.save_grid(folder / f"recon/{step:06d}.png", pairs)  # Fig. 8: x, x^, x, x^, ...
    if len(code) >= 20:  # Fig. 6: straight lines between the codes of two images
        ramp = torch.linspace(0, 1, 10, device=code.device)[:, None]
        lines = (1 - ramp) * code[:10, None] + ramp * code[10:20, None]  # (10, 10, dim)
        decoded = model.decode(lines.flatten(0, 1))
        metrics.save_grid(folder / f"figures/interpolations-{step:06d}.png", decoded)
    draw_codes(folder / f"figures/codes-{step:06d}.png", code, made, z, labels, classes)


# ==================================================================================================
# The paper's tables and figures. A column: heading, data set, metric. A row: the flags of a system,
# then what the paper prints, None where it prints no number.

ROLL_COLUMNS = {"generated: Chamfer": "chamfer", "off the manifold": "gen_dist",
                "coverage": "coverage", "reconstructed: MSE": "mse",
                "rank correlation": "rank_corr", "trustworthiness": "trust",
                "latent Fréchet distance": "latent_fd"}
ABLATION = {"fcd": "fcd", "inception score": "is", "confident": "confident",
            "reconstruction MSE": "mse", "latent Fréchet distance": "latent_fd",
            "rank correlation": "rank_corr"}


def table(title, columns, rows):
    """rows: {name: [model, published numbers]}; some figures print none.

    After each system that has --authors comes a row of that, which repeats no published number.
    """
    none = [None] * len(columns)
    flags = {}
    for name, (model, *published) in rows.items():
        flags[name] = (f"--model {model}", *(published or none))
        if model in AUTHORS:
            flags[f"{name} (--authors)"] = (f"--model {model} --authors", *none)
    return dict(title=title, columns=columns, rows=flags)


PUBLISHED = {  # Table 2: FID, MSE of CIFAR-10, then CelebA (as Table 1, but LatentMap's FID 62)
    "VAE": (189, 0.0626, 80, 0.0383), "AAE": (120, 0.0245, 101, 0.0255),
    "WAE": (173, 0.0607, 115, 0.0626), "IntroVAE": (133, 0.0492, 120, 0.0562),
    "AGE": (271, 0.0608, 116, 0.0889), "LatentMap": (None, None, 63, 0.0165),
}
CIFAR10 = [("FID CIFAR-10", "cifar10", "fid"), ("MSE CIFAR-10", "cifar10", "mse_pm1")]  # D10
CELEBA = [("FID CelebA", "celeba", "fid"), ("MSE CelebA", "celeba", "mse_pm1")]
ON_ROLL = {name: [name.lower()] for name in ("LatentMap", "VAE", "AAE", "ALAE")}
TABLES = {
    "1": table("LatentMap, Table 1: CelebA", CELEBA,
               {name: [name.lower(), *row[2:]] for name, row in PUBLISHED.items()}
               | {"LatentMap": ["latentmap", 62, PUBLISHED["LatentMap"][3]]}) | {"runs": "2"},
    "2": table("LatentMap, Table 2: CIFAR-10 and CelebA", CIFAR10 + CELEBA,
               {name: [name.lower(), *row] for name, row in PUBLISHED.items()}),
    "fig4": table("LatentMap, Figs. 4 and 5: the Swiss roll",
                  [(name, "swissroll", key) for name, key in ROLL_COLUMNS.items()], ON_ROLL),
    "fig4-3d": table("LatentMap, Figs. 4 and 5: the Swiss roll in three dimensions",
                     [(name, "swissroll3d", key) for name, key in ROLL_COLUMNS.items()], ON_ROLL),
    "fig6": table("LatentMap, Fig. 6: ablation on MNIST",
                  [(name, "mnist", key) for name, key in ABLATION.items()],
                  {"without BN": ["latentmap-nobn"], "with BN": ["latentmap-noreg"],
                   "BN and regulariser": ["latentmap"]}),
}


# ---- Evaluation ----------------------------------------------------------------------------------

CURVES = ("mse", "chamfer", "fid", "fcd", "latent_fd")  # drawn by epoch
OF_G = ("chamfer", "gen_dist", "gen_gap", "coverage", "latent_fd")  # of points and codes, by g
NEAR = 0.05  # a ninth of the gap between two turns of the plane roll


def point_metrics(model, test_set, samples):
    """For points what metrics.Evaluator is for images. The manifold: a roll's curve or sheet,
    else the first 5,000 test points.

    gen_dist, rec_dist      mean distance to it, of samples and of reconstructions
    gen_gap                 mean distance from it to the samples
    chamfer                 gen_dist + gen_gap
    coverage, rec_coverage  share of it with a sample, or a reconstruction, within NEAR
    mse                     of the reconstructed test points
    """
    unit = data.ROLL_UNIT.get(test_set.name)
    manifold = test_set.x[:5000]
    what = "the test points"
    if unit:
        flat = test_set.channels == 2
        manifold = spiral(unit=unit) if flat else sheet(unit)
        what = "the roll's curve" if flat else "the roll's sheet"

    def off(x):
        return (roll_distances(x, unit) if unit else nearest_distances(x, manifold)).mean()

    points = model.decode(model.generated_codes(model.prior(samples, seed=1))).cpu()
    x_hat = model.reconstruct(test_set.x).cpu()
    gen_dist = off(points)
    gaps = nearest_distances(manifold, points)
    rec_gaps = nearest_distances(manifold, x_hat)
    return {
        "chamfer": (gen_dist + gaps.mean()).item(),
        "gen_dist": gen_dist.item(),
        "gen_gap": gaps.mean().item(),
        "coverage": (gaps <= NEAR).double().mean().item(),
        "rec_dist": off(x_hat).item(),
        "rec_coverage": (rec_gaps <= NEAR).double().mean().item(),
        "mse": metrics.reconstruction_mse(test_set.x, x_hat),
        "protocol": f"distances between {samples} samples and {len(manifold)} points of {what}, "
                    f"coverage within {NEAR}; mse, rec: {len(x_hat)} {test_set.split} points, in "
                    "the data's units"}


def make_evaluator(config, machine, train_set, test_set):
    """Of points a function model -> metrics; of images a metrics.Evaluator, with its errors."""
    usual = {"points": 5000, "digits": 10_000, "pictures": 50_000}[config.kind]  # CelebA: "50K"
    if config.dataset == "digits":
        usual = 5000  # ours: quick on two cores
    samples = config.samples or usual
    if config.kind == "points":
        return lambda model: point_metrics(model, test_set, samples)
    paper_has_fid = config.dataset in ("cifar10", "celeba")  # Table 2
    weights = metrics.inception_default(config.inception, paper_has_fid, machine.device, samples)
    if not (weights or config.samples):  # ours: "50K" are the FID's
        samples = min(samples, 10_000)
    return metrics.Evaluator(train_set, test_set, config.size, machine.device, config.root,
                             samples, weights, fid_on_train=len(train_set))


def code_metrics(model, x, few=1000):
    """({latent_fd, and `geometry` of the first `few`}, protocol) of data x (n, ...). latent_fd: the
    Frechet distance of n generated codes from x's codes, as G meets them in training."""
    code = torch.cat([model.encode(part).cpu() for part in x.split(250)])
    drawn = torch.cat([model.latents(part).cpu() for part in x.split(250)])
    z = model.prior(len(x), seed=2)
    made = torch.cat([model.generated_codes(part).cpu() for part in z.split(250)])
    result = {"latent_fd": metrics.frechet_distance_features(drawn, made)}
    protocol = f"latent_fd: {len(x)} codes vs {len(x)} generated"
    few = min(few, len(x))
    if few > 24:  # else twelve neighbours are half of all
        unit = data.ROLL_UNIT.get(model.config.dataset)
        result |= geometry(x[:few].cpu(), code[:few], unit)
        protocol += f"; rank_corr, trust (k = 12): {few} items"
    return result, protocol


def evaluate(model, evaluator, folder, step, test, classes):
    """Pictures and metrics of one moment; the training's random numbers go on as they were.

    Returns the metrics of the evaluator and of `code_metrics`, and eval_s, the seconds. While
    LatentMap's g is untrained, phase is "autoencoder" and no metric depends on g (pictures do).
    """
    began = time.time()
    first_phase = step <= model.map_from
    with data.random_state_kept(0):  # evaluations compare models, not draws
        if model.config.kind == "points":
            figures_of_points(model, folder, step, *test, classes)
            result = evaluator(model)
        else:
            figures_of_images(model, folder, step, *test, classes)
            result = evaluator(None if first_phase else model.sample, model.reconstruct)
        of_codes, protocol = code_metrics(model, test[0])
    result["protocol"] += f"; {protocol}"
    result |= of_codes
    if first_phase:
        result = {name: value for name, value in result.items() if name not in OF_G}
        result["phase"] = "autoencoder"
    return result | {"eval_s": round(time.time() - began, 1)}


def score_of(result):
    """What best.pt is chosen by, the less the better: the first measured of chamfer, fid, fcd, kl,
    mse; None in the first phase (D5)."""
    if "phase" in result:
        return None
    return metrics.best_first(result, ("chamfer", *data.SCORES))


# ---- Training ------------------------------------------------------------------------------------


def train(config, machine, folder, checkpoint=None):
    """Trains `config` in `folder`, from `checkpoint` if given. Returns the last evaluation.

    Raises UserError for what cannot be trained, NotFinite for what is not a number.
    """
    # Load, build, restore. The folder comes first: whether it can be written is seen before work.
    run = data.Run(folder, FILE, config, machine, checkpoint)
    train_set, test_set = data.load_pair(config.dataset, config.root, config.size)
    batches = data.Batches(train_set, config.batch, machine.device, config.size, config.seed,
                           run.rank, run.world)
    run.expect(train_set, test_set)
    steps = config.steps or math.ceil(config.epochs * batches.steps_per_epoch)
    if checkpoint and not run.other_data:
        steps = max(steps, checkpoint["step"])
    eval_every = config.eval_every or math.ceil(steps / 12)  # ours: at most twelve
    torch.manual_seed(config.seed)  # all ranks build the same networks
    model = build(config, machine, train_set.channels, steps)
    evaluator = make_evaluator(config, machine, train_set, test_set) if run.main else None
    shown = 5000 if config.kind == "points" else 2000
    test = next(data.ordered(test_set, shown, shown, "cpu", config.size))
    boundary = model.map_from
    start = run.begin(model, batches, steps)
    if run.other_data:  # this is a new run, of a length of its own
        model.map_from = boundary
    if start < steps <= model.map_from and checkpoint:  # a resumed run keeps its own boundary
        raise UserError(f"--steps {steps} ends within the first phase, and g would stay untrained: "
                        f"this run needs more than {model.map_from}")
    if config.compile:
        data.compile_networks(model)
    run.save("last.pt", start)  # resumable from any kill
    result = {}

    # Train: a batch, a step; now and then a line of the log, an evaluation, a checkpoint.
    with run:
        for step in range(start + 1, steps + 1):
            x, _ = next(batches)
            # LatentMap trains E, G and d up to step map_from, and from then on the map: g and D.
            run.add(step, model.step(x))
            leaves = run.interrupted(step)  # Ctrl-C or SIGTERM
            evaluates = step % eval_every == 0 or step == steps
            saves = evaluates or leaves or step % data.SAVE_EVERY == 0
            if evaluates or step % data.LOG_EVERY == 0:
                run.log_losses(step)
            run.status(step)
            if saves:
                run.check_finite()
            if evaluates:
                if run.main:
                    result = evaluate(model, evaluator, run.folder, step, test, train_set.classes)
                    run.report(step, result)
                    metrics.draw_log_curves(run.folder, CURVES, config.dataset)
                if run.is_best(score_of(result)):
                    run.save("best.pt", step)
            if saves:
                run.save("last.pt", step)
            if leaves:
                run.leave(step)
    return result


@data.random_state_kept()
def main(argv=None):
    """The command line; returns the exit code. Raises UserError for what the user can mend."""
    if data.asks_for_table(argv):
        return data.run_table(argv, FILE, TABLES, main)
    args, config, checkpoint = data.parse(argv, FILE, __doc__, preset, tables=TABLES)
    machine = Machine(*data.hardware(args.device, config.amp))
    dataset = os.path.basename(config.dataset)
    folder = data.run_folder(args, f"runs/{FILE}-{config.model}-{dataset}-s{config.seed}")
    if args.bench:  # of LatentMap the first phase, the dearer one
        model = build(config, machine, data.channels_of(config.dataset))
        x = model.sample(config.batch)
        print(json.dumps(metrics.benchmark(model, x, args.bench, config.compile)))
    elif args.sample:
        model = build(config, machine, checkpoint["channels"])
        data.restore(checkpoint, model)
        if 0 < model.iteration <= model.map_from:
            raise UserError(f"--sample: step {model.iteration} is in the first phase, and g "
                            f"untrained; train beyond step {model.map_from}")
        metrics.draw_samples(model, folder, args.sample, config.seed)
    else:
        train(config, machine, folder, checkpoint)
        print(f"run: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(data.run_command(main))
