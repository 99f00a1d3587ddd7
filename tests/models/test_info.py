from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from curkv.models.info import ModelInfo


def test_ids_are_those_that_both_tokenizer_and_embedding_have() -> None:
    info = ModelInfo(Tokenizer(WordLevel({"a": 0, "b": 1, "d": 3}, unk_token="a")))
    assert [info.num_token_ids(rows) for rows in (0, 2, 4, 8)] == [0, 2, 4, 4]
