"""common.py: images in, images out"""
import argparse
import errno
import gzip
import hashlib
import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import batches, checked, claim, find_device, load_images, load_labels, name_of, next_image, pyramid
from common import replacing, resident, run_folder, save_animation, save_curve, save_each, save_images


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


def test_labels_are_those_of_the_images_in_their_order(tmp_path):
    for train, n, sevens in ((True, 60_000, 6265), (False, 10_000, 1028)):
        images, labels = load_images("mnist", size=28, train=train), load_labels("mnist", train=train)
        assert images.shape == (n, 1, 28, 28) and labels.shape == (n,) and labels.dtype == torch.int64
        seven = load_images("mnist", 7, 28, train=train)
        assert len(seven) == sevens and torch.equal(images[labels == 7], seven)
        assert load_labels("mnist", 7, train=train).tolist() == sevens * [7]
    with pytest.raises(OSError, match=f"{tmp_path}.* is missing"):
        load_labels(root=tmp_path)
    assert len(load_labels()) == 60_000
    with pytest.raises(ValueError, match="has no labels.*mnist"):
        load_labels(str(tmp_path))


def test_archives_are_read_where_they_are_and_fetched_whole_or_not_at_all(tmp_path, monkeypatch):
    raw = tmp_path / "MNIST" / "raw"
    shutil.copytree(common.ROOT / "MNIST" / "raw", raw, ignore=shutil.ignore_patterns("*ubyte"))
    (raw / "train-images-idx3-ubyte").write_bytes(b"old")   # unpacked by others, and damaged
    for each in (raw, raw.parent, tmp_path):
        each.chmod(0o555)
    good, names = load_images("mnist", 7, root=tmp_path), sorted(raw.iterdir())
    assert len(good) == 6265 and sorted(raw.iterdir()) == names
    for each in (raw, raw.parent, tmp_path):
        each.chmod(0o755)
    images, labels = (raw / f"train-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1"))
    labels.unlink()
    with pytest.raises(OSError, match=f"{labels} is missing .*no network in the tests.*put a good one there"):
        load_images("mnist", root=tmp_path)
    shutil.copy(common.ROOT / "MNIST" / "raw" / labels.name, labels)
    images.write_bytes(images.read_bytes()[:-9])
    with pytest.raises(OSError, match=f"{images} is damaged .*no network in the tests.*put a good one there"):
        load_images("mnist", root=tmp_path)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"no archive")
    with pytest.raises(OSError, match="cifar-10-python.tar.gz is damaged .*no network"):
        load_images("cifar10", root=tmp_path)

    def download(url, folder, name, md5):
        tried.append(url)
        Path(folder, name).write_bytes(b"half of it")
        if len(tried) == 1:
            raise RuntimeError("File not found or corrupted.")
        shutil.copy(common.ROOT / "MNIST" / "raw" / name, folder)
    tried = []
    monkeypatch.setattr(common.datasets.utils, "download_url", download)
    assert torch.equal(load_images("mnist", 7, root=tmp_path), good)        # from the second mirror
    assert [url.rpartition("/")[2] for url in tried] == [images.name] * 2 and len(set(tried)) == 2
    assert sorted(raw.iterdir()) == names


def test_cifar10_and_fashion_mnist_by_class(monkeypatch, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 3, 32, 32), dtype=np.uint8)
    kind, file = common.datasets.CIFAR10, tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(file, "w:gz") as tar:
        for i, (name, _) in enumerate(kind.train_list + kind.test_list):
            some = dict(data=pixels[10 * i:10 * i + 10].reshape(10, -1), labels=[*range(10)])
            data = pickle.dumps(some, 2)
            entry = tarfile.TarInfo(f"{kind.base_folder}/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(file.read_bytes()).hexdigest())
    np.testing.assert_array_equal(load_images("cifar10", 4, root=tmp_path), pixels[4:50:10])
    assert load_images("cifar10", root=tmp_path, channels=1).shape == (50, 1, 32, 32)
    test, labels = common.read_set("cifar10", tmp_path, train=False)
    assert labels.tolist() == [*range(10)] and np.array_equal(test, pixels[50:])
    assert [len(part) for part in common.read_set("mnist", train=False)] == [10000, 10000]
    assert common.DATASETS["fashion-mnist"] == (common.datasets.FashionMNIST, 1)
    assert [*map(common.channels_of, ("cifar10", "mnist", "folder"))] == [3, 1, 3]


def test_a_folder_of_everything(photos, capsys):
    (photos / "gone.png").symlink_to(photos / "nowhere.png")
    images = load_images(str(photos), size=16)
    assert images.shape == (10, 3, 16, 16) and images.dtype == torch.uint8
    out, err = capsys.readouterr()
    left_out = "1 run folders, 1 broken links or no regular files, 1 .txt, 1 unreadable"
    assert out.splitlines()[-1] == f"10 images from {photos}; left out: {left_out}"
    assert "left out" in err and "corrupt.png" in err
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


def test_values_of_other_kinds_are_scaled_by_the_range_of_the_folder(tmp_path, capsys):
    ramp = np.linspace(0, 1, 256).reshape(16, 16)
    kinds = {"tif": [ramp, ramp * 65535, ramp - 0.5, np.where(ramp < 0.5, ramp, np.nan)],
             "tiff": [(ramp * 2**30).astype(np.int32), ((ramp - 0.5) * 9e4).astype(np.int32)],
             "png": [(ramp * 1023).astype(np.uint16), (ramp * 16383).astype(np.uint16)]}
    for ending, kind in kinds.items():
        for i, values in enumerate(kind):
            folder, most = tmp_path / f"{ending}{i}", np.nanmax(values)
            folder.mkdir()
            darker = values / 2 if values.dtype == np.float64 else values // 2
            for name, each in (("a", values), ("b", darker)):
                each = each.astype(np.float32) if each.dtype == np.float64 else each
                Image.fromarray(each).save(folder / f"{name}.{ending}")
            Image.new("L", (16, 16), 200).save(folder / "c.jpg")
            a, b, c = load_images(folder, size=16, channels=1)[:, 0].numpy().astype(float)
            low = min(np.nanmin(values), np.nanmin(darker))
            for shown, each in ((a, values), (b, darker)):
                expected = (np.nan_to_num(each.astype(float), nan=low) - low) / (most - low) * 255
                assert abs(shown - expected).max() <= 1.01, (ending, i)
            assert abs(c - 200).max() < 3 and "becomes black" in capsys.readouterr().out
    for bits, values in ((16, ramp * 60000), (8, ramp * 31), (8, ramp * 32)):
        folder = tmp_path / str(values.max())
        folder.mkdir()
        values = values.astype(np.uint16 if bits == 16 else np.uint8)
        for name in "ab":
            Image.fromarray(values).save(folder / f"{name}.png")
        assert np.array_equal(load_images(folder, size=16, channels=1)[0, 0], values >> bits - 8)
        out = capsys.readouterr().out
        assert ("65280 white" in out) == (bits == 16) and ("2 of 2 images" in out) == (values.max() == 31)
    file = load_images(tmp_path / "png0", size=16, channels=1, root=tmp_path / "root", mapped=True)
    assert torch.equal(file, load_images(tmp_path / "png0", size=16, channels=1))


def test_every_ending_that_pillow_opens_and_folders_behind_links_once(tmp_path, capsys):
    image, folder = Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)), tmp_path / "all"
    (folder / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    formats = dict(jpe="JPEG", apng="PNG", pbm="PPM", tga="TGA", jp2="JPEG2000", avif="AVIF", ico="ICO", qoi="QOI",
                   JPG="JPEG", none="PNG", mpo="MPO")
    Image.init()
    formats = {ending: name for ending, name in formats.items() if name in Image.SAVE}
    for ending, name in formats.items():
        with open(folder / "deep" / f"a.{ending}" if ending != "none" else folder / "without", "wb") as file:
            image.convert("1" if ending == "pbm" else "RGB").save(file, name)
    image.save(tmp_path / "elsewhere" / "linked.png")
    for name, to in dict(link=tmp_path / "elsewhere", again=tmp_path / "elsewhere", loop=folder).items():
        (folder / name).symlink_to(to)
    (folder / "page.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    for name in ("one.heic", "two.HEIC", "drawing.eps", *(f"x.{i}" for i in range(12))):
        (folder / name).write_bytes(b"of another kind")
    os.mkfifo(folder / "pipe.png")
    images = load_images(folder, size=16)
    assert len(images) == len(formats) + 1
    out = capsys.readouterr().out.splitlines()
    start, left_out = out[-1].split("; left out: ")
    assert start == f"{len(images)} images from {folder}" and sorted(left_out.split(", ")) == sorted(
        ["5 others", "2 .heic", "1 .eps", "1 broken links or no regular files", "1 unreadable",
         *(f"1 .{i}" for i in (0, 1, 10, 11, 2, 3, 4))])


def chunk(name, content, checksum=None):
    crc = zlib.crc32(name + content) if checksum is None else checksum
    return struct.pack(">I4s", len(content), name) + content + struct.pack(">I", crc)


def test_metadata_costs_no_picture_and_turns_it_by_its_orientation_alone(tmp_path):
    halves = np.zeros((32, 32, 3), np.uint8)
    halves[:, 16:] = 255                                    # left black, right white
    exif = Image.Exif()
    exif[0x0112] = 6                                        # to be shown turned clockwise
    jpeg, png = io.BytesIO(), io.BytesIO()
    Image.fromarray(halves).save(jpeg, "JPEG", exif=exif, quality=95)
    Image.fromarray(halves).save(png, "PNG", exif=exif)
    jpeg, png = jpeg.getvalue(), png.getvalue()
    after = len(png[:8]) + 25                               # behind IHDR
    texts = [chunk(b"iCCP", b"profile\0\7junk"), chunk(b"tEXt", b"key\0text", checksum=1),
             chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(2**21))), chunk(b"iTXt", b"key\0\1\0\0\0\xff")]
    files = {f"{i}.png": png[:after] + text + png[after:] for i, text in enumerate(texts)}
    segments = [(0xE2, b"ICC_PROFILE\0"), (0xE2, b"MPF\0MM"), (0xED, b"Photoshop 3.0\x008BIM\4\4"),
                (0xEE, b"Adobe"), (0xFE, b"comment"), (0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff")]
    for i, (marker, content) in enumerate(segments):
        segment = bytes([255, marker]) + struct.pack(">H", len(content) + 2) + content
        files[f"{i}.jpg"] = jpeg[:2] + segment + jpeg[2:]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    turned = torch.from_numpy(np.rot90(halves, -1).copy()).permute(2, 0, 1).float()
    images = load_images(tmp_path, size=32)
    assert len(images) == len(files) and (images - turned).abs().mean() < 3
    (tmp_path / "junk").mkdir()
    for name, good, bad in (("a", b"Exif\0\0MM", b"Exif\0\0??"), ("b", b"\x01\x12\0\x03", b"\x01\x12\0\x63")):
        assert good in jpeg
        (tmp_path / "junk" / f"{name}.jpg").write_bytes(jpeg.replace(good, bad))
    as_it_is = torch.from_numpy(halves).permute(2, 0, 1).float()
    assert (load_images(tmp_path / "junk", size=32) - as_it_is).abs().mean() < 3


def test_two_that_write_one_file_and_leftovers_of_a_killed_one(tmp_path):
    file, old = tmp_path / "x", tmp_path / ".y.png.0123abcd.part"
    old.write_bytes(b"of a killed run")
    os.utime(old, (0, 0))
    with replacing(file) as first:
        first.write(b"a" * 100)
        with replacing(file) as second:
            second.write(b"b" * 10)
        assert file.read_bytes() == b"b" * 10
        first.write(b"a" * 100)
    assert file.read_bytes() == b"a" * 200 and [*tmp_path.iterdir()] == [file]      # the last to end wins


def test_two_that_decode_one_folder_at_a_time(photos, tmp_path):
    alone = load_images(photos, size=16)
    with ThreadPoolExecutor(4) as pool:
        several = [pool.submit(load_images, photos, size=16, root=tmp_path / "root", mapped=True) for _ in range(8)]
        assert all(torch.equal(each.result(), alone) for each in several)
    made = [(file.name, file.stat().st_mtime_ns) for file in (tmp_path / "root" / "cache").iterdir()]
    load_images(os.path.relpath(photos), size=16, root=tmp_path / "root", mapped=True)      # is the same folder
    assert [(file.name, file.stat().st_mtime_ns) for file in (tmp_path / "root" / "cache").iterdir()] == made


def test_a_full_disk_is_said_and_leaves_the_old_file(tmp_path):
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(b"old")

    class Full(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space left .*checkpoint.pt"):
        patch.setattr("builtins.open", Full)
        with replacing(file) as sink:
            torch.save(dict(x=torch.zeros(10)), sink)
    with pytest.raises(OSError, match="^a sentence$"), replacing(file):     # of Pillow's and our own
        raise OSError("a sentence")
    assert file.read_bytes() == b"old" and [*tmp_path.iterdir()] == [file]


def test_free_memory_is_that_of_the_container(tmp_path, monkeypatch):
    free = common.free_memory()
    monkeypatch.setattr(common, "CGROUPS", [(tmp_path, "max", "current"), (tmp_path / "none", "max", "current")])
    for limit, expected in (("1000000", 1000000 - 700000 + 300000), ("max\n", free)):
        for name, text in dict(max=limit, current="700000\n").items():
            (tmp_path / name).write_text(text)
        (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 100000\nactive_file 200000\n")
        assert abs(common.free_memory() - expected) < expected / 2
    monkeypatch.setattr(common, "free_memory", lambda: 10**9)
    with pytest.raises(MemoryError):                        # before it is tried
        load_images("mnist", size=256)


def test_numbers_are_checked_and_become_pythons_own():
    @checked
    def train(lr=0.1, steps=1, digit: int = None, dataset="mnist"):
        return lr, steps, digit, dataset
    assert train() == (0.1, 1, None, "mnist")
    for settings in (train(np.float64(2), np.int64(3), None, "x"), train(2, steps=3, dataset="x")):
        assert settings == (2.0, 3, None, "x") and [type(it) for it in settings[:2]] == [float, int]
    for name, values in dict(lr=["1", None, float("nan"), float("inf"), [1]], steps=["3", None, 2.5, 0, -1, 10**30],
                             digit=["7", 7.0]).items():
        for value in values:
            with pytest.raises(ValueError, match=f"^{name} must be"):
                train(**{name: value})


def test_what_makes_no_sense_is_refused_in_one_sentence(tmp_path):
    Path("one/empty").mkdir(parents=True)
    Image.new("L", (5, 5)).save("one/a.png")
    Path("one/b.png").write_bytes(b"no picture")
    Path("loop").symlink_to("loop")
    for words, call in {
            "nowhere does not exist": dict(dataset="nowhere"), "is a file": dict(dataset="one/a.png"),
            "loop does not exist": dict(dataset="loop"), "--dataset  does not": dict(dataset=""),
            "0 images from one/empty": dict(dataset="one/empty"),
            "1 images from one; left out: 1 unreadable": dict(dataset="one", size=4),
            "--digit 3 needs a data set with classes": dict(dataset="one", digit=3),
            "--digit must be one of the classes 0 to 9": dict(digit=11), "--channels must be 1": dict(channels=2),
            "--size must be at least 1": dict(size=0)}.items():
        with pytest.raises(ValueError, match=f"^(?=.*{words}).*$"):         # "." is no new line
            load_images(**call)
    images = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    for words, args in (("--batch-size must be at least 1, not 0", (images, 0)), ("no images", (images[:0], 1))):
        with pytest.raises(ValueError, match=words):
            batches(*args)


def test_images_are_resident_if_they_take_half_of_the_free_memory_at_most(monkeypatch):
    images = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)     # 48 bytes
    for free, device in ((96, "meta"), (95, "cpu")):
        monkeypatch.setattr(common, "free_memory", lambda device: free)
        assert resident(images, "meta").device.type == device
        assert resident(images, "cpu") is images


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
        folder, first = next_image(tmp_path / f"{channels}.pt", 5)
        assert folder == tmp_path / str(channels) and first == 0            # beside the checkpoint
        save_each((images.float() / 127.5 - 1).split(2), folder)
        back = [np.asarray(Image.open(folder / f"{i:06d}.png")) for i in range(5)]
        np.testing.assert_array_equal(np.stack(back).reshape(5, 16, 16, channels).transpose(0, 3, 1, 2), images)
        for name in ("20240101", "99999999999999999999", "0000077"):        # not of these scripts
            (folder / f"{name}.png").touch()
        assert next_image(tmp_path / f"{channels}.pt", 1) == (folder, 5)
    folder = save_each([torch.full((1, 1, 4, 4), -7.0)], next_image(tmp_path, 1)[0])
    assert folder == tmp_path / "generated" and not np.asarray(Image.open(folder / "000000.png")).any()
    zeros, before = torch.zeros(1, 1, 32, 32), (folder / "000000.png").read_bytes()
    with pytest.raises(FileExistsError):                    # by another process at the same time
        save_each([zeros], folder)
    with pytest.raises(ValueError, match="nan"):
        save_each([zeros / 0], tmp_path / "new")
    assert (folder / "000000.png").read_bytes() == before and not (tmp_path / "new").exists()
    for dataset, side in dict(mnist=28, cifar10=32, photos=32).items():     # the border comes off
        assert Image.open(save_each([zeros], tmp_path / dataset, 0, dataset) / "000000.png").size == (side, side)


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
    for value in (1e30, -3e18):                             # of a run that diverges
        save_curve([dict(step=1, seconds=1.0, L_D=value)], tmp_path / "diverges")
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"L_D is {bad} at step 900"):
            save_curve([*rows, dict(step=900, seconds=5.0, L_D=bad, flat=3.0)], tmp_path)
    assert (tmp_path / "log.csv").read_text() == before


def test_devices_and_run_folders():
    assert find_device("cpu") == find_device(torch.device("cpu")) == torch.device("cpu")
    for name in ("nothing", "cuda:77"):
        with pytest.raises(ValueError, match=f"--device {name} is not on this machine"):
            find_device(name)
    for folder, out, dataset, digit in (("~no one/x", "~no one/x", "~no one/y", None),
                                        ("runs/wgan-photos", None, "path/to/photos/", None),
                                        ("runs/wgan-mnist-0", None, "mnist", 0), ("a", "a", "mnist", 0)):
        assert run_folder("wgan", argparse.Namespace(out=out, dataset=dataset, digit=digit)) == Path(folder)


def test_a_data_set_is_one_however_it_is_spelt():
    Path("photos").mkdir()
    Path("link").symlink_to("photos")
    for spelling in ("photos", "photos/", "./photos", os.path.abspath("photos"), "link", "photos/../photos"):
        settings = argparse.Namespace(out=None, dataset=spelling, digit=None)
        assert name_of(spelling) == "photos/" and run_folder("wgan", settings) == Path("runs/wgan-photos")
    assert name_of("mnist") == "mnist" and name_of("./mnist") == "mnist/"
    assert name_of(".") == Path().resolve().name + "/"


def test_a_run_folder_belongs_to_one_process_until_it_ends():
    code = ("import fcntl; lock = open('run/.run', 'a'); fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB); "
            "print('has it', flush=True); input()")
    claim(Path("run")).close()
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"has it\n"
        with pytest.raises(ValueError, match="another run is writing to run"):
            claim(Path("run"))
        other.kill()
    assert claim(Path("run")) and claim(Path("run")) and Path("run/.run").exists()
    Path("mine").mkdir()
    Path("mine/000100.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match="--out mine holds other files"):
        claim(Path("mine"))
    assert [*Path("mine").iterdir()] == [Path("mine/000100.png")]
