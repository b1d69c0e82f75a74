"""Language models as explainers: prompts and answers, a model on this machine, endpoints that work and that do not."""

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch

from mnemon.errors import BackendUnavailable
from mnemon.inspection.explain.activations import UnitActivations
from mnemon.inspection.explain.choose import explainer_from_option
from mnemon.inspection.explain.endpoint import KEY_VARIABLE, EndpointExplainer
from mnemon.inspection.explain.explainer import Evidence, ExplainerError, Hypothesis
from mnemon.inspection.explain.local import LocalExplainer
from mnemon.inspection.explain.prompts import (
    digit_prompt,
    explanation_prompt,
    levels,
    read_explanation,
    read_levels,
    shown,
    simulation_prompt,
)
from mnemon.inspection.explain.run import EXCERPTS_SCORED, explain, strongest_excerpts

NAMES = 0
KNOWN = ("Mary", "John", "Sandra", "Daniel")


def evidence(planted: UnitActivations, unit: int = NAMES) -> Evidence:
    half = planted.num_tokens // 2
    values = planted.values[:half, unit]
    return Evidence("unit", "a share", planted.pieces[:half], values, strongest_excerpts(planted.pieces[:half], values))


class TestPrompts:
    def test_levels_run_from_the_zero_to_the_top(self) -> None:
        assert levels(np.array([-1, 0.1, 0.35, 0.6, 2.0]), 0.1, 0.6).tolist() == [0, 0, 5, 10, 10]
        assert levels(np.array([0.2, 0.3]), 0.2, 0.2).tolist() == [0, 10]

    def test_an_explanation_prompt_shows_all_excerpts_token_by_token(self, planted: UnitActivations) -> None:
        given = evidence(planted)
        prompt = explanation_prompt(given)
        assert prompt.count("The unit, excerpt ") == len(given.excerpts)
        lines = [line for line in prompt.splitlines() if line.startswith('" Mary"')]
        assert lines
        assert all(int(line.split("\t")[1]) >= 8 for line in lines)
        assert prompt.endswith("The unit is active on")

    def test_a_simulation_prompt_asks_for_every_token(self) -> None:
        prompt = simulation_prompt(Hypothesis("names"), [" Mary", "\n", "\t7"])
        assert prompt.endswith('1. " Mary"\tunknown\n2. "\\n"\tunknown\n3. "\\t7"\tunknown')
        assert "The unit is active on: names" in prompt
        assert "all 3 lines" in prompt

    @pytest.mark.parametrize(
        "answer",
        [
            '1. " Mary"\t10\n2. " 1998"\t0\n3. "."\t3',
            '```\n3. "."\t3\n1. " Mary"\t10\n2. " 1998"\t0\n```',
            "Sure! Here are the lines:\n\n1. Mary: 10\n2. 1998: 0\n3. .: 3\n",
            "[10, 0, 3]",
            "The estimates are [10.0, 0, 3].",
            "- 1. | Mary | 10\n- 2. | 1998 | 0\n- 3. | . | 3",
        ],
    )
    def test_estimates_are_read_however_they_are_laid_out(self, answer: str) -> None:
        assert read_levels(answer, 3).tolist() == [10, 0, 3]

    def test_missing_and_impossible_estimates_are_left_out(self) -> None:
        found = read_levels('1. "a"\t10\n2. "b"\tunknown\n3. "c"\t99\n4. "d"\t1\n9. "e"\t1', 4)
        np.testing.assert_array_equal(found, [10, np.nan, np.nan, 1])

    @pytest.mark.parametrize("answer", ["I cannot do that.", "", "[1, 2]", '1. "a"\t3'])
    def test_an_answer_without_estimates_is_refused(self, answer: str) -> None:
        with pytest.raises(ExplainerError, match="of 3 estimates"):
            read_levels(answer, 3)

    @pytest.mark.parametrize(
        ("answer", "text"),
        [
            ("names of persons.", "names of persons"),
            ("\n\nThe unit is active on: names of persons.\nMore.", "names of persons"),
            ("** The unit is active on names, after “and” **", "names, after “and” **"),
        ],
    )
    def test_an_explanation_is_the_first_line_with_words(self, answer: str, text: str) -> None:
        assert read_explanation(answer).text == text

    def test_long_explanations_are_cut_and_empty_ones_refused(self) -> None:
        assert len(read_explanation("very " * 100 + "long").text) == 300
        with pytest.raises(ExplainerError, match="no explanation"):
            read_explanation(" \n 12 34\n")


@pytest.fixture(scope="module")
def local() -> LocalExplainer:
    return LocalExplainer("babilong-tiny-plain", window=12)


class TestLocalModel:
    def test_a_simulation_is_the_expected_digit_behind_every_token(self, local: LocalExplainer) -> None:
        pieces, hypothesis = [" Mary", " went", "."], Hypothesis("names")
        found = local.simulate(hypothesis, pieces)
        encode = local.tokenizer.encode
        digits = [encode(str(digit))[-1] for digit in range(10)]
        ids = encode(digit_prompt(hypothesis))
        for piece, value in zip(pieces, found, strict=True):
            ids += encode(shown(piece)) + encode("\t")
            with torch.no_grad():
                logits = local.model(torch.tensor([ids])).logits[0, -1, digits].double()
            assert value == pytest.approx(float(logits.softmax(-1) @ torch.arange(10.0, dtype=torch.float64)), abs=1e-4)
            ids += encode("unknown\n")

    def test_a_model_that_knows_scores_high(
        self, local: LocalExplainer, planted: UnitActivations, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def knowing(ids: torch.Tensor, places: list[int]) -> torch.Tensor:
            logits = torch.zeros(len(places), local.model.config.vocab_size)
            for row, place in enumerate(places):
                line = local.tokenizer.decode(ids[0, :place]).splitlines()[-1]
                digit = 9 if json.loads(line).strip() in KNOWN else 0
                logits[row, local.tokenizer.encode(str(digit))[-1]] = 20.0
            return logits

        monkeypatch.setattr(local, "_logits", knowing)
        monkeypatch.setattr(local, "explain", lambda given: Hypothesis("names"))
        (found,) = explain(planted, local, [NAMES])
        assert found.score is not None
        assert found.score > 0.95
        assert found.num_tokens == 12 * EXCERPTS_SCORED

    def test_a_small_model_answers_something_or_the_note_says_why(
        self, local: LocalExplainer, planted: UnitActivations
    ) -> None:
        (found,) = explain(planted, local, [NAMES])
        assert (found.text is None) == ("holds no explanation" in str(found.note))
        assert found.explainer == "babilong-tiny-plain"
        if found.text is not None:
            assert found.score is not None

    def test_a_question_longer_than_the_model_takes_is_a_lasting_failure(
        self, local: LocalExplainer, planted: UnitActivations, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(local.model.config, "max_position_embeddings", 50)
        (first, second) = explain(planted, local, [0, 1])
        assert re.search(r"takes 50 tokens and is asked about \d+", str(first.note))
        assert second.note == first.note

    def test_what_a_model_cannot_do_becomes_a_note(
        self, local: LocalExplainer, planted: UnitActivations, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("out of memory\nmore lines")

        monkeypatch.setattr(local.model, "generate", fail)
        (found,) = explain(planted, local, [0])
        assert found.note == "babilong-tiny-plain failed: out of memory"

    def test_a_tokenizer_without_digits_is_a_failure(
        self, local: LocalExplainer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(local, "_part", lambda text: [7])
        with pytest.raises(ExplainerError, match="does not tell digits apart"):
            local.simulate(Hypothesis("x"), [" a"])

    def test_a_model_with_a_chat_template_is_asked_in_it(
        self, local: LocalExplainer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
        monkeypatch.setattr(local.tokenizer, "chat_template", template)
        assert local._asked("why?") == "<user>why?<answer>"

    def test_the_option_names_a_model_of_this_machine(self) -> None:
        assert isinstance(explainer_from_option("babilong-tiny-plain"), LocalExplainer)


Answer = Callable[[dict[str, Any]], tuple[int, str]]
Server = Callable[[Answer], str]


@pytest.fixture
def serve() -> Iterator[Server]:
    """Start servers that answer questions with a function; `requests` of the handler's class are their headers."""
    servers: list[ThreadingHTTPServer] = []

    def start(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                body["headers"] = {name.lower(): value for name, value in self.headers.items()}
                body["path"] = self.path
                status, text = answer(body)
                data = text.encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):  # the client has lost patience
                    pass

            def log_message(self, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def completion(content: str | None) -> str:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    return json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})


def knowing(body: dict[str, Any]) -> tuple[int, str]:
    """Answer as a model that knows what the unit is."""
    prompt = body["messages"][0]["content"]
    if "unknown" not in prompt:
        return 200, completion("The unit is active on names of persons.")
    lines = re.findall(r"^(\d+)\. (\".*\")\tunknown$", prompt, re.MULTILINE)
    told = [f"{number}. {piece}\t{10 if json.loads(piece).strip() in KNOWN else 0}" for number, piece in lines]
    return 200, completion("\n".join(told))


class TestEndpoint:
    def test_a_model_that_knows_scores_high(self, serve: Server, planted: UnitActivations) -> None:
        asked: list[dict[str, Any]] = []

        def answer(body: dict[str, Any]) -> tuple[int, str]:
            asked.append(body)
            return knowing(body)

        (found,) = explain(planted, EndpointExplainer(serve(answer), "big-model", window=20), [NAMES])
        assert found.text == "names of persons"
        assert found.score is not None
        assert found.score > 0.95
        assert found.baseline is not None
        assert found.baseline < 0.7
        assert found.num_tokens == 20 * EXCERPTS_SCORED
        assert found.note is None
        assert found.explainer.startswith("big-model at http://127.0.0.1:")
        assert len(asked) == 1 + EXCERPTS_SCORED
        assert {body["path"] for body in asked} == {"/v1/chat/completions"}
        assert {body["model"] for body in asked} == {"big-model"}

    def test_only_its_own_key_is_sent_and_none_is_shown(
        self, serve: Server, planted: UnitActivations, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sent: list[str] = []

        def answer(body: dict[str, Any]) -> tuple[int, str]:
            sent.append(str(body["headers"]))
            return 401, '{"error": {"message": "wrong key: secret-one"}}'

        monkeypatch.setenv("OPENAI_API_KEY", "secret-two")
        monkeypatch.delenv(KEY_VARIABLE, raising=False)
        url = serve(answer)
        explain(planted, EndpointExplainer(url, "m"), [NAMES])
        monkeypatch.setenv(KEY_VARIABLE, "secret-one")
        explain(planted, EndpointExplainer(url, "m"), [NAMES])
        (found,) = explain(
            planted, EndpointExplainer(url.replace("//", "//user:secret@") + "?key=secret", "m"), [NAMES]
        )
        assert ["secret-one" in headers for headers in sent[:2]] == [False, True]
        assert not any("secret-two" in headers for headers in sent)
        assert "secret" not in found.explainer + str(found.note)
        assert f"refused the key (401); set {KEY_VARIABLE}" in str(found.note)

    @pytest.mark.parametrize(
        ("status", "text", "note"),
        [
            (200, "<html>Welcome</html>", "no chat completion"),
            (200, "{}", "no chat completion"),
            (200, '{"choices": []}', "no chat completion"),
            (200, '{"choices": [{"message": {"content": ["a"]}}]}', "empty answer"),
            (200, "[1, 2]", "no chat completion"),
            (200, completion(""), "empty answer"),
            (200, completion(None), "empty answer"),
            (200, completion("12 34"), "the answer holds no explanation"),
            (403, "{}", "refused the key (403)"),
            (404, '{"error": {"message": "no such model"}}', "error (404"),
            (400, "too long", "error (400"),
        ],
    )
    def test_whatever_it_answers_becomes_a_note(
        self, serve: Server, planted: UnitActivations, status: int, text: str, note: str
    ) -> None:
        found = explain(planted, EndpointExplainer(serve(lambda body: (status, text)), "m"), [0, 1])
        for one in found:
            assert (one.text, one.score, one.num_tokens) == (None, None, 0)
            assert note in str(one.note)
            assert "\n" not in str(one.note)
            assert one.excerpts

    def test_an_endpoint_that_is_not_there_is_tried_for_one_unit_only(
        self, serve: Server, planted: UnitActivations
    ) -> None:
        url = "http://127.0.0.1:9/v1"  # the discard port, where nobody listens
        found = explain(planted, EndpointExplainer(url, "m", timeout=2), [0, 1])
        assert "does not answer" in str(found[0].note)
        assert found[1].note == found[0].note

    def test_a_slow_endpoint_is_waited_for_and_then_left(self, serve: Server, planted: UnitActivations) -> None:
        calls: list[float] = []

        def slow(body: dict[str, Any]) -> tuple[int, str]:
            calls.append(time.monotonic())
            time.sleep(0.6)
            return knowing(body)

        found = explain(planted, EndpointExplainer(serve(slow), "m", timeout=0.15), [0, 1, 2])
        assert all("did not answer within 0.15 s" in str(one.note) for one in found)
        assert len(calls) <= 2  # one retry, and only for the first unit

    def test_nonsense_in_some_simulations_costs_these_alone(self, serve: Server, planted: UnitActivations) -> None:
        calls: list[None] = []

        def moody(body: dict[str, Any]) -> tuple[int, str]:
            calls.append(None)
            return (200, completion("no idea")) if len(calls) in (3, 5) else knowing(body)

        (found,) = explain(planted, EndpointExplainer(serve(moody), "m", window=20), [NAMES])
        assert found.text == "names of persons"
        assert found.score is not None
        assert found.score > 0.95
        assert found.num_tokens == 20 * (EXCERPTS_SCORED - 2)
        assert str(found.note).startswith("2 of 10 held-out excerpts were not simulated: the answer holds 0 of 20")

    def test_a_simulator_that_always_says_the_same_has_no_score(self, serve: Server, planted: UnitActivations) -> None:
        def zeros(body: dict[str, Any]) -> tuple[int, str]:
            if "unknown" not in body["messages"][0]["content"]:
                return knowing(body)
            return 200, completion(str([0] * 20))

        (found,) = explain(planted, EndpointExplainer(serve(zeros), "m", window=20), [NAMES])
        assert found.score is None
        assert found.note == "no score: the simulation is the same on every held-out token"

    def test_without_its_package_the_option_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "openai", None)
        with pytest.raises(BackendUnavailable, match=r'pip install "mnemon\[explain\]"'):
            explainer_from_option("http://localhost:8000/v1", "m")

    def test_numbers_in_tokens_are_not_mistaken_for_estimates(self, serve: Server, planted: UnitActivations) -> None:
        digits = replace(planted, pieces=tuple(f" {index % 12}" for index in range(planted.num_tokens)))
        (found,) = explain(digits, EndpointExplainer(serve(knowing), "m", window=20), [NAMES])
        assert found.note == "no score: the simulation is the same on every held-out token"
