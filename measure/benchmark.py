"""How fast a step is, and how much memory it takes, on a CPU or a GPU

    python measure/benchmark.py                             the five, at their defaults; ProGAN: the README's line
    python measure/benchmark.py wgan_gp --width 64
    python measure/benchmark.py progan --size 1024          the paper's networks, in a fade, random images

prints a row for each, with medians of several rounds:

    ms, --graph  per step (of wgan, wgan_gp: five updates of the critic), and recorded and replayed, on a GPU
    images/s     real images that D sees
    usual        how many times as long the same step of wgan, wgan_gp or lsgan takes as it is commonly written, by
                 turns: a DataLoader without workers that transforms image by image, torch's default optimizers and
                 memory format, gradients for D's weights, too, in G's steps; in wgan_gp D's steps also compute
                 G's gradients, as generated images are not detached
    GFLOP        of convolutions and matrix products, per step
    matrix rate  the share of what the device reaches in products of 2048x2048 matrices, by turns
    MiB          peak memory of the process (on Linux), or of the GPU
"""
import argparse
import contextlib
import importlib
import io
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402

FIVE = ("wgan", "wgan_gp", "lsgan", "ebgan", "progan")


def iteration_of(name, device, **settings):
    """What the script's train would repeat"""
    script, kept = importlib.import_module(name), []

    def rounds(iteration, config, rows):
        kept.append(iteration)
        return ()
    with patch.multiple(script, rounds=rounds, save_animation=lambda *_: None), \
            contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as out:
        script.train(device=device, out=out, **settings)
    return kept[0]


def usual_step(name, width, device):
    """At every next() a step of wgan, wgan_gp or lsgan, with its networks, as is commonly written"""
    script, m = importlib.import_module(name), 64
    pad = [transforms.Pad(2), transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
    mnist = datasets.MNIST(common.ROOT, download=True, transform=transforms.Compose(pad))
    loader = torch.utils.data.DataLoader(mnist, m, shuffle=True, drop_last=True)
    reals = (real.to(device) for _ in iter(int, 1) for real, _ in loader)
    G = script.Generator(width=width).to(device)
    D = (script.Critic if name.startswith("wgan") else script.Discriminator)(width=width).to(device)
    kind, lr = {"wgan": (torch.optim.RMSprop, 5e-5), "wgan_gp": (torch.optim.Adam, 1e-4),
                "lsgan": (torch.optim.Adam, 2e-4)}[name]
    opt_G, opt_D = kind(G.parameters(), lr), kind(D.parameters(), lr)

    def update(opt, loss):
        opt.zero_grad()
        loss.backward()
        opt.step()
    while True:
        for _ in range(5 if name.startswith("wgan") else 1):
            real, fake = next(reals), G(torch.randn(m, 100, device=device))
            if name == "wgan":
                update(opt_D, D(fake.detach()).mean() - D(real).mean())
                for each in D.parameters():
                    each.data.clamp_(-0.01, 0.01)
            elif name == "wgan_gp":
                alpha = torch.rand(m, 1, 1, 1, device=device)
                between = (alpha * real + (1 - alpha) * fake).requires_grad_(True)
                scores = D(between)
                (grad,) = torch.autograd.grad(scores, between, torch.ones_like(scores), create_graph=True)
                penalty = ((grad.view(m, -1).norm(2, dim=1) - 1) ** 2).mean()
                update(opt_D, D(fake).mean() - D(real).mean() + 10 * penalty)
            else:
                update(opt_D, (((D(real) - 1) ** 2).mean() + (D(fake.detach()) ** 2).mean()) / 2)
        if name == "lsgan":
            update(opt_G, ((D(fake) - 1) ** 2).mean() / 2)
        else:
            update(opt_G, -D(G(torch.randn(m, 100, device=device))).mean())
        yield


def seconds_of(step, n, device):
    """Seconds per step, of n"""
    wait = torch.cuda.synchronize if "cuda" in device else int
    wait()
    began = time.perf_counter()
    for _ in range(n):
        step()
    wait()
    return (time.perf_counter() - began) / n


class Flops(TorchDispatchMode):
    """Counts the operations of convolutions and matrix products. (FlopCounterMode fails in a double backward)"""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function._overloadpacket in flop_registry:
            self.count += flop_registry[function._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def measured(name, width=16, size=None, device="cpu", rounds=5, steps=20):
    """A row of the table"""
    torch.backends.cudnn.benchmark = True                   # as the scripts do
    script, settings = importlib.import_module(name), dict(width=width)
    images = 5 * 64 if name.startswith("wgan") else 64
    if name == "progan":                                    # it does not grow here
        script.schedule = lambda *_: (0, size or 32, 0.5 if size else 1.0)
        images = {256: 14, 512: 6, 1024: 3}.get(size, 16)
        settings = dict(size=size) if size else dict(fmap_base=128, fmap_max=64, nz=64)     # the README's line
        if size:
            script.load_images = lambda *_: torch.randint(256, (64, 3, size, size), dtype=torch.uint8)
    a, b = torch.randn(2, 2048, 2048, device=device)
    ways = {"ms": iteration_of(name, device, **settings), "matrix": lambda: a @ b}
    with Flops() as flops:
        ways["ms"]()
    seconds_of(ways["ms"], steps, device)
    if "cuda" in device:
        mib = torch.cuda.max_memory_allocated() / 2**20
    else:
        import resource
        mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if name in ("wgan", "wgan_gp", "lsgan"):
        ways["usual"] = usual_step(name, width, device).__next__
    if "cuda" in device and name != "progan":
        settings["graph"] = True
        ways["graph"] = script.recorded(iteration_of(name, device, **settings), device).__next__
    for way in ways.values():
        seconds_of(way, 5, device)                          # the fourth is recorded
    times = [{way: seconds_of(step, steps, device) for way, step in ways.items()} for _ in range(rounds)]
    ms = f"{1000 * median(each['ms'] for each in times):.4g}"
    graph = f"{1000 * median(each['graph'] for each in times):.4g}" if "graph" in ways else ""
    usual = f"{median(each['usual'] / each['ms'] for each in times):.2f}" if "usual" in ways else ""
    share = median(flops.count / each["ms"] / (2 * 2048**3 / each["matrix"]) for each in times)
    return [f"{name} {size}" if size else name, ms, graph, f"{1000 * images / float(ms):,.4g}", usual,
            f"{flops.count / 1e9:.4g}", f"{share:.0%}", f"{mib:,.0f}"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=FIVE, metavar="SCRIPT", help=", ".join(FIVE))
    parser.add_argument("--width", type=int, default=16, help="of all but progan (default: %(default)s)")
    parser.add_argument("--size", type=int, help="of progan: 64, 128, ..., 1024 (default: the README's line, 32)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="in each round (default: %(default)s)")
    args = vars(parser.parse_args(argv))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {args['device']}")
    print(f"| script | ms | --graph | images/s | usual | GFLOP | matrix rate | MiB |\n|{'---|' * 8}")
    names = args.pop("names")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:     # for the memory of each
        for name in names:
            print("|", " | ".join(pool.apply(measured, (name,), args)), "|", flush=True)


if __name__ == "__main__":
    main()
