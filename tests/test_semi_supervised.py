"""related/semi_supervised.py against its paper: terms in closed form, networks, the start, and iterations against
numpy, which know the labelled images and the test errors"""
import math

import numpy as np
import pytest
import torch
from torch import nn

from related import semi_supervised
from related.semi_supervised import Classifier, Dense, Generator, feature_matching, losses, start
from truth import Adam, Drawn, LinearGenerator, assert_left, flat, parameter, read


# ---- The losses ----

def test_losses_in_closed_form():
    zeros, y = torch.zeros(5, 10), torch.arange(5)
    L_sup, L_unsup = losses(zeros, y, zeros, zeros)         # Z = 10, D = 10/11
    assert L_sup.item() == pytest.approx(math.log(10))
    assert L_unsup.item() == pytest.approx(0.04766 + 1.19895, abs=1e-5)
    low, high = (torch.full((5, 10), value) for value in (-50.0, 50.0))     # each of the two halves by itself
    assert losses(zeros, y, zeros, low)[1].item() == pytest.approx(math.log(11 / 10) / 2)
    assert losses(zeros, y, high, zeros)[1].item() == pytest.approx(math.log(11) / 2)


@pytest.mark.parametrize("value, expected", [(1000, (1000 + math.log(10)) / 2), (-1000, (1000 - math.log(10)) / 2)])
def test_large_logits_are_exact(value, expected):
    logits = torch.full((4, 10), float(value))
    torch.testing.assert_close(losses(logits, torch.arange(4), logits, logits),
                               (torch.tensor(math.log(10)), torch.tensor(expected)))


def test_feature_matching_compares_means():
    """Equal means of unequal images: 0.  A mean over features, not a sum"""
    f_x, f_x_tilde = torch.tensor([[1.0, 0, 2], [3, 0, 2]]), torch.tensor([[3.0, 4, 2], [1, 2, 2]])
    assert feature_matching(f_x, f_x_tilde).item() == 3     # (0 + 3² + 0) / 3; image by image: (8 + 20) / 6
    assert feature_matching(f_x, f_x.flip(0)).item() == 0
    assert feature_matching(f_x, f_x_tilde[:1]).item() == pytest.approx(17 / 3)


# ---- The networks ----

def test_weight_normalisation_and_what_is_trained():
    torch.manual_seed(0)
    layer, x = Dense(500, 400, trained=True), torch.randn(3, 500)
    assert layer.v.std().item() == pytest.approx(0.1, rel=0.01)
    with torch.no_grad():
        layer.g.copy_(torch.randn(400))
        layer.b.copy_(torch.randn(400))
    expected = layer.g * (x @ layer.v.T) / (layer.v ** 2).sum(1) ** 0.5 + layer.b
    torch.testing.assert_close(layer(x), expected)
    layer.v.detach().mul_(torch.rand(400, 1) + 0.5)         # each row by a factor of its own
    torch.testing.assert_close(layer(x), expected)
    assert layer.g.requires_grad and not Dense(3, 4).g.requires_grad
    assert not Dense(3, 4).b.any() and (Dense(3, 4).g == 1).all()


def test_noise_only_in_training_and_of_its_deviation():
    torch.manual_seed(0)
    D = Classifier()
    noisy = [layer for layer in D.modules() if isinstance(layer, Dense)]
    for layer, expected in zip(noisy, (0.6, 0.5, 0.5, 0.5, 0.5, 0.5), strict=True):
        nothing = torch.zeros(4000, layer.v.shape[1])
        out = layer(nothing)[:, :10]                        # ‖g v / ‖v‖‖ = 1
        assert out.std().item() == pytest.approx(expected, rel=0.03) and abs(out.mean()) < 0.02 * expected
        assert not layer.eval()(nothing).any()
    assert Generator()[6].noise == 0


def test_the_classifier_is_the_papers():
    torch.manual_seed(0)
    D, x = Classifier(), torch.rand(5, 1, 28, 28)
    parts = dict(D.named_parameters())
    assert sum(it.numel() for name, it in parts.items() if name.endswith("v")) == 1_536_500
    assert sum(it.numel() for name, it in parts.items() if name.endswith("b")) == 2_260
    assert [tuple(it.shape) for name, it in parts.items() if name.endswith("g") and it.requires_grad] == [(10,)]
    f = D[0](x)
    assert f.shape == (5, 250) and f.min() == 0 < f.max()   # after its ReLU, before the noise
    assert not torch.equal(D[1](f), D[1](f))
    D.eval()
    assert D(x).shape == (5, 10) and D(x).min() < 0 and torch.equal(D(x), D[1](D[0](x)))


def test_the_generator_is_the_papers():
    G = Generator()
    assert [type(layer).__name__ for layer in G] == [
        "Linear", "BatchNorm1d", "Softplus", "Linear", "BatchNorm1d", "Softplus", "Dense", "Tanh", "Unflatten"]
    assert [layer.eps for layer in (G[1], G[4])] == [1e-6, 1e-6]
    trained = [tuple(it.shape) for it in G.parameters() if it.requires_grad]
    assert trained == [(500, 100), (500,), (500, 500), (500,), (784, 500), (784,), (784,)]      # without γ
    assert Generator(5, 3, 8, 7)(torch.randn(4, 5)).shape == (4, 3, 8, 8)


def test_the_start_gives_all_that_is_activated_mean_0_and_variance_1():
    torch.manual_seed(0)
    D, x, seen = Classifier(1, 8).eval(), torch.rand(40, 1, 8, 8) + 5, []
    start(D, x)
    layers = [layer for layer in D.modules() if isinstance(layer, Dense)]
    for layer in layers:
        layer.register_forward_hook(lambda layer, x, h: seen.append(h.detach()))
    D(x)
    assert len(seen) == len(layers) == 6
    for h in seen:
        torch.testing.assert_close(h.mean(0), torch.zeros_like(h[0]), rtol=0, atol=1e-4)
        torch.testing.assert_close(h.var(0, correction=0), torch.ones_like(h[0]), rtol=0, atol=1e-3)
    assert all(layer.v.std().item() == pytest.approx(0.1, rel=0.1) for layer in layers)     # g and b do it


# ---- Iterations ----

class Features(nn.Module):
    def __init__(self):
        super().__init__()
        self.A = parameter(np.zeros((3, 4)))

    def forward(self, x):
        x = x.flatten(1)
        if self.training:
            x = x + 0.3 * torch.randn_like(x)
        return x @ self.A.T


class LinearClassifier(nn.Sequential):
    """f(x) = A (x + 0.3 noise), l(x) = B f(x) + c on images of 2x2 pixels; all 0 until it is started with w"""
    w = np.append(np.sin(np.arange(42)), np.zeros(10))      # A (3x4), B (10x3) and c

    def __init__(self, *_):
        super().__init__(Features(), nn.Linear(3, 10))

    @staticmethod
    def split(w):
        return w[:12].reshape(3, 4), w[12:42].reshape(10, 3), w[42:]


def tiny(monkeypatch):
    """Drawn, with 50 images, 2 to 14 of each class, and 50 others to test on; and the classes of both, and what D
    was started with.  It records all that train() draws, the images of the start and of real.png, too"""
    drawn = Drawn(monkeypatch, semi_supervised, Generator=LinearGenerator, Classifier=LinearClassifier)
    rng, started = np.random.default_rng(1), []
    drawn.others = torch.tensor(rng.integers(0, 256, (50, 1, 2, 2)), dtype=torch.uint8)
    y, y_others = (rng.permutation(np.repeat(range(10), [14, 12, 6, 3, 3, 3, 3, 2, 2, 2])) for _ in range(2))

    def start_with_w(D, x):
        started.append((D, x))
        nn.utils.vector_to_parameters(torch.tensor(LinearClassifier.w).float(), D.parameters())
    for name, it in dict(start=start_with_w,
                         load_images=lambda *_, train=True, **__: drawn.images if train else drawn.others,
                         load_set=lambda *_, train=True: (None, torch.tensor(y if train else y_others))).items():
        monkeypatch.setattr(semi_supervised, name, it)
    return drawn, y, y_others, started


def exp_parts(logits):
    """Of every image: log Z, softmax, D(x)"""
    Z = np.exp(logits).sum(1, keepdims=True)
    return np.log(Z[:, 0]), np.exp(logits) / Z, Z / (Z + 1)


@pytest.mark.parametrize("changed", [{}, dict(lr=0.02, beta1=0.2, beta2=0.8, ema=0.7, batch_size=7, labels=5)])
def test_three_iterations_equal_numpy(monkeypatch, changed):
    drawn, y, y_others, started = tiny(monkeypatch)
    G, D_ema = semi_supervised.train(**changed, steps=3, nz=3, device="cpu", out="run", save_every=1)

    k = dict(lr=1e-3, beta1=0.5, beta2=0.999, ema=0.9999, batch_size=100, labels=100) | changed
    theta, w, m = LinearGenerator.start, LinearClassifier.w, k["batch_size"]
    pixels, others = (it.numpy().reshape(50, 4) / 127.5 - 1 for it in (drawn.images, drawn.others))
    at, latent, noise, order = (drawn[name] for name in ("randint", "randn", "randn_like", "randperm"))
    opt_G, opt_D = (Adam(k["lr"], k["beta1"], k["beta2"], eps=1e-4) for _ in range(2))

    def real():
        return pixels[next(at).astype(int)]
    mixed = next(order).astype(int)
    few = np.concatenate([mixed[y[mixed] == c][:max(1, k["labels"] // 10)] for c in range(10)])
    (D, x), = started
    np.testing.assert_allclose(x.flatten(1), real(), 1e-6, 1e-6)
    assert len(x) == 500 and len(next(at)) == m             # real.png
    rows, past = [], []
    for t in 1, 2, 3:
        i, x = few[next(at).astype(int)], real()
        x = np.concatenate([pixels[i], x, LinearGenerator.image(theta, next(latent))]) + 0.3 * next(noise)
        A, B, c = LinearClassifier.split(w)
        f = x @ A.T
        log_Z, p, D_x = exp_parts(f @ B.T + c)
        L_sup = -np.log(p[range(m), y[i]]).mean()
        L_unsup = -np.log(D_x[m:2 * m]).mean() / 2 - np.log(1 - D_x[2 * m:]).mean() / 2
        by_l = np.concatenate([p[:m] - np.eye(10)[y[i]], (D_x - 1)[m:2 * m] * p[m:2 * m] / 2,
                               D_x[2 * m:] * p[2 * m:] / 2]) / m
        w = opt_D.step(w, np.concatenate([(by_l @ B).T @ x, by_l.T @ f, by_l.sum(0)[None].T], axis=None))
        past.append(w)
        w_ema = np.average(past, axis=0, weights=k["ema"] ** np.arange(t)[::-1])

        A, _, _ = LinearClassifier.split(w)
        x, z = real(), next(latent)
        n = next(noise)
        apart = A @ ((x + 0.3 * n[:m]) - (LinearGenerator.image(theta, z) + 0.3 * n[m:])).mean(0)
        by_x_tilde = np.tile(-2 / 3 * apart @ A / m, (m, 1))
        theta = opt_G.step(theta, LinearGenerator.by_theta(by_x_tilde, z))
        A, B, c = LinearClassifier.split(w_ema)
        errors = ((others @ A.T @ B.T + c).argmax(1) != y_others).sum()
        rows.append(dict(L_sup=L_sup, L_unsup=L_unsup, L_G=(apart**2).mean(), test_errors=errors))

    assert_left(rows, (at, latent, noise, order), G=(G, theta, opt_G), D=(D, w, opt_D))
    np.testing.assert_allclose(flat(D_ema.parameters()), w_ema, 1e-5, 2e-7)
    np.testing.assert_allclose(flat(read("run")["D_ema"].values()), w_ema, 1e-5, 2e-7)
