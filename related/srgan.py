"""SRGAN, "Photo-Realistic Single Image Super-Resolution Using a GAN", https://arxiv.org/abs/1609.04802 (2017)
Ledig, Theis, Huszár, Caballero, Cunningham, Acosta, Aitken, Tejani, Totz, Wang, Shi

G makes a picture four times as wide and high. Trained for the pixels' squared error alone (SRResNet), it paints the
mean of all that may have been there: smooth. Then D, which tells its pictures from photographs, has a say, too.

    l_SR = l_X + 10⁻³ l_Gen     (3)             l_MSE = mean (I_HR - G(I_LR))²                      (4)
    l_Gen = -log D(G(I_LR))     (6)             l_VGG = mean ((φ(I_HR) - φ(G(I_LR))) / 12.75)²      (5)

Differs from the paper:
- l_X is l_MSE (their SRGAN-MSE); --content vgg54 (their SRGAN) or vgg22 downloads VGG-19's weights.
- For two CPU cores: 4 blocks of 32 feature maps, 8 crops of 48x48 pixels, 3,000 steps; theirs: 16 of 64, 16 crops
  of 96x96, 1,200,000. So SRResNet's first half has lr 1e-3; theirs: 1e-4, and 1e-5 for SRGAN's second half."""
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from inspect import getsource, signature
from pathlib import Path

import torch
import torchvision
import wgan_gp
from PIL import Image, ImageOps
from torch import cuda, nn
from torch.nn.functional import conv2d, interpolate, mse_loss, softplus
from torchvision.datasets.folder import is_image_file
from torchvision.transforms.functional import normalize, to_tensor
from common import DATASETS, batches, load_images, save_animation, save_images
from wgan_gp import folder, resume, rounds, save

# ---- Networks (Figure 4) -----------------------------------------------------------------------------------------
class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Generator(nn.Sequential):
    """SRResNet: pictures in [0, 1] -> four times as wide and high, in [-1, 1].  (m, 3, H, W) -> (m, 3, 4 H, 4 W)"""
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
        n, layers = width, [nn.Conv2d(3, width, 3, 1, 1), nn.LeakyReLU(0.2)]
        for k, stride in (1, 2), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (8, 2):    # to (m, 8 n, size/16, size/16)
            layers += [nn.Conv2d(n, k * width, 3, stride, 1), nn.BatchNorm2d(k * width), nn.LeakyReLU(0.2)]
            n = k * width
        layers += [nn.Flatten(), nn.Linear(n * (size // 16) ** 2, 1024), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Linear(1024, 1), nn.Flatten(0))


# ---- The losses, and what is measured ----------------------------------------------------------------------------
def features(content, device):
    """φ_5,4 or φ_2,2 of VGG-19, after the activation, of pictures in [-1, 1].  ValueError without its weights"""
    try:
        depth = {"vgg22": 9, "vgg54": 36}[content]
        vgg = torchvision.models.vgg19(weights="IMAGENET1K_V1").features[:depth].eval().to(device)
    except (KeyError, OSError, RuntimeError) as error:
        raise ValueError(f"--content must be mse, vgg22 or vgg54, these with a network ({error})") from error
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    return lambda x: vgg(normalize((x + 1) / 2, mean, std)) / 12.75


def content_loss(HR, SR, phi=None):
    """(4); with features phi, (5).  (m, 3, H, W), (m, 3, H, W) in [-1, 1] -> ()"""
    return mse_loss(phi(SR), phi(HR)) if phi else mse_loss(SR, HR)


def downscale(HR):
    """I_LR: bicubic, a quarter as wide and high, 8 bits.  (m, 3, H, W) in [-1, 1] -> (m, 3, H/4, W/4) in [0, 1]"""
    LR = interpolate(HR, scale_factor=1 / 4, mode="bicubic", antialias=True)
    return ((LR.clamp(-1, 1) + 1) * 127.5).round() / 255


def luma(x):
    """§3.1  Y of BT.601, 16 to 235, without 4 pixels at every border"""
    red, green, blue = ((x[..., 4:-4, 4:-4].clamp(-1, 1) + 1) / 2).split(1, 1)
    return 16 + 65.481 * red + 128.553 * green + 24.966 * blue


def psnr(x, y):
    """Of pictures in [-1, 1], in dB; of equal ones infinite.  (m, 3, H, W), (m, 3, H, W) -> (m,)"""
    return 10 * (255 ** 2 / (luma(x) - luma(y)).square().mean((1, 2, 3))).log10()


def ssim(x, y):
    """Structural similarity of pictures in [-1, 1]; of equal ones 1.  (m, 3, H, W), (m, 3, H, W) -> (m,)"""
    x, y = luma(x), luma(y)
    line = (-torch.arange(-5.0, 6, device=x.device).square() / (2 * 1.5 ** 2)).exp()
    window = line * line[:, None] / line.sum() ** 2
    E_x, E_y, E_xx, E_yy, E_xy = (conv2d(it, window[None, None]) for it in (x, y, x * x, y * y, x * y))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similar = (2 * E_x * E_y + c1) * (2 * (E_xy - E_x * E_y) + c2)
    return (similar / ((E_x ** 2 + E_y ** 2 + c1) * (E_xx - E_x ** 2 + E_yy - E_y ** 2 + c2))).mean((1, 2, 3))


# ---- Training (§3.2) ---------------------------------------------------------------------------------------------
def train(
    content="mse",          # l_X       mse, or features of VGG-19: vgg54, vgg22
    adversarial=1e-3,       #           weight of l_Gen
    lr=1e-3,                #           Adam: step size in SRResNet's first half; then a tenth of it
    batch_size=8,           # N         images per batch
    crop=48,                #           width and height of what is cut out of an image: a multiple of 16
    pretrain=2000,          #           steps of SRResNet, before those of SRGAN
    # The networks, and the images
    blocks=4,               # B         residual blocks of G; the paper: 16
    width=32,               #           feature maps; the paper: 64
    dataset="mnist",        #           the path of a folder of photographs; or mnist, fashion-mnist, cifar10
    size: int = None,       #           width and height to which images are brought (32; a folder: 128)
    root: str = None,       #           where data sets are kept (data/ beside common.py)
    held_out=50,            #           the last images: not trained with, but measured
    # The run
    steps=3000,             #           updates of G
    seed=0,                 #           of every random number
    device="cuda" if cuda.is_available() else "cpu",    #       any torch device: cpu, cuda, cuda:1, mps, ...
    out: str = None,        #           run folder (runs/SCRIPT-DATASET)
    save_every=200,         #           steps between rows of the log, pictures and checkpoints
):
    """As above.  Returns G, D.  ValueError, OSError: one sentence says what is wrong"""
    size = size or (32 if dataset in DATASETS else 128)
    crop = min(crop, size)
    if crop % 16 or size % 4 or size < 20:
        raise ValueError(f"--crop must be a multiple of 16, --size one of 4, and at least 20, not {crop}, {size}")
    config = dict(locals(), digit=None, keep=False, graph=False)
    torch.manual_seed(seed)
    G, D = Generator(blocks, width).to(device), Discriminator(crop, width).to(device)
    SRResNet = Generator(blocks, width).to(device).eval()
    theta, w = ([p for p in net.parameters() if p.requires_grad] for net in (G, D))
    opt_G, opt_D = (torch.optim.Adam(each, lr, (0.9, 0.999), fused=True) for each in (theta, w))
    phi = features(content, device) if content != "mse" else None
    images = load_images(dataset, None, size, 3, root)
    if not 4 <= held_out < len(images):
        raise ValueError(f"--held-out must be at least 4 and fewer than all {len(images)} images, not {held_out}")
    config["images"] = len(images)
    P_r = batches(images[:-held_out], batch_size, device)
    HR_test = images[-held_out:].to(device) / 127.5 - 1
    LR_test = downscale(HR_test)
    bicubic = interpolate(2 * LR_test - 1, scale_factor=4, mode="bicubic")
    print(f"bicubic: psnr {psnr(bicubic, HR_test).mean():.2f}  ssim {ssim(bicubic, HR_test).mean():.4f}")

    def iteration():
        nonlocal step
        step += 1
        opt_G.param_groups[0]["lr"] = opt_D.param_groups[0]["lr"] = lr if step <= pretrain / 2 else lr / 10
        i, j = torch.randint(size - crop + 1, (2,)).tolist()
        HR = next(P_r)[..., i:i + crop, j:j + crop]         # §3.2  of N images one part
        SR = G(downscale(HR))
        l_X = content_loss(HR, SR, phi)                     # (4), (5)
        l_Gen = l_D = torch.zeros_like(l_X)                 # §3.2  SRResNet: l_X alone
        if step > pretrain:                                 # §3.2  SRGAN, from there on
            l_D = (softplus(-D(HR)) + softplus(D(SR.detach()))).mean()
            opt_D.zero_grad()
            l_D.backward(inputs=w)                          # (2)   max_D log D(I_HR) + log(1 − D(G(I_LR)))
            opt_D.step()
            l_Gen = softplus(-D(SR)).mean()                 # (6)   −log D(G(I_LR)), printed as a sum
        l_SR = l_X + adversarial * l_Gen                    # (3)
        opt_G.zero_grad()
        l_SR.backward(inputs=theta)
        opt_G.step()
        if step == pretrain:
            SRResNet.load_state_dict(G.state_dict())
        return dict(l_X=l_X, l_Gen=l_Gen, l_D=l_D)

    states = dict(G=G, D=D, SRResNet=SRResNet, opt_G=opt_G, opt_D=opt_D)    # all that a checkpoint keeps
    out = folder(__file__, config)
    rows = resume(out, config, states)
    step = rows[-1]["step"] if rows else 0                  # so many iterations are made
    for row in rounds(iteration, config, rows):             # every save_every iterations
        G.eval()                                            # by running statistics: each depends on its LR alone
        with torch.no_grad():
            SR = torch.cat([G(each) for each in LR_test.split(10)])
            before = SRResNet(LR_test[:4]) if step > pretrain else SR[:4]
        G.train()
        row["psnr"], row["ssim"] = psnr(SR, HR_test).mean().item(), ssim(SR, HR_test).mean().item()
        save_images(torch.cat([bicubic[:4], before, SR[:4], HR_test[:4]]), out / f"{step:06d}.png")
        save(out, config, states, rows)
    save_animation(out)
    return G.eval(), D


# ---- The run: as in wgan_gp.py, but for photographs instead of latents -------------------------------------------
load = partial(wgan_gp.load, network=Generator)


def enlarge(out, photographs, device):
    """Writes the images of a folder, four times as wide and high, by the run in out, into out/enlarged"""
    G = load(out / "checkpoint.pt").to(device)
    paths = sorted(path for path in Path(photographs).rglob("*") if is_image_file(path.name))
    if not paths:
        raise ValueError(f"there are no images in {photographs}")
    for path in paths:
        try:
            image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        except Exception as error:                          # damaged files cause many kinds
            print(f"left out {path}: {error}")
            continue
        SR = G(to_tensor(image)[None].to(device))
        save_images(SR, out / "enlarged" / f"{path.relative_to(photographs)}.png")
    print(f"the enlarged images are in {out / 'enlarged'}")


def main(argv=None):
    """The command line of train, and --enlarge.  SystemExit as in wgan_gp.py"""
    getattr(sys.stdout, "reconfigure", dict)(errors="replace")      # not every terminal has a φ
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    comments = dict(re.findall(r"^    (\w+).*?, +# (.*)$", getsource(train), re.M))
    for name, setting in signature(train).parameters.items():
        kind = setting.annotation if setting.default is None else type(setting.default)
        text = f"{comments[name]} ({setting.default})"
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=setting.default, help=text)
    parser.add_argument("--enlarge", metavar="FOLDER", help="its images, four times as large, by the run in OUT")
    config = vars(parser.parse_args(argv))
    photographs = config.pop("enlarge")
    try:
        if photographs is None:
            train(**config)
        else:
            enlarge(folder(__file__, dict(config, digit=None)), photographs, config["device"])
    except (ValueError, OSError) as error:
        parser.exit(2, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "stopped; the same command goes on from the last checkpoint\n")


if __name__ == "__main__":
    main()
