"""What related/srgan.py makes of photographs that it was not trained with

    python measure/photos.py runs/srgan-photos path/to/photos
    python measure/photos.py runs/srgan-photos path/to/photos --picture docs/srgan.png

    psnr, ssim    against the photographs, on Y, without 4 pixels at every border (srgan.py's own; higher is closer)
    sharpness     mean difference of neighbouring pixels of Y, as a share of the photographs'

of the run's held-out images, the last ones of the folder, a quarter as large and enlarged again: by bicubic
interpolation, by SRResNet, and by SRGAN. The picture has the first four, and the photographs below.
"""
import argparse
import sys
from pathlib import Path

import torch
from torch.nn.functional import interpolate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
from related import srgan as script  # noqa: E402


def sharpness(x):
    y = script.luma(x)
    return (y.diff(dim=2).abs().mean() + y.diff(dim=3).abs().mean()).item()


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("photos")
    parser.add_argument("--picture", help="write it there")
    args = parser.parse_args(argv)
    saved = torch.load(Path(args.run, "checkpoint.pt"), map_location="cpu", weights_only=True)
    config = saved["config"]
    images = common.load_images(args.photos, None, config["size"], channels=3)[-config["held_out"]:]
    HR = images / 127.5 - 1
    LR = script.downscale(HR)
    ways = {"bicubic": interpolate(2 * LR - 1, scale_factor=4, mode="bicubic")}
    for name, part in (("SRResNet", "SRResNet"), ("SRGAN", "G")):
        G = script.Generator(config["blocks"], config["width"]).eval()
        G.load_state_dict(saved[part])
        ways[name] = torch.cat([G(some) for some in LR.split(10)])
    print(f"{'':<10} {'psnr':>6} {'ssim':>7} {'sharpness':>10}")
    for name, SR in ways.items():
        print(f"{name:<10} {script.psnr(SR, HR).mean():6.2f} {script.ssim(SR, HR).mean():7.4f} "
              f"{sharpness(SR) / sharpness(HR):10.2f}")
    if args.picture:
        common.save_images(torch.cat([each[:4] for each in (*ways.values(), HR)]), args.picture)


if __name__ == "__main__":
    main()
