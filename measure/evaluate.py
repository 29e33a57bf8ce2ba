"""How good the images of runs, or in folders, are

    python measure/evaluate.py runs/wgan_gp-mnist-7 runs/lsgan-mnist-7
    python measure/evaluate.py runs/wgan-mnist-7/001000.pt                  (a checkpoint that --keep kept)
    python measure/evaluate.py --dataset mnist --digit 7 path/to/pngs
    python measure/evaluate.py --dataset path/to/photos runs/progan-photos

A run is judged by 5,000 images, a folder by all that it has, against the run's data set and class, or --dataset and
--digit. With MNIST and Fashion-MNIST that is the test images, in the 128 features of a small classifier, which is
trained once, in a minute or two, and kept beside the data sets:

    Fréchet     distance of the two Gaussians with the features' means and covariances (Heusel et al. 2017)
    precision   share of generated images that lie among real ones: not farther from one of them than its third
                nearest real one is; of at most 2,000 images of each
    recall      share of real images that lie among generated ones (both: Kynkäänniemi et al. 2019)
    score       inception score (Salimans et al. 2016), by the classifier: 1 to 10, for clear and varied classes
    entropy     of the classes that the classifier sees, in bits; ten equally frequent ones have 3.32
    copies      share of generated images (of 1,000) that are less than half as far from their nearest training one
                as that is from its own nearest, pixel by pixel
    classes     how frequent each class is, in percent

The line "training images" judges as many training images; its copies are those among test images. Runs that
differ in --seed alone have their mean and standard deviation below. Figures compare for one classifier, one number
of images, and 28x28 or 32x32 pixels. CIFAR-10 and photographs: the sliced Wasserstein distance to the training
images (ProGAN, §5) by levels of a Laplacian pyramid, small at coarse ones for similar shapes, at fine for texture.
"""
import argparse
import importlib
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import functional as TF

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402

GREY = ("mnist", "fashion-mnist")


def classifier_of(images, labels, path, epochs=3):
    """[0]: grey pixels from 0 to 1, (n, 1, 28, 28) -> features, (n, 128); [1]: these -> scores of ten classes.
    It is read from path; if nothing is there, it learns from uint8 images, (n, 1, 28, 28), and labels, (n,)"""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)                                    # always the same one
        features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(3136, 128), nn.ReLU())
        classifier = nn.Sequential(features, nn.Sequential(nn.Dropout(0.5), nn.Linear(128, 10)))
        if path.exists():
            classifier.load_state_dict(torch.load(path, weights_only=True))
        else:
            print(f"training the classifier {path}, once ...", flush=True)
            optimizer = torch.optim.Adam(classifier.parameters(), 1e-3)
            for _ in range(epochs):
                for batch in torch.randperm(len(images)).split(128):
                    optimizer.zero_grad()
                    F.cross_entropy(classifier(images[batch] / 255), labels[batch]).backward()
                    optimizer.step()
            torch.save(classifier.state_dict(), path)
    return classifier.eval().requires_grad_(False)


# ---- The figures -------------------------------------------------------------------------------------------------
def frechet(a, b):
    """Fréchet distance of two sets of features: |μ_a − μ_b|² + tr(C_a + C_b − 2 (C_a C_b)^½).  (n, d), (n', d)"""
    (mean_a, cov_a), (mean_b, cov_b) = ((x.double().mean(0), torch.cov(x.double().T)) for x in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T     # C_a C_b has the eigenvalues of root C_b root
    both = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * both).item()


def precision_recall(real, fake, k=3, most=2000):
    """Shares of fake among real and of real among fake features, of the same number of each.  (n, d), (n', d)"""
    n = min(len(real), len(fake), most)
    real, fake = real[:n].double(), fake[:n].double()
    reach_of_real, reach_of_fake = (torch.cdist(x, x).kthvalue(min(k + 1, n), dim=1)[0] for x in (real, fake))
    distances = torch.cdist(real, fake)
    return ((distances <= reach_of_real[:, None]).any(0).double().mean().item(),
            (distances <= reach_of_fake).any(1).double().mean().item())


def copies(images, training, most=1000):
    """Share of images that are nearer to a training image than half its way to the next.  uint8 (n, ...)"""
    training, images, copied = training.flatten(1).float(), images[:most].flatten(1).float(), 0
    for x in images.split(250):
        far, nearest = torch.cdist(x, training).min(1)
        others = torch.cdist(training[nearest], training)
        others[torch.arange(len(x)), nearest] = torch.inf
        copied += (far < others.min(1)[0] / 2).sum().item()
    return copied / len(images)


def inception_score(p):
    """Improved Techniques (4): exp E_x KL(p(y|x) ‖ p(y)), p(y) the mean over x.  Probabilities (n, K) -> 1 to K"""
    p = p.double().clamp(min=1e-300)
    return (p * (p.log() - p.mean(0).log())).sum(1).mean().exp().item()


def entropy(counts):
    """Of a histogram, in bits"""
    return torch.special.entr(counts.double() / counts.sum()).sum().item() / math.log(2)


# ---- The sliced Wasserstein distance (ProGAN, §5) ----------------------------------------------------------------
def blurred(x):
    """Smoothed by the 5x5 binomial filter (Burt & Adelson 1983), reflected at the borders.  (n, C, H, W)"""
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]).to(x) / 16
    kernel = torch.outer(taps, taps).expand(x.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, groups=x.shape[1])


def laplacian(x, least=16):
    """What each halving down to least pixels loses, and what is left: the levels, finest first.
    (n, C, s, s) -> [(n, C, s, s), (n, C, s/2, s/2), ...]"""
    levels = []
    while x.shape[-1] % 2 == 0 and x.shape[-1] >= 2 * least:
        smaller = blurred(x)[:, :, ::2, ::2]
        spread = torch.zeros_like(x)
        spread[:, :, ::2, ::2] = 4 * smaller                    # blurred again, this is the smaller one enlarged
        levels.append(x - blurred(spread))
        x = smaller
    return [*levels, x]


def patches(images, k, each, random):
    """Patches of 7x7 pixels of level k of the pyramid, as many of each image, at random places; every colour with
    mean 0 and standard deviation 1 over all of them.  uint8 (n, C, s, s) -> (n each, 49 C)"""
    found = []
    for part in images.split(256):
        windows = laplacian(part.float())[k].unfold(2, 7, 1).unfold(3, 7, 1)    # (n, C, s - 6, s - 6, 7, 7), a view
        rows, columns = torch.randint(windows.shape[2], (2, len(part), each), generator=random)
        found.append(windows[torch.arange(len(part))[:, None], :, rows, columns].flatten(0, 1))
    x = torch.cat(found)
    std, mean = torch.std_mean(x, (0, 2, 3), correction=0, keepdim=True)
    return ((x - mean) / std.clamp(min=1e-8)).flatten(1)        # a collapsed G may have the deviation 0


def sliced_wasserstein(a, b, directions):
    """The mean over the directions of the Wasserstein-1 distance of a and b projected on them, which is the mean
    difference of the sorted projections.  (N, d), (N, d), (p, d) of length 1 -> float"""
    means = [((a @ part.T).sort(0)[0] - (b @ part.T).sort(0)[0]).abs().mean(0) for part in directions.split(32)]
    return torch.cat(means).mean().item()


def swd(real, fake, per_image=128, projections=512):
    """§5.  uint8 images, (n, C, s, s) and (n', C, s, s) -> {s: distance, s/2: ..., ..., 16: ...}, not times 1000.
    Of both sets as many images are taken, at most 16,384 as in the paper"""
    random, n, distances = torch.Generator().manual_seed(0), min(16384, len(real), len(fake)), {}
    real, fake = (x[torch.randperm(len(x), generator=random)[:n]] for x in (real, fake))
    for k, level in enumerate(laplacian(real[:1].float())):     # one level at a time: it takes gigabytes
        a, b = (patches(x, k, per_image, random) for x in (real, fake))
        directions = F.normalize(torch.randn(projections, a.shape[1], generator=random), dim=1)
        distances[level.shape[-1]] = sliced_wasserstein(a, b, directions)
    return distances


# ---- Judging -----------------------------------------------------------------------------------------------------
def reference(dataset, digit=None, root=None):
    """What images are compared with: those of "mnist" or "fashion-mnist", of one class if digit is given, the
    features of the test images, and the classifier of all classes"""
    root = Path(root or common.ROOT)
    (training, labels), (test, answers) = (common.load_set(dataset, root, train) for train in (True, False))
    classifier = classifier_of(training, labels, root / f"judge-{dataset}.pt")
    features = features_of(classifier, test)
    if digit is not None:
        training, test, features = training[labels == digit], test[answers == digit], features[answers == digit]
    order = shuffled(len(test))                                 # of MNIST's, the first half is the easier one
    return SimpleNamespace(classifier=classifier, training=training[shuffled(len(training))], test=test[order],
                           features=features[order])


def shuffled(n):
    """0, ..., n - 1, always in the same disorder"""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def features_of(classifier, images):
    """uint8 (n, 1, 28, 28) -> (n, 128)"""
    return torch.cat([classifier[0](part / 255) for part in images.split(500)])


def judge(images, to, copied=None):
    """The figures of uint8 images (n, C, s, s) against a reference -> dict of floats, and last "classes", (10,).
    copied: the images to count copies among, if they are others"""
    images = as_the_data_set(images)[shuffled(len(images))]     # a folder's may be sorted by class
    features = features_of(to.classifier, images)
    precision, recall = precision_recall(to.features, features)
    scores = to.classifier[1](features)
    counts = torch.bincount(scores.argmax(1), minlength=10)
    return {"Fréchet": frechet(to.features, features), "precision": precision, "recall": recall,
            "score": inception_score(scores.softmax(1)), "entropy": entropy(counts),
            "copies": copies(images if copied is None else copied, to.training), "classes": counts / counts.sum()}


def as_the_data_set(images):
    """uint8 (n, C, s, s) -> (n, 1, 28, 28): grey, scaled to 32x32, the border that the scripts add taken off"""
    images = TF.rgb_to_grayscale(images) if images.shape[1] == 3 else images
    return images if images.shape[-1] == 28 else TF.resize(images, [32, 32], antialias=True)[..., 2:-2, 2:-2]


@torch.no_grad()
def sample(G, nz, n, seed=0):
    """The images that --generate N --seed SEED writes, border and all.  -> uint8 (n, C, s, s)"""
    noise = torch.Generator().manual_seed(seed)
    z = torch.cat([torch.randn(1, nz, generator=noise) for _ in range(n)])      # one by one, as there
    return torch.cat([((G(part).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8) for part in z.split(64)])


def opened(run):
    """The generator and the checkpoint of a run folder or a kept file; (None, None) for a folder of images"""
    path = Path(run, "checkpoint.pt") if Path(run).is_dir() else Path(run)
    if not path.exists():
        return None, None
    saved = torch.load(path, map_location="cpu", weights_only=True)
    name = "progan" if "G_ema" in saved else "related.improved_gan" if "vbn" in saved["config"] else "wgan_gp"
    return importlib.import_module(name).load(path), saved      # sngan, ...: that of wgan_gp


def line(name, figures):
    *others, classes = figures.values()
    others = [f"{each:9.3f}" for each in others]
    print(f"{name:<44}", *others, " ", *(f"{100 * each:3.0f}" for each in classes), flush=True)


def compare(args):
    """Judges args.runs and prints a line for each"""
    last, to, groups = None, None, {}
    for run in args.runs:
        G, saved = opened(run)
        config = saved["config"] if saved else {}
        dataset = args.dataset or config.get("dataset", "mnist")
        digit = config.get("digit") if args.digit is None and dataset == config.get("dataset") else args.digit
        if saved:
            images, last_row = sample(G, config["nz"], args.images), saved["rows"][-1]
            name = f"{run}: {last_row['step']} steps, {last_row['seconds'] / 60:.1f} min"
        else:
            size, channels, name = (28, 1, run) if dataset in GREY else (args.size, 3, run)
            images = common.load_images(run, size=size, channels=channels, root=args.root)
        if dataset not in GREY:
            levels = swd(common.load_images(dataset, digit, images.shape[-1], images.shape[1], args.root), images)
            print(f"{name}: sliced Wasserstein distance x 1000:",
                  *(f"{level}x{level} {1000 * each:.2f}," for level, each in levels.items()),
                  f"average {1000 * sum(levels.values()) / len(levels):.2f}", flush=True)
            continue
        if last != (dataset, digit, len(images)):
            last, to = (dataset, digit, len(images)), reference(dataset, digit, args.root)
            floor = judge(to.training[:len(images)], to, copied=to.test)
            what = dataset if digit is None else f"{dataset}, class {digit}"
            print(f"{what}: {len(images):,} images against {len(to.test):,} test images")
            print(" " * 44, *(f"{key:>9}" for key in floor))
            line("training images", floor)
        figures = judge(images, to)
        line(name, figures)
        if saved:
            same = config.keys() - {"seed", "steps", "save_every", "keep", "graph", "device", "root", "out"}
            key = last_row["step"], str([(setting, config[setting]) for setting in sorted(same)])
            groups.setdefault(key, {})[config["seed"]] = run, figures
    for runs, several in (zip(*group.values()) for group in groups.values() if len(group) > 1):
        columns = {key: torch.stack([torch.as_tensor(each[key]) for each in several]) for key in several[0]}
        line(f"{runs[0]}, ..., {len(runs)} seeds: mean", {key: column.mean(0) for key, column in columns.items()})
        line("    standard deviation", {key: column.std(0) for key, column in columns.items()})


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, kept checkpoint, or folder of images")
    parser.add_argument("--dataset", help="mnist, fashion-mnist, cifar10, or a folder (the run's; else: mnist)")
    parser.add_argument("--digit", type=int, choices=range(10), help="only this class (the run's)")
    parser.add_argument("--images", type=int, default=5000, help="of each run (%(default)s)")
    parser.add_argument("--size", type=int, default=64, help="of folders, if not of MNIST (%(default)s)")
    parser.add_argument("--root", help="where data sets and classifiers are kept (data/ of the project)")
    torch.set_num_threads(1)                                    # equal figures, whatever the number of cores
    compare(parser.parse_args(argv))


if __name__ == "__main__":
    main()
