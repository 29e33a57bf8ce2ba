"""The measurements of docs/claims.md

    python measure/claims.py train [NAME...]   the runs that the claims need: two at a time, with one thread each
    python measure/claims.py 1 2 ... 17        the figures of a claim, and its plot in docs/; without numbers: all
    python measure/claims.py pictures          samples of the scripts, docs/samples-SCRIPT.png

The runs take about nine hours on two cores; stopped, they go on where they were. One thread each makes their
figures the same on every machine of a kind, all but the minutes. The plots need matplotlib.
"""
import csv
import functools
import importlib.util
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
import common  # noqa: E402
import evaluate  # noqa: E402
import wgan_gp  # noqa: E402

RUNS = PROJECT / "runs" / "claims"
SMALL = "--fmap-base 128 --fmap-max 64 --nz 64 --lr 0.005 --kimg 3 --ema 0.99"     # the README's line
LONGER = "--size 32 --fmap-max 32 --kimg 20 --ema 0.995"       # an earlier one: the paper's lr, longer phases
IMAGES = 5000


# ---- The runs ----------------------------------------------------------------------------------------------------

class Run(NamedTuple):
    """All ten digits, once per seed, in RUNS/NAME/SEED; every so many steps the checkpoint is kept"""
    script: str
    steps: int
    every: int
    flags: str = ""
    seeds: tuple = (0, 1, 2)
    edits: dict = {}        # old line: new line. A changed copy of the script is trained: RUNS/NAME/SCRIPT.py


RMSPROP = "    opt_D = torch.optim.RMSprop(w, lr, maximize=True, capturable=graph)"
JOBS = {
    "wgan": Run("wgan", 6000, 500),
    "wgan_gp": Run("wgan_gp", 4000, 500),
    "lsgan": Run("lsgan", 9000, 1000),
    "ebgan": Run("ebgan", 6000, 1000),
    "progan": Run("progan", 6000, 1000, SMALL),
    "sngan": Run("related/sngan", 6000, 1000),
    "dragan": Run("related/dragan", 6000, 1000),
    "ctgan": Run("related/ctgan", 1400, 200),
    "ls_gan": Run("related/ls_gan", 6000, 1000),
    # 7
    "wgan_gp-rmsprop": Run("wgan_gp", 2000, 500, seeds=(0,), edits={
        f"    opt_{name} = torch.optim.Adam({weights}, lr, (beta1, beta2), fused=True, capturable=graph)":
        f"    opt_{name} = torch.optim.RMSprop({weights}, 5e-5, capturable=graph)"
        for name, weights in (("G", "theta"), ("D", "w"))}),
    # 8
    "ebgan-without-pt": Run("ebgan", 6000, 1000, "--pt 0"),
    "ebgan-margin-1": Run("ebgan", 6000, 1000, "--margin 1", (0,)),
    "ebgan-margin-30": Run("ebgan", 6000, 1000, "--margin 30", (0,)),
    "ebgan-pretrain": Run("ebgan", 6500, 500, "", (0,), {                # 500 steps of D by real images alone
        "        L_D = E_x + (margin - E_x_tilde).relu()":
        "        step = opt_D.state[w[0]].get('step', 0) + 1         # a checkpoint keeps it\n"
        "        L_D = E_x + (margin - E_x_tilde).relu() * (step > 500)",
        "        opt_G.step()":
        "        if step > 500:\n"
        "            opt_G.step()"}),
    # 9
    "progan-longer": Run("progan", 8750, 1250, LONGER),
    "progan-without-growing": Run("progan", 8750, 1250, LONGER, (0,), {
        "    return phase, 4 * 2 ** ((phase + 1) // 2), alpha": "    return 0, size, 1.0"}),
    "progan-without-stddev": Run("progan", 8750, 1250, LONGER, (0,), {
        "        std = (x.var(0, correction=0) + 1e-8).sqrt().mean()": "        std = x.new_zeros(())"}),
    "progan-without-pixel-norm": Run("progan", 8750, 1250, LONGER, (0,), {
        "        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)": "        return x"}),
    "progan-without-equalised-lr": Run("progan", 8750, 1250, LONGER + " --lr 0.0001", (0,), {     # the authors' lr
        "        self.weight = nn.Parameter(torch.randn(n_out, n_in, kernel, kernel))":
        "        self.weight = nn.Parameter(torch.randn(n_out, n_in, kernel, kernel)\n"
        "                                   * gain / (n_in * kernel ** 2) ** 0.5)",
        "        self.scale, self.padding = gain / (n_in * kernel ** 2) ** 0.5, padding":
        "        self.scale, self.padding = 1.0, padding"}),
    # 10
    "wgan-adam-0.9": Run("wgan", 3000, 500, edits={
        RMSPROP: "    opt_D = torch.optim.Adam(w, lr, (0.9, 0.99), maximize=True, capturable=graph)"}),
    "wgan-adam-0": Run("wgan", 3000, 500, edits={
        RMSPROP: "    opt_D = torch.optim.Adam(w, lr, (0.0, 0.99), maximize=True, capturable=graph)"}),
    # 11
    "wgan-n_critic-1": Run("wgan", 6000, 500, "--n-critic 1"),
    "wgan-n_critic-20": Run("wgan", 1500, 125, "--n-critic 20"),
    # 12
    "wgan_gp-one-sided": Run("wgan_gp", 2000, 500, edits={
        "            penalty = (grad_norm(D, x_hat) - 1) ** 2":
        "            penalty = (grad_norm(D, x_hat) - 1).relu() ** 2"}),
    # 14
    "ctgan-1000": Run("related/ctgan", 4000, 500, "--examples 1000", (0,)),
    "wgan_gp-1000": Run("wgan_gp", 4000, 500, "--lr 0.0002 --batch-size 50", (0,), {
        "    images = load_images(dataset, digit, size, channels, root)":
        "    images = load_images(dataset, digit, size, channels, root)[:1000]"}),
    # 15
    "dragan-without-penalty": Run("related/dragan", 3000, 1000, "--lam 0"),
    # 16
    **{f"ls_gan-slope-{slope}": Run("related/ls_gan", 3000, 1000, f"--real-weight 0 --slope {slope}", (0,))
       for slope in (0, 0.2, 0.5, 1)},
    "ls_gan-tau-0.2048": Run("related/ls_gan", 3000, 1000, "--tau 0.2048", (0,)),      # 0.0002 times 32x32 values
}
SCRIPTS = [name for name in JOBS if name == JOBS[name].script.split("/")[-1]]        # as they are


def script_of(name):
    """The script of a job: the project's, or the copy with the job's changes, written here"""
    job, script = JOBS[name], PROJECT / f"{JOBS[name].script}.py"
    if not job.edits:
        return script
    lines = script.read_text(encoding="utf-8").splitlines()
    for old, new in job.edits.items():
        code = [line.split("  #")[0].rstrip() for line in lines]
        if code.count(old) != 1:
            raise ValueError(f"{script.name} has no longer exactly one line {old!r}")
        lines[code.index(old)] = new
    files = {script.name: "\n".join([*lines, ""]), "common.py": (PROJECT / "common.py").read_text(encoding="utf-8")}
    for file, content in files.items():
        copy = RUNS / name / file
        if not copy.exists() or copy.read_text(encoding="utf-8") != content:        # else a run may be reading it
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(content, encoding="utf-8")
    return RUNS / name / script.name


def kept(name, seed, step=None):
    """The file of a checkpoint (default: the last)"""
    return RUNS / name / str(seed) / f"{step or JOBS[name].steps:06d}.pt"


def train(name, seed):
    """Trains one seed of a job, or goes on with it; STEP.pt is the run as it was after so many"""
    job, last = JOBS[name], kept(name, seed)
    if not last.exists():
        subprocess.run([sys.executable, script_of(name), "--root", PROJECT / "data", "--device", "cpu",
                        "--seed", str(seed), "--out", last.parent, "--steps", str(job.steps),
                        "--keep", "--save-every", str(job.every), *job.flags.split()],
                       stdout=subprocess.DEVNULL,
                       env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)})
        if not last.exists():
            raise ValueError(f"{last} was not written: see above, or if the run is beyond it remove {last.parent}")
    print(f"{name} {seed}: {job.steps} steps are done", flush=True)


def train_all(names):
    """Seed by seed, two at a time"""
    for name in names:
        script_of(name)                                     # before two runs of it begin at once
    with ThreadPoolExecutor(2) as pool:
        todo = [(name, seed) for seed in range(3) for name in names if seed in JOBS[name].seeds]
        for _ in pool.map(train, *zip(*todo)):
            pass


# ---- Judging them ------------------------------------------------------------------------------------------------

def module(name):
    """The script of a job, imported"""
    path = script_of(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def opened(name, seed, step=None):
    """The script of a kept checkpoint (default: the last), its G, and the checkpoint"""
    script, path = module(name), kept(name, seed, step)
    if not path.exists():
        raise ValueError(f"{path} is not there: python measure/claims.py train {name}")
    return script, script.load(path), torch.load(path, map_location="cpu", weights_only=True)


def sampled(name, seed, step=None, average=True):
    """Images of a kept checkpoint, and the checkpoint; average=False: of ProGAN's G itself, not of its average"""
    _, G, saved = opened(name, seed, step)
    if not average:                                         # whose resolution is that of the average
        G.load_state_dict(saved["G"] | {"shown": saved["G_ema"]["shown"]})
    return evaluate.sample(G, saved["config"]["nz"], IMAGES), saved


@functools.cache
def judged(*run):
    """measure/evaluate.py's figures of sampled(*run), its log's means over the last 1,000 steps, and its seconds"""
    images, saved = sampled(*run)
    rows = saved["rows"]
    recent = [row for row in rows if row["step"] > rows[-1]["step"] - 1000]
    means = {column: mean(row[column] for row in recent) for column in rows[0]}
    return means | evaluate.judge(images, mnist()) | {"seconds": rows[-1]["seconds"]}


@functools.cache
def distance(*run):
    """The Fréchet distance alone, for curves -> it, and the checkpoint"""
    images, saved = sampled(*run)
    features = evaluate.features_of(mnist().classifier, evaluate.as_the_data_set(images))
    return evaluate.frechet(mnist().features, features), saved


@functools.cache
def mnist():
    """What all are compared with"""
    return evaluate.reference("mnist")


def table(head, *rows):
    print("| " + " | ".join(map(str, head)) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


def of(several, key, digits=3):
    """Mean ± standard deviation of some runs' figures, or the figure of one"""
    values = [each[key] for each in several]
    return evaluate.spread(values) if len(values) > 1 else f"{values[0]:.{digits}g}"


def covered(figures):
    """Classes with at least 1 % of the images"""
    return int((figures["classes"] >= 0.01).sum())


def compared(*jobs, columns=()):
    """A table of (name, steps) or (name, steps, average), over all seeds; columns: of the log, too"""
    rows = []
    for name, step, *average in jobs:
        several = [judged(name, seed, step, *average) for seed in JOBS[name].seeds]
        rows.append([name + ", G itself" * (average == [False]), f"{step:,}",
                     " ".join(f"{each['Fréchet']:.1f}" for each in several),
                     *(of(several, key) for key in ("Fréchet", "precision", "recall", "entropy", *columns)),
                     " ".join(f"{each['seconds'] / 60:.0f}" for each in several)])
    table(["run", "steps", "Fréchet distance, by seeds", "mean ± deviation", "precision", "recall", "entropy",
           *columns, "minutes"], *rows)


def along(number, shown, *jobs):
    """A table of the Fréchet distances of all seeds after so many steps, and their plot by steps and by minutes"""
    figure, (left, right) = plot(2)
    rows = []
    for name, colour in zip(jobs, ("#c0392b", "#1f4e79", "#2e8b57")):
        steps = range(JOBS[name].every, JOBS[name].steps + 1, JOBS[name].every)
        for seed in JOBS[name].seeds:
            distances, checkpoints = zip(*(distance(name, seed, step) for step in steps))
            minutes = [each["rows"][-1]["seconds"] / 60 for each in checkpoints]
            for axes, where in ((left, list(steps)), (right, minutes)):
                axes.plot(where, distances, "o-", markersize=3, color=colour,
                          label=name if seed == 0 else None)
            found = dict(zip(steps, distances))
            rows.append([f"{name}, seed {seed}", *(f"{found[step]:.1f}" if step in found else "" for step in shown),
                         f"{60000 * minutes[-1] / steps[-1]:.0f}"])
    table(["run", *(f"after {step:,} steps" for step in shown), "ms per step"], *rows)
    for axes, what in ((left, "generator updates"), (right, "minutes, one thread")):
        axes.set(xlabel=what, ylabel="Fréchet distance", yscale="log")
        logarithmic(axes.yaxis)
        axes.legend()
    save(figure, number)


def plot(columns=1, width=8):
    import matplotlib                                       # only here: training and judging need none
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot.subplots(1, columns, figsize=(width, 3.2), dpi=90, layout="constrained")


def logarithmic(*axes):
    """Readable ticks at 1, 2, 5, 10, 20, ..."""
    from matplotlib import ticker
    for axis in axes:
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(ticker.NullLocator())


def save(figure, number):
    figure.savefig(PROJECT / "docs" / f"claim-{number}.png")


def rank_correlation(a, b):
    """Spearman's, without ties"""
    ranks = torch.stack([torch.tensor(each).argsort().argsort().double() for each in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


def mlp(inputs, width=64):
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
                         nn.Linear(width, 1), nn.Flatten(0))


# ---- The claims --------------------------------------------------------------------------------------------------

def claim_1():
    """WGAN, example 1: uniform on two parallel lines, θ apart"""
    torch.manual_seed(0)

    def line(at, m=256):                                    # (m, 2, 1, 1), as images of one pixel
        return torch.stack([torch.full((m,), float(at)), torch.rand(m)], 1)[:, :, None, None]

    def divergence(theta, steps=1000):
        """JS, from below: log 2 − the loss of a trained classifier"""
        D = mlp(2)
        optimizer = torch.optim.Adam(D.parameters(), 1e-3)
        for _ in range(steps):
            loss = (F.softplus(-D(line(0))).mean() + F.softplus(D(line(theta))).mean()) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return math.log(2) - loss.item()

    def wasserstein(theta, steps=1000, lam=10):
        """The estimate of a critic trained with wgan_gp.py's penalty"""
        D = mlp(2)
        optimizer = torch.optim.Adam(D.parameters(), 1e-3, (0.0, 0.9))
        for _ in range(steps):
            x, x_tilde, eps = line(0), line(theta), torch.rand(256, 1, 1, 1)
            penalty = (wgan_gp.grad_norm(D, eps * x + (1 - eps) * x_tilde) - 1) ** 2
            L = D(x_tilde) - D(x) + lam * penalty
            optimizer.zero_grad()
            L.mean().backward()
            optimizer.step()
        return (lam * penalty - L).mean().item()

    rows = [[theta, math.log(2) if theta else 0, divergence(theta), theta, wasserstein(theta)]
            for theta in (0.0, 0.125, 0.25, 0.5, 1.0, 2.0)]
    table(["θ", "JS", "JS, by a classifier", "W", "W, by a critic"],
          *([f"{value:.3f}" for value in row] for row in rows))
    figure, (left, right) = plot(2)
    theta, js, js_found, w, w_found = zip(*rows)
    left.plot((1e-9, *theta[1:]), (js[1], *js[1:]), "k-", label="exact")    # 0 at θ = 0 only
    right.plot(theta, w, "k-", label="exact")
    for axes, found, what in ((left, js_found, "Jensen-Shannon divergence"),
                              (right, w_found, "Wasserstein distance")):
        axes.plot(theta, found, "o", color="#c0392b", label="by a trained network")
        axes.set(xlabel="distance θ of the lines", title=what)
        axes.legend()
    save(figure, 1)


def claim_2():
    """WGAN, figure 2: two Gaussians that do not overlap"""
    torch.manual_seed(0)
    x = torch.linspace(-4, 4, 401)[:, None]

    def draw(mean, m=256):
        return mean + 0.5 * torch.randn(m, 1)

    def gradient(function):
        at = x.clone().requires_grad_()
        return torch.autograd.grad(function(at).sum(), at)[0].abs().flatten()

    def over(mean, values):
        """The values' mean over N(mean, 0.5²): of the real samples for -2, of the generated ones for 2"""
        density = (-2 * (x.flatten() - mean) ** 2).exp()
        return ((values * density).sum() / density.sum()).item()

    def loss_of(logits):
        """A classifier's: its cross entropy, half real and half generated"""
        return (over(-2, F.softplus(-logits)) + over(2, F.softplus(logits))) / 2

    D, f = mlp(1), mlp(1)
    for_D, for_f = torch.optim.Adam(D.parameters(), 1e-3), torch.optim.RMSprop(f.parameters(), 5e-5, maximize=True)
    rows = []
    for step in range(1, 5001):
        loss = F.softplus(-D(draw(-2))).mean() + F.softplus(D(draw(2))).mean()
        for_D.zero_grad()
        loss.backward()
        for_D.step()
        gain = f(draw(-2)).mean() - f(draw(2)).mean()
        for_f.zero_grad()
        gain.backward()
        for_f.step()
        with torch.no_grad():
            for each in f.parameters():
                each.clamp_(-0.01, 0.01)
        if step in (10, 100, 1000, 5000):
            slopes = (gradient(lambda at: F.logsigmoid(-D(at))), gradient(lambda at: F.logsigmoid(D(at))),
                      gradient(f))
            rows.append([step, f"{loss_of(D(x).detach().flatten()):.1e}", *(f"{mean:.2g} ({mean / most:.2g})"
                         for mean, most in ((over(2, each), each.max().item()) for each in slopes))])
    best = -16 * x.flatten()                                # ln(p_r / p_g), the best classifier's logit
    slopes = (16 * torch.sigmoid(best), 16 * torch.sigmoid(-best))
    rows.append(["best classifier", f"{loss_of(best):.1e}",
                 *(f"{over(2, each):.2g} ({over(2, each) / 16:.2g})" for each in slopes), ""])
    table(["updates", "loss of the classifier", "gradient of log(1 − D)", "of −log D", "of the critic"], *rows)
    figure, axes = plot()
    with torch.no_grad():
        score = f(x) - f(x).mean()
        for mean, name, colour in ((-2, "real", "#1f4e79"), (2, "generated", "#2e8b57")):
            axes.fill_between(x.flatten(), 0, (-2 * (x.flatten() - mean) ** 2).exp(), alpha=0.25, color=colour,
                              label=name)
        axes.plot(x, torch.sigmoid(D(x)), color="#c0392b", label="classifier D(x): flat")
        axes.plot(x, score / score.abs().max(), color="k", label="critic f(x), scaled: not flat")
    axes.set(xlabel="x")
    axes.legend(fontsize=8)
    save(figure, 2)


def claim_3():
    """LSGAN, §3: the losses of G by D's output"""
    losses = {"log(1 − σ(s))": lambda s: F.logsigmoid(-s), "−log σ(s)": lambda s: -F.logsigmoid(s),
              "½ (s − 1)²": lambda s: (s - 1) ** 2 / 2}
    rows, places = [], (-8.0, -4.0, 0.0, 1.0, 4.0, 8.0)
    for name, loss in losses.items():
        s = torch.tensor(places, requires_grad=True)
        rows.append([name, *(f"{value:.3g}" for value in torch.autograd.grad(loss(s).sum(), s)[0])])
    table(["gradient at s =", *(f"{place:g}" for place in places)], *rows)
    figure, (left, right) = plot(2)
    s = torch.linspace(-8, 8, 201)
    for name, loss in losses.items():
        left.plot(s, loss(s), label=name)
        at = s.clone().requires_grad_()
        right.plot(s, torch.autograd.grad(loss(at).sum(), at)[0])
    left.set(xlabel="output s of D", title="loss of G", ylim=(-9, 20))
    right.set(xlabel="output s of D", title="its gradient", ylim=(-4, 4))
    left.legend()
    save(figure, 3)


def claim_4():
    """WGAN, figure 3: the estimate against the Fréchet distance along a run; LSGAN's losses for comparison"""
    figure, both = plot(2)
    rows = []
    for name, column in (("wgan", "wasserstein"), ("wgan_gp", "wasserstein"), ("lsgan", "L_D"), ("lsgan", "L_G")):
        every, ranks, powers = JOBS[name].every, [], []
        steps = range(every, JOBS[name].steps + 1, every)
        for seed in JOBS[name].seeds:
            distances, checkpoints = zip(*(distance(name, seed, step) for step in steps))
            losses = [mean(row[column] for row in checkpoints[-1]["rows"] if step - every < row["step"] <= step)
                      for step in steps]                    # the mean over the steps since the last place
            ranks.append(rank_correlation(losses, distances))
            powers.append(torch.corrcoef(torch.tensor([losses, distances]).log())[0, 1].item())
            if column == "wasserstein":
                axes = both[("wgan", "wgan_gp").index(name)]
                axes.plot(losses, distances, "o-", markersize=4, label=f"seed {seed}")
                axes.set(xscale="log", yscale="log", xlabel="Wasserstein estimate", ylabel="Fréchet distance",
                         title=f"{name}.py, every {every} steps")
                logarithmic(axes.xaxis, axes.yaxis)
                axes.legend()
        rows.append([f"{name}.py, {column}", len(steps),
                     *(" ".join(f"{each:.3f}" for each in several) for several in (ranks, powers))])
    table(["loss", "places", "rank correlation, by seeds", "correlation of the logarithms"], *rows)
    save(figure, 4)


def claim_5():
    """WGAN-GP, figure 1 (b): the critic's weights; §4: its gradient norms at x_hat"""
    figure, (left, middle, right) = plot(3, 10)
    images, rows = common.load_images("mnist"), []
    for axes, name in ((left, "wgan"), (middle, "wgan_gp")):
        script, G, saved = opened(name, 0)
        random = torch.Generator().manual_seed(0)
        D = script.Critic()
        D.load_state_dict(saved["D"])
        D.eval()        # WGAN's batch norm by its running statistics: else an image has an effect on all scores
        weights = torch.cat([part.weight.detach().flatten() for part in D if isinstance(part, nn.Conv2d)])
        norms = []
        for _ in range(32):
            x = images[torch.randint(len(images), (64,), generator=random)] / 127.5 - 1
            eps = torch.rand(64, 1, 1, 1, generator=random)
            x_hat = eps * x + (1 - eps) * G(torch.randn(64, 100, generator=random))
            norms.append(wgan_gp.grad_norm(D, x_hat).detach())
        norms = torch.cat(norms)
        bound = (weights.abs() >= 0.0099).double().mean().item() if name == "wgan" else None
        rows.append([f"{name}.py", f"{weights.std():.4f}", f"{weights.abs().max():.4f}",
                     "-" if bound is None else f"{bound:.1%}", f"{norms.mean():.3g}",
                     f"{norms.std() / norms.mean():.2g}"])
        axes.hist(weights.numpy(), 101, color="#1f4e79")
        axes.set(title=f"{name}.py: weights of the critic", yticks=[])
        right.hist(norms.log10().numpy(), 200, range=(-2.5, 0.5), alpha=0.6, label=f"{name}.py")
    right.set(title="log₁₀ ‖∇D(x_hat)‖", yticks=[])
    right.legend()
    table(["critic", "weights: deviation", "largest", "at ±c (within 1 %)", "mean of ‖∇D(x_hat)‖",
           "deviation / mean"], *rows)
    save(figure, 5)


def claim_6():
    """Ten digits: which classes are there; the table of the README"""
    rows = []
    for name in SCRIPTS:
        several = [judged(name, seed) for seed in JOBS[name].seeds]
        rows.append([f"{JOBS[name].script}.py", f"{JOBS[name].steps:,}",
                     " ".join(f"{each['seconds'] / 60:.0f}" for each in several),
                     " ".join(f"{each['Fréchet']:.1f}" for each in several),
                     *(of(several, key) for key in ("Fréchet", "precision", "recall")),
                     " ".join(str(covered(each)) for each in several),
                     " ".join(f"{100 * each['classes'].min():.1f}" for each in several), of(several, "entropy"),
                     of(several, "copies", 2)])
    floor = evaluate.judge(mnist().training[:IMAGES], mnist(), copied=mnist().test)
    rows.append(["training images", *[""] * 3, *(f"{floor[key]:.3g}" for key in ("Fréchet", "precision", "recall")),
                 covered(floor), f"{100 * floor['classes'].min():.1f}", f"{floor['entropy']:.3g}",
                 f"{floor['copies']:.2g}"])
    table(["script", "steps", "minutes", "Fréchet distance, seeds 0 1 2", "mean ± deviation", "precision",
           "recall", "classes covered", "rarest class, %", "entropy", "copies"], *rows)


def claim_7():
    """WGAN-GP against WGAN, by steps and by time; and with WGAN's optimizer"""
    along(7, (500, 1000, 2000, 4000), "wgan", "wgan_gp", "wgan_gp-rmsprop")


def claim_8():
    """EBGAN: the pulling-away term, the margin, pretraining"""
    compared(("ebgan", 6000), ("ebgan-without-pt", 6000), ("ebgan-margin-1", 6000), ("ebgan-margin-30", 6000),
             ("ebgan-pretrain", 6500), columns=("f_PT", "energy_real"))     # 6,000 updates of G in all of them
    draw("claim-8", ("ebgan-margin-1", 24), ("ebgan", 24), ("ebgan-margin-30", 24))


def claim_9():
    """ProGAN: its average and G itself; without growing, along the run; without another ingredient"""
    compared(("progan-longer", 8750), ("progan-longer", 8750, False),
             *(("progan-without-growing", step) for step in (2500, 3750, 8750)),
             *((f"progan-without-{what}", 8750) for what in ("stddev", "pixel-norm", "equalised-lr")))


def claim_10():
    """WGAN: RMSProp against Adam without and with momentum, for the critic"""
    compared(("wgan", 3000), ("wgan-adam-0", 3000), ("wgan-adam-0.9", 3000))


def claim_11():
    """WGAN: critic updates per generator update, by the same number of generator updates and of critic updates"""
    compared(("wgan-n_critic-1", 1500), ("wgan", 1500), ("wgan-n_critic-20", 1500), ("wgan-n_critic-1", 6000),
             ("wgan", 6000))


def claim_12():
    """WGAN-GP: the two-sided against the one-sided penalty"""
    compared(("wgan_gp", 2000), ("wgan_gp-one-sided", 2000))


def claim_13():
    """SNGAN against WGAN-GP, by steps and by time"""
    along(13, (1000, 2000, 4000), "sngan", "wgan_gp")


def claim_14():
    """CT-GAN against WGAN-GP on 1,000 images"""
    compared(*((name, steps) for steps in (1000, 2000, 4000) for name in ("wgan_gp-1000", "ctgan-1000")))


def claim_15():
    """DRAGAN's penalty against none"""
    compared(*((name, steps) for steps in (1000, 3000) for name in ("dragan", "dragan-without-penalty")))


def claim_16():
    """GLS-GAN's slope, from 0, LS-GAN, to 1, WGAN"""
    compared(*((name, 3000) for name in ("ls_gan", "ls_gan-slope-0", "ls_gan-slope-0.2", "ls_gan-slope-0.5",
                                         "ls_gan-slope-1", "ls_gan-tau-0.2048")))


def claim_17():
    """Semi-supervised: test errors over epochs, by the logs of runs/claims/semi_supervised/SEED"""
    figure, axes = plot()
    rows, epochs = [], (5, 10, 20, 40, 60, 100, 150, 200, 250, 300)
    for seed, colour in zip(range(3), ("#1f4e79", "#2e8b57", "#8e44ad")):
        with open(RUNS / "semi_supervised" / str(seed) / "log.csv") as file:
            errors = {int(row["step"]) // 600: int(row["test_errors"]) for row in csv.DictReader(file)}
        rows.append([seed, *(errors.get(epoch, "") for epoch in epochs)])
        axes.plot(errors.keys(), errors.values(), color=colour, label=f"seed {seed}")
    axes.axhspan(93 - 6.5, 93 + 6.5, color="#c0392b", alpha=0.3, label="the paper, 300 epochs: 93 ± 6.5")
    axes.set(xlabel="epochs", ylabel="errors in 10,000", yscale="log")
    logarithmic(axes.yaxis)
    axes.legend()
    table(["seed", *(f"epoch {epoch}" for epoch in epochs)], *rows)
    save(figure, 17)


def draw(file, *runs):
    """docs/FILE.png: the first images of seed 0 of each (name, how many), in rows of 24"""
    images = []
    for name, n in runs:
        _, G, saved = opened(name, 0)
        drawn = evaluate.sample(G, saved["config"]["nz"], n)
        images.append(evaluate.as_the_data_set(drawn))
    to_pil_image(make_grid(torch.cat(images), nrow=24, padding=0)[:1]).save(PROJECT / "docs" / f"{file}.png")


def pictures():
    """The first 48 images of seed 0 of every script"""
    for name in SCRIPTS:
        draw(f"samples-{name}", (name, 48))


def main(words):
    torch.set_num_threads(1)
    if words[:1] == ["train"]:
        if set(words[1:]) - JOBS.keys():
            raise ValueError(f"the runs are {', '.join(JOBS)}, not {' '.join(words[1:])}")
        return train_all(words[1:] or JOBS)
    if words == ["pictures"]:
        return pictures()
    if not set(words) <= set(map(str, range(1, 18))):
        raise ValueError(f"train, pictures, or numbers of claims, 1 to 17, not {' '.join(words)}")
    for number in words or range(1, 18):
        claim = globals()[f"claim_{number}"]
        print(f"\n{number}. {claim.__doc__}\n")
        claim()


if __name__ == "__main__":
    main(sys.argv[1:])
