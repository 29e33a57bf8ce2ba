"""wgan.py, wgan_gp.py, lsgan.py and ebgan.py against their papers: layers, terms in closed form, and iterations
against numpy: of train() with its defaults, whose numbers here are the paper's, and with all of them changed"""
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch import nn

import ebgan
import lsgan
import progan
import wgan
import wgan_gp
from ebgan import energy, pulling_away
from truth import (Adam, Drawn, LinearAutoencoder, LinearGenerator, QuadraticCritic, RMSProp,
                   assert_dcgan_initialisation, assert_left, described, logged, norm)
from wgan_gp import grad_norm

SECOND = {wgan: wgan.Critic, wgan_gp: wgan_gp.Critic, lsgan: lsgan.Discriminator, ebgan: ebgan.Discriminator}
image, by_theta = LinearGenerator.image, LinearGenerator.by_theta
score, by_w, by_x = QuadraticCritic.score, QuadraticCritic.by_w, QuadraticCritic.by_x


@pytest.fixture(params=SECOND, ids=lambda script: script.__name__)
def script(request):
    return request.param


# ---- The networks ----

@pytest.mark.parametrize("size, channels", [(16, 3), (32, 1), (64, 3), (128, 1), (256, 1)])
def test_shapes_and_range(script, size, channels):
    G, D = script.Generator(7, channels, size, 2), SECOND[script](channels, size, 2)
    x = G(torch.randn(3, 7))
    assert x.shape == (3, channels, size, size) and x.abs().max() <= 1
    if script is ebgan:
        S = D.encode(x)
        assert S.shape == (3, 8, size // 8, size // 8)
        assert torch.equal(D(x), D.decode(S)) and D(x).shape == x.shape and D(x).abs().max() <= 1
        D.eval()                                            # by running statistics that differ from 0 and 1
        alone = torch.stack([torch.linalg.vector_norm(D(each[None]) - each) for each in x])
        for e in energy(D, x), energy(D, x, D.encode(x)):
            torch.testing.assert_close(e, alone)
    else:
        assert D(x).shape == (3,)
        widths = [layer.out_channels for layer in D if isinstance(layer, nn.Conv2d)]
        assert widths == [2 * 2**i for i in range(len(widths))] and D[-2].in_features == 16 * widths[-1]


def test_other_sizes_are_refused(script):
    for size in 0, 8, 33, 48, 512:
        with pytest.raises(ValueError, match=f"--size .* not {size}"):
            script.Generator(100, 1, size, 4)


def test_the_generators_layers_are_those_of_dcgan(script):
    assert described(script.Generator(100, 3, 32, 16)) == [
        "Unflatten", "100-64 k4 s1 p0", *norm(64, "ReLU"), "64-32 k4 s2 p1", *norm(32, "ReLU"),
        "32-16 k4 s2 p1", *norm(16, "ReLU"), "16-3 k4 s2 p1", "Tanh"]
    for size, n in ((64, 3_576_704), (32, 1_068_928)):      # parameters of the first WGAN's networks
        assert sum(p.numel() for p in script.Generator(100, 3, size, 64).parameters()) == n


@pytest.mark.parametrize("script", [wgan, lsgan])
def test_the_critic_is_dcgans_and_ends_linear(script):
    assert described(SECOND[script](3, 32, 16)) == [
        "3-16 k4 s2 p1", "LeakyReLU 0.2", "16-32 k4 s2 p1", *norm(32, "LeakyReLU 0.2"),
        "32-64 k4 s2 p1", *norm(64, "LeakyReLU 0.2"), "Flatten", "Linear 1024-1", "Flatten"]
    for size, n in ((64, 2_765_568), (32, 663_296)):
        assert sum(p.numel() for p in SECOND[script](3, size, 64).parameters()) == n


def test_wgan_gps_critic_has_biases_and_no_batch_norm_and_ends_linear():
    assert described(wgan_gp.Critic(3, 32, 16)) == [
        "3-16 k4 s2 p1+bias", "LeakyReLU 0.2", "16-32 k4 s2 p1+bias", "LeakyReLU 0.2",
        "32-64 k4 s2 p1+bias", "LeakyReLU 0.2", "Flatten", "Linear 1024-1+bias", "Flatten"]


def test_the_autoencoders_layers():
    D = ebgan.Discriminator(3, 64, 64)
    assert described(D.encode) == [
        "3-64 k4 s2 p1", "LeakyReLU 0.2", "64-128 k4 s2 p1", *norm(128, "LeakyReLU 0.2"),
        "128-256 k4 s2 p1", *norm(256, "LeakyReLU 0.2")]
    assert described(D.decode) == [
        "256-128 k4 s2 p1", *norm(128, "LeakyReLU 0.2"), "128-64 k4 s2 p1", *norm(64, "LeakyReLU 0.2"),
        "64-3 k4 s2 p1", "Tanh"]


@pytest.mark.parametrize("script", [wgan, lsgan, ebgan])
def test_networks_are_initialised_as_dcgan(script):
    torch.manual_seed(0)
    assert_dcgan_initialisation(script.Generator(100, 1, 32, 64), SECOND[script](1, 32, 64))


def test_wgan_gps_networks_keep_torchs_initialisation():
    torch.manual_seed(0)
    for layer in [*wgan_gp.Generator(100, 1, 32, 16), *wgan_gp.Critic(1, 32, 16)]:
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            bound = (layer.weight.shape[1] * 16) ** -0.5    # kaiming_uniform with a = √5: ±1/√(fan in)
            assert 0.9 * bound < layer.weight.abs().max() <= bound


# ---- WGAN ----

@pytest.mark.parametrize("changed, clipped", [({}, 5), (dict(lr=3e-3, c=0.5, n_critic=3, batch_size=4), 2)])
def test_two_iterations_of_wgan_equal_numpy(monkeypatch, changed, clipped):
    drawn = Drawn(monkeypatch, wgan, Generator=LinearGenerator, Critic=QuadraticCritic)
    G, D = wgan.train(**changed, steps=2, nz=3, device="cpu", out="run", save_every=1)

    k = dict(lr=5e-5, c=0.01, n_critic=5, batch_size=64) | changed
    theta, w = LinearGenerator.start, QuadraticCritic.start
    real, latent = drawn.real(), drawn["randn"]
    opt_G, opt_D = RMSProp(), RMSProp()
    rows, was_clipped, was_not = [], set(), 0
    for _ in range(2):
        for _ in range(k["n_critic"]):
            x, x_tilde = next(real), image(theta, next(latent))
            estimate = score(w, x).mean() - score(w, x_tilde).mean()
            w = w + k["lr"] * opt_D.direction((by_w(x) - by_w(x_tilde)).mean(0))
            was_clipped |= set(np.flatnonzero(abs(w) > k["c"]))
            was_not += (abs(w) < k["c"]).sum()
            w = np.clip(w, -k["c"], k["c"])
        z = next(latent)
        x_tilde = image(theta, z)
        rows.append(dict(L_D=-estimate, L_G=-score(w, x_tilde).mean(), wasserstein=estimate))
        theta = theta - k["lr"] * opt_G.direction(by_theta(-by_x(w, x_tilde) / k["batch_size"], z))

    assert len(was_clipped) >= clipped and was_not          # both kinds of weights are among those compared
    assert_left(wgan, rows, (real, latent), G=(G, theta, opt_G), D=(D, w, opt_D))
    # D sees constants, x and x_tilde in passes of their own, then images with a history. After the first
    # update no weight that D scores with is above c: the clip comes after the update.
    seen = [what[:2] for what in QuadraticCritic.seen]
    assert seen == 2 * (2 * k["n_critic"] * [(False, True)] + [(True, False)])
    assert all(largest <= np.float32(k["c"]) for _, _, largest in QuadraticCritic.seen[2:])


def test_the_clip_reaches_every_weight_of_the_critic_batch_norms_too_and_not_the_generators(monkeypatch):
    Drawn(monkeypatch, wgan, side=16)
    G, D = wgan.train(steps=1, n_critic=1, size=16, width=4, nz=5, device="cpu", out="run")
    for p in D.parameters():
        assert p.abs().max() <= np.float32(0.01)
    assert (D[3].weight == np.float32(0.01)).all() and D[0].weight.abs().max() == np.float32(0.01)
    assert G[1].weight.abs().max() > 0.03


@pytest.mark.parametrize("script, settings", [(wgan, dict(c=9.0)), (wgan_gp, dict(lam=0.0))])
def test_a_critic_step_raises_the_difference_and_a_generator_step_the_fakes_score(monkeypatch, script, settings):
    """The signs, on the real networks: the definition of the game, whatever the code looks like"""
    drawn = Drawn(monkeypatch, script, side=16)
    settings |= dict(steps=1, n_critic=1, size=16, width=4, nz=5, device="cpu")
    G0, D0 = script.train(**settings, lr=0.0, out="start")              # where the second run starts, too
    G, D = script.train(**settings, lr=1e-3, out="run")
    x, z = drawn.images / 127.5 - 1, torch.randn(64, 5)
    with torch.no_grad():
        assert D(x).mean() - D(G0(z)).mean() > D0(x).mean() - D0(G0(z)).mean()
        assert D(G(z)).mean() > D(G0(z)).mean()


# ---- WGAN-GP ----

def test_gradient_norm_of_a_linear_and_of_a_quadratic_critic_and_where_it_is_zero():
    a, x = torch.randn(3, 8, 8), torch.randn(5, 3, 8, 8) * torch.arange(1., 6.).view(5, 1, 1, 1)
    torch.testing.assert_close(grad_norm(lambda x: (x * a).sum((1, 2, 3)), x), a.norm().expand(5))
    torch.testing.assert_close(grad_norm(lambda x: x.square().sum((1, 2, 3)) / 2, x), x.flatten(1).norm(dim=1))
    a = torch.zeros(3, 8, 8, requires_grad=True)
    norms = grad_norm(lambda x: (x * a).sum((1, 2, 3)), x)
    (norms - 1).square().mean().backward()
    assert torch.equal(norms, torch.zeros(5)) and a.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (1, 2, 3, 4, 5)])
def test_norms_are_over_all_axes_but_the_first_whatever_the_shape(shape):
    x = torch.randn(6, *shape)
    each = x.reshape(6, -1).square().sum(1)                 # of numbers, tables, sequences, voxels
    torch.testing.assert_close(grad_norm(lambda x: x.square().reshape(6, -1).sum(1) / 2, x), each.sqrt())
    torch.testing.assert_close(progan.grad_norm(lambda x, *_: x.square().sum() / 2, x, 4, 1.0), each.sqrt())
    D = Namespace(encode=lambda x: 3 * x, decode=lambda S: S)
    torch.testing.assert_close(energy(D, x), 2 * each.sqrt())


def test_gradient_norm_is_each_images_own_whatever_else_is_in_the_batch():
    torch.manual_seed(0)
    D, x = wgan_gp.Critic(3, 32, 4), torch.rand(6, 3, 32, 32) * 2 - 1
    alone = torch.cat([grad_norm(D, x[i:i + 1]) for i in range(6)])
    assert alone.std() > 1e-3 * alone.mean()                # otherwise the comparison would show nothing
    torch.testing.assert_close(grad_norm(D, x), alone, rtol=1e-4, atol=1e-7)


def test_the_critics_slopes_are_constants_and_those_of_leaky_relu():
    x = torch.tensor([-3.0, -1e-30, -0.0, 0.0, 1e-30, 2.0], requires_grad=True)
    assert torch.equal(wgan_gp.LeakyReLU()(x), nn.functional.leaky_relu(x, 0.2))
    (grad,) = torch.autograd.grad(wgan_gp.LeakyReLU()(x).sum(), x, create_graph=True)
    assert torch.equal(grad, torch.tensor([0.2, 0.2, 0.2, 0.2, 1.0, 1.0])) and not grad.requires_grad


def test_the_penalty_reaches_the_critics_weights_and_not_the_images():
    a = torch.tensor(0.5, requires_grad=True)
    x = torch.randn(3, 1, 4, 4, requires_grad=True)
    (grad_norm(lambda x: a / 2 * x.square().sum((1, 2, 3)), x) - 1).square().mean().backward()
    r = x.detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(a.grad, (2 * (a.detach() * r - 1) * r).mean())       # d/da (a ‖x‖ - 1)²
    assert x.grad is None


@pytest.mark.parametrize("changed", [{}, dict(lam=3.0, n_critic=3, lr=0.02, beta1=0.5, beta2=0.7, batch_size=4)])
def test_two_iterations_of_wgan_gp_equal_numpy(monkeypatch, changed):
    drawn = Drawn(monkeypatch, wgan_gp, Generator=LinearGenerator, Critic=QuadraticCritic)
    G, D = wgan_gp.train(**changed, steps=2, nz=3, device="cpu", out="run", save_every=1)

    k = dict(lam=10.0, n_critic=5, lr=1e-4, beta1=0.0, beta2=0.9, batch_size=64) | changed
    theta, w = LinearGenerator.start, QuadraticCritic.start
    real, latent, uniform = drawn.real(), drawn["randn"], drawn["rand"]
    opt_G, opt_D = (Adam(k["lr"], k["beta1"], k["beta2"]) for _ in range(2))
    rows = []
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

    assert_left(wgan_gp, rows, (real, latent, uniform), rtol=2e-6, G=(G, theta, opt_G), D=(D, w, opt_D))
    # D sees a leaf that wants a gradient (x_hat), then constants (x_tilde, x); in G's step, images with a history.
    seen = [what[:2] for what in QuadraticCritic.seen]
    assert seen == 2 * (k["n_critic"] * [(True, True), (False, True), (False, True)] + [(True, False)])


# ---- LSGAN ----

@pytest.mark.parametrize("real, fake, labels, expected", [
    (1, 0, {}, (0, 0.5)),                                   # (9), 0-1 coding: D is right, G has half a square to go
    (0.5, 0.5, {}, (0.25, 0.125)),                          # p_g = p_d: the best D says (a + b) / 2
    (0, 1, {}, (1, 0)), (3, -2, {}, (4, 4.5)),              # linear: above 1 and below 0, and no farther than that
    (0, 0, dict(a=-1.0, b=1.0, c=0.0), (1, 0)),             # (8), Pearson: p_g = p_d
    (1, -1, dict(a=-1.0, b=1.0, c=0.0), (0, 0.5)),
    (2, 3, dict(a=7.0, b=4.0, c=-1.0), (2 + 8, 8))])
def test_lsgans_losses_where_D_gives_all_real_images_one_number_and_all_fakes_another(
        monkeypatch, real, fake, labels, expected):
    outputs = iter([real, fake, fake])                      # D(x); D(x_tilde) in D's step and in G's
    monkeypatch.setattr(QuadraticCritic, "forward", lambda D, x: next(outputs) + 0 * (x.flatten(1) @ D.a + D.s))
    Drawn(monkeypatch, lsgan, Generator=LinearGenerator, Discriminator=QuadraticCritic)
    lsgan.train(**labels, steps=1, lr=0.0, nz=3, batch_size=4, device="cpu", out="run")
    np.testing.assert_allclose(logged("run", "L_D", "L_G")[0], expected, atol=1e-7)


@pytest.mark.parametrize("changed", [{}, dict(a=0.3, b=-0.7, c=2.0, lr=0.01, beta1=0.2, beta2=0.8, batch_size=4)])
def test_two_iterations_of_lsgan_equal_numpy(monkeypatch, changed):
    drawn = Drawn(monkeypatch, lsgan, Generator=LinearGenerator, Discriminator=QuadraticCritic)
    G, D = lsgan.train(**changed, steps=2, nz=3, device="cpu", out="run", save_every=1)

    k = dict(a=0.0, b=1.0, c=1.0, lr=2e-4, beta1=0.5, beta2=0.999, batch_size=64) | changed
    theta, w = LinearGenerator.start, QuadraticCritic.start
    real, latent = drawn.real(), drawn["randn"]
    opt_G, opt_D = (Adam(k["lr"], k["beta1"], k["beta2"]) for _ in range(2))
    rows = []
    for _ in range(2):
        x, z = next(real), next(latent)                     # one z a step
        x_tilde = image(theta, z)
        off, off_tilde = score(w, x) - k["b"], score(w, x_tilde) - k["a"]
        w = opt_D.step(w, (off[:, None] * by_w(x) + off_tilde[:, None] * by_w(x_tilde)).mean(0))
        off_G = score(w, x_tilde) - k["c"]                  # D first, then G against the new D
        rows.append(dict(L_D=(off**2 / 2 + off_tilde**2 / 2).mean(), L_G=(off_G**2 / 2).mean()))
        theta = opt_G.step(theta, by_theta(off_G[:, None] * by_x(w, x_tilde) / k["batch_size"], z))

    assert_left(lsgan, rows, (real, latent), G=(G, theta, opt_G), D=(D, w, opt_D))
    # D sees constants, x and x_tilde in passes of their own, then images with a history.
    assert [what[:2] for what in QuadraticCritic.seen] == 2 * [(False, True), (False, True), (True, False)]


# ---- EBGAN: the energy (13) ----

def fixed(factor):
    """An autoencoder that returns factor times its input"""
    return Namespace(encode=nn.Identity(), decode=lambda S: factor * S)


def test_energy_is_the_norm_of_each_images_residual_and_its_gradient_is_finite_at_zero():
    x = torch.randn(5, 3, 8, 8) * torch.arange(1., 6.).view(5, 1, 1, 1)
    for factor in 1.0, 0.0, -1.0, 3.0:
        torch.testing.assert_close(energy(fixed(factor), x), abs(factor - 1) * x.flatten(1).norm(dim=1))
    assert energy(fixed(0.0), torch.ones(2, 1, 32, 32)).tolist() == [32, 32]     # √1024, as are the margins
    e = energy(fixed(1.0), x.requires_grad_())
    (grad,) = torch.autograd.grad(e.sum(), x)
    assert torch.equal(e, torch.zeros(5)) and grad.isfinite().all()


@pytest.mark.parametrize("code", ["known", "not known"])
def test_the_energys_gradient_flows_through_both_occurrences_of_the_image(code):
    D, x = LinearAutoencoder(), torch.randn(3, 1, 2, 2, requires_grad=True)
    e = energy(D, x, D.encode(x)) if code == "known" else energy(D, x)
    (grad,) = torch.autograd.grad(e.sum(), x)
    E, F = D.split(D.start)
    M, flat = F @ E - np.eye(4), x.detach().double().flatten(1).numpy()     # e = ‖M x‖, de/dx = Mᵀ M x / e
    np.testing.assert_allclose(grad.flatten(1), flat @ M.T @ M / np.linalg.norm(flat @ M.T, axis=1)[:, None],
                               rtol=1e-5, atol=1e-6)


# ---- EBGAN: the pulling-away term (14) ----

@pytest.mark.parametrize("S, expected", [
    (torch.eye(6), 0), (5 * torch.eye(6)[:4], 0),           # orthogonal
    (torch.ones(5, 3), 1), (torch.tensor([[1., 2], [-1, -2]]), 1),          # equal; opposite: the square
    (torch.tensor([[1., 2], [100, 200], [-0.1, -0.2]]), 1),                 # lengths do not count
    (torch.tensor([[1., 0], [0.5, 3**0.5 / 2]]), 0.25),                     # 60 degrees
    (torch.tensor([[1., 0], [1, 0], [0, 1]]), 1 / 3),       # of the 6 pairs with j ≠ i, 2 are parallel
    (torch.randn(1, 7), 0)])
def test_pulling_away_term(S, expected):
    torch.testing.assert_close(pulling_away(S), torch.tensor(float(expected)), rtol=1e-5, atol=1e-6)


def pulling_away_and_slope(S):
    """f_PT and its derivative by every code, in numpy"""
    N, length = len(S), np.linalg.norm(S, axis=1, keepdims=True)
    U = S / length
    cos = U @ U.T - np.eye(N) * (U @ U.T)
    by_U = 4 * cos @ U / (N * (N - 1))
    squares = [(U[i] @ U[j]) ** 2 for i in range(N) for j in range(N) if j != i]
    return sum(squares) / (N * (N - 1)), (by_U - (by_U * U).sum(1, keepdims=True) * U) / length


# ---- EBGAN ----

@pytest.mark.parametrize("changed", [{}, dict(margin=1.2, pt=3.0, lr=0.01, beta1=0.2, beta2=0.8, batch_size=5)])
def test_three_iterations_of_ebgan_equal_numpy(monkeypatch, changed):
    drawn = Drawn(monkeypatch, ebgan, Generator=LinearGenerator, Discriminator=LinearAutoencoder)
    G, D = ebgan.train(**changed, steps=3, nz=3, device="cpu", out="run", save_every=1)

    k = dict(margin=10.0, pt=0.1, lr=1e-3, beta1=0.5, beta2=0.999, batch_size=64) | changed
    theta, w, m = LinearGenerator.start, LinearAutoencoder.start, k["batch_size"]
    real, latent = drawn.real(), drawn["randn"]
    opt_G, opt_D = (Adam(k["lr"], k["beta1"], k["beta2"]) for _ in range(2))
    rows = []
    for _ in range(3):
        x, z = next(real), next(latent)                     # one z a step
        x_tilde = image(theta, z)
        E, F = LinearAutoencoder.split(w)
        e_x = np.linalg.norm(x @ E.T @ F.T - x, axis=1)
        e_x_tilde = np.linalg.norm(x_tilde @ E.T @ F.T - x_tilde, axis=1)
        hinge = np.maximum(k["margin"] - e_x_tilde, 0)
        # Image by image: those beyond the margin have no part in the gradient.
        weights = np.concatenate([np.ones(m), -1.0 * (hinge > 0)]) / m
        g_E, g_F = 0, 0
        for each, e, weight in zip(np.concatenate([x, x_tilde]), np.concatenate([e_x, e_x_tilde]), weights):
            r = (F @ E @ each - each) / e
            g_E = g_E + weight * np.outer(F.T @ r, each)
            g_F = g_F + weight * np.outer(r, E @ each)
        w = opt_D.step(w, np.append(g_E, g_F))              # D first, then G against the new D

        E, F = LinearAutoencoder.split(w)
        M = F @ E - np.eye(4)
        f_PT, by_S = pulling_away_and_slope(x_tilde @ E.T)
        e = np.linalg.norm(x_tilde @ M.T, axis=1)
        rows.append(dict(L_D=(e_x + hinge).mean(), L_G=e.mean() + k["pt"] * f_PT, energy_real=e_x.mean(),
                         energy_fake=e_x_tilde.mean(), f_PT=f_PT))
        theta = opt_G.step(theta, by_theta(x_tilde @ M.T @ M / e[:, None] / m + k["pt"] * by_S @ E, z))

    if changed:
        assert 0 < (hinge > 0).mean() < 1                   # it is on for some images and off for others
    assert_left(ebgan, rows, (real, latent), rtol=2e-5, of_moments=1e-3, G=(G, theta, opt_G), D=(D, w, opt_D))
    # D sees constants, x and x_tilde in passes of their own, then, once, images with a history: code and energy
    # come from one pass.
    assert LinearAutoencoder.seen == 3 * [False, False, True]
