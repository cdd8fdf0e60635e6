"""Commands and links in the documentation: what is printed can be typed."""

import glob
import os
import re
import shlex

import pytest

from seal_ops.cli import main as cli

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PAGES = sorted(glob.glob(os.path.join(ROOT, "docs", "*.md"))) + [os.path.join(ROOT, "README.md")]
PAGES = [page for page in PAGES if os.path.exists(page)]


def commands(page):
    with open(page, encoding="utf-8") as file:
        text = file.read()
    for block in re.findall(r"^```(?:bash|console|sh)\n(.*?)^```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("seal "):
                yield shlex.split(re.sub(r"\$\w+", "1", line), comments=True)  # variables of a loop: numbers


@pytest.mark.parametrize("page", PAGES, ids=map(os.path.basename, PAGES))
def test_commands_parse(page, capsys):
    for words in commands(page):
        words = [word for word in words if not word.startswith("--config")]
        if words[1:] and words[1] in cli.COMMANDS and "eval.yaml" not in words:
            try:
                cli._parser(words[1:]).parse_args(words[1:])
            except SystemExit:
                pytest.fail(f"{' '.join(words)}: {capsys.readouterr().err}")
        elif words[1:]:
            assert words[1] in cli.COMMANDS or words[1].startswith("-"), " ".join(words)


@pytest.mark.parametrize("page", PAGES, ids=map(os.path.basename, PAGES))
def test_links_lead_somewhere(page):
    with open(page, encoding="utf-8") as file:
        links = re.findall(r"\]\(([^)#\s]+)", file.read())
    for link in links:
        if not re.match(r"[a-z]+://", link):
            assert os.path.exists(os.path.join(os.path.dirname(page), link)), f"{os.path.basename(page)}: {link}"
