"""DRAGAN, "On Convergence and Stability of GANs", https://arxiv.org/abs/1705.07215 (2017)
Naveen Kodali, Jacob Abernethy, James Hays, Zsolt Kira

When a GAN collapses, say the authors, D is steep around real images. So D pays where the norm of its gradient near
them is not k; where the generated ones are does not matter. The rest is the first GAN; D gives logits, as in the
code. No batch norm in D: the penalty is each image's own.

    L_D = E[-log σ(D(x))] + E[-log(1 - σ(D(G(z))))] + λ E[(‖∇_x D(x + δ)‖₂ - k)²]      (the last term: (1))
    L_G = E[-log σ(D(G(z)))]

Differs from the paper, or from its authors' code:
- δ is their notebook's noise, 0.5 std(x) U[0, 1), which only brightens; its author has called that a bug: U[-1, 1)
  was meant. The notebook goes a random share of the way to x + δ, needless as its author says: here the noise is
  twice as large, 0.25 std(x) on average. The paper has N(0, cI), c = 10 suggested: a deviation of 3.2, which would
  drown pixels in [-1, 1]. --c is no variance, but the notebook's 0.5.
- The penalised gradient is that of D's logit, as in the notebook; (1) may be read as that of the probability σ(D).
- Networks, initialisation, batches: wgan_gp.py's, on 32x32 pixels in [-1, 1]; the authors' for MNIST: fully
  connected, 128 hidden units, no norm, on 28x28 pixels in [0, 1]. z has 100 dimensions, N(0, 1); theirs: U[-1, 1].
- --width 16, --steps 6000, m = 64, for two CPU cores and minutes; the authors: 200,000 steps of 128 images."""
import torch
from torch import cuda
from torch.nn.functional import softplus
from common import batches, load_images, save_animation, save_images
from wgan_gp import Critic as Discriminator, Generator, grad_norm
from wgan_gp import folder, generate, load, main, resume, rounds, save

# ---- Where the penalty looks -------------------------------------------------------------------------------------
def perturb(x, c=0.5):
    """x + δ, δ = c std(x) U[0, 1): std of the whole batch, U of every pixel its own.  (m, ...) -> (m, ...)"""
    return x + c * x.std(correction=0) * torch.rand_like(x)


# ---- The GAN with (1) --------------------------------------------------------------------------------------------
def train(
    # As in the authors' code, but for m and width
    lam=10.0,               # λ         weight of the gradient penalty
    k=1.0,                  # k         the norm that gradients should have
    c=0.5,                  #           most noise, in standard deviations of the batch's pixels
    lr=1e-4,                #           Adam: step size
    beta1=0.5,              # β₁        Adam: decay of the first moment
    beta2=0.9,              # β₂        Adam: decay of the second moment
    batch_size=64,          # m         images per batch
    nz=100,                 # z         dimensions of the latent variable
    width=16,               #           feature maps at size/2 pixels; 16: minutes on a CPU, 64: as in WGAN's code
    # The images
    dataset="mnist",        # P_real    mnist, fashion-mnist, cifar10, or the path of a folder of images
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
    """As above.  Returns G, D.  ValueError, OSError: one sentence says what is wrong"""
    config = dict(locals())
    Generator(size=size)                                      # ValueError for a wrong size, before images are read
    torch.manual_seed(seed)
    images = load_images(dataset, digit, size, channels, root)
    config["images"], config["channels"] = images.shape[:2]
    P_real = batches(images, batch_size, device)
    G = Generator(nz, images.shape[1], size, width).to(device, memory_format=torch.channels_last)
    D = Discriminator(images.shape[1], size, width).to(device, memory_format=torch.channels_last)
    theta, w = ([p for p in net.parameters() if p.requires_grad] for net in (G, D))
    opt_G = torch.optim.Adam(theta, lr, (beta1, beta2), fused=True, capturable=graph)
    opt_D = torch.optim.Adam(w, lr, (beta1, beta2), fused=True, capturable=graph)
    fixed_z = torch.randn(64, nz, generator=torch.Generator().manual_seed(0)).to(device)     # of the pictures

    def iteration():
        x = next(P_real)                                      # x ~ P_real
        z = torch.randn(len(x), nz, device=device)            # z ~ p(z)
        with torch.no_grad():
            x_tilde = G(z)
        norm = grad_norm(D, perturb(x, c))                    # ‖∇_x D(x + δ)‖₂
        penalty = (norm - k) ** 2
        L_D = softplus(-D(x)) + softplus(D(x_tilde))          # −log σ(D(x)) − log(1 − σ(D(G(z))))
        L_D = L_D + lam * penalty                             #   + λ (‖∇_x D(x + δ)‖₂ − k)²      (1)
        opt_D.zero_grad()
        L_D.mean().backward(inputs=w)                         # min_D
        opt_D.step()
        z = torch.randn(batch_size, nz, device=device)        # z ~ p(z), anew
        L_G = softplus(-D(G(z)))                              # −log σ(D(G(z)))
        opt_G.zero_grad()
        L_G.mean().backward(inputs=theta)                     # min_G
        opt_G.step()
        return dict(L_D=L_D.mean(), L_G=L_G.mean(), penalty=penalty.mean(), norm=norm.mean())

    states = dict(G=G, D=D, opt_G=opt_G, opt_D=opt_D)         # all that a checkpoint keeps
    real, out = next(P_real)[:64], folder(__file__, config)
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
