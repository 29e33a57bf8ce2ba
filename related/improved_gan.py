"""Improved Techniques for Training GANs, §3.2-3.5 (NIPS 2016), https://arxiv.org/abs/1606.03498
T. Salimans, I. Goodfellow, W. Zaremba, V. Cheung, A. Radford, X. Chen

Four changes to DCGAN, each with a flag: D sees how alike a batch's images are (--minibatch), and learns 0.9 for real
ones (--smooth); G normalises by a fixed batch (--vbn); weights pay for the distance from their mean (--history).

    o(x_i)_b = Σ_{j≠i} exp(-‖M_ib - M_jb‖₁), M_i = f(x_i) T                             §3.2
    L_D = E[-α log D(x) - (1 - α) log(1 - D(x))] - E log(1 - D(G(z)))                   §3.4
    L_G = -E log D(G(z));    to both: history ‖θ - 1/t Σ_{i≤t} θ[i]‖²                   §3.3

Differs from the paper, or from its authors' code:
- Networks: those of wgan_gp.py, T from N(0, 1/A); theirs are larger, and their T is normalised.
- §3.3 is in no code of theirs, and has no weight in the paper. Here: 0, that is, off.
Measured: `python -m related.improved_gan`, 2 EPYC cores, torch 2.14: 6 min, Fréchet distance 46.7, entropy 3.28."""
import re
from argparse import ArgumentParser, BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from copy import deepcopy
from inspect import getsource, signature
from pathlib import Path
from time import perf_counter

import torch
from torch import cuda, nn
from torch.nn.functional import softplus
from common import (batches, channels_of, checked, claim, compare, find_device, fitting, in_one_sentence,
                    load_images, name_of, next_image, replacing, resident, run_folder, same_shapes,
                    save_animation, save_curve, save_each, save_images, stop_signals)

# ---- Networks: 4x4 kernels, as in WGAN's code; from 4x4 pixels on every layer doubles or halves the image --------
class Generator(nn.Sequential):
    """G(z): latents -> images in [-1, 1].  (m, nz) -> (m, channels, size, size).  ValueError for another size"""
    def __init__(self, nz=100, channels=1, size=32, width=16, vbn=True):
        if size not in (16, 32, 64, 128, 256):
            raise ValueError(f"--size must be 16, 32, 64, 128 or 256, not {size}")
        norm, n = VirtualBatchNorm if vbn else nn.BatchNorm2d, width * size // 8
        layers = [nn.Unflatten(1, (nz, 1, 1)), nn.ConvTranspose2d(nz, n, 4, 1, 0, bias=False)]      # (m, n, 4, 4)
        while n > width:
            layers += [norm(n), nn.ReLU(True), nn.ConvTranspose2d(n, n // 2, 4, 2, 1, bias=False)]
            n //= 2                                             # (m, n, 8, 8), ..., (m, width, size/2, size/2)
        layers += [norm(n), nn.ReLU(True), nn.ConvTranspose2d(n, channels, 4, 2, 1, bias=False)]
        super().__init__(*layers, nn.Tanh())                    # (m, channels, size, size)
        self.register_buffer("reference", torch.randn(64 if vbn else 0, nz))    # §3.5  chosen once

    def forward(self, z):
        return super().forward(torch.cat([self.reference, z]))[len(self.reference):]


class VirtualBatchNorm(nn.Module):
    """§3.5  The first B examples of x, the reference, are normalised by their own mean and variance; each other by
    those of the B + 1 examples that it is with them.  (B + m, n, H, W) -> (B + m, n, H, W)"""
    def __init__(self, n, B=64):
        super().__init__()
        self.gamma, self.beta, self.B = nn.Parameter(torch.ones(n)), nn.Parameter(torch.zeros(n)), B

    def forward(self, x):
        own = torch.stack([x.mean((2, 3)), x.square().mean((2, 3))])            # (2, B + m, n)
        reference = own[:, :self.B].mean(1, keepdim=True).expand(-1, self.B, -1)
        mixed = (self.B * reference[:, :1] + own[:, self.B:]) / (self.B + 1)
        mean, square = torch.cat([reference, mixed], 1)
        scale = self.gamma / (square - mean ** 2 + 1e-5).sqrt()
        return x * scale[..., None, None] + (self.beta - mean * scale)[..., None, None]


class Discriminator(nn.Sequential):
    """D(x): images -> logits of being real.  (m, channels, size, size) -> (m,)"""
    def __init__(self, channels=1, size=32, width=16, kernels=50):
        n = width
        layers = [nn.Conv2d(channels, n, 4, 2, 1), nn.LeakyReLU(0.2)]               # (m, n, size/2, size/2)
        while n < width * size // 8:
            layers += [nn.Conv2d(n, 2 * n, 4, 2, 1), nn.LeakyReLU(0.2)]
            n *= 2                                              # (m, n, size/4, size/4), ..., (m, n, 4, 4)
        layers += [nn.Flatten(), MinibatchDiscrimination(16 * n, kernels)]          # f(x), (m, A), (m, A + B)
        super().__init__(*layers, nn.Linear(16 * n + kernels, 1), nn.Flatten(0))


class MinibatchDiscrimination(nn.Module):
    """§3.2  f(x) -> [f(x), o(x)], for the images of one batch.  (m, A) -> (m, A + B)"""
    def __init__(self, A, B=50, C=5):
        super().__init__()
        self.T = nn.Parameter(torch.randn(A, B, C) / A ** 0.5)

    def forward(self, f):
        M = torch.einsum("ma,abc->bmc", f, self.T)
        c = (-torch.cdist(M, M, p=1)).exp()                     # (B, m, m)
        return torch.cat([f, c.sum(1).T - 1], 1)                # without the image itself, exp(0)


def distance(weights, means):
    """§3.3  ‖θ - 1/t Σ θ[i]‖²: the sum over all weights of their squared distance from their mean so far -> ()"""
    return sum((each - mean).square().sum() for each, mean in zip(weights, means))


# ---- DCGAN with §3.2-3.5 -----------------------------------------------------------------------------------------
@checked
def train(
    minibatch=True,         # §3.2      minibatch discrimination
    kernels=50,             # B         its kernels
    history=0.0,            # §3.3      weight of historical averaging
    smooth=0.9,             # §3.4 α    label of real images; 1: no smoothing
    vbn=True,               # §3.5      virtual batch normalisation in G; else batch normalisation
    lr=2e-4,                #           Adam: step size
    beta1=0.5,              # β₁        Adam: decay of the first moment
    beta2=0.999,            # β₂        Adam: decay of the second moment
    batch_size=64,          # m         images per batch
    # The networks
    nz=100,                 # z         dimensions of the latent variable
    width=16,               #           feature maps at size/2 pixels; 16: minutes on a CPU, 64: as in WGAN's code
    # The images
    dataset="mnist",        #           mnist, fashion-mnist, cifar10, or the path of a folder of images
    digit: int = None,      #           only this class, 0 to 9
    root: str = None,       #           where data sets are kept (data/ beside common.py)
    size=32,                #           width and height in pixels: 16, 32, 64, 128 or 256
    channels: int = None,   #           1 grey, 3 RGB (what the data set has; a folder: 3)
    # The run
    steps=3000,             #           updates of D, and of G
    seed=0,                 #           of every random number but the pictures' latents
    device="auto",          #           cuda if there is one, else cpu; or any torch device: cuda:1, mps, ...
    out: str = None,        #           run folder (runs/SCRIPT-DATASET-DIGIT)
    save_every=100,         #           steps between rows of the log, pictures and checkpoints
    keep=False,             #           keep every checkpoint beside its picture: 000100.pt, 000200.pt, ...
    eager=False,            #           CUDA: run every step, which may then print and branch; else one is replayed
):
    """As above.  Returns G, D.  ValueError or OSError: one sentence.  KeyboardInterrupt: Ctrl-C, all is saved"""
    device, channels, dataset = find_device(device), channels_of(dataset, channels), str(dataset)
    config = Namespace(**locals())
    torch.manual_seed(seed)
    fixed_z = torch.randn(64, nz, generator=torch.Generator().manual_seed(0)).to(device)     # of the pictures
    images = resident(load_images(dataset, digit, size, root, channels), device)
    config.images, config.eager = len(images), eager or not images.is_cuda
    G = Generator(nz, channels, size, width, vbn).to(device)
    D = Discriminator(channels, size, width, kernels if minibatch else 0).to(device)
    G_mean, D_mean = deepcopy(G).requires_grad_(False), deepcopy(D).requires_grad_(False)
    theta, w = list(G.parameters()), list(D.parameters())
    opt_G = torch.optim.Adam(theta, lr, (beta1, beta2), fused=True, capturable=not config.eager)
    opt_D = torch.optim.Adam(w, lr, (beta1, beta2), fused=True, capturable=not config.eager)
    P_r = batches(images, batch_size, device)
    run = Run(config, fixed_z, next(P_r)[:64], G=G, D=D, G_mean=G_mean, D_mean=D_mean, opt_G=opt_G, opt_D=opt_D)

    for step in run:
        x = next(P_r)
        z = torch.randn(len(x), nz, device=device)
        with torch.no_grad():
            x_tilde = G(z)
        D_x, D_x_tilde = D(x), D(x_tilde)                                       # §3.2  two batches, apart
        L_D = (smooth * softplus(-D_x) + (1 - smooth) * softplus(D_x) + softplus(D_x_tilde)).mean()     # §3.4
        opt_D.zero_grad()
        (L_D + history * distance(w, D_mean.parameters())).backward(inputs=w)   # §3.3
        opt_D.step()
        z = torch.randn(batch_size, nz, device=device)
        L_G = softplus(-D(G(z))).mean()
        opt_G.zero_grad()
        (L_G + history * distance(theta, G_mean.parameters())).backward(inputs=theta)
        opt_G.step()
        for means, opt in (D_mean, opt_D), (G_mean, opt_G):
            for mean, now in zip(means.parameters(), opt.param_groups[0]["params"]):
                mean.lerp_(now.detach(), 1 / (opt.state[now]["step"] + 1))      # 1/t Σ θ[i], the first θ too
        run.log(L_D=L_D, L_G=L_G)
    return G.eval(), D


# ---- The run: as in every script, but for --no-...; nothing below is in the paper --------------------------------
SCRIPT = Path(globals().get("__file__", "notebook")).stem
MAY_CHANGE = {"steps", "save_every", "keep", "eager", "device", "root", "out"}     # when a run goes on


class Run:
    """for step in run: the steps still to be made; the very first is 1.  parts: all that has a state_dict"""
    def __init__(self, config, fixed_z, real, **parts):
        self.config, self.fixed_z, self.parts = config, fixed_z, parts
        self.settings = {key: it for key, it in vars(config).items() if key not in MAY_CHANGE}
        self.settings["dataset"] = name_of(config.dataset)
        self.out = run_folder(SCRIPT, config)
        self.lock = claim(self.out)
        self.step, self.time, self.rows, self.sums = 0, 0.0, [], {}
        self.random = [torch, cuda] if fixed_z.is_cuda else [torch]
        if Path(self.out, "checkpoint.pt").exists():
            saved = read(self.out)
            with fitting(self.out, SCRIPT):
                compare(saved, self.settings, self.out)
                for name, part in parts.items():
                    if name.startswith("opt"):              # lr, fused, capturable are those of this run
                        saved[name]["param_groups"] = part.state_dict()["param_groups"]
                    part.load_state_dict(saved[name])
                same_shapes(parts["opt_G"], parts["opt_D"])
                self.step, self.time, self.rows, states = saved["run"]
                for each, state in zip(self.random, states):
                    each.set_rng_state(state)
        save_images(real, self.out / "real.png")
        print(f"device: {fixed_z.device}\nrun folder: {self.out}\n{self.step} of {config.steps} steps are done")

    def __iter__(self):
        config, first = self.config, self.step
        self.since, self.begin = self.step, perf_counter() - self.time
        with stop_signals() as stop:
            for self.step in range(first + 1, config.steps + 1):
                yield from [self.step] if config.eager else self.recorded(first)
                if stop or self.step == config.steps or self.step % config.save_every == 0:
                    self.save()
                    if stop:
                        break
        save_animation(self.out)
        if stop:
            raise KeyboardInterrupt

    def recorded(self, first):
        """On CUDA three steps run on a side stream, the fourth is only recorded, and from it on all are replays"""
        number = self.step - first
        if number == 1:
            self.graph, self.stream = cuda.CUDAGraph(), cuda.Stream()
        context = cuda.stream(self.stream)
        if number == 4:
            context = cuda.graph(self.graph, stream=self.stream)
        if number <= 4:
            cuda.synchronize()
            with context:
                yield self.step
            cuda.synchronize()
        if number >= 4:
            self.graph.replay()

    def log(self, **losses):
        """Adds up a step's losses, scalar tensors; a row of the log has their means"""
        for name, loss in losses.items():
            self.sums.setdefault(name, torch.zeros_like(loss)).add_(loss.detach())

    @torch.no_grad()
    def save(self):
        """A row, the pictures, when these are there, the checkpoint, and then a line: its reader may have gone"""
        count, self.since = self.step - self.since, self.step
        means = {name: total.item() / count for name, total in self.sums.items()}
        for total in self.sums.values():
            total.zero_()                                   # in place: a recorded step adds to it
        self.time = perf_counter() - self.begin
        self.rows.append(dict(step=self.step, seconds=self.time, **means))
        save_curve(self.rows, self.out)                     # ValueError if a loss is not finite
        G = self.parts["G"].eval()                          # by running statistics an image depends on its z alone
        save_images(G(self.fixed_z), self.out / f"{self.step:06d}.png")
        G.train()
        saved = {name: part.state_dict() for name, part in self.parts.items()}
        states = [each.get_rng_state() for each in self.random]
        saved |= dict(settings=self.settings, run=(self.step, self.time, self.rows, states))
        for name in (f"{self.step:06d}.pt", "checkpoint.pt"):
            if self.config.keep or name == "checkpoint.pt":
                with replacing(self.out / name) as file:
                    torch.save({SCRIPT: saved}, file)
        left = self.time * (self.config.steps / self.step - 1) / 60
        losses = "  ".join(f"{name} {mean:.4g}" for name, mean in means.items())
        speed = f"{self.step / self.time:.1f} steps/s  {left:.0f} min left"
        print(f"step {self.step}/{self.config.steps}  {losses}  {speed}", flush=True)


def read(path):
    """The checkpoint in a run folder, or a file that --keep wrote.  ValueError if there is no good one"""
    if Path(path).is_dir():
        path = Path(path, "checkpoint.pt")
    with fitting(path, SCRIPT):
        return torch.load(path, map_location="cpu", weights_only=True)[SCRIPT]


def load(path):
    """The generator of what read() finds, on the CPU: z ~ N(0, 1), (n, nz) -> images in [-1, 1], (n, C, H, W)"""
    saved = read(path)
    with fitting(path, SCRIPT):
        G = Generator(*(saved["settings"][name] for name in ("nz", "channels", "size", "width", "vbn")))
        G.load_state_dict(saved["G"])
    return G.eval().requires_grad_(False)


@checked
def generate(path, n, device="auto", seed=0):
    """Writes n more images of what read() finds, image i by seed and i alone, and returns their folder"""
    G, settings, device = load(path), read(path)["settings"], find_device(device)
    (folder, first), noise = next_image(path, n), torch.Generator().manual_seed(seed)
    z = torch.cat([torch.randn(64, settings["nz"], generator=noise) for _ in range(0, first + n, 64)]).to(device)
    images = map(G.to(device), z[first:first + n].split(64))
    return save_each(images, folder, first, settings.get("dataset"))


@in_one_sentence(SCRIPT)
def main(argv=None):
    """The command line.  SystemExit: 2 after a user's mistake, with one sentence; 130 after Ctrl-C"""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{SCRIPT}.py: {message}\n")
    comments = dict(re.findall(r"^    (\w+).*?,  +# (.*)$", getsource(train), re.M))
    for name, setting in signature(train).parameters.items():
        kind = setting.annotation if setting.default is None else type(setting.default)
        how = dict(action=BooleanOptionalAction) if kind is bool else dict(type=kind)
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
