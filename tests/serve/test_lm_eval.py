"""lm-evaluation-harness, unmodified, against a real server; the tasks are local files, without network access."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serve.server import MODEL, Server

WINDOW = 252  # tokens per window of lm_eval: max_length 254, minus one of context and one to generate
SUMS = [(1, 1), (7, 8), (12, 30), (25, 25), (40, 2), (3, 9)]

CHOICES = """
task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""

ANSWERS = """
task: tiny_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n", "<|im_end|>"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""

PERPLEXITY = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, heldout: str) -> Path:
    """Multiple-choice sums, sums to answer, and a text to score."""
    folder = tmp_path_factory.mktemp("tasks")
    sums = [{"question": f"{a}+{b}=", "choices": [str(a + b), str(a + b + 1), str(a)], "answer": 0} for a, b in SUMS]
    texts = [{"text": part} for part in (heldout[:500], heldout[600:1800])]
    for name, task, rows in (("choices", CHOICES, sums), ("answers", ANSWERS, sums), ("rolling", PERPLEXITY, texts)):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(task.format(data=data))
    return folder


SCRIPT = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
given = json.load(sys.stdin)
manager = TaskManager(include_path=given["tasks"], include_defaults=False)
done = {}
for name, options in given["runs"].items():
    found = lm_eval.simple_evaluate(task_manager=manager, bootstrap_iters=0, **options)
    task = options["tasks"][0]
    done[name] = {"results": found["results"][task], "samples": found["samples"][task]}
json.dump(done, open(given["output"], "w"), default=str)
"""


@pytest.fixture(scope="module")
def evaluated(
    server_fp32: Server, bundle_fp32: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Results and samples of each run; one process for all, since lm_eval is slow to start."""
    folder = tmp_path_factory.mktemp("lm_eval")

    def run(model: str, path: str, task: str, **options: Any) -> dict[str, Any]:
        arguments = {
            "model": MODEL,
            "base_url": f"{server_fp32.url}/v1/{path}",
            "tokenizer": str(bundle_fp32 / "hf"),
            "tokenizer_backend": "huggingface",
            "max_length": 254,
            "max_retries": 1,
        }
        return {"model": model, "model_args": arguments, "tasks": [task], **options}

    runs = {
        "choices": run("local-completions", "completions", "tiny_choices", batch_size=2),
        "rolling": run("local-completions", "completions", "tiny_rolling"),
        "answers": run("local-completions", "completions", "tiny_answers"),
        "chat": run("local-chat-completions", "chat/completions", "tiny_answers", apply_chat_template=True),
    }
    subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps({"tasks": str(tasks), "runs": runs, "output": str(folder / "done.json")}),
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder)},
        text=True,
        timeout=900,
        check=True,
    )
    done: dict[str, Any] = json.loads((folder / "done.json").read_text())
    return done


def loglikelihood(reference: Any, tokenizer: Any, context: str, continuation: str) -> tuple[float, bool]:
    """The log likelihood of a continuation, and whether it is the greedy one."""
    start, ids = len(tokenizer.encode(context)), tokenizer.encode(context + continuation)
    with torch.inference_mode():
        rows = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    places = range(start, len(ids))
    return sum(float(rows[i - 1, ids[i]]) for i in places), all(int(rows[i - 1].argmax()) == ids[i] for i in places)


def test_the_harness_scores_like_with_transformers(
    evaluated: Any, reference: Any, hf_tokenizer: Any, server_fp32: Server
) -> None:
    """A single test, because the harness takes half a minute to start in each test process."""
    expect_loglikelihoods(evaluated, reference, hf_tokenizer)
    expect_rolling_loglikelihoods(evaluated, reference, hf_tokenizer)
    expect_generations(evaluated, server_fp32, "answers")
    expect_generations(evaluated, server_fp32, "chat")


def expect_loglikelihoods(evaluated: Any, reference: Any, hf_tokenizer: Any) -> None:
    results, samples = evaluated["choices"]["results"], evaluated["choices"]["samples"]
    assert len(samples) == len(SUMS)
    right = 0
    for sample in samples:
        doc = sample["doc"]
        expected = [loglikelihood(reference, hf_tokenizer, doc["question"], choice) for choice in doc["choices"]]
        for (value, is_greedy), (logprob, greedy) in zip(sample["filtered_resps"], expected, strict=True):
            assert float(value) == pytest.approx(logprob, abs=1e-3)
            assert is_greedy == greedy
        right += max(range(3), key=lambda choice: expected[choice][0]) == 0
    assert results["acc,none"] == pytest.approx(right / len(SUMS))
    assert right >= 4


def expect_rolling_loglikelihoods(evaluated: Any, reference: Any, hf_tokenizer: Any) -> None:
    """The second text exceeds the context and comes in windows, each with one token of the previous one as context."""
    sizes = []
    for sample in evaluated["rolling"]["samples"]:
        ids = [hf_tokenizer.eos_token_id, *hf_tokenizer.encode(sample["doc"]["text"])]
        sizes.append(len(ids))
        total = 0.0
        for start in range(1, len(ids), WINDOW):
            rated = ids[start : start + WINDOW]
            context = ids[max(0, start + len(rated) - 1 - WINDOW) : start]
            with torch.inference_mode():
                rows = reference(torch.tensor([context + rated])).logits[0].log_softmax(-1)
            total += sum(float(rows[len(context) - 1 + i, token]) for i, token in enumerate(rated))
        assert float(sample["filtered_resps"][0]) == pytest.approx(total, abs=1e-3)
    assert max(sizes) > WINDOW + 20


def expect_generations(evaluated: Any, server_fp32: Server, run: str) -> None:
    right = 0
    for sample in evaluated[run]["samples"]:
        question, limits = sample["doc"]["question"], {"max_tokens": 8, "stop": ["\n", "<|im_end|>"]}
        if run == "chat":
            answer = server_fp32.chat(question, **limits)["choices"][0]["message"]["content"]
        else:
            answer = server_fp32.complete(question, **limits)["choices"][0]["text"]
        assert sample["filtered_resps"] == [answer]
        right += answer == sample["doc"]["choices"][0]
    assert right >= 5
    assert evaluated[run]["results"]["exact_match,none"] == pytest.approx(right / len(SUMS))
