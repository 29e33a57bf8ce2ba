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
from progan import Conv, Discriminator, Generator, downsample, minibatch_stddev, pixel_norm, schedule, upsample
from truth import Adam, Drawn, assert_same, logged, read, training

TINY = dict(digit=7, size=16, nz=8, fmap_max=4, batch_size=4, kimg=0.016, device="cpu")     # 4 steps a phase


def test_layers_are_those_of_table_2():
    def layers(block):
        return ["{1}-{0}".format(*layer.weight.shape) if isinstance(layer, Conv) else type(layer).__name__[:9]
                for layer in block]
    G, D, n = Generator(1024), Discriminator(1024), [512, 512, 512, 512, 256, 128, 64, 32, 16]
    norm = ["LeakyReLU", "PixelNorm"]
    assert layers(G.blocks[0]) == ["512-512", *norm, "512-512", *norm]
    assert layers(D.blocks[0]) == ["Minibatch", "513-512", "LeakyReLU", "512-512", "LeakyReLU", "512-1", "Flatten"]
    assert [D.blocks[0][k].weight.shape[-1] for k in (1, 3, 5)] == [3, 4, 1] and G.blocks[0][0].padding == 3
    for k, (a, b) in enumerate(zip(n, n[1:]), 1):
        assert layers(G.blocks[k]) == ["Upsample", f"{a}-{b}", *norm, f"{b}-{b}", *norm]
        assert layers(D.blocks[k]) == [f"{b}-{b}", "LeakyReLU", f"{b}-{a}", "LeakyReLU", "AvgPool2d"]
    assert layers(G.to_rgb) == [f"{b}-3" for b in n]
    assert [layers(each) for each in D.from_rgb] == [[f"3-{b}", "LeakyReLU"] for b in n]
    assert all(it.negative_slope == 0.2 for net in (G, D) for it in net.modules() if type(it) is nn.LeakyReLU)


def test_equalised_learning_rate():
    torch.manual_seed(0)
    G, D = Generator(64), Discriminator(64)
    for conv in [layer for network in (G, D) for layer in network.modules() if isinstance(layer, Conv)]:
        n, gain = conv.weight.numel(), 1 if conv in [*G.to_rgb, D.blocks[0][-2]] else 2 ** 0.5
        assert conv.scale == pytest.approx(gain / conv.weight[0].numel() ** 0.5) and not conv.bias.any()
        assert conv.weight.std().item() == pytest.approx(1, rel=5 / (2 * n) ** 0.5)
    nn.init.constant_(conv.weight, 3), nn.init.constant_(conv.bias, 5)      # the bias is not scaled
    x = torch.ones(1, *conv.weight.shape[1:])
    assert conv(x)[0, 0].diagonal()[conv.padding].item() == pytest.approx(3 * x.numel() * conv.scale + 5, rel=1e-4)


def test_pixel_norm_also_of_latents():
    x = 3 * torch.randn(2, 5, 4, 6).numpy()
    expected = x / np.sqrt((x ** 2).mean(1, keepdims=True) + 1e-8)
    np.testing.assert_allclose(pixel_norm(torch.tensor(x)), expected, rtol=1e-5)
    G, z = Generator(8, 1, 16, 8, nz=6), torch.randn(3, 6)
    assert not pixel_norm(torch.zeros(3, 7)).any() and torch.allclose(G(z), G(9 * z), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("m", [1, 3, 16])
def test_minibatch_stddev(m):
    x = torch.randn(m, 5, 4, 3, dtype=torch.float64) * 2 + 1
    y, a = minibatch_stddev(x), x.numpy()
    assert y.shape == (m, 6, 4, 3) and torch.equal(y[:, :5], x)
    np.testing.assert_allclose(y[:, 5].numpy(), np.sqrt(((a - a.mean(0)) ** 2).mean(0) + 1e-8).mean(), rtol=1e-12)
    x = x[:1].expand(m, 5, 4, 3).clone().requires_grad_()                   # equal images: finite, too
    (grad,) = torch.autograd.grad(minibatch_stddev(x).square().sum(), x)
    assert grad.isfinite().all()


@pytest.mark.parametrize("resolution", [8, 64])
def test_fading_begins_with_the_small_network_and_ends_with_the_new_one(resolution):
    torch.manual_seed(0)
    G, D, half = Generator(64, 3, 16, 8, nz=4), Discriminator(64, 3, 16, 8), resolution // 2
    k, z, x = resolution.bit_length() - 3, torch.randn(2, 4), torch.randn(2, 3, resolution, resolution)
    with torch.no_grad():
        old, image = upsample(G(z, half, 1.0)), G(z, resolution, 1.0)
        assert torch.equal(G(z, resolution, 0.0), old)
        assert torch.equal(D(x, resolution, 0.0), D(downsample(x), half, 1.0))
        torch.testing.assert_close(G(z, resolution, 0.3), 0.7 * old + 0.3 * image)
        h = 0.7 * D.from_rgb[k - 1](downsample(x)) + 0.3 * D.blocks[k](D.from_rgb[k](x))
        torch.testing.assert_close(D(x, resolution, 0.3), nn.Sequential(*list(D.blocks)[k - 1::-1])(h))


def test_schedule(monkeypatch):
    assert progan.train.__defaults__[:12] == (1e-3, 0, 0.99, 10, 1, 1e-3, 0.999, 800, None, 512, 8192, 512)  # A.1
    assert schedule(12_200_000) == schedule(12_200_000, 1024, 800.0) == (15, 1024, 0.25)
    assert schedule(12_800_000) == schedule(10**9) == (16, 1024, 1.0)
    for size in (4, 8, 16):                                 # image by image
        expected = [(4, 1.0)] * 5 + [(r, alpha) for r in (8, 16) if r <= size
                                     for alpha in (0.0, 0.2, 0.4, 0.6, 0.8, *5 * [1.0])] + 20 * [(size, 1.0)]
        assert [schedule(images, size, 0.005)[1:] for images in range(len(expected))] == expected
    monkeypatch.setattr(progan, "load_images", lambda *_: torch.zeros(1, 1, 4, 4, dtype=torch.uint8))
    monkeypatch.setattr(progan, "folder", lambda _, config: sys.exit(config["steps"]))
    for world, steps in (1, "1464288"), (8, "1050000"):     # 11 * 50,000 + 2 * (57,143 + 133,334 + 266,667)
        for name, value in dict(is_initialized=world > 1, get_rank=0, get_world_size=world, barrier=0).items():
            monkeypatch.setattr(progan.dist, name, lambda value=value: value)
        with pytest.raises(SystemExit, match=steps):        # of 16 and 8 images: 13 * 50,000 + 4 * 100,000
            progan.train(size=1024, fmap_max=1, nz=1, device="cpu")


A0, B0 = np.linspace(-0.5, 0.7, 48).reshape(16, 3), np.sin(np.arange(192.0)).reshape(64, 3)
M = np.kron(*[np.kron(np.eye(4), [0.5, 0.5])] * 2)          # 8x8 -> 4x4, averages; 4 Mᵀ: the way back


class TinyGenerator(nn.Module):         # A z at 4x4; at 8x8 faded with B z
    def __init__(self, *_, **__):
        super().__init__()
        self.A, self.B = (nn.Parameter(torch.tensor(each).float()) for each in (A0, B0))
        self.register_buffer("shown", torch.tensor(0))

    def forward(self, z, resolution=None, alpha=1.0):
        _, resolution, alpha = (None, resolution, alpha) if resolution else schedule(self.shown.item(), 8, 0.016)
        small, large = (z @ self.A.T).view(-1, 1, 4, 4), (z @ self.B.T).view(-1, 1, 8, 8)
        return small if resolution == 4 else (1 - alpha) * upsample(small) + alpha * large


class TinyDiscriminator(nn.Module):     # <a, x> at 4x4; at 8x8 faded with <b, x>; plus s/2 ‖x‖²
    def __init__(self, *_, **__):
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
    drawn = Drawn(monkeypatch, progan, (1, 8, 8), Generator=TinyGenerator, Discriminator=TinyDiscriminator)
    progan.train(**settings, batch_size=m, nz=3, size=8, kimg=2 * m / 1000, save_every=1, device="cpu", out="run")
    eight = drawn.images.numpy().reshape(50, 64).astype(float)
    pixels = {8: eight / 127.5 - 1, 4: eight @ M.T / 127.5 - 1}
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
        norm = np.sqrt((g ** 2).sum(1)) * resolution / 8            # in pixels of 8x8
        penalty = (norm - p["gamma"]) ** 2
        L = D_x_tilde - D_x + p["lam"] * penalty / p["gamma"] ** 2 + p["drift"] * D_x ** 2
        c = 2 * p["lam"] / p["gamma"] ** 2 * (norm - p["gamma"]) / norm * (resolution / 8) ** 2 / m
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
    saved = read("run")
    assert saved["rows"][-1]["step"] == 6 and saved["G_ema"]["shown"] == 6 * m
    for part, values in (("D", w), ("G", theta), ("G_ema", ema)):
        for name, value in values.items():
            np.testing.assert_allclose(saved[part][name].numpy(), value, rtol=2e-4, atol=2e-6, err_msg=name)
    losses = logged("run", "L_D", "L_G", "penalty", "wasserstein", "drift")
    np.testing.assert_allclose(losses, log, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(saved["opt_D"]["state"][1]["exp_avg_sq"].numpy(), adam["b"].v, rtol=1e-3)
    assert saved["opt_G"]["state"][1]["step"] == saved["opt_D"]["state"][1]["step"] == 2


def test_a_fade_begins_with_the_same_penalty(monkeypatch):
    D = TinyDiscriminator()
    nn.init.zeros_(D.s)                                     # linear: its gradient is the same everywhere
    Drawn(monkeypatch, progan, (1, 8, 8), Generator=TinyGenerator, Discriminator=lambda *_: D)
    progan.train(lr=0.0, batch_size=8, nz=3, size=8, kimg=0.016, save_every=1, device="cpu", out="run")
    at_4, at_8 = ((each.norm().item() - 1) ** 2 for each in (D.a / 2, D.b))
    assert logged("run", "penalty")[[0, 1, 2, 4, 5], 0].tolist() == pytest.approx([at_4] * 3 + [at_8] * 2, rel=1e-5)


def test_a_run_grows_and_ends_by_itself_and_continuing_is_exact():
    progan.train(**TINY, save_every=1, out="whole")
    rows = logged("whole", "step", "resolution", "alpha")
    assert rows.tolist() == [[i, *schedule(4 * i, 16, 0.016)[1:]] for i in range(1, 21)]
    sizes = [Image.open(f"whole/{name}").width for name in ("000001.png", "000007.png", "training.gif")]
    assert sizes == [32, 64, 128] and not Path("whole/000021.png").exists()
    # Stops at 4x4, between phases, in the middle of both fades, before and after a change of resolution
    for stop, since in {4: 0, 6: 2, 11: 3, 14: 2, 16: 0, 19: 3, 20: 4}.items():
        progan.train(**TINY, steps=stop, save_every=1, out="parts")
        saved = read("parts")
        assert saved["G_ema"]["shown"] == 4 * stop
        for name in ("opt_G", "opt_D"):                     # reset when a fade begins and when it ends
            counts = {int(state["step"]) for state in saved[name]["state"].values()}
            assert counts == ({since} if since and stop < 20 else {4} if stop == 20 else set())
    assert_same(training("parts"), training("whole"))
    progan.train(**TINY, steps=22, out="parts")             # beyond the schedule
    assert {int(state["step"]) for state in read("parts")["opt_G"]["state"].values()} == {6}


JOB = f"""
import sys; sys.path.insert(0, {str(Path(progan.__file__).parent)!r})
import torch, progan
drawn, randn = [], torch.randn
torch.randn = lambda *args, **kwargs: drawn.append(randn(*args, **kwargs)) or drawn[-1]
G, D = progan.train(**{TINY!r} | dict(kimg=0.032, dataset="photos", root="root", digit=None, out="whole"))
rank, z = progan.dist.get_rank(), torch.cat([each.flatten() for each in drawn if each.shape == (2, 8)])
torch.save([[p.detach() for p in (*G.parameters(), *D.parameters())], z], f"weights{{rank}}.pt")
a, b, c = (torch.zeros(2, k) for k in (1, 2, 3))
a.grad, b.grad = torch.full((2, 1), 1.0 + rank), torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * (2 * rank)
progan.average_gradients([a, b, c])
assert a.grad.tolist() == [[1.5], [1.5]] and b.grad.tolist() == [[1, 2], [3, 4]] and c.grad is None
"""


def test_two_processes_train_as_one_and_only_the_first_writes():
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
    saved = read("whole")
    assert saved["rows"][-1]["step"] == 40 and saved["G_ema"]["shown"] == 40 * 4
    for said in ("a new run", "decoding", "step 40 "):      # by the first
        assert sum(said in line for line in done.stdout.splitlines()) == 1
    with pytest.raises(ValueError, match="processes 2, not 1"):
        progan.train(**TINY | dict(kimg=0.032, dataset="photos", root="root", digit=None), out="whole", steps=41)
