"""DRAGAN, "On Convergence and Stability of GANs", https://arxiv.org/abs/1705.07215 (2017)
Naveen Kodali, Jacob Abernethy, James Hays, Zsolt Kira

When a GAN collapses, say the authors, D is steep around real images. So D pays where the norm of its gradient near
them is not k; where the generated ones are does not matter. The rest is the first GAN; D gives logits, as in the
code. No batch norm in D: the penalty is each image's own.

    L_D = E[-log σ(D(x))] + E[-log(1 - σ(D(G(z))))] + λ E[(‖∇_x D(x + δ)‖₂ - k)²]      (the last term: (1))
    L_G = E[-log σ(D(G(z)))]

Differs from the paper, or from its authors' code:
- δ is their notebook's noise, 0.5 std(x) U[0, 1), which only brightens; its author has called that a bug: U[-1, 1)
  was meant. Without the notebook's random step from x towards x + δ, needless as its author says. The paper has
  N(0, cI), c = 10 suggested: a deviation of 3.2, which would drown pixels in [-1, 1].
- Networks: those of wgan_gp.py, with its initialisation, on 32x32 pixels in [-1, 1]; the authors' for MNIST: fully
  connected, 128 hidden units, on 28x28 pixels in [0, 1]. z has 100 dimensions, N(0, 1); theirs: uniform on [-1, 1].
- --width 16, --steps 6000, m = 64, for two CPU cores and minutes; the authors: 200,000 steps of 128 images.
- Batches are drawn with replacement, not by epochs.
Measured: `python -m related.dragan --digit 7`, 2 EPYC cores, torch 2.14: 7 min, Fréchet distance 12.1."""
import re
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
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


class Discriminator(nn.Sequential):
    """D(x): images -> logits of being real.  (m, channels, size, size) -> (m,).  No batch norm"""
    def __init__(self, channels=1, size=32, width=16):
        n = width
        layers = [nn.Conv2d(channels, n, 4, 2, 1), LeakyReLU()]                    # (m, n, size/2, size/2)
        while n < width * size // 8:
            layers += [nn.Conv2d(n, 2 * n, 4, 2, 1), LeakyReLU()]
            n *= 2                                              # (m, n, size/4, size/4), ..., (m, n, 4, 4)
        super().__init__(*layers, nn.Flatten(), nn.Linear(16 * n, 1), nn.Flatten(0))    # (m, 1), (m,)


class LeakyReLU(nn.Module):     # nn.LeakyReLU, but for f″ = 0, which backward() would send through all of D
    def forward(self, x):
        return x * x.detach().sign().clamp(min=0.2)


# ---- The penalty's two parts -------------------------------------------------------------------------------------
def perturb(x, c=0.5):
    """x + δ, δ = c std(x) U[0, 1): std of the whole batch, U of every pixel its own.  (m, ...) -> (m, ...)"""
    return x + c * x.std(correction=0) * torch.rand_like(x)


def grad_norm(D, x):
    """‖∇_x D(x)‖₂ of every image x, itself differentiable.  (m, ...) -> (m,)"""
    x = x.detach().requires_grad_()
    # No score depends on another image (so: no batch norm in D): the gradient of the sum has each image's own.
    (grad,) = torch.autograd.grad(D(x).sum(), x, create_graph=True)
    return torch.linalg.vector_norm(grad.reshape(len(x), -1), dim=1)    # unlike sqrt(sum of squares), not nan at 0


# ---- The GAN with (1) --------------------------------------------------------------------------------------------
@checked
def train(
    # As in the authors' code, but for m
    lam=10.0,               # λ         weight of the gradient penalty
    k=1.0,                  # k         the norm that gradients should have
    c=0.5,                  #           size of the noise, in standard deviations of the batch's pixels
    lr=1e-4,                #           Adam: step size
    beta1=0.5,              # β₁        Adam: decay of the first moment
    beta2=0.9,              # β₂        Adam: decay of the second moment
    batch_size=64,          # m         images per batch
    # The networks
    nz=100,                 # z         dimensions of the latent variable
    width=16,               #           feature maps at size/2 pixels; 16: minutes on a CPU, 64: as in WGAN's code
    # The images
    dataset="mnist",        # P_r       mnist, fashion-mnist, cifar10, or the path of a folder of images
    digit: int = None,      #           only this class, 0 to 9
    root: str = None,       #           where data sets are kept (data/ beside common.py)
    size=32,                #           width and height in pixels: 16, 32, 64, 128 or 256
    channels: int = None,   #           1 grey, 3 RGB (what the data set has; a folder: 3)
    # The run
    steps=6000,             #           updates of D, and of G
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
    G = Generator(nz, channels, size, width).to(device, memory_format=torch.channels_last)
    D = Discriminator(channels, size, width).to(device, memory_format=torch.channels_last)
    theta, w = list(G.parameters()), list(D.parameters())
    opt_G = torch.optim.Adam(theta, lr, (beta1, beta2), fused=True, capturable=not config.eager)
    opt_D = torch.optim.Adam(w, lr, (beta1, beta2), fused=True, capturable=not config.eager)
    P_r = batches(images, batch_size, device)
    run = Run(config, fixed_z, next(P_r)[:64], G=G, D=D, opt_G=opt_G, opt_D=opt_D)

    for step in run:
        x = next(P_r)                                         # x ~ P_real
        z = torch.randn(len(x), nz, device=device)            # z ~ p(z)
        with torch.no_grad():
            x_tilde = G(z)
        norm = grad_norm(D, perturb(x, c))                    # ‖∇_x D(x + δ)‖₂
        penalty = (norm - k) ** 2
        L_D = softplus(-D(x)) + softplus(D(x_tilde))          # −log σ(D(x)) − log(1 − σ(D(G(z))))
        L_D = L_D + lam * penalty                             #   + λ (‖∇_x D(x + δ)‖₂ − k)²      (1)
        opt_D.zero_grad()
        L_D.mean().backward(inputs=w)                         # min_D
        opt_D.step()
        z = torch.randn(batch_size, nz, device=device)        # z ~ p(z), anew
        L_G = softplus(-D(G(z)))                              # −log σ(D(G(z)))
        opt_G.zero_grad()
        L_G.mean().backward(inputs=theta)                     # min_G
        opt_G.step()
        run.log(L_D=L_D.mean(), L_G=L_G.mean(), penalty=penalty.mean(), norm=norm.mean())
    return G.eval(), D


# ---- The run: the same in every script; nothing below is in the paper --------------------------------------------
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
        G = Generator(*(saved["settings"][name] for name in ("nz", "channels", "size", "width")))
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
