"""Images in, images out: what the five scripts share, and nothing of what the papers say.

    load_images     a data set by name, or a folder of your own images, as one uint8 tensor
    load_labels     the classes of a data set's images
    each_image      the images of a folder one by one, each as large as it is
    pyramid         these images at every lower resolution, too
    batches         x ~ P_r: endless random batches of it, in [-1, 1], on the device
    save_images     a grid as one PNG;  save_each: every image as its own
    save_animation  a GIF of a run's grids;  save_curve: its numbers as curves, and as a table

The rest is what surrounds a run: its settings, device, folder and checkpoint, signals, and errors in one sentence.

Errors are ValueError or OSError, one sentence that names the file or flag and says what to do.
"""
import contextlib
import errno
import functools
import glob
import gzip
import hashlib
import http.client
import inspect
import io
import itertools
import math
import os
import pickle
import re
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import uuid
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral, Real
from pathlib import Path

try:
    import fcntl
except ImportError:                                         # not on Windows
    fcntl = None

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.functional import avg_pool2d
from torchvision import datasets
from torchvision.transforms import functional as TF
from torchvision.utils import make_grid

ROOT = Path(__file__).resolve().parent / "data"
DATASETS = {  # name: torchvision's class, channels
    "mnist": (datasets.MNIST, 1),
    "fashion-mnist": (datasets.FashionMNIST, 1),
    "cifar10": (datasets.CIFAR10, 3),
}
# Whatever Pillow or torch raise for a file that is not what it claims to be; but see _out_of_memory
DAMAGED = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, EOFError,
           RuntimeError, struct.error, zlib.error, Image.DecompressionBombError, pickle.UnpicklingError)


# ---- Images in ---------------------------------------------------------------------------------------------------

def channels_of(dataset, channels=None):
    """channels; if that is None, 1 for the grey data sets, 3 for the others and for every folder.  ValueError for
    any other number"""
    if channels not in (None, 1, 3):
        raise ValueError(f"--channels must be 1 (grey) or 3 (RGB), not {channels}")
    return channels or DATASETS.get(dataset, (None, 3))[1]


def find_device(name):
    """Where images are to go: "auto" (CUDA, else the CPU), or what torch.device takes -> torch.device.
    ValueError if it is not on this machine"""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    rank = os.environ.get("LOCAL_RANK", 0)                      # of torchrun: each process has a GPU of its own
    try:
        probe = torch.ones(1, device=f"cuda:{rank}" if str(name) == "cuda" else name)
        probe.item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"--device {name} is not on this machine ({reason}): use --device cpu") from error
    if probe.is_cuda:
        torch.cuda.set_device(probe.device)
        torch.backends.cudnn.benchmark = True
    return probe.device


def load_images(dataset="mnist", digit=None, size=32, root=None, channels=None, enlarge=True, mapped=False,
                train=True):
    """All images of a part of a data set, or of a folder: uint8, (N, channels, size, size)

    dataset   "mnist", "fashion-mnist", "cifar10", or the path of a folder: any depth, through links, too, but
              without hidden and run folders
    digit     0..9: only this class;  None: all.  Folders have no classes
    size      pixels. The 28x28 sets get a border of 2 pixels (size 28: none); other sizes are resized, antialiased.
              Images of a folder: EXIF orientation applied, transparency on white, centre cropped to a square
    root      where data sets are kept (None: data/ beside this file); MNIST is there, the others are downloaded
    channels  1 (grey) or 3 (RGB);  None: as the data set, 3 for a folder
    enlarge   False: ValueError for a folder in which every image is smaller than size
    mapped    True: a folder goes through the file below even if it is small, so that processes can share it
    train     the data set's training part;  False: its test part

    Prints how many images there are, and what was left out of a folder. Values of 8 and of true 16 bits keep their
    scale; of all others (floating point, 32 bits, 10 to 14 of 16 bits) the folder's range becomes black to white.
    A folder that does not fit into half of the free memory is decoded once into a file under root; the tensor is a
    view of it.  ValueError (the request makes no sense), OSError (a file or the download failed), MemoryError.
    """
    root, channels = Path(os.path.expanduser(root or ROOT)), channels_of(dataset, channels)
    if size < 1:
        raise ValueError(f"--size must be at least 1, not {size}")
    if dataset in DATASETS:
        images = _from_set(dataset, digit, size, root, channels, train)
        _say(f"{len(images):,} images from {dataset}")
        return images
    folder = Path(os.path.expanduser(dataset))
    if not os.path.isdir(os.path.expanduser(dataset)):      # Path makes "." of ""
        what = "is a file: unpack it and give the folder" if folder.is_file() else "does not exist"
        raise ValueError(f"--dataset {dataset} {what}; known data sets are {', '.join(DATASETS)}, and any folder")
    if digit is not None:
        raise ValueError(f"--digit {digit} needs a data set with classes ({', '.join(DATASETS)}), and a folder has "
                         f"none: leave --digit out, or point --dataset at the folder of one class")
    return _from_folder(folder, size, root, channels, enlarge, mapped)


def load_labels(dataset="mnist", digit=None, root=None, train=True):
    """The classes, 0..9, of the images that load_images gives for the same data set, in their order: int64, (N,).
    ValueError for a folder, which has none;  OSError: the file or the download failed"""
    if dataset not in DATASETS:
        raise ValueError(f"--dataset {dataset} has no labels; those that have are {', '.join(DATASETS)}")
    _, labels = read_set(dataset, Path(os.path.expanduser(root or ROOT)), train)
    if digit is not None:
        labels = labels[labels == digit]
    return labels.long()


def _say(line):
    """Prints it, under torchrun by the first process alone"""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


# Data sets by name

def read_set(dataset, root=ROOT, train=True):
    """The training or test part of a data set as it is, from the archives as they are downloaded: uint8
    (N, C, side, side), and the classes, (N,).  OSError: the file or the download failed"""
    kind, _ = DATASETS[dataset]
    images, labels = [], []
    if dataset == "cifar10":
        with tarfile.open(_archive(Path(root, kind.filename), kind.tgz_md5, kind.url)) as tar:
            for name, _ in kind.train_list if train else kind.test_list:
                part = pickle.load(tar.extractfile(f"{kind.base_folder}/{name}"), encoding="latin1")
                images.append(part["data"])
                labels += part["labels"]
        return torch.from_numpy(np.concatenate(images)).view(-1, 3, 32, 32), torch.tensor(labels)
    for name, md5 in kind.resources[:2] if train else kind.resources[2:]:
        file = _archive(Path(root, kind.__name__, "raw", name), md5, *(mirror + name for mirror in kind.mirrors))
        images.append(torch.frombuffer(bytearray(gzip.decompress(file.read_bytes())), dtype=torch.uint8))
    images, labels = images
    return images[16:].view(-1, 1, 28, 28), labels[8:]      # after some numbers of 4 bytes


def _archive(file, md5, *urls):
    """The file, which is read as it is; if it is missing or damaged it is downloaded, whole or not at all"""
    if datasets.utils.check_integrity(file, md5):
        return file
    for url in urls:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=file.parent) as new:
                datasets.utils.download_url(url, new, file.name, md5)
                os.replace(Path(new, file.name), file)
            return file
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
    what = "damaged" if file.exists() else "missing"
    raise OSError(f"{file} is {what} and could not be downloaded ({reason}): put a good one there by hand, or name "
                  f"another folder with --root")


def _from_set(dataset, digit, size, root, channels, train):
    if digit is not None and not 0 <= digit <= 9:
        raise ValueError(f"--digit must be one of the classes 0 to 9 of {dataset}, not {digit}")
    images, labels = read_set(dataset, root, train)
    if digit is not None:
        images = images[labels == digit]
    if images.shape[-1] == 28 and size != 28:
        images = TF.pad(images, 2)
    if images.shape[1:] == (channels, size, size):
        return images
    if len(images) * channels * size * size > free_memory():
        raise MemoryError
    result, shown = torch.empty(len(images), channels, size, size, dtype=torch.uint8), time.monotonic()
    for start in range(0, len(images), 1000):
        some = images[start:start + 1000]
        if some.shape[1] > channels:
            some = TF.rgb_to_grayscale(some)
        if some.shape[-1] != size:
            some = TF.resize(some, [size, size], antialias=True)
        result[start:start + 1000] = some                   # grey becomes RGB by copying
        if time.monotonic() - shown > 5:
            shown = time.monotonic()
            _say(f"{start:,} of {len(images):,} images resized")
    return result


# Folders

def _from_folder(folder, size, root, channels, enlarge, mapped):
    paths, left_out = _files(folder)
    if not enlarge and paths and not any(_side(path) >= size for path in paths):
        largest = max(map(_side, paths))
        if largest:                                         # else none can be read, which is said below
            raise ValueError(f"--size {size} is larger than every image in {folder}: the largest square in them "
                             f"has {largest} pixels, and --size can be at most that")

    if not mapped and len(paths) * channels * size * size <= free_memory() / 2:
        images, n = torch.empty(len(paths), channels, size, size, dtype=torch.uint8), 0
        for start, part in _decoded(paths, size, channels):
            images[start:start + len(part)] = part
            n = max(n, start + len(part))
        images = images[:n]
    else:
        file = _decoded_file(folder, paths, size, root, channels)
        images = _mapped(file).view(-1, channels, size, size)
        images.file = file                                  # where pyramid puts its own beside
    left_out["unreadable"] = len(paths) - len(images)
    left_out = ", ".join(f"{n:,} {what}" for what, n in left_out.most_common() if n)
    line = f"{len(images):,} images from {folder}"
    if left_out:
        line += f"; left out: {left_out}"
    if len(images) < 2:
        raise ValueError(f"{line}; training needs at least two")
    _say(line)
    return images


def each_image(folder):
    """The images of a folder, any depth, one by one, upright, transparency on white, each as large as it is: path
    in the folder, uint8 (3, H, W).  Names those that cannot be read.  ValueError if there is none"""
    paths, _ = _files(Path(os.path.expanduser(folder)))
    if not paths:
        raise ValueError(f"there are no images in {folder}")
    for path in paths:
        image = _read(path, None, 3)
        if isinstance(image, tuple):
            mode, low, high = image
            image = _read(path, None, 3, {mode: _black_and_white(mode, low, high)})
        if isinstance(image, Exception):
            _left_out(path, image)
        else:
            yield path.relative_to(os.path.expanduser(folder)), image


def _left_out(path, error):
    print(f"left out {path}: {type(error).__name__}: {error}", file=sys.stderr)


def _is_a_run(folder):
    return any(os.path.exists(os.path.join(folder, name)) for name in (".run", "checkpoint.pt"))


@functools.cache
def _formats():
    """Those of Pillow's formats that it decodes itself, and their endings: no EPS, which it gives to Ghostscript"""
    endings = Image.registered_extensions()                 # finds out what there is
    formats = [name for name in Image.OPEN if name not in ("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF")]
    return formats, {ending for ending, name in endings.items() if name in [*formats, "MPO"]}


def _files(folder):
    """The images in a folder in the order of their paths, and what is left out, counted by reasons"""
    paths, left_out, seen = [], Counter(), set()
    for place, folders, files in os.walk(folder, followlinks=True,
                                         onerror=lambda _: left_out.update(["unreadable folders"])):
        real = os.path.realpath(place)                      # by links a folder can be met twice, or hold itself
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in sorted(folders):
            # Hidden folders hold thumbnails and the like; a run folder holds pictures made by these scripts.
            a_run = _is_a_run(os.path.join(place, name))
            left_out["run folders"] += a_run
            if a_run or name.startswith((".", "__")):
                folders.remove(name)
        folders.sort()
        for path in (Path(place, name) for name in sorted(files) if name[0] != "."):
            ending = path.suffix.lower()
            if not path.is_file():
                left_out["broken links or no regular files"] += 1       # a pipe would be waited for
            elif ending and ending not in _formats()[1]:
                left_out[ending] += 1
            else:
                paths.append(path)
    endings = [what for what, _ in left_out.most_common() if what[0] == "."]
    for ending in endings[9:]:
        left_out["others"] += left_out.pop(ending)
    return sorted(paths), left_out


def _decoded_file(folder, paths, size, root, channels):
    """The file with the decoded images, which is made if it is not there or the folder has changed"""
    real = Path(os.path.realpath(folder))
    states = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    where, stamp = (hashlib.sha256(repr(it).encode()).hexdigest()[:12] for it in (real, states))
    name = f"{real.name[:40]}-{where}-{size}x{size}x{channels}"
    file = root / "cache" / f"{name}-{stamp}.uint8"
    if not file.exists():
        for old in file.parent.glob(f"{glob.escape(name)}-*"):
            with contextlib.suppress(OSError):              # another run may use it
                old.unlink()
        _say(f"decoding {len(paths):,} images once into {file}")
        with replacing(file) as sink:
            for start, images in _decoded(paths, size, channels):
                sink.seek(start * images[0].numel())
                sink.write(images.numpy())
    _say(f"reading the images of {folder} from {file}")
    return file


def _mapped(file):
    """The bytes of a file as a tensor, to be read only: they are fetched when they are used, and take no memory"""
    if not file.stat().st_size:
        return torch.empty(0, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                     # that it cannot be written to
        return torch.from_numpy(np.memmap(file, np.uint8, "r"))


def pyramid(images):
    """Images at every resolution down to 4x4, each the average of 2x2 pixels of the next, rounded once.
    uint8 (N, C, size, size), as from load_images, size a power of two -> {size: images, size / 2: ..., 4: ...}

    If the images are a view of a file, so are the others: it is made once, beside the first.
    """
    n, channels, size, _ = images.shape
    sizes = [size >> k for k in range(1, size.bit_length() - 2)]
    numbers = [n * channels * each * each for each in sizes]

    def levels(flat):
        return {each: part.view(n, channels, each, each) for each, part in zip(sizes, flat.split(numbers))}

    def averages():
        some = max(1, 2**24 // images[0].numel())           # 64 MiB as floats
        for start in range(0, n, some):
            x = images[start:start + some].float()
            for each in sizes:
                x = avg_pool2d(x, 2)
                yield each, start, x.round().to(torch.uint8)
    file = getattr(images, "file", None)
    if file is None or not sizes:
        lower = levels(torch.empty(sum(numbers), dtype=torch.uint8))
        for each, start, part in averages():
            lower[each][start:start + len(part)] = part
        return {size: images, **lower}
    below = file.with_suffix(".pyramid")
    if not below.exists():
        _say(f"averaging {n:,} images once into {below}")
        begin = dict(zip(sizes, itertools.accumulate(numbers, initial=0)))
        with replacing(below) as sink:
            for each, start, part in averages():
                sink.seek(begin[each] + start * part[0].numel())
                sink.write(part.numpy())
    return {size: images, **levels(_mapped(below))}


def _decoded(paths, size, channels):
    """The images, some hundreds at a time, each time with the number of the first; names the unreadable ones

    Images whose values are not of 8 bits come at the end, one by one: only then their range is known.
    """
    deep, ranges, n, dull, shown = [], {}, 0, 0, time.monotonic()
    some = max(8, min(256, 2**26 // (channels * size * size)))          # 64 MiB
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:       # Pillow decodes without Python's lock
        for start in range(0, len(paths), some):
            images, part = [], paths[start:start + some]
            for path, image in zip(part, pool.map(lambda path: _read(path, size, channels), part)):
                if isinstance(image, Exception):
                    _left_out(path, image)
                    continue
                if isinstance(image, tuple):
                    mode, *values = image
                    values += ranges.get(mode, values)
                    ranges[mode] = min(values), max(values)
                    deep.append((n + len(images), path))
                    image = torch.zeros(channels, size, size, dtype=torch.uint8)
                else:
                    dull += _is_dull(image)
                images.append(image)
            if images:
                yield n, torch.stack(images)
                n += len(images)
            if time.monotonic() - shown > 5:
                shown = time.monotonic()
                _say(f"{start + len(part):,} of {len(paths):,} images decoded")
    for mode, (least, most) in ranges.items():
        ranges[mode] = black, white = _black_and_white(mode, least, most)
        _say(f"of the values of mode {mode}, {least:g} to {most:g}, {black:g} becomes black and {white:g} white")
    for place, path in deep:
        image = _read(path, size, channels, ranges)
        if isinstance(image, Exception):
            raise OSError(f"{path} has changed while it was read: {image}")
        dull += _is_dull(image)
        yield place, image[None]
    if dull:
        _say(f"{dull:,} of {n:,} images show hardly anything: their values differ by less than 32 of 255")


def _black_and_white(mode, least, most):
    if mode != "F" and least >= 0 and 2**14 <= most < 2**16:
        return 0, 255 << 8                                  # true 16 bits: the upper 8 of them
    return least, most


def _is_dull(image):
    return image.max().item() - image.min().item() < 32


def _side(path):
    """The side in pixels of the largest square in an image, 0 if it cannot be read"""
    with contextlib.suppress(*DAMAGED), Image.open(path, formats=_formats()[0]) as image:
        return min(image.size)
    with contextlib.suppress(*DAMAGED):
        return min(_opened(path).size)
    return 0


TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
         7: "TRANSVERSE", 8: "ROTATE_90"}                   # by EXIF's orientation


def _read(path, size, channels, ranges=None):
    """One image file as uint8 (channels, size, size), or, without size, as large as it is; or the exception that
    reading it raised; or, if its values are of other kinds than 8 bits and their ranges, {mode: (low, high)}, are
    not known yet: mode, low, high"""
    try:
        image = _opened(path)
        if image.mode == "F" or image.mode.startswith("I"):
            values = np.asarray(image)
            finite = values[np.isfinite(values)]
            if not finite.size:
                raise ValueError("no value is finite")
            if not ranges:
                return image.mode, finite.min().item(), finite.max().item()
            low, high = ranges[image.mode]
            values = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low) - low
            values *= 255 / (high - low or 1)
            image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
        if image.mode.endswith(("A", "a")) or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        mode = "L" if channels == 1 else "RGB"
        if image.mode != mode:
            image = image.convert(mode)
        if size:
            image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).view(*image.size[::-1], channels).permute(2, 0, 1).contiguous()
    except DAMAGED as error:
        if _out_of_memory(error):
            raise MemoryError from error
        return error


def _opened(path):
    """A Pillow image, decoded and turned upright; if that fails, from the file without what is not pixels"""
    with open(path, "rb") as file:
        try:
            return _upright(file)
        except DAMAGED as error:
            file.seek(0)
            with contextlib.suppress(*DAMAGED):
                return _upright(io.BytesIO(_without_metadata(file.read())))
            raise error


def _upright(file):
    image, turn = Image.open(file, formats=_formats()[0]), None
    image.load()
    with contextlib.suppress(*DAMAGED):                     # whatever else EXIF holds
        turn = TURNS.get(image.getexif().get(0x0112))
    return image.transpose(Image.Transpose[turn]) if turn else image


def _without_metadata(data):
    """A PNG or JPEG file without text, colour profile and the like, but with its orientation; of others nothing"""
    kept, at = [], 8
    if data.startswith(b"\x89PNG"):
        while at < len(data):                               # length, name, content, checksum
            length, name = struct.unpack_from(">I4s", data, at)
            chunk = data[at:at + length + 12]
            sound = len(chunk) == length + 12 and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
            if name in (b"IHDR", b"PLTE", b"IDAT", b"IEND") or name in (b"tRNS", b"eXIf") and sound:
                kept.append(chunk)
            at += len(chunk)
        return b"".join([data[:8], *kept])
    if data.startswith(b"\xff\xd8"):
        at = 2
        while data[at:at + 1] == b"\xff" and data[at + 1] != 0xDA:      # 0xFF, name, length, content
            name, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2:at + 4], "big")
            exif = name == 0xE1 and data[at + 4:at + 8] == b"Exif"
            adobe = name == 0xEE and end - at > 15          # says which colours these are
            if exif or adobe or not 0xE0 <= name <= 0xEF and name != 0xFE:
                kept.append(data[at:end])
            at = end
        return b"".join([data[:2], *kept, data[at:]])
    return b""


CGROUPS = [("/sys/fs/cgroup", "memory.max", "memory.current"),
           ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes")]


def free_memory(device="cpu"):
    """Bytes that a program may still take on the device"""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [8 << 30]                                        # not Linux, and the standard library does not tell
    with contextlib.suppress(OSError), open("/proc/meminfo") as lines:
        free = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")] or free
    for folder, limit, used in CGROUPS:                     # a container may have less than the machine
        with contextlib.suppress(OSError, ValueError, KeyError):        # no such file, or "max"
            limit, used = (int(Path(folder, name).read_text()) for name in (limit, used))
            stat = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())
            free.append(limit - used + int(stat["inactive_file"]) + int(stat["active_file"]))
    return min(free)


def resident(images, device):
    """The images, in the device's memory if they take at most half of what is free there"""
    fits = torch.device(device).type == "cpu" or images.nbytes <= free_memory(device) / 2
    return images.to(device) if fits else images


def batches(images, m, device="cpu"):
    """x ~ P_r: an endless iterator over batches (m, C, H, W), float32 in [-1, 1], on the device

    images  uint8, (N, C, H, W), as from load_images
    m       images per batch, drawn uniformly with replacement: every batch is full, whatever N is

    Images that fit (resident) are kept in the device's memory, and a batch is one index there; others stay where
    they are, and each batch is copied. Raises ValueError if m < 1, or without images.
    """
    if m < 1:
        raise ValueError(f"--batch-size must be at least 1, not {m}")
    if len(images) < 1:
        raise ValueError("there are no images to draw from")
    device, images = torch.device(device), resident(images, device)

    def draw():
        while True:
            x = images[torch.randint(len(images), (m,), device=images.device)]
            if device.type == "cuda" and not x.is_cuda:
                x = x.pin_memory()
            yield x.to(device, non_blocking=True).float() / 127.5 - 1
    return draw()


# ---- Images out --------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def replacing(path):
    """with replacing(path) as file: the bytes written to file become path at the end, all of them or none. Several
    may do so at the same time: the last one to end wins"""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(".*.????????.part"):       # by a killed process
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 86400:
                left.unlink()
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__     # torch.save hides a full disk there
        if isinstance(cause, OSError) and cause.errno and cause.filename is None:
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise
    finally:
        part.unlink(missing_ok=True)


def _picture(x):
    """(C, H, W) in [-1, 1] -> a Pillow image; the inverse of what batches does.  ValueError if it is not finite"""
    if not x.isfinite().all():
        raise ValueError("an image is nan; what was saved before is kept: try a smaller --lr, another --out")
    pixels = ((x.detach().float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    return Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous().numpy())


def save_images(x, path):
    """One PNG of x, (n, C, H, W) in [-1, 1], row by row: the largest square of them that fits 2048 pixels"""
    rows = max(1, min(2048 // x.shape[-1], int(len(x) ** 0.5)))
    grid = make_grid(x[:rows * rows], nrow=rows, padding=0)
    with replacing(path) as file:
        _picture(grid[:x.shape[1]]).save(file, format="PNG")   # make_grid makes three channels of one


def next_image(path, n):
    """Where n more generated images go, and the number of the first of them: the folder PATH/generated, or, if PATH
    is the file of a checkpoint, PATH without its ending; images that are there, 000000.png, ..., are counted on
    from.  ValueError if n < 1"""
    if n < 1:
        raise ValueError(f"--generate must be at least 1, not {n}")
    folder = Path(path, "generated") if Path(path).is_dir() else Path(path).with_suffix("")
    numbers = [int(file.stem) for file in folder.glob("*.png") if re.fullmatch("[0-9]{6}|[1-9][0-9]{6}", file.stem)]
    return folder, max(numbers, default=-1) + 1


def save_each(batches, folder, first=0, dataset=None):
    """The images of batches, (m, C, H, W) in [-1, 1], as PNGs in a folder, from number first on; none is replaced.
    The border that load_images gave the 28x28 sets at size 32 is taken off.  Prints and returns the folder"""
    n = first
    for image in (image for x in batches for image in x):
        if channels_of(dataset) == 1 and image.shape[-1] == 32:
            image = image[..., 2:-2, 2:-2]
        data = io.BytesIO()
        _picture(image).save(data, format="PNG")
        folder.mkdir(exist_ok=True)
        with open(folder / f"{n:06d}.png", "xb") as file:
            file.write(data.getvalue())                     # at once: nothing half written will be counted on from
        n += 1
    line = f"{n - first:,} images in {folder}"
    if first:
        line += f", from {first:06d}.png on"
    _say(line)
    return folder


def save_animation(folder):
    """training.gif in a run's folder: its pictures 000100.png, ..., at most 100 of them, evenly spread, at most 512
    pixels wide, of one size. Without any there is no GIF"""
    paths = [path for path in Path(folder).glob("*.png") if path.stem.isdecimal()]
    paths.sort(key=lambda path: int(path.stem))
    if not paths:
        return
    paths = [paths[round(i)] for i in np.linspace(0, len(paths) - 1, min(len(paths), 100))]
    with Image.open(paths[-1]) as last:
        shrink = max(1, last.width / 512)
        size = round(last.width / shrink), round(last.height / shrink)
    frames = []
    for each in paths:
        with Image.open(each) as image:
            method = Image.Resampling.NEAREST if image.width < size[0] else Image.Resampling.BOX
            frames.append(image.resize(size, method))
    with replacing(Path(folder, "training.gif")) as file:
        frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:], loop=0,
                       duration=[100] * (len(frames) - 1) + [2000])


def save_curve(rows, folder):
    """curve.png: every column of rows over the first, one panel each, and the same numbers as log.csv

    rows  one dict for each point, all with the same keys: step, seconds, ...  ValueError if a number is not finite
    """
    for name, value in rows[-1].items():
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value} at step {rows[-1]['step']}; what was saved before is kept: try a "
                             f"smaller --lr with another --out")
    names = [name for name in rows[0] if name not in ("step", "seconds", "images")]
    picture = Image.new("RGB", (640, 180 * len(names)), "white")
    for i, name in enumerate(names):
        _panel(picture, 180 * i, name, [row["step"] for row in rows], [row[name] for row in rows])
    with replacing(Path(folder, "curve.png")) as file:
        picture.save(file, format="PNG")
    with replacing(Path(folder, "log.csv")) as file:
        for row in [rows[0].keys(), *(row.values() for row in rows)]:
            file.write((",".join(map(str, row)) + "\n").encode())


def _panel(picture, top, name, xs, ys):
    """A curve with axes and numbers on the 180 rows of pixels from top"""
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default()
    left, right, upper, lower = 70, picture.width - 20, top + 24, top + 154
    (x0, x1), (y0, y1) = ((min(each), max(each)) for each in ((0, *xs), ys))
    if y0 == y1:
        y0, y1 = y0 - max(1, abs(y0)), y1 + max(1, abs(y1))

    def at(x, y):
        return left + (x - x0) / (x1 - x0) * (right - left), lower - (y - y0) / (y1 - y0) * (lower - upper)
    draw.text((left, top + 6), name, "black", font)
    for x in _ticks(x0, x1):
        draw.line([at(x, y0), at(x, y1)], "#dddddd")
        draw.text((at(x, y0)[0], lower + 4), f"{x:g}", "black", font, anchor="ma")
    for y in _ticks(y0, y1):
        draw.line([at(x0, y), at(x1, y)], "#dddddd")
        draw.text((left - 6, at(x0, y)[1]), f"{y:.6g}", "black", font, anchor="rm")
    draw.rectangle([left, upper, right, lower], outline="black")
    draw.line([at(x, y) for x, y in zip(xs, ys)], "#1f4e79", 2)


def _ticks(low, high):
    """Some round numbers from low to high"""
    size = 10.0 ** math.floor(math.log10((high - low) / 2))
    size = next(size * k for k in (1, 2, 5, 10) if (high - low) / (size * k) <= 6)
    return [k * size for k in range(math.ceil(low / size), math.floor(high / size) + 1)]


# ---- What surrounds a run ----------------------------------------------------------------------------------------

def checked(train):
    """@checked def train(...): numbers reach it as Python's own, int or float, whatever kind they were.  ValueError
    for what is no number where one is meant, and below 1 where something is counted"""
    signature = inspect.signature(train)

    @functools.wraps(train)
    def with_numbers(*values, **settings):
        settings = signature.bind(*values, **settings).arguments
        for name, value in settings.items():
            setting = signature.parameters[name]
            default = setting.default
            kind = setting.annotation if default is None else type(default)
            if kind not in (int, float) or value is None and default is None:
                continue
            meant, limit = (Integral, 2**63) if kind is int else (Real, math.inf)
            if not isinstance(value, meant) or not abs(value) < limit:      # which refuses nan, too
                raise ValueError(f"{name} must be a number ({kind.__name__}), not {value!r}")
            if kind is int and value < 1 and name not in ("digit", "seed"):
                raise ValueError(f"{name} must be at least 1, not {value}")
            settings[name] = kind(value)
        return train(**settings)
    return with_numbers


def name_of(dataset):
    """What a checkpoint calls a data set: a folder's own name and a slash, wherever the folder is"""
    if dataset in DATASETS:
        return dataset
    return os.path.basename(os.path.realpath(os.path.expanduser(dataset))) + "/"


def run_folder(script, settings):
    """Where a run's images go: OUT, or runs/SCRIPT-DATASET-DIGIT, by its settings out, dataset and digit"""
    name = f"{script}-{name_of(settings.dataset)}".rstrip("/")
    if getattr(settings, "digit", None) is not None:        # not every script has it
        name += f"-{settings.digit}"
    return Path(os.path.expanduser(settings.out or f"runs/{name}"))


def claim(folder):
    """Makes the folder of a run and marks it as one, so that its pictures are never taken for images to train on.
    The file that is returned keeps other processes out until this one ends, however; not on Windows.  ValueError if
    one is there, or if the folder holds something and is no run's"""
    folder.mkdir(parents=True, exist_ok=True)
    if not _is_a_run(folder) and any(path.name[0] != "." for path in folder.iterdir()):
        raise ValueError(f"--out {folder} holds other files, which might be overwritten: name a new folder")
    file = open(folder / ".run", "a")
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):     # else this file system has no locks
            raise ValueError(f"another run is writing to {folder}: wait for it, or name another --out") from error
    return file


class Refused(ValueError):
    """A sentence that fitting leaves as it is"""


@contextlib.contextmanager
def fitting(path, script):
    """Whatever goes wrong within it is said of the checkpoint: ValueError"""
    try:
        yield
    except DAMAGED as error:
        if isinstance(error, Refused) or _out_of_memory(error):
            raise
        raise ValueError(f"{path} is missing, damaged or not of this {script}.py: name another --out") from error


def compare(saved, settings, out):
    """Prints which of a run's settings are others than in its checkpoint.  Refused if one must not be; any other
    error, for fitting, if they do not look like settings and a run"""
    old, (step, seconds, rows, states, *_) = saved["settings"], saved["run"]
    kinds = [type(it) for it in (step, seconds, rows, states, *rows)]
    if kinds != [int, float, list, list] + [dict] * len(rows) or step < 1:
        raise ValueError
    for name, now in settings.items():
        if name not in ("batch_size", "images", "processes") and old[name] != now:
            raise Refused(f"{out} has {name} {old[name]}, not {now}: name another --out")
    for name, now in settings.items():
        if old[name] != now:
            _say(f"{name} {old[name]} -> {now} from step {step + 1:,} on")


def same_shapes(*optimizers):
    """ValueError unless every tensor that optimizers keep has its weight's shape, or is a number"""
    for optimizer in optimizers:
        for weight, kept in optimizer.state.items():
            if any(it.shape not in ((), weight.shape) for it in kept.values()):
                raise ValueError


@contextlib.contextmanager
def stop_signals():
    """with stop_signals() as stop: Ctrl-C, a kill and a closed terminal are put into the list, and end nothing"""
    stop, before = [], {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)                # Windows has no SIGHUP, and nohup ignores it
        if number and signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, lambda *_: stop.append(True))
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def in_one_sentence(script):
    """Around a main(): a user's mistakes (ValueError, OSError) and too little memory (status 2), Ctrl-C (130) and a
    reader of the output that has gone (141) end in one sentence on stderr and SystemExit.  Characters that cannot
    be shown are replaced"""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        yield
        return
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # Python flushes it at its end
        status, text = 141, "stopped: nothing reads its output; in training, the same command goes on"
    except (ValueError, OSError) as error:
        status, text = 2, error
    except KeyboardInterrupt:
        status, text = 130, "stopped; in training, the same command goes on"
    except (MemoryError, RuntimeError) as error:
        if "by peer" in str(error):                         # of torchrun: another process has ended, and said why
            sys.exit(2)
        if not _out_of_memory(error):
            raise
        places = [place.f_locals for place, _ in traceback.walk_tb(error.__traceback__)]
        sizes = {name: place[name] for name in ("size", "batch_size", "resolution") for place in places[::-1]
                 if isinstance(place.get(name), int)}
        at = ", ".join(["out of memory", *(f"{name} {it}" for name, it in sizes.items())])
        status, text = 2, f"{at}: try a smaller --batch-size, --size or network"
    print(f"{script}.py: {text}", file=sys.stderr)
    sys.exit(status)


def _out_of_memory(error):
    """Torch on the CPU, and Pillow, have no type of their own for it"""
    text = str(error).lower()
    words = ("out of memory", "allocate memory", "not enough memory", "bad_alloc", "alloc_failed", "buffer size",
             "calculation overflow", "multiplication overflow")
    return isinstance(error, MemoryError) or (isinstance(error, (RuntimeError, OSError))
                                              and any(word in text for word in words))
