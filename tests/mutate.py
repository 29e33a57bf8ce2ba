"""Breaks single lines of the six files, one at a time, and shows that the tests notice

    python tests/mutate.py [NAME...]

In a copy of the project, two at a time. Prints the breaks that no test noticed, and their number.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
GENERATOR = [                                               # in all of the four small scripts
    ("n = width * size // 8", "n = width * size // 4"),
    ("nn.ConvTranspose2d(n, n // 2, 4, 2, 1, bias=False)]", "nn.ConvTranspose2d(n, n // 2, 4, 2, 1)]"),
    ("super().__init__(*layers, nn.Tanh())", "super().__init__(*layers, nn.Sigmoid())"),
]
CRITIC = [                                                  # of wgan.py and lsgan.py
    ("nn.BatchNorm2d(2 * n), nn.LeakyReLU(0.2)]", "nn.BatchNorm2d(2 * n, 0.8), nn.LeakyReLU(0.2)]"),
    ("4, 1, 0, bias=False), nn.Flatten(0))", "4, 1, 0, bias=False), nn.Flatten(0), nn.Sigmoid())"),
    ("nn.init.normal_(layer.weight, 1 if", "nn.init.normal_(layer.weight, 0 if"),
    ("else 0, 0.02)", "else 0, 0.2)"),
]
RUN = [                                                     # the same block in all four, broken in wgan_gp.py
    ("if key not in MAY_CHANGE", 'if key not in MAY_CHANGE and key != "lr"'),
    ('self.settings["dataset"] = name_of(config.dataset)', "pass"),
    ("self.lock = claim(self.out)", "pass"),
    ("with fitting(self.out, SCRIPT):", "if True:"),
    ("compare(saved, self.settings, self.out)", "pass"),
    ('if name.startswith("opt"):', "if False:"),
    ("part.load_state_dict(saved[name])", "pass"),
    ("each.set_rng_state(state)", "pass"),
    ('self.step, self.time, self.rows, states = saved["run"]', 'self.step, self.time, _, states = saved["run"]'),
    ("perf_counter() - self.time\n", "perf_counter()\n"),
    ("        save_animation(self.out)\n", ""),
    ("if stop or self.step ==", "if self.step =="),
    ("raise KeyboardInterrupt", "return"),
    ("total.item() / count", "total.item()"),
    ("total.zero_()", "pass"),
    ("save_curve(self.rows, self.out)", "pass"),
    ('G = self.parts["G"].eval()', 'G = self.parts["G"]'),
    ("        G.train()", "        pass"),
    ('if self.config.keep or name == "checkpoint.pt":', 'if name == "checkpoint.pt":'),
    ("weights_only=True", "weights_only=False"),
    ("[SCRIPT]\n", "\n"),
    ("return G.eval().requires_grad_(False)", "return G.requires_grad_(False)"),
    ("torch.Generator().manual_seed(seed)\n", "torch.Generator().manual_seed(0)\n"),
    ("z[first:first + n]", "z[:n]"),
    ("parser.exit(2,", "parser.exit(1,"),
    ("@in_one_sentence(SCRIPT)\n", ""),
    ('globals().get("__file__", "notebook")', "__file__"),
    ("@checked\n", ""),
    ("config.images = len(images)", "pass"),
    ("return G.eval(), D", "return G, D"),
    ("config = Namespace(**locals())", "config = Namespace(**locals() | dict(keep=False))"),
    ("torch.manual_seed(seed)", "torch.manual_seed(0)"),
]
MUTANTS = {
    "wgan": [*GENERATOR, *CRITIC,
        ("L = D(x) - D(x_tilde)", "L = D(x_tilde) - D(x)"),
        ("w, lr, maximize=True", "w, lr, maximize=False"),
        ("L_G = -D(G(z))", "L_G = D(G(z))"),
        ("each.clamp_(-c, c)", "each.clamp_(-c, 2 * c)"),
        ("for each in w:", "for each in w[:-1]:"),
        ("for _ in range(n_critic):", "for _ in range(n_critic + 1):"),
        ("L.mean().backward(inputs=w)", "L.sum().backward(inputs=w)"),
        ("L_G.mean().backward(inputs=theta)", "L_G.mean().backward()"),
        ("RMSprop(theta, lr,", "RMSprop(theta, 2 * lr,"),
        ("            opt_D.zero_grad()\n", ""),
        ("            with torch.no_grad():\n                x_tilde = G(z)", "            x_tilde = G(z)"),
        ("lr=5e-5,", "lr=1e-4,"),
        ("c=0.01,", "c=0.1,"),
        ("run.log(wasserstein=L", "run.log(wasserstein=-L"),
    ],
    "wgan_gp": [*GENERATOR, *RUN,
        ("eps * x + (1 - eps) * x_tilde", "eps * x_tilde + (1 - eps) * x_tilde"),
        ("eps = torch.rand(len(x), 1, 1, 1", "eps = torch.rand(1, 1, 1, 1"),
        ("(grad_norm(D, x_hat) - 1) ** 2", "(grad_norm(D, x_hat) - 1).relu() ** 2"),
        ("grad_norm(D, x_hat)", "grad_norm(D, x)"),
        ("D(x_tilde) - D(x) + lam", "D(x) - D(x_tilde) + lam"),
        ("+ lam * penalty", "- lam * penalty"),
        ("L_G = -D(G(z))", "L_G = D(G(z))"),
        ("create_graph=True", "create_graph=False"),
        ("grad.reshape(len(x), -1), dim=1)", "grad, dim=1).mean((1, 2))"),
        ("vector_norm(grad", "vector_norm(2 * grad"),
        ("x = x.detach().requires_grad_()", "x = x.requires_grad_()"),
        ("lam=10.0,", "lam=1.0,"),
        ("beta1=0.0,", "beta1=0.5,"),
        ("beta2=0.9,", "beta2=0.99,"),
        ("L.mean().backward(inputs=w)", "L.sum().backward(inputs=w)"),
        ("nn.Conv2d(n, 2 * n, 4, 2, 1), nn.LeakyReLU",
         "nn.Conv2d(n, 2 * n, 4, 2, 1), nn.BatchNorm2d(2 * n), nn.LeakyReLU"),
    ],
    "lsgan": [*GENERATOR, *CRITIC,
        ("(D(x) - b) ** 2 / 2", "(D(x) - b) ** 2"),
        ("(D(x_tilde.detach()) - a) ** 2 / 2", "(D(x_tilde.detach()) - b) ** 2 / 2"),
        ("D(x_tilde.detach())", "D(x_tilde)"),
        ("(D(x_tilde) - c) ** 2 / 2", "(D(x_tilde) - c) ** 2"),
        ("(D(x_tilde) - c)", "(D(x_tilde) - a)"),
        ("a=0.0,", "a=-1.0,"),
        ("c=1.0,", "c=0.0,"),
        ("lr=2e-4,", "lr=1e-3,"),
        ("beta1=0.5,", "beta1=0.9,"),
        ("L_D.mean().backward(inputs=w)", "L_D.sum().backward(inputs=w)"),
        ("        opt_D.step()\n", ""),
    ],
    "ebgan": [*GENERATOR,
        ("if S is None else S) - x\n", "if S is None else S) - x.detach()\n"),
        ("vector_norm(difference", "vector_norm(0.5 * difference"),
        ("cos.square().sum()", "cos.abs().sum()"),
        (".fill_diagonal_(0)", ""),
        ("normalize(S, dim=1)", "normalize(S, dim=0)"),
        ("len(S) * (len(S) - 1), 1)", "len(S) ** 2, 1)"),
        ("(margin - D_x_tilde).relu()", "(margin - D_x_tilde)"),
        ("D_x + (margin", "D_x - (margin"),
        ("energy(D, x_tilde.detach())", "energy(D, x_tilde)"),
        ("+ pt * f_PT", "- pt * f_PT"),
        ("margin=10.0,", "margin=1.0,"),
        ("pt=0.1,", "pt=0.0,"),
        ("lr=1e-3,", "lr=1e-4,"),
        ("nn.ConvTranspose2d(n, channels, 4, 2, 1, bias=False), nn.Tanh())            #",
         "nn.ConvTranspose2d(n, channels, 4, 2, 1, bias=False))            #"),
        ("energy(D, x_tilde, S)", "energy(D, x_tilde)"),
    ],
    "progan": [
        ("gain / (n_in * kernel ** 2) ** 0.5", "gain / n_in ** 0.5"),
        ("keepdim=True) + 1e-8", "keepdim=True) + 1e-2"),
        ("x.square().mean(1,", "x.square().sum(1,"),
        ("correction=0", "correction=1"),
        ("+ 1e-8).sqrt().mean()", ").sqrt().mean()"),
        ("(1 - alpha) * upsample(self.to_rgb", "alpha * upsample(self.to_rgb"),
        ("Conv(nz, n[0], 4, padding=3)", "Conv(nz, n[0], 4, padding=3, gain=1)"),
        ("pixel_norm(z)[:, :", "z[:, :"),
        ("Conv(n[0], 1, 1, gain=1)", "Conv(n[0], 1, 1)"),
        ("h = (1 - alpha) * self.from_rgb", "h = alpha * self.from_rgb"),
        ("phase % 2 == 1 else 1.0", "phase % 2 == 0 else 1.0"),
        ("(1 - alpha) * upsample(downsample(x)) + alpha * x", "x"),
        ("L = (D_x_tilde - D_x ", "L = (D_x - D_x_tilde "),
        ("lam / gamma ** 2", "lam / gamma"),
        ("drift * D_x ** 2)", "drift * D_x_tilde ** 2)"),
        ("1 - ema)", "ema)"),
        ("            opt_G.state.clear()\n", ""),
        ("L_G = -D(", "L_G = D("),
        ("beta2=0.99,", "beta2=0.9,"),
        ("average_gradients(w)", "pass"),
        ("flat / dist.get_world_size()", "flat"),
        ("torch.manual_seed(seed + (rank << 16))", "pass"),
        ("run.shown += world * len(x)", "run.shown += len(x)"),
        ('states, self.shown = saved["run"]', 'states, _ = saved["run"]'),
        ("config.steps, shown = run.step, run.shown", "config.steps, shown = 0, 0"),
        ("config.processes = len(images), world", "config.processes = len(images), 1"),
        ("return G_ema.eval(), D", "return G, D"),
        ('G = self.parts["G_ema"]', 'G = self.parts["G"]'),
        ('load_state_dict(saved["G_ema"])', 'load_state_dict(saved["G"])'),
        ("if halt:\n", "if False:\n"),
        ("each.set_rng_state(state)", "pass"),
        ("total.item() / count", "total.item()"),
        ("total.zero_()", "pass"),
        ("[16] * 6 + [14, 6, 3]", "[16] * 9"),
        ("min(2 * fmap_base >> k, fmap_max)", "min(fmap_base >> k, fmap_max)"),
    ],
    "common": [
        ("images = images[labels == digit]", "images = images[labels != digit]"),
        ("TF.pad(images, 2)", "TF.pad(images, 2, 255)"),
        ("/ 127.5 - 1", "/ 255"),
        ("torch.randint(len(images), (m,)", "torch.randint(len(images) - 1, (m,)"),
        ("with open(part, \"xb\") as file:", "with open(path, \"wb\") as file:"),
        ("uuid.uuid4().hex[:8]", '"0" * 8'),
        ("st_mtime > 86400", "st_mtime > -86400"),
        ("cause.filename is None", "False"),
        ("os.replace(Path(new, file.name), file)", "pass"),
        ("if real in seen:", "if False:"),
        ("if a_run or name", "if name"),
        ("left_out[ending] += 1", "pass"),
        ("str(path.relative_to(folder))", "str(path)"),
        ("2**14 <= most", "0 <= most"),
        ("ranges[mode] = min(values), max(values)", "ranges[mode] = values[0], values[1]"),
        ("nan=low, posinf", "nan=high, posinf"),
        ("values = np.nan_to_num", "low = 0; values = np.nan_to_num"),
        ("_upright(io.BytesIO(_without_metadata(file.read())))", "_upright(file)"),
        ("free.append(limit - used", "free.append(limit + used"),
        ("> free_memory():", "> 10**99:"),
        ("default=-1) + 1", "default=-1) * 0"),
        ("settings[name] = kind(value)", "pass"),
        ("not abs(value) < limit", "False"),
        ("if kind is int and value < 1", "if False"),
        ("if fcntl:", "if False:"),
        ("isinstance(error, Refused) or", ""),
        ('if name not in ("batch_size", "images", "processes") and', "if"),
        ("is not signal.SIG_IGN", "is not None"),
        ("signal.signal(number, handler)", "pass"),
        ('stream.reconfigure(errors="replace")', "pass"),
        ("except BrokenPipeError:", "except ZeroDivisionError:"),
        ("status, text = 2, error", "status, text = 1, error"),
        ("status, text = 130", "status, text = 1"),
        ("        if not _out_of_memory(error):\n            raise\n        pl", "        raise\n        pl"),
        ("y0, y1 = y0 - max(1, abs(y0)), y1 + max(1, abs(y1))", "y0, y1 = y0 - 1, y1 + 1"),
        ("cause.errno and", ""),
        ("_is_a_run(folder) and any(", "_is_a_run(folder) and False and any("),
        ("[0-9]{6}|[1-9][0-9]{6}", "[0-9]+"),
        ("if any(it.shape not in", "if False and any(it.shape not in"),
        ("for ending in endings[9:]:", "for ending in endings[99:]:"),
        ("dull += _is_dull(image)\n                images", "images"),
        ("x[:rows * rows], nrow=rows", "x[:rows * rows], nrow=1"),
        ("image.transpose(Image.Transpose[turn]) if turn else image", "image"),
        ('size, "white")', 'size, "black")'),
        ("255 << 8", "255 << 9"),
        ("image = image[..., 2:-2, 2:-2]", "pass"),
        (".clamp(-1, 1)", ""),
        ("x.round().to(torch.uint8)", "x.to(torch.uint8)"),
        ("if not math.isfinite(value):", "if False:"),
        ("if not x.isfinite().all():", "if False:"),
        ('{n:06d}.png", "xb"', '{n:06d}.png", "wb"'),
        ("if m < 1:", "if False:"),
        ("if resident and", "if False and"),
        ("min(len(paths), 100)", "len(paths)"),
        ('f"-{settings.digit}"', '""'),
        ("probe.item()", "pass"),
    ],
}

def survives(mutant):
    """Whether all tests pass though the line is broken"""
    name, (old, new) = mutant
    text = (TOP / f"{name}.py").read_text(encoding="utf-8")
    if old not in text:
        return f"{name}.py no longer has {old!r}"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "project")
        shutil.copytree(TOP, copy, ignore=shutil.ignore_patterns(".git", "runs", "docs", "__pycache__", "data"))
        (copy / "data").symlink_to(TOP / "data")
        (copy / f"{name}.py").write_text(text.replace(old, new, 1), encoding="utf-8")
        likely = f"test_{name}", "test_papers" if name in ("wgan", "wgan_gp", "lsgan", "ebgan") else "", "test_run"
        tests = sorted((copy / "tests").glob("test_*.py"), key=lambda path: [path.stem != each for each in likely])
        done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", *map(str, tests)], cwd=copy,
                              capture_output=True, text=True, env=os.environ | dict(KILLS="1"))
    return f"{name}.py: {old.strip()!r} -> {new.strip()!r}" if done.returncode == 0 else None


if __name__ == "__main__":
    mutants = [(name, each) for name in sys.argv[1:] or MUTANTS for each in MUTANTS[name]]
    with ThreadPoolExecutor(2) as pool:
        survivors = [each for each in pool.map(survives, mutants) if each]
    print(*survivors, f"{len(mutants)} breaks, {len(survivors)} survivors", sep="\n")
    sys.exit(bool(survivors))
