"""wgan_gp.py against the paper: the penalty in closed form, and Algorithm 1 against numpy"""
import numpy as np
import pytest
import torch
from torch import nn

import wgan_gp
from truth import A0, B0, Adam, Drawn, LinearGenerator, QuadraticCritic, described, logged
from wgan_gp import Critic, Generator, grad_norm


# ---- ‖∇D(x)‖₂ ----

def test_gradient_norm_of_a_linear_critic_is_the_norm_of_its_weights():
    a = torch.randn(3, 8, 8)
    x = torch.randn(5, 3, 8, 8)
    norms = grad_norm(lambda x: (x * a).sum((1, 2, 3)), x)
    assert norms.shape == (5,)
    torch.testing.assert_close(norms, a.norm().expand(5))


def test_gradient_norm_of_half_the_squared_norm_is_the_norm_of_each_image():
    x = torch.randn(5, 3, 8, 8) * torch.arange(1., 6.).view(5, 1, 1, 1)
    torch.testing.assert_close(grad_norm(lambda x: x.square().sum((1, 2, 3)) / 2, x), x.flatten(1).norm(dim=1))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gradient_norm_is_each_images_own_whatever_else_is_in_the_batch(mode):
    torch.manual_seed(0)
    D = getattr(Critic(3, 32, 4), mode)()
    x = torch.rand(6, 3, 32, 32) * 2 - 1
    alone = torch.cat([grad_norm(D, x[i:i + 1]) for i in range(6)])
    assert alone.std() > 1e-3 * alone.mean()                # otherwise the comparison would show nothing
    torch.testing.assert_close(grad_norm(D, x), alone, rtol=1e-4, atol=1e-7)


def test_gradient_norm_is_that_of_finite_differences():
    torch.manual_seed(0)
    D = Critic(1, 16, 2).double()
    x = torch.rand(2, 1, 16, 16, dtype=torch.double)
    basis = torch.eye(256, dtype=torch.double).view(256, 1, 16, 16) * 1e-6
    with torch.no_grad():
        slope = torch.stack([(D(image + basis) - D(image - basis)) / 2e-6 for image in x])
    torch.testing.assert_close(grad_norm(D, x), slope.norm(dim=1), rtol=1e-4, atol=1e-9)


def test_gradient_norm_and_its_derivative_are_finite_where_the_gradient_is_zero():
    a = torch.zeros(1, 4, 4, requires_grad=True)
    norms = grad_norm(lambda x: (x * a).sum((1, 2, 3)), torch.randn(3, 1, 4, 4))
    (norms - 1).square().mean().backward()
    assert torch.equal(norms, torch.zeros(3)) and a.grad.isfinite().all()


def test_penalty_reaches_the_critics_weights_and_not_the_images():
    a = torch.full((1, 4, 4), 0.5, requires_grad=True)      # ‖a‖ = 2
    x = torch.randn(3, 1, 4, 4, requires_grad=True)
    (grad_norm(lambda x: (x * a).sum((1, 2, 3)), x) - 1).square().mean().backward()
    torch.testing.assert_close(a.grad, 2 * (2 - 1) * a.detach() / 2)     # d/da (‖a‖ - 1)² = 2 (‖a‖ - 1) a / ‖a‖
    assert x.grad is None


# ---- The networks ----

def test_the_layers_are_those_of_dcgan_and_the_critic_has_no_batch_norm_and_ends_linear():
    def norm(n):
        return [f"BatchNorm2d {n} 1e-05 0.1 True", "ReLU"]
    assert described(Generator(100, 3, 32, 16)) == [
        "Unflatten", "100-64 k4 s1 p0", *norm(64), "64-32 k4 s2 p1", *norm(32), "32-16 k4 s2 p1", *norm(16),
        "16-3 k4 s2 p1", "Tanh"]
    assert described(Critic(3, 32, 16)) == [
        "3-16 k4 s2 p1+bias", "LeakyReLU 0.2", "16-32 k4 s2 p1+bias", "LeakyReLU 0.2",
        "32-64 k4 s2 p1+bias", "LeakyReLU 0.2", "64-1 k4 s1 p0+bias", "Flatten"]


def test_both_networks_keep_the_default_initialisation():
    torch.manual_seed(0)
    G, D = Generator(100, 1, 32, 16), Critic(1, 32, 16)
    for layer in [*G, *D]:
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            bound = (layer.weight.shape[1] * 16) ** -0.5     # kaiming_uniform with a = √5: ±1/√(fan in)
            assert 0.9 * bound < layer.weight.abs().max() <= bound


# ---- Algorithm 1, two whole iterations, against numpy ----

SETTINGS = dict(lam=10.0, n_critic=5, lr=1e-4, beta1=0.0, beta2=0.9, batch_size=64)


@pytest.mark.parametrize("changed", [{}, dict(lam=3.0, n_critic=3, lr=0.02, beta1=0.5, beta2=0.7, batch_size=4)])
def test_two_iterations_equal_numpy(monkeypatch, changed):
    drawn = Drawn(monkeypatch, wgan_gp, Generator=LinearGenerator, Critic=QuadraticCritic)
    # {}: the defaults of train() are those of the paper, which SETTINGS repeats
    G, D = wgan_gp.train(**changed, steps=2, nz=3, device="cpu", out="run", save_every=1)

    k = {**SETTINGS, **changed}
    m, n_critic, lam = k["batch_size"], k["n_critic"], k["lam"]
    A, b, w = A0, B0, np.array(QuadraticCritic.start)        # w: a and s
    real, latent, uniform = drawn.real(), drawn["randn"], drawn["rand"]
    adam = {name: Adam(k["lr"], k["beta1"], k["beta2"]) for name in ("w", "A", "b")}
    rows = []
    for _ in range(2):
        for _ in range(n_critic):
            x, z, eps = next(real), next(latent), next(uniform).reshape(m, 1)
            x_tilde = z @ A.T + b
            x_hat = eps * x + (1 - eps) * x_tilde
            a, s = w[:4], w[4]
            grad = a + s * x_hat
            norm = np.sqrt((grad**2).sum(1))
            score = lambda x: x @ a + s / 2 * (x**2).sum(1)
            L = score(x_tilde) - score(x) + lam * (norm - 1) ** 2
            pull = (2 * lam * (norm - 1) / norm)[:, None] * grad
            per_image = np.column_stack([
                x_tilde - x + pull,
                (x_tilde**2).sum(1) / 2 - (x**2).sum(1) / 2 + (pull * x_hat).sum(1)])
            estimate = score(x).mean() - score(x_tilde).mean()
            g_w = per_image.mean(0)
            w = adam["w"].step(w, g_w)
        a, s, z = w[:4], w[4], next(latent)
        x_tilde = z @ A.T + b
        L_G = -(x_tilde @ a + s / 2 * (x_tilde**2).sum(1))
        rows.append([L.mean(), L_G.mean(), ((norm - 1) ** 2).mean(), estimate])
        down = -(a + s * x_tilde) / m                        # d/dx_tilde of 1/m Σ -D(x_tilde)
        A, b = adam["A"].step(A, down.T @ z), adam["b"].step(b, down.sum(0))

    assert not any(list(rest) for rest in (real, latent, uniform))     # every number drawn was used, each once
    np.testing.assert_allclose(np.append(D.a.detach(), D.s.detach()), w, rtol=2e-6)
    np.testing.assert_allclose(G.A.detach(), A, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(G.b.detach(), b, rtol=2e-5)
    np.testing.assert_allclose(logged("run", "L_D", "L_G", "penalty", "wasserstein"), rows, rtol=2e-5, atol=1e-6)
    # What is left in .grad is the last gradient of each line: nothing leaks from one network's step to the other.
    np.testing.assert_allclose(np.append(D.a.grad, D.s.grad), g_w, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(G.A.grad, down.T @ z, rtol=1e-3, atol=1e-6)
    # Adam hides the scale of a gradient in the weights, not in its second moment.
    saved = wgan_gp.read("run")
    np.testing.assert_allclose(saved["opt_D"]["state"][0]["exp_avg_sq"], adam["w"].v[:4], rtol=1e-4)
    np.testing.assert_allclose(saved["opt_G"]["state"][1]["exp_avg_sq"], adam["b"].v, rtol=1e-4)
    # D sees constants (x_tilde, x), then a leaf that wants a gradient (x_hat); in G's step, images with a history.
    seen = [what[:2] for what in QuadraticCritic.seen]
    assert seen == 2 * (n_critic * [(True, True), (False, True), (False, True)] + [(True, False)])
