"""Credentials in the URLs of shards: a run works with them and writes them nowhere."""

import functools
import http.server
import json
import shutil
import threading

import pytest

from data_pipeline.common.redaction import redacted
from data_pipeline.config import DataConfig
from data_pipeline.source import RemoteSource
from data_pipeline.streaming.samples import shard_urls
from data_pipeline.synthetic.dataset import write_set
from data_pipeline.synthetic.identities import SynthConfig
from data_pipeline.tools.convert import convert
from tests.trainer.conftest import CONFIG, run, train_words
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
        ("pipe:curl -H 'Authorization: Bearer ab12' URL", "pipe:curl -H 'Authorization: ***' URL"),
        ('pipe:curl --header "X-Api-Key:ab12" URL', 'pipe:curl --header "X-Api-Key:***" URL'),
        ("pipe:curl -u bob:ab12 URL", "pipe:curl -u *** URL"),
        ("pipe:curl --user 'bob:ab12' URL", "pipe:curl --user '***' URL"),
        ("pipe:curl -d 'token=ab12&n=1' URL", "pipe:curl -d 'token=***&n=1' URL"),
        ("pipe:get --password ab12 URL", "pipe:get --password *** URL"),
        ("pipe:get --password='ab 12' URL", "pipe:get --password=*** URL"),
        ("pipe:AWS_SECRET_ACCESS_KEY=ab12 aws s3 cp s3://b/a.tar -", None),
        ("pipe:sshpass -p ab12 ssh h cat a.tar", "pipe:sshpass -p *** ssh h cat a.tar"),
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
        "pipe:lgaf data render {0..49}/50 --set identities=100000",
        "pipe:cat a.tar | tee -u b",
    ],
)
def test_the_rest_is_shown(text):
    assert redacted(text) == text


def test_the_credentials_of_a_command_are_hidden_in_its_output():
    command = "pipe:curl -u 'bob:hunter2' https://host/a.tar?sig=a%2Fb%2Fc"
    assert redacted("hunter2 or a/b/c is wrong", command) == "*** or *** is wrong"


def test_a_wrong_configuration_is_reported_without_credentials():
    for value in ('"https://u:hunter2@host/a.tar"', '[["https://u:hunter2@host/a.tar"]]'):
        with pytest.raises(ValueError, match=r"\*\*\*@host") as error:
            load(CONFIG, ["data.path=[]", f"data.shards={value}", "data.num_classes=3"])
        assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("pattern", ["https://u:hunter2@h/{0..", "nothing://u:hunter2@h/a"])
def test_shards_that_cannot_be_read_are_reported_without_credentials(pattern):
    with pytest.raises(ValueError, match=r"\*\*\*@h/") as error:
        shard_urls([pattern])
    assert "hunter2" not in str(error.value)


def test_another_token_is_the_same_dataset_in_the_same_order():
    before, now = (
        DataConfig(shards=[f"https://u:{token}{{a,b}}@h/get?t={token}{{2,1}}&n={{1..3}}"], num_classes=2)
        for token in ("zzzz", "aaaa")
    )
    assert RemoteSource(before).fingerprint == RemoteSource(now).fingerprint
    assert json.loads(before.model_dump_json())["shards"] == json.loads(now.model_dump_json())["shards"]


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
