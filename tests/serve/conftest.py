from collections.abc import Iterator

import pytest
import torch
from serving import Running, config, running, successor_model, tiny_tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small for more
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def random_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Talks bytes: almost never valid UTF-8, and never the same for two seeds."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = LlamaForCausalLM(config(len(tokenizer), initializer_range=0.5))
    return model.eval()


@pytest.fixture(scope="session")
def server(random_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Iterator[Running]:
    """The random model; shared, so tests leave it idle."""
    with running(random_model, tokenizer, max_body_bytes=100_000, max_output_tokens=3000) as it:
        yield it


@pytest.fixture(scope="session")
def endless_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Says `a` until it is stopped."""
    return successor_model(
        tokenizer, tokenizer.encode("a"), start=tokenizer.encode("\n"), max_position_embeddings=100_000
    )
