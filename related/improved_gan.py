"""Improved Techniques for Training GANs, §3.2-3.5 (NIPS 2016), https://arxiv.org/abs/1606.03498
T. Salimans, I. Goodfellow, W. Zaremba, V. Cheung, A. Radford, X. Chen

Four changes to DCGAN, each with a flag: D sees how alike a batch's images are (--minibatch), and learns 0.9 for
real ones (--smooth); G normalises by a fixed batch (--vbn); weights pay for the distance from their mean
(--history).

    o(x_i)_b = Σ_{j≠i} exp(-‖M_ib - M_jb‖₁), M_i = f(x_i) T                             §3.2
    L_D = E[-α log D(x) - (1 - α) log(1 - D(x))] - E log(1 - D(G(z)))                   §3.4
    L_G = -E log D(G(z));    to both: history ‖θ - 1/t Σ_{i≤t} θ[i]‖²                   §3.3

Differs from the paper, or from its authors' code:
- Networks: those of wgan_gp.py, T from N(0, 1/A); theirs are larger, and their T is normalised.
- §3.3 is in no code of theirs, and has no weight in the paper. Here: 0, that is, off."""
from copy import deepcopy
from functools import partial

import torch
import wgan_gp
from torch import cuda, nn
from torch.nn.functional import softplus
from common import batches, load_images, save_animation, save_images
from wgan_gp import folder, main, resume, rounds, save

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
    size=32,                #           width and height in pixels: 16, 32, 64, 128 or 256
    channels: int = None,   #           1 grey, 3 RGB (what the data set has; a folder: 3)
    root: str = None,       #           where data sets are kept (data/ beside common.py)
    # The run
    steps=3000,             #           updates of D, and of G
    seed=0,                 #           of every random number but the pictures' latents
    device="cuda" if cuda.is_available() else "cpu",    #       any torch device: cpu, cuda, cuda:1, mps, ...
    graph=False,            #           CUDA: record an iteration and replay it, faster; edits of it: see recorded
    out: str = None,        #           run folder (runs/SCRIPT-DATASET-DIGIT)
    save_every=100,         #           steps between rows of the log, pictures and checkpoints
    keep=False,             #           keep every checkpoint beside its picture: 000100.pt, 000200.pt, ...
):
    """As above.  Returns G, D.  ValueError, OSError: one sentence says what is wrong"""
    config = dict(locals())
    Generator(size=size)                                      # ValueError for such a size, before images are read
    torch.manual_seed(seed)
    images = load_images(dataset, digit, size, channels, root)
    config["images"], config["channels"] = images.shape[:2]
    P_r = batches(images, batch_size, device)
    G = Generator(nz, images.shape[1], size, width, vbn).to(device)
    D = Discriminator(images.shape[1], size, width, kernels if minibatch else 0).to(device)
    G_mean, D_mean = deepcopy(G).requires_grad_(False), deepcopy(D).requires_grad_(False)
    theta, w = list(G.parameters()), list(D.parameters())
    opt_G = torch.optim.Adam(theta, lr, (beta1, beta2), fused=True, capturable=graph)
    opt_D = torch.optim.Adam(w, lr, (beta1, beta2), fused=True, capturable=graph)
    fixed_z = torch.randn(64, nz, generator=torch.Generator().manual_seed(0)).to(device)     # of the pictures

    def iteration():
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
        return dict(L_D=L_D, L_G=L_G)

    states = dict(G=G, D=D, G_mean=G_mean, D_mean=D_mean, opt_G=opt_G, opt_D=opt_D)    # all that a checkpoint keeps
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


load = partial(wgan_gp.load, network=Generator)
generate = partial(wgan_gp.generate, load=load)

if __name__ == "__main__":
    main(train, generate)
