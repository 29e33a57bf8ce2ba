"""related/text2image.py against its paper: texts, φ's loss and Algorithm 1's, and iterations of it by hand"""
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import common
from related import text2image
from related.text2image import Discriminator, Generator, TextEncoder, caption, encode, joint_embedding, looks
from truth import Adam, flat, parameter


def stroke(width, lean, side=32):
    """A straight stroke of so many pixels, that goes so many to the right for each upwards.  (1, 1, side, side)"""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    away = (column - side / 2 - lean * (side / 2 - row)).abs()
    return ((away < width / 2) & (row > 5) & (row < side - 6)).to(torch.uint8)[None, None] * 255


MEDIUM = torch.maximum(stroke(2, 0.1), stroke(3, 0.1) // 2)


@pytest.fixture
def kept(monkeypatch):
    """Runs on the first 3,000 images of MNIST, without pictures; what they save: states, and the rows of the log"""
    x, (_, y), saved = common.load_images()[:3000], common.load_set("mnist"), []
    for name, it in dict(load_images=lambda *_: x, load_set=lambda *_: (None, y[:3000]),
                         save_images=lambda *_: None, save_animation=lambda *_: None,
                         save=lambda out, config, states, rows: saved.append((states, rows))).items():
        monkeypatch.setattr(text2image, name, it)
    return saved


# ---- Texts ----

def test_thick_and_thin_strokes_that_lean():
    for place, lean in enumerate((-0.3, 0.1, 0.5)):
        thin, thick = looks(torch.cat([stroke(2, lean), stroke(8, lean)])).tolist()
        assert thin == [0, place] and thick == [2, place]
    assert looks(torch.cat([MEDIUM, MEDIUM.flip(3)])).tolist() == [[1, 1], [1, 0]]
    moved = stroke(8, 0.5).roll((3, -4), (2, 3))
    assert torch.equal(looks(moved), looks(stroke(8, 0.5))) and torch.equal(looks(moved // 2), looks(moved))


def test_captions_say_class_and_look_in_every_phrasing():
    x = torch.cat([stroke(2, -0.3), MEDIUM, stroke(8, -0.3)])
    rng = torch.Generator().manual_seed(0)
    seen = [set(texts) for texts in zip(*(caption(torch.tensor([7, 0, 3]), x, rng) for _ in range(100)))]
    for texts, what in zip(seen, ("thin seven leaning left", "zero", "thick three leaning left")):
        assert texts == {phrase.format(what) for phrase in text2image.PHRASES}


# ---- φ ----

def test_joint_embedding_in_closed_form():
    y = torch.arange(3)
    assert joint_embedding(2 ** 0.5 * torch.eye(3), 2 ** 0.5 * torch.eye(3), y).item() == pytest.approx(0, abs=1e-6)
    zeros = torch.zeros(3, 5)
    assert joint_embedding(zeros, zeros, y).item() == pytest.approx(2 * 2 / 3)        # (N - 1) / N each way
    v, t = torch.randn(4, 5), torch.randn(4, 5)
    y = torch.tensor([0, 1, 2, 1])
    s, by_hand = (v @ t.T).tolist(), 0
    for i in range(4):
        for j in range(4):
            if y[i] != y[j]:
                by_hand += max(0, 1 + s[i][j] - s[i][i]) + max(0, 1 + s[j][i] - s[i][i])
    assert joint_embedding(v, t, y).item() == pytest.approx(by_hand / 16, rel=1e-5)


def test_the_networks():
    phi, G, D = TextEncoder(), Generator(width=4), Discriminator(width=4).eval()
    codes = encode(["A Seven", "é" * 100, ""])              # ASCII, 64 of them
    assert [bytes(each.tolist()).decode() for each in codes] == ["a seven".ljust(64), "?" * 64, " " * 64]
    h = phi(codes)
    x = G(torch.randn(3, 100), h)
    assert h.shape == (3, 64) and x.shape == (3, 1, 32, 32) and x.abs().max() <= 1
    assert [layer.out_channels for layer in G if isinstance(layer, nn.ConvTranspose2d)] == [16, 8, 4, 1]
    assert [layer.out_channels for layer in D.image if isinstance(layer, nn.Conv2d)] == [4, 8, 16]
    both = torch.cat([D.image(x), D.text(h)[:, :, None, None].repeat(1, 1, 4, 4)], 1)   # the text at every place
    torch.testing.assert_close(D(x, h), D.both(both))
    assert D(x, h).shape == (3,) and isinstance(D.both[-2], nn.Conv2d)      # logits


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
def test_two_iterations_equal_numpy(monkeypatch, kept, changed):
    texts, latents = [], []
    say, draw = text2image.caption, torch.randn

    def recorded(label, image):
        texts.append((label, image, say(label, image)))
        return texts[-1][2]

    def drawn(*shape, **settings):
        latents.append(draw(*shape, **settings))
        return latents[-1]
    monkeypatch.setattr(text2image, "caption", recorded)
    monkeypatch.setattr(text2image, "Generator", TinyG)
    monkeypatch.setattr(text2image, "Discriminator", TinyD)
    monkeypatch.setattr(torch, "randn", drawn)
    text2image.train(pretrain=1, steps=3, save_every=1, device="cpu", out="run", **changed)
    parts, rows = kept[-1]
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
        np.testing.assert_allclose([*rows[step].values()][2:], [0, L_D.mean(), np.log(s_f).mean()], 1e-5)
    np.testing.assert_allclose(flat([D.s, D.d, D.c]), w, 1e-5, 1e-6)
    np.testing.assert_allclose(flat([G.a, G.b]), theta, 1e-5, 1e-6)


def test_in_the_first_phase_phi_learns_and_then_it_stays(kept, monkeypatch):
    found = []
    monkeypatch.setattr(text2image, "save", lambda out, config, states, rows: found.append(
        {name: flat(part.parameters()) for name, part in states.items() if not name.startswith("opt")}))
    text2image.train(pretrain=2, steps=4, save_every=1, device="cpu", out="run", width=1, batch_size=4)
    moved = [{name for name in a if not np.array_equal(a[name], b[name])} for a, b in zip(found, found[1:])]
    assert moved == [{"phi", "v"}, {"G", "D"}, {"G", "D"}]


def test_one_look_of_each_digit_is_never_seen(kept, monkeypatch):
    seen, say = [], text2image.caption
    monkeypatch.setattr(text2image, "caption", lambda *of: seen.append(of) or say(*of))
    text2image.train(pretrain=1, steps=1, device="cpu", out="run", width=1, batch_size=1500)
    y, x = seen[0]
    meanings = {(digit, *look) for digit, look in zip(y.tolist(), looks(x).tolist())}
    assert len(meanings) > 60
    assert not meanings & {(digit, digit % 2 * 2, digit // 2 % 2 * 2) for digit in range(10)}


def test_generate_draws_a_text_by_seed_and_number_alone():
    torch.manual_seed(0)
    G, phi = Generator(width=1).eval(), TextEncoder()
    for weights in G.parameters():                       # so that a text is seen
        weights.detach().mul_(3)
    Path("run").mkdir()
    torch.save(dict(config=dict(width=1), G=G.state_dict(), phi=phi.state_dict()), "run/checkpoint.pt")
    shown = []
    for text in "a thin seven", "a thick one":
        text2image.main(["--out", "run", "--generate", "2", "--text", text, "--seed", "4", "--device", "cpu"])
        noise = torch.Generator().manual_seed(4)
        for i in range(2):
            x = G(torch.randn(1, 100, generator=noise), phi(encode([text])))[0, 0, 2:-2, 2:-2].detach()
            file = f"run/generated/{text.replace(' ', '-')}-4-{i:06d}.png"
            shown.append(np.asarray(Image.open(file).convert("L"), dtype=float))
            np.testing.assert_allclose(shown[-1], (x + 1) * 127.5, atol=1)
    assert np.abs(shown[0] - shown[2]).max() > 20
