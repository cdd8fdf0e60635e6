"""Commands, links and paths in the documentation: what is printed can be typed, and is there."""

import re

import pytest
from printed import PAGES, ROOT, commands, is_fragment, parser_of

from seal_ops.cli.main import COMMANDS


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page, capsys):
    for command in commands(page):
        if command.words[0] != "seal":
            continue
        assert command.words[1] in COMMANDS, command.text
        parser = parser_of(command)
        if is_fragment(command):
            for action in parser._actions:
                action.required = False
        try:
            parser.parse_args(command.words[2:])
        except SystemExit:
            pytest.fail(f"{command.text}: {capsys.readouterr().err}")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+://", link):
            assert ((ROOT / page).parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES)
def test_paths_of_the_repository_are_there(page):
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))
    for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", (ROOT / page).read_text(encoding="utf-8")):
        assert (ROOT / path).exists() or list(ROOT.glob(f"{path}.*")), path
