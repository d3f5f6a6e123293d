"""A model that overflows: the request fails with an error message, and the server keeps running."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axrun.format.bundle import Bundle
from tests.damage import OVERFLOW, set_float
from tests.serve.server import Start


def test_an_overflow_fails_the_request_and_not_the_server(build_tiny: Any, start: Start) -> None:
    bundle = Path(build_tiny(hidden_state_type="fp16"))
    set_float(Bundle.open(bundle).layer_path(2), "model.layers.2.mlp.down_proj.weight_scale", 5, OVERFLOW)
    server = start(bundle).ready()
    for _ in range(2):
        response = server.post("completions", prompt="1+1=", max_tokens=4)
        assert response.status_code == 500
        error = response.json()["error"]
        assert error["code"] == "model_failed"
        assert error["message"].startswith(
            "layer 2 returned a value that is not finite in output, at token 0: it exceeds 65504"
        )
    with server.stream("completions", prompt="1+1=") as streamed:
        text = "".join(streamed.iter_text())
    assert "not finite" in text
    assert server.client.get("/health").status_code == 200
    assert not [line for line in server.lines if "Traceback" in line]
