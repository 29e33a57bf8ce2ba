"""LSGAN, "Least Squares Generative Adversarial Networks", https://arxiv.org/abs/1611.04076 (2017)
Xudong Mao, Qing Li, Haoran Xie, Raymond Y.K. Lau, Zhen Wang, Stephen Paul Smolley

A classifier's cross entropy is content with generated images on the real side of its boundary, even if real ones
are far away. Here the discriminator D regresses instead: real images to the label b, generated ones to a; and G
wants its own at c. The square pulls on every image, the harder, the farther it is from its label.

    min_D 1/2 E[(D(x) - b)²] + 1/2 E[(D(G(z)) - a)²]        min_G 1/2 E[(D(G(z)) - c)²]      (2)

The default labels 0, 1, 1 are (9). `--a -1 --b 1 --c 0`, (8), have b - c = 1 and b - a = 2, as the theorem asks:
against the best D, G's loss with 1/2 E[(D(x) - c)²] added is half χ²_Pearson(p_data + p_g ‖ 2 p_g).
The Loss-Sensitive GAN (Qi, 1701.06264) is another: its D is a loss, to be lower on x than on G(z) by a margin
Δ(x, G(z)), so it asks less separation of a realistic G(z) and more of a blurred one. Here the labels are fixed.

Differs from the paper, or from its authors' code:
- Networks: those of the first WGAN's code, N(0, 0.02), on 32x32 pixels. The authors' differ from data set to data
  set; for characters of 28x28: 5x5 kernels, a fully connected layer in D, a sigmoid in G, labels in both.
- --width 16, --steps 9000, for two CPU cores and minutes; the authors' characters: up to 1,000,000 steps.
- z: 100 dimensions, N(0, 1), as in WGAN's code; in the authors' code 1,024, uniform on [-1, 1].
- Batches are drawn with replacement, not by epochs.
- The mean over the batch, as in (2); the authors' code has the sum, which Adam hides but for its ε.
- lr and β₁ are the paper's, lr for 28x28 characters (112x112 scenes: 1e-3); β₂ = 0.999 is Adam's default.
Measured: `python lsgan.py --dataset mnist --digit 7`, 2 EPYC cores, torch 2.15: 4.5 min, L_D 0.13, L_G 0.32."""
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
        self.apply(init)


class Discriminator(nn.Sequential):
    """D(x): images -> labels.  (m, channels, size, size) -> (m,).  No sigmoid: any number can be a label"""
    def __init__(self, channels=1, size=32, width=16):
        n = width
        layers = [nn.Conv2d(channels, n, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]     # (m, n, size/2, size/2)
        while n < width * size // 8:
            layers += [nn.Conv2d(n, 2 * n, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * n), nn.LeakyReLU(0.2, True)]
            n *= 2                                              # (m, n, size/4, size/4), ..., (m, n, 4, 4)
        super().__init__(*layers, nn.Flatten(), nn.Linear(16 * n, 1, bias=False), nn.Flatten(0))    # (m, 1), (m,)
        self.apply(init)


def init(layer):                # as DCGAN does: weights N(0, 0.02), those of batch norm N(1, 0.02)
    if hasattr(layer, "weight"):
        nn.init.normal_(layer.weight, 1 if isinstance(layer, nn.BatchNorm2d) else 0, 0.02)


# ---- Equation (2) ------------------------------------------------------------------------------------------------
@checked
def train(
    # (9): a = 0, b = 1, c = 1;  (8), for the Pearson χ² divergence: a = -1, b = 1, c = 0
    a=0.0,                  # a         label of generated images for D
    b=1.0,                  # b         label of real images for D
    c=1.0,                  # c         label of generated images for G
    lr=2e-4,                #           Adam: step size (§4; for scenes of 112x112 pixels 1e-3)
    beta1=0.5,              # β₁        Adam: decay of the first moment (§4)
    beta2=0.999,            #           Adam: decay of the second moment
    batch_size=64,          #           images per batch
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
    steps=9000,             #           updates of D, and of G
    seed=0,                 #           of every random number but the pictures' latents
    device="auto",          #           cuda if there is one, else cpu; or any torch device: cuda:1, mps, ...
    out: str = None,        #           run folder (runs/SCRIPT-DATASET-DIGIT)
    save_every=100,         #           steps between rows of the log, pictures and checkpoints
    keep=False,             #           keep every checkpoint beside its picture: 000100.pt, 000200.pt, ...
    eager=False,            #           CUDA: run every step, which may then print and branch; else one is replayed
):
    """(2).  Returns G, D.  ValueError or OSError: one sentence.  KeyboardInterrupt: Ctrl-C, all is saved"""
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
        x = next(P_r)                                         # x ~ p_data
        z = torch.randn(len(x), nz, device=device)            # z ~ p_z
        # One z for both losses, as in the authors' code. D's update does not change G: G runs once.
        x_tilde = G(z)
        # Two passes: G's step shows D a batch of generated images, and batch norm must see the same here.
        L_D = (D(x) - b) ** 2 / 2 + (D(x_tilde.detach()) - a) ** 2 / 2
        opt_D.zero_grad()
        L_D.mean().backward(inputs=w)                         # (2) min_D 1/2 E[(D(x) − b)²] + 1/2 E[(D(G(z)) − a)²]
        opt_D.step()
        L_G = (D(x_tilde) - c) ** 2 / 2
        opt_G.zero_grad()
        L_G.mean().backward(inputs=theta)                     # (2) min_G 1/2 E[(D(G(z)) − c)²]
        opt_G.step()
        run.log(L_D=L_D.mean(), L_G=L_G.mean())
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
