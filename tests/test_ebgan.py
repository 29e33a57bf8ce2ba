"""ebgan.py against the paper: energy and pulling-away term in closed form, and an iteration against numpy"""
import numpy as np
import pytest
import torch
from torch import nn

import ebgan
from ebgan import Discriminator, Generator, energy, pulling_away
from truth import A0, B0, Adam, Drawn, LinearGenerator, assert_dcgan_initialisation, described, logged


class LinearAutoencoder(nn.Module):
    """Enc(x) = E x, Dec(S) = F S on images of 2x2 pixels"""
    E0, F0 = np.linspace(-0.8, 0.9, 8).reshape(2, 4), np.linspace(0.7, -0.4, 8).reshape(4, 2)
    seen = []

    def __init__(self, *_):
        super().__init__()
        self.E = nn.Parameter(torch.tensor(self.E0, dtype=torch.float32))
        self.F = nn.Parameter(torch.tensor(self.F0, dtype=torch.float32))
        self.seen.clear()

    def encode(self, x):
        self.seen.append(x.requires_grad)
        return x.flatten(1) @ self.E.T

    def decode(self, S):
        return (S @ self.F.T).view(-1, 1, 2, 2)

    def forward(self, x):
        return self.decode(self.encode(x))


# ---- (13): ‖Dec(Enc(x)) - x‖ ----

class Fixed(nn.Module):
    """An autoencoder that returns factor times its input"""
    def __init__(self, factor):
        super().__init__()
        self.encode, self.decode = nn.Identity(), lambda S: factor * S


@pytest.mark.parametrize("factor", [1.0, 0.0, -1.0, 3.0])
def test_energy_is_the_norm_of_each_images_residual(factor):
    x = torch.randn(5, 3, 8, 8) * torch.arange(1., 6.).view(5, 1, 1, 1)
    torch.testing.assert_close(energy(Fixed(factor), x), abs(factor - 1) * x.flatten(1).norm(dim=1))


def test_energy_is_a_norm_and_not_a_mean_of_squares():
    x = torch.ones(2, 1, 32, 32)
    assert energy(Fixed(0.0), x).tolist() == [32, 32]       # √1024; the margins 10, 20, 80 are on this scale
    assert energy(Fixed(0.0), 2 * x).tolist() == [64, 64]   # not squared: twice the image, twice the energy


def test_energy_of_the_real_autoencoder_image_by_image():
    torch.manual_seed(0)
    D, x = Discriminator(3, 32, 4), torch.rand(6, 3, 32, 32) * 2 - 1
    D(x)                                                    # running statistics that differ from 0 and 1
    D.eval()
    alone = torch.stack([torch.linalg.vector_norm(D(x[i:i + 1]) - x[i]) for i in range(6)])
    assert alone.std() > 1e-3
    torch.testing.assert_close(energy(D, x), alone)
    torch.testing.assert_close(energy(D, x, D.encode(x)), alone)
    D.train()                                               # batch norm: now by the batch
    torch.testing.assert_close(energy(D, x), (D(x) - x).flatten(1).norm(dim=1))


@pytest.mark.parametrize("code", ["known", "not known"])
def test_the_gradient_flows_through_both_occurrences_of_the_image(code):
    D, x = LinearAutoencoder(), torch.randn(3, 1, 2, 2, requires_grad=True)
    e = energy(D, x, D.encode(x)) if code == "known" else energy(D, x)
    (grad,) = torch.autograd.grad(e.sum(), x)
    M = D.F0 @ D.E0 - np.eye(4)                             # e = ‖M x‖, de/dx = Mᵀ M x / e
    flat = x.detach().double().flatten(1).numpy()
    np.testing.assert_allclose(grad.flatten(1), flat @ M.T @ M / np.linalg.norm(flat @ M.T, axis=1)[:, None],
                               rtol=1e-5, atol=1e-6)


def test_energy_and_its_gradient_are_finite_where_the_image_is_reproduced_exactly():
    x = torch.randn(3, 1, 4, 4, requires_grad=True)
    e = energy(Fixed(1.0), x)
    e.sum().backward()
    assert torch.equal(e, torch.zeros(3)) and x.grad.isfinite().all()


# ---- (14): the pulling-away term ----

@pytest.mark.parametrize("S, expected", [
    (torch.eye(6), 0), (5 * torch.eye(6)[:4], 0),           # orthogonal
    (torch.ones(5, 3), 1), (torch.tensor([[1., 2], [-1, -2]]), 1),          # equal; opposite: the square
    (torch.tensor([[1., 2], [100, 200], [-0.1, -0.2]]), 1),                 # lengths do not count
    (torch.tensor([[1., 0], [0.5, 3**0.5 / 2]]), 0.25),                     # 60 degrees
    (torch.tensor([[1., 0], [1, 0], [0, 1]]), 1 / 3),       # of the 6 pairs with j ≠ i, 2 are parallel
    (torch.randn(1, 7), 0)])
def test_pulling_away_term(S, expected):
    value = pulling_away(S)
    assert value.shape == ()
    torch.testing.assert_close(value, torch.tensor(float(expected)), rtol=1e-5, atol=1e-6)


def test_pulling_away_is_the_double_sum():
    S = np.random.default_rng(0).normal(size=(7, 5))
    N = len(S)
    total = sum((S[i] @ S[j] / np.linalg.norm(S[i]) / np.linalg.norm(S[j])) ** 2
                for i in range(N) for j in range(N) if j != i)
    np.testing.assert_allclose(pulling_away(torch.tensor(S)), total / (N * (N - 1)))


def test_a_step_down_the_pulling_away_term_pulls_codes_apart():
    S = torch.tensor([[1., 0.2], [1, -0.2]], requires_grad=True)
    (grad,) = torch.autograd.grad(pulling_away(S), S)
    before, after = pulling_away(S), pulling_away(S - 0.1 * grad)
    assert after < before and torch.autograd.gradcheck(pulling_away, torch.randn(4, 3, dtype=torch.double,
                                                                                requires_grad=True))


# ---- The networks ----

def test_the_autoencoders_layers():
    D = Discriminator(3, 64, 64)
    def norm(n):
        return [f"BatchNorm2d {n} 1e-05 0.1 True", "LeakyReLU 0.2"]
    assert described(D.encode) == ["3-64 k4 s2 p1", "LeakyReLU 0.2", "64-128 k4 s2 p1", *norm(128),
                                   "128-256 k4 s2 p1", *norm(256)]
    assert described(D.decode) == ["256-128 k4 s2 p1", *norm(128), "128-64 k4 s2 p1", *norm(64),
                                   "64-3 k4 s2 p1", "Tanh"]


def test_both_networks_are_initialised_as_dcgan():
    torch.manual_seed(0)
    assert_dcgan_initialisation(Generator(100, 1, 32, 64), Discriminator(1, 32, 64))


# ---- Two whole iterations against numpy ----

SETTINGS = dict(margin=10.0, pt=0.1, lr=1e-3, beta1=0.5, beta2=0.999, batch_size=64)


def pulling_away_and_slope(S):
    """f_PT and its derivative by every code, in numpy"""
    N, length = len(S), np.linalg.norm(S, axis=1, keepdims=True)
    U = S / length
    cos = U @ U.T - np.eye(N) * (U @ U.T)
    by_U = 4 * cos @ U / (N * (N - 1))
    return (cos**2).sum() / (N * (N - 1)), (by_U - (by_U * U).sum(1, keepdims=True) * U) / length


@pytest.mark.parametrize("changed", [
    {}, dict(margin=1.2, pt=3.0, lr=0.01, beta1=0.2, beta2=0.8, batch_size=5)])
def test_three_iterations_equal_numpy(monkeypatch, changed):
    drawn = Drawn(monkeypatch, ebgan, Generator=LinearGenerator, Discriminator=LinearAutoencoder)
    # {}: the defaults of train() are those that SETTINGS repeats
    G, D = ebgan.train(**changed, steps=3, nz=3, device="cpu", out="run", save_every=1)

    k = {**SETTINGS, **changed}
    m, margin = k["batch_size"], k["margin"]
    A, b, E, F = A0, B0, LinearAutoencoder.E0, LinearAutoencoder.F0
    real, latent = drawn.real(), drawn["randn"]
    adam = {name: Adam(k["lr"], k["beta1"], k["beta2"]) for name in ("E", "F", "A", "b")}
    rows, inside = [], []
    for step in range(3):
        x, z = next(real), next(latent)                     # one z a step
        x_tilde = z @ A.T + b
        g_E, g_F = 0, 0
        e_x = np.linalg.norm(x @ E.T @ F.T - x, axis=1)
        e_x_tilde = np.linalg.norm(x_tilde @ E.T @ F.T - x_tilde, axis=1)
        hinge = np.maximum(margin - e_x_tilde, 0)
        # Image by image: those beyond the margin have no part in the gradient.
        weights = np.concatenate([np.ones(m), -1.0 * (hinge > 0)]) / m
        for image, e, weight in zip(np.concatenate([x, x_tilde]), np.concatenate([e_x, e_x_tilde]), weights):
            r = (F @ E @ image - image) / e
            g_F = g_F + weight * np.outer(r, E @ image)
            g_E = g_E + weight * np.outer(F.T @ r, image)
        inside.append((hinge > 0).mean())
        E, F = adam["E"].step(E, g_E), adam["F"].step(F, g_F)               # D first, then G against the new D

        M, S = F @ E - np.eye(4), x_tilde @ E.T
        f_PT, by_S = pulling_away_and_slope(S)
        e = np.linalg.norm(x_tilde @ M.T, axis=1)
        rows.append([(e_x + hinge).mean(), e.mean() + k["pt"] * f_PT, e_x.mean(), e_x_tilde.mean(), f_PT])
        down = x_tilde @ M.T @ M / e[:, None] / m + k["pt"] * by_S @ E
        A, b = adam["A"].step(A, down.T @ z), adam["b"].step(b, down.sum(0))

    if "margin" in changed:
        assert 0 < inside[2] < 1                            # the hinge is on for some images and off for others
    assert not any(list(rest) for rest in (real, latent))   # every number drawn was used, each once
    np.testing.assert_allclose(D.E.detach(), E, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(D.F.detach(), F, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(G.A.detach(), A, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(G.b.detach(), b, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(logged("run", "L_D", "L_G", "energy_real", "energy_fake", "f_PT"), rows, rtol=2e-4)
    np.testing.assert_allclose(D.E.grad, g_E, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(G.A.grad, down.T @ z, rtol=1e-3, atol=1e-5)
    # Adam hides the scale of a gradient in the weights, not in its second moment.
    saved = ebgan.read("run")
    np.testing.assert_allclose(saved["opt_D"]["state"][0]["exp_avg_sq"], adam["E"].v, rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(saved["opt_G"]["state"][1]["exp_avg_sq"], adam["b"].v, rtol=1e-3, atol=1e-9)
    # D sees constants, x and x_tilde in passes of their own, then, once, images with a history: code and energy
    # come from one pass.
    assert LinearAutoencoder.seen == 3 * [False, False, True]


def test_beyond_the_margin_generated_images_have_no_part_in_Ds_gradient(monkeypatch):
    grads = []
    for margin in (0.0, 1e6):
        drawn = Drawn(monkeypatch, ebgan, Generator=LinearGenerator, Discriminator=LinearAutoencoder)
        _, D = ebgan.train(margin=margin, steps=1, nz=3, lr=0.0, device="cpu", out=f"run{margin}")
        grads.append(D.E.grad.double().numpy())
    E, F = D.E0, D.F0
    alone = sum(np.outer(F.T @ (F @ E @ x - x) / np.linalg.norm(F @ E @ x - x), x) for x in next(drawn.real())) / 64
    np.testing.assert_allclose(grads[0], alone, rtol=1e-4, atol=1e-6)
    assert abs(grads[1] - alone).max() > 0.01
