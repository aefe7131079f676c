"""A gateway's connections change nodes in every state of a request, over real sockets and real migrations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from town import ADDRESS, PORT, Town

HERE = Path(__file__).parent


@pytest.mark.parametrize("hops", [1, 2, 5])
def test_every_state_of_a_request_is_moved(town: Town, hops: int) -> None:
    town.serve_llm()
    argv = [sys.executable, str(HERE / "states_client.py"), ADDRESS, str(PORT)]
    capture = town.client.capture()
    client = town.client.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, name="states")
    assert client.stdout is not None
    assert client.stdout.readline().strip() == b"ready", client.output()
    for _ in range(hops):
        town.hop()
    out, _ = client.communicate(b"go\n", timeout=90)
    assert client.returncode == 0, client.output()[-3000:]
    got = json.loads(out)
    (wanted,) = got.pop("unmoved")
    assert len(got) == 9
    for state, answers in got.items():
        assert answers and set(answers) == {wanted}, state
    assert [p for p in capture.stop() if p.rst] == []


def test_a_gateway_that_is_asked_to_end_lets_answers_end(town: Town) -> None:
    town.serve_llm()
    body = {"model": "midstream-tiny", "prompt": "The", "max_tokens": 300, "stream": True, "ignore_eos": True}
    curl = town.curl("-d", json.dumps(body), f"http://{ADDRESS}:{PORT}/v1/completions")
    town.wait_connections(1)
    serving = town.fleet.pods[town.pods[0].name].process
    serving.terminate()
    out, _ = curl.communicate(timeout=60)
    assert curl.returncode == 0 and out.rstrip().endswith(b"data: [DONE]")
    refused = town.curl("-d", json.dumps(body), f"http://{ADDRESS}:{PORT}/v1/completions")
    refused.communicate(timeout=60)
    assert refused.returncode == 7, "a pod that ends takes no new clients"
    assert serving.wait(timeout=60) == 0
