"""wgan.py, wgan_gp.py, lsgan.py and ebgan.py against their papers: layers, terms in closed form, and iterations
against numpy: of train() with its defaults, whose numbers here are the paper's, and with all of them changed"""
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch import nn

import ebgan
import lsgan
import wgan
import wgan_gp
from ebgan import energy, pulling_away
from truth import Adam, Drawn, LinearAutoencoder, LinearGenerator, QuadraticCritic, RMSProp
from truth import assert_left, described, norm
from wgan_gp import grad_norm

SECOND = {wgan: wgan.Critic, wgan_gp: wgan_gp.Critic, lsgan: lsgan.Discriminator, ebgan: ebgan.Discriminator}
image, by_theta, LEAKY = LinearGenerator.image, LinearGenerator.by_theta, "LeakyReLU 0.2"
score, by_w, by_x = QuadraticCritic.score, QuadraticCritic.by_w, QuadraticCritic.by_x


@pytest.mark.parametrize("script", SECOND)
def test_the_generators_layers_are_those_of_dcgan(script):
    assert described(script.Generator(100, 3, 32, 16)) == [
        "Unflatten", "100-64 k4 s1 p0", *norm(64, "ReLU"), "64-32 k4 s2 p1", *norm(32, "ReLU"),
        "32-16 k4 s2 p1", *norm(16, "ReLU"), "16-3 k4 s2 p1", "Tanh"]
    assert sum(p.numel() for p in script.Generator(100, 3, 64, 64).parameters()) == 3_576_704   # the first WGAN's
    for size in 16, 128, 256:
        x = script.Generator(7, 3, size, 2)(torch.randn(2, 7))
        y = SECOND[script](3, size, 2)(x)
        assert x.shape == (2, 3, size, size) and y.shape == (x.shape if script is ebgan else (2,))
    for size in 0, 8, 33, 48, 512:
        with pytest.raises(ValueError, match=f"--size .* not {size}"):
            script.Generator(100, 1, size, 4)


@pytest.mark.parametrize("layers, expected", [
    *((SECOND[script](3, 32, 16), [
        "3-16 k4 s2 p1", LEAKY, "16-32 k4 s2 p1", *norm(32, LEAKY), "32-64 k4 s2 p1", *norm(64, LEAKY),
        "Flatten", "Linear 1024-1", "Flatten"]) for script in (wgan, lsgan)),
    (wgan_gp.Critic(3, 32, 16), [                           # no batch norm
        "3-16 k4 s2 p1+bias", LEAKY, "16-32 k4 s2 p1+bias", LEAKY, "32-64 k4 s2 p1+bias", LEAKY,
        "Flatten", "Linear 1024-1+bias", "Flatten"]),
    (ebgan.Discriminator(3, 64, 64).encode, ["3-64 k4 s2 p1", LEAKY, "64-128 k4 s2 p1", *norm(128, LEAKY),
                                             "128-256 k4 s2 p1", *norm(256, LEAKY)]),
    (ebgan.Discriminator(3, 64, 64).decode, ["256-128 k4 s2 p1", *norm(128, LEAKY), "128-64 k4 s2 p1",
                                             *norm(64, LEAKY), "64-3 k4 s2 p1", "Tanh"])])
def test_the_second_networks_layers(layers, expected):
    assert described(layers) == expected


@pytest.mark.parametrize("script", SECOND)
def test_networks_are_initialised_as_dcgan_but_wgan_gps_as_torch_does(script):
    torch.manual_seed(0)
    for layer in [*script.Generator(100, 1, 32, 64).modules(), *SECOND[script](1, 32, 64).modules()]:
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) and layer.weight.numel() > 1000:
            std = (layer.weight.shape[1] * 48) ** -0.5 if script is wgan_gp else 0.02   # uniform: ±1 / √(fan in)
            assert abs(layer.weight.std() / std - 1) < 0.1 and abs(layer.weight.mean()) < std / 5
            assert (layer.weight.abs().max() < 2 * std) == (script is wgan_gp)
        if isinstance(layer, nn.BatchNorm2d) and script is not wgan_gp:
            assert 0.01 < layer.weight.std() < 0.03 and abs(layer.weight.mean() - 1) < 0.02 and not layer.bias.any()


@pytest.mark.parametrize("changed", [{}, dict(lr=3e-3, c=0.5, n_critic=3, batch_size=4)])       # 2 of 5 are clipped
def test_two_iterations_of_wgan_equal_numpy(monkeypatch, changed):
    drawn = Drawn(monkeypatch, wgan, Generator=LinearGenerator, Critic=QuadraticCritic)
    G, D = wgan.train(**changed, steps=2, nz=3, device="cpu", out="run", save_every=1)

    k = dict(lr=5e-5, c=0.01, n_critic=5, batch_size=64) | changed
    theta, w, rows = LinearGenerator.start, QuadraticCritic.start, []
    real, latent = drawn.real(), drawn["randn"]
    opt_G, opt_D = RMSProp(), RMSProp()
    for _ in range(2):
        for _ in range(k["n_critic"]):
            x, x_tilde = next(real), image(theta, next(latent))
            estimate = score(w, x).mean() - score(w, x_tilde).mean()
            w = w + k["lr"] * opt_D.direction((by_w(x) - by_w(x_tilde)).mean(0))
            w = np.clip(w, -k["c"], k["c"])
        z = next(latent)
        x_tilde = image(theta, z)
        rows.append(dict(L_D=-estimate, L_G=-score(w, x_tilde).mean(), wasserstein=estimate))
        theta = theta - k["lr"] * opt_G.direction(by_theta(-by_x(w, x_tilde) / k["batch_size"], z))

    assert_left(rows, (real, latent), G=(G, theta, opt_G), D=(D, w, opt_D))


def test_gradient_norm_of_a_linear_critic_and_where_it_is_zero():
    a, x = torch.zeros(3, 8, 8, requires_grad=True), torch.randn(5, 3, 8, 8)
    norms = grad_norm(lambda x: (x * a).sum((1, 2, 3)), x)
    (norms - 1).square().mean().backward()
    assert torch.equal(norms, torch.zeros(5)) and a.grad.isfinite().all()
    torch.testing.assert_close(grad_norm(lambda x: (x * a.exp()).sum((1, 2, 3)), x), torch.full((5,), 192 ** 0.5))


@pytest.mark.parametrize("shape", [(1, 2, 2), (4,), (2, 2), (1, 2, 1, 2)])         # images, vectors, series, voxels
@pytest.mark.parametrize("changed", [{}, dict(lam=3.0, n_critic=3, lr=0.02, beta1=0.5, beta2=0.7, batch_size=4)])
def test_two_iterations_of_wgan_gp_equal_numpy(monkeypatch, changed, shape):
    drawn = Drawn(monkeypatch, wgan_gp, shape, Generator=LinearGenerator, Critic=QuadraticCritic)
    monkeypatch.setattr(LinearGenerator, "shape", shape)
    monkeypatch.setattr(wgan_gp, "save_images", lambda x, path: path.parent.mkdir(exist_ok=True))
    monkeypatch.setattr(wgan_gp, "save_animation", lambda out: None)
    G, D = wgan_gp.train(**changed, steps=2, nz=3, device="cpu", out="run", save_every=1)

    k = dict(lam=10.0, n_critic=5, lr=1e-4, beta1=0.0, beta2=0.9, batch_size=64) | changed
    theta, w, rows = LinearGenerator.start, QuadraticCritic.start, []
    real, latent, uniform = drawn.real(), drawn["randn"], drawn["rand"]
    opt_G, opt_D = (Adam(k["lr"], k["beta1"], k["beta2"]) for _ in range(2))
    for _ in range(2):
        for _ in range(k["n_critic"]):
            x, x_tilde, eps = next(real), image(theta, next(latent)), next(uniform).reshape(k["batch_size"], 1)
            x_hat = eps * x + (1 - eps) * x_tilde
            grad = by_x(w, x_hat)
            length = np.sqrt((grad**2).sum(1))
            L = score(w, x_tilde) - score(w, x) + k["lam"] * (length - 1) ** 2
            estimate = score(w, x).mean() - score(w, x_tilde).mean()
            pull = (2 * k["lam"] * (length - 1) / length)[:, None] * grad
            of_penalty = np.column_stack([pull, (pull * x_hat).sum(1)])
            w = opt_D.step(w, (by_w(x_tilde) - by_w(x) + of_penalty).mean(0))
        z = next(latent)
        x_tilde = image(theta, z)
        rows.append(dict(L_D=L.mean(), L_G=-score(w, x_tilde).mean(), penalty=((length - 1) ** 2).mean(),
                         wasserstein=estimate))
        theta = opt_G.step(theta, by_theta(-by_x(w, x_tilde) / k["batch_size"], z))

    assert_left(rows, (real, latent, uniform), rtol=2e-6, G=(G, theta, opt_G), D=(D, w, opt_D))


def test_layers_that_are_frozen_stay_as_they_are_and_the_others_train(monkeypatch):
    def frozen(*args, make=wgan_gp.Critic):
        D = make(*args)
        D[0].requires_grad_(False).weight.fill_(0.5)
        return D
    Drawn(monkeypatch, wgan_gp, (1, 16, 16), Critic=frozen)
    _, D = wgan_gp.train(steps=1, n_critic=1, size=16, width=4, nz=5, lr=0.5, device="cpu", out="run")
    assert (D[0].weight == 0.5).all() and D[2].weight.abs().max() > 0.4


@pytest.mark.parametrize("changed", [{}, dict(a=0.3, b=-0.7, c=2.0, lr=0.01, beta1=0.2, beta2=0.8, batch_size=4)])
def test_two_iterations_of_lsgan_equal_numpy(monkeypatch, changed):
    drawn = Drawn(monkeypatch, lsgan, Generator=LinearGenerator, Discriminator=QuadraticCritic)
    G, D = lsgan.train(**changed, steps=2, nz=3, device="cpu", out="run", save_every=1)

    k = dict(a=0.0, b=1.0, c=1.0, lr=2e-4, beta1=0.5, beta2=0.999, batch_size=64) | changed
    theta, w, rows = LinearGenerator.start, QuadraticCritic.start, []
    real, latent = drawn.real(), drawn["randn"]
    opt_G, opt_D = (Adam(k["lr"], k["beta1"], k["beta2"]) for _ in range(2))
    for _ in range(2):
        x, z = next(real), next(latent)                     # one z a step
        x_tilde = image(theta, z)
        off, off_tilde = score(w, x) - k["b"], score(w, x_tilde) - k["a"]
        w = opt_D.step(w, (off[:, None] * by_w(x) + off_tilde[:, None] * by_w(x_tilde)).mean(0))
        off_G = score(w, x_tilde) - k["c"]                  # D first, then G against the new D
        rows.append(dict(L_D=(off**2 / 2 + off_tilde**2 / 2).mean(), L_G=(off_G**2 / 2).mean()))
        theta = opt_G.step(theta, by_theta(off_G[:, None] * by_x(w, x_tilde) / k["batch_size"], z))

    assert_left(rows, (real, latent), G=(G, theta, opt_G), D=(D, w, opt_D))


def test_energy_of_any_shape_is_a_norm_whose_gradient_is_finite_at_zero():
    D, x = Namespace(encode=nn.Identity(), decode=lambda S: S * torch.tensor([1.0, -1.0])), torch.randn(5, 3, 2)
    torch.testing.assert_close(energy(D, x)[0], 2 * x[..., 1].norm(dim=1))
    x = torch.tensor([[3.0, 0.0]], requires_grad=True)
    e, S = energy(D, x)
    (grad,) = torch.autograd.grad(e.sum(), x)
    assert e.item() == 0 and torch.equal(S, x) and grad.isfinite().all()


@pytest.mark.parametrize("S, expected", [
    (torch.eye(6), 0), (5 * torch.eye(6)[:4], 0),           # orthogonal
    (torch.ones(5, 3), 1), (torch.tensor([[1., 2], [-1, -2]]), 1),          # equal; opposite: the square
    (torch.tensor([[1., 2], [100, 200], [-0.1, -0.2]]), 1),                 # lengths do not count
    (torch.tensor([[1., 0], [0.5, 3**0.5 / 2]]), 0.25),                     # 60 degrees
    (torch.tensor([[1., 0], [1, 0], [0, 1]]), 1 / 3),       # of the 6 pairs with j ≠ i, 2 are parallel
    (torch.randn(1, 7), 0)])
def test_pulling_away_term(S, expected):
    torch.testing.assert_close(pulling_away(S), torch.tensor(float(expected)), rtol=1e-5, atol=1e-6)


def slope(f, w):
    """The gradient of a function of numpy, by central differences"""
    return np.array([(f(w + step) - f(w - step)) / 2e-6 for step in 1e-6 * np.eye(len(w))])


def energies(w, x):
    E, F = LinearAutoencoder.split(w)
    return np.linalg.norm(x @ E.T @ F.T - x, axis=1)


def f_PT(w, x):
    S = x @ LinearAutoencoder.split(w)[0].T
    S, N = S / np.linalg.norm(S, axis=1, keepdims=True), len(S)
    return sum((S[i] @ S[j]) ** 2 for i in range(N) for j in range(N) if j != i) / (N * (N - 1))


@pytest.mark.parametrize("changed", [{}, dict(margin=1.2, pt=3.0, lr=0.01, beta1=0.2, beta2=0.8, batch_size=5)])
def test_three_iterations_of_ebgan_equal_numpy(monkeypatch, changed):
    drawn = Drawn(monkeypatch, ebgan, Generator=LinearGenerator, Discriminator=LinearAutoencoder)
    G, D = ebgan.train(**changed, steps=3, nz=3, device="cpu", out="run", save_every=1)

    k = dict(margin=10.0, pt=0.1, lr=1e-3, beta1=0.5, beta2=0.999, batch_size=64) | changed
    theta, w, rows = LinearGenerator.start, LinearAutoencoder.start, []
    real, latent = drawn.real(), drawn["randn"]
    opt_G, opt_D = (Adam(k["lr"], k["beta1"], k["beta2"]) for _ in range(2))
    for _ in range(3):
        x, z = next(real), next(latent)                     # one z a step
        x_tilde, row = image(theta, z), {}
        hinge = np.maximum(k["margin"] - energies(w, x_tilde), 0)
        row |= dict(energy_real=energies(w, x).mean(), energy_fake=energies(w, x_tilde).mean())
        row["L_D"] = row["energy_real"] + hinge.mean()
        w = opt_D.step(w, slope(
            lambda w: (energies(w, x) + np.maximum(k["margin"] - energies(w, x_tilde), 0)).mean(), w))
        row["f_PT"] = f_PT(w, x_tilde)                      # D first, then G against the new D
        row["L_G"] = energies(w, x_tilde).mean() + k["pt"] * row["f_PT"]
        rows.append(row)
        theta = opt_G.step(theta, slope(
            lambda theta: energies(w, image(theta, z)).mean() + k["pt"] * f_PT(w, image(theta, z)), theta))

    if changed:
        assert 0 < (hinge > 0).mean() < 1                   # it is on for some images and off for others
    assert_left(rows, (real, latent), rtol=2e-5, of_moments=1e-3, G=(G, theta, opt_G), D=(D, w, opt_D))
