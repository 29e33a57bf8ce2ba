"""Whether related/text2image.py draws what it is told

    python measure/texts.py runs/text2image-mnist
    python measure/texts.py runs/text2image-mnist --strip docs/text2image-strip.png

    class       share of generated images that measure/evaluate.py's classifier takes for the named digit
    thickness   share of them whose strokes are as thick as the text says (not said: neither thin nor thick)
    slant       share of them that lean as the text says (not said: upright)
    all         share of them that are right in all three
    spread      standard deviation of a pixel within one text, as a share of the same in real images of one meaning

by texts of 90 meanings (ten digits, three thicknesses, three slants), in phrasings that were trained with and in
four that were not; of the ten combinations that no training image has, apart. "training images": what the same
judges say of real images and their own captions. The strip shows G between texts, each row at one z.
"""
import argparse
import sys
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
from evaluate import as_the_data_set, reference  # noqa: E402
from related import text2image as script  # noqa: E402

HELD_OUT = ["a hand-drawn {}", "please draw the figure {}", "here you can see a {}", "one more image: {}"]
MEANINGS = [(digit, stroke, slant) for digit in range(10) for stroke in range(3) for slant in range(3)]
UNSEEN = [each for each in MEANINGS if each[1:] == (each[0] % 2 * 2, each[0] // 2 % 2 * 2)]
STRIP = ["a thin one leaning right", "a thick zero", "a five leaning right", "a thin three", "a thick eight",
         "a four"]


def text(phrase, digit, stroke, slant):
    return phrase.format(script.STROKES[stroke] + script.NAMES[digit] + script.SLANTS[slant])


@torch.no_grad()
def drawn(G, phi, texts, n, noise):
    """uint8 (len(texts) n, 1, 32, 32), n images of every text"""
    h = phi(script.encode(texts)).repeat_interleave(n, 0)
    x = torch.cat([G(torch.randn(len(part), 100, generator=noise), part) for part in h.split(500)])
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def judged(classifier, images, meanings):
    """How many are right, (4,): in class, thickness, slant, and all"""
    classes = torch.cat([classifier(part).argmax(1) for part in as_the_data_set(images).split(500)])
    right = torch.cat([classes[:, None], script.looks(images)], 1) == torch.tensor(meanings)
    return torch.cat([right, right.all(1, keepdim=True)], 1).double().mean(0)


def deviation(images):
    return images.float().var(0).mean().sqrt()


def strip(G, phi, steps=5, rows=4):
    """From text to text in so many steps, at the same z in each row"""
    h = phi(script.encode(STRIP))
    share = torch.arange(steps)[:, None] / steps
    h = torch.cat([*((1 - share) * a + share * b for a, b in zip(h, h[1:])), h[-1:]])
    z = torch.randn(rows, 100, generator=torch.Generator().manual_seed(0)).repeat_interleave(len(h), 0)
    return make_grid(G(z, h.repeat(rows, 1)).clamp(-1, 1) / 2 + 0.5, nrow=len(h), padding=0)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--n", type=int, default=10, help="images of every text (10)")
    parser.add_argument("--strip", help="write a picture of G between texts")
    args = parser.parse_args(argv)
    G, phi = script.load(Path(args.run, "checkpoint.pt"))
    if args.strip:
        to_pil_image(strip(G, phi)).save(args.strip)
    to, noise = reference("mnist"), torch.Generator().manual_seed(0)
    seen = [each for each in MEANINGS if each not in UNSEEN]
    images, labels = common.load_images()[:10000], common.load_set("mnist")[1][:10000]
    meanings = torch.cat([labels[:, None], script.looks(images)], 1)
    shares = judged(to.classifier, images, meanings.tolist())
    print(f"{'':<48} class thickness slant  all  spread")
    print(f"{'training images':<48}" + "".join(f"  {share:.3f}" for share in shares))
    real = {each: deviation(images[(meanings == torch.tensor(each)).all(1)]) for each in seen}
    jobs = [("phrasings trained with", script.PHRASES, seen), ("phrasings not trained with", HELD_OUT, seen),
            *((f"    {phrase}", [phrase], seen) for phrase in HELD_OUT),
            ("combinations not trained with", script.PHRASES, UNSEEN)]
    for name, phrases, of in jobs:
        shares, spreads = [], []
        for phrase in phrases:
            images = drawn(G, phi, [text(phrase, *each) for each in of], args.n, noise)
            shares.append(judged(to.classifier, images, [each for each in of for _ in range(args.n)]))
            parts = zip(images.split(args.n), of)
            spreads += [deviation(part) / real[each] for part, each in parts if each in real]
        spread = f"  {torch.stack(spreads).mean():.2f}" if spreads else ""
        print(f"{name:<48}" + "".join(f"  {share:.3f}" for share in torch.stack(shares).mean(0)) + spread)


if __name__ == "__main__":
    main()
