"""EBGAN, "Energy-based Generative Adversarial Network", https://arxiv.org/abs/1609.03126 (2017)
Junbo Zhao, Michael Mathieu, Yann LeCun

The discriminator D is an autoencoder; the energy of an image is how badly D reproduces it. D learns to give real
images little energy and generated ones much, up to a margin m; G lowers the energy of its images. So D learns from
every pixel, not from one label. The pulling-away term keeps a batch's codes from all pointing the same way.

    L_D = energy(x) + [m - energy(G(z))]⁺      (1)      L_G = energy(G(z))  (2)  + 0.1 f_PT(Enc(G(z)))      (14)
    energy(x) = ‖Dec(Enc(x)) - x‖ (13) is the paper's D(x); here D(x) is Dec(Enc(x)). `--pt 0`: EBGAN, else EBGAN-PT

Differs from the paper (authors' code: none found; appendix: from others; equation numbers: an earlier version's):
- Networks: DCGAN's G; D, at --width 64, the 64-128-256 of the paper's 64x64 images (for MNIST it searches), with
  DCGAN's batch norm (a trial without it collapsed: f_PT 1, energy_fake 0), LeakyReLU and N(0, 0.02).
- One z for both losses, D's update first. Batch size, β₁, β₂, and --width 16, --steps 6000 for a CPU, are ours.
Measured: `python ebgan.py --dataset mnist --digit 7`, 2 EPYC cores, torch 2.15: 5 min, energies 5.1 and 9.3.
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
        self.apply(init)


class Discriminator(nn.Sequential):
    """D(x) = D.decode(D.encode(x)): images -> images in [-1, 1].  (m, channels, size, size) -> the same shape"""
    def __init__(self, channels=1, size=32, width=16):
        if size not in (16, 32, 64, 128, 256):
            raise ValueError(f"--size must be 16, 32, 64, 128 or 256, not {size}")
        super().__init__()
        n = width
        self.encode = nn.Sequential(
            nn.Conv2d(channels, n, 4, 2, 1, bias=False), nn.LeakyReLU(0.2),             # (m, n, size/2, size/2)
            nn.Conv2d(n, 2 * n, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * n), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * n, 4 * n, 4, 2, 1, bias=False), nn.BatchNorm2d(4 * n), nn.LeakyReLU(0.2))
        self.decode = nn.Sequential(                                                    # (m, 4n, size/8, size/8)
            nn.ConvTranspose2d(4 * n, 2 * n, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * n), nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(2 * n, n, 4, 2, 1, bias=False), nn.BatchNorm2d(n), nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(n, channels, 4, 2, 1, bias=False), nn.Tanh())            # (m, channels, size, size)
        self.apply(init)


def init(layer):
    """DCGAN's initialisation: weights N(0, 0.02), those of batch norm N(1, 0.02)"""
    if hasattr(layer, "weight"):
        nn.init.normal_(layer.weight, 1 if isinstance(layer, nn.BatchNorm2d) else 0, 0.02)


# ---- The energy (13) and the pulling-away term (14) --------------------------------------------------------------

def energy(D, x, S=None):
    """(13): ‖Dec(Enc(x)) − x‖₂ of every image x, not squared.  (m, C, H, W) -> (m,).  S: Enc(x), if it is known"""
    return torch.linalg.vector_norm(D.decode(D.encode(x) if S is None else S) - x, dim=(1, 2, 3))


def pulling_away(S):
    """(14): f_PT, the mean squared cosine of all pairs of codes, one code a row.  (m, s) -> (), from 0 to 1"""
    S = nn.functional.normalize(S, dim=1)
    cos = (S @ S.T).fill_diagonal_(0)                           # (m, m)
    return cos.square().sum() / max(len(S) * (len(S) - 1), 1)   # of a single code: 0


# ---- Equations (1) and (2) ---------------------------------------------------------------------------------------

def train(
    # §4.1: Adam, step size 0.001, margin 10; 0.1 in §2.4 or appendix F. The others are ours
    margin=10.0,            # m         generated images above this energy cost D nothing; larger images need more
    pt=0.1,                 #           weight of the pulling-away term
    lr=1e-3,                #           Adam: step size
    beta1=0.5,              #           Adam: decay of the first moment
    beta2=0.999,            #           Adam: decay of the second moment
    batch_size=64,          #           images per batch
    pretrain=0,             #           ours: steps at the start in which only D learns, on real images alone
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
    steps=6000,             #           updates of D, and, after --pretrain, of G
    seed=0,                 #           of every random number but the pictures' latents
    device="auto",          #           cuda if there is one, else cpu; or any torch device: cuda:1, mps, ...
    out: str = None,        #           run folder (runs/SCRIPT-DATASET-DIGIT)
    save_every=100,         #           steps between rows of the log, pictures and checkpoints
    record=False,           #           CUDA: record one step as a graph and replay it
):
    """(1) and (2).  Returns G, D.  ValueError or OSError, one sentence, for settings or files that do not fit;
    KeyboardInterrupt after Ctrl-C, when everything is saved"""
    config, device, out = start(locals())
    G = Generator(nz, config["channels"], size, width).to(device, memory_format=torch.channels_last)
    D = Discriminator(config["channels"], size, width).to(device, memory_format=torch.channels_last)
    theta, w = list(G.parameters()), list(D.parameters())
    opt_G = torch.optim.Adam(theta, lr, (beta1, beta2), fused=True, capturable=record)
    opt_D = torch.optim.Adam(w, lr, (beta1, beta2), fused=True, capturable=record)
    images = load_images(dataset, digit, size, root, config["channels"])
    P_r = batches(images, batch_size, device, resident=record)
    save_images(next(P_r)[:64], out / "real.png")
    log = {}

    for step in run(config, out, log, G=G, D=D, opt_G=opt_G, opt_D=opt_D):
        x = next(P_r)                                         # x ~ p_data
        z = torch.randn(len(x), nz, device=device)            # z ~ p_z, one for (1) and (2): G runs once
        x_tilde = G(z)
        # Two passes: G's step shows D a batch of generated images, and batch norm must see the same here.
        D_x, D_x_tilde = energy(D, x), energy(D, x_tilde.detach())
        L_D = D_x if step < pretrain else D_x + (margin - D_x_tilde).relu()
        opt_D.zero_grad()
        L_D.mean().backward(inputs=w)                         # (1) L_D = D(x) + [m − D(G(z))]⁺
        opt_D.step()
        S = D.encode(x_tilde)
        f_PT = pulling_away(S.flatten(1))                     # (14) f_PT(S) = 1/(N(N−1)) Σ_i Σ_{j≠i} cos²(S_i, S_j)
        L_G = energy(D, x_tilde, S) + pt * f_PT               # (2) L_G = D(G(z)); EBGAN-PT: + 0.1 f_PT (§2.4)
        opt_G.zero_grad()
        L_G.mean().backward(inputs=theta)
        if step >= pretrain:
            opt_G.step()
        log.update(L_D=L_D.mean(), L_G=L_G.mean(), energy_real=D_x.mean(), energy_fake=D_x_tilde.mean(), f_PT=f_PT)
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
