"""related/srgan.py against its paper: measures and losses in closed form, the networks of Figure 4, the features,
what is trained on and what is shown, steps of both phases against numpy, enlarging"""
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
from truth import Adam, Drawn, assert_left, described, flat, logged, norm, parameter, read

TINY = dict(blocks=1, width=2, size=32, crop=16, batch_size=4, held_out=5, device="cpu")


def in_range(pixels):
    return torch.as_tensor(pixels).float() / 127.5 - 1


def assert_shows(file, x):
    """The picture's pixels are those of x in [-1, 1], (3, H, W), to a rounding"""
    pixels = np.asarray(Image.open(file).convert("RGB"), dtype=float).transpose(2, 0, 1)
    np.testing.assert_allclose(pixels, (x.clamp(-1, 1) + 1) * 127.5, atol=1)


# ---- What is measured ----

@pytest.mark.parametrize("rgb, expected", [
    ((1, 1, 1), 235), ((-1, -1, -1), 16), ((1, -1, -1), 81.481), ((-1, 1, -1), 144.553), ((-1, -1, 1), 40.966),
    ((9, -9, 1.5), 81.481 + 40.966 - 16)])
def test_luma_of_colours(rgb, expected):
    Y = luma(torch.tensor(rgb).float().view(1, 3, 1, 1).expand(2, 3, 96, 96))
    torch.testing.assert_close(Y, torch.full((2, 1, 88, 88), float(expected)))


def test_images_that_differ_by_a_half_everywhere():
    """But for 4 pixels at every border"""
    x = torch.rand(2, 3, 20, 20) - 0.75
    assert content_loss(x, x + 0.5).item() == pytest.approx(0.25)
    y = x + 0.5
    y[..., :4] = y[..., -4:, :] = -1
    torch.testing.assert_close(psnr(x, y), torch.full((2,), 20 * np.log10(255 / (0.25 * 219))).float())
    assert torch.isinf(psnr(x, x)).all()


def test_ssim_of_one_window_and_of_equal_images():
    """Wang et al. 2004, by numpy"""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (3, 3, 19, 19))                  # 11x11 pixels without the borders
    y = np.clip(x + rng.normal(0, [[[[0.02]]], [[[0.1]]], [[[1]]]], x.shape), -1, 1)
    window = np.array([[np.exp(-(i**2 + j**2) / (2 * 1.5**2)) for i in range(-5, 6)] for j in range(-5, 6)])
    window /= window.sum()
    for ours, a, b in zip(ssim(torch.tensor(x).float(), torch.tensor(y).float()), x, y):
        a, b = (16 + 219 * np.tensordot([0.299, 0.587, 0.114], (it[:, 4:-4, 4:-4] + 1) / 2, 1) for it in (a, b))
        E_a, E_b = (window * a).sum(), (window * b).sum()
        var_a, var_b, both = ((window * (p - E_p) * (q - E_q)).sum()
                              for p, E_p, q, E_q in ((a, E_a, a, E_a), (b, E_b, b, E_b), (a, E_a, b, E_b)))
        expected = ((2 * E_a * E_b + 2.55**2) * (2 * both + 7.65**2)
                    / ((E_a**2 + E_b**2 + 2.55**2) * (var_a + var_b + 7.65**2)))
        assert ours.item() == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(ssim(x := torch.rand(2, 3, 40, 40), x), torch.ones(2))


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

@pytest.mark.parametrize("content, i, j, n", [("vgg54", 5, 4, 512), ("vgg22", 2, 2, 128)])
def test_features_are_those_after_a_convolutions_activation(monkeypatch, content, i, j, n):
    """i, j: the j-th convolution before the i-th pooling"""
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["E"])
    for layer in layers:
        if isinstance(layer, nn.Conv2d):                    # that what is seen stays visible
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
    monkeypatch.setattr(torchvision.models, "vgg19", lambda weights: SimpleNamespace(features=layers))
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    h, pooled, convolved = ((x + 1) / 2 - mean) / std, 0, 0
    for layer in layers:
        h = layer(h)
        if isinstance(layer, nn.MaxPool2d):
            pooled, convolved = pooled + 1, 0
        convolved += isinstance(layer, nn.Conv2d)
        if isinstance(layer, nn.ReLU) and (pooled + 1, convolved) == (i, j):
            break
    phi = features(content, "cpu")
    torch.testing.assert_close(12.75 * phi(x), h)
    assert h.shape[1] == n and h.max() > 0


# ---- What is shown ----

def test_measures_and_pictures_are_of_the_held_out_images(monkeypatch):
    """... by running statistics. lr is so large that the one step of the second phase can be seen"""
    coarse = torch.tensor(np.random.default_rng(0).integers(0, 256, (12, 3, 8, 8)), dtype=torch.float32)
    images = F.interpolate(coarse, scale_factor=4, mode="bilinear").to(torch.uint8)
    monkeypatch.setattr(srgan, "load_images", lambda *_: images)
    srgan.train(**TINY, steps=3, pretrain=2, lr=0.1, save_every=1, out="run")
    HR, SRResNet = in_range(images[-5:]), Generator(1, 2).eval()
    LR, saved = downscale(HR), read("run")
    SRResNet.load_state_dict(saved["SRResNet"])
    SR = srgan.load("run/checkpoint.pt")(LR)
    bicubic = F.interpolate(2 * LR - 1, size=(32, 32), mode="bicubic")
    expected = psnr(SR, HR).mean(), ssim(SR, HR).mean()
    np.testing.assert_allclose(logged("run", "psnr", "ssim")[-1], expected, 1e-5)
    rows = [torch.cat([*it[:4].detach()], 2) for it in (bicubic, SRResNet(LR), SR, HR)]
    assert_shows("run/000003.png", torch.cat(rows, 1))
    assert (rows[1] - rows[2]).abs().max() > 0.1
    assert_shows("run/000002.png", torch.cat([rows[0], rows[1], rows[1], rows[3]], 1))


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

    def __init__(self, *_):
        super().__init__()
        self.w = parameter(self.start)

    def forward(self, x):
        return self.w[0] + self.w[1] * x.mean((1, 2, 3)) + self.w[2] * x.square().mean((1, 2, 3))

    @staticmethod
    def by_w(x):
        return np.stack([np.ones(len(x)), x.mean((1, 2, 3)), (x**2).mean((1, 2, 3))], 1)


@pytest.mark.parametrize("changed", [{}, dict(lr=0.02, adversarial=0.5, batch_size=3, crop=16, content="vgg22")])
def test_two_steps_of_srresnet_and_two_of_srgan_equal_numpy(monkeypatch, changed):
    drawn = Drawn(monkeypatch, srgan, Generator=TinyGenerator, Discriminator=TinyCritic)
    drawn.images = torch.tensor(np.random.default_rng(0).integers(0, 256, (12, 3, 32, 32)), dtype=torch.uint8)
    scale = 3 if changed else 1                             # of what stands for the features

    def thrice(content, device):
        assert content == "vgg22" and device == "cpu"
        return lambda x: 3 * x
    monkeypatch.setattr(srgan, "features", thrice)
    G, D = srgan.train(**changed, pretrain=2, steps=4, size=32, held_out=6, save_every=1, device="cpu", out="run")

    k = dict(lr=1e-3, adversarial=1e-3, batch_size=8, crop=32) | changed    # 48, but no more than the image has
    theta, w, m = TinyGenerator.start, TinyCritic.start, k["batch_size"]
    pixels, at = drawn.images[:6].double().numpy() / 127.5 - 1, drawn["randint"]
    opt_G, opt_D = (Adam(k["lr"], 0.9, 0.999) for _ in range(2))
    rows, places = [], set()
    for t in 1, 2, 3, 4:
        opt_G.lr = opt_D.lr = k["lr"] if t == 1 else k["lr"] / 10
        i, j = next(at).astype(int)                         # where a crop is cut out of all images of the batch
        HR = pixels[next(at).astype(int)][..., i:i + k["crop"], j:j + k["crop"]]
        places.add((i, j))
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

    assert places == {(0, 0)} or changed and len(places) > 1
    assert_left(rows, (at,), G=(G, theta, opt_G), D=(D, w, opt_D))
    np.testing.assert_allclose(flat(read("run")["SRResNet"].values()), SRResNet, 1e-6)


# ---- Enlarge ----

def test_photographs_of_a_folder_are_enlarged_by_the_run(capsys):
    """Upright, of any size, grey or not; other files are left alone, damaged ones named"""
    G, rng = Generator(1, 2).eval(), np.random.default_rng(0)
    turned, grey = rng.integers(0, 256, (9, 14, 3), dtype=np.uint8), rng.integers(0, 256, (11, 20), dtype=np.uint8)
    Path("mine/more").mkdir(parents=True)
    Path("run").mkdir()
    torch.save(dict(config=dict(blocks=1, width=2), G=G.state_dict()), "run/checkpoint.pt")
    Path("mine/notes.txt").write_text("no image")
    Path("mine/damaged.png").write_bytes(b"no image")
    exif = Image.Exif()
    exif[0x0112] = 6                                        # to be shown turned to the right
    Image.fromarray(turned).save("mine/turned.png", exif=exif)
    Image.fromarray(grey).save("mine/more/GREY.PNG")
    srgan.main(["--enlarge", "mine", "--out", "run", "--device", "cpu", "--blocks", "3"])   # the checkpoint's: 1
    uprights = {"turned.png": np.rot90(turned, -1), "more/GREY.PNG": grey[..., None].repeat(3, 2)}
    files = {file.relative_to("run/enlarged").as_posix() for file in Path("run/enlarged").rglob("*.png")}
    assert files == {f"{name}.png" for name in uprights}
    assert "left out mine/damaged.png" in capsys.readouterr().out
    for name, upright in uprights.items():
        (x,) = G(torch.tensor(upright.transpose(2, 0, 1) / 255)[None].float()).detach()
        assert x.shape == (3, 4 * len(upright), 4 * upright.shape[1])
        assert_shows(f"run/enlarged/{name}.png", x)
    with pytest.raises(SystemExit):
        srgan.main(["--enlarge", "nowhere", "--out", "run"])
    assert "no images in nowhere" in capsys.readouterr().err
