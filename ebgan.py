"""EBGAN, "Energy-based Generative Adversarial Network", Zhao, Mathieu, LeCun 2017, https://arxiv.org/abs/1609.03126

The discriminator D is an autoencoder; the energy E of an image is how badly D reproduces it. D lowers it for real
images and raises it for generated ones, up to a margin m; G lowers it. The pulling-away term spreads the codes.

    L_D = E(x) + [m - E(G(z))]⁺      (1)            L_G = E(G(z))      (2)  + 0.1 f_PT(Enc(G(z)))      (14)
    E(x) = ‖Dec(Enc(x)) - x‖₂ (13) is the paper's D(x); here D(x) is Dec(Enc(x)). `--pt 0`: EBGAN, else EBGAN-PT

Differs from the paper (authors' code: none found; of the appendix only quotations):
- No experiment of the paper has all this: lr 0.001, margin 10 are of fully connected networks on MNIST (§4.1); D's
  layers at --width 64 (appendix C) and pt 0.1 (F) of 64x64 images, margins 80, 20. C, as quoted: ReLU, N(0, 0.002)
  in D. WGAN's: G, N(0, 0.02), the encoder's LeakyReLU. Ours: the decoder's, Adam's β, batch size, --width, --steps.
- The paper prints ‖·‖ without 2. Enc(x) is the whole last map. z ~ N(0, 1): §2's example; (1), (2) share one z."""
import json
import os
import re
import sys
from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from collections import defaultdict
from inspect import getfile, getmodule, getsource, signature
from pathlib import Path
from time import perf_counter

import torch
from torch import cuda, nn
from common import batches, load_images, save_animation, save_curves, save_images

# ---- Networks: 4x4 kernels, as in WGAN's code; from 4x4 pixels on every layer doubles or halves the image --------
class Generator(nn.Sequential):
    """G(z): latents -> images in [-1, 1].  (m, nz) -> (m, channels, size, size).  ValueError: wrong size"""
    def __init__(self, nz=100, channels=1, size=32, width=16):
        if size not in (16, 32, 64, 128, 256):
            raise ValueError(f"--size must be 16, 32, 64, 128 or 256, not {size}")
        n = width * size // 8                                   # feature maps at 4x4; half as many at 8x8, ...
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
def energy(D, x):
    """(13): ‖Dec(Enc(x)) − x‖₂ of every image x, not squared, and its code Enc(x).  (m, ...) -> (m,), (m, ...)"""
    S = D.encode(x)
    return torch.linalg.vector_norm((D.decode(S) - x).reshape(len(x), -1), dim=1), S


def pulling_away(S):
    """(14): f_PT, the mean squared cosine of all pairs of codes, one code a row.  (m, s) -> (), from 0 to 1"""
    S = nn.functional.normalize(S, dim=1)
    cos = (S @ S.T).fill_diagonal_(0)                           # (m, m)
    return cos.square().sum() / max(len(S) * (len(S) - 1), 1)   # of a single code: 0


# ---- Equations (1) and (2) ---------------------------------------------------------------------------------------
def train(
    margin=10.0,            # m         generated images above this energy cost D nothing; larger images need more
    pt=0.1,                 #           weight of the pulling-away term
    lr=1e-3,                #           Adam: step size
    beta1=0.5,              #           Adam: decay of the first moment
    beta2=0.999,            #           Adam: decay of the second moment
    batch_size=64,          #           images per batch
    nz=100,                 # z         dimensions of the latent variable
    width=16,               #           feature maps at size/2 pixels; 16: minutes on a CPU, 64: as in WGAN's code
    # The images
    dataset="mnist",        # P_r       mnist, fashion-mnist, cifar10, or the path of a folder of images
    digit: int = None,      #           only this class, 0 to 9
    size=32,                #           width and height in pixels: 16, 32, 64, 128 or 256
    channels: int = None,   #           1 grey, 3 RGB (what the data set has; a folder: 3)
    root: str = None,       #           where data sets are kept (data/ beside common.py)
    # The run
    steps=6000,             #           updates of D, and of G
    seed=0,                 #           of every random number but the pictures' latents
    device="cuda" if cuda.is_available() else "cpu",    #       any torch device: cpu, cuda, cuda:1, mps, ...
    graph=False,            #           CUDA: record an iteration and replay it: faster, but its Python runs no more
    out: str = None,        #           run folder (runs/SCRIPT-DATASET-DIGIT)
    save_every=100,         #           steps between rows of the log, pictures and checkpoints
    keep=False,             #           keep every checkpoint beside its picture: 000100.pt, 000200.pt, ...
):
    """(1) and (2).  Returns G, D.  ValueError, OSError: one sentence says what is wrong"""
    config = dict(locals())
    Generator(size=size)                                      # ValueError for a wrong size, before images are read
    torch.manual_seed(seed)
    images = load_images(dataset, digit, size, channels, root)
    config["images"], config["channels"] = images.shape[:2]
    P_r = batches(images, batch_size, device)
    G = Generator(nz, images.shape[1], size, width).to(device, memory_format=torch.channels_last)
    D = Discriminator(images.shape[1], size, width).to(device, memory_format=torch.channels_last)  # is faster
    theta, w = ([p for p in net.parameters() if p.requires_grad] for net in (G, D))     # inputs=w: ∇_w, no more
    opt_G = torch.optim.Adam(theta, lr, (beta1, beta2), fused=True, capturable=graph)
    opt_D = torch.optim.Adam(w, lr, (beta1, beta2), fused=True, capturable=graph)
    fixed_z = torch.randn(64, nz, generator=torch.Generator().manual_seed(0)).to(device)     # of the pictures

    def iteration():
        x = next(P_r)                                         # x ~ P_r, the paper's p_data
        z = torch.randn(len(x), nz, device=device)            # z ~ p_z, one for (1) and (2): G runs once
        x_tilde = G(z)
        E_x, E_x_tilde = energy(D, x)[0], energy(D, x_tilde.detach())[0]     # apart, for batch norm, as in G's step
        L_D = E_x + (margin - E_x_tilde).relu()
        opt_D.zero_grad()
        L_D.mean().backward(inputs=w)                         # (1) L_D = E(x) + [m − E(G(z))]⁺
        opt_D.step()
        E_G, S = energy(D, x_tilde)                           # by the new D
        f_PT = pulling_away(S.flatten(1))                     # (14) f_PT(S) = 1/(N(N−1)) Σ_i Σ_{j≠i} cos²(S_i, S_j)
        L_G = E_G + pt * f_PT                                 # (2) L_G = E(G(z)); EBGAN-PT (§2.4): + pt f_PT
        opt_G.zero_grad()
        L_G.mean().backward(inputs=theta)
        opt_G.step()
        return dict(L_D=L_D.mean(), L_G=L_G.mean(), energy_real=E_x.mean(), energy_fake=E_x_tilde.mean(), f_PT=f_PT)

    states = dict(G=G, D=D, opt_G=opt_G, opt_D=opt_D)         # all that a checkpoint keeps
    real, out = next(P_r)[:64], folder(__file__, config)
    rows = resume(out, config, states)
    save_images(real, out / "real.png")                       # as D sees them
    for row in rounds(iteration, config, rows):               # every save_every iterations
        G.eval()                                              # by running statistics: each depends on its z alone
        save_images(G(fixed_z).detach(), out / f"{row['step']:06d}.png")
        G.train()
        save(out, config, states, rows)
    save_animation(out)
    return G.eval(), D


# ---- The run: the same in every script; nothing below is in the paper --------------------------------------------
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
    iteration = recorded(iteration, config["device"]).__next__ if config["graph"] else iteration
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


def recorded(iteration, device):
    """On CUDA: three iterations run to warm up, the fourth is recorded, and then that record is replayed"""
    cuda.set_device(torch.empty(0, device=device).device)   # "cuda" is cuda:0.  ValueError: not a GPU
    graph, stream = cuda.CUDAGraph(), cuda.Stream()
    for _ in range(3):
        cuda.synchronize()
        with cuda.stream(stream):
            losses = iteration()
        cuda.synchronize()
        yield losses
    print("recorded: a print, an if or a count in iteration has no effect from now on")
    with cuda.graph(graph, stream=stream):
        losses = iteration()
    while True:
        graph.replay()
        yield losses


def load(checkpoint, network=Generator):
    """The generator of a checkpoint.pt, on the CPU: z ~ N(0, 1), (n, nz) -> images in [-1, 1], (n, C, H, W)"""
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    G = network(**{name: saved["config"][name] for name in signature(network).parameters})
    G.load_state_dict(saved["G"])
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
