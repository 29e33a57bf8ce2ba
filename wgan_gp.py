"""WGAN-GP, "Improved Training of Wasserstein GANs", https://arxiv.org/abs/1704.00028 (2017)
Ishaan Gulrajani, Faruk Ahmed, Martin Arjovsky, Vincent Dumoulin, Aaron Courville

The critic D gives every image a score. As long as D is 1-Lipschitz, its mean score on real images minus that on
generated ones is at most the Wasserstein distance of the two: D raises that difference, G lowers it. WGAN keeps D
Lipschitz by clipping its weights; here D pays wherever the norm of its gradient, at random points between real and
generated images, is not 1.

    L = E[D(x_tilde)] - E[D(x)] + λ E[(‖∇_x_hat D(x_hat)‖₂ - 1)²]      (3)

Differs from the paper, or from its authors' code:
- Networks: the DCGAN of the first WGAN's code, the critic without batch norm and with biases, on 32x32 pixels in
  [-1, 1]. The authors' differ from script to script; for MNIST 5x5 kernels, 28x28 pixels in [0, 1].
- --width 16, --steps 4000, for two CPU cores and minutes. The DCGAN has width 64; the authors took 200,000 steps.
- Initialisation: torch's default; the authors' is uniform He/Glorot, DCGAN's N(0, 0.02).
- z has 100 dimensions, as in DCGAN (the authors: 128), and m = 64 is as in most of their scripts (MNIST: 50).
- β₁ = 0, as Algorithm 1 says; 0.5 in appendix E and in most of the authors' scripts.
Measured: `python wgan_gp.py --dataset mnist --digit 7`, 2 EPYC cores, torch 2.15: 12 min, estimate from 31 to 0.46.
"""
import argparse
import contextlib
import inspect
import math
import os
import pickle
import re
import signal
import threading
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn

from common import batches, channels_of, load_images, replacing, save_animation, save_each, save_images

# ---- Networks: 4x4 kernels, as in DCGAN; from 4x4 pixels on every layer doubles or halves the image --------------

class Generator(nn.Sequential):
    """G(z): latents -> images in [-1, 1].  (m, nz) -> (m, channels, size, size).  ValueError for another size"""
    def __init__(self, nz=100, channels=1, size=32, width=16):
        if size not in (16, 32, 64, 128, 256):
            raise ValueError(f"--size must be 16, 32, 64, 128 or 256, not {size}")
        n = width * size // 8
        layers = [nn.Unflatten(1, (nz, 1, 1)), nn.ConvTranspose2d(nz, n, 4, 1, 0, bias=False)]      # (m, n, 4, 4)
        while n > width:
            layers += [nn.BatchNorm2d(n), nn.ReLU(True), nn.ConvTranspose2d(n, n // 2, 4, 2, 1, bias=False)]
            n //= 2                                             # (m, n, 8, 8), ..., (m, width, size/2, size/2)
        layers += [nn.BatchNorm2d(n), nn.ReLU(True), nn.ConvTranspose2d(n, channels, 4, 2, 1, bias=False)]
        super().__init__(*layers, nn.Tanh())                    # (m, channels, size, size)


class Critic(nn.Sequential):
    """D(x): images -> scores.  (m, channels, size, size) -> (m,).  No batch norm (§4): D(x) depends on x alone"""
    def __init__(self, channels=1, size=32, width=16):
        if size not in (16, 32, 64, 128, 256):
            raise ValueError(f"--size must be 16, 32, 64, 128 or 256, not {size}")
        n = width
        layers = [nn.Conv2d(channels, n, 4, 2, 1), nn.LeakyReLU(0.2)]               # (m, n, size/2, size/2)
        while n < width * size // 8:
            layers += [nn.Conv2d(n, 2 * n, 4, 2, 1), nn.LeakyReLU(0.2)]
            n *= 2                                              # (m, n, size/4, size/4), ..., (m, n, 4, 4)
        super().__init__(*layers, nn.Conv2d(n, 1, 4, 1, 0), nn.Flatten(0))          # (m, 1, 1, 1), (m,)


# ---- The norm in the penalty (§4) --------------------------------------------------------------------------------

def grad_norm(D, x):
    """‖∇_x D(x)‖₂ of every image x, itself differentiable.  (m, C, H, W) -> (m,)"""
    x = x.detach().requires_grad_()
    # D scores each image on its own (so: no batch norm in D). The gradient of the summed
    # scores is therefore, image by image, the gradient of that image's own score.
    (grad,) = torch.autograd.grad(D(x).sum(), x, create_graph=True)
    return torch.linalg.vector_norm(grad, dim=(1, 2, 3))    # unlike sqrt(sum of squares), not nan at grad = 0


# ---- Algorithm 1 -------------------------------------------------------------------------------------------------

def train(
    # Algorithm 1: "default values of λ = 10, n_critic = 5, α = 0.0001, β₁ = 0, β₂ = 0.9"
    lam=10.0,               # λ         weight of the gradient penalty
    n_critic=5,             # n_critic  critic updates per generator update
    lr=1e-4,                # α         Adam: step size
    beta1=0.0,              # β₁        Adam: decay of the first moment
    beta2=0.9,              # β₂        Adam: decay of the second moment
    batch_size=64,          # m         images per batch
    # The networks
    nz=100,                 # z         dimensions of the latent variable
    width=16,               #           feature maps at size/2 pixels; 16: minutes on a CPU, 64: the papers' DCGAN
    # The images
    dataset="mnist",        # P_r       mnist, fashion-mnist, cifar10, or the path of a folder of images
    digit: int = None,      #           only this class, 0 to 9
    root: str = None,       #           where data sets are kept (data/ beside common.py)
    size=32,                #           width and height in pixels: 16, 32, 64, 128 or 256
    channels: int = None,   #           1 grey, 3 RGB (what the data set has; a folder: 3)
    # The run
    steps=4000,             #           generator updates
    seed=0,                 #           of every random number but the pictures' latents
    device="auto",          #           cuda if there is one, else cpu; or any torch device: cuda:1, mps, ...
    out: str = None,        #           run folder (runs/SCRIPT-DATASET-DIGIT)
    save_every=100,         #           steps between rows of the log, pictures and checkpoints
    record=False,           #           CUDA: record one step as a graph and replay it
):
    """Algorithm 1.  Returns G, D.  ValueError or OSError, one sentence, for settings or files that do not fit;
    KeyboardInterrupt after Ctrl-C, when everything is saved"""
    config, device, out = start(locals())
    G = Generator(nz, config["channels"], size, width).to(device, memory_format=torch.channels_last)
    D = Critic(config["channels"], size, width).to(device, memory_format=torch.channels_last)
    theta, w = list(G.parameters()), list(D.parameters())
    opt_G = torch.optim.Adam(theta, lr, (beta1, beta2), fused=True, capturable=record)
    opt_D = torch.optim.Adam(w, lr, (beta1, beta2), fused=True, capturable=record)
    images = load_images(dataset, digit, size, root, config["channels"])
    P_r = batches(images, batch_size, device, resident=record)
    save_images(next(P_r)[:64], out / "real.png")
    log = {}

    for step in run(config, out, log, G=G, D=D, opt_G=opt_G, opt_D=opt_D):  #  1: while θ has not converged do
        for _ in range(n_critic):                             #  2:   for t = 1, ..., n_critic do
                                                              #  3:     for i = 1, ..., m do   (batch dimension)
            x = next(P_r)                                     #  4:       sample real data x ~ P_r,
            z = torch.randn(len(x), nz, device=device)        #             latent variable z ~ p(z),
            eps = torch.rand(len(x), 1, 1, 1, device=device)  #             a random number ε ~ U[0, 1]
            with torch.no_grad():
                x_tilde = G(z)                                #  5:       x_tilde ← G_θ(z)
            x_hat = eps * x + (1 - eps) * x_tilde             #  6:       x_hat ← ε x + (1 − ε) x_tilde
            # One pass for both scores is faster, and without batch norm no image sees another.
            D_x_tilde, D_x = D(torch.cat([x_tilde, x])).chunk(2)
            penalty = (grad_norm(D, x_hat) - 1) ** 2
            L = D_x_tilde - D_x + lam * penalty               #  7:       L ← D_w(x_tilde) − D_w(x)
                                                              #               + λ (‖∇_x_hat D_w(x_hat)‖₂ − 1)²
                                                              #  8:     end for
            opt_D.zero_grad()
            L.mean().backward(inputs=w)                       #  9:     w ← Adam(∇_w 1/m Σ L, w, α, β₁, β₂)
            opt_D.step()
                                                              # 10:   end for
        z = torch.randn(batch_size, nz, device=device)        # 11:   sample a batch of latent variables z ~ p(z)
        L_G = -D(G(z))
        opt_G.zero_grad()
        L_G.mean().backward(inputs=theta)                     # 12:   θ ← Adam(∇_θ 1/m Σ −D_w(G_θ(z)), θ, α, β₁, β₂)
        opt_G.step()
        log.update(L_D=L.mean(), L_G=L_G.mean(), penalty=penalty.mean(), wasserstein=(lam * penalty - L).mean())
                                                              # 13: end while
    return G, D


# ---- The run: the same in every script; nothing below is in the paper --------------------------------------------

SCRIPT = Path(__file__).stem


def start(config):
    """The settings of train(), checked before anything is loaded or written -> (config, device, run folder)"""
    config = {name: str(it) if isinstance(it, (Path, torch.device)) else it for name, it in config.items()}
    for name, value in config.items():
        if type(value) not in (bool, int, float, str, type(None)):      # numpy's: the checkpoint could not be read
            raise ValueError(f"{flag(name)} must be a plain Python number or string, not a {type(value).__name__}")
    config["script"], dataset = SCRIPT, os.path.expanduser(config["dataset"])
    config["channels"] = channels_of(dataset) if config["channels"] is None else config["channels"]
    least = dict.fromkeys("steps batch_size save_every n_critic nz width channels".split(), 1)
    least |= dict.fromkeys("lr beta1 beta2 lam pt margin pretrain".split(), 0)
    least |= dict.fromkeys("abc", -2**31) if "a" in config else {"c": 0}     # LSGAN's labels, WGAN's bound
    for name in config.keys() & least.keys():
        below = 1 if name.startswith("beta") else 2**31
        if not least[name] <= config[name] < below:
            raise ValueError(f"{flag(name)} must be at least {least[name]} and below {below}, not {config[name]}")
    device, out = find_device(config["device"]), run_folder(config["out"], dataset, config["digit"])
    if out.is_dir() and Path(dataset).is_dir() and out.samefile(dataset):
        raise ValueError(f"--out {out} is the folder of the images: name another folder")
    if config["record"] and device.type != "cuda":
        raise ValueError(f"--record records CUDA steps, and the device is {device}: leave it out")
    if config["record"] and (config.get("authors_loop") or config.get("pretrain")):
        raise ValueError("--record repeats one step: leave it out with --authors-loop or --pretrain")
    saved = read(out)
    for name in config if saved else ():
        old, new = saved["config"].get(name), config[name]
        if old != new and name not in ("steps", "device", "out", "root", "save_every", "record"):
            raise ValueError(f"{out} was trained {given(name, old)}, not {given(name, new)}: "
                             f"give the same to continue, or name another folder with --out")
    print(f"device: {device}\nrun folder: {out}", flush=True)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    torch.manual_seed(config["seed"] % 2**63)
    return config, device, out


def flag(name):
    """A setting's name on the command line"""
    return "--" + name.replace("_", "-")


def given(name, value):
    """How a setting was given on the command line"""
    if value is None or value is False:
        return f"without {flag(name)}"
    return f"with {flag(name)}" + ("" if value is True else f" {value}")


def find_device(name):
    """"auto", or what torch.device takes -> torch.device.  ValueError if it is not on this machine"""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        probe = torch.ones(1, device=name)
        probe.item()
        return probe.device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} is not on this machine ({reason}): use --device cpu") from error


def run_folder(out, dataset, digit):
    """OUT, or runs/SCRIPT-DATASET-DIGIT"""
    name = [SCRIPT, Path(os.path.expanduser(dataset)).resolve().name, *([] if digit is None else [str(digit)])]
    return Path(os.path.expanduser(out or Path("runs", "-".join(name))))


def read(out):
    """The checkpoint in the folder out, None if there is none.  ValueError if it is damaged or another script's"""
    path = Path(out, "checkpoint.pt")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # about foreign pickles, which the sentence below is about
            saved = torch.load(path, map_location="cpu", weights_only=True)
        script, _ = saved["config"]["script"], saved["step"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError:
        raise
    except (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError,
            pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint: remove it, or name another --out") from error
    if script != SCRIPT:
        raise ValueError(f"{path} was written by {script}.py, not {SCRIPT}.py: name another folder with --out")
    return saved


def images_seen(config, steps):
    """Real images drawn for D in so many steps"""
    updates = steps * config.get("n_critic", 1)
    if config.get("authors_loop"):
        updates += (100 - config["n_critic"]) * (min(steps, 25) + max(steps - 1, 0) // 500)
    return updates * config["batch_size"]


def run(config, out, log, **state):
    """Yields the steps left to do. Around them it restores, logs, saves, shows progress and obeys Ctrl-C.

    log    the losses of a step by name, scalar tensors, put in by the loop; a row is their mean since the last row
    state  everything with a state_dict, by its name in the checkpoint
    ValueError if a loss or weight is not finite; KeyboardInterrupt after SIGINT or SIGTERM, once all is saved.
    """
    G, steps, device = state["G"], config["steps"], next(state["G"].parameters()).device
    fixed_z = torch.randn(64, config["nz"], generator=torch.Generator().manual_seed(0)).to(device)
    random = [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]
    total, count, rows, first, seconds, saved = {}, 0, [], 0, 0.0, read(out)
    if saved:
        rows, first, seconds = saved["log"], saved["step"], saved["seconds"]
        for name, part in state.items():
            if "param_groups" in saved[name]:   # equal settings, but fused and capturable are for this device
                saved[name]["param_groups"] = part.state_dict()["param_groups"]
            part.load_state_dict(saved[name])
        for module, rng in zip(random, saved["rng"]):
            module.set_rng_state(rng)
        print(f"{first} of {steps} steps are done: {'continuing' if first < steps else 'finished'}", flush=True)
    graph, side = (torch.cuda.CUDAGraph(), torch.cuda.Stream()) if config["record"] else (None, None)
    stop, handlers, good, begin = [], {}, first, time.perf_counter()
    shown = begin
    if threading.current_thread() is threading.main_thread():
        handlers = {s: signal.signal(s, lambda *_: stop.append(True)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        for step in range(first, steps):
            # --record: three steps run on a side stream; the fourth is recorded there, and from then on replayed.
            context = contextlib.nullcontext()
            if graph and step < first + 4:
                torch.cuda.synchronize()
                context = torch.cuda.stream(side) if step < first + 3 else torch.cuda.graph(graph, stream=side)
            if not graph or step < first + 4:
                with context:
                    yield step
                    for name, value in log.items():
                        if name not in total:
                            total[name] = torch.zeros_like(value)
                        total[name] += value.detach()
            if graph:
                torch.cuda.synchronize() if step < first + 3 else graph.replay()

            count, done, last = count + 1, step + 1, step + 1 == steps or bool(stop)
            save = last or done % config["save_every"] == 0
            if not save and time.perf_counter() - shown < 5:
                continue
            means = {name: value.item() / count for name, value in total.items()}
            broken = [name for name, value in means.items() if not math.isfinite(value)]
            broken += [name for name in "GD"
                       if not all(value.isfinite().all() for value in state[name].state_dict().values())]
            if broken:
                kept = f"{out} keeps the checkpoint of step {good}" if good else "there is no checkpoint yet"
                raise ValueError(f"{', '.join(broken)} not finite at step {done} ({kept}): try a smaller --lr"
                                 + ", with another --out" * bool(good))
            shown = now = time.perf_counter()   # after item(): the device has done what was asked of it
            speed = (images_seen(config, done) - images_seen(config, first)) / (now - begin)
            left = timedelta(seconds=round((images_seen(config, steps) - images_seen(config, done)) / speed))
            print(f"step {done}/{steps}", *(f"{name} {value:.4g}" for name, value in means.items()),
                  f"{speed:.0f} images/s, {left} left", sep="  ", flush=True)
            if save:
                with torch.no_grad():           # by running statistics: an image depends on its own z alone
                    save_images(G.eval()(fixed_z), out / f"{done:06d}.png")
                G.train()
                rows = rows or [["step", "images", "seconds", *means]]
                rows.append([done, images_seen(config, done), round(seconds + now - begin, 1), *means.values()])
                if last:
                    save_animation([out / f"{row[0]:06d}.png" for row in rows[1:]], out / "training.gif")
                with replacing(out / "log.csv") as file:
                    file.writelines((",".join(map(str, row)) + "\n").encode() for row in rows)
                with replacing(out / "checkpoint.pt") as file:      # the last: a finished run has all its files
                    torch.save(dict(step=done, config=config, seconds=seconds + now - begin, log=rows,
                                    rng=[module.get_rng_state() for module in random],
                                    **{name: part.state_dict() for name, part in state.items()}), file)
                good, count = done, 0
                for value in total.values():
                    value.zero_()
            if last and done < steps:
                raise KeyboardInterrupt
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def load(out):
    """The generator of a run folder, ready to be called: z (n, nz), N(0, 1) -> images (n, C, H, W) in [-1, 1].
    On the CPU, with batch norm's running statistics.  ValueError if the folder has no (good) checkpoint"""
    saved = read(out)
    if saved is None:
        raise ValueError(f"there is no checkpoint.pt in {out}: train first, or name a run folder with --out")
    G = Generator(*(saved["config"][name] for name in ("nz", "channels", "size", "width")))
    G.load_state_dict(saved["G"])
    return G.eval().requires_grad_(False)


def generate(out, n, device="auto", seed=0):
    """Writes n images of the run in the folder out as OUT/generated/000000.png, ... and returns that folder.
    Image i depends on seed and i alone; PNGs that were there are removed.  ValueError for n < 1 or no checkpoint"""
    if n < 1:
        raise ValueError(f"--generate must be at least 1, not {n}")
    device, G, config, folder = find_device(device), load(out), read(out)["config"], Path(out, "generated")
    G, noise = G.to(device), torch.Generator().manual_seed(seed % 2**63)
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    for first in range(0, n, 64):
        z = torch.randn(64, config["nz"], generator=noise).to(device)
        save_each(G(z)[:n - first], folder, first, config["dataset"])
    return folder


def main(argv=None):
    """The command line.  SystemExit: 2, with one sentence, after an error of the user's; 130 after Ctrl-C"""
    parser = argparse.ArgumentParser(prog=Path(__file__).name, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {' '.join(message.split())}\n")
    notes = dict(re.findall(r"^    (\w+).*?=.*?,  +# (.*)$", inspect.getsource(train), re.MULTILINE))
    for name, setting in inspect.signature(train).parameters.items():
        kind = type(setting.default) if setting.annotation is setting.empty else setting.annotation
        value = dict(action="store_true") if kind is bool else dict(type=kind, metavar=kind.__name__.upper())
        note = " ".join(notes[name].split()).replace("%", "%%")
        note += "" if setting.default is None or kind is bool else f" (default: {setting.default})"
        parser.add_argument(flag(name), default=setting.default, help=note, **value)
    parser.add_argument("--generate", type=int, metavar="N", help="instead of training, write N images "
                        "from the checkpoint into OUT/generated; another --seed, other images")
    settings = vars(parser.parse_args(argv))
    n = settings.pop("generate")
    try:
        if n is None:
            train(**settings)
        else:
            out = run_folder(settings["out"], settings["dataset"], settings["digit"])
            print(f"{n} images in {generate(out, n, settings['device'], settings['seed'])}")
    except (ValueError, OSError) as error:
        parser.error(str(error) + (": try another --out or --root" if getattr(error, "errno", None) else ""))
    except KeyboardInterrupt:
        then = "the same command continues from what is saved" if n is None else "not all images are there"
        parser.exit(130, f"{parser.prog}: stopped; {then}\n")


if __name__ == "__main__":
    main()
