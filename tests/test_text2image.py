"""related/text2image.py against its paper: texts, φ's loss and Algorithm 1's, an iteration of it by hand, and runs
that stop before, between and after the two phases"""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from related import text2image
from related.text2image import Discriminator, Generator, TextEncoder, caption, encode, joint_embedding, looks
from truth import Adam, assert_same, flat, logged, parameter, training


def stroke(width, lean, side=32):
    """A straight stroke of so many pixels, that goes so many to the right for each upwards.  (1, 1, side, side)"""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    away = (column - side / 2 - lean * (side / 2 - row)).abs()
    return ((away < width / 2) & (row > 5) & (row < side - 6)).to(torch.uint8)[None, None] * 255


MEDIUM = torch.maximum(stroke(2, 0.1), stroke(3, 0.1) // 2)


@pytest.fixture(scope="module")
def mnist():
    return text2image.load_images()[:3000], text2image.load_labels()[:3000]


@pytest.fixture(autouse=True)
def few(monkeypatch, mnist):
    monkeypatch.setattr(text2image, "load_images", lambda: mnist[0])
    monkeypatch.setattr(text2image, "load_labels", lambda: mnist[1])


# ---- Texts ----

def test_thick_and_thin_strokes_that_lean():
    for place, lean in enumerate((-0.3, 0.1, 0.5)):
        thin, thick = looks(torch.cat([stroke(2, lean), stroke(8, lean)])).tolist()
        assert thin == [0, place] and thick == [2, place]
    assert looks(torch.cat([MEDIUM, MEDIUM.flip(3)])).tolist() == [[1, 1], [1, 0]]
    moved = stroke(8, 0.5).roll((3, -4), (2, 3))
    assert torch.equal(looks(moved), looks(stroke(8, 0.5))) and torch.equal(looks(moved // 2), looks(moved))


def test_a_third_of_mnist_each_has_a_look(mnist):
    x, _ = mnist
    for counts in (looks(x)[:, k].bincount(minlength=3) for k in (0, 1)):
        assert 0.2 < counts.min() / len(x) and counts.max() / len(x) < 0.5


def test_captions_say_class_and_look_in_every_phrasing(monkeypatch):
    x = torch.cat([stroke(2, -0.3), MEDIUM, stroke(8, -0.3)])
    rng = torch.Generator().manual_seed(0)
    seen = [set(texts) for texts in zip(*(caption(torch.tensor([7, 0, 3]), x, rng) for _ in range(100)))]
    for texts, what in zip(seen, ("thin seven leaning left", "zero", "thick three leaning left")):
        assert texts == {phrase.format(what) for phrase in text2image.PHRASES}
    digits, many = torch.arange(10), MEDIUM.repeat(10, 1, 1, 1)
    torch.manual_seed(1)
    first = caption(digits, many)                           # without rng by torch's own numbers
    torch.manual_seed(1)
    assert caption(digits, many) == first
    assert caption(digits, many, rng.manual_seed(2)) == caption(digits, many, rng.manual_seed(2)) != first


def test_letters_are_numbers():
    codes = encode(["A Seven", "é" * 100, ""])
    assert codes.shape == (3, 64) and codes.dtype == torch.int64
    assert bytes(codes[0].tolist()).decode() == "a seven".ljust(64)
    assert bytes(codes[1].tolist()).decode() == "?" * 64 and bytes(codes[2].tolist()).decode() == " " * 64


# ---- φ ----

def test_joint_embedding_in_closed_form():
    y = torch.arange(3)
    assert joint_embedding(2 ** 0.5 * torch.eye(3), 2 ** 0.5 * torch.eye(3), y).item() == pytest.approx(0, abs=1e-6)
    zeros = torch.zeros(3, 5)
    assert joint_embedding(zeros, zeros, y).item() == pytest.approx(2 * 2 / 3)        # (N - 1) / N each way
    assert joint_embedding(zeros, zeros, torch.tensor([0, 0, 1])).item() == pytest.approx(2 * 4 / 9)
    v, t = torch.randn(4, 5), torch.randn(4, 5)
    y = torch.tensor([0, 1, 2, 1])
    s, by_hand = (v @ t.T).tolist(), 0
    for i in range(4):
        for j in range(4):
            if y[i] != y[j]:
                by_hand += max(0, 1 + s[i][j] - s[i][i]) + max(0, 1 + s[j][i] - s[i][i])
    assert joint_embedding(v, t, y).item() == pytest.approx(by_hand / 16, rel=1e-5)
    torch.testing.assert_close(joint_embedding(t, v, y), joint_embedding(v, t, y))      # symmetric


def test_the_networks():
    phi, G, D = TextEncoder(), Generator(width=4), Discriminator(width=4)
    h = phi(encode(["a seven", "an eight", "a thin one"]))
    x = G(torch.randn(3, 100), h)
    assert h.shape == (3, 64) and x.shape == (3, 1, 32, 32) and x.abs().max() <= 1
    assert D(x, h).shape == (3,) and isinstance(D.both[-2], nn.Conv2d)      # logits
    assert [layer.out_channels for layer in G if isinstance(layer, nn.ConvTranspose2d)] == [16, 8, 4, 1]
    assert [layer.out_channels for layer in D.image if isinstance(layer, nn.Conv2d)] == [4, 8, 16]
    for network in G, D.eval():
        assert any(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())
    scores = D(x, h)
    assert not torch.allclose(scores, D(x, h.flip(0))) and not torch.allclose(scores, D(x.flip(0), h))
    both = torch.cat([D.image(x), D.text(h)[:, :, None, None].repeat(1, 1, 4, 4)], 1)   # the text at every place
    torch.testing.assert_close(scores, D.both(both))


# ---- Algorithm 1 ----

class TinyG(nn.Module):
    """G(z, h) = <a, z> + <b, h>, one pixel"""
    def __init__(self, *_, **__):
        super().__init__()
        self.a, self.b = parameter(np.linspace(-0.1, 0.1, 100)), parameter(np.linspace(-0.5, 0.5, 64))

    def forward(self, z, h):
        return (z @ self.a + h @ self.b).view(-1, 1, 1, 1)


class TinyD(nn.Module):
    """D(x, h) = s x + x <c, h> + d, x the mean pixel; image is a stand-in for v's convolutions"""
    def __init__(self, *_, **__):
        super().__init__()
        self.s, self.d, self.c = parameter(0.3), parameter(-0.2), parameter(np.linspace(1.0, -0.8, 64))
        self.image = nn.Sequential(nn.Flatten(), nn.Linear(1024, 1024))

    def forward(self, x, h):
        x = x.flatten(1).mean(1)
        return self.s * x + x * (h @ self.c) + self.d


@pytest.mark.parametrize("changed", [{}, dict(lr=0.01, batch_size=5)])
def test_two_iterations_equal_numpy(monkeypatch, changed):
    texts, latents, parts, rows = [], [], {}, []
    say, draw = text2image.caption, torch.randn

    def recorded(label, image):
        texts.append((label, image, say(label, image)))
        return texts[-1][2]

    def drawn(*shape, **settings):
        latents.append(draw(*shape, **settings))
        return latents[-1]

    def log(run, **losses):
        parts.update(run.parts)
        rows.append([each.item() for each in losses.values()])
    monkeypatch.setattr(text2image, "caption", recorded)
    monkeypatch.setattr(text2image, "Generator", TinyG)
    monkeypatch.setattr(text2image, "Discriminator", TinyD)
    monkeypatch.setattr(text2image.Run, "save", lambda run: None)           # no pictures of one pixel
    monkeypatch.setattr(text2image.Run, "log", log)
    monkeypatch.setattr(torch, "randn", drawn)
    text2image.train(pretrain=1, steps=3, device="cpu", out="run", **changed)
    k = dict(lr=2e-4, batch_size=64) | changed
    m, phi, G, D = k["batch_size"], parts["phi"], parts["G"], parts["D"]
    theta = np.concatenate([np.linspace(-0.1, 0.1, 100), np.linspace(-0.5, 0.5, 64)])       # a, b
    w = np.concatenate([[0.3, -0.2], np.linspace(1.0, -0.8, 64)])                           # s, d, c
    opt_G, opt_D = (Adam(k["lr"], 0.5, 0.999) for _ in range(2))

    def says(x, h):                                         # σ(D(x, h))
        return 1 / (1 + np.exp(-(w[0] * x + x * (h @ w[2:]) + w[1])))
    for step, z in ((1, latents[-2]), (2, latents[-1])):
        (y, x, t), (y_hat, _, t_hat) = texts[2 * step:2 * step + 2]
        assert (y != y_hat).all() and len(y) == m and [len(t), len(t_hat)] == [m, m]
        with torch.no_grad():
            h, h_hat = (phi(encode(each)).double().numpy() for each in (t, t_hat))
        h_G = np.concatenate([h, (h[::2] + np.roll(h, 1, 0)[::2]) / 2])     # (5)
        x, z = x.double().flatten(1).numpy().mean(1) / 127.5 - 1, z.double().numpy()
        x_hat = z @ theta[:100] + h_G @ theta[100:]
        s_r, s_w, s_f = says(x, h), says(x, h_hat), says(x_hat[:m], h)
        L_D = np.log(s_r) + (np.log(1 - s_w) + np.log(1 - s_f)) / 2         # line 10
        by_score = -np.concatenate([1 - s_r, -s_w / 2, -s_f / 2]) / m       # of -L_D
        xs, hs = np.concatenate([x, x, x_hat[:m]]), np.concatenate([h, h_hat, h])
        w = opt_D.step(w, np.concatenate([[by_score @ xs, by_score.sum()], (by_score * xs) @ hs]))
        s_f = says(x_hat, h_G)                                              # by the new D
        by_x = -(1 - s_f) / len(s_f) * (w[0] + h_G @ w[2:])                 # of -L_G, line 12
        theta = opt_G.step(theta, np.concatenate([by_x @ z, by_x @ h_G]))
        np.testing.assert_allclose(rows[step], [0, L_D.mean(), np.log(s_f).mean()], 1e-5)
    np.testing.assert_allclose(flat([D.s, D.d, D.c]), w, 1e-5, 1e-6)
    np.testing.assert_allclose(flat([G.a, G.b]), theta, 1e-5, 1e-6)


@pytest.mark.parametrize("scores, L_D, L_G", [
    ((0, 0, 0), -2 * math.log(2), -math.log(2)),            # D knows nothing: s_r = s_w = s_f = ½
    ((50, -50, -50), 0, -50), ((50, 0, -50), -math.log(2) / 2, -50)])
def test_losses_where_D_says(monkeypatch, scores, L_D, L_G):
    said = iter([*scores, scores[2]])
    found, descended = {}, []
    monkeypatch.setattr(Discriminator, "forward", lambda D, x, h: torch.full((len(x),), float(next(said))))
    monkeypatch.setattr(text2image.Run, "save", lambda run: None)
    monkeypatch.setattr(text2image.Run, "log", lambda run, **losses: found.update(losses))
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss, inputs: descended.append(loss.item()))
    text2image.train(pretrain=1, steps=2, device="cpu", out="run", width=1, batch_size=4)
    assert descended[1:] == pytest.approx([-L_D, -L_G], abs=1e-6)
    assert [found["L_D"].mean().item(), found["L_G"].mean().item()] == pytest.approx([L_D, L_G], abs=1e-6)


def test_in_the_first_phase_phi_learns_and_then_it_stays(monkeypatch):
    found = []
    monkeypatch.setattr(text2image.Run, "save", lambda run: found.append(
        {name: flat(part.parameters()) for name, part in run.parts.items() if not name.startswith("opt")}))
    text2image.train(pretrain=2, steps=4, save_every=1, device="cpu", out="run", width=1, batch_size=4)
    moved = [{name for name in a if not np.array_equal(a[name], b[name])} for a, b in zip(found, found[1:])]
    assert moved == [{"phi", "v"}, {"G", "D"}, {"G", "D"}]


def test_one_look_of_each_digit_is_never_seen(monkeypatch):
    seen, say, classes, loss = [], text2image.caption, [], text2image.joint_embedding
    monkeypatch.setattr(text2image, "caption", lambda *of: seen.append(of) or say(*of))
    monkeypatch.setattr(text2image, "joint_embedding", lambda v, t, y: classes.extend(y.tolist()) or loss(v, t, y))
    monkeypatch.setattr(text2image.Run, "save", lambda run: None)
    text2image.train(pretrain=1, steps=1, device="cpu", out="run", width=1, batch_size=1500)
    y, x = seen[0]
    every = [(digit, *look) for digit, look in zip(y.tolist(), looks(x).tolist())]
    meanings = set(every)
    assert len(meanings) > 60 and len(set(zip(every, classes))) == len(meanings) == len(set(classes))
    assert not meanings & {(digit, digit % 2 * 2, digit // 2 % 2 * 2) for digit in range(10)}


# ---- Runs ----

TINY = "--width 1 --batch-size 4 --pretrain 3 --save-every 1 --device cpu"


@pytest.mark.parametrize("stop", [2, 3, 5])                 # in the first phase, at its end, in the second
def test_a_run_that_stops_goes_on_as_if_it_had_not(stop):
    text2image.main(f"{TINY} --steps {stop} --out run".split())
    text2image.main(f"{TINY} --steps 6 --out run".split())
    text2image.main(f"{TINY} --steps 6 --out whole".split())
    assert_same(training(text2image, "run"), training(text2image, "whole"))
    assert logged("run", "L_phi")[3:].max() == 0 < logged("run", "L_phi")[:3].min()
    assert Image.open("run/000006.png").size == (192, 192)


def test_generate_draws_a_text_by_seed_and_number_alone(monkeypatch):
    text2image.main(f"{TINY} --steps 4 --out run".split())
    with torch.no_grad():                                   # so that a text is seen
        saved = torch.load("run/checkpoint.pt", weights_only=True)
        for name in ("1.weight", "4.weight", "7.weight", "10.weight"):
            saved["text2image"]["G"][name] *= 50
        torch.save(saved, "run/checkpoint.pt")
    text2image.main(["--out", "run", "--generate", "3", "--text", "a thin seven", "--device", "cpu"])
    text2image.main(["--out", "run", "--generate", "1", "--text", "a thick one", "--device", "cpu"])
    G, phi = text2image.load("run")
    images = [np.asarray(Image.open(f"run/generated/{i:06d}.png"), dtype=float) for i in range(4)]
    assert np.abs(images[3] - images[0]).max() > 20
    z = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    for i, text in enumerate(["a thin seven"] * 3 + ["a thick one"]):
        x = G(z[i:i + 1], phi(encode([text])))[0, 0, 2:-2, 2:-2]
        np.testing.assert_allclose(images[i], ((x.numpy() + 1) * 127.5).round(), atol=1)


@pytest.mark.parametrize("words, sentence", [
    ("--dataset cifar10", "--dataset must be mnist"), ("--pretrain 2 --steps 2 --out run", "pretrain"),
    ("--generate 0 --out run", "--generate must be"), ("--generate 2 --out nowhere", "nowhere")])
def test_errors_are_one_sentence(capsys, words, sentence):
    text2image.main(f"{TINY} --steps 1 --out run".split())
    with pytest.raises(SystemExit) as end:
        text2image.main([*TINY.replace("--pretrain 3", "").split(), *words.split()])
    error = capsys.readouterr().err
    assert end.value.code == 2 and sentence in error and len(error.splitlines()) == 1


@pytest.mark.cuda
def test_a_checkpoint_moves_between_cpu_and_cuda():
    text2image.main(f"{TINY} --steps 2 --out run".split())
    text2image.main(f"{TINY} --steps 5 --out run --device cuda".split())
    text2image.main(f"{TINY} --steps 6 --out run".split())
    assert text2image.read("run")["run"][0] == 6
    text2image.main(["--out", "run", "--generate", "2", "--text", "a seven", "--device", "cuda"])
    assert len(list(Path("run/generated").iterdir())) == 2
