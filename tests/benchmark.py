"""How fast, and how much memory: python tests/benchmark.py [usual] [matrix] [memory] [cuda]   (default: all)

usual   critic updates per second of wgan_gp.py and of the usual way of writing it, by turns, same networks
matrix  the floating-point operations of a step of width 64 against what this machine reaches in matrix products
memory  resident memory of the default command, after 10 and after 1,000 steps
cuda    milliseconds per step of every script, eager and recorded (--record), where there is a GPU
"""
import contextlib
import importlib
import io
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.flop_counter import flop_registry  # noqa: E402
from torchvision import datasets, transforms  # noqa: E402

import common  # noqa: E402
import wgan_gp  # noqa: E402


class MLPGenerator(nn.Sequential):
    def __init__(self, nz=100, *_):
        widths, layers = [nz, 128, 256, 512, 1024], []
        for i, o in zip(widths, widths[1:]):
            layers += [nn.Linear(i, o), nn.BatchNorm1d(o), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Linear(1024, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28)))


class MLPCritic(nn.Sequential):
    def __init__(self, *_):
        super().__init__(nn.Flatten(), nn.Linear(784, 512), nn.LeakyReLU(0.2), nn.Linear(512, 256),
                         nn.LeakyReLU(0.2), nn.Linear(256, 1), nn.Flatten(0))


@contextlib.contextmanager
def patched(**values):
    before = {name: getattr(wgan_gp, name) for name in values}
    for name, value in values.items():
        setattr(wgan_gp, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(wgan_gp, name, value)


def train(warm, steps, **settings):
    """Seconds per step of wgan_gp.train, after warm steps, its saving left out"""
    original, moments = wgan_gp.run, []

    def timed(*args, **state):
        for step in original(*args, **state):
            if step >= warm:
                moments.append(time.perf_counter())
            yield step
    with patched(run=timed), contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as out:
        wgan_gp.train(steps=warm + steps + 1, save_every=10**9, out=out, **settings)
    return (moments[-1] - moments[0]) / (len(moments) - 1)


def usual_way(warm, steps, n_critic=5, lam=10, m=64, lr=1e-4, betas=(0.0, 0.9)):
    """Seconds per step of the script that one finds: the same algorithm, with what slows it down"""
    steps_per_image = [transforms.Resize(28), transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
    mnist = datasets.MNIST(common.ROOT, transform=transforms.Compose(steps_per_image))
    loader = torch.utils.data.DataLoader(mnist, m, shuffle=True, drop_last=True)
    G, D = MLPGenerator(), MLPCritic()
    opt_G, opt_D = torch.optim.Adam(G.parameters(), lr, betas), torch.optim.Adam(D.parameters(), lr, betas)
    moments, i = [], 0
    while True:
        for real, _ in loader:
            if i % n_critic == 0 and i >= warm * n_critic:
                moments.append(time.perf_counter())
                if len(moments) > steps:
                    return (moments[-1] - moments[0]) / steps
            fake = G(torch.randn(m, 100))
            alpha = torch.rand(m, 1, 1, 1)
            between = (alpha * real + (1 - alpha) * fake).requires_grad_(True)
            scores = D(between)
            grad = torch.autograd.grad(scores, between, grad_outputs=torch.ones_like(scores), create_graph=True,
                                       retain_graph=True)[0]
            penalty = ((grad.view(m, -1).norm(2, dim=1) - 1) ** 2).mean()
            opt_D.zero_grad()
            (D(fake).mean() - D(real).mean() + lam * penalty).backward()
            opt_D.step()
            i += 1
            if i % n_critic == 0:
                opt_G.zero_grad()
                (-D(G(torch.randn(m, 100))).mean()).backward()
                opt_G.step()


def usual(rounds=5):
    images = common.load_images("mnist", size=28)
    pairs = []
    with patched(Generator=MLPGenerator, Critic=MLPCritic, load_images=lambda *_: images):
        for _ in range(rounds):
            pairs.append((train(5, 100, device="cpu"), usual_way(5, 60)))
            ours, theirs = pairs[-1]
            print(f"  critic updates/s: wgan_gp.py {5 / ours:.0f}, the usual way {5 / theirs:.0f}, "
                  f"ratio {theirs / ours:.2f}")
    ratio = median(theirs / ours for ours, theirs in pairs)
    print(f"usual: MLP 784-512-256-1 / 100-128-256-512-1024-784, batch 64: median ratio {ratio:.2f}")


class Flops(TorchDispatchMode):
    """Counts the floating-point operations of convolutions and matrix products, double backward included"""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function._overloadpacket in flop_registry:
            self.count += flop_registry[function._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def matrix_rate(n=2048, repeats=8):
    a, b = torch.randn(n, n), torch.randn(n, n)
    a @ b
    began = time.perf_counter()
    for _ in range(repeats):
        a @ b
    return repeats * 2 * n**3 / (time.perf_counter() - began)


def matrix(rounds=5):
    original = wgan_gp.run

    def counted(*args, **state):
        for step in original(*args, **state):
            with counter if step == 1 else contextlib.nullcontext():
                yield step
    counter = Flops()
    with patched(run=counted):
        train(0, 2, width=64, device="cpu")
    shares = []
    for _ in range(rounds):
        before = matrix_rate()
        seconds = train(1, 4, width=64, device="cpu")
        rate = (before + matrix_rate()) / 2
        shares.append(counter.count / seconds / rate)
        print(f"  {counter.count / 1e9:.1f} GFLOP a step in {seconds:.2f} s: "
              f"{counter.count / seconds / 1e9:.0f} of {rate / 1e9:.0f} GFLOP/s, {shares[-1]:.0%}")
    print(f"matrix: width 64, 32x32, batch 64: median share of the matrix rate {median(shares):.0%}")


def resident():
    """MiB of this process (Linux): now, and at its peak"""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))


def memory(early=10, late=1000):
    original, sizes = wgan_gp.run, {}

    def watched(*args, **state):
        for step in original(*args, **state):
            if step in (early, late):
                sizes[step] = resident()
            yield step
    with patched(run=watched), tempfile.TemporaryDirectory() as out:
        wgan_gp.train(digit=7, steps=late + 1, device="cpu", out=out)
    for step, (now, peak) in sizes.items():
        print(f"  step {step}: {now:.0f} MiB, peak {peak:.0f} MiB")
    print(f"memory: default command: peak {sizes[late][1]:.0f} MiB, growth from step {early} to {late}: "
          f"{sizes[late][0] - sizes[early][0]:+.0f} MiB")


def cuda(rounds=3):
    if not torch.cuda.is_available():
        print("cuda: not measured (no CUDA here)")
        return
    print(torch.cuda.get_device_name())
    for name in ("wgan", "wgan_gp", "lsgan", "ebgan"):
        script = importlib.import_module(name)
        for width in (16, 64):
            for _ in range(rounds):
                times = []
                for record in (False, True):
                    began = []
                    for steps in (200, 1200):               # their difference leaves the start and the saving out
                        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as out:
                            began.append(time.perf_counter())
                            script.train(steps=steps, save_every=10**9, out=out, width=width, record=record,
                                         device="cuda")
                            torch.cuda.synchronize()
                            began[-1] = time.perf_counter() - began[-1]
                    times.append(began[1] - began[0])
                eager, recorded = times
                print(f"cuda: {name} width {width}: {eager:.3f} ms/step eager, {recorded:.3f} recorded")


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores")
    for name in sys.argv[1:] or ["usual", "matrix", "memory", "cuda"]:
        {"usual": usual, "matrix": matrix, "memory": memory, "cuda": cuda}[name]()
