"""How fast, and how much memory: python measure/benchmark.py [NAME...]

Without a name, all of them:

scripts one table of the five: milliseconds per step, images per second, the usual way of writing the same step with
        the same networks (by turns), share of the machine's matrix rate, memory
usual   critic updates per second of wgan_gp.py and of the usual way of writing it, by turns, same networks
matrix  the floating-point operations of a step of width 64 against what this machine reaches in matrix products
profile the operations of a step that take the most time, and the share of each
memory  resident memory of the default command, after 10 and after 1,000 steps
growing seconds for the same number of images with progan.py: growing, and at the last resolution all along, by
        turns; operations where that would take too long
large   one step of progan.py at 256x256, 512x512 and 1024x1024, with table 2's feature maps: seconds and memory
"""
import contextlib
import copy
import importlib
import io
import itertools
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.profiler import ProfilerActivity  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.flop_counter import flop_registry  # noqa: E402
from torchvision import datasets, transforms  # noqa: E402

import common  # noqa: E402
import progan  # noqa: E402
import wgan_gp  # noqa: E402


class MLPGenerator(nn.Sequential):
    def __init__(self, nz=100, *_, **__):
        widths, layers = [nz, 128, 256, 512, 1024], []
        for i, o in zip(widths, widths[1:]):
            layers += [nn.Linear(i, o), nn.BatchNorm1d(o), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Linear(1024, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28)))


class MLPCritic(nn.Sequential):
    def __init__(self, *_):
        super().__init__(nn.Flatten(), nn.Linear(784, 512), nn.LeakyReLU(0.2), nn.Linear(512, 256),
                         nn.LeakyReLU(0.2), nn.Linear(256, 1), nn.Flatten(0))


@contextlib.contextmanager
def patched(module=wgan_gp, **values):
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def instead(measure, script=wgan_gp, **settings):
    """measure(iteration, config), where script.train would make its rounds; nothing is saved"""
    results = []

    def rounds(iteration, config, rows):
        results.append(measure(iteration, config))
        return ()
    with patched(script, rounds=rounds, save_animation=lambda *_: None), \
            contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as out:
        script.train(out=out, **settings)
    return results[0]


def train(warm, steps, script=wgan_gp, **settings):
    """Seconds per step of script.train, after warm steps, its saving left out"""
    return instead(lambda iteration, _: seconds_of(iteration, warm, steps), script, **settings)


def usual(rounds=5):
    images = common.load_images("mnist", size=28)
    pairs = []
    with patched(Generator=MLPGenerator, Critic=MLPCritic, load_images=lambda *_: images):
        for _ in range(rounds):
            theirs = usual_step("wgan_gp", (MLPGenerator(), MLPCritic()), transforms.Resize(28)).__next__
            pairs.append((train(5, 100, device="cpu"), seconds_of(theirs, 6, 60)))
            ours, theirs = pairs[-1]
            print(f"  critic updates/s: wgan_gp.py {5 / ours:.0f}, the usual way {5 / theirs:.0f}, "
                  f"ratio {theirs / ours:.2f}")
    ratio = median(theirs / ours for ours, theirs in pairs)
    print(f"usual: MLP 784-512-256-1 / 100-128-256-512-1024-784, batch 64: median ratio {ratio:.2f}")


def usual_step(name, networks=None, resize=transforms.Pad(2), device="cpu", reals=None):
    """At every next() but the first a step of a script, with its networks (or others), as is commonly written: a
    DataLoader that transforms image by image (or other batches, reals), torch's default optimizers (not fused) and
    memory format, gradients for D's weights, too, in G's steps; with a gradient penalty G's also in D's, where
    generated images are not detached; in EBGAN the generated images encoded twice"""
    script, m = importlib.import_module(name), 16 if name == "progan" else 64
    steps_per_image = [resize, transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
    mnist = datasets.MNIST(common.ROOT, download=True, transform=transforms.Compose(steps_per_image))
    loader = torch.utils.data.DataLoader(mnist, m, shuffle=True, drop_last=True)
    reals = reals or (real.to(device) for _ in itertools.count() for real, _ in loader)
    if name == "progan":
        G, D = script.Generator(32, 1, 128, 64, 64), script.Discriminator(32, 1, 128, 64)
        G.shown.fill_(10**9)                                # so that G(z) has 32x32 pixels
        G_ema, nz, drift = copy.deepcopy(G), 64, 0.001
    else:
        second = script.Critic if name.startswith("wgan") else script.Discriminator
        (G, D), nz, drift = networks or (script.Generator(), second()), 100, 0
    G, D = G.to(device), D.to(device)
    optimizer = {"wgan": lambda w: torch.optim.RMSprop(w, 5e-5), "wgan_gp": lambda w: torch.optim.Adam(w, 1e-4),
                 "lsgan": lambda w: torch.optim.Adam(w, 2e-4)}.get(name, lambda w: torch.optim.Adam(w, 1e-3))
    opt_G, opt_D = optimizer(G.parameters()), optimizer(D.parameters())
    mse, ones, zeros = nn.MSELoss(), torch.ones(m, device=device), torch.zeros(m, device=device)

    def update(opt, loss):
        opt.zero_grad()
        loss.backward()
        opt.step()

    def energy(x):
        return torch.linalg.vector_norm(D(x) - x, dim=(1, 2, 3))
    while True:
        yield
        for _ in range(5 if name.startswith("wgan") else 1):
            real, fake = next(reals), G(torch.randn(m, nz, device=device))
            if name == "wgan":
                update(opt_D, D(fake.detach()).mean() - D(real).mean())
                for each in D.parameters():
                    each.data.clamp_(-0.01, 0.01)
            elif name == "lsgan":
                update(opt_D, (mse(D(real), ones) + mse(D(fake.detach()), zeros)) / 2)
            elif name == "ebgan":
                update(opt_D, energy(real).mean() + F.relu(10 - energy(fake.detach())).mean())
            else:
                alpha = torch.rand(m, 1, 1, 1, device=device)
                between = (alpha * real + (1 - alpha) * fake).requires_grad_(True)
                scores = D(between)
                grad = torch.autograd.grad(scores, between, grad_outputs=torch.ones_like(scores), create_graph=True,
                                           retain_graph=True)[0]
                penalty = ((grad.view(m, -1).norm(2, dim=1) - 1) ** 2).mean()
                scores = D(real)
                update(opt_D, D(fake).mean() - scores.mean() + 10 * penalty + drift * (scores ** 2).mean())
        if name == "lsgan":
            update(opt_G, mse(D(fake), ones) / 2)
        elif name == "ebgan":
            codes = D.encode(fake).view(m, -1)
            codes = codes / codes.norm(dim=1, keepdim=True)
            update(opt_G, energy(fake).mean() + 0.1 * ((codes @ codes.t()) ** 2).sum() / m ** 2)
        else:
            update(opt_G, -D(G(torch.randn(m, nz, device=device))).mean())
        if name == "progan":
            for average, now in zip(G_ema.parameters(), G.parameters()):
                average.data.mul_(0.999).add_(now.data, alpha=0.001)


def seconds_of(iteration, warm, steps):
    """Seconds per step, after warm steps"""
    for _ in range(warm):
        iteration()
    began = time.perf_counter()
    for _ in range(steps):
        iteration()
    return (time.perf_counter() - began) / steps


def settings_of(name):
    """Of a step whose speed is that of most of the run: progan.py's last resolution, as in the README's line"""
    return dict(fmap_base=128, fmap_max=64, nz=64, kimg=0.001) if name == "progan" else {}


def flops_of(script, settings, at=10):
    """Floating-point operations of step at; by step 10 progan.py has grown, with settings_of it"""
    counter = Flops()

    def counted(iteration, _):
        for _ in range(1, at):
            iteration()
        with counter:
            iteration()
    instead(counted, script, device="cpu", **settings)
    return counter.count


def peak_of(name, settings, steps=200):
    """MiB at the end and at the peak, of a process that trains all ten digits"""
    job = (f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]; import benchmark, {name}; "
           f"{name}.train(steps={steps}, out='run', device='cpu', **{settings}); "
           f"print(*benchmark.resident())")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", job], cwd=folder, capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()[-2:]]


def scripts(rounds=5, steps=20):
    rows = []
    for name in ("wgan", "wgan_gp", "lsgan", "ebgan", "progan"):
        script, settings = importlib.import_module(name), settings_of(name)
        flops, pairs, shares = flops_of(script, settings), [], []
        for _ in range(rounds):
            rate = matrix_rate()
            ours = train(20, steps, script, device="cpu", **settings)
            pairs.append((ours, seconds_of(usual_step(name).__next__, 21, steps)))
            shares.append(flops / ours / ((rate + matrix_rate()) / 2))
        ours, theirs = (median(each) for each in zip(*pairs))
        ratios = [theirs / ours for ours, theirs in pairs]
        print(f"  {name}: ratios {' '.join(f'{ratio:.2f}' for ratio in ratios)}, "
              f"shares {' '.join(f'{share:.0%}' for share in shares)}", flush=True)
        images = 16 if name == "progan" else 64 * (5 if name.startswith("wgan") else 1)
        rows.append([f"{name}.py", f"{1000 * ours:.0f}", f"{images / ours:,.0f}", f"{median(ratios):.2f}",
                     f"{flops / 1e9:.2f}", f"{median(shares):.0%}", f"{peak_of(name, settings)[1]:.0f}"])
    print("| script | ms per step | images per second | times the usual way | GFLOP per step | of the matrix rate "
          "| peak MiB |\n" + "|---" * 7 + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


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
    flops = flops_of(wgan_gp, dict(width=64), at=1)
    shares = []
    for _ in range(rounds):
        before = matrix_rate()
        seconds = train(1, 4, width=64, device="cpu")
        rate = (before + matrix_rate()) / 2
        shares.append(flops / seconds / rate)
        print(f"  {flops / 1e9:.1f} GFLOP a step in {seconds:.2f} s: "
              f"{flops / seconds / 1e9:.0f} of {rate / 1e9:.0f} GFLOP/s, {shares[-1]:.0%}")
    print(f"matrix: width 64, 32x32, batch 64: median share of the matrix rate {median(shares):.0%}")


def profile(warm=10, steps=10):
    for name in ("wgan", "wgan_gp", "lsgan", "ebgan", "progan"):
        script, profiler = importlib.import_module(name), torch.profiler.profile(activities=[ProfilerActivity.CPU])

        def profiled(iteration, _):
            seconds_of(iteration, 0, warm)
            with profiler:
                seconds_of(iteration, 0, steps)
        instead(profiled, script, device="cpu", **settings_of(name))
        events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in events)
        print(f"profile: {name}: {total / 1000 / steps:.0f} ms a step: " + ", ".join(
            f"{event.key.removeprefix('aten::')} {event.self_cpu_time_total / total:.0%}" for event in events[:8]))


def resident():
    """MiB of this process (Linux): now, and at its peak"""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))


def memory(early=10, late=1000):
    original, sizes, steps = wgan_gp.rounds, {}, itertools.count(1)

    def watched(iteration, *others):
        def counted():
            losses = iteration()
            if (step := next(steps)) in (early, late):
                sizes[step] = resident()
            return losses
        return original(counted, *others)
    with patched(rounds=watched), tempfile.TemporaryDirectory() as out:
        wgan_gp.train(digit=7, steps=late + 1, device="cpu", out=out)
    for step, (now, peak) in sizes.items():
        print(f"  step {step}: {now:.0f} MiB, peak {peak:.0f} MiB")
    print(f"memory: default command: peak {sizes[late][1]:.0f} MiB, growth from step {early} to {late}: "
          f"{sizes[late][0] - sizes[early][0]:+.0f} MiB")


def grown(size, kimg, growing):
    """Seconds of training for the images of a whole schedule, and their number; feature maps: table 2's / 8"""
    def whole(iteration, config):
        return config["steps"] * seconds_of(iteration, 0, config["steps"]), config["steps"] * 16
    with patched(progan, schedule=progan.schedule if growing else lambda *_: (0, size, 1.0)):
        return instead(whole, progan, digit=7, size=size, channels=3, kimg=kimg, fmap_base=1024, fmap_max=64,
                       device="cpu")


def operations(size):
    """Operations per image in every phase of table 2's networks, on tensors without memory; the last phase last"""
    def phases(iteration, _):
        counts = []
        for phase in range(2 * size.bit_length() - 5):
            place = phase, 4 << (phase + 1) // 2, 0.5 if phase % 2 else 1.0
            with patched(progan, schedule=lambda *_: place), Flops() as counter:
                iteration()
            counts.append(counter.count / 2)
        return counts

    def nothing(images, m, device):
        return itertools.repeat(torch.empty(m, *images.shape[1:], device=device))
    images = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    with patched(progan, batches=nothing, save_images=lambda *_: None, load_images=lambda *_: images), \
            patched(torch.Tensor, item=lambda _: 0), \
            patched(torch.optim, Adam=lambda weights, *_, **__: torch.optim.SGD(weights, 0.1)):
        return instead(phases, progan, size=size, channels=3, batch_size=2, device="meta")


def growing(rounds=3):
    for size, kimg in ((64, 0.08), (128, 0.048)):
        ratios = []
        for _ in range(rounds):
            (fast, n), (slow, same) = (grown(size, kimg, way) for way in (True, False))
            assert n == same
            ratios.append(slow / fast)
            print(f"  {size}x{size}, {n} images: {fast:.1f} s growing, {slow:.1f} s at {size}x{size} all along, "
                  f"ratio {ratios[-1]:.2f}", flush=True)
        print(f"growing: {size}x{size}: median ratio {median(ratios):.2f}")
    for size in (64, 128, 1024):
        counts = operations(size)
        print(f"growing: {size}x{size}, operations with table 2's feature maps: "
              f"{sum(counts) / len(counts) / 1e9:.1f} GFLOP per image on average, "
              f"{counts[-1] / 1e9:.1f} at the last resolution: "
              f"ratio {counts[-1] * len(counts) / sum(counts):.2f}")


def large():
    job = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}]
import benchmark, progan, torch
size, m = map(int, sys.argv[1:])
progan.schedule = lambda *_: (0, size, 0.5)                 # a fade: both paths
progan.load_images = lambda *_: torch.randint(256, (m, 3, size, size), dtype=torch.uint8)
seconds = benchmark.train(0, 1, progan, size=size, channels=3, batch_size=m, device="cpu")
print(f"step of {{m}} images: {{seconds:.1f}} s, peak {{benchmark.resident()[1]:.0f}} MiB")
"""
    for size, m in ((256, 3), (512, 2), (1024, 1)):
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([sys.executable, "-c", job, str(size), str(m)], cwd=folder, capture_output=True,
                                  text=True)
        lines = [line for line in done.stdout.splitlines() if "peak" in line]
        print(f"large: {size}x{size}:", *lines or [done.stderr[-500:]], flush=True)


def processor():
    """Its name (Linux)"""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


if __name__ == "__main__":
    modes = dict(scripts=scripts, usual=usual, matrix=matrix, profile=profile, memory=memory, growing=growing,
                 large=large)
    names = sys.argv[1:] or list(modes)
    if unknown := set(names) - set(modes):
        sys.exit(f"benchmark.py: {', '.join(sorted(unknown))}: not one of {', '.join(modes)}")
    if len(names) > 1:                                      # each in a process of its own, for the memory
        for name in names:
            subprocess.run([sys.executable, __file__, name], check=True)
        sys.exit()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA"
    print(f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
          f"Python {platform.python_version()}, torch {torch.__version__}, {gpu}", flush=True)
    modes[names[0]]()
