"""common.py: images in, images out"""
import argparse
import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import batches, find_device, load_images, pyramid, run_folder, save_animation, save_curve, save_each
from common import save_images


@pytest.fixture
def photos(tmp_path):
    """A folder as people have them"""
    folder = tmp_path / "photos [old] *"
    for name in ("deep/deeper", ".thumbnails", "runs/one"):
        (folder / name).mkdir(parents=True)
    color = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    for mode, name in dict(RGB="rgb.png", L="deep/grey.jpg", RGBA="deep/deeper/rgba.webp", P="palette.gif",
                           CMYK="cmyk.tif").items() | {("1", "bits.PNG")}:
        color.convert(mode).save(folder / name)
    Image.new("RGB", (1, 1), "red").save(folder / "dot.bmp")
    Image.new("RGB", (1200, 900), "blue").save(folder / "large.jpg")
    Image.fromarray((np.arange(1600).reshape(40, 40) * 40).astype(np.uint16)).save(folder / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6                                        # turn by 90 degrees clockwise to see it upright
    color.save(folder / "rotated.jpg", exif=exif)
    (folder / "corrupt.png").write_bytes((folder / "rgb.png").read_bytes()[:300])
    for name in ("notes.txt", ".hidden.png", ".thumbnails/a.png", "runs/one/000500.png", "runs/one/checkpoint.pt"):
        (folder / name).write_text("none of the images")
    return folder


def test_mnist_is_the_archives_pixels_with_a_border_of_two_or_resized_or_repeated():
    raw, labels = (np.frombuffer(gzip.open(common.ROOT / "MNIST" / "raw" / name).read(), np.uint8, offset=skip)
                   for name, skip in (("train-images-idx3-ubyte.gz", 16), ("train-labels-idx1-ubyte.gz", 8)))
    raw = raw.reshape(-1, 28, 28)
    sevens = load_images("mnist", 7)
    assert sevens.shape == (6265, 1, 32, 32) and sevens.dtype == torch.uint8
    np.testing.assert_array_equal(sevens[:, 0], np.pad(raw[labels == 7], ((0, 0), (2, 2), (2, 2))))
    np.testing.assert_array_equal(load_images("mnist", size=28)[:, 0], raw)
    blocks = torch.nn.AdaptiveAvgPool2d(4)
    for size in (64, 16):                                   # the same picture: means of blocks agree
        other = load_images("mnist", 7, size=size)
        assert other.shape[1:] == (1, size, size)
        assert (blocks(other[:50].float()) - blocks(sevens[:50].float())).abs().mean() < 1.5
    assert torch.equal(load_images("mnist", 7, channels=3), sevens.expand(-1, 3, -1, -1))


def test_damaged_files_are_unpacked_again_or_named(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    shutil.copytree(common.ROOT / "MNIST" / "raw", raw, ignore=shutil.ignore_patterns("*ubyte"))
    good, file = load_images("mnist", 7, root=tmp_path), raw / "train-images-idx3-ubyte"
    for damage in (lambda data: data[:1000], lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]):
        file.write_bytes(damage(file.read_bytes()))
        assert torch.equal(load_images("mnist", 7, root=tmp_path), good)
    for archive in raw.glob("*.gz"):                        # does not matter beside good unpacked files
        archive.write_bytes(archive.read_bytes()[:-9])
    assert torch.equal(load_images("mnist", 7, root=tmp_path), good)
    file.write_bytes(b"short")
    for archive in raw.glob("*.gz"):
        archive.unlink()
    with pytest.raises(OSError, match="mnist in .* is damaged: delete"):
        load_images("mnist", root=tmp_path)
    for dataset, name in (("cifar10", "cifar-10-python.tar.gz"), ("fashion-mnist", "train-labels-idx1-ubyte.gz")):
        with pytest.raises(OSError, match=f"no network in the tests.*{name}"):      # to be fetched by hand
            load_images(dataset, root=tmp_path)


def test_cifar10_and_fashion_mnist_by_class(monkeypatch, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)

    def cifar(root, train, download):
        return argparse.Namespace(data=pixels, targets=[i % 10 for i in range(30)])
    cifar.filename = "cifar-10-python.tar.gz"
    monkeypatch.setitem(common.DATASETS, "cifar10", (cifar, 3))
    np.testing.assert_array_equal(load_images("cifar10", 4, root=tmp_path), pixels[4::10].transpose(0, 3, 1, 2))
    assert load_images("cifar10", root=tmp_path, channels=1).shape == (30, 1, 32, 32)
    assert common.DATASETS["fashion-mnist"] == (common.datasets.FashionMNIST, 1)
    assert [*map(common.channels_of, ("cifar10", "mnist", "folder"))] == [3, 1, 3]


def test_a_folder_of_everything(photos, capsys):
    (photos / "gone.png").symlink_to(photos / "nowhere.png")
    images = load_images(str(photos), size=16)
    assert images.shape == (10, 3, 16, 16) and images.dtype == torch.uint8
    err = capsys.readouterr().err
    assert "corrupt.png" in err and "gone.png: FileNotFoundError" in err and "skipped 2 of 12" in err
    assert load_images(photos, size=16, channels=1).shape == (10, 1, 16, 16)
    order = "bits cmyk deep/deeper/rgba deep/grey dot large palette rgb rotated sixteen".split()
    at = dict(zip(order, images))
    np.testing.assert_allclose(at["large"].float().mean((1, 2)), [0, 0, 254], atol=2)
    assert torch.equal(at["deep/grey"][0], at["deep/grey"][2])
    with pytest.raises(ValueError, match="--size 901 is larger than every image in .*square .* 900 pixels"):
        load_images(photos, size=901, enlarge=False)
    assert len(load_images(photos, size=900, enlarge=False)) == 10          # one is large enough


def test_center_crop_antialias_orientation_and_transparency(tmp_path):
    stripes = np.zeros((64, 128, 3), np.uint8)
    stripes[:, ::2] = 255                                   # every second column white: grey when antialiased
    stripes[:, :32] = stripes[:, 96:] = (255, 0, 0)         # cut off by the central square
    Image.fromarray(stripes).save("a.png")
    halves = np.zeros((32, 32, 3), np.uint8)
    halves[:, 16:] = 255                                    # left black, right white
    exif = Image.Exif()
    exif[0x0112] = 6                                        # shown: top black, bottom white
    Image.fromarray(halves).save("b.png", exif=exif)
    Image.fromarray(np.zeros((32, 32, 4), np.uint8)).save("c.png")
    Image.fromarray(np.full((32, 32), 0x8000, np.uint16)).save("d.png")
    a, b, c, d = load_images(tmp_path, size=32)
    assert (a[:, 2:-2, 2:-2].float() - 127.5).abs().max() < 4               # but for ringing at the cut
    assert torch.equal(b, torch.from_numpy(np.rot90(halves, -1).copy()).permute(2, 0, 1))
    assert (c == 255).all() and (d == 128).all()


def test_mapped_files_are_made_once_and_replaced_when_the_folder_changes(photos, monkeypatch, tmp_path):
    in_memory, cache = pyramid(load_images(photos, size=32)), tmp_path / "root" / "cache"

    def mapped(size=32, on_request=True):
        return pyramid(load_images(photos, size=size, root=tmp_path / "root", mapped=on_request))
    first, files = mapped(), sorted(cache.iterdir())
    assert [file.stat().st_size for file in files] == [10 * 3 * (16 * 16 + 8 * 8 + 4 * 4), 10 * 3 * 32 * 32]
    if Path("/proc/self/maps").exists():
        assert all(str(file) in Path("/proc/self/maps").read_text() for file in files)
    made = [file.stat().st_mtime_ns for file in files]
    monkeypatch.setattr(common, "free_memory", lambda device="cpu": 1000)
    second = mapped(on_request=False)
    assert made == [file.stat().st_mtime_ns for file in files]
    for size in (32, 16, 8, 4):
        assert torch.equal(first[size], in_memory[size]) and torch.equal(second[size], in_memory[size])
    assert next(batches(first[16], 5)).shape == (5, 3, 16, 16)
    Image.new("RGB", (40, 40), "white").save(photos / "zzz.png")
    more = mapped()
    assert len(more[4]) == 11 and (more[4][-1] == 255).all() and len(list(cache.iterdir())) == 2
    assert mapped(8)[8].shape == (11, 3, 8, 8) and len(list(cache.iterdir())) == 4


@pytest.mark.parametrize("n, size, channels", [(5, 4, 1), (25, 512, 3)])    # in parts of 21
def test_pyramid_averages_2x2_pixels_and_rounds_once(tmp_path, n, size, channels):
    images = torch.randint(256, (n, channels, size, size), dtype=torch.uint8)
    in_memory = pyramid(images)
    assert in_memory[size] is images
    images.file = tmp_path / "images.uint8"
    for levels in (in_memory, pyramid(images)):
        assert list(levels) == [size >> k for k in range(size.bit_length() - 2)]
        for each, level in levels.items():
            mean = images.numpy().reshape(n, channels, each, size // each, each, size // each).mean((3, 5))
            np.testing.assert_array_equal(level.numpy(), np.round(mean).astype(np.uint8), strict=True)


def test_what_makes_no_sense_is_refused_in_one_sentence(tmp_path):
    Path("one/empty").mkdir(parents=True)
    Image.new("L", (5, 5)).save("one/a.png")
    Path("one/b.png").write_bytes(b"no picture")
    for words, call in {
            "nowhere does not exist": dict(dataset="nowhere"), "is a file": dict(dataset="one/a.png"),
            "no images in": dict(dataset="one/empty"), "one holds 1 readable images": dict(dataset="one", size=4),
            "--digit 3 needs a data set with classes": dict(dataset="one", digit=3),
            "--digit must be one of the classes 0 to 9": dict(digit=11), "--channels must be 1": dict(channels=2),
            "--size must be at least 1": dict(size=0)}.items():
        with pytest.raises(ValueError, match=f"^(?=.*{words}).*$"):         # "." is no new line
            load_images(**call)
    images = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    for words, args in {"--batch-size must be at least 1, not 0": (images, 0), "no images": (images[:0], 1),
                        "--record records CUDA steps": (images, 2, "cpu", True)}.items():
        with pytest.raises(ValueError, match=words):
            batches(*args)


def test_batches_are_full_uniform_with_replacement_and_exact():
    images = torch.arange(0, 256, 17).to(torch.uint8).view(16, 1, 1, 1).expand(-1, 3, 4, 4)      # 0, 17, ..., 255
    torch.manual_seed(0)
    P_r = batches(images, 100)
    x = torch.cat([next(P_r) for _ in range(160)])
    assert x.shape == (16000, 3, 4, 4) and x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    counts = torch.bincount(((x[:, 0, 0, 0] + 1) * 127.5 / 17).round().long())
    assert len(counts) == 16 and ((counts - 1000).abs() < 5 * 1000**0.5).all()
    first = x[:, 0, 0, 0].view(-1, 100)[:, :16]             # without replacement these 16 would always differ
    assert max(len(part.unique()) for part in first) < 16 and len(next(batches(images[:2], 64))) == 64
    state = torch.get_rng_state()
    a = next(P_r)
    torch.set_rng_state(state)
    assert torch.equal(next(batches(images, 100)), a)       # depends on the random state alone


def test_what_goes_out_is_what_came_in(tmp_path):
    for channels in (1, 3):
        images = torch.randint(0, 256, (5, channels, 16, 16), dtype=torch.uint8)
        folder = save_each((images.float() / 127.5 - 1).split(2), 4, tmp_path / f"{channels}.pt")
        assert folder == tmp_path / str(channels) and len(list(folder.iterdir())) == 4      # beside the checkpoint
        back = [np.asarray(Image.open(folder / f"{i:06d}.png")) for i in range(4)]
        np.testing.assert_array_equal(np.stack(back).reshape(4, 16, 16, channels).transpose(0, 3, 1, 2), images[:4])
    folder = save_each([torch.full((1, 1, 4, 4), -7.0)], 1, tmp_path)
    assert folder == tmp_path / "generated" and not np.asarray(Image.open(folder / "000000.png")).any()
    zeros, new = torch.zeros(1, 1, 32, 32), tmp_path / "new.pt"
    for words, args in {"there already": ([zeros], 1, tmp_path), "at least 1, not 0": ([], 0, new),
                        "nan": ([zeros / 0], 1, new)}.items():
        with pytest.raises((FileExistsError, ValueError), match=words):
            save_each(*args)
    for dataset, side in dict(mnist=28, cifar10=32, photos=32).items():     # the border comes off
        assert Image.open(save_each([zeros], 1, tmp_path / dataset, dataset) / "000000.png").size == (side, side)


def test_a_grid_goes_row_by_row_is_square_and_never_half_written(tmp_path):
    file = tmp_path / "new" / "grid.png"
    for n, size, across in ((64, 32, 8), (10, 16, 3), (64, 1024, 2), (4, 4096, 1)):     # fits 2048 pixels
        save_images(torch.zeros(1, 1, 1, 1).expand(n, 1, size, size), file)
        assert Image.open(file).size == (across * size, across * size)
    x = torch.linspace(-1, 1, 9).view(9, 1, 1, 1).expand(9, 3, 2, 2)
    save_images(x, file)
    assert np.asarray(Image.open(file))[::2, ::2, 0].ravel().tolist() == [0, 32, 64, 96, 128, 159, 191, 223, 255]
    before = file.read_bytes()
    with pytest.raises(KeyboardInterrupt), common.replacing(file) as sink:
        sink.write(b"half")
        raise KeyboardInterrupt
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


def test_an_animation_has_at_most_100_frames_of_one_size_at_most_512_wide(tmp_path):
    save_animation(tmp_path)
    assert not list(tmp_path.iterdir())
    Image.new("L", (8, 8)).save(tmp_path / "real.png")      # no picture of a step
    for i in range(120):
        Image.new("L", (8, 8) if i < 119 else (1024, 1024), 2 * i).save(tmp_path / f"{940_000 + 1000 * i:06d}.png")
    save_animation(tmp_path)
    with Image.open(tmp_path / "training.gif") as gif:
        assert gif.n_frames == 100 and gif.size == (512, 512) and gif.info["loop"] == 0
        gif.seek(99)                                        # the last step, of seven digits, comes last
        assert abs(gif.convert("L").getpixel((0, 0)) - 238) <= 1


def test_a_curve_of_every_column_and_the_same_numbers_as_a_table(tmp_path):
    rows = [dict(step=100 * i, seconds=0.5 * i, L_D=-float(i), flat=3.0) for i in range(1, 9)]
    save_curve(rows[:1], tmp_path)
    save_curve(rows, tmp_path)
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.size == (640, 360)                   # one panel each
        panels = np.asarray(picture.convert("RGB")).astype(int).reshape(2, 180, 640, 3)
    falls, flat = (np.argwhere((abs(panel - (31, 78, 121)) < 9).all(2)) for panel in panels)
    assert np.corrcoef(falls.T)[0, 1] > 0.99 and np.ptp(flat[:, 0]) <= 2    # rows of pixels count from the top
    before = (tmp_path / "log.csv").read_text()
    assert before.splitlines()[:2] == ["step,seconds,L_D,flat", "100,0.5,-1.0,3.0"] and before.count("\n") == 9
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"L_D is {bad} at step 900"):
            save_curve([*rows, dict(step=900, seconds=5.0, L_D=bad, flat=3.0)], tmp_path)
    assert (tmp_path / "log.csv").read_text() == before


def test_devices_and_run_folders():
    assert find_device("cpu") == find_device(torch.device("cpu")) == torch.device("cpu")
    for name in ("nothing", "cuda:77"):
        with pytest.raises(ValueError, match=f"--device {name} is not on this machine"):
            find_device(name)
    Path("mine").mkdir()
    with pytest.raises(ValueError, match="--out mine is the folder of the images"):
        run_folder("wgan", argparse.Namespace(out="mine", dataset="./mine", digit=None))
    for folder, out, dataset, digit in (("~no one/x", "~no one/x", "~no one/y", None),
                                        ("runs/wgan-photos", None, "path/to/photos/", None),
                                        ("runs/wgan-mnist-0", None, "mnist", 0), ("a", "a", "mnist", 0)):
        assert run_folder("wgan", argparse.Namespace(out=out, dataset=dataset, digit=digit)) == Path(folder)
