"""What token ids mean as bytes, so that signals of one tokenizer can serve another.

``backend`` reads a Hugging Face fast tokenizer, ``spelling`` knows how each kind of tokenizer
writes bytes, ``vocabulary`` applies that to every id; ``token_table`` is the result, ``table_file``
its Arrow form, and ``tokenizer_files`` what a store keeps of a tokenizer.
"""

from __future__ import annotations

from kdstore.align.token_table import TokenTable
from kdstore.align.tokenizer_files import tokenizer_digest, tokenizer_files
from kdstore.align.vocabulary import TokenFlag

__all__ = ["TokenFlag", "TokenTable", "tokenizer_digest", "tokenizer_files"]
