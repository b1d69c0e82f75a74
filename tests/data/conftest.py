"""One small tokenizer for all data tests, trained once."""

import pytest
from transformers import PreTrainedTokenizerFast

from mnemon.data.tokenizer import default_training_texts, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(default_training_texts(stories_per_task=100), 2048)
