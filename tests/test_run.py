"""What every script does around its algorithm: continue, obey Ctrl-C, log, generate, refuse"""
import csv
import importlib
import itertools
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

TOP = Path(__file__).resolve().parent.parent
FOUR = ["wgan", "wgan_gp", "lsgan", "ebgan"]
SCRIPTS = [*FOUR, "progan"]
TINY = dict(digit=7, size=16, nz=8, batch_size=8, device="cpu")
SMALL = dict.fromkeys(FOUR, dict(width=2))
SMALL["progan"] = dict(fmap_max=3, kimg=0.001)              # grown after a step; how it grows: test_progan.py
KILLS = int(os.environ.get("KILLS", 3))                     # KILLS=20 python -m pytest -k kill


@pytest.fixture(params=SCRIPTS, scope="module")
def script(request):
    return importlib.import_module(request.param)


def tiny(script):
    return TINY | SMALL[script.__name__]


def flags(settings):
    return [str(word) for name, value in settings.items() for word in ("--" + name.replace("_", "-"), value)]


def main(script, *args, status=None):
    """Runs the command line in this process; with a status, it must end with that SystemExit"""
    if status is None:
        return script.main([*flags(tiny(script)), *map(str, args)])
    with pytest.raises(SystemExit) as end:
        script.main([*flags(tiny(script)), *map(str, args)])
    assert end.value.code == status


def background(script, *args, **options):
    return subprocess.Popen([sys.executable, f"{TOP}/{script.__name__}.py", *flags(tiny(script)), *map(str, args)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def saved(out):
    return torch.load(Path(out, "checkpoint.pt"), weights_only=True)


def assert_same(a, b, but=()):
    """Bit for bit, whatever is nested in a and b"""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - set(but):
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b


def assert_same_training(a, b):
    """Networks, optimizers, random state and step; not the folder's name, the clock and the rows of the log"""
    assert_same(saved(a), saved(b), but=("config", "seconds", "log"))


def rows(out):
    with open(Path(out, "log.csv")) as file:
        return list(csv.DictReader(file))


# ---- A run's files ----

def test_a_run_writes_its_files(script, capsys):
    main(script, "--steps", 7, "--save-every", 3)
    folder = Path("runs", f"{script.__name__}-mnist-7")
    assert sorted(p.name for p in folder.iterdir()) == [
        "000003.png", "000006.png", "000007.png", "checkpoint.pt", "log.csv", "real.png", "training.gif"]
    assert Image.open(folder / "real.png").size == (32, 32)             # 8 images: 2x2 of 16 pixels
    assert Image.open(folder / "000003.png").size == (128, 128)         # 64 latents: 8x8
    assert Image.open(folder / "training.gif").n_frames == 3
    log = rows(folder)
    assert [row["step"] for row in log] == ["3", "6", "7"]
    per_step = 8 * saved(folder)["config"].get("n_critic", 1)
    assert [int(row["images"]) for row in log] == [3 * per_step, 6 * per_step, 7 * per_step]
    assert all(np.isfinite(float(value)) for row in log for value in row.values())
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["device: cpu", f"run folder: {folder}"]
    grown = "  16x16" if script.__name__ == "progan" else ""
    assert re.fullmatch(rf"step 7/7{grown}(  \w+ -?[\d.e+-]+)+  \d+ images/s, 0:00:00 left", lines[-1])
    assert saved(folder).keys() >= {"step", "G", "D", "opt_G", "opt_D", "rng", "config"}


def test_rows_are_means_since_the_row_before(script):
    main(script, "--steps", 6, "--save-every", 1, "--out", "each")
    main(script, "--steps", 6, "--save-every", 3, "--out", "three")
    each, three = rows("each"), rows("three")
    place = {"step", "images", "resolution", "alpha"} & each[0].keys()      # of the last step, no mean
    for i, row in enumerate(three):
        assert all(row[name] == each[3 * i + 2][name] for name in place)
        for name in each[0].keys() - place - {"seconds"}:
            mean = np.mean([float(one[name]) for one in each[3 * i:3 * i + 3]])
            np.testing.assert_allclose(float(row[name]), mean, rtol=1e-4, atol=1e-6)
    assert_same_training("each", "three")                   # how often it saves changes nothing


def test_pictures_show_the_same_latents_with_running_statistics(script):
    main(script, "--steps", 2, "--out", "run", "--save-every", 1)
    G = script.load("run")
    z = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    grid = np.asarray(Image.open("run/000002.png"))
    shown = grid.reshape(8, 16, 8, 16).transpose(0, 2, 1, 3).reshape(64, 16, 16)
    expected = ((G(z)[:, 0].clamp(-1, 1) + 1) * 127.5).round()
    assert np.abs(shown.astype(float) - expected.numpy()).max() <= 1
    if script.__name__ != "progan":                         # without batch norm
        batch_statistics = ((G.train()(z)[:, 0] + 1) * 127.5).round()
        assert np.abs(shown - batch_statistics.numpy()).max() > 1


def test_one_seed_one_run_and_another_seed_another(script):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        main(script, "--steps", 2, "--out", out, "--seed", seed)
    assert_same_training("a", "b")
    for part in ("G", "D", "rng"):
        with pytest.raises(AssertionError):
            assert_same(saved("a")[part], saved("c")[part])


@pytest.mark.parametrize("more", [["--batch-size", 1], ["--batch-size", 7, "--channels", 3, "--size", 32]])
def test_any_batch_size_trains(script, more):
    main(script, "--steps", 3, "--out", "run", *more)
    assert all(np.isfinite(float(value)) for row in rows("run") for value in row.values())


# ---- Continue ----

def test_three_steps_and_three_steps_are_six_steps(script, capsys):
    main(script, "--steps", 6, "--out", "whole")
    main(script, "--steps", 3, "--out", "parts")
    capsys.readouterr()
    main(script, "--steps", 6, "--out", "parts")
    assert "3 of 6 steps are done: continuing" in capsys.readouterr().out
    assert_same_training("whole", "parts")
    assert [row["step"] for row in rows("parts")] == ["3", "6"]
    assert float(rows("parts")[1]["seconds"]) >= float(rows("parts")[0]["seconds"])
    before = {p: p.read_bytes() for p in Path("parts").iterdir()}
    G, D = script.train(**tiny(script), steps=6, out="parts")
    assert "6 of 6 steps are done: finished" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in Path("parts").iterdir()} == before
    for network, name in ((G, "G"), (D, "D")):
        assert_same(dict(network.state_dict()), dict(saved("parts")[name]))


def test_continuing_cuts_the_log_back_to_the_checkpoint(script):
    main(script, "--steps", 2, "--out", "run")
    with open("run/log.csv", "a") as log:                   # as after a kill between two files
        log.write("4,9,9,1,1,1,1\n5,9")
    main(script, "--steps", 4, "--out", "run", "--save-every", 1)
    assert [row["step"] for row in rows("run")] == ["2", "3", "4"]


@pytest.mark.parametrize("content", ["missing", "empty", "other files"])
def test_without_a_checkpoint_it_starts_afresh(script, content):
    main(script, "--steps", 2, "--out", "reference")
    if content != "missing":
        Path("run").mkdir()
    if content == "other files":
        Path("run/log.csv").write_text("old")
        shutil.copy("reference/real.png", "run/000900.png")
        Path("run/.checkpoint.pt.part").write_bytes(b"half a checkpoint")
    main(script, "--steps", 2, "--out", "run")
    assert_same_training("run", "reference")
    assert [row["step"] for row in rows("run")] == ["2"]
    assert Image.open("run/training.gif").n_frames == 1


@pytest.mark.parametrize("attempt", range(KILLS))
def test_kill_at_any_moment_then_continue(script, attempt):
    process = background(script, "--steps", 10**6, "--out", "run", "--save-every", 1)
    while not Path("run/checkpoint.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    time.sleep(random.random())
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = saved("run")["step"]
    main(script, "--steps", done + 2, "--out", "run")
    main(script, "--steps", done + 2, "--out", "whole")
    assert_same_training("run", "whole")
    assert [int(row["step"]) for row in rows("run")] == [*range(1, done + 1), done + 2]


def test_a_checkpoint_half_written_leaves_the_old_one(script, monkeypatch):
    main(script, "--steps", 2, "--out", "run")
    before = Path("run/checkpoint.pt").read_bytes()

    def killed(checkpoint, file):
        file.write(before[:1000])
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, "save", killed)
    main(script, "--steps", 4, "--out", "run", status=130)
    assert Path("run/checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(script, number):
    process = background(script, "--steps", 100000, "--out", "run", "--save-every", 10)
    while not Path("run/checkpoint.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(err.splitlines()) == 1 and "the same command continues" in err
    done = saved("run")["step"]
    assert int(rows("run")[-1]["step"]) == done and Path(f"run/{done:06d}.png").exists()
    assert Path("run/training.gif").exists()
    main(script, "--steps", done + 2, "--out", "run")
    main(script, "--steps", done + 2, "--out", "whole")
    assert_same_training("run", "whole")


def test_signal_handlers_are_put_back(script):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    main(script, "--steps", 1, "--out", "run")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("flag, value", [("--lr", "0.5"), ("--digit", "8"), ("--seed", "1"), ("--width", "4"),
                                         ("--size", "32"), ("--batch-size", "9"), ("--nz", "9"),
                                         ("--channels", "3"), ("--dataset", "cifar10")])
def test_continuing_with_another_setting_is_refused_and_nothing_overwritten(script, capsys, flag, value):
    flag = "--fmap-max" if flag == "--width" and script.__name__ == "progan" else flag
    main(script, "--steps", 2, "--out", "run")
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in Path("run").iterdir()}
    capsys.readouterr()
    main(script, "--steps", 4, "--out", "run", flag, value, status=2)
    err = capsys.readouterr().err
    was = saved("run")["config"][flag[2:].replace("-", "_")]
    assert f"was trained with {flag} {was}, not with {flag} {value}: " in err and len(err.splitlines()) == 1
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in Path("run").iterdir()} == before


def test_continuing_without_a_setting_that_was_given_says_so():
    wgan = importlib.import_module("wgan")
    settings = dict(digit=7, size=16, width=1, nz=2, batch_size=1, n_critic=100, device="cpu", out="run")
    wgan.train(**settings, steps=1, authors_loop=True)
    with pytest.raises(ValueError, match="was trained with --authors-loop, not without --authors-loop: give"):
        wgan.train(**settings, steps=2)
    with pytest.raises(ValueError, match="was trained with --digit 7, not without --digit: "):
        wgan.train(**settings | dict(digit=None), steps=2, authors_loop=True)


@pytest.mark.parametrize("name, value", [("lr", np.float64(1)), ("batch_size", np.int32(8)), ("nz", torch.ones(1))])
def test_numbers_that_a_checkpoint_cannot_hold_are_refused_at_once(script, name, value):
    flag, kind = "--" + name.replace("_", "-"), type(value).__name__
    with pytest.raises(ValueError, match=f"{flag} must be a plain Python number or string, not a {kind}"):
        script.train(**tiny(script) | {name: value}, steps=1, out="run")
    assert not Path("run").exists()


def test_root_and_save_every_and_place_may_change(script):
    main(script, "--steps", 2, "--out", "here")
    shutil.move("here", "there")
    main(script, "--steps", 4, "--out", "there", "--save-every", 1, "--root", TOP / "data")
    assert saved("there")["step"] == 4


def test_how_a_step_is_made_is_this_runs_not_the_checkpoints(script):
    main(script, "--steps", 2, "--out", "run")
    groups = saved("run")["opt_D"]["param_groups"]
    checkpoint = saved("run")
    for name in ("opt_G", "opt_D"):                         # as saved by a recorded run on CUDA
        checkpoint[name]["param_groups"][0].update(capturable=True)
    torch.save(checkpoint, "run/checkpoint.pt")
    main(script, "--steps", 3, "--out", "run")
    assert_same(saved("run")["opt_D"]["param_groups"], groups)


# ---- Generate and load ----

def test_generate_writes_a_folder_of_images(script, capsys):
    main(script, "--steps", 2, "--out", "run")
    before = Path("run/checkpoint.pt").read_bytes()
    main(script, "--generate", 70, "--out", "run")
    folder = Path("run/generated")
    assert sorted(p.name for p in folder.iterdir()) == [f"{i:06d}.png" for i in range(70)]
    assert Image.open(folder / "000000.png").size == (16, 16) and Image.open(folder / "000000.png").mode == "L"
    assert "70 images in" in capsys.readouterr().out and Path("run/checkpoint.pt").read_bytes() == before
    first = [p.read_bytes() for p in sorted(folder.iterdir())]

    # Networks come from the checkpoint, not from the flags; image i does not depend on how many there are.
    assert script.generate("run", 5, "cpu") == folder
    assert [p.read_bytes() for p in sorted(folder.iterdir())] == first[:5]
    other = flags(dict.fromkeys(SMALL[script.__name__], 64))
    script.main(["--generate", "5", "--out", "run", "--size", "256", "--seed", "1", "--device", "cpu", *other])
    other = [p.read_bytes() for p in sorted(folder.iterdir())]
    assert len(other) == 5 and not set(other) & set(first)


def test_a_generated_image_is_the_loaded_generators(script):
    main(script, "--steps", 2, "--out", "run", "--size", 32)
    G = script.load("run")
    assert not G.training
    script.generate("run", 3, "cpu", seed=5)
    z = torch.randn(64, 8, generator=torch.Generator().manual_seed(5))
    x = G(z)
    assert x.shape == (64, 1, 32, 32)
    assert script.__name__ == "progan" or x.abs().max() <= 1
    for i in range(3):
        shown = np.asarray(Image.open(f"run/generated/{i:06d}.png"), dtype=float)
        assert shown.shape == (28, 28)
        assert np.abs(shown - ((x[i, 0, 2:-2, 2:-2].clamp(-1, 1) + 1) * 127.5).round().numpy()).max() <= 1
        # Pixel norm enlarges the rounding, which differs with the number of images; still far below a grey level.
        rounding = dict(rtol=1e-3, atol=1e-4) if script.__name__ == "progan" else {}
        torch.testing.assert_close(G(z[i:i + 1])[0], x[i], **rounding)


@pytest.mark.parametrize("count", ["0", "-1", "x"])
def test_generate_refuses(script, capsys, count):
    main(script, "--generate", count, "--out", "nowhere", status=2)
    assert "--generate" in capsys.readouterr().err
    main(script, "--generate", 3, "--out", "nowhere", status=2)
    assert "no checkpoint.pt in nowhere" in capsys.readouterr().err and not Path("nowhere").exists()


def test_stopping_generate_says_what_is_true(script, capsys, monkeypatch):
    main(script, "--steps", 1, "--out", "run")

    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(script, "save_each", interrupted)
    main(script, "--generate", 3, "--out", "run", status=130)
    assert capsys.readouterr().err == f"{script.__name__}.py: stopped; not all images are there\n"


# ---- Errors: one sentence, status 2, nothing written ----

@pytest.mark.parametrize("args, words", [
    ("--dataset nowhere", "--dataset nowhere does not exist"),
    ("--digit 11", "--digit must be one of the classes 0 to 9"),
    ("--dataset folder", "--digit 7 needs a data set with classes"),
    ("--batch-size 0", "--batch-size"), ("--size 33", "--size must be {sizes}, not 33"),
    ("--steps -1", "--steps"), ("--steps 0", "--steps"), ("--save-every 0", "--save-every"), ("--nz 0", "--nz"),
    ("{width} -2", "{width}"), ("--lr -1", "--lr"), ("--lr nan", "--lr"), ("--lr inf", "--lr"), ("--lr x", "--lr"),
    ("--channels 2", "--channels must be 1"), ("--device nothing", "--device nothing is not on this machine"),
    ("--out file/run", "file/run"), ("--out file", "file"), ("--unknown 3", "--unknown"),
    ("--dataset cifar10 --root empty", "cifar-10-python.tar.gz"),
    ("--root file", "--root"), ("--steps 10000000000000", "--steps"), ("--channels 0", "--channels must be"),
    ("--dataset ~nobody/x", "--dataset ~nobody/x does not exist"), ("--device meta", "--device meta is not"),
])
def test_errors_are_one_sentence(script, capsys, tmp_path, args, words):
    Path("folder").mkdir()
    Path("file").write_text("a file")
    width, sizes = "--width", "16, 32, 64, 128 or 256"
    if script.__name__ == "progan":
        width, sizes = "--fmap-max", "a power of two from 4 to 1024"
    args, words = (text.format(width=width, sizes=sizes) for text in (args, words))
    before = sorted(map(str, tmp_path.rglob("*")))
    main(script, "--steps", 1, *args.split(), status=2)
    err = capsys.readouterr().err
    assert words in err and len(err.splitlines()) == 1 and err.startswith(f"{script.__name__}.py: ")
    assert [p for p in sorted(map(str, tmp_path.rglob("*"))) if "empty" not in p] == before
    assert Path("file").read_text() == "a file"


OWN = {"wgan": ["--c -1", "--c nan", "--n-critic 0", "--beta1 0"],
       "wgan_gp": ["--lam -1", "--n-critic 0", "--beta2 1"],
       "lsgan": ["--a nan", "--b inf", "--c x", "--beta1 1", "--n-critic 1"],
       "ebgan": ["--margin -1", "--pt -0.1", "--pretrain -1", "--beta1 -1"],
       "progan": ["--kimg 0", "--kimg nan", "--gamma 0", "--drift -1", "--ema 1", "--ema -0.1", "--fmap-base 0",
                  "--size 48", "--size 2048", "--beta2 1", "--n-critic 1", "--width 2", "--record"]}


@pytest.mark.parametrize("script, args", [(name, args) for name in OWN for args in OWN[name]], indirect=["script"])
def test_errors_in_a_papers_own_settings(script, capsys, args):
    main(script, "--steps", 1, *args.split(), status=2)
    err = capsys.readouterr().err
    assert args.split()[0] in err and len(err.splitlines()) == 1 and not Path("runs").exists()


def test_a_label_may_be_negative():
    lsgan = importlib.import_module("lsgan")
    main(lsgan, *"--a -1 --b 0.5 --c -2 --steps 1 --out run".split())
    assert [saved("run")["config"][name] for name in "abc"] == [-1, 0.5, -2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
@pytest.mark.parametrize("script, args, words", [
    *((name, "--device cuda", "is not on this machine") for name in SCRIPTS),
    *((name, "--record", "--record records CUDA steps") for name in FOUR)], indirect=["script"])
def test_errors_without_cuda(script, capsys, args, words):
    main(script, *args.split(), status=2)
    assert words in capsys.readouterr().err and not Path("runs").exists()


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path("trapped"),))


@pytest.mark.parametrize("damage", [lambda data: data[:len(data) // 2], lambda data: data[:20], lambda data: b"",
                                    lambda data: b"not a checkpoint", lambda data: pickle.dumps(Trap()),
                                    lambda data: pickle.dumps({"config": 3})])
@pytest.mark.parametrize("args", [["--steps", "4"], ["--generate", "2"]])
def test_a_bad_checkpoint_is_refused_not_run_and_not_overwritten(script, capsys, damage, args):
    main(script, "--steps", 2, "--out", "run")
    checkpoint = Path("run/checkpoint.pt")
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    before = {p: p.read_bytes() for p in Path("run").iterdir()}
    capsys.readouterr()
    main(script, *args, "--out", "run", status=2)
    err = capsys.readouterr().err
    assert "checkpoint.pt is damaged or no checkpoint" in err and len(err.splitlines()) == 1
    assert {p: p.read_bytes() for p in Path("run").iterdir()} == before and not Path("trapped").exists()


def test_a_torch_file_with_code_in_it_does_not_run(script, capsys):
    Path("run").mkdir()
    torch.save(Trap(), "run/checkpoint.pt")
    main(script, "--steps", 2, "--out", "run", status=2)
    assert not Path("trapped").exists()
    torch.load("run/checkpoint.pt", weights_only=False)     # the trap works
    assert Path("trapped").exists()


def test_another_scripts_checkpoint_is_refused(script, capsys):
    main(script, "--steps", 1, "--out", "run")
    checkpoint = saved("run")
    checkpoint["config"]["script"] = "cyclegan"
    torch.save(checkpoint, "run/checkpoint.pt")
    main(script, "--steps", 2, "--out", "run", status=2)
    assert "was written by cyclegan.py, not " in capsys.readouterr().err


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(script, capsys, monkeypatch, when):
    before = None
    if when == "later":
        main(script, "--steps", 4, "--out", "run", "--save-every", 2)
        before = Path("run/checkpoint.pt").read_bytes()
    def nan(images, *_, **__):
        return itertools.repeat(torch.full((8, *images.shape[1:]), float("nan")))
    monkeypatch.setattr(script, "batches", nan)
    main(script, "--steps", 8, "--out", "run", "--save-every", 2, status=2)
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "try a smaller --lr" in err
    if when == "later":
        assert "not finite at step 6 (run keeps the checkpoint of step 4)" in err
        assert "try a smaller --lr, with another --out\n" in err       # since the same --out refuses another --lr
        assert Path("run/checkpoint.pt").read_bytes() == before and not Path("run/000006.png").exists()
    else:
        assert "not finite at step 2 (there is no checkpoint yet)" in err
        assert not Path("run/checkpoint.pt").exists()


def test_weights_that_are_not_finite_are_noticed_though_the_losses_are(script, capsys):
    def broken(optimizer, *_):                              # after its last use in the step
        if 8 in optimizer.param_groups[0]["params"][0].shape[:2]:       # nz: the generator's
            optimizer.param_groups[0]["params"][0].detach()[0, 0, 0, 0] = float("nan")
    hook = register_optimizer_step_post_hook(broken)
    try:
        main(script, "--steps", 1, "--out", "run", status=2)
    finally:
        hook.remove()
    assert "not finite at step 1" in capsys.readouterr().err and not Path("run/checkpoint.pt").exists()


# ---- Own images, copying, importing ----

def test_own_images_train(script, capsys):
    Path("mine/deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, mode in enumerate(["RGB", "L", "RGBA", "P"]):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).convert(mode).save(f"mine/deep/{i}.png")
    Path("mine/bad.jpg").write_bytes(b"\xff\xd8broken")
    args = flags(tiny(script) | dict(dataset="mine", steps=1))[2:]      # without --digit
    script.main(args)
    assert "bad.jpg" in capsys.readouterr().err
    assert saved(f"runs/{script.__name__}-mine")["config"]["channels"] == 3
    assert Image.open(f"runs/{script.__name__}-mine/000001.png").mode == "RGB"
    script.main([*args, "--channels", "1", "--out", "grey"])
    assert Image.open("grey/000001.png").mode == "L"


@pytest.mark.parametrize("dataset, out", [("mine", "./mine"), ("~/mine", "~/mine")])
def test_the_folder_of_the_images_is_not_written_into(script, dataset, out, monkeypatch, capsys):
    monkeypatch.setenv("HOME", os.getcwd())
    Path("mine").mkdir()
    for i in range(2):
        Image.new("L", (8, 8)).save(f"mine/{i:06d}.png")
    with pytest.raises(SystemExit):
        script.main(flags(tiny(script) | dict(dataset=dataset, out=out, steps=1))[2:])
    assert "is the folder of the images" in capsys.readouterr().err and len(list(Path("mine").iterdir())) == 2


def test_copied_alone_with_common_it_runs(script, tmp_path):
    copy = tmp_path / "project"
    copy.mkdir()
    for name in (f"{script.__name__}.py", "common.py"):
        shutil.copy(TOP / name, copy)
    args = flags(tiny(script) | dict(steps=2, root=TOP / "data"))
    done = subprocess.run([sys.executable, f"{script.__name__}.py", *args],
                          cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (copy / "runs" / f"{script.__name__}-mnist-7" / "training.gif").exists()


def test_importing_has_no_side_effect(script, tmp_path):
    code = f"""
import sys, signal, random, torch, numpy
sys.path.insert(0, {str(TOP)!r})
state = lambda: (torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()),
                 torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
                 signal.getsignal(signal.SIGINT), torch.get_float32_matmul_precision())
before = state()
import {script.__name__}
assert state() == before
"""
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())


def test_training_as_a_library_call(script):
    for steps in (1, 2):                                    # a path is as good as a string, and can be continued
        G, D = script.train(steps=steps, out=Path("run"), **tiny(script) | dict(device=torch.device("cpu")))
    x = G(torch.randn(5, 8))
    assert (script.energy(D, x) if script.__name__ == "ebgan" else D(x)).shape == (5,)
    with pytest.raises(ValueError, match="--steps"):
        script.train(steps=0, out="run2")


def test_it_trains_outside_the_main_thread(script):
    from threading import Thread
    thread = Thread(target=main, args=(script, "--steps", 2, "--out", "run"))
    thread.start()
    thread.join()
    assert saved("run")["step"] == 2


# ---- CUDA ----

@pytest.fixture
def exact(monkeypatch):
    """Without TF32 and with deterministic kernels, so that two ways to make a step can be compared closely"""
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.mark.cuda
@pytest.mark.parametrize("script", FOUR, indirect=True)
def test_a_recorded_step_equals_an_eager_one(script, exact):
    for out, more in (("eager", []), ("recorded", ["--record"])):
        main(script, "--steps", 12, "--save-every", 4, "--out", out, "--device", "cuda", *more)
    a, b = saved("eager"), saved("recorded")
    for name in ("G", "D"):
        for key in a[name]:
            torch.testing.assert_close(a[name][key], b[name][key], rtol=1e-4, atol=1e-5)
    assert_same(a["rng"], b["rng"])
    for x, y in zip(rows("eager"), rows("recorded")):
        for name in x.keys() - {"seconds"}:
            np.testing.assert_allclose(float(x[name]), float(y[name]), rtol=1e-3, atol=1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("script", FOUR, indirect=True)
def test_a_recorded_run_continues(script, exact):
    main(script, "--steps", 12, "--out", "whole", "--device", "cuda", "--record")
    main(script, "--steps", 6, "--out", "parts", "--device", "cuda", "--record")
    main(script, "--steps", 12, "--out", "parts", "--device", "cuda", "--record")
    for key, value in saved("whole")["G"].items():
        torch.testing.assert_close(value, saved("parts")["G"][key], rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
def test_a_checkpoint_moves_between_cpu_and_cuda(script):
    main(script, "--steps", 2, "--out", "run")
    main(script, "--steps", 4, "--out", "run", "--device", "cuda")
    record = ["--record"] if script.__name__ in FOUR else []
    main(script, "--steps", 8, "--out", "run", "--device", "cuda", *record)
    main(script, "--steps", 9, "--out", "run", "--device", "cpu")
    assert saved("run")["step"] == 9
    on_cpu, on_cuda = (np.stack([np.asarray(Image.open(p), dtype=float) for p in sorted(folder.iterdir())])
                       for folder in (script.generate("run", 3, "cpu"), script.generate("run", 3, "cuda")))
    assert np.abs(on_cpu - on_cuda).max() <= 2


@pytest.mark.cuda
def test_images_that_do_not_fit_are_copied_batch_by_batch(script, monkeypatch, capsys):
    import common
    main(script, "--steps", 3, "--out", "resident", "--device", "cuda")
    free = common.free_memory
    monkeypatch.setattr(common, "free_memory", lambda device="cpu": free() if device == "cpu" else 1000)
    main(script, "--steps", 3, "--out", "copied", "--device", "cuda")
    assert saved("copied")["step"] == 3
    if script.__name__ == "progan":
        return
    main(script, "--steps", 9, "--out", "recorded", "--device", "cuda", "--record", status=2)
    assert "--record needs the images in the GPU's memory" in capsys.readouterr().err
