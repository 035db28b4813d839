import json

import numpy as np
import pytest
import torch
from gguf import GGUFValueType, RopeScalingType
from tiny_gguf import tiny_llama, write_gguf
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from swiftkv_train.errors import UserError
from swiftkv_train.fetch import gguf_model
from swiftkv_train.fetch.gguf_model import convert_gguf

IDS = torch.arange(3, 43).reshape(2, 20)


def converted(path, to, dtype="float32"):
    to.mkdir()
    convert_gguf(path, to, dtype=dtype)
    model, info = AutoModelForCausalLM.from_pretrained(to, dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 4},
        {"head_dim": 32},
    ],
    ids=["tied", "untied", "bias", "mha", "wide heads"],
)
def test_unquantised_weights_come_back_bit_for_bit(tmp_path, changes):
    original = tiny_llama(**changes)
    model = converted(write_gguf(tmp_path / "m.gguf", original), tmp_path / "out")
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, original(IDS).logits)
    for field in ("rms_norm_eps", "rope_parameters", "head_dim", "max_position_embeddings", "tie_word_embeddings"):
        assert getattr(model.config, field) == getattr(original.config, field), field


def test_half_precision_file_is_the_rounded_weights(tmp_path):
    original = tiny_llama()
    model = converted(write_gguf(tmp_path / "m.gguf", original, "F16"), tmp_path / "out")
    for name, tensor in original.state_dict().items():
        expected = tensor if tensor.ndim == 1 else tensor.half().float()
        assert torch.equal(model.state_dict()[name], expected), name


def test_8_bit_file_is_within_half_a_step_of_the_weights(tmp_path):
    """Q8_0: blocks of 32 along a row, one fp16 scale = the largest magnitude / 127."""
    original = tiny_llama()
    model = converted(write_gguf(tmp_path / "m.gguf", original, "Q8_0"), tmp_path / "out")
    for name, tensor in original.state_dict().items():
        if tensor.ndim == 1:
            continue
        blocks = tensor.reshape(-1, 32)
        step = blocks.abs().amax(-1, keepdim=True) / 127
        error = (model.state_dict()[name].reshape(-1, 32) - blocks).abs()
        assert (error <= step * (0.5 + 127 * 2**-10)).all(), name  # the scale itself is rounded to fp16
        assert error.max() > 0


def test_default_dtype_is_bfloat16(tmp_path):
    original = tiny_llama()
    model = converted(write_gguf(tmp_path / "m.gguf", original), tmp_path / "out", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.bfloat16()), name


def test_a_large_model_is_written_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_model, "SHARD_SIZE", "100KB")
    original = tiny_llama()
    model = converted(write_gguf(tmp_path / "m.gguf", original), tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in original.state_dict().items())


def llama3_divisors(config):
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
    return (plain / scaled.double()).float().numpy()


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_llama3_frequency_scaling_is_recognised(tmp_path):
    original = tiny_llama(rope_parameters=LLAMA3, head_dim=64, max_position_embeddings=131072)
    divisors = llama3_divisors(original.config)
    assert divisors.max() == pytest.approx(32, rel=1e-5)
    assert divisors.min() == pytest.approx(1, rel=1e-5)
    path = write_gguf(tmp_path / "m.gguf", original, tensors={"rope_freqs.weight": divisors})
    model = converted(path, tmp_path / "out")
    assert model.config.rope_parameters == LLAMA3
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, original(IDS).logits)


def test_other_frequency_scaling_is_refused(tmp_path):
    original = tiny_llama(rope_parameters=LLAMA3, head_dim=64)
    divisors = llama3_divisors(original.config) * np.linspace(1, 1.1, 32, dtype=np.float32)
    path = write_gguf(tmp_path / "m.gguf", original, tensors={"rope_freqs.weight": divisors})
    with pytest.raises(UserError, match=r"rope_freqs\.weight"):
        converted(path, tmp_path / "out")


def test_linear_scaling(tmp_path):
    def add(writer):
        writer.add_rope_scaling_type(RopeScalingType("linear"))
        writer.add_rope_scaling_factor(4.0)

    rope = {"rope_type": "linear", "rope_theta": 100000.0, "factor": 4.0}
    original = tiny_llama(rope_parameters=rope)
    model = converted(write_gguf(tmp_path / "m.gguf", original, add=add), tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, original(IDS).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "qwen2"}, "architecture is 'qwen2'"),
        (
            {"tensors": {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}},
            r"blk\.0\.attn_q_norm\.weight is not part",
        ),
        ({"without": ("blk.1.ffn_up.weight",)}, r"lacks 1 weights.*layers\.1\.mlp\.up_proj\.weight"),
        ({"without": ("token_embd.weight",)}, "no token_embd"),
        ({"pre": "cuneiform"}, "'cuneiform'"),
        ({"add": lambda writer: writer.add_expert_count(8)}, "mixture of experts"),
        ({"add": lambda writer: writer.add_sliding_window(128)}, "sliding-window"),
        ({"add": lambda writer: writer.add_rope_scaling_type(RopeScalingType("yarn"))}, "rope scaling 'yarn'"),
        ({"add": lambda writer: writer.add_uint16("split.count", 3)}, "split GGUF"),
    ],
)
def test_what_cannot_be_expressed_is_refused(tmp_path, options, message):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), **options)
    with pytest.raises(UserError, match=message):
        converted(path, tmp_path / "out")


def other(key, value, kind, of=None):
    """Metadata with another value for `key`; None: without it."""

    def add(writer):
        writer.kv_data[0].pop(key, None)
        if value is not None:
            writer.add_key_value(key, value, getattr(GGUFValueType, kind), sub_type=of and getattr(GGUFValueType, of))

    return add


@pytest.mark.parametrize(
    ("key", "value", "kind", "message"),
    [
        ("llama.attention.head_count", 0, "UINT32", "is 0; expected one whole number"),
        ("llama.attention.head_count_kv", 0, "UINT32", "is 0; expected one whole number"),
        ("llama.attention.head_count_kv", 3, "UINT32", "3 does not divide the 4 heads"),
        ("llama.attention.head_count_kv", 4, "UINT32", r"k_proj\.weight has shape"),
        ("llama.block_count", 1.5, "FLOAT32", "is 1.5; expected one whole number"),
        ("llama.block_count", 10**6, "UINT32", "is 1000000; there are 20 tensors"),
        ("llama.context_length", 0, "UINT32", "is 0; expected one whole number"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "FLOAT32", "is nan; expected one number"),
        ("llama.rope.freq_base", "x", "STRING", "is 'x'; expected one number"),
        ("llama.rope.scaling.type", "linear", "STRING", r"rope\.scaling\.factor is None; expected one number"),
        ("split.count", "x", "STRING", "split GGUF"),
        ("tokenizer.ggml.eos_token_id", 99999, "UINT32", "is 99999; expected a token id, 0 to 268"),
        ("tokenizer.ggml.bos_token_id", "x", "STRING", "is 'x'; expected a token id"),
        ("tokenizer.ggml.tokens", None, "ARRAY", r"cannot be built: 'tokenizer\.ggml\.tokens'"),
        ("tokenizer.ggml.tokens", 5, "UINT32", "is not a list of texts"),
        ("tokenizer.ggml.tokens", [1, 2], "ARRAY INT32", "is not a list of texts"),
        ("tokenizer.ggml.tokens", ["a", "b"], "ARRAY STRING", r"tokenizer \(.*\) cannot be built"),
        ("tokenizer.ggml.merges", ["a b c"], "ARRAY STRING", r"tokenizer \(.*\) cannot be built"),
        ("tokenizer.ggml.token_type", [1, 2], "ARRAY INT32", r"tokenizer \(.*\) cannot be built"),
        ("tokenizer.ggml.pre", ["a"], "ARRAY STRING", "is not one of smollm"),
        ("tokenizer.chat_template", 5, "UINT32", "is not text"),
    ],
)
def test_metadata_that_makes_no_sense_is_refused_in_one_line(tmp_path, key, value, kind, message):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), add=other(key, value, *kind.split()))
    with pytest.raises(UserError, match=message) as caught:
        converted(path, tmp_path / "out")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "out") not in str(caught.value)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    original = tiny_llama()
    original.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    path = write_gguf(tmp_path / "m.gguf", original)
    with pytest.raises(UserError, match=r"m\.gguf: blk\.1\.ffn_up\.weight holds nan or infinity"):
        converted(path, tmp_path / "out")
    divisors = np.full(8, np.nan, np.float32)
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), tensors={"rope_freqs.weight": divisors})
    with pytest.raises(UserError, match=r"rope_freqs\.weight is not the frequency scaling"):
        converted(path, tmp_path / "again")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_a_file_cut_short_is_refused(tmp_path, share):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match="not a whole GGUF file"):
        converted(path, tmp_path / "out")


def test_another_kind_of_file_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(5000))
    with pytest.raises(UserError, match="not a whole GGUF file"):
        converted(path, tmp_path / "out")
