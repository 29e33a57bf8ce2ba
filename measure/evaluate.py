"""Judges runs, or folders of images, of MNIST and Fashion-MNIST; of photographs, by the sliced Wasserstein distance

    python measure/evaluate.py runs/wgan_gp-mnist-7 runs/lsgan-mnist-7
    python measure/evaluate.py --dataset mnist --digit 7 path/to/pngs
    python measure/evaluate.py --dataset path/to/photos runs/progan-photos
    python measure/evaluate.py runs/wgan-mnist-7/001000.pt        (a checkpoint that --keep kept)

A run's data set and class are those it was trained with (with another --dataset: all its classes). All are judged
alike, by 5,000 images (a folder: by all that it has) against the test images, in the 128 features of a small
classifier, which is trained once, in a few minutes, and kept beside the data sets:

    Fréchet     distance of the two Gaussians with the features' means and covariances (Heusel et al. 2017)
    precision   share of generated images that lie among real ones: not farther from one of them than its third
                nearest real one is; of 2,000 images of each
    recall      share of real images that lie among generated ones (both: Kynkäänniemi et al. 2019)
    score       inception score (Salimans et al. 2016), by the classifier: 1 to 10, for clear and various classes
    entropy     of the classes that the classifier sees, in bits; ten equally frequent ones have 3.32
    copies      share of generated images (of 1,000) whose nearest training image is less than half as far as that
                image's own nearest neighbour in the training set, pixel by pixel
    classes     how frequent each class is, in percent

The line "training images" is the floor: what as many training images get, and as copies, what test images get.
Runs that differ only in --seed are one line more, mean ± standard deviation. Figures compare only for one number of
images and one classifier: another machine, or another version of this file, trains another one.
"""
import argparse
import importlib
import inspect
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import functional as TF

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
from swd import side_of, swd  # noqa: E402

GREY = ("mnist", "fashion-mnist")


# ---- The classifier ----------------------------------------------------------------------------------------------

class Classifier(nn.Module):
    """Grey images -> scores of ten classes.  uint8 (n, 1, 28, 28) -> (n, 10)"""
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(                          # (n, 128)
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(3136, 128), nn.ReLU())
        self.scores = nn.Sequential(nn.Dropout(0.5), nn.Linear(128, 10))

    def forward(self, images):
        return self.scores(self.features(images / 255))


def fit(images, labels, epochs=3):
    """A classifier trained on uint8 (n, 1, 28, 28) and their classes (n,); always the same one"""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = Classifier()
        optimizer = torch.optim.Adam(classifier.parameters(), 1e-3)
        for _ in range(epochs):
            for batch in torch.randperm(len(images)).split(128):
                optimizer.zero_grad()
                F.cross_entropy(classifier(images[batch]), labels[batch]).backward()
                optimizer.step()
    return classifier.eval().requires_grad_(False)


def kept(path, images, labels):
    """The classifier in the file path, which is trained and written if it is not there or made in another way"""
    recipe = inspect.getsource(Classifier) + inspect.getsource(fit)
    if path.exists() and (saved := torch.load(path, weights_only=True))["recipe"] == recipe:
        classifier = Classifier()
        classifier.load_state_dict(saved["classifier"])
        return classifier.eval().requires_grad_(False)
    print(f"training the classifier {path}, once ...", flush=True)
    classifier = fit(images, labels)
    torch.save(dict(recipe=recipe, classifier=classifier.state_dict()), f"{path}.{os.getpid()}")
    os.replace(f"{path}.{os.getpid()}", path)
    return classifier


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


def nearest(x, others, without=None):
    """Of every image its nearest among others, and how far that is.  without: (n,), one of the others for each x,
    which does not count.  (n, d), (n', d) float -> (n,) indices, (n,)"""
    distances = torch.cdist(x, others)
    if without is not None:
        distances[torch.arange(len(x)), without] = torch.inf
    far, index = distances.min(1)
    return index, far


def copies(images, training, most=1000):
    """Share of images that are nearer to a training image than half its way to the next.  uint8 (n, ...)"""
    training, images = training.flatten(1).float(), images[:most].flatten(1).float()
    found, copied = [], 0
    for x in images.split(250):
        index, far = nearest(x, training)
        found.append((nearest(training[index], training, index)[1], far))
    copied = sum((far < way / 2).sum().item() for way, far in found)
    return copied / len(images)


def inception_score(p):
    """Improved Techniques (4): exp E_x KL(p(y|x) ‖ p(y)), p(y) the mean over x.  Probabilities (n, K) -> 1 to K"""
    p = p.double().clamp(min=1e-300)
    return (p * (p.log() - p.mean(0).log())).sum(1).mean().exp().item()


def entropy(counts):
    """Of a histogram, in bits"""
    p = counts.double() / counts.sum()
    return abs((p * p.clamp(min=1e-300).log2()).sum().item())     # every term is at most 0


# ---- Judging -----------------------------------------------------------------------------------------------------

class Reference(NamedTuple):
    """What images of a data set are compared with"""
    classifier: Classifier
    training: torch.Tensor      # uint8 (n, 1, 28, 28)
    test: torch.Tensor          # uint8 (n', 1, 28, 28)
    features: torch.Tensor      # (n', 128), of test
    accuracy: float             # of the classifier, on all test images


def reference(dataset, digit=None, root=None):
    """The images of "mnist" or "fashion-mnist", of one class if digit is given, and the classifier of all.
    ValueError for anything else"""
    if dataset not in GREY:
        raise ValueError(f"the classifier is for {' and '.join(GREY)}, not for {dataset}")
    root = Path(root or common.ROOT)
    (training, labels), (test, answers) = (common.load_set(dataset, root, train) for train in (True, False))
    classifier = kept(root / f"classifier-{dataset}.pt", training, labels)
    features = features_of(classifier, test)
    accuracy = (classifier.scores(features).argmax(1) == answers).double().mean().item()
    if digit is not None:
        training, test, features = training[labels == digit], test[answers == digit], features[answers == digit]
    order = shuffled(len(test))                                 # of MNIST's, the first half is the easier one
    return Reference(classifier, training[shuffled(len(training))], test[order], features[order], accuracy)


def shuffled(n):
    """0, ..., n - 1, always in the same disorder"""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def features_of(classifier, images):
    """uint8 (n, 1, 28, 28) -> (n, 128)"""
    return torch.cat([classifier.features(part / 255) for part in images.split(500)])


def judge(images, to, copied=None):
    """The figures of uint8 images (n, C, s, s) against a Reference -> dict of floats, and "classes", (10,).
    copied: the images to count copies among, if they are others"""
    images = as_the_data_set(images)[shuffled(len(images))]     # a folder's may be sorted by class
    features = features_of(to.classifier, images)
    precision, recall = precision_recall(to.features, features)
    scores = to.classifier.scores(features)
    counts = torch.bincount(scores.argmax(1), minlength=10)
    return {"Fréchet": frechet(to.features, features), "precision": precision, "recall": recall,
            "score": inception_score(scores.softmax(1)), "entropy": entropy(counts),
            "copies": copies(images if copied is None else copied, to.training), "classes": counts / counts.sum()}


def as_the_data_set(images):
    """uint8 (n, C, s, s) -> (n, 1, 28, 28): grey, scaled to 32x32, the border that the scripts add taken off"""
    images = TF.rgb_to_grayscale(images) if images.shape[1] == 3 else images
    if images.shape[-1] == 28:
        return images
    return (images if images.shape[-1] == 32 else TF.resize(images, [32, 32], antialias=True))[..., 2:-2, 2:-2]


@torch.no_grad()
def sample(G, nz, n, seed=0):
    """The images that --generate N --seed SEED writes, border and all.  -> uint8 (n, C, s, s)"""
    noise, parts = torch.Generator().manual_seed(seed), []
    z = torch.cat([torch.randn(1, nz, generator=noise) for _ in range(n)])      # one by one, as there
    for x in map(G, z.split(64)):
        parts.append(((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(parts)


def opened(run):
    """The generator and the checkpoint of a run folder or a kept file; (None, None) for a folder of images"""
    path = Path(run, "checkpoint.pt") if Path(run).is_dir() else Path(run)
    if not path.exists():
        return None, None
    saved = torch.load(path, map_location="cpu", weights_only=True)
    name = "progan" if "G_ema" in saved else "related.improved_gan" if "vbn" in saved["config"] else "wgan_gp"
    return importlib.import_module(name).load(path), saved      # all but these two have the generator of wgan_gp


def shown(name, figures):
    classes = " ".join(f"{100 * share:3.0f}" for share in figures["classes"])
    return (f"{name:<36} {figures['Fréchet']:8.2f} {figures['precision']:10.3f} {figures['recall']:7.3f} "
            f"{figures['score']:6.2f} {figures['entropy']:8.2f} {figures['copies']:7.3f}   {classes}")


def spread(values):
    """Mean ± standard deviation"""
    values = torch.tensor(values, dtype=torch.float64)
    return " ± ".join(f"{each:.{digits}g}" if each < 10 ** digits else f"{each:.0f}"
                      for each, digits in ((values.mean(), 3), (values.std(), 2)))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, kept checkpoint, or folder of images")
    parser.add_argument("--dataset", help="what to compare with: mnist, fashion-mnist, or a folder of photographs "
                        "(default: the run's; for folders of images: mnist)")
    parser.add_argument("--digit", type=int, choices=range(10),
                        help="only this class (default: what the run was trained with)")
    parser.add_argument("--images", type=int, default=5000, help="of each run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the latents (default: %(default)s)")
    parser.add_argument("--root", help="where data sets and classifiers are kept (default: data/ of the project)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)                                    # equal figures, whatever the number of cores
    try:
        compare(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{error}\n")


def compare(args):
    """Judges args.runs and prints a line for each"""
    last, to, groups = None, None, {}
    for run in args.runs:
        G, saved = opened(run)
        config = saved["config"] if saved else {}
        dataset = args.dataset or config.get("dataset", "mnist")
        digit = config.get("digit") if args.digit is None and dataset == config.get("dataset") else args.digit
        if saved:
            images = sample(G, config["nz"], args.images, args.seed)
            name = f"{run} ({saved['rows'][-1]['step']:,} steps)"
        else:
            channels, name = 1 if dataset in GREY else 3, run
            images = common.load_images(run, size=side_of(run) or 28, channels=channels, root=args.root)
        if dataset not in common.DATASETS:
            real = common.load_images(dataset, size=images.shape[-1], channels=images.shape[1], root=args.root)
            distances = swd(real, images)
            levels = ", ".join(f"{level}x{level}: {1000 * each:.2f}" for level, each in distances.items())
            print(f"{name}: sliced Wasserstein distance x 1000, {levels}, "
                  f"average: {1000 * sum(distances.values()) / len(distances):.2f}", flush=True)
            continue
        if last != (dataset, digit, len(images)):
            last, to = (dataset, digit, len(images)), reference(dataset, digit, args.root)
            floor = to.training[:len(images)]
            what = dataset if digit is None else f"{dataset}, class {digit}"
            print(f"{what}: {len(images):,} images against {len(to.test):,} test images; "
                  f"the classifier is right on {to.accuracy:.1%}\n"
                  f"{'':<36} {'Fréchet':>8} {'precision':>10} {'recall':>7} {'score':>6} {'entropy':>8} "
                  f"{'copies':>7}   classes 0 to 9 in percent")
            print(shown(f"{len(floor):,} training images", judge(floor, to, copied=to.test)), flush=True)
        figures = judge(images, to)
        print(shown(name, figures), flush=True)
        if saved:
            same = config.keys() - {"seed", "steps", "save_every", "keep", "graph", "device", "root", "out"}
            key = str([(setting, config[setting]) for setting in sorted(same)]), name.removeprefix(run)
            groups.setdefault(key, []).append((run, figures))
    for runs, several in (zip(*group) for group in groups.values() if len(group) > 1):
        figures = ", ".join(f"{key} {spread([each[key] for each in several])}"
                            for key in several[0] if key != "classes")
        print(f"{' '.join(runs)}: {len(runs)} seeds: {figures}")


if __name__ == "__main__":
    main()
