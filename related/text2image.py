"""GAN-INT-CLS, "Generative Adversarial Text to Image Synthesis", https://arxiv.org/abs/1605.05396 (ICML 2016)
Scott Reed, Zeynep Akata, Xinchen Yan, Lajanugen Logeswaran, Bernt Schiele, Honglak Lee

First φ learns to make of a text, letter by letter, a vector that fits the images it describes, and no others; then
it stays as it is. G draws from noise and a text's vector. D sees an image and a text, and says no to a generated
image, and to a real one with the text of another (CLS). G also gets vectors between two texts (INT).
`--generate 5 --text "a thin seven"` draws five images of a text.

    L_φ = mean max(0, 1 + <v_i, t_j> - <v_i, t_i>) + max(0, 1 + <v_j, t_i> - <v_i, t_i>), j of other meanings
    L_D = log D(x, h) + (log(1 - D(x, ĥ)) + log(1 - D(G(z, h), h))) / 2                          Algorithm 1
    L_G = log D(G(z, h), h), for half as many again with h = β h₁ + (1 - β) h₂, β = 0.5          line 12, (5)

Differs from the paper, or from its authors' code:
- Texts are caption()'s: ten digits, thin, thick or neither, leaning left, right or neither: 90 meanings, which are
  the classes; one of each digit is left out. It shows how this works, not how far it goes.
- φ is smaller, and v, there GoogLeNet's features, learns with it; Adam, 1e-3. (2) counts errors of classifiers (3)
  and (4); the hinge in its place is that of the code, whose batch has one image from each of 40 classes.
- t̂ is the text of the next image in the batch, and does not count if it means the same; in the code each text gets
  an image of another class. (5) has log(1 - D), to fall; log D and its share are the code's, which draws z anew for
  G's step. L_D and L_G are to rise; lines 11 and 13 print a minus.
- G and D are lsgan.py's, on 32x32 pixels; h goes through 64 dimensions, and is of one text. Theirs: 64x64, crops,
  mirrored or not, residual blocks, 128, the mean of four texts, and lr halved every 100 of 600 epochs."""
import re
from argparse import ArgumentParser
from functools import partial

import lsgan
import torch
from torch import cuda, nn
from torch.nn.functional import softplus
from common import load_images, load_set, save_animation, save_images
from lsgan import folder, init, resume, rounds, save

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


class Generator(nn.Module):
    """G(z, h): latents and texts -> images in [-1, 1].  (m, nz), (m, nh) -> (m, 1, 32, 32)"""
    def __init__(self, nz=100, nh=64, width=16):
        super().__init__()
        self.text = nn.Sequential(nn.Linear(nh, nh), nn.LeakyReLU(0.2, True))
        self.image = lsgan.Generator(nz + nh, width=width)

    def forward(self, z, h):
        return self.image(torch.cat([z, self.text(h)], 1))


class Discriminator(nn.Module):
    """D(x, h): images and texts -> logits of x being real, and what h says.  (m, 1, 32, 32), (m, nh) -> (m,)"""
    def __init__(self, nh=64, width=16):
        super().__init__()
        *layers, _, _, _ = lsgan.Discriminator(width=width)
        self.image, n = nn.Sequential(*layers), 4 * width                           # (m, n, 4, 4)
        self.text = nn.Sequential(nn.Linear(nh, nh), nn.BatchNorm1d(nh), nn.LeakyReLU(0.2, True))
        self.both = nn.Sequential(nn.Conv2d(n + nh, n, 1, bias=False), nn.BatchNorm2d(n), nn.LeakyReLU(0.2, True),
                                  nn.Conv2d(n, 1, 4, bias=False), nn.Flatten(0)).apply(init)

    def forward(self, x, h):
        h = self.text(h)[:, :, None, None].expand(-1, -1, 4, 4)
        return self.both(torch.cat([self.image(x), h], 1))


def joint_embedding(v, t, y):
    """For (2)-(4)  The hinge loss of images v and texts t of meanings y.  (m, nh), (m, nh), (m,) -> ()"""
    score = v @ t.T
    wrong = (1 + score - score.diagonal()[:, None]).relu() + (1 + score - score.diagonal()).relu()
    return (wrong * (y[:, None] != y)).sum() / len(y) ** 2


# ---- Training ----------------------------------------------------------------------------------------------------
def train(
    lr=2e-4,                # α         Adam: step size of G and D
    batch_size=64,          #           images per batch
    pretrain=1000,          #           steps of φ, before those of G and D
    width=16,               #           feature maps at 16x16 pixels
    dataset="mnist",        #           mnist alone: texts speak of digits
    steps=7500,             #           of φ, and then, S, of D and G
    seed=0,                 #           of every random number but the pictures' latents
    device="cuda" if cuda.is_available() else "cpu",    #       any torch device: cpu, cuda, cuda:1, mps, ...
    out: str = None,        #           run folder (runs/SCRIPT-DATASET)
    save_every=200,         #           steps between rows of the log, pictures and checkpoints
):
    """As above.  Returns G, φ.  ValueError, OSError: one sentence says what is wrong"""
    config = dict(locals(), digit=None, keep=False, graph=False)
    if dataset != "mnist":
        raise ValueError(f"--dataset must be mnist, of whose digits the texts speak, not {dataset}")
    torch.manual_seed(seed)
    G, D, phi = (it.to(device) for it in (Generator(width=width), Discriminator(width=width), TextEncoder()))
    v = nn.Sequential(Discriminator().image, nn.Flatten(), nn.Linear(1024, 64)).to(device)
    theta, w, omega = list(G.parameters()), list(D.parameters()), [*phi.parameters(), *v.parameters()]
    opt_G, opt_D = (torch.optim.Adam(each, lr, (0.5, 0.999), fused=True) for each in (theta, w))
    opt_phi = torch.optim.Adam(omega, 1e-3, fused=True)
    x_all, (_, digits) = load_images(dataset), load_set(dataset)
    meanings = torch.cat([digits[:, None], looks(x_all)], 1)
    unseen = torch.stack([digits, digits % 2 * 2, digits // 2 % 2 * 2], 1)      # one look of each digit is left out
    seen = (meanings != unseen).any(1).nonzero()[:, 0]
    fixed_z = torch.randn(6, 100, generator=torch.Generator().manual_seed(0)).to(device)     # of the pictures

    def iteration():                                                #  2: for n = 1, ..., S do
        nonlocal step
        step += 1
        i = seen[torch.randint(len(seen), (batch_size,))]           #  1: images x, matching text t,
        x, meaning = x_all[i].to(device) / 127.5 - 1, meanings[i]   #     mismatching t̂: of another image
        t, t_hat = (encode(caption(each)).to(device) for each in (meaning, meaning.roll(-1, 0)))
        L_phi = L_D = L_G = torch.zeros((), device=device)
        if step <= pretrain:
            L_phi = joint_embedding(v(x), phi(t), (meaning @ torch.tensor([9, 3, 1])).to(device))
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
            other = (meaning != meaning.roll(-1, 0)).any(1).to(device)
            L_D = -softplus(-s_r) - (other * softplus(s_w) + softplus(s_f)) / 2     # 10: L_D ← log s_r + (log(1 ...
            opt_D.zero_grad()
            (-L_D.mean()).backward(inputs=w)                        # 11: D ← D + α ∂L_D/∂D (printed: −)
            opt_D.step()
            L_G = -softplus(-D(x_hat, h_G))                         # 12: L_G ← log s_f, by the new D, and (5)
            opt_G.zero_grad()
            (-L_G.mean()).backward(inputs=theta)                    # 13: G ← G + α ∂L_G/∂G (printed: −)
            opt_G.step()
        return dict(L_phi=L_phi, L_D=L_D.mean(), L_G=L_G.mean())    # 14: end

    states = dict(G=G, D=D, phi=phi, v=v, opt_G=opt_G, opt_D=opt_D, opt_phi=opt_phi)   # all that a checkpoint keeps
    out = folder(__file__, config)
    rows = resume(out, config, states)
    step = rows[-1]["step"] if rows else 0                          # so many iterations are made
    for row in rounds(iteration, config, rows):                     # every save_every iterations
        h = phi(encode(SHOWN).to(device))
        G.eval()                                                    # by running statistics: each depends on z and h
        save_images(G(fixed_z.repeat(6, 1), h.repeat_interleave(6, 0)).detach(), out / f"{row['step']:06d}.png")
        G.train()
        save(out, config, states, rows)
    save_animation(out)
    return G.eval(), phi


# ---- Texts, made from pixels -------------------------------------------------------------------------------------
NAMES = "zero one two three four five six seven eight nine".split()
STROKES, SLANTS = ["thin ", "", "thick "], [" leaning left", "", " leaning right"]
PHRASES = ["{}", "a {}", "the digit {}", "the number {}", "a handwritten {}", "a picture of a {}", "this is a {}",
           "someone wrote a {}", "an image that shows a {}", "a white {} on black"]
SHOWN = ["a three", "a thin seven", "a thick seven", "a seven leaning left", "a seven leaning right", "the digit eight"]


def looks(x):
    """How thick and how slanted white strokes are: 0, 1, 2, each about a third of MNIST.  uint8 (m, 1, H, W) -> (m, 2)"""
    p = x[:, 0].float()
    thickness = p.sum((1, 2)) / (p.diff(dim=1).abs().sum((1, 2)) + p.diff(dim=2).abs().sum((1, 2)))
    p = p / p.sum((1, 2), keepdim=True)
    row, column = (torch.arange(float(n)) for n in p.shape[1:])
    up = (p.sum(2) * row).sum(1)[:, None, None] - row[:, None]
    right = column - (p.sum(1) * column).sum(1)[:, None, None]
    slant = (p * right * up).sum((1, 2)) / (p * up ** 2).sum((1, 2))
    return torch.stack([(thickness > 0.9).long() + (thickness > 1.1), (slant > 0).long() + (slant > 0.25)], dim=1)


def caption(meanings, rng=None):
    """Texts like "a picture of a thin seven leaning left"; rng: torch.Generator.  digit, looks (m, 3) -> m texts"""
    phrases = torch.randint(len(PHRASES), (len(meanings),), generator=rng)
    return [PHRASES[phrase].format(STROKES[stroke] + NAMES[digit] + SLANTS[slant])
            for phrase, (digit, stroke, slant) in zip(phrases, meanings)]


def encode(texts, length=64):
    """ASCII codes of a text's small letters, then of spaces.  n texts -> int64 (n, length)"""
    return torch.tensor([list(text.lower().encode("ascii", "replace")[:length].ljust(length)) for text in texts])


# ---- The run: as in lsgan.py, but for texts --------------------------------------------------------------------
def load(checkpoint):
    """G and φ of a checkpoint.pt, on the CPU: z ~ N(0, 1), (n, 100), φ(encode(texts)) -> images in [-1, 1]"""
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    G, phi = Generator(width=saved["config"]["width"]), TextEncoder()
    G.load_state_dict(saved["G"])
    phi.load_state_dict(saved["phi"])
    return G.eval().requires_grad_(False), phi.requires_grad_(False)


def generate(out, n, seed, device, text="a seven"):
    """Writes n images of a text into out/generated: image i depends on the text, the seed and i alone"""
    (G, phi), noise = load(out / "checkpoint.pt"), torch.Generator().manual_seed(seed)
    h, name = phi(encode([text])).to(device), re.sub(r"\W+", "-", text[:64])
    G.to(device)
    for i in range(n):
        x = G(torch.randn(1, 100, generator=noise).to(device), h)
        x = x[..., 2:-2, 2:-2]                              # without the border that load_images gave them
        save_images(x, out / "generated" / f"{name}-{seed}-{i:06d}.png")
    print(f"{n:,} images in {out / 'generated'}")


def main(argv=None):
    """lsgan.py's command line, and --text, what --generate draws"""
    parser = ArgumentParser(add_help=False)
    parser.add_argument("--text", default="a seven")
    known, others = parser.parse_known_args(argv)
    lsgan.main(train, partial(generate, text=known.text), others)


if __name__ == "__main__":
    main()
