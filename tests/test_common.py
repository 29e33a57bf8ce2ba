"""common.py: images in, images out"""
import argparse
import gzip
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import batches, load_images, pyramid, save_animation, save_curve, save_each, save_images

DATA = common.ROOT


def idx(name):
    """The idx format, read independently of torchvision"""
    data = gzip.open(DATA / "MNIST" / "raw" / name).read()
    shape = [int.from_bytes(data[4 + 4 * i:8 + 4 * i], "big") for i in range(data[3])]
    return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


@pytest.fixture
def photos(tmp_path):
    """A folder as people have them: all colour modes, 1x1 to 4000x3000, rotated, broken, nested, not an image"""
    folder = tmp_path / "photos"
    (folder / "deep" / "deeper").mkdir(parents=True)
    rng = np.random.default_rng(0)
    color = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    color.save(folder / "rgb.png")
    color.convert("L").save(folder / "deep" / "grey.jpg")
    color.convert("RGBA").save(folder / "deep" / "deeper" / "rgba.webp")
    color.convert("P").save(folder / "palette.gif")
    color.convert("CMYK").save(folder / "cmyk.tif")
    color.convert("1").save(folder / "bits.PNG")
    Image.new("RGB", (1, 1), "red").save(folder / "dot.bmp")
    Image.new("RGB", (4000, 3000), "blue").save(folder / "large.jpg")
    Image.fromarray((np.arange(1600).reshape(40, 40) * 40).astype(np.uint16)).save(folder / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6                                        # turn by 90 degrees clockwise to see it upright
    color.save(folder / "rotated.jpg", exif=exif)
    (folder / "corrupt.png").write_bytes((folder / "rgb.png").read_bytes()[:300])
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.png").write_bytes(b"thumbnail")
    return folder


# ---- Data sets ----

def test_mnist_is_the_archives_pixels_with_a_border_of_two():
    raw, labels = idx("train-images-idx3-ubyte.gz"), idx("train-labels-idx1-ubyte.gz")
    sevens = load_images("mnist", 7)
    assert sevens.shape == (6265, 1, 32, 32) and sevens.dtype == torch.uint8
    np.testing.assert_array_equal(sevens[:, 0, 2:-2, 2:-2], raw[labels == 7])
    sevens[:, :, 2:-2, 2:-2] = 0
    assert not sevens.any()
    everything = load_images("mnist")
    assert everything.shape == (60000, 1, 32, 32)
    np.testing.assert_array_equal(everything[::1000, 0, 2:-2, 2:-2], raw[::1000])
    np.testing.assert_array_equal(load_images("mnist", 7, size=28)[:9, 0], raw[labels == 7][:9])


def test_other_sizes_are_resized_and_channels_repeated():
    base, large, small = (load_images("mnist", 3, size=size).float() for size in (32, 64, 16))
    assert large.shape[1:] == (1, 64, 64) and small.shape[1:] == (1, 16, 16)
    blocks = torch.nn.AdaptiveAvgPool2d(4)
    for other in (large, small):                            # the same picture: means of blocks agree
        assert (blocks(other[:50]) - blocks(base[:50])).abs().mean() < 1.5
    rgb = load_images("mnist", 3, channels=3)
    assert rgb.shape[1] == 3 and torch.equal(rgb[:, 0], rgb[:, 2]) and torch.equal(rgb[:, :1].float(), base)


def own_root(tmp_path):
    raw = Path("MNIST", "raw")
    shutil.copytree(DATA / raw, tmp_path / "root" / raw, ignore=shutil.ignore_patterns("*ubyte"))
    return tmp_path / "root"


@pytest.mark.parametrize("damage", [lambda data: data[:1000], lambda data: b"", lambda data: data + b"\x00",
                                    lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]])
def test_damaged_unpacked_files_are_unpacked_again(tmp_path, damage):
    root = own_root(tmp_path)
    good = load_images("mnist", 7, root=root)
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        file = root / "MNIST" / "raw" / name
        file.write_bytes(damage(file.read_bytes()))
    assert torch.equal(load_images("mnist", 7, root=root), good)


def test_a_damaged_archive_does_not_matter_beside_good_unpacked_files(tmp_path):
    root = own_root(tmp_path)
    good = load_images("mnist", 7, root=root)
    for archive in (root / "MNIST" / "raw").glob("*.gz"):
        archive.write_bytes(archive.read_bytes()[:-9])
    assert torch.equal(load_images("mnist", 7, root=root), good)


def test_without_archives_a_damaged_file_is_named(tmp_path):
    root = own_root(tmp_path)
    load_images("mnist", root=root)
    for archive in (root / "MNIST" / "raw").glob("*.gz"):
        archive.unlink()
    (root / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"short")
    with pytest.raises(OSError, match="mnist in .* is damaged: delete"):
        load_images("mnist", root=root)


@pytest.mark.parametrize("dataset, files", [("cifar10", ["cifar-10-python.tar.gz"]),
                                            ("mnist", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]),
                                            ("fashion-mnist", ["FashionMNIST/raw", "train-labels-idx1-ubyte.gz"])])
def test_without_a_network_the_files_to_fetch_by_hand_are_named(tmp_path, dataset, files):
    with pytest.raises(OSError) as error:
        load_images(dataset, root=tmp_path / "empty")
    message = str(error.value)
    assert "no network in the tests" in message and str(tmp_path / "empty") in message and "\n" not in message
    assert all(file in message for file in files)


def test_cifar10_and_fashion_mnist_by_class(monkeypatch, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)

    class Cifar:
        filename = "cifar-10-python.tar.gz"

        def __init__(self, root, train, download):
            self.data, self.targets = pixels, [i % 10 for i in range(30)]
    monkeypatch.setitem(common.DATASETS, "cifar10", (Cifar, 3))
    assert common.channels_of("cifar10") == 3
    np.testing.assert_array_equal(load_images("cifar10", 4, root=tmp_path), pixels[4::10].transpose(0, 3, 1, 2))
    assert load_images("cifar10", root=tmp_path, channels=1).shape == (30, 1, 32, 32)
    assert common.DATASETS["fashion-mnist"] == (common.datasets.FashionMNIST, 1)


# ---- Folders ----

def test_a_folder_of_everything(photos, capsys):
    images = load_images(str(photos), size=16)
    assert images.shape == (10, 3, 16, 16) and images.dtype == torch.uint8
    err = capsys.readouterr().err
    assert "corrupt.png" in err and "skipped 1 of 11" in err and len(err.splitlines()) == 2
    assert load_images(photos, size=16, channels=1).shape == (10, 1, 16, 16)
    order = "bits cmyk deep/deeper/rgba deep/grey dot large palette rgb rotated sixteen".split()
    at = dict(zip(order, images))
    assert at["dot"].flatten(1).tolist() == [[255] * 256, [0] * 256, [0] * 256]
    np.testing.assert_allclose(at["large"].float().mean((1, 2)), [0, 0, 254], atol=2)
    assert torch.equal(at["deep/grey"][0], at["deep/grey"][2])


def test_center_crop_antialias_orientation_and_transparency(tmp_path):
    folder = tmp_path / "exact"
    folder.mkdir()
    stripes = np.zeros((64, 128, 3), np.uint8)
    stripes[:, ::2] = 255                                   # every second column white: grey when antialiased
    stripes[:, :32] = stripes[:, 96:] = (255, 0, 0)         # cut off by the central square
    Image.fromarray(stripes).save(folder / "a.png")
    halves = np.zeros((32, 32, 3), np.uint8)
    halves[:, 16:] = 255                                    # left black, right white
    exif = Image.Exif()
    exif[0x0112] = 6                                        # shown: top black, bottom white
    Image.fromarray(halves).save(folder / "b.png", exif=exif)
    Image.fromarray(np.zeros((32, 32, 4), np.uint8)).save(folder / "c.png")
    Image.fromarray(np.full((32, 32), 0x8000, np.uint16)).save(folder / "d.png")
    a, b, c, d = load_images(folder, size=32)
    # bicubic ringing reaches a pixel or two in from the cut
    assert (a[:, 2:-2, 2:-2].float() - 127.5).abs().max() < 4
    assert torch.equal(b, torch.from_numpy(np.rot90(halves, -1).copy()).permute(2, 0, 1))
    assert (c == 255).all()
    assert (d == 128).all()


def test_larger_than_memory_is_one_mapped_file_made_once(photos, monkeypatch, capsys, tmp_path):
    in_memory = load_images(photos, size=16)
    monkeypatch.setattr(common, "free_memory", lambda device="cpu": 1000)
    mapped = load_images(photos, size=16, root=tmp_path / "root")
    (file,) = (tmp_path / "root" / "cache").iterdir()
    assert torch.equal(mapped, in_memory) and file.stat().st_size == 10 * 3 * 16 * 16
    if Path("/proc/self/maps").exists():
        assert str(file) in Path("/proc/self/maps").read_text()
    assert str(file) in capsys.readouterr().out
    x = next(batches(mapped, 5))
    assert x.shape == (5, 3, 16, 16)

    made = file.stat().st_mtime_ns
    assert torch.equal(load_images(photos, size=16, root=tmp_path / "root"), in_memory)
    assert file.stat().st_mtime_ns == made
    Image.new("RGB", (9, 9), "white").save(photos / "zzz.png")
    again = load_images(photos, size=16, root=tmp_path / "root")
    assert len(again) == 11 and (again[-1] == 255).all()
    assert [f.stat().st_size for f in (tmp_path / "root" / "cache").iterdir()] == [11 * 3 * 16 * 16]
    assert load_images(photos, size=8, root=tmp_path / "root").shape[-1] == 8


def test_a_mapped_file_may_be_larger_than_memory(tmp_path):
    file = tmp_path / "sparse"
    file.touch()
    os.truncate(file, 8 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    flat = common._mapped(file)
    assert len(flat) == file.stat().st_size and flat[0] == flat[-1] == 0


def test_a_link_to_nowhere_is_named_and_left_out(photos, tmp_path, capsys):
    (photos / "gone.png").symlink_to(photos / "nowhere.png")
    for mapped in (False, True):
        assert len(load_images(photos, size=8, root=tmp_path / "root", mapped=mapped)) == 10
        assert f"skipped {photos / 'gone.png'}: FileNotFoundError" in capsys.readouterr().err


def test_the_mapped_file_of_older_images_is_removed_whatever_the_folder_is_called(photos, tmp_path):
    folder = photos.rename(photos.with_name("photos [old] *"))
    load_images(folder, size=8, root=tmp_path / "root", mapped=True)
    Image.new("RGB", (9, 9)).save(folder / "new.png")
    load_images(folder, size=8, root=tmp_path / "root", mapped=True)
    assert [f.stat().st_size for f in (tmp_path / "root" / "cache").iterdir()] == [11 * 3 * 8 * 8]


def test_mapped_on_request_a_small_folder_goes_through_the_file_too(photos, tmp_path):
    mapped = load_images(photos, size=16, root=tmp_path / "root", mapped=True)
    assert torch.equal(mapped, load_images(photos, size=16))
    assert [f.suffix for f in (tmp_path / "root" / "cache").iterdir()] == [".uint8"]


@pytest.mark.parametrize("size, channels", [(4, 1), (8, 3), (64, 1), (256, 3)])
def test_pyramid_averages_2x2_pixels_and_rounds_once(size, channels):
    images = torch.randint(256, (5, channels, size, size), dtype=torch.uint8)
    levels = pyramid(images)
    assert list(levels) == [size >> k for k in range(size.bit_length() - 2)] and levels[size] is images
    for each, level in levels.items():
        k = size // each
        mean = images.numpy().reshape(5, channels, each, k, each, k).mean((3, 5))
        assert level.dtype == torch.uint8 and level.shape == (5, channels, each, each)
        np.testing.assert_array_equal(level.numpy(), np.round(mean))


def test_pyramid_in_parts_is_the_same(tmp_path):
    images = torch.randint(256, (40, 3, 512, 512), dtype=torch.uint8)       # 21 at a time
    in_memory = pyramid(images)
    images.file = tmp_path / "images.uint8"
    for whole in (in_memory, pyramid(images)):
        for i in (0, 20, 21, 39):
            for size, level in pyramid(images[i:i + 1]).items():
                assert torch.equal(level[0], whole[size][i])


def test_pyramid_of_mapped_images_is_mapped_and_made_once(photos, monkeypatch, capsys, tmp_path):
    in_memory = pyramid(load_images(photos, size=32))
    monkeypatch.setattr(common, "free_memory", lambda device="cpu": 1000)
    cache = tmp_path / "root" / "cache"
    mapped = pyramid(load_images(photos, size=32, root=tmp_path / "root"))
    (file,) = cache.glob("*.pyramid")
    assert file.stat().st_size == 10 * 3 * (16 * 16 + 8 * 8 + 4 * 4) and str(file) in capsys.readouterr().out
    assert len(list(cache.iterdir())) == 2                  # no temporary file is left
    if Path("/proc/self/maps").exists():
        assert str(file) in Path("/proc/self/maps").read_text()
    made = file.stat().st_mtime_ns
    again = pyramid(load_images(photos, size=32, root=tmp_path / "root"))
    assert file.stat().st_mtime_ns == made and "averaging" not in capsys.readouterr().out
    for size in (32, 16, 8, 4):
        assert torch.equal(mapped[size], in_memory[size]) and torch.equal(again[size], in_memory[size])
        next(batches(mapped[size], 3))

    Image.new("RGB", (40, 40), "white").save(photos / "zzz.png")           # the folder changes: all is made anew
    more = pyramid(load_images(photos, size=32, root=tmp_path / "root"))
    assert len(more[4]) == 11 and (more[4][-1] == 255).all() and len(list(cache.iterdir())) == 2


def test_a_folder_in_which_every_image_is_smaller_is_refused_on_request(photos):
    assert load_images(photos, size=4096).shape[-1] == 4096
    with pytest.raises(ValueError, match="--size 4096 is larger than every image in .*square .* 3000 pixels"):
        load_images(photos, size=4096, enlarge=False)
    assert len(load_images(photos, size=2048, enlarge=False)) == 10         # one is large enough
    shutil.rmtree(photos)
    photos.mkdir()
    for name in "ab":
        Image.new("L", (20, 16)).save(photos / f"{name}.png")
    assert len(load_images(photos, size=16, enlarge=False)) == 2            # just large enough
    with pytest.raises(ValueError, match="the largest square in them has 16 pixels"):
        load_images(photos, size=17, enlarge=False)
    for name in "ab":
        (photos / f"{name}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="holds 0 readable images"):
        load_images(photos, size=8, enlarge=False)


def test_run_folders_and_hidden_folders_inside_are_left_out(photos):
    for name in (".thumbnails", "runs/one"):
        (photos / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(photos / name / "000500.png")
    (photos / "runs" / "one" / "checkpoint.pt").write_bytes(b"")
    assert len(load_images(photos, size=8)) == 10


@pytest.mark.parametrize("call, words", [
    (dict(dataset="nowhere"), "--dataset nowhere does not exist; known data sets are mnist, fashion-mnist"),
    (dict(dataset="file.zip"), "--dataset file.zip is a file"),
    (dict(dataset="empty"), "no images in empty"),
    (dict(dataset="broken"), "broken holds 0 readable images"),
    (dict(dataset="one"), "one holds 1 readable images"),
    (dict(dataset="one", digit=3), "--digit 3 needs a data set with classes"),
    (dict(digit=11), "--digit must be one of the classes 0 to 9"),
    (dict(digit=-1), "--digit must be one of the classes 0 to 9"),
    (dict(channels=2), "--channels must be 1"),
    (dict(size=0), "--size must be at least 1"),
])
def test_what_makes_no_sense_is_refused_in_one_sentence(tmp_path, call, words):
    (tmp_path / "file.zip").write_bytes(b"PK")
    for name in ("empty", "broken", "one"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    (tmp_path / "broken" / "b.jpg").write_bytes(b"")
    Image.new("L", (5, 5)).save(tmp_path / "one" / "a.png")
    with pytest.raises(ValueError) as error:
        load_images(**call)
    assert words in str(error.value) and "\n" not in str(error.value)


# ---- Batches ----

def test_batches_are_full_uniform_with_replacement_and_exact():
    images = torch.arange(0, 256, 17).to(torch.uint8).view(16, 1, 1, 1).expand(-1, 3, 4, 4)      # 0, 17, ..., 255
    torch.manual_seed(0)
    P_r = batches(images, 100)
    x = torch.cat([next(P_r) for _ in range(160)])
    assert x.shape == (16000, 3, 4, 4) and x.dtype == torch.float32
    assert x.min() == -1 and x.max() == 1
    counts = torch.bincount(((x[:, 0, 0, 0] + 1) * 127.5 / 17).round().long())
    assert len(counts) == 16 and ((counts - 1000).abs() < 5 * 1000**0.5).all()
    first = x[:, 0, 0, 0].view(-1, 100)[:, :16]             # without replacement these 16 would always differ
    assert max(len(part.unique()) for part in first) < 16
    assert next(batches(images, 5)).shape[0] == 5 and next(batches(images[:2], 64)).shape[0] == 64


def test_batches_depend_on_the_random_state_alone():
    images = torch.randint(0, 256, (50, 1, 4, 4), dtype=torch.uint8)
    first = batches(images, 8)
    next(first)
    state = torch.get_rng_state()
    a = next(first)
    torch.set_rng_state(state)
    assert torch.equal(next(batches(images, 8)), a)


@pytest.mark.parametrize("m", [0, -3])
def test_batch_size_must_be_positive(m):
    with pytest.raises(ValueError, match=f"--batch-size must be at least 1, not {m}"):
        batches(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), m)


# ---- Images out ----

def test_what_goes_out_is_what_came_in(tmp_path):
    for channels in (1, 3):
        images = torch.randint(0, 256, (5, channels, 16, 16), dtype=torch.uint8)
        folder = save_each((images.float() / 127.5 - 1).split(2), 4, tmp_path / f"{channels}.pt")
        assert folder == tmp_path / str(channels)           # beside the file of a checkpoint
        back = [np.asarray(Image.open(folder / f"{i:06d}.png")) for i in range(4)]
        np.testing.assert_array_equal(np.stack(back).reshape(4, 16, 16, channels).transpose(0, 3, 1, 2), images[:4])
        assert len(list(folder.iterdir())) == 4
    folder = save_each([torch.full((1, 1, 4, 4), -7.0)], 1, tmp_path)
    assert folder == tmp_path / "generated" and not np.asarray(Image.open(folder / "000000.png")).any()
    with pytest.raises(FileExistsError, match="generated is there already"):
        save_each([torch.zeros(1, 1, 4, 4)], 1, tmp_path)
    with pytest.raises(ValueError, match="--generate must be at least 1, not 0"):
        save_each([], 0, tmp_path / "new.pt")
    with pytest.raises(ValueError, match="nan"):
        save_each([torch.full((1, 1, 4, 4), float("nan"))], 1, tmp_path / "new.pt")


@pytest.mark.parametrize("dataset, size, saved", [("mnist", 32, 28), ("fashion-mnist", 32, 28), ("mnist", 64, 64),
                                                  ("cifar10", 32, 32), ("photos", 32, 32)])
def test_the_border_of_the_28_pixel_sets_comes_off(tmp_path, dataset, size, saved):
    save_each([torch.zeros(1, 1, size, size)], 1, tmp_path, dataset)
    assert Image.open(tmp_path / "generated" / "000000.png").size == (saved, saved)


@pytest.mark.parametrize("n, size, across", [(64, 32, 8), (1, 32, 1), (10, 16, 3), (64, 256, 8), (64, 1024, 2),
                                             (4, 4096, 1)])
def test_a_grid_is_square_and_fits_2048_pixels(tmp_path, n, size, across):
    save_images(torch.zeros(1, 1, 1, 1).expand(n, 1, size, size), tmp_path / "new" / "grid.png")
    assert Image.open(tmp_path / "new" / "grid.png").size == (across * size, across * size)


def test_a_grid_goes_row_by_row(tmp_path):
    x = torch.linspace(-1, 1, 9).view(9, 1, 1, 1).expand(9, 3, 2, 2)
    save_images(x, tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    np.testing.assert_array_equal(grid[::2, ::2, 0].ravel(), ((x[:, 0, 0, 0] + 1) * 127.5).round())


def test_pictures_are_never_half_written(tmp_path, monkeypatch):
    save_images(torch.zeros(1, 1, 4, 4), tmp_path / "grid.png")
    before = (tmp_path / "grid.png").read_bytes()

    def killed(self, file, **_):
        file.write(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(Image.Image, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        save_images(torch.ones(1, 1, 4, 4), tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_an_animation_has_at_most_100_frames_of_one_size_at_most_512_wide(tmp_path):
    save_animation(tmp_path)
    assert not list(tmp_path.iterdir())
    Image.new("L", (8, 8)).save(tmp_path / "real.png")      # no picture of a step
    for i in range(160):
        Image.new("L", (8, 8) if i < 10 else (1024, 1024), i).save(tmp_path / f"{900_000 + 1000 * i:06d}.png")
    save_animation(tmp_path)
    with Image.open(tmp_path / "training.gif") as gif:
        assert gif.n_frames == 100 and gif.size == (512, 512) and gif.info["loop"] == 0
        gif.seek(99)                                        # the last step, of seven digits, comes last
        assert abs(gif.convert("L").getpixel((0, 0)) - 159) <= 1


def test_a_curve_of_every_column_and_the_same_numbers_as_a_table(tmp_path):
    rows = [dict(step=100 * i, seconds=0.5 * i, L_D=-float(i), flat=3.0) for i in range(1, 9)]
    save_curve(rows, tmp_path)
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.size == (640, 360)                   # one panel each
        upper, lower = (np.asarray(picture.convert("RGB"))[top:top + 180].astype(int) for top in (0, 180))
    blue = [np.argwhere((abs(panel - (31, 78, 121)) < 9).all(2)) for panel in (upper, lower)]
    assert np.corrcoef(blue[0].T)[0, 1] > 0.99              # falls: rows of pixels count from the top
    assert blue[1][:, 0].max() - blue[1][:, 0].min() <= 2
    assert (tmp_path / "log.csv").read_text().splitlines()[:2] == ["step,seconds,L_D,flat", "100,0.5,-1.0,3.0"]
    before = (tmp_path / "log.csv").read_bytes()
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"L_D is {bad} at step 900"):
            save_curve([*rows, dict(step=900, seconds=5.0, L_D=bad, flat=3.0)], tmp_path)
    assert (tmp_path / "log.csv").read_bytes() == before
    save_curve(rows[:1], tmp_path)


def test_devices_and_run_folders(monkeypatch):
    assert common.find_device("cpu") == common.find_device(torch.device("cpu")) == torch.device("cpu")
    for name in ("nothing", "meta", "cuda:77"):
        with pytest.raises(ValueError, match=f"--device {name} is not on this machine"):
            common.find_device(name)
    settings = argparse.Namespace(out=None, dataset="path/to/photos/", digit=None)
    assert common.run_folder("wgan", settings) == Path("runs/wgan-photos")
    settings.dataset, settings.digit = "mnist", 0
    assert common.run_folder("wgan", settings) == Path("runs/wgan-mnist-0")
    settings.out = "~/here"
    assert common.run_folder("wgan", settings) == Path("~/here").expanduser()
    with pytest.raises(ValueError, match="--record records CUDA steps"):
        batches(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), 2, "cpu", resident=True)
