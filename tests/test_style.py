"""What a reader relies on: the paper's lines in order, the help, the imports, the README"""
import ast
import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest
from stripped import difference

TOP = Path(__file__).resolve().parent.parent
FOUR = ["wgan", "wgan_gp", "lsgan", "ebgan"]                # same networks, same run
SCRIPTS = [*FOUR, "progan"]
RUN = "# ---- The run: "

# Algorithm 1 of 1701.07875 and of 1704.00028, line by line, in the scripts' spelling
ALGORITHMS = {"wgan": {
    1: "while θ has not converged do", 2: "for t = 0, ..., n_critic do",
    3: "sample a batch of real data x ~ P_r", 4: "sample a batch of prior samples z ~ p(z)",
    5: "g_w ← ∇_w [1/m Σ f_w(x) − 1/m Σ f_w(g_θ(z))]", 6: "w ← w + α RMSProp(w, g_w)", 7: "w ← clip(w, −c, c)",
    8: "end for", 9: "sample a batch of prior samples z ~ p(z)", 10: "g_θ ← −∇_θ 1/m Σ f_w(g_θ(z))",
    11: "θ ← θ − α RMSProp(θ, g_θ)", 12: "end while"}, "wgan_gp": {
    1: "while θ has not converged do", 2: "for t = 1, ..., n_critic do", 3: "for i = 1, ..., m do",
    4: "sample real data x ~ P_r, latent variable z ~ p(z), a random number ε ~ U[0, 1]",
    5: "x_tilde ← G_θ(z)", 6: "x_hat ← ε x + (1 − ε) x_tilde",
    7: "L ← D_w(x_tilde) − D_w(x) + λ (‖∇_x_hat D_w(x_hat)‖₂ − 1)²", 8: "end for",
    9: "w ← Adam(∇_w 1/m Σ L, w, α, β₁, β₂)", 10: "end for", 11: "sample a batch of latent variables z ~ p(z)",
    12: "θ ← Adam(∇_θ 1/m Σ −D_w(G_θ(z)), θ, α, β₁, β₂)", 13: "end while"}}
REMARKS = "(batch dimension)", "(n_critic times)"           # ours, at the end of a line of the paper
# The papers without an algorithm: their equations, in the order in which a step needs them
EQUATIONS = {
    "lsgan": ["x ~ p_data", "z ~ p_z", "(2) min_D 1/2 E[(D(x) − b)²] + 1/2 E[(D(G(z)) − a)²]",
              "(2) min_G 1/2 E[(D(G(z)) − c)²]"],
    "ebgan": ["x ~ p_data", "z ~ p_z, one for (1) and (2): G runs once", "(1) L_D = D(x) + [m − D(G(z))]⁺",
              "(14) f_PT(S) = 1/(N(N−1)) Σ_i Σ_{j≠i} cos²(S_i, S_j)",
              "(2) L_G = D(G(z)); EBGAN-PT: + 0.1 f_PT (§2.4)"]}


def column(name):
    """The right-hand column of a script: {line of the paper: its text}"""
    lines, number = {}, None
    for line in (TOP / f"{name}.py").read_text(encoding="utf-8").split(RUN)[0].splitlines():
        found = re.search(r"#\s+(?:(\d+):)?\s+(\S.*)$", line)
        if not found or line.lstrip().startswith("# --"):
            continue
        if found[1]:
            number = int(found[1])
            assert number not in lines
            lines[number] = found[2]
        elif number:
            lines[number] += " " + found[2]
    return lines


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_right_hand_column_is_algorithm_1(name):
    lines = column(name)
    assert list(lines) == list(ALGORITHMS[name])
    for number, text in ALGORITHMS[name].items():
        line = " ".join(lines[number].split())
        for remark in REMARKS:
            line = line.removesuffix(remark).strip()
        assert line == text


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_right_hand_column_has_the_papers_equations(name):
    loop = (TOP / f"{name}.py").read_text(encoding="utf-8").split("for step in run(")[1].split(RUN)[0]
    found = [" ".join(text.split()) for text in re.findall(r"  # ((?:\(\d+\)|[xz] ~) .*)$", loop, re.MULTILINE)]
    assert found == EQUATIONS[name]


@pytest.mark.parametrize("name", SCRIPTS)
def test_one_column_is_one_column(name):
    """The comment signs beside the algorithm stand below each other"""
    loop = (TOP / f"{name}.py").read_text(encoding="utf-8").split(" in run(")[1].split(RUN)[0]
    first, *lines = loop.splitlines()                       # the first ends the line of the while, or says nothing
    places = {len(code) for code in re.findall(r"^(.*  )#", "\n".join(lines), re.MULTILINE)}
    assert len([place for place in places if place > 20]) == 1              # 8 and 12: remarks on their own lines


@pytest.mark.parametrize("name", [*SCRIPTS, "common"])
def test_imports_are_the_standard_library_torch_torchvision_numpy(name):
    tree = ast.parse((TOP / f"{name}.py").read_text(encoding="utf-8"))
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    allowed = {"torch", "torchvision", "numpy", "PIL"} | (set() if name == "common" else {"common"})
    assert {module.split(".")[0] for module in found} <= allowed | set(sys.stdlib_module_names)


def test_common_holds_data_and_images_only():
    source = (TOP / "common.py").read_text(encoding="utf-8")
    for word in ("nn.Module", "optim", "backward", "argparse", "state_dict", "manual_seed", "autograd", "sys.argv"):
        assert word not in source


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_explains_every_setting(name, capsys):
    script = importlib.import_module(name)
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert " ".join(script.__doc__.split()) in text
    source = inspect.getsource(script.train)
    for setting, parameter in inspect.signature(script.train).parameters.items():
        (meaning,) = re.findall(rf"^    {setting}\b.*?,  +# +(\S.*)$", source, re.MULTILINE)
        flag = "--" + setting.replace("_", "-")
        meaning = re.escape(" ".join(meaning.split()))
        shown = re.search(rf"{flag}(?: [A-Z]+)? {meaning}( \(default: (.+?)\))?(?: --|$)", text)
        assert shown, flag
        if parameter.default is not None and parameter.default is not False:
            assert shown[2] == str(parameter.default)
    assert "--generate N" in text


@pytest.mark.parametrize("name", SCRIPTS)
def test_flags_all_scripts_have(name, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(name).main(["--help"])
    text = capsys.readouterr().out
    common = "dataset digit root size steps batch-size lr seed device out save-every generate nz channels".split()
    common += ["width", "record"] if name in FOUR else ["fmap-base", "fmap-max"]
    for flag in common:
        assert f"--{flag}" in text


@pytest.mark.parametrize("name, paper", [
    ("wgan", dict(lr=5e-5, c=0.01, batch_size=64, n_critic=5, authors_loop=False)),
    ("wgan_gp", dict(lam=10, n_critic=5, lr=1e-4, beta1=0, beta2=0.9, batch_size=64)),
    ("lsgan", dict(a=0, b=1, c=1, lr=2e-4, beta1=0.5, batch_size=64)),
    ("ebgan", dict(margin=10, pt=0.1, lr=1e-3, pretrain=0)),
    ("progan", dict(lr=1e-3, beta1=0, beta2=0.99, lam=10, gamma=1, drift=0.001, ema=0.999, kimg=800,
                    batch_size=None, nz=512, fmap_base=8192, fmap_max=512, steps=None))])
def test_defaults_are_the_papers(name, paper):
    train = inspect.signature(importlib.import_module(name).train).parameters
    assert {setting: train[setting].default for setting in paper} == paper


@pytest.mark.parametrize("name", ["progan"])
def test_progans_column_names_sections_and_figures(name):
    loop = (TOP / f"{name}.py").read_text(encoding="utf-8").split("for images_shown in run(")[1].split(RUN)[0]
    found = re.findall(r"  # ((?:§|A\.|Fig\. )[\d.]+)", loop)
    assert {"§2", "Fig. 2", "§3", "§6.5", "A.1"} <= set(found)


# ---- Parallel scripts ----

def test_progans_run_block_shares_what_it_can():
    """These functions are those of the other scripts, to the letter"""
    def functions(name):
        tree = ast.parse((TOP / f"{name}.py").read_text(encoding="utf-8"))
        source = (TOP / f"{name}.py").read_text(encoding="utf-8")
        return {node.name: ast.get_source_segment(source, node) for node in tree.body
                if isinstance(node, ast.FunctionDef)}
    ours, theirs = functions("progan"), functions("wgan_gp")
    for name in ("flag", "given", "run_folder", "read"):
        assert ours[name] == theirs[name]


def source_of(name, start, end):
    source = (TOP / f"{name}.py").read_text(encoding="utf-8")
    return source[source.index(start):source.index(end)]


@pytest.mark.parametrize("name", FOUR)
def test_blocks_that_are_equal_by_intent_are_equal_to_the_letter(name):
    whole = (TOP / f"{name}.py").read_text(encoding="utf-8")
    assert whole.split(RUN)[1] == (TOP / "wgan_gp.py").read_text(encoding="utf-8").split(RUN)[1]
    assert whole.split(RUN)[1].startswith("the same in every script; nothing below is in the paper")

    def same(start, end, **changed):
        ours, theirs = source_of(name, start, end), source_of("wgan", start, end)
        for new, old in changed.items():
            ours = ours.replace(new, old)
        assert ours == theirs
    same("import argparse", "# ---- Networks")
    same("# ---- Networks", "class Generator")
    generator, of_wgan = (source_of(each, "class Generator", "class Critic" if each.startswith("wgan")
                                    else "class Discriminator") for each in (name, "wgan"))
    own = "" if name == "wgan_gp" else "        self.apply(init)\n"            # initialisation
    assert generator == of_wgan.replace("        self.apply(init)\n", own)
    same("    # The networks\n", "    steps=")
    same("    seed=0,", '):\n    """')
    same("    config, device, out = start(", "    opt_G", Discriminator="Critic")
    same("    images = load_images", "    for step in run(")
    if name in ("lsgan", "ebgan"):
        assert source_of(name, "def init", "# ----") == source_of("wgan", "def init", "# ----")


def test_lsgans_discriminator_is_wgans_critic():
    a, b = (source_of("wgan", "class Critic", "def init"), source_of("lsgan", "class Discriminator", "def init"))
    assert a.splitlines()[2:] == b.splitlines()[2:]         # but for name and docstring


def test_little_of_wgan_gp_is_not_in_wgan():
    new = [line for line in difference("wgan", "wgan_gp") if line.startswith("+")]
    assert 10 < len(new) <= 40


def test_the_readme_shows_the_difference_as_it_is():
    text = (TOP / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```diff\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert shown.splitlines() == difference("wgan", "wgan_gp")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_public_function_has_a_docstring(name):
    for module in (name, "common"):
        tree = ast.parse((TOP / f"{module}.py").read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{module}.{node.name}"


@pytest.mark.parametrize("name", [*SCRIPTS, "common"])
def test_lines_are_at_most_116_wide(name):
    for number, line in enumerate((TOP / f"{name}.py").read_text(encoding="utf-8").splitlines(), 1):
        assert len(line) <= 116, f"{name}.py:{number}"


# ---- README ----

def commands():
    text = (TOP / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_the_readmes_commands_parse(monkeypatch):
    used = set()
    for command in commands():
        for part in command.split("&&"):
            words = part.split()
            if words[0] == "python" and words[1].endswith(".py") and "/" not in words[1]:
                script = importlib.import_module(words[1].removesuffix(".py"))
                seen = []

                def stop(settings):
                    seen.append(settings)
                    raise KeyboardInterrupt
                monkeypatch.setattr(script, "start", stop)  # train() starts with it
                monkeypatch.setattr(script, "generate", lambda *args: seen.append(args))
                try:
                    script.main(words[2:])
                except SystemExit as end:
                    assert seen or end.code == 0, command   # got past the command line
                used.add(words[1])
            elif words[0] == "pip":
                assert all((TOP / word).exists() for word in words if word.endswith(".txt")), command
    assert used >= {f"{name}.py" for name in SCRIPTS}


def test_the_readmes_pictures_and_links_exist_and_are_small():
    text = (TOP / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if not link.startswith("http"):
            assert (TOP / link).exists(), link
    assert sum(p.stat().st_size for p in (TOP / "docs").rglob("*") if p.is_file()) < 3_000_000


def test_the_readme_is_filled_in_and_its_snippet_runs():
    text = (TOP / "README.md").read_text(encoding="utf-8")
    assert "@@" not in text and re.search(r"!\[.*\]\(docs/.*\.png\)", text)
    importlib.import_module("wgan_gp").main("--digit 7 --steps 1 --width 1 --device cpu".split())
    (snippet,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    values = {}
    exec(snippet, values)
    assert values["x"].shape == (64, 1, 32, 32) and values["x"].abs().max() <= 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_measured_is_measured(name):
    text = importlib.import_module(name).__doc__
    assert re.search(r"^Measured: .*`python .*torch \d", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", FOUR)
def test_the_paper_part_is_short(name):
    assert len((TOP / f"{name}.py").read_text(encoding="utf-8").split(RUN)[0].rstrip().splitlines()) <= 150


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_banned(name):
    source = (TOP / f"{name}.py").read_text(encoding="utf-8")
    for word in ("Variable(", "FloatTensor", "backward(one", "retain_graph", "grad_outputs", "**kwargs",
                 "BatchNorm2d(n, 0.8", "except Exception", "except:", "requires_grad = "):
        assert word not in source


def test_ci_runs_the_readmes_test_command():
    (command,) = [command for command in commands() if "pytest" in command]
    assert command == "pip install -r tests/requirements.txt && python -m pytest"
