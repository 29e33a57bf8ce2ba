"""LS-GAN, "Loss-Sensitive Generative Adversarial Networks on Lipschitz Densities"
Guo-Jun Qi (2017), https://arxiv.org/abs/1701.06264v3.  Not the least squares GAN: that is lsgan.py

D (L_θ in the paper) is a loss, low on real images. It is to be lower on a real image than on a generated one by a
margin Δ, their distance: where G(z) is close to x, little is asked, and the bad images count.

    min_θ E[L_θ(x)] + λ E[(Δ(x, G(z)) + L_θ(x) - L_θ(G(z)))₊]      (6)        min_φ E[L_θ(G_φ(z))]      (7)

Differs from the paper, or from its author's code:
- D ends in a softplus, log(1 + eˢ); in version 3 in nothing. But where E[L_θ(x)] counts, L_θ must be at least 0: a
  constant taken off it lowers (6), and leaves the hinge as it is. His lsgan.lua ends in a ReLU; with that, D stayed
  at 0 on ten digits. E[L_θ(x)] does not count there, nor in glsgan.lua, which ends linear, as --real-weight 0 does.
- Weights are clipped to [-c, c] after D's update, as in glsgan.lua (whose hinge may have a slope below 0: --slope);
  so are batch norm's, from about 1 to 0.08 at once. The paper decays weights, or clips them; lsgan.lua does neither.
- Δ is the mean |difference| of pixels times τ; in both codes 0.0002 times the sum of 3x64x64 of them, which is the
  same there. His pairs are x_i and G(z_i) only; (8) has all. His G learns from the images that D has just seen.
- lr is that of lsgan.lua (glsgan.lua's newest version: 2e-4); the paper's, 0.001, falls by epochs. Networks, z and
  batches are wgan.py's (his z: uniform). --width 16, --steps 6000, for two CPU cores and minutes; his: 25 epochs."""
import torch
from torch import cuda, nn
from common import batches, load_images, save_animation, save_images
from wgan import Critic as Discriminator, Generator, folder, generate, load, main, resume, rounds, save

# ---- The margin --------------------------------------------------------------------------------------------------
def margin(x, x_tilde, tau):
    """For each pair of images: Δ = τ times the mean |x - x_tilde| over their pixels.  (n, ...), (m, ...) -> (n, m)"""
    return tau * torch.cdist(x.flatten(1), x_tilde.flatten(1), p=1) / x[0].numel()


# ---- Algorithm 1 -------------------------------------------------------------------------------------------------
def train(
    lam=2.0,                # λ         weight of the hinge: 0.5, 1 or 2 in the paper, by cross-validation
    real_weight=1.0,        #           of E[L_θ(x)]: 1 in (6), 0 in lsgan.lua, glsgan.lua
    tau=2.4576,             # τ         the margin is this times the mean difference of two images' pixels
    slope=0.0,              #           of the hinge below 0, at most 1: GLS-GAN;  1, with real_weight 0: WGAN
    c=0.08,                 #           the weights of D are clipped to [-c, c]
    weight_decay=0.0,       # γ         weight decay, as the gradient of γ/2 ‖·‖²: of D's weights, and of G's
    lr=1e-4,                #           Adam: step size
    beta1=0.5,              # β₁        Adam: decay of the first moment
    beta2=0.999,            #           Adam: decay of the second moment
    batch_size=64,          # n, m      images per batch
    nz=100,                 # z         dimensions of the latent variable
    width=16,               #           feature maps at size/2 pixels; 16: minutes on a CPU, 64: as in WGAN's code
    # The images
    dataset="mnist",        # P_data    mnist, fashion-mnist, cifar10, or the path of a folder of images
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
    """Algorithm 1.  Returns G, D.  ValueError, OSError: one sentence says what is wrong"""
    config = dict(locals())
    Generator(size=size)                                      # ValueError for a wrong size, before images are read
    torch.manual_seed(seed)
    images = load_images(dataset, digit, size, channels, root)
    config["images"], config["channels"] = images.shape[:2]
    P_data = batches(images, batch_size, device)
    G = Generator(nz, images.shape[1], size, width).to(device, memory_format=torch.channels_last)
    end = nn.Softplus() if real_weight else nn.Identity()     # L_θ(x) >= 0; else (6) is unbounded below
    D = nn.Sequential(Discriminator(images.shape[1], size, width), end).to(device, memory_format=torch.channels_last)
    phi, theta = ([p for p in net.parameters() if p.requires_grad] for net in (G, D))
    opt_G = torch.optim.Adam(phi, lr, (beta1, beta2), weight_decay=weight_decay, fused=True, capturable=graph)
    opt_D = torch.optim.Adam(theta, lr, (beta1, beta2), weight_decay=weight_decay, fused=True, capturable=graph)
    fixed_z = torch.randn(64, nz, generator=torch.Generator().manual_seed(0)).to(device)     # of the pictures

    def iteration():                                      # repeat   (with one update of θ for each of φ)
        x = next(P_data)                                  #   x_1, ..., x_n ~ P_data
        z = torch.randn(len(x), nz, device=device)        #   z_1, ..., z_m ~ P_z
        with torch.no_grad():
            x_tilde = G(z)
        # Two passes: G's step shows D a batch of generated images, and batch norm must see the same here.
        L_x, L_x_tilde = D(x), D(x_tilde)
        a = margin(x, x_tilde, tau) + L_x[:, None] - L_x_tilde            # (n, m)
        hinge = torch.maximum(a, slope * a).mean(1)       #   (Δ(x_i, G(z_j)) + L_θ(x_i) − L_θ(G(z_j)))₊
        L_D = real_weight * L_x + lam * hinge
        opt_D.zero_grad()
        L_D.mean().backward(inputs=theta)                 #   descend θ by (8), 1/n Σ L_θ(x_i) + λ/nm Σ (...)₊,
        opt_D.step()                                      #     with weight decay, if γ > 0
        with torch.no_grad():
            for each in theta:
                each.clamp_(-c, c)                        #   clip θ to [−c, c]  (in the author's later code)
        z = torch.randn(batch_size, nz, device=device)    #   z′_1, ..., z′_k ~ P_z
        L_G = D(G(z))
        opt_G.zero_grad()
        L_G.mean().backward(inputs=phi)                   #   descend φ by (9), 1/k Σ L_θ(G_φ(z′_i)),
        opt_G.step()                                      #     with weight decay, if γ > 0
        return dict(L_D=L_D.mean(), L_G=L_G.mean(), hinge=hinge.mean(), real=L_x.mean())

    states = dict(G=G, D=D, opt_G=opt_G, opt_D=opt_D)         # all that a checkpoint keeps
    real, out = next(P_data)[:64], folder(__file__, config)
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
