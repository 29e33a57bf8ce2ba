"""Improved Techniques for Training GANs, §5, §3.1: semi-supervised learning by feature matching (NIPS 2016)
T. Salimans, I. Goodfellow, W. Zaremba, V. Cheung, A. Radford, X. Chen, https://arxiv.org/abs/1606.03498

D is a classifier whose K logits l_k say as well whether an image is real. A few labelled images teach it the
classes; images without labels, and generated ones, where a class ends. G only matches the mean of D's features f.

    D(x) = Z / (Z + 1), Z = Σ_k exp l_k(x)      L_sup = -E log p(y | x, y < K + 1) = -E log(exp l_y(x) / Z)
    L_unsup = -½ E log D(x) - ½ E log(1 - D(G(z)))      L_G = ‖E f(x) - E f(G(z))‖², a mean over f's components

Differs from the paper, or from its authors' code for MNIST, whose networks these are:
- The halves in L_unsup, and the mean over f's components, are the code's; the paper prints neither.
- Pixels in [-1, 1]: tanh, not sigmoid, and twice the noise; G's last v begins larger, its second layer smaller;
  batches are drawn with replacement. So lr is 1e-3: with their 3e-3 L_G grew and grew. z is normal, theirs uniform.
- Adam divides by √v + 1e-4, theirs by √(v + 1e-8). D's average, which is tested, is divided by 1 - emaᵗ; theirs only
  starts from 0. As there, labelled images are unlabelled ones, too. --steps 12000 are 20 epochs; theirs: 300."""
from copy import deepcopy
from functools import partial

import torch
import torch.nn.functional as F
import wgan_gp
from torch import cuda, nn
from common import DATASETS, ROOT, batches, load_images, load_set, save_animation, save_images
from wgan_gp import folder, main, resume, rounds, save

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
def train(
    # As in the authors' code, but for lr
    labels=100,             #           images with labels: a tenth of it, but at least 1, of each class
    lr=1e-3,                #           Adam: step size
    beta1=0.5,              # β₁        Adam: decay of the first moment
    beta2=0.999,            # β₂        Adam: decay of the second moment
    ema=0.9999,             #           decay of the moving average of D, which is tested
    batch_size=100,         # m         images per batch: labelled ones, unlabelled ones, and generated ones
    nz=100,                 # z         dimensions of the latent variable
    width=500,              #           hidden units of G
    # The images
    dataset="mnist",        #           mnist, fashion-mnist or cifar10
    size=28,                #           width and height in pixels
    root: str = None,       #           where data sets are kept (data/ beside common.py)
    # The run
    steps=12000,            #           updates of D, and of G
    seed=0,                 #           of every random number but the pictures' latents
    device="cuda" if cuda.is_available() else "cpu",    #       any torch device: cpu, cuda, cuda:1, mps, ...
    graph=False,            #           CUDA: record an iteration and replay it: faster, but its Python runs no more
    out: str = None,        #           run folder (runs/SCRIPT-DATASET)
    save_every=600,         #           steps between rows of the log, tests, pictures and checkpoints
    keep=False,             #           keep every checkpoint beside its picture: 000600.pt, 001200.pt, ...
):
    """As above.  Returns G, and D's average.  ValueError, OSError: one sentence says what is wrong"""
    config = dict(locals(), digit=None)
    if dataset not in DATASETS:
        raise ValueError(f"--dataset must be one with classes, {', '.join(DATASETS)}, not {dataset}")
    torch.manual_seed(seed)
    images, x_test = (load_images(dataset, None, size, None, root, train=part).to(device) for part in (True, False))
    (_, y), (_, y_test) = (load_set(dataset, root or ROOT, train=part) for part in (True, False))
    config["images"], config["channels"] = images.shape[:2]
    G = Generator(nz, images.shape[1], size, width).to(device)
    D = Classifier(images.shape[1], size).to(device)
    mixed = torch.randperm(len(y))
    few = torch.cat([mixed[y[mixed] == k][:max(1, labels // 10)] for k in range(10)])
    x_few, y_few, y_test = images[few] / 127.5 - 1, y[few].to(device), y_test.to(device)
    start(D, next(batches(images, 500, device)))
    D_ema = deepcopy(D).eval().requires_grad_(False)
    P_r = batches(images, batch_size, device)
    theta, w = ([p for p in net.parameters() if p.requires_grad] for net in (G, D))
    opt_G = torch.optim.Adam(theta, lr, (beta1, beta2), eps=1e-4, fused=True, capturable=graph)
    opt_D = torch.optim.Adam(w, lr, (beta1, beta2), eps=1e-4, fused=True, capturable=graph)
    fixed_z = torch.randn(64, nz, generator=torch.Generator().manual_seed(0)).to(device)     # of the pictures

    def iteration():
        i, x = torch.randint(len(few), (batch_size,), device=device), next(P_r)
        with torch.no_grad():
            x_tilde = G(torch.randn(batch_size, nz, device=device))
        l_few, l_x, l_x_tilde = D(torch.cat([x_few[i], x, x_tilde])).split(batch_size)
        L_sup, L_unsup = losses(l_few, y_few[i], l_x, l_x_tilde)        # §5    −log p(y|x); −log D(x), ...
        opt_D.zero_grad()
        (L_sup + L_unsup).backward(inputs=w)                            # §5    L = L_sup + L_unsup
        opt_D.step()
        share = (1 - ema) / (1 - ema ** opt_D.state[w[0]]["step"])      # of a tensor, which a record counts on
        for average, now in zip(D_ema.parameters(), D.parameters()):
            average.lerp_(now.detach(), share)                          # code  D_ema: weights 1, ema, ema², ...
        x, x_tilde = next(P_r), G(torch.randn(batch_size, nz, device=device))
        f_x, f_x_tilde = D[0](torch.cat([x, x_tilde])).split(batch_size)
        L_G = feature_matching(f_x, f_x_tilde)                          # §3.1  ‖E f(x) − E f(G(z))‖²
        opt_G.zero_grad()
        L_G.backward(inputs=theta)
        opt_G.step()
        return dict(L_sup=L_sup, L_unsup=L_unsup, L_G=L_G)

    states = dict(G=G, D=D, D_ema=D_ema, opt_G=opt_G, opt_D=opt_D)      # all that a checkpoint keeps
    real, out = next(P_r)[:64], folder(__file__, config)
    rows = resume(out, config, states)
    save_images(real, out / "real.png")                       # as D sees them
    for row in rounds(iteration, config, rows):               # every save_every iterations
        row["test_errors"] = (D_ema(x_test / 127.5 - 1).argmax(1) != y_test).sum().item()
        G.eval()                                              # by running statistics: each depends on its z alone
        save_images(G(fixed_z).detach(), out / f"{row['step']:06d}.png")
        G.train()
        save(out, config, states, rows)
    save_animation(out)
    return G.eval(), D_ema


load = partial(wgan_gp.load, network=Generator)
generate = partial(wgan_gp.generate, load=load)

if __name__ == "__main__":
    main(train, generate)
