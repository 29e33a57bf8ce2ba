"""ProGAN, "Progressive Growing of GANs for Improved Quality, Stability, and Variation" (2017)
https://arxiv.org/abs/1710.10196  Tero Karras, Timo Aila, Samuli Laine, Jaakko Lehtinen

G and D begin at 4x4 pixels, where images are simple, and are doubled again and again up to 1024x1024. A new pair of
layers is not switched on but faded in: its weight alpha grows from 0 to 1, and the real images are faded alike. The
loss is any GAN's; here, as in the paper's main results, WGAN-GP's with one critic update per generator update:

    L = D(x_tilde) - D(x) + λ/γ² (‖∇_x_hat D(x_hat)‖₂ - γ)² + ε_drift D(x)²      (A.1; γ: §6.5)

Differs from the paper, or from its authors' code:
- Adam is reset when a fade begins and when it ends: the authors' code; the paper does not say.
- Weights are multiplied by He's constant (§4.1 divides by it); gain 1 in toRGB and in D's last layer: their code.
- Pixel norm after every 3x3 convolution (A.1) and on the latents; in the authors' code after the first, 4x4, too.
- Minibatch standard deviation over the whole minibatch (§3), of each process; in their later code over groups of 4.
- Not here, though in their code: labels, mirrored images, a lower learning rate for the first 40 thousand images.
- The run ends when the last resolution is stable; the authors went on as long as the images got better.
The recipe takes other losses as well: the paper's appendix B uses LSGAN's. The defaults are the paper's, which are
meant for GPUs; the README has a line for a small machine.
Measured: `python progan.py --dataset mnist --digit 7 --size 32 --fmap-max 32 --kimg 20 --ema 0.995`, 2 EPYC cores,
torch 2.15: 11 min, estimate 0.69 and penalty 0.009 at the end.
"""
import argparse
import contextlib
import copy
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
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from common import (DATASETS, batches, channels_of, load_images, pyramid, replacing, save_animation, save_each,
                    save_images)

# ---- The pieces (§3, §4) -----------------------------------------------------------------------------------------

class Conv(nn.Module):
    """A convolution with equalised learning rate (§4.1): weights start as N(0, 1) and are multiplied at run time by
    He's constant, gain / √fan_in, so that a step of Adam's means the same to all.  Biases start at 0, unscaled.
    (m, n_in, H, W) -> (m, n_out, H', W')"""
    def __init__(self, n_in, n_out, kernel, padding=0, gain=2 ** 0.5):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(n_out))
        self.scale, self.padding = gain / (n_in * kernel ** 2) ** 0.5, padding

    def forward(self, x):
        return F.conv2d(x, self.scale * self.weight, self.bias, padding=self.padding)


def pixel_norm(x):
    """§4.2: every pixel's feature vector, scaled to a mean square of 1.  (m, C, ...) -> (m, C, ...)"""
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


def minibatch_stddev(x):
    """§3: one more feature map, constant: the standard deviation over the minibatch of each feature at each place,
    averaged. A minibatch of one has 1e-4, never nan.  (m, C, H, W) -> (m, C + 1, H, W)"""
    std = (x.var(0, correction=0) + 1e-8).sqrt().mean()
    return torch.cat([x, std.expand(len(x), 1, *x.shape[2:])], 1)


def upsample(x):
    """Table 2: every pixel four times.  (m, C, H, W) -> (m, C, 2H, 2W)"""
    return F.interpolate(x, scale_factor=2)


def downsample(x):
    """Table 2: averages of 2x2 pixels.  (m, C, H, W) -> (m, C, H/2, W/2)"""
    return F.avg_pool2d(x, 2)


class Layer(nn.Module):
    """One of the functions above as a layer"""
    def __init__(self, function):
        super().__init__()
        self.forward = function


# ---- Networks (table 2) ------------------------------------------------------------------------------------------

def feature_maps(resolution, fmap_base, fmap_max):
    """At 4x4, 8x8, ..., resolution; for 8192 and 512 those of table 2.  ValueError for any other resolution"""
    if resolution not in (4, 8, 16, 32, 64, 128, 256, 512, 1024):
        raise ValueError(f"--size must be a power of two from 4 to 1024, not {resolution}")
    return [max(1, min(2 * fmap_base >> k, fmap_max)) for k in range(2, resolution.bit_length())]


class Generator(nn.Module):
    """G(z, resolution, alpha): latents -> images, linear, so not quite within [-1, 1].
    (m, nz) -> (m, channels, resolution, resolution).  alpha in [0, 1]: the weight of the last block.
    G(z) without a resolution: as large as self.grown says, which follows the training"""
    def __init__(self, resolution, channels=3, fmap_base=8192, fmap_max=512, nz=512):
        super().__init__()
        n = feature_maps(resolution, fmap_base, fmap_max)
        self.grown = resolution, 1.0
        # One of the 4x4 weights meets the latent in each place; fan_in counts all 16, as in the authors' code.
        self.blocks = nn.ModuleList([nn.Sequential(             # (m, nz, 1, 1) -> (m, n[0], 4, 4)
            Conv(nz, n[0], 4, padding=3), nn.LeakyReLU(0.2, True),
            Conv(n[0], n[0], 3, padding=1), nn.LeakyReLU(0.2, True), Layer(pixel_norm))])
        for a, b in zip(n, n[1:]):                              # (m, a, H, W) -> (m, b, 2H, 2W)
            self.blocks.append(nn.Sequential(
                Layer(upsample),
                Conv(a, b, 3, padding=1), nn.LeakyReLU(0.2, True), Layer(pixel_norm),
                Conv(b, b, 3, padding=1), nn.LeakyReLU(0.2, True), Layer(pixel_norm)))
        self.to_rgb = nn.ModuleList(Conv(b, channels, 1, gain=1) for b in n)

    def forward(self, z, resolution=None, alpha=1.0):
        resolution, alpha = (resolution, alpha) if resolution else self.grown
        last = resolution.bit_length() - 3                      # 4x4 is block 0, 8x8 block 1, ...
        x = self.blocks[0](pixel_norm(z)[:, :, None, None])
        for k in range(1, last + 1):
            small, x = x, self.blocks[k](x)
        image = self.to_rgb[last](x)
        if alpha < 1 and last > 0:                              # Fig. 2 (b): G
            image = (1 - alpha) * upsample(self.to_rgb[last - 1](small)) + alpha * image
        return image


class Discriminator(nn.Module):
    """D(x, resolution, alpha): images -> scores; they depend on the minibatch, by its standard deviation.
    (m, channels, resolution, resolution) -> (m,).  alpha in [0, 1]: the weight of the first block.
    D(x) without a resolution: that of x, alpha 1"""
    def __init__(self, resolution, channels=3, fmap_base=8192, fmap_max=512):
        super().__init__()
        n = feature_maps(resolution, fmap_base, fmap_max)
        self.from_rgb = nn.ModuleList(nn.Sequential(Conv(channels, b, 1), nn.LeakyReLU(0.2, True)) for b in n)
        self.blocks = nn.ModuleList([nn.Sequential(             # (m, n[0], 4, 4) -> (m,)
            Layer(minibatch_stddev), Conv(n[0] + 1, n[0], 3, padding=1), nn.LeakyReLU(0.2, True),
            Conv(n[0], n[0], 4), nn.LeakyReLU(0.2, True), Conv(n[0], 1, 1, gain=1), nn.Flatten(0))])
        for a, b in zip(n, n[1:]):                              # (m, b, H, W) -> (m, a, H/2, W/2)
            self.blocks.append(nn.Sequential(
                Conv(b, b, 3, padding=1), nn.LeakyReLU(0.2, True),
                Conv(b, a, 3, padding=1), nn.LeakyReLU(0.2, True), Layer(downsample)))

    def forward(self, x, resolution=None, alpha=1.0):
        last = (resolution or x.shape[-1]).bit_length() - 3
        h = self.from_rgb[last](x)
        for k in range(last, 0, -1):
            h = self.blocks[k](h)
            if k == last and alpha < 1:                         # Fig. 2 (b): D
                h = (1 - alpha) * self.from_rgb[k - 1](downsample(x)) + alpha * h
        return self.blocks[0](h)


# ---- Growing (§2, Fig. 2), and what the loss and the pictures need -----------------------------------------------

MINIBATCH = {4: 16, 8: 16, 16: 16, 32: 16, 64: 16, 128: 16, 256: 14, 512: 6, 1024: 3}   # A.1: m at a resolution


def schedule(images_shown, size=1024, kimg=800.0):
    """A.1: 4x4 for kimg thousand images; then each resolution up to size is faded in during as many, and stabilised
    during as many.  Images shown to D so far -> (resolution, alpha): alpha from 0 while it fades in, then 1.0"""
    length = round(1000 * kimg)                                 # images per phase: 4, fade 8, 8, fade 16, 16, ...
    phase, shown = divmod(images_shown, length)
    if phase > 2 * (size.bit_length() - 3):
        return size, 1.0
    return 4 << (phase + 1) // 2, shown / length if phase % 2 == 1 else 1.0


def fade(x, alpha):
    """Fig. 2: real images are faded as the generated ones are.  (m, C, H, W) -> (m, C, H, W)"""
    return x if alpha == 1 else (1 - alpha) * upsample(downsample(x)) + alpha * x


def grad_norm(D, x, resolution, alpha):
    """‖∇_x D(x)‖₂ of every image x, itself differentiable.  (m, C, H, W) -> (m,)"""
    x = x.detach().requires_grad_()
    # By the minibatch standard deviation an image has an effect on all scores. So the gradient of the summed
    # scores, which the authors take too, is not image by image that of the image's own score.
    (grad,) = torch.autograd.grad(D(x, resolution, alpha).sum(), x, create_graph=True)
    return torch.linalg.vector_norm(grad, dim=(1, 2, 3))        # unlike sqrt(sum of squares), not nan at grad = 0


@torch.no_grad()
def move_average(G_ema, G, decay):
    """A.1: the weights of G_ema, an exponential moving average of G's"""
    for average, now in zip(G_ema.parameters(), G.parameters()):
        average.lerp_(now, 1 - decay)


# ---- Training (A.1) ----------------------------------------------------------------------------------------------

def train(
    # A.1: Adam with α = 0.001, β₁ = 0, β₂ = 0.99, ε = 10⁻⁸; 800 thousand images per phase; average of G: 0.999
    lr=1e-3,                  # α         Adam: step size
    beta1=0.0,                # β₁        Adam: decay of the first moment
    beta2=0.99,               # β₂        Adam: decay of the second moment
    lam=10.0,                 # λ         weight of the gradient penalty
    gamma=1.0,                # γ         the penalty's target norm; 750 for CIFAR-10 (§6.5)
    drift=0.001,              # ε_drift   weight of D(x)², which keeps the scores near 0
    ema=0.999,                #           decay of the moving average of G; shorter runs need less
    kimg=800.0,               #           thousands of images to fade a resolution in, and to stabilise it
    batch_size: int = None,   # m         images per batch and process (16 up to 128x128, then 14, 6, 3)
    # The networks
    nz=512,                   # z         dimensions of the latent variable
    fmap_base=8192,           #           feature maps: 2 fmap_base / resolution, but at most fmap_max
    fmap_max=512,             #           feature maps where resolutions are low; fewer: smaller networks
    # The images
    dataset="mnist",          #           mnist, fashion-mnist, cifar10, or the path of a folder of images
    digit: int = None,        #           only this class, 0 to 9
    root: str = None,         #           where data sets are kept (data/ beside common.py)
    size: int = None,         #           last width and height: 4, 8, ..., 1024 (32; a folder: 1024)
    channels: int = None,     #           1 grey, 3 RGB (what the data set has; a folder: 3)
    # The run
    steps: int = None,        #           updates of G (until the last resolution has been stabilised for kimg)
    seed=0,                   #           of every random number but the pictures' latents
    device="auto",            #           cuda if there is one, else cpu; or any torch device: cuda:1, mps, ...
    out: str = None,          #           run folder (runs/SCRIPT-DATASET-DIGIT)
    save_every=500,           #           steps between rows of the log, pictures and checkpoints
):
    """Trains as A.1 says.  Returns G, D; load(out) is G's moving average.  ValueError or OSError, one sentence, for
    settings or files that do not fit; KeyboardInterrupt after Ctrl-C, when everything is saved"""
    config, device, out = start(locals())
    size, channels, (rank, world) = config["size"], config["channels"], processes()
    G = Generator(size, channels, fmap_base, fmap_max, nz).to(device, memory_format=torch.channels_last)
    D = Discriminator(size, channels, fmap_base, fmap_max).to(device, memory_format=torch.channels_last)
    G_ema = copy.deepcopy(G)
    theta, w = list(G.parameters()), list(D.parameters())
    opt_G = torch.optim.Adam(theta, lr, (beta1, beta2), eps=1e-8, fused=True)
    opt_D = torch.optim.Adam(w, lr, (beta1, beta2), eps=1e-8, fused=True)
    same_everywhere(G, D, G_ema)
    with first_process_first():
        images = load_images(dataset, digit, size, root, channels, enlarge=False, mapped=world > 1)
        P_r = {r: batches(x, batch_size or MINIBATCH[r], device) for r, x in pyramid(images).items()}
    if rank == 0:
        save_images(next(P_r[size])[:64], out / "real.png")
    log = {}

    for images_shown in run(config, out, log, G=G, D=D, G_ema=G_ema, opt_G=opt_G, opt_D=opt_D):
        resolution, alpha = schedule(images_shown, size, kimg)      # §2      4x4; fade in 8x8, stabilise it; ...
        x = fade(next(P_r[resolution]), alpha)                      # Fig. 2  real images fade as generated ones do
        z = torch.randn(len(x), nz, device=device)                  # A.1     latents; G puts them on a hypersphere
        eps = torch.rand(len(x), 1, 1, 1, device=device)
        with torch.no_grad():
            x_tilde = G(z, resolution, alpha)                       # Fig. 2
        x_hat = eps * x + (1 - eps) * x_tilde
        D_x_tilde = D(x_tilde, resolution, alpha)                   # §3      real and generated images apart: each
        D_x = D(x, resolution, alpha)                               #         minibatch has its standard deviation
        penalty = (grad_norm(D, x_hat, resolution, alpha) - gamma) ** 2
        L = (D_x_tilde - D_x                                        # A.1     L ← D(x_tilde) − D(x)
             + lam / gamma ** 2 * penalty                           # §6.5        + λ/γ² (‖∇_x_hat D(x_hat)‖₂ − γ)²
             + drift * D_x ** 2)                                    # A.1         + ε_drift D(x)²
        opt_D.zero_grad()
        L.mean().backward(inputs=w)
        average_gradients(w)
        opt_D.step()                                                # A.1     w ← Adam(∇_w 1/m Σ L, w, α, β₁, β₂)

        z = torch.randn(len(x), nz, device=device)                  # A.1     n_critic = 1: now G's turn
        L_G = -D(G(z, resolution, alpha), resolution, alpha)
        opt_G.zero_grad()
        L_G.mean().backward(inputs=theta)
        average_gradients(theta)
        opt_G.step()                                                # A.1     θ ← Adam(∇_θ 1/m Σ −D(G(z)), θ, ...)
        move_average(G_ema, G, ema)                                 # A.1     θ_ema ← 0.999 θ_ema + 0.001 θ

        then = schedule(images_shown + world * len(x), size, kimg)
        if (then[0], then[1] < 1) != (resolution, alpha < 1):       # code    a phase ends: Adam is reset
            opt_G.state.clear()
            opt_D.state.clear()
        log.update(L_D=L.mean(), L_G=L_G.mean(), penalty=penalty.mean(), wasserstein=(D_x - D_x_tilde).mean(),
                   drift=(D_x ** 2).mean())
    return G, D


# ---- The run: as in every script, but for growth and several processes; nothing below is in the paper ------------

SCRIPT = Path(__file__).stem


def start(config):
    """The settings of train(), checked before anything is loaded or written -> (config, device, run folder)"""
    config = {name: str(it) if isinstance(it, (Path, torch.device)) else it for name, it in config.items()}
    for name, value in config.items():
        if type(value) not in (bool, int, float, str, type(None)):      # numpy's: the checkpoint could not be read
            raise ValueError(f"{flag(name)} must be a plain Python number or string, not a {type(value).__name__}")
    config["script"], dataset = SCRIPT, os.path.expanduser(config["dataset"])
    config["channels"] = channels_of(dataset) if config["channels"] is None else config["channels"]
    config["size"] = (32 if dataset in DATASETS else 1024) if config["size"] is None else config["size"]
    least = dict.fromkeys("steps batch_size save_every nz fmap_base fmap_max channels".split(), 1)
    least |= dict.fromkeys("lr beta1 beta2 lam drift ema".split(), 0) | dict(kimg=0.001, gamma=0.001)
    for name in least:
        below = 1 if name in ("beta1", "beta2", "ema") else 2**31
        if config[name] is not None and not least[name] <= config[name] < below:
            raise ValueError(f"{flag(name)} must be at least {least[name]} and below {below}, not {config[name]}")
    device, out = find_device(config["device"]), run_folder(config["out"], dataset, config["digit"])
    if out.is_dir() and Path(dataset).is_dir() and out.samefile(dataset):
        raise ValueError(f"--out {out} is the folder of the images: name another folder")
    saved = read(out)
    for name in config if saved else ():
        old, new = saved["config"].get(name), config[name]
        if old != new and name not in ("steps", "device", "out", "root", "save_every"):
            raise ValueError(f"{out} was trained {given(name, old)}, not {given(name, new)}: "
                             f"give the same to continue, or name another folder with --out")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():      # started by torchrun
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl", timeout=timedelta(days=1))
    rank, world = processes()
    if rank == 0:
        print(f"device: {device}" + f" in each of {world} processes" * (world > 1), f"run folder: {out}",
              sep="\n", flush=True)
    torch.manual_seed((config["seed"] + (rank << 16)) % 2**63)      # on the CPU, only the lower 32 bits count
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
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
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


def processes():
    """The number of this process and how many there are: 0 and 1 without torchrun"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def first_process_first():
    """The other processes enter when the first has left: it unpacks, decodes and averages images for all of them"""
    rank, world = processes()
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and world > 1:
        dist.barrier()


def same_everywhere(*networks):
    """The first process's weights in all"""
    if dist.is_initialized():
        for network in networks:
            for weight in network.parameters():
                dist.broadcast(weight.detach(), 0)


def average_gradients(weights):
    """Over all processes, so that each makes the same step; with one there is nothing to do"""
    if dist.is_initialized():
        for weight in weights:
            if weight.grad is not None:
                dist.all_reduce(weight.grad)
                weight.grad /= dist.get_world_size()


def everyones(it):
    """it of every process, in their order"""
    them = [it] * processes()[1]
    if dist.is_initialized():
        dist.all_gather_object(them, it)
    return them


def run(config, out, log, **state):
    """Yields, before every step left to do, the number of images shown to D so far. Around the steps it restores,
    logs, saves, shows progress and obeys Ctrl-C.

    log    the losses of a step by name, scalar tensors, put in by the loop; a row is their mean since the last row
    state  everything with a state_dict, by its name in the checkpoint
    ValueError if a loss or weight is not finite; KeyboardInterrupt after SIGINT or SIGTERM, once all is saved.
    """
    G, steps, size, kimg = state["G_ema"], config["steps"], config["size"], config["kimg"]
    (rank, world), device = processes(), next(G.parameters()).device
    length, phases = round(1000 * kimg), 2 * size.bit_length() - 5      # 4x4; fade and stabilise each of the others
    fixed_z = torch.randn(64, config["nz"], generator=torch.Generator().manual_seed(0)).to(device)
    random = [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]
    total, count, rows, done, images, seconds, saved = {}, 0, [], 0, 0, 0.0, read(out)
    if saved:
        rows, done, images, seconds = (saved[name] for name in ("log", "step", "images_shown", "seconds"))
        for name, part in state.items():
            if "param_groups" in saved[name]:   # equal settings, but fused is for this device
                saved[name]["param_groups"] = part.state_dict()["param_groups"]
            part.load_state_dict(saved[name])
        for module, rng in zip(random, saved["rng"][rank] if rank < len(saved["rng"]) else ()):
            module.set_rng_state(rng)
    over, stopped = done >= steps if steps else images >= phases * length, False
    if saved and rank == 0:
        print(f"{f'{done} of {steps}' if steps else done} steps are done: {'finished' if over else 'continuing'}",
              flush=True)
    del saved
    state["G"].grown = G.grown = schedule(images, size, kimg)
    stop, handlers, good, begin = [], {}, done, time.perf_counter()
    shown, before = begin, images
    if threading.current_thread() is threading.main_thread():
        handlers = {s: signal.signal(s, lambda *_: stop.append(True)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not over and not stopped:
            yield images
            for name, value in log.items():
                if name not in total:
                    total[name] = torch.zeros_like(value)
                total[name] += value.detach()

            resolution, alpha = schedule(images, size, kimg)            # of this step
            m = config["batch_size"] or MINIBATCH[resolution]
            images += world * m
            count, done = count + 1, done + 1
            over, stopped = done >= steps if steps else images >= phases * length, any(everyones(bool(stop)))
            save = over or stopped or done % config["save_every"] == 0
            rng = everyones([module.get_rng_state() for module in random]) if save else None
            state["G"].grown = G.grown = schedule(images, size, kimg)   # of the next, as in load()
            if rank > 0 or not save and time.perf_counter() - shown < 5:
                continue
            means = {name: value.item() / count for name, value in total.items()}
            broken = [name for name, value in means.items() if not math.isfinite(value)]
            broken += [name for name in "GD"
                       if not all(value.isfinite().all() for value in state[name].state_dict().values())]
            if broken:
                kept = f"{out} keeps the checkpoint of step {good}" if good else "there is no checkpoint yet"
                raise ValueError(f"{', '.join(broken)} not finite at step {done} ({kept}): try a smaller --lr"
                                 + ", with another --out" * bool(good))
            now = time.perf_counter()           # after item(): the device has done what was asked of it
            speed, phase = (images - before) / (now - shown), min(images // length, phases - 1)
            remain = (steps - done) * world * m if steps else max(0, (phase + 1) * length - images)
            left, of_phase = timedelta(seconds=round(remain / speed)), f" of phase {phase + 1} of {phases}"
            shown, before = now, images
            print(f"step {done}/{steps}" if steps else f"step {done}",
                  f"{resolution}x{resolution}", f"alpha {alpha:.2f}",
                  *(f"{name} {value:.4g}" for name, value in means.items()),
                  f"{speed:.0f} images/s, {left} left{'' if steps else of_phase}", sep="  ", flush=True)
            if save:
                side = min(8, 2048 // G.grown[0])                       # more would not fit into the picture
                with torch.no_grad():
                    x = torch.cat([G(z) for z in fixed_z[:side * side].split(8)])
                save_images(x, out / f"{done:06d}.png")
                rows = rows or [["step", "images", "seconds", "resolution", "alpha", *means]]
                rows.append([done, images, round(seconds + now - begin, 1), resolution, alpha, *means.values()])
                if over or stopped:
                    save_animation([out / f"{row[0]:06d}.png" for row in rows[1:]], out / "training.gif")
                with replacing(out / "log.csv") as file:
                    file.writelines((",".join(map(str, row)) + "\n").encode() for row in rows)
                with replacing(out / "checkpoint.pt") as file:      # the last: a finished run has all its files
                    torch.save(dict(step=done, images_shown=images, config=config, seconds=seconds + now - begin,
                                    log=rows, rng=rng,
                                    **{name: part.state_dict() for name, part in state.items()}), file)
                good, count = done, 0
                for value in total.values():
                    value.zero_()
        everyones(None)                         # torchrun ends all when one leaves; the first may still be saving
        if stopped and not over:
            raise KeyboardInterrupt
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def load(out):
    """The moving average of a run folder's G, ready to be called: z (n, nz), N(0, 1) -> images (n, C, H, W), about
    in [-1, 1], as large as the run has grown.  On the CPU.  ValueError if the folder has no (good) checkpoint"""
    saved = read(out)
    if saved is None:
        raise ValueError(f"there is no checkpoint.pt in {out}: train first, or name a run folder with --out")
    config = saved["config"]
    G = Generator(*(config[name] for name in ("size", "channels", "fmap_base", "fmap_max", "nz")))
    G.load_state_dict(saved["G_ema"])
    G.grown = schedule(saved["images_shown"], config["size"], config["kimg"])
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
        for part in z[:n - first].split(8):
            save_each(G(part), folder, first, config["dataset"])
            first += len(part)
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
            try:
                train(**settings)
            finally:
                if dist.is_initialized():       # its threads must not outlive Python
                    dist.destroy_process_group()
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
