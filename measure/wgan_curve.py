"""The picture of the README: how the estimate falls as the images get better (figure 3 of the WGAN paper)

    pip install matplotlib && python measure/wgan_curve.py runs/wgan-mnist-7 docs/wgan-curve.png

reads log.csv and the pictures of a finished run. The line is the log as it is: every row is a mean of 100 steps.
"""
import csv
import sys
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

SHOWN = 0.017, 0.084, 0.25, 0.5, 1.0                        # where pictures stand, as fractions of the run


def main(run, picture):
    with open(Path(run, "log.csv"), encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    step, estimate = (np.array([float(row[name]) for row in rows]) for name in ("step", "wasserstein"))

    figure, (top, axes) = plt.subplots(2, height_ratios=[1, 1.6], figsize=(9, 5.2), dpi=100, layout="constrained")
    axes.plot(step, estimate, linewidth=2, color="#1f4e79")
    axes.set(xlabel="generator updates", ylabel="Wasserstein estimate (up to a factor)", yscale="log",
             xlim=(0, step[-1]))
    axes.grid(which="both", linewidth=0.3)
    top.set(xlim=(0, len(SHOWN)), ylim=(0, 1))
    top.axis("off")
    for i, fraction in enumerate(SHOWN):
        row = int(np.argmin(abs(step - fraction * step[-1])))
        with Image.open(Path(run, f"{int(step[row]):06d}.png")) as image:
            side = image.width // 2                         # the upper left quarter: 16 of 64 images
            box = top.inset_axes([i / len(SHOWN) + 0.01, 0, 1 / len(SHOWN) - 0.02, 0.86])
            box.imshow(image.convert("L").crop((0, 0, side, side)), cmap="gray", vmin=0, vmax=255)
            box.axis("off")
            box.set_title(f"step {int(step[row])}: {estimate[row]:.2g}", fontsize=10)
        axes.plot(step[row], estimate[row], "o", color="#c0392b", markersize=6)
    figure.savefig(picture)


if __name__ == "__main__":
    main(*sys.argv[1:3])
