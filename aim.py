"""Adversarial Inference by Matching priors and conditionals (AIM) and its baselines, in one file.

    "AIM: Adversarial Inference by Matching Priors and Conditionals." Anonymous authors, under double-blind review.
    Sections, equations, tables and figures are this version's.

The idea. A GAN maps codes to data and cannot go back. AIM trains an encoder beside it, so that the generator's joint
p(z) p(x|z) and the encoder's q(x) q(z|x) agree: priors of the codes and conditionals of the data, Eq. (1), the KL divergences
E_p(z) KL(p(x|z) || q(x|z)) + KL(p(z) || q(z)). Neither can be sampled; but up to the constant entropy of the prior their sum
is E_p(z) KL(p(x|z) || q(x)) + E[-log q(z|x)], Eq. (3). The first term is a GAN on the data; the second is a Gaussian
likelihood of the code that made an image, E(G(z)) against z. So the data are never reconstructed in training, there is no
norm between images to blur them, and a generator that sends many codes to one image (mode collapse) pays for it. E reads D's
features without training them, which keeps it small; the variance it predicts says how well an image tells each coordinate.

Notation.   paper             here          shape
            x ~ q(x)          x             (B, C, S, S) in [-1, 1], or points (B, 2)
            z ~ p(z)          z             (B, d), N(0, I)
            x~ = G(z)         x_tilde       like x; the generator is deterministic (Sec. 5)
            D_feature         h             (B, 128, 7, 7), (B, 1024, 4, 4) or (B, 200)
            rho_q, rho_p      rho_q, rho_p  (B,), before the sigmoid: logits of D_con(D_feature(x)), D_con(D_feature(x~))
            mu, sigma^2       mu, log_var   (B, d) each, E(D_feature(x~))
            lambda            lam           1/d (Sec. 5); 1 with Eq. (6)

Algorithm 1 (one call of `AIM.step`).
    z ~ p(z); x~ = G(z); h, h~ = D_feature(x), D_feature(x~); mu, sigma^2 = E(h~)   forwards made once, for all three losses
    L_d = -log D_con(h) - log(1 - D_con(h~));  L_g = -log D_con(h~);  L_e = lam L(z, mu, sigma^2), Eq. (8)
    D_feature, D_con:  down L_d;      G, E:  down L_g + L_e      (L_e reaches G through D_feature, whose weights stay put)
Algorithm 2: `encode` (the posterior mean), `reconstruct`, `neighbours` (images of codes drawn from the posterior).

Where this file departs from the paper, or had to choose (D1...):
  D1  Table 3 prints 3 channels for MNIST's generated images, while D takes 1: G makes as many as the data have. Paddings are
      not printed: the stride-2 convolutions pad 1 (576 = 64 x 3 x 3 confirms it); in Table 4's E the 2 x 2 convolution pads
      1, the 1 x 1 none, which gives the table's 512 = 128 x 2 x 2. No bias before a BN, which would undo it.
  D2  E predicts log sigma^2, clamped to [-10, 10] (paper silent).
  D3  Both gradients are taken from the one forward and applied afterwards, as Algorithm 1 prints it: all losses are computed
      before any network moves. (Most GAN code moves D first and asks the new D for G's loss.)
  D4  The 2-D networks and their training are not printed. Here: those of ALI's 2-D experiment, which the paper repeats (G: four
      layers of 400 with BN and ReLU; D: three maxout layers of 200 with 5 pieces, the first two as D_feature), and for E the
      two-layer heads of Table 3, 200 wide, without BN. ALI's beta1 .8, batch of 100; ours: alpha 5e-4, 30 epochs, and initial
      weights with the biases spread over the data and sigma = 1 at first. With the tables' N(0, .02) and zero biases
      (`--std .02`) every kink of D goes through the origin, and finding the modes takes longer.
  D5  Table 3's images lie in [0, 1] (G ends in a sigmoid); everywhere else in these files they lie in [-1, 1]. The
      conversion is the last layer of G and the first of D_feature, so the layers between are the paper's.
  D6  `aim-fgan`, Eq. (6), minimises the printed value function for G as well; the paper warns that its gradient vanishes. As
      printed it bounds KL(q(x) || p(x)); Eq. (3) asks for the other direction.
  D7  ALI and ALICE are trained here; the paper quotes them. G is AIM's; E is D_feature and E of the tables with weights of
      their own; D sees x and z: for images D_feature, its output and z joined before Table 3's D_con (as wide at 64 pixels);
      for points x and z joined at the input. G and E minimise the non-saturating form of the game. Both reconstruct, as AIM
      does, from the posterior's mean.
  D8  ALICE adds ||x - G(z)||_k^k, z ~ q(z|x), as a mean over numbers, `--k 2` (squared) by default, times lam = 1; `alice-adv`
      learns the cycle by a second discriminator on the pairs (x, x) and (x, G(z)) instead.
  D9  BN's scales start at 1 (paper: weights N(0, .02), biases 0; silent on BN). G's running statistics, which `sample` uses,
      follow draws of the prior alone, not ALICE's G(z), z ~ q(z|x).
  D10 Table 1's inception scores of MNIST are by "the pre-trained classifier from Li et al. (2017)", a TensorFlow file. `is_li`
      is by that network trained anew (metrics.LI; ten minutes or more on a CPU, once); `is`, as in the other files, by the
      small one.

Run it.  python aim.py                                      AIM on the grid of 25 Gaussians (Fig. 3, Table 2), minutes, offline
         python aim.py --model gan                          ... and its baselines: gan, ali, alice, alice-adv
         python aim.py --dataset mnist                      Table 3: 28 x 28, 400 epochs (first it trains D10's classifier)
         python aim.py --dataset mnist --latent 2           Fig. 4: codes by class and the decoded manifold
         python aim.py --dataset cifar10 --model aim-minus  Table 4: 64 x 64, 300 epochs; sigma = 1
What to expect: of `python aim.py`, on two CPU cores, all 25 modes and 85 to 90 % of samples within 3 sigma, in 4 to 7 minutes.
README.md has the command and the protocol of each number.
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

FILE = "aim"

# ======================================================================================================================
# Settings
# ======================================================================================================================


@dataclasses.dataclass
class Config:
    """Every setting of a run. The values below are the paper's for CIFAR-10 and CelebA (Table 4)."""

    model: str = "aim"
    dataset: str = "grid25"
    root: str = "data"
    size: int = 64                  # pixels: 64 takes the networks of Table 4, 28 those of Table 3, 0 the 2-D ones (D4)
    channels: int = 3               # set from the data; of points their dimension
    width: int = 128                # channels of D's first convolution: Table 4 (64: Table 3; 400, G's layers: 2-D)
    latent: int = 64                # Table 4
    batch: int = 100                # Tables 3 and 4
    epochs: float = 300             # Table 4; `steps` wins where it is given
    steps: int = 0
    steps_per_epoch: int = 0        # set from the data
    lr: float = 2e-4                # Tables 3 and 4: alpha
    beta1: float = 0.5              # Tables 3 and 4
    beta2: float = 0.999            # Adam's own (paper silent)
    decay: str = "sqrt"             # Tables 3 and 4: alpha / sqrt(t), t = epoch; "none" keeps alpha
    std: float = 0.02               # Tables 3 and 4: initial weights; 0: as D4 has them
    reach: float = 1.0              # D4: the points' extent
    lam: float | None = None        # None: 1/d (Sec. 5)
    value: str = "gan"              # the adversarial game: "gan" is Eq. (7), "fgan" Eq. (6)
    encoder: bool = True            # without one AIM is the GAN
    fixed_variance: bool = False    # AIM-: sigma = 1 (Sec. 5.1)
    joint: bool = False             # ALI, ALICE: the game is played on (x, z) (D7)
    k: float = 2.0                  # ALICE: the norm of its explicit cycle (D8)
    adversarial_cycle: bool = False  # ALICE: the cycle is learnt by a second discriminator (D8)
    seed: int = 0
    amp: str = "auto"
    compile: bool = False
    eval_every: int = 0             # steps; 0: ten epochs or a twelfth of the run, whichever is less
    samples: int = 10_000           # generated images (points) a metric is computed from
    inception: str = ""             # weights for fid: a path, "auto" to download, "" for none

    def check(self):
        """Raises UserError, in one sentence, for settings that cannot work."""
        if self.model not in MODELS:
            raise UserError(f"--model {self.model} is not one of {', '.join(MODELS)}")
        if self.size not in (0, 28, 64):
            raise UserError(f"--size {self.size}: the paper has networks for 28 (Table 3) and 64 pixels (Table 4)")
        if (self.size == 0) != (self.dataset in POINT_SETS):
            raise UserError(f"--size {self.size} does not suit {self.dataset}, which holds "
                            f"{'points' if self.size else 'images'}; leave it out")
        if not 2 <= self.width < 2 ** 48 or self.width % 2:
            raise UserError(f"--width {self.width} is not an even number from 2 up")
        for name, least in (("batch", 2), ("latent", 1), ("samples", 10), ("epochs", 1e-9)):
            if not least <= getattr(self, name) < 2 ** 48:
                raise UserError(f"--{name} {getattr(self, name)} is too {'large' if getattr(self, name) > least else 'small'}")
        if self.std == 0 and self.size:
            raise UserError("--std 0 is the initialisation of the 2-D networks; for images give a positive one (.02)")
        if not 0 <= self.beta1 < 1:
            raise UserError(f"--beta1 {self.beta1} must lie in [0, 1)")
        for name in ("lr", "lam", "k", "std"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"--{name} {getattr(self, name)} must be a number from 0 up")
        if not self.k >= 1:
            raise UserError(f"--k {self.k} is no norm: 1 (absolute) and 2 (squared) are the usual ones")


MODELS = {  # Tables 1 and 2: what each changes of Config
    "aim": dict(),
    "aim-minus": dict(fixed_variance=True),
    "aim-fgan": dict(value="fgan", lam=1.),                         # Eq. (6) needs no balance: lambda = 1 (Sec. 4.4)
    "gan": dict(encoder=False),                                     # AIM without E
    "ali": dict(joint=True, lam=0.),
    "alice": dict(joint=True, lam=1.),
    "alice-adv": dict(joint=True, lam=1., adversarial_cycle=True),
}
TABLE3 = dict(size=28, width=64, latent=32, epochs=400)
POINTS = dict(channels=2, size=0, width=400, latent=2, epochs=30, lr=5e-4, beta1=.8, std=0., samples=2500, amp="off")      # D4
DATASETS = {  # what a data set changes of Config, whose own values are Table 4's
    "grid25": POINTS | dict(reach=4.), "ring8": POINTS | dict(reach=2.), "swissroll": POINTS | dict(epochs=400),
    "mnist": TABLE3 | dict(channels=1, samples=50_000),             # Sec. 5.1: scores of 50,000 images
    "fashion-mnist": TABLE3 | dict(channels=1, samples=50_000),
    "digits": TABLE3 | dict(channels=1, steps=2400, eval_every=800),    # ours: minutes on two cores
    "stacked-digits": TABLE3 | dict(samples=26_000), "stacked-mnist": TABLE3 | dict(samples=26_000),
    "cifar10": dict(samples=50_000),                                # Sec. 5.1
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
# Networks (Table 4 for 64 pixels, Table 3 for 28, D4 for points, which is size 0)
# ======================================================================================================================


def init_weights(model, std, reach):
    """Tables 3 and 4: weights N(0, std), biases 0; BN as it comes, scale 1 and shift 0 (D9). std 0: the points' (D4)."""
    for module in model.modules():
        if std == 0:                                                # FC layers stay as torch draws them
            if isinstance(module, nn.BatchNorm1d):
                nn.init.uniform_(module.bias, -1, 1)
            elif isinstance(module, Features):
                module[0].linear.bias.data *= reach                 # D's kinks lie all over the data, not at 0
            elif isinstance(module, Generator):
                module[-1].weight.data *= 2 * reach                 # and the first samples as well
            elif isinstance(module, Encoder) and module.log_var is not None:
                nn.init.zeros_(module.log_var[-1].weight)           # sigma starts at 1: where it starts small, 1 / sigma^2
                nn.init.zeros_(module.log_var[-1].bias)             # throws G before D has seen anything
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(module.weight, 0., std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class Maxout(nn.Module):
    """(B, n_in) -> (B, n_out): of `pieces` linear maps the largest, coordinate by coordinate (as one matrix product)."""

    def __init__(self, n_in, n_out, pieces=5):
        super().__init__()
        self.linear, self.shape = nn.Linear(n_in, pieces * n_out), (pieces, n_out)

    def forward(self, x):
        return self.linear(x).unflatten(1, self.shape).max(1).values


class Affine(nn.Module):
    """x -> scale * x + shift, with fixed numbers: between [0, 1] and [-1, 1] (D5)."""

    def __init__(self, scale, shift):
        super().__init__()
        self.scale, self.shift = scale, shift

    def forward(self, x):
        return x * self.scale + self.shift


def rows(*specs, slope=.2):
    """Rows of a table, in its own columns: (operation, inputs, outputs, kernel, stride, padding, BN?, nonlinearity).

    "relu", "leaky" (of that slope) or "" for linear; FC rows leave kernel, stride and padding out.
    """
    layers = []
    for make, c_in, c_out, *place, norm, activation in specs:
        layers.append(make(c_in, c_out, *place, bias=not norm))
        if norm:
            layers.append((nn.BatchNorm1d if make is nn.Linear else nn.BatchNorm2d)(c_out))
        if activation:
            layers.append(nn.ReLU(inplace=True) if activation == "relu" else nn.LeakyReLU(slope, inplace=True))
    return layers


def slope(size):
    """Of LeakyReLU: Table 3's or Table 4's."""
    return .1 if size == 28 else .2


class AsImage(nn.Module):
    """(B, d) -> (B, d, 1, 1), channels_last as the weights: the strides of a 1 x 1 image do not tell the two formats apart."""

    def forward(self, z):
        return z[:, :, None, None].to(memory_format=torch.channels_last)


class Generator(nn.Sequential):
    """G: z (B, d) -> images (B, C, S, S) in [-1, 1], S = 28 or 64, or, of size 0, points (B, C)."""

    def __init__(self, size, latent, channels, width):
        fc, up, w = nn.Linear, nn.ConvTranspose2d, width
        if size == 0:                                               # ALI's 2-D experiment: four layers of 400
            layers = rows((fc, latent, w, True, "relu"), *[(fc, w, w, True, "relu")] * 3, (fc, w, channels, False, ""))
        elif size == 28:                                            # Table 3
            layers = [*rows((fc, latent, 16 * w, True, "relu"), (fc, 16 * w, 98 * w, True, "relu")),
                      nn.Unflatten(1, (2 * w, 7, 7)),               # 6272 = 128 x 7 x 7
                      *rows((up, 2 * w, w, 4, 2, 1, True, "relu"), (up, w, channels, 4, 2, 1, False, "")),
                      nn.Sigmoid(), Affine(2, -1)]
        else:                                                       # Table 4
            layers = [AsImage(),
                      *rows((up, latent, 8 * w, 4, 1, 0, True, "relu"), (up, 8 * w, 4 * w, 4, 2, 1, True, "relu"),
                            (up, 4 * w, 2 * w, 4, 2, 1, True, "relu"), (up, 2 * w, w, 4, 2, 1, True, "relu"),
                            (up, w, channels, 4, 2, 1, False, "")), nn.Tanh()]
        super().__init__(*layers)


class Features(nn.Sequential):
    """D_feature: images -> (B, 2 w, 7, 7) at 28 pixels, (B, 8 w, 4, 4) at 64; points (B, C) -> (B, w / 2)."""

    def __init__(self, size, channels, width):
        conv, w = nn.Conv2d, width
        if size == 0:
            layers = [Maxout(channels, w // 2), Maxout(w // 2, w // 2)]
        elif size == 28:
            layers = [Affine(.5, .5), *rows((conv, channels, w, 4, 2, 1, False, "leaky"),
                                            (conv, w, 2 * w, 4, 2, 1, True, "leaky"), slope=slope(size))]
        else:
            layers = rows((conv, channels, w, 4, 2, 1, False, "leaky"), (conv, w, 2 * w, 4, 2, 1, True, "leaky"),
                          (conv, 2 * w, 4 * w, 4, 2, 1, True, "leaky"), (conv, 4 * w, 8 * w, 4, 2, 1, True, "leaky"),
                          slope=slope(size))
        super().__init__(*layers)


def fc_critic(n, hidden, width, size):
    """Table 3's D_con on (B, n): FC 1024, FC 64 (linear, as printed), FC 1. A list of layers -> (B, 1)."""
    return rows((nn.Linear, n, hidden, True, "leaky"), (nn.Linear, hidden, width, False, ""),
                (nn.Linear, width, 1, False, ""), slope=slope(size))


class Critic(nn.Sequential):
    """D_con: D_feature's output -> logits (B,), float32. The sigmoid of the tables is in the losses."""

    def __init__(self, size, width):
        if size == 0:
            layers = [Maxout(width // 2, width // 2), nn.Linear(width // 2, 1)]
        elif size == 28:
            layers = [nn.Flatten(), *fc_critic(98 * width, 16 * width, width, size)]
        else:
            layers = [nn.Conv2d(8 * width, 1, 4, 1, 0), nn.Flatten()]   # 4 -> 1
        super().__init__(*layers)

    def forward(self, h):
        return super().forward(h).squeeze(1).float()


class JointDiscriminator(nn.Module):
    """ALI's D: (x, z) -> logits (B,), float32 (D7)."""

    def __init__(self, size, channels, latent, width):
        super().__init__()
        self.points = size == 0
        if self.points:
            self.features, self.critic = Features(0, channels + latent, width), Critic(0, width)
        else:
            self.features, n = Features(size, channels, width), (98 if size == 28 else 128) * width
            w = width if size == 28 else width // 2                 # 64 in either table
            self.critic = nn.Sequential(*fc_critic(n + latent, 16 * w, w, size))

    def forward(self, x, z):
        if self.points:
            return self.critic(self.features(torch.cat([x, z], 1)))
        h = self.features(x).flatten(1)                             # (B, C, S, S) -> (B, n)
        return self.critic(torch.cat([h, z.to(h.dtype)], 1)).squeeze(1).float()


class Encoder(nn.Module):
    """E on D_feature's output: -> mu, log_var (B, d) each, float32; log_var is clamped (D2), or 0 where sigma = 1."""

    def __init__(self, size, latent, width, fixed_variance=False):
        super().__init__()
        conv, w, leak = nn.Conv2d, width, slope(size)
        if size == 0:
            self.trunk, n = nn.Identity(), w // 2
        elif size == 28:
            self.trunk, n = rows((conv, 2 * w, w, 4, 2, 1, True, "leaky"), slope=leak), 9 * w               # 576
        else:
            self.trunk = rows((conv, 8 * w, 4 * w, 4, 2, 1, False, "leaky"), (conv, 4 * w, 4 * w, 4, 2, 1, True, "leaky"),
                              (conv, 4 * w, 2 * w, 2, 1, 1, True, "leaky"), (conv, 2 * w, w, 1, 1, 0, True, "leaky"),
                              slope=leak)                           # 4 -> 2 -> 1 -> 2 -> 2
            n = 4 * w                                               # 512
        if size:
            self.trunk = nn.Sequential(*self.trunk, nn.Flatten())

        def head():
            return nn.Sequential(*rows((nn.Linear, n, w // 2, size > 0, "leaky"), (nn.Linear, w // 2, latent, False, ""),
                                       slope=leak))

        self.mu, self.log_var = head(), None if fixed_variance else head()

    def forward(self, h):
        h = self.trunk(h)
        mu = self.mu(h).float()
        return mu, torch.zeros_like(mu) if self.log_var is None else self.log_var(h).float().clamp(-10, 10)


# ======================================================================================================================
# Losses (one function per equation; means over the batch, to be minimised, unless said otherwise)
# ======================================================================================================================


def discriminator_loss(real, fake, value="gan"):
    """L_d: the value function of Eq. (7), or of Eq. (6) ("fgan"), negated. real, fake: D's outputs (B,) without sigmoid."""
    if value == "fgan":
        return (fake - 1).exp().mean() - real.mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()       # -log sigmoid(v) = softplus(-v)


def generator_loss(fake, value="gan"):
    """L_g: -log D(G(z)), the non-saturating form that Sec. 4.4 takes; for "fgan" Eq. (6) as it is (D6)."""
    return -(fake - 1).exp().mean() if value == "fgan" else F.softplus(-fake).mean()


def posterior_nll(z, mu, log_var):
    """Eq. (8): L(z, mu, sigma^2) = -log N(z; mu, sigma^2 I). (B, d) each -> (B,): summed over d, with its constant."""
    return ((z - mu).square() * torch.exp(-log_var) + log_var + math.log(2 * math.pi)).sum(1) / 2


def joint_loss(real, fake):
    """ALI's loss of G and E, non-saturating: each side wants to be taken for the other. Logits (B,) of (x, E(x)), (G(z), z)."""
    return F.softplus(real).mean() + F.softplus(-fake).mean()


def cycle_loss(x, x_hat, k=2):
    """ALICE's explicit cycle: the mean over all elements of |x - x_hat|^k (D8). Equal shapes -> a scalar, float32."""
    return (x.float() - x_hat.float()).abs().pow(k).mean()


def matching_objective(p, q):
    """Eq. (1) and the right side of Eq. (3), in nats, of two discrete joints p, q (X, Z), all positive.

    They differ by the constant -E log p(z), which is Proposition 1. Not used in training: for the tests and the reader.
    """
    p_z, q_z, q_x = p.sum(0), q.sum(0), q.sum(1, keepdim=True)      # (Z,), (Z,), (X, 1)
    p_x_given_z, q_x_given_z, q_z_given_x = p / p_z, q / q_z, q / q_x
    matching = (p * (p_x_given_z / q_x_given_z).log()).sum() + (p_z * (p_z / q_z).log()).sum()
    return matching, (p * (p_x_given_z / q_x).log()).sum() - (p * q_z_given_x.log()).sum()


# ======================================================================================================================
# The models
# ======================================================================================================================


class AIM(nn.Module):
    """AIM, AIM- and the GAN they build on: the same class, with terms switched off by `config`.

    Four verbs: `step(x)`, one iteration of Algorithm 1; `sample(n)`; `encode(x)`; `decode(z)`. Algorithm 2 adds
    `posterior(x)`, `reconstruct(x)` and `neighbours(x, m)`.
    """

    def __init__(self, config, machine=None):
        super().__init__()
        self.config, self.machine, self.iteration = config, machine or Machine(seed=config.seed), 0
        self.lam = 1 / config.latent if config.lam is None else config.lam          # Sec. 5: lambda = 1/d
        self.E = None
        self.networks(config)
        init_weights(self, config.std, config.reach)
        self.to(self.machine.device, memory_format=torch.channels_last)
        adam = dict(lr=config.lr, betas=(config.beta1, config.beta2), fused=self.machine.device.type in ("cpu", "cuda"))
        self.optimisers = {"D": torch.optim.Adam(self.d_params(), **adam),
                           "G": torch.optim.Adam(self.g_params(), **adam)}         # Alg. 1's (theta_g, theta_e)

    def networks(self, c):
        self.G = Generator(c.size, c.latent, c.channels, c.width)
        self.features, self.critic = Features(c.size, c.channels, c.width), Critic(c.size, c.width)
        if c.encoder:
            self.E = Encoder(c.size, c.latent, c.width, c.fixed_variance)

    def g_params(self):
        """What moves down L_g + L_e: G and E, and not D_feature, though E reads it."""
        return [*self.G.parameters(), *(self.E.parameters() if self.E is not None else ())]

    def d_params(self):
        return [*self.features.parameters(), *self.critic.parameters()]

    def get_extra_state(self):
        return self.iteration                                       # the learning rate's clock is part of a checkpoint

    def set_extra_state(self, iteration):
        self.iteration = iteration

    def learning_rate(self):
        """alpha / sqrt(t), t = 1, 2, ... the epoch (Tables 3 and 4)."""
        c = self.config
        epoch = 1 + (self.iteration // c.steps_per_epoch if c.steps_per_epoch else 0)
        return c.lr / math.sqrt(epoch) if c.decay == "sqrt" else c.lr

    def losses(self, x, z):
        """Alg. 1 down to the updates, on data x and codes z (B, d): {"d": for D, "g", "e": for G and E}."""
        c, x_tilde = self.config, self.G(z)
        h, h_tilde = self.features(x), self.features(x_tilde)       # apart: BN takes each batch's own statistics
        rho_q, rho_p = self.critic(h), self.critic(h_tilde)
        losses = {"d": discriminator_loss(rho_q, rho_p, c.value), "g": generator_loss(rho_p, c.value)}
        if self.E is not None:
            mu, log_var = self.E(h_tilde)                           # not detached: L_e trains G through D_feature
            losses["e"] = self.lam * posterior_nll(z, mu, log_var).mean()
        return losses

    def step(self, x):
        """One iteration of Algorithm 1 on data x. Returns its losses as scalars."""
        m, params_d, params_g = self.machine, self.d_params(), self.g_params()
        for optimiser in self.optimisers.values():
            for group in optimiser.param_groups:
                group["lr"] = self.learning_rate()
        z = torch.randn(len(x), self.config.latent, device=x.device)
        with m.autocast():
            losses = self.losses(x.to(memory_format=torch.channels_last) if x.dim() == 4 else x, z)
        # both gradients before either update: autograd refuses to go back through weights that have moved since (D3)
        grads_d = m.gradients(losses["d"], params_d, retain=True)
        grads_g = m.gradients(losses["g"] + losses.get("e", 0.), params_g)
        m.apply(self.optimisers["D"], params_d, grads_d)
        m.apply(self.optimisers["G"], params_g, grads_g)
        m.end_step()
        self.iteration += 1
        return {name: loss.detach() for name, loss in losses.items()}

    def infer(self, function, x):
        """`function(x)` with the networks in evaluation mode, without a graph."""
        training = self.training
        self.eval()
        with torch.no_grad(), self.machine.autocast():
            y = function(x.to(self.machine.device))
        self.train(training)
        return y

    def decode(self, z):
        """Codes (n, d) -> data (n, ...)."""
        return self.infer(self.G, z).float()

    def sample(self, n):
        """n images (n, C, S, S) in [-1, 1], or points (n, C), from the prior."""
        return self.decode(torch.randn(n, self.config.latent, device=self.machine.device))

    def posterior(self, x):
        """q(z|x) of Algorithm 2: mean and standard deviation, (n, d) each. Raises ValueError without an encoder."""
        if self.E is None:
            raise ValueError(f"{self.config.model} has no encoder")
        mu, log_var = self.infer(self.code_distribution, x)
        return mu, torch.exp(log_var / 2)

    def code_distribution(self, x):
        return self.E(self.features(x))

    def encode(self, x):
        """Algorithm 2: data (n, ...) -> codes (n, d), the posterior's mean."""
        return self.posterior(x)[0]

    def reconstruct(self, x):
        """Algorithm 2: x~ = G(mu(x))."""
        return self.decode(self.encode(x))

    def neighbours(self, x, m):
        """Algorithm 2: m images near each of x, from codes drawn from its posterior. (n, ...) -> (n, m, ...)."""
        mu, sigma = self.posterior(x)
        z = mu[:, None] + sigma[:, None] * torch.randn(len(mu), m, mu.shape[1], device=mu.device)      # (n, m, d)
        return self.decode(z.flatten(0, 1)).unflatten(0, (len(x), m))


class ALI(AIM):
    """ALI and ALICE (D7, D8): the game is played on pairs (x, z); everything else is AIM's."""

    def networks(self, c):
        self.G = Generator(c.size, c.latent, c.channels, c.width)
        self.E = nn.Sequential(Features(c.size, c.channels, c.width), Encoder(c.size, c.latent, c.width))
        self.D = JointDiscriminator(c.size, c.channels, c.latent, c.width)
        if c.adversarial_cycle:
            self.pairs = nn.Sequential(Features(c.size, 2 * c.channels, c.width), Critic(c.size, c.width))

    def d_params(self):
        return [*self.D.parameters(), *(self.pairs.parameters() if self.config.adversarial_cycle else ())]

    def code_distribution(self, x):
        return self.E(x)

    def losses(self, x, z):
        """As AIM's: {"d": for D, "g": ALI's joint game for G and E, "e": lam times ALICE's cycle}."""
        c, x_tilde = self.config, self.G(z)
        mu, log_var = self.E(x)
        z_hat = mu + torch.exp(log_var / 2) * torch.randn_like(mu)  # Sec. 4.6
        real, fake = self.D(x, z_hat), self.D(x_tilde, z)
        losses = {"d": discriminator_loss(real, fake), "g": joint_loss(real, fake)}
        if self.lam and c.adversarial_cycle:
            same, cycle = self.pairs(torch.cat([x, x], 1)), self.pairs(torch.cat([x, apart(self.G, z_hat)], 1))
            losses["d"] = losses["d"] + self.lam * discriminator_loss(same, cycle)
            losses["e"] = self.lam * generator_loss(cycle)
        elif self.lam:
            losses["e"] = self.lam * cycle_loss(x, apart(self.G, z_hat), c.k)
        return losses


def build(config, machine=None):
    """The model that `config.model` names."""
    return (ALI if config.joint else AIM)(config, machine)


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


def fixed_noise(n, d, seed=0):
    """(n, d) from N(0, I), the same at each call, without touching the training's random numbers."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def figures_points(model, run, step, x, y, classes):
    """Fig. 3, panels (a) to (d), of x (n, 2) with components y (n,): data, codes, reconstructions, samples."""
    points, reach = model.decode(fixed_noise(len(x), model.config.latent)).cpu(), 1.2 * x.abs().max().item()
    centres = torch.stack([x[y == i].mean(0) for i in range(classes)])
    panels = {"data": scatter(x, y, classes, reach)}
    if model.E is not None:
        recon = scatter(model.reconstruct(x), y, classes, reach)
        if model.config.latent == 2:
            panels["codes, 3 sigma"] = scatter(model.encode(x), y, classes, 3)
        panels["reconstructions"] = recon
        torchvision.utils.save_image(recon, run.folder / f"recon/{step:06d}.png")
    nearest = torch.cdist(points, centres).argmin(1)                # a sample has no label: its nearest component's
    panels["samples"] = scatter(points, nearest, classes, reach)
    torchvision.utils.save_image(panels["samples"], run.folder / f"samples/{step:06d}.png")
    save_panels(run.folder / f"figures/panels-{step:06d}.png", panels)


def figures_images(model, run, step, x, y, classes):
    """The pictures of one evaluation of test images x (n, C, S, S) with labels y (n,) or None."""
    d, folder = model.config.latent, run.folder / "figures"
    save_grid(run.folder / f"samples/{step:06d}.png", model.decode(fixed_noise(100, d)))    # Fig. 10
    if not (folder / "real.png").exists():
        save_grid(folder / "real.png", x[:100])
    if model.E is None:
        return
    ten, mu = x[:10].cpu(), model.encode(x[:100])
    pairs = torch.stack([x[:50].cpu(), model.decode(mu[:50]).cpu()], dim=1).flatten(0, 1)
    save_grid(run.folder / f"recon/{step:06d}.png", pairs)                                  # Fig. 2: original, its own, ...
    near = torch.cat([ten[:, None], model.neighbours(ten, 9).cpu()], dim=1)                 # Figs. 5 and 9
    save_grid(folder / f"neighbours-{step:06d}.png", near.flatten(0, 1))
    ramp = torch.linspace(-2, 2, 10)
    z = mu[:1].cpu().repeat(d, 10, 1)                                                       # (d, 10, d): Sec. 5.4's -2 to 2
    z[torch.arange(d), :, torch.arange(d)] = ramp                                           # row i varies dimension i alone
    save_grid(folder / f"traversals-{step:06d}.png", model.decode(z.flatten(0, 1)))
    if d == 2:                                                                              # Fig. 4
        across, down = torch.meshgrid(torch.linspace(-2, 2, 20), torch.linspace(2, -2, 20), indexing="xy")
        save_grid(folder / f"manifold-{step:06d}.png", model.decode(torch.stack([across, down], -1).flatten(0, 1)), 20)
        if y is not None:
            codes = torch.cat([model.encode(part) for part in x.split(250)])
            save_panels(folder / f"codes-{step:06d}.png", {"codes, 3.5 sigma": scatter(codes, y, classes, 3.5)})


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


class PointMetrics:
    """What metrics.Evaluator is for images, for points: Table 2's two numbers, and how well they are reconstructed."""

    def __init__(self, test_set, samples, latent):
        self.test, self.samples, self.latent = test_set, samples, latent

    def __call__(self, model):
        """modes, high_quality (share within 3 std of the nearest mean), mse of the test points, and same_mode: the share
        of them whose reconstruction stays nearest to the same mean (the last two need an encoder)."""
        from data import mixture
        from metrics import grid_modes, reconstruction_mse

        result, parts, mixed = {}, [], mixture(self.test.name)
        if mixed:
            points = model.decode(fixed_noise(self.samples, self.latent, seed=1)).cpu()
            result["modes"], result["high_quality"] = grid_modes(points, *mixed)
            parts.append(f"modes, high_quality: {self.samples} samples, within 3 std ({mixed[1]}) of {len(mixed[0])} means")
        if model.E is not None:
            x_hat = model.reconstruct(self.test.x).cpu()
            result["mse"] = reconstruction_mse(self.test.x, x_hat)
            parts.append(f"mse: {len(x_hat)} {self.test.split} points, mean over coordinates, in the data's units")
            if mixed:
                nearest = lambda p: torch.cdist(p, mixed[0]).argmin(1)
                result["same_mode"] = (nearest(x_hat) == nearest(self.test.x)).double().mean().item()
        return result | {"protocol": "; ".join(parts)}


def evaluate(model, evaluator, run, step, epoch, test, classes, config):
    """Pictures and metrics of one moment; on rank 0, and without disturbing the training's random numbers."""
    began, device = time.time(), model.machine.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)                                        # the same posterior noise in each evaluation's pictures
        (figures_images if config.size else figures_points)(model, run, step, *test, classes)
        if config.size:
            metrics = evaluator(model.sample, model.reconstruct if model.E is not None else None)
        else:
            metrics = evaluator(model)
        if model.E is not None and not config.fixed_variance:
            metrics["sigma"] = model.posterior(test[0][:100])[1].mean().item()      # of q(z|x), over 100 test items
    metrics["eval_s"] = round(time.time() - began, 1)
    run.log(step, epoch=round(epoch, 3), **metrics)
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    for name in ("mse", "high_quality", "fid", "fcd"):              # Fig. 8 (`--eval-every 600` on MNIST: by epoch), and more
        curve = [(line["epoch"], line[name]) for line in lines if name in line]
        if len(curve) > 1:
            draw_curves(run.folder / f"figures/{name}.png", {config.model: curve}, f"{name} by epoch, {config.dataset}")
    return metrics


def score_of(metrics):
    """What best.pt is chosen by, the less the better: modes and quality of points, else the first of fid, fcd, kl, mse."""
    if "modes" in metrics and "high_quality" in metrics:
        return -metrics["modes"] - metrics["high_quality"]
    return next((metrics[name] for name in ("fid", "fcd", "kl", "mse") if name in metrics), None)


def train(config, machine, folder, state=None):
    """Trains `config` in `folder`, from a checkpoint's `state` if given. Returns the last evaluation's metrics."""
    from data import Batches, ordered
    from metrics import Evaluator

    train_set, test_set = load_both(config, machine)
    batches = Batches(train_set, config.batch, machine.device, config.size or None, config.seed, machine.rank, machine.world)
    config.channels = train_set.x.shape[1] if config.size == 0 else train_set.channels
    set_length(config, batches, state)
    config.eval_every = config.eval_every or max(1, min(10 * batches.steps_per_epoch, config.steps // 12))
    config.check()
    model, start, best = build(config, machine), 0, None
    evaluator = None
    if machine.rank == 0:
        evaluator = PointMetrics(test_set, config.samples, config.latent) if config.size == 0 else \
            Evaluator(train_set, test_set, config.size, machine.device, config.root, config.samples, config.inception or None,
                      li=config.dataset == "mnist")         # Table 1: "the pre-trained classifier from Li et al. (2017)"
    run = Run(folder, dataclasses.asdict(config), machine, resume=state is not None)
    shown = 10_000 if config.size == 0 else 2000 if config.latent == 2 else 100     # Fig. 3; Fig. 4; the other pictures
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
    flags = [] if config.model == "alice" else ["k"]
    if config.model in ("gan", "ali"):
        flags.append("lam")
    if config.size == 0:
        flags.append("inception")
    return flags


def main(argv=None):
    """The command line; returns the exit code."""
    parser = Parser(prog=f"{FILE}.py", description=__doc__.splitlines()[0])
    shared_flags(parser, MODELS)
    parser.add_argument("--lam", type=float, metavar="X", help="weight of L_e (1 / latent), of ALICE's cycle (1)")
    parser.add_argument("--k", type=float, metavar="X", help="norm of ALICE's explicit cycle (2)")
    parser.add_argument("--beta1", type=float, metavar="X", help="Adam's beta1")
    parser.add_argument("--std", type=float, metavar="X", help="initial weights N(0, std), biases 0; 0: for points, D4")
    parser.add_argument("--decay", choices=("sqrt", "none"), help="learning rate: lr / sqrt(epoch), or lr")
    args = vars(parser.parse_args(argv))
    if args["sample"] and not args["resume"]:
        raise UserError("--sample needs --resume RUN, the run to draw from")
    state = load_checkpoint(args["resume"], FILE) if args["resume"] else None
    config = settings(args, state, preset)
    if state is None and args["size"] in (28, 64):                  # a size brings its table's networks along
        for name, value in (TABLE3 if config.size == 28 else vars(Config())).items():
            if name in ("width", "latent") and args[name] is None:
                setattr(config, name, value)
    config.check()
    refuse(args, config, unused_flags(config))
    machine = Machine(args["device"], config.amp, config.seed)
    if args["bench"]:
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
