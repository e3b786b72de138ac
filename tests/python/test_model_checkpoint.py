"""A model on the meta device whose parameters are read from safetensors files.

The reference is an equal model in memory, and files that the safetensors library has written.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import torch_ext

WIDTH = 256  # A weight has 256 KiB in float32.


class Model(nn.Module):
    """It has a tied weight, small parameters and buffers of both kinds."""

    base_model_prefix = "body"

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(300, WIDTH)
        layers = [nn.Linear(WIDTH, WIDTH) for _ in range(6)]
        self.body = nn.Sequential(*layers, nn.BatchNorm1d(WIDTH))
        self.head = nn.Linear(WIDTH, 300, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.linspace(0.5, 2, WIDTH, device="cpu"), False)

    def forward(self, tokens):
        return self.head(self.body(self.embedding(tokens)) * self.scale)


def make(dtype=torch.float32):
    torch.manual_seed(0)
    return Model().to(dtype)


def on_meta(dtype=torch.float32):
    with torch.device("meta"):
        return Model().to(dtype)


def weights_of(model):
    state = model.state_dict()
    del state["head.weight"]
    return state


@pytest.fixture
def checkpoint(tmp_path):
    """Tensors lie at multiples of 8 there, and not of 64."""
    path = tmp_path / "model.safetensors"
    save_file(weights_of(make()), path)
    (length,) = memoryview(path.read_bytes()[:8]).cast("Q")
    assert (8 + length) % 8 == 0
    return path


def tokens():
    return torch.arange(300).view(100, 3)[:, 0]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def assert_same_state(model, expected):
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_computes_the_same_bits_and_writes_nothing(dtype, tmp_path):
    path = tmp_path / "model.safetensors"
    expected = make(dtype).eval()
    save_file(weights_of(expected), path)
    before = digest(path)
    model = on_meta(dtype).eval()
    objects = list(map(id, model.parameters()))
    offload = torch_ext.offload(model, tmp_path, host_memory="1MiB", checkpoint=path)
    assert list(map(id, model.parameters())) == objects
    assert model.head.weight is model.embedding.weight
    with torch.no_grad():
        for _ in range(4):
            assert torch.equal(model(tokens()), expected(tokens()))
    stats = offload.stats()
    assert stats["foreseen"] > 0
    assert stats["bytes_written"] == 0
    assert_same_state(model, expected)
    assert digest(path) == before
    offload.close()
    path.unlink()
    assert_same_state(model, expected)
    assert model.embedding.weight.device.type == "cpu"
    assert torch.equal(model(tokens()), expected(tokens()))


def test_training_computes_the_same_bits_and_leaves_the_file(checkpoint, tmp_path):
    before = digest(checkpoint)
    expected, model = make(), on_meta()
    torch_ext.offload(model, tmp_path, host_memory="1MiB", checkpoint=checkpoint)
    losses = []
    for each in (expected, model):
        optimizer = torch.optim.Adam(each.parameters(), lr=1e-3, foreach=False)
        for _ in range(4):
            optimizer.zero_grad()
            loss = each(tokens()).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    assert torch.equal(torch.stack(losses[:4]), torch.stack(losses[4:]))
    assert_same_state(model, expected)
    assert digest(checkpoint) == before


def test_several_files_by_index_or_directory(tmp_path):
    expected = make().eval()
    names = sorted(weights_of(expected))
    where = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(where.values())):
        part = {n: v for n, v in weights_of(expected).items() if where[n] == file}
        save_file(part, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    for paths in ([tmp_path], [tmp_path, index, str(index)]):
        for path in paths:
            model = on_meta().eval()
            torch_ext.offload(model, tmp_path, host_memory="1MiB", checkpoint=path)
            assert torch.equal(model(tokens()), expected(tokens()))
        index.write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_names_with_and_without_the_base_models_prefix(tmp_path):
    path = tmp_path / "model.safetensors"
    state = weights_of(make())
    save_file({name.removeprefix("body."): value for name, value in state.items()}, path)
    model = on_meta()
    torch_ext.offload(model, tmp_path, host_memory="1MiB", checkpoint=path)
    assert_same_state(model, make())


def test_a_tied_weight_is_found_by_either_name(tmp_path):
    path = tmp_path / "model.safetensors"
    state = weights_of(make())
    state["head.weight"] = state.pop("embedding.weight")
    save_file(state, path)
    model = on_meta()
    torch_ext.offload(model, tmp_path, host_memory="1MiB", checkpoint=path)
    assert_same_state(model, make())


def test_a_model_that_can_tie_its_weights_is_tied(checkpoint, tmp_path):
    # accelerate's init_empty_weights() makes it untied, and the file has the weight once.
    class Untied(Model):
        def tie_weights(self):
            self.head.weight = self.embedding.weight

    with torch.device("meta"):
        model = Untied()
        model.head.weight = nn.Parameter(torch.empty(300, WIDTH))
    torch_ext.offload(model, tmp_path, host_memory="1MiB", checkpoint=checkpoint)
    assert model.head.weight is model.embedding.weight
    assert_same_state(model, make())


def test_parameters_in_memory_keep_their_values(checkpoint, tmp_path):
    expected, model = make(), on_meta()
    weight = torch.full((WIDTH, WIDTH), 0.25)
    for each in (expected, model):
        each.body[2].weight = nn.Parameter(weight.clone())
    offload = torch_ext.offload(model, tmp_path, host_memory="1MiB", checkpoint=checkpoint)
    assert "body.2.weight" in offload.plan().offloaded
    assert_same_state(model, expected)


def test_blocks_that_are_held(checkpoint, tmp_path):
    model = on_meta().eval()
    torch_ext.offload(
        model, tmp_path, host_memory="2MiB", checkpoint=checkpoint, hold=nn.Sequential
    )
    expected = make().eval()
    assert torch.equal(model(tokens()), expected(tokens()))


def test_a_copy_is_a_plain_model(checkpoint, tmp_path):
    model = on_meta()
    torch_ext.offload(model, tmp_path, host_memory="1MiB", checkpoint=checkpoint)
    assert_same_state(copy.deepcopy(model), make())


def refused(model, error, match, tmp_path, **options):
    """Checks that the model is as before."""
    before = {name: (id(p), p.device) for name, p in model.named_parameters()}
    buffers = {name: b.device for name, b in model.named_buffers()}
    with pytest.raises(error, match=match):
        torch_ext.offload(model, tmp_path, host_memory="1MiB", **options)
    assert {name: (id(p), p.device) for name, p in model.named_parameters()} == before
    assert {name: b.device for name, b in model.named_buffers()} == buffers


def change_state(path, change):
    state = weights_of(make())
    change(state)
    save_file(state, path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.pop("body.3.weight"), r"the checkpoint has no 'body\.3\.weight'$"),
        (lambda s: s.pop("body.6.running_mean"), r"no 'body\.6\.running_mean'"),
        (
            lambda s: s.update({"body.3.weight": torch.zeros(3, WIDTH)}),
            r"'body\.3\.weight' \(\[256, 256\], there \[3, 256\]\)",
        ),
        (
            lambda s: s.update({"body.0.bias": torch.zeros(WIDTH, dtype=torch.float16)}),
            r"'body\.0\.bias' \(Float, there F16\)",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_with_names(change, text, tmp_path):
    path = tmp_path / "model.safetensors"
    change_state(path, change)
    model = on_meta()
    refused(model, ValueError, text, tmp_path, checkpoint=path)
    save_file(weights_of(make()), path)
    torch_ext.offload(model, tmp_path, host_memory="1MiB", checkpoint=path)
    assert_same_state(model, make())


def test_many_names_are_cut(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    match = r"'body\.4\.weight' and \d+ more"
    refused(on_meta(), ValueError, match, tmp_path, checkpoint=path)


def test_what_is_no_checkpoint_is_refused(checkpoint, tmp_path):
    refused(on_meta(), ValueError, "meta device without values", tmp_path)
    refused(make(), ValueError, "none of its tensors is there", tmp_path, checkpoint=checkpoint)
    refused(on_meta(), ValueError, "must name a file", tmp_path, checkpoint="")
    missing = tmp_path / "missing"
    refused(on_meta(), FileNotFoundError, "missing", tmp_path, checkpoint=missing)
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(on_meta(), ValueError, "no file", tmp_path, checkpoint=empty)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"x" * 100)
    refused(on_meta(), ValueError, "damaged", tmp_path, checkpoint=damaged)
    os.truncate(checkpoint, os.path.getsize(checkpoint) - 1)
    refused(on_meta(), ValueError, "model.safetensors", tmp_path, checkpoint=checkpoint)


def test_buffers_that_no_checkpoint_has_are_named(checkpoint, tmp_path):
    model = on_meta()
    model.register_buffer("lost", torch.empty(3, device="meta"), persistent=False)
    refused(model, ValueError, "'lost'; make the model", tmp_path, checkpoint=checkpoint)


def test_a_budget_that_is_too_small_is_refused_with_the_number(checkpoint, tmp_path):
    model = on_meta()
    with pytest.raises(ValueError, match=r"at least \d+, twice the largest") as caught:
        torch_ext.offload(model, tmp_path, host_memory="512KiB", checkpoint=checkpoint)
    needed = str(caught.value).split("at least ")[1].split(",")[0]
    torch_ext.offload(model, tmp_path, host_memory=int(needed), checkpoint=checkpoint)
    assert torch.equal(model(tokens()), make()(tokens()))


def test_a_file_that_was_written_to_is_an_error(checkpoint, tmp_path):
    model = on_meta()
    torch_ext.offload(model, tmp_path, host_memory="1MiB", checkpoint=checkpoint)
    model(tokens())
    with open(checkpoint, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\0")
    with pytest.raises(OSError, match="has been written to") as caught:
        model(tokens())
    assert caught.value.errno == errno.EIO
    assert caught.value.filename == str(checkpoint)


def test_a_file_that_was_replaced_by_another_is_still_read(checkpoint, tmp_path):
    model = on_meta()
    torch_ext.offload(model, tmp_path, host_memory="1MiB", checkpoint=checkpoint)
    checkpoint.unlink()
    save_file({"x": torch.zeros(1)}, checkpoint)
    assert_same_state(model, make())
