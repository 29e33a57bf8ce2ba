"""The measurements' own tests, by hand: python -m pytest measure

The judge's figures in closed form and against plain loops, the sliced Wasserstein distance against numpy, the command
lines on small runs, the edits of the claims; the benchmark's counting"""
import functools
import importlib
import itertools
import os
import re
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

TOP = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TOP), str(TOP / "measure")]
import benchmark  # noqa: E402
import claims  # noqa: E402
import common  # noqa: E402
import evaluate  # noqa: E402
import swd  # noqa: E402
import wgan  # noqa: E402

SMALL = dict(progan=dict(fmap_max=3, kimg=0.008))
PAGE = (TOP / "docs" / "claims.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(claims, "RUNS", tmp_path / "claims")


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
        return np.mean([any(np.linalg.norm(p - centre) <= far for centre, far in zip(among, reach)) for p in points])
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
    assert evaluate.inception_score(torch.tensor([[0.9, 0.1], [0.1, 0.9]])) == pytest.approx(2 * 0.9**0.9 * 0.1**0.1)


# ---- evaluate.py: the classifier and the runs ----

@pytest.fixture
def root(monkeypatch, tmp_path):
    """A folder with MNIST, in which a classifier is made of 1,000 images, in two seconds"""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "MNIST").symlink_to(common.ROOT / "MNIST")
    fit = evaluate.fit
    monkeypatch.setattr(evaluate, "fit", lambda images, labels: fit(images[:1000], labels[:1000], epochs=5))
    return tmp_path / "data"


def test_a_digits_reference_has_that_digit_only(root):
    to = evaluate.reference("mnist", 7, root)
    images, classes = common.read_set("mnist", train=False)
    expected = images[classes == 7]
    assert len(to.test) == len(expected) == 1028 and len(to.training) == 6265 and to.accuracy > 0.8
    assert torch.equal(to.test.double().mean(0), expected.double().mean(0)) and not torch.equal(to.test, expected)
    figures = evaluate.judge(to.training[:300], to, copied=to.test)
    assert figures["classes"].argmax() == 7 and figures["classes"].sum() == pytest.approx(1)
    assert figures["copies"] < 0.05 and figures["precision"] > 0.6 and figures["entropy"] < 1
    assert evaluate.judge(to.training[:300], to)["copies"] > 0.99
    noise = torch.randint(256, (300, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    worse = evaluate.judge(noise, to)
    assert worse["Fréchet"] > 10 * figures["Fréchet"] and worse["recall"] == worse["copies"] == 0


def trained(script, out, **settings):
    """A run of two steps whose images differ from each other"""
    script.train(**dict(digit=7, size=32, nz=5, batch_size=8, device="cpu", steps=2, out=out)
                 | SMALL.get(script.SCRIPT, dict(width=2)) | settings)
    file = torch.load(f"{out}/checkpoint.pt", weights_only=True)
    saved = file[script.SCRIPT]
    name, factor = ("G_ema", 5) if "G_ema" in saved else ("G", 20)
    for weight in saved[name].values():
        weight.mul_(factor if weight.ndim > 1 else 1)
    torch.save(file, f"{out}/checkpoint.pt")


@pytest.mark.parametrize("name", evaluate.SCRIPTS)
def test_samples_are_what_generate_writes(name):
    """To the bit, but for progan.py, which draws a few images at a time"""
    script = importlib.import_module(name)
    trained(script, "run")
    for path in ("run", "run/checkpoint.pt"):               # a folder, a kept file
        own, saved = evaluate.opened(path)
        assert own is script and saved["run"][0] == 2
    images = evaluate.sample(own.load("run"), saved["settings"]["nz"], 70, seed=3)
    assert images.dtype == torch.uint8 and len(images) == 70
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
    evaluate.main([pictures, "--digit", "7", "--root", str(root)])
    number, *again, same = capsys.readouterr().out.splitlines()
    assert again == [what, head, floor] and number == f"40 images from {pictures}"
    assert "40 images against 1,028 test images" in what and "class 7" in what and head.split()[0] == "Fréchet"
    cells = [[float(cell) for cell in re.sub(r"^(run\S+|40 training images)( \(2 steps\))?", "", line).split()]
             for line in (floor, first, second, same)]
    assert all(len(line) == 16 for line in cells) and cells[0][0] < cells[1][0] != cells[2][0]
    assert cells[1] == cells[3]                             # a run, and the pictures that it generates
    mean, deviation = re.match(r"run-0 run-1: 2 seeds: Fréchet ([\d.]+) ± ([\d.]+), precision ", both).groups()
    assert float(mean) == pytest.approx((cells[1][0] + cells[2][0]) / 2, rel=0.01)
    assert float(deviation) == pytest.approx(abs(cells[1][0] - cells[2][0]) / 2 ** 0.5, rel=0.05, abs=0.01)


@pytest.mark.parametrize("command, sentence", [
    ("nowhere", "nowhere does not exist"),
    ("damaged", "damaged"),
    ("images --digit 10", "--digit must be one of the classes 0 to 9"),
    ("images --dataset cifar10", "mnist and fashion-mnist, not for cifar10"),
    ("images --images 1", "--images must be at least 2")])
def test_errors_are_one_sentence(command, sentence, root, capsys):
    for name in ("damaged", "images"):
        Path(name).mkdir()
    Path("damaged", "checkpoint.pt").write_bytes(b"0")
    for i in range(3):
        Image.new("L", (28, 28)).save(f"images/{i}.png")
    with pytest.raises(SystemExit) as end:
        evaluate.main([*command.split(), "--root", str(root)])
    err = capsys.readouterr().err
    assert end.value.code == 2 and sentence in err and err.count("\n") == 1


# ---- swd.py ----

@pytest.fixture
def sets():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 5, 3, 64, 64)).astype(np.uint8)
    b = b[:, :, :, ::16].repeat(16, 3) // 2                 # darker, and in strips
    return torch.from_numpy(a), torch.from_numpy(b)


def test_the_pyramid_adds_up_again(sets):
    x = sets[0].double()
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
    expected = (directions @ shift).abs().mean().item()
    assert swd.sliced_wasserstein(a, (a + shift)[torch.randperm(500)], directions) == pytest.approx(expected, rel=1e-4)


def test_a_set_is_nearest_to_itself_whatever_its_brightness_and_contrast(sets, capsys):
    a, b = sets
    real, fake, same = (swd.swd(*pair, per_image=500, projections=64) for pair in ((a, b), (b, a), (a, a)))
    for size in real:
        assert real[size] == pytest.approx(fake[size], rel=0.2)
        assert 0 < same[size] < real[size] / 2              # other patches of the same images
    assert swd.swd(a // 4, a // 4 * 3 + 40, per_image=500, projections=64) == pytest.approx(same, rel=0.02)
    for name, images in (("real", a), ("fake", b[:4])):
        Path(name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"{name}/{i}.png")
    swd.main(["real", "fake", "--patches", "50"])
    _, _, first, *lines = capsys.readouterr().out.splitlines()
    assert "4 images of each folder at 64x64" in first
    assert [line.split()[0] for line in lines] == ["64x64", "32x32", "16x16", "average"]


# ---- claims.py, benchmark.py ----

@pytest.mark.parametrize("name", claims.JOBS)
def test_the_runs_of_the_claims_can_be_started(name, monkeypatch):
    """The edits still find their lines, the copy can be imported, and the flags are the script's"""
    job, script = claims.JOBS[name], claims.module(name)
    changed = Path(script.__file__).read_bytes() != (TOP / f"{job.script}.py").read_bytes()
    assert changed == bool(job.edits) and script.SCRIPT == Path(job.script).name and job.steps % job.every == 0
    script.train(steps=2, device="cpu", out="run", batch_size=4, **SMALL.get(job.script, dict(width=2)))
    seen = []
    monkeypatch.setattr(script.Run, "__init__", lambda run, config, *_, **__: seen.append(config) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        script.main(job.flags.split())
    assert seen[0].dataset == "mnist" and seen[0].digit is None


def test_a_run_of_a_claim_is_trained_and_kept(tmp_path, monkeypatch):
    line, flags = "            penalty = (grad_norm(D, x_hat) - 1) ** 2", "--width 1 --size 16 --batch-size 4"
    monkeypatch.setitem(claims.JOBS, "small", claims.Run("wgan_gp", 4, 2, flags, (0, 1), {line: line + " * 0"}))
    claims.train_all(["small"])                             # both at once, from one copy
    for seed, step in itertools.product((0, 1), (2, 4)):
        script, G, saved = claims.opened("small", seed, step)
        assert saved["run"][0] == step and saved["settings"]["seed"] == seed and saved["settings"]["width"] == 1
        assert [row["penalty"] for row in saved["run"][2]] == [0] * (step // 2)     # the changed copy was trained
    before = claims.kept("small", 1).stat().st_mtime_ns
    claims.train_all(["small"])                             # all is there: nothing is trained again
    assert claims.kept("small", 1).stat().st_mtime_ns == before
    monkeypatch.setitem(claims.JOBS, "small", claims.JOBS["small"]._replace(steps=3))
    with pytest.raises(ValueError, match="if the run is beyond it, remove"):
        claims.train("small", 0)


def test_pretraining_moves_d_by_real_images_and_not_g(monkeypatch):
    job = claims.JOBS["ebgan-pretrain"]
    edits = {old: new.replace("500", "2") for old, new in job.edits.items()}
    monkeypatch.setitem(claims.JOBS, "ebgan-pretrain", job._replace(edits=edits))
    script = claims.module("ebgan-pretrain")
    script.train(steps=3, save_every=1, keep=True, width=1, size=16, batch_size=4, device="cpu", out="run")
    saved = [script.read(f"run/00000{step}.pt") for step in (1, 2, 3)]
    weights = [[each for name, each in it["G"].items() if name.endswith("weight")] for it in saved]
    assert all(map(torch.equal, weights[0], weights[1])) and not all(map(torch.equal, weights[1], weights[2]))
    first, second, third = saved[-1]["run"][2]
    assert first["L_D"] == first["energy_real"] and second["L_D"] == second["energy_real"] < third["L_D"]


def test_errors_of_the_claims_say_what_to_do(monkeypatch):
    for words, sentence in ((["18"], "numbers of claims, 1 to 17, not 18"),
                            (["train", "gan"], "the runs are wgan, .*, not gan"),
                            (["12"], "is not there: python measure/claims.py train wgan_gp$")):
        with pytest.raises(ValueError, match=sentence):
            claims.main(words)
    monkeypatch.setitem(claims.JOBS, "small", claims.Run("wgan_gp", 4, 2, edits={"    no such line": ""}))
    with pytest.raises(ValueError, match="no longer exactly one line"):
        claims.script_of("small")


def test_every_claim_stands_beside_its_command():
    for number in range(1, 17):
        (section,) = re.findall(rf"^## {number}\. .*?(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
        assert f"python measure/claims.py {number}\n" in section and hasattr(claims, f"claim_{number}")
    for path in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (TOP / "docs" / path).exists(), path


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
