"""GAN-INT-CLS, "Generative Adversarial Text to Image Synthesis", https://arxiv.org/abs/1605.05396 (ICML 2016)
Scott Reed, Zeynep Akata, Xinchen Yan, Lajanugen Logeswaran, Bernt Schiele, Honglak Lee

First φ learns to make of a text, letter by letter, a vector that fits the images it describes, and no others; then
it stays as it is. G draws from noise and a text's vector. D sees an image and a text, and says no to a generated
image, and to a real one with the text of another class (CLS). G also gets vectors between two texts (INT).

    L_φ = mean max(0, 1 + <v_i, t_j> - <v_i, t_i>) + max(0, 1 + <v_j, t_i> - <v_i, t_i>), j of other classes (2)-(4)
    L_D = log D(x, h) + (log(1 - D(x, ĥ)) + log(1 - D(G(z, h), h))) / 2                          Algorithm 1
    L_G = log D(G(z, h), h), and half as much with h = β h₁ + (1 - β) h₂, β = 0.5                (5)

Differs from the paper:
- Texts are caption()'s: digits, and how thick and slanted they are. It shows how this works, not how far it goes.
- φ is smaller, and v, there GoogLeNet's features, learns with it; Adam. G and D are DCGAN's, on 32x32 pixels.
Measured: `python -m related.text2image`, 2 EPYC cores, torch 2.14: 13 min; 96 % are the named digit."""
import re
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from inspect import getsource, signature
from pathlib import Path
from time import perf_counter

import torch
from torch import cuda, nn
from torch.nn.functional import softplus
from common import (checked, claim, compare, find_device, fitting, in_one_sentence, load_images, load_labels,
                    name_of, next_image, replacing, run_folder, same_shapes, save_animation, save_curve,
                    save_each, save_images, stop_signals)

# ---- Texts -------------------------------------------------------------------------------------------------------
NAMES = "zero one two three four five six seven eight nine".split()
STROKES, SLANTS = ["thin ", "", "thick "], [" leaning left", "", " leaning right"]
PHRASES = ["{}", "a {}", "the digit {}", "the number {}", "a handwritten {}", "a picture of a {}", "this is a {}",
           "someone wrote a {}", "an image that shows a {}", "a white {} on black"]
SHOWN = ["a three", "a thin seven", "a thick seven", "a seven leaning left", "a seven leaning right", "an eight"]


def looks(x):
    """How thick and how slanted white strokes are: 0, 1, 2, each a third of MNIST.  uint8 (m, 1, H, W) -> (m, 2)"""
    p = x[:, 0].float()
    thickness = p.sum((1, 2)) / (p.diff(dim=1).abs().sum((1, 2)) + p.diff(dim=2).abs().sum((1, 2)))
    p = p / p.sum((1, 2), keepdim=True)
    row, column = (torch.arange(float(n)) for n in p.shape[1:])
    up = (p.sum(2) * row).sum(1)[:, None, None] - row[:, None]
    right = column - (p.sum(1) * column).sum(1)[:, None, None]
    slant = (p * right * up).sum((1, 2)) / (p * up ** 2).sum((1, 2))
    return torch.stack([(thickness > 0.9).long() + (thickness > 1.1), (slant > 0).long() + (slant > 0.25)], dim=1)


def caption(label, image, rng=None):
    """Texts like "a picture of a thin seven leaning left"; rng: torch.Generator.  (m,), uint8 (m, 1, H, W) -> m"""
    phrases = torch.randint(len(PHRASES), (len(label),), generator=rng)
    return [PHRASES[phrase].format(STROKES[stroke] + NAMES[digit] + SLANTS[slant])
            for phrase, digit, (stroke, slant) in zip(phrases, label, looks(image))]


def encode(texts, length=64):
    """ASCII codes of a text's letters, then of spaces.  n texts -> int64 (n, length)"""
    return torch.tensor([list(text.lower().encode("ascii", "replace")[:length].ljust(length)) for text in texts])


# ---- Networks ----------------------------------------------------------------------------------------------------
class TextEncoder(nn.Module):
    """φ(t): encode()'s int64 (m, length) -> (m, nh)"""
    def __init__(self, nh=64):
        super().__init__()
        self.letters, self.conv, self.pool = nn.Embedding(128, 32), nn.Conv1d(32, 64, 4), nn.MaxPool1d(3)
        self.rnn, self.last = nn.GRU(64, 64, batch_first=True), nn.Linear(64, nh)

    def forward(self, t):
        h = self.pool(self.conv(self.letters(t).transpose(1, 2)).relu())            # (m, 64, (length - 3) / 3)
        return self.last(self.rnn(h.transpose(1, 2))[0].mean(1))


class Generator(nn.Sequential):
    """G(z, h): latents and texts -> images in [-1, 1].  (m, nz), (m, nh) -> (m, 1, 32, 32)"""
    def __init__(self, nz=100, nh=64, width=16):
        super().__init__(
            nn.Unflatten(1, (nz + nh, 1, 1)),                   # then 4x4, 8x8, 16x16, 32x32 pixels
            nn.ConvTranspose2d(nz + nh, 4 * width, 4, bias=False), nn.BatchNorm2d(4 * width), nn.ReLU(True),
            nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU(True),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True),
            nn.ConvTranspose2d(width, 1, 4, 2, 1, bias=False), nn.Tanh())

    def forward(self, z, h):
        return super().forward(torch.cat([z, h], 1))


class Discriminator(nn.Module):
    """D(x, h): images and texts -> logits of x being real, and what h says.  (m, 1, 32, 32), (m, nh) -> (m,)"""
    def __init__(self, nh=64, width=16):
        super().__init__()
        n, self.text = width, nn.Sequential(nn.Linear(nh, nh), nn.BatchNorm1d(nh), nn.LeakyReLU(0.2))
        self.image = nn.Sequential(
            nn.Conv2d(1, n, 4, 2, 1, bias=False), nn.LeakyReLU(0.2),
            nn.Conv2d(n, 2 * n, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * n), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * n, 4 * n, 4, 2, 1, bias=False), nn.BatchNorm2d(4 * n), nn.LeakyReLU(0.2))     # 4x4 pixels
        self.both = nn.Sequential(
            nn.Conv2d(4 * n + nh, 4 * n, 1, bias=False), nn.BatchNorm2d(4 * n), nn.LeakyReLU(0.2),
            nn.Conv2d(4 * n, 1, 4, bias=False), nn.Flatten(0))

    def forward(self, x, h):
        h = self.text(h)[:, :, None, None].expand(-1, -1, 4, 4)
        return self.both(torch.cat([self.image(x), h], 1))


def joint_embedding(v, t, y):
    """(2)-(4)  The hinge loss of images v and texts t of classes y.  (m, nh), (m, nh), (m,) -> ()"""
    score = v @ t.T
    wrong = (1 + score - score.diagonal()[:, None]).relu() + (1 + score - score.diagonal()).relu()
    return (wrong * (y[:, None] != y)).sum() / len(y) ** 2


# ---- Training ----------------------------------------------------------------------------------------------------
@checked
def train(
    lr=2e-4,                # α         Adam: step size of G and D
    batch_size=64,          #           images per batch
    pretrain=1000,          #           steps of φ, before those of G and D
    width=16,               #           feature maps at 16x16 pixels
    dataset="mnist",        #           mnist alone: texts speak of digits
    steps=6000,             # S         of φ, and then of D and G
    seed=0,                 #           of every random number but the pictures' latents
    device="auto",          #           cuda if there is one, else cpu; or any torch device: cuda:1, mps, ...
    out: str = None,        #           run folder (runs/SCRIPT-DATASET)
    save_every=200,         #           steps between rows of the log, pictures and checkpoints
):
    """As above.  Returns G, φ.  ValueError or OSError: one sentence.  KeyboardInterrupt: Ctrl-C, all is saved"""
    if dataset != "mnist":
        raise ValueError(f"--dataset must be mnist, of whose digits the texts speak, not {dataset}")
    device = find_device(device)
    config = Namespace(**locals())
    torch.manual_seed(seed)
    G, D, phi = (it.to(device) for it in (Generator(width=width), Discriminator(width=width), TextEncoder()))
    for layer in [*G.modules(), *D.modules()]:                  # as DCGAN: N(0, 0.02), batch norm N(1, 0.02)
        if hasattr(layer, "weight"):
            nn.init.normal_(layer.weight, 1 if "BatchNorm" in type(layer).__name__ else 0, 0.02)
    v = nn.Sequential(Discriminator().image, nn.Flatten(), nn.Linear(1024, 64)).to(device)
    theta, w, omega = list(G.parameters()), list(D.parameters()), [*phi.parameters(), *v.parameters()]
    opt_G, opt_D = (torch.optim.Adam(each, lr, (0.5, 0.999), fused=True) for each in (theta, w))
    opt_phi = torch.optim.Adam(omega, 1e-3, fused=True)
    x_all, y_all = load_images(), load_labels()
    unseen = 2 * torch.stack([y_all % 2, y_all // 2 % 2], 1)        # one look of each digit is left out
    seen = (looks(x_all) != unseen).any(1).nonzero()[:, 0]
    fixed_z = torch.randn(6, 100, generator=torch.Generator().manual_seed(0)).to(device)     # of the pictures
    run = Run(config, fixed_z, G=G, D=D, phi=phi, v=v, opt_G=opt_G, opt_D=opt_D, opt_phi=opt_phi)

    for step in run:                                                #  2: for n = 1, ..., S do
        i = seen[torch.randint(len(seen), (batch_size,))]
        x, y = x_all[i], y_all[i]                                   #  1: images x, matching text t,
        t, t_hat = (encode(caption(each, x)).to(device)             #     mismatching t̂: of another class
                    for each in (y, (y + torch.randint(1, 10, y.shape)) % 10))
        meaning, x = (looks(x) @ torch.tensor([3, 1]) + 9 * y).to(device), x.to(device) / 127.5 - 1
        L_phi = L_D = L_G = torch.zeros((), device=device)
        if step <= pretrain:
            L_phi = joint_embedding(v(x), phi(t), meaning)
            opt_phi.zero_grad()
            L_phi.backward(inputs=omega)
            opt_phi.step()
        else:
            h, h_hat = phi(t).detach(), phi(t_hat).detach()         #  3: h ← φ(t);  4: ĥ ← φ(t̂)
            h_G = torch.cat([h, (h[::2] + h.roll(1, 0)[::2]) / 2])  # (5)
            z = torch.randn(len(h_G), 100, device=device)           #  5: z ~ N(0, 1)^Z
            x_hat = G(z, h_G)                                       #  6: x̂ ← G(z, h)
            s_r, s_w = D(x, h), D(x, h_hat)                         #  7: s_r ← D(x, h);  8: s_w ← D(x, ĥ)
            s_f = D(x_hat[:len(h)].detach(), h)                     #  9: s_f ← D(x̂, h)
            L_D = -softplus(-s_r) - (softplus(s_w) + softplus(s_f)) / 2     # 10: L_D ← log s_r + (log(1 − s_w) ...
            opt_D.zero_grad()
            (-L_D.mean()).backward(inputs=w)                        # 11: D ← D + α ∂L_D/∂D (printed: −)
            opt_D.step()
            L_G = -softplus(-D(x_hat, h_G))                         # 12: L_G ← log s_f, and (5)
            opt_G.zero_grad()
            (-L_G.mean()).backward(inputs=theta)                    # 13: G ← G + α ∂L_G/∂G (printed: −)
            opt_G.step()
        run.log(L_phi=L_phi, L_D=L_D.mean(), L_G=L_G.mean())        # 14: end
    return G.eval(), phi


# ---- The run: as in every script, but for texts, and never recorded; nothing below is in the paper ---------------
SCRIPT = Path(globals().get("__file__", "notebook")).stem
MAY_CHANGE = {"steps", "save_every", "device", "out"}      # when a run goes on


class Run:
    """for step in run: the steps still to be made; the very first is 1.  parts: all that has a state_dict"""
    def __init__(self, config, fixed_z, **parts):
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
        print(f"device: {fixed_z.device}\nrun folder: {self.out}\n{self.step} of {config.steps} steps are done")

    def __iter__(self):
        config = self.config
        self.since, self.begin = self.step, perf_counter() - self.time
        with stop_signals() as stop:
            for self.step in range(self.step + 1, config.steps + 1):
                yield self.step
                if stop or self.step == config.steps or self.step % config.save_every == 0:
                    self.save()
                    if stop:
                        break
        save_animation(self.out)
        if stop:
            raise KeyboardInterrupt

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
            total.zero_()
        self.time = perf_counter() - self.begin
        self.rows.append(dict(step=self.step, seconds=self.time, **means))
        save_curve(self.rows, self.out)                     # ValueError if a loss is not finite
        G, z = self.parts["G"].eval(), self.fixed_z         # by running statistics an image depends on z, h alone
        h = self.parts["phi"](encode(SHOWN).to(z.device))
        save_images(G(z.repeat(6, 1), h.repeat_interleave(6, 0)), self.out / f"{self.step:06d}.png")
        G.train()
        saved = {name: part.state_dict() for name, part in self.parts.items()}
        states = [each.get_rng_state() for each in self.random]
        saved |= dict(settings=self.settings, run=(self.step, self.time, self.rows, states))
        with replacing(self.out / "checkpoint.pt") as file:
            torch.save({SCRIPT: saved}, file)
        left = self.time * (self.config.steps / self.step - 1) / 60
        losses = "  ".join(f"{name} {mean:.4g}" for name, mean in means.items())
        speed = f"{self.step / self.time:.1f} steps/s  {left:.0f} min left"
        print(f"step {self.step}/{self.config.steps}  {losses}  {speed}", flush=True)


def read(path):
    """The checkpoint in a run folder.  ValueError if there is no good one"""
    with fitting(path, SCRIPT):
        return torch.load(Path(path, "checkpoint.pt"), map_location="cpu", weights_only=True)[SCRIPT]


def load(path):
    """G and φ of what read() finds, on the CPU: z ~ N(0, 1), (n, nz), φ(encode(texts)) -> images in [-1, 1]"""
    saved = read(path)
    with fitting(path, SCRIPT):
        G, phi = Generator(width=saved["settings"]["width"]), TextEncoder()
        G.load_state_dict(saved["G"])
        phi.load_state_dict(saved["phi"])
    return G.eval().requires_grad_(False), phi.requires_grad_(False)


@checked
def generate(path, n, device="auto", seed=0, text="a seven"):
    """Writes n more images of a text, image i by seed, text and i alone, and returns their folder"""
    (G, phi), device = load(path), find_device(device)
    (folder, first), noise = next_image(path, n), torch.Generator().manual_seed(seed)
    z = torch.cat([torch.randn(64, 100, generator=noise) for _ in range(0, first + n, 64)])
    h = phi(encode([text])).to(device)
    images = (G.to(device)(each.to(device), h.expand(len(each), -1)) for each in z[first:first + n].split(64))
    return save_each(images, folder, first, "mnist")


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
    parser.add_argument("--generate", type=int, metavar="N", help="N images of TEXT by the run in OUT")
    parser.add_argument("--text", default="a seven", help="what --generate draws (a seven)")
    args = parser.parse_args(argv)
    n, text = (vars(args).pop(name) for name in ("generate", "text"))
    if n is None:
        train(**vars(args))
    else:
        generate(run_folder(SCRIPT, args), n, args.device, args.seed, text)


if __name__ == "__main__":
    main()
