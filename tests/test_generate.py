# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Against a real HTTP server in a thread, and a real process that is killed."""

import html
import json
import re
import subprocess
import sys
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import openai
import pytest
from datasets import Dataset, load_dataset

from luffy_trl.data import generate
from luffy_trl.data.generate import GenerateArguments, Journal, main


class Endpoint(ThreadingHTTPServer):
    """
    Speaks `/v1/chat/completions`: solves `a + b`.

    `script` is called with the number of a request, from 0, and its payload; it returns `None` for a right answer, a
    dict that updates the message, or `(status, headers)`, perhaps with a body; `"drop"` closes the connection.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, script=lambda number, payload: None, delay=0.0):
        self.script, self.delay = script, delay
        self.payloads, self.times, self.headers, self.under_way, self.most_under_way = [], [], [], 0, 0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *args):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            number = len(server.payloads)
            server.payloads.append(payload)
            server.times.append(time.monotonic())
            server.headers.append(dict(self.headers))
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        time.sleep(server.delay)
        with server.lock:
            server.under_way -= 1
        action = server.script(number, payload) if self.path == "/v1/chat/completions" else (404, {})
        if action == "drop":
            self.close_connection = True
            return
        if isinstance(action, tuple):
            return self.reply(action[0], *action[2:] or [b'{"error": "no"}'], action[1])
        a, b = map(int, re.search(r"(\d+) \+ (\d+)", payload["messages"][-1]["content"]).groups())
        message = {"role": "assistant", "content": f"\n\n\\boxed{{{a + b}}}", "reasoning_content": f"\n{a}, {b}.\n"}
        message |= action or {}
        finish_reason = message.pop("finish_reason", "stop")
        body = {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}], "usage": {}}
        self.reply(200, json.dumps(body).encode())

    def reply(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def write_problems(tmp_path, num_rows):
    rows = [{"problem": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(num_rows)]
    Dataset.from_list(rows).to_json(tmp_path / "problems.jsonl")


def run(tmp_path, endpoint, num_rows=3, **kwargs):
    write_problems(tmp_path, num_rows)
    kwargs = {"dataset_name": str(tmp_path / "problems.jsonl"), "output_dir": str(tmp_path / "data"), **kwargs}
    main(GenerateArguments(base_url=endpoint.url, model="teacher", **kwargs))
    data = load_dataset(kwargs["output_dir"], split="train")[:]
    return data, json.loads((tmp_path / "data" / "report.json").read_text())


def test_rows_and_requests(tmp_path):
    with Endpoint() as endpoint:
        data, report = run(tmp_path, endpoint, temperature=0.5, top_p=0.9, max_tokens=77)
    assert data["prompt"] == [[{"role": "user", "content": f"What is {i} + 1?"}] for i in range(3)]
    assert data["demonstrations"] == [[f"<think>\n{i}, 1.\n</think>\n\n\\boxed{{{i + 1}}}"] for i in range(3)]
    assert data["answer"] == ["1", "2", "3"]
    assert report["requests"] == {"in the journal": 0, "sent": 3, "answered": 3}
    asked = sorted(endpoint.payloads, key=lambda payload: payload["messages"][0]["content"])
    instruction = r"Please reason step by step, and put your final answer within \boxed{}."
    assert asked[0] == {
        "model": "teacher",
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 77,
        "messages": [{"role": "user", "content": f"What is 0 + 1?\n\n{instruction}"}],
    }
    assert "Authorization" not in endpoint.headers[0]


@pytest.mark.parametrize(
    ("message", "trace"),
    [
        ({"reasoning_content": None, "reasoning": "Hm."}, "<think>\nHm.\n</think>\n\n\\boxed{1}"),
        ({"reasoning_content": None, "content": "Hm.</think>\\boxed{1}"}, "<think>\nHm.</think>\\boxed{1}"),
        ({"reasoning_content": "", "content": "<think>\nHm.</think>\\boxed{1}"}, "<think>\nHm.</think>\\boxed{1}"),
        (
            {
                "reasoning_content": "",
                "content": [{"type": "text", "text": "<think>\nHm.</think>"}, {"text": "\\boxed{1}"}],
            },
            "<think>\nHm.</think>\\boxed{1}",
        ),
        (
            {"reasoning_content": "", "content": "<think>\nHm \ud800.</think>\\boxed{1}"},
            "<think>\nHm ?.</think>\\boxed{1}",
        ),
    ],
)
def test_ways_to_return_the_reasoning(tmp_path, message, trace):
    with Endpoint(lambda number, payload: message) as endpoint:
        assert run(tmp_path, endpoint, num_rows=1)[0]["demonstrations"] == [[trace]]


def test_what_is_kept(tmp_path):
    answers = [{}, {"content": r"\boxed{7}"}, {"reasoning_content": "Other."}, {"finish_reason": "length"}]
    with Endpoint(lambda number, payload: answers[number]) as endpoint:
        kwargs = {"num_rows": 1, "num_traces": 4, "concurrency": 1}
        data, report = run(tmp_path, endpoint, **kwargs)
        right = ["<think>\n0, 1.\n</think>\n\n\\boxed{1}", "<think>\nOther.\n</think>\n\n\\boxed{1}"]
        assert data["demonstrations"] == [right]
        assert report["traces"] == {
            "read": 4,
            "kept": 2,
            "dropped": {"wrong answer": 1, "repeats another trace": 1},
        }
        # all that are finished, from the same journal
        data, report = run(tmp_path, endpoint, verify="none", overwrite_output_dir=True, **kwargs)
        assert [len(traces) for traces in data["demonstrations"]] == [3]
        assert report["requests"] == {"in the journal": 4}
    assert len(endpoint.payloads) == 4


def test_what_is_not_asked(tmp_path):
    rows = [
        {"prompt": [{"role": "system", "content": "Be it."}, {"role": "user", "content": "1 + 1"}], "answer": "2"},
        {"prompt": [{"role": "user", "content": "2 + 1"}], "answer": None},
        {"prompt": [{"role": "user", "content": "3 + 1"}], "answer": "4"},
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    Dataset.from_list([{"question": "3 + 1"}]).to_json(tmp_path / "benchmark.jsonl")
    kwargs = {"dataset_name": str(tmp_path / "rows.parquet"), "evaluation_files": [str(tmp_path / "benchmark.jsonl")]}
    with Endpoint() as endpoint:
        data, report = run(tmp_path, endpoint, instruction="", **kwargs)
        assert [payload["messages"] for payload in endpoint.payloads] == [[{"role": "user", "content": "1 + 1"}]]
        run(tmp_path, endpoint, send_system_prompt=True, overwrite_output_dir=True, **kwargs)
        assert endpoint.payloads[1]["messages"][0] == rows[0]["prompt"][0]
    assert data["prompt"] == [rows[0]["prompt"]]
    assert report["rows"]["dropped"] == {"no gold answer": 1, "found in a benchmark": 1}


def test_the_key_comes_from_the_environment(tmp_path, monkeypatch):
    with Endpoint() as endpoint:
        with pytest.raises(ValueError, match="the environment variable TEACHER_KEY, which is not set"):
            run(tmp_path, endpoint, api_key_env="TEACHER_KEY")
        monkeypatch.setenv("TEACHER_KEY", "secret")
        run(tmp_path, endpoint, api_key_env="TEACHER_KEY")
    assert endpoint.headers[0]["Authorization"] == "Bearer secret"
    assert not any("secret" in path.read_text() for path in tmp_path.rglob("*.json*"))


def test_the_environment_of_the_client_goes_nowhere(tmp_path, monkeypatch):
    secrets = {"OPENAI_API_KEY": "sk-mine", "OPENAI_ADMIN_KEY": "sk-mine", "OPENAI_PROJECT_ID": "proj-mine"}
    secrets |= {"OPENAI_ORG_ID": "org-mine", "OPENAI_CUSTOM_HEADERS": "Authorization: Bearer mine\nX-Key: mine"}
    for name, value in {**secrets, "TEACHER_KEY": "secret"}.items():
        monkeypatch.setenv(name, value)
    with Endpoint() as endpoint:
        run(tmp_path, endpoint, num_rows=1)
        assert "Authorization" not in endpoint.headers[0]
        run(tmp_path, endpoint, num_rows=1, temperature=0.1, api_key_env="TEACHER_KEY", overwrite_output_dir=True)
        assert endpoint.headers[1]["Authorization"] == "Bearer secret"
    assert "mine" not in str(endpoint.headers)


def test_failures_for_the_time_being(tmp_path):
    failures = {0: (500, {}), 1: "drop", 2: (429, {})}
    with Endpoint(lambda number, payload: failures.get(number)) as endpoint:
        data, report = run(tmp_path, endpoint, num_rows=2, concurrency=1)
    assert data["answer"] == ["1", "2"]
    assert report["requests"] == {
        "in the journal": 0,
        "sent": 5,
        "answered": 2,
        "repeated after 500": 1,
        "repeated after RemoteProtocolError": 1,
        "repeated after 429": 1,
    }
    waits = [b - a for a, b in zip(endpoint.times, endpoint.times[1:], strict=False)]
    assert all(waits[attempt] >= 0.375 * 2**attempt for attempt in range(3))


def test_no_answer_in_time(tmp_path):
    with Endpoint(lambda number, payload: time.sleep(4) if number == 0 else None) as endpoint:
        _, report = run(tmp_path, endpoint, num_rows=1, timeout=2)
    assert report["requests"]["repeated after ReadTimeout"] >= 1
    assert report["requests"]["answered"] == 1


def test_retry_after_holds_for_all(tmp_path):
    with Endpoint(lambda number, payload: (429, {"Retry-After": "2"}) if number == 0 else None) as endpoint:
        run(tmp_path, endpoint, num_rows=6, concurrency=2)
    # the two that were started together, and then none for two seconds but what the other one's answer had let in
    late = [t - endpoint.times[0] for t in endpoint.times if t - endpoint.times[0] > 1]
    assert min(late) >= 2
    assert len(late) >= 3
    assert len(endpoint.times) == 7


@pytest.mark.parametrize(
    ("header", "seconds"), [("inf", 3600), ("99999999", 3600), ("nan", 0), ("-1", 0), ("soon", None), ("1.5", 1.5)]
)
def test_how_long_to_wait(header, seconds):
    assert generate.retry_after(httpx2.Response(429, headers={"Retry-After": header})) == seconds


@pytest.mark.parametrize(
    "body", ["[" * 100_000, '{"choices": [{"message": {"content": 5}}]}', '{"choices": [{"message": 5}]}']
)
def test_what_is_no_chat_completion(body):
    request = httpx2.Request("POST", "http://x")
    with pytest.raises(openai.APIResponseValidationError, match="not a chat completion"):
        generate.read_answer(httpx2.Response(200, text=body, request=request))


@pytest.mark.parametrize("header", ["inf", "-inf", "nan", "-1", "soon", "9" * 400, "Wed, 21 Oct 9999 07:28:00 GMT"])
def test_a_wait_without_sense_costs_no_request(tmp_path, monkeypatch, header):
    """None of it ends a run or a request; of an hour, which it waits at most, half a second is left here."""
    monkeypatch.setattr(generate, "_MAX_WAIT", 0.5)
    with Endpoint(lambda number, payload: (429, {"Retry-After": header}) if number == 0 else None) as endpoint:
        _, report = run(tmp_path, endpoint, num_rows=1)
    assert report["requests"] == {"in the journal": 0, "sent": 2, "repeated after 429": 1, "answered": 1}
    assert endpoint.times[1] - endpoint.times[0] >= 0.375


NESTED = b"[" * 100_000


def test_hostile_answers(tmp_path, capsys):
    """What cannot be read costs its request, and no other; the next run asks for it again."""
    bodies = [(200, {}, NESTED), (200, {}, b"\xff\xfe{"), (400, {}, NESTED), (500, {}, NESTED)]

    def script(number, payload):
        row = int(re.search(r"(\d+) \+", payload["messages"][0]["content"])[1])
        return bodies[row - 1] if row else None

    with Endpoint(script) as endpoint:
        data, report = run(tmp_path, endpoint, num_rows=5, concurrency=1, max_retries=0)
    assert data["answer"] == ["1"]
    assert report["requests"] == {
        "in the journal": 0,
        "sent": 5,
        "answered": 1,
        "given up after APIResponseValidationError": 2,
        "refused with 400": 1,
        "given up after 500": 1,
    }
    assert "4 requests got no answer" in capsys.readouterr().out
    with Endpoint() as endpoint:
        assert len(run(tmp_path, endpoint, num_rows=5, overwrite_output_dir=True)[0]["answer"]) == 5
    assert len(endpoint.payloads) == 4


def test_requests_under_way_are_limited(tmp_path):
    with Endpoint(delay=0.05) as endpoint:
        run(tmp_path, endpoint, num_rows=12, concurrency=3)
        assert endpoint.most_under_way == 3


def test_the_pace_by_another_clock(monkeypatch):
    """600 requests a minute are one in 0.1 seconds; after two of them the endpoint wants half a second of rest."""
    now, starts = [100.0], []

    async def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(generate.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(generate.asyncio, "sleep", sleep)
    pace = generate.Pace(requests_per_minute=600)

    async def start(number):
        for i in range(number):
            await pace.wait()
            starts.append(now[0] - 100)
            if i == 1:
                pace.hold(0.5)

    coroutine = start(5)
    with pytest.raises(StopIteration):
        coroutine.send(None)
    assert starts == pytest.approx([0.0, 0.1, 0.6, 0.7, 0.8])


def test_requests_that_are_given_up_are_asked_again(tmp_path, capsys):
    with Endpoint(lambda number, payload: (500, {}) if "0 + 1" in payload["messages"][0]["content"] else None) as bad:
        data, report = run(tmp_path, bad, max_retries=0)
    assert data["answer"] == ["2", "3"]
    assert report["requests"]["given up after 500"] == 1
    assert report["rows"]["dropped"] == {"no trace": 1}
    assert "1 requests got no answer" in capsys.readouterr().out
    with Endpoint() as good:
        data, report = run(tmp_path, good, overwrite_output_dir=True)
    assert data["answer"] == ["1", "2", "3"]
    assert report["requests"] == {"in the journal": 2, "sent": 1, "answered": 1}


@pytest.mark.parametrize("status", [400, 401, 404])
def test_an_endpoint_that_refuses(tmp_path, status):
    with Endpoint(lambda number, payload: (status, {})) as endpoint:
        with pytest.raises(SystemExit, match=f'refuses a request: {status} .*: {{"error": "no"}}'):
            run(tmp_path, endpoint, concurrency=1)
    assert len(endpoint.payloads) == 1
    assert not (tmp_path / "data").exists()


KEY = 'sk-a/B+c="7"&x\\y'


@pytest.mark.parametrize(
    "written",
    [
        KEY,
        urllib.parse.quote(KEY),
        urllib.parse.quote(KEY, safe=""),
        "".join(f"%{byte:02x}" for byte in KEY.encode()),
        urllib.parse.quote(urllib.parse.quote(KEY, safe="")),
        json.dumps(KEY)[1:-1],
        json.dumps(json.dumps(KEY))[3:-3],
        "".join(f"\\u{ord(character):04X}" for character in KEY),
        repr(KEY)[1:-1],
        html.escape(KEY),
        "".join(f"&#{ord(character)};" for character in KEY),
    ],
)
def test_the_key_is_not_printed(tmp_path, monkeypatch, capfd, written):
    monkeypatch.setenv("TEACHER_KEY", KEY)

    def find_key(text):
        return written in text or KEY in text or "sk-a" in text

    refusals = [
        (401, {}, f"x{written}y".encode()),
        (401, {}, b"z" * 470 + written.encode()),  # a message that is cut in its middle
        (307, {"Location": f"https://elsewhere/v2/{written}/chat/completions?key={written}"}),
        (302, {"Location": f"//{written}@elsewhere/login"}),
        (303, {"Location": written}),
    ]
    for refusal in refusals:
        with Endpoint(lambda number, payload, refusal=refusal: refusal) as endpoint:
            with pytest.raises(SystemExit, match="refuses a request: ") as error:
                run(tmp_path, endpoint, num_rows=1, api_key_env="TEACHER_KEY")
        assert not find_key(str(error.value)) and str(refusal[0]) in str(error.value)
    message = {"content": rf"So {written} \boxed{{1}}", "reasoning_content": f"The key is {written}."}
    with Endpoint(lambda number, payload: message) as endpoint:
        data, report = run(tmp_path, endpoint, num_rows=1, api_key_env="TEACHER_KEY")
        assert endpoint.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert data["demonstrations"] == [["<think>\nThe key is [key].\n</think>\n\nSo [key] \\boxed{1}"]]
    assert report["requests"]["with the key in the answer, taken out"] == 1
    files = [path.read_bytes().decode(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 5 and not any(map(find_key, [*files, *capfd.readouterr()]))


def test_a_key_in_the_address_is_not_printed(tmp_path, monkeypatch):
    def write_address(endpoint):
        endpoint.url = endpoint.url.replace("://", "://me:pa55word@")
        return endpoint

    with Endpoint(lambda number, payload: (401, {}, b"Basic bWU6cGE1NXdvcmQ= is me:pa55word")) as endpoint:
        with pytest.raises(SystemExit, match="refuses a request: 401") as error:
            run(tmp_path, write_address(endpoint), num_rows=1)
    assert "Basic [key] is me:[key]" in str(error.value) and "me:pa55word@" not in str(error.value)
    with Endpoint() as endpoint:
        _, report = run(tmp_path, write_address(endpoint), num_rows=1)
        assert endpoint.headers[0]["Authorization"] == "Basic bWU6cGE1NXdvcmQ="
    assert report["settings"]["base_url"] == f"http://127.0.0.1:{endpoint.server_port}/v1"
    assert not any(b"pa55word" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_short_key_is_no_word_of_an_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "EMPTY")  # what one gives a server that asks for none
    with Endpoint(lambda number, payload: {"reasoning_content": "The set is EMPTY."}) as endpoint:
        data, _ = run(tmp_path, endpoint, num_rows=1, api_key_env="TEACHER_KEY")
    assert data["demonstrations"] == [["<think>\nThe set is EMPTY.\n</think>\n\n\\boxed{1}"]]


def test_a_key_that_is_none(tmp_path, monkeypatch):
    for value in ("two words", "sk-secret\n", "sk-sécret"):
        monkeypatch.setenv("TEACHER_KEY", value)
        with pytest.raises(ValueError, match="the value of TEACHER_KEY has white space, or characters that") as error:
            GenerateArguments(
                dataset_name="x",
                output_dir=str(tmp_path / "x"),
                model="m",
                base_url="http://x",
                api_key_env="TEACHER_KEY",
            )
        assert value.strip() not in str(error.value)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_an_endpoint_that_redirects(tmp_path, status):
    location = {"Location": "https://elsewhere/v1/chat/completions"}
    with Endpoint(lambda number, payload: (status, location) if number else None) as endpoint:
        with pytest.raises(
            SystemExit, match=f"refuses a request: {status} .*: it redirects to https://elsewhere/v1/chat"
        ):
            run(tmp_path, endpoint, concurrency=1)
    assert len(endpoint.payloads) == 2  # also where it has answered before
    with Endpoint(lambda number, payload: (status, {"Location": "/v2/chat/completions"})) as endpoint:
        url = endpoint.url.replace("/v1", "/v2")
        with pytest.raises(SystemExit, match=f"redirects to .*. If you trust it, set `base_url` to {url}$"):
            run(tmp_path, endpoint)
    assert not (tmp_path / "data").exists()


def test_an_endpoint_that_answers_nothing(tmp_path):
    with Endpoint(lambda number, payload: (503, {})) as endpoint:
        with pytest.raises(SystemExit, match=r"has answered none of 3 requests: 3 given up after 503\. Check that it"):
            run(tmp_path, endpoint, max_retries=0)
    with pytest.raises(SystemExit, match=r"has answered none of 3 requests: 3 given up after ConnectError\. Check"):
        run(tmp_path, endpoint, max_retries=0)  # it is gone


@pytest.mark.parametrize("same", ["output_dir", "journal_file"])
def test_two_runs_at_once(tmp_path, same):
    """The second is refused and asks for nothing; when the first has ended, it has all of its answers."""
    first_asks, go_on = threading.Event(), threading.Event()

    def script(number, payload):
        first_asks.set()
        assert go_on.wait(600)

    names = {"output_dir": str(tmp_path / "data"), "journal_file": str(tmp_path / "journal.jsonl")}
    other = {name: value if name == same else f"{value}.other" for name, value in names.items()}
    with Endpoint(script) as endpoint:
        results = []
        thread = threading.Thread(target=lambda: results.append(run(tmp_path, endpoint, 12, **names)))
        thread.start()
        assert first_asks.wait(600)
        with pytest.raises(
            ValueError, match=f"`{same}`: another run is writing '{names[same]}', and holds .*.lock. Wait"
        ):
            run(tmp_path, endpoint, 12, **other)
        go_on.set()
        thread.join()
        ((data, report),) = results
        assert len(endpoint.payloads) == 12 and report["requests"]["answered"] == 12
        run(tmp_path, endpoint, 12, overwrite_output_dir=True, **names)
        assert len(endpoint.payloads) == 12
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 12


def test_a_run_that_began_before_another_ended(tmp_path):
    with Endpoint() as endpoint:
        write_problems(tmp_path, 3)
        args = GenerateArguments(
            dataset_name=str(tmp_path / "problems.jsonl"),
            output_dir=str(tmp_path / "data"),
            base_url=endpoint.url,
            model="teacher",
        )
        run(tmp_path, endpoint)
        with pytest.raises(ValueError, match="`output_dir` .* is there already"):
            main(args)
    assert len(endpoint.payloads) == 3


def test_one_request_that_is_refused(tmp_path):
    with Endpoint(lambda number, payload: (400, {}) if number == 1 else None) as endpoint:
        data, report = run(tmp_path, endpoint, concurrency=1)
    assert len(data["answer"]) == 2
    assert report["requests"]["refused with 400"] == 1


def test_killed_and_started_again(tmp_path):
    write_problems(tmp_path, 30)
    command = [sys.executable, "-m", "luffy_trl.data.generate", "--dataset_name", str(tmp_path / "problems.jsonl")]
    command += ["--output_dir", str(tmp_path / "data"), "--model", "teacher", "--concurrency", "2"]
    journal = tmp_path / "data.journal.jsonl"
    with Endpoint(delay=0.1) as endpoint:
        process = subprocess.Popen(
            [*command, "--base_url", endpoint.url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not journal.exists() or journal.read_bytes().count(b"\n") < 8:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
        time.sleep(0.3)
    num_answered = journal.read_bytes().count(b"\n")
    assert 8 <= num_answered < 30
    assert not (tmp_path / "data").exists()
    with open(journal, "ab") as file:  # as if the last line had been cut
        file.write(journal.read_bytes().splitlines()[-1][:40])

    with Endpoint() as endpoint:
        data, report = run(tmp_path, endpoint, num_rows=30)
    assert len(endpoint.payloads) == 30 - num_answered
    assert len({payload["messages"][0]["content"] for payload in endpoint.payloads}) == 30 - num_answered
    assert report["requests"] == {
        "in the journal": num_answered,
        "sent": 30 - num_answered,
        "answered": 30 - num_answered,
    }
    assert data["answer"] == [str(i + 1) for i in range(30)]
    assert data["demonstrations"][29] == ["<think>\n29, 1.\n</think>\n\n\\boxed{30}"]
    assert len(Journal(str(journal))) == len(journal.read_text().splitlines()) == 30  # the cut line is gone


def test_other_settings_are_other_requests(tmp_path):
    with Endpoint() as endpoint:
        run(tmp_path, endpoint)
        run(tmp_path, endpoint, temperature=1.0, overwrite_output_dir=True)
        run(tmp_path, endpoint, num_traces=2, overwrite_output_dir=True)
    assert len(endpoint.payloads) == 3 + 3 + 3


def test_a_journal_that_cannot_be_read(tmp_path):
    (tmp_path / "journal.jsonl").write_text('{"key": "a"}\nnonsense\n{"key": "b"}\n')
    with pytest.raises(ValueError, match="Line 2 of the journal .* cannot be read"):
        Journal(str(tmp_path / "journal.jsonl"))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"verify": "flags"}, "`verify='flags'` is for traces that a dataset brings"),
        ({"base_url": "localhost:8000"}, "`base_url` must begin with http:// or https://"),
        ({"num_traces": 0}, "`num_traces` must be at least 1, got 0"),
        ({"requests_per_minute": 0}, "`requests_per_minute` must be above 0, got 0"),
    ],
)
def test_arguments(tmp_path, kwargs, message):
    kwargs = {"base_url": "http://localhost/v1", "output_dir": str(tmp_path / "data"), **kwargs}
    with pytest.raises(ValueError, match=message):
        GenerateArguments(dataset_name="x", model="teacher", **kwargs)
