"""What only a GPU can tell: python measure/gpu.py [NAME...]

Without a name, all of them:

tests     the tests marked cuda
kernels   three steps of the five on the CPU and on CUDA with the same noise, TF32 off and on: the distance of the
          weights from one another, as a share of the way they went
recorded  12 steps, eager and with --graph, TF32 off and on: the same share, and whether all is equal to the bit
speed     milliseconds per step, medians of rounds by turns: the usual way, the usual way with images on the GPU,
          eager, --graph; the share of the time in which the GPU waits; also with multilayer perceptrons
shelf     milliseconds per step of the scripts in related/
large     progan.py: milliseconds per step, images per second, and memory, with table 2's networks in a fade
runs      the README's commands for one digit: seconds
"""
import contextlib
import importlib
import inspect
import io
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import benchmark  # noqa: E402
import common  # noqa: E402

FOUR = ["wgan", "wgan_gp", "lsgan", "ebgan"]
SHELF = [f"related.{name}" for name in ("sngan", "dragan", "ctgan", "ls_gan", "improved_gan", "semi_supervised")]
OWN = {"progan": dict(fmap_max=16, kimg=0.016), "related.semi_supervised": dict(size=28, labels=10)}
PROGAN = dict(fmap_base=128, fmap_max=64, nz=64, lr=0.005, kimg=3.0, ema=0.99, steps=6000)      # the README's line


def say(*words):
    print(*words, flush=True)


@contextlib.contextmanager
def silent():
    """A run folder that does not stay, and no lines"""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        yield Path(folder, "run")


def tiny(name, **settings):
    """The checkpoint of a few steps with small networks"""
    script = importlib.import_module(name)
    small = dict(digit=7, size=16, batch_size=8, nz=8) | OWN.get(name, {}) | settings
    known = inspect.signature(script.train).parameters
    with silent() as out:
        script.train(out=out, **{key: it for key, it in small.items() if key in known})
        return torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)


@contextlib.contextmanager
def exact():
    """TF32 off, and deterministic kernels"""
    cudnn, matmul = torch.backends.cudnn, torch.get_float32_matmul_precision()
    before = cudnn.allow_tf32
    cudnn.allow_tf32, cudnn.deterministic = False, True
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.deterministic = before, False
        torch.set_float32_matmul_precision(matmul)


@contextlib.contextmanager
def same_noise():
    """Random numbers come from the CPU's generator, on whatever device they are asked for"""
    def on_cpu(make):
        return lambda *args, device=None, **kwargs: make(*args, **kwargs).to(device or "cpu")
    with contextlib.ExitStack() as patches:
        for name in ("randn", "rand", "randint"):
            patches.enter_context(patch.object(torch, name, on_cpu(getattr(torch, name))))
        yield


def share(a, b, start):
    """‖a - b‖ / ‖a - start‖ over all weights of G, and of D. (A norm: Adam's first steps turn the sign of a
    gradient that is nearly 0 into a whole step, so that single weights can differ)"""
    def far(x, y, part):
        return sum((x[part][key].double() - y[part][key]).square().sum().item() for key in x[part]) ** 0.5
    return ", ".join(f"{part} {far(a, b, part) / far(a, start, part):.1e}" for part in "GD")


def equal(a, b):
    """Whether the networks, the logs but for their seconds, and the random states are equal to the bit"""
    rows = [[{key: it for key, it in row.items() if key != "seconds"} for row in each["rows"]] for each in (a, b)]
    return rows[0] == rows[1] and all(
        torch.equal(x, y) for part in "GD" for x, y in zip(a[part].values(), b[part].values())) and all(
        torch.equal(a[key], b[key]) for key in ("random", "random_cuda"))


def timed(script, n, networks=None, **settings):
    """Milliseconds per step on CUDA of n steps after n others, saving left out"""
    moments = []

    def save(out, config, states, rows):                    # rounds has waited for the losses
        moments.append(rows[-1]["seconds"])
    nothing = dict.fromkeys(["save_images", "save_animation"], lambda *_: None)
    with benchmark.patched(script, save=save, **nothing, **networks or {}), silent() as out:
        script.train(steps=2 * n, save_every=n, out=out, device="cuda", **settings)
    return 1000 * (moments[1] - moments[0]) / n


def usual(n, *args, **kwargs):
    """Milliseconds per step of the usual way on CUDA, of n steps after 5 others"""
    step = benchmark.usual_step(*args, device="cuda", **kwargs).__next__
    benchmark.seconds_of(step, 0, 6)                        # the first one only begins
    torch.cuda.synchronize()
    began = time.perf_counter()
    benchmark.seconds_of(step, 0, n)
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began) / n


def busy(script, warm=10, steps=10, **settings):
    """Milliseconds per step in which one of the GPU's kernels runs"""
    profiler = torch.profiler.profile(activities=[ProfilerActivity.CUDA])

    def profiled(iteration, _):
        torch.backends.cudnn.benchmark = True               # as rounds sets it
        benchmark.seconds_of(iteration, 0, warm)
        torch.cuda.synchronize()
        with profiler:
            benchmark.seconds_of(iteration, 0, steps)
            torch.cuda.synchronize()
    benchmark.instead(profiled, script, device="cuda", **settings)
    kernels = (event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return sum(event.time_range.elapsed_us() for event in kernels) / 1000 / steps


# ---- Sections ----------------------------------------------------------------------------------------------------

def tests():
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "-rfE"],
                          cwd=common.ROOT.parent, capture_output=True, text=True)
    say("\n".join(done.stdout.splitlines()[-25:]), done.stderr[-1000:])
    assert done.returncode == 0, "a test marked cuda failed"


def kernels():
    for name in (*FOUR, "progan"):
        on_cuda = dict(steps=3, device="cuda")
        with same_noise():
            start, cpu = tiny(name, steps=1, lr=0.0, device="cpu"), tiny(name, steps=3, device="cpu")
            with exact():
                close = tiny(name, **on_cuda)
            say(f"{name}: exact {share(cpu, close, start)}; as usual {share(cpu, tiny(name, **on_cuda), start)}")


def recorded():
    for name in (*FOUR, *SHELF):
        start = tiny(name, steps=1, lr=0.0, device="cuda")
        for how, context in (("exact", exact), ("as usual", contextlib.nullcontext)):
            with context():
                a, b = (tiny(name, steps=12, save_every=1, device="cuda", graph=graph) for graph in (False, True))
            say(f"{name}, {how}: {share(a, b, start)}, {'equal' if equal(a, b) else 'not equal'} to the bit")


def speed(rounds=3):
    say("script, width | the usual way | with resident images | eager | --graph | GPU waits: eager, graph | MiB")
    mlp = dict(Generator=benchmark.MLPGenerator, Critic=benchmark.MLPCritic)
    cases = [(name, width) for width in (16, 64) for name in FOUR] + [("wgan_gp", "MLP")]
    for name, width in cases:
        script, networks, settings = importlib.import_module(name), {}, dict(width=width)
        pixels = common.load_images()
        second = "Critic" if name.startswith("wgan") else "Discriminator"
        make = [getattr(script, each) for each in ("Generator", second)]
        if width == "MLP":
            pixels, networks, settings, make = common.load_images(size=28), mlp, {}, mlp.values()
        torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(rounds):
            pairs = [[each(**settings) for each in make] for _ in range(2)]
            resize = benchmark.transforms.Pad(0 if networks else 2)
            times.append((
                usual(15, name, pairs[0], resize),
                usual(30, name, pairs[1], resize, reals=common.batches(pixels, 64, "cuda")),
                *(timed(script, n, networks | dict(load_images=lambda *_: pixels), graph=graph, **settings)
                  for graph, n in ((False, 60), (True, 400)))))
        a, b, eager, fast = (median(column) for column in zip(*times))
        waits = "not measured"
        if not networks:
            kernel = busy(script, **settings)
            waits = f"{1 - kernel / eager:.0%}, {1 - kernel / fast:.0%} ({kernel:.2f} ms)"
        say(f"{name}, {width} | {a:.2f} | {b:.2f} | {eager:.2f} | {fast:.2f} ms | {waits} | "
            f"{torch.cuda.max_memory_allocated() >> 20}   "
            + " ".join(f"{min(column):.2f}-{max(column):.2f}" for column in zip(*times)))


def shelf():
    for name in SHELF:
        eager, fast = (timed(importlib.import_module(name), n, graph=it) for it, n in ((False, 60), (True, 300)))
        say(f"{name}: {eager:.2f} ms eager, {fast:.2f} with --graph")


def large():
    progan = importlib.import_module("progan")
    ms = timed(progan, 300, **benchmark.settings_of("progan"))
    say(f"progan 32x32, the README's line: {ms:.1f} ms a step")
    for size, m in ((128, 16), (256, 14), (1024, 3)):
        images = torch.randint(256, (4 * m, 3, size, size), dtype=torch.uint8)
        torch.cuda.reset_peak_memory_stats()
        ms = timed(progan, 20, dict(schedule=lambda *_: (0, size, 0.5), load_images=lambda *_: images),
                   size=size, channels=3, batch_size=m)
        say(f"progan {size}x{size}, {m} images: {ms:.1f} ms a step, {1000 * m / ms:.0f} images/s, "
            f"{torch.cuda.max_memory_allocated() >> 20} MiB")


def runs():
    for name, settings in (*((name, {}) for name in FOUR), ("progan", PROGAN)):
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()) as text:
            began = time.perf_counter()
            importlib.import_module(name).train(digit=7, device="cuda", out=Path(out, "run"), **settings)
            seconds = time.perf_counter() - began
            if "OUT" in os.environ:                         # the pictures to look at
                last = sorted(Path(out, "run").glob("0*.png"))[-1]
                Path(os.environ["OUT"], f"{name}.png").write_bytes(last.read_bytes())
        say(f"{name}: {seconds:.0f} s: {text.getvalue().splitlines()[-1]}")


if __name__ == "__main__":
    sections = dict(tests=tests, kernels=kernels, recorded=recorded, speed=speed, shelf=shelf, large=large,
                    runs=runs)
    names = sys.argv[1:] or list(sections)
    if unknown := set(names) - set(sections):
        sys.exit(f"gpu.py: {', '.join(sorted(unknown))}: not one of {', '.join(sections)}")
    if not torch.cuda.is_available():
        sys.exit("gpu.py: no CUDA here")
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    failed = []
    for each in names:
        began = time.monotonic()
        try:
            sections[each]()
        except Exception:                                   # the other sections still say what they can
            traceback.print_exc(limit=-6)
            failed.append(each)
        say(f"-- {each}: {time.monotonic() - began:.0f} s")
    sys.exit(f"gpu.py: failed: {', '.join(failed)}" if failed else 0)
