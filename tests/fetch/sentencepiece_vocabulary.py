"""A tiny vocabulary of Llama 2's kind."""

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # tokenizer.ggml.token_type


def pieces() -> list[tuple[str, float, int]]:
    special = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    raw = [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    words = [(piece, -float(rank), NORMAL) for rank, piece in enumerate(["ha", "had", "▁had", "▁", "h", "a", "d"])]
    return special + raw + words
