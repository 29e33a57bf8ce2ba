"""The networks that the scripts have in common: shapes, range, sizes that are refused, signs of the game"""
import importlib

import pytest
import torch
from torch import nn
from truth import described

SECOND = {"wgan": "Critic", "wgan_gp": "Critic", "lsgan": "Discriminator", "ebgan": "Discriminator"}


@pytest.fixture(params=SECOND)
def script(request):
    return importlib.import_module(request.param)


def second(script):
    return getattr(script, SECOND[script.__name__])


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes_and_range(script, size, channels):
    G, D = script.Generator(7, channels, size, 2), second(script)(channels, size, 2)
    x = G(torch.randn(3, 7))
    assert x.shape == (3, channels, size, size) and x.abs().max() <= 1
    if script.__name__ == "ebgan":
        S = D.encode(x)
        assert S.shape == (3, 8, size // 8, size // 8)
        assert torch.equal(D(x), D.decode(S)) and D(x).shape == x.shape and D(x).abs().max() <= 1
        assert script.energy(D, x).shape == (3,)
    else:
        assert D(x).shape == (3,)
        widths = [layer.out_channels for layer in D if isinstance(layer, nn.Conv2d)]
        assert widths == [2 * 2**i for i in range(len(widths) - 1)] + [1]


@pytest.mark.parametrize("size", [0, 8, 33, 48, 512])
def test_other_sizes_are_refused(script, size):
    with pytest.raises(ValueError, match=f"--size .* not {size}"):
        script.Generator(100, 1, size, 4)


@pytest.mark.parametrize("size, parameters", [(64, 3_576_704), (32, 1_068_928)])
def test_generator_has_as_many_parameters_as_the_authors_dcgan(script, size, parameters):
    assert sum(p.numel() for p in script.Generator(100, 3, size, 64).parameters()) == parameters


@pytest.mark.parametrize("name, settings", [("wgan", dict(c=9.0)), ("wgan_gp", dict(lam=0.0))])
def test_a_critic_step_raises_the_difference_and_a_generator_step_the_fakes_score(monkeypatch, name, settings):
    """The signs, on the real networks: the definition of the game, whatever the code looks like"""
    script = importlib.import_module(name)
    Generator, Critic = script.Generator, script.Critic
    torch.manual_seed(0)
    x, z = torch.rand(64, 1, 16, 16) * 2 - 1, torch.randn(64, 5)

    def networks(cls, *args):
        torch.manual_seed(1)
        return cls(*args)
    monkeypatch.setattr(script, "load_images", lambda *_: ((x + 1) * 127.5).round().to(torch.uint8))
    G0, D0 = networks(Generator, 5, 1, 16, 4), networks(Critic, 1, 16, 4)
    monkeypatch.setattr(script, "Generator", lambda *args: networks(Generator, *args))
    monkeypatch.setattr(script, "Critic", lambda *args: networks(Critic, *args))
    G, D = script.train(**settings, steps=1, n_critic=1, size=16, width=4, nz=5, lr=1e-3, device="cpu", out="run")
    with torch.no_grad():
        before = D0(x).mean() - D0(G0(z)).mean()
        assert D(x).mean() - D(G0(z)).mean() > before
        assert D(G(z)).mean() > D(G0(z)).mean()


def test_the_generators_layers_are_those_of_dcgan(script):
    def norm(n):
        return [f"BatchNorm2d {n} 1e-05 0.1 True", "ReLU"]
    assert described(script.Generator(100, 3, 32, 16)) == [
        "Unflatten", "100-64 k4 s1 p0", *norm(64), "64-32 k4 s2 p1", *norm(32), "32-16 k4 s2 p1", *norm(16),
        "16-3 k4 s2 p1", "Tanh"]
