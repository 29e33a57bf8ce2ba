"""SRGAN, "Photo-Realistic Single Image Super-Resolution Using a Generative Adversarial Network" (2017)
https://arxiv.org/abs/1609.04802
Ledig, Theis, Huszár, Caballero, Cunningham, Acosta, Aitken, Tejani, Totz, Wang, Shi

G makes a picture four times as wide and high. Trained for the pixels' squared error alone (SRResNet), it paints the
mean of all that may have been there: smooth. Then D, which tells its pictures from photographs, has a say, too.
`--enlarge FOLDER` writes the pictures of a folder, four times as wide and high, into OUT/enlarged.

    l_SR = l_X + 10⁻³ l_Gen     (3)             l_MSE = mean ‖I_HR - G(I_LR)‖²                      (4)
    l_Gen = -log D(G(I_LR))     (6)             l_VGG = mean ‖(φ(I_HR) - φ(G(I_LR))) / 12.75‖²      (5)

Differs from the paper:
- l_X is l_MSE (their SRGAN-MSE); --content vgg54 (their SRGAN) or vgg22 downloads torchvision's VGG-19. SRResNet is
  trained by l_MSE for all three, and its Adam goes on in SRGAN; SRResNet-VGG22, with total variation, is not here.
- (6) prints a sum over the batch; here all losses are means over it. (4), (5) print no channels: here, their sum.
- I_LR is bicubic, as in §3.2 (§2: Gaussian, subsampled), and of 8 bits. G has no tanh; Figure 4 does not say.
- For two CPU cores: 4 blocks of 32 maps, 8 crops of 48x48, 3,000 steps, 1,000 at ten times their lr. On ImageNet:
  --blocks 16 --width 64 --batch-size 16 --crop 96 --pretrain-lr 1e-4 --pretrain 1000000 --steps 1200000"""
import warnings
from argparse import ArgumentParser
from functools import partial
from itertools import chain, islice
from pathlib import Path

import torch
import torchvision
import wgan_gp
from PIL import Image, ImageOps
from torch import cuda, nn
from torch.nn.functional import interpolate, softplus
from torchvision.datasets.folder import is_image_file
from torchvision.transforms.functional import normalize, pil_to_tensor, to_pil_image
from common import save_animation, save_images
from wgan_gp import folder, resume, rounds, save

# ---- Photographs -------------------------------------------------------------------------------------------------
def found(folder):
    """The paths of all images in a folder, at any depth, by name"""
    return sorted(path for path in Path(folder).rglob("*") if is_image_file(path.name))


def cut(path, size):
    """A square from anywhere in a photograph: [uint8 (3, size, size)].  [], and a warning, if that cannot be had"""
    try:
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        if min(image.size) < size:
            raise ValueError(f"its {image.width}x{image.height} pixels are fewer than {size}x{size}")
        left, top = (int(torch.randint(side - size + 1, ())) for side in image.size)
        return [pil_to_tensor(image.crop((left, top, left + size, top + size)))]
    except Exception as error:                              # damaged files cause many kinds
        warnings.warn(f"left out {path}: {error}")          # once
        return []


def crops(paths, m, size, device):
    """I_HR: endless batches, random crops of m different photographs.  (m, 3, size, size) in [-1, 1].  ValueError"""
    while True:
        squares = chain.from_iterable(cut(paths[i], size) for i in torch.randperm(len(paths)))
        x = list(islice(squares, m))
        if not x:
            raise ValueError(f"there is no photograph of at least {size}x{size} pixels")
        yield torch.stack(x).to(device) / 127.5 - 1


def downscale(HR):
    """I_LR: bicubic, a quarter as wide and high, 8 bits.  (m, 3, H, W) in [-1, 1] -> (m, 3, H/4, W/4) in [0, 1]"""
    LR = interpolate(HR, scale_factor=1 / 4, mode="bicubic", antialias=True)
    return ((LR.clamp(-1, 1) + 1) * 127.5).round() / 255


# ---- Networks (Figure 4) -----------------------------------------------------------------------------------------
class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Generator(nn.Sequential):
    """SRResNet: pictures in [0, 1] -> four times as large, about in [-1, 1].  (m, 3, H, W) -> (m, 3, 4 H, 4 W)"""
    def __init__(self, blocks=16, width=64):
        n, layers = width, []
        for _ in range(blocks):
            layers.append(Residual(nn.Conv2d(n, n, 3, 1, 1), nn.BatchNorm2d(n), nn.PReLU(),
                                   nn.Conv2d(n, n, 3, 1, 1), nn.BatchNorm2d(n)))
        layers = [Residual(*layers, nn.Conv2d(n, n, 3, 1, 1), nn.BatchNorm2d(n))]
        for _ in range(2):                                      # (m, n, 2 H, 2 W), (m, n, 4 H, 4 W)
            layers += [nn.Conv2d(n, 4 * n, 3, 1, 1), nn.PixelShuffle(2), nn.PReLU()]
        super().__init__(nn.Conv2d(3, n, 9, 1, 4), nn.PReLU(), *layers, nn.Conv2d(n, 3, 9, 1, 4))


class Discriminator(nn.Sequential):
    """D(x): pictures -> logits of being photographs.  (m, 3, size, size) -> (m,)"""
    def __init__(self, size=96, width=64):
        n, layers = width, [nn.Conv2d(3, width, 3, 1, 1), nn.LeakyReLU(0.2, True)]
        for k, stride in (1, 2), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (8, 2):    # to (m, 8 n, size/16, size/16)
            layers += [nn.Conv2d(n, k * width, 3, stride, 1), nn.BatchNorm2d(k * width), nn.LeakyReLU(0.2, True)]
            n = k * width
        layers += [nn.Flatten(), nn.Linear(n * (size // 16) ** 2, 1024), nn.LeakyReLU(0.2, True)]
        super().__init__(*layers, nn.Linear(1024, 1), nn.Flatten(0))


# ---- The features of VGG-19, and what is measured ----------------------------------------------------------------
def features(content, device):
    """φ_5,4 or φ_2,2 / 12.75, after the activation, of pictures in [-1, 1].  OSError: no network"""
    depth = dict(vgg22=9, vgg54=36)[content]
    vgg = torchvision.models.vgg19(weights="IMAGENET1K_V1").features[:depth].eval().requires_grad_(False).to(device)
    return lambda x: vgg(normalize((x + 1) / 2, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])) / 12.75


def psnr(x, y):
    """§3.1  In dB, of Y (BT.601) without 4 pixels at the borders; in [-1, 1].  (m, 3, H, W), twice -> (m,)"""
    of_Y = torch.tensor([65.481, 128.553, 24.966], device=x.device).view(3, 1, 1)
    off = ((x.clamp(-1, 1) - y.clamp(-1, 1)) / 2 * of_Y)[..., 4:-4, 4:-4].sum(1)
    return 10 * (255 ** 2 / off.square().mean((1, 2))).log10()


# ---- Training (§3.2) ---------------------------------------------------------------------------------------------
def train(
    content="mse",          # l_X       of SRGAN: mse, or features of VGG-19, vgg54 or vgg22
    adversarial=1e-3,       #           weight of l_Gen
    pretrain=2000,          #           steps of SRResNet, before those of SRGAN
    pretrain_lr=1e-3,       #           Adam: step size in SRResNet's first half
    lr=1e-4,                #           Adam: step size from there on, and in SRGAN's second half a tenth of it
    batch_size=8,           # N         photographs per batch
    crop=48,                #           width and height of what is cut out of them: a multiple of 16
    blocks=4,               # B         residual blocks of G
    width=32,               #           feature maps
    dataset="photos",       #           the path of a folder of photographs, of any size, of 8 bits
    held_out=50,            #           the last ones by name: not trained with, but measured
    size=128,               #           width and height of what is measured of each: a multiple of 4
    # The run
    steps=3000,             #           updates of G, with SRResNet's.  Raised later, they raise lr again
    seed=0,                 #           of every random number
    device="cuda" if cuda.is_available() else "cpu",    #       any torch device: cpu, cuda, cuda:1, mps, ...
    out: str = None,        #           run folder (runs/SCRIPT-DATASET)
    save_every=200,         #           steps between rows of the log, pictures and checkpoints
):
    """As above.  Returns G, D.  ValueError, OSError: one sentence says what is wrong"""
    paths = found(dataset)
    config = dict(locals(), paths=len(paths), keep=False, graph=False)
    if crop % 16 or size % 4 or size < 12 or content not in ("mse", "vgg54", "vgg22"):
        raise ValueError("--crop must be a multiple of 16, --size of 4, at least 12, --content mse, vgg54 or vgg22")
    if not 3 <= held_out <= len(paths) - batch_size:
        raise ValueError(f"--dataset {dataset}: {len(paths)} photographs, less than --held-out, 3 or more, and --batch-size")
    torch.manual_seed(seed)
    G, D = Generator(blocks, width).to(device), Discriminator(crop, width).to(device)
    theta, w = ([p for p in net.parameters() if p.requires_grad] for net in (G, D))
    opt_G, opt_D = (torch.optim.Adam(each, lr, (0.9, 0.999), fused=True) for each in (theta, w))
    phi = features(content, device) if content != "mse" else None
    I_HR = crops(paths[:-held_out], batch_size, crop, device)
    HR_test = next(crops(paths[-held_out:], held_out, size, device))
    LR_test = downscale(HR_test)
    bicubic = interpolate(2 * LR_test - 1, scale_factor=4, mode="bicubic", antialias=True)
    print(f"{len(paths)} photographs; psnr of the bicubic ones {psnr(bicubic, HR_test).mean():.2f}")

    def iteration():
        nonlocal step
        step += 1
        now = pretrain_lr if step <= pretrain / 2 else lr if step <= (pretrain + steps) / 2 else lr / 10
        opt_G.param_groups[0]["lr"] = opt_D.param_groups[0]["lr"] = now
        HR = next(I_HR)
        SR = G(downscale(HR))
        l_X = (HR - SR).square().sum(1).mean()              # (4)
        l_Gen = l_D = torch.zeros_like(l_X)                 # §3.2  SRResNet: l_MSE alone
        if step > pretrain:                                 # §3.2  SRGAN, from there on
            l_D = (softplus(-D(HR)) + softplus(D(SR.detach()))).mean()
            opt_D.zero_grad()
            l_D.backward(inputs=w)                          # (2)   max_D log D(I_HR) + log(1 − D(G(I_LR)))
            opt_D.step()
            l_X = (phi(HR) - phi(SR)).square().sum(1).mean() if phi else l_X        # (5)
            l_Gen = softplus(-D(SR)).mean()                 # (6)   −log D(G(I_LR))
        l_SR = l_X + adversarial * l_Gen                    # (3)
        opt_G.zero_grad()
        l_SR.backward(inputs=theta)
        opt_G.step()
        return dict(l_X=l_X, l_Gen=l_Gen, l_D=l_D)

    states = dict(G=G, D=D, opt_G=opt_G, opt_D=opt_D)       # all that a checkpoint keeps
    rows = resume(out := folder(__file__, config), config, states)
    step = rows[-1]["step"] if rows else 0                  # so many iterations are made
    for row in rounds(iteration, config, rows):             # every save_every iterations
        G.eval()                                            # by running statistics: each depends on its LR alone
        SR = torch.cat([G(each).detach() for each in LR_test.split(10)])
        G.train()
        row["psnr"] = psnr(SR, HR_test).mean().item()
        save_images(torch.cat([bicubic[:3], SR[:3], HR_test[:3]]), out / f"{step:06d}.png")
        save(out, config, states, rows)
    save_animation(out)
    return G.eval(), D


# ---- The run: as in wgan_gp.py, but for photographs instead of latents -------------------------------------------
load = partial(wgan_gp.load, network=Generator)


def enlarged(G, x, pixels=2 ** 18):
    """G of a picture of any size, in strips of so many pixels, and borders.  uint8 (3, H, W) -> uint8 (3, 4 H, 4 W)"""
    rows, border = max(1, pixels // x.shape[2]), 8 + 2 * G.config["blocks"]     # G sees no farther than the border
    SR = torch.empty(3, 4 * x.shape[1], 4 * x.shape[2], dtype=torch.uint8)
    for top in range(0, x.shape[1], rows):
        above = max(0, top - border)
        part = G(x[None, :, above:top + rows + border] / 255)[0, :, 4 * (top - above):][:, :4 * rows]
        SR[:, 4 * top:4 * (top + rows)] = ((part.clamp(-1, 1) + 1) * 127.5).round()
    return SR


def enlarge(out, n, seed, device, photographs):
    """Writes the images of a folder, four times as wide and high, by the run in out, into out/enlarged"""
    G = load(out / "checkpoint.pt").to(device)
    for path in found(photographs):
        file = out / "enlarged" / f"{path.relative_to(photographs)}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
            to_pil_image(enlarged(G, pil_to_tensor(image).to(device))).save(file)
        except Exception as error:                          # damaged files and too large ones cause many kinds
            print(f"left out {path}: {error}")
    print(f"{len(found(photographs))} pictures of {photographs}, but for those left out, are in {out / 'enlarged'}")


def main(argv=None):
    """wgan_gp.py's command line, with --enlarge FOLDER"""
    parser = ArgumentParser(add_help=False)
    parser.add_argument("--enlarge", "--generate")
    known, others = parser.parse_known_args(argv)
    others += ["--generate=0"] * bool(known.enlarge)
    wgan_gp.main(train, partial(enlarge, photographs=known.enlarge), others)


if __name__ == "__main__":
    main()
