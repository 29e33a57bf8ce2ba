"""related/semi_supervised.py against its paper: terms in closed form, networks, the start, the labelled images, the
test errors, D's average, and iterations against numpy"""
import gzip
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import common
from related import semi_supervised
from related.semi_supervised import Classifier, Dense, Generator, feature_matching, losses, start
from truth import Adam, Drawn, LinearGenerator, assert_left, flat, parameter


def mnist(part):
    """Pixels (n, 784) and classes of "train" or "t10k", read without common.py"""
    files = ((f"{part}-images-idx3-ubyte.gz", 16), (f"{part}-labels-idx1-ubyte.gz", 8))
    raw, y = (np.frombuffer(gzip.open(common.ROOT / "MNIST/raw" / name).read(), np.uint8, offset=skip)
              for name, skip in files)
    return raw.reshape(-1, 784), y


# ---- The losses ----

def test_losses_in_closed_form():
    zeros, y = torch.zeros(5, 10), torch.arange(5)
    L_sup, L_unsup = losses(zeros, y, zeros, zeros)         # Z = 10, D = 10/11
    assert L_sup.item() == pytest.approx(math.log(10))
    assert L_unsup.item() == pytest.approx(0.04766 + 1.19895, abs=1e-5)
    low, high = (torch.full((5, 10), value) for value in (-50.0, 50.0))     # each of the two halves by itself
    assert losses(zeros, y, zeros, low)[1].item() == pytest.approx(math.log(11 / 10) / 2)
    assert losses(zeros, y, high, zeros)[1].item() == pytest.approx(math.log(11) / 2)


def test_each_input_has_a_role_of_its_own_and_images_are_averaged():
    torch.manual_seed(0)
    labelled, real, fake = (torch.randn(n, 10, dtype=torch.double) for n in (3, 4, 6))
    y = torch.tensor([2, 0, 9])
    L_sup, L_unsup = losses(labelled, y, real, fake)
    p = labelled.exp() / labelled.exp().sum(1, keepdim=True)
    D_x, D_x_tilde = (each.exp().sum(1) / (1 + each.exp().sum(1)) for each in (real, fake))
    torch.testing.assert_close(L_sup, -(p[0, 2].log() + p[1, 0].log() + p[2, 9].log()) / 3)
    torch.testing.assert_close(L_unsup, -D_x.log().mean() / 2 - (1 - D_x_tilde).log().mean() / 2)


def test_one_class_is_the_binary_gan():
    x, x_tilde = torch.randn(7, 1), torch.randn(7, 1)
    L_sup, L_unsup = losses(x, torch.zeros(7, dtype=torch.long), x, x_tilde)
    bce = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(2 * L_unsup, bce(x, torch.ones(7, 1)) + bce(x_tilde, torch.zeros(7, 1)))
    assert L_sup.item() == 0


def test_what_all_logits_share_says_whether_an_image_is_real_and_nothing_of_its_class():
    logits, y = torch.randn(4, 10), torch.arange(4)
    L_sup, L_unsup = losses(logits, y, logits, logits)
    more, otherwise = losses(logits + 3, y, logits + 3, logits + 3)
    torch.testing.assert_close(more, L_sup)
    assert (otherwise - L_unsup).abs() > 0.1


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
    G, z = Generator(width=8), torch.randn(4, 100)
    assert torch.equal(G(z), G(z))


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
    h = x.flatten(1)
    for layer in D.eval()[0]:
        if isinstance(layer, Dense):
            h = (layer.g * (h @ F.normalize(layer.v, dim=1).T) + layer.b).clamp(0)
    torch.testing.assert_close(D[0](x), h)
    torch.testing.assert_close(D(x), D[1](h))
    assert D(x).shape == (5, 10) and D(x).min() < 0 and torch.equal(D(x), D(x))
    assert Classifier(3, 8)(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


def test_the_generator_is_the_papers():
    torch.manual_seed(0)
    G, z = Generator(), torch.randn(6, 100)
    trained = [it.numel() for it in G.parameters() if it.requires_grad]
    assert sorted(trained) == sorted([100 * 500, 500, 500 * 500, 500, 500 * 784, 784, 784])
    assert all((it == 1).all() for it in G.parameters() if not it.requires_grad)        # γ
    with torch.no_grad():
        G[3].weight.mul_(1e-3)                              # so that ε counts
        G[4].bias.normal_()                                 # β
    h = z
    for linear, norm in ((G[0], G[1]), (G[3], G[4])):
        h = h @ linear.weight.T
        h = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-6).sqrt() + norm.bias
        h = (1 + h.exp()).log()
    last = G[6]
    x = torch.tanh(last.g * (h @ F.normalize(last.v, dim=1).T) + last.b)
    torch.testing.assert_close(G(z), x.view(6, 1, 28, 28), rtol=1e-3, atol=1e-4)
    assert G(z).min() < -0.5 < 0.5 < G(z).max()
    assert Generator(5, 3, 8, 7)(torch.randn(4, 5)).shape == (4, 3, 8, 8)


@pytest.mark.parametrize("noisy", [False, True])
def test_the_start_gives_all_that_is_activated_mean_0_and_variance_1(monkeypatch, noisy):
    def same(x):
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(torch, "randn_like", same)          # so that the noise is what it was in the start
    torch.manual_seed(0)
    D, x, seen = Classifier(1, 8).train(noisy), torch.rand(40, 1, 8, 8) + 5, []
    start(D, x)
    layers = [layer for layer in D.modules() if isinstance(layer, Dense)]
    for layer in layers:
        layer.register_forward_hook(lambda layer, x, h: seen.append((x[0], h.detach())))
    D(x)
    assert len(seen) == len(layers) == 6
    for _, h in seen:
        torch.testing.assert_close(h.mean(0), torch.zeros_like(h[0]), rtol=0, atol=1e-4)
        torch.testing.assert_close(h.var(0, correction=0), torch.ones_like(h[0]), rtol=0, atol=1e-3)
    assert all(layer.v.std().item() == pytest.approx(0.1, rel=0.1) for layer in layers)     # g and b do it


# ---- What is trained on, and tested on ----

class Seeing(nn.Sequential):
    """A small classifier of 28x28 pixels that keeps what it was given in training"""
    batches = []

    def __init__(self, *_):
        super().__init__(nn.Flatten(), nn.Linear(784, 10))
        self.batches.clear()

    def forward(self, x):
        if self.training:
            self.batches.append(x.flatten(1).detach())
        return super().forward(x)


@pytest.mark.parametrize("labels, each", [(20, 2), (5, 1)])
def test_labelled_images_are_so_many_of_each_class_and_have_their_classes(monkeypatch, labels, each):
    kept = []

    def kept_losses(labelled, y, *others):
        kept.append(y)
        return losses(labelled, y, *others)
    for name, it in dict(Classifier=Seeing, start=lambda *_: None, losses=kept_losses).items():
        monkeypatch.setattr(semi_supervised, name, it)
    chosen = []
    for seed in 0, 1:
        settings = dict(labels=labels, seed=seed, batch_size=150, steps=2, width=2)
        semi_supervised.train(**settings, device="cpu", out=f"{seed}")
        few, y = torch.cat([x[:150] for x in Seeing.batches]), torch.cat(kept)
        pixels = ((few + 1) * 127.5).round().numpy().astype(np.uint8)
        chosen.append({x.tobytes(): k.item() for x, k in zip(pixels, y, strict=True)})
        kept.clear()
    images, classes = mnist("train")
    truth = dict(zip(map(bytes, images), classes))
    for some in chosen:
        assert sorted(some.values()) == sorted(each * [*range(10)])
        assert all(truth[x] == k for x, k in some.items())
    assert not chosen[0].keys() & chosen[1].keys()          # the seed chooses them


def test_errors_are_counted_on_the_test_images_by_ds_average(monkeypatch):
    """With the default settings; D's average after two steps is not D"""
    G, D_ema = semi_supervised.train(steps=2, device="cpu", out="run")
    saved = semi_supervised.read("run")
    D, other = Classifier().eval(), Classifier().eval()
    D.load_state_dict(saved["D_ema"])
    other.load_state_dict(saved["D"])
    x, y = mnist("t10k")
    with torch.no_grad():
        x = torch.tensor(x)
        wrong, by_D = ((it(x.view(-1, 1, 28, 28) / 127.5 - 1).argmax(1).numpy() != y).sum()
                       for it in (D, other))
    counted = np.genfromtxt("run/log.csv", delimiter=",", names=True)["test_errors"]
    assert len(y) == 10_000 and wrong == counted != by_D
    assert not G.training and not D_ema.training and G(torch.randn(2, 100)).shape == (2, 1, 28, 28)
    assert torch.equal(D_ema[1].v, D[1].v) and G[0].weight.shape == (500, 100)


# ---- Iterations ----

class Features(nn.Module):
    def __init__(self):
        super().__init__()
        self.A = parameter(np.zeros((3, 4)))

    def forward(self, x):
        LinearClassifier.seen.append((self.training, x.requires_grad))
        x = x.flatten(1)
        if self.training:
            x = x + 0.3 * torch.randn_like(x)
        return x @ self.A.T


class LinearClassifier(nn.Sequential):
    """f(x) = A (x + 0.3 noise), l(x) = B f(x) + c on images of 2x2 pixels; all 0 until it is started with w"""
    w = np.append(np.sin(np.arange(42)), np.zeros(10))      # A (3x4), B (10x3) and c
    seen = []

    def __init__(self, *_):
        super().__init__(Features(), nn.Linear(3, 10))
        self.seen.clear()

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
                         load_labels=lambda *_, train=True, **__: torch.tensor(y if train else y_others)).items():
        monkeypatch.setattr(semi_supervised, name, it)
    return drawn, y, y_others, started


def exp_parts(logits):
    """Of every image: log Z, softmax, D(x)"""
    Z = np.exp(logits).sum(1, keepdims=True)
    return np.log(Z[:, 0]), np.exp(logits) / Z, Z / (Z + 1)


@pytest.mark.parametrize("changed", [{}, dict(lr=0.02, beta1=0.2, beta2=0.8, ema=0.7, batch_size=7, labels=20)])
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
    few = np.concatenate([mixed[y[mixed] == c][:k["labels"] // 10] for c in range(10)])
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

    assert_left(semi_supervised, rows, (at, latent, noise, order), G=(G, theta, opt_G), D=(D, w, opt_D))
    np.testing.assert_allclose(flat(D_ema.parameters()), w_ema, 1e-5, 2e-7)
    np.testing.assert_allclose(flat(semi_supervised.read("run")["D_ema"].values()), w_ema, 1e-5, 2e-7)
    # D, in training, sees constants, then images with a history; its average is tested, without noise.
    assert LinearClassifier.seen == 3 * [(True, False), (True, True), (False, False)]


@pytest.mark.parametrize("changed", [{}, dict(ema=0.9)])
def test_what_is_tested_is_the_weighted_mean_of_ds_weights(monkeypatch, changed):
    tiny(monkeypatch)
    past, log = [], semi_supervised.Run.log

    def kept(run, **losses):
        past.append(flat(run.parts["D"].parameters()))
        log(run, **losses)
    monkeypatch.setattr(semi_supervised.Run, "log", kept)
    _, D_ema = semi_supervised.train(**changed, lr=0.1, steps=150, batch_size=8, nz=3, device="cpu", out="run")
    weights = (dict(ema=0.9999) | changed)["ema"] ** np.arange(150)[::-1]
    np.testing.assert_allclose(flat(D_ema.parameters()), weights @ past / weights.sum(), 1e-4, 2e-4)
