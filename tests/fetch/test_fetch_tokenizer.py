import json

import pytest
import sentencepiece_vocabulary
from gguf import GGUFWriter
from tiny_gguf import CHAT_TEMPLATE, tiny_llama, vocabulary, write_gguf
from transformers import AutoTokenizer

from swiftkv_train.fetch.gguf_model import convert_gguf
from swiftkv_train.fetch.gguf_tokenizer import save_tokenizer

TEXTS = [
    "In 2024 we had 12 apples",
    "héllo 漢字 🦙👩‍👩‍👧",
    "two\n\n lines\tand  spaces ",
    "<|im_start|>user\nhi<|im_end|>\n",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    def make(pre, add=None):
        directory = tmp_path_factory.mktemp(pre)
        convert_gguf(write_gguf(directory / "m.gguf", tiny_llama(), pre=pre, add=add), directory)
        return AutoTokenizer.from_pretrained(directory)

    return make


def test_smollm_splits_digits_one_by_one(tokenizer):
    tokens = tokenizer("smollm").tokenize("we had 12 apple")
    assert tokens == ["w", "e", "Ġhad", "Ġ", "1", "2", "Ġapple"]


@pytest.mark.parametrize("pre", ["gpt-2", "default"])
def test_gpt2_keeps_numbers_together(tokenizer, pre):
    assert tokenizer(pre).tokenize("we had 12 apple") == ["w", "e", "Ġhad", "Ġ12", "Ġapple"]


def test_llama3_splits_numbers_from_the_space_before_them_and_adds_bos(tokenizer):
    llama3 = tokenizer("llama-bpe")
    assert llama3.tokenize("had 12 apple") == ["ha", "d", "Ġ", "12", "Ġapple"]
    assert llama3("12").input_ids == [1, vocabulary().index("12")]
    assert llama3("12", add_special_tokens=False).input_ids == [vocabulary().index("12")]


def test_bos_and_eos_follow_the_file(tokenizer):
    def add(writer):
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(True)

    assert tokenizer("llama-bpe", add)("12").input_ids == [vocabulary().index("12"), 2]


def test_smollm_adds_nothing(tokenizer):
    assert tokenizer("smollm")("1").input_ids == [vocabulary().index("1")]


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe"])
@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_round_trip(tokenizer, pre, text):
    read = tokenizer(pre)
    assert read.decode(read(text, add_special_tokens=False).input_ids) == text


def test_special_tokens_template_and_length_are_saved(tokenizer):
    read = tokenizer("smollm")
    assert (read.unk_token_id, read.bos_token_id, read.eos_token_id, read.pad_token_id) == (0, 1, 2, 2)
    assert (read.unk_token, read.bos_token, read.eos_token) == ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert read.model_max_length == 512
    assert len(read) == len(vocabulary())
    assert read("<|im_end|>").input_ids == [2]
    assert read.decode([1, 3, 2], skip_special_tokens=True) == "!"
    assert read.chat_template == CHAT_TEMPLATE
    chat = read.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"


def test_generation_stops_at_end_of_turn_too(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), add=lambda writer: writer.add_eot_token_id(0))
    convert_gguf(path, tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [2, 0]
    assert saved["bos_token_id"] == 1
    assert saved["pad_token_id"] == 2


def test_sentencepiece_vocabulary(tmp_path):
    """Llama 2's kind: pieces with scores, a space before the first word, bytes for what is not in the vocabulary."""
    pieces = sentencepiece_vocabulary.pieces()
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_context_length(512)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece for piece, _, _ in pieces])
    writer.add_token_scores([score for _, score, _ in pieces])
    writer.add_token_types([kind for _, _, kind in pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    out = tmp_path / "out"
    out.mkdir()
    metadata = {"tokenizer.ggml.model": "llama", "llama.context_length": 512}
    save_tokenizer(tmp_path / "m.gguf", metadata, out)
    read = AutoTokenizer.from_pretrained(out)
    assert read.convert_ids_to_tokens(read("had had").input_ids) == ["<s>", "▁had", "▁had"]
    assert read.decode(read("had é had").input_ids, skip_special_tokens=True) == "had é had"
    assert read.model_max_length == 512
    assert str(tmp_path) not in (out / "tokenizer_config.json").read_text()
