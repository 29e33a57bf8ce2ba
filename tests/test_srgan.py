"""related/srgan.py against its paper: measures and losses in closed form, the networks of Figure 4, the features,
what is trained on and what is shown, steps of both phases against numpy, continuing, enlarging"""
import csv
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from related import srgan
from related.srgan import Discriminator, Generator, content_loss, downscale, features, luma, psnr, ssim
from truth import Adam, Drawn, assert_left, assert_same, described, flat, logged, norm, parameter, training

TINY = dict(blocks=1, width=2, size=32, crop=16, batch_size=4, held_out=5, device="cpu")


@pytest.fixture
def photographs(monkeypatch):
    """12 smooth images of 32x32 pixels, which are the data set"""
    coarse = torch.tensor(np.random.default_rng(0).integers(0, 256, (12, 3, 8, 8)), dtype=torch.float32)
    images = F.interpolate(coarse, scale_factor=4, mode="bilinear").to(torch.uint8)
    monkeypatch.setattr(srgan, "load_images", lambda *_, **__: images)
    return images


def in_range(pixels):
    return torch.as_tensor(pixels).float() / 127.5 - 1


def shown(file):
    """A picture's pixels, (3, H, W)"""
    return np.asarray(Image.open(file).convert("RGB"), dtype=float).transpose(2, 0, 1)


def assert_shows(pixels, x):
    """pixels are those of x in [-1, 1], to a rounding"""
    assert pixels.shape == x.shape
    assert np.abs(pixels - ((x.clamp(-1, 1) + 1) * 127.5).round().numpy()).max() <= 1


def flags(settings):
    return [str(word) for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]


def refused(capsys, *args):
    """The sentence with which the command line ends, with status 2"""
    with pytest.raises(SystemExit) as end:
        srgan.main(["--out", "run", "--device", "cpu", *args])
    err = capsys.readouterr().err
    assert end.value.code == 2 and len(err.splitlines()) == 1 and err.startswith("srgan.py: ")
    return err


# ---- What is measured, in float64 ----

def y_channel(x):
    """Y = 16 + 219 (0.299 R + 0.587 G + 0.114 B) of what remains when 4 pixels are cut.  (m, H - 8, W - 8)"""
    x = np.clip(np.asarray(x, dtype=float)[:, :, 4:-4, 4:-4], -1, 1)
    return 16 + 219 * np.einsum("c,nchw->nhw", [0.299, 0.587, 0.114], (x + 1) / 2)


def psnr_of(x, y):
    return np.array([10 * np.log10(255**2 / ((a - b)**2).mean()) for a, b in zip(y_channel(x), y_channel(y))])


def ssim_of(x, y):
    """Wang et al. 2004, window by window"""
    weights = np.array([[np.exp(-(i**2 + j**2) / (2 * 1.5**2)) for i in range(-5, 6)] for j in range(-5, 6)])
    weights /= weights.sum()
    results = []
    for a, b in zip(y_channel(x), y_channel(y), strict=True):
        values = []
        for i in range(a.shape[0] - 10):
            for j in range(a.shape[1] - 10):
                p, q = a[i:i + 11, j:j + 11], b[i:i + 11, j:j + 11]
                mean_p, mean_q = (weights * p).sum(), (weights * q).sum()
                var_p, var_q = (weights * (p - mean_p)**2).sum(), (weights * (q - mean_q)**2).sum()
                both = (weights * (p - mean_p) * (q - mean_q)).sum()
                values.append((2 * mean_p * mean_q + 2.55**2) * (2 * both + 7.65**2)
                              / ((mean_p**2 + mean_q**2 + 2.55**2) * (var_p + var_q + 7.65**2)))
        results.append(np.mean(values))
    return np.array(results)


@pytest.mark.parametrize("rgb, expected", [
    ((1, 1, 1), 235), ((-1, -1, -1), 16), ((1, -1, -1), 81.481), ((-1, 1, -1), 144.553), ((-1, -1, 1), 40.966),
    ((9, -9, 1.5), 81.481 + 40.966 - 16)])
def test_luma_of_colours(rgb, expected):
    Y = luma(torch.tensor(rgb).float().view(1, 3, 1, 1).expand(2, 3, 96, 96))
    torch.testing.assert_close(Y, torch.full((2, 1, 88, 88), float(expected)))


def test_images_that_differ_by_a_half_everywhere():
    x = torch.rand(2, 3, 20, 20) - 0.75
    assert content_loss(x, x + 0.5).item() == pytest.approx(0.25)
    expected = 20 * np.log10(255 / (0.25 * 219))
    np.testing.assert_allclose(psnr(x, x + 0.5), [expected, expected], 1e-5)


def test_psnr_and_ssim_equal_numpy_image_by_image():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1.2, 1.2, (3, 3, 21, 23))
    y = x + rng.normal(0, [[[[0.02]]], [[[0.1]]], [[[1]]]], x.shape)
    for ours, truth in ((psnr, psnr_of), (ssim, ssim_of)):
        np.testing.assert_allclose(ours(torch.tensor(x).float(), torch.tensor(y).float()), truth(x, y), 1e-4)
    assert ssim_of(x, y).min() < 0.6 and ssim_of(x, y).max() > 0.9


def test_equal_images_and_what_their_borders_do_not_change():
    x = torch.rand(2, 3, 96, 96) * 2 - 1
    y = torch.rand(2, 3, 96, 96) * 2 - 1
    y[..., 4:-4, 4:-4] = x[..., 4:-4, 4:-4]
    for other in x, y:
        assert torch.isinf(psnr(x, other)).all()
        torch.testing.assert_close(ssim(x, other), torch.ones(2))
    for i, j in ((4, 4), (4, -5), (-5, 4), (-5, -5)):       # the corners of what is compared
        y = x.clone()
        y[..., i, j] = -x[..., i, j].sign()
        assert torch.isfinite(psnr(x, y)).all()


def quarter(x):
    """In float64"""
    size = [side // 4 for side in x.shape[2:]]
    x = TF.resize(torch.as_tensor(x).double(), size, InterpolationMode.BICUBIC, antialias=True)
    return np.round((x.numpy().clip(-1, 1) + 1) * 127.5) / 255


def test_downscaling_is_bicubic_with_antialiasing_to_8_bits():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (5, 3, 64, 96))
    blocks = rng.choice([0, 255], (5, 3, 8, 12)).repeat(8, 2).repeat(8, 3)          # bicubic goes beyond them
    for pixels in noise, blocks:
        LR = downscale(in_range(pixels)).numpy() * 255
        assert LR.shape == (5, 3, 16, 24) and LR.min() >= 0 and LR.max() <= 255.001
        np.testing.assert_allclose(LR, LR.round(), 0, 1e-3)
        off = np.abs(LR - 255 * quarter(in_range(pixels)))
        assert off.max() < 1.01 and (off > 0.01).mean() < 0.01                      # halves
    for image in noise:                                     # Pillow's, which rounds twice
        (ours,) = downscale(in_range(image[None])) * 255
        image = Image.fromarray(image.transpose(1, 2, 0).astype(np.uint8))
        theirs = TF.pil_to_tensor(TF.resize(image, [16, 24], InterpolationMode.BICUBIC))
        assert (ours - theirs).abs().max() < 1.01
    for value in 0, 100, 255:
        torch.testing.assert_close(downscale(in_range(np.full((1, 3, 16, 16), value))) * 255,
                                   torch.full((1, 3, 4, 4), float(value)))


# ---- The networks ----

def leaves(network):
    return [layer for layer in network.modules() if not list(layer.children())]


def test_the_generator_is_figure_4s():
    G = Generator(16, 64)
    assert sum(p.numel() for p in G.parameters()) == 1_549_462
    block = ["64-64 k3 s1 p1+bias", *norm(64, "PReLU"), "64-64 k3 s1 p1+bias", *norm(64, "PReLU")[:1]]
    larger = ["64-256 k3 s1 p1+bias", "PixelShuffle", "PReLU"]
    last = ["64-3 k9 s1 p4+bias"]                           # and no tanh
    assert described(leaves(G)) == ["3-64 k9 s1 p4+bias", "PReLU", *16 * block, *block[3:], *larger, *larger, *last]
    with torch.no_grad():
        assert G(torch.rand(1, 3, 24, 24)).shape == (1, 3, 96, 96)


def test_the_generators_skips():
    torch.manual_seed(0)
    G, LR = Generator(3, 4), torch.rand(2, 3, 5, 7)
    layers = leaves(G)
    first, *blocks, trunk, rest = (nn.Sequential(*layers[i:j]) for i, j in zip([0, 2, 7, 12, 17, 19],
                                                                               [2, 7, 12, 17, 19, 99]))
    h = first(LR)
    for block in blocks:
        h = h + block(h)
    torch.testing.assert_close(G(LR), rest(first(LR) + trunk(h)))
    assert G(LR).shape == (2, 3, 20, 28)
    for layers in *blocks, trunk:
        nn.init.zeros_(layers[-1].weight)                   # the batch norm before each sum
    torch.testing.assert_close(G(LR), rest(first(LR)))


def test_pixels_are_shuffled():
    shuffles = [layer for layer in leaves(Generator(1, 4)) if isinstance(layer, nn.PixelShuffle)]
    assert len(shuffles) == 2
    for each in shuffles:
        assert each(torch.tensor([1, 2, 3, 4]).view(1, 4, 1, 1)).tolist() == [[[[1, 2], [3, 4]]]]


def test_the_discriminator_is_figure_4s():
    D, on = Discriminator(96, 64), "LeakyReLU 0.2"
    assert sum(p.numel() for p in D.parameters()) == 23_565_505
    expected, channels = ["3-64 k3 s1 p1+bias", on], 64     # no batch norm
    for n, stride in ((64, 2), (128, 1), (128, 2), (256, 1), (256, 2), (512, 1), (512, 2)):
        expected += [f"{channels}-{n} k3 s{stride} p1+bias", *norm(n, on)]
        channels = n
    assert described(D) == [*expected, "Flatten", "Linear 18432-1024+bias", on, "Linear 1024-1+bias", "Flatten"]
    assert Discriminator(48, 2)(torch.zeros(3, 3, 48, 48)).shape == (3,)


# ---- The features of VGG-19 ----

@pytest.mark.parametrize("content, i, j, shape", [("vgg54", 5, 4, (2, 512, 2, 2)),
                                                  ("vgg22", 2, 2, (2, 128, 16, 16))])
def test_features_are_those_after_a_convolutions_activation(monkeypatch, content, i, j, shape):
    """i, j: the j-th convolution before the i-th pooling"""
    torch.manual_seed(0)
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["E"])
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    for layer in convolutions:                              # that what is seen stays visible
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
    asked = []

    def vgg19(weights):
        asked.append(torchvision.models.get_model_weights("vgg19")[weights])
        return SimpleNamespace(features=layers)
    monkeypatch.setattr(torchvision.models, "vgg19", vgg19)
    phi, x = features(content, torch.device("cpu")), torch.rand(2, 3, 32, 32) * 2 - 1

    def by_hand():
        rest = iter(convolutions)
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
        h = ((x + 1) / 2 - mean) / std
        for block, length in enumerate([2, 2, 4, 4, 4], 1):
            for number in range(1, length + 1):
                h = F.relu(next(rest)(h))
                if (block, number) == (i, j):
                    return h
            h = F.max_pool2d(h, 2)
    with torch.no_grad():
        torch.testing.assert_close(12.75 * phi(x), by_hand())
        assert phi(x).shape == shape and phi(x).min() == 0 < phi(x).max()
    assert [it.name for it in asked] == ["IMAGENET1K_V1"]


def test_the_content_loss_is_the_features_mean_square():
    HR, SR = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8, requires_grad=True)
    loss = content_loss(HR, SR, lambda x: x**2)
    torch.testing.assert_close(loss, ((HR**2 - SR**2)**2).mean())
    torch.testing.assert_close(content_loss(SR, HR, lambda x: x**2), loss)
    (grad,) = torch.autograd.grad(loss, SR)
    torch.testing.assert_close(grad, -4 * SR * (HR**2 - SR**2) / SR.numel())


def test_a_failed_download_and_what_does_not_exist_are_one_sentence(monkeypatch, photographs, capsys):
    def vgg19(weights):
        raise errors.pop(0)
    errors = [urllib.error.URLError("no network"), RuntimeError("invalid hash value")]
    monkeypatch.setattr(torchvision.models, "vgg19", vgg19)
    for content, reason in (("vgg99", "vgg99"), ("vgg54", "no network"), ("vgg22", "invalid hash value")):
        sentence = refused(capsys, "--content", content)
        assert "--content" in sentence and reason in sentence and not Path("run").exists()
    assert "--unknown" in refused(capsys, "--unknown", "3")
    for held_out in "3", "12":
        sentence = refused(capsys, "--held-out", held_out, *flags(dict(steps=1, size=32, crop=16)))
        assert f"at least 4 and fewer than all 12 images, not {held_out}" in sentence and not Path("run").exists()
    for words in (["--crop", "24"], ["--size", "28"], ["--size", "66"], ["--size", "16"]):
        sentence = refused(capsys, "--steps", "1", *words)
        assert "--crop must be a multiple of 16" in sentence and not Path("run").exists()


# ---- What is trained on, and what is shown ----

def test_crops_are_cut_anywhere_out_of_all_images_but_the_last(monkeypatch):
    pixels = np.zeros((30, 3, 20, 20), np.uint8)            # each has its row, its column, its image
    pixels[:, 0], pixels[:, 1], pixels[:, 2] = (np.arange(20)[:, None], np.arange(20),
                                                np.arange(30)[:, None, None])
    seen, down = [], srgan.downscale

    def kept(HR):
        seen.append(((HR + 1) * 127.5).round().numpy().astype(int))
        return down(HR)
    for name, it in dict(downscale=kept, load_images=lambda *_, **__: torch.tensor(pixels),
                         Generator=TinyGenerator, Discriminator=TinyCritic).items():
        monkeypatch.setattr(srgan, name, it)
    srgan.train(crop=16, size=20, held_out=4, steps=40, device="cpu", out="run")
    tested, *crops = seen
    assert (tested == pixels[-4:]).all() and len(crops) == 40
    for HR in crops:
        i, j = HR[0, :2, 0, 0]
        assert (HR == pixels[HR[:, 2, 0, 0], :, i:i + 16, j:j + 16]).all() and len(HR) == 8
    places = {tuple(HR[0, :2, 0, 0]) for HR in crops}
    assert {i for i, _ in places} == {j for _, j in places} == set(range(5)) and len(places) > 9
    assert {k for HR in crops for k in HR[:, 2, 0, 0]} == set(range(26))


def generator(state):
    G = Generator(1, 2)
    G.load_state_dict(state)
    return G.eval().requires_grad_(False)


def test_measures_and_pictures_are_of_the_held_out_images(photographs, capsys):
    """... by running statistics. lr is so large that the one step of the second phase can be seen"""
    G, _ = srgan.train(**TINY, steps=3, pretrain=2, lr=0.1, save_every=1, out="run")
    saved, HR = srgan.read("run"), in_range(photographs[-5:])
    LR = downscale(HR)
    SR, before = (generator(saved[name])(LR) for name in ("G", "SRResNet"))
    bicubic = F.interpolate(2 * LR - 1, size=(32, 32), mode="bicubic")
    expected = psnr_of(SR, HR).mean(), ssim_of(SR, HR).mean()
    np.testing.assert_allclose(logged("run", "psnr", "ssim")[-1], expected, 1e-4, 1e-5)
    assert f"bicubic: psnr {psnr_of(bicubic, HR).mean():.2f}  ssim {ssim_of(bicubic, HR).mean():.4f}\n" in (
        capsys.readouterr().out)
    assert not G.training and torch.equal(G(LR), SR) and torch.equal(srgan.load("run")(LR), SR)
    first, second, third = (shown(f"run/00000{step}.png").reshape(3, 4, 32, 4, 32).transpose(1, 3, 0, 2, 4)
                            for step in (1, 2, 3))
    for row, x in zip(third, (bicubic, before, SR, HR), strict=True):
        assert_shows(row, x[:4])
    for picture in first, second:
        assert (picture[1] == picture[2]).all() and (picture[[0, 3]] == third[[0, 3]]).all()
    assert (second[1] == third[1]).all() and np.abs(third[1] - third[2]).max() > 9


# ---- Steps of both phases ----

class TinyGenerator(nn.Module):
    """G(LR) = θ₀ + θ₁ u + θ₂ u², u: every pixel 4x4 times"""
    start = np.array([0.1, 0.6, -0.3])

    def __init__(self, *_):
        super().__init__()
        self.theta = parameter(self.start)

    def forward(self, LR):
        u = LR.repeat_interleave(4, 2).repeat_interleave(4, 3)
        return self.theta[0] + self.theta[1] * u + self.theta[2] * u**2


class TinyCritic(nn.Module):
    """D(x) = w₀ + w₁ x̄ + w₂ mean(x²)"""
    start = np.array([0.2, -0.9, 0.7])
    seen = []

    def __init__(self, *_):
        super().__init__()
        self.w = parameter(self.start)
        self.seen.clear()

    def forward(self, x):
        self.seen.append(x.requires_grad)
        return self.w[0] + self.w[1] * x.mean((1, 2, 3)) + self.w[2] * x.square().mean((1, 2, 3))

    @staticmethod
    def by_w(x):
        return np.stack([np.ones(len(x)), x.mean((1, 2, 3)), (x**2).mean((1, 2, 3))], 1)


@pytest.mark.parametrize("changed", [{}, dict(lr=0.02, adversarial=0.5, batch_size=3, content="vgg22")])
def test_two_steps_of_srresnet_and_two_of_srgan_equal_numpy(monkeypatch, changed):
    drawn = Drawn(monkeypatch, srgan, Generator=TinyGenerator, Discriminator=TinyCritic)
    drawn.images = torch.tensor(np.random.default_rng(0).integers(0, 256, (12, 3, 32, 32)), dtype=torch.uint8)
    scale = 3 if changed else 1                             # of what stands for the features

    def thrice(content, device):
        assert content == "vgg22" and device.type == "cpu"
        return lambda x: 3 * x
    monkeypatch.setattr(srgan, "features", thrice)
    G, D = srgan.train(**changed, pretrain=2, steps=4, size=32, held_out=6, save_every=1, device="cpu", out="run")

    k = dict(lr=1e-3, adversarial=1e-3, batch_size=8) | changed
    theta, w, m = TinyGenerator.start, TinyCritic.start, k["batch_size"]
    pixels, at = drawn.images[:6].double().numpy() / 127.5 - 1, drawn["randint"]
    opt_G, opt_D = (Adam(k["lr"], 0.9, 0.999) for _ in range(2))
    rows = []
    for t in 1, 2, 3, 4:
        opt_G.lr = opt_D.lr = k["lr"] if t == 1 else k["lr"] / 10
        assert next(at).tolist() == [0, 0]                  # a crop is a whole image
        HR = pixels[next(at).astype(int)]
        u = quarter(HR).repeat(4, 2).repeat(4, 3)
        by_theta = np.stack([np.ones_like(u), u, u**2])
        SR = np.tensordot(theta, by_theta, 1)
        l_X, by_SR = (scale * (HR - SR)**2 * scale).mean(), scale**2 * 2 * (SR - HR) / SR.size
        l_Gen = l_D = 0
        if t > 2:
            D_HR, D_SR = (1 / (1 + np.exp(-TinyCritic.by_w(each) @ w)) for each in (HR, SR))
            l_D = (-np.log(D_HR) - np.log(1 - D_SR)).mean()
            w = opt_D.step(w, ((D_HR - 1) @ TinyCritic.by_w(HR) + D_SR @ TinyCritic.by_w(SR)) / m)
            D_SR = 1 / (1 + np.exp(-TinyCritic.by_w(SR) @ w))
            l_Gen = -np.log(D_SR).mean()
            by_D = k["adversarial"] * (D_SR - 1)[:, None, None, None] / m
            by_SR = by_SR + by_D * (w[1] + 2 * w[2] * SR) / SR[0].size
        rows.append(dict(l_X=l_X, l_Gen=l_Gen, l_D=l_D))
        theta = opt_G.step(theta, (by_theta * by_SR).sum((1, 2, 3, 4)))
        if t == 2:
            SRResNet = theta

    assert_left(srgan, rows, (at,), G=(G, theta, opt_G), D=(D, w, opt_D))
    np.testing.assert_allclose(flat(srgan.read("run")["SRResNet"].values()), SRResNet, 1e-6)
    assert TinyCritic.seen == 2 * [False, False, True]      # HR, SR as a constant; in G's step, with a history


class OneColour(nn.Module):
    """A generator that paints everything in one colour; what it was, and what it was given in training"""
    seen, colours = set(), []

    def __init__(self, *settings):
        super().__init__()
        self.theta = parameter(0.0)
        self.seen.add(settings)

    def forward(self, LR):
        if self.training:
            self.seen.add((*LR.shape, LR.max().item()))
            self.colours.append(self.theta.item())
        m, _, height, width = LR.shape
        return self.theta.expand(m, 3, 4 * height, 4 * width)


class Undecided(OneColour):
    """D = 1/2, whatever it sees"""
    def forward(self, x):
        return 0 * self.theta + x.new_zeros(len(x))


def test_some_steps_of_a_run_with_the_defaults(monkeypatch):
    """l_X rises with G's colour, evenly, so that every step of Adam's has the length lr"""
    pixels = torch.zeros(60, 3, 64, 64, dtype=torch.uint8)
    pixels[10:] = 255                                       # the 50 that are held out

    def some(run):
        assert run.config.steps == 3000 and run.config.save_every == 200
        run.since, run.begin = 0, 0.0
        for run.step in 1, 1000, 1001, 2000, 2001, 3000:
            yield run.step
            run.save()
    OneColour.seen.clear()
    OneColour.colours.clear()
    monkeypatch.setattr(srgan.Run, "__iter__", some)
    for name, it in dict(Generator=OneColour, Discriminator=Undecided, load_images=lambda *_, **__: pixels,
                         content_loss=lambda HR, SR, phi: SR.mean()).items():
        monkeypatch.setattr(srgan, name, it)
    G, _ = srgan.train(size=64, device="cpu")
    assert OneColour.seen == {(4, 32), (48, 32), (8, 3, 12, 12, 0.0)}
    colours = [*OneColour.colours, G.theta.item()]
    np.testing.assert_allclose(colours, [0, -1e-3, -2e-3, -2.1e-3, -2.2e-3, -2.3e-3, -2.4e-3], 1e-4)
    (SRResNet,) = srgan.read("runs/srgan-mnist")["SRResNet"].values()
    assert SRResNet.item() == colours[4]
    adversarial = logged("runs/srgan-mnist", "l_Gen", "l_D") * [[1], [999], [1], [999], [1], [999]]     # sums
    np.testing.assert_allclose(adversarial, 4 * [(0, 0)] + 2 * [(0.69315, 1.38629)], 1e-5)


def test_the_size_of_images_and_where_they_come_from(monkeypatch):
    asked = []

    def load_images(*args, **named):
        asked.append((*args, named))
        raise OSError
    monkeypatch.setattr(srgan, "load_images", load_images)
    for settings in {}, dict(dataset=Path("mine"), root="there"), dict(size=64):
        with pytest.raises(OSError):
            srgan.train(**settings, device="cpu")
    assert asked == [("mnist", None, 32, None, dict(channels=3)), ("mine", None, 128, "there", dict(channels=3)),
                     ("mnist", None, 64, None, dict(channels=3))]


# ---- Continue ----

def test_three_steps_and_three_steps_are_six_steps(photographs, capsys, monkeypatch):
    settings = TINY | dict(pretrain=4)
    srgan.train(**settings, steps=6, save_every=1, out="whole")
    srgan.train(**settings, steps=3, out="parts")
    srgan.train(**settings, steps=6, out="parts")
    whole, parts = training(srgan, "whole"), training(srgan, "parts")
    assert_same(whole, parts)                               # how often it saves changes nothing, either
    assert {"G", "D", "SRResNet", "opt_G", "opt_D", "states"} < whole.keys()
    losses, figures = (logged("whole", *names) for names in (("l_X", "l_Gen", "l_D"), ("psnr", "ssim")))
    means = losses[:3].mean(0), losses[3:].mean(0)
    np.testing.assert_allclose(logged("parts", "l_X", "l_Gen", "l_D"), means, 1e-5)
    np.testing.assert_allclose(logged("parts", "psnr", "ssim"), figures[[2, 5]])
    log, before = Path("parts/log.csv").read_text(), Path("parts/checkpoint.pt").read_bytes()
    assert [row["step"] for row in csv.DictReader(log.splitlines())] == ["3", "6"]
    capsys.readouterr()
    G, D = srgan.train(**settings, steps=6, out="parts")
    assert "6 of 6 steps are done" in capsys.readouterr().out
    for network, name in ((G, "G"), (D, "D")):
        assert_same(dict(network.state_dict()), dict(parts[name]))
    other = flags(settings | dict(pretrain=5, steps=9, out="parts"))
    assert "pretrain 4, not 5" in refused(capsys, *other)
    monkeypatch.setattr(srgan, "load_images", lambda *_, **__: photographs[1:])
    srgan.train(**settings, steps=6, out="parts")
    assert "images 12 -> 11 from step 7 on" in capsys.readouterr().out
    assert Path("parts/checkpoint.pt").read_bytes() == before


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("trapped"),)


@pytest.mark.parametrize("checkpoint", [Trap(), {}, dict(settings=dict(blocks=1, width=2), G={})])
def test_a_bad_checkpoint_is_refused_and_not_run(photographs, capsys, checkpoint):
    for folder in "run", "mine":
        Path(folder).mkdir()
    torch.save(dict(srgan=checkpoint), "run/checkpoint.pt")
    for args in (flags(TINY), ["--enlarge", "mine"]):
        assert "run is missing, damaged" in refused(capsys, *args)
    assert not Path("trapped").exists() and not Path("run/enlarged").exists()


def test_a_folder_with_other_files_is_no_run(photographs, capsys):
    Path("run").mkdir()
    Path("run/000001.png").write_bytes(b"mine")
    assert "holds other files" in refused(capsys, *flags(TINY | dict(steps=1)))
    assert Path("run/000001.png").read_bytes() == b"mine"


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(monkeypatch, photographs, capsys):
    srgan.train(**TINY, steps=1, out="run")
    before = Path("run/checkpoint.pt").read_bytes()
    monkeypatch.setattr(srgan, "content_loss", lambda HR, SR, phi: SR.mean() * float("nan"))
    assert "l_X is nan at step 2" in refused(capsys, *flags(TINY | dict(steps=2)))
    assert Path("run/checkpoint.pt").read_bytes() == before and not Path("run/000002.png").exists()


# ---- Enlarge ----

def test_photographs_of_a_folder_are_enlarged_by_the_run(photographs, capsys):
    """Upright, of any size and depth, transparency on white; other files are left alone, damaged ones named"""
    srgan.train(**TINY, steps=1, out="run")
    rng = np.random.default_rng(0)
    turned, grey = rng.integers(0, 256, (9, 14, 3), dtype=np.uint8), rng.integers(0, 256, (11, 20), dtype=np.uint8)
    clear = rng.integers(0, 256, (8, 6, 4), dtype=np.uint8)
    Path("mine/more").mkdir(parents=True)
    Path("mine/notes.txt").write_text("no image")
    Path("mine/damaged.png").write_bytes(b"no image")
    Image.fromarray(clear).save("mine/more/grey.png")
    exif = Image.Exif()
    exif[0x0112] = 6                                        # to be shown turned to the right
    Image.fromarray(turned).save("mine/turned.png", exif=exif)
    Image.fromarray(grey).save("mine/GREY.PNG")
    Image.fromarray(128 * grey.astype(np.uint16)).save("mine/deep.png")
    srgan.main(["--enlarge", "mine", "--out", "run", "--device", "cpu", "--blocks", "3"])   # the checkpoint's: 1
    files = {file.relative_to("run/enlarged").as_posix() for file in Path("run/enlarged").rglob("*.png")}
    assert files == {"GREY.PNG.png", "deep.png.png", "turned.png.png", "more/grey.png.png"}
    out, err = capsys.readouterr()
    assert "run/enlarged\n" in out and err.startswith("left out mine/damaged.png")
    G = srgan.load("run")
    alpha = clear[..., 3:] / 255.
    uprights = {"turned.png": np.rot90(turned, -1), "GREY.PNG": grey[..., None].repeat(3, 2),
                "deep.png": (grey // 2)[..., None].repeat(3, 2),
                "more/grey.png": (clear[..., :3] * alpha + 255 * (1 - alpha)).round()}
    for name, upright in uprights.items():
        (x,) = G(torch.tensor(upright.transpose(2, 0, 1) / 255)[None].float())
        assert x.shape == (3, 4 * len(upright), 4 * upright.shape[1])
        assert_shows(shown(f"run/enlarged/{name}.png"), x)


def test_errors_of_enlarging_are_one_sentence(photographs, capsys):
    Path("mine").mkdir()
    assert "run is missing, damaged" in refused(capsys, "--enlarge", "mine")
    srgan.train(**TINY, steps=1, out="run")
    for folder in "nowhere", "mine":
        assert f"no images in {folder}" in refused(capsys, "--enlarge", folder)


@pytest.mark.cuda
def test_a_checkpoint_moves_between_cpu_and_cuda(photographs):
    settings = TINY | dict(pretrain=2, out="run")
    srgan.train(**settings, steps=1)
    srgan.train(**settings | dict(device="cuda"), steps=4)
    srgan.train(**settings, steps=5)
    assert srgan.read("run")["run"][0] == 5
    Path("mine").mkdir()
    Image.new("RGB", (9, 14), "red").save("mine/a.png")
    srgan.main(["--enlarge", "mine", "--out", "run", "--device", "cuda"])
    assert Image.open("run/enlarged/a.png.png").size == (36, 56)
