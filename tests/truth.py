"""The independent truth of the algorithms' tests: optimizers in numpy, tiny networks, and what a run drew"""
import numpy as np
import torch
from torch import nn

A0, B0 = np.linspace(-0.5, 0.7, 12).reshape(4, 3), np.array([0.1, -0.2, 0.3, 0.05])


class LinearGenerator(nn.Module):
    """G(z) = A z + b, as an image of 2x2 pixels"""
    def __init__(self, nz, channels, size, width):
        super().__init__()
        self.A = nn.Parameter(torch.tensor(A0, dtype=torch.float32))
        self.b = nn.Parameter(torch.tensor(B0, dtype=torch.float32))

    def forward(self, z):
        return (z @ self.A.T + self.b).view(-1, 1, 2, 2)


class QuadraticCritic(nn.Module):
    """D(x) = <a, x> + s/2 ‖x‖², whose gradient a + s x depends on where it is taken"""
    seen = []
    start = 0.4, -0.3, 0.2, 0.6, 0.8

    def __init__(self, channels, size, width):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(self.start[:4]))
        self.s = nn.Parameter(torch.tensor(self.start[4]))
        self.seen.clear()

    def forward(self, x):
        self.seen.append((x.requires_grad, x.is_leaf, max(p.abs().max().item() for p in self.parameters())))
        return x.flatten(1) @ self.a + self.s / 2 * x.flatten(1).square().sum(1)


class Adam:
    """Kingma & Ba, Algorithm 1, in float64"""
    def __init__(self, lr, beta1, beta2):
        self.lr, self.beta1, self.beta2, self.t, self.m, self.v = lr, beta1, beta2, 0, 0, 0

    def step(self, w, g):
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * g**2
        m, v = self.m / (1 - self.beta1**self.t), self.v / (1 - self.beta2**self.t)
        return w - self.lr * m / (v**0.5 + 1e-8)


class RMSProp:
    """Tieleman & Hinton, lecture 6.5, in float64; direction(g) is what WGAN's Algorithm 1 calls RMSProp(w, g)"""
    def __init__(self):
        self.v = 0

    def direction(self, g):
        self.v = 0.99 * self.v + 0.01 * g**2
        return g / (self.v**0.5 + 1e-8)


class Drawn:
    """Records every random number that a script draws, and gives it 50 images of 2x2 pixels and tiny networks"""
    def __init__(self, monkeypatch, script, side=2, **networks):
        pixels = np.random.default_rng(0).integers(0, 256, (50, 1, side, side))
        self.images = torch.tensor(pixels, dtype=torch.uint8)
        self.numbers = {"randint": [], "randn": [], "rand": []}
        for name in self.numbers:
            monkeypatch.setattr(torch, name, self.recorded(name, getattr(torch, name)))
        monkeypatch.setattr(script, "load_images", lambda *_, **__: self.images)
        for name, network in networks.items():
            monkeypatch.setattr(script, name, network)

    def recorded(self, name, draw):
        def wrapper(*args, **kwargs):
            value = draw(*args, **kwargs)
            if "generator" not in kwargs:                   # the pictures' fixed latents have their own generator
                self.numbers[name].append(value.double().numpy())
            return value
        return wrapper

    def real(self):
        """The batches in the order drawn, flat, in [-1, 1]; the first was for real.png and is left out"""
        pixels = self.images.numpy().reshape(50, 4) / 127.5 - 1
        return iter([pixels[index.astype(int)] for index in self.numbers["randint"][1:]])

    def __getitem__(self, name):
        return iter(self.numbers[name])


def logged(out, *names):
    """Columns of a run's log.csv, (rows, names)"""
    log = np.atleast_1d(np.genfromtxt(f"{out}/log.csv", delimiter=",", names=True))
    return np.stack([log[name] for name in names], axis=1)


def described(layers):
    """One line per layer: what a table of layers in a paper would say"""
    def line(layer):
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            (k, _), (s, _), (p, _) = layer.kernel_size, layer.stride, layer.padding
            bias = "" if layer.bias is None else "+bias"
            return f"{layer.in_channels}-{layer.out_channels} k{k} s{s} p{p}{bias}"
        details = dict(BatchNorm2d=["num_features", "eps", "momentum", "affine"], LeakyReLU=["negative_slope"])
        name = type(layer).__name__
        return " ".join([name, *(str(getattr(layer, key)) for key in details.get(name, ()))])
    return [line(layer) for layer in layers]


def dcgan_critic():
    """DCGAN's discriminator of width 16 for 32x32 RGB, without its sigmoid"""
    def block(n):
        return [f"{n // 2}-{n} k4 s2 p1", f"BatchNorm2d {n} 1e-05 0.1 True", "LeakyReLU 0.2"]
    return ["3-16 k4 s2 p1", "LeakyReLU 0.2", *block(32), *block(64), "64-1 k4 s1 p0", "Flatten"]


def assert_dcgan_initialisation(*networks):
    """Convolutions N(0, 0.02), batch norm N(1, 0.02) and 0, other biases 0 or as torch has them"""
    for network in networks:
        for layer in network.modules():
            weight = getattr(layer, "weight", None)
            if isinstance(layer, nn.BatchNorm2d):
                assert abs(weight.mean() - 1) < 4 * 0.02 / len(weight) ** 0.5 and not layer.bias.any()
                assert 0.01 < weight.std() < 0.03
            elif weight is not None:
                assert abs(weight.mean()) < 4 * 0.02 / weight.numel() ** 0.5
                few = weight.numel() < 1000
                assert few or 0.018 < weight.std() < 0.022 and weight.abs().max() > 0.05    # not uniform
