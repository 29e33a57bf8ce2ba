"""What can be checked of README.md, docs/ and the measurements without training"""
import ast
import importlib
import itertools
import re
import sys
from pathlib import Path

import pytest
import torch

TOP = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP / "docs"))
import claims  # noqa: E402

SCRIPTS = ["wgan", "wgan_gp", "lsgan", "ebgan", "progan"]
README, CLAIMS = ((TOP / name).read_text(encoding="utf-8") for name in ("README.md", "docs/claims.md"))


def words(text):
    return " ".join(text.split())


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_readmes_table_has_the_lines_and_minutes_of_the_scripts(name):
    (row,) = re.findall(rf"^\| \[{name}\.py\]\({name}\.py\).*$", README, re.MULTILINE)
    cells, source = [cell.strip() for cell in row.split("|")], (TOP / f"{name}.py").read_text(encoding="utf-8")
    assert cells[4] == str(len(source.splitlines()))
    assert cells[5] == re.search(r"^Measured: .*?([\d.]+) min", source, re.MULTILINE | re.DOTALL)[1]
    assert re.fullmatch(r"[\d.]+ ± [\d.]+", cells[6])


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_readme_has_every_difference_from_the_paper(name):
    text = ast.get_docstring(ast.parse((TOP / f"{name}.py").read_text(encoding="utf-8")))
    items = re.findall(r"^- .*(?:\n  .*)*", text[text.index("Differs from the paper"):], re.MULTILINE)
    assert len(items) >= 2
    section = README.split("## Differs from the paper")[1].split("\n## ")[0]
    assert words(section.split(f"**{name}.py**")[1].split("**")[0]) == words(" ".join(items))


def test_the_readme_cites_the_papers_of_the_docstrings():
    numbers = re.findall(r"arXiv:(\d{4}\.\d{5})", README)
    assert len(numbers) == README.count("@inproceedings{") == len(SCRIPTS)
    assert set(numbers) == {re.search(r"arxiv\.org/abs/(\d{4}\.\d{5})", importlib.import_module(name).__doc__)[1]
                            for name in SCRIPTS}


def test_the_readme_says_what_is_not_here():
    section = README.split("## Not here")[1].split("\n## ")[0]
    for method in ("DCGAN", "Loss-sensitive GAN", "DRAGAN", "Spectral normalisation", "CT-GAN", "SRGAN",
                   "Text to image"):
        assert re.search(rf"^- \*\*{method}\*\* \(.*?\d{{4}}\.\d{{5}}\): ", section, re.MULTILINE), method


@pytest.mark.parametrize("page", ["README.md", "docs/claims.md"])
def test_links_and_pictures_exist(page):
    text = (TOP / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        if path.startswith("http"):
            continue
        target = (TOP / page).parent / path if path else TOP / page
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads], link
    assert "@@" not in text


def test_every_picture_is_shown_and_docs_are_small():
    for path in (TOP / "docs").glob("*.png"):
        assert path.name in README + CLAIMS, path
    assert sum(path.stat().st_size for path in (TOP / "docs").rglob("*") if path.is_file()) < 3_000_000


@pytest.mark.parametrize("number", range(1, 13))
def test_every_claim_stands_beside_its_command(number):
    (section,) = re.findall(rf"^## {number}\. .*?(?=^## |\Z)", CLAIMS, re.MULTILINE | re.DOTALL)
    assert f"python docs/claims.py {number}\n" in section and hasattr(claims, f"claim_{number}")
    assert re.search(r"^\|---", section, re.MULTILINE) and "ot measured yet" not in section


@pytest.mark.parametrize("name", claims.JOBS)
def test_the_runs_of_the_claims_can_be_started(name, tmp_path, monkeypatch):
    """Its edits still find their lines, the copy can be imported, and its flags are the script's"""
    monkeypatch.setattr(claims, "RUNS", tmp_path)
    job, path = claims.JOBS[name], claims.script_of(name)
    source = (TOP / path.name).read_text(encoding="utf-8")
    assert (path.read_text(encoding="utf-8") != source) == bool(job.edits)
    assert path.name == f"{job.script}.py" and job.steps % job.every == 0
    script, _ = claims.opened(name, 0)
    assert script.SCRIPT == job.script and script.__file__ == str(path)
    seen = []

    def stop(settings):
        seen.append(settings)
        raise KeyboardInterrupt
    monkeypatch.setattr(script, "start", stop)              # train() starts with it
    with pytest.raises(SystemExit):
        script.main([*job.flags.split(), "--steps", str(job.every)])
    assert seen[0]["steps"] == job.every and seen[0]["dataset"] == "mnist" and seen[0]["digit"] is None


def test_a_run_of_a_claim_is_trained_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RUNS", tmp_path)
    line = "            penalty = (grad_norm(D, x_hat) - 1) ** 2"
    flags = "--width 1 --size 16 --batch-size 4"
    monkeypatch.setitem(claims.JOBS, "small", claims.Run("wgan_gp", 4, 2, flags, (0, 1), {line: line + " * 0"}))
    claims.train_all(["small"])                             # both at once, from one copy
    copied = (tmp_path / "small" / "wgan_gp.py").stat().st_mtime_ns
    for seed, step in itertools.product((0, 1), (2, 4)):
        script, run = claims.opened("small", seed, step)
        saved = script.read(run)
        assert saved["step"] == step and saved["config"]["seed"] == seed and saved["config"]["width"] == 1
        head, *rows = saved["log"]
        assert rows[-1][head.index("penalty")] == 0         # the changed copy was trained
    assert script.__file__ == str(tmp_path / "small" / "wgan_gp.py")
    assert (tmp_path / "small" / "wgan_gp.py").stat().st_mtime_ns == copied     # no run reads it half written
    before = (tmp_path / "small" / "1" / "checkpoint.pt").stat().st_mtime_ns
    claims.train_all(["small"])                             # all is there: nothing is trained again
    assert (tmp_path / "small" / "1" / "checkpoint.pt").stat().st_mtime_ns == before


def test_a_run_that_is_already_farther_is_not_kept_as_an_earlier_step(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RUNS", tmp_path)
    flags = "--width 1 --size 16 --batch-size 4"
    monkeypatch.setitem(claims.JOBS, "small", claims.Run("wgan", 4, 4, flags, (0,)))
    claims.train("small", 0)
    monkeypatch.setitem(claims.JOBS, "small", claims.Run("wgan", 4, 2, flags, (0,)))
    with pytest.raises(ValueError, match="at step 4, beyond 2"):
        claims.train("small", 0)


@pytest.mark.parametrize("name", [name for name, job in claims.JOBS.items() if job.edits])
def test_the_edits_do_what_their_names_say(name, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RUNS", tmp_path)
    script, own = claims.opened(name, 0)[0], importlib.import_module(claims.JOBS[name].script)
    x = torch.randn(4, 6, 8, 8)
    if claims.JOBS[name].script == "progan":
        settings = dict(fmap_max=3, kimg=0.001, nz=4, size=8, batch_size=2)
        changed = {"growing": script.schedule(0, 32, 20) == (32, 1.0) == script.schedule(10**6, 32, 20),
                   "stddev": bool((script.minibatch_stddev(x)[:, 6] == 0).all()),
                   "pixel-norm": torch.equal(script.pixel_norm(x), x),
                   "equalised-lr": script.Conv(64, 64, 3).scale == 1}
        assert [f"progan-without-{what}" for what, so in changed.items() if so] == [name]
        for conv in (script.Conv(64, 64, 3), own.Conv(64, 64, 3)):      # the same weights at run time
            assert (conv.scale * conv.weight).std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.03)
    else:
        settings = dict(width=1, nz=4, size=16, batch_size=4)
    for module in (script, own):
        module.train(**settings, steps=2, device="cpu", out=module.__name__ + str(module is own))
    saved, before = (module.read(module.__name__ + str(module is own)) for module in (script, own))
    groups = {key: saved[key]["param_groups"][0] for key in ("opt_G", "opt_D")}
    momentum = {"wgan-adam-0.9": 0.9, "wgan-adam-0": 0.0}
    if name in momentum:
        assert groups["opt_D"]["betas"] == (momentum[name], 0.99) and groups["opt_D"]["maximize"]
        assert "betas" not in groups["opt_G"] and groups["opt_D"]["lr"] == 5e-5
    elif name == "wgan_gp-rmsprop":
        assert all("betas" not in group and group["alpha"] == 0.99 and group["lr"] == 5e-5
                   and not group["maximize"] for group in groups.values())
    elif name == "wgan_gp-one-sided":                       # at the start all norms are below 1
        penalty, two_sided = (each["log"][-1][each["log"][0].index("penalty")] for each in (saved, before))
        assert penalty == 0 and two_sided > 0.5


def test_an_edit_that_no_longer_fits_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RUNS", tmp_path)
    monkeypatch.setitem(claims.JOBS, "small", claims.Run("wgan_gp", 4, 2, edits={"    no such line": ""}))
    with pytest.raises(ValueError, match="no longer exactly one line"):
        claims.script_of("small")


def test_the_table_of_claim_3_is_current(monkeypatch, capsys):
    """It needs no training; the others do"""
    class Nothing:
        def __getattr__(self, name):
            return lambda *_, **__: None
    monkeypatch.setattr(claims, "plot", lambda *_: (Nothing(), (Nothing(), Nothing())))
    claims.claim_3()
    table = capsys.readouterr().out
    assert len(table.splitlines()) == 5 and table in CLAIMS


@pytest.mark.parametrize("words, sentence", [
    (["13"], "numbers of claims, 1 to 12, not 13"), (["train", "gan"], "the runs are wgan, .*, not gan"),
    (["12"], "is not there: python docs/claims.py train wgan_gp$")])
def test_errors_of_the_claims_say_what_to_do(words, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RUNS", tmp_path)
    with pytest.raises(ValueError, match=sentence):
        claims.main(words)


def test_rank_correlation():
    assert claims.rank_correlation([1.0, 2.0, 3.0, 10.0], [0.1, 0.2, 5.0, 6.0]) == pytest.approx(1)
    assert claims.rank_correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)
    assert claims.rank_correlation([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 3.0]) == pytest.approx(0.6)
    assert claims.rank_correlation([3.0, 1.0, 2.0, 5.0], [30.0, 10.0, 20.0, 1.0]) == pytest.approx(-0.2)


def test_covered():
    shares = torch.tensor([0.5, 0.4701, 0.02, 0.0099, 0, 0, 0, 0, 0, 0])
    assert claims.covered({"classes": shares}) == 3


def commands(text):
    """Lines of the shell that run something in tests/ or docs/, as words"""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line.split() for block in blocks for line in block.splitlines()
            if re.match(r"python (tests|docs)/", line)]


@pytest.mark.parametrize("page", [README, CLAIMS], ids=["README", "claims"])
def test_commands_of_the_measurements_parse(page, monkeypatch, capsys):
    for _, path, *rest in commands(page):
        assert (TOP / path).exists()
        module, seen = importlib.import_module(Path(path).stem), []
        if path == "docs/claims.py":
            first, *names = rest
            assert first in ("train", "pictures") or f"claim_{first}" in vars(claims), rest
            assert not names or first == "train" and set(names) <= claims.JOBS.keys(), rest
        elif path == "tests/benchmark.py":
            assert all(hasattr(module, word) and f"\n{word} " in module.__doc__ for word in rest), rest
        elif path == "tests/evaluate.py":
            monkeypatch.setattr(module, "compare", seen.append)
            module.main(rest)
            assert seen[0].runs
        else:
            assert path == "tests/swd.py", path
            with pytest.raises(SystemExit) as end:          # no such folders here, but the words are understood
                module.main(rest)
            assert end.value.code == 2 and "usage" not in capsys.readouterr().err


def test_there_are_commands_to_parse():
    assert len(commands(README)) >= 4 and len(commands(CLAIMS)) >= 12
