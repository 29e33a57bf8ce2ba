"""The judge's figures in closed form and against plain loops; its command line on small runs"""
import functools
import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_run import SCRIPTS, SMALL, TINY

import common
import evaluate
import wgan


def gaussian(n, mean, root, seed=0):
    """n features whose mean and covariance are exactly mean and root root^T"""
    x = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return x @ torch.as_tensor(root, dtype=torch.float64).T + torch.as_tensor(mean, dtype=torch.float64)


# ---- Fréchet distance ----

def test_frechet_of_equal_sets_is_0():
    x = gaussian(50, [1, 2, 3], [[1, 0, 0], [2, 1, 0], [0, 3, 2]])
    assert evaluate.frechet(x, x) == pytest.approx(0, abs=1e-6)


def test_frechet_of_a_shift_is_its_square():
    x = gaussian(50, [0, 0], [[1, 0], [2, 1]])
    assert evaluate.frechet(x, x + torch.tensor([3.0, 4.0])) == pytest.approx(25)


def test_frechet_of_scaled_axes():
    """Diagonal covariances: Σ (σ_a − σ_b)²"""
    a, b = gaussian(60, [0, 0, 1], np.diag([1, 2, 3])), gaussian(40, [0, 0, 3], np.diag([4, 2, 1]), seed=1)
    assert evaluate.frechet(a, b) == pytest.approx(4 + 9 + 0 + 4)


def test_frechet_of_covariances_that_do_not_commute():
    """Against the root of the matrix product by numpy's eigenvalues"""
    A, B = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[1.0, -0.8], [-0.8, 2.0]])
    a, b = gaussian(30, [0, 0], np.linalg.cholesky(A)), gaussian(30, [0, 0], np.linalg.cholesky(B), seed=1)
    root = np.sqrt(np.linalg.eigvals(A @ B)).sum()
    assert evaluate.frechet(a, b) == pytest.approx(np.trace(A + B) - 2 * root)
    assert evaluate.frechet(b, a) == pytest.approx(np.trace(A + B) - 2 * root)


def test_frechet_of_a_set_without_spread_is_finite():
    a, b = torch.ones(5, 3), torch.zeros(7, 3)
    assert evaluate.frechet(a, b) == pytest.approx(3)


# ---- Precision, recall, copies, entropy ----

def test_precision_and_recall_against_loops():
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(40, 3)), rng.normal(size=(40, 3)) * 0.7 + 0.4

    def share(points, among):
        hits = 0
        for p in points:
            for i, centre in enumerate(among):
                ways = sorted(np.linalg.norm(centre - other) for j, other in enumerate(among) if j != i)
                if np.linalg.norm(p - centre) <= ways[2]:
                    hits += 1
                    break
        return hits / len(points)
    expected = share(fake, real), share(real, fake)
    assert 0.1 < min(expected) < max(expected) < 1 and expected[0] != expected[1]
    assert evaluate.precision_recall(torch.tensor(real), torch.tensor(fake)) == pytest.approx(expected)


def test_precision_without_recall_is_a_collapse():
    real = torch.arange(100.0)[:, None] * torch.ones(1, 4)
    fake = real[50:51] + 0.01 * torch.arange(100.0)[:, None]
    precision, recall = evaluate.precision_recall(real, fake)
    assert precision == 1 and recall < 0.05


def test_precision_and_recall_take_as_many_of_each():
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    assert evaluate.precision_recall(x, x[:20]) == evaluate.precision_recall(x[:20], x[:20]) == (1, 1)
    assert evaluate.precision_recall(x[:40], x, most=20) == (1, 1)
    assert evaluate.precision_recall(x, x + 100) == (0, 0)


def test_copies_are_near_to_one_training_image_as_the_set_goes():
    """Training images 10 and then 20 apart: the way to the next counts, not the distance itself"""
    training = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    training[:, 0, 0, 0] = torch.tensor([0, 10, 100, 120])
    images = torch.zeros(6, 1, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor([0, 4, 6, 91, 104, 109])      # 0, 4, 4, 9 of 20, 4, 9: but 5 is half of 10
    assert evaluate.copies(images, training) == 1
    images[:, 0, 0, 0] = torch.tensor([5, 15, 50, 89, 110, 200])
    assert evaluate.copies(images, training) == 0
    images[:, 0, 1, 1] = torch.tensor([0, 0, 0, 0, 0, 7])
    images[:3, 0, 0, 0] = torch.tensor([14, 17, 111])               # 4 of 10; 7 of 10; 9 of 20
    assert evaluate.copies(images, training) == pytest.approx(2 / 6)
    assert evaluate.copies(images, training, most=3) == pytest.approx(2 / 3)


def test_two_equal_training_images_do_not_make_copies_of_all():
    training = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    training[2] = 50
    assert evaluate.copies(training[:2] + 1, training) == 0         # no way between the two: nothing is nearer


def test_entropy_in_bits():
    assert evaluate.entropy(torch.tensor([5, 5, 5, 5])) == pytest.approx(2)
    assert evaluate.entropy(torch.tensor([9, 0, 0])) == 0
    assert evaluate.entropy(torch.tensor([3, 1])) == pytest.approx(0.811278)


# ---- The classifier ----

@pytest.fixture
def root(monkeypatch, tmp_path):
    """A folder with MNIST, in which a classifier is made of 1,000 images, in two seconds"""
    common.load_images("mnist")                             # unpacked, if it was not
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "MNIST").symlink_to(common.ROOT / "MNIST")
    fit = evaluate.fit
    monkeypatch.setattr(evaluate, "fit", lambda images, labels: fit(images[:1000], labels[:1000], epochs=5))
    return tmp_path / "data"


def test_the_classifier_is_kept_and_made_anew_when_it_must_be(tmp_path, monkeypatch, capsys):
    images = torch.randint(256, (200, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels, path, made = torch.arange(200) % 10, tmp_path / "classifier.pt", "training the classifier"
    torch.manual_seed(5)
    first = evaluate.kept(path, images, labels)
    assert made in capsys.readouterr().out and torch.initial_seed() == 5 and not first.training
    second = evaluate.kept(path, images, labels)
    assert made not in capsys.readouterr().out and not second.training
    path.write_bytes(b"no checkpoint")
    torch.manual_seed(6)
    third = evaluate.kept(path, images, labels)
    assert made in capsys.readouterr().out
    for other in (second, third):                           # always the same one
        assert torch.equal(first(images), other(images))
    monkeypatch.setattr(evaluate.inspect, "getsource", lambda it: "another recipe")
    evaluate.kept(path, images, labels)
    assert made in capsys.readouterr().out


def test_a_digits_reference_has_that_digit_only(root):
    to = evaluate.reference("mnist", 7, root)
    data = common.DATASETS["mnist"][0](str(common.ROOT), train=False)
    expected = data.data[data.targets == 7][:, None]
    assert len(to.test) == len(expected) == 1028 and len(to.training) == 6265
    assert torch.equal(to.test.double().mean(0), expected.double().mean(0)) and not torch.equal(to.test, expected)
    assert torch.allclose(to.features, evaluate.features_of(to.classifier, to.test), atol=1e-4)
    assert to.accuracy > 0.8 and to.features.shape == (1028, 128)
    figures = evaluate.judge(to.training[:300], to, copied=to.test)
    assert figures["classes"].argmax() == 7 and figures["classes"].sum() == pytest.approx(1)
    assert figures["copies"] < 0.05 and figures["precision"] > 0.6 and figures["entropy"] < 1
    assert evaluate.judge(to.training[:300], to)["copies"] > 0.99
    ordered = to.training[:300][evaluate.features_of(to.classifier, to.training[:300]).sum(1).argsort()]
    with pytest.MonkeyPatch.context() as patch:             # a part of the images is a random part
        patch.setattr(evaluate.precision_recall, "__defaults__", (3, 100))
        by_chance, in_order = (evaluate.judge(each, to) for each in (to.training[:300], ordered))
    assert abs(by_chance["precision"] - in_order["precision"]) < 0.1
    assert abs(by_chance["recall"] - in_order["recall"]) < 0.12
    noise = torch.randint(256, (300, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    worse = evaluate.judge(noise, to)
    assert worse["Fréchet"] > 10 * figures["Fréchet"] and worse["recall"] == worse["copies"] == 0
    assert set(figures) == {"Fréchet", "precision", "recall", "entropy", "copies", "classes"}


def test_images_become_what_the_classifier_knows():
    x = torch.randint(256, (3, 1, 28, 28), dtype=torch.uint8)
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    assert torch.equal(evaluate.as_the_data_set(x), x) and torch.equal(evaluate.as_the_data_set(padded), x)
    colour = evaluate.as_the_data_set(padded.repeat(1, 3, 1, 1))
    assert (colour.int() - x).abs().max() <= 1
    large = torch.nn.functional.interpolate(padded, scale_factor=2)
    assert evaluate.as_the_data_set(large).shape == x.shape


# ---- Runs ----

def trained(script, out, **settings):
    """A run of two steps whose images differ from each other"""
    script.train(**TINY | SMALL[script.__name__] | dict(size=32, nz=5, steps=2, out=out) | settings)
    saved = torch.load(f"{out}/checkpoint.pt", weights_only=True)
    name, factor = ("G_ema", 5) if "G_ema" in saved else ("G", 20)
    for weight in saved[name].values():
        weight.mul_(factor if weight.ndim > 1 else 1)
    torch.save(saved, f"{out}/checkpoint.pt")


@pytest.mark.parametrize("name", SCRIPTS)
def test_samples_are_what_generate_writes(name):
    """To the bit, but for progan.py, which draws a few images at a time"""
    script = importlib.import_module(name)
    trained(script, "run")
    own, saved = evaluate.opened("run")
    images = evaluate.sample(own.load("run"), saved["config"]["nz"], 70, seed=3)
    assert own is script and images.dtype == torch.uint8 and len(images) == 70
    side = {32: 28}.get(images.shape[-1], images.shape[-1])         # without the border
    written = common.load_images(str(script.generate("run", 70, "cpu", 3)), size=side, channels=1)
    images = images[..., 2:-2, 2:-2] if side == 28 else images
    assert len(images.flatten(1).unique(dim=0)) == 70 and images.double().std() > 20
    assert (images.int() - written).abs().max() <= (1 if name == "progan" else 0)


def test_command_line(root, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "reference", functools.cache(evaluate.reference))
    for seed in (0, 1):
        trained(wgan, f"run-{seed}", seed=seed)
    pictures = str(wgan.generate("run-0", 40))
    capsys.readouterr()
    evaluate.main(["run-0", "run-1", "--images", "40", "--root", str(root)])        # of digit 7, as trained
    made, what, head, floor, first, second, both = capsys.readouterr().out.splitlines()
    evaluate.main(["run-0", "--dataset", "mnist", "--images", "40", "--root", str(root)])
    assert capsys.readouterr().out.splitlines() == [what, head, floor, first]       # still of digit 7
    evaluate.main([pictures, "--digit", "7", "--root", str(root)])
    *again, same = capsys.readouterr().out.splitlines()
    assert again == [what, head, floor]
    assert "40 images against 1,028 test images" in what and "class 7" in what and head.split()[0] == "Fréchet"
    cells = [[float(cell) for cell in re.sub(r"^(run\S+|40 training images)( \(2 steps\))?", "", line).split()]
             for line in (floor, first, second, same)]
    assert all(len(line) == 15 for line in cells) and cells[0][0] < cells[1][0] != cells[2][0]
    assert cells[1] == cells[3]                             # a run, and the pictures that it generates
    mean, deviation = re.match(r"run-0 run-1: 2 seeds: Fréchet ([\d.]+) ± ([\d.]+), precision ", both).groups()
    assert float(mean) == pytest.approx((cells[1][0] + cells[2][0]) / 2, rel=0.01)
    assert float(deviation) == pytest.approx(abs(cells[1][0] - cells[2][0]) / 2 ** 0.5, rel=0.05, abs=0.01)


@pytest.mark.parametrize("flags, asked", [
    ("", ("mnist", 7)), ("--dataset mnist", ("mnist", 7)), ("--dataset fashion-mnist", ("fashion-mnist", None)),
    ("--digit 0", ("mnist", 0)), ("--dataset fashion-mnist --digit 2", ("fashion-mnist", 2))])
def test_what_a_run_is_compared_with(flags, asked, root, monkeypatch):
    trained(wgan, "run")
    seen = []

    def reference(dataset, digit, _):
        seen.append((dataset, digit))
        raise ValueError
    monkeypatch.setattr(evaluate, "reference", reference)
    with pytest.raises(SystemExit):
        evaluate.main(["run", "--images", "40", *flags.split()])
    assert seen == [asked]


def test_photographs_by_the_sliced_wasserstein_distance(capsys):
    rng = np.random.default_rng(0)
    for folder, scale in (("a", 1), ("b", 1), ("c", 4)):
        Path(folder).mkdir()
        for i in range(60):
            pixels = rng.integers(0, 256, (32 // scale, 32 // scale, 3)).astype(np.uint8)
            Image.fromarray(pixels.repeat(scale, 0).repeat(scale, 1)).save(f"{folder}/{i}.png")
    evaluate.main(["b", "c", "--dataset", "a"])
    lines = capsys.readouterr().out.splitlines()
    averages = [float(re.fullmatch(r"\w: .* x 1000, 32x32: [\d.]+, 16x16: [\d.]+, average: ([\d.]+)", line)[1])
                for line in lines]
    assert len(averages) == 2 and averages[1] > 2 * averages[0] > 0


@pytest.mark.parametrize("command, sentence", [
    ("nowhere", "nowhere does not exist"),
    ("damaged", "damaged"),
    ("images --digit 10", "--digit must be one of the classes 0 to 9"),
    ("images --dataset cifar10", "mnist and fashion-mnist, not for cifar10"),
    ("images --images 1", "--images must be at least 2"),
    ("empty", "no image")])
def test_errors_are_one_sentence(command, sentence, root, capsys):
    for name in ("damaged", "images", "empty"):
        Path(name).mkdir()
    Path("damaged", "checkpoint.pt").write_bytes(b"0")
    for i in range(3):
        Image.new("L", (28, 28)).save(f"images/{i}.png")
    with pytest.raises(SystemExit) as end:
        evaluate.main([*command.split(), "--root", str(root)])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and sentence in err and err.count("\n") == 1
