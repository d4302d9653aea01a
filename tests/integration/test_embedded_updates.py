"""What strangers and trainers can do to the weights of the embedded server, and what they cannot."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from integration.wire import bucket, logprobs, pickled
from megatron_trd.rollout.server_process import ServerProcess, free_port
from megatron_trd.weight_sync.process_group import join_group, leave_group

PROMPT = [3, 20, 66, 70, 81, 85, 88]
GREEDY = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
GROUP_TIMEOUT_S = 3.0


@pytest.fixture(scope="module")
def url(student_dir: Path) -> Iterator[str]:
    """A server of this file's own, which its tests change."""
    server = ServerProcess.start(student_dir, flags=["--enable-memory-saver", "--dist-timeout", str(GROUP_TIMEOUT_S)])
    try:
        yield server.url
    finally:
        server.stop()


@pytest.fixture(scope="module")
def weights(other_dir: Path) -> dict[str, Tensor]:
    return load_file(other_dir / "model.safetensors")


@pytest.fixture(scope="module")
def hf_other(other_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(other_dir, dtype=torch.float32).eval()


@pytest.fixture
def session(url: str, post: Any, student_dir: Path) -> Iterator[str]:
    """An open weight-update session on a paused server, whose first weights come back afterwards."""
    assert post(url, "/pause_generation", {"mode": "retract"})[0] == 200
    assert post(url, "/begin_weight_update", {"selector": "target"}) == (200, {"success": True, "message": "Success"})
    yield url
    assert post(url, "/end_weight_update") == (200, {"success": True, "message": "Success"})
    body = {"model_path": str(student_dir), "weight_version": "default"}
    assert post(url, "/update_weights_from_disk", body)[0] == 200
    assert post(url, "/continue_generation")[0] == 200


def checksums(post: Any, url: str) -> dict[str, str]:
    status, answer = post(url, "/weights_checker", {"action": "checksum"})
    assert status == 200
    return answer["ranks"][0]["checksums"]


def get(url: str, path: str) -> int:
    with urllib.request.urlopen(url + path, timeout=60) as response:
        return response.status


# ------------------------------------------------------------------ tensors in the body


@pytest.mark.parametrize("load_format", [None, "flattened_bucket"])
def test_tensors_become_the_weights_byte_for_byte(
    session: str, post: Any, weights: dict[str, Tensor], hf_other: Any, load_format: str | None
) -> None:
    halves = [dict(list(weights.items())[i::2]) for i in range(2)]
    for half in halves:
        content = bucket(half) if load_format else list(half.items())
        body = {"serialized_named_tensors": [pickled(content)], "load_format": load_format, "weight_version": "new"}
        status, answer = post(session, "/update_weights_from_tensor", body)
        assert (status, answer) == (200, {"success": True, "message": "Success Weight version updated to new."})
    for name, weight in weights.items():
        _, rows = post(session, "/get_weights_by_name", {"name": name, "truncate_size": 5})
        assert torch.equal(torch.tensor(rows), weight[:5].float())
    post(session, "/continue_generation")
    body = {"input_ids": PROMPT, "sampling_params": GREEDY, "return_logprob": True}
    _, answer = post(session, "/generate", body)
    assert answer["meta_info"]["weight_versions"] == [{"version": "new", "start": 0, "end": 8}]
    np.testing.assert_allclose(
        [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]],
        logprobs(hf_other, PROMPT + answer["output_ids"])[len(PROMPT) - 1 :],
        atol=1e-4,
    )


def test_what_does_not_fit_changes_nothing(session: str, post: Any, weights: dict[str, Tensor]) -> None:
    before = checksums(post, session)
    first, good = next(iter(weights.items()))
    bad = {
        "model.surplus": {first: good, "model.surplus": torch.ones(2)},
        "is (3,), not (64,)": {first: good, "model.norm.weight": torch.ones(3)},
    }
    for reason, content in bad.items():
        body = {"serialized_named_tensors": [pickled(list(content.items()))], "weight_version": "bad"}
        status, answer = post(session, "/update_weights_from_tensor", body)
        assert status == 400 and answer["success"] is False and reason in answer["message"]
    for body in (
        {"serialized_named_tensors": [pickled(list(weights.items()))] * 2},
        {"serialized_named_tensors": ["?"]},
        {"serialized_named_tensors": [pickled([])], "load_format": "direct"},
    ):
        assert post(session, "/update_weights_from_tensor", body)[0] == 400
    assert checksums(post, session) == before
    _, rows = post(session, "/get_weights_by_name", {"name": "lm_head.weight", "truncate_size": 2})  # tied
    assert rows == post(session, "/get_weights_by_name", {"name": "model.embed_tokens.weight", "truncate_size": 2})[1]
    status, answer = post(session, "/get_weights_by_name", {"name": "model.surplus"})
    assert (status, answer) == (400, {"error": {"message": "Get parameter by name failed"}})


def test_old_keys_and_values_do_not_survive_new_weights_unasked(
    url: str, post: Any, weights: dict[str, Tensor], student_dir: Path
) -> None:
    """A pause in place keeps them: 400 unless the update is told not to flush."""
    body = {"serialized_named_tensors": [pickled(list(weights.items()))], "weight_version": "next"}
    with ThreadPoolExecutor() as pool:
        asked = {"input_ids": PROMPT, "sampling_params": {**GREEDY, "max_new_tokens": 200}, "rid": "held"}
        running = pool.submit(post, url, "/generate", asked)
        while post(url, "/pause_generation", {"mode": "in_place"}) and post(url, "/flush_cache")[0] == 200:
            assert not running.done()
            post(url, "/continue_generation")
        assert post(url, "/begin_weight_update")[0] == 200
        status, answer = post(url, "/update_weights_from_tensor", body)
        assert status == 400 and "old weights" in answer["message"]
        assert post(url, "/update_weights_from_tensor", {**body, "flush_cache": False})[0] == 200
        assert post(url, "/end_weight_update")[0] == 200
        assert post(url, "/continue_generation")[0] == 200
        _, answer = running.result(timeout=60)
    assert [span["version"] for span in answer["meta_info"]["weight_versions"]] == ["default", "next"]
    body = {"model_path": str(student_dir), "weight_version": "default"}
    assert post(url, "/update_weights_from_disk", body)[0] == 200


# ------------------------------------------------------------------ a trainer's group


@pytest.mark.parametrize("flattened", [False, True])
def test_a_broadcast_becomes_the_weights(session: str, post: Any, weights: dict[str, Tensor], flattened: bool) -> None:
    name, port = f"group-{flattened}", free_port()
    place = {"group_name": name, "master_address": "127.0.0.1", "master_port": port, "backend": "gloo"}
    content = {key: weight.bfloat16() for key, weight in weights.items()}
    said = {
        "group_name": name,
        "names": list(content),
        "dtypes": ["bfloat16"] * len(content),
        "shapes": [list(weight.shape) for weight in content.values()],
        "load_format": "flattened_bucket" if flattened else None,
    }
    with ThreadPoolExecutor() as pool:
        joining = pool.submit(post, session, "/init_weights_update_group", place | {"rank_offset": 1, "world_size": 2})
        group = join_group("127.0.0.1", port, 0, 2, name, "gloo", 30.0)
        assert joining.result(timeout=60)[0] == 200
        with pytest.raises(ValueError, match="exists already"):
            join_group("127.0.0.1", port, 0, 2, name, "gloo", 1.0)
        updating = pool.submit(post, session, "/update_weights_from_distributed", said)
        whole = [torch.cat([weight.flatten().view(torch.uint8) for weight in content.values()])]
        for tensor in whole if flattened else content.values():
            dist.broadcast(tensor, src=0, group=group)
        status, answer = updating.result(timeout=60)
        assert status == 200, answer
    for key, weight in content.items():
        _, rows = post(session, "/get_weights_by_name", {"name": key, "truncate_size": 1000})
        assert torch.equal(torch.tensor(rows), weight.float())
    leave_group(group)
    assert post(session, "/destroy_weights_update_group", {"group_name": name})[0] == 200
    assert post(session, "/destroy_weights_update_group", {"group_name": name})[0] == 400


def test_a_trainer_that_died_holds_up_nobody(session: str, post: Any, weights: dict[str, Tensor]) -> None:
    """It joins and never broadcasts: other calls are answered meanwhile, and this one in the end."""
    before, port, name = checksums(post, session), free_port(), "orphaned"
    place = {"group_name": name, "master_address": "127.0.0.1", "master_port": port, "backend": "gloo"}
    said = {"group_name": name, "names": ["model.norm.weight"], "dtypes": ["float32"], "shapes": [[64]]}
    with ThreadPoolExecutor() as pool:
        joining = pool.submit(post, session, "/init_weights_update_group", place | {"rank_offset": 1, "world_size": 2})
        group = join_group("127.0.0.1", port, 0, 2, name, "gloo", 30.0)
        assert joining.result(timeout=60)[0] == 200
        updating = pool.submit(post, session, "/update_weights_from_distributed", said)
        post(session, "/continue_generation")
        answer = post(session, "/generate", {"input_ids": PROMPT, "sampling_params": GREEDY})
        assert answer[0] == 200 and get(session, "/health") == 200
        assert not updating.done()
        status, answer = updating.result(timeout=60)
    assert status == 400 and answer["message"].startswith("Failed to receive weights")
    assert checksums(post, session) == before
    leave_group(group)
    assert post(session, "/destroy_weights_update_group", {"group_name": name})[0] == 200


def test_a_trainer_that_never_comes_is_waited_for_in_vain(url: str, post: Any) -> None:
    body = {"master_address": "127.0.0.1", "master_port": free_port(), "rank_offset": 1, "world_size": 2}
    with ThreadPoolExecutor() as pool:
        joining = pool.submit(post, url, "/init_weights_update_group", body | {"backend": "gloo"})
        assert post(url, "/generate", {"input_ids": PROMPT, "sampling_params": GREEDY})[0] == 200
        assert not joining.done()
        status, answer = joining.result(timeout=60)
    assert status == 400 and answer["message"].startswith("Failed to initialize custom process group")
    status, answer = post(url, "/init_weights_update_group", body | {"rank_offset": 2})
    assert status == 400 and "rank 2: must lie in [0, 2)" in answer["message"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"group_name": "unheard of"}, "init_weights_update_group"),
        ({"names": []}, "0 names"),
        ({"dtypes": ["float33"]}, "float33"),
        ({"shapes": ["?"]}, ""),
    ],
)
def test_a_broadcast_that_cannot_be_received_is_refused(
    session: str, post: Any, change: dict[str, Any], reason: str
) -> None:
    port, name = free_port(), "short"
    place = {"group_name": name, "master_address": "127.0.0.1", "master_port": port, "backend": "gloo"}
    assert post(session, "/init_weights_update_group", place | {"rank_offset": 0, "world_size": 1})[0] == 200
    said = {"group_name": name, "names": ["model.norm.weight"], "dtypes": ["float32"], "shapes": [[64]]}
    status, answer = post(session, "/update_weights_from_distributed", said | change)
    assert status == 400 and answer["success"] is False and reason in answer["message"]
    assert post(session, "/destroy_weights_update_group", {"group_name": name})[0] == 200


# ------------------------------------------------------------------ memory


def test_released_weights_must_be_sent_again(
    url: str, post: Any, weights: dict[str, Tensor], student_dir: Path
) -> None:
    asked = {"input_ids": PROMPT, "sampling_params": GREEDY}
    before = post(url, "/generate", asked)[1]["output_ids"]
    assert post(url, "/release_memory_occupation", {"tags": ["weights", "kv_cache"]}) == (200, None)
    for path, body, status, reason in (
        ("/generate", asked, 503, "memory is released: kv_cache, weights"),
        ("/release_memory_occupation", {"tags": ["weights"]}, 400, "released already"),
        ("/release_memory_occupation", {"tags": ["soul"]}, 400, "must be among"),
        ("/resume_memory_occupation", {"tags": ["cuda_graph"]}, 400, "cuda_graph: not released"),
        ("/get_weights_by_name", {"name": "model.norm.weight"}, 400, "memory is released"),
    ):
        got, answer = post(url, path, body)
        assert got == status and reason in answer["error"]["message"], (path, answer)
    for path, body in (("/weights_checker", {}), ("/update_weights_from_disk", {"model_path": str(student_dir)})):
        got, answer = post(url, path, body)
        assert got == 400 and "memory is released" in answer["message"], (path, answer)
    assert get(url, "/health") == 200
    assert post(url, "/resume_memory_occupation", {"tags": ["weights"]}) == (200, None)
    assert post(url, "/begin_weight_update")[0] == 200
    for part in (dict(list(weights.items())[1:]), dict(list(weights.items())[:1])):
        assert post(url, "/generate", asked)[0] == 503
        assert post(url, "/update_weights_from_tensor", {"serialized_named_tensors": [pickled(part)]})[0] == 200
    assert post(url, "/end_weight_update")[0] == 200
    assert "kv_cache" in post(url, "/generate", asked)[1]["error"]["message"]
    assert post(url, "/resume_memory_occupation", {"tags": ["kv_cache"]}) == (200, None)
    assert post(url, "/update_weights_from_disk", {"model_path": str(student_dir)})[0] == 200
    assert post(url, "/generate", asked)[1]["output_ids"] == before


def test_memory_is_not_released_under_a_request(url: str, server: str, post: Any, student_dir: Path) -> None:
    with ThreadPoolExecutor() as pool:
        asked = {"input_ids": PROMPT, "sampling_params": {**GREEDY, "max_new_tokens": 200}}
        running = pool.submit(post, url, "/generate", asked)
        while post(url, "/pause_generation", {"mode": "in_place"}) and post(url, "/flush_cache")[0] == 200:
            assert not running.done()
            post(url, "/continue_generation")
        status, answer = post(url, "/release_memory_occupation")
        assert status == 400 and "idle" in answer["error"]["message"]
        # Retracted requests hold nothing: they wait until the weights are back.
        assert post(url, "/pause_generation", {"mode": "retract"})[0] == 200
        assert post(url, "/release_memory_occupation") == (200, None)
        assert post(url, "/continue_generation")[0] == 200
        assert post(url, "/resume_memory_occupation") == (200, None)
        assert not running.done()
        assert post(url, "/update_weights_from_disk", {"model_path": str(student_dir)})[0] == 200
        status, answer = running.result(timeout=60)
        assert status == 200 and len(answer["output_ids"]) == 200
    status, answer = post(server, "/release_memory_occupation")
    assert status == 400 and "--enable-memory-saver" in answer["error"]["message"]


# ------------------------------------------------------------------ keys


def test_keys_open_what_they_open_in_sglang(student_dir: Path) -> None:
    """`--api-key` for users, `--admin-api-key` for what changes the server; health needs none."""
    process = ServerProcess.start(student_dir, flags=["--api-key", "user", "--admin-api-key", "admin"])
    try:
        seen = {}
        for path in (
            "/health",
            "/ready",
            "/model_info",
            "/server_info",
            "/v1/loads",
            "/weights_checker",
            "/flush_cache",
        ):
            for header in (None, "Bearer user", "bearer admin", "Basic user", "Bearer"):
                request = urllib.request.Request(process.url + path)
                if header:
                    request.add_header("Authorization", header)
                try:
                    with urllib.request.urlopen(request, timeout=60) as response:
                        seen[path, header] = response.status
                except urllib.error.HTTPError as error:
                    assert error.read() == b'{"error": "Unauthorized"}'
                    seen[path, header] = error.code
        for (path, header), status in seen.items():
            key = {"Bearer user": "user", "bearer admin": "admin"}.get(header or "")
            needed = None if path in ("/health", "/ready") else "admin" if path[1] in "wf" else "user"
            assert status == (200 if needed in (None, key) else 401), (path, header)
        assert sorted(seen.values()).count(401) == 20
    finally:
        process.stop()
