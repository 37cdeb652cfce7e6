"""The documentation is true: links and paths exist, Python blocks run, commands parse.

In a page, ```python blocks run in order in one namespace, in a directory with a small trained run as runs/tiny and its
config as configs/tiny.py. Command lines in ```sh blocks are parsed by the command's own parser. Blocks with another
language, or with none, are not checked.
"""

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tyro

from nextllm_jax.checkpoint.run_dir import FILES
from nextllm_jax.cli import sample
from nextllm_jax.cli.main import COMMANDS, train_command
from tests.conftest import CONFIG_FILE, ROOT

PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]
SUFFIXES = (".py", ".md", ".toml", ".sh", ".sbatch", ".yaml", ".png")
FOLDERS = ("nextllm_jax", "configs", "deploy", "benchmarks", "tests", "docs", ".ci")
OTHER_PROGRAMS = {"--dist"}
"""Options of pytest and pip that the prose may name."""


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    found, opened = [], None
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            if opened is None:
                opened = Block(line[3:].strip(), "", number)
            else:
                found.append(opened)
                opened = None
        elif opened is not None:
            opened = opened._replace(text=f"{opened.text}{line}\n")
    assert opened is None, f"{page}: the block of line {opened and opened.line} is not closed"
    return found


def prose(page: str) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def code_spans(page: str) -> list[str]:
    return re.findall(r"`([^`]+)`", re.sub(r"(?<=\S)\n *(?=\S)", " ", prose(page)))


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(str(page.relative_to(ROOT))), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: str) -> list[list[str]]:
    """The words of each command in the page's sh blocks, and in the lines of other blocks that begin with "$ "."""
    found = []
    for block in blocks(page):
        lines = block.text.replace("\\\n", " ").splitlines()
        if block.language != "sh":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        for line in lines:
            words: list[str] = []
            for word in [*shlex.split(line, comments=True), "&&"]:
                if word not in ("&&", "||", ";", "|"):
                    words.append(word)
                elif words:
                    found.append(words)
                    words = []
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(file.resolve()), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_files_of_the_repository_exist(page: str) -> None:
    words = [word for span in code_spans(page) for word in span.split()]
    words += [word for command in commands(page) for word in command]
    for word in words:
        path = word.partition("::")[0].rstrip("/")
        is_path = re.fullmatch(r"[\w./-]+", path) and not path.startswith("/")
        in_folder = path.partition("/")[0] in FOLDERS and "/" in path
        if is_path and (in_folder or path.endswith(SUFFIXES)) and path not in FILES:
            assert (ROOT / path).exists(), f"{page}: {word}"


def test_the_tree_is_that_of_the_package() -> None:
    tree = next(block.text for block in blocks("docs/architecture.md") if "nextllm_jax/\n" in block.text)
    package = ROOT / "nextllm_jax"
    listed = set(re.findall(r"^  (\S+)", tree, flags=re.MULTILINE))
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert listed == folders | {path.name for path in package.glob("*.py")} - {"__init__.py"}
    top = re.findall(r"^(\S+/) ", tree, flags=re.MULTILINE)
    assert all((ROOT / name).is_dir() for name in top)


@pytest.fixture(scope="module")
def directory(trained, tmp_path_factory) -> Path:
    """What the pages say there is: configs/tiny.py, and runs/tiny trained by it. Both are of the tests' small run."""
    here = tmp_path_factory.mktemp("docs")
    (here / "corpus").symlink_to(trained.directory / "corpus")
    (here / "data").symlink_to(trained.directory / "data")
    (here / "configs").mkdir()
    (here / "configs" / "tiny.py").write_text(CONFIG_FILE.replace("sample_tokens=8", "sample_tokens=0"))
    shutil.copytree(trained.directory / "runs" / "config", here / "runs" / "tiny")
    return here


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.language == "python" for block in blocks(page))])
def test_python_blocks_run(page: str, directory: Path, monkeypatch) -> None:
    monkeypatch.chdir(directory)
    namespace: dict[str, Any] = {"__name__": page}
    for block in blocks(page):
        if block.language == "python":
            # Lines as in the page, so that a traceback names them.
            code = compile("\n" * block.line + block.text, str(ROOT / page), "exec")
            exec(code, namespace)


class _Parsed(Exception):
    """Raised in place of running a command, once its arguments are parsed."""


def command_of(words: list[str]) -> tuple[Callable[[list[str]], int], list[str]] | None:
    """The function behind a command line of ours, and its arguments; None for another program's."""
    if words[0] == "nextllm":
        return COMMANDS[words[1]], words[2:]
    scripts = {"train.py": train_command, "sample.py": sample.sample_command}
    if words[0] == "python" and words[1] in scripts:
        return scripts[words[1]], words[2:]
    return None


OURS = {(page, shlex.join(words)): words for page in PAGES for words in commands(page) if command_of(words)}


@pytest.mark.parametrize(("page", "line"), OURS)
def test_commands_parse(page: str, line: str, monkeypatch) -> None:
    command = command_of(OURS[page, line])
    assert command is not None
    run, arguments = command
    if run is COMMANDS["lm_eval"]:
        assert arguments[::2] == ["--model_args", "--tasks"]  # the harness has a parser of its own
        return
    parse = tyro.cli

    def parse_alone(*args: Any, **settings: Any) -> None:
        parse(*args, **settings)
        raise _Parsed

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(tyro, "cli", parse_alone)
    with pytest.raises(_Parsed):
        run(arguments)


WITH_CONFIG = [COMMANDS[name] for name in ("train", "doctor", "plan", "scale")]
"""Commands whose --help alone is an overview."""


def options_of(run: Callable[[list[str]], int], capsys) -> set[str]:
    with pytest.raises(SystemExit):
        run(["--help", "all"] if run in WITH_CONFIG else ["--help"])
    return set(re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out))


def test_options_in_the_prose_exist(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    every = {name: options_of(run, capsys) for name, run in COMMANDS.items() if name != "lm_eval"}
    every["sample.py"] = options_of(sample.sample_command, capsys)
    known = set().union(*every.values()) | OTHER_PROGRAMS
    for page in PAGES:
        for span in code_spans(page):
            words = span.split()
            of_command = words[0] == "nextllm" and len(words) > 1
            if of_command:
                assert words[1] in {*COMMANDS, "COMMAND", "NAME"}, f"{page}: {span}"
            if words[0] in ("python", "pip"):
                continue
            for word in words:
                if word.startswith("--") and word != "--help":
                    options = every.get(words[1], known) if of_command else known
                    assert word.partition("=")[0].replace("_", "-") in options, f"{page}: {span}"


@pytest.mark.parametrize(
    "words", [words for page in PAGES for words in commands(page) if words[1:] and words[1].startswith("benchmarks/")]
)
def test_benchmarks_have_their_options(words: list[str]) -> None:
    source = (ROOT / words[1]).read_text()
    for word in words[2:]:
        assert not word.startswith("--") or f'"{word}"' in source, word


def test_the_readme_lists_every_command() -> None:
    rows = re.findall(r"^\| `nextllm (\w+)`", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert rows == list(COMMANDS)


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in PAGES:
        if page.startswith("docs/") and page != "docs/README.md":
            assert f"]({page.removeprefix('docs/')})" in index, page
