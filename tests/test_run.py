"""What surrounds the algorithms: files, continuing, Ctrl-C, errors, generating. The run block is the same to the
letter in the four small scripts, so it is tested on wgan_gp.py, and on progan.py, which has its own"""
import ast
import csv
import errno
import importlib
import inspect
import io
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

import common
from truth import assert_same, training

TOP = Path(__file__).resolve().parent.parent
FOUR = ["wgan", "wgan_gp", "lsgan", "ebgan"]
SCRIPTS = [*FOUR, "progan"]
RELATED = ["related.sngan", "related.dragan", "related.ctgan", "related.ls_gan"]
OWN_RUN = ["related.semi_supervised", "related.improved_gan"]      # in a few functions of the run block
TINY = dict(digit=7, size=16, nz=8, batch_size=8, device="cpu")
SMALL = dict(progan=dict(fmap_max=3, kimg=0.008),           # grows after every step
             semi_supervised=dict(size=28, width=2, labels=10),
             srgan=dict(size=32, crop=16, blocks=1, width=2, pretrain=2, held_out=4))
KILLS = int(os.environ.get("KILLS", 1))                     # KILLS=20 python -m pytest -k kill


@pytest.fixture(params=["wgan_gp", "progan"])
def script(request):
    return importlib.import_module(request.param)


@pytest.fixture(params=SCRIPTS)
def each(request):
    return importlib.import_module(request.param)


@pytest.fixture(params=SCRIPTS + RELATED + OWN_RUN)
def every(request):
    return importlib.import_module(request.param)


def tiny(script):
    settings = TINY | SMALL.get(script.SCRIPT, dict(width=2))
    return {name: it for name, it in settings.items() if name in inspect.signature(script.train).parameters}


def flags(settings):
    return [str(word) for name, value in settings.items() for word in ("--" + name.replace("_", "-"), value)]


def main(script, args, status=None):
    """The command line in this process; with a status, it must end with that SystemExit"""
    words = [*flags(tiny(script)), *args.split()]
    if status is None:
        return script.main(words)
    with pytest.raises(SystemExit) as end:
        script.main(words)
    assert end.value.code == status


def assert_goes_on(script, out, done):
    """Two steps more end where a run that was never stopped ends"""
    main(script, f"--steps {done + 2} --out {out} --save-every 1000")
    main(script, f"--steps {done + 2} --out {out}-whole --save-every 1000")
    assert_same(training(script, out), training(script, f"{out}-whole"))


def rows(out):
    with open(Path(out, "log.csv")) as file:
        return list(csv.DictReader(file))


def content(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file() and p.suffix != ".gif"}


# ---- A run's files ----

def test_a_run_writes_its_files(script, capsys):
    main(script, "--steps 7 --save-every 3")
    name = script.SCRIPT
    folder = Path("runs", f"{name}-mnist-7")
    assert " ".join(sorted(p.name for p in folder.iterdir())) == (
        ".run 000003.png 000006.png 000007.png checkpoint.pt curve.png log.csv real.png training.gif")
    assert Image.open(folder / "real.png").size == (32, 32)             # 8 images: 2x2 of 16 pixels
    side = 128 if name != "progan" else 8 * script.load(folder).grown[0]
    assert Image.open(folder / "000007.png").size == (side, side)       # 64 latents: 8x8
    assert Image.open(folder / "training.gif").n_frames == 3
    log = rows(folder)
    assert [row["step"] for row in log] == ["3", "6", "7"]
    assert all(np.isfinite(float(value)) for row in log for value in row.values())
    assert list(log[0])[2 if name != "progan" else 5] == "wasserstein"      # the first curve
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ["6,265 images from mnist", "device: cpu", f"run folder: {folder}", "0 of 7 steps are done"]
    assert re.match(r"step 7/7  .*\bL_D -?[\d.]+.* steps/s  0 min left", lines[-1])


def test_rows_are_means_since_the_row_before(script):
    main(script, "--steps 6 --save-every 1 --out each")
    main(script, "--steps 6 --save-every 3 --out three")
    every, three = rows("each"), rows("three")
    place = {"step", "images", "resolution", "alpha"} & every[0].keys()     # of the last step, no mean
    for i, row in enumerate(three):
        assert all(row[name] == every[3 * i + 2][name] for name in place)
        for name in row.keys() - place - {"seconds"}:
            mean = np.mean([float(one[name]) for one in every[3 * i:3 * i + 3]])
            np.testing.assert_allclose(float(row[name]), mean, rtol=1e-4, atol=1e-6)
    assert_same(training(script, "each"), training(script, "three"))    # how often it saves changes nothing


def test_pictures_show_the_same_latents_with_running_statistics():
    script = importlib.import_module("wgan_gp")
    main(script, "--steps 2 --out run --save-every 1")
    G = script.load("run")
    z = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    shown = np.asarray(Image.open("run/000002.png"), dtype=float).reshape(8, 16, 8, 16).transpose(0, 2, 1, 3)
    for x, near in ((G(z), True), (G.train()(z), False)):
        off = np.abs(shown.reshape(64, 16, 16) - ((x[:, 0].clamp(-1, 1) + 1) * 127.5).round().numpy()).max()
        assert (off <= 1) == near


@pytest.mark.parametrize("each", SCRIPTS + ["related.srgan"], indirect=True)
def test_one_seed_one_run_and_another_seed_another(each):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        main(each, f"--steps 1 --out {out} --seed {seed}")
    a, b, c = (training(each, out) for out in "abc")
    assert_same(a, b)
    for part in ("G", "D", "states"):
        with pytest.raises(AssertionError):
            assert_same(a[part], c[part])


@pytest.mark.parametrize("every", SCRIPTS + RELATED + ["related.improved_gan"], indirect=True)
@pytest.mark.parametrize("more", ["--batch-size 1", "--batch-size 7 --channels 3 --size 32"])
def test_any_batch_size_trains(every, more):
    main(every, f"--steps 2 --out run {more}")
    assert all(np.isfinite(float(value)) for row in rows("run") for value in row.values())


def test_keep_keeps_the_weights_of_every_picture(script):
    main(script, "--steps 4 --save-every 2 --out run --keep")
    main(script, "--steps 2 --out two")
    assert sorted(p.name for p in Path("run").glob("0*.pt")) == ["000002.pt", "000004.pt"]
    assert_same(training(script, "run/000002.pt"), training(script, "two"))
    for kept, whole in zip(script.load("run/000002.pt").parameters(), script.load("two").parameters()):
        assert torch.equal(kept, whole)
    main(script, "--generate 2 --out run/000002.pt")
    assert [p.name for p in sorted(Path("run/000002").iterdir())] == ["000000.png", "000001.png"]
    shutil.copy("run/000002.pt", "run/checkpoint.pt")       # to go on from there
    main(script, "--steps 4 --out run")
    assert_same(training(script, "run"), training(script, "run/000004.pt"))


# ---- Continue ----

def test_three_steps_and_three_steps_are_six_steps(every, capsys):
    main(every, "--steps 6 --out whole")
    main(every, "--steps 3 --out parts")
    capsys.readouterr()
    main(every, "--steps 6 --out parts")
    assert "3 of 6 steps are done" in capsys.readouterr().out
    assert_same(training(every, "whole"), training(every, "parts"))
    assert [row["step"] for row in rows("parts")] == ["3", "6"]
    assert float(rows("parts")[1]["seconds"]) > float(rows("parts")[0]["seconds"])
    before = content("parts")
    G, D = every.train(**tiny(every), steps=6, out="parts")
    assert "6 of 6 steps are done" in capsys.readouterr().out and content("parts") == before
    x = G(torch.randn(3, 8))                                # ready to be called: an image depends on its z alone
    saved = every.read("parts")
    for network, name in ((G, "G"), (D, "D")):             # or what was averaged
        name = f"{name}_ema" if f"{name}_ema" in saved else name
        assert_same(dict(network.state_dict()), dict(saved[name]))
    size = tiny(every)["size"]
    assert x.shape == (3, 1, size, size) and not G.training


def test_files_without_a_checkpoint_do_not_matter(script):
    main(script, "--steps 2 --out reference")
    Path("run").mkdir()
    for name in ("log.csv", ".run"):
        Path("run", name).write_text("old")
    for name in ("0123abcd", "89abcdef"):                   # of a killed run; of another
        Path("run", f".checkpoint.pt.{name}.part").write_bytes(b"half a checkpoint")
    os.utime("run/.checkpoint.pt.0123abcd.part", (0, 0))
    main(script, "--steps 2 --out run")
    assert [p.name for p in Path("run").glob(".*.part")] == [".checkpoint.pt.89abcdef.part"]
    assert_same(training(script, "run"), training(script, "reference"))
    assert [row["step"] for row in rows("run")] == ["2"]


@pytest.mark.parametrize("attempt", range(KILLS))
def test_a_copy_beside_common_alone_runs_and_goes_on_after_a_kill_at_any_moment(attempt):
    running = []
    for script in map(importlib.import_module, ("wgan_gp", "progan")):
        name, out = script.SCRIPT, Path(script.SCRIPT, "runs", f"{script.SCRIPT}-mnist-7")
        Path(name).mkdir()
        for file in (script.__file__, TOP / "common.py"):
            shutil.copy(file, name)
        words = [f"{name}.py", *flags(tiny(script)), *f"--steps 1000000 --save-every 1 --root {TOP}/data".split()]
        running.append((script, out, subprocess.Popen([sys.executable, *words], cwd=name)))
    for _, out, process in running:
        while not Path(out, "checkpoint.pt").exists():
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(random.random() / 2)                     # at any moment
        process.kill()
        assert process.wait() == -signal.SIGKILL and Path(out, "curve.png").exists()
    for script, out, _ in running:
        done = script.read(out)["run"][0]
        assert_goes_on(script, out, done)
        assert [int(row["step"]) for row in rows(out)] == [*range(1, done + 1), done + 2]


def test_a_checkpoint_half_written_leaves_the_old_one(script, monkeypatch):
    main(script, "--steps 2 --out run")
    before = Path("run/checkpoint.pt").read_bytes()

    def killed(checkpoint, file):
        file.write(before[:1000])
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, "save", killed)
    main(script, "--steps 4 --out run", status=130)
    assert Path("run/checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("script", ["wgan_gp", "progan", "related.srgan"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(script, capsys, monkeypatch, number):
    log = script.Run.log

    def pressed(run, *place, **losses):
        if run.step == 5:
            signal.getsignal(number)(number, None)          # what the system would call
        log(run, *place, **losses)
    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "log", pressed)
        main(script, "--steps 9 --out run --save-every 3", status=130)
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "the same command goes on" in err
    assert [row["step"] for row in rows("run")] == ["3", "5"]               # at once, not with the next row
    assert Path("run/000005.png").exists() and Path("run/training.gif").exists()
    assert_goes_on(script, "run", 5)


@pytest.mark.parametrize("name, value", [("lr", 0.5), ("digit", 8), ("seed", 1), ("nz", 9), ("size", 32),
                                         ("channels", 3), ("dataset", "fashion-mnist")])
def test_continuing_with_another_setting_is_refused_and_nothing_overwritten(script, capsys, monkeypatch, name,
                                                                            value):
    main(script, "--steps 1 --out run")
    if name == "dataset":                                   # without a network
        images = script.load_images("mnist", 7, 16)
        monkeypatch.setattr(script, "load_images", lambda *_, **__: images)
    before, was = content("run"), script.read("run")["settings"][name]
    capsys.readouterr()
    main(script, f"--steps 2 --out run --{name.replace('_', '-')} {value}", status=2)
    err = capsys.readouterr().err
    assert f"{name} {was}, not {value}" in err and len(err.splitlines()) == 1 and content("run") == before


def test_place_root_and_save_every_may_change_and_signal_handlers_are_put_back(script):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)            # as nohup does: it stays so
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    main(script, "--steps 2 --out here")
    shutil.move("here", "there")
    main(script, f"--steps 4 --out there --save-every 1 --keep --root {TOP / 'data'}")
    assert script.read("there")["run"][0] == 4
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with common.stop_signals():
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and signal.getsignal(signal.SIGINT) != before[0]
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_how_a_step_is_made_is_this_runs_not_the_checkpoints(script):
    main(script, "--steps 2 --out run")
    groups, checkpoint = script.read("run")["opt_D"]["param_groups"], script.read("run")
    for name in ("opt_G", "opt_D"):                         # as saved by a recorded run on CUDA
        checkpoint[name]["param_groups"][0].update(capturable=True)
    torch.save({script.SCRIPT: checkpoint}, "run/checkpoint.pt")
    main(script, "--steps 3 --out run")
    assert_same(script.read("run")["opt_D"]["param_groups"], groups)


def own_images(folder, n, script):
    """n small photographs in a folder, and the settings of a tiny run on them"""
    Path(folder).mkdir(exist_ok=True)
    for i in range(n):
        Image.new("RGB", (20, 20), (40 * i, 0, 0)).save(Path(folder, f"{i}.png"))
    return tiny(script) | dict(digit=None)


def test_what_may_change_is_said_and_a_moved_folder_is_the_same(script, capsys):
    settings = own_images("mine", 4, script)
    script.train(**settings, dataset="mine", steps=2)
    Path("elsewhere").mkdir()
    for name in ("runs", "mine"):
        shutil.move(name, "elsewhere")
    os.chdir("elsewhere")
    capsys.readouterr()
    script.train(**settings, dataset=os.path.abspath("mine"), steps=3)
    assert " -> " not in capsys.readouterr().out
    own_images("mine", 5, script)
    script.train(**settings | dict(batch_size=3), dataset="./mine/", steps=4)
    out = capsys.readouterr().out
    assert "batch_size 8 -> 3 from step 4 on" in out and "images 4 -> 5 from step 4 on" in out
    assert [row["step"] for row in rows(f"runs/{script.SCRIPT}-mine")] == ["2", "3", "4"]


def test_pictures_of_a_run_that_was_killed_early_are_no_images(script, capsys, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt
    settings = own_images(".", 3, script)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", killed)
        script.train(**settings, dataset=".", steps=1)
    capsys.readouterr()
    script.train(**settings, dataset=".", steps=1)
    assert "3 images from .; left out: 1 run folders\n" in capsys.readouterr().out


def test_a_run_folder_that_is_in_use_is_refused(script, capsys, monkeypatch):
    def taken(*_):
        raise BlockingIOError(errno.EAGAIN, "")
    main(script, "--steps 1 --out run")
    before = content("run")
    monkeypatch.setattr(common.fcntl, "lockf", taken)
    main(script, "--steps 2 --out run", status=2)
    assert "another run is writing to run" in capsys.readouterr().err and content("run") == before


@pytest.mark.parametrize("each", SCRIPTS + ["related.srgan"], indirect=True)
def test_numbers_of_any_kind_and_a_checkpoint_that_can_be_read(each):
    kinds = {name: type(parameter.default) for name, parameter in inspect.signature(each.train).parameters.items()}
    settings = {name: np.int64(value) for name, value in tiny(each).items() if kinds[name] is int}
    settings |= {name: int(name not in ("beta1", "beta2")) for name, kind in kinds.items() if kind is float}
    each.train(**tiny(each) | settings, steps=np.int64(1), out="whole")     # whole numbers where floats are meant
    each.train(**tiny(each) | dict(lr=np.float64(1e-3)), steps=1, out="numpy")
    assert each.load("numpy") and each.read("whole")["settings"]["lr"] == 1
    with pytest.raises(ValueError, match="lr must be a number"):
        each.train(**tiny(each) | dict(lr="0.1"))


def test_too_little_memory_is_one_sentence(script, capsys):
    main(script, "--steps 1 --out run --batch-size 1000000000000000", status=2)
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "out of memory, size 16, batch_size 1000000000000000" in err


def test_a_reader_of_the_output_that_goes_away(script, capsys, monkeypatch, tmp_path):
    class Closed(io.StringIO):                              # as after | head -5
        def write(self, text):
            if text.startswith("step 1/"):
                raise BrokenPipeError

        def fileno(self):
            return file.fileno()
    with open(tmp_path / "pipe", "w") as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed())
        main(script, "--steps 5 --save-every 1 --out run", status=141)
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "nothing reads its output" in err
    assert_goes_on(script, "run", 1)                        # nothing is lost


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_a_terminal_cannot_show_is_replaced(each, monkeypatch, encoding):
    own_images("фото", 2, each)
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as end:
            each.main(["--help"])
        settings = {name: it for name, it in tiny(each).items() if name != "digit"}
        each.main(flags(settings | dict(dataset="фото", steps=1)))
        stdout.flush()
    shown = stdout.buffer.getvalue().decode(encoding)
    assert end.value.code == 0 and f"run folder: runs/{each.SCRIPT}-????" in shown


@pytest.mark.parametrize("every", SCRIPTS + RELATED + OWN_RUN + ["related.srgan"], indirect=True)
def test_in_a_notebook_and_in_a_package(every):
    source = Path(every.__file__).read_text(encoding="utf-8")
    cell = dict(__name__="cell")
    exec(source, cell)                                      # has no __file__
    cell["train"](**tiny(every), steps=1)
    assert cell["load"](*Path("runs").glob("notebook-mnist*"))
    Path("gans").mkdir()
    Path("gans/it.py").write_text(source.replace("\nfrom common import", "\nfrom .common import"), encoding="utf-8")
    shutil.copy(common.__file__, "gans")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path.cwd())
        assert importlib.import_module("gans.it").Generator
        for name in ("gans", "gans.it", "gans.common"):
            sys.modules.pop(name)


# ---- Generate and load ----

def test_a_generated_image_is_the_loaded_generators(every, capsys):
    main(every, "--steps 2 --out run --size 32")
    G = every.load("run")
    assert not G.training
    main(every, "--generate 67 --out run --size 256 --seed 5")           # networks come from the checkpoint
    folder = Path("run/generated")
    assert f"67 images in {folder}" in capsys.readouterr().out
    assert sorted(p.name for p in folder.iterdir()) == [f"{i:06d}.png" for i in range(67)]
    x = G(torch.randn(64, 8, generator=torch.Generator().manual_seed(5)))
    for i in range(3):
        shown, image = np.asarray(Image.open(folder / f"{i:06d}.png"), dtype=float), x[i, 0].clamp(-1, 1)
        image = image[2:-2, 2:-2] if len(image) == 32 else image        # MNIST's own 28x28
        assert np.abs(shown - ((image + 1) * 127.5).round().numpy()).max() <= 1
        torch.testing.assert_close(G(torch.cat([x.new_zeros(1, 8), torch.randn(
            64, 8, generator=torch.Generator().manual_seed(5))[i:i + 1]]))[1], x[i], rtol=1e-3, atol=1e-4)
    first = [p.read_bytes() for p in sorted(folder.iterdir())]
    main(every, "--generate 0 --out run", status=2)
    shutil.rmtree(folder)
    for n in 5, 62:                                         # image i does not depend on how many come at a time
        assert every.generate("run", n, "cpu", 5) == folder
    assert [p.read_bytes() for p in sorted(folder.iterdir())] == first
    (folder / "000001.png").unlink()                        # counted on from the last, and nothing is touched
    (folder / "mine.png").write_bytes(b"mine")
    main(every, "--generate 3 --out run --seed 6")
    assert "3 images in" in (out := capsys.readouterr().out) and "from 000067.png on" in out
    assert len(list(folder.iterdir())) == 70 and (folder / "mine.png").read_bytes() == b"mine"
    noise = torch.Generator().manual_seed(6)
    x = G(torch.cat([torch.randn(64, 8, generator=noise) for _ in range(2)]))[67, 0]
    shown = np.asarray(Image.open(folder / "000067.png"), dtype=float)
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().detach().numpy()
    assert np.abs(shown - (x[2:-2, 2:-2] if len(x) == 32 else x)).max() <= 1


# ---- Errors: one sentence, status 2, nothing written ----

@pytest.mark.parametrize("args, word", [
    ("--dataset nowhere", "nowhere"), ("--digit 11", "--digit"), ("--dataset folder", "--digit"),
    ("--batch-size 0", "batch"), ("--size 33", "--size"), ("--steps -1", "steps"), ("--steps 0", "steps"),
    ("--save-every 0", "save_every"), ("--nz 0", "nz"), ("--lr -1", "learning rate"), ("--lr x", "--lr"),
    ("--beta2 1", "beta"), ("--channels 2", "--channels"), ("--device nothing", "--device nothing"),
    ("--device meta", "--device meta"), ("--out file/run", "file"), ("--out file", "file"),
    ("--unknown 3", "--unknown"), ("--dataset cifar10 --root empty", "cifar-10-python.tar.gz"),
    ("--generate x", "--generate"), ("--generate 3 --out nowhere", "nowhere")])
def test_errors_are_one_sentence(script, capsys, args, word):
    Path("folder").mkdir()
    Path("file").write_text("a file")
    main(script, f"--steps 1 {args}", status=2)
    err = capsys.readouterr().err
    assert word in err and len(err.splitlines()) == 1 and err.startswith(f"{script.SCRIPT}.py: ")
    assert Path("file").read_text() == "a file" and not list(Path().rglob("*.pt"))


@pytest.mark.parametrize("args", ["wgan --n-critic 0", "wgan_gp --n-critic 0", "lsgan --width 0", "ebgan --width 0",
    "related.sngan --n-dis 0", "related.ctgan --examples 0", "related.ls_gan --c nan",
    "progan --kimg 0", "progan --gamma 1e200", "progan --fmap-max 0", "progan --size 2048"])
def test_errors_in_a_papers_own_settings(capsys, args):
    name, flag, value = args.split()
    main(importlib.import_module(name), f"--steps 1 {flag} {value}", status=2)
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and flag[2:].replace("-", "_") in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_an_error_without_cuda(capsys):
    main(importlib.import_module("wgan_gp"), "--device cuda", status=2)
    err = capsys.readouterr().err
    assert "--device cuda" in err and len(err.splitlines()) == 1


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path("trapped"),))


@pytest.mark.parametrize("damage", [lambda data: data[:len(data) // 2], lambda data: data[:20], lambda data: b"",
                                    lambda data: b"not a checkpoint", lambda data: pickle.dumps(Trap(), 2), "torch",
                                    "another script's", "not a dictionary"])
def test_a_bad_checkpoint_is_refused_not_run_and_not_overwritten(script, capsys, damage):
    main(script, "--steps 1 --out run")
    checkpoint = Path("run/checkpoint.pt")
    if callable(damage):
        checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    else:
        others = {"torch": Trap(), "another script's": {"cyclegan": 3}, "not a dictionary": 3}
        torch.save(others[damage], checkpoint)
    before = content("run")
    for args in ("--steps 4 --out run", "--generate 2 --out run"):
        capsys.readouterr()
        main(script, args, status=2)
        assert "checkpoint.pt is missing, damaged or not of" in capsys.readouterr().err
    assert content("run") == before and not Path("trapped").exists()


@pytest.mark.parametrize("where, value", [
    ("settings", None), ("settings", 3), ("settings nz", None), ("settings nz", "16"), ("run", None), ("run", 5),
    *(("run", run) for run in [(1, 2.0), (1, 2.0, [], [torch.zeros(3)], 8), (-1, 2.0, [], [], 8),
                               ("1", 2.0, [], [], 8), (1, 2.0, None, [], 8), (1, 2.0, [3], [], 8)]),
    ("opt_D state 0 exp_avg", torch.zeros(3)), ("opt_D", None), ("opt_G", {"state": 3}), ("D", None), ("D", 3),
    ("G", {}), ("G", {"0.weight": torch.zeros(3)})])
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(script, capsys, where, value):
    main(script, "--steps 1 --out run")
    checkpoint = script.read("run")
    for name in ["G", "G_ema"] if where == "G" and "G_ema" in checkpoint else [where]:
        *path, last = name.split()
        place = checkpoint
        for each in path:
            place = place.setdefault(int(each) if each.isdecimal() else each, {})
        place[last] = value
        if value is None:
            del place[last]
    torch.save({script.SCRIPT: checkpoint}, "run/checkpoint.pt")
    before = content("run")
    for args in ("--steps 4", "--generate 2")[:1 if where[:3] in ("run", "D", "opt") else 2]:
        capsys.readouterr()
        main(script, f"{args} --out run", status=2)
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and ("damaged" in err or "nz 16, not 8" in err)
        assert content("run") == before and not Path("run/generated").exists()


@pytest.mark.parametrize("broken", ["loss", "weights"])
def test_what_is_not_finite_stops_the_run_and_spares_the_checkpoint(script, capsys, monkeypatch, broken):
    main(script, "--steps 4 --out run --save-every 2")
    before, save = Path("run/checkpoint.pt").read_bytes(), script.Run.save

    def spoiled(run):
        if broken == "loss":
            run.sums["L_D"].fill_(float("nan"))
        else:                                               # so late that no loss shows it: the picture must
            for name in {"G", "G_ema"} & run.parts.keys():
                next(run.parts[name].parameters()).detach().fill_(float("nan"))
        save(run)
    monkeypatch.setattr(script.Run, "save", spoiled)
    main(script, "--steps 8 --out run --save-every 2", status=2)
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "nan" in err
    assert Path("run/checkpoint.pt").read_bytes() == before and not Path("run/000006.png").exists()


# ---- Own images, copying, importing, help ----

def test_own_images_train(script):
    Path("mine/deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, mode in enumerate(["RGB", "L", "RGBA", "P"]):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).convert(mode).save(f"mine/deep/{i}.png")
    settings = {name: value for name, value in tiny(script).items() if name != "digit"}
    script.train(**settings, dataset=Path("mine"), steps=1)         # a path is as good as a string
    script.train(**settings, dataset="mine", steps=2)
    assert Image.open(f"runs/{script.SCRIPT}-mine/000001.png").mode == "RGB"
    script.train(**settings, dataset="mine", steps=1, channels=1, out=Path("grey"))
    assert Image.open("grey/000001.png").mode == "L"


def test_importing_has_no_side_effect(tmp_path):
    code = f"""
import sys, signal, random, torch, numpy
sys.path.insert(0, {str(TOP)!r})
state = lambda: (torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()),
                 torch.get_num_threads(), torch.is_grad_enabled(), signal.getsignal(signal.SIGINT))
before = state()
import {', '.join(SCRIPTS + RELATED + OWN_RUN)}, related.srgan
assert state() == before
"""
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("each", SCRIPTS + ["related.srgan"], indirect=True)
def test_help_explains_every_setting(each, capsys):
    with pytest.raises(SystemExit) as end:
        each.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and each.__doc__.strip() in text
    text, source = " ".join(text.split()), inspect.getsource(each.train)
    for setting, parameter in inspect.signature(each.train).parameters.items():
        (meaning,) = re.findall(rf"^    {setting}\b.*?,  +# +(\S.*)$", source, re.MULTILINE)
        assert f"{' '.join(meaning.split())} ({parameter.default})" in text
        assert f"--{setting.replace('_', '-')}" in text


@pytest.mark.parametrize("names, block", [
    *((FOUR, block) for block in ("import re\n.*# ---- Networks", "    # The networks\n.*?steps=")),
    *((FOUR + RELATED, block) for block in ("class Generator.*?nn.Tanh", "    seed=0,.*?eager=",
        "    device, channels.*?    images = ", "    config.images.*?    G = ",
        "    run = Run.*?    for step in run:", "# ---- The run: .*")),
    (["wgan_gp", "related.dragan", "related.ctgan"], "def grad_norm.*?\n\n")])
def test_what_scripts_share_is_the_same_to_the_letter(names, block):
    texts = [Path(importlib.import_module(name).__file__).read_text(encoding="utf-8") for name in names]
    assert len({re.search(block, text, re.DOTALL)[0] for text in texts}) == 1


def functions_of_the_run(name):
    """The source, without comments, of every function and method below "The run" """
    text = Path(importlib.import_module(name).__file__).read_text(encoding="utf-8")
    run = ast.parse(text[text.index("# ---- The run"):])
    return {each.name: ast.unparse(each) for each in ast.walk(run) if isinstance(each, ast.FunctionDef)}


@pytest.mark.parametrize("name, differing", [
    ("related.semi_supervised", "__init__ save"), ("related.improved_gan", "load main"),
    ("related.text2image", "__init__ __iter__ recorded save read load generate main"),
    ("related.srgan", "__init__ __iter__ recorded save read load generate enlarge main")])
def test_the_run_blocks_of_other_scripts_differ_only_where_they_must(name, differing):
    usual, own = functions_of_the_run("wgan_gp"), functions_of_the_run(name)
    assert {key for key in usual | own if usual.get(key) != own.get(key)} == set(differing.split())


def test_scripts_of_two_phases_run_alike():
    a, b = functions_of_the_run("related.text2image"), functions_of_the_run("related.srgan")
    assert a["__iter__"] == b["__iter__"] and a["read"] == b["read"]


# ---- CUDA ----

@pytest.mark.cuda
@pytest.mark.parametrize("script", FOUR + RELATED + OWN_RUN, indirect=True)
def test_recorded_steps_equal_eager_ones_also_after_a_stop(script, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)        # so that they can be compared closely
    graph, graphs = torch.cuda.CUDAGraph, []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graphs.append(graph()) or graphs[-1])
    for out, steps, more, count in (("eager", 12, "--eager", 0), ("recorded", 6, "", 1), ("recorded", 12, "", 2)):
        main(script, f"--steps {steps} --save-every 2 --out {out} --device cuda {more}")
        assert len(graphs) == count
    a, b = training(script, "eager"), training(script, "recorded")
    for name in ("G", "D"):
        for key in a[name]:
            torch.testing.assert_close(a[name][key], b[name][key], rtol=1e-4, atol=1e-5)
    assert_same(a["states"], b["states"])
    for x, y in zip(rows("eager"), rows("recorded"), strict=True):
        for name in x.keys() - {"seconds"}:
            np.testing.assert_allclose(float(x[name]), float(y[name]), rtol=1e-3, atol=1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("script", SCRIPTS + RELATED + OWN_RUN, indirect=True)
def test_a_checkpoint_moves_between_cpu_and_cuda(script):
    main(script, "--steps 2 --out run")
    main(script, f"--steps 4 --out run --device cuda {'--eager' if script.SCRIPT != 'progan' else ''}")
    main(script, "--steps 8 --out run --device cuda")
    main(script, "--steps 9 --out run --device cpu")
    assert script.read("run")["run"][0] == 9
    shown = []
    for device in ("cpu", "cuda"):
        folder = script.generate("run", 3, device)
        shown.append(np.stack([np.asarray(Image.open(p), dtype=float) for p in sorted(folder.iterdir())]))
        shutil.rmtree(folder)
    assert np.abs(shown[0] - shown[1]).max() <= 2


@pytest.mark.cuda
@pytest.mark.parametrize("script", SCRIPTS + RELATED + OWN_RUN[1:], indirect=True)     # digits always fit
def test_images_that_do_not_fit_are_copied_batch_by_batch(script, monkeypatch):
    free = common.free_memory
    monkeypatch.setattr(common, "free_memory", lambda device="cpu": free() if device == "cpu" else 1000)
    monkeypatch.delattr(torch.cuda, "CUDAGraph")
    main(script, "--steps 5 --out copied --device cuda")
    assert script.read("copied")["run"][0] == 5
