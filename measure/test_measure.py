"""The measurements' own tests, by hand: python -m pytest measure"""
import functools
import importlib
from pathlib import Path

import benchmark                                            # which knows where the scripts are
import claims
import common
import evaluate
import numpy as np
import pytest
import torch
import wgan

torch.set_num_threads(1)
ROOT, load_set = common.ROOT, functools.cache(common.load_set)
JUDGED = ["wgan", "wgan_gp", "lsgan", "ebgan", "progan",
          *(f"related.{name}" for name in ("sngan", "dragan", "ctgan", "ls_gan", "improved_gan"))]


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    """Each test in a folder of its own, with 2,000 images of MNIST"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "load_set", lambda name, _, train: [x[:2000] for x in load_set(name, train=train)])
    monkeypatch.setattr(common, "ROOT", tmp_path)


def test_frechet_against_numpy():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(n, 3)) @ rng.normal(size=(3, 3)) + n for n in (40, 42))
    A, B = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(A @ B)).sum()          # they do not commute
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A + B) - 2 * root
    assert evaluate.frechet(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected)
    assert evaluate.frechet(torch.tensor(a), torch.tensor(a)) == pytest.approx(0, abs=1e-6)
    assert evaluate.frechet(torch.ones(5, 3), torch.zeros(7, 3)) == pytest.approx(3)        # without spread


def test_precision_and_recall_against_loops():
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(40, 3)), rng.normal(size=(40, 3)) * 0.7 + 0.4

    def share(points, among):
        reach = [sorted(np.linalg.norm(centre - other) for other in among)[3] for centre in among]     # [0] is 0
        return np.mean([any(np.linalg.norm(x - at) <= far for at, far in zip(among, reach)) for x in points])
    expected = share(fake, real), share(real, fake)
    assert 0.1 < min(expected) < max(expected) < 1 and expected[0] != expected[1]
    assert evaluate.precision_recall(torch.tensor(real), torch.tensor(fake)) == pytest.approx(expected)


def test_copies_and_entropy():
    """Training images 10 and then 20 apart: the way to the next counts, not the distance itself"""
    training = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    training[:, 0, 0, 0] = torch.tensor([0, 10, 100, 120])
    images = torch.zeros(6, 1, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor([0, 4, 6, 91, 104, 109])      # 0, 4, 4, 9 of 20, 4, 9: but 5 is half of 10
    assert evaluate.copies(images, training) == 1
    images[:, 0, 0, 0] = torch.tensor([5, 15, 50, 89, 110, 200])
    assert evaluate.copies(images, training) == 0
    assert evaluate.copies(training[:2] + 1, training[[0, 0, 2]]) == 0      # two equal ones: nothing is nearer
    assert evaluate.entropy(torch.tensor([9, 0, 0])) == 0
    assert evaluate.entropy(torch.tensor([3, 1])) == pytest.approx(0.811278)


def test_inception_score():
    assert evaluate.inception_score(torch.tensor([[0.2, 0.3, 0.5]]).expand(7, 3)) == pytest.approx(1)
    assert evaluate.inception_score(torch.eye(5).repeat(3, 1)) == pytest.approx(5)
    assert evaluate.inception_score(torch.tensor([[1.0, 0], [1, 0], [0, 1]])) == pytest.approx(3 / 2**(2 / 3))
    assert evaluate.inception_score(torch.tensor([[0.9, 0.1], [0.1, 0.9]])) == pytest.approx(2 * 0.9**0.9 / 10**0.1)


def test_a_digits_reference_has_that_digit_only():
    to = evaluate.reference("mnist", 7)
    images, classes = common.load_set("mnist", None, train=False)
    expected = images[classes == 7]
    assert len(to.test) == len(expected) and len(to.training) > 100
    assert torch.equal(to.test.double().mean(0), expected.double().mean(0)) and not torch.equal(to.test, expected)
    figures = evaluate.judge(to.training, to)
    assert figures["classes"].argmax() == 7 and figures["classes"].sum() == pytest.approx(1)
    assert figures["copies"] > 0.99 and figures["precision"] > 0.6 and figures["entropy"] < 1
    noise = torch.randint(256, (300, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    worse = evaluate.judge(noise, to)
    assert worse["Fréchet"] > 10 * figures["Fréchet"] and worse["recall"] == worse["copies"] == 0


def trained(name, out="run", **settings):
    """A run of two steps whose images differ from each other"""
    shape = dict(fmap_max=3, kimg=0.008) if name == "progan" else dict(width=2)
    settings |= shape | dict(digit=7, nz=5, batch_size=8, steps=2, device="cpu", out=out)
    importlib.import_module(name).train(**settings)
    file = Path(out, "checkpoint.pt")
    saved = torch.load(file, weights_only=True)
    for weight in saved.get("G_ema", saved["G"]).values():
        weight.mul_(20 if weight.ndim > 1 else 1)
    torch.save(saved, file)


@pytest.mark.parametrize("name", JUDGED)
def test_samples_are_what_generate_writes(name):
    """But for roundings: there images are made one by one"""
    trained(name)
    importlib.import_module(name).generate(Path("run"), 20, 3, "cpu")
    G, saved = evaluate.opened("run")
    images = evaluate.sample(G, saved["config"]["nz"], 20, seed=3)
    images = images[..., 2:-2, 2:-2] if images.shape[-1] == 32 else images      # without the border
    written = common.load_images("run/generated", size=images.shape[-1], channels=1)
    assert len(images.flatten(1).unique(dim=0)) == 20 and images.double().std() > 5
    assert (images.int() - written).abs().max() <= 1
    assert saved["rows"][-1]["step"] == 2 and evaluate.opened("run/checkpoint.pt")[1].keys() == saved.keys()


def test_command_line(capsys):
    for seed in (0, 1):
        trained("wgan", seed=seed, out=f"run-{seed}")
    wgan.generate(Path("run-0"), 40, 0, "cpu")
    capsys.readouterr()
    evaluate.main(["run-0", "run-1", "run-0/checkpoint.pt", "--images", "40"])      # of digit 7, as trained
    made, what, head, floor, first, second, _, mean, deviation = capsys.readouterr().out.splitlines()
    evaluate.main(["run-0/generated", "--digit", "7"])
    *_, what_again, head_again, floor_again, same = capsys.readouterr().out.splitlines()
    assert (what, head, floor) == (what_again, head_again, floor_again) and "class 7: 40 images against" in what
    assert head.split() == ["Fréchet", "precision", "recall", "score", "entropy", "copies", "classes"]
    figures = [[float(word) for word in line.split()[-16:]] for line in (floor, first, second, same)]
    assert figures[0][0] < figures[1][0] != figures[2][0]
    assert figures[1] == pytest.approx(figures[3], rel=1e-3)        # a run, and the pictures that it generates
    for text, of in ((mean, np.mean), (deviation, functools.partial(np.std, ddof=1))):
        assert [float(word) for word in text.split()[-16:-10]] == pytest.approx(of(figures[1:3], 0)[:6], abs=2e-3)


def test_the_pyramid_adds_up_again():
    x = torch.rand(5, 3, 64, 64, dtype=torch.float64)
    levels = evaluate.laplacian(x)
    assert [level.shape[-1] for level in levels] == [64, 32, 16]
    y = levels[-1]
    for level in levels[-2::-1]:
        spread = torch.zeros_like(level)
        spread[:, :, ::2, ::2] = 4 * y
        y = level + evaluate.blurred(spread)
    torch.testing.assert_close(y, x)


def test_sliced_wasserstein_of_a_shift_is_its_mean_projection():
    torch.manual_seed(0)
    a, shift, directions = torch.randn(500, 6), torch.randn(6), torch.nn.functional.normalize(torch.randn(50, 6))
    distance = evaluate.sliced_wasserstein(a, (a + shift)[torch.randperm(500)], directions)
    assert distance == pytest.approx((directions @ shift).abs().mean().item(), rel=1e-4)


def test_a_set_is_nearest_to_itself_whatever_its_brightness_and_contrast():
    a, b = torch.randint(256, (2, 5, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    b = b[..., ::16].repeat_interleave(16, 3) // 2          # darker, and in strips
    real, fake, same = (evaluate.swd(*pair, per_image=500, projections=64) for pair in ((a, b), (b, a), (a, a)))
    assert real == pytest.approx(fake, rel=0.2)
    assert all(0 < same[size] < real[size] / 2 for size in real)        # other patches of the same images
    assert evaluate.swd(a // 4, a // 4 * 3 + 40, per_image=500, projections=64) == pytest.approx(same, rel=0.02)


def test_the_runs_of_the_claims_are_commands_and_are_trained(monkeypatch, tmp_path):
    for command, _ in {run for runs in claims.CLAIMS.values() for run in runs}:
        name, *flags = command.removeprefix("-m ").replace(".py", "").split()
        script = importlib.import_module(name)
        script.main(functools.wraps(script.train)(lambda **_: None), None, flags)       # SystemExit: not its flags
    monkeypatch.setattr(claims, "RUNS", tmp_path / "claims")
    monkeypatch.setitem(claims.CLAIMS, 9, [("wgan_gp.py --width 1 --batch-size 4", steps) for steps in (3, 2)])
    claims.train(claims.CLAIMS[9], seeds=(0, 1))
    files = sorted(path for path in tmp_path.rglob("*.pt") if path.stem.isdecimal())
    assert [(path.parent.name, path.stem) for path in files] == [("0", "000003"), ("1", "000003")]


def test_the_benchmark(monkeypatch):
    monkeypatch.setattr(common, "ROOT", ROOT)               # where MNIST is
    name, ms, graph, images, usual, *_ = benchmark.measured("lsgan", width=1, rounds=2, steps=2)
    assert float(images.replace(",", "")) == pytest.approx(64000 / float(ms), rel=1e-2) and float(usual) > 0
    x, y = torch.randn(4, 5).requires_grad_(), torch.randn(5, 6)
    with benchmark.Flops() as flops:
        (grad,) = torch.autograd.grad((x @ y).square().sum(), x, create_graph=True)
        grad.sum().backward()
    assert flops.count == 4 * 2 * 4 * 5 * 6                 # x y, its gradient, and of that two
