"""ProGAN, "Progressive Growing of GANs for Improved Quality, Stability, and Variation" (2017)
https://arxiv.org/abs/1710.10196  Tero Karras, Timo Aila, Samuli Laine, Jaakko Lehtinen

G and D begin at 4x4 pixels, where images are simple, and are doubled again and again up to 1024x1024. A new pair of
layers is not switched on but faded in: its weight alpha grows from 0 to 1, and the real images are faded alike. The
loss is any GAN's; here, as in the paper's main results, WGAN-GP's with one critic update per generator update:

    L = D(x_tilde) - D(x) + λ/γ² (‖∇_x_hat D(x_hat)‖₂ - γ)² + ε_drift D(x)²      (WGAN-GP; A.1; γ: §6.5)

Differs from the paper, or from its authors' code:
- The norm in the penalty is of the gradient by pixels of the last resolution, as in their code, which enlarges all
  images to it. The paper does not say; by the current resolution's pixels it would halve whenever a fade begins.
- Adam is reset when a fade begins and when it ends: their code; the paper does not say.
- Weights are multiplied by He's constant (§4.1 divides by it); gain 1 in toRGB and in D's last layer: their code.
- Pixel norm after every layer of G but toRGB (§4.2, their code; A.1: after every 3x3), and on the latents (code).
- D averages 2x2 after the activation (table 2; their later code: before it). Its last layer but one has as many
  feature maps as 4x4 has; theirs fmap_base, but at most fmap_max, which by default is the same.
- Minibatch standard deviation over the minibatch (§3) of each process; their later code: over groups of 4 (or 16).
- With k processes (torchrun) each takes 1/k of the minibatch, rounded up; a single image's deviation says nothing.
- The average of G includes the newest update; theirs lags by one. Lower resolutions are not rounded to 8 bits.
- The numbers are A.1's. Their later code's: phases of 600 thousand images, minibatches of 128 to 4, a higher lr
  at high resolutions. Their runs go on at the last resolution, to 12 to 19 million images in all (here --steps).
- Not here: labels, mirrored images, drawing without replacement, a lower lr for the first 40 thousand images."""
import copy
import json
import os
import re
import sys
from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from collections import defaultdict
from datetime import timedelta
from inspect import getfile, getmodule, getsource, signature
from math import ceil, log2
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
from torch import cuda, nn
from common import batches, load_images, save_animation, save_curves, save_images

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


class PixelNorm(nn.Module):
    """§4.2: every pixel's feature vector, scaled to a mean square of 1.  (m, C, ...) -> (m, C, ...)"""
    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


class MinibatchStddev(nn.Module):
    """§3: one more feature map, constant: the standard deviation over the minibatch of each feature at each place,
    averaged. A minibatch of one has 1e-4, never nan.  (m, C, H, W) -> (m, C + 1, H, W)"""
    def forward(self, x):
        std = (x.var(0, correction=0) + 1e-8).sqrt().mean()
        return torch.cat([x, std.expand(len(x), 1, *x.shape[2:])], 1)


pixel_norm, minibatch_stddev = PixelNorm(), MinibatchStddev()
upsample = nn.Upsample(scale_factor=2)      # every pixel four times (A.1, Fig. 2).  (m, C, H, W) -> (m, C, 2H, 2W)
downsample = nn.AvgPool2d(2)                # their 2x2 averages (A.1, Fig. 2).  (m, C, H, W) -> (m, C, H/2, W/2)


# ---- Networks (table 2) ------------------------------------------------------------------------------------------
def feature_maps(size, fmap_base, fmap_max):
    """At 4x4, 8x8, ..., size; for 8192 and 512 those of table 2.  ValueError for any other size"""
    if size not in [2 ** k for k in range(2, 11)]:
        raise ValueError(f"--size must be a power of two from 4 to 1024, not {size}")
    return [max(1, min(fmap_base // 2 ** (k + 1), fmap_max)) for k in range(int(log2(size)) - 1)]


class Generator(nn.Module):
    """G(z, resolution, alpha): (m, nz) -> images, about in [-1, 1], (m, channels, resolution, resolution).
    alpha in [0, 1]: the weight of the newest block.  G(z) alone: as schedule says of the images shown so far"""
    def __init__(self, size, channels=3, fmap_base=8192, fmap_max=512, nz=512, kimg=800.0):
        super().__init__()
        n = feature_maps(size, fmap_base, fmap_max)
        self.size, self.kimg = size, kimg
        self.register_buffer("shown", torch.tensor(0))          # images so far, set when a picture is made of G_ema
        # One of the 4x4 weights meets the latent in each place; fan_in counts all 16, as in the authors' code.
        self.blocks = nn.ModuleList([nn.Sequential(             # (m, nz, 1, 1) -> (m, n[0], 4, 4)
            Conv(nz, n[0], 4, padding=3), nn.LeakyReLU(0.2, True), pixel_norm,
            Conv(n[0], n[0], 3, padding=1), nn.LeakyReLU(0.2, True), pixel_norm)])
        for a, b in zip(n, n[1:]):                              # (m, a, H, W) -> (m, b, 2H, 2W)
            self.blocks.append(nn.Sequential(
                upsample, Conv(a, b, 3, padding=1), nn.LeakyReLU(0.2, True), pixel_norm,
                Conv(b, b, 3, padding=1), nn.LeakyReLU(0.2, True), pixel_norm))
        self.to_rgb = nn.ModuleList(Conv(b, channels, 1, gain=1) for b in n)

    def forward(self, z, resolution=None, alpha=1.0):
        if resolution is None:
            _, resolution, alpha = schedule(self.shown.item(), self.size, self.kimg)
        last = int(log2(resolution)) - 2                        # 4x4 is block 0, 8x8 block 1, ...
        x = self.blocks[0](pixel_norm(z)[:, :, None, None])
        for k in range(1, last + 1):
            before, x = x, self.blocks[k](x)
        image = self.to_rgb[last](x)
        if alpha < 1 and last > 0:                              # Fig. 2 (b): G
            image = (1 - alpha) * upsample(self.to_rgb[last - 1](before)) + alpha * image
        return image


class Discriminator(nn.Module):
    """D(x, resolution, alpha): (m, channels, resolution, resolution) -> scores (m,), which depend on the minibatch.
    alpha in [0, 1]: the weight of the newest block.  D(x) alone: the resolution of x, alpha 1"""
    def __init__(self, size, channels=3, fmap_base=8192, fmap_max=512):
        super().__init__()
        n = feature_maps(size, fmap_base, fmap_max)
        self.from_rgb = nn.ModuleList(nn.Sequential(Conv(channels, b, 1), nn.LeakyReLU(0.2, True)) for b in n)
        self.blocks = nn.ModuleList([nn.Sequential(             # (m, n[0], 4, 4) -> (m,)
            minibatch_stddev, Conv(n[0] + 1, n[0], 3, padding=1), nn.LeakyReLU(0.2, True),
            Conv(n[0], n[0], 4), nn.LeakyReLU(0.2, True), Conv(n[0], 1, 1, gain=1), nn.Flatten(0))])
        for a, b in zip(n, n[1:]):                              # (m, b, H, W) -> (m, a, H/2, W/2)
            self.blocks.append(nn.Sequential(
                Conv(b, b, 3, padding=1), nn.LeakyReLU(0.2, True),
                Conv(b, a, 3, padding=1), nn.LeakyReLU(0.2, True), downsample))

    def forward(self, x, resolution=None, alpha=1.0):
        last = int(log2(resolution or x.shape[-1])) - 2
        h = self.from_rgb[last](x)
        for k in range(last, 0, -1):
            h = self.blocks[k](h)
            if k == last and alpha < 1:                         # Fig. 2 (b): D
                h = (1 - alpha) * self.from_rgb[k - 1](downsample(x)) + alpha * h
        return self.blocks[0](h)


# ---- Growing (§2, Fig. 2), and what the loss needs ---------------------------------------------------------------
def schedule(images_shown, size=1024, kimg=800.0):
    """A.1: phases of kimg thousand images. In phase 0 4x4 pixels; in 1, 3, ... the next resolution, up to size, is
    faded in, in 2, 4, ... stabilised.  Images shown to D so far -> (phase, resolution, alpha from 0 to 1)"""
    length = max(1, round(1000 * kimg))
    phase = min(images_shown // length, 2 * int(log2(size)) - 4)        # the last one does not end
    alpha = images_shown % length / length if phase % 2 == 1 else 1.0
    return phase, 4 * 2 ** ((phase + 1) // 2), alpha


def grad_norm(D, x, resolution, alpha):
    """‖∇_x D(x)‖₂ of every image x, differentiable by D's weights.  (m, ...) -> (m,)"""
    x = x.detach().requires_grad_()
    # By the minibatch standard deviation an image has an effect on all scores; the authors sum them, too.
    (grad,) = torch.autograd.grad(D(x, resolution, alpha).sum(), x, create_graph=True)
    return torch.linalg.vector_norm(grad.reshape(len(x), -1), dim=1)    # unlike sqrt, no nan in its gradient at 0


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
    batch_size: int = None,   # m         images per batch, of all processes (16 up to 128x128, then 14, 6, 3)
    nz=512,                   # z         dimensions of the latent variable
    fmap_base=8192,           #           feature maps: 2 fmap_base / resolution, but at most fmap_max
    fmap_max=512,             #           feature maps where resolutions are low; fewer: smaller networks
    # The images
    dataset="mnist",          #           mnist, fashion-mnist, cifar10, or the path of a folder of images
    digit: int = None,        #           only this class, 0 to 9
    size=32,                  #           last width and height: 4, 8, ..., 1024
    channels: int = None,     #           1 grey, 3 RGB (what the data set has; a folder: 3)
    root: str = None,         #           where data sets are kept (data/ beside common.py)
    # The run
    steps: int = None,        #           updates of G (until the last resolution has been stabilised for kimg)
    seed=0,                   #           of every random number but the pictures' latents
    device="cuda" if cuda.is_available() else "cpu",    #         any torch device: cpu, cuda, cuda:1, mps, ...
    out: str = None,          #           run folder (runs/SCRIPT-DATASET-DIGIT)
    save_every=500,           #           steps between rows of the log, pictures and checkpoints
    keep=False,               #           keep every checkpoint beside its picture: 000500.pt, 001000.pt, ...
):
    """As A.1 says.  Returns the average of G, D.  ValueError, OSError: one sentence says what is wrong"""
    config = dict(locals())
    feature_maps(size, fmap_base, fmap_max)                         # ValueError before images are read
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():    # torchrun
        dist.init_process_group(timeout=timedelta(days=1))          # the first process may decode images for hours
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if world > 1 and device == "cuda":
        device = config["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
        cuda.set_device(device)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")                          # the first process speaks, and writes, for all
        dist.barrier()                                              # until it has decoded the images
    images = load_images(dataset, digit, size, channels, root)
    if rank == 0 and world > 1:
        dist.barrier()
    config |= dict(images=len(images), channels=images.shape[1], processes=world)
    torch.manual_seed(seed)
    place = dict(device=device, memory_format=torch.channels_last)  # faster
    G = Generator(size, images.shape[1], fmap_base, fmap_max, nz, kimg).to(**place)
    D = Discriminator(size, images.shape[1], fmap_base, fmap_max).to(**place)
    G_ema = copy.deepcopy(G).requires_grad_(False)
    theta, w = ([p for p in net.parameters() if p.requires_grad] for net in (G, D))     # inputs=w: ∇_w, no more
    opt_G = torch.optim.Adam(theta, lr, (beta1, beta2), eps=1e-8, fused=True)
    opt_D = torch.optim.Adam(w, lr, (beta1, beta2), eps=1e-8, fused=True)
    m = {4 * 2 ** k: ceil((batch_size or n) / world) for k, n in enumerate([16] * 6 + [14, 6, 3])}    # A.1: 16 to 3
    P_r = batches(images, m[4], device)
    resolutions = [4 * 2 ** ((phase + 1) // 2) for phase in range(2 * int(log2(size)) - 3)]     # 4, 8, 8, 16, ...
    config["steps"] = steps or sum(ceil(1000 * kimg / (world * m[resolution])) for resolution in resolutions)
    fixed_z = torch.randn(min(64, (2048 // size) ** 2), nz, generator=torch.Generator().manual_seed(0)).to(device)

    def iteration():
        nonlocal shown
        phase, resolution, alpha = schedule(shown, size, kimg)      # §2      4x4; fade in 8x8, stabilise it; ...
        x = next(P_r)[:m[resolution]]
        while x.shape[-1] > resolution:
            x = downsample(x)
        x = (1 - alpha) * upsample(downsample(x)) + alpha * x       # Fig. 2  real images fade as generated ones do
        z = torch.randn(len(x), nz, device=device)                  # A.1     latents; G puts them on a hypersphere
        eps = torch.rand(len(x), 1, 1, 1, device=device)
        with torch.no_grad():
            x_tilde = G(z, resolution, alpha)                       # Fig. 2
        x_hat = eps * x + (1 - eps) * x_tilde
        D_x_tilde = D(x_tilde, resolution, alpha)                   # code    real and generated images apart: each
        D_x = D(x, resolution, alpha)                               #         minibatch has its standard deviation
        norm = grad_norm(D, x_hat, resolution, alpha)
        penalty = (norm * resolution / size - gamma) ** 2           # code    ∇ by the last resolution's pixels
        L = (D_x_tilde - D_x                                        # WGAN-GP L ← D(x_tilde) − D(x)
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
        for average, now in zip(G_ema.parameters(), G.parameters()):
            average.lerp_(now.detach(), 1 - ema)                    # A.1     θ_ema ← 0.999 θ_ema + 0.001 θ
        shown += world * len(x)
        if schedule(shown, size, kimg)[0] > phase:                  # code    the phase ends: Adam is reset
            opt_G.state.clear()
            opt_D.state.clear()
        return dict(wasserstein=(D_x - D_x_tilde).mean(), L_D=L.mean(), L_G=L_G.mean(), penalty=penalty.mean(),
                    drift=(D_x ** 2).mean())

    states = dict(G=G, D=D, G_ema=G_ema, opt_G=opt_G, opt_D=opt_D)  # all that a checkpoint keeps
    real, out = next(P_r)[:len(fixed_z)], folder(__file__, config)
    rows = resume(out, config, states)
    shown = G_ema.shown.item()                                      # images, to D, so far
    if rank > 0:
        torch.manual_seed(seed + (len(rows) << 8) + rank)           # other images and noise in each, anew
        list(rounds(iteration, config, rows))
        return G_ema.eval(), D
    save_images(real, out / "real.png")                             # before they are made smaller
    for row in rounds(iteration, config, rows):                     # every save_every iterations
        G_ema.shown.fill_(shown)
        _, row["resolution"], row["alpha"] = schedule(shown, size, kimg)
        save_images(G_ema(fixed_z), out / f"{row['step']:06d}.png")
        save(out, config, states, rows)
    save_animation(out)
    return G_ema.eval(), D


# ---- The run: as in every script; nothing below is in the paper --------------------------------------------
def average_gradients(parameters):
    """Over all processes, so that each makes the same step; with one there is nothing to do"""
    for p in parameters:
        if dist.is_initialized() and p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()


def folder(script, config):
    """Where a run's files go: OUT, or runs/SCRIPT-DATASET-DIGIT"""
    names = Path(script).stem, Path(config["dataset"]).resolve().name, config.get("digit")
    return Path(config["out"] or "runs/" + "-".join(str(name) for name in names if name is not None))


def resume(out, config, states):
    """Makes config plain, and puts out's checkpoint into states.  -> the log's rows.  ValueError: other settings"""
    config |= json.loads(json.dumps(config, default=lambda it: getattr(it, "item", it.__str__)()))    # no NumPy
    if not (out / "checkpoint.pt").exists():
        print(f"a new run in {out}")
        return []
    saved = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
    for name, now in config.items():
        was = saved["config"].get(name)
        if was != now and name not in ("steps", "save_every", "keep", "graph", "device", "root", "out"):
            raise ValueError(f"{out} has {name} {was}, not {now}: name another --out")
    for name, state in states.items():
        if hasattr(state, "param_groups"):                  # an optimizer
            saved[name]["param_groups"] = state.state_dict()["param_groups"]
        state.load_state_dict(saved[name])
    torch.set_rng_state(saved["random"])
    if "random_cuda" in saved and "cuda" in config["device"]:
        cuda.set_rng_state(saved["random_cuda"], config["device"])
    print(f"going on from step {saved['rows'][-1]['step']} in {out}")
    return saved["rows"]


def save(out, config, states, rows):
    """Writes the log and, whole or not at all, since the run may be killed, the checkpoint; prints a line"""
    save_curves(rows, out)
    saved = {name: state.state_dict() for name, state in states.items()}
    for state in saved.values():
        state.pop("param_groups", None)                     # lr and the like are the code's, not the checkpoint's
    saved |= dict(config=config, rows=rows, random=torch.get_rng_state())
    if "cuda" in config["device"]:
        saved["random_cuda"] = cuda.get_rng_state(config["device"])
    for name in ["checkpoint", f"{rows[-1]['step']:06d}"] if config["keep"] else ["checkpoint"]:
        torch.save(saved, out / f"{name}.{os.getpid()}")
        os.replace(out / f"{name}.{os.getpid()}", out / f"{name}.pt")
    left = rows[-1]["seconds"] * (config["steps"] / rows[-1]["step"] - 1) / 60
    print(*(f"{name} {value:.4g} " for name, value in rows[-1].items()), f"{left:.0f} min left")


def rounds(iteration, config, rows):
    """Makes the steps that are left.  Every save_every steps it appends their means to rows, and yields them"""
    torch.backends.cudnn.benchmark = True                   # on CUDA: the fastest kernels for these shapes
    last = rows[-1] if rows else dict(step=0, seconds=0.0)
    begin, sums = perf_counter() - last["seconds"], defaultdict(float)
    for step in range(last["step"] + 1, config["steps"] + 1):
        for name, loss in iteration().items():
            sums[name] += loss.detach()                     # on the device: nothing waits for it
        if step % config["save_every"] == 0 or step == config["steps"]:
            means = {name: total.item() / (step - last["step"]) for name, total in sums.items()}
            last = dict(step=step, seconds=perf_counter() - begin, **means)
            rows.append(last)
            yield last
            sums.clear()


def load(checkpoint, network=Generator):
    """The average of G in a checkpoint.pt, on the CPU: z ~ N(0, 1), (n, nz) -> images, about in [-1, 1]"""
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    G = network(**{name: saved["config"][name] for name in signature(network).parameters})
    G.load_state_dict(saved["G_ema"])
    G.config = saved["config"]
    return G.eval().requires_grad_(False)


def generate(out, n, seed, device, load=load):
    """Writes n images of the run in out into out/generated: image i depends on seed and i alone.  MNIST's: 28x28"""
    G, noise = load(out / "checkpoint.pt").to(device), torch.Generator().manual_seed(seed)
    for i in range(n):
        x = G(torch.randn(1, G.config["nz"], generator=noise).to(device))
        if G.config["dataset"] in ("mnist", "fashion-mnist") and x.shape[-1] == 32:
            x = x[..., 2:-2, 2:-2]                          # without the border that load_images gave them
        save_images(x, out / "generated" / f"{seed}-{i:06d}.png")
    print(f"{n:,} images in {out / 'generated'}")


def main(train, generate, argv=None):
    """The command line of train.  SystemExit: 2 and one sentence after a user's mistake, 130 after Ctrl-C"""
    getattr(sys.stdout, "reconfigure", dict)(errors="replace", line_buffering=True)      # λ may become ?
    parser = ArgumentParser(description=getmodule(train).__doc__, formatter_class=RawDescriptionHelpFormatter)
    comments = dict(re.findall(r"^    (\w+).*?, +# (.*)$", getsource(train), re.M))     # of train's arguments
    for name, setting in signature(train).parameters.items():
        kind = setting.annotation if setting.default is None else type(setting.default)
        how = dict(action=BooleanOptionalAction) if kind is bool else dict(type=kind)
        how |= dict(default=setting.default, help=f"{comments.get(name, '')} ({setting.default})")
        parser.add_argument("--" + name.replace("_", "-"), **how)
    parser.add_argument("--generate", type=int, metavar="N", help="N images of the run in OUT")
    config = vars(parser.parse_args(argv))
    try:
        if (n := config.pop("generate")) is None:
            train(**config)
        else:
            generate(folder(getfile(train), config), n, config["seed"], config["device"])
    except (ValueError, OSError) as error:
        parser.exit(2, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "stopped; the same command goes on from its last checkpoint\n")


if __name__ == "__main__":
    main(train, generate)
