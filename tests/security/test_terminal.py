"""Control characters from names and files do not reach the terminal, and rich takes no text for markup."""

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from data_pipeline.common import progress_bar as progress_module
from data_pipeline.common.terminal import echo, printable
from data_pipeline.formats.recordio_writer import FlatWriter
from tests.trainer.checkpoint.test_directory import write as write_checkpoint
from tests.trainer.checkpoint.test_sharded import reseal
from tests.trainer.networks import small_network
from trainer.__main__ import _run, app
from trainer.evaluation.protocol import Scores
from trainer.inference.network import read_network
from trainer.monitoring.console import Display
from trainer.report.tables import show
from trainer.runtime.ranks import _show

ROOT = Path(__file__).parents[2]
HOSTILE = "\x1b]0;pwned\x07\x1b[2J\x9b31m\u202egpj.exe"
SHOWN = "\\x1b]0;pwned\\x07\\x1b[2J\\x9b31m\\u202egpj.exe"


def is_clean(text):
    return printable(text) == text


def test_control_characters_are_shown_and_text_is_kept():
    assert printable(HOSTILE) == SHOWN
    assert printable("a\r\x08\x7f\x85\u2028\u2066b\udcff") == "a\\r\\x08\\x7f\\x85\\u2028\\u2066b\\udcff"
    plain = "Zoë 王 \u0641\u0627\u0631\u0633\u06cc\u200c\U0001f469\u200d\U0001f680\n\ttwo lines"
    assert printable(plain) == plain


@pytest.mark.parametrize("package", ["trainer", "data_pipeline", "slurm"])
def test_all_messages_are_printed_by_one_function(package):
    """`print` and typer's `echo` are called only with constant texts."""
    paths = sorted((ROOT / package).rglob("*.py"))
    assert paths
    calls = {
        (path.name, ast.unparse(node))
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "typer.echo", "typer.secho")
        if path.name != "terminal.py" and not isinstance(node.args[0], ast.Constant)
    }
    assert calls == set()


def test_a_name_that_is_no_text_is_printed(capsys):
    echo(os.fsdecode(b"a\xff\x1b[31m"))
    assert capsys.readouterr().out == "a\\udcff\\x1b[31m\n"


def test_errors_and_tracebacks_are_escaped(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["lgaf", "data", "inspect", str(tmp_path / HOSTILE)])
    with pytest.raises(SystemExit):
        _run()
    found = capsys.readouterr().err
    assert SHOWN in found
    assert is_clean(found)
    for error in (ValueError(HOSTILE), RuntimeError(HOSTILE)):
        _show(error, type("Placement", (), {"rank": 0, "world_size": 1}))
        found = capsys.readouterr().err
        assert SHOWN in found
        assert is_clean(found)


def test_an_unexpected_error_is_escaped_too():
    code = (
        "import sys, trainer.__main__ as m; m.app = lambda: {}[sys.argv[1]].a; "
        "m.entry_points = lambda group: []; m.main()"
    )
    code = code.replace("{}[sys.argv[1]].a", "(_ for _ in ()).throw(RuntimeError(sys.argv[1]))")
    done = subprocess.run(
        [sys.executable, "-c", code, HOSTILE], cwd=ROOT, text=True, capture_output=True, check=False
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert SHOWN in done.stderr
    assert is_clean(done.stderr)


@pytest.mark.parametrize("command", ["show", "ls", "verify", "prune"])
def test_a_checkpoint_with_hostile_texts_is_shown(command, tmp_path):
    run_dir = tmp_path / HOSTILE
    for step in (10, 20):
        checkpoint = write_checkpoint(run_dir, step)
        reseal(
            checkpoint,
            lambda manifest: manifest.update(
                versions={HOSTILE: HOSTILE}, dataset={HOSTILE: 1}, config={"checkpoint": [HOSTILE]}
            ),
        )
    (checkpoint / HOSTILE).symlink_to("nowhere")
    words = ["checkpoint", command, str(run_dir), *(["--keep", "1"] if command == "prune" else [])]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0
    assert is_clean(done.output)
    assert (SHOWN in done.output) == (command in ("show", "prune"))


def test_tensor_names_of_a_file_are_escaped(tmp_path, capsys):
    network = small_network("iresnet")
    state = {HOSTILE: torch.zeros(1), **network.model.state_dict()}
    config = network.config.model_dump(mode="json")
    torch.save({"backbone": config, "image_size": 32, "step": 1, "state": state}, tmp_path / "n.pt")
    with pytest.raises(ValueError, match="pwned") as refused:
        read_network(tmp_path / "n.pt")
    echo(f"lgaf: {refused.value}", err=True)
    found = capsys.readouterr().err
    assert "pwned" in found
    assert is_clean(found)


# Rich's markup.


@pytest.mark.parametrize("name", ["[/red]", "[bold]x", f"[link=x]{HOSTILE}"])
def test_a_bar_shows_its_label_as_it_is(name, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(
        progress_module, "Console", lambda **_: Console(file=out, force_terminal=True, width=200)
    )
    with progress_module.progress_bar(f"reading {name}") as move:
        move(1, 2)
    assert f"reading {printable(name)}" in out.getvalue()
    assert "\x07" not in out.getvalue()


@pytest.mark.parametrize("name", ["[/red]", "[bold]x", HOSTILE])
def test_messages_and_tables_show_names_as_they_are(name, capsys):
    with Display(10, 0, enabled=True) as display:
        display.say(f"step 1: {name}")
    show({name: {name: Scores({f"{name}": 0.5}, f"convention of {name}")}})
    found = capsys.readouterr()
    assert f"step 1: {printable(name)}" in found.err
    assert found.out.count(printable(name)) == 4
    assert is_clean(found.out + found.err)


def test_a_dataset_in_a_folder_named_like_markup_is_inspected(tmp_path, capsys):
    folder = tmp_path / "[" / "red]"
    folder.mkdir(parents=True)
    with FlatWriter(folder, image_size=(8, 8)) as writer:
        writer.add(b"image", 0)
    done = CliRunner().invoke(app, ["data", "validate", str(folder)])
    assert done.exit_code == 1  # the image is none
    assert str(folder) in done.output
    assert is_clean(done.output)
