"""The measurements of docs/claims.md that need no edited script

    python measure/claims.py 1 2 4              (there are 1, 2, 4, 6, 7, 8, 11, 13, 15, 16, 18)

trains what these claims need and is not there yet, in runs/claims: all ten digits, three seeds, two runs at a time
with one thread each; stopped, it goes on where it was. 6 takes some three hours on two cores. Then it prints
measure/evaluate.py's figures.
"""
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from torch import nn

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
import evaluate  # noqa: E402
import wgan_gp  # noqa: E402

RUNS = PROJECT / "runs" / "claims"
PROGAN = "progan.py --fmap-base 128 --fmap-max 64 --nz 64 --lr 0.0075 --kimg 3 --ema 0.99"       # the README's line
FIVE = [("wgan.py", 6000), ("wgan_gp.py", 4000), ("lsgan.py", 9000), ("ebgan.py", 6000), (PROGAN, 6000)]
CLAIMS = {                                      # runs that are compared, after so many steps
    6: [*FIVE, ("-m related.sngan", 6000), ("-m related.dragan", 6000), ("-m related.ctgan", 1400),
        ("-m related.ls_gan", 6000)],
    7: [(script, steps) for steps in (500, 1000, 2000, 4000) for script in ("wgan.py", "wgan_gp.py")],
    8: [(f"ebgan.py{flags}", 6000) for flags in ("", " --pt 0", " --margin 1", " --margin 30")],
    11: [("wgan.py --n-critic 1", 1500), ("wgan.py", 1500), ("wgan.py --n-critic 20", 1500),
         ("wgan.py --n-critic 1", 6000), ("wgan.py", 6000)],
    13: [(script, steps) for steps in (1000, 2000, 4000) for script in ("-m related.sngan", "wgan_gp.py")],
    15: [(f"-m related.dragan{flags}", steps) for steps in (1000, 3000) for flags in ("", " --lam 0")],
    16: [(f"-m related.ls_gan --real-weight 0 --slope {slope}", 3000) for slope in (0, 0.2, 0.5, 1)],
    18: [(f"-m related.improved_gan{flags}", 3000) for flags in (" --kernels 0 --smooth 1 --no-vbn",
         " --kernels 0 --no-vbn", " --kernels 0 --smooth 1", " --smooth 1 --no-vbn", "")],
}


# ---- Runs and their figures --------------------------------------------------------------------------------------
def kept(command, seed, steps):
    """The checkpoint of a run after so many steps, which is trained if it is not there"""
    name = command.removeprefix("-m related.").replace(".py", "").replace(" ", "")
    file = RUNS / name / str(seed) / f"{steps:06d}.pt"
    if not file.exists():
        flags = ["--seed", str(seed), "--steps", str(steps), "--save-every", "500", "--keep", "--out", file.parent]
        subprocess.run([sys.executable, *command.split(), "--device", "cpu", *flags], cwd=PROJECT, check=True,
                       env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    return file


def train(runs, seeds=range(3)):
    """Every seed of (command, steps), ..., two at a time"""
    longest = dict(sorted(runs, key=lambda run: run[1]))
    jobs = [(command, seed, steps) for seed in seeds for command, steps in longest.items()]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(kept, *zip(*jobs)))


def table(head, *rows):
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


def mlp(inputs, width=64):
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
                         nn.Linear(width, 1), nn.Flatten(0))


def update(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# ---- Claims that take more than a table of runs ------------------------------------------------------------------
def claim_1(lam=10):
    """WGAN, example 1: uniform on two parallel lines, θ apart"""
    def line(at, m=256):                                    # (m, 2)
        return torch.stack([torch.full((m,), float(at)), torch.rand(m)], 1)
    torch.manual_seed(0)
    rows = []
    for theta in (0.0, 0.125, 0.25, 0.5, 1.0, 2.0):
        D, f = mlp(2), mlp(2)                               # a classifier, a critic
        for_D, for_f = torch.optim.Adam(D.parameters(), 1e-3), torch.optim.Adam(f.parameters(), 1e-3, (0.0, 0.9))
        for _ in range(1000):
            x, x_tilde, eps = line(0), line(theta), torch.rand(256, 1)
            loss = (F.softplus(-D(x)).mean() + F.softplus(D(x_tilde)).mean()) / 2
            update(for_D, loss)
            estimate = f(x).mean() - f(x_tilde).mean()
            penalty = (wgan_gp.grad_norm(f, eps * x + (1 - eps) * x_tilde) - 1) ** 2
            update(for_f, lam * penalty.mean() - estimate)
        js = math.log(2) - loss.item()                      # from below
        rows.append([f"{each:.3f}" for each in (theta, math.log(2) * (theta > 0), js, theta, estimate.item())])
    table(["θ", "JS", "JS, by a classifier", "W", "W, by a critic"], *rows)


def claim_2():
    """WGAN, figure 2: gradients where generated samples are, and their shares of those at the steepest place"""
    torch.manual_seed(0)
    x = torch.linspace(-4, 4, 401)[:, None]
    generated = torch.softmax(-2 * (x.flatten() - 2) ** 2, 0)       # N(2, 0.5²); real: N(-2, 0.5²)

    def slope(function):
        at = x.clone().requires_grad_()
        steep = torch.autograd.grad(function(at).sum(), at)[0].abs().flatten()
        return f"{(steep * generated).sum():.2g} ({(steep * generated).sum() / steep.max():.2g})"

    def slopes(D):
        return slope(lambda at: F.logsigmoid(-D(at))), slope(lambda at: F.logsigmoid(D(at)))
    D, f, rows = mlp(1), mlp(1), []             # a classifier, a critic
    for_D, for_f = torch.optim.Adam(D.parameters(), 1e-3), torch.optim.RMSprop(f.parameters(), 5e-5)
    for step in range(1, 5001):
        real, fake = 0.5 * torch.randn(2, 256, 1) + torch.tensor([-2, 2]).view(2, 1, 1)
        update(for_D, F.softplus(-D(real)).mean() + F.softplus(D(fake)).mean())
        update(for_f, f(fake).mean() - f(real).mean())
        with torch.no_grad():
            for each in f.parameters():
                each.clamp_(-0.01, 0.01)
        if step in (10, 100, 1000, 5000):
            rows.append([step, *slopes(D), slope(f)])
    rows.append(["best classifier", *slopes(lambda at: -16 * at), ""])      # the logit is ln(p_r / p_g)
    table(["updates", "gradient of log(1 − D)", "of −log D", "of the critic"], *rows)


def claim_4():
    """WGAN, figure 3: the estimate and the Fréchet distance along runs; LSGAN's loss for comparison"""
    train(FIVE[:3])
    to, rows = evaluate.reference("mnist"), []
    for (command, last), column in zip(FIVE, ("wasserstein", "wasserstein", "L_G")):
        found = []
        for seed in range(3):
            log = torch.load(kept(command, seed, last), weights_only=True)["rows"]
            steps, losses, distances = range(500, last + 1, 500), [], []
            for step in steps:
                G, _ = evaluate.opened(kept(command, seed, step))
                images = evaluate.as_the_data_set(evaluate.sample(G, 100, 5000))
                distances.append(evaluate.frechet(to.features, evaluate.features_of(to.classifier, images)))
                losses.append(mean(row[column] for row in log if step - 500 < row["step"] <= step))
            both = torch.tensor([losses, distances])
            ranks = both.argsort().argsort().float()
            found.append([f"{torch.corrcoef(each)[0, 1]:.3f}" for each in (ranks, both.log())])
        rows.append([f"{command}, {column}", len(steps), *map(" ".join, zip(*found))])
    table(["loss", "places", "rank correlation, seeds 0 1 2", "correlation of the logarithms"], *rows)


def main(words):
    if not words or not {*words} <= {"1", "2", "4", *map(str, CLAIMS)}:
        sys.exit(__doc__)
    torch.set_num_threads(1)                                # equal figures, whatever the number of cores
    for word in words:
        print(f"\n{word}.\n")
        if runs := CLAIMS.get(int(word)):
            train(runs)
            evaluate.main([str(kept(command, seed, steps)) for command, steps in runs for seed in range(3)])
        else:
            globals()[f"claim_{word}"]()


if __name__ == "__main__":
    main(sys.argv[1:])
