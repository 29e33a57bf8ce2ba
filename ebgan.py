"""EBGAN, "Energy-based Generative Adversarial Network", Zhao, Mathieu, LeCun 2017, https://arxiv.org/abs/1609.03126

The discriminator D is an autoencoder; the energy of an image is how badly D reproduces it. D learns to give real
images little energy and generated ones much, up to a margin m; G lowers the energy of its images. So D learns from
every pixel, not from one label. The pulling-away term keeps a batch's codes from all pointing the same way.

    L_D = energy(x) + [m - energy(G(z))]⁺      (1)      L_G = energy(G(z))  (2)  + 0.1 f_PT(Enc(G(z)))      (14)
    energy(x) = ‖Dec(Enc(x)) - x‖ (13) is the paper's D(x); here D(x) is Dec(Enc(x)). `--pt 0`: EBGAN, else EBGAN-PT

Differs from the paper (authors' code: none found; appendix: from others; equation numbers: an earlier version's):
- No experiment of the paper has these together: lr 0.001 and margin 10 are those of its fully connected networks on
  MNIST (§4.1), D's layers at --width 64, 64-128-256, those for 64x64 images; G, N(0, 0.02), LeakyReLU: WGAN's code.
- One z for both losses, D's update first. Batch size, β₁, β₂, and --width 16, --steps 6000 for a CPU, are ours.
Measured: `python ebgan.py --dataset mnist --digit 7`, 2 EPYC cores, torch 2.15: 5 min, energies 5.1 and 9.3."""
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
    """D(x) = D.decode(D.encode(x)): images -> images in [-1, 1].  (m, channels, size, size) -> the same shape"""
    def __init__(self, channels=1, size=32, width=16):
        super().__init__()
        n = width
        self.encode = nn.Sequential(
            nn.Conv2d(channels, n, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True),       # (m, n, size/2, size/2)
            nn.Conv2d(n, 2 * n, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * n), nn.LeakyReLU(0.2, True),
            nn.Conv2d(2 * n, 4 * n, 4, 2, 1, bias=False), nn.BatchNorm2d(4 * n), nn.LeakyReLU(0.2, True))
        self.decode = nn.Sequential(                                                    # (m, 4n, size/8, size/8)
            nn.ConvTranspose2d(4 * n, 2 * n, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * n), nn.LeakyReLU(0.2, True),
            nn.ConvTranspose2d(2 * n, n, 4, 2, 1, bias=False), nn.BatchNorm2d(n), nn.LeakyReLU(0.2, True),
            nn.ConvTranspose2d(n, channels, 4, 2, 1, bias=False), nn.Tanh())            # (m, channels, size, size)
        self.apply(init)


def init(layer):                # as DCGAN does: weights N(0, 0.02), those of batch norm N(1, 0.02)
    if hasattr(layer, "weight"):
        nn.init.normal_(layer.weight, 1 if isinstance(layer, nn.BatchNorm2d) else 0, 0.02)


# ---- The energy (13) and the pulling-away term (14) --------------------------------------------------------------
def energy(D, x, S=None):
    """(13): ‖Dec(Enc(x)) − x‖₂ of every image x, not squared.  (m, ...) -> (m,).  S: Enc(x), if it is known"""
    difference = D.decode(D.encode(x) if S is None else S) - x
    return torch.linalg.vector_norm(difference.reshape(len(x), -1), dim=1)


def pulling_away(S):
    """(14): f_PT, the mean squared cosine of all pairs of codes, one code a row.  (m, s) -> (), from 0 to 1"""
    S = nn.functional.normalize(S, dim=1)
    cos = (S @ S.T).fill_diagonal_(0)                           # (m, m)
    return cos.square().sum() / max(len(S) * (len(S) - 1), 1)   # of a single code: 0


# ---- Equations (1) and (2) ---------------------------------------------------------------------------------------
@checked
def train(
    # §4.1: Adam, step size 0.001, margin 10; 0.1 in §2.4 or appendix F. The others are ours
    margin=10.0,            # m         generated images above this energy cost D nothing; larger images need more
    pt=0.1,                 #           weight of the pulling-away term
    lr=1e-3,                #           Adam: step size
    beta1=0.5,              #           Adam: decay of the first moment
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
    steps=6000,             #           updates of D, and of G
    seed=0,                 #           of every random number but the pictures' latents
    device="auto",          #           cuda if there is one, else cpu; or any torch device: cuda:1, mps, ...
    out: str = None,        #           run folder (runs/SCRIPT-DATASET-DIGIT)
    save_every=100,         #           steps between rows of the log, pictures and checkpoints
    keep=False,             #           keep every checkpoint beside its picture: 000100.pt, 000200.pt, ...
    eager=False,            #           CUDA: run every step, which may then print and branch; else one is replayed
):
    """(1) and (2).  Returns G, D.  ValueError or OSError: one sentence.  KeyboardInterrupt: Ctrl-C, all is saved"""
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
        z = torch.randn(len(x), nz, device=device)            # z ~ p_z, one for (1) and (2): G runs once
        x_tilde = G(z)
        # Two passes: G's step shows D a batch of generated images, and batch norm must see the same here.
        D_x, D_x_tilde = energy(D, x), energy(D, x_tilde.detach())
        L_D = D_x + (margin - D_x_tilde).relu()
        opt_D.zero_grad()
        L_D.mean().backward(inputs=w)                         # (1) L_D = D(x) + [m − D(G(z))]⁺
        opt_D.step()
        S = D.encode(x_tilde)
        f_PT = pulling_away(S.flatten(1))                     # (14) f_PT(S) = 1/(N(N−1)) Σ_i Σ_{j≠i} cos²(S_i, S_j)
        L_G = energy(D, x_tilde, S) + pt * f_PT               # (2) L_G = D(G(z)); EBGAN-PT: + 0.1 f_PT (§2.4)
        opt_G.zero_grad()
        L_G.mean().backward(inputs=theta)
        opt_G.step()
        run.log(L_D=L_D.mean(), L_G=L_G.mean(), energy_real=D_x.mean(), energy_fake=D_x_tilde.mean(), f_PT=f_PT)
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
