"""What a newcomer relies on: the README's commands, the citation, an import without side effects."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import yaml

import meshdiff

ROOT = Path(__file__).parent.parent


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def test_readme_starts_with_one_line_to_run_and_one_to_test():
    run, test = commands()[:2]
    assert "torchrun --nproc-per-node 2 experiments/run.py --cfg 2" in run
    assert test.endswith("pytest")
    for command in (run, test):
        assert command.startswith("python3 -m venv ")


def test_citation_is_complete_and_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == meshdiff.__version__
    assert {"message", "title", "authors", "license"} <= citation.keys()


def test_importing_starts_nothing_and_needs_no_extra():
    program = (
        "import sys; import meshdiff, torch.distributed as dist; "
        "assert not dist.is_initialized(); "
        "print([m for m in ('tyro', 'wandb', 'rich', 'imageio', 'PIL', 'sklearn') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def files() -> list[Path]:
    """Those that git has, or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_is_large_but_the_shipped_weights():
    weights = ROOT / "meshdiff" / "models" / "digits.safetensors"
    assert weights.stat().st_size <= 8_000_000
    assert [path.name for path in files() if path != weights and path.stat().st_size > 500_000] == []


def test_no_file_of_code_is_longer_than_a_person_reads():
    code = [path for path in files() if path.suffix == ".py"]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in code}
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}


def test_what_is_ignored_for_the_type_checker_has_its_reason_beside_it():
    bare = re.compile(r"#\s*type:\s*ignore(\[[\w, -]*\])?\s*$")
    found = []
    for path in files():
        if path.suffix == ".py":
            lines = path.read_text(encoding="utf-8").splitlines()
            found += [f"{path.relative_to(ROOT)}:{n}" for n, line in enumerate(lines, 1) if bare.search(line)]
    assert found == []


def test_words_are_spelt_right():
    checker = subprocess.run(
        [sys.executable, "-m", "codespell_lib", *files()], cwd=ROOT, capture_output=True, text=True
    )
    assert checker.returncode == 0, checker.stdout


def test_links_between_pages_lead_somewhere():
    lost = []
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("notebooks/*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not (page.parent / link).exists():
                lost.append((page.name, link))
    assert lost == []


def test_the_readme_is_a_landing_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def private_names_of_torch(path: Path) -> list[str]:
    """The imports and attributes of torch in a file whose names begin with an underscore; operations are none."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), []
    known = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named = [(alias.name, (alias.asname or alias.name).partition(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            named = [(f"{node.module}.{alias.name}", alias.asname or alias.name) for alias in node.names]
        else:
            continue
        known |= {short for name, short in named if name.partition(".")[0] == "torch"}
        found += [name for name, _ in named if name.partition(".")[0] == "torch" and "._" in name]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            chain, value = [node.attr], node.value
            while isinstance(value, ast.Attribute):
                chain, value = [value.attr, *chain], value.value
            if isinstance(value, ast.Name) and value.id in known and "ops" not in chain:
                found.append(".".join([value.id, *chain]))
    return found


def test_private_names_of_torch_are_used_in_two_files():
    found = {str(path.relative_to(ROOT)): private_names_of_torch(path) for path in (ROOT / "meshdiff").rglob("*.py")}
    users = {path: names for path, names in found.items() if names}
    assert users.keys() == {"meshdiff/distributed/torch_compat.py", "meshdiff/distributed/simulation.py"}, users


def test_imports_go_down_only_and_in_no_circle():
    """As `pyproject.toml` says."""
    linter = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], capture_output=True, text=True, cwd=ROOT
    )
    assert linter.returncode == 0, linter.stdout


def test_text_files_have_an_encoding_that_no_locale_changes():
    without = []
    for path in [*(ROOT / "meshdiff").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and opens_text(call) and "encoding" not in {k.arg for k in call.keywords}:
                without.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert without == []


def opens_text(call: ast.Call) -> bool:
    """Whether it reads or writes a file, or what a process prints, as text."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    of_module = isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name) and call.func.value.id
    if name == "open" and (of_module == "os" or str(of_module)[:1].isupper()):  # descriptors; a model of that name
        return False
    if name in ("run", "Popen", "check_output"):
        return any(keyword.arg in ("text", "universal_newlines") for keyword in call.keywords)
    binary = any(isinstance(arg, ast.Constant) and "b" in str(arg.value) for arg in call.args)
    return name in ("read_text", "write_text") or (name == "open" and not binary)


def test_the_flag_reference_is_what_help_says():
    from experiments.tools.flag_reference import reference

    # Else: python -m experiments.tools.flag_reference > docs/flags.md
    assert (ROOT / "docs" / "flags.md").read_text() == reference()
