"""The data room: text and chats to packed, masked, endlessly mixed training sequences.

Read in this order: documents, sources, chat, tokenize, identity, generate, cache, packing, mixture, load, prepare.
"""

from swiftkv_train.data.cache import TokenizedSource, tokenize_source
from swiftkv_train.data.documents import ChatDocument, Document, TextDocument, TokenDocument
from swiftkv_train.data.load import check_no_overlap, load_held_out, load_sources, load_training_data
from swiftkv_train.data.mixture import Batch, TrainingData, held_out_batches
from swiftkv_train.data.packing import PackedSource, Sequence
from swiftkv_train.data.sources import read_documents
from swiftkv_train.data.tokenize import tokenizer_fingerprint

__all__ = [
    "Batch",
    "ChatDocument",
    "Document",
    "PackedSource",
    "Sequence",
    "TextDocument",
    "TokenDocument",
    "TokenizedSource",
    "TrainingData",
    "check_no_overlap",
    "held_out_batches",
    "load_held_out",
    "load_sources",
    "load_training_data",
    "read_documents",
    "tokenize_source",
    "tokenizer_fingerprint",
]
