"""ProGAN: its pieces, its table 2, growing, six steps against numpy, and its runs, of one process and of two"""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import progan
from progan import Conv, Discriminator, Generator, downsample, fade, grad_norm, minibatch_stddev, pixel_norm
from progan import schedule, upsample
from truth import Adam, Drawn, assert_same, logged, training

TINY = dict(digit=7, size=16, nz=8, fmap_max=4, batch_size=4, kimg=0.016, device="cpu")     # 4 steps a phase


def test_numbers_of_parameters():
    def count(*modules):
        return sum(p.numel() for module in modules for p in module.parameters())
    for resolution, base, most, nz, of_G, of_D in [         # of table 2, of table 1, for CIFAR-10
            (1024, 8192, 512, 512, 23_071_507, 23_077_137), (128, 2048, 512, 512, 13_625_379, 13_631_009),
            (32, 4096, 128, 128, 1_295_747, 1_297_153)]:
        G, D = Generator(resolution, 3, base, most, nz), Discriminator(resolution, 3, base, most)
        assert count(*G.blocks, G.to_rgb[-1]) == of_G and count(*D.blocks, D.from_rgb[-1]) == of_D
        assert resolution < 1024 or (count(G), count(D)) == (23_079_115, 23_087_249)


def test_layers_are_those_of_table_2():
    def layers(module):
        for layer in module.modules():
            if isinstance(layer, Conv):
                yield "{1}-{0} {2}x{3}".format(*layer.weight.shape)
            elif isinstance(layer, progan.Layer):
                yield layer.forward.__name__
            elif not list(layer.children()):
                yield str(layer)
    G, D, n = Generator(1024), Discriminator(1024), [512, 512, 512, 512, 256, 128, 64, 32, 16]
    lrelu, up, down, end = map(str, (nn.LeakyReLU(0.2, True), upsample, downsample, nn.Flatten(0)))
    assert list(layers(G.blocks[0])) == ["512-512 4x4", lrelu, "512-512 3x3", lrelu, "pixel_norm"]
    last = ["minibatch_stddev", "513-512 3x3", lrelu, "512-512 4x4", lrelu, "512-1 1x1", end]
    assert list(layers(D.blocks[0])) == last and len(G.blocks) == len(D.blocks) == 9
    for k, (a, b) in enumerate(zip(n, n[1:]), 1):
        norm = [lrelu, "pixel_norm"]
        assert list(layers(G.blocks[k])) == [up, f"{a}-{b} 3x3", *norm, f"{b}-{b} 3x3", *norm]
        assert list(layers(D.blocks[k])) == [f"{b}-{b} 3x3", lrelu, f"{b}-{a} 3x3", lrelu, down]
    assert list(layers(G.to_rgb)) == [f"{b}-3 1x1" for b in n]
    assert list(layers(D.from_rgb)) == [each for b in n for each in (f"3-{b} 1x1", lrelu)]


def test_shapes_and_gradients():
    G, D, z = Generator(16, 1, 64, 4, nz=5), Discriminator(16, 1, 64, 4), torch.randn(4, 5)
    for resolution in (4, 8, 16):
        for alpha in (1.0, 0.3):
            x = G(z, resolution, alpha)
            assert x.shape == (4, 1, resolution, resolution) and D(x, resolution, alpha).shape == (4,)
        assert torch.equal(D(x), D(x, resolution, 1.0))
    D(x, 16, 0.3).sum().backward()                          # all layers but those of 4x4 are trained, the small too
    without = {name for net in (G, D) for name, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {"to_rgb.0.weight", "to_rgb.0.bias", "from_rgb.0.0.weight", "from_rgb.0.0.bias"}
    assert torch.equal(G(z), G(z, 16, 1.0))
    G.grown = 8, 0.3
    assert torch.equal(G(z), G(z, 8, 0.3))


def test_equalised_learning_rate():
    torch.manual_seed(0)
    G, D = Generator(64), Discriminator(64)
    for conv in [layer for network in (G, D) for layer in network.modules() if isinstance(layer, Conv)]:
        n, gain = conv.weight.numel(), 1 if conv in [*G.to_rgb, D.blocks[0][-2]] else 2 ** 0.5
        assert conv.scale == pytest.approx(gain / conv.weight[0].numel() ** 0.5) and not conv.bias.any()
        assert conv.weight.std().item() == pytest.approx(1, rel=5 / (2 * n) ** 0.5)
        assert n < 1000 or conv.weight.abs().max() > 3                      # not uniform
    conv = Conv(2, 1, 3, padding=1, gain=3)
    nn.init.ones_(conv.weight), nn.init.constant_(conv.bias, 5)             # the bias is not scaled
    assert conv(torch.ones(1, 2, 3, 3))[0, 0, 1, 1].item() == pytest.approx(18 * 3 / 18 ** 0.5 + 5)


def test_pixel_norm_also_of_latents():
    x = torch.randn(2, 5, 4, 6) * 3
    a = x.numpy()
    np.testing.assert_allclose(pixel_norm(x), a / np.sqrt((a ** 2).mean(1, keepdims=True) + 1e-8), rtol=1e-5)
    assert not pixel_norm(torch.zeros(3, 7)).any()
    G, z = Generator(8, 1, 64, 8, nz=6), torch.randn(3, 6)
    for p in G.parameters():                                # without biases, only the direction of z would count
        nn.init.normal_(p)
    torch.testing.assert_close(G(z), G(9 * z))


@pytest.mark.parametrize("m", [1, 3, 16])
def test_minibatch_stddev(m):
    x = torch.randn(m, 5, 4, 3, dtype=torch.float64) * 2 + 1
    y, a = minibatch_stddev(x), x.numpy()
    assert y.shape == (m, 6, 4, 3) and torch.equal(y[:, :5], x)
    np.testing.assert_allclose(y[:, 5].numpy(), np.sqrt(((a - a.mean(0)) ** 2).mean(0) + 1e-8).mean(), rtol=1e-12)
    x = x[:1].expand(m, 5, 4, 3).clone().requires_grad_()                   # equal images: finite, too
    (grad,) = torch.autograd.grad(minibatch_stddev(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    assert grad.isfinite().all() and second.isfinite().all()


def test_up_and_down_and_faded_real_images():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert downsample(x).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert upsample(x[:, :, :2, :2])[0, 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [4, 4, 5, 5], [4, 4, 5, 5]]
    x = torch.randn(2, 3, 8, 8)
    small = x.numpy().reshape(2, 3, 4, 2, 4, 2).mean((3, 5)).repeat(2, 2).repeat(2, 3)
    for alpha in (0.0, 0.25, 1.0):
        np.testing.assert_allclose(fade(x, alpha).numpy(), (1 - alpha) * small + alpha * x.numpy(), atol=1e-6)


@pytest.mark.parametrize("resolution", [8, 64])
def test_fading_begins_with_the_small_network_and_ends_with_the_new_one(resolution):
    torch.manual_seed(0)
    G, D, half = Generator(64, 3, 2048, 6, nz=4), Discriminator(64, 3, 2048, 6), resolution // 2
    k = resolution.bit_length() - 3
    z, x = torch.randn(2, 4), torch.randn(2, 3, resolution, resolution)
    with torch.no_grad():
        old, image, score = upsample(G(z, half, 1.0)), G(z, resolution, 1.0), D(x, resolution, 1.0)
        assert torch.equal(G(z, resolution, 0.0), old)
        assert torch.equal(D(x, resolution, 0.0), D(downsample(x), half, 1.0))
        torch.testing.assert_close(G(z, resolution, 0.3), 0.7 * old + 0.3 * image)
        h = 0.7 * D.from_rgb[k - 1](downsample(x)) + 0.3 * D.blocks[k](D.from_rgb[k](x))
        for block in list(D.blocks)[k - 1::-1]:
            h = block(h)
        torch.testing.assert_close(D(x, resolution, 0.3), h)
        G.to_rgb[k - 1].weight += 1                         # alpha = 1: the old heads do not count
        D.from_rgb[k - 1][0].weight += 1
        assert torch.equal(G(z, resolution, 1.0), image) and torch.equal(D(x, resolution, 1.0), score)
        G.to_rgb[k].weight *= 100                           # linear: no tanh, no sigmoid
        D.blocks[0][-2].weight *= 100
        torch.testing.assert_close(G(z, resolution, 1.0), 100 * image, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(D(x, resolution, 1.0), 100 * score, rtol=1e-4, atol=1e-4)


def test_schedule():
    for images, *expected in [
            (800_000, 8, 0.0), (1_400_000, 8, 0.75), (2_400_000, 16, 0.0), (12_000_000, 1024, 0.0),
            (799_999, 4, 1.0), (12_200_000, 1024, 0.25), (12_800_000, 1024, 1.0), (10**9, 1024, 1.0)]:
        assert schedule(images) == schedule(images, 1024, 800.0) == tuple(expected)
    fades, ones = [0.0, 0.2, 0.4, 0.6, 0.8], 5 * [1.0]
    for size in (4, 8, 16):                                 # image by image
        expected = [(4, 1.0)] * 5 + [(r, alpha) for r in (8, 16) if r <= size for alpha in fades + ones]
        expected += 20 * [(size, 1.0)]
        assert [schedule(images, size, 0.005) for images in range(len(expected))] == expected


def test_steps_and_size_unless_given(monkeypatch):
    class Config(Exception):
        def __init__(self, config, *_, **__):
            self.config, self.step, self.shown = config, *went_on

        def __iter__(self):
            raise self
    monkeypatch.setattr(progan, "Run", Config)
    monkeypatch.setattr(progan, "load_images", lambda *_, **__: torch.zeros(2, 1, 4, 4, dtype=torch.uint8))
    monkeypatch.setattr(progan, "pyramid", lambda images: {4 << k: images for k in range(9)})
    for dataset, given, batch_size, went_on, expected in (
            ("mnist", 4, None, (0, 0), (4, 500)), ("mnist", 64, None, (0, 0), (64, 4500)),
            ("mnist", None, None, (0, 0), (32, 3500)), ("mnist", None, 7, (0, 0), (32, 8000)),   # 8,000 x 7 / 7
            ("mnist", None, 8, (2100, 33600), (32, 2100 + 2800)), ("mnist", None, None, (4000, 60000), (32, 4000)),
            ("folder", None, None, (0, 0), (1024, 5500 + 572 + 571 + 1333 + 1334 + 2666 + 2666))):
        with pytest.raises(Config) as end:
            progan.train(dataset=dataset, size=given, batch_size=batch_size, kimg=8.0, fmap_base=4, fmap_max=1,
                         device="cpu")
        assert (end.value.config.size, end.value.config.steps) == expected


def test_grad_norm_is_the_gradient_of_the_summed_scores():
    torch.manual_seed(0)                                    # an image has an effect on all scores: stddev
    D, x = Discriminator(8, 1, 64, 4).double(), torch.randn(3, 1, 8, 8, dtype=torch.float64)
    norms, steps = grad_norm(D, x, 8, 0.5), 1e-6 * torch.eye(3 * 64, dtype=torch.float64).view(-1, *x.shape)
    grad = torch.stack([(D(x + step, 8, 0.5) - D(x - step, 8, 0.5)).sum() / 2e-6 for step in steps])
    torch.testing.assert_close(norms, grad.view(3, 64).norm(dim=1), rtol=1e-4, atol=0)
    alone = torch.cat([grad_norm(D, x[i:i + 1], 8, 0.5) for i in range(3)])
    assert (norms - alone).abs().min() > 1e-4 and norms.requires_grad


A0, B0 = np.linspace(-0.5, 0.7, 48).reshape(16, 3), np.sin(np.arange(192.0)).reshape(64, 3)
M = np.zeros((16, 64))                                      # 8x8 -> 4x4, averages; 4 Mᵀ: the way back
for row, column in np.ndindex(8, 8):
    M[row // 2 * 4 + column // 2, row * 8 + column] = 1 / 4


class TinyGenerator(nn.Module):         # A z at 4x4; at 8x8 faded with B z
    def __init__(self, *_):
        super().__init__()
        self.A, self.B = (nn.Parameter(torch.tensor(each).float()) for each in (A0, B0))

    def forward(self, z, resolution=None, alpha=1.0):
        resolution, alpha = (resolution, alpha) if resolution else self.grown
        small, large = (z @ self.A.T).view(-1, 1, 4, 4), (z @ self.B.T).view(-1, 1, 8, 8)
        return small if resolution == 4 else (1 - alpha) * upsample(small) + alpha * large


class TinyDiscriminator(nn.Module):     # <a, x> at 4x4; at 8x8 faded with <b, x>; plus s/2 ‖x‖²
    def __init__(self, *_):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.linspace(-1, 1, 16)), nn.Parameter(torch.linspace(0.5, -0.3, 64))
        self.s = nn.Parameter(torch.tensor(0.3))

    def forward(self, x, resolution, alpha):
        assert x.shape[1:] == (1, resolution, resolution)
        score = x.flatten(1) @ (self.a if resolution == 4 else self.b)
        if resolution == 8:
            score = (1 - alpha) * (downsample(x).flatten(1) @ self.a) + alpha * score
        return score + self.s / 2 * x.square().sum((1, 2, 3))


@pytest.mark.parametrize("settings", [
    dict(), dict(lam=2.0, gamma=3.0, drift=0.7, lr=0.02, beta1=0.4, beta2=0.8, ema=0.6)])
def test_six_steps_equal_numpy(monkeypatch, settings):
    m, p = 8, dict(lam=10.0, gamma=1.0, drift=0.001, lr=1e-3, beta1=0.0, beta2=0.99, ema=0.999) | settings
    drawn = Drawn(monkeypatch, progan, side=8, Generator=TinyGenerator, Discriminator=TinyDiscriminator)
    progan.train(**settings, batch_size=m, nz=3, size=8, kimg=2 * m / 1000, save_every=1, device="cpu", out="run")
    eight = drawn.images.numpy().reshape(50, 64).astype(float)
    pixels = {8: eight / 127.5 - 1, 4: np.round(eight @ M.T) / 127.5 - 1}
    index, latents, epsilons = drawn["randint"], drawn["randn"], drawn["rand"]
    next(index)                                             # real.png
    w, theta = dict(a=np.linspace(-1, 1, 16), b=np.linspace(0.5, -0.3, 64), s=np.array(0.3)), dict(A=A0, B=B0)
    ema, log = dict(theta), []

    for step, (resolution, alpha) in enumerate([(4, 0.0), (4, 0.0), (8, 0.0), (8, 0.5), (8, 1.0), (8, 1.0)]):
        if step % 2 == 0:                                   # a phase begins
            adam = {name: Adam(p["lr"], p["beta1"], p["beta2"]) for name in "absAB"}
        old, small = 1 - alpha, resolution == 4             # alpha, old: weights of the new layers, of the old
        down, up = (np.eye(16), np.eye(16)) if small else (M, 4 * M.T)

        def slope(x):                                       # of D(x) = <a and b, faded, x> + s/2 ‖x‖²
            return old * w["a"] @ down + (0 if small else alpha * w["b"]) + w["s"] * x

        def score(x):
            return (x * (slope(x) - w["s"] / 2 * x)).sum(1)
        W = old * up @ theta["A"] + (0 if small else alpha * theta["B"])
        x = pixels[resolution][next(index).astype(int)]
        x = x if small else old * x @ (up @ down).T + alpha * x
        x_tilde, eps = next(latents) @ W.T, next(epsilons).reshape(m, 1)
        x_hat = eps * x + (1 - eps) * x_tilde
        g, D_x, D_x_tilde = slope(x_hat), score(x), score(x_tilde)
        norm = np.sqrt((g ** 2).sum(1))
        penalty = (norm - p["gamma"]) ** 2
        L = D_x_tilde - D_x + p["lam"] * penalty / p["gamma"] ** 2 + p["drift"] * D_x ** 2
        c = 2 * p["lam"] / p["gamma"] ** 2 * (norm - p["gamma"]) / norm / m
        of_real = (2 * p["drift"] * D_x - 1) / m            # ∂L/∂D(x)
        by_x = of_real @ x + x_tilde.mean(0) + c @ g
        by_s = of_real @ (x ** 2).sum(1) / 2 + (x_tilde ** 2).sum() / 2 / m + c @ (g * x_hat).sum(1)
        for name, grad in dict(a=old * down @ by_x, b=alpha * by_x, s=by_s).items():
            w[name] = w[name] if small and name == "b" else adam[name].step(w[name], grad)
        z = next(latents)
        by_W, L_G = -slope(z @ W.T).T @ z / m, -score(z @ W.T).mean()
        for name, grad in dict(A=old * up.T @ by_W, B=alpha * by_W).items():
            theta[name] = theta[name] if small and name == "B" else adam[name].step(theta[name], grad)
        ema = {name: p["ema"] * ema[name] + (1 - p["ema"]) * theta[name] for name in ema}
        log.append([L.mean(), L_G, penalty.mean(), (D_x - D_x_tilde).mean(), (D_x ** 2).mean()])

    assert not [*index, *latents, *epsilons]                # all that was drawn was used, each once
    saved = progan.read("run")
    assert saved["run"][0] == 6 and saved["run"][4] == 6 * m
    for part, values in (("D", w), ("G", theta), ("G_ema", ema)):
        for name, value in values.items():
            np.testing.assert_allclose(saved[part][name].numpy(), value, rtol=2e-4, atol=2e-6, err_msg=name)
    losses = logged("run", "L_D", "L_G", "penalty", "wasserstein", "drift")
    np.testing.assert_allclose(losses, log, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(saved["opt_D"]["state"][1]["exp_avg_sq"].numpy(), adam["b"].v, rtol=1e-3)
    assert saved["opt_G"]["state"][1]["step"] == saved["opt_D"]["state"][1]["step"] == 2


def test_a_run_grows_and_ends_by_itself_and_continuing_is_exact():
    whole = Path("whole")
    progan.train(**TINY, save_every=1, out=whole)
    rows = logged(whole, "step", "images", "resolution", "alpha")
    grown = [(4, 1)] * 4 + [(r, alpha) for r in (8, 16) for alpha in (0, 0.25, 0.5, 0.75, 1, 1, 1, 1)]
    assert rows.tolist() == [[i, 4 * i, *each] for i, each in enumerate(grown, 1)]
    for step, resolution in ((1, 4), (7, 8), (12, 16), (20, 16)):
        assert Image.open(whole / f"{step:06d}.png").size == (8 * resolution, 8 * resolution)
    with Image.open(whole / "training.gif") as film:
        assert film.size == (128, 128) and 15 < film.n_frames <= 20         # Pillow joins equal frames
    before = {p: p.read_bytes() for p in whole.iterdir()}
    progan.train(**TINY, save_every=1, out=whole)
    assert {p: p.read_bytes() for p in whole.iterdir()} == before
    # Stops at 4x4, between phases, in the middle of both fades, before and after a change of resolution
    for stop, since in {4: 0, 6: 2, 11: 3, 14: 2, 16: 0, 19: 3, 20: 4}.items():
        progan.train(**TINY, steps=stop, out="parts")
        saved = progan.read("parts")
        assert saved["run"][4] == 4 * stop
        for name in ("opt_G", "opt_D"):                     # reset when a fade begins and when it ends
            assert {int(state["step"]) for state in saved[name]["state"].values()} == ({since} if since else set())
    assert_same(training(progan, "parts"), training(progan, whole))
    progan.train(**TINY, steps=22, out="parts")             # beyond the schedule
    assert logged("parts", "step", "resolution", "alpha")[-1].tolist() == [22, 16, 1]


@pytest.mark.parametrize("steps, resolution, alpha", [(6, 8, 0.5), (20, 16, 1.0)])
def test_pictures_and_generated_images_are_the_moving_averages(steps, resolution, alpha):
    progan.train(**TINY, steps=steps, ema=0.5, out="run")
    saved, G = progan.read("run"), progan.load("run")
    z = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    shown = np.asarray(Image.open("run/%06d.png" % steps), dtype=float)
    shown = shown.reshape(8, resolution, 8, resolution).transpose(0, 2, 1, 3).reshape(64, resolution, resolution)
    folder = progan.generate("run", 5, "cpu", seed=0)
    one = np.stack([np.asarray(Image.open(folder / f"{i:06d}.png"), dtype=float) for i in range(5)])
    assert G.grown == (resolution, alpha) and np.abs(one - shown[:5]).max() <= 1
    for name in ("G_ema", "G"):
        G.load_state_dict(saved[name])
        off = np.abs(((G(z)[:, 0].clamp(-1, 1) + 1) * 127.5).round().numpy() - shown).max()
        assert off <= 1 if name == "G_ema" else off > 1


def test_what_makes_no_sense_is_refused():
    Path("mine").mkdir()
    Image.new("RGB", (40, 25)).save("mine/0.png")
    wrong = [{name: 0} for name in "kimg gamma fmap_base fmap_max batch_size steps nz save_every".split()]
    wrong += [dict(beta2=1.0), dict(size=48), dict(size=32, dataset="mine", digit=None)]
    for each in wrong:
        with pytest.raises(ValueError, match=next(iter(each))[:4]):         # 32: larger than every image in mine
            progan.train(**TINY | each, out="run")
    assert not Path("run").exists()


JOB = f"""
import signal, sys
sys.path.insert(0, {str(Path(progan.__file__).parent)!r})
import torch, progan
rank, world = progan.processes(torch.device("cpu"))
torch.manual_seed(0)
G, D = progan.Generator(8, 1, 64, 8, 8), progan.Discriminator(8, 1, 64, 8)
D.blocks[0][0].forward = lambda x: torch.cat([x, x[:, :1]], 1)      # couples no batch: halves average to the whole
x, z, weights = torch.randn(6, 1, 8, 8), torch.randn(6, 8), [*G.parameters(), *D.parameters()]
def gradients(x, z, average=False):
    for p in weights: p.grad = None
    L = D(G(z, 8, 0.5).detach(), 8, 0.5) - D(x, 8, 0.5) + 10 * (progan.grad_norm(D, x, 8, 0.5) - 1) ** 2
    (L + G(z, 8, 0.5).square().mean((1, 2, 3))).mean().backward()
    if average: progan.average_gradients(weights)
    return [p.grad for p in weights if p.grad is not None]
whole, mine, alone = gradients(x, z), gradients(x[rank::2], z[rank::2], True), gradients(x[rank::2], z[rank::2])
torch.testing.assert_close(whole, mine, rtol=1e-4, atol=1e-5)
assert len(whole) > 20 and max((a - b).abs().max() for a, b in zip(whole, alone)) > 1e-2
if rank == 1: progan.replacing = progan.save_images = progan.save_animation = progan.save_curve = None
drawn, randn, fade = [], torch.randn, progan.fade
def recorded(*args, **kwargs):
    value = randn(*args, **kwargs)
    if "generator" not in kwargs and len(args) == 2: drawn.append(value.flatten())
    return value
def ctrl_c(*args):
    if rank == 1: signal.raise_signal(signal.SIGINT)
    return fade(*args)
settings = {TINY!r} | dict(kimg=0.032, dataset="photos", root="root", digit=None)
torch.randn = recorded
G, D = progan.train(**settings, out="whole")
torch.save([[p.detach() for p in (*G.parameters(), *D.parameters())], torch.cat(drawn)], f"weights{{rank}}.pt")
progan.train(**settings, steps=6, out="parts")
progan.fade = ctrl_c
try: progan.train(**settings, out="parts")
except KeyboardInterrupt: pass
assert progan.read("parts")["run"][0] == 10
progan.fade = fade
progan.train(**settings, out="parts")
"""


def test_two_processes_train_as_one_and_only_the_first_writes(capsys):
    Path("photos").mkdir()
    for i in range(4):
        Image.new("RGB", (20, 20), (60 * i, 0, 0)).save(f"photos/{i}.png")
    Path("job.py").write_text(JOB)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "job.py"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (a, drawn_a), (b, drawn_b) = (torch.load(f"weights{rank}.pt") for rank in range(2))
    assert all(map(torch.equal, a, b))
    assert len(drawn_a) == len(drawn_b) > 1000 and torch.isin(drawn_a, drawn_b).sum() < 5       # other noise
    saved, lines = progan.read("whole"), done.stdout.splitlines()
    assert saved["run"][0] == 20 and saved["run"][4] == 20 * 8
    assert not torch.equal(*(states[0] for states in saved["run"][3]))
    assert_same(training(progan, "whole"), training(progan, "parts"))
    assert lines.count("device: cpu") == 4
    assert sum(line.startswith("decoding") for line in lines) == 1          # by the first
    settings = TINY | dict(kimg=0.032, dataset="photos", root="root", digit=None)
    progan.train(**settings, out="whole", steps=21)         # goes on with one process, and says so
    assert "processes 2 -> 1 from step 21 on" in capsys.readouterr().out
