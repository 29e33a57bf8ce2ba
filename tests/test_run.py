"""The run block: the same to the letter in the four small scripts, so tested on wgan_gp.py, and on progan.py"""
import contextlib
import importlib
import inspect
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import wgan_gp
from truth import assert_same, read, training

TOP = Path(__file__).resolve().parent.parent
FOUR = ["wgan", "wgan_gp", "lsgan", "ebgan"]
KILLS = int(os.environ.get("KILLS", 1))                     # KILLS=20 python -m pytest -k kill


@pytest.fixture(params=["wgan_gp", "progan"])
def script(request):
    return importlib.import_module(request.param)


def tiny(script):
    small = dict(fmap_max=3, kimg=0.008) if "progan" in script.__name__ else dict(width=2)   # grows at each step
    return dict(digit=7, size=16, nz=8, batch_size=8, device="cpu") | small


def flags(script, args):
    return [f"--{name.replace('_', '-')}={value}" for name, value in tiny(script).items()] + args.split()


def main(script, args, status=None):
    """The command line in this process; with a status, it must end with that SystemExit"""
    with pytest.raises(SystemExit) if status is not None else contextlib.nullcontext() as end:
        script.main(script.train, script.generate, flags(script, args))
    assert status is None or end.value.code == status


def pixels(path):
    return np.asarray(Image.open(path).convert("L"), dtype=float)


def content(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.suffix in (".png", ".pt", ".csv")}


def test_a_run_writes_its_files_in_a_thread_too(script, capsys):
    with ThreadPoolExecutor() as pool:
        pool.submit(main, script, "--steps 7 --save-every 3 --keep").result()
    folder = Path("runs", f"{script.__name__}-mnist-7")
    assert " ".join(sorted(path.name for path in folder.iterdir())) == (
        "000003.png 000003.pt 000006.png 000006.pt 000007.png 000007.pt "
        "checkpoint.pt curve.png log.csv real.png training.gif")
    assert Image.open(folder / "training.gif").n_frames == 3
    out = capsys.readouterr().out
    assert f"a new run in {folder}" in out and re.search(r"step 7 .*L_D -?[\d.]+.* 0 min left", out)


@pytest.mark.parametrize("name", [*FOUR, "progan"])
def test_three_steps_and_three_steps_are_six_steps_and_rows_are_means(name, capsys):
    script = importlib.import_module(name)
    main(script, "--steps 6 --save-every 1 --out whole")
    main(script, "--steps 3 --save-every 3 --out parts")
    main(script, "--steps 6 --save-every 3 --out parts")
    assert "going on from step 3" in capsys.readouterr().out
    assert_same(training("parts") | dict(row=0), training("whole") | dict(row=0))
    rows, each = (np.array([list(row.values()) for row in read(out)["rows"]]) for out in ("parts", "whole"))
    assert (rows[0, :2] < rows[1, :2]).all()                # steps and seconds
    losses = slice(2, -2 if name == "progan" else None)     # but for its resolution and alpha
    np.testing.assert_allclose(rows[:, losses], each[:, losses].reshape(2, 3, -1).mean(1), rtol=1e-4, atol=1e-6)
    before = content("parts")
    main(script, "--steps 6 --save-every 3 --out parts")    # there is nothing left to do
    assert content("parts") == before


@pytest.mark.parametrize("attempt", range(KILLS))
def test_a_copy_beside_common_alone_goes_on_after_a_kill_at_any_moment(script, attempt):
    Path("copy").mkdir()
    for file in (script.__file__, TOP / "common.py"):
        shutil.copy(file, "copy")
    words = flags(script, f"--steps 1000000 --save-every 2 --root {TOP}/data --out run")
    process = subprocess.Popen([sys.executable, f"copy/{script.__name__}.py", *words],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not Path("run/checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.001)
    time.sleep(random.random() / 2)
    process.send_signal((signal.SIGKILL, signal.SIGINT)[(attempt + (script is wgan_gp)) % 2])
    assert process.wait() in (-signal.SIGKILL, 130)
    done = read("run")["rows"][-1]["step"]
    main(script, f"--steps {done + 2} --out run --save-every 2")
    main(script, f"--steps {done + 2} --out whole --save-every 2")
    assert_same(training("run"), training("whole"))


def test_a_checkpoint_half_written_leaves_the_old_one(script, monkeypatch):
    main(script, "--steps 2 --out run")
    before = Path("run/checkpoint.pt").read_bytes()

    def killed(checkpoint, file):
        Path(file).write_bytes(before[:1000])
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, "save", killed)
    main(script, "--steps 4 --out run", status=130)
    assert Path("run/checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("args", ["--lr 0.5", "--digit 8", "--seed 1", "--nz 9", "--size 32", "--batch-size 4"])
def test_another_setting_is_refused_and_nothing_is_overwritten(script, capsys, args):
    main(script, "--steps 2 --out run")
    before, (flag, value) = content("run"), args.split()
    main(script, f"--steps 4 --out run {args}", status=2)
    said = capsys.readouterr().err
    assert flag[2:].replace("-", "_") in said and value in said and said.count("\n") == 1
    assert content("run") == before


def test_folders_of_one_name_and_folders_that_have_changed_are_refused(script):
    for file in ("cats/train/0.png", "cats/train/1.png", "dogs/train/0.png"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20)).save(file)
    settings = tiny(script) | dict(digit=None, root="root")
    script.train(**settings, dataset="cats/train", steps=1)
    Path("cats/train/1.png").unlink()
    for dataset, what in (("dogs/train", "cats/train, not dogs/train"), ("cats/train", "images 2, not 1")):
        with pytest.raises(ValueError, match=what):
            script.train(**settings, dataset=dataset, steps=2)


def test_a_script_that_has_changed_goes_on_as_it_is_now_or_says_why_not(monkeypatch):
    settings = dict(lr=np.float64(0.01), seed=np.int32(3), root=common.ROOT)        # of any kind
    wgan_gp.train(**tiny(wgan_gp) | settings, steps=2, out=Path("run"))
    before = read("run")
    with pytest.raises(KeyError, match="extra"):
        wgan_gp.resume(Path("run"), dict(before["config"]), dict(extra=torch.nn.Linear(1, 1)))
    adam, rounds = torch.optim.Adam, wgan_gp.rounds
    monkeypatch.setattr(torch.optim, "Adam", lambda weights, lr, *rest, **more: adam(weights, 0.0, *rest, **more))
    monkeypatch.setattr(wgan_gp, "rounds", lambda *args: (row.update(new=5) or row for row in rounds(*args)))
    wgan_gp.train(**tiny(wgan_gp), lr=0.01, seed=3, steps=4, out="run")
    assert all(map(torch.equal, before["D"].values(), read("run")["D"].values()))   # the code's step size
    assert [line.split(",")[-1] for line in Path("run/log.csv").read_text().split()] == ["new", "", "5"]


def test_what_is_not_finite_stops_the_run_and_spares_the_checkpoint(script, capsys, monkeypatch):
    main(script, "--steps 2 --out run")
    before, step = Path("run/checkpoint.pt").read_bytes(), torch.optim.Adam.step

    def breaks(optimizer):
        step(optimizer)
        optimizer.param_groups[0]["params"][0].data.fill_(torch.nan)
    monkeypatch.setattr(torch.optim.Adam, "step", breaks)   # after all losses of the step have been computed
    main(script, "--steps 3 --out run", status=2)
    assert "finite" in capsys.readouterr().err and Path("run/checkpoint.pt").read_bytes() == before


def test_picture_load_and_generate_show_the_same_images(script):
    main(script, "--steps 6 --out run --size 32")
    G, noise = script.load("run/checkpoint.pt"), torch.Generator().manual_seed(0)
    x, one = (((G(z)[:, 0].clamp(-1, 1) + 1) * 127.5).numpy() for z in (
        torch.randn(64, 8, generator=torch.Generator().manual_seed(0)),
        torch.cat([torch.randn(1, 8, generator=noise) for _ in range(3)])))
    shown = pixels("run/000006.png").reshape(8, 32, 8, 32).transpose(0, 2, 1, 3).reshape(64, 32, 32)
    assert np.abs(shown - x).max() <= 1
    for args in ("--seed 5", "--seed 0 --size 16"):         # networks come from the checkpoint
        main(script, f"--generate 3 --out run {args}")
    names = [f"run/generated/{seed}-{i:06d}.png" for seed in (0, 5) for i in range(3)]
    assert sorted(map(str, Path("run/generated").iterdir())) == names
    for i in range(3):
        assert np.abs(pixels(names[i]) - one[i, 2:-2, 2:-2]).max() <= 1       # MNIST's own 28x28
        assert np.abs(pixels(names[3 + i]) - one[i, 2:-2, 2:-2]).max() > 10
    if script is wgan_gp:
        assert np.abs(((G.train()(torch.randn(64, 8))[:, 0] + 1) * 127.5).detach().numpy() - x).max() > 1
    else:
        saved = read("run")                                 # the moving average
        assert not all(map(torch.equal, saved["G"].values(), saved["G_ema"].values()))
        assert all(map(torch.equal, G.state_dict().values(), saved["G_ema"].values()))


@pytest.mark.parametrize("args, word", [
    ("--dataset nowhere", "nowhere"), ("--digit 11", "--digit"), ("--dataset .", "--digit"), ("--size 33", "size"),
    ("--size 2048", "size"), ("--batch-size -1", "at least 1"), ("--channels 2", "--channels"),
    ("--generate 2 --out nothing", "nothing")])
def test_errors_are_one_sentence(script, capsys, args, word):
    main(script, args, status=2)
    said = capsys.readouterr().err
    assert word in said and said.count("\n") == 1 and not list(Path.cwd().iterdir())


@pytest.mark.parametrize("encoding, symbol", [("utf-8", "λ"), ("cp1252", "?")])
def test_help_has_every_setting_with_its_symbol_on_any_terminal(script, monkeypatch, encoding, symbol):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding, write_through=True))
    main(script, "--help", status=0)
    text = " ".join(shown.getvalue().decode(encoding).split())
    assert f"--lam LAM {symbol} weight of the gradient penalty (10.0)" in text
    assert all(f"--{name.replace('_', '-')} " in text for name in inspect.signature(script.train).parameters)


def test_what_scripts_share_is_the_same_to_the_letter():
    texts = [Path(TOP, f"{name}.py").read_text(encoding="utf-8") for name in [*FOUR, "progan"]]
    for block in (r"import json\n.*?# ---- Networks", r"    nz=100.*?    steps=", r"    seed=0,.*?\):\n",
                  r"    config = dict\(.*?    D = ", r"    theta, w = .*?\n", r"    states = .*# ---- The run.*"):
        assert len({re.search(block, text, re.DOTALL)[0] for text in texts[:4]}) == 1
    for function in ("folder", "resume", "save", "generate", "main"):
        assert len({re.search(rf"\ndef {function}\(.*?\n\n\n", text, re.DOTALL)[0] for text in texts}) == 1


@pytest.mark.cuda
@pytest.mark.parametrize("name", FOUR)
def test_a_graph_equals_eager_steps_also_after_a_stop(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)        # so that they can be compared closely
    script = importlib.import_module(name)
    for out, steps, more in (("eager", 12, ""), ("graph", 6, "--graph"), ("graph", 12, "--graph")):
        main(script, f"--steps {steps} --save-every 2 --out {out} --device cuda {more}")
    a, b = read("eager"), read("graph")
    for part in ("G", "D"):
        torch.testing.assert_close(a[part], b[part], rtol=1e-4, atol=1e-5)
    assert_same(a["random_cuda"], b["random_cuda"])
    a, b = ([list(row.values())[2:] for row in saved["rows"]] for saved in (a, b))
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("name", [*FOUR, "progan"])
def test_a_checkpoint_moves_between_cpu_and_cuda_and_images_need_not_fit(name, monkeypatch):
    script = importlib.import_module(name)
    for steps, device in ((2, "cpu"), (4, "cuda"), (6, "cpu")):
        main(script, f"--steps {steps} --out run --device {device}")
        script.generate(Path("run"), 1, 0, device)
        Path("run/generated").rename(f"{steps}")
    script.generate(Path("run"), 1, 0, "cuda")
    assert np.abs(pixels("6/0-000000.png") - pixels("run/generated/0-000000.png")).max() <= 2
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1000, 1000))
    main(script, "--steps 2 --out copied --device cuda")
