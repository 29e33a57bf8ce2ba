"""Improved Techniques for Training GANs, §5, §3.1: semi-supervised learning by feature matching (NIPS 2016)
T. Salimans, I. Goodfellow, W. Zaremba, V. Cheung, A. Radford, X. Chen, https://arxiv.org/abs/1606.03498

D is a classifier whose K logits l_k say as well whether an image is real. A few labelled images teach it the
classes; images without labels, and generated ones, where a class ends. G only matches the mean of D's features f.

    D(x) = Z / (Z + 1), Z = Σ_k exp l_k(x)      L_sup = -E log p(y | x, y < K + 1)
    L_unsup = -½ E log D(x) - ½ E log(1 - D(G(z)))      L_G = ‖E f(x) - E f(G(z))‖², a mean over f's components

Differs from the authors' code for MNIST, whose networks and halves these are:
- Pixels in [-1, 1]: tanh, not sigmoid, and twice the noise; G's last layer begins with larger v. lr 1e-3, as with
  their 3e-3 L_G grew beyond bounds. --steps 12000, 20 epochs, for minutes; theirs: 300.
- z is normal. Labelled images repeat in a batch. ε is added to Adam's root. D_ema, from 0, is divided by 1 - emaᵗ.
Measured: --steps 180000, H200, torch 2.11: 6 min, 104 errors in 10,000; the paper: 93 ± 6.5."""
import re
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from copy import deepcopy
from inspect import getsource, signature
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import cuda, nn
from common import (batches, channels_of, checked, claim, compare, find_device, fitting, in_one_sentence,
                    load_images, load_labels, name_of, next_image, replacing, run_folder, same_shapes,
                    save_animation, save_curve, save_each, save_images, stop_signals)

# ---- Networks: fully connected -----------------------------------------------------------------------------------
class Generator(nn.Sequential):
    """G(z): latents -> images in [-1, 1].  (m, nz) -> (m, channels, size, size)"""
    def __init__(self, nz=100, channels=1, size=28, width=500):
        layers = []
        for n in (nz, width):
            layers += [nn.Linear(n, width, bias=False), nn.BatchNorm1d(width, eps=1e-6), nn.Softplus()]
            layers[-2].weight.requires_grad_(False)             # γ stays 1
        layers += [Dense(width, channels * size ** 2, trained=True), nn.Tanh()]
        super().__init__(*layers, nn.Unflatten(1, (channels, size, size)))


class Classifier(nn.Sequential):
    """D[0](x): features f;  D(x): logits l.  (m, channels, size, size) -> (m, 250) -> (m, 10)"""
    def __init__(self, channels=1, size=28):
        f, n, noise = [nn.Flatten()], channels * size ** 2, 0.6
        for width in (1000, 500, 250, 250, 250):
            f += [Dense(n, width, noise), nn.ReLU()]
            n, noise = width, 0.5
        super().__init__(nn.Sequential(*f), Dense(n, 10, noise, trained=True))


class Dense(nn.Module):
    """Weight normalisation: g v / ‖v‖ · (x + noise) + b, noise only in training.  (m, n_in) -> (m, n_out)"""
    def __init__(self, n_in, n_out, noise=0.0, trained=False):
        super().__init__()
        self.v, self.b = nn.Parameter(0.1 * torch.randn(n_out, n_in)), nn.Parameter(torch.zeros(n_out))
        self.g, self.noise = nn.Parameter(torch.ones(n_out), trained), noise

    def forward(self, x):
        if self.training and self.noise:
            x = x + self.noise * torch.randn_like(x)
        return F.linear(x, self.g[:, None] * F.normalize(self.v), self.b)


@torch.no_grad()
def start(D, x):
    """Data-dependent start: on these images all that goes into D's ReLUs, and its logits, has mean 0, variance 1"""
    x = x.flatten(1)
    for layer in (it for it in D.modules() if isinstance(it, Dense)):
        h = layer(x)
        std, mean = torch.std_mean(h, 0, correction=0)
        layer.g /= std
        layer.b -= mean / std
        x = ((h - mean) / std).relu()


# ---- The losses --------------------------------------------------------------------------------------------------
def losses(logits_labelled, y, logits_unlabelled, logits_fake):
    """L_sup, L_unsup, means over images, of K logits and classes y.  (m, K), (m,), (m, K), (m, K) -> (), ()"""
    log_Z, log_Z_fake = logits_unlabelled.logsumexp(1), logits_fake.logsumexp(1)
    L_unsup = (F.softplus(log_Z) - log_Z).mean() / 2 + F.softplus(log_Z_fake).mean() / 2
    return F.cross_entropy(logits_labelled, y), L_unsup


def feature_matching(f_x, f_x_tilde):
    """Squared difference of the means over images, mean over features.  (m, n), (m, n) -> ()"""
    return (f_x.mean(0) - f_x_tilde.mean(0)).square().mean()


# ---- Training ----------------------------------------------------------------------------------------------------
@checked
def train(
    # As in the authors' code, but for lr
    labels=100,             #           images with labels: a tenth of it, but at least 1, of each class
    lr=1e-3,                #           Adam: step size
    beta1=0.5,              # β₁        Adam: decay of the first moment
    beta2=0.999,            # β₂        Adam: decay of the second moment
    ema=0.9999,             #           decay of the moving average of D, which is tested
    batch_size=100,         # m         images per batch: labelled ones, unlabelled ones, and generated ones
    # The networks
    nz=100,                 # z         dimensions of the latent variable
    width=500,              #           hidden units of G
    # The images
    dataset="mnist",        #           mnist, fashion-mnist or cifar10
    root: str = None,       #           where data sets are kept (data/ beside common.py)
    size=28,                #           width and height in pixels
    # The run
    steps=12000,            #           updates of D, and of G
    seed=0,                 #           of every random number but the pictures' latents
    device="auto",          #           cuda if there is one, else cpu; or any torch device: cuda:1, mps, ...
    out: str = None,        #           run folder (runs/SCRIPT-DATASET)
    save_every=600,         #           steps between rows of the log, tests, pictures and checkpoints
    keep=False,             #           keep every checkpoint beside its picture: 000600.pt, 001200.pt, ...
    eager=False,            #           CUDA: run every step, which may then print and branch; else one is replayed
):
    """Returns G, and D's average.  ValueError or OSError: one sentence.  KeyboardInterrupt: Ctrl-C, all is saved"""
    device, channels, dataset = find_device(device), channels_of(dataset), str(dataset)
    eager = eager or device.type != "cuda"
    config = Namespace(**locals())
    torch.manual_seed(seed)
    fixed_z = torch.randn(64, nz, generator=torch.Generator().manual_seed(0)).to(device)     # of the pictures
    G, D = Generator(nz, channels, size, width).to(device), Classifier(channels, size).to(device)
    y, y_test = load_labels(dataset, root=root), load_labels(dataset, root=root, train=False).to(device)
    images, x_test = (load_images(dataset, None, size, root, channels, train=it).to(device) for it in (1, 0))
    mixed = torch.randperm(len(y))
    few = torch.cat([mixed[y[mixed] == k][:max(1, labels // 10)] for k in range(10)])
    x_few, y_few = images[few] / 127.5 - 1, y[few].to(device)
    start(D, next(batches(images, 500, device)))
    D_ema = deepcopy(D).eval().requires_grad_(False)
    theta, w = ([it for it in each.parameters() if it.requires_grad] for each in (G, D))
    opt_G = torch.optim.Adam(theta, lr, (beta1, beta2), eps=1e-4, fused=True, capturable=not eager)
    opt_D = torch.optim.Adam(w, lr, (beta1, beta2), eps=1e-4, fused=True, capturable=not eager)
    P_r = batches(images, batch_size, device)

    def figures():
        return dict(test_errors=(D_ema(x_test / 127.5 - 1).argmax(1) != y_test).sum().item())
    run = Run(config, fixed_z, next(P_r)[:64], figures, G=G, D=D, D_ema=D_ema, opt_G=opt_G, opt_D=opt_D)

    for step in run:
        i, x = torch.randint(len(few), (batch_size,), device=device), next(P_r)
        with torch.no_grad():
            x_tilde = G(torch.randn(batch_size, nz, device=device))
        l_few, l_x, l_x_tilde = D(torch.cat([x_few[i], x, x_tilde])).split(batch_size)
        L_sup, L_unsup = losses(l_few, y_few[i], l_x, l_x_tilde)        # §5    −log p(y|x); −log D(x), ...
        opt_D.zero_grad()
        (L_sup + L_unsup).backward(inputs=w)                            # §5    L = L_sup + L_unsup
        opt_D.step()
        share = (1 - ema) / (1 - ema ** opt_D.state[w[0]]["step"])     # of a tensor, which a recorded step counts on
        for average, now in zip(D_ema.parameters(), D.parameters()):
            average.lerp_(now.detach(), share)                          # code  D_ema: weights 1, ema, ema², ...
        x, x_tilde = next(P_r), G(torch.randn(batch_size, nz, device=device))
        f_x, f_x_tilde = D[0](torch.cat([x, x_tilde])).split(batch_size)
        L_G = feature_matching(f_x, f_x_tilde)                          # §3.1  ‖E f(x) − E f(G(z))‖²
        opt_G.zero_grad()
        L_G.backward(inputs=theta)
        opt_G.step()
        run.log(L_sup=L_sup, L_unsup=L_unsup, L_G=L_G)
    return G.eval(), D_ema


# ---- The run: as in every script, but for figures; nothing below is in the paper ---------------------------------
SCRIPT = Path(globals().get("__file__", "notebook")).stem
MAY_CHANGE = {"steps", "save_every", "keep", "eager", "device", "root", "out"}     # when a run goes on


class Run:
    """for step in run: the steps still to be made; the very first is 1.  parts: all that has a state_dict"""
    def __init__(self, config, fixed_z, real, figures, **parts):
        self.config, self.fixed_z, self.figures, self.parts = config, fixed_z, figures, parts
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
        means |= self.figures()
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
