"""The scripts of related/ against their papers: terms in closed form, and iterations against numpy, of train() with
its defaults and with all of them changed.  And the runs of all eight"""
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from torchvision.transforms import functional as TF

import common
import lsgan
import wgan_gp
from related import ctgan, dragan, improved_gan, ls_gan, semi_supervised, sngan, srgan, text2image
from related.text2image import caption, encode, looks
from truth import (Adam, Drawn, LinearGenerator, QuadraticCritic, assert_left, assert_same, described, flat,
                   parameter, read, training)

image, by_theta, score = LinearGenerator.image, LinearGenerator.by_theta, QuadraticCritic.score
by_w, by_x = QuadraticCritic.by_w, QuadraticCritic.by_x
OPTIMIZER = dict(lr=0.02, beta1=0.2, beta2=0.7)
sigmoid = lambda s: 1 / (1 + np.exp(-s))    # noqa: E731


def trained(monkeypatch, script, k, changed, steps=3, **networks):
    """Steps of train() by tiny networks -> G, D, what was drawn, all settings, optimizers"""
    drawn = Drawn(monkeypatch, script, Generator=LinearGenerator, **networks)
    G, D = script.train(**changed, steps=steps, nz=3, device="cpu", out="run", save_every=1)
    k = k | changed
    return G, D, drawn, k, *(Adam(k["lr"], k["beta1"], k["beta2"], k.get("weight_decay", 0)) for _ in range(2))


def assert_three_equal_numpy(monkeypatch, script, k, changed, of_D,
                             of_G=lambda k, s: (-np.log(sigmoid(s)), sigmoid(s) - 1), clip=lambda k, w: w):
    """of_D: settings, w, x, x_tilde, noise -> row of the log, gradient;  of_G: settings, D(G(z)) -> L_G, L_G′"""
    G, D, drawn, k, opt_G, opt_D = trained(monkeypatch, script, k, changed, Discriminator=QuadraticCritic)
    theta, w, rows = LinearGenerator.start, QuadraticCritic.start, []
    real, latent, uniform = drawn.real(), drawn["randn"], drawn["rand_like"]
    for _ in range(3):
        row, g = of_D(k, w, next(real), image(theta, next(latent)), uniform)
        w = clip(k, opt_D.step(w, g))
        z = next(latent)
        x_tilde = image(theta, z)
        L_G, by_s = of_G(k, score(w, x_tilde))
        rows.append(dict(row, L_G=L_G.mean()))
        theta = opt_G.step(theta, by_theta(by_s[:, None] * by_x(w, x_tilde) / k["batch_size"], z))
    assert_left(rows, (real, latent, uniform), G=(G, theta, opt_G), D=(D, w, opt_D))


class SpectralCritic(nn.Sequential):
    """D(x) = W̄₂ (W̄₁ x + b₁) + b₂ on images of 2x2 pixels; w: b₁, W₁ (2x4), b₂, W₂ (1x2)"""
    start = np.array([0.2, -0.1, 0.5, -0.2, 0.9, 0.1, 0.3, 0.8, -0.4, 0.6, 1.5, 0.7, -0.5])

    def __init__(self, *_):
        super().__init__(nn.Conv2d(1, 2, 2), nn.Conv2d(2, 1, 1), nn.Flatten(0))
        for layer in list(self)[:2]:
            register_parametrization(layer, "weight", sngan.SpectralNorm(len(layer.weight)), unsafe=True)
        nn.utils.vector_to_parameters(torch.tensor(self.start).float(), self.parameters())


def one_step(W, u):
    v = W.T @ u / np.linalg.norm(W.T @ u)
    u = W @ v / np.linalg.norm(W @ v)
    return W / (u @ W @ v), u, v, u @ W @ v


@pytest.mark.parametrize("changed", [{}, OPTIMIZER | dict(n_dis=3, batch_size=4)])
def test_three_iterations_of_sngan_equal_numpy(monkeypatch, changed):
    G, D, drawn, k, opt_G, opt_D = trained(monkeypatch, sngan, dict(
        lr=2e-4, beta1=0.5, beta2=0.999, n_dis=1, batch_size=64), changed, Discriminator=SpectralCritic)
    theta, w, rows, real, latent = LinearGenerator.start, SpectralCritic.start, [], drawn.real(), drawn["randn"]
    u1, u2 = next(latent), next(latent)
    for _ in range(3):
        for _ in range(k["n_dis"]):
            x, x_tilde = next(real), image(theta, next(latent))
            b1, W1, b2, W2 = np.split(w, [2, 10, 11])
            bar1, u1, v1, s1 = one_step(W1.reshape(2, 4), u1)               # u moves once for an update
            bar2, u2, v2, s2 = one_step(W2.reshape(1, 2), u2)
            D_x, D_x_tilde = (((each @ bar1.T + b1) @ bar2.T)[:, 0] + b2 for each in (x, x_tilde))
            L_D = np.maximum(0, 1 - D_x) + np.maximum(0, 1 + D_x_tilde)
            by_D = np.concatenate([-1.0 * (D_x < 1), 1.0 * (D_x_tilde > -1)]) / len(x)
            both = np.concatenate([x, x_tilde])
            g2, g1 = (by_D[:, None] * (both @ bar1.T + b1)).sum(0)[None], np.outer(bar2[0], by_D @ both)
            g1, g2 = ((g - (g * bar).sum() * np.outer(u, v)) / s            # (12)
                      for g, bar, u, v, s in ((g1, bar1, u1, v1, s1), (g2, bar2, u2, v2, s2)))
            w = opt_D.step(w, np.concatenate([bar2[0] * by_D.sum(), g1.ravel(), [by_D.sum()], g2.ravel()]))
        z = next(latent)
        b1, W1, b2, W2 = np.split(w, [2, 10, 11])
        (bar1, *_), (bar2, *_) = one_step(W1.reshape(2, 4), u1), one_step(W2.reshape(1, 2), u2)     # not for G's
        rows.append(dict(L_D=L_D.mean(), L_G=-(((image(theta, z) @ bar1.T + b1) @ bar2.T)[:, 0] + b2).mean()))
        theta = opt_G.step(theta, by_theta(np.tile(-(bar2 @ bar1)[0] / k["batch_size"], (len(z), 1)), z))
    assert_left(rows, (real, latent), rtol=2e-5, G=(G, theta, opt_G), D=(D, w, opt_D))
    np.testing.assert_allclose(flat(D.buffers()), [*u1, *u2], 1e-5, 1e-6)


@pytest.mark.parametrize("changed", [{}, OPTIMIZER | dict(lam=3.0, k=0.6, c=2.0, batch_size=4)])
def test_three_iterations_of_dragan_equal_numpy(monkeypatch, changed):
    def of_D(k, w, x, x_tilde, uniform):
        x_hat = x + k["c"] * x.std() * next(uniform).reshape(len(x), 4)
        grad = by_x(w, x_hat)
        length = np.sqrt((grad**2).sum(1))
        D_x, D_x_tilde = sigmoid(score(w, x)), sigmoid(score(w, x_tilde))
        L_D = -np.log(D_x) - np.log(1 - D_x_tilde) + k["lam"] * (length - k["k"]) ** 2
        pull = (2 * k["lam"] * (length - k["k"]) / length)[:, None] * grad
        g = np.column_stack([pull, (pull * x_hat).sum(1)])
        g = g + (D_x - 1)[:, None] * by_w(x) + D_x_tilde[:, None] * by_w(x_tilde)
        return dict(L_D=L_D.mean(), penalty=((length - k["k"]) ** 2).mean(), norm=length.mean()), g.mean(0)
    assert_three_equal_numpy(monkeypatch, dragan, dict(
        lam=10.0, k=1.0, c=0.5, lr=1e-4, beta1=0.5, beta2=0.9, batch_size=64), changed, of_D)


class DroppedCritic(nn.Module):
    """D₋(x) = d ∘ e ∘ x with d 0 or 2, D(x) = <a, D₋(x)> + s/2 ‖D₋(x)‖²; w: e, a and s"""
    start = np.array([0.7, -0.4, 0.9, 0.5, 0.4, -0.3, 0.2, 0.6, 0.8])

    def __init__(self, *_):
        super().__init__()
        self.e, self.a, self.s = (parameter(self.start[part]) for part in (slice(4), slice(4, 8), 8))

    def __getitem__(self, i):
        return [lambda x: 2.0 * (torch.rand(len(x), 4) < 0.5) * self.e * x.flatten(1),
                lambda f: f @ self.a + self.s / 2 * f.square().sum(1)][i]

    def forward(self, x):
        return self[1](self[0](x))


def passed(w, x, uniform):
    """One pass in numpy: d, D₋(x), D(x), dD/dD₋ and dD/dw of every image"""
    d = 2 * (uniform < 0.5)
    f = d * w[:4] * x
    q = w[4:8] + w[8] * f
    return d, f, f @ w[4:8] + w[8] / 2 * (f**2).sum(1), q, np.column_stack([q * d * x, f, (f**2).sum(1) / 2])


@pytest.mark.parametrize("changed", [{}, OPTIMIZER | dict(lam1=3.0, lam2=5.0, m_prime=0.4, n_critic=3, batch_size=8,
                                                          examples=10)])
def test_two_iterations_of_ctgan_equal_numpy(monkeypatch, changed):
    G, D, drawn, k, opt_G, opt_D = trained(monkeypatch, ctgan, dict(
        lam1=10.0, lam2=2.0, m_prime=0.0, lr=2e-4, beta1=0.0, beta2=0.9, n_critic=5, batch_size=50), changed, 2,
        Critic=DroppedCritic)
    theta, w, rows = LinearGenerator.start, D.start, []
    real, latent, uniform = drawn.real(), drawn["randn"], drawn["rand"]
    for _ in range(2):
        for _ in range(k["n_critic"]):
            x, x_tilde, eps = next(real), image(theta, next(latent)), next(uniform).reshape(-1, 1)
            x_hat = eps * x + (1 - eps) * x_tilde
            d, f, _, q, _ = passed(w, x_hat, next(uniform))
            grad = q * d * w[:4]
            length = np.maximum(np.sqrt((grad**2).sum(1)), 1e-300)          # 0 if all four are dropped
            pull = (2 * k["lam1"] * (length - 1) / length)[:, None] * grad
            g = np.column_stack([pull * (q + w[8] * f) * d, pull * d * w[:4], (pull * d * w[:4] * f).sum(1)])
            (d1, f1, D1, _, D1_by_w), (d2, f2, D2, _, D2_by_w) = (passed(w, x, next(uniform)) for _ in range(2))
            CT = np.maximum(0, (D1 - D2) ** 2 + 0.1 * ((f1 - f2) ** 2).mean(1) - k["m_prime"])
            of_CT = 2 * (D1 - D2)[:, None] * (D1_by_w - D2_by_w)
            of_CT[:, :4] += 0.1 * 2 / 4 * (f1 - f2) * (d1 - d2) * x
            _, _, fake, _, fake_by_w = passed(w, x_tilde, next(uniform))
            L = fake - D1 + k["lam1"] * (length - 1) ** 2 + k["lam2"] * CT
            w = opt_D.step(w, (fake_by_w - D1_by_w + g + k["lam2"] * (CT > 0)[:, None] * of_CT).mean(0))
        z = next(latent)
        d, _, D_x_tilde, q, _ = passed(w, image(theta, z), next(uniform))
        rows.append(dict(wasserstein=(D1 - fake).mean(), L_D=L.mean(), L_G=-D_x_tilde.mean(),
                         GP=((length - 1) ** 2).mean(), CT=CT.mean()))
        theta = opt_G.step(theta, by_theta(-q * d * w[:4] / k["batch_size"], z))
    assert_left(rows, (real, latent, uniform), G=(G, theta, opt_G), D=(D, w, opt_D))
    assert not changed or max(index.max() for index in drawn["randint"]) == 9       # examples


@pytest.mark.parametrize("changed", [{}, dict(real_weight=0.0, slope=1.0), OPTIMIZER | dict(
    lam=3.0, real_weight=0.5, tau=0.6, slope=0.2, c=0.5, weight_decay=0.3, batch_size=4)])
def test_three_iterations_of_ls_gan_equal_numpy(monkeypatch, changed):
    def L(k, s):                                            # a softplus is behind D if E[L_θ(x)] counts
        return (np.log1p(np.exp(s)), sigmoid(s)) if k["real_weight"] else (s, np.ones_like(s))
    def of_D(k, w, x, x_tilde, _):
        (L_x, by_s), (L_x_tilde, by_s_tilde) = L(k, score(w, x)), L(k, score(w, x_tilde))
        of_x, of_x_tilde = by_s[:, None] * by_w(x), by_s_tilde[:, None] * by_w(x_tilde)
        a = k["tau"] * abs(x[:, None] - x_tilde).mean(2) + L_x[:, None] - L_x_tilde         # all pairs
        hinge, slopes = np.where(a > 0, a, k["slope"] * a), np.where(a > 0, 1, k["slope"])[..., None]
        g = k["lam"] * (slopes * of_x[:, None] - slopes * of_x_tilde).mean((0, 1)) + k["real_weight"] * of_x.mean(0)
        L_D = k["real_weight"] * L_x.mean() + k["lam"] * hinge.mean()
        return dict(L_D=L_D, hinge=hinge.mean(), real=L_x.mean()), g
    assert_three_equal_numpy(monkeypatch, ls_gan, dict(
        lam=2.0, real_weight=1.0, tau=2.4576, slope=0.0, c=0.08, weight_decay=0.0, lr=1e-4, beta1=0.5, beta2=0.999,
        batch_size=64), changed, of_D, L, clip=lambda k, w: np.clip(w, -k["c"], k["c"]))


def test_minibatch_discrimination_and_virtual_batch_norm():
    layer, f = improved_gan.MinibatchDiscrimination(3, 2), torch.randn(6, 3)
    M = np.array([[f_i.numpy() @ layer.T.detach().numpy()[:, b] for b in range(2)] for f_i in f])       # (m, B, C)
    torch.testing.assert_close(layer(f), torch.tensor(np.exp(-abs(M[:, None] - M).sum(3)).sum(1) - 1))
    layer.start(f)
    nearest = (layer.distances(f) + 1000 * torch.eye(6)).amin(2)
    torch.testing.assert_close(nearest.mean(1), torch.full((2,), 2.0))
    torch.testing.assert_close(layer(f).mean(0), torch.zeros(2), rtol=0, atol=1e-6)
    norm, x = improved_gan.VirtualBatchNorm(2, 3).double(), torch.randn(3 + 4, 2, 3, 5).double() * 0.1
    x += torch.arange(7).view(7, 1, 1, 1)
    nn.init.normal_(norm.beta)
    parts = [x[:3], *(torch.cat([x[:3], x[i:i + 1]]) for i in range(3, 7))]     # the reference, and each with it
    parts = [nn.functional.batch_norm(part, None, None, norm.gamma, norm.beta, training=True) for part in parts]
    torch.testing.assert_close(norm(x), torch.cat([parts[0], *(part[3:] for part in parts[1:])]))


@pytest.mark.parametrize("changed", [{}, OPTIMIZER | dict(smooth=0.8, batch_size=4)])
def test_three_iterations_of_improved_gan_equal_numpy(monkeypatch, changed):
    def of_D(k, w, x, x_tilde, _):
        D_x, D_x_tilde = sigmoid(score(w, x)), sigmoid(score(w, x_tilde))
        L_D = -k["smooth"] * np.log(D_x) - (1 - k["smooth"]) * np.log(1 - D_x) - np.log(1 - D_x_tilde)
        g = (D_x - k["smooth"])[:, None] * by_w(x) + D_x_tilde[:, None] * by_w(x_tilde)
        return dict(L_D=L_D.mean()), g.mean(0)
    assert_three_equal_numpy(monkeypatch, improved_gan, dict(
        smooth=0.9, lr=2e-4, beta1=0.5, beta2=0.999, batch_size=64), changed | dict(kernels=0), of_D)


def test_the_critics_of_sngan_and_ctgan():
    convolutions, dropped = described(wgan_gp.Critic(3, 32, 16))[:-3], []
    assert [len(u) for u in sngan.Discriminator(3, 32, 16).buffers()] == [16, 32, 64, 1]        # every layer's
    for i, p in (0, 0.2), (2, 0.5), (4, 0.5):
        dropped += [*convolutions[i:i + 2], f"Dropout {p}"]
    assert [*map(described, ctgan.Critic(3, 32, 16))] == [dropped, ["Flatten", "Linear 1024-1+bias", "Flatten"]]
    assert ctgan.Critic(3, 32, 16)(torch.zeros(2, 3, 32, 32)).shape == (2,)


def test_with_its_techniques_and_without_them(monkeypatch):
    Drawn(monkeypatch, improved_gan, shape=(1, 16, 16))
    settings = dict(steps=1, size=16, width=2, nz=8, batch_size=8, lr=0.0, device="cpu")
    G, D = improved_gan.train(**settings, out="run")
    z, x = torch.randn(5, 8), torch.rand(6, 1, 16, 16)
    torch.testing.assert_close(G.train()(z)[3:4], G.eval()(z[3:4]))     # of its z and the reference alone
    assert D.o.T.shape == (64, 100, 5) and D.o.bias.abs().min() > 0 and D.last.weight.std() < 0.03      # started
    assert (D(x)[:3] - D.eval()(x[:3])).abs().max() > 1e-4 and G[2].n_ref == len(G.reference) == 64
    assert 0 < (G[2].gamma - 1).abs().max() < 0.1
    G, D = improved_gan.train(**settings, out="dcgan", kernels=0, vbn=False)
    assert described(G) == described(lsgan.Generator(8, 1, 16, 2)) and len(G.reference) == 0
    assert described([*D.f, D.last]) == described(lsgan.Discriminator(1, 16, 2))[:-1]


def test_losses_in_closed_form():
    zeros, y = torch.zeros(5, 10), torch.arange(5)
    low, high = (torch.full((5, 10), value) for value in (-1000.0, 1000.0))
    for l_x, l_x_tilde, expected in (
            (zeros, zeros, 0.04766 + 1.19895),                  # Z = 10, D = 10/11
            (zeros, low, np.log(11 / 10) / 2), (high, zeros, np.log(11) / 2),       # each half by itself
            (high, high, (1000 + np.log(10)) / 2), (low, low, (1000 - np.log(10)) / 2)):
        found = [loss.item() for loss in semi_supervised.losses(l_x, y, l_x, l_x_tilde)]
        assert found == pytest.approx([np.log(10), expected], rel=1e-5, abs=1e-5)
    f_x, f_x_tilde = torch.tensor([[1.0, 0, 2], [3, 0, 2]]), torch.tensor([[3.0, 4, 2], [1, 2, 2]])
    assert semi_supervised.feature_matching(f_x, f_x_tilde).item() == 3     # (0 + 3² + 0) / 3
    v, t, y = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 1])
    s = (v @ t.T).tolist()
    by_hand = sum(max(0, 1 + s[i][j] - s[i][i]) + max(0, 1 + s[j][i] - s[i][i])
                  for i in range(4) for j in range(4) if y[i] != y[j])
    assert text2image.joint_embedding(v, t, y).item() == pytest.approx(by_hand / 16, rel=1e-5)


def test_semi_supervised_networks_and_their_start():
    D, G, seen = semi_supervised.Classifier(1, 8), semi_supervised.Generator(), []
    dense = [layer for layer in [*D.modules(), *G] if isinstance(layer, semi_supervised.Dense)]
    assert [it.v.shape[0] for it in dense] == [1000, 500, 250, 250, 250, 10, 784]
    assert [it.noise for it in dense] == [0.6, 0.5, 0.5, 0.5, 0.5, 0.5, 0]
    assert [it.g.requires_grad for it in dense] == [False] * 5 + [True] * 2
    assert [it.requires_grad for it in G.parameters()] == [True, False, True] * 2 + [True] * 3         # not γ
    found = [dense[0](torch.zeros(4000, 64)).std().item(), dense[0].v.std().item()]         # ‖g v / ‖v‖‖ = 1
    assert found == pytest.approx([0.6, 0.1], rel=0.03)
    semi_supervised.start(D.eval(), x := torch.rand(40, 1, 8, 8) + 5)
    for layer in dense[:6]:
        layer.register_forward_hook(lambda layer, x, h: seen.append((layer, x[0], h.detach())))
    assert D[0](x).min() == 0 and D(x).min() < 0            # f: after its ReLU
    for layer, x, h in seen[5:]:
        by_hand = layer.g * (x @ layer.v.T) / (layer.v ** 2).sum(1) ** 0.5 + layer.b
        torch.testing.assert_close(h, by_hand, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(h.mean(0), torch.zeros_like(h[0]), rtol=0, atol=1e-4)
        torch.testing.assert_close(h.var(0, correction=0), torch.ones_like(h[0]), rtol=0, atol=1e-3)


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1) + (0.3 * torch.randn(len(x), 4) if self.training else 0))


@pytest.mark.parametrize("changed", [{}, dict(lr=0.02, beta1=0.2, beta2=0.8, ema=0.7, batch_size=7, labels=5)])
def test_three_iterations_of_semi_supervised_equal_numpy(monkeypatch, changed):
    """f(x) = A (x + 0.3 noise), l(x) = B f(x) + c;  w: A (3x4), B (10x3), c"""
    drawn = Drawn(monkeypatch, semi_supervised, Generator=LinearGenerator, Classifier=lambda *_: nn.Sequential(
        Noisy(4, 3, bias=False), nn.Linear(3, 10)))
    rng, started = np.random.default_rng(1), []
    others = torch.tensor(rng.integers(0, 256, (50, 1, 2, 2)), dtype=torch.uint8)
    y, y_others = (rng.permutation(np.repeat(range(10), [14, 12, 6, 3, 3, 3, 3, 2, 2, 2])) for _ in range(2))
    for name, it in dict(start=lambda D, x: started.extend((flat(D.parameters()), x.flatten(1))),
                         load_images=lambda *_, train: drawn.images if train else others,
                         load_set=lambda *_, train: (0, torch.tensor(y if train else y_others))).items():
        monkeypatch.setattr(semi_supervised, name, it)
    G, D_ema = semi_supervised.train(**changed, steps=3, nz=3, device="cpu", out="run", save_every=1)
    k = dict(lr=1e-3, beta1=0.5, beta2=0.999, ema=0.9999, batch_size=100, labels=100) | changed
    theta, (w, x_500), m, rows, past = LinearGenerator.start, started, k["batch_size"], [], []
    pixels, others = (it.numpy().reshape(50, 4) / 127.5 - 1 for it in (drawn.images, others))
    at, random, order = (drawn[name] for name in ("randint", "randn", "randperm"))
    opt_G, opt_D = (Adam(k["lr"], k["beta1"], k["beta2"], eps=1e-4) for _ in range(2))
    def real():
        return pixels[next(at).astype(int)]
    def parts(w):
        return w[:12].reshape(3, 4), w[12:42].reshape(10, 3), w[42:]
    mixed = next(order).astype(int)
    few = np.concatenate([mixed[y[mixed] == c][:max(1, k["labels"] // 10)] for c in range(10)])
    np.testing.assert_allclose(x_500, real(), 1e-6, 1e-6)
    assert len(x_500) == 500 and len(next(at)) == m         # real.png
    for t in 1, 2, 3:
        i, x = few[next(at).astype(int)], real()
        x = np.concatenate([pixels[i], x, LinearGenerator.image(theta, next(random))]) + 0.3 * next(random)
        A, B, c = parts(w)
        f = x @ A.T
        Z = np.exp(l := f @ B.T + c).sum(1, keepdims=True)
        p, D_x = np.exp(l) / Z, Z / (Z + 1)
        L_unsup = -np.log(D_x[m:2 * m]).mean() / 2 - np.log(1 - D_x[2 * m:]).mean() / 2
        rows.append(dict(L_sup=-np.log(p[range(m), y[i]]).mean(), L_unsup=L_unsup))
        by_l = np.concatenate([p[:m] - np.eye(10)[y[i]], (D_x - 1)[m:2 * m] * p[m:2 * m] / 2,
                               D_x[2 * m:] * p[2 * m:] / 2]) / m
        w = opt_D.step(w, np.concatenate([(by_l @ B).T @ x, by_l.T @ f, by_l.sum(0)[None].T], axis=None))
        past.append(w)
        x, z = real(), next(random)
        n, (A, _, _) = 0.3 * next(random), parts(w)
        apart = A @ (x + n[:m] - LinearGenerator.image(theta, z) - n[m:]).mean(0)
        theta = opt_G.step(theta, LinearGenerator.by_theta(np.tile(-2 / 3 * apart @ A / m, (m, 1)), z))
        w_ema = np.average(past, axis=0, weights=k["ema"] ** np.arange(t)[::-1])
        A, B, c = parts(w_ema)
        rows[-1] |= dict(L_G=(apart**2).mean(), test_errors=((others @ A.T @ B.T + c).argmax(1) != y_others).sum())
    assert_left(rows, (at, random, order), G=(G, theta, opt_G))
    np.testing.assert_allclose(flat(read("run")["D"].values()), w, 1e-5, 2e-7)
    np.testing.assert_allclose(flat(D_ema.parameters()), w_ema, 1e-5, 2e-7)


def stroke(width, lean, side=32):
    """A straight stroke of so many pixels, that goes so many to the right for each upwards.  (1, 1, side, side)"""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    away = (column - side / 2 - lean * (side / 2 - row)).abs()
    return ((away < width / 2) & (row > 5) & (row < side - 6)).to(torch.uint8)[None, None] * 255


def test_captions_say_class_and_look_in_every_phrasing():
    for place, lean in enumerate((-0.3, 0.1, 0.5)):
        assert looks(torch.cat([stroke(2, lean), stroke(8, lean)])).tolist() == [[0, place], [2, place]]
    medium = torch.maximum(stroke(2, 0.1), stroke(3, 0.1) // 2)
    moved = medium.roll((3, -4), (2, 3)) // 2
    assert looks(torch.cat([medium, medium.flip(3), moved])).tolist() == [[1, 1], [1, 0], [1, 1]]
    meanings, rng = torch.tensor([[7, 0, 0], [0, 1, 1], [3, 2, 2]]), torch.Generator().manual_seed(0)
    seen = [set(texts) for texts in zip(*(caption(meanings, rng) for _ in range(100)))]
    for texts, what in zip(seen, ("thin seven leaning left", "zero", "thick three leaning right")):
        assert texts == {phrase.format(what) for phrase in text2image.PHRASES}
    codes = encode(["A Seven", "é" * 100, ""])              # ASCII, 64 of them
    assert [bytes(each.tolist()).decode() for each in codes] == ["a seven".ljust(64), "?" * 64, " " * 64]
    h = (phi := text2image.TextEncoder())(codes)
    torch.testing.assert_close(phi(codes[1:2]), h[1:2])     # a text's vector is its own
    assert text2image.Discriminator(width=1)(torch.zeros(3, 1, 32, 32), h).shape == (3,)


class TinyG(nn.Linear):
    """G(z, h) = <a, z> + <b, h> + e, one pixel"""

    def forward(self, z, h):
        return super().forward(torch.cat([z, h], 1)).view(-1, 1, 1, 1)


class TinyD(nn.Bilinear):
    """D(x, h) = x <c, h> + d, x the mean pixel;  image is a stand-in for v's convolutions"""
    image = nn.Sequential(nn.Flatten(), nn.Linear(1024, 1024))

    def forward(self, x, h):
        return super().forward(x.flatten(1).mean(1, keepdim=True), h)[:, 0]


@pytest.mark.parametrize("changed", [{}, dict(lr=0.01, batch_size=8)])
def test_one_iteration_of_phi_and_two_of_g_and_d_equal_numpy(monkeypatch, changed):
    x_all, y_all, drawn, kept = common.load_images()[:60], common.load_set("mnist")[1][:60], {}, []
    def recorded(name, it):
        return lambda *of, **kw: drawn.setdefault(name, []).append(it(*of, **kw)) or drawn[name][-1]
    for script, name, it in (
            (torch, "randn", recorded("z", torch.randn)), (torch, "randint", recorded("i", torch.randint)),
            (text2image, "Generator", lambda **_: TinyG(164, 1)), (text2image, "load_images", lambda *_: x_all),
            (text2image, "Discriminator", lambda **_: TinyD(1, 64, 1)), (text2image, "save_images", lambda *_: 0),
            (text2image, "load_set", lambda *_: (None, y_all)), (text2image, "save_animation", lambda *_: None),
            (text2image, "caption", recorded("t", lambda of: [f"{d} {a} {b}" for d, a, b in of.tolist()])),
            (text2image, "save", lambda out, config, states, rows: kept.append((states, rows, *(
                flat(states[name].parameters()) for name in "GD"))))):
        monkeypatch.setattr(script, name, it)
    text2image.train(pretrain=1, steps=3, save_every=1, device="cpu", out="run", **changed)
    (_, _, theta, w), *_, (parts, rows, theta_3, w_3) = kept        # G and D after step 1 are as they were
    k, phi = dict(lr=2e-4, batch_size=64) | changed, parts["phi"]
    opt_G, opt_D, m = Adam(k["lr"], 0.5, 0.999), Adam(k["lr"], 0.5, 0.999), k["batch_size"]
    look = [[d, *of] for d, of in zip(y_all.tolist(), looks(x_all).tolist())]
    seen = torch.tensor([i for i, (d, *of) in enumerate(look) if of != [d % 2 * 2, d // 2 % 2 * 2]])
    assert len(seen) < 60 and rows[0]["L_phi"] > 1 and parts["opt_phi"].state_dict()["state"][0]["step"] == 1
    def says(x, h):                                         # σ(D(x, h))
        return 1 / (1 + np.exp(-(x * (h @ w[:64]) + w[64])))
    for step in 1, 2:
        i, z, t, t_hat = seen[drawn["i"][step]], drawn["z"][step].numpy(), *drawn["t"][2 * step:2 * step + 2]
        assert t == ["{} {} {}".format(*look[j]) for j in i] and t_hat == t[1:] + t[:1]     # t̂: the next image's
        h, h_hat = (phi(encode(texts)).detach().double().numpy() for texts in (t, t_hat))
        other = np.array([float(a != b) for a, b in zip(t, t_hat)])         # of another meaning
        h_G = np.concatenate([h, (h[::2] + np.roll(h, 1, 0)[::2]) / 2])     # (5)
        x = x_all[i].double().flatten(1).numpy().mean(1) / 127.5 - 1
        into = np.column_stack([z, h_G, np.ones(len(z))])
        x_hat = into @ theta
        s_r, s_w, s_f = says(x, h), says(x, h_hat), says(x_hat[:m], h)
        L_D = np.log(s_r) + (other * np.log(1 - s_w) + np.log(1 - s_f)) / 2                 # line 10
        by_score = -np.concatenate([1 - s_r, -other * s_w / 2, -s_f / 2]) / m               # of -L_D
        xs, hs = np.concatenate([x, x, x_hat[:m]]), np.concatenate([h, h_hat, h])
        w = opt_D.step(w, np.append((by_score * xs) @ hs, by_score.sum()))
        s_f = says(x_hat, h_G)                                              # by the new D
        theta = opt_G.step(theta, -(1 - s_f) / len(s_f) * (h_G @ w[:64]) @ into)            # of -L_G, line 12
        np.testing.assert_allclose([*rows[step].values()][2:], [0, L_D.mean(), np.log(s_f).mean()], 1e-5)
    assert changed or not other.all()
    np.testing.assert_allclose([*w_3[:65], *theta_3], [*w, *theta], 1e-5, 1e-6)


def photograph(path, pixels, **more):
    Path(path).parent.mkdir(exist_ok=True, parents=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path, **more)


def test_srgans_networks_are_figure_4s():
    G, D = srgan.Generator(16, 64), srgan.Discriminator(96, 64)
    assert [sum(p.numel() for p in net.parameters()) for net in (G, D)] == [1_549_462, 23_565_505]
    assert [line.split()[2] for line in described(D) if " k3 " in line] == ["s1", "s2"] * 4
    assert described(D).count("LeakyReLU 0.2") == 9 and D(torch.zeros(2, 3, 96, 96)).shape == (2,)
    first, prelu, (block, *last), *_ = srgan.Generator(1, 4)
    h = prelu(first(torch.rand(2, 3, 5, 7)))                # skips over each block, and over all
    by_hand = h + nn.Sequential(*last)(h + nn.Sequential(*block)(h))
    torch.testing.assert_close(srgan.Residual(block, *last)(h), by_hand)


@pytest.mark.parametrize("content, depth, n", [("vgg54", 36, 512), ("vgg22", 9, 128)])
def test_features_are_those_after_a_convolutions_activation(monkeypatch, content, depth, n):
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["E"])
    monkeypatch.setattr(torchvision.models, "vgg19", lambda weights: type("VGG", (), dict(features=layers)))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    h = srgan.features(content, "cpu")(2 * (x := torch.rand(2, 3, 32, 32)) - 1)
    torch.testing.assert_close(12.75 * h, layers[:depth]((x - mean) / std))
    assert isinstance(layers[depth - 1], nn.ReLU) and h.shape[1] == n and not h.requires_grad


def test_crops_are_of_different_photographs_at_their_own_size_and_others_are_named():
    numbers, seen = np.arange(60 * 80).reshape(60, 80), []
    for i in range(4):                                      # a pixel says where it is, and of which photograph
        photograph(f"photos/{i}.png", np.stack([numbers // 256, numbers % 256, numbers * 0 + i], 2))
    photograph("photos/small.png", np.zeros((30, 40, 3)))
    Path("photos/damaged.png").write_bytes(b"no image")
    I_HR = srgan.crops(srgan.found("photos"), 6, 32, "cpu")
    with pytest.warns(UserWarning, match="left out photos/(damaged|small).png"):
        for _ in range(100):
            x = ((next(I_HR) + 1) * 127.5).round().int()
            assert sorted(x[:, 2, 0, 0].tolist()) == [0, 1, 2, 3]
            place = 256 * x[:, 0] + x[:, 1]
            assert ((place - place[:, :1, :1]).numpy() == numbers[:32, :32]).all()
            seen += place[:, 0, 0].tolist()
    row, column = np.divmod(seen, 80)
    assert [row.min(), row.max(), column.min(), column.max()] == [0, 28, 0, 48] and len({*seen}) > 300


def quarter(x):
    """Bicubic, antialiased, of 8 bits, by torchvision, in float64; and every pixel 4x4 times"""
    x = TF.resize(torch.tensor(x), x.shape[-1] // 4, TF.InterpolationMode.BICUBIC, antialias=True).numpy()
    return (np.round((x.clip(-1, 1) + 1) * 127.5) / 255).repeat(4, 2).repeat(4, 3)


@pytest.mark.parametrize("changed", [{}, dict(pretrain_lr=0.03, lr=0.02, adversarial=0.5, batch_size=3, crop=16,
                                              content="vgg22")])
def test_two_steps_of_srresnet_and_four_of_srgan_equal_numpy(monkeypatch, capsys, changed):
    """G(LR): θ (3x3, 3) of colours, every pixel 4x4 times;  D(x) = <w, (x, 1)>"""
    rng, crops, batches, networks = np.random.default_rng(0), srgan.crops, [], []
    for i in range(20):
        photograph(f"photos/{i:02}.png", rng.choice([0, 255], (6, 6, 3)).repeat(8, 0).repeat(8, 1))
    def started(*layers):
        network = nn.Sequential(*layers)
        networks.append(flat(network.parameters()))
        return network
    def recorded(paths, m, size, device):
        for x in crops(paths, m, size, device):
            batches.append(([int(path.stem) for path in paths], x.double().numpy()))
            yield x
    for name, it in dict(
            Generator=lambda *_: started(nn.Upsample(scale_factor=4), nn.Conv2d(3, 3, 1)), crops=recorded,
            Discriminator=lambda size, _: started(nn.Flatten(), nn.Linear(3 * size**2, 1), nn.Flatten(0)),
            features=lambda content, device: lambda x: 3 * x).items():
        monkeypatch.setattr(srgan, name, it)
    G, D = srgan.train(**changed, dataset="photos", pretrain=2, steps=6, size=48, held_out=6, save_every=1,
                       device="cpu", out="run")
    k = dict(pretrain_lr=1e-3, lr=1e-4, adversarial=1e-3, batch_size=8, crop=48) | changed
    (theta, w), rows, opt_G, opt_D = networks, [], Adam(0, 0.9, 0.999), Adam(0, 0.9, 0.999)
    (held_out, test), *batches = batches
    assert held_out == [*range(14, 20)] and test.shape == (6, 3, 48, 48)
    rates = [k["pretrain_lr"], k["lr"], k["lr"], k["lr"], k["lr"] / 10, k["lr"] / 10]
    def G_of(u):
        return np.einsum("oc,mcij->moij", theta[:9].reshape(3, 3), u) + theta[9:, None, None]
    def D_of(x):                                            # σ(D(x)), and what is multiplied by w
        by_w = np.column_stack([x.reshape(len(x), -1), np.ones(len(x))])
        return 1 / (1 + np.exp(-by_w @ w)), by_w
    def psnr(SR):                                           # on Y, without the borders
        off = np.tensordot([65.481, 128.553, 24.966], (SR.clip(-1, 1) - test) / 2, (0, 1))[:, 4:-4, 4:-4]
        return (10 * np.log10(255**2 / (off**2).mean((1, 2)))).mean()
    for t, (opt_G.lr, (paths, HR)) in enumerate(zip(rates, batches, strict=True), 1):
        assert HR.shape == (k["batch_size"], 3, k["crop"], k["crop"]) and paths == [*range(14)]
        u = quarter(HR)
        SR, scale = G_of(u), 9 if changed and t > 2 else 1  # of what stands for the features
        l_X, l_Gen, l_D, by_SR = scale * ((HR - SR)**2).sum(1).mean(), 0, 0, scale * 2 * (SR - HR) / SR[:, 0].size
        if t > 2:
            opt_D.lr, (D_HR, HR_by_w), (D_SR, SR_by_w) = opt_G.lr, D_of(HR), D_of(SR)
            l_D = (-np.log(D_HR) - np.log(1 - D_SR)).mean()
            w = opt_D.step(w, ((D_HR - 1) @ HR_by_w + D_SR @ SR_by_w) / len(HR))
            D_SR, _ = D_of(SR)
            l_Gen = -np.log(D_SR).mean()
            by_SR = by_SR + k["adversarial"] * np.outer(D_SR - 1, w[:-1]).reshape(SR.shape) / len(SR)
        theta = opt_G.step(theta, np.append(np.einsum("moij,mcij->oc", by_SR, u), by_SR.sum((0, 2, 3))))
        rows.append(dict(l_X=l_X, l_Gen=l_Gen, l_D=l_D, psnr=psnr(G_of(quarter(test)))))
    LR = torch.tensor(quarter(test)[..., ::4, ::4])
    bicubic = TF.resize(LR, 48, TF.InterpolationMode.BICUBIC, antialias=True)
    assert f"{psnr(2 * bicubic.numpy() - 1):.2f}" in capsys.readouterr().out
    assert_left(rows, (), G=(G, theta, opt_G), D=(D, w, opt_D))


def test_photographs_of_a_folder_are_enlarged_by_the_run(monkeypatch, capsys):
    G, rng, exif = srgan.Generator(1, 2).eval().requires_grad_(False), np.random.default_rng(0), Image.Exif()
    turned, exif[0x0112] = rng.integers(0, 256, (9, 14, 3)), 6      # 6: to be turned to the right
    photograph("mine/turned.png", turned, exif=exif)
    photograph("mine/more/GREY.PNG", turned[..., 0])
    photograph("mine/large.png", np.zeros((70, 70, 3)))
    Path("mine/damaged.png").write_bytes(b"no image")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2100)    # twice as many are an error
    torch.save(dict(config=dict(blocks=1, width=2), G=G.state_dict()), "checkpoint.pt")
    srgan.main(["--enlarge", "mine", "--out", ".", "--device", "cpu", "--blocks", "3"])     # the checkpoint's: 1
    for name, x in ("turned.png", np.rot90(turned, -1)), ("more/GREY.PNG", turned[..., [0, 0, 0]]):
        pixels = np.asarray(Image.open(f"enlarged/{name}.png"), dtype=float).transpose(2, 0, 1)
        SR = G(torch.tensor(x.transpose(2, 0, 1) / 255)[None].float())[0]
        np.testing.assert_allclose(pixels, (SR.clamp(-1, 1) + 1) * 127.5, atol=1)
    said = capsys.readouterr().out
    assert "left out mine/damaged.png" in said and "left out mine/large.png" in said
    G.config, x = dict(blocks=1), torch.randint(256, (3, 60, 14), dtype=torch.uint8)
    assert (srgan.enlarged(G, x, 40).int() - srgan.enlarged(G, x).int()).abs().max() <= 1


RUNS = {
    **dict.fromkeys(["sngan", "dragan", "ctgan", "ls_gan", "improved_gan"],
                    "--digit 7 --size 16 --width 2 --nz 8 --batch-size 8"),
    "semi_supervised": "--width 2 --nz 8 --batch-size 8 --labels 10",
    "text2image": "--width 1 --batch-size 4 --pretrain 4",
    "srgan": "--dataset photos --blocks 1 --width 2 --crop 16 --size 20 --batch-size 4 --held-out 3 --pretrain 4"}
GRAPHS = [name for name in RUNS if name not in ("text2image", "srgan")]


def main(name, words):
    script = importlib.import_module(f"related.{name}")
    parts = (script.train, script.generate) if name in GRAPHS else ()
    script.main(*parts, f"{RUNS[name]} --save-every 3 {words}".split())


@pytest.fixture
def few(monkeypatch):                                       # 2,000 images of every data set, and seven photographs
    load = common.load_set
    for script in common, semi_supervised, text2image:
        monkeypatch.setattr(script, "load_set", lambda *of, **kw: tuple(part[:2000] for part in load(*of, **kw)))
    for i in range(7):
        common.save_images(torch.rand(1, 3, 24, 24) * 2 - 1, f"photos/{i}.png")


def assert_shows(file, x):
    common.save_images(x, "expected.png")
    assert Path("expected.png").read_bytes() == Path(file).read_bytes()


@pytest.mark.parametrize("name", RUNS)
def test_three_steps_and_three_steps_are_six_steps_which_generate(name, few):
    for steps, out in ((6, "whole"), (3, "parts"), (6, "parts")):
        main(name, f"--steps {steps} --out {out} --device cpu")
    assert_same(training("parts"), training("whole"))
    assert Path("parts/000003.png").exists() and Path("parts/training.gif").exists()
    what, n = ("--enlarge photos", 7) if name == "srgan" else ("--generate 2", 2)
    main(name, f"{what} --out parts --device cpu")
    assert len(list(Path("parts").glob("*d/*.png"))) == n
    with pytest.raises(SystemExit, match="^0$"):
        main(name, "--help")
    load, noise = importlib.import_module(f"related.{name}").load, torch.Generator().manual_seed(0)
    if name in GRAPHS:
        assert_shows("parts/000006.png", load("parts/checkpoint.pt")(torch.randn(64, 8, generator=noise)))
    if name == "text2image":
        (G, phi), z = load("parts/checkpoint.pt"), torch.randn(6, 100, generator=noise).repeat(6, 1)
        assert_shows("parts/000006.png", G(z, phi(encode(text2image.SHOWN)).repeat_interleave(6, 0)))
        z = torch.randn(1, 100, generator=noise.manual_seed(0))
        assert_shows("parts/generated/a-seven-0-000000.png", G(z, phi(encode(["a seven"])))[..., 2:-2, 2:-2])


@pytest.mark.cuda
@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_equals_eager_steps(name, few):
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):      # to compare closely
        main(name, "--steps 9 --out eager --device cuda")
        main(name, "--steps 9 --out graph --device cuda --graph")
    for part in "G", "D":
        torch.testing.assert_close(read("eager")[part], read("graph")[part], rtol=1e-4, atol=1e-5)
