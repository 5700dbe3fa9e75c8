"""The tests, offline and on the CPU: `pytest test_all.py`.

What is compared with what: a loss with its equation written out naively, an estimator with a closed form or an enumeration,
a run with the same run interrupted, the README's tables with the file of results they are written from.
`python test_all.py` rewrites those tables.
"""

import copy
import dataclasses
import io
import json
import math
import os
import pathlib
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import ivgen  # noqa: E402


# ======================================================================================================================
# ivgen.py: Intervention GAN
# ======================================================================================================================


def small(model="ivlsgan", **changes):
    """A small model of `model`'s kind in float32 on the CPU, and a batch for it."""
    config = dataclasses.replace(ivgen.preset(model, "digits"), size=32, width=4, latent=8, k=4, channels=1, batch=8,
                                 steps=100, noise=0., **changes)
    torch.manual_seed(0)
    return ivgen.IVGAN(config), torch.rand(8, 1, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def weights(network):
    return [p.detach().clone() for p in network.parameters()]


def moved(before, network):
    return any(not torch.equal(a, b) for a, b in zip(before, network.parameters()))


def test_block_substitution_is_an_intervention():
    """Definition 1: N(0, I) in, N(0, I) out; exactly the named block changes; Definition 2: together all coordinates."""
    z, noise = torch.randn(40_000, 12), torch.randn(40_000, 12)
    index = torch.randint(4, (40_000,))
    out = ivgen.block_substitute(z, index, 4, noise)
    assert out.mean(0).abs().max() < .03
    assert (torch.cov(out.T) - torch.eye(12)).abs().max() < .04
    changed = (out != z).view(-1, 4, 3)
    assert torch.equal(changed.all(2), F.one_hot(index, 4).bool()) and torch.equal(changed.any(2), changed.all(2))
    touched = [(ivgen.block_substitute(z[:1], torch.tensor([i]), 4, noise[:1]) != z[:1])[0] for i in range(4)]
    assert torch.stack(touched).sum(0).tolist() == [1] * 12
    with pytest.raises(ValueError, match="5 blocks do not divide a code of 12"):
        ivgen.block_substitute(z, index, 5, noise)


def test_block_substitution_passes_gradient_only_where_the_code_stays():
    z = torch.randn(3, 6, requires_grad=True)
    ivgen.block_substitute(z, torch.tensor([0, 1, 2]), 3, torch.randn(3, 6)).sum().backward()
    assert z.grad.tolist() == [[0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0]]


@pytest.mark.parametrize("size", [32, 64, 128])
def test_ivgan_networks_have_table_1s_shapes(size):
    z, x = torch.randn(2, 100), torch.randn(2, 3, size, size)
    g, d, e = ivgen.Generator(100, 3, size, 8), ivgen.Discriminator(3, size, 8, 4), ivgen.Encoder(100, 3, size, 8)
    assert g(z).shape == x.shape and g(z).abs().max() <= 1
    assert [tuple(o.shape) for o in d(x)] == [(2,), (2, 4)] and e(x).shape == (2, 100)


def test_ivgan_networks_at_64_pixels_are_table_1():
    convs = lambda net, kind: [(m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0])
                               for m in net.modules() if isinstance(m, kind)]
    trunk = [(3, 64, 4, 2), (64, 128, 4, 2), (128, 256, 4, 2), (256, 512, 4, 2)]
    d, e = ivgen.Discriminator(), ivgen.Encoder()
    assert convs(d, torch.nn.Conv2d) == trunk and d.real.in_features == 512 * 4 * 4 and d.block.out_features == 4
    assert convs(e, torch.nn.Conv2d) == [*trunk, (512, 100, 4, 2)] and not e[-1].affine
    assert convs(ivgen.Generator(), torch.nn.ConvTranspose2d) == [
        (100, 512, 4, 1), (512, 256, 4, 2), (256, 128, 4, 2), (128, 64, 4, 2), (64, 3, 4, 2)]
    norms = lambda norm: [type(m).__name__ == "BatchNorm2d" for m in ivgen.Discriminator(norm=norm).trunk if not
                          isinstance(m, torch.nn.LeakyReLU)]
    assert norms("table1") == [False, True] * 4 and norms("dcgan") == [False] + [False, True] * 3
    assert not any(norms("none"))
    weight = d.trunk[6].weight
    assert abs(weight.std() - .02) < 1e-3 and abs(d.trunk[7].weight.mean() - 1) < .01 and d.real.bias.item() == 0


def test_adversarial_losses_are_their_equations():
    real, fake = torch.randn(5), torch.randn(5)
    p, q = torch.sigmoid(real), torch.sigmoid(fake)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    close(ivgen.adversarial_loss_d("dcgan", real, fake), -(p.log().sum() + (1 - q).log().sum()) / 10)      # Eq. (1)
    close(ivgen.adversarial_loss_g("dcgan", fake), -q.log().mean())
    close(ivgen.adversarial_loss_d("lsgan", real, fake), (((real - 1) ** 2).sum() + ((fake + 1) ** 2).sum()) / 10)
    close(ivgen.adversarial_loss_g("lsgan", fake), (fake ** 2).mean() / 2)
    for base in ("wgan", "wgan-gp"):
        close(ivgen.adversarial_loss_d(base, real, fake), fake.mean() - real.mean())
        close(ivgen.adversarial_loss_g(base, fake), -fake.mean())
    logits, index = torch.randn(3, 4), torch.tensor([0, 3, 1])
    naive = sum(-math.log(math.exp(logits[j, i]) / sum(math.exp(v) for v in logits[j])) for j, i in enumerate(index)) / 3
    assert abs(ivgen.classification_loss(logits, index).item() - naive) < 1e-6                               # Eq. (3)
    x, y = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    close(ivgen.reconstruction_loss(x, y), (x - y).abs().sum() / x.numel())                                  # Eq. (6)


def test_gradient_penalty_of_a_linear_critic():
    """A critic <a, x> has gradient a everywhere: the penalty is (||a|| - 1)^2, whatever the images."""
    a = torch.randn(1, 4, 4, requires_grad=True)
    penalty = ivgen.gradient_penalty(lambda x: ((x * a).sum((1, 2, 3)), None), torch.randn(6, 1, 4, 4), torch.randn(6, 1, 4, 4))
    assert abs(penalty.item() - (a.norm().item() - 1) ** 2) < 1e-4
    gradient, = torch.autograd.grad(penalty, a)                     # it is itself differentiable: that is what D descends
    torch.testing.assert_close(gradient, 2 * (a.norm() - 1) * a / a.norm())


def test_theorem_3_the_optimal_classifier_and_its_loss():
    """A table of logits trained on L_IV reaches f_i = p_i / sum_j p_j and the loss log k - JS(p_1..p_k)."""
    k, states = 4, 7
    p = torch.rand(k, states, dtype=torch.float64) + .05
    p /= p.sum(1, keepdim=True)
    logits = torch.zeros(states, k, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([logits], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def loss():
        return -(p.T * F.log_softmax(logits, 1)).sum() / k          # Eq. (3): E_i E_{x ~ p_i} -log f_i(x)

    def closure():
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    optimiser.step(closure)
    torch.testing.assert_close(F.softmax(logits, 1), (p / p.sum(0)).T, rtol=0, atol=1e-4)      # Eq. (4)
    assert abs(loss().item() - (math.log(k) - ivgen.multi_js(p).item())) < 1e-7                # Eq. (5)


def test_multi_js_of_equation_2():
    p = torch.rand(2, 9, dtype=torch.float64)
    p /= p.sum(1, keepdim=True)
    m = p.mean(0)
    two = .5 * (p[0] * (p[0] / m).log()).sum() + .5 * (p[1] * (p[1] / m).log()).sum()
    assert abs(ivgen.multi_js(p) - two) < 1e-12
    assert abs(ivgen.multi_js(p[[0, 0, 0]])) < 1e-12                                           # zero iff all equal
    assert abs(ivgen.multi_js(torch.eye(4, dtype=torch.float64)) - math.log(4)) < 1e-12        # log k where disjoint
    assert abs(ivgen.multi_js(p, torch.tensor([1., 0.], dtype=torch.float64))) < 1e-12


def test_example_1_square_fitting():
    """On a grid of cells: JS(X0, X1) is log 2 for every a in (0, 1], the four-way JS is (1 + a) log 2."""
    n = 20

    def square(left, low):
        cells = torch.zeros(2 * n, 2 * n, dtype=torch.float64)
        cells[low:low + n, left:left + n] = 1 / n ** 2
        return cells.flatten()

    seen = []
    for shift in range(1, n + 1):
        a = shift / n
        x0, x1, y1, y2 = square(0, 0), square(shift, n), square(0, n), square(shift, 0)
        assert abs(ivgen.multi_js(torch.stack([x0, x1])) - math.log(2)) < 1e-12
        seen.append(ivgen.multi_js(torch.stack([x0, x1, y1, y2])).item())
        assert abs(seen[-1] - (1 + a) * math.log(2)) < 1e-12
    assert all(b > a for a, b in zip(seen, seen[1:]))               # so it has a slope in a, towards overlap


def only(monkeypatch, term):
    """Switches every term but `term` off, by weight where there is one and by a zero loss otherwise."""
    zero = lambda base, *logits: sum(v.sum() * 0 for v in logits)
    if term != "adv":
        monkeypatch.setattr(ivgen, "adversarial_loss_d", zero)
        monkeypatch.setattr(ivgen, "adversarial_loss_g", zero)
    on = {"iv": dict(lam=0., lam_e=0.), "rec": dict(mu=0., mu_e=0.), "adv": dict(lam=0., mu=0., lam_e=1e-30, mu_e=0.)}
    return on[term]


def one_half(model, x, half):
    """Forwards with fixed noise, then D's half or G's and E's half of an iteration; the losses before the update."""
    torch.manual_seed(5)
    images = model.forwards(x)
    return model.step_d(x, images) if half == "d" else model.step_g_and_e(x, images)


@pytest.mark.parametrize("half,term,watch,sign,movers", [
    ("d", "adv", "d_adv", -1, {"D"}), ("d", "iv", "f_ce", -1, {"D"}),
    ("g", "adv", "g_adv", -1, {"G"}), ("g", "iv", "iv", -1, {"G", "E"}), ("g", "rec", "rec", -1, {"G", "E"})])
def test_each_term_moves_its_networks_its_way(monkeypatch, half, term, watch, sign, movers):
    """D and f lower the cross entropy; G and E raise it (iv = -CE falls); all lower the reconstruction; G fools D."""
    model, x = small(**only(monkeypatch, term), lr=1e-4, lr_e=1e-4)
    if term == "adv":
        model.optimisers["E"].param_groups[0]["lr"] = 0.
    before = {name: weights(net) for name, net in model.named_children()}
    value = lambda losses: (losses["rec_x"] + losses["rec_z"] if watch == "rec" else losses[watch]).item()
    first = value(one_half(model, x, half))
    assert {name for name, net in model.named_children() if moved(before[name], net)} == movers
    assert sign * (value(one_half(model, x, half)) - first) > 0
    for mover in movers & {"G", "E"} if len(movers) > 1 else ():    # each of the two alone goes the same way
        model, x = small(**only(monkeypatch, term), lr=1e-4, lr_e=1e-4)
        model.optimisers[({"G", "E"} - {mover}).pop()].param_groups[0]["lr"] = 0.
        first = value(one_half(model, x, half))
        assert sign * (value(one_half(model, x, half)) - first) > 0, mover


def test_classifier_term_reaches_trunk_and_its_own_head_only(monkeypatch):
    model, x = small(**only(monkeypatch, "iv"))
    trunk, real, block = (weights(net) for net in (model.D.trunk, model.D.real, model.D.block))
    one_half(model, x, "d")
    assert moved(trunk, model.D.trunk) and moved(block, model.D.block) and not moved(real, model.D.real)


def test_e_sign_code_lets_e_lower_the_cross_entropy(monkeypatch):
    model, x = small(**only(monkeypatch, "iv"), e_sign="code", lr=1e-4, lr_e=1e-4)
    model.optimisers["G"].param_groups[0]["lr"] = 0.
    first = one_half(model, x, "g")["iv"].item()
    assert one_half(model, x, "g")["iv"].item() > first             # iv = -CE rises: E now helps f


def test_gradients_are_equation_11_in_each_networks_own_weights():
    """G's and E's gradients against a naive evaluation of Eq. (11), term by term, with weights no two of which agree."""
    model, x = small(mu=.5, lam=.25, mu_e=.7, lam_e=1.3)
    twin = copy.deepcopy(model)
    for name, optimiser in model.optimisers.items():
        model.optimisers[name] = torch.optim.SGD(optimiser.param_groups[0]["params"], lr=1.)
    before = {name: weights(getattr(model, name)) for name in "GE"}
    one_half(model, x, "g")
    torch.manual_seed(5)
    z = torch.randn(8, 8)
    fake, w = twin.G(z), twin.E(x)
    x_w = twin.G(w)
    index = torch.randint(4, (8,))
    noise, w_i = torch.randn(8, 8), w.clone()
    for j in range(8):                                              # Alg. 1, line 8, sample by sample
        at = slice(2 * index[j], 2 * index[j] + 2)
        w_i[j, at] = noise[j, at]
    x_i = twin.G(w_i)
    adv = (twin.D(fake)[0] ** 2).mean() / 2
    recon = (x_w - x).abs().mean() + (twin.E(x_i) - w_i).abs().mean()
    l_iv = (twin.D(x_i)[1].log_softmax(1)[torch.arange(8), index]).mean()
    for name, loss in (("G", adv + .25 * recon + .5 * l_iv), ("E", 1.3 * recon + .7 * l_iv)):
        want = torch.autograd.grad(loss, list(getattr(twin, name).parameters()), retain_graph=True)
        for old, new, gradient in zip(before[name], getattr(model, name).parameters(), want):
            torch.testing.assert_close(old - new.detach(), gradient, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("iv,plain", [("ivdcgan", "dcgan"), ("ivlsgan", "lsgan")])
def test_baselines_are_ivgan_with_terms_off(iv, plain):
    runs = []
    for name, off in ((iv, dict(mu=0., lam=0., mu_e=0., lam_e=0.)), (plain, {})):
        model, x = small(name, **off)
        torch.manual_seed(3)
        for _ in range(3):
            model.step(x)
        runs.append(model.state_dict())
    assert runs[0].keys() == runs[1].keys() and all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0] if "extra" not in k)


def test_mrgan_moves_towards_what_d_calls_real():
    """D9: G and E lower -log D(G(E(x))); the authors' code has the sign reversed."""
    model, x = small("mrgan", lr=1e-4, lr_e=1e-4, lam=0., lam_e=0.)
    first = one_half(model, x, "g")
    assert set(first) == {"g_adv", "rec_x", "mode"}
    assert one_half(model, x, "g")["mode"] < first["mode"]


@pytest.mark.parametrize("name", ["wgan", "wgan-gp"])
def test_wgan_moves_g_every_fifth_step(name):
    model, x = small(name)
    for step in range(1, 11):
        before = weights(model.G)
        losses = model.step(x)
        assert moved(before, model.G) == (step % 5 == 0) and ("g_adv" in losses) == (step % 5 == 0)
    clipped = max(p.abs().max().item() for p in model.D.parameters()) <= .01
    assert clipped == (name == "wgan") and ("d_gp" in losses) == (name == "wgan-gp")


def test_e_steps_counts_updates():
    model, x = small(e_steps=10)
    model.step(x)
    assert {n: next(iter(o.state.values()))["step"].item() for n, o in model.optimisers.items()} == {"D": 1, "G": 1, "E": 10}


def test_instance_noise_follows_its_schedule():
    model, _ = small()
    model.config.noise, model.config.steps = 1., 400
    x, seen = torch.zeros(64, 1, 32, 32), []
    for epoch in (0, 49, 50, 99, 100, 199, 200, 399):               # the authors' epochs, of 400
        model.iteration = epoch
        seen.append(round(model.noisy(x).std().item(), 3))
    assert seen == [.05, .05, .01, .01, .001, .001, 0., 0.]


def test_ema_averages_g_and_is_what_samples():
    model, x = small(ema=.5)
    start, z = weights(model.G), torch.randn(4, 8)
    model.step(x)
    for mean, a, b in zip(model.average.parameters(), start, model.G.parameters()):
        torch.testing.assert_close(mean, (a + b) / 2)
    model.average.eval()
    assert torch.equal(model.decode(z), model.average(z))


def test_inference_has_no_side_effects():
    model, x = small()
    model.step(x)
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    z = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([model.decode(z[i:i + 1]) for i in range(3)])
    torch.testing.assert_close(model.decode(z), alone, atol=1e-5, rtol=1e-4)    # no image depends on its neighbours
    assert model.encode(x).shape == (8, 8) and torch.equal(rng, torch.get_rng_state()) and model.sample(5).shape[0] == 5
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items() if "extra" not in k) and model.G.training
    with pytest.raises(ValueError, match="dcgan has no encoder"):
        small("dcgan")[0].encode(x)


def test_presets_are_the_papers():
    c = ivgen.preset("ivlsgan", "cifar10")
    assert (c.size, c.width, c.latent, c.batch, c.epochs, c.steps) == (64, 64, 100, 64, 400, 0)
    assert (c.k, c.lam, c.mu, c.lam_e, c.mu_e, c.lr, c.lr_e, c.beta1, c.beta2) == (4, .25, .5, 1, 1, 1e-4, 5e-3, .5, .999)
    assert [ivgen.preset(m, "mnist").base for m in ivgen.MODELS] == ["dcgan", "lsgan", "wgan", "wgan-gp", "dcgan", "dcgan", "lsgan"]
    assert ivgen.preset("ivlsgan", "stacked-mnist").steps == 100_000


def test_flags_scale_a_weights_companion():
    flags = dict.fromkeys(f.name for f in dataclasses.fields(ivgen.Config)) | {"dataset": "cifar10", "lr": 2e-4, "mu": 0.}
    c = ivgen.settings(flags, None, ivgen.preset)
    assert (c.lr, round(c.lr_e, 9), c.mu, c.mu_e, c.lam_e) == (2e-4, 1e-2, 0, 0, 1)


# ======================================================================================================================
# Runs: what every command line promises
# ======================================================================================================================


def folder_of_pictures(path, n=96, size=32):
    """n unlabelled pictures of random blobs: a data set that needs no classifier, so a run of it takes a second."""
    path.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(n):
        coarse = torch.rand(1, 3, 4, 4, generator=generator)
        torchvision.utils.save_image(F.interpolate(coarse, (size, size), mode="bilinear"), path / f"{i:03d}.png")
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return folder_of_pictures(tmp_path_factory.mktemp("pictures") / "blobs")


def cli(module, *args):
    """(exit code) of a command line, in this process."""
    return module.run_cli(lambda: module.main([str(a) for a in args]))


def quick(pictures, tmp_path, *more):
    """Flags of a run of a few seconds."""
    return ("--dataset", pictures, "--root", tmp_path / "root", "--size", 32, "--width", 4, "--latent", 8, "--batch", 16,
            "--samples", 50, "--device", "cpu", "--amp", "off", *more)


def final_weights(run):
    return torch.load(run / "last.pt", weights_only=True)["weights"]


def test_a_run_leaves_what_it_promises(pictures, tmp_path):
    run = tmp_path / "run"
    assert cli(ivgen, *quick(pictures, tmp_path, "--steps", 6, "--eval-every", 3, "--out", run)) == 0
    config = json.loads((run / "config.json").read_text())
    assert config["model"] == "ivlsgan" and config["k"] == 4 and {"command", "torch", "device", "revision"} <= set(config)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert {"d_adv", "f_ce", "g_adv", "rec_x", "rec_z", "iv", "img_per_s", "epoch"} <= set(lines[1])
    assert [line["step"] for line in lines if "protocol" in line] == [3, 6] and "mse" in lines[-1]
    assert not any("fid" in line for line in lines)                 # no Inception weights here, so no such number
    for name in ("samples/000003.png", "samples/000006.png", "recon/000006.png", "figures/interventions-000006.png",
                 "figures/real.png", "last.pt", "best.pt"):
        assert (run / name).stat().st_size > 0
    assert not list(run.glob("*.tmp"))
    state = torch.load(run / "last.pt", weights_only=True)          # plain data only
    assert state["step"] == 6 and state["model"] == "ivlsgan" and state["file"] == "ivgen"
    assert cli(ivgen, *quick(pictures, tmp_path, "--steps", 2, "--out", run)) == 0
    assert torch.load(tmp_path / "run.1" / "last.pt", weights_only=True)["step"] == 6      # moved aside, not overwritten


def test_a_killed_run_resumes_bit_for_bit(pictures, tmp_path):
    """SIGKILL at a step of no importance, and again after resuming: the end is that of a run never stopped."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = quick(pictures, tmp_path, "--steps", 24, "--eval-every", 8, "--ema", .9)
    assert cli(ivgen, *flags, "--out", whole) == 0
    script = ("import sys, os, signal, torch, ivgen; at = int(sys.argv.pop(1)); torch.set_num_threads(int(sys.argv.pop(1)))\n"
              "add = ivgen.Run.add\n"
              "def kill(self, step, losses):\n"
              "    add(self, step, losses)\n"
              "    if step == at: os.kill(os.getpid(), signal.SIGKILL)\n"
              "ivgen.Run.add = kill\n"
              "sys.exit(ivgen.run_cli(ivgen.main))")
    for at, how in ((5, (*flags, "--out", killed)), (19, ("--resume", killed, "--device", "cpu"))):
        done = subprocess.run([sys.executable, "-c", script, str(at), str(torch.get_num_threads()), *map(str, how)], cwd=HERE)
        assert done.returncode == -signal.SIGKILL
    with open(killed / "log.jsonl", "a") as log:
        log.write('{"step": 1')                                     # a line torn by the kill
    assert cli(ivgen, "--resume", killed, "--device", "cpu") == 0
    a, b = (torch.load(run / "last.pt", weights_only=True) for run in (whole, killed))
    assert a["step"] == b["step"] == 24 and a["best"] == b["best"]
    for key, value in a["weights"].items():
        assert torch.equal(value, b["weights"][key]) if torch.is_tensor(value) else value == b["weights"][key], key
    for name in a["optimisers"]:
        for n, slot in a["optimisers"][name]["state"].items():
            assert all(torch.equal(v, b["optimisers"][name]["state"][n][k]) for k, v in slot.items())
    timeless = lambda run: [{k: v for k, v in json.loads(line).items() if k not in ("img_per_s", "eval_s", "eval_seconds")}
                            for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line for line in timeless(whole) if "protocol" in line] == [line for line in timeless(killed) if "protocol" in line]


def test_sigterm_saves_and_leaves(pictures, tmp_path, monkeypatch, capsys):
    run, add = tmp_path / "run", ivgen.Run.add
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def stop(self, step, losses):
        add(self, step, losses)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ivgen.Run, "add", stop)
    try:
        assert cli(ivgen, *quick(pictures, tmp_path, "--steps", 9, "--out", run)) == 128 + signal.SIGTERM
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert torch.load(run / "last.pt", weights_only=True)["step"] == 4 and "--resume" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run(pictures, tmp_path, monkeypatch, capsys):
    run, step = tmp_path / "run", ivgen.IVGAN.step

    def bad(self, x):
        losses = step(self, x)
        return losses | {"rec_x": losses["rec_x"] * float("nan")} if self.iteration == 7 else losses

    monkeypatch.setattr(ivgen.IVGAN, "step", bad)
    assert cli(ivgen, *quick(pictures, tmp_path, "--steps", 20, "--eval-every", 5, "--out", run)) == 3
    err = capsys.readouterr().err
    assert "step 7" in err and "'rec_x' is nan" in err and "Traceback" not in err
    assert torch.load(run / "last.pt", weights_only=True)["step"] == 5


def test_sample_and_bench(pictures, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli(ivgen, *quick(pictures, tmp_path, "--steps", 2, "--out", run)) == 0
    log = (run / "log.jsonl").read_text()
    assert cli(ivgen, "--resume", run, "--sample", 7, "--device", "cpu") == 0
    assert len(list((run / "drawn").glob("*.png"))) == 7 and (run / "drawn.png").exists()
    assert (run / "log.jsonl").read_text() == log
    capsys.readouterr()
    assert cli(ivgen, "--bench", 2, "--width", 4, "--size", 32, "--batch", 4, "--device", "cpu") == 0
    timed = json.loads(capsys.readouterr().out)
    assert min(timed[k] for k in ("images_per_s", "gflop_per_step", "tflop_per_s", "peak_memory_mib")) > 0


def test_two_processes_train_one_model(pictures, tmp_path):
    """torchrun: the ranks see different images, average gradients, and one of them writes."""
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone",
         HERE / "ivgen.py", *map(str, quick(pictures, tmp_path, "--steps", 4, "--eval-every", 4, "--out", run))],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=HERE)
    assert done.returncode == 0, done.stderr[-2000:]
    state = torch.load(run / "last.pt", weights_only=True)
    assert state["step"] == 4 and len(state["rng"]) == 2 and not torch.equal(state["rng"][0][0], state["rng"][1][0])
    assert json.loads((run / "config.json").read_text())["world"] == 2


BAD_FLAGS = {
    "k does not divide d": (["--k", "7"], "--k 7 does not divide the latent dimension 100"),
    "unknown model": (["--model", "vqgan"], "--model vqgan is not one of dcgan"),
    "unknown flag": (["--learning-rate", "1"], "unrecognized arguments: --learning-rate"),
    "flag of another kind": (["--steps", "many"], "invalid int value: 'many'"),
    "size not a power of two": (["--size", "48"], "--size 48 is not a power of two"),
    "sample without a run": (["--sample", "4"], "--sample needs --resume"),
    "no such run": (["--resume", "/nowhere/run"], "there is no checkpoint"),
    "unknown device": (["--device", "abacus"], "--device abacus"),
    "not a number": (["--mu", "nan"], "--mu nan must be a number"),
    "unknown dataset": (["--dataset", "minst"], "mnist"),
    "no such folder": (["--dataset", "/nowhere/pictures"], "/nowhere/pictures"),
    "points": (["--dataset", "grid25"], "needs images"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_end_in_one_sentence(case, capsys, tmp_path):
    flags, sentence = BAD_FLAGS[case]
    assert cli(ivgen, *flags, "--out", tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_that_is_absent_is_an_error(capsys):
    assert cli(ivgen, "--device", "cuda") == 2
    assert "no usable CUDA device" in capsys.readouterr().err


class Evil:
    def __reduce__(self):
        return print, ("code in a pickle was run",)


def test_bad_folders_and_checkpoints_end_in_one_sentence(pictures, tmp_path, capsys, monkeypatch):
    def ends(sentence, *flags):
        assert cli(ivgen, *flags) == 2
        captured = capsys.readouterr()
        err = captured.err.splitlines()[-1]
        assert sentence in err and "Traceback" not in captured.err and "was run" not in captured.out, captured.err

    flags = quick(pictures, tmp_path, "--steps", 2)
    (tmp_path / "empty").mkdir()
    ends("empty", "--dataset", tmp_path / "empty", "--root", tmp_path / "root")
    broken = folder_of_pictures(tmp_path / "broken", n=3)
    (broken / "001.png").write_bytes((broken / "001.png").read_bytes()[:60])
    ends("001.png", "--dataset", broken, "--root", tmp_path / "root", "--size", 32)
    tiny = folder_of_pictures(tmp_path / "tiny", n=3, size=4)
    ends("000.png", "--dataset", tiny, "--root", tmp_path / "root", "--size", 32)
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    ends("mnist", "--dataset", "mnist", "--root", tmp_path / "nothing")
    (tmp_path / "file").write_text("in the way")
    ends("cannot write", *flags, "--out", tmp_path / "file" / "run")

    run = tmp_path / "run"
    assert cli(ivgen, *flags, "--out", run) == 0
    capsys.readouterr()
    ends("model ivlsgan, not dcgan", "--resume", run, "--model", "dcgan")
    ends("width 4, not 8", "--resume", run, "--width", 8)
    whole = (run / "last.pt").read_bytes()
    (run / "last.pt").write_bytes(whole[:len(whole) // 2])
    ends("damaged or truncated", "--resume", run)
    torch.save(Evil(), run / "last.pt")
    ends("refused", "--resume", run)
    torch.save({"weights": {}}, run / "last.pt")
    ends("not a checkpoint of ivgen.py", "--resume", run)
    state = torch.load(io.BytesIO(whole), weights_only=True)
    torch.save(state | {"file": "aim"}, run / "last.pt")
    ends("written by aim.py", "--resume", run)
    torch.save(state | {"config": state["config"] | {"width": 8}}, run / "last.pt")
    ends("another shape", "--resume", run)


# ======================================================================================================================
# The house
# ======================================================================================================================


PAPERS = [name for name in ("ivgen", "aim", "latentmap") if (HERE / f"{name}.py").exists()]


def test_plumbing_is_the_same_text_in_every_paper_file():
    def plumbing(name):
        text = (HERE / f"{name}.py").read_text()
        return text[text.index("# Plumbing: "):text.index("# End of the plumbing")]

    assert len({plumbing(name) for name in PAPERS}) == 1 and len(plumbing("ivgen")) > 5000


@pytest.mark.parametrize("name", [*PAPERS, "metrics", "data"])
def test_each_file_imports_alone(name, tmp_path):
    """Copying is a feature: the file in an empty folder, with nothing of this repository beside it."""
    (tmp_path / f"{name}.py").write_text((HERE / f"{name}.py").read_text())
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = ['.']; import {name}; print({name}.__file__)"],
                          cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0 and str(tmp_path) in done.stdout, done.stderr
