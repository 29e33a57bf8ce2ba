"""common.py: pixels against Pillow and torchvision, folders, batches, and what is written"""
import gzip
import os
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import functional as TF

import common
from common import batches, load_images, load_set, save_curves, save_images


def noise(height, width, mode="RGB", seed=0):
    """A picture with coarse structure, so that resizing and turning it shows"""
    small = np.random.default_rng(seed).integers(0, 256, (7, 5, len(mode)), dtype=np.uint8)
    return Image.fromarray(small.squeeze(), mode).resize((width, height), Image.Resampling.BICUBIC)


def by_hand(image, size):
    """Upright, central square, antialiased: by Pillow alone -> uint8 (3, size, size)"""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = left, top, left + side, top + side
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box)).transpose(2, 0, 1)


def test_mnist_is_the_archives_pixels_with_a_border_of_two_or_resized_or_repeated():
    raw = common.ROOT / "MNIST" / "raw"
    before = sorted(raw.iterdir())
    pixels = np.frombuffer(gzip.decompress((raw / "train-images-idx3-ubyte.gz").read_bytes()), np.uint8)[16:]
    pixels = torch.tensor(pixels).view(-1, 1, 28, 28)
    labels = np.frombuffer(gzip.decompress((raw / "train-labels-idx1-ubyte.gz").read_bytes()), np.uint8)[8:]
    images, classes = load_set("mnist")
    assert torch.equal(images, pixels) and classes.tolist() == labels.tolist()
    sevens = pixels[labels == 7]
    padded = TF.pad(sevens, 2)
    assert torch.equal(load_images("mnist", 7), padded) and torch.equal(load_images("mnist", 7, size=28), sevens)
    assert torch.equal(load_images("mnist", 7, size=16), TF.resize(padded, [16, 16], antialias=True))
    assert torch.equal(load_images("mnist", 7, channels=3), padded.expand(-1, 3, -1, -1))
    assert len(load_images("mnist", 7, train=False)) == 1028
    assert not list(Path.cwd().iterdir()) and sorted(raw.iterdir()) == before   # nothing is unpacked


def test_cifar10_by_class_and_in_grey(monkeypatch):
    data = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)
    monkeypatch.setitem(common.DATASETS, "cifar10", lambda *_, **__: Namespace(data=data, targets=[0, 1, 2] * 3))
    pixels = torch.tensor(data).permute(0, 3, 1, 2)
    assert torch.equal(load_images("cifar10", 1), pixels[1::3])
    assert torch.equal(load_images("cifar10", channels=1), TF.rgb_to_grayscale(pixels))


def test_a_folder_of_everything(capsys):
    Path("photos/more/.hidden").mkdir(parents=True)
    Path("photos/run/generated").mkdir(parents=True)
    red = Image.new("RGB", (40, 30), "red")
    for name in ("a.png", "more/b.JPG", "c.webp", "more/.hidden/x.png", "run/real.png", "run/generated/y.png"):
        red.save(f"photos/{name}")
    Path("photos/run/checkpoint.pt").write_bytes(b"")
    Path("photos/running.png").symlink_to("a.png")
    Path("photos/damaged.png").write_bytes(Path("photos/a.png").read_bytes()[:60])
    Path("photos/notes.txt").write_text("no image")
    red.save("photos/f.tiff", save_all=True, append_images=[red])
    Image.fromarray(np.full((9, 9), 30000, np.uint16)).save("photos/deep.png")
    images, said = load_images("photos", size=16, root="root"), capsys.readouterr().out
    assert images.shape == (5, 3, 16, 16) and (images.int() - images[:1].int()).abs().max() <= 4
    for what in ("5 images, of 11 files in photos", "f.tiff: the first of 2 frames", "left out ",
                 "damaged.png: ", "deep.png: its pixels are I;16"):
        assert what in said
    assert load_images("photos", size=16, channels=1, root="root").shape == (5, 1, 16, 16)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_crop_and_antialiasing_are_those_of_pillow(orientation):
    Path("photos").mkdir()
    for i, (height, width) in enumerate([(50, 90), (90, 50), (33, 32)]):
        image, exif = noise(height, width, seed=i), Image.Exif()
        exif[0x0112] = orientation
        image.save(f"photos/{i}.png", exif=exif)
    for i, image in enumerate(load_images("photos", size=32, root="root")):
        image, file = image.numpy(), Image.open(f"photos/{i}.png")
        assert np.array_equal(image, by_hand(ImageOps.exif_transpose(file), 32))
        assert np.array_equal(image, by_hand(file, 32)) == (orientation == 1)


def test_transparency_is_on_white_and_large_jpegs_come_close():
    Path("photos").mkdir()
    image, large = noise(40, 40, "RGBA"), noise(600, 900)
    image.save("photos/a.png")
    large.save("photos/b.jpg", quality=95)
    a, b = load_images("photos", size=40, root="root").numpy().astype(int)
    alpha = np.asarray(image)[..., 3:] / 255
    white = (np.asarray(image)[..., :3] * alpha + 255 * (1 - alpha)).transpose(2, 0, 1)
    assert np.abs(a - white).max() <= 1
    assert np.abs(b - by_hand(large, 40)).max() <= 8        # a quarter of it is decoded


def test_a_folder_is_decoded_once_and_again_when_it_changes(monkeypatch):
    Path("photos").mkdir()
    for i in range(300):                                    # more than are decoded at a time
        Image.new("L", (8, 8), i % 256).save(f"photos/{i:03}.png")
    images = load_images("photos", size=4, root="root")
    assert images[:, 0, 0, 0].tolist() == [i % 256 for i in range(300)]
    with monkeypatch.context() as patch:
        patch.setattr(common, "_decode", None)
        assert torch.equal(load_images("./photos/../photos", size=4, root="root"), images)
    Image.new("L", (8, 8), 77).save("photos/000.png")
    os.utime("photos/000.png", (1, 1))
    assert load_images("photos", size=4, root="root")[0, 0, 0, 0] == 77 and images[0, 0, 0, 0] == 0


def test_a_folder_without_images_and_a_stopped_decoding_leave_nothing(monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt
    Path("photos").mkdir()
    Path("photos/a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="1 files, but no image"):
        load_images("photos", root="root")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common, "_decode", stopped)
        load_images("photos", root="root")
    assert not list(Path("root/cache").iterdir())
    Image.new("RGB", (9, 9)).save("photos/a.png")
    with ThreadPoolExecutor(2) as pool:                     # two at a time decode one folder
        a, b = pool.map(lambda _: load_images("photos", root="root"), range(2))
    assert torch.equal(a, b) and len(list(Path("root/cache").iterdir())) == 1


def test_batches_are_full_uniform_with_replacement_and_exact():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 2, 2) * 25
    torch.manual_seed(0)
    x = torch.cat([next(batches(images, 64)) for _ in range(100)])
    assert x.shape == (6400, 3, 2, 2) and x.dtype == torch.float32
    values, counts = x[:, 0, 0, 0].unique(return_counts=True)
    assert torch.equal(values, torch.arange(10) * 25 / 127.5 - 1)
    assert (counts - 640).abs().max() < 5 * 640 ** 0.5
    white = torch.full((1, 1, 1, 1), 255, dtype=torch.uint8)
    assert next(batches(white, 1)).item() == 1 and next(batches(white - 255, 1)).item() == -1
    for images, m in ((images.float(), 3), (images, 0)):
        with pytest.raises(ValueError, match="uint8"):
            next(batches(images, m))


@pytest.mark.parametrize("channels", [1, 3])
def test_what_goes_out_is_what_came_in_row_by_row(channels):
    images = torch.randint(256, (9, channels, 5, 5), dtype=torch.uint8)
    x = images / 127.5 - 1
    save_images(x, "new/grid.png")
    shown = torch.tensor(np.asarray(Image.open("new/grid.png").convert("RGB"))).view(3, 5, 3, 5, 3)
    shown = shown.permute(0, 2, 4, 1, 3).reshape(9, 3, 5, 5)
    assert torch.equal(shown, images.expand(9, 3, 5, 5)) and torch.equal(x, images / 127.5 - 1)
    save_images(torch.tensor([-3.0, 3.0]).view(2, 1, 1, 1), "out.png")      # beyond black and white
    assert np.asarray(Image.open("out.png"))[..., 0].tolist() == [[0], [255]]
    with pytest.raises(ValueError, match="bad.png .*finite"):
        save_images(torch.full((1, 1, 2, 2), torch.nan), "bad.png")
    assert not Path("bad.png").exists()


def test_a_curve_of_every_column_and_the_same_numbers_as_a_table():
    rows = [dict(step=100, seconds=1.0, a=1.5, b=2.0), dict(step=200, seconds=2.0, a=-0.5, b=2.0, new=3)]
    save_curves(rows, ".")
    assert Path("log.csv").read_text().split() == ["step,seconds,a,b,new", "100,1.0,1.5,2.0,", "200,2.0,-0.5,2.0,3"]
    dark = np.asarray(Image.open("curve.png")).min(2) < 100
    assert dark.shape == (480, 640) and dark[25:27, 318:322].any() and dark[143:146, 627:631].any()     # a: falls
