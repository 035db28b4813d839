"""Text that the base says itself: `generate` sources, to distil a base where no corpus may be used.

A prompt is what the base says where its chat template lets the user speak (Magpie, arXiv 2406.08464), the answer what
it says to that through its chat template. A base without a chat template speaks freely from its first token.

`cache_dir/self/KEY/` holds what was generated, one file per batch, under a hash of the base and the settings: each
batch depends on those and its number alone, so a run that was cut off goes on where it was, and asking for more
conversations adds to those that are there. `cache_dir/self/KEY-N.jsonl` holds the first N that are of use and is then
a source like any other.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from swiftkv_train.data.chat import PLACEHOLDER, render
from swiftkv_train.data.documents import BadRow
from swiftkv_train.data.files import cannot_write, write_whole
from swiftkv_train.data.identity import hash_files, record_path
from swiftkv_train.data.packing import random_generator
from swiftkv_train.data.tokenize import tokenizer_fingerprint
from swiftkv_train.errors import UserError
from swiftkv_train.loading import load_config, load_for_inference, pad_token_id
from swiftkv_train.progress import Reporter
from swiftkv_train.recipe import GenerateSection, ModelSection, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 1  # Raise it when the same base and settings come to say something else.
PROBATION = 4  # batches after which a base that hardly says anything of use is given up
LEAST_USEFUL = 0.1
LOOP_TOKENS, LOOP_TURNS = 32, 3  # the least end of an answer that counts as endless, and the least repetitions in it

Row: TypeAlias = "dict[str, Any]"
"""`messages` or `text` as in any JSONL source, or the reason why a conversation was `dropped`."""


def generated_source(
    source: Source,
    base: ModelSection,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | Path,
    report: Reporter | None = None,
) -> Source:
    """A `generate` source as the `path` source of what its base said, generated where the cache lacks it.

    Several processes may do this at once: they write the same files.

    Raises:
        UserError: the base cannot be loaded or says too little of use, or its template leaves the user no place.
        RunError: the cache cannot be written.
    """
    settings = source.generate
    assert settings is not None
    batches = Path(cache_dir) / "self" / _key(settings, base, tokenizer, cache_dir)
    file = batches.with_name(f"{batches.name}-{settings.conversations}.jsonl")
    try:
        if not file.is_file():
            rows = _generate(
                source.name, Speaker(base, tokenizer, settings), batches, report or Reporter(enabled=False)
            )
            write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except OSError as error:
        raise cannot_write(Path(cache_dir), error) from None
    return source.model_copy(update={"path": str(file), "generate": None})


def _key(
    settings: GenerateSection, base: ModelSection, tokenizer: PreTrainedTokenizerBase, cache_dir: str | Path
) -> str:
    content = {
        "format": FORMAT_VERSION,
        "base": _base_identity(base, cache_dir),
        "dtype": base.dtype,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "settings": settings.model_dump(exclude={"conversations"}),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:40]


def _base_identity(base: ModelSection, cache_dir: str | Path) -> Any:
    """The content of a local base, the commit of one from a hub."""
    directory = Path(base.base)
    if not directory.is_dir():
        config = load_config(base.base, revision=base.revision)
        return [base.base, getattr(config, "_commit_hash", None) or base.revision]
    names = ("config.json", "generation_config.json", "*.safetensors")
    files = hash_files(
        sorted(path for name in names for path in directory.glob(name)), record_path(cache_dir, {"base": base.base})
    )
    return [[Path(file.path).name, file.sha256] for file in files]


def _generate(name: str, speaker: Speaker, batches: Path, report: Reporter) -> list[Row]:
    """The first conversations of use, from the batches that are there and as many more as it takes."""
    wanted, size = speaker.settings.conversations, speaker.settings.batch_size
    kept: list[Row] = []
    dropped: Counter[str] = Counter()
    with report.bar("generate", wanted, "conversations") as advance:
        for number in itertools.count():
            path = batches / f"{number:06d}.jsonl"
            rows = _read_batch(path, size)
            if rows is None:
                rows = speaker.batch(number)
                write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            useful = [row for row in rows if "dropped" not in row]
            advance(min(len(useful), wanted - len(kept)))
            kept += useful
            dropped.update(row["dropped"] for row in rows if "dropped" in row)
            reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common()) or "none"
            if len(kept) >= wanted:
                report.line(f"generated   {name}: {wanted:,} conversations; dropped: {reasons}")
                return kept[:wanted]
            if number + 1 >= PROBATION and len(kept) < LEAST_USEFUL * (number + 1) * size:
                raise UserError(
                    f"source {name!r}: {speaker.base.base} says too little of use ({len(kept)} of "
                    f"{(number + 1) * size} conversations; dropped: {reasons}); lower generate.temperature or "
                    "generate.top_p, raise generate.max_prompt_tokens, or use text"
                )
    raise AssertionError("unreachable")


def _read_batch(path: Path, size: int) -> list[Row] | None:
    """A whole batch, or None where it is not there or damaged."""
    try:
        with path.open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
    except (OSError, ValueError):
        return None
    return rows if len(rows) == size else None


class Speaker:
    """A base that talks to itself. Its weights are loaded when it first says something."""

    def __init__(self, base: ModelSection, tokenizer: PreTrainedTokenizerBase, settings: GenerateSection) -> None:
        self.base, self.settings = base, settings
        self.tokenizer: Any = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        self._control = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}

    def batch(self, number: int) -> list[Row]:
        """The conversations of one batch [batch_size], the same whenever they are generated."""
        import torch

        device = self._model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode():
            torch.manual_seed(int(random_generator(self.settings.seed, number).integers(2**63)))
            try:
                return self._conversations() if self.tokenizer.chat_template else self._texts()
            except BadRow as reason:
                raise UserError(f"{self.base.base} cannot generate conversations: {reason}") from None

    @cached_property
    def _model(self) -> Any:
        from transformers import GenerationConfig

        base = self.base
        model = load_for_inference(base.base, dtype=base.dtype, revision=base.revision, families=("llama",))
        ends = model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        # Not the base's own sampling settings: what it says is to be what it holds likely.
        model.generation_config = GenerationConfig(
            do_sample=True,
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            top_k=0,
            eos_token_id=[ends] if isinstance(ends, int) else ends,
            pad_token_id=pad_token_id(self.tokenizer),
        )
        return model

    @property
    def _end_ids(self) -> list[int]:
        return self._model.generation_config.eos_token_id or []

    @cached_property
    def _user_turn(self) -> tuple[list[int], str]:
        """The tokens up to where the user speaks, and the text that ends what the user says."""
        messages = [{"role": "user", "content": PLACEHOLDER}]
        opening, here, closing = render(messages, self.tokenizer, generation_prompt=False).partition(PLACEHOLDER)
        if not closing.strip():
            closing = render(messages, self.tokenizer, generation_prompt=True).partition(PLACEHOLDER)[2]
        if not here or not closing.strip():
            raise BadRow("the chat template does not say where a user's message begins and ends")
        # A space before the message is part of its first token.
        return self._encode(opening.rstrip(" ")), closing.strip()

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # The template has written them.

    def _conversations(self) -> list[Row]:
        opening, closing = self._user_turn
        closing_ids = self._encode(closing)
        if len(closing_ids) == 1:
            ending: dict[str, Any] = {"eos_token_id": [*self._end_ids, *closing_ids]}
        else:
            ending = {"stop_strings": [closing], "tokenizer": self.tokenizer}
        said = self._sample([opening] * self.settings.batch_size, self.settings.max_prompt_tokens, **ending)
        prompts = []
        for ids in said:
            prompt, closed, _ = self.tokenizer.decode(ids).partition(closing)
            prompts.append(self._checked(prompt, "prompt", endless=not closed))
        answers = iter(self.answers([row["prompt"] for row in prompts if "prompt" in row]))
        return [self._conversation(row["prompt"], next(answers)) if "prompt" in row else row for row in prompts]

    def _conversation(self, prompt: str, answer_ids: list[int]) -> Row:
        text, endless = self._until_end(answer_ids)
        answer = self._checked(text, "answer", endless=endless)
        if "dropped" in answer:
            return answer
        return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer["answer"]}]}

    def answers(self, prompts: list[str]) -> list[list[int]]:
        """What the base says to each prompt, as tokens, with its end token and padding after it."""
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        ids = [self._encode(render(chat, self.tokenizer, generation_prompt=True)) for chat in chats]
        return self._sample(ids, self.settings.max_new_tokens) if ids else []

    def _texts(self) -> list[Row]:
        first = self.tokenizer.bos_token_id
        first = pad_token_id(self.tokenizer) if first is None else first
        said = self._sample([[first]] * self.settings.batch_size, self.settings.max_new_tokens)
        return [self._checked(text, "text", endless=endless) for text, endless in map(self._until_end, said)]

    def _sample(self, prompts: list[list[int]], max_new_tokens: int, **ending: Any) -> list[list[int]]:
        """What the base says next after each prompt, with its end token and padding after it."""
        import torch

        width = max(map(len, prompts))
        limit = self._model.config.max_position_embeddings
        if width + max_new_tokens > limit:
            raise UserError(
                f"generate: {width} tokens of prompt and {max_new_tokens} new ones exceed the context of "
                f"{self.base.base}, {limit}; lower generate.max_prompt_tokens or generate.max_new_tokens"
            )
        pad, device = pad_token_id(self.tokenizer), self._model.device
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        output = self._model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, **ending)
        return output[:, width:].tolist()

    def _until_end(self, ids: list[int]) -> tuple[str, bool]:
        """What was said before an end token, and whether it went round in circles until it was cut."""
        length = next((at for at, token in enumerate(ids) if token in self._end_ids), None)
        text = self.tokenizer.decode(ids[:length])
        return text.rstrip("\ufffd"), length is None and ends_in_a_loop(ids)

    def _checked(self, text: str, what: str, *, endless: bool) -> Row:
        text = text.strip()
        if endless:
            return {"dropped": f"{what} without end"}
        if not text:
            return {"dropped": f"empty {what}"}
        if any(token in text for token in self._control):
            return {"dropped": f"control token in the {what}"}
        return {what: text}


def ends_in_a_loop(ids: list[int]) -> bool:
    """Whether the last tokens, LOOP_TOKENS of them at least, are the same few LOOP_TURNS times or more."""
    for period in range(1, len(ids) // LOOP_TURNS + 1):
        length = max(LOOP_TOKENS, LOOP_TURNS * period)
        if length <= len(ids) and ids[-length:-period] == ids[-length + period :]:
            return True
    return False
