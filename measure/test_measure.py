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
import swd
import torch
import wgan
from PIL import Image

torch.set_num_threads(1)
load_set = functools.cache(common.load_set)
JUDGED = ["wgan", "wgan_gp", "lsgan", "ebgan", "progan",
          *(f"related.{name}" for name in ("sngan", "dragan", "ctgan", "ls_gan", "improved_gan"))]


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    """Each test in a folder of its own, with 2,000 images of MNIST"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "load_set", lambda name, _, train: [x[:2000] for x in load_set(name, train=train)])
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(claims, "RUNS", tmp_path / "claims")


def small(name):
    """Settings of a short run of a script"""
    shape = dict(fmap_max=3, kimg=0.008) if name == "progan" else dict(width=2)
    return shape | dict(nz=5, batch_size=8, steps=2, device="cpu", out="run")


# ---- evaluate.py: the figures ----

def gaussian(n, mean, root, seed=0):
    """n features whose mean and covariance are exactly mean and root root^T"""
    x = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return x @ torch.as_tensor(root, dtype=torch.float64).T + torch.as_tensor(mean, dtype=torch.float64)


def test_frechet():
    x = gaussian(50, [1, 2, 3], [[1, 0, 0], [2, 1, 0], [0, 3, 2]])
    assert evaluate.frechet(x, x) == pytest.approx(0, abs=1e-6)
    assert evaluate.frechet(x, x + torch.tensor([3.0, 4.0, 0.0])) == pytest.approx(25)
    a, b = gaussian(60, [0, 0, 1], np.diag([1, 2, 3])), gaussian(40, [0, 0, 3], np.diag([4, 2, 1]), seed=1)
    assert evaluate.frechet(a, b) == pytest.approx(4 + 9 + 0 + 4)           # Σ (σ_a − σ_b)²
    assert evaluate.frechet(torch.ones(5, 3), torch.zeros(7, 3)) == pytest.approx(3)        # without spread
    A, B = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[1.0, -0.8], [-0.8, 2.0]])
    a, b = gaussian(30, [0, 0], np.linalg.cholesky(A)), gaussian(30, [0, 0], np.linalg.cholesky(B), seed=1)
    root = np.sqrt(np.linalg.eigvals(A @ B)).sum()
    assert evaluate.frechet(a, b) == pytest.approx(np.trace(A + B) - 2 * root)      # they do not commute


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


# ---- evaluate.py: the classifier and the runs ----

def test_a_digits_reference_has_that_digit_only():
    to = evaluate.reference("mnist", 7)
    images, classes = common.load_set("mnist", None, train=False)
    expected = images[classes == 7]
    assert len(to.test) == len(expected) and len(to.training) > 100 and to.accuracy > 0.7
    assert torch.equal(to.test.double().mean(0), expected.double().mean(0)) and not torch.equal(to.test, expected)
    figures = evaluate.judge(to.training, to)
    assert figures["classes"].argmax() == 7 and figures["classes"].sum() == pytest.approx(1)
    assert figures["copies"] > 0.99 and figures["precision"] > 0.6 and figures["entropy"] < 1
    noise = torch.randint(256, (300, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    worse = evaluate.judge(noise, to)
    assert worse["Fréchet"] > 10 * figures["Fréchet"] and worse["recall"] == worse["copies"] == 0


def trained(name, **settings):
    """A run of two steps whose images differ from each other"""
    settings = small(name) | dict(digit=7) | settings
    importlib.import_module(name).train(**settings)
    file = Path(settings["out"], "checkpoint.pt")
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
    evaluate.main(["run-0", "run-1", "--images", "40"])     # of digit 7, as trained
    made, what, head, floor, first, second, both = capsys.readouterr().out.splitlines()
    evaluate.main(["run-0/generated", "--digit", "7"])
    *_, what_again, head_again, floor_again, same = capsys.readouterr().out.splitlines()
    assert (what, head, floor) == (what_again, head_again, floor_again) and "class 7: 40 images against" in what
    figures = [[float(word) for word in line.split()[-16:]] for line in (floor, first, second, same)]
    assert figures[0][0] < figures[1][0] != figures[2][0]
    assert figures[1] == pytest.approx(figures[3], rel=1e-3)        # a run, and the pictures that it generates
    assert both.startswith(f"run-0 run-1: 2 seeds: Fréchet {evaluate.spread([f[0] for f in figures[1:3]])}, ")
    assert evaluate.spread([1.0, 3.0]) == "2 ± 1.4"


# ---- swd.py ----

def test_the_pyramid_adds_up_again():
    x = torch.rand(5, 3, 64, 64, dtype=torch.float64)
    levels = swd.laplacian(x)
    assert [level.shape[-1] for level in levels] == [64, 32, 16]
    y = levels[-1]
    for level in levels[-2::-1]:
        spread = torch.zeros_like(level)
        spread[:, :, ::2, ::2] = 4 * y
        y = level + swd.blurred(spread)
    torch.testing.assert_close(y, x)


def test_sliced_wasserstein_of_a_shift_is_its_mean_projection():
    torch.manual_seed(0)
    a, shift, directions = torch.randn(500, 6), torch.randn(6), torch.nn.functional.normalize(torch.randn(50, 6))
    distance = swd.sliced_wasserstein(a, (a + shift)[torch.randperm(500)], directions)
    assert distance == pytest.approx((directions @ shift).abs().mean().item(), rel=1e-4)


def test_a_set_is_nearest_to_itself_whatever_its_brightness_and_contrast(capsys):
    a, b = torch.randint(256, (2, 5, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    b = b[..., ::16].repeat_interleave(16, 3) // 2          # darker, and in strips
    real, fake, same = (swd.swd(*pair, per_image=500, projections=64) for pair in ((a, b), (b, a), (a, a)))
    assert real == pytest.approx(fake, rel=0.2)
    assert all(0 < same[size] < real[size] / 2 for size in real)        # other patches of the same images
    assert swd.swd(a // 4, a // 4 * 3 + 40, per_image=500, projections=64) == pytest.approx(same, rel=0.02)
    for name, images in (("real", a), ("fake", b[:4])):
        Path(name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"{name}/{i}.png")
    swd.main(["real", "fake", "--patches", "50"])
    *_, first, second, third, fourth, last = capsys.readouterr().out.splitlines()
    assert "4 images of each folder at 64x64" in first and last.startswith("average ")


# ---- claims.py, benchmark.py ----

@pytest.mark.parametrize("name", claims.JOBS)
def test_the_runs_of_the_claims_can_be_started(name):
    """The edits still find their lines, what they make runs, and the flags are the script's"""
    job, script, seen = claims.JOBS[name], claims.module(name), {}
    assert job.steps % job.every == 0
    if job.edits:
        script.train(**small(job.script))
    note = functools.wraps(script.train)(lambda **config: seen.update(config))
    script.main(note, script.generate, job.flags.split())
    assert seen["dataset"] == "mnist" and seen["digit"] is None


def test_a_run_of_a_claim_is_trained_and_kept(monkeypatch):
    line, flags = "            penalty = (grad_norm(D, x_hat) - 1) ** 2", "--width 1 --size 16 --batch-size 4"
    monkeypatch.setitem(claims.JOBS, "small", claims.Run("wgan_gp", 4, 2, flags, (0, 1), {line: line + " * 0"}))
    claims.train_all(["small"])                             # both at once, from one copy
    for seed, step in ((0, 2), (0, 4), (1, 4)):
        script, G, saved = claims.opened("small", seed, step)
        assert saved["config"]["seed"] == seed and saved["config"]["width"] == 1
        assert {row["step"]: row["penalty"] for row in saved["rows"]} == dict.fromkeys(range(2, step + 1, 2), 0)


def test_pretraining_moves_d_by_real_images_and_not_g(monkeypatch):
    job = claims.JOBS["ebgan-pretrain"]
    edits = {old: new.replace("500", "2") for old, new in job.edits.items()}
    monkeypatch.setitem(claims.JOBS, "ebgan-pretrain", job._replace(edits=edits))
    script = claims.module("ebgan-pretrain")
    for steps in (1, 3):                                    # it goes on
        script.train(**small("ebgan") | dict(steps=steps, save_every=1, keep=True))
    saved = [torch.load(f"run/00000{step}.pt", weights_only=True) for step in (1, 2, 3)]
    weights = [[each for name, each in it["G"].items() if name.endswith("weight")] for it in saved]
    assert all(map(torch.equal, weights[0], weights[1])) and not all(map(torch.equal, weights[1], weights[2]))
    first, second, third = saved[-1]["rows"]
    assert first["L_D"] == first["energy_real"] and second["L_D"] == second["energy_real"] < third["L_D"]


def test_the_benchmark_counts_and_times():
    assert benchmark.train(1, 2, wgan, width=1, device="cpu") > 0
    once, both = (benchmark.flops_of(wgan, dict(width=1, n_critic=n), at=2) for n in (1, 2))
    assert 0 < once < both < 2 * once
    counts = benchmark.operations(8)
    assert len(counts) == 3 and 0 < counts[0] < counts[2] < counts[1]      # 4x4; fading, which is both; 8x8


# ---- What lsgan.py says ----

def test_the_theorem_in_lsgans_docstring():
    """2 C(G) = χ²_Pearson(p_d + p_g ‖ 2 p_g) with the labels -1, 1, 0 and the term that (4) adds, and not with
    0, 1, 1: two distributions over five points"""
    p_d, p_g = np.random.default_rng(0).dirichlet(np.ones(5), 2)

    def C(a, b, c):
        D = (b * p_d + a * p_g) / (p_d + p_g)               # minimises (2) at every point:
        for shifted in (D + 1e-3, D - 1e-3):
            assert (p_d * (shifted - b)**2 + p_g * (shifted - a)**2 > p_d * (D - b)**2 + p_g * (D - a)**2).all()
        return (p_d * (D - c) ** 2 + p_g * (D - c) ** 2).sum() / 2
    chi2 = (((2 * p_g) - (p_d + p_g)) ** 2 / (p_d + p_g)).sum()
    np.testing.assert_allclose(2 * C(-1, 1, 0), chi2)
    assert abs(2 * C(0, 1, 1) - chi2) > 0.05


def test_ssim_of_one_window_and_of_equal_images():
    """Wang et al. 2004, by numpy"""
    from photos import ssim
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
