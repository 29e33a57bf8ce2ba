"""Improved Techniques for Training GANs, §3.2, 3.4, 3.5 (NIPS 2016), https://arxiv.org/abs/1606.03498
T. Salimans, I. Goodfellow, W. Zaremba, V. Cheung, A. Radford, X. Chen

Three changes to DCGAN: D sees how alike the images of a batch are, and learns 0.9 for real ones; G normalises an
image by a fixed batch and itself. `--kernels 0 --smooth 1 --no-vbn` is DCGAN. §3.1 and §5 are in semi_supervised.py.

    o(x_i)_b = Σ_{j≠i} exp(-‖M_ib - M_jb‖₁) + bias_b,   M_i = f(x_i) T                  §3.2
    L_D = E[-α log D(x) - (1 - α) log(1 - D(x))] - E log(1 - D(G(z)))                   §3.4
    L_G = -E log D(G(z))

Differs from the paper, or from its authors' code:
- §3.2 prints Σ over all j, which adds 1; its text says "other". B = 100, C = 5, bias and start are as in the code
  for CIFAR: T so that the nearest image is at a mean distance of 2, the bias so that o has mean 0, here for one
  batch, there for 500 images; T is weight-normalised there. ImageNet's: 300, 50, no start, two sums, of real, of
  generated.
- α = 0.9 is the paper's example. Their only code with it or VBN (of 16), ImageNet's, has 0.75; G aims at α/2.
- §3.3, historical averaging, is not here: no code of theirs has it, the paper no weight (Table 3: -L+HA).
- Networks, z, batches: lsgan.py's (DCGAN's own: 5x5 kernels, uniform z). Theirs are larger, D learns classes, too;
  on CIFAR G minimises E log(1 - D(G(z))), three steps to one of D. Adam's numbers are DCGAN's (theirs: 3e-4, on
  ImageNet 4e-4). --width 16, --steps 3000, for two CPU cores and minutes."""
from functools import partial

import lsgan
import torch
from torch import cuda, nn
from torch.nn.functional import softplus
from common import batches, load_images, save_animation, save_images
from lsgan import folder, init, main, resume, rounds, save

# ---- The techniques ----------------------------------------------------------------------------------------------
class MinibatchDiscrimination(nn.Module):
    """§3.2  o(x), how near the other images of the batch are, of features f(x).  (m, A) -> (m, B)"""
    def __init__(self, A, B=100, C=5):
        super().__init__()
        self.T, self.bias = nn.Parameter(torch.randn(A, B, C)), nn.Parameter(torch.zeros(B))

    def distances(self, f):
        M = torch.einsum("ia,abc->bic", f, self.T)
        return torch.cdist(M, M, p=1)                           # ‖M_ib − M_jb‖₁  (B, m, m)

    def forward(self, f):
        others = self.distances(f).neg().exp().sum(2) - 1       # without the image itself, exp(0)
        return others.T + self.bias

    @torch.no_grad()
    def start(self, f):
        """Scales T and sets the bias so that on f distances to the nearest image have mean 2, and o has mean 0"""
        nearest = self.distances(f).kthvalue(2).values          # the first is the image itself
        self.T *= 2 / nearest.mean(1, keepdim=True)
        self.bias -= self(f).mean(0)


class VirtualBatchNorm(nn.Module):
    """§3.5  The first n_ref examples of x, the reference, are normalised by their own mean and variance; each other
    one by those of a batch of itself and the reference.  (n_ref + m, n, H, W) -> (n_ref + m, n, H, W)"""
    def __init__(self, n, n_ref=64):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(1 + 0.02 * torch.randn(n)), nn.Parameter(torch.zeros(n))
        self.n_ref = n_ref

    def forward(self, x):
        own = torch.stack([x.mean((2, 3)), x.square().mean((2, 3))])            # E[x], E[x²]  (2, n_ref + m, n)
        reference = own[:, :self.n_ref].mean(1, keepdim=True)
        mixed = (self.n_ref * reference + own[:, self.n_ref:]) / (self.n_ref + 1)
        mean, square = torch.cat([reference.expand(-1, self.n_ref, -1), mixed], 1)
        scale = self.gamma / (square - mean ** 2 + 1e-5).sqrt()
        return x * scale[..., None, None] + (self.beta - mean * scale)[..., None, None]


# ---- Networks: DCGAN's, of lsgan.py, with them -------------------------------------------------------------------
class Generator(lsgan.Generator):
    """G(z): latents -> images in [-1, 1].  (m, nz) -> (m, channels, size, size).  ValueError: wrong size"""
    def __init__(self, nz=100, channels=1, size=32, width=16, vbn=True):
        super().__init__(nz, channels, size, width)
        self.register_buffer("reference", torch.randn(64 if vbn else 0, nz))    # §3.5  chosen once
        for i, layer in enumerate(self):
            if vbn and isinstance(layer, nn.BatchNorm2d):
                self[i] = VirtualBatchNorm(layer.num_features)

    def forward(self, z):
        return super().forward(torch.cat([self.reference, z]))[len(self.reference):]


class Discriminator(nn.Module):
    """D(x): images -> logits of being real.  (m, channels, size, size) -> (m,).  kernels=0: DCGAN's"""
    def __init__(self, channels=1, size=32, width=16, kernels=100):
        super().__init__()
        *layers, last, _ = lsgan.Discriminator(channels, size, width)
        self.f, self.o = nn.Sequential(*layers), MinibatchDiscrimination(last.in_features, kernels)
        self.last = nn.Linear(last.in_features + kernels, 1, bias=False)
        self.last.apply(init)

    def forward(self, x):
        f = self.f(x)                                           # (m, A)
        return self.last(torch.cat([f, self.o(f)], 1)).squeeze(1)


# ---- DCGAN with §3.2, 3.4, 3.5 -----------------------------------------------------------------------------------
def train(
    kernels=100,            # §3.2 B    kernels of minibatch discrimination in D; 0: none
    smooth=0.9,             # §3.4 α    label of real images; 1: no smoothing
    vbn=True,               # §3.5      virtual batch normalisation in G; else batch normalisation
    lr=2e-4,                #           Adam: step size
    beta1=0.5,              # β₁        Adam: decay of the first moment
    beta2=0.999,            # β₂        Adam: decay of the second moment
    batch_size=64,          # m         images per batch
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
    graph=False,            #           CUDA: record an iteration and replay it: faster, but its Python runs no more
    out: str = None,        #           run folder (runs/SCRIPT-DATASET-DIGIT)
    save_every=100,         #           steps between rows of the log, pictures and checkpoints
    keep=False,             #           keep every checkpoint beside its picture: 000100.pt, 000200.pt, ...
):
    """As above.  Returns G, D.  ValueError, OSError: one sentence says what is wrong"""
    config = dict(locals())
    Generator(size=size)                                      # ValueError for a wrong size, before images are read
    torch.manual_seed(seed)
    images = load_images(dataset, digit, size, channels, root)
    config["images"], config["channels"] = images.shape[:2]
    P_r = batches(images, batch_size, device)
    G = Generator(nz, images.shape[1], size, width, vbn).to(device, memory_format=torch.channels_last)
    D = Discriminator(images.shape[1], size, width, kernels).to(device, memory_format=torch.channels_last)
    if kernels:
        D.o.start(D.f(next(P_r)))
    theta, w = ([p for p in net.parameters() if p.requires_grad] for net in (G, D))
    opt_G = torch.optim.Adam(theta, lr, (beta1, beta2), fused=True, capturable=graph)
    opt_D = torch.optim.Adam(w, lr, (beta1, beta2), fused=True, capturable=graph)
    fixed_z = torch.randn(64, nz, generator=torch.Generator().manual_seed(0)).to(device)     # of the pictures

    def iteration():
        x = next(P_r)
        z = torch.randn(len(x), nz, device=device)
        with torch.no_grad():
            x_tilde = G(z)
        D_x, D_x_tilde = D(x), D(x_tilde)                     # §3.2  two batches, apart
        L_D = smooth * softplus(-D_x) + (1 - smooth) * softplus(D_x) + softplus(D_x_tilde)      # §3.4
        opt_D.zero_grad()
        L_D.mean().backward(inputs=w)
        opt_D.step()
        z = torch.randn(batch_size, nz, device=device)
        L_G = softplus(-D(G(z)))                              # −log D(G(z))
        opt_G.zero_grad()
        L_G.mean().backward(inputs=theta)
        opt_G.step()
        return dict(L_D=L_D.mean(), L_G=L_G.mean())

    states = dict(G=G, D=D, opt_G=opt_G, opt_D=opt_D)         # all that a checkpoint keeps
    real, out = next(P_r)[:64], folder(__file__, config)
    rows = resume(out, config, states)
    save_images(real, out / "real.png")                       # as D sees them
    for row in rounds(iteration, config, rows):               # every save_every iterations
        G.eval()                                              # each depends on its z alone, as with VBN always
        save_images(G(fixed_z).detach(), out / f"{row['step']:06d}.png")
        G.train()
        save(out, config, states, rows)
    save_animation(out)
    return G.eval(), D


load = partial(lsgan.load, network=Generator)
generate = partial(lsgan.generate, load=load)

if __name__ == "__main__":
    main(train, generate)
