"""The scripts of related/ against their papers: terms in closed form, and iterations against numpy: of train() with
its defaults, and with all of them changed"""
import inspect
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import wgan
import wgan_gp
from related import ctgan, dragan, ls_gan, sngan
from related.ctgan import consistency
from related.dragan import perturb
from related.ls_gan import margin
from related.sngan import SpectralConv2d, normalize
from truth import (Adam, Drawn, LinearGenerator, QuadraticCritic, assert_dcgan_initialisation, assert_left,
                   described, flat, logged, parameter)

image, by_theta = LinearGenerator.image, LinearGenerator.by_theta
score, by_w, by_x = QuadraticCritic.score, QuadraticCritic.by_w, QuadraticCritic.by_x


def losses_where_D_says(monkeypatch, script, real, fake, **settings):
    """The first row of a run whose D gives all real images one number and all generated ones another.  Its weights
    are at a = s = 0, so that its gradient is 0"""
    def forward(D, x):
        shown = torch.where(x.flatten(1)[:, 0] > 2, float(fake), float(real))
        return shown + x.flatten(1) @ D.a + D.s / 2 * x.flatten(1).square().sum(1)
    monkeypatch.setattr(QuadraticCritic, "forward", forward)
    monkeypatch.setattr(QuadraticCritic, "start", np.zeros(5))
    monkeypatch.setattr(LinearGenerator, "start", np.append(np.zeros(12), np.full(4, 3.0)))     # nothing real is 3
    Drawn(monkeypatch, script, Generator=LinearGenerator, Discriminator=QuadraticCritic)
    script.train(**settings, steps=1, lr=0.0, nz=3, batch_size=4, device="cpu", out="run")


# ---- The networks ----

def test_the_networks_are_those_of_wgan_and_wgan_gp():
    without_norm, with_norm = (described(script.Critic(3, 32, 16)) for script in (wgan_gp, wgan))
    convolution = [*without_norm[:-3], "64-1 k4 s1 p0+bias", "Flatten"]
    for script, layers in ((sngan, convolution), (dragan, without_norm), (ls_gan, with_norm)):
        D = script.Discriminator(3, 32, 16)
        assert described(D) == layers and D(torch.zeros(2, 3, 32, 32)).shape == (2,)
    for script, nearest in ((sngan, wgan_gp), (dragan, wgan_gp), (ctgan, wgan_gp), (ls_gan, wgan)):
        assert inspect.getsource(script.Generator) == inspect.getsource(nearest.Generator)
    for script in dragan, ctgan:
        assert inspect.getsource(script.LeakyReLU) == inspect.getsource(wgan_gp.LeakyReLU)


def test_networks_are_initialised_as_those_of_wgan_and_wgan_gp():
    torch.manual_seed(0)
    assert_dcgan_initialisation(ls_gan.Generator(100, 1, 32, 64), ls_gan.Discriminator(1, 32, 64))
    for network in sngan.Discriminator, dragan.Discriminator, ctgan.Critic:
        for layer in network(1, 32, 16).modules():
            if isinstance(layer, nn.Conv2d):
                bound = (layer.weight.shape[1] * 16) ** -0.5
                assert 0.9 * bound < layer.weight.abs().max() <= bound


# ---- SNGAN: the norm ----

def test_three_steps_of_the_power_method():
    W, u = torch.tensor([[3.0, 0], [0, 1]]), torch.ones(2) / 2**0.5
    for sigma in 82 / 820**0.5, 2.99817, 2.99998:
        W_bar, u = normalize(W, u)
        torch.testing.assert_close(W_bar * sigma, W, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normalize(W, torch.ones(2))[1], torch.tensor([9.0, 1]) / 82**0.5)     # v first
    torch.testing.assert_close(normalize(W, torch.tensor([1.0, 0]))[0], torch.tensor([[1, 0], [0, 1 / 3]]))


def test_rank_one_and_orthogonal_matrices_are_exact_at_once():
    a, b = torch.randn(5), torch.randn(7)
    torch.testing.assert_close(normalize(a[:, None] * b, torch.randn(5))[0], a[:, None] * b / (a.norm() * b.norm()))
    Q, _ = torch.linalg.qr(torch.randn(6, 6))
    torch.testing.assert_close(normalize(Q, torch.randn(6))[0], Q)


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (8, 3, 4, 4), (1, 5, 2, 2)])
def test_after_many_steps_the_norm_is_1_as_torchs_matrix_norm_says(shape):
    torch.manual_seed(0)
    W, u = torch.randn(shape, dtype=torch.double), torch.randn(shape[0], dtype=torch.double)
    for _ in range(1000):
        W_bar, u = normalize(W, u)
    assert W_bar.shape == W.shape and u.norm() == pytest.approx(1)
    assert torch.linalg.matrix_norm(W_bar.reshape(len(W), -1), 2) == pytest.approx(1)
    torch.testing.assert_close(W_bar, W / torch.linalg.matrix_norm(W.reshape(len(W), -1), 2))


def test_a_kernel_of_ones_is_normalised_as_a_matrix_not_as_an_operator():
    W = torch.full((1, 1, 3, 3), 1 / 3)
    torch.testing.assert_close(normalize(W, torch.ones(1))[0], W)


def test_sigma_is_differentiated_through_and_u_and_v_are_not():
    """By finite differences of <A, W / (uᵀ W v)> at fixed u and v; at the exact ones it is orthogonal to W"""
    torch.manual_seed(0)
    W, u, A = (torch.randn(shape, dtype=torch.double) for shape in ((4, 6), (4,), (4, 6)))
    v = W.T @ u / (W.T @ u).norm()
    u1 = W @ v / (W @ v).norm()

    def by_hand(W):
        return (A * W / (u1 @ W @ v)).sum()
    at = W.clone().requires_grad_()
    (grad,) = torch.autograd.grad((A * normalize(at, u)[0]).sum(), at)
    for i, j in ((0, 0), (2, 5), (3, 1)):
        step = torch.zeros(4, 6, dtype=torch.double)
        step[i, j] = 1e-6
        assert grad[i, j].item() == pytest.approx(((by_hand(W + step) - by_hand(W - step)) / 2e-6).item(), rel=1e-5)
    U, _, _ = torch.linalg.svd(W)
    (grad,) = torch.autograd.grad((A * normalize(at, U[:, 0])[0]).sum(), at)
    assert abs((grad * W).sum()) < 1e-12 < grad.norm()
    larger = (7 * W).requires_grad_()                       # W → c W: divided by c
    (smaller,) = torch.autograd.grad((A * normalize(larger, U[:, 0])[0]).sum(), larger)
    torch.testing.assert_close(7 * smaller, grad)


def test_against_torchs_parametrization_at_equal_u_and_v():
    torch.manual_seed(0)
    ours, x = SpectralConv2d(3, 8, 4, 2, 1).eval(), torch.randn(2, 3, 8, 8)
    theirs = nn.Conv2d(3, 8, 4, 2, 1)
    theirs.load_state_dict({name: it for name, it in ours.state_dict().items() if name != "u"})
    nn.utils.parametrizations.spectral_norm(theirs).eval()
    kept = theirs.parametrizations.weight[0]
    W = ours.weight.detach().flatten(1)
    kept._v.copy_(nn.functional.normalize(W.T @ ours.u, dim=0))
    kept._u.copy_(nn.functional.normalize(W @ kept._v, dim=0))
    for layer in (ours, theirs):
        layer(x).square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.weight.grad, theirs.parametrizations.weight.original.grad)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)


def test_u_moves_in_training_mode_only_and_scores_do_not_depend_on_the_weights_scale():
    torch.manual_seed(0)
    D, x = sngan.Discriminator(1, 32, 4), torch.randn(3, 1, 32, 32)
    layers = [layer for layer in D if isinstance(layer, SpectralConv2d)]
    assert len(layers) == 4 and not [layer for layer in D if type(layer) is nn.Conv2d]
    before = [layer.u.clone() for layer in layers]
    scores = D.eval()(x)
    assert all(map(torch.equal, before, (layer.u for layer in layers)))
    D.train()(x)
    for layer, u in zip(layers, before):
        torch.testing.assert_close(layer.u, normalize(layer.weight, u)[1])
    with torch.no_grad():
        for layer, u in zip(layers, before):
            layer.u.copy_(u)
            layer.weight.mul_(7)
    torch.testing.assert_close(D.eval()(x), scores)
    assert {name.split(".")[1] for name in D.state_dict()} == {"weight", "bias", "u"}


# ---- SNGAN ----

@pytest.mark.parametrize("real, fake, expected", [
    (1, -1, (0, 1)), (0, 0, (2, 0)), (3, -3, (0, 3)), (-1, 2, (5, -2))])
def test_hinge_losses(monkeypatch, real, fake, expected):
    losses_where_D_says(monkeypatch, sngan, real, fake)
    np.testing.assert_allclose(logged("run", "L_D", "L_G")[0], expected, atol=1e-6)


class SpectralCritic(nn.Sequential):
    """D(x) = W̄₂ (W̄₁ x + b₁) + b₂ on images of 2x2 pixels; w: W₁ (2x4), b₁, W₂ (1x2), b₂"""
    start = np.array([0.5, -0.2, 0.9, 0.1, 0.3, 0.8, -0.4, 0.6, 0.2, -0.1, 0.7, -0.5, 1.5])

    def __init__(self, *_):
        super().__init__(SpectralConv2d(1, 2, 2, 1, 0), SpectralConv2d(2, 1, 1, 1, 0), nn.Flatten(0))
        parts = np.split(self.start, [8, 10, 12])
        for p, values in zip(self.parameters(), parts):
            p.detach().copy_(torch.tensor(values).view(p.shape))

    def forward(self, x):
        assert x.requires_grad != self.training             # constants; in G's step, images with a history
        return super().forward(x)


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
    assert_left(sngan, rows, (real, latent), rtol=2e-5, G=(G, theta, opt_G), D=(D, w, opt_D))
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


@pytest.mark.parametrize("real, fake, expected", [
    (0, 0, (2 * math.log(2) + 10, math.log(2), 1)),         # D = 0: the penalty is (0 - 1)²
    (50, -50, (10, 50, 1)), (-50, 50, (100 + 10, 0, 1))])   # logits: linear where D is wrong, finite anywhere
def test_dragans_losses(monkeypatch, real, fake, expected):
    losses_where_D_says(monkeypatch, dragan, real, fake)
    np.testing.assert_allclose(logged("run", "L_D", "L_G", "penalty")[0], expected, 1e-6, 1e-6)


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

    assert_left(dragan, rows, (real, latent, uniform), rtol=1e-5, G=(G, theta, opt_G), D=(D, w, opt_D))
    # D sees a leaf that wants a gradient (x + δ), then constants (x, x_tilde); in G's step, images with a history.
    assert [seen[:2] for seen in QuadraticCritic.seen] == 3 * [(True, True), (False, True), (False, True),
                                                               (True, False)]


# ---- CT-GAN ----

def test_consistency_in_closed_form():
    one, f = torch.ones(5), torch.randn(5, 3, 2, 2)
    for further, m_prime, expected in ((0, 0.0, 1), (1, 0.0, 1.1), (1, 0.5, 0.6), (1, 2.0, 0)):
        for a, b in ((one, 0 * one), (0 * one, one)):       # either pass may be the first
            torch.testing.assert_close(consistency(a, b, f, f + further, m_prime), expected * one)
    assert not consistency(one, one, f, f, 0.0).any()
    each = torch.arange(5.0)
    torch.testing.assert_close(consistency(each, 0 * each, f, f, 0.0), each**2)      # image by image


def test_the_expected_consistency_of_a_linear_critic_with_dropout():
    """E[(D − D′)²] = 2 Σ w² h² (1 − p) / p with p kept, and both passes have a part in its gradient"""
    torch.manual_seed(0)
    w, drop, h = torch.tensor([1.0, 2.0], requires_grad=True), nn.Dropout(0.5), torch.ones(200_000, 2)
    f, f2 = drop(h), drop(h)
    CT = consistency(f @ w, f2 @ w, f, f, 0.0).mean()
    assert CT.item() == pytest.approx(10, rel=0.02)
    (grad,) = torch.autograd.grad(CT, w)
    torch.testing.assert_close(grad, torch.tensor([4.0, 8.0]), rtol=0.03, atol=0)


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
    assert_left(ctgan, rows, (real, latent, uniform), rtol=1e-5, G=(G, theta, opt_G), D=(D, w, opt_D))


def test_without_dropout_ctgan_is_wgan_gp(monkeypatch):
    monkeypatch.setattr(nn.Dropout, "forward", lambda dropout, x: x)
    left = []
    for script in wgan_gp, ctgan:
        Drawn(monkeypatch, script, side=16)
        G, D = script.train(steps=2, lr=1e-3, batch_size=50, size=16, width=4, nz=5, device="cpu",
                            out=script.SCRIPT)
        left.append(flat([*G.parameters(), *D.parameters()]))
    np.testing.assert_allclose(*left, 1e-5, 1e-7)
    assert not logged("ctgan", "CT").any()


def test_examples_are_the_first_so_many(monkeypatch):
    drawn = Drawn(monkeypatch, ctgan, side=16)
    drawn.images[10:] = 0
    ctgan.train(examples=10, steps=1, batch_size=64, size=16, width=2, nz=3, device="cpu", out="run")
    assert max(index.max() for index in drawn["randint"]) == 9 and ctgan.read("run")["settings"]["images"] == 10
    assert np.asarray(Image.open("run/real.png")).reshape(8, 16, 8, 16).max((1, 3)).all()       # not the others


# ---- LS-GAN ----

def test_the_margin_is_tau_times_the_sum_of_all_differences_of_all_pairs():
    for shape, expected in (((1, 28, 28), 0.3136), ((1, 32, 32), 0.4096), ((3, 64, 64), 4.9152)):
        one = torch.ones(2, *shape)
        torch.testing.assert_close(margin(one, -one, 2e-4), torch.full((2, 2), expected))
    x, x_tilde = torch.randn(3, 1, 4, 4), torch.randn(5, 1, 4, 4)
    pairs = torch.tensor([[0.1 * (a - b).abs().sum() for b in x_tilde] for a in x])
    torch.testing.assert_close(margin(x, x_tilde, 0.1), pairs)
    assert not margin(x, x, 0.1).diagonal().any()


@pytest.mark.parametrize("real, fake, slope, expected", [
    (0, 1, 0.0, 0), (1, 1, 0.0, 0.5),                       # a = Δ + L(x) − L(x_tilde) is -1/2, 1/2
    (0, 1, 1.0, -0.5), (0, 0, 1.0, 0.5), (0, 1, -1.0, 0.5), (0, 0, -1.0, 0.5), (0, 1, 0.2, -0.1), (0, 0, 0.2, 0.5)])
def test_ls_gans_losses(monkeypatch, real, fake, slope, expected):
    monkeypatch.setattr(ls_gan, "margin", lambda x, x_tilde, tau: torch.full((len(x), len(x_tilde)), 0.5))
    losses_where_D_says(monkeypatch, ls_gan, real, fake, slope=slope, lam=3.0, real_weight=2.0)
    np.testing.assert_allclose(logged("run", "hinge", "L_D", "L_G")[0], (expected, 2 * real + 3 * expected, fake),
                               atol=1e-6)


def test_with_slope_1_and_without_the_weight_of_real_images_it_is_wgan_with_the_opposite_sign(monkeypatch):
    grads = []
    for script, network, settings in ((wgan, "Critic", dict(n_critic=1)),
                                      (ls_gan, "Discriminator", dict(slope=1.0, lam=1.0, real_weight=0.0))):
        Drawn(monkeypatch, script, Generator=LinearGenerator, **{network: QuadraticCritic})
        _, D = script.train(**settings, c=9.0, lr=0.0, steps=1, nz=3, device="cpu", out=script.SCRIPT)
        grads.append(flat(p.grad for p in D.parameters()))  # wgan.py's ascends E[D(x)] − E[D(x_tilde)]
    assert abs(grads[0]).min() > 1e-3
    np.testing.assert_allclose(*grads, 1e-5, 1e-6)


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
    assert_left(ls_gan, rows, (real, latent), rtol=1e-5, G=(G, theta, opt_G), D=(D, w, opt_D))
    # D sees constants, x and x_tilde in passes of their own, then images with a history.
    assert [seen[:2] for seen in QuadraticCritic.seen] == 3 * [(False, True), (False, True), (True, False)]
    assert all(largest <= np.float32(k["c"]) for _, _, largest in QuadraticCritic.seen[2:])
