"""CT-GAN, "Improving the Improved Training of Wasserstein GANs: A Consistency Term and Its Dual Effect" (2018)
Xiang Wei, Boqing Gong, Zixia Liu, Wei Lu, Liqiang Wang, https://arxiv.org/abs/1803.01541

WGAN-GP's penalty hardly looks at D near real images. Dropout makes D random: two passes of one real image stand for
two points near it, and D pays where it scores them differently. Dropout is on in every pass of D, in the penalty
and in G's loss, too: without it CT is 0.

    L = E[D(x_tilde)] - E[D(x)] + λ₁ E[(‖∇_x_hat D(x_hat)‖₂ - 1)²] + λ₂ E[CT]
    CT = max(0, (D₁(x) - D₂(x))² + 0.1 mean (D₋₁(x) - D₋₂(x))² - M′)    (1, 2: two passes; D₋: D but its last layer)

Differs from the paper, or from its authors' code, whose squares CT has, and whose steps the comments follow:
- All images; the authors' MNIST script, whose λ₁, λ₂, M′, m and n_critic these are, takes --examples 1000. With all
  of CIFAR-10 and a plain CNN they found CT-GAN below WGAN-GP (issue 1 of their code).
- Networks, initialisation, z, batches: wgan_gp.py's. lr, β₁ and the first dropout are those of their AC-GAN ResNet,
  where lr falls to 0 and G's batch has 128 images; here neither.
- --width 16, --steps 1400, for two CPU cores and minutes; the authors took 50,000 steps (ResNet: 100,000)."""
import torch
from torch import cuda, nn
from common import batches, load_images, save_animation, save_images
from wgan_gp import Generator, folder, generate, grad_norm, load, main, resume, rounds, save

# ---- Networks: 4x4 kernels, as in WGAN's code; from 4x4 pixels on every layer doubles or halves the image --------
class Critic(nn.Sequential):
    """D(x) = D[1](D[0](x)): images -> features D₋ -> scores.  (m, channels, size, size) -> (m, n, 4, 4) -> (m,)"""
    def __init__(self, channels=1, size=32, width=16):
        n = width
        layers = [nn.Conv2d(channels, n, 4, 2, 1), nn.LeakyReLU(0.2, True), nn.Dropout(0.2)]
        while n < width * size // 8:
            layers += [nn.Conv2d(n, 2 * n, 4, 2, 1), nn.LeakyReLU(0.2, True), nn.Dropout(0.5)]
            n *= 2                                              # (m, n, size/4, size/4), ..., (m, n, 4, 4)
        super().__init__(nn.Sequential(*layers), nn.Sequential(nn.Flatten(), nn.Linear(16 * n, 1), nn.Flatten(0)))


# ---- The consistency term ----------------------------------------------------------------------------------------
def consistency(D_x, D_x2, f_x, f_x2, m_prime=0.0):
    """CT of every image, from the scores and features D₋ of two passes.  (m,), (m,), (m, ...), (m, ...) -> (m,)"""
    return ((D_x - D_x2) ** 2 + 0.1 * (f_x - f_x2).square().flatten(1).mean(1) - m_prime).relu()


# ---- WGAN-GP's Algorithm 1 with the consistency term -------------------------------------------------------------
def train(                      # λ₁ to n_critic, β₂, m: the authors' code for MNIST; lr, β₁: their ResNet
    lam1=10.0,              # λ₁        weight of the gradient penalty
    lam2=2.0,               # λ₂        weight of the consistency term
    m_prime=0.0,            # M′        differences up to it are free; taken off before λ₂, in their code after
    n_critic=5,             # n_critic  critic updates per generator update
    lr=2e-4,                # α         Adam: step size (1e-4 for MNIST)
    beta1=0.0,              # β₁        Adam: decay of the first moment (0.5 for MNIST)
    beta2=0.9,              # β₂        Adam: decay of the second moment
    batch_size=50,          # m         images per batch
    nz=100,                 # z         dimensions of the latent variable
    width=16,               #           feature maps at size/2 pixels; 16: minutes on a CPU, 64: as in WGAN's code
    # The images
    dataset="mnist",        # P_r       mnist, fashion-mnist, cifar10, or the path of a folder of images
    digit: int = None,      #           only this class, 0 to 9
    size=32,                #           width and height in pixels: 16, 32, 64, 128 or 256
    channels: int = None,   #           1 grey, 3 RGB (what the data set has; a folder: 3)
    root: str = None,       #           where data sets are kept (data/ beside common.py)
    examples: int = None,   #           only the first so many images
    # The run
    steps=1400,             #           generator updates
    seed=0,                 #           of every random number but the pictures' latents
    device="cuda" if cuda.is_available() else "cpu",    #       any torch device: cpu, cuda, cuda:1, mps, ...
    graph=False,            #           CUDA: record an iteration and replay it: faster, but its Python runs no more
    out: str = None,        #           run folder (runs/SCRIPT-DATASET-DIGIT)
    save_every=100,         #           steps between rows of the log, pictures and checkpoints
    keep=False,             #           keep every checkpoint beside its picture: 000100.pt, 000200.pt, ...
):
    """With CT.  Returns G, and D with dropout on.  ValueError, OSError: one sentence says what is wrong"""
    config = dict(locals())
    Generator(size=size)                                      # ValueError for a wrong size, before images are read
    torch.manual_seed(seed)
    images = load_images(dataset, digit, size, channels, root)[:examples]
    config["images"], config["channels"] = images.shape[:2]
    P_r = batches(images, batch_size, device)
    G = Generator(nz, images.shape[1], size, width).to(device, memory_format=torch.channels_last)
    D = Critic(images.shape[1], size, width).to(device, memory_format=torch.channels_last)
    theta, w = ([p for p in net.parameters() if p.requires_grad] for net in (G, D))
    opt_G = torch.optim.Adam(theta, lr, (beta1, beta2), fused=True, capturable=graph)
    opt_D = torch.optim.Adam(w, lr, (beta1, beta2), fused=True, capturable=graph)
    fixed_z = torch.randn(64, nz, generator=torch.Generator().manual_seed(0)).to(device)     # of the pictures

    def iteration():
        for _ in range(n_critic):
            x = next(P_r)                                     # x ~ P_r
            z = torch.randn(len(x), nz, device=device)        # z ~ N(0, I)
            eps = torch.rand(len(x), *[1] * (x.dim() - 1), device=device)   # ε ~ U[0, 1]
            with torch.no_grad():
                x_tilde = G(z)
            x_hat = eps * x + (1 - eps) * x_tilde             # x_hat ← ε x + (1 − ε) x_tilde
            penalty = (grad_norm(D, x_hat) - 1) ** 2
            f_x, f_x2 = D[0](x), D[0](x)                      # D₋₁(x), D₋₂(x), each with a dropout of its own
            D_x, D_x2, D_x_tilde = D[1](f_x), D[1](f_x2), D(x_tilde)
            CT = consistency(D_x, D_x2, f_x, f_x2, m_prime)
            L = D_x_tilde - D_x + lam1 * penalty + lam2 * CT  # L ← D(x_tilde) − D(x) + λ₁ (‖...‖₂ − 1)² + λ₂ CT
            opt_D.zero_grad()
            L.mean().backward(inputs=w)                       # w ← Adam(∇_w 1/m Σ L, w, α, β₁, β₂)
            opt_D.step()
        z = torch.randn(batch_size, nz, device=device)        # z ~ N(0, I)
        L_G = -D(G(z))
        opt_G.zero_grad()
        L_G.mean().backward(inputs=theta)                     # θ ← Adam(∇_θ 1/m Σ −D(G(z)), θ, α, β₁, β₂)
        opt_G.step()
        return dict(wasserstein=(D_x - D_x_tilde).mean(), L_D=L.mean(), L_G=L_G.mean(), GP=penalty.mean(),
                    CT=CT.mean())

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


if __name__ == "__main__":
    main(train, generate)
