"""related/improved_gan.py against its paper: each technique in closed form, and iterations against numpy"""
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import wgan_gp
from related import improved_gan
from related.improved_gan import Discriminator, Generator, MinibatchDiscrimination, VirtualBatchNorm, distance
from truth import (Adam, Drawn, LinearGenerator, QuadraticCritic, assert_left, described, flat, parameter, read)

image, by_theta = LinearGenerator.image, LinearGenerator.by_theta
score, by_w, by_x = QuadraticCritic.score, QuadraticCritic.by_w, QuadraticCritic.by_x


# ---- §3.2: minibatch discrimination ----

def test_o_in_closed_form():
    layer = MinibatchDiscrimination(4, 3)
    torch.testing.assert_close(layer(torch.ones(5, 4)), torch.tensor([1.0] * 4 + [4] * 3).expand(5, 7))
    torch.testing.assert_close(layer(torch.ones(1, 4))[:, 4:], torch.zeros(1, 3))
    layer = MinibatchDiscrimination(1, 1, 1)
    nn.init.ones_(layer.T)
    f = torch.tensor([[0], [math.log(2)]])
    torch.testing.assert_close(layer(f), torch.cat([f, torch.tensor([[0.5], [0.5]])], 1))


def test_o_is_the_papers_sum_over_the_other_images():
    torch.manual_seed(0)
    layer, f = MinibatchDiscrimination(3, 2).double(), torch.randn(4, 3, dtype=torch.double)
    T = layer.T.detach().numpy()
    M = np.array([[row.numpy() @ T[:, b] for b in range(2)] for row in f])      # (m, B, C)
    o = [[sum(np.exp(-abs(M[i, b] - M[j, b]).sum()) for j in range(4) if j != i) for b in range(2)]
         for i in range(4)]
    assert T.shape == (3, 2, 5)
    torch.testing.assert_close(layer(f), torch.cat([f, torch.tensor(o)], 1))


# ---- §3.3: historical averaging ----

def test_distance_in_closed_form():
    two, four = parameter([[2.0, 3, 0]]), parameter([4.0])
    assert distance([parameter([2.0])], [parameter([1.0])]).item() == 1     # θ = 0, then 2: mean 1
    D = distance([two, four], [torch.tensor([[1.0, 1, 0]]), torch.tensor([1.0])])
    assert D.item() == 1 + 4 + 9                            # a sum over all weights
    (by_two, by_four) = torch.autograd.grad(D, (two, four))
    assert by_two.tolist() == [[2, 4, 0]] and by_four.tolist() == [6]


# ---- §3.5: virtual batch normalisation ----

def of_batch(x, norm):
    """Batch normalisation of x, all of it"""
    return F.batch_norm(x, None, None, norm.gamma, norm.beta, training=True)


def test_virtual_batch_norm_in_closed_form():
    norm, x = VirtualBatchNorm(1, 3), torch.tensor([-1.0, 0, 1, 4]).view(4, 1, 1, 1)
    y = norm(x).flatten()
    torch.testing.assert_close(y, torch.tensor([-1.5**0.5, 0, 1.5**0.5, 3 / 3.5**0.5]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y[3:], of_batch(x, norm).flatten()[3:])


def test_each_example_is_normalised_as_in_a_batch_of_the_reference_and_itself():
    """By moments over examples and pixels, channel by channel"""
    torch.manual_seed(0)
    norm = VirtualBatchNorm(2, 3).double()
    with torch.no_grad():
        norm.gamma.normal_()
        norm.beta.normal_()
    x = torch.randn(3 + 4, 2, 3, 5, dtype=torch.double) * 0.1 + torch.arange(7).view(7, 1, 1, 1)
    alone = [of_batch(torch.cat([x[:3], x[3 + i:4 + i]]), norm)[3:] for i in range(4)]
    y, expected = norm(x), torch.cat([of_batch(x[:3], norm), *alone])
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(norm(torch.cat([x[:3], x[4:6]])), y[[0, 1, 2, 4, 5]])        # whoever is beside


def test_with_vbn_an_image_depends_on_its_z_and_the_reference_alone_in_training_too():
    torch.manual_seed(0)
    G, z = Generator(8, 1, 16, 4), torch.randn(5, 8)
    for mode in True, False:
        x = G.train(mode)(z)
        assert x.shape == (5, 1, 16, 16) and x.std(0).max() > 0.01
        torch.testing.assert_close(G(z[3:4]), x[3:4])
    assert G.reference.shape == (64, 8) and G.reference.std().item() == pytest.approx(1, rel=0.2)
    assert torch.equal(dict(G.named_buffers())["reference"], G.state_dict()["reference"])
    G.reference.normal_()
    assert (G(z) - x).abs().max() > 0.001


# ---- The networks ----

def test_the_networks_are_those_of_wgan_gp():
    with_norm = described(wgan_gp.Generator(100, 3, 32, 16))
    assert described(Generator(100, 3, 32, 16, vbn=False)) == with_norm
    G = Generator(100, 3, 32, 16)
    assert described(G) == ["VirtualBatchNorm" if line[:9] == "BatchNorm" else line for line in with_norm]
    norms = [layer for layer in G if isinstance(layer, VirtualBatchNorm)]
    assert [(len(norm.gamma), len(norm.beta), norm.B) for norm in norms] == [(n, n, 64) for n in (64, 32, 16)]
    D = Discriminator(3, 32, 16)
    assert described(D)[:-4] == described(wgan_gp.Critic(3, 32, 16))[:-3]
    assert described(D)[-4:] == ["Flatten", "MinibatchDiscrimination", "Linear 1074-1+bias", "Flatten"]
    assert D[-3].T.shape == (1024, 50, 5) and D[-3].T.std().item() == pytest.approx(1 / 32, rel=0.02)
    assert D[-2].weight.shape == (1, 1074) and D[-2].bias.shape == (1,)
    assert D(torch.zeros(2, 3, 32, 32)).shape == (2,)


# ---- Iterations ----

@pytest.mark.parametrize("changed", [{}, dict(history=3.0, smooth=0.8, lr=0.02, beta1=0.2, beta2=0.7,
                                              batch_size=4)])
def test_three_iterations_equal_numpy(monkeypatch, changed):
    drawn = Drawn(monkeypatch, improved_gan, Generator=LinearGenerator, Discriminator=QuadraticCritic)
    G, D = improved_gan.train(**changed, steps=3, nz=3, device="cpu", out="run", save_every=1)

    k = dict(history=0.0, smooth=0.9, lr=2e-4, beta1=0.5, beta2=0.999, batch_size=64) | changed
    theta, w, m = LinearGenerator.start, QuadraticCritic.start, k["batch_size"]
    real, latent = drawn.real(), drawn["randn"]
    opt_G, opt_D = (Adam(k["lr"], k["beta1"], k["beta2"]) for _ in range(2))
    rows, thetas, ws = [], [theta], [w]                     # θ[i], the first, too
    for _ in range(3):
        x, x_tilde = next(real), image(theta, next(latent))
        D_x, D_x_tilde = (1 / (1 + np.exp(-score(w, each))) for each in (x, x_tilde))
        L_D = -k["smooth"] * np.log(D_x) - (1 - k["smooth"]) * np.log(1 - D_x) - np.log(1 - D_x_tilde)
        g = ((D_x - k["smooth"])[:, None] * by_w(x) + D_x_tilde[:, None] * by_w(x_tilde)).mean(0)
        w = opt_D.step(w, g + 2 * k["history"] * (w - np.mean(ws, 0)))
        z = next(latent)
        x_tilde = image(theta, z)
        D_x_tilde = 1 / (1 + np.exp(-score(w, x_tilde)))
        rows.append(dict(L_D=L_D.mean(), L_G=-np.log(D_x_tilde).mean()))    # without what weights pay
        g = by_theta((D_x_tilde - 1)[:, None] * by_x(w, x_tilde) / m, z)
        theta = opt_G.step(theta, g + 2 * k["history"] * (theta - np.mean(thetas, 0)))
        thetas.append(theta)
        ws.append(w)

    assert_left(rows, (real, latent), rtol=1e-5, G=(G, theta, opt_G), D=(D, w, opt_D))
    saved = read("run")
    np.testing.assert_allclose(flat(saved["G_mean"].values()), np.mean(thetas, 0), 1e-5, 1e-7)
    np.testing.assert_allclose(flat(saved["D_mean"].values()), np.mean(ws, 0), 1e-5, 1e-7)


@pytest.mark.parametrize("settings, norm, kernels", [
    (dict(), VirtualBatchNorm, 50), (dict(kernels=7), VirtualBatchNorm, 7),
    (dict(vbn=False, minibatch=False), nn.BatchNorm2d, 0)])
def test_the_flags_choose_the_networks(monkeypatch, settings, norm, kernels):
    Drawn(monkeypatch, improved_gan, shape=(1, 16, 16))
    G, D = improved_gan.train(**settings, steps=1, size=16, width=2, nz=8, batch_size=8, device="cpu", out="run")
    x, z = torch.rand(6, 1, 16, 16), torch.randn(5, 8)
    assert type(G[2]) is norm and D[-3].T.shape[1] == kernels
    assert (D(x)[:3] - D(x[:3])).abs().max().gt(0.01) == bool(kernels)     # a batch of others, another score
    assert torch.equal(improved_gan.load("run/checkpoint.pt")(z), G(z))
