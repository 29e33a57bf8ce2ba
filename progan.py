"""ProGAN, "Progressive Growing of GANs for Improved Quality, Stability, and Variation" (2017)
https://arxiv.org/abs/1710.10196  Tero Karras, Timo Aila, Samuli Laine, Jaakko Lehtinen

G and D begin at 4x4 pixels, where images are simple, and are doubled again and again up to 1024x1024. A new pair of
layers is not switched on but faded in: its weight alpha grows from 0 to 1, and the real images are faded alike. The
loss is any GAN's; here, as in the paper's main results, WGAN-GP's with one critic update per generator update:

    L = D(x_tilde) - D(x) + λ/γ² (‖∇_x_hat D(x_hat)‖₂ - γ)² + ε_drift D(x)²      (A.1; γ: §6.5)

Differs from the paper, or from its authors' code:
- Adam is reset when a fade begins and when it ends: the authors' code; the paper does not say.
- Weights are multiplied by He's constant (§4.1 divides by it); gain 1 in toRGB and in D's last layer: their code.
- Pixel norm after every 3x3 convolution (A.1) and on the latents; in their code after the first, 4x4, too.
- Minibatch standard deviation over the whole minibatch (§3), of each process; in their later code over groups of 4.
- Not here: labels, mirrored images, epochs, a lower lr for the first 40 thousand images, more steps at the end.
The defaults are the paper's, for GPUs. Measured on 2 EPYC cores, torch 2.14: 10 min, estimate 0.12 (seed 2), with
`python progan.py --digit 7 --fmap-base 128 --fmap-max 64 --nz 64 --lr 0.005 --kimg 3 --ema 0.99 --steps 6000`"""
import atexit
import copy
import math
import os
import re
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from datetime import timedelta
from inspect import getsource, signature
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
from torch import cuda, nn
from common import (DATASETS, batches, channels_of, checked, claim, compare, find_device, fitting, in_one_sentence,
                    load_images, name_of, next_image, pyramid, replacing, run_folder, same_shapes,
                    save_animation, save_curve, save_each, save_images, stop_signals)

# ---- The pieces (§3, §4) -----------------------------------------------------------------------------------------
class Conv(nn.Module):
    """§4.1: N(0, 1) weights, multiplied at run time by He's constant, gain / √fan_in, so that Adam's steps mean
    the same to all; biases start at 0, unscaled.  (m, n_in, H, W) -> (m, n_out, H', W')"""
    def __init__(self, n_in, n_out, kernel, padding=0, gain=2 ** 0.5):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(n_out))
        self.scale, self.padding = gain / (n_in * kernel ** 2) ** 0.5, padding

    def forward(self, x):
        return nn.functional.conv2d(x, self.scale * self.weight, self.bias, padding=self.padding)


def pixel_norm(x):
    """§4.2: every pixel's feature vector, scaled to a mean square of 1.  (m, C, ...) -> (m, C, ...)"""
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


def minibatch_stddev(x):
    """§3: one more feature map, constant: the standard deviation over the minibatch of each feature at each place,
    averaged. A minibatch of one has 1e-4, never nan.  (m, C, H, W) -> (m, C + 1, H, W)"""
    std = (x.var(0, correction=0) + 1e-8).sqrt().mean()
    return torch.cat([x, std.expand(len(x), 1, *x.shape[2:])], 1)


upsample = nn.Upsample(scale_factor=2)      # Table 2: every pixel four times.  (m, C, H, W) -> (m, C, 2H, 2W)
downsample = nn.AvgPool2d(2)                # Table 2: averages of 2x2 pixels.  (m, C, H, W) -> (m, C, H/2, W/2)


class Layer(nn.Module):         # a function as a layer
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
    """G(z, resolution, alpha): (m, nz) -> images, about in [-1, 1], (m, channels, resolution, resolution).
    alpha in [0, 1]: the weight of the last block.  G(z) alone: as self.grown says, which follows the training"""
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
                upsample,
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
    """D(x, resolution, alpha): (m, channels, resolution, resolution) -> scores (m,), which depend on the minibatch.
    alpha in [0, 1]: the weight of the first block.  D(x) alone: the resolution of x, alpha 1"""
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
                Conv(b, a, 3, padding=1), nn.LeakyReLU(0.2, True), downsample))

    def forward(self, x, resolution=None, alpha=1.0):
        last = (resolution or x.shape[-1]).bit_length() - 3
        h = self.from_rgb[last](x)
        for k in range(last, 0, -1):
            h = self.blocks[k](h)
            if k == last and alpha < 1:                         # Fig. 2 (b): D
                h = (1 - alpha) * self.from_rgb[k - 1](downsample(x)) + alpha * h
        return self.blocks[0](h)


# ---- Growing (§2, Fig. 2), and what the loss and the pictures need -----------------------------------------------
def schedule(images_shown, size=1024, kimg=800.0):
    """A.1: 4x4 for kimg thousand images; then each resolution up to size is faded in during as many, and stabilised
    during as many.  Images shown to D so far -> (resolution, alpha): alpha from 0 while it fades in, then 1.0"""
    length = max(1, round(1000 * kimg))                         # images per phase: 4, fade 8, 8, fade 16, 16, ...
    phase, shown = divmod(images_shown, length)
    if phase > 2 * (size.bit_length() - 3):
        return size, 1.0
    return 4 << (phase + 1) // 2, shown / length if phase % 2 == 1 else 1.0


def fade(x, alpha):
    """Fig. 2: real images are faded as the generated ones are.  (m, C, H, W) -> (m, C, H, W)"""
    return x if alpha == 1 else (1 - alpha) * upsample(downsample(x)) + alpha * x


def grad_norm(D, x, resolution, alpha):
    """‖∇_x D(x)‖₂ of every image x, itself differentiable.  (m, ...) -> (m,)"""
    x = x.detach().requires_grad_()
    # By the minibatch standard deviation an image has an effect on all scores; the authors sum them, too.
    (grad,) = torch.autograd.grad(D(x, resolution, alpha).sum(), x, create_graph=True)
    return torch.linalg.vector_norm(grad.reshape(len(x), -1), dim=1)    # unlike sqrt(sum of squares), not nan at 0


def average_gradients(weights):
    """Over all processes, so that each makes the same step; with one there is nothing to do"""
    if dist.is_initialized():
        grads = [weight.grad for weight in weights if weight.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        means = (flat / dist.get_world_size()).split([grad.numel() for grad in grads])
        for grad, mean in zip(grads, means):
            grad.copy_(mean.view_as(grad))


# ---- Training (A.1) ----------------------------------------------------------------------------------------------
@checked
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
    keep=False,               #           keep every checkpoint beside its picture: 000500.pt, 001000.pt, ...
):
    """As A.1 says.  Returns the average of G, D.  ValueError, OSError: one sentence.  KeyboardInterrupt: Ctrl-C"""
    device, channels, dataset = find_device(device), channels_of(dataset, channels), str(dataset)
    if size is None:
        size = 32 if dataset in DATASETS else 1024
    config = Namespace(**locals())
    if not 1e-6 < min(kimg, gamma) <= max(kimg, gamma) < 1e9:
        raise ValueError(f"kimg and gamma must be above 0, and below 1e9, not {kimg} and {gamma}")
    torch.manual_seed(seed)
    fixed_z = torch.randn(64, nz, generator=torch.Generator().manual_seed(0)).to(device)     # of the pictures
    G = Generator(size, channels, fmap_base, fmap_max, nz).to(device, memory_format=torch.channels_last)
    D = Discriminator(size, channels, fmap_base, fmap_max).to(device, memory_format=torch.channels_last)
    G_ema = copy.deepcopy(G).requires_grad_(False)
    theta, w = list(G.parameters()), list(D.parameters())
    opt_G = torch.optim.Adam(theta, lr, (beta1, beta2), eps=1e-8, fused=True)
    opt_D = torch.optim.Adam(w, lr, (beta1, beta2), eps=1e-8, fused=True)
    rank, world = processes(device)
    m = {4 << k: batch_size or n for k, n in enumerate([16] * 6 + [14, 6, 3])}      # A.1: at 4x4, ..., 1024x1024
    phases = [4 << (k + 1) // 2 for k in range(2 * size.bit_length() - 5)]      # 4, 8, 8, 16, 16, ..., size, size
    if rank > 0:
        torch.manual_seed(seed + (rank << 16))                      # other noise, but the same networks
        everyones(None)                                             # until the first has decoded the images for all
    images = load_images(dataset, digit, size, root, channels, enlarge=False, mapped=world > 1)
    P_r = {r: batches(x, m[r], device) for r, x in pyramid(images).items()}
    config.images, config.processes = len(images), world
    if rank == 0:
        everyones(None)
    run = Run(config, fixed_z, next(P_r[size])[:64], G=G, D=D, G_ema=G_ema, opt_G=opt_G, opt_D=opt_D)
    if steps is None:                                               # as many as schedule needs, from here on
        config.steps, shown = run.step, run.shown
        for k, r in enumerate(phases):
            count = max(0, math.ceil((max(1, round(1000 * kimg)) * (k + 1) - shown) / (world * m[r])))
            config.steps, shown = config.steps + count, shown + count * world * m[r]
    G.grown = G_ema.grown = schedule(run.shown, size, kimg)

    for step in run:
        resolution, alpha = schedule(run.shown, size, kimg)         # §2      4x4; fade in 8x8, stabilise it; ...
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
        for average, now in zip(G_ema.parameters(), theta):
            average.lerp_(now.detach(), 1 - ema)                    # A.1     θ_ema ← 0.999 θ_ema + 0.001 θ
        run.shown += world * len(x)
        then = G.grown = G_ema.grown = schedule(run.shown, size, kimg)
        if (then[0], then[1] < 1) != (resolution, alpha < 1):       # code    a phase ends: Adam is reset
            opt_G.state.clear()
            opt_D.state.clear()
        run.log(resolution, alpha, wasserstein=(D_x - D_x_tilde).mean(), L_D=L.mean(), L_G=L_G.mean(),
                penalty=penalty.mean(), drift=(D_x ** 2).mean())
    return G_ema.eval(), D


# ---- The run: as in every script, but for growth and several processes; nothing below is in the paper ------------
SCRIPT = Path(globals().get("__file__", "notebook")).stem
MAY_CHANGE = {"steps", "save_every", "keep", "device", "root", "out"}       # when a run goes on


class Run:
    """for step in run: the steps still to be made; the very first is 1.  parts: all that has a state_dict"""
    def __init__(self, config, fixed_z, real, **parts):
        self.config, self.fixed_z, self.parts = config, fixed_z, parts
        self.settings = {key: it for key, it in vars(config).items() if key not in MAY_CHANGE}
        self.settings["dataset"] = name_of(config.dataset)
        self.out = run_folder(SCRIPT, config)
        self.step, self.time, self.rows, self.sums, self.shown = 0, 0.0, [], {}, 0
        self.random = [torch, cuda] if fixed_z.is_cuda else [torch]
        self.rank, self.world = processes(fixed_z.device)
        if self.rank == 0:
            self.lock = claim(self.out)
        if Path(self.out, "checkpoint.pt").exists():
            saved = read(self.out)
            with fitting(self.out, SCRIPT):
                compare(saved, self.settings, self.out)
                for name, part in parts.items():
                    if name.startswith("opt"):              # lr, fused, capturable are those of this run
                        saved[name]["param_groups"] = part.state_dict()["param_groups"]
                    part.load_state_dict(saved[name])
                same_shapes(parts["opt_G"], parts["opt_D"])
                self.step, self.time, self.rows, states, self.shown = saved["run"]
                for each, state in zip(self.random, (states + [[]] * self.world)[self.rank]):
                    each.set_rng_state(state)
        if self.rank == 0:
            save_images(real, self.out / "real.png")

    def __iter__(self):
        config, halt = self.config, False
        if self.rank == 0:
            print(f"device: {self.fixed_z.device}\nrun folder: {self.out}")
            print(f"{self.step} of {config.steps} steps are done", flush=True)
        self.since, self.begin = self.step, perf_counter() - self.time
        with stop_signals() as stop:
            for self.step in range(self.step + 1, config.steps + 1):
                yield self.step
                # All processes stop, or none: they agree at every tenth step.
                halt = (self.world == 1 or self.step % 10 == 0) and any(everyones(stop))
                if halt or self.step == config.steps or self.step % config.save_every == 0:
                    self.save()
                    everyones(None)                         # torchrun ends all when one ends: wait for the first
                    if halt:
                        break
        if self.rank == 0:
            save_animation(self.out)
        if halt:
            raise KeyboardInterrupt

    def log(self, resolution, alpha, **losses):
        """Adds up a step's losses, scalar tensors; a row of the log has their means, and where the last step was"""
        self.place = dict(resolution=resolution, alpha=alpha)
        for name, loss in losses.items():
            self.sums.setdefault(name, torch.zeros_like(loss)).add_(loss.detach())

    def save(self):
        """A row, the pictures, when these are there, the checkpoint, and then a line: by the first process alone"""
        states = everyones([each.get_rng_state() for each in self.random])
        if self.rank > 0:
            return
        count, self.since = self.step - self.since, self.step
        row = self.place | {name: total.item() / count for name, total in self.sums.items()}
        for total in self.sums.values():
            total.zero_()
        was, self.time = self.time, perf_counter() - self.begin
        self.rows.append(dict(step=self.step, images=self.shown, seconds=self.time, **row))
        save_curve(self.rows, self.out)                     # ValueError if a loss is not finite
        G = self.parts["G_ema"]
        side = min(8, 2048 // G.grown[0])                   # more would not fit into the picture
        x = [G(z) for z in self.fixed_z[:side ** 2].split(8)]
        save_images(torch.cat(x), self.out / f"{self.step:06d}.png")
        saved = {name: part.state_dict() for name, part in self.parts.items()}
        saved |= dict(settings=self.settings, run=(self.step, self.time, self.rows, states, self.shown))
        for name in (f"{self.step:06d}.pt", "checkpoint.pt"):
            if self.config.keep or name == "checkpoint.pt":
                with replacing(self.out / name) as file:
                    torch.save({SCRIPT: saved}, file)
        speed = count / (self.time - was)
        left = (self.config.steps - self.step) / speed / 60     # at this speed; larger images take longer
        losses = "  ".join(f"{name} {it:.4g}" for name, it in row.items())
        speed = f"{speed:.1f} steps/s  {left:.0f} min left"
        print(f"step {self.step}/{self.config.steps}  {losses}  {speed}", flush=True)


def processes(device):
    """The number of this process and how many there are: 0 and 1 without torchrun"""
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=timedelta(days=1))         # one may decode images for hours
        atexit.register(dist.destroy_process_group)
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def everyones(it):
    """it of every process, in their order"""
    them = [it]
    if dist.is_initialized():
        them = them * dist.get_world_size()
        dist.all_gather_object(them, it)
    return them


def read(path):
    """The checkpoint in a run folder, or a file that --keep wrote.  ValueError if there is no good one"""
    if Path(path).is_dir():
        path = Path(path, "checkpoint.pt")
    with fitting(path, SCRIPT):
        return torch.load(path, map_location="cpu", weights_only=True)[SCRIPT]


def load(path):
    """The moving average of G in what read() finds, as large as it has grown, on the CPU: z ~ N(0, 1), (n, nz) ->
    images, about in [-1, 1], (n, C, H, W)"""
    saved = read(path)
    with fitting(path, SCRIPT):
        settings = saved["settings"]
        G = Generator(*(settings[name] for name in ("size", "channels", "fmap_base", "fmap_max", "nz")))
        G.load_state_dict(saved["G_ema"])
        G.grown = schedule(saved["run"][4], settings["size"], settings["kimg"])
    return G.eval().requires_grad_(False)


@checked
def generate(path, n, device="auto", seed=0):
    """Writes n more images of what read() finds, image i by seed and i alone, and returns their folder"""
    G, settings, device = load(path), read(path)["settings"], find_device(device)
    (folder, first), noise = next_image(path, n), torch.Generator().manual_seed(seed)
    z = torch.cat([torch.randn(64, settings["nz"], generator=noise) for _ in range(0, first + n, 64)]).to(device)
    images = map(G.to(device), z[first:first + n].split(8))
    return save_each(images, folder, first, settings.get("dataset"))


@in_one_sentence(SCRIPT)
def main(argv=None):
    """The command line.  SystemExit: 2 after a user's mistake, with one sentence; 130 after Ctrl-C"""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{SCRIPT}.py: {message}\n")
    comments = dict(re.findall(r"^    (\w+).*?,  +# (.*)$", getsource(train), re.M))
    for name, setting in signature(train).parameters.items():
        kind = setting.annotation if setting.default is None else type(setting.default)
        how = dict(action="store_true") if kind is bool else dict(type=kind)
        how |= dict(default=setting.default, help=f"{comments[name]} ({setting.default})")
        parser.add_argument("--" + name.replace("_", "-"), **how)
    parser.add_argument("--generate", type=int, metavar="N", help="N images of the run in OUT")
    args = parser.parse_args(argv)
    n = vars(args).pop("generate")
    if n is None:
        train(**vars(args))
    else:
        generate(run_folder(SCRIPT, args), n, args.device, args.seed)


if __name__ == "__main__":
    main()
