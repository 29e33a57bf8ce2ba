"""The independent truth of the algorithms' tests: optimizers in numpy, tiny networks, and what a run drew"""
import numpy as np
import torch
from torch import nn


def parameter(values):
    return nn.Parameter(torch.tensor(values, dtype=torch.float32))


def flat(tensors):
    return np.concatenate([each.detach().double().numpy().ravel() for each in tensors])


class LinearGenerator(nn.Module):
    """G(z) = A z + b, as an image of 2x2 pixels"""
    shape = (1, 2, 2)
    start = np.append(np.linspace(-0.5, 0.7, 12), [0.1, -0.2, 0.3, 0.05])           # θ: A and b

    def __init__(self, *_, **__):
        super().__init__()
        self.A, self.b = parameter(self.start[:12].reshape(4, 3)), parameter(self.start[12:])

    def forward(self, z):
        return (z @ self.A.T + self.b).view(-1, *self.shape)

    @staticmethod
    def image(theta, z):
        return z @ theta[:12].reshape(4, 3).T + theta[12:]

    @staticmethod
    def by_theta(by_x, z):
        return np.append(by_x.T @ z, by_x.sum(0))


class QuadraticCritic(nn.Module):
    """D(x) = <a, x> + s/2 ‖x‖², whose gradient a + s x depends on where it is taken"""
    start = np.array([0.4, -0.3, 0.2, 0.6, 0.8])                                    # w: a and s

    def __init__(self, *_, **__):
        super().__init__()
        self.a, self.s = parameter(self.start[:4]), parameter(self.start[4])

    def forward(self, x):
        return x.flatten(1) @ self.a + self.s / 2 * x.flatten(1).square().sum(1)

    @staticmethod
    def score(w, x):
        return x @ w[:4] + w[4] / 2 * (x**2).sum(1)

    @staticmethod
    def by_w(x):
        return np.column_stack([x, (x**2).sum(1) / 2])

    @staticmethod
    def by_x(w, x):
        return w[:4] + w[4] * x


class LinearAutoencoder(nn.Module):
    """Enc(x) = E x, Dec(S) = F S on images of 2x2 pixels"""
    start = np.append(np.linspace(-0.8, 0.9, 8), np.linspace(0.7, -0.4, 8))         # w: E and F

    def __init__(self, *_, **__):
        super().__init__()
        self.E, self.F = map(parameter, self.split(self.start))

    @staticmethod
    def split(w):
        return w[:8].reshape(2, 4), w[8:].reshape(4, 2)

    def encode(self, x):
        return x.flatten(1) @ self.E.T

    def decode(self, S):
        return (S @ self.F.T).view(-1, 1, 2, 2)


class Adam:
    """Kingma & Ba, Algorithm 1, of the loss + decay/2 ‖w‖²"""
    moment = "exp_avg_sq"

    def __init__(self, lr, beta1, beta2, decay=0, eps=1e-8):
        self.lr, self.beta1, self.beta2, self.t, self.m, self.v = lr, beta1, beta2, 0, 0, 0
        self.decay, self.eps = decay, eps

    def step(self, w, g):
        self.g = g                                          # without the decay, as .grad is
        g = g + self.decay * w
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * g**2
        m, v = self.m / (1 - self.beta1**self.t), self.v / (1 - self.beta2**self.t)
        return w - self.lr * m / (v**0.5 + self.eps)


class RMSProp:
    """Tieleman & Hinton, lecture 6.5; direction(g) is what WGAN's Algorithm 1 calls RMSProp(w, g)"""
    moment, v = "square_avg", 0

    def direction(self, g):
        self.g = g
        self.v = 0.99 * self.v + 0.01 * g**2
        return g / (self.v**0.5 + 1e-8)


class Drawn:
    """Records every random number that a script draws, and gives it 50 images of 2x2 pixels and tiny networks"""
    def __init__(self, monkeypatch, script, shape=(1, 2, 2), **networks):
        pixels = np.random.default_rng(0).integers(0, 256, (50, *shape))
        self.images = torch.tensor(pixels, dtype=torch.uint8)
        self.numbers = {name: [] for name in ("randint", "randn", "rand", "randperm", "rand_like", "randn_like")}
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
    """Columns of a run's log, (rows, names)"""
    return np.array([[row[name] for name in names] for row in read(out)["rows"]])


def read(out):
    return torch.load(f"{out}/checkpoint.pt", weights_only=True)


def training(out):
    """What a run has come to: all tensors of its checkpoint, and its last row but for the clock"""
    saved = read(out)
    row = {name: value for name, value in saved["rows"][-1].items() if name != "seconds"}
    return {name: saved[name] for name in saved.keys() - {"config", "rows", "random_cuda"}} | dict(row=row)


def assert_same(a, b):
    """Bit for bit, whatever is nested in a and b"""
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_left(rows, numbers, rtol=1e-5, of_moments=1e-4, **networks):
    """What a run left: numbers all used; rows in the log; and of every network (it, weights, its optimizer here)"""
    assert not any(list(rest) for rest in numbers)          # every number drawn was used, each once
    np.testing.assert_allclose(logged("run", *rows[0]), [list(row.values()) for row in rows], 2e-5, 1e-6)
    saved = read("run")
    for name, (network, weights, optimizer) in networks.items():
        parameters = list(network.parameters())
        np.testing.assert_allclose(flat(parameters), weights, rtol if name == "D" else 2e-5, 1e-7, err_msg=name)
        # .grad is the last gradient: nothing leaks from one step to the other. The second moment has its scale.
        np.testing.assert_allclose(flat(p.grad for p in parameters), optimizer.g, 1e-3, 1e-6, err_msg=name)
        moments = flat(state[optimizer.moment] for state in saved[f"opt_{name}"]["state"].values())
        np.testing.assert_allclose(moments, optimizer.v, of_moments, 1e-9, err_msg=name)


def described(layers):
    """One line per layer: what a table of layers in a paper would say"""
    def line(layer):
        name = type(layer).__name__
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            bias = "" if layer.bias is None else "+bias"
            (k, _), (s, _), (p, _) = layer.kernel_size, layer.stride, layer.padding
            return f"{layer.in_channels}-{layer.out_channels} k{k} s{s} p{p}{bias}"
        if name == "Linear":
            return f"Linear {layer.in_features}-{layer.out_features}{'' if layer.bias is None else '+bias'}"
        details = dict(BatchNorm2d=["num_features", "eps", "momentum", "affine"], Dropout=["p"],
                       LeakyReLU=["negative_slope"])
        return " ".join([name, *(str(getattr(layer, key)) for key in details.get(name, ()))])
    return [line(layer) for layer in layers]


def norm(n, activation):
    return [f"BatchNorm2d {n} 1e-05 0.1 True", activation]
