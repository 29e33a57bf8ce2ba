"""CT-GAN, "Improving the Improved Training of Wasserstein GANs: A Consistency Term and Its Dual Effect" (2018)
Xiang Wei, Boqing Gong, Zixia Liu, Wei Lu, Liqiang Wang, https://arxiv.org/abs/1803.01541

WGAN-GP's penalty hardly looks at D near real images. Dropout makes D random: two passes of one real image stand for
two points near it, and D pays where it scores them differently. Made for few images: try --examples 1000.

    L = E[D(x_tilde)] - E[D(x)] + λ₁ E[(‖∇_x_hat D(x_hat)‖₂ - 1)²] + λ₂ E[CT]
    CT = max(0, (D(x) - D(x)′)² + 0.1 mean (D₋(x) - D₋(x)′)² - M′)      (D₋: all but the last layer; D(x)′: again)

Differs from the paper, or from its authors' code (the right-hand column has the code's steps, not Algorithm 1's):
- Networks, initialisation, z: wgan_gp.py's; lr, β₁ and the first dropout: those of the authors' ResNet.
- --width 16, --steps 1400, for two CPU cores and minutes; the authors took 50,000 steps.
Measured: `python -m related.ctgan --digit 7`, 2 EPYC cores, torch 2.14: 9 min, Fréchet distance 30.5."""
import re
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from inspect import getsource, signature
from pathlib import Path
from time import perf_counter

import torch
from torch import cuda, nn
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


class Critic(nn.Sequential):
    """D(x) = D[1](D[0](x)): images -> features D₋ -> scores.  (m, channels, size, size) -> (m, n, 4, 4) -> (m,)"""
    def __init__(self, channels=1, size=32, width=16):
        n = width
        layers = [nn.Conv2d(channels, n, 4, 2, 1), LeakyReLU(), nn.Dropout(0.2)]       # (m, n, size/2, size/2)
        while n < width * size // 8:
            layers += [nn.Conv2d(n, 2 * n, 4, 2, 1), LeakyReLU(), nn.Dropout(0.5)]
            n *= 2                                              # (m, n, size/4, size/4), ..., (m, n, 4, 4)
        super().__init__(nn.Sequential(*layers), nn.Sequential(nn.Flatten(), nn.Linear(16 * n, 1), nn.Flatten(0)))


class LeakyReLU(nn.Module):     # nn.LeakyReLU, but for f″ = 0, which backward() would send through all of D
    def forward(self, x):
        return x * x.detach().sign().clamp(min=0.2)


# ---- The two terms -----------------------------------------------------------------------------------------------
def grad_norm(D, x):
    """‖∇_x D(x)‖₂ of every image x, itself differentiable.  (m, ...) -> (m,)"""
    x = x.detach().requires_grad_()
    # No score depends on another image (so: no batch norm in D): the gradient of the sum has each image's own.
    (grad,) = torch.autograd.grad(D(x).sum(), x, create_graph=True)
    return torch.linalg.vector_norm(grad.reshape(len(x), -1), dim=1)    # unlike sqrt(sum of squares), not nan at 0


def consistency(D_x, D_x2, f_x, f_x2, m_prime=0.0):
    """CT of every image, from the scores and features D₋ of two passes.  (m,), (m,), (m, ...), (m, ...) -> (m,)"""
    return ((D_x - D_x2) ** 2 + 0.1 * (f_x - f_x2).square().flatten(1).mean(1) - m_prime).relu()


# ---- WGAN-GP's Algorithm 1 with the consistency term -------------------------------------------------------------
@checked
def train(                      # the numbers of the authors' code for MNIST, but lr and beta1 of their ResNet
    lam1=10.0,              # λ₁        weight of the gradient penalty
    lam2=2.0,               # λ₂        weight of the consistency term
    m_prime=0.0,            # M′        differences up to it are free; taken off before λ₂, in the code after
    n_critic=5,             # n_critic  critic updates per generator update
    lr=2e-4,                # α         Adam: step size (1e-4 for MNIST)
    beta1=0.0,              # β₁        Adam: decay of the first moment (0.5 for MNIST)
    beta2=0.9,              # β₂        Adam: decay of the second moment
    batch_size=50,          # m         images per batch
    # The networks
    nz=100,                 # z         dimensions of the latent variable
    width=16,               #           feature maps at size/2 pixels; 16: minutes on a CPU, 64: as in WGAN's code
    # The images
    dataset="mnist",        # P_r       mnist, fashion-mnist, cifar10, or the path of a folder of images
    digit: int = None,      #           only this class, 0 to 9
    root: str = None,       #           where data sets are kept (data/ beside common.py)
    size=32,                #           width and height in pixels: 16, 32, 64, 128 or 256
    channels: int = None,   #           1 grey, 3 RGB (what the data set has; a folder: 3)
    examples: int = None,   #           only the first so many images
    # The run
    steps=1400,             #           generator updates
    seed=0,                 #           of every random number but the pictures' latents
    device="auto",          #           cuda if there is one, else cpu; or any torch device: cuda:1, mps, ...
    out: str = None,        #           run folder (runs/SCRIPT-DATASET-DIGIT)
    save_every=100,         #           steps between rows of the log, pictures and checkpoints
    keep=False,             #           keep every checkpoint beside its picture: 000100.pt, 000200.pt, ...
    eager=False,            #           CUDA: run every step, which may then print and branch; else one is replayed
):
    """With CT.  Returns G, D.  ValueError or OSError: one sentence.  KeyboardInterrupt: Ctrl-C, all is saved"""
    device, channels, dataset = find_device(device), channels_of(dataset, channels), str(dataset)
    config = Namespace(**locals())
    torch.manual_seed(seed)
    fixed_z = torch.randn(64, nz, generator=torch.Generator().manual_seed(0)).to(device)     # of the pictures
    images = resident(load_images(dataset, digit, size, root, channels)[:examples], device)
    config.images, config.eager = len(images), eager or not images.is_cuda
    G = Generator(nz, channels, size, width).to(device, memory_format=torch.channels_last)
    D = Critic(channels, size, width).to(device, memory_format=torch.channels_last)
    theta, w = list(G.parameters()), list(D.parameters())
    opt_G = torch.optim.Adam(theta, lr, (beta1, beta2), fused=True, capturable=not config.eager)
    opt_D = torch.optim.Adam(w, lr, (beta1, beta2), fused=True, capturable=not config.eager)
    P_r = batches(images, batch_size, device)
    run = Run(config, fixed_z, next(P_r)[:64], G=G, D=D, opt_G=opt_G, opt_D=opt_D)

    for step in run:
        for _ in range(n_critic):
            x = next(P_r)                                     # x ~ P_r
            z = torch.randn(len(x), nz, device=device)        # z ~ N(0, I)
            eps = torch.rand(len(x), 1, 1, 1, device=device)  # ε ~ U[0, 1]
            with torch.no_grad():
                x_tilde = G(z)
            x_hat = eps * x + (1 - eps) * x_tilde             # x_hat ← ε x + (1 − ε) x_tilde
            penalty = (grad_norm(D, x_hat) - 1) ** 2
            f_x, f_x2 = D[0](x), D[0](x)                      # D₋(x) and D₋(x)′, each with a dropout of its own
            D_x, D_x2, D_x_tilde = D[1](f_x), D[1](f_x2), D(x_tilde)
            CT = consistency(D_x, D_x2, f_x, f_x2, m_prime)
            L = D_x_tilde - D_x + lam1 * penalty + lam2 * CT  # L ← D(x_tilde) − D(x) + λ₁ (‖...‖₂ − 1)² + λ₂ CT
            opt_D.zero_grad()
            L.mean().backward(inputs=w)                       # w ← Adam(∇_w 1/m Σ L, w, α, β₁, β₂)
            opt_D.step()
        z = torch.randn(batch_size, nz, device=device)        # z ~ N(0, I)
        L_G = -D(G(z))
        opt_G.zero_grad()
        L_G.mean().backward(inputs=theta)                     # θ ← Adam(∇_θ 1/m Σ −D(G(z)), θ, α, β₁, β₂)
        opt_G.step()
        run.log(wasserstein=(D_x - D_x_tilde).mean(), L_D=L.mean(), L_G=L_G.mean(), GP=penalty.mean(), CT=CT.mean())
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
