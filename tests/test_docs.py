"""README and docs: their Python runs, their commands exist, and the README stays short."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from spp_lightning import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
WORDS = 900  # of the README, without tables and code

# A block that needs data or a device is only compiled; the line before it says so.
BLOCK = re.compile(
    r"(?P<skip><!-- not run: [^>]+ -->\n+)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S
)
# A line that prints a value, and says in a comment which one.
PRINTED = re.compile(r"^ *print\(.*\)  # ([({\[].*)$", re.M)
LINK = re.compile(r"\]\(([^)#\s:]+)(?:#[^)\s]*)?\)")


def _blocks(page, language):
    text = page.read_text()
    for match in BLOCK.finditer(text):
        if match["language"] == language:
            line = text[: match.start("code")].count("\n")
            yield line, match["code"], bool(match["skip"])


def _name(page):
    return str(page.relative_to(ROOT))


WITH_PYTHON = [page for page in PAGES if any(_blocks(page, "python"))]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=_name)
def test_python_runs_and_prints_what_it_says(page, tmp_path, monkeypatch, capsys):
    """The blocks of a page run from top to bottom, as one script."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    names = {"__name__": _name(page)}
    expected = []
    for line, code, skip in _blocks(page, "python"):
        # Empty lines in front, so that a traceback shows the line of the page.
        compiled = compile("\n" * line + code, str(page), "exec")
        if not skip:
            exec(compiled, names)
            expected += PRINTED.findall(code)
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line in expected] == expected


def test_few_blocks_are_left_out():
    blocks = [skip for page in PAGES for _, _, skip in _blocks(page, "python")]
    assert len(blocks) >= 10
    assert sum(blocks) <= 0.2 * len(blocks)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_commands_exist(page):
    """Scripts and configs that a page's commands name are there, and so are subcommands."""
    for _, code, _ in _blocks(page, "sh"):
        for line in code.replace("\\\n", " ").splitlines():
            for command in re.split(r"&&|\|\||;|\|", line):
                words = shlex.split(command, comments=True)
                for word in words:
                    if re.fullmatch(r"(benchmarks|examples|tests|docs|\.ci)/[\w./-]+", word):
                        assert (ROOT / word).exists(), f"{_name(page)}: {line}"
                if words[:1] == ["spp-lightning"]:
                    known = cli.main.commands[words[1]].params
                    options = {option for p in known for option in p.opts}
                    used = {w.split("=")[0] for w in words[2:] if w.startswith("-")}
                    assert used <= options | {"--help", "-h"}, f"{_name(page)}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(), flags=re.M | re.S)
    for target in LINK.findall(text):
        assert (page.parent / target).exists(), f"{_name(page)} links to {target}"


def test_readme_is_short():
    text = BLOCK.sub("", (ROOT / "README.md").read_text())
    text = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    text = re.sub(r"\]\([^)]*\)", "]", text)  # where a link leads to isn't read
    count = sum(bool(re.search(r"\w", word)) for word in text.split())
    assert 300 < count <= WORDS


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in sorted(ROOT.glob("docs/**/*.md")):
        assert f": {page.relative_to(ROOT / 'docs')}\n" in navigation


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_files_that_are_named_exist(name):
    """A file in backticks is one of the repository, by its path or by the end of it."""
    page = ROOT / name
    files = [
        f"/{path.relative_to(ROOT).as_posix()}"
        for folder in ("spp_lightning", "tests", "benchmarks", "examples", "docs")
        for path in (ROOT / folder).rglob("*.*")
    ]
    files += [f"/{path.name}" for path in ROOT.iterdir()]
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    named = re.findall(r"`([\w./-]+\.(?:py|md|h|cpp|toml|cff|yml))`", text)
    assert [x for x in named if not any(file.endswith(f"/{x}") for file in files)] == []
    assert len(named) > 20
