"""wgan.py against the paper: the clip, the networks, and Algorithm 1 against numpy"""

import numpy as np
import pytest
import torch

import wgan
from truth import (A0, B0, Drawn, LinearGenerator, QuadraticCritic, RMSProp, assert_dcgan_initialisation,
                   dcgan_critic, described, logged)
from wgan import Critic, Generator


# ---- The networks ----

@pytest.mark.parametrize("size, in_G, in_D", [(64, 3_576_704, 2_765_568), (32, 1_068_928, 663_296)])
def test_as_many_parameters_as_the_authors_networks(size, in_G, in_D):
    assert sum(p.numel() for p in Generator(100, 3, size, 64).parameters()) == in_G
    assert sum(p.numel() for p in Critic(3, size, 64).parameters()) == in_D


def test_the_critic_is_dcgans_and_ends_linear():
    assert described(Critic(3, 32, 16)) == dcgan_critic()


def test_both_networks_are_initialised_as_dcgan():
    torch.manual_seed(0)
    assert_dcgan_initialisation(Generator(100, 1, 32, 64), Critic(1, 32, 64))


# ---- Algorithm 1, two whole iterations, against numpy ----

SETTINGS = dict(lr=5e-5, c=0.01, n_critic=5, batch_size=64)


@pytest.mark.parametrize("changed, clipped", [({}, 5), (dict(lr=3e-3, c=0.5, n_critic=3, batch_size=4), 2)])
def test_two_iterations_equal_numpy(monkeypatch, changed, clipped):
    drawn = Drawn(monkeypatch, wgan, Generator=LinearGenerator, Critic=QuadraticCritic)
    # {}: the defaults of train() are those of the paper, which SETTINGS repeats
    G, D = wgan.train(**changed, steps=2, nz=3, device="cpu", out="run", save_every=1)

    k = {**SETTINGS, **changed}
    m, n_critic, lr, c = k["batch_size"], k["n_critic"], k["lr"], k["c"]
    A, b, w = A0, B0, np.array(QuadraticCritic.start)        # w: a and s
    real, latent = drawn.real(), drawn["randn"]
    rmsprop = {name: RMSProp() for name in ("w", "A", "b")}
    rows, was_clipped, was_not = [], set(), 0
    for _ in range(2):
        for _ in range(n_critic):
            x, z = next(real), next(latent)
            x_tilde = z @ A.T + b
            score = lambda x: x @ w[:4] + w[4] / 2 * (x**2).sum(1)
            estimate = score(x).mean() - score(x_tilde).mean()
            g_w = np.append((x - x_tilde).mean(0), ((x**2).sum(1) - (x_tilde**2).sum(1)).mean() / 2)
            w = w + lr * rmsprop["w"].direction(g_w)
            was_clipped |= set(np.flatnonzero(abs(w) > c))
            was_not += (abs(w) < c).sum()
            w = np.clip(w, -c, c)
        z = next(latent)
        x_tilde = z @ A.T + b
        L_G = -(x_tilde @ w[:4] + w[4] / 2 * (x_tilde**2).sum(1)).mean()
        rows.append([-estimate, L_G, estimate])
        down = -(w[:4] + w[4] * x_tilde) / m                 # d/dx_tilde of -1/m Σ f_w(x_tilde)
        A = A - lr * rmsprop["A"].direction(down.T @ z)
        b = b - lr * rmsprop["b"].direction(down.sum(0))

    assert len(was_clipped) >= clipped and was_not          # both kinds of weights are among those compared
    assert not any(list(rest) for rest in (real, latent))   # every number drawn was used, each once
    np.testing.assert_allclose(np.append(D.a.detach(), D.s.detach()), w, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(G.A.detach(), A, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(G.b.detach(), b, rtol=2e-5)
    np.testing.assert_allclose(logged("run", "L_D", "L_G", "wasserstein"), rows, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(np.append(D.a.grad, D.s.grad), g_w, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(G.A.grad, down.T @ z, rtol=1e-3, atol=1e-6)
    # RMSProp hides the scale of a gradient in the weights, not in its second moment.
    saved = wgan.read("run")
    np.testing.assert_allclose(saved["opt_D"]["state"][0]["square_avg"], rmsprop["w"].v[:4], rtol=1e-4)
    np.testing.assert_allclose(saved["opt_G"]["state"][1]["square_avg"], rmsprop["b"].v, rtol=1e-4)
    # D sees constants, x and x_tilde in passes of their own, then images with a history. After the first
    # update no weight that D scores with is above c: the clip comes after the update.
    assert [what[:2] for what in QuadraticCritic.seen] == 2 * (2 * n_critic * [(False, True)] + [(True, False)])
    assert all(largest <= np.float32(c) for _, _, largest in QuadraticCritic.seen[2:])


def test_the_clip_reaches_every_weight_of_the_critic_batch_norms_too_and_not_the_generators():
    G, D = wgan.train(steps=1, n_critic=1, digit=7, size=16, width=4, nz=5, device="cpu", out="run")
    for p in D.parameters():
        assert p.abs().max() <= np.float32(0.01)
    assert (D[3].weight == np.float32(0.01)).all() and D[0].weight.abs().max() == np.float32(0.01)
    assert G[1].weight.abs().max() > 0.03
