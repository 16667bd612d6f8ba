"""Credentials in the URLs of shards: a run works with them and writes them nowhere."""

import contextlib
import functools
import http.server
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from data_pipeline.common import redaction
from data_pipeline.common.redaction import redacted, redacted_text
from data_pipeline.config import DataConfig
from data_pipeline.source import RemoteSource
from data_pipeline.streaming.connection import Patience, RemoteError, Stream, Waits
from data_pipeline.streaming.samples import shard_urls
from data_pipeline.synthetic.dataset import write_set
from data_pipeline.synthetic.identities import SynthConfig
from data_pipeline.tools.convert import convert
from slurm.submit import _submit
from tests.trainer.conftest import CONFIG, run, train_words
from trainer import config_file
from trainer.config import load

PASSWORD, SIGNATURE, TOKEN, LATER_TOKEN = "hunter2hunter2", "5ignature5ignature", "t0kent0ken", "n3wt0ken"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:hunter2@host/a.tar", "https://***@host/a.tar"),
        ("https://user:hun@ter'2@host/a.tar", "https://***@host/a.tar"),
        ("s3://key:secret@bucket/a-{0..9}.tar", "s3://***@bucket/a-{0..9}.tar"),
        ("https://h/a.tar?X-Amz-Date=20260101T0000Z&X-Amz-Signature=ab12", None),
        ("https://h/a.tar?partNumber=7&sig=12", "https://h/a.tar?partNumber=7&sig=***"),
        ("https://h/get?file=a/b-{00..99}.tar&key=1", "https://h/get?file=a/b-{00..99}.tar&key=***"),
        ("https://h/a.tar?ab12", "https://h/a.tar?***"),
        ("https://h/a.tar#access_token=ab12", "https://h/a.tar#access_token=***"),
        ("https://h/a.tar?sig=it's ab12&n=1", "https://h/a.tar?sig=***&n=1"),
        ("https://bob:a/ab12@host/a.tar", "https://***@host/a.tar"),
        ("https://bob:a#ab12?@host/a.tar", "https://***@host/a.tar"),
        ("memory://bob:ab12/a.tar", "memory://***/a.tar"),
        ("_https://bob:ab12@host/a.tar", "_https://***@host/a.tar"),
        ("https:/bob:ab12@host/a.tar", "https:/***@host/a.tar"),
        ("bob:ab12@host:/a.tar", "***@host:/a.tar"),
        ("filecache::https://bob:ab12@host/a.tar", "filecache::https://***@host/a.tar"),
        ("zip://a.tar::https://bob:ab12@host/a.zip", "zip://a.tar::https://***@host/a.zip"),
        ("pipe:curl -H 'Authorization: Bearer ab12' URL", "pipe:curl ***"),
        ("pipe:/opt/bin/get ab12 | tar -x ab12", "pipe:/opt/bin/get ***"),
        ("Pipe: curl -u bob:ab12 URL", "pipe:curl ***"),
        ("pipe:SSHPASS=ab12 sshpass -e ssh h cat a.tar", "pipe:***"),
        ("pipe:'ab12'x a", "pipe:***"),
        ("curl -H 'Authorization: Bearer ab12' URL", "curl -H 'Authorization: ***' URL"),
        ('curl --header "X-Api-Key:ab12" URL', 'curl --header "X-Api-Key:***" URL'),
        ("curl -u bob:ab12 URL", "curl -u *** URL"),
        ("curl -sSLu bob:ab12 URL", "curl -sSLu *** URL"),
        ("curl --user 'bob:ab12' URL", "curl --user '***' URL"),
        ("curl -d 'token=ab12&n=1' URL", "curl -d 'token=***&n=1' URL"),
        ("get --password ab12 URL", "get --password *** URL"),
        ("get --password='ab 12'ab12 URL", "get --password=*** URL"),
        (r'get --password "a\"ab12" URL', "get --password *** URL"),
        (r"get --password a\ ab12 URL", "get --password *** URL"),
        (
            "get --pass ab12 --auth ab12 --key ab12 --sas ab12",
            "get --pass *** --auth *** --key *** --sas ***",
        ),
        ("FTP_PASS=ab12 SSHPASS=ab12 KEY=ab12 JWT=ab12 PW=ab12 get", None),
        ("sshpass -p ab12 ssh h cat a.tar", "sshpass -p *** ssh h cat a.tar"),
    ],
)
def test_a_credential_is_hidden(text, shown):
    found = redacted(text)
    assert shown in (None, found)
    assert not any(secret in found for secret in ("ab12", "hunter2", "secret@", "ter'2"))
    assert redacted(found) == found


@pytest.mark.parametrize(
    "text",
    [
        "https://host/t-{000..999}.tar",
        "https://secret-store:8080/token/a.tar",
        "s3://bucket/a.tar",
        "/data/keys/a.tar",
        "https://[::1]:8080/t-{000..999}.tar",
        "pipe:render",
        "lgaf data render {0..49}/50 --set identities=100000",
        "cat a.tar | tee -u b",
    ],
)
def test_the_rest_is_shown(text):
    assert redacted(text) == text


PARTS = (
    "token",
    "-token",
    ",-u",
    "-u",
    "--user=",
    "secret ",
    "bearer ",
    "token='",
    'key="',
    "a://",
    "a://@",
    "?a",
    "a@",
)
PARTS += ("::a", "a.", "://a:b", "//'", "-u\\", "secret:", "x=", "&k=v", "[", ":", "a:", "pass", "-", "\\")


@pytest.mark.parametrize("part", PARTS)
def test_a_long_text_is_searched_in_linear_time(part):
    """A linear search takes 0.2 s of CPU time, a quadratic one 20 s or more: no machine is so slow."""
    text = part * (160_000 // len(part))
    before = time.process_time()
    redacted_text(text)
    redacted(f"a://b{text}")
    assert time.process_time() - before < 15


def test_the_credentials_of_a_command_are_hidden_in_its_output():
    command = "pipe:curl -u 'bob:hunter2' https://host/a.tar?sig=a%2Fb%2Fc"
    assert redacted_text("hunter2 or a/b/c is wrong", command) == "*** or *** is wrong"
    assert redacted_text(f"cannot run {command!s}.", command) == "cannot run pipe:curl ***."


@pytest.mark.parametrize("end", ["", " at the end", "\n" + "x " * 300])
def test_the_output_of_a_command_is_cut_after_its_credentials_are_removed(end, monkeypatch):
    monkeypatch.setenv("TEXT", "> Authorization: Bearer " + "hunter2" * 100 + end)
    stream = Stream('pipe:echo "$TEXT" >&2; exit 7', Patience(attempts=1), Waits())
    with pytest.raises(RemoteError, match="status 7 of the command, with the output: ") as error:
        stream.read()
    assert "hunter2" not in str(error.value)
    assert len(str(error.value)) < 900


def test_a_word_that_is_longer_than_the_shown_output_is_not_shown(monkeypatch):
    stream = Stream("pipe:head -c 70000 /dev/zero | tr '\\0' h >&2; exit 7", Patience(attempts=1), Waits())
    with pytest.raises(RemoteError, match="status 7 of the command;") as error:
        stream.read()
    assert "hh" not in str(error.value)


def _arguments():
    """Return the arguments of all processes, as every user can read them."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # the process has ended
            found.append(file.read_bytes())
    return found


def test_the_list_of_processes_does_not_show_a_command(tmp_path):
    os.mkfifo(tmp_path / "end")
    mark = f"hunter2-{os.getpid()}"
    command = (
        f": {mark}; head -c 512 /dev/zero; read -r line < {tmp_path}/end; echo ${{LGAF_COMMAND-unset}} >&2"
    )
    stream = Stream(f"pipe:{command}; exit 7", Patience(attempts=1), Waits())
    assert stream.read() == bytes(512)
    shells = [text for text in _arguments() if b"LGAF_COMMAND" in text]
    assert len(shells) >= 2
    assert not any(mark.encode() in text for text in _arguments())
    (tmp_path / "end").write_text("\n")
    # The programs that the command starts do not inherit it.
    with pytest.raises(RemoteError, match="status 7 of the command, with the output: unset;"):
        stream.read()


def test_the_values_of_a_configuration_are_searched_one_by_one():
    config = {
        "shards": ["https://u:hunter2@h/it's?sig=hunter2", "pipe:get hunter2"],
        "n": [1, None],
        "api_key": "x",
    }
    shown = {"shards": ["https://***@h/it's?sig=***", "pipe:get ***"], "n": [1, None], "api_key": "***"}
    assert redaction.redacted_values(config) == shown


def test_a_wrong_configuration_is_reported_without_credentials():
    for value in ('"https://u:hunter2@host/a.tar"', '[["https://u:hunter2@host/a.tar"]]'):
        with pytest.raises(ValueError, match=r"\*\*\*@host") as error:
            load(CONFIG, ["data.path=[]", f"data.shards={value}", "data.num_classes=3"])
        assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    "pattern", ["https://u:hunter2@h/{0..", "https://u:hunter2@h/a}", "nothing://u:hunter2@h/a"]
)
def test_shards_that_cannot_be_read_are_reported_without_credentials(pattern):
    with pytest.raises(ValueError, match=r"\*\*\*@h/") as error:
        shard_urls([pattern])
    assert "hunter2" not in str(error.value)


def test_a_command_with_a_wrong_protocol_is_reported_without_credentials():
    with pytest.raises(
        ValueError, match=r"^pipe:curl \*\*\*: expected pipe:.*, found another text; "
    ) as error:
        shard_urls(["Pipe:curl -H 'Authorization: Bearer hunter2' https://h/a.tar"])
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["https://bob:hunter2@host/a.tar?sig", "https://hunt.hunter2@host/a.tar?sig"]
)
def test_a_url_in_the_place_of_a_key_is_reported_without_credentials(name, tmp_path):
    (tmp_path / "a.toml").write_text(f"'{name}' = 1")
    for path, override in ((CONFIG, f"{name}=1"), (tmp_path / "a.toml", "seed=1")):
        with pytest.raises(ValueError, match=r"\*\*\*@host") as error:
            load(path, [override])
        assert "hunter2" not in str(error.value)


def test_a_long_value_is_cut_before_it_is_searched(monkeypatch):
    searched = []
    monkeypatch.setattr(redaction, "redacted", lambda text: searched.append(len(text)) or text)
    for value in ("token" * 100_000, [["token" * 100_000] * 100] * 100, {"k" * 9000: "v" * 9000}):
        assert len(config_file._shown(value)) <= 80
    assert sum(searched) < 10_000_000
    assert max(searched) <= 4096


def _fingerprint(*urls):
    return RemoteSource(DataConfig(shards=urls, num_classes=2)).fingerprint


def test_another_token_is_the_same_dataset_in_the_same_order():
    before, now = (
        DataConfig(shards=[f"https://u:{token}{{a,b}}@h/get?token={token}{{2,1}}&n={{1..3}}"], num_classes=2)
        for token in ("zzzz", "aaaa")
    )
    assert RemoteSource(before).fingerprint == RemoteSource(now).fingerprint
    assert json.loads(before.model_dump_json())["shards"] == json.loads(now.model_dump_json())["shards"]


def test_signatures_change_neither_the_order_nor_the_fingerprint():
    names = ("alpha", "beta", "gamma")
    for form in (
        "https://h/dl?sig={}&id={}",
        "https://h/dl?X-Amz-Date={0}&X-Amz-Signature={0}&id={1}",
        "pipe:curl -H 'X-Token: {}' https://h/{}.tar",
    ):
        before = [form.format(f"zz{3 - i}", name) for i, name in enumerate(names)]
        now = [form.format(f"aa{i}", name) for i, name in enumerate(names)]
        assert [before.index(url) for url in shard_urls(before)] == [
            now.index(url) for url in shard_urls(now)
        ]
        assert _fingerprint(*before) == _fingerprint(*now)
    # Shards that differ only in credentials stay in the order of the list.
    alike = [f"https://h/dl?sig={sig}" for sig in ("b", "a", "c")]
    assert shard_urls(alike) == alike


def test_another_id_is_another_dataset():
    assert _fingerprint("https://h/dl?id=first&sig=q") != _fingerprint("https://h/dl?id=other&sig=q")
    assert _fingerprint("pipe:cat a.tar") != _fingerprint("pipe:cat b.tar")


def test_a_submission_that_sbatch_refuses_leaves_nothing_for_others_to_read(tmp_path, monkeypatch):
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f'#!/bin/sh\necho "$SLURM_UMASK" > {tmp_path}/umask\nexit 1\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_UMASK", raising=False)
    monkeypatch.chdir(tmp_path)
    before = os.umask(0o022)
    try:
        with pytest.raises(ValueError, match="expected sbatch to accept the job"):
            _submit(CONFIG, ["data.shards=https://bob:hunter2@h/a.tar"], tmp_path / "logs", {"nodes": 1})
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
    holders = [path for path in tmp_path.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
    assert holders
    assert [path.stat().st_mode & 0o077 for path in holders] == [0] * len(holders)
    # The job itself keeps the user's umask.
    assert (tmp_path / "umask").read_text() == "0022\n"
    assert "SLURM_UMASK" not in os.environ


class Handler(http.server.SimpleHTTPRequestHandler):
    """Answers only requests with the right password and signature."""

    def do_GET(self):
        if "Authorization" not in self.headers or "X-Amz-Signature=" not in self.path:
            self.send_error(403)
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """`host:port` of a server of two shards, in which one image is damaged."""
    folder = tmp_path_factory.mktemp("server")
    write_set(
        folder / "set", SynthConfig(identities=4, images_per_identity=4, held_out_identities=2, pairs=2)
    )
    convert(folder / "set", folder / "shards", shard_samples=8)
    shard = folder / "shards" / "train-000001.tar"
    content = bytearray(shard.read_bytes())
    at = content.index(b"\xff\xd8\xff")
    content[at : at + 400] = bytes(400)
    shard.write_bytes(content)
    handler = functools.partial(Handler, directory=folder / "shards")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def train(run_dir, address, shards, *, token=TOKEN):
    url = f"http://bob:{PASSWORD}@{address}/{shards}.tar?X-Amz-Signature={SIGNATURE}&X-Amz-Security-Token={token}"
    options = (
        "steps=4",
        "checkpoint.every_steps=2",
        "data.path=[]",
        f'data.shards=["{url}"]',
        "data.num_classes=4",
        "data.shards_window=4",
        "evaluation.sets=[]",
        "global_batch=8",
        "log_every_steps=1",
    )
    return run(*train_words(run_dir, run_dir, *options))


def secrets_in(text):
    return {secret for secret in (PASSWORD, SIGNATURE, TOKEN, LATER_TOKEN) if secret in text}


def test_a_run_with_credentials_leaves_none_behind_and_resumes_with_others(address, tmp_path):
    run_dir = tmp_path / "run"
    first = train(run_dir, address, "train-{000000..000001}")
    assert first.returncode == 0, first.stderr
    shutil.rmtree(run_dir / "checkpoints" / "step-00000004")
    resumed = train(run_dir, address, "train-{000000..000001}", token=LATER_TOKEN)
    assert resumed.returncode == 0, resumed.stderr
    assert "steps 2 to 4" in resumed.stderr
    shown = run("checkpoint", "show", run_dir)
    refused = train(tmp_path / "other", address, "absent")
    assert "absent.tar?X-Amz-Signature=***&X-Amz-Security-Token=***: cannot be read: HTTP status 404" in (
        refused.stderr
    )
    all_done = (first, resumed, shown, refused)
    printed = "".join(text for done in all_done for text in (done.stdout, done.stderr))
    assert not secrets_in(printed)
    assert f"http://***@{address}" in shown.stdout
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"checkpoint.json", "metrics.jsonl", "quarantine.jsonl", "report.html"} <= names
    for path in files:
        assert not secrets_in(path.read_bytes().decode("latin-1")), path
    assert "***@" in (run_dir / "quarantine.jsonl").read_text()
