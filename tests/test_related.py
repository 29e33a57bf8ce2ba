"""The scripts of related/ against their papers: terms in closed form, and iterations against numpy: of train() with
its defaults, and with all of them changed. And the runs of all eight"""
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import common
import wgan
import wgan_gp
from related import ctgan, dragan, ls_gan, semi_supervised, sngan, text2image
from related.ctgan import consistency
from related.dragan import perturb
from related.ls_gan import margin
from related.sngan import SpectralConv2d, normalize
from truth import (Adam, Drawn, LinearGenerator, QuadraticCritic, assert_left, assert_same, described, parameter,
                   read, training)

image, by_theta = LinearGenerator.image, LinearGenerator.by_theta
score, by_w, by_x = QuadraticCritic.score, QuadraticCritic.by_w, QuadraticCritic.by_x


# ---- The networks ----

def test_the_networks_are_those_of_wgan_and_wgan_gp():
    convolution = [*described(wgan_gp.Critic(3, 32, 16))[:-3], "64-1 k4 s1 p0+bias", "Flatten"]
    D = sngan.Discriminator(3, 32, 16)
    assert described(D) == convolution and D(torch.zeros(2, 3, 32, 32)).shape == (2,)
    assert {script.Generator for script in (sngan, dragan, ctgan)} == {wgan_gp.Generator}
    assert dragan.Discriminator is wgan_gp.Critic
    assert (ls_gan.Generator, ls_gan.Discriminator) == (wgan.Generator, wgan.Critic)


# ---- SNGAN ----

def test_three_steps_of_the_power_method():
    W, u = torch.tensor([[3.0, 0], [0, 1]]), torch.ones(2) / 2**0.5
    for sigma in 82 / 820**0.5, 2.99817, 2.99998:
        W_bar, u = normalize(W, u)
        torch.testing.assert_close(W_bar * sigma, W, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normalize(W, torch.ones(2))[1], torch.tensor([9.0, 1]) / 82**0.5)     # v first


class SpectralCritic(nn.Sequential):
    """D(x) = W̄₂ (W̄₁ x + b₁) + b₂ on images of 2x2 pixels; w: W₁ (2x4), b₁, W₂ (1x2), b₂"""
    start = np.array([0.5, -0.2, 0.9, 0.1, 0.3, 0.8, -0.4, 0.6, 0.2, -0.1, 0.7, -0.5, 1.5])

    def __init__(self, *_):
        super().__init__(SpectralConv2d(1, 2, 2, 1, 0), SpectralConv2d(2, 1, 1, 1, 0), nn.Flatten(0))
        parts = np.split(self.start, [8, 10, 12])
        for p, values in zip(self.parameters(), parts):
            p.detach().copy_(torch.tensor(values).view(p.shape))


def one_step(W, u):
    v = W.T @ u / np.linalg.norm(W.T @ u)
    u = W @ v / np.linalg.norm(W @ v)
    return W / (u @ W @ v), u, v, u @ W @ v


@pytest.mark.parametrize("changed", [{}, dict(lr=0.02, beta1=0.2, beta2=0.8, n_dis=3, batch_size=4)])
def test_three_iterations_of_sngan_equal_numpy(monkeypatch, changed):
    drawn = Drawn(monkeypatch, sngan, Generator=LinearGenerator, Discriminator=SpectralCritic)
    G, D = sngan.train(**changed, steps=3, nz=3, device="cpu", out="run", save_every=1)

    k = dict(lr=2e-4, beta1=0.5, beta2=0.999, n_dis=1, batch_size=64) | changed
    theta, w, m = LinearGenerator.start, SpectralCritic.start, k["batch_size"]
    real, latent = drawn.real(), drawn["randn"]
    u1, u2 = next(latent), next(latent)
    opt_G, opt_D = (Adam(k["lr"], k["beta1"], k["beta2"]) for _ in range(2))
    rows, on = [], []
    for _ in range(3):
        for _ in range(k["n_dis"]):
            x, x_tilde = next(real), image(theta, next(latent))
            W1, b1, W2, b2 = np.split(w, [8, 10, 12])
            W1, W2 = W1.reshape(2, 4), W2.reshape(1, 2)
            bar1, u1, v1, s1 = one_step(W1, u1)             # u moves once for an update
            bar2, u2, v2, s2 = one_step(W2, u2)
            D_x, D_x_tilde = (((each @ bar1.T + b1) @ bar2.T)[:, 0] + b2 for each in (x, x_tilde))
            L_D = np.maximum(0, 1 - D_x) + np.maximum(0, 1 + D_x_tilde)
            by_D = np.concatenate([-1.0 * (D_x < 1), 1.0 * (D_x_tilde > -1)]) / m
            on.append((by_D != 0).mean())
            both = np.concatenate([x, x_tilde])
            g2, g1 = (by_D[:, None] * (both @ bar1.T + b1)).sum(0)[None], np.outer(bar2[0], by_D @ both)
            g1, g2 = ((g - (g * bar).sum() * np.outer(u, v)) / s       # (12)
                      for g, bar, u, v, s in ((g1, bar1, u1, v1, s1), (g2, bar2, u2, v2, s2)))
            w = opt_D.step(w, np.concatenate([g1.ravel(), bar2[0] * by_D.sum(), g2.ravel(), [by_D.sum()]]))
        z = next(latent)
        W1, b1, W2, b2 = np.split(w, [8, 10, 12])
        bar1, *_ = one_step(W1.reshape(2, 4), u1)           # and not for G's
        bar2, *_ = one_step(W2.reshape(1, 2), u2)
        D_x_tilde = ((image(theta, z) @ bar1.T + b1) @ bar2.T)[:, 0] + b2
        rows.append(dict(L_D=L_D.mean(), L_G=-D_x_tilde.mean()))
        theta = opt_G.step(theta, by_theta(np.tile(-(bar2 @ bar1)[0] / m, (m, 1)), z))
    assert_left(rows, (real, latent), rtol=2e-5, G=(G, theta, opt_G), D=(D, w, opt_D))
    for layer, u in zip(D, (u1, u2)):
        np.testing.assert_allclose(layer.u, u, 1e-5, 1e-6)
    if changed:
        assert 0 < min(on) < 1                              # the hinge is off for some images


# ---- DRAGAN ----

def test_the_noise_is_half_the_batchs_deviation_and_each_pixels_own():
    x = torch.rand(6, 1, 8, 8) * torch.arange(6).view(6, 1, 1, 1)
    torch.manual_seed(3)
    delta = perturb(x) - x
    torch.manual_seed(3)
    torch.testing.assert_close(delta, 0.5 * x.double().numpy().std() * torch.rand(6, 1, 8, 8))
    constant = torch.full((2, 1, 4, 4), 0.3)
    assert torch.equal(perturb(constant), constant)


@pytest.mark.parametrize("changed", [{}, dict(lam=3.0, k=0.6, c=2.0, lr=0.02, beta1=0.2, beta2=0.7, batch_size=4)])
def test_three_iterations_of_dragan_equal_numpy(monkeypatch, changed):
    drawn = Drawn(monkeypatch, dragan, Generator=LinearGenerator, Discriminator=QuadraticCritic)
    G, D = dragan.train(**changed, steps=3, nz=3, device="cpu", out="run", save_every=1)

    k = dict(lam=10.0, k=1.0, c=0.5, lr=1e-4, beta1=0.5, beta2=0.9, batch_size=64) | changed
    theta, w, m = LinearGenerator.start, QuadraticCritic.start, k["batch_size"]
    real, latent, uniform = drawn.real(), drawn["randn"], drawn["rand_like"]
    opt_G, opt_D = (Adam(k["lr"], k["beta1"], k["beta2"]) for _ in range(2))
    rows = []
    for _ in range(3):
        x, x_tilde = next(real), image(theta, next(latent))
        x_hat = x + k["c"] * x.std() * next(uniform).reshape(m, 4)
        grad = by_x(w, x_hat)
        length = np.sqrt((grad**2).sum(1))
        real_, fake_ = (1 / (1 + np.exp(-score(w, each))) for each in (x, x_tilde))
        L_D = -np.log(real_) - np.log(1 - fake_) + k["lam"] * (length - k["k"]) ** 2
        pull = (2 * k["lam"] * (length - k["k"]) / length)[:, None] * grad
        of_penalty = np.column_stack([pull, (pull * x_hat).sum(1)])
        w = opt_D.step(w, ((real_ - 1)[:, None] * by_w(x) + fake_[:, None] * by_w(x_tilde) + of_penalty).mean(0))
        z = next(latent)
        x_tilde = image(theta, z)
        fake_ = 1 / (1 + np.exp(-score(w, x_tilde)))
        rows.append(dict(L_D=L_D.mean(), L_G=-np.log(fake_).mean(), penalty=((length - k["k"]) ** 2).mean(),
                         norm=length.mean()))
        theta = opt_G.step(theta, by_theta((fake_ - 1)[:, None] * by_x(w, x_tilde) / m, z))

    assert_left(rows, (real, latent, uniform), rtol=1e-5, G=(G, theta, opt_G), D=(D, w, opt_D))


# ---- CT-GAN ----

def test_consistency_in_closed_form():
    one, f = torch.ones(5), torch.randn(5, 3, 2, 2)
    for further, m_prime, expected in ((0, 0.0, 1), (1, 0.0, 1.1), (1, 0.5, 0.6), (1, 2.0, 0)):
        for a, b in ((one, 0 * one), (0 * one, one)):       # either pass may be the first
            torch.testing.assert_close(consistency(a, b, f, f + further, m_prime), expected * one)
    assert not consistency(one, one, f, f, 0.0).any()
    each = torch.arange(5.0)
    torch.testing.assert_close(consistency(each, 0 * each, f, f, 0.0), each**2)      # image by image


def test_ctgans_critic_drops_after_every_layer_but_the_last_and_ends_linear():
    D, x = ctgan.Critic(3, 32, 16), torch.rand(4, 3, 32, 32)
    first, half = ["LeakyReLU 0.2", "Dropout 0.2"], ["LeakyReLU 0.2", "Dropout 0.5"]
    assert described(D[0]) == ["3-16 k4 s2 p1+bias", *first, "16-32 k4 s2 p1+bias", *half,
                               "32-64 k4 s2 p1+bias", *half]
    assert described(D[1]) == ["Flatten", "Linear 1024-1+bias", "Flatten"]
    assert D(x).shape == (4,) and not torch.equal(D(x), D(x)) and torch.equal(D.eval()(x), D(x))


class DroppedCritic(nn.Module):
    """D₋(x) = d ∘ e ∘ x with d 0 or 2, D(x) = <a, D₋(x)> + s/2 ‖D₋(x)‖²; w: e, a and s"""
    start = np.array([0.7, -0.4, 0.9, 0.5, 0.4, -0.3, 0.2, 0.6, 0.8])

    def __init__(self, *_):
        super().__init__()
        self.e, self.a, self.s = (parameter(self.start[part]) for part in (slice(4), slice(4, 8), 8))

    def __getitem__(self, i):
        def features(x):
            drop = 2.0 * (torch.rand(len(x), 4) < 0.5) if self.training else 1
            return drop * self.e * x.flatten(1)

        def score(f):
            return f @ self.a + self.s / 2 * f.square().sum(1)
        return [features, score][i]

    def forward(self, x):
        return self[1](self[0](x))


def passed(w, x, uniform):
    """One pass in numpy: d, D₋(x), D(x), dD/dD₋ and dD/dw of every image"""
    d = 2 * (uniform < 0.5)
    f = d * w[:4] * x
    q = w[4:8] + w[8] * f
    return d, f, f @ w[4:8] + w[8] / 2 * (f**2).sum(1), q, np.column_stack([q * d * x, f, (f**2).sum(1) / 2])


@pytest.mark.parametrize("changed", [{}, dict(lam1=3.0, lam2=5.0, m_prime=0.4, lr=0.02, beta1=0.2, beta2=0.7,
                                              n_critic=3, batch_size=8)])
def test_two_iterations_of_ctgan_equal_numpy(monkeypatch, changed):
    drawn = Drawn(monkeypatch, ctgan, Generator=LinearGenerator, Critic=DroppedCritic)
    G, D = ctgan.train(**changed, steps=2, nz=3, device="cpu", out="run", save_every=1)

    k = dict(lam1=10.0, lam2=2.0, m_prime=0.0, lr=2e-4, beta1=0.0, beta2=0.9, n_critic=5, batch_size=50) | changed
    theta, w, m = LinearGenerator.start, DroppedCritic.start, k["batch_size"]
    real, latent, uniform = drawn.real(), drawn["randn"], drawn["rand"]
    opt_G, opt_D = (Adam(k["lr"], k["beta1"], k["beta2"]) for _ in range(2))
    rows, free = [], []
    for _ in range(2):
        for _ in range(k["n_critic"]):
            x, x_tilde, eps = next(real), image(theta, next(latent)), next(uniform).reshape(m, 1)
            x_hat = eps * x + (1 - eps) * x_tilde
            d, f, _, q, _ = passed(w, x_hat, next(uniform))
            grad = q * d * w[:4]
            length = np.maximum(np.sqrt((grad**2).sum(1)), 1e-300)          # 0 if all four are dropped
            pull = (2 * k["lam1"] * (length - 1) / length)[:, None] * grad
            of_penalty = np.column_stack([pull * (q + w[8] * f) * d, pull * d * w[:4],
                                          (pull * d * w[:4] * f).sum(1)])
            (d1, f1, D1, _, D1_by_w), (d2, f2, D2, _, D2_by_w) = (passed(w, x, next(uniform)) for _ in range(2))
            raw = (D1 - D2) ** 2 + 0.1 * ((f1 - f2) ** 2).mean(1)
            CT = np.maximum(0, raw - k["m_prime"])
            free.append(((raw > 0) & (CT == 0)).mean())
            of_CT = 2 * (D1 - D2)[:, None] * (D1_by_w - D2_by_w)
            of_CT[:, :4] += 0.1 * 2 / 4 * (f1 - f2) * (d1 - d2) * x
            _, _, fake, _, fake_by_w = passed(w, x_tilde, next(uniform))
            L = fake - D1 + k["lam1"] * (length - 1) ** 2 + k["lam2"] * CT
            w = opt_D.step(w, (fake_by_w - D1_by_w + of_penalty + k["lam2"] * (CT > 0)[:, None] * of_CT).mean(0))
        z = next(latent)
        d, _, D_x_tilde, q, _ = passed(w, image(theta, z), next(uniform))
        rows.append(dict(wasserstein=(D1 - fake).mean(), L_D=L.mean(), L_G=-D_x_tilde.mean(),
                         GP=((length - 1) ** 2).mean(), CT=CT.mean()))
        theta = opt_G.step(theta, by_theta(-q * d * w[:4] / m, z))

    if changed:
        assert 0 < max(free) < 1                            # M′ lets some go free
    assert_left(rows, (real, latent, uniform), rtol=1e-5, G=(G, theta, opt_G), D=(D, w, opt_D))


def test_examples_are_the_first_so_many(monkeypatch):
    drawn = Drawn(monkeypatch, ctgan, Generator=LinearGenerator, Critic=DroppedCritic)
    ctgan.train(examples=10, steps=1, nz=3, device="cpu", out="run")
    assert max(index.max() for index in drawn["randint"]) == 9 and read("run")["config"]["images"] == 10


# ---- LS-GAN ----

def test_the_margin_is_tau_times_the_sum_of_all_differences_of_all_pairs():
    for shape, expected in (((1, 28, 28), 0.3136), ((1, 32, 32), 0.4096), ((3, 64, 64), 4.9152)):
        one = torch.ones(2, *shape)
        torch.testing.assert_close(margin(one, -one, 2e-4), torch.full((2, 2), expected))
    x, x_tilde = torch.randn(3, 1, 4, 4), torch.randn(5, 1, 4, 4)
    pairs = torch.tensor([[0.1 * (a - b).abs().sum() for b in x_tilde] for a in x])
    torch.testing.assert_close(margin(x, x_tilde, 0.1), pairs)
    assert not margin(x, x, 0.1).diagonal().any()


@pytest.mark.parametrize("changed", [{}, dict(lam=3.0, real_weight=0.5, tau=0.6, slope=0.2, c=0.5, weight_decay=0.3,
                                              lr=0.02, beta1=0.2, beta2=0.7, batch_size=4)])
def test_three_iterations_of_ls_gan_equal_numpy(monkeypatch, changed):
    drawn = Drawn(monkeypatch, ls_gan, Generator=LinearGenerator, Discriminator=QuadraticCritic)
    G, D = ls_gan.train(**changed, steps=3, nz=3, device="cpu", out="run", save_every=1)

    k = dict(lam=2.0, real_weight=1.0, tau=2.4576, slope=0.0, c=0.08, weight_decay=0.0, lr=1e-4, beta1=0.5,
             beta2=0.999, batch_size=64) | changed
    theta, w, m = LinearGenerator.start, QuadraticCritic.start, k["batch_size"]
    real, latent = drawn.real(), drawn["randn"]
    opt_G, opt_D = (Adam(k["lr"], k["beta1"], k["beta2"], k["weight_decay"]) for _ in range(2))
    rows, on, clipped = [], [], 0
    for _ in range(3):
        x, x_tilde = next(real), image(theta, next(latent))
        a = k["tau"] * abs(x[:, None] - x_tilde).mean(2) + score(w, x)[:, None] - score(w, x_tilde)     # all pairs
        hinge, slopes = np.where(a > 0, a, k["slope"] * a), np.where(a > 0, 1, k["slope"])[..., None]
        on.append((a > 0).mean())
        L_x = score(w, x).mean()
        L_D = k["real_weight"] * L_x + k["lam"] * hinge.mean()
        g = k["lam"] * (slopes * by_w(x)[:, None] - slopes * by_w(x_tilde)).mean((0, 1))
        w = opt_D.step(w, g + k["real_weight"] * by_w(x).mean(0))
        clipped += (abs(w) > k["c"]).sum()
        w = np.clip(w, -k["c"], k["c"])
        z = next(latent)
        x_tilde = image(theta, z)
        rows.append(dict(L_D=L_D, L_G=score(w, x_tilde).mean(), hinge=hinge.mean(), real=L_x))
        theta = opt_G.step(theta, by_theta(by_x(w, x_tilde) / m, z))

    assert clipped
    if changed:
        assert 0 < min(on) < 1
    assert_left(rows, (real, latent), rtol=1e-5, G=(G, theta, opt_G), D=(D, w, opt_D))


# ---- The runs of all eight ----

RUNS = {
    **dict.fromkeys(["sngan", "dragan", "ctgan", "ls_gan", "improved_gan"],
                    "--digit 7 --size 16 --width 2 --nz 8 --batch-size 8"),
    "semi_supervised": "--width 2 --nz 8 --batch-size 8 --labels 10",
    "text2image": "--width 1 --batch-size 4 --pretrain 4",
    "srgan": "--blocks 1 --width 2 --crop 16 --batch-size 4 --held-out 5 --pretrain 4"}
GRAPHS = [name for name in RUNS if name not in ("text2image", "srgan")]


def main(name, words):
    """The command line of a script, in this process"""
    script, words = importlib.import_module(f"related.{name}"), f"{RUNS[name]} --save-every 3 {words}".split()
    if name in GRAPHS:
        script.main(script.train, script.generate, words)
    else:
        script.main(words)


@pytest.fixture
def few(monkeypatch):
    """Every data set is its first 2,000 images"""
    read = common.load_set
    cut = lambda *settings, **named: tuple(part[:2000] for part in read(*settings, **named))    # noqa: E731
    for script in common, semi_supervised, text2image:
        monkeypatch.setattr(script, "load_set", cut)


def assert_shows(file, x):
    """The first image in the file is the first of x, (m, 1, H, W), to a rounding"""
    pixels = np.asarray(Image.open(file).convert("L"), dtype=float)[:x.shape[2], :x.shape[3]]
    np.testing.assert_allclose(pixels, (x[0, 0] + 1) * 127.5, atol=1)


@pytest.mark.parametrize("name", RUNS)
def test_three_steps_and_three_steps_are_six_steps_which_generate(name, few):
    for steps, out in ((6, "whole"), (3, "parts"), (6, "parts")):
        main(name, f"--steps {steps} --out {out} --device cpu")
    assert_same(training("parts"), training("whole"))
    assert Path("parts/000003.png").exists() and Path("parts/training.gif").exists()
    with pytest.raises(SystemExit, match="^0$"):
        main(name, "--help")
    if name in GRAPHS:
        main(name, "--generate 2 --seed 5 --out parts --device cpu")
        G = importlib.import_module(f"related.{name}").load("parts/checkpoint.pt")
        noise = torch.Generator().manual_seed(5)
        assert_shows("parts/generated/5-000000.png", G(torch.randn(1, 8, generator=noise)))
        assert_shows("parts/generated/5-000001.png", G(torch.randn(1, 8, generator=noise)))
        assert_shows("parts/000006.png", G(torch.randn(64, 8, generator=torch.Generator().manual_seed(0))))


@pytest.mark.cuda
@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_equals_eager_steps(name, few, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)        # so that they can be compared closely
    main(name, "--steps 9 --out eager --device cuda")
    main(name, "--steps 9 --out graph --device cuda --graph")
    for part in "G", "D":
        torch.testing.assert_close(read("eager")[part], read("graph")[part], rtol=1e-4, atol=1e-5)
