"""What one script has and another lacks, without comments and docstrings

    python measure/stripped.py wgan wgan_gp
    python measure/stripped.py wgan_gp related.dragan
"""
import ast
import difflib
import io
import sys
import tokenize
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent


def stripped(name):
    """The lines of a script without comments, docstrings, empty lines and alignment"""
    source = (TOP / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            text = node.body[0]
            lines[text.lineno - 1:text.end_lineno] = [""] * (text.end_lineno - text.lineno + 1)
    return [line.rstrip() for line in lines if line.strip()]


def difference(a, b):
    """A unified diff without context, file names and places"""
    lines = difflib.unified_diff(stripped(a), stripped(b), n=0, lineterm="")
    return [line for line in list(lines)[2:] if not line.startswith("@@")]


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")                # what a terminal cannot show
    print("\n".join(difference(*sys.argv[1:3])))
