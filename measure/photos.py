"""What runs of related/srgan.py make of photographs that they were not trained with

    python measure/photos.py path/to/photos runs/srresnet runs/srgan
    python measure/photos.py path/to/photos runs/srresnet runs/srgan --picture docs/srgan.png

    psnr, ssim    against the photographs, on Y, without 4 pixels at every border (higher is closer)
    sharpness     mean difference of neighbouring pixels, as a share of the photographs'

of the first run's held-out photographs, a quarter as large and enlarged again: by bicubic interpolation, and by each
run. The picture has the first three, and the photographs below.
"""
import argparse
import sys
from pathlib import Path

import torch
from torch.nn.functional import conv2d, interpolate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
from related import srgan as script  # noqa: E402


def luma(x):
    """Y of BT.601, 16 to 235, without 4 pixels at every border"""
    weights = torch.tensor([65.481, 128.553, 24.966]).view(3, 1, 1)
    return 16 + ((x[..., 4:-4, 4:-4].clamp(-1, 1) + 1) / 2 * weights).sum(1, keepdim=True)


def ssim(x, y):
    """Structural similarity (Wang et al. 2004), of equal pictures 1.  (m, 3, H, W), (m, 3, H, W) -> (m,)"""
    x, y = luma(x), luma(y)
    line = (-torch.arange(-5.0, 6).square() / (2 * 1.5 ** 2)).exp()
    window = line * line[:, None] / line.sum() ** 2
    E_x, E_y, E_xx, E_yy, E_xy = (conv2d(it, window[None, None]) for it in (x, y, x * x, y * y, x * y))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similar = (2 * E_x * E_y + c1) * (2 * (E_xy - E_x * E_y) + c2)
    return (similar / ((E_x ** 2 + E_y ** 2 + c1) * (E_xx - E_x ** 2 + E_yy - E_y ** 2 + c2))).mean((1, 2, 3))


def sharpness(x):
    y = luma(x)
    return (y.diff(dim=2).abs().mean() + y.diff(dim=3).abs().mean()).item()


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--picture", help="write it there")
    args = parser.parse_args(argv)
    nets = {run: script.load(Path(run, "checkpoint.pt")) for run in args.runs}
    config = nets[args.runs[0]].config
    torch.manual_seed(0)
    HR = next(script.crops(script.found(args.photos)[-config["held_out"]:], config["held_out"], config["size"], "cpu"))
    LR = script.downscale(HR)
    ways = {"bicubic": interpolate(2 * LR - 1, scale_factor=4, mode="bicubic", antialias=True)}
    for run, G in nets.items():
        ways[run] = torch.cat([G(some) for some in LR.split(10)])
    print(f"{'':<24} {'psnr':>6} {'ssim':>7} {'sharpness':>10}")
    for name, SR in ways.items():
        print(f"{name:<24} {script.psnr(SR, HR).mean():6.2f} {ssim(SR, HR).mean():7.4f} "
              f"{sharpness(SR) / sharpness(HR):10.2f}")
    if args.picture:
        rows = [torch.cat([*each[:4]], 2) for each in (*ways.values(), HR)]
        common.save_images(torch.cat(rows, 1)[None], args.picture)


if __name__ == "__main__":
    main()
