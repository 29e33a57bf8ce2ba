"""The sliced Wasserstein distance against a transcription in numpy, and on sets whose distance is known"""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import swd

TOP = Path(__file__).resolve().parent.parent


def numpy_blurred(x):
    taps = np.array([1, 4, 6, 4, 1]) / 16
    padded, result = np.pad(x, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect"), np.zeros_like(x)
    for i in range(5):
        for j in range(5):
            result += taps[i] * taps[j] * padded[:, :, i:i + x.shape[2], j:j + x.shape[3]]
    return result


def numpy_laplacian(x):
    levels = []
    while x.shape[-1] >= 32:
        smaller = numpy_blurred(x)[:, :, ::2, ::2]
        spread = np.zeros_like(x)
        spread[:, :, ::2, ::2] = smaller
        levels.append(x - 4 * numpy_blurred(spread))
        x = smaller
    return [*levels, x]


def numpy_distance(a, b, corners_a, corners_b, directions):
    """Of two lists of levels; corners: (2, n, k) for each level"""
    def descriptors(level, corners):
        found = np.array([level[i, :, r:r + 7, c:c + 7] for i in range(len(level)) for r, c in zip(*corners[:, i])])
        for channel in range(level.shape[1]):
            part = found[:, channel]
            found[:, channel] = (part - part.mean()) / part.std()
        return found.reshape(len(found), -1)
    a, b = descriptors(a, corners_a), descriptors(b, corners_b)
    return np.mean([np.abs(np.sort(a @ each) - np.sort(b @ each)).mean() for each in directions])


@pytest.fixture
def sets():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 5, 3, 64, 64)).astype(np.uint8)
    b = b[:, :, :, ::16].repeat(16, 3) // 2                 # darker, and in strips
    return torch.from_numpy(a), torch.from_numpy(b)


def test_pyramid_equals_numpy_and_adds_up_again(sets):
    x = sets[0].double()
    levels = swd.laplacian(x)
    assert [level.shape[-1] for level in levels] == [64, 32, 16]
    for level, expected in zip(levels, numpy_laplacian(x.numpy())):
        np.testing.assert_allclose(level.numpy(), expected, atol=1e-4)
    y = levels[-1]
    for level in levels[-2::-1]:
        spread = torch.zeros_like(level)
        spread[:, :, ::2, ::2] = 4 * y
        y = level + swd.blurred(spread)
    torch.testing.assert_close(y, x)


def test_a_constant_image_has_only_its_last_level():
    levels = swd.laplacian(torch.full((1, 3, 128, 128), 7.0))
    assert [level.shape[-1] for level in levels] == [128, 64, 32, 16]
    for level in levels[:-1]:
        assert level[:, :, 4:-4, 4:-4].abs().max() < 1e-5
    torch.testing.assert_close(levels[-1][:, :, 4:-4, 4:-4], torch.full((1, 3, 8, 8), 7.0))


@pytest.mark.parametrize("size, levels", [(7, [7]), (16, [16]), (28, [28]), (31, [31]), (48, [48, 24]),
                                          (1024, [1024, 512, 256, 128, 64, 32, 16])])
def test_levels(size, levels):
    assert [level.shape[-1] for level in swd.laplacian(torch.zeros(1, 1, size, size))] == levels


def test_distance_equals_numpy(monkeypatch, sets):
    drawn = {"randperm": [], "randint": [], "randn": []}

    def recorded(name, draw):
        def wrapper(*args, **kwargs):
            drawn[name].append(draw(*args, **kwargs))
            return drawn[name][-1]
        return wrapper
    for name in drawn:
        monkeypatch.setattr(torch, name, recorded(name, getattr(torch, name)))
    result = swd.swd(*sets, per_image=20, projections=40)
    assert list(result) == [64, 32, 16]
    corners, directions = ([each.numpy() for each in drawn[name]] for name in ("randint", "randn"))
    assert [each.shape for each in corners] == 6 * [(2, 5, 20)]
    assert [each.shape for each in directions] == 3 * [(40, 147)]
    pyramids = [numpy_laplacian(images[order].double().numpy()) for images, order in zip(sets, drawn["randperm"])]
    for k, size in enumerate(result):
        assert corners[2 * k].min() >= 0 and corners[2 * k].max() <= size - 7
        unit = directions[k] / np.linalg.norm(directions[k], axis=1, keepdims=True)
        expected = numpy_distance(pyramids[0][k], pyramids[1][k], corners[2 * k], corners[2 * k + 1], unit)
        assert result[size] == pytest.approx(expected, rel=1e-4) and expected > 0.01


def test_sliced_wasserstein_of_a_shift_is_its_mean_projection():
    torch.manual_seed(0)
    a, shift, directions = torch.randn(500, 6), torch.randn(6), torch.nn.functional.normalize(torch.randn(50, 6))
    order = torch.randperm(500)
    expected = (directions @ shift).abs().mean().item()
    assert swd.sliced_wasserstein(a, (a + shift)[order], directions) == pytest.approx(expected, rel=1e-4)
    assert swd.sliced_wasserstein(a, a[order], directions) == 0


def test_a_set_is_nearest_to_itself_and_the_figure_is_symmetric(sets):
    a, b = sets
    real, fake, same = (swd.swd(*pair, per_image=500, projections=64) for pair in ((a, b), (b, a), (a, a)))
    for size in real:
        assert real[size] == pytest.approx(fake[size], rel=0.2)
        assert 0 < same[size] < real[size] / 2              # other patches of the same images


def test_brightness_and_contrast_do_not_count(sets):
    a = sets[0] // 4
    same = swd.swd(a, a, per_image=200, projections=64)
    assert swd.swd(a, a * 3 + 40, per_image=200, projections=64) == pytest.approx(same, rel=1e-2)


def test_one_colour_has_a_distance_and_not_nan(sets):
    """What a collapsed generator may paint"""
    for distance in swd.swd(sets[0], torch.full_like(sets[0], 77), per_image=50, projections=16).values():
        assert 0.1 < distance < 10


@pytest.mark.parametrize("shape", [(5, 1, 64, 64), (5, 3, 32, 32)])
def test_sets_that_do_not_compare_are_refused(sets, shape):
    with pytest.raises(ValueError, match="images of one size"):
        swd.swd(sets[0], torch.zeros(shape))


@pytest.mark.parametrize("images, used", [(16384, 5), (4, 4)])
def test_as_many_images_of_both_sets(monkeypatch, sets, images, used):
    seen, patches = [], swd.patches
    monkeypatch.setattr(swd, "patches", lambda level, *corners: seen.append(level) or patches(level, *corners))
    swd.swd(torch.cat(sets), sets[1], images, per_image=2, projections=2)
    assert [level.shape for level in seen] == [(used, 3, size, size) for size in (64, 64, 32, 32, 16, 16)]
    for level in seen[-2:]:                                 # the coarsest level of different images differs
        assert len(level.flatten(1).unique(dim=0)) == used


def folder(name, images):
    Path(name).mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"{name}/{i}.png")


def test_the_command_line_prints_one_figure_per_level(sets):
    folder("real", sets[0])
    folder("fake", sets[1][:4])
    done = subprocess.run([sys.executable, f"{TOP}/tests/swd.py", "real", "fake", "--patches", "50"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first == "sliced Wasserstein distance x 1000, 4 images of each folder at 64x64"
    figures = {name: float(value) for name, value in (line.split() for line in lines)}
    assert list(figures) == ["64x64", "32x32", "16x16", "average"]
    assert figures["average"] == pytest.approx(np.mean(list(figures.values())[:3]), abs=0.01)
    assert figures["64x64"] > 100


@pytest.mark.parametrize("args, words", [("real nowhere", "nowhere does not exist"), ("real empty", "no images in"),
                                         ("real real --size 6", "at least 7 pixels"),
                                         ("real real --images 0", "at least 1 image"),
                                         ("real real --patches 0", "at least 1 image, patch and projection")])
def test_errors_are_one_sentence(sets, capsys, args, words):
    folder("real", sets[0][:2])
    Path("real/0a.png").write_bytes(b"broken")
    Path("empty").mkdir()
    with pytest.raises(SystemExit) as end:
        swd.main(args.split())
    *skipped, err = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and words in err and all(line.startswith("skipped") for line in skipped)
