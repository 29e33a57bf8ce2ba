"""Images in, images out: all that the scripts share, and nothing of what the papers say"""
import csv
import glob
import gzip
import os
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image, ImageDraw, ImageOps
from torchvision import datasets
from torchvision.transforms import functional as TF
from torchvision.utils import save_image

ROOT = Path(__file__).resolve().parent / "data"
DATASETS = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}


def load_images(dataset="mnist", digit=None, size=32, channels=None, root=None, train=True):
    """uint8 (N, channels, size, size).  ValueError: a request that makes no sense;  OSError: a file, or a download

    dataset   mnist, fashion-mnist, cifar10, of which digit, 0 to 9, picks one class; or a folder of images
    size      28x28 images first become 32x32 by a black border (but for size 28); then resized, antialiased
    channels  1 grey, 3 RGB  (None: what the data set has; a folder: 3)
    """
    root = Path(root or ROOT)
    if channels not in (None, 1, 3):
        raise ValueError(f"--channels must be 1 (grey) or 3 (RGB), not {channels}")
    if dataset not in DATASETS:
        if digit is not None or not os.path.isdir(dataset):
            raise ValueError(f"--dataset {dataset} must be {', '.join(DATASETS)}, or a folder, without --digit")
        return _load_folder(dataset, size, channels or 3, root)
    images, labels = load_set(dataset, root, train)
    if digit is not None:
        images = images[labels == digit]
    if not len(images):
        raise ValueError(f"--digit must be 0 to 9, not {digit}")
    if images.shape[-1] == 28 and size != 28:
        images = TF.pad(images, 2)
    if images.shape[-1] != size:
        images = torch.cat([TF.resize(part, [size, size], antialias=True) for part in images.split(1000)])
    if channels == 1 and images.shape[1] == 3:
        images = TF.rgb_to_grayscale(images)
    return images.expand(-1, channels or -1, -1, -1)            # grey becomes RGB by repeating it


def load_set(dataset, root=ROOT, train=True):
    """A part of a data set as it is, downloaded if it is not there: uint8 (N, C, H, W), and its classes, (N,)"""
    kind = DATASETS[dataset]
    if dataset == "cifar10":
        part = kind(root, train, download=True)
        return torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets)
    folder, parts = Path(root, kind.__name__, "raw"), []
    for name, md5 in kind.resources[:2] if train else kind.resources[2:]:
        datasets.utils.download_url(kind.mirrors[0] + name, folder, name, md5)     # returns at once if it is there
        parts.append(torch.frombuffer(bytearray(gzip.decompress((folder / name).read_bytes())), dtype=torch.uint8))
    images, labels = parts                                      # behind headers of 4 numbers and of 2, 4 bytes each
    return images[16:].view(-1, 1, 28, 28), labels[8:].long()


def _load_folder(folder, size, channels, root):
    """The images are decoded once, into a file under root, which is mapped: it may be larger than the memory"""
    place = os.path.realpath(folder)
    files = sorted(filter(os.path.isfile, glob.glob(f"{glob.escape(place)}/**/*.*", recursive=True)))
    # A folder with a checkpoint.pt is a run: its pictures are no data.
    runs = tuple(path.removesuffix("checkpoint.pt") for path in files if os.path.basename(path) == "checkpoint.pt")
    paths = [path for path in files if datasets.folder.is_image_file(path) and not path.startswith(runs)]
    state = repr([size, channels, *((path, os.path.getmtime(path), os.path.getsize(path)) for path in paths)])
    file = root / "cache" / f"{Path(place).name}-{sha256(state.encode()).hexdigest()[:16]}"
    if not file.exists():
        print(f"decoding {len(paths):,} images once, into {file} (--root: elsewhere)")
        file.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=file.parent) as scratch:
            with open(f"{scratch}/images", "wb") as sink, ThreadPoolExecutor() as pool:
                for i in range(0, len(paths), 256):             # so that few images wait in memory
                    sink.writelines(pool.map(lambda path: _decode(path, size, channels), paths[i:i + 256]))
            if not os.path.getsize(f"{scratch}/images"):
                raise ValueError(f"{folder} has {len(files):,} files, but no image that can be used")
            os.replace(f"{scratch}/images", file)
    pixels = torch.from_file(str(file), shared=True, size=file.stat().st_size, dtype=torch.uint8)
    print(f"{len(pixels) // (channels * size * size):,} images, of {len(files):,} files in {folder}")
    return pixels.view(-1, channels, size, size)


def _decode(path, size, channels):
    """The pixels of an image: upright, on white, its central square, antialiased.  Of damaged ones nothing"""
    try:
        image = Image.open(path)
        if getattr(image, "n_frames", 1) > 1:
            print(f"{path}: the first of {image.n_frames} frames")
        if image.mode[0] in "IF":
            raise ValueError(f"its pixels are {image.mode}, not of 8 bits")
        image.draft("RGB", (2 * size, 2 * size))                # a large JPEG is decoded smaller, 20 times as fast
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (size, size), Image.Resampling.BICUBIC)
        return TF.pil_to_tensor(image).numpy().tobytes()
    except Exception as error:                                  # damaged files cause many kinds
        print(f"left out {path}: {error}")
        return b""


def batches(images, m, device="cpu"):
    """x ~ P_r: endless batches, drawn with replacement: uint8 (N, C, H, W) -> float32 (m, C, H, W) in [-1, 1]"""
    if images.dtype != torch.uint8 or m < 1:
        raise ValueError(f"a batch is of uint8 images, and of at least 1, not of {m} {images.dtype}")
    if torch.device(device).type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[1] / 2:
        images = images.to(device)                              # the total, as a run that goes on must do the same
    while True:
        x = images[torch.randint(len(images), (m,), device=images.device)]     # random numbers are all its state
        yield x.to(device).float() / 127.5 - 1


def save_images(x, path):
    """x, (n, C, H, W) in [-1, 1], as one PNG, row by row, a square if n is one.  ValueError: one is not finite"""
    if not x.isfinite().all():
        raise ValueError(f"{path} would not be finite: a checkpoint is kept; try a smaller --lr, another --out")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_image(x, path, nrow=int(len(x) ** 0.5), padding=0, normalize=True, value_range=(-1, 1))


def save_animation(folder):
    """training.gif: the pictures in the folder of a run, 000100.png, ..., at most 100, at most 512 pixels wide"""
    paths = [path for path in Path(folder).glob("*.png") if path.stem.isdecimal()]
    paths = sorted(paths, key=lambda path: int(path.stem))[::-(len(paths) // 100 + 1)][::-1]
    side = min(512, Image.open(paths[-1]).width)
    frames = [Image.open(path).resize((side, side), Image.Resampling.BOX) for path in paths]
    frames[0].save(Path(folder, "training.gif"), save_all=True, append_images=frames[1:], duration=100, loop=0)


def save_curves(rows, folder):
    """rows, one dict for each point, as log.csv, and each column but the seconds over the steps in curve.png"""
    with open(Path(folder, "log.csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, rows[-1], extrasaction="ignore")      # a script may have changed its columns
        writer.writeheader()
        writer.writerows(rows)
    names = [name for name in rows[-1] if name not in ("step", "seconds")]
    picture = Image.new("RGB", (640, 160 * len(names)), "white")
    draw, last = ImageDraw.Draw(picture), rows[-1]["step"]
    for name, top in zip(names, range(25, picture.height, 160)):
        values = {row["step"]: row[name] for row in rows if name in row}
        low, high = min(values.values()), max(values.values())
        scale = 120 / (high - low or 1)
        draw.text((10, top - 18), f"{name}: {low:.4g} to {high:.4g}, at step {last}: {values[last]:.4g}", "black")
        draw.rectangle([10, top, 630, top + 120], outline="lightgrey")
        draw.line([(10 + 620 * step / last, top + scale * (high - y)) for step, y in values.items()], "black", 2)
    picture.save(Path(folder, "curve.png"))
