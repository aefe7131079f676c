"""Clients that people use, unchanged, while the pod that serves them changes nodes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

from midstream_testbed.namespace import Process
from town import ADDRESS, PORT, Town

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
URL = f"http://{ADDRESS}:{PORT}/v1"
MODEL = "midstream-tiny"


def test_websockets_through_a_server_that_only_uses_the_handoff_library(town: Town) -> None:
    town.serve("echo", [sys.executable, str(EXAMPLES / "websocket_echo.py"), str(PORT)])
    clients = [
        town.client.popen(
            [sys.executable, str(HERE / "ws_client.py"), f"ws://{ADDRESS}:{PORT}/", str(seed), "5"],
            stdout=subprocess.PIPE,
            name=f"ws-{seed}",
        )
        for seed in range(8)
    ]
    capture = town.client.capture()
    town.wait_connections(8)
    for _ in range(4):
        town.hop()
    results = []
    for client in clients:
        out, _ = client.communicate(timeout=60)
        assert client.returncode == 0, client.output()[-2000:]
        results.append(json.loads(out))
    packets = capture.stop()
    assert all(r["echoed"] > 20 and r["close_code"] == 1000 for r in results), results
    assert [p for p in packets if p.rst] == []


def body(tokens: int, **more: Any) -> dict[str, Any]:
    prompt = "The license grants you"
    return {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}


def said(process: Process) -> str:
    """What it wrote, once it has ended well."""
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 0, process.output()[-2000:] + str(out)[-500:]
    return out.decode()


def text_of(sse: str) -> str:
    events = [line.removeprefix("data: ") for line in sse.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


def test_curl(town: Town) -> None:
    """A stream, a whole answer, an HTTP/1.0 client, a large request that is still being sent, and two requests on one
    connection, all across two hops."""
    town.serve_llm()
    stream = json.dumps(body(700, stream=True))
    whole = json.dumps(body(700))
    large = json.dumps(body(40, stream=True)) + " " * (600 << 10)
    post = f"{URL}/completions"
    wanted = json.loads(said(town.curl("-d", whole, post)))["choices"][0]["text"]
    short = text_of(said(town.curl("-d", json.dumps(body(40, stream=True)), post)))
    upload = ["--data-binary", "@-", "--limit-rate", "200K", post]
    capture = town.client.capture()
    running = {
        "stream": town.curl("-d", stream, post, name="stream"),
        "whole": town.curl("-d", whole, post, name="whole"),
        "http1.0": town.curl("--http1.0", "-d", stream, post, name="http10"),
        "two": town.curl("-d", stream, post, "--next", "-sS", "-N", "-d", stream, post, name="two"),
    }
    upload_file = town.fleet.folder / "large.json"
    upload_file.write_text(large, encoding="utf-8")
    running["upload"] = town.curl(*[f"@{upload_file}" if x == "@-" else x for x in upload], name="upload")
    town.wait_connections(5)
    time.sleep(0.5)
    town.hop()
    town.hop()
    assert text_of(said(running["stream"])) == wanted
    assert json.loads(said(running["whole"]))["choices"][0]["text"] == wanted
    assert text_of(said(running["http1.0"])) == wanted
    assert text_of(said(running["upload"])) == short
    first, end, second = said(running["two"]).partition("data: [DONE]\n\n")
    assert text_of(first + end) == text_of(second) == wanted
    assert [p for p in capture.stop() if p.rst] == []


def test_openai_sdk(town: Town) -> None:
    town.serve_llm()
    argv = [sys.executable, str(HERE / "openai_client.py"), URL]

    def start(name: str) -> Process:
        return town.client.popen([*argv, "6", "400"], stdout=subprocess.PIPE, name=name)

    wanted = json.loads(said(start("unmoved")))
    capture = town.client.capture()
    moved = start("moved")
    town.wait_connections(6)
    hops = 0
    while moved.poll() is None and hops < 6:
        town.hop()
        hops += 1
        time.sleep(0.4)
    assert json.loads(said(moved)) == wanted
    assert hops >= 3, "too few migrations to prove anything"
    assert [p for p in capture.stop() if p.rst] == []


def test_chromium_reads_a_stream_with_fetch(town: Town, tmp_path: Path) -> None:
    town.serve_llm()
    wanted = text_of(said(town.curl("-d", json.dumps(body(900, stream=True)), f"{URL}/completions")))
    sink = town.client.popen([sys.executable, str(HERE / "sink.py"), "9000"], stdout=subprocess.PIPE, name="sink")
    task = {"url": f"{URL}/completions", "report": "http://127.0.0.1:9000/", "body": body(900, stream=True)}
    page = f"file://{HERE / 'browser_page.html'}#{quote(json.dumps(task))}"
    capture = town.client.capture()
    browser = town.client.popen(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-web-security",
         f"--user-data-dir={tmp_path / 'profile'}", "--remote-debugging-port=0", page],
        env={"HOME": str(tmp_path)}, name="chromium",
    )  # fmt: skip
    try:
        town.wait_connections(1)
        time.sleep(0.5)
        town.hop()
        town.hop()
        out, _ = sink.communicate(timeout=90)
    finally:
        browser.terminate()
        browser.wait()
    result = json.loads(out.splitlines()[-1])
    assert result["error"] is None, result
    assert (result["status"], result["done"], result["text"]) == (200, True, wanted)
    assert result["pieces"] > 50, "the text was not read as it came"
    assert [p for p in capture.stop() if p.rst and PORT in (p.sport, p.dport)] == []
