"""SRGAN, "Photo-Realistic Single Image Super-Resolution Using a GAN", https://arxiv.org/abs/1609.04802 (2017)
Ledig, Theis, Huszár, Caballero, Cunningham, Acosta, Aitken, Tejani, Totz, Wang, Shi

G makes a picture four times as wide and high. Trained for the pixels' squared error alone (SRResNet), it paints the
mean of all that may have been there: smooth. Then D, which tells its pictures from photographs, has a say, too.

    l_SR = l_X + 10⁻³ l_Gen     (3)             l_MSE = mean (I_HR - G(I_LR))²                      (4)
    l_Gen = -log D(G(I_LR))     (6)             l_VGG = mean ((φ(I_HR) - φ(G(I_LR))) / 12.75)²      (5)

Differs from the paper:
- l_X is l_MSE (their SRGAN-MSE); --content vgg54 (their SRGAN) or vgg22 downloads VGG-19's weights.
- For two CPU cores: 4 blocks of 32 feature maps, 8 crops of 48x48 pixels, 3,000 steps; theirs: 16 of 64, 16 crops
  of 96x96, 1,200,000. So SRResNet's first half has lr 1e-3; theirs: 1e-4, and 1e-5 for SRGAN's second half.
Measured: --held-out 100 of 5,544 flowers, 2 EPYC cores, 9 min: bicubic 24.6 dB, SRResNet 25.1, SRGAN 24.4."""
import re
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from inspect import getsource, signature
from pathlib import Path
from time import perf_counter

import torch
import torchvision
from torch import cuda, nn
from torch.nn.functional import conv2d, interpolate, mse_loss, softplus
from torchvision.transforms.functional import normalize
from common import (DATASETS, batches, checked, claim, compare, each_image, find_device, fitting, in_one_sentence,
                    load_images, name_of, replacing, run_folder, same_shapes, save_animation, save_curve,
                    save_images, stop_signals)

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
@checked
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
    root: str = None,       #           where data sets are kept (data/ beside common.py)
    size: int = None,       #           width and height to which images are brought (32; a folder: 128)
    held_out=50,            #           the last images: not trained with, but measured
    # The run
    steps=3000,             #           updates of G
    seed=0,                 #           of every random number
    device="auto",          #           cuda if there is one, else cpu; or any torch device: cuda:1, mps, ...
    out: str = None,        #           run folder (runs/SCRIPT-DATASET)
    save_every=200,         #           steps between rows of the log, pictures and checkpoints
):
    """As above.  Returns G, D.  ValueError or OSError: one sentence.  KeyboardInterrupt: Ctrl-C, all is saved"""
    device, dataset = find_device(device), str(dataset)
    size = size or (32 if dataset in DATASETS else 128)
    crop = min(crop, size)
    if crop % 16 or size % 4 or size < 20:
        raise ValueError(f"--crop must be a multiple of 16, --size one of 4, and at least 20, not {crop}, {size}")
    config = Namespace(**locals())
    torch.manual_seed(seed)
    G, D = Generator(blocks, width).to(device), Discriminator(crop, width).to(device)
    SRResNet = Generator(blocks, width).to(device).eval()
    opt_G, opt_D = (torch.optim.Adam(each.parameters(), lr, (0.9, 0.999), fused=True) for each in (G, D))
    phi = features(content, device) if content != "mse" else None
    images = load_images(dataset, None, size, root, channels=3)
    if not 4 <= held_out < len(images):
        raise ValueError(f"--held-out must be at least 4 and fewer than all {len(images)} images, not {held_out}")
    config.images = len(images)
    P_r = batches(images[:-held_out], batch_size, device)
    HR_test = images[-held_out:].to(device) / 127.5 - 1
    LR_test = downscale(HR_test)
    bicubic = interpolate(2 * LR_test - 1, scale_factor=4, mode="bicubic")

    def shown():
        SR = torch.cat([G(each) for each in LR_test.split(10)])
        before = SRResNet(LR_test[:4]) if run.step > pretrain else SR[:4]
        figures = dict(psnr=psnr(SR, HR_test).mean().item(), ssim=ssim(SR, HR_test).mean().item())
        return torch.cat([bicubic[:4], before, SR[:4], HR_test[:4]]), figures
    run = Run(config, shown, G=G, D=D, SRResNet=SRResNet, opt_G=opt_G, opt_D=opt_D)
    print(f"bicubic: psnr {psnr(bicubic, HR_test).mean():.2f}  ssim {ssim(bicubic, HR_test).mean():.4f}")

    for step in run:
        opt_G.param_groups[0]["lr"] = opt_D.param_groups[0]["lr"] = lr if step <= pretrain / 2 else lr / 10
        i, j = torch.randint(size - crop + 1, (2,)).tolist()
        HR = next(P_r)[..., i:i + crop, j:j + crop]         # §3.2  of N images one part
        SR = G(downscale(HR))
        l_X = content_loss(HR, SR, phi)                     # (4), (5)
        l_Gen = l_D = torch.zeros_like(l_X)                 # §3.2  SRResNet: l_X alone
        if step > pretrain:                                 # §3.2  SRGAN, from there on
            l_D = (softplus(-D(HR)) + softplus(D(SR.detach()))).mean()
            opt_D.zero_grad()
            l_D.backward(inputs=list(D.parameters()))       # (2)   max_D log D(I_HR) + log(1 − D(G(I_LR)))
            opt_D.step()
            l_Gen = softplus(-D(SR)).mean()                 # (6)   −log D(G(I_LR)), printed as a sum
        l_SR = l_X + adversarial * l_Gen                    # (3)
        opt_G.zero_grad()
        l_SR.backward(inputs=list(G.parameters()))
        opt_G.step()
        if step == pretrain:
            SRResNet.load_state_dict(G.state_dict())
        run.log(l_X=l_X, l_Gen=l_Gen, l_D=l_D)
    return G.eval(), D


# ---- The run: as in every script, but for pictures, and never recorded; nothing below is in the paper ------------
SCRIPT = Path(globals().get("__file__", "notebook")).stem
MAY_CHANGE = {"steps", "save_every", "device", "root", "out"}     # when a run goes on


class Run:
    """for step in run: the steps still to be made; the very first is 1.  parts: all that has a state_dict"""
    def __init__(self, config, shown, **parts):
        self.config, self.shown, self.parts = config, shown, parts
        self.settings = {key: it for key, it in vars(config).items() if key not in MAY_CHANGE}
        self.settings["dataset"] = name_of(config.dataset)
        self.out = run_folder(SCRIPT, config)
        self.lock = claim(self.out)
        self.step, self.time, self.rows, self.sums = 0, 0.0, [], {}
        self.random = [torch, cuda] if config.device.type == "cuda" else [torch]
        if Path(self.out, "checkpoint.pt").exists():
            saved = read(self.out)
            with fitting(self.out, SCRIPT):
                compare(saved, self.settings, self.out)
                for name, part in parts.items():
                    if name.startswith("opt"):              # lr, fused, capturable are those of this run
                        saved[name]["param_groups"] = part.state_dict()["param_groups"]
                    part.load_state_dict(saved[name])
                same_shapes(parts["opt_G"], parts["opt_D"])
                self.step, self.time, self.rows, states = saved["run"]
                for each, state in zip(self.random, states):
                    each.set_rng_state(state)
        print(f"device: {config.device}\nrun folder: {self.out}\n{self.step} of {config.steps} steps are done")

    def __iter__(self):
        config = self.config
        self.since, self.begin = self.step, perf_counter() - self.time
        with stop_signals() as stop:
            for self.step in range(self.step + 1, config.steps + 1):
                yield self.step
                if stop or self.step == config.steps or self.step % config.save_every == 0:
                    self.save()
                    if stop:
                        break
        save_animation(self.out)
        if stop:
            raise KeyboardInterrupt

    def log(self, **losses):
        """Adds up a step's losses, scalar tensors; a row of the log has their means"""
        for name, loss in losses.items():
            self.sums.setdefault(name, torch.zeros_like(loss)).add_(loss.detach())

    @torch.no_grad()
    def save(self):
        """A row, the pictures, when these are there, the checkpoint, and then a line: its reader may have gone"""
        count, self.since = self.step - self.since, self.step
        G = self.parts["G"].eval()                          # by running statistics an image depends on its LR alone
        images, figures = self.shown()
        G.train()
        means = {name: total.item() / count for name, total in self.sums.items()} | figures
        for total in self.sums.values():
            total.zero_()
        self.time = perf_counter() - self.begin
        self.rows.append(dict(step=self.step, seconds=self.time, **means))
        save_curve(self.rows, self.out)                     # ValueError if a loss is not finite
        save_images(images, self.out / f"{self.step:06d}.png")
        saved = {name: part.state_dict() for name, part in self.parts.items()}
        states = [each.get_rng_state() for each in self.random]
        saved |= dict(settings=self.settings, run=(self.step, self.time, self.rows, states))
        with replacing(self.out / "checkpoint.pt") as file:
            torch.save({SCRIPT: saved}, file)
        left = self.time * (self.config.steps / self.step - 1) / 60
        losses = "  ".join(f"{name} {mean:.4g}" for name, mean in means.items())
        speed = f"{self.step / self.time:.1f} steps/s  {left:.0f} min left"
        print(f"step {self.step}/{self.config.steps}  {losses}  {speed}", flush=True)


def read(path):
    """The checkpoint in a run folder.  ValueError if there is no good one"""
    with fitting(path, SCRIPT):
        return torch.load(Path(path, "checkpoint.pt"), map_location="cpu", weights_only=True)[SCRIPT]


def load(path):
    """The generator of what read() finds, on the CPU: (n, 3, H, W) in [0, 1] -> (n, 3, 4 H, 4 W) in [-1, 1]"""
    saved = read(path)
    with fitting(path, SCRIPT):
        G = Generator(*(saved["settings"][name] for name in ("blocks", "width")))
        G.load_state_dict(saved["G"])
    return G.eval().requires_grad_(False)


@torch.no_grad()
def enlarge(path, folder, device="auto"):
    """Writes the images of a folder, four times as wide and high, by what read() finds, and returns their folder"""
    device, target = find_device(device), Path(path, "enlarged")
    G = load(path).to(device)
    for name, image in each_image(folder):
        save_images(G(image[None].to(device) / 255), target / f"{name}.png")
    print(f"the enlarged images are in {target}")
    return target


@in_one_sentence(SCRIPT)
def main(argv=None):
    """The command line.  SystemExit: 2 after a user's mistake, with one sentence; 130 after Ctrl-C"""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{SCRIPT}.py: {message}\n")
    comments = dict(re.findall(r"^    (\w+).*?,  +# (.*)$", getsource(train), re.M))
    for name, setting in signature(train).parameters.items():
        kind = setting.annotation if setting.default is None else type(setting.default)
        how = dict(action="store_true") if kind is bool else dict(type=kind)
        how |= dict(default=setting.default, help=f"{comments[name]} ({setting.default})")
        parser.add_argument("--" + name.replace("_", "-"), **how)
    parser.add_argument("--enlarge", metavar="FOLDER", help="its images, four times as large, by the run in OUT")
    args = parser.parse_args(argv)
    folder = vars(args).pop("enlarge")
    if folder is None:
        train(**vars(args))
    else:
        enlarge(run_folder(SCRIPT, args), folder, args.device)


if __name__ == "__main__":
    main()
