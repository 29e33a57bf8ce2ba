"""ProGAN: its pieces, its table 2, growing, and six steps of training against numpy"""
import inspect
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import progan
from common import pyramid
from progan import Conv, Discriminator, Generator, downsample, fade, grad_norm, minibatch_stddev, pixel_norm
from progan import schedule, upsample
from truth import Adam, Drawn, logged

TOP = Path(__file__).resolve().parent.parent
TINY = dict(digit=7, size=16, nz=8, fmap_max=4, batch_size=4, kimg=0.016, device="cpu")     # 4 steps a phase


def saved(out):
    """A checkpoint, with its steps as step and its random states as rng"""
    checkpoint = progan.read(out)
    return checkpoint | dict(step=checkpoint["run"][0], rng=checkpoint["run"][3])


def parameters(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


# ---- Networks ----

@pytest.mark.parametrize("resolution, base, most, nz, of_G, of_D", [
    (1024, 8192, 512, 512, 23_071_507, 23_077_137),
    (256, 8192, 512, 512, 23_036_995, 23_042_625),
    (128, 8192, 512, 512, 22_926_467, 22_932_097),
    (128, 2048, 512, 512, 13_625_379, 13_631_009),          # table 1
    (128, 2048, 512, 128, 10_479_651, 13_631_009),
    (32, 4096, 128, 128, 1_295_747, 1_297_153)])            # CIFAR-10
def test_numbers_of_parameters(resolution, base, most, nz, of_G, of_D):
    G, D = Generator(resolution, 3, base, most, nz), Discriminator(resolution, 3, base, most)
    assert parameters(*G.blocks, G.to_rgb[-1]) == of_G and parameters(*D.blocks, D.from_rgb[-1]) == of_D
    if resolution == 1024:
        assert parameters(G) == 23_079_115 and parameters(D) == 23_087_249


def layers(module):
    """What table 2 would say about a part of a network"""
    for layer in module.modules():
        if isinstance(layer, Conv):
            n_out, n_in, k, _ = layer.weight.shape
            yield f"{n_in}-{n_out} {k}x{k}"
        elif isinstance(layer, progan.Layer):
            yield layer.forward.__name__
        elif layer in (upsample, downsample):
            yield "upsample" if layer is upsample else "downsample"
        elif isinstance(layer, nn.LeakyReLU):
            yield f"lrelu {layer.negative_slope}"
        elif not list(layer.children()):
            yield type(layer).__name__


def test_layers_are_those_of_table_2():
    G, D = Generator(1024), Discriminator(1024)
    n = [512, 512, 512, 512, 256, 128, 64, 32, 16]
    assert list(layers(G.blocks[0])) == ["512-512 4x4", "lrelu 0.2", "512-512 3x3", "lrelu 0.2", "pixel_norm"]
    assert list(layers(D.blocks[0])) == ["minibatch_stddev", "513-512 3x3", "lrelu 0.2", "512-512 4x4", "lrelu 0.2",
                                         "512-1 1x1", "Flatten"]
    assert len(G.blocks) == len(D.blocks) == len(G.to_rgb) == len(D.from_rgb) == 9
    for k, (a, b) in enumerate(zip(n, n[1:]), 1):
        assert list(layers(G.blocks[k])) == ["upsample", f"{a}-{b} 3x3", "lrelu 0.2", "pixel_norm",
                                             f"{b}-{b} 3x3", "lrelu 0.2", "pixel_norm"]
        assert list(layers(D.blocks[k])) == [f"{b}-{b} 3x3", "lrelu 0.2", f"{b}-{a} 3x3", "lrelu 0.2", "downsample"]
    for k, b in enumerate(n):
        assert list(layers(G.to_rgb[k])) == [f"{b}-3 1x1"]
        assert list(layers(D.from_rgb[k])) == [f"3-{b} 1x1", "lrelu 0.2"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [4, 8, 64])
def test_shapes(size, channels):
    G, D = Generator(size, channels, 64, 3, nz=5), Discriminator(size, channels, 64, 3)
    resolution = 4
    with torch.no_grad():
        while resolution <= size:
            for alpha in (0.0, 0.3, 1.0):
                x = G(torch.randn(2, 5), resolution, alpha)
                assert x.shape == (2, channels, resolution, resolution)
                assert D(x, resolution, alpha).shape == (2,)
            assert torch.equal(D(x), D(x, resolution, 1.0))
            resolution *= 2
        z = torch.randn(1, 5)
        assert torch.equal(G(z), G(z, size, 1.0))
        G.grown = 4, 1.0
        assert torch.equal(G(z), G(z, 4, 1.0))


@pytest.mark.parametrize("size", [0, 2, 3, 5, 48, 100, 2048])
def test_other_sizes_are_refused(size):
    for network in (Generator, Discriminator):
        with pytest.raises(ValueError, match=f"--size must be a power of two from 4 to 1024, not {size}"):
            network(size)


def test_the_output_is_linear():
    """No tanh, no batch norm: an image, and a score, twice as far out when the last weights are"""
    G, D = Generator(8, 3, 64, 8, nz=4), Discriminator(8, 3, 64, 8)
    z, x = torch.randn(3, 4), torch.randn(3, 3, 8, 8)
    before = G(z), D(x)
    with torch.no_grad():
        G.to_rgb[-1].weight *= 100
        [layer for layer in D.blocks[0] if isinstance(layer, Conv)][-1].weight *= 100
    torch.testing.assert_close(G(z), 100 * before[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(D(x), 100 * before[1], rtol=1e-4, atol=1e-4)


# ---- Equalised learning rate ----

def test_scaled_weights_have_hes_deviation(monkeypatch):
    """The weights that reach the convolutions, in the order of the layers"""
    seen, conv2d = [], progan.nn.functional.conv2d

    def recorded(x, weight, bias, **kwargs):
        n_out, n_in, k, _ = weight.shape
        seen.append((weight.std().item(), n_in * k * k, weight.numel(), bias.abs().max().item()))
        return conv2d(x, weight, bias, **kwargs)
    torch.manual_seed(0)
    G, D = Generator(64), Discriminator(64)
    monkeypatch.setattr(progan.nn.functional, "conv2d", recorded)
    D(G(torch.randn(2, 512), 64, 1.0), 64, 1.0)
    he = 2 ** 0.5
    gains = [he] + 9 * [he] + [1] + [he] + 8 * [he] + 2 * [he] + [1]        # G, toRGB, fromRGB, D, the last layer
    assert len(seen) == len(gains)
    for (std, fan_in, count, bias), gain in zip(seen, gains):
        assert std == pytest.approx(gain / fan_in ** 0.5, rel=5 / (2 * count) ** 0.5)
        assert bias == 0
    assert seen[0][0] == pytest.approx(he / 4 / 512 ** 0.5, rel=0.01)       # √2/4 on the latent's 512


def test_weights_start_as_normal_numbers_and_biases_at_0():
    torch.manual_seed(0)
    for network in (Generator(32, fmap_max=64), Discriminator(32, fmap_max=64)):
        for name, p in network.named_parameters():
            if name.endswith("bias"):
                assert not p.any()
            else:
                assert p.std().item() == pytest.approx(1, abs=5 / (2 * p.numel()) ** 0.5)
                assert p.numel() < 1000 or p.abs().max() > 3                # not uniform


def test_a_convolution_scales_its_weights_and_not_its_bias():
    conv = Conv(2, 1, 3, padding=1, gain=3)
    with torch.no_grad():
        conv.weight.fill_(1)
        conv.bias.fill_(5)
    assert conv(torch.ones(1, 2, 3, 3))[0, 0, 1, 1].item() == pytest.approx(18 * 3 / 18 ** 0.5 + 5)


# ---- Pixel norm, minibatch standard deviation, halving and doubling ----

@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 4, 6), (1, 1, 1, 1)])
def test_pixel_norm(shape):
    x = torch.randn(shape) * 3
    expected = x.numpy() / np.sqrt((x.numpy() ** 2).mean(axis=1, keepdims=True) + 1e-8)
    np.testing.assert_allclose(pixel_norm(x).numpy(), expected, rtol=1e-5)
    torch.testing.assert_close(pixel_norm(x).square().mean(1), torch.ones(shape)[:, 0])
    assert not pixel_norm(torch.zeros(shape)).any()


def test_latents_are_normalised():
    G, z = Generator(8, 1, 64, 8, nz=6), torch.randn(3, 6)
    with torch.no_grad():
        for conv in G.modules():                            # without biases, only the direction of z would count
            if isinstance(conv, Conv):
                conv.bias.normal_()
    torch.testing.assert_close(G(z), G(9 * z))


@pytest.mark.parametrize("m", [1, 2, 3, 4, 6, 8, 16])
def test_minibatch_stddev(m):
    x = torch.randn(m, 5, 4, 3, dtype=torch.float64) * 2 + 1
    y = minibatch_stddev(x)
    a = x.numpy()
    expected = np.sqrt(((a - a.mean(0)) ** 2).sum(0) / m + 1e-8).mean()
    assert y.shape == (m, 6, 4, 3) and torch.equal(y[:, :5], x)
    np.testing.assert_allclose(y[:, 5].numpy(), expected, rtol=1e-12)
    if m == 1:
        assert y[0, 5, 0, 0].item() == pytest.approx(1e-4)


@pytest.mark.parametrize("x", [torch.randn(1, 3, 4, 4), torch.ones(4, 3, 4, 4)])
def test_minibatch_stddev_of_one_image_or_of_equal_ones_has_finite_gradients(x):
    x = x.requires_grad_()
    (grad,) = torch.autograd.grad(minibatch_stddev(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    assert grad.isfinite().all() and second.isfinite().all()


def test_up_and_down():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert downsample(x).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert upsample(x[:, :, :2, :2])[0, 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [4, 4, 5, 5], [4, 4, 5, 5]]


# ---- Growing ----

@pytest.mark.parametrize("resolution", [8, 16, 64])
def test_fading_begins_with_the_small_network_and_ends_with_the_new_one(resolution):
    torch.manual_seed(0)
    G, D = Generator(64, 3, 2048, 6, nz=4), Discriminator(64, 3, 2048, 6)
    z, x, half = torch.randn(2, 4), torch.randn(2, 3, resolution, resolution), resolution // 2
    k = resolution.bit_length() - 3
    with torch.no_grad():
        assert torch.equal(G(z, resolution, 0.0), upsample(G(z, half, 1.0)))
        assert torch.equal(D(x, resolution, 0.0), D(downsample(x), half, 1.0))
        old, new = upsample(G(z, half, 1.0)), G(z, resolution, 1.0)
        torch.testing.assert_close(G(z, resolution, 0.3), 0.7 * old + 0.3 * new)
        small, large = D.from_rgb[k - 1](downsample(x)), D.blocks[k](D.from_rgb[k](x))
        h = 0.7 * small + 0.3 * large
        for block in list(D.blocks)[k - 1::-1]:
            h = block(h)
        torch.testing.assert_close(D(x, resolution, 0.3), h)

        image, score = G(z, resolution, 1.0), D(x, resolution, 1.0)         # alpha = 1: the old heads do not count
        G.to_rgb[k - 1].weight += 1
        D.from_rgb[k - 1][0].weight += 1
        assert torch.equal(G(z, resolution, 1.0), image) and torch.equal(D(x, resolution, 1.0), score)
        assert not torch.equal(G(z, resolution, 0.5), 0.5 * old + 0.5 * new)


def test_all_layers_stay_trainable():
    G, D = Generator(16, 1, 64, 4, nz=4), Discriminator(16, 1, 64, 4)
    D(G(torch.randn(4, 4), 16, 0.5), 16, 0.5).sum().backward()
    without = {name for net in (G, D) for name, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {"to_rgb.0.weight", "to_rgb.0.bias", "from_rgb.0.0.weight", "from_rgb.0.0.bias"}


@pytest.mark.parametrize("images, expected", [
    (0, (4, 1.0)), (799_999, (4, 1.0)), (800_000, (8, 0.0)), (1_200_000, (8, 0.5)), (1_400_000, (8, 0.75)),
    (1_600_000, (8, 1.0)), (2_399_999, (8, 1.0)), (2_400_000, (16, 0.0)), (4_000_000, (32, 0.0)),
    (5_600_000, (64, 0.0)), (7_200_000, (128, 0.0)), (8_800_000, (256, 0.0)), (10_400_000, (512, 0.0)),
    (12_000_000, (1024, 0.0)), (12_200_000, (1024, 0.25)), (12_800_000, (1024, 1.0)), (13_599_999, (1024, 1.0)),
    (13_600_000, (1024, 1.0)), (10**9, (1024, 1.0))])
def test_schedule_of_the_paper(images, expected):
    assert schedule(images) == expected == schedule(images, 1024, 800.0)


@pytest.mark.parametrize("size", [4, 8, 32])
def test_schedule_image_by_image(size):
    images = 0

    def phase(resolution, alphas):
        nonlocal images
        for alpha in alphas:
            assert schedule(images, size, 0.005) == (resolution, alpha)
            images += 1
    phase(4, 5 * [1.0])
    resolution = 8
    while resolution <= size:
        phase(resolution, [0.0, 0.2, 0.4, 0.6, 0.8])
        phase(resolution, 5 * [1.0])
        resolution *= 2
    phase(size, 20 * [1.0])


def test_real_images_are_faded():
    x = torch.randn(2, 3, 8, 8)
    small = x.numpy().reshape(2, 3, 4, 2, 4, 2).mean((3, 5)).repeat(2, 2).repeat(2, 3)
    for alpha in (0.0, 0.25, 1.0):
        np.testing.assert_allclose(fade(x, alpha).numpy(), (1 - alpha) * small + alpha * x.numpy(), atol=1e-6)
    assert torch.equal(fade(x, 1.0), x)


def test_minibatches_are_the_papers(monkeypatch):
    """By the number of steps that 8 thousand images per phase take"""
    def seen(config, *_, **__):
        raise ValueError(f"{config.steps} steps")
    monkeypatch.setattr(progan, "Run", seen)
    for size, steps in ((4, 500), (128, 11 * 500), (256, 11 * 500 + 2 * 572),
                        (1024, 11 * 500 + 2 * (572 + 1334 + 2667))):
        with pytest.raises(ValueError, match=f"^{steps} steps"):
            progan.train(size=size, kimg=8.0, fmap_base=4, fmap_max=1, device="cpu")


# ---- Loss ----

def test_grad_norm_is_that_of_a_linear_discriminator():
    a = torch.randn(12)
    norms = grad_norm(lambda x, *_: x.flatten(1) @ a, torch.randn(4, 3, 2, 2), 2, 1.0)
    torch.testing.assert_close(norms, a.norm().expand(4))


def test_grad_norm_is_the_gradient_of_the_summed_scores():
    """Through the standard deviation of the minibatch, an image has an effect on all scores"""
    torch.manual_seed(0)
    D, x = Discriminator(8, 1, 64, 4).double(), torch.randn(3, 1, 8, 8, dtype=torch.float64)
    norms, h = grad_norm(D, x, 8, 0.5), 1e-6
    for i in range(3):
        grad = torch.zeros(8, 8)
        for j, k in np.ndindex(8, 8):
            step = torch.zeros_like(x)
            step[i, 0, j, k] = h
            grad[j, k] = ((D(x + step, 8, 0.5) - D(x - step, 8, 0.5)).sum() / (2 * h)).item()
        assert norms[i].item() == pytest.approx(grad.norm().item(), rel=1e-4)
    alone = torch.cat([grad_norm(D, x[i:i + 1], 8, 0.5) for i in range(3)])
    assert (norms - alone).abs().min() > 1e-4
    assert norms.requires_grad


A0, B0 = np.linspace(-0.5, 0.7, 48).reshape(16, 3), np.sin(np.arange(192.0)).reshape(64, 3)
M = np.zeros((16, 64))                                      # 8x8 -> 4x4, averages; 4 Mᵀ: the way back
for row, column in np.ndindex(8, 8):
    M[row // 2 * 4 + column // 2, row * 8 + column] = 1 / 4


class TinyGenerator(nn.Module):
    """Linear at 4x4; at 8x8 faded with another linear one"""
    def __init__(self, *_):
        super().__init__()
        self.A, self.B = (nn.Parameter(torch.tensor(each, dtype=torch.float32)) for each in (A0, B0))

    def forward(self, z, resolution=None, alpha=1.0):
        resolution, alpha = (resolution, alpha) if resolution else self.grown
        small = z @ self.A.T
        if resolution == 4:
            return small.view(-1, 1, 4, 4)
        large = upsample(small.view(-1, 1, 4, 4)).flatten(1)
        return ((1 - alpha) * large + alpha * (z @ self.B.T)).view(-1, 1, 8, 8)


class TinyDiscriminator(nn.Module):
    """<a, x> at 4x4; at 8x8 faded with <b, x>; plus s/2 ‖x‖²"""
    def __init__(self, *_):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.linspace(-1, 1, 16)), nn.Parameter(torch.linspace(0.5, -0.3, 64))
        self.s = nn.Parameter(torch.tensor(0.3))

    def forward(self, x, resolution, alpha):
        assert x.shape[1:] == (1, resolution, resolution)
        flat = x.flatten(1)
        score = flat @ self.a if resolution == 4 else (
            (1 - alpha) * (downsample(x).flatten(1) @ self.a) + alpha * (flat @ self.b))
        return score + self.s / 2 * flat.square().sum(1)


@pytest.mark.parametrize("settings", [
    dict(),
    dict(lam=2.0, gamma=3.0, drift=0.7, lr=0.02, beta1=0.4, beta2=0.8, ema=0.6)])
def test_six_steps_equal_numpy(monkeypatch, settings):
    """4x4, a fade to 8x8, 8x8, two steps each: losses, Adam and its resets, the moving average, the log"""
    m = 8
    drawn = Drawn(monkeypatch, progan, side=8, Generator=TinyGenerator, Discriminator=TinyDiscriminator)
    progan.train(**settings, batch_size=m, nz=3, size=8, kimg=2 * m / 1000, save_every=1, device="cpu", out="run")
    assert [len(drawn.numbers[name]) for name in ("randint", "randn", "rand")] == [1 + 6, 2 * 6, 6]

    p = dict(lam=10.0, gamma=1.0, drift=0.001, lr=1e-3, beta1=0.0, beta2=0.99, ema=0.999) | settings
    eight = drawn.images.numpy().reshape(50, 64).astype(float)
    pixels = {8: eight / 127.5 - 1, 4: np.round(eight @ M.T) / 127.5 - 1}
    index, latents, epsilons = drawn["randint"], drawn["randn"], drawn["rand"]
    next(index)                                             # real.png
    w = dict(a=np.linspace(-1, 1, 16), b=np.linspace(0.5, -0.3, 64), s=np.array(0.3))
    theta = dict(A=A0, B=B0)
    ema, log = dict(theta), []

    for step, (resolution, alpha) in enumerate([(4, 1.0), (4, 1.0), (8, 0.0), (8, 0.5), (8, 1.0), (8, 1.0)]):
        if step % 2 == 0:                                   # a phase begins
            adam = {name: Adam(p["lr"], p["beta1"], p["beta2"]) for name in "absAB"}
        small = resolution == 4
        down, share = (np.eye(16), 1.0) if small else (M, 1 - alpha)        # what the old layers see, their weight
        used = {"a", "s", "A"} if small else {*"asA", *"bB"} if alpha < 1 else {*"bsB"}

        def score(x):
            new = 0 if small else alpha * (x @ w["b"])
            return share * (x @ down.T @ w["a"]) + new + w["s"] / 2 * (x ** 2).sum(1)

        def slope(x):
            return share * (w["a"] @ down) + (0 if small else alpha * w["b"]) + w["s"] * x

        def per_weight(x, c):
            """Σ c_i ∂(features of x_i): the gradient of Σ c_i D(x_i)"""
            return dict(a=share * (c @ x @ down.T), b=0 if small else alpha * (c @ x), s=c @ (x ** 2).sum(1) / 2)

        def generated(z):
            old = z @ theta["A"].T
            return old if small else (1 - alpha) * (old @ (4 * M)) + alpha * (z @ theta["B"].T)

        x = pixels[resolution][next(index).astype(int)]
        if not small:
            x = (1 - alpha) * (x @ M.T @ (4 * M)) + alpha * x
        x_tilde, eps = generated(next(latents)), next(epsilons).reshape(m, 1)
        x_hat = eps * x + (1 - eps) * x_tilde
        g = slope(x_hat)
        norm = np.sqrt((g ** 2).sum(1))
        D_x, D_x_tilde = score(x), score(x_tilde)
        L = D_x_tilde - D_x + p["lam"] * (norm - p["gamma"]) ** 2 / p["gamma"] ** 2 + p["drift"] * D_x ** 2
        c = 2 * p["lam"] / p["gamma"] ** 2 * (norm - p["gamma"]) / norm / m
        penalty = dict(a=share * (c @ g @ down.T), b=0 if small else alpha * (c @ g), s=c @ (g * x_hat).sum(1))
        of_fake, of_real = per_weight(x_tilde, np.full(m, 1 / m)), per_weight(x, (2 * p["drift"] * D_x - 1) / m)
        for name in used & {*"abs"}:
            w[name] = adam[name].step(w[name], of_fake[name] + of_real[name] + penalty[name])

        z = next(latents)
        fake = generated(z)
        up = slope(fake)
        L_G = -score(fake).mean()
        grads = dict(A=-share * (up if small else up @ (4 * M).T), B=0 if small else -alpha * up)
        for name in used & {*"AB"}:
            theta[name] = adam[name].step(theta[name], grads[name].T @ z / m)
        ema = {name: p["ema"] * ema[name] + (1 - p["ema"]) * theta[name] for name in ema}
        log.append([L.mean(), L_G, ((norm - p["gamma"]) ** 2).mean(), (D_x - D_x_tilde).mean(), (D_x ** 2).mean()])

    checkpoint = saved("run")
    assert checkpoint["step"] == 6 and checkpoint["images"] == 6 * m
    for part, values in (("D", w), ("G", theta), ("G_ema", ema)):
        for name, value in values.items():
            np.testing.assert_allclose(checkpoint[part][name].numpy(), value, rtol=2e-4, atol=2e-6, err_msg=name)
    np.testing.assert_allclose(logged("run", "L_D", "L_G", "penalty", "wasserstein", "drift"),
                               log, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(checkpoint["opt_D"]["state"][1]["exp_avg_sq"].numpy(), adam["b"].v, rtol=1e-3)
    assert checkpoint["opt_G"]["state"][1]["step"] == checkpoint["opt_D"]["state"][1]["step"] == 2


def test_a_step_of_each_lowers_its_loss(monkeypatch):
    """The signs, on the real networks: D scores real images higher, and the fakes of the new G"""
    torch.manual_seed(0)
    x, z = torch.rand(64, 1, 16, 16), torch.randn(64, 8)
    monkeypatch.setattr(progan, "load_images", lambda *_, **__: (x * 255).to(torch.uint8))
    before = {}

    def kept(make, name):
        def wrapper(*args):
            network = make(*args)
            before[name] = make(*args)
            before[name].load_state_dict(network.state_dict())
            return network
        return wrapper
    for name in ("Generator", "Discriminator"):
        monkeypatch.setattr(progan, name, kept(getattr(progan, name), name))
    G, D = progan.train(**TINY | dict(batch_size=64), steps=1, lam=0.0, out="run")
    G0, D0 = before["Generator"], before["Discriminator"]
    real = pyramid((x * 255).to(torch.uint8))[4] / 127.5 - 1
    with torch.no_grad():
        fake = G0(z, 4, 1.0)
        assert D(real).mean() - D(fake).mean() > D0(real).mean() - D0(fake).mean()
        assert D(G(z, 4, 1.0)).mean() > D(fake).mean()


# ---- A run ----

def assert_same(a, b):
    for name in ("G", "D", "G_ema"):
        assert a[name].keys() == b[name].keys()
        assert all(torch.equal(a[name][key], b[name][key]) for key in a[name])
    for name in ("opt_G", "opt_D"):
        assert a[name]["state"].keys() == b[name]["state"].keys()
        for key, state in a[name]["state"].items():
            assert all(torch.equal(state[each], b[name]["state"][key][each]) for each in state)
    assert all(torch.equal(x, y) for process in zip(a["rng"], b["rng"]) for x, y in zip(*process))
    assert (a["step"], a["images"]) == (b["step"], b["images"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    progan.train(**TINY, save_every=1, out=out)
    return out


def test_a_run_grows_and_ends_by_itself(whole, capsys):
    rows = logged(whole, "step", "images", "resolution", "alpha")
    assert rows[:, 0].tolist() == list(range(1, 21)) and rows[:, 1].tolist() == list(range(4, 84, 4))
    expected = 4 * [(4, 1)] + [(8, 0), (8, .25), (8, .5), (8, .75)] + 4 * [(8, 1)]     # of the step, not the next
    expected += [(16, 0), (16, .25), (16, .5), (16, .75)] + 4 * [(16, 1)]
    assert list(map(tuple, rows[:, 2:])) == expected
    for step, resolution in ((1, 4), (7, 8), (12, 16), (20, 16)):
        assert Image.open(whole / f"{step:06d}.png").size == (8 * resolution, 8 * resolution)
    with Image.open(whole / "training.gif") as film:
        assert film.size == (128, 128) and 15 < film.n_frames <= 20         # Pillow joins equal frames
    before = {p: p.read_bytes() for p in whole.iterdir()}
    progan.train(**TINY, save_every=1, out=whole)
    assert "20 of 20 steps are done" in capsys.readouterr().out
    progan.train(**TINY, out="again")
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.match(r"step 20/20  resolution 16  alpha 1  ", last)
    assert {p: p.read_bytes() for p in whole.iterdir()} == before


@pytest.mark.parametrize("stop", [4, 6, 11, 14])
def test_continuing_at_any_place_of_the_schedule_is_exact(whole, stop):
    """4x4, between phases, in the middle of both fades, before and after a change of resolution"""
    progan.train(**TINY, steps=stop, out="parts")
    assert saved("parts")["images"] == 4 * stop
    progan.train(**TINY, out="parts")
    assert_same(saved("parts"), saved(whole))


def test_optimizers_are_reset_when_a_fade_begins_and_when_it_ends():
    progan.train(**TINY, steps=16, out="run")
    before = saved("run")
    for name in ("opt_G", "opt_D"):
        assert not before[name]["state"]                    # a fade has just ended
    progan.train(**TINY, steps=19, out="run")
    for name in ("opt_G", "opt_D"):
        assert {int(state["step"]) for state in saved("run")[name]["state"].values()} == {3}


def test_steps_may_go_beyond_the_schedule(whole):
    progan.train(**TINY, steps=22, out="run")
    assert saved("run")["step"] == 22 and logged("run", "resolution", "alpha")[-1].tolist() == [16, 1]


@pytest.mark.parametrize("steps, resolution, alpha", [(2, 4, 1.0), (6, 8, 0.5), (20, 16, 1.0)])
def test_pictures_and_generated_images_are_the_moving_averages(steps, resolution, alpha):
    progan.train(**TINY, steps=steps, ema=0.5, out="run")
    checkpoint, G = saved("run"), Generator(16, 1, 8192, 4, 8)
    z = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    shown = np.asarray(Image.open("run/%06d.png" % steps), dtype=float)
    shown = shown.reshape(8, resolution, 8, resolution).transpose(0, 2, 1, 3).reshape(64, resolution, resolution)
    progan.generate("run", 5, "cpu", seed=0)
    one = np.stack([np.asarray(Image.open(f"run/generated/{i:06d}.png"), dtype=float) for i in range(5)])
    assert np.abs(one - shown[:5]).max() <= 1
    for name, equal in (("G_ema", True), ("G", False)):
        G.load_state_dict(checkpoint[name])
        with torch.no_grad():
            x = G(z, resolution, alpha)
        off = np.abs(((x[:, 0].clamp(-1, 1) + 1) * 127.5).round().numpy() - shown).max()
        assert off <= 1 if equal else off > 1
    loaded = progan.load("run")
    assert loaded.grown == (resolution, alpha) and loaded(z).shape == (64, 1, resolution, resolution)


def test_the_size_is_32_for_the_sets_and_1024_for_folders():
    settings = {name: setting.default for name, setting in inspect.signature(progan.train).parameters.items()}
    for dataset, size in (("mnist", 32), ("cifar10", 32), ("folder", 1024)):
        class Seen(Exception):
            pass

        def seen(config, *_, **__):
            raise Seen(config.size)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Seen, match=str(size)):
            patch.setattr(progan, "Run", seen)
            progan.train(**settings | dict(dataset=dataset, device="cpu", fmap_base=4, fmap_max=1))


@pytest.mark.parametrize("name, value", [("size", 48), ("kimg", 0.0), ("gamma", 0.0), ("fmap_base", 0),
                                         ("fmap_max", 0),
                                         ("batch_size", 0), ("steps", 0), ("nz", 0), ("beta2", 1.0), ("lr", -1.0)])
def test_settings_that_make_no_sense_are_refused(name, value):
    with pytest.raises(ValueError, match=dict(beta2="beta", lr="learning rate").get(name, name)):
        progan.train(**TINY | {name: value}, out="run")
    assert not Path("run").exists()


def test_a_folder_of_images_smaller_than_the_size_is_refused(capsys):
    Path("mine").mkdir()
    for i, size in enumerate([(20, 30), (40, 25), (31, 90)]):
        Image.new("RGB", size, (i, 0, 0)).save(f"mine/{i}.png")
    with pytest.raises(SystemExit) as end:
        progan.main("--dataset mine --size 32 --steps 1 --fmap-max 4 --device cpu".split())
    err = capsys.readouterr().err
    assert end.value.code == 2 and len(err.splitlines()) == 1
    assert "--size 32 is larger than every image in mine: the largest square in them has 31 pixels" in err
    assert not Path("runs").exists()
    Image.new("RGB", (32, 32)).save("mine/3.png")           # one is enough, the others are enlarged
    progan.main("--dataset mine --size 32 --steps 1 --fmap-max 4 --device cpu".split())
    assert Image.open("runs/progan-mine/real.png").size == (128, 128)


# ---- More than one process ----

def two_processes(code, *args):
    Path("job.py").write_text(f"import sys\nsys.path.insert(0, {str(TOP)!r})\n" + code)
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           "job.py", *args], capture_output=True, text=True, timeout=300)


def test_two_processes_average_their_gradients():
    """Halves of a batch give the gradients of the whole, but for the layer that couples a batch"""
    done = two_processes("""
import torch, progan, torch.distributed as dist
progan.minibatch_stddev = lambda x: torch.cat([x, torch.ones_like(x[:, :1])], 1)
rank, _ = progan.processes(torch.device("cpu"))
torch.manual_seed(0)
G, D = progan.Generator(8, 1, 64, 8, 8), progan.Discriminator(8, 1, 64, 8)
x, z = torch.randn(6, 1, 8, 8), torch.randn(6, 8)

def gradients(x, z, average):
    for network in (G, D):
        network.zero_grad()
    L = D(G(z, 8, 0.5).detach(), 8, 0.5) - D(x, 8, 0.5) + 10 * (progan.grad_norm(D, x, 8, 0.5) - 1) ** 2
    L.mean().backward()
    G(z, 8, 0.5).square().mean().backward()
    if average:
        progan.average_gradients([*G.parameters(), *D.parameters()])
    return [p.grad.clone() for p in (*G.parameters(), *D.parameters()) if p.grad is not None]
whole, mine = gradients(x, z, False), gradients(x[rank::2], z[rank::2], True)
alone = gradients(x[rank::2], z[rank::2], False)
for a, b in zip(whole, mine):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
assert max((a - b).abs().max() for a, b in zip(whole, alone)) > 1e-2
print(len(whole), "equal")
""")
    assert done.returncode == 0 and done.stdout.count("equal") == 2, done.stderr


def test_two_processes_train_as_one_and_only_the_first_writes():
    Path("photos").mkdir()
    for i in range(4):
        Image.new("RGB", (20, 20), (9 * i, 0, 0)).save(f"photos/{i}.png")
    done = two_processes(f"""
import torch, progan, torch.distributed as dist
rank, _ = progan.processes(torch.device("cpu"))
if rank == 1:
    def never(*_): raise AssertionError("the second process writes")
    progan.replacing = progan.save_images = progan.save_animation = progan.save_curve = never
draws, randn = [], torch.randn
def recorded(*args, **kwargs):
    value = randn(*args, **kwargs)
    if "generator" not in kwargs:                           # as the pictures' fixed latents have
        draws.append(value)
    return value
torch.randn = recorded
settings = {TINY!r} | dict(kimg=0.032)
G, D = progan.train(**settings, steps=20, out="whole")
torch.save([[p.detach() for p in (*G.parameters(), *D.parameters())], draws], f"weights{{rank}}.pt")
progan.train(**settings, steps=10, out="parts")
progan.train(**settings, steps=20, out="parts")
progan.train(**settings | dict(digit=None), dataset="photos", root="root", steps=1, out="photos-run")
""")
    assert done.returncode == 0, done.stderr
    (a, drawn_a), (b, drawn_b) = (torch.load(f"weights{rank}.pt") for rank in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    numbers = [torch.cat([draw.flatten() for draw in drawn if draw.ndim == 2]) for drawn in (drawn_a, drawn_b)]
    assert len(numbers[0]) == len(numbers[1]) > 1000 and torch.isin(*numbers).sum() < 5     # other random numbers
    assert saved("whole")["images"] == 20 * 8 and len(saved("whole")["rng"]) == 2
    assert not torch.equal(*(rng[0] for rng in saved("whole")["rng"]))
    assert_same(saved("whole"), saved("parts"))
    lines = done.stdout.splitlines()
    assert lines[0] == "device: cpu" and lines.count(lines[0]) == 4
    for word in ("decoding", "averaging"):                  # once, by the first
        assert sum(line.startswith(word) for line in lines) == 1
    assert sorted(p.suffix for p in Path("root/cache").iterdir()) == [".pyramid", ".uint8"]
