"""Adversarial Inference by Matching priors and conditionals (AIM), with the systems of its tables.

    "AIM: Adversarial Inference by Matching Priors and Conditionals." Anonymous authors, under
    double-blind review. Sections, equations, tables and figures are those of this version.

The idea. A GAN maps codes to data and has no way back. AIM trains an encoder beside it, so that the
generator's p(z) p(x|z) and the encoder's q(x) q(z|x) agree: their priors of the codes, and their
conditionals of the data. Eq. (1) measures this by two KL divergences. Neither can be computed as
it stands, but by Eq. (2) their sum is, up to a constant, Eq. (3):

    E_p(z) KL(p(x|z) || q(x))     a GAN on the data, plus
    E[-log q(z|x)]                how unlikely E finds the code that made an image.

So training never reconstructs data, and no norm between images blurs them. A generator that sends
many codes to one image (mode collapse) pays for it in the second term. At the minimum both joint
distributions are equal (Proposition 1). E reads D's features without training them, which keeps it
small. (Eqs. (4) and (5) are the same steps for a VAE, and nothing here computes them.)

    python aim.py                                      25 Gaussians (Table 2, Fig. 3), offline
    python aim.py --model gan                          or veegan, unrolled, pacgan, ali, alice, ...
    python aim.py --model veegan --authors             a baseline as its own authors have it (D14)
    python aim.py --dataset mnist                      Table 3: 28 x 28 pixels, 400 epochs
    python aim.py --dataset mnist --latent 2           Fig. 4: codes by class, and the manifold
    python aim.py --dataset cifar10 --model aim-minus  Table 4: 64 x 64 pixels; AIM-: sigma = 1
    python aim.py --dataset celeba --model alice       Fig. 7, in recon/; --lam is its lambda

What to expect of `python aim.py`: all 25 modes, and about 90 % of the samples within 3 sigma of
a mean, after three to five minutes on two CPU cores. The first run on MNIST also trains the two
classifiers of D10, for some ten minutes.
"""

import contextlib
import functools
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass

if __name__ == "__main__":  # Ctrl-C while torch is imported leaves no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import torch
import torch.nn.functional as F
from torch import nn

try:
    import data
    import metrics
    from data import POINT_SETS, Settings, UserError, setting
    from metrics import fixed_noise, save_grid, save_panels, save_picture, scatter
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"aim.py: put data.py and metrics.py beside it ({error})", file=sys.stderr)
    sys.exit(2)

FILE = "aim"


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
# AIM, and the systems with which it is compared
# ==================================================================================================
#
# Notation
#     paper           here          shape, range
#     x ~ q(x)        x             (B, C, S, S) in [-1, 1], or points (B, C)
#     z ~ p(z)        z             (B, d) from N(0, I); z -> x is Fig. 1
#     x~ = G(z)       x_tilde       as x; G is deterministic (Sec. 5)
#     D_feature(x)    h             (B, 128, 7, 7), (B, 1024, 4, 4), or (B, 200) of points
#     D_con           critic        h -> (B,); D_feature is `features`
#     rho_q, rho_p    rho_q, rho_p  (B,) D(x) = D_con(D_feature(x)), and D(x~). The code holds the
#                                   logits; all losses but Eq. (6)'s apply the sigmoid
#     mu, sigma^2     mu, log_var   (B, d) each
#     lambda          lam           1/d (Sec. 5); 1 with Eq. (6)
#
# Algorithm 1, a call of `AIM.step` (the numbers of the lines are ours)
#     1  z ~ p(z)
#     2  x~ = G(z)
#     3  mu, sigma^2 = E(x~), which reads D_feature(x~)
#     4  rho_q = D(x)
#     5  rho_p = D(x~)
#     6  L_d = -mean log rho_q - mean log(1 - rho_p)
#     7  L_g = -mean log rho_p
#     8  L_e = lambda mean L(z, mu, sigma^2), by Eq. (8)
#     9  L_rec = L_g + L_e, Eq. (9) for G and E, with line 7 for V
#    10  D_feature, D_con: a step down L_d
#    11  G, E: a step down L_rec; L_e reaches G through D_feature, but does not move it
#
# Algorithm 2: `encode` is mu(x), `reconstruct` is G(mu(x)), `neighbours` is G of z ~ q(z|x).
#
# Deviations. No code of AIM's authors is known, so there is no column for it; "-": no switch.
# no. | paper                      | here, and why                                       | switch
# D1  | Table 3's G: 3 channels    | as many as the data have; Table 3's D takes 1       | -
# D2  | FC (sigma) ends linear     | it gives log sigma^2, clamped to [-10, 10], so that | -
#     |                            | sigma^2 is positive, and 1 / sigma^2 finite         |
# D3  | all losses, then updates   | so here; most GAN code asks the moved D for L_g     | -
# D4  | silent on 2-D training     | ALI's G, D, beta1 .8 and batch; PacGAN's 2,500      | --lr ...
#       samples. Ours: E's heads (Table 3's without BN); 12 epochs (Swiss rolls 400); alpha 5e-4,
#       falling to 0 in the second half; initial weights spread over the data. With N(0, .02) all
#       kinks of D lie at 0, and modes are found later.
# D5  | Table 3: images in [0, 1]  | in [-1, 1], as all data here; G's last layer and    | -
#     |                            | D_feature's first convert                           |
# D6  | Eq. (6): G's gradient      | `aim-fgan` minimises it as printed; it bounds       | --model
#     | vanishes                   | KL(q || p), and Eq. (3) asks for KL(p || q)         |
# D7  | ALI, ALICE are quoted      | trained, G as AIM's, D_feature and E of their own;  | --model
#     |                            | D joins z to D_feature(x) before Table 3's D_con,   |
#     |                            | for points to x itself; G, E: non-saturating loss   |
# D8  | ALICE: ||x - G(z)||_k^k    | its mean over numbers, k = 2, times lam = 1;        | --k
#     |                            | `alice-adv`: a D on the pairs (x, x), (x, G(z))     | --lam
# D9  | silent on BN               | scale 1, shift 0 (of points U(-1, 1)).              | -
#       Running statistics: G's follow the prior's codes alone, since `sample` uses them. AIM's
#       D_feature meets data and samples in turn, AIM's E samples alone, ALI's E data alone.
#       `encode` uses them as they are.
# D10 | MNIST is scored by Li et   | `is_li`: by that network, trained anew; `is`: by    | -
#     | al.'s network (TensorFlow) | the small classifier of metrics.py                  |
# D11 | silent on paddings         | 1 at stride 2, else 0, but 1 at E's 2 x 2 kernel:   | -
#     |                            | so the printed 576 = 64 * 3^2 and 512 = 128 * 2^2   |
# D12 | silent on biases before BN | none: BN would undo them                            | -
# D13 | quotes VEEGAN, Unrolled,   | trained, as is PacGAN; losses as in their authors'  | --model
#     | Table 2's GAN              | code for points. VEEGAN's F: an E with sigma = 1.   |
#       A pack's items are of one batch (theirs: of all data). Table 2's GAN is Table 1's here.
# D14 | quoted rows: own settings  | AIM's, so that rows compare (D4), or their authors' | --authors
#       on points: ALI's and ALICE's E has noise, no G has any beside z; packs as in D13; Unrolled
#       GAN as in its notebook. On images only ALICE has such settings: lambda, k, a cycle of
#       codes, and for `alice-adv` five steps of G; the rest is as for AIM.
# D15 | silent on the MSE's scale  | `mse`: of pixels in [0, 1]; `mse_pm1`: in [-1, 1]   | -
# D16 | CelebA: crop's size silent | the central 140 x 140, as IVAAE and WAE have it     | -

# ---- Settings ------------------------------------------------------------------------------------

MODELS = {  # the systems, and what each changes of AIMConfig
    "aim": {}, "gan": {}, "pacgan": {}, "unrolled": {}, "ali": {},
    "alice": dict(lam=1.0), "alice-adv": dict(lam=1.0),
    "aim-minus": dict(fixed_variance=True),  # Sec. 5.1
    "aim-fgan": dict(game="fgan", lam=1.0),  # Sec. 4.4: lambda = 1 with Eq. (6)
    "veegan": dict(fixed_variance=True),
}
TABLE3 = dict(size=28, epochs=400.0, std=0.02)
TABLE4 = dict(size=64, std=0.02)  # AIMConfig has this table's other values
POINTS = dict(epochs=12.0, lr=5e-4, decay="linear", beta1=0.8, samples=2500, amp="off")  # D4
DATASETS = {  # what a data set changes; any other set or folder has TABLE4
    "grid25": POINTS | dict(reach=4.0), "ring8": POINTS,  # reach: the means' largest coordinate
    "swissroll": POINTS | dict(epochs=400.0), "swissroll3d": POINTS | dict(epochs=400.0),
    "mnist": TABLE3 | dict(samples=50_000), "fashion-mnist": TABLE3 | dict(samples=50_000),
    "cifar10": TABLE4 | dict(samples=50_000),  # Sec. 5.1, as for MNIST
    "digits": TABLE3 | dict(steps=2400, eval_every=800),  # ours: minutes on two cores
    "stacked-digits": TABLE3 | dict(samples=26_000), "stacked-mnist": TABLE3 | dict(samples=26_000),
}
STEADY = dict(decay="none", beta1=0.5, lr=1e-3)  # Unrolled GAN's, VEEGAN's and ALICE's
ALIS = dict(decay="none", std=0.02, lr=1e-4)  # and PacGAN's; beta1, batch, G and D: those of D4
ALICES = STEADY | dict(steps=1600, batch=128, g_steps=5)  # their 100 epochs are of 2,048 points
AUTHORS = {  # --authors (D14): changes on points, on images, or on one data set
    ("pacgan", "points"): ALIS | dict(epochs=400.0),  # fjxmlzn/PacGAN
    ("unrolled", "points"): STEADY | dict(steps=25_000, batch=512, lr_d=1e-4),  # poolio
    ("veegan", "points"): STEADY | dict(steps=100_000, batch=500),  # akashgit/VEEGAN
    ("ali", "points"): ALIS | dict(epochs=200.0),  # IshmaelBelghazi/ALI
    ("alice", "points"): ALICES, ("alice-adv", "points"): ALICES | dict(lam=0.1),  # ChunyuanLI
    ("alice", "images"): {}, ("alice-adv", "images"): dict(lam=0.1, g_steps=5),
    ("alice", "cifar10"): dict(lam=1e-6, k=1.0),  # of its sweep, the cell that Table 1 quotes
    ("alice", "celeba"): dict(k=1.0),
}


@dataclass
class AIMConfig(Settings):
    """Every setting of a run, Table 4's by default. Fields with a text are flags. For width and
    latent None is the table's value."""

    model: str = setting("aim", f"the system: {', '.join(MODELS)}", choices=tuple(MODELS))
    dataset: str = setting("grid25", "a name (python data.py --help), or a folder of pictures")
    authors: bool = setting(False, "the system as its own authors have it (D14)",
                            models={model for model, _ in AUTHORS})
    size: int | None = setting(None, "pixels: 28, with Table 3's networks, or 64, Table 4's", int)
    width: int | None = setting(None, "channels of D's first layer; of points, G's units", int, 2)
    latent: int | None = setting(None, "d, the numbers of a code", int, 1)
    batch: int = setting(100, "items a step and rank (Tables 3 and 4: 100)", least=2)
    epochs: float = setting(300.0, "length, where --steps is not given (Table 3: 400; 4: 300)",
                            least=1e-9)
    lr: float = setting(2e-4, "alpha (Tables 3 and 4: 2e-4; D4)", least=0)
    lr_d: float | None = setting(None, "alpha of D, if not --lr", float, 0, models=("unrolled",))
    decay: str = setting("sqrt", "of alpha: sqrt, alpha / root epoch (Tables 3 and 4); linear, to "
                         "0 in the second half (D4); none", choices=("sqrt", "linear", "none"))
    beta1: float = setting(0.5, "Adam's beta1 (Tables 3 and 4: 0.5; D4)", least=0, most=0.999)
    beta2: float = setting(0.999)  # Adam's own (paper silent)
    std: float | None = setting(None, "initial weights N(0, std), biases 0 (Tables 3 and 4: 0.02); "
                                      "points without it: spread over the data (D4)", float, 1e-6)
    lam: float | None = setting(None, "weight of L_e: 1/d (Sec. 5), with Eq. (6) 1; of ALICE's "
                                "cycle (D8)", float, 0,
                                models=("aim", "aim-minus", "aim-fgan", "alice", "alice-adv"))
    k: float = setting(2.0, "k of ALICE's cycle |x - G(z)|^k (D8)", least=1, models=("alice",))
    pack: int = setting(4, "m, the items that D judges together", least=1, models=("pacgan",))
    unroll: int = setting(5, "K, the steps of D that G foresees", least=0, models=("unrolled",))
    g_steps: int = setting(1)  # of ALI, ALICE: steps of G and E for one of D (D14)
    game: str = setting("gan", choices=("gan", "fgan"))  # of AIM: Eq. (7) or Eq. (6)
    fixed_variance: bool = setting(False)  # AIM-, VEEGAN: sigma = 1
    reach: float = setting(1.0)  # the extent of the points (D4)

    def check(self):
        """Raises UserError, in one sentence, for settings that cannot work."""
        super().check()
        if self.dataset not in POINT_SETS and self.size not in (28, 64):
            raise UserError(f"--size {self.size}: the paper has networks for 28 pixels (Table 3) "
                            "and for 64 (Table 4)")
        if self.width and self.width % 2:
            raise UserError(f"--width {self.width} is not an even number")
        if self.model == "pacgan" and self.pack > self.batch:
            raise UserError(f"--pack {self.pack}: there are only {self.batch} items in a batch")
        if self.model == "unrolled" and self.compile:
            raise UserError("--compile does not go with unrolled, which differentiates D's steps")


@dataclass
class PointsConfig(AIMConfig):
    """The settings for points: without pixels and FID, so without these two flags."""

    size: int | None = setting(None)
    inception: str | None = setting(None)


def preset(model=None, dataset=None, authors=False):
    """The paper's values, then what the data set, the system and its own `authors` change.

    Raises UserError for an unknown system, and for one without settings of its authors.
    """
    model = model or "aim"
    dataset = dataset or "grid25"
    if model not in MODELS:
        raise UserError(f"--model {model} is not one of {', '.join(MODELS)}")
    settings = DATASETS.get(dataset, TABLE4) | MODELS[model]
    if authors:
        kind = "points" if dataset in POINT_SETS else "images"
        own = AUTHORS.get((model, dataset), AUTHORS.get((model, kind)))
        if own is None:
            raise UserError(f"--authors: there are no such settings of {model} on {dataset}")
        settings = settings | own | dict(authors=True)
    config = PointsConfig if dataset in POINT_SETS else AIMConfig
    return config(model=model, dataset=dataset, **settings)


# ---- Networks ------------------------------------------------------------------------------------

FC = nn.Linear
CONV = nn.Conv2d
UP = nn.ConvTranspose2d


def rows(*specs, slope=0.2):
    """Layers for rows of a table. A spec that is a module already is taken as it is.

    A row: operation, inputs, outputs, kernel, stride, padding (D11), BN?, nonlinearity; an FC row
    has no kernel, stride and padding. No bias before BN (D12).
    """
    layers = []
    for spec in specs:
        if isinstance(spec, nn.Module):
            layers.append(spec)
            continue
        operation, inputs, outputs, *place, norm, nonlinearity = spec
        layers.append(operation(inputs, outputs, *place, bias=not norm))
        if norm:
            layers.append((nn.BatchNorm1d if operation is FC else nn.BatchNorm2d)(outputs))
        layers += {"ReLU": [nn.ReLU(True)], "Leaky": [nn.LeakyReLU(slope, True)],
                   "Sigmoid": [nn.Sigmoid()], "Tanh": [nn.Tanh()], "": []}[nonlinearity]
    return nn.Sequential(*layers)


class Maxout(nn.Module):
    """(B, n_in) -> (B, n_out): coordinate by coordinate, the largest of `pieces` linear maps."""

    def __init__(self, n_in, n_out, pieces=5):
        super().__init__()
        self.linear = nn.Linear(n_in, pieces * n_out)  # all pieces in one product
        self.shape = (pieces, n_out)

    def forward(self, x):
        return self.linear(x).unflatten(1, self.shape).max(1).values


class Affine(nn.Module):
    """x -> scale * x + shift, with fixed numbers: between [0, 1] and [-1, 1] (D5)."""

    def __init__(self, scale, shift):
        super().__init__()
        self.scale = scale
        self.shift = shift

    def forward(self, x):
        return x * self.scale + self.shift


class PairCritic(nn.Module):
    """ALI's D: (x, z) -> logits (B,), float32. z joins D_feature(x), of points x itself (D7)."""

    def __init__(self, features, critic):
        super().__init__()
        self.features = features
        self.critic = critic

    def forward(self, x, z):
        h = self.features(x).flatten(1)  # (B, C, S, S) -> (B, n)
        return self.critic(torch.cat([h, z.to(h.dtype)], 1)).float()


class Encoder(nn.Module):
    """E: D_feature's output -> mu, log_var, (B, d) each, float32; without log_var sigma is 1."""

    def __init__(self, trunk, mu, log_var=None):
        super().__init__()
        self.trunk = trunk
        self.mu = mu
        self.log_var = log_var

    def forward(self, h):
        h = self.trunk(h)
        mu = self.mu(h).float()
        if self.log_var is None:
            return mu, torch.zeros_like(mu)
        return mu, self.log_var(h).float().clamp(-10, 10)  # D2


class ImplicitEncoder(nn.Module):
    """E of points x (B, c) and as much noise -> z, log_var, (B, d) each, float32 (D14).

    z is a draw of q(z|x) already, so log_var is -inf: sigma is 0.
    """

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        z = self.network(torch.cat([x, torch.randn_like(x)], 1)).float()
        return z, torch.full_like(z, -math.inf)


class Networks:
    """The networks of a table, as printed, at any w (channels of D's first layer), d (numbers of
    a code), c (channels of x). A table has these three, the slope of its leaky ReLU, and
    `numbers`, how many D_feature(x) has, in w."""

    def __init__(self, width=None, latent=None, channels=None):
        self.w = width or self.w
        self.d = latent or self.d
        self.c = channels or self.c

    def fc_critic(self, n):
        """D_con of Table 3 on n numbers -> logits (B,)."""
        w = 64 * self.w // type(self).w  # 64, as printed, at Table 4's own width too (its ALI)
        return rows(nn.Flatten(), (FC, n, 16 * w, "BN", "Leaky"), (FC, 16 * w, w, "", ""),
                    (FC, w, 1, "", ""), nn.Flatten(0), slope=self.slope)

    def whole_critic(self, channels):  # D: x with so many channels -> logits (B,)
        return nn.Sequential(self.features(channels), self.critic())

    def pair_critic(self):  # ALI's D (D7)
        return PairCritic(self.features(), self.fc_critic(self.numbers * self.w + self.d))

    def code_critic(self):  # ALICE's D of two codes (B, 2 d) (D14)
        return self.fc_critic(2 * self.d)

    def own_encoder(self, fixed_variance):  # ALI's E, of x (D7)
        return nn.Sequential(self.features(), self.encoder(fixed_variance))

    def encoder_on(self, trunk, n, fixed_variance, norm="BN"):
        """E: `trunk` gives n numbers; on them the tables' FC (mu) and FC (sigma)."""
        half = self.w // 2
        heads = [rows((FC, n, half, norm, "Leaky"), (FC, half, self.d, "", ""), slope=self.slope)
                 for _ in range(1 if fixed_variance else 2)]
        return Encoder(trunk, *heads)


class Table3(Networks):
    """For 28 x 28 pixels (MNIST)."""
    w = 64
    d = 32
    c = 1
    slope = 0.1
    numbers = 98  # times w: D_feature(x)

    def generator(self):  # (B, d) -> (B, c, 28, 28) in [-1, 1]
        w = self.w
        return rows((FC, self.d, 16 * w, "BN", "ReLU"),
                    (FC, 16 * w, 98 * w, "BN", "ReLU"),
                    nn.Unflatten(1, (2 * w, 7, 7)),
                    (UP, 2 * w, w, 4, 2, 1, "BN", "ReLU"),
                    (UP, w, self.c, 4, 2, 1, "", "Sigmoid"),
                    Affine(2, -1))

    def features(self, channels=None):  # D_feature: (B, c, 28, 28) -> (B, 2 w, 7, 7)
        return rows(Affine(0.5, 0.5),
                    (CONV, channels or self.c, self.w, 4, 2, 1, "", "Leaky"),
                    (CONV, self.w, 2 * self.w, 4, 2, 1, "BN", "Leaky"), slope=self.slope)

    def critic(self):  # D_con: (B, 2 w, 7, 7) -> (B,)
        return self.fc_critic(self.numbers * self.w)

    def encoder(self, fixed_variance=False):  # (B, 2 w, 7, 7) -> (B, d) twice
        trunk = rows((CONV, 2 * self.w, self.w, 4, 2, 1, "BN", "Leaky"), nn.Flatten(),
                     slope=self.slope)  # 7 -> 3
        return self.encoder_on(trunk, 9 * self.w, fixed_variance)


class Table4(Networks):
    """For 64 x 64 pixels (CIFAR-10, CelebA)."""
    w = 128
    d = 64
    c = 3
    slope = 0.2
    numbers = 128  # times w: 8 w x 4 x 4

    def generator(self):  # (B, d) -> (B, c, 64, 64) in [-1, 1]
        w = self.w
        return rows(nn.Unflatten(1, (self.d, 1, 1)),
                    (UP, self.d, 8 * w, 4, 1, 0, "BN", "ReLU"),
                    (UP, 8 * w, 4 * w, 4, 2, 1, "BN", "ReLU"),
                    (UP, 4 * w, 2 * w, 4, 2, 1, "BN", "ReLU"),
                    (UP, 2 * w, w, 4, 2, 1, "BN", "ReLU"),
                    (UP, w, self.c, 4, 2, 1, "", "Tanh"))

    def features(self, channels=None):  # D_feature: (B, c, 64, 64) -> (B, 8 w, 4, 4)
        w = self.w
        return rows((CONV, channels or self.c, w, 4, 2, 1, "", "Leaky"),
                    (CONV, w, 2 * w, 4, 2, 1, "BN", "Leaky"),
                    (CONV, 2 * w, 4 * w, 4, 2, 1, "BN", "Leaky"),
                    (CONV, 4 * w, 8 * w, 4, 2, 1, "BN", "Leaky"))

    def critic(self):  # D_con: (B, 8 w, 4, 4) -> (B,)
        return rows((CONV, 8 * self.w, 1, 4, 1, 0, "", ""), nn.Flatten(0))

    def encoder(self, fixed_variance=False):  # (B, 8 w, 4, 4) -> (B, d) twice
        w = self.w
        trunk = rows((CONV, 8 * w, 4 * w, 4, 2, 1, "", "Leaky"),  # 4 -> 2
                     (CONV, 4 * w, 4 * w, 4, 2, 1, "BN", "Leaky"),  # 2 -> 1
                     (CONV, 4 * w, 2 * w, 2, 1, 1, "BN", "Leaky"),  # 1 -> 2
                     (CONV, 2 * w, w, 1, 1, 0, "BN", "Leaky"), nn.Flatten())
        return self.encoder_on(trunk, 4 * w, fixed_variance)


class Points(Networks):
    """For points (D4): G, of layers of w, and D are ALI's; E's heads are Table 3's, without BN.

    reach: the extent of the points, to which the initial weights are fitted.
    """
    w = 400
    d = 2
    c = 2
    slope = 0.2
    reach = 1.0

    def generator(self):  # (B, d) -> (B, c)
        inner = (FC, self.w, self.w, "BN", "ReLU")
        G = rows((FC, self.d, self.w, "BN", "ReLU"), inner, inner, inner,
                 (FC, self.w, self.c, "", ""))
        G[-1].weight.data *= 2 * self.reach  # the first samples lie all over the data
        return G

    def features(self, channels=None):  # (B, c) -> (B, w / 2)
        half = self.w // 2
        features = rows(Maxout(channels or self.c, half), Maxout(half, half))
        features[0].linear.bias.data *= self.reach  # so do the kinks of D's maxouts
        return features

    def critic(self):  # (B, w / 2) -> (B,)
        half = self.w // 2
        return rows(Maxout(half, half), FC(half, 1), nn.Flatten(0))

    def pair_critic(self):  # z joins x itself
        return PairCritic(nn.Identity(), self.whole_critic(self.c + self.d))

    def code_critic(self):
        return self.whole_critic(2 * self.d)

    def encoder(self, fixed_variance=False):  # (B, w / 2) -> (B, d) twice
        E = self.encoder_on(nn.Identity(), self.w // 2, fixed_variance, norm="")
        if not fixed_variance:  # sigma starts at 1: a small one would throw G about at first
            nn.init.zeros_(E.log_var[-1].weight)
            nn.init.zeros_(E.log_var[-1].bias)
        return E


class ALIPoints(Points):
    """ALI's authors' networks: `Points`, but with an implicit E (D14)."""

    def own_encoder(self, fixed_variance):
        return ImplicitEncoder(rows((FC, 2 * self.c, self.w, "BN", "ReLU"),
                                    (FC, self.w, self.w, "BN", "ReLU"),
                                    (FC, self.w, self.d, "", "")))


class Perceptrons(Points):
    """Other authors' networks (D14): two hidden layers of w, `hidden_of_d` in D."""

    def __init__(self, width, latent, channels, w, d, hidden_of_d=2, nonlinearity="ReLU",
                 initial=nn.init.xavier_uniform_, implicit=False):
        super().__init__(width or w, latent or d, channels)
        self.hidden_of_d = hidden_of_d
        self.nonlinearity = nonlinearity
        self.initial = initial
        self.implicit = implicit

    def perceptron(self, n_in, n_out, hidden=2):  # (B, n_in) -> (B, n_out)
        inputs = [n_in, *[self.w] * (hidden - 1)]
        network = rows(*((FC, n, self.w, "", self.nonlinearity) for n in inputs),
                       (FC, self.w, n_out, "", ""))
        for layer in network[::2]:
            self.initial(layer.weight)
            nn.init.zeros_(layer.bias)
        return network

    def generator(self):
        return self.perceptron(self.d, self.c)

    def features(self, channels=None):  # (B, c) -> (B, 1), all of D
        return self.perceptron(channels or self.c, 1, self.hidden_of_d)

    def critic(self):
        return nn.Flatten(0)

    def own_encoder(self, fixed_variance):
        if self.implicit:
            return ImplicitEncoder(self.perceptron(2 * self.c, self.d))
        return Encoder(nn.Identity(), self.perceptron(self.c, self.d))


NETWORKS = {  # by size (None: points); with --authors on points, by the system's name
    None: Points, 28: Table3, 64: Table4, "pacgan": Points, "ali": ALIPoints,
    "unrolled": functools.partial(Perceptrons, w=128, d=256, nonlinearity="Tanh",
                                  initial=functools.partial(nn.init.orthogonal_, gain=1.4)),
    "veegan": functools.partial(Perceptrons, w=128, d=254, hidden_of_d=1),
    **dict.fromkeys(("alice", "alice-adv"),
                    functools.partial(Perceptrons, w=256, d=2, implicit=True)),
}


def networks_of(config, channels=None):
    """The Networks for `config.size`, or of a system's authors on points (D14).

    channels: of the data; None: as the table has it.
    """
    key = config.model if config.authors and config.size is None else config.size
    make = NETWORKS[key](config.width, config.latent, channels)
    make.reach = config.reach
    return make


def initialise(model, std):
    """Tables 3 and 4: weights N(0, std), biases 0; BN stays at scale 1, shift 0 (D9).

    std None, only for points: weights stay as they were made, BN's shifts are U(-1, 1) (D4, D9).
    """
    for module in model.modules():
        if std is None and isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.bias, -1, 1)
        elif std is not None and isinstance(module, (FC, CONV, UP)):
            nn.init.normal_(module.weight, 0.0, std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# ---- Losses, to be minimised ---------------------------------------------------------------------
# Scalars, but posterior_nll (B,); in nats, but cycle_loss. D's outputs are logits v (B,):
# -log sigmoid(v) = softplus(-v), -log(1 - sigmoid(v)) = softplus(v).


def gan_loss_of_d(real, fake):
    """L_d of Algorithm 1: the value function of Eq. (7), negated."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def gan_loss_of_g(fake):
    """L_g of Algorithm 1: -log D(G(z)), which Sec. 4.4 minimises instead of Eq. (7)."""
    return F.softplus(-fake).mean()


def fgan_loss_of_d(real, fake):
    """Eq. (6), negated. D's output has no sigmoid here."""
    return (fake - 1).exp().mean() - real.mean()


def fgan_loss_of_g(fake):
    """Eq. (6) as it is (D6). Its first term does not depend on G."""
    return -(fake - 1).exp().mean()


GAMES = {"gan": (gan_loss_of_d, gan_loss_of_g), "fgan": (fgan_loss_of_d, fgan_loss_of_g)}


def posterior_nll(z, mu, log_var):
    """Eq. (8): L(z, mu, sigma^2) = -log N(z; mu, sigma^2 I). (B, d) each -> (B,)."""
    distance = (z - mu).square() * torch.exp(-log_var)
    return (distance + log_var + math.log(2 * math.pi)).sum(1) / 2


def joint_loss(real, fake):
    """ALI's loss of G and E, of D's logits (B,): each kind of pair shall look like the other."""
    return F.softplus(real).mean() + F.softplus(-fake).mean()


def cycle_loss(x, x_hat, k=2):
    """ALICE's cycle: the mean of |x - x_hat|^k over all numbers (D8). Equal shapes; float32."""
    return (x.float() - x_hat.float()).abs().pow(k).mean()


def adam_step(weights, gradients, moments, t, lr, betas, eps=1e-8):
    """Step t = 1, 2, ... of torch's Adam, differentiable: -> new weights, new moments.

    Lists with an item for each weight; a moment is (m, v).
    """
    moments = [(m.lerp(g, 1 - betas[0]), v.lerp(g.square(), 1 - betas[1]))
               for g, (m, v) in zip(gradients, moments)]
    new = []
    for w, (m, v) in zip(weights, moments):
        root = (v / (1 - betas[1] ** t)).clamp_min(1e-30).sqrt()  # a root has no derivative at 0
        new.append(torch.addcdiv(w, m, root + eps, value=-lr / (1 - betas[0] ** t)))
    return new, moments


# ---- Models --------------------------------------------------------------------------------------


class GAN(nn.Module):
    """The GAN of Tables 1 and 2: AIM without E.

    Four verbs: `step(x)`, an iteration of Algorithm 1; `sample(n)`; `encode(x)`; `decode(z)`.
    channels: of x (None: as the table has it). steps, the length of the run, and steps_per_epoch
    are for the decay of the learning rate; without them it stays at alpha.
    """

    def __init__(self, config, machine=None, channels=None, steps=None, steps_per_epoch=None):
        super().__init__()
        self.config = config
        self.machine = machine or Machine()
        self.steps = steps
        self.steps_per_epoch = steps_per_epoch
        self.iteration = 0
        self.E = None
        make = networks_of(config, channels)
        self.latent = make.d
        of_d, of_g = self.make_networks(make)
        initialise(self, config.std)
        self.to(self.machine.device, memory_format=torch.channels_last)
        betas = (config.beta1, config.beta2)
        self.optimiser_d = self.machine.adam(of_d.parameters(), config.lr, betas)
        self.optimiser_g = self.machine.adam(of_g.parameters(), config.lr, betas)

    def make_networks(self, make, pack=1):
        """Sets the networks. Returns those that step down L_d, and those that step down L_rec."""
        self.G = make.generator()
        self.features = make.features(pack * make.c)
        self.critic = make.critic()
        return nn.ModuleList([self.features, self.critic]), self.G

    def begin_step(self):
        """Sets the learning rates of this iteration, and counts it."""
        lr = self.config.lr
        lr_d = lr if self.config.lr_d is None else self.config.lr_d
        self.optimiser_d.param_groups[0]["lr"] = self.decayed(lr_d)
        self.optimiser_g.param_groups[0]["lr"] = self.decayed(lr)
        self.iteration += 1

    def decayed(self, alpha):
        """alpha / sqrt(t), t = 1, 2, ... the epoch (Tables 3 and 4); linear: D4."""
        if self.config.decay == "sqrt" and self.steps_per_epoch:
            return alpha / math.sqrt(1 + self.iteration // self.steps_per_epoch)
        if self.config.decay == "linear" and self.steps:
            return alpha * max(0.0, min(1.0, 2 - 2 * self.iteration / self.steps))
        return alpha

    def prior(self, n):
        """z (n, d) from N(0, I)."""
        return torch.randn(n, self.latent, device=self.machine.device)

    def judge(self, x):
        """D's logits (B,) of data x, or of packs of them."""
        return self.critic(self.features(x)).float()

    def play(self, x):
        """rho_q and rho_p of data x and as many samples."""
        x_tilde = self.G(self.prior(len(x)))
        return self.judge(x), self.judge(x_tilde)

    def step(self, x):
        """Algorithm 1 without E, so without lines 3, 8 and 9. Returns d: L_d, and g: L_g."""
        self.begin_step()
        with self.machine.autocast():
            rho_q, rho_p = self.play(x)
            loss_d = gan_loss_of_d(rho_q, rho_p)
            loss_g = gan_loss_of_g(rho_p)
        self.machine.descend_together((self.optimiser_d, loss_d), (self.optimiser_g, loss_g))
        return {"d": loss_d.detach(), "g": loss_g.detach()}

    def decode(self, z):
        """Codes (n, d) on any device -> data (n, ...) in [-1, 1], or points; float32."""
        with self.machine.inference(self):
            return self.G(z.to(self.machine.device)).float()

    def sample(self, n):
        """n images (n, C, S, S) in [-1, 1], or points (n, C), from the prior."""
        return self.decode(self.prior(n))

    def encode(self, x):
        """Raises ValueError: a GAN has no way back to the codes."""
        raise ValueError(f"{self.config.model} has no encoder")


class PacGAN(GAN):
    """PacGAN (Lin et al., 2018): D judges packs of m items. m = 1 is the GAN."""

    def make_networks(self, make):
        return super().make_networks(make, self.config.pack)

    def play(self, x):
        """rho_q of a pack x_i .. x_(i+m-1) for each item i, rho_p of as many packs of samples."""
        m = self.config.pack
        packs = torch.cat([x.roll(-n, 0) for n in range(m)], 1)  # (B, C, ...) -> (B, m C, ...)
        fakes = torch.cat([self.G(self.prior(len(x))) for _ in range(m)], 1)
        return self.judge(packs), self.judge(fakes)


class UnrolledGAN(GAN):
    """Unrolled GAN (Metz et al., 2017): G plays against the D that K steps of Adam would reach.

    K = 0 is the GAN but for G's loss: G maximises all of L_d, as in its authors' 2-D experiment.
    Of several ranks each foresees D's steps on its own batch.
    """

    def step(self, x):
        """Returns d: L_d, and g: -L_d at the unrolled D. All of it is computed on one batch."""
        self.begin_step()
        D = nn.Sequential(self.features, self.critic)
        names, weights = zip(*D.named_parameters())
        group = self.optimiser_d.param_groups[0]
        moments = [[self.optimiser_d.state[w].get(name, torch.zeros_like(w))
                    for name in ("exp_avg", "exp_avg_sq")] for w in weights]

        def loss_at(weights):
            rho_q, rho_p = (torch.func.functional_call(D, dict(zip(names, weights)), batch)
                            for batch in (x, x_tilde))
            return gan_loss_of_d(rho_q, rho_p)

        with self.machine.autocast():
            x_tilde = self.G(self.prior(len(x))).float()
        loss_d = unrolled = loss_at(weights)  # in float32: fp16 overflows here
        for k in range(self.config.unroll):  # D's next step is Adam's `iteration`-th
            gradients = torch.autograd.grad(unrolled, weights, create_graph=True)
            weights, moments = adam_step(weights, gradients, moments, self.iteration + k,
                                         group["lr"], group["betas"])
            unrolled = loss_at(weights)
        self.machine.descend_together((self.optimiser_d, loss_d), (self.optimiser_g, -unrolled))
        return {"d": loss_d.detach(), "g": -unrolled.detach()}


class AIM(GAN):
    """AIM, with settings for AIM- (`fixed_variance`) and for the f-GAN form (`game`)."""

    def make_networks(self, make):
        of_d, G = super().make_networks(make)
        self.E = make.encoder(self.config.fixed_variance)
        return of_d, nn.ModuleList([G, self.E])

    @property
    def lam(self):
        """lambda: that of the settings, else 1/d (Sec. 5)."""
        return 1 / self.latent if self.config.lam is None else self.config.lam

    def step(self, x):
        """Algorithm 1 on data x. Returns d: L_d, g: L_g, and e: L_e."""
        loss_of_d, loss_of_g = GAMES[self.config.game]
        self.begin_step()
        z = self.prior(len(x))  # line 1
        with self.machine.autocast():
            x_tilde = self.G(z)  # line 2
            h = self.features(x)  # each batch has BN statistics of its own
            h_tilde = self.features(x_tilde)
            rho_q = self.critic(h).float()  # line 4
            rho_p = self.critic(h_tilde).float()  # line 5
            mu, log_var = self.E(h_tilde)  # line 3; h_tilde is not detached: L_e trains G
            loss_d = loss_of_d(rho_q, rho_p)  # line 6
            loss_g = loss_of_g(rho_p)  # line 7
            loss_e = self.lam * posterior_nll(z, mu, log_var).mean()  # line 8
            loss_rec = loss_g + loss_e  # line 9
        # Lines 10 and 11. No network moves before both gradients are known (D3).
        self.machine.descend_together((self.optimiser_d, loss_d), (self.optimiser_g, loss_rec))
        return {"d": loss_d.detach(), "g": loss_g.detach(), "e": loss_e.detach()}

    def code_distribution(self, x):  # mu, log_var of q(z|x), (n, d) each
        return self.E(self.features(x))

    def posterior(self, x):
        """Mean and standard deviation of q(z|x), (n, d) each (Algorithm 2). Of an implicit E (D14):
        a draw, and 0."""
        with self.machine.inference(self):
            mu, log_var = self.code_distribution(x.to(self.machine.device))
        return mu, torch.exp(log_var / 2)

    def encode(self, x):
        """Data (n, ...) -> codes (n, d), mu(x)."""
        return self.posterior(x)[0]

    def reconstruct(self, x):
        """G(mu(x)), like x (Algorithm 2)."""
        return self.decode(self.encode(x))

    def neighbours(self, x, m):
        """Algorithm 2: for each x, m codes from q(z|x), decoded: (n, ...) -> (n, m, ...)."""
        mu, sigma = self.posterior(x.repeat_interleave(m, 0))
        z = mu + sigma * torch.randn_like(mu)  # (n m, d)
        return self.decode(z).unflatten(0, (len(x), m))


class ALI(AIM):
    """ALI: the game is played on pairs (x, z) (D7). The verbs are AIM's."""

    def make_networks(self, make):
        self.G = make.generator()
        self.E = make.own_encoder(self.config.fixed_variance)
        self.D = make.pair_critic()
        return self.D, nn.ModuleList([self.G, self.E])

    def code_distribution(self, x):
        return self.E(x)

    def pairs(self, x):
        """z ~ p(z), x~ = G(z), z_hat ~ q(z|x), and D's logits of (x, z_hat) and of (x~, z)."""
        z = self.prior(len(x))
        x_tilde = self.G(z)
        z_hat = self.draw(*self.E(x))
        return z, x_tilde, z_hat, self.D(x, z_hat), self.D(x_tilde, z)

    @staticmethod
    def draw(mu, log_var):
        """A code of each q(z|x) (Sec. 4.6)."""
        return mu + torch.exp(log_var / 2) * torch.randn_like(mu)

    def losses(self, x):
        """The loss of D, and the parts {name: part} of that of G and E. g: of the game."""
        *_, real, fake = self.pairs(x)
        return gan_loss_of_d(real, fake), {"g": joint_loss(real, fake)}

    def step(self, x):
        """One iteration. Returns d: the loss of D, and the parts of that of G and E."""
        self.begin_step()
        with self.machine.autocast():
            loss_d, parts = self.losses(x)
            loss_g = sum(parts.values())
        self.machine.descend_together((self.optimiser_d, loss_d), (self.optimiser_g, loss_g))
        for _ in range(self.config.g_steps - 1):  # each with new z
            with self.machine.autocast():
                loss_g = sum(self.losses(x)[1].values())
            self.machine.descend(self.optimiser_g, loss_g)
        return {"d": loss_d.detach()} | {name: part.detach() for name, part in parts.items()}


class VEEGAN(ALI):
    """VEEGAN (Srivastava et al., 2017): E, with sigma = 1, is its F, which reconstructs codes."""

    def losses(self, x):
        """D's label is 1 for (G(z), z). g, D's mean logit of it, moves G alone; e moves G and F."""
        z, x_tilde, _, real, fake = self.pairs(x)
        q = self.machine.without_running_stats(self.E, x_tilde)
        return gan_loss_of_d(fake, real), {"g": fake.mean(), "e": posterior_nll(z, *q).mean()}


class ALICE(ALI):
    """ALICE: G(z_hat) must return x (D8). With `authors`, E(G(z)) must also return z (D14)."""

    def losses(self, x):
        """ALI's, and cycle: what G and E pay for the cycles. Learnt ones add to D's loss, too."""
        z, x_tilde, z_hat, real, fake = self.pairs(x)
        x_hat = self.machine.without_running_stats(self.G, z_hat)  # D9
        cycle_d, cycle_g = self.cycle("D_cycle", x, x_hat)
        if self.config.authors:
            q = self.machine.without_running_stats(self.E, x_tilde)
            code_d, code_g = self.cycle("D_code", z, self.draw(*q))
            cycle_d = cycle_d + code_d
            cycle_g = cycle_g + code_g
        return gan_loss_of_d(real, fake) + cycle_d, {"g": joint_loss(real, fake), "cycle": cycle_g}

    def cycle(self, name, item, item_hat):
        """What a cycle adds to the loss of D, and to that of G and E. name: of its D, if learnt."""
        return 0.0, self.lam * cycle_loss(item, item_hat, self.config.k)


class ALICEAdversarial(ALICE):
    """ALICE whose cycles are learnt: a D of its own tells (x, x) from (x, G(z_hat)) (D8). With
    `authors` another one does so for codes (D14)."""

    def make_networks(self, make):
        D, of_g = super().make_networks(make)
        self.D_cycle = make.whole_critic(2 * make.c)
        of_d = nn.ModuleList([D, self.D_cycle])
        if self.config.authors:
            self.D_code = make.code_critic()
            of_d.append(self.D_code)
        return of_d, of_g

    def cycle(self, name, item, item_hat):
        D = getattr(self, name)
        real = D(torch.cat([item, item], 1)).float()
        fake = D(torch.cat([item, item_hat], 1)).float()
        return self.lam * gan_loss_of_d(real, fake), self.lam * gan_loss_of_g(fake)


CLASSES = {"aim": AIM, "aim-minus": AIM, "aim-fgan": AIM, "gan": GAN, "pacgan": PacGAN,
           "unrolled": UnrolledGAN, "veegan": VEEGAN, "ali": ALI, "alice": ALICE,
           "alice-adv": ALICEAdversarial}


def build(config, machine=None, channels=None, steps=None, steps_per_epoch=None):
    """The system `config.model`, with GAN's arguments.

    To add one: a subclass of GAN, its name in MODELS and CLASSES.
    """
    return CLASSES[config.model](config, machine, channels, steps, steps_per_epoch)


# ---- Figures -------------------------------------------------------------------------------------


def figures_points(model, folder, step, x, y, classes):
    """Fig. 3: (a) data x (n, C) of components y (n,), (b) codes, (c) reconstructed, (d) samples."""
    reach = 1.2 * data.oblique(x).abs().max().item()
    panels = {"data": scatter(x, y, classes, reach)}
    if model.E is not None:
        if model.latent == 2:
            panels["codes, 3 sigma"] = scatter(model.encode(x), y, classes, 3)
        panels["reconstructions"] = scatter(model.reconstruct(x), y, classes, reach)
        save_picture(folder / f"recon/{step:06d}.png", panels["reconstructions"])
    points = model.decode(fixed_noise(len(x), model.latent)).cpu()
    centres = torch.stack([x[y == i].mean(0) for i in range(classes)])
    nearest = torch.cdist(points, centres).argmin(1)
    panels["samples"] = scatter(points, nearest, classes, reach)
    save_picture(folder / f"samples/{step:06d}.png", panels["samples"])
    save_panels(folder / f"figures/panels-{step:06d}.png", panels)


def figures_images(model, folder, step, x, y, classes):
    """The pictures of one evaluation, of test images x (n, C, S, S) on the CPU, with labels y (n,)
    or None. `folder` is a run's."""
    samples = model.decode(fixed_noise(100, model.latent))
    save_grid(folder / f"samples/{step:06d}.png", samples)  # Fig. 10
    if not (folder / "figures/real.png").exists():
        save_grid(folder / "figures/real.png", x[:100])
    if model.E is None:
        return
    mu = model.encode(x[:100])
    pairs = torch.stack([x[:50], model.decode(mu[:50]).cpu()], 1).flatten(0, 1)
    save_grid(folder / f"recon/{step:06d}.png", pairs)  # Figs. 2, 6: image, reconstruction, ...
    ten = x[:10]
    near = torch.cat([ten[:, None], model.neighbours(ten, 9).cpu()], 1).flatten(0, 1)
    save_grid(folder / f"figures/neighbours-{step:06d}.png", near)  # Figs. 5 and 9
    z = mu[:1].cpu().repeat(model.latent, 10, 1)  # (d, 10, d): row i varies number i (Sec. 5.4)
    every = torch.arange(model.latent)
    z[every, :, every] = torch.linspace(-2, 2, 10)
    decoded = torch.cat([model.decode(part) for part in z.flatten(0, 1).split(250)])
    save_grid(folder / f"figures/traversals-{step:06d}.png", decoded)
    if model.latent == 2:  # Fig. 4, which Sec. 5.4 calls Fig. 10
        ramp = torch.linspace(-2, 2, 20)
        lattice = torch.stack(torch.meshgrid(ramp, -ramp, indexing="xy"), -1).flatten(0, 1)
        save_grid(folder / f"figures/manifold-{step:06d}.png", model.decode(lattice), 20)
        if y is not None:
            codes = torch.cat([model.encode(part) for part in x.split(250)])
            panel = {"codes, 3.5 sigma": scatter(codes, y, classes, 3.5)}
            save_panels(folder / f"figures/codes-{step:06d}.png", panel)


# ==================================================================================================
# The paper's tables, and PacGAN's ring. A column: (heading, data set, metric). A row: the flags of
# a system, then the published value of each column (None: not printed, or for other settings).
# ==================================================================================================

TABLES = {
    "1": dict(
        title="AIM, Table 1: reconstruction and generation",
        columns=[("MSE, MNIST", "mnist", "mse"), ("inception score, MNIST", "mnist", "is_li"),
                 ("MSE, CIFAR-10", "cifar10", "mse"),
                 ("inception score, CIFAR-10", "cifar10", "is_inception")],
        rows={"GAN": ("--model gan", None, 9.464, None, 6.287),
              "ALI": ("--model ali", 0.480, 8.749, 0.672, 5.930),
              "ALICE": ("--model alice", 0.080, 9.279, None, None),
              "ALICE (own settings)": ("--model alice --authors", 0.080, 9.279, 0.416, 6.015),
              "AIM-": ("--model aim-minus", 0.028, 9.331, 0.037, 6.324),
              "AIM": ("--model aim", 0.026, 9.483, 0.019, 6.450)}),
    "2": dict(
        title="AIM, Table 2: mode collapse on 25 Gaussians",
        columns=[("modes of 25", "grid25", "modes"), ("high quality, %", "grid25", "high_quality")],
        rows={"GAN": ("--model gan", 3.3, 0.5), "ALI": ("--model ali", 15.84, 1.6),
              "Unrolled GAN": ("--model unrolled", 23.6, 16),
              "Unrolled GAN (own settings)": ("--model unrolled --authors", 23.6, 16),
              "VEEGAN": ("--model veegan", 24.6, 40),
              "VEEGAN (own settings)": ("--model veegan --authors", 24.6, 40),
              "AIM": ("--model aim", 25, 81.1),
              # PacGAN's authors measured GAN and ALI by this protocol, and found far better ones.
              "GAN (published by PacGAN)": ("--model gan", 17.3, 94.8),
              "ALI (published by PacGAN)": ("--model ali", 24.1, 95.7),
              "PacGAN2": ("--model pacgan --pack 2", 23.8, 91.3),
              "PacGAN3": ("--model pacgan --pack 3", 24.6, 94.2),
              "PacGAN4": ("--model pacgan --pack 4", 24.8, 93.6)}),
    "ring": dict(
        title="Mode collapse on a ring of 8 Gaussians, as published by PacGAN and VEEGAN",
        columns=[("modes of 8", "ring8", "modes"), ("high quality, %", "ring8", "high_quality")],
        rows={"GAN": ("--model gan", 6.3, 98.2), "ALI": ("--model ali", 6.6, 97.6),
              "PacGAN2": ("--model pacgan --pack 2", 7.9, 95.6),
              "PacGAN4": ("--model pacgan --pack 4", 7.8, 95.9),
              # VEEGAN's authors have GAN at 1 mode and 99.3 %, ALI at 2.8 and 0.13 %.
              "Unrolled GAN": ("--model unrolled", 7.6, 35.6),
              "VEEGAN": ("--model veegan", 8, 52.9),
              "AIM": ("--model aim", None, None)}),
    "fig8": dict(
        title="AIM, Fig. 8: MSE over the first 50 epochs",
        columns=[("MSE, MNIST", "mnist", "mse"), ("MSE, CIFAR-10", "cifar10", "mse"),
                 ("MSE, CelebA", "celeba", "mse")],
        rows={"AIM": ("--model aim --epochs 50", None, None, None)}),
}


# ==================================================================================================
# Training
# ==================================================================================================


def point_metrics(model, test_set, samples):
    """Metrics of points (Sec. 5.3), as metrics.Evaluator has them of images. -> a dict.

    modes, high_quality   of a mixture: the means hit, and the share of samples within 3 std
    mse                   with an encoder: of the reconstructed test points
    same_mode             with both: the share of those that stay nearest to the same mean

    Their `protocol` counts the samples and the test points.
    """
    result = {}
    protocol = []
    x = test_set.x
    mixture = data.mixture(test_set.name)  # None of the Swiss roll
    if mixture:
        means, std = mixture
        points = model.decode(fixed_noise(samples, model.latent, seed=1)).cpu()
        result["modes"], result["high_quality"] = metrics.grid_modes(points, means, std)
        protocol.append(f"modes, high_quality: {samples} samples, within 3 std ({std}) of "
                        f"{len(means)} means")
    if model.E is not None:
        x_hat = model.reconstruct(x).cpu()
        result["mse"] = metrics.reconstruction_mse(x, x_hat)
        protocol.append(f"mse: {len(x)} {test_set.split} points, mean over coordinates, in the "
                        "data's units")
    if mixture and model.E is not None:
        before, after = (torch.cdist(each, means).argmin(1) for each in (x, x_hat))
        result["same_mode"] = (before == after).double().mean().item()
    return result | {"protocol": "; ".join(protocol)}


def make_evaluator(config, machine, train_set, test_set):
    """A function model -> metrics, as `config` asks for them.

    Raises UserError for too few samples or test images.
    """
    samples = config.samples or 10_000
    if config.size is None:
        return lambda model: point_metrics(model, test_set, samples)
    by_inception = config.dataset == "cifar10"  # Table 1
    weights = metrics.inception_default(config.inception, by_inception, machine.device, samples,
                                        "The inception score")
    measure = metrics.Evaluator(train_set, test_set, config.size, machine.device, config.root,
                                samples, weights, li=config.dataset == "mnist")  # D10
    return lambda model: measure(model.sample, model.reconstruct if model.E is not None else None)


def evaluate(model, evaluator, folder, step, test, classes):
    """Pictures and metrics of one moment, without disturbing the training's random numbers.

    test: (x, y), what the pictures show. Adds to the evaluator's metrics `sigma`, the mean standard
    deviation of q(z|x) over 100 test items, if E learns it; `eval_s`, the seconds all this took.
    """
    began = time.time()
    figures = figures_images if model.config.size else figures_points
    with data.random_state_kept(0):  # all evaluations' pictures have the same noise
        figures(model, folder, step, *test, classes)
        result = evaluator(model)
        no_sigma = model.E is None or isinstance(model.E, ImplicitEncoder)
        if not no_sigma and not model.config.fixed_variance:
            result["sigma"] = model.posterior(test[0][:100])[1].mean().item()
    return result | {"eval_s": round(time.time() - began, 1)}


def score_of(result):
    """What best.pt is chosen by, the less the better: of mixtures -(modes + high_quality), else the
    first measured of fid, fcd, kl, mse."""
    if "high_quality" in result:
        return -result["modes"] - result["high_quality"]
    return metrics.best_first(result, data.SCORES)


def train(config, machine, folder, checkpoint=None):
    """Trains `config` in `folder`, from `checkpoint` if given. Returns the last metrics."""
    # The folder comes first: it is shown to be writable before anything is computed.
    run = data.Run(folder, FILE, config, machine, checkpoint)
    train_set, test_set = data.load_pair(config.dataset, config.root, config.size)
    batches = data.Batches(train_set, config.batch, machine.device, config.size, config.seed,
                           run.rank, run.world)
    run.expect(train_set, test_set)
    steps = config.steps or math.ceil(config.epochs * batches.steps_per_epoch)
    if checkpoint and not run.other_data:
        steps = max(steps, checkpoint["step"])
    # Ours: at least twelve evaluations, and one every 10 epochs.
    eval_every = config.eval_every or max(1, min(10 * batches.steps_per_epoch, steps // 12))
    torch.manual_seed(config.seed)  # every rank builds the same networks
    model = build(config, machine, train_set.channels, steps, batches.steps_per_epoch)
    evaluator = make_evaluator(config, machine, train_set, test_set) if run.main else None
    shown = 2000 if model.latent == 2 else 100  # Fig. 4
    if config.size is None:
        shown = 10_000  # Fig. 3
    test = next(data.ordered(test_set, shown, shown, "cpu", config.size))
    start = run.begin(model, batches, steps)
    if config.compile:
        data.compile_networks(model)
    run.save("last.pt", start)  # resumable from any kill
    result = {}

    # Train: a batch, a step; now and then a line of the log, an evaluation, a checkpoint.
    with run:
        for step in range(start + 1, steps + 1):
            x, _ = next(batches)
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
                    metrics.draw_log_curves(run.folder, ("mse", "high_quality", "fid", "fcd"),
                                            f"{config.model}, {config.dataset}")  # Fig. 8: mse
                if run.is_best(score_of(result)):
                    run.save("best.pt", step)
            if saves:
                run.save("last.pt", step)
            if leaves:
                run.leave(step)
    return result


@data.random_state_kept()
def main(argv=None):
    """The command line; returns the exit code. Raises what data.run_command makes a sentence."""
    if data.asks_for_table(argv):
        return data.run_table(argv, FILE, TABLES, main)
    args, config, checkpoint = data.parse(argv, FILE, __doc__, preset, tables=TABLES)
    machine = Machine(*data.hardware(args.device, config.amp))
    if args.bench:
        model = build(config, machine, data.channels_of(config.dataset))
        x = model.sample(config.batch)
        print(json.dumps(metrics.benchmark(model, x, args.bench, config.compile)))
        return 0
    name = os.path.basename(config.dataset)
    folder = data.run_folder(args, f"runs/{FILE}-{config.model}-{name}-s{config.seed}")
    if args.sample:
        model = build(config, machine, checkpoint["channels"])
        data.restore(checkpoint, model)
        metrics.draw_samples(model, folder, args.sample, config.seed)
        return 0
    train(config, machine, folder, checkpoint)
    print(f"run: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(data.run_command(main))
