"""Intervention GAN (IVGAN), the Intervention Adversarial Auto-Encoder (IVAAE), and their baselines.

    Part I    Jiadong Liang, Liangyu Zhang, Cheng Zhang, Zhihua Zhang.
              "Intervention Generative Adversarial Networks." arXiv:2008.03712, 2020.
    Part II   "Intervention Adversarial Auto-Encoder." Anonymous authors, under double-blind review.
              Sections, equations, tables and figures are those of these versions.

A Part is one paper: notation, algorithm, deviations, settings, networks, losses, models, figures.
A Part, the imports and the class Machine are all that training takes beside data.py, metrics.py.

IVGAN. A GAN's Jensen-Shannon divergence is flat while real and generated images do not overlap.
IVGAN encodes a real image, w = E(x), replaces one of k blocks of w by Gaussian noise (an
intervention O_i, which leaves N(0, I) as it is), and decodes G(O_i(w)). A classifier f must name
the replaced block. If E(x) were N(0, I) no classifier could: so E and G are trained to fool f. At
the best f the L_IV they descend is a k-way JS divergence less log k (Theorem 3), of distributions
that do overlap. (Example 1, Fig. 2: squares moved by a have the JS (1 + a) log 2, not as printed.)

IVAAE. An adversarial auto-encoder matches its codes E(x) to N(0, I) by a GAN on codes, whose two
distributions may overlap little. IVAAE puts bridges between them: T_k replaces ever more of the
code by noise, from T_0, the code itself, to T_t, the prior. D must name k; E must prevent it.

Run it.  python ivgen.py                                    IVLSGAN on drawn digits, offline
         python ivgen.py --dataset cifar10                  the full recipe: 64 x 64, 400 epochs
         python ivgen.py --dataset cifar10 --model wgan-gp  ... or another system of Table 2
         python ivgen.py --dataset cifar10 --k 10           ... or of Table 4
         python ivgen.py --dataset stacked-mnist            modes and KL of Table 3; with
                         --network pacgan --triples 128000  ... the networks and data of its source
         python ivgen.py --dataset mnist --model ivaae-rad  Part II; or ivaae-bw, aae, wae-mmd, ...
         python ivgen.py --resume RUN --probe discriminator IVAAE's Figs. 2, 3; `classifier`: Fig. 5
         python ivgen.py --model aae --help                 the flags of one system
What to expect: of `python ivgen.py`, on two CPU cores, digits a person reads after some minutes,
fcd about .7, reconstructions at an MSE of .015 to .02 (pixels in [0, 1]); see assets/RESULTS.md.
"""

import contextlib
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

try:
    import data
    import metrics
    from data import Settings, UserError, setting
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"ivgen.py: put data.py and metrics.py beside it ({error})", file=sys.stderr)
    sys.exit(2)

FILE = "ivgen"


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
# PART I. Intervention GAN
# ==================================================================================================
#
# Notation.   paper           here          shape
#             x ~ p_real      x             (B, C, S, S) in [-1, 1]
#             z ~ p_z         z             (B, d), N(0, I), d = 100
#             w = E(x)        w             (B, d)
#             i_j in [k]      index         (B,), one block per sample
#             O_i(w)          w_i           (B, d)
#             x' = G(O_i(w))  x_i           (B, C, S, S)
#             G(E(x))         x_hat         (B, C, S, S)
#             D, f            D(x)          logits (B,) and (B, k): one trunk, two heads
#             lambda, mu      lam, mu       .25, .5 for G and D; lam_e, mu_e = 1, 1 for E (Sec. 5)
#
# Algorithm 1 (Fig. 3) is `IVGAN.step`; its comments give the algorithm's line numbers.
#     lines 2-8      w = E(x);  x_i = G(O_i(w));  x_z = G(z)
#     lines 9-12     D and f:  down  L_adv(D) + mu V_class          f learns to name the block
#     lines 13-15    G:        down  L_adv(G) + lam L_recon + mu L_IV      Eq. (11); L_IV = -V_class
#     lines 16-17    E:        down  lam_e L_recon + mu_e L_IV           E fools f, as G does
#
# Deviations and choices ("code" is that of IVGAN's authors, zhangliangyu32/IVGAN; there is no D13).
# |     | paper                        | code                  | here                   | switch   |
# |-----|------------------------------|-----------------------|------------------------|----------|
# | D1  | "i = 1..d/k"; i_j per sample | one i for the batch   | i in 1..k, per sample  |          |
#         With k blocks there are k interventions, and f has k classes.
# | D2  | BN after D's first layer     | none there            | as the paper           | --d-norm |
#         WGAN-GP's own paper has no BN in D ("none"), nor has the code's script for STL-10; but
#         Sec. 5 wants one D for all. With the first BN LSGAN and PacDCGAN (width 8) make grey
#         pictures of stacked MNIST, which count as 1 and 2 modes of 1,000; without it LSGAN has 940
#         (assets/RESULTS.md).
# | D3  | E fools f, by the text       | E helps f, no L_recon | as the text            | --e-sign |
#         But lines 15, 17 print "+ alpha": read literally, G and E ascend and help f, as E does in
#         the code.
# | D4  | "number of inner iteration"  | ten steps of E        | one step of each       | --e-steps|
#         The code's ten steps share one i and one noise; here each further step draws its own.
# | D5  | l1 norm in Eq. (6)           | mean (L1Loss)         | mean absolute error    |          |
#         A sum over 12,288 pixels would drown the other terms.
# | D6  | Eq. (6): O_i(z), z ~ p_z     | z = E(x)              | z = E(x)               |          |
#         For z ~ p_z Theorem 4 says nothing: all O_i(z) are N(0, I). x_i serves Eqs. (3) and (6).
# | D7  | noise, decayed, very early   | deviation by epoch    | by share of the run    |          |
#         On what D judges, not on f's images; in the IV models only; by the code's schedules for
#         CIFAR-10, whatever the data. On `digits` (ours) all systems have .2, to the end.
# | D8  | Adam 1e-4, for E 5e-3        | CIFAR-10: 2e-4, 1e-2  | as the paper           | --lr ... |
#         There the code's E has width 16 and a weight decay of 5e-4. On `digits` (ours) the rate is
#         1.5e-3 where a system has none of its own, and beta2 .99 (WGAN-GP: .9). All rates fall
#         to 0 there in the second half of the run (--decay).
# | D9  | MRGAN: only named            | last sign reversed    | - mu log D(G(E(x)))    |          |
#         All four weights are .25, as in the code. For the baselines the paper takes the best of
#         several settings, not printed: DCGAN, LSGAN and MRGAN have IVGAN's here.
# | D10 | WGAN, WGAN-GP: only named    | WGAN-GP: beta1 .5     | their papers' settings |          |
#         G moves every fifth step, so that each step of D sees a fresh batch.
# | D11 | alpha / 2n in line 10        | sum of two means      | mean over 2n images    |          |
#         WGAN and WGAN-GP keep the sum, to which the penalty's weight 10 belongs. LSGAN's G has its
#         paper's 1/2, the code none. So beside L_adv the other terms weigh twice as much as there,
#         but for IVDCGAN's G.
# | D12 | BN's running statistics: silent | follow all batches | G's follow z, E's x    |          |
#         E's rate is 50 times G's: each evaluation takes E's statistics anew from training images.
#
# Table 3's first four rows are copied from other papers. "Source" is PacGAN's code, except in D23
# (Unrolled GAN, by an author of VEEGAN) and in D24 (VEEGAN's paper, and that author's ALI).
# |     | source                       | here                                           | switch   |
# |-----|------------------------------|------------------------------------------------|----------|
# | D20 | its own networks, 28 pixels  | Table 1's, or the source's                     |--network |
#         The source has no f, no E: f is D's second head, E has D's convolutions, as in Table 1.
# | D21 | DCGAN: pixels in [0, 1]      | [-1, 1], as G ends in tanh; else as the source |--network |
#         DCGAN on these networks, PacDCGAN on any: z ~ U[-1, 1]^d, Adam 2e-4, two steps of G on one
#         z. The IV systems need z ~ N(0, I). BN's scales start at N(1, .02); in the source, at 1.
# | D22 | 128,000 fixed triples        | new ones every epoch                           |--triples |
#         Packs are fixed there, too; here each image is packed with draws of its batch. IVGAN's
#         authors have 60,000 triples at 64 pixels, 20,000 samples and an MLP that counts modes;
#         here all rows have PacGAN's 26,000 samples, and the classifier of metrics.py.
# | D23 | batch 10, z ~ N(0, I)^256    | 64 and N(0, I)^100, as the IV systems          |--batch ..|
#         There D moves first, then G unrolls it; here, as in Unrolled GAN's paper, G comes first.
# | D24 | stacked-MNIST code not found | D and F of the same author's ALI               |          |
#         D's convolutions are those of --network. F has no last tanh, as codes are not bounded, and
#         torch's initial weights (there Xavier's). Adam 2e-4, the ALI's.

IV = ("ivdcgan", "ivlsgan")
WITH_E = ("mrgan", *IV)
PACGAN = dict(lr=2e-4, steps_of_g=2, prior="uniform")           # D21


@dataclasses.dataclass
class IVGANConfig(Settings):
    """IVGAN's settings, by Sec. 5; `preset_ivgan` adds what a system and a data set change."""

    model: str = setting("ivlsgan", "dcgan, lsgan, wgan, wgan-gp, mrgan, ivdcgan, ivlsgan, veegan, "
                         "unrolled, pacdcgan; Part II: wae-mmd, aae, ivaae-bw, -rad, -svgd")
    dataset: str = setting("digits", "a name (see data.py) or a folder of pictures")
    network: str = setting("table1", "table1, or pacgan: of Table 3's copied rows (D20)",
                           choices=("table1", "pacgan"))
    size: int = setting(64, "pixels: a power of two; 28 for PacGAN's networks (Sec. 5; D20)",
                        least=28, most=1024)
    width: int = setting(64, "channels after the first convolution (Table 1)", least=1)
    latent: int = setting(100, "d, the code's dimensions (Sec. 5)", least=2)
    batch: int = setting(64, "n, images per step and rank (author code)", least=2)
    epochs: float = setting(400.0, "training length (author code)", least=1e-9)
    k: int = setting(4, "blocks, so interventions (Sec. 5; Table 4)", least=2, models=IV)
    mu: float = setting(0.5, "weight of L_IV for G, of V_class for f (Sec. 5); MRGAN: of its mode "
                        "term for G (D9)", least=0, models=WITH_E)
    lam: float = setting(0.25, "weight of L_recon for G (Sec. 5)", least=0, models=WITH_E)
    mu_e: float = setting(1.0, "weight of L_IV for E (Sec. 5); MRGAN: of its mode term (D9)",
                          least=0, models=WITH_E)
    lam_e: float = setting(1.0, "weight of L_recon for E (Sec. 5); --e-sign code ignores it",
                           least=0, models=WITH_E)
    pack: int = setting(1, "m, images that D sees at once (D22)", least=1, models=("pacdcgan",))
    unroll: int = setting(5, "K, steps of D that G foresees (D23)", least=0, models=("unrolled",))
    triples: int | None = setting(None, "fixed triples of all 70,000 digits (D22)", int, 1)
    e_steps: int = setting(1, "steps of E per iteration (D4)", least=1, models=IV)
    e_sign: str = setting("paper", "E's objective: paper, code (D3)", choices=("paper", "code"),
                          models=IV)
    d_norm: str = setting("table1", "batch norm in D: table1, after all convolutions; dcgan, not "
                          "after the first; none (D2)",
                          choices=("table1", "dcgan", "none"))
    lr: float = setting(1e-4, "rate for D, f and G (Sec. 5: Adam; WGAN: RMSProp)", least=0)
    lr_d: float | None = setting(None, "Adam's rate for D instead (D23)", float, 0,
                                models=("unrolled",))
    lr_e: float = setting(5e-3, "E's rate (Sec. 5; VEEGAN: D24)", least=0,
                          models=("veegan", *WITH_E))
    decay: str = setting("none", "of the rates: none, or linear, to 0 in the second half (D8)",
                         choices=("none", "linear"))
    beta1: float = setting(0.5)                             # Sec. 5
    beta2: float = setting(0.999)                           # Sec. 5
    loss: str = setting("lsgan")                            # dcgan, lsgan, wgan, wgan-gp
    steps_of_d: int = setting(1)                            # D10: steps of D for one of G
    steps_of_g: int = setting(1)                            # D21: steps of G on the same z
    prior: str = setting("normal")                          # D21: or uniform
    noise_schedule: tuple = setting(())                     # D7: (share of the run, deviation), ...

    def check(self):
        """Raises UserError, in one sentence, for settings that cannot work."""
        super().check()
        if self.network == "pacgan" and self.size != 28:
            raise UserError(f"--size {self.size}: PacGAN's networks are for 28 pixels")
        if self.network == "table1" and self.size & (self.size - 1):
            raise UserError(f"--size {self.size} is no power of two (the networks halve it to 4)")
        if self.model in IV and self.mu_e and not self.mu:
            raise UserError("--mu 0 leaves f untrained, so E has nothing to deceive: --mu-e 0 too")
        untrained = not self.mu_e and (not self.lam_e or self.e_sign == "code")
        if self.model in WITH_E and untrained and (self.mu or self.lam or self.lam_e):
            raise UserError("no term of E has a weight, so E would keep its initial weights: raise "
                            "--mu-e or --lam-e (--e-sign code has --mu-e alone)")
        if self.model in IV and self.latent % self.k:
            raise UserError(f"--k {self.k} does not divide the latent dimension {self.latent}")
        if self.model in ("unrolled", "wgan-gp") and self.compile:
            raise UserError(f"--compile does not go with {self.model}: it differentiates twice")
        if self.model == "unrolled" and self.amp == "fp16":
            raise UserError("--amp fp16: fp16 loses the gradients of unrolling; use bf16 or off")


LSGAN_NOISE = ((0, 0.05), (0.125, 0.01), (0.25, 0.001), (0.5, 0.0))  # D7: epochs 0, 50, 100, 200
DCGAN_NOISE = ((0, 0.05), (0.25, 0.01), (0.5, 0.003), (0.75, 0.001))  # D7: epochs 0, 100, 200, 300
IVGAN_MODELS = {                                                # what each system changes
    "dcgan": dict(loss="dcgan"),
    "lsgan": dict(loss="lsgan"),
    "wgan": dict(loss="wgan", steps_of_d=5, lr=5e-5),
    "wgan-gp": dict(loss="wgan-gp", steps_of_d=5, beta1=0.0, beta2=0.9),
    "mrgan": dict(loss="dcgan", mu=0.25, lam=0.25, mu_e=0.25, lam_e=0.25),
    "ivdcgan": dict(loss="dcgan", noise_schedule=DCGAN_NOISE),
    "ivlsgan": dict(loss="lsgan", noise_schedule=LSGAN_NOISE),
    "veegan": dict(loss="dcgan", lr=2e-4, lr_e=2e-4),           # D24
    "unrolled": dict(loss="dcgan", lr=1e-4, lr_d=2e-4),         # its source's (D23)
    "pacdcgan": dict(loss="dcgan", pack=2) | PACGAN,
}
IVGAN_DATASETS = {                                              # what a data set changes
    "digits": dict(size=32, width=32, latent=16, batch=32, steps=3200, eval_every=1600, lr=1.5e-3,
                   decay="linear", beta2=0.99),                 # ours: quick on two cores
    "stacked-digits": dict(size=32, width=32, steps=20_000, samples=26_000),    # ours
    "stacked-mnist": dict(steps=100_000, samples=26_000),       # Table 3; PacGAN's count of samples
    "lsun-church": dict(epochs=100.0),                          # ours: 126,227 images
    "celeba": dict(epochs=100.0),                               # ours: 162,770 training images
}


def preset_ivgan(model, dataset, network=None):
    """The paper's values, then what the data set, the networks and the system change."""
    changes = IVGAN_DATASETS.get(dataset, {}) | IVGAN_MODELS[model]
    if network == "pacgan":
        changes |= dict(network=network, size=28, d_norm="dcgan")           # D20
        if model == "dcgan":
            changes |= PACGAN                                               # D21
    if dataset == "digits":
        changes["noise_schedule"] = ((0, 0.2),)                 # ours, for all systems (D7)
    return IVGANConfig(model=model, dataset=dataset, **changes)


# ---- Interventions (Sec. 3) ----------------------------------------------------------------------

def block_substitute(z, index, k, noise):
    """O_i, "block substitution" (Sec. 3; Definitions 1, 2): block `index` of k becomes noise's.

    z, noise: (B, d); index: (B,) integers in 0..k-1, one block per sample. Returns (B, d),
    differentiable in z; N(0, I) in gives N(0, I) out. Raises ValueError if k does not divide d.
    """
    d = z.shape[1]
    if k < 1 or d % k:
        raise ValueError(f"{k} blocks do not divide a code of {d} dimensions evenly")
    block = torch.arange(d, device=z.device) // (d // k)        # (d,): the block of each coordinate
    return torch.where(block == index[:, None], noise, z)


def multi_js(densities, weights=None):
    """Eq. (2): JS_pi(p_1..p_n) = H(sum pi_i p_i) - sum pi_i H(p_i), in nats, of p (n, m) discrete.

    weights: pi (n,), else 1/n each. A scalar. In training f estimates it (Theorem 3, Eq. (5)).
    """
    if weights is None:
        weights = densities.new_full((len(densities),), 1 / len(densities))
    entropies = torch.special.entr(densities).sum(1)            # H(p_i): entr(p) is -p log p
    return torch.special.entr(weights @ densities).sum() - weights @ entropies


# ---- Networks: Table 1's and PacGAN's ------------------------------------------------------------

# Table 1 is for 64 x 64 pixels. 32 have one stage fewer, 128 one more.

def stages(size):
    """How many stride-2 convolutions lead from `size`, a power of two, to 4: from 64, four."""
    return size.bit_length() - 3


def init_weights(module):
    """DCGAN's: weights N(0, .02), BN weights N(1, .02), biases 0. FC layers as convolutions."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.affine:
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class Convolutions(nn.Sequential):
    """Stride-2 convolutions of D or E: (B, C, S, S) -> (B, c, side, side), c = 2^(depth-1) width.

    norm: where there is BN: "table1" (everywhere), "dcgan" (not after the first), "none" (D2).
    """

    def __init__(self, channels, width, depth, kernel, side, norm):
        layers = []
        for n in range(depth):
            c = width << n
            has_norm = norm == "table1" or (norm == "dcgan" and n > 0)
            layers.append(nn.Conv2d(channels, c, kernel, 2, (kernel - 1) // 2, bias=not has_norm))
            if has_norm:
                layers.append(nn.BatchNorm2d(c))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
            channels = c
        super().__init__(*layers)
        self.c = c
        self.side = side
        self.features = c * side * side


def convolutions(config, channels, norm):
    """Table 1's, "CONV(K4, S2)" down to 4 x 4, or PacGAN's: 28, 14, 7, 4, 2 by 5 x 5 kernels."""
    if config.network == "pacgan":
        return Convolutions(channels, config.width, 4, kernel=5, side=2, norm=norm)
    return Convolutions(channels, config.width, stages(config.size), kernel=4, side=4, norm=norm)


class AsImage(nn.Module):
    """(B, d) -> (B, d, 1, 1), marked channels_last: 1 x 1 strides do not show the format."""

    def forward(self, z):
        return z[:, :, None, None].to(memory_format=torch.channels_last)


class Generator(nn.Sequential):
    """G of Table 1: z (B, d) -> images (B, C, S, S) in [-1, 1]."""

    def __init__(self, latent=100, channels=3, size=64, width=64):
        c = width << (stages(size) - 1)                         # 512 at the paper's width and size
        layers = [AsImage(), nn.ConvTranspose2d(latent, c, 4, 1, 0, bias=False)]            # 1 -> 4
        for n in reversed(range(stages(size))):                 # S -> 2 S
            c_out = c // 2 if n else channels
            layers += [nn.BatchNorm2d(c), nn.ReLU(inplace=True)]
            layers.append(nn.ConvTranspose2d(c, c_out, 4, 2, 1, bias=n == 0))
            c = c_out
        super().__init__(*layers, nn.Tanh())
        self.apply(init_weights)


class PacGenerator(nn.Sequential):
    """G of PacGAN's stacked MNIST (D20): z (B, d) -> images (B, C, 28, 28) in [-1, 1]."""

    def __init__(self, latent=100, channels=3, width=64):
        c = 8 * width
        layers = [nn.Linear(latent, 4 * c), nn.Unflatten(1, (c, 2, 2))]
        rows = ((4 * width, 1), (2 * width, 0), (width, 1), (channels, 1))
        for c_out, more in rows:                                # 2 -> 4 -> 7 -> 14 -> 28
            layers += [nn.BatchNorm2d(c), nn.ReLU(inplace=True)]
            layers.append(nn.ConvTranspose2d(c, c_out, 5, 2, 2, output_padding=more))
            c = c_out
        super().__init__(*layers, nn.Tanh())
        self.apply(init_weights)


class Discriminator(nn.Module):
    """D of Table 1, f a second head: images (B, C, S, S) -> logits (B,) and (B, k), float32."""

    def __init__(self, trunk, k):
        super().__init__()
        self.trunk = trunk
        self.real = nn.Linear(trunk.features, 1)
        self.block = nn.Linear(trunk.features, k)
        self.apply(init_weights)

    def forward(self, x):
        h = self.trunk(x).flatten(1)
        return self.real(h).squeeze(1).float(), self.block(h).float()


class PairDiscriminator(nn.Module):
    """D of VEEGAN (D24): codes z (B, d) and images x (B, C, S, S) -> logits (B,), float32."""

    def __init__(self, trunk, latent):
        super().__init__()
        self.trunk = trunk
        self.pair = nn.Sequential(nn.Linear(trunk.features + latent, 200), nn.LeakyReLU(0.2),
                                  nn.Linear(200, 1))
        self.apply(init_weights)

    def forward(self, z, x):
        h = torch.cat([self.trunk(x).flatten(1), z], 1)
        return self.pair(h).squeeze(1).float()


class Encoder(nn.Sequential):
    """E of Table 1: images -> codes (B, d); its last BN has no scale and shift (author code)."""

    def __init__(self, trunk, latent):
        last = nn.Conv2d(trunk.c, latent, trunk.side, 2, 0, bias=False)     # CONV(K4, S2, O100)
        super().__init__(*trunk, last, nn.Flatten(), nn.BatchNorm1d(latent, affine=False))
        self.apply(init_weights)


# ---- Losses: one function per equation; each returns a scalar to be minimised --------------------

def adversarial_loss_d(name, real, fake):
    """L_adv(D), a mean over the 2n images (D11). real, fake: D's logits (B,). A scalar.

    dcgan: Eq. (1), negated. lsgan: targets a = 1 for real, b = -1 for fake (author code).
    wgan, wgan-gp: the negated Wasserstein estimate, whole. ValueError for another name.
    """
    if name == "dcgan":
        return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2   # -log sigmoid(v)
    if name == "lsgan":
        return ((real - 1).square().mean() + (fake + 1).square().mean()) / 2
    if name in ("wgan", "wgan-gp"):
        return fake.mean() - real.mean()
    raise ValueError(f"unknown loss {name!r}: dcgan, lsgan, wgan or wgan-gp")


def adversarial_loss_g(name, fake):
    """L_adv(G) of D's logits (B,) on G's images. A scalar.

    dcgan: non-saturating, -log D. lsgan: (D - c)^2 / 2 (D11), c = 0 (author code). wgan, wgan-gp:
    -D. ValueError for another name.
    """
    if name == "dcgan":
        return F.softplus(-fake).mean()
    if name == "lsgan":
        return fake.square().mean() / 2
    if name in ("wgan", "wgan-gp"):
        return -fake.mean()
    raise ValueError(f"unknown loss {name!r}: dcgan, lsgan, wgan or wgan-gp")


def classification_loss(logits, index):
    """V_class of Eq. (3), the mean over the batch of -log f_i(x'). logits (B, k), index (B,).

    f descends it; E and G descend L_IV = -V_class, so that they fool f.
    """
    return F.cross_entropy(logits, index)


def reconstruction_loss(x, x_hat, w_i, w_hat):
    """L_recon of Eq. (6): |G(E(x)) - x| + |E(G(O_i(w))) - O_i(w)|, each a mean per element (D5).

    x, x_hat: (B, C, S, S); w_i, w_hat: (B, d). A scalar. Eqs. (7) to (10) only prove Theorem 4.
    E has a gradient through w_i, too.
    """
    pixels = (x_hat.float() - x.float()).abs().mean()
    codes = (w_hat.float() - w_i.float()).abs().mean()
    return pixels + codes


def model_loss(adversarial, reconstruction, intervention, lam, mu):
    """L_model of Eq. (11), which G descends; intervention: L_IV = -V_class."""
    return adversarial + lam * reconstruction + mu * intervention


def code_loss(z, mean):
    """VEEGAN (D24): -log N(z; mean, I) of z, mean (B, d): a sum over d, a mean over the batch."""
    return ((z - mean).square().sum(1) / 2).mean() + z.shape[1] / 2 * math.log(2 * math.pi)


def gradient_penalty(critic, real, fake):
    """WGAN-GP's: E[(||grad critic(x)|| - 1)^2] between real and fake (B, ...); critic(x): (B,)."""
    u = torch.rand(len(real), *[1] * (real.dim() - 1), device=real.device)
    x = torch.lerp(fake.float(), real.float(), u).requires_grad_()
    gradient, = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


# ---- Models --------------------------------------------------------------------------------------

class GAN(nn.Module):
    """DCGAN, LSGAN, WGAN and WGAN-GP, by `config.loss`: the baselines, and IVGAN without E.

    channels: of the images. steps: the run's length, for the schedules of noise and rates (None:
    both stay as they start). It logs d_adv, g_adv, and d_gp, WGAN-GP's penalty.
    """

    def __init__(self, config, machine=None, channels=3, steps=None):
        super().__init__()
        c = config
        self.config = config
        self.machine = machine or Machine()
        self.steps = steps
        self.iteration = 0
        if c.network == "pacgan":
            self.G = PacGenerator(c.latent, channels, c.width)
        else:
            self.G = Generator(c.latent, channels, c.size, c.width)
        self.make_judges(channels)
        self.to(self.machine.device, memory_format=torch.channels_last)
        betas = (c.beta1, c.beta2)
        if c.loss == "wgan":
            self.optimiser_d = torch.optim.RMSprop(self.D.parameters(), c.lr)
            self.optimiser_g = torch.optim.RMSprop(self.G.parameters(), c.lr)
        else:
            lr_d = c.lr if c.lr_d is None else c.lr_d
            self.optimiser_d = self.machine.adam(self.D.parameters(), lr_d, betas)
            self.optimiser_g = self.machine.adam(self.G.parameters(), c.lr, betas)
        if self.E is not None:
            self.optimiser_e = self.machine.adam(self.E.parameters(), c.lr_e, betas)

    def make_judges(self, channels):
        c = self.config
        self.D = Discriminator(convolutions(c, c.pack * channels, c.d_norm), c.k)   # f: for IV only
        self.E = None
        if c.model in WITH_E:
            trunk = convolutions(c, channels, "dcgan")                      # Table 1 has no BN in
            self.E = Encoder(trunk, c.latent)                               # E's first layer

    def prior(self, n):
        return self.from_normal(torch.randn(n, self.config.latent, device=self.machine.device))

    def from_normal(self, noise):
        """N(0, I) -> a draw of the prior: unchanged, or mapped to U[-1, 1]^d (D21)."""
        return noise if self.config.prior == "normal" else 2 * torch.special.ndtr(noise) - 1

    def generate(self, z):
        """The images (B, C, S, S) of codes z (B, d), as D judges them."""
        return self.G(z)

    def begin(self, x):
        """Sets the learning rates of this iteration (D8). Returns x in the networks' format."""
        if self.config.decay == "linear" and self.steps:
            factor = min(1.0, max(0.0, 2 - 2 * self.iteration / self.steps))
            for optimiser in data.optimisers_of(self).values():
                optimiser.param_groups[0]["lr"] = factor * optimiser.defaults["lr"]
        return x.to(memory_format=torch.channels_last)

    def noisy(self, x):
        """Instance noise on what D judges (Sec. 5; D7)."""
        done = self.iteration / self.steps if self.steps else 0.0
        reached = [deviation for start, deviation in self.config.noise_schedule if done >= start]
        std = reached[-1] if reached else 0.0
        return x + std * torch.randn_like(x) if std else x

    def step(self, x):
        """One iteration on images x (B, C, S, S) in [-1, 1]. Returns its losses as scalars."""
        c = self.config
        x = self.begin(x)
        moves_g = (self.iteration + 1) % c.steps_of_d == 0      # D10
        z = self.prior(c.pack * len(x))
        with self.machine.autocast(), torch.set_grad_enabled(moves_g):
            x_z = self.generate(z)
        losses = self.step_d(x, x_z)
        for n in range(c.steps_of_g if moves_g else 0):
            with self.machine.autocast():
                if n:
                    x_z = self.generate(z)                      # D21: the same z again
                losses["g_adv"] = adversarial_loss_g(c.loss, self.D(self.noisy(x_z))[0])
            self.machine.descend(self.optimiser_g, losses["g_adv"])
        self.iteration += 1
        return {name: loss.detach() for name, loss in losses.items()}

    def step_d(self, x, x_z, x_i=None, index=None):
        """Alg. 1, lines 9-12: D down L_adv; f, its second head, down mu V_class where x_i is given.

        x, x_z, x_i: (B, C, S, S); index: (B,). Returns d_adv, f_ce, d_gp, as far as there are any.
        D judges for G's loss only after this: autograd refuses to go back through moved weights.
        """
        c = self.config
        real = self.noisy(x)
        fake = self.noisy(x_z.detach())
        with self.machine.autocast():
            losses = {"d_adv": adversarial_loss_d(c.loss, self.D(real)[0], self.D(fake)[0])}
            total = losses["d_adv"]
            if x_i is not None:
                losses["f_ce"] = classification_loss(self.D(x_i.detach())[1], index)
                total = total + c.mu * losses["f_ce"]           # line 12, with Sec. 5's mu for D
        if c.loss == "wgan-gp":                                 # in float32: fp16 overflows here
            losses["d_gp"] = gradient_penalty(lambda x: self.D(x)[0], real, fake)
            total = total + 10 * losses["d_gp"]                 # D10
        self.machine.descend(self.optimiser_d, total)
        if c.loss == "wgan":
            with torch.no_grad():
                for parameter in self.D.parameters():
                    parameter.clamp_(-0.01, 0.01)               # D10: keeps the critic Lipschitz
        return losses

    def decode(self, z):
        """Codes (n, d) -> images (n, C, S, S) in [-1, 1]."""
        with self.machine.inference(self):
            return self.G(z.to(self.machine.device)).float()

    def sample(self, n):
        """n images (n, C, S, S) in [-1, 1] from the prior."""
        return self.decode(self.prior(n))

    def encode(self, x):
        """Images (n, C, S, S) in [-1, 1] -> codes (n, d). ValueError where there is no encoder.

        E's running statistics lag behind its weights; `evaluate` takes them anew (D12). After steps
        of your own: torch.optim.swa_utils.update_bn(a list of batches of images, model.E).
        """
        if self.E is None:
            raise ValueError(f"{self.config.model} has no encoder")
        with self.machine.inference(self):
            return self.E(x.to(self.machine.device, memory_format=torch.channels_last)).float()


class IVGAN(GAN):
    """IVDCGAN and IVLSGAN. Beside GAN's it logs f_ce, V_class before f's step (at log k f only
    guesses); rec, L_recon of Eq. (6); iv, L_IV after f's step."""

    def step(self, x):
        """One iteration of Algorithm 1 on images x (B, C, S, S) in [-1, 1]. Returns its losses."""
        c = self.config
        m = self.machine
        if not (c.mu or c.lam or c.mu_e or c.lam_e):
            return super().step(x)                              # without its terms it is the GAN
        x = self.begin(x)
        with m.autocast():                                      # lines 2-8, once for all losses
            x_z = self.G(self.prior(len(x)))
            x_hat, w_i, index, x_i = self.intervene(x)
        losses = self.step_d(x, x_z, x_i if c.mu else None, index)          # lines 9-12

        with m.autocast():                                      # line 13, by the D and f just moved
            losses["g_adv"] = adversarial_loss_g(c.loss, self.D(self.noisy(x_z))[0])
            rec, iv = self.regularisers(x, x_hat, w_i, index, x_i)
        loss_g = model_loss(losses["g_adv"], rec, iv, c.lam, c.mu)          # lines 14-15, Eq. (11)
        loss_e = self.encoder_loss(rec, iv)                                 # lines 16-17
        m.descend_together((self.optimiser_g, loss_g), (self.optimiser_e, loss_e))
        for _ in range(c.e_steps - 1):                          # D4: E has moved, its codes are new
            with m.autocast():
                x_hat, w_i, index, x_i = self.intervene(x)
                rec, iv = self.regularisers(x, x_hat, w_i, index, x_i)
            m.descend(self.optimiser_e, self.encoder_loss(rec, iv))
        self.iteration += 1
        losses |= {"rec": rec, "iv": iv}
        return {name: loss.detach() for name, loss in losses.items() if not loss.is_leaf}

    def intervene(self, x):
        """Alg. 1, lines 5-8: x_hat = G(E(x)), None if L_recon is off; w_i; index; x_i = G(w_i)."""
        c = self.config
        x_hat = None
        w = self.E(x).float()                                               # line 5
        if c.lam or c.lam_e:
            x_hat = self.machine.without_running_stats(self.G, w)           # D12
        index = torch.randint(c.k, (len(w),), device=w.device)              # line 7
        w_i = block_substitute(w, index, c.k, torch.randn_like(w))          # line 6
        x_i = self.machine.without_running_stats(self.G, w_i)               # line 8
        return x_hat, w_i, index, x_i

    def regularisers(self, x, x_hat, w_i, index, x_i):
        """L_recon and L_IV. A term whose weights are all 0 is not computed: it is 0."""
        c = self.config
        rec = torch.zeros((), requires_grad=True, device=x.device)  # a leaf: `step` does not log it
        iv = rec
        if c.lam or c.lam_e:
            w_hat = self.machine.without_running_stats(self.E, x_i)
            rec = reconstruction_loss(x, x_hat, w_i, w_hat)                 # Eq. (6)
        if c.mu or c.mu_e:
            iv = -classification_loss(self.D(x_i)[1], index)                # Eq. (3)
        return rec, iv

    def encoder_loss(self, rec, iv):
        """What E descends: Alg. 1, line 17, or, in the authors' code, +V_class alone (D3)."""
        c = self.config
        if c.e_sign == "code":
            return -c.mu_e * iv
        return c.lam_e * rec + c.mu_e * iv


class MRGAN(GAN):
    """MRGAN (Che et al., 2016; D9): G and E also down lam |x - G(E(x))| - mu log D(G(E(x))).

    Beside GAN's it logs rec, |x - G(E(x))|, and mode, -log D(G(E(x))), both without weights."""

    def step(self, x):
        """One iteration on images x (B, C, S, S) in [-1, 1]. Returns its losses as scalars."""
        c = self.config
        x = self.begin(x)
        with self.machine.autocast():
            x_z = self.G(self.prior(len(x)))
            x_hat = self.machine.without_running_stats(self.G, self.E(x).float())
        losses = self.step_d(x, x_z)
        with self.machine.autocast():
            adv = adversarial_loss_g(c.loss, self.D(self.noisy(x_z))[0])
            rec = (x_hat.float() - x.float()).abs().mean()
            mode = adversarial_loss_g("dcgan", self.D(self.noisy(x_hat))[0])
        loss_g = adv + c.lam * rec + c.mu * mode
        loss_e = c.lam_e * rec + c.mu_e * mode
        self.machine.descend_together((self.optimiser_g, loss_g), (self.optimiser_e, loss_e))
        self.iteration += 1
        losses |= {"g_adv": adv, "rec": rec, "mode": mode}
        return {name: loss.detach() for name, loss in losses.items()}


# ---- Table 3's copied rows -----------------------------------------------------------------------

class PacGAN(GAN):
    """PacDCGAN (Lin et al., 2018): D judges packs of m images, joined on the channel axis.

    Only D's first layer grows. At m = 1 it is DCGAN as `--network pacgan` has it.
    """

    def step(self, x):
        """One iteration on images x (B, C, S, S) in [-1, 1]. Returns its losses as scalars."""
        packs = [x]                                             # D22
        for _ in range(1, self.config.pack):
            packs.append(x[torch.randint(len(x), (len(x),), device=x.device)])
        return super().step(torch.cat(packs, 1))

    def generate(self, z):
        """Packs (B, m C, S, S) of codes z (m B, d), by m calls of G, each a batch to its BN."""
        return torch.cat([self.G(part) for part in z.chunk(self.config.pack)], 1)


def adam_step(weight, m, v, gradient, n, lr, betas):
    """Adam's n-th step, n = 1, 2, .., as a function: (weight, m, v) after it, shaped as before."""
    beta1, beta2 = betas
    m = beta1 * m + (1 - beta1) * gradient
    v = beta2 * v + (1 - beta2) * gradient.square()
    m_hat = m / (1 - beta1 ** n)
    v_hat = v / (1 - beta2 ** n) + 1e-30                        # at 0 a root has no derivative
    return weight - lr * m_hat / (v_hat.sqrt() + 1e-8), m, v


class UnrolledGAN(GAN):
    """Unrolled GAN (Metz et al., 2017): G descends its loss at D as it will be in K steps: g_adv.

    Gradients reach G through D's steps as well. At K = 0 its losses are the GAN's; G moves first.
    """

    def step(self, x):
        """One iteration on images x (B, C, S, S) in [-1, 1]. Returns its losses as scalars."""
        x = self.begin(x)
        with self.machine.autocast():
            x_z = self.G(self.prior(len(x)))
        fake = self.noisy(x_z)
        weights = self.look_ahead(self.noisy(x), fake)
        with self.machine.autocast():
            g_adv = adversarial_loss_g(self.config.loss, self.judge(weights, fake))
        self.machine.descend(self.optimiser_g, g_adv)
        losses = self.step_d(x, x_z) | {"g_adv": g_adv}         # the one step that D really takes
        self.iteration += 1
        return {name: loss.detach() for name, loss in losses.items()}

    def look_ahead(self, real, fake):
        """D's weights {name: tensor} after K steps of Adam on this one batch, functions of `fake`.

        The steps go on from the moments of D's optimiser, which stays as it is.
        """
        group = self.optimiser_d.param_groups[0]
        state = {}                                              # name: (weight, m, v)
        for name, p in self.D.named_parameters():
            if not name.startswith("block"):                    # f takes no part
                moments = self.optimiser_d.state.get(p, {})     # empty before the first step
                zero = torch.zeros_like(p)
                state[name] = (p, moments.get("exp_avg", zero), moments.get("exp_avg_sq", zero))
        for n in range(self.iteration + 1, self.iteration + self.config.unroll + 1):
            weights = {name: values[0] for name, values in state.items()}
            with self.machine.autocast():
                logits = [self.judge(weights, images) for images in (real, fake)]
                loss = adversarial_loss_d(self.config.loss, *logits)
            gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            for name, gradient in zip(weights, gradients):
                state[name] = adam_step(*state[name], gradient, n, group["lr"], group["betas"])
        return {name: values[0] for name, values in state.items()}

    def judge(self, weights, x):
        """D's logits (B,) with other weights; its running statistics stay."""
        return self.machine.without_running_stats(self.D, x, weights)[0]


class VEEGAN(GAN):
    """VEEGAN (Srivastava et al., 2017): E, its F, maps images back to codes; D judges pairs.

    q(z|x) = N(E(x), I). It logs d_adv; g_adv, D's mean logit on (z, G(z)); rec, -log q(z|G(z)).
    """

    def make_judges(self, channels):
        c = self.config
        self.D = PairDiscriminator(convolutions(c, channels, c.d_norm), c.latent)
        self.E = nn.Sequential(nn.Flatten(), nn.Linear(channels * c.size ** 2, 500), nn.ReLU(),
                               nn.Linear(500, 500), nn.ReLU(), nn.Linear(500, c.latent))     # D24

    def step(self, x):
        """Algorithm 1 of its paper on images x (B, C, S, S) in [-1, 1]. Returns its losses."""
        x = self.begin(x)
        z = self.prior(len(x))
        with self.machine.autocast():
            x_z = self.G(z)
            rec = code_loss(z, self.E(x_z).float())
            mean = self.E(x).detach().float()                   # F descends rec alone, line 9
            from_z = self.D(z, self.noisy(x_z))
            from_x = self.D(mean + torch.randn_like(mean), self.noisy(x))
        d_adv = adversarial_loss_d(self.config.loss, from_z, from_x)    # label 1: the pair of z
        g_adv = from_z.mean()           # D's logit, log p(z, G(z)) / q(z, G(z)), which G lowers
        self.machine.descend_together((self.optimiser_d, d_adv), (self.optimiser_g, g_adv + rec),
                                      (self.optimiser_e, rec))
        self.iteration += 1
        return {"d_adv": d_adv.detach(), "g_adv": g_adv.detach(), "rec": rec.detach()}


# ---- Figures -------------------------------------------------------------------------------------

def figures_ivgan(model, folder, step, x):
    """Pictures of one evaluation: Figs. 1, 5, 6, of up to 100 test images x (n, C, S, S)."""
    noise = metrics.fixed_noise(100, model.config.latent)
    samples = model.decode(model.from_normal(noise))
    metrics.save_grid(folder / f"samples/{step:06d}.png", samples)                    # Figs. 5, 6
    metrics.save_grid(folder / "figures/real.png", x)                                 # Fig. 6, left
    if model.E is None:
        return
    w = model.encode(x).cpu()
    x_hat = model.decode(w).cpu()
    pairs = torch.stack([x, x_hat], dim=1).flatten(0, 1)        # original, its own, original, ...
    metrics.save_grid(folder / f"recon/{step:06d}.png", pairs[:100])
    if not isinstance(model, IVGAN):
        return
    k = model.config.k
    w = w[:10]
    rows = [x[:10], x_hat[:10]]
    for i in range(k):                                          # Fig. 1: G(O_1(w)) .. G(O_k(w))
        w_i = block_substitute(w, torch.full((len(w),), i), k, noise[:len(w)])
        rows.append(model.decode(w_i).cpu())
    grid = torch.stack(rows, dim=1).flatten(0, 1)
    metrics.save_grid(folder / f"figures/interventions-{step:06d}.png", grid, k + 2)


# ==================================================================================================
# PART II. Intervention Adversarial Auto-Encoder
# ==================================================================================================
#
# Notation.   paper           here          shape
#             z = E(x)        z             (B, d), z^ in Algorithm 1
#             x^ = G(z)       x_hat         (B, C, S, S)
#             z_k = T_k(z)    chain         t + 1 batches (B, d), k = 0..t
#             D(z_k)          judge(chain)  logits (t + 1, B, t + 1)
#             mu1, mu2        mu1, mu2      4, 2: used divided by t + 1, as the paper prints them
#
# Algorithm 1 (Fig. 1) is `IVAAE.step`; its comments give the algorithm's line numbers.
#     lines 2-9      z = E(x);  x^ = G(z);  z_k = T_k(z), k = 0..t
#     lines 10-11    D:  down  mu1 L_IV
#     lines 13-14    G:  down  lam L_recon
#     lines 15-16    E:  down  lam L_recon - mu2 L_IV             E goes up where D goes down
#
# Deviations and choices. No authors' code is known; WAE is the paper whose set-up this one takes.
# |     | paper                             | here                                      | switch   |
# |-----|-----------------------------------|-------------------------------------------|----------|
# | D14 | L_recon's reduction not printed   | WAE's: .05 times the sum over an image    | --lam    |
#         WAE's MNIST pixels lie in [0, 1]; in [-1, 1], as here, the sum is four times as large.
#         Silent, too, on optimiser and initial weights: Adam (.5, .999), as WAE, and torch's own.
# | D15 | lines 14, 16: "+ L_recon"; 16: d/d theta_G | descent; d/d theta_E             | --e-loss |
#         Line 11's 1 / mt and the others' 1 / m are means here.
#         Algorithm 1 lets E maximise D's cross entropy. `prior` is the form of WAE-GAN's paper and
#         of Fig. 3: every z_k shall look like the prior's.
# | D16 | "{z^l} for every two iterations"  | two SVGD steps from one bridge to the next |         |
#         The bandwidth is a constant to the gradient.
# | D17 | Table 4's "DCONV(C1, K4, S0)"     | 8, 12, 16, 32, 64 by K5, K5, K6, K4       |          |
#         A misprint: this keeps every other stride. The row above, printed K5, S2, has K6, for
#         Sec. 4's "5 x 5 or 6 x 6"; K5 would reach 32 pixels too, with an output padding of 1.
#         "FC(C1)" ends in the latent dimension.
# | D18 | WAE-GAN's D has one output        | two, whose difference is its logit        | --e-loss |
#         So `aae` is IVAAE at t = 1, where the printed mu2 is 1. One of L_IV's two terms reaches E,
#         which descends log D_0(E(x)) / 2; by `prior`, WAE-GAN's form, -log D_1(E(x)).
#         D moves before E and G, as in Algorithm 1; WAE-GAN's code has it after them.
# | D19 | one z for all k (line 3)          | each T_k draws its own: the same in the mean |       |
#         WAE-MMD's weight on CIFAR-10 is CelebA's, Fashion-MNIST's settings are MNIST's (silent).
#         Figs. 2 and 3 do not name their data: MNIST here. Their D learns at the undecayed rate.

BRIDGED = ("ivaae-bw", "ivaae-rad", "ivaae-svgd")
WITH_D = ("aae", *BRIDGED)


@dataclasses.dataclass
class IVAAEConfig(Settings):
    """IVAAE's settings: Sec. 4's "for all datasets and models", CelebA's latent size and batch."""

    model: str = setting("ivaae-rad", f"{', '.join(BRIDGED)}, aae, wae-mmd, or one of Part I's")
    dataset: str = setting("celeba", "a name (see data.py) or a folder of pictures")
    size: int = setting(64, "pixels", least=8, most=1024)
    network: str = setting("conv")                     # "fc": Table 3; "conv": Table 4
    width: int = setting(128, "hidden units (Table 3); or channels of E's first layer, and a "
                         "quarter of D's units (Table 4)", least=1)
    latent: int = setting(64, "d, the code's dimensions", least=2)
    batch: int = setting(100, "m, images per step and rank", least=2)
    epochs: float = setting(300.0, "training length", least=1e-9)
    t: int = setting(4, "t, number of bridge distributions", least=1, models=BRIDGED)
    mu1: float = setting(4.0, "D's weight of L_IV, times t + 1", least=0, models=WITH_D)
    mu2: float = setting(2.0, "E's weight of L_IV, times t + 1", least=0, models=WITH_D)
    e_loss: str = setting("iv", "iv, prior: E's loss (D15)", choices=("iv", "prior"), models=WITH_D)
    lam: float = setting(1.0, "lambda, the weight of L_recon", least=0)
    lam_mmd: float = setting(100.0, "the MMD's weight (WAE's)", least=0, models=("wae-mmd",))
    lr: float = setting(1e-3, "Adam's rate for G", least=0)
    lr_e: float = setting(1e-3, "Adam's rate for E", least=0)
    lr_d: float = setting(5e-4, "Adam's rate for D", least=0, models=WITH_D)
    decay: tuple = setting(((30, 0.5), (50, 0.1), (100, 0.01)))  # (epoch, factor of the rates)
    samples: int = setting(20_000, "generated images a metric is computed from (Sec. 4)", least=20)

    def check(self):
        """Raises UserError, in one sentence, for settings that cannot work."""
        super().check()
        if self.model == "ivaae-bw" and self.latent % self.t:
            raise UserError(f"--t {self.t} does not divide the latent dimension {self.latent}")
        if self.network == "conv" and self.size != 64:
            raise UserError(f"--size {self.size}: Table 4's networks are for 64 pixels")


IVAAE_MODELS = ("wae-mmd", "aae", *BRIDGED)                     # Tables 1 and 2, row by row
IVAAE_TABLE3 = dict(network="fc", width=1024, latent=16, batch=64, lr=1e-4, lr_e=5e-5, lr_d=1e-4,
                    decay=((100, 0.5), (200, 0.25)), lam_mmd=10.0)  # Table 3; Sec. 4, MNIST; WAE's
IVAAE_DATASETS = {                                              # what a data set changes
    "mnist": IVAAE_TABLE3,
    "fashion-mnist": IVAAE_TABLE3,
    "cifar10": dict(latent=128, batch=128),
    "digits": IVAAE_TABLE3 | dict(size=32, width=256, steps=6000, eval_every=2000, lr=4e-4,
                                  lr_e=2e-4, lr_d=4e-4),        # ours: quick on two cores
}


def preset_ivaae(model, dataset):
    """IVAAEConfig of one system on one data set."""
    changes = IVAAE_DATASETS.get(dataset, {}) | (dict(t=1) if model == "aae" else {})       # D18
    return IVAAEConfig(model=model, dataset=dataset, **changes)


# ---- Bridges T_k (Secs. 2, 3.2, 4; Definition 1) -------------------------------------------------

def prefix_substitute(z, step, t, noise):
    """T_k of "blockwise substitution" (Sec. 2), k = `step`: noise in the first k of t blocks.

    z, noise: (B, d). Returns (B, d), differentiable in z: z itself at step 0, `noise` at step t;
    N(0, I) in gives N(0, I) out. ValueError if t does not divide d or step is not in 0..t.
    """
    d = z.shape[1]
    if t < 1 or d % t or not 0 <= step <= t:
        raise ValueError(f"step {step} of {t} blocks: the blocks must divide a code of {d} "
                         "dimensions, steps run from 0 to the number of blocks")
    n = step * (d // t)
    return torch.cat([noise[:, :n], z[:, n:]], 1)


def radial_substitute(z, step, t, noise):
    """T_k of "radial substitution" (Sec. 2), k = `step`: z cos(k pi / 2t) + noise sin(k pi / 2t).

    z, noise: (B, d). Returns (B, d), differentiable in z: z itself at step 0, `noise` at step t;
    N(0, I) in gives N(0, I) out. Raises ValueError if step is not in 0..t.
    """
    if t < 1 or not 0 <= step <= t:
        raise ValueError(f"step {step} is not in 0..{t}")
    if step == 0:
        return z
    if step == t:                                               # exactly: cos(pi / 2) is 6e-17 here
        return noise
    angle = step * math.pi / (2 * t)
    return z * math.cos(angle) + noise * math.sin(angle)


def median_bandwidth(z, scale=100.0):
    """h = scale med^2 / log n (Sec. 4), med the median distance in z (n, d), n >= 2. A constant."""
    with torch.no_grad():
        median = F.pdist(z.float()).median()
        return (scale * median.square() / math.log(len(z))).clamp_min(1e-12)    # codes may coincide


def svgd_step(z, bandwidth, epsilon=1.0):
    """Eq. (2), as printed: one Stein variational gradient step of z (n, d) towards N(0, I).

    Particles may coincide. Forms n x n x d numbers. Returns (n, d), differentiable in z.
    """
    difference = z[:, None] - z[None, :]                        # (i, j, d): z_i - z_j
    k = torch.exp(-difference.square().sum(2) / bandwidth)      # (i, j): k(z_j, z_i)
    grad_log_p = -z                                             # of N(0, I)
    grad_k = 2 / bandwidth * difference * k[:, :, None]         # (i, j, d): with respect to z_j
    total = (k[:, :, None] * grad_log_p + grad_k).sum(1)        # the sum over j
    return z + epsilon / len(z) * total


def svgd_chain(z, t, every=2, noise=0.1):
    """The third bridge (Sec. 4): [z, z^1, .., z^(t-1)] by `every` SVGD steps each, z^t the prior's.

    z (n, d), n >= 2. The bandwidth is that of the particles at hand. Noise of deviation `noise`
    (printed: "0.1 Gaussian noise") follows each step. Gradients flow back to z through all steps.
    """
    chain = [z]
    for _ in range(t - 1):
        for _ in range(every):
            z = svgd_step(z, median_bandwidth(z))
            z = z + noise * torch.randn_like(z)
        chain.append(z)
    return [*chain, torch.randn_like(z)]


# ---- Networks: Tables 3 and 4 --------------------------------------------------------------------

def perceptron(n_in, hidden, depth, n_out):
    """A list of FC layers: `depth` of `hidden` units with ReLU, and a linear one to n_out."""
    layers = []
    for _ in range(depth):
        layers += [nn.Linear(n_in, hidden), nn.ReLU()]
        n_in = hidden
    return [*layers, nn.Linear(n_in, n_out)]


def table3_networks(latent, channels, size, hidden, outputs):
    """E: images (B, C, S, S) -> codes (B, d); G: back; D: codes -> logits (B, outputs)."""
    pixels = channels * size * size
    encoder = nn.Sequential(nn.Flatten(), *perceptron(pixels, hidden, 2, latent))
    generator = nn.Sequential(*perceptron(latent, hidden, 2, pixels), nn.Tanh(),
                              nn.Unflatten(1, (channels, size, size)))
    return encoder, generator, nn.Sequential(*perceptron(latent, hidden, 2, outputs))


def table4_networks(latent, channels, width, outputs):
    """The same of Table 4, for 64 x 64 pixels (D17)."""
    layers = []
    c = channels
    for n in range(4):                                          # 64 -> 32 -> 16 -> 8 -> 4
        layers.append(nn.Conv2d(c, width << n, 5, 2, 2, bias=False))
        c = width << n
        layers += [nn.BatchNorm2d(c), nn.ReLU()]
    encoder = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * c, latent))

    layers = [nn.Linear(latent, 64 * c), nn.Unflatten(1, (c, 8, 8))]
    for kernel, stride, padding in ((5, 1, 0), (5, 1, 0), (6, 2, 2)):       # 8 -> 12 -> 16 -> 32
        c //= 2
        layers.append(nn.ConvTranspose2d(2 * c, c, kernel, stride, padding, bias=False))
        layers += [nn.BatchNorm2d(c), nn.ReLU()]
    generator = nn.Sequential(*layers, nn.ConvTranspose2d(c, channels, 4, 2, 1), nn.Tanh())
    return encoder, generator, nn.Sequential(*perceptron(latent, 4 * width, 4, outputs))


# ---- Losses --------------------------------------------------------------------------------------

def bridge_loss(logits):
    """L_IV of Eq. (1): the mean over k and batch of -log D_k(z_k). logits (t + 1, B, t + 1).

    Under the best D it is log(t + 1) - JS(p_0, .., p_t) (Theorem 2). D descends it, E ascends it.
    """
    k = torch.arange(len(logits), device=logits.device).repeat_interleave(logits.shape[1])
    return F.cross_entropy(logits.flatten(0, 1), k)


def prior_loss(logits):
    """E's loss in WAE-GAN's form (D15): the mean over k < t and batch of -log D_t(z_k).

    logits (t + 1, B, t + 1), of T_0 .. T_t. At t = 1 it is -log D(E(x)). A scalar.
    """
    return -logits[:-1].log_softmax(2)[..., -1].mean()


def squared_error(x_hat, x):
    """L_recon of images (B, C, S, S): .05 times the sum of squares of each, their mean (D14)."""
    return 0.05 * (x_hat.float() - x.float()).square().flatten(1).sum(1).mean()


# ---- Models --------------------------------------------------------------------------------------

class AutoEncoder(nn.Module):
    """What IVAAE and WAE-MMD share: E, G, one Adam for both; sample, encode, decode.

    channels: of the images. steps_per_epoch: for the decay of the rates; None: they stay.
    """

    def __init__(self, config, machine=None, channels=1, steps_per_epoch=None):
        super().__init__()
        c = config
        self.config = config
        self.machine = machine or Machine()
        self.steps_per_epoch = steps_per_epoch
        self.iteration = 0
        if c.network == "fc":
            networks = table3_networks(c.latent, channels, c.size, c.width, c.t + 1)
        else:
            networks = table4_networks(c.latent, channels, c.width, c.t + 1)
        self.E, self.G, self.D = networks
        self.to(self.machine.device, memory_format=torch.channels_last)
        self.optimiser_eg = self.adam(dict(params=self.E.parameters(), lr=c.lr_e),
                                      dict(params=self.G.parameters(), lr=c.lr))

    def adam(self, *groups):
        """Adam over these parameters, each group at the rate that the decay starts from."""
        groups = [group | dict(initial_lr=group["lr"]) for group in groups]
        return self.machine.adam(groups, self.config.lr, (0.5, 0.999))      # D14

    def begin(self, x):
        """Sets the rates, which decay by epoch (Sec. 4). Returns x in the networks' format."""
        epoch = self.iteration / self.steps_per_epoch if self.steps_per_epoch else 0.0
        reached = [value for start, value in self.config.decay if epoch >= start]
        factor = reached[-1] if reached else 1.0
        for optimiser in data.optimisers_of(self).values():
            for group in optimiser.param_groups:
                group["lr"] = factor * group["initial_lr"]
        return x.to(memory_format=torch.channels_last)

    def decode(self, z):
        """Codes (n, d) -> images (n, C, S, S) in [-1, 1]."""
        with self.machine.inference(self):
            return self.G(z.to(self.machine.device)).float()

    def sample(self, n):
        """n images (n, C, S, S) in [-1, 1] from the prior."""
        return self.decode(torch.randn(n, self.config.latent, device=self.machine.device))

    def encode(self, x):
        """Images (n, C, S, S) in [-1, 1] -> codes (n, d)."""
        with self.machine.inference(self):
            return self.E(x.to(self.machine.device, memory_format=torch.channels_last)).float()


class IVAAE(AutoEncoder):
    """IVAAE with any bridge, and AAE (WAE-GAN), which is IVAAE at t = 1 (D18).

    It logs rec, by D14; d_iv, L_IV of Eq. (1) before D's step; e_adv, what E descends beside rec.
    """

    def __init__(self, config, machine=None, channels=1, steps_per_epoch=None):
        super().__init__(config, machine, channels, steps_per_epoch)
        self.optimiser_d = self.adam(dict(params=self.D.parameters(), lr=config.lr_d))

    def bridges(self, z):
        """Alg. 1, lines 6-9: [z_0 = z, .., z_t of the prior], t + 1 batches (B, d) (D19)."""
        t = self.config.t
        if self.config.model == "ivaae-svgd":
            return svgd_chain(z, t)
        substitute = radial_substitute if self.config.model == "ivaae-rad" else prefix_substitute
        return [z, *(substitute(z, k, t, torch.randn_like(z)) for k in range(1, t + 1))]

    def judge(self, chain):
        """D's logits (t + 1, B, t + 1) of the t + 1 batches, in one pass."""
        return self.D(torch.cat(list(chain))).float().unflatten(0, (len(chain), -1))

    def encoder_loss(self, logits):
        """What E descends beside L_recon: -mu2 L_IV (Alg. 1, line 16), or mu2 prior_loss (D15)."""
        mu2 = self.config.mu2 / (self.config.t + 1)
        if self.config.e_loss == "prior":
            return mu2 * prior_loss(logits)
        return mu2 * -bridge_loss(logits)

    def step(self, x):
        """One iteration of Algorithm 1 on images x (B, C, S, S) in [-1, 1]. Returns its losses."""
        x = self.begin(x)
        with self.machine.autocast():
            z = self.E(x).float()                                           # line 4
            rec = squared_error(self.G(z), x)                               # line 5
        chain = self.bridges(z)                                             # lines 6-9
        d_iv = self.step_d(chain)                                           # lines 10-11
        with self.machine.autocast():
            e_adv = self.encoder_loss(self.judge(chain))                    # line 12, by the new D
        # Lines 13-16 at once: e_adv does not contain G, whose gradient is lam L_recon's alone.
        self.machine.descend(self.optimiser_eg, self.config.lam * rec + e_adv)
        self.iteration += 1
        return {"rec": rec.detach(), "d_iv": d_iv, "e_adv": e_adv.detach()}

    def step_d(self, chain):
        """Alg. 1, lines 10-11: D down mu1 L_IV of t + 1 batches of codes. Returns that L_IV."""
        with self.machine.autocast():
            loss = bridge_loss(self.judge([z_k.detach() for z_k in chain]))
        self.machine.descend(self.optimiser_d, self.config.mu1 / (self.config.t + 1) * loss)
        return loss.detach()


class WAE(AutoEncoder):
    """WAE-MMD: `metrics.mmd_imq` of codes and prior in D's place. It logs rec, by D14, and mmd."""

    def __init__(self, config, machine=None, channels=1, steps_per_epoch=None):
        super().__init__(config, machine, channels, steps_per_epoch)
        self.D = None

    def step(self, x):
        """One iteration on images x (B, C, S, S) in [-1, 1]. Returns its losses as scalars."""
        x = self.begin(x)
        with self.machine.autocast():
            z = self.E(x).float()
            rec = squared_error(self.G(z), x)
        mmd = metrics.mmd_imq(z, torch.randn_like(z))
        self.machine.descend(self.optimiser_eg, self.config.lam * rec + self.config.lam_mmd * mmd)
        self.iteration += 1
        return {"rec": rec.detach(), "mmd": mmd.detach()}


# ---- Figures, and the experiments of Figures 2, 3 and 5 ------------------------------------------

def figures_ivaae(model, folder, step, x, codes):
    """Fig. 7, and pictures of up to 100 test images x (n, C, S, S); Fig. 6, of codes (N, d)."""
    noise = metrics.fixed_noise(100, model.config.latent)
    metrics.save_grid(folder / f"samples/{step:06d}.png", model.decode(noise))          # Fig. 7
    z = model.encode(x).cpu()
    pairs = torch.stack([x, model.decode(z).cpu()], dim=1).flatten(0, 1)
    metrics.save_grid(folder / f"recon/{step:06d}.png", pairs[:100])
    if len(z) >= 20:                                            # ours: a row from z[i] to z[10 + i]
        weights = torch.linspace(0, 1, 10)[:, None]
        lines = torch.cat([torch.lerp(a, b, weights) for a, b in zip(z[:10], z[10:20])])
        metrics.save_grid(folder / f"figures/interpolations-{step:06d}.png", model.decode(lines))
    heat = torch.cov(codes.T).abs().clamp(max=1)[None, None]    # Fig. 6: bright is close to 1
    heat = F.interpolate(heat, scale_factor=max(1, 512 // heat.shape[-1]))
    metrics.save_picture(folder / f"figures/covariance-{step:06d}.png", heat[0])


def probe_discriminator(model, batches, steps):
    """Figs. 2 and 3: D alone goes on training while E and G stand still. A dict per iteration.

    `loss` is L_IV before D's step. `gradient` is the norm of E's gradient of -log D_t(E(x)), as in
    Fig. 3; `gradient_iv` that of `encoder_loss`. E uses its running statistics. Raises NotFinite.
    """
    own = list(model.E.parameters())
    lines = []
    model.E.eval()
    for n in range(1, steps + 1):
        x, _ = next(batches)
        with model.machine.autocast():
            z = model.E(x).float()
        chain = model.bridges(z)
        with model.machine.autocast():
            logits = model.judge(chain)
            losses = {"gradient": -logits[0].log_softmax(1)[:, -1].mean(),
                      "gradient_iv": model.encoder_loss(logits)}
        norms = {}
        for name, loss in losses.items():
            gradients = torch.autograd.grad(loss, own, retain_graph=True)
            norms[name] = sum(g.float().square().sum() for g in gradients).sqrt().item()
        lines.append({"iteration": n, "loss": model.step_d(chain).item()} | norms)
        if not all(map(math.isfinite, lines[-1].values())):
            raise data.NotFinite(f"iteration {n} of the probe is not finite: {lines[-1]}")
        lines[-1]["protocol"] = f"a batch of {len(x)} training images"
    model.E.train()
    return lines


def probe_classifier(model, batches, test_set, steps, every=100):
    """Fig. 5: an MLP of two layers of 1000 nodes on the frozen encoder's last hidden layer.

    Rate 1e-4 (Sec. 4), by Adam (ours); `batches` should be of 60. A dict per `every` iterations:
    `loss`, and `error`, the share of at most 10,000 test images that it gets wrong.
    """
    hidden = model.E[:-1]
    device = model.machine.device

    def features(x):
        with model.machine.inference(hidden):
            return hidden(x.to(memory_format=torch.channels_last)).float()

    n = features(next(batches)[0]).shape[1]
    mlp = nn.Sequential(*perceptron(n, 1000, 2, test_set.classes)).to(device)
    optimiser = torch.optim.Adam(mlp.parameters(), 1e-4)
    ordered = data.ordered(test_set, 10_000, 250, device, model.config.size)
    test = [(features(x), y) for x, y in ordered]
    count = sum(len(y) for _, y in test)
    lines = []
    for step in range(1, steps + 1):
        x, y = next(batches)
        loss = F.cross_entropy(mlp(features(x)), y)
        model.machine.descend(optimiser, loss)
        if step % every == 0 or step == steps:
            with torch.no_grad():
                wrong = sum((mlp(h).argmax(1) != y).sum().item() for h, y in test)
            lines.append({"iteration": step, "loss": loss.item(), "error": wrong / count,
                          "protocol": f"error: {count} {test_set.split} images"})
    return lines


# ==================================================================================================
# Both Parts: tables, training, command line
# ==================================================================================================

# Each table and figure with numbers: columns are (heading, data set, metric); a row is the flags of
# a system and the published value of each column (None: blank). Table 4 is silent on E's mu, which
# stays twice G's, as in Sec. 5.
TABLES = {
    "2": dict(
        title="IVGAN, Table 2: minimum of FID", choose="min",
        columns=[("MNIST", "mnist", "fid"), ("CIFAR-10", "cifar10", "fid"),
                 ("LSUN church", "lsun-church", "fid"), ("STL-10", "stl10", "fid")],
        rows={"DCGAN": ("--model dcgan", 10.7, 51.2, 23.6, 44.0),
              "LSGAN": ("--model lsgan", 10.9, 34.7, 30.9, 60.1),
              "WGAN": ("--model wgan", 12.0, 34.6, 33.3, 55.0),
              "WGAN-GP": ("--model wgan-gp", 11.0, 38.3, 26.8, 47.9),
              "MRGAN": ("--model mrgan", 7.4, 33.0, 22.4, 45.2),
              "IVDCGAN": ("--model ivdcgan", 5.4, 32.2, 20.5, 43.7),
              "IVLSGAN": ("--model ivlsgan", 8.3, 28.2, 18.9, 41.6)}),
    "3": dict(
        title="IVGAN, Table 3: stacked MNIST",
        columns=[("modes", "stacked-mnist", "modes"), ("KL", "stacked-mnist", "kl")],
        rows={"DCGAN": ("--model dcgan", 78.9, 4.50), "VEEGAN": ("--model veegan", 150.0, 2.95),
              "Unrolled GAN": ("--model unrolled", 48.7, 4.32),
              "PacDCGAN": ("--model pacdcgan", 1000, 0.06), "LSGAN": ("--model lsgan", 53, 3.88),
              "IVLSGAN": ("--model ivlsgan", 1000, 0.07),
              "IVDCGAN": ("--model ivdcgan", 1000, 0.08)}),
    "4": dict(
        title="IVGAN, Table 4 and Fig. 7: minimum of FID of IVLSGAN, by mu and k", choose="min",
        runs="2",
        columns=[("FID", "cifar10", "fid")],
        rows={"mu = .5, k = 2": ("--k 2", 29.2), "mu = .5, k = 4": ("--model ivlsgan", 28.2),
              "mu = .5, k = 10": ("--k 10", 41.2), "mu = .5, k = 20": ("--k 20", 36.1),
              "mu = 0, k = 4": ("--mu 0 --mu-e 0", 34.5),
              "mu = .25, k = 4": ("--mu .25 --mu-e .5", 29.6),
              "mu = 1, k = 4": ("--mu 1 --mu-e 2", 39.7)}),
    "fig4": dict(
        title="IVGAN, Fig. 4: FID by epoch (curves in each run's figures/; here the minimum)",
        choose="min", runs="2",
        columns=[("CIFAR-10", "cifar10", "fid"), ("LSUN church", "lsun-church", "fid")],
        rows={name.upper(): (f"--model {name}", None, None)
              for name in ("dcgan", "lsgan", "wgan", "wgan-gp", *WITH_E)}),
    "ivaae-1": dict(
        title="IVAAE, Table 1 and Fig. 4: minimum of FID", choose="min",
        columns=[("MNIST", "mnist", "fid"), ("CelebA", "celeba", "fid"),
                 ("CIFAR-10", "cifar10", "fid")],
        rows={"WAE-MMD": ("--model wae-mmd", 67, 36, 87),
              "AAE (WAE-GAN)": ("--model aae", 53, 33, 109),
              "IVAAE, blockwise": ("--model ivaae-bw", 49, 34, 117),
              "IVAAE, radial": ("--model ivaae-rad", 50, 33, 80),
              "IVAAE, SVGD": ("--model ivaae-svgd", 49, None, None)}),
    "ivaae-2": dict(
        title="IVAAE, Table 2: FLD at the best FID", choose="best", runs="ivaae-1",
        columns=[("MNIST", "mnist", "fld"), ("CelebA", "celeba", "fld"),
                 ("CIFAR-10", "cifar10", "fld")],
        rows={"WAE-MMD": ("--model wae-mmd", 0.05, 0.34, 10.9),
              "AAE (WAE-GAN)": ("--model aae", 5.5, 1.5, 15.1),
              "IVAAE, blockwise": ("--model ivaae-bw", 0.2, 0.22, 4.0),
              "IVAAE, radial": ("--model ivaae-rad", 0.07, 0.18, 11.8),
              "IVAAE, SVGD": ("--model ivaae-svgd", 5.7, None, None)}),
    "ivaae-fig2": dict(
        title="IVAAE, Fig. 2: the loss of D alone after 50 epochs", probe="discriminator",
        columns=[("loss", "mnist", "loss")],
        rows={f"{model}, d = {d}": (f"--model {model} --latent {d} --epochs 50", None)
              for model in ("aae", "ivaae-bw") for d in (16, 32, 64)}),
    "ivaae-fig3": dict(
        title="IVAAE, Fig. 3: the norm of E's gradient after 50 epochs", probe="discriminator",
        runs="ivaae-fig2",
        columns=[("gradient", "mnist", "gradient")],
        rows={"AAE": ("--model aae --latent 16 --epochs 50", None),
              "IVAAE, blockwise": ("--model ivaae-bw --latent 16 --epochs 50", None)}),
    "ivaae-fig5": dict(
        title="IVAAE, Fig. 5: error of a classifier on the frozen encoder", probe="classifier",
        runs="ivaae-1",
        columns=[("error", "mnist", "error")],
        rows={"AAE (WAE-GAN)": ("--model aae", None), "IVAAE, radial": ("--model ivaae-rad", None),
              "IVAAE, SVGD": ("--model ivaae-svgd", None)}),
}


def preset(model=None, dataset=None, network=None):
    """The settings of one system on images; network: "pacgan" or None (D20), of Part I only.

    Raises UserError for points, and unknown systems.
    """
    model = model or "ivlsgan"
    dataset = dataset or "digits"
    if dataset in data.POINT_SETS:
        raise UserError(f"--dataset {dataset} holds points; ivgen.py needs images")
    if model in IVGAN_MODELS:
        return preset_ivgan(model, dataset, network)
    if model in IVAAE_MODELS:
        return preset_ivaae(model, dataset)
    raise UserError(f"--model {model} is not one of {', '.join((*IVGAN_MODELS, *IVAAE_MODELS))}")


def build(config, machine=None, channels=3, steps=None, steps_per_epoch=None):
    """The model of these settings.

    To add one: a class whose `step` counts `iteration`, its place here, its name in *_MODELS, and
    in WITH_E if it has Table 1's E.
    """
    if isinstance(config, IVAAEConfig):
        kind = WAE if config.model == "wae-mmd" else IVAAE
        return kind(config, machine, channels, steps_per_epoch)
    kinds = {"mrgan": MRGAN, "ivdcgan": IVGAN, "ivlsgan": IVGAN, "veegan": VEEGAN,
             "unrolled": UnrolledGAN, "pacdcgan": PacGAN}
    return kinds.get(config.model, GAN)(config, machine, channels, steps)


def evaluate(model, evaluator, folder, step, x_test, train_set):
    """Pictures, and {metric: value}, of one moment; training's random numbers go on undisturbed.

    `eval_s` is the seconds all this took. For IVAAE's systems `fld` is the Frechet distance of
    codes to the prior, by Sec. 4's formula. It takes 60,000 training images at most (`fld_n`)
    in the order of `data.ordered`: all of MNIST, a random choice of CelebA.
    """
    began = time.time()
    c = model.config
    m = model.machine
    result = {}
    before = ""
    if isinstance(model, AutoEncoder):
        images = data.ordered(train_set, 60_000, 250, m.device, c.size)
        codes = torch.cat([model.encode(x).cpu() for x, _ in images])
        figures_ivaae(model, folder, step, x_test, codes)
        result = {"fld": metrics.frechet_latent_distance(codes), "fld_n": len(codes)}
        before = f"fld: {len(codes)} {train_set.split} images; "
    else:
        if model.E is not None:     # D12: of its present weights, by 50 full batches (ours)
            images = data.ordered(train_set, 50 * c.batch, c.batch, m.device, c.size)
            with m.autocast(), torch.compiler.set_stance("force_eager"):    # not compiled for this
                torch.optim.swa_utils.update_bn((x.to(memory_format=torch.channels_last)
                                                 for x, _ in images if len(x) == c.batch), model.E)
        figures_ivgan(model, folder, step, x_test)

    def reconstruct(x):
        return model.decode(model.encode(x))

    result |= evaluator(model.sample, None if model.E is None else reconstruct)
    result["protocol"] = before + result["protocol"]
    return result | {"eval_s": round(time.time() - began, 1)}


def score_of(result):
    """What best.pt is chosen by (lower is better): the first measured of fid, fcd, kl, mse."""
    return metrics.best_first(result, data.SCORES)


def train(config, machine, folder, checkpoint=None):
    """Trains `config` in `folder`, from `checkpoint` if given. Returns the last evaluation.

    Raises UserError, NotFinite, and, after a signal, Interrupted.
    """
    # Load, build, restore. The folder comes first: whether it can be written is seen before work.
    run = data.Run(folder, FILE, config, machine, checkpoint)
    train_set, test_set = data.load_pair(config.dataset, config.root, config.size)
    labelled = train_set                                        # for the classifier: no triples
    if getattr(config, "triples", None):
        train_set = data.fixed_triples(train_set, test_set, config.triples)             # D22
    batches = data.Batches(train_set, config.batch, machine.device, config.size, config.seed,
                           run.rank, run.world)
    run.expect(train_set, test_set)
    steps = config.steps or math.ceil(config.epochs * batches.steps_per_epoch)
    if checkpoint and not run.other_data:
        steps = max(steps, checkpoint["step"])
    # Every 10 epochs (Table 2; IVAAE's Table 1), but at least twelve times a run.
    eval_every = config.eval_every or max(1, min(10 * batches.steps_per_epoch, steps // 12))
    torch.manual_seed(config.seed)                              # all ranks build the same networks
    model = build(config, machine, train_set.channels, steps, batches.steps_per_epoch)
    evaluator = None
    if run.main:
        paper = TABLES["ivaae-1" if isinstance(config, IVAAEConfig) else "2"]["columns"]
        paper_has_fid = config.dataset in [dataset for _, dataset, _ in paper]
        many = 60_000 if config.dataset in ("mnist", "fashion-mnist") else 50_000   # author code
        weights = metrics.inception_default(config.inception, paper_has_fid, machine.device,
                                            config.samples or many)
        samples = config.samples or (many if weights else 10_000)
        evaluator = metrics.Evaluator(labelled, test_set, config.size, machine.device, config.root,
                                      samples, weights)
    x_test, _ = next(data.ordered(test_set, 100, 100, "cpu", config.size))
    start = run.begin(model, batches, steps)
    if config.compile:
        data.compile_networks(model)
    run.save("last.pt", start)                                  # resumable from any kill
    result = {}
    title = f"{config.model}, {config.dataset}"

    # Train: a batch, a step; now and then a line of the log, an evaluation, a checkpoint.
    with run:
        for step in range(start + 1, steps + 1):
            x, _ = next(batches)
            run.add(step, model.step(x))
            leaves = run.interrupted(step)                      # Ctrl-C or SIGTERM
            evaluates = step % eval_every == 0 or step == steps
            saves = evaluates or leaves or step % data.SAVE_EVERY == 0
            if evaluates or step % data.LOG_EVERY == 0:
                run.log_losses(step)
            run.status(step)
            if saves:
                run.check_finite()
            if evaluates:
                if run.main:
                    result = evaluate(model, evaluator, run.folder, step, x_test, train_set)
                    run.report(step, result)
                    metrics.draw_log_curves(run.folder, ("fid", "fcd", "kl", "fld"), title)
                if run.is_best(score_of(result)):
                    run.save("best.pt", step)
            if saves:
                run.save("last.pt", step)
            if leaves:
                run.leave(step)
    return result


def probe(config, machine, checkpoint, folder, which, steps=None):
    """`--probe`: one of IVAAE's experiments on a finished run; writes probe-NAME.jsonl and figures.

    `steps` iterations, else 1,000 (Figs. 2 and 3) or 3,000 (Fig. 5). Raises UserError for systems
    of Part I, fp16, a model without D, data without labels; NotFinite.
    """
    if not isinstance(config, IVAAEConfig):
        raise UserError(f"--probe: {config.model} is not one of IVAAE's systems")
    if machine.amp == "fp16":
        raise UserError("--amp fp16: a probe looks at gradients that fp16 loses; use bf16 or off")
    if which == "discriminator" and config.model == "wae-mmd":
        raise UserError("--probe discriminator: wae-mmd has no discriminator")
    train_set, test_set = data.load_pair(config.dataset, config.root, config.size)
    if which == "classifier" and train_set.y is None:
        raise UserError(f"--probe classifier: {config.dataset} has no labels")
    torch.manual_seed(config.seed)
    model = build(config, machine, train_set.channels)
    data.restore(checkpoint, model)
    batch = config.batch if which == "discriminator" else min(60, len(train_set))
    batches = data.Batches(train_set, batch, machine.device, config.size, config.seed)
    if which == "discriminator":
        lines = probe_discriminator(model, batches, steps or 1000)
    else:
        lines = probe_classifier(model, batches, test_set, steps or 3000)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    data.save_atomic(text, folder / f"probe-{which}.jsonl", data.write_text)
    after = checkpoint["step"]
    for name in lines[0].keys() - {"iteration", "protocol"}:
        curve = {config.model: [(line["iteration"], line[name]) for line in lines]}
        metrics.draw_curves(folder / f"figures/probe-{which}-{name}.png", curve,
                            f"{name}, {config.dataset}, d = {config.latent}, after step {after}")
    print(json.dumps({"model": config.model, "probe": which, "after_step": after} | lines[-1]))


@data.random_state_kept()
def main(argv=None):
    """The command line; returns the exit code. Raises UserError for what the user can mend."""
    def probes(parser, instead):
        instead.add_argument("--probe", choices=("discriminator", "classifier"),
                             help="with --resume: IVAAE's Figs. 2 and 3, or 5; --steps: how many")

    if data.asks_for_table(argv):
        return data.run_table(argv, FILE, TABLES, main)
    args, config, checkpoint = data.parse(argv, FILE, __doc__, preset, probes, TABLES)
    if args.probe and not checkpoint:
        raise UserError("--probe needs --resume RUN, a finished run")
    machine = Machine(*data.hardware(args.device, config.amp))
    name = os.path.basename(config.dataset)
    folder = data.run_folder(args, f"runs/{FILE}-{config.model}-{name}-s{config.seed}")
    if args.bench:
        model = build(config, machine, data.channels_of(config.dataset))
        x = model.sample(config.batch)
        print(json.dumps(metrics.benchmark(model, x, args.bench, config.compile)))
    elif args.probe:
        probe(config, machine, checkpoint, folder, args.probe, args.steps)
    elif args.sample:
        model = build(config, machine, checkpoint["channels"])
        data.restore(checkpoint, model)
        metrics.draw_samples(model, folder, args.sample, config.seed)
    else:
        train(config, machine, folder, checkpoint)
        print(f"run: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(data.run_command(main))
