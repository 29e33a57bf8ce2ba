"""The sliced Wasserstein distance of two folders of images (ProGAN, §5): python measure/swd.py FOLDER FOLDER

Of patches of 7x7 pixels from every level of a Laplacian pyramid: small figures at coarse levels mean like shapes,
at fine levels similar texture. Needs no trained network. Prints one figure per level, times 1000 as in the paper,
and their average. Figures compare only for equal sizes, numbers of images and data; two halves of the real images
show how small they can get. Both sets are scaled to mean 0 and deviation 1 in every colour and level, so that
overall brightness, contrast and tint do not count. The paper takes 16,384 images of each.
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.datasets.folder import is_image_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import load_images  # noqa: E402

TAPS = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16         # Burt & Adelson 1983, a = 0.375


def blurred(x):
    """Smoothed by the 5x5 binomial filter, reflected at the borders.  (n, C, H, W) -> (n, C, H, W)"""
    channels = x.shape[1]
    kernel = torch.outer(TAPS, TAPS).to(x).expand(channels, 1, 5, 5)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, groups=channels)


def laplacian(x, least=16):
    """What each halving down to least pixels loses, and what is left: the levels, finest first.
    (n, C, s, s) -> [(n, C, s, s), (n, C, s/2, s/2), ...]"""
    levels = []
    while x.shape[-1] % 2 == 0 and x.shape[-1] >= 2 * least:
        smaller = blurred(x)[:, :, ::2, ::2]
        spread = torch.zeros_like(x)
        spread[:, :, ::2, ::2] = 4 * smaller                # blurred again, this is the smaller one enlarged
        levels.append(x - blurred(spread))
        x = smaller
    return [*levels, x]


def patches(level, rows, columns, side=7):
    """The patches whose upper left corners are (rows, columns), each (n, k).
    (n, C, s, s) -> (n k, C, side, side)"""
    n, channels, _, _ = level.shape
    windows = level.unfold(2, side, 1).unfold(3, side, 1)   # (n, C, s - 6, s - 6, side, side), without a copy
    image = torch.arange(n)[:, None].expand_as(rows)
    return windows[image, :, rows, columns].reshape(-1, channels, side, side)


def normalised(descriptors):
    """Every colour channel to mean 0 and standard deviation 1 over all patches.  (N, C, h, w) -> (N, C h w)"""
    mean = descriptors.mean((0, 2, 3), keepdim=True)
    std = descriptors.std((0, 2, 3), correction=0, keepdim=True).clamp(min=1e-8)    # a collapsed G may have 0
    return ((descriptors - mean) / std).flatten(1)


def sliced_wasserstein(a, b, directions):
    """The mean over the directions of the Wasserstein-1 distance of a and b projected on them, which is the mean
    difference of the sorted projections.  (N, d), (N, d), (p, d) of length 1 -> float"""
    total = 0.0
    for part in directions.split(32):
        total += (((a @ part.T).sort(0)[0] - (b @ part.T).sort(0)[0]).abs().mean(0)).sum().item()
    return total / len(directions)


def swd(real, fake, images=16384, per_image=128, projections=512, seed=0):
    """§5.  uint8 images, (n, C, s, s) and (n', C, s, s) -> {s: distance, s/2: ..., ..., 16: ...}, not times 1000.
    Of both sets as many images are taken: the least of images, n and n'.  ValueError for sizes that differ"""
    if min(images, per_image, projections) < 1:
        raise ValueError(f"at least 1 image, patch and projection, not {images}, {per_image} and {projections}")
    if real.shape[1:] != fake.shape[1:] or real.shape[-1] < 7:
        raise ValueError(f"images of one size, at least 7 pixels, are needed, not {tuple(real.shape[1:])} and "
                         f"{tuple(fake.shape[1:])}")
    random, n, distances = torch.Generator().manual_seed(seed), min(images, len(real), len(fake)), {}
    order = [torch.randperm(len(each), generator=random)[:n] for each in (real, fake)]

    def descriptors(each, order, k):
        for part in order.split(256):
            level = laplacian(each[part].float())[k]
            yield patches(level, *torch.randint(level.shape[-1] - 6, (2, len(part), per_image), generator=random))
    for k, level in enumerate(laplacian(real[:1].float())):     # one level at a time: it takes gigabytes
        a, b = (normalised(torch.cat([*descriptors(*each, k)])) for each in zip((real, fake), order))
        directions = F.normalize(torch.randn(projections, a.shape[1], generator=random), dim=1)
        distances[level.shape[-1]] = sliced_wasserstein(a, b, directions)
    return distances


def side_of(folder):
    """The shorter side of the first image in a folder, in pixels; None if there is none"""
    first = min(filter(is_image_file, map(str, Path(folder).rglob("*"))), default=None)
    return first and min(Image.open(first).size)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs=2, metavar="FOLDER", help="of images")
    parser.add_argument("--size", type=int, help="scale to it (default: the smaller of the folders' first images)")
    parser.add_argument("--images", type=int, default=16384, help="of each folder (default: %(default)s, or all)")
    parser.add_argument("--patches", type=int, default=128, help="per image and level (default: %(default)s)")
    parser.add_argument("--projections", type=int, default=512, help="directions (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of every random number (default: %(default)s)")
    args = parser.parse_args(argv)
    size = args.size or min(filter(None, map(side_of, args.folders)), default=64)
    sets = [load_images(folder, size=size, channels=3) for folder in args.folders]
    distances = swd(*sets, args.images, args.patches, args.projections, args.seed)
    print(f"sliced Wasserstein distance x 1000, {min(args.images, *map(len, sets)):,} images of each folder "
          f"at {size}x{size}")
    for level, distance in distances.items():
        print(f"{level}x{level}  {1000 * distance:.2f}")
    print(f"average  {1000 * sum(distances.values()) / len(distances):.2f}")


if __name__ == "__main__":
    main()
