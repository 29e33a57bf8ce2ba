"""SNGAN, "Spectral Normalization for Generative Adversarial Networks", https://arxiv.org/abs/1802.05957 (2018)
Takeru Miyato, Toshiki Kataoka, Masanori Koyama, Yuichi Yoshida

W x is at most σ(W) times as long as x; σ(W) is the largest singular value of W. With W / σ(W) in every layer D cannot
be steep, without a penalty. One step of the power method for each update of D finds σ well enough, as W changes
little from one update to the next.

    max_D E[min(0, -1 + D(x))] + E[min(0, -1 - D(G(z)))]      (16)        min_G -E[D(G(z))]      (17)

Differs from the paper, or from its authors' code:
- Networks, z, batches: wgan_gp.py's (Table 3: 3x3 kernels, too; slope 0.1). Most of Table 2 has loss (15), not here.
- u moves once for an update of D, as in Algorithm 1 (and once at the start); in the authors' code with every pass, in
  G's update, too, which comes first there.
- As in the paper, σ is that of W as a matrix, (d_out, d_in h w); the convolution can stretch up to twice as much.
- --width 16, --steps 6000, for two CPU cores and minutes; theirs: 100,000 (ResNets in their code: 50,000, lr to 0)."""
import torch
from torch import cuda, nn
from torch.nn.functional import normalize
from torch.nn.utils.parametrize import register_parametrization
from common import batches, load_images, save_animation, save_images
from wgan_gp import Critic, Generator, folder, generate, load, main, resume, rounds, save

# ---- Algorithm 1, lines 1 and 2, for the weight of one layer -----------------------------------------------------
class SpectralNorm(nn.Module):
    """W -> W / σ(W); in training mode u moves whenever W is read.  (d_out, ...) -> (d_out, ...)"""
    def __init__(self, d_out):
        super().__init__()
        self.register_buffer("u", torch.randn(d_out))           # so that a checkpoint has it, too

    def forward(self, W):
        matrix = W.flatten(1)                                   # (d_out, d_in h w)
        with torch.no_grad():                                   # u and v are constants, σ is not
            v = normalize(matrix.T @ self.u, dim=0)             # 1: v ← Wᵀu / ‖Wᵀu‖₂
            u = normalize(matrix @ v, dim=0)                    #    u ← W v / ‖W v‖₂
            if self.training:
                self.u.copy_(u)
        sigma = u @ (matrix @ v)
        return W / sigma                                        # 2: W̄ ← W / σ(W),  σ(W) = uᵀ W v


class Discriminator(Critic):
    """D(x): images -> scores.  (m, channels, size, size) -> (m,).  Every layer is normalised; no batch norm"""
    def __init__(self, channels=1, size=32, width=16):
        super().__init__(channels, size, width)
        for layer in self:
            if hasattr(layer, "weight"):                        # which from now on is W̄ wherever it is read
                register_parametrization(layer, "weight", SpectralNorm(len(layer.weight)))


# ---- Algorithm 1 -------------------------------------------------------------------------------------------------
def train(
    # Setting C;  A: --lr 1e-4 --beta2 0.9 --n-dis 5;  B: --lr 1e-4;  D: --lr 1e-3 --beta2 0.9 --n-dis 5;
    # E: --lr 1e-3 --n-dis 5;  F: E with --beta1 0.9;  the ResNets: --beta1 0 --beta2 0.9 --n-dis 5
    lr=2e-4,                # α         Adam: step size
    beta1=0.5,              # β₁        Adam: decay of the first moment
    beta2=0.999,            # β₂        Adam: decay of the second moment
    n_dis=1,                # n_dis     updates of D per update of G
    batch_size=64,          #           images per batch
    nz=100,                 # z         dimensions of the latent variable
    width=16,               #           feature maps at size/2 pixels; 16: minutes on a CPU, 64: as in WGAN's code
    # The images
    dataset="mnist",        # q_data    mnist, fashion-mnist, cifar10, or the path of a folder of images
    digit: int = None,      #           only this class, 0 to 9
    size=32,                #           width and height in pixels: 16, 32, 64, 128 or 256
    channels: int = None,   #           1 grey, 3 RGB (what the data set has; a folder: 3)
    root: str = None,       #           where data sets are kept (data/ beside common.py)
    # The run
    steps=6000,             #           updates of G
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
    q_data = batches(images, batch_size, device)
    G = Generator(nz, images.shape[1], size, width).to(device, memory_format=torch.channels_last)
    D = Discriminator(images.shape[1], size, width).to(device, memory_format=torch.channels_last)
    theta, w = ([p for p in net.parameters() if p.requires_grad] for net in (G, D))
    opt_G = torch.optim.Adam(theta, lr, (beta1, beta2), fused=True, capturable=graph)
    opt_D = torch.optim.Adam(w, lr, (beta1, beta2), fused=True, capturable=graph)
    fixed_z = torch.randn(64, nz, generator=torch.Generator().manual_seed(0)).to(device)     # of the pictures

    def iteration():
        for _ in range(n_dis):                                # for each update
            x = next(q_data)                                  #   x ~ q_data
            z = torch.randn(len(x), nz, device=device)        #   z ~ p(z)
            with torch.no_grad():
                x_tilde = G(z)
            # One pass for both, in which each layer's u moves once. Without batch norm, no image sees another.
            D_x, D_x_tilde = D.train()(torch.cat([x, x_tilde])).chunk(2)      # 1, 2: in every layer
            L_D = (1 - D_x).relu() + (1 + D_x_tilde).relu()   #    ℓ is (16) with the opposite sign
            opt_D.zero_grad()
            L_D.mean().backward(inputs=w)                     # 3: W ← W − α ∇_W ℓ(W̄(W), D_M), by Adam
            opt_D.step()
        z = torch.randn(batch_size, nz, device=device)
        L_G = -D.eval()(G(z))                                 # σ of the new W by one step more; eval(): u stays
        opt_G.zero_grad()
        L_G.mean().backward(inputs=theta)                     # (17) min_G −E[D(G(z))]
        opt_G.step()
        return dict(L_D=L_D.mean(), L_G=L_G.mean())

    states = dict(G=G, D=D, opt_G=opt_G, opt_D=opt_D)         # all that a checkpoint keeps
    real, out = next(q_data)[:64], folder(__file__, config)
    rows = resume(out, config, states)
    save_images(real, out / "real.png")                       # as D sees them
    for row in rounds(iteration, config, rows):               # every save_every iterations
        G.eval()                                              # by running statistics: each depends on its z alone
        save_images(G(fixed_z).detach(), out / f"{row['step']:06d}.png")
        G.train()
        save(out, config, states, rows)
    save_animation(out)
    return G.eval(), D.eval()


if __name__ == "__main__":
    main(train, generate)
