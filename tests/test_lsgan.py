"""lsgan.py against the paper: losses at chosen outputs, the networks, and an iteration against numpy"""
import numpy as np
import pytest
import torch
from torch import nn

import lsgan
from lsgan import Discriminator, Generator
from truth import (A0, B0, Adam, Drawn, LinearGenerator, QuadraticCritic, assert_dcgan_initialisation, dcgan_critic,
                   described, logged)


# ---- The networks ----

def test_the_discriminator_is_dcgans_and_ends_linear():
    assert described(Discriminator(3, 32, 16)) == dcgan_critic()


def test_both_networks_are_initialised_as_dcgan():
    torch.manual_seed(0)
    assert_dcgan_initialisation(Generator(100, 1, 32, 64), Discriminator(1, 32, 64))


# ---- The losses at chosen outputs ----

def losses(monkeypatch, real, fake, **labels):
    """L_D and L_G of a D that gives every real image one number and every generated one another"""
    class Constant(nn.Module):
        def __init__(self, *_):
            super().__init__()
            self.zero, self.calls = nn.Parameter(torch.zeros(())), 0

        def forward(self, x):
            self.calls += 1
            return self.zero + (real if self.calls == 1 else fake) + 0 * x.flatten(1).sum(1)
    monkeypatch.setattr(lsgan, "Discriminator", Constant)
    out = f"run{real}{fake}{labels}"
    lsgan.train(**labels, digit=7, steps=1, lr=0.0, size=16, width=1, nz=2, batch_size=4, device="cpu", out=out)
    return logged(out, "L_D", "L_G")[0].tolist()


@pytest.mark.parametrize("real, fake, labels, expected", [
    (1, 0, {}, (0, 0.5)),                                   # (9), 0-1 coding: D is right, G has half a square to go
    (0.5, 0.5, {}, (0.25, 0.125)),                          # p_g = p_d: the best D says (a + b) / 2
    (0, 1, {}, (1, 0)), (3, -2, {}, (4, 4.5)),              # linear: above 1 and below 0, and no farther than that
    (0, 0, dict(a=-1.0, b=1.0, c=0.0), (1, 0)),             # (8), Pearson: p_g = p_d
    (1, -1, dict(a=-1.0, b=1.0, c=0.0), (0, 0.5)),
    (2, 3, dict(a=7.0, b=4.0, c=-1.0), (2 + 8, 8))])
def test_losses_at_chosen_outputs(monkeypatch, real, fake, labels, expected):
    np.testing.assert_allclose(losses(monkeypatch, real, fake, **labels), expected, atol=1e-7)


def test_the_theorem_in_the_docstring():
    """2 C(G) = χ²_Pearson(p_d + p_g ‖ 2 p_g) with the labels -1, 1, 0 and the term that (4) adds, and not with
    0, 1, 1: two distributions over five points"""
    rng = np.random.default_rng(0)
    p_d, p_g = rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(5))

    def C(a, b, c):
        D = (b * p_d + a * p_g) / (p_d + p_g)               # minimises (2) at every point:
        for shifted in (D + 1e-3, D - 1e-3):
            assert (p_d * (shifted - b) ** 2 + p_g * (shifted - a) ** 2 > p_d * (D - b)**2 + p_g * (D - a)**2).all()
        return (p_d * (D - c) ** 2 + p_g * (D - c) ** 2).sum() / 2
    chi2 = (((2 * p_g) - (p_d + p_g)) ** 2 / (p_d + p_g)).sum()
    np.testing.assert_allclose(2 * C(-1, 1, 0), chi2)
    assert abs(2 * C(0, 1, 1) - chi2) > 0.05


# ---- Two whole iterations against numpy ----

SETTINGS = dict(a=0.0, b=1.0, c=1.0, lr=2e-4, beta1=0.5, beta2=0.999, batch_size=64)


@pytest.mark.parametrize("changed", [{}, dict(a=-1.0, b=1.0, c=0.0),
                                     dict(a=0.3, b=-0.7, c=2.0, lr=0.01, beta1=0.2, beta2=0.8, batch_size=4)])
def test_two_iterations_equal_numpy(monkeypatch, changed):
    drawn = Drawn(monkeypatch, lsgan, Generator=LinearGenerator, Discriminator=QuadraticCritic)
    # {}: the defaults of train() are those of the paper, which SETTINGS repeats
    G, D = lsgan.train(**changed, steps=2, nz=3, device="cpu", out="run", save_every=1)

    k = {**SETTINGS, **changed}
    m, a, b, c = k["batch_size"], k["a"], k["b"], k["c"]
    A, bias, w = A0, B0, np.array(QuadraticCritic.start)
    real, latent = drawn.real(), drawn["randn"]
    adam = {name: Adam(k["lr"], k["beta1"], k["beta2"]) for name in ("w", "A", "bias")}
    rows = []
    for _ in range(2):
        x, z = next(real), next(latent)                     # one z a step
        x_tilde = z @ A.T + bias
        score = lambda x: x @ w[:4] + w[4] / 2 * (x**2).sum(1)
        slope = lambda x: np.column_stack([x, (x**2).sum(1) / 2])           # of the score, by w
        L_D = ((score(x) - b) ** 2 / 2 + (score(x_tilde) - a) ** 2 / 2).mean()
        g_w = ((score(x) - b)[:, None] * slope(x) + (score(x_tilde) - a)[:, None] * slope(x_tilde)).mean(0)
        w = adam["w"].step(w, g_w)                          # D first, then G against the new D
        rows.append([L_D, ((score(x_tilde) - c) ** 2 / 2).mean()])
        down = (score(x_tilde) - c)[:, None] * (w[:4] + w[4] * x_tilde) / m
        A, bias = adam["A"].step(A, down.T @ z), adam["bias"].step(bias, down.sum(0))

    assert not any(list(rest) for rest in (real, latent))   # every number drawn was used, each once
    np.testing.assert_allclose(np.append(D.a.detach(), D.s.detach()), w, rtol=1e-5)
    np.testing.assert_allclose(G.A.detach(), A, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(G.b.detach(), bias, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(logged("run", "L_D", "L_G"), rows, rtol=2e-5)
    np.testing.assert_allclose(np.append(D.a.grad, D.s.grad), g_w, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(G.A.grad, down.T @ z, rtol=1e-3, atol=1e-6)
    # Adam hides the scale of a gradient in the weights, not in its second moment: the ½ on both losses.
    saved = lsgan.read("run")
    np.testing.assert_allclose(saved["opt_D"]["state"][0]["exp_avg_sq"], adam["w"].v[:4], rtol=1e-4)
    np.testing.assert_allclose(saved["opt_G"]["state"][1]["exp_avg_sq"], adam["bias"].v, rtol=1e-4)
    # D sees constants, x and x_tilde in passes of their own, then images with a history.
    assert [what[:2] for what in QuadraticCritic.seen] == 2 * [(False, True), (False, True), (True, False)]
