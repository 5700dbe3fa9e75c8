"""LatentMap: a generative model without prior distribution matching, its ablations and baselines, in one file.

    "Generative Model without Prior Distribution Matching." Cong Geng, Jia Wang, Li Chen, Zhiyong Gao.
    Sections, equations, tables and figures are this paper's.

The idea. A variational autoencoder asks two things of one code: that it tell the data apart, and that it be distributed like
a prior. The second destroys what the first needs, the geometry of the data (Propositions 1 and 2). LatentMap asks only the
first. An autoencoder is trained for reconstruction, with a critic d that learns how unreal its outputs are: 0 for data, lam
for a blend with the reconstruction, mu + lam for the decoding of a blend of two codes, Eq. (9). E and G want d to say 0 for
both, Eq. (10), so that the straight line between two codes decodes to data. The code is batch-normalised, Eq. (11), which
keeps it near a sphere of radius sqrt(dim) without bending it. Afterwards an MLP g learns to turn Gaussian noise into codes,
against a discriminator D between vectors: a hinge GAN in the code space, Eqs. (12) and (13). Samples are G(g(z)).

Notation.   paper              here           shape
            x ~ p_r(x)         x              (B, C, S, S) in [-1, 1], or points (B, 2)
            z = E(x)           E(x)           (B, dim)
            z^ = BN(z)         code           (B, dim), mean 0, variance 1 in each coordinate over the batch
            x^ = G(z^)         x_hat          like x
            mu ~ U[0, .5]      mu             (B,), one for each item
            x_mu               x_mu           like x: G(mu z^_1 + (1 - mu) z^_2); z^_1 is the batch reversed
            gamma, lambda      gamma, lam     .2, .2
            omega_1, omega_2   omega1, omega2 1, 1
            d(x)               d(x)           (B,), the mean over an encoder's outputs
            g(z), D(code)      g(z), D(code)  (B, dim), (B,)

Algorithm (one call of `LatentMap.step`; the paper prints none).
    first phase, `ae_share` of the steps       code = BN(E(x)); x^ = G(code)
        d, twice:  down ||d(x)||^2 + ||d(gamma x + (1 - gamma) x^) - lam||^2 + ||d(x_mu) - mu - lam||^2          Eq. (9)
        E, G:      down ||x - x^||^2 + omega1 ||d(x_mu)||^2 + omega2 ||d(x^)||^2                                Eq. (10)
    second phase                               E, BN, G, d rest; code = BN(E(x)) with the running statistics
        D, five times:  down relu(1 - D(code)) + relu(1 + D(g(z)))                                              Eq. (12)
        g:              down -D(g(z))                                                                           Eq. (13)
    --joint (author code): both in every step.

Where this file departs from the paper, or had to choose (D1...):
  D1  Eq. (10)'s ||x - x^||^2 is a mean over all numbers, not a sum: the other terms are of the order of lam^2 = .04, and a
      sum over 12,288 pixels would switch them off. `--recon l1` is the author code's mean absolute difference.
  D2  gamma, lambda, omega1, omega2 are the author code's (paper silent), and so are two steps of d and five of D for one of
      E and G and one of g, Adam at 2e-4 with beta1 = 0, and a batch of 32. beta2 is Adam's own. Which of x_1, x_2 is the
      reversed batch is open: since mu <= .5, x_mu lies nearer to x_2, which here is the item in its own place. The steps of
      d share one batch of x, those of D one batch of codes; mu and g(z) are drawn anew.
  D3  BN of the code has no scale and no shift: the text wants mean 0 and variance 1 (author code: both learnt). After
      training, codes are made with the running statistics. `latentmap-nobn` leaves it out.
  D4  The prior is the paper's Gaussian; `--prior sphere` (author code) is uniform on the sphere, here of radius sqrt(dim).
  D5  Order. The paper trains the autoencoder first, and then the map, on codes that rest; it does not say for how long.
      Here `ae_share` of the steps goes to the autoencoder (ours: .8; for points .6). `--joint` is the author code's order.
      best.pt is chosen among evaluations of the second phase.
  D6  "Mimicry's architectures" for G and d: at 64 pixels its SNGAN-64 generator and discriminator (ResNet, 4 x 4 x 1024 at
      the narrow end, xavier's weights with gain sqrt(2) in residuals, 1 elsewhere). d has spectral norm; E has d's shape with
      BN in its place and a mean in place of the sum over positions. d's last layer is free of the norm, which would leave the
      mean of its outputs too small a range. g and D are MLPs (author code: g of four layers with BN and a last BN, D with
      spectral norm); D's depth and both widths are ours, and D's last layer, too, is free. 32 pixels: a plain convolutional
      pair (ours). Points: MLPs of four layers, E, G and d without any norm (ours).
  D7  The Swiss roll: data.py's plane spiral, 5,000 points, 2-D codes; its steps, rates, weights and batch are ours (paper
      silent). MNIST's epochs (25, CelebA's), CIFAR-10's 32 pixels and CelebA's 128 dimensions (Mimicry's) are ours, too.
  D8  The baselines share E, G, optimiser and batch. VAE: beta / 2 ||x - x^||^2 summed over the item, plus KL: a Gaussian of
      variance 1 / beta (images: 1/2, which makes it the plain sum; points: 1/1000). WAE: .05 times the sum plus `wae_lam` MMD,
      with the inverse multiquadratic kernels of its authors; 10 on MNIST, 100 on CelebA (their paper's; points: .5, ours). AAE:
      reconstruction (D1's mean), D and E's adversarial steps have optimisers of their own, in this order.
  D9  IntroVAE, its Eqs. (11) and (12): one alpha, for E what its authors' code takes (for G that has twice as much), the
      margin m and beta are ours; the hinge is taken item by item. AGE: codes and prior on the sphere of radius sqrt(dim), KL of
      the batch's fitted diagonal Gaussian over dim (theirs takes the variance for the deviation, which is about twice the KL:
      its weights are halved here), L1 between images as a mean, 1 - cos between codes over dim (theirs).
      ALAE: F an MLP like g, D without spectral norm, R1 with gamma = 10, F(z) held still in the reciprocity, which moves E
      and G.
  D10 E's running BN statistics follow data only, G's the codes of data only (ALAE: F(z); AGE: draws of the prior, all its G is
      trained on; IntroVAE: both in turn): blends and samples, which they are also trained on, have other moments, and `encode`
      and `decode` would work with statistics that belong to neither.
  D11 fid is taken against all training images, as in the paper (fcd against 10,000 test images). The authors' script takes
      MSE of pixels in [-1, 1]: what is `mse_pm1` here. ACAI, from which Eq. (9) comes, has one omega, .5.

Run it.  python latentmap.py                                        the Swiss roll (Figs. 4 and 5), minutes, offline
         python latentmap.py --model vae                            ... and its baselines: vae, aae, alae, wae, introvae, age
         python latentmap.py --dataset mnist --model latentmap-nobn Fig. 6: rows latentmap-nobn, latentmap-noreg, latentmap
         python latentmap.py --dataset celeba                       Table 1: 64 x 64, 25 epochs
What to expect: of `python latentmap.py`, in minutes on two CPU cores, samples on average .02 off the spiral and all over
it, reconstructions at an MSE of .0004. README.md has the command and the protocol of each number.
"""

import argparse
import colorsys
import dataclasses
import datetime
import itertools
import json
import math
import os
import pathlib
import pickle
import resource
import signal
import subprocess
import sys
import time
import zipfile

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

FILE = "latentmap"

# ======================================================================================================================
# Settings
# ======================================================================================================================


@dataclasses.dataclass
class Config:
    """Every setting of a run. The values below are those for CelebA (Table 1)."""

    model: str = "latentmap"
    dataset: str = "swissroll"
    root: str = "data"
    size: int = 64                  # "resized to 64"; 32: MNIST, CIFAR-10 (D7); 0: points
    channels: int = 3               # set from the data; of points their dimension
    width: int = 64                 # channels at full size: Mimicry's, 16 times as many at the narrow end (32 pixels: 4)
    latent: int = 128               # Mimicry's (D7); MNIST: 256 (ablation study); Swiss roll: 2
    batch: int = 32                 # author code
    epochs: float = 25              # "25 epochs"; `steps` wins where it is given
    steps: int = 0
    steps_per_epoch: int = 0        # set from the data
    lr: float = 2e-4                # author code
    beta1: float = 0.               # author code
    beta2: float = .999             # Adam's own
    method: str = "latentmap"       # which class; set by the model
    normalise: bool = True          # Eq. (11)
    gamma: float = .2               # author code: share of the data in what d should call lam
    lam: float = .2                 # author code: what d should call it
    omega1: float = 1.              # author code: weight of ||d(x_mu)||^2
    omega2: float = 1.              # author code: weight of ||d(x^)||^2
    recon: str = "l2"               # Eq. (10); "l1": author code (D1)
    prior: str = "gauss"            # "sphere": author code (D4)
    joint: bool = False             # author code's order (D5)
    ae_share: float = .8            # ours (D5)
    map_from: int | None = None     # steps of the first phase; set from ae_share and the steps. None: all of them
    critic_steps: int = 2           # author code: steps of d for one of E, G
    d_steps: int = 5                # author code: steps of D for one of g
    map_width: int = 512            # ours: hidden units of g and D
    beta: float = 2.                # VAE, IntroVAE: weight of half the summed squared error (D8, D9)
    wae_lam: float = 100.           # WAE, CelebA; MNIST: 10 (its authors')
    margin: float = 25.             # IntroVAE: m, ours (D9)
    alpha: float = .25              # IntroVAE: its authors' (of E; D9)
    age_mu: float = 5.              # AGE: weight of the reconstruction of images, for E; its authors' 10, halved (D9)
    age_lam: float = 500.           # AGE: of the reconstruction of codes, for G; its authors' 1000, halved (D9)
    age_steps: int = 3              # AGE, its authors' for CelebA (CIFAR-10: 2): steps of G for one of E
    r1: float = 10.                 # ALAE: gamma of R1
    seed: int = 0
    amp: str = "auto"
    compile: bool = False
    eval_every: int = 0             # steps; 0: a twelfth of the run
    samples: int = 50_000           # generated images (points) a metric is computed from: "50K generated samples"
    inception: str = ""             # weights for fid: a path, "auto" to download, "" for none

    def first_phase(self, step):
        """Whether `step` trains LatentMap's autoencoder and leaves g untrained."""
        return self.method == "latentmap" and not self.joint and (self.map_from is None or step <= self.map_from)

    def check(self):
        """Raises UserError, in one sentence, for settings that cannot work."""
        if self.model not in MODELS:
            raise UserError(f"--model {self.model} is not one of {', '.join(MODELS)}")
        if self.size not in (0, 32, 64):
            raise UserError(f"--size {self.size}: there are networks for 32 and for 64 pixels")
        if (self.size == 0) != (self.dataset in POINT_SETS):
            raise UserError(f"--size {self.size} does not suit {self.dataset}, which holds "
                            f"{'points' if self.size else 'images'}; leave it out")
        for name, least in (("batch", 2), ("latent", 1), ("width", 1), ("samples", 10), ("epochs", 1e-9)):
            if not least <= getattr(self, name) < 2 ** 48:
                raise UserError(f"--{name} {getattr(self, name)} is too {'large' if getattr(self, name) > least else 'small'}")
        for name in ("lr", "gamma", "lam", "omega1", "omega2"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"--{name} {getattr(self, name)} must be a number from 0 up")
        if not self.gamma <= 1:
            raise UserError(f"--gamma {self.gamma} is a share of the data: at most 1")
        if self.prior == "sphere" and self.method in ("vae", "introvae"):
            raise UserError(f"--prior sphere does not go with {self.method}, whose KL is to the Gaussian")
        if self.prior == "sphere" and self.latent < 2:
            raise UserError(f"--latent {self.latent} is too small for a prior on the sphere")
        if self.compile and self.method == "alae":
            raise UserError("--compile does not go with alae: R1 needs second derivatives, which torch.compile has none of")


MODELS = {  # Tables 1 and 2, Figs. 4 and 6: what each changes of Config
    "latentmap": dict(),
    "latentmap-nobn": dict(normalise=False, omega1=0., omega2=0.),  # Fig. 6, first row
    "latentmap-noreg": dict(omega1=0., omega2=0.),                  # Fig. 6, second row
    "vae": dict(method="vae", normalise=False), "aae": dict(method="aae", normalise=False),
    "wae": dict(method="wae", normalise=False), "introvae": dict(method="introvae", normalise=False),
    "age": dict(method="age", normalise=False, prior="sphere"), "alae": dict(method="alae", normalise=False),
}
POINTS = dict(channels=2, size=0, width=128, latent=2, batch=500, steps=6000, lr=5e-4, ae_share=.6, d_steps=2, map_width=128,
              samples=5000, omega1=.1, omega2=.1, amp="off", beta=1000., wae_lam=.5, margin=5.)      # ours (D7, D8)
MNIST = dict(size=32, latent=256, wae_lam=10., samples=10_000)      # ablation study: 256 dimensions
DATASETS = {  # what a data set changes of Config, whose own values are CelebA's
    "swissroll": POINTS, "grid25": POINTS, "ring8": POINTS,
    "mnist": MNIST | dict(channels=1), "fashion-mnist": MNIST | dict(channels=1),
    "digits": MNIST | dict(channels=1, width=16, latent=64, steps=3000, samples=5000),          # ours: minutes on two cores
    "stacked-digits": MNIST, "stacked-mnist": MNIST, "cifar10": dict(size=32, age_steps=2),
}
POINT_SETS = ("grid25", "ring8", "swissroll")
LOG_EVERY, SAVE_EVERY = 50, 500                                     # steps


def preset(model=None, dataset=None):
    """Config for one model on one data set: the paper's values, then the data set's, then the model's."""
    model, dataset = model or Config.model, dataset or Config.dataset
    if model not in MODELS:
        raise UserError(f"--model {model} is not one of {', '.join(MODELS)}")
    return Config(model, dataset, **(DATASETS.get(dataset, {}) | MODELS[model]))


# ======================================================================================================================
# Networks (D6)
# ======================================================================================================================


def conv(c_in, c_out, kernel, gain=1., spectral=False, stride=1, bias=True):
    """A convolution that keeps the size (odd kernel, stride 1) or halves it (4, 2); xavier's weights (Mimicry), bias 0."""
    layer = nn.Conv2d(c_in, c_out, kernel, stride, (kernel - 1) // 2, bias=bias)
    nn.init.xavier_uniform_(layer.weight, gain)
    if bias:
        nn.init.zeros_(layer.bias)
    return spectral_norm(layer) if spectral else layer


class Up(nn.Module):
    """Mimicry's block of G: (B, c_in, S, S) -> (B, c_out, 2S, 2S); residual BN, ReLU, up, 3 x 3, BN, ReLU, 3 x 3."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(c_in), nn.BatchNorm2d(c_out)
        self.conv1, self.conv2 = conv(c_in, c_out, 3, 2 ** .5), conv(c_out, c_out, 3, 2 ** .5)
        self.shortcut = conv(c_in, c_out, 1)

    def forward(self, x):
        up = lambda h: F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=False)
        h = self.conv1(up(F.relu(self.first(x))))
        # 1 x 1 convolution and bilinear enlargement commute: small images first
        return self.conv2(F.relu(self.second(h))) + up(self.shortcut(x))


class Down(nn.Module):
    """Mimicry's block of d: (B, c_in, S, S) -> (B, c_out, S/2, S/2); the first of them does not start with a ReLU.

    norm: "spectral" for d, or "batch" for E: BN before each ReLU.
    """

    def __init__(self, c_in, c_out, norm, first=False):
        super().__init__()
        spectral, middle = norm == "spectral", c_out if first else c_in
        batch = lambda c: nn.Identity() if spectral else nn.BatchNorm2d(c)
        before = [] if first else [batch(c_in), nn.ReLU()]
        self.residual = nn.Sequential(*before, conv(c_in, middle, 3, 2 ** .5, spectral), batch(middle), nn.ReLU(),
                                      conv(middle, c_out, 3, 2 ** .5, spectral), nn.AvgPool2d(2))
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), conv(c_in, c_out, 1, spectral=spectral))

    def forward(self, x):
        return self.residual(x) + self.shortcut(x)


def mlp(n_in, hidden, n_out, norm="", slope=0., layers=4):
    """(B, n_in) -> (B, n_out): `layers` linear layers, (leaky) ReLU between; norm "batch": BN before it; "spectral": of all but
    the last (D6)."""
    parts, n = [], n_in
    for _ in range(layers - 1):
        linear = nn.Linear(n, hidden)
        parts.append(spectral_norm(linear) if norm == "spectral" else linear)
        if norm == "batch":
            parts.append(nn.BatchNorm1d(hidden))
        parts.append(nn.LeakyReLU(slope))
        n = hidden
    return nn.Sequential(*parts, nn.Linear(n, n_out))


class Pool(nn.Module):
    """(B, C, S, S) -> (B, C): ReLU, and the sum over positions (Mimicry's d) or the mean (E)."""

    def __init__(self, total):
        super().__init__()
        self.total = total

    def forward(self, h):
        h = F.relu(h)
        return h.sum((2, 3)) if self.total else h.mean((2, 3))


class Encoder(nn.Sequential):
    """E, norm "batch", and the body of d, norm "spectral": images (B, C, S, S), S = 32 or 64, or points (B, C) -> (B, n_out),
    float32."""

    def __init__(self, size, channels, n_out, width, norm):
        w, spectral = width, norm == "spectral"
        if size == 0:
            layers = [mlp(channels, w, n_out, slope=.2 if spectral else 0.)]
        elif size == 64:
            head = nn.Linear(16 * w, n_out)
            nn.init.xavier_uniform_(head.weight)
            layers = [Down(channels, w, norm, first=True), *[Down(w << i, w << i + 1, norm) for i in range(4)],
                      Pool(spectral), head]                         # 64 -> 32 -> 16 -> 8 -> 4 -> 2
        else:
            layers = []
            for c_in, c_out in ((channels, w), (w, 2 * w), (2 * w, 4 * w)):         # 32 -> 16 -> 8 -> 4
                layers += [conv(c_in, c_out, 4, 2 ** .5, spectral, stride=2, bias=spectral),
                           *([] if spectral else [nn.BatchNorm2d(c_out)]), nn.LeakyReLU(.2)]
            layers += [nn.Flatten(), nn.Linear(64 * w, n_out)]
        super().__init__(*layers)

    def forward(self, x):
        return super().forward(x).float()


class Critic(Encoder):
    """d: -> (B,), the mean over an encoder's outputs."""

    def forward(self, x):
        return super().forward(x).mean(1)


class Decoder(nn.Sequential):
    """G: codes (B, dim) -> images (B, C, S, S) in [-1, 1], S = 32 or 64, or, of size 0, points (B, C); float32."""

    def __init__(self, size, latent, channels, width):
        w = width
        if size == 0:
            layers = [mlp(latent, w, channels)]
        elif size == 64:
            narrow = nn.Linear(latent, 256 * w)                     # 4 x 4 x 1024
            nn.init.xavier_uniform_(narrow.weight)
            layers = [narrow, nn.Unflatten(1, (16 * w, 4, 4)), *[Up(w << i, w << i - 1) for i in (4, 3, 2, 1)],
                      nn.BatchNorm2d(w), nn.ReLU(), conv(w, channels, 3), nn.Tanh()]
        else:
            layers = [nn.Linear(latent, 64 * w, bias=False), nn.Unflatten(1, (4 * w, 4, 4))]
            for c_in, c_out in ((4 * w, 2 * w), (2 * w, w), (w, channels)):         # 4 -> 8 -> 16 -> 32
                layers += [nn.BatchNorm2d(c_in), nn.ReLU(), nn.ConvTranspose2d(c_in, c_out, 4, 2, 1)]
            layers += [nn.Tanh()]
        super().__init__(*layers)

    def forward(self, z):
        return super().forward(z).float()


# ======================================================================================================================
# Losses (one function per equation; means over the batch, to be minimised, unless said otherwise)
# ======================================================================================================================


def interpolate(code, mu):
    """mu E(x_1) + (1 - mu) E(x_2) below Eq. (9): code (B, dim), mu (B,) -> (B, dim). x_2 is the item itself, x_1 its partner in
    the reversed batch (D2)."""
    mu = mu.reshape(-1, 1)
    return mu * code.flip(0) + (1 - mu) * code


def critic_loss(d_x, d_mix, d_mu, mu, lam):
    """Eq. (9): d's outputs (B,) on x, on gamma x + (1 - gamma) x^, on x_mu, whose targets are 0, lam, mu + lam; mu (B,)."""
    return d_x.square().mean() + (d_mix - lam).square().mean() + (d_mu - mu - lam).square().mean()


def reconstruction_loss(x, x_hat, recon="l2"):
    """Eq. (10), first term: the mean over all elements of the squared ("l2"), or absolute ("l1"), difference (D1)."""
    return F.mse_loss(x_hat, x) if recon == "l2" else F.l1_loss(x_hat, x)


def autoencoder_loss(x, x_hat, d_mu, d_hat, omega1, omega2, recon="l2"):
    """Eq. (10): d's outputs (B,) on x_mu and on x^."""
    return reconstruction_loss(x, x_hat, recon) + omega1 * d_mu.square().mean() + omega2 * d_hat.square().mean()


def hinge_loss_d(real, fake):
    """Eq. (12): D's outputs (B,) on codes and on g(z) -> a scalar."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def hinge_loss_g(fake):
    """Eq. (13): D's outputs (B,) on g(z) -> a scalar."""
    return -fake.mean()


def squared_error(x, x_hat):
    """||x - x^||^2 of each item: (B,)."""
    return (x - x_hat).square().flatten(1).sum(1)


def kl_normal(mu, log_var):
    """KL(N(mu, sigma^2) || N(0, I)) of each item: (B, dim) twice -> (B,)."""
    return (mu.square() + log_var.exp() - log_var - 1).sum(1) / 2


def negative_elbo(x, x_hat, mu, log_var, beta):
    """-Eq. (2) up to a constant, for p(x|z) = N(x^, I / beta); x^ = G(z), z ~ q(z|x) (D8). mu, log_var: (B, dim)."""
    return (beta / 2 * squared_error(x, x_hat) + kl_normal(mu, log_var)).mean()


def gan_loss_d(real, fake):
    """-log sigmoid(real) - log(1 - sigmoid(fake)) of logits (B,): AAE's D and ALAE's."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def gan_loss_g(fake):
    """-log sigmoid(fake), the non-saturating form: AAE's E, ALAE's F and G."""
    return F.softplus(-fake).mean()


def mmd(a, b):
    """WAE's penalty: the unbiased estimate of MMD^2 between samples a (n, dim) and b (m, dim); n, m >= 2. A scalar.

    Kernels C / (C + ||a - b||^2), C = 2 dim s, summed over s in {.1, .2, .5, 1, 2, 5, 10}; 2 dim is the mean squared distance
    of two draws from N(0, I). Pairs within a set leave out each point with itself; so the estimate may be negative.
    """
    def kernel(u, v):
        d2 = (u.square().sum(1)[:, None] + v.square().sum(1) - 2 * u @ v.T).clamp_min(0)
        return sum(c / (c + d2) for c in (2 * a.shape[1] * s for s in (.1, .2, .5, 1., 2., 5., 10.)))

    within = lambda k: (k.sum() - k.trace()) / (len(k) * (len(k) - 1))
    return within(kernel(a, a)) + within(kernel(b, b)) - 2 * kernel(a, b).mean()


def introvae_loss_e(kl_real, kl_rec, kl_gen, error, margin, alpha, beta):
    """IntroVAE's Eq. (11): KL of E on data, on reconstructions, on samples, half the squared error: (B,) each.

    As a discriminator E keeps the KL of data low and pushes that of what G makes up to the margin (D9).
    """
    return (kl_real + alpha * (F.relu(margin - kl_rec) + F.relu(margin - kl_gen)) + beta * error).mean()


def introvae_loss_g(kl_rec, kl_gen, error, alpha, beta):
    """IntroVAE's Eq. (12), of the same (B,): G wants E to take what it makes for data."""
    return (alpha * (kl_rec + kl_gen) + beta * error).mean()


def kl_fit(code):
    """AGE's Delta: KL(N(m, s^2) || N(0, I)) / dim with the mean and variance of each coordinate of codes (B, dim) -> ()."""
    mean, var = code.mean(0), code.var(0, unbiased=False).clamp_min(1e-8)           # a collapsed coordinate has no log
    return (mean.square() + var - var.log() - 1).mean() / 2


def age_loss_e(real, fake, x, x_hat, mu):
    """AGE: e maximises Delta(e(g(Z))) - Delta(e(X)); negated, plus mu |x - g(e(x))|. real, fake: codes (B, dim)."""
    return kl_fit(real) - kl_fit(fake) + mu * (x - x_hat).abs().mean()


def age_loss_g(fake, z, lam):
    """AGE: g minimises Delta(e(g(Z))), plus lam / dim times 1 - cos(z, e(g(z))): up to a constant the mean over elements
    of -z e(g(z)) on the unit sphere, which its authors' weight belongs to (D9). fake, z: codes (B, dim)."""
    return kl_fit(fake) + lam * (1 - F.cosine_similarity(z, fake)).mean() / z.shape[1]


def r1_penalty(logits, x):
    """ALAE's R1: ||d logits / d x||^2 of each item, their mean; it weights it by gamma / 2. logits (B,) of x, which requires
    a gradient."""
    gradient, = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()


def reciprocity_loss(w, w_hat):
    """ALAE: ||F(z) - E(G(F(z)))||^2, a mean over elements of codes (B, dim)."""
    return (w - w_hat).square().mean()


# ======================================================================================================================
# The models
# ======================================================================================================================


def draw_prior(n, dim, kind, generator=None, device=None):
    """z (n, dim): N(0, I) ("gauss"), or uniform on the sphere of radius sqrt(dim) ("sphere"; D4)."""
    z = torch.randn(n, dim, generator=generator, device=device)
    return project(z) if kind == "sphere" else z


def project(z):
    """(n, dim) -> the same directions, on the sphere of radius sqrt(dim)."""
    return F.normalize(z, dim=1) * z.shape[1] ** .5


class Autoencoder(nn.Module):
    """What all have in common: E, G, optimisers by name, and the verbs `sample(n)`, `encode(x)`, `decode(z)`.

    A model adds `networks(config)`, `groups()`, the parameters each optimiser moves, and `update_all(x)`, which makes the
    updates of one `step(x)`; where codes are not the prior itself, also `to_code(z)`, and `code(x)` where it is not E(x).
    """

    def __init__(self, config, machine=None):
        super().__init__()
        self.config, self.machine, self.iteration = config, machine or Machine(seed=config.seed), 0
        self.networks(config)
        self.to(self.machine.device, memory_format=torch.channels_last)
        adam = dict(lr=config.lr, betas=(config.beta1, config.beta2), fused=self.machine.device.type in ("cpu", "cuda"))
        self.optimisers = {name: torch.optim.Adam(params, **adam) for name, params in self.groups().items()}

    def networks(self, c, outputs=1):
        self.E = Encoder(c.size, c.channels, outputs * c.latent, c.width, "batch")
        self.G = Decoder(c.size, c.latent, c.channels, c.width)

    def groups(self):
        return {"AE": [*self.E.parameters(), *self.G.parameters()]}

    def get_extra_state(self):
        return self.iteration                                       # tells the phase; part of a checkpoint

    def set_extra_state(self, iteration):
        self.iteration = iteration

    def update(self, name, loss):
        """One step of one optimiser, down `loss`; nothing else moves."""
        params = [p for group in self.optimisers[name].param_groups for p in group["params"]]
        self.machine.apply(self.optimisers[name], params, self.machine.gradients(loss, params))
        self.machine.end_step()                                     # after each: an optimiser may step again in this iteration

    def step(self, x):
        """One iteration on data x. Returns its losses as scalars."""
        losses = self.update_all(x.to(memory_format=torch.channels_last) if x.dim() == 4 else x)
        self.iteration += 1
        return {name: loss.detach() for name, loss in losses.items()}

    def prior(self, n, seed=None):
        """z (n, dim) from the prior; with a seed the same at each call, without touching the training's random numbers."""
        c, device = self.config, self.machine.device
        if seed is None:
            return draw_prior(n, c.latent, c.prior, device=device)
        return draw_prior(n, c.latent, c.prior, torch.Generator().manual_seed(seed)).to(device)

    def to_code(self, z):
        return z

    def code(self, x):
        return self.E(x)

    def infer(self, function, x):
        """`function(x)` with the networks in evaluation mode, without a graph."""
        training = self.training
        self.eval()
        with torch.no_grad(), self.machine.autocast():
            y = function(x.to(self.machine.device))
        self.train(training)
        return y.float()

    def encode(self, x):
        """Data (n, ...) -> codes (n, dim), those that `decode` takes; a VAE's are the posterior means."""
        return self.infer(self.code, x)

    def decode(self, z):
        """Codes (n, dim) -> data (n, ...)."""
        return self.infer(self.G, z)

    def reconstruct(self, x):
        return self.decode(self.encode(x))

    def generated_codes(self, z):
        """Draws z (n, dim) from the prior -> the codes that samples are decoded from: g(z), F(z), or z."""
        return self.infer(self.to_code, z)

    def sample(self, n):
        """n images (n, C, S, S) in [-1, 1], or points (n, C): G(g(z))."""
        return self.decode(self.generated_codes(self.prior(n)))


class LatentMap(Autoencoder):
    """The paper's model. Without `normalise` and with omega1 = omega2 = 0 its ablations (Fig. 6)."""

    def networks(self, c):
        super().networks(c)
        self.regularised = c.omega1 > 0 or c.omega2 > 0             # without the regulariser nothing asks d
        self.normalise = nn.BatchNorm1d(c.latent, affine=False) if c.normalise else nn.Identity()   # Eq. (11)
        if self.regularised:
            self.d = Critic(c.size, c.channels, c.latent, c.width, "spectral")
        self.g = mlp(c.latent, c.map_width, c.latent, "batch")
        if c.normalise:
            self.g.append(nn.BatchNorm1d(c.latent, affine=False))   # what it is to match has mean 0, variance 1, too
        self.D = mlp(c.latent, c.map_width, 1, "spectral", slope=.2)

    def groups(self):
        critic = {"d": [*self.d.parameters()]} if self.regularised else {}
        return super().groups() | critic | {"D": [*self.D.parameters()], "g": [*self.g.parameters()]}

    def code(self, x):
        return self.normalise(self.E(x))                            # x -> z -> BN(z) = z^

    def to_code(self, z):
        return self.g(z).float()

    def update_all(self, x):
        first = self.config.first_phase(self.iteration + 1)
        if first or self.config.joint:
            losses, code = self.update_autoencoder(x)
        else:
            losses, code = {}, self.encode(x)                       # E and BN rest, running statistics included
        return losses if first else losses | self.update_map(code)

    def blend(self, code):
        """mu (B,) and x_mu, the decoding of each item's code mixed with its partner's."""
        mu = torch.rand(len(code), device=code.device) / 2          # U[0, .5]
        return mu, apart(self.G, interpolate(code, mu))

    def update_autoencoder(self, x):
        """First phase: d `critic_steps` times by Eq. (9), then E and G by Eq. (10). Returns losses and codes (B, dim)."""
        c, m, losses = self.config, self.machine, {}
        with m.autocast():
            code = self.code(x)
            x_hat = self.G(code)                                    # made once: E and G rest while d moves
        for _ in range(c.critic_steps if self.regularised else 0):
            with m.autocast():
                with torch.no_grad():
                    mu, x_mu = self.blend(code)
                    mixed = c.gamma * x + (1 - c.gamma) * x_hat
                d_x, d_mix, d_mu = self.d(torch.cat([x, mixed, x_mu])).chunk(3)     # d has no BN: one batch is three
            losses["d"] = critic_loss(d_x, d_mix, d_mu, mu, c.lam)
            self.update("d", losses["d"])
        d_mu = d_hat = torch.zeros_like(code[:, 0])
        if self.regularised:
            with m.autocast():
                _, x_mu = self.blend(code)
                d_mu, d_hat = self.d(torch.cat([x_mu, x_hat])).chunk(2)
        losses["ae"] = autoencoder_loss(x, x_hat, d_mu, d_hat, c.omega1, c.omega2, c.recon)
        losses["rec"] = reconstruction_loss(x, x_hat.detach(), c.recon)
        self.update("AE", losses["ae"])
        return losses, code.detach()

    def update_map(self, code):
        """Second phase, on codes (B, dim): D `d_steps` times by Eq. (12), then g by Eq. (13)."""
        c, m, losses = self.config, self.machine, {}
        for _ in range(c.d_steps):
            with m.autocast():
                with torch.no_grad():
                    fake = self.to_code(self.prior(len(code)))
                real, fake = self.D(torch.cat([code, fake])).squeeze(1).float().chunk(2)
            losses["D"] = hinge_loss_d(real, fake)
            self.update("D", losses["D"])
        with m.autocast():
            fake = self.D(self.to_code(self.prior(len(code)))).squeeze(1).float()
        losses["g"] = hinge_loss_g(fake)
        self.update("g", losses["g"])
        return losses


class VAE(Autoencoder):
    """E gives the mean and the log variance of q(z|x)."""

    def networks(self, c):
        super().networks(c, outputs=2)

    def posterior(self, x, made=False):
        """mu, log sigma^2 of q(z|x), (B, dim) each; the latter kept where its exponential is a number. made: x is G's."""
        mu, log_var = (apart(self.E, x) if made else self.E(x)).chunk(2, 1)
        return mu, log_var.clamp(-15, 10)

    def code(self, x):
        return self.posterior(x)[0]

    def latents(self, x):
        """Data (n, ...) -> codes (n, dim) as G meets them in training: draws from the posterior."""
        return self.infer(lambda x: self.draw(*self.posterior(x)), x)

    def draw(self, mu, log_var):
        return mu + (log_var / 2).exp() * torch.randn_like(mu)

    def update_all(self, x):
        with self.machine.autocast():
            mu, log_var = self.posterior(x)
            x_hat = self.G(self.draw(mu, log_var))
        loss = negative_elbo(x, x_hat, mu, log_var, self.config.beta)
        self.update("AE", loss)
        return {"elbo": loss, "kl": kl_normal(mu, log_var).mean(), "rec": reconstruction_loss(x, x_hat)}


class AAE(Autoencoder):
    """The code's distribution is matched to the prior by a discriminator between vectors (D8)."""

    def networks(self, c):
        super().networks(c)
        self.D = mlp(c.latent, c.map_width, 1, slope=.2)

    def groups(self):
        return super().groups() | {"D": [*self.D.parameters()], "E": [*self.E.parameters()]}

    def update_all(self, x):
        m = self.machine
        with m.autocast():
            x_hat = self.G(self.E(x))
        rec = reconstruction_loss(x, x_hat, self.config.recon)
        self.update("AE", rec)
        with m.autocast():
            code = self.E(x)
            real, fake = self.D(torch.cat([self.prior(len(x)), code.detach()])).squeeze(1).float().chunk(2)
        loss_d = gan_loss_d(real, fake)
        self.update("D", loss_d)
        with m.autocast():
            fake = self.D(code).squeeze(1).float()
        loss_e = gan_loss_g(fake)
        self.update("E", loss_e)
        return {"rec": rec, "D": loss_d, "E": loss_e}


class WAE(Autoencoder):
    """The code's distribution is matched to the prior by MMD, Eq. (6)."""

    def update_all(self, x):
        with self.machine.autocast():
            code = self.E(x)
            x_hat = self.G(code)
        penalty = mmd(code, self.prior(len(x)))
        self.update("AE", .05 * squared_error(x, x_hat).mean() + self.config.wae_lam * penalty)
        return {"rec": reconstruction_loss(x, x_hat), "mmd": penalty}


class IntroVAE(VAE):
    """A VAE whose E tells data from what G makes, by the KL of their codes (D9)."""

    def groups(self):
        return {"E": [*self.E.parameters()], "G": [*self.G.parameters()]}

    def update_all(self, x):
        c, m = self.config, self.machine
        with m.autocast():
            mu, log_var = self.posterior(x)
            z = self.draw(mu, log_var)
            x_rec = self.G(z)
            with torch.no_grad():
                z_prior = self.prior(len(x))
                x_gen = apart(self.G, z_prior)
            kl_rec, kl_gen = (kl_normal(*self.posterior(y, made=True)) for y in (x_rec.detach(), x_gen))    # ng() of Eq. (11)
        kl_real, error = kl_normal(mu, log_var), squared_error(x, x_rec) / 2
        loss_e = introvae_loss_e(kl_real, kl_rec, kl_gen, error, c.margin, c.alpha, c.beta)
        self.update("E", loss_e)
        with m.autocast():                                          # the same codes, for the E just moved
            x_rec, x_gen = apart(self.G, z.detach()), self.G(z_prior)
            kl_rec, kl_gen = (kl_normal(*self.posterior(y, made=True)) for y in (x_rec, x_gen))
        loss_g = introvae_loss_g(kl_rec, kl_gen, squared_error(x, x_rec) / 2, c.alpha, c.beta)
        self.update("G", loss_g)
        return {"E": loss_e, "G": loss_g, "kl_real": kl_real.mean(), "kl_gen": kl_gen.mean(),
                "rec": reconstruction_loss(x, x_rec)}


class AGE(Autoencoder):
    """A game of G and E alone: E spreads the codes of samples away from the prior, G brings them back (D9)."""

    def groups(self):
        return {"E": [*self.E.parameters()], "G": [*self.G.parameters()]}

    def code(self, x, made=False):
        z = apart(self.E, x) if made else self.E(x)
        return project(z) if self.config.prior == "sphere" else z

    def update_all(self, x):
        c, m = self.config, self.machine
        with m.autocast():
            real = self.code(x)
            x_hat = apart(self.G, real)
            with torch.no_grad():
                made = apart(self.G, self.prior(len(x)))
            fake = self.code(made, made=True)
        loss_e = age_loss_e(real, fake, x, x_hat, c.age_mu)
        self.update("E", loss_e)
        for _ in range(c.age_steps):
            with m.autocast():
                z = self.prior(len(x))
                fake = self.code(self.G(z), made=True)              # G's statistics are those of draws (D10)
            loss_g = age_loss_g(fake, z, c.age_lam)
            self.update("G", loss_g)
        return {"E": loss_e, "G": loss_g, "kl_real": kl_fit(real), "kl_fake": kl_fit(fake),
                "rec": reconstruction_loss(x, x_hat)}


class ALAE(Autoencoder):
    """F: z -> w, G: w -> x, E: x -> w, D: w -> logit; the GAN's discriminator is D(E(x)), its generator G(F(z)) (D9)."""

    def networks(self, c):
        super().networks(c)
        self.F = mlp(c.latent, c.map_width, c.latent, "batch")
        self.D = mlp(c.latent, c.map_width, 1, slope=.2)

    def groups(self):
        return super().groups() | {"ED": [*self.E.parameters(), *self.D.parameters()],
                                   "FG": [*self.F.parameters(), *self.G.parameters()]}

    def to_code(self, z):
        return self.F(z).float()

    def update_all(self, x):
        c, m, logit = self.config, self.machine, lambda w: self.D(w).squeeze(1).float()
        with m.autocast():
            with torch.no_grad():
                made = self.G(self.to_code(self.prior(len(x))))
            seen = x.detach().requires_grad_()
            real, fake = logit(self.E(seen)), logit(apart(self.E, made))
        r1 = r1_penalty(real, seen)
        loss_d = gan_loss_d(real, fake)
        self.update("ED", loss_d + c.r1 / 2 * r1)
        with m.autocast():
            fake = logit(apart(self.E, self.G(self.to_code(self.prior(len(x))))))
        loss_g = gan_loss_g(fake)
        self.update("FG", loss_g)
        with m.autocast():
            with torch.no_grad():
                w = self.to_code(self.prior(len(x)))
            w_hat = apart(self.E, self.G(w))
        reciprocity = reciprocity_loss(w, w_hat)
        self.update("AE", reciprocity)
        return {"D": loss_d, "r1": r1, "G": loss_g, "w": reciprocity}


def build(config, machine=None):
    """The model that `config.model` names."""
    classes = {"latentmap": LatentMap, "vae": VAE, "aae": AAE, "wae": WAE, "introvae": IntroVAE, "age": AGE, "alae": ALAE}
    return classes[config.method](config, machine)


# ======================================================================================================================
# Geometry: how a code keeps what the data look like (the paper shows it; these are numbers for it)
# ======================================================================================================================


def average_ranks(v):
    """(n,) -> ranks 0 .. n - 1, float64; equal values share the mean of theirs."""
    _, group, count = torch.unique(v, return_inverse=True, return_counts=True)
    last = count.cumsum(0).double() - 1
    return (last - (count.double() - 1) / 2)[group]


def spearman(a, b):
    """Rank correlation of two vectors (n,); 0 where one of them is constant."""
    return torch.corrcoef(torch.stack([average_ranks(a), average_ranks(b)]))[0, 1].nan_to_num(0).item()


def pairwise(x):
    """Distances of all pairs of items (n, ...): (n (n - 1) / 2,)."""
    return torch.pdist(x.flatten(1).double())


def trustworthiness(x, code, k=12):
    """Venna and Kaski 2001: 1 where the k nearest codes of each item are k of its nearest data, less for each intruder by
    how far down its rank among the data is. x (n, ...), code (n, dim); ValueError unless k < n / 2."""
    n = len(x)
    if not 0 < k < n / 2:
        raise ValueError(f"{k} neighbours of {n} items: fewer than half are needed")
    apart, apart_code = (torch.cdist(v.flatten(1).double(), v.flatten(1).double()) for v in (x, code))
    for distances in (apart, apart_code):
        distances.fill_diagonal_(-1)                                # an item is its own rank 0, also among duplicates
    rank = apart.argsort(1).argsort(1)                              # (n, n): j is the rank[i, j]-th nearest of i
    nearest = apart_code.argsort(1)[:, 1:k + 1]
    excess = (rank.gather(1, nearest) - k).clamp_min(0).sum().item()
    return 1 - 2 * excess / (n * k * (2 * n - 3 * k - 1))


def nearest_distances(a, b):
    """Of each point of a (n, 2) the distance to the nearest of b (m, 2): (n,)."""
    exact = dict(compute_mode="donot_use_mm_for_euclid_dist")       # by products of matrices 0 would become some 1e-4
    return torch.cat([torch.cdist(part, b, **exact).min(1).values for part in a.split(1000)])


def chamfer(points, manifold):
    """Distances of the points (n, 2) to the manifold, (n,), and of the manifold's points (m, 2) to the points, (m,)."""
    return nearest_distances(points, manifold), nearest_distances(manifold, points)


def spiral(n=5000):
    """data.py's Swiss roll without chance: n points (n, 2) equally spaced in t, from 1.5 pi to 4.5 pi."""
    t = torch.linspace(1.5 * math.pi, 4.5 * math.pi, n)
    return torch.stack([t * t.cos(), t * t.sin()], 1) / (4.5 * math.pi)


def arc_length(x):
    """Points (n, 2) of that spiral -> their place along it (n,): its radius is t, and ds = sqrt(1 + t^2) dt, both scaled."""
    t = x.double().norm(dim=1) * 4.5 * math.pi
    return (t * (1 + t * t).sqrt() + t.asinh()) / 2 / (4.5 * math.pi)


def geometry(x, code, roll=False):
    """rank_corr: of the distances between data and between codes; trust; of the Swiss roll also rank_corr_arc, with the
    distances along it. x (n, ...), code (n, dim)."""
    result = {"rank_corr": spearman(pairwise(x), pairwise(code)), "trust": trustworthiness(x, code)}
    if roll:
        result["rank_corr_arc"] = spearman(pairwise(arc_length(x)[:, None]), pairwise(code))
    return result


# ======================================================================================================================
# Figures
# ======================================================================================================================


def scatter(points, labels, classes, reach, side=420):
    """Points (n, 2) as dots coloured by label (n,) -> picture (3, side, side) of [-reach, reach]^2; dots beyond are cut."""
    hues = [i * .618 % 1 for i in range(classes)]                   # the golden ratio keeps neighbouring labels apart
    colours = torch.tensor([colorsys.hsv_to_rgb(hue, 1, .85) for hue in hues]).T    # (3, classes)
    at = ((points.cpu().float() + reach) / (2 * reach) * side).long()
    inside = ((at >= 1) & (at < side - 1)).all(1)
    (across, up), colour = at[inside].T, colours[:, labels.cpu()[inside]]
    picture = torch.ones(3, side, side)
    for right, down in itertools.product((0, 1), repeat=2):         # a dot is 2 x 2 pixels
        picture[:, side - 1 - up + down, across + right] = colour
    return picture


def save_panels(path, panels):
    """{title: picture (3, S, S)} side by side, framed and titled."""
    from PIL import Image, ImageDraw

    wide = torch.cat([F.pad(p, (4, 4, 20, 4), value=.88) for p in panels.values()], 2)
    picture = Image.fromarray((wide * 255).byte().permute(1, 2, 0).contiguous().numpy())
    for n, title in enumerate(panels):
        ImageDraw.Draw(picture).text((8 + n * wide.shape[2] // len(panels), 4), title, fill="black")
    picture.save(path)


def code_panels(code, made, y, classes):
    """Figs. 3 and 5: {title: picture} of codes (n, dim) by label and of generated codes (m, dim), on the codes' first two
    principal components where there are more than two. {} for a one-dimensional code, or one that is not finite."""
    code, made = code.cpu().double(), made.cpu().double()
    if code.shape[1] < 2 or not code.isfinite().all():              # of these the metrics will say it
        return {}
    if code.shape[1] > 2:
        axes = torch.linalg.eigh(torch.cov(code.T)).eigenvectors[:, -2:].flip(1)    # (dim, 2)
        code, made = (code - code.mean(0)) @ axes, (made - code.mean(0)) @ axes
    reach = 1.2 * max(code.abs().max().item(), 1e-3)
    y = torch.zeros(len(code), dtype=torch.long) if y is None else y
    return {"codes of the data": scatter(code, y, max(classes, 1), reach),
            "codes made from the prior": scatter(made, torch.zeros(len(made), dtype=torch.long), 1, reach)}


def figures_points(model, run, step, x, y, classes):
    """Figs. 4 and 5 of x (n, 2) with labels y (n,): data, reconstructions, samples; prior, codes, generated codes."""
    z = model.prior(len(x), seed=0)
    code, made = model.encode(x), model.generated_codes(z)
    points, recon, reach = model.decode(made).cpu(), model.decode(code).cpu(), 1.2 * x.abs().max().item()
    nearest = torch.cat([torch.cdist(part, x).argmin(1) for part in points.split(1000)])    # a sample's colour
    panels = {"data": scatter(x, y, classes, reach), "reconstructions": scatter(recon, y, classes, reach),
              "samples": scatter(points, y[nearest], classes, reach)}
    torchvision.utils.save_image(panels["samples"], run.folder / f"samples/{step:06d}.png")
    torchvision.utils.save_image(panels["reconstructions"], run.folder / f"recon/{step:06d}.png")
    save_panels(run.folder / f"figures/panels-{step:06d}.png", panels)
    codes = code_panels(code, made, y, classes)
    if model.config.latent == 2:
        codes = {"prior": scatter(z, torch.zeros(len(z), dtype=torch.long), 1, 4)} | codes
    if codes:
        save_panels(run.folder / f"figures/codes-{step:06d}.png", codes)


def figures_images(model, run, step, x, y, classes):
    """The pictures of one evaluation of test images x (n, C, S, S) with labels y (n,) or None."""
    folder, code = run.folder / "figures", torch.cat([model.encode(part) for part in x.split(250)])
    made = torch.cat([model.generated_codes(part) for part in model.prior(len(x), seed=0).split(250)])
    save_grid(run.folder / f"samples/{step:06d}.png", model.decode(model.generated_codes(model.prior(100, seed=0))))  # Fig. 7
    if not (folder / "real.png").exists():
        save_grid(folder / "real.png", x[:100])
    pairs = torch.stack([x[:50].cpu(), model.decode(code[:50]).cpu()], dim=1).flatten(0, 1)     # Fig. 8: original, its own, ...
    save_grid(run.folder / f"recon/{step:06d}.png", pairs)
    if len(code) >= 20:                                             # Fig. 6: straight lines between the codes of two images
        ramp = torch.linspace(0, 1, 10, device=code.device)[:, None]
        lines = (1 - ramp) * code[:10, None] + ramp * code[10:20, None]             # (10, 10, dim)
        save_grid(folder / f"interpolations-{step:06d}.png", model.decode(lines.flatten(0, 1)))
    codes = code_panels(code, made, y, classes)
    if codes:
        save_panels(folder / f"codes-{step:06d}.png", codes)


# ======================================================================================================================
# Plumbing: device, precision, ranks, checkpoints, log, two kinds of picture. The same text in ivgen.py, aim.py and
# latentmap.py (a test holds the three equal); nothing between these two banners knows which paper it serves. Of its file
# it uses FILE, LOG_EVERY, SAVE_EVERY and score_of.
# ======================================================================================================================


SIGNALS = (signal.SIGINT, signal.SIGTERM)


class UserError(ValueError):
    """A mistake the user can put right: ends the run with this one sentence on stderr and exit code 2."""


class NotFinite(ArithmeticError):
    """A loss, a weight or a metric became NaN or infinite: ends the run with the step and its name and exit code 3."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM arrived and the run was saved: (message, signal number); exit code 128 + signal."""


class Parser(argparse.ArgumentParser):
    """argparse with its complaint as one sentence (exit code 2 comes from `run_cli`)."""

    def error(self, message):
        raise UserError(f"{message}; see --help")


class Machine:
    """Where and how the arithmetic runs: device, precision, ranks. A model asks four things of it: `autocast`,
    `gradients`, `apply` and `end_step`. `Machine()` alone is one process on the CPU in float32, which is what a test or
    a notebook wants.

    device: "cpu", "cuda", "cuda:1", "auto" (CUDA where there is one). amp: "off", "bf16", "fp16", "auto" (bf16 where the
    device multiplies it natively). Raises UserError for a device that is not there: never a silent run on the CPU.
    """

    def __init__(self, device="cpu", amp="off", seed=0):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"--device {device}: this machine has no usable CUDA device; use --device cpu")
        try:
            self.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device)
            torch.empty(1, device=self.device).item()
        except (RuntimeError, AssertionError, ImportError) as error:
            raise UserError(f"--device {device} cannot be used here ({str(error).splitlines()[0][:80]}); "
                            "give auto, cpu, cuda or cuda:0") from None
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True           # fixed shapes: let cuDNN pick its fastest convolution once
            torch.set_float32_matmul_precision("high")      # tf32 for what stays in float32
        if self.world > 1 and not dist.is_initialized():
            # rank 0 evaluates while the others wait, hence the long timeout
            dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=4))
        if amp == "auto":
            native = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else \
                getattr(torch.cpu, "_is_amx_tile_supported", bool)()
            amp = "bf16" if native else "off"
        self.amp, self.dtype = amp, {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")
        self.seed = seed
        torch.manual_seed(seed)                             # the same on all ranks, so that all build the same weights

    def seed_ranks(self):
        """Gives every rank its own noise, once the networks (equal on all) are built."""
        torch.manual_seed(self.seed + 1000 * self.rank)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def gradients(self, loss, params, retain=False):
        """d loss / d params as a list, None where the loss does not reach. Never touches another parameter's .grad, so
        that what moves is decided here, per network, and not by who called zero_grad when."""
        return torch.autograd.grad(self.scaler.scale(loss), params, retain_graph=retain, allow_unused=True)

    def apply(self, optimiser, params, grads):
        """One optimiser step with `grads`, averaged over ranks (the mean loss over the joint batch)."""
        reached = [(p, g) for p, g in zip(params, grads) if g is not None]
        if self.world > 1:
            flat = torch.cat([g.reshape(-1) for _, g in reached])
            dist.all_reduce(flat)
            pieces = (flat / self.world).split([g.numel() for _, g in reached])
            reached = [(p, piece.view_as(g)) for (p, g), piece in zip(reached, pieces)]
        for p, g in reached:                                # fused Adam walks memory: a gradient must lie as its weight does,
            p.grad = g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)    # which autograd.grad does not promise
        if reached:
            self.scaler.step(optimiser)
        optimiser.zero_grad(set_to_none=True)

    def end_step(self):
        self.scaler.update()

    def agree(self, flag):
        """True on every rank if `flag` is true on any: ranks must leave the loop at the same step."""
        if self.world == 1:
            return flag
        flag = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def in_turn(self, make):
        """make(), on one rank of each host first, so that the others find what it has downloaded or cached."""
        first = int(os.environ.get("LOCAL_RANK", 0)) == 0
        made = make() if first else None
        self.barrier()
        return made if first else make()

    def rng_state(self):
        """[state of the generators] of every rank, as tensors (a checkpoint holds nothing else)."""
        mine = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if self.device.type == "cuda" else [])
        every = [None] * self.world
        if self.world == 1:
            return [mine]
        dist.all_gather_object(every, mine)
        return every

    def set_rng_state(self, states):
        if len(states) != self.world or len(states[self.rank]) != len(self.rng_state()[self.rank]):
            return self.seed_ranks()                        # resumed on other hardware: no bit for bit to keep
        torch.set_rng_state(states[self.rank][0])
        for state in states[self.rank][1:]:
            torch.cuda.set_rng_state(state)


class Run:
    """The folder of one run: config.json, log.jsonl, pictures, last.pt and best.pt, and the status line.

    A new run moves an older one of the same name aside (NAME.1, NAME.2, ...), so nothing is ever overwritten.
    Raises UserError if the folder cannot be written. On ranks other than 0 it writes nothing.
    """

    def __init__(self, folder, config, machine, resume=False):
        self.folder, self.machine, self.main = pathlib.Path(folder), machine, machine.rank == 0
        self.losses, self.shown, self.signal = [], 0.0, 0
        if not self.main:
            return
        earlier = []
        try:
            if not resume and any((self.folder / name).exists() for name in ("config.json", "log.jsonl", "last.pt")):
                if pathlib.Path.cwd().is_relative_to(self.folder.resolve()):
                    raise UserError(f"--out {self.folder} holds a run, which cannot be moved aside from within; choose another")
                n = next(n for n in itertools.count(1) if not self.folder.with_name(f"{self.folder.name}.{n}").exists())
                self.folder.rename(self.folder.with_name(f"{self.folder.name}.{n}"))
                print(f"an earlier run was here: moved to {self.folder}.{n}", file=sys.stderr)
            elif resume:
                earlier = earlier_commands(self.folder / "config.json")
            for name in ("samples", "recon", "figures"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            self.log_file = open(self.folder / "log.jsonl", "a")
        except OSError as error:
            raise UserError(f"cannot write to the run folder {self.folder}: {error.strerror}; choose another with --out"
                            ) from None
        self.write_json("config.json", config | {"command": " ".join(sys.argv), "earlier_commands": earlier,
                                                 "device": str(machine.device), "precision": machine.amp,
                                                 "world": machine.world} | versions())

    def __enter__(self):
        """From here to the end of the `with`, Ctrl-C and SIGTERM are only noted: the loop saves, then leaves."""
        self.handlers = {n: signal.signal(n, lambda n, frame: setattr(self, "signal", n)) for n in SIGNALS}
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.main:
            self.log_file.close()

    def write_json(self, name, content):
        (self.folder / name).write_text(json.dumps(content, indent=1) + "\n")

    def forget_after(self, step):
        """Drops log lines past the checkpoint being resumed (and a line torn by a kill): they are about to be redone."""
        if not self.main:
            return
        kept, path = [], self.folder / "log.jsonl"
        for line in path.read_text(errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, TypeError, LookupError):
                pass
        self.log_file.close()
        path.with_suffix(".tmp").write_text("".join(kept))
        os.replace(path.with_suffix(".tmp"), path)
        self.log_file = open(path, "a")

    def add(self, step, losses):
        """Keeps one step's losses on the device: reading each at once would stall a GPU."""
        self.losses += [(step, name, value.detach().float()) for name, value in losses.items()]

    def flush(self):
        """Mean losses since the last flush. Raises NotFinite with the first bad step and term."""
        if not self.losses:
            return {}
        values, means = torch.stack([value for _, _, value in self.losses]).tolist(), {}
        for (step, name, _), value in zip(self.losses, values):
            if not math.isfinite(value):
                raise self.not_finite(step, f"the loss '{name}' is {value}")
            means.setdefault(name, []).append(value)
        self.losses = []
        return {name: round(sum(v) / len(v), 6) for name, v in means.items()}

    def not_finite(self, step, what):
        return NotFinite(f"step {step}: {what}; the last good checkpoint is {self.folder / 'last.pt'}")

    def log(self, step, **values):
        """One line of log.jsonl. Raises NotFinite for a number that JSON has no word for."""
        bad = next((name for name, v in values.items() if isinstance(v, float) and not math.isfinite(v)), None)
        if bad:
            raise self.not_finite(step, f"'{bad}' is {values[bad]}")
        if self.main:
            self.log_file.write(json.dumps({"step": step} | values) + "\n")
            self.log_file.flush()

    def start_clock(self, step):
        """Called as the loop begins, so that neither the estimate of time left nor images/s counts the preparations."""
        self.began = self.since = time.time()
        self.first = self.counted = step

    def images_per_s(self, step, batch):
        """Images per second, over all ranks, since the last call."""
        now, images = time.time(), (step - self.counted) * batch * self.machine.world
        rate, self.since, self.counted = round(images / max(now - self.since, 1e-9), 1), now, step
        return rate

    def status(self, step, steps, text):
        """One line rewritten in place on a terminal; elsewhere a line every half minute."""
        now = time.time()
        if not self.main or (not sys.stderr.isatty() and now - self.shown < 30 and step < steps):
            return
        self.shown = now
        left = (now - self.began) / max(step - self.first, 1) * (steps - step)
        start, end = ("\r\033[K", "") if sys.stderr.isatty() else ("", "\n")
        print(f"{start}step {step}/{steps}  {text}  {int(left) // 60}:{int(left) % 60:02d} left", end=end, file=sys.stderr,
              flush=True)

    def say(self, step, metrics):
        """One line a person reads, at each evaluation."""
        shown = {k: f"{v:.4g}" if isinstance(v, (int, float)) else v for k, v in metrics.items()
                 if k != "protocol" and not isinstance(v, list)}
        print("\r\033[K" if sys.stderr.isatty() else "", end="", file=sys.stderr, flush=True)
        print(f"step {step}: " + "  ".join(f"{k} {v}" for k, v in shown.items()), flush=True)

    def interrupted(self, step):
        """True once Ctrl-C or SIGTERM has arrived; ranks agree on it every 20 steps, to leave at the same one."""
        return (self.machine.world == 1 or step % 20 == 0) and self.machine.agree(self.signal > 0)

    def save(self, name, file, model, step, batches, config, best):
        """Everything that resuming needs, as tensors and plain values; to a temporary name, then renamed. Raises UserError
        if that cannot be written, for want of space for instance: what was saved before stays."""
        state = {"file": file, "model": config["model"], "config": config, "step": step, "best": best,
                 "weights": model.state_dict(), "optimisers": {k: o.state_dict() for k, o in model.optimisers.items()},
                 "scaler": self.machine.scaler.state_dict(), "batches": batches.state_dict(),
                 "rng": self.machine.rng_state()}
        if self.main:
            try:
                torch.save(state, self.folder / f"{name}.tmp")
                os.replace(self.folder / f"{name}.tmp", self.folder / name)
            except (OSError, RuntimeError) as error:        # torch reports a full disk as a RuntimeError
                (self.folder / f"{name}.tmp").unlink(missing_ok=True)
                raise UserError(f"step {step}: {self.folder / name} cannot be written ({str(error).splitlines()[0][:80]}); the "
                                "last one saved is whole") from None


def earlier_commands(path):
    """The commands of a run's config.json, the first one first; none where there is no such file, or a damaged one."""
    try:
        before = json.loads(path.read_text())
        return [*before.get("earlier_commands", ()), before["command"]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []


def load_checkpoint(path, file):
    """The checkpoint in a run's folder (or the .pt itself), as plain data on the CPU. Raises UserError if it is absent,
    damaged, from another of the paper files, or a pickle that would run code (`weights_only`: refused, not run)."""
    path = pathlib.Path(path)
    path = path / "last.pt" if path.is_dir() or path.suffix != ".pt" else path
    if not path.is_file():
        raise UserError(f"--resume: there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        with zipfile.ZipFile(path) as whole:                # its checksums: torch.load lets a flipped bit in a tensor pass
            damaged = whole.testzip() is not None
    except pickle.UnpicklingError:
        raise UserError(f"--resume: {path} is not a checkpoint of plain tensors and values, so it was refused") from None
    except Exception:                                       # half a dozen kinds, depending on which byte it is
        damaged = True
    if damaged:
        raise UserError(f"--resume: {path} is damaged or truncated; an older best.pt may still be whole")
    keys = {"file", "model", "config", "step", "weights", "optimisers", "scaler", "batches", "rng", "best"}
    if not isinstance(state, dict) or not keys <= set(state):
        raise UserError(f"--resume: {path} is not a checkpoint of {file}.py")
    if state["file"] != file:
        raise UserError(f"--resume: {path} was written by {state['file']}.py, not by {file}.py")
    return state


def restore(state, model, batches, machine):
    """Puts a checkpoint back. Raises UserError if the networks are not those it was saved from."""
    try:
        model.load_state_dict(state["weights"])
        for name, optimiser in model.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError("--resume: the checkpoint's networks are of another shape than the settings ask for ("
                        + str(error).strip().splitlines()[-1].strip() + ")") from None
    if state["scaler"]:                                     # empty where the run was not of fp16 so far
        machine.scaler.load_state_dict(state["scaler"])
    if batches is not None:
        batches.load_state_dict(state["batches"])
        machine.set_rng_state(state["rng"])


def best_so_far(state, config, folder):
    """What best.pt was kept by, of a resumed run; None if another protocol decides from here on, or in a new folder."""
    same = all(state["config"].get(name) == getattr(config, name) for name in ("inception", "samples"))
    return state["best"] if same and (pathlib.Path(folder) / "best.pt").exists() else None


def folder_of(args, default):
    """The run's folder: `--out`, or the one that `--resume` names, by itself or by a checkpoint in it, or the default."""
    resumed = args["resume"] and pathlib.Path(args["resume"])
    resumed = resumed.parent if resumed and resumed.is_file() else resumed
    out = args["out"] and pathlib.Path(args["out"])
    if out and resumed and out.resolve() != resumed.resolve() and out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out} holds something else; give a new folder, or leave it out to go on in {resumed}")
    folder = pathlib.Path(out or resumed or default)
    place = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):                 # said before the work begins
        raise UserError(f"cannot write to the run folder {folder}: {place} is no folder that may be written to; choose another "
                        "with --out")
    return folder


def set_length(config, batches, state):
    """Fills in what follows from the data: steps an epoch, and steps, of a resumed run no fewer than it has behind it."""
    config.steps_per_epoch = batches.steps_per_epoch
    config.steps = config.steps or math.ceil(config.epochs * batches.steps_per_epoch)
    if state is not None:
        config.steps = max(config.steps, state["step"])


def refuse(args, config, names):
    """Raises UserError for a flag among `names` that was given: the model has no use for it."""
    for name in names:
        if args[name] is not None:
            raise UserError(f"--{name.replace('_', '-')} does nothing for --model {config.model} on {config.dataset}; "
                            "leave it out")


FREE = ("root", "steps", "epochs", "amp", "compile", "eval_every", "samples", "inception")  # may change on resuming


def at_least(least, kind=int):
    """A flag's type: numbers from `least` up, and below 2^63 (so no infinity)."""
    def convert(text):
        value = kind(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} must be a number from {least} up")
        if value >= 2 ** 63:
            raise argparse.ArgumentTypeError(f"{text} is too large")
        return value
    convert.__name__ = kind.__name__
    return convert


def some_path(text):
    """A flag's type: not the empty string, which is what an unset variable of the shell leaves."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path was given")
    return text


def shared_flags(parser, models):
    """The flags that mean the same in all three files. None where not given: the preset, or the resumed run, decides.

    Returns the group of those of which only one may be given, since each does something else instead of training.
    """
    for name, kind, text in (
            ("model", str, ", ".join(models)), ("dataset", str, "a name (python data.py --help) or a folder of pictures"),
            ("root", str, "where data sets lie or are downloaded to (data)"), ("steps", at_least(1), "training steps"),
            ("epochs", at_least(0, float), "training length where --steps is not given"),
            ("batch", int, "images per step and rank"), ("size", int, "pixels"),
            ("width", int, "channels of the first layer"), ("latent", int, "code dimensions"),
            ("lr", float, "learning rate (networks with rates of their own keep the ratio)"), ("seed", at_least(0), "(0)"),
            ("eval-every", at_least(1), "steps between evaluations"), ("samples", int, "generated images per evaluation"),
            ("inception", str, "weights for fid: a path, or 'auto' to download")):
        parser.add_argument(f"--{name}", type=kind, metavar="X", help=text)
    parser.add_argument("--amp", choices=("auto", "off", "bf16", "fp16"), help="autocast (auto: bf16 where native)")
    parser.add_argument("--compile", action="store_true", default=None, help="torch.compile the networks")
    parser.add_argument("--device", default="auto", metavar="X", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--out", type=some_path, metavar="DIR", help="folder of the run (runs/FILE-MODEL-DATASET-sSEED)")
    parser.add_argument("--resume", type=some_path, metavar="RUN", help="continue the run in this folder")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--sample", type=at_least(1), metavar="N", help="with --resume: only draw N samples into RUN/drawn")
    instead.add_argument("--bench", type=at_least(1), metavar="N", help="only time N steps (a multiple of 5); prints JSON")
    return instead


def settings(args, state, preset):
    """Config from the flags given: over the preset, or over a resumed run's own, of which only FREE may change.

    A rate or weight whose companions have values of their own ("lr": "lr_e", "lr_d") takes them along, in proportion.
    Raises UserError for a flag that asks for another model than the checkpoint holds, and for a dataset there is not.
    """
    if args["dataset"] is not None:
        args["dataset"] = whole_name(args["dataset"])
    if state is None:
        config = preset(args["model"], args["dataset"])
    else:
        try:
            config = type(preset(None, None))(**state["config"])
        except TypeError:
            raise UserError("--resume: the checkpoint's settings are of another version of this file") from None
    given = {f.name: args[f.name] for f in dataclasses.fields(config) if args.get(f.name) is not None}
    for name, value in given.items():
        before = getattr(config, name)
        moved = name == "dataset" and os.path.isabs(before) and os.path.isabs(value)       # a folder, which may have moved
        if state is not None and value != before and name not in FREE and not moved:
            raise UserError(f"--resume: the run has {name} {before}, not {value}; leave --{name.replace('_', '-')} out")
        setattr(config, name, value)
        for other in (f"{name}_e", f"{name}_d") if state is None and before else ():
            if other in vars(config):
                setattr(config, other, getattr(config, other) * value / before)
    if "epochs" in given and "steps" not in given:
        config.steps = 0                                    # a length in epochs replaces a preset length in steps
    return config


def versions():
    """Python, torch, torchvision and git revision, as config.json and the results keep them."""
    def ask(*command):
        try:
            here = pathlib.Path(__file__).resolve().parent
            return subprocess.run(["git", *command], cwd=here, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""
    revision = ask("rev-parse", "--short", "HEAD") + ("+" if ask("status", "--porcelain", "-uno") else "")
    return {"python": sys.version.split()[0], "torch": torch.__version__, "torchvision": torchvision.__version__,
            "revision": revision or None, "threads": torch.get_num_threads()}


def whole_name(dataset):
    """The name of a set, or the absolute path of a folder, from anywhere the same. Raises UserError if it is neither."""
    try:
        from data import IMAGE_SETS, POINT_SETS, load
    except ModuleNotFoundError:                             # a file alone can still --bench
        return dataset
    if dataset in IMAGE_SETS + POINT_SETS:
        return dataset
    folder = os.path.expanduser(dataset)
    if not os.path.isdir(folder):
        load(dataset)                                       # says what is wrong with it
    return os.path.abspath(folder)


def compile_networks(model):
    """torch.compile, in place, of each network: state-dict keys stay what they were."""
    torch._functorch.config.donated_buffer = False          # one forward is differentiated for several losses: keep it
    torch._dynamo.config.cache_size_limit = 64              # of all networks in all their modes together; 8 are too few
    for network in model.children():
        network.compile()


def apart(network, y):
    """`network(y)`, of which its running BN statistics, with which a model samples and encodes, take no notice."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 0.
    out = network(y)
    for norm in norms:
        norm.momentum = .1
    return out


def load_both(config, machine):
    """The training and the test set of `config.dataset` (data.Dataset). Raises UserError if they do not go together."""
    from data import load

    train_set, test_set = machine.in_turn(lambda: [load(config.dataset, config.root, config.size or None, split)
                                                   for split in ("train", "test")])
    if train_set.kind == "images" and train_set.channels != test_set.channels:
        raise UserError(f"--dataset {config.dataset}: training pictures have {train_set.channels} channels, test pictures "
                        f"{test_set.channels}; make all grey or all coloured")
    return train_set, test_set


class CountFlops(TorchDispatchMode):
    """Floating-point operations of the convolutions and matrix products run under it, backwards included."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        count = flop_registry.get(function._overloadpacket)
        self.total += count(*args, **(kwargs or {}), out_val=out) if count else 0
        return out


def benchmark(model, x, steps, compiled=False):
    """images/s, FLOP/s and peak memory of `model.step(x)`, after warming up, over `steps` steps (up to the next multiple of 5:
    not all need be alike, WGAN's G moves at each fifth)."""
    cuda, steps = x.device.type == "cuda", -(-steps // 5) * 5
    with CountFlops() as counter:                           # before compiling, which hides single operations
        for _ in range(5):
            model.step(x)
    flops = counter.total / 5
    if compiled:
        compile_networks(model)
    for _ in range(5):
        model.step(x)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for _ in range(steps):
        model.step(x)
    if cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / steps
    peak = torch.cuda.max_memory_allocated() if cuda else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)      # bytes, KiB
    return {"steps": steps, "images_per_s": round(len(x) / seconds, 1), "ms_per_step": round(seconds * 1e3, 2), "batch": len(x),
            "gflop_per_step": float(f"{flops / 1e9:.4g}"),
            "tflop_per_s": float(f"{flops / seconds / 1e12:.3g}"), "peak_memory_mib": peak >> 20}


def save_grid(path, x, columns=10):
    """Images (n, C, S, S) in [-1, 1] as one picture, row by row."""
    torchvision.utils.save_image(x.float().cpu(), path, nrow=columns, normalize=True, value_range=(-1, 1), padding=1)


def draw_images(model, folder, n):
    """n samples as FOLDER/drawn/NNNNNN.png, without those of an earlier call, and the first hundred as FOLDER/drawn.png."""
    drawn = pathlib.Path(folder) / "drawn"
    drawn.mkdir(parents=True, exist_ok=True)
    for old in drawn.glob("*.png"):
        old.unlink()
    for start in range(0, n, 250):
        images = model.sample(min(250, n - start))
        if start == 0:
            save_grid(drawn.with_suffix(".png"), images[:100])
        for i, image in enumerate(images, start):
            torchvision.utils.save_image(image, drawn / f"{i:06d}.png", normalize=True, value_range=(-1, 1))


def draw_curves(path, curves, title):
    """{name: [(x, y), ...]} as line plots over one pair of axes, y from 0; a PNG, drawn with pillow."""
    from PIL import Image, ImageDraw

    wide, high, left, base, top = 640, 400, 60, 370, 30
    colours = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f"]
    points = [p for curve in curves.values() for p in curve]
    x_max, y_max = max(p[0] for p in points) or 1, max(p[1] for p in points) or 1
    place = lambda p: (left + p[0] / x_max * (wide - left - 20), base - p[1] / y_max * (base - top))
    picture = Image.new("RGB", (wide, high), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((left, 8), title, fill="black")
    for part in (0, .25, .5, .75, 1):
        (_, y), (x, _) = place((0, part * y_max)), place((part * x_max, 0))
        draw.line((left, y, wide - 20, y), fill="#dddddd")
        draw.text((6, y - 6), f"{part * y_max:.4g}", fill="black")
        draw.text((x - 8, base + 8), f"{part * x_max:.4g}", fill="black")
    for n, (name, curve) in enumerate(curves.items()):
        draw.line([place(p) for p in curve], fill=colours[n % len(colours)], width=2)
        draw.text((wide - 150, top + 14 * n), name, fill=colours[n % len(colours)])
    picture.save(path)


def loop(config, machine, model, batches, run, start, best, evaluate):
    """Steps start + 1 .. config.steps: one batch, one `model.step`, and now and then a log line, an evaluation, a save.

    evaluate(step, epoch) -> metrics; the file's `score_of` says by which of them, the less the better, best.pt is kept.
    """
    metrics, text = {}, ""
    run.start_clock(start)
    if start == config.steps and machine.rank == 0:
        print(f"the run is at step {start} already; --steps beyond that would continue it", file=sys.stderr)
    if start == 0:
        run.save("last.pt", FILE, model, 0, batches, dataclasses.asdict(config), best)      # resumable from any kill
    for step in range(start + 1, config.steps + 1):
        run.add(step, model.step(next(batches)[0]))
        leave, last, epoch = run.interrupted(step), step == config.steps, step / batches.steps_per_epoch
        evaluated = step % config.eval_every == 0 or last
        saved = evaluated or step % SAVE_EVERY == 0 or leave
        if step % LOG_EVERY == 0 or saved:                          # a loss that is not finite ends the run here
            losses, rate = run.flush(), run.images_per_s(step, config.batch)
            run.log(step, epoch=round(epoch, 3), img_per_s=rate, **losses)
            text = "  ".join(f"{k} {v:.3f}" for k, v in losses.items()) + f"  {rate:.0f} img/s"
        run.status(step, config.steps, text)
        bad = saved and next((name for name, p in model.named_parameters() if not p.isfinite().all()), None)
        if bad:                                                     # its last update: the losses have not shown it yet
            raise run.not_finite(step, f"the weights '{bad}' are not finite")
        if evaluated:
            if machine.rank == 0:
                try:
                    metrics = evaluate(step, epoch)
                except FloatingPointError as error:                 # what is generated or encoded overflows
                    raise run.not_finite(step, error) from None
                run.say(step, metrics)
            machine.barrier()
            score = score_of(metrics)
            if machine.agree(score is not None and (best is None or score <= best)):
                best = score
                run.save("best.pt", FILE, model, step, batches, dataclasses.asdict(config), best)
            run.since, run.counted = time.time(), step              # images/s are of training alone
        if saved:
            run.save("last.pt", FILE, model, step, batches, dataclasses.asdict(config), best)
        if leave:
            raise Interrupted(f"stopped at step {step} and saved; continue with --resume {run.folder}", run.signal)
    return metrics


def run_cli(main):
    """Calls `main()` and turns what can go wrong into a sentence and an exit code: 2 for what the user can mend (memory
    included), 3 for a number that is not finite. Anything else is a defect of ours and keeps its traceback."""
    try:
        return main()
    except ValueError as error:
        if type(error).__name__ != "UserError":             # data.py and metrics.py define theirs, each file being whole
            raise
        print(f"{pathlib.Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name not in ("data", "metrics"):
            raise
        print(f"{pathlib.Path(sys.argv[0]).name}: put {error.name}.py beside it, which training needs", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            what = f"--compile failed ({str(error).splitlines()[0][:80]}): it needs a C++ compiler or Triton; leave it out"
        elif any(sign in str(error) for sign in ("allocate memory", "out of memory", "size calculation overflowed")):
            what = "out of memory; try a smaller --batch, --width, --latent, --size or number of samples"
        else:
            raise
        print(f"{pathlib.Path(sys.argv[0]).name}: {what}", file=sys.stderr)
        return 2
    except NotFinite as error:
        print(f"\n{pathlib.Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 3
    except Interrupted as error:
        print(f"\n{pathlib.Path(sys.argv[0]).name}: {error.args[0]}", file=sys.stderr)
        return 128 + error.args[1]
    except OSError as error:                                # no permission, a full disk, a name too long
        if error.errno is None:
            raise
        print(f"{pathlib.Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:                               # before the loop, when there is nothing to save yet
        return 128 + signal.SIGINT
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ======================================================================================================================
# End of the plumbing
# ======================================================================================================================


# ======================================================================================================================
# Training
# ======================================================================================================================


NEAR = .05                                                          # a ninth of the gap between two turns of the roll


class PointMetrics:
    """What metrics.Evaluator is for images, for points: how far samples and reconstructions lie from the manifold."""

    def __init__(self, test_set, samples):
        self.test, self.samples, self.roll = test_set, samples, test_set.name == "swissroll"
        self.manifold = spiral() if self.roll else test_set.x[:5000]

    def __call__(self, model):
        """gen_dist and rec_dist: mean distance of samples and reconstructions to the manifold; gen_gap: of the manifold to
        the samples; chamfer: gen_dist + gen_gap; coverage, rec_coverage: share of the manifold with a sample, or
        reconstruction, within NEAR; mse of the test points."""
        from metrics import reconstruction_mse

        points = model.decode(model.generated_codes(model.prior(self.samples, seed=1))).cpu()
        x_hat = model.reconstruct(self.test.x).cpu()
        there, back = chamfer(points, self.manifold)
        rec_there, rec_back = chamfer(x_hat, self.manifold)
        share = lambda distance: (distance <= NEAR).double().mean().item()
        what = "the roll's curve" if self.roll else "the test points"
        return {"chamfer": (there.mean() + back.mean()).item(), "gen_dist": there.mean().item(), "gen_gap": back.mean().item(),
                "coverage": share(back), "rec_dist": rec_there.mean().item(), "rec_coverage": share(rec_back),
                "mse": reconstruction_mse(self.test.x, x_hat),
                "protocol": f"distances between {self.samples} samples and {len(self.manifold)} points of {what}, "
                            f"coverage within {NEAR}; mse, rec: {len(x_hat)} {self.test.split} points, in the data's units"}


def code_metrics(model, x, n_geometry=1000):
    """latent_fd: Frechet distance of generated codes to those of x (n, ...), of a VAE to draws from its posterior; and
    `geometry` of the first thousand codes."""
    from metrics import frechet_distance_features

    codes_by = lambda encode: torch.cat([encode(part).cpu() for part in x.split(250)])
    code = codes_by(model.encode)
    drawn = codes_by(model.latents) if isinstance(model, VAE) else code
    made = torch.cat([model.generated_codes(part).cpu() for part in model.prior(len(x), seed=2).split(250)])
    few = min(n_geometry, len(x))
    result, protocol = {"latent_fd": frechet_distance_features(drawn, made)}, f"latent_fd: {len(x)} codes vs {len(x)} generated"
    if few > 24:                                                    # or else twelve neighbours are half of all
        result |= geometry(x[:few].cpu(), code[:few], model.config.dataset == "swissroll")
        protocol += f"; rank_corr, trust (k = 12): {few} items"
    return result, protocol


def evaluate(model, evaluator, run, step, epoch, test, classes, config):
    """Pictures and metrics of one moment; on rank 0, and without disturbing the training's random numbers."""
    began, device = time.time(), model.machine.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)                                        # evaluations compare models, not draws
        (figures_images if config.size else figures_points)(model, run, step, *test, classes)
        phase_1 = config.first_phase(step)
        # in the first phase g has not been trained: what it makes says nothing
        metrics = evaluator(None if phase_1 else model.sample, model.reconstruct) if config.size else evaluator(model)
        codes, protocol = code_metrics(model, test[0])
    metrics |= codes | {"protocol": "; ".join(part for part in (metrics["protocol"], protocol) if part)}
    if phase_1:
        metrics["phase"] = "autoencoder"
    metrics["eval_s"] = round(time.time() - began, 1)
    run.log(step, epoch=round(epoch, 3), **metrics)
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    for name in ("mse", "chamfer", "fid", "fcd", "latent_fd"):
        about_g = name != "mse"
        curve = [(line["epoch"], line[name]) for line in lines if name in line and not (about_g and "phase" in line)]
        if len(curve) > 1:
            draw_curves(run.folder / f"figures/{name}.png", {config.model: curve}, f"{name} by epoch, {config.dataset}")
    return metrics


def score_of(metrics):
    """What best.pt is chosen by, the less the better: chamfer of points, else the first of fid, fcd, kl, mse; None in the
    first phase, whose samples come from an untrained g (D5)."""
    if "phase" in metrics:
        return None
    return next((metrics[name] for name in ("chamfer", "fid", "fcd", "kl", "mse") if name in metrics), None)


def train(config, machine, folder, state=None):
    """Trains `config` in `folder`, from a checkpoint's `state` if given. Returns the last evaluation's metrics."""
    from data import Batches, ordered
    from metrics import Evaluator

    train_set, test_set = load_both(config, machine)
    batches = Batches(train_set, config.batch, machine.device, config.size or None, config.seed, machine.rank, machine.world)
    config.channels = train_set.x.shape[1] if config.size == 0 else train_set.channels
    set_length(config, batches, state)
    config.eval_every = config.eval_every or max(1, math.ceil(config.steps / 12))
    # a resumed run keeps its own boundary, however long it is now to be
    if config.map_from is None:
        config.map_from = max(1, min(round(config.ae_share * config.steps), config.steps - 1))
    if state is not None and state["step"] < config.steps and config.first_phase(config.steps):
        raise UserError(f"--steps {config.steps} ends within the first phase, and g would stay untrained: this run needs more "
                        f"than {config.map_from}")
    config.check()
    model, start, best = build(config, machine), 0, None
    evaluator = None
    if machine.rank == 0:
        evaluator = PointMetrics(test_set, config.samples) if config.size == 0 else \
            Evaluator(train_set, test_set, config.size, machine.device, config.root, config.samples, config.inception or None,
                      fid_on_train=len(train_set))
    run = Run(folder, dataclasses.asdict(config), machine, resume=state is not None)
    shown = 5000 if config.size == 0 else 2000
    test = next(ordered(test_set, shown, shown, "cpu", config.size or None))
    machine.seed_ranks()
    if state is not None:
        restore(state, model, batches, machine)
        start, best = state["step"], best_so_far(state, config, folder)
        run.forget_after(start)
    if config.compile:
        compile_networks(model)

    with run:
        return loop(config, machine, model, batches, run, start, best, lambda step, epoch: evaluate(
            model, evaluator, run, step, epoch, test, train_set.classes, config))


def draw(config, machine, state, folder, n):
    """`--sample`: n images as PNGs and a grid of the first hundred, or n points as a table, from a checkpoint alone."""
    if config.first_phase(state["step"]):
        raise UserError(f"--sample: step {state['step']} is in the first phase, and g untrained; train beyond step "
                        f"{config.map_from}")
    model = build(config, machine)
    restore(state, model, None, machine)
    machine.seed_ranks()
    folder = pathlib.Path(folder)
    if config.size == 0:
        points = model.sample(n).cpu()
        (folder / "drawn").mkdir(parents=True, exist_ok=True)
        (folder / "drawn/points.csv").write_text("".join(",".join(f"{v:.6g}" for v in row) + "\n" for row in points.tolist()))
        torchvision.utils.save_image(scatter(points, torch.zeros(n, dtype=torch.long), 1, 1.2 * points.abs().max()),
                                     folder / "drawn.png")
    else:
        draw_images(model, folder, n)
    print(f"{n} samples of step {state['step']} in {folder / 'drawn'}")


def unused_flags(config):
    """The flags that mean nothing to `config.model`."""
    flags = ["inception"] if config.size == 0 else []
    if config.omega1 == config.omega2 == 0:
        flags += ["gamma", "lam"]
    if config.method != "latentmap":
        flags += ["joint", "gamma", "lam", "omega1", "omega2"]
    if config.method not in ("latentmap", "aae"):
        flags.append("recon")
    return flags


def main(argv=None):
    """The command line; returns the exit code."""
    parser = Parser(prog=f"{FILE}.py", description=__doc__.splitlines()[0])
    shared_flags(parser, MODELS)
    parser.add_argument("--joint", action="store_true", default=None, help="autoencoder and map in every step (D5)")
    parser.add_argument("--recon", choices=("l2", "l1"), help="reconstruction error: Eq. (10)'s, or the author code's (D1)")
    parser.add_argument("--prior", choices=("gauss", "sphere"), help="of the map, or of the codes (D4)")
    parser.add_argument("--gamma", type=float, metavar="X", help="share of the data in what d should call lam (.2)")
    parser.add_argument("--lam", type=float, metavar="X", help="what d should call it (.2)")
    parser.add_argument("--omega1", type=float, metavar="X", help="weight of ||d(x_mu)||^2 (1)")
    parser.add_argument("--omega2", type=float, metavar="X", help="weight of ||d(x^)||^2 (1)")
    args = vars(parser.parse_args(argv))
    if args["sample"] and not args["resume"]:
        raise UserError("--sample needs --resume RUN, the run to draw from")
    state = load_checkpoint(args["resume"], FILE) if args["resume"] else None
    config = settings(args, state, preset)
    config.check()
    refuse(args, config, unused_flags(config))
    machine = Machine(args["device"], config.amp, config.seed)
    if args["bench"]:
        config.map_from = None                                      # all of it in the first phase, the dearer one
        shape = [config.batch, config.channels] + ([config.size] * 2 if config.size else [])
        x = torch.rand(shape, device=machine.device) * 2 - 1
        timed = benchmark(build(config, machine), x, args["bench"], config.compile)
        if machine.rank == 0:
            print(json.dumps({"model": config.model, "size": config.size, "width": config.width, "device": str(machine.device),
                              "world": machine.world, "precision": machine.amp, "compiled": config.compile} | timed))
        return 0
    name = pathlib.Path(config.dataset).name
    folder = folder_of(args, f"runs/{FILE}-{config.model}-{name}-s{config.seed}")
    if args["sample"]:
        if machine.rank == 0:
            draw(config, machine, state, folder, args["sample"])
    else:
        train(config, machine, folder, state)
        if machine.rank == 0:
            print(f"run: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
