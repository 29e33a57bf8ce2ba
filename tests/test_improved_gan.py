"""related/improved_gan.py against its paper: each technique in closed form, iterations against numpy, the flags"""
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import wgan_gp
from related import improved_gan
from related.improved_gan import Discriminator, Generator, MinibatchDiscrimination, VirtualBatchNorm, distance
from test_related import losses_where_D_says
from truth import Adam, Drawn, LinearGenerator, QuadraticCritic, assert_left, described, flat, logged, parameter

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


def test_the_gradient_of_o_reaches_T_and_all_images_of_the_batch():
    torch.manual_seed(0)
    layer, f = MinibatchDiscrimination(3, 2).double(), torch.randn(4, 3, dtype=torch.double, requires_grad=True)

    def by(f, T):
        return torch.func.functional_call(layer, dict(T=T), f)
    assert torch.autograd.gradcheck(by, (f, layer.T))
    for grad in torch.autograd.grad(layer(f)[0, 3:].sum(), (f, layer.T)):
        assert grad.all()


def test_T_starts_with_variance_one_over_A():
    torch.manual_seed(0)
    T = MinibatchDiscrimination(400).T
    assert T.shape == (400, 50, 5) and T.std().item() == pytest.approx(1 / 20, rel=0.02) and T.abs().max() > 0.15


# ---- §3.3: historical averaging ----

def test_distance_in_closed_form():
    two, four = parameter([[2.0, 3, 0]]), parameter([4.0])
    assert distance([parameter([2.0])], [parameter([1.0])]).item() == 1     # θ = 0, then 2: mean 1
    D = distance([two, four], [torch.tensor([[1.0, 1, 0]]), torch.tensor([1.0])])
    assert D.item() == 1 + 4 + 9                            # a sum over all weights
    (by_two, by_four) = torch.autograd.grad(D, (two, four))
    assert by_two.tolist() == [[2, 4, 0]] and by_four.tolist() == [6]


# ---- §3.4: one-sided label smoothing ----

@pytest.mark.parametrize("smooth", [0.9, 0.75, 1.0])
@pytest.mark.parametrize("real, fake", [(0, 0), (2, -1), (-1, 2), (50, -50), (-50, 50)])
def test_only_real_images_are_smoothed(monkeypatch, smooth, real, fake):
    losses_where_D_says(monkeypatch, improved_gan, real, fake, smooth=smooth)

    def minus_log_D(logit):
        return math.log1p(math.exp(-logit))
    L_D = smooth * minus_log_D(real) + (1 - smooth) * minus_log_D(-real) + minus_log_D(-fake)   # 1 - D(x) = D(-x)
    np.testing.assert_allclose(logged("run", "L_D", "L_G")[0], [L_D, minus_log_D(fake)], 1e-6, 1e-6)


class Constant(nn.Module):
    """D(x) = b: cannot tell real images from generated ones"""
    start = 0.0

    def __init__(self, *_):
        super().__init__()
        self.b = parameter(self.start)

    def forward(self, x):
        return self.b.expand(len(x))


def test_where_densities_are_equal_the_best_D_is_half_of_alpha(monkeypatch):
    Drawn(monkeypatch, improved_gan, Generator=LinearGenerator, Discriminator=Constant)
    for settings, best in (({}, 0.45), (dict(smooth=0.7), 0.35), (dict(smooth=1.0), 0.5)):
        for D in best, 0.8:
            monkeypatch.setattr(Constant, "start", math.log(D / (1 - D)))
            _, at = improved_gan.train(**settings, steps=1, lr=0.0, nz=3, device="cpu", out=f"{best} {D}")
            assert at.b.grad.item() == pytest.approx(2 * (D - best), abs=1e-6)


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
    """By moments over examples and pixels, channel by channel.  The gradient, too"""
    torch.manual_seed(0)
    norm = VirtualBatchNorm(2, 3).double()
    with torch.no_grad():
        norm.gamma.normal_()
        norm.beta.normal_()
    x = torch.randn(3 + 4, 2, 3, 5, dtype=torch.double) * 0.1 + torch.arange(7).view(7, 1, 1, 1)
    x.requires_grad_()
    alone = [of_batch(torch.cat([x[:3], x[3 + i:4 + i]]), norm)[3:] for i in range(4)]
    y, expected = norm(x), torch.cat([of_batch(x[:3], norm), *alone])
    torch.testing.assert_close(y, expected)
    for part in slice(None), slice(3, 7), slice(5, 6):
        by, by_hand = (torch.autograd.grad((it[part] ** 3).sum(), (x, *norm.parameters()), retain_graph=True)
                       for it in (y, expected))
        torch.testing.assert_close(by, by_hand)
        assert by_hand[0][:3].all()                         # the reference has a part in it
    torch.testing.assert_close(norm(torch.cat([x[:3], x[4:6]])), y[[0, 1, 2, 4, 5]])        # whoever is beside


def test_with_vbn_an_image_depends_on_its_z_alone_in_training_too():
    torch.manual_seed(0)
    G, z = Generator(8, 1, 16, 4), torch.randn(5, 8)
    for mode in True, False:
        x = G.train(mode)(z)
        assert x.shape == (5, 1, 16, 16) and x.std(0).max() > 0.01
        for i in 0, 4:
            torch.testing.assert_close(G(z[i:i + 1]), x[i:i + 1])
    assert G.reference.shape == (64, 8) and not G.reference.requires_grad
    assert abs(G.reference.mean()) < 0.2 and G.reference.std().item() == pytest.approx(1, rel=0.2)
    assert torch.equal(dict(G.named_buffers())["reference"], G.state_dict()["reference"])
    other = Generator(8, 1, 16, 4)
    other.load_state_dict(G.state_dict())
    assert torch.equal(other(z), G(z))
    other.reference.normal_()                               # on the reference, too
    assert (other(z) - x).abs().max() > 0.001
    assert all((it == 1).all() if name.endswith("gamma") else not it.any()
               for name, it in G.named_parameters() if not name.endswith("weight"))


def test_without_vbn_it_is_wgan_gps_generator():
    torch.manual_seed(0)
    theirs, z = wgan_gp.Generator(8, 3, 32, 4), torch.randn(5, 8)
    G = Generator(8, 3, 32, 4, vbn=False)
    state = G.state_dict()
    assert not state.pop("reference").numel() and state.keys() == theirs.state_dict().keys()
    G.load_state_dict(theirs.state_dict(), strict=False)
    for mode in True, False:
        torch.testing.assert_close(G.train(mode)(z), theirs.train(mode)(z))
    assert (G.train()(z)[:2] - G(z[:2])).abs().max() > 0.01     # beside others, another image


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
    assert D[-3].T.shape == (1024, 50, 5) and D[-2].weight.shape == (1, 1074) and D[-2].bias.shape == (1,)
    assert D(torch.zeros(2, 3, 32, 32)).shape == (2,)
    with pytest.raises(ValueError, match="--size"):
        Generator(size=33)


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

    assert_left(improved_gan, rows, (real, latent), rtol=1e-5, G=(G, theta, opt_G), D=(D, w, opt_D))
    saved = improved_gan.read("run")
    np.testing.assert_allclose(flat(saved["G_mean"].values()), np.mean(thetas, 0), 1e-5, 1e-7)
    np.testing.assert_allclose(flat(saved["D_mean"].values()), np.mean(ws, 0), 1e-5, 1e-7)
    # D sees constants, x and x_tilde in passes of their own (§3.2), then images with a history.
    assert [seen[:2] for seen in QuadraticCritic.seen] == 3 * [(False, True), (False, True), (True, False)]


# ---- The flags, by the networks that they leave ----

@pytest.fixture
def run(monkeypatch):
    """A tiny run on 50 random images, and its G and D"""
    def run(**settings):
        Drawn(monkeypatch, improved_gan, side=16)
        return improved_gan.train(**dict(steps=1, size=16, width=2, nz=8, batch_size=8, device="cpu") | settings)
    return run


def test_minibatch_or_not(run):
    x = torch.rand(6, 1, 16, 16)
    for settings, kernels in ((dict(), 50), (dict(kernels=7), 7), (dict(minibatch=False), 0)):
        _, D = run(**settings, out=f"{kernels}")
        scores, of_three = D(x), D(x[:3])
        assert D[-3].T.shape[1] == kernels and (scores[:3] - of_three).abs().max().gt(0.01) == bool(kernels)
        torch.testing.assert_close(scores, D(x.flip(0)).flip(0))


def test_vbn_or_not_and_the_reference_stays(run):
    z = torch.randn(5, 8)
    for settings, norm in ((dict(), VirtualBatchNorm), (dict(vbn=False), nn.BatchNorm2d)):
        for steps in 1, 3:
            G, _ = run(**settings, steps=steps, out=f"{norm.__name__} {steps}")
        first, third = (improved_gan.read(f"{norm.__name__} {steps}")["G"] for steps in (1, 3))
        assert type(G[2]) is norm and torch.equal(first["reference"], third["reference"])
        assert not torch.equal(first["1.weight"], third["1.weight"])
        assert torch.equal(improved_gan.load(f"{norm.__name__} 3")(z), G(z))


@pytest.mark.parametrize("flag, differs", [("--no-minibatch", "minibatch True, not False"),
                                           ("--no-vbn", "vbn True, not False"),
                                           ("--history 0.5", "history 0.0, not 0.5")])
def test_a_run_goes_on_only_with_the_same_flags(monkeypatch, capsys, flag, differs):
    Drawn(monkeypatch, improved_gan, side=16)

    def main(words, status=None):
        words += " --size 16 --width 2 --nz 8 --batch-size 8 --device cpu"
        if status is None:
            return improved_gan.main(words.split())
        with pytest.raises(SystemExit) as end:
            improved_gan.main(words.split())
        assert end.value.code == status
    main("--steps 1 --out without")
    main(f"--steps 1 --out with {flag}")
    capsys.readouterr()
    main(f"--steps 2 --out without {flag}", status=2)
    err = capsys.readouterr().err
    assert differs in err and len(err.splitlines()) == 1
    main("--steps 2 --out with", status=2)
    main(f"--steps 2 --out with {flag}")
    assert improved_gan.read("with")["run"][0] == 2
