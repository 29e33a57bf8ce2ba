"""Images in, images out: what the five scripts share, and nothing of what the papers say.

    load_images     a data set by name, or a folder of your own images, as one uint8 tensor
    pyramid         these images at every lower resolution, too
    batches         x ~ P_r: endless random batches of it, in [-1, 1], on the device
    save_images     a grid as one PNG;  save_each: every image as its own
    save_animation  a GIF of a run's grids;  save_curve: its numbers as curves, and as a table

Errors are ValueError or OSError, one sentence that names the file or flag and says what to do.
"""
import contextlib
import glob
import hashlib
import itertools
import math
import os
import struct
import sys
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Whatever Pillow raises for a file that is not the image it claims to be.
UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, EOFError,
              RuntimeError, struct.error, zlib.error, Image.DecompressionBombError)


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
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} is not on this machine ({reason}): use --device cpu") from error
    if probe.is_cuda:
        torch.cuda.set_device(probe.device)
        torch.backends.cudnn.benchmark = True
    return probe.device


def load_images(dataset="mnist", digit=None, size=32, root=None, channels=None, enlarge=True, mapped=False):
    """All images of a data set (its training part) or of a folder: uint8, (N, channels, size, size)

    dataset   "mnist", "fashion-mnist", "cifar10", or the path of a folder: any depth, but not through links
    digit     0..9: only this class;  None: all.  Folders have no classes
    size      pixels. The 28x28 sets get a border of 2 pixels (size 28: none); other sizes are resized, antialiased.
              Images of a folder: EXIF orientation applied, transparency on white, centre cropped to a square
    root      where data sets are kept (None: data/ beside this file); MNIST is there, the others are downloaded
    channels  1 (grey) or 3 (RGB);  None: as the data set, 3 for a folder
    enlarge   False: ValueError for a folder in which every image is smaller than size
    mapped    True: a folder goes through the file below even if it is small, so that processes can share it

    Unreadable images of a folder are named on stderr and left out. A folder that does not fit into half of the free
    memory is decoded once into a file under root, and the tensor is a view of that file.
    Raises ValueError (the request makes no sense) or OSError (a file or the download failed).
    """
    root, channels = Path(os.path.expanduser(root or ROOT)), channels_of(dataset, channels)
    if size < 1:
        raise ValueError(f"--size must be at least 1, not {size}")
    if dataset in DATASETS:
        return _from_set(dataset, digit, size, root, channels)
    folder = Path(os.path.expanduser(dataset))
    if not folder.is_dir():
        what = "is a file: unpack it and give the folder" if folder.exists() else "does not exist"
        raise ValueError(f"--dataset {dataset} {what}; known data sets are {', '.join(DATASETS)}, and any folder")
    if digit is not None:
        raise ValueError(f"--digit {digit} needs a data set with classes ({', '.join(DATASETS)}), and a folder has "
                         f"none: leave --digit out, or point --dataset at the folder of one class")
    return _from_folder(folder, size, root, channels, enlarge, mapped)


def _from_set(dataset, digit, size, root, channels):
    if digit is not None and not 0 <= digit <= 9:
        raise ValueError(f"--digit must be one of the classes 0 to 9 of {dataset}, not {digit}")
    kind, _ = DATASETS[dataset]
    place = root / kind.__name__ / "raw" if hasattr(kind, "resources") else root
    names = [name for name, _ in kind.resources] if hasattr(kind, "resources") else [kind.filename]
    try:
        for name, md5 in getattr(kind, "resources", ()):
            _remove_if_damaged(place / name, md5)
        data = kind(str(root), train=True, download=True)
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise OSError(f"{dataset} could not be read from {root} or downloaded ({reason}): "
                      f"put {', '.join(names)} into {place} by hand, or name another folder with --root") from error
    except (AssertionError, ValueError, TypeError, LookupError) as error:
        raise OSError(f"{dataset} in {place} is damaged: delete the folder, and it is fetched again") from error
    images, labels = torch.as_tensor(data.data), torch.as_tensor(data.targets)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    if digit is not None:
        images = images[labels == digit]
    if images.shape[-1] == 28 and size != 28:
        images = TF.pad(images, 2)
    if images.shape[1] != channels:
        images = images.repeat(1, 3, 1, 1) if channels == 3 else TF.rgb_to_grayscale(images)
    if images.shape[-1] != size:
        images = torch.cat([TF.resize(part, [size, size], antialias=True) for part in images.split(1000)])
    return images.contiguous()


def _remove_if_damaged(archive, md5):
    """Removes the unpacked file beside a good .gz if it is not what the .gz's last 8 bytes say (CRC32, length):
    torchvision, which does not look into unpacked files, then unpacks it again"""
    unpacked = archive.with_suffix("")
    if unpacked.is_file() and datasets.utils.check_integrity(archive, md5):
        data = unpacked.read_bytes()
        if archive.read_bytes()[-8:] != struct.pack("<II", zlib.crc32(data), len(data)):
            unpacked.unlink()


def _from_folder(folder, size, root, channels, enlarge, mapped):
    paths = []
    for place, folders, files in os.walk(folder):
        # Hidden folders hold thumbnails and the like; a run folder holds pictures made by these scripts.
        folders[:] = [name for name in folders if not name.startswith((".", "__")) and
                      not os.path.exists(os.path.join(place, name, "checkpoint.pt"))]
        paths += [Path(place, name) for name in files if name.lower().endswith(ENDINGS) and name[0] != "."]
    paths.sort()
    if not paths:
        raise ValueError(f"no images in {folder}: it needs files that end in {', '.join(ENDINGS)}, at any depth")
    if not enlarge and not any(_side(path) >= size for path in paths):
        largest = max(map(_side, paths))
        if largest:                                         # else none can be read, which is said below
            raise ValueError(f"--size {size} is larger than every image in {folder}: the largest square in them "
                             f"has {largest} pixels, and --size can be at most that")

    if not mapped and len(paths) * channels * size * size <= free_memory() / 2:
        images, n = torch.empty(len(paths), channels, size, size, dtype=torch.uint8), 0
        for part in _decoded(folder, paths, size, channels):
            images[n:n + len(part)] = part
            n += len(part)
        return images[:n]
    contents = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.exists()]
    where, stamp = (hashlib.sha256(repr(it).encode()).hexdigest()[:12] for it in (folder.resolve(), contents))
    name = f"{folder.resolve().name}-{where}-{size}x{size}x{channels}"
    file = root / "cache" / f"{name}-{stamp}.uint8"
    if not file.exists():
        for old in file.parent.glob(f"{glob.escape(name)}-*"):
            old.unlink()
        print(f"decoding {len(paths):,} images once into {file}", flush=True)
        with replacing(file) as sink:
            for images in _decoded(folder, paths, size, channels):
                sink.write(images.numpy())
    print(f"reading the images of {folder} from {file}", flush=True)
    images = _mapped(file).view(-1, channels, size, size)
    images.file = file                                      # where pyramid puts its own beside
    return images


def _mapped(file):
    """The bytes of a file as a tensor, to be read only: they are fetched when they are used, and take no memory"""
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
        print(f"averaging {n:,} images once into {below}", flush=True)
        begin = dict(zip(sizes, np.cumsum([0, *numbers]).tolist()))
        with replacing(below) as sink:
            for each, start, part in averages():
                sink.seek(begin[each] + start * part[0].numel())
                sink.write(part.numpy())
    return {size: images, **levels(_mapped(below))}


def _decoded(folder, paths, size, channels):
    """The images in order, some hundreds at a time; names those that cannot be read"""
    skipped, shown = 0, time.monotonic()
    with ThreadPoolExecutor() as pool:              # Pillow decodes and resizes without the interpreter's lock
        for start in range(0, len(paths), 256):
            images, part = [], paths[start:start + 256]
            for path, image in zip(part, pool.map(lambda path: _read(path, size, channels), part)):
                if isinstance(image, torch.Tensor):
                    images.append(image)
                else:
                    skipped += 1
                    print(f"skipped {path}: {type(image).__name__}: {image}", file=sys.stderr)
            if images:
                yield torch.stack(images)
            if time.monotonic() - shown > 5:
                shown = time.monotonic()
                print(f"{start + len(part):,} of {len(paths):,} images decoded", flush=True)
    if skipped:
        print(f"skipped {skipped:,} of {len(paths):,} images, which could not be read", file=sys.stderr)
    if len(paths) - skipped < 2:
        raise ValueError(f"{folder} holds {len(paths) - skipped} readable images; training needs at least two")


def _side(path):
    """The side in pixels of the largest square in an image, 0 if it cannot be read"""
    try:
        with Image.open(path) as image:
            return min(image.size)
    except UNREADABLE:
        return 0


def _read(path, size, channels):
    """One image file as uint8 (channels, size, size), or the exception that reading it raised"""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):                  # 16 bits a pixel; convert("L") would cut off at 255
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            if image.mode.endswith(("A", "a")) or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("L" if channels == 1 else "RGB")
            image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).view(size, size, channels).permute(2, 0, 1).contiguous()
    except UNREADABLE as error:
        return error


def free_memory(device="cpu"):
    """Bytes that a program may still take on the device"""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4 << 30                                      # not Linux, and the standard library does not tell


def batches(images, m, device="cpu", resident=False):
    """x ~ P_r: an endless iterator over batches (m, C, H, W), float32 in [-1, 1], on the device

    images  uint8, (N, C, H, W), as from load_images
    m       images per batch, drawn uniformly with replacement: every batch is full, whatever N is

    Images that fit into half of the device's free memory are kept there, and a batch is one index on the device;
    others stay where they are, and each batch is copied. Raises ValueError if m < 1, without images, and, with
    resident=True, if the images are not in a GPU's memory.
    """
    if m < 1:
        raise ValueError(f"--batch-size must be at least 1, not {m}")
    if len(images) < 1:
        raise ValueError("there are no images to draw from")
    device = torch.device(device)
    if resident and device.type != "cuda":
        raise ValueError(f"--record records CUDA steps, and the device is {device}: leave it out")
    if device.type == "cpu" or images.nbytes <= free_memory(device) / 2:
        images = images.to(device)
    elif resident:
        raise ValueError(f"--record needs the images in the GPU's memory, but {images.nbytes:,} bytes do not fit: "
                         f"leave it out")

    def draw():
        while True:
            x = images[torch.randint(len(images), (m,), device=images.device)]
            if device.type == "cuda" and not x.is_cuda:
                x = x.pin_memory()
            yield x.to(device, non_blocking=True).float() / 127.5 - 1
    return draw()


# ---- Images out --------------------------------------------------------------------------------------------------

def run_folder(script, settings):
    """Where a run's images go: OUT, or runs/SCRIPT-DATASET-DIGIT, by its settings out, dataset and digit.
    ValueError if the images of the data set are there"""
    images = Path(os.path.expanduser(settings.dataset))
    name = f"{script}-{images.resolve().name}"
    if settings.digit is not None:
        name += f"-{settings.digit}"
    out = Path(os.path.expanduser(settings.out or f"runs/{name}"))
    if out.is_dir() and images.is_dir() and out.samefile(images):
        raise ValueError(f"--out {out} is the folder of the images: name another folder")
    return out


@contextlib.contextmanager
def replacing(path):
    """with replacing(path) as file: the bytes written to file become path at the end, all of them or none"""
    part = Path(path).with_name(f".{Path(path).name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
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


def save_each(batches, n, path, dataset=None):
    """The first n images of batches, (m, C, H, W) in [-1, 1], as 000000.png, ... in the new folder PATH/generated,
    or, if PATH is the file of a checkpoint, in PATH without its ending; prints and returns the folder.
    The border that load_images gave the 28x28 sets at size 32 is taken off.  ValueError for n < 1, OSError if the
    folder is there already"""
    if n < 1:
        raise ValueError(f"--generate must be at least 1, not {n}")
    path = Path(path)
    folder = path / "generated" if path.is_dir() else path.with_suffix("")
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: rename it, then generate again")
    folder.mkdir()
    images = (image for x in batches for image in x)
    for i, image in enumerate(itertools.islice(images, n)):
        if channels_of(dataset) == 1 and image.shape[-1] == 32:
            image = image[..., 2:-2, 2:-2]
        _picture(image).save(folder / f"{i:06d}.png")
    print(f"{n:,} images in {folder}")
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
        for row in [rows[0], *map(dict.values, rows)]:
            file.write((",".join(map(str, row)) + "\n").encode())


def _panel(picture, top, name, xs, ys):
    """A curve with axes and numbers on the 180 rows of pixels from top"""
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default()
    left, right, upper, lower = 70, picture.width - 20, top + 24, top + 154
    (x0, x1), (y0, y1) = ((min(each), max(each)) for each in ((0, *xs), ys))
    y0, y1 = (y0, y1) if y0 < y1 else (y0 - 1, y1 + 1)

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
