"""Intervention GAN (IVGAN) and the Intervention Adversarial Auto-Encoder (IVAAE), each with its baselines, in one file.

    Part I    Jiadong Liang, Liangyu Zhang, Cheng Zhang, Zhihua Zhang.
              "Intervention Generative Adversarial Networks." arXiv:2008.03712, 2020.
    Part II   "Intervention Adversarial Auto-Encoder." Anonymous authors, under double-blind review.
              Sections, equations, tables and figures are these versions'.

Both parts share the interventions, the multi-way Jensen-Shannon divergence that a classifier of interventions estimates, the
verbs of a model, and everything from the plumbing down. Read "Shared by both parts", then the part whose paper you hold.

PART I. The idea. A GAN's Jensen-Shannon divergence is flat while real and generated images do not overlap, so its gradient says
little. IVGAN adds an encoder E and asks more of the pair (E, G). It encodes a real image, w = E(x), replaces one of k blocks
of w by fresh Gaussian noise (an *intervention* O_i, which leaves N(0, I) as it is) and decodes G(O_i(w)). A classifier f
must name the replaced block. If E(x) were N(0, I), no classifier could: so E and G are trained to fool f. That loss is a
k-way Jensen-Shannon divergence (Theorem 3), whose k distributions overlap where the two of a GAN do not (Example 1). Two
l1 reconstructions keep E and G inverse to each other (Eq. 6). f is D's trunk with a second head, so it costs little.

Notation.   paper           here          shape
            x ~ p_real      x             (B, C, S, S) in [-1, 1]
            z ~ p_z         z             (B, d), N(0, I), d = latent = 100
            w = E(x)        w             (B, d)
            i_j in [k]      index         (B,), one block per sample
            O_i(w)          w_i           (B, d)
            x' = G(O_i(w))  x_i           (B, C, S, S)
            D, f            D(x)          logits (B,) and (B, k): one trunk, two heads
            lambda, mu      lam, mu       .25, .5 in G's and D's loss; lam_e, mu_e = 1, 1 in E's (Sec. 5)

Algorithm 1 (one call of `IVGAN.step`).
    w = E(x); x_i = G(O_i(w)); x_z = G(z)                                    lines 2-8, forwards made once and shared
    D, f:  minimise  L_adv(D) + mu V_class                                   lines 9-12
    G:     minimise  L_adv(G) + lam L_recon + mu L_IV,  L_IV = -V_class      lines 13-15
    E:     minimise         lam_e L_recon + mu_e L_IV                        lines 16-17

Where this file departs from the papers, or had to choose (D1... here, D14... for Part II):
  D1  f has k classes and i runs over 1..k; the paper prints "i = 1..d/k". One index is drawn per sample (Alg. 1); the
      authors' code draws one per batch.
  D2  Table 1 prints BN after D's first convolution: default (`--d-norm table1`). The authors' code and DCGAN have none there
      (`--d-norm dcgan`). WGAN-GP's own paper forbids BN in the critic (`--d-norm none`); Sec. 5 wants one architecture for all.
  D3  E *maximises* the cross entropy (Eq. 3, Alg. 1); the authors' code lets it minimise it and gives it no
      reconstruction term: `--e-sign code`.
  D4  One update each of D, G, E per iteration (paper silent); the authors' code makes ten of E: `--e-steps 10`.
  D5  ||.||_1 of Eq. (6) is the mean absolute error: summed over 12,288 pixels it would drown the other terms.
  D6  In Eq. (6) z is E(x), as everywhere else in Sec. 3, so x_i serves the second reconstruction and the classifier both.
  D7  Instance noise (Sec. 5: "variance is decayed", no numbers): the authors' standard deviations, at the same fractions of
      training as theirs of 400 epochs (so a longer `--steps` on resuming stretches them); on the real and generated images
      that D judges, not on the x_i that f classifies; IV models only, but on `digits`, whose settings are ours, all alike and
      constant. Config.noise scales it, 0 switches it off.
  D8  The authors' code uses Adam 2e-4 / 1e-2 on CIFAR-10: `--lr 2e-4` (E's rate keeps the paper's ratio of 50); there E, of
      width 16, has a weight decay of 5e-4, and stacked MNIST is 60,000 fixed triples, 20,000 samples and a classifier of its
      own: not here, where Table 3 follows PacGAN (26,000 samples; triples are drawn anew, 60,000 an epoch: it fixes 128,000).
  D9  MRGAN: L_G + .25 ||x - G(E(x))||_1 + .25 [-log D(G(E(x)))]; the authors' code has the last sign reversed.
  D10 WGAN (RMSprop 5e-5, clip .01) and WGAN-GP (Adam 1e-4, betas (0, .9), penalty 10) use their own papers' settings; G moves
      every fifth step, so that each critic step sees a fresh batch.
  D11 DCGAN's and LSGAN's losses of D are averaged over the 2n real and generated images (Alg. 1, line 10: alpha / 2n).
  D12 G sees batches of prior noise and of codes. Its running BN statistics, which `sample` uses, follow the former only: with
      all of them mixed in, samples would be decoded with statistics that belong to neither. E's follow data, not G(O_i(E(x)));
      as E's rate is 50 times G's (5 times on `digits`), they lag behind its weights, and each evaluation first takes them anew
      from training images.
  D13 `--mu` and `--lam` set G's and D's weights and keep E's in the paper's proportion to them (2 and 4), so that `--mu 0` is
      Table 4's "without the intervention loss".

PART II. The idea. An adversarial auto-encoder matches its codes E(x) to N(0, I) by a GAN on codes, whose two distributions may
overlap little. IVAAE puts bridges between them: T_k, k = 0..t, replaces ever more of the code by noise, from T_0, the code
itself, to T_t, the prior. D must name k; E must keep it from doing so: a (t + 1)-way JS (Theorem 2), whose neighbours overlap.

Notation.   paper           here          shape
            z = E(x)        z             (B, d); in the paper z^
            z_k = T_k(z)    chain         t + 1 batches (B, d): `prefix_substitute`, `radial_substitute` or `svgd_chain`
            D(z_k)          judge(chain)  logits (t + 1, B, t + 1)
            mu1, mu2        mu, mu_e      over t + 1: 4 / (t + 1) for D, 2 / (t + 1) for E; lambda = 1

Algorithm 1 (one call of `IVAAE.step`).
    z = E(x); x^ = G(z); z_k = T_k(z), k = 0..t                              lines 2-9
    D:     minimise  mu1 L_IV                                                lines 10-11
    G:     minimise  lam L_recon                                             lines 13-14
    E:     minimise  lam L_recon - mu2 L_IV                                  lines 15-16: E goes up where D goes down

  D14 L_recon's reduction is not printed: .05 times the squared error summed over an image, pixels in [-1, 1], as in WAE, whose
      networks and comparisons the paper takes over (on MNIST WAE's pixels lie in [0, 1]: its sum is a quarter of this one).
      Adam's betas and the initial weights are not printed either: (.5, .999), as in WAE, and torch's.
  D15 Algorithm 1 lets E maximise D's cross entropy, the form of a GAN whose gradient vanishes where D is sure. `--e-loss prior`
      is the other one, of WAE-GAN's own paper and of Fig. 3: every z_k shall look like the prior's. (The algorithm prints "+"
      before L_recon, E's gradient as G's and 1 / mt for t + 1 terms: read as descent, E's own, and a mean.)
  D16 "We obtain {z^l} for every two iterations": a bridge of the SVGD chain is two steps on from the one before. The bandwidth
      is a constant to the gradient.
  D17 Table 4's third DCONV takes a kernel of 6 (Sec. 4: "5 x 5 or 6 x 6"), and its last row "DCONV(C1, K4, S0)" is a misprint:
      8 -> 12 -> 16 -> 32 -> 64 by kernels 5, 5, 6, 4, strides 1, 1, 2, 2, to as many channels as the images have, keeps every
      other printed stride. "FC(C1)" ends in the latent dimension.
  D18 D's t + 1 outputs at t = 1 are AAE's one: their difference is its logit. So `aae` is this class at t = 1, by default with
      Algorithm 1's loss of E; `--e-loss prior` gives it the form of WAE-GAN's, with this paper's weights (so the code counts
      twice as much: in Algorithm 1's mean over two terms that of the prior has no gradient for E).
  D19 Each T_k draws noise of its own (line 3 draws one z for all k: the same in the mean). WAE-MMD's lambda on CIFAR-10 and the
      settings of Fashion-MNIST are those of CelebA and MNIST (paper silent).

Run it.  python ivgen.py                                      IVLSGAN on drawn digits, offline, minutes on two cores
         python ivgen.py --dataset cifar10                    the paper's recipe: 64 x 64, 400 epochs
         python ivgen.py --dataset cifar10 --model wgan-gp    ... one of the seven systems of Table 2
         python ivgen.py --dataset cifar10 --k 10             ... or of Table 4's settings of k and mu
         python ivgen.py --dataset stacked-mnist              modes and KL of Table 3
         python ivgen.py --dataset mnist --model ivaae-rad    Part II: also ivaae-bw, ivaae-svgd, aae, wae-mmd; 300 epochs
         python ivgen.py --resume RUN --probe discriminator   its Figs. 2 and 3; `--probe classifier`: Fig. 5
What to expect: of `python ivgen.py`, on two CPU cores, digits a person reads after four minutes, fcd below .8, and
reconstructions at an MSE of about .02 (pixels in [0, 1]). README.md has the command and the protocol of each number.
"""

import argparse
import copy
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

FILE = "ivgen"

# ======================================================================================================================
# Settings
# ======================================================================================================================


@dataclasses.dataclass
class Config:
    """Every setting of a run. The values below are IVGAN's (its Sec. 5), for IVLSGAN; `IVAAE_PAPER` holds IVAAE's."""

    model: str = "ivlsgan"
    dataset: str = "digits"
    root: str = "data"
    size: int = 64                  # Sec. 5: "all input images are resized to have 64x64 pixels"
    channels: int = 3               # set from the data
    width: int = 64                 # Table 1: channels after the first convolution
    latent: int = 100               # Sec. 5: 100-dimensional standard Gaussian
    batch: int = 64                 # author code
    epochs: float = 400             # author code; `steps` wins where it is given
    steps: int = 0
    base: str = "lsgan"             # adversarial loss: lsgan, dcgan, wgan, wgan-gp
    k: int = 4                      # Sec. 5; Table 4 varies it
    mu: float = 0.5                 # Sec. 5, training G and D; Table 4 varies it
    lam: float = 0.25               # Sec. 5, training G and D
    mu_e: float = 1.0               # Sec. 5, training E
    lam_e: float = 1.0              # Sec. 5, training E
    mode_regularised: bool = False  # MRGAN's two terms in place of IVGAN's (D9)
    e_steps: int = 1                # D4
    e_sign: str = "paper"           # D3
    d_norm: str = "table1"          # D2
    critic_steps: int = 1           # D10: steps of D per step of G
    lr: float = 1e-4                # Sec. 5: D, f, G
    lr_e: float = 5e-3              # Sec. 5: E
    beta1: float = 0.5              # Sec. 5
    beta2: float = 0.999            # Sec. 5
    noise: float = 1.0              # D7: scale of the schedule below
    noise_schedule: tuple = ()      # (fraction of training, standard deviation), ...
    ema: float = 0.0                # decay of an average of G's weights, 0 for none: the paper has none
    bridge: str = ""                # IVAAE: bw, rad, svgd, or mmd for WAE-MMD; "" is Part I
    t: int = 4                      # IVAAE, Sec. 4: bridge distributions
    e_loss: str = "iv"              # IVAAE: what E descends (D15)
    network: str = "conv"           # IVAAE: "fc" is Table 3, "conv" Table 4
    lr_d: float = 5e-4              # IVAAE, Sec. 4: D's rate; `lr` is G's
    decay: tuple = ()               # IVAAE: (epoch, factor of the rates), ...
    lam_mmd: float = 10.0           # WAE-MMD's lambda; 100 for CelebA (its paper)
    steps_per_epoch: int = 0        # set from the data
    seed: int = 0
    amp: str = "auto"
    compile: bool = False
    eval_every: int = 0             # steps; 0: ten epochs (Table 2) or a twelfth of the run, whichever is less
    samples: int = 10_000           # generated images a metric is computed from
    inception: str = ""             # weights for fid: a path, "auto" to download, "" for none

    def check(self):
        """Raises UserError, in one sentence, for settings that cannot work."""
        if self.model not in MODELS and self.model not in IVAAE_MODELS:
            raise UserError(f"--model {self.model} is not one of {', '.join((*MODELS, *IVAAE_MODELS))}")
        if self.bridge:
            self.check_ivaae()
        elif self.size < 32 or self.size & (self.size - 1):
            raise UserError(f"--size {self.size} is not a power of two from 32 up (the networks halve it down to 4)")
        elif self.model in ("ivdcgan", "ivlsgan") and (self.k < 2 or self.latent % self.k):
            raise UserError(f"--k {self.k} does not divide the latent dimension {self.latent} into blocks (2 or more)")
        for name, least in (("batch", 2), ("size", 8), ("width", 1), ("latent", 2), ("e_steps", 1), ("samples", 10),
                            ("epochs", 1e-9)):
            if not least <= getattr(self, name) < 2 ** 48:
                size = "large" if getattr(self, name) > least else "small"
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} is too {size}")
        for name in ("mu", "lam", "lr", "noise"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"--{name} {getattr(self, name)} must be a number from 0 up")
        for name, known in (("e_sign", ("paper", "code")), ("d_norm", ("table1", "dcgan", "none")),
                            ("e_loss", ("iv", "prior"))):
            if getattr(self, name) not in known:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} is not one of {', '.join(known)}")
        if not 0 <= self.ema < 1:
            raise UserError(f"--ema {self.ema} must lie in [0, 1)")
        if self.compile and self.base == "wgan-gp":
            raise UserError("--compile cannot be used with wgan-gp: its penalty differentiates twice, torch.compile once")

    def check_ivaae(self):
        """`check` for Part II."""
        if self.t < 1:
            raise UserError(f"--t {self.t} must be 1 or more")
        if self.model == "aae" and self.t != 1:
            raise UserError(f"--model aae is IVAAE at t = 1; --t {self.t} is ivaae-bw")
        if self.bridge == "bw" and self.latent % self.t:
            raise UserError(f"--t {self.t} does not divide the latent dimension {self.latent} into blocks")
        if self.network == "conv" and self.size != 64:
            raise UserError(f"--size {self.size}: Table 4's networks are for 64 pixels")


LSGAN_NOISE = ((0, .05), (.125, .01), (.25, .001), (.5, 0.))       # author code: epochs 0, 50, 100, 200 of 400
DCGAN_NOISE = ((0, .05), (.25, .01), (.5, .003), (.75, .001))      # author code: epochs 0, 100, 200, 300 of 400
PLAIN = dict(mu=0., lam=0., mu_e=0., lam_e=0.)                     # no encoder, no classifier: what is left is the GAN
MODELS = {  # IVGAN's Table 2, row by row: what each changes of Config
    "dcgan": dict(base="dcgan", **PLAIN),
    "lsgan": dict(base="lsgan", **PLAIN),
    "wgan": dict(base="wgan", critic_steps=5, lr=5e-5, **PLAIN),
    "wgan-gp": dict(base="wgan-gp", critic_steps=5, lr=1e-4, beta1=0., beta2=.9, **PLAIN),
    "mrgan": dict(base="dcgan", mode_regularised=True, mu=.25, lam=.25, mu_e=.25, lam_e=.25),
    "ivdcgan": dict(base="dcgan", noise_schedule=DCGAN_NOISE),
    "ivlsgan": dict(base="lsgan", noise_schedule=LSGAN_NOISE),
}
IVAAE_PAPER = dict(                                                 # IVAAE, Sec. 4: "for all datasets and models"
    width=128, latent=64, batch=100, epochs=300, lr=1e-3, lr_e=1e-3, lr_d=5e-4, decay=((30, .5), (50, .1), (100, .01)),
    lam=1., mu=4., mu_e=2.,                                         # mu1 = mu / (t + 1) for D, mu2 = mu_e / (t + 1) for E
    lam_mmd=100., samples=20_000)
IVAAE_TABLE3 = dict(                                                # IVAAE, Sec. 4, MNIST
    channels=1, network="fc", latent=16, batch=64, lr=1e-4, lr_e=5e-5, lr_d=1e-4, decay=((100, .5), (200, .25)), lam_mmd=10.)
IVAAE_DATASETS = {
    "mnist": IVAAE_TABLE3, "fashion-mnist": IVAAE_TABLE3,
    "cifar10": dict(latent=128, batch=128),
    "digits": IVAAE_TABLE3 | dict(size=32, width=32, steps=6000, eval_every=2000, lr=4e-4, lr_e=2e-4, lr_d=4e-4),      # ours
}
IVAAE_MODELS = {  # IVAAE's Tables 1 and 2, row by row
    "wae-mmd": dict(bridge="mmd"),
    "aae": dict(bridge="bw", t=1),                                  # WAE-GAN: z against the prior, two classes
    "ivaae-bw": dict(bridge="bw"), "ivaae-rad": dict(bridge="rad"), "ivaae-svgd": dict(bridge="svgd"),
}
DATASETS = {  # what a data set changes of Config for IVGAN; the paper's settings are Config itself
    "digits": dict(channels=1, size=32, width=32, latent=16, batch=32, steps=5400, eval_every=1800, lr=1e-3, beta2=.99,
                   noise_schedule=((0, .2),)),                      # ours: chosen to be quick on two cores
    "mnist": dict(channels=1), "fashion-mnist": dict(channels=1),
    "stacked-digits": dict(size=32, width=32, steps=20_000, samples=26_000),   # ours
    "stacked-mnist": dict(steps=100_000, samples=26_000),           # Table 3: 100K iterations; 26,000 samples: PacGAN
    "lsun-church": dict(epochs=100),                                # ours: 126,227 images
    "celeba": dict(epochs=100),                                     # ours: 202,599 images
}
FID_SAMPLES = {"mnist": 60_000, "fashion-mnist": 60_000}            # Table 2's protocol; 50,000 for the others
LOG_EVERY, SAVE_EVERY = 50, 500                                     # steps


def preset(model=None, dataset=None):
    """Config for one model on one data set: the paper's values, then the data set's, then the model's."""
    model, dataset = model or Config.model, dataset or Config.dataset
    if model in IVAAE_MODELS:
        return Config(model, dataset, **(IVAAE_PAPER | IVAAE_DATASETS.get(dataset, {}) | IVAAE_MODELS[model]))
    if model not in MODELS:
        raise UserError(f"--model {model} is not one of {', '.join((*MODELS, *IVAAE_MODELS))}")
    ours = DATASETS.get(dataset, {})
    noise = {"noise_schedule": ours["noise_schedule"]} if "noise_schedule" in ours else {}      # of all models (D7)
    return Config(model, dataset, **(ours | MODELS[model] | noise))


# ======================================================================================================================
# Shared by both parts: the interventions, the distance they estimate, the verbs of a model
# ======================================================================================================================


def block_substitute(z, index, k, noise):
    """IVGAN's O_i, "block substitution" (Sec. 3): block `index` of `z`, one of k equal blocks, replaced by that of `noise`.

    z, noise: (B, d); index: (B,) integers in 0..k-1, one block per sample. Returns (B, d); differentiable in z.
    N(0, I) in gives N(0, I) out. Raises ValueError if k does not divide d.
    """
    d = z.shape[1]
    if k < 1 or d % k:
        raise ValueError(f"{k} blocks do not divide a code of {d} dimensions evenly")
    block = torch.arange(d, device=z.device) // (d // k)            # (d,): the block each coordinate belongs to
    return torch.where(block == index[:, None], noise, z)


def prefix_substitute(z, step, t, noise):
    """T_k of IVAAE's "blockwise substitution" (Sec. 2), k = `step`: the first k of t equal blocks of z become noise's.

    z, noise: (B, d). Returns (B, d), differentiable in z: z itself at step 0, `noise` at step t; N(0, I) in gives N(0, I)
    out. Raises ValueError if t does not divide d or step is not in 0..t.
    """
    d = z.shape[1]
    if t < 1 or d % t or not 0 <= step <= t:
        raise ValueError(f"step {step} of {t} blocks: the blocks must divide a code of {d} dimensions, steps run from 0 to {t}")
    n = step * (d // t)
    return torch.cat([noise[:, :n], z[:, n:]], 1)


def radial_substitute(z, step, t, noise):
    """T_k of IVAAE's "radial substitution" (Sec. 2), k = `step`: z cos(k pi / 2t) + noise sin(k pi / 2t).

    z, noise: (B, d). Returns (B, d), differentiable in z: z itself at step 0, `noise` at step t; N(0, I) in gives N(0, I)
    out. Raises ValueError if step is not in 0..t.
    """
    if t < 1 or not 0 <= step <= t:
        raise ValueError(f"step {step} is not in 0..{t}")
    if step in (0, t):                                              # exactly: cos(pi / 2) is 6e-17 in floating point
        return noise if step else z
    angle = step * math.pi / (2 * t)
    return z * math.cos(angle) + noise * math.sin(angle)


def median_bandwidth(z, scale=100.):
    """h = scale med^2 / log n, med the median distance between two of the n >= 2 points z (n, d); IVAAE, Sec. 4. A scalar."""
    with torch.no_grad():
        return (scale * F.pdist(z.float()).median().square() / math.log(len(z))).clamp_min(1e-12)      # codes may coincide


def svgd_step(z, bandwidth, epsilon=1.):
    """IVAAE's Eq. (2): one Stein variational gradient step of particles z (n, d) towards N(0, I). Returns (n, d).

    z_i + epsilon / n sum_j [k(z_j, z_i) grad log p(z_j) + grad_{z_j} k(z_j, z_i)],  k(a, b) = exp(-||a - b||^2 / h).
    log p has gradient -z_j, and the kernel 2 / h (z_i - z_j) k: so both sums are matrix products with K, and nothing of
    size n x n x d is formed. Differentiable in z (`median_bandwidth` gives h as a constant). Differences are taken about the
    mean: where the particles nearly coincide, 2 / h would blow up the rounding of anything larger.
    """
    mean = z.mean(0)
    c = z - mean
    norms = c.square().sum(1)
    kernel = torch.exp(-(norms[:, None] + norms - 2 * c @ c.T).clamp_min(0) / bandwidth)            # (n, n), symmetric
    pull, total = kernel @ c, kernel.sum(1, keepdim=True)
    return z + epsilon / len(z) * (2 / bandwidth * (total * c - pull) - (pull + total * mean))


def svgd_chain(z, t, every=2, noise=.1):
    """IVAAE's third bridge (Sec. 4): [z^0 = z, z^1, .., z^(t-1)] by `every` SVGD steps each, and z^t from the prior.

    z (n, d), n >= 2. Bandwidth `median_bandwidth` of the current particles; after each step Gaussian noise of standard
    deviation `noise` ("we add 0.1 Gaussian noise on the particles after every iteration"). Gradients flow back to z.
    """
    chain = [z]
    for _ in range(t - 1):
        for _ in range(every):
            z = svgd_step(z, median_bandwidth(z))
            z = z + noise * torch.randn_like(z)
        chain.append(z)
    return [*chain, torch.randn_like(z)]


def multi_js(densities, weights=None):
    """Eq. (2): JS_pi(p_1..p_n) = H(sum pi_i p_i) - sum pi_i H(p_i), in nats, of n discrete distributions (n, m).

    Not used in training, where f estimates it (Theorem 3): here for the tests and for the reader.
    """
    n = len(densities)
    weights = densities.new_full((n,), 1 / n) if weights is None else weights
    entropy = lambda p: -torch.special.xlogy(p, p).sum(-1)
    return entropy(weights @ densities) - (weights * entropy(densities)).sum()


class Coder(nn.Module):
    """What the models of both papers answer to: `sample(n)`, `encode(x)`, `decode(z)` over an encoder E and a generator G.

    The fourth verb, `step(x)`, is each model's own. Sets `config`, `machine`, `average` (None) and `iteration`, which is part
    of a checkpoint.
    """

    def __init__(self, config, machine=None):
        super().__init__()
        self.config, self.machine, self.iteration, self.average = config, machine or Machine(seed=config.seed), 0, None

    def get_extra_state(self):
        return self.iteration                                       # the clock of noise and rates is part of a checkpoint

    def set_extra_state(self, iteration):
        self.iteration = iteration

    def infer(self, network, x):
        """`network(x)` in evaluation mode, without a graph, in float32 out."""
        training = network.training
        network.eval()
        with torch.no_grad(), self.machine.autocast():
            y = network(x)
        network.train(training)
        return y.float()

    def decode(self, z):
        """Codes (n, d) -> images (n, C, S, S) in [-1, 1]."""
        return self.infer(self.G if self.average is None else self.average, z.to(self.machine.device))

    def sample(self, n):
        """n images (n, C, S, S) in [-1, 1] from the prior."""
        return self.decode(torch.randn(n, self.config.latent, device=self.machine.device))

    def encode(self, x):
        """Images (n, C, S, S) in [-1, 1] -> codes (n, d). Raises ValueError for a model without an encoder."""
        if self.E is None:
            raise ValueError(f"{self.config.model} has no encoder")
        return self.infer(self.E, x.to(self.machine.device, memory_format=torch.channels_last))


# ======================================================================================================================
# Part I, Intervention GAN: networks (Table 1, for 64 x 64 pixels; one stage fewer or more for 32, 128, ...)
# ======================================================================================================================


def stages(size):
    """Number of stride-2 convolutions from `size` pixels, a power of two from 8 up, down to 4: four for the paper's 64."""
    return size.bit_length() - 3


def init_weights(module):
    """DCGAN's: weights N(0, .02), BN weights N(1, .02), biases 0 (FC layers, on which all are silent, as convolutions)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(module.weight, 0., .02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
        nn.init.normal_(module.weight, 1., .02)
        nn.init.zeros_(module.bias)


def convolutions(channels, size, width, norm_first, norm=True):
    """The n = stages(S) CONV(K4, S2) rows that D and E share in form: (B, C, S, S) -> (B, 2^(n-1) width, 4, 4)."""
    layers, c_in = [], channels
    for n in range(stages(size)):
        has_norm, c_out = norm and (n > 0 or norm_first), width << n
        layers += [nn.Conv2d(c_in, c_out, 4, 2, 1, bias=not has_norm)]  # padding 1: S -> S / 2
        layers += [nn.BatchNorm2d(c_out)] if has_norm else []
        layers += [nn.LeakyReLU(.2, inplace=True)]
        c_in = c_out
    return nn.Sequential(*layers)


class AsImage(nn.Module):
    """(B, d) -> (B, d, 1, 1), channels_last as the weights: the strides of a 1 x 1 image do not tell the two formats apart."""

    def forward(self, z):
        return z[:, :, None, None].to(memory_format=torch.channels_last)


class Generator(nn.Sequential):
    """G of Table 1: z (B, d) -> images (B, C, S, S) in [-1, 1]."""

    def __init__(self, latent=100, channels=3, size=64, width=64):
        c = width << (stages(size) - 1)                             # 512 at the paper's width and size
        layers = [AsImage(), nn.ConvTranspose2d(latent, c, 4, 1, 0, bias=False)]                # 1 -> 4
        for _ in range(stages(size) - 1):
            layers += [nn.BatchNorm2d(c), nn.ReLU(inplace=True), nn.ConvTranspose2d(c, c // 2, 4, 2, 1, bias=False)]
            c //= 2
        layers += [nn.BatchNorm2d(c), nn.ReLU(inplace=True), nn.ConvTranspose2d(c, channels, 4, 2, 1), nn.Tanh()]
        super().__init__(*layers)
        self.apply(init_weights)


class Discriminator(nn.Module):
    """D of Table 1 with f as a second head: images (B, C, S, S) -> real/fake logit (B,) and block logits (B, k), float32.

    norm: where D has BN, "table1", "dcgan" (not after the first convolution) or "none" (D2).
    """

    def __init__(self, channels=3, size=64, width=64, k=4, norm="table1"):
        super().__init__()
        self.trunk = convolutions(channels, size, width, norm_first=norm == "table1", norm=norm != "none")
        features = (width << (stages(size) - 1)) * 4 * 4
        self.real, self.block = nn.Linear(features, 1), nn.Linear(features, k)
        self.apply(init_weights)

    def forward(self, x):
        h = self.trunk(x).flatten(1)                                # (B, 8 width, 4, 4) -> (B, 128 width)
        return self.real(h).squeeze(1).float(), self.block(h).float()


class Encoder(nn.Sequential):
    """E of Table 1: images (B, C, S, S) -> codes (B, d), each coordinate normalised over the batch by the last BN."""

    def __init__(self, latent=100, channels=3, size=64, width=64):
        c = width << (stages(size) - 1)
        super().__init__(*convolutions(channels, size, width, norm_first=False),
                         nn.Conv2d(c, latent, 4, 2, 0, bias=False),  # Table 1's CONV(K4, S2, O100): 4 -> 1
                         nn.Flatten(), nn.BatchNorm1d(latent, affine=False))
        self.apply(init_weights)


# ======================================================================================================================
# Part I, Intervention GAN: losses (one function per equation; all return a scalar to be minimised)
# ======================================================================================================================


def adversarial_loss_d(base, real, fake):
    """L_adv(D), a mean over 2n images (D11). real, fake: D's logits (B,).

    dcgan: Eq. (1), negated. lsgan: targets a = 1 for real, b = -1 for fake (author code). wgan, wgan-gp: the critic's
    negated Wasserstein estimate (no 1/2: its own paper's scale, against which the penalty of 10 is set).
    """
    if base == "dcgan":
        return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2     # -log sigmoid(v) = softplus(-v)
    if base == "lsgan":
        return ((real - 1).square().mean() + (fake + 1).square().mean()) / 2
    if base in ("wgan", "wgan-gp"):
        return fake.mean() - real.mean()
    raise ValueError(f"unknown base {base!r}: dcgan, lsgan, wgan or wgan-gp")


def adversarial_loss_g(base, fake):
    """L_adv(G). fake: D's logits (B,). dcgan: non-saturating -log D. lsgan: 1/2 (D - c)^2 with c = 0 (author code).
    wgan, wgan-gp: the critic's negated mean."""
    if base == "dcgan":
        return F.softplus(-fake).mean()
    if base == "lsgan":
        return fake.square().mean() / 2
    if base in ("wgan", "wgan-gp"):
        return -fake.mean()
    raise ValueError(f"unknown base {base!r}: dcgan, lsgan, wgan or wgan-gp")


def classification_loss(logits, index):
    """V_class of Eq. (3): mean over the batch of -log f_i(x'). logits (B, k), index (B,). L_IV = -min_f V_class."""
    return F.cross_entropy(logits, index)


def reconstruction_loss(x_hat, x):
    """One of Eq. (6)'s two l1 terms, as a mean per element (D5). Any equal shapes."""
    return (x_hat.float() - x.float()).abs().mean()


def gradient_penalty(critic, real, fake):
    """WGAN-GP: E[(||grad_x critic(x)|| - 1)^2] at points between real and fake, (B, ...) each; critic: such a batch -> (B,)."""
    u = torch.rand(len(real), *[1] * (real.dim() - 1), device=real.device)
    x = torch.lerp(fake.float(), real.float(), u).requires_grad_()
    gradient, = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


# ======================================================================================================================
# Part I, Intervention GAN: the model
# ======================================================================================================================


class IVGAN(Coder):
    """IVLSGAN, IVDCGAN and Table 2's baselines: the same class, with terms switched off by `config`.

    Four verbs: `step(x)`, one iteration of Algorithm 1; `sample(n)`; `encode(x)`; `decode(z)`.
    """

    def __init__(self, config, machine=None):
        super().__init__(config, machine)
        c, m = config, self.machine
        self.G = Generator(c.latent, c.channels, c.size, c.width)
        self.D = Discriminator(c.channels, c.size, c.width, c.k, c.d_norm)
        self.E = Encoder(c.latent, c.channels, c.size, c.width) if max(c.mu, c.lam, c.mu_e, c.lam_e) > 0 else None
        self.average = copy.deepcopy(self.G).requires_grad_(False) if c.ema else None
        self.to(m.device, memory_format=torch.channels_last)
        adam = dict(betas=(c.beta1, c.beta2), fused=m.device.type in ("cpu", "cuda"))
        if c.base == "wgan":
            make = lambda net: torch.optim.RMSprop(net.parameters(), c.lr)
        else:
            make = lambda net: torch.optim.Adam(net.parameters(), c.lr, **adam)
        self.optimisers = {"D": make(self.D), "G": make(self.G)}
        if self.E is not None:
            self.optimisers["E"] = torch.optim.Adam(self.E.parameters(), c.lr_e, **adam)

    def noisy(self, x):
        """Instance noise on what D sees (Sec. 5; D7)."""
        done = self.iteration / self.config.steps if self.config.steps else 0.
        std = self.config.noise * next((s for at, s in reversed(self.config.noise_schedule) if done >= at), 0.)
        return x + std * torch.randn_like(x) if std else x

    def intervene(self, w):
        """Alg. 1, lines 6-8: noise, one block per sample, substitution. (B, d) -> (B, d), index (B,)."""
        index = torch.randint(self.config.k, (len(w),), device=w.device)
        return block_substitute(w, index, self.config.k, torch.randn_like(w)), index

    def forwards(self, x, prior=True):
        """Alg. 1, lines 2-8, once for D's, G's and E's losses. Images carry the graph back to G and E."""
        c, out = self.config, {}
        if prior:
            out["x_z"] = self.G(torch.randn(len(x), c.latent, device=x.device))
        if self.E is not None:
            w = self.E(x).float()                                   # (B, C, S, S) -> (B, d)
            if c.lam or c.lam_e or c.mode_regularised:
                out["x_w"] = apart(self.G, w)                       # the reconstruction G(E(x))
            if not c.mode_regularised:
                out["w_i"], out["index"] = self.intervene(w)
                out["x_i"] = apart(self.G, out["w_i"])              # x' = G(O_i(E(x)))
        return out

    def step(self, x):
        """One iteration of Algorithm 1 on images x (B, C, S, S) in [-1, 1]. Returns its losses as scalars."""
        c, m, move_g = self.config, self.machine, (self.iteration + 1) % self.config.critic_steps == 0
        x = x.to(memory_format=torch.channels_last)
        with m.autocast(), torch.set_grad_enabled(move_g):
            images = self.forwards(x)
        losses = self.step_d(x, images)                             # before D's forwards below: autograd refuses to go
        if move_g:                                                  # back through weights that have moved since
            losses |= self.step_g_and_e(x, images)
            for _ in range(c.e_steps - 1 if self.E is not None else 0):  # D4: E has moved, so its codes are new
                m.end_step()
                with m.autocast():
                    images = self.forwards(x, prior=False)
                losses |= self.step_g_and_e(x, images)
            self.update_average()
        m.end_step()
        self.iteration += 1
        return {name: loss.detach() for name, loss in losses.items()}

    def step_d(self, x, images):
        """Alg. 1, lines 9-12: D down L_adv, and f (D's second head, so the trunk too) down mu V_class."""
        c, m, params = self.config, self.machine, list(self.D.parameters())
        real, fake = self.noisy(x), self.noisy(images["x_z"].detach())
        with m.autocast():
            losses = {"d_adv": adversarial_loss_d(c.base, self.D(real)[0], self.D(fake)[0])}
            total = losses["d_adv"]
            if "x_i" in images and c.mu:
                losses["f_ce"] = classification_loss(self.D(images["x_i"].detach())[1], images["index"])
                total = total + c.mu * losses["f_ce"]               # gradient descent on -log f: f learns to tell
            if c.base == "wgan-gp":
                losses["d_gp"] = gradient_penalty(lambda x: self.D(x)[0], real, fake)
                total = total + 10 * losses["d_gp"]                 # D10
        m.apply(self.optimisers["D"], params, m.gradients(total, params))
        if c.base == "wgan":
            with torch.no_grad():
                for p in params:                                    # D10: the clipping that keeps the critic Lipschitz
                    p.clamp_(-.01, .01)
        return losses

    def step_g_and_e(self, x, images):
        """Alg. 1, lines 13-17: Eq. (11) for G, and its last two terms, in E's own weights, for E.

        Each gradient is taken with respect to its own network only, and both before either moves. A further step of E
        (`images` without "x_z") leaves G where it is.
        """
        c, m, losses, updates = self.config, self.machine, {}, []
        recon = fool = torch.zeros((), device=x.device)
        with m.autocast():
            if "x_z" in images:
                losses["g_adv"] = adversarial_loss_g(c.base, self.D(self.noisy(images["x_z"]))[0])
            if "x_w" in images and (c.lam or c.lam_e):
                losses["rec_x"] = recon = reconstruction_loss(images["x_w"], x)             # Eq. (6), first term
            if c.mode_regularised and "x_w" in images:
                losses["mode"] = fool = adversarial_loss_g("dcgan", self.D(self.noisy(images["x_w"]))[0])   # MRGAN (D9)
            elif "rec_x" in losses:
                w_hat = apart(self.E, images["x_i"])
                losses["rec_z"] = reconstruction_loss(w_hat, images["w_i"])                 # Eq. (6), second term
                recon = recon + losses["rec_z"]
            if "x_i" in images and (c.mu or c.mu_e):
                losses["iv"] = fool = -classification_loss(self.D(images["x_i"])[1], images["index"])   # Eq. (3)
        if "x_z" in images:
            g = list(self.G.parameters())
            updates.append(("G", g, m.gradients(losses["g_adv"] + c.lam * recon + c.mu * fool, g, retain=True)))   # Eq. (11)
        loss_e = c.lam_e * recon + c.mu_e * fool if c.e_sign == "paper" else -c.mu_e * fool         # D3
        if loss_e.requires_grad:                                    # `--e-sign code --mu 0` leaves E nothing to descend
            e = list(self.E.parameters())
            updates.append(("E", e, m.gradients(loss_e, e)))
        for name, params, grads in updates:
            m.apply(self.optimisers[name], params, grads)
        return losses

    def update_average(self):
        """G's exponential moving average (`--ema`; ours, off by default)."""
        if self.average is not None:
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.parameters()), list(self.G.parameters()), 1 - self.config.ema)
            for mean, now in zip(self.average.buffers(), self.G.buffers()):
                mean.copy_(now)


# ======================================================================================================================
# Part I, Intervention GAN: figures
# ======================================================================================================================


def figures(model, run, step, x):
    """The pictures of one evaluation: x (n, C, S, S), fixed test images; the samples' noise is the same each time."""
    n, d = 100, model.config.latent
    noise = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    save_grid(run.folder / f"samples/{step:06d}.png", model.decode(noise))                  # Figs. 5 and 6
    if not (run.folder / "figures/real.png").exists():
        save_grid(run.folder / "figures/real.png", x)                                       # Fig. 6, left
    if model.E is None:
        return
    w = model.encode(x)
    pairs = torch.stack([x.cpu(), model.decode(w).cpu()], dim=1).flatten(0, 1)
    save_grid(run.folder / f"recon/{step:06d}.png", pairs[:n])                              # original, reconstruction, ...
    w, k, rows = w[:10].cpu(), model.config.k, [x[:10].cpu(), model.decode(w[:10]).cpu()]
    for i in range(k):                                                                      # Fig. 1: G(O_1(w)) .. G(O_k(w))
        rows.append(model.decode(block_substitute(w, torch.full((10,), i), k, noise[:10])).cpu())
    save_grid(run.folder / f"figures/interventions-{step:06d}.png", torch.stack(rows, dim=1).flatten(0, 1), columns=k + 2)


# ======================================================================================================================
# Part II, Intervention Adversarial Auto-Encoder: networks (Tables 3 and 4), losses
# ======================================================================================================================


class CodeEncoder(nn.Sequential):
    """E of Tables 3 ("fc") and 4 ("conv", S a multiple of 16): images (B, C, S, S) -> codes (B, d)."""

    def __init__(self, network, latent, channels, size, width):
        if network == "fc":                                         # Table 3
            layers, n = [nn.Flatten()], channels * size * size
            for _ in range(2):
                layers += [nn.Linear(n, 8 * width), nn.ReLU()]
                n = 8 * width
        else:                                                       # Table 4
            layers, c = [], channels
            for n in range(4):                                      # size -> size / 16
                layers += [nn.Conv2d(c, width << n, 5, 2, 2, bias=False), nn.BatchNorm2d(width << n), nn.ReLU()]
                c = width << n
            layers, n = [*layers, nn.Flatten()], c * (size // 16) ** 2
        super().__init__(*layers, nn.Linear(n, latent))


class CodeGenerator(nn.Sequential):
    """G of Tables 3 and 4: codes (B, d) -> images (B, C, S, S) in [-1, 1]. "conv" makes 64 x 64 pixels only (D17)."""

    def __init__(self, network, latent, channels, size, width):
        w = 8 * width                                               # 1024
        if network == "fc":
            layers = [nn.Linear(latent, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(),
                      nn.Linear(w, channels * size * size), nn.Tanh(), nn.Unflatten(1, (channels, size, size))]
        else:
            layers = [nn.Linear(latent, w * 64), nn.Unflatten(1, (w, 8, 8))]
            for n, place in enumerate(((5, 1, 0), (5, 1, 0), (6, 2, 2))):       # 8 -> 12 -> 16 -> 32
                c = w >> n
                layers += [nn.ConvTranspose2d(c, c // 2, *place, bias=False), nn.BatchNorm2d(c // 2), nn.ReLU()]
            layers += [nn.ConvTranspose2d(width, channels, 4, 2, 1), nn.Tanh()]  # 32 -> 64
        super().__init__(*layers)


class CodeDiscriminator(nn.Sequential):
    """D of Tables 3 and 4: codes (B, d) -> logits (B, t + 1), class k for z_k = T_k(E(x))."""

    def __init__(self, network, latent, width, t):
        hidden, depth = (8 * width, 2) if network == "fc" else (4 * width, 4)
        layers, n = [], latent
        for _ in range(depth):
            layers += [nn.Linear(n, hidden), nn.ReLU()]
            n = hidden
        super().__init__(*layers, nn.Linear(n, t + 1))


def bridge_loss(logits):
    """L_IV of Eq. (1): the mean over k and batch of -log D_k(z_k). logits (t + 1, B, t + 1), first index k. A scalar.

    Under the best D it is log(t + 1) - JS(p_0, .., p_t) (Theorem 2). D descends it, E ascends it.
    """
    k = torch.arange(len(logits), device=logits.device).repeat_interleave(logits.shape[1])
    return F.cross_entropy(logits.flatten(0, 1), k)


def prior_loss(logits):
    """WAE-GAN's form of E's loss (D15): the mean over k < t and batch of -log D_t(z_k), "each z_k came from the prior". At
    t = 1 it is -log D(E(x)). logits (t + 1, B, t + 1), of T_0 .. T_t."""
    return -logits[:-1].log_softmax(2)[..., -1].mean()


def wae_reconstruction(x_hat, x):
    """WAE's cost: .05 times the squared error, summed over an image, mean over the batch (D14). (B, C, S, S) each."""
    return .05 * (x_hat.float() - x.float()).square().flatten(1).sum(1).mean()


def mmd_imq(a, b):
    """WAE-MMD's penalty: the unbiased estimate of MMD^2 between samples a (n, d) and b (m, d); n, m >= 2. A scalar.

    Kernels C / (C + ||a - b||^2), C = 2 d s, summed over s in {.1, .2, .5, 1, 2, 5, 10}; 2 d is the mean squared distance
    of two draws from N(0, I). Pairs within a set leave out each point with itself; so the estimate may be negative.
    """
    def kernel(u, v):
        d2 = (u.square().sum(1)[:, None] + v.square().sum(1) - 2 * u @ v.T).clamp_min(0)
        return sum(c / (c + d2) for c in (2 * a.shape[1] * s for s in (.1, .2, .5, 1., 2., 5., 10.)))

    within = lambda k: (k.sum() - k.trace()) / (len(k) * (len(k) - 1))
    return within(kernel(a, a)) + within(kernel(b, b)) - 2 * kernel(a, b).mean()


# ======================================================================================================================
# Part II, Intervention Adversarial Auto-Encoder: the model
# ======================================================================================================================


class IVAAE(Coder):
    """IVAAE with any bridge; AAE (WAE-GAN) as its t = 1; WAE-MMD with `mmd_imq` in the discriminator's place."""

    def __init__(self, config, machine=None):
        super().__init__(config, machine)
        c, m = config, self.machine
        self.E = CodeEncoder(c.network, c.latent, c.channels, c.size, c.width)
        self.G = CodeGenerator(c.network, c.latent, c.channels, c.size, c.width)
        self.D = CodeDiscriminator(c.network, c.latent, c.width, c.t) if c.bridge != "mmd" else None
        self.to(m.device, memory_format=torch.channels_last)
        rates = {"E": c.lr_e, "G": c.lr} | ({"D": c.lr_d} if self.D is not None else {})
        self.optimisers = {name: torch.optim.Adam(getattr(self, name).parameters(), rate, (c.beta1, c.beta2),
                                                  fused=m.device.type in ("cpu", "cuda")) for name, rate in rates.items()}

    def bridges(self, z):
        """Alg. 1, lines 6-9: [z_0 = z, .., z_t from the prior], t + 1 batches (B, d), each with noise of its own."""
        c = self.config
        if c.bridge == "svgd":
            return svgd_chain(z, c.t)
        substitute = {"bw": prefix_substitute, "rad": radial_substitute}[c.bridge]
        return [z, *(substitute(z, k, c.t, torch.randn_like(z)) for k in range(1, c.t + 1))]

    def judge(self, chain):
        """D's logits (t + 1, B, t + 1) of the t + 1 batches, in one pass."""
        return self.D(torch.cat(list(chain))).float().unflatten(0, (len(chain), -1))

    def encoder_loss(self, logits):
        """What E descends besides the reconstruction: -mu2 L_IV (Alg. 1, line 16: E fools D), or D15's."""
        mu2 = self.config.mu_e / (self.config.t + 1)
        return mu2 * (prior_loss(logits) if self.config.e_loss == "prior" else -bridge_loss(logits))

    def set_rates(self):
        """The learning rates' decay by epoch (Sec. 4), the same factor for all networks."""
        c = self.config
        epoch = self.iteration / c.steps_per_epoch if c.steps_per_epoch else 0.
        factor = next((f for at, f in reversed(c.decay) if epoch >= at), 1.)
        for name, optimiser in self.optimisers.items():
            for group in optimiser.param_groups:
                group["lr"] = factor * {"E": c.lr_e, "G": c.lr, "D": c.lr_d}[name]

    def step(self, x):
        """One iteration of Algorithm 1 on images x (B, C, S, S) in [-1, 1]. Returns its losses as scalars."""
        c, m, x = self.config, self.machine, x.to(memory_format=torch.channels_last)
        self.set_rates()
        with m.autocast():
            z = self.E(x).float()                                                           # line 4
            losses = {"rec": wae_reconstruction(self.G(z), x)}                              # line 5
        if self.D is None:
            losses["mmd"] = mmd_imq(z, torch.randn_like(z))
            total = c.lam * losses["rec"] + c.lam_mmd * losses["mmd"]
        else:
            chain = self.bridges(z)
            losses |= self.step_d([part.detach() for part in chain])                        # lines 10-11
            with m.autocast():
                losses["e_adv"] = self.encoder_loss(self.judge(chain))                      # line 12, by the D just moved
            total = c.lam * losses["rec"] + losses["e_adv"]
        # lines 13-16 at once: the adversarial term does not contain G, so G's part of this gradient is lam L_recon's alone
        g, e = list(self.G.parameters()), list(self.E.parameters())
        grads = m.gradients(total, g + e)
        m.apply(self.optimisers["G"], g, grads[:len(g)])
        m.apply(self.optimisers["E"], e, grads[len(g):])
        m.end_step()
        self.iteration += 1
        return {name: loss.detach() for name, loss in losses.items()}

    def step_d(self, chain):
        """Alg. 1, lines 10-11: D down mu1 L_IV on t + 1 batches of codes (B, d), without a graph to E."""
        m, params = self.machine, list(self.D.parameters())
        with m.autocast():
            loss = bridge_loss(self.judge(chain))
        m.apply(self.optimisers["D"], params, m.gradients(self.config.mu / (self.config.t + 1) * loss, params))
        return {"d_iv": loss}


# ======================================================================================================================
# Part II, Intervention Adversarial Auto-Encoder: figures, and the experiments of Figures 2, 3 and 5
# ======================================================================================================================


def figures_ivaae(model, run, step, x, codes):
    """The pictures of one evaluation: x (n, C, S, S), fixed test images; codes (N, d) of training images."""
    noise = torch.randn(100, model.config.latent, generator=torch.Generator().manual_seed(0))
    save_grid(run.folder / f"samples/{step:06d}.png", model.decode(noise))                  # Fig. 7
    z = model.encode(x).cpu()
    pairs = torch.stack([x.cpu(), model.decode(z).cpu()], dim=1).flatten(0, 1)
    save_grid(run.folder / f"recon/{step:06d}.png", pairs[:100])                            # original, reconstruction, ...
    if len(z) >= 20:                                                                        # a row from one image to another
        weights = torch.linspace(0, 1, 10)[:, None]
        lines = torch.cat([torch.lerp(a, b, weights) for a, b in zip(z[:10], z[10:20])])
        save_grid(run.folder / f"figures/interpolations-{step:06d}.png", model.decode(lines))
    heat = torch.cov(codes.T).abs().clamp(max=1)[None, None]                                # Fig. 6: brighter, closer to 1
    torchvision.utils.save_image(F.interpolate(heat, scale_factor=max(1, 512 // heat.shape[-1])),
                                 run.folder / f"figures/covariance-{step:06d}.png")


def codes_of(model, dataset, n=60_000):
    """Codes (n, d), on the CPU, of the first n images of a set (a set sorted by class is permuted first). The paper draws its
    60,000 at random; of MNIST they are all."""
    from data import ordered
    return torch.cat([model.encode(x).cpu() for x, _ in ordered(dataset, n, 250, model.machine.device, model.config.size)])


def probe_discriminator(model, batches, steps):
    """Figs. 2 and 3: D alone goes on training while E and G stand still. One dict per iteration: `loss` (L_IV of D), the
    norm of E's gradient of -log D_t(E(x)) (`gradient`, Fig. 3's own) and of the loss E trains on (`gradient_iv`)."""
    m, params, lines = model.machine, list(model.E.parameters()), []
    model.E.eval()
    for n in range(1, steps + 1):
        x = next(batches)[0]
        with m.autocast():
            z = model.E(x).float()
        chain = model.bridges(z)
        with m.autocast():
            logits = model.judge(chain)
            objectives = {"gradient": -logits[0].log_softmax(1)[:, -1].mean(), "gradient_iv": model.encoder_loss(logits)}
        norms = {name: sum(g.float().square().sum() for g in m.gradients(loss, params, retain=True)).sqrt().item()
                 for name, loss in objectives.items()}
        lines.append({"iteration": n, "loss": model.step_d([part.detach() for part in chain])["d_iv"].item()} | norms)
        m.end_step()
        if not all(map(math.isfinite, lines[-1].values())):
            raise NotFinite(f"iteration {n} of the probe is not finite: {lines[-1]}")
    model.E.train()
    return lines


def probe_classifier(model, batches, test_set, steps, every=100):
    """Fig. 5: an MLP of two layers of 1000 nodes on the encoder's last hidden layer, E frozen; batch 60, Adam 1e-4 (Sec. 4).

    One dict per `every` iterations: `error`, the share of test images it gets wrong (`protocol`: of which images).
    """
    from data import ordered

    hidden, device = nn.Sequential(*list(model.E)[:-1]), model.machine.device
    features = lambda x: model.infer(hidden, x.to(memory_format=torch.channels_last))
    n = features(next(batches)[0]).shape[1]
    mlp = nn.Sequential(nn.Linear(n, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU(),
                        nn.Linear(1000, test_set.classes)).to(device)
    optimiser = torch.optim.Adam(mlp.parameters(), 1e-4)
    test = [(features(x), y.to(device)) for x, y in ordered(test_set, 10_000, 250, device, model.config.size)]
    lines = []
    for step in range(1, steps + 1):
        x, y = next(batches)
        loss = F.cross_entropy(mlp(features(x)), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % every == 0 or step == steps:
            with torch.no_grad():
                wrong, n = sum((mlp(h).argmax(1) != y).sum().item() for h, y in test), sum(len(y) for _, y in test)
            lines.append({"iteration": step, "loss": loss.item(), "error": wrong / n,
                          "protocol": f"error: {n} {test_set.split} images"})
    return lines


def probe(config, machine, state, folder, which, steps=None):
    """`--probe`: one of the paper's two experiments on the finished run in `folder`; writes probe-NAME.jsonl and its figure.

    `--steps` iterations, else 1,000 (Figs. 2 and 3) or 3,000 (Fig. 5). Raises UserError where the model has no discriminator,
    the data no labels.
    """
    from data import Batches

    if machine.amp == "fp16":
        raise UserError("--amp fp16: a probe looks at gradients that half precision loses; use bf16 or off")
    if config.bridge == "":
        raise UserError(f"--probe: {config.model} is not one of IVAAE's systems")
    if which == "discriminator" and config.bridge == "mmd":
        raise UserError("--probe discriminator: wae-mmd has no discriminator")
    train_set, test_set = load_both(config, machine)
    if which == "classifier" and train_set.y is None:
        raise UserError(f"--probe classifier: {config.dataset} has no labels")
    model = build(config, machine)
    restore(state, model, None, machine)
    batch = config.batch if which == "discriminator" else min(60, len(train_set))
    batches = Batches(train_set, batch, machine.device, config.size, config.seed)
    if which == "discriminator":
        lines = probe_discriminator(model, batches, steps or 1000)
    else:
        lines = probe_classifier(model, batches, test_set, steps or 3000)
    folder = pathlib.Path(folder)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    (folder / f"probe-{which}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in [name for name in lines[0] if name not in ("iteration", "protocol")]:
        curve = [(line["iteration"], line[name]) for line in lines]
        draw_curves(folder / f"figures/probe-{which}-{name}.png", {config.model: curve},
                    f"{name} by iteration, {config.dataset}, d = {config.latent}, after step {state['step']}")
    print(json.dumps({"model": config.model, "probe": which, "after_step": state["step"]} | lines[-1]))


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


def evaluate(model, evaluator, run, step, epoch, x, config, train_set):
    """Pictures and metrics of one moment, after taking E's running statistics anew (D12); on rank 0, and without disturbing the
    training's random numbers."""
    from data import ordered
    from metrics import frechet_latent_distance

    began, latent = time.time(), {}
    if not config.bridge and model.E is not None:
        batches = ordered(train_set, 50 * config.batch, config.batch, model.machine.device, config.size)
        # D12: E's running BN statistics, of its present weights
        with model.machine.autocast(), torch.compiler.set_stance("force_eager"):
            torch.optim.swa_utils.update_bn((x.to(memory_format=torch.channels_last) for x, _ in batches
                                             if len(x) == config.batch), model.E)
    if config.bridge:
        codes = codes_of(model, train_set)
        figures_ivaae(model, run, step, x, codes)
        latent = {"fld": frechet_latent_distance(codes), "fld_n": len(codes)}               # IVAAE's Table 2
    else:
        figures(model, run, step, x)
    metrics = latent | evaluator(model.sample, (lambda x: model.decode(model.encode(x))) if model.E is not None else None)
    if config.bridge:
        metrics["protocol"] = f"fld: {len(codes)} {train_set.split} images; {metrics['protocol']}"
    metrics["eval_s"] = round(time.time() - began, 1)
    run.log(step, epoch=round(epoch, 3), **metrics)
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    for name in ("fid", "fcd", "kl", "fld"):                        # Figs. 4 and 7, in whichever distance there is
        curve = [(line["epoch"], line[name]) for line in lines if name in line]
        if len(curve) > 1:
            draw_curves(run.folder / f"figures/{name}.png", {config.model: curve}, f"{name} by epoch, {config.dataset}")
    return metrics


def score_of(metrics):
    """What best.pt is chosen by, the less the better: the first there is of fid, fcd, kl and mse."""
    return next((metrics[name] for name in ("fid", "fcd", "kl", "mse") if name in metrics), None)


def train(config, machine, folder, state=None):
    """Trains `config` in `folder`, from a checkpoint's `state` if given. Returns the last evaluation's metrics."""
    from data import Batches, ordered
    from metrics import Evaluator

    train_set, test_set = load_both(config, machine)
    if train_set.kind != "images":
        raise UserError(f"--dataset {config.dataset} holds points; ivgen.py needs images")
    batches = Batches(train_set, config.batch, machine.device, config.size, config.seed, machine.rank, machine.world)
    config.channels = train_set.channels
    set_length(config, batches, state)
    config.eval_every = config.eval_every or max(1, min(10 * batches.steps_per_epoch, config.steps // 12))
    config.check()
    model, start, best = build(config, machine), 0, None
    evaluator = Evaluator(train_set, test_set, config.size, machine.device, config.root, config.samples,
                          config.inception or None) if machine.rank == 0 else None
    run = Run(folder, dataclasses.asdict(config), machine, resume=state is not None)
    x_test = next(ordered(test_set, 100, 100, "cpu", config.size))[0]
    machine.seed_ranks()
    if state is not None:
        restore(state, model, batches, machine)
        start, best = state["step"], best_so_far(state, config, folder)
        run.forget_after(start)
    if config.compile:
        compile_networks(model)
    with run:
        return loop(config, machine, model, batches, run, start, best,
                    lambda step, epoch: evaluate(model, evaluator, run, step, epoch, x_test, config, train_set))


def build(config, machine=None):
    """The model that `config.model` names."""
    return (IVAAE if config.bridge else IVGAN)(config, machine)


def draw(config, machine, state, folder, n):
    """`--sample`: n images as PNGs, and a grid of the first hundred, from a checkpoint, without training."""
    model = build(config, machine)
    restore(state, model, None, machine)
    machine.seed_ranks()
    draw_images(model, folder, n)
    print(f"{n} samples of step {state['step']} in {pathlib.Path(folder) / 'drawn'}")


def unused_flags(config):
    """The flags that mean nothing to `config.model`."""
    if not config.bridge:
        if config.model in ("ivdcgan", "ivlsgan"):
            unused = () if max(config.mu, config.lam, config.mu_e, config.lam_e) else ("k", "e_steps", "e_sign")     # no E
        else:
            unused = ("k", "e_sign") if config.model == "mrgan" else ("k", "mu", "lam", "e_steps", "e_sign")
        return ("t", "e_loss", *unused)
    return ("ema", "k", "e_steps", "e_sign", "d_norm") + (("t", "e_loss", "mu") if config.bridge == "mmd" else ())


def main(argv=None):
    """The command line; returns the exit code."""
    parser = Parser(prog=f"{FILE}.py", description=__doc__.splitlines()[0])
    instead = shared_flags(parser, (*MODELS, *IVAAE_MODELS))
    parser.add_argument("--k", type=int, metavar="X", help="blocks, so interventions (Table 4)")
    parser.add_argument("--mu", type=float, metavar="X", help="weight of the intervention loss (Table 4)")
    parser.add_argument("--lam", type=float, metavar="X", help="weight of the reconstruction loss")
    parser.add_argument("--e-steps", type=int, metavar="X", help="updates of E per iteration (D4)")
    parser.add_argument("--e-sign", choices=("paper", "code"), help="E's objective (D3)")
    parser.add_argument("--d-norm", choices=("table1", "dcgan", "none"), help="batch normalisation in D (D2)")
    parser.add_argument("--t", type=int, metavar="X", help="IVAAE: bridge distributions")
    parser.add_argument("--e-loss", choices=("iv", "prior"), help="IVAAE: E's objective (D15)")
    instead.add_argument("--probe", choices=("discriminator", "classifier"),
                         help="with --resume: IVAAE's Figs. 2 and 3, or 5; --steps long")
    parser.add_argument("--ema", type=float, metavar="X", help="decay of an average of G's weights")
    args = vars(parser.parse_args(argv))
    for name in ("sample", "probe"):
        if args[name] and not args["resume"]:
            raise UserError(f"--{name} needs --resume RUN, a finished run")
    state = load_checkpoint(args["resume"], FILE) if args["resume"] else None
    config = settings(args, state, preset)
    if args["inception"] and args["samples"] is None and state is None and not config.bridge \
            and not config.dataset.startswith("stacked-"):                    # of which PacGAN's protocol takes 26,000
        config.samples = FID_SAMPLES.get(config.dataset, 50_000)
    config.check()
    refuse(args, config, unused_flags(config))
    machine = Machine(args["device"], config.amp, config.seed)
    if args["bench"]:
        config.steps = config.steps or args["bench"]
        x = torch.rand(config.batch, config.channels, config.size, config.size, device=machine.device) * 2 - 1
        timed = benchmark(build(config, machine), x, args["bench"], config.compile)
        if machine.rank == 0:
            print(json.dumps({"model": config.model, "size": config.size, "width": config.width, "device": str(machine.device),
                              "world": machine.world, "precision": machine.amp, "compiled": config.compile} | timed))
        return 0
    name = pathlib.Path(config.dataset).name
    folder = folder_of(args, f"runs/{FILE}-{config.model}-{name}-s{config.seed}")
    if args["probe"]:
        probe(config, machine, state, folder, args["probe"], args["steps"])
    elif args["sample"]:
        if machine.rank == 0:
            draw(config, machine, state, folder, args["sample"])
    else:
        train(config, machine, folder, state)
        if machine.rank == 0:
            print(f"run: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
