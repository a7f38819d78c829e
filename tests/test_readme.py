"""What the documents promise: the code in the README runs, the commands are the ones that CI runs, no link is dead."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastconv.bench.readme import main as readme

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(path for path in ROOT.rglob("*.md") if not {"build", ".venv"} & set(path.relative_to(ROOT).parts))


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(blocks(ROOT / "README.md", "python"))))
def test_python_in_the_readme_runs_without_a_fallback(number: int, tmp_path: Path) -> None:
    code = blocks(ROOT / "README.md", "python")[number] + "\nassert fastconv.fallback_counts() == {}\n"
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_ci_runs_the_readmes_test_command() -> None:
    (command,) = [block.strip() for block in blocks(ROOT / "README.md", "sh") if "pytest" in block]
    assert f'test_command="{command}"' in (ROOT / ".ci" / "run").read_text()


def test_the_results_are_those_of_the_published_files() -> None:
    """By the command that bench/README.md gives, and of every file that it says how to make."""
    page = (ROOT / "bench" / "README.md").read_text()
    command = r"^fastconv bench readme --selection=(\S+) --json=bench/results/\{(\S+)\}\.json README\.md$"
    ((selection, names),) = re.findall(command, page, re.MULTILINE)
    made = re.findall(r"^fastconv bench .* --json (\w+)\.json$", page, re.MULTILINE)
    assert sorted(names.split(",")) == sorted(made)
    files = [f"--json={ROOT / 'bench' / 'results' / name}.json" for name in names.split(",")]
    assert readme([f"--selection={ROOT / selection}", *files, "--check", str(ROOT / "README.md")]) == 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []
